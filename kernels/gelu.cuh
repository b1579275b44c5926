// gelu.cuh - the exact GELU (Hendrycks and Gimpel 2016), shared by gelu.cu and the epilogues of conv_mma.cuh.
//
//   y = x Phi(x);   dy/dx = Phi(x) + x phi(x);   Phi, phi: distribution and density of the standard normal
//
// Phi(-z) = e^(-z z / 2) g(z) for z >= 0, g(z) = t q(t), t = 1 / (1 + c z), q a polynomial fitted to the relative error for z
// up to 14.5: of degree 8 (3e-8), or where results are bf16 of degree 5 (9e-6, a 200th of their rounding). Phi(z) = 1 - Phi(-z).
// The bell e^(-z z / 2) serves phi too; from |x| = 14.5 on it is 0. libm's erff is no choice: g++ does not vectorise it.
//
// GELU(0) = 0, so padding stays zero; -inf gives -0, NaN stays.
#pragma once
#include "kernels/lib/device.cuh"

constexpr float FARTHEST = 14.5f;  // the bell, e^-105, is 0 from there on, also where small numbers are not flushed

template <int L>
struct Normal {
    Samples<L> distribution, density;
};

// Phi(-z) / e^(-z z / 2).
template <int L>
DEVICE Samples<L> tail_over_bell(const Samples<L>& z) {
#ifdef DILT_BF16
    constexpr float Q[] = {0.066979991f, -0.232201591f, 0.192793979f, 0.108981199f, 0.184159666f, 0.17928399f};
    const Samples<L> t = rough_reciprocal<L>(z * 0.45f + 1.0f);
#else
    constexpr float Q[] = {-0.0291578602f, 0.144030809f, -0.255838782f, 0.15931946f, -0.0232122019f,
                           0.105552442f,   0.119821303f, 0.139863521f,  0.139621302f};
    const Samples<L> from = z * 0.35f + 1.0f;
    Samples<L> t;
    UNROLL for (int i = 0; i < L; ++i) t[i] = 1.0f / from[i];
#endif
    Samples<L> q = splat<L>(Q[0]);
    UNROLL for (int i = 1; i < int(sizeof Q / sizeof Q[0]); ++i) q = q * t + Q[i];
    return t * q;
}

// e^(-z z / 2). In f32 the rounding of z z would be a relative error of up to 4e-6. So there z is rounded to a multiple of
// 2^-8, whose square is exact, and what is left goes through the series of e^rest, |rest| < .03.
template <int L>
DEVICE Samples<L> bell_of(const Samples<L>& z) {
#ifdef DILT_BF16
    return rough_exponential<L>(z * z * -0.5f);
#else
    const Samples<L> coarse = (z + 49152.0f) - 49152.0f;
    const Samples<L> rest = (coarse - z) * (coarse + z) * 0.5f;
    const Samples<L> series = ((rest * 0.166666667f + 0.5f) * rest + 1.0f) * rest + 1.0f;
    return exponential<L>(coarse * coarse * -0.5f) * series;
#endif
}

// Phi and phi at |x| <= FARTHEST.
template <int L>
DEVICE Normal<L> standard_normal(const Samples<L>& x) {
    const Samples<L> zero = splat<L>(0.0f), one = splat<L>(1.0f);
    const Samples<L> z = where_at_most<L>(x, zero, zero - x, x);
    const Samples<L> bell = bell_of<L>(z), tail = bell * tail_over_bell<L>(z);
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
DEVICE Samples<L> gelu(const Samples<L>& any) {
    const Samples<L> x = at_least<L>(any, -FARTHEST);
    return x * standard_normal<L>(at_most<L>(x, FARTHEST)).distribution;
}

template <int L>
DEVICE Samples<L> gelu_slope(const Samples<L>& any) {
    const Samples<L> x = at_most<L>(at_least<L>(any, -FARTHEST), FARTHEST);
    const Normal<L> normal = standard_normal<L>(x);
    return normal.distribution + x * normal.density;
}
