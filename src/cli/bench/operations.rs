//! The operations of `dilt bench --op`: their sizes, what they have to compute and to move, and how each is prepared.

use dilt::Error;
use dilt::device::{Buffer, Device, Precision, RealBuffer};
use dilt::nn::traffic::{self, Work};
use dilt::ops::Columns;
use dilt::ops::attention::{AttentionInput, AttentionSaved, AttentionShape, attention_backward, attention_forward};
use dilt::ops::conv::{ConvShape, conv_forward, conv_input_gradient, conv_weight_gradient};
use dilt::ops::epilogue::{Dx, Epilogue};
use dilt::ops::gelu::{gelu_backward, gelu_forward};
use dilt::ops::gw::{Couplings, Layers, MOST_COUPLED, Start, Step};
use dilt::ops::layer_norm::{
    LayerNormAffine, LayerNormBackward, LayerNormShape, LayerNormStatistics, layer_norm_backward, layer_norm_forward,
};
use dilt::ops::norm::{
    NormAffine, NormBackward, NormGradient, NormGradients, NormInput, NormRunning, NormSaved, NormShape, Normalised,
    Normed, norm_backward, norm_forward,
};
use dilt::ops::norm_pair::{NormPair, NormPairGradient, norm_pair_backward, norm_pair_forward};
use dilt::ops::norm_pool::{NormPool, norm_pool_backward, norm_pool_forward};
use dilt::ops::optimizer::{AdamW, OptimizerInput, Sgd, adamw_step, sgd_step};
use dilt::ops::pool::PoolShape;
use dilt::ops::prune::{Selection, prune_scratch_len, prune_smallest};
use ndarray::Array2;

use super::op::{Op, Sizes, Timer};

const CONV: &[(&str, usize)] =
    &[("c", 64), ("h", 32), ("w", 32), ("k", 64), ("r", 3), ("s", 3), ("stride", 1), ("pad", 1), ("n", 128)];
const LINEAR: &[(&str, usize)] = &[("c", 384), ("k", 1536), ("t", 197), ("n", 64)];
const NORM: &[(&str, usize)] = &[("c", 64), ("h", 32), ("w", 32), ("n", 128)];
/// Read by windows of 3 x 3, stride 2.
const NORM_POOL: &[(&str, usize)] = &[("c", 64), ("h", 112), ("w", 112), ("n", 32)];
const LAYER_NORM: &[(&str, usize)] = &[("d", 384), ("t", 197), ("n", 64)];
const ATTENTION: &[(&str, usize)] = &[("heads", 6), ("head_dim", 64), ("t", 197), ("n", 64)];
const ELEMENTS: &[(&str, usize)] = &[("elements", 25_000_000)];
const PRUNE: &[(&str, usize)] = &[("elements", 25_000_000), ("remove", 5_000_000)];
const COUPLINGS: &[(&str, usize)] = &[("probes", 256), ("count", 28), ("iterations", 50)];

const fn op(
    name: &'static str,
    sizes: &'static [(&'static str, usize)],
    work: fn(&Device, Precision, &Sizes) -> dilt::Result<Work>,
    time: fn(&mut Timer, &Sizes) -> dilt::Result<()>,
) -> Op {
    Op { name, sizes, work, time }
}

/// All of them. A linear layer is a convolution of one pixel, over the tokens of samples.
pub(super) const OPS: &[Op] = &[
    op("conv_forward", CONV, conv_forward_work, time_conv_forward),
    op("conv_input_gradient", CONV, conv_input_gradient_work, time_conv_input_gradient),
    op("conv_weight_gradient", CONV, conv_weight_gradient_work, time_conv_weight_gradient),
    op("linear_forward", LINEAR, conv_forward_work, time_conv_forward),
    op("linear_input_gradient", LINEAR, conv_input_gradient_work, time_conv_input_gradient),
    op("linear_weight_gradient", LINEAR, conv_weight_gradient_work, time_conv_weight_gradient),
    op("norm_forward", NORM, norm_forward_work, time_norm_forward),
    op("norm_backward", NORM, norm_backward_work, time_norm_backward),
    op("norm_pair_forward", NORM, norm_pair_forward_work, time_norm_pair_forward),
    op("norm_pair_backward", NORM, norm_pair_backward_work, time_norm_pair_backward),
    op("norm_pool_forward", NORM_POOL, norm_pool_forward_work, time_norm_pool_forward),
    op("norm_pool_backward", NORM_POOL, norm_pool_backward_work, time_norm_pool_backward),
    op("layer_norm_forward", LAYER_NORM, layer_norm_forward_work, time_layer_norm_forward),
    op("layer_norm_backward", LAYER_NORM, layer_norm_backward_work, time_layer_norm_backward),
    op("attention_forward", ATTENTION, attention_forward_work, time_attention_forward),
    op("attention_backward", ATTENTION, attention_backward_work, time_attention_backward),
    op("gelu_forward", ELEMENTS, |_, p, s| Ok(elementwise(p, s, 1)), time_gelu_forward),
    op("gelu_backward", ELEMENTS, |_, p, s| Ok(elementwise(p, s, 2)), time_gelu_backward),
    op("sgd_step", ELEMENTS, |_, _, s| Ok(traffic::optimizer_step(s.get("elements"), 1, false)), time_sgd_step),
    op("adamw_step", ELEMENTS, |_, _, s| Ok(traffic::optimizer_step(s.get("elements"), 2, false)), time_adamw_step),
    // One read of the weights.
    op("prune", PRUNE, |_, _, s| Ok(Work::elements(s.get("elements"), 0)), time_prune),
    op("couplings", COUPLINGS, couplings_work, time_couplings),
];

