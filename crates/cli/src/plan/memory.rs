//! `sparsam plan memory`: what a model needs to answer and to learn, and where that fits.

use super::hardware::{Chosen, Hardware};
use super::subject::{Known, Subject};
use super::{Answer, Output};
use serde_json::{Value, json};
use sparsam_plan::hardware::Accelerator;
use sparsam_plan::memory::{self, Memory, Optimiser, Precision, Rounding, Step, Use};
use sparsam_plan::report::{Report, Table};
use sparsam_plan::units::{show_bytes, show_whole};

/// What a model needs in memory to answer and to learn, and how many accelerators hold it
///
/// Files are planned from their real tensors. Counted by kind: weights, cache of keys and values, gradients, the
/// optimiser's moments, activations, scratch.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sparsam plan memory llama-65b
  sparsam plan memory gpt-3 --hardware a100
  sparsam plan memory model.gguf --context 2k,32k --batch 8
  sparsam plan memory --params 7B --rank 64 --step-tokens 8k --no-recompute")]
pub struct Args {
    #[command(flatten)]
    subject: Subject,
    /// Tokens of context kept for each sequence
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "2048,32768", value_parser = super::tokens, allow_hyphen_values = true)]
    context: Vec<f64>,
    /// Sequences answered at once
    #[arg(long, value_name = "N", default_value = "1", value_parser = super::count_of, allow_hyphen_values = true)]
    batch: f64,
    /// Bits of an element of the cache
    #[arg(long, value_name = "BITS", default_value = "16", value_parser = super::count_of, allow_hyphen_values = true)]
    cache_bits: f64,
    /// Rank of the adapters
    #[arg(long, value_name = "R", default_value = "16", value_parser = super::count_of, allow_hyphen_values = true)]
    rank: f64,
    /// Tokens in one forward and backward pass
    #[arg(long, value_name = "TOKENS", default_value = "512", value_parser = super::tokens, allow_hyphen_values = true)]
    step_tokens: f64,
    /// Keep all activations instead of only each block's input
    #[arg(long)]
    no_recompute: bool,
    #[command(flatten)]
    hardware: Hardware,
    #[command(flatten)]
    output: Output,
}

/// One row: a way to use the model, and what it takes.
struct Row {
    name: String,
    detail: String,
    memory: Memory,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let known = args.subject.known()?;
    let chosen = args.hardware.chosen(&["rtx-4090", "l40s", "h100", "h200"])?;
    let answer = answer(&args, &known, &chosen);
    args.output.give(&answer)
}

fn answer(args: &Args, known: &Known, chosen: &Chosen) -> Answer {
    let inference = inference_rows(args, known);
    let training = training_rows(args, known);
    let mut report = Report::new(format!("Memory of {}", known.shape.name));
    report.text(known.describe());
    let title = format!(
        "To answer {} at once, cache in {} bits",
        if args.batch == 1.0 {
            "one sequence".into()
        } else {
            format!("{} sequences", show_whole(args.batch))
        },
        args.cache_bits
    );
    let kinds = |m: &Memory| vec![show_bytes(m.weights), show_bytes(m.cache), show_bytes(m.temporary)];
    report.table(table(
        &title,
        ["weights", "context"],
        &["weights", "cache", "scratch"],
        &inference,
        kinds,
        chosen,
    ));
    let title = format!(
        "To learn, {} tokens a step{}",
        show_whole(args.step_tokens),
        if args.no_recompute { "" } else { ", activations computed again" }
    );
    let kinds = |m: &Memory| {
        vec![
            show_bytes(m.weights),
            show_bytes(m.gradients),
            show_bytes(m.optimiser),
            show_bytes(m.activations + m.temporary),
        ]
    };
    let columns = ["weights", "grads", "moments", "activ."];
    report.table(table(&title, ["method", "numbers"], &columns, &training, kinds, chosen));
    report.text(
        "Columns of accelerators say how many hold it, weights, gradients and moments spread evenly; `-`: \
         activations and scratch (`activ.`) alone exceed one. `mixed`: 16 bits to compute with and a copy in 32 to \
         step. GB are powers of ten; what a card reports above its nominal size is left as \
         reserve. Sources: ZeRO (Rajbhandari et al. 2020), QLoRA (Dettmers et al. 2023), Korthikanti et al. 2022.",
    );
    let rows = |rows: &[Row]| rows.iter().map(|r| row_json(r, &chosen.list)).collect::<Vec<Value>>();
    let json = json!({
        "model": known.shape,
        "parameters": known.parameters.total(),
        "parameters_by_kind": known.parameters,
        "stored_bytes": known.stored.as_ref().map(|s| s.bytes),
        "bits_per_weight": known.stored.as_ref().map(|s| s.bits),
        "inference": rows(&inference),
        "training": rows(&training),
    });
    Answer { report, json }
}

