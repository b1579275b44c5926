// norm.cu - batch norm over feature rows, with residual and relu in the same pass, forward and backward.
//
//   xhat = (x - mean) invstd,  invstd = 1 / sqrt(var + epsilon);   y = [relu](gamma xhat + beta [+ residual])
//   dz = dy, with relu where y > 0;   dresidual = dz;   dbeta = sum of dz;   dgamma = sum of dz xhat
//   dx = gamma invstd (dz - dbeta / M - xhat dgamma / M) in training; gamma invstd dz where the statistics are given
//
// x, y, residual and their gradients: [C, HW, N], Real; gamma, beta, statistics: [C], f32. M = HW * count true values of a
// row; padded samples are no part of any sum and are written as zeros. With a map, y and residual have more rows than x:
// those that no row of x is added to are the residual, or zero.
//
// A row is cut into chunks of whole pixels, a function of the shape alone; block (split, feature) owns one. A first
// kernel sums each chunk, a second adds the chunks' sums in their order (every block its feature's, at most 64) and
// writes its chunk. The variance is that of deviations from the chunk's own mean, joined by Chan's formula: nothing is
// lost where the mean is large. Statistics are those of x as stored. Sums are f32, in an order that depends on the shape
// and the threads of a block. Where tensor cores make x, their epilogue sums its tiles (conv_mma.cuh), norm_join.cu joins
// them, and norm_eval normalises with what came of it. Where they make dy, their epilogue writes dz instead and sums that, and
// norm_backward has no other kernel before it.
//
// Limit: bytes. Training reads x twice (and once more from cache), or once where its statistics are given, and writes y;
// backward reads x and dy twice, and y too where a residual was added; where a residual has a gradient, the first
// kernel writes that, dz, over dy, and the second reads it instead; where dz was summed before, it reads x and dz once.
#include "kernels/norm_chunks.cuh"

struct NormStatisticsArgs {
    const Real* x;
    Moments* partial;       // [C, splits]: of the chunks
    const uint32_t* count;  // number of true samples
    NormShape shape;
};

struct NormForwardArgs {
    const Real* x;
    const Real* residual;  // or null
    const float* gamma;
    const float* beta;
    float* running_mean;
    float* running_var;
    float* mean;             // what normalised, for the backward pass
    float* invstd;
    const Moments* partial;  // of the chunks
    Real* y;
    const uint32_t* count;
    const uint32_t* source;  // the row of x that is added to each row of y, or 2^32 - 1 for none; null where they are one
    NormShape shape;
    int32_t relu;
    float epsilon;
    float momentum;
};

struct NormEvalArgs {
    const Real* x;
    const Real* residual;  // or null
    const float* gamma;
    const float* beta;
    const float* mean;
    const float* var;
    const float* invstd;  // 1 / sqrt(var + epsilon); where it is null, var says so
    Real* y;
    const uint32_t* count;
    const uint32_t* source;
    NormShape shape;
    int32_t relu;
    float epsilon;
};

struct NormBackwardArgs {
    NormalisedArgs norm;
    const Real* y;  // read with relu only; null where nothing was added before it: then x says where y is above 0
    const Real* dy;
    Real* dz;       // where dy is, if dz shall replace it: rows of x once they are summed; or null
    GradientSums* partial;  // [C, splits]: of the chunks; null where dz, dgamma and dbeta are there
    float* dgamma;
    float* dbeta;
    Real* dx;
    const uint32_t* count;
    const uint32_t* source;
    const uint32_t* target;  // the row of y that each row of x is added to
    NormShape shape;
    int32_t relu;
    int32_t training;
};

// The row of x that belongs to a row of y; negative for none.
DEVICE int row_of_x(const uint32_t* source, int row) { return source ? int(source[row]) : row; }

// How far a row's elements lie behind those of another.
DEVICE int64_t behind(const NormShape& d, int row, int other) { return (int64_t(row) - other) * d.pixels * d.n; }

