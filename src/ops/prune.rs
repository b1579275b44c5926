//! Exact magnitude selection and the algebra of masks (`kernels/prune.cu`).

use super::{check_len, layouts_of};
use crate::device::{Device, Kernel, Launch, Ptr, Slice, SliceMut, kernel_args};
use crate::error::{Error, Result};

kernel_args! {
    struct PruneArgs {
        weights: Ptr<f32>, live: Ptr<u32>, mask: Ptr<u32>, scratch: Ptr<u32>, elements: i64, part: i64, blocks: i32,
        round: i32, remove: u32,
    }
    struct ApplyMaskArgs { mask: Ptr<u32>, values: Ptr<f32>, elements: i64 }
    struct MaskCombineArgs { x: Ptr<u32>, y: Ptr<u32>, out: Ptr<u32>, words: i64, op: i32 }
    struct MaskConsensusArgs { stack: Ptr<u32>, out: Ptr<u32>, words: i64, masks: i32, at_least: i32 }
    struct MaskCountsArgs { mask: Ptr<u32>, ranges: Ptr<u32>, counts: Ptr<u32>, words: i64 }
}
layouts_of!(PruneArgs, ApplyMaskArgs, MaskCombineArgs, MaskConsensusArgs, MaskCountsArgs);

static HISTOGRAM: Kernel<PruneArgs> = Kernel::new("prune_histogram");
static PICK: Kernel<PruneArgs> = Kernel::new("prune_pick");
static TIES: Kernel<PruneArgs> = Kernel::new("prune_ties");
static CLEAR: Kernel<PruneArgs> = Kernel::new("prune_clear");
static APPLY: Kernel<ApplyMaskArgs> = Kernel::new("mask_apply_f32");
static COMBINE: Kernel<MaskCombineArgs> = Kernel::new("mask_combine");
static CONSENSUS: Kernel<MaskConsensusArgs> = Kernel::new("mask_consensus");
static COUNTS: Kernel<MaskCountsArgs> = Kernel::new("mask_counts");

const THREADS: u32 = 256;
/// Digits of a key, and bins of each digit's counts.
const DIGITS: usize = 3;
const BINS: usize = 2048;
const STATE_WORDS: usize = 8 + DIGITS * BINS;
/// A block has at least this many weights (beside them, clearing and merging its bins costs little), and there are at
/// most this many blocks.
const LEAST_PART: usize = 4096;
const MOST_BLOCKS: usize = 1024;

/// `fraction` of `n`, rounded to the nearest whole number and halves to the even one, as torch rounds.
pub fn round_half_even(fraction: f64, n: usize) -> usize {
    (fraction * n as f64).round_ties_even() as usize
}

/// Weights to choose from, and how many of them to remove.
#[derive(Clone, Copy)]
pub struct Selection<'a> {
    /// Weights.
    pub weights: Slice<'a, f32>,
    /// One bit per weight, 1 = may be removed. The others are not looked at.
    pub live: Slice<'a, u32>,
    /// How many to remove.
    pub remove: usize,
}

/// What [`prune_smallest`] did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PruneReport {
    /// Weights removed.
    pub removed: usize,
    /// Largest magnitude removed; `None` if nothing was.
    pub threshold: Option<f32>,
    /// Weights there were to choose from.
    pub live: usize,
}

/// Elements of a block, and blocks: a function of the number of elements alone.
fn parts(elements: usize) -> (usize, usize) {
    let part = elements.div_ceil(MOST_BLOCKS).max(LEAST_PART).next_multiple_of(64);
    (part, elements.div_ceil(part).max(1))
}

/// Words of scratch memory that [`prune_smallest`] needs.
pub fn prune_scratch_len(elements: usize) -> usize {
    STATE_WORDS + parts(elements).1
}

/// Clears the bits in `mask` of the `remove` live weights of smallest magnitude, ties by lowest index; other bits stay
/// as they are. `scratch` has [`prune_scratch_len`] words or more. Where one of the live weights is NaN, or fewer than
/// `remove` are live, the mask stays as it is; [`prune_report`] tells.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn prune_smallest(
    device: &Device,
    selection: Selection,
    mut scratch: SliceMut<u32>,
    mask: SliceMut<u32>,
) -> Result<()> {
    let op = "prune_smallest";
    let elements = selection.weights.len();
    let too_large = |what: &str, got: usize| Error::Shape {
        op,
        what: what.into(),
        expected: format!("at most {}", u32::MAX),
        got: got.to_string(),
    };
    u32::try_from(elements).map_err(|_| too_large("number of weights", elements))?;
    let remove = u32::try_from(selection.remove).map_err(|_| too_large("weights to remove", selection.remove))?;
    check_len(op, "live", selection.live.len(), elements.div_ceil(32))?;
    check_len(op, "mask", mask.len(), elements.div_ceil(32))?;
    check_scratch(op, scratch.len(), prune_scratch_len(elements))?;
    device.zero(scratch.reborrow())?;

    let (part, blocks) = parts(elements);
    let args = |round: usize| PruneArgs {
        weights: selection.weights.ptr(),
        live: selection.live.ptr(),
        mask: mask.ptr(),
        scratch: scratch.ptr(),
        elements: elements as i64,
        part: part as i64,
        blocks: blocks as i32,
        round: round as i32,
        remove,
    };
    let every = Launch::new([blocks as u32, 1, 1], device.threads(THREADS));
    let one = Launch::new([1; 3], device.threads(THREADS));
    // SAFETY: the lengths of everything that the arguments point to were checked; scratch was set to zero.
    unsafe {
        for digit in 0..DIGITS {
            device.launch(&HISTOGRAM, every, &args(digit))?;
            device.launch(&PICK, one, &args(digit))?;
        }
        device.launch(&TIES, every, &args(DIGITS))?;
        device.launch(&PICK, one, &args(DIGITS))?;
        device.launch(&CLEAR, every, &args(DIGITS))
    }
}

