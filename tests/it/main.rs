//! All integration tests, in one binary: one link, and one thing to carry to a machine with a GPU.

mod agreement;
mod attention;
mod augment;
mod bad_input;
mod cifar;
mod cli;
mod command;
mod conv;
mod data;
mod device;
mod doctor;
mod export;
#[cfg(dilt_sanitize)]
mod faults;
mod feed;
mod folder;
mod idx;
mod image;
mod loss;
mod mask;
mod names;
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
mod tokens;
mod training;
mod transfer;
mod weights;
