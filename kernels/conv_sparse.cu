// conv_sparse.cu - convolution with kept weights alone on a GPU, of rows by themselves: a warp owns 128 columns and 4 rows;
// of the weight gradient a chunk of a row's entries, over a split's pixels and samples. And, on both devices, how values come
// out of the weights. Lists and sums as in conv_sparse.cuh.
// Limit: reads of x from cache, one for each multiply-add.
#include "kernels/conv_sparse.cuh"

struct ConvSparseGatherArgs {
    const float* w;          // [K, C, R, S], or its kept weights alone
    const uint32_t* places;  // [count] in w, or NONE
    float* values;           // [count], rounded as products read weights
    int64_t count;
};

constexpr int ROW_THREADS = 512;  // of the products
constexpr int WARP_ROWS = 4;
constexpr int WARP_ENTRIES = 8;  // of a chunk, at most

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
    const Real* from = a.from + place.n;
    const int taps = d.r * d.s, piece = int(max64(1, PIECE_BYTES / (int64_t(Pass::channels(d)) * 512)));
    Samples<4> sum[WARP_ROWS];
    UNROLL for (int i = 0; i < WARP_ROWS; ++i)
        sum[i] = splat<4>(a.epilogue.bias ? a.epilogue.bias[min32(row + i, a.groups - 1)] : 0.0f);
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
    const uint32_t live = a.epilogue.bias ? live_columns<4>(a.epilogue.columns, int(*a.epilogue.count), place.n) : 0;
    UNROLL for (int i = 0; i < WARP_ROWS; ++i) {
        if (row + i >= a.groups) break;
        Real* to = a.to + ((int64_t(row + i) * Pass::to_height(d) * Pass::to_width(d) + place.pixel) * d.n + place.n);
        if (a.epilogue.bias) sum[i] = kept<4>(sum[i], live);
        if (a.epilogue.accumulate) sum[i] += load<4>(to);
        store<4>(to, sum[i]);
    }
}

// ------------------------------------------------------------------------------------------------- weight gradient

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
        const uint32_t shift = there ? a.shifts[chunk.begin + i] : 0;
        // A row that is above every image has no sum.
        r[i] = there ? shift_rows(shift) : -(1 << 30);
        s[i] = shift_columns(shift);
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

// ---------------------------------------------------------------------------------------------------------- kernels

// Grid of the products: column tiles, row tiles. Of the weight gradient: chunks, one a warp; splits.
BARRIER_FREE_KERNEL(REAL(conv_sparse_forward), ConvSparseArgs, ROW_THREADS, 2, 1) {
    staged_rows<false>(a, threadIdx.x, blockIdx.x, blockIdx.y);
}

BARRIER_FREE_KERNEL(REAL(conv_sparse_input_gradient), ConvSparseArgs, ROW_THREADS, 2, 1) {
    staged_rows<true>(a, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(REAL(conv_sparse_weight_gradient), ConvSparseGradientArgs, NoShared, THREADS, 3) {
    const int chunk = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const int begin = unit_of(a, blockIdx.y), end = unit_of(a, blockIdx.y + 1);
    if (chunk < a.chunk_count)
        staged_gradient(a, Chunk(a.chunks + chunk * 4), begin, end, threadIdx.x % 32, partial_of<1>(a, blockIdx.y));
}

BARRIER_FREE_KERNEL(REAL(conv_sparse_gather), ConvSparseGatherArgs, THREADS) {
    EACH(i, a.count) {
        Real value;
        put(&value, a.places[i] == NONE ? 0.0f : a.w[a.places[i]]);
        a.values[i] = widen(value);
    }
}
