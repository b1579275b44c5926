// attention.cu - attention on a GPU in f32: a block owns a tile of queries, or, in a second kernel of the backward pass, of keys,
// so that nothing is added by two blocks: seven products.
#include "kernels/attention.cuh"

// Threads are 16 x 16: each makes PER x PER scores of COLUMNS x COLUMNS, and PER columns of every 16th feature of the
// result. The 16 threads of a column's scores are half a warp, which finds its maximum and sum. 32 columns for heads
// above 64, so that the tiles of the backward pass fit the 99 KiB of smaller GPUs.
constexpr int THREADS = 256;
constexpr int SIDE = 16;

template <int HEAD_DIM>
struct Tile {
    static constexpr int PER = HEAD_DIM <= 64 ? 4 : 2;
    static constexpr int COLUMNS = SIDE * PER;
    static constexpr int PITCH = COLUMNS + 4;  // rows apart by 4 banks: 8 threads read 8 rows at once
    static constexpr int FEATURES = HEAD_DIM / SIDE;
};

template <int HEAD_DIM>
struct ForwardTiles {
    using T = Tile<HEAD_DIM>;
    float q[HEAD_DIM][T::COLUMNS];
    float k[HEAD_DIM][T::PITCH];
    float v[HEAD_DIM][T::PITCH];
    float p[T::COLUMNS][T::PITCH];  // [query][key]
};

// Queries' kernel: own are q and dy, others k and v. Keys' kernel: own are k and v, others q and dy.
template <int HEAD_DIM>
struct BackwardTiles {
    using T = Tile<HEAD_DIM>;
    float own[2][HEAD_DIM][T::COLUMNS];
    float other[2][HEAD_DIM][T::PITCH];
    float factor[T::COLUMNS][T::PITCH];  // [own][other]: p or ds
    float lse[T::COLUMNS];               // of the queries
    float delta[T::COLUMNS];
};

// A tile of a head's rows; zeros beyond the rows' ends and the last feature.
template <int HEAD_DIM, int PITCH>
DEVICE void stage(const AttentionShape& d, float (&to)[HEAD_DIM][PITCH], const Real* from, int first, int thread) {
    constexpr int LOADS = Tile<HEAD_DIM>::COLUMNS / 4;
    UNROLL for (int i = 0; i < HEAD_DIM * LOADS / THREADS; ++i) {
        const int row = (thread + i * THREADS) / LOADS, c = (thread + i * THREADS) % LOADS * 4;
        Samples<4> x = splat<4>(0.0f);
        if (row < d.head_dim && first + c < d.columns.row) x = load<4>(from + row * stride_of(d) + first + c);
        store<4>(&to[row][c], x);
    }
}

// sum[i][j] += sum over d of own[d][i] other[d][j]
template <int HEAD_DIM, class T = Tile<HEAD_DIM>>
DEVICE void scores(Samples<T::PER> (&sum)[T::PER], const float (&own)[HEAD_DIM][T::COLUMNS],
                   const float (&other)[HEAD_DIM][T::PITCH], int mine, int theirs) {
    for (int d = 0; d < HEAD_DIM; ++d) {
        const Samples<T::PER> x = load<T::PER>(&own[d][mine]), y = load<T::PER>(&other[d][theirs]);
        UNROLL for (int i = 0; i < T::PER; ++i) sum[i] += y * x[i];
    }
}

// sum[r][i] += sum over columns j of factor[i][j] other[lane + 16 r][j]
template <int HEAD_DIM, class T = Tile<HEAD_DIM>>
DEVICE void gather(Samples<T::PER> (&sum)[T::FEATURES], const float (&factor)[T::COLUMNS][T::PITCH],
                   const float (&other)[HEAD_DIM][T::PITCH], int mine, int lane) {
    for (int j = 0; j < T::COLUMNS; j += 4) {
        Samples<4> x[T::PER];
        UNROLL for (int i = 0; i < T::PER; ++i) x[i] = load<4>(&factor[mine + i][j]);
        UNROLL for (int r = 0; r < T::FEATURES; ++r) {
            const Samples<4> y = load<4>(&other[lane + r * SIDE][j]);
            UNROLL for (int step = 0; step < 4; ++step)
                UNROLL for (int i = 0; i < T::PER; ++i) sum[r][i] += x[i][step] * y[step];
        }
    }
}

