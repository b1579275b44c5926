//! Convolution with kept weights alone: what a pruned weight would multiply is never read. Rows by themselves
//! (`kernels/conv_sparse.cu`, on the host `conv_sparse_direct.cu`), groups of 8 (`conv_groups.cu`, on the host
//! `conv_sparse_direct.cu`), and in bf16 on tensor cores groups of 32 (`conv_groups_mma.cu`) and, by wgmma, of 64
//! (`conv_groups_wgmma.cu`).

use half::bf16;

use super::bias::bias_gradient;
use super::conv::{ConvShape, Extent, sum_places};
use super::epilogue::{Dx, Epilogue, EpilogueArgs};
use super::kept::{BLOCK_CHUNKS, BLOCK_SAMPLES, Form, KeptWeights, List, Pass};
use super::tiles::{self, Product};
use super::{check_len, check_precision, layouts_of};
use crate::device::{
    Device, Kernel, Launch, Policy, Ptr, Real, RealKernel, Reals, RealsMut, SliceMut, kernel_args, real_kernel,
};
use crate::error::Result;

kernel_args! {
    pub(super) struct ConvSparseArgs {
        from: Ptr<Real>, rows: Ptr<u32>, starts: Ptr<u32>, offsets: Ptr<i32>, shifts: Ptr<u32>, values: Ptr<f32>,
        left_tiles: Ptr<bf16>, to: Ptr<Real>, shape: ConvShape, groups: i32, classes: i32, epilogue: EpilogueArgs,
    }
    pub(super) struct ConvSparseGradientArgs {
        x: Ptr<Real>, dy: Ptr<Real>, rows: Ptr<u32>, starts: Ptr<u32>, offsets: Ptr<i32>, shifts: Ptr<u32>,
        chunks: Ptr<u32>, partial: Ptr<f32>, shape: ConvShape, entries: i32, chunk_count: i32, units: i32, splits: i32,
    }
}
layouts_of!(ConvSparseArgs, ConvSparseGradientArgs);

/// The kernels of a pass that threads multiply: of rows by themselves, and of groups of 8, which are f32 where they are staged.
struct Kernels<A: 'static> {
    rows: RealKernel<A>,
    rows_direct: RealKernel<A>,
    groups: Kernel<A>,
    groups_direct: RealKernel<A>,
}

static FORWARD: Kernels<ConvSparseArgs> = Kernels {
    rows: real_kernel!("conv_sparse_forward"),
    rows_direct: real_kernel!("conv_sparse_forward_direct"),
    groups: Kernel::new("conv_groups_forward_f32"),
    groups_direct: real_kernel!("conv_groups_forward_direct"),
};
static INPUT_GRADIENT: Kernels<ConvSparseArgs> = Kernels {
    rows: real_kernel!("conv_sparse_input_gradient"),
    rows_direct: real_kernel!("conv_sparse_input_gradient_direct"),
    groups: Kernel::new("conv_groups_input_gradient_f32"),
    groups_direct: real_kernel!("conv_groups_input_gradient_direct"),
};
static WEIGHT_GRADIENT: Kernels<ConvSparseGradientArgs> = Kernels {
    rows: real_kernel!("conv_sparse_weight_gradient"),
    rows_direct: real_kernel!("conv_sparse_weight_gradient_direct"),
    groups: Kernel::new("conv_groups_weight_gradient_f32"),
    groups_direct: real_kernel!("conv_groups_weight_gradient_direct"),
};

/// What a block of the kernels owns.
const BLOCK_ROWS: usize = 64;
const STAGED_COLUMNS: usize = 128;
const THREADS: u32 = 256;
const WGMMA_THREADS: u32 = 384;
const ROW_THREADS: u32 = 512;
const WARP_ROWS: usize = 4;
const WARP: u32 = 32;

impl<A> Kernels<A> {
    fn of(&self, device: &Device, weights: &KeptWeights, form: Form) -> &Kernel<A> {
        match (form, device.policy()) {
            (Form::Rows, Policy::Staged) => self.rows.of(weights.precision),
            (Form::Rows, Policy::Direct) => self.rows_direct.of(weights.precision),
            (_, Policy::Staged) => &self.groups,
            (_, Policy::Direct) => self.groups_direct.of(weights.precision),
        }
    }
}

