// norm_pool.cu - batch norm, relu, and the max pool that alone reads their result, in one pass, forward and backward: what a
// residual network for large images begins with.
//
//   z = [relu](gamma xhat + beta),  xhat = (x - mean) invstd;   y[c,p,q,n] = max of z over a window
//   dz[c,h,w,n] = sum of dy[c,p,q,n] over the windows (p,q) whose maximum is at (h,w), with relu where z > 0
//   dx = gamma invstd (dz - dbeta / M - xhat dgamma / M),  dbeta = sum of dz,  dgamma = sum of dz xhat
//
// x and dx: [C, H, W, N], y and dy: [C, P, Q, N], Real; index: u8 [C, P, Q, N], as in pool.cu; the rest: [C], f32. M, padded samples
// and the order of sums are those of norm.cu, and z and its gradient are rounded as they would be stored: all bits are those of
// norm.cu and pool.cu one after the other. The statistics are there: those of x by norm_statistics or by the epilogue that made it,
// and norm_join. With a map, y has more rows than x, of which those that no row of x is written to are zero.
//
// Limit: bytes. What is left out is z, written and read again, and its gradient, written and twice read; for that each window
// normalises its pixels again, and both kernels of the backward pass look at the windows of each pixel.
#include "kernels/norm_chunks.cuh"
#include "kernels/pool.cuh"

struct NormPoolForwardArgs {
    NormalisedArgs norm;
    uint8_t* index;
    Real* y;
    const uint32_t* count;   // number of true samples
    const uint32_t* source;  // the row of x that each row of y has, or 2^32 - 1 for none; null where they are one
    PoolShape shape;
    int32_t relu;
};

struct NormPoolBackwardArgs {
    NormalisedArgs norm;
    const Real* dy;
    const uint8_t* index;
    GradientSums* partial;  // [C, splits]: of the chunks
    float* dgamma;
    float* dbeta;
    Real* dx;
    const uint32_t* count;
    const uint32_t* target;  // the row of y that each row of x has
    NormShape shape;
    PoolShape pool;
    int32_t relu;
};

// dz of a feature's pixels.
template <int L>
struct Unpooled {
    const NormPoolBackwardArgs& a;
    int64_t begin;  // of the feature's row of x
    const Real* dy;
    const uint8_t* index;

    DEVICE Unpooled(const NormPoolBackwardArgs& a, int feature) : a(a), begin(int64_t(feature) * a.shape.pixels * a.shape.n) {
        const int64_t row = a.target ? a.target[feature] : feature, place = row * a.pool.p * a.pool.q * a.pool.n;
        dy = a.dy + place, index = a.index + place;
    }
    // Of the vector of x at place i, which lies `off` from the mean.
    DEVICE Samples<L> at(int64_t i, const Samples<L>& off, const Normaliser& norm) const {
        const int place = int(i - begin);
        const Samples<L> dz =
            as_stored<L>(pooled_gradient<L>(a.pool, dy, index, place / a.shape.n, place % a.shape.n));
        return a.relu ? through_relu<L>(dz, norm.apply<L>(off)) : dz;
    }
};

template <int L>
DEVICE void backward_sums(const NormPoolBackwardArgs& a, WarpSums& shared, dim3 block, uint32_t thread, uint32_t threads) {
    const NormShape& d = a.shape;
    const Normaliser norm(a.norm, block.y);
    const Unpooled<L> dz(a, block.y);
    sum_gradient<L>(d, shared, block, thread, threads, samples(d, a.count), a.norm.x, norm, a.partial,
                    [&](int64_t i, int, const Samples<L>& off) { return dz.at(i, off, norm); });
}

template <int L>
DEVICE void backward(const NormPoolBackwardArgs& a, WarpSums& shared, dim3 block, uint32_t thread, uint32_t threads) {
    const NormShape& d = a.shape;
    const int feature = block.y, count = samples(d, a.count);
    const GradientSums sums = join(a.partial + int64_t(feature) * d.splits, d.splits, shared.scratch, thread, threads);
    const Normaliser norm(a.norm, feature);
    const Unpooled<L> dz(a, feature);
    const float items = float(max64(1, int64_t(d.pixels) * count));
    const float mean_dz = sums.dz / items, slope = sums.dz_xhat / items * norm.invstd;  // xhat dgamma / M = (x - mean) slope
    each_vector<L>(d, block, thread, threads, count, [&](int64_t i, int live, int) {
        const Samples<L> off = load<L>(a.norm.x + i) - norm.mean;
        store<L>(a.dx + i, first_lanes<L>((dz.at(i, off, norm) - mean_dz - off * slope) * norm.scale, live));
    });
    if (block.x == 0 && thread == 0) a.dgamma[feature] = sums.dz_xhat, a.dbeta[feature] = sums.dz;
}

// Grid: vectors of a row of y, rows of y.
BARRIER_FREE_KERNEL(REAL(norm_pool_forward), NormPoolForwardArgs, THREADS, 0, 4) {
    constexpr int L = ROW_LANES;
    const PoolShape& d = a.shape;
    const int feature = a.source ? int(a.source[blockIdx.y]) : int(blockIdx.y);
    const Normaliser norm = feature < 0 ? Normaliser() : Normaliser(a.norm, feature);
    const Real* x = a.norm.x + int64_t(feature) * d.h * d.w * d.n;
    const int64_t base = int64_t(blockIdx.y) * d.p * d.q * d.n;
    const int vectors = d.n / L, count = int(min64(*a.count, d.n));
    const Samples<L> zero = splat<L>(0.0f);
    EACH(i, int64_t(d.p) * d.q * vectors) {
        const int n = int(i) % vectors * L;
        const auto z = [&](int pixel) {
            if (feature < 0) return zero;
            const Samples<L> z = as_stored<L>(norm.apply<L>(load<L>(x + pixel * d.n + n) - norm.mean));
            return first_lanes<L>(a.relu ? where_at_most<L>(z, zero, zero, z) : z, count - n);
        };
        Index<L> index;
        store<L>(a.y + base + i * L, pool<L>(d, int(i) / vectors, index, z));
        *reinterpret_cast<Index<L>*>(a.index + base + i * L) = index;
    }
}

// Grid of both: splits, features of x.
KERNEL(REAL(norm_pool_backward_sums), NormPoolBackwardArgs, WarpSums, THREADS, 3, 2) {
    SHARED(WarpSums, shared);
    WITH_LANES(backward_sums, a, shared, blockIdx, threadIdx.x, blockDim.x);
}

KERNEL(REAL(norm_pool_backward), NormPoolBackwardArgs, WarpSums, THREADS, 4) {
    SHARED(WarpSums, shared);
    WITH_LANES(backward, a, shared, blockIdx, threadIdx.x, blockDim.x);
}