fn check_scratch(op: &'static str, got: usize, needed: usize) -> Result<()> {
    if got < needed { check_len(op, "scratch", got, needed) } else { Ok(()) }
}

/// Reads what the last [`prune_smallest`] with this scratch did; waits for it.
///
/// # Errors
/// [`Error::Run`] if one of the live weights is NaN, [`Error::Usage`] if fewer were live than were to be removed: the
/// mask is unchanged then. [`Error::Device`] if the copy fails.
pub fn prune_report(device: &Device, scratch: Slice<u32>) -> Result<PruneReport> {
    check_scratch("prune_report", scratch.len(), prune_scratch_len(0))?;
    let state = device.read(scratch)?;
    let [live, nan, remove, active, key] = [0, 1, 2, 3, 4].map(|word| state[word]);
    if nan != 0 {
        let problem = "prune: a weight is NaN, so magnitudes have no order: training diverged, or the file is damaged";
        return Err(Error::Run(problem.into()));
    }
    if remove > live {
        return Err(Error::Usage(format!(
            "prune: expected at most {live} weights to remove, all there are, got {remove}"
        )));
    }
    let threshold = (active != 0).then(|| f32::from_bits(key));
    Ok(PruneReport { removed: remove as usize, threshold, live: live as usize })
}

/// Sets the values whose bit is clear to exactly +0.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn apply_mask(device: &Device, mask: Slice<u32>, values: SliceMut<f32>) -> Result<()> {
    check_len("apply_mask", "mask", mask.len(), values.len().div_ceil(32))?;
    let args = ApplyMaskArgs { mask: mask.ptr(), values: values.ptr(), elements: values.len() as i64 };
    // SAFETY: the lengths of everything that `args` points to were checked.
    unsafe { device.launch(&APPLY, device.elementwise(values.len()), &args) }
}

/// What [`mask_combine`] does with each pair of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaskOp {
    /// In both.
    And = 0,
    /// In one or both.
    Or = 1,
    /// In the first, not in the second.
    AndNot = 2,
    /// In one, not in both.
    Xor = 3,
}

/// Combines two masks, word by word; `out` is overwritten.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn mask_combine(device: &Device, op: MaskOp, a: Slice<u32>, b: Slice<u32>, out: SliceMut<u32>) -> Result<()> {
    check_len("mask_combine", "a", a.len(), out.len())?;
    check_len("mask_combine", "b", b.len(), out.len())?;
    let args = MaskCombineArgs { x: a.ptr(), y: b.ptr(), out: out.ptr(), words: out.len() as i64, op: op as i32 };
    // SAFETY: the lengths of everything that `args` points to were checked.
    unsafe { device.launch(&COMBINE, device.elementwise(out.len()), &args) }
}

/// The bits that at least `at_least` of `k` masks have; `stack` is `[k, words]`, `out` `[words]` is overwritten.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn mask_consensus(device: &Device, stack: Slice<u32>, k: usize, at_least: usize, out: SliceMut<u32>) -> Result<()> {
    let op = "mask_consensus";
    check_len(op, "stack", stack.len(), k * out.len())?;
    if !(1..=k).contains(&at_least) || k > i32::MAX as usize {
        let (expected, got) = (format!("from 1 to {k}, the number of masks"), at_least.to_string());
        return Err(Error::Shape { op, what: "at_least".into(), expected, got });
    }
    let (masks, at_least) = (k as i32, at_least as i32);
    let args = MaskConsensusArgs { stack: stack.ptr(), out: out.ptr(), words: out.len() as i64, masks, at_least };
    // SAFETY: the lengths of everything that `args` points to were checked.
    unsafe { device.launch(&CONSENSUS, device.elementwise(out.len() * k), &args) }
}

/// Counts the bits of ranges of a mask, one a layer: `ranges` `[layers, 2]` has the first word and the number of words
/// of each, `counts` `[layers]` is overwritten. A range that leaves the mask counts as [`u32::MAX`].
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn mask_counts(device: &Device, mask: Slice<u32>, ranges: Slice<u32>, counts: SliceMut<u32>) -> Result<()> {
    check_len("mask_counts", "ranges", ranges.len(), 2 * counts.len())?;
    if counts.is_empty() {
        return Ok(());
    }
    let words = mask.len() as i64;
    let args = MaskCountsArgs { mask: mask.ptr(), ranges: ranges.ptr(), counts: counts.ptr(), words };
    let launch = Launch::new([counts.len() as u32, 1, 1], device.threads(THREADS));
    // SAFETY: the lengths of what `args` points to were checked; the kernel checks the ranges that it finds there.
    unsafe { device.launch(&COUNTS, launch, &args) }
}
