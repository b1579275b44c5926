//! What the commands share that repeat trainings in a run folder.

use clap::Args;
use dilt::data::DataSet;
use dilt::device::Device;
use dilt::nn::config::ModelConfig;
use dilt::nn::weights::Weights;
use dilt::ticket::experiment::Experiment;
use dilt::ticket::report;
use dilt::ticket::result::Outcome;
use dilt::ticket::run::RunFolder;
use dilt::ticket::settings::Repetitions;
use dilt::ticket::streams::Streams;
use dilt::train::Recipe;
use serde_json::{Value, json};

use super::{Common, ModelAndData, RecipeOptions, RunOptions, machine, short_name};

/// Options of a command that repeats trainings in a run folder.
#[derive(Args)]
pub struct ExperimentOptions {
    #[command(flatten)]
    target: ModelAndData,
    #[command(flatten)]
    recipe: RecipeOptions,
    #[command(flatten)]
    runs: RunOptions,
    /// Most trainings that run side by side on the device, 1 to 32: of parts, tickets and seeds. The result is the same
    /// with any number, and so is the run folder; memory is K times that of a training. For trainings too small to fill the
    /// device, but what it gains is not measured yet. On a GPU each has a stream of its own (not yet tried on one).
    #[arg(long, default_value_t = 1, value_name = "K", allow_negative_numbers = true, help_heading = "Computing")]
    pub streams: usize,
    /// Do the steps of the trainings that run side by side together: what they launch alike, tickets of one architecture
    /// nearly all of it, is one launch for up to 16 of them, where each by itself is too small for the device. The result is
    /// the same. They wait for each other; not yet tried on a GPU, and on a CPU nothing is gained.
    #[arg(long, help_heading = "Computing")]
    array: bool,
    #[command(flatten)]
    pub common: Common,
}

/// What an experiment works on, before there is a folder for it.
pub struct Opened<'a> {
    options: &'a ExperimentOptions,
    pub device: Device,
    streams: Streams,
    pub data: DataSet,
    /// With the image and the classes of the data.
    pub config: ModelConfig,
    pub recipe: Recipe,
}

impl ExperimentOptions {
    /// Loads model and data, and opens the device. `named` is the model that a ticket says it is of.
    pub fn open(&self, given: Option<&Weights>) -> anyhow::Result<Opened<'_>> {
        let (mut config, data) = self.target.load(given, &self.common)?;
        let recipe = self.recipe.apply(&config)?;
        (config.image, config.classes) = (data.shape, data.classes);
        if self.common.tune && self.streams > 1 {
            let what = "--streams: expected 1 with --tune, whose times are of a device that does nothing else";
            return Err(dilt::Error::Usage(format!("{what}, got {}", self.streams)).into());
        }
        let device = self.common.open()?;
        let streams = Streams::open(&device, self.streams, self.array)?;
        Ok(Opened { options: self, device, streams, data, config, recipe })
    }
}

impl Opened<'_> {
    /// Opens the run folder called `name` and a hash of `settings`, model, recipe and data, does the job in it, writes its
    /// page, and prints the outcome.
    pub fn run(
        &self,
        name: &str,
        repetitions: &Repetitions,
        mut settings: Value,
        job: impl FnOnce(&Experiment) -> dilt::Result<Outcome>,
    ) -> anyhow::Result<()> {
        let Opened { options, device, streams, data, config, recipe } = self;
        repetitions.check(data)?;
        settings["model"] = json!(config);
        settings["recipe"] = json!(recipe);
        settings["data"] = data.identity();
        if options.common.tune {
            settings["tune"] = json!(true);
        }
        let planning = options.common.planning()?;
        let name = format!("{name}-{}-{}", short_name(&config.name), data.name);
        let allow = options.runs.allow_device_change;
        let folder = RunFolder::open(&options.runs.runs, &name, &settings, &machine(device), allow)?;
        let progress = options.common.progress();
        progress.say(&format!("run: {} on {}", folder.path().display(), device.description()));
        let (folder, progress, planning) = (&folder, &progress, &planning);
        let experiment = Experiment { device, streams, data, config, recipe, repetitions, folder, planning, progress };
        let outcome = job(&experiment)?;
        let report = report::once(folder, &outcome)?;
        options.common.print(&outcome, |outcome| {
            format!("{}\n\nrun: {}\nreport: {}", outcome.to_table(), outcome.run, report.display())
        })
    }
}
