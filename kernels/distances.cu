// distances.cu - the squared distances between probes as a layer sees them:
//
//   d[i,j] = sum over f of (x[f,i] - y[f,j])^2
//
// x: [features, samples], y likewise, Real; d: [splits, rows, pitch], f32. Vectors beyond the n of an operand are the
// origin, so that row n of d holds squared lengths. Differences are squared, instead of the product of x and y subtracted
// from squared lengths, since near probes would lose all digits. distance_matrix.cu makes distances of them.
//
// A block owns a 64 x 64 tile of d and a split of the features, which pass through memory of its own, 64 at a time. Their
// sums are f32, added to f32 totals. Limit: additions and multiplications, 3 an element of d and a feature.
#define DILT_NO_ARRAYS
#include "kernels/lib/device.cuh"

struct RepresentationArgs {
    const Real* x;        // [features, positions, columns]
    float* out;           // [rows, columns.n]: features (pooled), or features, positions and tokens
    int64_t elements;     // of out
    int64_t positions;
    int32_t n;            // probes: samples from there on are zero
    int32_t pooled;
    Columns columns;
};

struct SquaredDistancesArgs {
    const Real* x;        // [features, x_pitch]
    const Real* y;        // [features, y_pitch]
    float* out;           // [splits, rows, pitch]
    int64_t features, x_pitch, y_pitch, pitch;
    int32_t x_n, y_n;
    int32_t rows, columns;
    int32_t splits;
    int32_t upper;        // only tiles that reach above the diagonal
};

constexpr int TILE = 64;
constexpr int THREADS = 256;

struct Stage {
    float x[TILE][TILE];  // [feature, vector]
    float y[TILE][TILE];
};
struct LocalStage : Stage {
    float total[TILE][TILE];
};

// ROW_LANES vectors of an operand from `at` on, at a feature.
DEVICE Samples<ROW_LANES> vectors(const Real* row, int at, int n, int64_t pitch) {
    if (at >= n || at >= pitch) return splat<ROW_LANES>(0.0f);
    return first_lanes<ROW_LANES>(load<ROW_LANES>(row + at), n - at);
}

DEVICE void copy(const SquaredDistancesArgs& a, Stage& stage, int64_t feature, int64_t end, int row, int column,
                 int thread, int threads) {
    for (int i = thread * ROW_LANES; i < TILE * TILE; i += threads * ROW_LANES) {
        const int64_t f = feature + i / TILE;
        const int at = i % TILE;
        const bool inside = f < end;
        store<ROW_LANES>(&stage.x[i / TILE][at],
                         inside ? vectors(a.x + f * a.x_pitch, row + at, a.x_n, a.x_pitch) : splat<ROW_LANES>(0.0f));
        store<ROW_LANES>(&stage.y[i / TILE][at],
                         inside ? vectors(a.y + f * a.y_pitch, column + at, a.y_n, a.y_pitch) : splat<ROW_LANES>(0.0f));
    }
}

// Sums of R x V vectors over the features of a stage.
template <int R, int V, int L>
DEVICE void add_squares(const Stage& stage, int row, int column, Samples<L> (&total)[R][V]) {
    Samples<L> sum[R][V];
    UNROLL for (int i = 0; i < R; ++i)
        UNROLL for (int v = 0; v < V; ++v) sum[i][v] = splat<L>(0.0f);
    for (int f = 0; f < TILE; ++f) {
        const auto x = load_uniform<R>(&stage.x[f][row]);
        Samples<L> y[V];
        UNROLL for (int v = 0; v < V; ++v) y[v] = load<L>(&stage.y[f][column + v * L]);
        UNROLL for (int i = 0; i < R; ++i)
            UNROLL for (int v = 0; v < V; ++v) {
                const Samples<L> apart = y[v] - x[i];
                sum[i][v] += apart * apart;
            }
    }
    UNROLL for (int i = 0; i < R; ++i)
        UNROLL for (int v = 0; v < V; ++v) total[i][v] += sum[i][v];
}

template <int R, int V, int L>
DEVICE void put(const SquaredDistancesArgs& a, float* out, int row, int column, const Samples<L> (&total)[R][V]) {
    UNROLL for (int i = 0; i < R; ++i)
        UNROLL for (int v = 0; v < V; ++v)
            if (row + i < a.rows && column + v * L < a.pitch)
                store<L>(out + (row + i) * a.pitch + column + v * L, total[i][v]);
}

