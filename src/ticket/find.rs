//! `dilt find`: finds tickets by a method, retrains and scores each beside its controls, over several seeds.

use std::collections::BTreeMap;

use super::experiment::{Experiment, Repetition, TicketScore};
use super::parts::{self, FoundOnParts};
use super::result::{LayerOverlapMean, Matrix, Outcome, OverlapMean, SeedScore, TicketFiles, TicketRow, mean};
use super::run::StageFolder;
use super::settings::{Algebra, Method};
use super::{controls, lth};
use crate::error::Result;
use crate::mask::set::{MaskSet, Overlap};
use crate::nn::init;
use crate::nn::weights::Weights;

/// Of the seed from which the re-drawn control takes its initial weights.
const REDRAWN: u64 = 1 << 20;

/// A ticket that is to be judged.
struct Candidate {
    name: String,
    method: &'static str,
    matched: Option<&'static str>,
    masks: MaskSet,
    /// The weights to start from; θ_k if none.
    start: Option<Weights>,
}

impl Candidate {
    fn new(name: impl Into<String>, method: &'static str, masks: MaskSet) -> Self {
        Candidate { name: name.into(), method, matched: None, masks, start: None }
    }

    fn at(self, matched: &'static str) -> Self {
        Candidate { matched: Some(matched), ..self }
    }
}

/// Finds tickets, retrains and scores them.
///
/// # Errors
/// [`crate::Error::Usage`] if the settings do not fit; errors of trainings and files.
pub fn find(experiment: &Experiment) -> Result<Outcome> {
    let settings = experiment.settings;
    settings.check()?;
    let run = experiment.folder.path().to_string_lossy().into_owned();
    if let Some(result) = experiment.folder.result()? {
        return Ok(Outcome { run, ..result });
    }
    let mut rows = Rows::default();
    let mut overlaps = Vec::new();
    let mut names = Vec::new();
    for seed in settings.first_seed..settings.first_seed + settings.seeds as u64 {
        let repetition = Repetition::new(experiment, seed)?;
        let (candidates, overlap) = search(&repetition)?;
        overlaps.extend(overlap);
        for candidate in candidates {
            let Candidate { name, method, matched, masks, start } = candidate;
            let folder = matched.map_or(name.clone(), |matched| format!("{name}-at-{matched}"));
            let (score, folder) = repetition.retrain(&folder, method, &masks, start.as_ref())?;
            rows.add(&name, method, matched, seed, score, &folder);
        }
        names = repetition.parts.iter().map(|part| part.name.clone()).collect();
    }
    let tickets = rows.finish();
    let outcome = Outcome { run, matrix: Matrix::new(names, &tickets), tickets, overlap: mean_overlap(&overlaps) };
    experiment.folder.finish(&outcome)?;
    Ok(outcome)
}

/// The tickets of one repetition, and what the parts' masks have in common.
fn search(repetition: &Repetition) -> Result<(Vec<Candidate>, Option<Overlap>)> {
    let settings = repetition.experiment.settings;
    let device = repetition.experiment.device;
    let mut tickets = vec![Candidate::new("dense", "dense", repetition.candidates.clone())];
    let k = repetition.parts.len();
    match settings.method {
        Method::Lth => {
            let found = lth::by_share(repetition)?;
            tickets.push(Candidate::new("lth", "lth", found.clone()));
            tickets.extend(controls_of(repetition, "lth", &found, false)?);
            Ok((tickets, None))
        }
        Method::Colt => {
            let found = parts::search(repetition, "colt", Algebra::EachLevel, k)?;
            tickets.push(Candidate::new("colt", "colt", found.core.clone()));
            tickets.extend(controls_of(repetition, "colt", &found.core, true)?);
            Ok((tickets, None))
        }
        Method::Dilt => {
            let colt = parts::search(repetition, "colt", Algebra::EachLevel, k)?;
            tickets.push(Candidate::new("colt", "colt", colt.core.clone()));
            let found = match settings.algebra {
                Algebra::EachLevel if settings.at_least == k => colt,
                algebra => parts::search(repetition, "dilt", algebra, settings.at_least)?,
            };
            let overlap = MaskSet::overlap(device, &found.parts.iter().collect::<Vec<_>>())?;
            tickets.extend(disentangled(&found));
            for (name, masks) in [("core", &found.core), ("union", &found.union)] {
                tickets.extend(controls_of(repetition, name, masks, true)?);
            }
            let pruned = controls::union_pruned(repetition, &found)?;
            tickets.push(Candidate::new("union-pruned", "dilt", pruned).at("core"));
            let grown = controls::core_grown(repetition, &found)?;
            tickets.push(Candidate::new("core-grown", "dilt", grown).at("union"));
            Ok((tickets, Some(overlap)))
        }
    }
}

