// pool.cuh - the windows of max pools: what the kernels of pools (pool.cu) share with those that normalise what a pool reads
// (norm_pool.cu).
#pragma once
#include "kernels/lib/device.cuh"

struct PoolShape {
    int32_t c, h, w;              // channels, rows and columns of x
    int32_t p, q;                 // rows and columns of y
    int32_t kernel, stride, pad;  // the same in both directions
    int32_t n;                    // samples of a pixel, a multiple of 8
};

// The taps of a vector of windows, as they lie in memory.
template <int L>
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

// The maximum of a vector of windows of pixel (p, q) = `pixel`, and where the first is. value(pixel of x) is what lies there.
template <int L, class Value>
DEVICE Samples<L> pool(const PoolShape& d, int pixel, Index<L>& index, Value value) {
    const int top = pixel / d.q * d.stride - d.pad, left = pixel % d.q * d.stride - d.pad;
    const int r0 = int(max64(0, -top)), r1 = int(min64(d.kernel, d.h - top));
    const int s0 = int(max64(0, -left)), s1 = int(min64(d.kernel, d.w - left));
    Samples<L> best = value((top + r0) * d.w + left + s0);
    Samples<L> first = splat<L>(float(r0 * d.kernel + s0));
    for (int r = r0; r < r1; ++r) {
        for (int s = s0; s < s1; ++s) {
            const Samples<L> tap = splat<L>(float(r * d.kernel + s));
            const Samples<L> other = value((top + r) * d.w + left + s);
            // best stays where other <= best, and where it is NaN: there best <= best fails.
            const Samples<L> larger = where_at_most<L>(other, best, best, other);
            const Samples<L> where = where_at_most<L>(other, best, first, tap);
            first = where_at_most<L>(best, best, where, first);
            best = where_at_most<L>(best, best, larger, best);
        }
    }
    UNROLL for (int lane = 0; lane < L; ++lane) index.lane[lane] = uint8_t(first[lane]);
    return best;
}

// What comes to a vector of pixel (h, w) = `pixel`, samples `n` on, of the gradient of a channel's windows whose maximum it is.
template <int L>
DEVICE Samples<L> pooled_gradient(const PoolShape& d, const Real* dy, const uint8_t* index, int pixel, int n) {
    const int h = pixel / d.w + d.pad, w = pixel % d.w + d.pad;
    const Windows down = windows_over(h, d.p, d), across = windows_over(w, d.q, d);
    const Samples<L> zero = splat<L>(0.0f);
    Samples<L> sum = zero;
    for (int p = down.first; p < down.end; ++p) {
        for (int q = across.first; q < across.end; ++q) {
            const int tap = (h - p * d.stride) * d.kernel + w - q * d.stride;
            const int at = (p * d.q + q) * d.n + n;
            const Index<L> winner = *reinterpret_cast<const Index<L>*>(index + at);
            Samples<L> off;  // from the tap that won
            UNROLL for (int lane = 0; lane < L; ++lane) off[lane] = float(winner.lane[lane] - tap);
            sum += where_at_most<L>(off * off, zero, load<L>(dy + at), zero);
        }
    }
    return sum;
}
