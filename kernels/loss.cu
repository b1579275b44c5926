// loss.cu - softmax cross entropy with label smoothing, its gradient, and top-1 and top-5 counts.
//
//   z = logits - their maximum,  t = 1 - s + s/C for the label, s/C for the others   (s: smoothing)
//   loss    = mean over the true samples of  log(sum of exp z) - (1 - s) z[label] - s mean(z)
//   dlogits = (softmax - t) / count;  rank of the label = classes with a larger logit, and lower ones with an equal
//
// logits, dlogits: [C, N], Real; labels: [N]; loss, top1, top5: tables with a row per step, of which row *step is written.
// One block for all samples, each thread some of them: the sum over samples has one fixed order, and the results need
// no second kernel. A NaN logit, or a label that is no class, gives a NaN loss and counts as wrong. dlogits of padded
// samples are zero. Limit: latency and one multiprocessor's bandwidth; 3 reads and a write of [C, N], mostly in cache.
#include "kernels/lib/device.cuh"

struct LossShape {
    int32_t classes;
    int32_t n;  // samples, a multiple of 8
};

struct LossArgs {
    const Real* logits;
    const uint32_t* labels;
    const uint32_t* count;  // number of true samples
    const uint32_t* step;
    float* loss;
    uint32_t* top1;
    uint32_t* top5;
    Real* dlogits;          // or null
    LossShape shape;
    uint32_t rows;          // of the tables; a step past them writes nothing there
    float smoothing;
};

constexpr int THREADS = 512;

// What a thread adds up over its samples.
struct Score {
    float loss = 0.0f;
    uint32_t top1 = 0, top5 = 0;
};

struct Shared {
    float loss[32];
    uint32_t hits[32];
};

// Samples n to n + L - 1, of which the first `live` are true ones.
template <int L>
DEVICE void score(const LossArgs& a, int n, int live, float share, Score& total) {
    const int classes = a.shape.classes;
    const int64_t row = a.shape.n;
    const Real* logits = a.logits + n;
    Real* dlogits = a.dlogits ? a.dlogits + n : nullptr;

    float most[L], at_label[L];
    uint32_t label[L];
    UNROLL for (int i = 0; i < L; ++i) {
        label[i] = a.labels[n + i];
        at_label[i] = label[i] < uint32_t(classes) ? widen(logits[label[i] * row + i]) : NAN;
        most[i] = widen(logits[i]);
    }
    for (int c = 1; c < classes; ++c)
        UNROLL for (int i = 0; i < L; ++i) {
            const float logit = widen(logits[c * row + i]);
            most[i] = logit > most[i] ? logit : most[i];
        }

    // A NaN is lost in the maximum, but not in these sums: its exp is NaN too.
    float sum[L] = {}, z_sum[L] = {};
    uint32_t rank[L] = {};
    for (int c = 0; c < classes; ++c)
        UNROLL for (int i = 0; i < L; ++i) {
            const float logit = widen(logits[c * row + i]), z = logit - most[i], e = expf(z);
            sum[i] += e;
            z_sum[i] += z;
            const bool below = uint32_t(c) < label[i] ? logit < at_label[i] : logit <= at_label[i];
            rank[i] += uint32_t(c) != label[i] && !below;  // so a NaN ranks before everything
        }

    const float s = a.smoothing;
    UNROLL for (int i = 0; i < L; ++i) {
        if (i >= live) break;
        float loss = logf(sum[i]) - (1.0f - s) * (at_label[i] - most[i]);
        if (s > 0.0f) loss -= s * (z_sum[i] / classes);  // without smoothing a logit may be -inf
        total.loss += loss;
        total.top1 += rank[i] < 1;
        total.top5 += rank[i] < 5;
    }
    if (!dlogits) return;
    float scale[L];
    UNROLL for (int i = 0; i < L; ++i) scale[i] = 1.0f / sum[i];
    for (int c = 0; c < classes; ++c)
        UNROLL for (int i = 0; i < L; ++i) {
            const float target = (uint32_t(c) == label[i] ? 1.0f - s : 0.0f) + s / classes;
            const float e = expf(widen(logits[c * row + i]) - most[i]);
            put(dlogits + c * row + i, i < live ? (e * scale[i] - target) * share : 0.0f);
        }
}

DEVICE void write(const LossArgs& a, const Score& total, float share) {
    if (*a.step >= a.rows) return;
    a.loss[*a.step] = total.loss * share;
    a.top1[*a.step] = total.top1;
    a.top5[*a.step] = total.top5;
}

// One block, a sample a thread.
KERNEL(REAL(cross_entropy_staged), LossArgs, Shared, THREADS) {
    SHARED(Shared, shared);
    const int count = int(min64(*a.count, a.shape.n));
    const float share = 1.0f / max64(1, count);
    Score total;
    for (int n = threadIdx.x; n < a.shape.n; n += blockDim.x) score<1>(a, n, count - n, share, total);
    total.loss = block_sum(total.loss, shared.loss, threadIdx.x, blockDim.x);
    total.top1 = block_sum(total.top1, shared.hits, threadIdx.x, blockDim.x);
    total.top5 = block_sum(total.top5, shared.hits, threadIdx.x, blockDim.x);
    if (threadIdx.x == 0) write(a, total, share);
}

// One thread, a vector of samples at a time: it reads whole cache lines.
BARRIER_FREE_KERNEL(REAL(cross_entropy_direct), LossArgs, 1) {
    const int count = int(min64(*a.count, a.shape.n));
    const float share = 1.0f / max64(1, count);
    Score total;
    for (int n = 0; n < a.shape.n; n += ROW_LANES) score<ROW_LANES>(a, n, count - n, share, total);
    write(a, total, share);
}
