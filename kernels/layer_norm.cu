// layer_norm.cu - layer norm of each column over its features (Ba et al. 2016), forward and backward.
//
//   xhat = (x - mean) invstd,  invstd = 1 / sqrt(var + epsilon);   y = gamma xhat + beta
//   dx = invstd (g - mean of g - xhat mean of (g xhat)),  g = gamma dy;   dgamma = sum of dy xhat;   dbeta = sum of dy
//
// x, y and their gradients: [D, columns], Real; gamma, beta: [D], mean, invstd: [columns], f32. Means, of x as stored, are
// over the D features of a column, the sums of dgamma and dbeta over the columns of a feature. Padded columns are zero in
// x and dy, and are written as zeros, in mean and invstd too.
//
// A block owns a tile of 64 columns and walks down its rows by chunks of 8, which a thread holds at once. On a GPU the
// 8 warps of a block share the chunks, each lane has columns `lane` and `lane + 32`, and the warps' sums meet in shared
// memory; on the host the block's one thread has vectors of columns, 64 of a row at a time with AVX-512. The
// variance is that of deviations from the mean of each chunk, joined by Chan's formula, all of it relative to the
// column's first value: nothing is lost where the mean is large.
//
// dgamma and dbeta: each block sums the columns of its tile, layer_norm_sum.cu adds the tiles in their order. So sums
// have a fixed order, which depends on the shape and the threads of a block.
// Limit: bytes. Forward reads x twice, the second time from cache if a tile of 64 D values stays there, and writes y;
// backward reads x and dy twice in the same way and writes dx, beside 2 / 64 of a tensor for the tiles' sums.
#include "kernels/lib/device.cuh"

struct LayerNormShape {
    int32_t features;
    Columns columns;
};

struct LayerNormForwardArgs {
    const Real* x;
    const float* gamma;
    const float* beta;
    const uint32_t* count;  // number of true samples
    float* mean;            // null: not wanted
    float* invstd;
    Real* y;
    LayerNormShape shape;
    float epsilon;
};

struct LayerNormBackwardArgs {
    const Real* x;
    const Real* dy;
    const float* gamma;
    const float* mean;
    const float* invstd;
    const uint32_t* count;
    float* partial;  // [tiles, 2, D rounded up to a multiple of 8]: sums of dy xhat and of dy over a tile
    Real* dx;
    LayerNormShape shape;
    int32_t accumulate;  // add to what dx holds
};

constexpr int TILE = 64;  // columns of a block
constexpr int CHUNK = 8;  // rows that a thread holds at once
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int VECTORS = 4;  // of a thread with direct policy

struct WarpColumns {
    float first[WARPS][TILE];
    float second[WARPS][TILE];
};

DEVICE int columns_of(const LayerNormShape& d) { return d.columns.n * d.columns.row; }

DEVICE int padded(int features) { return (features + CHUNK - 1) / CHUNK * CHUNK; }

// The V vectors of L columns of a thread. On the host they are consecutive and exist; a warp's lanes take turns.
template <int L, int V, bool STAGED>
struct Share {
    int tile;
    int first;     // column
    int columns;   // of a row
    int lane;
    int warp;
    bool adds;     // to the tile's sums, which another share of it has begun

    static constexpr int warps = STAGED ? WARPS : 1;

    DEVICE int column(int v) const { return first + v * (STAGED ? 32 * L : L); }
    DEVICE bool inside(int v) const { return !STAGED || column(v) < columns; }
    template <class T>
    DEVICE Samples<L> read(const T* row, int v) const {
        return inside(v) ? load<L>(row + column(v)) : splat<L>(0.0f);
    }
    template <class T>
    DEVICE void write(T* row, int v, const Samples<L>& x) const {
        if (inside(v)) store<L>(row + column(v), x);
    }
    // 1 in true columns, 0 in the others. As floats, since g++ 12 makes scalar code of bits within a loop over rows.
    DEVICE Samples<L> live(const Columns& d, const uint32_t* count, int v) const {
        return kept<L>(splat<L>(1.0f), live_columns<L>(d, int(min64(*count, d.n)), column(v)));
    }
};

