//! Weights and ticket files: the only code that reads or writes them.
//!
//! Both are safetensors files with the names of PyTorch's `state_dict`. A pruned parameter is stored as
//! `torch.nn.utils.prune` stores it: `<param>_orig`, the unmasked weights, and `<param>_mask`, 0 or 1 for each.
//! So a module pruned there loads here, and back.
//!
//! | in the file | in memory |
//! |---|---|
//! | `<param>`: F32, F16, BF16 or F64 | `tensors[param]`, as f32 |
//! | `<param>_orig` as above + `<param>_mask` of U8, BOOL or a float type | `tensors[param]` and `masks[param]` |
//! | names that end in `num_batches_tracked` | nothing |
//!
//! What is written is F32 and U8, its bytes depend only on the content, and every weight is finite.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;

use half::{bf16, f16};
use ndarray::ArrayD;

use super::atomic::write_atomically;
use super::container::{self, Checked, Dtype, Entry};
use crate::mask::Mask;
use crate::{Error, Result};

const ORIG: &str = "_orig";
const MASK: &str = "_mask";
/// Batch norm's counter of steps, which nothing here needs.
const IGNORED: &str = "num_batches_tracked";

/// The content of a weights or ticket file. Arrays have PyTorch's shapes and order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Weights {
    /// Parameters and buffers by name. Of a pruned parameter, the weights before the mask is applied.
    pub tensors: BTreeMap<String, ArrayD<f32>>,
    /// Masks of the pruned parameters, by the parameter's name; each has its tensor's shape.
    pub masks: BTreeMap<String, Mask>,
    /// The file's metadata: method, seed, parent and so on. No time, host or path belongs here.
    pub metadata: BTreeMap<String, String>,
}

impl Weights {
    /// Reads a weights or ticket file.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be read, is not a whole and consistent safetensors file, holds a tensor of
    /// another type, a weight that is NaN or infinite (also after conversion to f32), a mask value other than 0 or
    /// 1, a mask of another shape than its weights, or one of `<param>_orig` and `<param>_mask` without the other.
    pub fn load(path: &Path) -> Result<Self> {
        let cannot_read =
            |e: std::io::Error| Error::file(path, format!("cannot read it: {e}; check --weights/--ticket"));
        let file = File::open(path).map_err(cannot_read)?;
        let about = file.metadata().map_err(cannot_read)?;
        if !about.is_file() {
            return Err(Error::file(path, "expected a safetensors file, got a folder or device"));
        }
        Self::read(BufReader::new(file), about.len()).map_err(|problem| Error::file(path, problem))
    }

    /// Reads a file of `file_bytes` bytes.
    fn read(mut reader: impl Read, file_bytes: u64) -> Checked<Self> {
        let header = container::read_header(&mut reader, file_bytes)?;
        check_pairs(&header.entries)?;
        let mut weights = Weights { metadata: header.metadata, ..Weights::default() };
        let mut bytes = Vec::new();
        for entry in &header.entries {
            bytes.resize(entry.bytes() as usize, 0); // at most the file's size: read_header has checked
            reader.read_exact(&mut bytes).map_err(|e| format!("cannot read tensor {:?}: {e}", entry.name))?;
            if entry.name.ends_with(IGNORED) {
                continue;
            }
            if let Some(param) = entry.name.strip_suffix(MASK) {
                weights.masks.insert(param.into(), mask(entry, &bytes)?);
            } else {
                let param = entry.name.strip_suffix(ORIG).unwrap_or(&entry.name);
                weights.tensors.insert(param.into(), tensor(entry, &bytes)?);
            }
        }
        for (param, mask) in &weights.masks {
            let shape = weights.tensors.get(param).map(|t| t.shape());
            if shape != Some(mask.shape()) {
                let shape = shape.unwrap_or_default();
                return Err(format!(
                    "mask of {param:?}: expected its weights' shape {shape:?}, got {:?}",
                    mask.shape()
                ));
            }
        }
        Ok(weights)
    }

    /// Writes a weights or ticket file: equal content gives equal bytes. The file appears whole or not at all: it is
    /// written under a temporary name in the same folder, synced and renamed, so that a failure leaves an older file as it was.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be written, or [`load`](Self::load) would not read the same content back:
    /// a weight that is not finite, a mask without tensor or of another shape, a name with a reserved ending.
    pub fn save(&self, path: &Path) -> Result<()> {
        let header = self.header().map_err(|problem| Error::file(path, format!("not written: {problem}")))?;
        write_atomically(path, |file| {
            file.write_all(&header)?;
            for tensor in self.tensors.values() {
                let bytes: Vec<u8> = tensor.iter().flat_map(|value| value.to_le_bytes()).collect();
                file.write_all(&bytes)?;
            }
            self.masks.values().try_for_each(|mask| file.write_all(&mask.to_bytes()))
        })
    }

