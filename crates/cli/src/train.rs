//! `sparsam train`: from text to a model.

use crate::expected::{self, Expected};
use crate::ledger::Ledger;
use crate::{model, probe, text};
use anyhow::bail;
use clap::ValueEnum;
use serde_json::json;
use sparsam_plan::units;
use sparsam_runtime::{Alone, Group};
use sparsam_train::config::{Arch, Compute, Config, OptimiserConfig, OptimiserKind, SaveAs};
use sparsam_train::metrics::StepRecord;
use sparsam_train::schedule::Form;
use sparsam_train::{Event, Run};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Seconds between lines of progress where there is no terminal for a bar.
const QUIET_SECONDS: u64 = 10;

/// Train a model on text: a new one of any size, or one to continue with
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam train --data input.txt --arch llama --size 1.5M --tokenizer bpe:2048 --out runs/first
  sparsam train --data docs.jsonl --arch gpt2 --size 124M --tokenizer ./gpt2 --ctx 1024 --tokens 1B --out runs/gpt2
  sparsam train --data input.txt --from SmolLM2-135M.gguf --steps 200 --out runs/more
  sparsam train --config run.toml --out runs/second --lr 1e-3
  sparsam train --resume runs/first

The folder of a run holds config.toml (all settings, derived ones included; give it back with --config to make the same
run), metrics.jsonl, checkpoints/ and report.html; at the end the model as model.gguf and in Hugging Face's layout as
model/. Ctrl-C stops at the next step with a checkpoint; --resume goes on bit
for bit.")]
pub struct Args {
    /// Settings as TOML; flags override them
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The folder of the run, which must not hold one yet
    #[arg(long, value_name = "DIR", required_unless_present_any = ["resume", "dry_run"])]
    out: Option<PathBuf>,
    /// Go on with the run in this folder, from its newest checkpoint
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "config", "data", "from", "arch", "size"])]
    resume: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
    /// Train for some seconds in a folder that is thrown away, and say what the whole run would take
    #[arg(long, conflicts_with = "resume")]
    dry_run: bool,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
    /// Print what the compiler did before training
    #[arg(long)]
    explain: bool,
}

/// Settings as flags, each as in the configuration.
#[derive(clap::Args)]
struct Flags {
    /// Text files, .jsonl files, or token files (.bin with 16-bit tokens, .u32)
    #[arg(long, value_name = "FILE", num_args = 1..)]
    data: Vec<PathBuf>,
    /// Files to evaluate on; without them a part of the data is held back
    #[arg(long, value_name = "FILE", num_args = 1..)]
    held_back: Vec<PathBuf>,
    /// Part of the data that is held back [default: 0.05]
    #[arg(long, value_name = "PART")]
    held_back_part: Option<f64>,
    /// Key of the text in .jsonl files [default: text]
    #[arg(long)]
    field: Option<String>,
    /// bytes, bpe:SIZE (learnt from the data), or a tokenizer.json or its folder [default: bytes]
    #[arg(long)]
    tokenizer: Option<String>,
    /// A file with the chat template that a new model shall have
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Tokens in a row [default: 256]
    #[arg(long)]
    ctx: Option<usize>,
    /// A model to continue with
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["arch", "size"])]
    from: Option<String>,
    /// Architecture of a new model [default: llama]
    #[arg(long)]
    arch: Option<ArchName>,
    /// Parameters of a new model: 1.5M, 124M
    #[arg(long)]
    size: Option<String>,
    /// Layers of a new model
    #[arg(long)]
    layers: Option<usize>,
    /// Width of a new model
    #[arg(long)]
    hidden: Option<usize>,
    /// Its attention heads
    #[arg(long)]
    heads: Option<usize>,
    /// Its heads for keys and values
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Width inside its MLP
    #[arg(long)]
    intermediate: Option<usize>,
    /// Optimiser steps [default: 20 tokens for each parameter, at most 16 epochs]
    #[arg(long, conflicts_with = "tokens")]
    steps: Option<u64>,
    /// Tokens to see instead: 100M
    #[arg(long)]
    tokens: Option<String>,
    /// Rows in a micro-batch [default: 4096 tokens' worth]
    #[arg(long)]
    batch: Option<usize>,
    /// Micro-batches in a step [default: 1]
    #[arg(long)]
    accumulate: Option<usize>,
    /// What changes the weights [default: adamw]
    #[arg(long, alias = "optimiser")]
    optimizer: Option<OptimizerName>,
    /// Highest learning rate [default: from the number of parameters]
    #[arg(long)]
    lr: Option<f64>,
    /// Lowest, at the end [default: a tenth of --lr]
    #[arg(long)]
    min_lr: Option<f64>,
    /// Curve of the learning rate [default: cosine]
    #[arg(long)]
    schedule: Option<ScheduleName>,
    /// Steps of its warm-up [default: a hundredth of the run]
    #[arg(long)]
    warmup: Option<u64>,
    /// Decay of matrices [default: 0.1]
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Largest norm of the gradients; 0 for none [default: 1]
    #[arg(long)]
    clip: Option<f64>,
    /// Of everything random [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// Steps between evaluations [default: a twentieth of the run]
    #[arg(long)]
    eval_every: Option<u64>,
    /// Steps between samples; 0 for none [default: a fifth of the run]
    #[arg(long)]
    sample_every: Option<u64>,
    /// What samples begin with
    #[arg(long, value_name = "TEXT")]
    sample_prompt: Option<String>,
    /// Steps between checkpoints [default: as evaluations]
    #[arg(long)]
    checkpoint_every: Option<u64>,
    /// Type of the weights in the model that is saved at the end [default: f32]
    #[arg(long)]
    save_as: Option<SaveAsName>,
    /// Run the first N steps a second time without the compiler, and compare
    #[arg(long, value_name = "N")]
    verify: Option<u64>,
    /// Run node by node, without the compiler
    #[arg(long)]
    eager: bool,
    /// What products are computed in; weights and moments stay f32 [default: f32]
    #[arg(long)]
    dtype: Option<ComputeName>,
    /// What weights, moments, gradients and activations may take together, such as 1.9GB: forward values are computed
    /// again until it fits
    #[arg(long, value_name = "SIZE", conflicts_with = "eager")]
    memory: Option<String>,
    /// Threads; 0 for all cores [default: 0]
    #[arg(long)]
    threads: Option<usize>,
    /// What the machine costs an hour, in dollars
    #[arg(long, value_name = "USD")]
    usd_per_hour: Option<f64>,
}

