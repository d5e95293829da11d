//! `sparsam doctor`: what this machine has, what is used of it and why, and what it can do.

use crate::plan::{Answer, Output};
use crate::probe::{self, Probe};
use serde_json::json;
use sparsam_kernels::{Cpu, Simd};
use sparsam_plan::report::{Report, Table};
use sparsam_plan::units::{show_bytes, three};
use std::path::Path;

/// What this machine has, what is used of it, and what it can do: measured in a few seconds
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sparsam doctor
  sparsam doctor --threads 1 --json
  SPARSAM_SIMD=avx2 sparsam doctor")]
pub struct Args {
    /// Threads to measure with; 0: all cores
    #[arg(long, default_value_t = 0, value_name = "N")]
    threads: usize,
    #[command(flatten)]
    output: Output,
}

/// Prints what was found.
///
/// # Errors
/// If `SPARSAM_SIMD` asks for what the machine lacks.
pub fn run(args: Args) -> anyhow::Result<()> {
    let probe = probe::measure(args.threads)?;
    let machine = probe.machine(Path::new("."));
    let free = probe::disk_free(Path::new("."));
    let mut report = Report::new(format!("sparsam {} on {}", env!("CARGO_PKG_VERSION"), probe.processor));
    let shown = |bytes: Option<f64>| bytes.map_or("unknown".into(), show_bytes);
    let mut has = Table::new("", &["what", "here"]).left(&[1]);
    has.push(["system".to_string(), format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)]);
    has.push(["threads used".into(), threads_text(&probe)]);
    has.push(["instructions used".into(), instructions_text(&probe)]);
    has.push([
        "memory".into(),
        format!("{} free of {}", shown(probe.memory_available), shown(probe.memory_total)),
    ]);
    has.push(["disk, this folder".into(), format!("{} free", shown(free))]);
    has.push(["accelerator", "not used: this build computes on the CPU"]);
    report.table(has);
    let giga = |x: f64| three(x / 1e9);
    let mut roofs =
        Table::new("Measured roofs, all threads together", &["what", "a second", "bounds"]).left(&[2]);
    roofs.push([
        "read memory".into(),
        format!("{} GB", giga(probe.read_bandwidth)),
        "generating, one sequence".to_string(),
    ]);
    roofs.push([
        "f32 multiply and add".into(),
        format!("{} GFLOP", giga(probe.f32_flops)),
        "training".to_string(),
    ]);
    roofs.push([
        "bf16 multiply and add".into(),
        format!("{} GFLOP", giga(probe.bf16_flops)),
        "training in bf16".to_string(),
    ]);
    roofs.push([
        "int8 multiply and add".into(),
        format!("{} GOP", giga(probe.int8_ops)),
        "prompts, rounded weights".to_string(),
    ]);
    roofs.push([
        "f32 matrix product".into(),
        format!("{} GFLOP", giga(probe.matmul_flops)),
        format!("reached: {}% of the roof", three(100.0 * probe.matmul_flops / probe.f32_flops)),
    ]);
    report.table(roofs);
    report.text(format!(
        "For bills: {} W under load (4 W a core), {} dollars an hour of electricity: estimates.",
        three(machine.watts),
        three(machine.usd_per_hour)
    ));
    let json = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "system": std::env::consts::OS,
        "architecture": std::env::consts::ARCH,
        "processor": probe.processor,
        "threads": probe.threads,
        "instructions": probe.uses.to_string(),
        "instructions_available": probe.has.to_string(),
        "memory_bytes": probe.memory_total,
        "memory_available_bytes": probe.memory_available,
        "disk_free_bytes": free,
        "read_bandwidth": probe.read_bandwidth,
        "f32_flops": probe.f32_flops,
        "bf16_flops": probe.bf16_flops,
        "int8_ops": probe.int8_ops,
        "matmul_flops": probe.matmul_flops,
        "watts": machine.watts,
        "usd_per_hour": machine.usd_per_hour,
    });
    args.output.give(&Answer { report, json })
}

fn threads_text(probe: &Probe) -> String {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    format!("{} of {cores}", probe.threads)
}

/// What is used, and why not more.
fn instructions_text(probe: &Probe) -> String {
    let missing = |cpu: &Cpu| {
        let lacks = match cpu.simd {
            Simd::Scalar => "no AVX2: portable code, several times slower",
            Simd::Avx2 => "no AVX-512",
            Simd::Avx512 if !cpu.bf16 && !cpu.vnni => "no bf16 and int8 dot products",
            Simd::Avx512 if !cpu.bf16 => "no bf16 dot products",
            Simd::Avx512 if !cpu.vnni => "no int8 dot products",
            Simd::Avx512 => return String::new(),
        };
        format!(" ({lacks})")
    };
    if probe.uses == probe.has {
        format!("{}{}", probe.uses, missing(&probe.has))
    } else {
        format!("{}, held back by SPARSAM_SIMD; the machine has {}", probe.uses, probe.has)
    }
}
