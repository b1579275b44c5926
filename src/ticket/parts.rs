//! Tickets from parts of the data: disentangled (DiLT, arXiv 2508.16915) and cyclic overlapping ones (COLT,
//! arXiv 2212.12770).
//!
//! Each part trains a network from the same θ_k under its mask and prunes the smallest of what is left, level by
//! level. With [`Algebra::Final`] the parts' masks m_i meet once, at the end; with [`Algebra::EachLevel`] (COLT's loop)
//! all go on from their consensus after each level. Core = kept by at least τ of the parts; specialist_i = m_i \ core,
//! or, each level, all that m_i kept and the consensus dropped; union = core and all specialists.

use std::collections::BTreeMap;

use ndarray::ArrayD;

use super::experiment::{Experiment, Head, Purpose, Repetition, Task};
use super::select::{Amount, remove_smallest};
use super::settings::{Algebra, Search};
use crate::data::partition::Part;
use crate::device::Device;
use crate::error::Result;
use crate::mask::set::MaskSet;
use crate::ops::prune::MaskOp;

/// Magnitudes of weights by name.
pub type Magnitudes = BTreeMap<String, ArrayD<f32>>;

/// What the parts' networks kept.
pub struct FoundOnParts {
    /// What each part kept.
    pub parts: Vec<MaskSet>,
    /// What at least τ parts kept.
    pub core: MaskSet,
    /// What each part kept alone, or with too few others.
    pub specialists: Vec<MaskSet>,
    /// Core and specialists together.
    pub union: MaskSet,
    /// Largest |w| over the parts after the last level's training.
    pub last_magnitude: Magnitudes,
    /// Mean |w| over the parts after the first level's training.
    pub first_magnitude: Magnitudes,
}

/// Trains and prunes on each part, in a folder called `name` from the second level on. Algebra and τ are those given,
/// not the search's.
///
/// # Errors
/// As [`Repetition::search`].
pub fn search(
    repetition: &Repetition,
    search: &Search,
    name: &str,
    algebra: Algebra,
    at_least: usize,
) -> Result<FoundOnParts> {
    let Experiment { device, streams, .. } = *repetition.experiment;
    let k = repetition.parts.len();
    let mut masks = vec![repetition.candidates.clone(); k];
    let nothing = repetition.candidates.combine(device, MaskOp::Xor, &repetition.candidates)?;
    let mut dropped = vec![nothing; k];
    let (mut first_magnitude, mut last_magnitude) = (Magnitudes::new(), Magnitudes::new());
    for level in 1..=search.levels {
        last_magnitude.clear();
        // The first level knows nothing of the algebra: all searches share it.
        let folder = if level == 1 { "parts" } else { name };
        let train = |device: &Device, (part, masks): (&Part, &MaskSet)| {
            let stage = format!("{folder}/{}/level-{level}", part.name);
            let task = Task { part: Some(part), head: Head::Own, ..Task::all(Purpose::Search) };
            let weights = repetition.search(device, &stage, masks, task)?.tensors;
            let amount = Amount::Fraction(search.prune);
            Ok((remove_smallest(device, &weights, masks, search.scope, amount)?.masks, weights))
        };
        let mut left = Vec::new();
        streams.each(repetition.parts.iter().zip(&masks), train, |(masks, weights)| {
            left.push(masks);
            collect(&mut last_magnitude, &weights, &repetition.candidates, f32::max);
            if level == 1 {
                collect(&mut first_magnitude, &weights, &repetition.candidates, |sum, w| sum + w / k as f32);
            }
        })?;
        masks = left;
        if algebra == Algebra::EachLevel {
            let consensus = MaskSet::consensus(device, &masks.iter().collect::<Vec<_>>(), at_least)?;
            for (mask, dropped) in masks.iter_mut().zip(&mut dropped) {
                let alone = mask.combine(device, MaskOp::AndNot, &consensus)?;
                *dropped = dropped.combine(device, MaskOp::Or, &alone)?;
                *mask = consensus.clone();
            }
        }
    }
    let core = MaskSet::consensus(device, &masks.iter().collect::<Vec<_>>(), at_least)?;
    let mut union = core.clone();
    let mut specialists = Vec::new();
    for (mask, dropped) in masks.iter_mut().zip(&dropped) {
        *mask = mask.combine(device, MaskOp::Or, dropped)?;
        let specialist = mask.combine(device, MaskOp::AndNot, &core)?;
        union = union.combine(device, MaskOp::Or, &specialist)?;
        specialists.push(specialist);
    }
    Ok(FoundOnParts { parts: masks, core, specialists, union, last_magnitude, first_magnitude })
}

/// Folds |w| of the candidates into what is collected so far, from 0.
fn collect(into: &mut Magnitudes, weights: &Magnitudes, candidates: &MaskSet, fold: impl Fn(f32, f32) -> f32) {
    for (name, mask) in candidates.layers() {
        let sum = into.entry(name.clone()).or_insert_with(|| ArrayD::zeros(mask.shape()));
        sum.zip_mut_with(&weights[name], |sum, w| *sum = fold(*sum, w.abs()));
    }
}
