//! Layer norm of each column over its features (`kernels/layer_norm.cu`, `kernels/layer_norm_sum.cu`; Ba et al. 2016).

use super::{Columns, SAMPLE_ALIGNMENT, check_len, check_precision, layouts_of};
use crate::device::{
    Device, Kernel, Launch, Policy, Ptr, Real, RealKernel, Reals, RealsMut, Slice, SliceMut, kernel_args, real_kernel,
};
use crate::error::{Error, Result};

kernel_args! {
    /// Shape of a layer norm: x `[features, columns]`.
    pub struct LayerNormShape { features: i32, columns: Columns }
    struct LayerNormForwardArgs {
        x: Ptr<Real>, gamma: Ptr<f32>, beta: Ptr<f32>, count: Ptr<u32>, mean: Ptr<f32>, invstd: Ptr<f32>,
        y: Ptr<Real>, shape: LayerNormShape, epsilon: f32,
    }
    struct LayerNormBackwardArgs {
        x: Ptr<Real>, dy: Ptr<Real>, gamma: Ptr<f32>, mean: Ptr<f32>, invstd: Ptr<f32>, count: Ptr<u32>,
        partial: Ptr<f32>, dx: Ptr<Real>, shape: LayerNormShape, accumulate: i32,
    }
    struct LayerNormSumArgs {
        partial: Ptr<f32>, dgamma: Ptr<f32>, dbeta: Ptr<f32>, features: i32, pitch: i32, tiles: i32,
    }
}
layouts_of!(LayerNormShape, LayerNormForwardArgs, LayerNormBackwardArgs, LayerNormSumArgs);

static FORWARD_STAGED: RealKernel<LayerNormForwardArgs> = real_kernel!("layer_norm_forward_staged");
static FORWARD_DIRECT: RealKernel<LayerNormForwardArgs> = real_kernel!("layer_norm_forward_direct");
static BACKWARD_STAGED: RealKernel<LayerNormBackwardArgs> = real_kernel!("layer_norm_backward_staged");
static BACKWARD_DIRECT: RealKernel<LayerNormBackwardArgs> = real_kernel!("layer_norm_backward_direct");
static SUM_STAGED: Kernel<LayerNormSumArgs> = Kernel::new("layer_norm_sum_staged_f32");
static SUM_DIRECT: Kernel<LayerNormSumArgs> = Kernel::new("layer_norm_sum_direct_f32");

const THREADS: u32 = 256;
/// Columns of a block.
const TILE: usize = 64;
/// Places of the tiles' sums that a block of the second kernel adds.
const PLACES: usize = 32;

impl LayerNormShape {
    /// The shape of a layer norm of columns of `features` values.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are no features, or too many for an index.
    pub fn new(features: usize, columns: Columns) -> Result<Self> {
        if !(1..1 << 24).contains(&features) {
            let (expected, got) = ("1 to 2^24 - 1".into(), features.to_string());
            return Err(Error::Shape { op: "layer norm", what: "features".into(), expected, got });
        }
        Ok(LayerNormShape { features: features as i32, columns })
    }

    /// Elements of x.
    #[expect(clippy::len_without_is_empty, reason = "no shape is empty")]
    pub fn len(&self) -> usize {
        self.features as usize * self.columns()
    }

    /// Elements of mean and of invstd.
    pub fn columns(&self) -> usize {
        self.columns.len()
    }

    /// Elements of scratch memory that [`layer_norm_backward`] needs.
    pub fn scratch_len(&self) -> usize {
        self.tiles() * self.places()
    }

    fn tiles(&self) -> usize {
        self.columns().div_ceil(TILE)
    }

    /// Sums of a tile: of dgamma, then of dbeta.
    fn places(&self) -> usize {
        2 * self.pitch()
    }

    /// Features, rounded up.
    fn pitch(&self) -> usize {
        (self.features as usize).next_multiple_of(SAMPLE_ALIGNMENT)
    }

    /// Checks tensors of the size of x, values per feature, values per column, and the sample count.
    fn check(
        &self,
        op: &'static str,
        tensors: &[(&str, usize)],
        features: &[(&str, usize)],
        columns: &[(&str, usize)],
        count: usize,
    ) -> Result<()> {
        tensors.iter().try_for_each(|&(name, len)| check_len(op, name, len, self.len()))?;
        features.iter().try_for_each(|&(name, len)| check_len(op, name, len, self.features as usize))?;
        columns.iter().try_for_each(|&(name, len)| check_len(op, name, len, self.columns()))?;
        check_len(op, "count", count, 1)
    }
}

/// The affine part, `[features]` each, and what is added to the variance.
#[derive(Clone, Copy)]
pub struct LayerNormAffine<'a> {
    /// Scale.
    pub gamma: Slice<'a, f32>,
    /// Shift.
    pub beta: Slice<'a, f32>,
    /// Added to the variance.
    pub epsilon: f32,
}

/// What normalised, `[columns]` each, 0 in padded columns; [`layer_norm_backward`] needs it.
pub struct LayerNormStatistics<'a> {
    /// Mean of a column.
    pub mean: SliceMut<'a, f32>,
    /// `1 / sqrt(var + epsilon)`, the variance being the biased one.
    pub invstd: SliceMut<'a, f32>,
}

