//! What a command will take, said after its first seconds: the probe is the work itself.
//!
//! [`Expected`] watches the steps of a training run, [`Rate`] anything whose share done is known; both give a
//! [`Forecast`] once. `--dry-run` does some seconds of the work where it is thrown away, and shows it ([`show`]).

use crate::ledger::Ledger;
use crate::plan::width;
use crate::{probe, text};
use serde_json::json;
use sparsam_plan::forecast::{Forecast, Interval, Machine};
use sparsam_plan::memory::Memory;
use sparsam_plan::report::Table;
use sparsam_plan::units::{show_bytes, show_joules, show_seconds, show_usd};
use sparsam_train::config::Config;
use sparsam_train::metrics::StepRecord;
use sparsam_train::{Event, Run};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Seconds of steps that tell the speed of the rest.
const SECONDS: f64 = 5.0;
/// Or so many steps, if they are this part of the run: short runs are over before.
const PART: u64 = 20;
/// How far the rest may be off either way: other work on the machine, clocks that sink as it warms.
const SPREAD: f64 = 0.25;
/// Of a forward pass alone, as a share of a step.
const FORWARD: f64 = 1.0 / 3.0;

/// A forecast of a training run in the making.
pub struct Expected {
    what: &'static str,
    /// Weights that are trained.
    trained: f64,
    /// What the optimiser keeps for them, and what of that lies in a file.
    moments_bytes: f64,
    paged_bytes: f64,
    /// Weights that stay as they are.
    frozen_bytes: f64,
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
    /// Of a run of the command `what` that has not begun.
    pub fn new(what: &'static str, run: &mut Run) -> Expected {
        let learner = run.learner();
        let planned_bytes = learner.bytes() as f64;
        let trained: usize = learner.parameters().iter().map(|p| p.shape.iter().product::<usize>()).sum();
        let (moments_bytes, paged_bytes) = (learner.moments_bytes() as f64, learner.paged_bytes() as f64);
        let frozen_bytes = learner.session().weights().bytes() as f64;
        let (s, r) = (run.settings(), run.receipt());
        Expected {
            what,
            trained: trained as f64,
            moments_bytes,
            paged_bytes,
            frozen_bytes,
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
        let left = self.steps.saturating_sub(record.step);
        let evaluations = left.div_ceil(self.eval_every) as f64;
        let tokens = left as f64 * self.tokens_per_step + evaluations * self.eval_tokens * FORWARD;
        let rest = tokens * seconds / (done as f64 * self.tokens_per_step);
        Some(self.in_all(rest, ledger))
    }

    /// The forecast of a run that has `rest` seconds to go.
    fn in_all(&self, rest: f64, ledger: &Ledger) -> Forecast {
        let seconds = Interval::around(rest, SPREAD).after(ledger.elapsed());
        // Token files of four bytes at most; the model, saved twice in f32 at most; metrics and report.
        let checkpoint = 4.0 * self.trained + self.moments_bytes;
        let disk = self.checkpoints * checkpoint
            + 8.0 * self.trained
            + 4.0 * self.text_tokens
            + self.paged_bytes
            + 4e6;
        Forecast::timed(self.what, seconds, self.memory(), disk, ledger.machine())
    }

    /// As the compiler planned it; what the process has taken beside is there already, and counts as temporary.
    fn memory(&self) -> Memory {
        let (weights, optimiser) =
            (self.frozen_bytes + 4.0 * self.trained, (self.moments_bytes - self.paged_bytes).max(0.0));
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

/// A forecast of work whose share done is known, from the rate at which it proceeds.
pub struct Rate {
    /// Share and time where counting began: what comes before (loading, compiling) tells nothing of the rest.
    from: Option<(f64, Instant)>,
    said: bool,
}

impl Rate {
    /// Of work that has not begun.
    pub fn new() -> Rate {
        Rate { from: None, said: false }
    }

    /// Time in all, once the share that is done tells it: after [`SECONDS`] or a twentieth of the work.
    pub fn after(&mut self, share: f64, ledger: &Ledger) -> Option<Interval> {
        let Some((from, start)) = self.from else {
            self.from = Some((share, Instant::now()));
            return None;
        };
        let (done, seconds) = (share - from, start.elapsed().as_secs_f64());
        if self.said || done <= 0.0 || (seconds < SECONDS && done < 1.0 / PART as f64) {
            return None;
        }
        self.said = true;
        let rest = seconds / done * (1.0 - share).max(0.0);
        Some(Interval::around(rest, SPREAD).after(ledger.elapsed()))
    }
}

/// What the process takes now at most, as memory of work whose weights are `weights` bytes; the rest is temporary.
pub fn measured(weights: f64, optimiser: f64) -> Memory {
    let all = probe::peak_memory().unwrap_or(0.0);
    Memory { weights, optimiser, temporary: (all - weights - optimiser).max(0.0) + 20e6, ..Memory::default() }
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
    trial("train", &mut run, start, json)
}

/// Makes some steps of `run`, which began at `start` and is thrown away, and says what the whole would take.
///
/// # Errors
/// Those of a run.
pub fn trial(what: &'static str, run: &mut Run, start: Instant, json: bool) -> anyhow::Result<()> {
    let settings = run.settings().clone();
    let here = std::env::current_dir()?;
    let ledger = Ledger::new(what, probe::here(settings.threads, &here, settings.usd_per_hour), start);
    let mut expected = Expected::new(what, run);
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
    // A run that ended within the trial has told all.
    let forecast = forecast.unwrap_or_else(|| expected.in_all(0.0, &ledger));
    let more = json!({
        "parameters": run.receipt().parameters,
        "steps": settings.steps,
        "tokens_per_step": settings.tokens_per_step(),
    });
    show(&forecast, ledger.machine(), &format!("{} steps", settings.steps), more, json)
}

/// Prints a forecast of `work` as a table with what does not fit, or as JSON with `more`.
///
/// # Errors
/// If stdout is closed.
pub fn show(
    forecast: &Forecast,
    machine: &Machine,
    work: &str,
    more: serde_json::Value,
    json: bool,
) -> anyhow::Result<()> {
    let fits = forecast.check(machine);
    if json {
        let mut value = serde_json::to_value(forecast)?;
        value["memory_bytes"] = json!(forecast.memory.total());
        value["fits"] = json!(fits.is_ok());
        if let (Some(all), Some(more)) = (value.as_object_mut(), more.as_object()) {
            all.extend(more.clone());
        }
        return text::say_json(&value);
    }
    let mut table = Table::new(
        &format!("What {work} would take on {}", machine.name),
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
    if let Err(e) = fits {
        text::say(format!("\nIt would not fit: {e}."))?;
    }
    Ok(())
}

/// The machine for a command whose files go beside `output`.
pub fn machine(threads: usize, output: &Path) -> Machine {
    probe::here(threads, output.parent().unwrap_or(Path::new(".")), None)
}
