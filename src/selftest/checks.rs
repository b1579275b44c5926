//! The checks: each runs one operation on random inputs and hands its results over. One function per operation.

use half::bf16;
use rand::Rng;

use super::{Check, PADDED, SAMPLES, Trial};
use crate::device::{Buffer, RealBuffer};
use crate::error::{Error, Result};
use crate::ops::attention::{AttentionInput, AttentionSaved, AttentionShape, attention_backward, attention_forward};
use crate::ops::augment::{
    Augment, Colours, Crop, GatherInto, GatherShape, GatherSource, RandomCrop, draw, gather, grey_means, resample,
};
use crate::ops::ceiling::{BOXES, TILE, WARPS, ceiling_copy, multiply_add, multiply_boxes, multiply_tiles};
use crate::ops::dropout::{
    Draw, ResidualShape, dropout_backward, dropout_forward, residual_backward, residual_forward,
};
use crate::ops::gelu::{gelu_backward, gelu_forward};
use crate::ops::layer_norm::{LayerNormAffine, LayerNormBackward, LayerNormShape, LayerNormStatistics};
use crate::ops::layer_norm::{layer_norm_backward, layer_norm_forward};
use crate::ops::loss::{LossInput, LossShape, LossTables, cross_entropy};
use crate::ops::optimizer::{
    AdamW, Clip, GRADIENT_NORM_PARTIALS, OptimizerInput, Sgd, adamw_step, gradient_norm, sgd_step,
};
use crate::ops::pointwise::{ShortcutShape, shortcut_backward, shortcut_forward};
use crate::ops::pool::{MeanPoolShape, PoolShape, max_pool_backward, max_pool_forward};
use crate::ops::pool::{mean_pool_backward, mean_pool_forward};
use crate::ops::prune::{MaskOp, Selection, apply_mask, mask_combine, mask_consensus, mask_counts};
use crate::ops::prune::{prune_report, prune_scratch_len, prune_smallest};
use crate::ops::step::{StepCurrent, StepTables, step_begin, step_end};
use crate::ops::tokens::{
    EmbedGradients, EmbedParameters, EmbedShape, PatchShape, TokenPool, TokenPoolShape, embed_backward, embed_forward,
    patches_forward, token_pool_backward, token_pool_forward,
};
use crate::ops::{Columns, layouts};

/// The checks of operations that have activations, each of as few kernels as its operation allows.
pub(super) const OF_ACTIVATIONS: &[Check] = &[
    |t| attention(t, 24),
    |t| attention(t, 40),
    |t| attention(t, 72),
    |t| attention_gradient(t, 24),
    |t| attention_gradient(t, 40),
    |t| attention_gradient(t, 72),
    augment,
    loss,
    layer_norm,
    layer_norm_gradient,
    gelu,
    dropout,
    residual,
    shortcut,
    shortcut_gradient,
    max_pool,
    max_pool_gradient,
    mean_pool,
    mean_pool_gradient,
    patches,
    embedding,
    embedding_gradient,
    token_pool,
    token_pool_gradient,
];

/// The others.
pub(super) const OTHERS: &[Check] = &[
    argument_layouts,
    ceilings,
    sgd,
    adamw,
    norm_of_gradients,
    prune,
    masked,
    combined_masks,
    consensus,
    mask_sizes,
    step_beginning,
    step_ending,
];

/// The generated `layout_*` kernels.
fn argument_layouts(t: &mut Trial) -> Result<()> {
    let rust = layouts();
    for cpp in t.device.cpp_layouts()? {
        if !rust.contains(&cpp) {
            let twin = rust.iter().find(|layout| layout.name == cpp.name);
            return Err(Error::Device(format!("argument struct: expected Rust's {twin:?}, got C++'s {cpp:?}")));
        }
    }
    Ok(())
}

/// Tokens of a sample: more than a tile of any head has, and no whole number of vectors.
const TOKENS: usize = 69;
/// Few, since a head of a sample is work enough.
const SEQUENCES: usize = 2;

