// conv_direct.cu - convolution on the host: the formulas of conv.cu, each thread a register tile that reads rows where they
// lie; the cache does the staging. In f32 filters of one tap and stride 1 are in linear.cu.
#define DILT_NO_ARRAYS
#include "kernels/conv.cuh"

// Register tiles: rows x vectors of samples for the product, rows x taps for the weight gradient. The accumulators and
// a few loaded vectors fit the 32 (AVX-512) or 16 registers. Tried with AVX-512 on ResNet-20's layers, least CPU ms of
// 20 runs on a busy Xeon of family 6, model 207, forward / input gradient: 8x2 96 / 107, 6x4 100 / 107, 4x4 191 / 149,
// 16x1 144 / 230. Weight gradient: 4x6 119, 8x3 182; taps in the order (r, s, c) gained nothing, in small planes neither.
constexpr int DIRECT_VECTORS = 2;
constexpr int DIRECT_SAMPLES = DIRECT_VECTORS * LANES;
constexpr int DIRECT_ROWS = LANES == 16 ? 8 : 4;
constexpr int GRADIENT_ROWS = 4;
constexpr int GRADIENT_TAPS = LANES == 16 ? 6 : 3;
constexpr int GRADIENT_OUTSIDE = 64;  // zeros that stand for samples outside the image

// What one thread does: several register tiles, whose input window it reads from cache again and again. The same for
// every instruction set, since src/ops/conv.rs cuts the grid by it.
constexpr int DIRECT_GROUP_ROWS = 64;
constexpr int DIRECT_GROUP_SAMPLES = 64;
constexpr int GRADIENT_GROUP_TAPS = 12;

template <bool GRADIENT, int ROWS, int VECTORS, int L>
DEVICE void direct_tile(const ConvArgs& a, const Axis& down, const Axis& across, int row, int pixel, int n,
                        const uint32_t (&live)[VECTORS]) {
    using Pass = Taps<GRADIENT>;
    const ConvShape& d = a.shape;
    const int64_t width = Pass::from_width(d), plane = Pass::from_height(d) * width * d.n;
    const WeightStrides strides = weight_strides<Real>(d);
    const int64_t row_stride = Pass::row_stride(strides), channel_stride = Pass::channel_stride(strides);
    const Real* from = a.from + (down.source * width + across.source) * d.n + n;
    const Real* w = a.w + row * row_stride + down.first * strides.row + across.first * strides.column;
    Samples<L> sum[ROWS][VECTORS];
    UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int v = 0; v < VECTORS; ++v) sum[i][v] = splat<L>(a.epilogue.bias ? a.epilogue.bias[row + i] : 0.0f);
    for (int channel = 0; channel < Pass::channels(d); ++channel, from += plane, w += channel_stride) {
        for (int r = 0; r < down.count; ++r) {
            const Real* x = from + r * down.source_step * width * d.n;
            const Real* tap = w + r * down.step * strides.row;
            for (int s = 0; s < across.count; ++s, x += across.source_step * d.n, tap += across.step * strides.column) {
                Samples<L> read[VECTORS];
                UNROLL for (int v = 0; v < VECTORS; ++v) read[v] = load<L>(x + v * L);
                UNROLL for (int i = 0; i < ROWS; ++i)
                    UNROLL for (int v = 0; v < VECTORS; ++v) sum[i][v] += read[v] * widen(tap[i * row_stride]);
            }
        }
    }
    const int64_t pixels = int64_t(Pass::to_height(d)) * Pass::to_width(d);
    UNROLL for (int i = 0; i < ROWS; ++i) {
        Real* to = a.to + ((row + i) * pixels + pixel) * d.n + n;
        UNROLL for (int v = 0; v < VECTORS; ++v) {
            if (a.epilogue.bias) sum[i][v] = kept<L>(sum[i][v], live[v]);
            if (a.epilogue.accumulate) sum[i][v] += load<L>(to + v * L);
            store<L>(to + v * L, sum[i][v]);
        }
    }
}

