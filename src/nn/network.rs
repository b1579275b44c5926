//! A network with memory on a device: its forward and backward passes, layer by layer.

use std::collections::BTreeSet;

use super::model::{Layer, Model, ParameterId, ParameterKind, STATISTICS, ValueId};
use super::plan::{Fixed, Mode, Plan, aligned};
use super::weights::Weights;
use crate::device::{Buffer, Device, Slice, SliceMut};
use crate::error::Result;
use crate::mask::Mask;
use crate::mask::set::MaskSet;
use crate::ops::conv::{Bias, conv_bias_gradient, conv_forward, conv_input_gradient, conv_weight_gradient};
use crate::ops::norm::{
    NormAffine, NormBackward, NormInput, NormRunning, NormSaved, norm_backward, norm_eval, norm_forward,
};
use crate::ops::optimizer::{Clip, OptimizerInput, Sgd, gradient_norm, sgd_step};
use crate::ops::pointwise::{shortcut_backward, shortcut_forward};
use crate::ops::pool::{max_pool_backward, max_pool_forward, mean_pool_backward, mean_pool_forward};
use crate::ops::prune::apply_mask;
use crate::ops::{Columns, SAMPLE_ALIGNMENT};

/// Added to a variance before its root is taken; PyTorch's default.
const NORM_EPSILON: f32 = 1e-5;
/// Share of the batch's statistics in the running ones; PyTorch's default.
const NORM_MOMENTUM: f32 = 0.1;

/// A network on a device.
pub struct Network {
    device: Device,
    model: Model,
    plan: Plan,
    /// Samples of a batch, a multiple of 8.
    n: usize,
    parameters: Buffer<f32>,
    gradients: Buffer<f32>,
    velocity: Buffer<f32>,
    /// One bit per parameter: 0 where it is pruned.
    mask: Buffer<u32>,
    /// One bit per parameter: 1 where weight decay applies.
    decay: Buffer<u32>,
    /// One bit per parameter: 1 where it is trained; everywhere if there is none.
    trainable: Option<Buffer<u32>>,
    /// Names of the parameters whose masks were loaded.
    masked: BTreeSet<String>,
    statistics: Buffer<f32>,
    saved: Buffer<f32>,
    scratch: Buffer<f32>,
    partials: Buffer<f32>,
    labels: Buffer<u32>,
    count: Buffer<u32>,
    rate: Buffer<f32>,
    corrections: Buffer<f32>,
    step: Buffer<u32>,
    values: Vec<Buffer<f32>>,
    value_gradients: Vec<Buffer<f32>>,
    pool_indices: Vec<Buffer<u8>>,
}

/// What a step reads of its batch, filled by the loader.
pub struct Batch<'a> {
    /// Images, `[C, H, W, n]`.
    pub x: SliceMut<'a, f32>,
    /// Labels, `[n]`.
    pub labels: SliceMut<'a, u32>,
    /// Number of true samples, `[1]`.
    pub count: SliceMut<'a, u32>,
    /// Learning rate, `[1]`.
    pub rate: SliceMut<'a, f32>,
    /// Bias corrections of AdamW's moments, `[2]`.
    pub corrections: SliceMut<'a, f32>,
    /// Steps since training began, `[1]`.
    pub step: SliceMut<'a, u32>,
}

/// What the loss reads and writes.
pub struct Head<'a> {
    /// Logits, `[classes, n]`.
    pub logits: Slice<'a, f32>,
    /// Labels, `[n]`.
    pub labels: Slice<'a, u32>,
    /// Number of true samples, `[1]`.
    pub count: Slice<'a, u32>,
    /// Gradient of the logits, in a network that is trained.
    pub gradient: Option<SliceMut<'a, f32>>,
}

