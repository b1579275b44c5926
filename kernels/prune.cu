// prune.cu - exact magnitude selection, and the algebra of masks.
//
// Selection clears the mask bits of exactly `remove` live weights: smallest |w| first, equal ones by lowest index. It
// is a radix select. The key of a weight is the 31 bits of |w|, whose order as an integer is that of the magnitudes
// (-0 equals 0, subnormals are distinct). Each round finds one more digit of the threshold, the key of the last weight
// to go:
//
//   histogram: of the live keys that begin as the threshold does, count each next digit (11, 10 and 10 bits)
//   pick:      the digit under which the weight of rank `left` falls; left -= what lies below it
//
// After three rounds `left` is how many weights with the threshold's key go. A fourth round does the same with the
// block of the weights in place of a digit (ties, pick): in the blocks before the picked one all ties go, in it the
// first `left`, after it none. So only that block needs its ties in order. Nothing waits for another block, and the
// host learns nothing in between: what it may ask afterwards is left in the scratch. All sums are of integers, so no
// order of threads or blocks changes a bit.
//
// weights: [elements] f32. live, mask, and the words of the algebra: bit i is bit i % 32 of word i / 32. A block of
// the passes over weights owns `part` consecutive elements, a multiple of 64; its threads hold LANES elements of one
// mask word at a time. Bits past the last element are neither read as live nor changed. A weight whose live bit is
// clear is not looked at, whatever it holds.
// Limit: bytes, one read of the weights a pass, and five passes (three digits, ties, clear); the first is held up by
// shared-memory atomics where many weights share a digit.
#define DILT_NO_ARRAYS
#include "kernels/lib/device.cuh"

constexpr int THREADS = 256;
constexpr int DIGITS = 3;
constexpr int LOW_BITS = 10;             // of the second and third digit; the first has 11
constexpr int BINS = 1 << (31 - 2 * LOW_BITS);
constexpr uint32_t INFINITE = 0x7f800000u;  // larger keys are NaN

// What the passes hand on, at the start of the scratch; after it, for each block, the number of its weights whose key
// is the threshold. The host reads the first five words (prune_report in src/ops/prune.rs).
struct PruneState {
    uint32_t live;        // weights to choose from
    uint32_t nan;         // one of them is NaN
    uint32_t remove;      // weights to remove
    uint32_t active;      // there is something to remove, and no reason to refuse
    uint32_t key;         // the digits of the threshold that are known
    uint32_t left;        // rank sought among the weights that begin so
    uint32_t last_block;  // the block of the last tie to go
    uint32_t unused;
    uint32_t bins[DIGITS][BINS];
};
constexpr int STATE_WORDS = 8 + DIGITS * BINS;
static_assert(sizeof(PruneState) == 4 * STATE_WORDS, "src/ops/prune.rs counts so");

struct PruneArgs {
    const float* weights;    // [elements]
    const uint32_t* live;    // [elements / 32, rounded up]
    uint32_t* mask;          // the same
    uint32_t* scratch;       // [STATE_WORDS + blocks], zero before the first pass
    int64_t elements;
    int64_t part;            // elements of a block
    int32_t blocks;
    int32_t round;           // 0, 1, 2: digits; 3: blocks
    uint32_t remove;
};

struct ApplyMaskArgs {
    const uint32_t* mask;  // [elements / 32, rounded up]
    float* values;         // [elements]
    int64_t elements;
};

struct MaskCombineArgs {
    const uint32_t* x;  // [words]
    const uint32_t* y;  // [words]
    uint32_t* out;      // [words]
    int64_t words;
    int32_t op;         // MaskOp of src/ops/prune.rs
};

struct MaskConsensusArgs {
    const uint32_t* stack;  // [masks, words]
    uint32_t* out;          // [words]
    int64_t words;
    int32_t masks;
    int32_t at_least;
};

struct MaskCountsArgs {
    const uint32_t* mask;    // [words]
    const uint32_t* ranges;  // [ranges, 2]: first word, number of words
    uint32_t* counts;        // [ranges]
    int64_t words;
};

DEVICE PruneState& state(const PruneArgs& a) { return *reinterpret_cast<PruneState*>(a.scratch); }
DEVICE uint32_t* ties_of_blocks(const PruneArgs& a) { return a.scratch + STATE_WORDS; }

