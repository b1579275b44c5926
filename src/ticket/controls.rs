//! What a ticket is compared with, at exactly its number of weights.

use super::experiment::{Purpose, Repetition, Task};
use super::parts::FoundOnParts;
use super::select::{Amount, Scope, remove_smallest};
use crate::data::permutation;
use crate::device::Device;
use crate::error::Result;
use crate::mask::Mask;
use crate::mask::set::MaskSet;
use crate::nn::init;
use crate::nn::weights::Weights;
use crate::ops::prune::MaskOp;

/// First stream of random masks: apart from the orders of examples, which are drawn with small streams.
const RANDOM_MASKS: u64 = 1 << 32;

/// Of the seed from which the re-drawn control takes its initial weights.
const REDRAWN: u64 = 1 << 20;

/// The network that [`magnitude`] prunes, whatever it keeps: trained on all data with as many samples as the parts'
/// networks see together in so many levels, as many times the epochs.
///
/// # Errors
/// As [`Repetition::search`].
pub fn trained_long(repetition: &Repetition, device: &Device, levels: usize) -> Result<Weights> {
    let task = Task { times: levels, ..Task::all(Purpose::Search) };
    repetition.search(device, "magnitude", &repetition.candidates, task)
}

/// One-shot magnitude pruning of one network.
///
/// # Errors
/// As [`Repetition::search`].
pub fn magnitude(repetition: &Repetition, device: &Device, levels: usize, keep: usize) -> Result<MaskSet> {
    let weights = trained_long(repetition, device, levels)?;
    let candidates = &repetition.candidates;
    Ok(remove_smallest(device, &weights.tensors, candidates, Scope::Global, Amount::AllBut(keep))?.masks)
}

/// Random weights: as many of each layer as the ticket keeps.
pub fn random(repetition: &Repetition, like: &MaskSet) -> MaskSet {
    let layers = like.layers().iter().enumerate().map(|(layer, (name, mask))| {
        let order = permutation(mask.len() as u32, repetition.seed, RANDOM_MASKS + layer as u64);
        let mut keep = vec![false; mask.len()];
        order.into_iter().take(mask.count()).for_each(|i| keep[i as usize] = true);
        (name.clone(), Mask::from_fn(mask.shape(), |i| keep[i]))
    });
    MaskSet::new(layers.collect())
}

/// Initial weights that are none of the repetition's own.
///
/// # Errors
/// [`crate::Error::Usage`] if the model does not fit the images.
pub fn redrawn(repetition: &Repetition) -> Result<Weights> {
    Ok(init::draw(&repetition.experiment.config.build()?, repetition.seed + REDRAWN))
}

/// The weights of `extra`, none of them in `core`, each put to a random place outside the core, in its layer. Of one
/// repetition the places are the same for every `extra`: what two have in common, they have in common after it too.
pub fn scattered(repetition: &Repetition, core: &MaskSet, extra: &MaskSet) -> MaskSet {
    let layers = core.layers().iter().zip(extra.layers()).enumerate().map(|(layer, ((name, core), (_, extra)))| {
        let outside: Vec<usize> = (0..core.len()).filter(|&i| !core.get(i)).collect();
        let places = permutation(outside.len() as u32, repetition.seed, RANDOM_MASKS + layer as u64);
        let mut keep = vec![false; core.len()];
        let taken = outside.iter().zip(places).filter(|(from, _)| extra.get(**from));
        taken.for_each(|(_, place)| keep[outside[place as usize]] = true);
        (name.clone(), Mask::from_fn(core.shape(), |i| keep[i]))
    });
    MaskSet::new(layers.collect())
}

/// The union pruned by magnitude to the core's count.
///
/// # Errors
/// As [`remove_smallest`].
pub fn union_pruned(device: &Device, found: &FoundOnParts) -> Result<MaskSet> {
    let amount = Amount::AllBut(found.core.kept());
    Ok(remove_smallest(device, &found.last_magnitude, &found.union, Scope::Global, amount)?.masks)
}

/// The core grown by magnitude to the union's count.
///
/// # Errors
/// As [`remove_smallest`].
pub fn core_grown(repetition: &Repetition, device: &Device, found: &FoundOnParts) -> Result<MaskSet> {
    let outside = repetition.candidates.combine(device, MaskOp::AndNot, &found.core)?;
    let amount = Amount::AllBut(found.union.kept() - found.core.kept());
    let grown = remove_smallest(device, &found.first_magnitude, &outside, Scope::Global, amount)?.masks;
    grown.combine(device, MaskOp::Or, &found.core)
}
