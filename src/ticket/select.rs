//! Which weights a ticket keeps: exact selection by magnitude, on a device.
//!
//! Of the weights that are candidates, exactly as many as asked for are removed, smallest magnitude first, ties by
//! lowest index in the order of the model's parameters and, within one, of its file (OIHW).

use std::collections::BTreeMap;

use ndarray::ArrayD;
use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::mask::set::MaskSet;
use crate::ops::prune::{PruneReport, Selection, prune_report, prune_scratch_len, prune_smallest, round_half_even};

/// Tensors start at multiples of this many elements in the selection's arena.
const ALIGNMENT: usize = 64;

/// Where magnitudes are compared.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Over all layers together.
    Global,
    /// Within each layer.
    Layer,
}

/// How much is removed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// This share of the candidates, rounded half to even (of each layer, in layer scope).
    Fraction(f64),
    /// All but this many of the candidates, in global scope.
    AllBut(usize),
}

/// What is left, and the largest magnitude that was removed.
#[derive(Clone, Debug, PartialEq)]
pub struct Selected {
    /// The candidates that are left.
    pub masks: MaskSet,
    /// Largest removed magnitude; none if nothing was removed.
    pub threshold: Option<f32>,
}

/// Removes the weights of smallest magnitude from `candidates`.
///
/// # Errors
/// [`Error::Usage`] if a tensor is missing or of another shape, the fraction is not in (0, 1), or fewer candidates are
/// there than must be left; [`Error::Run`] if a candidate is NaN.
pub fn remove_smallest(
    device: &Device,
    values: &BTreeMap<String, ArrayD<f32>>,
    candidates: &MaskSet,
    scope: Scope,
    amount: Amount,
) -> Result<Selected> {
    if let Amount::Fraction(fraction) = amount
        && !(fraction > 0.0 && fraction < 1.0)
    {
        return Err(Error::Usage(format!("sparsity: expected a fraction above 0 and below 1, got {fraction}")));
    }
    let mut arena: Vec<f32> = Vec::new();
    let mut words: Vec<u32> = Vec::new();
    let mut ranges = Vec::new();
    for (name, mask) in candidates.layers() {
        let tensor = values.get(name).filter(|tensor| tensor.shape() == mask.shape());
        let tensor = tensor.ok_or_else(|| {
            Error::Usage(format!("weights '{name}': expected a tensor {:?}, got none of this shape", mask.shape()))
        })?;
        ranges.push((arena.len(), tensor.len().next_multiple_of(ALIGNMENT), mask.count()));
        arena.extend(tensor.iter());
        arena.resize(arena.len().next_multiple_of(ALIGNMENT), 0.0);
        words.extend(mask.words());
        words.resize(arena.len() / 32, 0);
    }
    if scope == Scope::Global {
        ranges = vec![(0, arena.len(), candidates.kept())];
    }
    let (weights, live) = (device.upload(&arena)?, device.upload(&words)?);
    let mut kept = device.upload(&words)?;
    let mut scratch = device.alloc::<u32>(prune_scratch_len(arena.len()))?;
    let mut threshold: Option<f32> = None;
    for (start, len, count) in ranges {
        let remove = match amount {
            Amount::Fraction(fraction) => round_half_even(fraction, count),
            Amount::AllBut(keep) => count
                .checked_sub(keep)
                .ok_or_else(|| Error::Usage(format!("expected at least {keep} candidates to keep, got {count}")))?,
        };
        let bits = start / 32..(start + len) / 32;
        let selection =
            Selection { weights: weights.slice(start..start + len), live: live.slice(bits.clone()), remove };
        prune_smallest(device, selection, scratch.view_mut(), kept.slice_mut(bits))?;
        let PruneReport { threshold: largest, .. } = prune_report(device, scratch.view())?;
        threshold = threshold.into_iter().chain(largest).reduce(f32::max);
    }
    let kept = device.read(kept.view())?;
    let mut start = 0;
    let mut layers = Vec::new();
    for (name, mask) in candidates.layers() {
        let these = kept[start..start + mask.words().len()].to_vec();
        layers.push((name.clone(), Mask::from_words(mask.shape(), these)?));
        start += mask.len().next_multiple_of(ALIGNMENT) / 32;
    }
    Ok(Selected { masks: MaskSet::new(layers), threshold })
}
