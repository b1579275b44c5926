// conv_sparse.cu - convolution with kept weights alone on a GPU: a warp owns 128 columns, and 4 rows or a group of them; of the
// weight gradient a chunk of a list's entries, over a split's pixels and samples. And, on both devices, how values come
// out of the weights and sums into the gradient. Lists and sums as in conv_sparse.cuh.
// Limit: reads of x from cache, one for each R multiply-adds.
#include "kernels/conv_sparse.cuh"

struct ConvSparseGatherArgs {
    const float* w;          // [K, C, R, S], or its kept weights alone
    const uint32_t* places;  // [count] in w, or NONE
    float* values;           // [count]
    int64_t count;
};

struct ConvSparseScatterArgs {
    const float* partial;    // [splits, count]
    const uint32_t* places;
    float* dw;               // as w; written where a weight is kept
    int64_t count;
    int32_t splits;
};

constexpr int THREADS = 256;
constexpr int ROW_THREADS = 512;  // of the products of single rows
constexpr int WARP_ROWS = 4;
// Entries of a chunk, at most: of rows by themselves, of groups.
constexpr int WARP_ENTRIES = 8;
constexpr int GROUP_WARP_ENTRIES = 4;

// A thread's 4 columns of a pixel, if there are so many.
template <bool GRADIENT>
struct Place {
    int pixel, n;
    bool there;
    DEVICE Place(const ConvShape& d, int column) : pixel(column / d.n), n(column % d.n) {
        there = pixel < Taps<GRADIENT>::to_height(d) * Taps<GRADIENT>::to_width(d);
    }
    DEVICE Window window_of(const ConvShape& d) const {
        const int width = Taps<GRADIENT>::to_width(d);
        return window<GRADIENT>(d, pixel / width, pixel % width);
    }
};

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

// What all warps of a block read of x at a time, in bytes: it stays in the first-level cache.
constexpr int PIECE_BYTES = 96 << 10;

// Rows of its warp, piece by piece of the taps.
template <bool GRADIENT>
DEVICE void staged_rows(const ConvSparseArgs& a, int thread, int column_tile, int row_tile) {
    using Pass = Taps<GRADIENT>;
    const ConvShape& d = a.shape;
    const Place<GRADIENT> place(d, (column_tile * 32 + thread % 32) * 4);
    const int row = (row_tile * (ROW_THREADS / 32) + thread / 32) * WARP_ROWS;
    if (!place.there || row >= a.groups) return;
    const Window at = place.window_of(d);
    const float* from = a.from + place.n;
    const int taps = d.r * d.s, piece = int(max64(1, PIECE_BYTES / (int64_t(Pass::channels(d)) * 512)));
    Samples<4> sum[WARP_ROWS];
    UNROLL for (int i = 0; i < WARP_ROWS; ++i)
        sum[i] = splat<4>(a.bias ? a.bias[min32(row + i, a.groups - 1)] : 0.0f);
    for (int run = 0; run < at.runs; ++run) {
        for (int tap = 0; tap < at.taps; tap += piece) {
            const int last = min32(tap + piece, at.taps);
            UNROLL for (int i = 0; i < WARP_ROWS; ++i) {
                if (row + i >= a.groups) break;
                const uint32_t* starts = a.starts + (int64_t(row + i) * taps + at.first + run * d.s);
                const uint32_t end = starts[last];
                for (uint32_t entry = starts[tap]; entry < end; ++entry)
                    sum[i] += load<4>(from + (at.origin + a.offsets[entry])) * a.values[entry];
            }
        }
    }
    const uint32_t live = a.bias ? live_columns<4>(a.columns, int(*a.count), place.n) : 0;
    UNROLL for (int i = 0; i < WARP_ROWS; ++i) {
        if (row + i >= a.groups) break;
        float* to = a.to + ((int64_t(row + i) * Pass::to_height(d) * Pass::to_width(d) + place.pixel) * d.n + place.n);
        if (a.bias) sum[i] = kept<4>(sum[i], live);
        if (a.accumulate) sum[i] += load<4>(to);
        store<4>(to, sum[i]);
    }
}

// ------------------------------------------------------------------------------------------------- weight gradient

// The units of a split of the staged kernels, one after the other: an output pixel's blocks of 128 samples.
struct Unit {
    int block, q, p;
    DEVICE Unit(const ConvShape& d, int unit, int blocks)
        : block(unit % blocks), q(unit / blocks % d.q), p(unit / blocks / d.q) {}
    DEVICE void next(const ConvShape& d, int blocks) {
        if (++block < blocks) return;
        block = 0;
        if (++q == d.q) q = 0, ++p;
    }
};

// The sum of a warp, in all of its lanes.
DEVICE float warp_sum(float sum) {
    UNROLL for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
}

