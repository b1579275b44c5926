//! Where every tensor of a network lies: one arena, named pieces, nothing allocated later.
//!
//! Activations that the backward pass reads have memory of their own. Gradients of activations, and activations that
//! are only evaluated, share: a piece is free again after the last layer that reads it.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::model::{Layer, Model, Parameter, ParameterId, ValueId};
use crate::device::{Device, Precision};
use crate::error::Result;
use crate::ops::SAMPLE_ALIGNMENT;
use crate::ops::optimizer::GRADIENT_NORM_PARTIALS;
use crate::ops::round::RoundPlan;

/// Pieces and parameters start at multiples of this many words of four bytes.
const ALIGNMENT: usize = 64;

/// What a network is for, which decides what it has memory for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Forward, backward, and the steps of this optimizer.
    Train(OptimizerKind),
    /// Forward alone.
    Evaluate,
}

/// The optimizers.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Stochastic gradient descent with momentum.
    Sgd,
    /// Adam with decoupled weight decay (arXiv 1711.05101).
    Adamw,
}

impl Use {
    /// Tensors of the parameters' sizes that the optimizer keeps: the velocity, or the first and the second moment.
    pub(super) fn moments(self) -> usize {
        match self {
            Use::Evaluate => 0,
            Use::Train(OptimizerKind::Sgd) => 1,
            Use::Train(OptimizerKind::Adamw) => 2,
        }
    }
}

/// What a planned tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Trained tensors.
    Parameters,
    /// Their gradients.
    Gradients,
    /// The optimizer's state.
    Optimizer,
    /// Masks: a bit for each weight.
    Masks,
    /// Running and batch statistics of norms.
    Statistics,
    /// Values of layers.
    Activations,
    /// Their gradients.
    ActivationGradients,
    /// Partial sums, and what a step reads of its batch.
    Scratch,
}

/// A named tensor and its place.
#[derive(Clone, Debug)]
pub struct PlannedTensor {
    /// Layer or parameter.
    pub name: String,
    /// What it is for.
    pub group: Group,
    /// Offset in the arena.
    pub offset_bytes: usize,
    /// Size; 0 for a tensor that shares the memory of another.
    pub bytes: usize,
}

/// A place in the arena, in words of four bytes.
pub(super) type Piece = (usize, usize);

/// The arena of a network.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Every tensor.
    pub tensors: Vec<PlannedTensor>,
    /// Size of the arena, alignment included.
    pub bytes: usize,
    pub(super) pieces: Vec<Piece>,
    /// Offset of each parameter among the parameters, in elements; the same among gradients, velocity and mask bits.
    pub(super) parameters: Vec<usize>,
    /// Elements of each parameter that memory holds.
    pub(super) lengths: Vec<usize>,
    /// Offset of each norm's running mean among the statistics; its variance follows after `features`, aligned.
    pub(super) statistics: Vec<usize>,
    /// Number of parameters, gaps included.
    pub(super) parameter_len: usize,
    /// Number of statistics, gaps included.
    pub(super) statistics_len: usize,
    /// Which of the value pieces holds each value.
    pub(super) value_slots: Vec<usize>,
    /// Which of the gradient pieces holds each value's gradient; none for the input's.
    pub(super) gradient_slots: Vec<Option<usize>>,
    /// Whether a layer's gradient is added to what its input's gradient holds.
    pub(super) accumulates: Vec<bool>,
    /// Which of the kept pieces holds what a layer's backward pass needs beside values; of a max pool, which of the pool
    /// indices.
    pub(super) kept_slots: Vec<usize>,
    /// Number of pool indices.
    pub(super) pools: usize,
    /// Where the flags of each layer's heads begin; for attention.
    pub(super) heads: Vec<usize>,
    /// Which weights products read in bf16, by layer; none in f32.
    pub(super) rounded: RoundPlan,
}

/// The order of a plan's pieces; value pieces, gradient pieces, kept pieces and pool indices follow.
pub(super) enum Fixed {
    Parameters,
    Gradients,
    FirstMoment,
    SecondMoment,
    Mask,
    Decay,
    Statistics,
    Saved,
    Scratch,
    Partials,
    Labels,
    Count,
    Rate,
    Corrections,
    Step,
    Heads,
    Rounded,
    Pieces,
}

pub(super) fn aligned(words: usize) -> usize {
    words.next_multiple_of(ALIGNMENT)
}

/// Names the places of tensors, one piece after the other.
#[derive(Default)]
struct Carver {
    tensors: Vec<PlannedTensor>,
    pieces: Vec<Piece>,
    end: usize,
}

impl Carver {
    /// A piece that holds one tensor.
    fn piece(&mut self, group: Group, name: &str, words: usize) {
        self.place(group, name, self.end, words);
        self.reserve(words);
    }

