//! Weights and ticket files: the only code that reads or writes them.
//!
//! Both are safetensors files with the names of PyTorch's `state_dict`. A pruned parameter is stored as
//! `torch.nn.utils.prune` stores it: `<param>_orig`, the unmasked weights, and `<param>_mask`, 0 or 1 for each.
//! So a module pruned there loads here, and back. In compact files `<param>_bits` stands for the mask: bit `i % 8` of
//! byte `i / 8` is weight `i` in file order, and the bits past the last weight are 0.
//!
//! | in the file | in memory |
//! |---|---|
//! | `<param>`: F32, F16, BF16 or F64 | `tensors[param]`, as f32 |
//! | `<param>_orig` as above + `<param>_mask` of U8, BOOL or a float type, or `<param>_bits` of U8 | `tensors[param]` and `masks[param]` |
//! | names that end in `num_batches_tracked` | nothing |
//!
//! What is written depends only on the content, and every weight is finite.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::path::Path;

use half::{bf16, f16};
use ndarray::ArrayD;
use serde::Serialize;

use super::atomic::write_atomically;
use super::container::{self, Checked, Dtype, Entry};
use super::shards::{self, Shard};
use crate::mask::Mask;
use crate::{Error, Result};

const ORIG: &str = "_orig";
const MASK: &str = "_mask";
const BITS: &str = "_bits";
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

/// How masks are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Not at all: pruned weights are 0, and all parameters have their plain names.
    Plain,
    /// <param>_orig and <param>_mask, as torch.nn.utils.prune names them; a byte per weight.
    Pruning,
    /// <param>_orig and <param>_bits; a bit per weight.
    Compact,
}

/// The type that weights are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum FloatType {
    /// 32 bits.
    F32,
    /// IEEE half precision: at most 65504.
    F16,
    /// The upper 16 bits of an f32, rounded.
    Bf16,
}

impl Weights {
    /// Reads a weights or ticket file, or all files of an index (`*.safetensors.index.json`) as one. Metadata of several
    /// files is united; of a key that comes twice, the first file's counts.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be read, is not a whole and consistent safetensors file, holds a tensor of
    /// another type, a weight that is NaN or infinite (also after conversion to f32), a mask value other than 0 or
    /// 1, a mask of another shape than its weights, or one of `<param>_orig` and its mask without the other; or if
    /// an index and its files contradict each other.
    pub fn load(path: &Path) -> Result<Self> {
        Self::of_shards(shards::open(path)?, path)
    }

