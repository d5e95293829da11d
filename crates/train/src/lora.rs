//! Fine-tuning: low-rank adapters over weights that stay as they are, rounded or not (LoRA, Hu et al. 2021; QLoRA,
//! Dettmers et al. 2023), or all weights.

use crate::Error;
use crate::config::{Config, Facts, Receipt};
use crate::data::Batches;
use crate::dialogue::{Examples, LossOn, PackedExamples, Reading, existing};
use crate::learner::{Base, Learner};
use crate::random::Random;
use crate::run::Prepared;
use crate::step::Targets;
use crate::task::Exam;
use serde::{Deserialize, Serialize};
use sparsam_dtype::DType;
use sparsam_engine::{Opened, PROBES_FILE, PeftConfig, Probes, TrainedAdapter, open};
use sparsam_formats::Kind;
use sparsam_models::adapter::{Adapter, LowRank};
use sparsam_models::{LinearLayer, Model, WeightSpec};
use sparsam_runtime::Weights;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Low-rank adapters over the weights as the file holds them.
    #[default]
    Lora,
    /// The same over linear layers rounded to 4 bits: to NF4 with double quantisation, if `base_type` does not say
    /// otherwise.
    Qlora,
    /// All weights.
    Full,
}

/// `[finetune]`: a model that there is, and how it is adapted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FinetuneConfig {
    /// What is trained: `lora`, `qlora`, `full`.
    pub method: Option<Method>,
    /// Rank of the adapters.
    pub rank: Option<usize>,
    /// Their factor times the rank (or its root).
    pub alpha: Option<f64>,
    /// Probability that an input of an adapter is dropped.
    pub dropout: Option<f64>,
    /// The factor is alpha over the root of the rank (Kalajdzievski 2023).
    pub rslora: Option<bool>,
    /// The learning rate of B over that of A (LoRA+, Hayou et al. 2024): 1.
    pub ratio_b: Option<f64>,
    /// Layers, by the ends of their names: `q_proj`, `layers.3.mlp.up_proj`; empty: all.
    pub targets: Vec<String>,
    /// An adapter to begin with, in PEFT's layout.
    pub from_adapter: Option<PathBuf>,
    /// The type in which the linear layers (or, for plain numbers, all matrices) are held; as in the file if left out.
    pub base_type: Option<String>,
    /// Where the loss is taken: `answers`, `all`.
    pub loss_on: Option<LossOn>,
    /// The keys of prompt and answer in each line, where they have names of their own.
    pub fields: Vec<String>,
    /// Times that each example is seen, where steps are not given.
    pub epochs: Option<f64>,
    /// The run ends after so many evaluations that were not better than the best; 0: it does not.
    pub patience: Option<u64>,
    /// Questions that the model answers during the run, as JSON lines; the best by them is kept.
    pub task: Option<PathBuf>,
    /// The keys of question and answer in them: `question`, `answer`.
    pub task_fields: Vec<String>,
    /// The answer is the first group (or all) of the last match in what is written.
    pub answer_regex: Option<String>,
    /// What is written is a sum, whose value is the answer.
    pub equation: Option<bool>,
    /// Questions at most: 100.
    pub task_questions: Option<usize>,
    /// Tokens of an answer at most: 256.
    pub task_tokens: Option<usize>,
    /// Steps between two times; 0: only before the first step and behind the last.
    pub task_every: Option<u64>,
}

/// Rank where nothing else is asked for.
const RANK: usize = 16;
/// Rows of at most this many tokens, where nothing else is asked for and examples are shorter.
const MAX_CTX: usize = 2048;
/// Tokens of a step, where nothing else is asked for: a dozen examples of a usual length.
const STEP_TOKENS: usize = 2048;
/// The part of the examples that is held back, and at most so many.
const HELD_BACK: (f64, f64) = (0.05, 200.0);

/// The best rates found by Schulman et al. 2025 ("LoRA Without Regret") over models of many sizes, for alpha = 32: the
/// width decides, the rank does not. Full fine-tuning wants a tenth.
fn derived_lr(hidden_size: usize, method: Method) -> f64 {
    let lora = 5e-4 * (2000.0 / hidden_size as f64).powf(0.781);
    let lr = if method == Method::Full { lora / 10.0 } else { lora };
    format!("{lr:.1e}").parse().unwrap_or(lr)
}