/// The form of a kernel that the device's policy takes.
fn form<K>(device: &Device, staged: &'static K, direct: &'static K) -> &'static K {
    match device.policy() {
        Policy::Staged => staged,
        Policy::Direct => direct,
    }
}

/// Forward: `y = gamma (x - mean) invstd + beta`, x and y `[features, columns]`. y is overwritten, its padded columns with
/// zeros. `count` `[1]` is the number of true samples.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn layer_norm_forward(
    device: &Device,
    shape: &LayerNormShape,
    x: Reals,
    affine: LayerNormAffine,
    count: Slice<u32>,
    saved: Option<LayerNormStatistics>,
    y: RealsMut,
) -> Result<()> {
    let saved_len = |len: fn(&LayerNormStatistics) -> usize| saved.as_ref().map_or(shape.columns(), len);
    let op = "layer_norm_forward";
    shape.check(
        op,
        &[("x", x.len()), ("y", y.len())],
        &[("gamma", affine.gamma.len()), ("beta", affine.beta.len())],
        &[("saved mean", saved_len(|saved| saved.mean.len())), ("saved invstd", saved_len(|saved| saved.invstd.len()))],
        count.len(),
    )?;
    let precision = check_precision(op, x, &[("y", y.view())])?;
    let args = LayerNormForwardArgs {
        x: x.ptr(),
        gamma: affine.gamma.ptr(),
        beta: affine.beta.ptr(),
        count: count.ptr(),
        mean: saved.as_ref().map_or(Ptr::null(), |saved| saved.mean.ptr()),
        invstd: saved.as_ref().map_or(Ptr::null(), |saved| saved.invstd.ptr()),
        y: y.ptr(),
        shape: *shape,
        epsilon: affine.epsilon,
    };
    let launch = Launch::new([shape.tiles() as u32, 1, 1], device.threads(THREADS));
    // SAFETY: the lengths of everything that `args` points to were checked against its shape; outputs are exclusive.
    unsafe { device.launch(form(device, &FORWARD_STAGED, &FORWARD_DIRECT).of(precision), launch, &args) }
}

/// What the backward pass reads. Padded columns are zero.
#[derive(Clone, Copy)]
pub struct LayerNormBackward<'a> {
    /// `[features, columns]`, as in the forward pass.
    pub x: Reals<'a>,
    /// Gradient of y.
    pub dy: Reals<'a>,
    /// `[features]`.
    pub gamma: Slice<'a, f32>,
    /// What the forward pass saved, `[columns]`.
    pub mean: Slice<'a, f32>,
    /// What the forward pass saved, `[columns]`.
    pub invstd: Slice<'a, f32>,
    /// Number of true samples, `[1]`.
    pub count: Slice<'a, u32>,
    /// Whether the gradient is added to what dx holds, instead of taking its place.
    pub accumulate: bool,
}

/// Backward: dgamma and dbeta `[features]`, overwritten; dx `[features, columns]`, overwritten or added to, its padded
/// columns overwritten with zeros. `scratch` has [`LayerNormShape::scratch_len`] elements or more.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn layer_norm_backward(
    device: &Device,
    shape: &LayerNormShape,
    input: LayerNormBackward,
    scratch: SliceMut<f32>,
    dgamma: SliceMut<f32>,
    dbeta: SliceMut<f32>,
    dx: RealsMut,
) -> Result<()> {
    let op = "layer_norm_backward";
    shape.check(
        op,
        &[("x", input.x.len()), ("dy", input.dy.len()), ("dx", dx.len())],
        &[("gamma", input.gamma.len()), ("dgamma", dgamma.len()), ("dbeta", dbeta.len())],
        &[("mean", input.mean.len()), ("invstd", input.invstd.len())],
        input.count.len(),
    )?;
    if scratch.len() < shape.scratch_len() {
        return check_len(op, "scratch", scratch.len(), shape.scratch_len());
    }
    let precision = check_precision(op, input.x, &[("dy", input.dy), ("dx", dx.view())])?;
    let args = LayerNormBackwardArgs {
        x: input.x.ptr(),
        dy: input.dy.ptr(),
        gamma: input.gamma.ptr(),
        mean: input.mean.ptr(),
        invstd: input.invstd.ptr(),
        count: input.count.ptr(),
        partial: scratch.ptr(),
        dx: dx.ptr(),
        shape: *shape,
        accumulate: i32::from(input.accumulate),
    };
    let (tiles, features) = (shape.tiles(), shape.features);
    let sum = LayerNormSumArgs {
        partial: scratch.ptr(),
        dgamma: dgamma.ptr(),
        dbeta: dbeta.ptr(),
        features,
        pitch: shape.pitch() as i32,
        tiles: tiles as i32,
    };
    let launch = |blocks: usize| Launch::new([blocks as u32, 1, 1], device.threads(THREADS));
    // SAFETY: the lengths of everything that the arguments point to were checked against the shape; outputs are
    // exclusive.
    unsafe {
        device.launch(form(device, &BACKWARD_STAGED, &BACKWARD_DIRECT).of(precision), launch(tiles), &args)?;
        device.launch(form(device, &SUM_STAGED, &SUM_DIRECT), launch(shape.places().div_ceil(PLACES)), &sum)
    }
}
