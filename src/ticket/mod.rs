//! Tickets: how they are found, what they are compared with, and the run folder that holds them.
//!
//! [`settings`] says what a search does; [`experiment`] trains, prunes and scores within a [`run`] folder, with
//! checkpoints by [`saver`]; [`lth`], [`parts`] (DiLT and COLT) and [`controls`] decide masks; [`find`], [`assemble`] and
//! [`transfer`] put them together into [`rows`], which become a [`result`]. Trainings that do not need each other share the
//! device by [`streams`]. [`select`] is the exact choice by magnitude that all share; [`heads`] counts what masks keep of
//! attention heads; [`similarity`] compares the layers of a search's tickets; [`report`] is the page of a run.

pub mod assemble;
pub mod controls;
pub mod experiment;
pub mod find;
pub mod heads;
pub mod lth;
pub mod parts;
pub mod report;
pub mod result;
pub mod rows;
pub mod run;
pub mod saver;
pub mod select;
pub mod settings;
pub mod similarity;
pub mod streams;
pub mod structure;
pub mod transfer;
