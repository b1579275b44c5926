//! What touches each element once (`kernels/pointwise.cu`): the shortcut without parameters of ResNets for CIFAR.

use super::row_map::RowMap;
use super::{SAMPLE_ALIGNMENT, check_len, check_precision, layouts_of, per_channel};
use crate::device::{Device, Ptr, Real, RealKernel, Reals, RealsMut, kernel_args, real_kernel};
use crate::error::{Error, Result};

kernel_args! {
    /// Shape of a shortcut: x `[c, h, w, n]`, y `[k, p, q, n]`, of whose channels `before` come before x's.
    pub struct ShortcutShape { c: i32, h: i32, w: i32, k: i32, p: i32, q: i32, before: i32, stride: i32, n: i32 }
    struct ShortcutArgs { from: Ptr<Real>, to: Ptr<Real>, map: Ptr<u32>, shape: ShortcutShape }
}
layouts_of!(ShortcutShape, ShortcutArgs);

static FORWARD: RealKernel<ShortcutArgs> = real_kernel!("shortcut_forward");
static BACKWARD: RealKernel<ShortcutArgs> = real_kernel!("shortcut_backward");

impl ShortcutShape {
    /// The shape of a shortcut of `n` samples (rounded up to a multiple of 8): input `[c, h, w]`, every `stride`-th
    /// pixel of it, and channels of zeros, half of them (rounded down) before x's, the others after.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are fewer channels than x has, or a size is 0 or too large for an index.
    pub fn new(input: [usize; 3], out_channels: usize, stride: usize, n: usize) -> Result<Self> {
        if out_channels < input[0] {
            let got = format!("input {input:?}, {out_channels} output channels");
            let (what, expected) = ("output channels".into(), "at least those of the input".into());
            return Err(Error::Shape { op: "shortcut", what, expected, got });
        }
        Self::mapped(input, out_channels, stride, n)
    }

    /// The shape of a shortcut whose channels a [`RowMap`] names.
    ///
    /// # Errors
    /// [`Error::Shape`] if a size is 0 or too large for an index.
    pub fn mapped(input: [usize; 3], out_channels: usize, stride: usize, n: usize) -> Result<Self> {
        let [c, h, w] = input;
        let refuse = |what: &str, expected: &str| {
            let got = format!("input {input:?}, {out_channels} output channels, stride {stride}, {n} samples");
            Err(Error::Shape { op: "shortcut", what: what.into(), expected: expected.into(), got })
        };
        if [c, h, w, out_channels, stride, n].contains(&0) {
            return refuse("sizes", "none to be 0");
        }
        if out_channels.max(c) > 65_535 {
            return refuse("channels", "at most 65535");
        }
        let n = n.next_multiple_of(SAMPLE_ALIGNMENT);
        if [h, w, n, stride].iter().any(|&x| x >= 1 << 20) || h * w * n >= 1 << 30 {
            return refuse("sizes", "fewer than 2^30 samples times pixels");
        }
        let (p, q, before) = (h.div_ceil(stride), w.div_ceil(stride), out_channels.saturating_sub(c) / 2);
        let [c, h, w, k, p, q, before, stride, n] = [c, h, w, out_channels, p, q, before, stride, n].map(|x| x as i32);
        Ok(ShortcutShape { c, h, w, k, p, q, before, stride, n })
    }

    /// Output image, `[p, q]`.
    pub fn output_image(&self) -> [usize; 2] {
        [self.p as usize, self.q as usize]
    }

    /// Elements of x, `[c, h, w, n]`.
    pub fn input_len(&self) -> usize {
        [self.c, self.h, self.w, self.n].map(|x| x as usize).iter().product()
    }

    /// Elements of y, `[k, p, q, n]`.
    pub fn output_len(&self) -> usize {
        [self.k, self.p, self.q, self.n].map(|x| x as usize).iter().product()
    }
}

/// Refuses a map of other channels than the shape's.
fn check_map(op: &'static str, shape: &ShortcutShape, map: Option<&RowMap>) -> Result<()> {
    let Some(map) = map else { return Ok(()) };
    check_len(op, "the map's inputs", map.inputs(), shape.c as usize)?;
    check_len(op, "the map's outputs", map.outputs(), shape.k as usize)
}

/// Shortcut: x `[c, h, w, n]`, y `[k, p, q, n]`, overwritten. With a map, its channels are those that the map names.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn shortcut_forward(
    device: &Device,
    shape: &ShortcutShape,
    map: Option<&RowMap>,
    x: Reals,
    y: RealsMut,
) -> Result<()> {
    let op = "shortcut_forward";
    check_map(op, shape, map)?;
    check_len(op, "x", x.len(), shape.input_len())?;
    check_len(op, "y", y.len(), shape.output_len())?;
    let precision = check_precision(op, x, &[("y", y.view())])?;
    let map = map.map_or(Ptr::null(), RowMap::source);
    let args = ShortcutArgs { from: x.ptr(), to: y.ptr(), map, shape: *shape };
    let launch = per_channel(device, (shape.p * shape.q * shape.n) as usize, shape.k);
    // SAFETY: the lengths of everything that `args` points to were checked against its shape.
    unsafe { device.launch(FORWARD.of(precision), launch, &args) }
}

/// Gradient of a shortcut: dy `[k, p, q, n]`, dx `[c, h, w, n]`, overwritten, with zeros where nothing was read.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn shortcut_backward(
    device: &Device,
    shape: &ShortcutShape,
    map: Option<&RowMap>,
    dy: Reals,
    dx: RealsMut,
) -> Result<()> {
    let op = "shortcut_backward";
    check_map(op, shape, map)?;
    check_len(op, "dy", dy.len(), shape.output_len())?;
    check_len(op, "dx", dx.len(), shape.input_len())?;
    let precision = check_precision(op, dy, &[("dx", dx.view())])?;
    let map = map.map_or(Ptr::null(), RowMap::target);
    let args = ShortcutArgs { from: dy.ptr(), to: dx.ptr(), map, shape: *shape };
    let launch = per_channel(device, (shape.h * shape.w * shape.n) as usize, shape.c);
    // SAFETY: the lengths of everything that `args` points to were checked against its shape.
    unsafe { device.launch(BACKWARD.of(precision), launch, &args) }
}