// Writes a thread's part of the result, padded tokens as zeros.
template <int HEAD_DIM, class T = Tile<HEAD_DIM>>
DEVICE void put_tile(const AttentionShape& d, Real* rows, const Samples<T::PER> (&sum)[T::FEATURES], int column,
                     int lane) {
    constexpr int PER = T::PER;
    if (column >= d.columns.row) return;
    uint32_t bits = 0;
    UNROLL for (int i = 0; i < PER; ++i) bits |= uint32_t(column + i < d.columns.tokens) << i;
    UNROLL for (int r = 0; r < T::FEATURES; ++r)
        if (lane + r * SIDE < d.head_dim)
            store<PER>(rows + (lane + r * SIDE) * stride_of(d) + column, kept<PER>(sum[r], bits));
}

template <int HEAD_DIM>
DEVICE void forward(const AttentionForwardArgs& a, ForwardTiles<HEAD_DIM>& tile, int thread, int block, int head) {
    using T = Tile<HEAD_DIM>;
    constexpr int PER = T::PER;
    const AttentionShape& d = a.shape;
    const int tiles = int(ceil_div(d.columns.row, T::COLUMNS)), sample = block / tiles;
    const int first = block % tiles * T::COLUMNS, lane = thread % SIDE, mine = thread / SIDE * PER;
    Samples<PER> y[T::FEATURES];
    UNROLL for (int r = 0; r < T::FEATURES; ++r) y[r] = splat<PER>(0.0f);
    Real* to = a.y + rows_of(d, QUERY, head, sample);
    if (sample >= int(*a.count) || !a.live[head]) {
        put_tile<HEAD_DIM>(d, to, y, first + mine, lane);
        return;
    }

    float top[PER], total[PER];
    UNROLL for (int i = 0; i < PER; ++i) top[i] = -INFINITY, total[i] = 0.0f;
    stage(d, tile.q, a.qkv + rows_of(d, QUERY, head, sample), first, thread);
    for (int key = 0; key < d.columns.tokens; key += T::COLUMNS) {
        __syncthreads();
        stage(d, tile.k, a.qkv + rows_of(d, KEY, head, sample), key, thread);
        stage(d, tile.v, a.qkv + rows_of(d, VALUE, head, sample), key, thread);
        __syncthreads();
        Samples<PER> s[PER];
        UNROLL for (int i = 0; i < PER; ++i) s[i] = splat<PER>(0.0f);
        scores<HEAD_DIM>(s, tile.q, tile.k, mine, lane * PER);
        UNROLL for (int i = 0; i < PER; ++i) {
            float largest = top[i];
            UNROLL for (int j = 0; j < PER; ++j) {
                s[i][j] = key + lane * PER + j < d.columns.tokens ? s[i][j] * a.scale : -INFINITY;
                largest = s[i][j] > largest ? s[i][j] : largest;
            }
            UNROLL for (int offset = SIDE / 2; offset > 0; offset /= 2) {
                const float other = __shfl_xor_sync(0xffffffffu, largest, offset);
                largest = other > largest ? other : largest;
            }
            const float shrink = expf(top[i] - largest);
            s[i] = exponential<PER>(s[i] - largest);
            float sum = 0.0f;
            UNROLL for (int j = 0; j < PER; ++j) sum += s[i][j];
            UNROLL for (int offset = SIDE / 2; offset > 0; offset /= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            top[i] = largest, total[i] = total[i] * shrink + sum;
            UNROLL for (int r = 0; r < T::FEATURES; ++r) y[r][i] *= shrink;
            store<PER>(&tile.p[mine + i][lane * PER], s[i]);
        }
        __syncthreads();
        gather<HEAD_DIM>(y, tile.p, tile.v, mine, lane);
    }
    UNROLL for (int r = 0; r < T::FEATURES; ++r)
        UNROLL for (int i = 0; i < PER; ++i) y[r][i] /= total[i];
    put_tile<HEAD_DIM>(d, to, y, first + mine, lane);
    if (a.lse && lane == 0 && first + mine < d.columns.row)
        UNROLL for (int i = 0; i < PER; ++i)
            a.lse[statistics_of(d, head, sample) + first + mine + i] = top[i] + logf(total[i]);
}

// delta of a tile of queries, whose y passes through the place of the others' tiles; written for the keys' kernel too.
template <int HEAD_DIM>
DEVICE void sum_delta(const AttentionBackwardArgs& a, BackwardTiles<HEAD_DIM>& tile, int64_t statistics, int64_t rows,
                      int first, int thread) {
    using T = Tile<HEAD_DIM>;
    constexpr int PARTS = THREADS / T::COLUMNS;
    stage(a.shape, tile.other[0], a.y + rows, first, thread);
    __syncthreads();
    const int c = thread % T::COLUMNS, part = thread / T::COLUMNS;
    float sum = 0.0f;
    for (int row = part; row < HEAD_DIM; row += PARTS) sum += tile.own[1][row][c] * tile.other[0][row][c];
    tile.factor[part][c] = sum;
    __syncthreads();
    if (part > 0) return;
    for (int other = 1; other < PARTS; ++other) sum += tile.factor[other][c];
    tile.delta[c] = sum;
    if (first + c < a.shape.columns.row) a.delta[statistics + first + c] = sum;
}

template <int HEAD_DIM, bool OF_KEYS>
DEVICE void backward(const AttentionBackwardArgs& a, BackwardTiles<HEAD_DIM>& tile, int thread, int block, int head) {
    using T = Tile<HEAD_DIM>;
    constexpr int PER = T::PER;
    const AttentionShape& d = a.shape;
    const int tokens = d.columns.tokens;
    const int tiles = int(ceil_div(d.columns.row, T::COLUMNS)), sample = block / tiles;
    const int first = block % tiles * T::COLUMNS, lane = thread % SIDE, mine = thread / SIDE * PER;
    const int64_t statistics = statistics_of(d, head, sample), queries = rows_of(d, QUERY, head, sample);
    const int64_t keys = rows_of(d, KEY, head, sample), values = rows_of(d, VALUE, head, sample);
    Samples<PER> sum[2][T::FEATURES];  // dk and dv, or dq
    UNROLL for (int r = 0; r < T::FEATURES; ++r) sum[0][r] = sum[1][r] = splat<PER>(0.0f);
    if (sample >= int(*a.count) || !a.live[head]) {
        put_tile<HEAD_DIM>(d, a.dqkv + (OF_KEYS ? keys : queries), sum[0], first + mine, lane);
        if (OF_KEYS) put_tile<HEAD_DIM>(d, a.dqkv + values, sum[0], first + mine, lane);
        return;
    }

    // A padded query has lse 0 and delta 0, so p = 1 and ds = 0; its dy is zero.
    const auto take_lse = [&](int query) {
        if (thread < T::COLUMNS)
            tile.lse[thread] = query + thread < tokens ? a.lse[statistics + query + thread] : 0.0f;
    };
    stage(d, tile.own[0], a.qkv + (OF_KEYS ? keys : queries), first, thread);
    stage(d, tile.own[1], OF_KEYS ? a.qkv + values : a.dy + queries, first, thread);
    if (!OF_KEYS) {
        take_lse(first);
        sum_delta(a, tile, statistics, queries, first, thread);
    }
    for (int begin = 0; begin < tokens; begin += T::COLUMNS) {
        __syncthreads();
        stage(d, tile.other[0], a.qkv + (OF_KEYS ? queries : keys), begin, thread);
        stage(d, tile.other[1], OF_KEYS ? a.dy + queries : a.qkv + values, begin, thread);
        if (OF_KEYS) {
            take_lse(begin);
            if (thread < T::COLUMNS)
                tile.delta[thread] = begin + thread < tokens ? a.delta[statistics + begin + thread] : 0.0f;
        }
        __syncthreads();
        Samples<PER> p[PER], ds[PER];
        UNROLL for (int i = 0; i < PER; ++i) p[i] = ds[i] = splat<PER>(0.0f);
        scores<HEAD_DIM>(p, tile.own[0], tile.other[0], mine, lane * PER);
        scores<HEAD_DIM>(ds, tile.own[1], tile.other[1], mine, lane * PER);
        UNROLL for (int i = 0; i < PER; ++i)
            UNROLL for (int j = 0; j < PER; ++j) {
                const int query = OF_KEYS ? lane * PER + j : mine + i;
                const bool live = begin + lane * PER + j < tokens;  // exp of a padded key's score may overflow
                p[i][j] = live ? expf(p[i][j] * a.scale - tile.lse[query]) : 0.0f;
                ds[i][j] = p[i][j] * (ds[i][j] - tile.delta[query]) * a.scale;
            }
        if (OF_KEYS) {
            UNROLL for (int i = 0; i < PER; ++i) store<PER>(&tile.factor[mine + i][lane * PER], p[i]);
            __syncthreads();
            gather<HEAD_DIM>(sum[1], tile.factor, tile.other[1], mine, lane);
            __syncthreads();
        }
        UNROLL for (int i = 0; i < PER; ++i) store<PER>(&tile.factor[mine + i][lane * PER], ds[i]);
        __syncthreads();
        gather<HEAD_DIM>(sum[0], tile.factor, tile.other[0], mine, lane);
    }
    put_tile<HEAD_DIM>(d, a.dqkv + (OF_KEYS ? keys : queries), sum[0], first + mine, lane);
    if (OF_KEYS) put_tile<HEAD_DIM>(d, a.dqkv + values, sum[1], first + mine, lane);
}

// Grid: tiles of tokens of all samples, heads. The number is the largest head_dim.
KERNEL(attention_forward_32_f32, AttentionForwardArgs, ForwardTiles<32>, THREADS) {
    SHARED(ForwardTiles<32>, tile);
    forward(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_forward_64_f32, AttentionForwardArgs, ForwardTiles<64>, THREADS) {
    SHARED(ForwardTiles<64>, tile);
    forward(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_forward_128_f32, AttentionForwardArgs, ForwardTiles<128>, THREADS) {
    SHARED(ForwardTiles<128>, tile);
    forward(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_backward_queries_32_f32, AttentionBackwardArgs, BackwardTiles<32>, THREADS, 0, 3) {
    SHARED(BackwardTiles<32>, tile);
    backward<32, false>(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_backward_queries_64_f32, AttentionBackwardArgs, BackwardTiles<64>, THREADS) {
    SHARED(BackwardTiles<64>, tile);
    backward<64, false>(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_backward_queries_128_f32, AttentionBackwardArgs, BackwardTiles<128>, THREADS) {
    SHARED(BackwardTiles<128>, tile);
    backward<128, false>(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_backward_keys_32_f32, AttentionBackwardArgs, BackwardTiles<32>, THREADS, 0, 2) {
    SHARED(BackwardTiles<32>, tile);
    backward<32, true>(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_backward_keys_64_f32, AttentionBackwardArgs, BackwardTiles<64>, THREADS) {
    SHARED(BackwardTiles<64>, tile);
    backward<64, true>(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_backward_keys_128_f32, AttentionBackwardArgs, BackwardTiles<128>, THREADS) {
    SHARED(BackwardTiles<128>, tile);
    backward<128, true>(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}
