//! Where every tensor of a network lies: one arena, named pieces, nothing allocated later.
//!
//! Activations that the backward pass reads have memory of their own. Gradients of activations, and activations that
//! are only evaluated, share: a piece is free again after the last layer that reads it.

use super::model::{Layer, Model, ValueId};
use crate::device::Device;
use crate::error::Result;
use crate::ops::SAMPLE_ALIGNMENT;
use crate::ops::optimizer::GRADIENT_NORM_PARTIALS;

/// Pieces and parameters start at multiples of this many words of four bytes.
const ALIGNMENT: usize = 64;

/// Whether a network is trained, or only evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Forward, backward and optimizer.
    Train,
    /// Forward with running statistics.
    Evaluate,
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
}

/// The order of a plan's pieces; value pieces, gradient pieces and pool indices follow.
pub(super) enum Fixed {
    Parameters,
    Gradients,
    Velocity,
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
    pub fn new(device: &Device, model: &Model, batch: usize, mode: Mode) -> Result<Self> {
        let n = batch.next_multiple_of(SAMPLE_ALIGNMENT);
        let train = mode == Mode::Train;
        let (parameters, parameter_len) = offsets(model.parameters.iter().map(|p| p.elements()));
        let (statistics, statistics_len) = offsets(model.statistics.iter().map(|s| 2 * aligned(s.features)));
        let masks = parameter_len / 32;
        let when = |used: bool, words: usize| if used { words } else { 0 };

        let mut carve = Carver::default();
        let start = carve.end;
        carve.reserve(parameter_len);
        for (parameter, offset) in model.parameters.iter().zip(&parameters) {
            carve.place(Group::Parameters, &parameter.name, start + offset, parameter.elements());
        }
        carve.piece(Group::Gradients, "gradients of parameters", when(train, parameter_len));
        carve.piece(Group::Optimizer, "velocity", when(train, parameter_len));
        carve.piece(Group::Masks, "mask bits", masks);
        carve.piece(Group::Masks, "weight decay bits", when(train, masks));
        carve.piece(Group::Statistics, "running statistics", statistics_len);
        carve.piece(Group::Statistics, "batch statistics", when(train, statistics_len));
        carve.piece(Group::Scratch, "partial sums", scratch(device, model, n, mode)?);
        carve.piece(Group::Scratch, "gradient norm", when(train, GRADIENT_NORM_PARTIALS));
        carve.piece(Group::Scratch, "labels", n);
        carve.piece(Group::Scratch, "sample count", 1);
        carve.piece(Group::Scratch, "learning rate", 1);
        carve.piece(Group::Scratch, "bias corrections", 2);
        carve.piece(Group::Scratch, "step", 1);
        debug_assert_eq!(carve.pieces.len(), Fixed::Pieces as usize);

        let sizes: Vec<usize> = model.values.iter().map(|value| value.features() * n).collect();
        let value_slots = match mode {
            Mode::Train => carve_values(&mut carve, model, &sizes),
            Mode::Evaluate => carve_shared(&mut carve, Group::Activations, model, &sizes, &forward_lives(model)),
        };
        let value_slots = value_slots.into_iter().map(|slot| slot.expect("every value has a life")).collect();
        let lives = if train { gradient_lives(model) } else { vec![None; sizes.len()] };
        let gradient_slots = carve_shared(&mut carve, Group::ActivationGradients, model, &sizes, &lives);
        for layer in &model.layers {
            if let Layer::MaxPool { output, .. } = layer {
                let name = format!("{} index", model.values[*output].name);
                carve.piece(Group::Activations, &name, (sizes[*output]).div_ceil(4));
            }
        }
        Ok(Plan {
            tensors: carve.tensors,
            bytes: carve.end * 4,
            pieces: carve.pieces,
            parameters,
            statistics,
            parameter_len,
            statistics_len,
            value_slots,
            gradient_slots,
            accumulates: accumulates(model),
        })
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

/// Elements of scratch memory that the largest of the layers needs.
fn scratch(device: &Device, model: &Model, n: usize, mode: Mode) -> Result<usize> {
    if mode == Mode::Evaluate {
        return Ok(0);
    }
    let mut most = 0;
    for layer in &model.layers {
        most = most.max(match layer {
            Layer::Conv { .. } => model.conv_shape(layer, n)?.gradient_scratch_len(device),
            Layer::Norm { output, .. } => model.norm_shape(*output, n)?.scratch_len(),
            _ => 0,
        });
    }
    Ok(most)
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
        lives[layer.output()] = Some((time + 1, time + 1));
        for input in layer.inputs() {
            lives[input].as_mut().expect("written before").1 = time + 1;
        }
    }
    lives[model.output()].as_mut().expect("written").1 = model.layers.len() + 1;
    lives
}

/// In a backward pass: from the first layer, seen from the end, that reads a value to the layer that writes it.
fn gradient_lives(model: &Model) -> Vec<Life> {
    let mut lives: Vec<Life> = vec![None; model.values.len()];
    lives[model.output()] = Some((0, 0));
    for (time, layer) in model.layers.iter().rev().enumerate() {
        if let Some(life) = &mut lives[layer.output()] {
            life.1 = time + 1;
        }
        for input in layer.inputs().filter(|&input| input != INPUT) {
            lives[input].get_or_insert((time + 1, time + 1)).1 = time + 1;
        }
    }
    lives
}

/// The value whose gradient nobody asks for.
const INPUT: ValueId = 0;

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
            assert!(!again || matches!(layer, Layer::Conv { .. }), "{layer:?} cannot add to a gradient");
            accumulates[index] |= again;
        }
    }
    accumulates
}
