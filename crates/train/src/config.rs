//! The settings of a run: a TOML file, overridden by flags, completed by what can be derived.
//!
//! What a run was really made with, derived values included, is written to `config.toml` in its folder; given back
//! as a file, it makes the same run. Unknown keys are errors that name the nearest known one.

use crate::Error;
use crate::lora::FinetuneConfig;
use crate::optim::Optimiser;
use crate::schedule::{Form, Schedule};
use serde::{Deserialize, Serialize};
use sparsam_ir::{AdamW, DType, Muon, Precision};
use std::path::{Path, PathBuf};

/// All settings of a run. `None` is derived, and filled in by [`Config::complete`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What is trained.
    pub model: ModelConfig,
    /// On what text.
    pub data: DataConfig,
    /// How weights are changed.
    pub optimiser: OptimiserConfig,
    /// How long, how large, with what checks.
    pub run: RunConfig,
    /// How a model that there is (`model.from`) is adapted, if this is not training on plain text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finetune: Option<FinetuneConfig>,
    /// What made this file; read and ignored.
    pub receipt: Option<Receipt>,
}

/// Kinds of new models.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// RMS norm, rotary positions, SwiGLU.
    #[default]
    Llama,
    /// Layer norm, learned positions, GELU.
    Gpt2,
}

/// `[model]`: a new one, or one to continue with.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// A model whose weights (and tokenizer) to continue with.
    pub from: Option<String>,
    /// The architecture of a new model.
    pub arch: Option<Arch>,
    /// Its number of parameters: `124M`.
    pub size: Option<String>,
    /// Its dimensions, each derived from the size where it is left out.
    pub layers: Option<usize>,
    /// Width of the residual stream.
    pub hidden: Option<usize>,
    /// Query heads.
    pub heads: Option<usize>,
    /// Key and value heads.
    pub kv_heads: Option<usize>,
    /// Width inside the MLP.
    pub intermediate: Option<usize>,
    /// The head shares the embedding table.
    pub tied_head: Option<bool>,
    /// Base of the rotary wavelengths.
    pub rope_base: Option<f64>,
}

/// `[data]`: the text and how it becomes tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Text files, `.jsonl` files, or token files (`.bin`, `.u32`).
    pub train: Vec<PathBuf>,
    /// Files that are only evaluated on. Without them, a part of the training text is held back.
    pub held_back: Vec<PathBuf>,
    /// The part that is held back where no files are: 0.05.
    pub held_back_part: Option<f64>,
    /// Key of the text in JSONL files.
    pub field: Option<String>,
    /// `bytes`, `bpe:SIZE` (learnt from the text), or a file or folder with a tokenizer. With `model.from` it is that
    /// model's.
    pub tokenizer: Option<String>,
    /// A file with the chat template that a new model shall have.
    pub chat_template: Option<PathBuf>,
    /// Tokens in a row.
    pub ctx: Option<usize>,
}

/// Optimisers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimiserKind {
    /// Adam with decoupled decay.
    #[default]
    Adamw,
    /// The same with moments in blocks of 8 bits, where they are large and no embedding's.
    #[serde(alias = "adamw_8bit", alias = "adamw-8bit")]
    Adamw8bit,
    /// Muon for the matrices between layers, AdamW for the rest; both at the same rate.
    Muon,
}

/// `[optimiser]`: which one, and its learning rate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimiserConfig {
    /// Which one.
    pub kind: Option<OptimiserKind>,
    /// Moments lie in a file in the run's folder, from which the system reads what it has no memory for.
    pub paged: Option<bool>,
    /// The highest learning rate.
    pub lr: Option<f64>,
    /// The lowest, at the end.
    pub min_lr: Option<f64>,
    /// Its curve.
    pub schedule: Option<Form>,
    /// Steps of the warm-up.
    pub warmup: Option<u64>,
    /// Steps of the final decay (WSD).
    pub decay: Option<u64>,
    /// Decay of the mean of gradients.
    pub beta1: Option<f64>,
    /// Decay of the mean of their squares.
    pub beta2: Option<f64>,
    /// Added to the root.
    pub eps: Option<f64>,
    /// Decay of the mean of gradients under Muon.
    pub momentum: Option<f64>,
    /// Decoupled decay of matrices.
    pub weight_decay: Option<f64>,
    /// Largest norm of all gradients together; 0: no limit.
    pub clip: Option<f64>,
}

