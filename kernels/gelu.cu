// gelu.cu - GELU and its gradient, where no product's epilogue has them: the formulas of gelu.cuh.
//
//   y = GELU(x);   dx = dy GELU'(x)
//
// x, y and their gradients: vectors of any shape, a multiple of 8 elements. One thread makes one vector. Limit: bytes on a GPU,
// an element read and one written (backward reads two); on the host the arithmetic, in f32 about 60 instructions a vector.
#include "kernels/gelu.cuh"

struct GeluArgs {
    const Real* x;
    Real* to;  // y; or dy, which becomes dx
    int64_t length;
};

constexpr int THREADS = 256;

template <int L>
DEVICE void forward(const GeluArgs& a, int64_t i) {
    store<L>(a.to + i, gelu<L>(load<L>(a.x + i)));
}

template <int L>
DEVICE void backward(const GeluArgs& a, int64_t i) {
    store<L>(a.to + i, load<L>(a.to + i) * gelu_slope<L>(load<L>(a.x + i)));
}

// Calls `body` for every vector, and for what is left where the vectors of the machine do not cut the length evenly.
#define EACH_VECTOR(body)                                                                                    \
    EACH(i, a.length / LANES) body<LANES>(a, i * LANES);                                                     \
    if (a.length % LANES != 0 && blockIdx.x == 0 && threadIdx.x == 0)                                        \
        body<ROW_LANES>(a, a.length - ROW_LANES)

BARRIER_FREE_KERNEL(REAL(gelu_forward), GeluArgs, THREADS) { EACH_VECTOR(forward); }

BARRIER_FREE_KERNEL(REAL(gelu_backward), GeluArgs, THREADS) { EACH_VECTOR(backward); }
