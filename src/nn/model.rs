//! What a network is made of: values, parameters, and a list of layers that reads some values and writes one.
//!
//! It is a plan of a computation, without memory: [`super::network::Network`] has that. Layers stand in the order of
//! the forward pass; the backward pass goes through them from the end. It is not an autograd framework: there are the
//! layers of residual networks and vision transformers, and each has its forward and backward in `passes/`.

use super::config::ModelConfig;
use crate::device::Precision;
use crate::error::{Error, Result};
use crate::ops::attention::AttentionShape;
use crate::ops::conv::ConvShape;
use crate::ops::dropout::ResidualShape;
use crate::ops::layer_norm::LayerNormShape;
use crate::ops::norm::NormShape;
use crate::ops::pointwise::ShortcutShape;
use crate::ops::pool::{MeanPoolShape, PoolShape};
use crate::ops::tokens::{EmbedShape, PatchShape, TokenPool, TokenPoolShape};
use crate::ops::{Columns, SAMPLE_ALIGNMENT};

/// Index of a value in [`Model::values`].
pub type ValueId = usize;
/// Index of a parameter in [`Model::parameters`].
pub type ParameterId = usize;

/// An activation.
#[derive(Clone, Debug)]
pub struct Value {
    /// Name of the layer that writes it.
    pub name: String,
    /// What it holds of each sample.
    pub shape: Shape,
}

/// What an activation holds of each sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Channels, height, width: in memory `[C, H, W, N]`.
    Image([usize; 3]),
    /// In memory `[features, N, tokens rounded up to a multiple of 8]`.
    Tokens {
        /// Features of a token.
        features: usize,
        /// True tokens.
        tokens: usize,
    },
}

impl Value {
    /// Elements in memory for `n` samples, a multiple of 8; padded tokens included.
    pub fn elements(&self, n: usize) -> usize {
        match self.shape {
            Shape::Image(image) => image.iter().product::<usize>() * n,
            Shape::Tokens { features, tokens } => features * n * tokens.next_multiple_of(SAMPLE_ALIGNMENT),
        }
    }

    /// Rows of the memory whose elements are of different features: channels of an image, features of a token.
    pub fn features(&self) -> usize {
        match self.shape {
            Shape::Image([channels, ..]) => channels,
            Shape::Tokens { features, .. } => features,
        }
    }

    /// Channels, height and width of an image.
    ///
    /// # Panics
    /// For tokens.
    pub fn image(&self) -> [usize; 3] {
        let Shape::Image(image) = self.shape else { panic!("{}: tokens where an image is expected", self.name) };
        image
    }

    /// The columns of a feature row: one a sample, or one a token.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are too many for an index.
    pub fn columns(&self, n: usize) -> Result<Columns> {
        match self.shape {
            Shape::Image(_) => Columns::samples(n),
            Shape::Tokens { tokens, .. } => Columns::tokens(n, tokens),
        }
    }
}

/// What a parameter is, which decides how it is drawn, whether it is pruned and whether it decays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterKind {
    /// Weights of a convolution, `[K, C, R, S]`.
    Convolution,
    /// Weights of a linear layer inside the network, `[outputs, inputs]`.
    Linear,
    /// Weights of the patch embedding, `[dim, C, patch, patch]`.
    PatchEmbedding,
    /// Weights of the classifier, `[classes, features]`.
    Classifier,
    /// Bias of the classifier.
    ClassifierBias,
    /// Bias of a linear layer.
    Bias,
    /// Bias of the patch embedding.
    PatchBias,
    /// Scale γ of a norm.
    NormScale,
    /// Shift β of a norm.
    NormShift,
    /// The class token, `[1, 1, dim]`.
    ClassToken,
    /// Position embeddings, `[1, tokens, dim]`.
    Positions,
    /// Scale of each feature of a branch (LayerScale).
    LayerScale,
}

impl ParameterKind {
    /// Whether it is pruned, and decays in any case: the weights of convolutions, linear layers and the classifier.
    pub fn is_prunable(self) -> bool {
        matches!(self, ParameterKind::Convolution | ParameterKind::Linear | ParameterKind::Classifier)
    }