/// `[run]`: sizes, intervals, the machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Optimiser steps.
    pub steps: Option<u64>,
    /// Instead of steps: tokens to see, such as `100M`.
    pub tokens: Option<String>,
    /// Rows in a micro-batch.
    pub batch: Option<usize>,
    /// Micro-batches in a step.
    pub accumulate: Option<usize>,
    /// Processes that train together, each on micro-batches of its own; the command's launcher decides it.
    pub processes: Option<usize>,
    /// Of everything random.
    pub seed: Option<u64>,
    /// Steps between evaluations on the held-back part.
    pub eval_every: Option<u64>,
    /// Tokens of an evaluation, at most.
    pub eval_tokens: Option<usize>,
    /// Steps between samples; 0: none.
    pub sample_every: Option<u64>,
    /// What samples begin with.
    pub sample_prompt: Option<String>,
    /// Tokens of a sample.
    pub sample_tokens: Option<usize>,
    /// Steps between checkpoints.
    pub checkpoint_every: Option<u64>,
    /// Checkpoints kept beside the newest.
    pub keep: Option<usize>,
    /// Type of the weights in the model that is saved at the end: `f32`, `f16`, `bf16`.
    pub save_as: Option<SaveAs>,
    /// The run stops where the smoothed loss is this much above the lowest it has been; 0: it does not.
    pub max_rise: Option<f64>,
    /// The first steps that are run a second time without the compiler, and compared.
    pub verify: Option<u64>,
    /// Run node by node, without the compiler.
    pub eager: Option<bool>,
    /// What products are computed in: `f32` or `bf16`. Weights, moments and all else are f32 either way.
    pub dtype: Option<Compute>,
    /// What weights, moments, gradients and activations may take together, such as `1.9GB`: forward values are computed
    /// again until it fits.
    pub memory: Option<String>,
    /// Threads; 0: all cores.
    pub threads: Option<usize>,
    /// What the machine costs an hour, in dollars.
    pub usd_per_hour: Option<f64>,
}

/// What products are computed in. Sums are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// 32-bit floats.
    #[default]
    F32,
    /// Operands rounded to 8 bits as they are read: twice as fast where the machine has the instructions.
    Bf16,
}

impl Compute {
    /// For the compiler; `None`: as the model is written.
    pub fn precision(self) -> Option<Precision> {
        match self {
            Compute::F32 => None,
            Compute::Bf16 => Some(Precision::Bf16),
        }
    }
}

/// Types that a trained model can be saved in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SaveAs {
    /// As they were trained.
    #[default]
    F32,
    /// Half as large, rounded to 11 bits.
    F16,
    /// Half as large, rounded to 8 bits.
    Bf16,
}

impl SaveAs {
    /// The element type.
    pub fn dtype(self) -> DType {
        match self {
            SaveAs::F32 => DType::F32,
            SaveAs::F16 => DType::F16,
            SaveAs::Bf16 => DType::BF16,
        }
    }
}

/// What made a run's `config.toml`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Receipt {
    /// Version of sparsam.
    pub version: String,
    /// Parameters of the model.
    pub parameters: u64,
    /// Tokens of the training part.
    pub train_tokens: u64,
    /// Tokens of the held-back part.
    pub held_back_tokens: u64,
    /// Size of the vocabulary.
    pub vocab_size: u64,
    /// SHA-256 of the tokens, where they were made by this run.
    pub tokens_sha256: Option<String>,
}

/// What a run derives its settings from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Facts {
    /// Parameters of the model.
    pub parameters: u64,
    /// Tokens of the training part.
    pub train_tokens: u64,
    /// The context that the model was made for, if it is not new.
    pub continues: bool,
}

