//! What layers say of the same probe images: of networks, in one pass over the probes, and of files.
//!
//! Of each layer only the `[n, n]` distances are kept; what it says itself is gone when the next layer has been computed,
//! or the next tensor read.

use std::path::Path;

use ndarray::Array2;

use super::distances::{Distances, Metric, Representation, measure};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::nn::model::{Layer, Model, Shape};
use crate::nn::names::glob;
use crate::nn::network::Network;
use crate::nn::tensors::{self, Tensor};
use crate::ops::Columns;
use crate::report::progress::Progress;
use crate::train::{Labelled, observe};

/// A layer with the distances between the probes that it sees.
#[derive(Clone, Debug)]
pub struct MeasuredLayer {
    /// Name, without its network's.
    pub name: String,
    /// By the metric that is asked for.
    pub distances: Distances,
    /// Euclidean ones, where the others are not.
    pub euclidean: Option<Array2<f32>>,
}

impl MeasuredLayer {
    /// Probes.
    pub fn n(&self) -> usize {
        self.distances.matrix.nrows()
    }

    /// Whether all probes look alike to it.
    pub fn is_constant(&self) -> bool {
        self.distances.largest == 0.0
    }

    /// Euclidean distances.
    pub fn euclidean(&self) -> &Array2<f32> {
        self.euclidean.as_ref().unwrap_or(&self.distances.matrix)
    }
}

/// How layers are measured.
#[derive(Clone, Copy, Debug)]
pub struct Measuring {
    /// Which distances.
    pub metric: Metric,
    /// Whether a network's outputs are averaged over pixels or tokens first.
    pub pooled: bool,
}

/// An output of a network that has a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Index of the layer in [`Model::layers`].
    pub layer: usize,
    /// Name: [`output_name`].
    pub name: String,
}

/// The name of what a layer writes: that of the module whose output it is in PyTorch, as far as there is one.
///
/// | name | output |
/// |---|---|
/// | `layer1.0`, `blocks.3` | of a block |
/// | `bn1`, `layer1.0.bn1` | of a norm, after the ReLU that follows it |
/// | `blocks.3.attn.heads` | of the attention heads, before `blocks.3.attn.proj` |
/// | `blocks.3.ls1` | the sum of a block's input and its attention |
/// | `pos_embed` | patches, class token and positions |
/// | `conv1`, `layer1.0.conv2`, `blocks.3.mlp.fc1`, `linear` | of a convolution or linear layer, bias added |
pub fn output_name(model: &Model, layer: &Layer) -> String {
    let name = &model.values[layer.output()].name;
    let block = || name.rsplit_once('.').map_or(name.clone(), |(block, _)| block.to_owned());
    match layer {
        Layer::Norm { residual: Some(_), .. } => block(),
        Layer::Residual { .. } if name.ends_with(".ls2") => block(),
        Layer::Attention { .. } => format!("{name}.heads"),
        _ => name.clone(),
    }
}

/// Whether a layer is one of those that stand for a network: what its first block reads, its blocks, its logits.
fn stands_for_network(model: &Model, layer: &Layer) -> bool {
    let name = &model.values[layer.output()].name;
    match layer {
        Layer::Norm { residual, .. } => residual.is_some() || !name.contains('.'),
        Layer::Residual { .. } => name.ends_with(".ls2"),
        Layer::Embed { .. } => true,
        _ => layer.output() == model.output(),
    }
}

/// The outputs whose names match one of the patterns (`*`, `?`), in the order in which they are computed; without patterns
/// those that stand for the network: what its first block reads, its blocks, its logits.
///
/// # Errors
/// [`Error::Usage`] with all names if none matches.
pub fn outputs(model: &Model, patterns: &[String]) -> Result<Vec<Output>> {
    let named = model.layers.iter().enumerate();
    let all: Vec<Output> = named.map(|(layer, of)| Output { layer, name: output_name(model, of) }).collect();
    let wanted = |output: &&Output| match patterns {
        [] => stands_for_network(model, &model.layers[output.layer]),
        patterns => matches_any(patterns, &output.name),
    };
    let found: Vec<Output> = all.iter().filter(wanted).cloned().collect();
    if found.is_empty() {
        let problem = none_matches(patterns, all.iter().map(|output| output.name.as_str()));
        return Err(Error::Usage(problem));
    }
    Ok(found)
}

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileTensor {
    /// Its name.
    pub name: String,
    /// Probes.
    pub n: usize,
    /// What it says of each.
    pub features: usize,
}

