//! Safetensors files that hold other things than weights, read one tensor after the other.

use std::io::Read;
use std::path::Path;

use super::shards;
use super::weights::{floats, index};
use crate::{Error, Result};

/// A tensor of a file, in its order and shape.
pub struct Tensor {
    /// Name in the file.
    pub name: String,
    /// Sizes of its axes.
    pub shape: Vec<usize>,
    /// Its elements, row by row: F64 rounded to f32.
    pub values: Vec<f32>,
}

/// Names and shapes of the tensors of a file, or of all files of an index, in the order in which [`each`] reads them.
///
/// # Errors
/// [`Error::File`] if a file cannot be read or is damaged.
pub fn list(path: &Path) -> Result<Vec<(String, Vec<usize>)>> {
    let shards = shards::open(path)?;
    let entries = shards.into_iter().flat_map(|shard| shard.header.entries);
    Ok(entries.map(|entry| (entry.name, entry.shape)).collect())
}

/// Reads the tensors that `wanted` says yes to, and hands them to `found` one after the other.
///
/// # Errors
/// As [`list`]; [`Error::File`] with the tensor's name if it is of another type than F32, F16, BF16 and F64, or holds what
/// is NaN, infinite or too large for f32; what `found` returns.
pub fn each(path: &Path, wanted: impl Fn(&str) -> bool, mut found: impl FnMut(Tensor) -> Result<()>) -> Result<()> {
    for mut shard in shards::open(path)? {
        let wrong = |problem: String| Error::file(&shard.path, problem);
        for entry in shard.header.entries {
            let mut bytes = vec![0; entry.bytes() as usize]; // at most the file's size: the header has been checked
            let read = shard.reader.read_exact(&mut bytes);
            read.map_err(|error| wrong(format!("cannot read tensor {:?}: {error}", entry.name)))?;
            if !wanted(&entry.name) {
                continue;
            }
            let values = floats(&entry, &bytes).map_err(wrong)?;
            if let Some(i) = values.iter().position(|value| !value.is_finite()) {
                return Err(wrong(format!(
                    "tensor {:?}: expected finite values that fit f32, got {} at {:?}; leave the tensor out, or mend it",
                    entry.name,
                    values[i],
                    index(&entry.shape, i)
                )));
            }
            found(Tensor { name: entry.name, shape: entry.shape, values })?;
        }
    }
    Ok(())
}
