// conv_mma.cu - convolution as Y = W X on tensor cores: the formulas of conv.cu, bf16 with f32 sums.
//
// x: [C, H, W, N], y: [K, P, Q, N]; w: [K, R, S, channels], each filter padded to a multiple of 8 (weight_strides), so that
// a reduction over taps and then channels reads w where it lies; dw: [K, C, R, S], f32.
//
// A block owns a tile of the result, its eight warps parts of it. Stages of the reduction come to shared memory by copies of
// 16 bytes that are under way while earlier stages are multiplied: STAGES - 1 at a time, one barrier a stage. What lies
// outside the image comes as zeros. Rows in shared memory lie 16 bytes further apart than they are long, so that eight of them
// meet no bank twice. The tiles are those of conv.cu and are chosen by src/ops/conv.rs.
//
// Sums are f32 in an order that depends on the shape alone. Limit: bytes from shared memory below 128 rows, else tensor cores;
// not measured yet.
#include "kernels/conv.cuh"
#include "kernels/lib/mma.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int DEPTH = 32;   // steps of the reduction in a stage
constexpr int STAGES = 4;
constexpr int SPACE = 8;    // elements between the rows of a stage
constexpr int CHUNK = 8;    // elements of a copy

// The warps of a block, ACROSS of them side by side, and what one owns of the block's tile.
template <int ROWS, int COLUMNS, int ACROSS>
struct WarpTile {
    static constexpr int DOWN = WARPS / ACROSS;
    static constexpr int HEIGHT = ROWS / DOWN, WIDTH = COLUMNS / ACROSS;
    static_assert(HEIGHT % 16 == 0 && WIDTH % 16 == 0 && 256 % WIDTH == 0, "whole tiles of tensor cores");
    static constexpr int LEFTS = HEIGHT / 16, RIGHTS = WIDTH / 8;
    DEVICE static int row(int warp) { return warp % DOWN * HEIGHT; }
    DEVICE static int column(int warp) { return warp / DOWN * WIDTH; }
};

// Adds the products of a stage to a warp's sums. Element (row, step) of the left operand is left[row][step], or
// left[step][row] where it is TRANSPOSED; of the right one (step, column) right[step][column], or right[column][step].
template <class Tile, bool LEFT_TRANSPOSED, bool RIGHT_TRANSPOSED, int LEFT_PITCH, int RIGHT_PITCH>
DEVICE void multiply_stage(int lane, const bf16* left, const bf16* right, SumTile (&sum)[Tile::LEFTS][Tile::RIGHTS]) {
    UNROLL for (int step = 0; step < DEPTH; step += 16) {
        LeftTile rows[Tile::LEFTS];
        UNROLL for (int i = 0; i < Tile::LEFTS; ++i)
            rows[i] = load_left<LEFT_TRANSPOSED, LEFT_PITCH>(
                lane, left + (LEFT_TRANSPOSED ? step * LEFT_PITCH + i * 16 : i * 16 * LEFT_PITCH + step));
        RightTile columns[Tile::RIGHTS];
        UNROLL for (int j = 0; j < Tile::RIGHTS; j += 2)
            load_right<RIGHT_TRANSPOSED, RIGHT_PITCH>(
                lane, right + (RIGHT_TRANSPOSED ? j * 8 * RIGHT_PITCH + step : step * RIGHT_PITCH + j * 8), columns[j],
                columns[j + 1]);
        UNROLL for (int i = 0; i < Tile::LEFTS; ++i)
            UNROLL for (int j = 0; j < Tile::RIGHTS; ++j) multiply_add(lane, sum[i][j], rows[i], columns[j]);
    }
}

