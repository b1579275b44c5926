//! What a device does at best (`kernels/ceiling.cu`, `ceiling_wgmma.cu`): copies, multiply-adds in registers, products on
//! tensor cores. Other kernels' speed is stated as a share of theirs.

use half::bf16;

use super::{check_len, layouts_of};
use crate::device::{Device, Kernel, Launch, Ptr, Slice, SliceMut, TensorMap, kernel_args};
use crate::error::{Error, Result};

kernel_args! {
    struct CeilingCopyArgs { from: Ptr<f32>, to: Ptr<f32>, count: i64 }
    struct MultiplyAddArgs { x: Ptr<f32>, y: Ptr<f32>, count: i64, rounds: i32, factor: f32, addend: f32 }
    struct MultiplyTilesArgs { left: Ptr<bf16>, right: Ptr<bf16>, sum: Ptr<f32>, rounds: i32 }
    struct MultiplyBoxesArgs { left: TensorMap, right: TensorMap, sum: Ptr<f32>, rounds: i32 }
}
layouts_of!(CeilingCopyArgs, MultiplyAddArgs, MultiplyTilesArgs, MultiplyBoxesArgs);

static COPY: Kernel<CeilingCopyArgs> = Kernel::new("ceiling_copy_f32");
static MULTIPLY_ADD: Kernel<MultiplyAddArgs> = Kernel::new("ceiling_multiply_add_f32");
static MULTIPLY_TILES: Kernel<MultiplyTilesArgs> = Kernel::new("ceiling_multiply_tiles_bf16");
static MULTIPLY_BOXES: Kernel<MultiplyBoxesArgs> = Kernel::new("ceiling_wgmma_multiply_bf16");

const THREADS: u32 = 256;
/// Most blocks of a copy and of multiply-adds: several pieces for each core of a host, and whole waves of the 132 multiprocessors
/// of an H100 or H200.
const BLOCKS: u32 = 4224;
/// Vectors are of so many elements at most.
const ALIGNMENT: usize = 16;
/// Chains of an element, and multiply-adds of a chain in a round.
pub const CHAINS: usize = 8;
/// See [`CHAINS`].
pub const STEPS: usize = 16;
/// Sums of a block of [`multiply_tiles`], one a warp.
pub const WARPS: usize = THREADS as usize / 32;
/// Rows and columns of such a sum, and steps of the reduction of a round.
pub const TILE: [usize; 3] = [32, 64, 16];
/// The same of a block of [`multiply_boxes`].
pub const BOXES: [usize; 3] = [128, 256, 64];

fn check_vectors(op: &'static str, first: (&str, usize), second: (&str, usize)) -> Result<()> {
    check_len(op, second.0, second.1, first.1)?;
    if first.1.is_multiple_of(ALIGNMENT) {
        return Ok(());
    }
    let (what, expected) = (format!("number of elements of {}", first.0), format!("a multiple of {ALIGNMENT}"));
    Err(Error::Shape { op, what, expected, got: first.1.to_string() })
}

/// Of so many elements, at least a vector for each thread.
fn launch(device: &Device, elements: usize) -> Launch {
    let threads = device.threads(THREADS);
    Launch::new([elements.div_ceil(4 * threads as usize).clamp(1, BLOCKS as usize) as u32, 1, 1], threads)
}

/// `to = from`, by as many threads as the device likes: both of a multiple of 16 elements; `to` is overwritten.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn ceiling_copy(device: &Device, from: Slice<f32>, to: SliceMut<f32>) -> Result<()> {
    check_vectors("ceiling_copy", ("from", from.len()), ("to", to.len()))?;
    let args = CeilingCopyArgs { from: from.ptr(), to: to.ptr(), count: from.len() as i64 };
    // SAFETY: both have `count` elements.
    unsafe { device.launch(&COPY, launch(device, from.len()), &args) }
}

/// Of each element of x [`CHAINS`] chains, which begin at x, x + 1, x + 2, ...: `rounds` times [`STEPS`] steps
/// `v = v factor + addend`. y is the sum of the chains' ends. Both have a multiple of 16 elements; y is overwritten.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn multiply_add(
    device: &Device,
    rounds: i32,
    [factor, addend]: [f32; 2],
    x: Slice<f32>,
    y: SliceMut<f32>,
) -> Result<()> {
    check_vectors("multiply_add", ("x", x.len()), ("y", y.len()))?;
    let args = MultiplyAddArgs { x: x.ptr(), y: y.ptr(), count: x.len() as i64, rounds, factor, addend };
    // SAFETY: both have `count` elements.
    unsafe { device.launch(&MULTIPLY_ADD, launch(device, x.len()), &args) }
}

/// `sum = rounds left rightᵀ` of each warp for itself, on tensor cores: left `[32, 16]`, right `[64, 16]`; sum `[warps, 32,
/// 64]`, overwritten, of whole blocks of [`WARPS`] warps. On the host slowly, as all that tensor cores do.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn multiply_tiles(
    device: &Device,
    rounds: i32,
    left: Slice<bf16>,
    right: Slice<bf16>,
    sum: SliceMut<f32>,
) -> Result<()> {
    let blocks = check_products("multiply_tiles", TILE, WARPS, [left.len(), right.len(), sum.len()])?;
    let args = MultiplyTilesArgs { left: left.ptr(), right: right.ptr(), sum: sum.ptr(), rounds };
    // SAFETY: lengths are those of the tiles and of the blocks' sums.
    unsafe { device.launch(&MULTIPLY_TILES, Launch::new([blocks, 1, 1], THREADS), &args) }
}

/// The same of each block for itself, by wgmma: left `[128, 64]`, right `[256, 64]`, sum `[blocks, 128, 256]`. For a device of
/// [`Device::has_wgmma`].
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn multiply_boxes(
    device: &Device,
    rounds: i32,
    left: Slice<bf16>,
    right: Slice<bf16>,
    sum: SliceMut<f32>,
) -> Result<()> {
    let blocks = check_products("multiply_boxes", BOXES, 1, [left.len(), right.len(), sum.len()])?;
    let [rows, columns, depth] = BOXES;
    let one_box = |first: Slice<bf16>, rows| device.tensor_map(first.ptr(), [depth, 1, 1, rows], [depth, 1, 1, rows]);
    let (left, right) = (one_box(left, rows)?, one_box(right, columns)?);
    let args = MultiplyBoxesArgs { left, right, sum: sum.ptr(), rounds };
    // SAFETY: as in `multiply_tiles`.
    unsafe { device.launch(&MULTIPLY_BOXES, Launch::new([blocks, 1, 1], THREADS), &args) }
}

/// The blocks whose sums these are, `each` a block.
fn check_products(op: &'static str, [rows, columns, depth]: [usize; 3], each: usize, lens: [usize; 3]) -> Result<u32> {
    let [left, right, sum] = lens;
    check_len(op, "left", left, rows * depth)?;
    check_len(op, "right", right, columns * depth)?;
    let blocks = (sum / (each * rows * columns)).max(1);
    check_len(op, "sum", sum, blocks * each * rows * columns)?;
    Ok(blocks as u32)
}