template <bool GRADIENT, int VECTORS, int L>
DEVICE void direct_rows(const ConvArgs& a, const Axis& down, const Axis& across, int row, int end, int pixel, int n) {
    uint32_t live[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; ++v)
        live[v] = a.epilogue.bias ? live_columns<L>(a.epilogue.columns, int(*a.epilogue.count), n + v * L) : 0;
    for (; row + DIRECT_ROWS <= end; row += DIRECT_ROWS)
        direct_tile<GRADIENT, DIRECT_ROWS, VECTORS, L>(a, down, across, row, pixel, n, live);
    for (; row + 2 <= end; row += 2) direct_tile<GRADIENT, 2, VECTORS, L>(a, down, across, row, pixel, n, live);
    for (; row < end; ++row) direct_tile<GRADIENT, 1, VECTORS, L>(a, down, across, row, pixel, n, live);
}

// Grid: output pixels, groups of samples, groups of rows.
template <bool GRADIENT>
DEVICE void direct(const ConvArgs& a, int pixel, int samples, int rows) {
    using Pass = Taps<GRADIENT>;
    const ConvShape& d = a.shape;
    const int o = pixel / Pass::to_width(d), u = pixel % Pass::to_width(d);
    const Axis down = Pass::axis(o, d.r, Pass::from_height(d), d);
    const Axis across = Pass::axis(u, d.s, Pass::from_width(d), d);
    const int row = rows * DIRECT_GROUP_ROWS, row_end = int(min64(row + DIRECT_GROUP_ROWS, Pass::rows(d)));
    int n = samples * DIRECT_GROUP_SAMPLES;
    const int n_end = int(min64(n + DIRECT_GROUP_SAMPLES, d.n));
    for (; n + DIRECT_SAMPLES <= n_end; n += DIRECT_SAMPLES)
        direct_rows<GRADIENT, DIRECT_VECTORS, LANES>(a, down, across, row, row_end, pixel, n);
    constexpr int REST = LANES < 8 ? LANES : 8;
    for (; n < n_end; n += 8) direct_rows<GRADIENT, 8 / REST, REST>(a, down, across, row, row_end, pixel, n);
}