/// What a product reads and writes.
struct Operands<'a> {
    from: Reals<'a>,
    to: Ptr<Real>,
    epilogue: EpilogueArgs,
}

/// The product of a list; the lengths of the operands are checked.
fn product(
    device: &Device,
    weights: &KeptWeights,
    list: &List,
    operands: Operands,
    kernels: &'static Kernels<ConvSparseArgs>,
    tiles: &'static Product,
) -> Result<()> {
    let Operands { from, to, epilogue } = operands;
    let shape = weights.shape;
    let Extent { pixels, classes, columns, .. } = shape.extent(tiles.gradient);
    let args = ConvSparseArgs {
        from: from.ptr(),
        rows: list.rows.view().ptr(),
        starts: list.starts.view().ptr(),
        offsets: list.offsets.view().ptr(),
        shifts: list.shifts.view().ptr(),
        values: list.values.view().ptr(),
        left_tiles: list.left_tiles.view().ptr(),
        to,
        shape,
        groups: list.groups as i32,
        classes: classes as i32,
        epilogue,
    };
    let n = shape.n as usize;
    let (kernel, grid, block) = match (list.form, device.policy()) {
        (Form::Tiles | Form::Boxes, _) => {
            let wgmma = list.form == Form::Boxes;
            let tile = tiles.group_tile(wgmma, list.groups * classes, columns);
            let threads = if wgmma { WGMMA_THREADS } else { THREADS };
            (&tile.kernel, [columns.div_ceil(tile.columns), list.groups, classes], threads)
        }
        (form, Policy::Direct) => {
            let grid = [pixels, n.div_ceil(BLOCK_SAMPLES), list.groups.div_ceil(BLOCK_ROWS / form.rows())];
            (kernels.of(device, weights, form), grid, 1)
        }
        (form, Policy::Staged) => {
            let (most, groups) = if form == Form::Rows { (ROW_THREADS, WARP_ROWS) } else { (THREADS, 1) };
            // Fewer warps where there are fewer rows.
            let warps = list.groups.div_ceil(groups);
            let threads = most.min(warps as u32 * WARP);
            let columns = (pixels * n).div_ceil(STAGED_COLUMNS);
            (kernels.of(device, weights, form), [columns, warps.div_ceil((threads / WARP) as usize), 1], threads)
        }
    };
    // SAFETY: the callers have checked the lengths of the operands against the shape; rows, offsets and starts are those
    // of the shape.
    unsafe { device.launch(kernel, Launch::new(grid.map(|x| x as u32), block), &args) }
}

impl KeptWeights {
    /// Columns of the tiles of y whose statistics [`conv_sparse_forward`] writes; none where no tensor cores multiply.
    pub fn statistics_tile(&self, device: &Device) -> Option<usize> {
        self.shape.statistics_tile(device, self.precision, Some(self.groups_of(Pass::Forward)?))
    }

    /// Tiles of a row of dx that [`conv_sparse_input_gradient`] sums for a batch norm; none where no tensor cores multiply, and
    /// where [`ConvShape::gradient_tiles`] has none.
    pub fn gradient_tiles(&self, device: &Device) -> Option<usize> {
        self.shape.gradient_tiles(device, self.precision, Some(self.groups_of(Pass::InputGradient)?))
    }

    /// Groups of rows that tensor cores multiply.
    fn groups_of(&self, pass: Pass) -> Option<usize> {
        let list = self.list("groups", pass).ok().filter(|list| list.form.on_tensor_cores())?;
        Some(list.groups)
    }
}

/// Forward, as [`conv_forward`](super::conv::conv_forward), with the values that [`KeptWeights::gather`] took.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) names the argument, what was expected and what it got.
pub fn conv_sparse_forward(
    device: &Device,
    weights: &KeptWeights,
    x: Reals,
    epilogue: Epilogue,
    y: RealsMut,
) -> Result<()> {
    let (op, shape) = ("conv_sparse_forward", weights.shape);
    check_precision(op, x, &[("y", y.view())])?.expect(op, weights.precision)?;
    check_len(op, "x", x.len(), shape.input_len())?;
    check_len(op, "y", y.len(), shape.output_len())?;
    let list = weights.list(op, Pass::Forward)?;
    epilogue.check(op, &shape, x, weights.statistics_tile(device))?;
    let tensor_cores = list.form.on_tensor_cores();
    let operands = Operands { from: x, to: y.ptr(), epilogue: epilogue.args(&shape, tensor_cores)? };
    product(device, weights, list, operands, &FORWARD, &tiles::FORWARD)?;
    epilogue.finish(device, &shape, tensor_cores, y.view())
}