// y of a chunk; of the residual alone where x is null.
template <int L>
DEVICE void normalise(const NormShape& d, dim3 block, uint32_t thread, uint32_t threads, int count, const Real* x,
                      const Real* residual, bool relu, const Normaliser& norm, Real* y) {
    const Samples<L> zero = splat<L>(0.0f);
    each_vector<L>(d, block, thread, threads, count, [&](int64_t i, int live, int) {
        Samples<L> z = x ? norm.apply<L>(load<L>(x + i) - norm.mean) : zero;
        if (residual) z += load<L>(residual + i);
        if (relu) z = where_at_most<L>(z, zero, zero, z);
        store<L>(y + i, first_lanes<L>(z, live));
    });
}

// dz of a vector of y, whose x lies `off` from the mean. Where y is above 0 is computed again as the forward pass did,
// which is cheaper than reading it.
template <int L>
DEVICE Samples<L> above(const NormBackwardArgs& a, int64_t i, const Samples<L>& off, const Normaliser& norm) {
    const Samples<L> dy = load<L>(a.dy + i);
    return a.relu ? through_relu<L>(dy, a.y ? load<L>(a.y + i) : norm.apply<L>(off)) : dy;
}

template <int L>
DEVICE void statistics(const NormStatisticsArgs& a, WarpSums& shared, dim3 block, uint32_t thread, uint32_t threads) {
    const NormShape& d = a.shape;
    const Real* x = a.x;
    const int count = samples(d, a.count);
    const float items = float(max64(1, int64_t(pixels_of(d, block.x)) * count));
    Sum<L> sum;  // padded samples are zero: they need no mask here
    each_vector<L>(d, block, thread, threads, count,
                   [&](int64_t i, int, int chain) { sum.chain[chain] += load<L>(x + i); });
    const float mean = sum.over_block(shared, thread, threads) / items;
    Sum<L> deviation, square;
    each_vector<L>(d, block, thread, threads, count, [&](int64_t i, int live, int chain) {
        const Samples<L> off = first_lanes<L>(load<L>(x + i) - mean, live);
        deviation.chain[chain] += off;
        square.chain[chain] += off * off;
    });
    const float left = deviation.over_block(shared, thread, threads), squares = square.over_block(shared, thread, threads);
    const Moments chunk = corrected(mean, left, squares, items);
    if (thread == 0) a.partial[int64_t(block.y) * d.splits + block.x] = chunk;
}

template <int L>
DEVICE void forward(const NormForwardArgs& a, WarpSums& shared, dim3 block, uint32_t thread, uint32_t threads) {
    const NormShape& d = a.shape;
    const int feature = row_of_x(a.source, block.y), count = samples(d, a.count);
    if (feature < 0) {
        normalise<L>(d, block, thread, threads, count, nullptr, a.residual, a.relu, Normaliser(), a.y);
        return;
    }
    const float items = float(max64(1, int64_t(d.pixels) * count));
    const Moments* partial = a.partial + int64_t(feature) * d.splits;
    const auto items_of = [&](int split) { return float(pixels_of(d, split)) * count; };
    const Moments row = join(partial, d.splits, items, items_of, shared.scratch, thread, threads);
    const float invstd = 1.0f / sqrtf(row.squares / items + a.epsilon);
    const Normaliser norm(row.mean, invstd, a.gamma[feature], a.beta[feature]);
    normalise<L>(d, block, thread, threads, count, a.x + behind(d, feature, block.y), a.residual, a.relu, norm, a.y);
    if (block.x == 0 && thread == 0) keep(a, feature, count, items, row, invstd);
}

template <int L>
DEVICE void evaluate(const NormEvalArgs& a, dim3 block, uint32_t thread, uint32_t threads) {
    const NormShape& d = a.shape;
    const int feature = row_of_x(a.source, block.y), count = samples(d, a.count);
    if (feature < 0) {
        normalise<L>(d, block, thread, threads, count, nullptr, a.residual, a.relu, Normaliser(), a.y);
        return;
    }
    const float invstd = a.invstd ? a.invstd[feature] : 1.0f / sqrtf(a.var[feature] + a.epsilon);
    const Normaliser norm(a.mean[feature], invstd, a.gamma[feature], a.beta[feature]);
    normalise<L>(d, block, thread, threads, count, a.x + behind(d, feature, block.y), a.residual, a.relu, norm, a.y);
}

