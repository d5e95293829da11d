//! `sparsam bench train`: the speed of learning.

use crate::text;
use crate::train::ArchName;
use serde_json::{Value, json};

use sparsam_runtime::{Options, Precision};
use sparsam_train::bench::{Bench, bench};

/// One optimiser step (AdamW, no clipping) of a new model on made-up tokens
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam bench train --arch gpt2 --size 124M --batch 2 --seq 512
  sparsam bench train --dtype bf16 --memory 1.9GB
  sparsam bench train --size 30M --vocab 8192 --eager     node by node, without the compiler

The share of the peak counts the products' and attention's arithmetic against the machine's own best, measured.")]
pub struct Args {
    /// Architecture
    #[arg(long, default_value = "gpt2")]
    arch: ArchName,
    /// Parameters
    #[arg(long, default_value = "124M")]
    size: String,
    /// Size of the vocabulary
    #[arg(long, default_value_t = 50257)]
    vocab: usize,
    /// Rows of the batch
    #[arg(long, default_value_t = 2)]
    batch: usize,
    /// Tokens of a row
    #[arg(long, default_value_t = 512)]
    seq: usize,
    /// Numbers to compute with
    #[arg(long, default_value = "f32")]
    dtype: DtypeName,
    /// Most bytes that weights, moments and activations may take: what does not fit is computed again
    #[arg(long, value_name = "SIZE", conflicts_with = "eager", value_parser = text::parse_bytes)]
    memory: Option<usize>,
    /// Run node by node, without the compiler
    #[arg(long)]
    eager: bool,
    /// Threads; 0 for all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Timed steps, behind one that does not count
    #[arg(long, short = 'r', default_value_t = 3, value_name = "N", value_parser = crate::load::positive)]
    repeat: usize,
    /// Add what the compiler did
    #[arg(long)]
    explain: bool,
    /// Add the time by kind of kernel
    #[arg(long)]
    profile: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum DtypeName {
    /// 32-bit floats throughout
    F32,
    /// Products in bfloat16 with sums, parameters and moments in 32 bits
    Bf16,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let precision = match args.dtype {
        DtypeName::F32 => None,
        DtypeName::Bf16 => Some(Precision::Bf16),
    };
    let plain = if args.eager { Options::eager() } else { Options::default() };
    let options = Options { precision, memory: args.memory, ..plain };
    let what = Bench {
        arch: args.arch.into(),
        size: args.size,
        vocab_size: args.vocab,
        batch: args.batch,
        seq: args.seq,
        options,
        threads: args.threads,
        runs: args.repeat,
    };
    let m = bench(&what, args.profile)?;
    if args.json {
        let Value::Object(mut object) = serde_json::to_value(&m)? else {
            unreachable!("a struct with fields")
        };
        object.insert("batch".into(), json!(args.batch));
        object.insert("seq".into(), json!(args.seq));
        return text::say_json(&Value::Object(object));
    }
    let rows = [
        ("parameters", text::count(m.parameters)),
        ("speed", format!("{:.1} tokens/s", m.tokens_per_second)),
        ("peak", format!("{:.1}% of {:.0} GFLOP/s", 100.0 * m.share_of_peak, m.peak_flops / 1e9)),
        ("memory", format!("{} ({} planned)", text::bytes(m.peak_bytes), text::bytes(m.planned_bytes))),
        ("kernels", m.kernels.to_string()),
        ("compile", format!("{:.2} s", m.compile_seconds)),
        ("loss", format!("{:.4}", m.loss)),
    ];
    for (name, value) in rows {
        text::say(format_args!("{name:<11} {value}"))?;
    }
    if args.explain {
        text::say(format_args!("\n{}", m.report))?;
    }
    if let Some(profile) = &m.profile {
        text::say(format_args!("\n{profile}"))?;
    }
    Ok(())
}