/// `--arch`.
#[derive(Clone, Copy, ValueEnum)]
pub enum ArchName {
    /// RMS norm, rotary positions, SwiGLU
    Llama,
    /// Layer norm, learned positions, GELU
    Gpt2,
}

impl From<ArchName> for Arch {
    fn from(name: ArchName) -> Arch {
        match name {
            ArchName::Llama => Arch::Llama,
            ArchName::Gpt2 => Arch::Gpt2,
        }
    }
}

/// `--dtype`.
#[derive(Clone, Copy, ValueEnum)]
pub enum ComputeName {
    /// 32-bit floats
    F32,
    /// Operands rounded to 8 bits, sums in f32
    Bf16,
}

impl From<ComputeName> for Compute {
    fn from(name: ComputeName) -> Compute {
        match name {
            ComputeName::F32 => Compute::F32,
            ComputeName::Bf16 => Compute::Bf16,
        }
    }
}

/// `--optimizer`.
#[derive(Clone, Copy, ValueEnum)]
pub enum OptimizerName {
    /// Adam with decoupled weight decay
    Adamw,
    /// The same with moments in blocks of 8 bits: 2 bytes for each weight instead of 8, those of embeddings and small ones
    /// aside
    #[value(name = "adamw8bit", alias = "adamw_8bit", alias = "adamw-8bit")]
    Adamw8bit,
    /// AdamW whose moments lie in a file in the run's folder: where memory is short, the system keeps them there
    #[value(alias = "paged_adamw", alias = "paged_adamw_32bit", alias = "paged-adamw-32bit")]
    PagedAdamw,
    /// The same in 8 bits
    #[value(
        name = "paged-adamw8bit",
        alias = "paged_adamw8bit",
        alias = "paged_adamw_8bit",
        alias = "paged-adamw-8bit"
    )]
    PagedAdamw8bit,
    /// Orthogonal updates of the matrices between layers, AdamW for the rest
    Muon,
}

