// conv_sparse.cu - convolution with a ticket's kept weights alone: forward, input gradient and weight gradient, f32.
//
// The sums of conv.cu without their zeros. A list has a row for each output channel (for the input gradient: input
// channel), whose entries stand in the order of their taps, then of the other channel: those that read inside the image
// are one run of the list, or one run for each filter row where the image ends left or right. With stride 2 and more
// the taps of the input gradient are ordered by their remainder first, since a pixel meets those of one remainder.
//
// An entry is where it reads, as the distance from the pixel's origin: what tap 0 reads there, or of the input gradient
// the tap 0 of its remainder; and a value for each of R rows. R = 1: rows by themselves. R = 8: groups of rows that keep
// similar columns, whose list has every column that one of them keeps, with zeros for the others: what is read serves
// them all. Sums are f32 in an order that depends on the shape and the mask alone.
//
// `direct`: a thread owns a pixel, some vectors of samples, and groups of rows one after the other. `staged`: a warp
// owns 128 columns, and 4 rows or a group. Weight gradient: a block (staged: a warp) owns a chunk of a list's entries, a
// split some of the output's pixels and samples. Limit: reads of x from cache, one for each R multiply-adds.
#include "kernels/conv.cuh"

// Forward: x to y. Input gradient: dy to dx; bias is null.
struct ConvSparseArgs {
    const float* from;
    const uint32_t* rows;    // [groups, R], or NONE; null where R = 1: rows in their order
    const uint32_t* starts;  // [groups, taps] and one more: where the entries of a group's tap begin
    const int32_t* offsets;  // [entries]
    const float* values;     // [entries, R]
    const float* bias;       // [K], or null
    float* to;
    const uint32_t* count;   // number of true samples; read only where there is a bias, since padded columns stay zero
    ConvShape shape;
    Columns columns;         // what the shape's N is made of; read only where there is a bias
    int32_t groups;
    int32_t accumulate;      // add to what `to` holds
};

struct ConvSparseGradientArgs {
    const float* x;
    const float* dy;
    const uint32_t* rows;     // of the forward pass, as the next four
    const uint32_t* starts;
    const int32_t* offsets;
    const uint32_t* taps;     // [entries] of rows by themselves, staged: r S + s of each
    const uint32_t* chunks;   // [chunks, 4]: group, tap (R = 8: of all entries), first entry, and the one after the last
    float* partial;           // [splits, entries, R]
    ConvShape shape;
    int32_t entries, chunk_count, units, splits;
};

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

// The row of a group that has no more rows, and the place of a weight that is not kept.
constexpr uint32_t NONE = 0xffffffffu;

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

// Row i of a group.
template <int R, class Args>
DEVICE uint32_t row_of(const Args& a, int group, int i) {
    return R == 1 ? uint32_t(group) : a.rows[group * R + i];
}

// Writes V vectors of a row's samples at a pixel.
template <bool GRADIENT, int V, int L>
DEVICE void finish(const ConvSparseArgs& a, uint32_t row, int pixel, int n, const uint32_t (&live)[V],
                   Samples<L> (&sum)[V]) {
    using Pass = Taps<GRADIENT>;
    const ConvShape& d = a.shape;
    float* to = a.to + (int64_t(row) * Pass::to_height(d) * Pass::to_width(d) + pixel) * d.n + n;
    UNROLL for (int v = 0; v < V; ++v) {
        if (a.bias) sum[v] = kept<L>(sum[v], live[v]);
        if (a.accumulate) sum[v] += load<L>(to + v * L);
        store<L>(to + v * L, sum[v]);
    }
}

