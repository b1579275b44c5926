//! `dilt assemble`: core and specialists put together again.

use std::path::PathBuf;

use clap::Args;
use dilt::data::partition::Partition;
use dilt::nn::weights::Weights;
use dilt::ticket::assemble::{Assembly, Specialist, assemble};
use dilt::ticket::experiment::Experiment;
use dilt::ticket::run::RunFolder;
use dilt::ticket::select::Scope;
use dilt::ticket::settings::{Algebra, Method, Settings};
use serde_json::json;

use super::{Common, ModelAndData, RecipeOptions, RunOptions, machine, short_name};

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
    target: ModelAndData,
    #[command(flatten)]
    recipe: RecipeOptions,
    #[command(flatten)]
    runs: RunOptions,
    #[command(flatten)]
    common: Common,
}

impl Assemble {
    pub fn run(&self) -> anyhow::Result<()> {
        let partition = Partition::parse(&self.partition, self.parts, self.common.seed)?;
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
        let (mut config, data) = self.target.load(None, &self.common.progress())?;
        let recipe = self.recipe.apply(&config)?;
        (config.image, config.classes) = (data.shape, data.classes);
        let settings = Settings {
            method: Method::Dilt,
            at_least: partition.parts(),
            partition,
            levels: 1,
            prune: 0.5,
            rewind: 0,
            scope: Scope::Global,
            exclude: Vec::new(),
            algebra: Algebra::Final,
            seeds: self.seeds,
            first_seed: self.common.seed,
        };
        settings.check()?;
        let device = self.common.open()?;
        let progress = self.common.progress();
        let tickets: Vec<_> = specialists.iter().map(|s| json!([s.part, s.ticket.identity()])).collect();
        let resolved = json!({
            "mode": self.mode, "core": core.identity(), "specialists": tickets, "partition": settings.partition,
            "seeds": settings.seeds, "first_seed": settings.first_seed, "model": config, "recipe": recipe,
            "data": data.identity(),
        });
        let name = format!("assemble-{}-{}", short_name(&config.name), data.name);
        let allow = self.runs.allow_device_change;
        let folder = RunFolder::open(&self.runs.runs, &name, &resolved, &machine(&device), allow)?;
        progress.say(&format!("run: {} on {}", folder.path().display(), device.description()));
        let experiment = Experiment {
            device: &device,
            data: &data,
            config: &config,
            recipe: &recipe,
            settings: &settings,
            folder: &folder,
            progress: &progress,
        };
        let outcome = assemble(&experiment, &core, &specialists, self.mode)?;
        self.common.print(&outcome, |outcome| format!("{}\n\nrun: {}", outcome.to_table(), outcome.run))
    }
}
