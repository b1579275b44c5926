// mma.cuh - products of small tiles by a warp on tensor cores, bf16 with f32 sums, and copies to shared memory that a
// thread does not wait for: mma.sync, ldmatrix and cp.async of sm_80 and newer, and what they mean on the host.
//
// All 32 lanes of a warp call these together, each with its number. On the host a lane reads what another lane's address
// names after it has come to the same place: as between warps, a barrier must stand between that and writing there again.
#pragma once
#include "kernels/lib/device.cuh"

// A lane's part of a tile. With g = lane / 4 and t = lane % 4, each word two bf16, the first in its lower half:
//   left   16 x 16: row g, columns 2t and 2t+1; row g+8, the same; row g, columns 2t+8 and 2t+9; row g+8, the same
//   right  16 x 8:  rows 2t and 2t+1 of column g; rows 2t+8 and 2t+9
//   sum    16 x 8:  row g, columns 2t and 2t+1; row g+8, the same
struct LeftTile {
    uint32_t word[4];
};
struct RightTile {
    uint32_t word[2];
};
struct SumTile {
    float value[4];
};

#ifdef __CUDACC__

// sum += left right.
DEVICE void multiply_add(int, SumTile& sum, const LeftTile& left, const RightTile& right) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum.value[0]), "+f"(sum.value[1]), "+f"(sum.value[2]), "+f"(sum.value[3])
        : "r"(left.word[0]), "r"(left.word[1]), "r"(left.word[2]), "r"(left.word[3]), "r"(right.word[0]),
          "r"(right.word[1]));
}

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four 8 x 8 matrices of bf16 in shared memory: lane l gives the address of row l % 8 of matrix l / 8, 16 bytes. Of
// matrix i the lane gets, in word i, columns 2t and 2t+1 of row g; transposed, rows 2t and 2t+1 of column g. `transposed`
// is a constant.
DEVICE void load_matrices(int, bool transposed, const bf16* row, uint32_t (&words)[4]) {
    if (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(shared_address(row))
                     : "memory");
}

// A left tile that lies as the lanes hold it: [lane][8].
DEVICE LeftTile load_left_packed(int lane, const bf16* at) {
    const uint4 v = *reinterpret_cast<const uint4*>(at + lane * 8);
    return {{v.x, v.y, v.z, v.w}};
}

// A thread's copies of 16 bytes from global to shared memory, in groups. PENDING: how many at most have not arrived.
template <int PENDING>
struct AsyncCopies {
    // Zeros where nothing is there; `from` is then not read, but must be an address all the same.
    DEVICE void copy(bf16* to, const bf16* from, bool there) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                     "r"(there ? 16 : 0)
                     : "memory");
    }
    // Ends a group.
    DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
    // Until this thread's groups but the last LEFT have arrived. What others copied is there after a barrier.
    template <int LEFT>
    DEVICE void wait() {
        asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
    }
};

#else

// Calls, since unrolled kernels have hundreds of them.
#define DILT_CALL [[maybe_unused]] static __attribute__((noinline))

// What 32 lanes gave: rows of a left tile and columns of a right one as floats.
DEVICE void dilt_left_row(const uint64_t (*lanes)[4], int row, float (&values)[16]) {
    for (int t = 0; t < 4; ++t)
        for (int half = 0; half < 2; ++half) {
            const uint32_t pair = uint32_t(lanes[row % 8 * 4 + t][half] >> (row < 8 ? 0 : 32));
            values[8 * half + 2 * t] = __uint_as_float(pair << 16);
            values[8 * half + 2 * t + 1] = __uint_as_float(pair & 0xffff0000u);
        }
}
DEVICE void dilt_right_column(const uint64_t (*lanes)[4], int column, float (&values)[16]) {
    for (int t = 0; t < 4; ++t)
        for (int half = 0; half < 2; ++half) {
            const uint32_t pair = uint32_t(lanes[column * 4 + t][2] >> 32 * half);
            values[8 * half + 2 * t] = __uint_as_float(pair << 16);
            values[8 * half + 2 * t + 1] = __uint_as_float(pair & 0xffff0000u);
        }
}

