//! Gathering a batch from stored images that are bytes on the device: crops, boxes of any size, flips, colour jitter
//! (`kernels/augment.cu`, `kernels/augment_draw.cu`).
//!
//! [`gather`] alone does crops without scaling. For the others [`draw`] draws a box and three factors for each sample,
//! [`grey_means`] sums what contrast needs, and [`resample`] reads through these tables.

use super::{SAMPLE_ALIGNMENT, check_len, layouts_of};
use crate::device::{
    Device, Kernel, Launch, Policy, Ptr, Real, RealKernel, RealsMut, Slice, SliceMut, kernel_args, real_kernel,
};
use crate::error::{Error, Result};

kernel_args! {
    /// Shape of a batch: stored images `[c, sh, sw]`, input `[c, h, w]`, x `[c, h, w, n]`.
    pub struct GatherShape { c: i32, h: i32, w: i32, sh: i32, sw: i32, batch: i32, n: i32 }
    struct BatchArgs {
        images: Ptr<u8>, labels: Ptr<u32>, order: Ptr<u32>, state: Ptr<u32>, count: Ptr<u32>, examples: i64,
        places: i64, shape: GatherShape, scale: f32,
    }
    struct InputArgs { mean: Ptr<f32>, std: Ptr<f32>, x: Ptr<Real>, to_labels: Ptr<u32>, columns: i64 }
    struct GatherArgs { batch: BatchArgs, input: InputArgs, seed: u64, augment: i32, pad: i32, flip: i32 }
    struct DrawArgs {
        state: Ptr<u32>, boxes: Ptr<i32>, factors: Ptr<f32>, seed: u64, shape: GatherShape, resized: i32, pad: i32,
        flip: i32, jitter: f32,
    }
    struct GreyArgs { batch: BatchArgs, boxes: Ptr<i32>, factors: Ptr<f32>, grey: Ptr<f32> }
    struct ResampleArgs {
        batch: BatchArgs, input: InputArgs, boxes: Ptr<i32>, factors: Ptr<f32>, grey: Ptr<f32>,
    }
}
layouts_of!(GatherShape, BatchArgs, InputArgs, GatherArgs, DrawArgs, GreyArgs, ResampleArgs);

static GATHER: RealKernel<GatherArgs> = real_kernel!("augment_gather");
static DRAW: Kernel<DrawArgs> = Kernel::new("augment_draw_f32");
static GREY: Kernel<GreyArgs> = Kernel::new("augment_grey_f32");
static RESAMPLE: RealKernel<ResampleArgs> = real_kernel!("augment_resample");

const THREADS: u32 = 128;
/// Pixels of a staged block: a row of CIFAR's is four blocks, else a batch would be fewer blocks than a GPU has
/// multiprocessors. A direct block has a whole row.
const STAGED_COLUMNS: usize = 8;
/// Largest padding: far more than any crop, and no overflow in sums of coordinates.
const MOST_PAD: u32 = 1 << 12;

impl GatherShape {
    /// Numbers of a sample in the table of boxes: top, left, height, width, and 1 where the sample is flipped.
    pub const BOX: usize = 5;
    /// Numbers of a sample in the table of factors: brightness, contrast, saturation.
    pub const FACTORS: usize = 3;

    /// The shape of batches of at most `batch` inputs `[h, w]` from images stored as `[c, sh, sw]`; n is `batch` rounded
    /// up to a multiple of 8.
    ///
    /// # Errors
    /// [`Error::Shape`] if a size is 0 or too large for an index, or the input is larger than the stored image.
    pub fn new(stored: [usize; 3], input: [usize; 2], batch: usize) -> Result<Self> {
        let ([c, sh, sw], [h, w]) = (stored, input);
        let refuse = |what: &str, expected: &str| {
            let got = format!("stored images {stored:?}, input {input:?}, batch {batch}");
            Err(Error::Shape { op: "gather", what: what.into(), expected: expected.into(), got })
        };
        if [c, h, w, sh, sw, batch].iter().any(|size| !(1..1 << 15).contains(size)) {
            return refuse("sizes", "each from 1 to 2^15 - 1");
        }
        if h > sh || w > sw {
            return refuse("input", "at most the size of the stored images");
        }
        let n = batch.next_multiple_of(SAMPLE_ALIGNMENT);
        let [c, h, w, sh, sw, batch, n] = [c, h, w, sh, sw, batch, n].map(|x| x as i32);
        Ok(GatherShape { c, h, w, sh, sw, batch, n })
    }

    /// Bytes of a stored image, `[c, sh, sw]`.
    pub fn image_len(&self) -> usize {
        [self.c, self.sh, self.sw].map(|x| x as usize).iter().product()
    }

    /// Samples of a row of x.
    pub fn samples(&self) -> usize {
        self.n as usize
    }

    /// Elements of x, `[c, h, w, n]`.
    pub fn output_len(&self) -> usize {
        [self.c, self.h, self.w, self.n].map(|x| x as usize).iter().product()
    }

