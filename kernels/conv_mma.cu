// conv_mma.cu - convolution as Y = W X on tensor cores: the formulas of conv.cu, bf16 with f32 sums.
//
// x: [C, H, W, N], y: [K, P, Q, N]; w: [K, R, S, channels], each filter padded to a multiple of 8 (weight_strides), so that
// a reduction over taps and then channels reads w where it lies; dw: [K, C, R, S], f32.
//
// The tiles are those of conv.cu and are chosen by src/ops/tiles.rs.
//
// Sums are f32 in an order that depends on the shape alone. Limit: bytes from shared memory below 128 rows, else tensor cores;
// not measured yet.
#include "kernels/conv_mma.cuh"

// A step of the reduction, over a filter's rows, its columns, and `period` channels, and how it moves on by DEPTH.
struct Step {
    int channel, r, s;
};

DEVICE Step step_at(int step, int period, int width) { return {step % period, step / period / width, step / period % width}; }

DEVICE void advance(Step& step, const Step& by, int period, int width) {
    step.channel += by.channel, step.s += by.s, step.r += by.r;
    if (step.channel >= period) step.channel -= period, ++step.s;
    if (step.s >= width) step.s -= width, ++step.r;
}

// Forward and input gradient: a block's tile of ROWS features x COLUMNS pixels and samples.
template <bool GRADIENT, int ROWS, int COLUMNS, int ACROSS>
struct Product {
    using Warp = WarpTile<ROWS, COLUMNS, ACROSS>;
    static constexpr int W_LINES = GRADIENT ? DEPTH : ROWS, W_LENGTH = GRADIENT ? ROWS : DEPTH;
    static constexpr int X_CHUNKS = COLUMNS / CHUNK, W_CHUNKS = W_LENGTH / CHUNK;  // of a line
    static constexpr int X_LOADS = DEPTH * X_CHUNKS / THREADS;
    static constexpr int W_LOADS = (W_LINES * W_CHUNKS + THREADS - 1) / THREADS;
    static constexpr int X_APART = THREADS / X_CHUNKS, W_APART = THREADS / W_CHUNKS;  // lines between a thread's copies
    static_assert(DEPTH * X_CHUNKS % THREADS == 0 && THREADS % X_CHUNKS == 0, "whole threads");
    struct Stage {
        bf16 x[DEPTH][COLUMNS + SPACE];
        bf16 w[W_LINES][W_LENGTH + SPACE];
    };
    struct Shared {
        union {
            Stage stage[STAGES];
            Epilogue<Warp, ROWS, COLUMNS> epilogue;
        };
        PixelClass pixels;  // kept here for the end, not in registers
    };

