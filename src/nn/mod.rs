//! Networks: what they are made of, their memory and passes, and the files their weights live in.
//!
//! [`config`] reads a model file, `resnet` and `vit` turn it into a [`model::Model`] (a list of layers), [`liveness`] says
//! which features matter under masks, [`compact`] leaves out the others, [`ways`] are those to multiply with kept weights,
//! among which [`paths`] choose, [`plan`] finds the tensors a place in one arena, [`layout`] is all of that together,
//! `fusion` says which work layers do for their neighbours, [`traffic`] counts what a step computes and moves, [`network`]
//! holds and `passes` runs it, [`init`] draws its weights, [`weights`] reads and writes them, [`names`] matches the names of a
//! file to those of a model, [`tensors`] reads files that are no weights, [`snapshot`] keeps the state between two steps,
//! [`positions`] fits position embeddings to images of another size.

pub(crate) mod atomic;
pub mod compact;
pub mod config;
mod container;
mod fusion;
pub mod init;
pub mod layout;
pub mod liveness;
pub mod model;
pub mod names;
pub mod network;
mod passes;
pub mod paths;
pub mod plan;
pub mod positions;
mod resnet;
pub mod roofline;
mod shards;
pub mod snapshot;
pub mod tensors;
pub mod traffic;
mod vit;
pub mod ways;
pub mod weights;
