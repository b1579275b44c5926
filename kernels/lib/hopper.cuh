// hopper.cuh - what sm_90a has for products, and what it means on the host: boxes of a tensor that TMA copies to shared memory
// (cp.async.bulk.tensor), barriers in shared memory that count threads and bytes (mbarrier), and products of 64 rows that
// four warps start together and that read shared memory themselves (wgmma), bf16 with f32 sums.
//
// A box has rows of 64 bf16, 128 bytes, one after the other from a multiple of 1,024 bytes on. Within eight rows TMA puts the
// 16 bytes number c of row r at place c ^ r (128-byte swizzle), and wgmma finds them there.
#pragma once
#include "kernels/lib/mma.cuh"

// Elements of a box's row.
constexpr int BOX = 64;

// A tensor of four sizes, innermost first, and the box that a copy brings. Made by src/device/tensor_map.rs: for the driver on
// a GPU, else as DiltTensorMap below.
struct alignas(128) TensorMap {
    uint64_t word[16];
};

// What a descriptor of wgmma says of an operand in boxes that lie one after the other: bytes from box to box and from eight of
// a box's rows to the next, each a 16th of them, and the swizzle. Where it begins is added to it.
constexpr uint64_t BOX_BYTES = 2 * BOX * BOX, EIGHT_ROWS = 16 * BOX;
constexpr uint64_t BOXES_DESCRIPTOR = BOX_BYTES / 16 << 16 | EIGHT_ROWS / 16 << 32 | uint64_t(1) << 62;

// Bytes to the steps of the reduction from `step` on, a multiple of 16. A box's rows are rows of the operand, 64 steps each;
// TRANSPOSED, they are 64 steps, and boxes follow each other along the operand's rows.
template <bool TRANSPOSED>
DEVICE int bytes_to(int step) {
    return TRANSPOSED ? step * 2 * BOX : step * 2;
}

// Where in a box the 16 bytes number `chunk` of a row lie, in elements: for who does not leave that to TMA.
DEVICE int place_in_box(int row, int chunk) { return row * BOX + (chunk ^ row % 8) * 8; }

#ifdef __CUDACC__

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool HOPPER = true;
#else
constexpr bool HOPPER = false;  // compiled for another GPU: nothing here may be called but the trap
#endif
DEVICE void not_hopper() { __trap(); }

// What is the same in all lanes of a warp, told to the compiler, which then computes with it once for all.
DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Counts what a phase of a stage waits for: threads that arrive, and bytes that copies bring. Phases alternate in parity.
struct PhaseBarrier {
    uint64_t state;
};