/// Input gradient, as [`conv_input_gradient`](super::conv::conv_input_gradient), with the values that
/// [`KeptWeights::gather`] took.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) names the argument, what was expected and what it got, lists for other passes
/// too.
pub fn conv_sparse_input_gradient(
    device: &Device,
    weights: &KeptWeights,
    dy: Reals,
    how: Dx,
    dx: RealsMut,
) -> Result<()> {
    let (op, shape) = ("conv_sparse_input_gradient", weights.shape);
    check_precision(op, dy, &[("dx", dx.view())])?.expect(op, weights.precision)?;
    check_len(op, "dy", dy.len(), shape.output_len())?;
    check_len(op, "dx", dx.len(), shape.input_len())?;
    let list = weights.list(op, Pass::InputGradient)?;
    how.check(op, &shape, dy, weights.gradient_tiles(device))?;
    let tensor_cores = list.form.on_tensor_cores();
    let operands = Operands { from: dy, to: dx.ptr(), epilogue: how.args(&shape, tensor_cores)? };
    product(device, weights, list, operands, &INPUT_GRADIENT, &tiles::INPUT_GRADIENT)?;
    how.finish(device, tensor_cores, dx)
}

/// Weight gradient, as [`conv_weight_gradient`](super::conv::conv_weight_gradient), of kept weights: the others' places
/// in dw `[k, c, r, s]`, where it has them, are not written. The gradient of a bias is [`bias_gradient`]'s.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) names the argument, what was expected and what it got, lists for other passes
/// too.
pub fn conv_sparse_weight_gradient(
    device: &Device,
    weights: &mut KeptWeights,
    x: Reals,
    dy: Reals,
    dw: SliceMut<f32>,
    dbias: Option<SliceMut<f32>>,
) -> Result<()> {
    let (op, shape) = ("conv_sparse_weight_gradient", weights.shape);
    check_precision(op, x, &[("dy", dy)])?.expect(op, weights.precision)?;
    check_len(op, "x", x.len(), shape.input_len())?;
    check_len(op, "dy", dy.len(), shape.output_len())?;
    check_len(op, "dw", dw.len(), weights.weight_len())?;
    let form = weights.list(op, Pass::WeightGradient)?.form;
    let kernel = match form.on_tensor_cores() {
        true => &tiles::group_gradient(form == Form::Boxes).kernel,
        false => WEIGHT_GRADIENT.of(device, weights, form),
    };
    if let Some(dbias) = dbias {
        check_len(op, "dbias", dbias.len(), shape.filters())?;
        bias_gradient(device, dy, dbias)?;
    }
    let (Some(list), Some(own)) = (&weights.outputs, &mut weights.weight_gradient) else { return Ok(()) };
    let chunks = own.chunks.len() / 4;
    if chunks == 0 {
        return Ok(());
    }
    let partial = own.partial.view_mut().ptr();
    let args = ConvSparseGradientArgs {
        x: x.ptr(),
        dy: dy.ptr(),
        rows: list.rows.view().ptr(),
        starts: list.starts.view().ptr(),
        offsets: list.offsets.view().ptr(),
        shifts: list.shifts.view().ptr(),
        chunks: own.chunks.view().ptr(),
        partial,
        shape,
        entries: list.offsets.len() as i32,
        chunk_count: chunks as i32,
        units: own.units as i32,
        splits: own.splits as i32,
    };
    let (blocks, block) = match (form, device.policy()) {
        (Form::Tiles, _) => (chunks, THREADS),
        (Form::Boxes, _) => (chunks, WGMMA_THREADS),
        (_, Policy::Direct) => (chunks, 1),
        (_, Policy::Staged) => (chunks.div_ceil(BLOCK_CHUNKS), THREADS),
    };
    let launch = Launch::new([blocks as u32, own.splits as u32, 1], block);
    // SAFETY: the lengths of everything that `args` points to were checked against its shape; chunks are those of the
    // list.
    unsafe { device.launch(kernel, launch, &args)? };
    sum_places(device, partial, list.places.view(), own.splits, dw)
}
