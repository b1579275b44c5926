// conv_sparse.cu - convolution with a ticket's kept weights alone: forward, input gradient and weight gradient, f32.
//
// The sums of conv.cu without their zeros. A list has a row for each output channel (for the input gradient: input
// channel), whose entries stand in the order of their taps, then of the other channel: those that read inside the image
// are one run of the list, or one run for each filter row where the image ends left or right. With stride 2 and more
// the taps of the input gradient are ordered by their remainder first, since a pixel meets those of one remainder.
//
// An entry is a value and where it reads, as the distance from the pixel's origin: what tap 0 reads there, or of the
// input gradient the tap 0 of its remainder. Sums are f32 in an order that depends on the shape and the mask alone.
//
// `direct`: a thread owns a pixel, up to 8 vectors of samples, and rows one after the other. `staged`: a warp owns 128
// columns and 4 rows. Weight gradient: a block owns a chunk of a row's entries, a split some rows of the output and
// samples. Limit: reads of x from cache, one for each multiply-add.
#include "kernels/conv.cuh"

// Forward: x to y. Input gradient: dy to dx; bias is null.
struct ConvSparseArgs {
    const float* from;
    const uint32_t* starts;  // [rows, taps] and one more: where the entries of a row's tap begin
    const int32_t* offsets;  // [kept]
    const float* values;     // [kept]
    const float* bias;       // [K], or null
    float* to;
    const uint32_t* count;   // number of true samples; read only where there is a bias, since padded columns stay zero
    ConvShape shape;
    Columns columns;         // what the shape's N is made of; read only where there is a bias
    int32_t accumulate;      // add to what `to` holds
};

struct ConvSparseGradientArgs {
    const float* x;
    const float* dy;
    const uint32_t* starts;   // of the forward pass, as the next three
    const int32_t* offsets;
    const uint32_t* places;   // [kept], in w
    const uint32_t* chunks;   // [chunks, 3]: row, first entry, and the one after the last
    float* partial;           // [splits, kept]
    ConvShape shape;
    int32_t kept, splits;
};

struct ConvSparseGatherArgs {
    const float* w;          // [K, C, R, S]
    const uint32_t* places;  // [kept]
    float* values;           // [kept]
    int64_t kept;
};

struct ConvSparseScatterArgs {
    const float* partial;    // [splits, kept]
    const uint32_t* places;
    float* dw;               // [K, C, R, S]; written where a weight is kept
    int64_t kept;
    int32_t splits;
};

// Where the taps that a pixel meets stand in a row's list: `runs` runs of `taps` taps each, a filter row apart.
struct Window {
    int64_t origin;  // element that offsets count from
    int first, runs, taps;
};

// The place of a tap in the order by remainder.
template <bool GRADIENT>
DEVICE int place(int tap, int filter, int stride) {
    if (!GRADIENT) return tap;
    const int rest = tap % stride;
    return int(rest * (filter / stride) + min64(rest, filter % stride)) + tap / stride;
}

template <bool GRADIENT>
DEVICE Window window(const ConvShape& d, int o, int u) {
    using Pass = Taps<GRADIENT>;
    const Axis down = Pass::axis(o, d.r, Pass::from_height(d), d), across = Pass::axis(u, d.s, Pass::from_width(d), d);
    if (down.count == 0 || across.count == 0) return {0, 0, 0, 0};
    const int64_t h = GRADIENT ? down.source + down.first / d.stride : down.source - down.first;
    const int64_t w = GRADIENT ? across.source + across.first / d.stride : across.source - across.first;
    const int first = place<GRADIENT>(down.first, d.r, d.stride) * d.s + place<GRADIENT>(across.first, d.s, d.stride);
    const int64_t origin = (h * Pass::from_width(d) + w) * d.n;
    if (across.count == d.s) return {origin, first, 1, down.count * d.s};
    return {origin, first, down.count, across.count};
}