// Calls visit(lane, key) for each live element of i..i+LANES, in order.
template <class Visit>
DEVICE void each_live(const PruneArgs& a, int64_t i, const Visit& visit) {
    uint32_t bits = a.live[i / 32] >> i % 32;
    const int64_t left = a.elements - i;
    if (left < LANES) bits &= (1u << left) - 1;
    if ((bits & ((1u << LANES) - 1)) == 0) return;
    Samples<LANES> w;
    if (left >= LANES) {
        w = load<LANES>(a.weights + i);
    } else {
        UNROLL for (int lane = 0; lane < LANES; ++lane) w[lane] = lane < left ? a.weights[i + lane] : 0.0f;
    }
    UNROLL for (int lane = 0; lane < LANES; ++lane)
        if (bits >> lane & 1) visit(lane, __float_as_uint(w[lane]) & 0x7fffffffu);
}

// Clears chosen bits of i..i+LANES. Other threads own other bits of the word, hence the atomic.
DEVICE void clear(const PruneArgs& a, int64_t i, uint32_t chosen) {
    if (chosen != 0) atomicAnd(a.mask + i / 32, ~(chosen << i % 32));
}

// The sum over the threads before this one; `sums` holds one of each thread.
DEVICE uint32_t sum_before(uint32_t own, uint32_t* sums, uint32_t thread) {
    sums[thread] = own;
    __syncthreads();
    uint32_t before = 0;
    for (uint32_t t = 0; t < thread; ++t) before += sums[t];
    return before;
}

struct Histogram {
    uint32_t bins[BINS];
};

struct ThreadSums {
    uint32_t own[THREADS];
};

KERNEL(prune_histogram, PruneArgs, Histogram, THREADS) {
    SHARED(Histogram, shared);
    PruneState& s = state(a);
    if (a.round > 0 && !s.active) return;
    for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x) shared.bins[bin] = 0;
    __syncthreads();
    const bool first = a.round == 0;
    const int shift = (DIGITS - 1 - a.round) * LOW_BITS;
    const uint32_t digit = first ? BINS - 1 : (1u << LOW_BITS) - 1, above = first ? 0 : s.key;
    const int above_shift = first ? 31 : shift + LOW_BITS;  // a key has 31 bits: nothing lies above its first digit
    bool nan = false;
    const int64_t end = min64((blockIdx.x + 1) * a.part, a.elements);
    for (int64_t i = blockIdx.x * a.part + threadIdx.x * LANES; i < end; i += blockDim.x * LANES)
        each_live(a, i, [&](int, uint32_t key) {
            nan |= key > INFINITE;
            if (key >> above_shift == above) atomicAdd(&shared.bins[key >> shift & digit], 1u);
        });
    if (nan) atomicOr(&s.nan, 1u);
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x)
        if (shared.bins[bin] != 0) atomicAdd(&s.bins[a.round][bin], shared.bins[bin]);
}

// One block. Each thread adds up a range of the counts; the one in whose range the rank falls walks through it.
KERNEL(prune_pick, PruneArgs, ThreadSums, THREADS) {
    SHARED(ThreadSums, shared);
    PruneState& s = state(a);
    const bool first = a.round == 0, digit = a.round < DIGITS;
    if (!first && !s.active) return;
    const uint32_t key = first ? 0 : s.key;
    uint32_t left = first ? a.remove : s.left;
    const uint32_t* counts = digit ? s.bins[a.round] : ties_of_blocks(a);
    const uint32_t total = digit ? BINS : a.blocks, range = (total + blockDim.x - 1) / blockDim.x;
    const uint32_t begin = threadIdx.x * range;
    const uint32_t end = begin + range < total ? begin + range : total;
    uint32_t own = 0;
    for (uint32_t i = begin; i < end; ++i) own += counts[i];
    const uint32_t before = sum_before(own, shared.own, threadIdx.x);
    if (first && threadIdx.x == blockDim.x - 1) {
        s.live = before + own;
        s.remove = a.remove;
        s.active = a.remove > 0 && a.remove <= before + own && s.nan == 0;
    }
    if (left <= before || left - before > own) return;
    left -= before;
    uint32_t i = begin;
    while (left > counts[i]) left -= counts[i++];
    if (digit) {
        s.key = key << LOW_BITS | i;
    } else {
        s.last_block = i;
    }
    s.left = left;
}