fn inference_rows(args: &Args, known: &Known) -> Vec<Row> {
    let mut stores: Vec<(String, f64)> = Vec::new();
    if let Some(stored) = &known.stored {
        stores.push(("as stored".into(), stored.bytes));
    }
    for rounding in Rounding::LISTED {
        stores.push((rounding.name.into(), rounding.weight_bytes(&known.parameters)));
    }
    let mut rows = Vec::new();
    for (name, bytes) in stores {
        for context in &args.context {
            let how =
                Use { context: *context, batch: args.batch, cache_element_bytes: args.cache_bits / 8.0 };
            rows.push(Row {
                name: name.clone(),
                detail: show_whole(*context),
                memory: memory::inference(&known.shape, bytes, &how),
            });
        }
    }
    rows
}

fn training_rows(args: &Args, known: &Known) -> Vec<Row> {
    let (shape, p) = (&known.shape, &known.parameters);
    let step = Step { tokens: args.step_tokens, recompute: !args.no_recompute };
    let adapters = |name: &str, rounding: Rounding| Row {
        name: format!("{name} rank {}", args.rank),
        detail: format!("on {}", rounding.name),
        memory: memory::adapters(shape, rounding.weight_bytes(p), args.rank, &step),
    };
    let mut rows = vec![adapters("QLoRA", Rounding::NF4), adapters("LoRA", Rounding::BF16)];
    let full = |optimiser: Optimiser, precision: Precision, detail: &str| Row {
        name: format!("full {}", optimiser.name()),
        detail: detail.into(),
        memory: memory::training(shape, p, optimiser, precision, &step),
    };
    rows.push(full(Optimiser::AdamW, Precision::Bf16, "bf16"));
    for optimiser in Optimiser::ALL {
        rows.push(full(optimiser, Precision::Mixed, "mixed"));
    }
    rows.push(full(Optimiser::AdamW, Precision::F32, "f32"));
    rows
}

fn table(
    title: &str,
    names: [&str; 2],
    columns: &[&str],
    rows: &[Row],
    kinds: impl Fn(&Memory) -> Vec<String>,
    chosen: &Chosen,
) -> Table {
    let mut head = names.to_vec();
    head.extend(columns);
    head.push("total");
    head.extend(chosen.list.iter().map(|a| a.name.as_str()));
    let mut table = Table::new(title, &head).left(if names[1] == "numbers" { &[1] } else { &[] });
    for row in rows {
        let mut cells = vec![row.name.clone(), row.detail.clone()];
        cells.extend(kinds(&row.memory));
        cells.push(show_bytes(row.memory.total()));
        for a in &chosen.list {
            cells.push(row.memory.devices(a.memory_bytes).map_or("-".into(), |n| n.to_string()));
        }
        table.push(cells);
    }
    table
}

fn row_json(row: &Row, list: &[Accelerator]) -> Value {
    let devices: serde_json::Map<String, Value> =
        list.iter().map(|a| (a.name.clone(), json!(row.memory.devices(a.memory_bytes)))).collect();
    json!({
        "name": row.name,
        "detail": row.detail,
        "bytes": row.memory,
        "total_bytes": row.memory.total(),
        "devices": devices,
    })
}