template <int L>
DEVICE void backward_sums(const NormBackwardArgs& a, WarpSums& shared, dim3 block, uint32_t thread, uint32_t threads) {
    const NormShape& d = a.shape;
    const Normaliser norm(a.norm, block.y);
    const int64_t to_y = a.target ? behind(d, int(a.target[block.y]), block.y) : 0;
    sum_gradient<L>(d, shared, block, thread, threads, samples(d, a.count), a.norm.x, norm, a.partial,
                    [&](int64_t i, int live, const Samples<L>& off) {
                        const Samples<L> dz = above<L>(a, i + to_y, off, norm);
                        if (a.dz) store<L>(a.dz + i + to_y, first_lanes<L>(dz, live));
                        return dz;
                    });
}

template <int L>
DEVICE void backward(const NormBackwardArgs& a, WarpSums& shared, dim3 block, uint32_t thread, uint32_t threads) {
    const NormShape& d = a.shape;
    const int feature = row_of_x(a.source, block.y), count = samples(d, a.count);
    if (feature < 0) {
        if (!a.dz || !a.partial) return;
        each_vector<L>(d, block, thread, threads, count, [&](int64_t i, int live, int) {
            store<L>(a.dz + i, first_lanes<L>(above<L>(a, i, splat<L>(0.0f), Normaliser()), live));
        });
        return;
    }
    GradientSums sums;
    if (a.partial)
        sums = join(a.partial + int64_t(feature) * d.splits, d.splits, shared.scratch, thread, threads);
    else
        sums = {a.dbeta[feature], a.dgamma[feature]};
    const Normaliser norm(a.norm, feature);
    const float items = float(max64(1, int64_t(d.pixels) * count));
    const float mean_dz = a.training ? sums.dz / items : 0.0f;
    const float slope = a.training ? sums.dz_xhat / items * norm.invstd : 0.0f;  // xhat dgamma / M = (x - mean) slope
    const int64_t to_x = behind(d, feature, block.y);
    each_vector<L>(d, block, thread, threads, count, [&](int64_t i, int live, int) {
        const Samples<L> off = load<L>(a.norm.x + i + to_x) - norm.mean;
        const Samples<L> dz = a.dz ? load<L>(a.dz + i) : above<L>(a, i, off, norm);
        const Samples<L> dx = (dz - mean_dz - off * slope) * norm.scale;
        store<L>(a.dx + i + to_x, first_lanes<L>(dx, live));
    });
    if (a.partial && block.x == 0 && thread == 0) {
        a.dgamma[feature] = sums.dz_xhat;
        a.dbeta[feature] = sums.dz;
    }
}

// Grid of all: splits, and rows: of x for the sums, of y for the others.
KERNEL(REAL(norm_statistics), NormStatisticsArgs, WarpSums, THREADS) {
    SHARED(WarpSums, shared);
    WITH_LANES(statistics, a, shared, blockIdx, threadIdx.x, blockDim.x);
}

KERNEL(REAL(norm_forward), NormForwardArgs, WarpSums, THREADS) {
    SHARED(WarpSums, shared);
    WITH_LANES(forward, a, shared, blockIdx, threadIdx.x, blockDim.x);
}

KERNEL(REAL(norm_backward_sums), NormBackwardArgs, WarpSums, THREADS, 3) {
    SHARED(WarpSums, shared);
    WITH_LANES(backward_sums, a, shared, blockIdx, threadIdx.x, blockDim.x);
}

KERNEL(REAL(norm_backward), NormBackwardArgs, WarpSums, THREADS, 6, 5) {
    SHARED(WarpSums, shared);
    WITH_LANES(backward, a, shared, blockIdx, threadIdx.x, blockDim.x);
}

BARRIER_FREE_KERNEL(REAL(norm_eval), NormEvalArgs, THREADS) { WITH_LANES(evaluate, a, blockIdx, threadIdx.x, blockDim.x); }
