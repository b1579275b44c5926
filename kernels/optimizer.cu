// optimizer.cu - stochastic gradient descent with momentum, weight decay and clipping, over the arena of a network.
//
//   g = gradient * scale                        scale = min(1, max_norm / (norm + 1e-6)), or 1 without clipping
//   d = g + weight_decay * w                    where the decay bits are set
//   v = momentum * v + d                        zero before the first step, so that v = d then, as in PyTorch
//   w = w - rate * (nesterov ? d + momentum * v : v)
//   w = v = +0 where the mask's bit is clear
//
// norm = sqrt(sum of g^2 where the mask's bit is set), from PARTIALS partial sums: block b of the norm sums the b-th
// part of the arena, and each block of the step adds all partials up, which spares a launch. Both orders depend on the
// arena's length and the threads of a block alone: same bits every run. A norm of NaN makes every weight NaN.
//
// weights, velocity, gradients: [count] f32 arenas of the same offsets. mask, decay: one bit per element, bit i is bit
// i % 32 of word i / 32. A thread holds LANES consecutive elements, which share a mask word.
// Limit: bytes, 3 reads and 2 writes of f32 and one or two bits an element; the norm 1 read.
#include "kernels/lib/device.cuh"

struct SgdArgs {
    const float* rate;       // [1]
    const float* gradients;  // [count]
    const uint32_t* mask;    // [count / 32, rounded up]
    const uint32_t* decay;   // the same, or null: decay everywhere
    const float* partials;   // [PARTIALS], or null: no clipping
    float* weights;          // [count]
    float* velocity;         // [count]
    int64_t count;
    float momentum;
    float weight_decay;
    float max_norm;
    int32_t nesterov;
};

struct GradientNormArgs {
    const float* gradients;  // [count]
    const uint32_t* mask;    // [count / 32, rounded up]
    float* partials;         // [PARTIALS]: one sum of squares a block
    int64_t count;
};

constexpr int THREADS = 256;
constexpr int PARTIALS = 256;

// The update of elements i..i+L, whose bits lie in one word.
template <int L>
DEVICE void update(const SgdArgs& a, float rate, float scale, int64_t i) {
    const Samples<L> w = load<L>(a.weights + i);
    const Samples<L> g = load<L>(a.gradients + i) * scale;
    const Samples<L> decay = w * a.weight_decay;
    const Samples<L> d = g + (a.decay ? kept<L>(decay, a.decay[i / 32] >> i % 32) : decay);
    const Samples<L> v = load<L>(a.velocity + i) * a.momentum + d;
    const Samples<L> step = a.nesterov ? d + v * a.momentum : v;
    const uint32_t bits = a.mask[i / 32] >> i % 32;
    store<L>(a.velocity + i, kept<L>(v, bits));
    store<L>(a.weights + i, kept<L>(w - step * rate, bits));
}

template <int L>
DEVICE float sum_of_squares(const GradientNormArgs& a, int64_t i) {
    const Samples<L> g = kept<L>(load<L>(a.gradients + i), a.mask[i / 32] >> i % 32);
    return lane_sum<L>(g * g);
}

KERNEL(optimizer_sgd_f32, SgdArgs, WarpSums, THREADS) {
    SHARED(WarpSums, shared);
    const float rate = *a.rate;
    float scale = 1.0f;
    if (a.partials) {
        float squares = 0.0f;
        for (int i = threadIdx.x; i < PARTIALS; i += blockDim.x) squares += a.partials[i];
        squares = block_sum(squares, shared.scratch, threadIdx.x, blockDim.x);
        scale = a.max_norm / (sqrtf(squares) + 1e-6f);
        if (scale > 1.0f) scale = 1.0f;  // not fminf, which would lose a NaN
    }
    EACH(run, ceil_div(a.count, LANES)) {
        const int64_t i = run * LANES;
        if (i + LANES <= a.count) {
            update<LANES>(a, rate, scale, i);
        } else {
            for (int64_t tail = i; tail < a.count; ++tail) update<1>(a, rate, scale, tail);
        }
    }
}

// Grid: PARTIALS blocks, each with an equal part of the arena in whole pairs of mask words.
KERNEL(optimizer_gradient_norm_f32, GradientNormArgs, WarpSums, THREADS) {
    SHARED(WarpSums, shared);
    const int64_t part = ceil_div(ceil_div(a.count, 64), PARTIALS) * 64;
    const int64_t end = min64((blockIdx.x + 1) * part, a.count);
    float sum = 0.0f;
    for (int64_t i = blockIdx.x * part + threadIdx.x * LANES; i < end; i += blockDim.x * LANES) {
        if (i + LANES <= a.count) {
            sum += sum_of_squares<LANES>(a, i);
        } else {
            for (int64_t tail = i; tail < end; ++tail) sum += sum_of_squares<1>(a, tail);
        }
    }
    sum = block_sum(sum, shared.scratch, threadIdx.x, blockDim.x);
    if (threadIdx.x == 0) a.partials[blockIdx.x] = sum;
}
