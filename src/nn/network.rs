//! A network with memory on a device: its weights, masks and settings. Its passes are in `passes/`.

use std::collections::BTreeMap;

use half::bf16;
use ndarray::ArrayD;
use sha2::{Digest, Sha256};

use super::compact::Compaction;
use super::fusion::{Fusion, fusions};
use super::layout::{Layout, plan_layers};
use super::model::{Layer, Model, Parameter, ParameterId, ParameterKind, STATISTICS, ValueId};
use super::paths::{Choice, PlannedLayer, Planning};
use super::plan::{Fixed, Plan, Use};
use super::ways::Lists;
use super::weights::{Form, Weights};
use crate::device::{Buffer, Device, RealBuffer, Reals, RealsMut, Slice, SliceMut};
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::mask::set::MaskSet;
use crate::ops::SAMPLE_ALIGNMENT;
use crate::ops::optimizer::{AdamW, Clip, OptimizerInput, Sgd, adamw_step, gradient_norm, sgd_step};
use crate::ops::prune::apply_mask;
use crate::ops::round::{RoundTable, round_weights};
use crate::ops::row_map::RowMap;
use crate::ops::step::StepCurrent;

/// Which form of a pass: norms with the batch's statistics and random layers at work, or norms with running statistics
/// and nothing random.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As in training.
    Train,
    /// As in evaluation.
    Evaluate,
}

/// An optimizer with its settings.
#[derive(Clone, Copy, Debug)]
pub enum Optimizer {
    /// Stochastic gradient descent.
    Sgd(Sgd),
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
}

/// A network on a device.
pub struct Network {
    pub(super) device: Device,
    /// What files hold.
    model: Model,
    /// What of it is computed.
    compaction: Compaction,
    /// The model of what is computed.
    pub(super) computed: Model,
    /// The whole tensors as they were loaded, pruned weights as zeros, for what is not stored; empty where everything is.
    rest: BTreeMap<String, ArrayD<f32>>,
    pub(super) plan: Plan,
    /// Samples of a batch, a multiple of 8.
    pub(super) n: usize,
    pub(super) parameters: Buffer<f32>,
    pub(super) gradients: Buffer<f32>,
    /// The optimizer's state: velocity or first moment, second moment.
    pub(super) moments: [Buffer<f32>; 2],
    /// One bit per parameter: 0 where it is pruned.
    mask: Buffer<u32>,
    /// One bit per parameter: 1 where weight decay applies.
    decay: Buffer<u32>,
    /// One bit per parameter: 1 where it is trained; everywhere if there is none.
    trainable: Option<Buffer<u32>>,
    /// The masks that were loaded.
    masks: BTreeMap<String, Mask>,
    pub(super) statistics: Buffer<f32>,
    pub(super) saved: Buffer<f32>,
    pub(super) scratch: Buffer<f32>,
    partials: Buffer<f32>,
    labels: Buffer<u32>,
    pub(super) count: Buffer<u32>,
    rate: Buffer<f32>,
    corrections: Buffer<f32>,
    pub(super) step: Buffer<u32>,
    /// 1 for each head of each attention layer that is computed.
    pub(super) heads: Buffer<u32>,
    /// What random layers draw from.
    pub(super) seed: u64,
    pub(super) values: Vec<RealBuffer>,
    pub(super) value_gradients: Vec<RealBuffer>,
    /// The weights that products read, in bf16, and how they come about; in f32 they read the parameters.
    pub(super) rounded: Buffer<bf16>,
    round_table: Option<RoundTable>,
    /// What layers keep for their backward pass beside values.
    pub(super) kept: Vec<Buffer<f32>>,
    pub(super) pool_indices: Vec<Buffer<u8>>,
    /// Of each layer that multiplies under a mask: the lists of its kept weights.
    pub(super) paths: Vec<Option<Lists>>,
    /// Of each layer: what it does of its neighbours' work.
    pub(super) fusions: Vec<Fusion>,
    /// Of each layer that multiplies under a mask: how.
    choices: Vec<Option<Choice>>,
    /// What decides that.
    planning: Planning,
    /// Of each layer: which features of its values are which, where they differ.
    pub(super) maps: Vec<Option<RowMap>>,
    memory_for: Use,
}

