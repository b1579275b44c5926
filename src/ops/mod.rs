//! Operations: each checks its arguments, fills a kernel's argument struct and launches it. One file per kernel file,
//! same stem. Operations never allocate, never synchronize, never choose a stream; outputs are `SliceMut`, last.

pub mod augment;
pub mod conv;
#[cfg(dilt_sanitize)]
#[doc(hidden)]
#[path = "../../tests/faults/faults.rs"]
pub mod faults;
pub mod loss;
pub mod norm;
pub mod optimizer;
pub mod pointwise;
pub mod pool;
pub mod prune;
pub mod step;

use crate::device::{Device, Launch, Layout};
use crate::error::{Error, Result};

/// Samples of a row are padded to a multiple of this.
pub const SAMPLE_ALIGNMENT: usize = 8;

/// The Rust side of every argument struct, nested ones included.
pub fn layouts() -> Vec<Layout> {
    let files = [
        augment::layouts(),
        conv::layouts(),
        #[cfg(dilt_sanitize)]
        faults::layouts(),
        loss::layouts(),
        norm::layouts(),
        optimizer::layouts(),
        pointwise::layouts(),
        pool::layouts(),
        prune::layouts(),
        step::layouts(),
    ];
    files.concat()
}

/// Refuses a tensor whose number of elements is not what the operation needs.
pub(crate) fn check_len(op: &'static str, tensor: &str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    let what = format!("number of elements of {tensor}");
    Err(Error::Shape { op, what, expected: expected.to_string(), got: got.to_string() })
}

/// The launch of an elementwise kernel over `row` elements of each channel: blocks for them in x, channels in y.
pub(crate) fn per_channel(device: &Device, row: usize, channels: i32) -> Launch {
    let Launch { grid: [blocks, ..], block } = device.elementwise(row);
    Launch::new([blocks, channels as u32, 1], block)
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
