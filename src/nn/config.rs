//! Model files (`models/*.toml`): an architecture, and the recipe it is trained with unless options say otherwise.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::model::Model;
use super::{resnet, vit};
use crate::device::Precision;
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
    ("vit", include_str!("../../models/vit.toml")),
    ("vit_tiny_patch16_224", include_str!("../../models/vit_tiny_patch16_224.toml")),
    ("vit_small_patch16_224", include_str!("../../models/vit_small_patch16_224.toml")),
    ("vit_base_patch16_224", include_str!("../../models/vit_base_patch16_224.toml")),
    ("deit_tiny_patch16_224", include_str!("../../models/deit_tiny_patch16_224.toml")),
    ("deit_small_patch16_224", include_str!("../../models/deit_small_patch16_224.toml")),
    ("vit_tiny_cifar", include_str!("../../models/vit_tiny_cifar.toml")),
    ("vit_small_cifar", include_str!("../../models/vit_small_cifar.toml")),
    ("vit_digits", include_str!("../../models/vit_digits.toml")),
];

/// Largest channels, height, width and classes: products of three fit 64 bits.
const MOST_OF_A_SIZE: usize = 1 << 16;
/// Most blocks of a stage.
const MOST_BLOCKS: usize = 1 << 10;
/// Most features of an attention head.
const MOST_HEAD_FEATURES: usize = 128;
/// Kernels count the weights of a network in 32 bits.
const MOST_PARAMETERS: usize = 1 << 31;

/// A model file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelConfig {
    /// Name of the model.
    pub name: String,
    /// Channels, height and width of an input image.
    pub image: [usize; 3],
    /// Outputs of the classifier.
    pub classes: usize,
    /// What lies between the two: the file's other fields.
    #[serde(flatten)]
    pub architecture: Architecture,
    /// What activations are stored as; no field of the file.
    #[serde(skip_serializing_if = "Precision::is_f32")]
    pub precision: Precision,
    /// How it is trained unless options say otherwise: the fields of `train::Recipe`.
    pub train: Table,
    /// What was set of the file's fields, `train` apart: with its name, what the network is.
    #[serde(skip)]
    pub set: Vec<String>,
}

/// The networks that model files describe, by their field `family`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Architecture {
    /// `cifar`, `torchvision`.
    Residual(ResNetConfig),
    /// `vit`.
    Transformer(VitConfig),
}

/// A residual network (He et al. 2016, arXiv 1512.03385).
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ResNetConfig {
    /// Whose parameter names and shortcuts it has.
    pub family: Family,
    /// The residual block.
    pub block: Block,
    /// Blocks of each stage.
    pub stages: Vec<usize>,
    /// Channels of each stage; a bottleneck block has four times as many outputs.
    pub widths: Vec<usize>,
    /// The first layers.
    pub stem: Stem,
}

/// A vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) with the defaults and the names of timm's
/// `VisionTransformer`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VitConfig {
    /// Height and width of a patch.
    pub patch: usize,
    /// Features of a token.
    pub dim: usize,
    /// Blocks.
    pub depth: usize,
    /// Attention heads, each with `dim / heads` features.
    pub heads: usize,
    /// Hidden features of a block's perceptron, as a multiple of `dim`.
    #[serde(default = "defaults::mlp")]
    pub mlp: f64,
    /// Whether a learned token stands before those of the patches.
    #[serde(default = "defaults::yes")]
    pub class_token: bool,
    /// What the classifier reads; the class token if there is one, else the mean, unless given.
    #[serde(default)]
    pub pool: Option<Pool>,
    /// Whether the last norm follows the pooling (`fc_norm`) instead of standing before it (`norm`); so where the mean is
    /// pooled, unless given.
    #[serde(default)]
    pub fc_norm: Option<bool>,
    /// Whether a norm stands before the first block; patches then have no bias.
    #[serde(default)]
    pub pre_norm: bool,
    /// Initial scale of each branch (LayerScale, arXiv 2103.17239), or none.
    #[serde(default)]
    pub layer_scale: Option<f64>,
    /// Whether queries, keys and values have a bias.
    #[serde(default = "defaults::yes")]
    pub qkv_bias: bool,
    /// Added to a variance before its root is taken.
    #[serde(default = "defaults::norm_eps")]
    pub norm_eps: f32,
    /// Share of features dropped in training, after the positions and after each linear layer but the first of attention.
    #[serde(default)]
    pub dropout: f32,
    /// Share of samples for which the last branch is left out in training (stochastic depth, arXiv 1603.09382); it
    /// grows linearly from 0 at the first.
    #[serde(default)]
    pub stochastic_depth: f32,
}

