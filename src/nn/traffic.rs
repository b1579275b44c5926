//! What a training step has to compute and to move, counted from shapes: operations of products, and bytes that kernels
//! read from and write to the device's memory.
//!
//! Each kernel is counted to read once what it needs and to write once what it makes, as if caches kept what it reads again by
//! itself; what two kernels of a pass read counts twice. So a batch norm forward reads x twice (statistics, then the norm) and
//! writes y; but once where the convolution that makes x sums it, whose own bytes then include the statistics of tiles, written
//! and read again; and so backward, where the convolution that makes dy sums it with x. Two norms that are summed read both x
//! and write their sum alone, nothing of what each makes by itself. Padded samples and tokens are moved as others are,
//! but what is multiplied with them counts for nothing. A residual sum, and GELU, in the epilogues of products move what these
//! do not have: elsewhere also what these leave them. Left out are vectors of an element a feature (biases, γ, β, statistics),
//! embeddings, and labels. An operation is half a multiply-add of a convolution, a linear layer or attention; what attention
//! computes again in its backward pass is not counted twice.

use std::iter::Sum;
use std::ops::Add;

use super::fusion::{Fusion, NormBefore};
use super::layout::Layout;
use super::model::{BatchNorm, Layer, ValueId};
use super::paths::PlannedLayer;
use super::plan::Use;
use super::ways::Way;
use crate::device::{Device, Policy, Precision};
use crate::error::Result;
use crate::ops::SAMPLE_ALIGNMENT;
use crate::ops::attention::AttentionShape;
use crate::ops::conv::{ConvShape, on_tensor_cores};
use crate::ops::kept::Pass;
use crate::ops::layer_norm::LayerNormShape;
use crate::ops::tokens::TokenPool;

/// Bytes of what says which weight a kept one is.
const PLACE: usize = size_of::<u32>();

/// What some kernels have to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Floating point operations of products, two a multiply-add.
    pub flop: usize,
    /// Bytes read.
    pub read: usize,
    /// Bytes written.
    pub written: usize,
}

impl Work {
    /// Reads and writes so many elements of f32.
    pub fn elements(read: usize, written: usize) -> Self {
        Self::reals(Precision::F32, read, written)
    }

    /// Reads and writes so many elements of activations.
    pub fn reals(precision: Precision, read: usize, written: usize) -> Self {
        let bytes = precision.bytes();
        Work { flop: 0, read: bytes * read, written: bytes * written }
    }

    /// The same, with so many multiply-adds.
    pub fn with_multiply_adds(self, count: usize) -> Self {
        Work { flop: 2 * count, ..self }
    }

    /// Bytes read and written.
    pub fn bytes(&self) -> usize {
        self.read + self.written
    }
}

impl Add for Work {
    type Output = Work;

    fn add(self, other: Work) -> Work {
        Work { flop: self.flop + other.flop, read: self.read + other.read, written: self.written + other.written }
    }
}

impl Sum for Work {
    fn sum<I: Iterator<Item = Work>>(all: I) -> Work {
        all.fold(Work::default(), Add::add)
    }
}

/// The work of a layer, of the loss or of the optimizer, for a batch.
#[derive(Clone, Debug)]
pub struct LayerWork {
    /// Name of the value that the layer writes; `loss`; `optimizer`.
    pub name: String,
    /// Forward; of the loss all of it.
    pub forward: Work,
    /// Gradients of what it reads and of its parameters.
    pub backward: Work,
    /// The optimizer's step.
    pub update: Work,
}

impl LayerWork {
    /// All passes together.
    pub fn total(&self) -> Work {
        self.forward + self.backward + self.update
    }
}

/// The weights that a pass of a convolution multiplies with.
#[derive(Clone, Copy)]
struct Multiplied {
    /// How many.
    count: usize,
    /// Elements of the weight gradient.
    kept: usize,
    /// Bytes of their values, and of the list that says which they are.
    bytes: usize,
    /// True columns of a pixel: samples, or their tokens.
    columns: usize,
    /// Of what they are multiplied with.
    precision: Precision,
}

