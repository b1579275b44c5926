//! Lottery tickets by iterative magnitude pruning (Frankle and Carbin, arXiv 1803.03635; rewinding, 1912.05671).
//!
//! Per level: train from θ_k under the mask, remove the smallest of what is left, rewind.

use super::experiment::{Purpose, Repetition, Task};
use super::select::{Amount, Scope, remove_smallest};
use super::settings::Search;
use crate::device::Device;
use crate::error::Result;
use crate::mask::set::MaskSet;
use crate::nn::weights::Weights;

/// What iterative pruning leaves.
pub struct Found {
    /// The masks.
    pub masks: MaskSet,
    /// The weights that were pruned last.
    pub last: Weights,
}

/// Levels that each remove the search's share of what is left.
///
/// # Errors
/// As [`Repetition::search`].
pub fn by_share(repetition: &Repetition, device: &Device, search: &Search) -> Result<Found> {
    let amount = |_: usize| Amount::Fraction(search.prune);
    prune(repetition, device, "lth", search.levels, search.scope, amount)
}

/// So many levels, geometric in the number of weights, ending at exactly `keep`.
///
/// # Errors
/// As [`Repetition::search`].
pub fn to_count(repetition: &Repetition, device: &Device, name: &str, levels: usize, keep: usize) -> Result<MaskSet> {
    let all = repetition.candidates.total() as f64;
    let amount = |level: usize| {
        let left = all * (keep as f64 / all).powf(level as f64 / levels as f64);
        Amount::AllBut(if level == levels { keep } else { left.round() as usize })
    };
    // An exact count is one over all layers.
    Ok(prune(repetition, device, &format!("lth-{name}"), levels, Scope::Global, amount)?.masks)
}

fn prune(
    repetition: &Repetition,
    device: &Device,
    name: &str,
    levels: usize,
    scope: Scope,
    amount: impl Fn(usize) -> Amount,
) -> Result<Found> {
    let mut masks = repetition.candidates.clone();
    let mut last = Weights::default();
    for level in 1..=levels {
        // The first level knows nothing of what it will be pruned to: all searches share it.
        let stage = if level == 1 { "lth/level-1".into() } else { format!("{name}/level-{level}") };
        let task = Task::all(Purpose::Search);
        last = repetition.search(device, &stage, &masks, task)?;
        masks = remove_smallest(device, &last.tensors, &masks, scope, amount(level))?.masks;
    }
    Ok(Found { masks, last })
}