    /// Whether weight decay may leave it out: vectors, tokens and positions.
    pub fn is_small(self) -> bool {
        !self.is_prunable() && self != ParameterKind::PatchEmbedding
    }
}

/// A trained tensor.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Name in files, as PyTorch's `state_dict` has it.
    pub name: String,
    /// Shape in files.
    pub shape: Vec<usize>,
    /// What it is.
    pub kind: ParameterKind,
}

impl Parameter {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements that feed one output: what Kaiming initialisation calls fan-in.
    pub fn fan_in(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// Outputs times the filter's size: what Kaiming initialisation calls fan-out.
    pub fn fan_out(&self) -> usize {
        self.shape[0] * self.shape.get(2..).map_or(1, |filter| filter.iter().product())
    }
}

/// The running statistics of a batch norm.
#[derive(Clone, Debug)]
pub struct Statistics {
    /// Name of the norm: files have `<name>.running_mean` and `<name>.running_var`.
    pub name: String,
    /// Number of features.
    pub features: usize,
}

/// One layer: what it reads, and the value it writes.
#[derive(Clone, Debug)]
pub enum Layer {
    /// Convolution. With 1x1 filters on a 1x1 image or on tokens it is a linear layer.
    Conv {
        /// Weights.
        weight: ParameterId,
        /// Bias, or none.
        bias: Option<ParameterId>,
        /// Step of the filter.
        stride: usize,
        /// Rows and columns of zeros around the image.
        pad: usize,
        /// What it reads.
        input: ValueId,
        /// What it writes.
        output: ValueId,
    },
    /// Batch norm, then the sum with another value, then ReLU.
    Norm {
        /// γ.
        scale: ParameterId,
        /// β.
        shift: ParameterId,
        /// Index of its running statistics.
        statistics: usize,
        /// What it reads.
        input: ValueId,
        /// What is added after the norm, or none.
        residual: Option<ValueId>,
        /// Whether ReLU follows.
        relu: bool,
        /// What it writes.
        output: ValueId,
    },
    /// Every `stride`-th pixel, with channels of zeros before and after.
    Shortcut {
        /// Step in both directions.
        stride: usize,
        /// What it reads.
        input: ValueId,
        /// What it writes.
        output: ValueId,
    },
    /// Maximum over windows.
    MaxPool {
        /// Size of a window.
        kernel: usize,
        /// Step of the window.
        stride: usize,
        /// Rows and columns around the image that no maximum comes from.
        pad: usize,
        /// What it reads.
        input: ValueId,
        /// What it writes.
        output: ValueId,
    },
    /// Mean over the image.
    MeanPool {
        /// What it reads.
        input: ValueId,
        /// What it writes.
        output: ValueId,
    },
    /// An image as tokens, one a patch, after `prefix` empty ones.
    Patches {
        /// Height and width of a patch.
        patch: usize,
        /// Tokens before those of the patches.
        prefix: usize,
        /// What it reads.
        input: ValueId,
        /// What it writes.
        output: ValueId,
    },
    /// The class token before those of the patches, the patches' bias, and positions added.
    Embed {
        /// The class token, or none.
        token: Option<ParameterId>,
        /// Bias of the patches, or none.
        bias: Option<ParameterId>,
        /// Positions.
        positions: ParameterId,
        /// What it reads.
        input: ValueId,
        /// What it writes.
        output: ValueId,
    },
    /// Norm over the features of each token.
    LayerNorm {
        /// γ.
        scale: ParameterId,
        /// β.
        shift: ParameterId,
        /// Added to a variance before its root is taken.
        epsilon: f32,
        /// What it reads.
        input: ValueId,
        /// What it writes.
        output: ValueId,
    },
    /// Attention, from queries, keys and values to the heads' outputs.
    Attention {
        /// Heads.
        heads: usize,
        /// Weights that write queries, keys and values.
        qkv: ParameterId,
        /// Weights that read the outputs: a head none of whose columns is kept is left out.
        projection: ParameterId,
        /// Queries, keys and values.
        input: ValueId,
        /// What it writes.
        output: ValueId,
    },
    /// GELU, with the exact normal distribution.
    Gelu {
        /// What it reads.
        input: ValueId,
        /// What it writes.
        output: ValueId,
    },
    /// Sum with a branch, whose features may be scaled, and which training may leave out for some samples.
    Residual {
        /// Scale of the branch's features, or none.
        scale: Option<ParameterId>,
        /// Share of samples that go without the branch.
        drop: f32,
        /// What it reads.
        input: ValueId,
        /// What is added.
        branch: ValueId,
        /// What it writes.
        output: ValueId,
    },
    /// Some elements zero in training, the others larger by as much.
    Dropout {
        /// Share of elements.
        rate: f32,
        /// What it reads.
        input: ValueId,
        /// What it writes.
        output: ValueId,
    },
    /// One token, or the mean of those from `prefix` on.
    TokenPool {
        /// Which.
        pool: TokenPool,
        /// Tokens before those of the patches.
        prefix: usize,
        /// What it reads.
        input: ValueId,
        /// What it writes.
        output: ValueId,
    },
}

impl Layer {
    /// The value it writes.
    pub fn output(&self) -> ValueId {
        self.ends().2
    }

