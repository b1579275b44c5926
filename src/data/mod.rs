//! Labelled images: the data sets, and their partition into the parts on which tickets are found.
//!
//! Images are bytes, as their files hold them; a pixel's value is `byte / scale`, and the network's input is
//! `(byte / scale - mean) / std` with one mean and one standard deviation per channel.

pub mod cifar;
mod digits;
mod folder;
pub mod idx;
pub mod image;
pub mod partition;

use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

use crate::report::progress::Progress;
use crate::{Error, Result};

/// Chooses the examples that `--val-split` holds out.
const VAL_SEED: u64 = 1;

/// Images with their labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Examples {
    /// The images.
    pub images: Pixels,
    /// Class of each image, `[n]`, from 0.
    pub labels: Vec<u32>,
}

/// The images of a split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pixels {
    /// All in memory: `[n, channels, height, width]`, of the data set's [stored](DataSet::stored) size.
    Bytes(Vec<u8>),
    /// In a file each, decoded to that size whenever they are needed.
    Files(Files),
}

impl Default for Pixels {
    fn default() -> Self {
        Pixels::Bytes(Vec::new())
    }
}

/// Image files that are decoded when they are needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The folder of the data set.
    pub root: PathBuf,
    /// Path of each file in that folder, in the order of the labels, and its size in bytes.
    pub files: Vec<(String, u64)>,
}

impl Files {
    /// Decodes example `index` to `into`, bytes of the shape `stored`.
    ///
    /// # Errors
    /// As [`image::decode`].
    pub fn decode(&self, index: usize, stored: [usize; 3], into: &mut [u8]) -> Result<()> {
        image::decode(&self.root.join(&self.files[index].0), stored, into)
    }
}

impl Examples {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are no images.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Keeps the first `count`: images have `pixels` bytes.
    pub fn truncate(&mut self, count: usize, pixels: usize) {
        self.labels.truncate(count);
        match &mut self.images {
            Pixels::Bytes(bytes) => bytes.truncate(count * pixels),
            Pixels::Files(files) => files.files.truncate(count),
        }
    }

    /// The first of each of `classes` classes, then the second, until there are `count`; in file order. Images have `pixels`
    /// bytes.
    pub fn spread(&self, classes: usize, count: usize, pixels: usize) -> Examples {
        self.select(&first_of_each(&self.labels, classes, count), pixels)
    }

    /// Those with these indices, in this order: images have `pixels` bytes.
    fn select(&self, indices: &[u32], pixels: usize) -> Examples {
        let indices = || indices.iter().map(|&index| index as usize);
        let images = match &self.images {
            Pixels::Bytes(bytes) => {
                Pixels::Bytes(indices().flat_map(|i| &bytes[i * pixels..][..pixels]).copied().collect())
            }
            Pixels::Files(Files { root, files }) => {
                let files = indices().map(|i| files[i].clone()).collect();
                Pixels::Files(Files { root: root.clone(), files })
            }
        };
        Examples { images, labels: indices().map(|i| self.labels[i]).collect() }
    }
}

/// Images, bytes `[n, channels, height, width]`, and the label of each.
type Split = (Vec<u8>, Vec<u32>);

/// A data set, split into examples to train on and examples to test on.
#[derive(Clone, Debug, PartialEq)]
pub struct DataSet {
    /// Name, without the folder it came from.
    pub name: String,
    /// Channels, height and width of the network's input.
    pub shape: [usize; 3],
    /// Channels, height and width of the stored images: the input is a crop of them, at the centre or at random.
    pub stored: [usize; 3],
    /// Number of classes; labels are below it.
    pub classes: usize,
    /// A byte divided by it is the pixel's value, from 0 to 1.
    pub scale: f32,
    /// Mean of each channel's pixel values.
    pub mean: Vec<f32>,
    /// Standard deviation of each channel's pixel values (divided by n, not n - 1).
    pub std: Vec<f32>,
    /// The training examples, in file order.
    pub train: Examples,
    /// Examples held out of the training, in file order; empty if there are none.
    pub val: Examples,
    /// The test examples, in file order.
    pub test: Examples,
}

