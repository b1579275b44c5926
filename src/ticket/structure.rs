//! Structured tickets (Chen et al. 2022, arXiv 2202.04736): what a ticket keeps, moved into whole rows or into blocks
//! that are dense, so that a device multiplies less instead of multiplying zeros.
//!
//! - *Refill*: of each layer `n = floor(kept weights / weights of a row)` output rows, at least one, the best by score,
//!   become dense, the others are removed: output channels of convolutions, hidden features of perceptrons, heads of
//!   attention. The norm or the bias of a removed row is fixed to zero, so that the row is always zero. *Refill+* keeps
//!   `floor(growth (rows - n))` more.
//! - *Regroup*: rows with similar masks form groups. Of each group the columns that most rows keep become dense, as few as
//!   leave every row more than `threshold` times what it loses; everything else is removed.
//!
//! Layers whose rows are not free (the classifier, and what is added to a transformer's tokens) keep all of them under
//! refill. Weights that read what is always zero are removed: they would get no gradient.

use std::collections::BTreeMap;

use ndarray::ArrayD;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::mask::groups::group_rows;
use crate::mask::set::MaskSet;
use crate::nn::liveness::Liveness;
use crate::nn::model::{Layer, Model, ParameterId, ValueId};

/// How a ticket becomes structured.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Structure {
    /// Rows that fit into the number of kept weights become dense, the others are removed.
    Refill,
    /// The same with more rows.
    #[value(name = "refill+")]
    #[serde(rename = "refill+")]
    RefillPlus,
    /// Groups of similar rows become dense in the columns that most of them keep.
    Regroup,
}

/// What a row of a layer is worth, from elsewhere: of each weight tensor by name.
pub enum Scores<'a> {
    /// The number of its kept weights.
    Count,
    /// The magnitudes of these weights, where they are kept.
    L1(&'a BTreeMap<String, ArrayD<f32>>),
    /// Given values, one a row.
    Given(&'a BTreeMap<String, Vec<f64>>),
}

/// How a ticket is made structured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Structuring {
    /// Which method.
    pub method: Structure,
    /// Share of the removed rows that refill+ keeps beside.
    pub growth: f64,
    /// Most rows of a group.
    pub group: usize,
    /// A row keeps more than so many times what it loses to regroup.
    pub threshold: f64,
}

/// A structured ticket.
#[derive(Clone, Debug)]
pub struct Structured {
    /// What is kept of the weights.
    pub masks: MaskSet,
    /// Norms and biases of removed rows, which are fixed to zero.
    pub fixed: BTreeMap<String, Mask>,
    /// What changed in each layer.
    pub layers: Vec<LayerChange>,
}

/// What became of a layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerChange {
    /// Name of the weights.
    pub name: String,
    /// Number of weights.
    pub total: usize,
    /// Kept weights of the ticket.
    pub before: usize,
    /// Kept weights of the structured ticket.
    pub after: usize,
    /// Kept now, not before.
    pub added: usize,
    /// Kept before, not now.
    pub removed: usize,
    /// Rows of which something is kept.
    pub rows: usize,
    /// Blocks of rows and columns that are dense.
    pub blocks: usize,
}

/// What may be removed of a layer's output.
#[derive(Clone, Copy)]
enum Rows {
    /// Each row, with this γ and β, or this bias.
    Single([Option<ParameterId>; 2]),
    /// Whole heads, of so many features: queries, keys and values.
    Heads { features: usize, bias: Option<ParameterId> },
    /// None.
    All,
}

impl Structure {
    /// Its name in options and files.
    pub fn name(self) -> &'static str {
        match self {
            Structure::Refill => "refill",
            Structure::RefillPlus => "refill+",
            Structure::Regroup => "regroup",
        }
    }
}

impl Structuring {
    /// Refuses settings that mean nothing.
    ///
    /// # Errors
    /// [`Error::Usage`] names the option, what was expected and what it is.
    pub fn check(&self) -> Result<()> {
        let refuse = |option: &str, expected: &str, got: f64| {
            Err(Error::Usage(format!("{option}: expected {expected}, got {got}")))
        };
        match self {
            _ if !(self.growth > 0.0 && self.growth <= 1.0) => refuse("--growth", "above 0 and at most 1", self.growth),
            _ if self.group == 0 => refuse("--group", "at least 1", 0.0),
            _ if !(self.threshold > 0.0 && self.threshold.is_finite()) => {
                refuse("--threshold", "above 0", self.threshold)
            }
            _ => Ok(()),
        }
    }

