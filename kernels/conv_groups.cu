// conv_groups.cu - convolution with kept weights alone on a GPU, of groups of 8 rows, f32: a warp owns 128 columns and a
// group; of the weight gradient a chunk of a group's entries, over a split's pixels and samples. Lists and sums as in
// conv_sparse.cuh; in bf16 groups are larger, conv_groups_mma.cu.
// Limit: reads of x from cache, one for 8 multiply-adds.
#include "kernels/conv_sparse.cuh"

constexpr int GROUP_WARP_ENTRIES = 4;  // of a chunk, at most

// A group of its warp, in the host's template: a loop of its own that read the end of the list once took 1.16 times as long
// (median of benches/crossover.rs, where the dense times of the two runs agree; H200 against H100, 2026-11-26).
template <bool GRADIENT>
DEVICE void staged_group(const ConvSparseArgs& a, int thread, int column_tile, int row_tile) {
    const ConvShape& d = a.shape;
    const Place<GRADIENT> place(d, (column_tile * 32 + thread % 32) * 4);
    const int group = row_tile * (THREADS / 32) + thread / 32;
    if (!place.there || group >= a.groups) return;
    groups<GRADIENT, GROUP_ROWS, 1, 4>(a, place.window_of(d), group, group + 1, place.pixel, place.n);
}

// ------------------------------------------------------------------------------------------------- weight gradient

// A lane sums its 4 samples, for a whole group and a chunk of at most GROUP_WARP_ENTRIES.
DEVICE void staged_group_gradient(const ConvSparseGradientArgs& a, const Chunk& chunk, int begin, int end, int lane,
                                  float* partial) {
    const ConvShape& d = a.shape;
    const Reach down(chunk.tap / d.s, d.h, d.p, d), across(chunk.tap % d.s, d.w, d.q, d);
    const int blocks = int(ceil_div(d.n, BLOCK_SAMPLES)), plane = d.p * d.q;
    int offset[GROUP_WARP_ENTRIES], row[GROUP_ROWS];
    float sum[GROUP_WARP_ENTRIES][GROUP_ROWS];
    UNROLL for (int i = 0; i < GROUP_ROWS; ++i) {
        const uint32_t own = row_of<GROUP_ROWS>(a, chunk.group, i);
        row[i] = int(own == NONE ? a.rows[chunk.group * GROUP_ROWS] : own);
    }
    UNROLL for (int t = 0; t < GROUP_WARP_ENTRIES; ++t) {
        offset[t] = a.offsets[min64(chunk.begin + t, chunk.end - 1)];
        UNROLL for (int i = 0; i < GROUP_ROWS; ++i) sum[t][i] = 0.0f;
    }
    Unit at(d, begin, blocks);
    for (int unit = begin; unit < end; ++unit, at.next(d, blocks)) {
        const int n = at.block * BLOCK_SAMPLES + lane * 4;
        const bool meets = at.p >= down.first && at.p < down.last && at.q >= across.first && at.q < across.last;
        if (!meets || n >= d.n) continue;
        const int64_t origin = (int64_t(at.p * d.stride - d.pad) * d.w + at.q * d.stride - d.pad) * d.n + n;
        Samples<4> x[GROUP_WARP_ENTRIES];
        UNROLL for (int t = 0; t < GROUP_WARP_ENTRIES; ++t) x[t] = load<4>(a.x + (origin + offset[t]));
        UNROLL for (int i = 0; i < GROUP_ROWS; ++i) {
            const Samples<4> g = load<4>(a.dy + (int64_t(row[i]) * plane + at.p * d.q + at.q) * d.n + n);
            UNROLL for (int t = 0; t < GROUP_WARP_ENTRIES; ++t)
                UNROLL for (int lane = 0; lane < 4; ++lane) sum[t][i] += g[lane] * x[t][lane];
        }
    }
    UNROLL for (int t = 0; t < GROUP_WARP_ENTRIES; ++t)
        UNROLL for (int i = 0; i < GROUP_ROWS; ++i) {
            const float total = warp_sum(sum[t][i]);
            if (lane == 0 && chunk.begin + t < chunk.end)
                partial[int64_t(chunk.begin + t) * GROUP_ROWS + i] = total;
        }
}

// ---------------------------------------------------------------------------------------------------------- kernels

// Grid of the products: column tiles, row tiles. Of the weight gradient: chunks, one a warp; splits.
BARRIER_FREE_KERNEL(conv_groups_forward_f32, ConvSparseArgs, THREADS, 2) {
    staged_group<false>(a, threadIdx.x, blockIdx.x, blockIdx.y);
}

BARRIER_FREE_KERNEL(conv_groups_input_gradient_f32, ConvSparseArgs, THREADS, 2) {
    staged_group<true>(a, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(conv_groups_weight_gradient_f32, ConvSparseGradientArgs, NoShared, THREADS, 2) {
    const int chunk = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const int begin = unit_of(a, blockIdx.y), end = unit_of(a, blockIdx.y + 1);
    if (chunk < a.chunk_count)
        staged_group_gradient(a, Chunk(a.chunks + chunk * 4), begin, end, threadIdx.x % 32,
                              partial_of<GROUP_ROWS>(a, blockIdx.y));
}
