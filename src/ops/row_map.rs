//! Which feature row of one tensor is which of another, where tensors have other features left in them.

use crate::device::{Buffer, Device, Ptr};
use crate::error::{Error, Result};

/// Stands for no row.
const NONE: u32 = u32::MAX;

/// A map between the feature rows of what an operation reads, x, and what it writes, y.
pub struct RowMap {
    /// Of each row of y, that of x, or [`NONE`].
    source: Buffer<u32>,
    /// Of each row of x, that of y, or [`NONE`].
    target: Buffer<u32>,
    /// Whether every row of x has one of y.
    covers: bool,
}

impl RowMap {
    /// The map in which row `y` of the output is row `source[y]` of `rows`, or none.
    ///
    /// # Errors
    /// [`Error::Shape`] if a row is none of x, or is that of two rows; [`Error::Device`] when memory runs out.
    pub fn new(device: &Device, rows: usize, source: &[Option<usize>]) -> Result<Self> {
        let mut target = vec![NONE; rows];
        for (y, x) in source.iter().enumerate().filter_map(|(y, x)| Some((y, (*x)?))) {
            if target.get(x) != Some(&NONE) {
                let (what, expected) = (format!("source of row {y}"), format!("one of {rows} rows, each once"));
                return Err(Error::Shape { op: "row map", what, expected, got: x.to_string() });
            }
            target[x] = y as u32;
        }
        let sources: Vec<u32> = source.iter().map(|x| x.map_or(NONE, |x| x as u32)).collect();
        let covers = !target.contains(&NONE);
        Ok(RowMap { source: device.upload(&sources)?, target: device.upload(&target)?, covers })
    }

    /// Rows of y.
    pub fn outputs(&self) -> usize {
        self.source.len()
    }

    /// Rows of x.
    pub fn inputs(&self) -> usize {
        self.target.len()
    }

    /// Whether every row of x has one of y.
    pub fn covers(&self) -> bool {
        self.covers
    }

    pub(crate) fn source(&self) -> Ptr<u32> {
        self.source.view().ptr()
    }

    pub(crate) fn target(&self) -> Ptr<u32> {
        self.target.view().ptr()
    }
}
