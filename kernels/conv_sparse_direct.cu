// conv_sparse_direct.cu - convolution with kept weights alone on the host: a thread owns a pixel, some vectors of samples, and
// groups of rows one after the other; of the weight gradient a chunk of a list's entries. Lists and sums as in
// conv_sparse.cuh. Limit: reads of x from cache, one for each R multiply-adds.
#define DILT_NO_ARRAYS
#include "kernels/conv_sparse.cuh"

// The same for every instruction set, since src/ops/conv_sparse.rs cuts the grid by it.
constexpr int BLOCK_ROWS = 64;

// Vectors of samples that a thread of the direct products owns: accumulators and reads fit the registers.
template <int R>
constexpr int VECTORS = R == 1 ? 8 : LANES == 16 ? 2 : 1;

template <bool GRADIENT, int R, int V>
DEVICE void samples(const ConvSparseArgs& a, const Window& at, int group, int end, int pixel, int n, int last) {
    for (; n + V * LANES <= last; n += V * LANES) groups<GRADIENT, R, V, LANES>(a, at, group, end, pixel, n);
    if constexpr (V > 1)
        samples<GRADIENT, R, V / 2>(a, at, group, end, pixel, n, last);
    else
        for (; n < last; n += ROW_LANES) groups<GRADIENT, R, 1, ROW_LANES>(a, at, group, end, pixel, n);
}

template <bool GRADIENT, int R>
DEVICE void direct(const ConvSparseArgs& a, int pixel, int sample_block, int row_block) {
    using Pass = Taps<GRADIENT>;
    const ConvShape& d = a.shape;
    const Window at = window<GRADIENT>(d, pixel / Pass::to_width(d), pixel % Pass::to_width(d));
    const int group = row_block * (BLOCK_ROWS / R), n = sample_block * BLOCK_SAMPLES;
    const int end = int(min64(group + BLOCK_ROWS / R, a.groups));
    samples<GRADIENT, R, VECTORS<R>>(a, at, group, end, pixel, n, int(min64(n + BLOCK_SAMPLES, d.n)));
}

// ------------------------------------------------------------------------------------------------- weight gradient

// Entries of a chunk, at most.
constexpr int CHUNK = 64;

// Adds what V vectors of samples at a pixel give to the sums of a chunk.
template <int V, int L>
DEVICE void add_samples(const ConvSparseGradientArgs& a, const Chunk& chunk, const Window& at, const Real* dy, int n,
                        Samples<L> (&sum)[CHUNK]) {
    const ConvShape& d = a.shape;
    const Real* x = a.x + n;
    const uint32_t* starts = a.starts + int64_t(chunk.group) * d.r * d.s + at.first;
    Samples<L> g[V];
    UNROLL for (int v = 0; v < V; ++v) g[v] = load<L>(dy + n + v * L);
    for (int run = 0; run < at.runs; ++run, starts += d.s) {
        const uint32_t first = uint32_t(max64(starts[0], chunk.begin));
        const uint32_t last = uint32_t(min64(starts[at.taps], chunk.end));
        for (uint32_t entry = first; entry < last; ++entry) {
            const Real* read = x + (at.origin + a.offsets[entry]);
            Samples<L> total = sum[entry - chunk.begin];
            UNROLL for (int v = 0; v < V; ++v) total += g[v] * load<L>(read + v * L);
            sum[entry - chunk.begin] = total;
        }
    }
}

template <int V, int L>
DEVICE void add_columns(const ConvSparseGradientArgs& a, const Chunk& chunk, const Window& at, const Real* dy, int n,
                        int last, Samples<L> (&sum)[CHUNK]) {
    for (; n + V * L <= last; n += V * L) add_samples<V, L>(a, chunk, at, dy, n, sum);
    if constexpr (V > 1) add_columns<V / 2, L>(a, chunk, at, dy, n, last, sum);
}

template <int L>
DEVICE void direct_gradient(const ConvSparseGradientArgs& a, const Chunk& chunk, int begin, int end, float* partial) {
    const ConvShape& d = a.shape;
    const int blocks = int(ceil_div(d.n, BLOCK_SAMPLES));
    Samples<L> sum[CHUNK];
    for (int i = 0; i < CHUNK; ++i) sum[i] = splat<L>(0.0f);
    for (int unit = begin; unit < end; ++unit) {
        const int p = unit / blocks, n = unit % blocks * BLOCK_SAMPLES;
        const int last = int(min64(n + BLOCK_SAMPLES, d.n));
        for (int q = 0; q < d.q; ++q) {
            const Window at = window<false>(d, p, q);
            const Real* dy = a.dy + ((int64_t(chunk.group) * d.p + p) * d.q + q) * d.n;
            add_columns<VECTORS<1>, L>(a, chunk, at, dy, n, last, sum);
        }
    }
    for (uint32_t entry = chunk.begin; entry < chunk.end; ++entry)
        partial[entry] = lane_sum<L>(sum[entry - chunk.begin]);
}

// Sums that a thread keeps in registers.
constexpr int TILE_ROWS = 4;
constexpr int TILE_ENTRIES = LANES == 16 ? 6 : 3;

