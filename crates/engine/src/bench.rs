//! Speed of a model, and how it stands to the machine's roofs.

use crate::{Engine, Error, Sequence};
use sparsam_runtime::Arithmetic;
use std::time::Instant;

/// Seconds of each repetition.
#[derive(Clone, Debug, PartialEq)]
pub struct Timing {
    /// Tokens of one repetition.
    pub tokens: usize,
    /// Wall time of each repetition, after one that does not count.
    pub seconds: Vec<f64>,
}

impl Timing {
    /// Median tokens per second.
    pub fn rate(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let median = if n % 2 == 1 { sorted[n / 2] } else { (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0 };
        self.tokens as f64 / median
    }

    /// Least and most tokens per second.
    pub fn range(&self) -> (f64, f64) {
        let fold = |f: fn(f64, f64) -> f64| self.seconds.iter().copied().reduce(f).unwrap_or(f64::NAN);
        (self.tokens as f64 / fold(f64::max), self.tokens as f64 / fold(f64::min))
    }
}

/// What the machine can do at most, measured now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roofs {
    /// Bytes read from memory in a second by all threads.
    pub bandwidth: f64,
    /// Operations in a second, of the kind that prompts are read with (f32, or 8-bit integers).
    pub arithmetic: f64,
    /// Bytes that a generated token has to read at least: every weight of a product once.
    pub bytes_per_token: f64,
    /// Operations that a token of a prompt of the given length takes.
    pub flops_per_token: f64,
}

impl Roofs {
    /// Most tokens per second that bandwidth allows when generating.
    pub fn generation(&self) -> f64 {
        self.bandwidth / self.bytes_per_token
    }

    /// Most tokens per second that arithmetic allows when reading.
    pub fn prompt(&self) -> f64 {
        self.arithmetic / self.flops_per_token
    }
}

/// Token ids to measure with: spread over the vocabulary, the same each time.
fn made_up(engine: &Engine, n: usize) -> Vec<u32> {
    let vocab = engine.model().facts().vocab_size as u64;
    (0..n as u64).map(|i| (i * 7919 % vocab) as u32).collect()
}

/// Reads a prompt of `n` tokens into an empty cache, `repeat` times after a first one (llama-bench's `pp`).
///
/// # Errors
/// If `n` is beyond the context.
pub fn bench_prompt(engine: &Engine, n: usize, repeat: usize) -> Result<Timing, Error> {
    let tokens = made_up(engine, n);
    time(engine, n, repeat, |runner, sequence| runner.append(sequence, &tokens).map(|_| ()))
}

/// Writes `n` tokens into an empty cache, one after the other (llama-bench's `tg`).
///
/// # Errors
/// As [`bench_prompt`].
pub fn bench_generate(engine: &Engine, n: usize, repeat: usize) -> Result<Timing, Error> {
    let tokens = made_up(engine, n);
    time(engine, n, repeat, |runner, sequence| {
        tokens.iter().try_for_each(|&token| runner.append(sequence, &[token]).map(|_| ()))
    })
}

fn time(
    engine: &Engine,
    n: usize,
    repeat: usize,
    run: impl Fn(&mut crate::Runner, &mut Sequence) -> Result<(), Error>,
) -> Result<Timing, Error> {
    let mut runner =
        engine.runner_with(1, engine.context().max(n).min(engine.model().facts().context_length))?;
    let mut sequence = runner.sequence();
    let mut seconds = Vec::new();
    for i in 0..=repeat {
        runner.truncate(&mut sequence, 0);
        let start = Instant::now();
        run(&mut runner, &mut sequence)?;
        if i > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(Timing { tokens: n, seconds })
}

/// Measures the machine (half a second) and counts the model's work for a prompt of `n` tokens.
///
/// # Errors
/// If the model's shapes do not fit together.
pub fn roofs(engine: &Engine, n: usize) -> Result<Roofs, Error> {
    let facts = engine.model().facts();
    let kind = if engine.options().exact { Arithmetic::F32 } else { Arithmetic::Int8 };
    let mut bytes = engine.weights().bytes();
    if !facts.tied_head {
        // A lookup reads one row of the table.
        let table = engine.model().parameters()?.into_iter().next();
        bytes -= table.and_then(|p| engine.weights().packed(&p.name).map(|w| w.bytes())).unwrap_or(0);
    }
    // Only the last token of a prompt goes through the head.
    let head = 2.0 * (facts.vocab_size * facts.hidden_size) as f64;
    let flops = engine.model().flops_per_token(n / 2)? - head * (1.0 - 1.0 / n.max(1) as f64);
    Ok(Roofs {
        bandwidth: engine.device().read_bandwidth(),
        arithmetic: engine.device().peak(kind),
        bytes_per_token: bytes as f64,
        flops_per_token: flops,
    })
}
