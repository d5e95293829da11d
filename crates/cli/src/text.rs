//! What commands print with: tables, sizes, durations, and JSON.

use std::io::{IsTerminal, Write};
use std::time::Duration;

/// Writes `text` and a line end to stdout.
///
/// # Errors
/// If stdout is closed; `main` takes that for the end.
pub fn say(text: impl std::fmt::Display) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}

/// Writes `value` as JSON to stdout, indented.
///
/// # Errors
/// As [`say`].
pub fn say_json(value: &serde_json::Value) -> anyhow::Result<()> {
    say(serde_json::to_string_pretty(value)?)
}

/// Whether to draw bars and colours on stderr: on a terminal only.
pub fn live() -> bool {
    std::io::stderr().is_terminal()
}

/// Whether stdout may be coloured: a terminal, and `NO_COLOR` is not set.
pub fn coloured() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// A bar on stderr for `total` units of work, with rate and time left; hidden without a terminal.
pub fn bar(total: u64, what: &str) -> indicatif::ProgressBar {
    let target = if live() {
        indicatif::ProgressDrawTarget::stderr()
    } else {
        indicatif::ProgressDrawTarget::hidden()
    };
    let style =
        indicatif::ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len}  {per_sec}  {eta} left")
            .expect("the template is written here")
            .progress_chars("=> ");
    indicatif::ProgressBar::with_draw_target(Some(total), target)
        .with_style(style)
        .with_message(what.to_string())
}

/// `98.4 MB` (powers of ten, three digits).
pub fn bytes(n: usize) -> String {
    scaled(n as f64, 1000.0, &["B", "kB", "MB", "GB", "TB", "PB"], " ")
}

/// `134.5M` (powers of ten, three to four digits).
pub fn count(n: usize) -> String {
    scaled(n as f64, 1000.0, &["", "K", "M", "B", "T"], "")
}

fn scaled(x: f64, base: f64, units: &[&str], space: &str) -> String {
    let mut value = x;
    let mut unit = 0;
    while value >= base * 0.9995 && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 999.5 { 0 } else { 1 };
    format!("{value:.digits$}{space}{}", units[unit])
}

/// `0.32 s`, `4 min 05 s`, `2 h 03 min`.
pub fn duration(d: Duration) -> String {
    let s = d.as_secs_f64();
    if s < 9.995 {
        return format!("{s:.2} s");
    }
    if s < 60.0 {
        return format!("{s:.1} s");
    }
    let whole = d.as_secs();
    if whole < 3600 {
        return format!("{} min {:02} s", whole / 60, whole % 60);
    }
    format!("{} h {:02} min", whole / 3600, whole % 3600 / 60)
}

/// Rows in columns as wide as their widest cell: the first to the left, the others to the right.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let columns = head.len();
    let width = |c: usize| {
        let cells = rows.iter().map(|r| r[c].chars().count());
        cells.chain([head[c].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |cells: &[&str]| {
        let mut out = String::new();
        for (c, cell) in cells.iter().enumerate() {
            let pad = " ".repeat(widths[c] - cell.chars().count());
            if c == 0 { out += &format!("{cell}{pad}") } else { out += &format!("  {pad}{cell}") }
        }
        out.trim_end().to_string()
    };
    let mut out = line(head);
    for row in rows {
        out += "\n";
        out += &line(&row.iter().map(String::as_str).collect::<Vec<_>>());
    }
    out
}

/// A size such as `70MB`, `1.5 GiB` or plain bytes.
pub fn parse_bytes(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "kib" => 1024.0,
        "mib" => 1_048_576.0,
        "gib" => 1_073_741_824.0,
        _ => return Err(format!("{unit:?} is no unit; write MB, GB, MiB or GiB")),
    };
    match number.parse::<f64>() {
        Ok(n) if n > 0.0 && (n * factor).is_finite() => Ok((n * factor) as usize),
        _ => Err("write a number and a unit, such as 70MB".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_people_write_them() {
        assert_eq!(bytes(98_362_432), "98.4 MB");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(999_960), "1.0 MB");
        assert_eq!(count(134_515_008), "134.5M");
        assert_eq!(count(0), "0");
        assert_eq!(duration(Duration::from_millis(321)), "0.32 s");
        assert_eq!(duration(Duration::from_millis(9_996)), "10.0 s");
        assert_eq!(duration(Duration::from_secs(245)), "4 min 05 s");
        assert_eq!(duration(Duration::from_secs(7399)), "2 h 03 min");
    }

    #[test]
    fn tables_are_as_wide_as_their_cells() {
        let rows = [vec!["a".to_string(), "10".to_string()], vec!["long".to_string(), "1".to_string()]];
        assert_eq!(table(&["name", "n"], &rows), "name   n\na     10\nlong   1");
    }
}
