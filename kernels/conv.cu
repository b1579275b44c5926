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
// Sums of splits are for both devices and precisions, the rest are the GPU's tilings of f32: a block copies tiles through
// shared memory, two at a time so that one is read while the next arrives, and its threads multiply from there. Those of
// the host are in conv_direct.cu, those of bf16 in conv_mma.cu. Forward and input gradient are one template: they differ
// only in which input row a filter tap reads (Taps, PixelClass). Limit: multiply-adds. H200, 2026-11-26: 3x3 on 128 channels
// of 16x16, 128 samples, 35 TFLOP/s forward, half of the datasheet's 67.
#include "kernels/conv.cuh"

struct ConvSumArgs {
    const float* partial;    // [splits, count]
    const uint32_t* places;  // [count]: where in `sum` each goes, or NONE; null: in their order
    float* sum;
    float* rest;             // of the sums from `weights` on; not read where there are none
    int64_t count, weights;
    int32_t splits;
};

constexpr int THREADS = 256;
constexpr int GRADIENT_DEPTH = 16;  // columns of a stage of the weight gradient

// A step of the reduction, over channels and the taps of a class, and how it moves on: without a division.
struct Step {
    int channel, r, s;
};

DEVICE Step step_at(int step, const PixelClass& taps) {
    const int across = int(max64(taps.s, 1)), filter = int(max64(taps.r, 1)) * across;
    return {step / filter, step % filter / across, step % across};
}

DEVICE void advance(Step& step, const Step& by, const PixelClass& taps) {
    step.s += by.s, step.r += by.r, step.channel += by.channel;
    if (step.s >= taps.s) step.s -= taps.s, ++step.r;
    if (step.r >= taps.r) step.r -= taps.r, ++step.channel;
}

// A block's tile of the product: ROWS x COLUMNS of the result. A thread has PER_ROWS x PER_COLUMNS: fours of rows and of
// columns, an even distance apart; a warp 4 x 8 or 2 x 16 threads, so that what it reads of a step is 128 bytes.
template <int ROWS, int COLUMNS, int PER_ROWS, int PER_COLUMNS>
struct ProductTile {
    static constexpr int DEPTH = COLUMNS < 128 ? 16 : 8;  // reduction steps of a stage
    static constexpr int VECTORS = COLUMNS / 4;
    static constexpr int X_LOADS = DEPTH * VECTORS / THREADS;
    static constexpr int W_LOADS = (ROWS * DEPTH + THREADS - 1) / THREADS;
    static constexpr int ROW_THREADS = ROWS / PER_ROWS, COLUMN_THREADS = COLUMNS / PER_COLUMNS;
    static constexpr int WARP_ROWS = ROW_THREADS < 4 ? ROW_THREADS : 4, WARP_COLUMNS = 32 / WARP_ROWS;
    static_assert(ROW_THREADS * COLUMN_THREADS == THREADS && DEPTH * VECTORS % THREADS == 0, "whole threads");
    struct Shared {
        float x[2][DEPTH][COLUMNS];
        float w[2][DEPTH][ROWS + 4];  // 4 more: the transposing store meets no bank twice
        PixelClass pixels;            // kept here for the end, not in registers
    };
    DEVICE static int row(int thread, int fours) {
        const int warp = thread / 32 % (ROW_THREADS / WARP_ROWS), lane = thread % 32 / WARP_COLUMNS;
        return (warp * WARP_ROWS + lane) * 4 + fours * (ROW_THREADS * 4);
    }
    DEVICE static int column(int thread, int fours) {
        const int warp = thread / 32 / (ROW_THREADS / WARP_ROWS), lane = thread % WARP_COLUMNS;
        return (warp * WARP_COLUMNS + lane) * 4 + fours * (COLUMN_THREADS * 4);
    }
};