    /// Reads the bytes of a weights or ticket file that is whole in itself. `path` names it in errors.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        Self::of_shards(vec![Shard::read(path, bytes, bytes.len() as u64)?], path)
    }

    fn of_shards(mut shards: Vec<Shard<impl Read>>, path: &Path) -> Result<Self> {
        check_pairs(shards.iter().flat_map(|shard| &shard.header.entries)).map_err(|p| Error::file(path, p))?;
        let mut weights = Weights::default();
        let mut bits = BTreeMap::new();
        for shard in &mut shards {
            weights.read(shard, &mut bits).map_err(|problem| Error::file(&shard.path, problem))?;
        }
        weights.unpack(bits).and_then(|()| weights.check_masks()).map_err(|problem| Error::file(path, problem))?;
        Ok(weights)
    }

    /// Adds what a file holds; packed masks, whose shapes may be in another file, go to `packed`.
    fn read(&mut self, shard: &mut Shard<impl Read>, packed: &mut BTreeMap<String, Vec<u8>>) -> Checked<()> {
        for (key, value) in std::mem::take(&mut shard.header.metadata) {
            self.metadata.entry(key).or_insert(value);
        }
        let mut bytes = Vec::new();
        for entry in &shard.header.entries {
            bytes.resize(entry.bytes() as usize, 0); // at most the file's size: read_header has checked
            shard.reader.read_exact(&mut bytes).map_err(|e| format!("cannot read tensor {:?}: {e}", entry.name))?;
            if entry.name.ends_with(IGNORED) {
                continue;
            }
            if let Some(param) = entry.name.strip_suffix(MASK) {
                self.masks.insert(param.into(), mask(entry, &bytes)?);
            } else if let Some(param) = entry.name.strip_suffix(BITS) {
                if entry.dtype != Dtype::U8 || entry.shape.len() != 1 {
                    let (name, dtype, shape) = (&entry.name, entry.dtype, &entry.shape);
                    return Err(format!("tensor {name:?}: expected a packed mask, U8 [bytes], got {dtype} {shape:?}"));
                }
                packed.insert(param.into(), bytes.clone());
            } else {
                let param = entry.name.strip_suffix(ORIG).unwrap_or(&entry.name);
                self.tensors.insert(param.into(), tensor(entry, &bytes)?);
            }
        }
        Ok(())
    }

    /// Adds masks that a file holds as bits.
    fn unpack(&mut self, packed: BTreeMap<String, Vec<u8>>) -> Checked<()> {
        for (param, bytes) in packed {
            let shape = self.tensors.get(&param).map_or(&[][..], |tensor| tensor.shape());
            let weights: usize = shape.iter().product();
            if bytes.len() != weights.div_ceil(8) {
                return Err(format!(
                    "tensor \"{param}{BITS}\": expected {} bytes, a bit for each of {weights} weights, got {}",
                    weights.div_ceil(8),
                    bytes.len()
                ));
            }
            if let (1.., Some(last)) = (weights % 8, bytes.last())
                && last >> (weights % 8) != 0
            {
                return Err(format!(
                    "tensor \"{param}{BITS}\": expected zeros after the bits of {weights} weights, got a last byte of {last:#04x}"
                ));
            }
            let mask = Mask::from_fn(shape, |i| bytes[i / 8] >> (i % 8) & 1 == 1);
            self.masks.insert(param, mask);
        }
        Ok(())
    }

    fn check_masks(&self) -> Checked<()> {
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
        Ok(())
    }

    /// Writes a weights or ticket file as [`Weights::save_as`] does, with PyTorch's pruning names and f32.
    ///
    /// # Errors
    /// As [`Weights::save_as`].
    pub fn save(&self, path: &Path) -> Result<()> {
        self.save_as(path, Form::Pruning, FloatType::F32)
    }

    /// Writes a weights or ticket file: equal content gives equal bytes. The file appears whole or not at all: it is
    /// written under a temporary name in the same folder, synced and renamed, so that a failure leaves an older file as it was.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be written, or [`load`](Self::load) would not read it back: a weight that is
    /// not finite, also in the type asked for, a mask without tensor or of another shape, a name with a reserved ending.
    pub fn save_as(&self, path: &Path, form: Form, dtype: FloatType) -> Result<()> {
        let header = self.header(form, dtype).map_err(|problem| not_written(path, problem))?;
        write_atomically(path, |file| self.write(&header, form, dtype, file))
    }

    /// The bytes of the file that [`Weights::save_as`] writes. `path` names it in errors.
    ///
    /// # Errors
    /// [`Error::File`] if [`parse`](Self::parse) would not read them back.
    pub fn encode(&self, form: Form, dtype: FloatType, path: &Path) -> Result<Vec<u8>> {
        let header = self.header(form, dtype).map_err(|problem| not_written(path, problem))?;
        let mut bytes = Vec::new();
        self.write(&header, form, dtype, &mut bytes).map_err(|error| not_written(path, error))?;
        Ok(bytes)
    }

    fn write(&self, header: &[u8], form: Form, dtype: FloatType, to: &mut impl Write) -> std::io::Result<()> {
        to.write_all(header)?;
        for (param, tensor) in &self.tensors {
            to.write_all(&dtype.encode(self.written(param, tensor, form)))?;
        }
        self.masks.values().try_for_each(|mask| match form {
            Form::Plain => Ok(()),
            Form::Pruning => to.write_all(&mask.to_bytes()),
            Form::Compact => to.write_all(&packed(mask)),
        })
    }

    /// The weights of a parameter as a form has them: with its mask applied where that is not written.
    pub(super) fn written<'a>(
        &'a self,
        param: &str,
        tensor: &'a ArrayD<f32>,
        form: Form,
    ) -> impl Iterator<Item = f32> + 'a {
        let mask = self.masks.get(param).filter(|_| form == Form::Plain);
        let keeps = move |i| mask.is_none_or(|mask| mask.get(i));
        tensor.iter().enumerate().map(move |(i, &value)| if keeps(i) { value } else { 0.0 })
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

    /// Everything before the tensors: all weights by parameter, then all masks by parameter.
    fn header(&self, form: Form, dtype: FloatType) -> Checked<Vec<u8>> {
        self.check_masks()?;
        let mut items = Vec::new();
        for (param, tensor) in &self.tensors {
            check_finite(param, tensor.shape(), tensor.iter().copied())?;
            dtype.check_fits(param, tensor.shape(), self.written(param, tensor, form))?;
            let pruned = form != Form::Plain && self.masks.contains_key(param);
            if !pruned && [ORIG, MASK, BITS, IGNORED].iter().any(|ending| param.ends_with(ending)) {
                return Err(format!(
                    "tensor {param:?}: names that end in {ORIG}, {MASK}, {BITS} or {IGNORED} are reserved"
                ));
            }
            let name = if pruned { format!("{param}{ORIG}") } else { param.clone() };
            items.push((name, dtype.name(), tensor.shape().to_vec(), dtype.bytes() * tensor.len()));
        }
        for (param, mask) in &self.masks {
            match form {
                Form::Plain => {}
                Form::Pruning => items.push((format!("{param}{MASK}"), "U8", mask.shape().to_vec(), mask.len())),
                Form::Compact => {
                    let bytes = mask.len().div_ceil(8);
                    items.push((format!("{param}{BITS}"), "U8", vec![bytes], bytes));
                }
            }
        }
        container::header(&self.metadata, items)
    }
}