// V vectors of samples of a row at a pixel.
template <bool GRADIENT, int V, int L>
DEVICE void product(const ConvSparseArgs& a, const Window& at, int row, int pixel, int n, const uint32_t (&live)[V]) {
    using Pass = Taps<GRADIENT>;
    const ConvShape& d = a.shape;
    const float* from = a.from + n;
    const uint32_t* starts = a.starts + int64_t(row) * d.r * d.s + at.first;
    Samples<L> sum[V];
    UNROLL for (int v = 0; v < V; ++v) sum[v] = splat<L>(a.bias ? a.bias[row] : 0.0f);
    for (int run = 0; run < at.runs; ++run, starts += d.s) {
        for (uint32_t entry = starts[0]; entry < starts[at.taps]; ++entry) {
            const float* x = from + (at.origin + a.offsets[entry]);
            const float value = a.values[entry];
            UNROLL for (int v = 0; v < V; ++v) sum[v] += load<L>(x + v * L) * value;
        }
    }
    float* to = a.to + (int64_t(row) * Pass::to_height(d) * Pass::to_width(d) + pixel) * d.n + n;
    UNROLL for (int v = 0; v < V; ++v) {
        if (a.bias) sum[v] = kept<L>(sum[v], live[v]);
        if (a.accumulate) sum[v] += load<L>(to + v * L);
        store<L>(to + v * L, sum[v]);
    }
}

// The same for every instruction set, since src/ops/conv_sparse.rs cuts the grid by them.
constexpr int GROUP_ROWS = 64;
constexpr int GROUP_SAMPLES = 128;
constexpr int VECTORS = 8;
constexpr int THREADS = 256;
constexpr int WARP_ROWS = 4;

template <bool GRADIENT, int V, int L>
DEVICE void rows(const ConvSparseArgs& a, const Window& at, int row, int end, int pixel, int n) {
    uint32_t live[V] = {};
    if (a.bias)
        UNROLL for (int v = 0; v < V; ++v) live[v] = live_columns<L>(a.columns, int(*a.count), n + v * L);
    for (; row < end; ++row) product<GRADIENT, V, L>(a, at, row, pixel, n, live);
}

template <bool GRADIENT, int V>
DEVICE void samples(const ConvSparseArgs& a, const Window& at, int row, int end, int pixel, int n, int last) {
    for (; n + V * LANES <= last; n += V * LANES) rows<GRADIENT, V, LANES>(a, at, row, end, pixel, n);
    if constexpr (V > 1)
        samples<GRADIENT, V / 2>(a, at, row, end, pixel, n, last);
    else
        for (; n < last; n += ROW_LANES) rows<GRADIENT, 1, ROW_LANES>(a, at, row, end, pixel, n);
}

template <bool GRADIENT>
DEVICE void direct(const ConvSparseArgs& a, int pixel, int group, int row_group) {
    using Pass = Taps<GRADIENT>;
    const ConvShape& d = a.shape;
    const Window at = window<GRADIENT>(d, pixel / Pass::to_width(d), pixel % Pass::to_width(d));
    const int row = row_group * GROUP_ROWS, n = group * GROUP_SAMPLES;
    const int end = int(min64(row + GROUP_ROWS, Pass::rows(d)));
    samples<GRADIENT, VECTORS>(a, at, row, end, pixel, n, int(min64(n + GROUP_SAMPLES, d.n)));
}

// A thread's 4 columns of 4 rows.
template <bool GRADIENT>
DEVICE void staged(const ConvSparseArgs& a, int thread, int column_tile, int row_tile) {
    using Pass = Taps<GRADIENT>;
    const ConvShape& d = a.shape;
    const int column = (column_tile * 32 + thread % 32) * 4, pixel = column / d.n;
    if (pixel >= Pass::to_height(d) * Pass::to_width(d)) return;
    const Window at = window<GRADIENT>(d, pixel / Pass::to_width(d), pixel % Pass::to_width(d));
    const int row = (row_tile * (THREADS / 32) + thread / 32) * WARP_ROWS;
    rows<GRADIENT, 1, 4>(a, at, row, int(min64(row + WARP_ROWS, Pass::rows(d))), pixel, column % d.n);
}

// ------------------------------------------------------------------------------------------------- weight gradient

// Entries of a chunk, at most; the chunk of a block of the staged kernel is one entry for each 4 of its threads.
constexpr int CHUNK = 64;
constexpr int WARP_ENTRIES = CHUNK / (THREADS / 32);

