//! What a training run will take, said after its first seconds: the probe is the run itself.

use crate::ledger::Ledger;
use crate::plan::width;
use crate::{probe, text};
use sparsam_plan::forecast::{Forecast, Interval};
use sparsam_plan::memory::Memory;
use sparsam_plan::report::Table;
use sparsam_plan::units::{show_bytes, show_joules, show_seconds, show_usd};
use sparsam_train::config::Config;
use sparsam_train::metrics::StepRecord;
use sparsam_train::{Event, Run};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Seconds of steps that tell the speed of the rest.
const SECONDS: f64 = 5.0;
/// Or so many steps, if they are this part of the run: short runs are over before.
const PART: u64 = 20;
/// How far the rest may be off either way: other work on the machine, clocks that sink as it warms.
const SPREAD: f64 = 0.25;
/// Bytes of a parameter in a checkpoint: weight and two moments in f32.
const CHECKPOINT_BYTES: f64 = 12.0;
/// Of a forward pass alone, as a share of a step.
const FORWARD: f64 = 1.0 / 3.0;

/// A forecast in the making.
pub struct Expected {
    parameters: f64,
    /// What the compiler planned: weights, moments, gradients, activations.
    planned_bytes: f64,
    steps: u64,
    tokens_per_step: f64,
    eval_every: u64,
    eval_tokens: f64,
    checkpoints: f64,
    text_tokens: f64,
    /// Tokens and seconds after the first step, which warms up and tells nothing.
    first: Option<StepRecord>,
    said: bool,
}

impl Expected {
    /// Of a run that has not begun.
    pub fn new(run: &mut Run) -> Expected {
        let planned_bytes = run.learner().bytes() as f64;
        let (s, r) = (run.settings(), run.receipt());
        Expected {
            parameters: r.parameters as f64,
            planned_bytes,
            steps: s.steps,
            tokens_per_step: s.tokens_per_step() as f64,
            eval_every: s.eval_every.max(1),
            eval_tokens: (s.eval_tokens as f64).min(r.held_back_tokens as f64),
            checkpoints: s.keep as f64 + 1.0,
            text_tokens: (r.train_tokens + r.held_back_tokens) as f64,
            first: None,
            said: false,
        }
    }

    /// The forecast, once the steps so far tell it.
    pub fn after(&mut self, record: &StepRecord, ledger: &Ledger) -> Option<Forecast> {
        let Some(first) = &self.first else {
            self.first = Some(record.clone());
            return None;
        };
        let (done, seconds) = (record.step - first.step, record.seconds - first.seconds);
        if self.said || (seconds < SECONDS && done < (self.steps / PART).max(3)) || seconds <= 0.0 {
            return None;
        }
        self.said = true;
        let speed = done as f64 * self.tokens_per_step / seconds;
        let left = self.steps.saturating_sub(record.step);
        let evaluations = left.div_ceil(self.eval_every) as f64;
        let tokens = left as f64 * self.tokens_per_step + evaluations * self.eval_tokens * FORWARD;
        let rest = Interval::around(tokens / speed, SPREAD);
        let so_far = ledger.elapsed();
        let seconds =
            Interval { low: so_far + rest.low, value: so_far + rest.value, high: so_far + rest.high };
        let machine = ledger.machine();
        Some(Forecast {
            what: "train".into(),
            memory: self.memory(),
            seconds,
            // Token files of four bytes at most; the model, saved twice in f32 at most; metrics and report.
            disk_bytes: (self.checkpoints * CHECKPOINT_BYTES + 8.0) * self.parameters
                + 4.0 * self.text_tokens
                + 4e6,
            joules: seconds.times(machine.watts),
            usd: seconds.times(machine.usd_per_hour / 3600.0),
        })
    }

    /// As the compiler planned it; what the process has taken beside is there already, and counts as temporary.
    fn memory(&self) -> Memory {
        let (weights, optimiser) = (4.0 * self.parameters, 8.0 * self.parameters);
        let beside = probe::peak_memory().unwrap_or(0.0) - self.planned_bytes;
        Memory {
            weights,
            optimiser,
            activations: (self.planned_bytes - weights - optimiser).max(0.0),
            // Evaluation, samples and checkpoints come later: a tenth and 20 MB for them.
            temporary: beside.max(0.0) + 0.1 * self.planned_bytes + 20e6,
            ..Memory::default()
        }
    }
}

/// A forecast in a line.
pub fn line(f: &Forecast) -> String {
    format!(
        "expected: {} in all ({} to {}), {} of memory, {} on disk, {}, {} (energy is an estimate)",
        show_seconds(f.seconds.value),
        show_seconds(f.seconds.low),
        show_seconds(f.seconds.high),
        show_bytes(f.memory.total()),
        show_bytes(f.disk_bytes),
        show_joules(f.joules.value),
        show_usd(f.usd.value)
    )
}

/// Trains with `config` for some seconds in a folder that is thrown away, and says what the whole would take.
///
/// # Errors
/// Those of a run.
pub fn dry_run(mut config: Config, json: bool) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let start = Instant::now();
    config.run.sample_every = Some(0);
    let mut run = Run::start(&folder.path().join("run"), config)?;
    let (steps, settings) = (run.settings().steps, run.settings().clone());
    let here = std::env::current_dir()?;
    let ledger = Ledger::new("train", probe::here(settings.threads, &here, settings.usd_per_hour), start);
    let mut expected = Expected::new(&mut run);
    let stop = AtomicBool::new(false);
    let mut forecast = None;
    run.go(&stop, &mut |event| {
        if let Event::Step(record) = &event
            && let Some(told) = expected.after(record, &ledger)
        {
            forecast = Some(told);
            stop.store(true, Ordering::Relaxed);
        }
    })?;
    let Some(forecast) = forecast else {
        anyhow::bail!("the run has {steps} steps, too few to tell anything; just start it")
    };
    if json {
        return text::say_json(&serde_json::to_value(&forecast)?);
    }
    let mut table = Table::new(
        &format!("What {steps} steps would take on {}", ledger.machine().name),
        &["what", "expected", "from", "to"],
    );
    for (name, bytes) in forecast.memory.kinds().into_iter().filter(|(_, bytes)| *bytes > 0.0) {
        table.push([format!("memory: {name}"), show_bytes(bytes), String::new(), String::new()]);
    }
    table.push(["memory".into(), show_bytes(forecast.memory.total()), String::new(), String::new()]);
    table.push(["disk".into(), show_bytes(forecast.disk_bytes), String::new(), String::new()]);
    for (name, x, show) in [
        ("time", forecast.seconds, show_seconds as fn(f64) -> String),
        ("energy (estimate)", forecast.joules, show_joules),
        ("money", forecast.usd, show_usd),
    ] {
        table.push([name.to_string(), show(x.value), show(x.low), show(x.high)]);
    }
    text::say(table.to_text(width()).trim_end())?;
    if let Err(e) = forecast.check(ledger.machine()) {
        text::say(format!("\nIt would not fit: {e}."))?;
    }
    Ok(())
}
