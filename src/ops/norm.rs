//! Batch norm with residual and relu in the same pass (`kernels/norm.cu`).

use super::row_map::RowMap;
use super::{SAMPLE_ALIGNMENT, check_len, check_precision, layouts_of};
use crate::device::{
    Device, Launch, Precision, Ptr, Real, RealKernel, Reals, RealsMut, Slice, SliceMut, kernel_args, real_kernel,
};
use crate::error::{Error, Result};

kernel_args! {
    /// Shape of a batch norm: x `[features, pixels, n]`, and how its rows are cut into chunks.
    pub struct NormShape {
        features: i32, pub(super) pixels: i32, pub(super) n: i32, splits: i32, pub(super) chunk: i32,
    }
    #[derive(Default)]
    pub(super) struct NormalisedArgs {
        x: Ptr<Real>, gamma: Ptr<f32>, beta: Ptr<f32>, mean: Ptr<f32>, invstd: Ptr<f32>,
    }
    struct NormStatisticsArgs { x: Ptr<Real>, partial: Ptr<f32>, count: Ptr<u32>, shape: NormShape }
    struct NormForwardArgs {
        x: Ptr<Real>, residual: Ptr<Real>, gamma: Ptr<f32>, beta: Ptr<f32>, running_mean: Ptr<f32>,
        running_var: Ptr<f32>, mean: Ptr<f32>, invstd: Ptr<f32>, partial: Ptr<f32>, y: Ptr<Real>, count: Ptr<u32>,
        source: Ptr<u32>, shape: NormShape, relu: i32, epsilon: f32, momentum: f32,
    }
    struct NormEvalArgs {
        x: Ptr<Real>, residual: Ptr<Real>, gamma: Ptr<f32>, beta: Ptr<f32>, mean: Ptr<f32>, var: Ptr<f32>,
        invstd: Ptr<f32>, y: Ptr<Real>, count: Ptr<u32>, source: Ptr<u32>, shape: NormShape, relu: i32, epsilon: f32,
    }
    struct NormBackwardArgs {
        norm: NormalisedArgs, y: Ptr<Real>, dy: Ptr<Real>, dz: Ptr<Real>, partial: Ptr<f32>, dgamma: Ptr<f32>,
        dbeta: Ptr<f32>, dx: Ptr<Real>, count: Ptr<u32>, source: Ptr<u32>, target: Ptr<u32>, shape: NormShape, relu: i32,
        training: i32,
    }
}
layouts_of!(NormShape, NormalisedArgs, NormStatisticsArgs, NormForwardArgs, NormEvalArgs, NormBackwardArgs,);

static STATISTICS: RealKernel<NormStatisticsArgs> = real_kernel!("norm_statistics");
static FORWARD: RealKernel<NormForwardArgs> = real_kernel!("norm_forward");
static EVAL: RealKernel<NormEvalArgs> = real_kernel!("norm_eval");
static BACKWARD_SUMS: RealKernel<NormBackwardArgs> = real_kernel!("norm_backward_sums");
static BACKWARD: RealKernel<NormBackwardArgs> = real_kernel!("norm_backward");

const THREADS: u32 = 256;
/// Elements of a chunk: 32 KiB, so that reading it a second time hits the cache nearest by.
const CHUNK: usize = 8192;
/// Most chunks of a row, since every block adds up all of its row's sums.
const MOST_SPLITS: usize = 64;

impl NormShape {
    /// The shape of a batch norm of `features` rows of `pixels` times `n` samples (rounded up to a multiple of 8).
    ///
    /// # Errors
    /// [`Error::Shape`] if a size is 0 or too large for an index.
    pub fn new(features: usize, pixels: usize, n: usize) -> Result<Self> {
        let refuse = |expected: &str| {
            let got = format!("{features} features, {pixels} pixels, {n} samples");
            Err(Error::Shape { op: "batch norm", what: "sizes".into(), expected: expected.into(), got })
        };
        if [features, pixels, n].contains(&0) {
            return refuse("none to be 0");
        }
        let row = n.checked_next_multiple_of(SAMPLE_ALIGNMENT).and_then(|n| n.checked_mul(pixels));
        let Some(row) = row.filter(|&row| row < 1 << 30 && features <= 65_535) else {
            return refuse("at most 65535 features, and fewer than 2^30 samples times pixels");
        };
        let chunk = pixels.div_ceil(row.div_ceil(CHUNK).min(MOST_SPLITS));
        let splits = pixels.div_ceil(chunk);
        let [features, n, pixels, splits, chunk] = [features, row / pixels, pixels, splits, chunk].map(|x| x as i32);
        Ok(NormShape { features, pixels, n, splits, chunk })
    }

