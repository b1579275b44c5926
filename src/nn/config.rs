//! Model files (`models/*.toml`): an architecture, and the recipe it is trained with unless options say otherwise.

use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::error::{Error, Result};

/// The model files that are part of the program.
const EMBEDDED: &[(&str, &str)] = &[
    ("resnet8", include_str!("../../models/resnet8.toml")),
    ("resnet20", include_str!("../../models/resnet20.toml")),
    ("resnet32", include_str!("../../models/resnet32.toml")),
    ("resnet44", include_str!("../../models/resnet44.toml")),
    ("resnet56", include_str!("../../models/resnet56.toml")),
    ("resnet18", include_str!("../../models/resnet18.toml")),
    ("resnet34", include_str!("../../models/resnet34.toml")),
    ("resnet50", include_str!("../../models/resnet50.toml")),
    ("resnet18_cifar", include_str!("../../models/resnet18_cifar.toml")),
    ("resnet34_cifar", include_str!("../../models/resnet34_cifar.toml")),
    ("resnet50_cifar", include_str!("../../models/resnet50_cifar.toml")),
];

/// Largest channels, height, width and classes: products of three fit 64 bits.
const MOST_OF_A_SIZE: usize = 1 << 16;
/// Most blocks of a stage.
const MOST_BLOCKS: usize = 1 << 10;

/// A model file: a residual network (He et al. 2016, arXiv 1512.03385).
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Name of the model.
    pub name: String,
    /// Whose parameter names and shortcuts it has.
    pub family: Family,
    /// Channels, height and width of an input image.
    pub image: [usize; 3],
    /// Outputs of the classifier.
    pub classes: usize,
    /// The residual block.
    pub block: Block,
    /// Blocks of each stage.
    pub stages: Vec<usize>,
    /// Channels of each stage; a bottleneck block has four times as many outputs.
    pub widths: Vec<usize>,
    /// The first layers.
    pub stem: Stem,
    /// How it is trained unless options say otherwise: the fields of `train::Recipe`.
    #[serde(default)]
    pub train: Table,
}

/// Whose parameter names and shortcuts a residual network has.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// The CIFAR networks: `linear` classifies, shortcuts subsample and pad channels with zeros.
    Cifar,
    /// torchvision: `fc` classifies, shortcuts are 1x1 convolutions `downsample.0` with a norm `downsample.1`.
    Torchvision,
}

/// A residual block.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Block {
    /// Two 3x3 convolutions.
    Basic,
    /// 1x1, 3x3, 1x1 convolutions, the last with four times the channels.
    Bottleneck,
}

/// The first layers.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub enum Stem {
    /// A 3x3 convolution.
    #[serde(rename = "3x3")]
    Small,
    /// A 7x7 convolution with stride 2 and a 3x3 max pool with stride 2.
    #[serde(rename = "7x7")]
    Large,
}

impl ModelConfig {
    /// Reads the model file called `name` that is part of the program, or the file at that path, with some fields set
    /// to other values (`key=value`, `train.key=value`).
    ///
    /// # Errors
    /// [`Error::Usage`] for an unknown name, field or value; [`Error::File`] if the file cannot be read.
    pub fn load(name: &str, set: &[String]) -> Result<Self> {
        let embedded = EMBEDDED.iter().find(|(known, _)| *known == name).map(|(_, text)| (*text).to_owned());
        let text = match embedded {
            Some(text) => text,
            None if name.ends_with(".toml") => std::fs::read_to_string(Path::new(name))
                .map_err(|error| Error::file(name, format!("the model file cannot be read: {error}")))?,
            None => {
                let known: Vec<_> = EMBEDDED.iter().map(|(known, _)| *known).collect();
                let known = known.join(", ");
                return Err(Error::Usage(format!(
                    "model '{name}': expected a path to a .toml file, or one of {known}"
                )));
            }
        };
        let wrong = |error: &dyn std::fmt::Display| Error::Usage(format!("model '{name}': {error}"));
        let mut table: Table = text.parse().map_err(|error: toml::de::Error| wrong(&error))?;
        for assignment in set {
            assign(&mut table, assignment)?;
        }
        let config: ModelConfig = table.try_into().map_err(|error: toml::de::Error| wrong(&error.message()))?;
        config.check().map_err(|problem| wrong(&problem))?;
        Ok(config)
    }

    /// Whether a model file of this name is part of the program.
    pub fn is_embedded(name: &str) -> bool {
        EMBEDDED.iter().any(|(known, _)| *known == name)
    }

    fn check(&self) -> std::result::Result<(), String> {
        if self.image.contains(&0) || self.classes < 2 {
            return Err("expected an image without sizes of 0, and at least two classes".into());
        }
        let (blocks, channels) = (self.stages.iter().copied().max(), self.widths.iter().copied().max());
        let largest = [self.image[0], self.image[1], self.image[2], self.classes, channels.unwrap_or(0)];
        if largest.iter().any(|&size| size > MOST_OF_A_SIZE)
            || blocks.unwrap_or(0) > MOST_BLOCKS
            || self.stages.len() > 16
        {
            return Err(format!(
                "expected sizes of images, classes and widths of at most {MOST_OF_A_SIZE}, and at most 16 stages of at \
                 most {MOST_BLOCKS} blocks, got image {:?}, {} classes, widths {:?}, stages {:?}",
                self.image, self.classes, self.widths, self.stages
            ));
        }
        if self.stages.is_empty() || self.stages.len() != self.widths.len() {
            let (stages, widths) = (self.stages.len(), self.widths.len());
            return Err(format!("expected as many widths as stages, got {widths} and {stages}"));
        }
        if self.stages.contains(&0) || self.widths.contains(&0) {
            return Err("expected no stage without blocks or channels".into());
        }
        let padded_shortcuts = self.block == Block::Basic && self.widths.is_sorted();
        if self.family == Family::Cifar && !padded_shortcuts {
            return Err("family cifar: expected basic blocks whose widths never shrink".into());
        }
        Ok(())
    }
}

/// Sets `key=value` or `table.key=value`; the value is TOML, or a bare word.
fn assign(table: &mut Table, assignment: &str) -> Result<()> {
    let Some((key, text)) = assignment.split_once('=') else {
        return Err(Error::Usage(format!("--set '{assignment}': expected key=value")));
    };
    let value = format!("value = {text}").parse::<Table>().ok().and_then(|mut table| table.remove("value"));
    let value = value.unwrap_or_else(|| Value::String(text.to_owned()));
    let (table, key) = match key.split_once('.') {
        Some((name, key)) => match table.entry(name).or_insert_with(|| Value::Table(Table::new())) {
            Value::Table(inner) => (inner, key),
            _ => return Err(Error::Usage(format!("--set '{assignment}': {name} is not a table"))),
        },
        None => (table, key),
    };
    table.insert(key.to_owned(), value);
    Ok(())
}
