// faults.cu - kernels with one mistake each, which prove that the sanitizer builds and the host device's scheduler see
// such mistakes. Compiled into sanitizer builds alone. tests/it/faults.rs finds the lines by their "FAULT" comments.
#include "kernels/lib/hopper.cuh"

// Every kernel here is launched with 64 threads a block.
constexpr uint32_t FAULT_THREADS = 64;

struct FaultArgs {
    uint32_t* data;  // [count]
    int32_t count;
};

struct FaultShared {
    uint32_t value[FAULT_THREADS];
};

struct FaultPhaseShared {
    uint32_t value;
    PhaseBarrier barrier;
};

// Correct: what the faulty kernels below are variations of.
KERNEL(fault_none, FaultArgs, FaultShared, FAULT_THREADS) {
    SHARED(FaultShared, shared);
    const uint32_t t = threadIdx.x;
    shared.value[t] = 0;
    __syncthreads();
    atomicAdd(&shared.value[t % 7], t);
    __syncthreads();
    if (int(t) < a.count) atomicAdd(&a.data[t], shared.value[63 - t]);
}

// ---------------------------------------------------------------------------- AddressSanitizer and UBSan

KERNEL(fault_shared_overflow, FaultArgs, FaultShared, FAULT_THREADS) {
    SHARED(FaultShared, shared);
    uint32_t* value = shared.value;
    value[threadIdx.x] = threadIdx.x;
    __syncthreads();
    a.data[0] += value[threadIdx.x + 1];  // FAULT shared_overflow
}

KERNEL(fault_shared_index, FaultArgs, FaultShared, FAULT_THREADS) {
    SHARED(FaultShared, shared);
    shared.value[threadIdx.x + 1] = 0;  // FAULT shared_index
    __syncthreads();
    a.data[0] = shared.value[0];
}

BARRIER_FREE_KERNEL(fault_global_overflow, FaultArgs, FAULT_THREADS) {
    for (int i = threadIdx.x; i <= a.count; i += blockDim.x) a.data[i] = 1;  // FAULT global_overflow
}

BARRIER_FREE_KERNEL(fault_signed_overflow, FaultArgs, FAULT_THREADS) {
    const int32_t large = INT32_MAX - 10 * a.count;
    a.data[0] = uint32_t(large + int32_t(threadIdx.x) * a.count);  // FAULT signed_overflow
}

BARRIER_FREE_KERNEL(fault_shift, FaultArgs, FAULT_THREADS) {
    a.data[0] |= 1u << threadIdx.x;  // FAULT shift
}

BARRIER_FREE_KERNEL(fault_misaligned, FaultArgs, FAULT_THREADS) {
    const float* values = reinterpret_cast<const float*>(a.data);
    a.data[0] = uint32_t(load<4>(values + 1)[0]);  // FAULT misaligned
}

// ---------------------------------------------------------------------------- ThreadSanitizer

// A histogram without atomics: two threads of a block count in one place.
KERNEL(fault_race_in_shared, FaultArgs, FaultShared, FAULT_THREADS) {
    SHARED(FaultShared, shared);
    shared.value[threadIdx.x] = 0;
    __syncthreads();
    shared.value[threadIdx.x % 7] += 1;  // FAULT race_in_shared
    __syncthreads();
    atomicAdd(&a.data[0], shared.value[threadIdx.x]);
}

KERNEL(fault_missing_barrier, FaultArgs, FaultShared, FAULT_THREADS) {
    SHARED(FaultShared, shared);
    shared.value[threadIdx.x] = threadIdx.x;  // FAULT missing_barrier
    atomicAdd(&a.data[0], shared.value[63 - threadIdx.x]);
}

// A shuffle orders no memory: the lanes after it need __syncwarp or __syncthreads.
KERNEL(fault_shuffle_as_barrier, FaultArgs, FaultShared, FAULT_THREADS) {
    SHARED(FaultShared, shared);
    shared.value[threadIdx.x] = threadIdx.x;  // FAULT shuffle_as_barrier
    const uint32_t other = __shfl_xor_sync(0xffffffffu, threadIdx.x, 1);
    atomicAdd(&a.data[0], shared.value[other]);
}

BARRIER_FREE_KERNEL(fault_race_between_blocks, FaultArgs, FAULT_THREADS) {
    if (threadIdx.x == 0) a.data[0] += 1;  // FAULT race_between_blocks
}

// What was there when a thread arrived may be read after the phase; what is written later may not.
KERNEL(fault_written_after_arrival, FaultArgs, FaultPhaseShared, FAULT_THREADS) {
    SHARED(FaultPhaseShared, shared);
    if (threadIdx.x == 0) start(shared.barrier, 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.value = 1;
        arrive(shared.barrier);
        shared.value = 2;  // FAULT written_after_arrival
    } else if (threadIdx.x == 32) {
        wait_phase(shared.barrier, 0);
        atomicAdd(&a.data[0], shared.value);
    }
}

// ---------------------------------------------------------------------------- the scheduler's own errors

KERNEL(fault_phase_in_vain, FaultArgs, FaultPhaseShared, FAULT_THREADS) {
    SHARED(FaultPhaseShared, shared);
    if (threadIdx.x == 0) start(shared.barrier, 2);
    __syncthreads();
    if (threadIdx.x == 0) arrive(shared.barrier);
    wait_phase(shared.barrier, 0);  // FAULT phase_in_vain
    if (threadIdx.x == 0) a.data[0] = 1;
}

KERNEL(fault_different_barriers, FaultArgs, NoShared, FAULT_THREADS) {
    if (threadIdx.x < 32) {
        __syncthreads();  // FAULT different_barriers
    } else {
        __syncthreads();  // FAULT different_barriers
    }
    if (threadIdx.x == 0) a.data[0] = 1;
}

KERNEL(fault_different_barriers_in_a_warp, FaultArgs, NoShared, FAULT_THREADS) {
    uint32_t votes = 0;
    if (threadIdx.x % 2 == 0) {
        votes = __ballot_sync(0xffffffffu, 1);  // FAULT different_barriers_in_a_warp
    } else {
        __syncthreads();  // FAULT different_barriers_in_a_warp
    }
    if (threadIdx.x == 0) a.data[0] = votes;
}

KERNEL(fault_early_return, FaultArgs, NoShared, FAULT_THREADS) {
    if (int(threadIdx.x) >= a.count) return;
    __syncthreads();  // FAULT early_return
    if (threadIdx.x == 0) a.data[0] = 1;
}

KERNEL(fault_lane_has_returned, FaultArgs, NoShared, FAULT_THREADS) {
    if (int(threadIdx.x) >= a.count) return;
    a.data[threadIdx.x] = __shfl_down_sync(0xffffffffu, threadIdx.x, 1);  // FAULT lane_has_returned
}

BARRIER_FREE_KERNEL(fault_barrier_in_barrier_free, FaultArgs, FAULT_THREADS) {
    __syncthreads();  // FAULT barrier_in_barrier_free
    if (threadIdx.x == 0) a.data[0] = 1;
}