/// The shape of a convolution, or of a linear layer, and how many columns of a pixel are true.
fn conv_shape(sizes: &Sizes) -> dilt::Result<(ConvShape, usize)> {
    let [c, k, n] = ["c", "k", "n"].map(|key| sizes.get(key));
    if let Some(tokens) = sizes.find("t") {
        let columns = Columns::tokens(n, tokens)?.len();
        return Ok((ConvShape::new([c, 1, 1], k, [1, 1], 1, 0, columns)?, n * tokens));
    }
    let [h, w, r, s] = ["h", "w", "r", "s"].map(|key| sizes.get(key));
    Ok((ConvShape::new([c, h, w], k, [r, s], sizes.get("stride"), sizes.get("pad"), n)?, n))
}

fn conv_forward_work(_: &Device, precision: Precision, sizes: &Sizes) -> dilt::Result<Work> {
    let (shape, columns) = conv_shape(sizes)?;
    Ok(traffic::conv_forward(&shape, columns, precision))
}

fn conv_input_gradient_work(_: &Device, precision: Precision, sizes: &Sizes) -> dilt::Result<Work> {
    let (shape, columns) = conv_shape(sizes)?;
    Ok(traffic::conv_input_gradient(&shape, columns, precision))
}

fn conv_weight_gradient_work(device: &Device, precision: Precision, sizes: &Sizes) -> dilt::Result<Work> {
    let (shape, columns) = conv_shape(sizes)?;
    Ok(traffic::conv_weight_gradient(device, &shape, columns, precision))
}

fn norm_forward_work(_: &Device, precision: Precision, sizes: &Sizes) -> dilt::Result<Work> {
    let elements = norm_shape(sizes)?.len();
    Ok(traffic::norm_forward(precision, elements, elements, false))
}

fn norm_backward_work(_: &Device, precision: Precision, sizes: &Sizes) -> dilt::Result<Work> {
    let elements = norm_shape(sizes)?.len();
    Ok(traffic::norm_backward(precision, elements, elements, false, false))
}

fn norm_pair_forward_work(_: &Device, precision: Precision, sizes: &Sizes) -> dilt::Result<Work> {
    Ok(traffic::norm_pair_forward(precision, norm_shape(sizes)?.len()))
}

fn norm_pair_backward_work(_: &Device, precision: Precision, sizes: &Sizes) -> dilt::Result<Work> {
    Ok(traffic::norm_pair_backward(precision, norm_shape(sizes)?.len(), false))
}

fn norm_pool_forward_work(_: &Device, precision: Precision, sizes: &Sizes) -> dilt::Result<Work> {
    Ok(traffic::norm_pool_forward(precision, norm_shape(sizes)?.len(), pool_shape(sizes)?.output_len()))
}

fn norm_pool_backward_work(_: &Device, precision: Precision, sizes: &Sizes) -> dilt::Result<Work> {
    Ok(traffic::norm_pool_backward(precision, norm_shape(sizes)?.len(), pool_shape(sizes)?.output_len()))
}

fn layer_norm_forward_work(_: &Device, precision: Precision, sizes: &Sizes) -> dilt::Result<Work> {
    Ok(traffic::layer_norm_forward(&layer_norm_shape(sizes)?, precision))
}

