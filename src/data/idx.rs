//! The idx files of MNIST and Fashion-MNIST, plain or compressed with gzip.
//!
//! Source: Y. LeCun, C. Cortes, C. J. C. Burges, *The MNIST database of handwritten digits*. A file holds two zeros,
//! 8 (its values are bytes), the number of dimensions, each dimension as a big-endian 32-bit number, and the values,
//! the last dimension fastest. Images are `[n, height, width]`, labels `[n]`.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;

use super::{DataSet, Split};
use crate::error::{Error, Result};

/// Most bytes of values in a file: what a small compressed file holds may be a thousand times its size.
const MOST_BYTES: u64 = 1 << 32;
const SCALE: f32 = 255.0;

/// Reads an idx file of bytes: its dimensions, and its values. `path` names it in errors.
///
/// The header is believed only as far as bytes follow: memory grows as they are read.
///
/// # Errors
/// [`Error::File`], with the position: another number of dimensions or type, sizes of 0 or of more than 4 GiB
/// together, fewer or more bytes than the header says, damaged compression.
pub fn read<const DIMENSIONS: usize>(mut from: impl BufRead, path: &Path) -> Result<([usize; DIMENSIONS], Vec<u8>)> {
    let start = from.fill_buf().map_err(|error| Error::file(path, format!("cannot be read: {error}")))?;
    if start.starts_with(&[0x1f, 0x8b]) {
        values(MultiGzDecoder::new(from), path, " of what is compressed in it")
    } else {
        values(from, path, "")
    }
}

/// The same of bytes that are not compressed; `of` says what positions count.
fn values<const DIMENSIONS: usize>(
    mut from: impl Read,
    path: &Path,
    of: &str,
) -> Result<([usize; DIMENSIONS], Vec<u8>)> {
    let problem = |problem: String| Error::file(path, format!("{problem}; get the file anew"));
    let mut bytes = Vec::new();
    let mut read_until =
        |end: usize, bytes: &mut Vec<u8>| match from.by_ref().take((end - bytes.len()) as u64).read_to_end(bytes) {
            Err(error) => Err(problem(format!("damaged at byte {}{of}: {error}", bytes.len()))),
            Ok(_) => Ok(bytes.len() == end),
        };
    let header = 4 + 4 * DIMENSIONS;
    let is_long_enough = read_until(header, &mut bytes)?;
    let magic = [0, 0, 8, DIMENSIONS as u8];
    if !bytes.starts_with(&magic) {
        return Err(problem(format!(
            "expected an idx file of bytes with {DIMENSIONS} dimensions, which begins with {magic:02x?}, got {:02x?}",
            &bytes[..bytes.len().min(4)]
        )));
    }
    if !is_long_enough {
        return Err(problem(format!("cut short: expected a header of {header} bytes{of}, got {}", bytes.len())));
    }
    let sizes: Vec<u32> = bytes[4..].as_chunks().0.iter().map(|size| u32::from_be_bytes(*size)).collect();
    let total = sizes.iter().try_fold(1u64, |product, &size| product.checked_mul(size.into()));
    let Some(total @ 1..=MOST_BYTES) = total else {
        return Err(problem(format!("its header says {sizes:?}: expected from 1 to {MOST_BYTES} values")));
    };
    let end = header + total as usize;
    if !read_until(end, &mut bytes)? {
        let got = bytes.len();
        return Err(problem(format!("cut short: its header says {sizes:?}, so expected {end} bytes{of}, got {got}")));
    }
    if read_until(end + 1, &mut bytes)? {
        return Err(problem(format!("its header says {sizes:?}, so expected {end} bytes{of}, but more follow")));
    }
    bytes.drain(..header);
    Ok((std::array::from_fn(|i| sizes[i] as usize), bytes))
}

/// The data set in a folder, with the names that MNIST and Fashion-MNIST share; as many classes as labels need.
pub(super) fn load(folder: &Path) -> Result<DataSet> {
    let (train, [height, width]) = split(folder, "train")?;
    let (test, test_size) = split(folder, "t10k")?;
    if test_size != [height, width] {
        let sizes = format!("images of {height} x {width} to train on and of {test_size:?} to test on");
        return Err(Error::file(folder, format!("{sizes}: expected one size")));
    }
    let largest = train.1.iter().chain(&test.1).max().expect("no file is without values");
    let classes = (*largest as usize + 1).max(2);
    Ok(DataSet::of_bytes("idx", [1, height, width], classes, SCALE, train, test))
}

/// Images and labels of one split, and height and width of the images.
fn split(folder: &Path, split: &str) -> Result<(Split, [usize; 2])> {
    let (path, file) = open(folder, &format!("{split}-images-idx3-ubyte"))?;
    let ([count, height, width], images) = read(file, &path)?;
    let (path, file) = open(folder, &format!("{split}-labels-idx1-ubyte"))?;
    let ([labels], values) = read(file, &path)?;
    if labels != count {
        return Err(Error::file(path, format!("{labels} labels of {count} images: expected as many; get both anew")));
    }
    Ok(((images, values.into_iter().map(u32::from).collect()), [height, width]))
}

/// The file of this name, with a `-` or a `.` before `idx`, plain or compressed.
fn open(folder: &Path, name: &str) -> Result<(PathBuf, BufReader<File>)> {
    let names = [name.to_owned(), name.replace("-idx", ".idx")];
    let names = names.iter().flat_map(|name| [name.clone(), format!("{name}.gz")]);
    let Some(path) = names.map(|name| folder.join(name)).find(|path| path.exists()) else {
        let message = format!("has no {name} (or {name}.gz); expected the four files of MNIST or Fashion-MNIST");
        return Err(Error::file(folder, message));
    };
    let file = File::open(&path).map_err(|error| Error::file(&path, format!("cannot be read: {error}")))?;
    Ok((path, BufReader::new(file)))
}
