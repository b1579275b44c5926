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
#include "kernels/lib/device.cuh"

struct PoolShape {
    int32_t c, h, w;              // channels, rows and columns of x
    int32_t p, q;                 // rows and columns of y
    int32_t kernel, stride, pad;  // the same in both directions
    int32_t n;                    // samples of a pixel, a multiple of 8
};

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

// The taps of a vector of windows, as they lie in memory.
struct alignas(L) Index {
    uint8_t lane[L];
};

// The windows along one axis that cover coordinate `at` of the padded image: window o covers kernel ones from o*stride.
struct Windows {
    int first, end;
};

DEVICE Windows windows_over(int at, int outputs, const PoolShape& d) {
    const int first = at < d.kernel ? 0 : (at - d.kernel) / d.stride + 1;
    return {first, int(min64(outputs, at / d.stride + 1))};
}

// Grid: vectors of a channel's output, channels.
BARRIER_FREE_KERNEL(REAL(max_pool_forward), MaxPoolForwardArgs, THREADS) {
    const PoolShape& d = a.shape;
    const Real* x = a.x + int64_t(blockIdx.y) * d.h * d.w * d.n;
    const int64_t base = int64_t(blockIdx.y) * d.p * d.q * d.n;
    const int vectors = d.n / L;
    EACH(i, int64_t(d.p) * d.q * vectors) {
        const int pixel = int(i) / vectors, n = int(i) % vectors * L;
        const int top = pixel / d.q * d.stride - d.pad, left = pixel % d.q * d.stride - d.pad;
        const int r0 = int(max64(0, -top)), r1 = int(min64(d.kernel, d.h - top));
        const int s0 = int(max64(0, -left)), s1 = int(min64(d.kernel, d.w - left));
        Samples<L> best = load<L>(x + ((top + r0) * d.w + left + s0) * d.n + n);
        Samples<L> index = splat<L>(float(r0 * d.kernel + s0));
        for (int r = r0; r < r1; ++r) {
            for (int s = s0; s < s1; ++s) {
                const Samples<L> tap = splat<L>(float(r * d.kernel + s));
                const Samples<L> value = load<L>(x + ((top + r) * d.w + left + s) * d.n + n);
                // best stays where value <= best, and where it is NaN: there best <= best fails.
                const Samples<L> larger = where_at_most<L>(value, best, best, value);
                const Samples<L> where = where_at_most<L>(value, best, index, tap);
                index = where_at_most<L>(best, best, where, index);
                best = where_at_most<L>(best, best, larger, best);
            }
        }
        Index taps;
        UNROLL for (int lane = 0; lane < L; ++lane) taps.lane[lane] = uint8_t(index[lane]);
        store<L>(a.y + base + i * L, best);
        *reinterpret_cast<Index*>(a.index + base + i * L) = taps;
    }
}

// Grid: vectors of a channel's input, channels.
BARRIER_FREE_KERNEL(REAL(max_pool_backward), MaxPoolBackwardArgs, THREADS) {
    const PoolShape& d = a.shape;
    const int64_t from = int64_t(blockIdx.y) * d.p * d.q * d.n;
    const Real* dy = a.dy + from;
    const uint8_t* index = a.index + from;
    Real* dx = a.dx + int64_t(blockIdx.y) * d.h * d.w * d.n;
    const int vectors = d.n / L;
    EACH(i, int64_t(d.h) * d.w * vectors) {
        const int pixel = int(i) / vectors, n = int(i) % vectors * L;
        const int h = pixel / d.w + d.pad, w = pixel % d.w + d.pad;
        const Windows down = windows_over(h, d.p, d), across = windows_over(w, d.q, d);
        const Samples<L> zero = splat<L>(0.0f);
        Samples<L> sum = zero;
        for (int p = down.first; p < down.end; ++p) {
            for (int q = across.first; q < across.end; ++q) {
                const int tap = (h - p * d.stride) * d.kernel + w - q * d.stride;
                const int at = (p * d.q + q) * d.n + n;
                const Index winner = *reinterpret_cast<const Index*>(index + at);
                Samples<L> off;  // from the tap that won
                UNROLL for (int lane = 0; lane < L; ++lane) off[lane] = float(winner.lane[lane] - tap);
                sum += where_at_most<L>(off * off, zero, load<L>(dy + at), zero);
            }
        }
        store<L>(dx + i * L, sum);
    }
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
