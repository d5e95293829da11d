//! `sparsam bench`: speed, beside what the machine allows.

use crate::load::{Load, positive};
use crate::text;
use serde_json::json;
use sparsam_engine::{Timing, Work, bench, profile, roofs};

/// Measure speed: prompts and generation of a model, as shares of the machine's roofs
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Examples:
  sparsam bench model.gguf                       pp512 and tg128, as llama-bench names them
  sparsam bench attention --seq 1024,4096        the attention kernel against its plain form
  sparsam bench train --size 124M                one optimiser step of a GPT-2
  sparsam bench model.gguf -p 2048 -n 0 -r 5
  sparsam bench model.gguf --profile             time by kind of kernel
  SPARSAM_SIMD=avx2 sparsam bench model.gguf     with other instructions

Shares: generation against memory bandwidth (every weight is read once a token), prompts against peak arithmetic
(8-bit integers, or f32 with --exact); both roofs are measured first."
)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
    /// A GGUF file, a safetensors file or folder, builtin, or ORG/NAME of the hub if it is in the cache
    #[arg(required = true)]
    model: Option<String>,
    /// Tokens of the prompt (0: leave it out)
    #[arg(long, short = 'p', default_value_t = 512, value_name = "N")]
    prompt: usize,
    /// Tokens to generate (0: leave it out)
    #[arg(long, short = 'n', default_value_t = 128, value_name = "N")]
    generate: usize,
    /// Texts that are generated at the same time
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = positive)]
    parallel: usize,
    /// Repetitions, after one that does not count
    #[arg(long, short = 'r', default_value_t = 3, value_name = "N", value_parser = positive)]
    repeat: usize,
    #[command(flatten)]
    load: Load,
    /// Add the time by kind of kernel
    #[arg(long)]
    profile: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is measured instead of a model's own speed.
#[derive(clap::Subcommand)]
enum What {
    Attention(crate::bench_attention::Args),
    Train(crate::bench_train::Args),
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let model = match (args.what, &args.model) {
        (Some(What::Attention(args)), _) => return crate::bench_attention::run(args),
        (Some(What::Train(args)), _) => return crate::bench_train::run(args),
        (None, Some(model)) => model,
        (None, None) => unreachable!("clap asks for a model"),
    };
    let engine = args.load.engine(model, None)?;
    eprintln!("{}", engine.describe());
    let roofs = roofs(&engine, args.prompt)?;
    let mut measured: Vec<(String, Timing, f64, &str)> = Vec::new();
    let generate = Work::Generate { tokens: args.generate, texts: args.parallel };
    let works = [Work::Prompt(args.prompt), generate].into_iter().filter(|w| w.tokens() > 0);
    let works: Vec<Work> = works.collect();
    for &work in &works {
        let (name, roof, of) = match work {
            Work::Prompt(n) => (format!("pp{n}"), roofs.prompt(), "arithmetic"),
            Work::Generate { tokens, texts: 1 } => (format!("tg{tokens}"), roofs.generation(), "bandwidth"),
            // All texts share one reading of the weights.
            Work::Generate { tokens, texts } => {
                let roof = (roofs.generation() * texts as f64).min(roofs.prompt());
                (format!("tg{tokens}x{texts}"), roof, "bandwidth")
            }
        };
        measured.push((name, bench(&engine, work, args.repeat)?, roof, of));
    }
    if args.json {
        let tests = measured.iter().map(|(name, t, roof, of)| {
            let value = json!({
                "tokens_per_second": t.rate(), "seconds": t.seconds, "roof_tokens_per_second": roof,
                "share_of_roof": t.rate() / roof, "roof": of,
            });
            (name.clone(), value)
        });
        let mut value = serde_json::Value::Object(tests.collect());
        value["read_bandwidth"] = roofs.bandwidth.into();
        value["peak_arithmetic"] = roofs.arithmetic.into();
        value["bytes_per_token"] = roofs.bytes_per_token.into();
        value["flops_per_token"] = roofs.flops_per_token.into();
        value["runs_on"] = engine.describe().into();
        text::say_json(&value)?;
    } else {
        let rows: Vec<Vec<String>> = measured
            .iter()
            .map(|(name, t, roof, of)| {
                let (least, most) = t.range();
                let share = format!("{:.0}% of {of}", 100.0 * t.rate() / roof);
                vec![
                    name.clone(),
                    format!("{:.1}", t.rate()),
                    format!("{least:.1} - {most:.1}"),
                    format!("{roof:.0}"),
                    share,
                ]
            })
            .collect();
        text::say(text::table(&["test", "tokens/s", "range", "roof", "share"], &rows))?;
        text::say(format_args!(
            "\nroofs: {:.1} GB/s read, {:.0} Gop/s; a token reads {}, a token of a prompt takes {:.0} Mop",
            roofs.bandwidth / 1e9,
            roofs.arithmetic / 1e9,
            text::bytes(roofs.bytes_per_token as usize),
            roofs.flops_per_token / 1e6
        ))?;
    }
    if args.profile {
        for &work in &works {
            eprintln!("\n{work:?}:\n{}", profile(&engine, work)?);
        }
    }
    Ok(())
}
