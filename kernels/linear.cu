// linear.cu - Y = W X on the host for layers that see one pixel: linear layers and 1x1 convolutions of stride 1, f32.
//
//   forward:         y[k,n]  = bias[k] + sum over c of w[k,c] x[c,n]
//   input gradient:  dx[c,n] = sum over k of w[k,c] dy[k,n]
//   weight gradient: dw[k,c] = sum over n of dy[k,n] x[c,n]
//
// x: [C, N], w: [K, C], y: [K, N], where N counts all columns: samples, pixels of samples, tokens of samples. A GPU takes
// the staged tilings of conv.cu, whose formulas these are; its direct ones would read every row of x from another page.
//
// All three are one product, to[i,j] = sum over t of a[i,t] b[t,j]: a block owns a group of rows i and GROUP columns j.
// It copies DEPTH steps t of b, for its columns, to memory of its own, packed in panels of one register tile's width,
// and multiplies them with all of its rows; sums that do not end there wait in `to`. The weight gradient's b is x
// transposed. Sums are f32 in an order that depends on the shape alone. Limit: multiply-adds.
#include "kernels/lib/device.cuh"

// Forward and input gradient.
struct LinearArgs {
    const float* w;
    const float* from;
    const float* bias;      // [rows], or null
    const uint32_t* count;  // number of true samples; read only where there is a bias
    float* to;
    int64_t row_stride;     // distance in w between rows of `to`
    int64_t step_stride;    // and between rows of `from`
    int32_t rows, depth;    // rows of `to` and of `from`
    int32_t n;              // columns
    int32_t accumulate;     // add to what `to` holds
    Columns columns;        // what n is made of; read only where there is a bias
};

struct LinearWeightGradientArgs {
    const float* x;
    const float* dy;
    float* partial;   // [splits, K, C]; dw itself if there is one split
    int32_t c, k, n;
    int32_t splits;   // ranges of columns, summed apart
};

// Register tiles of ROWS x PANEL, whose accumulators and a few loaded vectors fit the 32 (AVX-512) or 16 registers. 12 or
// 14 rows with AVX-512, and 6 with AVX2, gained nothing on the layers of ViT-Tiny; 128 steps lost up to a tenth.
constexpr int VECTORS = 2;
constexpr int PANEL = VECTORS * LANES;
constexpr int ROWS = LANES == 16 ? 8 : 4;
// What a block owns; the same for every instruction set, since src/ops/linear.rs cuts the grid by it.
constexpr int ROW_GROUP = 256;
constexpr int GROUP = 64;
constexpr int DEPTH = 192;
constexpr int PANELS = GROUP / PANEL;

// Steps of b for a block's columns. Columns past the end are zero.
struct alignas(64) Packed {
    float panel[PANELS][DEPTH][PANEL];
};

// What a block multiplies at a time: rows of `a`, and `depth` packed steps of its columns.
struct Part {
    const float* a;
    int64_t row_stride, step_stride;
    int depth;
    float* to;
    int64_t pitch;      // of `to`
    int columns;
    const float* bias;  // of the rows; null where it was added before, or is none
    bool adds;          // to what `to` holds
    bool masks;         // columns that are not live become zero
};