/// The tensors of a file whose names match one of the patterns; all without patterns.
///
/// # Errors
/// [`Error::Usage`] with all names if none matches; [`Error::File`] if the file cannot be read, holds no tensors, or one has no
/// two axes or no elements.
pub fn tensors_of(path: &Path, patterns: &[String]) -> Result<Vec<FileTensor>> {
    let all = tensors::list(path)?;
    if all.is_empty() {
        return Err(Error::file(path, "holds no tensors; expected [probes, features] of each layer"));
    }
    let wanted = all.iter().filter(|(name, _)| patterns.is_empty() || matches_any(patterns, name));
    let checked = wanted.map(|(name, shape)| match shape[..] {
        [n, _, ..] if !shape.contains(&0) => {
            Ok(FileTensor { name: name.clone(), n, features: shape[1..].iter().product() })
        }
        _ => Err(Error::file(
            path,
            format!(
                "tensor {name:?}: expected [probes, features, ...], each at least 1, got {shape:?}; choose others with \
                 --layers, or leave it out"
            ),
        )),
    });
    let found = checked.collect::<Result<Vec<_>>>()?;
    if found.is_empty() {
        let problem = none_matches(patterns, all.iter().map(|(name, _)| name.as_str()));
        return Err(Error::Usage(format!("{}: {problem}", path.display())));
    }
    Ok(found)
}

/// Refuses a pattern that matches none of the layers that were chosen from all networks and files.
///
/// # Errors
/// [`Error::Usage`] names it.
pub fn check_patterns<'a>(patterns: &[String], chosen: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
    match patterns.iter().find(|pattern| !chosen.clone().any(|name| glob(pattern, name))) {
        None => Ok(()),
        Some(pattern) => {
            Err(Error::Usage(format!("--layers '{pattern}': no such layer; '*' takes all that there are")))
        }
    }
}

fn matches_any(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| glob(pattern, name))
}

fn none_matches<'a>(patterns: &[String], names: impl Iterator<Item = &'a str>) -> String {
    let (patterns, names) = (patterns.join("' or '"), names.collect::<Vec<_>>().join(", "));
    format!("--layers '{patterns}': no such layer; expected one of {names}, or a pattern")
}