KERNEL(prune_ties, PruneArgs, WarpSums, THREADS) {
    SHARED(WarpSums, shared);
    PruneState& s = state(a);
    if (!s.active) return;
    const uint32_t threshold = s.key;
    uint32_t ties = 0;
    const int64_t end = min64((blockIdx.x + 1) * a.part, a.elements);
    for (int64_t i = blockIdx.x * a.part + threadIdx.x * LANES; i < end; i += blockDim.x * LANES)
        each_live(a, i, [&](int, uint32_t key) { ties += key == threshold; });
    ties = block_sum(ties, reinterpret_cast<uint32_t*>(shared.scratch), threadIdx.x, blockDim.x);
    if (threadIdx.x == 0) ties_of_blocks(a)[blockIdx.x] = ties;
}

KERNEL(prune_clear, PruneArgs, ThreadSums, THREADS) {
    SHARED(ThreadSums, shared);
    const PruneState& s = state(a);
    if (!s.active) return;
    const uint32_t threshold = s.key, left = s.left;
    const int64_t first = blockIdx.x * a.part, end = min64(first + a.part, a.elements);
    const bool all_ties = blockIdx.x < s.last_block;
    for (int64_t i = first + threadIdx.x * LANES; i < end; i += blockDim.x * LANES) {
        uint32_t chosen = 0;
        each_live(a, i, [&](int lane, uint32_t key) {
            chosen |= uint32_t(key < threshold || (all_ties && key == threshold)) << lane;
        });
        clear(a, i, chosen);
    }
    if (blockIdx.x != s.last_block) return;
    // The ties of this block, in order: each thread has a range of it.
    const int64_t range = ceil_div(a.part / LANES, blockDim.x) * LANES;
    const int64_t mine = first + threadIdx.x * range, mine_end = min64(mine + range, end);
    uint32_t ties = 0;
    for (int64_t i = mine; i < mine_end; i += LANES)
        each_live(a, i, [&](int, uint32_t key) { ties += key == threshold; });
    uint32_t rank = sum_before(ties, shared.own, threadIdx.x);
    for (int64_t i = mine; i < mine_end; i += LANES) {
        uint32_t chosen = 0;
        each_live(a, i, [&](int lane, uint32_t key) {
            if (key == threshold) chosen |= uint32_t(rank++ < left) << lane;
        });
        clear(a, i, chosen);
    }
}

BARRIER_FREE_KERNEL(mask_apply_f32, ApplyMaskArgs, THREADS) {
    const uint32_t* RESTRICT mask = a.mask;
    float* RESTRICT values = a.values;
    const int64_t elements = a.elements;
    EACH(run, ceil_div(elements, LANES)) {
        const int64_t i = run * LANES;
        const uint32_t bits = mask[i / 32] >> i % 32;
        if (i + LANES <= elements) {
            store<LANES>(values + i, kept<LANES>(load<LANES>(values + i), bits));
        } else {
            for (int lane = 0; lane < elements - i; ++lane)
                if (!(bits >> lane & 1)) values[i + lane] = 0.0f;
        }
    }
}

BARRIER_FREE_KERNEL(mask_combine, MaskCombineArgs, THREADS) {
    const uint32_t* RESTRICT x = a.x;
    const uint32_t* RESTRICT y = a.y;
    uint32_t* RESTRICT out = a.out;
    const int op = a.op;
    EACH(i, a.words) out[i] = op == 0 ? x[i] & y[i] : op == 1 ? x[i] | y[i] : op == 2 ? x[i] & ~y[i] : x[i] ^ y[i];
}

BARRIER_FREE_KERNEL(mask_consensus, MaskConsensusArgs, THREADS) {
    EACH(i, a.words) {
        uint32_t agreed = 0;
        for (int bit = 0; bit < 32; ++bit) {
            int votes = 0;
            for (int mask = 0; mask < a.masks; ++mask) votes += a.stack[mask * a.words + i] >> bit & 1;
            agreed |= uint32_t(votes >= a.at_least) << bit;
        }
        a.out[i] = agreed;
    }
}

// One block per range. A range that leaves the mask is not read, and its count is impossible.
KERNEL(mask_counts, MaskCountsArgs, WarpSums, THREADS) {
    SHARED(WarpSums, shared);
    const uint32_t first = a.ranges[2 * blockIdx.x], number = a.ranges[2 * blockIdx.x + 1];
    const bool inside = int64_t(first) + number <= a.words;
    uint32_t count = 0;
    for (uint32_t i = threadIdx.x; inside && i < number; i += blockDim.x) count += __popc(a.mask[first + i]);
    count = block_sum(count, reinterpret_cast<uint32_t*>(shared.scratch), threadIdx.x, blockDim.x);
    if (threadIdx.x == 0) a.counts[blockIdx.x] = inside ? count : 0xffffffffu;
}
