//! `sparsam finetune`: a model adapted to examples.

use crate::expected::{self, Expected};
use crate::ledger::Ledger;
use crate::{model, probe, text, train};
use anyhow::bail;
use clap::ValueEnum;
use sparsam_train::Run;
use sparsam_train::config::{Compute, Config};
use sparsam_train::dialogue::{self, LossOn};
use sparsam_train::lora::{FinetuneConfig, Method};
use std::path::PathBuf;
use std::time::Instant;

/// Examples that `--xray` shows.
const XRAYED: usize = 8;

/// Adapt a model to examples: low-rank adapters over its weights as they are, rounded or not, or all weights
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam finetune model-Q4_K_M.gguf --data chats.jsonl -o runs/mine
  sparsam finetune model.gguf --data sums.jsonl --fields question,equation --rank 8 --epochs 3 -o runs/sums
  sparsam finetune model.gguf --data chats.jsonl --dry-run          what it would do, and what that takes
  sparsam finetune model.gguf --data chats.jsonl --xray             which tokens are learnt, in colour
  sparsam finetune --resume runs/mine
  sparsam run model-Q4_K_M.gguf --adapter runs/mine/adapter

A line of the data is an object with messages, prompt and completion, question and answer, instruction (input) and output,
or text. The folder of a run holds adapter/ (PEFT's layout; the best on held-back examples), config.toml, metrics.jsonl,
checkpoints/ and report.html. Ctrl-C stops at the next step with a checkpoint; --resume goes on bit for bit.")]
pub struct Args {
    /// A GGUF file, a safetensors file or folder, builtin, or ORG/NAME of the hub if it is in the cache
    #[arg(required_unless_present = "resume")]
    model: Option<String>,
    /// JSON lines to learn from
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present_any = ["resume", "config"])]
    data: Vec<PathBuf>,
    /// The folder of the run, which must not hold one yet [default: runs/finetune]
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with the run in this folder, from its newest checkpoint
    #[arg(long, value_name = "DIR", conflicts_with_all = ["model", "data", "out", "config", "dry_run", "xray"])]
    resume: Option<PathBuf>,
    /// Settings as TOML; flags override them
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Train for some seconds in a folder that is thrown away, and say what the whole run would take
    #[arg(long)]
    dry_run: bool,
    /// Show examples with what is learnt of them and what is cut, and stop
    #[arg(long)]
    xray: bool,
    #[command(flatten)]
    flags: Flags,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum MethodName {
    /// Low-rank adapters over the weights as the file holds them
    Lora,
    /// Low-rank adapters over linear layers rounded to 4 bits (NF4 with double quantisation, or as --base-type says)
    Qlora,
    /// All weights
    Full,
}

#[derive(Clone, Copy, ValueEnum)]
enum LossName {
    /// What the assistant says
    Answers,
    /// Everything
    All,
}