    /// A hash of the content, metadata apart.
    pub fn identity(&self) -> String {
        use sha2::{Digest, Sha256};
        let mut hash = Sha256::new();
        for (name, tensor) in &self.tensors {
            hash.update(format!("{name} {:?}", tensor.shape()));
            tensor.iter().for_each(|value| hash.update(value.to_le_bytes()));
        }
        for (name, mask) in &self.masks {
            hash.update(name);
            mask.words().iter().for_each(|word| hash.update(word.to_le_bytes()));
        }
        hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }

    /// Everything before the tensors: all F32 by parameter, then all masks by parameter.
    fn header(&self) -> Checked<Vec<u8>> {
        for (param, mask) in &self.masks {
            let Some(tensor) = self.tensors.get(param) else {
                return Err(format!("mask of {param:?}: there is no tensor of that name"));
            };
            if tensor.shape() != mask.shape() {
                return Err(format!(
                    "mask of {param:?}: expected its weights' shape {:?}, got {:?}",
                    tensor.shape(),
                    mask.shape()
                ));
            }
        }
        let mut items = Vec::new();
        for (param, tensor) in &self.tensors {
            check_finite(param, tensor.shape(), tensor.iter().copied())?;
            let pruned = self.masks.contains_key(param);
            if !pruned && [ORIG, MASK, IGNORED].iter().any(|ending| param.ends_with(ending)) {
                return Err(format!("tensor {param:?}: names that end in {ORIG}, {MASK} or {IGNORED} are reserved"));
            }
            let name = if pruned { format!("{param}{ORIG}") } else { param.clone() };
            items.push((name, "F32", tensor.shape(), 4 * tensor.len()));
        }
        items.extend(self.masks.iter().map(|(param, mask)| (format!("{param}{MASK}"), "U8", mask.shape(), mask.len())));
        container::header(&self.metadata, items)
    }

    /// Checks that the tensors are exactly those of a network: `expected` names and shapes, no more and no less.
    ///
    /// # Errors
    /// [`Error::Usage`] lists every missing, unexpected and mis-shaped tensor, each unexpected one with the missing
    /// name that it resembles, if any.
    pub fn check_against(&self, expected: &[(String, Vec<usize>)]) -> Result<()> {
        let expected: BTreeMap<&str, &[usize]> = expected.iter().map(|(n, s)| (n.as_str(), s.as_slice())).collect();
        let missing: Vec<&str> = expected.keys().copied().filter(|&n| !self.tensors.contains_key(n)).collect();
        let mut problems: Vec<String> =
            missing.iter().map(|name| format!("missing     {name:?}, expected {:?}", expected[name])).collect();
        for (name, tensor) in &self.tensors {
            match expected.get(name.as_str()) {
                None => {
                    let hint = nearest(name, &missing).map_or(String::new(), |near| format!("; is it {near:?}?"));
                    problems.push(format!("unexpected  {name:?}, got {:?}{hint}", tensor.shape()));
                }
                Some(shape) if *shape != tensor.shape() => {
                    problems.push(format!("wrong shape {name:?}, expected {shape:?}, got {:?}", tensor.shape()));
                }
                Some(_) => {}
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "the weights do not fit the model, which has {} tensors, in {} places; choose the --model they were made \
             with, or rename them:\n  {}",
            expected.len(),
            problems.len(),
            problems.join("\n  ")
        )))
    }
}

/// Writes the result of an evaluation: `logits` F32 `[examples, classes]` and `labels` I64 `[examples]`.
///
/// # Errors
/// [`Error::File`] if it cannot be written.
pub fn save_logits(path: &Path, logits: &[f32], classes: usize, labels: &[u32]) -> Result<()> {
    use safetensors::tensor::{Dtype, TensorView, serialize};
    let logit_bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
    let label_bytes: Vec<u8> = labels.iter().flat_map(|&label| i64::from(label).to_le_bytes()).collect();
    let refused = |error: safetensors::SafeTensorError| Error::file(path, format!("not written: {error}"));
    let views = [
        ("logits", TensorView::new(Dtype::F32, vec![labels.len(), classes], &logit_bytes).map_err(refused)?),
        ("labels", TensorView::new(Dtype::I64, vec![labels.len()], &label_bytes).map_err(refused)?),
    ];
    let bytes = serialize(views, None).map_err(refused)?;
    write_atomically(path, |file| file.write_all(&bytes))
}

