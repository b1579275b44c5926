//! The checks of batch norm.

use super::{Check, SAMPLES, Trial};
use crate::device::Buffer;
use crate::error::Result;
use crate::ops::norm::{
    NormAffine, NormBackward, NormGradient, NormGradients, NormInput, NormRunning, NormSaved, NormShape, Normalised,
    Normed, norm_backward, norm_eval, norm_forward,
};
use crate::ops::norm_join::{norm_join, norm_join_gradient};
use crate::ops::norm_pair::{NormPair, NormPairGradient, norm_pair_backward, norm_pair_forward};
use crate::ops::norm_pool::{NormPool, norm_pool_backward, norm_pool_forward};
use crate::ops::pool::PoolShape;

/// What has activations.
pub(super) const OF_ACTIVATIONS: &[Check] =
    &[in_training, in_evaluation, |t| gradient(t, true), |t| gradient(t, false), of_a_sum, in_a_pool];

/// What tensor cores have summed.
pub(super) const OTHERS: &[Check] = &[of_tiles, gradient_of_tiles];

const FEATURES: usize = 5;

/// Two chunks a row.
fn shape() -> Result<NormShape> {
    NormShape::new(FEATURES, 600, SAMPLES)
}

fn in_training(t: &mut Trial) -> Result<()> {
    let shape = shape()?;
    let (x, residual, count) = (t.real_samples(shape.len())?, t.real_samples(shape.len())?, t.count()?);
    let (gamma, beta) = (t.floats(FEATURES)?, t.floats(FEATURES)?);
    let (mut running_mean, mut running_var) = (t.floats(FEATURES)?, t.positive(FEATURES)?);
    let (mut mean, mut invstd) = (t.unwritten(FEATURES)?, t.unwritten(FEATURES)?);
    let (mut scratch, mut y) = (t.unwritten(shape.scratch_len())?, t.unwritten_reals(shape.len())?);
    let input = NormInput { x: x.view(), residual: Some(residual.view()), relu: true, map: None, count: count.view() };
    let affine = NormAffine { gamma: gamma.view(), beta: beta.view(), epsilon: 1e-5 };
    let running = NormRunning { mean: running_mean.view_mut(), var: running_var.view_mut(), momentum: 0.1 };
    let saved = NormSaved { mean: mean.view_mut(), invstd: invstd.view_mut() };
    norm_forward(t.device, &shape, input, affine, running, saved, scratch.view_mut(), y.view_mut())?;
    t.close("running mean", &running_mean)?;
    t.close("running var", &running_var)?;
    t.close("mean", &mean)?;
    t.close("invstd", &invstd)?;
    t.close_reals("y", &y)
}

/// Statistics from those of ragged tiles.
fn of_tiles(t: &mut Trial) -> Result<()> {
    const TILE: usize = 100;
    let (shape, count) = (shape()?, t.count()?);
    let tiles = t.positive(2 * FEATURES * (shape.len() / FEATURES).div_ceil(TILE))?;
    let (mut running_mean, mut running_var) = (t.floats(FEATURES)?, t.positive(FEATURES)?);
    let (mut mean, mut invstd) = (t.unwritten(FEATURES)?, t.unwritten(FEATURES)?);
    let running = NormRunning { mean: running_mean.view_mut(), var: running_var.view_mut(), momentum: 0.1 };
    let saved = NormSaved { mean: mean.view_mut(), invstd: invstd.view_mut() };
    norm_join(t.device, &shape, tiles.view(), TILE, count.view(), 1e-5, running, saved)?;
    t.close("running mean", &running_mean)?;
    t.close("running var", &running_var)?;
    t.close("mean", &mean)?;
    t.close("invstd", &invstd)
}

fn in_evaluation(t: &mut Trial) -> Result<()> {
    let shape = shape()?;
    let (x, count, mut y) = (t.real_samples(shape.len())?, t.count()?, t.unwritten_reals(shape.len())?);
    let (gamma, beta) = (t.floats(FEATURES)?, t.floats(FEATURES)?);
    let (mean, var) = (t.floats(FEATURES)?, t.positive(FEATURES)?);
    let input = NormInput { x: x.view(), residual: None, relu: true, map: None, count: count.view() };
    let affine = NormAffine { gamma: gamma.view(), beta: beta.view(), epsilon: 1e-5 };
    norm_eval(t.device, &shape, input, affine, mean.view(), var.view(), y.view_mut())?;
    t.close_reals("y", &y)
}