// V vectors of samples of a group of R rows at a pixel.
template <bool GRADIENT, int R, int V, int L>
DEVICE void product(const ConvSparseArgs& a, const Window& at, int group, int pixel, int n, const uint32_t (&live)[V]) {
    const ConvShape& d = a.shape;
    const float* from = a.from + n;
    const uint32_t* starts = a.starts + int64_t(group) * d.r * d.s + at.first;
    Samples<L> sum[R][V];
    UNROLL for (int i = 0; i < R; ++i) {
        const uint32_t row = row_of<R>(a, group, i);
        UNROLL for (int v = 0; v < V; ++v) sum[i][v] = splat<L>(a.bias && row != NONE ? a.bias[row] : 0.0f);
    }
    for (int run = 0; run < at.runs; ++run, starts += d.s) {
        for (uint32_t entry = starts[0]; entry < starts[at.taps]; ++entry) {
            const float* x = from + (at.origin + a.offsets[entry]);
            const auto value = load_uniform<R>(a.values + int64_t(entry) * R);
            Samples<L> read[V];
            UNROLL for (int v = 0; v < V; ++v) read[v] = load<L>(x + v * L);
            UNROLL for (int i = 0; i < R; ++i)
                UNROLL for (int v = 0; v < V; ++v) sum[i][v] += read[v] * value[i];
        }
    }
    UNROLL for (int i = 0; i < R; ++i) {
        const uint32_t row = row_of<R>(a, group, i);
        if (row == NONE) break;
        finish<GRADIENT, V, L>(a, row, pixel, n, live, sum[i]);
    }
}

// The same for every instruction set, since src/ops/conv_sparse.rs cuts the grid by them.
constexpr int GROUP_ROWS = 8;  // R of a group
constexpr int BLOCK_ROWS = 64;
constexpr int BLOCK_SAMPLES = 128;
constexpr int THREADS = 256;
constexpr int ROW_THREADS = 512;  // of the staged products of single rows
constexpr int WARP_ROWS = 4;

// Vectors of samples that a thread of the direct products owns: accumulators and reads fit the registers.
template <int R>
constexpr int VECTORS = R == 1 ? 8 : LANES == 16 ? 2 : 1;

template <bool GRADIENT, int R, int V, int L>
DEVICE void groups(const ConvSparseArgs& a, const Window& at, int group, int end, int pixel, int n) {
    uint32_t live[V] = {};
    if (a.bias)
        UNROLL for (int v = 0; v < V; ++v) live[v] = live_columns<L>(a.columns, int(*a.count), n + v * L);
    for (; group < end; ++group) product<GRADIENT, R, V, L>(a, at, group, pixel, n, live);
}

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

// Adds the entries to the sums of R rows. nvcc unrolls this by four; reading four entries ahead by hand, the last again at
// the end, took up to a quarter more of an H100's time.
template <int R>
DEVICE void add_entries(const ConvSparseArgs& a, const float* from, int64_t origin, uint32_t entry, uint32_t end,
                        Samples<4> (&sum)[R][1]) {
    for (; entry < end; ++entry) {
        const Samples<4> read = load<4>(from + (origin + a.offsets[entry]));
        const auto value = load_uniform<R>(a.values + int64_t(entry) * R);
        UNROLL for (int i = 0; i < R; ++i) sum[i][0] += read * value[i];
    }
}

