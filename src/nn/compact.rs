//! A network without the features that do not matter under a ticket's masks: smaller tensors in every pass, the same
//! outputs and the same gradients of what is left.
//!
//! What may leave is what [`Liveness`] says; the layers say what must stay together: attention has whole heads, sums of
//! tokens and norms over features have all features. The images that residual branches are added to keep what matters in
//! any of them, and a batch norm writes the features that it reads into those of the sum. A value keeps one feature at
//! least, so that every tensor has a size.

use std::collections::BTreeMap;

use ndarray::ArrayD;

use super::liveness::{Liveness, shortcut_source};
use super::model::{Layer, Model, Parameter, STATISTICS, Shape, ValueId};
use super::weights::{Form, Weights};
use crate::device::Device;
use crate::error::Result;
use crate::mask::Mask;
use crate::ops::row_map::RowMap;

/// What is left of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compaction {
    /// Of each value, the features that are left, in rising order.
    features: Vec<Vec<u32>>,
    /// Of each parameter, the place that each element that is left has in the whole one; none where all are left.
    places: Vec<Option<Vec<u32>>>,
    /// The same of the elements that memory holds: all that are left, or the kept ones alone.
    stored: Vec<Option<Vec<u32>>>,
}

/// Sets of features of values while they are found.
struct Keep {
    features: Vec<Vec<bool>>,
    /// Whether norms and shortcuts write all features that they are added to.
    plain: bool,
}

impl Compaction {
    /// What is left of a model under masks, as a model of its own; what has no mask is kept.
    pub fn new(model: &Model, masks: &BTreeMap<String, Mask>) -> (Model, Self) {
        Self::keeping(model, masks, false)
    }

    /// What is left as a network of ordinary layers, which any framework can build: where residual branches write some
    /// features of a sum alone, they write all of them, zeros too.
    pub fn plain(model: &Model, masks: &BTreeMap<String, Mask>) -> (Model, Self) {
        Self::keeping(model, masks, true)
    }

    fn keeping(model: &Model, masks: &BTreeMap<String, Mask>, plain: bool) -> (Model, Self) {
        let keep = Keep::new(model, &Liveness::new(model, masks), plain);
        let listed = |keep: &Vec<bool>| (0u32..).zip(keep).filter(|(_, keep)| **keep).map(|(i, _)| i).collect();
        let features: Vec<Vec<u32>> = keep.features.iter().map(listed).collect();
        let places = places(model, &features);
        let compaction = Compaction { features, stored: places.clone(), places };
        (compaction.model(model), compaction)
    }

    /// Whether all of a model is left and stored.
    pub fn is_whole(&self) -> bool {
        self.stored.iter().all(Option::is_none)
    }

    /// Stores of what is left of a parameter these elements alone.
    pub(super) fn pack(&mut self, parameter: usize, kept: &[u32]) {
        let places = self.places[parameter].as_ref();
        let whole = |&place: &u32| places.map_or(place, |places| places[place as usize]);
        self.stored[parameter] = Some(kept.iter().map(whole).collect());
    }

    /// Number of elements of a parameter that memory holds, of so many that are left.
    pub(super) fn stored_len(&self, parameter: usize, left: usize) -> usize {
        self.stored[parameter].as_ref().map_or(left, Vec::len)
    }

    /// The features of a value that are left.
    pub fn features(&self, value: ValueId) -> &[u32] {
        &self.features[value]
    }

    /// What memory holds of the elements of a parameter.
    pub(super) fn gather<T: Copy>(&self, parameter: usize, whole: &[T]) -> Vec<T> {
        match &self.stored[parameter] {
            Some(places) => places.iter().map(|&place| whole[place as usize]).collect(),
            None => whole.to_vec(),
        }
    }

    /// Puts what memory holds of a parameter in its places.
    pub(super) fn scatter<T: Copy>(&self, parameter: usize, left: &[T], whole: &mut [T]) {
        match &self.stored[parameter] {
            Some(places) => places.iter().zip(left).for_each(|(&place, value)| whole[place as usize] = *value),
            None => whole.copy_from_slice(left),
        }
    }

    /// The mask of what memory holds of a parameter, element by element.
    pub(super) fn stored_mask(&self, parameter: usize, whole: &Mask) -> Mask {
        match &self.stored[parameter] {
            Some(places) => Mask::from_fn(&[places.len()], |i| whole.get(places[i] as usize)),
            None => whole.clone(),
        }
    }