// Sums over output rows [begin, end): rows k.. x taps j.. of dw, where j counts (c, r, s). Columns (q, n) are walked
// in the order of memory: one vector of samples over the whole image at a time meets 8 of the first-level cache's 64
// sets at N = 128, and took 2.3 times as long for C = K = 16 on 32x32.
template <int L>
DEVICE void gradient_tile(const ConvWeightGradientArgs& a, int k, int j, int begin, int end,
                          float (&total)[GRADIENT_ROWS][GRADIENT_TAPS]) {
    const ConvShape& d = a.shape;
    const int taps = d.c * d.r * d.s, filter = d.r * d.s;
    const Real outside[GRADIENT_OUTSIDE] = {};
    int64_t dy[GRADIENT_ROWS];
    int c[GRADIENT_TAPS], r[GRADIENT_TAPS], s[GRADIENT_TAPS];
    int left = 0, right = d.q;  // columns q from left to right read inside the image for every tap
    UNROLL for (int i = 0; i < GRADIENT_ROWS; ++i) dy[i] = min64(k + i, d.k - 1) * d.p * d.q * d.n;
    UNROLL for (int t = 0; t < GRADIENT_TAPS; ++t) {
        const int tap = int(min64(j + t, taps - 1));
        c[t] = tap / filter, r[t] = tap % filter / d.s, s[t] = tap % d.s;
        left = int(max64(left, ceil_div(max64(d.pad - s[t], 0), d.stride)));
        right = int(min64(right, d.w - 1 + d.pad - s[t] < 0 ? 0 : (d.w - 1 + d.pad - s[t]) / d.stride + 1));
    }
    Samples<L> sum[GRADIENT_ROWS][GRADIENT_TAPS];
    UNROLL for (int i = 0; i < GRADIENT_ROWS; ++i)
        UNROLL for (int t = 0; t < GRADIENT_TAPS; ++t) sum[i][t] = splat<L>(0.0f);
    for (int p = begin; p < end; ++p) {
        const Real* row[GRADIENT_TAPS];  // where the tap reads for q = 0, or null above and below the image
        bool all = true, any = false;
        UNROLL for (int t = 0; t < GRADIENT_TAPS; ++t) {
            const int h = p * d.stride - d.pad + r[t];
            const bool inside = h >= 0 && h < d.h;
            row[t] = inside ? a.x + ((int64_t(c[t]) * d.h + h) * d.w + s[t] - d.pad) * d.n : nullptr;
            all &= inside, any |= inside;
        }
        if (!any) continue;
        for (int q = 0; q < d.q;) {
            // Where every tap reads inside the image, columns (q, n) merge (stride 1), else a run is one pixel at most,
            // and zeros stand for what is outside.
            const bool inside = all && q >= left && q < right;
            const int pixels = inside && d.stride == 1 ? right - q : 1;
            const int columns = pixels * d.n, run = inside ? columns : int(min64(columns, GRADIENT_OUTSIDE));
            for (int first = 0; first < columns; first += run) {
                const Real* x[GRADIENT_TAPS];
                UNROLL for (int t = 0; t < GRADIENT_TAPS; ++t) {
                    const int w = q * d.stride - d.pad + s[t];
                    const bool reads = inside || (row[t] && w >= 0 && w < d.w);
                    x[t] = reads ? row[t] + int64_t(q) * d.stride * d.n + first : outside;
                }
                const Real* g = a.dy + (int64_t(p) * d.q + q) * d.n + first;
                const int length = int(min64(run, columns - first));
                for (int i = 0; i < length; i += L) {
                    Samples<L> read[GRADIENT_TAPS];
                    UNROLL for (int t = 0; t < GRADIENT_TAPS; ++t) read[t] = load<L>(x[t] + i);
                    UNROLL for (int m = 0; m < GRADIENT_ROWS; ++m) {
                        const Samples<L> dyv = load<L>(g + dy[m] + i);
                        UNROLL for (int t = 0; t < GRADIENT_TAPS; ++t) sum[m][t] += dyv * read[t];
                    }
                }
            }
            q += pixels;
        }
    }
    UNROLL for (int i = 0; i < GRADIENT_ROWS; ++i)
        UNROLL for (int t = 0; t < GRADIENT_TAPS; ++t) total[i][t] = lane_sum<L>(sum[i][t]);
}

// ---------------------------------------------------------------------------------------------------------- kernels

BARRIER_FREE_KERNEL(REAL(conv_forward_direct), ConvArgs, 1) { direct<false>(a, blockIdx.x, blockIdx.y, blockIdx.z); }

BARRIER_FREE_KERNEL(REAL(conv_input_gradient_direct), ConvArgs, 1) {
    direct<true>(a, blockIdx.x, blockIdx.y, blockIdx.z);
}

BARRIER_FREE_KERNEL(REAL(conv_weight_gradient_direct), ConvWeightGradientArgs, 1) {
    const ConvShape& d = a.shape;
    const int k = blockIdx.y * GRADIENT_ROWS, taps = d.c * d.r * d.s;
    const int first = int(int64_t(d.p) * blockIdx.z / a.splits), last = int(int64_t(d.p) * (blockIdx.z + 1) / a.splits);
    int j = blockIdx.x * GRADIENT_GROUP_TAPS;
    const int end = int(min64(j + GRADIENT_GROUP_TAPS, taps));
    float* partial = a.partial + int64_t(blockIdx.z) * d.k * taps;
    for (; j < end; j += GRADIENT_TAPS) {
        float total[GRADIENT_ROWS][GRADIENT_TAPS];
        if (LANES == ROW_LANES || d.n % LANES == 0)
            gradient_tile<LANES>(a, k, j, first, last, total);
        else
            gradient_tile<ROW_LANES>(a, k, j, first, last, total);
        for (int i = 0; i < GRADIENT_ROWS && k + i < d.k; ++i)
            for (int t = 0; t < GRADIENT_TAPS && j + t < end; ++t) partial[int64_t(k + i) * taps + j + t] = total[i][t];
    }
}
