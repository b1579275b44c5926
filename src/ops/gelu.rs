//! The exact GELU, `x Phi(x)` (`kernels/gelu.cu`; Hendrycks and Gimpel 2016). Products on tensor cores have it in
//! their epilogue ([`epilogue`](super::epilogue)).

use super::{check_elementwise, check_precision, layouts_of};
use crate::device::{Device, Ptr, Real, RealKernel, Reals, RealsMut, kernel_args, real_kernel};
use crate::error::Result;

kernel_args! {
    struct GeluArgs { x: Ptr<Real>, to: Ptr<Real>, length: i64 }
}
layouts_of!(GeluArgs);

static FORWARD: RealKernel<GeluArgs> = real_kernel!("gelu_forward");
static BACKWARD: RealKernel<GeluArgs> = real_kernel!("gelu_backward");

/// `y = x Phi(x)`, Phi being the distribution of the standard normal. x and y have the same number of elements, a
/// multiple of 8; y is overwritten, with 0 where x is 0.
///
/// # Errors
/// [`Error::Shape`](crate::error::Error::Shape) names the argument, what was expected and what it got.
pub fn gelu_forward(device: &Device, x: Reals, y: RealsMut) -> Result<()> {
    check_elementwise("gelu_forward", &[("x", x.len()), ("y", y.len())])?;
    let precision = check_precision("gelu_forward", x, &[("y", y.view())])?;
    let args = GeluArgs { x: x.ptr(), to: y.ptr(), length: x.len() as i64 };
    // SAFETY: the lengths of everything that `args` points to were checked to be `length`.
    unsafe { device.launch(FORWARD.of(precision), device.elementwise(x.len()), &args) }
}

/// `dx = dy (Phi(x) + x phi(x))`, phi being the density of the standard normal. All have the same number of elements, a
/// multiple of 8; dx is written over dy.
///
/// # Errors
/// [`Error::Shape`](crate::error::Error::Shape) names the argument, what was expected and what it got.
pub fn gelu_backward(device: &Device, x: Reals, dy: RealsMut) -> Result<()> {
    check_elementwise("gelu_backward", &[("x", x.len()), ("dy", dy.len())])?;
    let precision = check_precision("gelu_backward", x, &[("dy", dy.view())])?;
    let args = GeluArgs { x: x.ptr(), to: dy.ptr(), length: x.len() as i64 };
    // SAFETY: the lengths of everything that `args` points to were checked to be `length`.
    unsafe { device.launch(BACKWARD.of(precision), device.elementwise(x.len()), &args) }
}
