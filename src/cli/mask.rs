//! `dilt mask`: set algebra on the masks of ticket files.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use dilt::device::Device;
use dilt::mask::set::MaskSet;
use dilt::nn::weights::Weights;
use dilt::ops::prune::MaskOp;
use dilt::report::table::table;
use serde::Serialize;

use super::Common;

/// Set algebra on the masks of ticket files.
///
/// The result has the first ticket's weights. Every operation prints the counts of each layer and, of two tickets or
/// more, what they have in common beside what chance would give independent masks.
#[derive(Args)]
pub struct Mask {
    #[command(subcommand)]
    operation: Operation,
}

#[derive(Subcommand)]
enum Operation {
    /// Kept by all.
    And(Tickets),
    /// Kept by any.
    Or(Tickets),
    /// Kept by the first and by none of the others.
    Minus(Tickets),
    /// Kept by exactly one of two.
    Xor(Tickets),
    /// Kept by at least K.
    Consensus(Consensus),
    /// Counts and overlap alone; writes nothing.
    Stats(Stats),
}

#[derive(Args)]
struct Tickets {
    /// Ticket files.
    #[arg(required = true, num_args = 2.., value_name = "TICKET")]
    tickets: Vec<PathBuf>,
    /// The ticket to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct Consensus {
    /// How many tickets must keep a weight.
    #[arg(long, value_name = "K")]
    at_least: usize,
    #[command(flatten)]
    tickets: Tickets,
}

#[derive(Args)]
struct Stats {
    /// Ticket files.
    #[arg(required = true, value_name = "TICKET")]
    tickets: Vec<PathBuf>,
    #[command(flatten)]
    common: Common,
}

#[derive(Serialize)]
struct Report {
    density: f64,
    kept: usize,
    total: usize,
    jaccard: f64,
    chance_jaccard: f64,
    layers: Vec<Layer>,
}

#[derive(Serialize)]
struct Layer {
    name: String,
    total: usize,
    kept: usize,
    density: f64,
    jaccard: f64,
    chance_jaccard: f64,
}

impl Mask {
    pub fn run(&self) -> anyhow::Result<()> {
        let (paths, common) = match &self.operation {
            Operation::Stats(stats) => (&stats.tickets, &stats.common),
            Operation::Consensus(consensus) => (&consensus.tickets.tickets, &consensus.tickets.common),
            Operation::And(t) | Operation::Or(t) | Operation::Minus(t) | Operation::Xor(t) => (&t.tickets, &t.common),
        };
        let device = common.open()?;
        let mut files = paths.iter().map(|path| Weights::load(path)).collect::<dilt::Result<Vec<_>>>()?;
        let sets: Vec<MaskSet> = paths
            .iter()
            .zip(&files)
            .map(|(path, file)| match file.masks.is_empty() {
                true => Err(dilt::Error::file(path, "has no masks; expected a ticket, with <param>_mask tensors")),
                false => Ok(MaskSet::new(file.masks.clone().into_iter().collect())),
            })
            .collect::<dilt::Result<_>>()?;
        let result = self.apply(&device, &sets)?;
        let overlap = MaskSet::overlap(&device, &sets.iter().collect::<Vec<_>>())?;
        let out = match &self.operation {
            Operation::Stats(_) => None,
            Operation::Consensus(consensus) => Some(&consensus.tickets.out),
            Operation::And(t) | Operation::Or(t) | Operation::Minus(t) | Operation::Xor(t) => Some(&t.out),
        };
        if let Some(out) = out {
            let mut file = files.swap_remove(0);
            file.masks = result.to_file();
            file.metadata.insert("sparsity".into(), (1.0 - result.density()).to_string());
            file.metadata.insert("method".into(), self.name().into());
            file.save(out)?;
        }
        let layers = result.counts().into_iter().zip(overlap.layers).map(|(count, overlap)| Layer {
            density: count.kept as f64 / count.total.max(1) as f64,
            name: count.name,
            total: count.total,
            kept: count.kept,
            jaccard: overlap.jaccard,
            chance_jaccard: overlap.chance,
        });
        let report = Report {
            density: result.density(),
            kept: result.kept(),
            total: result.total(),
            jaccard: overlap.jaccard,
            chance_jaccard: overlap.chance,
            layers: layers.collect(),
        };
        common.print(&report, |report| {
            let rows = report.layers.iter().map(|layer| {
                let three = |value: f64| format!("{value:.3}");
                vec![
                    layer.name.clone(),
                    layer.total.to_string(),
                    layer.kept.to_string(),
                    format!("{:.4}", layer.density),
                    three(layer.jaccard),
                    three(layer.chance_jaccard),
                ]
            });
            let text = table(&["weights", "total", "kept", "density", "Jaccard", "chance"], rows);
            let Report { density, kept, total, jaccard, chance_jaccard, .. } = report;
            format!(
                "{text}\n\nkept {kept} of {total} ({density:.4}); the tickets share {jaccard:.3} (Jaccard), chance \
                 would give {chance_jaccard:.3}"
            )
        })
    }

    fn apply(&self, device: &Device, sets: &[MaskSet]) -> dilt::Result<MaskSet> {
        let all: Vec<&MaskSet> = sets.iter().collect();
        match &self.operation {
            Operation::And(_) => MaskSet::consensus(device, &all, sets.len()),
            Operation::Or(_) => MaskSet::consensus(device, &all, 1),
            Operation::Minus(_) => {
                let others = MaskSet::consensus(device, &all[1..], 1)?;
                sets[0].combine(device, MaskOp::AndNot, &others)
            }
            Operation::Xor(_) if sets.len() == 2 => sets[0].combine(device, MaskOp::Xor, &sets[1]),
            Operation::Xor(_) => Err(dilt::Error::Usage(format!("mask xor: expected two tickets, got {}", sets.len()))),
            Operation::Consensus(consensus) => MaskSet::consensus(device, &all, consensus.at_least),
            Operation::Stats(_) => Ok(sets[0].clone()),
        }
    }

    fn name(&self) -> &'static str {
        match self.operation {
            Operation::And(_) => "and",
            Operation::Or(_) => "or",
            Operation::Minus(_) => "minus",
            Operation::Xor(_) => "xor",
            Operation::Consensus(_) => "consensus",
            Operation::Stats(_) => "stats",
        }
    }
}
