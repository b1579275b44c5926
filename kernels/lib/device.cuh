// device.cuh - the dialect every kernel is written in. It has two meanings: nvcc's, given here, and the host
// compiler's, given in host.cuh. A kernel file includes this header, or one beside it
// that does, and nothing else.
//
//   KERNEL(name, Args, Shared, max_threads) { ... }    a kernel that may use barriers and warp operations
//   BARRIER_FREE_KERNEL(name, Args, max_threads) { }   one that uses neither: the host runs it as a plain loop
//
// Both take one more argument where ptxas guesses wrong: the blocks that a multiprocessor shall hold at a time, whose
// number limits a thread's registers; 0 lets it guess. And after that another number for the entry for arrays, where that would
// spill registers: an array is for launches that by themselves have too few blocks to fill multiprocessors. A file whose kernels
// no training on a GPU launches defines DILT_NO_ARRAYS before it includes anything: they have no such entry.
//
// Activations, and weights as products read them, are `Real`: float, or bf16. A file that names its kernels REAL(name) is
// compiled for both, to name_f32 and name_bf16; another is for the one that its kernels' names end with.
//
// The body sees its argument struct as `a`, and threadIdx, blockIdx, blockDim, gridDim. Helper functions take the
// indices they need as arguments: on the host these are locals of the kernel, not globals.
// SHARED(Type, name) names the block's shared memory, whose type the KERNEL line gives (NoShared: none). UNROLL unrolls the loop that follows. EACH(i, n) shares the
// indices 0..n among all threads of the grid's x dimension. LOCAL(Type, name) is memory of a block of one thread: the
// stack on the host; on a GPU shared memory, of at most 48 KiB.
#pragma once
#include <stdint.h>

struct NoShared {};

// bfloat16, the upper half of a float. Loads widen it, stores round to nearest, ties to even; in between all is f32.
struct bf16 {
    uint16_t bits;
};

#ifdef DILT_BF16
using Real = bf16;
#define REAL(name) name##_bf16
#else
using Real = float;
#define REAL(name) name##_f32
#endif

#ifdef __CUDACC__

// A kernel has a second entry, name_array: the same for several tickets in one launch (`Device::together`), whose number in the
// array is blockIdx.z; their own z lies in y. It finds its arguments at an address that it computes, which takes registers.
#ifdef DILT_NO_ARRAYS
#define DILT_ARRAY(name, Args, max_threads, ...)
#else
template <class Args>
struct ArrayArgs {  // made by ArgBytes of src/device/kernel.rs
    static constexpr int FIT = (4096 - 128) / int(sizeof(Args)), MOST = FIT < 16 ? FIT : 16;
    Args of[MOST];
    uint32_t height;  // blocks in y of one
};
#define DILT_ARRAY(name, Args, max_threads, ...)                                                             \
    extern "C" __global__ void __launch_bounds__(max_threads, blocks_of_array(__VA_ARGS__))                  \
        name##_array(const __grid_constant__ ArrayArgs<Args> a) {                                            \
        const uint32_t z = blockIdx.y / a.height;                                                            \
        name##_body(a.of[blockIdx.z], dim3(blockIdx.x, blockIdx.y - z * a.height, z),                        \
                    dim3(gridDim.x, a.height, gridDim.y / a.height));                                        \
    }
#endif
// Of the blocks that a KERNEL line gives: 0 where ptxas may choose.
constexpr int blocks_of_one(int blocks = 0, int = 0) { return blocks; }
constexpr int blocks_of_array() { return 0; }
constexpr int blocks_of_array(int blocks) { return blocks; }
constexpr int blocks_of_array(int, int array_blocks) { return array_blocks; }
#define DILT_CUDA_KERNEL(name, Args, max_threads, ...)                                                       \
    DEVICE void name##_body(const Args& a, dim3 blockIdx, dim3 gridDim);                                     \
    extern "C" __global__ void __launch_bounds__(max_threads, blocks_of_one(__VA_ARGS__))                    \
        name(const __grid_constant__ Args a) {                                                               \
        name##_body(a, blockIdx, gridDim);                                                                   \
    }                                                                                                        \
    DILT_ARRAY(name, Args, max_threads, __VA_ARGS__)                                                         \
    DEVICE void name##_body([[maybe_unused]] const Args& a, [[maybe_unused]] dim3 blockIdx,                  \
                            [[maybe_unused]] dim3 gridDim)
