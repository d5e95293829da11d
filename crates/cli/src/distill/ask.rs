//! `sparsam distill ask` and `import`: a teacher's answers, from the teacher itself or from a file.

use crate::expected::{self, Rate};
use crate::ledger::Ledger;
use crate::load::{Load, positive};
use crate::{model, text};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use sparsam_distill::ask::{self, Plan, Summary};
use sparsam_distill::budget::{Budget, Prices, Purse, Tokens};
use sparsam_distill::question::{self, Kind, Question};
use sparsam_distill::record::Store;
use sparsam_distill::teacher::http::{Options, Server};
use sparsam_distill::teacher::local::Local;
use sparsam_distill::teacher::{Manner, Teacher};
use sparsam_distill::template::Template;
use sparsam_plan::forecast::{Forecast, Interval};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Ask a teacher for answers and reasons, and keep them line by line
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam distill ask problems.jsonl --teacher big.gguf --task arithmetic --out answers.jsonl
  sparsam distill ask quiz.jsonl --teacher big.gguf --task choice --samples 5 --temperature 0.7 --out a.jsonl
  OPENAI_API_KEY=... sparsam distill ask quiz.jsonl --teacher-url https://api.openai.com/v1 --teacher-model NAME \\
      --task choice --out a.jsonl --budget '$2.50' --usd-in 0.15 --usd-out 0.60

The same command goes on where it was stopped. Answers that cannot be taken apart go to OUT.malformed.jsonl.")]
pub struct Args {
    /// JSONL with `question` (or `premise` and `hypothesis`), and `choices` and `answer` where there are any
    questions: PathBuf,
    /// The teacher: a model as `sparsam run` takes it
    #[arg(
        long,
        value_name = "MODEL",
        required_unless_present = "teacher_url",
        conflicts_with = "teacher_url"
    )]
    teacher: Option<String>,
    #[command(flatten)]
    task: TaskArgs,
    /// Where the answers go
    #[arg(long, value_name = "FILE.jsonl")]
    out: PathBuf,
    /// Answers to each question; the majority counts
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    samples: u32,
    /// Divides the logits; 0 takes the likeliest token always (default: 0 for one answer, 0.7 for several)
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// The same seed gives the same answers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 160, value_name = "N", value_parser = positive)]
    max_tokens: usize,
    /// Questions under way at a time
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = positive)]
    parallel: usize,
    /// Spend at most this: tokens of prompts and answers (200k), or money ($2.50)
    #[arg(long, value_name = "TOKENS|MONEY")]
    budget: Option<Budget>,
    /// Only the first questions of the file
    #[arg(long, value_name = "N", value_parser = positive)]
    limit: Option<usize>,
    /// Put the question as text to be continued, not as a dialogue (always for models without a chat template)
    #[arg(long)]
    raw: bool,
    /// Tokens of the context
    #[arg(long, short = 'c', default_value_t = 1024, value_name = "N", value_parser = positive)]
    ctx: usize,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    load: Load,
    /// Ask for some seconds, throw the answers away, and say what all would take (a teacher on this machine alone)
    #[arg(long, conflicts_with = "teacher_url")]
    dry_run: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What kind of questions, and how they are put.
#[derive(clap::Args)]
pub struct TaskArgs {
    /// Kind of answers: arithmetic, choice, nli, classification or free
    #[arg(long, value_name = "KIND", value_parser = kind, required_unless_present = "template")]
    task: Option<Kind>,
    /// Worked examples of one's own, as TOML (see docs/distill.md)
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
}

fn kind(name: &str) -> Result<Kind, String> {
    Kind::ALL
        .into_iter()
        .find(|k| k.name() == name)
        .ok_or_else(|| "arithmetic, choice, nli, classification or free is wanted".into())
}

impl TaskArgs {
    /// The template that is meant.
    pub fn template(&self) -> anyhow::Result<Template> {
        let Some(file) = &self.template else {
            return Ok(Template::builtin(self.task.context("--task is not given")?));
        };
        let template = Template::open(file)?;
        if let Some(task) = self.task
            && task != template.task
        {
            bail!(
                "{}: the template is for {} questions, but --task says {}",
                file.display(),
                template.task.name(),
                task.name()
            );
        }
        Ok(template)
    }

    /// The questions in `path`, with the template's labels.
    pub fn questions(&self, path: &Path, template: &Template) -> anyhow::Result<Vec<Question>> {
        let questions = question::read(path, template.task)?;
        Ok(questions.into_iter().map(|q| template.complete(q)).collect())
    }
}

