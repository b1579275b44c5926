// attention.cu - scaled dot product attention of many heads, fused, forward and backward, f32.
//
//   S[i,j] = scale * sum over d of Q[d,i] K[d,j]   P[i,j] = exp(S[i,j] - lse[i])   lse[i] = log of sum over j of exp S[i,j]
//   Y[d,i] = sum over j of P[i,j] V[d,j]
//   delta[i] = sum over d of dY[d,i] Y[d,i]   dS[i,j] = P[i,j] (sum over d of dY[d,i] V[d,j] - delta[i])
//   dQ[d,i] = scale * sum over j of dS[i,j] K[d,j]   dK[d,j] = scale * sum over i of dS[i,j] Q[d,i]
//   dV[d,j] = sum over i of P[i,j] dY[d,i]           i: queries, j: keys, both the true tokens of one sample
//
// qkv, dqkv: [3, heads, head_dim, N, T padded]; y, dy: [heads, head_dim, N, T padded]; lse, delta: [heads, N, T padded].
// Padded tokens and samples are zero in qkv and dy, and written as zeros in y and dqkv; so are heads whose `live` is 0.
//
// No matrix of T x T is in memory: scores are made tile by tile, with a running maximum and sum in the forward pass
// (Milakov and Gimelshein 2018), again from lse in the backward pass (Dao et al. 2022). Sums have an order that depends
// on the shape and the policy alone. `direct`: a block of one thread owns a head of a sample, and makes all its gradients
// in one kernel, five products. `staged`: a block owns a tile of queries, or, in a second kernel of the backward pass, of
// keys, so that nothing is added by two blocks: seven products. Limit: FLOPs.
#include "kernels/lib/device.cuh"

struct AttentionShape {
    int32_t heads;
    int32_t head_dim;  // 1 to 128
    Columns columns;   // of a feature row
};

struct AttentionForwardArgs {
    const float* qkv;
    const uint32_t* live;   // [heads]
    const uint32_t* count;  // number of true samples
    float* lse;             // or null
    float* y;
    AttentionShape shape;
    float scale;
};

