// conv_wgmma.cu - convolution as Y = W X on a Hopper GPU: the products of conv_mma.cu by TMA and wgmma, bf16 with f32 sums.
//
// x: [C, H, W, N], y: [K, P, Q, N], w: [K, R, S, channels] as in conv_mma.cu; N is a multiple of 64, C is at least 8. dw:
// [K, C, R, S], f32. A stage of the reduction is 64 steps: channels at one filter tap, or samples of one pixel. So every
// operand of a stage is a few boxes of 64 x 64 elements, each from one place of a tensor of four sizes; TMA leaves zeros where
// the place is outside: in the padding, beyond the last channel, beyond the last row.
//
//                     left                                    right
//   forward           w   [K, steps], rows lie along steps    x   [channels, samples], transposed
//   input gradient    w   [K, channels], transposed           dy  [K, samples], transposed
//   weight gradient   dy  [K, samples]                        x   [channels, samples]
//
// Of a block's nine warps one thread of the last fetches the stages that the others multiply (conv_boxes.cuh).
//
// Sums are f32 in an order that depends on the shape alone. Limit: tensor cores; not run on a GPU yet.
#include "kernels/conv_boxes.cuh"

struct ConvBoxesArgs {
    TensorMap w;     // forward: [filter, 1, 1, K], box [64, 1, 1, rows]; input gradient: [channels, taps, 1, K], box [64, 1, 1, 64]
    TensorMap from;  // [N, width, height, channels], box [64, 1, 1, 64]
    ConvArgs conv;
};

struct ConvGradientBoxesArgs {
    TensorMap dy;  // [N, Q, P, K], box [64, 1, 1, rows]
    TensorMap x;   // [N, W, H, C], box [64, 1, 1, 64]
    ConvWeightGradientArgs conv;
};

constexpr int BLOCK_THREADS = THREADS + 32;

// Adds `steps` stages, which fetch(stage, barrier) brings one after the other, to the sums of each warp but the last, which
// calls meanwhile(stage) while wgmma is at work.
template <class Tile, class Fetch, class Meanwhile>
DEVICE void multiply_boxes(typename Tile::Shared& shared, int thread, int steps, Fetch fetch, SumTile (&sum)[Tile::RIGHTS],
                           Meanwhile meanwhile) {
    Tile::begin(shared, thread, 1);
    if (thread / 32 == WARPS) {
        if (thread % 32 == 0)
            for (int step = 0; step < steps; ++step) {
                const int i = step % Tile::STAGES;
                Tile::wait_until_read(shared, step);
                arrive_expecting(shared.full[i], sizeof(typename Tile::Stage));
                fetch(shared.stage[i], shared.full[i]);
            }
        __syncwarp();
    } else {
        Tile::multiply(shared, thread, steps, sum, meanwhile);
    }
    __syncthreads();
}

// Forward and input gradient: a block's tile of ROWS features x COLUMNS pixels and samples.
template <bool GRADIENT, int ROWS, int COLUMNS, int DEEP>
struct BoxProduct {
    using Tile = BoxTile<ROWS, COLUMNS, DEEP, GRADIENT, true>;
    using Shared = typename Tile::Shared;
    static constexpr int BOXES = COLUMNS / BOX;

