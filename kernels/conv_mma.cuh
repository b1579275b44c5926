// conv_mma.cuh - what the products on tensor cores share, of all weights (conv_mma.cu) and of groups of rows (conv_groups_mma.cu):
// bf16 with f32 sums.
//
// A block owns a tile of the result, its eight warps parts of it. Stages of the reduction come to shared memory by copies of
// 16 bytes that are under way while earlier stages are multiplied: STAGES - 1 at a time, one barrier a stage. What lies
// outside the image comes as zeros. Rows in shared memory lie 16 bytes further apart than they are long, so that eight of them
// meet no bank twice.
//
// Epilogues do what would read the result again. A forward product adds a bias, and writes GELU of what it stores, or a residual
// sum with it, beside it. Where a batch norm asks for it (norm_join.cu), it sums what it stores: mean and squared deviations of
// the true samples of each row of a block's tile, 8 bytes instead of the 128 to 512 that reading the row again would take. An
// input gradient goes through GELU's, or through ReLU after a batch norm, whose gradient it then sums in the same way (norm.cu has
// the formulas); a weight gradient sums the rows of dy for a bias.
#pragma once
#include "kernels/conv.cuh"
#include "kernels/gelu.cuh"
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

// What a thread copies of what a product reads: the same samples of a pixel at every step, and where that pixel reads tap 0.
struct Copied {
    int h, w, n;
};

template <bool GRADIENT>
DEVICE Copied copied_column(const ConvShape& d, const PixelClass& pixels, int column) {
    const int pixel = column / d.n, o = pixel / pixels.width, u = pixel % pixels.width;
    // Columns beyond the last lie above every image.
    const bool there = column < pixels.height * pixels.width * d.n;
    return {there ? pixels.origin_h + (GRADIENT ? o : o * d.stride) : -(1 << 30),
            pixels.origin_w + (GRADIENT ? u : u * d.stride), column % d.n};
}

// What a block's warps write at the end, where its stages were.
template <class Warp, int ROWS, int COLUMNS>
struct Epilogue {
    static constexpr int PARTS = COLUMNS / Warp::WIDTH;  // of a row, of a warp each
    float slab[WARPS][16][Warp::WIDTH + 4];              // of a warp's sums at a time, to turn them into rows of the result
    Moments moments[ROWS][PARTS];
    GradientSums gradient[2][ROWS][PARTS];
};

