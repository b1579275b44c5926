//! Linear layers and 1x1 convolutions on the host (`kernels/linear.cu`), behind the functions of [`conv`](super::conv).

use super::epilogue::Bias;
use super::{Columns, layouts_of};
use crate::device::{Device, Kernel, Launch, Ptr, Slice, SliceMut, kernel_args};
use crate::error::Result;

kernel_args! {
    struct LinearArgs {
        w: Ptr<f32>, from: Ptr<f32>, bias: Ptr<f32>, count: Ptr<u32>, to: Ptr<f32>, row_stride: i64, step_stride: i64,
        rows: i32, depth: i32, n: i32, accumulate: i32, columns: Columns,
    }
    struct LinearWeightGradientArgs {
        x: Ptr<f32>, dy: Ptr<f32>, partial: Ptr<f32>, c: i32, k: i32, n: i32, splits: i32,
    }
}
layouts_of!(LinearArgs, LinearWeightGradientArgs);

static PRODUCT: Kernel<LinearArgs> = Kernel::new("linear_product_direct_f32");
static WEIGHT_GRADIENT: Kernel<LinearWeightGradientArgs> = Kernel::new("linear_weight_gradient_direct_f32");

/// What a block of `kernels/linear.cu` owns.
const ROW_GROUP: usize = 256;
const GROUP: usize = 64;
/// Columns of a split of a weight gradient, at least, and the blocks that all splits aim for.
const SPLIT_COLUMNS: usize = 512;
const GRADIENT_BLOCKS: usize = 64;

/// Input features, output features and columns, all below 2^30: x `[c, n]`, w `[k, c]`, y `[k, n]`.
#[derive(Clone, Copy)]
pub(super) struct LinearShape {
    pub c: usize,
    pub k: usize,
    pub n: usize,
}

impl LinearShape {
    /// Splits of the weight gradient: a function of the shape alone.
    pub fn splits(&self) -> usize {
        let blocks = self.c.div_ceil(GROUP) * self.k.div_ceil(ROW_GROUP);
        (self.n / SPLIT_COLUMNS).min(GRADIENT_BLOCKS / blocks).max(1)
    }
}

fn product(device: &Device, args: &LinearArgs) -> Result<()> {
    let (rows, n) = (args.rows as usize, args.n as usize);
    let grid = [n.div_ceil(GROUP) as u32, rows.div_ceil(ROW_GROUP) as u32, 1];
    // SAFETY: the callers' callers have checked the lengths of everything that `args` points to.
    unsafe { device.launch(&PRODUCT, Launch::new(grid, 1), args) }
}

/// [`conv_forward`](super::conv::conv_forward), its arguments checked.
pub(super) fn forward(
    device: &Device,
    shape: LinearShape,
    x: Slice<f32>,
    w: Slice<f32>,
    bias: Option<Bias>,
    y: SliceMut<f32>,
) -> Result<()> {
    let LinearShape { c, k, n } = shape;
    let args = LinearArgs {
        w: w.ptr(),
        from: x.ptr(),
        bias: bias.map_or(Ptr::null(), |b| b.bias.ptr()),
        count: bias.map_or(Ptr::null(), |b| b.count.ptr()),
        to: y.ptr(),
        row_stride: c as i64,
        step_stride: 1,
        rows: k as i32,
        depth: c as i32,
        n: n as i32,
        accumulate: 0,
        columns: bias.map_or_else(|| Columns::samples(n), |b| Ok(b.columns))?,
    };
    product(device, &args)
}

/// [`conv_input_gradient`](super::conv::conv_input_gradient), its arguments checked.
pub(super) fn input_gradient(
    device: &Device,
    shape: LinearShape,
    dy: Slice<f32>,
    w: Slice<f32>,
    accumulate: bool,
    dx: SliceMut<f32>,
) -> Result<()> {
    let LinearShape { c, k, n } = shape;
    let args = LinearArgs {
        w: w.ptr(),
        from: dy.ptr(),
        bias: Ptr::null(),
        count: Ptr::null(),
        to: dx.ptr(),
        row_stride: 1,
        step_stride: c as i64,
        rows: c as i32,
        depth: k as i32,
        n: n as i32,
        accumulate: i32::from(accumulate),
        columns: Columns::samples(n)?,
    };
    product(device, &args)
}

/// The splits of [`conv_weight_gradient`](super::conv::conv_weight_gradient), `[splits, k, c]`, its arguments checked.
pub(super) fn weight_gradient(
    device: &Device,
    shape: LinearShape,
    x: Slice<f32>,
    dy: Slice<f32>,
    partial: Ptr<f32>,
) -> Result<()> {
    let LinearShape { c, k, n } = shape;
    let splits = shape.splits();
    let grid = [c.div_ceil(GROUP), k.div_ceil(ROW_GROUP), splits].map(|blocks| blocks as u32);
    let [c, k, n, splits] = [c, k, n, splits].map(|x| x as i32);
    let args = LinearWeightGradientArgs { x: x.ptr(), dy: dy.ptr(), partial, c, k, n, splits };
    // SAFETY: the caller has checked the lengths of everything that `args` points to.
    unsafe { device.launch(&WEIGHT_GRADIENT, Launch::new(grid, 1), &args) }
}
