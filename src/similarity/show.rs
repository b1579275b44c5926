//! What people see of a comparison: tables, heat maps, a page.

use std::ops::Range;

use super::compare::{Difference, Similarity};
use crate::report::heatmap::{Axis, Heatmap};
use crate::report::page::Page;
use crate::report::table::Grid;

/// Rows of the table of differences.
const DIFFERENCES: usize = 12;
/// Most layers of the map of all: beyond, cells are too small to be seen.
const MOST_CELLS: usize = 160;

/// A heat map and the name of its file, without ending.
pub struct Picture {
    /// `heatmap-gw`, `heatmap-gw-core`, `heatmap-gw-core-union`.
    pub name: String,
    /// The picture.
    pub svg: String,
}

/// What a map shows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Measure {
    Gw,
    Cka,
    Identity,
}

impl Measure {
    fn name(self) -> &'static str {
        match self {
            Measure::Gw => "gw",
            Measure::Cka => "cka",
            Measure::Identity => "identity",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Measure::Gw => "Gromov-Wasserstein",
            Measure::Cka => "Linear CKA",
            Measure::Identity => "Identity coupling",
        }
    }
}

impl Similarity {
    /// The tables that `dilt similarity` prints.
    pub fn to_table(&self) -> String {
        let mut text = format!("{}\n\n{}", self.modules_text(), self.layers_grid().to_text());
        if !self.differences.is_empty() {
            let grid = self.differences_grid();
            text += &format!("\n\nWhere networks differ most:\n\n{}", grid.to_text());
        }
        for note in self.notes() {
            text += &format!("\n\n{note}");
        }
        text
    }

    /// Which layers group together: for people.
    pub fn modules_text(&self) -> String {
        let heading = format!("Modules (spectral clustering of exp(-GW / {:.5})):", self.sigma);
        format!("{heading}\n\n{}", self.modules_grid().to_text())
    }

    /// Which layers group together: of one network the layers of each module, of several the module of each layer.
    pub fn modules_grid(&self) -> Grid {
        if self.networks.len() > 1 {
            return self.modules_of_networks();
        }
        let modules = self.clusters.iter().max().map_or(0, |last| last + 1);
        let row = |module: usize| {
            let members = self.layers.iter().zip(&self.clusters).filter(|(_, own)| **own == module);
            let members: Vec<&str> = members.map(|(name, _)| name.as_str()).collect();
            vec![module.to_string(), members.join(", ")]
        };
        Grid::new(["module", "layers"]).with_rows((0..modules).map(row))
    }

    fn modules_of_networks(&self) -> Grid {
        let mut names: Vec<&String> = Vec::new();
        for name in self.networks.iter().flat_map(|network| &network.layers) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let ranges = self.ranges();
        let module = |network: usize, name: &String| {
            let place = self.networks[network].layers.iter().position(|layer| layer == name);
            place.map_or_else(|| "-".into(), |place| self.clusters[ranges[network].start + place].to_string())
        };
        let columns = std::iter::once("layer").chain(self.networks.iter().map(|network| network.name.as_str()));
        let rows = names.iter().map(|name| {
            let modules = (0..self.networks.len()).map(|network| module(network, name));
            std::iter::once((*name).clone()).chain(modules).collect()
        });
        Grid::new(columns).with_rows(rows)
    }

    /// Each layer with its module, the layer most like it and the one least like it.
    pub fn layers_grid(&self) -> Grid {
        let columns = ["layer", "module", "nearest", "GW", "CKA", "farthest", "GW", "CKA"];
        let row = |i: usize| {
            let others = || (0..self.layers.len()).filter(move |&j| j != i);
            let by_gw = |a: &usize, b: &usize| self.gw[i][*a].total_cmp(&self.gw[i][*b]);
            let mut cells = vec![self.layers[i].clone(), self.clusters[i].to_string()];
            for other in [others().min_by(by_gw), others().max_by(by_gw)] {
                match other {
                    Some(j) => cells.extend([self.layers[j].clone(), number(self.gw[i][j]), optional(self.cka[i][j])]),
                    None => cells.extend(["-", "-", "-"].map(String::from)),
                }
            }
            cells
        };
        Grid::new(columns).with_rows((0..self.layers.len()).map(row))
    }

    /// Layers of one name in two networks, the least similar first.
    pub fn differences_grid(&self) -> Grid {
        let row = |difference: &Difference| {
            let Difference { layer, networks: [a, b], gw, identity, cka } = difference;
            vec![layer.clone(), format!("{a} - {b}"), number(*gw), optional(*identity), optional(*cka)]
        };
        let rows = self.differences.iter().take(DIFFERENCES).map(row);
        Grid::new(["layer", "networks", "GW", "identity", "CKA"]).with_rows(rows)
    }

