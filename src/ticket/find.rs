//! `dilt find`: finds tickets by a method, retrains and scores each beside its controls, over several seeds.

use std::collections::BTreeMap;

use ndarray::ArrayD;

use super::experiment::{DENSE, Experiment, Repetition, Ticket};
use super::parts::{self, FoundOnParts};
use super::result::Outcome;
use super::rows::{Rows, repeat};
use super::settings::{Algebra, Method, Search};
use super::structure::{Scores, Structured};
use super::{controls, lth, similarity};
use crate::device::Device;
use crate::error::Result;
use crate::mask::set::MaskSet;

/// Finds tickets, retrains and scores them; `compared`, the layers of the first repetition's are compared too.
///
/// # Errors
/// [`crate::Error::Usage`] if the settings do not fit; errors of trainings and files.
pub fn find(experiment: &Experiment, search: &Search, compared: bool) -> Result<Outcome> {
    repeat(experiment, |splits, seed, rows| {
        let repetition = Repetition::of_search(experiment, splits, search, seed)?;
        let tickets = find_in(&repetition, search, rows)?;
        rows.judge(&repetition, &tickets)?;
        if compared && seed == experiment.repetitions.first_seed {
            let compared = |device: &Device| similarity::of_tickets(&repetition, device, &tickets);
            rows.add_similarity(experiment.streams.one(compared)?);
        }
        Ok(())
    })
}

/// The tickets of one repetition.
fn find_in(repetition: &Repetition, search: &Search, rows: &mut Rows) -> Result<Vec<Ticket>> {
    let Experiment { device, streams, .. } = *repetition.experiment;
    let mut tickets = vec![Ticket::new(DENSE, DENSE, repetition.candidates.clone())];
    let k = repetition.parts.len();
    let levels = search.levels;
    match search.method {
        Method::Lth => {
            let lth::Found { masks, last } = streams.one(|device| lth::by_share(repetition, device, search))?;
            tickets.push(Ticket::new("lth", "lth", masks.clone()).after(levels));
            let beside = Beside { repetition, search, with_lth: false, magnitudes: &last.tensors };
            tickets.extend(beside.tickets(&[("lth", &masks)], |_| Ok(Vec::new()))?);
        }
        Method::Colt => {
            let found = parts::search(repetition, search, "colt", Algebra::EachLevel, k)?;
            tickets.push(Ticket::new("colt", "colt", found.core.clone()).after(levels));
            let beside = Beside { repetition, search, with_lth: true, magnitudes: &found.last_magnitude };
            tickets.extend(beside.tickets(&[("colt", &found.core)], |_| Ok(Vec::new()))?);
        }
        Method::Dilt => {
            let colt = parts::search(repetition, search, "colt", Algebra::EachLevel, k)?;
            tickets.push(Ticket::new("colt", "colt", colt.core.clone()).after(levels));
            let found = match search.algebra {
                Algebra::EachLevel if search.at_least == k => colt,
                algebra => parts::search(repetition, search, "dilt", algebra, search.at_least)?,
            };
            rows.add_overlap(MaskSet::overlap(device, &found.parts.iter().collect::<Vec<_>>())?);
            tickets.extend(disentangled(&found, levels));
            let beside = Beside { repetition, search, with_lth: true, magnitudes: &found.last_magnitude };
            let by_magnitude = |device: &Device| {
                let pruned = Ticket::new("union-pruned", "dilt", controls::union_pruned(device, &found)?);
                let grown = Ticket::new("core-grown", "dilt", controls::core_grown(repetition, device, &found)?);
                Ok(vec![pruned.after(levels).at("core"), grown.after(levels).at("union")])
            };
            tickets.extend(beside.tickets(&[("core", &found.core), ("union", &found.union)], by_magnitude)?);
        }
    }
    Ok(tickets)
}