// The sum of a value over the LANES lanes beside each other that have a row together.
template <int LANES>
DEVICE float row_sum(float value) {
    UNROLL for (int offset = LANES / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// Of a row of which each of LANES lanes has 8 values, as they are stored, `live` a bit for each true one; the others are zero.
template <int LANES>
DEVICE Moments row_moments(Samples<8> y, uint32_t live, float items) {
    y = as_stored<8>(y);
    const float mean = row_sum<LANES>(lane_sum<8>(y)) / items;
    const Samples<8> off = kept<8>(y - mean, live);
    const float left = row_sum<LANES>(lane_sum<8>(off)), squares = row_sum<LANES>(lane_sum<8>(off * off));
    return corrected(mean, left, squares, items);
}

// dz of 8 values of the gradient of a row of the result of norms, as they are stored, and its sums over them for each. The row lies
// at `place` of column 0; its feature's, in x, `pitch` elements for each row further up or down.
DEVICE Samples<8> before_norm(const NormBeforeArgs& norm, uint32_t row, int64_t place, int64_t pitch, const Samples<8>& dy,
                              GradientSums (&sums)[2]) {
    const uint32_t feature = norm.source ? norm.source[row] : row;
    Normaliser of[2];
    Samples<8> dz = as_stored<8>(dy), off[2] = {splat<8>(0.0f), splat<8>(0.0f)};
    UNROLL for (int k = 0; k < 2; ++k) {
        if (feature == NONE || !norm.norms[k].x) continue;
        of[k] = Normaliser(norm.norms[k], feature);
        off[k] = load<8>(norm.norms[k].x + place + feature * pitch) - of[k].mean;
    }
    const auto z = [&] { return of[0].apply<8>(off[0]) + of[1].apply<8>(off[1]); };
    if (norm.relu) dz = through_relu<8>(dz, norm.y ? load<8>(norm.y + place + row * pitch) : z());
    const float sum = lane_sum<8>(dz);
    UNROLL for (int k = 0; k < 2; ++k)
        if (norm.sums[k]) sums[k] = {sum, lane_sum<8>(dz * (off[k] * of[k].invstd))};
    return dz;
}

// True samples among a row's columns `first` to first + width, of which those from `columns` on are none.
template <class Args>
DEVICE float true_samples(const Args& a, int first, int width, int columns) {
    const int n = a.shape.n, count = int(min64(*a.epilogue.count, n));
    return float(true_columns(min32(first + width, columns), n, count) - true_columns(min32(first, columns), n, count));
}

// Sums of ROWS rows of the left operand of a weight gradient, LENGTH elements of each a stage: the gradient of a bias, by
// whoever has these rows in shared memory. A thread adds 8 elements of a row at a time, in any order within the row.
template <int ROWS, int LENGTH, int PITCH>
struct RowSums {
    static constexpr int ACROSS = LENGTH / 8, APART = THREADS / ACROSS, PASSES = (ROWS + APART - 1) / APART;
    float sum[PASSES];

    DEVICE RowSums() {
        UNROLL for (int i = 0; i < PASSES; ++i) sum[i] = 0.0f;
    }
    DEVICE static int row(int thread, int i) { return thread / ACROSS + i * APART; }

    DEVICE void add(int thread, const bf16* rows) {
        UNROLL for (int i = 0; i < PASSES; ++i)
            if (row(thread, i) < ROWS) sum[i] += lane_sum<8>(load<8>(rows + row(thread, i) * PITCH + thread % ACROSS * 8));
    }

    // Writes the first `rows` of them.
    DEVICE void write(int thread, float* to, int rows) const {
        UNROLL for (int i = 0; i < PASSES; ++i) {
            const float all = row_sum<ACROSS>(sum[i]);
            if (thread % ACROSS == 0 && row(thread, i) < min32(ROWS, rows)) to[row(thread, i)] = all;
        }
    }
};

// Writes a warp's sums, 16 rows at a time, to the pixels of a class: each lane rows of 8 samples, 16 bytes. `row_of` is the
// row of the result that each of the tile's rows is, or NONE. Keeps the moments of its part of each row, or the sums of norms'
// gradients, and writes what stands beside it, if they are asked for; a gradient goes through GELU before it is rounded.
template <bool GRADIENT, class Warp, int ROWS, int COLUMNS, class Args, class RowOf>
DEVICE void write_sums(const Args& a, const PixelClass& own, Epilogue<Warp, ROWS, COLUMNS>& shared, int lane, int warp,
                       int first_column, const SumTile (&sum)[Warp::LEFTS][Warp::RIGHTS], RowOf row_of) {
    using Pass = Taps<GRADIENT>;
    constexpr int LANES_ACROSS = Warp::WIDTH / 8, LANES_DOWN = 32 / LANES_ACROSS;
    const ConvShape& d = a.shape;
    const EpilogueArgs& end = a.epilogue;
    auto& slab = shared.slab[warp];
    const int across_slab = lane % LANES_ACROSS * 8, down_slab = lane / LANES_ACROSS;
    const int warp_column = first_column + Warp::column(warp), column = warp_column + across_slab;
    const int columns = own.height * own.width * d.n;
    const bool inside = column < columns;
    const int n = column % d.n, at = column / d.n, to_width = Pass::to_width(d);
    const int down = own.first_h + at / own.width * own.step, across = own.first_w + at % own.width * own.step;
    const int64_t pitch = int64_t(Pass::to_height(d)) * to_width * d.n;
    const int64_t place = (int64_t(down) * to_width + across) * d.n + n;
    const bool summed = !GRADIENT && end.statistics;
    const uint32_t live = inside && (end.bias || summed) ? live_columns<8>(end.columns, int(*end.count), n) : 0;
    const float items = summed ? larger(1.0f, true_samples(a, warp_column, Warp::WIDTH, columns)) : 1.0f;
    UNROLL for (int i = 0; i < Warp::LEFTS; ++i) {
        UNROLL for (int j = 0; j < Warp::RIGHTS; ++j)
            UNROLL for (int e = 0; e < 4; ++e)
                slab[lane / 4 + e / 2 * 8][j * 8 + lane % 4 * 2 + e % 2] = sum[i][j].value[e];
        __syncwarp();
        UNROLL for (int r = 0; r < 16; r += LANES_DOWN) {
            const int tile_row = Warp::row(warp) + i * 16 + r + down_slab;
            const uint32_t row = row_of(tile_row);
            Samples<8> y = splat<8>(0.0f);
            GradientSums gradient[2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
            if (inside && row != NONE) {
                y = load<8>(&slab[r + down_slab][across_slab]);
                if (end.bias) y = kept<8>(y + splat<8>(end.bias[row]), live);
                const int64_t own_place = place + row * pitch;
                if (GRADIENT && end.operand) y = y * gelu_slope<8>(load<8>(end.operand + own_place));
                if (end.accumulate) y += load<8>(a.to + own_place);
                if (GRADIENT && end.norm.sums[0]) y = before_norm(end.norm, row, place, pitch, y, gradient);
                store<8>(a.to + own_place, y);
                if (!GRADIENT && end.beside) {
                    const Samples<8> stored = as_stored<8>(y);
                    store<8>(end.beside + own_place,
                             end.operand ? load<8>(end.operand + own_place) + stored : gelu<8>(stored));
                }
            }
            const int part = Warp::column(warp) / Warp::WIDTH;
            if (summed) {
                const Moments moments = row_moments<LANES_ACROSS>(y, live, items);
                if (across_slab == 0) shared.moments[tile_row][part] = moments;
            }
            if constexpr (GRADIENT) {
                UNROLL for (int k = 0; k < 2; ++k) {
                    if (!end.norm.sums[k]) continue;
                    gradient[k] = {row_sum<LANES_ACROSS>(gradient[k].dz), row_sum<LANES_ACROSS>(gradient[k].dz_xhat)};
                    if (across_slab == 0) shared.gradient[k][tile_row][part] = gradient[k];
                }
            }
        }
        __syncwarp();
    }
}

// Writes the moments of each row of a block's tile, or the sums of a norm's gradient, of whose parts its warps have kept theirs;
// all threads of the block call this after that. Tiles of one class of pixels after those of another: all classes have as many.
template <bool GRADIENT, class Warp, int ROWS, int COLUMNS, class Args, class RowOf>
DEVICE void write_tile(const Args& a, const PixelClass& own, const Epilogue<Warp, ROWS, COLUMNS>& shared, int thread,
                       int column_tile, int number, RowOf row_of) {
    constexpr int PARTS = Epilogue<Warp, ROWS, COLUMNS>::PARTS;
    const EpilogueArgs& end = a.epilogue;
    if (GRADIENT ? !end.norm.sums[0] : !end.statistics) return;
    __syncthreads();
    const uint32_t row = thread < ROWS ? row_of(thread) : NONE;
    if (row == NONE) return;
    const int columns = own.height * own.width * a.shape.n, first = column_tile * COLUMNS;
    const int64_t tiles = ceil_div(columns, COLUMNS);
    if constexpr (GRADIENT) {
        const uint32_t feature = end.norm.source ? end.norm.source[row] : row;
        if (feature == NONE) return;
        const int64_t tile = (int64_t(feature) * a.shape.stride * a.shape.stride + number) * tiles + column_tile;
        UNROLL for (int k = 0; k < 2; ++k)
            if (end.norm.sums[k]) end.norm.sums[k][tile] = join(shared.gradient[k][thread], PARTS, nullptr, 0, 1);
    } else {
        const auto items_of = [&](int part) { return true_samples(a, first + part * Warp::WIDTH, Warp::WIDTH, columns); };
        const float items = larger(1.0f, true_samples(a, first, COLUMNS, columns));
        end.statistics[row * tiles + column_tile] = join(shared.moments[thread], PARTS, items, items_of, nullptr, 0, 1);
    }
}