struct Chunk {
    int row;
    uint32_t begin, end;
    DEVICE Chunk(const uint32_t* chunk) : row(int(chunk[0])), begin(chunk[1]), end(chunk[2]) {}
};

// Adds what V vectors of samples at a pixel give to the sums of a chunk.
template <int V, int L>
DEVICE void add_samples(const ConvSparseGradientArgs& a, const Chunk& chunk, const Window& at, const float* dy, int n,
                        Samples<L> (&sum)[CHUNK]) {
    const ConvShape& d = a.shape;
    const float* x = a.x + n;
    const uint32_t* starts = a.starts + int64_t(chunk.row) * d.r * d.s + at.first;
    Samples<L> g[V];
    UNROLL for (int v = 0; v < V; ++v) g[v] = load<L>(dy + n + v * L);
    for (int run = 0; run < at.runs; ++run, starts += d.s) {
        const uint32_t first = uint32_t(max64(starts[0], chunk.begin));
        const uint32_t last = uint32_t(min64(starts[at.taps], chunk.end));
        for (uint32_t entry = first; entry < last; ++entry) {
            const float* read = x + (at.origin + a.offsets[entry]);
            Samples<L> total = sum[entry - chunk.begin];
            UNROLL for (int v = 0; v < V; ++v) total += g[v] * load<L>(read + v * L);
            sum[entry - chunk.begin] = total;
        }
    }
}

template <int V, int L>
DEVICE void add_columns(const ConvSparseGradientArgs& a, const Chunk& chunk, const Window& at, const float* dy, int n,
                        int last, Samples<L> (&sum)[CHUNK]) {
    for (; n + V * L <= last; n += V * L) add_samples<V, L>(a, chunk, at, dy, n, sum);
    if constexpr (V > 1) add_columns<V / 2, L>(a, chunk, at, dy, n, last, sum);
}

template <int L>
DEVICE void direct_gradient(const ConvSparseGradientArgs& a, const Chunk& chunk, int begin, int end, float* partial) {
    const ConvShape& d = a.shape;
    const int groups = int(ceil_div(d.n, GROUP_SAMPLES));
    Samples<L> sum[CHUNK];
    for (int i = 0; i < CHUNK; ++i) sum[i] = splat<L>(0.0f);
    for (int unit = begin; unit < end; ++unit) {
        const int p = unit / groups, n = unit % groups * GROUP_SAMPLES;
        const int last = int(min64(n + GROUP_SAMPLES, d.n));
        for (int q = 0; q < d.q; ++q) {
            const Window at = window<false>(d, p, q);
            const float* dy = a.dy + ((int64_t(chunk.row) * d.p + p) * d.q + q) * d.n;
            add_columns<VECTORS, L>(a, chunk, at, dy, n, last, sum);
        }
    }
    for (uint32_t entry = chunk.begin; entry < chunk.end; ++entry)
        partial[entry] = lane_sum<L>(sum[entry - chunk.begin]);
}

// A warp sums WARP_ENTRIES entries over the split's columns.
DEVICE void staged_gradient(const ConvSparseGradientArgs& a, const Chunk& chunk, int begin, int end, int thread,
                            float* partial) {
    const ConvShape& d = a.shape;
    const int lane = thread % 32, groups = int(ceil_div(d.n, GROUP_SAMPLES));
    const uint32_t first = chunk.begin + thread / 32 * WARP_ENTRIES;
    int r[WARP_ENTRIES], s[WARP_ENTRIES];
    int64_t offset[WARP_ENTRIES];
    float sum[WARP_ENTRIES];
    UNROLL for (int i = 0; i < WARP_ENTRIES; ++i) {
        const bool there = first + i < chunk.end;
        const uint32_t at = there ? a.places[first + i] : 0;
        // A row that is above every image has no sum.
        r[i] = there ? int(at / d.s % d.r) : -(1 << 30);
        s[i] = int(at % d.s);
        offset[i] = there ? a.offsets[first + i] : 0;
        sum[i] = 0.0f;
    }
    for (int unit = begin; unit < end; ++unit) {
        const int p = unit / groups, n = unit % groups * GROUP_SAMPLES + lane * 4;
        if (n >= d.n) continue;
        for (int q = 0; q < d.q; ++q) {
            const int h = p * d.stride - d.pad, w = q * d.stride - d.pad;
            const Samples<4> g = load<4>(a.dy + ((int64_t(chunk.row) * d.p + p) * d.q + q) * d.n + n);
            const int64_t origin = (int64_t(h) * d.w + w) * d.n + n;
            UNROLL for (int i = 0; i < WARP_ENTRIES; ++i) {
                if (h + r[i] < 0 || h + r[i] >= d.h || w + s[i] < 0 || w + s[i] >= d.w) continue;
                sum[i] += lane_sum<4>(g * load<4>(a.x + (origin + offset[i])));
            }
        }
    }
    UNROLL for (int i = 0; i < WARP_ENTRIES; ++i) {
        UNROLL for (int offset = 16; offset > 0; offset /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], offset);
        if (lane == 0 && first + i < chunk.end) partial[first + i] = sum[i];
    }
}