/// What fine-tuning adds to a run.
pub struct Finetuned {
    /// What is trained.
    pub method: Method,
    /// The adapter's settings; `None` where all weights are trained.
    pub peft: Option<PeftConfig>,
    /// The model's file or folder.
    pub opened: Opened,
    /// The example that is shown, and notes on the data, for people.
    pub notes: Vec<String>,
    /// The examples, for a closer look.
    pub examples: Examples,
    /// What is asked during the run.
    pub exam: Option<Exam>,
    /// In which type all weights are written, where all are trained.
    save_as: DType,
}

impl Finetuned {
    /// Writes what was learnt so far into `folder`: an adapter in PEFT's layout with the tokenizer beside it, or a model.
    ///
    /// # Errors
    /// If the disk is full or fails.
    pub fn write(&self, learner: &Learner, folder: &Path) -> Result<(), Error> {
        let Some(peft) = &self.peft else { return self.write_model(learner, folder) };
        let mut weights = Vec::new();
        for p in learner.parameters() {
            weights.push((p.name.clone(), p.shape.clone(), learner.state(&p.name)?.to_vec()));
        }
        let adapter = learner.model().adapters().first().cloned().unwrap_or_else(|| Adapter::new([]));
        let peft = PeftConfig {
            base_model_name_or_path: Some(self.opened.source.path().display().to_string()),
            ..peft.clone()
        };
        TrainedAdapter { config: peft, adapter, weights }.save(folder)?;
        if let Some(tokenizer) = &self.opened.tokenizer {
            let files = tokenizer.to_json()?;
            for (name, bytes) in
                [("tokenizer.json", files.tokenizer), ("tokenizer_config.json", files.config)]
            {
                crate::run::write_file(&folder.join(name), &bytes)?;
            }
            let probes = Probes::of(tokenizer)?.to_json();
            crate::run::write_file(&folder.join(PROBES_FILE), probes.as_bytes())?;
        }
        Ok(())
    }

    fn write_model(&self, learner: &Learner, folder: &Path) -> Result<(), Error> {
        let fresh = folder.with_extension("new");
        if fresh.exists() {
            std::fs::remove_dir_all(&fresh).map_err(Error::io("delete", &fresh))?;
        }
        learner.export(&fresh, Kind::Safetensors, self.save_as, self.opened.tokenizer.as_ref(), None)?;
        if folder.exists() {
            std::fs::remove_dir_all(folder).map_err(Error::io("delete", folder))?;
        }
        std::fs::rename(&fresh, folder).map_err(Error::io("rename", &fresh))
    }

    /// The weights that training starts from: A random, B 0 (Hu et al. 2021, section 4.1), or an adapter's; or the
    /// model's own.
    ///
    /// # Errors
    /// If a file cannot be read or belongs to another model.
    pub fn initialise(&self, learner: &mut Learner, config: &FinetuneConfig, seed: u64) -> Result<(), Error> {
        if self.method == Method::Full {
            return learner.take_from(&self.opened.source);
        }
        let given = config.from_adapter.as_deref().map(TrainedAdapter::open).transpose()?;
        for p in learner.parameters().to_vec() {
            let values = match &given {
                Some(given) => {
                    match given.weights.iter().find(|(name, shape, _)| *name == p.name && *shape == p.shape) {
                        Some((.., values)) => values.clone(),
                        None => {
                            let problem = format!(
                                "the adapter has no {} {:?}; its rank or its layers are others",
                                p.name, p.shape
                            );
                            return Err(Error::config("finetune.from_adapter", problem));
                        }
                    }
                }
                None => initial(&p.name, &p.shape, seed),
            };
            learner.set_state(&p.name, &values)?;
        }
        Ok(())
    }
}

/// A uniform as PyTorch's linear layers (He et al. 2015 with a = sqrt 5: within 1 / sqrt n_in), as PEFT has it; B 0.
fn initial(name: &str, shape: &[usize], seed: u64) -> Vec<f32> {
    let n = shape.iter().product();
    if name.ends_with(".lora_B.weight") {
        return vec![0.0; n];
    }
    let bound = 1.0 / (shape[1] as f64).sqrt();
    let mut random = Random::new(seed, name, 0);
    (0..n).map(|_| ((2.0 * random.uniform() - 1.0) * bound) as f32).collect()
}