impl Network {
    /// Allocates a network for batches of up to `batch` samples. Parameters are zero, masks keep everything, running
    /// statistics are 0 and 1.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when memory runs out.
    pub fn new(device: &Device, model: &Model, batch: usize, mode: Mode) -> Result<Self> {
        let plan = Plan::new(device, model, batch, mode)?;
        let arena = device.alloc::<u32>(plan.bytes / 4)?;
        let mut pieces = arena.split(&plan.pieces);
        let mut rest = pieces.split_off(Fixed::Pieces as usize);
        let mut piece = |which: Fixed| std::mem::take(&mut pieces[which as usize]);
        let values = 1 + plan.value_slots.iter().max().expect("there is an input");
        let gradients = plan.gradient_slots.iter().flatten().max().map_or(0, |slot| slot + 1);
        let pool_indices = rest.split_off(values + gradients).into_iter().map(Buffer::cast).collect();
        let value_gradients = rest.split_off(values).into_iter().map(Buffer::cast).collect();
        let mut network = Network {
            device: device.clone(),
            model: model.clone(),
            n: batch.next_multiple_of(SAMPLE_ALIGNMENT),
            parameters: piece(Fixed::Parameters).cast(),
            gradients: piece(Fixed::Gradients).cast(),
            velocity: piece(Fixed::Velocity).cast(),
            mask: piece(Fixed::Mask),
            decay: piece(Fixed::Decay),
            trainable: None,
            masked: BTreeSet::new(),
            statistics: piece(Fixed::Statistics).cast(),
            saved: piece(Fixed::Saved).cast(),
            scratch: piece(Fixed::Scratch).cast(),
            partials: piece(Fixed::Partials).cast(),
            labels: piece(Fixed::Labels),
            count: piece(Fixed::Count),
            rate: piece(Fixed::Rate).cast(),
            corrections: piece(Fixed::Corrections).cast(),
            step: piece(Fixed::Step),
            values: rest.into_iter().map(Buffer::cast).collect(),
            value_gradients,
            pool_indices,
            plan,
        };
        let everything = network.bits(|_| true);
        device.write(&everything, network.mask.view_mut())?;
        network.set_statistics(|_| None)?;
        Ok(network)
    }