    DEVICE static void run(const ConvArgs& a, Shared& shared, int thread, int column_tile, int row_tile, int number) {
        using Pass = Taps<GRADIENT>;
        const ConvShape& d = a.shape;
        const PixelClass pixels = Pass::pixels(d, number);
        if (column_tile * COLUMNS >= pixels.height * pixels.width * d.n) return;
        const int pitch = channel_pitch(d), period = GRADIENT ? d.k : pitch, width = int(max64(pixels.s, 1));
        const int depth = period * pixels.r * pixels.s, steps = int(ceil_div(depth, DEPTH));
        const int from_height = Pass::from_height(d), from_width = Pass::from_width(d);
        const int64_t plane = int64_t(from_height) * from_width * d.n;
        const WeightStrides strides = weight_strides<bf16>(d);
        const int row0 = row_tile * ROWS;
        if (thread == 0) shared.pixels = pixels;

        // What this thread copies of x.
        const int x_chunk = thread % X_CHUNKS * CHUNK, x_line = thread / X_CHUNKS;
        const auto [h0, w0, n0] = copied_column<GRADIENT>(d, pixels, column_tile * COLUMNS + x_chunk);
        const bf16* const from = a.from + n0;
        const Step by = step_at(DEPTH, period, width);
        Step x_step[X_LOADS];
        UNROLL for (int i = 0; i < X_LOADS; ++i) x_step[i] = step_at(x_line + i * X_APART, period, width);
        // And of w: steps of a filter, which lie one after the other, or channels of a step.
        const int w_chunk = thread % W_CHUNKS * CHUNK, w_line = thread / W_CHUNKS;
        const bool whole = !GRADIENT || pitch % CHUNK == 0;
        Step w_step[W_LOADS];
        UNROLL for (int i = 0; i < W_LOADS; ++i) w_step[i] = step_at(w_line + i * W_APART, period, width);

        AsyncCopies<STAGES * (X_LOADS + W_LOADS)> copies;
        const auto fetch = [&](int step) {
            Stage& stage = shared.stage[step % STAGES];
            UNROLL for (int i = 0; i < X_LOADS; ++i) {
                Step& at = x_step[i];
                const int h = GRADIENT ? h0 - at.r : h0 + at.r, w = GRADIENT ? w0 - at.s : w0 + at.s;
                const bool there = at.channel < Pass::channels(d) && at.r < pixels.r &&
                                   uint32_t(h) < uint32_t(from_height) && uint32_t(w) < uint32_t(from_width);
                copies.copy(&stage.x[x_line + i * X_APART][x_chunk],
                            there ? from + (at.channel * plane + (int64_t(h) * from_width + w) * d.n) : a.from, there);
                advance(at, by, period, width);
            }
            UNROLL for (int i = 0; i < W_LOADS; ++i) {
                const int line = w_line + i * W_APART;
                if (line < W_LINES) {
                    bf16* to = &stage.w[line][w_chunk];
                    if constexpr (GRADIENT) {
                        const Step& at = w_step[i];
                        const bool there = at.r < pixels.r && row0 + w_chunk < pitch;
                        const bf16* tap = a.w + (at.channel * strides.filter +
                                                 (pixels.first_r + at.r * pixels.step) * strides.row +
                                                 (pixels.first_s + at.s * pixels.step) * strides.column + row0 + w_chunk);
                        if (whole)
                            copies.copy(to, there ? tap : a.w, there);
                        else
                            UNROLL for (int e = 0; e < CHUNK; ++e)
                                to[e] = there && row0 + w_chunk + e < d.c ? tap[e] : bf16{0};
                    } else {
                        const int64_t first = int64_t(step) * DEPTH + w_chunk;
                        const bool there = row0 + line < d.k && first < strides.filter;
                        copies.copy(to, there ? a.w + ((row0 + line) * strides.filter + first) : a.w, there);
                    }
                }
                if constexpr (GRADIENT) advance(w_step[i], by, period, width);
            }
        };

        const int warp = thread / 32, lane = thread % 32;
        SumTile sum[Warp::LEFTS][Warp::RIGHTS];
        UNROLL for (int i = 0; i < Warp::LEFTS; ++i) clear(sum[i]);
        pipeline(steps, copies, fetch, [&](int step) {
            const Stage& stage = shared.stage[step % STAGES];
            const bf16* w = GRADIENT ? &stage.w[0][Warp::row(warp)] : &stage.w[Warp::row(warp)][0];
            multiply_stage<Warp, GRADIENT, false, W_LENGTH + SPACE, COLUMNS + SPACE>(
                lane, w, &stage.x[0][Warp::column(warp)], sum);
        });
        __syncthreads();
        const auto row_of = [&](int row) { return row0 + row < Pass::rows(d) ? uint32_t(row0 + row) : NONE; };
        write_sums<GRADIENT>(a, shared.pixels, shared.epilogue, lane, warp, column_tile * COLUMNS, sum, row_of);
        write_tile<GRADIENT>(a, shared.pixels, shared.epilogue, thread, column_tile, number, row_of);
    }
};