DEVICE void start(PhaseBarrier& barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// Shows started barriers to TMA; to be followed by a barrier of the block.
DEVICE void barriers_started() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(PhaseBarrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives, and makes the phase wait for so many bytes too.
DEVICE void arrive_expecting(PhaseBarrier& barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                 : "memory");
}
// Until the phase of this parity is complete.
DEVICE void wait_phase(PhaseBarrier& barrier, int parity) {
    uint32_t complete;
    do {
        asm volatile(
            "{ .reg .pred complete;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
            "selp.u32 %0, 1, 0, complete; }"
            : "=r"(complete)
            : "r"(shared_address(&barrier)), "r"(parity)
            : "memory");
    } while (!complete);
}

// Copies the map's box from these coordinates on; elements outside of the tensor come as zeros. One thread calls it.
DEVICE void copy_box(bf16* to, const TensorMap& map, PhaseBarrier& barrier, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(shared_address(to)), "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// Shows to wgmma what this thread has written to shared memory; before it arrives where others wait for that.
DEVICE void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 16 steps of an operand, from `step` on: a descriptor.
struct Operand {
    uint64_t descriptor;
};

template <bool TRANSPOSED>
DEVICE Operand operand(const bf16* boxes, int step) {
    return {((shared_address(boxes) + bytes_to<TRANSPOSED>(step)) & 0x3ffff) >> 4 | BOXES_DESCRIPTOR};
}

// Operands %0 to %(count - 1) of an instruction, which are a thread's sums.
#define DILT_TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define DILT_SUMS_32 DILT_TEN() DILT_TEN(1) DILT_TEN(2) "%30, %31"
#define DILT_SUMS_64 DILT_TEN() DILT_TEN(1) DILT_TEN(2) DILT_TEN(3) DILT_TEN(4) DILT_TEN(5) "%60, %61, %62, %63"
#define DILT_SUMS_128                                                                                                    \
    DILT_TEN() DILT_TEN(1) DILT_TEN(2) DILT_TEN(3) DILT_TEN(4) DILT_TEN(5) DILT_TEN(6) DILT_TEN(7) DILT_TEN(8)           \
    DILT_TEN(9) DILT_TEN(10) DILT_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define DILT_SUM(j) "+f"(sum[j].value[0]), "+f"(sum[j].value[1]), "+f"(sum[j].value[2]), "+f"(sum[j].value[3])
#define DILT_8_SUMS(j)                                                                                              \
    DILT_SUM(j), DILT_SUM(j + 1), DILT_SUM(j + 2), DILT_SUM(j + 3), DILT_SUM(j + 4), DILT_SUM(j + 5), DILT_SUM(j + 6), \
        DILT_SUM(j + 7)
#define DILT_WGMMA(n, sums, left_at, right_at, left_major, right_major, ...)                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" sums "}, %" #left_at ", %" #right_at  \
                 ", 1, 1, 1, %" #left_major ", %" #right_major ";"                                               \
                 : __VA_ARGS__                                                                                   \
                 : "l"(left.descriptor), "l"(right.descriptor), "n"(int(LEFT_TRANSPOSED)), "n"(int(RIGHT_TRANSPOSED)))

// Products of 64 rows and N columns by four warps, which all their threads call together. Of sum tile j a thread holds
// what mma.cuh says, columns 8 j on, of the 16 rows that its warp owns.
template <int N, bool LEFT_TRANSPOSED, bool RIGHT_TRANSPOSED>
struct WarpGroupProduct {
    DEVICE explicit WarpGroupProduct(int) {}

    // Before the first `add` of a group.
    DEVICE void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
    // sum += left right over 16 steps, some time before `wait`.
    DEVICE void add(SumTile (&sum)[N / 8], Operand left, Operand right) {
        if constexpr (N == 64)
            DILT_WGMMA(64, DILT_SUMS_32, 32, 33, 34, 35, DILT_8_SUMS(0));
        else if constexpr (N == 128)
            DILT_WGMMA(128, DILT_SUMS_64, 64, 65, 66, 67, DILT_8_SUMS(0), DILT_8_SUMS(8));
        else
            DILT_WGMMA(256, DILT_SUMS_128, 128, 129, 130, 131, DILT_8_SUMS(0), DILT_8_SUMS(8), DILT_8_SUMS(16),
                       DILT_8_SUMS(24));
    }
    // Ends a group.
    DEVICE void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
    // Until all groups but the last LEFT are done: what they read may be written again, and with none left sums be read.
    template <int LEFT>
    DEVICE void wait(SumTile (&sum)[N / 8]) {
        asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
        // Nothing that uses the sums may move before the wait.
        if constexpr (LEFT == 0)
            UNROLL for (int j = 0; j < N / 8; ++j)
                UNROLL for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(sum[j].value[e])::"memory");
    }
};

#else

constexpr bool HOPPER = true;
DEVICE void not_hopper() {}
DEVICE int uniform(int x) { return x; }

struct PhaseBarrier {
    int32_t bytes;     // that have not come
    uint8_t arrivals;  // of a phase
    uint8_t missing;   // of the current one
    uint8_t parity;    // of the current one
};
static_assert(sizeof(PhaseBarrier) == 8, "as large as CUDA's");

// ThreadSanitizer: what was done before a thread came to a barrier, or a copy did, is before what follows its phase.
#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_release(void* object);
#define DILT_RELEASE(object) __tsan_release(object)
#else
#define DILT_RELEASE(object)
#endif
extern "C" {
// Suspends while the barrier is in the phase of this parity; `object` is the barrier.
void dilt_host_phase(const char* site, const uint8_t* current, uint32_t parity, void* object);
}

// Counts what has come, atomically, as the GPU's barriers do: then ThreadSanitizer sees no race on a barrier itself.
DEVICE void dilt_count(PhaseBarrier& barrier, int bytes, int threads) {
    const int32_t missing_bytes = __atomic_add_fetch(&barrier.bytes, bytes, __ATOMIC_RELAXED);
    const uint8_t missing = __atomic_sub_fetch(&barrier.missing, uint8_t(threads), __ATOMIC_RELAXED);
    if (missing > barrier.arrivals) __builtin_trap();  // more threads than the phase waits for
    if (missing_bytes != 0 || missing != 0) return;
    __atomic_store_n(&barrier.missing, barrier.arrivals, __ATOMIC_RELAXED);
    __atomic_fetch_xor(&barrier.parity, uint8_t(1), __ATOMIC_RELAXED);
}
DEVICE void start(PhaseBarrier& barrier, int arrivals) {
    barrier = {0, uint8_t(arrivals), uint8_t(arrivals), 0};
}
DEVICE void barriers_started() {}
DEVICE void arrive_expecting(PhaseBarrier& barrier, int bytes) {
    DILT_RELEASE(&barrier);
    dilt_count(barrier, bytes, 1);
}
DEVICE void arrive(PhaseBarrier& barrier) { arrive_expecting(barrier, 0); }
#define wait_phase(barrier, phase) dilt_host_phase(DILT_SITE, &(barrier).parity, phase, &(barrier))
DEVICE void show_to_products() {}

struct DiltTensorMap {
    const bf16* first;
    uint64_t size[4];  // contiguous, innermost first
    uint64_t box[4];
};
static_assert(sizeof(DiltTensorMap) <= sizeof(TensorMap), "fits");

