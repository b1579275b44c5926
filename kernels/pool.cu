// pool.cu - max pool and global average pool, forward and backward.
//
//   y[c,p,q,n]  = max over r,s of x[c, p*stride+r-pad, q*stride+s-pad, n], taps outside the image left out
//   dx[c,h,w,n] = sum of dy[c,p,q,n] over the windows (p,q) whose maximum is at (h,w)
//   mean pool:    y[c,n] = mean over h,w of x[c,h,w,n];   dx[c,h,w,n] = dy[c,n] / (H W)
//
// x: [C, H, W, N], y: [C, P, Q, N], Real; index: u8 [C, P, Q, N], the window's tap r*kernel+s of its first maximum.
// A NaN is a maximum, as in PyTorch. One thread makes one vector of samples of one pixel, and gathers: the backward
// pass looks at the windows that cover its pixel, in their order, and needs no atomics. Padded samples stay zero, since
// every window holds a pixel and theirs are zero. Limit: bytes; the overlap of windows is read from cache.
#include "kernels/pool.cuh"

struct MaxPoolForwardArgs {
    const Real* x;
    uint8_t* index;
    Real* y;
    PoolShape shape;
};

struct MaxPoolBackwardArgs {
    const Real* dy;
    const uint8_t* index;
    Real* dx;
    PoolShape shape;
};

struct MeanPoolShape {
    int32_t c, pixels, n;
};

// Forward: x to y. Backward: dy to dx.
struct MeanPoolArgs {
    const Real* from;
    Real* to;
    MeanPoolShape shape;
};

constexpr int THREADS = 256;
constexpr int L = ROW_LANES;

// Grid: vectors of a channel's output, channels.
BARRIER_FREE_KERNEL(REAL(max_pool_forward), MaxPoolForwardArgs, THREADS) {
    const PoolShape& d = a.shape;
    const Real* x = a.x + int64_t(blockIdx.y) * d.h * d.w * d.n;
    const int64_t base = int64_t(blockIdx.y) * d.p * d.q * d.n;
    const int vectors = d.n / L;
    EACH(i, int64_t(d.p) * d.q * vectors) {
        const int n = int(i) % vectors * L;
        Index<L> index;
        store<L>(a.y + base + i * L, pool<L>(d, int(i) / vectors, index, [&](int pixel) { return load<L>(x + pixel * d.n + n); }));
        *reinterpret_cast<Index<L>*>(a.index + base + i * L) = index;
    }
}

// Grid: vectors of a channel's input, channels.
BARRIER_FREE_KERNEL(REAL(max_pool_backward), MaxPoolBackwardArgs, THREADS) {
    const PoolShape& d = a.shape;
    const int64_t from = int64_t(blockIdx.y) * d.p * d.q * d.n;
    Real* dx = a.dx + int64_t(blockIdx.y) * d.h * d.w * d.n;
    const int vectors = d.n / L;
    EACH(i, int64_t(d.h) * d.w * vectors)
        store<L>(dx + i * L, pooled_gradient<L>(d, a.dy + from, a.index + from, int(i) / vectors, int(i) % vectors * L));
}

// One thread per vector of y.
BARRIER_FREE_KERNEL(REAL(mean_pool_forward), MeanPoolArgs, THREADS) {
    const MeanPoolShape& d = a.shape;
    const int vectors = d.n / L;
    const float share = 1.0f / d.pixels;
    EACH(i, int64_t(d.c) * vectors) {
        const int c = int(i) / vectors, n = int(i) % vectors * L;
        const Real* x = a.from + int64_t(c) * d.pixels * d.n + n;
        Samples<L> sum = splat<L>(0.0f);
        for (int pixel = 0; pixel < d.pixels; ++pixel) sum += load<L>(x + int64_t(pixel) * d.n);
        store<L>(a.to + i * L, sum * share);
    }
}

// Grid: vectors of a channel's dx, channels.
BARRIER_FREE_KERNEL(REAL(mean_pool_backward), MeanPoolArgs, THREADS) {
    const MeanPoolShape& d = a.shape;
    const int vectors = d.n / L;
    const Real* dy = a.from + int64_t(blockIdx.y) * d.n;
    Real* dx = a.to + int64_t(blockIdx.y) * d.pixels * d.n;
    const float share = 1.0f / d.pixels;
    EACH(i, int64_t(d.pixels) * vectors) store<L>(dx + i * L, load<L>(dy + int(i) % vectors * L) * share);
}