/// Parts, core, specialists, union.
fn disentangled(found: &FoundOnParts, levels: usize) -> Vec<Ticket> {
    let ticket = |name: String, masks: &MaskSet| Ticket::new(name, "dilt", masks.clone()).after(levels);
    let numbered = |name: &'static str, masks: &[MaskSet]| -> Vec<Ticket> {
        masks.iter().enumerate().map(|(i, masks)| ticket(format!("{name}-{}", i + 1), masks)).collect()
    };
    let mut tickets = numbered("part", &found.parts);
    tickets.push(ticket("core".into(), &found.core));
    tickets.extend(numbered("specialist", &found.specialists));
    tickets.push(ticket("union".into(), &found.union));
    tickets
}

/// What stands beside the tickets of a repetition.
struct Beside<'a> {
    repetition: &'a Repetition<'a>,
    search: &'a Search,
    /// Whether tickets by iterative pruning are among the controls.
    with_lth: bool,
    /// Magnitudes of weights, by which tickets are structured.
    magnitudes: &'a BTreeMap<String, ArrayD<f32>>,
}

/// What is trained for some tickets, apart from what is trained for others.
type Job<'a> = Box<dyn FnOnce(&Device) -> Result<Vec<Ticket>> + Send + 'a>;

impl Beside<'_> {
    /// Controls of each of these tickets, then `others`, then structured tickets.
    fn tickets<'a>(
        &'a self,
        of: &[(&'a str, &'a MaskSet)],
        others: impl FnOnce(&Device) -> Result<Vec<Ticket>> + Send + 'a,
    ) -> Result<Vec<Ticket>> {
        // All need this training, which is the longest.
        let long = |device: &Device| {
            controls::trained_long(self.repetition, device, self.search.levels)?;
            Ok(Vec::new())
        };
        let mut jobs: Vec<Job> = vec![Box::new(long)];
        for &(name, masks) in of {
            jobs.push(Box::new(move |device| self.controls_of(device, name, masks)));
        }
        jobs.push(Box::new(others));
        for &(name, masks) in of {
            jobs.push(Box::new(move |device| self.structured(device, name, masks)));
        }
        let mut tickets = Vec::new();
        self.repetition.experiment.streams.each(jobs, |device, job| job(device), |more| tickets.extend(more))?;
        Ok(tickets)
    }

    /// The structured form of a ticket, if one is asked for, and the unstructured one of as many weights.
    fn structured(&self, device: &Device, name: &str, masks: &MaskSet) -> Result<Vec<Ticket>> {
        let Beside { repetition, search, magnitudes, .. } = *self;
        let Some(structuring) = search.structure else { return Ok(Vec::new()) };
        let model = repetition.experiment.config.build()?;
        let Structured { masks, fixed, .. } = structuring.apply(&model, masks, &Scores::L1(magnitudes))?;
        let method = structuring.method.name();
        let (name, keep) = (format!("{name}-{method}"), masks.kept());
        let unstructured = lth::to_count(repetition, device, &name, search.levels, keep)?;
        let ticket = Ticket::new(name.clone(), method, masks).after(search.levels).fixing(fixed);
        Ok(vec![ticket, Ticket::new("lth", "lth", unstructured).after(search.levels).at(&name)])
    }

    /// Controls with exactly as many weights as a ticket.
    fn controls_of(&self, device: &Device, name: &str, masks: &MaskSet) -> Result<Vec<Ticket>> {
        let Beside { repetition, search: &Search { levels, .. }, with_lth, .. } = *self;
        let keep = masks.kept();
        let mut tickets = Vec::new();
        if with_lth {
            let lth = lth::to_count(repetition, device, name, levels, keep)?;
            tickets.push(Ticket::new("lth", "lth", lth).after(levels));
        }
        let magnitude = controls::magnitude(repetition, device, levels, keep)?;
        tickets.push(Ticket::new("magnitude", "magnitude", magnitude));
        tickets.push(Ticket::new("random", "random", controls::random(repetition, masks)));
        let redrawn = Ticket::new("redrawn", "redrawn", masks.clone()).after(levels);
        tickets.push(redrawn.starting_from(controls::redrawn(repetition)?));
        Ok(tickets.into_iter().map(|ticket| ticket.at(name)).collect())
    }
}
