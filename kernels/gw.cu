// gw.cu - the couplings of gw.cuh on a GPU, and for both devices how they begin and how they are rounded.
//
// Products: a block owns 128 x 128 of T C2 or C1 (T C2), tiles of the operands pass through shared memory, two at a time.
// Scaling: a block does all iterations of a coupling. A warp takes every so many rows; a row is read once an iteration,
// for its own sum and, scaled, for those of the columns, which lie in registers and meet in shared memory in fixed order.
// Up to 256 rows and columns the matrix stays on the chip, half of it in registers, half in shared memory; beyond that
// it is read from the second-level cache. Limit: multiply-adds of the products; in the iterations, reads of the matrix
// and, where it is small, the two barriers. Not measured on a GPU.
#define DILT_NO_ARRAYS
#include "kernels/gw.cuh"

constexpr int THREADS = 256;

// --------------------------------------------------------------------------------------------------------- products

constexpr int TILE = 128;  // as in src/ops/gw.rs
constexpr int DEPTH = 8;

struct ProductStage {
    float left[2][DEPTH][TILE + 4];  // 4 more: the transposing store meets fewer banks twice
    float right[2][DEPTH][TILE];
    double scratch[32];
};

template <Product P>
DEVICE void product(const GwArgs& a, ProductStage& stage, int thread, int column_tile, int row_tile, uint32_t block,
                    int side) {
    const Coupling c(a, block);
    const int row0 = row_tile * TILE, column0 = column_tile * TILE;
    if (a.done[c.number] != 0 || row0 >= c.n1 || column0 >= c.pitch2) return;
    const Operands<P> of(a, c);

    // What this thread copies: four steps of a row of the left operand, four columns of a step of the right one.
    const int left_row = thread / 2, left_step = thread % 2 * 4, right_step = thread / 32, right_column = thread % 32 * 4;
    const float* left = of.left + int64_t(row0 + left_row) * of.left_pitch + left_step;
    const float* right = of.right + int64_t(right_step) * c.pitch2 + column0 + right_column;
    // Steps beyond the last are zeros of the left operand's padding.
    int left_steps = row0 + left_row < c.n1 ? of.left_pitch - left_step : 0;
    int right_steps = column0 + right_column < c.pitch2 ? of.depth - right_step : 0;
    const int right_apart = DEPTH * c.pitch2;
    Samples<4> next_left, next_right;
    const auto fetch = [&]() {
        next_left = left_steps > 0 ? load<4>(left) : splat<4>(0.0f);
        next_right = right_steps > 0 ? load<4>(right) : splat<4>(0.0f);
        left += DEPTH, right += right_apart, left_steps -= DEPTH, right_steps -= DEPTH;
    };
    const auto put = [&](int half) {
        UNROLL for (int i = 0; i < 4; ++i) stage.left[half][left_step + i][left_row] = next_left[i];
        store<4>(&stage.right[half][right_step][right_column], next_right);
    };

    // A thread's rows and columns: fours, 64 apart; a warp has 4 x 8 threads.
    const int warp = thread / 32, lane = thread % 32;
    const int row = (warp / 2 * 4 + lane / 8) * 4, column = (warp % 2 * 8 + lane % 8) * 4;
    Samples<4> sum[8][2];
    UNROLL for (int i = 0; i < 8; ++i) sum[i][0] = sum[i][1] = splat<4>(0.0f);
    fetch();
    put(0);
    __syncthreads();
    for (int ahead = of.depth - DEPTH, half = 0; ahead > -DEPTH; ahead -= DEPTH, half ^= 1) {
        if (ahead > 0) fetch();
        UNROLL for (int step = 0; step < DEPTH; ++step) {
            Samples<4> x[2], y[2];
            UNROLL for (int v = 0; v < 2; ++v) {
                x[v] = load<4>(&stage.left[half][step][row + v * 64]);
                y[v] = load<4>(&stage.right[half][step][column + v * 64]);
            }
            UNROLL for (int i = 0; i < 8; ++i)
                UNROLL for (int v = 0; v < 2; ++v) sum[i][v] += y[v] * x[i / 4][i % 4];
        }
        if (ahead > 0) put(half ^ 1);
        __syncthreads();
    }
    double partial = 0.0;
    const Coupling own(a, block);  // read again, not kept in registers
    UNROLL for (int v = 0; v < 2; ++v)
        UNROLL for (int i = 0; i < 8; ++i) {
            const int to_row = row0 + row + i / 4 * 64 + i % 4, to_column = column0 + column + v * 64;
            if (to_row < own.n1 && to_column < own.pitch2) partial += finish<P, 4>(a, own, to_row, to_column, sum[i][v]);
        }
    if (P == Product::RIGHT) return;
    partial = block_sum(partial, stage.scratch, thread, THREADS);
    if (thread == 0) a.partial[(int64_t(own.number) * side + row_tile) * side + column_tile] = partial;
}

