//! dilt: lottery tickets of ResNets on handwritten CUDA kernels, on a GPU or a CPU.
pub mod error;

pub use error::{Error, Result};