impl OptimizerName {
    /// Puts what is given in the place of what `o` says.
    pub fn apply(given: Option<OptimizerName>, o: &mut OptimiserConfig) {
        let Some(name) = given else { return };
        let (kind, paged) = match name {
            OptimizerName::Adamw => (OptimiserKind::Adamw, false),
            OptimizerName::Adamw8bit => (OptimiserKind::Adamw8bit, false),
            OptimizerName::PagedAdamw => (OptimiserKind::Adamw, true),
            OptimizerName::PagedAdamw8bit => (OptimiserKind::Adamw8bit, true),
            OptimizerName::Muon => (OptimiserKind::Muon, false),
        };
        (o.kind, o.paged) = (Some(kind), Some(paged));
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum SaveAsName {
    /// As they were trained
    F32,
    /// Half as large, rounded to 11 bits
    F16,
    /// Half as large, rounded to 8 bits
    Bf16,
}

#[derive(Clone, Copy, ValueEnum)]
enum ScheduleName {
    /// Half a cosine down
    Cosine,
    /// Constant, then linear down over the last tenth
    Wsd,
    /// Constant
    Constant,
}

impl Flags {
    /// Puts what is given in the place of what `c` says.
    fn apply(self, c: &mut Config) -> anyhow::Result<()> {
        fn put<T>(flag: Option<T>, into: &mut Option<T>) {
            if flag.is_some() {
                *into = flag;
            }
        }
        let (m, d, o, r) = (&mut c.model, &mut c.data, &mut c.optimiser, &mut c.run);
        let absolute =
            |paths: Vec<PathBuf>| paths.iter().map(std::path::absolute).collect::<Result<Vec<_>, _>>();
        if !self.data.is_empty() {
            d.train = absolute(self.data)?;
        }
        if !self.held_back.is_empty() {
            d.held_back = absolute(self.held_back)?;
        }
        put(self.held_back_part, &mut d.held_back_part);
        put(self.field, &mut d.field);
        put(self.tokenizer, &mut d.tokenizer);
        put(self.chat_template, &mut d.chat_template);
        put(self.ctx, &mut d.ctx);
        let from = self.from.map(|name| model::resolve(&name)).transpose()?;
        put(from.map(|path| path.display().to_string()), &mut m.from);
        put(self.arch.map(Arch::from), &mut m.arch);
        put(self.size, &mut m.size);
        put(self.layers, &mut m.layers);
        put(self.hidden, &mut m.hidden);
        put(self.heads, &mut m.heads);
        put(self.kv_heads, &mut m.kv_heads);
        put(self.intermediate, &mut m.intermediate);
        if self.steps.is_some() || self.tokens.is_some() {
            (r.steps, r.tokens) = (self.steps, self.tokens);
        }
        put(self.batch, &mut r.batch);
        put(self.accumulate, &mut r.accumulate);
        OptimizerName::apply(self.optimizer, o);
        put(self.lr, &mut o.lr);
        put(self.min_lr, &mut o.min_lr);
        let form = self.schedule.map(|s| match s {
            ScheduleName::Cosine => Form::Cosine,
            ScheduleName::Wsd => Form::Wsd,
            ScheduleName::Constant => Form::Constant,
        });
        put(form, &mut o.schedule);
        put(self.warmup, &mut o.warmup);
        put(self.weight_decay, &mut o.weight_decay);
        put(self.clip, &mut o.clip);
        put(self.seed, &mut r.seed);
        put(self.eval_every, &mut r.eval_every);
        put(self.sample_every, &mut r.sample_every);
        put(self.sample_prompt, &mut r.sample_prompt);
        put(self.checkpoint_every, &mut r.checkpoint_every);
        let save_as = self.save_as.map(|s| match s {
            SaveAsName::F32 => SaveAs::F32,
            SaveAsName::F16 => SaveAs::F16,
            SaveAsName::Bf16 => SaveAs::Bf16,
        });
        put(save_as, &mut r.save_as);
        put(self.verify, &mut r.verify);
        put(self.eager.then_some(true), &mut r.eager);
        put(self.dtype.map(Compute::from), &mut r.dtype);
        put(self.memory, &mut r.memory);
        put(self.threads, &mut r.threads);
        put(self.usd_per_hour, &mut r.usd_per_hour);
        Ok(())
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    #[cfg(feature = "mpi")]
    if let Some((mpi, group)) = crate::processes::group()? {
        // The others wait for this one: where it fails, all have to be ended.
        let done = train(args, Arc::new(group)).inspect_err(|e| crate::processes::abort(e));
        drop(mpi);
        return done;
    }
    #[cfg(not(feature = "mpi"))]
    if launched_by().is_some() {
        bail!(
            "this sparsam is built without MPI, so that every process would train by itself; build it with `--features mpi`,              or start it without a launcher"
        );
    }
    train(args, Arc::new(Alone))
}

/// The variable by which an MPI launcher (Open MPI, PMIx, PMI) tells that it started this process.
pub fn launched_by() -> Option<&'static str> {
    ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"]
        .into_iter()
        .find(|name| std::env::var_os(name).is_some())
}

fn train(args: Args, group: Arc<dyn Group>) -> anyhow::Result<()> {
    let start = Instant::now();
    let steps = args.flags.steps;
    let mut run = match (&args.resume, &args.out) {
        (Some(folder), _) => {
            let mut given = Config::default();
            args.flags.apply(&mut given)?;
            given.run.steps = None;
            if given != Config::default() {
                bail!(
                    "--resume goes on with the settings that the run was started with ({}); only --steps may change",
                    folder.join("config.toml").display()
                );
            }
            let mut run = Run::resume_in(folder, group)?;
            if let Some(steps) = steps {
                run.set_steps(steps);
            }
            if run.leads() {
                eprintln!("going on behind step {} of {}", run.progress().step, run.settings().steps);
            }
            run
        }
        (None, out) => {
            let mut config = args.config.as_deref().map(Config::open).transpose()?.unwrap_or_default();
            args.flags.apply(&mut config)?;
            if args.dry_run {
                if group.size() > 1 {
                    bail!("--dry-run tells what one process would take; start it without a launcher");
                }
                return expected::dry_run(config, args.json);
            }
            let Some(out) = out else { bail!("give --out, the folder of the run") };
            Run::start_in(out, config, group)?
        }
    };
    if !run.leads() {
        let stop = stop_flag()?;
        run.go(&stop, &mut |_| {})?;
        return Ok(());
    }
    announce(&mut run);
    if args.explain {
        eprintln!("{}", run.learner().program().report());
    }
    let machine = probe::here(run.settings().threads, run.folder(), run.settings().usd_per_hour);
    let mut ledger = Ledger::new("train", machine, start);
    if let Some(base) = &run.config().model.from {
        ledger.parent("base", base.as_ref());
    }
    if args.resume.is_some() {
        ledger.resume();
    }
    let expected = Expected::new("train", &mut run);
    go(&mut run, ledger, expected, args.json)
}

/// Trains to the end or to Ctrl-C, with progress, and says how it ended; `expected` makes a forecast from the first
/// steps, which the receipt compares with what it took.
pub(crate) fn go(
    run: &mut Run,
    mut ledger: Ledger,
    mut expected: Expected,
    json: bool,
) -> anyhow::Result<()> {
    let stop = stop_flag()?;
    let mut progress = Progress::new(run);
    let finished = run.go(&stop, &mut |event| {
        if let Event::Step(record) = &event
            && let Some(forecast) = expected.after(record, &ledger)
        {
            progress.say(&expected::line(&forecast));
            ledger.expect(forecast);
        }
        progress.show(event)
    });
    progress.bar.finish_and_clear();
    let finished = finished?;
    let p = &finished.progress;
    let folder = run.folder().to_path_buf();
    let comparison = ledger.finish(&folder, Some(p.targets as f64))?;
    let speed = if p.seconds > 0.0 { p.targets as f64 / p.seconds } else { 0.0 };
    if json {
        return text::say_json(&json!({
            "run": folder,
            "complete": finished.complete,
            "step": p.step,
            "tokens": p.targets,
            "seconds": p.seconds,
            "tokens_per_second": speed,
            "loss": p.smoothed,
            "held_back_loss": p.held_back,
            "parameters": run.receipt().parameters,
            "usd": run.settings().usd_per_hour.map(|usd| usd * p.seconds / 3600.0),
        }));
    }
    let what = if finished.complete { "done" } else { "stopped; go on with --resume" };
    text::say(format_args!(
        "{what}: {} steps, {} tokens in {} ({speed:.0} tok/s), training loss {:.4}",
        p.step,
        units::show_count(p.targets as f64),
        text::duration(Duration::from_secs_f64(p.seconds)),
        p.smoothed
    ))?;
    if let Some(loss) = p.held_back {
        text::say(format_args!("held back: loss {loss:.4}, perplexity {:.3}", loss.exp()))?;
    }
    let saved = ["model.gguf", "model"].map(|name| folder.join(name));
    for path in saved.iter().filter(|path| finished.complete && path.exists()) {
        text::say(format_args!("model: {}", path.display()))?;
    }
    if let Some(table) = comparison {
        text::say(format_args!("{}", table.to_text(100).trim_end()))?;
    }
    text::say(format_args!("report: {}", folder.join("report.html").display()))
}

/// What was chosen and derived, on stderr.
fn announce(run: &mut Run) {
    let (r, s) = (run.receipt().clone(), run.settings().clone());
    let (bytes, paged) = (run.learner().bytes(), run.learner().paged_bytes());
    eprintln!(
        "{} parameters, vocabulary {}, {} tokens to learn from, {} held back",
        units::show_count(r.parameters as f64),
        r.vocab_size,
        units::show_count(r.train_tokens as f64),
        units::show_count(r.held_back_tokens as f64)
    );
    eprintln!(
        "{} steps of {}{} x {} x {} tokens ({:.1} epochs) {}, learning rate {}, {} of memory{}",
        s.steps,
        if s.processes > 1 { format!("{} processes x ", s.processes) } else { String::new() },
        s.accumulate,
        s.batch,
        s.ctx,
        s.steps as f64 * s.tokens_per_step() as f64 / r.train_tokens.max(1) as f64,
        if s.compute == Compute::Bf16 { "in bf16" } else { "in f32" },
        s.schedule.lr,
        text::bytes(bytes),
        in_file(paged)
    );
}

/// What is said of moments that lie in a file.
pub(crate) fn in_file(paged: usize) -> String {
    if paged == 0 { String::new() } else { format!(", {} of moments in a file", text::bytes(paged)) }
}

/// Set by the first Ctrl-C; the second ends the process.
fn stop_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130); // as the shell counts an interrupt
        }
        eprintln!("stopping behind this step with a checkpoint; again to end at once");
    })?;
    Ok(stop)
}