/// Settings as flags, each as in the configuration.
#[derive(clap::Args)]
struct Flags {
    /// What is trained [default: lora]
    #[arg(long)]
    method: Option<MethodName>,
    /// Rank of the adapters [default: 16]
    #[arg(long)]
    rank: Option<usize>,
    /// Their factor times the rank [default: twice the rank]
    #[arg(long)]
    alpha: Option<f64>,
    /// Probability that an input of an adapter is dropped [default: 0]
    #[arg(long, value_name = "P")]
    dropout: Option<f64>,
    /// Divide alpha by the root of the rank, not by the rank
    #[arg(long)]
    rslora: bool,
    /// Learning rate of B over that of A (LoRA+) [default: 1]
    #[arg(long, value_name = "RATIO")]
    ratio_b: Option<f64>,
    /// Layers by the ends of their names: q_proj,v_proj [default: all linear layers]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    targets: Vec<String>,
    /// An adapter to begin with
    #[arg(long, value_name = "DIR")]
    from_adapter: Option<PathBuf>,
    /// Hold the linear layers in this type: F32, BF16, Q8_0, .. [default: as in the file]
    #[arg(long, value_name = "TYPE")]
    base_type: Option<String>,
    /// Where the loss is taken [default: answers]
    #[arg(long, value_name = "WHERE")]
    loss_on: Option<LossName>,
    /// The keys of prompt and answer, where they have names of their own
    #[arg(long, value_name = "PROMPT,ANSWER", value_delimiter = ',')]
    fields: Vec<String>,
    /// Examples to evaluate on; without them a part of the data is held back
    #[arg(long, value_name = "FILE", num_args = 1..)]
    held_back: Vec<PathBuf>,
    /// Part of the data that is held back [default: 0.05, at most 200 examples]
    #[arg(long, value_name = "PART")]
    held_back_part: Option<f64>,
    /// Tokens in a row [default: the longest example's, from 512 to 2048]
    #[arg(long)]
    ctx: Option<usize>,
    /// Times that each example is seen [default: 2]
    #[arg(long)]
    epochs: Option<f64>,
    /// Optimiser steps instead
    #[arg(long, conflicts_with = "epochs")]
    steps: Option<u64>,
    /// Rows in a micro-batch [default: 2048 tokens' worth]
    #[arg(long)]
    batch: Option<usize>,
    /// Micro-batches in a step [default: 1]
    #[arg(long)]
    accumulate: Option<usize>,
    /// What changes the weights under training [default: adamw]
    #[arg(long, alias = "optimiser")]
    optimizer: Option<train::OptimizerName>,
    /// Highest learning rate [default: from the model's width]
    #[arg(long)]
    lr: Option<f64>,
    /// Steps of its warm-up [default: a hundredth of the run]
    #[arg(long)]
    warmup: Option<u64>,
    /// Decay of matrices [default: 0]
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
    /// Stop after so many evaluations that are not better than the best; 0: do not [default: 0]
    #[arg(long, value_name = "N")]
    patience: Option<u64>,
    /// Questions (JSON lines) that the model answers before, during and behind the run; the best by them is kept
    #[arg(long, value_name = "FILE")]
    task: Option<PathBuf>,
    /// The keys of question and answer in them [default: question,answer]
    #[arg(long, value_name = "QUESTION,ANSWER", value_delimiter = ',')]
    task_fields: Vec<String>,
    /// The answer is the first group (or all) of the last match in what is written [default: all that is written]
    #[arg(long, value_name = "REGEX", conflicts_with = "equation")]
    answer_regex: Option<String>,
    /// What is written is a sum, whose value is the answer
    #[arg(long)]
    equation: bool,
    /// Only the first N of them [default: 100]
    #[arg(long, value_name = "N")]
    task_questions: Option<usize>,
    /// Tokens of an answer at most [default: 256]
    #[arg(long, value_name = "N")]
    task_tokens: Option<usize>,
    /// Steps between two times; 0: only before and behind the run [default: 0]
    #[arg(long, value_name = "N")]
    task_every: Option<u64>,
    /// Steps between checkpoints [default: as evaluations]
    #[arg(long)]
    checkpoint_every: Option<u64>,
    /// Run node by node, without the compiler
    #[arg(long)]
    eager: bool,
    /// What products are computed in; weights under training and moments stay f32 [default: f32]
    #[arg(long)]
    dtype: Option<train::ComputeName>,
    /// What weights, moments, gradients and activations may take together, such as 380MB: forward values are computed again
    /// until it fits
    #[arg(long, value_name = "SIZE", conflicts_with = "eager")]
    memory: Option<String>,
    /// Threads; 0 for all cores [default: 0]
    #[arg(long)]
    threads: Option<usize>,
    /// What the machine costs an hour, in dollars
    #[arg(long, value_name = "USD")]
    usd_per_hour: Option<f64>,
}