// The lanes where `live` is 1, exactly +0 in the others, whatever they hold.
template <int L>
DEVICE Samples<L> where_live(const Samples<L>& live, const Samples<L>& x) {
    return where_at_most<L>(splat<L>(1.0f), live, x, splat<L>(0.0f));
}

// Calls f(Rows<R>, row) for the chunks of this warp, R = CHUNK, and for its single rows at the end, R = 1.
template <int R>
struct Rows {
    static constexpr int count = R;
};
template <class F>
DEVICE void each_chunk(int features, int warp, int warps, F f) {
    const int chunks = features / CHUNK;
    for (int chunk = warp; chunk < chunks; chunk += warps) f(Rows<CHUNK>{}, chunk * CHUNK);
    for (int row = chunks * CHUNK + warp; row < features; row += warps) f(Rows<1>{}, row);
}

// The same where chunks only keep many loads of a warp in flight: the host's thread goes row by row.
template <bool STAGED, class F>
DEVICE void each_row(int features, int warp, F f) {
    if constexpr (STAGED)
        each_chunk(features, warp, WARPS, f);
    else
        for (int row = 0; row < features; ++row) f(Rows<1>{}, row);
}

// How many rows a warp has.
DEVICE int rows_of(int features, int warp) {
    return (features / CHUNK + WARPS - 1 - warp) / WARPS * CHUNK + (features % CHUNK > warp);
}

// Chan, Golub and LeVeque 1983: mean and sum of squared deviations of `before` values, joined by those of `items` more.
template <int L>
DEVICE void join(Samples<L>& mean, Samples<L>& squares, float before, const Samples<L>& other_mean,
                 const Samples<L>& other_squares, float items) {
    const float share = items / (before + items);
    const Samples<L> off = other_mean - mean;
    mean += off * share;
    squares += other_squares + off * off * (before * share);
}

template <int L, int V, bool STAGED>
DEVICE void forward(const LayerNormForwardArgs& a, WarpColumns* shared, const Share<L, V, STAGED>& own) {
    const int features = a.shape.features, warps = own.warps;
    const Real* x = a.x;
    Samples<L> pivot[V], mean[V], squares[V], invstd[V];
    UNROLL for (int v = 0; v < V; ++v) {
        pivot[v] = own.read(x, v);
        mean[v] = squares[v] = splat<L>(0.0f);
    }
    float items = 0.0f;
    each_chunk(features, own.warp, warps, [&](auto rows, int row) {
        constexpr int R = decltype(rows)::count;
        UNROLL for (int v = 0; v < V; ++v) {
            Samples<L> off[R], sum = splat<L>(0.0f), square = splat<L>(0.0f);
            UNROLL for (int i = 0; i < R; ++i) {
                off[i] = own.read(x + int64_t(row + i) * own.columns, v) - pivot[v];
                sum += off[i];
            }
            sum = sum * (1.0f / R);
            UNROLL for (int i = 0; i < R; ++i) {
                const Samples<L> deviation = off[i] - sum;
                square += deviation * deviation;
            }
            join<L>(mean[v], squares[v], items, sum, square, R);
        }
        items += R;
    });
    if constexpr (STAGED) {
        UNROLL for (int v = 0; v < V; ++v) {
            store<L>(&shared->first[own.warp][own.lane + v * 32], mean[v]);
            store<L>(&shared->second[own.warp][own.lane + v * 32], squares[v]);
            mean[v] = squares[v] = splat<L>(0.0f);
        }
        __syncthreads();
        items = 0.0f;
        for (int warp = 0; warp < warps; ++warp) {
            const float more = float(rows_of(features, warp));
            if (more == 0.0f) continue;
            UNROLL for (int v = 0; v < V; ++v)
                join<L>(mean[v], squares[v], items, load<L>(&shared->first[warp][own.lane + v * 32]),
                        load<L>(&shared->second[warp][own.lane + v * 32]), more);
            items += more;
        }
    }

    Samples<L> live[V];
    UNROLL for (int v = 0; v < V; ++v) {
        live[v] = own.live(a.shape.columns, a.count, v);
        const Samples<L> var = squares[v] * (1.0f / float(features)) + a.epsilon;
        UNROLL for (int i = 0; i < L; ++i) invstd[v][i] = 1.0f / sqrtf(var[i]);
        mean[v] = where_live<L>(live[v], pivot[v] + mean[v]);
        invstd[v] = where_live<L>(live[v], invstd[v]);
        if (a.mean && own.warp == 0) {
            own.write(a.mean, v, mean[v]);
            own.write(a.invstd, v, invstd[v]);
        }
    }
    each_row<STAGED>(features, own.warp, [&](auto rows, int row) {
        UNROLL for (int i = 0; i < decltype(rows)::count; ++i) {
            const int64_t at = int64_t(row + i) * own.columns;
            const float gamma = a.gamma[row + i], beta = a.beta[row + i];
            UNROLL for (int v = 0; v < V; ++v) {
                const Samples<L> y = (own.read(x + at, v) - mean[v]) * invstd[v] * gamma + beta;
                own.write(a.y + at, v, where_live<L>(live[v], y));
            }
        }
    });
}