    DEVICE static void run(const ConvBoxesArgs& a, Shared& shared, int thread, int column_tile, int row_tile, int number) {
        using Pass = Taps<GRADIENT>;
        const ConvShape& d = a.conv.shape;
        const PixelClass pixels = Pass::pixels(d, number);
        if (column_tile * COLUMNS >= pixels.height * pixels.width * d.n) return;
        if (thread == 0) shared.pixels = pixels;
        const int channels = Pass::channels(d), pitch = channel_pitch(d), row0 = row_tile * ROWS;
        const int steps = int(ceil_div(channels, BOX)) * pixels.r * pixels.s;
        Copied box[BOXES];
        UNROLL for (int i = 0; i < BOXES; ++i)
            box[i] = copied_column<GRADIENT>(d, pixels, column_tile * COLUMNS + i * BOX);
        int channel = 0, r = 0, s = 0;
        const auto fetch = [&](typename Tile::Stage& stage, PhaseBarrier& barrier) {
            const int tap = (pixels.first_r + r * pixels.step) * d.s + pixels.first_s + s * pixels.step;
            if constexpr (GRADIENT)
                UNROLL for (int i = 0; i < ROWS / BOX; ++i)
                    copy_box(stage.left + i * BOX * BOX, a.w, barrier, row0 + i * BOX, tap, 0, channel);
            else
                copy_box(stage.left, a.w, barrier, tap * pitch + channel, 0, 0, row0);
            UNROLL for (int i = 0; i < BOXES; ++i)
                copy_box(stage.right + i * BOX * BOX, a.from, barrier, box[i].n, GRADIENT ? box[i].w - s : box[i].w + s,
                         GRADIENT ? box[i].h - r : box[i].h + r, channel);
            channel += BOX;
            if (channel >= channels) channel = 0, ++s;
            if (s == pixels.s) s = 0, ++r;
        };
        SumTile sum[1][Tile::RIGHTS];
        clear(sum[0]);
        multiply_boxes<Tile>(shared, thread, steps, fetch, sum[0], [](const auto&) {});
        const int warp = thread / 32;
        const auto row_of = [&](int row) { return row0 + row < Pass::rows(d) ? uint32_t(row0 + row) : NONE; };
        if (warp < WARPS)
            write_sums<GRADIENT>(a.conv, shared.pixels, shared.epilogue, thread % 32, warp, column_tile * COLUMNS, sum, row_of);
        write_tile<GRADIENT>(a.conv, shared.pixels, shared.epilogue, thread, column_tile, number, row_of);
    }
};

// The weight gradient: a block's tile of ROWS filters x two boxes of 64 channels, each at a filter tap, over a range of boxes of
// samples.
template <int ROWS, int DEEP>
struct BoxGradient {
    static constexpr int BOXES = 2;
    using Tile = BoxTile<ROWS, BOXES * BOX, DEEP, false, false>;
    using Shared = typename Tile::Shared;

    DEVICE static void run(const ConvGradientBoxesArgs& a, Shared& shared, int thread, int column_tile, int row_tile,
                           int split) {
        const ConvShape& d = a.conv.shape;
        const int filter = d.r * d.s, per_pixel = d.n / BOX, per_tap = int(ceil_div(d.c, BOX));
        const int stages = d.p * d.q * per_pixel, first = int(int64_t(stages) * split / a.conv.splits);
        const int steps = int(int64_t(stages) * (split + 1) / a.conv.splits) - first;
        const int k0 = row_tile * ROWS;
        int n = first % per_pixel * BOX, q = first / per_pixel % d.q, p = first / per_pixel / d.q;
        const auto box_of = [&](int i) { return column_tile * BOXES + i; };
        const auto fetch = [&](typename Tile::Stage& stage, PhaseBarrier& barrier) {
            copy_box(stage.left, a.dy, barrier, n, q, p, k0);
            UNROLL for (int i = 0; i < BOXES; ++i) {
                // Beyond the last tap: channels that there are not.
                const int tap = box_of(i) / per_tap, channel = tap < filter ? box_of(i) % per_tap * BOX : d.c;
                copy_box(stage.right + i * BOX * BOX, a.x, barrier, n, q * d.stride + tap % d.s - d.pad,
                         p * d.stride + tap / d.s - d.pad, channel);
            }
            n += BOX;
            if (n == d.n) n = 0, ++q;
            if (q == d.q) q = 0, ++p;
        };
        SumTile sum[Tile::RIGHTS];
        clear(sum);
        RowSums<ROWS, BOX, BOX> row_sums;
        const bool summed = a.conv.row_sums && column_tile == 0;
        // A row's elements are out of order in a box, but its own.
        multiply_boxes<Tile>(shared, thread, steps, fetch, sum, [&](const typename Tile::Stage& stage) {
            if (summed) row_sums.add(thread, stage.left);
        });
        const int warp = thread / 32, lane = thread % 32;
        if (warp == WARPS) return;
        if (summed) row_sums.write(thread, a.conv.row_sums + split * split_pitch(a.conv) + k0, d.k - k0);
        UNROLL for (int i = 0; i < Tile::WIDTH / BOX; ++i) {
            const int box = box_of(Tile::column(warp) / BOX + i), tap = box / per_tap;
            const int channel = box % per_tap * BOX + lane % 4 * 2;
            UNROLL for (int row = 0; row < 16; row += 8) {
                const int k = k0 + Tile::row(warp) + lane / 4 + row;
                if (k >= d.k || tap >= filter) continue;
                float* const dw = a.conv.partial + (split * split_pitch(a.conv) + int64_t(k) * d.c * filter + tap);
                UNROLL for (int j = 0; j < BOX / 8; ++j)
                    UNROLL for (int e = 0; e < 2; ++e) {
                        const int c = channel + 8 * j + e;
                        if (c < d.c) dw[c * filter] = sum[i * BOX / 8 + j].value[row / 4 + e];
                    }
            }
        }
    }
};

