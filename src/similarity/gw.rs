//! Gromov-Wasserstein distances between layers, many pairs at a time.
//!
//! The value of a pair of distance matrices is the least of `sum over i,k,j,l of (C1[i,k] - C2[j,l])^2 T[i,j] T[k,l]` over
//! couplings T of uniform weights (Mémoli, Foundations of Computational Mathematics 2011). That is not convex: what is found
//! is an upper bound, the lowest of several starts. From each start come proximal steps on the device, all pairs at once
//! (Xie et al., UAI 2019), rounded to a true coupling; then, where n is small enough, exact steps on the CPU.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::{cka, exact};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::gw::{Couplings, Layers, Start, Step};

/// Regularisation of the first proximal step, which falls by [`ANNEALING`] each step.
const FIRST_EPSILON: f64 = 0.1;
const ANNEALING: f64 = 0.8;
/// Regularisation of the start by sorted distances, beside their mean squared differences.
const SORTED_EPSILON: f32 = 1e-3;
/// Error of a row's sum, as a share of the sum, where Sinkhorn's iterations may end: the next step starts anew. A tenth of it
/// gave the same values, ten times as much half a percent larger ones.
const TOLERANCE: f32 = 1e-3;
/// Share of its value that a step must take off for another one to follow.
const ENOUGH: f32 = 1e-4;
/// Steps between two looks at what has ended.
const LOOK: usize = 5;
/// Pairs of a batch, at most, and elements of their matrices: as many as keep a device busy, and no more, since a batch is
/// what an interruption loses.
const BATCH: usize = 64;
const BATCH_ELEMENTS: usize = 32 * 512 * 512;

/// How pairs are solved.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Regularisation of the last proximal steps.
    pub epsilon: f64,
    /// Proximal steps, at most.
    pub steps: usize,
    /// Sinkhorn iterations of a step, at most.
    pub iterations: usize,
    /// Exact refinement of pairs of at most so many probes each.
    pub refine_up_to: usize,
    /// Bytes of device memory that a batch may take.
    pub memory: usize,
}

/// What was found for a pair.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The two layers.
    pub layers: [usize; 2],
    /// The value <L(T), T> of the best coupling.
    pub value: f64,
    /// Where it was found: product, mean, sorted (proximal steps from there), refined, or identity.
    pub found_by: &'static str,
}

/// Bytes of device memory that the pairs of layers of these sizes need at least: one pair at a time.
pub fn least_memory(sizes: &[usize]) -> usize {
    let most = sizes.iter().copied().max().unwrap_or(0);
    Layers::bytes(sizes) + STARTS.len() * Couplings::bytes([most; 2])
}

const STARTS: [(Start, &str); 3] = [(Start::Product, "product"), (Start::Mean, "mean"), (Start::Sorted, "sorted")];

/// Solves pairs of layers, batch by batch; `finished` sees each as it is done, in order, and stops the work by an error.
///
/// # Errors
/// [`Error::Shape`] if a matrix is not square, not finite or too large; [`Error::Run`] if no start came to a value;
/// [`Error::Device`] when memory runs out; what `finished` returns.
pub fn solve(
    device: &Device,
    layers: &[ArrayView2<f32>],
    pairs: &[[usize; 2]],
    options: &Options,
    finished: &mut dyn FnMut(&Pair) -> Result<()>,
) -> Result<()> {
    let sizes: Vec<usize> = layers.iter().map(|layer| layer.nrows()).collect();
    let on_device = Layers::new(device, layers)?;
    let most = pairs.iter().flatten().map(|&layer| sizes[layer]).max().unwrap_or(0);
    let left = options.memory.saturating_sub(Layers::bytes(&sizes));
    let fits = left / (STARTS.len() * Couplings::bytes([most; 2])).max(1);
    let batch = fits.min(BATCH).min(BATCH_ELEMENTS / (most * most).max(1)).max(1);
    for pairs in pairs.chunks(batch) {
        for pair in solve_batch(device, layers, &on_device, pairs, options)? {
            finished(&pair)?;
        }
    }
    Ok(())
}

fn solve_batch(
    device: &Device,
    layers: &[ArrayView2<f32>],
    on_device: &Layers,
    pairs: &[[usize; 2]],
    options: &Options,
) -> Result<Vec<Pair>> {
    let square = |&[x, y]: &[usize; 2]| layers[x].nrows() == layers[y].nrows();
    let sought: Vec<_> = STARTS
        .iter()
        .flat_map(|&(start, _)| {
            let fits = move |pair: &&[usize; 2]| start != Start::Mean || square(pair);
            pairs.iter().filter(fits).map(move |&pair| (pair, start))
        })
        .collect();
    let mut couplings = Couplings::new(device, on_device, &sought)?;
    let step = |epsilon: f32, enough| Step { epsilon, iterations: options.iterations, tolerance: TOLERANCE, enough };
    couplings.begin(device, &step(SORTED_EPSILON, None))?;
    let mut epsilon = FIRST_EPSILON.max(options.epsilon);
    for number in 1..=options.steps {
        let last = epsilon <= options.epsilon;
        couplings.step(device, &step(epsilon as f32, last.then_some(ENOUGH)))?;
        epsilon = (epsilon * ANNEALING).max(options.epsilon);
        if last && number % LOOK == 0 && couplings.all_ended(device)? {
            break;
        }
    }
    let values = couplings.finish(device)?;
    let best = |&pair: &[usize; 2]| {
        let own = sought.iter().zip(&values).enumerate().filter(|(_, (own, value))| own.0 == pair && value.is_finite());
        let least = own.min_by(|x, y| x.1.1.total_cmp(y.1.1));
        let (index, (&(_, start), &value)) = least.ok_or_else(|| {
            Error::Run(format!("gw: layers {pair:?}: no start came to a finite value; use a larger epsilon"))
        })?;
        let refines = pair.iter().all(|&layer| layers[layer].nrows() <= options.refine_up_to);
        let plan = if refines { Some(couplings.plan(device, index)?) } else { None };
        let found_by = STARTS.iter().find(|(known, _)| *known == start).expect("one of them").1;
        Ok((Pair { layers: pair, value, found_by }, plan))
    };
    let found = pairs.iter().map(best).collect::<Result<Vec<_>>>()?;
    found.into_par_iter().map(|(pair, plan)| improved(layers, pair, plan)).collect()
}

/// What exact steps make of a plan, where there is one, or of the identity, where that is better.
fn improved(layers: &[ArrayView2<f32>], mut pair: Pair, plan: Option<Array2<f32>>) -> Result<Pair> {
    let [c1, c2] = pair.layers.map(|layer| layers[layer].mapv(f64::from));
    if let Some(plan) = plan {
        let refined = exact::refine(c1.view(), c2.view(), &[plan.mapv(f64::from)])?;
        return Ok(Pair { value: refined.value, found_by: "refined", ..pair });
    }
    if c1.dim() == c2.dim() {
        let identity = cka::identity_value(c1.view(), c2.view())?;
        if identity < pair.value {
            (pair.value, pair.found_by) = (identity, "identity");
        }
    }
    // The value of a rounded plan is a small difference of f32 sums.
    pair.value = pair.value.max(0.0);
    Ok(pair)
}
