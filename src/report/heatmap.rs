//! Heat maps as SVG: a cell for each pair, its value in a tooltip, rules between groups, light and dark.

use std::fmt::Write;

use super::colour::{shade, wants_dark_text};
use super::page::escape;

/// Width that the cells of a map share, in pixels.
const CELLS: f64 = 640.0;
/// Smallest and largest side of a cell.
const CELL: [f64; 2] = [7.0, 46.0];
/// Cells of this side hold their value as text.
const CELL_WITH_TEXT: f64 = 36.0;
/// Width of a letter, in heights of the text.
const LETTER: f64 = 0.6;
/// Steps of the legend.
const LEGEND: usize = 32;

/// The rows or columns of a map.
#[derive(Clone, Debug, Default)]
pub struct Axis {
    /// A name for each.
    pub labels: Vec<String>,
    /// A group for each, shown behind the name; neighbours of different groups have a thin rule between them.
    pub groups: Vec<usize>,
    /// Where thick rules lie: before these.
    pub breaks: Vec<usize>,
}

/// A map of values.
pub struct Heatmap<'a> {
    /// What it shows.
    pub title: &'a str,
    /// One for each row of values.
    pub rows: &'a Axis,
    /// One for each column of values.
    pub columns: &'a Axis,
    /// A value for each row and column; none where it is not defined.
    pub values: &'a dyn Fn(usize, usize) -> Option<f64>,
    /// The values of the darkest and the lightest colour.
    pub range: [f64; 2],
}

impl Heatmap<'_> {
    /// The picture, self-contained.
    pub fn to_svg(&self) -> String {
        let (rows, columns) = (self.rows.labels.len(), self.columns.labels.len());
        let cell = (CELLS / rows.max(columns).max(1) as f64).floor().clamp(CELL[0], CELL[1]);
        let text = (cell * 0.8).clamp(6.0, 12.0);
        let room = |axis: &Axis| {
            let letters = axis.labels.iter().enumerate().map(|(i, _)| axis.label(i).chars().count()).max().unwrap_or(0);
            letters as f64 * text * LETTER + 14.0
        };
        let (left, top) = (room(self.rows), room(self.columns) + 26.0);
        let (right, bottom) = (left + columns as f64 * cell, top + rows as f64 * cell);
        // The title may be wider than the map, and so may the legend.
        let width = (right + 20.0).max(self.title.chars().count() as f64 * 14.0 * LETTER + 20.0).max(left + 260.0);
        let height = bottom + 56.0;
        let mut svg = String::new();
        let title = escape(self.title);
        let _ = write!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
             height=\"{height:.0}\" role=\"img\" aria-label=\"{title}\" class=\"heatmap\" font-family=\"ui-monospace, \
             Menlo, Consolas, monospace\" font-size=\"{text}\">\n<style>{STYLE}</style>\n<text class=\"ink\" x=\"10\" \
             y=\"18\" font-size=\"14\" font-weight=\"600\">{title}</text>\n"
        );
        self.cells(&mut svg, [left, top], cell);
        self.labels(&mut svg, [left, top], cell, text);
        self.rules(&mut svg, [left, top], [right, bottom], cell);
        self.legend(&mut svg, [left, bottom + 16.0]);
        svg + "</svg>\n"
    }

    fn share(&self, value: f64) -> f64 {
        let [dark, light] = self.range;
        if dark == light { 1.0 } else { ((value - dark) / (light - dark)).clamp(0.0, 1.0) }
    }

    fn cells(&self, svg: &mut String, [left, top]: [f64; 2], cell: f64) {
        for (i, row) in self.rows.labels.iter().enumerate() {
            for (j, column) in self.columns.labels.iter().enumerate() {
                let (x, y) = (left + j as f64 * cell, top + i as f64 * cell);
                let value = (self.values)(i, j);
                let fill = match value {
                    Some(value) => format!("fill=\"{}\"", shade(self.share(value))),
                    None => "class=\"void\"".into(),
                };
                let said = value.map_or_else(|| "not defined".to_owned(), |value| format!("{value:.6}"));
                let (row, column) = (escape(row), escape(column));
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{cell}\" height=\"{cell}\" {fill}><title>{row} × \
                     {column}: {said}</title></rect>"
                );
                if cell < CELL_WITH_TEXT {
                    continue;
                }
                let (x, y) = (x + cell / 2.0, y + cell / 2.0);
                let (class, said) = match value {
                    None => ("ink", "–".to_owned()),
                    Some(value) if wants_dark_text(self.share(value)) => ("on-light", short(value)),
                    Some(value) => ("on-dark", short(value)),
                };
                let _ = writeln!(
                    svg,
                    "<text class=\"{class} value\" x=\"{x:.1}\" y=\"{y:.1}\" dy=\".35em\" text-anchor=\"middle\">{said}</text>"
                );
            }
        }
    }

    fn labels(&self, svg: &mut String, [left, top]: [f64; 2], cell: f64, text: f64) {
        for i in 0..self.rows.labels.len() {
            let (x, y, label) = (left - 6.0, top + (i as f64 + 0.5) * cell, escape(&self.rows.label(i)));
            let _ = writeln!(
                svg,
                "<text class=\"ink\" x=\"{x:.1}\" y=\"{y:.1}\" dy=\".35em\" text-anchor=\"end\">{label}</text>"
            );
        }
        for j in 0..self.columns.labels.len() {
            let (x, y) = (left + (j as f64 + 0.5) * cell + text * 0.35, top - 6.0);
            let label = escape(&self.columns.label(j));
            let _ = writeln!(
                svg,
                "<text class=\"ink\" x=\"{x:.1}\" y=\"{y:.1}\" transform=\"rotate(-90 {x:.1} {y:.1})\">{label}</text>"
            );
        }
    }

    fn rules(&self, svg: &mut String, [left, top]: [f64; 2], [right, bottom]: [f64; 2], cell: f64) {
        let mut line = |class: &str, [x1, y1, x2, y2]: [f64; 4]| {
            let _ =
                writeln!(svg, "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>");
        };
        for (axis, across) in [(self.rows, true), (self.columns, false)] {
            let mut at = |class: &str, place: usize| {
                let along = place as f64 * cell;
                let ends = if across {
                    [left, top + along, right, top + along]
                } else {
                    [left + along, top, left + along, bottom]
                };
                line(class, ends);
            };
            axis.group_ends().filter(|place| !axis.breaks.contains(place)).for_each(|place| at("thin", place));
            axis.breaks.iter().for_each(|&place| at("thick", place));
        }
    }

    fn legend(&self, svg: &mut String, [left, top]: [f64; 2]) {
        let step = 200.0 / LEGEND as f64;
        for i in 0..LEGEND {
            let (x, fill) = (left + i as f64 * step, shade(i as f64 / (LEGEND - 1) as f64));
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.2}\" y=\"{top:.1}\" width=\"{:.2}\" height=\"10\" fill=\"{fill}\"/>",
                step + 0.3
            );
        }
        let y = top + 24.0;
        for (x, anchor, value) in [(left, "start", self.range[0]), (left + 200.0, "end", self.range[1])] {
            let value = short(value);
            let _ = writeln!(
                svg,
                "<text class=\"ink\" x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"11\" text-anchor=\"{anchor}\">{value}</text>"
            );
        }
    }
}

