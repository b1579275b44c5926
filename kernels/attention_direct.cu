// attention_direct.cu - attention on the host: a block of one thread owns a head of a sample, and makes all its gradients
// in one kernel, five products. Seven where the keys' sums take several tiles and gradients are bf16: there the queries'
// sums cannot wait in dqkv from tile to tile without being rounded, so that they have a pass of their own.
#define DILT_NO_ARRAYS
#include "kernels/attention.cuh"

// A panel is a few vectors of queries: one to each lane, so that softmax over the keys needs no sum over lanes. Every
// product is of register tiles, ROWS<V> scalars times V vectors. The panels lie in the nearest caches. Tried with
// AVX-512 on 3 heads of 64 features, 197 tokens, 8 samples, least CPU ms of 120 runs on a very busy Xeon of family 6,
// model 207, forward / backward: 4x4 and 128 keys 3.6 / 7.1, 64 keys 3.9 / 7.5; 8x2 4.1 / 8.1, and 128 keys 4.1 / 8.5.
constexpr int VECTORS = LANES == 16 ? 4 : 2;
template <int V>
constexpr int ROWS = LANES == 16 && V < 4 ? 8 : 4;
constexpr int MOST_ROWS = 8;
constexpr int WIDTH = VECTORS * LANES;
constexpr int KEYS = 128;  // whose scores are kept at a time
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
    float p[MOST_ROWS * WIDTH];       // [key][query]
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
template <int COUNT, int V, class T>
DEVICE void multiply(Samples<LANES> (&sum)[COUNT][V], const T* left, int64_t row_step, int64_t step,
                     const float* right, int pitch, int depth) {
    for (int t = 0; t < depth; ++t, left += step, right += pitch) {
        Samples<LANES> read[V];
        UNROLL for (int v = 0; v < V; ++v) read[v] = load<LANES>(right + v * LANES);
        UNROLL for (int i = 0; i < COUNT; ++i)
            UNROLL for (int v = 0; v < V; ++v) sum[i][v] += read[v] * widen(left[i * row_step]);
    }
}

