// augment.cu - a batch gathered from stored images, bytes on the device: cropped, resized, flipped, its colours varied.
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
// A block of gather owns `columns` pixels of one row (c, h), one of resample those of a row h in all channels; its threads
// share the samples. So writes are whole rows of samples, and a thread's bytes come from few rows of one image, which
// the first-level cache holds. Limit: launch and latency for small images, the writes of x (4 bytes an element) for
// large ones.
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

// Where it goes.
struct InputArgs {
    const float* mean;    // [C]
    const float* std;     // [C]
    float* x;             // [C, H, W, n]
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

struct ResampleArgs {
    BatchArgs batch;
    InputArgs input;
    const int32_t* boxes;
    const float* factors;  // or null: colours stay
    const float* grey;
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

// The value of a sample without an image.
DEVICE float blank(int64_t example) { return example == MISSING ? __uint_as_float(0x7fc00000u) : 0.0f; }

DEVICE Philox draws(uint64_t seed, uint32_t step, uint32_t sample, uint32_t stream) {
    return philox(seed, step, uint64_t(stream) << 32 | sample);
}

// Uniform in 0..choices, by the high half of a product; the bias is below choices / 2^32.
DEVICE int draw(uint32_t word, int choices) { return int(uint64_t(word) * uint32_t(choices) >> 32); }

// Uniform in low..high.
DEVICE double draw(uint32_t word, double low, double high) { return low + (high - low) * (word / 4294967296.0); }

// Where the middle `part` of `whole` begins: half of the difference, half to even.
DEVICE int centre(int whole, int part) {
    const int difference = whole - part, half = difference / 2;
    return half + (difference & half & 1);
}

BARRIER_FREE_KERNEL(augment_gather_f32, GatherArgs, THREADS) {
    const GatherShape& d = a.batch.shape;
    const int c = blockIdx.x / d.h, h = blockIdx.x % d.h;
    const int begin = blockIdx.y * a.input.columns, end = int(min64(begin + a.input.columns, d.w));
    const float scale = a.batch.scale, mean = a.input.mean[c], std = a.input.std[c];
    for (int sample = threadIdx.x; sample < d.n; sample += blockDim.x) {
        float* x = a.input.x + (int64_t(c) * d.h + h) * d.w * d.n + sample;
        const int64_t example = example_of(a.batch, sample);
        if (blockIdx.x == 0 && blockIdx.y == 0)
            a.input.to_labels[sample] = example >= 0 ? a.batch.labels[example] : 0;
        if (example < 0) {
            for (int w = begin; w < end; ++w) x[int64_t(w) * d.n] = blank(example);
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
            x[int64_t(w) * d.n] = (float(byte) / scale - mean) / std;
        }
    }
}

struct Box {
    int top, left, height, width;
};

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
            a.input.x[((int64_t(channel) * d.h + h) * d.w + w) * d.n + sample] =
                (value[c] - a.input.mean[channel]) / a.input.std[channel];
        }
    }
}

BARRIER_FREE_KERNEL(augment_resample_f32, ResampleArgs, THREADS) {
    const GatherShape& d = a.batch.shape;
    const int h = blockIdx.x, begin = blockIdx.y * a.input.columns, end = int(min64(begin + a.input.columns, d.w));
    for (int sample = threadIdx.x; sample < d.n; sample += blockDim.x) {
        const int64_t example = example_of(a.batch, sample);
        if (h == 0 && begin == 0) a.input.to_labels[sample] = example >= 0 ? a.batch.labels[example] : 0;
        if (example < 0) {
            for (int64_t c = 0; c < d.c; ++c)
                for (int w = begin; w < end; ++w)
                    a.input.x[((c * d.h + h) * d.w + w) * d.n + sample] = blank(example);
        } else if (d.c == 3) {
            resample<3>(a, sample, example, 0, h, begin, end);
        } else {
            for (int c = 0; c < d.c; ++c) resample<1>(a, sample, example, c, h, begin, end);
        }
    }
}
