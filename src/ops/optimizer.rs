//! Stochastic gradient descent and AdamW over the arena of a network (`kernels/optimizer.cu`), PyTorch's formulas.

use super::{check_len, layouts_of};
use crate::device::{Device, Kernel, Launch, Ptr, Slice, SliceMut, kernel_args};
use crate::error::Result;

kernel_args! {
    struct StepArgs {
        rate: Ptr<f32>, gradients: Ptr<f32>, mask: Ptr<u32>, decay: Ptr<u32>, partials: Ptr<f32>, weights: Ptr<f32>,
        count: i64, weight_decay: f32, max_norm: f32,
    }
    struct SgdArgs { step: StepArgs, velocity: Ptr<f32>, momentum: f32, nesterov: i32 }
    struct AdamWArgs {
        step: StepArgs, corrections: Ptr<f32>, first: Ptr<f32>, second: Ptr<f32>, beta1: f32, rest1: f32, beta2: f32,
        rest2: f32, epsilon: f32,
    }
    struct GradientNormArgs { gradients: Ptr<f32>, mask: Ptr<u32>, partials: Ptr<f32>, count: i64 }
}
layouts_of!(StepArgs, SgdArgs, AdamWArgs, GradientNormArgs);

static SGD: Kernel<SgdArgs> = Kernel::new("optimizer_sgd_f32");
static ADAMW: Kernel<AdamWArgs> = Kernel::new("optimizer_adamw_f32");
static GRADIENT_NORM: Kernel<GradientNormArgs> = Kernel::new("optimizer_gradient_norm_f32");

const THREADS: u32 = 256;
/// Partial sums of a gradient norm, on every device.
pub const GRADIENT_NORM_PARTIALS: usize = 256;

/// Settings of stochastic gradient descent that stay the same from step to step.
#[derive(Clone, Copy, Debug)]
pub struct Sgd {
    /// Share of the velocity that a step keeps; 0: none.
    pub momentum: f32,
    /// Nesterov's momentum: steps by where the velocity will lead.
    pub nesterov: bool,
    /// Share of the weights added to their gradients.
    pub weight_decay: f32,
}

/// Settings of AdamW that stay the same from step to step.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Shares of the moments that a step keeps: of the mean of the gradients, and of their squares.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Share of the weights, times the learning rate, that a step takes away.
    pub weight_decay: f32,
}

/// What a step reads.
#[derive(Clone, Copy)]
pub struct OptimizerInput<'a> {
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

impl OptimizerInput<'_> {
    /// What the kernels of all optimizers take, once the lengths are checked.
    fn args(&self, op: &'static str, weight_decay: f32, weights: &SliceMut<f32>) -> Result<StepArgs> {
        let count = weights.len();
        check_len(op, "rate", self.rate.len(), 1)?;
        check_len(op, "gradients", self.gradients.len(), count)?;
        check_len(op, "mask", self.mask.len(), count.div_ceil(32))?;
        if let Some(decay) = self.decay {
            check_len(op, "decay", decay.len(), count.div_ceil(32))?;
        }
        if let Some(clip) = self.clip {
            check_len(op, "partials", clip.partials.len(), GRADIENT_NORM_PARTIALS)?;
        }
        Ok(StepArgs {
            rate: self.rate.ptr(),
            gradients: self.gradients.ptr(),
            mask: self.mask.ptr(),
            decay: self.decay.map_or(Ptr::null(), |decay| decay.ptr()),
            partials: self.clip.map_or(Ptr::null(), |clip| clip.partials.ptr()),
            weights: weights.ptr(),
            count: count as i64,
            weight_decay,
            max_norm: self.clip.map_or(f32::INFINITY, |clip| clip.max_norm),
        })
    }
}

/// One step over the whole arena: weights and velocity, updated; both exactly +0 where the mask's bit is clear.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) names the argument, what was expected and what it got.
pub fn sgd_step(
    device: &Device,
    sgd: &Sgd,
    input: OptimizerInput,
    weights: SliceMut<f32>,
    velocity: SliceMut<f32>,
) -> Result<()> {
    let op = "sgd_step";
    let count = weights.len();
    check_len(op, "velocity", velocity.len(), count)?;
    let step = input.args(op, sgd.weight_decay, &weights)?;
    let Sgd { momentum, nesterov, .. } = *sgd;
    let args = SgdArgs { step, velocity: velocity.ptr(), momentum, nesterov: i32::from(nesterov) };
    // SAFETY: the lengths of everything that `args` points to were checked.
    unsafe { device.launch(&SGD, device.elementwise(count), &args) }
}

/// One step over the whole arena: weights, first and second moment, updated; all exactly +0 where the mask's bit is
/// clear. `corrections` is `[2]`: `1 / (1 - beta1^t)` and `1 / sqrt(1 - beta2^t)` of step t = 1, 2, ...
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) names the argument, what was expected and what it got.
pub fn adamw_step(
    device: &Device,
    adamw: &AdamW,
    input: OptimizerInput,
    corrections: Slice<f32>,
    weights: SliceMut<f32>,
    first: SliceMut<f32>,
    second: SliceMut<f32>,
) -> Result<()> {
    let op = "adamw_step";
    let count = weights.len();
    check_len(op, "corrections", corrections.len(), 2)?;
    check_len(op, "first", first.len(), count)?;
    check_len(op, "second", second.len(), count)?;
    let [beta1, beta2] = adamw.betas;
    let args = AdamWArgs {
        step: input.args(op, adamw.weight_decay, &weights)?,
        corrections: corrections.ptr(),
        first: first.ptr(),
        second: second.ptr(),
        beta1: beta1 as f32,
        rest1: (1.0 - beta1) as f32,
        beta2: beta2 as f32,
        rest2: (1.0 - beta2) as f32,
        epsilon: adamw.epsilon,
    };
    // SAFETY: the lengths of everything that `args` points to were checked.
    unsafe { device.launch(&ADAMW, device.elementwise(count), &args) }
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