// The same, added to COUNT rows of `to`.
template <int COUNT, int V, class T>
DEVICE void add_product(float* to, int to_pitch, const T* left, int64_t row_step, const float* right, int pitch,
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
DEVICE void add_features(float* to, int features, const Real* left, int64_t stride, const float* right, int depth) {
    constexpr int P = V * LANES;
    int d = 0;
    for (; d + ROWS<V> <= features; d += ROWS<V>)
        add_product<ROWS<V>, V>(to + d * P, P, left + d * stride, stride, right, P, depth);
    for (; d < features; ++d) add_product<1, V>(to + d * P, P, left + d * stride, stride, right, P, depth);
}

// To four keys' rows of sums, from feature `c` on: their rows of `left`, [key][query], times `right`, [query][feature].
template <int V>
DEVICE void add_keys(float* to, const float* left, const float* right, int features, int queries, int c) {
    for (; c + V * LANES <= features; c += V * LANES)
        add_product<4, V>(to + c, features, left, queries, right + c, features, queries);
    if constexpr (V > 1) add_keys<V / 2>(to, left, right, features, queries, c);
}

// Columns of a tensor's rows as a panel, times `scale`; zeros beyond the row's end and the last feature.
template <int V>
DEVICE void take(const AttentionShape& d, const Real* from, int first, float scale, int rows, float* panel) {
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
DEVICE void put(const Columns& d, Real* row, int first, const Samples<LANES>& x) {
    if (first + LANES <= d.tokens) {
        store<LANES>(row + first, x);
        return;
    }
    alignas(64) float lanes[LANES];
    store<LANES>(lanes, x);
    for (int i = 0; i < LANES && first + i < d.row; ++i) put(row + first + i, first + i < d.tokens ? lanes[i] : 0.0f);
}

DEVICE void put_zeros(const AttentionShape& d, Real* rows, int first, int end) {
    for (int row = 0; row < d.head_dim; ++row)
        for (int c = first; c < end; c += ROW_LANES)
            store<ROW_LANES>(rows + row * stride_of(d) + c, splat<ROW_LANES>(0.0f));
}

template <int V>
DEVICE void panel(const AttentionForwardArgs& a, ForwardLocal& local, int head, int sample, int first) {
    constexpr int P = V * LANES;
    const AttentionShape& d = a.shape;
    const int64_t stride = stride_of(d);
    const Real* k = a.qkv + rows_of(d, KEY, head, sample);
    const Real* v = a.qkv + rows_of(d, VALUE, head, sample);
    take<V>(d, a.qkv + rows_of(d, QUERY, head, sample), first, a.scale, d.head_dim, local.q);
    Samples<LANES> top[V], total[V];
    UNROLL for (int u = 0; u < V; ++u) top[u] = splat<LANES>(-INFINITY), total[u] = splat<LANES>(0.0f);
    for (int c = 0; c < d.head_dim * P; c += LANES) store<LANES>(local.y + c, splat<LANES>(0.0f));

    for (int key = 0; key < d.columns.tokens; key += KEYS) {
        const int keys = int(min64(KEYS, d.columns.tokens - key));
        for (int j = 0; j < keys; j += ROWS<V>) {
            Samples<LANES> s[ROWS<V>][V];
            set_zero<ROWS<V>, V>(s);
            multiply<ROWS<V>, V>(s, k + key + j, 1, stride, local.q, P, d.head_dim);
            UNROLL for (int i = 0; i < ROWS<V>; ++i)
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

    Real* y = a.y + rows_of(d, QUERY, head, sample);
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
DEVICE void put_turned(const AttentionShape& d, const float* sums, int features, int key, int keys, Real* rows) {
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

// The gradients that a pass makes.
struct Wanted {
    bool dq, dkv;
};

// What the queries of a panel and `keys` keys from `key` on give to dq, dk and dv.
template <int V>
DEVICE void panel(const AttentionBackwardArgs& a, BackwardLocal& local, int head, int sample, int first, int key,
                  int keys, Wanted wanted) {
    constexpr int P = V * LANES;
    const AttentionShape& d = a.shape;
    const int64_t stride = stride_of(d), rows = rows_of(d, QUERY, head, sample);
    const int features = multiple(d.head_dim, LANES);
    const Real* k = a.qkv + rows_of(d, KEY, head, sample) + key;
    const Real* v = a.qkv + rows_of(d, VALUE, head, sample) + key;
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
    if (wanted.dq && key > 0)
        take<V>(d, a.dqkv + rows, first, 1.0f, d.head_dim, local.dq);
    else
        for (int c = 0; c < d.head_dim * P; c += LANES) store<LANES>(local.dq + c, splat<LANES>(0.0f));

    for (int begin = 0; begin < keys; begin += KEYS) {
        const int end = int(min64(begin + KEYS, keys));
        for (int j = begin; j < end; j += ROWS<V>) {
            float* ds = local.ds + (j - begin) * P;
            Samples<LANES> s[ROWS<V>][V];
            set_zero<ROWS<V>, V>(s);
            multiply<ROWS<V>, V>(s, k + j, 1, stride, local.q, P, d.head_dim);
            UNROLL for (int i = 0; i < ROWS<V>; ++i)
                UNROLL for (int u = 0; u < V; ++u)
                    store<LANES>(local.p + i * P + u * LANES, exponential<LANES>(s[i][u] - lse[u]));
            set_zero<ROWS<V>, V>(s);
            multiply<ROWS<V>, V>(s, v + j, 1, stride, local.dy, P, d.head_dim);
            UNROLL for (int i = 0; i < ROWS<V>; ++i)
                UNROLL for (int u = 0; u < V; ++u) {
                    const Samples<LANES> p = load<LANES>(local.p + i * P + u * LANES);
                    store<LANES>(ds + i * P + u * LANES, p * (s[i][u] - delta[u]));
                }
            for (int i = 0; wanted.dkv && i < ROWS<V>; i += 4) {
                add_keys<VECTORS>(local.dv + (j + i) * features, local.p + i * P, local.dyt, features, P, 0);
                add_keys<VECTORS>(local.dk + (j + i) * features, ds + i * P, local.qt, features, P, 0);
            }
        }
        if (wanted.dq) add_features<V>(local.dq, d.head_dim, k + begin, stride, local.ds, end - begin);
    }
    if (!wanted.dq) return;
    const float scale = key + keys == d.columns.tokens ? a.scale : 1.0f;
    for (int row = 0; row < d.head_dim; ++row)
        UNROLL for (int u = 0; u < V; ++u)
            put(d.columns, a.dqkv + rows + row * stride, first + u * LANES,
                load<LANES>(local.dq + row * P + u * LANES) * scale);
}

// The panels that cover a row from `first` on: of V vectors, and of fewer at its end.
template <int V, class Args, class Local, class... Keys>
DEVICE void panels(const Args& a, Local& local, int head, int sample, int first, Keys... keys) {
    const int row = a.shape.columns.row;
    for (; first + V / 2 * LANES < row; first += V * LANES) panel<V>(a, local, head, sample, first, keys...);
    if constexpr (V > 1)
        if (first < row) panels<V / 2>(a, local, head, sample, first, keys...);
}

DEVICE void forward(const AttentionForwardArgs& a, ForwardLocal& local, int sample, int head) {
    const AttentionShape& d = a.shape;
    if (sample >= int(*a.count) || !a.live[head]) {
        put_zeros(d, a.y + rows_of(d, QUERY, head, sample), 0, d.columns.row);
        return;
    }
    panels<VECTORS>(a, local, head, sample, 0);
}

DEVICE void backward(const AttentionBackwardArgs& a, BackwardLocal& local, int sample, int head) {
    const AttentionShape& d = a.shape;
    Real* dk = a.dqkv + rows_of(d, KEY, head, sample);
    Real* dv = a.dqkv + rows_of(d, VALUE, head, sample);
    if (sample >= int(*a.count) || !a.live[head]) {
        put_zeros(d, a.dqkv + rows_of(d, QUERY, head, sample), 0, d.columns.row);
        put_zeros(d, dk, 0, d.columns.row);
        put_zeros(d, dv, 0, d.columns.row);
        return;
    }
    const int features = multiple(d.head_dim, LANES), tokens = d.columns.tokens;
    const int tiles = int(ceil_div(tokens, KEY_SUMS / features / LANES * LANES));
    const int most = multiple(int(ceil_div(tokens, tiles)), LANES);
    const bool apart = tiles > 1 && sizeof(Real) < sizeof(float);
    if (apart) panels<VECTORS>(a, local, head, sample, 0, 0, tokens, Wanted{true, false});
    for (int key = 0; key < tokens; key += most) {
        const int keys = int(min64(most, tokens - key));
        for (int c = 0; c < multiple(keys, LANES) * features; c += LANES) {
            store<LANES>(local.dk + c, splat<LANES>(0.0f));
            store<LANES>(local.dv + c, splat<LANES>(0.0f));
        }
        panels<VECTORS>(a, local, head, sample, 0, key, keys, Wanted{!apart, true});
        put_turned(d, local.dk, features, key, keys, dk);
        put_turned(d, local.dv, features, key, keys, dv);
    }
    // Whole vectors may end before the padded tokens do.
    put_zeros(d, dk, multiple(tokens, LANES), d.columns.row);
    put_zeros(d, dv, multiple(tokens, LANES), d.columns.row);
}

// Grid: samples, heads.
BARRIER_FREE_KERNEL(REAL(attention_forward_direct), AttentionForwardArgs, 1) {
    LOCAL(ForwardLocal, local);
    forward(a, local, blockIdx.x, blockIdx.y);
}

BARRIER_FREE_KERNEL(REAL(attention_backward_direct), AttentionBackwardArgs, 1) {
    LOCAL(BackwardLocal, local);
    backward(a, local, blockIdx.x, blockIdx.y);
}
