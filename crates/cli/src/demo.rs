//! `sparsam demo`: all six savings on one small model, each with its before and after.
//!
//! The demo runs the commands that a person would type, each in a process of its own, and reads their `--json`: what it
//! shows can be repeated by hand in the folder that it leaves.

mod half;
mod steps;
mod texts;

use crate::plan::{self, width};
use crate::{model, text};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use sparsam_plan::plot::Plot;
use sparsam_plan::report::{Report, Table};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// All six savings on a small model in about two minutes, each with its before and after
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sparsam demo                                      on the built-in model
  sparsam demo --model model.gguf --out my-demo     on one of your own; larger ones take longer

OUT keeps what was made (models, texts, answers) and report.html. Every line that begins with $ is a command that can be
typed in that folder.")]
pub struct Args {
    /// The model: a GGUF file, a safetensors file or folder, or ORG/NAME of the hub's cache
    #[arg(long, value_name = "MODEL", default_value = "builtin")]
    model: String,
    /// Folder for what is made, which must not be there yet
    #[arg(long, value_name = "OUT", default_value = "sparsam-demo")]
    out: PathBuf,
    /// Threads (0: all cores)
    #[arg(long, short = 't', default_value_t = 0)]
    threads: usize,
    /// A tenth of the work: shows the commands, hardly the savings
    #[arg(long)]
    quick: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// One saving, shown.
struct Saving {
    /// What is saved on.
    name: &'static str,
    /// Who found it.
    source: &'static str,
    /// Without and with it.
    before: String,
    after: String,
    /// By how much, for people.
    saved: String,
    /// What it costs in quality.
    cost: String,
    /// For the page.
    plots: Vec<Plot>,
    /// All figures.
    figures: Value,
}

/// Where the demo works, and with what.
struct Stage {
    program: PathBuf,
    folder: PathBuf,
    /// The model, in GGUF.
    model: PathBuf,
    threads: String,
    quick: bool,
    /// The commands so far.
    typed: Vec<String>,
}

impl Stage {
    /// The one for `--quick`, or the other.
    fn either<T>(&self, quick: T, whole: T) -> T {
        if self.quick { quick } else { whole }
    }

    /// Runs `sparsam` with these words and `--json` in the demo's folder, shows the line, and gives the answer.
    ///
    /// # Errors
    /// If it fails, with what it said.
    fn ask(&mut self, words: &[&str]) -> anyhow::Result<Value> {
        let line = line(words);
        eprintln!("  $ {line}");
        self.typed.push(line);
        self.ask_again(words)
    }

    /// As [`Stage::ask`], for one of many lines that differ little: it is not shown.
    ///
    /// # Errors
    /// As [`Stage::ask`].
    fn ask_again(&self, words: &[&str]) -> anyhow::Result<Value> {
        let line = line(words);
        let out = Command::new(&self.program)
            .args(words)
            .arg("--json")
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("{line}: cannot be started"))?;
        let said = String::from_utf8_lossy(&out.stderr);
        if !out.status.success() {
            let why: Vec<&str> = said.lines().rev().take(5).collect();
            bail!("{line}: {}", why.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        let answer = String::from_utf8_lossy(&out.stdout);
        if answer.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&answer).with_context(|| format!("{line}: its answer is no JSON: {answer}"))
    }

    fn write(&self, name: &str, content: &str) -> anyhow::Result<()> {
        plan::write(&self.folder.join(name), content)
    }

