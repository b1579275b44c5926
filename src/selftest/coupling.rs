//! The checks of distances between probes and of Gromov-Wasserstein couplings.

use ndarray::Array2;
use rand::Rng;

use super::{Check, SAMPLES, Tensor, Trial};
use crate::error::Result;
use crate::ops::Columns;
use crate::ops::distances::{DistanceShape, Metric, RepresentationShape, distance_matrix, pitch, representation};
use crate::ops::gw::{Couplings, Layers, Start, Step};

/// What reads a layer's output.
pub(super) const OF_ACTIVATIONS: &[Check] =
    &[layer_output, |t| distances(t, Metric::Euclidean), |t| distances(t, Metric::Cosine)];

pub(super) const OTHERS: &[Check] =
    &[|t| couplings(t, 40), |t| couplings(t, 261), |t| couplings(t, 521), |t| couplings(t, 1030)];

/// Pooled tokens.
fn layer_output(t: &mut Trial) -> Result<()> {
    const TOKENS: usize = 7;
    let columns = Columns::tokens(SAMPLES, TOKENS)?;
    let x = t.real_tokens(5 * columns.len(), SAMPLES, TOKENS)?;
    let shape = RepresentationShape { features: 5, positions: 1, columns, n: SAMPLES, pooled: true };
    let mut out = t.unwritten(shape.rows() * shape.samples())?;
    representation(t.device, &shape, x.view(), out.view_mut())?;
    t.close("out", &out)
}

fn distances(t: &mut Trial, metric: Metric) -> Result<()> {
    const PROBES: usize = 69;
    let shape = DistanceShape { features: 83, columns: 72, n: PROBES };
    let x = t.reals(shape.features * shape.columns)?;
    let (mut scratch, mut c) = (t.unwritten(shape.scratch_len())?, t.unwritten(PROBES * pitch(PROBES))?);
    let mut largest = t.unwritten(PROBES + 1)?;
    distance_matrix(t.device, &shape, metric, x.view(), scratch.view_mut(), c.view_mut(), largest.view_mut())?;
    t.close("c", &c)?;
    t.close("largest", &largest)
}

/// Two steps between layers of a few and of `n` probes, from two starts, rounded. `n` chooses the scaling.
fn couplings(t: &mut Trial, n: usize) -> Result<()> {
    let mut layer = |n: usize| {
        let x: Vec<f32> = (0..n).map(|_| t.random.random_range(0.0..1.0)).collect();
        Array2::from_shape_fn((n, n), |(i, j)| (x[i] - x[j]).abs())
    };
    let layers = [layer(21), layer(n)];
    let layers = Layers::new(t.device, &layers.each_ref().map(Array2::view))?;
    let mut couplings = Couplings::new(t.device, &layers, &[([0, 1], Start::Product), ([0, 1], Start::Sorted)])?;
    let step = Step { epsilon: 0.5, iterations: 3, tolerance: -1.0, enough: None };
    couplings.begin(t.device, &Step { epsilon: 0.1, ..step })?;
    couplings.step(t.device, &step)?;
    couplings.step(t.device, &step)?;
    let values = couplings.finish(t.device)?;
    t.results.push(Tensor { name: "values", values, tolerance: TOLERANCE });
    let plan = couplings.plan(t.device, 1)?.iter().map(|&t| f64::from(t)).collect();
    t.results.push(Tensor { name: "plan", values: plan, tolerance: TOLERANCE });
    Ok(())
}

/// Of plans, which are powers of sums of up to 100: their roundings are shares of the plan.
const TOLERANCE: f64 = 1e-4;
