//! Tables for a terminal.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

/// A table before it is shown somewhere; the first column is text, the others are numbers.
#[derive(Clone, Debug, Default)]
pub struct Grid {
    /// Names of the columns.
    pub columns: Vec<String>,
    /// A cell for each column.
    pub rows: Vec<Vec<String>>,
}

impl Grid {
    /// An empty table with these columns.
    pub fn new<T: Into<String>>(columns: impl IntoIterator<Item = T>) -> Self {
        Grid { columns: columns.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// The same with these rows.
    pub fn with_rows(self, rows: impl IntoIterator<Item = Vec<String>>) -> Self {
        Grid { rows: rows.into_iter().collect(), ..self }
    }

    /// For a terminal.
    pub fn to_text(&self) -> String {
        let columns: Vec<&str> = self.columns.iter().map(String::as_str).collect();
        table(&columns, self.rows.iter().cloned())
    }
}

/// A table with these column names; the first column is text, the others are numbers.
pub fn table(columns: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns).add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.trim_fmt()
}