    /// The values it reads.
    pub fn inputs(&self) -> impl Iterator<Item = ValueId> {
        let (input, second, _) = self.ends();
        std::iter::once(input).chain(second)
    }

    /// What it reads, what else it reads, what it writes.
    fn ends(&self) -> (ValueId, Option<ValueId>, ValueId) {
        match *self {
            Layer::Norm { input, residual, output, .. } => (input, residual, output),
            Layer::Residual { input, branch, output, .. } => (input, Some(branch), output),
            Layer::Conv { input, output, .. }
            | Layer::Shortcut { input, output, .. }
            | Layer::MaxPool { input, output, .. }
            | Layer::MeanPool { input, output }
            | Layer::Patches { input, output, .. }
            | Layer::Embed { input, output, .. }
            | Layer::LayerNorm { input, output, .. }
            | Layer::Attention { input, output, .. }
            | Layer::Gelu { input, output }
            | Layer::Dropout { input, output, .. }
            | Layer::TokenPool { input, output, .. } => (input, None, output),
        }
    }

    /// Whether the gradient of its branch is that of its output.
    pub(super) fn adds_plainly(&self) -> bool {
        matches!(self, Layer::Residual { scale: None, drop: 0.0, .. })
    }

    fn has_parameters(&self) -> bool {
        matches!(self, Layer::Conv { .. } | Layer::Norm { .. } | Layer::LayerNorm { .. } | Layer::Embed { .. })
    }
}

/// How a network's weights are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Kaiming normal with fan-in: the CIFAR networks.
    FanIn,
    /// Kaiming normal with fan-out: torchvision.
    FanOut,
    /// timm's vision transformers.
    Transformer {
        /// What the scales of branches begin at.
        layer_scale: f32,
    },
}

/// A network without memory. Value 0 is the input; the last value is the logits.
#[derive(Clone, Debug)]
pub struct Model {
    /// Name of the model file.
    pub name: String,
    /// Channels, height and width of an input image.
    pub image: [usize; 3],
    /// Outputs of the classifier.
    pub classes: usize,
    /// In the order of the forward pass.
    pub layers: Vec<Layer>,
    /// Activations.
    pub values: Vec<Value>,
    /// Trained tensors, in the order of PyTorch's `parameters()`.
    pub parameters: Vec<Parameter>,
    /// Batch norms' statistics.
    pub statistics: Vec<Statistics>,
    /// How weights are drawn.
    pub init: Init,
    /// What activations are stored as.
    pub precision: Precision,
}

/// A layer that is a batch norm: the fields of [`Layer::Norm`].
#[derive(Clone, Copy)]
pub(super) struct BatchNorm {
    pub scale: ParameterId,
    pub shift: ParameterId,
    pub statistics: usize,
    pub input: ValueId,
    pub residual: Option<ValueId>,
    pub relu: bool,
    pub output: ValueId,
}

