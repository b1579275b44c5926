// layer_norm_sum.cu - adds the sums that layer_norm.cu's backward pass makes of each tile of columns, in their order: f32.
//
//   dgamma[d] = sum over tiles of partial[tile, 0, d];   dbeta[d] = sum over tiles of partial[tile, 1, d]
//
// partial: [tiles, 2, pitch]. On a GPU a block owns 32 places of the 2 pitch, and its warps share the tiles; on the host
// its one thread has vectors of places. Limit: bytes, partial read once.
#include "kernels/lib/device.cuh"

struct LayerNormSumArgs {
    const float* partial;
    float* dgamma;
    float* dbeta;
    int32_t features;
    int32_t pitch;  // features rounded up to a multiple of 8
    int32_t tiles;
};

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;

struct WarpPlaces {
    float sum[WARPS][32];
};

// Adds the tiles' sums at places `first` to first + L.
template <int L, bool STAGED>
DEVICE void add_tiles(const LayerNormSumArgs& a, WarpPlaces* shared, int first, int lane, int warp) {
    const int warps = STAGED ? WARPS : 1;
    Samples<L> sum = splat<L>(0.0f);
    if (first < 2 * a.pitch)
        for (int tile = warp; tile < a.tiles; tile += warps)
            sum += load<L>(a.partial + int64_t(tile) * 2 * a.pitch + first);
    if constexpr (STAGED) {
        store<L>(&shared->sum[warp][lane], sum);
        __syncthreads();
        if (warp > 0) return;
        for (int other = 1; other < warps; ++other) sum += load<L>(&shared->sum[other][lane]);
    }
    float* to = first < a.pitch ? a.dgamma : a.dbeta;
    const int feature = first % a.pitch;
    UNROLL for (int i = 0; i < L; ++i)
        if (first < 2 * a.pitch && feature + i < a.features) to[feature + i] = sum[i];
}

// Grid of both: groups of 32 places.
KERNEL(layer_norm_sum_staged_f32, LayerNormSumArgs, WarpPlaces, THREADS) {
    SHARED(WarpPlaces, shared);
    const int lane = int(threadIdx.x) % 32;
    add_tiles<1, true>(a, &shared, int(blockIdx.x) * 32 + lane, lane, int(threadIdx.x) / 32);
}

BARRIER_FREE_KERNEL(layer_norm_sum_direct_f32, LayerNormSumArgs, 1) {
    for (int i = 0; i < 32; i += ROW_LANES) add_tiles<ROW_LANES, false>(a, nullptr, int(blockIdx.x) * 32 + i, 0, 0);
}