impl Multiplied {
    fn all(shape: &ConvShape, columns: usize, precision: Precision) -> Self {
        let count = shape.weight_len();
        let bytes = precision.bytes() * shape.read_weight_len(precision);
        Multiplied { count, kept: count, bytes, columns, precision }
    }

    /// In the passes of a layer that are planned.
    fn of(shape: &ConvShape, columns: usize, precision: Precision, planned: Option<&PlannedLayer>) -> [Self; 3] {
        let all = Self::all(shape, columns, precision);
        let Some(planned) = planned else { return [all; 3] };
        let (kept, layer) = (planned.layer.places().len(), &planned.layer);
        let bytes = (precision.bytes() + PLACE) * kept;
        std::array::from_fn(|pass| match planned.choice.ways.get(pass) {
            None | Some(Way::Dense) => all,
            Some(&way) => Multiplied { count: layer.multiplied(way)[pass], kept, bytes, ..all },
        })
    }

    fn multiply_adds(&self, shape: &ConvShape) -> usize {
        self.count * shape.output_image().iter().product::<usize>() * self.columns
    }

    fn forward(&self, shape: &ConvShape) -> Work {
        let work = Work::reals(self.precision, shape.input_len(), shape.output_len());
        Work { read: work.read + self.bytes, ..work }.with_multiply_adds(self.multiply_adds(shape))
    }

    fn input_gradient(&self, shape: &ConvShape, accumulate: bool) -> Work {
        let added_to = if accumulate { shape.input_len() } else { 0 };
        let work = Work::reals(self.precision, shape.output_len() + added_to, shape.input_len());
        Work { read: work.read + self.bytes, ..work }.with_multiply_adds(self.multiply_adds(shape))
    }

    /// With `partial` elements of partial sums, written and read again.
    fn weight_gradient(&self, shape: &ConvShape, partial: usize) -> Work {
        let read = Work::reals(self.precision, shape.input_len() + shape.output_len(), 0);
        (read + Work::elements(partial, partial + self.kept)).with_multiply_adds(self.multiply_adds(shape))
    }
}

/// Convolution with all weights, forward; of a pixel's columns so many are true.
pub fn conv_forward(shape: &ConvShape, columns: usize, precision: Precision) -> Work {
    Multiplied::all(shape, columns, precision).forward(shape)
}

/// Input gradient of a convolution with all weights, overwritten.
pub fn conv_input_gradient(shape: &ConvShape, columns: usize, precision: Precision) -> Work {
    Multiplied::all(shape, columns, precision).input_gradient(shape, false)
}

/// Weight gradient of a convolution with all weights.
pub fn conv_weight_gradient(device: &Device, shape: &ConvShape, columns: usize, precision: Precision) -> Work {
    let partial = shape.partial_sums_len(device, precision, false);
    Multiplied::all(shape, columns, precision).weight_gradient(shape, partial)
}

/// Batch norm of x elements to y elements with the batch's statistics, with another value added to it or not.
pub fn norm_forward(precision: Precision, x: usize, y: usize, residual: bool) -> Work {
    Work::reals(precision, x, 0) + norm_apply(precision, x, y, residual)
}

/// The same with statistics that are there.
pub fn norm_apply(precision: Precision, x: usize, y: usize, residual: bool) -> Work {
    Work::reals(precision, x + if residual { y } else { 0 }, y)
}

/// Its backward pass, which reads y where ReLU follows a sum (`relu_of_sum`), and writes a gradient of what was added where that
/// has one, for its second kernel to read.
pub fn norm_backward(precision: Precision, x: usize, y: usize, relu_of_sum: bool, residual: bool) -> Work {
    let of_y = if relu_of_sum { 2 * y } else { y };
    let (again, written) = if residual { (y, y) } else { (of_y, 0) };
    Work::reals(precision, 2 * x + of_y + again, x + written)
}

/// The sum of two batch norms, each of so many elements, whose statistics are there.
pub fn norm_pair_forward(precision: Precision, elements: usize) -> Work {
    Work::reals(precision, 2 * elements, elements)
}

/// Its backward pass, by one kernel where the gradient has been summed, else by two.
pub fn norm_pair_backward(precision: Precision, elements: usize, summed: bool) -> Work {
    Work::reals(precision, if summed { 3 } else { 6 } * elements, 2 * elements)
}

