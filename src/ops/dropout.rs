//! What training leaves out at random (`kernels/dropout.cu`): single elements (dropout, Srivastava et al. 2014), and whole
//! branches at residual sums (stochastic depth, Huang et al. 2016), there with layer scale (Touvron et al. 2021).
//!
//! Both draw by Philox from seed, step, stream and place: the backward pass draws the same again, and so does every
//! device.

use super::{Columns, check_elementwise, check_len, check_precision, layouts_of};
use crate::device::{
    Device, Launch, Policy, Precision, Ptr, Real, RealKernel, Reals, RealsMut, Slice, SliceMut, kernel_args,
    real_kernel,
};
use crate::error::{Error, Result};

kernel_args! {
    struct DropArgs { step: Ptr<u32>, seed: u64, stream: u32, below: u32, scale: f32 }
    struct DropoutArgs { from: Ptr<Real>, to: Ptr<Real>, length: i64, drop: DropArgs }
    /// Shape of a residual sum: x and branch `[features, columns]`.
    pub struct ResidualShape { features: i32, columns: Columns }
    struct ResidualForwardArgs {
        x: Ptr<Real>, branch: Ptr<Real>, gamma: Ptr<f32>, y: Ptr<Real>, shape: ResidualShape, drop: DropArgs,
    }
    struct ResidualBackwardArgs {
        branch: Ptr<Real>, dy: Ptr<Real>, gamma: Ptr<f32>, dgamma: Ptr<f32>, dbranch: Ptr<Real>,
        shape: ResidualShape, drop: DropArgs,
    }
}
layouts_of!(DropArgs, DropoutArgs, ResidualShape, ResidualForwardArgs, ResidualBackwardArgs);

static DROPOUT: RealKernel<DropoutArgs> = real_kernel!("dropout");
static FORWARD: RealKernel<ResidualForwardArgs> = real_kernel!("residual_forward");
static BACKWARD: RealKernel<ResidualBackwardArgs> = real_kernel!("residual_backward");

const THREADS: u32 = 256;
/// Features of a block.
const ROWS: usize = 2;
/// Columns that a staged block passes over where no sum keeps a row in one block: four vectors of each thread.
const PIECE: usize = 4096;

/// What is left out: each with probability `rate`; what stays is divided by `1 - rate`.
#[derive(Clone, Copy)]
pub struct Draw<'a> {
    /// From 0 to below 1.
    pub rate: f32,
    /// The training's.
    pub seed: u64,
    /// Which layer draws.
    pub stream: u32,
    /// `[1]`: the step since training began.
    pub step: Slice<'a, u32>,
}

impl Draw<'_> {
    fn args(&self, op: &'static str) -> Result<DropArgs> {
        check_len(op, "step", self.step.len(), 1)?;
        if !(0.0..1.0).contains(&self.rate) {
            let (expected, got) = ("from 0 to below 1".into(), self.rate.to_string());
            return Err(Error::Shape { op, what: "rate".into(), expected, got });
        }
        let below = (f64::from(self.rate) * 2f64.powi(32)) as u32;
        let scale = (1.0 / (1.0 - f64::from(self.rate))) as f32;
        Ok(DropArgs { step: self.step.ptr(), seed: self.seed, stream: self.stream, below, scale })
    }
}

/// Nothing is left out without a draw.
fn drop_args(op: &'static str, drop: Option<Draw>) -> Result<DropArgs> {
    let nothing = DropArgs { step: Ptr::null(), seed: 0, stream: 0, below: 0, scale: 1.0 };
    drop.map_or(Ok(nothing), |draw| draw.args(op))
}

/// Dropout: `y = x keep`, keep being 0 or `1 / (1 - rate)`, drawn for each element. x and y have the same number of
/// elements, a multiple of 8; y is overwritten.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn dropout_forward(device: &Device, x: Reals, draw: Draw, y: RealsMut) -> Result<()> {
    let op = "dropout_forward";
    check_elementwise(op, &[("x", x.len()), ("y", y.len())])?;
    let precision = check_precision(op, x, &[("y", y.view())])?;
    dropout(device, precision, x, draw.args(op)?, y)
}

/// Gradient of [`dropout_forward`]: `dx = dy keep`, with the same draws. dy and dx have the same number of elements, a
/// multiple of 8; dx is overwritten.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn dropout_backward(device: &Device, dy: Reals, draw: Draw, dx: RealsMut) -> Result<()> {
    let op = "dropout_backward";
    check_elementwise(op, &[("dy", dy.len()), ("dx", dx.len())])?;
    let precision = check_precision(op, dy, &[("dx", dx.view())])?;
    dropout(device, precision, dy, draw.args(op)?, dx)
}