/// How a data set is read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// Channels, height and width of the network's input: what images of a folder are brought to.
    pub input: [usize; 3],
    /// Height of the stored images of a folder (the width in proportion to the input's); a default if none.
    pub resize: Option<usize>,
    /// Only so many examples of each split: the first; of a folder, the first of each class in turn.
    pub limit: Option<usize>,
    /// Share of the training examples, of each class, that is held out as the split `val`.
    pub val_split: Option<f64>,
    /// Mean of each channel instead of the data set's.
    pub mean: Vec<f32>,
    /// Standard deviation of each channel instead of the data set's.
    pub std: Vec<f32>,
    /// Leave out broken image files of a folder instead of refusing them.
    pub skip_broken: bool,
    /// Largest size of a folder's stored images, in bytes, that are kept in memory; more are decoded when needed.
    pub resident_bytes: u64,
}

impl DataSet {
    /// A data set in memory, with the moments of its training images as mean and standard deviation.
    fn of_bytes(
        name: &str,
        shape: [usize; 3],
        classes: usize,
        scale: f32,
        (train_images, train_labels): Split,
        (test_images, test_labels): Split,
    ) -> Self {
        let (mean, std) = moments(&train_images, shape, scale);
        DataSet {
            name: name.into(),
            shape,
            stored: shape,
            classes,
            scale,
            mean,
            std,
            train: Examples { images: Pixels::Bytes(train_images), labels: train_labels },
            val: Examples::default(),
            test: Examples { images: Pixels::Bytes(test_images), labels: test_labels },
        }
    }

    /// Keeps `limit` examples of each split: the first, or, of image files, the first of each class in turn.
    fn limit(&mut self, limit: usize) {
        let pixels: usize = self.stored.iter().product();
        for split in [&mut self.train, &mut self.val, &mut self.test] {
            match &split.images {
                Pixels::Bytes(_) => split.truncate(limit, pixels),
                Pixels::Files(_) => *split = split.spread(self.classes, limit, pixels),
            }
        }
    }

    /// Moves the share `share` of the training examples of each class, rounded, to the split `val`: always the same ones.
    ///
    /// # Errors
    /// [`Error::Usage`] if the share is not between 0 and 1, leaves a split empty, or the data set has that split already.
    fn hold_out(&mut self, share: f64) -> Result<()> {
        if !(share > 0.0 && share < 1.0) {
            return Err(Error::Usage(format!("--val-split: expected a fraction above 0 and below 1, got {share}")));
        }
        if !self.val.is_empty() {
            return Err(Error::Usage(format!("--val-split: the data set {} has a split val already", self.name)));
        }
        let labels = &self.train.labels;
        let mut held = vec![false; labels.len()];
        let mut members = vec![Vec::new(); self.classes];
        labels.iter().enumerate().for_each(|(i, &label)| members[label as usize].push(i));
        for (class, members) in members.iter().enumerate() {
            let order = permutation(members.len() as u32, VAL_SEED, class as u64);
            let count = (share * members.len() as f64).round() as usize;
            order.iter().take(count).for_each(|&i| held[members[i as usize]] = true);
        }
        let (val, train): (Vec<u32>, Vec<u32>) = (0..labels.len() as u32).partition(|&i| held[i as usize]);
        if val.is_empty() || train.is_empty() {
            return Err(Error::Usage(format!(
                "--val-split {share}: {} training examples would leave {} to train on and {} to validate on; expected \
                 some of both",
                labels.len(),
                train.len(),
                val.len()
            )));
        }
        let pixels = self.stored.iter().product();
        (self.val, self.train) = (self.train.select(&val, pixels), self.train.select(&train, pixels));
        Ok(())
    }