template <int R>
DEVICE void multiply(const Part& part, const float (&panel)[DEPTH][PANEL], const uint32_t (&live)[VECTORS], float* to,
                     int64_t pitch) {
    Samples<LANES> sum[R][VECTORS];
    UNROLL for (int i = 0; i < R; ++i)
        UNROLL for (int v = 0; v < VECTORS; ++v)
            sum[i][v] = part.adds ? load<LANES>(to + i * pitch + v * LANES)
                                  : splat<LANES>(part.bias ? part.bias[i] : 0.0f);
    const float* a = part.a;
    for (int step = 0; step < part.depth; ++step, a += part.step_stride) {
        Samples<LANES> b[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = load<LANES>(&panel[step][v * LANES]);
        UNROLL for (int i = 0; i < R; ++i)
            UNROLL for (int v = 0; v < VECTORS; ++v) sum[i][v] += b[v] * a[i * part.row_stride];
    }
    UNROLL for (int i = 0; i < R; ++i)
        UNROLL for (int v = 0; v < VECTORS; ++v)
            store<LANES>(to + i * pitch + v * LANES, part.masks ? kept<LANES>(sum[i][v], live[v]) : sum[i][v]);
}

// R rows. The panel at the edge of `to` is multiplied beside it.
template <int R>
DEVICE void multiply_rows(Part& part, int& rows, const Packed& packed, const uint32_t (&live)[PANELS][VECTORS]) {
    for (; rows >= R; rows -= R) {
        for (int panel = 0, first = 0; first < part.columns; ++panel, first += PANEL) {
            float* to = part.to + first;
            const int columns = part.columns - first;
            if (columns >= PANEL) {
                multiply<R>(part, packed.panel[panel], live[panel], to, part.pitch);
                continue;
            }
            float edge[R][PANEL] = {};
            for (int i = 0; i < R && part.adds; ++i)
                for (int j = 0; j < columns; ++j) edge[i][j] = to[i * part.pitch + j];
            multiply<R>(part, packed.panel[panel], live[panel], edge[0], PANEL);
            for (int i = 0; i < R; ++i)
                for (int j = 0; j < columns; ++j) to[i * part.pitch + j] = edge[i][j];
        }
        part.a += R * part.row_stride, part.to += R * part.pitch;
        if (part.bias) part.bias += R;
    }
}

DEVICE void multiply_part(Part part, int rows, const Packed& packed, const uint32_t (&live)[PANELS][VECTORS]) {
    multiply_rows<ROWS>(part, rows, packed, live);
    multiply_rows<2>(part, rows, packed, live);
    multiply_rows<1>(part, rows, packed, live);
}

// Grid: groups of columns, groups of rows.
BARRIER_FREE_KERNEL(linear_product_direct_f32, LinearArgs, 1) {
    LOCAL(Packed, packed);
    const int column = blockIdx.x * GROUP, columns = int(min64(GROUP, a.n - column));
    const int row = blockIdx.y * ROW_GROUP, rows = int(min64(ROW_GROUP, a.rows - row));
    uint32_t live[PANELS][VECTORS] = {};
    if (a.bias)
        for (int j = 0; j < GROUP; j += LANES)
            live[j / PANEL][j % PANEL / LANES] = live_columns<LANES>(a.columns, int(*a.count), column + j);
    for (int base = 0; base < a.depth; base += DEPTH) {
        const int depth = int(min64(DEPTH, a.depth - base));
        for (int step = 0; step < depth; ++step) {
            const float* from = a.from + int64_t(base + step) * a.n + column;
            UNROLL for (int j = 0; j < GROUP; j += ROW_LANES)
                store<ROW_LANES>(&packed.panel[j / PANEL][step][j % PANEL],
                                 j < columns ? load<ROW_LANES>(from + j) : splat<ROW_LANES>(0.0f));
        }
        const bool first = base == 0, last = base + depth == a.depth;
        const Part part = {a.w + row * a.row_stride + base * a.step_stride,
                           a.row_stride,
                           a.step_stride,
                           depth,
                           a.to + int64_t(row) * a.n + column,
                           a.n,
                           columns,
                           a.bias && first ? a.bias + row : nullptr,
                           a.accumulate || !first,
                           a.bias && last};
        multiply_part(part, rows, packed, live);
    }
}

// Grid: groups of c, groups of k, splits. The panels hold x transposed.
BARRIER_FREE_KERNEL(linear_weight_gradient_direct_f32, LinearWeightGradientArgs, 1) {
    LOCAL(Packed, packed);
    const int column = blockIdx.x * GROUP, columns = int(min64(GROUP, a.c - column));
    const int row = blockIdx.y * ROW_GROUP, rows = int(min64(ROW_GROUP, a.k - row));
    const int64_t vectors = a.n / ROW_LANES;
    const int begin = int(vectors * blockIdx.z / a.splits) * ROW_LANES;
    const int end = int(vectors * (blockIdx.z + 1) / a.splits) * ROW_LANES;
    float* to = a.partial + (int64_t(blockIdx.z) * a.k + row) * a.c + column;
    for (int base = begin; base < end; base += DEPTH) {
        const int depth = int(min64(DEPTH, end - base));
        for (int j = 0; j < columns; j += ROW_LANES) {
            const float* x = a.x + int64_t(column + j) * a.n + base;
            for (int step = 0; step < depth; step += ROW_LANES) {
                Samples<ROW_LANES> square[ROW_LANES];
                UNROLL for (int i = 0; i < ROW_LANES; ++i)
                    square[i] = j + i < columns ? load<ROW_LANES>(x + int64_t(i) * a.n + step) : splat<ROW_LANES>(0.0f);
                transpose<ROW_LANES>(square);
                UNROLL for (int i = 0; i < ROW_LANES; ++i)
                    store<ROW_LANES>(&packed.panel[j / PANEL][step + i][j % PANEL], square[i]);
            }
        }
        const Part part = {
            a.dy + int64_t(row) * a.n + base, a.n, 1, depth, to, a.c, columns, nullptr, base > begin, false};
        multiply_part(part, rows, packed, {});
    }
}
