// dropout.cu - what training leaves out at random: single elements (dropout, Srivastava et al. 2014), and whole branches
// at residual sums (stochastic depth, Huang et al. 2016), there with layer scale (Touvron et al. 2021).
//
//   keep = 0 with probability `rate`, else 1 / (1 - rate)
//   dropout:   y = keep(element) x;   dx = keep(element) dy
//   residual:  y = x + keep(sample) gamma branch;   dbranch = keep(sample) gamma dy
//              dgamma = sum over the columns of a feature of keep(sample) dy branch
//
// Everything is drawn from philox(seed, step, stream and place), so that the backward pass draws the same again, whatever
// the vectors of a machine. The counter's words: step, purpose, place, stream, where augment.cu leaves the second 0. Of
// a sample the purpose is 1 and word 0 of the four decides; of elements 4 i to 4 i + 3 it is 2, and a word each decides.
//
// Dropout: vectors of any shape, a multiple of 8 elements. Residual: x, y, branch and their gradients [D, columns], Real;
// gamma, dgamma: [D], f32. Padded columns stay zero, since all summands are. A block owns ROWS features: a draw serves
// them all, and the sum of a feature is its block's, in an order that depends on the shape and the threads of the block.
// Limit: bytes, each tensor touched once; of dropout on the host the arithmetic of Philox.
#include "kernels/lib/device.cuh"

struct DropArgs {
    const uint32_t* step;  // [1]; null: nothing is left out
    uint64_t seed;
    uint32_t stream;
    uint32_t below;  // words below this drop: 2^32 rate
    float scale;     // 1 / (1 - rate)
};

struct DropoutArgs {
    const Real* from;
    Real* to;
    int64_t length;
    DropArgs drop;
};

struct ResidualShape {
    int32_t features;
    Columns columns;
};

struct ResidualForwardArgs {
    const Real* x;
    const Real* branch;
    const float* gamma;  // null: 1
    Real* y;
    ResidualShape shape;
    DropArgs drop;
};

struct ResidualBackwardArgs {
    const Real* branch;  // read for dgamma only
    const Real* dy;
    const float* gamma;  // null: 1
    float* dgamma;       // or null
    Real* dbranch;
    ResidualShape shape;
    DropArgs drop;
};

constexpr int THREADS = 256;
constexpr int ROWS = 2;
constexpr uint64_t SAMPLE = 1, ELEMENT = 2;  // purposes

// The random words of a place. Places past 2^32 count on in the word of the purpose.
DEVICE Philox draw(const DropArgs& drop, uint64_t purpose, uint64_t place) {
    return philox(drop.seed, (purpose + (place >> 32 << 2)) << 32 | *drop.step,
                  uint64_t(drop.stream) << 32 | uint32_t(place));
}

DEVICE float keep(const DropArgs& drop, uint32_t word) { return word < drop.below ? 0.0f : drop.scale; }

template <int L>
DEVICE void drop_elements(const DropoutArgs& a, int64_t first) {
    Samples<L> keeps;
    UNROLL for (int i = 0; i < L; i += 4) {
        const Philox random = draw(a.drop, ELEMENT, uint64_t(first + i) / 4);
        UNROLL for (int word = 0; word < 4; ++word) keeps[i + word] = keep(a.drop, random.word[word]);
    }
    store<L>(a.to + first, load<L>(a.from + first) * keeps);
}

// Forward: x to y. Backward: dy to dx.
BARRIER_FREE_KERNEL(REAL(dropout), DropoutArgs, THREADS) {
    EACH(i, a.length / ROW_LANES) drop_elements<ROW_LANES>(a, i * ROW_LANES);
}

// Walks over the columns of a row, `step` apart, and tells what is kept of each sample's branch.
template <int L>
struct Walk {
    const Columns& columns;
    const DropArgs& drop;
    int sample, token;          // of the first column of the vector
    int samples, tokens;        // of a step
    int drawn = -1;             // the sample that `kept` is of
    float kept = 1.0f;

    DEVICE Walk(const Columns& columns, const DropArgs& drop, int first, int step)
        : columns(columns), drop(drop), sample(first / columns.row), token(first - sample * columns.row),
          samples(step / columns.row), tokens(step - samples * columns.row) {}