    /// What the bits of a training depend on: name, hash of all examples, scale and normalisation. Of files that are
    /// decoded when needed, the hash is of their names and sizes.
    pub fn identity(&self) -> serde_json::Value {
        let mut hash = Sha256::new();
        for split in [&self.train, &self.val, &self.test] {
            hash.update((split.len() as u64).to_le_bytes());
            match &split.images {
                Pixels::Bytes(bytes) => hash.update(bytes),
                Pixels::Files(files) => {
                    files.files.iter().for_each(|(name, size)| hash.update(format!("{name}\n{size}\n")));
                }
            }
            split.labels.iter().for_each(|label| hash.update(label.to_le_bytes()));
        }
        let hash: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        serde_json::json!({
            "name": self.name, "examples": hash, "stored": self.stored, "scale": self.scale, "mean": self.mean,
            "std": self.std,
        })
    }
}

/// Opens the data set that `--data` names: `digits`, which is part of the program, or `idx=DIR`, `cifar10=DIR`,
/// `cifar100=DIR`, `cifar100-coarse=DIR` or `folder=DIR` (image files), read from a folder.
///
/// `val_split` and `limit` choose image files before any is decoded.
///
/// # Errors
/// [`Error::Usage`] for another name, or settings that do not fit the data set; [`Error::File`] for files that are
/// missing, unreadable or damaged.
pub fn load(spec: &str, reading: &Reading, progress: &Progress) -> Result<DataSet> {
    if reading.limit == Some(0) {
        return Err(Error::Usage("--limit: expected at least 1, got 0".into()));
    }
    let (kind, folder) = spec.split_once('=').map_or((spec, None), |(kind, folder)| (kind, Some(folder)));
    let folder = || match folder {
        Some(folder) if !folder.is_empty() => match std::fs::metadata(folder) {
            Ok(about) if about.is_dir() => Ok(Path::new(folder)),
            Ok(_) => Err(Error::file(folder, format!("expected the folder of the data set {kind}, got a file"))),
            Err(error) => {
                Err(Error::file(folder, format!("the folder of the data set {kind} cannot be read: {error}")))
            }
        },
        _ => Err(Error::Usage(format!("--data {spec:?}: expected the folder of the data set, {kind}=DIR"))),
    };
    let given = [("--resize", reading.resize.is_some()), ("--skip-broken", reading.skip_broken)];
    if let Some((option, _)) = given.iter().find(|(_, given)| *given && kind != "folder") {
        return Err(Error::Usage(format!("{option} is for image files (folder=DIR); leave it out for --data {spec}")));
    }
    let mut data = match kind {
        "digits" if spec == kind => digits::load(),
        "digits" => {
            let message = format!("--data {spec:?}: digits is part of dilt and takes no folder; use --data digits");
            return Err(Error::Usage(message));
        }
        "idx" => idx::load(folder()?)?,
        "cifar10" => cifar::load(folder()?, &cifar::CIFAR10)?,
        "cifar100" => cifar::load(folder()?, &cifar::CIFAR100)?,
        "cifar100-coarse" => cifar::load(folder()?, &cifar::CIFAR100_COARSE)?,
        "folder" => folder::list(folder()?, reading, progress)?,
        _ => {
            return Err(Error::Usage(format!(
                "--data {spec:?}: no such data set; expected digits, idx=DIR, cifar10=DIR, cifar100=DIR, \
                 cifar100-coarse=DIR or folder=DIR"
            )));
        }
    };
    let channels = data.shape[0];
    for (option, given, field) in [("--mean", &reading.mean, &mut data.mean), ("--std", &reading.std, &mut data.std)] {
        if given.is_empty() {
            continue;
        }
        let usable = given.iter().all(|value| value.is_finite() && (option == "--mean" || *value > 0.0));
        if given.len() != channels || !usable {
            return Err(Error::Usage(format!(
                "{option}: expected {channels} numbers (above 0 for --std), separated by commas, got {given:?}"
            )));
        }
        field.clone_from(given);
    }
    if let Some(share) = reading.val_split {
        data.hold_out(share)?;
    }
    if let Some(limit) = reading.limit {
        data.limit(limit);
    }
    if kind == "folder" {
        folder::decode(&mut data, folder()?, reading, progress)?;
    }
    Ok(data)
}

