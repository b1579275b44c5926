// norm_join.cu - what a batch norm needs of a row from what the epilogues of convolutions have summed of its tiles (conv_mma.cuh):
// the statistics of what it reads, and the sums of its gradient. f32.
//
//   mean and squared deviations of a row: norm.cuh;   invstd = 1 / sqrt(squares / M + epsilon)
//   dbeta = sum of dz;   dgamma = sum of dz xhat
//
// M: true values of a row. A block owns a feature, its threads share the tiles in an order that depends on the shape alone.
// Limit: latency; the tiles are 8 bytes for at least 64 elements of bf16, statistics read twice, the second time from cache.
#include "kernels/norm.cuh"

struct NormJoinArgs {
    const Moments* tiles;  // [features, tiles of a row]
    float* running_mean;
    float* running_var;
    float* mean;
    float* invstd;
    const uint32_t* count;  // number of true samples
    int32_t columns;        // of a row: pixels times samples
    int32_t n;              // samples of a pixel
    int32_t width;          // columns of a tile; the last may have fewer
    float epsilon;
    float momentum;
};

struct NormJoinGradientArgs {
    const GradientSums* tiles;  // [features, tiles of a row]
    float* dgamma;
    float* dbeta;
    int32_t count;              // tiles of a row
};

constexpr int THREADS = 1024;

DEVICE void join_tiles(const NormJoinArgs& a, WarpSums& shared, int feature, uint32_t thread, uint32_t threads) {
    const int tiles = int(ceil_div(a.columns, a.width)), count = int(min64(*a.count, a.n));
    const auto before = [&](int column) { return true_columns(min32(column, a.columns), a.n, count); };
    const auto items_of = [&](int tile) { return float(before((tile + 1) * a.width) - before(tile * a.width)); };
    const float items = float(max64(1, before(a.columns)));
    const Moments* row = a.tiles + int64_t(feature) * tiles;
    const Moments all = join(row, tiles, items, items_of, shared.scratch, thread, threads);
    if (thread == 0) keep(a, feature, count, items, all, 1.0f / sqrtf(all.squares / items + a.epsilon));
}

DEVICE void join_gradient(const NormJoinGradientArgs& a, WarpSums& shared, int feature, uint32_t thread, uint32_t threads) {
    const GradientSums row = join(a.tiles + int64_t(feature) * a.count, a.count, shared.scratch, thread, threads);
    if (thread == 0) a.dbeta[feature] = row.dz, a.dgamma[feature] = row.dz_xhat;
}

// Grid of both: features.
KERNEL(norm_join_f32, NormJoinArgs, WarpSums, THREADS) {
    SHARED(WarpSums, shared);
    join_tiles(a, shared, blockIdx.x, threadIdx.x, blockDim.x);
}

KERNEL(norm_join_gradient_f32, NormJoinGradientArgs, WarpSums, THREADS) {
    SHARED(WarpSums, shared);
    join_gradient(a, shared, blockIdx.x, threadIdx.x, blockDim.x);
}
