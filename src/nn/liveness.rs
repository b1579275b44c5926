//! Which features of a network's values matter under a ticket's masks: exactly those that are not always zero and that
//! something kept reads.
//!
//! A feature that nothing kept reads, through every norm, sum and shortcut, changes no output and gets no gradient. One
//! that is always zero adds nothing to what reads it, and the weights that read it get no gradient. Both can leave the
//! network exactly. A norm or a bias emits a constant even where its input has no kept weight, so that a feature is
//! always zero only where the ticket fixes γ and β, or the bias, to zero: masks may be of vectors too.

use std::collections::BTreeMap;

use super::model::{Layer, Model, ParameterId, ValueId};
use crate::mask::Mask;

/// What each feature of each value is.
pub struct Liveness {
    /// Whether it may be another number than zero.
    pub nonzero: Vec<Vec<bool>>,
    /// Whether something kept reads it.
    pub used: Vec<Vec<bool>>,
    /// Whether a batch norm reads it and makes something of it that is read: a constant at least, even of zeros.
    pub normed: Vec<Vec<bool>>,
}

/// Masks as the analysis asks for them.
struct Masks<'a> {
    model: &'a Model,
    masks: &'a BTreeMap<String, Mask>,
}

impl Masks<'_> {
    fn of(&self, id: ParameterId) -> Option<&Mask> {
        self.masks.get(&self.model.parameters[id].name)
    }

    /// Whether element `i` of a vector is trained.
    fn trains(&self, id: ParameterId, i: usize) -> bool {
        self.of(id).is_none_or(|mask| mask.get(i))
    }

    /// Calls `f(row, column)` for each pair of output and input feature that a kept weight joins.
    fn joined(&self, weight: ParameterId, mut f: impl FnMut(usize, usize)) {
        let parameter = &self.model.parameters[weight];
        let (inputs, fan_in) = (parameter.shape[1], parameter.fan_in());
        let taps = fan_in / inputs;
        let mask = self.of(weight);
        for (row, column) in (0..parameter.shape[0]).flat_map(|row| (0..inputs).map(move |column| (row, column))) {
            let first = row * fan_in + column * taps;
            if mask.is_none_or(|mask| (first..first + taps).any(|i| mask.get(i))) {
                f(row, column);
            }
        }
    }
}

impl Liveness {
    /// What the features of a model are under these masks; what has no mask is kept.
    pub fn new(model: &Model, masks: &BTreeMap<String, Mask>) -> Self {
        let none = || model.values.iter().map(|value| vec![false; value.features()]).collect::<Vec<_>>();
        let (mut nonzero, mut used, mut normed) = (none(), none(), none());
        let masks = Masks { model, masks };
        nonzero[0].fill(true);
        for layer in &model.layers {
            nonzero[layer.output()] = features_that_may_differ_from_zero(layer, &masks, &nonzero);
        }
        used[model.output()].fill(true);
        for layer in model.layers.iter().rev() {
            mark_what_is_read(layer, &masks, &mut used);
            if let Layer::Norm { scale, shift, input, output, .. } = *layer {
                let trained = |c: usize| masks.trains(scale, c) || masks.trains(shift, c);
                normed[input] = (0..).zip(&used[output]).map(|(c, used)| *used && trained(c)).collect();
            }
        }
        Liveness { nonzero, used, normed }
    }

    /// Whether a feature makes a difference.
    pub fn matters(&self, value: ValueId, feature: usize) -> bool {
        self.nonzero[value][feature] && self.used[value][feature] || self.normed[value][feature]
    }
}

/// The feature of a shortcut's input that a feature of its output is; none of the padding.
pub(super) fn shortcut_source(model: &Model, input: ValueId, output: ValueId, feature: usize) -> Option<usize> {
    let [from, to] = [input, output].map(|value| model.values[value].features());
    feature.checked_sub((to - from) / 2).filter(|&source| source < from)
}

fn features_that_may_differ_from_zero(layer: &Layer, masks: &Masks, nonzero: &[Vec<bool>]) -> Vec<bool> {
    let model = masks.model;
    let features = 0..model.values[layer.output()].features();
    let either = |a: ValueId, b: ValueId| nonzero[a].iter().zip(&nonzero[b]).map(|(a, b)| *a || *b).collect();
    match *layer {
        Layer::Conv { weight, bias, input, .. } => {
            let mut out: Vec<bool> = features.map(|k| bias.is_some_and(|bias| masks.trains(bias, k))).collect();
            masks.joined(weight, |row, column| out[row] |= nonzero[input][column]);
            out
        }
        // Running statistics of a file may be any: without γ and β it is zero, else it may not be.
        Layer::Norm { scale, shift, residual, .. } => {
            let added = |c: usize| residual.is_some_and(|residual| nonzero[residual][c]);
            features.map(|c| masks.trains(scale, c) || masks.trains(shift, c) || added(c)).collect()
        }
        Layer::Shortcut { input, output, .. } => {
            let source = |c| shortcut_source(model, input, output, c);
            features.map(|c| source(c).is_some_and(|source| nonzero[input][source])).collect()
        }
        Layer::Attention { input, .. } => {
            let values = 2 * features.end;
            features.map(|feature| nonzero[input][values + feature]).collect()
        }
        Layer::MaxPool { input, .. }
        | Layer::MeanPool { input, .. }
        | Layer::Gelu { input, .. }
        | Layer::Dropout { input, .. }
        | Layer::TokenPool { input, .. } => nonzero[input].clone(),
        Layer::Residual { input, branch, .. } => either(input, branch),
        Layer::Patches { .. } | Layer::Embed { .. } | Layer::LayerNorm { .. } => vec![true; features.end],
    }
}

fn mark_what_is_read(layer: &Layer, masks: &Masks, used: &mut [Vec<bool>]) {
    let model = masks.model;
    let of_output = used[layer.output()].clone();
    let features = 0..of_output.len();
    match *layer {
        Layer::Conv { weight, input, .. } => {
            masks.joined(weight, |row, column| used[input][column] |= of_output[row]);
        }
        Layer::Norm { scale, input, residual, .. } => {
            for c in features {
                used[input][c] |= of_output[c] && masks.trains(scale, c);
                if let Some(residual) = residual {
                    used[residual][c] |= of_output[c];
                }
            }
        }
        Layer::Shortcut { input, output, .. } => {
            for c in features {
                if let Some(source) = shortcut_source(model, input, output, c) {
                    used[input][source] |= of_output[c];
                }
            }
        }
        // A norm over features reads all of them, and patches are of all channels.
        Layer::LayerNorm { input, .. } | Layer::Patches { input, .. } => used[input].fill(true),
        // Queries and keys of a head are read where one of its outputs is.
        Layer::Attention { heads, input, .. } => {
            let (dim, head) = (features.end, features.end / heads);
            for feature in features {
                let group = feature / head * head;
                let any = of_output[group..group + head].contains(&true);
                used[input][feature] |= any;
                used[input][dim + feature] |= any;
                used[input][2 * dim + feature] |= of_output[feature];
            }
        }
        Layer::Residual { input, branch, .. } => {
            for feature in features {
                used[input][feature] |= of_output[feature];
                used[branch][feature] |= of_output[feature];
            }
        }
        Layer::MaxPool { input, .. }
        | Layer::MeanPool { input, .. }
        | Layer::Embed { input, .. }
        | Layer::Gelu { input, .. }
        | Layer::Dropout { input, .. }
        | Layer::TokenPool { input, .. } => {
            features.for_each(|feature| used[input][feature] |= of_output[feature]);
        }
    }
}
