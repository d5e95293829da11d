//! `sparsam distill teach`: a student learns from a teacher's answers.

use super::ask::TaskArgs;
use crate::expected::{self, Rate};
use crate::ledger::Ledger;
use crate::load::positive;
use crate::train::ComputeName;
use crate::{model, text};
use anyhow::{Context, bail};
use serde_json::json;
use sparsam_distill::ask;
use sparsam_distill::record::{self, Record};
use sparsam_distill::soft::Teacher;
use sparsam_distill::stats;
use sparsam_distill::student::{Student, Variant};
use sparsam_distill::teach::{self, Config, Lesson, Teaching};
use sparsam_engine::{Engine, Opened, Options};
use sparsam_plan::forecast::{Forecast, Interval};
use sparsam_train::Event;
use sparsam_train::config::SaveAs;
use sparsam_train::lora::Method;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Teach a small model a teacher's answers and reasons
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam distill teach small.gguf --answers answers.jsonl --task arithmetic --held-back 0.25 --out student
  sparsam distill teach small.gguf --answers answers.jsonl --task arithmetic --held-back 0.25 --variant label-only \\
      --out control

The same command goes on where it was stopped or killed.
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
    /// The highest learning rate [default: 1e-4; with adapters, from the model's width]
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,
    /// What is trained: full (all weights), lora (adapters), or qlora (adapters over linear layers in NF4)
    #[arg(long, default_value = "full", value_name = "NAME", value_parser = method)]
    method: Method,
    /// Rank of adapters [default: 16]
    #[arg(long, value_name = "N")]
    rank: Option<usize>,
    /// Tokens of a step
    #[arg(long, default_value_t = 1024, value_name = "N", value_parser = positive)]
    step_tokens: usize,
    /// The share of the loss that reasons have (step-by-step)
    #[arg(long, default_value_t = 0.5, value_name = "P")]
    rationale_weight: f64,
    /// A local model of the same vocabulary whose probabilities of each token are learnt, too
    #[arg(long, value_name = "MODEL")]
    soft_labels: Option<String>,
    /// Their share of the loss [default: 0.5; all of it with --on-policy]
    #[arg(long, value_name = "P", requires = "soft_labels")]
    soft_share: Option<f64>,
    /// Which divergence from them is lowered: forward (cover all that the teacher may say) or reverse (keep to what it
    /// finds likely)
    #[arg(long, default_value = "forward", value_name = "KIND", value_parser = ["forward", "reverse"], requires = "soft_labels")]
    kl: String,
    /// The student first writes answers of its own, and learns the probabilities that --soft-labels gives in these
    #[arg(long, requires = "soft_labels")]
    on_policy: bool,
    /// Of the order of the questions, and of which are learnt from where --share is below 1
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Steps between checkpoints [default: a quarter of the run]
    #[arg(long, value_name = "N")]
    checkpoint_every: Option<u64>,
    /// Threads (0: all cores)
    #[arg(long, short = 't', default_value_t = 0)]
    threads: usize,
    /// What products are computed in; weights under training and moments stay f32
    #[arg(long, value_enum, default_value = "f32")]
    dtype: ComputeName,
    /// Type of the student's weights where all are trained: F32, F16 or BF16
    #[arg(long = "type", default_value = "F32", value_name = "TYPE", value_parser = weight_type)]
    save_as: SaveAs,
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

fn method(name: &str) -> Result<Method, String> {
    match name {
        "full" => Ok(Method::Full),
        "lora" => Ok(Method::Lora),
        "qlora" => Ok(Method::Qlora),
        _ => Err("full, lora or qlora is wanted".into()),
    }
}

