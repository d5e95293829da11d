//! Adapters in the layout of PEFT, Hugging Face's library: a folder with `adapter_config.json` and
//! `adapter_model.safetensors`.

use crate::Error;
use crate::probes::{PROBES_FILE, Probes};
use serde::{Deserialize, Serialize};
use sparsam_dtype::{DType, codec};
use sparsam_formats::safetensors::{File, Writer};
use sparsam_formats::{AtomicFile, TensorSpec};
use sparsam_models::Model;
use sparsam_models::adapter::{Adapter, LowRank, PEFT_PREFIX};
use sparsam_tokenizer::Tokenizer;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The settings of a folder.
const CONFIG: &str = "adapter_config.json";
/// Its weights.
const WEIGHTS: &str = "adapter_model.safetensors";

/// What `adapter_config.json` says, as far as it changes what is computed. Other keys are PEFT's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeftConfig {
    /// `LORA`.
    pub peft_type: String,
    /// `CAUSAL_LM`.
    #[serde(default)]
    pub task_type: Option<String>,
    /// The model that it was trained on.
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
    /// Rank.
    pub r: usize,
    /// The term's factor is `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Probability that an input of the term was dropped while it was trained.
    #[serde(default)]
    pub lora_dropout: f64,
    /// The layers: a list of the ends of their names, or a regular expression.
    #[serde(default)]
    pub target_modules: serde_json::Value,
    /// The factor is `lora_alpha / sqrt(r)` instead.
    #[serde(default)]
    pub use_rslora: bool,
    /// DoRA, which is not implemented.
    #[serde(default)]
    pub use_dora: bool,
    /// Biases that were trained: `none`.
    #[serde(default = "none")]
    pub bias: String,
    /// Whether the layers store their weights transposed, as GPT-2's do.
    #[serde(default)]
    pub fan_in_fan_out: bool,
    /// Other ranks for some layers.
    #[serde(default)]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other alphas for some layers.
    #[serde(default)]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Whole layers that were trained beside: none.
    #[serde(default)]
    pub modules_to_save: Option<Vec<String>>,
    /// Whether dropout is off.
    #[serde(default)]
    pub inference_mode: bool,
}

fn none() -> String {
    "none".into()
}

/// An adapter with its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainedAdapter {
    /// The settings.
    pub config: PeftConfig,
    /// Its layers; weights are named as [`Adapter::names`] says.
    pub adapter: Adapter,
    /// Name, shape and numbers of each weight.
    pub weights: Vec<Named>,
}

impl TrainedAdapter {
    /// Reads a folder of PEFT's, whatever its weights are stored in.
    ///
    /// # Errors
    /// If a file is missing, malformed, or asks for what is not implemented.
    pub fn open(folder: &Path) -> Result<TrainedAdapter, Error> {
        let at = folder.join(CONFIG);
        let bad = |what: String| Error::Adapter { file: at.clone(), what };
        let text = std::fs::read(&at).map_err(|e| {
            bad(format!("cannot be read ({e}); name a folder that holds {CONFIG} and {WEIGHTS}"))
        })?;
        let config: PeftConfig = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
        let refused = [
            (
                config.peft_type != "LORA",
                format!("peft_type is {}, only LORA is implemented", config.peft_type),
            ),
            (config.use_dora, "use_dora is set: DoRA is not implemented".into()),
            (config.bias != "none", format!("bias is {}: trained biases are not implemented", config.bias)),
            (
                config.modules_to_save.as_ref().is_some_and(|m| !m.is_empty()),
                "modules_to_save is set: whole layers beside the adapter are not implemented".into(),
            ),
            (config.r == 0, "r is 0".into()),
        ];
        if let Some((_, what)) = refused.into_iter().find(|(is, _)| *is) {
            return Err(bad(what));
        }
        let at = folder.join(WEIGHTS);
        let bad = |what: String| Error::Adapter { file: at.clone(), what };
        let file = File::open(&at)?;
        let (mut modules, mut weights) = (BTreeMap::new(), Vec::new());
        for info in file.tensors() {
            let name = &info.name;
            let inner = name.strip_prefix(PEFT_PREFIX).and_then(|n| n.strip_prefix('.'));
            let part = inner.and_then(|n| {
                let a = n.strip_suffix(".lora_A.weight").map(|m| (m, true));
                a.or_else(|| n.strip_suffix(".lora_B.weight").map(|m| (m, false)))
            });
            let (Some((module, is_a)), &[rows, cols]) = (part, &info.shape[..]) else {
                return Err(bad(format!(
                    "tensor {name} {:?} is no lora_A or lora_B of a linear layer",
                    info.shape
                )));
            };
            let rank = if is_a { rows } else { cols };
            let seen = *modules.entry(module.to_string()).or_insert(rank);
            if seen != rank {
                return Err(bad(format!("{module}: lora_A and lora_B have the ranks {seen} and {rank}")));
            }
            let mut values = vec![0f32; rows * cols];
            codec::decode(info.dtype, file.tensor(name).map_or(&[][..], |t| t.bytes), &mut values)
                .map_err(|e| bad(format!("tensor {name}: {e}")))?;
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                return Err(bad(format!("tensor {name}: element {i} is {}; the file is damaged", values[i])));
            }
            weights.push((name.clone(), info.shape.clone(), values));
        }
        if modules.is_empty() {
            return Err(bad("it holds no weights".into()));
        }
        for module in modules.keys() {
            for part in ["lora_A", "lora_B"] {
                let name = format!("{PEFT_PREFIX}.{module}.{part}.weight");
                if file.tensor(&name).is_none() {
                    return Err(bad(format!("tensor {name} is missing")));
                }
            }
        }
        let scaled = |(module, rank): (String, usize)| {
            let scale = config.scale(&module, rank);
            (module, LowRank { rank, scale })
        };
        let adapter = Adapter::new(modules.into_iter().map(scaled));
        Ok(TrainedAdapter { config, adapter, weights })
    }

    /// Writes it into `folder`, which is made if it is not there; each file appears whole or not at all.
    ///
    /// # Errors
    /// If the disk is full or fails.
    pub fn save(&self, folder: &Path) -> Result<(), Error> {
        let at = folder.join(CONFIG);
        let io =
            |e: std::io::Error| Error::Adapter { file: at.clone(), what: format!("cannot be written: {e}") };
        std::fs::create_dir_all(folder).map_err(io)?;
        let spec = |(name, shape, _): &(String, Vec<usize>, Vec<f32>)| TensorSpec {
            name: name.clone(),
            shape: shape.clone(),
            dtype: DType::F32,
        };
        let specs: Vec<TensorSpec> = self.weights.iter().map(spec).collect();
        let metadata = [("format".to_string(), "pt".to_string())];
        let mut writer = Writer::create(folder.join(WEIGHTS), &metadata, &specs)?;
        for (name, _, values) in &self.weights {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            writer.append(name, &bytes)?;
        }
        writer.finish()?;
        let mut file = AtomicFile::create(&at)?;
        let json = serde_json::to_vec_pretty(&self.config).expect("names and numbers");
        file.write_all(&json).map_err(io)?;
        Ok(file.commit()?)
    }
}

