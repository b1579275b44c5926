// norm_pair.cu - the sum of two batch norms, with relu in the same pass, forward and backward: what a block of a residual network
// ends in where its shortcut has a norm too.
//
//   y = [relu](z[0] + z[1]),  z[i] = gamma[i] xhat[i] + beta[i],  xhat[i] = (x[i] - mean[i]) invstd[i]
//   dz = dy, with relu where y > 0;   dbeta[i] = sum of dz;   dgamma[i] = sum of dz xhat[i]
//   dx[i] = gamma[i] invstd[i] (dz - dbeta[i] / M - xhat[i] dgamma[i] / M)
//
// x, y and their gradients: [C, HW, N], Real; the rest: [C], f32; M, padded samples and the order of sums as in norm.cu. The
// statistics are there: those of x[i] by norm_statistics or by the epilogue that made it, and norm_join.
//
// Limit: bytes. Forward reads both x and writes y, where two norms would also write and read what the first makes; backward reads
// them and dy twice, or once where the sums of dz are there, and writes both dx. It reads no y: both x say what that was.
#include "kernels/norm_chunks.cuh"

struct NormPairArgs {
    NormalisedArgs norms[2];
    Real* y;
    const uint32_t* count;  // number of true samples
    NormShape shape;
    int32_t relu;
};

struct NormPairBackwardArgs {
    NormalisedArgs norms[2];
    const Real* dy;
    GradientSums* partial;  // [2, C, splits]: of the chunks; null where dy is dz, and dgamma and dbeta are there
    float* dgamma[2];
    float* dbeta[2];
    Real* dx[2];
    const uint32_t* count;
    NormShape shape;
    int32_t relu;
};

// Of a feature, both norms.
struct Pair {
    Normaliser of[2];

    DEVICE Pair(const NormalisedArgs (&norms)[2], int feature) : of{{norms[0], feature}, {norms[1], feature}} {}

    // How far vectors of both x lie from their means.
    template <int L, class Args>
    DEVICE void load_offsets(const Args& a, int64_t i, Samples<L> (&off)[2]) const {
        UNROLL for (int k = 0; k < 2; ++k) off[k] = load<L>(a.norms[k].x + i) - of[k].mean;
    }
    template <int L>
    DEVICE Samples<L> sum(const Samples<L> (&off)[2]) const {
        return of[0].template apply<L>(off[0]) + of[1].template apply<L>(off[1]);
    }
};

template <int L>
DEVICE void forward(const NormPairArgs& a, dim3 block, uint32_t thread, uint32_t threads) {
    const Pair pair(a.norms, block.y);
    const Samples<L> zero = splat<L>(0.0f);
    each_vector<L>(a.shape, block, thread, threads, samples(a.shape, a.count), [&](int64_t i, int live, int) {
        Samples<L> off[2];
        pair.load_offsets<L>(a, i, off);
        Samples<L> z = pair.sum<L>(off);
        if (a.relu) z = where_at_most<L>(z, zero, zero, z);
        store<L>(a.y + i, first_lanes<L>(z, live));
    });
}

// dz of a vector of y.
template <int L>
DEVICE Samples<L> gradient(const NormPairBackwardArgs& a, const Pair& pair, int64_t i, const Samples<L> (&off)[2]) {
    const Samples<L> dy = load<L>(a.dy + i);
    return a.relu && a.partial ? through_relu<L>(dy, pair.sum<L>(off)) : dy;
}

template <int L>
DEVICE void backward_sums(const NormPairBackwardArgs& a, WarpSums& shared, dim3 block, uint32_t thread, uint32_t threads) {
    const NormShape& d = a.shape;
    const Pair pair(a.norms, block.y);
    Sum<L> sum, dot[2];  // dz of padded samples is zero: they need no mask here
    each_vector<L>(d, block, thread, threads, samples(d, a.count), [&](int64_t i, int, int chain) {
        Samples<L> off[2];
        pair.load_offsets<L>(a, i, off);
        const Samples<L> dz = gradient<L>(a, pair, i, off);
        sum.chain[chain] += dz;
        UNROLL for (int k = 0; k < 2; ++k) dot[k].chain[chain] += dz * (off[k] * pair.of[k].invstd);
    });
    const float sums = sum.over_block(shared, thread, threads);
    UNROLL for (int k = 0; k < 2; ++k) {
        const float dots = dot[k].over_block(shared, thread, threads);
        if (thread == 0) a.partial[(int64_t(k) * d.features + block.y) * d.splits + block.x] = {sums, dots};
    }
}

template <int L>
DEVICE void backward(const NormPairBackwardArgs& a, WarpSums& shared, dim3 block, uint32_t thread, uint32_t threads) {
    const NormShape& d = a.shape;
    const int feature = block.y, count = samples(d, a.count);
    const Pair pair(a.norms, feature);
    const float items = float(max64(1, int64_t(d.pixels) * count));
    float mean_dz[2], slope[2];  // xhat dgamma / M = (x - mean) slope
    UNROLL for (int k = 0; k < 2; ++k) {
        GradientSums sums;
        if (a.partial) {
            const GradientSums* parts = a.partial + (int64_t(k) * d.features + feature) * d.splits;
            sums = join(parts, d.splits, shared.scratch, thread, threads);
            if (block.x == 0 && thread == 0) a.dgamma[k][feature] = sums.dz_xhat, a.dbeta[k][feature] = sums.dz;
        } else {
            sums = {a.dbeta[k][feature], a.dgamma[k][feature]};
        }
        mean_dz[k] = sums.dz / items, slope[k] = sums.dz_xhat / items * pair.of[k].invstd;
    }
    each_vector<L>(d, block, thread, threads, count, [&](int64_t i, int live, int) {
        Samples<L> off[2];
        pair.load_offsets<L>(a, i, off);
        const Samples<L> dz = gradient<L>(a, pair, i, off);
        UNROLL for (int k = 0; k < 2; ++k)
            store<L>(a.dx[k] + i, first_lanes<L>((dz - mean_dz[k] - off[k] * slope[k]) * pair.of[k].scale, live));
    });
}

// Grid of all: splits, features.
BARRIER_FREE_KERNEL(REAL(norm_pair_forward), NormPairArgs, THREADS) {
    WITH_LANES(forward, a, blockIdx, threadIdx.x, blockDim.x);
}

KERNEL(REAL(norm_pair_backward_sums), NormPairBackwardArgs, WarpSums, THREADS, 2) {
    SHARED(WarpSums, shared);
    WITH_LANES(backward_sums, a, shared, blockIdx, threadIdx.x, blockDim.x);
}

KERNEL(REAL(norm_pair_backward), NormPairBackwardArgs, WarpSums, THREADS, 4) {
    SHARED(WarpSums, shared);
    WITH_LANES(backward, a, shared, blockIdx, threadIdx.x, blockDim.x);
}
