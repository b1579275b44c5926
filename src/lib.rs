//! dilt: lottery tickets of ResNets on handwritten CUDA kernels, on a GPU or a CPU.
#![warn(missing_docs)]

pub mod data;
pub mod device;
pub mod error;
pub mod mask;
pub mod nn;
pub mod ops;
pub mod profile;
pub mod report;
pub mod selftest;
pub mod similarity;
pub mod ticket;
pub mod train;

pub use error::{Error, Result};
