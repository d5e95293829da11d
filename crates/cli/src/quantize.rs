//! `sparsam quantize`: a smaller model, and what it lost.

use crate::{model, text};
use anyhow::{Context, bail};
use serde_json::json;
use sparsam_dtype::DType;
use sparsam_engine::{Engine, Opened, Options, Protocol, Windows, compare};
use sparsam_formats::gguf;
use sparsam_quantize::recipe::{self, TensorPlan};
use sparsam_quantize::report::{Report, Score};
use sparsam_quantize::stream::{Gptq, Job, Layer, Method};
use sparsam_quantize::{Tokens, budget, gptq};
use sparsam_runtime::Device;
use sparsam_tokenizer::Specials;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Write a smaller model: weights rounded to fewer bits, errors compensated (GPTQ)
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam quantize model.gguf -o small.gguf --type Q4_0 --calibration text.txt
  sparsam quantize model.gguf -o small.gguf --type Q4_K_M --method nearest
  sparsam quantize model.gguf -o small.gguf --type Q4_0 --calibration text.txt --dry-run
  sparsam quantize model.gguf -o small.gguf --size 70MB --calibration text.txt --eval other.txt

A killed run goes on where it was when it is started again with the same settings.")]
pub struct Args {
    /// A GGUF file, a safetensors file or folder, or ORG/NAME of the hub if it is in the cache
    model: String,
    /// The GGUF file to write
    #[arg(short, long)]
    output: PathBuf,
    /// A type of GGUF: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, or a mixture such as Q4_K_M
    #[arg(long = "type", value_name = "TYPE", required_unless_present_any = ["size", "bits"])]
    type_name: Option<String>,
    /// The largest file, such as 80MB: bits go where measuring says that they matter
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["type_name", "bits"], value_parser = crate::text::parse_bytes)]
    size: Option<usize>,
    /// Bits a weight on average, such as 3.5, spread like --size
    #[arg(long, value_name = "BITS", conflicts_with = "type_name")]
    bits: Option<f64>,
    /// How codes are chosen: gptq moves errors into weights that can make up for them, nearest does not
    #[arg(long, value_enum, default_value_t = MethodName::Gptq)]
    method: MethodName,
    /// Text for GPTQ to calibrate on, like what the model will read: .txt, or .jsonl with a string in each line's object
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Skip this many tokens of the calibration text, for instance what the model is scored on afterwards
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    calibration_skip: usize,
    /// Calibration sequences
    #[arg(long, default_value_t = 64)]
    samples: usize,
    /// Tokens of each calibration sequence
    #[arg(long, default_value_t = 512)]
    ctx: usize,
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
    /// Score both models on this text: perplexity, divergence, agreement
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum MethodName {
    Gptq,
    Nearest,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let start = Instant::now();
    let path = model::resolve(&args.model)?;
    let opened = sparsam_engine::open(&path)?;
    check_output(&args.output, &opened)?;
    if !(0.0..=1.0).contains(&args.asymmetric) || args.damping.is_nan() || args.damping < 0.0 {
        bail!(
            "--asymmetric goes from 0 to 1 and --damping from 0 up; they are {} and {}",
            args.asymmetric,
            args.damping
        );
    }
    let Some(metadata) = opened.source.gguf_metadata() else {
        bail!("{}: only GGUF models can be rounded yet; convert it first", path.display());
    };
    let device = Device::cpu(args.threads)?;
    let (plan, tokens) = match &args.type_name {
        Some(name) => {
            let plan = recipe::plan(&opened.model, &opened.source, name)?;
            warn(&plan, args.json);
            if args.dry_run {
                return dry_run(&args, &opened, &plan);
            }
            let calibrated = args.method == MethodName::Gptq;
            (plan, if calibrated { Some(calibration(&args, &opened)?) } else { None })
        }
        None => {
            let tokens = calibration(&args, &opened)?;
            let plan = plan_for_budget(&args, &opened, &tokens, &device)?;
            warn(&plan, args.json);
            if args.dry_run {
                return dry_run(&args, &opened, &plan);
            }
            (plan, Some(tokens))
        }
    };
    let method = match args.method {
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
        tokens: tokens.as_ref(),
        identity: identity(&plan, &path, tokens.as_ref())?,
        partial: partial_folder(&args.output),
    };
    let bar = text::bar(1000, "rounding");
    let layers = job.run(&mut |share, name| {
        bar.set_position((share * 1000.0) as u64);
        bar.set_message(name.to_string());
    })?;
    bar.finish_and_clear();
    let metadata = with_passport(metadata, &args, tokens.as_ref());
    job.write_gguf(&args.output, &metadata)?;
    job.clean();
    let seconds = start.elapsed().as_secs_f64();
    report(&args, &opened, &plan, layers, tokens.as_ref(), seconds)
}

