//! `dilt assemble`: core and specialists put together again.

use std::path::PathBuf;

use clap::Args;
use dilt::data::partition::Partition;
use dilt::nn::weights::Weights;
use dilt::ticket::assemble::{Assembly, Pieces, Specialist, assemble};
use dilt::ticket::settings::Repetitions;
use serde_json::json;

use super::experiment::ExperimentOptions;

/// Put a core ticket and chosen specialists together again, beside a control with random weights in their place.
///
/// The tickets are those that `dilt find` writes: seed_<s>/tickets/<name>/ticket.safetensors in its run folder.
#[derive(Args)]
pub struct Assemble {
    /// The core ticket; its weights are where training starts.
    #[arg(long, value_name = "FILE")]
    core: PathBuf,
    /// A specialist ticket and the number of its part, from 1; may be given several times.
    #[arg(long, value_name = "PART=FILE", required = true)]
    specialist: Vec<String>,
    /// Train the union anew, or train specialists on their parts on top of the frozen core and add them.
    #[arg(long, value_enum, default_value = "retrain")]
    mode: Assembly,
    /// Number of parts that the tickets were found on.
    #[arg(long, default_value_t = 2, value_name = "K")]
    parts: usize,
    /// How the data was divided: classes, random, or file=F.
    #[arg(long, default_value = "classes")]
    partition: String,
    /// Number of repetitions, with seeds from --seed on.
    #[arg(long, default_value_t = 2)]
    seeds: usize,
    #[command(flatten)]
    pub options: ExperimentOptions,
}

impl Assemble {
    pub fn run(&self) -> anyhow::Result<()> {
        let first_seed = self.options.common.seed;
        let partition = Partition::parse(&self.partition, self.parts, first_seed)?;
        let core = Weights::load(&self.core)?;
        if core.masks.is_empty() {
            return Err(dilt::Error::file(&self.core, "has no masks; expected a ticket").into());
        }
        let mut specialists = Vec::new();
        for text in &self.specialist {
            let wrong = || dilt::Error::Usage(format!("--specialist: expected PART=FILE, as in 1=FILE, got '{text}'"));
            let (part, file) = text.split_once('=').ok_or_else(wrong)?;
            let part: usize = part.parse().ok().filter(|&part| part > 0).ok_or_else(wrong)?;
            specialists.push(Specialist { part: part - 1, ticket: Weights::load(file.as_ref())? });
        }
        let opened = self.options.open(Some(&core))?;
        let pieces = Pieces::new(&opened.device, &opened.config, partition.parts(), &core, &specialists)?;
        let tickets: Vec<_> = specialists.iter().map(|s| json!([s.part, s.ticket.identity()])).collect();
        let settings = json!({
            "mode": self.mode, "core": core.identity(), "specialists": tickets, "partition": partition,
            "seeds": self.seeds, "first_seed": first_seed,
        });
        let repetitions = Repetitions { seeds: self.seeds, first_seed, partition: Some(partition) };
        opened.run("assemble", &repetitions, settings, |experiment| assemble(experiment, &pieces, self.mode))
    }
}
