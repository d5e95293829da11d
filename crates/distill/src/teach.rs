//! Teaching a student: answers and reasons as one or two tasks (Hsieh et al. 2023, section 3.2).
//!
//! A step's loss is `(1 - r) L(label) + r L(rationale)`, each the mean over the tokens of its task in the step; what a
//! prompt says is not learnt. Step-by-step has both tasks of a question in the same step; the other variants have one.
//! Everything else is a run of [`sparsam_train`]: adapters or all weights, checkpoints, measures.

use crate::Error;
use crate::question::Question;
use crate::record::Record;
use crate::soft::{self, SoftLabels};
use crate::stats::below;
use crate::student::{self, Task, Variant};
use crate::template::Template;
use sha2::{Digest, Sha256};
use sparsam_engine::{Engine, Opened, Options};
use sparsam_tokenizer::{Specials, Tokenizer};
use sparsam_train::config::{Compute, Config as RunConfig, SaveAs};
use sparsam_train::data::{Batches, PackedRows};
use sparsam_train::lora::{FinetuneConfig, Material, Method};
use sparsam_train::step::{NO_TARGET, Targets};
use sparsam_train::{Finished, Run};
use std::path::{Path, PathBuf};

/// How a student is taught.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// What it learns to write.
    pub variant: Variant,
    /// Times that it sees each question.
    pub epochs: u32,
    /// The highest learning rate; it rises over the first tenth of the steps and falls to a tenth by a cosine. `None`: 1e-4
    /// for all weights, from the model's width for adapters.
    pub lr: Option<f64>,
    /// Tokens of a step.
    pub step_tokens: usize,
    /// The share of the loss that reasons have, step-by-step only.
    pub rationale_weight: f64,
    /// Of the order of the questions.
    pub seed: u64,
    /// Threads; 0: all cores.
    pub threads: usize,
    /// What is trained.
    pub method: Method,
    /// Rank of adapters; `None`: 16.
    pub rank: Option<usize>,
    /// Steps between checkpoints; `None`: a quarter of the run.
    pub checkpoint_every: Option<u64>,
    /// What products are computed in.
    pub dtype: Compute,
    /// Type of the weights that are saved, where all are trained.
    pub save_as: SaveAs,
    /// The student first writes answers of its own, drawn from its probabilities, and learns what the teacher's
    /// probabilities are in these (Agarwal et al. 2024): it is corrected where it goes wrong, not where the teacher would.
    pub on_policy: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            variant: Variant::StepByStep,
            epochs: 3,
            lr: None,
            step_tokens: 1024,
            rationale_weight: 0.5,
            seed: 0,
            threads: 0,
            method: Method::Full,
            rank: None,
            checkpoint_every: None,
            dtype: Compute::F32,
            save_as: SaveAs::F32,
            on_policy: false,
        }
    }
}

/// The highest rate where all weights are trained and nothing else is asked for.
const LR: f64 = 1e-4;

/// A question with what is to be learnt about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Lesson {
    /// The question.
    pub question: Question,
    /// The answer.
    pub label: String,
    /// The reasons; empty where there are none.
    pub rationale: String,
}

/// Lessons from a teacher's answers: the teacher's own labels, or, with `truth`, the true ones (as expressions where they
/// are known).
///
/// # Errors
/// If true labels are wanted but not known.
pub fn lessons(records: &[Record], truth: bool) -> Result<Vec<Lesson>, Error> {
    let lesson = |r: &Record| {
        let label = match truth {
            false => r.answer.clone(),
            true => r.equation.clone().or(r.truth.clone()),
        };
        let label = label.ok_or_else(|| {
            Error::setting("--true-labels", format!("the true answer to {:?} is not known", r.question))
        })?;
        let question = Question {
            id: r.id.clone(),
            text: r.question.clone(),
            choices: r.choices.clone(),
            answer: r.truth.clone(),
            ..Question::default()
        };
        Ok(Lesson { question, label, rationale: r.rationale.clone().unwrap_or_default() })
    };
    records.iter().map(lesson).collect()
}

