//! `sparsam eval`: how good a model is.

use crate::load::{Load, positive};
use crate::text;
use anyhow::Context;
use serde_json::json;
use sparsam_engine::{Protocol, Windows, perplexity};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

/// Measure a model: perplexity on a text
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam eval model.gguf --perplexity wiki.txt --chunks 16        as llama.cpp's llama-perplexity
  sparsam eval model.gguf --perplexity wiki.txt --stride 256       sliding windows, as Hugging Face's guide
  sparsam eval model.gguf --perplexity wiki.txt --exact --json

Perplexities can be compared only if protocol, context and text are the same.")]
pub struct Args {
    /// A GGUF file, a safetensors file or folder, or ORG/NAME of the hub if it is in the cache
    model: String,
    /// Text whose perplexity is measured
    #[arg(long, value_name = "FILE", required = true)]
    perplexity: PathBuf,
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
    #[command(flatten)]
    load: Load,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let file = &args.perplexity;
    let content = std::fs::read_to_string(file)
        .with_context(|| format!("{}: cannot be read as UTF-8 text; name a text file", file.display()))?;
    let engine = args.load.engine(&args.model, None)?;
    let specials = sparsam_tokenizer::Specials::default();
    let tokens = engine.tokenizer()?.encode(&content, specials).map_err(|e| engine.tokenizer_error(e))?;
    let windows = args.stride.map_or(Windows::SideBySide, Windows::Sliding);
    let protocol = Protocol { context: args.ctx, windows, chunks: args.chunks };
    eprintln!("{}", engine.describe());
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
