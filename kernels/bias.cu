// bias.cu - the gradient of a bias, the sum of each row of dy, where no weight gradient on tensor cores sums what it reads
// (conv_mma.cuh).
//
//   dbias[k] = sum over columns of dy[k,column]
//
// dy: [K, row], padded columns zero; dbias: [K]. One block per row; f32 sums in a fixed order: same bits every run. Limit: bytes,
// one read of dy.
#include "kernels/lib/device.cuh"

struct BiasGradientArgs {
    const Real* dy;  // [K, row]
    float* dbias;    // [K]
    int64_t row;     // a multiple of 8
};

constexpr int THREADS = 256;

KERNEL(REAL(bias_gradient), BiasGradientArgs, WarpSums, THREADS) {
    SHARED(WarpSums, shared);
    const Real* dy = a.dy + int64_t(blockIdx.x) * a.row;
    Samples<ROW_LANES> lanes = splat<ROW_LANES>(0.0f);
    for (int64_t i = threadIdx.x * ROW_LANES; i < a.row; i += blockDim.x * ROW_LANES) lanes += load<ROW_LANES>(dy + i);
    const float sum = block_sum(lane_sum<ROW_LANES>(lanes), shared.scratch, threadIdx.x, blockDim.x);
    if (threadIdx.x == 0) a.dbias[blockIdx.x] = sum;
}