    /// Elements of x.
    #[expect(clippy::len_without_is_empty, reason = "no shape is empty")]
    pub fn len(&self) -> usize {
        [self.features, self.pixels, self.n].map(|x| x as usize).iter().product()
    }

    /// Elements of scratch memory that [`norm_forward`], [`norm_backward`] and
    /// [`norm_statistics`](super::norm_join::norm_statistics) need.
    pub fn scratch_len(&self) -> usize {
        2 * self.features() * self.splits as usize
    }

    pub(super) fn launch(&self, device: &Device, rows: usize) -> Launch {
        Launch::new([self.splits as u32, rows as u32, 1], device.threads(THREADS))
    }

    pub(super) fn features(&self) -> usize {
        self.features as usize
    }

    /// Pixels and samples of a row.
    pub(super) fn row(&self) -> [usize; 2] {
        [self.pixels, self.n].map(|x| x as usize)
    }

    /// Rows of y.
    fn outputs(&self, map: Option<&RowMap>) -> usize {
        map.map_or(self.features(), RowMap::outputs)
    }

    /// Checks tensors with the rows of x, those with the rows of y, values per feature, and the map.
    pub(super) fn check(
        &self,
        op: &'static str,
        map: Option<&RowMap>,
        [of_x, of_y, rows]: [&[(&str, usize)]; 3],
    ) -> Result<()> {
        if let Some(map) = map {
            check_len(op, "the map's inputs", map.inputs(), self.features())?;
            if !map.covers() || map.outputs() > 65_535 {
                let (what, expected) = ("the map".into(), "at most 65535 rows, one for each of x".into());
                return Err(Error::Shape { op, what, expected, got: format!("{} rows", map.outputs()) });
            }
        }
        let row = self.len() / self.features();
        of_x.iter().try_for_each(|&(name, len)| check_len(op, name, len, self.len()))?;
        of_y.iter().try_for_each(|&(name, len)| check_len(op, name, len, self.outputs(map) * row))?;
        rows.iter().try_for_each(|&(name, len)| check_len(op, name, len, self.features()))
    }

    /// Refuses what is too short for so many norms.
    pub(super) fn check_scratch(&self, op: &'static str, scratch: &SliceMut<f32>, norms: usize) -> Result<()> {
        let needed = norms * self.scratch_len();
        if scratch.len() < needed { check_len(op, "scratch", scratch.len(), needed) } else { Ok(()) }
    }
}

/// The affine part, `[features]` each, and what is added to the variance.
#[derive(Clone, Copy)]
pub struct NormAffine<'a> {
    /// Scale.
    pub gamma: Slice<'a, f32>,
    /// Shift.
    pub beta: Slice<'a, f32>,
    /// Added to the variance.
    pub epsilon: f32,
}

/// Running statistics, `[features]` each: `running = (1 - momentum) running + momentum batch`.
pub struct NormRunning<'a> {
    /// Of the batch means.
    pub mean: SliceMut<'a, f32>,
    /// Of the unbiased batch variances.
    pub var: SliceMut<'a, f32>,
    /// Share of the new batch, 0.1 in PyTorch.
    pub momentum: f32,
}

/// What normalised the batch, `[features]` each; [`norm_backward`] needs it.
pub struct NormSaved<'a> {
    /// Batch mean.
    pub mean: SliceMut<'a, f32>,
    /// `1 / sqrt(var + epsilon)`, the variance being the biased one.
    pub invstd: SliceMut<'a, f32>,
}

/// What a batch norm is applied to. Padded samples are zero.
#[derive(Clone, Copy)]
pub struct NormInput<'a> {
    /// `[features, pixels, n]`.
    pub x: Reals<'a>,
    /// Added before the relu, of the size of y.
    pub residual: Option<Reals<'a>>,
    /// Which row of y each row of x is, where y and the residual have more of them; those are the residual, or zero.
    pub map: Option<&'a RowMap>,
    /// Whether negative results become zero.
    pub relu: bool,
    /// Number of true samples, `[1]`.
    pub count: Slice<'a, u32>,
}