/// Parts, core, specialists, union.
fn disentangled(found: &FoundOnParts) -> Vec<Candidate> {
    let numbered = |name: &'static str, masks: &[MaskSet]| -> Vec<Candidate> {
        let numbered = masks.iter().enumerate();
        numbered.map(|(i, masks)| Candidate::new(format!("{name}-{}", i + 1), "dilt", masks.clone())).collect()
    };
    let mut tickets = numbered("part", &found.parts);
    tickets.push(Candidate::new("core", "dilt", found.core.clone()));
    tickets.extend(numbered("specialist", &found.specialists));
    tickets.push(Candidate::new("union", "dilt", found.union.clone()));
    tickets
}

/// Controls with exactly as many weights as a ticket.
fn controls_of(repetition: &Repetition, name: &'static str, masks: &MaskSet, with_lth: bool) -> Result<Vec<Candidate>> {
    let keep = masks.kept();
    let mut tickets = Vec::new();
    if with_lth {
        tickets.push(Candidate::new("lth", "lth", lth::to_count(repetition, name, keep)?));
    }
    tickets.push(Candidate::new("magnitude", "magnitude", controls::magnitude(repetition, keep)?));
    tickets.push(Candidate::new("random", "random", controls::random(repetition, masks)));
    let model = crate::nn::resnet::build(repetition.experiment.config)?;
    let other = init::draw(&model, repetition.seed + REDRAWN);
    tickets.push(Candidate { start: Some(other), ..Candidate::new("redrawn", "redrawn", masks.clone()) });
    Ok(tickets.into_iter().map(|ticket| ticket.at(name)).collect())
}

/// Rows of tickets in the order in which they come first.
#[derive(Default)]
pub(super) struct Rows {
    order: Vec<(String, &'static str, Option<&'static str>)>,
    scores: BTreeMap<usize, (Vec<SeedScore>, Vec<TicketFiles>)>,
}

impl Rows {
    /// Adds a ticket of one repetition.
    pub(super) fn add(
        &mut self,
        name: &str,
        method: &'static str,
        matched: Option<&'static str>,
        seed: u64,
        score: TicketScore,
        folder: &StageFolder,
    ) {
        let key = (name.to_owned(), method, matched);
        let row = self.order.iter().position(|known| *known == key).unwrap_or_else(|| {
            self.order.push(key);
            self.order.len() - 1
        });
        let ticket = folder.ticket().exists().then(|| folder.relative(&folder.ticket()));
        let weights = folder.relative(&folder.weights());
        let (scores, files) = self.scores.entry(row).or_default();
        scores.push(SeedScore { seed, score });
        files.push(TicketFiles { seed, ticket, weights });
    }

    /// Sums up the repetitions.
    pub(super) fn finish(self) -> Vec<TicketRow> {
        let rows = self.order.into_iter().zip(self.scores.into_values());
        rows.map(|((name, method, matched), (scores, files))| {
            TicketRow::new(name, method.into(), matched.map(Into::into), scores, files)
        })
        .collect()
    }
}

fn mean_overlap(overlaps: &[Overlap]) -> Option<OverlapMean> {
    let first = overlaps.first()?;
    let over = |of: &dyn Fn(&Overlap) -> f64| mean(&overlaps.iter().map(of).collect::<Vec<_>>());
    let layers = first.layers.iter().enumerate().map(|(i, layer)| LayerOverlapMean {
        name: layer.name.clone(),
        jaccard: over(&|overlap| overlap.layers[i].jaccard),
        chance: over(&|overlap| overlap.layers[i].chance),
    });
    Some(OverlapMean {
        jaccard: over(&|overlap| overlap.jaccard),
        chance: over(&|overlap| overlap.chance),
        layers: layers.collect(),
    })
}
