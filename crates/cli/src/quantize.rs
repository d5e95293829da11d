//! `sparsam quantize`: a smaller model, and what it lost.

mod blocks;
mod calibration;
mod goal;
mod kept;
mod report;

use crate::ledger::Ledger;
use crate::{expected, model, passport, probe, text};
use anyhow::{Context, bail};
use calibration::Calibration;
use sparsam_dtype::codec;
use sparsam_engine::Opened;
use sparsam_formats::{gguf, imatrix};
use sparsam_plan::forecast::Forecast;
use sparsam_quantize::heal::Heal;
use sparsam_quantize::passport::{KEY, Passport};
use sparsam_quantize::recipe::{self, TensorPlan};
use sparsam_quantize::report::Report;
use sparsam_quantize::stream::{Gptq, Job, Method};
use sparsam_quantize::{Tokens, free, gptq};
use sparsam_runtime::Device;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Write a smaller model: weights rounded to fewer bits, errors compensated (GPTQ)
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam quantize model.gguf -o small.gguf --type Q4_0
  sparsam quantize model.gguf -o small.gguf --type Q4_0 --calibration text.txt --heal 40 --eval other.txt
  sparsam quantize model.gguf -o small.gguf --type Q4_K_M --method nearest
  sparsam quantize model.gguf -o small.gguf --type Q4_0 --imatrix imatrix.gguf
  sparsam quantize model.gguf -o small.gguf --size 70MB --calibration chats.jsonl
  sparsam quantize model.gguf -o small.gguf --kl 0.05
  sparsam quantize model.gguf -o small.gguf --speed 20
  sparsam quantize model.gguf -o small.gguf --fit 8GB --ctx 4096
  sparsam quantize ./folder -o folder-gptq --type GPTQ4 --group-size 64
  sparsam quantize model.gguf -o small.gguf --type Q4_0 --dry-run
  sparsam quantize model.gguf -o small.gguf --type Q4_0 --redo blk.3.ffn_down.weight --damping 0.1

