// tokens.cu - between images and columns of tokens: patches, embedding and pooling.
//
//   patches:   y[(c,r,s),n,t] = x[c, py*p+r, px*p+s, n] for token t = prefix + py*(W/p) + px; zero for t < prefix
//   embedding: y[d,n,t] = (t < prefix ? token[d] : x[d,n,t] + bias[d]) + positions[t,d]
//              dpositions[t,d] = sum over n of dy[d,n,t];  dtoken[d] = dpositions[0,d]
//              dbias[d] = sum over n and t >= prefix of dy[d,n,t];  dx = dy, which the caller shares
//   pooling:   y[d,n] = x[d,n,0], or the mean of x[d,n,t] over t >= prefix, and its gradient
//
// x of patches: [C, H, W, N]. Columns of tokens: [D, N, row], the first `tokens` of a row true. positions: [tokens, D].
// Images, tokens and their gradients are Real, parameters and theirs f32.
// Padded tokens and the tokens of padded samples are written as zero. Limit: bytes, each read and written once.
//
// Patches transpose tokens and samples: one thread turns a square of EDGE x EDGE in its registers, so that it reads and
// writes whole 32-byte sectors. The sums of a gradient have a fixed order: each thread's samples, then the parts.
#include "kernels/lib/device.cuh"

struct PatchShape {
    int32_t c, h, w;  // channels, rows and columns of x
    int32_t patch;    // pixels of a patch in each direction, a divisor of h and w
    int32_t prefix;   // tokens before the first patch
    Columns columns;
};

struct PatchArgs {
    const Real* x;
    Real* y;
    PatchShape shape;
};

struct EmbedShape {
    int32_t features;
    int32_t prefix;   // 0 or 1
    Columns columns;
};

struct EmbedForwardArgs {
    const Real* x;
    const float* token;      // [features], or null: no prefix
    const float* bias;       // [features], or null
    const float* positions;  // [tokens, features]
    const uint32_t* count;   // number of true samples
    Real* y;
    EmbedShape shape;
};

struct EmbedBackwardArgs {
    const Real* dy;
    float* dtoken;      // [features], or null
    float* dbias;       // [features], or null
    float* dpositions;  // [tokens, features]
    EmbedShape shape;
};

struct TokenPoolShape {
    int32_t features;
    int32_t prefix;
    int32_t first;    // token 0 instead of the mean
    Columns columns;
};

// Forward: x to y. Backward: dy to dx.
struct TokenPoolArgs {
    const Real* from;
    Real* to;
    TokenPoolShape shape;
};

constexpr int THREADS = 256;
constexpr int EDGE = 8;          // rows of tokens and of samples are padded to a multiple of it
constexpr int L = ROW_LANES;
constexpr int TOKENS = 32;       // tokens of a feature whose gradients are summed at a time
constexpr int VECTORS = TOKENS / L;
constexpr int POOL_ROWS = 32;    // rows [d, n] of a block of the pool
constexpr int ROW_THREADS = 8;   // threads that share one

// A bit for each lane of the tokens from `token` on: set from `begin` to before `end`.
DEVICE uint32_t lanes_within(int token, int begin, int end) {
    uint32_t bits = 0;
    UNROLL for (int lane = 0; lane < L; ++lane) bits |= uint32_t(token + lane >= begin && token + lane < end) << lane;
    return bits;
}

BARRIER_FREE_KERNEL(REAL(patches_forward), PatchArgs, THREADS) {
    const PatchShape& d = a.shape;
    const int row = d.columns.row, n = d.columns.n, across = d.w / d.patch;
    const int64_t row_squares = row / EDGE, squares = n / EDGE * row_squares;
    EACH(i, int64_t(d.c) * d.patch * d.patch * squares) {
        const int feature = int(i / squares), token = int(i % row_squares) * EDGE;
        const int sample = int(i % squares / row_squares) * EDGE;
        const int64_t c = feature / (d.patch * d.patch);
        const int r = feature / d.patch % d.patch, s = feature % d.patch;
        Samples<EDGE> square[EDGE];
        UNROLL for (int j = 0; j < EDGE; ++j) {
            const int patch = token + j - d.prefix;
            const int64_t h = patch / across * d.patch + r, w = patch % across * d.patch + s;
            const bool reads = patch >= 0 && token + j < d.columns.tokens;
            square[j] = reads ? load<EDGE>(a.x + ((c * d.h + h) * d.w + w) * n + sample) : splat<EDGE>(0.0f);
        }
        UNROLL for (int j = 0; j < EDGE; ++j) {
            Samples<EDGE> turned;
            UNROLL for (int lane = 0; lane < EDGE; ++lane) turned[lane] = square[lane][j];
            store<EDGE>(a.y + (int64_t(feature) * n + sample + j) * row + token, turned);
        }
    }
}