impl Measuring {
    /// Name of the metric.
    pub fn metric_name(&self) -> &'static str {
        match self.metric {
            Metric::Euclidean => "euclidean",
            Metric::Cosine => "cosine",
        }
    }

    /// Shows a network its probes, all in one batch, and measures the distances of these outputs. The network is a whole
    /// one ([`Network::new`]), so that every feature is there.
    ///
    /// # Errors
    /// [`Error::Usage`] if the probes do not fit the network; [`Error::Run`] with the layer's name if it says something that
    /// is not finite; [`Error::Device`] when memory runs out.
    pub fn network(
        &self,
        network: &mut Network,
        outputs: &[Output],
        probes: &Labelled,
        progress: &Progress,
        title: &str,
    ) -> Result<Vec<MeasuredLayer>> {
        let (device, model, n) = (network.device().clone(), network.model().clone(), probes.len());
        let stage = progress.layers(title, outputs.len());
        let mut measured = Vec::with_capacity(outputs.len());
        observe(network, probes, |index, values| {
            let Some(output) = outputs.iter().find(|output| output.layer == index) else { return Ok(()) };
            let value = &model.values[model.layers[index].output()];
            let positions = match value.shape {
                Shape::Image([_, height, width]) => height * width,
                Shape::Tokens { .. } => 1,
            };
            let columns = value.columns(n)?;
            let x = Representation { values, features: value.features(), positions, columns, n };
            measured.push(self.layer(&device, &x, &output.name, self.pooled)?);
            stage.show_count(measured.len());
            Ok(())
        })?;
        Ok(measured)
    }

    /// Measures the tensors of a file that [`tensors_of`] finds, one after the other: `[n, ...]`, flattened after the first
    /// axis.
    ///
    /// # Errors
    /// [`Error::File`] with the tensor's name if it is of another type than F32, F16, BF16 and F64, or not finite;
    /// [`Error::Device`] when memory runs out.
    pub fn file(
        &self,
        device: &Device,
        path: &Path,
        wanted: &[FileTensor],
        progress: &Progress,
        title: &str,
    ) -> Result<Vec<MeasuredLayer>> {
        let stage = progress.layers(title, wanted.len());
        let mut found = vec![None; wanted.len()];
        let mut done = 0;
        let place = |name: &str| wanted.iter().position(|tensor| tensor.name == name);
        tensors::each(
            path,
            |name| place(name).is_some(),
            |tensor| {
                let place = place(&tensor.name).expect("it is wanted");
                found[place] = Some(self.tensor(device, &tensor)?);
                done += 1;
                stage.show_count(done);
                Ok(())
            },
        )?;
        Ok(found.into_iter().flatten().collect())
    }

    fn tensor(&self, device: &Device, tensor: &Tensor) -> Result<MeasuredLayer> {
        let n = tensor.shape[0];
        let features = tensor.values.len() / n;
        let columns = Columns::samples(n)?;
        let row = columns.len();
        let mut values = vec![0.0f32; features * row];
        for (probe, of_probe) in tensor.values.chunks_exact(features).enumerate() {
            of_probe.iter().enumerate().for_each(|(feature, &value)| values[feature * row + probe] = value);
        }
        let values = device.upload(&values)?;
        let x = Representation { values: values.view().into(), features, positions: 1, columns, n };
        self.layer(device, &x, &tensor.name, false)
    }

    fn layer(&self, device: &Device, x: &Representation, name: &str, pooled: bool) -> Result<MeasuredLayer> {
        let named = |error: Error| match error {
            Error::Run(problem) => Error::Run(format!("layer {name}: {problem}")),
            other => other,
        };
        let distances = measure(device, x, self.metric, pooled).map_err(named)?;
        let euclidean = match self.metric {
            Metric::Euclidean => None,
            Metric::Cosine => Some(measure(device, x, Metric::Euclidean, pooled).map_err(named)?.matrix),
        };
        Ok(MeasuredLayer { name: name.into(), distances, euclidean })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::config::ModelConfig;

    fn names(model: &str, patterns: &[&str]) -> Vec<String> {
        let model = ModelConfig::load(model, &[]).unwrap().build().unwrap();
        let patterns: Vec<String> = patterns.iter().map(|&pattern| pattern.into()).collect();
        outputs(&model, &patterns).unwrap().into_iter().map(|output| output.name).collect()
    }

    #[test]
    fn blocks_have_their_own_names() {
        assert_eq!(names("resnet8", &[]), ["bn1", "layer1.0", "layer2.0", "layer3.0", "linear"]);
        let vit = names("vit_digits", &[]);
        assert_eq!((vit[0].as_str(), vit[1].as_str(), vit.last().unwrap().as_str()), ("pos_embed", "blocks.0", "head"));
        assert_eq!(names("resnet8", &["layer1.0.*", "conv?"])[..3], ["conv1", "layer1.0.conv1", "layer1.0.bn1"]);
        assert_eq!(
            names("vit_digits", &["blocks.0.attn*"]),
            ["blocks.0.attn.qkv", "blocks.0.attn.heads", "blocks.0.attn.proj"]
        );
    }

    #[test]
    fn every_output_has_a_name_of_its_own() {
        for model in ["resnet50", "resnet20", "vit_digits", "deit_tiny_patch16_224"] {
            let all = names(model, &["*"]);
            let unique: std::collections::BTreeSet<_> = all.iter().collect();
            assert_eq!(unique.len(), all.len(), "{model}: {all:?}");
        }
    }

    #[test]
    fn a_pattern_that_matches_nothing_is_told_what_there_is() {
        let model = ModelConfig::load("resnet8", &[]).unwrap().build().unwrap();
        let error = outputs(&model, &["layer9*".into()]).unwrap_err().to_string();
        assert!(error.contains("layer9*") && error.contains("layer3.0.conv2"), "{error}");
    }
}