// ---------------------------------------------------------------------------------------------------------- scaling

// A lane has fours of columns, 128 apart. HELD rows of each warp lie in registers, and as many in shared memory.
template <int GROUPS, int WARPS, int HELD>
struct Scaling {
    static constexpr int COLUMNS = GROUPS * 128;
    // Rows that a warp sums at a time: more do not fit the registers.
    static constexpr int BATCH = GROUPS < 16 && HELD == 0 ? 2 : 1;
    static constexpr int THREADS = WARPS * 32;
    struct Shared {
        float u[COLUMNS];
        float v[COLUMNS];
        float part[WARPS][COLUMNS];
        float worst[WARPS];
        uint32_t end;
        alignas(16) float rows[HELD == 0 ? 1 : WARPS * HELD][HELD == 0 ? 4 : COLUMNS];
    };
    using Row = Samples<4>[GROUPS];

    const GwArgs& a;
    const Coupling c;
    Shared& shared;
    const int thread, warp, lane;
    Row held[HELD == 0 ? 1 : HELD];

    DEVICE Scaling(const GwArgs& args, Shared& own, int index, uint32_t block)
        : a(args), c(args, block), shared(own), thread(index), warp(index / 32), lane(index % 32) {}

    DEVICE int column(int group) const { return group * 128 + lane * 4; }
    DEVICE float* log_row(int i) const { return a.logs + c.place + int64_t(i) * c.pitch2; }
    DEVICE float* plan_row(int i) const { return a.plans + c.place + int64_t(i) * c.pitch2; }

    DEVICE void read(const float* from, Row& row, float beyond) const {
        UNROLL for (int g = 0; g < GROUPS; ++g)
            row[g] = column(g) < c.pitch2 ? load<4>(from + column(g)) : splat<4>(beyond);
    }

