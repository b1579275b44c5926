//! The step counter on the device (`kernels/step.cu`): one captured step replays with settings that change.

use super::{check_len, layouts_of};
use crate::device::{Device, Kernel, Launch, Ptr, Slice, SliceMut, kernel_args};
use crate::error::Result;

kernel_args! {
    struct StepBeginArgs {
        state: Ptr<u32>, counts: Ptr<u32>, rates: Ptr<f32>, correction_rows: Ptr<f32>, count: Ptr<u32>, rate: Ptr<f32>,
        corrections: Ptr<f32>, current: Ptr<u32>, rows: i64,
    }
    struct StepEndArgs { state: Ptr<u32> }
}
layouts_of!(StepBeginArgs, StepEndArgs);

static BEGIN: Kernel<StepBeginArgs> = Kernel::new("step_begin");
static END: Kernel<StepEndArgs> = Kernel::new("step_end");

/// Settings of the steps of a chunk, one row a step.
#[derive(Clone, Copy)]
pub struct StepTables<'a> {
    /// True samples of each step.
    pub count: Slice<'a, u32>,
    /// Learning rate of each step.
    pub rate: Slice<'a, f32>,
    /// Bias corrections of each step's moments, `[rows, 2]`, as [`adamw_step`](super::optimizer::adamw_step) takes them.
    pub corrections: Slice<'a, f32>,
}

/// Settings of the step that runs now, `[1]` each unless said: what the other operations of a step are given.
pub struct StepCurrent<'a> {
    /// True samples.
    pub count: SliceMut<'a, u32>,
    /// Learning rate.
    pub rate: SliceMut<'a, f32>,
    /// Bias corrections, `[2]`.
    pub corrections: SliceMut<'a, f32>,
    /// Steps since training began.
    pub step: SliceMut<'a, u32>,
}

/// Begins a step: copies row `state[0]` of the tables to `current`. `state` is `[row, step since training began]`.
/// A row past the tables' end gives no samples, and NaN for rate and corrections.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) names the argument, what was expected and what it got.
pub fn step_begin(device: &Device, state: Slice<u32>, tables: StepTables, current: StepCurrent) -> Result<()> {
    let op = "step_begin";
    check_len(op, "state", state.len(), 2)?;
    check_len(op, "rate table", tables.rate.len(), tables.count.len())?;
    check_len(op, "correction table", tables.corrections.len(), 2 * tables.count.len())?;
    check_len(op, "current count", current.count.len(), 1)?;
    check_len(op, "current rate", current.rate.len(), 1)?;
    check_len(op, "current corrections", current.corrections.len(), 2)?;
    check_len(op, "current step", current.step.len(), 1)?;
    let args = StepBeginArgs {
        state: state.ptr(),
        counts: tables.count.ptr(),
        rates: tables.rate.ptr(),
        correction_rows: tables.corrections.ptr(),
        count: current.count.ptr(),
        rate: current.rate.ptr(),
        corrections: current.corrections.ptr(),
        current: current.step.ptr(),
        rows: tables.count.len() as i64,
    };
    // SAFETY: the lengths of everything that `args` points to were checked; the kernel reads a row within the tables.
    unsafe { device.launch(&BEGIN, Launch::new([1; 3], 1), &args) }
}

/// Ends a step: adds one to both numbers of `state`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) names the argument, what was expected and what it got.
pub fn step_end(device: &Device, state: SliceMut<u32>) -> Result<()> {
    check_len("step_end", "state", state.len(), 2)?;
    // SAFETY: the length of `state` was checked.
    unsafe { device.launch(&END, Launch::new([1; 3], 1), &StepEndArgs { state: state.ptr() }) }
}
