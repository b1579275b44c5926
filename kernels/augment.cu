// augment.cu - what writes a network's input: crops of stored images, and boxes of them that are scaled and recoloured.
// The formulas are in augment.cuh.
//
// A block of gather owns `columns` pixels of one row (c, h), one of resample those of a row h in all channels; its threads
// share the samples. So writes are whole rows of samples, and a thread's bytes come from few rows of one image, which
// the first-level cache holds. All is f32 until x is stored. Limit: launch and latency for small images, the writes of x
// for large ones.
#include "kernels/augment.cuh"

// Where it goes.
struct InputArgs {
    const float* mean;    // [C]
    const float* std;     // [C]
    Real* x;              // [C, H, W, n]
    uint32_t* to_labels;  // [n]
    int64_t columns;      // pixels of a block
};

struct GatherArgs {
    BatchArgs batch;
    InputArgs input;
    uint64_t seed;
    int32_t augment;  // draw a crop and a flip
    int32_t pad;
    int32_t flip;
};

struct ResampleArgs {
    BatchArgs batch;
    InputArgs input;
    const int32_t* boxes;
    const float* factors;  // or null: colours stay
    const float* grey;
};

// The value of a sample without an image.
DEVICE float blank(int64_t example) { return example == MISSING ? __uint_as_float(0x7fc00000u) : 0.0f; }

// Where the middle `part` of `whole` begins: half of the difference, half to even.
DEVICE int centre(int whole, int part) {
    const int difference = whole - part, half = difference / 2;
    return half + (difference & half & 1);
}

BARRIER_FREE_KERNEL(REAL(augment_gather), GatherArgs, THREADS) {
    const GatherShape& d = a.batch.shape;
    const int c = blockIdx.x / d.h, h = blockIdx.x % d.h;
    const int begin = blockIdx.y * a.input.columns, end = int(min64(begin + a.input.columns, d.w));
    const float scale = a.batch.scale, mean = a.input.mean[c], std = a.input.std[c];
    for (int sample = threadIdx.x; sample < d.n; sample += blockDim.x) {
        Real* x = a.input.x + (int64_t(c) * d.h + h) * d.w * d.n + sample;
        const int64_t example = example_of(a.batch, sample);
        if (blockIdx.x == 0 && blockIdx.y == 0)
            a.input.to_labels[sample] = example >= 0 ? a.batch.labels[example] : 0;
        if (example < 0) {
            for (int w = begin; w < end; ++w) put(x + int64_t(w) * d.n, blank(example));
            continue;
        }
        int top = centre(d.sh, d.h), left = centre(d.sw, d.w);
        bool flip = false;
        if (a.augment) {
            const Philox random = draws(a.seed, a.batch.state[1], sample, 0);
            top = draw(random.word[0], d.sh + 2 * a.pad - d.h + 1) - a.pad;
            left = draw(random.word[1], d.sw + 2 * a.pad - d.w + 1) - a.pad;
            flip = a.flip && random.word[2] >> 31;
        }
        const int row = h + top;
        const bool inside = row >= 0 && row < d.sh;
        const uint8_t* bytes = a.batch.images + ((example * d.c + c) * d.sh + (inside ? row : 0)) * d.sw;
        for (int w = begin; w < end; ++w) {
            const int column = (flip ? d.w - 1 - w : w) + left;
            const uint32_t byte = inside && column >= 0 && column < d.sw ? bytes[column] : 0;
            put(x + int64_t(w) * d.n, (float(byte) / scale - mean) / std);
        }
    }
}

// Pixels begin..end of row h of a sample, in channels first..first + C.
template <int C>
DEVICE void resample(const ResampleArgs& a, int sample, int64_t example, int first, int h, int begin, int end) {
    const GatherShape& d = a.batch.shape;
    const uint8_t* planes = a.batch.images + (example * d.c + first) * d.sh * d.sw;
    const Box box = box_of(a.boxes, sample);
    const bool flip = a.boxes[int64_t(sample) * BOX + 4];
    const Between row = between(h, d.h, box.height);
    for (int w = begin; w < end; ++w) {
        float value[C];
        read_pixel<C>(a.batch, planes, box, row, between(flip ? d.w - 1 - w : w, d.w, box.width), value);
        if (a.factors) {
            const float* factor = a.factors + int64_t(sample) * FACTORS;
            const float grey = a.grey[sample];
            UNROLL for (int c = 0; c < C; ++c) value[c] = blend(blend(value[c], 0.0f, factor[0]), grey, factor[1]);
            if constexpr (C == 3) {
                const float own = luma<C>(value);
                UNROLL for (int c = 0; c < C; ++c) value[c] = blend(value[c], own, factor[2]);
            }
        }
        UNROLL for (int c = 0; c < C; ++c) {
            const int channel = first + c;
            put(a.input.x + ((int64_t(channel) * d.h + h) * d.w + w) * d.n + sample,
                (value[c] - a.input.mean[channel]) / a.input.std[channel]);
        }
    }
}

BARRIER_FREE_KERNEL(REAL(augment_resample), ResampleArgs, THREADS, 0, 8) {
    const GatherShape& d = a.batch.shape;
    const int h = blockIdx.x, begin = blockIdx.y * a.input.columns, end = int(min64(begin + a.input.columns, d.w));
    for (int sample = threadIdx.x; sample < d.n; sample += blockDim.x) {
        const int64_t example = example_of(a.batch, sample);
        if (h == 0 && begin == 0) a.input.to_labels[sample] = example >= 0 ? a.batch.labels[example] : 0;
        if (example < 0) {
            for (int64_t c = 0; c < d.c; ++c)
                for (int w = begin; w < end; ++w)
                    put(a.input.x + ((c * d.h + h) * d.w + w) * d.n + sample, blank(example));
        } else if (d.c == 3) {
            resample<3>(a, sample, example, 0, h, begin, end);
        } else {
            for (int c = 0; c < d.c; ++c) resample<1>(a, sample, example, c, h, begin, end);
        }
    }
}