    DEVICE static float warp_largest(float x) {
        UNROLL for (int offset = 16; offset > 0; offset /= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, offset));
        return x;
    }

    // Takes the largest element of each row, then of each column, off logs; the matrix to scale is exp of that.
    DEVICE void prepare() {
        Row most;
        UNROLL for (int g = 0; g < GROUPS; ++g) most[g] = splat<4>(NOTHING);
        for (int i = warp; i < c.n1; i += WARPS) {
            Row row;
            read(log_row(i), row, NOTHING);
            Samples<4> own = row[0];
            UNROLL for (int g = 1; g < GROUPS; ++g) own = larger<4>(own, row[g]);
            const float largest = warp_largest(lane_largest<4>(own));
            if (lane == 0) shared.u[i] = largest;
            UNROLL for (int g = 0; g < GROUPS; ++g) most[g] = larger<4>(most[g], row[g] - splat<4>(largest));
        }
        UNROLL for (int g = 0; g < GROUPS; ++g) store<4>(&shared.part[warp][column(g)], most[g]);
        __syncthreads();
        for (int j = thread; j < COLUMNS; j += THREADS) {
            float largest = NOTHING;
            for (int w = 0; w < WARPS; ++w) largest = larger(largest, shared.part[w][j]);
            shared.v[j] = j < c.n2 ? largest : 0.0f;
        }
        __syncthreads();
        UNROLL for (int k = 0; k < HELD; ++k) prepare_row(k, held[k]);
        for (int k = HELD; warp + k * WARPS < (HELD == 0 ? c.n1 : 2 * HELD * WARPS); ++k) {
            Row row;
            prepare_row(k, row);
            float* to = HELD == 0 ? plan_row(warp + k * WARPS)
                                  : shared.rows[HELD == 0 ? 0 : (k - HELD) * WARPS + warp];
            UNROLL for (int g = 0; g < GROUPS; ++g)
                if (HELD != 0 || column(g) < c.pitch2) store<4>(to + column(g), row[g]);
        }
        __syncthreads();
    }

    // Row k of this warp, of the matrix to scale; zeros beyond the last.
    DEVICE void prepare_row(int k, Row& row) {
        const int i = warp + k * WARPS;
        UNROLL for (int g = 0; g < GROUPS; ++g) {
            row[g] = splat<4>(0.0f);
            if (i >= c.n1 || column(g) >= c.pitch2) continue;
            float* log = log_row(i) + column(g);
            const Samples<4> taken = load<4>(log) - splat<4>(shared.u[i]) - load<4>(&shared.v[column(g)]);
            store<4>(log, taken);
            row[g] = exponential<4>(taken);
        }
    }

    // Rows k.. of this warp: makes their sums 1/n1, adds them to the columns' sums. Returns, to lane 0, the larger of `worst`
    // and the largest error of a sum before.
    DEVICE float scale_rows(int k, const Row (&rows)[BATCH], const Row& v, Row& sums, float worst) {
        float sum[BATCH];
        UNROLL for (int b = 0; b < BATCH; ++b) {
            Samples<4> own = rows[b][0] * v[0];
            UNROLL for (int g = 1; g < GROUPS; ++g) own += rows[b][g] * v[g];
            sum[b] = lane_sum<4>(own);
        }
        UNROLL for (int offset = 16; offset > 0; offset /= 2)
            UNROLL for (int b = 0; b < BATCH; ++b) sum[b] += __shfl_xor_sync(0xffffffffu, sum[b], offset);
        UNROLL for (int b = 0; b < BATCH; ++b) {
            const int i = warp + (k + b) * WARPS;
            const float u = i < c.n1 ? 1.0f / float(c.n1) / sum[b] : 0.0f;
            if (i < c.n1 && lane == 0) {
                worst = larger(worst, fabsf(shared.u[i] / u - 1.0f));
                shared.u[i] = u;
            }
            UNROLL for (int g = 0; g < GROUPS; ++g) sums[g] += rows[b][g] * u;
        }
        return worst;
    }

    // One iteration; returns the largest error of a row's sum before it.
    DEVICE float iterate() {
        Row v, sums;
        UNROLL for (int g = 0; g < GROUPS; ++g) {
            v[g] = load<4>(&shared.v[column(g)]);
            sums[g] = splat<4>(0.0f);
        }
        float worst = 0.0f;
        Row rows[BATCH];
        UNROLL for (int k = 0; k < HELD; k += BATCH) {
            UNROLL for (int b = 0; b < BATCH; ++b)
                UNROLL for (int g = 0; g < GROUPS; ++g) rows[b][g] = held[k + b][g];
            worst = scale_rows(k, rows, v, sums, worst);
        }
        // The same number of turns in all lanes of a warp.
        const int last = HELD == 0 ? int(ceil_div(c.n1 - warp, WARPS)) : 2 * HELD;
        for (int k = HELD; k < last; k += BATCH) {
            UNROLL for (int b = 0; b < BATCH; ++b) {
                const int i = warp + (k + b) * WARPS;
                if (HELD != 0) {
                    const float* from = shared.rows[HELD == 0 ? 0 : (k + b - HELD) * WARPS + warp];
                    UNROLL for (int g = 0; g < GROUPS; ++g) rows[b][g] = load<4>(from + column(g));
                } else if (i < c.n1) {
                    read(plan_row(i), rows[b], 0.0f);
                } else {
                    UNROLL for (int g = 0; g < GROUPS; ++g) rows[b][g] = splat<4>(0.0f);
                }
            }
            worst = scale_rows(k, rows, v, sums, worst);
        }
        UNROLL for (int g = 0; g < GROUPS; ++g) store<4>(&shared.part[warp][column(g)], sums[g]);
        if (lane == 0) shared.worst[warp] = worst;
        __syncthreads();
        for (int w = 0; w < WARPS; ++w) worst = larger(worst, shared.worst[w]);
        for (int j = thread; j < c.n2; j += THREADS) {
            float sum = shared.part[0][j];
            for (int w = 1; w < WARPS; ++w) sum += shared.part[w][j];
            shared.v[j] = 1.0f / float(c.n2) / sum;
        }
        __syncthreads();
        return worst;
    }

    DEVICE void run() {
        if (thread == 0) shared.end = a.done[c.number] != 0 || ends(a, c);
        __syncthreads();
        if (shared.end) return;
        prepare();
        for (int j = thread; j < COLUMNS; j += THREADS) shared.u[j] = 0.0f, shared.v[j] = 1.0f;
        __syncthreads();
        float worst = 1.0f;
        for (int iteration = 0; iteration < a.iterations && !(worst <= a.tolerance); ++iteration) worst = iterate();
        for (int j = thread; j < COLUMNS; j += THREADS) shared.v[j] = logf(shared.v[j]);
        __syncthreads();
        for (int i = warp; i < c.n1; i += WARPS) {
            const float log_u = logf(shared.u[i]);
            UNROLL for (int g = 0; g < GROUPS; ++g)
                if (column(g) < c.pitch2)
                    end_step<4>(log_row(i) + column(g), plan_row(i) + column(g), log_u, load<4>(&shared.v[column(g)]));
        }
    }
};

