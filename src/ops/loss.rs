//! Softmax cross entropy with label smoothing, its gradient, and top-1 and top-5 counts (`kernels/loss.cu`).

use super::{SAMPLE_ALIGNMENT, check_len, check_precision, layouts_of};
use crate::device::{
    Device, Launch, Policy, Ptr, Real, RealKernel, Reals, RealsMut, Slice, SliceMut, kernel_args, real_kernel,
};
use crate::error::{Error, Result};

kernel_args! {
    /// Shape of a loss: logits `[classes, n]`.
    pub struct LossShape { classes: i32, n: i32 }
    struct LossArgs {
        logits: Ptr<Real>, labels: Ptr<u32>, count: Ptr<u32>, step: Ptr<u32>, loss: Ptr<f32>, top1: Ptr<u32>,
        top5: Ptr<u32>, dlogits: Ptr<Real>, shape: LossShape, rows: u32, smoothing: f32,
    }
}
layouts_of!(LossShape, LossArgs);

static STAGED: RealKernel<LossArgs> = real_kernel!("cross_entropy_staged");
static DIRECT: RealKernel<LossArgs> = real_kernel!("cross_entropy_direct");

const THREADS: usize = 512;

impl LossShape {
    /// The shape of a loss over `n` samples (rounded up to a multiple of 8).
    ///
    /// # Errors
    /// [`Error::Shape`] if a size is 0 or too large for an index.
    pub fn new(classes: usize, n: usize) -> Result<Self> {
        if classes == 0 || n == 0 || classes >= 1 << 30 || n >= 1 << 30 {
            let (expected, got) = ("from 1 to 2^30".into(), format!("{classes} classes, {n} samples"));
            return Err(Error::Shape { op: "cross entropy", what: "sizes".into(), expected, got });
        }
        Ok(LossShape { classes: classes as i32, n: n.next_multiple_of(SAMPLE_ALIGNMENT) as i32 })
    }

    /// Elements of the logits, `[classes, n]`.
    #[expect(clippy::len_without_is_empty, reason = "no shape is empty")]
    pub fn len(&self) -> usize {
        self.classes as usize * self.n as usize
    }
}

/// What the loss is taken of.
#[derive(Clone, Copy)]
pub struct LossInput<'a> {
    /// `[classes, n]`.
    pub logits: Reals<'a>,
    /// Class of each sample, `[n]`.
    pub labels: Slice<'a, u32>,
    /// Number of true samples, `[1]`.
    pub count: Slice<'a, u32>,
    /// Row of the tables to write, `[1]`.
    pub step: Slice<'a, u32>,
    /// Share of the target that is spread over all classes, 0 to 1.
    pub smoothing: f32,
}

/// One row per step; the rows of other steps are left alone.
pub struct LossTables<'a> {
    /// Mean loss of the true samples.
    pub loss: SliceMut<'a, f32>,
    /// Samples whose label has the largest logit.
    pub top1: SliceMut<'a, u32>,
    /// Samples whose label has one of the five largest logits.
    pub top5: SliceMut<'a, u32>,
}

/// Mean softmax cross entropy of the true samples, and how many of them were classified correctly; with `dlogits`
/// `[classes, n]` its gradient too, overwritten, padded samples with zeros. Equal logits rank in the order of classes.
/// A NaN logit, or a label that is no class, gives a NaN loss. A step past the end of the tables writes nothing there.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn cross_entropy(
    device: &Device,
    shape: &LossShape,
    input: LossInput,
    tables: LossTables,
    dlogits: Option<RealsMut>,
) -> Result<()> {
    let op = "cross_entropy";
    check_len(op, "logits", input.logits.len(), shape.len())?;
    check_len(op, "labels", input.labels.len(), shape.n as usize)?;
    check_len(op, "count", input.count.len(), 1)?;
    check_len(op, "step", input.step.len(), 1)?;
    check_len(op, "table top1", tables.top1.len(), tables.loss.len())?;
    check_len(op, "table top5", tables.top5.len(), tables.loss.len())?;
    if let Some(dlogits) = &dlogits {
        check_len(op, "dlogits", dlogits.len(), shape.len())?;
    }
    let gradient = dlogits.as_ref().map_or(input.logits, RealsMut::view);
    let precision = check_precision(op, input.logits, &[("dlogits", gradient)])?;
    let args = LossArgs {
        logits: input.logits.ptr(),
        labels: input.labels.ptr(),
        count: input.count.ptr(),
        step: input.step.ptr(),
        loss: tables.loss.ptr(),
        top1: tables.top1.ptr(),
        top5: tables.top5.ptr(),
        dlogits: dlogits.as_ref().map_or(Ptr::null(), RealsMut::ptr),
        shape: *shape,
        rows: u32::try_from(tables.loss.len()).unwrap_or(u32::MAX),
        smoothing: input.smoothing,
    };
    let (kernel, threads) = match device.policy() {
        Policy::Staged => (&STAGED, (shape.n as usize).next_multiple_of(32).min(THREADS)),
        Policy::Direct => (&DIRECT, 1),
    };
    // SAFETY: the lengths of everything that `args` points to were checked against its shape and its number of rows.
    unsafe { device.launch(kernel.of(precision), Launch::new([1; 3], threads as u32), &args) }
}