fn not_written(path: &Path, problem: impl std::fmt::Display) -> Error {
    Error::file(path, format!("not written: {problem}"))
}

impl FloatType {
    fn name(self) -> &'static str {
        match self {
            FloatType::F32 => "F32",
            FloatType::F16 => "F16",
            FloatType::Bf16 => "BF16",
        }
    }

    /// Bytes of an element.
    fn bytes(self) -> usize {
        if self == FloatType::F32 { 4 } else { 2 }
    }

    /// Refuses a weight that would become infinite.
    fn check_fits(self, name: &str, shape: &[usize], values: impl Iterator<Item = f32>) -> Checked<()> {
        let overflows = |&(_, value): &(usize, f32)| match self {
            FloatType::F32 => false,
            FloatType::F16 => f16::from_f32(value).is_infinite(),
            FloatType::Bf16 => bf16::from_f32(value).is_infinite(),
        };
        match values.enumerate().find(overflows) {
            None => Ok(()),
            Some((i, value)) => {
                let (index, dtype) = (index(shape, i), self.name());
                Err(format!("tensor {name:?}: {value:e} at {index:?} is too large for {dtype}; choose --dtype f32"))
            }
        }
    }

    fn encode(self, values: impl Iterator<Item = f32>) -> Vec<u8> {
        match self {
            FloatType::F32 => values.flat_map(f32::to_le_bytes).collect(),
            FloatType::F16 => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
            FloatType::Bf16 => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
        }
    }
}

/// The bits of a mask, eight to a byte, lowest first.
fn packed(mask: &Mask) -> Vec<u8> {
    let bytes = mask.words().iter().flat_map(|word| word.to_le_bytes());
    bytes.take(mask.len().div_ceil(8)).collect()
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

/// Checks that `_orig` and `_mask` (or `_bits`) come in pairs, and without a plain tensor of the same name.
fn check_pairs<'a>(entries: impl Iterator<Item = &'a Entry>) -> Checked<()> {
    let names: BTreeSet<&str> = entries.map(|entry| entry.name.as_str()).collect();
    let has = |param: &str, ending: &str| names.contains(format!("{param}{ending}").as_str());
    for &name in &names {
        let Some((param, ending)) = [ORIG, MASK, BITS].into_iter().find_map(|e| Some((name.strip_suffix(e)?, e)))
        else {
            continue;
        };
        let (paired, other) = match ending {
            ORIG => (has(param, MASK) || has(param, BITS), MASK),
            _ => (has(param, ORIG), ORIG),
        };
        if !paired {
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
        if has(param, MASK) && has(param, BITS) {
            return Err(format!("the mask of {param:?} comes twice, as {MASK} and as {BITS}; leave one out"));
        }
    }
    Ok(())
}

/// The elements of a tensor of a float type, as f32. Each F16 and BF16 value is exact, F64 is rounded.
pub(super) fn floats(entry: &Entry, bytes: &[u8]) -> Checked<Vec<f32>> {
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
pub(super) fn index(shape: &[usize], mut i: usize) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (at, &size) in index.iter_mut().zip(shape).rev() {
        *at = i % size.max(1);
        i /= size.max(1);
    }
    index
}