// Grid: vectors of a feature's tokens in groups of EDGE samples, which share what is added to them; features.
BARRIER_FREE_KERNEL(REAL(embed_forward), EmbedForwardArgs, THREADS) {
    const EmbedShape& d = a.shape;
    const int feature = blockIdx.y, row = d.columns.row, tokens = d.columns.tokens, count = int(*a.count);
    const int64_t base = int64_t(feature) * d.columns.n * row;
    const float bias = a.bias ? a.bias[feature] : 0.0f, token = a.token ? a.token[feature] : 0.0f;
    const int vectors = row / L;
    EACH(i, int64_t(d.columns.n / EDGE) * vectors) {
        const int t = int(i) % vectors * L, n = int(i) / vectors * EDGE;
        const uint32_t patches = lanes_within(t, d.prefix, tokens);
        Samples<L> added;
        UNROLL for (int lane = 0; lane < L; ++lane) {
            const float position = t + lane < tokens ? a.positions[int64_t(t + lane) * d.features + feature] : 0.0f;
            added[lane] = t + lane < d.prefix ? token + position : position;
        }
        const Samples<L> shift = kept<L>(splat<L>(bias), patches);
        for (int sample = n; sample < n + EDGE; ++sample) {
            const int64_t at = base + int64_t(sample) * row + t;
            const Samples<L> y = kept<L>(load<L>(a.x + at), patches) + shift + added;
            store<L>(a.y + at, sample < count ? y : splat<L>(0.0f));
        }
    }
}

struct EmbedShared {
    float sum[THREADS / VECTORS][TOKENS];
    WarpSums sums;
};

// One block per feature. Of TOKENS tokens at a time, each thread sums a vector over its part of the samples.
KERNEL(REAL(embed_backward), EmbedBackwardArgs, EmbedShared, THREADS) {
    SHARED(EmbedShared, shared);
    const EmbedShape& d = a.shape;
    const int feature = blockIdx.x, thread = threadIdx.x, threads = blockDim.x, row = d.columns.row;
    const Real* dy = a.dy + int64_t(feature) * d.columns.n * row;
    const int parts = int(max64(1, threads / VECTORS)), part = thread / VECTORS;
    float dbias = 0.0f;
    for (int base = 0; base < row; base += TOKENS) {
        for (int vector = thread % VECTORS; vector < VECTORS && base + vector * L < row; vector += threads) {
            Samples<L> sum = splat<L>(0.0f);
            for (int n = part; n < d.columns.n; n += parts) sum += load<L>(dy + int64_t(n) * row + base + vector * L);
            store<L>(&shared.sum[part][vector * L], sum);
        }
        __syncthreads();
        for (int t = thread; t < TOKENS && base + t < d.columns.tokens; t += threads) {
            const int token = base + t;
            float sum = shared.sum[0][t];
            for (int p = 1; p < parts; ++p) sum += shared.sum[p][t];
            a.dpositions[int64_t(token) * d.features + feature] = sum;
            if (token >= d.prefix) dbias += sum;
            else if (a.dtoken) a.dtoken[feature] = sum;
        }
        __syncthreads();
    }
    dbias = block_sum(dbias, shared.sums.scratch, thread, threads);
    if (a.dbias && thread == 0) a.dbias[feature] = dbias;
}

// One block per POOL_ROWS rows. Their number is a multiple of 8, so that all threads of a warp leave the loop together.
KERNEL(REAL(token_pool_forward), TokenPoolArgs, NoShared, THREADS) {
    const TokenPoolShape& d = a.shape;
    const int width = blockDim.x == 1 ? 1 : ROW_THREADS, own = threadIdx.x % width;
    const int64_t begin = int64_t(blockIdx.x) * POOL_ROWS;
    const int64_t end = min64(begin + POOL_ROWS, int64_t(d.features) * d.columns.n);
    const float share = 1.0f / (d.columns.tokens - d.prefix);
    for (int64_t row = begin + threadIdx.x / width; row < end; row += blockDim.x / width) {
        const Real* x = a.from + row * d.columns.row;
        float y = widen(x[0]);
        if (!d.first) {
            Samples<L> sum = splat<L>(0.0f);
            for (int t = own * L; t < d.columns.row; t += width * L)
                sum += kept<L>(load<L>(x + t), lanes_within(t, d.prefix, d.columns.tokens));
            y = lane_sum<L>(sum);
            for (int other = width / 2; other > 0; other /= 2) y += __shfl_xor_sync(0xffffffffu, y, other);
            y *= share;
        }
        if (own == 0) put(a.to + row, y);
    }
}

// Grid: vectors of a feature's dx, features.
BARRIER_FREE_KERNEL(REAL(token_pool_backward), TokenPoolArgs, THREADS) {
    const TokenPoolShape& d = a.shape;
    const int n = d.columns.n, vectors = d.columns.row / L;
    const Real* dy = a.from + int64_t(blockIdx.y) * n;
    Real* dx = a.to + int64_t(blockIdx.y) * n * d.columns.row;
    const int begin = d.first ? 0 : d.prefix, end = d.first ? 1 : d.columns.tokens;
    const float share = 1.0f / (end - begin);
    EACH(i, int64_t(n) * vectors) {
        const uint32_t reached = lanes_within(int(i) % vectors * L, begin, end);
        store<L>(dx + i * L, kept<L>(splat<L>(widen(dy[int(i) / vectors]) * share), reached));
    }
}
