// attention.cuh - scaled dot product attention of many heads, fused, forward and backward.
//
//   S[i,j] = scale * sum over d of Q[d,i] K[d,j]   P[i,j] = exp(S[i,j] - lse[i])   lse[i] = log of sum over j of exp S[i,j]
//   Y[d,i] = sum over j of P[i,j] V[d,j]
//   delta[i] = sum over d of dY[d,i] Y[d,i]   dS[i,j] = P[i,j] (sum over d of dY[d,i] V[d,j] - delta[i])
//   dQ[d,i] = scale * sum over j of dS[i,j] K[d,j]   dK[d,j] = scale * sum over i of dS[i,j] Q[d,i]
//   dV[d,j] = sum over i of P[i,j] dY[d,i]           i: queries, j: keys, both the true tokens of one sample
//
// qkv, dqkv: [3, heads, head_dim, N, T padded]; y, dy: [heads, head_dim, N, T padded], all Real; lse, delta:
// [heads, N, T padded], f32, as are S, P, dS and every sum.
// Padded tokens and samples are zero in qkv and dy, and written as zeros in y and dqkv; so are heads whose `live` is 0.
//
// No matrix of T x T is in memory: scores are made tile by tile, with a running maximum and sum in the forward pass
// (Milakov and Gimelshein 2018), again from lse in the backward pass (Dao et al. 2022). Sums have an order that depends
// on the shape and the policy alone. Limit: FLOPs. On a GPU attention.cu and, in bf16, attention_mma.cu; on the
// host attention_direct.cu.
#pragma once
#include "kernels/lib/device.cuh"

struct AttentionShape {
    int32_t heads;
    int32_t head_dim;  // 1 to 128
    Columns columns;   // of a feature row
};

struct AttentionForwardArgs {
    const Real* qkv;
    const uint32_t* live;   // [heads]
    const uint32_t* count;  // number of true samples
    float* lse;             // or null
    Real* y;
    AttentionShape shape;
    float scale;
};

struct AttentionBackwardArgs {
    const Real* qkv;
    const uint32_t* live;
    const uint32_t* count;
    const Real* y;
    const float* lse;
    const Real* dy;
    float* delta;  // staged: written by the queries' kernel, read by the keys'
    Real* dqkv;
    AttentionShape shape;
    float scale;
};

constexpr int MOST_HEAD_DIM = 128;
enum Part { QUERY, KEY, VALUE };

// Distance from a row to the next of the same head and sample.
DEVICE int64_t stride_of(const AttentionShape& d) { return int64_t(d.columns.n) * d.columns.row; }

// Where the rows of a head of a sample begin, in qkv and dqkv; in y and dy as those of the queries.
DEVICE int64_t rows_of(const AttentionShape& d, Part part, int head, int sample) {
    return int64_t(part * d.heads + head) * d.head_dim * stride_of(d) + int64_t(sample) * d.columns.row;
}

// Where the statistics of a head of a sample begin.
DEVICE int64_t statistics_of(const AttentionShape& d, int head, int sample) {
    return head * stride_of(d) + int64_t(sample) * d.columns.row;
}
