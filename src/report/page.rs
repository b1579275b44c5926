//! One HTML page that needs nothing else: no script, no other file.

use std::fmt::Write;

use super::table::Grid;

/// A page that is being written.
pub struct Page {
    title: String,
    body: String,
}

impl Page {
    /// A page with this heading.
    pub fn new(title: &str) -> Self {
        Page { title: title.into(), body: format!("<h1>{}</h1>\n", escape(title)) }
    }

    /// A section begins.
    pub fn section(&mut self, title: &str) -> &mut Self {
        let _ = writeln!(self.body, "<h2>{}</h2>", escape(title));
        self
    }

    /// A paragraph of plain text.
    pub fn text(&mut self, text: &str) -> &mut Self {
        let _ = writeln!(self.body, "<p>{}</p>", escape(text));
        self
    }

    /// A text whose lines and spaces stay as they are.
    pub fn listing(&mut self, text: &str) -> &mut Self {
        let _ = writeln!(self.body, "<pre class=\"wide\">{}</pre>", escape(text));
        self
    }

    /// A table, whose first column is text.
    pub fn table(&mut self, grid: &Grid) -> &mut Self {
        let cells = |tag: &str, cells: &[String]| {
            let cells = cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell)));
            format!("<tr>{}</tr>\n", cells.collect::<String>())
        };
        let rows: String = grid.rows.iter().map(|row| cells("td", row)).collect();
        let head = cells("th", &grid.columns);
        let _ = writeln!(
            self.body,
            "<div class=\"wide\"><table>\n<thead>{head}</thead>\n<tbody>\n{rows}</tbody>\n</table></div>"
        );
        self
    }

    /// A picture, as SVG.
    pub fn picture(&mut self, svg: &str) -> &mut Self {
        let _ = writeln!(self.body, "<figure class=\"wide\">{svg}</figure>");
        self
    }

    /// The page.
    pub fn to_html(&self) -> String {
        let Page { title, body } = self;
        let title = escape(title);
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
             content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n\
             <body>\n<main>\n{body}</main>\n</body>\n</html>\n"
        )
    }
}

/// Text that means itself in HTML and SVG.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const STYLE: &str = "\
    :root{color-scheme:light dark;--ink:#1b1b1f;--soft:#62626b;--line:#d9d9e0;--paper:#fff}\
    @media (prefers-color-scheme:dark){:root{--ink:#e6e6ea;--soft:#a0a0aa;--line:#3a3a42;--paper:#17171a}}\
    body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}\
    main{max-width:72rem;margin:0 auto;padding:2rem 1.25rem 4rem}\
    h1{font-size:1.6rem;margin:0 0 .5rem}h2{font-size:1.15rem;margin:2.5rem 0 .5rem}\
    p{max-width:46rem;color:var(--soft);margin:.5rem 0}\
    pre{font-size:.8125rem;color:var(--soft)}\
    .wide{overflow-x:auto;margin:1rem 0}\
    table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}\
    th,td{padding:.25rem .75rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}\
    th{color:var(--soft);font-weight:600}th:first-child,td:first-child{text-align:left;padding-left:0}";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_whole_and_escapes_its_texts() {
        let grid = Grid { columns: vec!["a".into(), "b".into()], rows: vec![vec!["<x>".into(), "1".into()]] };
        let mut page = Page::new("A & B");
        page.section("S").text("1 < 2").table(&grid).picture("<svg></svg>");
        let html = page.to_html();
        for part in ["<title>A &amp; B</title>", "<td>&lt;x&gt;</td>", "1 &lt; 2", "<svg></svg>", "</html>"] {
            assert!(html.contains(part), "{part}");
        }
        assert!(!html.contains("http"), "no other resource");
    }
}
