//! All integration tests, in one binary: one link, and one thing to carry to a machine with a GPU.

mod augment;
mod conv;
mod data;
mod device;
mod doctor;
#[cfg(dilt_sanitize)]
mod faults;
mod loss;
mod mask;
mod norm;
mod optimizer;
mod partition;
mod pointwise;
mod pool;
mod prune;
mod step;
mod support;
mod training;
mod weights;
