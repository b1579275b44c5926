//! What a network is made of: values, parameters, and a list of layers that reads some values and writes one.
//!
//! It is a plan of a computation, without memory: [`super::network::Network`] has that. Layers stand in the order of
//! the forward pass; the backward pass goes through them from the end. It is not an autograd framework: there are the
//! layers of residual networks, and each has its forward and backward in `network.rs`.

use crate::error::{Error, Result};
use crate::ops::conv::ConvShape;
use crate::ops::norm::NormShape;
use crate::ops::pointwise::ShortcutShape;
use crate::ops::pool::{MeanPoolShape, PoolShape};

/// Index of a value in [`Model::values`].
pub type ValueId = usize;
/// Index of a parameter in [`Model::parameters`].
pub type ParameterId = usize;

/// An activation: `[channels, height, width]` of each sample.
#[derive(Clone, Debug)]
pub struct Value {
    /// Name of the layer that writes it.
    pub name: String,
    /// Channels, height, width.
    pub shape: [usize; 3],
}

impl Value {
    /// Elements of a sample.
    pub fn features(&self) -> usize {
        self.shape.iter().product()
    }
}

/// What a parameter is, which decides how it is drawn, whether it is pruned and whether it decays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterKind {
    /// Weights of a convolution, `[K, C, R, S]`.
    Convolution,
    /// Weights of the classifier, `[classes, features]`.
    Classifier,
    /// Bias of the classifier.
    Bias,
    /// Scale γ of a batch norm.
    NormScale,
    /// Shift β of a batch norm.
    NormShift,
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
    /// Convolution, or (1x1 on a 1x1 image, with a bias) the classifier.
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
}

impl Layer {
    /// The value it writes.
    pub fn output(&self) -> ValueId {
        match *self {
            Layer::Conv { output, .. }
            | Layer::Norm { output, .. }
            | Layer::Shortcut { output, .. }
            | Layer::MaxPool { output, .. }
            | Layer::MeanPool { output, .. } => output,
        }
    }

    /// The values it reads.
    pub fn inputs(&self) -> impl Iterator<Item = ValueId> {
        let (input, residual) = match *self {
            Layer::Norm { input, residual, .. } => (input, residual),
            Layer::Conv { input, .. }
            | Layer::Shortcut { input, .. }
            | Layer::MaxPool { input, .. }
            | Layer::MeanPool { input, .. } => (input, None),
        };
        std::iter::once(input).chain(residual)
    }
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
    /// How weights are drawn: with fan-in (the CIFAR networks) or fan-out (torchvision).
    pub fan_out_init: bool,
}

impl Model {
    /// A model that has its input alone.
    pub(super) fn new(name: &str, image: [usize; 3], classes: usize, fan_out_init: bool) -> Self {
        let values = vec![Value { name: "input".into(), shape: image }];
        let (layers, parameters, statistics) = Default::default();
        Model { name: name.into(), image, classes, layers, values, parameters, statistics, fan_out_init }
    }

    pub(super) fn value(&mut self, name: &str, shape: [usize; 3]) -> ValueId {
        self.values.push(Value { name: name.into(), shape });
        self.values.len() - 1
    }

    pub(super) fn parameter(&mut self, name: String, shape: Vec<usize>, kind: ParameterKind) -> ParameterId {
        self.parameters.push(Parameter { name, shape, kind });
        self.parameters.len() - 1
    }

    /// The logits.
    pub fn output(&self) -> ValueId {
        self.values.len() - 1
    }

    /// The weights that can be pruned: convolutions and the classifier.
    pub fn prunable(&self) -> impl Iterator<Item = &Parameter> {
        let kinds = [ParameterKind::Convolution, ParameterKind::Classifier];
        self.parameters.iter().filter(move |parameter| kinds.contains(&parameter.kind))
    }

    /// Whether a tensor of a file belongs to the classifier.
    pub fn is_head(&self, name: &str) -> bool {
        let head = [ParameterKind::Classifier, ParameterKind::Bias];
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

    /// The shape of a convolution of `n` samples.
    pub(super) fn conv_shape(&self, layer: &Layer, n: usize) -> Result<ConvShape> {
        let Layer::Conv { weight, stride, pad, input, .. } = *layer else { unreachable!("asked of convolutions") };
        let shape = &self.parameters[weight].shape;
        let filter = [shape.get(2).copied().unwrap_or(1), shape.get(3).copied().unwrap_or(1)];
        ConvShape::new(self.values[input].shape, shape[0], filter, stride, pad, n).map_err(|error| self.name_it(error))
    }

    pub(super) fn norm_shape(&self, value: ValueId, n: usize) -> Result<NormShape> {
        let [channels, height, width] = self.values[value].shape;
        NormShape::new(channels, height * width, n)
    }

    pub(super) fn pool_shape(&self, layer: &Layer, n: usize) -> Result<PoolShape> {
        let Layer::MaxPool { kernel, stride, pad, input, .. } = *layer else { unreachable!("asked of max pools") };
        let [channels, height, width] = self.values[input].shape;
        PoolShape::new(channels, [height, width], kernel, stride, pad, n).map_err(|error| self.name_it(error))
    }

    pub(super) fn mean_pool_shape(&self, value: ValueId, n: usize) -> Result<MeanPoolShape> {
        let [channels, height, width] = self.values[value].shape;
        MeanPoolShape::new(channels, height * width, n)
    }

    pub(super) fn shortcut_shape(&self, layer: &Layer, n: usize) -> Result<ShortcutShape> {
        let Layer::Shortcut { stride, input, output } = *layer else { unreachable!("asked of shortcuts") };
        ShortcutShape::new(self.values[input].shape, self.values[output].shape[0], stride, n)
    }

    fn name_it(&self, error: Error) -> Error {
        Error::Usage(format!("model {} with images {:?}: {error}", self.name, self.image))
    }
}

/// Endings of the names of running statistics in files, in the order of the statistics arena.
pub const STATISTICS: [&str; 2] = ["running_mean", "running_var"];