/// What a step reads of its batch, filled by the loader.
pub struct Batch<'a> {
    /// Images, `[C, H, W, n]`.
    pub x: RealsMut<'a>,
    /// Labels, `[n]`.
    pub labels: SliceMut<'a, u32>,
    /// Settings of the step.
    pub current: StepCurrent<'a>,
}

/// What the loss reads and writes.
pub struct Head<'a> {
    /// Logits, `[classes, n]`.
    pub logits: Reals<'a>,
    /// Labels, `[n]`.
    pub labels: Slice<'a, u32>,
    /// Number of true samples, `[1]`.
    pub count: Slice<'a, u32>,
    /// Gradient of the logits, in a network that is trained.
    pub gradient: Option<RealsMut<'a>>,
}

impl Network {
    /// Allocates a network for batches of up to `batch` samples. Parameters are zero, masks keep everything, running
    /// statistics are 0 and 1.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when memory runs out.
    pub fn new(device: &Device, model: &Model, batch: usize, memory_for: Use) -> Result<Self> {
        Self::for_masks(device, model, &BTreeMap::new(), batch, memory_for, &Planning::Table)
    }

    /// Allocates a network for weights under these masks: without the features that do not matter under them
    /// ([`super::compact`]), each layer multiplying in a way that suits its mask ([`super::paths`]). It computes the same
    /// outputs, and the same gradients of all weights that matter. Weights that do not keep the values that were loaded,
    /// weight decay included.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when memory runs out.
    pub fn for_masks(
        device: &Device,
        model: &Model,
        masks: &BTreeMap<String, Mask>,
        batch: usize,
        memory_for: Use,
        planning: &Planning,
    ) -> Result<Self> {
        let Layout { computed, compaction, plan, layers, .. } =
            Layout::new(device, model, masks, batch, memory_for, planning)?;
        let arena = device.alloc::<u32>(plan.bytes / 4)?;
        let mut pieces = arena.split(&plan.pieces);
        let mut rest = pieces.split_off(Fixed::Pieces as usize);
        let mut piece = |which: Fixed| std::mem::take(&mut pieces[which as usize]);
        let values = 1 + plan.value_slots.iter().max().expect("there is an input");
        let gradients = plan.gradient_slots.iter().flatten().max().map_or(0, |slot| slot + 1);
        let pool_indices = rest.split_off(rest.len() - plan.pools).into_iter().map(Buffer::cast).collect();
        let kept = rest.split_off(values + gradients).into_iter().map(Buffer::cast).collect();
        let precision = computed.precision;
        let reals = |words: Buffer<u32>| {
            let len = words.len() * 4 / precision.bytes();
            RealBuffer::new(words, len, precision)
        };
        let value_gradients = rest.split_off(values).into_iter().map(reals).collect();
        let mut network = Network {
            device: device.clone(),
            model: model.clone(),
            maps: compaction.maps(device, model)?,
            compaction,
            rest: BTreeMap::new(),
            n: batch.next_multiple_of(SAMPLE_ALIGNMENT),
            parameters: piece(Fixed::Parameters).cast(),
            gradients: piece(Fixed::Gradients).cast(),
            moments: [piece(Fixed::FirstMoment).cast(), piece(Fixed::SecondMoment).cast()],
            mask: piece(Fixed::Mask),
            decay: piece(Fixed::Decay),
            trainable: None,
            masks: masks.clone(),
            statistics: piece(Fixed::Statistics).cast(),
            saved: piece(Fixed::Saved).cast(),
            scratch: piece(Fixed::Scratch).cast(),
            partials: piece(Fixed::Partials).cast(),
            labels: piece(Fixed::Labels),
            count: piece(Fixed::Count),
            rate: piece(Fixed::Rate).cast(),
            corrections: piece(Fixed::Corrections).cast(),
            step: piece(Fixed::Step),
            heads: piece(Fixed::Heads),
            seed: 0,
            values: rest.into_iter().map(reals).collect(),
            value_gradients,
            rounded: piece(Fixed::Rounded).cast(),
            round_table: plan.rounded.upload(device)?,
            kept,
            pool_indices,
            paths: Vec::new(),
            fusions: Vec::new(),
            choices: Vec::new(),
            planning: planning.clone(),
            memory_for,
            plan,
            computed,
        };
        let everything = network.bits(|_| true);
        device.write(&everything, network.mask.view_mut())?;
        network.set_paths(&layers)?;
        network.set_heads(&BTreeMap::new())?;
        network.set_statistics(|_| None)?;
        Ok(network)
    }