using ScalingHeld = Scaling<2, 16, 8>;
using Scaling512 = Scaling<4, 16, 0>;
using Scaling1024 = Scaling<8, 8, 0>;
using Scaling2048 = Scaling<16, 8, 0>;

// ---------------------------------------------------------------------------------------------- beginning and rounding

// Element i of a coupling's matrices.
DEVICE void begin(const GwArgs& a, const Coupling& c, int64_t i) {
    const int row = int(i / c.pitch2), column = int(i % c.pitch2);
    float* log = a.logs + c.place + i;
    const float one = 1.0f / float(c.n1), uniform = one / float(c.n2);
    float plan = 0.0f;
    if (c.start == START_PRODUCT) plan = uniform;
    if (c.start == START_MEAN) plan = 0.5f * (uniform + (row == column ? one : 0.0f));
    const bool costs = c.start > START_MEAN;
    *log = column >= c.n2 ? NOTHING : costs ? -a.scale * *log : logf(plan);
    a.plans[c.place + i] = column >= c.n2 ? 0.0f : plan;
}

struct RoundMemory {
    double scratch[32];
    float x[MOST], y[MOST];  // scales of rows and columns
    float e[MOST], f[MOST];  // what their sums lack
};

DEVICE double positive(double x) { return x > 0.0 ? x : 0.0; }

