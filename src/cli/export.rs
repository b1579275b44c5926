//! `dilt export`: writes weights or a ticket in another form.

use std::path::PathBuf;

use clap::Args;
use dilt::mask::set::MaskSet;
use dilt::nn::compact::Compaction;
use dilt::nn::weights::{FloatType, Form, Weights};
use dilt::report::table::table;
use serde::Serialize;

use super::Common;

/// Write weights or a ticket in another form: plain weights, PyTorch's pruning names, or masks of one bit per weight; or
/// as a smaller network.
///
/// Names and metadata stay as they are. The forms pruning and compact hold the same, also the weights that are pruned;
/// plain holds zeros in their place and no masks. dilt reads all three. With --compact, channels, hidden features and heads
/// that are always zero or that nothing kept reads are left out of the tensors, whose shapes then make a dense network of
/// the same outputs, in any framework that builds it; dilt itself reads tickets.
#[derive(Args)]
pub struct Export {
    /// Weights or a ticket.
    #[arg(long, value_name = "FILE", alias = "ticket")]
    weights: PathBuf,
    /// How masks are written.
    #[arg(long, value_enum, required_unless_present = "compact")]
    form: Option<Form>,
    /// Write the small dense network that is left where each layer allows it.
    #[arg(long, conflicts_with = "form")]
    compact: bool,
    /// With --compact, the model: one of models/ by name, or a .toml file; if not given, the one that the weights name.
    #[arg(long, conflicts_with = "form")]
    model: Option<String>,
    /// With --compact, a field of the model file.
    #[arg(long, value_name = "KEY=VALUE", conflicts_with = "form")]
    set: Vec<String>,
    /// Type of the weights in the file; a weight that is too large for it is an error.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: FloatType,
    /// The safetensors file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    common: Common,
}

/// A smaller network.
#[derive(Serialize)]
struct Smaller {
    model: String,
    parameters: usize,
    of: usize,
    /// Layers that have another shape.
    layers: Vec<Reshaped>,
    bytes: u64,
    out: String,
}

#[derive(Serialize)]
struct Reshaped {
    name: String,
    whole: Vec<usize>,
    shape: Vec<usize>,
}

#[derive(Serialize)]
struct Exported {
    form: Form,
    dtype: FloatType,
    tensors: usize,
    kept: usize,
    total: usize,
    density: f64,
    bytes: u64,
    out: String,
}

impl Export {
    pub fn run(&self) -> anyhow::Result<()> {
        let weights = Weights::load(&self.weights)?;
        let Some(form) = self.form else { return self.smaller(weights) };
        if weights.masks.is_empty() && form != Form::Plain {
            let problem = "has no masks; expected a ticket, or --form plain";
            return Err(dilt::Error::file(&self.weights, problem).into());
        }
        weights.save_as(&self.out, form, self.dtype)?;
        let written = std::fs::metadata(&self.out).map_err(|error| dilt::Error::file(&self.out, error))?;
        let tensors = weights.tensors.len();
        let masks = MaskSet::of_weights(&weights.masks);
        let result = Exported {
            form,
            dtype: self.dtype,
            tensors,
            kept: masks.kept(),
            total: masks.total(),
            density: masks.density(),
            bytes: written.len(),
            out: self.out.to_string_lossy().into_owned(),
        };
        self.common.print(&result, |r| {
            let name = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
            let row =
                [name(&r.form), name(&r.dtype)].into_iter().chain([r.tensors, r.kept, r.total].map(|n| n.to_string()));
            let row = row.chain([format!("{:.4}", r.density), r.bytes.to_string()]).collect();
            let columns = ["form", "dtype", "tensors", "kept", "total", "density", "bytes"];
            format!("{}\n\n{}", table(&columns, [row]), r.out)
        })
    }

    /// Writes the network without what does not matter under its masks.
    fn smaller(&self, weights: Weights) -> anyhow::Result<()> {
        let model = super::model_config(self.model.as_deref(), Some(&weights), &self.set)?.build()?;
        let names = model.file_tensors();
        let weights = weights.named_as(names.iter().map(|(name, _)| name.as_str()))?.for_model(&names)?;
        let (left, compaction) = Compaction::plain(&model, &weights.masks);
        if compaction.is_whole() {
            let problem = "every channel, hidden feature and head matters under its masks: there is no smaller network; \
                           `dilt structure` makes tickets that have one, `--form plain` writes zeros";
            return Err(dilt::Error::file(&self.weights, problem).into());
        }
        let small = compaction.weights(&model, &left, &weights)?;
        small.save_as(&self.out, Form::Plain, self.dtype)?;
        let written = std::fs::metadata(&self.out).map_err(|error| dilt::Error::file(&self.out, error))?;
        let both = model.parameters.iter().zip(&left.parameters).filter(|(whole, left)| whole.shape != left.shape);
        let reshaped = both.map(|(whole, left)| Reshaped {
            name: whole.name.clone(),
            whole: whole.shape.clone(),
            shape: left.shape.clone(),
        });
        let result = Smaller {
            layers: reshaped.collect(),
            model: model.name.clone(),
            parameters: left.parameter_count(),
            of: model.parameter_count(),
            bytes: written.len(),
            out: self.out.to_string_lossy().into_owned(),
        };
        self.common.print(&result, |r| {
            let row =
                |layer: &Reshaped| vec![layer.name.clone(), format!("{:?}", layer.whole), format!("{:?}", layer.shape)];
            let layers = table(&["parameter", "whole", "left"], r.layers.iter().map(row));
            format!("{layers}\n\n{}: {} of {} parameters, {} bytes: {}", r.model, r.parameters, r.of, r.bytes, r.out)
        })
    }
}
