// augment.cuh - a batch gathered from stored images, bytes on the device: cropped, resized, flipped, its colours varied.
//
//   example = order[row * batch + sample],  row = state[0]
//   x[c,h,w,sample] = (byte / scale - mean[c]) / std[c]
//   byte = images[example, c, h + top, from(w) + left], or 0 outside the image
//   from(w) = W - 1 - w where the sample is flipped, else w
//
// augment_gather: without augmentation top and left are the centre crop's, (SH - H) / 2 rounded half to even; with it
// they are uniform in -pad..=SH + pad - H, as torchvision's RandomCrop([H, W], padding=pad) and RandomHorizontalFlip.
//
// augment_draw, augment_grey and augment_resample: torchvision's RandomResizedCrop and ColorJitter, or RandomCrop and
// ColorJitter. The first draws a box of the stored image and three factors for each sample. The last scales the box
// to [H, W], bilinear between the centres of pixels without antialiasing, pixels outside the image 0, and changes the
// value v = byte / scale by brightness b, contrast k and saturation s, in this order, each clamped to 0..1:
//
//   v := b v;   v := k v + (1 - k) m;   v := s v + (1 - s) grey,   grey = .2989 r + .587 g + .114 b, or v of one channel
//
// where m is the mean of grey over the scaled box after the brightness: augment_grey sums it, in a fixed order.
//
// Everything is drawn from philox(seed, step, sample and stream), step = state[1], so that a draw depends on seed, step
// and place in the batch, never on the schedule. Stream 0: word 0 gives top, word 1 left (high half of word times the
// number of choices), the highest bit of word 2 the flip. Stream 1: the factors, uniform in max(0, 1 - jitter)..
// 1 + jitter. Stream 2 + t: area, ratio, top and left of the t-th try at a box.
//
// images: [examples, C, SH, SW] bytes, the files' layout; x: [C, H, W, n], written whole: samples from `count` to n are
// 0. An example or a place that does not exist is never read: its sample is NaN, so that it shows, with label 0.
//
// What writes x, Real, is in augment.cu; what draws and sums, f32, in augment_draw.cu.
#pragma once
#include "kernels/lib/device.cuh"

struct GatherShape {
    int32_t c, h, w;  // channels, rows and columns of the input
    int32_t sh, sw;   // rows and columns of a stored image
    int32_t batch;    // places of a step in `order`
    int32_t n;        // samples of a row of x: batch rounded up to a multiple of 8
};

// Where a batch comes from.
struct BatchArgs {
    const uint8_t* images;   // [examples, C, SH, SW]
    const uint32_t* labels;  // [examples]
    const uint32_t* order;   // [places]: an example each
    const uint32_t* state;   // [2]: row of the chunk, step
    const uint32_t* count;   // [1]: true samples
    int64_t examples;
    int64_t places;
    GatherShape shape;
    float scale;
};

constexpr int THREADS = 128;
constexpr int BOX = 5, FACTORS = 3;  // numbers of a sample in the tables
constexpr int64_t PADDED = -1, MISSING = -2;

// The example of a sample; PADDED from `count` on, MISSING if there is none of its number.
DEVICE int64_t example_of(const BatchArgs& b, int sample) {
    if (sample >= min64(*b.count, b.shape.batch)) return PADDED;
    const int64_t place = int64_t(b.state[0]) * b.shape.batch + sample;
    const int64_t example = place < b.places ? b.order[place] : b.examples;
    return example < b.examples ? example : MISSING;
}

DEVICE Philox draws(uint64_t seed, uint32_t step, uint32_t sample, uint32_t stream) {
    return philox(seed, step, uint64_t(stream) << 32 | sample);
}

// Uniform in 0..choices, by the high half of a product; the bias is below choices / 2^32.
DEVICE int draw(uint32_t word, int choices) { return int(uint64_t(word) * uint32_t(choices) >> 32); }

struct Box {
    int top, left, height, width;
};

// The two rows or columns of a box between whose centres a place of the input lies, and how far it is from the first.
// Whole numbers until the last division, so that rounding moves no place to another pixel.
struct Between {
    int first, second;
    float share;
};

DEVICE Between between(int place, int places, int box) {
    const int numerator = int(max64(int64_t(2 * place + 1) * box - places, 0)), denominator = 2 * places;
    const int first = numerator / denominator;
    return Between{first, int(min64(first + 1, box - 1)), float(numerator - first * denominator) / float(denominator)};
}

// The values of a pixel in C channels, of which `planes` is the first one's plane of an image.
template <int C>
DEVICE void read_pixel(const BatchArgs& b, const uint8_t* planes, Box box, Between row, Between column,
                       float (&value)[C]) {
    const int rows[2] = {box.top + row.first, box.top + row.second};
    const int columns[2] = {box.left + column.first, box.left + column.second};
    const int sh = b.shape.sh, sw = b.shape.sw;
    float corner[C][4];
    UNROLL for (int i = 0; i < 4; ++i) {
        const int y = rows[i / 2], x = columns[i % 2];
        const bool inside = y >= 0 && y < sh && x >= 0 && x < sw;
        const int64_t offset = inside ? int64_t(y) * sw + x : 0;
        UNROLL for (int c = 0; c < C; ++c) corner[c][i] = inside ? planes[int64_t(c) * sh * sw + offset] : 0;
    }
    UNROLL for (int c = 0; c < C; ++c) {
        const float above = corner[c][0] + column.share * (corner[c][1] - corner[c][0]);
        const float below = corner[c][2] + column.share * (corner[c][3] - corner[c][2]);
        value[c] = (above + row.share * (below - above)) / b.scale;
    }
}

// share x + (1 - share) y, clamped to 0..1.
DEVICE float blend(float x, float y, float share) {
    const float value = share * x + (1.0f - share) * y;
    return value < 0.0f ? 0.0f : value > 1.0f ? 1.0f : value;
}

template <int C>
DEVICE float luma(const float (&value)[C]) {
    if constexpr (C == 3) return 0.2989f * value[0] + 0.587f * value[1] + 0.114f * value[2];
    return value[0];
}

DEVICE Box box_of(const int32_t* boxes, int sample) {
    const int32_t* box = boxes + int64_t(sample) * BOX;
    return Box{box[0], box[1], box[2], box[3]};
}
