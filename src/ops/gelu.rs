//! The exact GELU, `x Phi(x)` (`kernels/gelu.cu`; Hendrycks and Gimpel 2016).

use super::{check_elementwise, layouts_of};
use crate::device::{Device, Kernel, Ptr, Slice, SliceMut, kernel_args};
use crate::error::Result;

kernel_args! {
    struct GeluArgs { x: Ptr<f32>, dy: Ptr<f32>, to: Ptr<f32>, length: i64 }
}
layouts_of!(GeluArgs);

static FORWARD: Kernel<GeluArgs> = Kernel::new("gelu_forward_f32");
static BACKWARD: Kernel<GeluArgs> = Kernel::new("gelu_backward_f32");

/// `y = x Phi(x)`, Phi being the distribution of the standard normal. x and y have the same number of elements, a
/// multiple of 8; y is overwritten, with 0 where x is 0.
///
/// # Errors
/// [`Error::Shape`](crate::error::Error::Shape) names the argument, what was expected and what it got.
pub fn gelu_forward(device: &Device, x: Slice<f32>, y: SliceMut<f32>) -> Result<()> {
    check_elementwise("gelu_forward", &[("x", x.len()), ("y", y.len())])?;
    let args = GeluArgs { x: x.ptr(), dy: Ptr::null(), to: y.ptr(), length: x.len() as i64 };
    // SAFETY: the lengths of everything that `args` points to were checked to be `length`; dy is not read.
    unsafe { device.launch(&FORWARD, device.elementwise(x.len()), &args) }
}

/// `dx = dy (Phi(x) + x phi(x))`, phi being the density of the standard normal. All have the same number of elements, a
/// multiple of 8; dx is overwritten.
///
/// # Errors
/// [`Error::Shape`](crate::error::Error::Shape) names the argument, what was expected and what it got.
pub fn gelu_backward(device: &Device, x: Slice<f32>, dy: Slice<f32>, dx: SliceMut<f32>) -> Result<()> {
    check_elementwise("gelu_backward", &[("x", x.len()), ("dy", dy.len()), ("dx", dx.len())])?;
    let args = GeluArgs { x: x.ptr(), dy: dy.ptr(), to: dx.ptr(), length: x.len() as i64 };
    // SAFETY: the lengths of everything that `args` points to were checked to be `length`.
    unsafe { device.launch(&BACKWARD, device.elementwise(x.len()), &args) }
}