/// The settings that the loop works with.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // as in the configuration
pub struct Settings {
    pub ctx: usize,
    pub steps: u64,
    pub batch: usize,
    pub accumulate: usize,
    pub processes: usize,
    pub seed: u64,
    pub optimiser: Optimiser,
    pub schedule: Schedule,
    pub eval_every: u64,
    pub eval_tokens: usize,
    pub sample_every: u64,
    pub sample_prompt: String,
    pub sample_tokens: usize,
    pub checkpoint_every: u64,
    pub keep: usize,
    pub save_as: SaveAs,
    pub max_rise: f64,
    pub verify: u64,
    pub eager: bool,
    pub compute: Compute,
    /// Bytes; `None`: as many as full speed takes.
    pub memory: Option<usize>,
    pub threads: usize,
    pub usd_per_hour: Option<f64>,
    /// Evaluations without a lower loss after which the run ends; 0: it does not.
    pub patience: u64,
}

impl Settings {
    /// Tokens of one optimiser step.
    pub fn tokens_per_step(&self) -> u64 {
        (self.ctx * self.batch * self.accumulate * self.processes) as u64
    }
}

/// Rows of this many tokens, where nothing else is asked for.
pub const DEFAULT_CTX: usize = 256;
/// Tokens of a micro-batch, where nothing else is asked for: enough for products to run near the machine's peak, little
/// enough for many steps.
const BATCH_TOKENS: usize = 4096;
/// Tokens for each parameter at which a fixed budget is best spent (Hoffmann et al. 2022).
const TOKENS_PER_PARAMETER: f64 = 20.0;
/// Epochs behind which more of the same text teaches next to nothing (Muennighoff et al. 2023: half of the worth is gone
/// after about 15 repetitions).
const MAX_EPOCHS: f64 = 16.0;

impl Config {
    /// Settings from TOML; `place` names it in errors.
    ///
    /// # Errors
    /// [`Error::Config`] with line and, for unknown keys, the nearest known one.
    pub fn from_toml(text: &str, place: &str) -> Result<Config, Error> {
        toml::from_str(text).map_err(|e: toml::de::Error| {
            let message = e.message();
            let mut names = message.split('`').skip(1).step_by(2);
            let nearest = match (message.starts_with("unknown"), names.next()) {
                (true, Some(unknown)) => sparsam_plan::nearest(unknown, names),
                _ => None,
            };
            let line = e.span().map(|s| text[..s.start.min(text.len())].matches('\n').count() + 1);
            let place = line.map_or(place.to_string(), |l| format!("{place}:{l}"));
            let hint = nearest.map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
            Error::config(place, format!("{message}{hint}"))
        })
    }

