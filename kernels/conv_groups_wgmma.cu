// conv_groups_wgmma.cu - the products of conv_groups_mma.cu on a Hopper GPU: of groups of 64 rows, by wgmma. bf16 with f32 sums.
//
// Lists are those of groups of 32, but for the entries, which come 64 at a time, a stage, and their weights, [64 rows][64] of a
// stage. So the rows of a group are the rows of a product: with 32, half of each would be empty.
//
// N is a multiple of 64. What entries read lies anywhere, where TMA on this GPU brings nothing but boxes: four warps of twelve
// copy, 16 bytes at a time, to the places where wgmma looks for them, and tell the others of a stage once they have shown it to
// wgmma, which reads shared memory by a way of its own.
//
// Sums are f32 in an order that depends on the shape and the mask alone. Limit: bytes from the second-level cache, 32
// multiply-adds for each, twice as many as of groups of 32; not run on a GPU yet.
#include "kernels/conv_boxes.cuh"
#include "kernels/conv_kept.cuh"

constexpr int COPYING = 128;  // threads
constexpr int BLOCK_THREADS = THREADS + COPYING;
constexpr int LINE = BOX / CHUNK;  // copies of a box's row
constexpr int DEEP = 4;            // stages
// Copies of so many stages are under way when the one before them is told of. One more, and all would wait: who multiplies gives
// a stage back when the next has come, and that would be told of once there are copies in the stage given back.
constexpr int UNDER_WAY = DEEP - 2;

// What the copying warps do: fetch(stage, step) starts a thread's copies, COPIES of them.
template <class Tile, int COPIES, class Fetch>
DEVICE void copy_stages(typename Tile::Shared& shared, int thread, int steps, Fetch fetch) {
    AsyncCopies<(UNDER_WAY + 1) * COPIES> copies;
    for (int step = 0; step < steps + UNDER_WAY; ++step) {
        if (step < steps) {
            Tile::wait_until_read(shared, step);
            fetch(copies, shared.stage[step % DEEP], step);
        }
        copies.commit();
        if (step < UNDER_WAY) continue;
        copies.template wait<UNDER_WAY>();
        show_to_products();
        __syncwarp();
        if (thread % 32 == 0) arrive(shared.full[(step - UNDER_WAY) % DEEP]);
    }
}

template <bool GRADIENT, int COLUMNS>
struct GroupProduct {
    using Tile = BoxTile<BOX, COLUMNS, DEEP, false, true>;
    using Shared = typename Tile::Shared;
    // Copies of an entry, and entries between those of a thread.
    static constexpr int X_CHUNKS = COLUMNS / CHUNK, X_APART = COPYING / X_CHUNKS;
    static constexpr int X_LOADS = BOX / X_APART, W_APART = COPYING / LINE, W_LOADS = BOX / W_APART;
    static_assert(COPYING % X_CHUNKS == 0 && BOX % X_APART == 0, "whole threads");

    DEVICE static void run(const ConvSparseArgs& a, Shared& shared, int thread, int column_tile, int group, int number) {
        using Pass = Taps<GRADIENT>;
        const ConvShape& d = a.shape;
        const PixelClass pixels = Pass::pixels(d, number);
        if (column_tile * COLUMNS >= pixels.height * pixels.width * d.n) return;
        const uint32_t* starts = a.starts + (int64_t(group) * a.classes + number);
        const uint32_t begin = starts[0];
        const int steps = int(starts[1] - begin) / BOX, warp = thread / 32;
        if (thread == 0) shared.pixels = pixels;
        SumTile sum[1][Tile::RIGHTS];
        clear(sum[0]);
        Tile::begin(shared, thread, COPYING / 32);
        if (warp >= WARPS)
            copy(a, shared, thread - THREADS, pixels, column_tile * COLUMNS, begin, steps);
        else
            Tile::multiply(shared, thread, steps, sum[0], [](const auto&) {});
        __syncthreads();
        const uint32_t* rows = a.rows + int64_t(group) * BOX;
        const auto row_of = [&](int row) { return rows[row]; };
        if (warp < WARPS)
            write_sums<GRADIENT>(a, shared.pixels, shared.epilogue, thread % 32, warp, column_tile * COLUMNS, sum, row_of);
        write_tile<GRADIENT>(a, shared.pixels, shared.epilogue, thread, column_tile, number, row_of);
    }

