//! Tensors as TMA copies boxes of them to shared memory (`kernels/lib/hopper.cuh`).

use super::{Backend, Device, Ptr};
use crate::error::Result;

/// A tensor of bf16 and the box of it that a copy brings, as a field of an argument struct.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
pub(crate) struct TensorMap([u64; 16]);

impl std::fmt::Debug for TensorMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("tensor map")
    }
}

impl Device {
    /// The map of a tensor of four sizes, innermost first, whose elements lie one after the other; the innermost size is a
    /// multiple of 8, and that of the box 64.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the driver refuses it.
    pub(crate) fn tensor_map<T>(&self, first: Ptr<T>, size: [usize; 4], boxed: [usize; 4]) -> Result<TensorMap> {
        let [size, boxed] = [size, boxed].map(|sizes| sizes.map(|size| size as u64));
        match &self.0.backend {
            Backend::Host(_) => {
                let words = [&[first.address()][..], &size, &boxed].concat();
                Ok(TensorMap(std::array::from_fn(|i| words.get(i).copied().unwrap_or_default())))
            }
            Backend::Cuda(cuda) => cuda.tensor_map(first.address(), size, boxed).map(TensorMap),
        }
    }
}
