//! Max pool and global average pool (`kernels/pool.cu`).

use super::{SAMPLE_ALIGNMENT, check_len, check_precision, layouts_of, per_channel};
use crate::device::{
    Device, Policy, Ptr, Real, RealKernel, Reals, RealsMut, Slice, SliceMut, kernel_args, real_kernel,
};
use crate::error::{Error, Result};

kernel_args! {
    /// Shape of a max pool: x `[c, h, w, n]`, y `[c, p, q, n]`.
    pub struct PoolShape { c: i32, h: i32, w: i32, p: i32, q: i32, kernel: i32, stride: i32, pad: i32, n: i32 }
    struct MaxPoolForwardArgs { x: Ptr<Real>, index: Ptr<u8>, y: Ptr<Real>, shape: PoolShape }
    struct MaxPoolBackwardArgs { dy: Ptr<Real>, index: Ptr<u8>, dx: Ptr<Real>, shape: PoolShape }
    /// Shape of a global average pool: x `[c, pixels, n]`, y `[c, n]`.
    pub struct MeanPoolShape { c: i32, pixels: i32, n: i32 }
    struct MeanPoolArgs { from: Ptr<Real>, to: Ptr<Real>, shape: MeanPoolShape }
}
layouts_of!(PoolShape, MaxPoolForwardArgs, MaxPoolBackwardArgs, MeanPoolShape, MeanPoolArgs);

static MAX_FORWARD: RealKernel<MaxPoolForwardArgs> = real_kernel!("max_pool_forward");
static MAX_BACKWARD: RealKernel<MaxPoolBackwardArgs> = real_kernel!("max_pool_backward");
static MEAN_FORWARD: RealKernel<MeanPoolArgs> = real_kernel!("mean_pool_forward");
static MEAN_BACKWARD: RealKernel<MeanPoolArgs> = real_kernel!("mean_pool_backward");

/// Largest window, whose taps are counted in a byte.
const MOST_KERNEL: usize = 16;

impl PoolShape {
    /// The shape of a max pool of `n` samples (rounded up to a multiple of 8) of `channels` images `[h, w]`, with
    /// square windows. Windows that do not fit the padded image are left out, as in PyTorch.
    ///
    /// # Errors
    /// [`Error::Shape`] if the window does not fit the padded image or can miss the image, or if a size is 0 or too
    /// large.
    pub fn new(channels: usize, image: [usize; 2], kernel: usize, stride: usize, pad: usize, n: usize) -> Result<Self> {
        let [h, w] = image;
        let refuse = |what: &str, expected: &str| {
            let got = format!(
                "{channels} channels of {image:?}, window {kernel}, stride {stride}, padding {pad}, {n} samples"
            );
            Err(Error::Shape { op: "max pool", what: what.into(), expected: expected.into(), got })
        };
        if [channels, h, w, kernel, stride, n].contains(&0) {
            return refuse("sizes", "none to be 0");
        }
        if kernel > MOST_KERNEL || pad >= kernel {
            return refuse("window", "at most 16 pixels wide, and wider than the padding");
        }
        let n = n.next_multiple_of(SAMPLE_ALIGNMENT);
        if channels > 65_535 || [h, w, n, stride].iter().any(|&x| x >= 1 << 20) || h * w * n >= 1 << 30 {
            return refuse("sizes", "at most 65535 channels, and fewer than 2^30 samples times pixels");
        }
        if h + 2 * pad < kernel || w + 2 * pad < kernel {
            return refuse("window", "one that fits the padded image");
        }
        let (p, q) = ((h + 2 * pad - kernel) / stride + 1, (w + 2 * pad - kernel) / stride + 1);
        if p * q * n >= 1 << 30 {
            return refuse("sizes", "fewer than 2^30 samples times pixels of the output");
        }
        let [c, h, w, p, q, kernel, stride, pad, n] = [channels, h, w, p, q, kernel, stride, pad, n].map(|x| x as i32);
        Ok(PoolShape { c, h, w, p, q, kernel, stride, pad, n })
    }

    /// Output image, `[p, q]`.
    pub fn output_image(&self) -> [usize; 2] {
        [self.p as usize, self.q as usize]
    }

    pub(super) fn channels(&self) -> usize {
        self.c as usize
    }

    /// Pixels and samples of a row of x.
    pub(super) fn input_row(&self) -> [usize; 2] {
        [self.h * self.w, self.n].map(|x| x as usize)
    }

    /// Elements of x, `[c, h, w, n]`.
    pub fn input_len(&self) -> usize {
        [self.c, self.h, self.w, self.n].map(|x| x as usize).iter().product()
    }

    /// Elements of y, `[c, p, q, n]`.
    pub fn output_len(&self) -> usize {
        [self.c, self.p, self.q, self.n].map(|x| x as usize).iter().product()
    }
}