// Features of a split.
DEVICE int64_t split_begin(const SquaredDistancesArgs& a, int64_t split) { return a.features * split / a.splits; }

// Grid: tiles of columns, tiles of rows, splits.
KERNEL(REAL(squared_distances), SquaredDistancesArgs, Stage, THREADS) {
    SHARED(Stage, stage);
    const int row = blockIdx.y * TILE, column = blockIdx.x * TILE, thread = threadIdx.x;
    if (a.upper && column + TILE <= row) return;
    const int own_row = row + thread / 16 * 4, own_column = column + thread % 16 * 4;
    Samples<4> total[4][1];
    UNROLL for (int i = 0; i < 4; ++i) total[i][0] = splat<4>(0.0f);
    const int64_t end = split_begin(a, blockIdx.z + 1);
    for (int64_t feature = split_begin(a, blockIdx.z); feature < end; feature += TILE) {
        copy(a, stage, feature, end, row, column, thread, THREADS);
        __syncthreads();
        add_squares<4, 1, 4>(stage, own_row - row, own_column - column, total);
        __syncthreads();
    }
    put<4, 1, 4>(a, a.out + int64_t(blockIdx.z) * a.rows * a.pitch, own_row, own_column, total);
}

BARRIER_FREE_KERNEL(REAL(squared_distances_direct), SquaredDistancesArgs, 1) {
    LOCAL(LocalStage, stage);
    constexpr int R = 4, V = 2, WIDTH = V * LANES;
    const int row = blockIdx.y * TILE, column = blockIdx.x * TILE;
    if (a.upper && column + TILE <= row) return;
    Samples<LANES> total[R][V];
    const int64_t begin = split_begin(a, blockIdx.z), end = split_begin(a, blockIdx.z + 1);
    for (int64_t feature = begin; feature < end; feature += TILE) {
        copy(a, stage, feature, end, row, column, 0, 1);
        for (int i = 0; i < TILE; i += R)
            for (int j = 0; j < TILE; j += WIDTH) {
                UNROLL for (int r = 0; r < R; ++r)
                    UNROLL for (int v = 0; v < V; ++v)
                        total[r][v] = feature == begin ? splat<LANES>(0.0f) : load<LANES>(&stage.total[i + r][j + v * LANES]);
                add_squares<R, V, LANES>(stage, i, j, total);
                UNROLL for (int r = 0; r < R; ++r)
                    UNROLL for (int v = 0; v < V; ++v) store<LANES>(&stage.total[i + r][j + v * LANES], total[r][v]);
            }
    }
    float* out = a.out + int64_t(blockIdx.z) * a.rows * a.pitch;
    for (int i = 0; i < TILE && row + i < a.rows; ++i)
        for (int j = 0; j < TILE && column + j < a.pitch; j += ROW_LANES)
            store<ROW_LANES>(out + (row + i) * a.pitch + column + j,
                             begin < end ? load<ROW_LANES>(&stage.total[i][j]) : splat<ROW_LANES>(0.0f));
}

// f32 rows of a layer's output for squared_distances: what is pooled, or whose samples do not lie side by side.
BARRIER_FREE_KERNEL(REAL(representation), RepresentationArgs, THREADS) {
    const int64_t tokens = a.columns.tokens, parts = a.pooled ? 1 : a.positions * tokens;
    EACH(i, a.elements) {
        const int64_t sample = i % a.columns.n, row = i / a.columns.n;
        const int64_t feature = row / parts, part = row % parts;
        const int64_t first = a.pooled ? 0 : part / tokens, last = a.pooled ? a.positions : first + 1;
        const int64_t from = a.pooled ? 0 : part % tokens, to = a.pooled ? tokens : from + 1;
        double sum = 0.0;
        for (int64_t p = first; p < last && sample < a.n; ++p) {
            const Real* x = a.x + ((feature * a.positions + p) * a.columns.n + sample) * a.columns.row;
            for (int64_t t = from; t < to; ++t) sum += double(widen(x[t]));
        }
        a.out[i] = float(sum / double((last - first) * (to - from)));
    }
}
