// augment_draw.cu - what augment_resample needs of each sample beside its image: a box, a flip and factors, and the mean of
// its grey: f32. The formulas are in augment.cuh. Limit: launch and latency; of grey means the arithmetic of scaling.
#include "kernels/augment.cuh"

struct DrawArgs {
    const uint32_t* state;  // [2]: row of the chunk, step
    int32_t* boxes;         // [n, 5]: top, left, height, width, whether flipped
    float* factors;         // [n, 3]: brightness, contrast, saturation
    uint64_t seed;
    GatherShape shape;
    int32_t resized;  // a box of any size, else H x W
    int32_t pad;
    int32_t flip;
    float jitter;
};

struct GreyArgs {
    BatchArgs batch;
    const int32_t* boxes;
    const float* factors;
    float* grey;  // [n]
};

// Uniform in low..high.
DEVICE double draw(uint32_t word, double low, double high) { return low + (high - low) * (word / 4294967296.0); }

// torchvision's RandomResizedCrop: ten tries at an area of .08 to 1 of the image's, uniform, and a ratio of width to
// height of 3/4 to 4/3, uniform in its logarithm; if none fits, the largest middle of such a ratio. In f64, so that
// another exp or another contraction makes no other box.
DEVICE Box random_box(const DrawArgs& a, uint32_t sample) {
    const int sh = a.shape.sh, sw = a.shape.sw;
    const double least = 3.0 / 4.0, most = 4.0 / 3.0, log_most = 0.28768207245178093;
    for (uint32_t attempt = 0; attempt < 10; ++attempt) {
        const Philox random = draws(a.seed, a.state[1], sample, 2 + attempt);
        const double area = double(sh) * sw * draw(random.word[0], 0.08, 1.0);
        const double ratio = exp(draw(random.word[1], -log_most, log_most));
        const int width = int(rint(sqrt(area * ratio))), height = int(rint(sqrt(area / ratio)));
        if (0 < width && width <= sw && 0 < height && height <= sh)
            return Box{draw(random.word[2], sh - height + 1), draw(random.word[3], sw - width + 1), height, width};
    }
    Box box{0, 0, sh, sw};
    if (sw < least * sh) box.height = int(rint(sw / least));
    if (sw > most * sh) box.width = int(rint(sh * most));
    box.top = (sh - box.height) / 2, box.left = (sw - box.width) / 2;
    return box;
}

BARRIER_FREE_KERNEL(augment_draw_f32, DrawArgs, THREADS) {
    const GatherShape& d = a.shape;
    EACH(sample, int64_t(d.n)) {
        const Philox crop = draws(a.seed, a.state[1], uint32_t(sample), 0);
        Box box{draw(crop.word[0], d.sh + 2 * a.pad - d.h + 1) - a.pad,
                draw(crop.word[1], d.sw + 2 * a.pad - d.w + 1) - a.pad, d.h, d.w};
        if (a.resized) box = random_box(a, uint32_t(sample));
        int32_t* to = a.boxes + sample * BOX;
        to[0] = box.top, to[1] = box.left, to[2] = box.height, to[3] = box.width;
        to[4] = a.flip && crop.word[2] >> 31;
        const Philox colour = draws(a.seed, a.state[1], uint32_t(sample), 1);
        const double low = a.jitter < 1.0f ? 1.0 - a.jitter : 0.0;
        UNROLL for (int i = 0; i < FACTORS; ++i)
            a.factors[sample * FACTORS + i] = float(draw(colour.word[i], low, 1.0 + a.jitter));
    }
}

// A thread's part of the sum of grey over the pixels of a sample: pieces of 256, so that the sum of a large image by one
// thread loses no digits.
template <int C>
DEVICE float grey_sum(const BatchArgs& b, const uint8_t* image, Box box, float brightness, uint32_t thread,
                      uint32_t threads) {
    const int64_t pixels = int64_t(b.shape.h) * b.shape.w, piece = int64_t(256) * threads;
    float sum = 0.0f;
    for (int64_t first = thread; first < pixels; first += piece) {
        float part = 0.0f;
        const int64_t end = min64(first + piece, pixels);
        for (int64_t pixel = first; pixel < end; pixel += threads) {
            const int h = int(pixel / b.shape.w), w = int(pixel % b.shape.w);
            float value[C];
            read_pixel<C>(b, image, box, between(h, b.shape.h, box.height), between(w, b.shape.w, box.width), value);
            UNROLL for (int c = 0; c < C; ++c) value[c] = blend(value[c], 0.0f, brightness);
            part += luma<C>(value);
        }
        sum += part;
    }
    return sum;
}

// A block a sample.
KERNEL(augment_grey_f32, GreyArgs, WarpSums, THREADS) {
    SHARED(WarpSums, shared);
    const GatherShape& d = a.batch.shape;
    const int sample = blockIdx.x;
    const int64_t example = example_of(a.batch, sample);
    float sum = 0.0f;
    if (example >= 0) {
        const uint8_t* image = a.batch.images + example * d.c * d.sh * d.sw;
        const Box box = box_of(a.boxes, sample);
        const float brightness = a.factors[int64_t(sample) * FACTORS];
        sum = d.c == 3 ? grey_sum<3>(a.batch, image, box, brightness, threadIdx.x, blockDim.x)
                       : grey_sum<1>(a.batch, image, box, brightness, threadIdx.x, blockDim.x);
    }
    sum = block_sum(sum, shared.scratch, threadIdx.x, blockDim.x);
    if (threadIdx.x == 0) a.grey[sample] = sum / float(int64_t(d.h) * d.w);
}
