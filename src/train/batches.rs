//! Which examples are a step's.

use std::ops::Range;

use super::labelled::Labelled;
use crate::data::permutation;

/// The examples of each step, in order.
pub(super) struct Batches {
    examples: Vec<u32>,
    batch: usize,
    per_epoch: usize,
    shuffle: Option<u64>,
    steps: Range<usize>,
    /// The examples in the order of an epoch, and which.
    order: (usize, Vec<u32>),
}

impl Batches {
    /// Batches of `batch` examples for `steps`, `per_epoch` an epoch: in file order, or in a new random order each epoch,
    /// drawn from the seed `shuffle`.
    pub(super) fn new(
        data: &Labelled,
        batch: usize,
        per_epoch: usize,
        shuffle: Option<u64>,
        steps: Range<usize>,
    ) -> Self {
        Batches { examples: data.examples.clone(), batch, per_epoch, shuffle, steps, order: (0, Vec::new()) }
    }

    fn of_epoch(&self, epoch: usize) -> Vec<u32> {
        let Some(seed) = self.shuffle else { return self.examples.clone() };
        let order = permutation(self.examples.len() as u32, seed, epoch as u64);
        order.into_iter().map(|place| self.examples[place as usize]).collect()
    }
}

impl Iterator for Batches {
    type Item = Vec<u32>;

    fn next(&mut self) -> Option<Vec<u32>> {
        let step = self.steps.next()?;
        let (epoch, place) = (step / self.per_epoch, step % self.per_epoch * self.batch);
        if self.order.1.is_empty() || self.order.0 != epoch {
            self.order = (epoch, self.of_epoch(epoch));
        }
        let order = &self.order.1;
        Some(order[place..(place + self.batch).min(order.len())].to_vec())
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.steps.size_hint()
    }
}

impl ExactSizeIterator for Batches {}