impl NormInput<'_> {
    /// Elements of the residual, or of y where there is none.
    fn residual_len(&self, y: usize) -> usize {
        self.residual.map_or(y, |residual| residual.len())
    }

    fn source(&self) -> Ptr<u32> {
        self.map.map_or(Ptr::null(), RowMap::source)
    }

    fn residual_ptr(&self) -> Ptr<Real> {
        self.residual.map_or(Ptr::null(), |residual| residual.ptr())
    }

    fn precision(&self, op: &'static str, y: &RealsMut) -> Result<Precision> {
        check_precision(op, self.x, &[("residual", self.residual.unwrap_or(self.x)), ("y", y.view())])
    }
}

/// Forward in training, with the batch's statistics: `y = [relu](gamma (x - mean) invstd + beta [+ residual])`.
/// y is overwritten, its padded samples with zeros. `scratch` has [`NormShape::scratch_len`] elements or more.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
#[expect(clippy::too_many_arguments, reason = "inputs and outputs are grouped already")]
pub fn norm_forward(
    device: &Device,
    shape: &NormShape,
    input: NormInput,
    affine: NormAffine,
    running: NormRunning,
    saved: NormSaved,
    scratch: SliceMut<f32>,
    y: RealsMut,
) -> Result<()> {
    let op = "norm_forward";
    let rows = [
        ("gamma", affine.gamma.len()),
        ("beta", affine.beta.len()),
        ("running mean", running.mean.len()),
        ("running var", running.var.len()),
        ("saved mean", saved.mean.len()),
        ("saved invstd", saved.invstd.len()),
    ];
    let of_y = [("residual", input.residual_len(y.len())), ("y", y.len())];
    shape.check(op, input.map, [&[("x", input.x.len())], &of_y, &rows])?;
    check_len(op, "count", input.count.len(), 1)?;
    shape.check_scratch(op, &scratch, 1)?;
    let precision = input.precision(op, &y)?;
    let args = NormForwardArgs {
        x: input.x.ptr(),
        residual: input.residual_ptr(),
        gamma: affine.gamma.ptr(),
        beta: affine.beta.ptr(),
        running_mean: running.mean.ptr(),
        running_var: running.var.ptr(),
        mean: saved.mean.ptr(),
        invstd: saved.invstd.ptr(),
        partial: scratch.ptr(),
        y: y.ptr(),
        count: input.count.ptr(),
        source: input.source(),
        shape: *shape,
        relu: i32::from(input.relu),
        epsilon: affine.epsilon,
        momentum: running.momentum,
    };
    launch_statistics(device, shape, input.x, input.count, &scratch)?;
    // SAFETY: the lengths of everything that `args` points to were checked against its shape; outputs are exclusive.
    unsafe { device.launch(FORWARD.of(precision), shape.launch(device, shape.outputs(input.map)), &args) }
}

/// Mean and squared deviations of the chunks of each row of x; all checked.
pub(super) fn launch_statistics(
    device: &Device,
    shape: &NormShape,
    x: Reals,
    count: Slice<u32>,
    partial: &SliceMut<f32>,
) -> Result<()> {
    let args = NormStatisticsArgs { x: x.ptr(), partial: partial.ptr(), count: count.ptr(), shape: *shape };
    // SAFETY: callers have checked the lengths of everything that `args` points to against its shape; outputs are exclusive.
    unsafe { device.launch(STATISTICS.of(x.precision()), shape.launch(device, shape.features()), &args) }
}

/// What a norm is given that has not to sum x.
#[derive(Clone, Copy)]
enum Given<'a> {
    Var(Slice<'a, f32>),
    Invstd(Slice<'a, f32>),
}

/// Forward with given statistics, `[features]` each: `y = [relu](gamma (x - mean) / sqrt(var + epsilon) + beta
/// [+ residual])`. y is overwritten, its padded samples with zeros.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn norm_eval(
    device: &Device,
    shape: &NormShape,
    input: NormInput,
    affine: NormAffine,
    mean: Slice<f32>,
    var: Slice<f32>,
    y: RealsMut,
) -> Result<()> {
    normalise("norm_eval", device, shape, input, affine, mean, Given::Var(var), y)
}