/// timm's.
mod defaults {
    pub fn mlp() -> f64 {
        4.0
    }
    pub fn yes() -> bool {
        true
    }
    pub fn norm_eps() -> f32 {
        1e-6
    }
}

/// What the classifier of a vision transformer reads.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pool {
    /// The class token.
    Token,
    /// The mean of the patches' tokens.
    Mean,
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
        let mut config = Self::from_table(table).map_err(|problem| wrong(&problem))?;
        config.check().map_err(|problem| wrong(&problem))?;
        let of_training = |assignment: &&String| field(assignment).split('.').next() == Some("train");
        config.set = set.iter().filter(|assignment| !of_training(assignment)).cloned().collect();
        Ok(config)
    }

    /// Writes into the metadata of a file of its weights which model they are of.
    pub fn record(&self, metadata: &mut BTreeMap<String, String>) {
        metadata.insert("model".into(), self.name.clone());
        match self.set.is_empty() {
            true => metadata.remove("set"),
            false => metadata.insert("set".into(), serde_json::json!(self.set).to_string()),
        };
    }

    /// What is set of the model's fields: by the metadata of a file of its weights, and by `set`, which takes the place of what
    /// the file has of the same fields.
    ///
    /// # Errors
    /// [`Error::Usage`] if the file's is not a list of texts.
    pub fn set_by(metadata: &BTreeMap<String, String>, set: &[String]) -> Result<Vec<String>> {
        let wrong = |error| Error::Usage(format!("the weights' metadata: set: expected a list of texts: {error}"));
        let recorded = metadata.get("set").map(|text| serde_json::from_str::<Vec<String>>(text).map_err(wrong));
        let mut all = recorded.transpose()?.unwrap_or_default();
        all.retain(|recorded| set.iter().all(|own| field(own) != field(recorded)));
        all.extend_from_slice(set);
        Ok(all)
    }

    /// The fields that all model files have, and those of its family.
    fn from_table(mut table: Table) -> std::result::Result<Self, String> {
        #[derive(Deserialize)]
        struct Common {
            name: String,
            image: Image,
            classes: usize,
            family: String,
            #[serde(default)]
            train: Table,
        }
        let message = |error: toml::de::Error| error.message().to_owned();
        let Common { name, image, classes, family, train } = table.clone().try_into().map_err(message)?;
        for key in ["name", "image", "classes", "train"] {
            table.remove(key);
        }
        let architecture = match family.as_str() {
            "vit" => {
                table.remove("family");
                Architecture::Transformer(table.try_into().map_err(message)?)
            }
            "cifar" | "torchvision" => Architecture::Residual(table.try_into().map_err(message)?),
            _ => return Err(format!("family: expected cifar, torchvision or vit, got '{family}'")),
        };
        let image = match image {
            Image::Square(size) => [3, size, size],
            Image::Sizes(image) => image,
        };
        Ok(ModelConfig { name, image, classes, architecture, precision: Precision::F32, train, set: Vec::new() })
    }

    /// Builds the network.
    ///
    /// # Errors
    /// [`Error::Usage`] if the images do not fit the network, or it would have 2^31 parameters or more.
    pub fn build(&self) -> Result<Model> {
        let model = match &self.architecture {
            Architecture::Residual(config) => resnet::build(self, config)?,
            Architecture::Transformer(config) => vit::build(self, config)?,
        };
        let parameters = model.parameter_count();
        if parameters >= MOST_PARAMETERS {
            return Err(Error::Usage(format!(
                "model {}: expected fewer than {MOST_PARAMETERS} parameters, got {parameters}; choose smaller widths \
                 or fewer blocks",
                self.name
            )));
        }
        Ok(model)
    }

    /// The model for images of another height and width.
    ///
    /// # Errors
    /// [`Error::Usage`] if one of them is 0 or too large.
    pub fn with_image_size(mut self, height: usize, width: usize) -> Result<Self> {
        self.image = [self.image[0], height, width];
        self.check().map_err(|problem| Error::Usage(format!("--image-size: {problem}")))?;
        Ok(self)
    }

    /// Whether a model file of this name is part of the program.
    pub fn is_embedded(name: &str) -> bool {
        EMBEDDED.iter().any(|(known, _)| *known == name)
    }

    fn check(&self) -> std::result::Result<(), String> {
        if self.image.contains(&0) || self.classes < 2 {
            return Err("expected an image without sizes of 0, and at least two classes".into());
        }
        let sizes = [self.image[0], self.image[1], self.image[2], self.classes];
        if sizes.iter().any(|&size| size > MOST_OF_A_SIZE) {
            return Err(format!(
                "expected images and classes of at most {MOST_OF_A_SIZE}, got image {:?}, {} classes",
                self.image, self.classes
            ));
        }
        match &self.architecture {
            Architecture::Residual(config) => config.check(),
            Architecture::Transformer(config) => config.check(),
        }
    }
}