/// Batch norm of x elements, whose statistics are there, and the max pool that reads its result and writes y elements.
pub fn norm_pool_forward(precision: Precision, x: usize, y: usize) -> Work {
    Work::reals(precision, x, y) + Work { written: y, ..Work::default() }
}

/// Its backward pass, by two kernels that both read everything.
pub fn norm_pool_backward(precision: Precision, x: usize, y: usize) -> Work {
    Work::reals(precision, 2 * (x + y), x) + Work { read: 2 * y, ..Work::default() }
}

/// Layer norm, which keeps mean and deviation of each column.
pub fn layer_norm_forward(shape: &LayerNormShape, precision: Precision) -> Work {
    Work::reals(precision, shape.len(), shape.len()) + Work::elements(0, 2 * shape.columns())
}

/// Its backward pass, which adds to what dx holds or overwrites it.
pub fn layer_norm_backward(shape: &LayerNormShape, precision: Precision, accumulate: bool) -> Work {
    let added_to = if accumulate { shape.len() } else { 0 };
    let (statistics, partial) = (2 * shape.columns(), shape.scratch_len());
    Work::reals(precision, 2 * shape.len() + added_to, shape.len()) + Work::elements(statistics + partial, partial)
}

/// Attention over so many true samples, which keeps the log-sum-exp of each query: two products.
pub fn attention_forward(shape: &AttentionShape, samples: usize, precision: Precision) -> Work {
    let work = Work::reals(precision, shape.qkv_len(), shape.output_len()) + Work::elements(0, shape.statistic_len());
    work.with_multiply_adds(2 * shape.multiply_adds(samples))
}

/// Its backward pass: five products, by one kernel on the host, by one of queries and one of keys on a GPU.
pub fn attention_backward(device: &Device, shape: &AttentionShape, samples: usize, precision: Precision) -> Work {
    let (d, statistic) = (shape.output_len(), shape.statistic_len());
    // y is read for delta alone, which the kernel of keys reads again.
    let work = match device.policy() {
        Policy::Direct => {
            Work::reals(precision, shape.qkv_len() + 2 * d, shape.qkv_len()) + Work::elements(statistic, 0)
        }
        Policy::Staged => {
            let reals = Work::reals(precision, 2 * (shape.qkv_len() + d) + d, shape.qkv_len());
            reals + Work::elements(3 * statistic, statistic)
        }
    };
    work.with_multiply_adds(5 * shape.multiply_adds(samples))
}

/// An optimizer's step over so many parameters, with a bit for the mask of each and one for weight decay where it is
/// asked for (`decay`); `moments` tensors of state: 1 for SGD, 2 for AdamW.
pub fn optimizer_step(parameters: usize, moments: usize, decay: bool) -> Work {
    let bits = parameters.div_ceil(8) * if decay { 2 } else { 1 };
    let work = Work::elements((2 + moments) * parameters, (1 + moments) * parameters);
    Work { read: work.read + bits, ..work }
}

/// The norm of all gradients, for clipping.
fn gradient_norm(parameters: usize) -> Work {
    let work = Work::elements(parameters, 0);
    Work { read: work.read + parameters.div_ceil(8), ..work }
}

/// The work of a training step of a batch of `batch` samples, layer by layer in the order of the forward pass, then the
/// loss and the optimizer. The layout is one for training; with `clip`, the norm of all gradients is computed.
///
/// # Errors
/// [`crate::Error`] if a layer's shape cannot be computed.
pub fn training_step(
    device: &Device,
    layout: &Layout,
    batch: usize,
    memory_for: Use,
    clip: bool,
) -> Result<Vec<LayerWork>> {
    let (model, plan) = (&layout.computed, &layout.plan);
    let mut step = layers(device, layout, batch)?;
    let logits = model.values[model.output()].elements(batch.next_multiple_of(SAMPLE_ALIGNMENT));
    let (forward, backward, update) = (Work::reals(model.precision, logits, logits), Work::default(), Work::default());
    step.push(LayerWork { name: "loss".into(), forward, backward, update });
    let norm = if clip { gradient_norm(plan.parameter_len) } else { Work::default() };
    let rounded = Work::elements(plan.rounded.len(), 0) + Work::reals(Precision::Bf16, 0, plan.rounded.len());
    let update = norm + optimizer_step(plan.parameter_len, memory_for.moments(), true) + rounded;
    let forward = Work::default();
    step.push(LayerWork { name: "optimizer".into(), forward, backward, update });
    Ok(step)
}

