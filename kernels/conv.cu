// conv.cu - convolution as Y = W X, forward, input gradient and weight gradient, f32.
//
//   y[k,p,q,n]  = bias[k] + sum over c,r,s of w[k,c,r,s] x[c, p*stride+r-pad, q*stride+s-pad, n]
//   dx[c,h,w,n] = sum over k,r,s of w[k,c,r,s] dy[k, (h+pad-r)/stride, (w+pad-s)/stride, n]   where that divides
//   dw[k,c,r,s] = sum over p,q,n of dy[k,p,q,n] x[c, p*stride+r-pad, q*stride+s-pad, n]
//
// x: [C, H, W, N], w: [K, C, R, S], y: [K, P, Q, N]. A linear layer is the 1x1 case on a 1x1 image, where N counts the
// columns of a feature row: samples, or the tokens of all samples. N is a multiple of 8. What lies outside the image is
// zero. Sums are f32 in an order that depends on the shape alone.
//
// Each pass has two tilings of the same sums. `staged`: a block copies tiles through shared memory, its threads
// multiply from there: the GPU's way. `direct`: one thread keeps a register tile and reads rows where they lie: the
// CPU's way, whose cache does the staging. Forward and input gradient are one template: they differ only in which
// input row a filter tap reads (Taps). Direct 1x1 filters of stride 1 are in linear.cu.
#include "kernels/conv.cuh"

// Forward: x to y. Input gradient: dy to dx; bias is null.
struct ConvArgs {
    const float* from;
    const float* w;
    const float* bias;     // [K], or null
    float* to;
    const uint32_t* count; // number of true samples; read only where there is a bias, since padded columns stay zero
    ConvShape shape;
    Columns columns;       // what the shape's N is made of; read only where there is a bias
    int32_t accumulate;    // add to what `to` holds
};

struct ConvWeightGradientArgs {
    const float* x;
    const float* dy;
    float* partial;    // [splits, K, C*R*S]; dw itself if there is one split
    ConvShape shape;
    int32_t splits;    // ranges of columns (p,q,n), summed apart
};

struct ConvSumArgs {
    const float* partial;  // [splits, count]
    float* sum;            // [count]
    int64_t count;
    int32_t splits;
};

struct ConvBiasGradientArgs {
    const float* dy;  // [K, row]
    float* dbias;     // [K]
    int64_t row;
};

// ---------------------------------------------------------------------------------------------------------- direct

// Register tiles: rows x vectors of samples for the product, rows x taps for the weight gradient. The accumulators and
// a few loaded vectors fit the 32 (AVX-512) or 16 registers. Tried with AVX-512 on ResNet-20's layers, least CPU ms of
// 20 runs on a busy Xeon of family 6, model 207, forward / input gradient: 8x2 96 / 107, 6x4 100 / 107, 4x4 191 / 149,
// 16x1 144 / 230. Weight gradient: 4x6 119, 8x3 182; taps in the order (r, s, c) gained nothing, in small planes neither.
constexpr int DIRECT_VECTORS = 2;
constexpr int DIRECT_SAMPLES = DIRECT_VECTORS * LANES;
constexpr int DIRECT_ROWS = LANES == 16 ? 8 : 4;
constexpr int GRADIENT_ROWS = 4;
constexpr int GRADIENT_TAPS = LANES == 16 ? 6 : 3;
constexpr int GRADIENT_OUTSIDE = 64;  // zeros that stand for samples outside the image

// What one thread does: several register tiles, whose input window it reads from cache again and again. The same for
// every instruction set, since src/ops/conv.rs cuts the grid by it.
constexpr int DIRECT_GROUP_ROWS = 64;
constexpr int DIRECT_GROUP_SAMPLES = 64;
constexpr int GRADIENT_GROUP_TAPS = 12;

