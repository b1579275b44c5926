//! What a batch norm needs of a row, joined from the sums of its parts (`kernels/norm_join.cu`).

use super::norm::{NormRunning, NormSaved, NormShape, launch_statistics};
use super::{check_len, layouts_of};
use crate::device::{Device, Kernel, Launch, Ptr, Reals, Slice, SliceMut, kernel_args};
use crate::error::{Error, Result};

kernel_args! {
    struct NormJoinArgs {
        tiles: Ptr<f32>, running_mean: Ptr<f32>, running_var: Ptr<f32>, mean: Ptr<f32>, invstd: Ptr<f32>,
        count: Ptr<u32>, columns: i32, n: i32, width: i32, epsilon: f32, momentum: f32,
    }
    struct NormJoinGradientArgs { tiles: Ptr<f32>, dgamma: Ptr<f32>, dbeta: Ptr<f32>, count: i32 }
}
layouts_of!(NormJoinArgs, NormJoinGradientArgs);

static JOIN: Kernel<NormJoinArgs> = Kernel::new("norm_join_f32");
static JOIN_GRADIENT: Kernel<NormJoinGradientArgs> = Kernel::new("norm_join_gradient_f32");

/// Most threads of a block that joins tiles, and what their number is a multiple of.
const JOIN_THREADS: usize = 1024;
const WARP: usize = 32;

/// The statistics of x alone, `[features]` each: `saved` for [`norm_apply`](super::norm::norm_apply) or
/// [`norm_pair_forward`](super::norm_pair::norm_pair_forward), and the running ones. `scratch` has [`NormShape::scratch_len`]
/// elements or more.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
#[expect(clippy::too_many_arguments, reason = "inputs and outputs are grouped already")]
pub fn norm_statistics(
    device: &Device,
    shape: &NormShape,
    x: Reals,
    count: Slice<u32>,
    epsilon: f32,
    running: NormRunning,
    saved: NormSaved,
    scratch: SliceMut<f32>,
) -> Result<()> {
    let op = "norm_statistics";
    shape.check(op, None, [&[("x", x.len())], &[], &[]])?;
    check_len(op, "count", count.len(), 1)?;
    shape.check_scratch(op, &scratch, 1)?;
    launch_statistics(device, shape, x, count, &scratch)?;
    // A chunk is a tile of whole pixels.
    norm_join(device, shape, scratch.view(), (shape.chunk * shape.n) as usize, count, epsilon, running, saved)
}

/// The statistics of x from those of its tiles, which [`TileStatistics`](super::epilogue::TileStatistics) were given, each of
/// `tile` columns of a row, pixels times samples: `saved` for [`norm_apply`](super::norm::norm_apply), and the running ones.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
#[expect(clippy::too_many_arguments, reason = "inputs and outputs are grouped already")]
pub fn norm_join(
    device: &Device,
    shape: &NormShape,
    tiles: Slice<f32>,
    tile: usize,
    count: Slice<u32>,
    epsilon: f32,
    running: NormRunning,
    saved: NormSaved,
) -> Result<()> {
    let op = "norm_join";
    let rows = [
        ("running mean", running.mean.len()),
        ("running var", running.var.len()),
        ("saved mean", saved.mean.len()),
        ("saved invstd", saved.invstd.len()),
    ];
    shape.check(op, None, [&[], &[], &rows])?;
    check_len(op, "count", count.len(), 1)?;
    if tile == 0 || tile >= 1 << 30 {
        let (what, expected) = ("columns of a tile".into(), "1 or more, fewer than 2^30".into());
        return Err(Error::Shape { op, what, expected, got: tile.to_string() });
    }
    let columns = (shape.pixels * shape.n) as usize;
    let of_row = columns.div_ceil(tile);
    let needed = 2 * shape.features() * of_row;
    if tiles.len() < needed {
        check_len(op, "tiles", tiles.len(), needed)?;
    }
    let args = NormJoinArgs {
        tiles: tiles.ptr(),
        running_mean: running.mean.ptr(),
        running_var: running.var.ptr(),
        mean: saved.mean.ptr(),
        invstd: saved.invstd.ptr(),
        count: count.ptr(),
        columns: columns as i32,
        n: shape.n,
        width: tile as i32,
        epsilon,
        momentum: running.momentum,
    };
    // SAFETY: the lengths of everything that `args` points to were checked against its shape; outputs are exclusive.
    unsafe { device.launch(&JOIN, join_launch(device, shape.features(), of_row), &args) }
}

/// The launch of a kernel that joins so many tiles of each row.
fn join_launch(device: &Device, features: usize, tiles: usize) -> Launch {
    let threads = tiles.next_multiple_of(WARP).min(JOIN_THREADS) as u32;
    Launch::new([features as u32, 1, 1], device.threads(threads))
}

/// dgamma and dbeta `[features]`, overwritten, from the sums of `of_row` tiles of each row of dz, which
/// [`Dx::BeforeNorm`](super::epilogue::Dx::BeforeNorm) was given: for [`norm_backward`](super::norm::norm_backward) of
/// [`NormGradient::Summed`](super::norm::NormGradient::Summed).
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn norm_join_gradient(
    device: &Device,
    tiles: Slice<f32>,
    of_row: usize,
    dgamma: SliceMut<f32>,
    dbeta: SliceMut<f32>,
) -> Result<()> {
    let op = "norm_join_gradient";
    let features = dgamma.len();
    check_len(op, "dbeta", dbeta.len(), features)?;
    let needed = 2 * features * of_row;
    if tiles.len() < needed {
        check_len(op, "tiles", tiles.len(), needed)?;
    }
    let args =
        NormJoinGradientArgs { tiles: tiles.ptr(), dgamma: dgamma.ptr(), dbeta: dbeta.ptr(), count: of_row as i32 };
    // SAFETY: the lengths of everything that `args` points to were checked; outputs are exclusive.
    unsafe { device.launch(&JOIN_GRADIENT, join_launch(device, features, of_row), &args) }
}
