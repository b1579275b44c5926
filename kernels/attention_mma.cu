// attention_mma.cu - attention on tensor cores, bf16 with f32 sums: the formulas and the kernels of attention.cu.
//
// A block owns 64 queries, or keys in the second kernel of the backward pass, of a head of a sample, each of its four warps
// 16 of them, whose scores and results it keeps in registers. The others come in tiles, each while the one before is
// multiplied. Probabilities and their gradients are rounded to bf16 where they are multiplied again (as in Dao 2023, arXiv
// 2307.08691); the sum of a query's exponentials is of unrounded ones. Features beyond the head's are zeros.
//
// Limit: tensor cores and exponentials; not measured yet.
#include "kernels/attention.cuh"
#include "kernels/lib/mma.cuh"

constexpr int THREADS = 128;
constexpr int OWN = 64;     // columns of a block; of a warp 16
constexpr int SPACE = 8;    // elements between the rows of a tile
constexpr int CHUNK = 8;    // elements of a copy

template <int HEAD_DIM>
struct Tile {
    // Of the others, at a time: fewer for large heads, whose sums take the registers.
    static constexpr int OTHER = HEAD_DIM <= 64 ? 64 : 32;
    static constexpr int OWN_PITCH = OWN + SPACE, PITCH = OTHER + SPACE;
    static constexpr int SCORES = OTHER / 8, FEATURES = HEAD_DIM / 8;
    static constexpr int COPIES = HEAD_DIM * OTHER / CHUNK / THREADS;  // of a thread, of one tile of the others
};

template <int HEAD_DIM>
struct ForwardTiles {
    using T = Tile<HEAD_DIM>;
    bf16 q[HEAD_DIM][T::OWN_PITCH];
    bf16 other[2][2][HEAD_DIM][T::PITCH];  // k and v, twice
};

// Queries' kernel: own are q and dy, others k and v. Keys' kernel: own are k and v, others q and dy.
template <int HEAD_DIM>
struct BackwardTiles {
    using T = Tile<HEAD_DIM>;
    bf16 own[2][HEAD_DIM][T::OWN_PITCH];
    bf16 other[2][2][HEAD_DIM][T::PITCH];
    float lse[2][OWN];    // of the queries: the block's, or of both tiles of the others
    float delta[2][OWN];
};

// Begins the copy of a tile of a head's rows; zeros beyond the rows' ends and the last feature.
template <int HEAD_DIM, int COLUMNS, class Copies>
DEVICE void stage(Copies& copies, const AttentionShape& d, bf16 (&to)[HEAD_DIM][COLUMNS + SPACE], const bf16* from,
                  int first, int thread) {
    constexpr int ACROSS = COLUMNS / CHUNK;
    UNROLL for (int i = 0; i < HEAD_DIM * ACROSS / THREADS; ++i) {
        const int row = (thread + i * THREADS) / ACROSS, c = (thread + i * THREADS) % ACROSS * CHUNK;
        const bool there = row < d.head_dim && first + c < d.columns.row;
        copies.copy(&to[row][c], there ? from + row * stride_of(d) + first + c : from, there);
    }
}

// sum[j] += sum over d of own[d][warp's column] other[d][8 j + column]
template <int HEAD_DIM, class T = Tile<HEAD_DIM>>
DEVICE void scores(int lane, const bf16 (&own)[HEAD_DIM][T::OWN_PITCH], const bf16 (&other)[HEAD_DIM][T::PITCH], int mine,
                   SumTile (&sum)[T::SCORES]) {
    UNROLL for (int step = 0; step < HEAD_DIM; step += 16) {
        const LeftTile left = load_left<true, T::OWN_PITCH>(lane, &own[step][mine]);
        UNROLL for (int j = 0; j < T::SCORES; j += 2) {
            RightTile first, second;
            load_right<false, T::PITCH>(lane, &other[step][j * 8], first, second);
            multiply_add(lane, sum[j], left, first);
            multiply_add(lane, sum[j + 1], left, second);
        }
    }
}

