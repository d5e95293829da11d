//! A report as data: text, tables and plots in order, rendered for a terminal or as one HTML page.

use crate::plot::Plot;
use crate::svg::escape;
use std::fmt::Write;

/// A report.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Its title.
    pub title: String,
    /// What it holds, in order.
    pub blocks: Vec<Block>,
}

/// A part of a report.
#[derive(Clone, Debug, PartialEq)]
pub enum Block {
    /// A paragraph.
    Text(String),
    /// A table.
    Table(Table),
    /// A plot.
    Plot(Plot),
}

/// A table; the first column and those named in `left` are text, the others numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Above it.
    pub title: String,
    /// Names of columns.
    pub columns: Vec<String>,
    /// Cells, a row each.
    pub rows: Vec<Vec<String>>,
    /// Columns aligned left besides the first.
    pub left: Vec<usize>,
}

impl Table {
    /// An empty table.
    pub fn new(title: &str, columns: &[&str]) -> Table {
        Table {
            title: title.into(),
            columns: columns.iter().map(|c| c.to_string()).collect(),
            ..Table::default()
        }
    }

    /// The table with another row.
    pub fn row(mut self, cells: impl IntoIterator<Item = impl Into<String>>) -> Table {
        self.push(cells);
        self
    }

    /// Adds a row.
    pub fn push(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// The table with `columns` aligned left.
    pub fn left(mut self, columns: &[usize]) -> Table {
        self.left = columns.to_vec();
        self
    }

    fn is_left(&self, column: usize) -> bool {
        column == 0 || self.left.contains(&column)
    }

    /// In characters, at most `width` wide if its text columns can be folded so far.
    pub fn to_text(&self, width: usize) -> String {
        let cell = |row: &[String], i: usize| row.get(i).cloned().unwrap_or_default();
        let long = |i: usize| {
            let body = self.rows.iter().map(|r| cell(r, i).chars().count());
            body.chain([self.columns[i].chars().count()]).max().unwrap_or(0)
        };
        let mut widths: Vec<usize> = (0..self.columns.len()).map(long).collect();
        let total = |w: &[usize]| w.iter().sum::<usize>() + 2 * w.len().saturating_sub(1);
        // The widest text column gives way first, down to a readable minimum.
        while total(&widths) > width {
            let widest =
                (0..widths.len()).filter(|i| self.is_left(*i) && widths[*i] > 12).max_by_key(|i| widths[*i]);
            match widest {
                Some(i) => widths[i] -= (total(&widths) - width).min(widths[i] - 12),
                None => break,
            }
        }
        let mut out = String::new();
        if !self.title.is_empty() {
            let _ = writeln!(out, "{}", self.title);
        }
        let mut line = |cells: &[String]| {
            let folded: Vec<Vec<String>> = (0..widths.len())
                .map(|i| fold(&cell(cells, i), if self.is_left(i) { widths[i] } else { 999 }))
                .collect();
            let height = folded.iter().map(Vec::len).max().unwrap_or(1);
            for k in 0..height {
                let text: Vec<String> = (0..widths.len())
                    .map(|i| {
                        let part = folded[i].get(k).map_or("", String::as_str);
                        if self.is_left(i) {
                            format!("{part:<0$}", widths[i])
                        } else {
                            format!("{part:>0$}", widths[i])
                        }
                    })
                    .collect();
                let _ = writeln!(out, "{}", text.join("  ").trim_end());
            }
        };
        line(&self.columns);
        line(&widths.iter().map(|w| "─".repeat(*w)).collect::<Vec<_>>());
        for row in &self.rows {
            line(row);
        }
        out
    }

    fn to_html(&self) -> String {
        let class = |i: usize| if self.is_left(i) { "" } else { " class=\"n\"" };
        let mut out = String::from("<figure>");
        if !self.title.is_empty() {
            let _ = write!(out, "<figcaption>{}</figcaption>", escape(&self.title));
        }
        out += "<div class=\"wide\"><table><thead><tr>";
        for (i, c) in self.columns.iter().enumerate() {
            let _ = write!(out, "<th{}>{}</th>", class(i), escape(c));
        }
        out += "</tr></thead><tbody>";
        for row in &self.rows {
            out += "<tr>";
            for (i, c) in row.iter().enumerate() {
                let _ = write!(out, "<td{}>{}</td>", class(i), escape(c));
            }
            out += "</tr>";
        }
        out + "</tbody></table></div></figure>"
    }
}

/// `text` in lines of at most `width` characters, broken at spaces; a longer word stays whole.
fn fold(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let last = lines.last_mut().expect("starts with one");
        if !last.is_empty() && last.chars().count() + 1 + word.chars().count() > width {
            lines.push(word.to_string());
        } else {
            if !last.is_empty() {
                last.push(' ');
            }
            last.push_str(word);
        }
    }
    lines
}