#define KERNEL(name, Args, Shared, ...) DILT_CUDA_KERNEL(name, Args, __VA_ARGS__)
#define BARRIER_FREE_KERNEL(name, Args, ...) KERNEL(name, Args, NoShared, __VA_ARGS__)
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define RESTRICT __restrict__

extern __shared__ __align__(1024) unsigned char dilt_shared[];
#define SHARED(Type, name) Type& name = *reinterpret_cast<Type*>(dilt_shared)
#define LOCAL(Type, name) __shared__ alignas(16) alignas(Type) Type name

#define EACH(i, n)                                                                            \
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < (n);                 \
         i += int64_t(gridDim.x) * blockDim.x)

// Lanes of one vector register of the machine: what a thread loads at once.
constexpr int LANES = 4;

// L consecutive samples of one feature row, held by one thread.
template <int L>
struct Samples {
    float lane[L];
    DEVICE float operator[](int i) const { return lane[i]; }
    DEVICE float& operator[](int i) { return lane[i]; }
};
#define SAMPLES_OPERATOR(op)                                                                          \
    template <int L>                                                                                  \
    DEVICE Samples<L> operator op(Samples<L> x, const Samples<L>& y) {                                \
        UNROLL for (int i = 0; i < L; ++i) x.lane[i] = x.lane[i] op y.lane[i];                        \
        return x;                                                                                     \
    }                                                                                                 \
    template <int L>                                                                                  \
    DEVICE Samples<L> operator op(Samples<L> x, float y) {                                            \
        UNROLL for (int i = 0; i < L; ++i) x.lane[i] = x.lane[i] op y;                                \
        return x;                                                                                     \
    }                                                                                                 \
    template <int L>                                                                                  \
    DEVICE Samples<L>& operator op##=(Samples<L>& x, const Samples<L>& y) { return x = x op y; }
SAMPLES_OPERATOR(+)
SAMPLES_OPERATOR(-)
SAMPLES_OPERATOR(*)
SAMPLES_OPERATOR(/)
#undef SAMPLES_OPERATOR

template <int L>
DEVICE Samples<L> load(const float* p) {
    Samples<L> x;
    if constexpr (L % 4 == 0) {
        UNROLL for (int i = 0; i < L; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(p + i);
            x.lane[i] = v.x, x.lane[i + 1] = v.y, x.lane[i + 2] = v.z, x.lane[i + 3] = v.w;
        }
    } else {
        UNROLL for (int i = 0; i < L; ++i) x.lane[i] = p[i];
    }
    return x;
}

// The same at an address that is a multiple of an element's size alone.
template <int L>
DEVICE Samples<L> load_anywhere(const float* p) {
    Samples<L> x;
    UNROLL for (int i = 0; i < L; ++i) x.lane[i] = p[i];
    return x;
}

// R values at a place that is the same for all threads of a warp: something to be indexed.
template <int R>
DEVICE Samples<R> load_uniform(const float* p) {
    return load<R>(p);
}

template <int L>
DEVICE void store(float* p, const Samples<L>& x) {
    if constexpr (L % 4 == 0) {
        UNROLL for (int i = 0; i < L; i += 4)
            *reinterpret_cast<float4*>(p + i) =
                make_float4(x.lane[i], x.lane[i + 1], x.lane[i + 2], x.lane[i + 3]);
    } else {
        UNROLL for (int i = 0; i < L; ++i) p[i] = x.lane[i];
    }
}

template <int L>
DEVICE void store_anywhere(float* p, const Samples<L>& x) {
    UNROLL for (int i = 0; i < L; ++i) p[i] = x.lane[i];
}

