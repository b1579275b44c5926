//! `dilt transfer`: a ticket on another data set.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use dilt::nn::config::ModelConfig;
use dilt::nn::weights::Weights;
use dilt::ticket::settings::Repetitions;
use dilt::ticket::transfer::{Body, Lth, Transfer as Job, transfer};
use serde_json::json;

use super::experiment::ExperimentOptions;

/// Train a ticket on another data set with a new classifier, beside its controls at exactly its number of weights.
///
/// The ticket is any file with masks. A ticket that `dilt find` writes starts from the weights that it was rewound to: --ticket
/// RUN/seed_0/tickets/core/ticket.safetensors. The weights that it retrained start from what they were trained to: --ticket
/// RUN/seed_0/tickets/core/weights.safetensors.
///
/// Classes and image size may differ, channels may not; a vision transformer's positions are resampled. The classifier is
/// drawn anew by each seed and has no mask: densities count the other layers.
///
/// Rows: dense (all weights), ticket, lth, random (as many of each layer), redrawn (the ticket's masks on newly drawn
/// weights). dense and random start from --dense; without it from what the ticket's file holds beneath its masks; where
/// trained weights are zero there, from newly drawn ones.
#[derive(Args)]
pub struct Transfer {
    /// A file with masks: a ticket, or weights that were trained under masks.
    #[arg(long, value_name = "FILE", help_heading = "Tickets")]
    ticket: PathBuf,
    /// An lth ticket of the source to compare with, which brings its own weights; found on the target data at exactly the
    /// ticket's number of weights if not given.
    #[arg(long, value_name = "FILE", help_heading = "Tickets")]
    lth: Option<PathBuf>,
    /// Weights without masks that dense and random start from, e.g. the source run's
    /// seed_0/tickets/dense/weights.safetensors.
    #[arg(long, value_name = "FILE", help_heading = "Tickets")]
    dense: Option<PathBuf>,
    /// Levels of training and pruning in which the lth ticket is found.
    #[arg(long, default_value_t = 4, conflicts_with = "lth", help_heading = "Tickets")]
    levels: usize,
    /// Number of repetitions, with seeds from --seed on.
    #[arg(long, default_value_t = 2, help_heading = "Tickets")]
    seeds: usize,
    #[command(flatten)]
    pub options: ExperimentOptions,
}

impl Transfer {
    pub fn run(&self) -> anyhow::Result<()> {
        let ticket = with_masks(&self.ticket)?;
        let lth = self.lth.as_deref().map(with_masks).transpose()?;
        let dense = self.dense.as_deref().map(Weights::load).transpose()?;
        let opened = self.options.open(Some(&ticket))?;
        let identity = |weights: &Option<Weights>| weights.as_ref().map(Weights::identity);
        let settings = json!({
            "ticket": ticket.identity(), "lth": identity(&lth), "dense": identity(&dense),
            "levels": lth.is_none().then_some(self.levels), "seeds": self.seeds, "first_seed": self.options.common.seed,
        });
        let of = |path: &Option<PathBuf>, weights: Option<Weights>| {
            path.as_deref().zip(weights).map(|(path, weights)| body(path, &weights, &opened.config)).transpose()
        };
        let ticket = body(&self.ticket, &ticket, &opened.config)?;
        let lth = of(&self.lth, lth)?.map_or(Lth::Found(self.levels), Lth::Given);
        let job = Job::new(ticket, lth, of(&self.dense, dense)?)?;
        let progress = self.options.common.progress();
        job.notes().iter().for_each(|note| progress.say(note));
        let repetitions = Repetitions { seeds: self.seeds, first_seed: self.options.common.seed, partition: None };
        opened.run("transfer", &repetitions, settings, |experiment| transfer(experiment, &job))
    }
}

fn with_masks(path: &Path) -> dilt::Result<Weights> {
    let weights = Weights::load(path)?;
    if weights.masks.is_empty() {
        return Err(dilt::Error::file(path, "has no masks; expected a ticket, or weights trained under masks"));
    }
    Ok(weights)
}

/// The body in a file; what does not fit is said with the file's name.
fn body(path: &Path, weights: &Weights, config: &ModelConfig) -> anyhow::Result<Body> {
    Body::new(weights, config).with_context(|| path.display().to_string())
}