// The weight gradient: a block's tile of ROWS filters x TAPS weights of each, over a range of pixels and samples.
template <int ROWS, int TAPS, int ACROSS>
struct Gradient {
    using Warp = WarpTile<ROWS, TAPS, ACROSS>;
    static constexpr int CHUNKS = DEPTH / CHUNK, APART = THREADS / CHUNKS;  // of a line; lines between a thread's copies
    static constexpr int Y_LOADS = (ROWS + APART - 1) / APART, X_LOADS = (TAPS + APART - 1) / APART;
    struct Stage {
        bf16 dy[ROWS][DEPTH + SPACE];
        bf16 x[TAPS][DEPTH + SPACE];
    };
    struct Shared {
        Stage stage[STAGES];
    };

    DEVICE static void run(const ConvWeightGradientArgs& a, Shared& shared, int thread, int tap_tile, int row_tile,
                           int split) {
        const ConvShape& d = a.shape;
        const int filter = d.r * d.s, taps = d.c * filter, columns = d.p * d.q * d.n;
        const int stages = int(ceil_div(columns, DEPTH));
        const int first_stage = int(int64_t(stages) * split / a.splits);
        const int steps = int(int64_t(stages) * (split + 1) / a.splits) - first_stage;
        const int k0 = row_tile * ROWS, j0 = tap_tile * TAPS;

        // What this thread copies: always the same filters and taps, and eight columns (p, q, n) that move on.
        const int line = thread / CHUNKS, chunk = thread % CHUNKS * CHUNK;
        int column = first_stage * DEPTH + chunk, n = column % d.n, q = column / d.n % d.q, p = column / d.n / d.q;
        int r[X_LOADS], s[X_LOADS];
        const bf16* plane[X_LOADS];
        UNROLL for (int i = 0; i < X_LOADS; ++i) {
            const int own = line + i * APART, tap = j0 + own;
            const bool there = own < TAPS && tap < taps;
            // A row that is above every image reads nothing.
            r[i] = there ? tap % filter / d.s - d.pad : -(1 << 30);
            s[i] = there ? tap % d.s - d.pad : 0;
            plane[i] = a.x + (there ? int64_t(tap / filter) * d.h * d.w * d.n : 0);
        }
        AsyncCopies<STAGES * (Y_LOADS + X_LOADS)> copies;
        const auto fetch = [&](int step) {
            Stage& stage = shared.stage[step % STAGES];
            UNROLL for (int i = 0; i < Y_LOADS; ++i) {
                const int row = line + i * APART;
                const bool there = k0 + row < d.k && column < columns;
                if (row < ROWS)
                    copies.copy(&stage.dy[row][chunk], there ? a.dy + (int64_t(k0 + row) * columns + column) : a.dy, there);
            }
            UNROLL for (int i = 0; i < X_LOADS; ++i) {
                const int h = p * d.stride + r[i], w = q * d.stride + s[i];
                const bool there = column < columns && uint32_t(h) < uint32_t(d.h) && uint32_t(w) < uint32_t(d.w);
                if (line + i * APART < TAPS)
                    copies.copy(&stage.x[line + i * APART][chunk],
                                there ? plane[i] + (int64_t(h * d.w + w) * d.n + n) : a.x, there);
            }
            column += DEPTH, n += DEPTH;
            while (n >= d.n) {
                n -= d.n;
                if (++q == d.q) q = 0, ++p;
            }
        };

        const int warp = thread / 32, lane = thread % 32;
        SumTile sum[Warp::LEFTS][Warp::RIGHTS];
        UNROLL for (int i = 0; i < Warp::LEFTS; ++i) clear(sum[i]);
        RowSums<ROWS, DEPTH, DEPTH + SPACE> row_sums;
        const bool summed = a.row_sums && tap_tile == 0;
        pipeline(steps, copies, fetch, [&](int step) {
            const Stage& stage = shared.stage[step % STAGES];
            multiply_stage<Warp, false, true, DEPTH + SPACE, DEPTH + SPACE>(
                lane, &stage.dy[Warp::row(warp)][0], &stage.x[Warp::column(warp)][0], sum);
            if (summed) row_sums.add(thread, &stage.dy[0][0]);
        });
        if (summed) row_sums.write(thread, a.row_sums + split * split_pitch(a) + k0, d.k - k0);
        float* partial = a.partial + split * split_pitch(a);
        UNROLL for (int i = 0; i < Warp::LEFTS; ++i)
            UNROLL for (int j = 0; j < Warp::RIGHTS; ++j)
                UNROLL for (int e = 0; e < 4; ++e) {
                    const int k = k0 + Warp::row(warp) + i * 16 + lane / 4 + e / 2 * 8;
                    const int tap = j0 + Warp::column(warp) + j * 8 + lane % 4 * 2 + e % 2;
                    if (k < d.k && tap < taps) partial[int64_t(k) * taps + tap] = sum[i][j].value[e];
                }
    }
};