    DEVICE float keep_of(int of) {
        if (of != drawn) drawn = of, kept = keep(drop, draw(drop, SAMPLE, uint64_t(of)).word[0]);
        return kept;
    }

    DEVICE Samples<L> keeps() {
        if (!drop.step) return splat<L>(1.0f);
        if (token + L <= columns.row) return splat<L>(keep_of(sample));
        Samples<L> each;
        int of = sample, at = token;
        UNROLL for (int i = 0; i < L; ++i) {
            each[i] = keep_of(of);
            if (++at == columns.row) at = 0, ++of;
        }
        return each;
    }

    DEVICE void next() {
        sample += samples, token += tokens;
        if (token >= columns.row) token -= columns.row, ++sample;
    }
};

// Calls f(row, column, keeps, i) for this thread's vectors of the block's rows, of which this is the i-th.
template <int L, class F>
DEVICE void each_vector(const ResidualShape& d, const DropArgs& drop, dim3 block, dim3 grid, uint32_t thread,
                        uint32_t threads, F f) {
    const int columns = d.columns.n * d.columns.row, row = int(block.x) * ROWS;
    const int step = int(grid.y * threads) * L, first = int(block.y * threads + thread) * L;
    Walk<L> walk(d.columns, drop, first, step);
    for (int64_t column = first; column < columns; column += step) {
        const Samples<L> keeps = walk.keeps();
        UNROLL for (int i = 0; i < ROWS; ++i)
            if (row + i < d.features) f(row + i, int64_t(row + i) * columns + column, keeps, i);
        walk.next();
    }
}

template <int L>
DEVICE void residual(const ResidualForwardArgs& a, dim3 block, dim3 grid, uint32_t thread, uint32_t threads) {
    each_vector<L>(a.shape, a.drop, block, grid, thread, threads,
                   [&](int row, int64_t at, const Samples<L>& keeps, int) {
                       const float gamma = a.gamma ? a.gamma[row] : 1.0f;
                       store<L>(a.y + at, load<L>(a.x + at) + load<L>(a.branch + at) * (keeps * gamma));
                   });
}

template <int L>
DEVICE void residual_gradient(const ResidualBackwardArgs& a, WarpSums& shared, dim3 block, dim3 grid, uint32_t thread,
                              uint32_t threads) {
    Samples<L> sum[ROWS];
    UNROLL for (int i = 0; i < ROWS; ++i) sum[i] = splat<L>(0.0f);
    each_vector<L>(a.shape, a.drop, block, grid, thread, threads,
                   [&](int row, int64_t at, const Samples<L>& keeps, int i) {
                       const Samples<L> kept_dy = load<L>(a.dy + at) * keeps;
                       if (a.dgamma) sum[i] += kept_dy * load<L>(a.branch + at);
                       store<L>(a.dbranch + at, kept_dy * (a.gamma ? a.gamma[row] : 1.0f));
                   });
    if (!a.dgamma) return;
    UNROLL for (int i = 0; i < ROWS; ++i) {
        const float total = block_sum(lane_sum<L>(sum[i]), shared.scratch, thread, threads);
        const int row = int(block.x) * ROWS + i;
        if (thread == 0 && row < a.shape.features) a.dgamma[row] = total;
    }
}

// Whole vectors of the machine where they cut the columns evenly.
#define WITH_LANES(body, ...)                                                                    \
    if (LANES == ROW_LANES || a.shape.columns.n * a.shape.columns.row % LANES == 0)             \
        body<LANES>(__VA_ARGS__);                                                                \
    else                                                                                         \
        body<ROW_LANES>(__VA_ARGS__)

// Grid of both: groups of ROWS features, pieces of the columns; with dgamma one piece.
BARRIER_FREE_KERNEL(REAL(residual_forward), ResidualForwardArgs, THREADS) {
    WITH_LANES(residual, a, blockIdx, gridDim, threadIdx.x, blockDim.x);
}

KERNEL(REAL(residual_backward), ResidualBackwardArgs, WarpSums, THREADS) {
    SHARED(WarpSums, shared);
    WITH_LANES(residual_gradient, a, shared, blockIdx, gridDim, threadIdx.x, blockDim.x);
}