fn layer_norm_backward_work(_: &Device, precision: Precision, sizes: &Sizes) -> dilt::Result<Work> {
    Ok(traffic::layer_norm_backward(&layer_norm_shape(sizes)?, precision, false))
}

fn attention_forward_work(_: &Device, precision: Precision, sizes: &Sizes) -> dilt::Result<Work> {
    Ok(traffic::attention_forward(&attention_shape(sizes)?, sizes.get("n"), precision))
}

fn attention_backward_work(device: &Device, precision: Precision, sizes: &Sizes) -> dilt::Result<Work> {
    Ok(traffic::attention_backward(device, &attention_shape(sizes)?, sizes.get("n"), precision))
}

/// Reads so many tensors and writes one.
fn elementwise(precision: Precision, sizes: &Sizes, read: usize) -> Work {
    let elements = sizes.get("elements");
    Work::reals(precision, read * elements, elements)
}

/// Two products of matrices, and two of a matrix and a vector an iteration.
fn couplings_work(_: &Device, _: Precision, sizes: &Sizes) -> dilt::Result<Work> {
    let [n, count, iterations] = ["probes", "count", "iterations"].map(|key| sizes.get(key));
    Ok(Work::default().with_multiply_adds(count * (2 * n * n * n + iterations * 2 * n * n)))
}

fn time_conv_forward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let (shape, _) = conv_shape(sizes)?;
    let (x, w) = (timer.reals(shape.input_len())?, timer.reals(shape.read_weight_len(timer.precision))?);
    let mut y = timer.real_zeros(shape.output_len())?;
    timer.time(|device| conv_forward(device, &shape, x.view(), w.view(), Epilogue::default(), y.view_mut()))
}

fn time_conv_input_gradient(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let (shape, _) = conv_shape(sizes)?;
    let (dy, w) = (timer.reals(shape.output_len())?, timer.reals(shape.read_weight_len(timer.precision))?);
    let mut dx = timer.real_zeros(shape.input_len())?;
    timer.time(|device| conv_input_gradient(device, &shape, dy.view(), w.view(), Dx::Set, dx.view_mut()))
}

fn time_conv_weight_gradient(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let (shape, _) = conv_shape(sizes)?;
    let (x, dy) = (timer.reals(shape.input_len())?, timer.reals(shape.output_len())?);
    let mut dw = timer.zeros(shape.weight_len())?;
    let mut scratch = timer.zeros(shape.gradient_scratch_len(&timer.device.clone(), timer.precision))?;
    timer.time(|device| {
        conv_weight_gradient(device, &shape, x.view(), dy.view(), scratch.view_mut(), dw.view_mut(), None)
    })
}

fn norm_shape(sizes: &Sizes) -> dilt::Result<NormShape> {
    NormShape::new(sizes.get("c"), sizes.get("h") * sizes.get("w"), sizes.get("n"))
}

fn pool_shape(sizes: &Sizes) -> dilt::Result<PoolShape> {
    PoolShape::new(sizes.get("c"), ["h", "w"].map(|key| sizes.get(key)), 3, 2, 1, sizes.get("n"))
}

/// The tensors of a norm, and the vectors of its features.
struct NormTensors {
    shape: NormShape,
    x: RealBuffer,
    y: RealBuffer,
    scratch: Buffer<f32>,
    gamma: Buffer<f32>,
    beta: Buffer<f32>,
    running: [Buffer<f32>; 2],
    saved: [Buffer<f32>; 2],
    count: Buffer<u32>,
}

impl NormTensors {
    fn new(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<Self> {
        let (shape, [c, n]) = (norm_shape(sizes)?, ["c", "n"].map(|key| sizes.get(key)));
        Ok(NormTensors {
            x: timer.reals(shape.len())?,
            y: timer.real_zeros(shape.len())?,
            scratch: timer.zeros(shape.scratch_len())?,
            gamma: timer.random(c)?,
            beta: timer.random(c)?,
            running: [timer.zeros(c)?, timer.zeros(c)?],
            saved: [timer.zeros(c)?, timer.zeros(c)?],
            count: timer.device.upload(&[n as u32])?,
            shape,
        })
    }

    /// What normalises it is what is saved.
    fn normalised(&self) -> Normalised<'_> {
        let [mean, invstd] = self.saved.each_ref().map(Buffer::view);
        Normalised { x: self.x.view(), gamma: self.gamma.view(), beta: self.beta.view(), mean, invstd }
    }

