// conv_groups_mma.cu - convolution with a ticket's kept weights alone on tensor cores, of groups of 32 rows that keep similar
// columns: the sums of conv_mma.cu without the columns that no row of a group keeps. bf16 with f32 sums.
//
// A list has a group of up to 32 output channels (for the input gradient: input channels) for each block; its entries are
// the columns that one of them keeps, channel and tap, 16 at a time. Those of the input gradient at stride 2 and more are
// apart for each class of pixels. What an entry reads comes to shared memory as the rows of a dense product do, each from
// where its entry says; the group's weights, zeros where a row does not keep the column, lie as tensor cores take them:
// [16 entries][two halves of the rows][lane][8], a left tile of mma.cuh each. Sums of the weight gradient come out in the same
// order.
//
// Each group fetches its own columns: of a group that keeps a share d of them, four groups fetch 4 d, where a block of 128 rows
// that fetched all columns for its groups to pick from would fetch 1. So that would pay above d = 1/4, where dense products do.
//
// Sums are f32 in an order that depends on the shape and the mask alone. Limit: bytes from the second-level cache, 16
// multiply-adds for each; not measured yet.
#include "kernels/conv_kept.cuh"
#include "kernels/conv_mma.cuh"

constexpr int GROUP_ROWS = 32;
constexpr int HALVES = GROUP_ROWS / 16;
constexpr int ENTRIES = 16;                        // that a tensor core takes at a time
constexpr int PACKED = ENTRIES * GROUP_ROWS;       // their weights
constexpr int PACKED_CHUNKS = PACKED / CHUNK;

template <bool GRADIENT, int COLUMNS>
struct GroupProduct {
    using Warp = WarpTile<GROUP_ROWS, COLUMNS, WARPS>;
    static_assert(Warp::LEFTS == HALVES, "a warp has all rows");
    static constexpr int X_CHUNKS = COLUMNS / CHUNK, X_APART = THREADS / X_CHUNKS;  // of a line; lines between a thread's copies
    static constexpr int X_LOADS = DEPTH / X_APART;
    static_assert(DEPTH % X_APART == 0 && THREADS % X_CHUNKS == 0, "whole threads");
    static_assert(DEPTH / ENTRIES * PACKED_CHUNKS <= THREADS, "a copy of weights a thread");
    struct Stage {
        bf16 x[DEPTH][COLUMNS + SPACE];
        bf16 w[DEPTH / ENTRIES][PACKED];
    };
    struct Shared {
        union {
            Stage stage[STAGES];
            Epilogue<Warp, GROUP_ROWS, COLUMNS> epilogue;
        };
        PixelClass pixels;  // kept here for the end, not in registers
    };