/// `[channels, height, width]`, or the size of a square of three channels.
#[derive(Deserialize)]
#[serde(untagged)]
enum Image {
    Square(usize),
    Sizes([usize; 3]),
}

impl ResNetConfig {
    fn check(&self) -> std::result::Result<(), String> {
        let most = |sizes: &[usize]| sizes.iter().copied().max().unwrap_or(0);
        if most(&self.widths) > MOST_OF_A_SIZE || most(&self.stages) > MOST_BLOCKS || self.stages.len() > 16 {
            return Err(format!(
                "expected widths of at most {MOST_OF_A_SIZE}, and at most 16 stages of at most {MOST_BLOCKS} blocks, got \
                 widths {:?}, stages {:?}",
                self.widths, self.stages
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

impl VitConfig {
    /// Hidden features of a block's perceptron.
    pub fn hidden(&self) -> usize {
        (self.dim as f64 * self.mlp) as usize
    }

    /// What the classifier reads.
    pub fn pool(&self) -> Pool {
        self.pool.unwrap_or(if self.class_token { Pool::Token } else { Pool::Mean })
    }

    fn check(&self) -> std::result::Result<(), String> {
        let VitConfig { patch, dim, depth, heads, mlp, .. } = *self;
        if [patch, dim, depth, heads].contains(&0) || !(mlp.is_finite() && self.hidden() > 0) {
            return Err(format!(
                "expected sizes above 0, got patch {patch}, dim {dim}, depth {depth}, heads {heads}, mlp {mlp}"
            ));
        }
        if patch > MOST_OF_A_SIZE || dim > MOST_OF_A_SIZE || depth > MOST_BLOCKS || self.hidden() > MOST_OF_A_SIZE {
            return Err(format!(
                "expected patch, dim and dim * mlp of at most {MOST_OF_A_SIZE}, and a depth of at most {MOST_BLOCKS}, got \
                 patch {patch}, dim {dim}, mlp {mlp}, depth {depth}"
            ));
        }
        if dim % heads != 0 {
            return Err(format!(
                "expected heads that divide dim, got {heads} heads and dim {dim}; choose another --set heads=... or --set dim=..."
            ));
        }
        if dim / heads > MOST_HEAD_FEATURES {
            return Err(format!(
                "expected heads of at most {MOST_HEAD_FEATURES} features, got {} of dim {dim} in {heads} heads; choose \
                 more heads",
                dim / heads
            ));
        }
        if self.pool() == Pool::Token && !self.class_token {
            return Err("pool token: expected class_token = true with it, got false; choose pool mean".into());
        }
        let share = |rate: f32| (0.0..1.0).contains(&rate);
        if !share(self.dropout) || !share(self.stochastic_depth) {
            return Err(format!(
                "expected dropout and stochastic_depth of 0 or more and less than 1, got {} and {}",
                self.dropout, self.stochastic_depth
            ));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps.is_finite()) || self.layer_scale.is_some_and(|s| !s.is_finite()) {
            let got = format!("{} and {:?}", self.norm_eps, self.layer_scale);
            return Err(format!("expected norm_eps above 0 and a finite layer_scale, got {got}"));
        }
        Ok(())
    }
}

/// The field that a `key=value` is of.
fn field(assignment: &str) -> &str {
    assignment.split('=').next().unwrap_or_default()
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
