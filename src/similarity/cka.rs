//! What stands beside Gromov-Wasserstein: linear CKA, and the value of the coupling that leaves each probe where it is.

use ndarray::{Array2, ArrayView2, Axis};

use super::check_distances;
use crate::error::{Error, Result};

/// Linear centred kernel alignment (Kornblith et al. 2019), `<K1, K2> / (|K1| |K2|)` of centred Gram matrices, from the
/// Euclidean distance matrices `[n, n]` of two layers, each in any unit: `K = -H D² H / 2` with `H = I - 1 1ᵀ / n`. From 0
/// to 1; none if a layer's representation is the same for all probes, for which it is not defined.
///
/// # Errors
/// [`Error::Shape`] unless both are square and of one size; [`Error::Run`] if an element is negative or not finite.
pub fn linear_cka(d1: ArrayView2<f64>, d2: ArrayView2<f64>) -> Result<Option<f64>> {
    check_same_probes("linear_cka", d1, d2)?;
    let (Some(k1), Some(k2)) = (unit_gram(d1), unit_gram(d2)) else { return Ok(None) };
    // Rounding alone, or distances that are not Euclidean, lead outside.
    Ok(Some((k1 * k2).sum().clamp(0.0, 1.0)))
}

/// The mean squared difference of two distance matrices `[n, n]`: the Gromov-Wasserstein value of the identity coupling.
///
/// # Errors
/// [`Error::Shape`] unless both are square and of one size; [`Error::Run`] if an element is negative or not finite.
pub fn identity_value(c1: ArrayView2<f64>, c2: ArrayView2<f64>) -> Result<f64> {
    check_same_probes("identity_value", c1, c2)?;
    let difference = &c1 - &c2;
    Ok((&difference * &difference).sum() / c1.len() as f64)
}

/// The centred Gram matrix of distances, divided by its norm; none if it is zero.
fn unit_gram(distances: ArrayView2<f64>) -> Option<Array2<f64>> {
    // The factor 1/2 does not outlive the norm.
    let mut gram = distances.mapv(|d| -d * d);
    for axis in [Axis(0), Axis(1)] {
        let mean = gram.mean_axis(axis)?.insert_axis(axis);
        gram -= &mean;
    }
    let norm = gram.iter().map(|k| k * k).sum::<f64>().sqrt();
    (norm > 0.0).then(|| gram / norm)
}

fn check_same_probes(op: &'static str, c1: ArrayView2<f64>, c2: ArrayView2<f64>) -> Result<()> {
    check_distances(op, "first", c1)?;
    check_distances(op, "second", c2)?;
    if c1.dim() == c2.dim() {
        return Ok(());
    }
    let (expected, got) = (format!("{:?}, as the first", c1.shape()), format!("{:?}", c2.shape()));
    Err(Error::Shape { op, what: "second".into(), expected, got })
}