impl Flags {
    /// Puts what is given in the place of what `c` says.
    fn apply(self, c: &mut Config) {
        fn put<T>(flag: Option<T>, into: &mut Option<T>) {
            if flag.is_some() {
                *into = flag;
            }
        }
        let f = c.finetune.get_or_insert_with(FinetuneConfig::default);
        let method = self.method.map(|m| match m {
            MethodName::Lora => Method::Lora,
            MethodName::Qlora => Method::Qlora,
            MethodName::Full => Method::Full,
        });
        put(method, &mut f.method);
        put(self.rank, &mut f.rank);
        put(self.alpha, &mut f.alpha);
        put(self.dropout, &mut f.dropout);
        put(self.rslora.then_some(true), &mut f.rslora);
        put(self.ratio_b, &mut f.ratio_b);
        if !self.targets.is_empty() {
            f.targets = self.targets;
        }
        put(self.from_adapter, &mut f.from_adapter);
        put(self.base_type, &mut f.base_type);
        let loss_on = self.loss_on.map(|l| match l {
            LossName::Answers => LossOn::Answers,
            LossName::All => LossOn::All,
        });
        put(loss_on, &mut f.loss_on);
        if !self.fields.is_empty() {
            f.fields = self.fields;
        }
        put(self.epochs, &mut f.epochs);
        put(self.patience, &mut f.patience);
        put(self.task, &mut f.task);
        if !self.task_fields.is_empty() {
            f.task_fields = self.task_fields;
        }
        put(self.answer_regex, &mut f.answer_regex);
        put(self.equation.then_some(true), &mut f.equation);
        put(self.task_questions, &mut f.task_questions);
        put(self.task_tokens, &mut f.task_tokens);
        put(self.task_every, &mut f.task_every);
        let (d, o, r) = (&mut c.data, &mut c.optimiser, &mut c.run);
        if !self.held_back.is_empty() {
            d.held_back = self.held_back;
        }
        put(self.held_back_part, &mut d.held_back_part);
        put(self.ctx, &mut d.ctx);
        put(self.steps, &mut r.steps);
        put(self.batch, &mut r.batch);
        put(self.accumulate, &mut r.accumulate);
        train::OptimizerName::apply(self.optimizer, o);
        put(self.lr, &mut o.lr);
        put(self.warmup, &mut o.warmup);
        put(self.weight_decay, &mut o.weight_decay);
        put(self.clip, &mut o.clip);
        put(self.seed, &mut r.seed);
        put(self.eval_every, &mut r.eval_every);
        put(self.checkpoint_every, &mut r.checkpoint_every);
        put(self.eager.then_some(true), &mut r.eager);
        put(self.dtype.map(Compute::from), &mut r.dtype);
        put(self.memory, &mut r.memory);
        put(self.threads, &mut r.threads);
        put(self.usd_per_hour, &mut r.usd_per_hour);
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let start = Instant::now();
    let steps = args.flags.steps;
    // Where a dry run works; thrown away with it.
    let trial = args.dry_run.then(tempfile::tempdir).transpose()?;
    let mut run = match &args.resume {
        Some(folder) => {
            let mut given = Config { finetune: Some(FinetuneConfig::default()), ..Config::default() };
            args.flags.apply(&mut given);
            given.run.steps = None;
            if given != (Config { finetune: Some(FinetuneConfig::default()), ..Config::default() }) {
                bail!(
                    "--resume goes on with the settings that the run was started with ({}); only --steps may change",
                    folder.join("config.toml").display()
                );
            }
            let mut run = Run::resume(folder)?;
            if let Some(steps) = steps {
                run.set_steps(steps);
            }
            run
        }
        None => {
            let mut config = args.config.as_deref().map(Config::open).transpose()?.unwrap_or_default();
            args.flags.apply(&mut config);
            if !args.data.is_empty() {
                config.data.train = args.data;
            }
            if let Some(name) = &args.model {
                config.model.from = Some(model::resolve(name)?.display().to_string());
            }
            let out = args.out.unwrap_or_else(|| PathBuf::from("runs/finetune"));
            match &trial {
                Some(folder) => Run::start(&folder.path().join("run"), config)?,
                None if args.xray => Run::plan(&out, config)?,
                None => Run::start(&out, config)?,
            }
        }
    };
    announce(&mut run, args.xray)?;
    if args.dry_run {
        return expected::trial("finetune", &mut run, start, args.json);
    }
    if args.xray {
        return Ok(());
    }
    let machine = probe::here(run.settings().threads, run.folder(), run.settings().usd_per_hour);
    let mut ledger = Ledger::new("finetune", machine, start);
    if let Some(base) = &run.config().model.from {
        ledger.parent("base", base.as_ref());
    }
    if args.resume.is_some() {
        ledger.resume();
    }
    let expected = Expected::new("finetune", &mut run);
    train::go(&mut run, ledger, expected, args.json)?;
    match run.result() {
        Some(result) if !args.json => text::say(format_args!("result: {}", result.display())),
        _ => Ok(()),
    }
}

/// The data, one example of it, and what was chosen and derived: on stderr; what `--xray` asks for on stdout.
fn announce(run: &mut Run, xray: bool) -> anyhow::Result<()> {
    let (bytes, paged) = (run.learner().bytes(), run.learner().paged_bytes());
    let s = run.settings().clone();
    let Some(f) = run.finetuned() else {
        bail!("{} is no fine-tuning; go on with sparsam train", run.folder().display())
    };
    for note in &f.notes {
        eprintln!("{note}");
    }
    let tokenizer = f.opened.tokenizer()?;
    let coloured = text::coloured();
    if xray {
        for e in f.examples.all.iter().take(XRAYED) {
            text::say(format_args!(
                "--- {}: {} tokens, {} learnt, {} cut",
                f.examples.place(e),
                e.tokens.len(),
                e.n_learnt(),
                e.cut
            ))?;
            text::say(dialogue::render(e, tokenizer, coloured))?;
        }
    } else if let Some(e) = f.examples.all.first() {
        let mark =
            if coloured { "what is learnt is green" } else { "what is learnt stands between « and »" };
        eprintln!("the first example ({mark}):\n{}", dialogue::render(e, tokenizer, coloured));
    }
    if let Some(p) = &f.peft {
        let scale = if p.use_rslora { "alpha over the root of the rank" } else { "alpha over the rank" };
        eprintln!(
            "rank {}, alpha {} ({scale}), dropout {}, layers {}",
            p.r, p.lora_alpha, p.lora_dropout, p.target_modules
        );
    }
    eprintln!(
        "{} steps of {} x {} x {} tokens, learning rate {}, {} of memory{}",
        s.steps,
        s.accumulate,
        s.batch,
        s.ctx,
        s.schedule.lr,
        text::bytes(bytes),
        train::in_file(paged)
    );
    Ok(())
}