/// Two heads, the first left out; `head_dim` chooses the staged kernels.
struct Heads {
    shape: AttentionShape,
    qkv: RealBuffer,
    live: Buffer<u32>,
    count: Buffer<u32>,
}

impl Heads {
    fn new(t: &mut Trial, head_dim: usize) -> Result<Self> {
        let shape = AttentionShape::new(2, head_dim, TOKENS, SEQUENCES)?;
        let qkv = t.real_tokens(shape.qkv_len(), SEQUENCES, TOKENS)?;
        Ok(Heads { shape, qkv, live: t.device.upload(&[0, 1])?, count: t.device.upload(&[SEQUENCES as u32])? })
    }

    fn input(&self) -> AttentionInput<'_> {
        AttentionInput { qkv: self.qkv.view(), live: self.live.view(), count: self.count.view() }
    }
}

fn attention(t: &mut Trial, head_dim: usize) -> Result<()> {
    let heads = Heads::new(t, head_dim)?;
    let mut y = t.unwritten_reals(heads.shape.output_len())?;
    attention_forward(t.device, &heads.shape, heads.input(), None, y.view_mut())?;
    t.close_reals("y", &y)
}

/// With y and lse that no forward pass gave: large enough that P stays small.
fn attention_gradient(t: &mut Trial, head_dim: usize) -> Result<()> {
    let heads = Heads::new(t, head_dim)?;
    let shape = &heads.shape;
    let [y, dy] = [(); 2].map(|()| t.real_tokens(shape.output_len(), SEQUENCES, TOKENS));
    let (y, dy) = (y?, dy?);
    let lse = t.draw(shape.statistic_len(), |r| r.random_range(4.0..6.0))?;
    let (mut delta, mut dqkv) = (t.unwritten(shape.statistic_len())?, t.unwritten_reals(shape.qkv_len())?);
    let saved = AttentionSaved { y: y.view(), lse: lse.view() };
    attention_backward(t.device, shape, heads.input(), saved, dy.view(), delta.view_mut(), dqkv.view_mut())?;
    t.close_reals("dqkv", &dqkv)
}

/// Crops without scaling, then boxes with other colours.
fn augment(t: &mut Trial) -> Result<()> {
    const EXAMPLES: usize = 9;
    let shape = GatherShape::new([3, 13, 17], [7, 11], SAMPLES)?;
    let (images, labels) = (t.draw(EXAMPLES * shape.image_len(), Rng::random::<u8>)?, t.below(EXAMPLES, 10)?);
    let (order, state) = (t.below(2 * SAMPLES, EXAMPLES as u32)?, t.device.upload(&[1, 5])?);
    let (count, mean, std) = (t.count()?, t.floats(3)?, t.positive(3)?);
    let (mut x, mut to_labels) = (t.unwritten_reals(shape.output_len())?, t.bits(shape.samples())?);
    let source = GatherSource {
        images: images.view(),
        labels: labels.view(),
        order: order.view(),
        state: state.view(),
        count: count.view(),
        scale: 255.0,
    };
    let into = GatherInto { mean: mean.view(), std: std.view(), x: x.view_mut(), labels: to_labels.view_mut() };
    gather(t.device, &shape, source, Some(RandomCrop { pad: 2, flip: true, seed: 3 }), into)?;
    t.close_reals("x", &x)?;
    t.exact("labels", &to_labels)?;

    let (mut boxes, mut factors) = (t.device.alloc(PADDED * GatherShape::BOX)?, t.unwritten(PADDED * 3)?);
    let augment = Augment { crop: Crop::Resized, flip: true, jitter: 0.4, seed: 3 };
    draw(t.device, &shape, state.view(), augment, boxes.view_mut(), factors.view_mut())?;
    t.exact("boxes", &boxes)?;
    t.close("factors", &factors)?;
    let mut grey = t.unwritten(PADDED)?;
    grey_means(t.device, &shape, source, boxes.view(), factors.view(), grey.view_mut())?;
    t.close("grey", &grey)?;
    let colours = Colours { factors: factors.view(), grey: grey.view() };
    let (mut x, mut to_labels) = (t.unwritten_reals(shape.output_len())?, t.bits(shape.samples())?);
    let into = GatherInto { mean: mean.view(), std: std.view(), x: x.view_mut(), labels: to_labels.view_mut() };
    resample(t.device, &shape, source, boxes.view(), Some(colours), into)?;
    t.close_reals("x", &x)?;
    t.exact("labels", &to_labels)
}

