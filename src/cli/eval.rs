//! `dilt eval`: evaluates weights or a ticket.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use dilt::data::{DataSet, Examples};
use dilt::device::Precision;
use dilt::mask::set::MaskSet;
use dilt::nn::network::Network;
use dilt::nn::plan::Use;
use dilt::nn::weights::{Weights, save_logits};
use dilt::ticket::heads::{HeadDensities, head_densities};
use dilt::train::{Images, Labelled, MOST_BATCH, evaluate};
use serde::Serialize;

use super::{Common, ModelAndData};

/// Evaluate weights or a ticket: loss and accuracy with running statistics.
#[derive(Args)]
pub struct Eval {
    /// Weights or a ticket; its masks are applied.
    #[arg(long, value_name = "FILE", visible_alias = "ticket")]
    weights: PathBuf,
    /// Which examples.
    #[arg(long, value_enum, default_value = "test")]
    split: Split,
    /// Samples that are computed together.
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Write logits [examples, classes] and labels to this safetensors file.
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,
    #[command(flatten)]
    target: ModelAndData,
    #[command(flatten)]
    common: Common,
}

/// A split of a data set.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Split {
    Train,
    /// What --val-split held out of the training examples, or the folder's own.
    Val,
    Test,
}

impl Split {
    pub fn of(self, data: &DataSet) -> &Examples {
        match self {
            Split::Train => &data.train,
            Split::Val => &data.val,
            Split::Test => &data.test,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Val => "val",
            Split::Test => "test",
        }
    }
}

#[derive(Serialize)]
struct Evaluated {
    model: String,
    data: String,
    split: &'static str,
    examples: usize,
    top1: f64,
    top5: f64,
    loss: f64,
    density: f64,
    /// What masks keep of each attention head.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    heads: Vec<HeadDensities>,
    device: String,
    precision: Precision,
}

impl Eval {
    pub fn run(&self) -> anyhow::Result<()> {
        if !(1..=MOST_BATCH).contains(&self.batch) {
            let message = format!("--batch: expected 1 to {MOST_BATCH}, got {}", self.batch);
            return Err(dilt::Error::Usage(message).into());
        }
        let weights = Weights::load(&self.weights)?;
        let (config, data) = self.target.load(Some(&weights), &self.common)?;
        let model = config.build()?;
        let device = self.common.open()?;
        let weights = self.target.fitted(&self.weights, weights, &config, &model)?;
        self.common.warn_of_empty_layers(&weights);
        let planning = self.common.planning()?;
        let mut network = Network::for_masks(&device, &model, &weights.masks, self.batch, Use::Evaluate, &planning)?;
        network.load(&weights)?;
        let split = self.split.of(&data);
        let images = Images::new(&device, &data, split)?;
        let examples = Labelled::all(&device, &images, split, data.classes)?;
        let score = evaluate(&mut network, &examples, self.batch, self.logits.is_some())?;
        if let Some(path) = &self.logits {
            save_logits(path, &score.logits, model.classes, &split.labels)?;
        }
        // Of the weights that have a mask, as everywhere: what was left out of pruning is no part of it.
        let masks = MaskSet::of_weights(&weights.masks);
        let result = Evaluated {
            model: model.name.clone(),
            data: data.name.clone(),
            split: self.split.name(),
            examples: score.examples,
            top1: score.top1,
            top5: score.top5,
            loss: score.loss,
            density: masks.density(),
            heads: head_densities(&model, &masks),
            device: device.description(),
            precision: self.common.precision(),
        };
        self.common.print(&result, |r| {
            format!(
                "{} on {} {} ({} examples): top-1 {:.2} %, top-5 {:.2} %, loss {:.4}, density {:.4}",
                r.model,
                r.data,
                r.split,
                r.examples,
                r.top1 * 100.0,
                r.top5 * 100.0,
                r.loss,
                r.density
            )
        })
    }
}
