//! What a network is under a ticket's masks: what of it is computed, how each layer multiplies, and where every tensor
//! lies. A layer none of whose passes multiplies all weights keeps its kept weights alone in memory, one after the other:
//! its parameters, gradients and the optimizer's state scale with its density.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::compact::Compaction;
use super::fusion::{Fusion, fusions};
use super::model::{Layer, Model};
use super::paths::{PlannedLayer, Planning, choose};
use super::plan::{Plan, Use};
use super::ways::MaskedLayer;
use crate::device::Device;
use crate::error::Result;
use crate::mask::Mask;
use crate::ops::SAMPLE_ALIGNMENT;
use crate::ops::kept::{Pass, group_rows};

/// A network under masks, before it has memory.
pub struct Layout {
    /// The model of what is computed.
    pub computed: Model,
    /// What is computed and stored.
    pub compaction: Compaction,
    /// Where every tensor lies.
    pub plan: Plan,
    pub(super) layers: Vec<Option<PlannedLayer>>,
    pub(super) fusions: Vec<Fusion>,
}

impl Layout {
    /// Plans a network for batches of `batch` samples; what has no mask is kept.
    ///
    /// # Errors
    /// [`crate::Error`] if a layer's shape cannot be computed, or times cannot be taken.
    pub fn new(
        device: &Device,
        model: &Model,
        masks: &BTreeMap<String, Mask>,
        batch: usize,
        memory_for: Use,
        planning: &Planning,
    ) -> Result<Self> {
        let (computed, mut compaction) = Compaction::new(model, masks);
        let mut layers = plan_layers(device, &computed, &compaction, masks, batch, memory_for, planning)?;
        for (planned, layer) in layers.iter_mut().zip(&computed.layers) {
            let (Some(planned), Layer::Conv { weight, .. }) = (planned, layer) else { continue };
            if planned.choice.needs_kept_alone() {
                planned.packed = true;
                compaction.pack(*weight, planned.layer.places());
            }
        }
        let length = |id: usize| compaction.stored_len(id, computed.parameters[id].elements());
        let lengths = (0..computed.parameters.len()).map(length).collect();
        let plan = Plan::with_lengths(device, &computed, lengths, batch, memory_for)?;
        let fusions = fusions(device, &computed, &layers, batch, memory_for)?;
        Ok(Layout { computed, compaction, plan, layers, fusions })
    }

    /// Bytes of the lists of kept weights, beside the plan's.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when memory runs out.
    pub fn list_bytes(&self, device: &Device) -> Result<usize> {
        self.layers.iter().flatten().map(|planned| Ok(planned.lists(device)?.bytes())).sum()
    }
}

/// How the layers of what is computed multiply under masks.
pub(super) fn plan_layers(
    device: &Device,
    computed: &Model,
    compaction: &Compaction,
    masks: &BTreeMap<String, Mask>,
    batch: usize,
    memory_for: Use,
    planning: &Planning,
) -> Result<Vec<Option<PlannedLayer>>> {
    let passes = if memory_for == Use::Evaluate { &Pass::ALL[..1] } else { &Pass::ALL };
    let masked = |layer: &Layer| {
        let Layer::Conv { weight, .. } = *layer else { return Ok(None) };
        let parameter = &computed.parameters[weight];
        let Some(mask) = masks.get(&parameter.name) else { return Ok(None) };
        let mask = compaction.mask(weight, &parameter.shape, mask);
        if mask.count() == mask.len() {
            return Ok(None);
        }
        let shape = computed.conv_shape(layer, batch.next_multiple_of(SAMPLE_ALIGNMENT))?;
        Ok(Some(MaskedLayer::new(&shape, computed.precision, &mask, group_rows(device, &shape, computed.precision))))
    };
    // Finding groups of rows takes a while; choosing may measure, and has the device for itself.
    let layers: Result<Vec<Option<MaskedLayer>>> = computed.layers.par_iter().map(masked).collect();
    let choose = |layer: Option<MaskedLayer>| {
        let Some(layer) = layer else { return Ok(None) };
        let choice = choose(device, &layer, passes, planning)?;
        Ok(Some(PlannedLayer { layer, choice, packed: false }))
    };
    layers?.into_iter().map(choose).collect()
}
