//! `sparsam eval`: how good a model is.

use crate::load::{Load, positive};
use crate::text;
use anyhow::Context;
use serde_json::json;
use sparsam_engine::{Engine, Protocol, Windows, compare, perplexity};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

/// Measure a model: perplexity on a text, right answers on a task
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam eval model.gguf --perplexity wiki.txt --chunks 16        as llama.cpp's llama-perplexity
  sparsam eval model.gguf --perplexity wiki.txt --stride 256       sliding windows, as Hugging Face's guide
  sparsam eval model.gguf --perplexity wiki.txt --exact --json
  sparsam eval small.gguf model.gguf --perplexity wiki.txt         divergence of the first from the second
  sparsam eval small.gguf other.gguf                               what their passports say, if by one protocol
  sparsam eval model.gguf --task cqa.jsonl --choices choices       by likelihood, as lm-evaluation-harness
  sparsam eval model.gguf --task sums.jsonl --answer-regex '#### (-?[0-9,.]+)'
  sparsam eval model.gguf --adapter runs/sums/adapter --task sums.jsonl --equation

Perplexities can be compared only if protocol, context and text are the same.")]
pub struct Args {
    /// A GGUF file, a safetensors file or folder, builtin, or ORG/NAME of the hub if it is in the cache
    model: String,
    /// A second model: compared with on the text; without a text, by what both files say of themselves
    #[arg(value_name = "OTHER", conflicts_with_all = ["against", "task"])]
    other: Option<String>,
    /// Text whose perplexity is measured
    #[arg(long, value_name = "FILE", required_unless_present_any = ["task", "other"])]
    perplexity: Option<PathBuf>,
    #[command(flatten)]
    task: crate::task::TaskArgs,
    /// Tokens of a window
    #[arg(long, short = 'c', default_value_t = 512, value_name = "N", value_parser = positive)]
    ctx: usize,
    /// At most this many windows (default: all)
    #[arg(long, value_name = "N", value_parser = positive)]
    chunks: Option<usize>,
    /// Sliding windows that begin every N tokens (Hugging Face's protocol); without it, windows side by side with the
    /// second half scored (llama.cpp's)
    #[arg(long, value_name = "N", value_parser = positive)]
    stride: Option<usize>,
    /// Compare with this model, of which the first one is a smaller version: divergence of the predictions, agreement
    #[arg(long, value_name = "MODEL")]
    against: Option<String>,
    #[command(flatten)]
    load: Load,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let Some(file) = &args.perplexity else {
        if let Some(other) = &args.other {
            return crate::passport::compare(&args.model, other, args.json);
        }
        return crate::task::run(&args.task, &args.model, &args.load, args.json);
    };
    let content = std::fs::read_to_string(file)
        .with_context(|| format!("{}: cannot be read as UTF-8 text; name a text file", file.display()))?;
    let engine = args.load.engine(&args.model, None)?;
    let specials = sparsam_tokenizer::Specials::default();
    let tokens = engine.tokenizer()?.encode(&content, specials).map_err(|e| engine.tokenizer_error(e))?;
    let windows = args.stride.map_or(Windows::SideBySide, Windows::Sliding);
    let protocol = Protocol { context: args.ctx, windows, chunks: args.chunks };
    eprintln!("{}", engine.describe());
    if let Some(reference) = args.against.as_ref().or(args.other.as_ref()) {
        return against(&args, &engine, reference, &tokens, &protocol);
    }
    let start = Instant::now();
    let bar = text::bar(0, "windows");
    let result = perplexity(&engine, &tokens, &protocol, &mut |done, all, so_far| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        bar.set_message(format!("perplexity {:.3}", so_far.perplexity));
        ControlFlow::Continue(())
    })?;
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        return text::say_json(&json!({
            "perplexity": result.perplexity,
            "standard_error": result.error,
            "tokens_scored": result.tokens_scored,
            "protocol": protocol.to_string(),
            "context": args.ctx,
            "stride": args.stride,
            "chunks": result.chunks,
            "text_tokens": tokens.len(),
            "seconds": seconds,
            "runs_on": engine.describe(),
        }));
    }
    text::say(format_args!("perplexity     {:.4} ± {:.4}", result.perplexity, result.error))?;
    text::say(format_args!(
        "tokens scored  {} in {} windows of a text of {}",
        result.tokens_scored,
        result.chunks,
        tokens.len()
    ))?;
    text::say(format_args!("protocol       {protocol}"))?;
    text::say(format_args!("time           {}", text::duration(start.elapsed())))
}

/// The model beside a reference.
fn against(
    args: &Args,
    engine: &Engine,
    reference: &str,
    tokens: &[u32],
    protocol: &Protocol,
) -> anyhow::Result<()> {
    let other = args.load.engine(reference, None)?;
    let specials = sparsam_tokenizer::Specials::default();
    let sample = "Models of one family read a text in the same way: 1, 2, naïve.";
    if other.tokenizer()?.encode(sample, specials).ok() != engine.tokenizer()?.encode(sample, specials).ok() {
        anyhow::bail!(
            "{reference}: its tokenizer reads text in another way, so predictions cannot be compared"
        );
    }
    let bar = text::bar(0, "windows");
    let c = compare(engine, &other, tokens, protocol, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        ControlFlow::Continue(())
    })?;
    bar.finish_and_clear();
    if args.json {
        return text::say_json(&json!({
            "perplexity": c.perplexity.perplexity,
            "standard_error": c.perplexity.error,
            "reference_perplexity": c.reference.perplexity,
            "divergence": c.divergence,
            "divergence_error": c.divergence_error,
            "divergence_p99": c.divergence_p99,
            "top1_agreement": c.top1_agreement,
            "tokens_scored": c.perplexity.tokens_scored,
            "protocol": protocol.to_string(),
        }));
    }
    text::say(format_args!(
        "perplexity     {:.4}, reference {:.4}",
        c.perplexity.perplexity, c.reference.perplexity
    ))?;
    text::say(format_args!(
        "divergence     {:.5} ± {:.5} nats a token, 99% of tokens below {:.3}",
        c.divergence, c.divergence_error, c.divergence_p99
    ))?;
    text::say(format_args!("same top token {:.2}%", 100.0 * c.top1_agreement))?;
    text::say(format_args!("tokens scored  {}", c.perplexity.tokens_scored))?;
    text::say(format_args!("protocol       {protocol}"))
}