/// Checks that `_orig` and `_mask` come in pairs, and without a plain tensor of the same name.
fn check_pairs(entries: &[Entry]) -> Checked<()> {
    let names: BTreeSet<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    let has = |param: &str, ending: &str| names.contains(format!("{param}{ending}").as_str());
    for &name in &names {
        let (param, other) = match (name.strip_suffix(ORIG), name.strip_suffix(MASK)) {
            (Some(param), _) => (param, MASK),
            (None, Some(param)) => (param, ORIG),
            (None, None) => continue,
        };
        if !has(param, other) {
            let advice = if names.contains(param) && other == ORIG {
                format!("rename {param:?} to \"{param}{ORIG}\" if it holds the weights before pruning")
            } else {
                "save the state_dict before prune.remove, or leave both out".into()
            };
            return Err(format!(
                "tensor {name:?} comes without \"{param}{other}\": a pruned parameter has both; {advice}"
            ));
        }
        if names.contains(param) {
            return Err(format!("tensor {param:?} comes both plain and as \"{param}{ORIG}\"; leave one out"));
        }
    }
    Ok(())
}

/// The elements of a tensor of a float type, as f32. Each F16 and BF16 value is exact, F64 is rounded.
fn floats(entry: &Entry, bytes: &[u8]) -> Checked<Vec<f32>> {
    // `chunks_exact` gives chunks of exactly N bytes, so the conversion to an array cannot fail.
    fn each<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.chunks_exact(N).map(|chunk| convert(chunk.try_into().unwrap_or([0; N]))).collect()
    }
    Ok(match entry.dtype {
        Dtype::F32 => each(bytes, f32::from_le_bytes),
        Dtype::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        Dtype::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
        other => {
            return Err(format!(
                "tensor {:?}: expected F32, F16, BF16 or F64, got {other}; convert it, or leave it out",
                entry.name
            ));
        }
    })
}

fn tensor(entry: &Entry, bytes: &[u8]) -> Checked<ArrayD<f32>> {
    let values = floats(entry, bytes)?;
    check_finite(&entry.name, &entry.shape, values.iter().copied())?;
    ArrayD::from_shape_vec(entry.shape.as_slice(), values).map_err(|e| format!("tensor {:?}: {e}", entry.name))
}

fn mask(entry: &Entry, bytes: &[u8]) -> Checked<Mask> {
    let values = match entry.dtype {
        Dtype::U8 | Dtype::Bool => bytes.iter().map(|&byte| f32::from(byte)).collect(),
        _ => floats(entry, bytes)?,
    };
    if let Some(i) = values.iter().position(|&value| value != 0.0 && value != 1.0) {
        let (name, index) = (&entry.name, index(&entry.shape, i));
        return Err(format!("tensor {name:?}: a mask holds 0 and 1 only, got {} at {index:?}", values[i]));
    }
    Ok(Mask::from_fn(&entry.shape, |i| values[i] == 1.0))
}

fn check_finite(name: &str, shape: &[usize], values: impl Iterator<Item = f32>) -> Checked<()> {
    match values.enumerate().find(|(_, value)| !value.is_finite()) {
        None => Ok(()),
        Some((i, value)) => Err(format!(
            "tensor {name:?}: expected finite weights that fit f32, got {value} at {:?}; use weights from before the \
             training diverged",
            index(shape, i)
        )),
    }
}

/// The index of element `i` of a tensor of `shape` in row-major order.
fn index(shape: &[usize], mut i: usize) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (at, &size) in index.iter_mut().zip(shape).rev() {
        *at = i % size.max(1);
        i /= size.max(1);
    }
    index
}

/// The candidate that `name` most resembles: itself behind a prefix, else at an edit distance of at most a quarter.
fn nearest<'a>(name: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let behind_prefix = candidates.iter().find(|c| name.strip_suffix(**c).is_some_and(|prefix| prefix.ends_with('.')));
    let most = name.len() / 4;
    let close = || {
        let similar = candidates.iter().filter(|c| c.len().abs_diff(name.len()) <= most);
        let best = similar.map(|c| (edit_distance(name, c), c)).min()?;
        (best.0 <= most).then_some(best.1)
    };
    behind_prefix.or_else(close).copied()
}

/// Levenshtein distance in bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