/// The layers that `targets` name by the ends of their names; all for none.
///
/// # Errors
/// [`Error::Config`] for a name that no layer has, with those that there are.
pub fn select(layers: &[LinearLayer], targets: &[String]) -> Result<Vec<String>, Error> {
    let ends = |module: &str, t: &str| module == t || module.ends_with(&format!(".{t}"));
    for t in targets {
        if !layers.iter().any(|l| ends(&l.module, t)) {
            let known: BTreeSet<&str> = layers.iter().filter_map(|l| l.module.rsplit('.').next()).collect();
            let known: Vec<&str> = known.into_iter().collect();
            return Err(Error::config(
                "finetune.targets",
                format!("no linear layer's name ends with {t}; there are {}", known.join(", ")),
            ));
        }
    }
    let all = layers.iter().map(|l| l.module.clone());
    Ok(all.filter(|m| targets.is_empty() || targets.iter().any(|t| ends(m, t))).collect())
}

/// What a run learns from, where the caller makes the rows himself.
pub struct Material {
    /// The rows, of `data.ctx` tokens.
    pub train: Box<dyn Batches>,
    /// Rows to evaluate on.
    pub held_back: Option<Box<dyn Batches>>,
    /// Which of their tokens have a loss, and what it counts.
    pub targets: Targets,
    /// All tokens; those that are learnt; those that are held back.
    pub tokens: [usize; 3],
    /// Of all that is learnt: a run is only taken up on the same.
    pub sha256: String,
    /// What was found in the data, for people.
    pub notes: Vec<String>,
    /// The examples that rows are made of, for a closer look, if there are any.
    pub examples: Examples,
}

/// Reads model and examples, and completes `config`. Nothing is written.
pub(crate) fn prepare(config: &mut Config) -> Result<Prepared, Error> {
    let name = config.model.from.clone().unwrap_or_default();
    let path = std::path::absolute(&name).map_err(Error::io("find", &name))?;
    let opened = open(&path)?;
    config.model.from = Some(path.display().to_string());
    let material = read(config, &opened)?;
    complete(config, opened, material)
}

/// The examples in the files that `config` names.
fn read(config: &mut Config, opened: &Opened) -> Result<Material, Error> {
    let tokenizer = opened.tokenizer()?.clone();
    let facts = opened.model.facts();
    let seed = *config.run.seed.get_or_insert(0);
    existing(&mut config.data.train)?;
    existing(&mut config.data.held_back)?;
    if config.data.train.is_empty() {
        return Err(Error::config("data.train", "names no file; give JSON lines"));
    }
    let Some(f) = &mut config.finetune else {
        return Err(Error::config("finetune", "is missing"));
    };
    let fields = match &f.fields[..] {
        [] => None,
        [prompt, answer] => Some((prompt.clone(), answer.clone())),
        _ => return Err(Error::config("finetune.fields", "wants two names: the keys of prompt and answer")),
    };
    let most = facts.context_length.min(MAX_CTX);
    let ctx = match config.data.ctx {
        Some(ctx) if ctx > facts.context_length || ctx == 0 => {
            let problem = format!("is {ctx}, but the model was made for {} tokens", facts.context_length);
            return Err(Error::config("data.ctx", problem));
        }
        given => given.unwrap_or(most),
    };
    let reading = Reading {
        tokenizer: tokenizer.clone(),
        fields,
        loss_on: *f.loss_on.get_or_insert_default(),
        max_tokens: ctx + 1,
    };
    let all = Examples::read(&config.data.train, &reading)?;
    let (train, held_back, same) = if config.data.held_back.is_empty() {
        let n = all.all.len() as f64;
        let part = *config.data.held_back_part.get_or_insert(HELD_BACK.0.min(HELD_BACK.1 / n));
        let (train, held_back, same) = all.split(part.clamp(0.0, 0.9), seed);
        (train, held_back, same)
    } else {
        (all, Examples::read(&config.data.held_back, &reading)?, 0)
    };
    train.check(Some(&held_back), &tokenizer)?;
    // The shortest rows that hold the longest example, in steps that leave few shapes.
    let longest = train.all.iter().chain(&held_back.all).map(|e| e.tokens.len()).max().unwrap_or(2) - 1;
    let ctx = match config.data.ctx {
        Some(ctx) => ctx,
        None => longest.next_multiple_of(64).max(512).min(most),
    };
    config.data.ctx = Some(ctx);
    let (tokens, learnt) = train.counts();
    let sha256 = train.sha256();
    let mut notes = notes(&train, &held_back, same);
    let examples = train.clone();
    let rows = PackedExamples::new(train.all, ctx, seed);
    let batch = *config.run.batch.get_or_insert((STEP_TOKENS / ctx).max(1));
    let accumulate = *config.run.accumulate.get_or_insert(1);
    let epochs = *f.epochs.get_or_insert(2.0);
    if config.run.steps.is_none() && config.run.tokens.is_none() {
        let per_step = (batch * accumulate).max(1) as f64;
        config.run.steps = Some((epochs * rows.per_epoch() as f64 / per_step).ceil().max(1.0) as u64);
    }
    notes.push(format!("{} rows of {ctx} tokens, {:.0}% full", rows.per_epoch(), 100.0 * rows.filled()));
    let n_held_back = held_back.counts().0;
    let held_back = (!held_back.all.is_empty()).then(|| PackedExamples::new(held_back.all, ctx, seed));
    let targets =
        Targets { rows: logit_rows([Some(&rows), held_back.as_ref()], batch, ctx), ..Targets::default() };
    Ok(Material {
        train: Box::new(rows),
        held_back: held_back.map(|rows| Box::new(rows) as Box<dyn Batches>),
        targets,
        tokens: [tokens, learnt, n_held_back],
        sha256,
        notes,
        examples,
    })
}

