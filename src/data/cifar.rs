//! CIFAR-10 and CIFAR-100 in their binary version.
//!
//! Source: A. Krizhevsky (2009), *Learning Multiple Layers of Features from Tiny Images*. A file is records without
//! a header: one label of CIFAR-10, or the coarse and the fine label of CIFAR-100, a byte each, then an image of bytes
//! `[3, 32, 32]`. Records stay in the order of the files.

use std::path::Path;

use super::{DataSet, Split};
use crate::error::{Error, Result};

const SHAPE: [usize; 3] = [3, 32, 32];
const PIXELS: usize = 3 * 32 * 32;
const SCALE: f32 = 255.0;
/// Longest file that is read, in bytes; the published ones have at most 154 million.
const MOST_BYTES: u64 = 1 << 30;

/// One of the data sets, and which of its labels.
#[derive(Debug)]
pub struct Format {
    /// As `--data` names it.
    pub name: &'static str,
    /// Number of classes of each label byte of a record.
    pub classes: &'static [usize],
    /// Which of these labels is the example's.
    label: usize,
    /// The folder in the published archive.
    folder: &'static str,
    train: &'static [&'static str],
    test: &'static str,
}

/// CIFAR-10.
pub const CIFAR10: Format = Format {
    name: "cifar10",
    classes: &[10],
    label: 0,
    folder: "cifar-10-batches-bin",
    train: &["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"],
    test: "test_batch.bin",
};

/// CIFAR-100 with its 100 fine labels.
pub const CIFAR100: Format = Format {
    name: "cifar100",
    classes: &[20, 100],
    label: 1,
    folder: "cifar-100-binary",
    train: &["train.bin"],
    test: "test.bin",
};

/// CIFAR-100 with its 20 coarse labels.
pub const CIFAR100_COARSE: Format = Format { name: "cifar100-coarse", label: 0, ..CIFAR100 };

/// Reads the bytes of one file: images `[n, 3, 32, 32]`, and the format's label of each. `path` names it in errors.
///
/// # Errors
/// [`Error::File`]: no or not a whole number of records, a label out of range; with record and byte, from 0.
pub fn parse(bytes: &[u8], format: &Format, path: &Path) -> Result<(Vec<u8>, Vec<u32>)> {
    let record = format.classes.len() + PIXELS;
    if bytes.is_empty() || !bytes.len().is_multiple_of(record) {
        let (whole, length) = (bytes.len() / record, bytes.len());
        return Err(Error::file(
            path,
            format!(
                "expected whole records of {record} bytes ({} of labels, {PIXELS} of pixels), got {length} bytes: record \
                 {whole}, at byte {}, is cut short; get the file anew",
                format.classes.len(),
                whole * record
            ),
        ));
    }
    let mut images = Vec::with_capacity(bytes.len() / record * PIXELS);
    let mut labels = Vec::with_capacity(bytes.len() / record);
    for (i, bytes) in bytes.chunks_exact(record).enumerate() {
        let (all, image) = bytes.split_at(format.classes.len());
        for (at, (&label, classes)) in all.iter().zip(format.classes).enumerate() {
            if usize::from(label) >= *classes {
                return Err(Error::file(
                    path,
                    format!(
                        "record {i}, byte {}: expected a label below {classes}, got {label}; is it the binary version of \
                         {}?",
                        i * record + at,
                        format.name
                    ),
                ));
            }
        }
        labels.push(all[format.label].into());
        images.extend_from_slice(image);
    }
    Ok((images, labels))
}

/// The data set in a folder, or in the subfolder that its archive has.
pub(super) fn load(folder: &Path, format: &Format) -> Result<DataSet> {
    let inner = folder.join(format.folder);
    let folder = if inner.is_dir() { inner.as_path() } else { folder };
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    for name in format.train {
        let (more_images, more_labels) = read(folder, name, format)?;
        images.extend_from_slice(&more_images);
        labels.extend(more_labels);
    }
    let test = read(folder, format.test, format)?;
    let classes = format.classes[format.label];
    Ok(DataSet::of_bytes(format.name, SHAPE, classes, SCALE, (images, labels), test))
}

fn read(folder: &Path, name: &str, format: &Format) -> Result<Split> {
    let path = folder.join(name);
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::file(folder, format!("has no {name}; {}", advice(folder, name, format))),
        _ => Error::file(&path, format!("cannot be read: {error}")),
    };
    let length = std::fs::metadata(&path).map_err(failed)?.len();
    if length > MOST_BYTES {
        return Err(Error::file(&path, format!("expected at most {MOST_BYTES} bytes, got {length}")));
    }
    parse(&std::fs::read(&path).map_err(failed)?, format, &path)
}

/// What to do about a file that is not there.
fn advice(folder: &Path, name: &str, format: &Format) -> String {
    let archive = format.folder.replace("-batches-bin", "-binary") + ".tar";
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    let is_packed = |other: &&String| other.starts_with(&format!("{name}.")) || other.starts_with(&archive);
    match names.iter().find(is_packed) {
        Some(packed) => format!("unpack {packed} first"),
        None => {
            format!("expected the binary version of {}: {} and {}", format.name, format.train.join(", "), format.test)
        }
    }
}
