//! The one error type. Each message says what failed, where, what was expected, what was found, and what to do.

use std::path::{Path, PathBuf};

/// Everything that can go wrong in dilt.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request itself cannot be carried out: options, model settings, data settings. Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// A tensor does not fit the operation it is given to.
    #[error("{op}: {what}: expected {expected}, got {got}")]
    Shape {
        /// Operation that refused.
        op: &'static str,
        /// Argument that does not fit.
        what: String,
        /// What the operation needs.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// A file cannot be read, written or understood.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// The device cannot be opened, or failed.
    #[error("{0}")]
    Device(String),
    /// A kernel could not be launched, or failed.
    #[error("kernel {kernel}, grid {grid:?}, block {block:?}: {problem}\n  arguments: {args}")]
    Launch {
        /// Name in `kernels/`.
        kernel: &'static str,
        /// Blocks in x, y, z.
        grid: [u32; 3],
        /// Threads in x, y, z.
        block: [u32; 3],
        /// The kernel's argument struct: pointers and sizes.
        args: String,
        /// What went wrong.
        problem: String,
    },
    /// A run stopped: training diverged, its folder is in use, its settings changed.
    #[error("{0}")]
    Run(String),
}

/// `Result` with dilt's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The process's exit code for this error: 2 for a request that cannot be carried out, else 1.
    pub fn exit_code(&self) -> i32 {
        if matches!(self, Error::Usage(_)) { 2 } else { 1 }
    }

    /// A [`Error::File`] for `path`.
    pub fn file(path: impl AsRef<Path>, problem: impl std::fmt::Display) -> Self {
        Error::File { path: path.as_ref().to_path_buf(), problem: problem.to_string() }
    }
}
