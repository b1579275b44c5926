// gw_direct.cu - the couplings of gw.cuh on the host: a block owns 64 x 64 of a product, or all iterations of a coupling,
// whose matrix stays in the second-level cache. Limit: multiply-adds of the products; in the iterations, reads of the
// matrix, which passes once for both of its scalings.
#define DILT_NO_ARRAYS
#include "kernels/gw.cuh"
#include "kernels/linear.cuh"

static_assert(16 % LANES == 0, "rows of matrices are whole vectors");

constexpr int TILE = GROUP;  // rows of a product's block, as in src/ops/gw.rs; columns are GROUP
constexpr int DEPTH = 96;

struct ProductMemory {
    Packed<DEPTH> right;
    float sum[TILE][TILE];
};

template <Product P>
DEVICE void product(const GwArgs& a, int column_tile, int row_tile, uint32_t block, int side, ProductMemory& own) {
    const Coupling c(a, block);
    const int row = row_tile * TILE, column = column_tile * TILE;
    const int rows = int(min64(TILE, c.n1 - row)), columns = int(min64(TILE, c.pitch2 - column));
    if (a.done[c.number] != 0 || rows <= 0 || columns <= 0) return;
    const Operands<P> of(a, c);
    for (int base = 0; base < of.depth; base += DEPTH) {
        const int depth = int(min64(DEPTH, of.depth - base));
        own.right.copy(of.right + int64_t(base) * c.pitch2 + column, c.pitch2, depth, columns);
        const float* left = of.left + int64_t(row) * of.left_pitch + base;
        const Part part = {left, of.left_pitch, 1, depth, own.sum[0], TILE, TILE, nullptr, base > 0, false};
        multiply_part(part, rows, own.right, {});
    }
    double partial = 0.0;
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; j += LANES)
            partial += finish<P, LANES>(a, c, row + i, column + j, load<LANES>(&own.sum[i][j]));
    if (P != Product::RIGHT) a.partial[(int64_t(c.number) * side + row_tile) * side + column_tile] = partial;
}

// Rows that are read with the same part of v.
constexpr int ROWS_AT_ONCE = 8;

struct ScalingMemory {
    float u[MOST];
    float v[MOST];
    float sum[MOST];
};

// Takes the largest element of each row, then of each column, off logs; the matrix to scale is exp of that.
DEVICE void prepare(const Coupling& c, float* logs, float* plan, ScalingMemory& own) {
    for (int j = 0; j < c.pitch2; ++j) own.v[j] = NOTHING;
    for (int i = 0; i < c.n1; ++i) {
        const float* row = logs + int64_t(i) * c.pitch2;
        Samples<LANES> most = splat<LANES>(NOTHING);
        for (int j = 0; j < c.pitch2; j += LANES) most = larger<LANES>(most, load<LANES>(row + j));
        own.u[i] = lane_largest<LANES>(most);
        for (int j = 0; j < c.pitch2; j += LANES)
            store<LANES>(own.v + j, larger<LANES>(load<LANES>(own.v + j),
                                               load<LANES>(row + j) - splat<LANES>(own.u[i])));
    }
    for (int j = c.n2; j < c.pitch2; ++j) own.v[j] = 0.0f;
    for (int i = 0; i < c.n1; ++i)
        for (int j = 0; j < c.pitch2; j += LANES) {
            const int64_t at = int64_t(i) * c.pitch2 + j;
            const Samples<LANES> log =
                load<LANES>(logs + at) - splat<LANES>(own.u[i]) - load<LANES>(own.v + j);
            store<LANES>(logs + at, log);
            store<LANES>(plan + at, exponential<LANES>(log));
        }
}

// R rows from i on: makes their sums 1/n1, adds them to the columns' sums. Returns the largest error of a sum before.
template <int R>
DEVICE float scale_rows(const Coupling& c, const float* plan, int i, ScalingMemory& own) {
    const float* row = plan + int64_t(i) * c.pitch2;
    Samples<LANES> sum[R];
    UNROLL for (int r = 0; r < R; ++r) sum[r] = splat<LANES>(0.0f);
    for (int j = 0; j < c.pitch2; j += LANES) {
        const Samples<LANES> v = load<LANES>(own.v + j);
        UNROLL for (int r = 0; r < R; ++r) sum[r] += load<LANES>(row + r * c.pitch2 + j) * v;
    }
    float worst = 0.0f, u[R];
    UNROLL for (int r = 0; r < R; ++r) {
        u[r] = 1.0f / float(c.n1) / lane_sum<LANES>(sum[r]);
        worst = larger(worst, fabsf(own.u[i + r] / u[r] - 1.0f));
        own.u[i + r] = u[r];
    }
    for (int j = 0; j < c.pitch2; j += LANES) {
        Samples<LANES> total = load<LANES>(own.sum + j);
        UNROLL for (int r = 0; r < R; ++r) total += load<LANES>(row + r * c.pitch2 + j) * u[r];
        store<LANES>(own.sum + j, total);
    }
    return worst;
}

DEVICE void scale(const GwArgs& a, uint32_t block, ScalingMemory& own) {
    const Coupling c(a, block);
    if (a.done[c.number] != 0 || ends(a, c)) return;
    float* logs = a.logs + c.place;
    float* plan = a.plans + c.place;
    prepare(c, logs, plan, own);
    for (int i = 0; i < c.n1; ++i) own.u[i] = 0.0f;
    for (int j = 0; j < c.pitch2; ++j) own.v[j] = 1.0f;
    float worst = 1.0f;
    for (int iteration = 0; iteration < a.iterations && !(worst <= a.tolerance); ++iteration) {
        worst = 0.0f;
        for (int j = 0; j < c.pitch2; ++j) own.sum[j] = 0.0f;
        int i = 0;
        for (; i + ROWS_AT_ONCE <= c.n1; i += ROWS_AT_ONCE)
            worst = larger(worst, scale_rows<ROWS_AT_ONCE>(c, plan, i, own));
        for (; i < c.n1; ++i) worst = larger(worst, scale_rows<1>(c, plan, i, own));
        for (int j = 0; j < c.n2; ++j) own.v[j] = 1.0f / float(c.n2) / own.sum[j];
    }
    for (int i = 0; i < c.n1; ++i) own.u[i] = logf(own.u[i]);
    for (int j = 0; j < c.pitch2; ++j) own.v[j] = logf(own.v[j]);
    for (int i = 0; i < c.n1; ++i)
        for (int j = 0; j < c.pitch2; j += LANES) {
            const int64_t at = int64_t(i) * c.pitch2 + j;
            end_step<LANES>(logs + at, plan + at, own.u[i], load<LANES>(own.v + j));
        }
}

// Grid of products: tiles of columns, tiles of rows, couplings. Of the scaling: couplings.
BARRIER_FREE_KERNEL(gw_right_product_direct_f32, GwArgs, 1) {
    LOCAL(ProductMemory, own);
    product<Product::RIGHT>(a, blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x, own);
}

BARRIER_FREE_KERNEL(gw_step_product_direct_f32, GwArgs, 1) {
    LOCAL(ProductMemory, own);
    product<Product::STEP>(a, blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x, own);
}

BARRIER_FREE_KERNEL(gw_value_product_direct_f32, GwArgs, 1) {
    LOCAL(ProductMemory, own);
    product<Product::VALUE>(a, blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x, own);
}

BARRIER_FREE_KERNEL(gw_scale_direct_f32, GwArgs, 1) {
    LOCAL(ScalingMemory, own);
    scale(a, blockIdx.x, own);
}
