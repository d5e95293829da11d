//! Speed of a model, and how it stands to the machine's roofs.

use crate::{Engine, Error, Feed, Runner, Sequence, Want};
use sparsam_runtime::{Arithmetic, Profile};
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

/// Texts that are measured side by side in one cache.
struct Texts {
    runner: Runner,
    sequences: Vec<Sequence>,
}

impl Texts {
    fn new(engine: &Engine, count: usize, n: usize) -> Result<Texts, Error> {
        let context = engine.context().max(n).min(engine.model().facts().context_length);
        let runner = engine.runner_with(count, context)?;
        let sequences = (0..count).map(|_| runner.sequence()).collect();
        Ok(Texts { runner, sequences })
    }

    fn clear(&mut self) {
        for sequence in &mut self.sequences {
            self.runner.truncate(sequence, 0);
        }
    }

    /// One more token for every text.
    fn write(&mut self, token: u32) -> Result<(), Error> {
        let tokens = [token];
        let feed = |sequence| Feed { sequence, tokens: &tokens, want: Want::Last };
        let mut feeds: Vec<Feed> = self.sequences.iter_mut().map(feed).collect();
        self.runner.run(&mut feeds).map(|_| ())
    }

    /// Seconds of `repeat` runs from empty texts, after one that does not count.
    fn time(
        &mut self,
        repeat: usize,
        run: impl Fn(&mut Texts) -> Result<(), Error>,
    ) -> Result<Vec<f64>, Error> {
        let mut seconds = Vec::new();
        for i in 0..=repeat {
            self.clear();
            let start = Instant::now();
            run(self)?;
            if i > 0 {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        Ok(seconds)
    }

    /// The time by kind of kernel of one run, after one that does not count.
    fn profile(mut self, run: impl Fn(&mut Texts) -> Result<(), Error>) -> Result<Profile, Error> {
        self.time(0, &run)?;
        self.clear();
        self.runner.set_profiling(true);
        run(&mut self)?;
        Ok(self.runner.profile().cloned().unwrap_or_default())
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Reads a prompt of this many tokens into an empty cache (llama-bench's `pp`).
    Prompt(usize),
    /// Writes tokens one after the other into empty caches (llama-bench's `tg`).
    Generate {
        /// Tokens of each text.
        tokens: usize,
        /// Texts at the same time.
        texts: usize,
    },
}

impl Work {
    fn texts(self, engine: &Engine) -> Result<Texts, Error> {
        match self {
            Work::Prompt(n) => Texts::new(engine, 1, n),
            Work::Generate { tokens, texts } => Texts::new(engine, texts, tokens),
        }
    }

    fn run(self, engine: &Engine, texts: &mut Texts) -> Result<(), Error> {
        match self {
            Work::Prompt(n) => {
                let tokens = made_up(engine, n);
                texts.runner.append(&mut texts.sequences[0], &tokens).map(|_| ())
            }
            Work::Generate { tokens, .. } => made_up(engine, tokens).iter().try_for_each(|&t| texts.write(t)),
        }
    }

    /// Tokens of a run, over all texts.
    pub fn tokens(self) -> usize {
        match self {
            Work::Prompt(n) => n,
            Work::Generate { tokens, texts } => tokens * texts,
        }
    }
}

/// Times `work`, `repeat` times after one that does not count.
///
/// # Errors
/// If its texts are beyond the context.
pub fn bench(engine: &Engine, work: Work, repeat: usize) -> Result<Timing, Error> {
    let seconds = work.texts(engine)?.time(repeat, |texts| work.run(engine, texts))?;
    Ok(Timing { tokens: work.tokens(), seconds })
}

/// The time of `work` by kind of kernel.
///
/// # Errors
/// As [`bench()`].
pub fn profile(engine: &Engine, work: Work) -> Result<Profile, Error> {
    work.texts(engine)?.profile(|texts| work.run(engine, texts))
}

/// Seconds of a token of `work` that are no products with weights: the median of `repeat` runs, after one that does not
/// count.
///
/// # Errors
/// As [`bench()`].
pub fn beside_products(engine: &Engine, work: Work, repeat: usize) -> Result<f64, Error> {
    let mut texts = work.texts(engine)?;
    texts.time(0, |texts| work.run(engine, texts))?;
    texts.runner.set_profiling(true);
    let (mut products, mut beside) = (0.0, Vec::new());
    for _ in 0..repeat.max(1) {
        texts.clear();
        let start = Instant::now();
        work.run(engine, &mut texts)?;
        let all = start.elapsed().as_secs_f64();
        let so_far = texts.runner.profile().map_or(0.0, |p| p.time_of("weight matmul").as_secs_f64());
        beside.push(all - (so_far - products));
        products = so_far;
    }
    beside.sort_by(f64::total_cmp);
    Ok(beside[beside.len() / 2].max(0.0) / work.tokens().max(1) as f64)
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