// BY_ROW: of an input gradient with a filter of one tap, whose rows of w lie side by side.
template <bool GRADIENT, bool BY_ROW, int ROWS, int COLUMNS, int PER_ROWS, int PER_COLUMNS>
DEVICE void staged(const ConvArgs& a, typename ProductTile<ROWS, COLUMNS, PER_ROWS, PER_COLUMNS>::Shared& stage,
                   int thread, int column_tile, int row_tile, int number) {
    using Pass = Taps<GRADIENT>;
    using Tile = ProductTile<ROWS, COLUMNS, PER_ROWS, PER_COLUMNS>;
    constexpr int DEPTH = Tile::DEPTH;
    const ConvShape& d = a.shape;
    const PixelClass pixels = Pass::pixels(d, number);
    const int columns = pixels.height * pixels.width * d.n;
    if (column_tile * COLUMNS >= columns) return;
    const int depth = Pass::channels(d) * pixels.r * pixels.s;
    const int from_height = Pass::from_height(d), from_width = Pass::from_width(d);
    const int plane = from_height * from_width * d.n;
    const WeightStrides strides = weight_strides<float>(d);
    // Said in two ways: ptxas 13.0 spills a few registers of one pass or the other if both are said in one.
    const int row_stride = GRADIENT ? d.r * d.s : int(strides.filter);
    const int channel_stride = GRADIENT ? d.r * d.s * d.c : int(strides.channel);
    const int row0 = row_tile * ROWS, rows = Pass::rows(d);

    // What this thread copies: always the same samples of a pixel, and the same rows of w.
    const int vector = thread % Tile::VECTORS, copied = column_tile * COLUMNS + vector * 4;
    const int pixel = copied / d.n, o = pixel / pixels.width, u = pixel % pixels.width;
    // Columns beyond the last lie above every image.
    const int h0 = copied >= columns ? -(1 << 30) : pixels.origin_h + (GRADIENT ? o : o * d.stride);
    const int w0 = pixels.origin_w + (GRADIENT ? u : u * d.stride);
    const float* const from = a.from + ((h0 < 0 && copied >= columns ? 0 : h0 * from_width + w0) * d.n + copied % d.n);
    const Step by = step_at(DEPTH, pixels);
    Step x_step[Tile::X_LOADS];
    UNROLL for (int i = 0; i < Tile::X_LOADS; ++i)
        x_step[i] = step_at(thread / Tile::VECTORS + i * (THREADS / Tile::VECTORS), pixels);
    // Threads share w so that neighbours read neighbours: steps of a row, or rows of a step. Load i is so many rows and
    // steps further than load 0, and so many elements of w and of the stage.
    constexpr int ROWS_APART = BY_ROW ? 0 : THREADS / DEPTH, STEPS_APART = BY_ROW ? THREADS / ROWS : 0;
    constexpr int PUT_APART = BY_ROW ? STEPS_APART * (ROWS + 4) : ROWS_APART;
    const int w_row = row0 + (BY_ROW ? thread % ROWS : thread / DEPTH);
    const int w_first = BY_ROW ? thread / ROWS : thread % DEPTH;
    const int w_apart = BY_ROW ? STEPS_APART * channel_stride : ROWS_APART * row_stride;
    float* const put_w = &stage.w[0][0][0] + w_first * (ROWS + 4) + (w_row - row0);
    const float* const w = a.w + (int64_t(w_row) * row_stride + pixels.first_r * d.s + pixels.first_s);
    Step w_step = step_at(w_first, pixels);

    Samples<4> next_x[Tile::X_LOADS];
    float next_w[Tile::W_LOADS];
    const auto fetch = [&]() {
        UNROLL for (int i = 0; i < Tile::X_LOADS; ++i) {
            Step& at = x_step[i];
            const int h = GRADIENT ? h0 - at.r : h0 + at.r, w = GRADIENT ? w0 - at.s : w0 + at.s;
            next_x[i] = splat<4>(0.0f);
            if (at.channel < Pass::channels(d) && uint32_t(h) < uint32_t(from_height) && uint32_t(w) < uint32_t(from_width))
                next_x[i] = load<4>(from + (int64_t(at.channel) * plane + (GRADIENT ? -1 : 1) * (at.r * from_width + at.s) * d.n));
            advance(at, by, pixels);
        }
        const float* tap =
            w + (int64_t(w_step.channel) * channel_stride + (w_step.r * d.s + w_step.s) * pixels.step);
        UNROLL for (int i = 0; i < Tile::W_LOADS; ++i) {
            next_w[i] = 0.0f;
            if (w_row + i * ROWS_APART < rows && w_step.channel + i * STEPS_APART < Pass::channels(d) &&
                thread + i * THREADS < ROWS * DEPTH)
                next_w[i] = tap[i * w_apart];
        }
        advance(w_step, by, pixels);
    };
    const auto put = [&](int half) {
        UNROLL for (int i = 0; i < Tile::X_LOADS; ++i)
            store<4>(&stage.x[half][thread / Tile::VECTORS + i * (THREADS / Tile::VECTORS)][vector * 4], next_x[i]);
        UNROLL for (int i = 0; i < Tile::W_LOADS; ++i)
            if (thread + i * THREADS < ROWS * DEPTH) put_w[half * (DEPTH * (ROWS + 4)) + i * PUT_APART] = next_w[i];
    };

    Samples<4> sum[PER_ROWS][PER_COLUMNS / 4];
    UNROLL for (int i = 0; i < PER_ROWS; ++i)
        UNROLL for (int v = 0; v < PER_COLUMNS / 4; ++v) sum[i][v] = splat<4>(0.0f);
    if (thread == 0) stage.pixels = pixels;
    if (depth > 0) {
        fetch();
        put(0);
    }
    __syncthreads();
    for (int base = 0, half = 0; base < depth; base += DEPTH, half ^= 1) {
        if (base + DEPTH < depth) fetch();
        UNROLL for (int step = 0; step < DEPTH; ++step) {
            Samples<4> x[PER_COLUMNS / 4];
            UNROLL for (int v = 0; v < PER_COLUMNS / 4; ++v) x[v] = load<4>(&stage.x[half][step][Tile::column(thread, v)]);
            UNROLL for (int f = 0; f < PER_ROWS / 4; ++f) {
                const Samples<4> w = load<4>(&stage.w[half][step][Tile::row(thread, f)]);
                UNROLL for (int i = 0; i < 4; ++i)
                    UNROLL for (int v = 0; v < PER_COLUMNS / 4; ++v) sum[f * 4 + i][v] += x[v] * w[i];
            }
        }
        if (base + DEPTH < depth) put(half ^ 1);
        __syncthreads();
    }
    const PixelClass& own = stage.pixels;
    const int width = Pass::to_width(d);
    const int64_t pitch = int64_t(Pass::to_height(d)) * width * d.n;
    UNROLL for (int v = 0; v < PER_COLUMNS / 4; ++v) {
        const int column = column_tile * COLUMNS + Tile::column(thread, v);
        if (column >= own.height * own.width * d.n) continue;
        const int n = column % d.n, at = column / d.n;
        const int down = own.first_h + at / own.width * own.step;
        const int across = own.first_w + at % own.width * own.step;
        const uint32_t live = a.epilogue.bias ? live_columns<4>(a.epilogue.columns, int(*a.epilogue.count), n) : 0;
        UNROLL for (int i = 0; i < PER_ROWS; ++i) {
            const int row = row0 + Tile::row(thread, i / 4) + i % 4;
            if (row >= rows) continue;
            float* to = a.to + row * pitch + (int64_t(down) * width + across) * d.n + n;
            if (a.epilogue.bias) sum[i][v] = kept<4>(sum[i][v] + splat<4>(a.epilogue.bias[row]), live);
            if (a.epilogue.accumulate) sum[i][v] += load<4>(to);
            store<4>(to, sum[i][v]);
        }
    }
}

