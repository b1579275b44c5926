//! Distances between probe images, as a layer sees them.

use ndarray::Array2;

pub use crate::ops::distances::Metric;

use crate::device::{Device, Reals};
use crate::error::{Error, Result};
use crate::ops::distances::{DistanceShape, RepresentationShape, distance_matrix, pitch, representation};
use crate::ops::{Columns, SAMPLE_ALIGNMENT};

/// What a layer says of `n` probes, where it lies in a device's memory: `[features, positions, columns]` for images, whose
/// positions are pixels and whose columns are samples; `[features, columns]` for tokens, where positions is 1.
#[derive(Clone, Copy)]
pub struct Representation<'a> {
    /// The tensor.
    pub values: Reals<'a>,
    /// Channels, or features of a token.
    pub features: usize,
    /// Pixels of an image; 1 for tokens.
    pub positions: usize,
    /// What a row is made of.
    pub columns: Columns,
    /// Probes, which come before the padding.
    pub n: usize,
}

/// The distances between `n` probes, divided by the largest.
#[derive(Clone, Debug)]
pub struct Distances {
    /// `[n, n]`, symmetric, zeros on the diagonal, 1 the largest; all zeros if all probes look alike.
    pub matrix: Array2<f32>,
    /// The largest distance before the division; 0 if all probes look alike.
    pub largest: f32,
}

/// Bytes that [`measure`] takes beside a representation of so many features, and its copy where it is pooled or of tokens.
pub fn measuring_bytes(features: usize, n: usize) -> usize {
    let shape = DistanceShape { features, columns: n.next_multiple_of(SAMPLE_ALIGNMENT), n };
    size_of::<f32>() * (shape.scratch_len() + n * pitch(n) + n + 1)
}

/// Measures distances: of all values of a probe one after the other, or (`pooled`) of their means over positions, tokens
/// included.
///
/// # Errors
/// [`Error::Run`] if a value is NaN or infinite, or too large to be squared; [`Error::Device`] when memory runs out.
pub fn measure(device: &Device, x: &Representation, metric: Metric, pooled: bool) -> Result<Distances> {
    let &Representation { values, features, positions, columns, n } = x;
    let shape = RepresentationShape { features, positions, columns, n, pooled };
    let samples = shape.samples();
    let mut gathered = device.alloc(if shape.is_plain() { 0 } else { shape.rows() * samples })?;
    if !shape.is_plain() {
        representation(device, &shape, values, gathered.view_mut())?;
    }
    let values = if shape.is_plain() { values } else { gathered.view().into() };
    let shape = DistanceShape { features: shape.rows(), columns: samples, n };
    let mut scratch = device.alloc(shape.scratch_len())?;
    let (mut matrix, mut largest) = (device.alloc(n * pitch(n))?, device.alloc(n + 1)?);
    distance_matrix(device, &shape, metric, values, scratch.view_mut(), matrix.view_mut(), largest.view_mut())?;
    let (padded, largest) = (device.read(matrix.view())?, device.read(largest.slice(n..n + 1))?[0]);
    if !largest.is_finite() {
        return Err(Error::Run(format!(
            "distances: expected finite values of {n} probes, got some that are not, or whose squares are not; use \
             weights from before the training diverged"
        )));
    }
    let rows: Vec<f32> = padded.chunks(pitch(n)).flat_map(|row| &row[..n]).copied().collect();
    Ok(Distances { matrix: Array2::from_shape_vec((n, n), rows).expect("n rows of n"), largest })
}