/// A teacher behind an OpenAI-compatible address.
#[derive(clap::Args)]
#[command(next_help_heading = "Server")]
struct ServerArgs {
    /// Address of an OpenAI-compatible server, up to and with /v1
    #[arg(long, value_name = "URL", requires = "teacher_model")]
    teacher_url: Option<String>,
    /// The teacher's name there
    #[arg(long, value_name = "NAME", requires = "teacher_url")]
    teacher_model: Option<String>,
    /// Environment variable that holds the key
    #[arg(long, default_value = "OPENAI_API_KEY", value_name = "NAME", overrides_with = "key_env")]
    key_env: String,
    /// Requests in a minute, at most
    #[arg(long, value_name = "N")]
    per_minute: Option<f64>,
    /// Attempts for each question
    #[arg(long, default_value_t = 6, value_name = "N")]
    attempts: u32,
    /// Seconds to wait for an answer
    #[arg(long, default_value_t = 120, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// Dollars for a million tokens of prompts
    #[arg(long, default_value_t = 0.0, value_name = "USD")]
    usd_in: f64,
    /// Dollars for a million tokens of answers
    #[arg(long, default_value_t = 0.0, value_name = "USD")]
    usd_out: f64,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    if !args.dry_run {
        return ask(&args, None).map(|_| ());
    }
    let folder = tempfile::tempdir()?;
    let (forecast, total) = trial(&args, &folder.path().join("answers.jsonl"))?;
    let machine = expected::machine(args.load.threads, &args.out);
    expected::show(&forecast, &machine, &format!("{total} answers"), json!({"answers": total}), args.json)
}

/// Asks for some seconds and keeps the answers in `answers`; what all would take, and how many answers that are.
///
/// # Errors
/// Those of asking.
pub fn trial(args: &Args, answers: &Path) -> anyhow::Result<(Forecast, usize)> {
    if args.server.teacher_url.is_some() {
        bail!("a dry run asks a teacher on this machine alone; what a server costs is bounded by --budget");
    }
    ask(args, Some(answers))?.context("a trial ends with a forecast")
}

/// Asks what is not there yet; with `trial`, for some seconds, into that file, and gives the forecast.
fn ask(args: &Args, trial: Option<&Path>) -> anyhow::Result<Option<(Forecast, usize)>> {
    let start = Instant::now();
    let template = args.task.template()?;
    let mut questions = args.task.questions(&args.questions, &template)?;
    questions.truncate(args.limit.unwrap_or(usize::MAX));
    let temperature = args.temperature.unwrap_or(if args.samples > 1 { 0.7 } else { 0.0 });
    let manner = Manner { max_tokens: args.max_tokens, temperature, parallel: args.parallel };
    let plan = Plan { template, samples: args.samples, seed: args.seed, raw: args.raw, manner };
    let mut ledger = Ledger::new("distill ask", expected::machine(args.load.threads, &args.out), start);
    match (&args.teacher, &args.server.teacher_url) {
        (Some(name), _) => {
            ledger.parent("teacher", &model::resolve(name)?);
            let engine = args.load.engine(name, Some(args.ctx))?;
            eprintln!("{}", engine.describe());
            let raw = args.raw || engine.tokenizer()?.chat_template().is_none();
            let asking = Asking { args, trial, ledger, weights: engine.weights().bytes() as f64 };
            asking.with(&mut Local::new(&engine, name), &questions, &Plan { raw, ..plan })
        }
        (None, Some(url)) => {
            let s = &args.server;
            let mut server = Server::new(Options {
                url: url.clone(),
                model: s.teacher_model.clone().unwrap_or_default(),
                key: std::env::var(&s.key_env).ok().filter(|k| !k.is_empty()),
                attempts: s.attempts,
                back_off: Duration::from_secs(1),
                per_minute: s.per_minute,
                timeout: Duration::from_secs(s.timeout),
            })?;
            ledger.parent("teacher", server.name().as_ref());
            let asking = Asking { args, trial, ledger, weights: 0.0 };
            asking.with(&mut server, &questions, &plan)
        }
        (None, None) => bail!("no teacher is given; name one with --teacher or --teacher-url"),
    }
}

/// A teacher about to be asked.
struct Asking<'a> {
    args: &'a Args,
    trial: Option<&'a Path>,
    ledger: Ledger,
    /// Bytes of the teacher's weights, if it runs here.
    weights: f64,
}

