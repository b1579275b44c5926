//! The mask of one weight tensor: one bit per weight, 1 = kept, 0 = pruned.
//!
//! Bits follow the order of the weights in a file (`[K, C, R, S]` for a convolution, PyTorch's OIHW), whatever
//! layout the device uses. Bit `i` is bit `i % 32` of word `i / 32`; the bits of the last word past the last
//! weight are always zero, so counting and comparing words needs no special case. Set algebra is in [`set`]: it runs as kernels
//! on these words.

pub mod groups;
pub mod set;

use crate::{Error, Result};

/// One bit per weight of a tensor: 1 = kept, 0 = pruned. Two masks are equal if shape and all bits are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    shape: Vec<usize>,
    words: Vec<u32>,
}

impl Mask {
    /// The mask that keeps every weight of a tensor of `shape`.
    pub fn ones(shape: &[usize]) -> Self {
        let words = vec![u32::MAX; words_for(shape)];
        Mask::with_clear_tail(shape, words)
    }

    /// The mask that prunes every weight of a tensor of `shape`.
    pub fn zeros(shape: &[usize]) -> Self {
        Mask { shape: shape.to_vec(), words: vec![0; words_for(shape)] }
    }

    /// The mask that keeps weight `i` where `keep(i)`; called once for each of `0..len`, in order.
    pub fn from_fn(shape: &[usize], mut keep: impl FnMut(usize) -> bool) -> Self {
        let mut mask = Mask::zeros(shape);
        for i in 0..mask.len() {
            mask.words[i / 32] |= (keep(i) as u32) << (i % 32);
        }
        mask
    }

    /// The mask with these words, as a kernel writes them; bits past the last weight are cleared.
    ///
    /// # Errors
    /// [`Error::Shape`] unless there are exactly `len / 32`, rounded up, words.
    pub fn from_words(shape: &[usize], words: Vec<u32>) -> Result<Self> {
        if words.len() != words_for(shape) {
            return Err(Error::Shape {
                op: "Mask::from_words",
                what: "words".into(),
                expected: format!("{} words of 32 bits for shape {shape:?}", words_for(shape)),
                got: words.len().to_string(),
            });
        }
        Ok(Mask::with_clear_tail(shape, words))
    }

    fn with_clear_tail(shape: &[usize], words: Vec<u32>) -> Self {
        let mut mask = Mask { shape: shape.to_vec(), words };
        let used = mask.len() % 32;
        if let (1.., Some(last)) = (used, mask.words.last_mut()) {
            *last &= (1 << used) - 1;
        }
        mask
    }

    /// The shape of the weight tensor, in file order.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of weights, kept and pruned.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the tensor has no weights at all. A mask that prunes all of its weights is not empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of kept weights.
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Kept / all weights, from 0 to 1; 1 for a tensor without weights, from which nothing was pruned.
    pub fn density(&self) -> f64 {
        if self.is_empty() { 1.0 } else { self.count() as f64 / self.len() as f64 }
    }

    /// Whether weight `i` is kept; false past the last weight.
    pub fn get(&self, i: usize) -> bool {
        self.words.get(i / 32).is_some_and(|word| word >> (i % 32) & 1 == 1)
    }

    /// The bits, 32 to a word, lowest bit first; zero past the last weight.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Whether each weight is kept, in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = bool> + '_ {
        (0..self.len()).map(|i| self.get(i))
    }

    /// One byte per weight, 0 or 1, in file order: what a ticket file holds.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.iter().map(u8::from).collect()
    }
}

fn words_for(shape: &[usize]) -> usize {
    shape.iter().product::<usize>().div_ceil(32)
}
