//! `dilt find`: the main job.

use clap::Args;
use dilt::data::partition::Partition;
use dilt::ticket::experiment::Experiment;
use dilt::ticket::find::find;
use dilt::ticket::run::RunFolder;
use dilt::ticket::select::Scope;
use dilt::ticket::settings::{Algebra, Method, Settings};
use serde_json::json;

use super::{Common, ModelAndData, RecipeOptions, RunOptions, machine, short_name};

/// Find tickets by a method, retrain each on all data, and score it beside its controls.
///
/// Without options: the disentangled tickets of ResNet-8 on the embedded handwritten digits.
/// A run that was stopped goes on where it was when the same command is given again. Trainings write checkpoints
/// every 20 seconds, or as often as the environment variable DILT_CHECKPOINT_SECONDS says.
#[derive(Args)]
pub struct Find {
    /// How tickets are found.
    #[arg(long, value_enum, default_value = "dilt", help_heading = "Tickets")]
    method: Method,
    /// Number of parts that the data is divided into.
    #[arg(long, default_value_t = 2, value_name = "K", help_heading = "Tickets")]
    parts: usize,
    /// How the data is divided: classes (ranges of labels), random, or file=F (a line of labels for each part).
    #[arg(long, default_value = "classes", help_heading = "Tickets")]
    partition: String,
    /// Levels of training and pruning.
    #[arg(long, default_value_t = 4, help_heading = "Tickets")]
    levels: usize,
    /// Share of what is left that each level removes.
    #[arg(long, default_value_t = 0.6, allow_negative_numbers = true, help_heading = "Tickets")]
    prune: f64,
    /// Density after the last level, instead of --prune.
    #[arg(long, conflicts_with = "prune", allow_negative_numbers = true, help_heading = "Tickets")]
    density: Option<f64>,
    /// Where every training starts: init, or this many steps on all data from there.
    #[arg(long, default_value = "init", value_name = "init|STEPS", help_heading = "Tickets")]
    rewind: String,
    /// Where magnitudes are compared.
    #[arg(long, value_enum, default_value = "global", help_heading = "Tickets")]
    scope: Scope,
    /// Leave out weights whose names match (* and ?); may be given several times.
    #[arg(long, value_name = "PATTERN", help_heading = "Tickets")]
    exclude: Vec<String>,
    /// When masks of parts are intersected.
    #[arg(long, value_enum, default_value = "final", help_heading = "Tickets")]
    algebra: Algebra,
    /// The core is what at least this many parts keep; all of them if not given.
    #[arg(long, value_name = "T", help_heading = "Tickets")]
    at_least: Option<usize>,
    /// Number of repetitions, with seeds from --seed on.
    #[arg(long, default_value_t = 2, help_heading = "Tickets")]
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

impl Find {
    pub fn run(&self) -> anyhow::Result<()> {
        let settings = self.settings()?;
        settings.check()?;
        let (mut config, data) = self.target.load(None, &self.common.progress())?;
        let recipe = self.recipe.apply(&config)?;
        config.image = data.shape;
        config.classes = data.classes;
        let device = self.common.open()?;
        let progress = self.common.progress();
        let method = serde_json::to_value(settings.method)?;
        let name = format!("{}-{}-{}", method.as_str().unwrap_or("find"), short_name(&config.name), data.name);
        let resolved = json!({
            "settings": settings, "model": config, "recipe": recipe, "data": data.identity(),
        });
        let folder =
            RunFolder::open(&self.runs.runs, &name, &resolved, &machine(&device), self.runs.allow_device_change)?;
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
        let outcome = find(&experiment)?;
        self.common.print(&outcome, |outcome| format!("{}\n\nrun: {}", outcome.to_table(), outcome.run))
    }

    fn settings(&self) -> dilt::Result<Settings> {
        let usage = |text: String| Err(dilt::Error::Usage(text));
        let prune = match self.density {
            Some(density) if density > 0.0 && density < 1.0 => 1.0 - density.powf(1.0 / self.levels.max(1) as f64),
            Some(density) => {
                return usage(format!("--density: expected a fraction above 0 and below 1, got {density}"));
            }
            None => self.prune,
        };
        let rewind = match self.rewind.as_str() {
            "init" => 0,
            steps => match steps.parse() {
                Ok(steps) => steps,
                Err(_) => return usage(format!("--rewind: expected init or a number of steps, got '{steps}'")),
            },
        };
        if self.at_least.is_some() && self.method != Method::Dilt {
            return usage(
                "--at-least: expected --method dilt with it; colt takes what all parts keep, lth has no parts".into(),
            );
        }
        let partition = Partition::parse(&self.partition, self.parts, self.common.seed)?;
        Ok(Settings {
            method: self.method,
            at_least: self.at_least.unwrap_or(partition.parts()),
            partition,
            levels: self.levels,
            prune,
            rewind,
            scope: self.scope,
            exclude: self.exclude.clone(),
            algebra: self.algebra,
            seeds: self.seeds,
            first_seed: self.common.seed,
        })
    }
}
