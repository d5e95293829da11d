//! `sparsam convert`: a model in another format or another type.

use crate::ledger::Ledger;
use crate::{expected, model, receipt, text};
use anyhow::bail;
use serde_json::json;
use sparsam_dtype::{DType, codec};
use sparsam_engine::{Opened, Plan, Saver, storable};
use sparsam_formats::Kind;
use sparsam_models::WeightSpec;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// A model in another format (GGUF, safetensors folder) or another type
#[derive(clap::Args)]
#[command(
    after_help = "A name that ends in .gguf makes a GGUF file, any other a folder with safetensors files, config.json
and the tokenizer's files, as transformers loads them. Without --dtype every tensor keeps its type; in a
folder, which holds plain numbers only, rounded weights become F32, which is exact.

Examples:
  sparsam convert model.Q4_1.gguf ./model
  sparsam convert ./model model.gguf --dtype Q8_0
  sparsam convert model.gguf model-bf16.gguf --dtype BF16"
)]
pub struct Args {
    /// A GGUF file, a safetensors file or folder, builtin, or ORG/NAME of the hub if it is in the cache
    #[arg(value_name = "IN")]
    input: String,
    /// The GGUF file or the new folder to write
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Type of the weights: F32, F16, BF16; in GGUF files also Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS
    #[arg(long, value_parser = dtype)]
    dtype: Option<DType>,
    /// Replace the file OUT if it is there (folders are never replaced)
    #[arg(long)]
    force: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A type that weights may be written in.
fn dtype(name: &str) -> Result<DType, String> {
    let ours = |d: &DType| {
        codec::can_encode(*d)
            && !matches!(d, DType::F64 | DType::Q8_1 | DType::Q8_K | DType::NF4)
            && !d.is_state()
    };
    DType::from_name(name).filter(ours).ok_or_else(|| {
        let names: Vec<&str> = DType::ALL.iter().filter(|d| ours(d)).map(|d| d.name()).collect();
        format!("there is no such type; known are {}", names.join(", "))
    })
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let start = Instant::now();
    let input = model::resolve(&args.input)?;
    let kind = kind_of(&args.output)?;
    if let Some(dtype) = args.dtype.filter(|d| d.is_block() && kind == Kind::Safetensors) {
        bail!(
            "{dtype} is a type of GGUF files, and a safetensors folder cannot hold it; choose F32, F16 or BF16, or name OUT *.gguf"
        );
    }
    check_output(&input, &args.output, args.force)?;
    let opened = sparsam_engine::open(&input)?;
    let specs = opened.model.weights(&opened.source)?;
    let plan = plan(&opened, &specs, kind, args.dtype)?;
    let mut notes = rounding_notes(&opened, &specs, &plan, args.dtype)?;
    let mut saver = Saver::create(&args.output, kind, &opened.model, opened.tokenizer.as_ref(), &plan)?;
    notes.extend(saver.notes().iter().cloned());
    if opened.tokenizer.is_none() && kind == Kind::Safetensors {
        notes.push("the model comes without a tokenizer: the folder has none either".into());
    }

    // Half a file is of no use: Ctrl-C stops between two tensors, and what was written goes away.
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed))?;
    let bar = text::bar(specs.len() as u64, "tensors");
    for spec in &specs {
        if stop.load(Ordering::Relaxed) {
            bail!("stopped; nothing was written");
        }
        let tensor = opened.source.require(&spec.source_name)?;
        let turned = spec.transform.apply(tensor.bytes, tensor.info.dtype, &tensor.info.shape)?;
        saver.append(&spec.name, &spec.shape, turned.dtype, &turned.bytes)?;
        drop(turned);
        opened.source.release(&spec.source_name);
        bar.inc(1);
    }
    saver.finish()?;
    bar.finish_and_clear();
    if receipt::is_recorded(&input)? {
        let mut ledger = Ledger::new("convert", expected::machine(1, &args.output), start);
        ledger.parent("base", &input);
        ledger.finish(&args.output, None)?;
    }
    report(&args, &opened, kind, &plan, &notes, start)
}