    /// A piece whose tensors are placed by the caller.
    fn reserve(&mut self, words: usize) {
        self.pieces.push((self.end, words));
        // A gap after each piece, so that a sanitizer sees what reaches past the end.
        self.end += aligned(words) + ALIGNMENT;
    }

    fn place(&mut self, group: Group, name: &str, offset: usize, words: usize) {
        let (offset_bytes, bytes) = (offset * 4, words * 4);
        self.tensors.push(PlannedTensor { name: name.into(), group, offset_bytes, bytes });
    }
}

impl Plan {
    /// Finds every tensor of a network a place, for batches of `batch` samples on this device.
    ///
    /// # Errors
    /// [`crate::Error`] if a layer's shape cannot be computed.
    pub fn new(device: &Device, model: &Model, batch: usize, memory_for: Use) -> Result<Self> {
        let lengths = model.parameters.iter().map(Parameter::elements).collect();
        Self::with_lengths(device, model, lengths, batch, memory_for)
    }

    /// The same where memory holds so many elements of each parameter.
    pub(super) fn with_lengths(
        device: &Device,
        model: &Model,
        lengths: Vec<usize>,
        batch: usize,
        memory_for: Use,
    ) -> Result<Self> {
        let n = batch.next_multiple_of(SAMPLE_ALIGNMENT);
        let train = memory_for != Use::Evaluate;
        let (parameters, parameter_len) = offsets(lengths.iter().copied());
        let (statistics, statistics_len) = offsets(model.statistics.iter().map(|s| 2 * aligned(s.features)));
        let masks = parameter_len / 32;
        let when = |used: bool, words: usize| if used { words } else { 0 };

        let mut carve = Carver::default();
        let start = carve.end;
        carve.reserve(parameter_len);
        for ((parameter, offset), length) in model.parameters.iter().zip(&parameters).zip(&lengths) {
            carve.place(Group::Parameters, &parameter.name, start + offset, *length);
        }
        carve.piece(Group::Gradients, "gradients of parameters", when(train, parameter_len));
        carve.piece(Group::Optimizer, "velocity or first moment", when(memory_for.moments() > 0, parameter_len));
        carve.piece(Group::Optimizer, "second moment", when(memory_for.moments() > 1, parameter_len));
        carve.piece(Group::Masks, "mask bits", masks);
        carve.piece(Group::Masks, "weight decay bits", when(train, masks));
        carve.piece(Group::Statistics, "running statistics", statistics_len);
        carve.piece(Group::Statistics, "batch statistics", when(train, statistics_len));
        carve.piece(Group::Scratch, "partial sums", when(train, scratch(device, model, n)?));
        carve.piece(Group::Scratch, "gradient norm", when(train, GRADIENT_NORM_PARTIALS));
        carve.piece(Group::Scratch, "labels", n);
        carve.piece(Group::Scratch, "sample count", 1);
        carve.piece(Group::Scratch, "learning rate", 1);
        carve.piece(Group::Scratch, "bias corrections", 2);
        carve.piece(Group::Scratch, "step", 1);
        let (heads, head_len) = offsets(model.layers.iter().map(|layer| match layer {
            Layer::Attention { heads, .. } => *heads,
            _ => 0,
        }));
        carve.piece(Group::Masks, "heads with a kept projection", head_len);
        let rounded = round_plan(model, &parameters, &lengths, n)?;
        carve.piece(Group::Parameters, "weights in bf16", rounded.len().div_ceil(2));
        debug_assert_eq!(carve.pieces.len(), Fixed::Pieces as usize);

        let sizes: Vec<usize> =
            model.values.iter().map(|value| value.elements(n) * model.precision.bytes() / 4).collect();
        let value_slots = match memory_for {
            Use::Train(_) => carve_values(&mut carve, model, &sizes),
            Use::Evaluate => carve_shared(&mut carve, Group::Activations, model, &sizes, &forward_lives(model)),
        };
        let value_slots = value_slots.into_iter().map(|slot| slot.expect("every value has a life")).collect();
        let owners = gradient_owners(model);
        let lives = if train { gradient_lives(model, &owners) } else { vec![None; sizes.len()] };
        let own_slots = carve_shared(&mut carve, Group::ActivationGradients, model, &sizes, &lives);
        let gradient_slots = owners.iter().map(|&owner| own_slots[owner]).collect();
        let (kept_slots, pools) = carve_kept(&mut carve, model, n, train)?;
        Ok(Plan {
            tensors: carve.tensors,
            bytes: carve.end * 4,
            pieces: carve.pieces,
            parameters,
            lengths,
            statistics,
            parameter_len,
            statistics_len,
            value_slots,
            gradient_slots,
            accumulates: accumulates(model),
            kept_slots,
            pools,
            heads,
            rounded,
        })
    }

