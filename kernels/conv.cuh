// conv.cuh - what the kernels of convolutions share: the shape, which input a filter tap reads, and the arguments of
// conv.cu and conv_direct.cu.
#pragma once
#include "kernels/lib/device.cuh"

struct ConvShape {
    int32_t c, h, w;      // input channels, rows and columns
    int32_t k, r, s;      // output channels, filter rows and columns
    int32_t p, q;         // output rows and columns
    int32_t stride, pad;  // the same in both directions
    int32_t n;            // samples of a row, a multiple of 8
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
    static DEVICE int64_t row_stride(const ConvShape& d) { return int64_t(d.r) * d.s * (GRADIENT ? 1 : d.c); }
    static DEVICE int64_t channel_stride(const ConvShape& d) { return int64_t(d.r) * d.s * (GRADIENT ? d.c : 1); }

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

// Forward: x to y. Input gradient: dy to dx; bias is null.
struct ConvArgs {
    const float* from;
    const float* w;
    const float* bias;     // [K], or null
    float* to;
    const uint32_t* count; // number of true samples; read only where there is a bias, since padded columns stay zero
    ConvShape shape;
    Columns columns;       // what the shape's N is made of; read only where there is a bias
    int32_t accumulate;    // add to what `to` holds
};

struct ConvWeightGradientArgs {
    const float* x;
    const float* dy;
    float* partial;    // [splits, K, C*R*S]; dw itself if there is one split
    ConvShape shape;
    int32_t splits;    // ranges of columns (p,q,n), summed apart
};
