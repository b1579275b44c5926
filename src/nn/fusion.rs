//! What layers do of their neighbours' work, in kernels that hold what it needs.

use super::model::{Layer, Model, ValueId};
use super::paths::PlannedLayer;
use super::plan::Use;
use super::ways::Way;
use crate::device::Device;
use crate::error::Result;
use crate::ops::SAMPLE_ALIGNMENT;
use crate::ops::kept::Pass;

/// What of it a layer does, or has done for it.
#[derive(Clone, Copy, Default)]
pub(super) struct Fusion {
    /// Of a convolution and the batch norm that alone reads it, in training: the first sums what it writes.
    pub norm: Option<FusedNorm>,
    /// Of a convolution whose gradient of what it reads is the last that comes to it: it takes it through the ReLU of the batch
    /// norm which has made that, and sums it for the norm.
    pub norm_before: Option<NormBefore>,
    /// Of that norm.
    pub gradient_is_summed: bool,
    /// Of a batch norm that adds what another has made, in training: both passes of that layer are its own, but for statistics.
    pub added_norm: Option<usize>,
    /// Of a max pool that alone reads what a batch norm makes, in training: both passes of the norm are its own, but for
    /// statistics.
    pub pooled_norm: Option<usize>,
    /// Of a batch norm that another layer does the work of, in one of these ways: its result is not written.
    pub is_within: bool,
    /// Of a convolution: a second value, which it writes too.
    pub beside: Option<Beside>,
    /// Of a convolution: what it reads is GELU of this value, whose gradient it writes instead of that of what it reads.
    pub gelu_before: Option<ValueId>,
    /// Of a GELU, both of whose passes are the convolutions' around it, and of a residual sum, whose forward pass is that of the
    /// convolution before it.
    pub elsewhere: bool,
}

/// What a convolution writes beside its own value.
#[derive(Clone, Copy)]
pub(super) enum Beside {
    /// GELU of it.
    Gelu(ValueId),
    /// Its sum with `x`.
    Sum {
        /// What is added.
        x: ValueId,
        /// What is written.
        to: ValueId,
    },
}

impl Beside {
    /// What is written.
    pub fn to(self) -> ValueId {
        match self {
            Beside::Gelu(to) | Beside::Sum { to, .. } => to,
        }
    }
}

/// A convolution that sums its result, tile by tile, for a batch norm.
#[derive(Clone, Copy)]
pub(super) struct FusedNorm {
    /// Columns of a tile.
    pub tile: usize,
    /// Index of the norm's statistics.
    pub statistics: usize,
}

/// A batch norm whose gradient is summed, tile by tile, by a convolution that reads what it has made.
#[derive(Clone, Copy)]
pub(super) struct NormBefore {
    /// The norm.
    pub layer: usize,
    /// Tiles of a row.
    pub tiles: usize,
}

impl Model {
    /// The layer that is all that reads a value.
    fn only_reader(&self, value: ValueId) -> Option<usize> {
        let mut readers =
            (0..self.layers.len()).filter(|&index| self.layers[index].inputs().any(|input| input == value));
        readers.next().filter(|_| readers.next().is_none())
    }

    /// The batch norm that is all that reads a value, and the index of its statistics.
    pub(super) fn norm_of(&self, value: ValueId) -> Option<(usize, usize)> {
        let reader = self.only_reader(value)?;
        match self.layers[reader] {
            Layer::Norm { input, statistics, .. } if input == value => Some((reader, statistics)),
            _ => None,
        }
    }

    /// The batch norm that has made what a convolution reads, if this is the first layer that reads it: the last from which a
    /// gradient comes to it.
    pub(super) fn norm_before(&self, convolution: usize) -> Option<usize> {
        let Layer::Conv { input, .. } = self.layers[convolution] else { return None };
        let norm = self.writer(input).filter(|&index| matches!(self.layers[index], Layer::Norm { .. }))?;
        let first = self.layers.iter().position(|layer| layer.inputs().any(|read| read == input));
        (first == Some(convolution)).then_some(norm)
    }

    /// The batch norm that has made what another adds, if nothing else reads that and it is nothing but a norm of as many features:
    /// the shortcut of a block that changes its width.
    pub(super) fn added_norm(&self, norm: usize) -> Option<usize> {
        let Layer::Norm { input, residual: Some(residual), output, .. } = self.layers[norm] else { return None };
        let added = self.writer(residual).filter(|_| self.only_reader(residual) == Some(norm))?;
        let Layer::Norm { input: also, residual: None, relu: false, .. } = self.layers[added] else { return None };
        // Under masks, each may have some of the result's features alone.
        let features = |value: ValueId| self.values[value].features();
        (features(input) == features(output) && features(also) == features(output)).then_some(added)
    }

    /// The batch norm that has made what a max pool reads, if nothing else reads that and it is nothing but a norm.
    pub(super) fn pooled_norm(&self, pool: usize) -> Option<usize> {
        let Layer::MaxPool { input, .. } = self.layers[pool] else { return None };
        let norm = self.writer(input).filter(|_| self.only_reader(input) == Some(pool))?;
        matches!(self.layers[norm], Layer::Norm { residual: None, .. }).then_some(norm)
    }

