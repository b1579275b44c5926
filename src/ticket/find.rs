//! `dilt find`: finds tickets by a method, retrains and scores each beside its controls, over several seeds.

use super::experiment::{DENSE, Experiment, Repetition, Ticket};
use super::parts::{self, FoundOnParts};
use super::result::Outcome;
use super::rows::{Rows, repeat};
use super::settings::{Algebra, Method, Search};
use super::{controls, lth};
use crate::error::Result;
use crate::mask::set::MaskSet;

/// Finds tickets, retrains and scores them.
///
/// # Errors
/// [`crate::Error::Usage`] if the settings do not fit; errors of trainings and files.
pub fn find(experiment: &Experiment, search: &Search) -> Result<Outcome> {
    repeat(experiment, |seed, rows| {
        let repetition = Repetition::of_search(experiment, search, seed)?;
        let tickets = find_in(&repetition, search, rows)?;
        tickets.iter().try_for_each(|ticket| rows.judge(&repetition, ticket))
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
            let found = lth::by_share(repetition, search)?;
            tickets.push(Ticket::new("lth", "lth", found.clone()).after(levels));
            tickets.extend(controls_of(repetition, "lth", &found, levels, false)?);
        }
        Method::Colt => {
            let found = parts::search(repetition, search, "colt", Algebra::EachLevel, k)?;
            tickets.push(Ticket::new("colt", "colt", found.core.clone()).after(levels));
            tickets.extend(controls_of(repetition, "colt", &found.core, levels, true)?);
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

/// Controls with exactly as many weights as a ticket.
fn controls_of(
    repetition: &Repetition,
    name: &'static str,
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
