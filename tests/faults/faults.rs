//! Launches the kernels of `faults.cu`. Part of the library in sanitizer builds alone.
#![allow(missing_docs)]

use super::{check_len, layouts_of};
use crate::device::{Device, Kernel, Launch, Ptr, SliceMut, kernel_args};
use crate::error::Result;

kernel_args! {
    struct FaultArgs { data: Ptr<u32>, count: i32 }
}
layouts_of!(FaultArgs);

/// Threads of a block, as `faults.cu` has them.
const THREADS: u32 = 64;
/// Elements that every kernel may use.
pub const COUNT: usize = 40;

/// Launches four blocks of a kernel on [`COUNT`] elements.
pub fn launch(device: &Device, kernel: &'static str, data: SliceMut<u32>) -> Result<()> {
    check_len("fault", "data", data.len(), COUNT)?;
    let args = FaultArgs { data: data.ptr(), count: COUNT as i32 };
    // SAFETY: none, for the faulty kernels: that is what the sanitizers must report.
    unsafe { device.launch(&Kernel::new(kernel), Launch::new([4, 1, 1], THREADS), &args) }
}
