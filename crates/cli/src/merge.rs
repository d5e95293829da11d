//! `sparsam merge`: an adapter becomes part of the model.

use crate::ledger::Ledger;
use crate::{expected, model, text};
use anyhow::{Context, bail};
use serde_json::json;
use sparsam_dtype::DType;
use sparsam_engine::{Divergence, Engine, Options, Plan, divergence, merge, open, storable};
use sparsam_formats::Kind;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Merge adapters into a model: one file, as fast as the model alone
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam merge model.gguf --adapter runs/mine/adapter -o mine.gguf               in the model's own types
  sparsam merge model.gguf --adapter runs/mine/adapter -o mine-f16 --type F16     a Hugging Face folder
  sparsam merge model.gguf --adapter runs/mine/adapter -o mine.gguf --type Q8_0

The result is measured before it is kept: how far its predictions are from those of model and adapter, beside how far
the model alone is from them. If rounding undid half of what the adapter changes, or more than --limit, nothing is kept.")]
pub struct Args {
    /// A GGUF file, a safetensors file or folder, builtin, or ORG/NAME of the hub if it is in the cache
    model: String,
    /// A folder with an adapter in PEFT's layout; may be given more than once
    #[arg(long, value_name = "DIR", required = true)]
    adapter: Vec<PathBuf>,
    /// A GGUF file if it ends so, else a folder as Hugging Face lays it out
    #[arg(long, short, value_name = "PATH")]
    out: PathBuf,
    /// Type of the matrices: F16, BF16, Q8_0, Q4_K, .. [default: as the model stores them; F16 in a folder]
    #[arg(long = "type", value_name = "TYPE")]
    dtype: Option<String>,
    /// Largest divergence from model and adapter, nats a token [default: half of what the adapter changes, at least 0.02]
    #[arg(long, value_name = "NATS")]
    limit: Option<f64>,
    /// Threads (0: all cores)
    #[arg(long, short = 't', default_value_t = 0)]
    threads: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Divergence that is let pass whatever the adapter changes.
const HARMLESS: f64 = 0.02;

pub fn run(args: Args) -> anyhow::Result<()> {
    let start = Instant::now();
    let path = model::resolve(&args.model)?;
    let opened = open(&path)?;
    let is_gguf = args.out.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    let kind = if is_gguf { Kind::Gguf } else { Kind::Safetensors };
    if args.out.exists() {
        bail!("{}: is there already; name another file or folder", args.out.display());
    }
    let wanted = match &args.dtype {
        Some(name) => Some(DType::from_name(name).with_context(|| format!("--type {name}: no such type"))?),
        None => None,
    };
    let plan = plan(&opened, kind, wanted)?;
    let adapters: Vec<(PathBuf, f64)> = args.adapter.iter().map(|a| (a.clone(), 1.0)).collect();
    let draft = draft(&args.out)?;
    remove(&draft)?;
    let merged = merge(&opened, &adapters, &draft, kind, &plan)?;
    drop(opened);
    eprintln!("{} layers merged; measuring", merged.layers);
    let measured = measure(&path, &adapters, &draft, args.threads);
    let (result, base) = match measured {
        Ok(both) => both,
        Err(e) => {
            remove(&draft)?;
            return Err(e);
        }
    };
    let limit = args.limit.unwrap_or((base.kl / 2.0).max(HARMLESS));
    // NaN is above any limit.
    if result.kl.is_nan() || result.kl > limit {
        remove(&draft)?;
        bail!(
            "the merged model is {:.4} nats a token from model and adapter, more than {limit:.4} (the adapter changes {:.4}): rounding undid what was learnt. Choose a --type with more bits, or --limit; nothing was kept",
            result.kl,
            base.kl
        );
    }
    std::fs::rename(&draft, &args.out)
        .with_context(|| format!("cannot rename {} to {}", draft.display(), args.out.display()))?;
    let mut ledger = Ledger::new("merge", expected::machine(args.threads, &args.out), start);
    ledger.parent("base", &path);
    args.adapter.iter().for_each(|adapter| ledger.parent("adapter", adapter));
    ledger.finish(&args.out, None)?;
    if args.json {
        let of = |d: &Divergence| json!({"kl": d.kl, "agreement": d.agreement, "tokens": d.tokens});
        return text::say_json(&json!({
            "out": args.out,
            "layers": merged.layers,
            "merged_from_adapted": of(&result),
            "base_from_adapted": of(&base),
            "limit": limit,
            "notes": merged.notes,
        }));
    }
    let say = |what: &str, d: &Divergence| {
        text::say(format_args!(
            "{what}  {:.5} nats a token, {:.1}% of {} tokens the same",
            d.kl,
            100.0 * d.agreement,
            d.tokens
        ))
    };
    text::say("divergence from model and adapter, on text that these write:")?;
    say("merged       ", &result)?;
    say("model alone  ", &base)?;
    merged.notes.iter().try_for_each(text::say)?;
    text::say(args.out.display())
}

/// Types as the model's, or `wanted` where the format and a tensor's shape allow it.
fn plan(opened: &sparsam_engine::Opened, kind: Kind, wanted: Option<DType>) -> anyhow::Result<Plan> {
    let own: std::collections::HashMap<String, DType> = opened
        .model
        .weights(&opened.source)?
        .into_iter()
        .filter_map(|spec| Some((spec.name, opened.source.tensor(&spec.source_name)?.info.dtype)))
        .collect();
    let fallback = if kind == Kind::Gguf { None } else { Some(DType::F16) };
    let plan = Plan::new(&opened.model, |p| {
        let own = own.get(&p.name).copied().unwrap_or(DType::F32);
        storable(kind, p, wanted.or(fallback).unwrap_or(own))
    })?;
    Ok(plan.about(&opened.source).with_probes())
}

/// Where the result lies until it is found good: beside its place.
fn draft(out: &Path) -> anyhow::Result<PathBuf> {
    let name = out.file_name().with_context(|| format!("{}: names no file", out.display()))?;
    Ok(out.with_file_name(format!(".merging-{}", name.to_string_lossy())))
}

fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = match path {
        p if p.is_dir() => std::fs::remove_dir_all(p),
        p if p.exists() => std::fs::remove_file(p),
        _ => Ok(()),
    };
    removed.with_context(|| format!("cannot delete {}", path.display()))
}

/// How far merged and base are from base and adapter.
fn measure(
    base: &Path,
    adapters: &[(PathBuf, f64)],
    merged: &Path,
    threads: usize,
) -> anyhow::Result<(Divergence, Divergence)> {
    let options = Options { threads, exact: true, ..Options::default() };
    let adapted = Engine::load(base, &Options { adapters: adapters.to_vec(), ..options.clone() })?;
    let (merged, alone) = (Engine::load(merged, &options)?, Engine::load(base, &options)?);
    let found = divergence(&adapted, &[&merged, &alone])?;
    Ok((found[0], found[1]))
}