Without --calibration the model writes its calibration text itself. A killed run goes on where it was when it is started
again with the same settings.")]
pub struct Args {
    /// A GGUF file, a safetensors file or folder, builtin, or ORG/NAME of the hub if it is in the cache
    model: String,
    /// The GGUF file to write; for --type GPTQ4 and the like, the folder
    #[arg(short, long)]
    output: PathBuf,
    #[command(flatten)]
    goal: Goal,
    /// GPTQ2 to GPTQ8: inputs that share a scale, a multiple of 32, or 0 for whole rows
    #[arg(long, value_name = "N", default_value_t = 128)]
    group_size: usize,
    /// GPTQ2 to GPTQ8: a zero point for each group instead of the middle code
    #[arg(long)]
    zeros: bool,
    /// How codes are chosen: gptq moves errors into weights that can make up for them, nearest does not (default: gptq;
    /// nearest with --imatrix)
    #[arg(long, value_enum)]
    method: Option<MethodName>,
    /// llama.cpp's importance matrix, GGUF or .dat: which inputs matter, for --method nearest
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// After rounding, tune scales, norms and biases of each block by this many steps towards the original block's output
    #[arg(long, value_name = "STEPS", default_value_t = 0)]
    heal: usize,
    /// Text for GPTQ to calibrate on, like what the model will read: .txt, or .jsonl (dialogues, or strings in each line's
    /// object); without it the model writes it
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Skip this many tokens of the calibration text, for instance what the model is scored on afterwards
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    calibration_skip: usize,
    /// Calibration sequences
    #[arg(long, default_value_t = 32)]
    samples: usize,
    /// Tokens of each calibration sequence (default: 512); with --fit, of the context that shall fit
    #[arg(long, value_name = "TOKENS", value_parser = crate::load::positive)]
    ctx: Option<usize>,
    /// Tokens of each calibration sequence, beside --fit
    #[arg(long, value_name = "TOKENS", value_parser = crate::load::positive)]
    calibration_ctx: Option<usize>,
    /// Added to the diagonal of each layer's Hessian, as a share of its mean
    #[arg(long, default_value_t = 0.01)]
    damping: f32,
    /// How far each layer makes up for the errors of those before it: 0 not at all, 1 fully
    #[arg(long, default_value_t = 0.5)]
    asymmetric: f32,
    /// Rounds of coordinate descent and refitted scales after GPTQ
    #[arg(long, default_value_t = 3)]
    refinements: usize,
    /// Round columns in their own order, not those with the largest inputs first
    #[arg(long)]
    no_act_order: bool,
    /// Round this tensor anew (by its name in the report) and take all others from the file that --output names; may be
    /// given more than once
    #[arg(long, value_name = "TENSOR", conflicts_with_all = ["size", "bits", "fit", "kl", "speed"])]
    redo: Vec<String>,
    /// Most memory for calibration activations, such as 1GB; beyond it they go to disk
    #[arg(long, value_name = "SIZE", value_parser = text::parse_bytes)]
    memory: Option<usize>,
    /// Score both models on this text: perplexity, divergence, agreement; speed and memory too
    #[arg(long, value_name = "FILE")]
    eval: Option<PathBuf>,
    /// Threads (0: all cores)
    #[arg(short, long, default_value_t = 0)]
    threads: usize,
    /// Say what would be written, and what it would take, and stop
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is wanted.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct Goal {
    /// A type of GGUF: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, or a mixture such as Q4_K_M; S2_64, S3_64,
    /// S4_64: blocks of 64 that only sparsam reads; GPTQ2, GPTQ3, GPTQ4, GPTQ8: a folder in GPTQ's layout, as vLLM and transformers load it
    #[arg(long = "type", value_name = "TYPE")]
    type_name: Option<String>,
    /// The largest file, such as 80MB: bits go where measuring says that they matter
    #[arg(long, value_name = "SIZE", value_parser = text::parse_bytes)]
    size: Option<usize>,
    /// Bits a weight on average, such as 3.5, spread like --size
    #[arg(long, value_name = "BITS")]
    bits: Option<f64>,
    /// The most memory when the model runs with --ctx tokens, such as 8GB, spread like --size
    #[arg(long, value_name = "SIZE", value_parser = text::parse_bytes)]
    fit: Option<usize>,
    /// The largest divergence from the original, in nats a token, such as 0.02: the smallest file that keeps to it with
    /// nearest codes (GPTQ then does better)
    #[arg(long, value_name = "NATS")]
    kl: Option<f64>,
    /// Tokens to write in a second on this machine, such as 20: what is expected to lose least of what is as fast, by a short
    /// measurement
    #[arg(long, value_name = "TOK/S")]
    speed: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum MethodName {
    Gptq,
    Nearest,
}

impl Args {
    fn method(&self) -> MethodName {
        match self.method {
            Some(method) => method,
            None if self.imatrix.is_some() => MethodName::Nearest,
            None => MethodName::Gptq,
        }
    }

    /// Bits of GPTQ's layout, if that is wanted.
    fn gptq_bits(&self) -> Option<u32> {
        let name = self.goal.type_name.as_ref()?.to_ascii_uppercase();
        name.strip_prefix("GPTQ")?.trim_start_matches(['_', '-']).parse().ok()
    }

    fn needs_text(&self) -> bool {
        self.method() == MethodName::Gptq || self.heal > 0 || self.goal.type_name.is_none()
    }

    fn check(&self) -> anyhow::Result<()> {
        if !(0.0..=1.0).contains(&self.asymmetric) || self.damping.is_nan() || self.damping < 0.0 {
            bail!(
                "--asymmetric goes from 0 to 1 and --damping from 0 up; they are {} and {}",
                self.asymmetric,
                self.damping
            );
        }
        if self.imatrix.is_some() && self.method() == MethodName::Gptq {
            bail!(
                "an importance matrix says of each input how much it matters, GPTQ wants to know how inputs go together: give --calibration, or --method nearest with --imatrix"
            );
        }
        for (name, value) in
            [("--bits", self.goal.bits), ("--kl", self.goal.kl), ("--speed", self.goal.speed)]
        {
            if value.is_some_and(|v| v.is_nan() || v <= 0.0) {
                bail!("{name} is {}; a number above 0 is wanted", value.unwrap_or_default());
            }
        }
        if self.samples == 0 {
            bail!("--samples is 0; at least one sequence is wanted");
        }
        Ok(())
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let start = Instant::now();
    args.check()?;
    let path = model::resolve(&args.model)?;
    let opened = sparsam_engine::open(&path)?;
    check_output(&args, &opened)?;
    let device = Device::cpu(args.threads)?;
    let importance = args.imatrix.as_ref().map(imatrix::read).transpose()?;
    let named = named_plan(&args, &opened)?;
    if let Some(plan) = named.as_ref().filter(|_| args.dry_run) {
        warn(&args, plan, &opened)?;
        return report::dry_run(&args, &opened, plan, None);
    }
    let calibration = if args.needs_text() { Some(Calibration::new(&args, &opened)?) } else { None };
    if let (Some(c), Some(scored)) = (&calibration, &args.eval) {
        warn_overlap(c, scored, &opened)?;
    }
    let tokens = calibration.as_ref().map(|c| &c.tokens);
    let (plan, expected) = match (named, tokens) {
        (Some(plan), _) => (plan, None),
        (None, Some(tokens)) => {
            let chosen = goal::plan(&args, &opened, tokens, &device)?;
            (chosen.plan, Some(chosen.tokens_per_second))
        }
        (None, None) => unreachable!("goals need text"),
    };
    warn(&args, &plan, &opened)?;
    if args.dry_run {
        return report::dry_run(&args, &opened, &plan, expected);
    }
    let method = match args.method() {
        MethodName::Nearest => Method::Nearest,
        MethodName::Gptq => Method::Gptq(Gptq {
            damping: args.damping,
            asymmetric: args.asymmetric,
            options: gptq::Options { act_order: !args.no_act_order, refinements: args.refinements },
            ..Gptq::default()
        }),
    };
    let job = Job {
        source: &opened.source,
        model: &opened.model,
        device: &device,
        plan: &plan,
        method,
        heal: (args.heal > 0).then(|| Heal::new(args.heal)),
        importance: importance.as_ref(),
        tokens,
        memory: args.memory,
        identity: identity(&args, &plan, &path, tokens)?,
        partial: partial_folder(&args.output),
    };
    let mut ledger =
        Ledger::new("quantize", probe::here(args.threads, &folder_of(&args.output), None), start);
    ledger.parent("base", &path);
    if !args.redo.is_empty() {
        adopt(&args, &job)?;
    }
    let bar = text::bar(1000, "rounding");
    let mut blocks = blocks::Blocks::new(opened.model.facts().n_layers());
    let layers = job.run(&mut |share, name| {
        if let Some(seconds) = blocks.after(name, &ledger) {
            let (memory, disk) = (expected::measured(0.0, 0.0), blocks::disk(&opened.source, &plan));
            let forecast = Forecast::timed("quantize", seconds, memory, disk, ledger.machine());
            bar.suspend(|| eprintln!("{}", expected::line(&forecast)));
            ledger.expect(forecast);
        }
        bar.set_position((share * 1000.0) as u64);
        bar.set_message(name.to_string());
    })?;
    bar.finish_and_clear();
    let mut passport = first_passport(&args, &opened, calibration.as_ref())?;
    write(&args, &job, &opened, &passport)?;
    let seconds = start.elapsed().as_secs_f64();
    // Scoring, below, is no part of what the file costs.
    let comparison = ledger.finish(&args.output, tokens.map(|t| t.len() as f64))?;
    if let Some(text) = &args.eval {
        // The file is safe by now; it is written once more with what scoring finds.
        passport.score = Some(report::score(&args, &opened, text)?);
        write(&args, &job, &opened, &passport)?;
    }
    let runs = match args.eval.is_some() || args.goal.speed.is_some() {
        true => Some(report::runs(&args, &opened)?),
        false => None,
    };
    let bytes: usize = plan.iter().map(TensorPlan::bytes).sum();
    let weights: usize = plan.iter().map(TensorPlan::numel).sum();
    let report = Report {
        output: name_of(&args.output),
        bytes: size_of(&args.output)?,
        parent_bytes: opened.source.tensors().iter().map(|t| t.bytes_len()).sum(),
        bits_per_weight: 8.0 * bytes as f64 / weights as f64,
        passport,
        seconds,
        expected_tokens_per_second: expected,
        runs,
        healing: job.healing()?,
        layers,
    };
    kept::forget(&job.partial);
    job.clean();
    report::write(&args, &plan, &report)?;
    match comparison {
        Some(table) if !args.json => text::say(format_args!("\n{}", table.to_text(100).trim_end())),
        _ => Ok(()),
    }
}

/// The types that `--type` names; `None` if a goal is to be met.
fn named_plan(args: &Args, opened: &Opened) -> anyhow::Result<Option<Vec<TensorPlan>>> {
    let Some(name) = &args.goal.type_name else { return Ok(None) };
    let Some(bits) = args.gptq_bits() else {
        return Ok(Some(recipe::plan(&opened.model, &opened.source, name)?));
    };
    let group = (args.group_size > 0).then_some(args.group_size);
    let plan = recipe::plan_gptq(&opened.model, &opened.source, bits, group, !args.zeros)?;
    let got = plan.iter().find_map(|p| p.plain).map(|p| p.group);
    if let (Some(wanted), Some(got)) = (group, got)
        && wanted != got
        && !args.json
    {
        eprintln!("note: groups of {got}, since rows of this model are no whole groups of {wanted}");
    }
    Ok(Some(plan))
}

/// Writes the result where it belongs.
fn write(args: &Args, job: &Job, opened: &Opened, passport: &Passport) -> anyhow::Result<()> {
    if args.gptq_bits().is_some() {
        // A folder is renamed into an empty place only.
        if args.output.is_dir() {
            std::fs::remove_dir_all(&args.output).with_context(|| args.output.display().to_string())?;
        }
        job.write_gptq(&args.output, opened.tokenizer.as_ref(), &passport.to_json())?;
    } else {
        let metadata = with_passport(args, opened, passport);
        job.write_gguf(&args.output, &metadata, opened.tokenizer.as_ref())?;
    }
    Ok(())
}

/// Takes what an earlier run wrote over, all but the tensors that are to be done anew.
fn adopt(args: &Args, job: &Job) -> anyhow::Result<()> {
    let file = sparsam_formats::Source::open(&args.output)
        .with_context(|| format!("--redo takes all other tensors from {}", args.output.display()))?;
    let beside = args.output.with_file_name(format!("{}.json", name_of(&args.output)));
    let report = std::fs::read(beside).ok().and_then(|b| serde_json::from_slice::<Report>(&b).ok());
    let layers = report.map(|r| r.layers).unwrap_or_default();
    Ok(job.adopt(&file, &layers, &args.redo)?)
}

/// The output must not be the input, and its folder must be there: better said now than after minutes of work.
fn check_output(args: &Args, opened: &Opened) -> anyhow::Result<()> {
    let output = &args.output;
    let folder = folder_of(output);
    if !folder.is_dir() {
        bail!("{}: there is no such folder; make it first", folder.display());
    }
    if args.gptq_bits().is_some() {
        let filled = output.is_dir() && std::fs::read_dir(output)?.next().is_some();
        // One that is being made: the run was killed behind its end.
        let ours = partial_folder(output).is_dir();
        if output.is_file() || (filled && !ours) {
            bail!("{}: is there already; name a new folder for GPTQ's layout", output.display());
        }
        if !args.redo.is_empty() {
            bail!("--redo works on GGUF files");
        }
    } else if output.is_dir() {
        bail!("{}: is a folder; name a .gguf file in it", output.display());
    }
    let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same(output, opened.source.path()) {
        bail!(
            "{}: is the model itself, which is read while the result is written; name another file",
            output.display()
        );
    }
    Ok(())
}

fn folder_of(output: &Path) -> PathBuf {
    output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_path_buf()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().to_string()
}

/// Bytes of a file, or of the files in a folder.
fn size_of(path: &Path) -> anyhow::Result<usize> {
    if path.is_file() {
        return Ok(std::fs::metadata(path)?.len() as usize);
    }
    let mut sum = 0;
    for entry in std::fs::read_dir(path)? {
        sum += entry?.metadata()?.len() as usize;
    }
    Ok(sum)
}

fn partial_folder(output: &Path) -> PathBuf {
    output.with_file_name(format!("{}.partial", name_of(output)))
}

/// All that a partial result depends on, beside method and healing.
fn identity(
    args: &Args,
    plan: &[TensorPlan],
    path: &Path,
    tokens: Option<&Tokens>,
) -> anyhow::Result<String> {
    let meta = std::fs::metadata(path).with_context(|| path.display().to_string())?;
    let modified = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
    let calibration = tokens.map(|t| format!("{} x {}, {:016x}", t.samples(), t.ctx(), t.hash()));
    let importance = args.imatrix.as_ref().map(|p| passport::sha256(p)).transpose()?;
    Ok(format!(
        "{} {} bytes {:?} {} {} {} {:?}",
        path.canonicalize()?.display(),
        meta.len(),
        modified.map(|d| d.as_nanos()),
        plan.iter().map(TensorPlan::stored_as).collect::<Vec<_>>().join(" "),
        calibration.unwrap_or_default(),
        importance.unwrap_or_default(),
        args.redo
    ))
}

/// What is worth knowing before minutes of work, on stderr.
fn warn(args: &Args, plan: &[TensorPlan], opened: &Opened) -> anyhow::Result<()> {
    if args.json {
        return Ok(());
    }
    let mut substitutes: BTreeMap<(String, String, usize), usize> = BTreeMap::new();
    for p in plan {
        if let Some(wanted) = p.wanted {
            *substitutes.entry((wanted.to_string(), p.to.to_string(), p.spec.shape[1])).or_default() += 1;
        }
    }
    for ((wanted, to, cols), n) in substitutes {
        eprintln!("note: {n} matrices become {to}: rows of {cols} are no whole blocks of {wanted}");
    }
    let rounded: Vec<&TensorPlan> = plan.iter().filter(|p| p.from.is_block() && p.grid().is_some()).collect();
    if let Some(first) = rounded.first() {
        let noise = first_rounding(opened, first)?;
        eprintln!(
            "note: {} matrices are rounded already ({}); their weights carry about {:.1}% of noise from that, which nothing takes away; what is reported counts from them, not from the weights before. Rounding those, if you have them, loses less",
            rounded.len(),
            first.from,
            100.0 * noise
        );
    }
    Ok(())
}

/// What the rounding that a tensor has behind it cost: its noise over its size, were its errors even over each step.
fn first_rounding(opened: &Opened, p: &TensorPlan) -> anyhow::Result<f64> {
    let tensor = opened.source.require(&p.spec.source_name)?;
    let mut w = vec![0f32; p.numel()];
    codec::decode(p.from, tensor.bytes, &mut w)?;
    let Some(parts) = free::take(p.from, tensor.bytes)? else { return Ok(0.0) };
    let block = p.from.block_len();
    let format = codec::blocks::format(p.from);
    let whole = format.is_some_and(|f| f.group == f.block && f.levels != codec::blocks::Levels::Iq4);
    let (mut noise, mut size) = (0.0f64, 0.0f64);
    for ((w, v), d) in w.chunks(block).zip(parts.v.chunks(block)).zip(&parts.d) {
        // The distance of neighbouring values: one level, or, where groups have scales of their own, the least one there is.
        let mut values: Vec<f32> = v.to_vec();
        values.sort_by(f32::total_cmp);
        let steps = values.windows(2).map(|w| w[1] - w[0]).filter(|s| *s > 0.0);
        let step = if whole { 1.0 } else { steps.fold(f32::INFINITY, f32::min) };
        let step = f64::from(step) * f64::from(*d);
        if step.is_finite() {
            noise += w.len() as f64 * step * step / 12.0;
        }
        size += w.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    }
    Ok((noise / size.max(f64::MIN_POSITIVE)).sqrt())
}

/// Figures on text that was calibrated on flatter.
fn warn_overlap(calibration: &Calibration, scored: &Path, opened: &Opened) -> anyhow::Result<()> {
    let ids = calibration::read(scored, opened)?;
    let protocol = report::scored(opened);
    let n = protocol.chunks.map_or(ids.len(), |c| (c * protocol.context).min(ids.len()));
    let share = calibration::overlap(calibration.tokens.ids(), &ids[..n]);
    if share > 0.01 {
        eprintln!(
            "warning: {:.0}% of the text to be scored is calibration text, so its figures will flatter; calibrate on other text (--calibration-skip passes over some)",
            100.0 * share
        );
    }
    Ok(())
}

/// What the file says of itself before it is scored.
fn first_passport(
    args: &Args,
    opened: &Opened,
    calibration: Option<&Calibration>,
) -> anyhow::Result<Passport> {
    let g = &args.goal;
    let goal = match (&g.type_name, g.size, g.bits, g.fit, g.speed) {
        (Some(name), ..) => name.clone(),
        (_, Some(size), ..) => format!("at most {}", text::bytes(size)),
        (_, _, Some(bits), ..) => format!("{bits} bits a weight"),
        (_, _, _, Some(fit), _) => format!("at most {} of memory when it runs", text::bytes(fit)),
        (.., Some(speed)) => format!("at least {speed} tokens a second"),
        _ => format!("a divergence of at most {}", g.kl.unwrap_or_default()),
    };
    let mut method = match args.method() {
        MethodName::Nearest => match &args.imatrix {
            None => "nearest codes, searched scales".to_string(),
            Some(path) => format!("nearest codes, scales searched by {}", name_of(path)),
        },
        MethodName::Gptq => format!(
            "GPTQ, damping {}, act-order {}, {} refinements, asymmetric {}",
            args.damping, !args.no_act_order, args.refinements, args.asymmetric
        ),
    };
    if args.heal > 0 {
        method += &format!("; healed by {} steps a block", args.heal);
    }
    Ok(Passport {
        version: env!("CARGO_PKG_VERSION").into(),
        command: command_line(),
        parent: name_of(opened.source.path()),
        parent_sha256: passport::sha256(opened.source.path())?,
        goal,
        method,
        calibration: calibration.map(Calibration::describe),
        calibration_hash: calibration.map(|c| format!("{:016x}", c.tokens.hash())),
        score: None,
    })
}

/// The command as it was typed, words with spaces quoted.
fn command_line() -> String {
    let quoted = |word: String| match word.contains(|c: char| c.is_whitespace() || c == '\'') {
        true => format!("'{}'", word.replace('\'', "'\\''")),
        false => word,
    };
    let words = std::env::args().skip(1).map(quoted);
    std::iter::once("sparsam".to_string()).chain(words).collect::<Vec<_>>().join(" ")
}

/// The metadata of the file to be written: the source's with what this run did; of a safetensors source, that alone.
fn with_passport(args: &Args, opened: &Opened, passport: &Passport) -> gguf::Metadata {
    use gguf::Value;
    let mut m = opened.source.gguf_metadata().cloned().unwrap_or_default();
    for key in ["split.no", "split.count", "split.tensors.count"] {
        m.remove(key);
    }
    match args.goal.type_name.as_deref().and_then(recipe::file_type) {
        Some((_, number)) => m.insert("general.file_type", Value::U32(number)),
        None => m.remove("general.file_type"),
    };
    m.insert("general.quantization_version", Value::U32(2));
    m.insert(KEY, Value::String(passport.to_json().to_string()));
    m
}