template <bool GRADIENT, int ROWS, int VECTORS, int L>
DEVICE void direct_tile(const ConvArgs& a, const Axis& down, const Axis& across, int row, int pixel, int n,
                        const uint32_t (&live)[VECTORS]) {
    using Pass = Taps<GRADIENT>;
    const ConvShape& d = a.shape;
    const int64_t width = Pass::from_width(d), plane = Pass::from_height(d) * width * d.n;
    const int64_t row_stride = Pass::row_stride(d), channel_stride = Pass::channel_stride(d);
    const float* from = a.from + (down.source * width + across.source) * d.n + n;
    const float* w = a.w + row * row_stride + int64_t(down.first) * d.s + across.first;
    Samples<L> sum[ROWS][VECTORS];
    UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int v = 0; v < VECTORS; ++v) sum[i][v] = splat<L>(a.bias ? a.bias[row + i] : 0.0f);
    for (int channel = 0; channel < Pass::channels(d); ++channel, from += plane, w += channel_stride) {
        for (int r = 0; r < down.count; ++r) {
            const float* x = from + r * down.source_step * width * d.n;
            const float* tap = w + int64_t(r) * down.step * d.s;
            for (int s = 0; s < across.count; ++s, x += across.source_step * d.n, tap += across.step) {
                Samples<L> read[VECTORS];
                UNROLL for (int v = 0; v < VECTORS; ++v) read[v] = load<L>(x + v * L);
                UNROLL for (int i = 0; i < ROWS; ++i)
                    UNROLL for (int v = 0; v < VECTORS; ++v) sum[i][v] += read[v] * tap[i * row_stride];
            }
        }
    }
    const int64_t pixels = int64_t(Pass::to_height(d)) * Pass::to_width(d);
    UNROLL for (int i = 0; i < ROWS; ++i) {
        float* to = a.to + ((row + i) * pixels + pixel) * d.n + n;
        UNROLL for (int v = 0; v < VECTORS; ++v) {
            if (a.bias) sum[i][v] = kept<L>(sum[i][v], live[v]);
            if (a.accumulate) sum[i][v] += load<L>(to + v * L);
            store<L>(to + v * L, sum[i][v]);
        }
    }
}

template <bool GRADIENT, int VECTORS, int L>
DEVICE void direct_rows(const ConvArgs& a, const Axis& down, const Axis& across, int row, int end, int pixel, int n) {
    uint32_t live[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; ++v)
        live[v] = a.bias ? live_columns<L>(a.columns, int(*a.count), n + v * L) : 0;
    for (; row + DIRECT_ROWS <= end; row += DIRECT_ROWS)
        direct_tile<GRADIENT, DIRECT_ROWS, VECTORS, L>(a, down, across, row, pixel, n, live);
    for (; row + 2 <= end; row += 2) direct_tile<GRADIENT, 2, VECTORS, L>(a, down, across, row, pixel, n, live);
    for (; row < end; ++row) direct_tile<GRADIENT, 1, VECTORS, L>(a, down, across, row, pixel, n, live);
}

// Grid: output pixels, groups of samples, groups of rows.
template <bool GRADIENT>
DEVICE void direct(const ConvArgs& a, int pixel, int samples, int rows) {
    using Pass = Taps<GRADIENT>;
    const ConvShape& d = a.shape;
    const int o = pixel / Pass::to_width(d), u = pixel % Pass::to_width(d);
    const Axis down = Pass::axis(o, d.r, Pass::from_height(d), d);
    const Axis across = Pass::axis(u, d.s, Pass::from_width(d), d);
    const int row = rows * DIRECT_GROUP_ROWS, row_end = int(min64(row + DIRECT_GROUP_ROWS, Pass::rows(d)));
    int n = samples * DIRECT_GROUP_SAMPLES;
    const int n_end = int(min64(n + DIRECT_GROUP_SAMPLES, d.n));
    for (; n + DIRECT_SAMPLES <= n_end; n += DIRECT_SAMPLES)
        direct_rows<GRADIENT, DIRECT_VECTORS, LANES>(a, down, across, row, row_end, pixel, n);
    constexpr int REST = LANES < 8 ? LANES : 8;
    for (; n < n_end; n += 8) direct_rows<GRADIENT, 8 / REST, REST>(a, down, across, row, row_end, pixel, n);
}