    /// The device it lies on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What it is made of, whether it is computed or not.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What of it is computed.
    pub fn compaction(&self) -> &Compaction {
        &self.compaction
    }

    /// The model of what is computed.
    pub fn computed(&self) -> &Model {
        &self.computed
    }

    /// Where its tensors lie.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// How each layer multiplies that has a mask.
    pub fn choices(&self) -> &[Option<Choice>] {
        &self.choices
    }

    /// A hash of how layers multiply: with the device, settings and data, what the bits of a training depend on.
    pub fn choices_hash(&self) -> String {
        let mut hash = Sha256::new();
        for (choice, layer) in self.choices.iter().zip(&self.computed.layers) {
            let name = &self.computed.values[layer.output()].name;
            hash.update(format!("{name}: {}\n", choice.as_ref().map_or("dense".into(), Choice::name)));
        }
        if !self.computed.precision.is_f32() {
            hash.update(self.computed.precision.name());
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Bytes of the lists of kept weights, beside the plan's.
    pub fn list_bytes(&self) -> usize {
        self.paths.iter().flatten().map(Lists::bytes).sum()
    }

    /// Where the loader puts a batch.
    pub fn batch(&mut self) -> Batch<'_> {
        Batch {
            x: self.values[self.plan.value_slots[0]].view_mut(),
            labels: self.labels.view_mut(),
            current: StepCurrent {
                count: self.count.view_mut(),
                rate: self.rate.view_mut(),
                corrections: self.corrections.view_mut(),
                step: self.step.view_mut(),
            },
        }
    }

    /// What the loss reads and writes after a forward pass.
    pub fn head(&mut self) -> Head<'_> {
        let output = self.computed.output();
        let gradient = self.plan.gradient_slots[output].map(|slot| self.value_gradients[slot].view_mut());
        Head {
            logits: self.values[self.plan.value_slots[output]].view(),
            labels: self.labels.view(),
            count: self.count.view(),
            gradient,
        }
    }

    /// What random layers draw from: dropout and stochastic depth.
    pub fn set_seed(&mut self, seed: u64) {
        self.seed = seed;
    }

    /// The optimizer's step; pruned weights and their moments become exact zeros.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if the device fails.
    pub fn update(&mut self, optimizer: &Optimizer, clip_norm: Option<f32>) -> Result<()> {
        if let Some(trainable) = &self.trainable {
            // Without gradient, moments and decay, the step adds zero.
            apply_mask(&self.device, trainable.view(), self.gradients.view_mut())?;
        }
        let (gradients, mask) = (self.gradients.view(), self.mask.view());
        if clip_norm.is_some() {
            gradient_norm(&self.device, gradients, mask, self.partials.view_mut())?;
        }
        let clip = clip_norm.map(|max_norm| Clip { partials: self.partials.view(), max_norm });
        let input = OptimizerInput { rate: self.rate.view(), gradients, mask, decay: Some(self.decay.view()), clip };
        let [first, second] = self.moments.each_mut().map(Buffer::view_mut);
        let weights = self.parameters.view_mut();
        match optimizer {
            Optimizer::Sgd(sgd) => sgd_step(&self.device, sgd, input, weights, first)?,
            Optimizer::AdamW(adamw) => {
                adamw_step(&self.device, adamw, input, self.corrections.view(), weights, first, second)?;
            }
        }
        self.round()
    }