/// A text to learn from: its tokens, the first one that is learnt, and the task.
#[derive(Clone, Debug, PartialEq)]
struct Text {
    tokens: Vec<u32>,
    learnt_from: usize,
    task: Task,
}

fn texts(
    tokenizer: &Tokenizer,
    template: &Template,
    lesson: &Lesson,
    variant: Variant,
) -> Result<Vec<Text>, Error> {
    let encode = |text: &str, add: bool| {
        tokenizer
            .encode(text, Specials { add, parse: false })
            .map_err(|e| Error::setting("question", format!("{:?}: {e}", lesson.question.text)))
    };
    let text = |task| {
        let mut tokens = encode(&student::prompt(template, &lesson.question, task), true)?;
        let learnt_from = tokens.len();
        tokens.extend(encode(&student::target(&lesson.label, &lesson.rationale, task), false)?);
        tokens.extend(tokenizer.eos());
        Ok::<Text, Error>(Text { tokens, learnt_from, task })
    };
    match variant {
        Variant::LabelOnly => Ok(vec![text(Task::Label)?]),
        Variant::RationaleFirst => Ok(vec![text(Task::Both)?]),
        Variant::StepByStep if lesson.rationale.is_empty() => Ok(vec![text(Task::Label)?]),
        Variant::StepByStep => Ok(vec![text(Task::Label)?, text(Task::Rationale)?]),
    }
}

/// The row of a step: its texts one after the other, none of which sees another, each target with what it counts.
/// `soft`: the probabilities of each text's targets, where a teacher's are learnt.
fn row(texts: &[&Text], soft: &[&[soft::Top]], n_tokens: usize, rationale_weight: f64) -> PackedRows {
    let mut packed = PackedRows::default();
    let mut tasks = Vec::new();
    for (n, text) in texts.iter().enumerate() {
        let start = packed.tokens.len() as i32;
        for (i, pair) in text.tokens.windows(2).enumerate() {
            let learnt = i + 1 >= text.learnt_from;
            packed.tokens.push(pair[0] as i32);
            packed.positions.push(i as i32);
            packed.row_start.push(start);
            packed.targets.push(if learnt { pair[1] as i32 } else { NO_TARGET });
            tasks.push(text.task);
            if let Some(soft) = soft.get(n) {
                let top = if learnt { soft[i + 1 - text.learnt_from] } else { [(0, 0.0); soft::TOP] };
                packed.soft.extend(top);
            }
        }
    }
    let counts = |rationale: bool| {
        let of = |(t, task): &(&i32, &Task)| **t != NO_TARGET && (**task == Task::Rationale) == rationale;
        packed.targets.iter().zip(&tasks).filter(of).count()
    };
    let (labels, rationales) = (counts(false), counts(true));
    let share = if rationales == 0 { 0.0 } else { rationale_weight };
    let weight = |(target, task): (&i32, &Task)| match (*target, *task) {
        (NO_TARGET, _) => 0.0,
        (_, Task::Rationale) => (share / rationales as f64) as f32,
        _ => ((1.0 - share) / labels as f64) as f32,
    };
    packed.weights = packed.targets.iter().zip(&tasks).map(weight).collect();
    packed.pad_to(n_tokens);
    packed
}

/// The rows of all steps, in the order in which they are learnt.
struct Lessons {
    texts: Vec<Vec<Text>>,
    /// The lessons of each step.
    order: Vec<Vec<usize>>,
    n_tokens: usize,
    rationale_weight: f64,
    soft: Option<SoftLabels>,
}

impl Lessons {
    fn row(&self, step: usize) -> PackedRows {
        let lessons = &self.order[step % self.order.len()];
        let texts: Vec<&Text> = lessons.iter().flat_map(|&l| &self.texts[l]).collect();
        let soft: Vec<&[soft::Top]> = match &self.soft {
            Some(s) => lessons.iter().flat_map(|&l| s.of[l].iter().map(Vec::as_slice)).collect(),
            None => Vec::new(),
        };
        row(&texts, &soft, self.n_tokens, self.rationale_weight)
    }
}