// Sums over output rows [begin, end): rows k.. x taps j.. of dw, where j counts (c, r, s). Columns (q, n) are walked
// in the order of memory: one vector of samples over the whole image at a time meets 8 of the first-level cache's 64
// sets at N = 128, and took 2.3 times as long for C = K = 16 on 32x32.
template <int L>
DEVICE void gradient_tile(const ConvWeightGradientArgs& a, int k, int j, int begin, int end,
                          float (&total)[GRADIENT_ROWS][GRADIENT_TAPS]) {
    const ConvShape& d = a.shape;
    const int taps = d.c * d.r * d.s, filter = d.r * d.s;
    const float outside[GRADIENT_OUTSIDE] = {};
    int64_t dy[GRADIENT_ROWS];
    int c[GRADIENT_TAPS], r[GRADIENT_TAPS], s[GRADIENT_TAPS];
    int left = 0, right = d.q;  // columns q from left to right read inside the image for every tap
    UNROLL for (int i = 0; i < GRADIENT_ROWS; ++i) dy[i] = min64(k + i, d.k - 1) * d.p * d.q * d.n;
    UNROLL for (int t = 0; t < GRADIENT_TAPS; ++t) {
        const int tap = int(min64(j + t, taps - 1));
        c[t] = tap / filter, r[t] = tap % filter / d.s, s[t] = tap % d.s;
        left = int(max64(left, ceil_div(max64(d.pad - s[t], 0), d.stride)));
        right = int(min64(right, d.w - 1 + d.pad - s[t] < 0 ? 0 : (d.w - 1 + d.pad - s[t]) / d.stride + 1));
    }
    Samples<L> sum[GRADIENT_ROWS][GRADIENT_TAPS];
    UNROLL for (int i = 0; i < GRADIENT_ROWS; ++i)
        UNROLL for (int t = 0; t < GRADIENT_TAPS; ++t) sum[i][t] = splat<L>(0.0f);
    for (int p = begin; p < end; ++p) {
        const float* row[GRADIENT_TAPS];  // where the tap reads for q = 0, or null above and below the image
        bool all = true, any = false;
        UNROLL for (int t = 0; t < GRADIENT_TAPS; ++t) {
            const int h = p * d.stride - d.pad + r[t];
            const bool inside = h >= 0 && h < d.h;
            row[t] = inside ? a.x + ((int64_t(c[t]) * d.h + h) * d.w + s[t] - d.pad) * d.n : nullptr;
            all &= inside, any |= inside;
        }
        if (!any) continue;
        for (int q = 0; q < d.q;) {
            // Where every tap reads inside the image, columns (q, n) merge (stride 1), else a run is one pixel at most,
            // and zeros stand for what is outside.
            const bool inside = all && q >= left && q < right;
            const int pixels = inside && d.stride == 1 ? right - q : 1;
            const int columns = pixels * d.n, run = inside ? columns : int(min64(columns, GRADIENT_OUTSIDE));
            for (int first = 0; first < columns; first += run) {
                const float* x[GRADIENT_TAPS];
                UNROLL for (int t = 0; t < GRADIENT_TAPS; ++t) {
                    const int w = q * d.stride - d.pad + s[t];
                    const bool reads = inside || (row[t] && w >= 0 && w < d.w);
                    x[t] = reads ? row[t] + int64_t(q) * d.stride * d.n + first : outside;
                }
                const float* g = a.dy + (int64_t(p) * d.q + q) * d.n + first;
                const int length = int(min64(run, columns - first));
                for (int i = 0; i < length; i += L) {
                    Samples<L> read[GRADIENT_TAPS];
                    UNROLL for (int t = 0; t < GRADIENT_TAPS; ++t) read[t] = load<L>(x[t] + i);
                    UNROLL for (int m = 0; m < GRADIENT_ROWS; ++m) {
                        const Samples<L> dyv = load<L>(g + dy[m] + i);
                        UNROLL for (int t = 0; t < GRADIENT_TAPS; ++t) sum[m][t] += dyv * read[t];
                    }
                }
            }
            q += pixels;
        }
    }
    UNROLL for (int i = 0; i < GRADIENT_ROWS; ++i)
        UNROLL for (int t = 0; t < GRADIENT_TAPS; ++t) total[i][t] = lane_sum<L>(sum[i][t]);
}

// ---------------------------------------------------------------------------------------------------------- staged

constexpr int THREADS = 256;
constexpr int DEPTH = 8;           // reduction steps of a stage of the product
constexpr int GRADIENT_DEPTH = 16; // columns of a stage of the weight gradient

// A block's tile of the product: ROWS x COLUMNS of the result, each thread PER_THREAD rows x 4 samples.
template <int ROWS, int COLUMNS>
struct ProductTile {
    static constexpr int VECTORS = COLUMNS / 4;
    static constexpr int PER_THREAD = ROWS * VECTORS / THREADS;
    static constexpr int X_LOADS = DEPTH * VECTORS / THREADS;
    static constexpr int W_LOADS = (ROWS * DEPTH + THREADS - 1) / THREADS;
    static_assert(ROWS * VECTORS % THREADS == 0 && DEPTH * VECTORS % THREADS == 0, "whole threads");
    struct Shared {
        float x[2][DEPTH][COLUMNS];
        float w[2][DEPTH][ROWS + 4];  // 4 more: the transposing store meets no bank twice
    };
};

