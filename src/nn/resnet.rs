//! Residual networks (He et al. 2016): the CIFAR networks with parameter-free shortcuts, and torchvision's.

use super::config::{Block, Family, ModelConfig, ResNetConfig, Stem};
use super::model::{Init, Layer, Model, ParameterKind, Shape, Statistics, ValueId};
use crate::error::{Error, Result};

/// Builds the residual network of a model file.
///
/// # Errors
/// [`Error::Usage`] if the images are too small for the network.
pub(super) fn build(file: &ModelConfig, config: &ResNetConfig) -> Result<Model> {
    let init = if config.family == Family::Torchvision { Init::FanOut } else { Init::FanIn };
    let mut model = Model::new(file, init);
    let mut x = match config.stem {
        Stem::Small => model.conv("conv1", 0, config.widths[0], 3, 1)?,
        Stem::Large => model.conv("conv1", 0, config.widths[0], 7, 2)?,
    };
    x = model.norm("bn1", x, None, true);
    if config.stem == Stem::Large {
        x = model.max_pool("maxpool", x, 3, 2, 1)?;
    }
    for (stage, (&blocks, &width)) in config.stages.iter().zip(&config.widths).enumerate() {
        for block in 0..blocks {
            let name = format!("layer{}.{block}", stage + 1);
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            x = match config.block {
                Block::Basic => basic(&mut model, config.family, &name, x, width, stride)?,
                Block::Bottleneck => bottleneck(&mut model, config.family, &name, x, width, stride)?,
            };
        }
    }
    x = model.mean_pool("avgpool", x);
    model.classifier(if config.family == Family::Cifar { "linear" } else { "fc" }, x);
    Ok(model)
}

fn basic(model: &mut Model, family: Family, name: &str, x: ValueId, width: usize, stride: usize) -> Result<ValueId> {
    let y = model.conv(&format!("{name}.conv1"), x, width, 3, stride)?;
    let y = model.norm(&format!("{name}.bn1"), y, None, true);
    let y = model.conv(&format!("{name}.conv2"), y, width, 3, 1)?;
    let scale = model.norm_parameters(&format!("{name}.bn2"), width);
    let shortcut = shortcut(model, family, name, x, width, stride)?;
    Ok(model.norm_with(&format!("{name}.bn2"), scale, y, Some(shortcut), true))
}

fn bottleneck(
    model: &mut Model,
    family: Family,
    name: &str,
    x: ValueId,
    width: usize,
    stride: usize,
) -> Result<ValueId> {
    let y = model.conv(&format!("{name}.conv1"), x, width, 1, 1)?;
    let y = model.norm(&format!("{name}.bn1"), y, None, true);
    let y = model.conv(&format!("{name}.conv2"), y, width, 3, stride)?;
    let y = model.norm(&format!("{name}.bn2"), y, None, true);
    let y = model.conv(&format!("{name}.conv3"), y, 4 * width, 1, 1)?;
    let scale = model.norm_parameters(&format!("{name}.bn3"), 4 * width);
    let shortcut = shortcut(model, family, name, x, 4 * width, stride)?;
    Ok(model.norm_with(&format!("{name}.bn3"), scale, y, Some(shortcut), true))
}

/// What a block adds to its result: its input, brought to the result's shape where that differs.
fn shortcut(
    model: &mut Model,
    family: Family,
    name: &str,
    x: ValueId,
    channels: usize,
    stride: usize,
) -> Result<ValueId> {
    if stride == 1 && model.values[x].image()[0] == channels {
        return Ok(x);
    }
    match family {
        Family::Cifar => Ok(model.shortcut(&format!("{name}.shortcut"), x, channels, stride)),
        Family::Torchvision => {
            let y = model.conv(&format!("{name}.downsample.0"), x, channels, 1, stride)?;
            Ok(model.norm(&format!("{name}.downsample.1"), y, None, false))
        }
    }
}

/// A norm's γ, β and statistics.
#[derive(Clone, Copy)]
struct NormParameters {
    scale: usize,
    shift: usize,
    statistics: usize,
}

/// The pieces that the networks above are written in.
impl Model {
    fn conv(&mut self, name: &str, x: ValueId, k: usize, filter: usize, stride: usize) -> Result<ValueId> {
        let [c, height, width] = self.values[x].image();
        let pad = filter / 2;
        if height + 2 * pad < filter || width + 2 * pad < filter {
            let (model, image) = (&self.name, self.image);
            return Err(Error::Usage(format!("model {model}: images {image:?} are too small: {name} has none left")));
        }
        let weight = self.parameter(format!("{name}.weight"), vec![k, c, filter, filter], ParameterKind::Convolution);
        let out = |size: usize| (size + 2 * pad - filter) / stride + 1;
        let output = self.value(name, Shape::Image([k, out(height), out(width)]));
        self.layers.push(Layer::Conv { weight, bias: None, stride, pad, input: x, output });
        Ok(output)
    }

    fn norm(&mut self, name: &str, x: ValueId, residual: Option<ValueId>, relu: bool) -> ValueId {
        let parameters = self.norm_parameters(name, self.values[x].features());
        self.norm_with(name, parameters, x, residual, relu)
    }

    /// Apart from [`Model::norm_with`], since a block's last norm comes before its shortcut in a `state_dict`, but
    /// after it in the computation.
    fn norm_parameters(&mut self, name: &str, features: usize) -> NormParameters {
        let scale = self.parameter(format!("{name}.weight"), vec![features], ParameterKind::NormScale);
        let shift = self.parameter(format!("{name}.bias"), vec![features], ParameterKind::NormShift);
        self.statistics.push(Statistics { name: name.into(), features });
        NormParameters { scale, shift, statistics: self.statistics.len() - 1 }
    }

    fn norm_with(
        &mut self,
        name: &str,
        parameters: NormParameters,
        x: ValueId,
        residual: Option<ValueId>,
        relu: bool,
    ) -> ValueId {
        let NormParameters { scale, shift, statistics } = parameters;
        let output = self.value(name, self.values[x].shape);
        self.layers.push(Layer::Norm { scale, shift, statistics, input: x, residual, relu, output });
        output
    }

    fn shortcut(&mut self, name: &str, x: ValueId, channels: usize, stride: usize) -> ValueId {
        let [_, height, width] = self.values[x].image();
        let output = self.value(name, Shape::Image([channels, height.div_ceil(stride), width.div_ceil(stride)]));
        self.layers.push(Layer::Shortcut { stride, input: x, output });
        output
    }

    fn max_pool(&mut self, name: &str, x: ValueId, kernel: usize, stride: usize, pad: usize) -> Result<ValueId> {
        let [c, height, width] = self.values[x].image();
        let output = self.value(name, Shape::Image([c, 0, 0]));
        let layer = Layer::MaxPool { kernel, stride, pad, input: x, output };
        let [p, q] = self.pool_shape(&layer, 1)?.output_image();
        debug_assert!(p <= height && q <= width);
        self.values[output].shape = Shape::Image([c, p, q]);
        self.layers.push(layer);
        Ok(output)
    }

    fn mean_pool(&mut self, name: &str, x: ValueId) -> ValueId {
        let output = self.value(name, Shape::Image([self.values[x].features(), 1, 1]));
        self.layers.push(Layer::MeanPool { input: x, output });
        output
    }
}
