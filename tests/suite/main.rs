//! The integration tests, one binary: a module for each area.
mod mask;
mod weights;
