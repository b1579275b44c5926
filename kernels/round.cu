// round.cu - the weights that are trained, rounded to bf16 in the order that products read them: all, or kept ones.
//
//   to[k, r, s, c] = from[k, c, r, s]
//   to[i] = from[places[i]]
//
// from: [K, C, R, S], f32; to: [K, R, S, channels], as weight_strides of conv.cuh says, zeros where a filter is padded. One
// launch for all layers: grid y counts them. Limit: bytes, 4 read and 2 written a weight.
#include "kernels/conv.cuh"

struct RoundLayerArgs {
    int64_t from, to;  // offsets of the layer in both arenas
    int64_t filter;    // elements of a filter in `to`, padding included
    int32_t k, c;
    int32_t taps;      // r * s
    int32_t pitch;     // channels of a tap in `to`, padding included
};

struct RoundWeightsArgs {
    const float* from;
    bf16* to;
    const RoundLayerArgs* layers;
};

struct GatherWeightsArgs {
    const float* from;       // [K, C, R, S], or its kept weights alone
    const uint32_t* places;  // [count] in `from`, or NONE: zero
    bf16* to;                // [count]
    int64_t count;
};

constexpr int THREADS = 256;

// Grid: blocks that share a layer, layers.
BARRIER_FREE_KERNEL(round_weights_bf16, RoundWeightsArgs, THREADS) {
    const RoundLayerArgs d = a.layers[blockIdx.y];
    EACH(i, d.k * d.filter) {
        const int64_t k = i / d.filter;
        const int at = int(i - k * d.filter), tap = at / d.pitch, c = at - tap * d.pitch;
        const bool there = tap < d.taps && c < d.c;
        a.to[d.to + i] = round_to_bf16(there ? a.from[d.from + (k * d.c + c) * d.taps + tap] : 0.0f);
    }
}

BARRIER_FREE_KERNEL(gather_weights_bf16, GatherWeightsArgs, THREADS) {
    EACH(i, a.count) a.to[i] = round_to_bf16(a.places[i] == NONE ? 0.0f : a.from[a.places[i]]);
}
