//! The forward and the backward pass of a network, layer by layer.

mod backward;
mod forward;

use std::ops::Range;

use super::fusion::Fusion;
use super::model::{BatchNorm, Model};
use super::network::{Mode, Network};
use super::plan::{Plan, aligned};
use super::ways::Lists;
use crate::device::{Buffer, RealBuffer, Reals, Slice};
use crate::error::Result;
use crate::ops::kept::{KeptWeights, Pass};
use crate::ops::norm::{Normalised, Normed};
use crate::ops::norm_pool::NormPool;
use crate::ops::row_map::RowMap;
use crate::profile::range;

impl Network {
    /// The forward pass: in training with batch statistics, which also move the running ones, and with what is drawn at
    /// random; else with running statistics alone.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if the device fails.
    pub fn forward(&mut self, mode: Mode) -> Result<()> {
        self.forward_with(mode, |_, _| Ok(()))
    }

    /// The same; after each layer `done` is told its index in [`Network::computed`] and what it wrote, which later layers
    /// may write over. In training the result of a norm that another adds or a max pool reads is not written.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if the device fails; what `done` returns.
    pub fn forward_with(&mut self, mode: Mode, mut done: impl FnMut(usize, Reals) -> Result<()>) -> Result<()> {
        for index in 0..self.computed.layers.len() {
            let slots = &self.plan.value_slots;
            let slot = slots[self.computed.layers[index].output()];
            let beside_slot = self.fusions[index].beside.map(|beside| slots[beside.to()]);
            // Taken out, so that the others can be read while they are written.
            let mut y = std::mem::take(&mut self.values[slot]);
            let mut beside = beside_slot.map(|slot| std::mem::take(&mut self.values[slot]));
            let _range = range(format_args!("{} forward", self.layer_name(index)));
            let is_left_out = self.fusions[index].is_within && mode == Mode::Train;
            let written = self
                .layer_forward(index, mode, y.view_mut(), beside.as_mut().map(RealBuffer::view_mut))
                .and_then(|()| if is_left_out { Ok(()) } else { done(index, y.view()) });
            self.values[slot] = y;
            if let (Some(slot), Some(beside)) = (beside_slot, beside) {
                self.values[slot] = beside;
            }
            written?;
        }
        Ok(())
    }

    fn layer_name(&self, index: usize) -> &str {
        &self.computed.values[self.computed.layers[index].output()].name
    }

    /// The backward pass, from the gradient of the logits to the gradients of all parameters.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if the device fails.
    pub fn backward(&mut self) -> Result<()> {
        for index in (0..self.computed.layers.len()).rev() {
            // What no parameter comes before has no gradient, nor what a norm makes whose backward pass is another layer's.
            let Some(slot) = self.plan.gradient_slots[self.computed.layers[index].output()] else { continue };
            let mut dy = std::mem::take(&mut self.value_gradients[slot]);
            let _range = range(format_args!("{} backward", self.layer_name(index)));
            self.layer_backward(index, &mut dy)?;
            self.value_gradients[slot] = dy;
        }
        Ok(())
    }
}

/// What the batch norms of a network read, and what they did in their forward pass: for who does work of theirs too.
struct Norms<'a> {
    model: &'a Model,
    plan: &'a Plan,
    values: &'a [RealBuffer],
    parameters: &'a Buffer<f32>,
    saved: &'a Buffer<f32>,
    maps: &'a [Option<RowMap>],
    fusions: &'a [Fusion],
}

impl<'a> Norms<'a> {
    /// What a norm reads, and how it changed that in training.
    fn normalised(&self, norm: usize) -> Normalised<'a> {
        let Norms { model, plan, values, parameters, saved, .. } = *self;
        let BatchNorm { scale, shift, statistics, input, .. } = model.batch_norm(norm);
        let [mean, invstd] = plan.statistic_ranges(model, statistics).map(|range| saved.slice(range));
        let [gamma, beta] = [scale, shift].map(|id| parameters.slice(plan.range(id)));
        Normalised { x: values[plan.value_slots[input]].view(), gamma, beta, mean, invstd }
    }

    /// The same, and what a norm alone, or with a residual that is not a norm too, made of it.
    fn normed(&self, norm: usize) -> Normed<'a> {
        let BatchNorm { residual, relu, output, .. } = self.model.batch_norm(norm);
        let reads_y = relu && residual.is_some() && self.fusions[norm].added_norm.is_none();
        let y = reads_y.then(|| self.values[self.plan.value_slots[output]].view());
        Normed { norm: self.normalised(norm), y, relu, map: self.maps[norm].as_ref() }
    }

    /// A norm for the max pool that does its work.
    fn pooled(&self, norm: usize, count: Slice<'a, u32>) -> NormPool<'a> {
        let relu = self.model.batch_norm(norm).relu;
        NormPool { norm: self.normalised(norm), relu, map: self.maps[norm].as_ref(), count }
    }
}

/// Where means and inverse deviations of so many columns lie in what a layer norm keeps.
fn moments(columns: usize) -> [Range<usize>; 2] {
    [0..columns, aligned(columns)..aligned(columns) + columns]
}

/// The lists that a pass of a layer multiplies with; none where it takes all weights.
fn lists_of(paths: &mut [Option<Lists>], index: usize, pass: Pass) -> Option<&mut KeptWeights> {
    paths[index].as_mut().and_then(|lists| lists.of(pass))
}