    /// What is left of the mask of a parameter.
    pub fn mask(&self, parameter: usize, shape: &[usize], whole: &Mask) -> Mask {
        match &self.places[parameter] {
            Some(places) => Mask::from_fn(shape, |i| whole.get(places[i] as usize)),
            None => whole.clone(),
        }
    }

    /// The weights of what is left, pruned ones as zeros, without masks.
    ///
    /// # Errors
    /// As [`Weights::check_against`], if they are not those of the whole model.
    pub fn weights(&self, whole: &Model, left: &Model, weights: &Weights) -> Result<Weights> {
        weights.check_against(&whole.file_tensors())?;
        let mut small = Weights { metadata: weights.metadata.clone(), ..Weights::default() };
        let mut put = |name: &str, parameter: usize, shape: &[usize]| {
            let values: Vec<f32> = weights.written(name, &weights.tensors[name], Form::Plain).collect();
            let values = self.gather(parameter, &values);
            let array = ArrayD::from_shape_vec(shape.to_vec(), values).expect("as many as are left");
            small.tensors.insert(name.to_owned(), array);
        };
        for (id, parameter) in left.parameters.iter().enumerate() {
            put(&parameter.name, id, &parameter.shape);
        }
        for layer in &left.layers {
            let Layer::Norm { statistics, scale, .. } = *layer else { continue };
            let statistics = &left.statistics[statistics];
            STATISTICS.iter().for_each(|kind| {
                put(&format!("{}.{kind}", statistics.name), scale, &[statistics.features]);
            });
        }
        Ok(small)
    }

    /// For each layer that joins values with other features left in them: which is which.
    pub(super) fn maps(&self, device: &Device, model: &Model) -> Result<Vec<Option<RowMap>>> {
        let map = |layer: &Layer| {
            let (input, sources): (ValueId, Vec<Option<u32>>) = match *layer {
                Layer::Norm { input, output, .. } => {
                    (input, self.features[output].iter().map(|&feature| Some(feature)).collect())
                }
                Layer::Shortcut { input, output, .. } => {
                    let source = |&feature: &u32| shortcut_source(model, input, output, feature as usize);
                    let sources = self.features[output].iter().map(source);
                    (input, sources.map(|source| source.map(|source| source as u32)).collect())
                }
                _ => return Ok(None),
            };
            let left = &self.features[input];
            let whole = |value: ValueId| self.features[value].len() == model.values[value].features();
            let same = matches!(layer, Layer::Norm { .. }) && *left == self.features[layer.output()];
            if same || (whole(input) && whole(layer.output())) {
                return Ok(None);
            }
            let place = |feature: Option<u32>| left.binary_search(&feature?).ok();
            let sources: Vec<Option<usize>> = sources.into_iter().map(place).collect();
            RowMap::new(device, left.len(), &sources).map(Some)
        };
        model.layers.iter().map(map).collect()
    }

    /// The model of what is left.
    fn model(&self, whole: &Model) -> Model {
        let mut model = whole.clone();
        for (value, features) in model.values.iter_mut().zip(&self.features) {
            match &mut value.shape {
                Shape::Image([channels, ..]) => *channels = features.len(),
                Shape::Tokens { features: all, .. } => *all = features.len(),
            }
        }
        for layer in &mut model.layers {
            match *layer {
                Layer::Conv { weight, bias, input, output, .. } => {
                    let outputs = self.features[output].len();
                    model.parameters[weight].shape[0] = outputs;
                    // A patch embedding reads pixels of patches, which are all left: its own shape has channels.
                    if self.features[input].len() < whole.values[input].features() {
                        model.parameters[weight].shape[1] = self.features[input].len();
                    }
                    if let Some(bias) = bias {
                        model.parameters[bias].shape = vec![outputs];
                    }
                }
                Layer::Norm { scale, shift, statistics, input, .. } => {
                    let features = self.features[input].len();
                    model.parameters[scale].shape = vec![features];
                    model.parameters[shift].shape = vec![features];
                    model.statistics[statistics].features = features;
                }
                Layer::Attention { ref mut heads, output, .. } => {
                    *heads = *heads * self.features[output].len() / whole.values[output].features();
                }
                _ => {}
            }
        }
        model
    }
}