/// Forward in training with what [`norm_join`](super::norm_join::norm_join) saved, `[features]` each:
/// `y = [relu](gamma (x - mean) invstd + beta [+ residual])`. y is overwritten, its padded samples with zeros.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn norm_apply(
    device: &Device,
    shape: &NormShape,
    input: NormInput,
    affine: NormAffine,
    mean: Slice<f32>,
    invstd: Slice<f32>,
    y: RealsMut,
) -> Result<()> {
    normalise("norm_apply", device, shape, input, affine, mean, Given::Invstd(invstd), y)
}

#[expect(clippy::too_many_arguments, reason = "inputs are grouped already")]
fn normalise(
    op: &'static str,
    device: &Device,
    shape: &NormShape,
    input: NormInput,
    affine: NormAffine,
    mean: Slice<f32>,
    given: Given,
    y: RealsMut,
) -> Result<()> {
    let (name, len, var, invstd) = match given {
        Given::Var(var) => ("var", var.len(), var.ptr(), Ptr::null()),
        Given::Invstd(invstd) => ("invstd", invstd.len(), Ptr::null(), invstd.ptr()),
    };
    let rows = [("gamma", affine.gamma.len()), ("beta", affine.beta.len()), ("mean", mean.len()), (name, len)];
    let of_y = [("residual", input.residual_len(y.len())), ("y", y.len())];
    shape.check(op, input.map, [&[("x", input.x.len())], &of_y, &rows])?;
    check_len(op, "count", input.count.len(), 1)?;
    let precision = input.precision(op, &y)?;
    let args = NormEvalArgs {
        x: input.x.ptr(),
        residual: input.residual_ptr(),
        gamma: affine.gamma.ptr(),
        beta: affine.beta.ptr(),
        mean: mean.ptr(),
        var,
        invstd,
        y: y.ptr(),
        count: input.count.ptr(),
        source: input.source(),
        shape: *shape,
        relu: i32::from(input.relu),
        epsilon: affine.epsilon,
    };
    // SAFETY: the lengths of everything that `args` points to were checked against its shape.
    unsafe { device.launch(EVAL.of(precision), shape.launch(device, shape.outputs(input.map)), &args) }
}

/// A tensor and what a batch norm makes of it: `gamma (x - mean) invstd + beta`. Padded samples are zero.
#[derive(Clone, Copy)]
pub struct Normalised<'a> {
    /// `[features, pixels, n]`.
    pub x: Reals<'a>,
    /// `[features]`.
    pub gamma: Slice<'a, f32>,
    /// `[features]`.
    pub beta: Slice<'a, f32>,
    /// What normalised, `[features]`.
    pub mean: Slice<'a, f32>,
    /// What normalised, `[features]`.
    pub invstd: Slice<'a, f32>,
}

impl Normalised<'_> {
    /// Checks it against a shape, and `y` elements of the result, whose rows a map says.
    pub(super) fn check(&self, op: &'static str, shape: &NormShape, map: Option<&RowMap>, y: usize) -> Result<()> {
        let rows = [
            ("gamma", self.gamma.len()),
            ("beta", self.beta.len()),
            ("mean", self.mean.len()),
            ("invstd", self.invstd.len()),
        ];
        shape.check(op, map, [&[("x of the norm", self.x.len())], &[("dy", y)], &rows])
    }

    pub(super) fn args(&self) -> NormalisedArgs {
        let Normalised { x, gamma, beta, mean, invstd } = self;
        let [gamma, beta, mean, invstd] = [gamma, beta, mean, invstd].map(Slice::ptr);
        NormalisedArgs { x: x.ptr(), gamma, beta, mean, invstd }
    }
}

/// What a batch norm did in its forward pass.
#[derive(Clone, Copy)]
pub struct Normed<'a> {
    /// What it read, and how it changed that.
    pub norm: Normalised<'a>,
    /// What it wrote, where it added a residual before ReLU; else x says as much.
    pub y: Option<Reals<'a>>,
    /// Whether negative results became zero.
    pub relu: bool,
    /// As in [`NormInput`].
    pub map: Option<&'a RowMap>,
}

