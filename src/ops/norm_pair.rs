//! The sum of two batch norms with relu in the same pass (`kernels/norm_pair.cu`).

use super::norm::{NormGradients, NormShape, Normalised, NormalisedArgs};
use super::{check_len, check_precision, layouts_of};
use crate::device::{Device, Ptr, Real, RealKernel, Reals, RealsMut, Slice, SliceMut, kernel_args, real_kernel};
use crate::error::Result;

kernel_args! {
    struct NormPairArgs { norms: [NormalisedArgs; 2], y: Ptr<Real>, count: Ptr<u32>, shape: NormShape, relu: i32 }
    struct NormPairBackwardArgs {
        norms: [NormalisedArgs; 2], dy: Ptr<Real>, partial: Ptr<f32>, dgamma: [Ptr<f32>; 2], dbeta: [Ptr<f32>; 2],
        dx: [Ptr<Real>; 2], count: Ptr<u32>, shape: NormShape, relu: i32,
    }
}
layouts_of!(NormPairArgs, NormPairBackwardArgs);

static FORWARD: RealKernel<NormPairArgs> = real_kernel!("norm_pair_forward");
static BACKWARD_SUMS: RealKernel<NormPairBackwardArgs> = real_kernel!("norm_pair_backward_sums");
static BACKWARD: RealKernel<NormPairBackwardArgs> = real_kernel!("norm_pair_backward");

/// Two batch norms, of the same shape and with the batch's statistics, whose results are added.
#[derive(Clone, Copy)]
pub struct NormPair<'a> {
    /// What they read, and how they change that.
    pub norms: [Normalised<'a>; 2],
    /// Whether negative sums become zero.
    pub relu: bool,
    /// Number of true samples, `[1]`.
    pub count: Slice<'a, u32>,
}

impl NormPair<'_> {
    fn check(&self, op: &'static str, shape: &NormShape, y: Reals) -> Result<()> {
        self.norms.iter().try_for_each(|norm| norm.check(op, shape, None, y.len()))?;
        check_len(op, "count", self.count.len(), 1)?;
        check_precision(op, y, &self.norms.map(|norm| ("x of the norm", norm.x))).map(|_| ())
    }
}

/// Forward: `y = [relu](sum of gamma (x - mean) invstd + beta)`. y is overwritten, its padded samples with zeros.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) names the argument, what was expected and what it got.
pub fn norm_pair_forward(device: &Device, shape: &NormShape, pair: NormPair, y: RealsMut) -> Result<()> {
    let op = "norm_pair_forward";
    pair.check(op, shape, y.view())?;
    let args = NormPairArgs {
        norms: pair.norms.map(|norm| norm.args()),
        y: y.ptr(),
        count: pair.count.ptr(),
        shape: *shape,
        relu: i32::from(pair.relu),
    };
    // SAFETY: the lengths of everything that `args` points to were checked against its shape; outputs are exclusive.
    unsafe { device.launch(FORWARD.of(y.precision()), shape.launch(device, shape.features()), &args) }
}

/// The gradient that a backward pass is given, dz being what of it goes through ReLU; padded samples are zeros.
#[derive(Clone, Copy)]
pub enum NormPairGradient<'a> {
    /// dy.
    Whole(Reals<'a>),
    /// dz, whose sums [`norm_join_gradient`](super::norm_join::norm_join_gradient) has written where dgamma and dbeta are to be.
    Summed(Reals<'a>),
}

/// Backward: the gradients of both norms, overwritten, padded samples with zeros, but for sums that are there. `scratch` has
/// [`NormShape::scratch_len`] elements for each norm, or more.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) names the argument, what was expected and what it got.
pub fn norm_pair_backward(
    device: &Device,
    shape: &NormShape,
    pair: NormPair,
    dy: NormPairGradient,
    scratch: SliceMut<f32>,
    gradients: [NormGradients; 2],
) -> Result<()> {
    let op = "norm_pair_backward";
    let (dy, summed) = match dy {
        NormPairGradient::Whole(dy) => (dy, false),
        NormPairGradient::Summed(dz) => (dz, true),
    };
    pair.check(op, shape, dy)?;
    for NormGradients { dgamma, dbeta, dx } in &gradients {
        shape.check(op, None, [&[("dx", dx.len())], &[], &[("dgamma", dgamma.len()), ("dbeta", dbeta.len())]])?;
        check_precision(op, dy, &[("dx", dx.view())])?;
    }
    shape.check_scratch(op, &scratch, 2)?;
    let args = NormPairBackwardArgs {
        norms: pair.norms.map(|norm| norm.args()),
        dy: dy.ptr(),
        partial: if summed { Ptr::null() } else { scratch.ptr() },
        dgamma: gradients.each_ref().map(|of| of.dgamma.ptr()),
        dbeta: gradients.each_ref().map(|of| of.dbeta.ptr()),
        dx: gradients.each_ref().map(|of| of.dx.ptr()),
        count: pair.count.ptr(),
        shape: *shape,
        relu: i32::from(pair.relu),
    };
    let launch = shape.launch(device, shape.features());
    // SAFETY: as above.
    unsafe {
        if !summed {
            device.launch(BACKWARD_SUMS.of(dy.precision()), launch, &args)?;
        }
        device.launch(BACKWARD.of(dy.precision()), launch, &args)
    }
}
