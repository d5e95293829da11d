//! `sparsam info`: what a model is and what it needs.

use crate::{model, passport, text};
use serde_json::json;
use sparsam_dtype::DType;
use sparsam_engine::Opened;
use std::collections::BTreeMap;

/// What a model is: architecture, parameters, types, memory it needs
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam info model.gguf
  sparsam info ./SmolLM2-135M-Instruct --json
  sparsam info model.gguf --tensors")]
pub struct Args {
    /// A GGUF file, a safetensors file or folder, builtin, or ORG/NAME of the hub if it is in the cache
    model: String,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Tensors of one type.
#[derive(Default)]
struct Group {
    tensors: usize,
    numbers: usize,
    bytes: usize,
}

/// Contexts whose memory is shown, those up to the model's own.
const CONTEXTS: [usize; 6] = [512, 2048, 8192, 32768, 131072, 1_048_576];

pub fn run(args: Args) -> anyhow::Result<()> {
    let opened = sparsam_engine::open(&model::resolve(&args.model)?)?;
    // Checks that every tensor is there with the right shape.
    let specs = opened.model.weights(&opened.source)?;
    let facts = opened.model.facts();
    let mut groups: BTreeMap<DType, Group> = BTreeMap::new();
    for spec in &specs {
        let info = opened.source.require(&spec.source_name)?.info;
        let group = groups.entry(info.dtype).or_default();
        group.tensors += 1;
        group.numbers += info.numel();
        group.bytes += info.bytes_len();
    }
    let parameters = opened.model.n_parameters()?;
    let bytes: usize = groups.values().map(|g| g.bytes).sum();
    let bits = 8.0 * bytes as f64 / parameters as f64;
    let mut contexts: Vec<usize> = CONTEXTS.into_iter().filter(|&c| c < facts.context_length).collect();
    contexts.push(facts.context_length);
    let cache = |context: usize, dtype: DType| facts.cache_bytes_per_token(dtype).map(|b| b * context);

    if args.json {
        let by_type = groups.iter().map(|(dtype, g)| {
            (dtype.to_string(), json!({"tensors": g.tensors, "parameters": g.numbers, "bytes": g.bytes}))
        });
        let memory = contexts.iter().map(|&c| {
            json!({"context": c, "cache_bytes_f16": cache(c, DType::F16), "bytes": cache(c, DType::F16).map(|b| b + bytes)})
        });
        let mut value = json!({
            "path": opened.source.path(),
            "architecture": facts.architecture,
            "name": name(&opened),
            "parameters": parameters,
            "bytes": bytes,
            "bits_per_weight": bits,
            "layers": facts.n_layers(),
            "hidden_size": facts.hidden_size,
            "intermediate_size": facts.intermediate_size,
            "heads": facts.heads.n_heads,
            "kv_heads": facts.heads.n_kv_heads,
            "head_dim": facts.heads.head_dim,
            "vocab_size": facts.vocab_size,
            "context_length": facts.context_length,
            "tied_head": facts.tied_head,
            "tokenizer": opened.tokenizer.is_some(),
            "chat_template": opened.tokenizer.as_ref().is_some_and(|t| t.chat_template().is_some()),
            "types": by_type.collect::<serde_json::Map<_, _>>(),
            "memory": memory.collect::<Vec<_>>(),
            "passport": passport::of(&opened).map(|p| p.to_json()),
        });
        if args.tensors {
            let tensors = opened.source.tensors().iter();
            let list =
                tensors.map(|t| json!({"name": t.name, "shape": t.shape, "dtype": t.dtype.to_string()}));
            value["tensors"] = list.collect();
        }
        return text::say_json(&value);
    }

    let window = facts.windows.iter().flatten().min();
    let mut lines = vec![
        (
            "model",
            format!("{} ({})", name(&opened).unwrap_or("unnamed".into()), opened.source.path().display()),
        ),
        ("architecture", facts.architecture.to_string()),
        (
            "shape",
            format!(
                "{} layers, {} wide, MLP {}, {} heads of {} ({} for keys)",
                facts.n_layers(),
                facts.hidden_size,
                facts.intermediate_size,
                facts.heads.n_heads,
                facts.heads.head_dim,
                facts.heads.n_kv_heads
            ),
        ),
        (
            "vocabulary",
            format!(
                "{} tokens{}",
                facts.vocab_size,
                if facts.tied_head { ", table shared with the head" } else { "" }
            ),
        ),
        ("parameters", format!("{} ({parameters})", text::count(parameters))),
        ("size", format!("{}, {bits:.2} bits a weight", text::bytes(bytes))),
        ("context", format!("{} tokens", facts.context_length)),
    ];
    if let Some(window) = window {
        let n = facts.windows.iter().flatten().count();
        lines.push(("window", format!("{window} tokens in {n} of {} layers", facts.n_layers())));
    }
    lines.push(("tokenizer", tokenizer(&opened)));
    for (name, value) in lines {
        text::say(format_args!("{name:<13} {value}"))?;
    }

    if let Some(passport) = passport::of(&opened) {
        text::say("")?;
        for (name, value) in passport.lines() {
            text::say(format_args!("{name:<13} {value}"))?;
        }
    }

    let rows: Vec<Vec<String>> = groups
        .iter()
        .map(|(dtype, g)| {
            vec![dtype.to_string(), g.tensors.to_string(), text::count(g.numbers), text::bytes(g.bytes)]
        })
        .collect();
    text::say(format_args!("\n{}", text::table(&["type", "tensors", "weights", "bytes"], &rows)))?;

    let cell = |bytes: Option<usize>| bytes.map_or("-".to_string(), text::bytes);
    let rows: Vec<Vec<String>> = contexts
        .iter()
        .map(|&c| {
            let f16 = cache(c, DType::F16);
            vec![c.to_string(), cell(f16), cell(cache(c, DType::Q8_0)), cell(f16.map(|b| b + bytes))]
        })
        .collect();
    let head = ["context", "cache F16", "cache Q8_0", "weights + cache F16"];
    text::say(format_args!("\n{}", text::table(&head, &rows)))?;

    if args.tensors {
        let rows: Vec<Vec<String>> = opened
            .source
            .tensors()
            .iter()
            .map(|t| {
                vec![
                    t.name.clone(),
                    t.dtype.to_string(),
                    format!("{:?}", t.shape),
                    text::bytes(t.bytes_len()),
                ]
            })
            .collect();
        text::say(format_args!("\n{}", text::table(&["tensor", "type", "shape", "bytes"], &rows)))?;
    }
    Ok(())
}

/// The model's own name for itself.
fn name(opened: &Opened) -> Option<String> {
    if let Some(metadata) = opened.source.gguf_metadata() {
        return metadata.opt_str("general.name").ok().flatten().map(str::to_string);
    }
    let config = opened.source.config_json()?;
    config.get("_name_or_path").and_then(|v| v.as_str()).filter(|v| !v.is_empty()).map(str::to_string)
}

fn tokenizer(opened: &Opened) -> String {
    let Some(tokenizer) = &opened.tokenizer else {
        return "none: the model cannot read or write text".into();
    };
    let template = match tokenizer.chat_template() {
        Some(_) => "chat template",
        None => "no chat template",
    };
    let stop: Vec<String> = tokenizer.stop_ids().iter().filter_map(|&id| tokenizer.token(id)).collect();
    format!("{} tokens, {template}, ends at {}", tokenizer.vocab_size(), stop.join(" "))
}