    fn forward(&mut self, device: &Device) -> dilt::Result<()> {
        let input = NormInput { x: self.x.view(), residual: None, relu: true, map: None, count: self.count.view() };
        let affine = NormAffine { gamma: self.gamma.view(), beta: self.beta.view(), epsilon: 1e-5 };
        let [mean, var] = self.running.each_mut().map(Buffer::view_mut);
        let running = NormRunning { mean, var, momentum: 0.1 };
        let [mean, invstd] = self.saved.each_mut().map(Buffer::view_mut);
        let saved = NormSaved { mean, invstd };
        norm_forward(device, &self.shape, input, affine, running, saved, self.scratch.view_mut(), self.y.view_mut())
    }
}

/// With ReLU.
fn time_norm_forward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let mut norm = NormTensors::new(timer, sizes)?;
    timer.time(|device| norm.forward(device))
}

fn time_norm_backward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let mut norm = NormTensors::new(timer, sizes)?;
    norm.forward(&timer.device)?;
    let (elements, features) = (norm.shape.len(), norm.gamma.len());
    let (dy, mut dx) = (timer.reals(elements)?, timer.real_zeros(elements)?);
    let (mut dgamma, mut dbeta) = (timer.zeros(features)?, timer.zeros(features)?);
    let mut scratch = timer.zeros(norm.shape.scratch_len())?;
    timer.time(|device| {
        let input = NormBackward {
            normed: Normed { norm: norm.normalised(), y: None, relu: true, map: None },
            dy: NormGradient::Kept(dy.view()),
            training: true,
            count: norm.count.view(),
        };
        let to = NormGradients { dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut(), dx: dx.view_mut() };
        norm_backward(device, &norm.shape, input, scratch.view_mut(), to)
    })
}

/// Two norms whose statistics are there.
fn norm_pair(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<[NormTensors; 2]> {
    let mut norms = [NormTensors::new(timer, sizes)?, NormTensors::new(timer, sizes)?];
    norms.iter_mut().try_for_each(|norm| norm.forward(&timer.device))?;
    Ok(norms)
}

/// With ReLU; of statistics that are there.
fn time_norm_pair_forward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let norms = norm_pair(timer, sizes)?;
    let (pair, shape) = (pair_of(&norms), norms[0].shape);
    let mut y = timer.real_zeros(shape.len())?;
    timer.time(|device| norm_pair_forward(device, &shape, pair, y.view_mut()))
}

fn pair_of(norms: &[NormTensors; 2]) -> NormPair<'_> {
    NormPair { norms: norms.each_ref().map(NormTensors::normalised), relu: true, count: norms[0].count.view() }
}

fn time_norm_pair_backward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let norms = norm_pair(timer, sizes)?;
    let (pair, shape, features) = (pair_of(&norms), norms[0].shape, norms[0].gamma.len());
    let (dy, mut scratch) = (timer.reals(shape.len())?, timer.zeros(2 * shape.scratch_len())?);
    let mut tensors =
        || dilt::Result::Ok((timer.zeros(features)?, timer.zeros(features)?, timer.real_zeros(shape.len())?));
    let mut gradients = [tensors()?, tensors()?];
    timer.time(|device| {
        let to = gradients.each_mut().map(|(dgamma, dbeta, dx)| NormGradients {
            dgamma: dgamma.view_mut(),
            dbeta: dbeta.view_mut(),
            dx: dx.view_mut(),
        });
        let dy = NormPairGradient::Whole(dy.view());
        norm_pair_backward(device, &shape, pair, dy, scratch.view_mut(), to)
    })
}

/// A norm whose statistics are there, before a pool.
fn pooled(norm: &NormTensors) -> NormPool<'_> {
    NormPool { norm: norm.normalised(), relu: true, map: None, count: norm.count.view() }
}

fn time_norm_pool_forward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let (mut norm, pool) = (NormTensors::new(timer, sizes)?, pool_shape(sizes)?);
    norm.forward(&timer.device)?;
    let (mut index, mut y) = (timer.zeros::<u8>(pool.output_len())?, timer.real_zeros(pool.output_len())?);
    timer.time(|device| norm_pool_forward(device, &norm.shape, &pool, pooled(&norm), index.view_mut(), y.view_mut()))
}