    /// What a reader must know to read the numbers.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.constant.is_empty() {
            let layers = self.constant.join(", ");
            notes.push(format!("All probes look alike to {layers}: its distances are zero, and CKA is not defined."));
        }
        let [least, most] = [self.probes.iter().min(), self.probes.iter().max()].map(|n| n.copied().unwrap_or(0));
        if least < most {
            notes.push(format!(
                "Layers see {least} to {most} probes: of two with different numbers only GW is defined, not CKA and the \
                 identity coupling."
            ));
        }
        notes
    }

    /// Adds sections to a page: what was found, tables, heat maps.
    pub fn add_to(&self, page: &mut Page) {
        page.text(
            "Gromov-Wasserstein compares how far apart the probe images lie in one layer with how far apart they lie in \
             another, under the best matching of probes; 0 is alike. The identity coupling matches each probe with itself; \
             linear CKA is 1 for what is alike up to rotation and scale.",
        );
        self.notes().iter().for_each(|note| {
            page.text(note);
        });
        page.section("Which layers group together").table(&self.modules_grid());
        page.section("The nearest and the farthest layer of each").table(&self.layers_grid());
        if !self.differences.is_empty() {
            page.section("Where networks differ most").table(&self.differences_grid());
        }
        page.section("Heat maps");
        page.text("The number behind a name is the layer's module. Light is alike.");
        self.pictures().iter().for_each(|picture| {
            page.picture(&picture.svg);
        });
    }

    /// Heat maps: of all layers by each measure; by Gromov-Wasserstein also of each network and of each two networks.
    pub fn pictures(&self) -> Vec<Picture> {
        let all = 0..self.layers.len();
        let mut pictures = Vec::new();
        if all.len() <= MOST_CELLS {
            for measure in [Measure::Gw, Measure::Cka, Measure::Identity] {
                let title = format!("{}: all layers", measure.title());
                pictures.push(self.picture(format!("heatmap-{}", measure.name()), &title, measure, [&all, &all]));
            }
        }
        if self.networks.len() < 2 && !pictures.is_empty() {
            return pictures;
        }
        let ranges = self.ranges();
        for (a, first) in ranges.iter().enumerate() {
            for (b, second) in ranges.iter().enumerate().skip(a) {
                let [of, and] = [a, b].map(|network| self.networks[network].name.as_str());
                let (name, title) = match a == b {
                    true => (format!("heatmap-gw-{}", file_name(of)), of.to_owned()),
                    false => (format!("heatmap-gw-{}-{}", file_name(of), file_name(and)), format!("{of} and {and}")),
                };
                let title = format!("{}: {title}", Measure::Gw.title());
                pictures.push(self.picture(name, &title, Measure::Gw, [first, second]));
            }
        }
        pictures
    }

    fn picture(&self, name: String, title: &str, measure: Measure, of: [&Range<usize>; 2]) -> Picture {
        let [rows, columns] = of.map(|range| self.axis(range));
        let value = |i: usize, j: usize| {
            let (i, j) = (of[0].start + i, of[1].start + j);
            match measure {
                Measure::Gw => Some(self.gw[i][j]),
                Measure::Cka => self.cka[i][j],
                Measure::Identity => self.identity[i][j],
            }
        };
        // One range for all maps of a measure, so that colours can be compared.
        let most = match measure {
            Measure::Cka => 0.0,
            Measure::Gw => self.gw.iter().flatten().copied().fold(0.0, f64::max),
            Measure::Identity => self.identity.iter().flatten().flatten().copied().fold(0.0, f64::max),
        };
        let range = if measure == Measure::Cka { [0.0, 1.0] } else { [most, 0.0] };
        let map = Heatmap { title, rows: &rows, columns: &columns, values: &value, range };
        Picture { name, svg: map.to_svg() }
    }

    /// The layers of a range: by their own names if they are of one network, with thick rules between networks if not.
    fn axis(&self, range: &Range<usize>) -> Axis {
        let ranges = self.ranges();
        let labels = match ranges.iter().position(|network| network == range) {
            Some(network) => self.networks[network].layers.clone(),
            None => self.layers[range.clone()].to_vec(),
        };
        let inside =
            ranges.iter().map(|network| network.start).filter(|&start| start > range.start && start < range.end);
        let breaks = inside.map(|start| start - range.start).collect();
        Axis { labels, groups: self.clusters[range.clone()].to_vec(), breaks }
    }
}

/// A network's name in that of a file.
fn file_name(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || "_-.".contains(c) { c } else { '_' }).collect()
}

fn number(value: f64) -> String {
    format!("{value:.5}")
}

fn optional(value: Option<f64>) -> String {
    value.map_or_else(|| "-".into(), |value| format!("{value:.4}"))
}
