// gw.cuh - Gromov-Wasserstein couplings of pairs of layers, many at a time: what the kernels of gw.cu and gw_direct.cu
// share.
//
//   value of T:     sum over i,k,j,l of (C1[i,k] - C2[j,l])^2 T[i,j] T[k,l]  =  constant - 2 <T, C1 T C2>,
//                   constant = sum over i of c1[i] / n1 + sum over j of c2[j] / n2,  c[i] = mean over k of C[i,k]^2
//   proximal step:  log T' = log T - scale (c1[i] + c2[j] - 2 (C1 T C2)[i,j]) + log u[i] + log v[j],  scale = 2 / epsilon
//   where u, v make the rows of T' sum to 1/n1 and its columns to 1/n2 (Sinkhorn's iterations)
//
// (Peyré, Cuturi, Solomon, ICML 2016; Xie et al., UAI 2019.) C1 and C2 are symmetric. A coupling is one plan T from one
// start. Matrices have rows of a multiple of 16 floats; columns beyond the last are zeros, of log T a large negative number.
// The matrices C of all layers lie in one tensor, once.
#pragma once
#include "kernels/lib/device.cuh"

struct GwArgs {
    const uint32_t* layers;    // [layers, 3]: where C begins, in 16 floats; where c begins; n
    const uint32_t* pairs;     // [couplings, 3]: the layers of C1 and C2; the start
    const float* matrices;     // C of all layers
    const float* means;        // c of all layers
    const double* constants;   // [couplings]
    float* logs;               // [couplings, slot]: log T, or the log of the matrix that is scaled
    float* plans;              // [couplings, slot]: T, or that matrix
    float* products;           // [couplings, slot]: T C2
    double* partial;           // [couplings, tiles]: sums of T * (C1 T C2)
    double* values;            // [couplings]: of the T that the last step began with
    uint32_t* done;            // [couplings]: not 0 where no step changes anything any more
    int64_t slot;
    int32_t tiles;             // partial sums that a product leaves; 0 before the first
    int32_t first;             // coupling of the grid's first
    float scale;
    float tolerance;           // of a row's sum, as a share of 1/n1, where iterations may end
    float enough;              // share of its value that a step must take off; negative: whatever it does
    int32_t iterations;        // at most
};

// What is not there: exp of it is 0, and it stays finite whatever is added.
constexpr float NOTHING = -1e30f;

// Rows and columns of a coupling, at most.
constexpr int MOST = 2048;

// Starts of a coupling.
constexpr uint32_t START_PRODUCT = 0, START_MEAN = 1;  // and 2: logs hold costs

struct Coupling {
    const float* c1;
    const float* c2;
    const float* c1_means;
    const float* c2_means;
    int n1, n2, pitch1, pitch2;
    int64_t place;     // of its matrices T
    uint32_t number, start;
    DEVICE Coupling(const GwArgs& a, uint32_t block) {
        number = a.first + block;
        const uint32_t* pair = a.pairs + number * 3;
        const uint32_t* x = a.layers + pair[0] * 3;
        const uint32_t* y = a.layers + pair[1] * 3;
        c1 = a.matrices + int64_t(x[0]) * 16, c2 = a.matrices + int64_t(y[0]) * 16;
        c1_means = a.means + x[1], c2_means = a.means + y[1];
        n1 = int(x[2]), n2 = int(y[2]);
        pitch1 = (n1 + 15) / 16 * 16, pitch2 = (n2 + 15) / 16 * 16;
        place = number * a.slot, start = pair[2];
    }
};

// What a product computes of each coupling.
enum class Product {
    RIGHT,  // products = T C2
    STEP,   // C1 products: logs of the matrix to be scaled, and partial sums
    VALUE   // C1 products: partial sums alone
};

template <Product P>
struct Operands {
    const float* left;   // [n1, depth]
    const float* right;  // [depth, n2]
    int depth, left_pitch;
    DEVICE Operands(const GwArgs& a, const Coupling& c)
        : left(P == Product::RIGHT ? a.plans + c.place : c.c1),
          right(P == Product::RIGHT ? c.c2 : a.products + c.place),
          depth(P == Product::RIGHT ? c.n2 : c.n1),
          left_pitch(P == Product::RIGHT ? c.pitch2 : c.pitch1) {}
};

// What becomes of L columns of a row of the product; returns what they add to the partial sum.
template <Product P, int L>
DEVICE double finish(const GwArgs& a, const Coupling& c, int i, int j, const Samples<L>& sum) {
    const int64_t at = c.place + int64_t(i) * c.pitch2 + j;
    if (P == Product::RIGHT) {
        store<L>(a.products + at, sum);
        return 0.0;
    }
    if (P == Product::STEP) {
        const Samples<L> means = load<L>(c.c2_means + j) + splat<L>(c.c1_means[i]);
        store<L>(a.logs + at, load<L>(a.logs + at) - (means - sum * 2.0f) * a.scale);
    }
    return double(lane_sum<L>(load<L>(a.plans + at) * sum));
}

// Whether a coupling is left as it is: where the last step took too little off its value. One thread of a block asks.
DEVICE bool ends(const GwArgs& a, const Coupling& c) {
    double sum = 0.0;
    for (int tile = 0; tile < a.tiles; ++tile) sum += a.partial[c.number * int64_t(a.tiles) + tile];
    const double value = a.constants[c.number] - 2.0 * sum, before = a.values[c.number];
    a.values[c.number] = value;
    const bool end = a.enough >= 0.0f && before - value <= double(a.enough) * before;
    if (end) a.done[c.number] = 1;
    return end;
}

// Lane by lane the larger one; a NaN may be lost.
template <int L>
DEVICE Samples<L> larger(const Samples<L>& x, const Samples<L>& y) {
    return where_at_most<L>(y, x, x, y);
}
template <int L>
DEVICE float lane_largest(const Samples<L>& x) {
    float most = x[0];
    UNROLL for (int i = 1; i < L; ++i) most = larger(most, x[i]);
    return most;
}

// T from the matrix that was scaled: L columns of a row, whose scales are given by their logarithms.
template <int L>
DEVICE void end_step(float* log, float* plan, float log_u, const Samples<L>& log_v) {
    const Samples<L> scaled = load<L>(log) + splat<L>(log_u) + log_v;
    store<L>(log, scaled);
    store<L>(plan, exponential<L>(scaled));
}