fn loss(t: &mut Trial) -> Result<()> {
    let shape = LossShape::new(11, SAMPLES)?;
    let (logits, labels) = (t.real_samples(shape.len())?, t.below(PADDED, 11)?);
    let (count, step) = (t.count()?, t.device.upload(&[1])?);
    let (mut loss, mut top1, mut top5) = (t.floats(3)?, t.bits(3)?, t.bits(3)?);
    let mut dlogits = t.unwritten_reals(shape.len())?;
    let input = LossInput {
        logits: logits.view(),
        labels: labels.view(),
        count: count.view(),
        step: step.view(),
        smoothing: 0.1,
    };
    let tables = LossTables { loss: loss.view_mut(), top1: top1.view_mut(), top5: top5.view_mut() };
    cross_entropy(t.device, &shape, input, tables, Some(dlogits.view_mut()))?;
    t.close("loss", &loss)?;
    t.exact("top1", &top1)?;
    t.exact("top5", &top5)?;
    t.close_reals("dlogits", &dlogits)
}

/// Chunks and single rows of several tiles; columns of `PADDED` samples, of which a token is padding.
fn token_rows(t: &mut Trial) -> Result<(usize, Columns, Buffer<u32>)> {
    Ok((19, Columns::tokens(SAMPLES, PADDED - 1)?, t.count()?))
}

/// Rows of token columns, the padded ones zero.
fn tokens(t: &mut Trial, len: usize) -> Result<RealBuffer> {
    t.real_tokens(len, SAMPLES, PADDED - 1)
}

fn layer_norm(t: &mut Trial) -> Result<()> {
    let (features, columns, count) = token_rows(t)?;
    let shape = LayerNormShape::new(features, columns)?;
    let (x, gamma, beta) = (tokens(t, shape.len())?, t.floats(features)?, t.floats(features)?);
    let (mut mean, mut invstd) = (t.unwritten(shape.columns())?, t.unwritten(shape.columns())?);
    let mut y = t.unwritten_reals(shape.len())?;
    let affine = LayerNormAffine { gamma: gamma.view(), beta: beta.view(), epsilon: 1e-5 };
    let saved = LayerNormStatistics { mean: mean.view_mut(), invstd: invstd.view_mut() };
    layer_norm_forward(t.device, &shape, x.view(), affine, count.view(), Some(saved), y.view_mut())?;
    t.close("mean", &mean)?;
    t.close("invstd", &invstd)?;
    t.close_reals("y", &y)
}

fn layer_norm_gradient(t: &mut Trial) -> Result<()> {
    let (features, columns, count) = token_rows(t)?;
    let shape = LayerNormShape::new(features, columns)?;
    let (x, dy, mut dx) = (tokens(t, shape.len())?, tokens(t, shape.len())?, tokens(t, shape.len())?);
    let (gamma, mean, invstd) = (t.floats(features)?, t.floats(shape.columns())?, t.positive(shape.columns())?);
    let mut scratch = t.unwritten(shape.scratch_len())?;
    let (mut dgamma, mut dbeta) = (t.unwritten(features)?, t.unwritten(features)?);
    let input = LayerNormBackward {
        x: x.view(),
        dy: dy.view(),
        gamma: gamma.view(),
        mean: mean.view(),
        invstd: invstd.view(),
        count: count.view(),
        accumulate: true,
    };
    let (dg, db) = (dgamma.view_mut(), dbeta.view_mut());
    layer_norm_backward(t.device, &shape, input, scratch.view_mut(), dg, db, dx.view_mut())?;
    t.close("dgamma", &dgamma)?;
    t.close("dbeta", &dbeta)?;
    t.close_reals("dx", &dx)
}

