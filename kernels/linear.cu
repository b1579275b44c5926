// linear.cu - Y = W X on the host for layers that see one pixel: linear layers and 1x1 convolutions of stride 1, f32.
//
//   forward:         y[k,n]  = bias[k] + sum over c of w[k,c] x[c,n]
//   input gradient:  dx[c,n] = sum over k of w[k,c] dy[k,n]
//   weight gradient: dw[k,c] = sum over n of dy[k,n] x[c,n]
//
// x: [C, N], w: [K, C], y: [K, N], where N counts all columns: samples, pixels of samples, tokens of samples. A GPU takes
// the staged tilings of conv.cu, whose formulas these are; its direct ones would read every row of x from another page.
//
// All three are the product of linear.cuh; the weight gradient's b is x transposed. Limit: multiply-adds.
#define DILT_NO_ARRAYS
#include "kernels/linear.cuh"

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

// What a block owns beside its columns; the same for every instruction set, since src/ops/linear.rs cuts the grid by it.
constexpr int ROW_GROUP = 256;
constexpr int DEPTH = 192;

// Grid: groups of columns, groups of rows.
BARRIER_FREE_KERNEL(linear_product_direct_f32, LinearArgs, 1) {
    LOCAL(Packed<DEPTH>, packed);
    const int column = blockIdx.x * GROUP, columns = int(min64(GROUP, a.n - column));
    const int row = blockIdx.y * ROW_GROUP, rows = int(min64(ROW_GROUP, a.rows - row));
    uint32_t live[PANELS][VECTORS] = {};
    if (a.bias)
        for (int j = 0; j < GROUP; j += LANES)
            live[j / PANEL][j % PANEL / LANES] = live_columns<LANES>(a.columns, int(*a.count), column + j);
    for (int base = 0; base < a.depth; base += DEPTH) {
        const int depth = int(min64(DEPTH, a.depth - base));
        packed.copy(a.from + int64_t(base) * a.n + column, a.n, depth, columns);
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
    LOCAL(Packed<DEPTH>, packed);
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
