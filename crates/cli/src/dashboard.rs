//! `sparsam dashboard`: a training run's curves while they grow.

use anyhow::{Context, bail};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// Show the curves of a training run while it runs, as a page
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam dashboard runs/first                      then open http://127.0.0.1:8081
  sparsam dashboard runs/first --port 0

RUN is a folder that train, finetune or distill teach writes; the page follows it until Ctrl-C. Nothing is written.")]
pub struct Args {
    /// The folder of a run
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Address to listen on; other machines reach it only if this is not the loopback
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port (0: any free one)
    #[arg(long, default_value_t = 8081)]
    port: u16,
}

/// Serves the page until Ctrl-C.
///
/// # Errors
/// If the folder holds no run, or the port is taken.
pub fn run(args: Args) -> anyhow::Result<()> {
    if !["config.toml", "metrics.jsonl"].iter().any(|name| args.run.join(name).is_file()) {
        bail!(
            "{}: holds no run (no config.toml, no metrics.jsonl); give a folder that train, finetune or distill teach writes",
            args.run.display()
        );
    }
    if !args.host.is_loopback() {
        eprintln!("warning: {} is open to other machines, which then see the run", args.host);
    }
    let (stop, stopped) = sparsam_server::stopper();
    ctrlc::set_handler(move || stop.stop()).context("cannot catch Ctrl-C")?;
    sparsam_server::dashboard(&args.run, SocketAddr::new(args.host, args.port), stopped, |address| {
        eprintln!("{}: http://{address}  (Ctrl-C ends)", args.run.display());
    })?;
    Ok(())
}
