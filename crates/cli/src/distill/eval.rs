//! `sparsam distill eval`: students, teachers and baselines on the same questions.

use super::ask::TaskArgs;
use super::teach::Split;
use crate::load::{Load, positive};
use crate::{model, text};
use anyhow::{Context, bail};
use sparsam_distill::ask;
use sparsam_distill::eval::{self, Contender};
use sparsam_distill::record;
use sparsam_distill::student::Student;
use sparsam_distill::teacher::Manner;
use std::path::PathBuf;

/// Compare students, teachers and baselines on the same questions
#[derive(clap::Args)]
#[command(after_help = "Example:
  sparsam distill eval svamp.jsonl --task arithmetic --held-back 0.25 \\
      --model student --model control=label-only --model before=small.gguf --answers teacher=answers.jsonl

The first is compared with each other. A model that `teach` made is asked as it was taught, any other one by the
template's worked examples.")]
pub struct Args {
    /// JSONL with `question` and `answer`
    questions: PathBuf,
    #[command(flatten)]
    task: TaskArgs,
    /// A model to be asked; NAME= before it names it in the report (may be given several times)
    #[arg(long, value_name = "[NAME=]MODEL")]
    model: Vec<String>,
    /// Recorded answers of `ask` or `import` (may be given several times)
    #[arg(long, value_name = "[NAME=]FILE")]
    answers: Vec<String>,
    #[command(flatten)]
    split: Split,
    /// Only the first questions
    #[arg(long, value_name = "N", value_parser = positive)]
    limit: Option<usize>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 160, value_name = "N", value_parser = positive)]
    max_tokens: usize,
    /// Questions under way at a time
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = positive)]
    parallel: usize,
    /// Tokens of the context
    #[arg(long, short = 'c', default_value_t = 1024, value_name = "N", value_parser = positive)]
    ctx: usize,
    /// Write a page with table, plot and examples
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    #[command(flatten)]
    load: Load,
    /// Print one JSON object, with every answer
    #[arg(long)]
    json: bool,
}

/// `NAME=REST` or REST, which then names itself.
fn named(text: &str) -> (&str, &str) {
    match text.split_once('=') {
        Some((name, rest)) if !name.is_empty() && !std::path::Path::new(text).exists() => (name, rest),
        _ => (text, text),
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    args.split.check()?;
    let template = args.task.template()?;
    let mut questions = args.task.questions(&args.questions, &template)?;
    if args.split.any() {
        questions.retain(|q| args.split.holds(&q.id));
    }
    questions.truncate(args.limit.unwrap_or(usize::MAX));
    if questions.is_empty() {
        bail!("{}: no question is left; hold more back, or give more", args.questions.display());
    }
    let manner = Manner { max_tokens: args.max_tokens, temperature: 0.0, parallel: args.parallel };
    let mut contenders: Vec<Contender> = Vec::new();
    for model in &args.model {
        let (name, model) = named(model);
        let path = model::resolve(model)?;
        let student = Student::open(&path)?;
        if let Some(s) = &student {
            if s.task != template.task {
                bail!(
                    "{model}: it was taught {} questions, these are {}",
                    s.task.name(),
                    template.task.name()
                );
            }
            if args.split.differs(s) {
                eprintln!(
                    "{name}: was taught with another --held-back or --split-seed: it may have seen these questions"
                );
            }
        }
        // A student of adapters is its base with them.
        let base = student.as_ref().and_then(|s| s.base.clone());
        let engine = match base {
            Some(base) => {
                let mut load = args.load.clone();
                load.adapter.push((path.clone(), 1.0));
                load.engine(&base.display().to_string(), Some(args.ctx))?
            }
            None => args.load.engine(model, Some(args.ctx))?,
        };
        let bar = text::bar(questions.len() as u64, name);
        let mut progress = |n: usize| bar.set_position(n as u64);
        contenders.push(eval::ask_model(
            name,
            &engine,
            student.as_ref(),
            &template,
            &questions,
            &manner,
            &mut progress,
        )?);
        bar.finish_and_clear();
    }
    for answers in &args.answers {
        let (name, file) = named(answers);
        let records = ask::majority(template.task, &record::read(file.as_ref())?);
        contenders.push(eval::recorded(name, template.task, &questions, &records)?);
    }
    let comparison = eval::compare(&questions, &contenders)?;
    let report = comparison.report();
    if let Some(file) = &args.report {
        std::fs::write(file, report.to_html())
            .with_context(|| format!("{}: cannot be written", file.display()))?;
    }
    match args.json {
        true => text::say_json(&comparison.to_json()),
        false => text::say(report.to_text(110)),
    }
}
