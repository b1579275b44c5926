//! Groups of layers, by spectral clustering of values between them (Ng, Jordan, Weiss 2001; von Luxburg 2007).
//!
//! Affinity `A = exp(-values / σ)`, degrees D without the diagonal, Laplacian `L = I - D^-½ A D^-½`. As many modules as
//! eigenvalues stand below the largest gap in the spectrum; k-means on the eigenvectors of the k smallest, divided by
//! `√D`, as scikit-learn's `SpectralClustering(affinity="precomputed")` does.

use faer::linalg::solvers::SelfAdjointEigen;
use faer::{Mat, Side};
use ndarray::{Array2, ArrayView1, ArrayView2, Axis, s};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::check_distances;
use crate::error::{Error, Result};

/// Starts of k-means, of which the best is kept.
const RESTARTS: usize = 32;
/// Of k-means; a few are usual.
const MOST_ITERATIONS: usize = 300;
/// Modules that the gap may ask for.
const MOST_MODULES: usize = 10;
/// Gaps up to this are rounding of equal eigenvalues.
const ROUNDING: f64 = 1e-9;

/// How to cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Clustering {
    /// Number of modules; by the largest gap in the spectrum if not given.
    pub modules: Option<usize>,
    /// Scale of the affinity; the median of the values off the diagonal if not given. 0 relates layers of value 0 alone.
    pub sigma: Option<f64>,
    /// Of the starts of k-means.
    pub seed: u64,
}

/// Layers divided into modules.
#[derive(Clone, Debug, PartialEq)]
pub struct Modules {
    /// Module of each layer, numbered from 0 in the order of their first layers.
    pub labels: Vec<usize>,
    /// Scale of the affinity.
    pub sigma: f64,
    /// Eigenvalues of the Laplacian, rising from 0 to at most 2.
    pub eigenvalues: Vec<f64>,
}

impl Modules {
    /// Number of modules. Fewer than asked for if fewer layers differ.
    pub fn count(&self) -> usize {
        self.labels.iter().max().map_or(0, |most| most + 1)
    }
}

/// Divides layers into modules by `values` `[L, L]`: symmetric, small where layers are alike, the diagonal of no effect.
///
/// Without a number of modules, k is where eigenvalue k + 1 lies farthest above eigenvalue k, of k from 2 to half of the
/// layers, rounded up, and to 10. The first eigenvalue is 0 and stands apart in every graph whose layers are all related,
/// whether they form groups or not; so k is 1 only for two layers or fewer, or if there is no gap at all, as where all
/// values are equal.
///
/// # Errors
/// [`Error::Shape`] if the matrix is not square or empty; [`Error::Run`] if a value is negative or not finite;
/// [`Error::Usage`] if the number of modules is not 1 to L, or the scale is negative or not finite.
pub fn cluster(values: ArrayView2<f64>, how: Clustering) -> Result<Modules> {
    check_distances("cluster", "values", values)?;
    let layers = values.nrows();
    if let Some(k) = how.modules
        && !(1..=layers).contains(&k)
    {
        return Err(Error::Usage(format!("modules: expected 1 to {layers}, the number of layers, got {k}")));
    }
    let sigma = how.sigma.unwrap_or_else(|| median_between(values));
    if !(sigma >= 0.0 && sigma.is_finite()) {
        return Err(Error::Usage(format!("sigma: expected a number from 0, got {sigma}")));
    }
    let Spectrum { eigenvalues, vectors } = Spectrum::of(&affinity(values, sigma))?;
    let k = how.modules.unwrap_or_else(|| below_largest_gap(&eigenvalues));
    let points = vectors.slice_move(s![.., ..k]);
    Ok(Modules { labels: by_first_appearance(&k_means(&points, k, how.seed)), sigma, eigenvalues })
}

/// The median of the values between different layers; 0 if there is one layer alone.
fn median_between(values: ArrayView2<f64>) -> f64 {
    let mut between: Vec<f64> = values.indexed_iter().filter(|((i, j), _)| i < j).map(|(_, &v)| v).collect();
    between.sort_unstable_by(f64::total_cmp);
    match between.len() {
        0 => 0.0,
        pairs => (between[(pairs - 1) / 2] + between[pairs / 2]) / 2.0,
    }
}

/// `exp(-values / σ)`, zero on the diagonal; for σ = 0 its limit, 1 where a value is 0 and else 0.
fn affinity(values: ArrayView2<f64>, sigma: f64) -> Array2<f64> {
    Array2::from_shape_fn(values.dim(), |(i, j)| match values[[i, j]] {
        _ if i == j => 0.0,
        0.0 => 1.0,
        value => (-value / sigma).exp(),
    })
}

/// Of a normalised Laplacian.
struct Spectrum {
    /// Rising.
    eigenvalues: Vec<f64>,
    /// `[L, L]`: a layer in each row, an eigenvector divided by the root of the degrees in each column.
    vectors: Array2<f64>,
}