// sum[r] += sum over columns j of factor[warp's row][j] other[8 r + column][j]: scores that a warp holds are what the next
// product reads on the left, rounded.
template <int HEAD_DIM, class T = Tile<HEAD_DIM>>
DEVICE void gather(int lane, const SumTile (&factor)[T::SCORES], const bf16 (&other)[HEAD_DIM][T::PITCH],
                   SumTile (&sum)[T::FEATURES]) {
    UNROLL for (int j = 0; j < T::SCORES; j += 2) {
        LeftTile left;
        UNROLL for (int half = 0; half < 2; ++half) {
            left.word[half * 2] = round_pair(factor[j + half].value[0], factor[j + half].value[1]);
            left.word[half * 2 + 1] = round_pair(factor[j + half].value[2], factor[j + half].value[3]);
        }
        UNROLL for (int r = 0; r < T::FEATURES; r += 2) {
            RightTile first, second;
            load_right<true, T::PITCH>(lane, &other[r * 8][j * 8], first, second);
            multiply_add(lane, sum[r], left, first);
            multiply_add(lane, sum[r + 1], left, second);
        }
    }
}

// Writes a warp's part of a result, 16 columns of all features, by way of `slab`, of which they are the warp's own; padded
// tokens are written as zeros.
template <int HEAD_DIM, class T = Tile<HEAD_DIM>>
DEVICE void put_tile(const AttentionShape& d, bf16* rows, bf16 (&slab)[HEAD_DIM][T::OWN_PITCH],
                     const SumTile (&sum)[T::FEATURES], int first, int mine, int lane) {
    __syncwarp();
    UNROLL for (int r = 0; r < T::FEATURES; ++r)
        UNROLL for (int e = 0; e < 4; ++e)
            slab[r * 8 + lane % 4 * 2 + e % 2][mine + lane / 4 + e / 2 * 8] = round_to_bf16(sum[r].value[e]);
    __syncwarp();
    const int c = mine + lane % 2 * CHUNK, column = first + c;
    if (column < d.columns.row) {
        uint32_t bits = 0;
        UNROLL for (int i = 0; i < CHUNK; ++i) bits |= uint32_t(column + i < d.columns.tokens) << i;
        for (int row = lane / 2; row < d.head_dim; row += 16)
            store<CHUNK>(rows + row * stride_of(d) + column, kept<CHUNK>(load<CHUNK>(&slab[row][c]), bits));
    }
    __syncwarp();
}

// Zeros, for what is left out.
template <int HEAD_DIM>
DEVICE void put_zeros(const AttentionShape& d, bf16* rows, int first, int thread) {
    const int column = first + thread % (OWN / CHUNK) * CHUNK;
    if (column >= d.columns.row) return;
    for (int row = thread / (OWN / CHUNK); row < d.head_dim; row += THREADS / (OWN / CHUNK))
        store<CHUNK>(rows + row * stride_of(d) + column, splat<CHUNK>(0.0f));
}

