//! `sparsam distill MODEL`: ask, teach and eval in order, with the control, from flags and one TOML file.

use super::{STOPPED, ask, eval, teach};
use crate::expected;
use anyhow::{Context, bail};
use clap::Parser;
use serde_json::json;
use sparsam_distill::record;
use sparsam_distill::student::Student;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use toml::{Table, Value};

/// What the three steps have in common; the rest is in the TOML file.
#[derive(clap::Args)]
pub struct Args {
    /// The student: a model as `sparsam run` takes it
    #[arg(required = true)]
    model: Option<String>,
    /// The teacher: a model as `sparsam run` takes it
    #[arg(long, value_name = "MODEL")]
    teacher: Option<String>,
    /// JSONL with `question`, `answer`, and `choices` where there are any
    #[arg(long, value_name = "FILE")]
    questions: Option<PathBuf>,
    /// Kind of answers: arithmetic, choice, nli, classification or free
    #[arg(long, value_name = "KIND")]
    task: Option<String>,
    /// Settings: `teacher`, `questions`, `task`, `held-back`, and tables `[ask]`, `[teach]` and `[eval]` whose keys are
    /// the flags of these commands
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// Folder for answers, students and report; where it exists, what is missing is done
    #[arg(long, value_name = "FOLDER", required = true)]
    out: Option<PathBuf>,
    /// Ask and teach for some seconds each, throw that away, and say what all would take
    #[arg(long)]
    dry_run: bool,
    /// With --dry-run: print one JSON object
    #[arg(long, requires = "dry_run")]
    json: bool,
}

/// A command's arguments on their own, so that a table of settings is read as strictly as a command line.
#[derive(Parser)]
struct Alone<A: clap::Args> {
    #[command(flatten)]
    args: A,
}

/// The keys of the file that are no tables.
const COMMON: [&str; 5] = ["teacher", "questions", "task", "held-back", "split-seed"];
const TABLES: [&str; 3] = ["ask", "teach", "eval"];

/// The settings of the file, overridden by flags.
fn settings(args: &Args) -> anyhow::Result<Table> {
    let mut table = match &args.config {
        None => Table::new(),
        Some(file) => {
            let text = std::fs::read_to_string(file)
                .with_context(|| format!("{}: cannot be read", file.display()))?;
            text.parse::<Table>().with_context(|| format!("{}: is not TOML", file.display()))?
        }
    };
    for (key, value) in &table {
        let known = COMMON.iter().chain(&TABLES).copied();
        let is_table = TABLES.contains(&key.as_str());
        if !COMMON.contains(&key.as_str()) && !is_table {
            let near = sparsam_plan::nearest(key, known)
                .map(|n| format!("; did you mean `{n}`?"))
                .unwrap_or_default();
            bail!("settings: unknown key `{key}`{near}");
        }
        if is_table != value.is_table() {
            bail!("settings: `{key}` must {}be a table", if is_table { "" } else { "not " });
        }
    }
    let flags = [
        ("teacher", args.teacher.clone()),
        ("questions", args.questions.as_ref().map(|q| q.display().to_string())),
        ("task", args.task.clone()),
    ];
    for (key, value) in flags {
        if let Some(value) = value {
            table.insert(key.into(), Value::String(value));
        }
    }
    // A fifth is the usual part to hold back, and without one nothing could be said of the student.
    table.entry("held-back").or_insert(Value::Float(0.2));
    Ok(table)
}

/// `key = value` as `--key value`, `true` as the flag alone.
fn flags(table: &Table) -> anyhow::Result<Vec<String>> {
    let mut out = Vec::new();
    for (key, value) in table {
        let values = match value {
            Value::Array(items) => items.clone(),
            other => vec![other.clone()],
        };
        for value in values {
            let text = match value {
                Value::Boolean(false) => continue,
                Value::Boolean(true) => {
                    out.push(format!("--{key}"));
                    continue;
                }
                Value::String(s) => s,
                Value::Integer(i) => i.to_string(),
                Value::Float(x) => x.to_string(),
                other => bail!("settings: {key} = {other} is neither text nor a number"),
            };
            out.push(format!("--{key}={text}"));
        }
    }
    Ok(out)
}

