//! Gathering a batch from images that stay on the device, with random crops and flips (`kernels/augment.cu`).

use super::{SAMPLE_ALIGNMENT, check_len, layouts_of};
use crate::device::{Device, Kernel, Launch, Policy, Ptr, Slice, SliceMut, kernel_args};
use crate::error::{Error, Result};

kernel_args! {
    /// Shape of a batch: images `[c, h, w]`, x `[c, h, w, n]`.
    pub struct GatherShape { c: i32, h: i32, w: i32, batch: i32, n: i32 }
    struct GatherArgs {
        images: Ptr<u8>, labels: Ptr<u32>, order: Ptr<u32>, state: Ptr<u32>, count: Ptr<u32>, mean: Ptr<f32>,
        std: Ptr<f32>, x: Ptr<f32>, to_labels: Ptr<u32>, examples: i64, places: i64, seed: u64, shape: GatherShape,
        scale: f32, columns: i32, augment: i32, pad: i32, flip: i32,
    }
}
layouts_of!(GatherShape, GatherArgs);

static GATHER: Kernel<GatherArgs> = Kernel::new("augment_gather_f32");

const THREADS: u32 = 128;
/// Pixels of a staged block: a row of CIFAR's is four blocks, else a batch would be fewer blocks than a GPU has
/// multiprocessors. A direct block has a whole row.
const STAGED_COLUMNS: usize = 8;
/// Largest padding: far more than any crop, and no overflow in sums of coordinates.
const MOST_PAD: u32 = 1 << 12;

impl GatherShape {
    /// The shape of batches of at most `batch` images `[c, h, w]`; n is `batch` rounded up to a multiple of 8.
    ///
    /// # Errors
    /// [`Error::Shape`] if a size is 0 or too large for an index.
    pub fn new(image: [usize; 3], batch: usize) -> Result<Self> {
        let [c, h, w] = image;
        if [c, h, w, batch].iter().any(|size| !(1..1 << 15).contains(size)) {
            return Err(Error::Shape {
                op: "gather",
                what: "sizes".into(),
                expected: "each from 1 to 2^15 - 1".into(),
                got: format!("images {image:?}, batch {batch}"),
            });
        }
        let n = batch.next_multiple_of(SAMPLE_ALIGNMENT);
        let [c, h, w, batch, n] = [c, h, w, batch, n].map(|x| x as i32);
        Ok(GatherShape { c, h, w, batch, n })
    }

    /// Bytes of an image, `[c, h, w]`.
    pub fn image_len(&self) -> usize {
        [self.c, self.h, self.w].map(|x| x as usize).iter().product()
    }

    /// Samples of a row of x.
    pub fn samples(&self) -> usize {
        self.n as usize
    }

    /// Elements of x, `[c, h, w, n]`.
    pub fn output_len(&self) -> usize {
        self.image_len() * self.samples()
    }
}

/// Where a batch comes from.
#[derive(Clone, Copy)]
pub struct GatherSource<'a> {
    /// `[examples, c, h, w]`, the files' layout.
    pub images: Slice<'a, u8>,
    /// `[examples]`.
    pub labels: Slice<'a, u32>,
    /// The example of each place of a chunk; row r of the chunk reads the places from `r * batch` on.
    pub order: Slice<'a, u32>,
    /// `[2]`: row of the chunk, step since training began.
    pub state: Slice<'a, u32>,
    /// `[1]`: true samples, at most `batch`.
    pub count: Slice<'a, u32>,
}

/// `x = (byte / scale - mean) / std`, per channel.
#[derive(Clone, Copy)]
pub struct Normalise<'a> {
    /// What a byte is divided by: usually 255.
    pub scale: f32,
    /// `[c]`.
    pub mean: Slice<'a, f32>,
    /// `[c]`.
    pub std: Slice<'a, f32>,
}

/// Random crops and flips, as torchvision's `RandomCrop` with padding and `RandomHorizontalFlip`, drawn from
/// `philox(seed, step, sample)`.
#[derive(Clone, Copy, Debug)]
pub struct Augment {
    /// Zero bytes around the image before it is cropped to its own size.
    pub pad: u32,
    /// Flip half of the images from left to right.
    pub flip: bool,
    /// Key of the random numbers.
    pub seed: u64,
}

/// Gathers, crops, flips and normalises a batch: x `[c, h, w, n]` and labels `[n]`, overwritten, padded samples 0. An
/// example that does not exist becomes a sample of NaN with label 0.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn gather(
    device: &Device,
    shape: &GatherShape,
    source: GatherSource,
    normalise: Normalise,
    augment: Option<Augment>,
    x: SliceMut<f32>,
    labels: SliceMut<u32>,
) -> Result<()> {
    let op = "gather";
    let examples = source.labels.len();
    check_len(op, "images", source.images.len(), examples * shape.image_len())?;
    check_len(op, "state", source.state.len(), 2)?;
    check_len(op, "count", source.count.len(), 1)?;
    check_len(op, "mean", normalise.mean.len(), shape.c as usize)?;
    check_len(op, "std", normalise.std.len(), shape.c as usize)?;
    check_len(op, "x", x.len(), shape.output_len())?;
    check_len(op, "labels", labels.len(), shape.samples())?;
    let drawn = augment.unwrap_or(Augment { pad: 0, flip: false, seed: 0 });
    if drawn.pad > MOST_PAD {
        let (expected, got) = (format!("at most {MOST_PAD}"), drawn.pad.to_string());
        return Err(Error::Shape { op, what: "padding".into(), expected, got });
    }
    let columns = match device.policy() {
        Policy::Staged => STAGED_COLUMNS,
        Policy::Direct => shape.w as usize,
    };
    let args = GatherArgs {
        images: source.images.ptr(),
        labels: source.labels.ptr(),
        order: source.order.ptr(),
        state: source.state.ptr(),
        count: source.count.ptr(),
        mean: normalise.mean.ptr(),
        std: normalise.std.ptr(),
        x: x.ptr(),
        to_labels: labels.ptr(),
        examples: examples as i64,
        places: source.order.len() as i64,
        seed: drawn.seed,
        shape: *shape,
        scale: normalise.scale,
        columns: columns as i32,
        augment: i32::from(augment.is_some()),
        pad: drawn.pad as i32,
        flip: i32::from(drawn.flip),
    };
    let grid = [(shape.c * shape.h) as u32, (shape.w as usize).div_ceil(columns) as u32, 1];
    // SAFETY: the lengths of everything that `args` points to were checked against the shape; the kernel checks the
    // places and examples that it finds on the device.
    unsafe { device.launch(&GATHER, Launch::new(grid, device.threads(THREADS)), &args) }
}
