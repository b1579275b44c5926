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
use crate::error::Result;
use crate::mask::set::MaskSet;

/// Finds tickets, retrains and scores them; `compared`, the layers of the first repetition's are compared too.
///
/// # Errors
/// [`crate::Error::Usage`] if the settings do not fit; errors of trainings and files.
pub fn find(experiment: &Experiment, search: &Search, compared: bool) -> Result<Outcome> {
    repeat(experiment, |seed, rows| {
        let repetition = Repetition::of_search(experiment, search, seed)?;
        let tickets = find_in(&repetition, search, rows)?;
        tickets.iter().try_for_each(|ticket| rows.judge(&repetition, ticket))?;
        if compared && seed == experiment.repetitions.first_seed {
            rows.add_similarity(similarity::of_tickets(&repetition, &tickets)?);
        }
        Ok(())
    })
}

/// The tickets of one repetition.
fn find_in(repetition: &Repetition, search: &Search, rows: &mut Rows) -> Result<Vec<Ticket>> {
    let device = repetition.experiment.device;
    let mut tickets = vec![Ticket::new(DENSE, DENSE, repetition.candidates.clone())];
    let k = repetition.parts.len();
    let levels = search.levels;
    match search.method {
        Method::Lth => {
            let lth::Found { masks, last } = lth::by_share(repetition, search)?;
            tickets.push(Ticket::new("lth", "lth", masks.clone()).after(levels));
            tickets.extend(controls_of(repetition, "lth", &masks, levels, false)?);
            tickets.extend(structured(repetition, search, "lth", &masks, &last.tensors)?);
        }
        Method::Colt => {
            let found = parts::search(repetition, search, "colt", Algebra::EachLevel, k)?;
            tickets.push(Ticket::new("colt", "colt", found.core.clone()).after(levels));
            tickets.extend(controls_of(repetition, "colt", &found.core, levels, true)?);
            tickets.extend(structured(repetition, search, "colt", &found.core, &found.last_magnitude)?);
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
            for (name, masks) in [("core", &found.core), ("union", &found.union)] {
                tickets.extend(controls_of(repetition, name, masks, levels, true)?);
            }
            let pruned = controls::union_pruned(repetition, &found)?;
            tickets.push(Ticket::new("union-pruned", "dilt", pruned).after(levels).at("core"));
            let grown = controls::core_grown(repetition, &found)?;
            tickets.push(Ticket::new("core-grown", "dilt", grown).after(levels).at("union"));
            for (name, masks) in [("core", &found.core), ("union", &found.union)] {
                tickets.extend(structured(repetition, search, name, masks, &found.last_magnitude)?);
            }
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

/// The structured form of a ticket, if one is asked for, and the unstructured one of as many weights.
fn structured(
    repetition: &Repetition,
    search: &Search,
    name: &str,
    masks: &MaskSet,
    magnitudes: &BTreeMap<String, ArrayD<f32>>,
) -> Result<Vec<Ticket>> {
    let Some(structuring) = search.structure else { return Ok(Vec::new()) };
    let model = repetition.experiment.config.build()?;
    let Structured { masks, fixed, .. } = structuring.apply(&model, masks, &Scores::L1(magnitudes))?;
    let method = structuring.method.name();
    let (name, keep) = (format!("{name}-{method}"), masks.kept());
    let unstructured = lth::to_count(repetition, &name, search.levels, keep)?;
    let ticket = Ticket::new(name.clone(), method, masks).after(search.levels).fixing(fixed);
    Ok(vec![ticket, Ticket::new("lth", "lth", unstructured).after(search.levels).at(&name)])
}

/// Controls with exactly as many weights as a ticket.
fn controls_of(
    repetition: &Repetition,
    name: &str,
    masks: &MaskSet,
    levels: usize,
    with_lth: bool,
) -> Result<Vec<Ticket>> {
    let keep = masks.kept();
    let mut tickets = Vec::new();
    if with_lth {
        tickets.push(Ticket::new("lth", "lth", lth::to_count(repetition, name, levels, keep)?).after(levels));
    }
    tickets.push(Ticket::new("magnitude", "magnitude", controls::magnitude(repetition, levels, keep)?));
    tickets.push(Ticket::new("random", "random", controls::random(repetition, masks)));
    let redrawn = Ticket::new("redrawn", "redrawn", masks.clone()).after(levels);
    tickets.push(redrawn.starting_from(controls::redrawn(repetition)?));
    Ok(tickets.into_iter().map(|ticket| ticket.at(name)).collect())
}
