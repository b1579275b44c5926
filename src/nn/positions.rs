//! Position embeddings for images of another size, as timm resamples them.
//!
//! The patches' positions are a grid of vectors; it is resized by a bicubic filter that is widened where the grid becomes
//! smaller (PyTorch's `interpolate(mode="bicubic", antialias=True)`). What stands before the patches keeps its positions.

use ndarray::{ArrayD, Axis};

use super::config::{Architecture, ModelConfig};
use super::weights::Weights;
use crate::error::{Error, Result};

/// Name of the position embeddings in files.
const POSITIONS: &str = "pos_embed";

impl Weights {
    /// These weights with position embeddings for the model's images. Others than vision transformers, and weights whose
    /// positions are as many as the model's, stay as they are.
    ///
    /// # Errors
    /// [`Error::Usage`] if the positions are not those of a square image.
    pub fn with_positions_for(mut self, config: &ModelConfig) -> Result<Self> {
        let Architecture::Transformer(vit) = &config.architecture else { return Ok(self) };
        let Some(positions) = self.tensors.get_mut(POSITIONS) else { return Ok(self) };
        let prefix = usize::from(vit.class_token);
        let new = [config.image[1] / vit.patch, config.image[2] / vit.patch];
        let &[1, tokens, _] = positions.shape() else { return Ok(self) };
        if tokens == prefix + new[0] * new[1] {
            return Ok(self);
        }
        let patches = tokens.saturating_sub(prefix);
        let side = patches.isqrt();
        if patches == 0 || side * side != patches {
            return Err(Error::Usage(format!(
                "--image-size: expected '{POSITIONS}' of a square of patches after {prefix} class tokens, got {:?}; is \
                 class_token as in the model that the weights are of?",
                positions.shape()
            )));
        }
        *positions = resample(positions, prefix, [side, side], new);
        Ok(self)
    }
}

/// Positions `[1, prefix + old rows * old columns, features]` for another grid of patches.
///
/// # Panics
/// If the positions are not of the old grid.
pub fn resample(positions: &ArrayD<f32>, prefix: usize, old: [usize; 2], new: [usize; 2]) -> ArrayD<f32> {
    let features = positions.shape()[2];
    let (before, grid) = positions.view().split_at(Axis(1), prefix);
    let grid = grid.to_shape((old[0], old[1], features)).expect("positions of the old grid").mapv(f64::from);
    let mut resized = ndarray::Array3::<f64>::zeros((new[0], new[1], features));
    let (rows, columns) = (taps(old[0], new[0]), taps(old[1], new[1]));
    for (row, down) in rows.iter().enumerate() {
        for (column, across) in columns.iter().enumerate() {
            let mut sum = resized.slice_mut(ndarray::s![row, column, ..]);
            for &(r, a) in down {
                across.iter().for_each(|&(c, b)| sum.scaled_add(a * b, &grid.slice(ndarray::s![r, c, ..])));
            }
        }
    }
    let resized = resized.mapv(|value| value as f32).into_shape_with_order((1, new[0] * new[1], features));
    let resized = resized.expect("as many patches as the new grid has").into_dyn();
    ndarray::concatenate(Axis(1), &[before, resized.view()]).expect("vectors of the same features")
}

/// For each place of the new line, what it reads of the old one: places and weights, which sum to 1.
fn taps(old: usize, new: usize) -> Vec<Vec<(usize, f64)>> {
    let scale = old as f64 / new as f64;
    let stretch = scale.max(1.0);
    let reach = 2.0 * stretch;
    let taps_of = |place: usize| {
        let center = scale * (place as f64 + 0.5);
        let first = (center - reach + 0.5).max(0.0) as usize;
        let end = ((center + reach + 0.5) as usize).min(old);
        let weight = |at: usize| cubic((at as f64 - center + 0.5) / stretch);
        let total: f64 = (first..end).map(weight).sum();
        (first..end).map(|at| (at, weight(at) / total)).collect()
    };
    (0..new).map(taps_of).collect()
}

/// Keys' cubic filter (1981) with a = -0.5, PyTorch's choice where it is widened.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A
    } else {
        0.0
    }
}
