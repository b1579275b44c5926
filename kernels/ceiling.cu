// ceiling.cu - how fast a device copies and multiplies at best: what other kernels are measured against.
//
//   copy:            to = from
//   multiply_add:    y = sum over CHAINS chains, each of STEPS `rounds` steps v = v * factor + addend from x + its number
//   multiply_tiles:  sum = `rounds` times left right^T, by each warp for itself, on tensor cores
//
// from, to, x, y: [count] f32, a multiple of LANES. left: [ROWS, 16], right: [COLUMNS, 16], bf16; sum: [warps, ROWS,
// COLUMNS] f32. A chain is a vector in registers, and so are the tiles of a warp: enough of them that none waits for the one
// before it, and nothing else is done meanwhile. The copies are ordinary loads and stores, as all kernels' are: a host
// that reads a line before it writes to it moves half as much again as is counted.
// mma.sync is what tensor cores of sm_80 do at best; those of sm_90 do more with wgmma (ceiling_wgmma.cu).
// Limit: copy bytes, the others arithmetic. Not measured on a GPU yet.
#define DILT_NO_ARRAYS
#include "kernels/lib/mma.cuh"

struct CeilingCopyArgs {
    const float* from;  // [count]
    float* to;          // [count]
    int64_t count;
};

struct MultiplyAddArgs {
    const float* x;  // [count]
    float* y;        // [count]
    int64_t count;
    int32_t rounds;
    float factor;
    float addend;
};

struct MultiplyTilesArgs {
    const uint32_t* left;   // [ROWS, 8]: pairs of bf16
    const uint32_t* right;  // [COLUMNS, 8]: pairs of bf16
    float* sum;             // [warps, ROWS, COLUMNS]
    int32_t rounds;
};

constexpr int THREADS = 256;
constexpr int CHAINS = 8;  // two additions a cycle, of four cycles each
constexpr int STEPS = 16;  // of a chain between two tests of the loop
constexpr int LEFTS = 2, RIGHTS = 8;  // tiles of a warp: 16 independent sums
constexpr int ROWS = 16 * LEFTS, COLUMNS = 8 * RIGHTS;

BARRIER_FREE_KERNEL(ceiling_copy_f32, CeilingCopyArgs, THREADS) {
    EACH(i, a.count / LANES) store<LANES>(a.to + i * LANES, load<LANES>(a.from + i * LANES));
}

BARRIER_FREE_KERNEL(ceiling_multiply_add_f32, MultiplyAddArgs, THREADS) {
    EACH(i, a.count / LANES) {
        const Samples<LANES> x = load<LANES>(a.x + i * LANES);
        Samples<LANES> chain[CHAINS];
        UNROLL for (int c = 0; c < CHAINS; ++c) chain[c] = x + float(c);
        for (int round = 0; round < a.rounds; ++round)
            UNROLL for (int step = 0; step < STEPS; ++step)
                UNROLL for (int c = 0; c < CHAINS; ++c) chain[c] = chain[c] * a.factor + a.addend;
        UNROLL for (int c = 1; c < CHAINS; ++c) chain[0] += chain[c];
        store<LANES>(a.y + i * LANES, chain[0]);
    }
}

// Grid: blocks, of whose THREADS / 32 warps each has a sum.
KERNEL(ceiling_multiply_tiles_bf16, MultiplyTilesArgs, NoShared, THREADS, 2) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;
    LeftTile left[LEFTS];
    UNROLL for (int i = 0; i < LEFTS; ++i)
        UNROLL for (int e = 0; e < 4; ++e) left[i].word[e] = a.left[(16 * i + g + e % 2 * 8) * 8 + t + e / 2 * 4];
    RightTile right[RIGHTS];
    UNROLL for (int j = 0; j < RIGHTS; ++j)
        UNROLL for (int e = 0; e < 2; ++e) right[j].word[e] = a.right[(8 * j + g) * 8 + t + e * 4];
    SumTile sum[LEFTS][RIGHTS];
    UNROLL for (int i = 0; i < LEFTS; ++i) clear(sum[i]);
    for (int round = 0; round < a.rounds; ++round)
        UNROLL for (int i = 0; i < LEFTS; ++i)
            UNROLL for (int j = 0; j < RIGHTS; ++j) multiply_add(lane, sum[i][j], left[i], right[j]);
    float* own = a.sum + (int64_t(blockIdx.x) * (THREADS / 32) + warp) * ROWS * COLUMNS;
    UNROLL for (int i = 0; i < LEFTS; ++i)
        UNROLL for (int j = 0; j < RIGHTS; ++j)
            UNROLL for (int e = 0; e < 4; ++e)
                own[(16 * i + g + e / 2 * 8) * COLUMNS + 8 * j + 2 * t + e % 2] = sum[i][j].value[e];
}
