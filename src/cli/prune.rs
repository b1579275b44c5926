//! `dilt prune`: one-shot magnitude pruning of a weights file.

use std::path::PathBuf;

use clap::Args;
use dilt::device::Device;
use dilt::mask::Mask;
use dilt::mask::set::{LayerCount, MaskSet};
use dilt::nn::names::glob;
use dilt::nn::names::is_embedding;
use dilt::nn::weights::Weights;
use dilt::report::table::table;
use dilt::ticket::select::{Amount, Scope, remove_smallest};
use serde::Serialize;

use super::Common;

/// Prune a weights file by magnitude, in one shot: exactly the asked share, ties by lowest index.
///
/// Weights with two or more dimensions are pruned, in the order of their names, but a vision transformer's patch embedding,
/// class token and positions; of a ticket, the share is of what is left. The result has PyTorch's pruning names: <param>_orig and <param>_mask.
#[derive(Args)]
pub struct Prune {
    /// Weights or a ticket.
    #[arg(long, value_name = "FILE", visible_alias = "ticket")]
    weights: PathBuf,
    /// Share of the weights that is removed.
    #[arg(long, allow_negative_numbers = true)]
    sparsity: f64,
    /// Where magnitudes are compared.
    #[arg(long, value_enum, default_value = "global")]
    scope: Scope,
    /// Leave out weights whose names match (* and ?); may be given several times.
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Prune a vision transformer's patch embedding, class token or positions too, where their names match.
    #[arg(long, value_name = "PATTERN")]
    include: Vec<String>,
    /// The ticket to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    common: Common,
}

#[derive(Serialize)]
struct Pruned {
    total: usize,
    kept: usize,
    density: f64,
    threshold: Option<f32>,
    layers: Vec<LayerCount>,
    out: String,
}

impl Prune {
    pub fn run(&self) -> anyhow::Result<()> {
        let device = self.common.open()?;
        let pruned = self.prune(&device)?;
        self.common.print(&pruned, |pruned| {
            let rows = pruned.layers.iter().map(|layer| {
                let density = layer.kept as f64 / layer.total.max(1) as f64;
                vec![layer.name.clone(), layer.total.to_string(), layer.kept.to_string(), format!("{density:.4}")]
            });
            let text = table(&["weights", "total", "kept", "density"], rows);
            let threshold = pruned.threshold.map_or("none".into(), |threshold| format!("{threshold:e}"));
            let (kept, total, density) = (pruned.kept, pruned.total, pruned.density);
            format!(
                "{text}\n\nkept {kept} of {total} ({density:.4}); largest removed magnitude {threshold}\n{}",
                pruned.out
            )
        })
    }

    fn prune(&self, device: &Device) -> dilt::Result<Pruned> {
        let mut weights = Weights::load(&self.weights)?;
        for (option, patterns) in [("--exclude", &self.exclude), ("--include", &self.include)] {
            if let Some(stray) = patterns.iter().find(|p| !weights.tensors.keys().any(|name| glob(p, name))) {
                let known: Vec<_> = weights.tensors.keys().map(String::as_str).collect();
                let known = known.join(", ");
                return Err(dilt::Error::Usage(format!("{option} '{stray}': no such weights; the file has {known}")));
            }
        }
        let any = |patterns: &[String], name: &str| patterns.iter().any(|pattern| glob(pattern, name));
        let candidates: Vec<(String, Mask)> = weights
            .tensors
            .iter()
            .filter(|(name, tensor)| tensor.ndim() >= 2 && !any(&self.exclude, name))
            .filter(|(name, _)| !is_embedding(name) || any(&self.include, name))
            .map(|(name, tensor)| {
                let mask = weights.masks.get(name).cloned().unwrap_or_else(|| Mask::ones(tensor.shape()));
                (name.clone(), mask)
            })
            .collect();
        if candidates.is_empty() {
            return Err(dilt::Error::Usage("no weights with two or more dimensions are left to prune".into()));
        }
        let candidates = MaskSet::new(candidates);
        let amount = Amount::Fraction(self.sparsity);
        let selected = remove_smallest(device, &weights.tensors, &candidates, self.scope, amount)?;
        weights.masks.extend(selected.masks.to_file());
        weights.metadata.insert("method".into(), "magnitude".into());
        weights.metadata.insert("sparsity".into(), (1.0 - selected.masks.density()).to_string());
        weights.metadata.insert("dilt".into(), env!("CARGO_PKG_VERSION").into());
        weights.save(&self.out)?;
        self.common.warn_of_empty_layers(&weights);
        Ok(Pruned {
            total: selected.masks.total(),
            kept: selected.masks.kept(),
            density: selected.masks.density(),
            threshold: selected.threshold,
            layers: selected.masks.counts(),
            out: self.out.to_string_lossy().into_owned(),
        })
    }
}