impl Asking<'_> {
    fn with(
        mut self,
        teacher: &mut dyn Teacher,
        questions: &[Question],
        plan: &Plan,
    ) -> anyhow::Result<Option<(Forecast, usize)>> {
        let args = self.args;
        // What changes answers. The number of questions is left out: more may be asked later.
        let settings = json!({
            "teacher": teacher.name(),
            "task": plan.template.task,
            "template": format!("{:016x}", hash(&format!("{:?}", plan.template))),
            "raw": plan.raw,
            "temperature": plan.manner.temperature,
            "max_tokens": plan.manner.max_tokens,
            "seed": plan.seed,
        });
        let prices = Prices { prompt: args.server.usd_in, completion: args.server.usd_out };
        let out = self.trial.unwrap_or(&args.out);
        let mut store = Store::open(out, &settings)?;
        let before = ask::summarise(plan.template.task, store.records());
        let spent = Tokens { prompt: before.prompt_tokens, completion: before.completion_tokens };
        let mut purse = Purse::new(args.budget, prices, spent, before.usd)?;
        if before.answers > 0 {
            eprintln!("{}: {} answers are there already", out.display(), before.answers);
            self.ledger.resume();
        }
        let total = (questions.len() * plan.samples as usize).saturating_sub(before.answers);
        let bar = text::bar(total as u64, "asking");
        let stopped = super::catch_interrupt()?;
        let start = Instant::now();
        let (mut rate, mut forecast) = (Rate::new(), None);
        let mut progress = |n: usize| {
            bar.set_position(n as u64);
            if let Some(seconds) = rate.after(n as f64 / total.max(1) as f64, &self.ledger) {
                forecast = Some(self.forecast(seconds, total, n, out));
            }
            let told = self.trial.is_some() && forecast.is_some();
            !stopped.load(Ordering::Relaxed) && !told
        };
        let summary = ask::ask(teacher, questions, plan, &mut store, &mut purse, &mut progress)?;
        bar.finish_and_clear();
        if self.trial.is_some() {
            // All were asked within the trial: that is what it takes.
            let seconds = Interval::around(self.ledger.elapsed(), 0.0);
            let forecast = forecast.unwrap_or_else(|| self.forecast(seconds, total, summary.new, out));
            return Ok(Some((forecast, total)));
        }
        let wall = start.elapsed();
        if let (Some(budget), true) = (args.budget, summary.unasked > 0) {
            eprintln!(
                "{} answers were not asked for: the budget of {budget} leaves no room",
                summary.unasked
            );
        }
        if let Some(forecast) = forecast {
            self.ledger.expect(forecast);
        }
        self.ledger.pay(summary.usd - before.usd);
        let tokens = (summary.prompt_tokens + summary.completion_tokens) as f64;
        // What is there already was paid for by an earlier run, or by nobody.
        let comparison = if summary.new > 0 { self.ledger.finish(out, Some(tokens))? } else { None };
        if args.json {
            let mut value = serde_json::to_value(&summary)?;
            value["seconds"] = json!(wall.as_secs_f64());
            value["answers_per_second"] = json!(summary.new as f64 / wall.as_secs_f64());
            text::say_json(&value)?;
            return Ok(None);
        }
        text::say(describe(&summary))?;
        if summary.new > 0 {
            text::say(format!(
                "{} in {}: {:.2} answers a second",
                summary.new,
                text::duration(wall),
                summary.new as f64 / wall.as_secs_f64()
            ))?;
        }
        if let Some(table) = comparison {
            text::say(format_args!("\n{}", table.to_text(100).trim_end()))?;
        }
        Ok(None)
    }

    /// What `total` answers take, `n` of which are in `out`.
    fn forecast(&self, seconds: Interval, total: usize, n: usize, out: &Path) -> Forecast {
        let written = std::fs::metadata(out).map_or(0.0, |m| m.len() as f64);
        let disk = written * (total as f64 / n.max(1) as f64).max(1.0) * 1.5 + 1e5;
        let memory = expected::measured(self.weights, 0.0);
        Forecast::timed("distill ask", seconds, memory, disk, self.ledger.machine())
    }
}

/// FNV-1a.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3))
}

fn describe(s: &Summary) -> String {
    let mut out = format!("{} answers to {} questions, {} malformed", s.answers, s.questions, s.malformed);
    if s.known > 0 {
        let share = 100.0 * s.right as f64 / s.known as f64;
        out += &format!("; {} of {} right ({share:.1}%)", s.right, s.known);
    }
    if s.prompt_tokens > 0 {
        out += &format!("; {} prompt and {} answer tokens", s.prompt_tokens, s.completion_tokens);
    }
    if s.usd > 0.0 {
        out += &format!(", ${:.4}", s.usd);
    }
    out
}

/// Take a teacher's raw text from a file (field `teacher`) apart, as `ask` would have
#[derive(clap::Args)]
#[command(after_help = "Example:
  sparsam distill import svamp.jsonl --task arithmetic --out answers.jsonl")]
pub struct ImportArgs {
    /// JSONL with `question` and `teacher`, and `choices` and `answer` where there are any
    questions: PathBuf,
    #[command(flatten)]
    task: TaskArgs,
    /// Where the answers go; answers that cannot be taken apart go to OUT.malformed.jsonl
    #[arg(long, value_name = "FILE.jsonl")]
    out: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn import(args: ImportArgs) -> anyhow::Result<()> {
    let template = args.task.template()?;
    let questions = args.task.questions(&args.questions, &template)?;
    let settings = json!({ "imported": args.questions.display().to_string(), "task": template.task });
    let mut store = Store::open(&args.out, &settings)?;
    let mut records =
        ask::import(&questions, &template).with_context(|| args.questions.display().to_string())?;
    records.retain(|r| !store.has(&r.id, r.sample));
    let new = records.len();
    store.add(records)?;
    let summary = Summary { new, ..ask::summarise(template.task, store.records()) };
    match args.json {
        true => text::say_json(&serde_json::to_value(&summary).unwrap_or(Value::Null)),
        false => text::say(describe(&summary)),
    }
}