/// What a run works with; completes `config`.
pub(crate) fn complete(config: &mut Config, opened: Opened, material: Material) -> Result<Prepared, Error> {
    let tokenizer = opened.tokenizer()?.clone();
    let facts = opened.model.facts();
    let seed = *config.run.seed.get_or_insert(0);
    let Some(f) = &mut config.finetune else {
        return Err(Error::config("finetune", "is missing"));
    };
    let method = *f.method.get_or_insert_default();
    let exam = Exam::new(f)?;
    let (model, peft, base) = adapt(&opened, f, seed)?;
    let o = &mut config.optimiser;
    o.lr.get_or_insert_with(|| derived_lr(facts.hidden_size, method));
    o.beta2.get_or_insert(0.999);
    o.weight_decay.get_or_insert(0.0);
    config.run.sample_every.get_or_insert(0);
    let [tokens, learnt, held_back_tokens] = material.tokens;
    let receipt = Receipt {
        version: env!("CARGO_PKG_VERSION").to_string(),
        parameters: trained(&model, base.trained)?,
        train_tokens: tokens as u64,
        held_back_tokens: held_back_tokens as u64,
        vocab_size: facts.vocab_size as u64,
        tokens_sha256: Some(material.sha256),
    };
    let known = Facts { parameters: receipt.parameters, train_tokens: learnt as u64, continues: true };
    let settings = config.complete(&known)?;
    if settings.verify > 0 {
        return Err(Error::config("run.verify", "is for models trained from scratch; compare with --eager"));
    }
    config.receipt = Some(receipt.clone());
    let mut notes = material.notes;
    notes.push(format!("{} trained parameters", receipt.parameters));
    let save_as = settings.save_as.dtype();
    let finetuned = Finetuned { method, peft, opened, notes, examples: material.examples, exam, save_as };
    Ok(Prepared {
        model,
        tokenizer: Some(tokenizer),
        source: None,
        train: material.train,
        held_back: material.held_back,
        settings,
        receipt,
        base,
        targets: material.targets,
        finetuned: Some(finetuned),
    })
}

/// Rows of a batch that the head computes logits for, in whole tiles; `None`: nearly all have a target.
fn logit_rows(of: [Option<&PackedExamples>; 2], batch: usize, ctx: usize) -> Option<usize> {
    let most = of.into_iter().flatten().map(|rows| rows.most_targets(batch)).max().unwrap_or(0);
    let rows = most.next_multiple_of(64).max(64);
    (rows * 10 <= batch * ctx * 9).then_some(rows)
}

fn trained(model: &Model, trained: fn(&str) -> bool) -> Result<u64, Error> {
    let mut all = model.parameters()?;
    all.extend(model.adapter_parameters()?);
    let sizes = all.iter().filter(|p| trained(&p.name)).map(|p| p.shape.iter().product::<usize>() as u64);
    Ok(sizes.sum())
}