    /// Where a parameter lies among the parameters.
    pub(super) fn range(&self, id: ParameterId) -> Range<usize> {
        let start = self.parameters[id];
        start..start + self.lengths[id]
    }

    /// Where running mean and variance of a batch norm lie among the statistics.
    pub(super) fn statistic_ranges(&self, model: &Model, index: usize) -> [Range<usize>; 2] {
        let (start, features) = (self.statistics[index], model.statistics[index].features);
        [0, aligned(features)].map(|offset| start + offset..start + offset + features)
    }

    /// Bytes of the tensors of a group.
    pub fn group_bytes(&self, group: Group) -> usize {
        self.tensors.iter().filter(|tensor| tensor.group == group).map(|tensor| tensor.bytes).sum()
    }
}

/// Aligned offsets of tensors one after the other, and their end.
fn offsets(sizes: impl Iterator<Item = usize>) -> (Vec<usize>, usize) {
    let mut end = 0;
    let mut next = |size: usize| {
        let offset = end;
        end += aligned(size);
        offset
    };
    let offsets = sizes.map(&mut next).collect();
    (offsets, end)
}

/// The weights that products read in bf16: of every layer that multiplies.
fn round_plan(model: &Model, parameters: &[usize], lengths: &[usize], n: usize) -> Result<RoundPlan> {
    let rounded = |layer: &Layer| match layer {
        Layer::Conv { weight, .. } if model.precision == Precision::Bf16 => {
            let shape = model.conv_shape(layer, n)?;
            Ok((lengths[*weight] == shape.weight_len()).then_some((parameters[*weight], shape)))
        }
        _ => Ok(None),
    };
    Ok(RoundPlan::new(model.layers.iter().map(rounded).collect::<Result<Vec<_>>>()?))
}

/// Elements of scratch memory that a pass of the largest of the layers needs.
fn scratch(device: &Device, model: &Model, n: usize) -> Result<usize> {
    let mut most = 0;
    for (index, layer) in model.layers.iter().enumerate() {
        most = most.max(match layer {
            Layer::Conv { output, .. } => {
                let shape = model.conv_shape(layer, n)?;
                // What is summed for norms, in tiles of all weights or of groups; of these the smallest, since other masks may come.
                let multiplied = || [None, Some(0)].into_iter();
                let tile = |groups| shape.statistics_tile(device, model.precision, groups);
                let statistics = model.norm_of(*output).and_then(|_| multiplied().filter_map(tile).min());
                let statistics = statistics.map_or(0, |tile| shape.statistics_len(tile));
                let tiles = |groups| shape.gradient_tiles(device, model.precision, groups);
                let sums = model.norm_before(index).map_or(0, |norm| {
                    let tiles = multiplied().filter_map(tiles).max().unwrap_or(0);
                    model.norms_of(norm) * 2 * shape.channels() * tiles
                });
                statistics.max(sums).max(shape.gradient_scratch_len(device, model.precision))
            }
            Layer::Norm { output, .. } => model.norms_of(index) * model.norm_shape(*output, n)?.scratch_len(),
            Layer::LayerNorm { output, .. } => model.layer_norm_shape(*output, n)?.scratch_len(),
            Layer::Attention { .. } => model.attention_shape(layer, n)?.statistic_len(),
            _ => 0,
        });
    }
    Ok(most)
}

/// Pieces for what layers keep for their backward pass beside values, then for the indices of max pools, which a
/// forward pass always writes: the number of each layer's piece, and the number of max pools.
fn carve_kept(carve: &mut Carver, model: &Model, n: usize, train: bool) -> Result<(Vec<usize>, usize)> {
    let (mut slots, mut kept) = (vec![0; model.layers.len()], 0);
    for (slot, layer) in slots.iter_mut().zip(&model.layers).filter(|_| train) {
        let (what, words) = match layer {
            Layer::LayerNorm { input, .. } => {
                ("mean and deviation", 2 * aligned(model.layer_norm_shape(*input, n)?.columns()))
            }
            Layer::Attention { .. } => ("log-sum-exp", model.attention_shape(layer, n)?.statistic_len()),
            _ => continue,
        };
        carve.piece(Group::Statistics, &format!("{} {what}", model.values[layer.output()].name), words);
        *slot = kept;
        kept += 1;
    }
    let mut pools = 0;
    for (slot, layer) in slots.iter_mut().zip(&model.layers) {
        if let Layer::MaxPool { output, .. } = layer {
            let name = format!("{} index", model.values[*output].name);
            carve.piece(Group::Activations, &name, model.values[*output].elements(n).div_ceil(4));
            *slot = pools;
            pools += 1;
        }
    }
    Ok((slots, pools))
}

/// A piece for each value.
fn carve_values(carve: &mut Carver, model: &Model, sizes: &[usize]) -> Vec<Option<usize>> {
    for (value, size) in model.values.iter().zip(sizes) {
        carve.piece(Group::Activations, &value.name, *size);
    }
    (0..sizes.len()).map(Some).collect()
}

