//! What an experiment repeats, and what a search for tickets does.

use std::fmt::Display;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::select::Scope;
use super::structure::Structuring;
use crate::data::DataSet;
use crate::data::partition::Partition;
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::mask::set::MaskSet;
use crate::nn::model::{Model, Parameter, ParameterKind};
use crate::nn::names::glob;

/// Most levels of a search.
const MOST_LEVELS: usize = 1000;
/// Most repetitions.
const MOST_SEEDS: usize = 1000;
/// Largest first seed: each repetition draws from several that are derived from it.
const MOST_SEED: u64 = 1 << 60;

/// How tickets are found.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Disentangled tickets (arXiv 2508.16915): core, specialists and union of masks found on parts of the data.
    Dilt,
    /// Cyclic overlapping tickets (COLT, arXiv 2212.12770): parts share the intersection after each level.
    Colt,
    /// Iterative magnitude pruning on all data (arXiv 1803.03635, rewinding 1912.05671).
    Lth,
}

/// When masks of parts are intersected.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Algebra {
    /// Once, after each part has been pruned to its last level.
    Final,
    /// After each level: all parts go on from the consensus; a specialist collects what the consensus dropped.
    EachLevel,
}

/// How often an experiment is repeated, and the parts of the data that its tickets are judged on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Repetitions {
    /// Number of repetitions with other initial weights and orders of examples.
    pub seeds: usize,
    /// The first of the seeds.
    pub first_seed: u64,
    /// How the examples are divided into parts; none where parts play no role.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition: Option<Partition>,
}

impl Repetitions {
    /// Refuses what cannot be done with this data.
    ///
    /// # Errors
    /// [`Error::Usage`] names the option, what was expected and what it is; errors of [`Partition::split`].
    pub fn check(&self, data: &DataSet) -> Result<()> {
        if self.seeds == 0 {
            return refuse("--seeds", "at least 1", self.seeds);
        }
        if self.seeds > MOST_SEEDS || self.first_seed > MOST_SEED {
            let got = format!("{} and {}", self.seeds, self.first_seed);
            return refuse("--seeds and --seed", &format!("at most {MOST_SEEDS} and {MOST_SEED}"), got);
        }
        if let Some(partition) = &self.partition {
            partition.split(&data.train.labels, data.classes)?;
            partition.split(&data.test.labels, data.classes)?;
        }
        Ok(())
    }

    /// The seeds.
    pub fn seeds(&self) -> Range<u64> {
        self.first_seed..self.first_seed + self.seeds as u64
    }
}

/// What a search for tickets does.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Search {
    /// How tickets are found.
    pub method: Method,
    /// Levels of training and pruning.
    pub levels: usize,
    /// Share of what is left that each level removes.
    pub prune: f64,
    /// Steps on all data from the initial weights to where every training starts; 0: the initial weights.
    pub rewind: usize,
    /// Where magnitudes are compared.
    pub scope: Scope,
    /// Patterns (`*`, `?`) of weights that are not pruned.
    pub exclude: Vec<String>,
    /// Patterns of weights that are pruned beside those of convolutions, linear layers and the classifier.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
    /// When masks of parts are intersected.
    pub algebra: Algebra,
    /// The core is what at least this many parts keep.
    pub at_least: usize,
    /// How the tickets of the last level are made structured too; not at all if none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub structure: Option<Structuring>,
}

impl Search {
    /// Refuses what cannot be done with these parts, this network and trainings of so many steps.
    ///
    /// # Errors
    /// [`Error::Usage`] names the option, what was expected and what it is.
    pub fn check(&self, partition: Option<&Partition>, model: &Model, steps: usize) -> Result<()> {
        if !(self.prune > 0.0 && self.prune < 1.0) {
            return refuse("--prune", "a fraction above 0 and below 1", self.prune);
        }
        check_levels(self.levels)?;
        self.structure.iter().try_for_each(Structuring::check)?;
        let parts = partition.map_or(1, Partition::parts);
        if self.at_least == 0 || self.at_least > parts {
            return refuse("--at-least", &format!("1 to {parts}, the number of parts"), self.at_least);
        }
        if self.rewind > steps {
            return refuse("--rewind", &format!("at most {steps}, the steps of a training"), self.rewind);
        }
        self.candidates(partition, model).map(|_| ())
    }

    /// Whether parts have classifiers of their own, which then belong to no mask.
    fn own_heads(&self, partition: Option<&Partition>) -> bool {
        self.method != Method::Lth && matches!(partition, Some(Partition::Classes { .. } | Partition::File { .. }))
    }

    /// The weights that are pruned, all kept: convolutions and linear layers, the classifier where all parts share it, and
    /// what else is asked for.
    ///
    /// # Errors
    /// [`Error::Usage`] if a pattern matches nothing, or nothing is left to prune.
    pub fn candidates(&self, partition: Option<&Partition>, model: &Model) -> Result<MaskSet> {
        let options =
            self.exclude.iter().map(|p| ("--exclude", p)).chain(self.include.iter().map(|p| ("--include", p)));
        for (option, pattern) in options {
            // Norms and biases are never pruned: that would change what a kept weight means.
            let known = model.parameters.iter().filter(|p| option == "--exclude" || p.shape.len() > 1);
            let known: Vec<_> = known.map(|parameter| parameter.name.as_str()).collect();
            if !known.iter().any(|name| glob(pattern, name)) {
                let known = known.join(", ");
                return Err(Error::Usage(format!("{option} '{pattern}': no such weights; the model has {known}")));
            }
        }
        let any = |patterns: &[String], parameter: &Parameter| patterns.iter().any(|p| glob(p, &parameter.name));
        let pruned = model.parameters.iter().filter(|parameter| match parameter.kind {
            ParameterKind::Classifier => !self.own_heads(partition),
            kind => kind.is_prunable() || (parameter.shape.len() > 1 && any(&self.include, parameter)),
        });
        let pruned = pruned.filter(|parameter| !any(&self.exclude, parameter));
        let layers: Vec<_> = pruned.map(|p| (p.name.clone(), Mask::ones(&p.shape))).collect();
        if layers.is_empty() {
            return Err(Error::Usage("--exclude leaves no weights to prune".into()));
        }
        Ok(MaskSet::new(layers))
    }
}

/// Refuses a number of levels that cannot be done.
///
/// # Errors
/// [`Error::Usage`] says what was expected.
pub fn check_levels(levels: usize) -> Result<()> {
    match levels {
        0 => refuse("--levels", "at least 1", levels),
        _ if levels > MOST_LEVELS => refuse("--levels", &format!("at most {MOST_LEVELS}"), levels),
        _ => Ok(()),
    }
}

fn refuse<T>(option: &str, expected: &str, got: impl Display) -> Result<T> {
    Err(Error::Usage(format!("{option}: expected {expected}, got {got}")))
}