// A warp sums a chunk's entries, of one row.
DEVICE void staged_gradient(const ConvSparseGradientArgs& a, const Chunk& chunk, int begin, int end, int lane,
                            float* partial) {
    const ConvShape& d = a.shape;
    const int blocks = int(ceil_div(d.n, BLOCK_SAMPLES));
    int r[WARP_ENTRIES], s[WARP_ENTRIES];
    int64_t offset[WARP_ENTRIES];
    float sum[WARP_ENTRIES];
    UNROLL for (int i = 0; i < WARP_ENTRIES; ++i) {
        const bool there = chunk.begin + i < chunk.end;
        const int tap = there ? int(a.taps[chunk.begin + i]) : 0;
        // A row that is above every image has no sum.
        r[i] = there ? tap / d.s : -(1 << 30);
        s[i] = tap % d.s;
        offset[i] = there ? a.offsets[chunk.begin + i] : 0;
        sum[i] = 0.0f;
    }
    Unit at(d, begin, blocks);
    for (int unit = begin; unit < end; ++unit, at.next(d, blocks)) {
        const int n = at.block * BLOCK_SAMPLES + lane * 4;
        if (n >= d.n) continue;
        const int h = at.p * d.stride - d.pad, w = at.q * d.stride - d.pad;
        const Samples<4> g = load<4>(a.dy + ((int64_t(chunk.group) * d.p + at.p) * d.q + at.q) * d.n + n);
        const int64_t origin = (int64_t(h) * d.w + w) * d.n + n;
        UNROLL for (int i = 0; i < WARP_ENTRIES; ++i) {
            if (uint32_t(h + r[i]) >= uint32_t(d.h) || uint32_t(w + s[i]) >= uint32_t(d.w)) continue;
            const Samples<4> x = load<4>(a.x + (origin + offset[i]));
            UNROLL for (int lane = 0; lane < 4; ++lane) sum[i] += g[lane] * x[lane];
        }
    }
    UNROLL for (int i = 0; i < WARP_ENTRIES; ++i) {
        const float total = warp_sum(sum[i]);
        if (lane == 0 && chunk.begin + i < chunk.end) partial[chunk.begin + i] = total;
    }
}

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

// Grid of the products: column tiles, row tiles. Of the weight gradients: chunks, one a warp; splits.
BARRIER_FREE_KERNEL(conv_sparse_forward_f32, ConvSparseArgs, ROW_THREADS, 2) {
    staged_rows<false>(a, threadIdx.x, blockIdx.x, blockIdx.y);
}

BARRIER_FREE_KERNEL(conv_groups_forward_f32, ConvSparseArgs, THREADS, 2) {
    staged_group<false>(a, threadIdx.x, blockIdx.x, blockIdx.y);
}

BARRIER_FREE_KERNEL(conv_sparse_input_gradient_f32, ConvSparseArgs, ROW_THREADS, 2) {
    staged_rows<true>(a, threadIdx.x, blockIdx.x, blockIdx.y);
}

BARRIER_FREE_KERNEL(conv_groups_input_gradient_f32, ConvSparseArgs, THREADS, 2) {
    staged_group<true>(a, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(conv_sparse_weight_gradient_f32, ConvSparseGradientArgs, NoShared, THREADS, 3) {
    const int chunk = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const int begin = unit_of(a, blockIdx.y), end = unit_of(a, blockIdx.y + 1);
    if (chunk < a.chunk_count)
        staged_gradient(a, Chunk(a.chunks + chunk * 4), begin, end, threadIdx.x % 32, partial_of<1>(a, blockIdx.y));
}

KERNEL(conv_groups_weight_gradient_f32, ConvSparseGradientArgs, NoShared, THREADS, 2) {
    const int chunk = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const int begin = unit_of(a, blockIdx.y), end = unit_of(a, blockIdx.y + 1);
    if (chunk < a.chunk_count)
        staged_group_gradient(a, Chunk(a.chunks + chunk * 4), begin, end, threadIdx.x % 32,
                              partial_of<GROUP_ROWS>(a, blockIdx.y));
}

BARRIER_FREE_KERNEL(conv_sparse_gather_f32, ConvSparseGatherArgs, THREADS) {
    EACH(i, a.count) a.values[i] = a.places[i] == NONE ? 0.0f : a.w[a.places[i]];
}

// Adds the splits' partial sums, as conv_sum_splits_f32.
BARRIER_FREE_KERNEL(conv_sparse_scatter_f32, ConvSparseScatterArgs, THREADS) {
    EACH(i, a.count) {
        if (a.places[i] == NONE) continue;
        Samples<4> sum = splat<4>(0.0f);
        int split = 0;
        for (; split + 4 <= a.splits; split += 4)
            UNROLL for (int chain = 0; chain < 4; ++chain) sum[chain] += a.partial[(split + chain) * a.count + i];
        for (; split < a.splits; ++split) sum[0] += a.partial[split * a.count + i];
        a.dw[a.places[i]] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
}