    DEVICE static void copy(const ConvSparseArgs& a, Shared& shared, int thread, const PixelClass& pixels, int first_column,
                            uint32_t begin, int steps) {
        using Pass = Taps<GRADIENT>;
        const ConvShape& d = a.shape;
        const int from_height = Pass::from_height(d), from_width = Pass::from_width(d);
        // Always the same eight columns of an entry.
        const int x_chunk = thread % X_CHUNKS, x_line = thread / X_CHUNKS;
        const auto [h0, w0, n0] = copied_column<GRADIENT>(d, pixels, first_column + x_chunk * CHUNK);
        const bf16* const from = a.from + n0;
        const int64_t origin = (int64_t(h0) * from_width + w0) * d.n;
        const int w_chunk = thread % LINE, w_line = thread / LINE;
        // The entries of the stage that comes next, read a stage ahead.
        Entry next[X_LOADS];
        const auto read_entries = [&](int step) {
            if (step == steps) return;
            UNROLL for (int i = 0; i < X_LOADS; ++i) next[i] = entry_of(a, begin + step * BOX + x_line + i * X_APART);
        };
        read_entries(0);
        copy_stages<Tile, X_LOADS + W_LOADS>(shared, thread, steps, [&](auto& copies, typename Tile::Stage& stage, int step) {
            UNROLL for (int i = 0; i < X_LOADS; ++i) {
                const int h = h0 + next[i].rows, w = w0 + next[i].columns;
                const bool there = uint32_t(h) < uint32_t(from_height) && uint32_t(w) < uint32_t(from_width);
                bf16* box = stage.right + x_chunk / LINE * BOX * BOX;
                copies.copy(box + place_in_box(x_line + i * X_APART, x_chunk % LINE),
                            there ? from + (origin + next[i].offset) : a.from, there);
            }
            const bf16* own = a.left_tiles + (int64_t(begin) + step * BOX) * BOX;
            UNROLL for (int i = 0; i < W_LOADS; ++i) {
                const int row = w_line + i * W_APART;
                copies.copy(stage.left + place_in_box(row, w_chunk), own + (row * BOX + w_chunk * CHUNK), true);
            }
            read_entries(step + 1);
        });
    }
};

// The weight gradient: a block has a group's rows and two boxes of its entries, over a range of boxes of samples.
struct GroupGradient {
    static constexpr int BOXES = 2;
    using Tile = BoxTile<BOX, BOXES * BOX, DEEP, false, false>;
    using Shared = Tile::Shared;
    static constexpr int APART = COPYING / LINE, LOADS = BOX / APART;  // lines between a thread's copies; copies of a box

    DEVICE static void run(const ConvSparseGradientArgs& a, Shared& shared, int thread, int number, int split) {
        const ConvShape& d = a.shape;
        const uint32_t* own = a.chunks + int64_t(number) * 4;
        const uint32_t group = own[0], begin = own[2], end = own[3];
        const int stages = d.p * d.q * (d.n / BOX), first = int(int64_t(stages) * split / a.splits);
        const int steps = int(int64_t(stages) * (split + 1) / a.splits) - first;
        const int warp = thread / 32, lane = thread % 32;
        SumTile sum[Tile::RIGHTS];
        clear(sum);
        Tile::begin(shared, thread, COPYING / 32);
        if (warp >= WARPS)
            copy(a, shared, thread - THREADS, group, begin, end, first, steps);
        else
            Tile::multiply(shared, thread, steps, sum, [](const auto&) {});
        __syncthreads();  // where the copying warps return before it, ptxas puts other code between the products
        const uint32_t box = begin + Tile::column(warp);
        if (warp >= WARPS || box >= end) return;
        float* partial = a.partial + (int64_t(split) * a.entries + box) * BOX;
        UNROLL for (int j = 0; j < Tile::RIGHTS; ++j)
            UNROLL for (int e = 0; e < 4; ++e)
                partial[(Tile::row(warp) + lane / 4 + e / 2 * 8) * BOX + j * 8 + lane % 4 * 2 + e % 2] = sum[j].value[e];
    }