    /// Blocks of `rows` rows of pixels, and the pixels of a block.
    fn launch(&self, device: &Device, rows: i32) -> (Launch, usize) {
        let columns = match device.policy() {
            Policy::Staged => STAGED_COLUMNS,
            Policy::Direct => self.w as usize,
        };
        let grid = [rows as u32, (self.w as usize).div_ceil(columns) as u32, 1];
        (Launch::new(grid, device.threads(THREADS)), columns)
    }
}

/// Where a batch comes from.
#[derive(Clone, Copy)]
pub struct GatherSource<'a> {
    /// `[examples, c, sh, sw]`, the files' layout.
    pub images: Slice<'a, u8>,
    /// `[examples]`.
    pub labels: Slice<'a, u32>,
    /// The example of each place of a chunk; row r of the chunk reads the places from `r * batch` on.
    pub order: Slice<'a, u32>,
    /// `[2]`: row of the chunk, step since training began.
    pub state: Slice<'a, u32>,
    /// `[1]`: true samples, at most `batch`.
    pub count: Slice<'a, u32>,
    /// What a byte is divided by: usually 255.
    pub scale: f32,
}

impl GatherSource<'_> {
    fn args(&self, op: &'static str, shape: &GatherShape) -> Result<BatchArgs> {
        check_len(op, "images", self.images.len(), self.labels.len() * shape.image_len())?;
        check_len(op, "state", self.state.len(), 2)?;
        check_len(op, "count", self.count.len(), 1)?;
        Ok(BatchArgs {
            images: self.images.ptr(),
            labels: self.labels.ptr(),
            order: self.order.ptr(),
            state: self.state.ptr(),
            count: self.count.ptr(),
            examples: self.labels.len() as i64,
            places: self.order.len() as i64,
            shape: *shape,
            scale: self.scale,
        })
    }
}

/// Where a batch goes: `x = (byte / scale - mean) / std`, per channel.
pub struct GatherInto<'a> {
    /// `[c]`.
    pub mean: Slice<'a, f32>,
    /// `[c]`.
    pub std: Slice<'a, f32>,
    /// `[c, h, w, n]`, overwritten, padded samples 0.
    pub x: RealsMut<'a>,
    /// `[n]`, overwritten, padded samples 0.
    pub labels: SliceMut<'a, u32>,
}

impl GatherInto<'_> {
    fn args(&self, op: &'static str, shape: &GatherShape, columns: usize) -> Result<InputArgs> {
        check_len(op, "mean", self.mean.len(), shape.c as usize)?;
        check_len(op, "std", self.std.len(), shape.c as usize)?;
        check_len(op, "x", self.x.len(), shape.output_len())?;
        check_len(op, "labels", self.labels.len(), shape.samples())?;
        let (mean, std) = (self.mean.ptr(), self.std.ptr());
        Ok(InputArgs { mean, std, x: self.x.ptr(), to_labels: self.labels.ptr(), columns: columns as i64 })
    }
}

/// Random crops and flips, as torchvision's `RandomCrop` with padding and `RandomHorizontalFlip`, drawn from
/// `philox(seed, step, sample)`.
#[derive(Clone, Copy, Debug)]
pub struct RandomCrop {
    /// Zero bytes around the image before it is cropped.
    pub pad: u32,
    /// Flip half of the images from left to right.
    pub flip: bool,
    /// Key of the random numbers.
    pub seed: u64,
}

fn check_pad(op: &'static str, pad: u32) -> Result<i32> {
    if pad > MOST_PAD {
        let (expected, got) = (format!("at most {MOST_PAD}"), pad.to_string());
        return Err(Error::Shape { op, what: "padding".into(), expected, got });
    }
    Ok(pad as i32)
}

/// Gathers a batch of crops, at the centre or at random. An example that does not exist becomes a sample of NaN with
/// label 0.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn gather(
    device: &Device,
    shape: &GatherShape,
    source: GatherSource,
    crop: Option<RandomCrop>,
    into: GatherInto,
) -> Result<()> {
    let op = "gather";
    let (launch, columns) = shape.launch(device, shape.c * shape.h);
    let drawn = crop.unwrap_or(RandomCrop { pad: 0, flip: false, seed: 0 });
    let precision = into.x.precision();
    let args = GatherArgs {
        batch: source.args(op, shape)?,
        input: into.args(op, shape, columns)?,
        seed: drawn.seed,
        augment: i32::from(crop.is_some()),
        pad: check_pad(op, drawn.pad)?,
        flip: i32::from(drawn.flip),
    };
    // SAFETY: the lengths of everything that `args` points to were checked against the shape; the kernel checks the
    // places and examples that it finds on the device.
    unsafe { device.launch(GATHER.of(precision), launch, &args) }
}

/// The part of a stored image that becomes a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crop {
    /// As many pixels as the input has, after padding with zero bytes: torchvision's `RandomCrop`.
    Padded {
        /// Zero bytes around the image.
        pad: u32,
    },
    /// A box of .08 to 1 of the image's area and of sides 3:4 to 4:3, scaled: torchvision's `RandomResizedCrop`.
    Resized,
}

