//! What an experiment found: rows of tickets over all repetitions, as JSON and as a table.

use serde::{Deserialize, Serialize};

use super::experiment::TicketScore;
use crate::report::table::Grid;
use crate::similarity::compare::Similarity;

/// The tickets whose heads are shown.
const OWN_TICKETS: [&str; 5] = ["core", "union", "colt", "lth", "ticket"];

/// The result of `dilt find` and its like.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Outcome {
    /// The run folder.
    pub run: String,
    /// One row per ticket.
    pub tickets: Vec<TicketRow>,
    /// What the parts' masks have in common; means over the repetitions.
    pub overlap: Option<OverlapMean>,
    /// Tickets x parts of the test examples.
    pub matrix: Matrix,
    /// How similar the layers of the first repetition's tickets are, where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub similarity: Option<Similarity>,
}

/// A ticket over all repetitions.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct TicketRow {
    /// Which ticket.
    pub name: String,
    /// How it was found.
    pub method: String,
    /// The ticket whose number of weights a control has.
    pub matched: Option<String>,
    /// Kept / prunable weights, mean over the repetitions.
    pub density: f64,
    /// Accuracy on the test examples, mean over the repetitions.
    pub top1: f64,
    /// Its standard deviation over the repetitions (divided by n - 1); 0 of one.
    pub top1_std: f64,
    /// Each repetition.
    pub seeds: Vec<SeedScore>,
    /// Files of each repetition, relative to the run folder.
    pub files: Vec<TicketFiles>,
}

/// A ticket in one repetition.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct SeedScore {
    /// The seed.
    pub seed: u64,
    /// How it did.
    #[serde(flatten)]
    pub score: TicketScore,
}

/// Files of a ticket in one repetition, relative to the run folder.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct TicketFiles {
    /// The seed.
    pub seed: u64,
    /// Weights to start from and masks; the dense network has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ticket: Option<String>,
    /// The retrained weights.
    pub weights: String,
}

/// Mean over the repetitions of what the parts' masks have in common.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct OverlapMean {
    /// Kept by all parts, divided by kept by any.
    pub jaccard: f64,
    /// The same of independent masks with the same densities.
    pub chance: f64,
    /// The same for each layer.
    pub layers: Vec<LayerOverlapMean>,
}

/// [`OverlapMean`] of a layer.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct LayerOverlapMean {
    /// Name of the weights.
    pub name: String,
    /// Kept by all parts, divided by kept by any.
    pub jaccard: f64,
    /// The same of independent masks.
    pub chance: f64,
}

/// Accuracy of each ticket on each part's test examples, means over the repetitions.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Matrix {
    /// Names of the parts: the columns.
    pub parts: Vec<String>,
    /// One row per ticket.
    pub rows: Vec<MatrixRow>,
}

/// A row of the [`Matrix`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct MatrixRow {
    /// Which ticket.
    pub name: String,
    /// The ticket whose number of weights a control has.
    pub matched: Option<String>,
    /// With all outputs.
    pub all: Vec<f64>,
    /// When only the outputs of the part's classes may be chosen.
    pub restricted: Vec<f64>,
}

impl TicketRow {
    /// Sums up the repetitions.
    pub fn new(
        name: String,
        method: String,
        matched: Option<String>,
        seeds: Vec<SeedScore>,
        files: Vec<TicketFiles>,
    ) -> Self {
        let top1: Vec<f64> = seeds.iter().map(|seed| seed.score.top1).collect();
        let density = mean(&seeds.iter().map(|seed| seed.score.density).collect::<Vec<_>>());
        TicketRow { name, method, matched, density, top1: mean(&top1), top1_std: deviation(&top1), seeds, files }
    }

    /// Standard error of the mean accuracy.
    pub fn top1_error(&self) -> f64 {
        self.top1_std / (self.seeds.len() as f64).sqrt()
    }

    /// Name for people: `lth at core`.
    pub fn label(&self) -> String {
        self.matched.as_ref().map_or(self.name.clone(), |matched| format!("{} at {matched}", self.name))
    }

    fn matrix_row(&self) -> MatrixRow {
        let over_seeds = |of: fn(&TicketScore) -> &Vec<f64>| {
            let parts = of(&self.seeds[0].score).len();
            (0..parts).map(|part| mean(&self.seeds.iter().map(|s| of(&s.score)[part]).collect::<Vec<_>>())).collect()
        };
        MatrixRow {
            name: self.name.clone(),
            matched: self.matched.clone(),
            all: over_seeds(|score| &score.parts),
            restricted: over_seeds(|score| &score.restricted),
        }
    }
}