fn gelu(t: &mut Trial) -> Result<()> {
    const LEN: usize = 1000;
    let x: Vec<f32> = (0..LEN).map(|_| t.random.random_range(-6.0..6.0)).collect();
    let x = t.device.upload_reals(&x, t.precision)?;
    let (mut dx, mut y) = (t.reals(LEN)?, t.unwritten_reals(LEN)?);
    gelu_forward(t.device, x.view(), y.view_mut())?;
    gelu_backward(t.device, x.view(), dx.view_mut())?;
    t.close_reals("y", &y)?;
    t.close_reals("dx", &dx)
}

fn dropout(t: &mut Trial) -> Result<()> {
    const LEN: usize = 1000;
    let (x, step) = (t.reals(LEN)?, t.device.upload(&[9])?);
    let draw = Draw { rate: 0.3, seed: 3, stream: 5, step: step.view() };
    let (mut y, mut dx) = (t.unwritten_reals(LEN)?, t.unwritten_reals(LEN)?);
    dropout_forward(t.device, x.view(), draw, y.view_mut())?;
    dropout_backward(t.device, x.view(), draw, dx.view_mut())?;
    t.exact_reals("y", &y)?;
    t.exact_reals("dx", &dx)
}

fn residual(t: &mut Trial) -> Result<()> {
    let (features, columns, _) = token_rows(t)?;
    let shape = ResidualShape::new(features, columns)?;
    let (x, branch, dy) = (tokens(t, shape.len())?, tokens(t, shape.len())?, tokens(t, shape.len())?);
    let (gamma, step) = (t.floats(features)?, t.device.upload(&[9])?);
    let drop = Some(Draw { rate: 0.3, seed: 3, stream: 5, step: step.view() });
    let (mut y, mut dbranch) = (t.unwritten_reals(shape.len())?, t.unwritten_reals(shape.len())?);
    let mut dgamma = t.unwritten(features)?;
    residual_forward(t.device, &shape, x.view(), branch.view(), Some(gamma.view()), drop, y.view_mut())?;
    let (scale, of_gamma) = (Some(gamma.view()), Some(dgamma.view_mut()));
    residual_backward(t.device, &shape, branch.view(), dy.view(), scale, drop, of_gamma, dbranch.view_mut())?;
    t.close_reals("y", &y)?;
    t.close("dgamma", &dgamma)?;
    t.close_reals("dbranch", &dbranch)
}

/// Weights of the optimizer and of pruning: more than a block of either, and no whole number of mask words.
const WEIGHTS: usize = 5003;
const WORDS: usize = WEIGHTS.div_ceil(32);

fn sgd(t: &mut Trial) -> Result<()> {
    let (mut weights, mut velocity, gradients) = (t.floats(WEIGHTS)?, t.floats(WEIGHTS)?, t.floats(WEIGHTS)?);
    let (mask, decay) = (t.bits(WORDS)?, t.bits(WORDS)?);
    let (partials, rate) = (t.positive(GRADIENT_NORM_PARTIALS)?, t.device.upload(&[0.1])?);
    let input = OptimizerInput {
        rate: rate.view(),
        gradients: gradients.view(),
        mask: mask.view(),
        decay: Some(decay.view()),
        clip: Some(Clip { partials: partials.view(), max_norm: 2.0 }),
    };
    let settings = Sgd { momentum: 0.9, nesterov: true, weight_decay: 0.01 };
    sgd_step(t.device, &settings, input, weights.view_mut(), velocity.view_mut())?;
    t.close("weights", &weights)?;
    t.close("velocity", &velocity)
}