// Fetches each step's stage STAGES - 1 steps before it is multiplied, with one barrier a step.
template <class Copies, class Fetch, class Multiply>
DEVICE void pipeline(int steps, Copies& copies, Fetch fetch, Multiply multiply) {
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) fetch(step);
        copies.commit();
    }
    for (int step = 0; step < steps; ++step) {
        copies.template wait<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) fetch(step + STAGES - 1);
        copies.commit();
        multiply(step);
    }
}

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
            float slab[WARPS][16][Warp::WIDTH + 4];  // what a warp writes at a time, to turn it into rows
        };
        PixelClass pixels;  // kept here for the end, not in registers
    };

    DEVICE static void run(const ConvArgs& a, Shared& shared, int thread, int column_tile, int row_tile, int number) {
        using Pass = Taps<GRADIENT>;
        const ConvShape& d = a.shape;
        const PixelClass pixels = Pass::pixels(d, number);
        const int columns = pixels.height * pixels.width * d.n;
        if (column_tile * COLUMNS >= columns) return;
        const int pitch = channel_pitch(d), period = GRADIENT ? d.k : pitch, width = int(max64(pixels.s, 1));
        const int depth = period * pixels.r * pixels.s, steps = int(ceil_div(depth, DEPTH));
        const int from_height = Pass::from_height(d), from_width = Pass::from_width(d);
        const int64_t plane = int64_t(from_height) * from_width * d.n;
        const WeightStrides strides = weight_strides<bf16>(d);
        const int row0 = row_tile * ROWS;
        if (thread == 0) shared.pixels = pixels;

        // What this thread copies of x: always the same samples of a pixel.
        const int x_chunk = thread % X_CHUNKS * CHUNK, x_line = thread / X_CHUNKS;
        const int copied = column_tile * COLUMNS + x_chunk, pixel = copied / d.n;
        const int o = pixel / pixels.width, u = pixel % pixels.width;
        // Columns beyond the last lie above every image.
        const int h0 = copied >= columns ? -(1 << 30) : pixels.origin_h + (GRADIENT ? o : o * d.stride);
        const int w0 = pixels.origin_w + (GRADIENT ? u : u * d.stride);
        const bf16* const from = a.from + copied % d.n;
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
        write(a, shared, lane, warp, column_tile, row0, sum);
    }

    // A warp's sums, 16 rows at a time: each lane writes rows of 8 samples, 16 bytes.
    DEVICE static void write(const ConvArgs& a, Shared& shared, int lane, int warp, int column_tile, int row0,
                             const SumTile (&sum)[Warp::LEFTS][Warp::RIGHTS]) {
        using Pass = Taps<GRADIENT>;
        constexpr int LANES_ACROSS = Warp::WIDTH / 8, LANES_DOWN = 32 / LANES_ACROSS;
        const ConvShape& d = a.shape;
        const PixelClass& own = shared.pixels;
        float(&slab)[16][Warp::WIDTH + 4] = shared.slab[warp];
        const int across_slab = lane % LANES_ACROSS * 8, down_slab = lane / LANES_ACROSS;
        const int column = column_tile * COLUMNS + Warp::column(warp) + across_slab;
        const bool inside = column < own.height * own.width * d.n;
        const int n = column % d.n, at = column / d.n, to_width = Pass::to_width(d);
        const int down = own.first_h + at / own.width * own.step, across = own.first_w + at % own.width * own.step;
        const int64_t pitch = int64_t(Pass::to_height(d)) * to_width * d.n;
        bf16* const to = a.to + (int64_t(down) * to_width + across) * d.n + n;
        const uint32_t live = a.bias ? live_columns<8>(a.columns, int(*a.count), n) : 0;
        UNROLL for (int i = 0; i < Warp::LEFTS; ++i) {
            UNROLL for (int j = 0; j < Warp::RIGHTS; ++j)
                UNROLL for (int e = 0; e < 4; ++e)
                    slab[lane / 4 + e / 2 * 8][j * 8 + lane % 4 * 2 + e % 2] = sum[i][j].value[e];
            __syncwarp();
            UNROLL for (int r = 0; r < 16; r += LANES_DOWN) {
                const int row = row0 + Warp::row(warp) + i * 16 + r + down_slab;
                if (inside && row < Pass::rows(d)) {
                    Samples<8> y = load<8>(&slab[r + down_slab][across_slab]);
                    if (a.bias) y = kept<8>(y + splat<8>(a.bias[row]), live);
                    if (a.accumulate) y += load<8>(to + row * pitch);
                    store<8>(to + row * pitch, y);
                }
            }
            __syncwarp();
        }
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
        pipeline(steps, copies, fetch, [&](int step) {
            const Stage& stage = shared.stage[step % STAGES];
            multiply_stage<Warp, false, true, DEPTH + SPACE, DEPTH + SPACE>(
                lane, &stage.dy[Warp::row(warp)][0], &stage.x[Warp::column(warp)][0], sum);
        });
        float* partial = a.partial + int64_t(split) * d.k * taps;
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