/// The arguments of a step: `words`, then its table.
fn step<A: clap::Args>(name: &str, settings: &Table, words: Vec<String>) -> anyhow::Result<A> {
    let mut line = vec![format!("[{name}]")];
    line.extend(words);
    if let Some(Value::Table(table)) = settings.get(name) {
        line.extend(flags(table)?);
    }
    // Clap would print its usage and exit with 2; a file of settings is no command line.
    Ok(Alone::<A>::try_parse_from(line)
        .map_err(|e| anyhow::anyhow!("settings, [{name}]: {}", e.to_string().trim()))?
        .args)
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let (Some(model), Some(out)) = (&args.model, &args.out) else { bail!("MODEL and --out are wanted") };
    let settings = settings(args)?;
    let text = |key: &str| match settings.get(key) {
        Some(Value::String(s)) => Ok(s.clone()),
        Some(other) => Ok(other.to_string()),
        None => Err(anyhow::anyhow!("--{key} is not given, nor is `{key}` in --config")),
    };
    let (questions, task) = (text("questions")?, text("task")?);
    let split = ["held-back", "split-seed"]
        .into_iter()
        .filter_map(|k| settings.get(k).map(|v| format!("--{k}={v}")))
        .collect::<Vec<_>>();
    // Where a dry run works; thrown away with it.
    let trial = args.dry_run.then(tempfile::tempdir).transpose()?;
    let out = trial.as_ref().map_or(out.as_path(), |folder| folder.path());
    std::fs::create_dir_all(out).with_context(|| format!("{}: cannot be created", out.display()))?;
    let at = |name: &str| out.join(name).display().to_string();
    let words = |list: &[&str]| list.iter().map(|w| w.to_string()).collect::<Vec<_>>();

    let answers = at("answers.jsonl");
    let task_flag = format!("--task={task}");
    let mut ask_words = words(&[&questions, &task_flag, &format!("--out={answers}")]);
    if let Some(Value::String(teacher)) = settings.get("teacher") {
        ask_words.push(format!("--teacher={teacher}"));
    }
    // All three are read before the first one runs: a mistake in the last must not cost the work of the first.
    let ask_args: ask::Args = step("ask", &settings, ask_words)?;
    let teach_args = |variant: &str| -> anyhow::Result<teach::Args> {
        let mut list =
            words(&[model, &task_flag, &format!("--answers={answers}"), &format!("--variant={variant}")]);
        list.push(format!("--out={}", at(variant)));
        list.extend(split.clone());
        step("teach", &settings, list)
    };
    let students = [("step-by-step", teach_args("step-by-step")?), ("label-only", teach_args("label-only")?)];
    let mut eval_words = words(&[&questions, &task_flag, &format!("--report={}", at("report.html"))]);
    for (name, _) in &students {
        eval_words.push(format!("--model={name}={}", at(name)));
    }
    eval_words.push(format!("--model=untaught={model}"));
    eval_words.push(format!("--answers=teacher={answers}"));
    eval_words.extend(split.clone());
    let eval_args: eval::Args = step("eval", &settings, eval_words)?;

    if args.dry_run {
        return dry_run(&ask_args, &students, Path::new(&answers), args);
    }
    let receipt = out.join("config.toml");
    std::fs::write(&receipt, format!("# sparsam distill {model}\n{settings}"))
        .with_context(|| format!("{}: cannot be written", receipt.display()))?;
    ask::run(ask_args)?;
    for (name, args) in students {
        if STOPPED.load(Ordering::Relaxed) {
            bail!("stopped; the same command goes on from here");
        }
        if Student::open(Path::new(&at(name)))?.is_some() {
            eprintln!("{}: is there already", at(name));
            continue;
        }
        teach::run(args)?;
    }
    if STOPPED.load(Ordering::Relaxed) {
        bail!("stopped; the same command goes on from here");
    }
    eval::run(eval_args)
}

/// What asking and teaching would take: some seconds of each, where it is thrown away.
fn dry_run(
    ask_args: &ask::Args,
    students: &[(&str, teach::Args)],
    answers: &Path,
    args: &Args,
) -> anyhow::Result<()> {
    let (mut forecast, total) = ask::trial(ask_args, answers)?;
    let asked = record::read(answers)?.len().max(1);
    for (_, student) in students {
        let teaching = teach::trial(student, total as f64 / asked as f64)?;
        forecast = forecast.then("distill", teaching);
    }
    let machine = expected::machine(0, args.out.as_deref().unwrap_or(Path::new(".")));
    let work = format!("{total} answers and {} students (without their evaluation)", students.len());
    expected::show(&forecast, &machine, &work, json!({"answers": total}), args.json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_as_strictly_as_a_command_line() {
        let table: Table = "[teach]\nepochs = 5\nonly-right = true\nlr = 0.001".parse().unwrap();
        let words =
            || vec!["m.gguf".into(), "--answers=a.jsonl".into(), "--out=o".into(), "--task=free".into()];
        assert!(step::<teach::Args>("teach", &table, words()).is_ok());
        let table: Table = "[teach]\nepoch = 5".parse().unwrap();
        let said = step::<teach::Args>("teach", &table, words()).err().unwrap().to_string();
        assert!(said.contains("[teach]") && said.contains("--epochs"), "{said}");
        assert_eq!(flags(&"a = [1, 2]\nb = false".parse().unwrap()).unwrap(), ["--a=1", "--a=2"]);
        assert!(flags(&"a = 1979-05-27".parse().unwrap()).is_err());
    }
}