// A group of its warp.
template <bool GRADIENT>
DEVICE void staged_group(const ConvSparseArgs& a, int thread, int column_tile, int row_tile) {
    const ConvShape& d = a.shape;
    const Place<GRADIENT> place(d, (column_tile * 32 + thread % 32) * 4);
    const int group = row_tile * (THREADS / 32) + thread / 32;
    if (!place.there || group >= a.groups) return;
    const Window at = place.window_of(d);
    const uint32_t live[1] = {a.bias ? live_columns<4>(a.columns, int(*a.count), place.n) : 0};
    Samples<4> sum[GROUP_ROWS][1];
    UNROLL for (int i = 0; i < GROUP_ROWS; ++i) {
        const uint32_t row = row_of<GROUP_ROWS>(a, group, i);
        sum[i][0] = splat<4>(a.bias && row != NONE ? a.bias[row] : 0.0f);
    }
    const uint32_t* starts = a.starts + (int64_t(group) * d.r * d.s + at.first);
    for (int run = 0; run < at.runs; ++run, starts += d.s)
        add_entries<GROUP_ROWS>(a, a.from + place.n, at.origin, starts[0], starts[at.taps], sum);
    UNROLL for (int i = 0; i < GROUP_ROWS; ++i) {
        const uint32_t row = row_of<GROUP_ROWS>(a, group, i);
        if (row != NONE) finish<GRADIENT, 1, 4>(a, row, place.pixel, place.n, live, sum[i]);
    }
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
    const uint32_t live[1] = {a.bias ? live_columns<4>(a.columns, int(*a.count), place.n) : 0};
    const int taps = d.r * d.s, piece = int(max64(1, PIECE_BYTES / (int64_t(Pass::channels(d)) * 512)));
    Samples<4> sum[WARP_ROWS][1][1];
    UNROLL for (int i = 0; i < WARP_ROWS; ++i)
        sum[i][0][0] = splat<4>(a.bias ? a.bias[min32(row + i, a.groups - 1)] : 0.0f);
    for (int run = 0; run < at.runs; ++run) {
        for (int tap = 0; tap < at.taps; tap += piece) {
            const int last = min32(tap + piece, at.taps);
            UNROLL for (int i = 0; i < WARP_ROWS; ++i) {
                if (row + i >= a.groups) break;
                const uint32_t* starts = a.starts + (int64_t(row + i) * taps + at.first + run * d.s);
                add_entries<1>(a, a.from + place.n, at.origin, starts[tap], starts[last], sum[i]);
            }
        }
    }
    UNROLL for (int i = 0; i < WARP_ROWS; ++i)
        if (row + i < a.groups) finish<GRADIENT, 1, 4>(a, row + i, place.pixel, place.n, live, sum[i][0]);
}

// ------------------------------------------------------------------------------------------------- weight gradient

// Entries of a chunk, at most: of a block of the direct kernel, of a warp of the staged one.
constexpr int CHUNK = 64;
constexpr int WARP_ENTRIES = 8;

struct Chunk {
    int group, tap;
    uint32_t begin, end;
    DEVICE Chunk(const uint32_t* chunk) : group(int(chunk[0])), tap(int(chunk[1])), begin(chunk[2]), end(chunk[3]) {}
};

// Adds what V vectors of samples at a pixel give to the sums of a chunk.
template <int V, int L>
DEVICE void add_samples(const ConvSparseGradientArgs& a, const Chunk& chunk, const Window& at, const float* dy, int n,
                        Samples<L> (&sum)[CHUNK]) {
    const ConvShape& d = a.shape;
    const float* x = a.x + n;
    const uint32_t* starts = a.starts + int64_t(chunk.group) * d.r * d.s + at.first;
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
    const int blocks = int(ceil_div(d.n, BLOCK_SAMPLES));
    Samples<L> sum[CHUNK];
    for (int i = 0; i < CHUNK; ++i) sum[i] = splat<L>(0.0f);
    for (int unit = begin; unit < end; ++unit) {
        const int p = unit / blocks, n = unit % blocks * BLOCK_SAMPLES;
        const int last = int(min64(n + BLOCK_SAMPLES, d.n));
        for (int q = 0; q < d.q; ++q) {
            const Window at = window<false>(d, p, q);
            const float* dy = a.dy + ((int64_t(chunk.group) * d.p + p) * d.q + q) * d.n;
            add_columns<VECTORS<1>, L>(a, chunk, at, dy, n, last, sum);
        }
    }
    for (uint32_t entry = chunk.begin; entry < chunk.end; ++entry)
        partial[entry] = lane_sum<L>(sum[entry - chunk.begin]);
}

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

// The weight gradient of groups. A chunk's entries are of one tap, which reads inside the image for output coordinates
// first to last of each axis.
struct Reach {
    int first, last;
    DEVICE Reach(int tap, int from, int to, const ConvShape& d)
        : first(int(ceil_div(max64(d.pad - tap, 0), d.stride))),
          last(int(min64(to, (from - 1 + d.pad - tap + d.stride) / d.stride))) {}
};