/// The bar, or a line now and then where there is no terminal.
struct Progress {
    bar: indicatif::ProgressBar,
    steps: u64,
    /// Tokens a second, smoothed.
    speed: f64,
    tokens_per_step: u64,
    usd_per_hour: Option<f64>,
    last: Option<Instant>,
}

impl Progress {
    fn new(run: &Run) -> Progress {
        let s = run.settings();
        let bar = text::bar(s.steps, "");
        bar.set_style(
            indicatif::ProgressStyle::with_template("[{bar:24}] {pos}/{len} {msg}")
                .expect("the template is written here")
                .progress_chars("=> "),
        );
        bar.set_position(run.progress().step);
        Progress {
            bar,
            steps: s.steps,
            speed: 0.0,
            tokens_per_step: s.tokens_per_step(),
            usd_per_hour: s.usd_per_hour,
            last: None,
        }
    }

    fn show(&mut self, event: Event) {
        match event {
            Event::Step(record) => self.step(record),
            Event::HeldBack(step, loss) => {
                self.say(&format!("step {step}: held-back loss {loss:.4}, perplexity {:.3}", loss.exp()))
            }
            Event::Task(step, right, n) => {
                let share = 100.0 * right as f64 / n as f64;
                self.say(&format!("step {step}: {right} of {n} answers right ({share:.1}%)"))
            }
            Event::Sample(step, sample) => self.say(&format!("step {step}: {sample:?}")),
            Event::Note(note) => self.say(note),
            Event::Saved(_) => {}
        }
    }

