// pointwise.cu - what touches each element once.
//
// Shortcut without parameters, of ResNets for CIFAR (He et al. 2016, option A): every stride-th pixel, zero channels.
//   y[k,p,q,n]  = x[k-before, p*stride, q*stride, n], zero for channels before and after x's
//   dx[c,h,w,n] = dy[c+before, h/stride, w/stride, n] where stride divides h and w, else zero
// Where x and y have other channels left in them, a map says which is which in place of `before`.
// x: [C, H, W, N], y: [K, P, Q, N], Real. One thread makes one vector of samples of one pixel. Limit: bytes.
#include "kernels/lib/device.cuh"

struct ShortcutShape {
    int32_t c, h, w;  // channels, rows and columns of x
    int32_t k, p, q;  // of y
    int32_t before;   // channels of zeros before x's
    int32_t stride;
    int32_t n;        // samples of a pixel, a multiple of 8
};

// Forward: x to y. Backward: dy to dx.
struct ShortcutArgs {
    const Real* from;
    Real* to;
    const uint32_t* map;  // the channel that each written one is read from, or 2^32 - 1 for none; or null
    ShortcutShape shape;
};

constexpr int THREADS = 256;
constexpr int L = ROW_LANES;

// The channel of `from`, of so many, that channel `to` is read from; negative for none.
DEVICE int channel_read(const uint32_t* map, int to, int offset, int channels) {
    const int from = map ? int(map[to]) : to + offset;
    return from < channels ? from : -1;
}

// Grid: vectors of a channel of y, channels of y.
BARRIER_FREE_KERNEL(REAL(shortcut_forward), ShortcutArgs, THREADS) {
    const ShortcutShape& d = a.shape;
    const int c = channel_read(a.map, blockIdx.y, -d.before, d.c), vectors = d.n / L;
    const Real* x = c >= 0 ? a.from + int64_t(c) * d.h * d.w * d.n : nullptr;
    Real* y = a.to + int64_t(blockIdx.y) * d.p * d.q * d.n;
    EACH(i, int64_t(d.p) * d.q * vectors) {
        const int pixel = int(i) / vectors, n = int(i) % vectors * L;
        const int64_t source = int64_t(pixel / d.q * d.stride) * d.w + pixel % d.q * d.stride;
        store<L>(y + i * L, x ? load<L>(x + source * d.n + n) : splat<L>(0.0f));
    }
}

// Grid: vectors of a channel of dx, channels of dx.
BARRIER_FREE_KERNEL(REAL(shortcut_backward), ShortcutArgs, THREADS) {
    const ShortcutShape& d = a.shape;
    const int k = channel_read(a.map, blockIdx.y, d.before, d.k), vectors = d.n / L;
    const Real* dy = a.from + int64_t(k < 0 ? 0 : k) * d.p * d.q * d.n;
    Real* dx = a.to + int64_t(blockIdx.y) * d.h * d.w * d.n;
    EACH(i, int64_t(d.h) * d.w * vectors) {
        const int pixel = int(i) / vectors, n = int(i) % vectors * L, h = pixel / d.w, w = pixel % d.w;
        const int64_t source = int64_t(h / d.stride) * d.q + w / d.stride;
        const bool read = k >= 0 && h % d.stride == 0 && w % d.stride == 0;
        store<L>(dx + i * L, read ? load<L>(dy + source * d.n + n) : splat<L>(0.0f));
    }
}
