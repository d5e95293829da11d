//! `sparsam distill teach`: a student learns from a teacher's answers.

use super::ask::TaskArgs;
use crate::expected::{self, Rate};
use crate::ledger::Ledger;
use crate::load::positive;
use crate::{model, text};
use anyhow::{Context, bail};
use serde_json::json;
use sparsam_distill::ask;
use sparsam_distill::record::{self, Record};
use sparsam_distill::stats;
use sparsam_distill::student::{Student, Variant};
use sparsam_distill::teach::{self, Config, Progress};
use sparsam_dtype::DType;
use sparsam_engine::Opened;
use sparsam_plan::forecast::{Forecast, Interval};
use std::collections::HashSet;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Teach a small model a teacher's answers and reasons
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam distill teach small.gguf --answers answers.jsonl --task arithmetic --held-back 0.25 --out student
  sparsam distill teach small.gguf --answers answers.jsonl --task arithmetic --held-back 0.25 --variant label-only \\
      --out control

Then: sparsam distill eval problems.jsonl --task arithmetic --held-back 0.25 --model student --model control")]
pub struct Args {
    /// The student: a model as `sparsam run` takes it
    model: String,
    /// A teacher's answers, as `ask` and `import` write them (may be given several times)
    #[arg(long, value_name = "FILE.jsonl", required = true)]
    answers: Vec<PathBuf>,
    #[command(flatten)]
    task: TaskArgs,
    /// What to learn: label-only, rationale-first or step-by-step
    #[arg(long, default_value = "step-by-step", value_name = "NAME", value_parser = variant)]
    variant: Variant,
    /// Folder for the student
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Learn the true answers instead of the teacher's
    #[arg(long)]
    true_labels: bool,
    /// Leave out answers of which it is known that they are wrong
    #[arg(long)]
    only_right: bool,
    #[command(flatten)]
    split: Split,
    /// The share of the other questions that is learnt from
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    share: f64,
    /// Times that each question is seen
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    epochs: u32,
    /// The highest learning rate
    #[arg(long, default_value_t = 1e-4, value_name = "RATE")]
    lr: f64,
    /// Tokens of a step
    #[arg(long, default_value_t = 1024, value_name = "N", value_parser = positive)]
    step_tokens: usize,
    /// The share of the loss that reasons have (step-by-step)
    #[arg(long, default_value_t = 0.5, value_name = "P")]
    rationale_weight: f64,
    /// Of the order of the questions, and of which are learnt from where --share is below 1
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads (0: all cores)
    #[arg(long, short = 't', default_value_t = 0)]
    threads: usize,
    /// Type of the student's weights: F32, F16 or BF16
    #[arg(long = "type", default_value = "F32", value_name = "TYPE", value_parser = weight_type)]
    dtype: DType,
    /// Teach for some seconds, throw the student away, and say what all would take
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Which questions are held back: the same in every file and every command, by the question's own id.
#[derive(clap::Args, Clone, Copy)]
pub struct Split {
    /// The part of the questions that is held back to evaluate on
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    held_back: f64,
    /// Seed of that choice
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    split_seed: u64,
}

impl Split {
    /// Whether the question is held back.
    pub fn holds(&self, id: &str) -> bool {
        stats::place(self.split_seed, "held back", id) < self.held_back
    }

    /// # Errors
    /// If the part is none.
    pub fn check(&self) -> anyhow::Result<()> {
        if !(0.0..1.0).contains(&self.held_back) {
            bail!("--held-back is {}: from 0 to below 1 is possible", self.held_back);
        }
        Ok(())
    }

    /// Whether a student was taught with another split, so that it may have seen these questions.
    pub fn differs(&self, student: &Student) -> bool {
        self.ten_thousandths() != student.held_back || self.split_seed != student.split_seed
    }

    /// Whether anything is held back.
    pub fn any(&self) -> bool {
        self.held_back > 0.0
    }

