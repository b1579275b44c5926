//! Handwritten digits: 1,797 grey images of 8x8 pixels, part of the program.
//!
//! Source: E. Alpaydin and C. Kaynak (1998), *Optical Recognition of Handwritten Digits*, UCI Machine Learning
//! Repository, <https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits>, licence CC BY 4.0.
//! These are its test images, of 13 writers, in the order of scikit-learn's `load_digits`. A pixel counts the ink
//! in a block of 4x4 of the scanned bitmap, 0 to 16. Changed: only packed, as `digits.bin` (images, then labels).
//!
//! The split is dilt's own and never changes: a quarter of each class, rounded down, is for testing (445 images),
//! chosen by [`permutation`] with seed 0 and the class as stream; 1,352 are for training. Both stay in file order.

use super::{DataSet, permutation};

const IMAGES: usize = 1797;
const PIXELS: usize = 64;
const CLASSES: u32 = 10;
const SCALE: f32 = 16.0;
const SPLIT_SEED: u64 = 0;

/// Images `[1797, 1, 8, 8]` of 0..=16, then labels `[1797]` of 0..=9.
static BYTES: &[u8; IMAGES * (PIXELS + 1)] = include_bytes!("digits.bin");

/// The digits, split in 1,352 training and 445 test images.
pub(super) fn load() -> DataSet {
    let (images, labels) = BYTES.split_at(IMAGES * PIXELS);
    let mut in_test = [false; IMAGES];
    for class in 0..CLASSES {
        let members: Vec<usize> = (0..IMAGES).filter(|&i| u32::from(labels[i]) == class).collect();
        let order = permutation(members.len() as u32, SPLIT_SEED, u64::from(class));
        for &i in &order[..members.len() / 4] {
            in_test[members[i as usize]] = true;
        }
    }
    let mut split = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
    for (i, image) in images.chunks_exact(PIXELS).enumerate() {
        let (images, to_labels) = &mut split[usize::from(in_test[i])];
        images.extend_from_slice(image);
        to_labels.push(u32::from(labels[i]));
    }
    let [train, test] = split;
    DataSet::of_bytes("digits", [1, 8, 8], CLASSES as usize, SCALE, train, test)
}
