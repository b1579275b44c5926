// conv_kept.cuh - what the kernels with kept weights alone take: rows by themselves and groups of 8 (conv_sparse.cuh says what
// their lists are), groups on tensor cores of 32 (conv_groups_mma.cu) and of 64 (conv_groups_wgmma.cu). R: rows of a group.
#pragma once
#include "kernels/conv.cuh"

// Forward: x to y. Input gradient: dy to dx.
struct ConvSparseArgs {
    const Real* from;
    const uint32_t* rows;    // [groups, R], or NONE; null where R = 1: rows in their order
    const uint32_t* starts;  // [groups, taps] and one more: where the entries of a group's tap begin; R >= 32: [groups, classes]
    const int32_t* offsets;  // [entries]: where each reads, in elements from a pixel's origin
    const uint32_t* shifts;  // [entries], R >= 32: in rows and columns; above every image where an entry fills up 16 or 64
    const float* values;     // [entries, R], rounded as products read weights; R >= 32: null
    const bf16* left_tiles;  // R = 32: [entries / 16, 2, 32, 8]; R = 64: [entries / 64, 64 rows, 64]
    Real* to;
    ConvShape shape;
    int32_t groups;
    int32_t classes;         // of pixels, R >= 32
    EpilogueArgs epilogue;
};

struct ConvSparseGradientArgs {
    const Real* x;
    const Real* dy;
    const uint32_t* rows;     // of the forward pass, as the next four
    const uint32_t* starts;   // R >= 32: not read
    const int32_t* offsets;
    const uint32_t* shifts;   // [entries]; read where rows are by themselves, staged, and where R >= 32
    const uint32_t* chunks;   // [chunks, 4]: group, tap (R = 1: of all entries; R >= 32: 0), first entry, the one after the last
    float* partial;           // [splits, entries, R]; R >= 32: [splits], each as left_tiles
    ConvShape shape;
    int32_t entries, chunk_count;
    int32_t units, splits;    // R >= 32: units are not read
};

// Where an entry for tensor cores reads, from a pixel's origin.
struct Entry {
    int offset, rows, columns;
};

template <class Args>
DEVICE Entry entry_of(const Args& a, uint32_t entry) {
    const uint32_t shift = a.shifts[entry];
    return {a.offsets[entry], shift_rows(shift), shift_columns(shift)};
}
// What is in no image.
DEVICE Entry no_entry() { return {0, -(1 << 15), 0}; }