// A block's tile of the weight gradient: ROWS output channels x TAPS filter taps. A thread has PER_ROWS x PER_TAPS of it,
// an even distance apart, a warp 4 x 8 threads. Rows of both lie 20 floats apart: eight of them meet no bank twice.
template <int ROWS, int TAPS, int PER_ROWS, int PER_TAPS>
struct GradientTile {
    static constexpr int VECTORS = GRADIENT_DEPTH / 4;
    static constexpr int LOADED = THREADS / VECTORS;  // rows that all threads copy at a time
    static constexpr int Y_LOADS = (ROWS + LOADED - 1) / LOADED, X_LOADS = (TAPS + LOADED - 1) / LOADED;
    static constexpr int ROW_THREADS = ROWS / PER_ROWS, TAP_THREADS = TAPS / PER_TAPS;
    static_assert(ROW_THREADS * TAP_THREADS == THREADS && ROW_THREADS % 4 == 0, "one part a thread");
    struct Shared {
        float dy[2][ROWS][GRADIENT_DEPTH + 4];
        float x[2][TAPS][GRADIENT_DEPTH + 4];
    };
    DEVICE static int row(int thread) { return thread / 32 % (ROW_THREADS / 4) * 4 + thread % 32 / 8; }
    DEVICE static int tap(int thread) { return thread / 32 / (ROW_THREADS / 4) * 8 + thread % 8; }
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