// The largest of, or the sum over, the four lanes that hold a row.
DEVICE float largest_of_row(float x) {
    UNROLL for (int offset = 1; offset < 4; offset *= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, x, offset);
        x = other > x ? other : x;
    }
    return x;
}
DEVICE float sum_of_row(float x) {
    UNROLL for (int offset = 1; offset < 4; offset *= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

template <int HEAD_DIM>
DEVICE void forward(const AttentionForwardArgs& a, ForwardTiles<HEAD_DIM>& tile, int thread, int block, int head) {
    using T = Tile<HEAD_DIM>;
    const AttentionShape& d = a.shape;
    const int tiles = int(ceil_div(d.columns.row, OWN)), sample = block / tiles, first = block % tiles * OWN;
    const int lane = thread % 32, mine = thread / 32 * 16, tokens = d.columns.tokens;
    bf16* to = a.y + rows_of(d, QUERY, head, sample);
    if (sample >= int(*a.count) || !a.live[head]) {
        put_zeros<HEAD_DIM>(d, to, first, thread);
        return;
    }
    AsyncCopies<HEAD_DIM * OWN / CHUNK / THREADS + 4 * T::COPIES> copies;
    const auto fetch = [&](int number) {
        const int key = number * T::OTHER;
        stage<HEAD_DIM, T::OTHER>(copies, d, tile.other[number % 2][0], a.qkv + rows_of(d, KEY, head, sample), key, thread);
        stage<HEAD_DIM, T::OTHER>(copies, d, tile.other[number % 2][1], a.qkv + rows_of(d, VALUE, head, sample), key, thread);
        copies.commit();
    };
    stage<HEAD_DIM, OWN>(copies, d, tile.q, a.qkv + rows_of(d, QUERY, head, sample), first, thread);
    fetch(0);

    SumTile y[T::FEATURES];
    clear(y);
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};  // of the lane's two rows
    for (int number = 0, key = 0; key < tokens; ++number, key += T::OTHER) {
        copies.template wait<0>();
        __syncthreads();
        if (key + T::OTHER < tokens) fetch(number + 1);
        SumTile s[T::SCORES];
        clear(s);
        scores<HEAD_DIM>(lane, tile.q, tile.other[number % 2][0], mine, s);
        UNROLL for (int half = 0; half < 2; ++half) {
            float largest = top[half];
            UNROLL for (int j = 0; j < T::SCORES; ++j)
                UNROLL for (int e = 0; e < 2; ++e) {
                    float& score = s[j].value[half * 2 + e];
                    score = key + j * 8 + lane % 4 * 2 + e < tokens ? score * a.scale : -INFINITY;
                    largest = score > largest ? score : largest;
                }
            largest = largest_of_row(largest);
            const float shrink = expf(top[half] - largest);
            float sum = 0.0f;
            UNROLL for (int j = 0; j < T::SCORES; ++j)
                UNROLL for (int e = 0; e < 2; ++e) {
                    float& score = s[j].value[half * 2 + e];
                    score = expf(score - largest);
                    sum += score;
                }
            top[half] = largest, total[half] = total[half] * shrink + sum_of_row(sum);
            UNROLL for (int r = 0; r < T::FEATURES; ++r)
                UNROLL for (int e = 0; e < 2; ++e) y[r].value[half * 2 + e] *= shrink;
        }
        gather<HEAD_DIM>(lane, s, tile.other[number % 2][1], y);
    }
    UNROLL for (int r = 0; r < T::FEATURES; ++r)
        UNROLL for (int e = 0; e < 4; ++e) y[r].value[e] /= total[e / 2];
    put_tile<HEAD_DIM>(d, to, tile.q, y, first, mine, lane);
    if (a.lse && lane % 4 == 0)
        UNROLL for (int half = 0; half < 2; ++half) {
            const int query = first + mine + lane / 4 + half * 8;
            if (query < d.columns.row) a.lse[statistics_of(d, head, sample) + query] = top[half] + logf(total[half]);
        }
}

template <int HEAD_DIM, bool OF_KEYS>
DEVICE void backward(const AttentionBackwardArgs& a, BackwardTiles<HEAD_DIM>& tile, int thread, int block, int head) {
    using T = Tile<HEAD_DIM>;
    const AttentionShape& d = a.shape;
    const int tiles = int(ceil_div(d.columns.row, OWN)), sample = block / tiles, first = block % tiles * OWN;
    const int lane = thread % 32, mine = thread / 32 * 16, tokens = d.columns.tokens;
    const int64_t statistics = statistics_of(d, head, sample), queries = rows_of(d, QUERY, head, sample);
    const int64_t keys = rows_of(d, KEY, head, sample), values = rows_of(d, VALUE, head, sample);
    if (sample >= int(*a.count) || !a.live[head]) {
        put_zeros<HEAD_DIM>(d, a.dqkv + (OF_KEYS ? keys : queries), first, thread);
        if (OF_KEYS) put_zeros<HEAD_DIM>(d, a.dqkv + values, first, thread);
        return;
    }
    AsyncCopies<2 * HEAD_DIM * OWN / CHUNK / THREADS + 4 * T::COPIES> copies;
    // A padded query has lse 0 and delta 0, so p = 1 and ds = 0; its dy is zero.
    const auto fetch = [&](int number) {
        const int begin = number * T::OTHER, half = number % 2;
        stage<HEAD_DIM, T::OTHER>(copies, d, tile.other[half][0], a.qkv + (OF_KEYS ? queries : keys), begin, thread);
        stage<HEAD_DIM, T::OTHER>(copies, d, tile.other[half][1], OF_KEYS ? a.dy + queries : a.qkv + values, begin, thread);
        copies.commit();
        if (OF_KEYS && thread < T::OTHER) {
            const bool live = begin + thread < tokens;
            tile.lse[half][thread] = live ? a.lse[statistics + begin + thread] : 0.0f;
            tile.delta[half][thread] = live ? a.delta[statistics + begin + thread] : 0.0f;
        }
    };
    stage<HEAD_DIM, OWN>(copies, d, tile.own[0], a.qkv + (OF_KEYS ? keys : queries), first, thread);
    stage<HEAD_DIM, OWN>(copies, d, tile.own[1], OF_KEYS ? a.qkv + values : a.dy + queries, first, thread);
    fetch(0);
    if (!OF_KEYS) {
        // delta of the block's queries, in two halves of the features; written for the keys' kernel too.
        const int query = first + thread % OWN, part = thread / OWN;
        float sum = 0.0f;
        if (query < tokens)
            for (int row = part; row < d.head_dim; row += THREADS / OWN)
                sum += widen(a.dy[queries + row * stride_of(d) + query]) * widen(a.y[queries + row * stride_of(d) + query]);
        tile.delta[part][thread % OWN] = sum;
        __syncthreads();
        if (part == 0) {
            sum += tile.delta[1][thread];
            tile.delta[0][thread] = sum;
            tile.lse[0][thread] = query < tokens ? a.lse[statistics + query] : 0.0f;
            if (query < d.columns.row) a.delta[statistics + query] = sum;
        }
    }

    SumTile sum[2][T::FEATURES];  // dk and dv, or dq
    clear(sum[0]);
    clear(sum[1]);
    for (int number = 0, begin = 0; begin < tokens; ++number, begin += T::OTHER) {
        copies.template wait<0>();
        __syncthreads();
        if (begin + T::OTHER < tokens) fetch(number + 1);
        const int half = number % 2;
        SumTile p[T::SCORES], ds[T::SCORES];
        clear(p);
        clear(ds);
        scores<HEAD_DIM>(lane, tile.own[0], tile.other[half][0], mine, p);
        scores<HEAD_DIM>(lane, tile.own[1], tile.other[half][1], mine, ds);
        UNROLL for (int j = 0; j < T::SCORES; ++j)
            UNROLL for (int e = 0; e < 4; ++e) {
                const int other = j * 8 + lane % 4 * 2 + e % 2;
                const int query = OF_KEYS ? other : mine + lane / 4 + e / 2 * 8;
                const float lse = tile.lse[OF_KEYS ? half : 0][query], delta = tile.delta[OF_KEYS ? half : 0][query];
                const bool live = begin + other < tokens;  // exp of a padded key's score may overflow
                float& score = p[j].value[e];
                score = live ? expf(score * a.scale - lse) : 0.0f;
                ds[j].value[e] = score * (ds[j].value[e] - delta) * a.scale;
            }
        if (OF_KEYS) gather<HEAD_DIM>(lane, p, tile.other[half][1], sum[1]);
        gather<HEAD_DIM>(lane, ds, tile.other[half][0], sum[0]);
    }
    put_tile<HEAD_DIM>(d, a.dqkv + (OF_KEYS ? keys : queries), tile.own[0], sum[0], first, mine, lane);
    if (OF_KEYS) put_tile<HEAD_DIM>(d, a.dqkv + values, tile.own[1], sum[1], first, mine, lane);
}

// Grid: tiles of tokens of all samples, heads. The number is the largest head_dim.
#define FORWARD_KERNEL(head_dim)                \
    SHARED(ForwardTiles<head_dim>, tile);       \
    forward(a, tile, threadIdx.x, blockIdx.x, blockIdx.y)
#define BACKWARD_KERNEL(head_dim, of_keys)      \
    SHARED(BackwardTiles<head_dim>, tile);      \
    backward<head_dim, of_keys>(a, tile, threadIdx.x, blockIdx.x, blockIdx.y)

KERNEL(attention_forward_32_bf16, AttentionForwardArgs, ForwardTiles<32>, THREADS, 0, 4) { FORWARD_KERNEL(32); }
KERNEL(attention_forward_64_bf16, AttentionForwardArgs, ForwardTiles<64>, THREADS) { FORWARD_KERNEL(64); }
KERNEL(attention_forward_128_bf16, AttentionForwardArgs, ForwardTiles<128>, THREADS) { FORWARD_KERNEL(128); }
KERNEL(attention_backward_queries_32_bf16, AttentionBackwardArgs, BackwardTiles<32>, THREADS) { BACKWARD_KERNEL(32, false); }
KERNEL(attention_backward_queries_64_bf16, AttentionBackwardArgs, BackwardTiles<64>, THREADS) { BACKWARD_KERNEL(64, false); }
KERNEL(attention_backward_queries_128_bf16, AttentionBackwardArgs, BackwardTiles<128>, THREADS) { BACKWARD_KERNEL(128, false); }
KERNEL(attention_backward_keys_32_bf16, AttentionBackwardArgs, BackwardTiles<32>, THREADS) { BACKWARD_KERNEL(32, true); }
KERNEL(attention_backward_keys_64_bf16, AttentionBackwardArgs, BackwardTiles<64>, THREADS) { BACKWARD_KERNEL(64, true); }
KERNEL(attention_backward_keys_128_bf16, AttentionBackwardArgs, BackwardTiles<128>, THREADS) { BACKWARD_KERNEL(128, true); }
