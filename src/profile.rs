//! Named ranges of time for a profiler: stages, epochs, steps, layers and kernel launches, one inside the other, as NVIDIA's
//! NVTX shows them in Nsight Systems (docs/profiling.md).
//!
//! They exist in builds with the feature `nvtx`, and do nothing there while no profiler is attached; in other builds a
//! range is nothing at all, and its name is not even formatted.

use std::fmt::Display;
use std::marker::PhantomData;
use std::sync::MutexGuard;

/// A range that lasts until this is dropped, on the thread that opened it: NVTX ends the innermost range of a thread.
#[must_use = "a range lasts until it is dropped"]
pub struct Range(PhantomData<MutexGuard<'static, ()>>);

/// Opens a range inside those that are open on this thread. Ranges end in the opposite order.
pub fn range(name: impl Display) -> Range {
    #[cfg(feature = "nvtx")]
    nvtx::range_push!("{name}");
    #[cfg(not(feature = "nvtx"))]
    let _ = name;
    Range(PhantomData)
}

impl Drop for Range {
    fn drop(&mut self) {
        #[cfg(feature = "nvtx")]
        nvtx::range_pop!();
    }
}
