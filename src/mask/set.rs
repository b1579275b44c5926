//! The masks of a network's weight tensors together, and their set algebra, which runs as kernels on a device.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Mask;
use crate::device::{Buffer, Device};
use crate::error::{Error, Result};
use crate::ops::prune::{MaskOp, mask_combine, mask_consensus};

/// Masks by name of their weights, in the order of the model's parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaskSet {
    layers: Vec<(String, Mask)>,
}

/// How a mask divides a layer's weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerCount {
    /// Name of the weights.
    pub name: String,
    /// Number of weights.
    pub total: usize,
    /// Number of weights that are kept.
    pub kept: usize,
}

/// How much two masks or more have in common, beside what independent masks of the same densities would.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Overlap {
    /// Kept by all, divided by kept by any.
    pub jaccard: f64,
    /// The same of independent masks: expected counts of each layer, summed over layers before dividing.
    pub chance: f64,
    /// The same for each layer.
    pub layers: Vec<LayerOverlap>,
}

/// [`Overlap`] of a layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerOverlap {
    /// Name of the weights.
    pub name: String,
    /// Kept by all, divided by kept by any; 1 where none is kept by any.
    pub jaccard: f64,
    /// The same of independent masks.
    pub chance: f64,
}

impl MaskSet {
    /// Masks in the order of the model's parameters.
    pub fn new(layers: Vec<(String, Mask)>) -> Self {
        MaskSet { layers }
    }

    /// The masks of a file in the order of `names`.
    ///
    /// # Errors
    /// [`Error::Usage`] if a mask is missing or one is not in `names`.
    pub fn from_file(masks: &BTreeMap<String, Mask>, names: &[String]) -> Result<Self> {
        if let Some(stray) = masks.keys().find(|name| !names.contains(name)) {
            return Err(Error::Usage(format!("mask of '{stray}': the model has no such weights that can be pruned")));
        }
        let find = |name: &String| match masks.get(name) {
            Some(mask) => Ok((name.clone(), mask.clone())),
            None => Err(Error::Usage(format!("the ticket has no mask of '{name}'"))),
        };
        Ok(MaskSet { layers: names.iter().map(find).collect::<Result<_>>()? })
    }

    /// The masks of weights in a file: of tensors with two dimensions or more. Those of vectors, which fix norms and
    /// biases to zero, are no part of a density.
    pub fn of_weights(masks: &BTreeMap<String, Mask>) -> Self {
        let weights = masks.iter().filter(|(_, mask)| mask.shape().len() > 1);
        MaskSet { layers: weights.map(|(name, mask)| (name.clone(), mask.clone())).collect() }
    }

    /// Name and mask of each layer.
    pub fn layers(&self) -> &[(String, Mask)] {
        &self.layers
    }

    /// The mask of a layer.
    pub fn get(&self, name: &str) -> Option<&Mask> {
        self.layers.iter().find(|(layer, _)| layer == name).map(|(_, mask)| mask)
    }

    /// Masks for a file.
    pub fn to_file(&self) -> BTreeMap<String, Mask> {
        self.layers.iter().cloned().collect()
    }

    /// Number of weights.
    pub fn total(&self) -> usize {
        self.layers.iter().map(|(_, mask)| mask.len()).sum()
    }

    /// Number of weights that are kept.
    pub fn kept(&self) -> usize {
        self.layers.iter().map(|(_, mask)| mask.count()).sum()
    }

    /// Kept weights / all weights; 1 if there are none.
    pub fn density(&self) -> f64 {
        if self.total() == 0 { 1.0 } else { self.kept() as f64 / self.total() as f64 }
    }

    /// Counts of each layer.
    pub fn counts(&self) -> Vec<LayerCount> {
        let count =
            |(name, mask): &(String, Mask)| LayerCount { name: name.clone(), total: mask.len(), kept: mask.count() };
        self.layers.iter().map(count).collect()
    }

    /// Names of the layers of which nothing is kept.
    pub fn empty_layers(&self) -> Vec<String> {
        self.counts().into_iter().filter(|layer| layer.kept == 0).map(|layer| layer.name).collect()
    }

    /// Kept by both, divided by kept by either; none if neither keeps anything, or their layers differ.
    pub fn jaccard(&self, other: &MaskSet) -> Option<f64> {
        self.check_same_layers(other).ok()?;
        let words =
            || self.layers.iter().zip(&other.layers).flat_map(|((_, a), (_, b))| a.words().iter().zip(b.words()));
        let both: u32 = words().map(|(a, b)| (a & b).count_ones()).sum();
        let either: u32 = words().map(|(a, b)| (a | b).count_ones()).sum();
        (either > 0).then(|| f64::from(both) / f64::from(either))
    }

