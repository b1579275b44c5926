//! What a ticket is compared with, at exactly its number of weights.

use super::experiment::{Purpose, Repetition, Task};
use super::parts::FoundOnParts;
use super::select::{Amount, Scope, remove_smallest};
use crate::data::permutation;
use crate::error::Result;
use crate::mask::Mask;
use crate::mask::set::MaskSet;
use crate::ops::prune::MaskOp;

/// One-shot magnitude pruning of one network, trained on all data with as many samples as the parts' networks see
/// together: as many times the epochs as there are levels.
///
/// # Errors
/// As [`Repetition::search`].
pub fn magnitude(repetition: &Repetition, keep: usize) -> Result<MaskSet> {
    let times = repetition.experiment.settings.levels;
    let task = Task { times, ..Task::all(Purpose::Search) };
    let weights = repetition.search("magnitude", &repetition.candidates, task)?;
    let device = repetition.experiment.device;
    let candidates = &repetition.candidates;
    Ok(remove_smallest(device, &weights.tensors, candidates, Scope::Global, Amount::AllBut(keep))?.masks)
}

/// Random weights: as many of each layer as the ticket keeps.
///
/// # Errors
/// None that depend on the arguments.
pub fn random(repetition: &Repetition, like: &MaskSet) -> Result<MaskSet> {
    let layers = like.layers().iter().enumerate().map(|(layer, (name, mask))| {
        (name.clone(), random_mask(mask.shape(), mask.len(), mask.count(), repetition.seed, layer, |_| true))
    });
    Ok(MaskSet::new(layers.collect()))
}

/// `core` and as many random weights of each layer, from outside the core, as `extra` keeps.
///
/// # Errors
/// [`crate::Error::Usage`] if the layers differ.
pub fn core_and_random(repetition: &Repetition, core: &MaskSet, extra: &MaskSet) -> Result<MaskSet> {
    let device = repetition.experiment.device;
    let layers = core.layers().iter().zip(extra.layers()).enumerate().map(|(layer, ((name, core), (_, extra)))| {
        let (shape, len, seed) = (core.shape(), core.len(), repetition.seed);
        (name.clone(), random_mask(shape, len, extra.count(), seed, layer, |i| !core.get(i)))
    });
    core.combine(device, MaskOp::Or, &MaskSet::new(layers.collect()))
}

/// A mask of `count` random weights of those that `from` allows.
fn random_mask(
    shape: &[usize],
    len: usize,
    count: usize,
    seed: u64,
    layer: usize,
    from: impl Fn(usize) -> bool,
) -> Mask {
    /// Apart from the orders of examples, which are drawn with small streams.
    const STREAM: u64 = 1 << 32;
    let order = permutation(len as u32, seed, STREAM + layer as u64);
    let mut keep = vec![false; len];
    order.into_iter().map(|i| i as usize).filter(|&i| from(i)).take(count).for_each(|i| keep[i] = true);
    Mask::from_fn(shape, |i| keep[i])
}

/// The union pruned by magnitude to the core's count.
///
/// # Errors
/// As [`remove_smallest`].
pub fn union_pruned(repetition: &Repetition, found: &FoundOnParts) -> Result<MaskSet> {
    let device = repetition.experiment.device;
    let amount = Amount::AllBut(found.core.kept());
    Ok(remove_smallest(device, &found.last_magnitude, &found.union, Scope::Global, amount)?.masks)
}

/// The core grown by magnitude to the union's count.
///
/// # Errors
/// As [`remove_smallest`].
pub fn core_grown(repetition: &Repetition, found: &FoundOnParts) -> Result<MaskSet> {
    let device = repetition.experiment.device;
    let outside = repetition.candidates.combine(device, MaskOp::AndNot, &found.core)?;
    let amount = Amount::AllBut(found.union.kept() - found.core.kept());
    let grown = remove_smallest(device, &found.first_magnitude, &outside, Scope::Global, amount)?.masks;
    grown.combine(device, MaskOp::Or, &found.core)
}
