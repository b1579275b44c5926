//! Stochastic gradient descent over the arena of a network (`kernels/optimizer.cu`), PyTorch's formulas.

use super::{check_len, layouts_of};
use crate::device::{Device, Kernel, Launch, Ptr, Slice, SliceMut, kernel_args};
use crate::error::Result;

kernel_args! {
    struct SgdArgs {
        rate: Ptr<f32>, gradients: Ptr<f32>, mask: Ptr<u32>, decay: Ptr<u32>, partials: Ptr<f32>, weights: Ptr<f32>,
        velocity: Ptr<f32>, count: i64, momentum: f32, weight_decay: f32, max_norm: f32, nesterov: i32,
    }
    struct GradientNormArgs { gradients: Ptr<f32>, mask: Ptr<u32>, partials: Ptr<f32>, count: i64 }
}
layouts_of!(SgdArgs, GradientNormArgs);

static SGD: Kernel<SgdArgs> = Kernel::new("optimizer_sgd_f32");
static GRADIENT_NORM: Kernel<GradientNormArgs> = Kernel::new("optimizer_gradient_norm_f32");

const THREADS: u32 = 256;
/// Partial sums of a gradient norm, on every device.
pub const GRADIENT_NORM_PARTIALS: usize = 256;

/// Settings of the optimizer that stay the same from step to step.
#[derive(Clone, Copy, Debug)]
pub struct Sgd {
    /// Share of the velocity that a step keeps; 0: none.
    pub momentum: f32,
    /// Nesterov's momentum: steps by where the velocity will lead.
    pub nesterov: bool,
    /// Share of the weights added to their gradients.
    pub weight_decay: f32,
}

/// What a step reads.
#[derive(Clone, Copy)]
pub struct SgdInput<'a> {
    /// Learning rate, `[1]`.
    pub rate: Slice<'a, f32>,
    /// Gradients, not masked, not clipped.
    pub gradients: Slice<'a, f32>,
    /// One bit per weight, 1 = kept.
    pub mask: Slice<'a, u32>,
    /// One bit per weight: where weight decay applies. `None`: everywhere.
    pub decay: Option<Slice<'a, u32>>,
    /// Scales the gradients so that their norm is at most this. `None`: never.
    pub clip: Option<Clip<'a>>,
}

/// Clipping by the norm of all gradients, as `torch.nn.utils.clip_grad_norm_`.
#[derive(Clone, Copy)]
pub struct Clip<'a> {
    /// What [`gradient_norm`] wrote.
    pub partials: Slice<'a, f32>,
    /// Largest norm.
    pub max_norm: f32,
}

/// One step over the whole arena: weights and velocity, updated; both exactly +0 where the mask's bit is clear.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) names the argument, what was expected and what it got.
pub fn sgd_step(
    device: &Device,
    sgd: &Sgd,
    input: SgdInput,
    weights: SliceMut<f32>,
    velocity: SliceMut<f32>,
) -> Result<()> {
    let op = "sgd_step";
    let count = weights.len();
    check_len(op, "rate", input.rate.len(), 1)?;
    check_len(op, "gradients", input.gradients.len(), count)?;
    check_len(op, "mask", input.mask.len(), count.div_ceil(32))?;
    check_len(op, "velocity", velocity.len(), count)?;
    if let Some(decay) = input.decay {
        check_len(op, "decay", decay.len(), count.div_ceil(32))?;
    }
    if let Some(clip) = input.clip {
        check_len(op, "partials", clip.partials.len(), GRADIENT_NORM_PARTIALS)?;
    }
    let args = SgdArgs {
        rate: input.rate.ptr(),
        gradients: input.gradients.ptr(),
        mask: input.mask.ptr(),
        decay: input.decay.map_or(Ptr::null(), |decay| decay.ptr()),
        partials: input.clip.map_or(Ptr::null(), |clip| clip.partials.ptr()),
        weights: weights.ptr(),
        velocity: velocity.ptr(),
        count: count as i64,
        momentum: sgd.momentum,
        weight_decay: sgd.weight_decay,
        max_norm: input.clip.map_or(f32::INFINITY, |clip| clip.max_norm),
        nesterov: i32::from(sgd.nesterov),
    };
    // SAFETY: the lengths of everything that `args` points to were checked.
    unsafe { device.launch(&SGD, device.elementwise(count), &args) }
}

/// Sums of squares of the kept gradients, [`GRADIENT_NORM_PARTIALS`] of them, overwritten: what [`Clip`] takes.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) names the argument, what was expected and what it got.
pub fn gradient_norm(device: &Device, gradients: Slice<f32>, mask: Slice<u32>, partials: SliceMut<f32>) -> Result<()> {
    let op = "gradient_norm";
    check_len(op, "mask", mask.len(), gradients.len().div_ceil(32))?;
    check_len(op, "partials", partials.len(), GRADIENT_NORM_PARTIALS)?;
    let args = GradientNormArgs {
        gradients: gradients.ptr(),
        mask: mask.ptr(),
        partials: partials.ptr(),
        count: gradients.len() as i64,
    };
    let launch = Launch::new([GRADIENT_NORM_PARTIALS as u32, 1, 1], device.threads(THREADS));
    // SAFETY: the lengths of everything that `args` points to were checked.
    unsafe { device.launch(&GRADIENT_NORM, launch, &args) }
}
