//! The page of a run: its tickets, what they have in common, how similar their layers are.

use std::path::PathBuf;

use super::result::{Outcome, TicketRow};
use super::run::RunFolder;
use crate::error::Result;
use crate::mask::set::MaskSet;
use crate::nn::weights::Weights;
use crate::report::heatmap::{Axis, Heatmap};
use crate::report::page::Page;

/// The page of a finished run: the one that is there, or else [`write()`]'s.
///
/// # Errors
/// As [`write()`].
pub fn once(folder: &RunFolder, outcome: &Outcome) -> Result<PathBuf> {
    let page = folder.report();
    if page.exists() { Ok(page) } else { write(folder, outcome) }
}

/// Writes the page of a finished run into its folder, and returns where it is.
///
/// # Errors
/// [`crate::Error::File`] if a ticket cannot be read or the page cannot be written.
pub fn write(folder: &RunFolder, outcome: &Outcome) -> Result<PathBuf> {
    let name = folder.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut page = Page::new(&name);
    page.text(
        "Each ticket was retrained on all data from the same starting weights. Part columns are its accuracy on each part's \
         test images, with all outputs and with only the outputs of the part's classes.",
    );
    page.section("Tickets").table(&outcome.tickets_grid());
    let masks = masks(folder, outcome)?;
    if masks.len() > 1 {
        page.section("What tickets have in common");
        page.text(&format!(
            "Kept by both, divided by kept by either (Jaccard), in the repetition of seed {}.",
            outcome.tickets[0].seeds[0].seed
        ));
        page.picture(&overlaps(&masks));
    }
    if let Some(overlap) = &outcome.overlap {
        page.section("What the parts' masks have in common").text(&overlap.sentence()).table(&overlap.layers_grid());
    }
    if let Some(heads) = outcome.heads_grid() {
        page.section("Density of attention heads").table(&heads);
    }
    if let Some(similarity) = &outcome.similarity {
        page.section("Similarity of layers");
        similarity.add_to(&mut page);
    }
    let settings = serde_json::to_string_pretty(&folder.settings()?).unwrap_or_default();
    page.section("Settings").listing(&settings);
    folder.write_report(&page.to_html())?;
    Ok(folder.report())
}

/// The masks of the first repetition's tickets that have some.
fn masks(folder: &RunFolder, outcome: &Outcome) -> Result<Vec<(String, MaskSet)>> {
    let file = |row: &'_ TicketRow| Some((row.label(), folder.path().join(row.files.first()?.ticket.as_ref()?)));
    let read = outcome.tickets.iter().filter_map(file).map(|(label, path)| {
        let masks = MaskSet::of_weights(&Weights::load(&path)?.masks);
        Ok((label, masks))
    });
    read.collect()
}

fn overlaps(masks: &[(String, MaskSet)]) -> String {
    let labels = masks.iter().map(|(label, _)| label.clone()).collect();
    let axis = Axis { labels, ..Axis::default() };
    let value = |i: usize, j: usize| masks[i].1.jaccard(&masks[j].1);
    let title = "Jaccard of masks";
    Heatmap { title, rows: &axis, columns: &axis, values: &value, range: [0.0, 1.0] }.to_svg()
}
