//! All integration tests, in one binary: one link, and one thing to carry to a machine with a GPU.

mod augment;
mod bad_input;
mod cifar;
mod cli;
mod command;
mod conv;
mod data;
mod device;
mod doctor;
#[cfg(dilt_sanitize)]
mod faults;
mod folder;
mod idx;
mod image;
mod loss;
mod mask;
mod network;
mod norm;
mod optimizer;
mod partition;
mod pointwise;
mod pool;
mod prune;
mod resume;
mod step;
mod support;
mod tickets;
mod training;
mod weights;