struct AttentionBackwardArgs {
    const float* qkv;
    const uint32_t* live;
    const uint32_t* count;
    const float* y;
    const float* lse;
    const float* dy;
    float* delta;  // staged: written by the queries' kernel, read by the keys'
    float* dqkv;
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

// ---------------------------------------------------------------------------------------------------------- direct

// A panel is a few vectors of queries: one to each lane, so that softmax over the keys needs no sum over lanes. Every
// product is of register tiles: ROWS scalars times VECTORS vectors. The panels lie in the cache nearest by.
constexpr int VECTORS = 2;
constexpr int ROWS = LANES == 16 ? 8 : 4;
constexpr int WIDTH = VECTORS * LANES;
constexpr int KEYS = 64;  // whose scores are kept at a time
// Elements of a sum of dK or dV, over [keys, head_dim]: 272 keys of 64. On a GPU all must fit 48 KiB.
constexpr int KEY_SUMS = LANES == 4 ? 16 * MOST_HEAD_DIM : 272 * 64;

struct alignas(64) ForwardLocal {
    float q[MOST_HEAD_DIM * WIDTH];  // [d][query], times scale
    float p[KEYS * WIDTH];           // [key][query]
    float y[MOST_HEAD_DIM * WIDTH];  // [d][query], not yet divided by the sum of p
};

struct alignas(64) BackwardLocal {
    float q[MOST_HEAD_DIM * WIDTH];   // [d][query], times scale
    float dy[MOST_HEAD_DIM * WIDTH];
    float qt[WIDTH * MOST_HEAD_DIM];  // [query][d], times scale
    float dyt[WIDTH * MOST_HEAD_DIM];
    float p[ROWS * WIDTH];            // [key][query]
    float ds[KEYS * WIDTH];
    float dq[MOST_HEAD_DIM * WIDTH];  // [d][query]
    float dk[KEY_SUMS];               // [key][d]
    float dv[KEY_SUMS];
};

DEVICE int multiple(int x, int of) { return (x + of - 1) / of * of; }

template <int COUNT, int V>
DEVICE void set_zero(Samples<LANES> (&sum)[COUNT][V]) {
    UNROLL for (int i = 0; i < COUNT; ++i)
        UNROLL for (int v = 0; v < V; ++v) sum[i][v] = splat<LANES>(0.0f);
}

// sum[i] += sum over t < depth of left[i * row_step + t * step] right[t * pitch ..]
template <int COUNT, int V>
DEVICE void multiply(Samples<LANES> (&sum)[COUNT][V], const float* left, int64_t row_step, int64_t step,
                     const float* right, int pitch, int depth) {
    for (int t = 0; t < depth; ++t, left += step, right += pitch) {
        Samples<LANES> read[V];
        UNROLL for (int v = 0; v < V; ++v) read[v] = load<LANES>(right + v * LANES);
        UNROLL for (int i = 0; i < COUNT; ++i)
            UNROLL for (int v = 0; v < V; ++v) sum[i][v] += read[v] * left[i * row_step];
    }
}

// The same, added to COUNT rows of `to`.
template <int COUNT, int V>
DEVICE void add_product(float* to, int to_pitch, const float* left, int64_t row_step, const float* right, int pitch,
                        int depth) {
    Samples<LANES> sum[COUNT][V];
    UNROLL for (int i = 0; i < COUNT; ++i)
        UNROLL for (int v = 0; v < V; ++v) sum[i][v] = load<LANES>(to + i * to_pitch + v * LANES);
    multiply<COUNT, V>(sum, left, row_step, 1, right, pitch, depth);
    UNROLL for (int i = 0; i < COUNT; ++i)
        UNROLL for (int v = 0; v < V; ++v) store<LANES>(to + i * to_pitch + v * LANES, sum[i][v]);
}

// To each of the features' rows of a panel: its row of `left` times the rows of `right`.
template <int V>
DEVICE void add_features(float* to, int features, const float* left, int64_t stride, const float* right, int depth) {
    constexpr int P = V * LANES;
    int d = 0;
    for (; d + ROWS <= features; d += ROWS)
        add_product<ROWS, V>(to + d * P, P, left + d * stride, stride, right, P, depth);
    for (; d < features; ++d) add_product<1, V>(to + d * P, P, left + d * stride, stride, right, P, depth);
}

// Columns of a tensor's rows as a panel, times `scale`; zeros beyond the row's end and the last feature.
template <int V>
DEVICE void take(const AttentionShape& d, const float* from, int first, float scale, int rows, float* panel) {
    for (int row = 0; row < rows; ++row) {
        for (int c = 0; c < V * LANES; c += ROW_LANES) {
            Samples<ROW_LANES> x = splat<ROW_LANES>(0.0f);
            if (row < d.head_dim && first + c < d.columns.row)
                x = load<ROW_LANES>(from + row * stride_of(d) + first + c) * scale;
            store<ROW_LANES>(panel + row * V * LANES + c, x);
        }
    }
}

// Writes a vector's columns: zeros to padded tokens, nothing beyond the row's end.
DEVICE void put(const Columns& d, float* row, int first, const Samples<LANES>& x) {
    if (first + LANES <= d.tokens) {
        store<LANES>(row + first, x);
        return;
    }
    alignas(64) float lanes[LANES];
    store<LANES>(lanes, x);
    for (int i = 0; i < LANES && first + i < d.row; ++i) row[first + i] = first + i < d.tokens ? lanes[i] : 0.0f;
}

DEVICE void put_zeros(const AttentionShape& d, float* rows, int first, int end) {
    for (int row = 0; row < d.head_dim; ++row)
        for (int c = first; c < end; c += ROW_LANES)
            store<ROW_LANES>(rows + row * stride_of(d) + c, splat<ROW_LANES>(0.0f));
}

template <int V>
DEVICE void forward_panel(const AttentionForwardArgs& a, ForwardLocal& local, int head, int sample, int first) {
    constexpr int P = V * LANES;
    const AttentionShape& d = a.shape;
    const int64_t stride = stride_of(d);
    const float* k = a.qkv + rows_of(d, KEY, head, sample);
    const float* v = a.qkv + rows_of(d, VALUE, head, sample);
    take<V>(d, a.qkv + rows_of(d, QUERY, head, sample), first, a.scale, d.head_dim, local.q);
    Samples<LANES> top[V], total[V];
    UNROLL for (int u = 0; u < V; ++u) top[u] = splat<LANES>(-INFINITY), total[u] = splat<LANES>(0.0f);
    for (int c = 0; c < d.head_dim * P; c += LANES) store<LANES>(local.y + c, splat<LANES>(0.0f));

    for (int key = 0; key < d.columns.tokens; key += KEYS) {
        const int keys = int(min64(KEYS, d.columns.tokens - key));
        for (int j = 0; j < keys; j += ROWS) {
            Samples<LANES> s[ROWS][V];
            set_zero<ROWS, V>(s);
            multiply<ROWS, V>(s, k + key + j, 1, stride, local.q, P, d.head_dim);
            UNROLL for (int i = 0; i < ROWS; ++i)
                UNROLL for (int u = 0; u < V; ++u) store<LANES>(local.p + (j + i) * P + u * LANES, s[i][u]);
        }
        UNROLL for (int u = 0; u < V; ++u) {
            float* p = local.p + u * LANES;
            Samples<LANES> largest = top[u];
            for (int j = 0; j < keys; ++j) {
                const Samples<LANES> s = load<LANES>(p + j * P);
                largest = where_at_most<LANES>(largest, s, s, largest);
            }
            const Samples<LANES> shrink = exponential<LANES>(top[u] - largest);
            Samples<LANES> sum = total[u] * shrink;
            for (int j = 0; j < keys; ++j) {
                const Samples<LANES> e = exponential<LANES>(load<LANES>(p + j * P) - largest);
                store<LANES>(p + j * P, e);
                sum += e;
            }
            top[u] = largest, total[u] = sum;
            for (float* y = local.y + u * LANES; key > 0 && y < local.y + d.head_dim * P; y += P)
                store<LANES>(y, load<LANES>(y) * shrink);
        }
        add_features<V>(local.y, d.head_dim, v + key, stride, local.p, keys);
    }

    float* y = a.y + rows_of(d, QUERY, head, sample);
    UNROLL for (int u = 0; u < V; ++u) {
        alignas(64) float sums[LANES], tops[LANES];
        store<LANES>(sums, total[u]);
        store<LANES>(tops, top[u]);
        for (int i = 0, c = first + u * LANES; i < LANES; ++i, ++c) {
            if (a.lse && c < d.columns.row) a.lse[statistics_of(d, head, sample) + c] = tops[i] + logf(sums[i]);
            sums[i] = 1.0f / sums[i];
        }
        const Samples<LANES> share = load<LANES>(sums);
        for (int row = 0; row < d.head_dim; ++row)
            put(d.columns, y + row * stride, first + u * LANES, load<LANES>(local.y + row * P + u * LANES) * share);
    }
}

// [feature][query] to [query][feature], both whole vectors wide.
template <int V>
DEVICE void turn(const float* panel, int features, float* turned) {
    for (int row = 0; row < features; row += LANES) {
        for (int c = 0; c < V * LANES; c += LANES) {
            Samples<LANES> square[LANES];
            UNROLL for (int i = 0; i < LANES; ++i) square[i] = load<LANES>(panel + (row + i) * V * LANES + c);
            transpose<LANES>(square);
            UNROLL for (int i = 0; i < LANES; ++i) store<LANES>(turned + (c + i) * features + row, square[i]);
        }
    }
}

// Sums over [key][feature] to rows of dqkv.
DEVICE void put_turned(const AttentionShape& d, const float* sums, int features, int key, int keys, float* rows) {
    for (int row = 0; row < d.head_dim; row += LANES) {
        for (int j = 0; j < keys; j += LANES) {
            Samples<LANES> square[LANES];
            UNROLL for (int i = 0; i < LANES; ++i) square[i] = load<LANES>(sums + (j + i) * features + row);
            transpose<LANES>(square);
            UNROLL for (int i = 0; i < LANES; ++i)
                if (row + i < d.head_dim) put(d.columns, rows + (row + i) * stride_of(d), key + j, square[i]);
        }
    }
}

// What the queries of a panel and `keys` keys from `key` on give to dq, dk and dv.
template <int V>
DEVICE void backward_panel(const AttentionBackwardArgs& a, BackwardLocal& local, int head, int sample, int first,
                           int key, int keys) {
    constexpr int P = V * LANES;
    const AttentionShape& d = a.shape;
    const int64_t stride = stride_of(d), rows = rows_of(d, QUERY, head, sample);
    const int features = multiple(d.head_dim, LANES);
    const float* k = a.qkv + rows_of(d, KEY, head, sample) + key;
    const float* v = a.qkv + rows_of(d, VALUE, head, sample) + key;
    Samples<LANES> lse[V], delta[V];
    take<V>(d, a.y + rows, first, 1.0f, d.head_dim, local.q);
    take<V>(d, a.dy + rows, first, 1.0f, features, local.dy);
    UNROLL for (int u = 0; u < V; ++u) {
        // A padded query has no part in anything: exp(0 - 1e30) is 0.
        alignas(64) float lanes[LANES];
        for (int i = 0, c = first + u * LANES; i < LANES; ++i, ++c)
            lanes[i] = c < d.columns.tokens ? a.lse[statistics_of(d, head, sample) + c] : 1e30f;
        lse[u] = load<LANES>(lanes), delta[u] = splat<LANES>(0.0f);
        for (int at = u * LANES; at < d.head_dim * P; at += P)
            delta[u] += load<LANES>(local.q + at) * load<LANES>(local.dy + at);
    }
    take<V>(d, a.qkv + rows, first, a.scale, features, local.q);
    turn<V>(local.q, features, local.qt);
    turn<V>(local.dy, features, local.dyt);
    // dq is summed over the tiles of keys where it will stay.
    if (key > 0)
        take<V>(d, a.dqkv + rows, first, 1.0f, d.head_dim, local.dq);
    else
        for (int c = 0; c < d.head_dim * P; c += LANES) store<LANES>(local.dq + c, splat<LANES>(0.0f));

    for (int begin = 0; begin < keys; begin += KEYS) {
        const int end = int(min64(begin + KEYS, keys));
        for (int j = begin; j < end; j += ROWS) {
            float* ds = local.ds + (j - begin) * P;
            Samples<LANES> s[ROWS][V];
            set_zero<ROWS, V>(s);
            multiply<ROWS, V>(s, k + j, 1, stride, local.q, P, d.head_dim);
            UNROLL for (int i = 0; i < ROWS; ++i)
                UNROLL for (int u = 0; u < V; ++u)
                    store<LANES>(local.p + i * P + u * LANES, exponential<LANES>(s[i][u] - lse[u]));
            set_zero<ROWS, V>(s);
            multiply<ROWS, V>(s, v + j, 1, stride, local.dy, P, d.head_dim);
            UNROLL for (int i = 0; i < ROWS; ++i)
                UNROLL for (int u = 0; u < V; ++u) {
                    const Samples<LANES> p = load<LANES>(local.p + i * P + u * LANES);
                    store<LANES>(ds + i * P + u * LANES, p * (s[i][u] - delta[u]));
                }
            int c = 0;
            for (; c + WIDTH <= features; c += WIDTH) {
                const int at = j * features + c;
                add_product<ROWS, VECTORS>(local.dv + at, features, local.p, P, local.dyt + c, features, P);
                add_product<ROWS, VECTORS>(local.dk + at, features, ds, P, local.qt + c, features, P);
            }
            for (; c < features; c += LANES) {
                const int at = j * features + c;
                add_product<ROWS, 1>(local.dv + at, features, local.p, P, local.dyt + c, features, P);
                add_product<ROWS, 1>(local.dk + at, features, ds, P, local.qt + c, features, P);
            }
        }
        add_features<V>(local.dq, d.head_dim, k + begin, stride, local.ds, end - begin);
    }
    const float scale = key + keys == d.columns.tokens ? a.scale : 1.0f;
    for (int row = 0; row < d.head_dim; ++row)
        UNROLL for (int u = 0; u < V; ++u)
            put(d.columns, a.dqkv + rows + row * stride, first + u * LANES,
                load<LANES>(local.dq + row * P + u * LANES) * scale);
}

DEVICE void direct_forward(const AttentionForwardArgs& a, ForwardLocal& local, int sample, int head) {
    const AttentionShape& d = a.shape;
    if (sample >= int(*a.count) || !a.live[head]) {
        put_zeros(d, a.y + rows_of(d, QUERY, head, sample), 0, d.columns.row);
        return;
    }
    int first = 0;
    for (; first + LANES < d.columns.row; first += WIDTH) forward_panel<VECTORS>(a, local, head, sample, first);
    if (first < d.columns.row) forward_panel<1>(a, local, head, sample, first);
}

DEVICE void direct_backward(const AttentionBackwardArgs& a, BackwardLocal& local, int sample, int head) {
    const AttentionShape& d = a.shape;
    if (sample >= int(*a.count) || !a.live[head]) {
        put_zeros(d, a.dqkv + rows_of(d, QUERY, head, sample), 0, d.columns.row);
        put_zeros(d, a.dqkv + rows_of(d, KEY, head, sample), 0, d.columns.row);
        put_zeros(d, a.dqkv + rows_of(d, VALUE, head, sample), 0, d.columns.row);
        return;
    }
    const int features = multiple(d.head_dim, LANES), tokens = d.columns.tokens;
    const int tiles = int(ceil_div(tokens, KEY_SUMS / features / LANES * LANES));
    const int most = multiple(int(ceil_div(tokens, tiles)), LANES);
    for (int key = 0; key < tokens; key += most) {
        const int keys = int(min64(most, tokens - key));
        for (int c = 0; c < multiple(keys, LANES) * features; c += LANES) {
            store<LANES>(local.dk + c, splat<LANES>(0.0f));
            store<LANES>(local.dv + c, splat<LANES>(0.0f));
        }
        int first = 0;
        for (; first + LANES < d.columns.row; first += WIDTH)
            backward_panel<VECTORS>(a, local, head, sample, first, key, keys);
        if (first < d.columns.row) backward_panel<1>(a, local, head, sample, first, key, keys);
        put_turned(d, local.dk, features, key, keys, a.dqkv + rows_of(d, KEY, head, sample));
        put_turned(d, local.dv, features, key, keys, a.dqkv + rows_of(d, VALUE, head, sample));
    }
    // Whole vectors may end before the padded tokens do.
    put_zeros(d, a.dqkv + rows_of(d, KEY, head, sample), multiple(tokens, LANES), d.columns.row);
    put_zeros(d, a.dqkv + rows_of(d, VALUE, head, sample), multiple(tokens, LANES), d.columns.row);
}

// ---------------------------------------------------------------------------------------------------------- staged

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
DEVICE void stage(const AttentionShape& d, float (&to)[HEAD_DIM][PITCH], const float* from, int first, int thread) {
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
DEVICE void put_tile(const AttentionShape& d, float* rows, const Samples<T::PER> (&sum)[T::FEATURES], int column,
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
DEVICE void staged_forward(const AttentionForwardArgs& a, ForwardTiles<HEAD_DIM>& tile, int thread, int block,
                           int head) {
    using T = Tile<HEAD_DIM>;
    constexpr int PER = T::PER;
    const AttentionShape& d = a.shape;
    const int tiles = int(ceil_div(d.columns.row, T::COLUMNS)), sample = block / tiles;
    const int first = block % tiles * T::COLUMNS, lane = thread % SIDE, mine = thread / SIDE * PER;
    Samples<PER> y[T::FEATURES];
    UNROLL for (int r = 0; r < T::FEATURES; ++r) y[r] = splat<PER>(0.0f);
    float* to = a.y + rows_of(d, QUERY, head, sample);
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
DEVICE void staged_backward(const AttentionBackwardArgs& a, BackwardTiles<HEAD_DIM>& tile, int thread, int block,
                            int head) {
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

// ---------------------------------------------------------------------------------------------------------- kernels

// Grid: samples, heads.
BARRIER_FREE_KERNEL(attention_forward_direct_f32, AttentionForwardArgs, 1) {
    LOCAL(ForwardLocal, local);
    direct_forward(a, local, blockIdx.x, blockIdx.y);
}

BARRIER_FREE_KERNEL(attention_backward_direct_f32, AttentionBackwardArgs, 1) {
    LOCAL(BackwardLocal, local);
    direct_backward(a, local, blockIdx.x, blockIdx.y);
}

// Grid of the staged ones: tiles of tokens of all samples, heads. The number is the largest head_dim.
KERNEL(attention_forward_32_f32, AttentionForwardArgs, ForwardTiles<32>, THREADS) {
    SHARED(ForwardTiles<32>, tile);
    staged_forward(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_forward_64_f32, AttentionForwardArgs, ForwardTiles<64>, THREADS) {
    SHARED(ForwardTiles<64>, tile);
    staged_forward(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_forward_128_f32, AttentionForwardArgs, ForwardTiles<128>, THREADS) {
    SHARED(ForwardTiles<128>, tile);
    staged_forward(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_backward_queries_32_f32, AttentionBackwardArgs, BackwardTiles<32>, THREADS) {
    SHARED(BackwardTiles<32>, tile);
    staged_backward<32, false>(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_backward_queries_64_f32, AttentionBackwardArgs, BackwardTiles<64>, THREADS) {
    SHARED(BackwardTiles<64>, tile);
    staged_backward<64, false>(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_backward_queries_128_f32, AttentionBackwardArgs, BackwardTiles<128>, THREADS) {
    SHARED(BackwardTiles<128>, tile);
    staged_backward<128, false>(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_backward_keys_32_f32, AttentionBackwardArgs, BackwardTiles<32>, THREADS) {
    SHARED(BackwardTiles<32>, tile);
    staged_backward<32, true>(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_backward_keys_64_f32, AttentionBackwardArgs, BackwardTiles<64>, THREADS) {
    SHARED(BackwardTiles<64>, tile);
    staged_backward<64, true>(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}

KERNEL(attention_backward_keys_128_f32, AttentionBackwardArgs, BackwardTiles<128>, THREADS) {
    SHARED(BackwardTiles<128>, tile);
    staged_backward<128, true>(a, tile, threadIdx.x, blockIdx.x, blockIdx.y);
}