impl Spectrum {
    fn of(affinity: &Array2<f64>) -> Result<Self> {
        let layers = affinity.nrows();
        let degrees = affinity.sum_axis(Axis(1));
        let root = degrees.mapv(|degree| if degree > 0.0 { degree.sqrt() } else { 1.0 });
        let laplacian = Mat::from_fn(layers, layers, |i, j| match i == j {
            // A layer without relations is a component of its own, to which an eigenvalue of 0 belongs.
            true => f64::from(u8::from(degrees[i] > 0.0)),
            false => -affinity[[i, j]] / (root[i] * root[j]),
        });
        let eigen = SelfAdjointEigen::new(laplacian.as_ref(), Side::Lower)
            .map_err(|_| Error::Run("cluster: the eigenvalues of the Laplacian do not converge".into()))?;
        let vectors = Array2::from_shape_fn((layers, layers), |(i, j)| eigen.U()[(i, j)] / root[i]);
        Ok(Spectrum { eigenvalues: (0..layers).map(|i| eigen.S()[i]).collect(), vectors })
    }
}

/// The k of the largest gap between eigenvalues k and k + 1, the lowest of equal ones; 1 if there is no gap.
fn below_largest_gap(eigenvalues: &[f64]) -> usize {
    let gap = |k: usize| eigenvalues[k] - eigenvalues[k - 1];
    let candidates = 2..=eigenvalues.len().div_ceil(2).min(MOST_MODULES);
    let largest = candidates.reduce(|best, k| if gap(k) > gap(best) { k } else { best });
    largest.filter(|&k| gap(k) > ROUNDING).unwrap_or(1)
}

/// The centre of each point `[L, D]`: of the starts, the one that ends with the least sum of squared distances.
fn k_means(points: &Array2<f64>, k: usize, seed: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let runs = (0..RESTARTS).map(|_| lloyd(points, spread_centres(points, k, &mut rng)));
    let (_, labels) = runs.reduce(|best, run| if run.0 < best.0 { run } else { best }).expect("at least one start");
    labels
}

/// k points to start from, each drawn with a probability that rises with its squared distance from those before
/// (k-means++, Arthur and Vassilvitskii 2007).
fn spread_centres(points: &Array2<f64>, k: usize, rng: &mut ChaCha8Rng) -> Array2<f64> {
    let mut centres = points.select(Axis(0), &[rng.random_range(0..points.nrows())]);
    while centres.nrows() < k {
        let distances: Vec<f64> = points.rows().into_iter().map(|point| nearest(point, &centres).1).collect();
        let mut left = rng.random::<f64>() * distances.iter().sum::<f64>();
        // Where rounding leaves a rest, or all points are centres: the last.
        let passed = distances.iter().position(|distance| {
            left -= distance;
            left < 0.0
        });
        let drawn = points.row(passed.unwrap_or(points.nrows() - 1));
        centres.push_row(drawn).expect("points of one size");
    }
    centres
}

/// Moves centres to the means of their points until no point changes its centre; the sum of squared distances, and the
/// centre of each point.
fn lloyd(points: &Array2<f64>, mut centres: Array2<f64>) -> (f64, Vec<usize>) {
    let mut labels = Vec::new();
    let mut sum = 0.0;
    for _ in 0..MOST_ITERATIONS {
        let found: Vec<(usize, f64)> = points.rows().into_iter().map(|point| nearest(point, &centres)).collect();
        let moved: Vec<usize> = found.iter().map(|(label, _)| *label).collect();
        sum = found.iter().map(|(_, distance)| distance).sum();
        if moved == labels {
            break;
        }
        labels = moved;
        for (label, mut centre) in centres.rows_mut().into_iter().enumerate() {
            let members: Vec<usize> = (0..labels.len()).filter(|&i| labels[i] == label).collect();
            // A centre without points stays.
            if let Some(mean) = points.select(Axis(0), &members).mean_axis(Axis(0)) {
                centre.assign(&mean);
            }
        }
    }
    (sum, labels)
}

/// The nearest centre, the first of equal ones, and its squared distance.
fn nearest(point: ArrayView1<f64>, centres: &Array2<f64>) -> (usize, f64) {
    let distance = |centre: ArrayView1<f64>| (&point - &centre).mapv_into(|d| d * d).sum();
    let distances = centres.rows().into_iter().map(distance).enumerate();
    distances.reduce(|best, other| if other.1 < best.1 { other } else { best }).expect("at least one centre")
}

/// Labels numbered from 0 in the order in which they come.
fn by_first_appearance(labels: &[usize]) -> Vec<usize> {
    let mut seen = Vec::new();
    let number = |label: &usize| {
        seen.iter().position(|known| known == label).unwrap_or_else(|| {
            seen.push(*label);
            seen.len() - 1
        })
    };
    labels.iter().map(number).collect()
}