/// The model with what is trained, and what stays.
fn adapt(
    opened: &Opened,
    f: &mut FinetuneConfig,
    seed: u64,
) -> Result<(Model, Option<PeftConfig>, Base), Error> {
    let method = f.method.unwrap_or_default();
    if method == Method::Full {
        return Ok((opened.model.clone(), None, Base::nothing()));
    }
    let layers = opened.model.linear_layers()?;
    let given = f.from_adapter.as_deref().map(TrainedAdapter::open).transpose()?;
    if let Some(given) = &given {
        f.rank.get_or_insert(given.config.r);
        f.alpha.get_or_insert(given.config.lora_alpha);
        f.rslora.get_or_insert(given.config.use_rslora);
    }
    let rank = *f.rank.get_or_insert(RANK);
    let alpha = *f.alpha.get_or_insert(2.0 * rank as f64);
    let dropout = *f.dropout.get_or_insert(0.0);
    let rslora = *f.rslora.get_or_insert(false);
    let smallest = layers.iter().map(|l| l.n_in.min(l.n_out)).min().unwrap_or(0);
    if rank == 0 || rank > smallest {
        return Err(Error::config(
            "finetune.rank",
            format!("is {rank}, must be from 1 to {smallest}, the narrowest layer"),
        ));
    }
    if !(0.0..1.0).contains(&dropout) {
        return Err(Error::config(
            "finetune.dropout",
            format!("is {dropout}, must be at least 0 and below 1"),
        ));
    }
    let modules = select(&layers, &f.targets)?;
    let targets: Vec<String> = match f.targets.is_empty() {
        false => f.targets.clone(),
        true => {
            let ends: BTreeSet<&str> = modules.iter().filter_map(|m| m.rsplit('.').next()).collect();
            ends.into_iter().map(str::to_string).collect()
        }
    };
    let mut peft = PeftConfig::new(rank, alpha, dropout, rslora, &targets);
    peft.fan_in_fan_out = opened.model.facts().architecture == "gpt2";
    let scaled = |m: String| {
        let scale = peft.scale(&m, rank);
        (m, LowRank { rank, scale })
    };
    let adapter = Adapter::new(modules.into_iter().map(scaled)).with_dropout(dropout);
    let model = opened.model.clone().with_adapters(vec![adapter])?;
    if method == Method::Qlora {
        f.base_type.get_or_insert_with(|| "NF4".into());
    }
    let weights = base_weights(opened, &layers, f.base_type.as_deref())?;
    Ok((model, Some(peft), Base { weights, trained: |name| name.contains(".lora_"), seed }))
}

/// The weights that stay, the linear layers (or all matrices, if it is a plain type) in `base_type`.
fn base_weights(opened: &Opened, layers: &[LinearLayer], base_type: Option<&str>) -> Result<Weights, Error> {
    let Some(name) = base_type else { return Ok(opened.weights()?) };
    let Some(wanted) = DType::from_name(name).filter(|d| !d.is_state()) else {
        return Err(Error::config("finetune.base_type", format!("{name} is no type of weights")));
    };
    let linear: BTreeSet<String> = layers.iter().map(|l| format!("{}.weight", l.module)).collect();
    Ok(opened.weights_in(|spec: &WeightSpec, stored: DType| {
        let fits = spec.shape.last().is_some_and(|n| n.is_multiple_of(wanted.block_len()));
        let chosen =
            if wanted.is_block() { linear.contains(&spec.name) && fits } else { spec.shape.len() == 2 };
        if chosen { wanted } else { stored }
    })?)
}

/// What was found in the data, a sentence each.
fn notes(train: &Examples, held_back: &Examples, same: usize) -> Vec<String> {
    let (tokens, learnt) = train.counts();
    let mut notes = vec![format!(
        "{} examples of {tokens} tokens, {learnt} of them learnt ({:.0}%); {} examples held back",
        train.all.len(),
        100.0 * learnt as f64 / tokens.max(1) as f64,
        held_back.all.len()
    )];
    let (n_cut, cut) = (train.n_cut + held_back.n_cut, train.cut_tokens + held_back.cut_tokens);
    if n_cut > 0 {
        notes.push(format!("{n_cut} examples are longer than a row: {cut} tokens are cut off at their ends; a larger ctx keeps them"));
    }
    let dropped = train.n_dropped + held_back.n_dropped;
    if dropped > 0 {
        notes.push(format!(
            "{dropped} examples are left out: nothing of their answers fits, or they are empty"
        ));
    }
    if same > 0 {
        notes.push(format!("{same} examples are left out because the same ones are held back"));
    }
    notes
}

/// The arithmetic of a step for each token, in forward passes of the base: all gradients, or only those of activations.
pub(crate) fn passes(method: Option<Method>) -> f64 {
    match method {
        None | Some(Method::Full) => 3.0,
        Some(Method::Lora | Method::Qlora) => 2.0,
    }
}
