//! Labelled images: the data sets, and their partition into the parts on which tickets are found.
//!
//! Images are bytes, as their files hold them; a pixel's value is `byte / scale`, and the network's input is
//! `(byte / scale - mean) / std` with one mean and one standard deviation per channel.

mod digits;
pub mod partition;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Images with their labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Examples {
    /// Pixels, `[n, channels, height, width]`.
    pub images: Vec<u8>,
    /// Class of each image, `[n]`, from 0.
    pub labels: Vec<u32>,
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
}

/// A data set, split into examples to train on and examples to test on.
#[derive(Clone, Debug, PartialEq)]
pub struct DataSet {
    /// Name, without the folder it came from.
    pub name: String,
    /// Channels, height and width of each image.
    pub shape: [usize; 3],
    /// Number of classes; labels are below it.
    pub classes: usize,
    /// A byte divided by it is the pixel's value, from 0 to 1.
    pub scale: f32,
    /// Mean of each channel's pixel values over the training images.
    pub mean: Vec<f32>,
    /// Standard deviation of each channel's pixel values over the training images (divided by n, not n - 1).
    pub std: Vec<f32>,
    /// The training examples, in file order.
    pub train: Examples,
    /// The test examples, in file order.
    pub test: Examples,
}

impl DataSet {
    /// Keeps the first `limit` examples of each split.
    ///
    /// # Errors
    /// [`Error::Usage`] if that is none.
    pub fn limit(&mut self, limit: usize) -> Result<()> {
        if limit == 0 {
            return Err(Error::Usage("--limit: expected at least 1, got 0".into()));
        }
        let pixels: usize = self.shape.iter().product();
        for split in [&mut self.train, &mut self.test] {
            split.labels.truncate(limit);
            split.images.truncate(limit * pixels);
        }
        Ok(())
    }

    /// What the bits of a training depend on: name, hash of all examples, scale and normalisation.
    pub fn identity(&self) -> serde_json::Value {
        let mut hash = Sha256::new();
        for split in [&self.train, &self.test] {
            hash.update((split.len() as u64).to_le_bytes());
            hash.update(&split.images);
            split.labels.iter().for_each(|label| hash.update(label.to_le_bytes()));
        }
        let hash: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        serde_json::json!({
            "name": self.name, "examples": hash, "scale": self.scale, "mean": self.mean, "std": self.std,
        })
    }
}

/// Opens the data set that `--data` names: `digits`, which is part of the program.
///
/// # Errors
/// [`Error::Usage`] for any other name. `idx=DIR`, `cifar10=DIR`, `cifar100=DIR` and `folder=DIR` are not built yet.
pub fn load(spec: &str) -> Result<DataSet> {
    let kind = spec.split_once('=').map_or(spec, |(kind, _)| kind);
    match kind {
        "digits" if spec == "digits" => Ok(digits::load()),
        "digits" => {
            Err(Error::Usage(format!("--data {spec:?}: digits is part of dilt and takes no folder; use --data digits")))
        }
        "idx" | "cifar10" | "cifar100" | "folder" => Err(Error::Usage(format!(
            "--data {spec:?}: {kind}=DIR is not built yet in this version; expected digits, the only one so far"
        ))),
        _ => Err(Error::Usage(format!(
            "--data {spec:?}: no such data set; expected digits (idx=DIR, cifar10=DIR, cifar100=DIR and folder=DIR are \
             not built yet)"
        ))),
    }
}

/// Mean and standard deviation of each channel of `byte / scale`, summed in f64: images `[n, channels, pixels]`.
fn moments(images: &[u8], [channels, height, width]: [usize; 3], scale: f32) -> (Vec<f32>, Vec<f32>) {
    let pixels = height * width;
    let channel = |c: usize| {
        let values = || {
            let planes = images.chunks_exact(pixels).skip(c).step_by(channels).flatten();
            planes.map(|&byte| f64::from(byte) / f64::from(scale))
        };
        let n = values().count() as f64;
        let mean = values().sum::<f64>() / n;
        let variance = values().map(|value| (value - mean).powi(2)).sum::<f64>() / n;
        (mean as f32, variance.sqrt() as f32)
    };
    (0..channels).map(channel).unzip()
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
    fn moments_are_per_channel_over_images() {
        // two images, two channels, one row of two pixels; scale 2
        let images = [0, 4, 10, 10, 0, 4, 10, 10];
        assert_eq!(moments(&images, [2, 1, 2], 2.0), (vec![1.0, 5.0], vec![1.0, 0.0]));
    }
}
