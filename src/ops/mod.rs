//! Operations: each checks its arguments, fills a kernel's argument struct and launches it. One file per kernel file,
//! same stem. Operations never allocate, never synchronize, never choose a stream; outputs are `SliceMut`, last.

pub mod augment;
pub mod conv;
pub mod optimizer;
pub mod prune;
pub mod step;

use crate::device::Layout;
use crate::error::{Error, Result};

/// Samples of a row are padded to a multiple of this.
pub const SAMPLE_ALIGNMENT: usize = 8;

/// The Rust side of every argument struct, nested ones included.
pub fn layouts() -> Vec<Layout> {
    [augment::layouts(), conv::layouts(), optimizer::layouts(), prune::layouts(), step::layouts()].concat()
}

/// Refuses a tensor whose number of elements is not what the operation needs.
pub(crate) fn check_len(op: &'static str, tensor: &str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    let what = format!("number of elements of {tensor}");
    Err(Error::Shape { op, what, expected: expected.to_string(), got: got.to_string() })
}

/// The layouts of some argument structs.
macro_rules! layouts_of {
    ($($name:ident),* $(,)?) => {
        /// The argument structs of this file's kernels.
        pub(crate) fn layouts() -> Vec<$crate::device::Layout> {
            vec![$(<$name as $crate::device::KernelArgs>::layout()),*]
        }
    };
}
pub(crate) use layouts_of;
