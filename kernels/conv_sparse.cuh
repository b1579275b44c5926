// conv_sparse.cuh - convolution with a ticket's kept weights alone, f32: what the kernels of conv_sparse.cu and
// conv_sparse_direct.cu share.
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
#pragma once
#include "kernels/conv_kept.cuh"

constexpr int GROUP_ROWS = 8;  // R of a group
constexpr int BLOCK_SAMPLES = 128;

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

// V vectors of samples of a group of R rows at a pixel.
template <bool GRADIENT, int R, int V, int L>
DEVICE void product(const ConvSparseArgs& a, const Window& at, int group, int pixel, int n, const uint32_t (&live)[V]) {
    using Pass = Taps<GRADIENT>;
    const ConvShape& d = a.shape;
    const Real* from = a.from + n;
    const uint32_t* starts = a.starts + int64_t(group) * d.r * d.s + at.first;
    Samples<L> sum[R][V];
    UNROLL for (int i = 0; i < R; ++i) {
        const uint32_t row = row_of<R>(a, group, i);
        UNROLL for (int v = 0; v < V; ++v) sum[i][v] = splat<L>(a.epilogue.bias && row != NONE ? a.epilogue.bias[row] : 0.0f);
    }
    for (int run = 0; run < at.runs; ++run, starts += d.s) {
        for (uint32_t entry = starts[0]; entry < starts[at.taps]; ++entry) {
            const Real* x = from + (at.origin + a.offsets[entry]);
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
        Real* to = a.to + (int64_t(row) * Pass::to_height(d) * Pass::to_width(d) + pixel) * d.n + n;
        UNROLL for (int v = 0; v < V; ++v) {
            if (a.epilogue.bias) sum[i][v] = kept<L>(sum[i][v], live[v]);
            if (a.epilogue.accumulate) sum[i][v] += load<L>(to + v * L);
            store<L>(to + v * L, sum[i][v]);
        }
    }
}

template <bool GRADIENT, int R, int V, int L>
DEVICE void groups(const ConvSparseArgs& a, const Window& at, int group, int end, int pixel, int n) {
    uint32_t live[V] = {};
    if (a.epilogue.bias)
        UNROLL for (int v = 0; v < V; ++v) live[v] = live_columns<L>(a.epilogue.columns, int(*a.epilogue.count), n + v * L);
    for (; group < end; ++group) product<GRADIENT, R, V, L>(a, at, group, pixel, n, live);
}

struct Chunk {
    int group, tap;
    uint32_t begin, end;
    DEVICE Chunk(const uint32_t* chunk) : group(int(chunk[0])), tap(int(chunk[1])), begin(chunk[2]), end(chunk[3]) {}
};

// The weight gradient of groups. A chunk's entries are of one tap, which reads inside the image for output coordinates
// first to last of each axis.
struct Reach {
    int first, last;
    DEVICE Reach(int tap, int from, int to, const ConvShape& d)
        : first(int(ceil_div(max64(d.pad - tap, 0), d.stride))),
          last(int(min64(to, (from - 1 + d.pad - tap + d.stride) / d.stride))) {}
};

// Where the units of a split of the weight gradient begin: direct, output rows of 128 samples; staged, pixels of 128
// samples.
DEVICE int unit_of(const ConvSparseGradientArgs& a, int split) {
    return int(int64_t(a.units) * split / a.splits);
}

template <int R>
DEVICE float* partial_of(const ConvSparseGradientArgs& a, int split) {
    return a.partial + int64_t(split) * a.entries * R;
}

// ------------------------------------------------------------------------------------------ warps, in the staged kernels

constexpr int THREADS = 256;

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