/// Random boxes, flips and colours, drawn from `philox(seed, step, sample)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Augment {
    /// The part of the image.
    pub crop: Crop,
    /// Flip half of the images from left to right.
    pub flip: bool,
    /// Brightness, contrast and saturation are multiplied by factors from `max(0, 1 - jitter)` to `1 + jitter`.
    pub jitter: f32,
    /// Key of the random numbers.
    pub seed: u64,
}

/// Draws the tables of a batch from `state` `[2]`, as in [`GatherSource`]: boxes `[n, 5]` and factors `[n, 3]`, overwritten.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn draw(
    device: &Device,
    shape: &GatherShape,
    state: Slice<u32>,
    augment: Augment,
    boxes: SliceMut<i32>,
    factors: SliceMut<f32>,
) -> Result<()> {
    let op = "draw";
    check_len(op, "state", state.len(), 2)?;
    check_len(op, "boxes", boxes.len(), shape.samples() * GatherShape::BOX)?;
    check_len(op, "factors", factors.len(), shape.samples() * GatherShape::FACTORS)?;
    if !(augment.jitter.is_finite() && augment.jitter >= 0.0) {
        let (expected, got) = ("a number of at least 0".into(), augment.jitter.to_string());
        return Err(Error::Shape { op, what: "jitter".into(), expected, got });
    }
    let (resized, pad) = match augment.crop {
        Crop::Padded { pad } => (false, pad),
        Crop::Resized => (true, 0),
    };
    let args = DrawArgs {
        state: state.ptr(),
        boxes: boxes.ptr(),
        factors: factors.ptr(),
        seed: augment.seed,
        shape: *shape,
        resized: i32::from(resized),
        pad: check_pad(op, pad)?,
        flip: i32::from(augment.flip),
        jitter: augment.jitter,
    };
    let grid = [(shape.n as u32).div_ceil(THREADS), 1, 1];
    // SAFETY: the lengths of everything that `args` points to were checked against the shape.
    unsafe { device.launch(&DRAW, Launch::new(grid, device.threads(THREADS)), &args) }
}

/// What [`draw`] draws and [`grey_means`] sums.
#[derive(Clone, Copy)]
pub struct Colours<'a> {
    /// `[n, 3]`: brightness, contrast, saturation.
    pub factors: Slice<'a, f32>,
    /// `[n]`: mean of grey after the change of brightness.
    pub grey: Slice<'a, f32>,
}

/// The mean of grey over the scaled box of each sample after the change of its brightness: grey `[n]`, overwritten, 0
/// where there is no image. boxes `[n, 5]`, factors `[n, 3]`.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn grey_means(
    device: &Device,
    shape: &GatherShape,
    source: GatherSource,
    boxes: Slice<i32>,
    factors: Slice<f32>,
    grey: SliceMut<f32>,
) -> Result<()> {
    let op = "grey means";
    check_len(op, "boxes", boxes.len(), shape.samples() * GatherShape::BOX)?;
    check_len(op, "factors", factors.len(), shape.samples() * GatherShape::FACTORS)?;
    check_len(op, "grey", grey.len(), shape.samples())?;
    check_colours(op, shape)?;
    let batch = source.args(op, shape)?;
    let args = GreyArgs { batch, boxes: boxes.ptr(), factors: factors.ptr(), grey: grey.ptr() };
    let launch = Launch::new([shape.n as u32, 1, 1], device.threads(THREADS));
    // SAFETY: the lengths of everything that `args` points to were checked against the shape; the kernel checks the
    // places and examples that it finds on the device, and every pixel against its image.
    unsafe { device.launch(&GREY, launch, &args) }
}

/// Gathers a batch of boxes `[n, 5]`, scaled to the input, with other colours if there are any. An example that does not
/// exist becomes a sample of NaN with label 0.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn resample(
    device: &Device,
    shape: &GatherShape,
    source: GatherSource,
    boxes: Slice<i32>,
    colours: Option<Colours>,
    into: GatherInto,
) -> Result<()> {
    let op = "resample";
    check_len(op, "boxes", boxes.len(), shape.samples() * GatherShape::BOX)?;
    if let Some(Colours { factors, grey }) = colours {
        check_len(op, "factors", factors.len(), shape.samples() * GatherShape::FACTORS)?;
        check_len(op, "grey", grey.len(), shape.samples())?;
        check_colours(op, shape)?;
    }
    let (launch, columns) = shape.launch(device, shape.h);
    let precision = into.x.precision();
    let args = ResampleArgs {
        batch: source.args(op, shape)?,
        input: into.args(op, shape, columns)?,
        boxes: boxes.ptr(),
        factors: colours.map_or(Ptr::null(), |colours| colours.factors.ptr()),
        grey: colours.map_or(Ptr::null(), |colours| colours.grey.ptr()),
    };
    // SAFETY: as in `grey_means`; without colours the kernel reads neither of the two tables.
    unsafe { device.launch(RESAMPLE.of(precision), launch, &args) }
}

fn check_colours(op: &'static str, shape: &GatherShape) -> Result<()> {
    match shape.c {
        1 | 3 => Ok(()),
        c => {
            let what = "channels of images whose colours change".into();
            Err(Error::Shape { op, what, expected: "1 or 3".into(), got: c.to_string() })
        }
    }
}