impl Keep {
    fn new(model: &Model, liveness: &Liveness, plain: bool) -> Self {
        let matters = |value: ValueId| {
            (0..model.values[value].features()).map(|feature| liveness.matters(value, feature)).collect()
        };
        let mut keep = Keep { features: (0..model.values.len()).map(matters).collect(), plain };
        keep.features[0].fill(true);
        keep.features[model.output()].fill(true);
        // Sets only grow, and each layer's demands are met by growing: this comes to an end.
        loop {
            let before: usize = keep.count();
            model.layers.iter().for_each(|layer| keep.meet(layer));
            if keep.count() == before {
                return keep;
            }
        }
    }

    fn count(&self) -> usize {
        self.features.iter().flatten().filter(|keep| **keep).count()
    }

    /// Grows the sets of a layer's values to what the layer needs.
    fn meet(&mut self, layer: &Layer) {
        let output = layer.output();
        if !self.features[output].contains(&true) {
            self.features[output][0] = true;
        }
        match *layer {
            Layer::Shortcut { input, .. } if self.plain => {
                self.features[input].fill(true);
                self.features[output].fill(true);
            }
            Layer::Conv { .. } | Layer::Shortcut { .. } => {}
            // It writes what it reads among what else there is; what it is added to has the features of the sum.
            Layer::Norm { input, residual, .. } => {
                residual.into_iter().for_each(|residual| self.tie(residual, output));
                if self.plain {
                    self.tie(input, output);
                }
                if !self.features[input].contains(&true) {
                    let first = self.features[output].iter().position(|keep| *keep).expect("one is kept");
                    self.features[input][first] = true;
                }
                let own = self.features[input].clone();
                self.features[output].iter_mut().zip(own).for_each(|(keep, own)| *keep |= own);
            }
            Layer::Attention { heads, input, .. } => {
                let (dim, head) = (self.features[output].len(), self.features[output].len() / heads);
                for first in (0..dim).step_by(head) {
                    let parts = [0, dim, 2 * dim].map(|part| part + first..part + first + head);
                    let any = self.features[output][first..first + head].contains(&true)
                        || parts.iter().any(|part| self.features[input][part.clone()].contains(&true));
                    if any {
                        self.features[output][first..first + head].fill(true);
                        parts.into_iter().for_each(|part| self.features[input][part].fill(true));
                    }
                }
            }
            // Random draws are those of whole tensors.
            Layer::Dropout { rate, input, .. } if rate > 0.0 => {
                self.features[input].fill(true);
                self.features[output].fill(true);
            }
            Layer::MaxPool { input, .. }
            | Layer::MeanPool { input, .. }
            | Layer::Gelu { input, .. }
            | Layer::Dropout { input, .. }
            | Layer::TokenPool { input, .. } => self.tie(input, output),
            Layer::Patches { .. } | Layer::Embed { .. } | Layer::LayerNorm { .. } | Layer::Residual { .. } => {
                layer.inputs().chain([output]).for_each(|value| self.features[value].fill(true));
            }
        }
    }

    /// Gives two values the same features.
    fn tie(&mut self, a: ValueId, b: ValueId) {
        for feature in 0..self.features[a].len() {
            let either = self.features[a][feature] || self.features[b][feature];
            (self.features[a][feature], self.features[b][feature]) = (either, either);
        }
    }
}

/// The places of what is left of each parameter.
fn places(model: &Model, features: &[Vec<u32>]) -> Vec<Option<Vec<u32>>> {
    let mut places = vec![None; model.parameters.len()];
    let whole = |value: ValueId| features[value].len() == model.values[value].features();
    for layer in &model.layers {
        match *layer {
            Layer::Conv { weight, bias, input, output, .. } => {
                if !whole(input) || !whole(output) {
                    places[weight] =
                        Some(weight_places(&model.parameters[weight], &features[output], &features[input]));
                }
                if let Some(bias) = bias.filter(|_| !whole(output)) {
                    places[bias] = Some(features[output].clone());
                }
            }
            Layer::Norm { scale, shift, input, .. } if !whole(input) => {
                places[scale] = Some(features[input].clone());
                places[shift] = Some(features[input].clone());
            }
            _ => {}
        }
    }
    places
}

fn weight_places(parameter: &Parameter, rows: &[u32], columns: &[u32]) -> Vec<u32> {
    let fan_in = parameter.fan_in() as u32;
    let taps = fan_in / parameter.shape[1] as u32;
    let row = |&row: &u32| {
        columns.iter().flat_map(move |&column| (0..taps).map(move |tap| row * fan_in + column * taps + tap))
    };
    rows.iter().flat_map(row).collect()
}