    DEVICE static void run(const ConvSparseArgs& a, Shared& shared, int thread, int column_tile, int group, int number) {
        using Pass = Taps<GRADIENT>;
        const ConvShape& d = a.shape;
        const PixelClass pixels = Pass::pixels(d, number);
        if (column_tile * COLUMNS >= pixels.height * pixels.width * d.n) return;
        const uint32_t* starts = a.starts + (int64_t(group) * a.classes + number);
        const uint32_t begin = starts[0], end = starts[1];
        const int steps = int(ceil_div(end - begin, DEPTH));
        const int from_height = Pass::from_height(d), from_width = Pass::from_width(d);
        if (thread == 0) shared.pixels = pixels;

        // What this thread copies of x.
        const int x_chunk = thread % X_CHUNKS * CHUNK, x_line = thread / X_CHUNKS;
        const auto [h0, w0, n0] = copied_column<GRADIENT>(d, pixels, column_tile * COLUMNS + x_chunk);
        const bf16* const from = a.from + n0;
        const int64_t origin = (int64_t(h0) * from_width + w0) * d.n;
        // The entries of the stage that comes next, read a stage ahead.
        Entry next[X_LOADS];
        const auto read_entries = [&](int step) {
            UNROLL for (int i = 0; i < X_LOADS; ++i) {
                const uint32_t entry = begin + step * DEPTH + x_line + i * X_APART;
                next[i] = entry < end ? entry_of(a, entry) : no_entry();
            }
        };
        read_entries(0);

        AsyncCopies<STAGES * (X_LOADS + 1)> copies;
        const auto fetch = [&](int step) {
            Stage& stage = shared.stage[step % STAGES];
            UNROLL for (int i = 0; i < X_LOADS; ++i) {
                const int h = h0 + next[i].rows, w = w0 + next[i].columns;
                const bool there = uint32_t(h) < uint32_t(from_height) && uint32_t(w) < uint32_t(from_width);
                copies.copy(&stage.x[x_line + i * X_APART][x_chunk], there ? from + (origin + next[i].offset) : a.from, there);
            }
            if (thread < DEPTH / ENTRIES * PACKED_CHUNKS) {
                const uint32_t entry = begin + step * DEPTH + thread / PACKED_CHUNKS * ENTRIES;
                const bf16* own = a.left_tiles + (int64_t(entry) * GROUP_ROWS + thread % PACKED_CHUNKS * CHUNK);
                copies.copy(&stage.w[thread / PACKED_CHUNKS][thread % PACKED_CHUNKS * CHUNK], entry < end ? own : a.left_tiles, entry < end);
            }
            read_entries(step + 1);
        };

        const int warp = thread / 32, lane = thread % 32;
        SumTile sum[Warp::LEFTS][Warp::RIGHTS];
        UNROLL for (int i = 0; i < Warp::LEFTS; ++i) clear(sum[i]);
        pipeline(steps, copies, fetch, [&](int step) {
            const Stage& stage = shared.stage[step % STAGES];
            UNROLL for (int at = 0; at < DEPTH; at += ENTRIES) {
                LeftTile rows[HALVES];
                UNROLL for (int i = 0; i < HALVES; ++i)
                    rows[i] = load_left_packed(lane, &stage.w[at / ENTRIES][i * PACKED / HALVES]);
                RightTile right[Warp::RIGHTS];
                UNROLL for (int j = 0; j < Warp::RIGHTS; j += 2)
                    load_right<false, COLUMNS + SPACE>(lane, &stage.x[at][Warp::column(warp) + j * 8], right[j], right[j + 1]);
                UNROLL for (int i = 0; i < HALVES; ++i)
                    UNROLL for (int j = 0; j < Warp::RIGHTS; ++j) multiply_add(lane, sum[i][j], rows[i], right[j]);
            }
        });
        __syncthreads();
        const uint32_t* rows = a.rows + int64_t(group) * GROUP_ROWS;
        const auto row_of = [&](int row) { return rows[row]; };
        write_sums<GRADIENT>(a, shared.pixels, shared.epilogue, lane, warp, column_tile * COLUMNS, sum, row_of);
        write_tile<GRADIENT>(a, shared.pixels, shared.epilogue, thread, column_tile, number, row_of);
    }
};

// The weight gradient: a block has a group's rows and up to TAPS of its entries, over a range of pixels and samples. Each
// warp has 16 entries.
struct GroupGradient {
    static constexpr int TAPS = ENTRIES * WARPS;
    using Warp = WarpTile<GROUP_ROWS, TAPS, WARPS>;
    static constexpr int CHUNKS = DEPTH / CHUNK, APART = THREADS / CHUNKS;  // of a line; lines between a thread's copies
    static constexpr int X_LOADS = TAPS / APART;
    static_assert(Warp::LEFTS == HALVES && Warp::RIGHTS == 2 && TAPS % APART == 0 && GROUP_ROWS <= APART, "whole threads");
    struct Stage {
        bf16 dy[GROUP_ROWS][DEPTH + SPACE];
        bf16 x[TAPS][DEPTH + SPACE];
    };
    struct Shared {
        Stage stage[STAGES];
    };

