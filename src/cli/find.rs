//! `dilt find`: the main job.

use clap::Args;
use dilt::data::partition::Partition;
use dilt::ticket::find::find;
use dilt::ticket::select::Scope;
use dilt::ticket::settings::{Algebra, Method, Repetitions, Search};
use dilt::ticket::structure::Structure;
use serde::Serialize;
use serde_json::json;

use super::experiment::ExperimentOptions;
use super::structure::StructureOptions;

/// Find tickets by a method, retrain each on all data, and score it beside its controls.
///
/// Without options: the disentangled tickets of ResNet-8 on the embedded handwritten digits.
/// At the end the layers of the first repetition's dense network and tickets (controls and part-i left out) are compared as
/// by `dilt similarity`: at most 5 of each network, on 64 test images. RUN/report.html shows all of it.
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
    /// How the data is divided: classes (ranges of labels), random, or file=F (a line of labels for each part). Parts of other
    /// classes have classifiers of their own, which are not pruned then.
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
    /// Prune more than convolutions, linear layers and a classifier that all parts share: weights whose names match (* and
    /// ?), such as a vision transformer's patch_embed.proj.weight or pos_embed; may be given several times.
    #[arg(long, value_name = "PATTERN", help_heading = "Tickets")]
    include: Vec<String>,
    /// When masks of parts are intersected, of --method dilt; final if not given.
    #[arg(long, value_enum, help_heading = "Tickets")]
    algebra: Option<Algebra>,
    /// Of --method dilt, the core is what at least this many parts keep; all of them if not given.
    #[arg(long, value_name = "T", help_heading = "Tickets")]
    at_least: Option<usize>,
    /// Make the tickets of the last level structured too, by L1 where rows are chosen, and retrain them beside unstructured
    /// ones of as many weights.
    #[arg(long, value_enum, value_name = "METHOD", help_heading = "Tickets")]
    structure: Option<Structure>,
    #[command(flatten)]
    how: StructureOptions,
    /// Number of repetitions, with seeds from --seed on.
    #[arg(long, default_value_t = 2, help_heading = "Tickets")]
    seeds: usize,
    /// Do not compare the tickets' layers at the end.
    #[arg(long, help_heading = "Tickets")]
    no_similarity: bool,
    #[command(flatten)]
    pub options: ExperimentOptions,
}

/// Everything that says how tickets are found, for the hash of a run.
#[derive(Serialize)]
struct Settings<'a> {
    #[serde(flatten)]
    search: &'a Search,
    #[serde(flatten)]
    repetitions: &'a Repetitions,
}

impl Find {
    pub fn run(&self) -> anyhow::Result<()> {
        let first_seed = self.options.common.seed;
        let partition = Partition::parse(&self.partition, self.parts, first_seed)?;
        let search = self.search(&partition)?;
        let opened = self.options.open(None)?;
        let steps = opened.recipe.total_steps(opened.data.train.len());
        search.check(Some(&partition), &opened.config.build()?, steps)?;
        let repetitions = Repetitions { seeds: self.seeds, first_seed, partition: Some(partition) };
        let method = json!(search.method);
        let mut settings = json!({ "settings": Settings { search: &search, repetitions: &repetitions } });
        if self.no_similarity {
            settings["similarity"] = json!(false);
        }
        let name = method.as_str().unwrap_or("find");
        opened.run(name, &repetitions, settings, |experiment| find(experiment, &search, !self.no_similarity))
    }

    fn search(&self, partition: &Partition) -> dilt::Result<Search> {
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
        for (option, given) in [("--at-least", self.at_least.is_some()), ("--algebra", self.algebra.is_some())] {
            if given && self.method != Method::Dilt {
                return usage(format!(
                    "{option}: expected --method dilt with it; colt takes what all parts keep after each level, lth has \
                     no parts"
                ));
            }
        }
        Ok(Search {
            method: self.method,
            at_least: self.at_least.unwrap_or(partition.parts()),
            structure: self.structure.map(|method| self.how.settings(method)),
            levels: self.levels,
            prune,
            rewind,
            scope: self.scope,
            exclude: self.exclude.clone(),
            include: self.include.clone(),
            algebra: self.algebra.unwrap_or(Algebra::Final),
        })
    }
}
