//! dilt: lottery tickets of ResNets on handwritten CUDA kernels, on a GPU or a CPU.
pub mod data;
pub mod error;
pub mod mask;
pub mod nn;

pub use error::{Error, Result};
