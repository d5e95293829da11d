//! One optimiser step of a model of a given size on made-up tokens: speed and memory.

use crate::config::{Arch, ModelConfig};
use crate::data::PackedRows;
use crate::optim::Optimiser;
use crate::random::Random;
use crate::run::peak_flops;
use crate::step::Targets;
use crate::{Error, How, Learner, new};
use serde::Serialize;
use sparsam_kernels::give_back_freed;
use sparsam_models::Model;
use sparsam_runtime::{Device, Options, Profile, Report};
use std::time::Instant;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Bench {
    /// Architecture.
    pub arch: Arch,
    /// Parameters: `124M`.
    pub size: String,
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Rows of the batch.
    pub batch: usize,
    /// Tokens of a row.
    pub seq: usize,
    /// Passes.
    pub options: Options,
    /// Threads; 0: all cores.
    pub threads: usize,
    /// Timed steps, behind one that is not.
    pub runs: usize,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// Tokens over seconds of the median step.
    pub tokens_per_second: f64,
    /// The most memory that the process has taken.
    pub peak_bytes: usize,
    /// Arithmetic of the step's products and attention over the machine's peak.
    pub share_of_peak: f64,
    /// Seconds of each timed step.
    pub seconds: Vec<f64>,
    /// Seconds that tracing and compiling took.
    pub compile_seconds: f64,
    /// Parameters.
    pub parameters: usize,
    /// Kernels of a step.
    pub kernels: usize,
    /// Bytes that weights, moments and activations take by plan.
    pub planned_bytes: usize,
    /// Multiplications and additions a second that the machine can do at most.
    pub peak_flops: f64,
    /// Loss of the last step.
    pub loss: f64,
    /// What the compiler did.
    #[serde(skip)]
    pub report: Report,
    /// Time by kind of kernel.
    #[serde(skip)]
    pub profile: Option<Profile>,
}

/// Runs the steps.
///
/// # Errors
/// Sizes that no model has; a model that does not compile.
pub fn bench(b: &Bench, profile: bool) -> Result<Measured, Error> {
    let mut c = ModelConfig { arch: Some(b.arch), size: Some(b.size.clone()), ..ModelConfig::default() };
    // The released GPT-2 has 1024 positions whatever it is trained on.
    let ctx = b.seq.max(1024);
    let model = Model::new(new::configure(&mut c, b.vocab_size, ctx)?);
    let start = Instant::now();
    let optimiser = Optimiser { clip: None, ..Optimiser::default() };
    let how = How {
        rows: b.batch,
        ctx: b.seq,
        accumulate: 1,
        targets: Targets::default(),
        processes: 1,
        optimiser,
        samples: false,
        options: b.options.clone(),
    };
    let mut learner = Learner::new(&model, how, &Device::cpu(b.threads)?)?;
    let compile_seconds = start.elapsed().as_secs_f64();
    learner.initialise(0)?;
    give_back_freed(); // as a run does
    let mut random = Random::new(0, "bench", 0);
    let mut rows = PackedRows::default();
    for _ in 0..b.batch {
        let window: Vec<u32> = (0..=b.seq).map(|_| random.below(b.vocab_size as u64) as u32).collect();
        rows.push(&window, None);
    }
    let batch = [rows];
    let mut seconds = Vec::new();
    let mut loss = 0.0;
    for t in 0..=b.runs as u64 {
        let start = Instant::now();
        loss = learner.step(&batch, t + 1, 3e-4)?.loss;
        if t > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        } else if profile {
            learner.session().set_profiling(true);
        }
    }
    let mut sorted = seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let n_tokens = (b.batch * b.seq) as f64;
    let tokens_per_second = n_tokens / sorted[sorted.len() / 2];
    let peak_flops = peak_flops(b.threads, b.options.precision)?;
    let flops = 3.0 * model.flops_per_token(b.seq.div_ceil(2))?;
    let planned_bytes = learner.bytes();
    Ok(Measured {
        tokens_per_second,
        peak_bytes: peak_memory().unwrap_or(planned_bytes),
        share_of_peak: tokens_per_second * flops / peak_flops,
        seconds,
        compile_seconds,
        parameters: model.n_parameters()?,
        kernels: learner.program().kernels(),
        planned_bytes,
        peak_flops,
        loss,
        report: learner.program().report().clone(),
        profile: learner.session().profile().cloned(),
    })
}

/// The most memory that this process has taken, where the system tells it.
fn peak_memory() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kilobytes: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}
