//! Repetitions of an experiment, summed up: a row for each ticket, in the order in which tickets come first.

use super::experiment::{Experiment, Repetition, Splits, Ticket, TicketScore};
use super::result::{LayerOverlapMean, Matrix, Outcome, OverlapMean, SeedScore, TicketFiles, TicketRow, mean};
use super::run::StageFolder;
use crate::device::Device;
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

/// Runs `repetition` with each seed of an experiment, several side by side if there are streams for it, and sums up; reads
/// the result if the run is finished.
///
/// # Errors
/// Those of `repetition`; [`crate::Error::File`] if the result cannot be read or written.
pub fn repeat(
    experiment: &Experiment,
    repetition: impl Fn(&Splits, u64, &mut Rows) -> Result<()> + Sync,
) -> Result<Outcome> {
    let run = experiment.folder.path().to_string_lossy().into_owned();
    if let Some(result) = experiment.folder.result()? {
        return Ok(Outcome { run, ..result });
    }
    let mut rows = Rows::default();
    let splits = Splits::new(experiment)?;
    let of_seed = |seed| {
        let mut rows = Rows::default();
        repetition(&splits, seed, &mut rows).map(|()| rows)
    };
    experiment.streams.around(experiment.repetitions.seeds(), of_seed, |of_seed| rows.append(of_seed))?;
    let overlap = mean_overlap(&rows.overlaps);
    let tickets: Vec<TicketRow> = rows.tickets.into_iter().map(TicketInSeeds::sum_up).collect();
    let matrix = Matrix::new(rows.parts, &tickets);
    let outcome = Outcome { run, matrix, tickets, overlap, similarity: rows.similarity };
    experiment.folder.finish(&outcome)?;
    Ok(outcome)
}

impl Rows {
    /// Retrains tickets of a repetition side by side, and adds them: `random` matched to `core` lies in the folder
    /// `random-at-core`.
    ///
    /// # Errors
    /// As [`Repetition::search`].
    pub fn judge<'t>(&mut self, repetition: &Repetition, tickets: &'t [Ticket]) -> Result<()> {
        let retrain = |device: &Device, ticket: &'t Ticket| {
            let Ticket { name, matched, .. } = ticket;
            let folder = matched.as_ref().map_or(name.clone(), |matched| format!("{name}-at-{matched}"));
            Ok((ticket, repetition.retrain(device, &folder, ticket)?))
        };
        repetition.experiment.streams.each(tickets, retrain, |(ticket, (score, folder))| {
            self.add(repetition, ticket, score, &folder);
        })
    }

    /// Adds a ticket of a repetition that lies in a folder.
    pub fn add(&mut self, repetition: &Repetition, ticket: &Ticket, score: TicketScore, folder: &StageFolder) {
        let (name, method, matched) = (ticket.name.clone(), ticket.method, ticket.matched.clone());
        let seed = repetition.seed;
        let file = folder.ticket().exists().then(|| folder.relative(&folder.ticket()));
        let scores = vec![SeedScore { seed, score }];
        let files = vec![TicketFiles { seed, ticket: file, weights: folder.relative(&folder.weights()) }];
        self.add_row(TicketInSeeds { name, method, matched, scores, files });
        self.parts = repetition.parts.iter().map(|part| part.name.clone()).collect();
    }

    /// Adds a ticket's scores to those that other seeds gave it.
    fn add_row(&mut self, row: TicketInSeeds) {
        let name = |row: &TicketInSeeds| (row.name.clone(), row.method, row.matched.clone());
        match self.tickets.iter_mut().find(|known| name(known) == name(&row)) {
            Some(known) => {
                known.scores.extend(row.scores);
                known.files.extend(row.files);
            }
            None => self.tickets.push(row),
        }
    }

    /// Adds what the next repetition found.
    fn append(&mut self, next: Rows) {
        let Rows { tickets, parts, overlaps, similarity } = next;
        tickets.into_iter().for_each(|row| self.add_row(row));
        self.parts = parts;
        self.overlaps.extend(overlaps);
        self.similarity = self.similarity.take().or(similarity);
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
