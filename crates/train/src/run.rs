//! A run: the loop, and the folder that it lives in.
//!
//! ```text
//! RUN/config.toml               all settings, derived ones included
//! RUN/tokenizer/                tokenizer.json, where the run made it
//! RUN/tokens.bin                the text as tokens, where the run made them
//! RUN/metrics.jsonl             measures, a line each
//! RUN/checkpoints/step-*        weights, moments, progress
//! RUN/adapter/, RUN/model/      what fine-tuning gives: the best on the held-back part so far
//! RUN/report.html               curves, samples, settings
//! RUN/model/, RUN/model.gguf    the model at the end, for other programs
//! ```

mod prepare;

use crate::config::{Config, Receipt, Settings};
use crate::data::{Batches, Corpus, PackedRows, Rows};
use crate::learner::Base;
use crate::lora::{self, Finetuned, Material};
use crate::metrics::{Metrics, Record, StepRecord};
use crate::step::Targets;
use crate::task::Exam;
use crate::verify::{self, Frozen, Verdict};
use crate::{Error, How, Learner, Outcome, checkpoint, checkpoint::Progress, report};
use sparsam_engine::Opened;
use sparsam_formats::{AtomicFile, Kind, Source};
use sparsam_kernels::roof::{self, Arithmetic};
use sparsam_kernels::{Context, Cpu, give_back_freed};
use sparsam_models::Model;
use sparsam_plan::units::show_bytes;
use sparsam_runtime::{Alone, Device, Group, Options, Pass, Precision, Recompute};
use sparsam_tokenizer::{Specials, Tokenizer};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// How much of the smoothed loss is new at each step: it remembers about 20 steps.
const SMOOTHING: f64 = 0.05;
/// Temperature of the samples.
const TEMPERATURE: f64 = 0.8;

