//! Repetitions of an experiment, summed up: a row for each ticket, in the order in which tickets come first.

use super::experiment::{Experiment, Repetition, Ticket, TicketScore};
use super::result::{LayerOverlapMean, Matrix, Outcome, OverlapMean, SeedScore, TicketFiles, TicketRow, mean};
use super::run::StageFolder;
use crate::error::Result;
use crate::mask::set::Overlap;
use crate::similarity::compare::Similarity;

/// What the repetitions found so far.
#[derive(Default)]
pub struct Rows {
    tickets: Vec<TicketInSeeds>,
    /// Names of the parts.
    parts: Vec<String>,
    overlaps: Vec<Overlap>,
    similarity: Option<Similarity>,
}

/// A ticket of all repetitions so far.
struct TicketInSeeds {
    name: String,
    method: &'static str,
    matched: Option<String>,
    scores: Vec<SeedScore>,
    files: Vec<TicketFiles>,
}

/// Runs `repetition` with each seed of an experiment and sums up; reads the result if the run is finished.
///
/// # Errors
/// Those of `repetition`; [`crate::Error::File`] if the result cannot be read or written.
pub fn repeat(experiment: &Experiment, mut repetition: impl FnMut(u64, &mut Rows) -> Result<()>) -> Result<Outcome> {
    let run = experiment.folder.path().to_string_lossy().into_owned();
    if let Some(result) = experiment.folder.result()? {
        return Ok(Outcome { run, ..result });
    }
    let mut rows = Rows::default();
    experiment.repetitions.seeds().try_for_each(|seed| repetition(seed, &mut rows))?;
    let overlap = mean_overlap(&rows.overlaps);
    let tickets: Vec<TicketRow> = rows.tickets.into_iter().map(TicketInSeeds::sum_up).collect();
    let matrix = Matrix::new(rows.parts, &tickets);
    let outcome = Outcome { run, matrix, tickets, overlap, similarity: rows.similarity };
    experiment.folder.finish(&outcome)?;
    Ok(outcome)
}

impl Rows {
    /// Retrains a ticket of a repetition, and adds it: `random` matched to `core` lies in the folder `random-at-core`.
    ///
    /// # Errors
    /// As [`Repetition::search`].
    pub fn judge(&mut self, repetition: &Repetition, ticket: &Ticket) -> Result<()> {
        let Ticket { name, matched, .. } = ticket;
        let folder = matched.as_ref().map_or(name.clone(), |matched| format!("{name}-at-{matched}"));
        let (score, folder) = repetition.retrain(&folder, ticket)?;
        self.add(repetition, ticket, score, &folder);
        Ok(())
    }

    /// Adds a ticket of a repetition that lies in a folder.
    pub fn add(&mut self, repetition: &Repetition, ticket: &Ticket, score: TicketScore, folder: &StageFolder) {
        let Ticket { name, method, matched, .. } = ticket;
        let seed = repetition.seed;
        let known = |row: &TicketInSeeds| (&row.name, row.method, &row.matched) == (name, *method, matched);
        let row = self.tickets.iter().position(known).unwrap_or_else(|| {
            let (scores, files) = Default::default();
            self.tickets.push(TicketInSeeds { name: name.clone(), method, matched: matched.clone(), scores, files });
            self.tickets.len() - 1
        });
        let row = &mut self.tickets[row];
        let file = folder.ticket().exists().then(|| folder.relative(&folder.ticket()));
        row.scores.push(SeedScore { seed, score });
        row.files.push(TicketFiles { seed, ticket: file, weights: folder.relative(&folder.weights()) });
        self.parts = repetition.parts.iter().map(|part| part.name.clone()).collect();
    }

    /// Adds what the parts' masks of a repetition have in common.
    pub fn add_overlap(&mut self, overlap: Overlap) {
        self.overlaps.push(overlap);
    }

    /// Adds how similar the layers of a repetition's tickets are.
    pub fn add_similarity(&mut self, similarity: Similarity) {
        self.similarity = Some(similarity);
    }
}

impl TicketInSeeds {
    fn sum_up(self) -> TicketRow {
        let TicketInSeeds { name, method, matched, scores, files } = self;
        TicketRow::new(name, method.into(), matched, scores, files)
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
