//! The integration tests, one binary: a module for each area.
mod data;
mod mask;
mod partition;
mod weights;