    fn ten_thousandths(&self) -> u32 {
        (self.held_back * 1e4).round() as u32
    }
}

fn variant(name: &str) -> Result<Variant, String> {
    Variant::ALL
        .into_iter()
        .find(|v| v.name() == name)
        .ok_or_else(|| "label-only, rationale-first or step-by-step is wanted".into())
}

fn weight_type(name: &str) -> Result<DType, String> {
    DType::from_name(name)
        .filter(|d| [DType::F32, DType::F16, DType::BF16].contains(d))
        .ok_or_else(|| "F32, F16 or BF16 is wanted".into())
}

/// What is learnt from: the majority of each file's answers, without what is held back.
fn chosen(args: &Args, kind: sparsam_distill::question::Kind) -> anyhow::Result<Vec<Record>> {
    let mut seen = HashSet::new();
    let mut records = Vec::new();
    for file in &args.answers {
        let mut of = ask::majority(kind, &record::read(file)?);
        of.retain(|r| {
            !args.split.holds(&r.id)
                && stats::place(args.seed, "share", &r.id) < args.share
                && !(args.only_right && r.right == Some(false))
                && seen.insert(r.id.clone())
        });
        records.extend(of);
    }
    Ok(records)
}

pub fn run(args: Args) -> anyhow::Result<()> {
    if args.dry_run {
        let forecast = trial(&args, 1.0)?;
        let machine = expected::machine(args.threads, &args.out);
        return expected::show(&forecast, &machine, "teaching", json!({}), args.json);
    }
    teach(&args, None).map(|_| ())
}

/// Teaches for some seconds and throws the student away; what it takes to teach `times` as many answers.
///
/// # Errors
/// Those of teaching.
pub fn trial(args: &Args, times: f64) -> anyhow::Result<Forecast> {
    teach(args, Some(times))?.context("a trial ends with a forecast")
}

/// What teaching takes, weights and moments in f32 and the saved student, when `seconds` are known.
fn forecast(args: &Args, opened: &Opened, seconds: Interval, ledger: &Ledger) -> anyhow::Result<Forecast> {
    let parameters = opened.model.n_parameters()? as f64;
    let memory = expected::measured(4.0 * parameters, 8.0 * parameters);
    let disk = parameters * args.dtype.bits() / 8.0 + 2e7;
    Ok(Forecast::timed("distill teach", seconds, memory, disk, ledger.machine()))
}

/// Teaches a student; with `trial`, for some seconds, and gives the forecast for that many times the answers.
fn teach(args: &Args, trial: Option<f64>) -> anyhow::Result<Option<Forecast>> {
    let began = Instant::now();
    args.split.check()?;
    if !(args.share > 0.0 && args.share <= 1.0) {
        bail!("--share is {}: above 0 and up to 1 is possible", args.share);
    }
    if args.out.exists() {
        bail!("{}: is there already; choose another --out", args.out.display());
    }
    let template = args.task.template()?;
    let records = chosen(args, template.task)?;
    let lessons = teach::lessons(&records, args.true_labels)?;
    let base = model::resolve(&args.model)?;
    let opened = sparsam_engine::open(&base)?;
    let mut ledger = Ledger::new("distill teach", expected::machine(args.threads, &args.out), began);
    ledger.parent("base", &base);
    for file in &args.answers {
        ledger.parent("answers", file);
    }
    let config = Config {
        variant: args.variant,
        epochs: args.epochs,
        lr: args.lr,
        step_tokens: args.step_tokens,
        rationale_weight: args.rationale_weight,
        seed: args.seed,
        threads: args.threads,
    };
    eprintln!(
        "{} questions, {} epochs, {}, learning rate {}, {} tokens a step",
        lessons.len(),
        config.epochs,
        config.variant.name(),
        config.lr,
        config.step_tokens
    );
    let stopped = super::catch_interrupt()?;
    let mut bar = None;
    let mut metrics: Vec<u8> = Vec::new();
    let mut last = None;
    let mut start = Instant::now();
    let (mut rate, mut time) = (Rate::new(), None);
    let taught = teach::teach(&opened, &template, &lessons, &config, &mut |p: Progress| {
        let bar = bar.get_or_insert_with(|| text::bar(p.steps, "teaching"));
        bar.set_position(p.step);
        let line = json!({"step": p.step, "loss": p.loss, "grad_norm": p.grad_norm, "tokens": p.tokens});
        let _ = writeln!(metrics, "{line}");
        if p.step == 1 {
            // The first step also makes room in memory; rates count from there.
            start = Instant::now();
        }
        last = Some((p, start.elapsed()));
        let steps = p.steps as f64 * trial.unwrap_or(1.0);
        time = time.or_else(|| rate.after(p.step as f64 / steps, &ledger));
        let told = trial.is_some() && time.is_some();
        !stopped.load(Ordering::Relaxed) && !told
    })?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    if let Some(times) = trial {
        // All was taught within the trial: that is what it takes, as often as is asked for.
        let whole = || Interval::around(ledger.elapsed(), 0.0).times(times);
        return forecast(args, &opened, time.unwrap_or_else(whole), &ledger).map(Some);
    }
    if let Some(seconds) = time {
        ledger.expect(forecast(args, &opened, seconds, &ledger)?);
    }
    taught.save(&opened, &args.out, args.dtype)?;
    let student = Student {
        variant: args.variant,
        task: template.task,
        held_back: args.split.ten_thousandths(),
        split_seed: args.split.split_seed,
    };
    student.save(&args.out)?;
    let file = args.out.join("metrics.jsonl");
    std::fs::write(&file, metrics).with_context(|| format!("{}: cannot be written", file.display()))?;
    let Some((p, time)) = last else { return Ok(None) };
    let comparison = ledger.finish(&args.out, Some(p.tokens as f64))?;
    let rate = p.tokens as f64 * (p.step - 1) as f64 / p.step as f64 / time.as_secs_f64();
    if args.json {
        text::say_json(&json!({
            "questions": lessons.len(),
            "steps": p.step,
            "loss": p.loss,
            "tokens": p.tokens,
            "tokens_per_second": rate,
            "folder": args.out.display().to_string(),
        }))?;
        return Ok(None);
    }
    if p.step < p.steps {
        text::say(format!("stopped behind step {} of {}", p.step, p.steps))?;
    }
    text::say(format!(
        "{}: {} steps, {} tokens, {rate:.0} tokens a second, loss {:.4}",
        args.out.display(),
        p.step,
        p.tokens,
        p.loss
    ))?;
    if let Some(table) = comparison {
        text::say(format_args!("\n{}", table.to_text(100).trim_end()))?;
    }
    Ok(None)
}