    // What this thread copies: always the same rows of dy and taps, and four columns (p, q, n) that move on.
    const int first = thread / Tile::VECTORS, vector = thread % Tile::VECTORS * 4;
    int column = begin + vector, n = column % d.n, q = column / d.n % d.q, p = column / d.n / d.q;
    int r[Tile::X_LOADS], s[Tile::X_LOADS];
    const float* plane[Tile::X_LOADS];
    UNROLL for (int i = 0; i < Tile::X_LOADS; ++i) {
        const int own = first + i * Tile::LOADED, tap = j0 + own;
        const bool there = own < TAPS && tap < taps;
        // A row that is above every image reads nothing.
        r[i] = there ? tap % filter / d.s - d.pad : -(1 << 30);
        s[i] = there ? tap % d.s - d.pad : 0;
        plane[i] = a.x + (there ? int64_t(tap / filter) * d.h * d.w * d.n : 0);
    }
    Samples<4> next_y[Tile::Y_LOADS], next_x[Tile::X_LOADS];
    const auto fetch = [&]() {
        UNROLL for (int i = 0; i < Tile::Y_LOADS; ++i) {
            const int row = first + i * Tile::LOADED;
            next_y[i] = splat<4>(0.0f);
            if (row < ROWS && k0 + row < d.k && column < end) next_y[i] = load<4>(a.dy + int64_t(k0 + row) * columns + column);
        }
        UNROLL for (int i = 0; i < Tile::X_LOADS; ++i) {
            const int h = p * d.stride + r[i], w = q * d.stride + s[i];
            next_x[i] = splat<4>(0.0f);
            if (column < end && h >= 0 && h < d.h && w >= 0 && w < d.w)
                next_x[i] = load<4>(plane[i] + ((h * d.w + w) * d.n + n));
        }
        column += GRADIENT_DEPTH, n += GRADIENT_DEPTH;
        while (n >= d.n) {
            n -= d.n;
            if (++q == d.q) q = 0, ++p;
        }
    };
    const auto put = [&](int half) {
        UNROLL for (int i = 0; i < Tile::Y_LOADS; ++i)
            if (first + i * Tile::LOADED < ROWS) store<4>(&stage.dy[half][first + i * Tile::LOADED][vector], next_y[i]);
        UNROLL for (int i = 0; i < Tile::X_LOADS; ++i)
            if (first + i * Tile::LOADED < TAPS) store<4>(&stage.x[half][first + i * Tile::LOADED][vector], next_x[i]);
    };