template <bool GRADIENT, int ROWS, int COLUMNS>
DEVICE void staged(const ConvArgs& a, typename ProductTile<ROWS, COLUMNS>::Shared& stage, int thread, int column_tile,
                   int row_tile) {
    using Pass = Taps<GRADIENT>;
    using Tile = ProductTile<ROWS, COLUMNS>;
    const ConvShape& d = a.shape;
    const int width = Pass::to_width(d), columns = Pass::to_height(d) * width * d.n;
    const int filter = d.r * d.s, depth = Pass::channels(d) * filter;
    const int64_t plane = int64_t(Pass::from_height(d)) * Pass::from_width(d) * d.n;
    const int row0 = row_tile * ROWS, rows = Pass::rows(d);

    // This thread's samples: always the same, so their place in the image is found once.
    const int vector = thread % Tile::VECTORS;
    const int column = column_tile * COLUMNS + vector * 4;
    const bool live = column < columns;
    const int n = column % d.n, pixel = column / d.n, o = pixel / width, u = pixel % width;

    Samples<4> next_x[Tile::X_LOADS];
    float next_w[Tile::W_LOADS];
    const auto fetch = [&](int base) {
        UNROLL for (int i = 0; i < Tile::X_LOADS; ++i) {
            const int step = base + thread / Tile::VECTORS + i * (THREADS / Tile::VECTORS);
            next_x[i] = splat<4>(0.0f);
            if (live && step < depth) {
                const int channel = step / filter, tap = step % filter;
                const int h = Pass::source(o, tap / d.s, Pass::from_height(d), d);
                const int w = Pass::source(u, tap % d.s, Pass::from_width(d), d);
                if (h >= 0 && w >= 0)
                    next_x[i] = load<4>(a.from + channel * plane + (int64_t(h) * Pass::from_width(d) + w) * d.n + n);
            }
        }
        UNROLL for (int i = 0; i < Tile::W_LOADS; ++i) {
            const int element = thread + i * THREADS, row = row0 + element / DEPTH, step = base + element % DEPTH;
            next_w[i] = 0.0f;
            if (element < ROWS * DEPTH && row < rows && step < depth)
                next_w[i] = a.w[row * Pass::row_stride(d) + step / filter * Pass::channel_stride(d) + step % filter];
        }
    };
    const auto put = [&](int half) {
        UNROLL for (int i = 0; i < Tile::X_LOADS; ++i)
            store<4>(&stage.x[half][thread / Tile::VECTORS + i * (THREADS / Tile::VECTORS)][vector * 4], next_x[i]);
        UNROLL for (int i = 0; i < Tile::W_LOADS; ++i) {
            const int element = thread + i * THREADS;
            if (element < ROWS * DEPTH) stage.w[half][element % DEPTH][element / DEPTH] = next_w[i];
        }
    };

    const int first = thread / Tile::VECTORS * Tile::PER_THREAD;
    Samples<4> sum[Tile::PER_THREAD];
    UNROLL for (int i = 0; i < Tile::PER_THREAD; ++i) sum[i] = splat<4>(0.0f);
    fetch(0);
    put(0);
    __syncthreads();
    for (int base = 0, half = 0; base < depth; base += DEPTH, half ^= 1) {
        if (base + DEPTH < depth) fetch(base + DEPTH);
        UNROLL for (int step = 0; step < DEPTH; ++step) {
            const Samples<4> x = load<4>(&stage.x[half][step][vector * 4]);
            UNROLL for (int i = 0; i < Tile::PER_THREAD; ++i) sum[i] += x * stage.w[half][step][first + i];
        }
        if (base + DEPTH < depth) put(half ^ 1);
        __syncthreads();
    }
    if (!live) return;
    const uint32_t kept_columns = a.bias ? live_columns<4>(a.columns, int(*a.count), n) : 0;
    UNROLL for (int i = 0; i < Tile::PER_THREAD; ++i) {
        const int row = row0 + first + i;
        if (row >= rows) break;
        float* to = a.to + int64_t(row) * columns + column;
        if (a.bias) sum[i] = kept<4>(sum[i] + splat<4>(a.bias[row]), kept_columns);
        if (a.accumulate) sum[i] += load<4>(to);
        store<4>(to, sum[i]);
    }
}