impl PeftConfig {
    /// Settings of a new adapter of `rank` for the layers whose names end as `targets` say.
    pub fn new(rank: usize, alpha: f64, dropout: f64, rslora: bool, targets: &[String]) -> PeftConfig {
        PeftConfig {
            peft_type: "LORA".into(),
            task_type: Some("CAUSAL_LM".into()),
            base_model_name_or_path: None,
            r: rank,
            lora_alpha: alpha,
            lora_dropout: dropout,
            target_modules: targets.into(),
            use_rslora: rslora,
            use_dora: false,
            bias: none(),
            fan_in_fan_out: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            modules_to_save: None,
            inference_mode: true,
        }
    }

    /// The factor of the term of `module`, whose rank is `rank`.
    pub fn scale(&self, module: &str, rank: usize) -> f64 {
        let names = |key: &str| module == key || module.ends_with(&format!(".{key}"));
        let own = self.alpha_pattern.iter().find(|(key, _)| names(key));
        let alpha = own.map_or(self.lora_alpha, |(_, alpha)| *alpha);
        alpha / if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 }
    }
}

/// A tensor's name, shape and values.
pub type Named = (String, Vec<usize>, Vec<f32>);

/// Replays the probe dialogues that the adapters in these folders were trained with, where they have them.
///
/// # Errors
/// If one comes out differently with this tokenizer.
pub(crate) fn replay(folders: &[(PathBuf, f64)], tokenizer: Option<&Tokenizer>) -> Result<(), Error> {
    for (folder, _) in folders {
        let file = folder.join(PROBES_FILE);
        let json = match std::fs::read_to_string(&file) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            other => other
                .map_err(|e| Error::Adapter { file: file.clone(), what: format!("cannot be read: {e}") })?,
        };
        // Without a tokenizer only ids come and go.
        if let Some(tokenizer) = tokenizer {
            Probes::replay(&json, &file, tokenizer)?;
        }
    }
    Ok(())
}

/// `model` with the adapters of these folders, each weighted, and their weights under the names that it asks for.
///
/// # Errors
/// If one cannot be read or belongs to another model.
pub(crate) fn attach(model: Model, folders: &[(PathBuf, f64)]) -> Result<(Model, Vec<Named>), Error> {
    let (mut adapters, mut weights) = (Vec::new(), Vec::new());
    for (i, (folder, weight)) in folders.iter().enumerate() {
        let trained = TrainedAdapter::open(folder)?;
        let prefix = format!("adapter.{i}");
        for (name, shape, values) in trained.weights {
            weights.push((name.replacen(PEFT_PREFIX, &prefix, 1), shape, values));
        }
        adapters.push(trained.adapter.with_prefix(prefix).scaled(*weight));
    }
    let model = model.with_adapters(adapters)?;
    for wanted in model.adapter_parameters()? {
        let found = weights.iter().find(|(name, ..)| *name == wanted.name).map(|(_, shape, _)| shape);
        if found != Some(&wanted.shape) {
            let what = format!(
                "{} has shape {found:?}, this model wants {:?}; it belongs to another model",
                wanted.name, wanted.shape
            );
            return Err(Error::Adapter { file: folders[0].0.clone(), what });
        }
    }
    Ok((model, weights))
}