fn time_norm_pool_backward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let (mut norm, pool) = (NormTensors::new(timer, sizes)?, pool_shape(sizes)?);
    norm.forward(&timer.device)?;
    let (mut index, mut y) = (timer.zeros::<u8>(pool.output_len())?, timer.real_zeros(pool.output_len())?);
    norm_pool_forward(&timer.device, &norm.shape, &pool, pooled(&norm), index.view_mut(), y.view_mut())?;
    let (dy, mut dx) = (timer.reals(pool.output_len())?, timer.real_zeros(norm.shape.len())?);
    let (mut dgamma, mut dbeta) = (timer.zeros(norm.gamma.len())?, timer.zeros(norm.gamma.len())?);
    let mut scratch = timer.zeros(norm.shape.scratch_len())?;
    timer.time(|device| {
        let to = NormGradients { dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut(), dx: dx.view_mut() };
        let (index, scratch) = (index.view(), scratch.view_mut());
        norm_pool_backward(device, &norm.shape, &pool, pooled(&norm), dy.view(), index, scratch, to)
    })
}

fn layer_norm_shape(sizes: &Sizes) -> dilt::Result<LayerNormShape> {
    LayerNormShape::new(sizes.get("d"), Columns::tokens(sizes.get("n"), sizes.get("t"))?)
}

fn time_layer_norm_forward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let shape = layer_norm_shape(sizes)?;
    let (x, mut y) = (timer.reals(shape.len())?, timer.real_zeros(shape.len())?);
    let (gamma, beta) = (timer.random(sizes.get("d"))?, timer.random(sizes.get("d"))?);
    let (mut mean, mut invstd) = (timer.zeros(shape.columns())?, timer.zeros(shape.columns())?);
    let count = timer.device.upload(&[sizes.get("n") as u32])?;
    timer.time(|device| {
        let affine = LayerNormAffine { gamma: gamma.view(), beta: beta.view(), epsilon: 1e-6 };
        let saved = LayerNormStatistics { mean: mean.view_mut(), invstd: invstd.view_mut() };
        layer_norm_forward(device, &shape, x.view(), affine, count.view(), Some(saved), y.view_mut())
    })
}

fn time_layer_norm_backward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let (shape, features) = (layer_norm_shape(sizes)?, sizes.get("d"));
    let (x, dy, mut dx) = (timer.reals(shape.len())?, timer.reals(shape.len())?, timer.real_zeros(shape.len())?);
    let (mean, invstd) = (timer.random(shape.columns())?, timer.random(shape.columns())?);
    let (gamma, mut scratch) = (timer.random(features)?, timer.zeros(shape.scratch_len())?);
    let (mut dgamma, mut dbeta) = (timer.zeros(features)?, timer.zeros(features)?);
    let count = timer.device.upload(&[sizes.get("n") as u32])?;
    timer.time(|device| {
        let input = LayerNormBackward {
            x: x.view(),
            dy: dy.view(),
            gamma: gamma.view(),
            mean: mean.view(),
            invstd: invstd.view(),
            count: count.view(),
            accumulate: false,
        };
        let (dgamma, dbeta) = (dgamma.view_mut(), dbeta.view_mut());
        layer_norm_backward(device, &shape, input, scratch.view_mut(), dgamma, dbeta, dx.view_mut())
    })
}

fn attention_shape(sizes: &Sizes) -> dilt::Result<AttentionShape> {
    let [heads, head_dim, tokens, n] = ["heads", "head_dim", "t", "n"].map(|key| sizes.get(key));
    AttentionShape::new(heads, head_dim, tokens, n)
}

/// The tensors of attention.
struct AttentionTensors {
    shape: AttentionShape,
    qkv: RealBuffer,
    y: RealBuffer,
    lse: Buffer<f32>,
    live: Buffer<u32>,
    count: Buffer<u32>,
}

impl AttentionTensors {
    fn new(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<Self> {
        let (shape, [heads, n]) = (attention_shape(sizes)?, ["heads", "n"].map(|key| sizes.get(key)));
        Ok(AttentionTensors {
            qkv: timer.reals(shape.qkv_len())?,
            y: timer.real_zeros(shape.output_len())?,
            lse: timer.zeros(shape.statistic_len())?,
            live: timer.device.upload(&vec![1; heads])?,
            count: timer.device.upload(&[n as u32])?,
            shape,
        })
    }

    fn forward(&mut self, device: &Device) -> dilt::Result<()> {
        let input = AttentionInput { qkv: self.qkv.view(), live: self.live.view(), count: self.count.view() };
        attention_forward(device, &self.shape, input, Some(self.lse.view_mut()), self.y.view_mut())
    }
}

fn time_attention_forward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let mut attention = AttentionTensors::new(timer, sizes)?;
    timer.time(|device| attention.forward(device))
}

