//! Networks: what they are made of, and the files their weights live in.
mod atomic;
mod container;
pub mod weights;
