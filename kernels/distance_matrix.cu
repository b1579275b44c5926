// distance_matrix.cu - distances between n probes of their squared ones, d, which distances.cu sums: f32.
//
//   Euclidean:  C[i,j] = sqrt(d[i,j])
//   cosine:     C[i,j] = 1 - x_i·x_j / (|x_i| |x_j|)  = (d[i,j] - (|x_i| - |x_j|)^2) / (2 |x_i| |x_j|)
//
// d: [splits, n + 1, squared_pitch], row n holds squared lengths: cosine needs nothing else. C: [n, pitch], divided by its
// largest element, zeros beyond column n. Splits are added in f64, in order. C is symmetric to the bit: below the diagonal
// nothing is read. Limit: bytes, and the f64 units of a GPU that has few.
#define DILT_NO_ARRAYS
#include "kernels/lib/device.cuh"

struct DistanceMatrixArgs {
    const float* squared;  // [splits, n + 1, squared_pitch], of which the upper triangle is read
    float* c;              // [n, pitch]
    float* largest;        // [n + 1]: of each row, and of all
    int64_t squared_pitch, pitch;
    int32_t n, splits;
    int32_t cosine;
};

constexpr int THREADS = 256;

DEVICE double squared(const DistanceMatrixArgs& a, int i, int j) {
    const float* d = a.squared + (i < j ? i * a.squared_pitch + j : j * a.squared_pitch + i);
    double sum = 0.0;
    for (int split = 0; split < a.splits; ++split) sum += double(d[split * (a.n + 1) * a.squared_pitch]);
    return sum;
}

DEVICE float distance(const DistanceMatrixArgs& a, int i, int j) {
    if (!a.cosine) return sqrtf(float(squared(a, i, j)));
    const double x = sqrt(squared(a, i, a.n)), y = sqrt(squared(a, j, a.n)), apart = x - y;
    // A vector of length 0 has no direction: as far from all others as one at a right angle.
    if (x == 0.0 || y == 0.0) return x == y ? 0.0f : 1.0f;
    const double c = (squared(a, i, j) - apart * apart) / (2.0 * x * y);
    return float(c < 0.0 ? 0.0 : c);
}

struct RowLargest {
    float of[THREADS];
};

// A block a row.
KERNEL(distance_matrix_f32, DistanceMatrixArgs, RowLargest, THREADS) {
    SHARED(RowLargest, shared);
    const int i = blockIdx.x;
    float largest = 0.0f;
    for (int j = threadIdx.x; j < a.pitch; j += blockDim.x) {
        const float c = j < a.n && j != i ? distance(a, i, j) : 0.0f;
        // What is not finite shows on the diagonal alone if there is one probe.
        largest = larger(largest, j == i ? float(squared(a, i, a.n) * 0.0) : c);
        a.c[i * a.pitch + j] = c;
    }
    shared.of[threadIdx.x] = largest;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (uint32_t thread = 1; thread < blockDim.x; ++thread) largest = larger(largest, shared.of[thread]);
    a.largest[i] = largest;
}

// A block a row.
BARRIER_FREE_KERNEL(distance_scale_f32, DistanceMatrixArgs, THREADS) {
    float largest = 0.0f;
    for (int i = 0; i < a.n; ++i) largest = larger(largest, a.largest[i]);
    float* c = a.c + blockIdx.x * a.pitch;
    for (int j = threadIdx.x; j < a.n; j += blockDim.x) c[j] = largest == 0.0f ? 0.0f : c[j] / largest;
    if (blockIdx.x == 0 && threadIdx.x == 0) a.largest[a.n] = largest;
}
