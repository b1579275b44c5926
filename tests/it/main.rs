//! All integration tests, in one binary: one link, and one thing to carry to a machine with a GPU.

mod augment;
mod conv;
mod data;
mod device;
mod mask;
mod optimizer;
mod partition;
mod prune;
mod step;
mod support;
mod weights;
