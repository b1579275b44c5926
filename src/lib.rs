//! dilt: lottery tickets of ResNets on handwritten CUDA kernels, on a GPU or a CPU.
pub mod device;
pub mod error;
pub mod ops;

pub use error::{Error, Result};
