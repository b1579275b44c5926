// conv.cuh - what the kernels of convolutions share: the shape, where weights lie, which input a filter tap reads, and the
// arguments of conv.cu, conv_mma.cu and conv_direct.cu.
#pragma once
#include "kernels/norm.cuh"

// The row of a group that has no more rows, and the place of a weight that is not kept.
constexpr uint32_t NONE = 0xffffffffu;

// Where an entry of a list reads, as rows and columns from a pixel's origin: 16 bits each.
DEVICE int shift_rows(uint32_t shift) { return int32_t(shift) >> 16; }
DEVICE int shift_columns(uint32_t shift) { return int16_t(shift & 0xffffu); }

struct ConvShape {
    int32_t c, h, w;      // input channels, rows and columns
    int32_t k, r, s;      // output channels, filter rows and columns
    int32_t p, q;         // output rows and columns
    int32_t stride, pad;  // the same in both directions
    int32_t n;            // samples of a row, a multiple of 8
};

// Channels of a filter tap in memory, where weights are bf16 and lie as [K, R, S, channels]: copies of 16 bytes need
// multiples of 8. An image of a few channels has them close together, and rows alone are padded.
DEVICE int channel_pitch(const ConvShape& d) { return d.c < 8 ? d.c : (d.c + 7) / 8 * 8; }

// Elements of w between filters, channels, and the rows and columns of a filter. What lies between is zero.
struct WeightStrides {
    int64_t filter, channel, row, column;
};

template <class T>
DEVICE WeightStrides weight_strides(const ConvShape& d) {
    if constexpr (sizeof(T) == 4) return {int64_t(d.c) * d.r * d.s, int64_t(d.r) * d.s, d.s, 1};
    const int pitch = channel_pitch(d);
    return {(int64_t(d.r) * d.s * pitch + 7) / 8 * 8, 1, int64_t(d.s) * pitch, pitch};
}

// Output pixels that meet the same filter taps, of a pass: all of the forward pass; of the input gradient those of one
// remainder by the stride in each direction, so that no tap is multiplied that falls between the rows of dy.
struct PixelClass {
    int first_h, first_w, step;   // output pixels: first + i step
    int height, width;            // how many
    int first_r, first_s;         // filter taps: first + i step
    int r, s;                     // how many
    int origin_h, origin_w;       // what pixel 0 reads at tap 0
};

// The filter taps of one axis that fall into the input, for output coordinate `o`: tap first + i*step reads input
// coordinate source + i*source_step, for i < count.
struct Axis {
    int first, step, source, source_step, count;
};

// What differs between the forward pass and the input gradient.
template <bool GRADIENT>
struct Taps {
    static DEVICE int rows(const ConvShape& d) { return GRADIENT ? d.c : d.k; }
    static DEVICE int channels(const ConvShape& d) { return GRADIENT ? d.k : d.c; }
    static DEVICE int to_height(const ConvShape& d) { return GRADIENT ? d.h : d.p; }
    static DEVICE int to_width(const ConvShape& d) { return GRADIENT ? d.w : d.q; }
    static DEVICE int from_height(const ConvShape& d) { return GRADIENT ? d.p : d.h; }
    static DEVICE int from_width(const ConvShape& d) { return GRADIENT ? d.q : d.w; }
    // Distance in w between rows of the product, and between channels of the reduction.
    static DEVICE int64_t row_stride(const WeightStrides& w) { return GRADIENT ? w.channel : w.filter; }
    static DEVICE int64_t channel_stride(const WeightStrides& w) { return GRADIENT ? w.filter : w.channel; }

    static DEVICE PixelClass pixels(const ConvShape& d, int number) {
        if (!GRADIENT) return {0, 0, 1, d.p, d.q, 0, 0, d.r, d.s, -d.pad, -d.pad};
        const int h = number / d.stride, w = number % d.stride;
        const int r = (h + d.pad) % d.stride, s = (w + d.pad) % d.stride;
        return {h,
                w,
                d.stride,
                h < d.h ? (d.h - 1 - h) / d.stride + 1 : 0,
                w < d.w ? (d.w - 1 - w) / d.stride + 1 : 0,
                r,
                s,
                r < d.r ? (d.r - 1 - r) / d.stride + 1 : 0,
                s < d.s ? (d.s - 1 - s) / d.stride + 1 : 0,
                (h + d.pad) / d.stride,
                (w + d.pad) / d.stride};
    }

    static DEVICE Axis axis(int o, int filter, int extent, const ConvShape& d) {
        if (GRADIENT) {
            const int reach = o + d.pad;
            int first = int(max64(0, reach - int64_t(extent - 1) * d.stride));
            const int last = int(min64(filter - 1, reach));
            if (first > last) return {0, 1, 0, 0, 0};
            first += (reach - first) % d.stride;
            const int count = first > last ? 0 : (last - first) / d.stride + 1;
            return {first, d.stride, (reach - first) / d.stride, -1, count};
        }
        const int origin = o * d.stride - d.pad;
        const int first = int(max64(0, -origin));
        const int last = int(min64(filter, extent - origin));
        return {first, 1, origin + first, 1, last > first ? last - first : 0};
    }
};

// The batch norm whose result a layer reads, or the sum of two, for an input gradient that begins its backward pass (norm.cu,
// norm_pair.cu): arguments as there.
struct NormBeforeArgs {
    NormalisedArgs norms[2];  // x of the second is null where there is one
    const Real* y;
    const uint32_t* source;
    GradientSums* sums[2];    // of each [features of x, tiles of a row]; the first null where there is no norm
    int32_t relu;
};

// What becomes of a product's sums before they are stored, and beside that. All but bias and accumulate is for tensor cores alone
// (conv_mma.cuh), and null or not read elsewhere.
struct EpilogueArgs {
    const float* bias;      // forward: [K], or null
    const uint32_t* count;  // number of true samples; read for a bias, since padded columns stay zero, and for statistics
    Moments* statistics;    // forward: [K, tiles of a row] of what is stored, for a batch norm of samples; or null
    Real* beside;           // forward: a sum with what is stored, or GELU of it, written too; or null
    const Real* operand;    // forward: what that adds, null for GELU; input gradient: x of the GELU that it goes through, or null
    NormBeforeArgs norm;    // input gradient: of what is stored, of all that comes to a norm's result
    Columns columns;        // what the shape's N is made of; read as the count is
    int32_t accumulate;     // add to what is there
};

// Forward: x to y. Input gradient: dy to dx.
struct ConvArgs {
    const Real* from;
    const Real* w;
    Real* to;
    ConvShape shape;
    EpilogueArgs epilogue;
};

struct ConvWeightGradientArgs {
    const Real* x;
    const Real* dy;
    float* partial;    // [splits, K, C*R*S]; dw itself if there is one split
    float* row_sums;   // [K] of dy, the gradient of a bias; of a split, behind its other sums; null but on tensor cores
    ConvShape shape;
    int32_t splits;    // ranges of columns (p,q,n), summed apart
};

// Elements between the sums of two splits.
DEVICE int64_t split_pitch(const ConvWeightGradientArgs& a) {
    const ConvShape& d = a.shape;
    return int64_t(d.k) * (d.c * d.r * d.s + (a.row_sums ? 1 : 0));
}
