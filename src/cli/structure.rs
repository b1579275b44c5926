//! `dilt structure`: a structured ticket from any ticket.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use dilt::mask::set::MaskSet;
use dilt::nn::network::Network;
use dilt::nn::plan::{OptimizerKind, Use};
use dilt::nn::weights::Weights;
use dilt::report::table::table;
use dilt::ticket::structure::{LayerChange, Scores, Structure as Method, Structured, Structuring};
use dilt::train::{Images, Labelled, row_magnitudes};
use serde::Serialize;

use super::{Common, ModelAndData};

/// Move what a ticket keeps into whole rows or dense blocks, so that it runs faster (arXiv 2202.04736).
///
/// Refill keeps as many output channels, hidden features and attention heads as the kept weights of each layer fill, and
/// makes them dense; norms and biases of those that are removed are fixed to zero by masks of their own, so that dilt can
/// leave them out exactly. Regroup makes groups of similar rows dense in the columns that most of them keep, and where few are
/// similar it keeps many more weights than the ticket did: `dilt bench --plan` tells what that gains on a device. Weights of
/// the file stay as they are; only masks change. Train the result with `dilt train --ticket`.
#[derive(Args)]
pub struct Structure {
    /// How.
    #[arg(long, value_enum, help_heading = "Tickets")]
    method: Method,
    /// A ticket, or weights trained under one.
    #[arg(long, value_name = "FILE", alias = "weights", help_heading = "Tickets")]
    ticket: PathBuf,
    /// The ticket to write.
    #[arg(long, value_name = "FILE", help_heading = "Tickets")]
    out: PathBuf,
    #[command(flatten)]
    how: StructureOptions,
    /// Which rows refill keeps.
    #[arg(long, value_enum, default_value = "l1", help_heading = "Tickets")]
    score: RowScore,
    #[command(flatten)]
    target: ModelAndData,
    #[command(flatten)]
    common: Common,
}

/// How a ticket is made structured, of `dilt structure` and of `dilt find --structure`.
#[derive(Args)]
pub struct StructureOptions {
    /// Share of the rows that refill would remove that refill+ keeps.
    #[arg(long, default_value_t = 0.1, allow_negative_numbers = true, help_heading = "Tickets")]
    growth: f64,
    /// Most rows of a group: 64 where DILT_WGMMA=1 multiplies, else 32 or fewer.
    #[arg(long, default_value_t = 32, value_name = "ROWS", help_heading = "Tickets")]
    group: usize,
    /// Under regroup each row keeps more than so many times what it loses.
    #[arg(long, default_value_t = 1.5, allow_negative_numbers = true, help_heading = "Tickets")]
    threshold: f64,
}

impl StructureOptions {
    pub fn settings(&self, method: Method) -> Structuring {
        Structuring { method, growth: self.growth, group: self.group, threshold: self.threshold }
    }
}

/// Which rows are best.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RowScore {
    /// Those that keep most weights.
    Count,
    /// Those with the largest sum of magnitudes of kept weights.
    L1,
    /// Those whose outputs have the largest mean magnitude over the training examples of --data.
    Activation,
}

#[derive(Serialize)]
struct Report {
    method: Method,
    total: usize,
    before: usize,
    after: usize,
    density: f64,
    layers: Vec<LayerChange>,
    out: String,
}

impl Structure {
    pub fn run(&self) -> anyhow::Result<()> {
        let settings = self.how.settings(self.method);
        settings.check()?;
        let weights = Weights::load(&self.ticket)?;
        if weights.masks.is_empty() {
            let problem = "has no masks; expected a ticket, or weights trained under masks";
            return Err(dilt::Error::file(&self.ticket, problem).into());
        }
        let (config, data) = self.target.load(Some(&weights), &self.common)?;
        let model = config.build()?;
        let mut weights = self.target.fitted(&self.ticket, weights, &config, &model)?;
        let magnitudes = match self.score {
            RowScore::Activation => {
                let device = self.common.open()?;
                let batch = data.train.len().clamp(1, 128);
                let mut network = Network::new(&device, &model, batch, Use::Train(OptimizerKind::Sgd))?;
                network.load(&weights)?;
                let images = Images::new(&device, &data, &data.train)?;
                let examples = Labelled::all(&device, &images, &data.train, data.classes)?;
                row_magnitudes(&mut network, &examples, batch)?
            }
            _ => Default::default(),
        };
        let scores = match self.score {
            RowScore::Count => Scores::Count,
            RowScore::L1 => Scores::L1(&weights.tensors),
            RowScore::Activation => Scores::Given(&magnitudes),
        };
        let masks = MaskSet::of_weights(&weights.masks);
        let Structured { masks: structured, fixed, layers } = settings.apply(&model, &masks, &scores)?;
        let parent = weights.identity();
        weights.masks.extend(structured.to_file());
        weights.masks.extend(fixed);
        for (key, value) in [
            ("method", self.method.name().to_owned()),
            ("sparsity", (1.0 - structured.density()).to_string()),
            ("dilt", env!("CARGO_PKG_VERSION").into()),
            ("parent", parent),
        ] {
            weights.metadata.insert(key.into(), value);
        }
        config.record(&mut weights.metadata);
        weights.save(&self.out)?;
        let report = Report {
            method: self.method,
            total: structured.total(),
            before: masks.kept(),
            after: structured.kept(),
            density: structured.density(),
            layers,
            out: self.out.to_string_lossy().into_owned(),
        };
        self.common.print(&report, Report::to_table)
    }
}

impl Report {
    fn to_table(&self) -> String {
        let rows = self.layers.iter().map(|layer| {
            let numbers =
                [layer.total, layer.before, layer.after, layer.added, layer.removed, layer.rows, layer.blocks];
            std::iter::once(layer.name.clone()).chain(numbers.map(|number| number.to_string())).collect()
        });
        let columns = ["weights", "total", "before", "after", "added", "removed", "rows", "blocks"];
        let text = table(&columns, rows);
        let Report { total, before, after, density, out, .. } = self;
        format!("{text}\n\nkept {after} of {total} ({density:.4}), {before} before\n{out}")
    }
}