impl Normed<'_> {
    /// Checks it against a shape, and `y` elements of its result.
    pub(super) fn check(&self, op: &'static str, shape: &NormShape, y: usize) -> Result<()> {
        self.norm.check(op, shape, self.map, y)?;
        self.y.map_or(Ok(()), |own| check_len(op, "y", own.len(), y))
    }

    /// The row of x that each row of y has.
    pub(super) fn source(&self) -> Ptr<u32> {
        self.map.map_or(Ptr::null(), RowMap::source)
    }
}

/// The gradient that a backward pass is given, `dz` being what of it goes through ReLU.
pub enum NormGradient<'a> {
    /// dy, which stays as it is.
    Kept(Reals<'a>),
    /// dy, over which dz is written, its padded samples zeros: the gradient of the residual.
    OfResidual(RealsMut<'a>),
    /// dz, whose sums [`norm_join_gradient`](super::norm_join::norm_join_gradient) has written where dgamma and dbeta are to be.
    Summed(Reals<'a>),
}

impl NormGradient<'_> {
    fn view(&self) -> Reals<'_> {
        match self {
            NormGradient::Kept(dy) | NormGradient::Summed(dy) => *dy,
            NormGradient::OfResidual(dy) => dy.view(),
        }
    }
}

/// Where the gradients of a batch norm are written.
pub struct NormGradients<'a> {
    /// `[features]`.
    pub dgamma: SliceMut<'a, f32>,
    /// `[features]`.
    pub dbeta: SliceMut<'a, f32>,
    /// Of the size of x.
    pub dx: RealsMut<'a>,
}

/// What the backward pass reads.
pub struct NormBackward<'a> {
    /// What the forward pass did.
    pub normed: Normed<'a>,
    /// Gradient of y, of its size, padded samples zeros.
    pub dy: NormGradient<'a>,
    /// Whether mean and invstd depend on x: true after [`norm_forward`], false after [`norm_eval`].
    pub training: bool,
    /// Number of true samples, `[1]`.
    pub count: Slice<'a, u32>,
}

/// Backward: all gradients are overwritten, padded samples with zeros, but for sums that are there. `scratch` has
/// [`NormShape::scratch_len`] elements or more.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn norm_backward(
    device: &Device,
    shape: &NormShape,
    input: NormBackward,
    scratch: SliceMut<f32>,
    to: NormGradients,
) -> Result<()> {
    let op = "norm_backward";
    let NormGradients { dgamma, dbeta, dx } = to;
    let (normed, dy) = (input.normed, input.dy.view());
    normed.check(op, shape, dy.len())?;
    shape.check(op, None, [&[("dx", dx.len())], &[], &[("dgamma", dgamma.len()), ("dbeta", dbeta.len())]])?;
    check_len(op, "count", input.count.len(), 1)?;
    shape.check_scratch(op, &scratch, 1)?;
    let x = normed.norm.x;
    let precision = check_precision(op, x, &[("y", normed.y.unwrap_or(x)), ("dy", dy), ("dx", dx.view())])?;
    let summed = matches!(input.dy, NormGradient::Summed(_));
    let args = NormBackwardArgs {
        norm: normed.norm.args(),
        y: normed.y.map_or(Ptr::null(), |y| y.ptr()),
        dy: dy.ptr(),
        dz: if matches!(input.dy, NormGradient::Kept(_)) { Ptr::null() } else { dy.ptr() },
        partial: if summed { Ptr::null() } else { scratch.ptr() },
        dgamma: dgamma.ptr(),
        dbeta: dbeta.ptr(),
        dx: dx.ptr(),
        count: input.count.ptr(),
        source: normed.source(),
        target: normed.map.map_or(Ptr::null(), RowMap::target),
        shape: *shape,
        relu: i32::from(normed.relu),
        training: i32::from(input.training),
    };
    // SAFETY: the lengths of everything that `args` points to were checked against its shape; outputs are exclusive.
    unsafe {
        if !summed {
            device.launch(BACKWARD_SUMS.of(precision), shape.launch(device, shape.features()), &args)?;
        }
        device.launch(BACKWARD.of(precision), shape.launch(device, shape.outputs(normed.map)), &args)
    }
}
