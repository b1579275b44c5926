//! All integration tests, in one binary: one link, and one thing to carry to a machine with a GPU.

mod conv;
mod data;
mod device;
mod loss;
mod mask;
mod norm;
mod partition;
mod pointwise;
mod pool;
mod support;
mod weights;