/// The work of a forward pass in evaluation of a batch of `batch` samples, layer by layer. The layout is one for evaluation.
///
/// # Errors
/// [`crate::Error`] if a layer's shape cannot be computed.
pub fn evaluation(device: &Device, layout: &Layout, batch: usize) -> Result<Vec<LayerWork>> {
    let model = &layout.computed;
    let mut forward = layers(device, layout, batch)?;
    let n = batch.next_multiple_of(SAMPLE_ALIGNMENT);
    for (LayerWork { forward: work, .. }, layer) in forward.iter_mut().zip(&model.layers) {
        match *layer {
            // Its statistics are there.
            Layer::Norm { input, .. } => work.read -= model.precision.bytes() * model.values[input].elements(n),
            // Nothing is kept for a backward pass.
            Layer::LayerNorm { input, .. } => {
                work.written -= Work::elements(0, 2 * model.layer_norm_shape(input, n)?.columns()).written;
            }
            Layer::Attention { .. } => {
                work.written -= Work::elements(0, model.attention_shape(layer, n)?.statistic_len()).written;
            }
            _ => {}
        }
    }
    Ok(forward)
}

/// The work of a network's layers, without what they have no gradients for.
fn layers(device: &Device, layout: &Layout, batch: usize) -> Result<Vec<LayerWork>> {
    let (model, plan) = (&layout.computed, &layout.plan);
    let work = |(index, layer): (usize, &Layer)| {
        let (forward, backward) = layer_work(device, layout, index, batch)?;
        let backward = if plan.gradient_slots[layer.output()].is_some() { backward } else { Work::default() };
        let name = model.values[layer.output()].name.clone();
        Ok(LayerWork { name, forward, backward, update: Work::default() })
    };
    model.layers.iter().enumerate().map(work).collect()
}