    /// Settings from a file. Paths in it are relative to the current folder, as on the command line.
    ///
    /// # Errors
    /// As [`Config::from_toml`], or if it cannot be read.
    pub fn open(path: &Path) -> Result<Config, Error> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        Config::from_toml(&text, &path.display().to_string())
    }

    /// As TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("settings are numbers, texts and lists of texts")
    }

    /// Fills in what is left open, and checks the rest.
    ///
    /// # Errors
    /// [`Error::Config`] for a value that makes no sense.
    pub fn complete(&mut self, facts: &Facts) -> Result<Settings, Error> {
        let ctx = *self.data.ctx.get_or_insert(DEFAULT_CTX);
        let r = &mut self.run;
        let batch = *r.batch.get_or_insert((BATCH_TOKENS / ctx.max(1)).max(1));
        let accumulate = *r.accumulate.get_or_insert(1);
        let positive = |name: &str, value: usize| match value {
            0 => Err(Error::config(name, "must be at least 1")),
            _ => Ok(()),
        };
        positive("data.ctx", ctx)?;
        positive("run.batch", batch)?;
        positive("run.accumulate", accumulate)?;
        if (batch as u128 * ctx as u128) > i32::MAX as u128 {
            return Err(Error::config(
                "run.batch",
                format!("{batch} rows of {ctx} are more than 2^31 tokens"),
            ));
        }
        let processes = *r.processes.get_or_insert(1);
        positive("run.processes", processes)?;
        let per_step = (ctx * batch * accumulate * processes) as f64;
        let steps = match (r.steps, &r.tokens) {
            (Some(steps), _) => steps,
            (None, Some(tokens)) => (sparsam_plan::units::count("tokens", tokens)? / per_step).ceil() as u64,
            (None, None) => {
                let most = MAX_EPOCHS * facts.train_tokens as f64;
                let tokens = (TOKENS_PER_PARAMETER * facts.parameters as f64).min(most);
                (tokens / per_step).ceil() as u64
            }
        }
        .max(1);
        r.steps = Some(steps);
        let o = &mut self.optimiser;
        let lr = *o.lr.get_or_insert_with(|| derived_lr(facts));
        let number = |name: &str, value: f64, low: f64, high: f64| match (low..=high).contains(&value) {
            true => Ok(value),
            false => Err(Error::config(name, format!("is {value}, must be between {low} and {high}"))),
        };
        number("optimiser.lr", lr, 0.0, 10.0)?;
        let form = *o.schedule.get_or_insert_default();
        let schedule = Schedule {
            form,
            lr,
            min_lr: number("optimiser.min_lr", *o.min_lr.get_or_insert(0.1 * lr), 0.0, lr)?,
            // A hundredth of the run and at least a few steps: Adam's second moment needs about 1 / (1 - beta2).
            warmup: *o.warmup.get_or_insert((steps / 100).clamp(10, 2000).min(steps / 2)),
            // Hu et al. 2024: a tenth of the run suffices for the decay.
            decay: if form == Form::Wsd { *o.decay.get_or_insert(steps / 10) } else { 0 },
            steps,
        };
        if schedule.warmup + schedule.decay > steps {
            return Err(Error::config(
                "optimiser",
                format!(
                    "warmup = {} and decay = {} take longer than the run's {steps} steps",
                    schedule.warmup, schedule.decay
                ),
            ));
        }
        let d = Optimiser::default().adamw;
        let clip = number("optimiser.clip", *o.clip.get_or_insert(1.0), 0.0, f64::MAX)?;
        let adamw = AdamW {
            beta1: number("optimiser.beta1", *o.beta1.get_or_insert(d.beta1), 0.0, 0.999_999)?,
            beta2: number("optimiser.beta2", *o.beta2.get_or_insert(d.beta2), 0.0, 0.999_999)?,
            eps: number("optimiser.eps", *o.eps.get_or_insert(d.eps), 1e-30, 1.0)?,
            weight_decay: number(
                "optimiser.weight_decay",
                *o.weight_decay.get_or_insert(d.weight_decay),
                0.0,
                10.0,
            )?,
        };
        let muon = match o.kind.get_or_insert_default() {
            OptimiserKind::Adamw | OptimiserKind::Adamw8bit if o.momentum.is_some() => {
                return Err(Error::config(
                    "optimiser.momentum",
                    "belongs to kind = \"muon\"; AdamW has betas",
                ));
            }
            OptimiserKind::Adamw | OptimiserKind::Adamw8bit => None,
            OptimiserKind::Muon => {
                let d = Muon::default();
                let momentum = *o.momentum.get_or_insert(d.momentum);
                let momentum = number("optimiser.momentum", momentum, 0.0, 0.999_999)?;
                Some(Muon { momentum, weight_decay: adamw.weight_decay, ..d })
            }
        };
        let ratio_b = match &mut self.finetune {
            Some(f) => number("finetune.ratio_b", *f.ratio_b.get_or_insert(1.0), 1e-3, 1e3)?,
            None => 1.0,
        };
        let eight_bits = o.kind == Some(OptimiserKind::Adamw8bit);
        let clip = (clip > 0.0).then_some(clip);
        let paged = *o.paged.get_or_insert(false);
        let optimiser = Optimiser { adamw, eight_bits, paged, muon, clip, ratio_b };
        number("data.held_back_part", *self.data.held_back_part.get_or_insert(0.05), 0.0, 0.9)?;
        let usd_per_hour = r.usd_per_hour.map(|p| number("run.usd_per_hour", p, 0.0, 1e9)).transpose()?;
        let eager = *r.eager.get_or_insert(false);
        let memory = match &r.memory {
            Some(_) if eager => {
                let problem = "node by node nothing is computed again; leave out run.memory or run.eager";
                return Err(Error::config("run.memory", problem));
            }
            Some(m) => Some(sparsam_plan::units::bytes("run.memory", m)? as usize),
            None => None,
        };
        let eval_every = *r.eval_every.get_or_insert((steps / 20).max(1));
        Ok(Settings {
            ctx,
            steps,
            batch,
            accumulate,
            processes,
            seed: *r.seed.get_or_insert(0),
            optimiser,
            schedule,
            eval_every,
            eval_tokens: *r.eval_tokens.get_or_insert(65_536),
            sample_every: *r.sample_every.get_or_insert((steps / 5).max(1)),
            sample_prompt: r.sample_prompt.get_or_insert_default().clone(),
            sample_tokens: *r.sample_tokens.get_or_insert(64),
            checkpoint_every: (*r.checkpoint_every.get_or_insert(eval_every)).max(1),
            keep: *r.keep.get_or_insert(1),
            save_as: *r.save_as.get_or_insert_default(),
            max_rise: number("run.max_rise", *r.max_rise.get_or_insert(2.0), 0.0, f64::MAX)?,
            verify: *r.verify.get_or_insert(0),
            eager,
            compute: *r.dtype.get_or_insert_default(),
            memory,
            threads: *r.threads.get_or_insert(0),
            usd_per_hour,
            patience: match &mut self.finetune {
                Some(f) => *f.patience.get_or_insert(0),
                None => 0,
            },
        })
    }
}

