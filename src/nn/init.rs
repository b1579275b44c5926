//! Initial weights: Kaiming normal for convolutions (He et al. 2015, arXiv 1502.01852), PyTorch's uniform for the
//! classifier, γ = 1 and β = 0.
//!
//! Each tensor is drawn from a stream of its own, chosen by its name: a network with another head has the same body.

use std::f64::consts::TAU;

use ndarray::ArrayD;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

use super::model::{Model, Parameter, ParameterKind, STATISTICS};
use super::weights::Weights;

/// Draws the weights of a network. Equal seeds give equal weights.
pub fn draw(model: &Model, seed: u64) -> Weights {
    let mut weights = Weights::default();
    for parameter in &model.parameters {
        let values = draw_parameter(model, parameter, seed);
        let array = ArrayD::from_shape_vec(parameter.shape.clone(), values).expect("as many values as the shape has");
        weights.tensors.insert(parameter.name.clone(), array);
    }
    for statistics in &model.statistics {
        for (value, kind) in [0.0, 1.0].into_iter().zip(STATISTICS) {
            let array = ArrayD::from_elem(vec![statistics.features], value);
            weights.tensors.insert(format!("{}.{kind}", statistics.name), array);
        }
    }
    weights
}

fn draw_parameter(model: &Model, parameter: &Parameter, seed: u64) -> Vec<f32> {
    let len = parameter.elements();
    let mut stream = Stream::new(seed, &parameter.name);
    match parameter.kind {
        ParameterKind::Convolution => {
            let fan = if model.fan_out_init { parameter.fan_out() } else { parameter.fan_in() };
            let deviation = (2.0 / fan as f64).sqrt();
            (0..len).map(|_| (stream.normal() * deviation) as f32).collect()
        }
        ParameterKind::Classifier | ParameterKind::Bias => {
            // A bias has no fan-in of its own: it is that of the weights before it.
            let fan_in =
                model.parameters.iter().find(|p| p.kind == ParameterKind::Classifier).map_or(1, Parameter::fan_in);
            let bound = 1.0 / (fan_in as f64).sqrt();
            (0..len).map(|_| ((stream.uniform() * 2.0 - 1.0) * bound) as f32).collect()
        }
        ParameterKind::NormScale => vec![1.0; len],
        ParameterKind::NormShift => vec![0.0; len],
    }
}

/// Random numbers that belong to a seed and a name.
struct Stream(ChaCha8Rng);

impl Stream {
    fn new(seed: u64, name: &str) -> Self {
        let mut hash = Sha256::new();
        hash.update(seed.to_le_bytes());
        hash.update(name);
        Stream(ChaCha8Rng::from_seed(hash.finalize().into()))
    }

    /// In [0, 1), of 53 bits.
    fn uniform(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Box and Muller (1958); the second value of the pair is left out, so that a value depends on its place alone.
    fn normal(&mut self) -> f64 {
        let (radius, angle) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * radius.ln()).sqrt() * (TAU * angle).cos()
    }
}