/// What happens in a run.
#[derive(Debug)]
pub enum Event<'a> {
    /// A step is done.
    Step(&'a StepRecord),
    /// The held-back part was evaluated: steps done, mean loss.
    HeldBack(u64, f64),
    /// The task's questions were answered: steps done, right answers, questions.
    Task(u64, usize, usize),
    /// The model wrote something: steps done, text.
    Sample(u64, &'a str),
    /// A checkpoint is safe on the disk.
    Saved(&'a Path),
    /// Something that a reader should know.
    Note(&'a str),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// How far it is.
    pub progress: Progress,
    /// Whether all steps are done; if not, it was stopped and can be taken up again.
    pub complete: bool,
}

/// A run, ready to go on.
pub struct Run {
    folder: PathBuf,
    config: Config,
    receipt: Receipt,
    settings: Settings,
    tokenizer: Option<Tokenizer>,
    /// The model that it continues with.
    source: Option<Source>,
    train: Box<dyn Batches>,
    held_back: Option<Box<dyn Batches>>,
    learner: Learner,
    finetuned: Option<Finetuned>,
    progress: Progress,
    /// The processes that train together; the first one writes the folder.
    group: Arc<dyn Group>,
    /// Operations a second that the machine can do at most.
    peak: f64,
    /// Operations of learning from one token.
    flop_per_token: f64,
}

impl Run {
    /// Starts a run with `config` in `folder`, which must not hold one yet: tokens, tokenizer and settings are written,
    /// the model is made (or read) and compiled.
    ///
    /// # Errors
    /// Settings that make no sense, text that cannot be trained on, a folder that holds a run already.
    pub fn start(folder: &Path, config: Config) -> Result<Run, Error> {
        Run::start_in(folder, config, Arc::new(Alone))
    }

    /// As [`Run::start`], by all processes of `group` together, which see the same folder: the first one writes it.
    ///
    /// # Errors
    /// As [`Run::start`]; then the other processes wait in vain, and have to be ended.
    pub fn start_in(folder: &Path, mut config: Config, group: Arc<dyn Group>) -> Result<Run, Error> {
        if group.rank() > 0 {
            group.sum_counts(&mut [0]);
            return Run::resume_in(folder, group);
        }
        if group.size() > 1 && config.finetune.is_some() {
            return Err(Error::config("finetune", "is done by one process; start it without mpirun"));
        }
        config.run.processes = Some(group.size());
        let settings_file = folder.join("config.toml");
        if settings_file.exists() {
            return Err(Error::config(
                folder.display().to_string(),
                "holds a run already; take it up again with --resume, or name another folder",
            ));
        }
        let mut run = match config.finetune {
            Some(_) => Run::plan(folder, config)?,
            None => {
                let prepared = prepare::prepare(folder, &mut config)?;
                Run::assemble(folder, config, prepared)?
            }
        };
        // Written last: what cannot be compiled is no run, and the same folder can be tried again.
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        write_file(&settings_file, run.config.to_toml().as_bytes())?;
        run.initialise()?;
        // The others wait here for the folder.
        group.sum_counts(&mut [0]);
        run.join(group);
        Ok(run)
    }

    /// A run that fine-tunes, as [`Run::start`] makes it, but nothing is written: to see what it would do and take.
    ///
    /// # Errors
    /// As [`Run::start`].
    pub fn plan(folder: &Path, mut config: Config) -> Result<Run, Error> {
        let prepared = lora::prepare(&mut config)?;
        Run::assemble(folder, config, prepared)
    }

    /// Takes up the run in `folder` at its newest checkpoint; from its beginning if it has none.
    ///
    /// # Errors
    /// If there is none, or its files do not belong together.
    pub fn resume(folder: &Path) -> Result<Run, Error> {
        Run::resume_in(folder, Arc::new(Alone))
    }

    /// As [`Run::resume`], by as many processes as it was started with.
    ///
    /// # Errors
    /// As [`Run::resume`]; if they are more or fewer.
    pub fn resume_in(folder: &Path, group: Arc<dyn Group>) -> Result<Run, Error> {
        let settings_file = folder.join("config.toml");
        if !settings_file.exists() {
            return Err(Error::config(folder.display().to_string(), "holds no run (no config.toml)"));
        }
        let mut config = Config::open(&settings_file)?;
        let prepared = match config.finetune {
            None => prepare::reopen(folder, &mut config)?,
            Some(_) => {
                let before = config.receipt.clone();
                let prepared = lora::prepare(&mut config)?;
                if before.is_some_and(|b| b.tokens_sha256 != prepared.receipt.tokens_sha256) {
                    let problem = "the examples are not those that the run was started with; put the files back, or start anew";
                    return Err(Error::config(folder.display().to_string(), problem));
                }
                prepared
            }
        };
        let mut run = Run::assemble(folder, config, prepared)?;
        let (before, now) = (run.settings.processes, group.size());
        if before != now {
            let problem =
                format!("the run was started with {before}, not {now}: its rows are dealt out to {before}");
            return Err(Error::config("run.processes", problem));
        }
        run.join(group);
        run.taken_up()
    }

    /// Starts a run that fine-tunes `opened` on rows of the caller's, with the `[finetune]` of `config`, or takes up the
    /// one that is in `folder` already.
    ///
    /// # Errors
    /// As [`Run::start`]; if the run in `folder` has other settings, or learns from something else.
    pub fn on(folder: &Path, mut config: Config, opened: Opened, material: Material) -> Result<Run, Error> {
        let prepared = lora::complete(&mut config, opened, material)?;
        let settings_file = folder.join("config.toml");
        if settings_file.exists() {
            let before = Config::open(&settings_file)?;
            if before != config {
                return Err(Error::config(
                    folder.display().to_string(),
                    "holds a run with other settings or other examples; name another folder, or remove it",
                ));
            }
            return Run::assemble(folder, config, prepared)?.taken_up();
        }
        let mut run = Run::assemble(folder, config, prepared)?;
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        write_file(&settings_file, run.config.to_toml().as_bytes())?;
        run.initialise()?;
        Ok(run)
    }

    fn join(&mut self, group: Arc<dyn Group>) {
        self.learner.join(group.clone());
        self.group = group;
    }

    /// At its newest checkpoint; at its beginning if it has none.
    fn taken_up(mut self) -> Result<Run, Error> {
        if let Some(result) = self.result() {
            clear_unfinished(&result)?;
        }
        match checkpoint::list(&self.checkpoints())?.last() {
            Some(newest) => self.progress = checkpoint::load(newest, &mut self.learner)?,
            None => self.initialise()?,
        }
        Ok(self)
    }

    fn assemble(folder: &Path, config: Config, p: Prepared) -> Result<Run, Error> {
        let settings = p.settings;
        let device = Device::cpu(settings.threads)?;
        // Of the little memory in which adapters are learnt, logits of a large vocabulary take a sixteenth.
        let row_bytes = 4 * p.model.facts().vocab_size;
        let loss_rows =
            settings.memory.filter(|_| p.finetuned.is_some()).map(|m| (m / 16 / row_bytes).max(64));
        let how = How {
            rows: settings.batch,
            ctx: settings.ctx,
            accumulate: settings.accumulate,
            targets: p.targets,
            processes: settings.processes,
            optimiser: settings.optimiser,
            samples: settings.sample_every > 0,
            options: Options {
                eager: settings.eager,
                memory: settings.memory,
                loss_rows,
                precision: settings.compute.precision(),
                ..Options::default()
            },
        };
        let learner = Learner::over_in(&p.model, how, &device, p.base, folder)?;
        // A token sees half of its row on average; the gradient takes twice what the loss takes.
        let method = p.finetuned.as_ref().map(|f| f.method);
        let flop_per_token = lora::passes(method) * p.model.flops_per_token(settings.ctx.div_ceil(2))?;
        let peak = peak_flops(settings.threads, settings.compute.precision())?;
        Ok(Run {
            folder: folder.to_path_buf(),
            config,
            receipt: p.receipt,
            settings,
            tokenizer: p.tokenizer,
            source: p.source,
            train: p.train,
            held_back: p.held_back,
            learner,
            finetuned: p.finetuned,
            progress: Progress::default(),
            group: Arc::new(Alone),
            peak,
            flop_per_token,
        })
    }

    fn initialise(&mut self) -> Result<(), Error> {
        if let (Some(f), Some(config)) = (&self.finetuned, &self.config.finetune) {
            return f.initialise(&mut self.learner, config, self.settings.seed);
        }
        match &self.source {
            Some(source) => self.learner.take_from(source),
            None => self.learner.initialise(self.settings.seed),
        }
    }

    fn checkpoints(&self) -> PathBuf {
        self.folder.join("checkpoints")
    }

    /// What fine-tuning adds to it; `None` if it trains on plain text.
    pub fn finetuned(&self) -> Option<&Finetuned> {
        self.finetuned.as_ref()
    }

    /// Where what fine-tuning gives is written.
    pub fn result(&self) -> Option<PathBuf> {
        let adapts = self.finetuned.as_ref()?.peft.is_some();
        Some(self.folder.join(if adapts { "adapter" } else { "model" }))
    }

    fn write_result(&self) -> Result<(), Error> {
        match (&self.finetuned, self.result()) {
            (Some(f), Some(folder)) => f.write(&self.learner, &folder),
            _ => Ok(()),
        }
    }

    /// Whether nothing was better than the best for as long as that may be.
    fn gives_up(&self) -> bool {
        self.settings.patience > 0 && self.progress.stale >= self.settings.patience
    }

    /// The folder it lives in.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its settings, derived ones included.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Takes the run to another number of steps than it was started with. The schedule of the learning rate ends there.
    pub fn set_steps(&mut self, steps: u64) {
        self.settings.steps = steps;
        self.settings.schedule.steps = steps;
    }

    /// All that it was started with, derived settings included.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What was found about model and data.
    pub fn receipt(&self) -> &Receipt {
        &self.receipt
    }

    /// The model under training.
    pub fn learner(&mut self) -> &mut Learner {
        &mut self.learner
    }

    /// Its tokenizer, if it has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// How far it is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Whether this is the process that writes the folder.
    pub fn leads(&self) -> bool {
        self.group.rank() == 0
    }

    /// Trains until all steps are done or `stop` is set (in any of its processes); then there is a checkpoint, and the
    /// report is written.
    ///
    /// # Errors
    /// [`Error::Diverged`] if the loss is no number any more or has risen too far: the last checkpoint is from before.
    /// Full disks.
    pub fn go(&mut self, stop: &AtomicBool, on: &mut dyn FnMut(Event)) -> Result<Finished, Error> {
        let mut metrics = match self.leads() {
            true => Metrics::open(&self.folder.join("metrics.jsonl"), self.progress.step)?,
            false => Metrics::none(),
        };
        // Traces, passes and files took more for a moment than they leave.
        give_back_freed();
        let mut saved = self.progress.step;
        let result = self.steps(stop, &mut metrics, &mut saved, on);
        if let Err(e @ Error::Diverged { step, .. }) = &result {
            metrics.add(&Record::Note { step: *step, note: e.to_string() })?;
        }
        self.write_report()?;
        result?;
        // Without examples or questions to judge by the last weights are the result; if nothing was better than the start, they are too.
        let judged = self.held_back.is_some() || self.exam().is_some();
        if self.result().is_some_and(|r| !judged || !r.exists()) {
            self.write_result()?;
        }
        if saved != self.progress.step {
            self.save(&mut saved, on)?;
        }
        let complete = self.gives_up() || self.progress.step >= self.settings.steps;
        if complete && self.finetuned.is_none() && self.leads() {
            self.export(&mut metrics, on)?;
            self.write_report()?;
        }
        Ok(Finished { progress: self.progress.clone(), complete })
    }

    /// Writes the model into the run's folder as `model/`, in Hugging Face's layout, and as `model.gguf`. What one of the
    /// forms cannot hold (a tokenizer without a name in GGUF, say) is noted: the run is complete without it, and its
    /// checkpoint has the weights.
    fn export(&mut self, metrics: &mut Metrics, on: &mut dyn FnMut(Event)) -> Result<(), Error> {
        let dtype = self.settings.save_as.dtype();
        let (folder, name) = (self.folder.join("model"), self.name());
        // From an earlier end of this run, when it had fewer steps.
        if folder.exists() {
            std::fs::remove_dir_all(&folder).map_err(Error::io("replace", &folder))?;
        }
        for (path, kind) in [(folder, Kind::Safetensors), (self.folder.join("model.gguf"), Kind::Gguf)] {
            if let Err(e) = self.learner.export(&path, kind, dtype, self.tokenizer.as_ref(), Some(&name)) {
                let note = format!("the model is not saved as {}: {e}", path.display());
                on(Event::Note(&note));
                metrics.add(&Record::Note { step: self.progress.step, note })?;
            }
        }
        Ok(())
    }

    fn steps(
        &mut self,
        stop: &AtomicBool,
        metrics: &mut Metrics,
        saved: &mut u64,
        on: &mut dyn FnMut(Event),
    ) -> Result<(), Error> {
        let due =
            |step: u64, every: u64, steps: u64| every > 0 && (step.is_multiple_of(every) || step == steps);
        if self.progress.step == 0 {
            if let Some(note) = self.memory_note() {
                on(Event::Note(&note));
                metrics.add(&Record::Note { step: 0, note })?;
            }
            self.evaluate(metrics, on)?;
            self.examine(metrics, on)?;
        }
        while self.progress.step < self.settings.steps && !self.stops(stop) && !self.gives_up() {
            if self.progress.step < self.settings.verify {
                self.second_opinion(metrics, on)?;
            }
            let record = self.step(*saved)?;
            metrics.add(&Record::Step(record.clone()))?;
            on(Event::Step(&record));
            let (step, s) = (self.progress.step, &self.settings);
            let (eval, sample, save) = (
                due(step, s.eval_every, s.steps),
                due(step, s.sample_every, s.steps),
                due(step, s.checkpoint_every, s.steps),
            );
            let ask = self.exam().is_some_and(|e| step == s.steps || due(step, e.every, s.steps));
            if eval {
                self.evaluate(metrics, on)?;
            }
            if ask {
                self.examine(metrics, on)?;
            }
            if sample {
                self.sample(metrics, on)?;
            }
            if save {
                self.save(saved, on)?;
                self.write_report()?;
            }
        }
        Ok(())
    }

    /// Whether any process has been told to stop: all have to stop behind the same step.
    fn stops(&self, stop: &AtomicBool) -> bool {
        let mut told = [u64::from(stop.load(Ordering::Relaxed))];
        self.group.sum_counts(&mut told);
        told[0] > 0
    }

    /// One optimiser step, timed and watched.
    fn step(&mut self, saved: u64) -> Result<StepRecord, Error> {
        let s = &self.settings;
        let (start, t) = (Instant::now(), self.progress.step + 1);
        let mut micro = Vec::with_capacity(s.accumulate);
        let (rank, size) = (self.group.rank(), self.group.size());
        for i in 0..s.accumulate {
            let first = (i * size + rank) * s.batch;
            micro.push(self.train.batch(self.progress.rows + first as u64, s.batch)?);
        }
        let lr = s.schedule.at(t);
        let outcome = self.learner.step(&micro, t, lr)?;
        self.watch(&outcome, t, saved)?;
        let s = &self.settings;
        let seconds = start.elapsed().as_secs_f64();
        let p = &mut self.progress;
        p.step = t;
        p.rows += (s.accumulate * s.batch * size) as u64;
        p.targets += outcome.targets;
        p.seconds += seconds;
        let n_tokens = size * micro.iter().map(PackedRows::n_tokens).sum::<usize>();
        let tokens_per_second = n_tokens as f64 / seconds;
        Ok(StepRecord {
            step: t,
            loss: outcome.loss,
            lr,
            grad_norm: outcome.grad_norm,
            tokens: p.targets,
            seconds: p.seconds,
            tokens_per_second,
            share_of_peak: tokens_per_second * self.flop_per_token / (self.peak * size as f64),
        })
    }

    /// Compares the coming step with its plain meaning, and leaves out the pass that explains a difference: in all
    /// processes, whose programs have to be the same.
    fn second_opinion(&mut self, metrics: &mut Metrics, on: &mut dyn FnMut(Event)) -> Result<(), Error> {
        let mut off = Pass::ALL.map(|_| 0);
        if self.leads() {
            let verdict = self.judge_step(metrics, on)?;
            off = Pass::ALL.map(|pass| u64::from(verdict.off.contains(&pass)));
        }
        self.group.sum_counts(&mut off);
        if off.iter().any(|n| *n > 0) {
            let off = Pass::ALL.into_iter().zip(off).filter(|(_, n)| *n > 0).map(|(pass, _)| pass).collect();
            let options = self.learner.how().options.clone();
            self.learner.set_options(Options { off, ..options })?;
        }
        Ok(())
    }

    /// The verdict on the coming step, as a note.
    fn judge_step(&mut self, metrics: &mut Metrics, on: &mut dyn FnMut(Event)) -> Result<Verdict, Error> {
        let t = self.progress.step + 1;
        let rows = self.train.batch(self.progress.rows, self.settings.batch)?;
        let lr = self.settings.schedule.at(t);
        let frozen = Frozen::new(&mut self.learner, &rows, t, lr)?;
        let graphs = self.learner.graphs()?;
        let graph = graphs.whole.as_ref().unwrap_or(&graphs.accumulate);
        let folder = self.folder.join(format!("verify-{t}"));
        let within = self.learner.within(graph)?;
        let verdict = verify::second_opinion(graph, &frozen, &within, &folder)?;
        let note = format!("step {t}: {verdict}");
        on(Event::Note(&note));
        metrics.add(&Record::Note { step: t, note })?;
        Ok(verdict)
    }

    /// What the compiler did to keep to the budget of memory; `None` without one.
    fn memory_note(&self) -> Option<String> {
        let budget = self.settings.memory? as f64;
        let mut note = format!(
            "memory: {} planned of a budget of {}",
            show_bytes(self.learner.bytes() as f64),
            show_bytes(budget)
        );
        if let Some(r) = &self.learner.program().report().recompute {
            let Recompute { segments, cheap, all, .. } = r;
            note +=
                &format!("; of {segments} segments {all} are computed again, {cheap} but for their products");
        }
        Some(note)
    }

    /// Ends the run where the loss is no number, or has risen too far above its lowest.
    fn watch(&mut self, outcome: &Outcome, step: u64, saved: u64) -> Result<(), Error> {
        let kept = match saved {
            0 => "There is no checkpoint yet".to_string(),
            n => format!("The checkpoint of step {n} is from before"),
        };
        let lower = || "Start anew with a lower learning rate or a longer warm-up".to_string();
        if !outcome.is_finite() {
            let what = match outcome.loss.is_finite() {
                true => format!("the norm of the gradients is {}", outcome.grad_norm.unwrap_or(f64::NAN)),
                false => format!("the loss is {}", outcome.loss),
            };
            return Err(Error::Diverged { step, what, kept, advice: lower() });
        }
        let p = &mut self.progress;
        if step == 1 {
            (p.smoothed, p.lowest) = (outcome.loss, outcome.loss);
        }
        p.smoothed += SMOOTHING * (outcome.loss - p.smoothed);
        p.lowest = p.lowest.min(p.smoothed);
        let limit = self.settings.max_rise;
        if limit > 0.0 && p.smoothed > p.lowest + limit {
            let what = format!(
                "the loss has risen from {:.3} to {:.3} (smoothed), more than run.max_rise = {limit}",
                p.lowest, p.smoothed
            );
            return Err(Error::Diverged { step, what, kept, advice: lower() });
        }
        Ok(())
    }

    /// Mean loss on the held-back part.
    fn evaluate(&mut self, metrics: &mut Metrics, on: &mut dyn FnMut(Event)) -> Result<(), Error> {
        // The others go on to the next step and wait there for this one.
        if !self.leads() {
            return Ok(());
        }
        let Some(loss) = self.held_back_loss()? else { return Ok(()) };
        let step = self.progress.step;
        let by_task = self.exam().is_some();
        let p = &mut self.progress;
        p.held_back = Some(loss);
        let better = p.best.is_none_or(|best| loss < best);
        if better {
            p.best = Some(loss);
        }
        if !by_task {
            self.judge(better)?;
        }
        metrics.add(&Record::HeldBack { step, held_back_loss: loss })?;
        on(Event::HeldBack(step, loss));
        Ok(())
    }

    /// Counts an evaluation, and keeps what is better than all before.
    fn judge(&mut self, better: bool) -> Result<(), Error> {
        let p = &mut self.progress;
        p.stale = if better { 0 } else { p.stale + 1 };
        // What nothing was learnt for is no result.
        if better && p.step > 0 { self.write_result() } else { Ok(()) }
    }

    fn exam(&self) -> Option<&Exam> {
        self.finetuned.as_ref()?.exam.as_ref()
    }

    /// Right answers to the task's questions.
    fn examine(&mut self, metrics: &mut Metrics, on: &mut dyn FnMut(Event)) -> Result<(), Error> {
        let (Some(tuned), Some(exam)) = (&self.finetuned, self.exam()) else { return Ok(()) };
        let (step, questions) = (self.progress.step, exam.questions());
        let right = exam.right(tuned, &self.learner, &self.folder.join("task"), self.settings.threads)?;
        let better = self.progress.right.is_none_or(|most| right as u64 > most);
        if better {
            self.progress.right = Some(right as u64);
        }
        self.judge(better)?;
        metrics.add(&Record::Task { step, task_right: right, task_questions: questions })?;
        on(Event::Task(step, right, questions));
        Ok(())
    }

    /// Mean loss of the model, as it is, on at most `eval_tokens` tokens from the start of the held-back part, nats a
    /// token; `None` if nothing is held back.
    ///
    /// # Errors
    /// Tokens outside of the vocabulary.
    pub fn held_back_loss(&mut self) -> Result<Option<f64>, Error> {
        let Some(rows) = &self.held_back else { return Ok(None) };
        let per_batch = self.settings.batch;
        let most = (self.settings.eval_tokens / self.settings.ctx).max(1);
        let (mut sum, mut n, mut first) = (0.0, 0, 0);
        while first < most {
            let batch = rows.in_order(first, per_batch.min(most - first))?;
            if batch.tokens.is_empty() {
                break;
            }
            let (loss, targets) = self.learner.evaluate(&batch)?;
            (sum, n, first) = (sum + loss, n + targets, first + per_batch);
        }
        Ok((n > 0).then(|| sum / n as f64))
    }

    fn sample(&mut self, metrics: &mut Metrics, on: &mut dyn FnMut(Event)) -> Result<(), Error> {
        if !self.leads() {
            return Ok(());
        }
        let step = self.progress.step;
        let Some(text) = self.write_on(&self.settings.sample_prompt.clone(), step)? else { return Ok(()) };
        metrics.add(&Record::Sample { step, sample: text.clone() })?;
        on(Event::Sample(step, &text));
        Ok(())
    }

    /// `prompt` and what the model, as it is, writes behind it; `None` without a tokenizer. An empty prompt is the start
    /// of a document.
    fn write_on(&mut self, prompt: &str, seed: u64) -> Result<Option<String>, Error> {
        let Some(tokenizer) = &self.tokenizer else { return Ok(None) };
        let mut tokens = tokenizer.encode(prompt, Specials { add: true, parse: false })?;
        if tokens.is_empty() {
            tokens = vec![tokenizer.eos().or(tokenizer.bos()).unwrap_or(0)];
        }
        tokens.truncate(self.settings.ctx.saturating_sub(1).max(1));
        let (n, seed) = (self.settings.sample_tokens, self.settings.seed ^ seed);
        let written = self.learner.sample(&tokens, n, TEMPERATURE, seed, tokenizer.eos())?;
        tokens.extend(written);
        Ok(Some(tokenizer.decode(&tokens, true)))
    }

    fn save(&mut self, saved: &mut u64, on: &mut dyn FnMut(Event)) -> Result<(), Error> {
        *saved = self.progress.step;
        if !self.leads() {
            return Ok(());
        }
        let path = checkpoint::save(&self.checkpoints(), &self.learner, &self.progress, self.settings.keep)?;
        on(Event::Saved(&path));
        Ok(())
    }

    /// The folder's name.
    fn name(&self) -> String {
        self.folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    }

    fn write_report(&self) -> Result<(), Error> {
        if !self.leads() {
            return Ok(());
        }
        let records = crate::metrics::read(&self.folder.join("metrics.jsonl"))?;
        let html =
            report::report(&format!("Training: {}", self.name()), &self.config, &self.receipt, &records)
                .to_html();
        write_file(&self.folder.join("report.html"), html.as_bytes())
    }
}

/// Removes what a kill left of files that were being written: hidden, and named `.tmp`.
fn clear_unfinished(folder: &Path) -> Result<(), Error> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(()) };
    for entry in entries {
        let path = entry.map_err(Error::io("read", folder))?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with('.') && name.ends_with(".tmp") {
            std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// What a run works with.
pub(crate) struct Prepared {
    pub model: Model,
    pub tokenizer: Option<Tokenizer>,
    /// The model that is continued with.
    pub source: Option<Source>,
    pub train: Box<dyn Batches>,
    pub held_back: Option<Box<dyn Batches>>,
    pub settings: Settings,
    pub receipt: Receipt,
    pub base: Base,
    pub targets: Targets,
    pub finetuned: Option<Finetuned>,
}

/// Writes a file that appears whole or not at all.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes).map_err(Error::io("write", path))?;
    Ok(file.commit()?)
}

/// Operations a second that this machine can do at most in `precision` (`None`: f32), with `threads` (0: all).
///
/// # Errors
/// If `SPARSAM_SIMD` asks for what the machine lacks.
pub fn peak_flops(threads: usize, precision: Option<Precision>) -> Result<f64, Error> {
    let cpu = Cpu::from_env().map_err(sparsam_runtime::Error::Device)?;
    let kind = match precision {
        Some(Precision::Bf16) => Arithmetic::Bf16,
        _ => Arithmetic::F32,
    };
    Ok(roof::peak(&Context::new(threads, cpu), kind))
}