// Address bits 4 to 6 are those of the chunk, 7 to 9 those of the row.
DEVICE uintptr_t dilt_swizzled(uintptr_t at) { return at ^ (at >> 7 & 7) << 4; }

DILT_CALL void copy_box(bf16* to, const TensorMap& map, PhaseBarrier& barrier, int c0, int c1, int c2, int c3) {
    if (uintptr_t(to) % 1024 != 0) __builtin_trap();
    DiltTensorMap d;
    memcpy(&d, &map, sizeof d);
    const int64_t first[4] = {c0, c1, c2, c3};
    const auto inside = [&](int axis, int64_t i) { return first[axis] + i >= 0 && first[axis] + i < int64_t(d.size[axis]); };
    uintptr_t at = uintptr_t(to);
    for (int64_t i3 = 0; i3 < int64_t(d.box[3]); ++i3)
        for (int64_t i2 = 0; i2 < int64_t(d.box[2]); ++i2)
            for (int64_t i1 = 0; i1 < int64_t(d.box[1]); ++i1)
                for (int64_t i0 = 0; i0 < int64_t(d.box[0]); ++i0, at += 2) {
                    const bool there = inside(0, i0) && inside(1, i1) && inside(2, i2) && inside(3, i3);
                    const int64_t from = (((c3 + i3) * d.size[2] + (c2 + i2)) * d.size[1] + (c1 + i1)) * d.size[0] + (c0 + i0);
                    *reinterpret_cast<bf16*>(dilt_swizzled(at)) = there ? d.first[from] : bf16{0};
                }
    DILT_RELEASE(&barrier);
    dilt_count(barrier, -int32_t(at - uintptr_t(to)), 0);
}

// Where an operand begins, since an address is too long for a descriptor, and what a descriptor says of it, read as wgmma does:
// in bits 16 to 29 the leading and in bits 32 to 45 the stride byte offset, in the highest two the swizzle. The first counts
// where operands are transposed alone.
struct Operand {
    uintptr_t at;
    bool transposed;

    DEVICE float element(int row, int step) const {
        static_assert(BOXES_DESCRIPTOR >> 62 == 1, "the swizzle of 128 bytes");
        const int leading = int(BOXES_DESCRIPTOR >> 16 & 0x3fff) * 16, stride = int(BOXES_DESCRIPTOR >> 32 & 0x3fff) * 16;
        const int offset = transposed ? row / 64 * leading + row % 64 * 2 + step / 8 * stride + step % 8 * 128
                                      : row / 8 * stride + row % 8 * 128 + step * 2;
        return widen(*reinterpret_cast<const bf16*>(dilt_swizzled(at + offset)));
    }
};

template <bool TRANSPOSED>
DEVICE Operand operand(const bf16* boxes, int step) {
    return {uintptr_t(boxes) + bytes_to<TRANSPOSED>(step), TRANSPOSED};
}

// A thread's part of a product of N columns; its rows are `row` and the eighth after it.
DILT_CALL void dilt_group_product(SumTile* sum, int n, int row, int lane, Operand left, Operand right) {
    float rows[2][16], columns[2][16];
    for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 16; ++k) rows[i][k] = left.element(row + 8 * i, k);
    for (int j = 0; j < n / 8; ++j) {
        for (int i = 0; i < 2; ++i)
            for (int k = 0; k < 16; ++k) columns[i][k] = right.element(8 * j + lane % 4 * 2 + i, k);
        for (int e = 0; e < 4; ++e) {
            float product = 0.0f;
            for (int k = 0; k < 16; ++k) product += rows[e / 2][k] * columns[e % 2][k];
            sum[j].value[e] += product;
        }
    }
}

// The host multiplies when the thread waits: who lets operands be written before that is found out.
template <int N, bool LEFT_TRANSPOSED, bool RIGHT_TRANSPOSED>
struct WarpGroupProduct {
    static constexpr uint32_t PENDING = 16;
    struct Product {
        Operand left, right;
        int group;
    };
    Product pending[PENDING];
    uint32_t first = 0, end = 0;
    int group = 0, thread;

    DEVICE explicit WarpGroupProduct(int thread) : thread(thread) {}
    DEVICE void begin() {}
    DEVICE void add(SumTile (&)[N / 8], Operand left, Operand right) {
        if (end - first == PENDING) __builtin_trap();
        pending[end++ % PENDING] = {left, right, group};
    }
    DEVICE void commit() { ++group; }
    template <int LEFT>
    DEVICE void wait(SumTile (&sum)[N / 8]) {
        const int lane = thread % 32;
        for (; first != end && pending[first % PENDING].group < group - LEFT; ++first) {
            const Product& product = pending[first % PENDING];
            dilt_group_product(sum, N, thread / 32 % 4 * 16 + lane / 4, lane, product.left, product.right);
        }
    }
};

#endif
