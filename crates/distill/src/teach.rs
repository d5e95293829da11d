//! Teaching a student: answers and reasons as one or two tasks (Hsieh et al. 2023, section 3.2).
//!
//! A step's loss is `(1 - r) L(label) + r L(rationale)`, each the mean over the tokens of its task in the step; what a
//! prompt says is not learnt. Step-by-step has both tasks of a question in the same step; the other variants have one.

use crate::Error;
use crate::question::Question;
use crate::record::Record;
use crate::stats::below;
use crate::student::{self, Task, Variant};
use crate::template::Template;
use sparsam_dtype::{DType, codec};
use sparsam_engine::{Opened, Plan, Saver};
use sparsam_formats::Kind as FileKind;
use sparsam_ir::{AdamW, Tensor, Trace};
use sparsam_models::nn::Batch;
use sparsam_models::{Model, Parameter};
use sparsam_runtime::{Data, Device, Options, Session, Step, Weights};
use sparsam_tokenizer::{Specials, Tokenizer};
use sparsam_train::data::PackedRows;
use sparsam_train::optim::{Optimiser, RATES};
use sparsam_train::schedule::{Form, Schedule};
use sparsam_train::step::{self, GRAD_NORM, LOSS, NO_TARGET};
use std::path::Path;
use std::sync::Arc;

/// How a student is taught.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// What it learns to write.
    pub variant: Variant,
    /// Times that it sees each question.
    pub epochs: u32,
    /// The highest learning rate; it rises over the first tenth of the steps and falls to a tenth by a cosine.
    pub lr: f64,
    /// Tokens of a step.
    pub step_tokens: usize,
    /// The share of the loss that reasons have, step-by-step only.
    pub rationale_weight: f64,
    /// Of the order of the questions.
    pub seed: u64,
    /// Threads; 0: all cores.
    pub threads: usize,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            variant: Variant::StepByStep,
            epochs: 3,
            lr: 1e-4,
            step_tokens: 1024,
            rationale_weight: 0.5,
            seed: 0,
            threads: 0,
        }
    }
}

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

/// A step's rows, and what each row's loss counts.
#[derive(Clone, Debug, PartialEq)]
struct Rows {
    packed: PackedRows,
    weights: Vec<f32>,
}

fn rows(texts: &[&Text], n_tokens: usize, rationale_weight: f64) -> Rows {
    let mut packed = PackedRows::default();
    let mut tasks = Vec::new();
    for text in texts {
        let start = packed.tokens.len() as i32;
        for (i, pair) in text.tokens.windows(2).enumerate() {
            packed.tokens.push(pair[0] as i32);
            packed.positions.push(i as i32);
            packed.row_start.push(start);
            packed.targets.push(if i + 1 < text.learnt_from { NO_TARGET } else { pair[1] as i32 });
            tasks.push(text.task);
        }
    }
    packed.pad_to(n_tokens);
    let counts = |rationale: bool| {
        let of = |(t, task): &(&i32, &Task)| **t != NO_TARGET && (**task == Task::Rationale) == rationale;
        packed.targets.iter().zip(&tasks).filter(of).count()
    };
    let (labels, rationales) = (counts(false), counts(true));
    let share = if rationales == 0 { 0.0 } else { rationale_weight };
    let weight = |(i, target): (usize, &i32)| match tasks.get(i) {
        Some(task) if *target != NO_TARGET => match task {
            Task::Rationale => (share / rationales as f64) as f32,
            _ => ((1.0 - share) / labels as f64) as f32,
        },
        _ => 0.0,
    };
    let weights = packed.targets.iter().enumerate().map(weight).collect();
    Rows { packed, weights }
}

/// What one step gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// The loss, in nats.
    pub loss: f64,
    /// The norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens that were learnt from so far, prompts included, padding not.
    pub tokens: u64,
}

/// A taught student.
pub struct Taught {
    model: Model,
    parameters: Vec<Parameter>,
    session: Session,
}

/// The loss: the sum of the rows' cross-entropies, each times its entry of the input `weights`. (1).
#[track_caller]
fn loss(t: &Trace, model: &Model, batch: &Batch) -> Tensor {
    let logits = model.trace(t, batch); // (N, vocab)
    let targets = t.input("targets", &[batch.n_logits()], DType::I32);
    let weights = t.input("weights", &[batch.n_logits()], DType::F32);
    (logits.cross_entropy(&targets) * weights).sum(&[0])
}