// ---------------------------------------------------------------------------------------------------------- kernels

#define RUN(Product)                                                                   \
    if constexpr (HOPPER) {                                                            \
        SHARED(Product::Shared, shared);                                               \
        Product::run(a, shared, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);      \
    } else {                                                                           \
        not_hopper();                                                                  \
    }

// Grid of the products: column tiles, row tiles, classes of pixels. Named by rows x columns.

using Forward64 = BoxProduct<false, 64, 128, 4>;
using Forward128 = BoxProduct<false, 128, 128, 3>;
using Forward128Wide = BoxProduct<false, 128, 256, 4>;
using Backward64 = BoxProduct<true, 64, 128, 4>;
using Backward128 = BoxProduct<true, 128, 128, 3>;
using Backward128Wide = BoxProduct<true, 128, 256, 4>;

KERNEL(conv_forward_wgmma_64x128_bf16, ConvBoxesArgs, Forward64::Shared, BLOCK_THREADS, 2) { RUN(Forward64); }
KERNEL(conv_forward_wgmma_128x128_bf16, ConvBoxesArgs, Forward128::Shared, BLOCK_THREADS, 2) { RUN(Forward128); }
KERNEL(conv_forward_wgmma_128x256_bf16, ConvBoxesArgs, Forward128Wide::Shared, BLOCK_THREADS, 1) { RUN(Forward128Wide); }
KERNEL(conv_input_gradient_wgmma_64x128_bf16, ConvBoxesArgs, Backward64::Shared, BLOCK_THREADS, 2) { RUN(Backward64); }
KERNEL(conv_input_gradient_wgmma_128x128_bf16, ConvBoxesArgs, Backward128::Shared, BLOCK_THREADS, 2) { RUN(Backward128); }
KERNEL(conv_input_gradient_wgmma_128x256_bf16, ConvBoxesArgs, Backward128Wide::Shared, BLOCK_THREADS, 1) { RUN(Backward128Wide); }

// Grid of the weight gradients: pairs of boxes of channels, row tiles, splits.
using Gradient64 = BoxGradient<64, 4>;
using Gradient128 = BoxGradient<128, 3>;

KERNEL(conv_weight_gradient_wgmma_64x128_bf16, ConvGradientBoxesArgs, Gradient64::Shared, BLOCK_THREADS, 2) { RUN(Gradient64); }
KERNEL(conv_weight_gradient_wgmma_128x128_bf16, ConvGradientBoxesArgs, Gradient128::Shared, BLOCK_THREADS, 2) { RUN(Gradient128); }