impl Model {
    /// A layer that must be a batch norm.
    pub(super) fn batch_norm(&self, layer: usize) -> BatchNorm {
        match self.layers[layer] {
            Layer::Norm { scale, shift, statistics, input, residual, relu, output } => {
                BatchNorm { scale, shift, statistics, input, residual, relu, output }
            }
            ref other => unreachable!("a batch norm, not {other:?}"),
        }
    }

    /// A model that has its input alone.
    pub(super) fn new(file: &ModelConfig, init: Init) -> Self {
        let values = vec![Value { name: "input".into(), shape: Shape::Image(file.image) }];
        let (layers, parameters, statistics) = Default::default();
        let (name, image, classes, precision) = (file.name.clone(), file.image, file.classes, file.precision);
        Model { name, image, classes, layers, values, parameters, statistics, init, precision }
    }

    pub(super) fn value(&mut self, name: &str, shape: Shape) -> ValueId {
        self.values.push(Value { name: name.into(), shape });
        self.values.len() - 1
    }

    pub(super) fn parameter(&mut self, name: String, shape: Vec<usize>, kind: ParameterKind) -> ParameterId {
        self.parameters.push(Parameter { name, shape, kind });
        self.parameters.len() - 1
    }

    /// The last layer: the logits.
    pub(super) fn classifier(&mut self, name: &str, x: ValueId) {
        let (features, classes) = (self.values[x].features(), self.classes);
        let weight = self.parameter(format!("{name}.weight"), vec![classes, features], ParameterKind::Classifier);
        let bias = Some(self.parameter(format!("{name}.bias"), vec![classes], ParameterKind::ClassifierBias));
        let output = self.value(name, Shape::Image([classes, 1, 1]));
        self.layers.push(Layer::Conv { weight, bias, stride: 1, pad: 0, input: x, output });
    }

    /// Whether each value depends on a parameter, so that it has a gradient.
    pub(super) fn have_gradients(&self) -> Vec<bool> {
        let mut have = vec![false; self.values.len()];
        for layer in &self.layers {
            have[layer.output()] = layer.has_parameters() || layer.inputs().any(|input| have[input]);
        }
        have
    }

    /// The logits.
    pub fn output(&self) -> ValueId {
        self.values.len() - 1
    }

    /// The weights that can be pruned: of convolutions, linear layers and the classifier.
    pub fn prunable(&self) -> impl Iterator<Item = &Parameter> {
        self.parameters.iter().filter(|parameter| parameter.kind.is_prunable())
    }

    /// Whether a tensor of a file belongs to the classifier.
    pub fn is_head(&self, name: &str) -> bool {
        let head = [ParameterKind::Classifier, ParameterKind::ClassifierBias];
        self.parameters.iter().any(|parameter| parameter.name == name && head.contains(&parameter.kind))
    }