    /// The device it lies on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What it is made of.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Where its tensors lie.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Where the loader puts a batch.
    pub fn batch(&mut self) -> Batch<'_> {
        Batch {
            x: self.values[self.plan.value_slots[0]].view_mut(),
            labels: self.labels.view_mut(),
            count: self.count.view_mut(),
            rate: self.rate.view_mut(),
            corrections: self.corrections.view_mut(),
            step: self.step.view_mut(),
        }
    }

    /// What the loss reads and writes after a forward pass.
    pub fn head(&mut self) -> Head<'_> {
        let output = self.model.output();
        let gradient = self.plan.gradient_slots[output].map(|slot| self.value_gradients[slot].view_mut());
        Head {
            logits: self.values[self.plan.value_slots[output]].view(),
            labels: self.labels.view(),
            count: self.count.view(),
            gradient,
        }
    }

    fn value(&self, value: ValueId) -> Slice<'_, f32> {
        self.values[self.plan.value_slots[value]].view()
    }

    fn parameter(&self, id: ParameterId) -> Slice<'_, f32> {
        self.parameters.slice(self.range(id))
    }

    fn range(&self, id: ParameterId) -> std::ops::Range<usize> {
        let start = self.plan.parameters[id];
        start..start + self.model.parameters[id].elements()
    }

    /// Running mean and variance of a norm, in the statistics arena.
    fn statistic_ranges(&self, index: usize) -> [std::ops::Range<usize>; 2] {
        let (start, features) = (self.plan.statistics[index], self.model.statistics[index].features);
        [0, aligned(features)].map(|offset| start + offset..start + offset + features)
    }

    // ------------------------------------------------------------------------------------------------- the passes

    /// The forward pass: with batch statistics in training, which also move the running ones; else with those.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if the device fails.
    pub fn forward(&mut self, mode: Mode) -> Result<()> {
        let mut pools = 0;
        for index in 0..self.model.layers.len() {
            let layer = self.model.layers[index].clone();
            let slot = self.plan.value_slots[layer.output()];
            let mut y = std::mem::take(&mut self.values[slot]);
            match &layer {
                Layer::Conv { weight, bias, input, .. } => {
                    let (shape, columns) = (self.model.conv_shape(&layer, self.n)?, Columns::samples(self.n)?);
                    let bias = bias.map(|bias| Bias { bias: self.parameter(bias), columns, count: self.count.view() });
                    let (x, w) = (self.value(*input), self.parameter(*weight));
                    conv_forward(&self.device, &shape, x, w, bias, y.view_mut())?;
                }
                Layer::Norm { .. } => self.norm_forward(&layer, mode, y.view_mut())?,
                Layer::Shortcut { input, .. } => {
                    let shape = self.model.shortcut_shape(&layer, self.n)?;
                    shortcut_forward(&self.device, &shape, self.value(*input), y.view_mut())?;
                }
                Layer::MaxPool { input, .. } => {
                    let shape = self.model.pool_shape(&layer, self.n)?;
                    let mut picked = std::mem::take(&mut self.pool_indices[pools]);
                    max_pool_forward(&self.device, &shape, self.value(*input), picked.view_mut(), y.view_mut())?;
                    self.pool_indices[pools] = picked;
                    pools += 1;
                }
                Layer::MeanPool { input, .. } => {
                    let shape = self.model.mean_pool_shape(*input, self.n)?;
                    mean_pool_forward(&self.device, &shape, self.value(*input), y.view_mut())?;
                }
            }
            self.values[slot] = y;
        }
        Ok(())
    }

    fn norm_forward(&mut self, layer: &Layer, mode: Mode, y: SliceMut<f32>) -> Result<()> {
        let Layer::Norm { scale, shift, statistics, input, residual, relu, .. } = *layer else {
            unreachable!("called for norms")
        };
        let shape = self.model.norm_shape(input, self.n)?;
        let [mean, var] = self.statistic_ranges(statistics);
        // The statistics are taken out while other fields are read.
        let mut running = std::mem::take(&mut self.statistics);
        let mut saved = std::mem::take(&mut self.saved);
        let mut scratch = std::mem::take(&mut self.scratch);
        let count = self.count.view();
        let norm = NormInput { x: self.value(input), residual: residual.map(|value| self.value(value)), relu, count };
        let (gamma, beta) = (self.parameter(scale), self.parameter(shift));
        let affine = NormAffine { gamma, beta, epsilon: NORM_EPSILON };
        match mode {
            Mode::Train => {
                let (means, vars) = running.pair_mut(mean.clone(), var.clone());
                let running = NormRunning { mean: means, var: vars, momentum: NORM_MOMENTUM };
                let (mean, invstd) = saved.pair_mut(mean, var);
                let saved = NormSaved { mean, invstd };
                norm_forward(&self.device, &shape, norm, affine, running, saved, scratch.view_mut(), y)?;
            }
            Mode::Evaluate => {
                norm_eval(&self.device, &shape, norm, affine, running.slice(mean), running.slice(var), y)?;
            }
        }
        (self.statistics, self.saved, self.scratch) = (running, saved, scratch);
        Ok(())
    }

    /// The backward pass, from the gradient of the logits to the gradients of all parameters.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if the device fails.
    pub fn backward(&mut self) -> Result<()> {
        let mut pools = self.pool_indices.len();
        let device = self.device.clone();
        for index in (0..self.model.layers.len()).rev() {
            let layer = self.model.layers[index].clone();
            let slot = self.plan.gradient_slots[layer.output()].expect("a layer's output has a gradient");
            let dy = std::mem::take(&mut self.value_gradients[slot]);
            match &layer {
                Layer::Conv { .. } => self.conv_backward(index, &layer, dy.view())?,
                Layer::Norm { .. } => self.norm_backward(&layer, dy.view())?,
                Layer::Shortcut { input, .. } => {
                    let shape = self.model.shortcut_shape(&layer, self.n)?;
                    shortcut_backward(&device, &shape, dy.view(), self.gradient(*input))?;
                }
                Layer::MaxPool { input, .. } => {
                    let shape = self.model.pool_shape(&layer, self.n)?;
                    pools -= 1;
                    let picked = std::mem::take(&mut self.pool_indices[pools]);
                    max_pool_backward(&device, &shape, dy.view(), picked.view(), self.gradient(*input))?;
                    self.pool_indices[pools] = picked;
                }
                Layer::MeanPool { input, .. } => {
                    let shape = self.model.mean_pool_shape(*input, self.n)?;
                    mean_pool_backward(&device, &shape, dy.view(), self.gradient(*input))?;
                }
            }
            self.value_gradients[slot] = dy;
        }
        Ok(())
    }

    fn gradient(&mut self, value: ValueId) -> SliceMut<'_, f32> {
        let slot = self.plan.gradient_slots[value].expect("only the input has no gradient");
        self.value_gradients[slot].view_mut()
    }

    fn conv_backward(&mut self, index: usize, layer: &Layer, dy: Slice<f32>) -> Result<()> {
        let Layer::Conv { weight, bias, input, .. } = *layer else { unreachable!("called for convolutions") };
        let shape = self.model.conv_shape(layer, self.n)?;
        let mut gradients = std::mem::take(&mut self.gradients);
        let mut scratch = std::mem::take(&mut self.scratch);
        let dw = gradients.slice_mut(self.range(weight));
        conv_weight_gradient(&self.device, &shape, self.value(input), dy, scratch.view_mut(), dw)?;
        if let Some(bias) = bias {
            conv_bias_gradient(&self.device, &shape, dy, gradients.slice_mut(self.range(bias)))?;
        }
        (self.gradients, self.scratch) = (gradients, scratch);
        if let Some(slot) = self.plan.gradient_slots[input] {
            let mut dx = std::mem::take(&mut self.value_gradients[slot]);
            let accumulate = self.plan.accumulates[index];
            conv_input_gradient(&self.device, &shape, dy, self.parameter(weight), accumulate, dx.view_mut())?;
            self.value_gradients[slot] = dx;
        }
        Ok(())
    }

    fn norm_backward(&mut self, layer: &Layer, dy: Slice<f32>) -> Result<()> {
        let Layer::Norm { scale, shift, statistics, input, residual, relu, output } = *layer else {
            unreachable!("called for norms")
        };
        let shape = self.model.norm_shape(input, self.n)?;
        let [mean, invstd] = self.statistic_ranges(statistics).map(|range| self.saved.slice(range));
        let mut gradients = std::mem::take(&mut self.gradients);
        let mut scratch = std::mem::take(&mut self.scratch);
        let dx_slot = self.plan.gradient_slots[input].expect("a norm does not read the input");
        let residual_slot = residual.and_then(|value| self.plan.gradient_slots[value]);
        let mut dx = std::mem::take(&mut self.value_gradients[dx_slot]);
        let mut dresidual = residual_slot.map(|slot| std::mem::take(&mut self.value_gradients[slot]));
        let (x, y, gamma) = (self.value(input), self.value(output), self.parameter(scale));
        let count = self.count.view();
        let norm = NormBackward { x, y, dy, relu, gamma, mean, invstd, training: true, count };
        let (dgamma, dbeta) = gradients.pair_mut(self.range(scale), self.range(shift));
        let dr = dresidual.as_mut().map(|buffer| buffer.view_mut());
        norm_backward(&self.device, &shape, norm, scratch.view_mut(), dgamma, dbeta, dr, dx.view_mut())?;
        self.value_gradients[dx_slot] = dx;
        if let (Some(slot), Some(buffer)) = (residual_slot, dresidual) {
            self.value_gradients[slot] = buffer;
        }
        (self.gradients, self.scratch) = (gradients, scratch);
        Ok(())
    }

    /// The optimizer's step; pruned weights and their velocity become exact zeros.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if the device fails.
    pub fn update(&mut self, sgd: &Sgd, clip_norm: Option<f32>) -> Result<()> {
        if let Some(trainable) = &self.trainable {
            // Without gradient, velocity and decay, the step adds zero.
            apply_mask(&self.device, trainable.view(), self.gradients.view_mut())?;
        }
        let (gradients, mask) = (self.gradients.view(), self.mask.view());
        if clip_norm.is_some() {
            gradient_norm(&self.device, gradients, mask, self.partials.view_mut())?;
        }
        let clip = clip_norm.map(|max_norm| Clip { partials: self.partials.view(), max_norm });
        let input = OptimizerInput { rate: self.rate.view(), gradients, mask, decay: Some(self.decay.view()), clip };
        sgd_step(&self.device, sgd, input, self.parameters.view_mut(), self.velocity.view_mut())
    }

    // ------------------------------------------------------------------------------------ weights, masks, settings

    /// A bit for each element of the parameters that `keep` says yes to; the gaps between parameters are 0.
    fn bits(&self, keep: impl Fn(ParameterKind) -> bool) -> Vec<u32> {
        let mut words = vec![0; self.plan.parameter_len / 32];
        for (parameter, offset) in self.model.parameters.iter().zip(&self.plan.parameters) {
            if keep(parameter.kind) {
                let ones = Mask::ones(&parameter.shape);
                words[offset / 32..][..ones.words().len()].copy_from_slice(ones.words());
            }
        }
        words
    }

    /// Whether weight decay applies to the parameters of norms and to biases.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device fails.
    pub fn set_decay(&mut self, norms_and_biases: bool) -> Result<()> {
        let weights = |kind| matches!(kind, ParameterKind::Convolution | ParameterKind::Classifier);
        let mut bits = self.bits(|kind| norms_and_biases || weights(kind));
        if let Some(trainable) = &self.trainable {
            bits.iter_mut().zip(self.device.read(trainable.view())?).for_each(|(decay, trained)| *decay &= trained);
        }
        self.device.write(&bits, self.decay.view_mut())
    }

    /// From now on trains these weights alone: all others, norms and biases keep their values, bit by bit. To be
    /// followed by [`Network::set_decay`].
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device fails.
    pub fn train_only(&mut self, weights: &MaskSet) -> Result<()> {
        let mut bits = vec![0; self.plan.parameter_len / 32];
        for (parameter, offset) in self.model.parameters.iter().zip(&self.plan.parameters) {
            if let Some(mask) = weights.get(&parameter.name) {
                bits[offset / 32..][..mask.words().len()].copy_from_slice(mask.words());
            }
        }
        self.trainable = Some(self.device.upload(&bits)?);
        Ok(())
    }

    /// Takes weights, masks and statistics from a file's content: all of the model's tensors, and no others. Pruned
    /// weights become zero; the optimizer's state becomes zero.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] with the full list of what is missing, unexpected or of another shape.
    pub fn load(&mut self, weights: &Weights) -> Result<()> {
        weights.check_against(&self.model.file_tensors())?;
        let mut values = vec![0.0f32; self.plan.parameter_len];
        let mut words = self.bits(|_| true);
        for (parameter, &offset) in self.model.parameters.iter().zip(&self.plan.parameters) {
            let tensor = weights.tensors[&parameter.name].iter();
            values[offset..].iter_mut().zip(tensor).for_each(|(to, from)| *to = *from);
            if let Some(mask) = weights.masks.get(&parameter.name) {
                words[offset / 32..][..mask.words().len()].copy_from_slice(mask.words());
            }
        }
        self.device.write(&values, self.parameters.view_mut())?;
        self.device.write(&words, self.mask.view_mut())?;
        apply_mask(&self.device, self.mask.view(), self.parameters.view_mut())?;
        self.device.zero(self.velocity.view_mut())?;
        self.masked = weights.masks.keys().cloned().collect();
        self.set_statistics(|name| weights.tensors.get(name).map(|tensor| tensor.iter().copied().collect()))
    }

    /// Sets running statistics by name; 0 and 1 where there is none.
    fn set_statistics(&mut self, find: impl Fn(&str) -> Option<Vec<f32>>) -> Result<()> {
        let mut values = vec![0.0f32; self.plan.statistics_len];
        for (index, statistics) in self.model.statistics.iter().enumerate() {
            for (which, range) in self.statistic_ranges(index).into_iter().enumerate() {
                let name = format!("{}.{}", statistics.name, STATISTICS[which]);
                let found = find(&name).unwrap_or_else(|| vec![which as f32; statistics.features]);
                values[range].copy_from_slice(&found);
            }
        }
        self.device.write(&values, self.statistics.view_mut())
    }

    /// Weights, masks and statistics as they are now. A parameter has a mask in the result where one was loaded or
    /// where not all of it is kept.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device fails.
    pub fn weights(&self) -> Result<Weights> {
        let mut weights = Weights::default();
        let values = self.device.read(self.parameters.view())?;
        let words = self.device.read(self.mask.view())?;
        for (id, parameter) in self.model.parameters.iter().enumerate() {
            let range = self.range(id);
            let first = range.start / 32;
            let mask = words[first..first + parameter.elements().div_ceil(32)].to_vec();
            let mask = Mask::from_words(&parameter.shape, mask)?;
            weights.tensors.insert(parameter.name.clone(), array(&parameter.shape, &values[range]));
            if mask.count() < mask.len() || self.masked.contains(&parameter.name) {
                weights.masks.insert(parameter.name.clone(), mask);
            }
        }
        let values = self.device.read(self.statistics.view())?;
        for (index, statistics) in self.model.statistics.iter().enumerate() {
            for (which, range) in self.statistic_ranges(index).into_iter().enumerate() {
                let name = format!("{}.{}", statistics.name, STATISTICS[which]);
                weights.tensors.insert(name, array(&[statistics.features], &values[range]));
            }
        }
        Ok(weights)
    }

    /// The optimizer's velocity, by parameter.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device fails.
    pub fn velocity(&self) -> Result<Weights> {
        let values = self.device.read(self.velocity.view())?;
        let tensors = self
            .model
            .parameters
            .iter()
            .enumerate()
            .map(|(id, parameter)| (parameter.name.clone(), array(&parameter.shape, &values[self.range(id)])));
        Ok(Weights { tensors: tensors.collect(), ..Weights::default() })
    }

    /// Sets the optimizer's velocity, after [`Network::load`].
    ///
    /// # Errors
    /// [`crate::Error::Usage`] if a parameter is missing or of another shape.
    pub fn set_velocity(&mut self, velocity: &Weights) -> Result<()> {
        let expected: Vec<_> = self.model.parameters.iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
        velocity.check_against(&expected)?;
        let mut values = vec![0.0f32; self.plan.parameter_len];
        for (parameter, &offset) in self.model.parameters.iter().zip(&self.plan.parameters) {
            let tensor = velocity.tensors[&parameter.name].iter();
            values[offset..].iter_mut().zip(tensor).for_each(|(to, from)| *to = *from);
        }
        self.device.write(&values, self.velocity.view_mut())
    }

    /// The name of the first layer whose value is not finite in a forward pass over the present batch.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device fails.
    pub fn first_not_finite(&mut self) -> Result<String> {
        self.forward(Mode::Train)?;
        for (value, slot) in self.model.values.iter().zip(&self.plan.value_slots) {
            let values = self.device.read(self.values[*slot].view())?;
            if values.iter().any(|value| !value.is_finite()) {
                return Ok(value.name.clone());
            }
        }
        Ok("the loss".into())
    }

    /// The gradient of a parameter, for tests and profiles.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device fails.
    pub fn parameter_gradient(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let id = self.model.parameters.iter().position(|parameter| parameter.name == name);
        id.map(|id| self.device.read(self.gradients.slice(self.range(id)))).transpose()
    }
}

fn array(shape: &[usize], values: &[f32]) -> ndarray::ArrayD<f32> {
    ndarray::ArrayD::from_shape_vec(shape, values.to_vec()).expect("as many values as the shape has")
}