fn kind_of(output: &Path) -> anyhow::Result<Kind> {
    let ending = output.extension().and_then(|e| e.to_str()).unwrap_or_default().to_lowercase();
    match ending.as_str() {
        "gguf" => Ok(Kind::Gguf),
        "safetensors" | "bin" | "pt" | "pth" | "json" => bail!(
            "{}: OUT is the name of a GGUF file (*.gguf) or of a folder for safetensors files; give a folder",
            output.display()
        ),
        _ => Ok(Kind::Safetensors),
    }
}

/// Nothing is written over by accident.
fn check_output(input: &Path, output: &Path, force: bool) -> anyhow::Result<()> {
    if !output.exists() {
        return Ok(());
    }
    let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same(input, output) {
        bail!("{}: OUT is IN; name another file", output.display());
    }
    if output.is_file() && !force {
        bail!("{} exists; name another file, or pass --force to replace it", output.display());
    }
    Ok(())
}

/// Each tensor in the wanted type, or in its own.
fn plan(opened: &Opened, specs: &[WeightSpec], kind: Kind, wanted: Option<DType>) -> anyhow::Result<Plan> {
    let mut own = HashMap::new();
    for spec in specs {
        own.insert(spec.name.as_str(), opened.source.require(&spec.source_name)?.info.dtype);
    }
    let plan = Plan::new(&opened.model, |p| {
        let dtype = wanted.or(own.get(p.name.as_str()).copied()).unwrap_or(DType::F32);
        storable(kind, p, dtype)
    })?;
    Ok(plan.about(&opened.source))
}

/// What happens to the weights that the user may not expect.
fn rounding_notes(
    opened: &Opened,
    specs: &[WeightSpec],
    plan: &Plan,
    wanted: Option<DType>,
) -> anyhow::Result<Vec<String>> {
    let mut notes = Vec::new();
    let (mut again, mut other) = (0, 0);
    for (spec, planned) in specs.iter().zip(&plan.tensors) {
        let from = opened.source.require(&spec.source_name)?.info.dtype;
        again += usize::from(from.is_block() && planned.dtype.is_block() && from != planned.dtype);
        let matrix = spec.shape.len() > 1;
        other += usize::from(matrix && wanted.is_some_and(|w| w.is_block() && w != planned.dtype));
    }
    if again > 0 {
        notes.push(format!(
            "{again} tensors were rounded already and are rounded again, which loses more than rounding the original would"
        ));
    }
    if let (true, Some(wanted)) = (other > 0, wanted) {
        notes.push(format!(
            "{other} matrices have rows that are no whole number of {wanted} blocks of {} and take a type with smaller blocks",
            wanted.block_len()
        ));
    }
    Ok(notes)
}

fn report(
    args: &Args,
    opened: &Opened,
    kind: Kind,
    plan: &Plan,
    notes: &[String],
    start: Instant,
) -> anyhow::Result<()> {
    let bytes = size(&args.output)?;
    let parameters = opened.model.n_parameters()?;
    let mut types: BTreeMap<DType, usize> = BTreeMap::new();
    for t in &plan.tensors {
        *types.entry(t.dtype).or_default() += 1;
    }
    if args.json {
        let by_type = types.iter().map(|(dtype, n)| (dtype.to_string(), json!(n)));
        return text::say_json(&json!({
            "path": args.output,
            "format": if kind == Kind::Gguf { "gguf" } else { "safetensors" },
            "parameters": parameters,
            "bytes": bytes,
            "tensors": by_type.collect::<serde_json::Map<_, _>>(),
            "notes": notes,
            "seconds": start.elapsed().as_secs_f64(),
        }));
    }
    for note in notes {
        eprintln!("note: {note}");
    }
    let types: Vec<String> = types.iter().map(|(dtype, n)| format!("{n} x {dtype}")).collect();
    text::say(format_args!(
        "{}: {} parameters, {} ({}), {}",
        args.output.display(),
        text::count(parameters),
        text::bytes(bytes),
        types.join(", "),
        text::duration(start.elapsed())
    ))
}

/// Bytes of a file, or of all files in a folder.
fn size(path: &Path) -> anyhow::Result<usize> {
    let meta = std::fs::metadata(path)?;
    if !meta.is_dir() {
        return Ok(meta.len() as usize);
    }
    let mut sum = 0;
    for entry in std::fs::read_dir(path)? {
        sum += entry?.metadata()?.len() as usize;
    }
    Ok(sum)
}
