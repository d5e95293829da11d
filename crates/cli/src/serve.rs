//! `sparsam serve`: a model behind HTTP.

use crate::load::{Load, positive};
use anyhow::{Context, bail};
use sparsam_server::{Config, serve};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Serve a model over HTTP, OpenAI-compatible, with a page to chat
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam serve model.gguf                          then open http://127.0.0.1:8080
  sparsam serve model.gguf --parallel 16 --ctx 2048
  sparsam serve model.gguf --host 0.0.0.0          with SPARSAM_API_KEY set

Any OpenAI client works with base_url http://127.0.0.1:8080/v1. Ctrl-C finishes the answers that run, twice ends at once.")]
pub struct Args {
    /// A GGUF file, a safetensors file or folder, builtin, or ORG/NAME of the hub if it is in the cache
    model: String,
    /// Address to listen on; other machines reach it only if this is not the loopback
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port (0: any free one)
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Key that requests must carry (or the variable SPARSAM_API_KEY, which others cannot see in the process list)
    #[arg(long, env = "SPARSAM_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,
    /// The model's name in answers (default: the file's)
    #[arg(long, value_name = "NAME")]
    alias: Option<String>,
    /// Tokens of a request's context (default: the model's, at most 8192)
    #[arg(long, short = 'c', value_name = "N", value_parser = positive)]
    ctx: Option<usize>,
    /// Requests answered at the same time, each with its whole context in the cache
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = positive)]
    parallel: usize,
    /// Requests that may wait; more are refused
    #[arg(long, default_value_t = 64, value_name = "N")]
    queue: usize,
    /// Seconds that a request may take
    #[arg(long, default_value_t = 600, value_name = "S")]
    timeout: u64,
    #[command(flatten)]
    load: Load,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    if args.parallel > 256 {
        bail!("--parallel {}: at most 256 are possible", args.parallel);
    }
    if args.api_key.as_deref() == Some("") {
        bail!("--api-key is empty: leave it out to serve without a key");
    }
    let path = crate::model::resolve(&args.model)?;
    let engine = args.load.engine(&args.model, args.ctx)?;
    let name = args.alias.unwrap_or_else(|| {
        path.file_stem().map_or_else(|| args.model.clone(), |s| s.to_string_lossy().into_owned())
    });
    let loopback = args.host.is_loopback();
    let config = Config {
        address: SocketAddr::new(args.host, args.port),
        api_key: args.api_key,
        parallel: args.parallel,
        queue: args.queue,
        timeout: Duration::from_secs(args.timeout.max(1)),
        ..Config::new(&name)
    };
    if !loopback && config.api_key.is_none() {
        eprintln!("warning: {} is open to other machines and no --api-key is set", args.host);
    }
    let (stop, stopped) = sparsam_server::stopper();
    let presses = AtomicUsize::new(0);
    ctrlc::set_handler(move || {
        if presses.fetch_add(1, Ordering::Relaxed) > 0 {
            std::process::exit(130);
        }
        eprintln!("\nfinishing the answers that run; Ctrl-C again ends at once");
        stop.stop();
    })
    .context("cannot catch Ctrl-C")?;
    let runs_on = engine.describe();
    serve(engine, config, stopped, |address| {
        eprintln!("{name} · {runs_on} · {} at a time", args.parallel);
        eprintln!("listening on http://{address}");
    })?;
    Ok(())
}