/// Indices of the first example of each class, then of the second, until there are `limit`; ascending.
fn first_of_each(labels: &[u32], classes: usize, limit: usize) -> Vec<u32> {
    let mut seen = vec![0; classes];
    let in_turn = labels.iter().zip(0u32..).map(|(&label, index)| {
        seen[label as usize] += 1;
        (seen[label as usize], label, index)
    });
    let mut in_turn: Vec<(usize, u32, u32)> = in_turn.collect();
    in_turn.sort_unstable();
    let mut chosen: Vec<u32> = in_turn.into_iter().take(limit).map(|(_, _, index)| index).collect();
    chosen.sort_unstable();
    chosen
}

/// Mean and standard deviation of each channel of `byte / scale`: images `[n, channels, height, width]`. From counts
/// of the bytes, in f64.
fn moments(images: &[u8], [channels, height, width]: [usize; 3], scale: f32) -> (Vec<f32>, Vec<f32>) {
    let pixels = height * width;
    let mut counts = vec![[0u64; 256]; channels];
    for image in images.chunks_exact(channels * pixels) {
        for (counts, plane) in counts.iter_mut().zip(image.chunks_exact(pixels)) {
            plane.iter().for_each(|&byte| counts[usize::from(byte)] += 1);
        }
    }
    let moments = |counts: &[u64; 256]| {
        let values = || counts.iter().enumerate().map(|(byte, &n)| (byte as f64 / f64::from(scale), n as f64));
        let n: f64 = values().map(|(_, n)| n).sum();
        let mean = values().map(|(value, n)| value * n).sum::<f64>() / n;
        let variance = values().map(|(value, n)| n * (value - mean).powi(2)).sum::<f64>() / n;
        (mean as f32, variance.sqrt() as f32)
    };
    counts.iter().map(moments).unzip()
}

/// A random order of `0..n`: Fisher-Yates on ChaCha8 with `seed` as the key's first eight bytes, and `stream`.
///
/// Written out, not taken from `rand`, whose shuffles may change between versions: splits must not.
pub(crate) fn permutation(n: u32, seed: u64, stream: u64) -> Vec<u32> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(key);
    random.set_stream(stream);
    let mut order: Vec<u32> = (0..n).collect();
    for i in (1..order.len()).rev() {
        // Of 2^64 values, i + 1 <= 2^32 residues: the bias is below 2^-32.
        order.swap(i, (random.next_u64() % (i as u64 + 1)) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutations_never_change() {
        assert_eq!(permutation(8, 0, 0), [2, 1, 3, 7, 0, 4, 5, 6]);
        assert_eq!(permutation(8, 0, 1), [6, 1, 0, 5, 7, 4, 2, 3]);
        assert_eq!(permutation(8, 1, 0), [1, 3, 2, 6, 4, 0, 5, 7]);
        assert!(permutation(0, 0, 0).is_empty());
    }

    #[test]
    fn a_limit_is_spread_over_classes() {
        let labels = [0, 0, 0, 1, 2, 2];
        assert_eq!(first_of_each(&labels, 3, 2), [0, 3]);
        assert_eq!(first_of_each(&labels, 3, 5), [0, 1, 3, 4, 5]);
        assert_eq!(first_of_each(&labels, 3, 9), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn moments_are_per_channel_over_images() {
        // two images, two channels, one row of two pixels; scale 2
        let images = [0, 4, 10, 10, 0, 4, 10, 10];
        assert_eq!(moments(&images, [2, 1, 2], 2.0), (vec![1.0, 5.0], vec![1.0, 0.0]));
    }
}
