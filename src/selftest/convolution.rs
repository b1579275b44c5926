//! The checks of convolutions and linear layers, of all weights and of kept ones alone.

use half::bf16;

use super::{Check, SAMPLES, Trial, checks};
use crate::device::{Buffer, Precision, RealBuffer};
use crate::error::Result;
use crate::ops::Columns;
use crate::ops::bias::bias_gradient;
use crate::ops::conv::{ConvShape, conv_forward, conv_input_gradient, conv_weight_gradient};
use crate::ops::conv_sparse::{conv_sparse_forward, conv_sparse_input_gradient, conv_sparse_weight_gradient};
use crate::ops::epilogue::{BeforeNorm, Beside, Bias, Dx, Epilogue, TileStatistics};
use crate::ops::kept::{Kept, KeptWeights, Pass, RowGroups, group_rows};
use crate::ops::norm::{
    NormAffine, NormBackward, NormGradient, NormGradients, NormInput, NormRunning, NormSaved, NormShape, Normalised,
    Normed, norm_backward, norm_forward,
};
use crate::ops::norm_join::{norm_join, norm_join_gradient};
use crate::ops::round::{RoundPlan, round_weights};

/// The checks of operations of activations, each of as few kernels as its operation allows.
pub(super) const OF_ACTIVATIONS: &[Check] = &[
    |t| convolution(t, &few_channels()?, Columns::samples(SAMPLES)?),
    |t| convolution(t, &many_channels()?, Columns::samples(SAMPLES)?),
    |t| convolution(t, &ConvShape::new([6, 5, 7], 20, [3, 3], 1, 1, SAMPLES)?, Columns::samples(SAMPLES)?),
    |t| convolution(t, &large_image(3, 50)?, Columns::samples(SAMPLES)?),
    |t| convolution(t, &large_image(2, 100)?, Columns::samples(SAMPLES)?),
    |t| convolution(t, &linear()?, linear_columns()?),
    |t| summed_convolution(t, &few_channels()?),
    |t| summed_convolution(t, &many_channels()?),
    |t| summed_convolution(t, &large_image(3, 50)?),
    |t| convolution_input_gradient(t, &few_channels()?),
    |t| convolution_input_gradient(t, &many_channels()?),
    |t| convolution_input_gradient(t, &ConvShape::new([20, 9, 7], 6, [3, 3], 3, 1, SAMPLES)?),
    |t| convolution_input_gradient(t, &large_image(50, 3)?),
    |t| convolution_input_gradient(t, &large_image(100, 2)?),
    |t| convolution_input_gradient(t, &linear()?),
    |t| convolution_input_gradient(t, &ConvShape::new([50, 40, 41], 3, [1, 1], 1, 0, SAMPLES)?),
    |t| convolution_input_gradient(t, &ConvShape::new([100, 40, 41], 3, [1, 1], 1, 0, SAMPLES)?),
    |t| summed_input_gradient(t, &ConvShape::new([5, 14, 10], 7, [3, 3], 2, 1, SAMPLES)?),
    |t| summed_input_gradient(t, &many_channels()?),
    |t| summed_input_gradient(t, &large_image(50, 3)?),
    |t| convolution_weight_gradient(t, &few_channels()?),
    |t| convolution_weight_gradient(t, &many_channels()?),
    |t| convolution_weight_gradient(t, &ConvShape::new([6, 5, 7], 20, [3, 3], 1, 1, SAMPLES)?),
    |t| convolution_weight_gradient(t, &ConvShape::new([3, 7, 7], 50, [3, 3], 1, 1, SAMPLES)?),
    |t| convolution_weight_gradient(t, &linear()?),
    |t| convolution_bias_gradient(t, &few_channels()?),
    |t| kept_weights(t, &few_channels()?),
    |t| kept_weights(t, &many_channels()?),
    |t| kept_weights(t, &large_image(3, 50)?),
    |t| kept_weights(t, &large_image(50, 3)?),
];