    fn bytes(&self, name: &str) -> anyhow::Result<f64> {
        let path = self.folder.join(name);
        Ok(std::fs::metadata(&path).with_context(|| path.display().to_string())?.len() as f64)
    }
}

/// The command as it can be typed.
fn line(words: &[&str]) -> String {
    format!("sparsam {}", words.iter().map(|w| quoted(w)).collect::<Vec<_>>().join(" "))
}

/// A word as a shell wants it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_string();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// The number at `path` of an answer, such as `fact.seconds`.
fn number(value: &Value, path: &str) -> anyhow::Result<f64> {
    let found = path.split('.').fold(value, |v, key| match key.parse::<usize>() {
        Ok(i) => &v[i],
        Err(_) => &v[key],
    });
    found.as_f64().with_context(|| format!("the answer holds no number `{path}`: {value}"))
}

/// Runs the demo and prints its table.
///
/// # Errors
/// If the folder is there already, or a command fails.
pub fn run(args: Args) -> anyhow::Result<()> {
    let start = Instant::now();
    if args.out.exists() {
        bail!("{}: is there already; remove it, or name another folder with --out", args.out.display());
    }
    let given = std::path::absolute(model::resolve(&args.model)?)?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("{}: cannot be made", args.out.display()))?;
    let folder = args.out.canonicalize()?;
    let program = std::env::current_exe().context("the program does not know where it lies")?;
    let mut stage = Stage {
        program,
        folder,
        model: given.clone(),
        threads: args.threads.to_string(),
        quick: args.quick,
        typed: vec![],
    };
    if !is_gguf(&given) {
        stage.ask(&["convert", &given.to_string_lossy(), "model.gguf"])?;
        stage.model = stage.folder.join("model.gguf");
    }
    let mut savings = Vec::new();
    for (i, (name, step)) in steps::ALL.iter().enumerate() {
        eprintln!("{}/{} {name}", i + 1, steps::ALL.len());
        let began = Instant::now();
        let saving = step(&mut stage)?;
        eprintln!("  {} -> {} ({})", saving.before, saving.after, text::duration(began.elapsed()));
        savings.push(saving);
    }
    let report = report(&args.model, &stage, &savings, &text::duration(start.elapsed()));
    plan::write(&stage.folder.join("report.html"), &report.to_html())?;
    if args.json {
        let rows = savings.iter().map(|s| {
            json!({
                "name": s.name, "source": s.source, "before": s.before, "after": s.after, "saved": s.saved,
                "cost": s.cost, "figures": s.figures,
            })
        });
        return text::say_json(&json!({
            "model": args.model,
            "seconds": start.elapsed().as_secs_f64(),
            "savings": rows.collect::<Vec<_>>(),
            "report": stage.folder.join("report.html"),
        }));
    }
    eprintln!();
    let mut table = table(&args.model, &savings);
    // What it costs takes lines of its own where columns are narrow.
    table.columns.pop();
    table.rows.iter_mut().for_each(|row| drop(row.pop()));
    text::say(table.to_text(width().max(100)).trim_end())?;
    text::say("\nWhat it costs")?;
    savings.iter().try_for_each(|s| text::say(format_args!("{:<9}  {}", s.name, s.cost)))?;
    text::say(format_args!(
        "\n{} in all; report: {}",
        text::duration(start.elapsed()),
        args.out.join("report.html").display()
    ))
}

fn is_gguf(path: &Path) -> bool {
    path.is_file() && path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

fn table(model: &str, savings: &[Saving]) -> Table {
    let columns = ["saving", "before", "after", "saved", "what it costs"];
    let mut table =
        Table::new(&format!("Six savings, and the model at work ({model})"), &columns).left(&[1, 2, 3, 4]);
    for s in savings {
        table.push([s.name, &s.before, &s.after, &s.saved, &s.cost]);
    }
    table
}

fn report(model: &str, stage: &Stage, savings: &[Saving], time: &str) -> Report {
    let mut report = Report::new("What sparsam saves");
    report.table(table(model, savings));
    report.text(format!(
        "Measured on this machine in {time}. Speeds and memory are those of the commands below; what a small model shows \
         in seconds is the direction, not the size, of what a large one would."
    ));
    for s in savings {
        s.plots.iter().cloned().for_each(|plot| report.plot(plot));
    }
    let mut sources = Table::new("Where they come from", &["saving", "source"]).left(&[1]);
    for s in savings {
        sources.push([s.name, s.source]);
    }
    report.table(sources);
    let mut typed = Table::new("What was typed", &["", "in the demo's folder"]).left(&[1]);
    for (i, line) in stage.typed.iter().enumerate() {
        typed.push([(i + 1).to_string(), line.clone()]);
    }
    report.table(typed);
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_can_be_typed_as_they_are_shown() {
        assert_eq!(quoted("--size=3M"), "--size=3M");
        assert_eq!(quoted("Once upon"), "'Once upon'");
        assert_eq!(quoted("don't"), "'don'\\''t'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn numbers_are_found_by_their_path() {
        let value = json!({"a": [{"b": 2.5}], "c": null});
        assert_eq!(number(&value, "a.0.b").unwrap(), 2.5);
        assert!(number(&value, "c").unwrap_err().to_string().contains("no number `c`"));
    }
}
