// gelu.cu - the exact GELU (Hendrycks and Gimpel 2016), forward and backward.
//
//   y = x Phi(x);   dx = dy (Phi(x) + x phi(x));   Phi, phi: distribution and density of the standard normal
//
// Phi(-z) = e^(-z z / 2) g(z) for z >= 0, g(z) = t q(t), t = 1 / (1 + .35 z), q a polynomial of degree 8 fitted to the
// relative error (3e-8) for z up to 14; Phi(z) = 1 - Phi(-z). The bell e^(-z z / 2) serves phi too. Where it would be
// below e^-86.64 (|x| > 13.16) it is 0. libm's erff is no choice: g++ does not vectorise it.
//
// x, y and their gradients: vectors of any shape, a multiple of 8 elements. GELU(0) = 0, so padding stays zero; -inf
// gives -0, NaN stays. One thread makes one vector. Limit: bytes on a GPU, an element read and one written (backward
// reads two); on the host the arithmetic, about 60 instructions a vector.
#include "kernels/lib/device.cuh"

struct GeluArgs {
    const Real* x;
    const Real* dy;  // read by the backward pass only
    Real* to;        // y, or dx
    int64_t length;
};

constexpr int THREADS = 256;
constexpr float FARTHEST = 14.5f;  // the bell, e^-105, is 0 from there on, also where small numbers are not flushed

template <int L>
struct Normal {
    Samples<L> distribution, density;
};

// Phi and phi at |x| <= FARTHEST.
template <int L>
DEVICE Normal<L> standard_normal(const Samples<L>& x) {
    const Samples<L> zero = splat<L>(0.0f), one = splat<L>(1.0f);
    const Samples<L> z = where_at_most<L>(x, zero, zero - x, x);
    // The rounding of z z would be a relative error of the bell of up to 4e-6. So z is rounded to a multiple of 2^-8,
    // whose square is exact, and what is left goes through the series of e^rest, |rest| < .03.
    const Samples<L> coarse = (z + 49152.0f) - 49152.0f;
    const Samples<L> rest = (coarse - z) * (coarse + z) * 0.5f;
    const Samples<L> series = ((rest * 0.166666667f + 0.5f) * rest + 1.0f) * rest + 1.0f;
    const Samples<L> bell = exponential<L>(coarse * coarse * -0.5f) * series;
    const Samples<L> from = z * 0.35f + 1.0f;
    Samples<L> t;
    UNROLL for (int i = 0; i < L; ++i) t[i] = 1.0f / from[i];
    Samples<L> q = splat<L>(-0.0291578602f);
    q = q * t + 0.144030809f;
    q = q * t - 0.255838782f;
    q = q * t + 0.15931946f;
    q = q * t - 0.0232122019f;
    q = q * t + 0.105552442f;
    q = q * t + 0.119821303f;
    q = q * t + 0.139863521f;
    q = q * t + 0.139621302f;
    const Samples<L> tail = bell * (t * q);
    return Normal<L>{where_at_most<L>(x, zero, tail, one - tail), bell * 0.398942280f};
}

// x, or `limit` where x is below it.
template <int L>
DEVICE Samples<L> at_least(const Samples<L>& x, float limit) {
    return where_at_most<L>(x, splat<L>(limit), splat<L>(limit), x);
}

// x, or `limit` where x is above it.
template <int L>
DEVICE Samples<L> at_most(const Samples<L>& x, float limit) {
    return where_at_most<L>(splat<L>(limit), x, splat<L>(limit), x);
}

template <int L>
DEVICE void forward(const GeluArgs& a, int64_t i) {
    const Samples<L> x = at_least<L>(load<L>(a.x + i), -FARTHEST);
    store<L>(a.to + i, x * standard_normal<L>(at_most<L>(x, FARTHEST)).distribution);
}

template <int L>
DEVICE void backward(const GeluArgs& a, int64_t i) {
    const Samples<L> x = at_most<L>(at_least<L>(load<L>(a.x + i), -FARTHEST), FARTHEST);
    const Normal<L> normal = standard_normal<L>(x);
    store<L>(a.to + i, load<L>(a.dy + i) * (normal.distribution + x * normal.density));
}

// Calls `body` for every vector, and for what is left where the vectors of the machine do not cut the length evenly.
#define EACH_VECTOR(body)                                                                                    \
    EACH(i, a.length / LANES) body<LANES>(a, i * LANES);                                                     \
    if (a.length % LANES != 0 && blockIdx.x == 0 && threadIdx.x == 0)                                        \
        body<ROW_LANES>(a, a.length - ROW_LANES)

BARRIER_FREE_KERNEL(REAL(gelu_forward), GeluArgs, THREADS) { EACH_VECTOR(forward); }

BARRIER_FREE_KERNEL(REAL(gelu_backward), GeluArgs, THREADS) { EACH_VECTOR(backward); }