/// The checks of products by wgmma, whose boxes take whole 64 samples: all tiles of each pass.
pub(super) const BY_WGMMA: &[Check] = &[
    checks::ceiling_of_wgmma,
    |t| convolution(t, &boxes(72, 64, 2)?, Columns::samples(BOX)?),
    |t| convolution(t, &boxes(70, 130, 1)?, Columns::samples(BOX)?),
    |t| convolution(t, &linear()?, linear_columns()?),
    |t| convolution(t, &long(64, 72)?, long_columns()?),
    |t| summed_convolution(t, &boxes(70, 130, 1)?),
    |t| convolution_input_gradient(t, &boxes(64, 72, 2)?),
    |t| convolution_input_gradient(t, &boxes(130, 70, 1)?),
    |t| convolution_input_gradient(t, &long(72, 64)?),
    |t| summed_input_gradient(t, &boxes(130, 70, 1)?),
    |t| convolution_weight_gradient(t, &boxes(72, 64, 2)?),
    |t| convolution_weight_gradient(t, &boxes(70, 130, 1)?),
    |t| convolution_weight_gradient(t, &linear()?),
    |t| kept_weights(t, &boxes(72, 130, 2)?),
    |t| kept_weights(t, &long(64, 72)?),
    |t| kept_weights(t, &long(72, 64)?),
];

/// The other checks.
pub(super) const OTHERS: &[Check] = &[rounded_weights];

/// Takes the smallest tiles, and two splits of the weight gradient.
fn few_channels() -> Result<ConvShape> {
    ConvShape::new([5, 13, 11], 7, [3, 3], 2, 1, SAMPLES)
}

/// More rows than the larger tiles have, too few columns for them.
fn many_channels() -> Result<ConvShape> {
    ConvShape::new([37, 5, 6], 70, [3, 3], 1, 1, SAMPLES)
}

/// Enough columns for the larger tiles.
fn large_image(channels: usize, filters: usize) -> Result<ConvShape> {
    ConvShape::new([channels, 40, 41], filters, [3, 3], 1, 1, SAMPLES)
}

/// More steps than a block packs at a time, more rows than it owns, and two splits.
fn linear() -> Result<ConvShape> {
    ConvShape::new([200, 1, 1], 270, [1, 1], 1, 0, linear_columns()?.len())
}

fn linear_columns() -> Result<Columns> {
    Columns::tokens(SAMPLES, 65)
}

/// Samples of a box.
const BOX: usize = 64;

fn boxes(channels: usize, filters: usize, stride: usize) -> Result<ConvShape> {
    ConvShape::new([channels, 4, 3], filters, [3, 3], stride, 1, BOX)
}

/// Enough columns for the largest tile.
fn long(channels: usize, filters: usize) -> Result<ConvShape> {
    ConvShape::new([channels, 1, 1], filters, [1, 1], 1, 0, long_columns()?.len())
}

fn long_columns() -> Result<Columns> {
    Columns::tokens(SAMPLES, 2112)
}

/// Weights as products of the trial's precision read them.
fn weights(t: &mut Trial, shape: &ConvShape) -> Result<RealBuffer> {
    let w = t.floats(shape.weight_len())?;
    let words = match t.precision {
        Precision::F32 => w.cast(),
        Precision::Bf16 => round(t, &RoundPlan::new([Some((0, *shape))]), &w)?.cast(),
    };
    Ok(RealBuffer::new(words, shape.read_weight_len(t.precision), t.precision))
}

fn round(t: &Trial, plan: &RoundPlan, from: &Buffer<f32>) -> Result<Buffer<bf16>> {
    let mut to = t.device.upload(&vec![bf16::NAN; plan.len()])?;
    let table = plan.upload(t.device)?.expect("a layer");
    round_weights(t.device, &table, from.view(), to.view_mut())?;
    Ok(to)
}

/// Of two layers, the first without a multiple of eight channels.
fn rounded_weights(t: &mut Trial) -> Result<()> {
    let (first, second) = (few_channels()?, many_channels()?);
    let w = t.floats(first.weight_len() + second.weight_len())?;
    let plan = RoundPlan::new([Some((0, first)), None, Some((first.weight_len(), second))]);
    let to = round(t, &plan, &w)?;
    // What lies between two layers is nobody's.
    let [first, second] = [0, 2].map(|layer| t.device.read(to.slice(plan.place(layer))));
    let layers = t.device.upload(&[first?, second?].concat())?;
    t.exact("weights", &layers)
}