fn adamw(t: &mut Trial) -> Result<()> {
    let (mut weights, gradients) = (t.floats(WEIGHTS)?, t.floats(WEIGHTS)?);
    let (mut first, mut second) = (t.floats(WEIGHTS)?, t.positive(WEIGHTS)?);
    let (mask, decay) = (t.bits(WORDS)?, t.bits(WORDS)?);
    let (partials, rate) = (t.positive(GRADIENT_NORM_PARTIALS)?, t.device.upload(&[0.1])?);
    let corrections = t.device.upload(&[3.7, 31.6])?;
    let input = OptimizerInput {
        rate: rate.view(),
        gradients: gradients.view(),
        mask: mask.view(),
        decay: Some(decay.view()),
        clip: Some(Clip { partials: partials.view(), max_norm: 2.0 }),
    };
    let settings = AdamW { betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.01 };
    let (w, m, v) = (weights.view_mut(), first.view_mut(), second.view_mut());
    adamw_step(t.device, &settings, input, corrections.view(), w, m, v)?;
    t.close("weights", &weights)?;
    t.close("first", &first)?;
    t.close("second", &second)
}

fn norm_of_gradients(t: &mut Trial) -> Result<()> {
    let (gradients, mask) = (t.floats(WEIGHTS)?, t.bits(WORDS)?);
    let mut partials = t.unwritten(GRADIENT_NORM_PARTIALS)?;
    gradient_norm(t.device, gradients.view(), mask.view(), partials.view_mut())?;
    t.close("partials", &partials)
}

fn shortcut(t: &mut Trial) -> Result<()> {
    let shape = ShortcutShape::new([3, 7, 5], 8, 2, SAMPLES)?;
    let (x, mut y) = (t.real_samples(shape.input_len())?, t.unwritten_reals(shape.output_len())?);
    shortcut_forward(t.device, &shape, None, x.view(), y.view_mut())?;
    t.exact_reals("y", &y)
}

fn shortcut_gradient(t: &mut Trial) -> Result<()> {
    let shape = ShortcutShape::new([3, 7, 5], 8, 2, SAMPLES)?;
    let (dy, mut dx) = (t.real_samples(shape.output_len())?, t.unwritten_reals(shape.input_len())?);
    shortcut_backward(t.device, &shape, None, dy.view(), dx.view_mut())?;
    t.exact_reals("dx", &dx)
}

fn max_pool(t: &mut Trial) -> Result<()> {
    let shape = PoolShape::new(3, [7, 6], 3, 2, 1, SAMPLES)?;
    let (x, mut y) = (t.real_samples(shape.input_len())?, t.unwritten_reals(shape.output_len())?);
    let mut index = t.draw(shape.output_len(), Rng::random::<u8>)?;
    max_pool_forward(t.device, &shape, x.view(), index.view_mut(), y.view_mut())?;
    t.exact("index", &index)?;
    t.exact_reals("y", &y)
}

/// Without padding, where every tap is one of the image.
fn max_pool_gradient(t: &mut Trial) -> Result<()> {
    let shape = PoolShape::new(3, [7, 6], 3, 2, 0, SAMPLES)?;
    let (dy, mut dx) = (t.real_samples(shape.output_len())?, t.unwritten_reals(shape.input_len())?);
    let index = t.draw(shape.output_len(), |random| random.random_range(0..9u8))?;
    max_pool_backward(t.device, &shape, dy.view(), index.view(), dx.view_mut())?;
    t.close_reals("dx", &dx)
}

fn mean_pool(t: &mut Trial) -> Result<()> {
    let shape = MeanPoolShape::new(5, 42, SAMPLES)?;
    let (x, mut y) = (t.real_samples(shape.input_len())?, t.unwritten_reals(shape.output_len())?);
    mean_pool_forward(t.device, &shape, x.view(), y.view_mut())?;
    t.close_reals("y", &y)
}

