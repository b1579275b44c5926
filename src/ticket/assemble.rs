//! `dilt assemble`: a core ticket and chosen specialists put together again.
//!
//! *Retrained*: the union of their masks, trained on all data from the core's starting weights.
//! *Merged*: the core is trained on all data and frozen; on top of it each specialist's weights are trained on its own
//! part; all are added (where specialists overlap, their mean), and the norms' running statistics are those of one
//! more pass over all training examples. Beside either stands the same with as many random weights in place of each
//! specialist.

use serde::{Deserialize, Serialize};

use super::controls::scattered;
use super::experiment::{Experiment, Head, Purpose, Repetition, Task, TicketScore};
use super::find::Rows;
use super::result::{Matrix, Outcome};
use super::run::StageFolder;
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::mask::set::MaskSet;
use crate::nn::weights::Weights;
use crate::ops::prune::MaskOp;

/// How core and specialists become one network.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Assembly {
    /// The union of the masks is trained anew on all data.
    Retrain,
    /// Specialists are trained on their parts on top of the frozen core, and added.
    Merge,
}

/// A specialist and the part of the data that it belongs to.
pub struct Specialist {
    /// Index of the part, from 0.
    pub part: usize,
    /// Its ticket file.
    pub ticket: Weights,
}

/// Assembles, scores and compares.
///
/// # Errors
/// [`Error::Usage`] if the tickets do not belong to the model or to each other; errors of trainings and files.
pub fn assemble(
    experiment: &Experiment,
    core: &Weights,
    specialists: &[Specialist],
    assembly: Assembly,
) -> Result<Outcome> {
    let settings = experiment.settings;
    let run = experiment.folder.path().to_string_lossy().into_owned();
    if let Some(result) = experiment.folder.result()? {
        return Ok(Outcome { run, ..result });
    }
    let names: Vec<String> = core.masks.keys().cloned().collect();
    let core_masks = MaskSet::from_file(&core.masks, &names)?;
    let all = names.iter().map(|name| (name.clone(), Mask::ones(core.masks[name].shape())));
    let candidates = MaskSet::new(all.collect());
    let mut sets = Vec::new();
    for specialist in specialists {
        let parts = settings.partition.parts();
        if specialist.part >= parts {
            let part = specialist.part + 1;
            return Err(Error::Usage(format!("--specialist: expected a part from 1 to {parts}, got {part}")));
        }
        let masks = MaskSet::from_file(&specialist.ticket.masks, &names)?;
        // What the core has already is not the specialist's.
        sets.push((specialist.part, masks.combine(experiment.device, MaskOp::AndNot, &core_masks)?));
    }
    let start = Weights { masks: Default::default(), metadata: Default::default(), ..core.clone() };
    let (mut rows, mut names) = (Rows::default(), Vec::new());
    for seed in settings.first_seed..settings.first_seed + settings.seeds as u64 {
        let repetition = Repetition::from_ticket(experiment, seed, candidates.clone(), start.clone())?;
        let (score, folder) = repetition.retrain("core", "dilt", &core_masks, None)?;
        let core_weights = Weights::load(&folder.weights())?;
        rows.add("core", "dilt", None, seed, score, &folder);
        let random: Vec<_> = sets.iter().map(|(part, set)| (*part, scattered(&repetition, &core_masks, set))).collect();
        for (name, matched, sets) in [("assembled", None, &sets), ("core-random", Some("assembled"), &random)] {
            let (score, folder) = match assembly {
                Assembly::Retrain => {
                    let union = union_of(&repetition, &core_masks, sets)?;
                    repetition.retrain(name, "assemble", &union, None)?
                }
                Assembly::Merge => merge(&repetition, name, (&core_masks, &core_weights), sets)?,
            };
            rows.add(name, "assemble", matched, seed, score, &folder);
        }
        names = repetition.parts.iter().map(|part| part.name.clone()).collect();
    }
    let tickets = rows.finish();
    let outcome = Outcome { run, matrix: Matrix::new(names, &tickets), tickets, overlap: None };
    experiment.folder.finish(&outcome)?;
    Ok(outcome)
}

fn union_of(repetition: &Repetition, core: &MaskSet, sets: &[(usize, MaskSet)]) -> Result<MaskSet> {
    let device = repetition.experiment.device;
    sets.iter().try_fold(core.clone(), |union, (_, set)| union.combine(device, MaskOp::Or, set))
}

/// Trains each set on its part on top of the frozen core, adds all, and scores the sum.
fn merge(
    repetition: &Repetition,
    name: &str,
    (core, core_weights): (&MaskSet, &Weights),
    sets: &[(usize, MaskSet)],
) -> Result<(TicketScore, StageFolder)> {
    let folder = repetition.experiment.folder.ticket(repetition.seed, name)?;
    if let Some(score) = folder.score()? {
        return Ok((score, folder));
    }
    let union = union_of(repetition, core, sets)?;
    repetition.write_ticket(&folder, "assemble", &union, &repetition.start)?;
    let mut merged = core_weights.clone();
    merged.masks = union.to_file();
    merged.metadata.clear();
    let mut trained = Vec::new();
    for (index, (part, set)) in sets.iter().enumerate() {
        let mut start = core_weights.clone();
        start.masks = core.combine(repetition.experiment.device, MaskOp::Or, set)?.to_file();
        for (name, mask) in set.layers() {
            let (from, to) = (&repetition.start.tensors[name], start.tensors.get_mut(name));
            let to = to.ok_or_else(|| Error::Usage(format!("the core has no weights '{name}'")))?;
            to.iter_mut().zip(from).zip(mask.iter()).filter(|(_, own)| *own).for_each(|((to, from), _)| *to = *from);
        }
        let task = Task {
            part: Some(&repetition.parts[*part]),
            head: Head::All,
            only: Some(set),
            ..Task::all(Purpose::Retrain)
        };
        trained.push(repetition.search_from(&format!("{name}/part-{}-{index}", part + 1), &start, task)?);
    }
    for (name, tensor) in &mut merged.tensors {
        for (i, value) in tensor.iter_mut().enumerate() {
            let owners =
                sets.iter().zip(&trained).filter(|((_, set), _)| set.get(name).is_some_and(|mask| mask.get(i)));
            let values: Vec<f32> =
                owners.map(|(_, weights)| weights.tensors[name].as_slice().expect("contiguous")[i]).collect();
            if !values.is_empty() {
                *value = values.iter().sum::<f32>() / values.len() as f32;
            }
        }
    }
    let merged = repetition.with_fresh_statistics(&merged)?;
    merged.save(&folder.weights())?;
    let score = repetition.score(&merged, &union)?;
    folder.write_score(&score)?;
    Ok((score, folder))
}