fn convolution(t: &mut Trial, shape: &ConvShape, columns: Columns) -> Result<()> {
    let (x, w) = (t.real_samples(shape.input_len())?, weights(t, shape)?);
    let (bias, count) = (t.floats(shape.filters())?, t.count()?);
    let mut y = t.unwritten_reals(shape.output_len())?;
    let bias = Bias { bias: bias.view(), columns, count: count.view() };
    conv_forward(t.device, shape, x.view(), w.view(), Some(bias).into(), y.view_mut())?;
    t.close_reals("y", &y)?;
    let mut gelu = t.unwritten_reals(shape.output_len())?;
    let epilogue = Epilogue { bias: Some(bias), beside: Some(Beside::Gelu(gelu.view_mut())), statistics: None };
    conv_forward(t.device, shape, x.view(), w.view(), epilogue, y.view_mut())?;
    t.close_reals("GELU of y", &gelu)
}

/// The statistics of a norm's input, by the convolution that makes it where tensor cores do.
fn summed_convolution(t: &mut Trial, shape: &ConvShape) -> Result<()> {
    let ([p, q], k) = (shape.output_image(), shape.filters());
    let n = shape.output_len() / (k * p * q);
    let (x, w, bias, count) = (t.real_samples(shape.input_len())?, weights(t, shape)?, t.floats(k)?, t.count()?);
    let (mut y, mut normed) = (t.unwritten_reals(shape.output_len())?, t.unwritten_reals(shape.output_len())?);
    let (mut running_mean, mut running_var) = (t.floats(k)?, t.positive(k)?);
    let (mut mean, mut invstd) = (t.unwritten(k)?, t.unwritten(k)?);
    let running = NormRunning { mean: running_mean.view_mut(), var: running_var.view_mut(), momentum: 0.1 };
    let saved = NormSaved { mean: mean.view_mut(), invstd: invstd.view_mut() };
    let columns = Columns::samples(n)?;
    let with_bias = Some(Bias { bias: bias.view(), columns, count: count.view() });
    let norm = NormShape::new(k, p * q, n)?;
    if let Some(tile) = shape.statistics_tile(t.device, t.precision, None) {
        let mut tiles = t.unwritten(shape.statistics_len(tile))?;
        let statistics = Some(TileStatistics { count: count.view(), tiles: tiles.view_mut() });
        let epilogue = Epilogue { bias: with_bias, statistics, beside: None };
        conv_forward(t.device, shape, x.view(), w.view(), epilogue, y.view_mut())?;
        norm_join(t.device, &norm, tiles.view(), tile, count.view(), 1e-5, running, saved)?;
    } else {
        conv_forward(t.device, shape, x.view(), w.view(), with_bias.into(), y.view_mut())?;
        let mut scratch = t.unwritten(norm.scratch_len())?;
        let input = NormInput { x: y.view(), residual: None, relu: false, map: None, count: count.view() };
        let affine = NormAffine { gamma: bias.view(), beta: bias.view(), epsilon: 1e-5 };
        norm_forward(t.device, &norm, input, affine, running, saved, scratch.view_mut(), normed.view_mut())?;
    }
    t.close_as_reals("mean", &mean)?;
    t.close_as_reals("invstd", &invstd)
}

fn convolution_input_gradient(t: &mut Trial, shape: &ConvShape) -> Result<()> {
    let (dy, w) = (t.real_samples(shape.output_len())?, weights(t, shape)?);
    let mut dx = t.real_samples(shape.input_len())?;
    conv_input_gradient(t.device, shape, dy.view(), w.view(), Dx::Add, dx.view_mut())?;
    t.close_reals("dx", &dx)?;
    let x = t.real_samples(shape.input_len())?;
    conv_input_gradient(t.device, shape, dy.view(), w.view(), Dx::BeforeGelu(x.view()), dx.view_mut())?;
    t.close_reals("dx before GELU", &dx)
}