impl MeanPoolShape {
    /// The shape of a global average pool of `n` samples (rounded up to a multiple of 8).
    ///
    /// # Errors
    /// [`Error::Shape`] if a size is 0 or too large for an index.
    pub fn new(channels: usize, pixels: usize, n: usize) -> Result<Self> {
        let refuse = |expected: &str| {
            let got = format!("{channels} channels, {pixels} pixels, {n} samples");
            Err(Error::Shape { op: "mean pool", what: "sizes".into(), expected: expected.into(), got })
        };
        if [channels, pixels, n].contains(&0) {
            return refuse("none to be 0");
        }
        let rows = n.checked_next_multiple_of(SAMPLE_ALIGNMENT).and_then(|n| Some([n, n.checked_mul(pixels)?]));
        let Some([n, _]) = rows.filter(|&[n, row]| row < 1 << 30 && channels <= 65_535 && channels * n < 1 << 30)
        else {
            return refuse("at most 65535 channels, and fewer than 2^30 samples times pixels, or times channels");
        };
        let [c, pixels, n] = [channels, pixels, n].map(|x| x as i32);
        Ok(MeanPoolShape { c, pixels, n })
    }

    /// Elements of x, `[c, pixels, n]`.
    pub fn input_len(&self) -> usize {
        self.output_len() * self.pixels as usize
    }

    /// Elements of y, `[c, n]`.
    pub fn output_len(&self) -> usize {
        self.c as usize * self.n as usize
    }
}

/// Max pool: x `[c, h, w, n]`, index and y `[c, p, q, n]`, overwritten. `index` says which tap of each window holds its
/// first maximum.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn max_pool_forward(device: &Device, shape: &PoolShape, x: Reals, index: SliceMut<u8>, y: RealsMut) -> Result<()> {
    let op = "max_pool_forward";
    check_len(op, "x", x.len(), shape.input_len())?;
    check_len(op, "index", index.len(), shape.output_len())?;
    check_len(op, "y", y.len(), shape.output_len())?;
    let precision = check_precision(op, x, &[("y", y.view())])?;
    let args = MaxPoolForwardArgs { x: x.ptr(), index: index.ptr(), y: y.ptr(), shape: *shape };
    let launch = per_channel(device, (shape.p * shape.q * shape.n) as usize, shape.c);
    // SAFETY: the lengths of everything that `args` points to were checked against its shape.
    unsafe { device.launch(MAX_FORWARD.of(precision), launch, &args) }
}

/// Gradient of a max pool: dy and index `[c, p, q, n]`, dx `[c, h, w, n]`, overwritten.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn max_pool_backward(device: &Device, shape: &PoolShape, dy: Reals, index: Slice<u8>, dx: RealsMut) -> Result<()> {
    let op = "max_pool_backward";
    check_len(op, "dy", dy.len(), shape.output_len())?;
    check_len(op, "index", index.len(), shape.output_len())?;
    check_len(op, "dx", dx.len(), shape.input_len())?;
    let precision = check_precision(op, dy, &[("dx", dx.view())])?;
    let args = MaxPoolBackwardArgs { dy: dy.ptr(), index: index.ptr(), dx: dx.ptr(), shape: *shape };
    let launch = per_channel(device, (shape.h * shape.w * shape.n) as usize, shape.c);
    // SAFETY: the lengths of everything that `args` points to were checked against its shape.
    unsafe { device.launch(MAX_BACKWARD.of(precision), launch, &args) }
}

/// Global average pool: x `[c, pixels, n]`, y `[c, n]`, overwritten.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn mean_pool_forward(device: &Device, shape: &MeanPoolShape, x: Reals, y: RealsMut) -> Result<()> {
    let op = "mean_pool_forward";
    check_len(op, "x", x.len(), shape.input_len())?;
    check_len(op, "y", y.len(), shape.output_len())?;
    let precision = check_precision(op, x, &[("y", y.view())])?;
    let args = MeanPoolArgs { from: x.ptr(), to: y.ptr(), shape: *shape };
    // Threads for every vector of y on a GPU; on the host, one for so many elements of x.
    let launch = device.elementwise(match device.policy() {
        Policy::Staged => shape.output_len(),
        Policy::Direct => shape.input_len(),
    });
    // SAFETY: the lengths of everything that `args` points to were checked against its shape.
    unsafe { device.launch(MEAN_FORWARD.of(precision), launch, &args) }
}

/// Gradient of a global average pool: dy `[c, n]`, dx `[c, pixels, n]`, overwritten.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn mean_pool_backward(device: &Device, shape: &MeanPoolShape, dy: Reals, dx: RealsMut) -> Result<()> {
    let op = "mean_pool_backward";
    check_len(op, "dy", dy.len(), shape.output_len())?;
    check_len(op, "dx", dx.len(), shape.input_len())?;
    let precision = check_precision(op, dy, &[("dx", dx.view())])?;
    let args = MeanPoolArgs { from: dy.ptr(), to: dx.ptr(), shape: *shape };
    let launch = per_channel(device, (shape.pixels * shape.n) as usize, shape.c);
    // SAFETY: the lengths of everything that `args` points to were checked against its shape.
    unsafe { device.launch(MEAN_BACKWARD.of(precision), launch, &args) }
}
