// ceiling_wgmma.cu - how fast a Hopper GPU multiplies at best: products by wgmma of what lies in shared memory.
//
//   sum = `rounds` times left right^T, by each block for itself
//
// left: [ROWS, 64], right: [COLUMNS, 64], bf16, one box each; sum: [blocks, ROWS, COLUMNS] f32. A block has two groups of
// four warps, one below the other, each of which keeps two groups of products under way.
// Limit: tensor cores. Not measured on a GPU yet.
#define DILT_NO_ARRAYS
#include "kernels/lib/hopper.cuh"

struct MultiplyBoxesArgs {
    TensorMap left;   // [64, 1, 1, ROWS], one box
    TensorMap right;  // [64, 1, 1, COLUMNS], one box
    float* sum;       // [blocks, ROWS, COLUMNS]
    int32_t rounds;
};

constexpr int THREADS = 256, ROWS = 128, COLUMNS = 256;

struct alignas(1024) BoxesShared {
    bf16 left[ROWS * BOX];
    bf16 right[COLUMNS * BOX];
    PhaseBarrier barrier;
};

KERNEL(ceiling_wgmma_multiply_bf16, MultiplyBoxesArgs, BoxesShared, THREADS, 1) {
    if constexpr (HOPPER) {
        SHARED(BoxesShared, shared);
        const int thread = threadIdx.x, warp = uniform(thread / 32), lane = thread % 32;
        if (thread == 0) {
            start(shared.barrier, 1);
            barriers_started();
            arrive_expecting(shared.barrier, sizeof shared.left + sizeof shared.right);
            copy_box(shared.left, a.left, shared.barrier, 0, 0, 0, 0);
            copy_box(shared.right, a.right, shared.barrier, 0, 0, 0, 0);
        }
        __syncthreads();
        wait_phase(shared.barrier, 0);
        const bf16* own = shared.left + warp / 4 * BOX * BOX;
        SumTile sum[COLUMNS / 8];
        clear(sum);
        WarpGroupProduct<COLUMNS, false, false> product(thread);
        for (int round = 0; round < a.rounds; ++round) {
            product.begin();
            UNROLL for (int k = 0; k < BOX; k += 16) product.add(sum, operand<false>(own, k), operand<false>(shared.right, k));
            product.commit();
            product.wait<1>(sum);
        }
        product.wait<0>(sum);
        float* to = a.sum + int64_t(blockIdx.x) * ROWS * COLUMNS + (warp * 16 + lane / 4) * COLUMNS + lane % 4 * 2;
        UNROLL for (int j = 0; j < COLUMNS / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e) to[e / 2 * 8 * COLUMNS + 8 * j + e % 2] = sum[j].value[e];
    } else {
        not_hopper();
    }
}