fn mean_pool_gradient(t: &mut Trial) -> Result<()> {
    let shape = MeanPoolShape::new(5, 42, SAMPLES)?;
    let (dy, mut dx) = (t.real_samples(shape.output_len())?, t.unwritten_reals(shape.input_len())?);
    mean_pool_backward(t.device, &shape, dy.view(), dx.view_mut())?;
    t.close_reals("dx", &dx)
}

fn prune(t: &mut Trial) -> Result<()> {
    let (weights, live, mut mask) = (t.floats(WEIGHTS)?, t.bits(WORDS)?, t.bits(WORDS)?);
    let mut scratch = t.bits(prune_scratch_len(WEIGHTS))?;
    let selection = Selection { weights: weights.view(), live: live.view(), remove: WEIGHTS / 5 };
    prune_smallest(t.device, selection, scratch.view_mut(), mask.view_mut())?;
    prune_report(t.device, scratch.view())?;
    t.exact("mask", &mask)
}

fn masked(t: &mut Trial) -> Result<()> {
    let (mask, mut values) = (t.bits(WORDS)?, t.floats(WEIGHTS)?);
    apply_mask(t.device, mask.view(), values.view_mut())?;
    t.exact("values", &values)
}

fn combined_masks(t: &mut Trial) -> Result<()> {
    for op in [MaskOp::And, MaskOp::Or, MaskOp::AndNot, MaskOp::Xor] {
        let (a, b, mut out) = (t.bits(WORDS)?, t.bits(WORDS)?, t.bits(WORDS)?);
        mask_combine(t.device, op, a.view(), b.view(), out.view_mut())?;
        t.exact("out", &out)?;
    }
    Ok(())
}

fn consensus(t: &mut Trial) -> Result<()> {
    let (stack, mut out) = (t.bits(5 * WORDS)?, t.bits(WORDS)?);
    mask_consensus(t.device, stack.view(), 5, 3, out.view_mut())?;
    t.exact("out", &out)
}

fn mask_sizes(t: &mut Trial) -> Result<()> {
    let (mask, ranges) = (t.bits(WORDS)?, t.device.upload(&[0, 1, 1, 150, 40, 0])?);
    let mut counts = t.bits(3)?;
    mask_counts(t.device, mask.view(), ranges.view(), counts.view_mut())?;
    t.exact("counts", &counts)
}

fn step_beginning(t: &mut Trial) -> Result<()> {
    let (state, counts, rates) = (t.device.upload(&[2, 7])?, t.bits(4)?, t.floats(4)?);
    let correction_rows = t.floats(8)?;
    let (mut count, mut rate, mut corrections, mut step) = (t.bits(1)?, t.unwritten(1)?, t.unwritten(2)?, t.bits(1)?);
    let tables = StepTables { count: counts.view(), rate: rates.view(), corrections: correction_rows.view() };
    let current = StepCurrent {
        count: count.view_mut(),
        rate: rate.view_mut(),
        corrections: corrections.view_mut(),
        step: step.view_mut(),
    };
    step_begin(t.device, state.view(), tables, current)?;
    t.exact("count", &count)?;
    t.exact("rate", &rate)?;
    t.exact("corrections", &corrections)?;
    t.exact("step", &step)
}

/// Copies, multiply-adds in registers, and products on tensor cores, which have no other form.
fn ceilings(t: &mut Trial) -> Result<()> {
    let (x, mut to, mut y) = (t.floats(2096)?, t.unwritten(2096)?, t.unwritten(2096)?);
    ceiling_copy(t.device, x.view(), to.view_mut())?;
    t.exact("to", &to)?;
    multiply_add(t.device, 3, [-0.999, 0.5], x.view(), y.view_mut())?;
    t.close("y", &y)?;
    let [rows, columns, depth] = TILE;
    let mut tile = |len| t.draw(len, |random| bf16::from_f32(random.random_range(-1.0..1.0)));
    let (left, right) = (tile(rows * depth)?, tile(columns * depth)?);
    let mut sum = t.unwritten(WARPS * rows * columns)?;
    multiply_tiles(t.device, 2, left.view(), right.view(), sum.view_mut())?;
    t.close("sum", &sum)
}