// Sums each of COUNT values over the warp; returned to a lane is the sum of value lane / (32 / COUNT). Lanes that
// differ in a bit give each other half of what they hold, so that COUNT sums take as many exchanges and not five times
// more.
template <int COUNT>
DEVICE float warp_sums(float (&value)[COUNT], int lane) {
    int held = COUNT;
    UNROLL for (int offset = 16; offset > 0; offset /= 2) {
        if (held == 1) {
            value[0] += __shfl_xor_sync(0xffffffffu, value[0], offset);
            continue;
        }
        held /= 2;
        const bool upper = lane & offset;
        UNROLL for (int i = 0; i < COUNT / 2; ++i) {
            if (i >= held) break;
            const float keeps = upper ? value[held + i] : value[i], gives = upper ? value[i] : value[held + i];
            value[i] = keeps + __shfl_xor_sync(0xffffffffu, gives, offset);
        }
    }
    return value[0];
}

template <int L, int V, bool STAGED>
DEVICE void backward(const LayerNormBackwardArgs& a, WarpColumns* shared, const Share<L, V, STAGED>& own) {
    const int features = a.shape.features, warps = own.warps, stride = padded(features);
    float* partial = a.partial + int64_t(own.tile) * 2 * stride;
    Samples<L> mean[V], invstd[V], along[V], dot[V];
    UNROLL for (int v = 0; v < V; ++v) {
        mean[v] = own.read(a.mean, v);
        invstd[v] = own.read(a.invstd, v);
        along[v] = dot[v] = splat<L>(0.0f);
    }
    each_row<STAGED>(features, own.warp, [&](auto rows, int row) {
        constexpr int R = decltype(rows)::count;
        float sums[2 * R];  // of R rows, of dy xhat and of dy
        UNROLL for (int i = 0; i < R; ++i) {
            const int64_t at = int64_t(row + i) * own.columns;
            const float gamma = a.gamma[row + i];
            Samples<L> product = splat<L>(0.0f), sum = splat<L>(0.0f);
            UNROLL for (int v = 0; v < V; ++v) {
                const Samples<L> dy = own.read(a.dy + at, v);
                const Samples<L> dy_xhat = dy * ((own.read(a.x + at, v) - mean[v]) * invstd[v]);
                product += dy_xhat;
                sum += dy;
                along[v] += dy * gamma;
                dot[v] += dy_xhat * gamma;
            }
            sums[i] = lane_sum<L>(product);
            sums[R + i] = lane_sum<L>(sum);
        }
        if constexpr (STAGED) {
            constexpr int holders = 32 / (2 * R);  // lanes of the same sum
            const float total = warp_sums<2 * R>(sums, own.lane);
            const int value = own.lane / holders;
            if (own.lane % holders == 0) partial[value / R * stride + row + value % R] = total;
        } else {
            UNROLL for (int i = 0; i < R; ++i) {
                partial[row + i] = sums[i] + (own.adds ? partial[row + i] : 0.0f);
                partial[stride + row + i] = sums[R + i] + (own.adds ? partial[stride + row + i] : 0.0f);
            }
        }
    });
    if constexpr (STAGED) {
        UNROLL for (int v = 0; v < V; ++v) {
            store<L>(&shared->first[own.warp][own.lane + v * 32], along[v]);
            store<L>(&shared->second[own.warp][own.lane + v * 32], dot[v]);
            along[v] = dot[v] = splat<L>(0.0f);
        }
        __syncthreads();
        for (int warp = 0; warp < warps; ++warp)
            UNROLL for (int v = 0; v < V; ++v) {
                along[v] += load<L>(&shared->first[warp][own.lane + v * 32]);
                dot[v] += load<L>(&shared->second[warp][own.lane + v * 32]);
            }
    }

    Samples<L> live[V];
    const float share = 1.0f / float(features);
    UNROLL for (int v = 0; v < V; ++v) {
        live[v] = own.live(a.shape.columns, a.count, v);
        along[v] = along[v] * share;
        dot[v] = dot[v] * share;
    }
    each_row<STAGED>(features, own.warp, [&](auto rows, int row) {
        UNROLL for (int i = 0; i < decltype(rows)::count; ++i) {
            const int64_t at = int64_t(row + i) * own.columns;
            const float gamma = a.gamma[row + i];
            UNROLL for (int v = 0; v < V; ++v) {
                const Samples<L> xhat = (own.read(a.x + at, v) - mean[v]) * invstd[v];
                Samples<L> dx = (own.read(a.dy + at, v) * gamma - along[v] - xhat * dot[v]) * invstd[v];
                if (a.accumulate) dx += own.read(a.dx + at, v);
                own.write(a.dx + at, v, where_live<L>(live[v], dx));
            }
        }
    });
}