    /// Makes the weights that products read of those that are trained, after every change of these.
    pub(super) fn round(&mut self) -> Result<()> {
        let (table, weights) = (self.round_table.as_ref(), self.parameters.view());
        table.map_or(Ok(()), |table| round_weights(&self.device, table, weights, self.rounded.view_mut()))
    }

    // ------------------------------------------------------------------------------------ weights, masks, settings

    /// A bit for each element of the parameters that `keep` says yes to; the gaps between parameters are 0.
    fn bits(&self, keep: impl Fn(ParameterKind) -> bool) -> Vec<u32> {
        let mut words = vec![0; self.plan.parameter_len / 32];
        for (id, (parameter, offset)) in self.computed.parameters.iter().zip(&self.plan.parameters).enumerate() {
            if keep(parameter.kind) {
                let ones = Mask::ones(&[self.plan.lengths[id]]);
                words[offset / 32..][..ones.words().len()].copy_from_slice(ones.words());
            }
        }
        words
    }

    /// Whether weight decay applies to the parameters of norms, to biases, tokens and positions.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device fails.
    pub fn set_decay(&mut self, norms_and_biases: bool) -> Result<()> {
        let mut bits = self.bits(|kind| norms_and_biases || !kind.is_small());
        if let Some(trainable) = &self.trainable {
            bits.iter_mut().zip(self.device.read(trainable.view())?).for_each(|(decay, trained)| *decay &= trained);
        }
        self.device.write(&bits, self.decay.view_mut())
    }

    /// Puts what is stored of a parameter's mask where its bits lie.
    fn put_mask(&self, id: ParameterId, mask: &Mask, words: &mut [u32]) {
        let mask = self.compaction.stored_mask(id, mask);
        words[self.plan.parameters[id] / 32..][..mask.words().len()].copy_from_slice(mask.words());
    }

    /// Puts what is computed of whole tensors, one a parameter, where they lie.
    fn put_tensors(&self, tensors: &BTreeMap<String, ArrayD<f32>>) -> Vec<f32> {
        let mut values = vec![0.0f32; self.plan.parameter_len];
        for (id, parameter) in self.computed.parameters.iter().enumerate() {
            let whole: Vec<f32> = tensors[&parameter.name].iter().copied().collect();
            let left = self.compaction.gather(id, &whole);
            values[self.plan.range(id)].copy_from_slice(&left);
        }
        values
    }

    /// The whole tensors of parameters of which these are computed, with `rest` around them.
    fn take_tensors(&self, values: &[f32], rest: &BTreeMap<String, ArrayD<f32>>) -> BTreeMap<String, ArrayD<f32>> {
        let take = |(id, parameter): (ParameterId, &Parameter)| {
            let mut whole = rest.get(&parameter.name).cloned().unwrap_or_else(|| ArrayD::zeros(&parameter.shape[..]));
            let left = &values[self.plan.range(id)];
            self.compaction.scatter(id, left, whole.as_slice_mut().expect("of standard layout"));
            (parameter.name.clone(), whole)
        };
        self.model.parameters.iter().enumerate().map(take).collect()
    }

