//! `sparsam`: language models cheaper, on the machine that a person has.
//!
//! One command is one file: its arguments, and what it prints. Everything that computes lives in the other crates.
#![forbid(unsafe_code)]

mod bench;
mod bench_attention;
mod bench_train;
mod builtin;
mod completions;
mod convert;
mod dashboard;
mod demo;
mod distill;
mod doctor;
mod eval;
mod expected;
mod finetune;
mod info;
mod ledger;
mod load;
mod man;
mod merge;
mod model;
mod passport;
mod plan;
mod probe;
#[cfg(feature = "mpi")]
mod processes;
mod pull;
mod quantize;
mod receipt;
mod run;
mod serve;
mod task;
mod text;
mod train;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Language models cheaper: plan, train, shrink, adapt, teach and run them, on the machine that you have.
#[derive(Parser)]
#[command(name = "sparsam", version, max_term_width = 110, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Args),
    Info(info::Args),
    Pull(pull::Args),
    Distill(distill::Args),
    Eval(eval::Args),
    Quantize(quantize::Args),
    Bench(bench::Args),
    Serve(serve::Args),
    Train(Box<train::Args>),
    Convert(convert::Args),
    Plan(plan::Args),
    Receipt(receipt::Args),
    Dashboard(dashboard::Args),
    Demo(demo::Args),
    Doctor(doctor::Args),
    Completions(completions::Args),
    Man(man::Args),
    Finetune(Box<finetune::Args>),
    Merge(merge::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run(args) => run::run(args),
        Command::Info(args) => info::run(args),
        Command::Pull(args) => pull::run(args),
        Command::Distill(args) => distill::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Train(args) => train::run(*args),
        Command::Convert(args) => convert::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Receipt(args) => receipt::run(args),
        Command::Dashboard(args) => dashboard::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Completions(args) => completions::run(args),
        Command::Man(args) => man::run(args),
        Command::Finetune(args) => finetune::run(*args),
        Command::Merge(args) => merge::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that went away (`sparsam info M | head -1`) is no failure worth words.
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain().any(|e| {
        e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    })
}