    /// All words, one layer after the other.
    fn words(&self) -> Vec<u32> {
        self.layers.iter().flat_map(|(_, mask)| mask.words().iter().copied()).collect()
    }

    /// A set with the same layers and these words.
    fn with_words(&self, words: &[u32]) -> Result<Self> {
        let mut rest = words;
        let mut layers = Vec::new();
        for (name, mask) in &self.layers {
            let (these, after) = rest.split_at(mask.words().len());
            layers.push((name.clone(), Mask::from_words(mask.shape(), these.to_vec())?));
            rest = after;
        }
        Ok(MaskSet { layers })
    }

    /// Refuses a set of other layers.
    fn check_same_layers(&self, other: &MaskSet) -> Result<()> {
        let shape =
            |set: &MaskSet, i: usize| set.layers.get(i).map(|(name, mask)| (name.clone(), mask.shape().to_vec()));
        let different = |&i: &usize| shape(self, i) != shape(other, i);
        match (0..self.layers.len().max(other.layers.len())).find(different) {
            None => Ok(()),
            Some(i) => {
                let text = |set| shape(set, i).map_or("nothing".into(), |(name, shape)| format!("{name} {shape:?}"));
                let (expected, got) = (text(self), text(other));
                Err(Error::Usage(format!("masks of different networks: layer {i}: expected {expected}, got {got}")))
            }
        }
    }

    /// A set operation with another set of the same layers.
    ///
    /// # Errors
    /// [`Error::Usage`] if the layers differ; [`Error::Launch`] if the device fails.
    pub fn combine(&self, device: &Device, op: MaskOp, other: &MaskSet) -> Result<MaskSet> {
        self.check_same_layers(other)?;
        let (a, b) = (device.upload(&self.words())?, device.upload(&other.words())?);
        let mut out: Buffer<u32> = device.alloc(a.len())?;
        mask_combine(device, op, a.view(), b.view(), out.view_mut())?;
        self.with_words(&device.read(out.view())?)
    }

    /// What at least `at_least` of the sets keep: all of them the intersection, one the union.
    ///
    /// # Errors
    /// [`Error::Usage`] if the layers differ, there are no sets, or `at_least` is not 1 to their number.
    pub fn consensus(device: &Device, sets: &[&MaskSet], at_least: usize) -> Result<MaskSet> {
        let Some(first) = sets.first() else {
            return Err(Error::Usage("consensus: expected at least one ticket".into()));
        };
        if !(1..=sets.len()).contains(&at_least) {
            let k = sets.len();
            return Err(Error::Usage(format!(
                "consensus: --at-least: expected 1 to {k}, the number of masks, got {at_least}"
            )));
        }
        sets.iter().try_for_each(|set| first.check_same_layers(set))?;
        let stack: Vec<u32> = sets.iter().flat_map(|set| set.words()).collect();
        let stack = device.upload(&stack)?;
        let mut out: Buffer<u32> = device.alloc(stack.len() / sets.len())?;
        mask_consensus(device, stack.view(), sets.len(), at_least, out.view_mut())?;
        first.with_words(&device.read(out.view())?)
    }

    /// How much some sets have in common, and what chance would give them.
    ///
    /// # Errors
    /// As [`MaskSet::consensus`].
    pub fn overlap(device: &Device, sets: &[&MaskSet]) -> Result<Overlap> {
        let all = Self::consensus(device, sets, sets.len())?;
        let any = Self::consensus(device, sets, 1)?;
        let ratio = |part: f64, whole: f64| if whole == 0.0 { 1.0 } else { part / whole };
        let (mut expected_all, mut expected_any) = (0.0, 0.0);
        let mut layers = Vec::new();
        for (i, (name, mask)) in all.layers.iter().enumerate() {
            let densities = sets.iter().map(|set| set.layers[i].1.density());
            let weights = mask.len() as f64;
            let both = weights * densities.clone().product::<f64>();
            let either = weights * (1.0 - densities.map(|density| 1.0 - density).product::<f64>());
            expected_all += both;
            expected_any += either;
            let jaccard = ratio(mask.count() as f64, any.layers[i].1.count() as f64);
            layers.push(LayerOverlap { name: name.clone(), jaccard, chance: ratio(both, either) });
        }
        let jaccard = ratio(all.kept() as f64, any.kept() as f64);
        Ok(Overlap { jaccard, chance: ratio(expected_all, expected_any), layers })
    }
}
