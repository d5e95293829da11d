//! `sparsam bench attention`: the attention kernel beside its plain composition.

use crate::load::positive;
use crate::text;
use serde_json::{Value, json};
use sparsam_dtype::DType;
use sparsam_engine::{AttentionForm, AttentionShape, bench_attention};
use sparsam_runtime::Device;

/// Causal attention alone over one or more lengths: tiled against plain, time and memory
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam bench attention --seq 1024,4096 --dtype f32 --what fwdbwd
  sparsam bench attention --seq 65536 --no-plain --json

Peak bytes: inputs, results and all that lies between. Useful operations are the causal half of two products forward
and of six with backward.")]
pub struct Args {
    /// Tokens; several lengths with commas
    #[arg(long, value_name = "T", value_delimiter = ',', default_value = "1024,2048,4096", value_parser = positive)]
    seq: Vec<usize>,
    /// Heads
    #[arg(long, default_value_t = 12, value_name = "N", value_parser = positive)]
    heads: usize,
    /// Channels of a head
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = positive)]
    dim: usize,
    /// Type of queries, keys and values
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
    dtype: String,
    /// Forward alone, or forward and backward
    #[arg(long, default_value = "fwd", value_parser = ["fwd", "fwdbwd"])]
    what: String,
    /// Leave the plain form out
    #[arg(long)]
    no_plain: bool,
    /// Repetitions, after one that does not count
    #[arg(long, short = 'r', default_value_t = 3, value_name = "N", value_parser = positive)]
    repeat: usize,
    /// Threads (0: all cores)
    #[arg(long, short = 't', default_value_t = 0)]
    threads: usize,
    /// Print JSON: an object, or a list of them for several lengths
    #[arg(long)]
    json: bool,
}

struct Row {
    seq: usize,
    seconds: f64,
    bytes: usize,
    flops: f64,
    /// Seconds and bytes.
    plain: Option<(f64, usize)>,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let device = Device::cpu(args.threads)?;
    let dtype = if args.dtype == "bf16" { DType::BF16 } else { DType::F32 };
    eprintln!("{device:?}, {} heads of {}, {}, {}", args.heads, args.dim, args.dtype, args.what);
    let mut rows = Vec::new();
    for &seq in &args.seq {
        let backward = args.what == "fwdbwd";
        let shape = AttentionShape { seq, heads: args.heads, head_dim: args.dim, dtype, backward };
        let (timing, bytes) = bench_attention(&device, &shape, AttentionForm::Tiled, args.repeat)?;
        let seconds = seq as f64 / timing.rate();
        let plain = if args.no_plain || !fits(&shape) {
            None
        } else {
            let (timing, bytes) = bench_attention(&device, &shape, AttentionForm::Plain, args.repeat)?;
            Some((seq as f64 / timing.rate(), bytes))
        };
        rows.push(Row { seq, seconds, bytes, flops: shape.flops(), plain });
    }
    if args.json {
        let value = |r: &Row| {
            json!({
                "seq": r.seq, "heads": args.heads, "dim": args.dim, "dtype": args.dtype, "what": args.what,
                "seconds": r.seconds, "peak_bytes": r.bytes, "useful_gflops": r.flops / r.seconds / 1e9,
                "plain_seconds": r.plain.map(|p| p.0), "plain_peak_bytes": r.plain.map(|p| p.1),
                "threads": device.threads(),
            })
        };
        return match &rows[..] {
            [one] => text::say_json(&value(one)),
            many => text::say_json(&many.iter().map(value).collect::<Vec<Value>>().into()),
        };
    }
    let dash = || "-".to_string();
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            vec![
                r.seq.to_string(),
                format!("{:.4} s", r.seconds),
                format!("{:.0}", r.flops / r.seconds / 1e9),
                text::bytes(r.bytes),
                r.plain.map_or_else(dash, |p| format!("{:.4} s", p.0)),
                r.plain.map_or_else(dash, |p| text::bytes(p.1)),
                r.plain.map_or_else(dash, |p| format!("{:.1}x", p.0 / r.seconds)),
            ]
        })
        .collect();
    let head = ["tokens", "tiled", "GFLOP/s", "memory", "plain", "memory", "faster by"];
    text::say(text::table(&head, &lines))?;
    if rows.iter().any(|r| r.plain.is_none()) && !args.no_plain {
        eprintln!("-: the plain form would need more memory than is free");
    }
    Ok(())
}

/// Whether the matrices of scores that the plain form holds at once fit into the memory that is free now. Where that
/// cannot be asked, they are tried.
fn fits(s: &AttentionShape) -> bool {
    let copies = if s.backward { 5.0 } else { 3.0 };
    let need = copies * 4.0 * s.heads as f64 * (s.seq as f64).powi(2);
    let free = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?.trim();
        line.split(' ').next()?.parse::<f64>().ok()
    });
    free.is_none_or(|kb| need < 1024.0 * kb)
}