    fn step(&mut self, r: &StepRecord) {
        self.speed = match self.speed {
            0.0 => r.tokens_per_second,
            s => s + 0.1 * (r.tokens_per_second - s),
        };
        let left = (self.steps - r.step) as f64 * self.tokens_per_step as f64 / self.speed;
        let mut line = format!(
            "loss {:.4}  {:.0} tok/s  {:.0}% of peak  {} left",
            r.loss,
            self.speed,
            100.0 * r.share_of_peak,
            text::duration(Duration::from_secs_f64(left))
        );
        if let Some(usd) = self.usd_per_hour {
            let so_far = usd * r.seconds / 3600.0;
            line += &format!(
                "  {} of {}",
                units::show_usd(so_far),
                units::show_usd(so_far + usd * left / 3600.0)
            );
        }
        self.bar.set_position(r.step);
        self.bar.set_message(line.clone());
        let quiet = self.last.is_some_and(|t| t.elapsed().as_secs() < QUIET_SECONDS);
        if self.bar.is_hidden() && !quiet {
            self.last = Some(Instant::now());
            eprintln!("step {}/{}  {line}", r.step, self.steps);
        }
    }

    fn say(&self, line: &str) {
        if self.bar.is_hidden() { eprintln!("{line}") } else { self.bar.println(line) }
    }
}