// Altschuler, Weed, Rigollet, NeurIPS 2017, algorithm 2: scales rows, then columns, whose sums are too large, and adds
// what lacks as a product. A block a coupling, a thread a row or column: it runs once, and needs few barriers.
DEVICE void round_plan(const Coupling& c, float* plan, RoundMemory& own, int thread, int threads) {
    const double p = 1.0 / c.n1, q = 1.0 / c.n2;
    for (int i = thread; i < c.n1; i += threads) {
        const float* row = plan + int64_t(i) * c.pitch2;
        double sum = 0.0;
        for (int j = 0; j < c.n2; ++j) sum += double(row[j]);
        own.x[i] = sum > p ? float(p / sum) : 1.0f;
    }
    __syncthreads();
    double lacking = 0.0;
    for (int j = thread; j < c.n2; j += threads) {
        double sum = 0.0;
        for (int i = 0; i < c.n1; ++i) sum += double(plan[int64_t(i) * c.pitch2 + j]) * double(own.x[i]);
        own.y[j] = sum > q ? float(q / sum) : 1.0f;
        own.f[j] = float(positive(q - sum * double(own.y[j])));
        lacking += double(own.f[j]);
    }
    lacking = block_sum(lacking, own.scratch, thread, threads);
    __syncthreads();
    for (int i = thread; i < c.n1; i += threads) {
        const float* row = plan + int64_t(i) * c.pitch2;
        double sum = 0.0;
        for (int j = 0; j < c.n2; ++j) sum += double(row[j]) * double(own.y[j]);
        own.e[i] = lacking > 0.0 ? float(positive(p - sum * double(own.x[i])) / lacking) : 0.0f;
    }
    __syncthreads();
    for (int64_t at = thread; at < int64_t(c.n1) * c.pitch2; at += threads) {
        const int i = int(at / c.pitch2), j = int(at % c.pitch2);
        if (j < c.n2) plan[at] = plan[at] * own.x[i] * own.y[j] + own.e[i] * own.f[j];
    }
}

// ---------------------------------------------------------------------------------------------------------- kernels

// Grid of products: tiles of columns, tiles of rows, couplings.
KERNEL(gw_right_product_f32, GwArgs, ProductStage, THREADS, 2) {
    SHARED(ProductStage, stage);
    product<Product::RIGHT>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x);
}

KERNEL(gw_step_product_f32, GwArgs, ProductStage, THREADS, 2) {
    SHARED(ProductStage, stage);
    product<Product::STEP>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x);
}

KERNEL(gw_value_product_f32, GwArgs, ProductStage, THREADS, 2) {
    SHARED(ProductStage, stage);
    product<Product::VALUE>(a, stage, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x);
}

// Grid: couplings, of at most so many rows and columns.
KERNEL(gw_scale_256_f32, GwArgs, ScalingHeld::Shared, ScalingHeld::THREADS) {
    SHARED(ScalingHeld::Shared, shared);
    ScalingHeld(a, shared, threadIdx.x, blockIdx.x).run();
}

KERNEL(gw_scale_512_f32, GwArgs, Scaling512::Shared, Scaling512::THREADS) {
    SHARED(Scaling512::Shared, shared);
    Scaling512(a, shared, threadIdx.x, blockIdx.x).run();
}

KERNEL(gw_scale_1024_f32, GwArgs, Scaling1024::Shared, Scaling1024::THREADS) {
    SHARED(Scaling1024::Shared, shared);
    Scaling1024(a, shared, threadIdx.x, blockIdx.x).run();
}

KERNEL(gw_scale_2048_f32, GwArgs, Scaling2048::Shared, Scaling2048::THREADS) {
    SHARED(Scaling2048::Shared, shared);
    Scaling2048(a, shared, threadIdx.x, blockIdx.x).run();
}

// Grid: parts of a matrix, couplings.
BARRIER_FREE_KERNEL(gw_begin_f32, GwArgs, THREADS) {
    const Coupling c(a, blockIdx.y);
    EACH(i, int64_t(c.n1) * c.pitch2) begin(a, c, i);
}

// Grid: couplings.
KERNEL(gw_round_f32, GwArgs, RoundMemory, THREADS) {
    SHARED(RoundMemory, own);
    const Coupling c(a, blockIdx.x);
    round_plan(c, a.plans + c.place, own, threadIdx.x, blockDim.x);
}
