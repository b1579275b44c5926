// norm_chunks.cuh - how the kernels of batch norm (norm.cu, norm_pair.cu) go over a row: in chunks of whole pixels, one a block, a
// function of the shape alone, so that sums of chunks have one order on every device.
#pragma once
#include "kernels/norm.cuh"

struct NormShape {
    int32_t features;
    int32_t pixels;
    int32_t n;       // samples of a pixel, a multiple of 8
    int32_t splits;  // chunks of a row
    int32_t chunk;   // pixels of a chunk; the last may have fewer
};

constexpr int THREADS = 256;
constexpr int CHAINS = 4;  // sums that a thread keeps apart, since one addition cannot start before the last has ended

DEVICE int samples(const NormShape& d, const uint32_t* count) { return int(min64(*count, d.n)); }

DEVICE int pixels_of(const NormShape& d, int split) { return int(min64(d.chunk, d.pixels - int64_t(split) * d.chunk)); }

// Calls f(offset, live, chain) for this thread's vectors of a chunk: `live` lanes (if fewer than L) are true samples.
template <int L, class F>
DEVICE void each_vector(const NormShape& d, dim3 block, uint32_t thread, uint32_t threads, int count, F f) {
    const int64_t begin = (int64_t(block.y) * d.pixels + int64_t(block.x) * d.chunk) * d.n;
    const int length = pixels_of(d, block.x) * d.n;
    const int step = threads * L, turn = step % d.n;
    int at = thread * L, n = at % d.n;
    const auto next = [&](int chain) {
        f(begin + at, count - n, chain);
        at += step, n += turn;
        if (n >= d.n) n -= d.n;
    };
    while (at + (CHAINS - 1) * step < length)
        UNROLL for (int chain = 0; chain < CHAINS; ++chain) next(chain);
    while (at < length) next(0);
}

// The chains of one sum of this thread.
template <int L>
struct Sum {
    Samples<L> chain[CHAINS];

    DEVICE Sum() {
        UNROLL for (int i = 0; i < CHAINS; ++i) chain[i] = splat<L>(0.0f);
    }
    DEVICE float over_block(WarpSums& shared, uint32_t thread, uint32_t threads) const {
        const float sum = lane_sum<L>((chain[0] + chain[1]) + (chain[2] + chain[3]));
        return block_sum(sum, shared.scratch, thread, threads);
    }
};

// Sums a chunk of a feature's gradient; dz(i, live, off) is that of the vector of x at place i, which lies `off` from the mean.
template <int L, class Dz>
DEVICE void sum_gradient(const NormShape& d, WarpSums& shared, dim3 block, uint32_t thread, uint32_t threads, int count,
                         const Real* x, const Normaliser& norm, GradientSums* partial, Dz dz) {
    Sum<L> sum, dot;  // dz of padded samples is zero: they need no mask here
    each_vector<L>(d, block, thread, threads, count, [&](int64_t i, int live, int chain) {
        const Samples<L> off = load<L>(x + i) - norm.mean, own = dz(i, live, off);
        sum.chain[chain] += own;
        dot.chain[chain] += own * (off * norm.invstd);
    });
    const float sums = sum.over_block(shared, thread, threads);
    const float dots = dot.over_block(shared, thread, threads);
    if (thread == 0) partial[int64_t(block.y) * d.splits + block.x] = {sums, dots};
}

// Whole vectors of the machine where they cut every pixel's samples evenly.
#define WITH_LANES(body, ...)                                \
    if (LANES == ROW_LANES || a.shape.n % LANES == 0)        \
        body<LANES>(__VA_ARGS__);                            \
    else                                                     \
        body<ROW_LANES>(__VA_ARGS__)