impl Batches for Lessons {
    fn batch(&mut self, first: u64, n: usize) -> Result<PackedRows, sparsam_train::Error> {
        self.in_order(first as usize, n)
    }

    /// One row at a time: steps have one.
    fn in_order(&self, first: usize, _: usize) -> Result<PackedRows, sparsam_train::Error> {
        Ok(self.row(first))
    }
}

/// Where a run lives while the student is taught, and what is left of it behind.
fn run_folder(out: &Path) -> PathBuf {
    out.join("run")
}

/// A student under way.
pub struct Teaching {
    /// The run, ready to go on.
    pub run: Run,
    out: PathBuf,
}

/// A student that will be in the folder `out`, from the model in `opened`; or the one there, which is taken up where it
/// was. `soft`: a teacher's probabilities as further targets.
///
/// # Errors
/// If a lesson does not fit a step, a setting makes no sense, or `out` holds a student of other lessons or settings.
pub fn teach(
    out: &Path,
    opened: Opened,
    template: &Template,
    lessons: &[Lesson],
    config: &Config,
    soft: Option<&soft::Teacher>,
) -> Result<Teaching, Error> {
    check(config)?;
    let mut texts = lessons
        .iter()
        .map(|l| texts(opened.tokenizer()?, template, l, config.variant))
        .collect::<Result<Vec<_>, Error>>()?;
    if config.on_policy {
        if soft.is_none_or(|s| s.share != 1.0) {
            return Err(Error::setting(
                "--on-policy",
                "wants --soft-labels with --soft-share 1: what the student writes is no target",
            ));
        }
        write_itself(&opened, &mut texts, config)?;
    }
    let order = order(&texts, lessons, config)?;
    let all = |of: &dyn Fn(&Text) -> usize| -> Vec<usize> {
        let of_step = |step: &Vec<usize>| step.iter().flat_map(|&l| &texts[l]).map(of).sum();
        order.iter().map(of_step).collect()
    };
    let (tokens, learnt) = (all(&|t| t.tokens.len() - 1), all(&|t| t.tokens.len() - t.learnt_from));
    let most = learnt.iter().copied().max().unwrap_or(0).next_multiple_of(64);
    let vocab_size = opened.model.facts().vocab_size;
    let mut hash = Sha256::new();
    for text in order.iter().flatten().flat_map(|&l| &texts[l]) {
        hash.update((text.tokens.len() as u64).to_le_bytes());
        hash.update((text.learnt_from as u64).to_le_bytes());
        text.tokens.iter().for_each(|t| hash.update(t.to_le_bytes()));
    }
    hash.update(config.rationale_weight.to_le_bytes());
    let labels = match soft {
        Some(teacher) => {
            let asked: Vec<Vec<(&[u32], usize)>> = texts
                .iter()
                .map(|lesson| lesson.iter().map(|t| (&t.tokens[..], t.learnt_from)).collect())
                .collect();
            let labels = SoftLabels::made(teacher, &opened, &asked, &run_folder(out))?;
            hash.update(labels.sha256());
            hash.update(teacher.share.to_le_bytes());
            hash.update([u8::from(teacher.reverse)]);
            Some(labels)
        }
        None => None,
    };
    let steps = order.len() as u64;
    let material = Material {
        targets: Targets {
            rows: (most * 10 <= config.step_tokens * 9).then_some(most),
            weighted: true,
            soft: soft.map(|t| t.targets(vocab_size)),
        },
        tokens: [tokens.iter().sum(), learnt.iter().sum(), 0],
        sha256: hash.finalize().iter().map(|b| format!("{b:02x}")).collect(),
        notes: Vec::new(),
        examples: sparsam_train::dialogue::Examples::default(),
        held_back: None,
        train: Box::new(Lessons {
            texts,
            order,
            n_tokens: config.step_tokens,
            rationale_weight: config.rationale_weight,
            soft: labels,
        }),
    };
    let mut c = RunConfig::default();
    c.model.from = Some(opened.source.path().display().to_string());
    c.data.ctx = Some(config.step_tokens);
    let full = config.method == Method::Full;
    c.finetune = Some(FinetuneConfig {
        method: Some(config.method),
        rank: config.rank.filter(|_| !full),
        ..FinetuneConfig::default()
    });
    let o = &mut c.optimiser;
    o.lr = config.lr.or(full.then_some(LR));
    o.weight_decay = full.then_some(0.01);
    o.warmup = Some((steps / 10).max(1).min(steps / 2));
    let r = &mut c.run;
    (r.steps, r.batch, r.accumulate) = (Some(steps), Some(1), Some(1));
    (r.seed, r.threads, r.save_as) = (Some(config.seed), Some(config.threads), Some(config.save_as));
    r.dtype = Some(config.dtype);
    r.checkpoint_every = config.checkpoint_every.or(Some((steps / 4).max(1)));
    // A checkpoint of all weights is three times as large as the model.
    r.keep = Some(0);
    let run = Run::on(&run_folder(out), c, opened, material)?;
    Ok(Teaching { run, out: out.to_path_buf() })
}