/// Teaches all of the weights of the model in `opened`. `progress` hears of each step and says whether to go on.
///
/// # Errors
/// If a lesson does not fit a step, a setting makes no sense, or the loss is no number any more.
pub fn teach(
    opened: &Opened,
    template: &Template,
    lessons: &[Lesson],
    config: &Config,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<Taught, Error> {
    check(config)?;
    let texts = lessons
        .iter()
        .map(|l| texts(opened.tokenizer()?, template, l, config.variant))
        .collect::<Result<Vec<_>, Error>>()?;
    let order = order(&texts, lessons, config)?;
    let device = Device::cpu(config.threads)?;
    let optimiser = Optimiser {
        adamw: AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 },
        muon: None,
        clip: Some(1.0),
    };
    let (mut taught, update) = load(opened, &device, config.step_tokens, &optimiser)?;
    let steps = order.len() as u64;
    let schedule = Schedule {
        form: Form::Cosine,
        lr: config.lr,
        min_lr: 0.1 * config.lr,
        warmup: (steps / 10).max(1).min(steps / 2),
        decay: 0,
        steps,
    };
    let mut tokens = 0;
    for (i, lessons) in order.iter().enumerate() {
        let step = i as u64 + 1;
        let of_step: Vec<&Text> = lessons.iter().flat_map(|&l| &texts[l]).collect();
        tokens += of_step.iter().map(|t| t.tokens.len() as u64 - 1).sum::<u64>();
        let rows = rows(&of_step, config.step_tokens, config.rationale_weight);
        let rates = optimiser.adamw.rates(schedule.at(step), step);
        let inputs = [
            ("tokens", Data::I32(&rows.packed.tokens)),
            ("positions", Data::I32(&rows.packed.positions)),
            ("row_start", Data::I32(&rows.packed.row_start)),
            ("targets", Data::I32(&rows.packed.targets)),
            ("weights", Data::F32(&rows.weights)),
            (RATES, Data::F32(&rates)),
        ];
        let out = taught.session.run(&update, &inputs)?;
        let (loss, grad_norm) = (f64::from(out.f32(LOSS)?[0]), f64::from(out.f32(GRAD_NORM)?[0]));
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(Error::setting(
                "--lr",
                format!("step {step}: the loss is {loss}; choose a lower rate than {}", config.lr),
            ));
        }
        if !progress(Progress { step, steps, loss, grad_norm, tokens }) {
            break;
        }
    }
    Ok(taught)
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
    if !(config.lr > 0.0 && config.lr <= 1.0) {
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

fn load(
    opened: &Opened,
    device: &Device,
    n_tokens: usize,
    optimiser: &Optimiser,
) -> Result<(Taught, Step), Error> {
    let model = opened.model.clone();
    let mut constants = Weights::new();
    for c in model.constants() {
        constants.insert_f32(&c.name, &c.shape, &c.data)?;
    }
    let mut session = Session::new(device, Arc::new(constants));
    let batch = Batch::packed(n_tokens);
    let graph = step::update(step::training(), |t| loss(t, &model, &batch), optimiser)
        .map_err(sparsam_train::Error::from)?;
    let update = session.load(&graph, &Options::default())?;
    for spec in model.weights(&opened.source).map_err(sparsam_train::Error::from)? {
        let tensor = opened.source.require(&spec.source_name).map_err(sparsam_train::Error::from)?;
        let turned = spec
            .transform
            .apply(tensor.bytes, tensor.info.dtype, &tensor.info.shape)
            .map_err(sparsam_train::Error::from)?;
        let mut values = vec![0.0_f32; spec.shape.iter().product()];
        codec::decode(turned.dtype, &turned.bytes, &mut values)
            .map_err(|e| Error::setting(spec.name.clone(), e.to_string()))?;
        session.set_state(&spec.name, bytemuck::cast_slice(&values))?;
    }
    let parameters = model.parameters().map_err(sparsam_train::Error::from)?;
    Ok((Taught { model, parameters, session }, update))
}

impl Taught {
    /// Writes the student as a folder in Hugging Face's layout, in `dtype`.
    ///
    /// # Errors
    /// If there is something at `folder` already, or the disk is full.
    pub fn save(&self, opened: &Opened, folder: &Path, dtype: DType) -> Result<(), Error> {
        let plan = Plan::uniform(&self.model, FileKind::Safetensors, dtype)?;
        let mut saver =
            Saver::create(folder, FileKind::Safetensors, &self.model, opened.tokenizer.as_ref(), &plan)?;
        for p in &self.parameters {
            saver.append(&p.name, &p.shape, DType::F32, self.session.state_bytes(&p.name)?)?;
        }
        Ok(saver.finish()?)
    }
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
        let rows = rows(&[&a, &b], 7, 0.25);
        let p = &rows.packed;
        assert_eq!(p.tokens, [5, 6, 7, 5, 9, 0, 0]);
        assert_eq!(p.positions, [0, 1, 2, 0, 1, 0, 0]);
        assert_eq!(p.row_start[..5], [0, 0, 0, 3, 3]);
        assert_eq!(p.targets, [NO_TARGET, 7, 8, 9, 3, NO_TARGET, NO_TARGET]);
        // The mean of each task: two tokens of the label share 0.75, two of the reasons 0.25.
        assert_eq!(rows.weights, [0.0, 0.375, 0.375, 0.125, 0.125, 0.0, 0.0]);
        let alone = super::rows(&[&a], 3, 0.25);
        assert_eq!(alone.weights, [0.0, 0.5, 0.5]);
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