    /// Number of trained weights.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(Parameter::elements).sum()
    }

    /// Names and shapes of everything that a weights file of this model holds.
    pub fn file_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let parameters = self.parameters.iter().map(|p| (p.name.clone(), p.shape.clone()));
        let statistics = self
            .statistics
            .iter()
            .flat_map(|s| [STATISTICS[0], STATISTICS[1]].map(|kind| (format!("{}.{kind}", s.name), vec![s.features])));
        parameters.chain(statistics).collect()
    }

    /// The shape of a convolution of `n` samples; of tokens, and of one pixel, it is a linear layer.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if a size does not fit the kernels.
    ///
    /// # Panics
    /// If the layer is no convolution.
    pub fn conv_shape(&self, layer: &Layer, n: usize) -> Result<ConvShape> {
        let Layer::Conv { weight, stride, pad, input, .. } = *layer else { unreachable!("asked of convolutions") };
        let shape = &self.parameters[weight].shape;
        let value = &self.values[input];
        let (image, filter, n) = match value.shape {
            Shape::Image(image) => (image, [shape.get(2).copied().unwrap_or(1), shape.get(3).copied().unwrap_or(1)], n),
            Shape::Tokens { features, .. } => ([features, 1, 1], [1, 1], value.columns(n)?.len()),
        };
        ConvShape::new(image, shape[0], filter, stride, pad, n).map_err(|error| self.name_it(error))
    }

    /// Columns that hold something for each sample of what a convolution reads: 1 of an image, of tokens those that are neither
    /// padding nor the empty ones before patches.
    pub fn true_tokens(&self, value: ValueId) -> usize {
        let Shape::Tokens { tokens, .. } = self.values[value].shape else { return 1 };
        let prefix = |layer: &Layer| match *layer {
            Layer::Patches { prefix, output, .. } if output == value => Some(prefix),
            _ => None,
        };
        tokens - self.layers.iter().find_map(prefix).unwrap_or(0)
    }

    pub(super) fn norm_shape(&self, value: ValueId, n: usize) -> Result<NormShape> {
        let [channels, height, width] = self.values[value].image();
        NormShape::new(channels, height * width, n)
    }

    pub(super) fn pool_shape(&self, layer: &Layer, n: usize) -> Result<PoolShape> {
        let Layer::MaxPool { kernel, stride, pad, input, .. } = *layer else { unreachable!("asked of max pools") };
        let [channels, height, width] = self.values[input].image();
        PoolShape::new(channels, [height, width], kernel, stride, pad, n).map_err(|error| self.name_it(error))
    }

    pub(super) fn mean_pool_shape(&self, value: ValueId, n: usize) -> Result<MeanPoolShape> {
        let [channels, height, width] = self.values[value].image();
        MeanPoolShape::new(channels, height * width, n)
    }

    pub(super) fn shortcut_shape(&self, layer: &Layer, n: usize) -> Result<ShortcutShape> {
        let Layer::Shortcut { stride, input, output } = *layer else { unreachable!("asked of shortcuts") };
        ShortcutShape::mapped(self.values[input].image(), self.values[output].features(), stride, n)
    }

    pub(super) fn patch_shape(&self, layer: &Layer, n: usize) -> Result<PatchShape> {
        let Layer::Patches { patch, prefix, input, .. } = *layer else { unreachable!("asked of patches") };
        PatchShape::new(self.values[input].image(), patch, prefix, n).map_err(|error| self.name_it(error))
    }

    pub(super) fn embed_shape(&self, layer: &Layer, n: usize) -> Result<EmbedShape> {
        let Layer::Embed { token, output, .. } = *layer else { unreachable!("asked of embeddings") };
        let (features, tokens) = self.tokens(output);
        EmbedShape::new(features, tokens, usize::from(token.is_some()), n)
    }

    pub(super) fn layer_norm_shape(&self, value: ValueId, n: usize) -> Result<LayerNormShape> {
        LayerNormShape::new(self.values[value].features(), self.values[value].columns(n)?)
    }

    pub(super) fn attention_shape(&self, layer: &Layer, n: usize) -> Result<AttentionShape> {
        let Layer::Attention { heads, output, .. } = *layer else { unreachable!("asked of attention") };
        let (features, tokens) = self.tokens(output);
        AttentionShape::new(heads, features / heads, tokens, n).map_err(|error| self.name_it(error))
    }

    pub(super) fn residual_shape(&self, value: ValueId, n: usize) -> Result<ResidualShape> {
        ResidualShape::new(self.values[value].features(), self.values[value].columns(n)?)
    }

    pub(super) fn token_pool_shape(&self, layer: &Layer, n: usize) -> Result<TokenPoolShape> {
        let Layer::TokenPool { pool, prefix, input, .. } = *layer else { unreachable!("asked of token pools") };
        let (features, tokens) = self.tokens(input);
        TokenPoolShape::new(features, tokens, prefix, n, pool)
    }

    /// Features and tokens of a value.
    fn tokens(&self, value: ValueId) -> (usize, usize) {
        let value = &self.values[value];
        let Shape::Tokens { features, tokens } = value.shape else {
            panic!("{}: an image where tokens are expected", value.name)
        };
        (features, tokens)
    }

    fn name_it(&self, error: Error) -> Error {
        Error::Usage(format!("model {} with images {:?}: {error}", self.name, self.image))
    }
}

/// Endings of the names of running statistics in files, in the order of the statistics arena.
pub const STATISTICS: [&str; 2] = ["running_mean", "running_var"];