fn dropout(device: &Device, precision: Precision, from: Reals, drop: DropArgs, to: RealsMut) -> Result<()> {
    let args = DropoutArgs { from: from.ptr(), to: to.ptr(), length: from.len() as i64, drop };
    // SAFETY: the callers have checked that `from` and `to` have `length` elements of the precision, and `step` one.
    unsafe { device.launch(DROPOUT.of(precision), device.elementwise(from.len()), &args) }
}

impl ResidualShape {
    /// The shape of a residual sum of `features` rows of columns.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are no features, or too many for an index.
    pub fn new(features: usize, columns: Columns) -> Result<Self> {
        if !(1..1 << 24).contains(&features) {
            let (expected, got) = ("1 to 2^24 - 1".into(), features.to_string());
            return Err(Error::Shape { op: "residual", what: "features".into(), expected, got });
        }
        Ok(ResidualShape { features: features as i32, columns })
    }

    /// Elements of x.
    #[expect(clippy::len_without_is_empty, reason = "no shape is empty")]
    pub fn len(&self) -> usize {
        self.features as usize * self.columns.len()
    }

    fn check(&self, op: &'static str, tensors: &[(&str, usize)], rows: &[(&str, Option<usize>)]) -> Result<()> {
        tensors.iter().try_for_each(|&(name, len)| check_len(op, name, len, self.len()))?;
        let features = self.features as usize;
        rows.iter().try_for_each(|&(name, len)| check_len(op, name, len.unwrap_or(features), features))
    }

    fn launch(&self, device: &Device, whole_rows: bool) -> Launch {
        let pieces = match device.policy() {
            Policy::Staged if !whole_rows => self.columns.len().div_ceil(PIECE).min(64),
            _ => 1,
        };
        Launch::new([(self.features as usize).div_ceil(ROWS) as u32, pieces as u32, 1], device.threads(THREADS))
    }
}

/// `y = x + keep gamma branch`: x, branch and y `[features, columns]`, gamma `[features]` or 1, keep 0 or `1 / (1 - rate)`,
/// drawn for each sample, or 1. y is overwritten; where x and branch are zero, it is.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn residual_forward(
    device: &Device,
    shape: &ResidualShape,
    x: Reals,
    branch: Reals,
    gamma: Option<Slice<f32>>,
    drop: Option<Draw>,
    y: RealsMut,
) -> Result<()> {
    let op = "residual_forward";
    let tensors = [("x", x.len()), ("branch", branch.len()), ("y", y.len())];
    shape.check(op, &tensors, &[("gamma", gamma.map(|gamma| gamma.len()))])?;
    let precision = check_precision(op, x, &[("branch", branch), ("y", y.view())])?;
    let args = ResidualForwardArgs {
        x: x.ptr(),
        branch: branch.ptr(),
        gamma: gamma.map_or(Ptr::null(), |gamma| gamma.ptr()),
        y: y.ptr(),
        shape: *shape,
        drop: drop_args(op, drop)?,
    };
    // SAFETY: the lengths of everything that `args` points to were checked against its shape.
    unsafe { device.launch(FORWARD.of(precision), shape.launch(device, false), &args) }
}

/// Gradients of [`residual_forward`], with the same draws: `dbranch = keep gamma dy` `[features, columns]`, and dgamma
/// `[features]`, the sums of `keep dy branch` over the columns; both overwritten. The gradient of x is dy. Without dgamma
/// the branch is not read.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
#[expect(clippy::too_many_arguments, reason = "tensors of a sum of two")]
pub fn residual_backward(
    device: &Device,
    shape: &ResidualShape,
    branch: Reals,
    dy: Reals,
    gamma: Option<Slice<f32>>,
    drop: Option<Draw>,
    dgamma: Option<SliceMut<f32>>,
    dbranch: RealsMut,
) -> Result<()> {
    let op = "residual_backward";
    let branch_len = if dgamma.is_some() { branch.len() } else { shape.len() };
    let tensors = [("branch", branch_len), ("dy", dy.len()), ("dbranch", dbranch.len())];
    let rows = [("gamma", gamma.map(|gamma| gamma.len())), ("dgamma", dgamma.as_ref().map(SliceMut::len))];
    shape.check(op, &tensors, &rows)?;
    let branch_read = if dgamma.is_some() { branch } else { dy };
    let precision = check_precision(op, dy, &[("branch", branch_read), ("dbranch", dbranch.view())])?;
    let args = ResidualBackwardArgs {
        branch: branch.ptr(),
        dy: dy.ptr(),
        gamma: gamma.map_or(Ptr::null(), |gamma| gamma.ptr()),
        dgamma: dgamma.as_ref().map_or(Ptr::null(), SliceMut::ptr),
        dbranch: dbranch.ptr(),
        shape: *shape,
        drop: drop_args(op, drop)?,
    };
    // SAFETY: the lengths of everything that `args` points to were checked against its shape; outputs are exclusive.
    unsafe { device.launch(BACKWARD.of(precision), shape.launch(device, dgamma.is_some()), &args) }
}
