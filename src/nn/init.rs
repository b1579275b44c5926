//! Initial weights. Of residual networks: Kaiming normal for convolutions (He et al. 2015, arXiv 1502.01852), PyTorch's
//! uniform for the classifier. Of vision transformers, as timm draws them: normal with a deviation of 0.02 for linear
//! layers and positions, 1e-6 for the class token, PyTorch's uniform for patches. γ = 1 and β = 0.
//!
//! Each tensor is drawn from a stream of its own, chosen by its name: a network with another head has the same body.

use std::f64::consts::TAU;

use ndarray::ArrayD;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

use super::model::{Init, Model, Parameter, ParameterKind, STATISTICS};
use super::weights::Weights;

/// Deviation of a vision transformer's weights; timm cuts the normal distribution off at 2, a hundred times that.
const TRANSFORMER_DEVIATION: f64 = 0.02;
/// Deviation of its class token.
const TOKEN_DEVIATION: f64 = 1e-6;

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
    use ParameterKind::*;
    let len = parameter.elements();
    let mut stream = Stream::new(seed, &parameter.name);
    let mut normal = |deviation: f64| (0..len).map(|_| (stream.normal() * deviation) as f32).collect();
    match (parameter.kind, model.init) {
        (Convolution, Init::FanOut) => normal((2.0 / parameter.fan_out() as f64).sqrt()),
        (Convolution, _) => normal((2.0 / parameter.fan_in() as f64).sqrt()),
        (Linear | Positions, _) | (Classifier, Init::Transformer { .. }) => normal(TRANSFORMER_DEVIATION),
        (ClassToken, _) => normal(TOKEN_DEVIATION),
        (PatchEmbedding | Classifier, _) => uniform(&mut stream, parameter, len),
        // A bias has no fan-in of its own: it is that of the weights before it.
        (PatchBias, _) => uniform(&mut stream, weights_of(model, PatchEmbedding), len),
        (ClassifierBias, Init::FanIn | Init::FanOut) => uniform(&mut stream, weights_of(model, Classifier), len),
        (NormScale, _) => vec![1.0; len],
        (NormShift | Bias | ClassifierBias, _) => vec![0.0; len],
        (LayerScale, Init::Transformer { layer_scale }) => vec![layer_scale; len],
        (LayerScale, _) => vec![1.0; len],
    }
}

/// The first parameter of a kind, of which a model has one.
fn weights_of(model: &Model, kind: ParameterKind) -> &Parameter {
    model.parameters.iter().find(|parameter| parameter.kind == kind).expect("a bias follows its weights")
}

/// PyTorch's default of linear layers and convolutions, bounded by the root of the weights' fan-in.
fn uniform(stream: &mut Stream, weights: &Parameter, len: usize) -> Vec<f32> {
    let bound = 1.0 / (weights.fan_in() as f64).sqrt();
    (0..len).map(|_| ((stream.uniform() * 2.0 - 1.0) * bound) as f32).collect()
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