fn gradient(t: &mut Trial, with_residual: bool) -> Result<()> {
    let shape = shape()?;
    let (x, y, mut dy) = (t.real_samples(shape.len())?, t.real_samples(shape.len())?, t.real_samples(shape.len())?);
    let (gamma, beta) = (t.floats(FEATURES)?, t.floats(FEATURES)?);
    let (mean, invstd) = (t.floats(FEATURES)?, t.positive(FEATURES)?);
    let (mut scratch, count) = (t.unwritten(shape.scratch_len())?, t.count()?);
    let (mut dgamma, mut dbeta) = (t.unwritten(FEATURES)?, t.unwritten(FEATURES)?);
    let mut dx = t.unwritten_reals(shape.len())?;
    let input = NormBackward {
        normed: Normed {
            norm: Normalised {
                x: x.view(),
                gamma: gamma.view(),
                beta: beta.view(),
                mean: mean.view(),
                invstd: invstd.view(),
            },
            y: with_residual.then_some(y.view()),
            relu: true,
            map: None,
        },
        dy: NormGradient::OfResidual(dy.view_mut()),
        training: true,
        count: count.view(),
    };
    let to = NormGradients { dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut(), dx: dx.view_mut() };
    norm_backward(t.device, &shape, input, scratch.view_mut(), to)?;
    t.close("dgamma", &dgamma)?;
    t.close("dbeta", &dbeta)?;
    t.exact_reals("dresidual", &dy)?;
    t.close_reals("dx", &dx)
}

/// The sum of two, forward and backward.
fn of_a_sum(t: &mut Trial) -> Result<()> {
    let (shape, count) = (shape()?, t.count()?);
    let mut read = Vec::new();
    for _ in 0..2 {
        let (x, invstd) = (t.real_samples(shape.len())?, t.positive(FEATURES)?);
        read.push((x, [t.floats(FEATURES)?, t.floats(FEATURES)?, t.floats(FEATURES)?], invstd));
    }
    let norms = [0, 1].map(|which| {
        let (x, rows, invstd) = &read[which];
        let [gamma, beta, mean] = rows.each_ref().map(Buffer::view);
        Normalised { x: x.view(), gamma, beta, mean, invstd: invstd.view() }
    });
    let (pair, mut y) = (NormPair { norms, relu: true, count: count.view() }, t.unwritten_reals(shape.len())?);
    norm_pair_forward(t.device, &shape, pair, y.view_mut())?;
    t.close_reals("y", &y)?;

    let (dy, mut scratch) = (t.real_samples(shape.len())?, t.unwritten(2 * shape.scratch_len())?);
    let mut gradients = Vec::new();
    for _ in 0..2 {
        gradients.push((t.unwritten(FEATURES)?, t.unwritten(FEATURES)?, t.unwritten_reals(shape.len())?));
    }
    let [first, second] = &mut gradients[..] else { unreachable!("two norms") };
    let to = [first, second].map(|(dgamma, dbeta, dx)| NormGradients {
        dgamma: dgamma.view_mut(),
        dbeta: dbeta.view_mut(),
        dx: dx.view_mut(),
    });
    norm_pair_backward(t.device, &shape, pair, NormPairGradient::Whole(dy.view()), scratch.view_mut(), to)?;
    for (dgamma, dbeta, dx) in &gradients {
        t.close("dgamma", dgamma)?;
        t.close("dbeta", dbeta)?;
        t.close_reals("dx", dx)?;
    }
    Ok(())
}

/// With the max pool that reads it, forward and backward.
fn in_a_pool(t: &mut Trial) -> Result<()> {
    let (shape, pool, count) = (shape()?, PoolShape::new(FEATURES, [30, 20], 3, 2, 1, SAMPLES)?, t.count()?);
    let (x, dy) = (t.real_samples(shape.len())?, t.real_samples(pool.output_len())?);
    let [gamma, beta, mean] = [t.floats(FEATURES)?, t.floats(FEATURES)?, t.floats(FEATURES)?];
    let invstd = t.positive(FEATURES)?;
    let norm =
        Normalised { x: x.view(), gamma: gamma.view(), beta: beta.view(), mean: mean.view(), invstd: invstd.view() };
    let input = NormPool { norm, relu: true, map: None, count: count.view() };
    let (mut index, mut y) = (t.device.alloc::<u8>(pool.output_len())?, t.unwritten_reals(pool.output_len())?);
    norm_pool_forward(t.device, &shape, &pool, input, index.view_mut(), y.view_mut())?;
    t.close_reals("y", &y)?;
    t.exact("index", &index)?;
    let (mut dgamma, mut dbeta) = (t.unwritten(FEATURES)?, t.unwritten(FEATURES)?);
    let (mut scratch, mut dx) = (t.unwritten(shape.scratch_len())?, t.unwritten_reals(shape.len())?);
    let to = NormGradients { dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut(), dx: dx.view_mut() };
    let (dy, index, scratch) = (dy.view(), index.view(), scratch.view_mut());
    norm_pool_backward(t.device, &shape, &pool, input, dy, index, scratch, to)?;
    t.close("dgamma", &dgamma)?;
    t.close("dbeta", &dbeta)?;
    t.close_reals("dx", &dx)
}

/// From the sums of more tiles than a block has threads.
fn gradient_of_tiles(t: &mut Trial) -> Result<()> {
    const TILES: usize = 1100;
    let sums = t.floats(2 * FEATURES * TILES)?;
    let (mut dgamma, mut dbeta) = (t.unwritten(FEATURES)?, t.unwritten(FEATURES)?);
    norm_join_gradient(t.device, sums.view(), TILES, dgamma.view_mut(), dbeta.view_mut())?;
    t.close("dgamma", &dgamma)?;
    t.close("dbeta", &dbeta)
}