/// First and last moment at which a tensor is needed.
type Life = Option<(usize, usize)>;

/// In a forward pass: from the layer that writes a value to the last that reads it.
fn forward_lives(model: &Model) -> Vec<Life> {
    let mut lives = vec![Some((0, 0)); model.values.len()];
    for (time, layer) in model.layers.iter().enumerate() {
        // A convolution writes what GELU or a sum makes of its result.
        let written = model.around_gelu(time).map(|[before, _]| before).or(model.before_sum(time)).unwrap_or(time);
        lives[layer.output()] = Some((written + 1, time + 1));
        for input in layer.inputs() {
            lives[input].as_mut().expect("written before").1 = time + 1;
        }
    }
    lives[model.output()].as_mut().expect("written").1 = model.layers.len() + 1;
    lives
}

/// The value whose memory holds each value's gradient: its own, or that of what reads it and writes its gradient over the one
/// it is given: a sum, which passes it on as it is, GELU, a norm with a residual.
fn gradient_owners(model: &Model) -> Vec<ValueId> {
    let have = model.have_gradients();
    let mut owners: Vec<ValueId> = (0..model.values.len()).collect();
    for (index, layer) in model.layers.iter().enumerate().rev() {
        match *layer {
            Layer::Residual { input, branch, output, .. } => {
                owners[input] = owners[output];
                if layer.adds_plainly() {
                    owners[branch] = owners[output];
                }
            }
            Layer::Norm { residual: Some(residual), output, .. }
                if have[residual] && model.added_norm(index).is_none() =>
            {
                owners[residual] = owners[output];
            }
            Layer::Embed { input, output, .. } | Layer::Gelu { input, output } => owners[input] = owners[output],
            _ => {}
        }
    }
    owners
}

/// In a backward pass: from the first layer, seen from the end, that reads a value to the layer that writes it, for the
/// values that own the memory of their gradient. A layer that does another norm's work writes the gradient of what that reads, and
/// there is none of what it makes.
fn gradient_lives(model: &Model, owners: &[ValueId]) -> Vec<Life> {
    let have = model.have_gradients();
    let (mut lives, mut unwritten): (Vec<Life>, Vec<ValueId>) = (vec![None; model.values.len()], Vec::new());
    lives[model.output()] = Some((0, 0));
    for (time, layer) in model.layers.iter().rev().enumerate() {
        let norm = model.norm_within(model.layers.len() - 1 - time).map(|norm| &model.layers[norm]);
        unwritten.extend(norm.map(Layer::output));
        let values = layer.inputs().chain([layer.output()]).chain(norm.into_iter().flat_map(Layer::inputs));
        for value in values.filter(|value| have[*value] && !unwritten.contains(value)) {
            lives[owners[value]].get_or_insert((time + 1, time + 1)).1 = time + 1;
        }
    }
    lives
}

/// Pieces for tensors with these lives: a piece is used again by a tensor of the same size, once it is free.
fn carve_shared(
    carve: &mut Carver,
    group: Group,
    model: &Model,
    sizes: &[usize],
    lives: &[Life],
) -> Vec<Option<usize>> {
    let first = carve.pieces.len();
    let mut free_after: Vec<usize> = Vec::new();
    let mut slots = vec![None; sizes.len()];
    let mut order: Vec<usize> = (0..sizes.len()).filter(|&value| lives[value].is_some()).collect();
    order.sort_by_key(|&value| lives[value]);
    for value in order {
        let (born, dies) = lives[value].expect("filtered");
        let fits = |&slot: &usize| free_after[slot] < born && carve.pieces[first + slot].1 == sizes[value];
        let name = &model.values[value].name;
        let slot = (0..free_after.len()).find(fits).unwrap_or(free_after.len());
        if slot == free_after.len() {
            carve.piece(group, name, sizes[value]);
            free_after.push(dies);
        } else {
            carve.place(group, name, carve.pieces[first + slot].0, 0);
            free_after[slot] = dies;
        }
        slots[value] = Some(slot);
    }
    slots
}

/// Whether each layer, in a backward pass, comes to an input whose gradient another layer has written already.
///
/// # Panics
/// If that is a layer that cannot add to it: no network of this crate has one.
fn accumulates(model: &Model) -> Vec<bool> {
    let mut written = vec![false; model.values.len()];
    let mut accumulates = vec![false; model.layers.len()];
    for (index, layer) in model.layers.iter().enumerate().rev() {
        for input in layer.inputs() {
            let again = std::mem::replace(&mut written[input], true);
            let adds = matches!(layer, Layer::Conv { .. } | Layer::LayerNorm { .. });
            assert!(!again || adds, "{layer:?} cannot add to a gradient");
            accumulates[index] |= again;
        }
    }
    accumulates
}