/// Arithmetic mean.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard deviation of a sample; 0 of a single value.
fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    if values.len() < 2 { 0.0 } else { (squares / (values.len() - 1) as f64).sqrt() }
}

impl Matrix {
    /// The matrix of these tickets.
    pub fn new(parts: Vec<String>, tickets: &[TicketRow]) -> Self {
        Matrix { parts, rows: tickets.iter().map(TicketRow::matrix_row).collect() }
    }
}

impl Outcome {
    /// The tables that `dilt find` prints.
    pub fn to_table(&self) -> String {
        let mut text = self.tickets_grid().to_text();
        if let Some(overlap) = &self.overlap {
            text += &format!("\n\n{}\n\n{}", overlap.sentence(), overlap.layers_grid().to_text());
        }
        if let Some(heads) = self.heads_grid() {
            text += &format!("\n\nDensity of each attention head, mean over the repetitions:\n\n{}", heads.to_text());
        }
        if let Some(similarity) = &self.similarity {
            let (modules, differences) = (similarity.modules_text(), similarity.differences_grid().to_text());
            text += &format!("\n\n{modules}\n\nWhere tickets differ most:\n\n{differences}");
        }
        text
    }

    /// Each ticket with its accuracy on all test examples and on each part's.
    pub fn tickets_grid(&self) -> Grid {
        let mut columns = vec!["ticket".to_owned(), "density".into(), "top-1 %".into(), "± s.e.".into()];
        columns.extend(self.matrix.parts.iter().flat_map(|part| [format!("{part} %"), "own outputs".into()]));
        let percent = |fraction: f64| format!("{:.2}", fraction * 100.0);
        let rows = self.tickets.iter().zip(&self.matrix.rows).map(|(ticket, row)| {
            let empty = ticket.seeds.iter().map(|seed| seed.score.empty_layers.len()).max().unwrap_or(0);
            let flag = if empty > 0 { format!(" ({empty} layers empty)") } else { String::new() };
            let error = if ticket.seeds.len() > 1 { percent(ticket.top1_error()) } else { "-".into() };
            let mut cells = vec![ticket.label() + &flag, format!("{:.4}", ticket.density), percent(ticket.top1), error];
            cells.extend(row.all.iter().zip(&row.restricted).flat_map(|(all, own)| [percent(*all), percent(*own)]));
            cells
        });
        Grid::new(columns).with_rows(rows)
    }

    /// What the tickets keep of each attention head: of those of the method itself, not of its controls.
    pub fn heads_grid(&self) -> Option<Grid> {
        let shown = self.tickets.iter().filter(|ticket| OWN_TICKETS.contains(&ticket.name.as_str()));
        let shown: Vec<_> = shown.filter(|ticket| ticket.matched.is_none()).collect();
        let layers = &shown.first()?.seeds[0].score.heads;
        let mut rows = Vec::new();
        for (i, layer) in layers.iter().enumerate() {
            for ticket in &shown {
                let of_head = |head: usize| {
                    let seeds = ticket.seeds.iter().map(|seed| seed.score.heads[i].density[head]);
                    format!("{:.4}", mean(&seeds.collect::<Vec<_>>()))
                };
                let mut cells = vec![layer.layer.clone(), ticket.name.clone()];
                cells.extend((0..layer.density.len()).map(of_head));
                rows.push(cells);
            }
        }
        let heads = layers.iter().map(|layer| layer.density.len()).max()?;
        let mut columns = vec!["layer".to_owned(), "ticket".into()];
        columns.extend((0..heads).map(|head| format!("head {head}")));
        Some(Grid::new(columns).with_rows(rows))
    }
}

impl OverlapMean {
    /// Overlap beside chance, in words.
    pub fn sentence(&self) -> String {
        let OverlapMean { jaccard, chance, .. } = self;
        format!(
            "The parts' masks share {jaccard:.3} of what any keeps (Jaccard); independent masks would share {chance:.3}."
        )
    }

    /// The same for each layer.
    pub fn layers_grid(&self) -> Grid {
        let row = |l: &LayerOverlapMean| vec![l.name.clone(), format!("{:.3}", l.jaccard), format!("{:.3}", l.chance)];
        Grid::new(["layer", "Jaccard", "chance"]).with_rows(self.layers.iter().map(row))
    }
}
