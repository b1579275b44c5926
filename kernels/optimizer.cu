// optimizer.cu - stochastic gradient descent with momentum, and AdamW, over the arena of a network.
//
//   g = gradient * scale                        scale = min(1, max_norm / (norm + 1e-6)), or 1 without clipping
//
// SGD:
//   d = g + weight_decay * w                    where the decay bits are set
//   v = momentum * v + d                        zero before the first step, so that v = d then, as in PyTorch
//   w = w - rate * (nesterov ? d + momentum * v : v)
//
// AdamW (Loshchilov and Hutter 2019), step t = 1, 2, ...; first and second are zero before:
//   w = w - rate * weight_decay * w             where the decay bits are set
//   first = beta1 * first + (1 - beta1) * g,  second = beta2 * second + (1 - beta2) * g^2
//   w = w - rate * corrections[0] * first / (sqrt(second) * corrections[1] + epsilon)
//   corrections = 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t), computed by the host in f64 and read from memory
//
// w, v, first and second are +0 where the mask's bit is clear.
//
// norm = sqrt(sum of g^2 where the mask's bit is set), from PARTIALS partial sums: block b of the norm sums the b-th
// part of the arena, and each block of the step adds all partials up, which spares a launch. Both orders depend on the
// arena's length and the threads of a block alone: same bits every run. A norm of NaN makes every weight NaN.
//
// Weights, gradients and the optimizer's state: [count] f32 arenas of the same offsets. mask, decay: one bit per
// element, bit i is bit i % 32 of word i / 32. A thread holds LANES consecutive elements, which share a mask word.
// Limit: bytes, 3 reads and 2 writes of f32 (AdamW 4 and 3) and one or two bits an element; the norm 1 read.
#include "kernels/lib/device.cuh"

// What the optimizers have in common.
struct StepArgs {
    const float* rate;       // [1]
    const float* gradients;  // [count]
    const uint32_t* mask;    // [count / 32, rounded up]
    const uint32_t* decay;   // the same, or null: decay everywhere
    const float* partials;   // [PARTIALS], or null: no clipping
    float* weights;          // [count]
    int64_t count;
    float weight_decay;
    float max_norm;
};

struct SgdArgs {
    StepArgs step;
    float* velocity;  // [count]
    float momentum;
    int32_t nesterov;
};

struct AdamWArgs {
    StepArgs step;
    const float* corrections;  // [2]
    float* first;              // [count]
    float* second;             // [count]
    float beta1, rest1;        // rest = 1 - beta, rounded from f64
    float beta2, rest2;
    float epsilon;
};

struct GradientNormArgs {
    const float* gradients;  // [count]
    const uint32_t* mask;    // [count / 32, rounded up]
    float* partials;         // [PARTIALS]: one sum of squares a block
    int64_t count;
};

constexpr int THREADS = 256;
constexpr int PARTIALS = 256;

// What a step multiplies every gradient by.
DEVICE float clip_scale(const StepArgs& a, float* scratch, uint32_t thread, uint32_t threads) {
    if (!a.partials) return 1.0f;
    float squares = 0.0f;
    for (uint32_t i = thread; i < PARTIALS; i += threads) squares += a.partials[i];
    squares = block_sum(squares, scratch, thread, threads);
    const float scale = a.max_norm / (sqrtf(squares) + 1e-6f);
    return scale > 1.0f ? 1.0f : scale;  // not fminf, which would lose a NaN
}

// weight_decay * w where the decay bits are set.
template <int L>
DEVICE Samples<L> decay(const StepArgs& a, const Samples<L>& w, int64_t i) {
    const Samples<L> all = w * a.weight_decay;
    return a.decay ? kept<L>(all, a.decay[i / 32] >> i % 32) : all;
}

// The update of elements i..i+L, whose bits lie in one word.
template <int L>
DEVICE void update(const SgdArgs& a, float rate, float scale, int64_t i) {
    const Samples<L> w = load<L>(a.step.weights + i);
    const Samples<L> d = load<L>(a.step.gradients + i) * scale + decay<L>(a.step, w, i);
    const Samples<L> v = load<L>(a.velocity + i) * a.momentum + d;
    const Samples<L> step = a.nesterov ? d + v * a.momentum : v;
    const uint32_t bits = a.step.mask[i / 32] >> i % 32;
    store<L>(a.velocity + i, kept<L>(v, bits));
    store<L>(a.step.weights + i, kept<L>(w - step * rate, bits));
}

template <int L>
DEVICE void update(const AdamWArgs& a, float rate, float scale, int64_t i) {
    const Samples<L> w = load<L>(a.step.weights + i);
    const Samples<L> g = load<L>(a.step.gradients + i) * scale;
    const Samples<L> first = load<L>(a.first + i) * a.beta1 + g * a.rest1;
    const Samples<L> second = load<L>(a.second + i) * a.beta2 + g * g * a.rest2;
    const Samples<L> root = square_root<L>(second) * a.corrections[1] + splat<L>(a.epsilon);
    const Samples<L> step = first * (rate * a.corrections[0]) / root;
    const uint32_t bits = a.step.mask[i / 32] >> i % 32;
    store<L>(a.first + i, kept<L>(first, bits));
    store<L>(a.second + i, kept<L>(second, bits));
    store<L>(a.step.weights + i, kept<L>(w - decay<L>(a.step, w, i) * rate - step, bits));
}

// The update of elements i..i+LANES, or those up to the arena's end.
template <class Args>
DEVICE void update_run(const Args& a, float rate, float scale, int64_t i) {
    if (i + LANES <= a.step.count) {
        update<LANES>(a, rate, scale, i);
    } else {
        for (int64_t tail = i; tail < a.step.count; ++tail) update<1>(a, rate, scale, tail);
    }
}

template <int L>
DEVICE float sum_of_squares(const GradientNormArgs& a, int64_t i) {
    const Samples<L> g = kept<L>(load<L>(a.gradients + i), a.mask[i / 32] >> i % 32);
    return lane_sum<L>(g * g);
}

KERNEL(optimizer_sgd_f32, SgdArgs, WarpSums, THREADS) {
    SHARED(WarpSums, shared);
    const float rate = *a.step.rate, scale = clip_scale(a.step, shared.scratch, threadIdx.x, blockDim.x);
    EACH(run, ceil_div(a.step.count, LANES)) update_run(a, rate, scale, run * LANES);
}

KERNEL(optimizer_adamw_f32, AdamWArgs, WarpSums, THREADS) {
    SHARED(WarpSums, shared);
    const float rate = *a.step.rate, scale = clip_scale(a.step, shared.scratch, threadIdx.x, blockDim.x);
    EACH(run, ceil_div(a.step.count, LANES)) update_run(a, rate, scale, run * LANES);
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