    /// Makes a ticket of `model` structured.
    ///
    /// # Errors
    /// [`Error::Usage`] if scores are missing or of another shape.
    pub fn apply(&self, model: &Model, masks: &MaskSet, scores: &Scores) -> Result<Structured> {
        self.check()?;
        let mut structured = masks.to_file();
        let mut fixed = BTreeMap::new();
        let mut blocks = BTreeMap::new();
        for layer in &model.layers {
            let &Layer::Conv { weight, bias, output, .. } = layer else { continue };
            let name = &model.parameters[weight].name;
            let Some(mask) = masks.get(name) else { continue };
            let made = match self.method {
                Structure::Regroup => {
                    let (made, count) = self.regroup(mask);
                    blocks.insert(name.clone(), count);
                    made
                }
                _ => {
                    let rows = rows_of(model, bias, output);
                    let (made, kept_rows) = self.refill(mask, rows, &row_scores(name, mask, scores)?);
                    for (vector, keep) in vectors_of(rows, &kept_rows) {
                        let vector = &model.parameters[vector];
                        fixed.insert(vector.name.clone(), Mask::from_fn(&vector.shape, |i| keep[i]));
                    }
                    made
                }
            };
            structured.insert(name.clone(), made);
        }
        let all = structured.iter().chain(&fixed).map(|(name, mask)| (name.clone(), mask.clone())).collect();
        remove_what_reads_zeros(model, &Liveness::new(model, &all), &mut structured);
        let change = |(name, before): &(String, Mask)| {
            let after = &structured[name];
            let count = |of: &dyn Fn(bool, bool) -> bool| {
                before.iter().zip(after.iter()).filter(|&(before, after)| of(before, after)).count()
            };
            let rows = after.shape()[0];
            let fan_in = after.len() / rows.max(1);
            LayerChange {
                name: name.clone(),
                total: after.len(),
                before: before.count(),
                after: after.count(),
                added: count(&|before, after| after && !before),
                removed: count(&|before, after| before && !after),
                rows: (0..rows).filter(|row| (row * fan_in..(row + 1) * fan_in).any(|i| after.get(i))).count(),
                blocks: blocks.get(name).copied().unwrap_or(usize::from(after.count() > 0)),
            }
        };
        let layers = masks.layers().iter().map(change).collect();
        let names = masks.layers().iter().map(|(name, _)| (name.clone(), structured[name].clone()));
        Ok(Structured { masks: MaskSet::new(names.collect()), fixed, layers })
    }

    /// Dense rows in place of what a layer's mask keeps, and which rows those are.
    fn refill(&self, mask: &Mask, rows: Rows, scores: &[f64]) -> (Mask, Vec<bool>) {
        let count = mask.shape()[0];
        let fan_in = mask.len() / count;
        let (units, per_unit) = match rows {
            Rows::Single(_) => (count, 1),
            Rows::Heads { features, .. } => (count / 3 / features, 3 * features),
            Rows::All => (1, count),
        };
        let unit_of = |row: usize| match rows {
            Rows::Single(_) => row,
            Rows::Heads { features, .. } => row % (count / 3) / features,
            Rows::All => 0,
        };
        let mut keep = mask.count() / (per_unit * fan_in);
        if let Structure::RefillPlus = self.method {
            keep += (self.growth * (units - keep) as f64) as usize;
        }
        let keep = if mask.count() == 0 { 0 } else { keep.max(1) };
        let mut score = vec![0.0; units];
        scores.iter().enumerate().for_each(|(row, value)| score[unit_of(row)] += value);
        let mut order: Vec<usize> = (0..units).collect();
        order.sort_by(|&a, &b| score[b].total_cmp(&score[a]).then(a.cmp(&b)));
        let mut kept = vec![false; units];
        order[..keep].iter().for_each(|&unit| kept[unit] = true);
        let kept: Vec<bool> = (0..count).map(|row| kept[unit_of(row)]).collect();
        (Mask::from_fn(mask.shape(), |i| kept[i / fan_in]), kept)
    }

    /// Dense blocks in place of what a layer's mask keeps, and their number.
    fn regroup(&self, mask: &Mask) -> (Mask, usize) {
        let fan_in = mask.len() / mask.shape()[0];
        let mut rows = vec![Vec::new(); mask.shape()[0]];
        for i in (0..mask.len()).filter(|&i| mask.get(i)) {
            rows[i / fan_in].push((i % fan_in) as u32);
        }
        let live: Vec<usize> = (0..rows.len()).filter(|&row| !rows[row].is_empty()).collect();
        let kept: Vec<Vec<u32>> = live.iter().map(|&row| rows[row].clone()).collect();
        let mut keep = vec![false; mask.len()];
        let groups = group_rows(&kept, fan_in, self.group);
        for group in &groups {
            let columns = self.columns_of(group.iter().map(|&row| &kept[row][..]), fan_in);
            for &row in group {
                columns.iter().for_each(|&column| keep[live[row] * fan_in + column as usize] = true);
            }
        }
        (Mask::from_fn(mask.shape(), |i| keep[i]), groups.len())
    }

