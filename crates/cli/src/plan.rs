//! `sparsam plan`: the bill before it comes. Each question is a file here; the arithmetic lives in the crate `plan`.

mod fit;
mod hardware;
mod memory;
mod serve;
mod subject;
mod sweep;
mod train;

use crate::text;
use anyhow::Context;
use clap::Subcommand;
use serde_json::Value;
use sparsam_formats::AtomicFile;
use sparsam_plan::report::{Block, Report};
use sparsam_plan::{Error, units};
use std::io::Write;
use std::path::{Path, PathBuf};

pub use hardware::Hardware;
pub use subject::by_name as model_by_name;

/// What a model will cost before it exists: how large, on how much text, for how much money, and what fits where
///
/// Pure arithmetic from published laws and data sheets; every constant names its source. Amounts are written as people
/// write them: 175B, 300e9, 1.5T, $4.6M, 80GB, 3e23, 30min.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    question: Question,
}

const EXAMPLES: &str = "\
Examples:
  sparsam plan train --usd $100 --hardware h100
  sparsam plan train --params 175B --tokens 300B --hardware v100
  sparsam plan memory llama-65b
  sparsam plan memory model.gguf --context 32k --hardware rtx-4090,h100
  sparsam plan serve llama-3-8b --hardware h100 --queries-per-day 1M
  sparsam plan sweep --flops 1e13 --unique 1.1M --out runs
  sparsam plan fit runs.csv";

#[derive(Subcommand)]
enum Question {
    Train(Box<train::Args>),
    Memory(memory::Args),
    Serve(serve::Args),
    Fit(fit::Args),
    Sweep(sweep::Args),
}

/// Answers a question of the plan.
///
/// # Errors
/// Amounts that make no sense, unknown names, files that cannot be read or written.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.question {
        Question::Train(args) => train::run(*args),
        Question::Memory(args) => memory::run(args),
        Question::Serve(args) => serve::run(args),
        Question::Fit(args) => fit::run(args),
        Question::Sweep(args) => sweep::run(args),
    }
}

/// How an answer is given.
#[derive(clap::Args)]
#[command(next_help_heading = "Output")]
pub struct Output {
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
    /// Also write the answer with its plots as one self-contained page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Also write the first plot as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// An answer: for people, and for programs.
pub struct Answer {
    /// Text, tables and plots.
    pub report: Report,
    /// The same as JSON.
    pub json: Value,
}

impl Output {
    /// Prints the answer and writes the files asked for.
    pub fn give(&self, answer: &Answer) -> anyhow::Result<()> {
        if let Some(path) = &self.html {
            write(path, &answer.report.to_html())?;
        }
        if let Some(path) = &self.svg {
            let plot = answer.report.blocks.iter().find_map(|b| match b {
                Block::Plot(plot) => Some(plot),
                _ => None,
            });
            let plot = plot.context("this answer has no plot; leave out --svg")?;
            write(path, &plot.to_svg())?;
        }
        if self.json {
            return text::say_json(&answer.json);
        }
        text::say(answer.report.to_text(width()).trim_end())?;
        for path in [&self.html, &self.svg].into_iter().flatten() {
            text::say(format!("\nwritten: {}", path.display()))?;
        }
        Ok(())
    }
}

/// Columns of the terminal; 100 where there is none. `COLUMNS` wins, within what can be read.
pub fn width() -> usize {
    let wanted = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok());
    wanted.unwrap_or(100).clamp(60, 160)
}

/// Writes `text` to `path`, whole or not at all.
pub fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(text.as_bytes()).with_context(|| format!("{}: cannot be written", path.display()))?;
    Ok(file.commit()?)
}

/// The text of `path`.
pub fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))
}

// Readers of amounts for clap, which shows their errors with the flag and exits with 2.

pub fn count_of(input: &str) -> Result<f64, Error> {
    units::count("amount", input)
}

fn parameters(input: &str) -> Result<f64, Error> {
    units::count("parameters", input)
}

pub fn tokens(input: &str) -> Result<f64, Error> {
    units::count("tokens", input)
}

fn flop(input: &str) -> Result<f64, Error> {
    units::flop("arithmetic", input)
}

pub fn usd(input: &str) -> Result<f64, Error> {
    units::usd("money", input)
}

/// A share: `0.6` or `60%`.
fn share(input: &str) -> Result<f64, Error> {
    let (number, factor) = match input.trim().strip_suffix('%') {
        Some(percent) => (percent, 0.01),
        None => (input, 1.0),
    };
    let share = units::count("share", number)? * factor;
    if share > 1.0 {
        return Err(Error::Number {
            what: "share",
            input: input.to_string(),
            why: "is more than the whole".into(),
            example: "a share such as 0.6 or 60%",
        });
    }
    Ok(share)
}

/// `2.5 to 3.1B`: both ends of an interval of counts.
fn span(show: fn(f64) -> String, (low, high): (f64, f64)) -> String {
    format!("{} to {}", show(low), show(high))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read_and_bounded() {
        assert_eq!(share("0.6").unwrap(), 0.6);
        assert!((share("60%").unwrap() - 0.6).abs() < 1e-12);
        assert!(share("1.2").unwrap_err().to_string().contains("more than the whole"));
        assert!(share("-10%").unwrap_err().to_string().contains("negative"));
    }
}
