//! What a device does at best (`kernels/ceiling.cu`): copies, multiply-adds in registers, products on tensor cores. Other
//! kernels' speed is stated as a share of theirs.

use half::bf16;

use super::{check_len, layouts_of};
use crate::device::{Device, Kernel, Launch, Ptr, Slice, SliceMut, kernel_args};
use crate::error::{Error, Result};

kernel_args! {
    struct CeilingCopyArgs { from: Ptr<f32>, to: Ptr<f32>, count: i64 }
    struct MultiplyAddArgs { x: Ptr<f32>, y: Ptr<f32>, count: i64, rounds: i32, factor: f32, addend: f32 }
    struct MultiplyTilesArgs { left: Ptr<bf16>, right: Ptr<bf16>, sum: Ptr<f32>, rounds: i32 }
}
layouts_of!(CeilingCopyArgs, MultiplyAddArgs, MultiplyTilesArgs);

static COPY: Kernel<CeilingCopyArgs> = Kernel::new("ceiling_copy_f32");
static MULTIPLY_ADD: Kernel<MultiplyAddArgs> = Kernel::new("ceiling_multiply_add_f32");
static MULTIPLY_TILES: Kernel<MultiplyTilesArgs> = Kernel::new("ceiling_multiply_tiles_bf16");

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
/// Rows and columns of such a sum.
pub const TILE: [usize; 2] = [32, 64];
/// Steps of the reduction of a round.
pub const DEPTH: usize = 16;

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
    let [rows, columns] = TILE;
    check_len("multiply_tiles", "left", left.len(), rows * DEPTH)?;
    check_len("multiply_tiles", "right", right.len(), columns * DEPTH)?;
    let blocks = (sum.len() / (WARPS * rows * columns)).max(1);
    check_len("multiply_tiles", "sum", sum.len(), blocks * WARPS * rows * columns)?;
    let args = MultiplyTilesArgs { left: left.ptr(), right: right.ptr(), sum: sum.ptr(), rounds };
    // SAFETY: lengths are those of the tiles and of the blocks' sums.
    unsafe { device.launch(&MULTIPLY_TILES, Launch::new([blocks as u32, 1, 1], THREADS), &args) }
}
