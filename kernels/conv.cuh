// conv.cuh - what the kernels of convolutions share: the shape, and which input a filter tap reads.
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

    // The input coordinate that one tap reads, or -1 where there is none.
    static DEVICE int source(int o, int tap, int extent, const ConvShape& d) {
        int at;
        if (GRADIENT) {
            const int reach = o + d.pad - tap;
            if (reach < 0 || reach % d.stride != 0) return -1;
            at = reach / d.stride;
        } else {
            at = o * d.stride - d.pad + tap;
        }
        return at >= 0 && at < extent ? at : -1;
    }
};