// ---------------------------------------------------------------------------------------------------------- kernels

#define RUN(tile)                 \
    SHARED(tile::Shared, shared); \
    tile::run(a, shared, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z)

// Grid of the products: column tiles, row tiles, classes of pixels. Named by rows x columns.

using Forward16 = Product<false, 16, 256, 8>;
using Forward32 = Product<false, 32, 256, 8>;
using Forward64 = Product<false, 64, 64, 4>;
using Forward64Wide = Product<false, 64, 128, 4>;
using Forward128 = Product<false, 128, 128, 4>;
using Backward16 = Product<true, 16, 256, 8>;
using Backward32 = Product<true, 32, 256, 8>;
using Backward64 = Product<true, 64, 64, 4>;
using Backward64Wide = Product<true, 64, 128, 4>;
using Backward128 = Product<true, 128, 128, 4>;

KERNEL(conv_forward_16x256_bf16, ConvArgs, Forward16::Shared, THREADS, 2) { RUN(Forward16); }
KERNEL(conv_forward_32x256_bf16, ConvArgs, Forward32::Shared, THREADS, 2) { RUN(Forward32); }
KERNEL(conv_forward_64x64_bf16, ConvArgs, Forward64::Shared, THREADS, 3) { RUN(Forward64); }
KERNEL(conv_forward_64x128_bf16, ConvArgs, Forward64Wide::Shared, THREADS, 2) { RUN(Forward64Wide); }
KERNEL(conv_forward_128x128_bf16, ConvArgs, Forward128::Shared, THREADS, 2) { RUN(Forward128); }
KERNEL(conv_input_gradient_16x256_bf16, ConvArgs, Backward16::Shared, THREADS, 2) { RUN(Backward16); }
KERNEL(conv_input_gradient_32x256_bf16, ConvArgs, Backward32::Shared, THREADS, 2) { RUN(Backward32); }
KERNEL(conv_input_gradient_64x64_bf16, ConvArgs, Backward64::Shared, THREADS, 3) { RUN(Backward64); }
KERNEL(conv_input_gradient_64x128_bf16, ConvArgs, Backward64Wide::Shared, THREADS, 2) { RUN(Backward64Wide); }
KERNEL(conv_input_gradient_128x128_bf16, ConvArgs, Backward128::Shared, THREADS, 2) { RUN(Backward128); }

// Grid of the weight gradients: tap tiles, row tiles, splits.
using Gradient16 = Gradient<16, 128, 8>;
using Gradient32 = Gradient<32, 128, 4>;
using Gradient64 = Gradient<64, 128, 4>;
using Gradient128 = Gradient<128, 128, 4>;

KERNEL(conv_weight_gradient_16x128_bf16, ConvWeightGradientArgs, Gradient16::Shared, THREADS, 2) {
    RUN(Gradient16);
}
KERNEL(conv_weight_gradient_32x128_bf16, ConvWeightGradientArgs, Gradient32::Shared, THREADS, 2) {
    RUN(Gradient32);
}
KERNEL(conv_weight_gradient_64x128_bf16, ConvWeightGradientArgs, Gradient64::Shared, THREADS, 2) {
    RUN(Gradient64);
}
KERNEL(conv_weight_gradient_128x128_bf16, ConvWeightGradientArgs, Gradient128::Shared, THREADS, 2) {
    RUN(Gradient128);
}