fn weight_type(name: &str) -> Result<SaveAs, String> {
    let known = [SaveAs::F32, SaveAs::F16, SaveAs::Bf16];
    let of = known.into_iter().find(|s| s.dtype().name().eq_ignore_ascii_case(name));
    of.ok_or_else(|| "F32, F16 or BF16 is wanted".into())
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

/// What teaching takes when `seconds` are known: weights and moments in f32 and the saved student, or those of an adapter
/// of `trained` parameters.
fn forecast(
    args: &Args,
    parameters: f64,
    trained: f64,
    seconds: Interval,
    ledger: &Ledger,
) -> anyhow::Result<Forecast> {
    let (weights, saved) = match args.method {
        Method::Full => (4.0 * parameters, parameters * args.save_as.dtype().bits() / 8.0),
        Method::Lora | Method::Qlora => (4.0 * trained, 4.0 * trained),
    };
    let memory = expected::measured(weights, 8.0 * trained);
    Ok(Forecast::timed("distill teach", seconds, memory, saved + 2e7, ledger.machine()))
}

/// How the student is taught.
fn config(args: &Args) -> Config {
    Config {
        variant: args.variant,
        epochs: args.epochs,
        lr: args.lr,
        step_tokens: args.step_tokens,
        rationale_weight: args.rationale_weight,
        seed: args.seed,
        threads: args.threads,
        method: args.method,
        rank: args.rank,
        checkpoint_every: args.checkpoint_every,
        dtype: args.dtype.into(),
        save_as: args.save_as,
        on_policy: args.on_policy,
    }
}

/// Opens the student and begins to teach it in `out`, or takes it up.
fn begin(args: &Args, out: &Path, opened: Opened, lessons: &[Lesson]) -> anyhow::Result<Teaching> {
    let engine = match &args.soft_labels {
        Some(name) => {
            let exact = Options { threads: args.threads, exact: true, ..Options::default() };
            Some(Engine::load(&model::resolve(name)?, &exact)?)
        }
        None => None,
    };
    let share = args.soft_share.unwrap_or(if args.on_policy { 1.0 } else { 0.5 });
    let soft = engine.as_ref().map(|engine| Teacher { engine, share, reverse: args.kl == "reverse" });
    Ok(teach::teach(out, opened, &args.task.template()?, lessons, &config(args), soft.as_ref())?)
}

/// Teaches a student; with `trial`, for some seconds, and gives the forecast for that many times the answers.
fn teach(args: &Args, trial: Option<f64>) -> anyhow::Result<Option<Forecast>> {
    let began = Instant::now();
    args.split.check()?;
    if !(args.share > 0.0 && args.share <= 1.0) {
        bail!("--share is {}: above 0 and up to 1 is possible", args.share);
    }
    if Student::open(&args.out)?.is_some() {
        bail!("{}: is there already; choose another --out", args.out.display());
    }
    if args.out.exists() && !args.out.join("run").exists() && args.out.read_dir()?.next().is_some() {
        bail!("{}: is a folder of something else; choose another --out", args.out.display());
    }
    // Where a trial works; thrown away with it.
    let thrown = trial.map(|_| tempfile::tempdir()).transpose()?;
    let out = thrown.as_ref().map_or(args.out.as_path(), |folder| folder.path());
    let template = args.task.template()?;
    let lessons = teach::lessons(&chosen(args, template.task)?, args.true_labels)?;
    let opened = sparsam_engine::open(&std::path::absolute(model::resolve(&args.model)?)?)?;
    let base = opened.source.path().to_path_buf();
    let parameters = opened.model.n_parameters()? as f64;
    let mut ledger = Ledger::new("distill teach", expected::machine(args.threads, &args.out), began);
    ledger.parent("base", &base);
    for file in &args.answers {
        ledger.parent("answers", file);
    }
    let mut teaching = begin(args, out, opened, &lessons)?;
    let s = teaching.run.settings().clone();
    eprintln!(
        "{} questions, {} epochs, {}, learning rate {}, {} steps of {} tokens",
        lessons.len(),
        args.epochs,
        args.variant.name(),
        s.schedule.lr,
        s.steps,
        args.step_tokens
    );
    let before = teaching.run.progress().step;
    if before > 0 {
        eprintln!("going on behind step {before}");
    }
    let trained = teaching.run.receipt().parameters as f64;
    let (stopped, stop) = (super::catch_interrupt()?, AtomicBool::new(false));
    let bar = text::bar(s.steps, "teaching");
    // The first step also makes room in memory; rates count from there.
    let (mut tokens, mut seconds, mut loss, mut last) = (0.0, 0.0, f64::NAN, None);
    let (mut rate, mut time) = (Rate::new(), None);
    let finished = teaching.run.go(&stop, &mut |event| match event {
        Event::Step(r) => {
            bar.set_position(r.step);
            loss = r.loss;
            if let Some(last) = last.replace(r.seconds) {
                (tokens, seconds) =
                    (tokens + r.tokens_per_second * (r.seconds - last), seconds + r.seconds - last);
            }
            let share = (r.step - before) as f64 / ((s.steps - before) as f64 * trial.unwrap_or(1.0));
            time = time.or_else(|| rate.after(share, &ledger));
            let told = trial.is_some() && time.is_some();
            stop.fetch_or(told || stopped.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        Event::Note(note) => eprintln!("{note}"),
        _ => {}
    })?;
    bar.finish_and_clear();
    if let Some(times) = trial {
        // All was taught within the trial: that is what it takes, as often as is asked for.
        let whole = || Interval::around(ledger.elapsed(), 0.0).times(times);
        return forecast(args, parameters, trained, time.unwrap_or_else(whole), &ledger).map(Some);
    }
    if let Some(seconds) = time {
        ledger.expect(forecast(args, parameters, trained, seconds, &ledger)?);
    }
    let (step, rate) = (finished.progress.step, if seconds > 0.0 { tokens / seconds } else { 0.0 });
    if !finished.complete {
        text::say(format!("stopped behind step {step} of {}; the same command goes on", s.steps))?;
        return Ok(None);
    }
    teaching.finish(&finished)?;
    let student = Student {
        variant: args.variant,
        task: template.task,
        held_back: args.split.ten_thousandths(),
        split_seed: args.split.split_seed,
        base: (args.method != Method::Full).then_some(base),
    };
    student.save(&args.out)?;
    let comparison = ledger.finish(&args.out, Some(finished.progress.targets as f64))?;
    if args.json {
        text::say_json(&json!({
            "questions": lessons.len(),
            "steps": step,
            "loss": loss,
            "targets": finished.progress.targets,
            "tokens_per_second": rate,
            "folder": args.out.display().to_string(),
        }))?;
        return Ok(None);
    }
    text::say(format!("{}: {step} steps, {rate:.0} tokens a second, loss {loss:.4}", args.out.display()))?;
    if let Some(table) = comparison {
        text::say(format_args!("\n{}", table.to_text(100).trim_end()))?;
    }
    Ok(None)
}
