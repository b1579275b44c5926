//! The gradient of a bias (`kernels/bias.cu`), where no weight gradient makes it
//! ([`conv_weight_gradient`](super::conv::conv_weight_gradient)).

use super::{check_len, layouts_of};
use crate::device::{Device, Launch, Ptr, Real, RealKernel, Reals, SliceMut, kernel_args, real_kernel};
use crate::error::Result;

kernel_args! {
    struct BiasGradientArgs { dy: Ptr<Real>, dbias: Ptr<f32>, row: i64 }
}
layouts_of!(BiasGradientArgs);

static BIAS_GRADIENT: RealKernel<BiasGradientArgs> = real_kernel!("bias_gradient");

const THREADS: u32 = 256;

/// The sum of each row of dy, `[k, columns]`: dbias `[k]`, overwritten. Padded columns of dy are zero.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if dy does not have a whole number of columns, a multiple of 8, for each element
/// of dbias.
pub fn bias_gradient(device: &Device, dy: Reals, dbias: SliceMut<f32>) -> Result<()> {
    let rows = dbias.len();
    let row = dy.len() / rows.max(1);
    check_len("bias_gradient", "dy", dy.len(), rows * (row / 8 * 8))?;
    let args = BiasGradientArgs { dy: dy.ptr(), dbias: dbias.ptr(), row: row as i64 };
    let launch = Launch::new([rows as u32, 1, 1], device.threads(THREADS));
    // SAFETY: the lengths of everything that `args` points to were checked.
    unsafe { device.launch(BIAS_GRADIENT.of(dy.precision()), launch, &args) }
}