fn time_attention_backward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let mut attention = AttentionTensors::new(timer, sizes)?;
    attention.forward(&timer.device)?;
    let AttentionTensors { shape, qkv, y, lse, live, count } = attention;
    let (dy, mut dqkv) = (timer.reals(shape.output_len())?, timer.real_zeros(shape.qkv_len())?);
    let mut delta = timer.zeros(shape.statistic_len())?;
    timer.time(|device| {
        let input = AttentionInput { qkv: qkv.view(), live: live.view(), count: count.view() };
        let saved = AttentionSaved { y: y.view(), lse: lse.view() };
        attention_backward(device, &shape, input, saved, dy.view(), delta.view_mut(), dqkv.view_mut())
    })
}

fn time_gelu_forward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let elements = sizes.get("elements");
    let (x, mut y) = (timer.reals(elements)?, timer.real_zeros(elements)?);
    timer.time(|device| gelu_forward(device, x.view(), y.view_mut()))
}

fn time_gelu_backward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let elements = sizes.get("elements");
    // Run after run over what it has written, others would become numbers too small to be normal.
    let (x, mut dx) = (timer.reals(elements)?, timer.real_zeros(elements)?);
    timer.time(|device| gelu_backward(device, x.view(), dx.view_mut()))
}

/// With momentum, over weights of which none is pruned and all decay.
fn time_sgd_step(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let elements = sizes.get("elements");
    let (gradients, mut weights, mut velocity) =
        (timer.random(elements)?, timer.random(elements)?, timer.zeros(elements)?);
    let (mask, rate) = (timer.bits(elements)?, timer.device.upload(&[1e-3])?);
    let sgd = Sgd { momentum: 0.9, nesterov: false, weight_decay: 1e-4 };
    timer.time(|device| {
        let (rate, gradients, mask) = (rate.view(), gradients.view(), mask.view());
        let input = OptimizerInput { rate, gradients, mask, decay: None, clip: None };
        sgd_step(device, &sgd, input, weights.view_mut(), velocity.view_mut())
    })
}

fn time_adamw_step(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let elements = sizes.get("elements");
    let (gradients, mut weights) = (timer.random(elements)?, timer.random(elements)?);
    let (mut first, mut second) = (timer.zeros(elements)?, timer.zeros(elements)?);
    let (mask, rate) = (timer.bits(elements)?, timer.device.upload(&[1e-3])?);
    let corrections = timer.device.upload(&[1.0, 1.0])?;
    let adamw = AdamW { betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.05 };
    timer.time(|device| {
        let (rate, gradients, mask) = (rate.view(), gradients.view(), mask.view());
        let input = OptimizerInput { rate, gradients, mask, decay: None, clip: None };
        let corrections = corrections.view();
        adamw_step(device, &adamw, input, corrections, weights.view_mut(), first.view_mut(), second.view_mut())
    })
}

fn time_prune(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let (elements, remove) = (sizes.get("elements"), sizes.get("remove"));
    if remove > elements {
        return Err(Error::Usage(format!("remove: expected at most elements, {elements}, got {remove}")));
    }
    let weights = timer.random(elements)?;
    let (live, mut mask) = (timer.bits(elements)?, timer.bits(elements)?);
    let mut scratch = timer.zeros(prune_scratch_len(elements))?;
    timer.time(|device| {
        let selection = Selection { weights: weights.view(), live: live.view(), remove };
        prune_smallest(device, selection, scratch.view_mut(), mask.view_mut())
    })
}

/// A proximal step of so many couplings of two layers, with all iterations of Sinkhorn.
fn time_couplings(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let [n, count, iterations] = ["probes", "count", "iterations"].map(|key| sizes.get(key));
    if n > MOST_COUPLED {
        return Err(Error::Usage(format!("probes: expected at most {MOST_COUPLED}, got {n}")));
    }
    let mut distances = || {
        let x = timer.numbers(n);
        Array2::from_shape_fn((n, n), |(i, j)| (x[i] - x[j]).abs() / 2.0)
    };
    let matrices = [distances(), distances()];
    let layers = Layers::new(&timer.device, &matrices.each_ref().map(Array2::view))?;
    let mut couplings = Couplings::new(&timer.device, &layers, &vec![([0, 1], Start::Product); count])?;
    // A tolerance below zero: no iteration is left out.
    let step = Step { epsilon: 0.1, iterations, tolerance: -1.0, enough: None };
    couplings.begin(&timer.device, &step)?;
    timer.time(|device| couplings.step(device, &step))
}