    /// The columns that most rows keep, as few as leave each row more than `threshold` times what it loses.
    fn columns_of<'a>(&self, rows: impl Iterator<Item = &'a [u32]> + Clone, columns: usize) -> Vec<u32> {
        let mut keepers: Vec<Vec<usize>> = vec![Vec::new(); columns];
        for (row, kept) in rows.clone().enumerate() {
            kept.iter().for_each(|&column| keepers[column as usize].push(row));
        }
        let mut lost: Vec<usize> = rows.map(<[u32]>::len).collect();
        let mut stays = vec![0usize; lost.len()];
        let mut unhappy = lost.len();
        let mut order: Vec<u32> = (0..columns as u32).filter(|&column| !keepers[column as usize].is_empty()).collect();
        order.sort_by_key(|&column| (std::cmp::Reverse(keepers[column as usize].len()), column));
        let enough = |stays: usize, lost: usize| stays as f64 > self.threshold * lost as f64;
        let mut taken = Vec::new();
        for column in order {
            if unhappy == 0 {
                break;
            }
            for &row in &keepers[column as usize] {
                let before = enough(stays[row], lost[row]);
                (stays[row], lost[row]) = (stays[row] + 1, lost[row] - 1);
                unhappy -= usize::from(!before && enough(stays[row], lost[row]));
            }
            taken.push(column);
        }
        taken
    }
}

/// The score of each row of a layer.
fn row_scores(name: &str, mask: &Mask, scores: &Scores) -> Result<Vec<f64>> {
    let rows = mask.shape()[0];
    let fan_in = mask.len() / rows;
    let sums = |of: &dyn Fn(usize) -> f64| -> Vec<f64> {
        let kept = |row: usize| (row * fan_in..(row + 1) * fan_in).filter(|&i| mask.get(i));
        (0..rows).map(|row| kept(row).map(of).sum()).collect()
    };
    let missing = || Error::Usage(format!("scores of '{name}': expected one for each of {rows} rows"));
    match scores {
        Scores::Count => Ok(sums(&|_| 1.0)),
        Scores::L1(weights) => {
            let weights = weights.get(name).filter(|tensor| tensor.shape() == mask.shape()).ok_or_else(missing)?;
            let values: Vec<f32> = weights.iter().copied().collect();
            Ok(sums(&|i| f64::from(values[i].abs())))
        }
        Scores::Given(given) => given.get(name).filter(|values| values.len() == rows).cloned().ok_or_else(missing),
    }
}

/// What may be removed of the output of a layer, from the layer that reads it.
fn rows_of(model: &Model, bias: Option<ParameterId>, output: ValueId) -> Rows {
    let reader = model.layers.iter().find(|layer| layer.inputs().any(|input| input == output));
    match reader {
        Some(&Layer::Norm { input, scale, shift, .. }) if input == output => Rows::Single([Some(scale), Some(shift)]),
        Some(Layer::Gelu { .. }) => Rows::Single([bias, None]),
        Some(&Layer::Attention { heads, output, .. }) => {
            Rows::Heads { features: model.values[output].features() / heads, bias }
        }
        _ => Rows::All,
    }
}

/// The vectors that belong to the rows of a layer, and which of their elements stay.
fn vectors_of(rows: Rows, kept: &[bool]) -> impl Iterator<Item = (ParameterId, &[bool])> {
    let vectors = match rows {
        Rows::Single(vectors) => vectors,
        Rows::Heads { bias, .. } => [bias, None],
        Rows::All => [None, None],
    };
    vectors.into_iter().flatten().map(move |vector| (vector, kept))
}

/// Removes the weights that read features which are always zero.
fn remove_what_reads_zeros(model: &Model, liveness: &Liveness, masks: &mut BTreeMap<String, Mask>) {
    for layer in &model.layers {
        let &Layer::Conv { weight, input, .. } = layer else { continue };
        let parameter = &model.parameters[weight];
        let Some(mask) = masks.get_mut(&parameter.name) else { continue };
        let (fan_in, inputs) = (parameter.fan_in(), parameter.shape[1]);
        let column = |i: usize| i % fan_in / (fan_in / inputs);
        *mask = Mask::from_fn(&parameter.shape, |i| mask.get(i) && liveness.nonzero[input][column(i)]);
    }
}