/// The output must not be the input, and its folder must be there: better said now than after minutes of work.
fn check_output(output: &Path, opened: &Opened) -> anyhow::Result<()> {
    let folder = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        bail!("{}: there is no such folder; make it first", folder.display());
    }
    if output.is_dir() {
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

fn partial_folder(output: &Path) -> PathBuf {
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    output.with_file_name(format!("{name}.partial"))
}

/// All that a partial result depends on, beside the method.
fn identity(plan: &[TensorPlan], path: &Path, tokens: Option<&Tokens>) -> anyhow::Result<String> {
    let meta = std::fs::metadata(path).with_context(|| path.display().to_string())?;
    let modified = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
    let calibration = tokens.map(|t| format!("{} x {}, {:016x}", t.samples(), t.ctx(), t.hash()));
    Ok(format!(
        "{} {} bytes {:?} {} {}",
        path.canonicalize()?.display(),
        meta.len(),
        modified.map(|d| d.as_nanos()),
        plan.iter().map(|p| p.to.to_string()).collect::<Vec<_>>().join(" "),
        calibration.unwrap_or_default()
    ))
}

/// What is worth knowing before minutes of work, on stderr.
fn warn(plan: &[TensorPlan], quiet: bool) {
    if quiet {
        return;
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
    let rounded = plan.iter().filter(|p| p.from.is_block() && p.grid().is_some());
    let bits: Vec<f64> = rounded.map(|p| p.from.bits()).collect();
    if let Some(least) = bits.iter().copied().reduce(f64::min) {
        eprintln!(
            "note: {} matrices are rounded already (from {least:.1} bits); their first rounding is kept as part of the error",
            bits.len()
        );
    }
}

/// Tokens on which it is measured what each tensor matters.
const PROBE_TOKENS: usize = 256;

/// The types that fit the budget, chosen by measuring.
fn plan_for_budget(
    args: &Args,
    opened: &Opened,
    tokens: &Tokens,
    device: &Device,
) -> anyhow::Result<Vec<TensorPlan>> {
    let (source, model) = (&opened.source, &opened.model);
    let mut plan = recipe::plan_with(model, source, |_| DType::Q8_0)?;
    let weights: usize = plan.iter().map(TensorPlan::numel).sum();
    // Names, shapes and the vocabulary take what they take in the source.
    let stored: usize = source.tensors().iter().map(|t| t.bytes_len().next_multiple_of(32)).sum();
    let head = (std::fs::metadata(source.path())?.len() as usize).saturating_sub(stored) + PASSPORT_BYTES;
    let budget = match (args.size, args.bits) {
        (Some(size), _) => size.saturating_sub(head),
        (None, bits) => (bits.unwrap_or_default() * weights as f64 / 8.0) as usize,
    };
    let bar = text::bar(1000, "measuring");
    let probe = &tokens.ids()[..PROBE_TOKENS.min(tokens.ctx())];
    let sensitivity = budget::sensitivity(source, model, device, &plan, probe, &mut |share, name| {
        bar.set_position((share * 1000.0) as u64);
        bar.set_message(name.to_string());
    })?;
    bar.finish_and_clear();
    let choices = budget::choices(source, &plan, &sensitivity)?;
    let Some(chosen) = budget::allocate(&choices, budget) else {
        let least: usize = choices.iter().filter_map(|c| c.iter().map(|c| c.bytes).min()).sum();
        bail!(
            "the smallest file of this model that can be written takes {}; give --size {} or more",
            text::bytes(least + head),
            text::bytes(least + head)
        );
    };
    for (i, p) in plan.iter_mut().enumerate() {
        p.to = choices[i][chosen[i]].dtype;
        p.wanted = None;
    }
    if !args.json {
        text::say(allocation_table(&plan, &sensitivity))?;
    }
    Ok(plan)
}

/// What the passport's keys may take in the file.
const PASSPORT_BYTES: usize = 4096;

/// What went where: types and divergences by kind of tensor.
fn allocation_table(plan: &[TensorPlan], sensitivity: &[f64]) -> String {
    let mut kinds: Vec<(String, f64, BTreeMap<DType, usize>)> = Vec::new();
    for (p, &kl) in plan.iter().zip(sensitivity).filter(|(p, _)| p.to.is_block()) {
        let kind = match p.gguf_name.strip_prefix("blk.").and_then(|n| n.split_once('.')) {
            Some((_, kind)) => kind.to_string(),
            None => p.gguf_name.clone(),
        };
        let at = kinds.iter().position(|k| k.0 == kind).unwrap_or_else(|| {
            kinds.push((kind, 0.0, BTreeMap::new()));
            kinds.len() - 1
        });
        kinds[at].1 += kl;
        *kinds[at].2.entry(p.to).or_default() += 1;
    }
    let rows: Vec<Vec<String>> = kinds
        .into_iter()
        .map(|(kind, kl, types)| {
            let types: Vec<String> = types.iter().map(|(t, n)| format!("{n} {t}")).collect();
            vec![kind, format!("{kl:.4}"), types.join(", ")]
        })
        .collect();
    text::table(&["tensors", "divergence at 3 bits", "types"], &rows)
}

/// Calibration tokens from the file.
fn calibration(args: &Args, opened: &Opened) -> anyhow::Result<Tokens> {
    let Some(path) = &args.calibration else {
        bail!(
            "GPTQ needs text like what the model will read: give --calibration FILE, or choose --method nearest"
        );
    };
    let text = read_text(path)?;
    let ids = opened.tokenizer()?.encode(&text, Specials::default())?;
    let ids = ids.get(args.calibration_skip..).unwrap_or_default();
    Ok(Tokens::new(ids, args.samples, args.ctx)?)
}

/// A text, or the strings of a file of JSON lines.
fn read_text(path: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    if path.extension().is_none_or(|e| e != "jsonl") {
        return Ok(text);
    }
    let mut parts = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let at = || format!("{}, line {}", path.display(), i + 1);
        let value: serde_json::Value = serde_json::from_str(line).with_context(at)?;
        let Some(object) = value.as_object() else { bail!("{}: is no JSON object", at()) };
        let strings: Vec<&str> = match object.get("text").and_then(|t| t.as_str()) {
            Some(text) => vec![text],
            None => object.values().filter_map(|v| v.as_str()).collect(),
        };
        if strings.is_empty() {
            bail!("{}: holds no string; each line needs \"text\" or other strings", at());
        }
        parts.push(strings.join("\n"));
    }
    Ok(parts.join("\n\n"))
}

/// The source's metadata with what this run did.
fn with_passport(metadata: &gguf::Metadata, args: &Args, tokens: Option<&Tokens>) -> gguf::Metadata {
    use gguf::Value;
    let mut m = metadata.clone();
    for key in ["split.no", "split.count", "split.tensors.count"] {
        m.remove(key);
    }
    let named = args.type_name.as_deref().and_then(recipe::file_type);
    match named {
        Some((_, number)) => m.insert("general.file_type", Value::U32(number)),
        None => m.remove("general.file_type"),
    };
    m.insert("general.quantization_version", Value::U32(2));
    m.insert("sparsam.version", Value::String(env!("CARGO_PKG_VERSION").into()));
    m.insert("sparsam.type", Value::String(named.map_or("budget", |(name, _)| name).into()));
    m.insert("sparsam.method", Value::String(format!("{:?}", args.method).to_lowercase()));
    if let Some(tokens) = tokens {
        let file = args.calibration.as_ref().and_then(|p| p.file_name()).unwrap_or_default();
        m.insert("sparsam.calibration", Value::String(file.to_string_lossy().into()));
        m.insert("sparsam.calibration.skip", Value::U64(args.calibration_skip as u64));
        m.insert("sparsam.calibration.samples", Value::U64(tokens.samples() as u64));
        m.insert("sparsam.calibration.ctx", Value::U64(tokens.ctx() as u64));
        m.insert("sparsam.calibration.hash", Value::String(format!("{:016x}", tokens.hash())));
        m.insert("sparsam.damping", Value::F32(args.damping));
        m.insert("sparsam.asymmetric", Value::F32(args.asymmetric));
        m.insert("sparsam.refinements", Value::U64(args.refinements as u64));
    }
    m
}

/// Bytes and bits of the plan by type.
fn by_type(plan: &[TensorPlan]) -> BTreeMap<String, (usize, usize, usize)> {
    let mut groups: BTreeMap<String, (usize, usize, usize)> = BTreeMap::new();
    for p in plan {
        let g = groups.entry(p.to.to_string()).or_default();
        *g = (g.0 + 1, g.1 + p.numel(), g.2 + p.bytes());
    }
    groups
}

fn dry_run(args: &Args, opened: &Opened, plan: &[TensorPlan]) -> anyhow::Result<()> {
    let bytes: usize = plan.iter().map(TensorPlan::bytes).sum();
    let weights: usize = plan.iter().map(TensorPlan::numel).sum();
    let tokens = if args.method == MethodName::Gptq { args.samples * args.ctx } else { 0 };
    let facts = opened.model.facts();
    // Both streams; one block's weights twice (as they are and as f32); the widest Hessian, its sums and its factor.
    let widest = plan.iter().filter(|p| p.grid().is_some()).map(|p| p.spec.shape[1]).max().unwrap_or(0);
    let block = plan.iter().map(TensorPlan::numel).sum::<usize>() / facts.n_layers().max(1);
    let memory = if tokens == 0 {
        12 * plan.iter().map(TensorPlan::numel).max().unwrap_or(0)
    } else {
        4 * (2 * 2 * tokens * facts.hidden_size + 3 * block) + 6 * 4 * widest * widest
    };
    if args.json {
        return text::say_json(&json!({
            "tensor_bytes": bytes,
            "bits_per_weight": 8.0 * bytes as f64 / weights as f64,
            "calibration_tokens": tokens,
            "memory_bytes": memory,
            "types": by_type(plan).iter().map(|(t, g)| (t.clone(), json!({"tensors": g.0, "weights": g.1, "bytes": g.2}))).collect::<serde_json::Map<_, _>>(),
        }));
    }
    text::say(types_table(plan))?;
    text::say(format!(
        "{} in tensors, {:.2} bits a weight; about {} of memory; {} calibration tokens",
        text::bytes(bytes),
        8.0 * bytes as f64 / weights as f64,
        text::bytes(memory),
        tokens
    ))
}

fn types_table(plan: &[TensorPlan]) -> String {
    let rows: Vec<Vec<String>> = by_type(plan)
        .iter()
        .map(|(t, (n, weights, bytes))| {
            vec![t.clone(), n.to_string(), text::count(*weights), text::bytes(*bytes)]
        })
        .collect();
    text::table(&["type", "tensors", "weights", "bytes"], &rows)
}

/// Scores both models, writes the report beside the file and prints it.
fn report(
    args: &Args,
    opened: &Opened,
    plan: &[TensorPlan],
    layers: Vec<Layer>,
    tokens: Option<&Tokens>,
    seconds: f64,
) -> anyhow::Result<()> {
    let bytes: usize = plan.iter().map(TensorPlan::bytes).sum();
    let weights: usize = plan.iter().map(TensorPlan::numel).sum();
    let name = |p: &Path| p.file_name().unwrap_or_default().to_string_lossy().to_string();
    let calibration = tokens.map(|t| {
        let file = args.calibration.as_deref().map(name).unwrap_or_default();
        let skip = args.calibration_skip;
        format!(
            "{file} from token {skip} on, {} sequences of {} tokens, {:016x}",
            t.samples(),
            t.ctx(),
            t.hash()
        )
    });
    let method = match args.method {
        MethodName::Nearest => "nearest codes, searched scales".to_string(),
        MethodName::Gptq => format!(
            "GPTQ, damping {}, act-order {}, {} refinements, asymmetric {}",
            args.damping, !args.no_act_order, args.refinements, args.asymmetric
        ),
    };
    let report = Report {
        output: name(&args.output),
        parent: name(opened.source.path()),
        bytes: std::fs::metadata(&args.output)?.len() as usize,
        parent_bytes: opened.source.tensors().iter().map(|t| t.bytes_len()).sum(),
        bits_per_weight: 8.0 * bytes as f64 / weights as f64,
        method,
        calibration,
        seconds,
        score: score(args, opened)?,
        layers,
    };
    for (kind, content) in [("json", serde_json::to_string_pretty(&report)?), ("html", report.html())] {
        let path = args.output.with_file_name(format!("{}.{kind}", report.output));
        let mut file = sparsam_formats::AtomicFile::create(&path)?;
        file.write_all(content.as_bytes()).with_context(|| path.display().to_string())?;
        file.commit()?;
    }
    if args.json {
        return text::say_json(&serde_json::to_value(&report)?);
    }
    text::say(types_table(plan))?;
    if let Some((ours, nearest)) = report.mean_errors() {
        text::say(format!(
            "error of the layers' outputs: {:.3}% of their size on average, {:.3}% by nearest rounding on the same scales",
            100.0 * ours,
            100.0 * nearest
        ))?;
        for layer in report.layers.iter().filter(|l| l.raised_damping.is_some() || l.dead_inputs > 0) {
            let damping =
                layer.raised_damping.map(|d| format!("; damping raised to {d}")).unwrap_or_default();
            text::say(format!("{}: {} inputs never used{damping}", layer.name, layer.dead_inputs))?;
        }
    }
    if let Some(s) = &report.score {
        text::say(format!(
            "perplexity {:.4}, before {:.4} ({})",
            s.perplexity, s.perplexity_before, s.protocol
        ))?;
        text::say(format!(
            "divergence {:.5} nats a token, 99% below {:.3}; same top token {:.2}%",
            s.divergence,
            s.divergence_p99,
            100.0 * s.top1_agreement
        ))?;
    }
    text::say(format!(
        "{}: {}, {:.2} bits a weight, {}; report in {}.json and .html",
        args.output.display(),
        text::bytes(report.bytes),
        report.bits_per_weight,
        text::duration(std::time::Duration::from_secs_f64(seconds)),
        report.output
    ))
}

/// Windows that are scored of the text that `--eval` names: as for the published figures.
const SCORED: Protocol = Protocol { context: 512, windows: Windows::SideBySide, chunks: Some(16) };

/// Both models on the text that `--eval` names.
fn score(args: &Args, opened: &Opened) -> anyhow::Result<Option<Score>> {
    let Some(path) = &args.eval else { return Ok(None) };
    let tokens = opened.tokenizer()?.encode(&read_text(path)?, Specials::default())?;
    let options = Options { threads: args.threads, exact: true, ..Options::default() };
    let parent = Engine::load(opened.source.path(), &options)?;
    let child = Engine::load(&args.output, &options)?;
    let bar = text::bar(0, "scoring");
    let c = compare(&child, &parent, &tokens, &SCORED, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        std::ops::ControlFlow::Continue(())
    })?;
    bar.finish_and_clear();
    Ok(Some(Score {
        text: path.file_name().unwrap_or_default().to_string_lossy().to_string(),
        protocol: SCORED.to_string(),
        tokens_scored: c.perplexity.tokens_scored,
        perplexity_before: c.reference.perplexity,
        perplexity: c.perplexity.perplexity,
        divergence: c.divergence,
        divergence_p99: c.divergence_p99,
        top1_agreement: c.top1_agreement,
    }))
}