    DEVICE static void run(const ConvSparseGradientArgs& a, Shared& shared, int thread, int number, int split) {
        const ConvShape& d = a.shape;
        const uint32_t* own = a.chunks + int64_t(number) * 4;
        const uint32_t group = own[0], begin = own[2], end = own[3];
        const int columns = d.p * d.q * d.n, stages = int(ceil_div(columns, DEPTH));
        const int first_stage = int(int64_t(stages) * split / a.splits);
        const int steps = int(int64_t(stages) * (split + 1) / a.splits) - first_stage;

        // What this thread copies: always the same row and entries, and eight columns (p, q, n) that move on.
        const int line = thread / CHUNKS, chunk = thread % CHUNKS * CHUNK;
        int column = first_stage * DEPTH + chunk, n = column % d.n, q = column / d.n % d.q, p = column / d.n / d.q;
        const uint32_t row = line < GROUP_ROWS ? a.rows[int64_t(group) * GROUP_ROWS + line] : NONE;
        Entry entry[X_LOADS];
        UNROLL for (int i = 0; i < X_LOADS; ++i) {
            const uint32_t at = begin + line + i * APART;
            entry[i] = at < end ? entry_of(a, at) : no_entry();
        }
        AsyncCopies<STAGES * (1 + X_LOADS)> copies;
        const auto fetch = [&](int step) {
            Stage& stage = shared.stage[step % STAGES];
            if (line < GROUP_ROWS) {
                const bool there = row != NONE && column < columns;
                copies.copy(&stage.dy[line][chunk], there ? a.dy + (int64_t(row) * columns + column) : a.dy, there);
            }
            const int h0 = p * d.stride - d.pad, w0 = q * d.stride - d.pad;
            const bf16* from = a.x + ((int64_t(h0) * d.w + w0) * d.n + n);
            UNROLL for (int i = 0; i < X_LOADS; ++i) {
                const int h = h0 + entry[i].rows, w = w0 + entry[i].columns;
                const bool there = column < columns && uint32_t(h) < uint32_t(d.h) && uint32_t(w) < uint32_t(d.w);
                copies.copy(&stage.x[line + i * APART][chunk], there ? from + entry[i].offset : a.x, there);
            }
            column += DEPTH, n += DEPTH;
            while (n >= d.n) {
                n -= d.n;
                if (++q == d.q) q = 0, ++p;
            }
        };

        const int warp = thread / 32, lane = thread % 32;
        const uint32_t first = begin + Warp::column(warp);
        SumTile sum[Warp::LEFTS][Warp::RIGHTS];
        UNROLL for (int i = 0; i < Warp::LEFTS; ++i) clear(sum[i]);
        pipeline(steps, copies, fetch, [&](int step) {
            if (first >= end) return;
            const Stage& stage = shared.stage[step % STAGES];
            multiply_stage<Warp, false, true, DEPTH + SPACE, DEPTH + SPACE>(lane, &stage.dy[0][0],
                                                                            &stage.x[Warp::column(warp)][0], sum);
        });
        if (first >= end) return;
        // A lane holds of the sums what it takes of a left tile.
        float* partial = a.partial + (int64_t(split) * a.entries + first) * GROUP_ROWS;
        UNROLL for (int i = 0; i < HALVES; ++i) {
            Samples<8> values;
            UNROLL for (int e = 0; e < 8; ++e) values[e] = sum[i][e / 4].value[e % 4];
            store<8>(partial + (i * 32 + lane) * 8, values);
        }
    }
};

// ---------------------------------------------------------------------------------------------------------- kernels

// Grid of the products: column tiles, groups, classes of pixels. Named by rows x columns.

using Forward128 = GroupProduct<false, 128>;
using Forward256 = GroupProduct<false, 256>;
using Backward128 = GroupProduct<true, 128>;
using Backward256 = GroupProduct<true, 256>;

#define RUN(tile)                 \
    SHARED(tile::Shared, shared); \
    tile::run(a, shared, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z)

KERNEL(conv_groups_forward_32x128_bf16, ConvSparseArgs, Forward128::Shared, THREADS, 3) { RUN(Forward128); }
KERNEL(conv_groups_forward_32x256_bf16, ConvSparseArgs, Forward256::Shared, THREADS, 2) { RUN(Forward256); }
KERNEL(conv_groups_input_gradient_32x128_bf16, ConvSparseArgs, Backward128::Shared, THREADS, 3) { RUN(Backward128); }
KERNEL(conv_groups_input_gradient_32x256_bf16, ConvSparseArgs, Backward256::Shared, THREADS, 2) { RUN(Backward256); }

// Grid: chunks, splits.
KERNEL(conv_groups_weight_gradient_32x128_bf16, ConvSparseGradientArgs, GroupGradient::Shared, THREADS, 3) {
    SHARED(GroupGradient::Shared, shared);
    GroupGradient::run(a, shared, threadIdx.x, blockIdx.x, blockIdx.y);
}