template <int L>
DEVICE void direct_group_gradient(const ConvSparseGradientArgs& a, const Chunk& chunk, int begin, int end,
                                  float* partial) {
    const ConvShape& d = a.shape;
    const Reach down(chunk.tap / d.s, d.h, d.p, d), across(chunk.tap % d.s, d.w, d.q, d);
    const int blocks = int(ceil_div(d.n, BLOCK_SAMPLES)), columns = across.last - across.first;
    // At stride 1 the columns (q, n) of all samples follow each other.
    const bool merged = d.stride == 1 && blocks == 1;
    for (uint32_t entry = chunk.begin; entry < chunk.end; entry += TILE_ENTRIES) {
        int64_t offset[TILE_ENTRIES];
        UNROLL for (int t = 0; t < TILE_ENTRIES; ++t) offset[t] = a.offsets[min64(entry + t, chunk.end - 1)];
        for (int first = 0; first < GROUP_ROWS; first += TILE_ROWS) {
            if (row_of<GROUP_ROWS>(a, chunk.group, first) == NONE) break;
            int64_t row[TILE_ROWS];
            UNROLL for (int i = 0; i < TILE_ROWS; ++i) {
                const uint32_t own = row_of<GROUP_ROWS>(a, chunk.group, first + i);
                row[i] = int64_t(own == NONE ? a.rows[chunk.group * GROUP_ROWS] : own) * d.p * d.q * d.n;
            }
            Samples<L> sum[TILE_ROWS][TILE_ENTRIES];
            UNROLL for (int i = 0; i < TILE_ROWS; ++i)
                UNROLL for (int t = 0; t < TILE_ENTRIES; ++t) sum[i][t] = splat<L>(0.0f);
            for (int unit = begin; unit < end; ++unit) {
                const int p = unit / blocks, n = unit % blocks * BLOCK_SAMPLES;
                if (p < down.first || p >= down.last) continue;
                const int samples = int(min64(BLOCK_SAMPLES, d.n - n));
                const int runs = merged ? int(min64(columns, 1)) : columns, length = merged ? columns * d.n : samples;
                for (int run = 0; run < runs; ++run) {
                    const int q = across.first + run;
                    const Real* dy = a.dy + (int64_t(p) * d.q + q) * d.n + n;
                    const int64_t origin =
                        (int64_t(p * d.stride - d.pad) * d.w + q * d.stride - d.pad) * d.n + n;
                    for (int i = 0; i < length; i += L) {
                        Samples<L> x[TILE_ENTRIES];
                        UNROLL for (int t = 0; t < TILE_ENTRIES; ++t) x[t] = load<L>(a.x + (origin + offset[t] + i));
                        UNROLL for (int m = 0; m < TILE_ROWS; ++m) {
                            const Samples<L> g = load<L>(dy + (row[m] + i));
                            UNROLL for (int t = 0; t < TILE_ENTRIES; ++t) sum[m][t] += g * x[t];
                        }
                    }
                }
            }
            for (int t = 0; t < TILE_ENTRIES && entry + t < chunk.end; ++t)
                for (int i = 0; i < TILE_ROWS; ++i)
                    partial[int64_t(entry + t) * GROUP_ROWS + first + i] = lane_sum<L>(sum[i][t]);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- kernels

// Grid of the products: pixels, blocks of samples, blocks of rows. Of the weight gradients: chunks, splits.
BARRIER_FREE_KERNEL(REAL(conv_sparse_forward_direct), ConvSparseArgs, 1) {
    direct<false, 1>(a, blockIdx.x, blockIdx.y, blockIdx.z);
}

BARRIER_FREE_KERNEL(REAL(conv_groups_forward_direct), ConvSparseArgs, 1) {
    direct<false, GROUP_ROWS>(a, blockIdx.x, blockIdx.y, blockIdx.z);
}

BARRIER_FREE_KERNEL(REAL(conv_sparse_input_gradient_direct), ConvSparseArgs, 1) {
    direct<true, 1>(a, blockIdx.x, blockIdx.y, blockIdx.z);
}

BARRIER_FREE_KERNEL(REAL(conv_groups_input_gradient_direct), ConvSparseArgs, 1) {
    direct<true, GROUP_ROWS>(a, blockIdx.x, blockIdx.y, blockIdx.z);
}

BARRIER_FREE_KERNEL(REAL(conv_sparse_weight_gradient_direct), ConvSparseGradientArgs, 1) {
    const Chunk chunk(a.chunks + blockIdx.x * 4);
    const int begin = unit_of(a, blockIdx.y), end = unit_of(a, blockIdx.y + 1);
    float* partial = partial_of<1>(a, blockIdx.y);
    if (LANES == ROW_LANES || a.shape.n % LANES == 0)
        direct_gradient<LANES>(a, chunk, begin, end, partial);
    else
        direct_gradient<ROW_LANES>(a, chunk, begin, end, partial);
}

BARRIER_FREE_KERNEL(REAL(conv_groups_weight_gradient_direct), ConvSparseGradientArgs, 1) {
    const Chunk chunk(a.chunks + blockIdx.x * 4);
    const int begin = unit_of(a, blockIdx.y), end = unit_of(a, blockIdx.y + 1);
    float* partial = partial_of<GROUP_ROWS>(a, blockIdx.y);
    if (LANES == ROW_LANES || a.shape.n % LANES == 0)
        direct_group_gradient<LANES>(a, chunk, begin, end, partial);
    else
        direct_group_gradient<ROW_LANES>(a, chunk, begin, end, partial);
}
