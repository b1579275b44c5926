// host.cuh - what CUDA's words mean to the host compiler. Included by device.cuh alone.
//
// A thread of a block is a call of the kernel's function; where a block has several threads and the kernel may wait,
// each thread is a coroutine of src/device/host.rs, and the waiting words below switch between them. Everything here
// and in the kernels has internal linkage, so that the copies compiled for different instruction sets never mix:
// build.rs compiles each kernel file once per instruction set with DILT_ISA set to its name.
#pragma once
#include <math.h>
#include <string.h>

#define DEVICE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#define RESTRICT __restrict__

struct dim3 {
    uint32_t x, y, z;
};

// Where a thread stands, and its block's shared memory; filled by the host device (src/device/host.rs).
struct HostIndex {
    dim3 thread, block, block_dim, grid_dim;
    void* shared;
};

// What the host device knows of a kernel: one constant per kernel and instruction set.
struct HostKernel {
    void (*thread)(const void* args, const HostIndex* index);
    uint64_t args_bytes;
    uint32_t shared_bytes;
    uint32_t max_threads;
    uint32_t barrier_free;
};

#define DILT_JOIN2(a, b, c) a##b##_##c
#define DILT_JOIN(a, b, c) DILT_JOIN2(a, b, c)
#define DILT_HOST_KERNEL(name, Args, Shared, max_threads, barrier_free)                                          \
    static void name##_body(const Args& a, dim3 threadIdx, dim3 blockIdx, dim3 blockDim, dim3 gridDim,       \
                            void* dilt_shared);                                                              \
    static void name##_thread(const void* args, const HostIndex* i) {                                        \
        name##_body(*static_cast<const Args*>(args), i->thread, i->block, i->block_dim, i->grid_dim,         \
                    i->shared);                                                                              \
    }                                                                                                        \
    extern "C" {                                                                                             \
    extern const HostKernel DILT_JOIN(dilt_, DILT_ISA, name);                                                \
    const HostKernel DILT_JOIN(dilt_, DILT_ISA, name) = {                                                    \
        name##_thread, sizeof(Args), __is_empty(Shared) ? 0 : sizeof(Shared), max_threads, barrier_free};    \
    }                                                                                                        \
    static inline void name##_body([[maybe_unused]] const Args& a, [[maybe_unused]] dim3 threadIdx,          \
                                   [[maybe_unused]] dim3 blockIdx, [[maybe_unused]] dim3 blockDim,           \
                                   [[maybe_unused]] dim3 gridDim, [[maybe_unused]] void* dilt_shared)
#define KERNEL(name, Args, Shared, max_threads, ...) DILT_HOST_KERNEL(name, Args, Shared, max_threads, 0)
#define BARRIER_FREE_KERNEL(name, Args, max_threads, ...) DILT_HOST_KERNEL(name, Args, NoShared, max_threads, 1)
#define SHARED(Type, name) Type& name = *static_cast<Type*>(dilt_shared)
#define LOCAL(Type, name) alignas(16) alignas(Type) Type name

