// augment.cu - a batch gathered from images that stay on the device as bytes, cropped and flipped at random.
//
//   example = order[row * batch + sample],  row = state[0]
//   x[c,h,w,sample] = (byte / scale - mean[c]) / std[c]
//   byte = images[example, c, h + top - pad, from(w) + left - pad], or 0 outside the image
//   from(w) = W - 1 - w where the sample is flipped, else w
//
// As torchvision's RandomCrop([H, W], padding=pad) and RandomHorizontalFlip before Normalize. top and left are uniform
// in 0..=2*pad, flips have probability 1/2, all from philox(seed, step, sample) with step = state[1]: word 0 gives
// top, word 1 left (high half of word * (2 pad + 1)), the highest bit of word 2 the flip. So a draw depends on seed,
// step and place in the batch, never on the schedule.
//
// images: [examples, C, H, W] bytes, the files' layout; x: [C, H, W, n], written whole: samples from `count` to n are
// 0. An example or a place that does not exist is never read: its sample is NaN, so that it shows, with label 0.
//
// A block owns `columns` pixels of one row (c, h); its threads share the samples. So writes are whole rows of samples,
// and a thread's bytes come from one row of one image, which the first-level cache holds. Limit: launch and latency
// for small images, the writes of x (4 bytes an element) for large ones.
#include "kernels/lib/device.cuh"

struct GatherShape {
    int32_t c, h, w;  // channels, rows and columns of an image
    int32_t batch;    // places of a step in `order`
    int32_t n;        // samples of a row of x: batch rounded up to a multiple of 8
};

struct GatherArgs {
    const uint8_t* images;   // [examples, C, H, W]
    const uint32_t* labels;  // [examples]
    const uint32_t* order;   // [places]: an example each
    const uint32_t* state;   // [2]: row of the chunk, step
    const uint32_t* count;   // [1]: true samples
    const float* mean;       // [C]
    const float* std;        // [C]
    float* x;                // [C, H, W, n]
    uint32_t* to_labels;     // [n]
    int64_t examples;
    int64_t places;
    uint64_t seed;
    GatherShape shape;
    float scale;
    int32_t columns;  // pixels of a block
    int32_t augment;  // draw a crop and a flip
    int32_t pad;
    int32_t flip;
};

constexpr int THREADS = 128;

// Uniform in 0..choices, by the high half of a product; the bias is below choices / 2^32.
DEVICE int draw(uint32_t word, int choices) { return int(uint64_t(word) * uint32_t(choices) >> 32); }

BARRIER_FREE_KERNEL(augment_gather_f32, GatherArgs, THREADS) {
    const GatherShape& d = a.shape;
    const int c = blockIdx.x / d.h, h = blockIdx.x % d.h;
    const int begin = blockIdx.y * a.columns, end = int(min64(begin + a.columns, d.w));
    const int64_t first_place = int64_t(a.state[0]) * d.batch;
    const int count = int(min64(*a.count, d.batch));
    const float scale = a.scale, mean = a.mean[c], std = a.std[c];
    for (int sample = threadIdx.x; sample < d.n; sample += blockDim.x) {
        float* x = a.x + (int64_t(c) * d.h + h) * d.w * d.n + sample;
        const int64_t place = first_place + sample;
        const bool live = sample < count;
        const int64_t example = live && place < a.places ? a.order[place] : a.examples;
        const bool exists = example < a.examples;
        if (blockIdx.x == 0 && blockIdx.y == 0) a.to_labels[sample] = exists ? a.labels[example] : 0;
        if (!exists) {
            const float value = live ? __uint_as_float(0x7fc00000u) : 0.0f;
            for (int w = begin; w < end; ++w) x[int64_t(w) * d.n] = value;
            continue;
        }
        int top = 0, left = 0;
        bool flip = false;
        if (a.augment) {
            const Philox random = philox(a.seed, a.state[1], sample);
            top = draw(random.word[0], 2 * a.pad + 1) - a.pad;
            left = draw(random.word[1], 2 * a.pad + 1) - a.pad;
            flip = a.flip && random.word[2] >> 31;
        }
        const int row = h + top;
        const bool inside = row >= 0 && row < d.h;
        const uint8_t* bytes = a.images + ((example * d.c + c) * d.h + (inside ? row : 0)) * d.w;
        for (int w = begin; w < end; ++w) {
            const int column = (flip ? d.w - 1 - w : w) + left;
            const uint32_t byte = inside && column >= 0 && column < d.w ? bytes[column] : 0;
            x[int64_t(w) * d.n] = (float(byte) / scale - mean) / std;
        }
    }
}