    DEVICE static void copy(const ConvSparseGradientArgs& a, Shared& shared, int thread, uint32_t group, uint32_t begin,
                            uint32_t end, int first, int steps) {
        const ConvShape& d = a.shape;
        // Always the same rows and entries, and eight samples of a box that moves on.
        const int line = thread / LINE, chunk = thread % LINE, per_pixel = d.n / BOX;
        const int64_t columns = int64_t(d.p) * d.q * d.n;
        int n = first % per_pixel * BOX, q = first / per_pixel % d.q, p = first / per_pixel / d.q;
        uint32_t row[LOADS];
        UNROLL for (int i = 0; i < LOADS; ++i) row[i] = a.rows[int64_t(group) * BOX + line + i * APART];
        Entry entry[BOXES * LOADS];
        UNROLL for (int i = 0; i < BOXES * LOADS; ++i) {
            const uint32_t at = begin + line + i * APART;
            entry[i] = at < end ? entry_of(a, at) : no_entry();
        }
        copy_stages<Tile, (1 + BOXES) * LOADS>(shared, thread, steps, [&](auto& copies, Tile::Stage& stage, int) {
            const bf16* dy = a.dy + (int64_t(p) * d.q + q) * d.n + n + chunk * CHUNK;
            UNROLL for (int i = 0; i < LOADS; ++i)
                copies.copy(stage.left + place_in_box(line + i * APART, chunk), row[i] == NONE ? a.dy : dy + row[i] * columns,
                            row[i] != NONE);
            const int h0 = p * d.stride - d.pad, w0 = q * d.stride - d.pad;
            const bf16* from = a.x + ((int64_t(h0) * d.w + w0) * d.n + n + chunk * CHUNK);
            UNROLL for (int i = 0; i < BOXES * LOADS; ++i) {
                const int h = h0 + entry[i].rows, w = w0 + entry[i].columns;
                const bool there = uint32_t(h) < uint32_t(d.h) && uint32_t(w) < uint32_t(d.w);
                bf16* box = stage.right + i / LOADS * BOX * BOX;
                copies.copy(box + place_in_box(line + i % LOADS * APART, chunk), there ? from + entry[i].offset : a.x, there);
            }
            n += BOX;
            if (n == d.n) n = 0, ++q;
            if (q == d.q) q = 0, ++p;
        });
    }
};

// ---------------------------------------------------------------------------------------------------------- kernels

#define RUN(Product)                                                              \
    if constexpr (HOPPER) {                                                       \
        SHARED(Product::Shared, shared);                                          \
        Product::run(a, shared, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z); \
    } else {                                                                      \
        not_hopper();                                                             \
    }

// Grid of the products: column tiles, groups, classes of pixels. Named by rows x columns.

using Forward128 = GroupProduct<false, 128>;
using Forward256 = GroupProduct<false, 256>;
using Backward128 = GroupProduct<true, 128>;
using Backward256 = GroupProduct<true, 256>;

KERNEL(conv_groups_forward_wgmma_64x128_bf16, ConvSparseArgs, Forward128::Shared, BLOCK_THREADS, 2) { RUN(Forward128); }
KERNEL(conv_groups_forward_wgmma_64x256_bf16, ConvSparseArgs, Forward256::Shared, BLOCK_THREADS, 1) { RUN(Forward256); }
KERNEL(conv_groups_input_gradient_wgmma_64x128_bf16, ConvSparseArgs, Backward128::Shared, BLOCK_THREADS, 2) { RUN(Backward128); }
KERNEL(conv_groups_input_gradient_wgmma_64x256_bf16, ConvSparseArgs, Backward256::Shared, BLOCK_THREADS, 1) { RUN(Backward256); }

// Grid: chunks, splits.
KERNEL(conv_groups_weight_gradient_wgmma_64x128_bf16, ConvSparseGradientArgs, GroupGradient::Shared, BLOCK_THREADS, 2) {
    if constexpr (HOPPER) {
        SHARED(GroupGradient::Shared, shared);
        GroupGradient::run(a, shared, threadIdx.x, blockIdx.x, blockIdx.y);
    } else {
        not_hopper();
    }
}