// Waiting. Each call names its place in the source: threads of a block that wait at different places are an error.
#define DILT_TEXT2(x) #x
#define DILT_TEXT(x) DILT_TEXT2(x)
#define DILT_SITE __FILE__ ":" DILT_TEXT(__LINE__)
extern "C" {
void dilt_host_barrier(const char* site);
// Gives `value` to the warp, waits for the lanes in `mask`, returns what lane `source` gave.
uint64_t dilt_host_exchange(const char* site, uint32_t mask, uint64_t value, uint32_t source_xor, uint32_t source_add);
uint32_t dilt_host_ballot(const char* site, uint32_t mask, uint32_t predicate);
void dilt_host_warp_barrier(const char* site);
// Waits for the whole warp, returns the four words that each lane gave: there until the lane's next operation but one.
const uint64_t (*dilt_host_gather(const char* site, const uint64_t (*words)[4]))[4];
}
template <class T>
DEVICE T dilt_exchange(const char* site, uint32_t mask, T value, uint32_t source_xor, uint32_t source_add) {
    static_assert(sizeof(T) <= 8, "a lane gives at most eight bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = dilt_host_exchange(site, mask, bits, source_xor, source_add);
    memcpy(&value, &bits, sizeof(T));
    return value;
}
#define __syncthreads() dilt_host_barrier(DILT_SITE)
#define __syncwarp() dilt_host_warp_barrier(DILT_SITE)
#define __shfl_xor_sync(mask, value, lanes) dilt_exchange(DILT_SITE, mask, value, lanes, 0)
#define __shfl_down_sync(mask, value, lanes) dilt_exchange(DILT_SITE, mask, value, 0, lanes)
#define __ballot_sync(mask, predicate) dilt_host_ballot(DILT_SITE, mask, (predicate) ? 1u : 0u)

// Atomics on integers are real ones: blocks run in parallel.
template <class T>
DEVICE T atomicAdd(T* p, T value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }
template <class T>
DEVICE T atomicOr(T* p, T value) { return __atomic_fetch_or(p, value, __ATOMIC_RELAXED); }
template <class T>
DEVICE T atomicAnd(T* p, T value) { return __atomic_fetch_and(p, value, __ATOMIC_RELAXED); }

DEVICE uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
DEVICE float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
DEVICE int __popc(uint32_t x) { return __builtin_popcount(x); }

// Lanes of one vector register of this instruction set.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// What the address of L elements that are loaded at once is a multiple of. Here that of one would do; the address sanitizer
// is told what a GPU demands.
#ifdef DILT_ALIGNED_AS_ON_GPU
constexpr int alignment(int bytes, int lanes) { return lanes % 4 ? bytes : lanes * bytes < 16 ? lanes * bytes : 16; }
#else
constexpr int alignment(int bytes, int) { return bytes; }
#endif

// L consecutive samples of one feature row, held by one thread: a vector type, since plain arrays of accumulators
// run ten times slower under g++ 12.
template <int L>
struct SamplesOf {
    typedef float type __attribute__((vector_size(4 * L)));
    typedef float in_memory __attribute__((vector_size(4 * L), aligned(alignment(4, L)), may_alias));
    typedef float anywhere __attribute__((vector_size(4 * L), aligned(4), may_alias));
    typedef int32_t words __attribute__((vector_size(4 * L)));
    typedef uint32_t bits __attribute__((vector_size(4 * L)));
    typedef uint16_t halves __attribute__((vector_size(2 * L)));
    typedef uint16_t halves_in_memory __attribute__((vector_size(2 * L), aligned(alignment(2, L)), may_alias));
};
template <int L>
using Samples = typename SamplesOf<L>::type;

template <int L>
DEVICE Samples<L> load(const float* p) { return *reinterpret_cast<const typename SamplesOf<L>::in_memory*>(p); }
template <int L>
DEVICE Samples<L> load_anywhere(const float* p) { return *reinterpret_cast<const typename SamplesOf<L>::anywhere*>(p); }
DEVICE float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE bf16 round_to_bf16(float x) {
    const uint32_t bits = __float_as_uint(x);
    return {uint16_t(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
DEVICE uint32_t round_pair(float low, float high) {
    return round_to_bf16(low).bits | uint32_t(round_to_bf16(high).bits) << 16;
}
template <int L>
DEVICE Samples<L> load(const bf16* p) {
    const typename SamplesOf<L>::halves halves = *reinterpret_cast<const typename SamplesOf<L>::halves_in_memory*>(p);
    return (Samples<L>)(__builtin_convertvector(halves, typename SamplesOf<L>::bits) << 16);
}
// Of each the nearest bf16, in the upper half of its word.
template <int L>
DEVICE typename SamplesOf<L>::bits nearest_bf16(const Samples<L>& x) {
    const auto bits = (typename SamplesOf<L>::bits)x;
    return x == x ? bits + 0x7fff + (bits >> 16 & 1) : (bits & 0) + 0x7fff0000;
}
template <int L>
DEVICE Samples<L> rounded_to_bf16(const Samples<L>& x) {
    return (Samples<L>)(nearest_bf16<L>(x) & 0xffff0000);
}
template <int L>
DEVICE void store(bf16* p, const Samples<L>& x) {
    *reinterpret_cast<typename SamplesOf<L>::halves_in_memory*>(p) =
        __builtin_convertvector(nearest_bf16<L>(x) >> 16, typename SamplesOf<L>::halves);
}
// R values that are each multiplied with a vector: it is loaded into all lanes from where it lies.
template <int R>
DEVICE const float* load_uniform(const float* p) {
    return p;
}
template <int L>
DEVICE void store(float* p, const Samples<L>& x) { *reinterpret_cast<typename SamplesOf<L>::in_memory*>(p) = x; }
template <int L>
DEVICE void store_anywhere(float* p, const Samples<L>& x) { *reinterpret_cast<typename SamplesOf<L>::anywhere*>(p) = x; }

// Lane by lane x <= limit ? yes : no, so `no` where one of the two is NaN.
template <int L>
DEVICE Samples<L> where_at_most(const Samples<L>& x, const Samples<L>& limit, const Samples<L>& yes,
                                const Samples<L>& no) {
    return x <= limit ? yes : no;
}

// e^x lane by lane, to one unit in the last place or two; 0 below e^-86.64. x = k ln 2 + r, |r| <= ln 2 / 2,
// and e^r by a polynomial fitted to its relative error (4e-9).
template <int L>
DEVICE Samples<L> exponential(const Samples<L>& x) {
    typedef int32_t Words __attribute__((vector_size(4 * L)));
    const Samples<L> zero = {}, low = zero - 86.64f, high = zero + 88.72283f;
    const Samples<L> inside = where_at_most<L>(x, high, where_at_most<L>(low, x, x, low), high);
    const Samples<L> shifted = inside * 1.44269504f + 12582912.0f;  // k in the lowest bits
    const Samples<L> k = shifted - 12582912.0f;
    const Samples<L> r = (inside - k * 0.693145752f) - k * 1.42860677e-6f;
    const Samples<L> q = (((r * 1.375115e-3f + 8.368988e-3f) * r + 4.1669544e-2f) * r + 1.6666518e-1f) * r + 0.49999988f;
    const Samples<L> power = q * (r * r) + r + 1.0f;
    // 2^k in two factors, since 2^128 is no float.
    const Words exponent = (Words)shifted - 0x4B400000 - 1;
    const Samples<L> scale = (Samples<L>)((exponent + 127) << 23);
    const Samples<L> result = power * scale * 2.0f;
    return where_at_most<L>(x, high, where_at_most<L>(low, x, result, zero), x != x ? x : zero + __builtin_inff());
}

// What device.cuh allows to be rough is not, here.
template <int L>
DEVICE Samples<L> rough_exponential(const Samples<L>& x) {
    return exponential<L>(x);
}
template <int L>
DEVICE Samples<L> rough_reciprocal(const Samples<L>& x) {
    return 1.0f / x;
}

// Turns an L x L square: lane j of row i to lane i of row j. Exchanges halves, quarters, ... of pairs of rows.
template <int L>
DEVICE void transpose(Samples<L> (&rows)[L]) {
    UNROLL for (int half = L / 2; half > 0; half /= 2) {
        typename SamplesOf<L>::words upper, lower;
        UNROLL for (int lane = 0; lane < L; ++lane) {
            upper[lane] = lane & half ? L + lane - half : lane;
            lower[lane] = lane & half ? L + lane : lane + half;
        }
        UNROLL for (int i = 0; i < L; ++i) {
            if (i & half) continue;
            const Samples<L> x = rows[i], y = rows[i + half];
            rows[i] = __builtin_shuffle(x, y, upper);
            rows[i + half] = __builtin_shuffle(x, y, lower);
        }
    }
}

// EACH on the host: every thread takes one contiguous range, which the compiler vectorises (grid strides would not be).
DEVICE int64_t dilt_first(int64_t n, uint64_t worker, uint64_t workers) { return int64_t(uint64_t(n) * worker / workers); }
#define EACH(i, n)                                                                                         \
    for (int64_t i = dilt_first(n, uint64_t(blockIdx.x) * blockDim.x + threadIdx.x,                        \
                                uint64_t(gridDim.x) * blockDim.x),                                         \
                 i##_end = dilt_first(n, uint64_t(blockIdx.x) * blockDim.x + threadIdx.x + 1,              \
                                      uint64_t(gridDim.x) * blockDim.x);                                   \
         i < i##_end; ++i)