// A tile by one thread: whole vectors of the machine, then what is left.
#define BY_ONE_THREAD(body)                                                                                    \
    const int columns = columns_of(a.shape), tile = int(blockIdx.x), begin = tile * TILE;                      \
    const int end = int(min64(begin + TILE, columns));                                                         \
    int first = begin;                                                                                         \
    for (; first + VECTORS * LANES <= end; first += VECTORS * LANES)                                           \
        body(a, nullptr, Share<LANES, VECTORS, false>{tile, first, columns, 0, 0, first > begin});             \
    for (; first < end; first += ROW_LANES)                                                                    \
        body(a, nullptr, Share<ROW_LANES, 1, false>{tile, first, columns, 0, 0, first > begin})

#define BY_WARPS(body)                                                                                         \
    SHARED(WarpColumns, shared);                                                                               \
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, tile = int(blockIdx.x);              \
    body(a, &shared, Share<1, TILE / 32, true>{tile, tile * TILE + lane, columns_of(a.shape), lane, warp, false})

// Grid of these four: tiles.
KERNEL(REAL(layer_norm_forward_staged), LayerNormForwardArgs, WarpColumns, THREADS, 4, 3) { BY_WARPS(forward); }

BARRIER_FREE_KERNEL(REAL(layer_norm_forward_direct), LayerNormForwardArgs, 1) { BY_ONE_THREAD(forward); }

KERNEL(REAL(layer_norm_backward_staged), LayerNormBackwardArgs, WarpColumns, THREADS) { BY_WARPS(backward); }

BARRIER_FREE_KERNEL(REAL(layer_norm_backward_direct), LayerNormBackwardArgs, 1) { BY_ONE_THREAD(backward); }