/// Forward and backward of a layer whose output has a gradient, for `batch` samples.
fn layer_work(device: &Device, layout: &Layout, index: usize, batch: usize) -> Result<(Work, Work)> {
    let (model, plan, layer) = (&layout.computed, &layout.plan, &layout.computed.layers[index]);
    let n = batch.next_multiple_of(SAMPLE_ALIGNMENT);
    let elements = |value: ValueId| model.values[value].elements(n);
    let has_gradient = |value: ValueId| plan.gradient_slots[value].is_some();
    let accumulate = plan.accumulates[index];
    let y = elements(layer.output());
    // What moves each element once, forward and backward.
    let precision = model.precision;
    let reals = |read: usize, written: usize| Work::reals(precision, read, written);
    let moved = |x: usize| (reals(x, y), reals(y, x));
    // Whether a layer's work stands in the epilogue of this convolution, which then moves what the layer does not get from it.
    let in_epilogue = |convolution: Option<usize>, pass: Pass| {
        convolution.is_some_and(|index| {
            let way = layout.layers[index].as_ref().and_then(|planned| planned.choice.ways.get(pass as usize));
            way != Some(&Way::Direct) && on_tensor_cores(device, precision)
        })
    };
    // What a convolution reads beside, to sum the gradient of this norm in so many tiles of a row, and these sums.
    let norm_before = |norm: usize, tiles: usize| {
        let BatchNorm { input, output, residual, relu, .. } = model.batch_norm(norm);
        let norms = model.norms_of(norm);
        let of_y = if relu && residual.is_some() && norms == 1 { elements(output) } else { 0 };
        let sums = norms * 2 * tiles * model.values[input].features();
        reals(norms * elements(input) + of_y, 0) + Work::elements(sums, sums)
    };
    Ok(match *layer {
        Layer::Conv { bias, input, .. } => {
            let shape = model.conv_shape(layer, n)?;
            let columns = batch * model.true_tokens(input);
            let [forward, dx, dw] = Multiplied::of(&shape, columns, precision, layout.layers[index].as_ref());
            let dense = dw.count == shape.weight_len();
            let partial = if dense { shape.partial_sums_len(device, precision, false) } else { 0 };
            let mut backward = dw.weight_gradient(&shape, partial);
            if bias.is_some() && !(dense && on_tensor_cores(device, precision)) {
                backward = backward + reals(y, 0);
            }
            if has_gradient(input) {
                backward = backward + dx.input_gradient(&shape, accumulate);
            }
            if let Some(NormBefore { layer, tiles }) = layout.fusions[index].norm_before {
                backward = backward + norm_before(layer, tiles);
            }
            let tiles = layout.fusions[index].norm.map_or(0, |norm| shape.statistics_len(norm.tile));
            (forward.forward(&shape) + Work::elements(tiles, tiles), backward)
        }
        Layer::Norm { input, residual, relu, .. } => {
            let x = elements(input);
            let gradient = residual.is_some_and(has_gradient);
            let relu_of_sum = relu && residual.is_some();
            let Fusion { norm, gradient_is_summed, added_norm, is_within, .. } = layout.fusions[index];
            let statistics = reals(if norm.is_some() { 0 } else { x }, 0);
            if is_within {
                return Ok((statistics, Work::default()));
            }
            if added_norm.is_some() {
                let backward = norm_pair_backward(precision, x, gradient_is_summed);
                return Ok((statistics + norm_pair_forward(precision, x), backward));
            }
            let forward = if norm.is_some() { norm_apply } else { norm_forward };
            let backward = if gradient_is_summed {
                reals(x + y, x)
            } else {
                norm_backward(precision, x, y, relu_of_sum, gradient)
            };
            (forward(precision, x, y, residual.is_some()), backward)
        }
        // Pixels between strides are not read, but their gradient is written.
        Layer::Shortcut { input, output, .. } => {
            let features = |value: ValueId| model.values[value].features();
            let read = y / features(output) * features(input).min(features(output));
            (reals(read, y), reals(read, elements(input)))
        }
        // A byte for each window says where its maximum is.
        Layer::MaxPool { input, .. } => {
            if let Some(norm) = layout.fusions[index].pooled_norm {
                let x = elements(model.batch_norm(norm).input);
                return Ok((norm_pool_forward(precision, x, y), norm_pool_backward(precision, x, y)));
            }
            let (forward, backward) = moved(elements(input));
            (Work { written: forward.written + y, ..forward }, Work { read: backward.read + y, ..backward })
        }
        Layer::MeanPool { input, .. } | Layer::Patches { input, .. } | Layer::Dropout { input, .. } => {
            moved(elements(input))
        }
        // The gradient of what it reads is that of what it writes.
        Layer::Embed { input, .. } => (reals(elements(input), y), reals(y, 0)),
        Layer::LayerNorm { input, .. } => {
            let shape = model.layer_norm_shape(input, n)?;
            (layer_norm_forward(&shape, precision), layer_norm_backward(&shape, precision, accumulate))
        }
        Layer::Attention { .. } => {
            let shape = model.attention_shape(layer, n)?;
            (attention_forward(&shape, batch, precision), attention_backward(device, &shape, batch, precision))
        }
        Layer::Gelu { .. } => {
            let [before, after] = model.around_gelu(index).map_or([None; 2], |around| around.map(Some));
            (
                if in_epilogue(before, Pass::Forward) { reals(0, y) } else { reals(y, y) },
                if in_epilogue(after, Pass::InputGradient) { reals(y, 0) } else { reals(2 * y, y) },
            )
        }
        Layer::Residual { .. } if layer.adds_plainly() => {
            let read =
                if in_epilogue(model.before_sum(index).filter(|_| layout.fusions[index].elsewhere), Pass::Forward) {
                    y
                } else {
                    2 * y
                };
            (reals(read, y), Work::default())
        }
        Layer::Residual { scale, .. } => {
            let branch = if scale.is_some() { y } else { 0 };
            (reals(2 * y, y), reals(y + branch, y))
        }
        Layer::TokenPool { pool, input, .. } => {
            let read = if pool == TokenPool::First { y } else { elements(input) };
            (reals(read, y), reals(y, elements(input)))
        }
    })
}