    /// From now on trains these weights alone: all others, norms and biases keep their values, bit by bit. To be
    /// followed by [`Network::set_decay`].
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device fails.
    pub fn train_only(&mut self, weights: &MaskSet) -> Result<()> {
        let mut bits = vec![0; self.plan.parameter_len / 32];
        for (id, parameter) in self.computed.parameters.iter().enumerate() {
            if let Some(mask) = weights.get(&parameter.name) {
                self.put_mask(id, mask, &mut bits);
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
        let same_masks = weights.masks == self.masks;
        if !same_masks && !self.compaction.is_whole() {
            let problem = "the masks are others than those that this network was made for; make one for these masks";
            return Err(Error::Usage(problem.into()));
        }
        let mut words = self.bits(|_| true);
        for (id, parameter) in self.computed.parameters.iter().enumerate() {
            if let Some(mask) = weights.masks.get(&parameter.name) {
                self.put_mask(id, mask, &mut words);
            }
        }
        self.device.write(&self.put_tensors(&weights.tensors), self.parameters.view_mut())?;
        self.device.write(&words, self.mask.view_mut())?;
        // A captured step holds the addresses of what belongs to the masks: the same ones stay where they are.
        if !same_masks {
            // Gradients of pruned weights are zero from now on.
            self.device.zero(self.gradients.view_mut())?;
            let (computed, compaction) = (&self.computed, &self.compaction);
            let (masks, planning) = (&weights.masks, &self.planning);
            let layers = plan_layers(&self.device, computed, compaction, masks, self.n, self.memory_for, planning)?;
            self.set_paths(&layers)?;
        }
        apply_mask(&self.device, self.mask.view(), self.parameters.view_mut())?;
        self.round()?;
        self.moments.iter_mut().try_for_each(|moment| self.device.zero(moment.view_mut()))?;
        self.set_heads(&weights.masks)?;
        self.masks = weights.masks.clone();
        if !self.compaction.is_whole() {
            let masked = |(name, tensor): (&String, &ArrayD<f32>)| {
                let values = weights.written(name, tensor, Form::Plain).collect();
                (name.clone(), ArrayD::from_shape_vec(tensor.raw_dim(), values).expect("as many as there were"))
            };
            self.rest = weights.tensors.iter().map(masked).collect();
        }
        self.set_statistics(|name| weights.tensors.get(name).map(|tensor| tensor.iter().copied().collect()))
    }

    fn set_paths(&mut self, layers: &[Option<PlannedLayer>]) -> Result<()> {
        self.choices = layers.iter().map(|layer| layer.as_ref().map(|layer| layer.choice.clone())).collect();
        let lists = |layer: &Option<PlannedLayer>| layer.as_ref().map(|layer| layer.lists(&self.device)).transpose();
        self.paths = layers.iter().map(lists).collect::<Result<_>>()?;
        self.fusions = fusions(&self.device, &self.computed, layers, self.n, self.memory_for)?;
        Ok(())
    }

    /// Leaves out the heads of attention whose outputs no kept weight reads; keeps all where there is no mask.
    fn set_heads(&mut self, masks: &BTreeMap<String, Mask>) -> Result<()> {
        let mut flags = vec![1u32; self.heads.len()];
        for (layer, &offset) in self.computed.layers.iter().zip(&self.plan.heads) {
            let &Layer::Attention { heads, projection, .. } = layer else { continue };
            let (id, projection) = (projection, &self.computed.parameters[projection]);
            let Some(mask) = masks.get(&projection.name) else { continue };
            let mask = self.compaction.mask(id, &projection.shape, mask);
            let (inputs, head) = (projection.fan_in(), projection.fan_in() / heads);
            let mut read = vec![0; heads];
            mask.iter().enumerate().filter(|&(_, kept)| kept).for_each(|(i, _)| read[i % inputs / head] = 1);
            flags[offset..offset + heads].copy_from_slice(&read);
        }
        self.device.write(&flags, self.heads.view_mut())
    }

    /// Sets running statistics by name; 0 and 1 where there is none.
    fn set_statistics(&mut self, find: impl Fn(&str) -> Option<Vec<f32>>) -> Result<()> {
        let mut values = vec![0.0f32; self.plan.statistics_len];
        for layer in &self.computed.layers {
            let Layer::Norm { statistics: index, scale, .. } = *layer else { continue };
            let statistics = &self.model.statistics[index];
            for (which, range) in self.plan.statistic_ranges(&self.computed, index).into_iter().enumerate() {
                let name = format!("{}.{}", statistics.name, STATISTICS[which]);
                let found = find(&name).unwrap_or_else(|| vec![which as f32; statistics.features]);
                values[range].copy_from_slice(&self.compaction.gather(scale, &found));
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
        let tensors = self.take_tensors(&self.device.read(self.parameters.view())?, &self.rest);
        let mut weights = Weights { tensors, masks: self.masks.clone(), ..Weights::default() };
        let values = self.device.read(self.statistics.view())?;
        for layer in &self.computed.layers {
            let Layer::Norm { statistics: index, scale, .. } = *layer else { continue };
            let statistics = &self.model.statistics[index];
            for (which, range) in self.plan.statistic_ranges(&self.computed, index).into_iter().enumerate() {
                let name = format!("{}.{}", statistics.name, STATISTICS[which]);
                let whole = || ArrayD::zeros(vec![statistics.features]);
                let mut tensor = self.rest.get(&name).cloned().unwrap_or_else(whole);
                self.compaction.scatter(scale, &values[range], tensor.as_slice_mut().expect("of standard layout"));
                weights.tensors.insert(name, tensor);
            }
        }
        Ok(weights)
    }

    /// The optimizer's state, by parameter: the velocity, or the first and the second moment.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device fails.
    pub fn moments(&self) -> Result<Vec<Weights>> {
        let read = |moment: &Buffer<f32>| {
            let tensors = self.take_tensors(&self.device.read(moment.view())?, &BTreeMap::new());
            Ok(Weights { tensors, ..Weights::default() })
        };
        self.moments.iter().filter(|moment| !moment.is_empty()).map(read).collect()
    }

    /// Sets the optimizer's state, after [`Network::load`].
    ///
    /// # Errors
    /// [`crate::Error::Usage`] if it is another optimizer's, or a parameter is missing or of another shape.
    pub fn set_moments(&mut self, moments: &[Weights]) -> Result<()> {
        let expected: Vec<_> = self.model.parameters.iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
        let own = self.moments.iter().filter(|moment| !moment.is_empty()).count();
        if own != moments.len() {
            return Err(Error::Usage(format!(
                "the optimizer's state: expected {} tensors for each parameter, got {}: it is another optimizer's",
                own,
                moments.len()
            )));
        }
        for (own, given) in moments.iter().enumerate() {
            given.check_against(&expected)?;
            let values = self.put_tensors(&given.tensors);
            self.device.write(&values, self.moments[own].view_mut())?;
        }
        Ok(())
    }

    /// The name of the first layer whose value is not finite in a forward pass over the present batch.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device fails.
    pub fn first_not_finite(&mut self) -> Result<String> {
        self.forward(Mode::Train)?;
        for (value, slot) in self.computed.values.iter().zip(&self.plan.value_slots) {
            let values = self.device.read_reals(self.values[*slot].view())?;
            if values.iter().any(|value| !value.is_finite()) {
                return Ok(value.name.clone());
            }
        }
        Ok("the loss".into())
    }

    /// Sum of the magnitudes of each feature of a value, after a forward pass of a network that is trained: others use
    /// the memory of values again.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device fails.
    pub fn feature_magnitudes(&self, value: ValueId) -> Result<Vec<f64>> {
        let values = self.device.read_reals(self.values[self.plan.value_slots[value]].view())?;
        let row = values.len() / self.computed.values[value].features();
        Ok(values.chunks(row).map(|row| row.iter().map(|x| f64::from(x.abs())).sum()).collect())
    }

    /// The gradient of a parameter, for tests and profiles; 0 for pruned weights of a layer that multiplies its kept ones
    /// alone, and for what is not computed.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device fails.
    pub fn parameter_gradient(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(id) = self.computed.parameters.iter().position(|parameter| parameter.name == name) else {
            return Ok(None);
        };
        let left = self.device.read(self.gradients.slice(self.plan.range(id)))?;
        let mut whole = vec![0.0; self.model.parameters[id].elements()];
        self.compaction.scatter(id, &left, &mut whole);
        Ok(Some(whole))
    }
}