// Sums that a thread of the direct kernel keeps in registers, and a warp of the staged one.
constexpr int TILE_ROWS = 4;
constexpr int TILE_ENTRIES = LANES == 16 ? 6 : 3;
constexpr int GROUP_WARP_ENTRIES = 4;

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
                    const float* dy = a.dy + (int64_t(p) * d.q + q) * d.n + n;
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

// Grid of the direct products: pixels, blocks of samples, blocks of rows. Of the staged ones: column tiles, row tiles.
BARRIER_FREE_KERNEL(conv_sparse_forward_direct_f32, ConvSparseArgs, 1) {
    direct<false, 1>(a, blockIdx.x, blockIdx.y, blockIdx.z);
}

BARRIER_FREE_KERNEL(conv_groups_forward_direct_f32, ConvSparseArgs, 1) {
    direct<false, GROUP_ROWS>(a, blockIdx.x, blockIdx.y, blockIdx.z);
}

BARRIER_FREE_KERNEL(conv_sparse_forward_f32, ConvSparseArgs, ROW_THREADS, 2) {
    staged_rows<false>(a, threadIdx.x, blockIdx.x, blockIdx.y);
}

BARRIER_FREE_KERNEL(conv_groups_forward_f32, ConvSparseArgs, THREADS, 2) {
    staged_group<false>(a, threadIdx.x, blockIdx.x, blockIdx.y);
}

BARRIER_FREE_KERNEL(conv_sparse_input_gradient_direct_f32, ConvSparseArgs, 1) {
    direct<true, 1>(a, blockIdx.x, blockIdx.y, blockIdx.z);
}

BARRIER_FREE_KERNEL(conv_groups_input_gradient_direct_f32, ConvSparseArgs, 1) {
    direct<true, GROUP_ROWS>(a, blockIdx.x, blockIdx.y, blockIdx.z);
}

BARRIER_FREE_KERNEL(conv_sparse_input_gradient_f32, ConvSparseArgs, ROW_THREADS, 2) {
    staged_rows<true>(a, threadIdx.x, blockIdx.x, blockIdx.y);
}

BARRIER_FREE_KERNEL(conv_groups_input_gradient_f32, ConvSparseArgs, THREADS, 2) {
    staged_group<true>(a, threadIdx.x, blockIdx.x, blockIdx.y);
}

// Grid of the weight gradients: chunks (staged: one a warp), splits. A split has some of the units: direct, output rows
// of 128 samples; staged, pixels of 128 samples.
DEVICE int unit_of(const ConvSparseGradientArgs& a, int split) {
    return int(int64_t(a.units) * split / a.splits);
}

template <int R>
DEVICE float* partial_of(const ConvSparseGradientArgs& a, int split) {
    return a.partial + int64_t(split) * a.entries * R;
}

BARRIER_FREE_KERNEL(conv_sparse_weight_gradient_direct_f32, ConvSparseGradientArgs, 1) {
    const Chunk chunk(a.chunks + blockIdx.x * 4);
    const int begin = unit_of(a, blockIdx.y), end = unit_of(a, blockIdx.y + 1);
    float* partial = partial_of<1>(a, blockIdx.y);
    if (LANES == ROW_LANES || a.shape.n % LANES == 0)
        direct_gradient<LANES>(a, chunk, begin, end, partial);
    else
        direct_gradient<ROW_LANES>(a, chunk, begin, end, partial);
}

BARRIER_FREE_KERNEL(conv_groups_weight_gradient_direct_f32, ConvSparseGradientArgs, 1) {
    const Chunk chunk(a.chunks + blockIdx.x * 4);
    const int begin = unit_of(a, blockIdx.y), end = unit_of(a, blockIdx.y + 1);
    float* partial = partial_of<GROUP_ROWS>(a, blockIdx.y);
    if (LANES == ROW_LANES || a.shape.n % LANES == 0)
        direct_group_gradient<LANES>(a, chunk, begin, end, partial);
    else
        direct_group_gradient<ROW_LANES>(a, chunk, begin, end, partial);
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
