//! `dilt export`: writes weights or a ticket in another form.

use std::path::PathBuf;

use clap::Args;
use dilt::mask::set::MaskSet;
use dilt::nn::weights::{FloatType, Form, Weights};
use dilt::report::table::table;
use serde::Serialize;

use super::Common;

/// Write weights or a ticket in another form: plain weights, PyTorch's pruning names, or masks of one bit per weight.
///
/// Names and metadata stay as they are. The forms pruning and compact hold the same, also the weights that are pruned;
/// plain holds zeros in their place and no masks. dilt reads all three.
#[derive(Args)]
pub struct Export {
    /// Weights or a ticket.
    #[arg(long, value_name = "FILE", alias = "ticket")]
    weights: PathBuf,
    /// How masks are written.
    #[arg(long, value_enum)]
    form: Form,
    /// Type of the weights in the file; a weight that is too large for it is an error.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: FloatType,
    /// The safetensors file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    common: Common,
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
        if weights.masks.is_empty() && self.form != Form::Plain {
            let problem = "has no masks; expected a ticket, or --form plain";
            return Err(dilt::Error::file(&self.weights, problem).into());
        }
        weights.save_as(&self.out, self.form, self.dtype)?;
        let written = std::fs::metadata(&self.out).map_err(|error| dilt::Error::file(&self.out, error))?;
        let tensors = weights.tensors.len();
        let masks = MaskSet::of_weights(&weights.masks);
        let result = Exported {
            form: self.form,
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
}
