//! How similar layers are, by the distances between their activations on the same probe images.
//!
//! A layer has a distance matrix `C` `[n, n]` of n probes ([`distances`]): symmetric, zero diagonal, divided by its largest
//! element, since Gromov-Wasserstein is not free of scale; [`representations`] brings layers of networks and files there.
//! Two layers are compared by [`gw`], the Gromov-Wasserstein value, which takes many pairs at a time and has [`exact`]
//! improve what it finds, and beside it by [`cka`], linear CKA and the value of the coupling that leaves each probe where it
//! is. [`modules`] divides layers into groups by such values. [`compare`] does all of that, [`store`] keeps pairs that are
//! finished, [`show`] and [`output`] say what came out.

pub mod assignment;
pub mod cka;
pub mod compare;
pub mod distances;
pub mod exact;
pub mod gw;
pub mod linear;
pub mod modules;
pub mod output;
pub mod plans;
pub mod representations;
pub mod show;
pub mod store;
pub mod transport;

use ndarray::ArrayView2;

use crate::error::{Error, Result};

/// Above this, products of distances could overflow.
const LARGEST: f64 = 1e100;

/// Refuses what is not a square matrix, or has an element that is no distance.
fn check_distances(op: &'static str, name: &str, c: ArrayView2<f64>) -> Result<()> {
    if !c.is_square() || c.is_empty() {
        let (expected, got) = ("a square matrix".into(), format!("{:?}", c.shape()));
        return Err(Error::Shape { op, what: name.into(), expected, got });
    }
    match c.indexed_iter().find(|(_, d)| !(0.0..=LARGEST).contains(*d)) {
        None => Ok(()),
        Some(((i, j), d)) => {
            Err(Error::Run(format!("{op}: {name}[{i}, {j}]: expected a number from 0 to {LARGEST:e}, got {d}")))
        }
    }
}