    float sum[PER_ROWS][PER_TAPS];
    UNROLL for (int i = 0; i < PER_ROWS; ++i)
        UNROLL for (int t = 0; t < PER_TAPS; ++t) sum[i][t] = 0.0f;
    if (begin < end) {
        fetch();
        put(0);
    }
    __syncthreads();
    for (int base = begin, half = 0; base < end; base += GRADIENT_DEPTH, half ^= 1) {
        if (base + GRADIENT_DEPTH < end) fetch();
        for (int step = 0; step < GRADIENT_DEPTH; step += 4) {
            Samples<4> x[PER_TAPS];
            UNROLL for (int t = 0; t < PER_TAPS; ++t)
                x[t] = load<4>(&stage.x[half][Tile::tap(thread) + t * Tile::TAP_THREADS][step]);
            UNROLL for (int i = 0; i < PER_ROWS; ++i) {
                const Samples<4> g = load<4>(&stage.dy[half][Tile::row(thread) + i * Tile::ROW_THREADS][step]);
                UNROLL for (int t = 0; t < PER_TAPS; ++t)
                    UNROLL for (int lane = 0; lane < 4; ++lane) sum[i][t] += g[lane] * x[t][lane];
            }
        }
        if (base + GRADIENT_DEPTH < end) put(half ^ 1);
        __syncthreads();
    }
    float* partial = a.partial + int64_t(split) * d.k * taps;
    UNROLL for (int i = 0; i < PER_ROWS; ++i) {
        const int k = k0 + Tile::row(thread) + i * Tile::ROW_THREADS;
        UNROLL for (int t = 0; t < PER_TAPS; ++t) {
            const int j = j0 + Tile::tap(thread) + t * Tile::TAP_THREADS;
            if (k < d.k && j < taps) partial[int64_t(k) * taps + j] = sum[i][t];
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- kernels

// Grid of the staged products: column tiles, row tiles, classes of pixels. Named by rows x columns.
using Product16 = ProductTile<16, 256, 4, 4>;
using Product32 = ProductTile<32, 256, 8, 4>;
using Product64 = ProductTile<64, 64, 4, 4>;
using Product64Wide = ProductTile<64, 128, 8, 4>;
using Product128 = ProductTile<128, 128, 8, 8>;

KERNEL(conv_forward_16x256_f32, ConvArgs, Product16::Shared, THREADS, 3) {
    SHARED(Product16::Shared, stage);
    staged<false, false, 16, 256, 4, 4>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_forward_32x256_f32, ConvArgs, Product32::Shared, THREADS, 2) {
    SHARED(Product32::Shared, stage);
    staged<false, false, 32, 256, 8, 4>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_forward_64x64_f32, ConvArgs, Product64::Shared, THREADS, 3) {
    SHARED(Product64::Shared, stage);
    staged<false, false, 64, 64, 4, 4>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_forward_64x128_f32, ConvArgs, Product64Wide::Shared, THREADS, 2) {
    SHARED(Product64Wide::Shared, stage);
    staged<false, false, 64, 128, 8, 4>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_forward_128x128_f32, ConvArgs, Product128::Shared, THREADS, 2, 1) {
    SHARED(Product128::Shared, stage);
    staged<false, false, 128, 128, 8, 8>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_input_gradient_16x256_f32, ConvArgs, Product16::Shared, THREADS, 3) {
    SHARED(Product16::Shared, stage);
    staged<true, false, 16, 256, 4, 4>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_input_gradient_32x256_f32, ConvArgs, Product32::Shared, THREADS, 2) {
    SHARED(Product32::Shared, stage);
    staged<true, false, 32, 256, 8, 4>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_input_gradient_64x64_f32, ConvArgs, Product64::Shared, THREADS, 3, 2) {
    SHARED(Product64::Shared, stage);
    staged<true, false, 64, 64, 4, 4>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_input_gradient_64x128_f32, ConvArgs, Product64Wide::Shared, THREADS, 2) {
    SHARED(Product64Wide::Shared, stage);
    staged<true, false, 64, 128, 8, 4>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_input_gradient_128x128_f32, ConvArgs, Product128::Shared, THREADS, 2, 1) {
    SHARED(Product128::Shared, stage);
    staged<true, false, 128, 128, 8, 8>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_input_gradient_pointwise_64x64_f32, ConvArgs, Product64::Shared, THREADS, 3, 2) {
    SHARED(Product64::Shared, stage);
    staged<true, true, 64, 64, 4, 4>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_input_gradient_pointwise_64x128_f32, ConvArgs, Product64Wide::Shared, THREADS, 2) {
    SHARED(Product64Wide::Shared, stage);
    staged<true, true, 64, 128, 8, 4>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_input_gradient_pointwise_128x128_f32, ConvArgs, Product128::Shared, THREADS, 2) {
    SHARED(Product128::Shared, stage);
    staged<true, true, 128, 128, 8, 8>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

// Grid of the weight gradients: tap tiles, row tiles, splits. Filters of 3x3 have multiples of 96 taps in most networks.
using Gradient16 = GradientTile<16, 96, 2, 3>;
using Gradient32 = GradientTile<32, 96, 4, 3>;
using Gradient64 = GradientTile<64, 96, 8, 3>;
using Gradient128 = GradientTile<128, 96, 8, 6>;

KERNEL(conv_weight_gradient_16x96_f32, ConvWeightGradientArgs, Gradient16::Shared, THREADS, 3) {
    SHARED(Gradient16::Shared, stage);
    staged_gradient<16, 96, 2, 3>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_weight_gradient_32x96_f32, ConvWeightGradientArgs, Gradient32::Shared, THREADS, 2) {
    SHARED(Gradient32::Shared, stage);
    staged_gradient<32, 96, 4, 3>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_weight_gradient_64x96_f32, ConvWeightGradientArgs, Gradient64::Shared, THREADS, 2) {
    SHARED(Gradient64::Shared, stage);
    staged_gradient<64, 96, 8, 3>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

KERNEL(conv_weight_gradient_128x96_f32, ConvWeightGradientArgs, Gradient128::Shared, THREADS, 2) {
    SHARED(Gradient128::Shared, stage);
    staged_gradient<128, 96, 8, 6>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

// Adds the splits' partial sums: four chains of every fourth, since a GPU waits long for each.
BARRIER_FREE_KERNEL(conv_sum_splits_f32, ConvSumArgs, THREADS) {
    EACH(i, a.count) {
        const int64_t place = a.places ? a.places[i] : i;
        if (place == NONE) continue;
        float* const to = i < a.weights ? a.sum + place : a.rest + (i - a.weights);
        Samples<4> sum = splat<4>(0.0f);
        int split = 0;
        for (; split + 4 <= a.splits; split += 4)
            UNROLL for (int chain = 0; chain < 4; ++chain) sum[chain] += a.partial[(split + chain) * a.count + i];
        for (; split < a.splits; ++split) sum[0] += a.partial[split * a.count + i];
        *to = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
}