/// Puts what the student writes in the place of what it was to write: up to twice as long.
fn write_itself(opened: &Opened, texts: &mut [Vec<Text>], config: &Config) -> Result<(), Error> {
    let options = Options { threads: config.threads, ..Options::default() };
    let engine = Engine::load(opened.source.path(), &options)?;
    let asked: Vec<(&[u32], usize)> = texts
        .iter()
        .flatten()
        .map(|t| (&t.tokens[..t.learnt_from], 2 * (t.tokens.len() - t.learnt_from)))
        .collect();
    let written = soft::written(&engine, &asked, config.seed)?;
    for (text, written) in texts.iter_mut().flatten().zip(written) {
        text.tokens.truncate(text.learnt_from);
        text.tokens.extend(written);
    }
    Ok(())
}

impl Teaching {
    /// Puts what a finished run has made into the student's folder, and removes what was only needed to go on.
    ///
    /// # Errors
    /// If the disk fails. Then the same run, taken up again, is finished at once.
    pub fn finish(&self, finished: &Finished) -> Result<(), Error> {
        let Some(result) = self.run.result().filter(|_| finished.complete) else { return Ok(()) };
        let entries = std::fs::read_dir(&result).map_err(Error::io("read", &result))?;
        for entry in entries {
            let entry = entry.map_err(Error::io("read", &result))?;
            std::fs::rename(entry.path(), self.out.join(entry.file_name()))
                .map_err(Error::io("move", entry.path()))?;
        }
        let measures = run_folder(&self.out).join("metrics.jsonl");
        std::fs::copy(&measures, self.out.join("metrics.jsonl")).map_err(Error::io("copy", measures))?;
        for folder in [result, run_folder(&self.out).join("checkpoints")] {
            if folder.exists() {
                std::fs::remove_dir_all(&folder).map_err(Error::io("remove", &folder))?;
            }
        }
        Ok(())
    }
}

fn check(config: &Config) -> Result<(), Error> {
    if config.epochs == 0 || config.step_tokens == 0 {
        return Err(Error::setting("--epochs, --step-tokens", "must be at least 1"));
    }
    if !(0.0..1.0).contains(&config.rationale_weight) {
        return Err(Error::setting(
            "--rationale-weight",
            "must be between 0 and 1 (1 itself would teach no answers)",
        ));
    }
    if config.lr.is_some_and(|lr| !(lr > 0.0 && lr <= 1.0)) {
        return Err(Error::setting("--lr", "must be above 0 and at most 1"));
    }
    Ok(())
}

