//! Batch norm, relu and the max pool that alone reads their result, in the same pass (`kernels/norm_pool.cu`).

use super::norm::{NormGradients, NormShape, Normalised, NormalisedArgs};
use super::pool::PoolShape;
use super::row_map::RowMap;
use super::{check_len, check_precision, layouts_of, per_channel};
use crate::device::{Device, Ptr, Real, RealKernel, Reals, RealsMut, Slice, SliceMut, kernel_args, real_kernel};
use crate::error::{Error, Result};

kernel_args! {
    struct NormPoolForwardArgs {
        norm: NormalisedArgs, index: Ptr<u8>, y: Ptr<Real>, count: Ptr<u32>, source: Ptr<u32>, shape: PoolShape, relu: i32,
    }
    struct NormPoolBackwardArgs {
        norm: NormalisedArgs, dy: Ptr<Real>, index: Ptr<u8>, partial: Ptr<f32>, dgamma: Ptr<f32>, dbeta: Ptr<f32>,
        dx: Ptr<Real>, count: Ptr<u32>, target: Ptr<u32>, shape: NormShape, pool: PoolShape, relu: i32,
    }
}
layouts_of!(NormPoolForwardArgs, NormPoolBackwardArgs);

static FORWARD: RealKernel<NormPoolForwardArgs> = real_kernel!("norm_pool_forward");
static BACKWARD_SUMS: RealKernel<NormPoolBackwardArgs> = real_kernel!("norm_pool_backward_sums");
static BACKWARD: RealKernel<NormPoolBackwardArgs> = real_kernel!("norm_pool_backward");

/// A batch norm with the batch's statistics whose result a max pool alone reads.
#[derive(Clone, Copy)]
pub struct NormPool<'a> {
    /// What it reads, and how it changes that.
    pub norm: Normalised<'a>,
    /// Whether negative results become zero.
    pub relu: bool,
    /// Which row of the pool each row of x is, where the pool has more of them; those are zero.
    pub map: Option<&'a RowMap>,
    /// Number of true samples, `[1]`.
    pub count: Slice<'a, u32>,
}

impl NormPool<'_> {
    /// Checks it against the shapes of norm and pool, what the pool writes, and the index.
    fn check(&self, op: &'static str, shape: &NormShape, pool: &PoolShape, y: Reals, index: usize) -> Result<()> {
        let rows = self.map.map_or(shape.features(), RowMap::outputs);
        let [expected, got] = [(rows, shape.row()), (pool.channels(), pool.input_row())];
        if got != expected {
            let show = |(channels, [pixels, n]): (usize, [usize; 2])| format!("{channels} x {pixels} x {n}");
            let what = "what the pool reads".into();
            return Err(Error::Shape { op, what, expected: show(expected), got: show(got) });
        }
        self.norm.check(op, shape, self.map, pool.input_len())?;
        check_len(op, "y or dy", y.len(), pool.output_len())?;
        check_len(op, "index", index, pool.output_len())?;
        check_len(op, "count", self.count.len(), 1)?;
        check_precision(op, y, &[("x of the norm", self.norm.x)]).map(|_| ())
    }
}

/// Forward: y `[c, p, q, n]`, the pool of `[relu](gamma (x - mean) invstd + beta)`, and index of its size, both overwritten.
/// `index` says which tap of each window holds its first maximum.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn norm_pool_forward(
    device: &Device,
    shape: &NormShape,
    pool: &PoolShape,
    input: NormPool,
    index: SliceMut<u8>,
    y: RealsMut,
) -> Result<()> {
    input.check("norm_pool_forward", shape, pool, y.view(), index.len())?;
    let args = NormPoolForwardArgs {
        norm: input.norm.args(),
        index: index.ptr(),
        y: y.ptr(),
        count: input.count.ptr(),
        source: input.map.map_or(Ptr::null(), RowMap::source),
        shape: *pool,
        relu: i32::from(input.relu),
    };
    let launch = per_channel(device, pool.output_len() / pool.channels(), pool.channels() as i32);
    // SAFETY: the lengths of everything that `args` points to were checked against its shapes; outputs are exclusive.
    unsafe { device.launch(FORWARD.of(y.precision()), launch, &args) }
}

/// Backward: the gradients of the norm, overwritten, padded samples with zeros, of dy and index `[c, p, q, n]`. `scratch` has
/// [`NormShape::scratch_len`] elements or more.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
#[expect(clippy::too_many_arguments, reason = "inputs and outputs are grouped already")]
pub fn norm_pool_backward(
    device: &Device,
    shape: &NormShape,
    pool: &PoolShape,
    input: NormPool,
    dy: Reals,
    index: Slice<u8>,
    scratch: SliceMut<f32>,
    gradients: NormGradients,
) -> Result<()> {
    let op = "norm_pool_backward";
    let NormGradients { dgamma, dbeta, dx } = gradients;
    input.check(op, shape, pool, dy, index.len())?;
    shape.check(op, None, [&[("dx", dx.len())], &[], &[("dgamma", dgamma.len()), ("dbeta", dbeta.len())]])?;
    check_precision(op, dy, &[("dx", dx.view())])?;
    shape.check_scratch(op, &scratch, 1)?;
    let args = NormPoolBackwardArgs {
        norm: input.norm.args(),
        dy: dy.ptr(),
        index: index.ptr(),
        partial: scratch.ptr(),
        dgamma: dgamma.ptr(),
        dbeta: dbeta.ptr(),
        dx: dx.ptr(),
        count: input.count.ptr(),
        target: input.map.map_or(Ptr::null(), RowMap::target),
        shape: *shape,
        pool: *pool,
        relu: i32::from(input.relu),
    };
    let launch = shape.launch(device, shape.features());
    // SAFETY: as above.
    unsafe {
        device.launch(BACKWARD_SUMS.of(dy.precision()), launch, &args)?;
        device.launch(BACKWARD.of(dy.precision()), launch, &args)
    }
}