    /// The batch norm both of whose passes, but for statistics, are those of this layer, in training.
    pub(super) fn norm_within(&self, layer: usize) -> Option<usize> {
        self.added_norm(layer).or_else(|| self.pooled_norm(layer))
    }

    /// How many norms a norm's passes are of.
    pub(super) fn norms_of(&self, norm: usize) -> usize {
        1 + usize::from(self.added_norm(norm).is_some())
    }

    /// The layer that writes a value; none of the input.
    fn writer(&self, value: ValueId) -> Option<usize> {
        self.layers.iter().position(|layer| layer.output() == value)
    }

    fn is_convolution(&self, index: usize) -> bool {
        matches!(self.layers[index], Layer::Conv { .. })
    }

    /// The convolutions (linear layers) before and after a GELU, if nothing else reads what the first or the GELU writes.
    pub(super) fn around_gelu(&self, gelu: usize) -> Option<[usize; 2]> {
        let Layer::Gelu { input, output } = self.layers[gelu] else { return None };
        let before = self.writer(input).filter(|&index| self.is_convolution(index))?;
        let after = self.only_reader(output).filter(|&index| self.is_convolution(index))?;
        (self.only_reader(input) == Some(gelu)).then_some([before, after])
    }

    /// The convolution that writes the branch of a plain residual sum, if what is added to that is there before.
    pub(super) fn before_sum(&self, sum: usize) -> Option<usize> {
        let Layer::Residual { input, branch, .. } = self.layers[sum] else { return None };
        let before =
            self.writer(branch).filter(|&index| self.is_convolution(index) && self.layers[sum].adds_plainly())?;
        (self.writer(input) < Some(before)).then_some(before)
    }
}

/// What is fused, by layer.
pub(super) fn fusions(
    device: &Device,
    computed: &Model,
    layers: &[Option<PlannedLayer>],
    batch: usize,
    memory_for: Use,
) -> Result<Vec<Fusion>> {
    let mut fusions = vec![Fusion::default(); computed.layers.len()];
    for (index, layer) in computed.layers.iter().enumerate() {
        match *layer {
            Layer::Conv { output, .. } if memory_for != Use::Evaluate => {
                let shape = computed.conv_shape(layer, batch.next_multiple_of(SAMPLE_ALIGNMENT))?;
                let multiplied = |pass| groups_of(layers[index].as_ref(), pass);
                if let (Some((norm, statistics)), Some(groups)) = (computed.norm_of(output), multiplied(Pass::Forward))
                {
                    let tile = shape.statistics_tile(device, computed.precision, groups);
                    fusions[index].norm = tile.map(|tile| FusedNorm { tile, statistics });
                    fusions[norm].norm = fusions[index].norm;
                }
                if let (Some(norm), Some(groups)) = (computed.norm_before(index), multiplied(Pass::InputGradient)) {
                    let tiles = shape.gradient_tiles(device, computed.precision, groups);
                    fusions[index].norm_before = tiles.map(|tiles| NormBefore { layer: norm, tiles });
                    fusions[norm].gradient_is_summed = tiles.is_some();
                }
            }
            Layer::Norm { .. } if memory_for != Use::Evaluate => {
                fusions[index].added_norm = computed.added_norm(index);
                if let Some(added) = fusions[index].added_norm {
                    fusions[added].is_within = true;
                }
            }
            Layer::MaxPool { .. } if memory_for != Use::Evaluate => {
                fusions[index].pooled_norm = computed.pooled_norm(index);
                if let Some(norm) = fusions[index].pooled_norm {
                    fusions[norm].is_within = true;
                }
            }
            Layer::Gelu { input, output } => {
                let Some([before, after]) = computed.around_gelu(index) else { continue };
                fusions[before].beside = Some(Beside::Gelu(output));
                fusions[after].gelu_before = Some(input);
                fusions[index].elsewhere = true;
            }
            Layer::Residual { input, output, .. } => {
                let before = computed.before_sum(index).filter(|&before| fusions[before].beside.is_none());
                let Some(before) = before else { continue };
                fusions[before].beside = Some(Beside::Sum { x: input, to: output });
                fusions[index].elsewhere = true;
            }
            _ => {}
        }
    }
    Ok(fusions)
}

/// The groups of rows that a pass multiplies, none where it takes all weights; or nothing, where it takes rows by themselves.
fn groups_of(planned: Option<&PlannedLayer>, pass: Pass) -> Option<Option<usize>> {
    match planned.map(|planned| (planned.choice.ways[pass as usize], &planned.layer)) {
        None | Some((Way::Dense, _)) => Some(None),
        Some((Way::Groups, masked)) if pass == Pass::InputGradient => Some(Some(masked.input_groups())),
        Some((Way::Groups, masked)) => Some(Some(masked.output_groups())),
        Some((Way::Direct, _)) => None,
    }
}