/// The lessons of each step: all lessons in a random order, again for each epoch, as many to a step as fit.
fn order(texts: &[Vec<Text>], lessons: &[Lesson], config: &Config) -> Result<Vec<Vec<usize>>, Error> {
    if texts.is_empty() {
        return Err(Error::setting(
            "--answers",
            "nothing is left to learn from; hold less back, or give more answers",
        ));
    }
    let length = |l: usize| texts[l].iter().map(|t| t.tokens.len() - 1).sum::<usize>();
    if let Some(l) = (0..texts.len()).find(|&l| length(l) > config.step_tokens) {
        let (tokens, question) = (length(l), &lessons[l].question.text);
        return Err(Error::setting(
            "--step-tokens",
            format!("is {}, but one lesson has {tokens} tokens: {question:?}", config.step_tokens),
        ));
    }
    let mut state = config.seed;
    let mut steps: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for _ in 0..config.epochs {
        let mut epoch: Vec<usize> = (0..texts.len()).collect();
        // Fisher and Yates.
        for i in (1..epoch.len()).rev() {
            epoch.swap(i, below(&mut state, i + 1));
        }
        for l in epoch {
            if length(l) > room {
                steps.push(Vec::new());
                room = config.step_tokens;
            }
            room -= length(l);
            if let Some(step) = steps.last_mut() {
                step.push(l);
            }
        }
    }
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(tokens: &[u32], learnt_from: usize, task: Task) -> Text {
        Text { tokens: tokens.to_vec(), learnt_from, task }
    }

    #[test]
    fn only_what_the_student_writes_is_learnt() {
        let a = text(&[5, 6, 7, 8], 2, Task::Label);
        let b = text(&[5, 9, 3], 1, Task::Rationale);
        let p = row(&[&a, &b], &[], 7, 0.25);
        assert_eq!(p.tokens, [5, 6, 7, 5, 9, 0, 0]);
        assert_eq!(p.positions, [0, 1, 2, 0, 1, 0, 0]);
        assert_eq!(p.row_start[..5], [0, 0, 0, 3, 3]);
        assert_eq!(p.targets, [NO_TARGET, 7, 8, 9, 3, NO_TARGET, NO_TARGET]);
        // The mean of each task: two tokens of the label share 0.75, two of the reasons 0.25.
        assert_eq!(p.weights, [0.0, 0.375, 0.375, 0.125, 0.125, 0.0, 0.0]);
        let alone = row(&[&a], &[], 3, 0.25);
        assert_eq!(alone.weights, [0.0, 0.5, 0.5]);
        // A teacher's probabilities belong to what is learnt alone.
        let top = |id| [(id, 0.5); soft::TOP];
        let p = row(&[&a, &b], &[&[top(1), top(2)], &[top(3), top(4)]], 7, 0.25);
        let ids: Vec<u32> = p.soft.chunks(soft::TOP).map(|top| top[0].0).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 0, 0]);
    }

    #[test]
    fn every_epoch_sees_every_lesson_once() {
        let texts: Vec<Vec<Text>> =
            (0..50).map(|i| vec![text(&vec![1; 3 + i % 7], 1, Task::Label)]).collect();
        let config = Config { epochs: 2, step_tokens: 20, ..Config::default() };
        let lesson = Lesson { question: Question::default(), label: String::new(), rationale: String::new() };
        let lessons = vec![lesson; 50];
        let steps = order(&texts, &lessons, &config).unwrap();
        let all: Vec<usize> = steps.concat();
        let sorted = |part: &[usize]| {
            let mut part = part.to_vec();
            part.sort_unstable();
            part
        };
        assert_eq!(sorted(&all[..50]), (0..50).collect::<Vec<_>>());
        assert_eq!(sorted(&all[50..]), (0..50).collect::<Vec<_>>());
        assert_ne!(all[..50], all[50..]);
        let tokens = |s: &Vec<usize>| s.iter().map(|&l| texts[l][0].tokens.len() - 1).sum::<usize>();
        assert!(steps.iter().all(|s| !s.is_empty() && tokens(s) <= 20));
        assert_eq!(order(&texts, &lessons, &config).unwrap(), steps);
        let e = order(&texts, &lessons, &Config { step_tokens: 5, ..config }).unwrap_err().to_string();
        assert!(e.contains("is 5, but one lesson has"), "{e}");
    }
}
