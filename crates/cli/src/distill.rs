//! `sparsam distill`: a small model learns from a large one.

mod all;
mod ask;
mod eval;
mod teach;

use anyhow::Context;
use clap::{Args as ClapArgs, Subcommand};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

/// Teach a small model what a large one knows: ask the teacher, teach the student, compare both
#[derive(ClapArgs)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Examples:
  sparsam distill small.gguf --teacher big.gguf --questions problems.jsonl --task arithmetic --out run
  sparsam distill small.gguf --config run.toml --out run

The three steps alone: `sparsam distill ask`, `teach` and `eval`; see their --help."
)]
#[group(skip)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    all: all::Args,
}

#[derive(Subcommand)]
enum Command {
    Ask(Box<ask::Args>),
    Import(ask::ImportArgs),
    Teach(Box<teach::Args>),
    Eval(Box<eval::Args>),
}

pub fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        Some(Command::Ask(args)) => ask::run(*args),
        Some(Command::Import(args)) => ask::import(args),
        Some(Command::Teach(args)) => teach::run(*args),
        Some(Command::Eval(args)) => eval::run(*args),
        None => all::run(&args.all),
    }
}

/// Set by Ctrl-C: what is under way is finished and kept. A second one means it.
static STOPPED: AtomicBool = AtomicBool::new(false);

fn catch_interrupt() -> anyhow::Result<&'static AtomicBool> {
    static ONCE: Once = Once::new();
    let mut caught = Ok(());
    ONCE.call_once(|| {
        caught = ctrlc::set_handler(|| {
            if STOPPED.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        });
    });
    caught.context("cannot catch Ctrl-C")?;
    Ok(&STOPPED)
}