const PAGE_STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1c1c1c;--soft:#5c5c5c;--page:#fdfdfc;--card:#fff;--rule:#e3e3e0;--head:#f4f4f1}\
@media(prefers-color-scheme:dark){:root{--ink:#ececec;--soft:#a8a8a8;--page:#161618;--card:#1e1e21;--rule:#35353a;\
--head:#27272b}}\
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,'Segoe UI',sans-serif}\
main{max-width:860px;margin:0 auto;padding:2.2rem 1.2rem 3rem}h1{font-size:1.6rem;line-height:1.25;margin:0 0 1.2rem}\
p{max-width:46rem;margin:.8rem 0}figure{margin:1.6rem 0}figcaption{font-weight:600;margin-bottom:.5rem}\
.wide{overflow-x:auto;border:1px solid var(--rule);border-radius:8px;background:var(--card)}\
table{border-collapse:collapse;width:100%;font-size:.92rem}th,td{padding:.42rem .75rem;text-align:left;\
border-bottom:1px solid var(--rule);vertical-align:top}tbody tr:last-child td{border-bottom:0}\
th{background:var(--head);font-weight:600}.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}\
.plot{border:1px solid var(--rule);border-radius:8px;background:var(--card);padding:.6rem}.plot svg{display:block;\
width:100%;height:auto}footer{color:var(--soft);font-size:.85rem;margin-top:2.5rem}";

impl Report {
    /// An empty report.
    pub fn new(title: impl Into<String>) -> Report {
        Report { title: title.into(), blocks: Vec::new() }
    }

    /// Adds a paragraph.
    pub fn text(&mut self, text: impl Into<String>) {
        self.blocks.push(Block::Text(text.into()));
    }

    /// Adds a table.
    pub fn table(&mut self, table: Table) {
        self.blocks.push(Block::Table(table));
    }

    /// Adds a plot.
    pub fn plot(&mut self, plot: Plot) {
        self.blocks.push(Block::Plot(plot));
    }

    /// For a terminal `width` columns wide.
    pub fn to_text(&self, width: usize) -> String {
        let mut out = format!("{}\n", fold(&self.title, width).join("\n"));
        for block in &self.blocks {
            out.push('\n');
            match block {
                Block::Text(text) => {
                    let _ = writeln!(out, "{}", fold(text, width).join("\n"));
                }
                Block::Table(table) => out += &table.to_text(width),
                Block::Plot(plot) => out += &plot.to_text(width, 16),
            }
        }
        out
    }

    /// One self-contained page, light or dark as the reader's system is.
    pub fn to_html(&self) -> String {
        let mut body = String::new();
        for block in &self.blocks {
            let _ = match block {
                Block::Text(text) => write!(body, "<p>{}</p>", escape(text)),
                Block::Table(table) => write!(body, "{}", table.to_html()),
                Block::Plot(plot) => write!(body, "<figure class=\"plot\">{}</figure>", plot.to_svg()),
            };
        }
        format!(
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
             content=\"width=device-width,initial-scale=1\"><title>{0}</title><style>{PAGE_STYLE}</style></head>\
             <body><main><h1>{0}</h1>{body}<footer>sparsam {1}</footer></main></body></html>\n",
            escape(&self.title),
            env!("CARGO_PKG_VERSION")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        Table::new("Costs", &["what", "USD", "why"])
            .row(["a", "1", "a long explanation that has to be folded to fit the width of the terminal"])
            .row(["bb", "1000", "short <b>"])
            .left(&[2])
    }

    #[test]
    fn text_tables_align_and_fold() {
        let text = table().to_text(40);
        assert!(text.lines().all(|l| l.chars().count() <= 40), "{text}");
        let want = "\
Costs
what   USD  why
────  ────  ────────────────────────────
a        1  a long explanation that has
            to be folded to fit the
            width of the terminal
bb    1000  short <b>
";
        assert_eq!(text, want);
    }

    #[test]
    fn html_is_one_page_without_outside_parts() {
        let mut report = Report::new("Plan & cost");
        report.text("1 < 2");
        report.table(table());
        let html = report.to_html();
        assert!(html.contains("<title>Plan &amp; cost</title>") && html.contains("1 &lt; 2"));
        assert!(html.contains("short &lt;b&gt;") && html.contains("prefers-color-scheme:dark"));
        assert!(!html.contains("src=") && !html.contains("href="));
        assert_eq!(html.matches("<td").count(), 6);
    }
}
