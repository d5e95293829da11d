//! `sparsam eval --task`: the share of questions that a model answers right, in its own words or among given choices.

mod choices;

use crate::load::{Load, positive};
use crate::text;
use anyhow::{Context, bail};
use serde_json::{Value, json};
use sparsam_engine::{Reading, Task, ask};
use std::io::{BufRead, BufReader};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A task and how its answers are read.
#[derive(clap::Args)]
#[command(next_help_heading = "Task")]
pub struct TaskArgs {
    /// JSON lines with a question and its answer, which the model is to write
    #[arg(long, value_name = "FILE", conflicts_with = "perplexity")]
    pub task: Option<PathBuf>,
    /// The keys of question and answer in each line
    #[arg(
        long,
        value_name = "QUESTION,ANSWER",
        value_delimiter = ',',
        default_value = "question,answer",
        requires = "task"
    )]
    fields: Vec<String>,
    /// The answer is the first group (or all) of the last match in what is written, and in the answer where it matches
    /// there (default: everything that is written)
    #[arg(long, value_name = "REGEX", requires = "task", conflicts_with = "equation")]
    answer_regex: Option<String>,
    /// What is written is a sum, whose value is the answer
    #[arg(long, requires = "task")]
    equation: bool,
    /// Tokens of an answer at most
    #[arg(long, value_name = "N", value_parser = positive, default_value_t = 256, requires = "task")]
    max_tokens: usize,
    /// Only the first N questions
    #[arg(long, value_name = "N", value_parser = positive, requires = "task")]
    questions: Option<usize>,
    /// Questions that are answered at a time
    #[arg(long, value_name = "N", value_parser = positive, default_value_t = 8, requires = "task")]
    at_once: usize,
    /// Each line holds choices under this key: the one that the model holds likeliest is its answer, as in
    /// lm-evaluation-harness (the right answer is a choice's text, its letter, or its number from 0)
    #[arg(long, value_name = "KEY", requires = "task", conflicts_with_all = ["answer_regex", "equation"])]
    choices: Option<String>,
    /// What stands before a choice: {question}, {choices} for the list with letters, \n for a new line
    /// [default: 'Question: {question}\nAnswer:']
    #[arg(long, value_name = "TEXT", requires = "choices")]
    template: Option<String>,
    /// Measure the letters of the choices instead, which are listed before them
    #[arg(long, requires = "choices")]
    letters: bool,
    /// Print each question's answer and what was read in it
    #[arg(long, requires = "task")]
    show: bool,
}

pub fn run(args: &TaskArgs, model: &str, load: &Load, json: bool) -> anyhow::Result<()> {
    let Some(file) = &args.task else { bail!("give --perplexity FILE or --task FILE") };
    if let Some(key) = &args.choices {
        return choices::run(args, file, key, model, load, json);
    }
    let reading = match &args.answer_regex {
        Some(regex) => Reading::last(regex)?,
        None if args.equation => Reading::Equation,
        None => Reading::All,
    };
    let [question, answer] = &args.fields[..] else { bail!("--fields wants two names: QUESTION,ANSWER") };
    let task = Task::open(file, [question, answer], reading, args.questions.unwrap_or(usize::MAX))?;
    let questions = &task.questions;
    let longest = args.max_tokens + 1024;
    let engine = load.engine(model, None)?;
    let engine = match engine.context() {
        // Each of the places has the whole context: no more of it than questions and answers need.
        c if c > longest => load.engine(model, Some(longest))?,
        _ => engine,
    };
    eprintln!("{}", engine.describe());
    let bar = text::bar(questions.len() as u64, "questions");
    let start = Instant::now();
    let (mut done, mut right) = (0, 0);
    let how = (args.at_once.min(questions.len()), args.max_tokens);
    let answered = ask(&engine, &task, how, &mut |a| {
        (done, right) = (done + 1, right + a.right as usize);
        bar.set_position(done);
        bar.set_message(format!("{:.1}% right", 100.0 * right as f64 / done as f64));
        ControlFlow::Continue(())
    })?;
    bar.finish_and_clear();
    let (n, unread) = (answered.len(), answered.iter().filter(|a| a.read.is_none()).count());
    let (accuracy, error) = share(right, n);
    if json {
        let all: Vec<_> = answered
            .iter()
            .map(|a| json!({"question": a.index, "written": a.text, "read": a.read, "right": a.right}))
            .collect();
        return text::say_json(&json!({
            "accuracy": accuracy,
            "standard_error": error,
            "right": right,
            "questions": n,
            "unread": unread,
            "seconds": start.elapsed().as_secs_f64(),
            "runs_on": engine.describe(),
            "answers": if args.show { all } else { Vec::new() },
        }));
    }
    if args.show {
        for a in &answered {
            let mark = if a.right { "right" } else { "wrong" };
            let q = &questions[a.index];
            text::say(format_args!("{mark}  wanted {:?}, read {:?} in {:?}", q.answer, a.read, a.text))?;
        }
    }
    text::say(format_args!(
        "right          {:.1}% ± {:.1} ({right} of {n})",
        100.0 * accuracy,
        100.0 * error
    ))?;
    text::say(format_args!("without answer {unread}"))?;
    text::say(format_args!("time           {}", text::duration(start.elapsed())))
}

/// The share of `right` among `n` independent answers, and its standard error.
fn share(right: usize, n: usize) -> (f64, f64) {
    let share = right as f64 / n as f64;
    (share, (share * (1.0 - share) / n as f64).sqrt())
}

/// Text or number `key` of a line.
fn text_of(line: &Value, key: &str) -> anyhow::Result<String> {
    match &line[key] {
        Value::String(s) => Ok(s.clone()),
        Value::Number(n) => Ok(n.to_string()),
        _ => bail!("there is no text or number {key:?}; name the keys by --fields"),
    }
}

/// What `take` makes of each line of JSON; errors tell file and line.
fn lines<T>(file: &Path, take: impl Fn(&Value) -> anyhow::Result<T>) -> anyhow::Result<Vec<T>> {
    let open = std::fs::File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
    let mut all = Vec::new();
    for (i, line) in BufReader::new(open).lines().enumerate() {
        let at = || format!("{}: line {}", file.display(), i + 1);
        let line = line.with_context(at)?;
        if !line.trim().is_empty() {
            let value = serde_json::from_str(&line).with_context(at)?;
            all.push(take(&value).with_context(at)?);
        }
    }
    if all.is_empty() {
        bail!("{}: holds no question; one JSON object a line is expected", file.display());
    }
    Ok(all)
}