// A block's tile of the weight gradient: ROWS output channels x TAPS filter taps, each thread a part of it.
template <int ROWS, int TAPS, int PER_ROWS, int PER_TAPS>
struct GradientTile {
    static constexpr int VECTORS = GRADIENT_DEPTH / 4;
    static constexpr int Y_LOADS = (ROWS * VECTORS + THREADS - 1) / THREADS;
    static constexpr int X_LOADS = (TAPS * VECTORS + THREADS - 1) / THREADS;
    static_assert((ROWS / PER_ROWS) * (TAPS / PER_TAPS) == THREADS, "one part a thread");
    struct Shared {
        float dy[GRADIENT_DEPTH][ROWS + 4];
        float x[GRADIENT_DEPTH][TAPS + 4];
    };
};

template <int ROWS, int TAPS, int PER_ROWS, int PER_TAPS>
DEVICE void staged_gradient(const ConvWeightGradientArgs& a,
                            typename GradientTile<ROWS, TAPS, PER_ROWS, PER_TAPS>::Shared& stage, int thread,
                            int tap_tile, int row_tile, int split) {
    using Tile = GradientTile<ROWS, TAPS, PER_ROWS, PER_TAPS>;
    const ConvShape& d = a.shape;
    const int filter = d.r * d.s, taps = d.c * filter, columns = d.p * d.q * d.n;
    const int stages = int(ceil_div(columns, GRADIENT_DEPTH));
    const int begin = int(int64_t(stages) * split / a.splits) * GRADIENT_DEPTH;
    const int end = int(min64(columns, int64_t(stages) * (split + 1) / a.splits * GRADIENT_DEPTH));
    const int k0 = row_tile * ROWS, j0 = tap_tile * TAPS;
    const int k = thread / (TAPS / PER_TAPS) * PER_ROWS, j = thread % (TAPS / PER_TAPS) * PER_TAPS;

    float sum[PER_ROWS][PER_TAPS];
    UNROLL for (int i = 0; i < PER_ROWS; ++i)
        UNROLL for (int t = 0; t < PER_TAPS; ++t) sum[i][t] = 0.0f;
    for (int base = begin; base < end; base += GRADIENT_DEPTH) {
        UNROLL for (int i = 0; i < Tile::Y_LOADS; ++i) {
            const int element = thread + i * THREADS, row = element / Tile::VECTORS;
            const int vector = element % Tile::VECTORS, column = base + vector * 4;
            if (row < ROWS) {
                Samples<4> g = splat<4>(0.0f);
                if (k0 + row < d.k && column < end) g = load<4>(a.dy + int64_t(k0 + row) * columns + column);
                UNROLL for (int lane = 0; lane < 4; ++lane) stage.dy[vector * 4 + lane][row] = g[lane];
            }
        }
        UNROLL for (int i = 0; i < Tile::X_LOADS; ++i) {
            const int element = thread + i * THREADS, tap = element / Tile::VECTORS;
            const int vector = element % Tile::VECTORS, column = base + vector * 4;
            if (tap < TAPS) {
                Samples<4> x = splat<4>(0.0f);
                if (j0 + tap < taps && column < end) {
                    const int n = column % d.n, pixel = column / d.n;
                    const int c = (j0 + tap) / filter, r = (j0 + tap) % filter / d.s, s = (j0 + tap) % d.s;
                    const int h = Taps<false>::source(pixel / d.q, r, d.h, d);
                    const int w = Taps<false>::source(pixel % d.q, s, d.w, d);
                    if (h >= 0 && w >= 0) x = load<4>(a.x + ((int64_t(c) * d.h + h) * d.w + w) * d.n + n);
                }
                UNROLL for (int lane = 0; lane < 4; ++lane) stage.x[vector * 4 + lane][tap] = x[lane];
            }
        }
        __syncthreads();
        UNROLL for (int step = 0; step < GRADIENT_DEPTH; ++step)
            UNROLL for (int i = 0; i < PER_ROWS; ++i)
                UNROLL for (int t = 0; t < PER_TAPS; ++t) sum[i][t] += stage.dy[step][k + i] * stage.x[step][j + t];
        __syncthreads();
    }
    float* partial = a.partial + int64_t(split) * d.k * taps;
    UNROLL for (int i = 0; i < PER_ROWS; ++i)
        UNROLL for (int t = 0; t < PER_TAPS; ++t)
            if (k0 + k + i < d.k && j0 + j + t < taps) partial[int64_t(k0 + k + i) * taps + j0 + j + t] = sum[i][t];
}