impl Axis {
    /// The name of a row or column, with its group.
    fn label(&self, i: usize) -> String {
        self.groups.get(i).map_or_else(|| self.labels[i].clone(), |group| format!("{} · {group}", self.labels[i]))
    }

    /// Where the group changes.
    fn group_ends(&self) -> impl Iterator<Item = usize> {
        self.groups.windows(2).enumerate().filter(|(_, pair)| pair[0] != pair[1]).map(|(i, _)| i + 1)
    }
}

/// A value in three digits or so.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if size < 0.001 => format!("{value:.0e}"),
        size if size < 0.1 => format!("{value:.3}").replacen("0.", ".", 1),
        _ => format!("{value:.2}"),
    }
}

/// Texts and rules follow the reader's choice of light or dark; cells keep their colours.
const STYLE: &str = ".heatmap .ink{fill:#1b1b1f}.heatmap .on-light{fill:#111}.heatmap .on-dark{fill:#fff}\
    .heatmap .value{font-size:10px}.heatmap .void{fill:#808088;fill-opacity:.25}.heatmap .thin{stroke:#fff;stroke-width:1.5}\
    .heatmap .thick{stroke:#1b1b1f;stroke-width:2.5}\
    @media (prefers-color-scheme:dark){.heatmap .ink{fill:#e6e6ea}.heatmap .thick{stroke:#e6e6ea}}";

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(labels: &[&str], groups: &[usize]) -> Axis {
        Axis { labels: labels.iter().map(|&label| label.into()).collect(), groups: groups.into(), breaks: Vec::new() }
    }

    #[test]
    fn a_map_has_a_cell_for_each_pair_and_names_what_is_not_defined() {
        let (rows, columns) = (axis(&["a<b", "c"], &[1, 2]), axis(&["x", "y", "z"], &[]));
        let values = |i: usize, j: usize| (i + j > 0).then_some((i * 3 + j) as f64 / 10.0);
        let map = Heatmap { title: "t & u", rows: &rows, columns: &columns, values: &values, range: [0.5, 0.0] };
        let svg = map.to_svg();
        assert_eq!(svg.matches("<title>").count(), 6);
        assert!(
            svg.contains("a&lt;b × x: not defined") && svg.contains("c × z: 0.500000") && svg.contains("t &amp; u")
        );
        assert_eq!(svg.matches("class=\"thin\"").count(), 1, "a rule where the group of rows changes");
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }

    #[test]
    fn values_stay_short() {
        let said = [0.0, 0.00012, 0.0123, 0.5, -0.25].map(short);
        assert_eq!(said, ["0", "1e-4", ".012", "0.50", "-0.25"]);
    }
}