DEVICE float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE bf16 round_to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
// Of each the nearest bf16.
template <int L>
DEVICE Samples<L> rounded_to_bf16(Samples<L> x) {
    UNROLL for (int i = 0; i < L; ++i) x.lane[i] = widen(round_to_bf16(x.lane[i]));
    return x;
}
// Two of them in a word, `low` in its lower half.
DEVICE uint32_t round_pair(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <int L>
DEVICE Samples<L> load(const bf16* p) {
    Samples<L> x;
    if constexpr (L % 8 == 0) {
        UNROLL for (int i = 0; i < L; i += 8) {
            const uint4 v = *reinterpret_cast<const uint4*>(p + i);
            const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
            UNROLL for (int j = 0; j < 8; ++j)
                x.lane[i + j] = __uint_as_float(j % 2 ? pairs[j / 2] & 0xffff0000u : pairs[j / 2] << 16);
        }
    } else if constexpr (L % 4 == 0) {
        UNROLL for (int i = 0; i < L; i += 4) {
            const uint2 v = *reinterpret_cast<const uint2*>(p + i);
            x.lane[i] = __uint_as_float(v.x << 16), x.lane[i + 1] = __uint_as_float(v.x & 0xffff0000u);
            x.lane[i + 2] = __uint_as_float(v.y << 16), x.lane[i + 3] = __uint_as_float(v.y & 0xffff0000u);
        }
    } else {
        UNROLL for (int i = 0; i < L; ++i) x.lane[i] = widen(p[i]);
    }
    return x;
}

template <int L>
DEVICE void store(bf16* p, const Samples<L>& x) {
    if constexpr (L % 8 == 0) {
        UNROLL for (int i = 0; i < L; i += 8)
            *reinterpret_cast<uint4*>(p + i) =
                make_uint4(round_pair(x.lane[i], x.lane[i + 1]), round_pair(x.lane[i + 2], x.lane[i + 3]),
                           round_pair(x.lane[i + 4], x.lane[i + 5]), round_pair(x.lane[i + 6], x.lane[i + 7]));
    } else if constexpr (L % 4 == 0) {
        UNROLL for (int i = 0; i < L; i += 4)
            *reinterpret_cast<uint2*>(p + i) =
                make_uint2(round_pair(x.lane[i], x.lane[i + 1]), round_pair(x.lane[i + 2], x.lane[i + 3]));
    } else {
        UNROLL for (int i = 0; i < L; ++i) p[i] = round_to_bf16(x.lane[i]);
    }
}

// Lane by lane x <= limit ? yes : no, so `no` where one of the two is NaN.
template <int L>
DEVICE Samples<L> where_at_most(const Samples<L>& x, const Samples<L>& limit, Samples<L> yes, const Samples<L>& no) {
    UNROLL for (int i = 0; i < L; ++i) yes.lane[i] = x.lane[i] <= limit.lane[i] ? yes.lane[i] : no.lane[i];
    return yes;
}

// e^x lane by lane.
template <int L>
DEVICE Samples<L> exponential(Samples<L> x) {
    UNROLL for (int i = 0; i < L; ++i) x.lane[i] = expf(x.lane[i]);
    return x;
}

// e^x for x <= 0, and 1 / x, to a relative 1e-5: for results that are rounded to bf16.
template <int L>
DEVICE Samples<L> rough_exponential(Samples<L> x) {
    UNROLL for (int i = 0; i < L; ++i) x.lane[i] = __expf(x.lane[i]);
    return x;
}
template <int L>
DEVICE Samples<L> rough_reciprocal(Samples<L> x) {
    UNROLL for (int i = 0; i < L; ++i) asm("rcp.approx.f32 %0, %0;" : "+f"(x.lane[i]));
    return x;
}

// Turns an L x L square: lane j of row i to lane i of row j.
template <int L>
DEVICE void transpose(Samples<L> (&rows)[L]) {
    UNROLL for (int i = 0; i < L; ++i)
        UNROLL for (int j = 0; j < i; ++j) {
            const float x = rows[i].lane[j];
            rows[i].lane[j] = rows[j].lane[i], rows[j].lane[i] = x;
        }
}

#else
#include "host.cuh"
#endif

// One value, from and to memory.
DEVICE float widen(float x) { return x; }
DEVICE void put(float* p, float x) { *p = x; }
DEVICE void put(bf16* p, float x) { *p = round_to_bf16(x); }

// x as it is read where it has been stored among activations.
template <int L>
DEVICE Samples<L> as_stored(const Samples<L>& x) {
    if constexpr (sizeof(Real) == sizeof(float))
        return x;
    else
        return rounded_to_bf16<L>(x);
}

// Lanes of the vectors that cut every row of samples evenly, since rows are padded to a multiple of 8.
constexpr int ROW_LANES = LANES < 8 ? LANES : 8;

template <int L>
DEVICE Samples<L> splat(float value) {
    Samples<L> x;
    UNROLL for (int i = 0; i < L; ++i) x[i] = value;
    return x;
}

// The square root of each lane. Under g++ 12 one operation of whole vectors.
template <int L>
DEVICE Samples<L> square_root(const Samples<L>& x) {
    Samples<L> y;
    UNROLL for (int i = 0; i < L; ++i) y[i] = sqrtf(x[i]);
    return y;
}

// The first `live` lanes of x, zeros in the others.
template <int L>
DEVICE Samples<L> first_lanes(const Samples<L>& x, int live) {
    Samples<L> nth;
    UNROLL for (int i = 0; i < L; ++i) nth[i] = float(i + 1);
    return where_at_most<L>(nth - float(live), splat<L>(0.0f), x, splat<L>(0.0f));
}

// The sum of a thread's lanes, in a fixed tree order.
template <int L>
DEVICE float lane_sum(const Samples<L>& x) {
    if constexpr (L == 1) {
        return x[0];
    } else {
        alignas(4 * L) float lanes[L];
        store<L>(lanes, x);
        return lane_sum<L / 2>(load<L / 2>(lanes) + load<L / 2>(lanes + L / 2));
    }
}

// The lanes whose bit is set, exactly +0 in the others, whatever they hold. Under g++ 12 this is one compare and one
// and-not of whole vectors.
template <int L>
DEVICE Samples<L> kept(const Samples<L>& x, uint32_t bits) {
    Samples<L> y;
    UNROLL for (int i = 0; i < L; ++i) y[i] = bits >> i & 1 ? x[i] : 0.0f;
    return y;
}

// The columns of a feature row: `n` samples of `row` columns each, of which the first `tokens` are true and the others
// padding. Of an image's pixel, or of a vector per sample: row = tokens = 1. n * row is a multiple of 8.
struct Columns {
    int32_t n;
    int32_t row;
    int32_t tokens;
};

// A bit for each of L columns from `first` on: set where the column is a true token of one of `count` true samples.
template <int L>
DEVICE uint32_t live_columns(const Columns& d, int count, int first) {
    uint32_t bits = 0;
    int sample = first / d.row, token = first - sample * d.row;
    UNROLL for (int i = 0; i < L; ++i) {
        bits |= uint32_t(sample < count && token < d.tokens) << i;
        if (++token == d.row) token = 0, ++sample;
    }
    return bits;
}

// Shared memory of a kernel that only sums over its block.
struct WarpSums {
    float scratch[32];
};

// The sum of one value per thread over the whole block, in a fixed order, returned to every thread. `scratch` holds
// 32 values of shared memory; the number of threads is 1 or a multiple of 32.
template <class T>
DEVICE T block_sum(T value, T* scratch, uint32_t thread, uint32_t threads) {
    if (threads == 1) return value;
    UNROLL for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    if (thread % 32 == 0) scratch[thread / 32] = value;
    __syncthreads();
    value = scratch[0];
    for (uint32_t warp = 1; warp < threads / 32; ++warp) value += scratch[warp];
    __syncthreads();
    return value;
}

// What the generated layout_<file> kernels take: they write the size of each argument struct and of its fields, and
// the fields' offsets, so that a test can compare them with the Rust side.
struct LayoutArgs {
    uint32_t* out;
};

// The larger one, and a NaN for good.
DEVICE float larger(float x, float y) { return y > x || y != y ? y : x; }
DEVICE int min32(int x, int y) { return x < y ? x : y; }
DEVICE int64_t min64(int64_t x, int64_t y) { return x < y ? x : y; }
DEVICE int64_t max64(int64_t x, int64_t y) { return x > y ? x : y; }
DEVICE int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Philox4x32-10 (Salmon et al., SC 2011): four uniform words from a counter and a key, the same on every device.
struct Philox {
    uint32_t word[4];
};

DEVICE Philox philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
    uint32_t c0 = uint32_t(counter_low), c1 = uint32_t(counter_low >> 32);
    uint32_t c2 = uint32_t(counter_high), c3 = uint32_t(counter_high >> 32);
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
        const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c1 = uint32_t(p1), c3 = uint32_t(p0), c0 = n0, c2 = n2;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return Philox{{c0, c1, c2, c3}};
}