// ---------------------------------------------------------------------------------------------------------- kernels

// Grid of the staged products: column tiles, row tiles. Narrow for at most 32 rows, as in the first stages of ResNets.
using Wide = ProductTile<64, 128>;
using Narrow = ProductTile<16, 256>;
using WideGradient = GradientTile<64, 64, 4, 4>;
using NarrowGradient = GradientTile<16, 128, 4, 2>;

KERNEL(conv_forward_wide_f32, ConvArgs, Wide::Shared, THREADS) {
    SHARED(Wide::Shared, stage);
    staged<false, 64, 128>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(conv_forward_narrow_f32, ConvArgs, Narrow::Shared, THREADS) {
    SHARED(Narrow::Shared, stage);
    staged<false, 16, 256>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y);
}

BARRIER_FREE_KERNEL(conv_forward_direct_f32, ConvArgs, 1) { direct<false>(a, blockIdx.x, blockIdx.y, blockIdx.z); }

KERNEL(conv_input_gradient_wide_f32, ConvArgs, Wide::Shared, THREADS) {
    SHARED(Wide::Shared, stage);
    staged<true, 64, 128>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y);
}

// Three blocks: left alone, ptxas aims at four on sm_90a and spills.
KERNEL(conv_input_gradient_narrow_f32, ConvArgs, Narrow::Shared, THREADS, 3) {
    SHARED(Narrow::Shared, stage);
    staged<true, 16, 256>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y);
}

BARRIER_FREE_KERNEL(conv_input_gradient_direct_f32, ConvArgs, 1) {
    direct<true>(a, blockIdx.x, blockIdx.y, blockIdx.z);
}

// Grid of the weight gradients: tap tiles, row tiles, splits.
KERNEL(conv_weight_gradient_wide_f32, ConvWeightGradientArgs, WideGradient::Shared, THREADS) {
    SHARED(WideGradient::Shared, stage);
    staged_gradient<64, 64, 4, 4>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_weight_gradient_narrow_f32, ConvWeightGradientArgs, NarrowGradient::Shared, THREADS) {
    SHARED(NarrowGradient::Shared, stage);
    staged_gradient<16, 128, 4, 2>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

BARRIER_FREE_KERNEL(conv_weight_gradient_direct_f32, ConvWeightGradientArgs, 1) {
    const ConvShape& d = a.shape;
    const int k = blockIdx.y * GRADIENT_ROWS, taps = d.c * d.r * d.s;
    const int first = int(int64_t(d.p) * blockIdx.z / a.splits), last = int(int64_t(d.p) * (blockIdx.z + 1) / a.splits);
    int j = blockIdx.x * GRADIENT_GROUP_TAPS;
    const int end = int(min64(j + GRADIENT_GROUP_TAPS, taps));
    float* partial = a.partial + int64_t(blockIdx.z) * d.k * taps;
    for (; j < end; j += GRADIENT_TAPS) {
        float total[GRADIENT_ROWS][GRADIENT_TAPS];
        if (LANES == ROW_LANES || d.n % LANES == 0)
            gradient_tile<LANES>(a, k, j, first, last, total);
        else
            gradient_tile<ROW_LANES>(a, k, j, first, last, total);
        for (int i = 0; i < GRADIENT_ROWS && k + i < d.k; ++i)
            for (int t = 0; t < GRADIENT_TAPS && j + t < end; ++t) partial[int64_t(k + i) * taps + j + t] = total[i][t];
    }
}

// Adds the splits' partial sums, in their order.
BARRIER_FREE_KERNEL(conv_sum_splits_f32, ConvSumArgs, THREADS) {
    EACH(i, a.count) {
        float sum = a.partial[i];
        for (int split = 1; split < a.splits; ++split) sum += a.partial[split * a.count + i];
        a.sum[i] = sum;
    }
}

// One block per output channel.
KERNEL(conv_bias_gradient_f32, ConvBiasGradientArgs, WarpSums, THREADS) {
    SHARED(WarpSums, shared);
    const float* dy = a.dy + int64_t(blockIdx.x) * a.row;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < a.row; i += blockDim.x) sum += dy[i];
    sum = block_sum(sum, shared.scratch, threadIdx.x, blockDim.x);
    if (threadIdx.x == 0) a.dbias[blockIdx.x] = sum;
}