/// The gradients of a norm whose result a convolution reads, summed by that where tensor cores multiply.
fn summed_input_gradient(t: &mut Trial, shape: &ConvShape) -> Result<()> {
    let (dy, w, len) = (t.real_samples(shape.output_len())?, weights(t, shape)?, shape.input_len());
    let (x, y, mut dz) = (t.real_samples(len)?, t.real_samples(len)?, t.real_samples(len)?);
    let (features, [p, q]) = (shape.channels(), shape.output_image());
    let n = shape.output_len() / (shape.filters() * p * q);
    let [gamma, beta, mean] = [t.floats(features)?, t.floats(features)?, t.floats(features)?];
    // What is padded is zero as it comes.
    let (invstd, count) = (t.positive(features)?, t.device.upload(&[n as u32])?);
    let normed = Normed {
        norm: Normalised {
            x: x.view(),
            gamma: gamma.view(),
            beta: beta.view(),
            mean: mean.view(),
            invstd: invstd.view(),
        },
        y: Some(y.view()),
        relu: true,
        map: None,
    };
    let (mut dgamma, mut dbeta) = (t.unwritten(features)?, t.unwritten(features)?);
    if let Some(tiles) = shape.gradient_tiles(t.device, t.precision, None) {
        let mut sums = t.unwritten(2 * features * tiles)?;
        let how = Dx::BeforeNorm(BeforeNorm { normed, added: None, add: true, sums: sums.view_mut() });
        conv_input_gradient(t.device, shape, dy.view(), w.view(), how, dz.view_mut())?;
        norm_join_gradient(t.device, sums.view(), tiles, dgamma.view_mut(), dbeta.view_mut())?;
    } else {
        conv_input_gradient(t.device, shape, dy.view(), w.view(), Dx::Add, dz.view_mut())?;
        let norm = NormShape::new(features, len / features / n, n)?;
        let (mut scratch, mut dx) = (t.unwritten(norm.scratch_len())?, t.unwritten_reals(len)?);
        let dy = NormGradient::OfResidual(dz.view_mut());
        let input = NormBackward { normed, dy, training: true, count: count.view() };
        let to = NormGradients { dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut(), dx: dx.view_mut() };
        norm_backward(t.device, &norm, input, scratch.view_mut(), to)?;
    }
    t.close_reals("dz", &dz)?;
    t.close_as_reals("dgamma", &dgamma)?;
    t.close_as_reals("dbeta", &dbeta)
}

fn convolution_weight_gradient(t: &mut Trial, shape: &ConvShape) -> Result<()> {
    let (x, dy) = (t.real_samples(shape.input_len())?, t.real_samples(shape.output_len())?);
    let scratch_len = shape.gradient_scratch_len(t.device, t.precision);
    let (mut scratch, mut dw) = (t.unwritten(scratch_len)?, t.unwritten(shape.weight_len())?);
    let mut dbias = t.unwritten(shape.filters())?;
    let (scratch, bias) = (scratch.view_mut(), Some(dbias.view_mut()));
    conv_weight_gradient(t.device, shape, x.view(), dy.view(), scratch, dw.view_mut(), bias)?;
    t.close("dw", &dw)?;
    t.close("dbias", &dbias)
}

fn convolution_bias_gradient(t: &mut Trial, shape: &ConvShape) -> Result<()> {
    let (dy, mut dbias) = (t.real_samples(shape.output_len())?, t.unwritten(shape.filters())?);
    bias_gradient(t.device, dy.view(), dbias.view_mut())?;
    t.close("dbias", &dbias)
}

/// All passes with every fifth weight, rows by themselves and in groups.
fn kept_weights(t: &mut Trial, shape: &ConvShape) -> Result<()> {
    let places: Vec<u32> = (0..shape.weight_len() as u32).step_by(5).collect();
    let kept = Kept { places: &places, packed: false };
    let w = t.floats(shape.weight_len())?;
    let (x, dy) = (t.real_samples(shape.input_len())?, t.real_samples(shape.output_len())?);
    for groups in [None, Some(RowGroups::neighbours(shape, group_rows(t.device, shape, t.precision)))] {
        let mut weights = KeptWeights::new(t.device, shape, t.precision, &kept, groups.as_ref(), &Pass::ALL)?;
        weights.gather(t.device, w.view())?;
        let mut y = t.unwritten_reals(shape.output_len())?;
        conv_sparse_forward(t.device, &weights, x.view(), Epilogue::default(), y.view_mut())?;
        t.close_reals("y", &y)?;
        let mut dx = t.unwritten_reals(shape.input_len())?;
        conv_sparse_input_gradient(t.device, &weights, dy.view(), Dx::Set, dx.view_mut())?;
        t.close_reals("dx", &dx)?;
        // Zero where no weight is kept, since that is not written.
        let mut dw = t.device.alloc(shape.weight_len())?;
        conv_sparse_weight_gradient(t.device, &mut weights, x.view(), dy.view(), dw.view_mut(), None)?;
        t.close("dw", &dw)?;
    }
    Ok(())
}