/// Kaplan et al. 2020, equation D.1: `0.003239 - 0.0001395 ln(parameters)`, for models from scratch; a tenth of it to
/// continue with trained ones.
fn derived_lr(facts: &Facts) -> f64 {
    let scratch = (0.003239 - 0.0001395 * (facts.parameters.max(1) as f64).ln()).clamp(1e-4, 3e-3);
    let lr = if facts.continues { scratch / 10.0 } else { scratch };
    // Two digits read better than sixteen.
    format!("{lr:.1e}").parse().unwrap_or(lr)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: Facts = Facts { parameters: 1_500_000, train_tokens: 400_000, continues: false };

    #[test]
    fn a_completed_file_makes_the_same_run() {
        let mut c = Config::from_toml("[model]\nsize = \"1.5M\"\n[run]\nbatch = 8", "t").unwrap();
        let settings = c.complete(&FACTS).unwrap();
        // 16 epochs of 400,000 tokens are fewer than 20 tokens for each of 1.5 million parameters.
        assert_eq!((settings.steps, settings.tokens_per_step()), (3125, 2048));
        assert_eq!(settings.schedule.lr, 1.3e-3);
        let mut again = Config::from_toml(&c.to_toml(), "again").unwrap();
        assert_eq!(again, c);
        assert_eq!(
            again.complete(&Facts { parameters: 9, train_tokens: 9, continues: true }).unwrap(),
            settings
        );
    }

    #[test]
    fn unknown_keys_and_wrong_values_are_named() {
        let said = |text: &str| match Config::from_toml(text, "run.toml") {
            Ok(mut c) => c.complete(&FACTS).unwrap_err().to_string(),
            Err(e) => e.to_string(),
        };
        let e = said("[run]\nsteps = 3\nbatchs = 4");
        assert!(
            e.starts_with("run.toml:3: unknown field `batchs`") && e.contains("did you mean `batch`?"),
            "{e}"
        );
        assert!(said("[modell]\nsize = 1").contains("did you mean `model`?"));
        assert!(said("[run]\nsteps = \"many\"").contains("run.toml:2"));
        assert!(said("[optimiser]\nschedule = \"cosin\"").contains("did you mean `cosine`?"));
        assert!(said("[optimiser]\nkind = \"adam8bit\"").contains("did you mean `adamw8bit`?"));
        assert!(said("[optimiser]\nkind = \"adamw8bit\"\nmomentum = 0.9").contains("AdamW has betas"));
        assert!(said("[optimiser]\nbeta2 = 1.5").contains("optimiser.beta2: is 1.5"));
        assert!(
            said("[run]\nsteps = 10\n[optimiser]\nwarmup = 20")
                .contains("take longer than the run's 10 steps")
        );
        assert!(said("[data]\nctx = 0").contains("data.ctx: must be at least 1"));
    }

    #[test]
    fn tokens_become_steps() {
        let mut c =
            Config::from_toml("[run]\ntokens = \"1M\"\nbatch = 4\naccumulate = 2\n[data]\nctx = 128", "t")
                .unwrap();
        assert_eq!(c.complete(&FACTS).unwrap().steps, 977);
    }
}