// ---------------------------------------------------------------------------------------------------------- kernels

// Grid of the direct products: pixels, groups of samples, groups of rows. Of the staged ones: column tiles, row tiles.
BARRIER_FREE_KERNEL(conv_sparse_forward_direct_f32, ConvSparseArgs, 1) {
    direct<false>(a, blockIdx.x, blockIdx.y, blockIdx.z);
}

// Four blocks: left alone, ptxas aims at six on sm_80 and spills.
BARRIER_FREE_KERNEL(conv_sparse_forward_f32, ConvSparseArgs, THREADS, 4) {
    staged<false>(a, threadIdx.x, blockIdx.x, blockIdx.y);
}

BARRIER_FREE_KERNEL(conv_sparse_input_gradient_direct_f32, ConvSparseArgs, 1) {
    direct<true>(a, blockIdx.x, blockIdx.y, blockIdx.z);
}

BARRIER_FREE_KERNEL(conv_sparse_input_gradient_f32, ConvSparseArgs, THREADS, 4) {
    staged<true>(a, threadIdx.x, blockIdx.x, blockIdx.y);
}

// Grid of the weight gradients: chunks, splits. A split has some of the units, each an output row of 128 samples.
DEVICE int unit_of(const ConvSparseGradientArgs& a, int split) {
    return int(int64_t(a.shape.p) * ceil_div(a.shape.n, GROUP_SAMPLES) * split / a.splits);
}

BARRIER_FREE_KERNEL(conv_sparse_weight_gradient_direct_f32, ConvSparseGradientArgs, 1) {
    const Chunk chunk(a.chunks + blockIdx.x * 3);
    const int begin = unit_of(a, blockIdx.y), end = unit_of(a, blockIdx.y + 1);
    float* partial = a.partial + int64_t(blockIdx.y) * a.kept;
    if (LANES == ROW_LANES || a.shape.n % LANES == 0)
        direct_gradient<LANES>(a, chunk, begin, end, partial);
    else
        direct_gradient<ROW_LANES>(a, chunk, begin, end, partial);
}

KERNEL(conv_sparse_weight_gradient_f32, ConvSparseGradientArgs, NoShared, THREADS) {
    const int begin = unit_of(a, blockIdx.y), end = unit_of(a, blockIdx.y + 1);
    staged_gradient(a, Chunk(a.chunks + blockIdx.x * 3), begin, end, threadIdx.x,
                    a.partial + int64_t(blockIdx.y) * a.kept);
}

BARRIER_FREE_KERNEL(conv_sparse_gather_f32, ConvSparseGatherArgs, THREADS) {
    EACH(i, a.kept) a.values[i] = a.w[a.places[i]];
}

// Adds the splits' partial sums, in their order.
BARRIER_FREE_KERNEL(conv_sparse_scatter_f32, ConvSparseScatterArgs, THREADS) {
    EACH(i, a.kept) {
        float sum = a.partial[i];
        for (int split = 1; split < a.splits; ++split) sum += a.partial[split * a.kept + i];
        a.dw[a.places[i]] = sum;
    }
}
