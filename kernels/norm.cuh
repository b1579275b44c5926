// norm.cuh - what the kernels of batch norm (norm.cu, norm_pair.cu, norm_join.cu) share with the epilogues of convolutions
// (conv_mma.cuh), which sum for them what they store: mean and squared deviations of a feature's row, from those of the parts
// that it is cut into, and the sums of its gradient; and how a tensor is normalised.
#pragma once
#include "kernels/lib/device.cuh"

struct Moments {
    float mean;
    float squares;  // the sum of squared deviations from it
};

// What dbeta and dgamma are made of.
struct GradientSums {
    float dz;
    float dz_xhat;
};

// A tensor as a batch norm maps it: gamma (x - mean) invstd + beta.
struct NormalisedArgs {
    const Real* x;
    const float* gamma;
    const float* beta;
    const float* mean;
    const float* invstd;
};

// The same of a feature. The mean is taken off first, since beta - mean scale would cancel.
struct Normaliser {
    float mean = 0.0f, invstd = 0.0f, scale = 0.0f, beta = 0.0f;

    Normaliser() = default;
    DEVICE Normaliser(float mean, float invstd, float gamma, float beta)
        : mean(mean), invstd(invstd), scale(gamma * invstd), beta(beta) {}
    DEVICE Normaliser(const NormalisedArgs& a, int feature)
        : Normaliser(a.mean[feature], a.invstd[feature], a.gamma[feature], a.beta[feature]) {}

    // What comes of what lies `off` from the mean.
    template <int L>
    DEVICE Samples<L> apply(const Samples<L>& off) const {
        return off * scale + beta;
    }
};

// dz of L values of dy, given what ReLU was applied to, or what it made of that.
template <int L>
DEVICE Samples<L> through_relu(const Samples<L>& dy, const Samples<L>& z) {
    const Samples<L> zero = splat<L>(0.0f);
    return where_at_most<L>(z, zero, zero, dy);
}

// How many of a row's first `columns`, of pixels of n samples each, are of one of `count` true samples.
DEVICE int true_columns(int columns, int n, int count) { return columns / n * count + min32(columns % n, count); }

// Of values whose deviations from `mean`, about their mean, sum to `left` and squared to `squares`. They would sum to zero but
// for the rounding of the mean: what is left corrects both.
DEVICE Moments corrected(float mean, float left, float squares, float items) {
    const float correction = left / items;
    squares -= left * correction;
    return {mean + correction, squares < 0.0f ? 0.0f : squares};  // NaN stays NaN
}

// Chan, Golub and LeVeque 1983, for all of a row's parts at once: means around the first, then squares around the mean.
// Part s is of items_of(s) values, all together of `items`.
template <class ItemsOf>
DEVICE Moments join(const Moments* parts, int count, float items, ItemsOf items_of, float* scratch, uint32_t thread,
                    uint32_t threads) {
    const float pivot = parts[0].mean;
    float shift = 0.0f, squares = 0.0f;
    for (int s = thread; s < count; s += threads) shift += items_of(s) * (parts[s].mean - pivot);
    const float mean = pivot + block_sum(shift, scratch, thread, threads) / items;
    for (int s = thread; s < count; s += threads) {
        const float off = parts[s].mean - mean;
        squares += parts[s].squares + items_of(s) * (off * off);
    }
    return {mean, block_sum(squares, scratch, thread, threads)};
}

// The sums of a row, of those of its parts.
DEVICE GradientSums join(const GradientSums* parts, int count, float* scratch, uint32_t thread, uint32_t threads) {
    GradientSums all = {0.0f, 0.0f};
    for (int s = thread; s < count; s += threads) all.dz += parts[s].dz, all.dz_xhat += parts[s].dz_xhat;
    all.dz = block_sum(all.dz, scratch, thread, threads);
    all.dz_xhat = block_sum(all.dz_xhat, scratch, thread, threads);
    return all;
}

// Writes what a batch norm keeps of its batch: what normalises, and the running statistics, which a batch without samples
// leaves as they are.
template <class Args>
DEVICE void keep(const Args& a, int feature, int count, float items, const Moments& row, float invstd) {
    a.mean[feature] = row.mean;
    a.invstd[feature] = invstd;
    if (count == 0) return;
    const float kept = 1.0f - a.momentum, unbiased = row.squares / (items > 1.0f ? items - 1.0f : 1.0f);
    a.running_mean[feature] = kept * a.running_mean[feature] + a.momentum * row.mean;
    a.running_var[feature] = kept * a.running_var[feature] + a.momentum * unbiased;
}
