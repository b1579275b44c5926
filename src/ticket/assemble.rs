//! `dilt assemble`: a core ticket and chosen specialists put together again.
//!
//! *Retrained*: the union of their masks, trained on all data from the core's starting weights.
//! *Merged*: the core is trained on all data and frozen; on top of it each specialist's weights are trained on its own
//! part; all are added (where specialists overlap, their mean), and the norms' running statistics are those of one
//! more pass over all training examples. Beside either stands the same with as many random weights in place of each
//! specialist.

use serde::{Deserialize, Serialize};

use super::controls::scattered;
use super::experiment::{Experiment, Head, Purpose, Repetition, Task, Ticket, TicketScore, check_body};
use super::result::Outcome;
use super::rows::repeat;
use super::run::StageFolder;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::mask::set::MaskSet;
use crate::nn::config::ModelConfig;
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

/// A core and specialists that belong to each other and to a network.
pub struct Pieces {
    core: MaskSet,
    /// Part and masks of each specialist, without what the core has.
    specialists: Vec<(usize, MaskSet)>,
    /// Where training starts: the core's weights.
    start: Weights,
}

impl Pieces {
    /// Checks that the tickets belong to the model, to each other and to `parts` parts.
    ///
    /// # Errors
    /// [`Error::Usage`] if they do not.
    pub fn new(
        device: &Device,
        config: &ModelConfig,
        parts: usize,
        core: &Weights,
        specialists: &[Specialist],
    ) -> Result<Self> {
        let model = config.build()?;
        let of = |option: &str, error: Error| Error::Usage(format!("{option}: {error}"));
        let tensors = model.file_tensors();
        let named = |file: &Weights| file.clone().named_as(tensors.iter().map(|(name, _)| name.as_str()));
        let core = named(core).map_err(|error| of("--core", error))?;
        check_body(&core, &model).map_err(|error| of("--core", error))?;
        let names: Vec<String> = core.masks.keys().cloned().collect();
        let core_masks = MaskSet::from_file(&core.masks, &names)?;
        let mut sets = Vec::new();
        for Specialist { part, ticket } in specialists {
            if *part >= parts {
                let got = part + 1;
                return Err(Error::Usage(format!("--specialist: expected a part from 1 to {parts}, got {got}")));
            }
            // What the core has already is not the specialist's.
            let masks = named(ticket)
                .and_then(|ticket| MaskSet::from_file(&ticket.masks, &names))
                .and_then(|masks| masks.combine(device, MaskOp::AndNot, &core_masks));
            sets.push((*part, masks.map_err(|error| of("--specialist", error))?));
        }
        let start = Weights { masks: Default::default(), metadata: Default::default(), ..core };
        Ok(Pieces { core: core_masks, specialists: sets, start })
    }
}

/// Assembles, scores and compares.
///
/// # Errors
/// Errors of trainings and files.
pub fn assemble(experiment: &Experiment, pieces: &Pieces, assembly: Assembly) -> Result<Outcome> {
    let Pieces { core, specialists, start } = pieces;
    let candidates = core.layers().iter().map(|(name, mask)| (name.clone(), Mask::ones(mask.shape())));
    let candidates = MaskSet::new(candidates.collect());
    repeat(experiment, |splits, seed, rows| {
        let repetition = Repetition::new(experiment, splits, seed, candidates.clone(), start.clone())?;
        let ticket = Ticket::new("core", "dilt", core.clone());
        rows.judge(&repetition, std::slice::from_ref(&ticket))?;
        let core_weights = Weights::load(&experiment.folder.ticket(seed, &ticket.name)?.weights())?;
        let random: Vec<_> = specialists.iter().map(|(part, set)| (*part, scattered(&repetition, core, set))).collect();
        let mut tickets = Vec::new();
        for (name, matched, sets) in [("assembled", None, specialists), ("core-random", Some("assembled"), &random)] {
            let union = union_of(&repetition, core, sets)?;
            let ticket = Ticket { matched: matched.map(str::to_owned), ..Ticket::new(name, "assemble", union) };
            tickets.push((ticket, sets));
        }
        match assembly {
            Assembly::Retrain => {
                let retrain = |device: &Device, (ticket, _)| {
                    let ticket: &Ticket = ticket;
                    Ok((ticket, repetition.retrain(device, &ticket.name, ticket)?))
                };
                let jobs = tickets.iter().map(|(ticket, sets)| (ticket, sets));
                experiment.streams.each(jobs, retrain, |(ticket, (score, folder))| {
                    rows.add(&repetition, ticket, score, &folder);
                })
            }
            Assembly::Merge => tickets.iter().try_for_each(|(ticket, sets)| {
                let (score, folder) = merge(&repetition, ticket, (core, &core_weights), sets)?;
                rows.add(&repetition, ticket, score, &folder);
                Ok(())
            }),
        }
    })
}

fn union_of(repetition: &Repetition, core: &MaskSet, sets: &[(usize, MaskSet)]) -> Result<MaskSet> {
    let device = repetition.experiment.device;
    sets.iter().try_fold(core.clone(), |union, (_, set)| union.combine(device, MaskOp::Or, set))
}

/// Trains each set on its part on top of the frozen core, adds all, and scores the sum.
fn merge(
    repetition: &Repetition,
    ticket: &Ticket,
    (core, core_weights): (&MaskSet, &Weights),
    sets: &[(usize, MaskSet)],
) -> Result<(TicketScore, StageFolder)> {
    let folder = repetition.experiment.folder.ticket(repetition.seed, &ticket.name)?;
    if let Some(score) = folder.score()? {
        return Ok((score, folder));
    }
    repetition.write_ticket(&folder, ticket)?;
    let mut merged = core_weights.clone();
    merged.masks = ticket.masks.to_file();
    merged.metadata.clear();
    let train = |device: &Device, (index, (part, set)): (usize, &(usize, MaskSet))| {
        let mut start = core_weights.clone();
        start.masks = core.combine(device, MaskOp::Or, set)?.to_file();
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
        repetition.search_from(device, &format!("{}/part-{}-{index}", ticket.name, part + 1), &start, task)
    };
    let mut trained = Vec::new();
    let streams = repetition.experiment.streams;
    streams.each(sets.iter().enumerate(), train, |weights| trained.push(weights))?;
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
    let score = streams.one(|device| {
        let merged = repetition.with_fresh_statistics(device, &merged)?;
        merged.save(&folder.weights())?;
        repetition.score(device, &merged, &ticket.masks)
    })?;
    folder.write_score(&score)?;
    Ok((score, folder))
}
