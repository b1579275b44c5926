// linear.cuh - products on the host: a block's columns of the right operand are packed in panels of one register tile's
// width, and multiplied with all of its rows. What the kernels of linear.cu and gw_direct.cu share.
//
//   to[i,j] = sum over t of a[i,t] b[t,j]
//
// A block owns a group of rows i and GROUP columns j. It copies some steps t of b, for its columns, to memory of its own.
// Sums that do not end there wait in `to`. Sums are f32 in an order that depends on the shape alone.
#pragma once
#include "kernels/lib/device.cuh"

// Register tiles of ROWS x PANEL, whose accumulators and a few loaded vectors fit the 32 (AVX-512) or 16 registers. 12 or
// 14 rows with AVX-512, and 6 with AVX2, gained nothing on the layers of ViT-Tiny; 128 steps lost up to a tenth.
constexpr int VECTORS = 2;
constexpr int PANEL = VECTORS * LANES;
constexpr int ROWS = LANES == 16 ? 8 : 4;
// Columns of a block; the same for every instruction set, since src/ops cuts the grid by them.
constexpr int GROUP = 64;
constexpr int PANELS = GROUP / PANEL;

// DEPTH steps of b for a block's columns. Columns past the end are zero.
template <int DEPTH>
struct alignas(64) Packed {
    float panel[PANELS][DEPTH][PANEL];
    // Copies steps of b, which lie `pitch` apart: its first `columns`, a multiple of ROW_LANES.
    DEVICE void copy(const float* b, int64_t pitch, int depth, int columns) {
        for (int step = 0; step < depth; ++step, b += pitch)
            UNROLL for (int j = 0; j < GROUP; j += ROW_LANES)
                store<ROW_LANES>(&panel[j / PANEL][step][j % PANEL],
                                 j < columns ? load<ROW_LANES>(b + j) : splat<ROW_LANES>(0.0f));
    }
};

// What a block multiplies at a time: rows of `a`, and `depth` packed steps of its columns.
struct Part {
    const float* a;
    int64_t row_stride, step_stride;
    int depth;
    float* to;
    int64_t pitch;      // of `to`
    int columns;
    const float* bias;  // of the rows; null where it was added before, or is none
    bool adds;          // to what `to` holds
    bool masks;         // columns that are not live become zero
};

template <int R, int DEPTH>
DEVICE void multiply(const Part& part, const float (&panel)[DEPTH][PANEL], const uint32_t (&live)[VECTORS], float* to,
                     int64_t pitch) {
    Samples<LANES> sum[R][VECTORS];
    UNROLL for (int i = 0; i < R; ++i)
        UNROLL for (int v = 0; v < VECTORS; ++v)
            sum[i][v] = part.adds ? load_anywhere<LANES>(to + i * pitch + v * LANES)
                                  : splat<LANES>(part.bias ? part.bias[i] : 0.0f);
    const float* a = part.a;
    for (int step = 0; step < part.depth; ++step, a += part.step_stride) {
        Samples<LANES> b[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = load<LANES>(&panel[step][v * LANES]);
        UNROLL for (int i = 0; i < R; ++i)
            UNROLL for (int v = 0; v < VECTORS; ++v) sum[i][v] += b[v] * a[i * part.row_stride];
    }
    UNROLL for (int i = 0; i < R; ++i)
        UNROLL for (int v = 0; v < VECTORS; ++v)
            store_anywhere<LANES>(to + i * pitch + v * LANES, part.masks ? kept<LANES>(sum[i][v], live[v]) : sum[i][v]);
}

// R rows. The panel at the edge of `to` is multiplied beside it.
template <int R, int DEPTH>
DEVICE void multiply_rows(Part& part, int& rows, const Packed<DEPTH>& packed, const uint32_t (&live)[PANELS][VECTORS]) {
    for (; rows >= R; rows -= R) {
        for (int panel = 0, first = 0; first < part.columns; ++panel, first += PANEL) {
            float* to = part.to + first;
            const int columns = part.columns - first;
            if (columns >= PANEL) {
                multiply<R>(part, packed.panel[panel], live[panel], to, part.pitch);
                continue;
            }
            float edge[R][PANEL] = {};
            for (int i = 0; i < R && part.adds; ++i)
                for (int j = 0; j < columns; ++j) edge[i][j] = to[i * part.pitch + j];
            multiply<R>(part, packed.panel[panel], live[panel], edge[0], PANEL);
            for (int i = 0; i < R; ++i)
                for (int j = 0; j < columns; ++j) to[i * part.pitch + j] = edge[i][j];
        }
        part.a += R * part.row_stride, part.to += R * part.pitch;
        if (part.bias) part.bias += R;
    }
}

template <int DEPTH>
DEVICE void multiply_part(Part part, int rows, const Packed<DEPTH>& packed, const uint32_t (&live)[PANELS][VECTORS]) {
    multiply_rows<ROWS>(part, rows, packed, live);
    multiply_rows<2>(part, rows, packed, live);
    multiply_rows<1>(part, rows, packed, live);
}