#define multiply_add(lane, sum, left, right) dilt_multiply_add(DILT_SITE, lane, sum, left, right)
DILT_CALL void dilt_multiply_add(const char* site, int lane, SumTile& sum, const LeftTile& left,
                                 const RightTile& right) {
    const auto words = [](uint32_t low, uint32_t high) { return low | uint64_t(high) << 32; };
    const uint64_t own[4] = {words(left.word[0], left.word[1]), words(left.word[2], left.word[3]),
                             words(right.word[0], right.word[1]), 0};
    const uint64_t(*lanes)[4] = dilt_host_gather(site, &own);
    float rows[2][16], columns[2][16];
    for (int i = 0; i < 2; ++i) {
        dilt_left_row(lanes, lane / 4 + 8 * i, rows[i]);
        dilt_right_column(lanes, lane % 4 * 2 + i, columns[i]);
    }
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) {
            float product = 0.0f;
            for (int k = 0; k < 16; ++k) product += rows[i][k] * columns[j][k];
            sum.value[2 * i + j] += product;
        }
}

// What a GPU reads or copies 16 bytes of at once.
DEVICE void demand_alignment(const void* p) {
    if (uintptr_t(p) % 16) __builtin_trap();
}

#define load_matrices(lane, transposed, row, words) dilt_load_matrices(DILT_SITE, lane, transposed, row, words)
DILT_CALL void dilt_load_matrices(const char* site, int lane, bool transposed, const bf16* row,
                                  uint32_t (&words)[4]) {
    demand_alignment(row);
    const uint64_t own[4] = {uint64_t(row), 0, 0, 0};
    const uint64_t(*lanes)[4] = dilt_host_gather(site, &own);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const auto at = [&](int r, int c) { return uint32_t(reinterpret_cast<const bf16*>(lanes[8 * i + r][0])[c].bits); };
        words[i] = transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
    }
}

DEVICE LeftTile load_left_packed(int lane, const bf16* at) {
    LeftTile tile;
    demand_alignment(at);
    memcpy(tile.word, at + lane * 8, sizeof tile.word);
    return tile;
}

// The host copies when the thread waits, and leaves NaN there until then.
template <int PENDING>
struct AsyncCopies {
    struct Copy {
        bf16* to;
        const bf16* from;
        int group;
        bool there;
    };
    Copy pending[PENDING];
    uint32_t first = 0, end = 0;
    int group = 0;

    DEVICE void copy(bf16* to, const bf16* from, bool there) {
        if (end - first == PENDING) __builtin_trap();
        demand_alignment(to), demand_alignment(from);
        memset(to, 0xff, 16);
        pending[end++ % PENDING] = {to, from, group, there};
    }
    DEVICE void commit() { ++group; }
    template <int LEFT>
    DEVICE void wait() {
        for (; first != end && pending[first % PENDING].group < group - LEFT; ++first) {
            const Copy& copy = pending[first % PENDING];
            if (copy.there)
                memcpy(copy.to, copy.from, 16);
            else
                memset(copy.to, 0, 16);
        }
    }
};

#endif

// The left tile whose element (row, step) is at[row * PITCH + step], or at[step * PITCH + row] if it lies TRANSPOSED.
template <bool TRANSPOSED, int PITCH>
DEVICE LeftTile load_left(int lane, const bf16* at) {
    LeftTile tile;
    const int row = TRANSPOSED ? lane % 8 + lane / 16 * 8 : lane % 16, other = TRANSPOSED ? lane / 8 % 2 * 8 : lane / 16 * 8;
    load_matrices(lane, TRANSPOSED, at + row * PITCH + other, tile.word);
    return tile;
}

// Two right tiles side by side, whose element (step, column) is at[step * PITCH + column], or at[column * PITCH + step].
template <bool TRANSPOSED, int PITCH>
DEVICE void load_right(int lane, const bf16* at, RightTile& first, RightTile& second) {
    const int row = TRANSPOSED ? lane % 8 + lane / 16 * 8 : lane % 16, other = TRANSPOSED ? lane / 8 % 2 * 8 : lane / 16 * 8;
    uint32_t words[4];
    load_matrices(lane, !TRANSPOSED, at + row * PITCH + other, words);
    first.word[0] = words[0], first.word[1] = words[1];
    second.word[0] = words[2], second.word[1] = words[3];
}

template <int N>
DEVICE void clear(SumTile (&sum)[N]) {
    UNROLL for (int i = 0; i < N; ++i)
        UNROLL for (int e = 0; e < 4; ++e) sum[i].value[e] = 0.0f;
}