/// Of two blocks.
pub(super) fn ceiling_of_wgmma(t: &mut Trial) -> Result<()> {
    let [rows, columns, depth] = BOXES;
    let mut tile = |len| t.draw(len, |random| bf16::from_f32(random.random_range(-1.0..1.0)));
    let (left, right) = (tile(rows * depth)?, tile(columns * depth)?);
    let mut sum = t.unwritten(2 * rows * columns)?;
    multiply_boxes(t.device, 2, left.view(), right.view(), sum.view_mut())?;
    t.close("sum", &sum)
}

fn step_ending(t: &mut Trial) -> Result<()> {
    let mut state = t.below(2, 1 << 20)?;
    step_end(t.device, state.view_mut())?;
    t.exact("state", &state)
}

/// 15 patches and the token before them, which fill a row of 16.
fn patches(t: &mut Trial) -> Result<()> {
    let shape = PatchShape::new([3, 12, 20], 4, 1, SAMPLES)?;
    let (x, mut y) = (t.real_samples(shape.input_len())?, t.unwritten_reals(shape.output_len())?);
    patches_forward(t.device, &shape, x.view(), y.view_mut())?;
    t.exact_reals("y", &y)
}

const FEATURES: usize = 5;

fn embedding(t: &mut Trial) -> Result<()> {
    let shape = EmbedShape::new(FEATURES, TOKENS, 1, SAMPLES)?;
    let (x, token, bias) = (t.reals(shape.len())?, t.floats(FEATURES)?, t.floats(FEATURES)?);
    let (positions, count, mut y) = (t.floats(shape.positions_len())?, t.count()?, t.unwritten_reals(shape.len())?);
    let (token, bias) = (Some(token.view()), Some(bias.view()));
    let parameters = EmbedParameters { token, bias, positions: positions.view() };
    embed_forward(t.device, &shape, x.view(), parameters, count.view(), y.view_mut())?;
    t.close_reals("y", &y)
}

fn embedding_gradient(t: &mut Trial) -> Result<()> {
    let shape = EmbedShape::new(FEATURES, TOKENS, 1, SAMPLES)?;
    let (dy, mut dpositions) = (t.reals(shape.len())?, t.unwritten(shape.positions_len())?);
    let (mut dtoken, mut dbias) = (t.unwritten(FEATURES)?, t.unwritten(FEATURES)?);
    let (token, bias) = (Some(dtoken.view_mut()), Some(dbias.view_mut()));
    let gradients = EmbedGradients { token, bias, positions: dpositions.view_mut() };
    embed_backward(t.device, &shape, dy.view(), gradients)?;
    t.close("dtoken", &dtoken)?;
    t.close("dbias", &dbias)?;
    t.close("dpositions", &dpositions)
}

fn token_pool(t: &mut Trial) -> Result<()> {
    for pool in [TokenPool::First, TokenPool::Mean] {
        let shape = TokenPoolShape::new(FEATURES, TOKENS, 1, SAMPLES, pool)?;
        let (x, mut y) = (t.reals(shape.input_len())?, t.unwritten_reals(shape.output_len())?);
        token_pool_forward(t.device, &shape, x.view(), y.view_mut())?;
        t.close_reals("y", &y)?;
    }
    Ok(())
}

fn token_pool_gradient(t: &mut Trial) -> Result<()> {
    for pool in [TokenPool::First, TokenPool::Mean] {
        let shape = TokenPoolShape::new(FEATURES, TOKENS, 1, SAMPLES, pool)?;
        let (dy, mut dx) = (t.real_samples(shape.output_len())?, t.unwritten_reals(shape.input_len())?);
        token_pool_backward(t.device, &shape, dy.view(), dx.view_mut())?;
        t.close_reals("dx", &dx)?;
    }
    Ok(())
}
