//! A model on disk: what it is, before its weights are read.

use crate::Error;
use crate::probes::{PROBES_FILE, PROBES_KEY, Probes};
use sparsam_dtype::DType;
use sparsam_formats::{Source, gguf};
use sparsam_models::{Config, Model, WeightSpec};
use sparsam_runtime::Weights;
use sparsam_tokenizer::{GgufVocab, Tokenizer};
use std::path::Path;

/// An open model: tensors are mapped but not read, so this takes milliseconds for a file of any size.
pub struct Opened {
    /// The file or folder.
    pub source: Source,
    /// What it computes.
    pub model: Model,
    /// How it reads and writes text; `None` if nothing of a tokenizer is there.
    pub tokenizer: Option<Tokenizer>,
}

/// Opens the model at `path`: a GGUF file, a safetensors file, or a folder that holds one of these.
///
/// # Errors
/// If a file is damaged, the architecture is not known, or the tokenizer contradicts the model or the probe dialogues
/// that are kept with it.
pub fn open(path: &Path) -> Result<Opened, Error> {
    let source = Source::open(path)?;
    let model = Model::new(Config::from_source(&source)?);
    let tokenizer = read_tokenizer(&source)?;
    if let Some(tokenizer) = &tokenizer {
        let (have, want) = (tokenizer.vocab_size(), model.facts().vocab_size);
        // Embedding tables are often padded to a round size; the other way round ids would fall outside.
        if have > want {
            let what = format!(
                "the tokenizer has {have} tokens, the model's embedding table {want} rows; they do not belong together"
            );
            return Err(Error::Vocabulary { file: source.path().to_path_buf(), what });
        }
        let kept = match source.gguf_metadata() {
            Some(metadata) => metadata.opt_str(PROBES_KEY)?.map(str::to_string),
            None => source.sidecar(PROBES_FILE)?.map(|b| String::from_utf8_lossy(&b).into_owned()),
        };
        if let Some(json) = kept {
            Probes::replay(&json, source.path(), tokenizer)?;
        }
    }
    Ok(Opened { source, model, tokenizer })
}

impl Opened {
    /// The tokenizer.
    ///
    /// # Errors
    /// If the model has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        let wanted = match self.source.gguf_metadata() {
            Some(_) => "no tokenizer.ggml.* in its metadata",
            None => "no tokenizer.json beside it",
        };
        let file = self.source.path().to_path_buf();
        self.tokenizer.as_ref().ok_or(Error::NoTokenizer { file, wanted })
    }

    /// All parameters as the file stores them, packed for the kernels, and the constants that the model's graphs bind.
    /// The file's pages are given back as they are packed, so that the copy takes their place in memory.
    ///
    /// # Errors
    /// If a tensor is missing, misshapen or cannot be transformed.
    pub fn weights(&self) -> Result<Weights, Error> {
        self.weights_in(|_, stored| stored)
    }

    /// As [`Opened::weights`], each in the type that `wanted` gives for its name, shape and stored type: decoded, and
    /// rounded to the nearest.
    ///
    /// # Errors
    /// As [`Opened::weights`], or if a type cannot hold a shape.
    pub fn weights_in(&self, wanted: impl Fn(&WeightSpec, DType) -> DType) -> Result<Weights, Error> {
        let mut weights = Weights::new();
        for spec in self.model.weights(&self.source)? {
            let tensor = self.source.require(&spec.source_name)?;
            let turned = spec.transform.apply(tensor.bytes, tensor.info.dtype, &tensor.info.shape)?;
            match wanted(&spec, turned.dtype) {
                same if same == turned.dtype => {
                    weights.insert(&spec.name, &spec.shape, turned.dtype, &turned.bytes)?;
                }
                other => {
                    let refuse =
                        |what: String| Error::Context { what: format!("{} as {other}: {what}", spec.name) };
                    let bytes = crate::save::rounded(turned.dtype, other, &turned.bytes, &spec.shape)
                        .map_err(refuse)?;
                    weights.insert(&spec.name, &spec.shape, other, &bytes)?;
                }
            }
            drop(turned);
            self.source.release(&spec.source_name);
        }
        for constant in self.model.constants() {
            weights.insert_f32(&constant.name, &constant.shape, &constant.data)?;
        }
        Ok(weights)
    }
}

/// The tokenizer of a model, `None` if there is nothing of one.
fn read_tokenizer(source: &Source) -> Result<Option<Tokenizer>, Error> {
    let file = || source.path().to_path_buf();
    let at = |source| Error::Tokenizer { file: file(), source };
    if let Some(metadata) = source.gguf_metadata() {
        let Some(vocab) = read_vocab(metadata)? else { return Ok(None) };
        return Ok(Some(Tokenizer::from_gguf(vocab).map_err(at)?));
    }
    let Some(json) = source.sidecar("tokenizer.json")? else { return Ok(None) };
    let config = source.sidecar("tokenizer_config.json")?;
    let tokenizer = Tokenizer::from_json(&json, config.as_deref()).map_err(at)?;
    let Some(template) = source.sidecar("chat_template.jinja")? else { return Ok(Some(tokenizer)) };
    let template = String::from_utf8(template).map_err(|_| Error::Vocabulary {
        file: file(),
        what: "chat_template.jinja is not UTF-8; fetch it again".into(),
    })?;
    Ok(Some(tokenizer.with_chat_template(template)))
}

/// The vocabulary in a GGUF file's metadata, field by field; checking it is the tokenizer's part.
fn read_vocab(m: &gguf::Metadata) -> Result<Option<GgufVocab>, Error> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let Some(model) = m.opt_str(&key("model"))? else { return Ok(None) };
    let strings =
        |name: &str| Ok::<_, Error>(m.opt_strings(&key(name))?.map(<[String]>::to_vec).unwrap_or_default());
    let id = |name: &str| m.opt_u32(&key(&format!("{name}_token_id")));
    let integers = m.opt_integers(&key("token_type"))?.unwrap_or_default();
    let token_types = integers.iter().map(|&t| i32::try_from(t).unwrap_or(-1)).collect();
    let named =
        m.iter().filter_map(|(key, value)| match (key.strip_prefix("tokenizer.chat_template."), value) {
            (Some(name), gguf::Value::String(template)) => Some((name.to_string(), template.clone())),
            _ => None,
        });
    Ok(Some(GgufVocab {
        model: model.to_string(),
        pre: m.opt_str(&key("pre"))?.map(str::to_string),
        tokens: strings("tokens")?,
        token_types,
        scores: m.opt_f32s(&key("scores"))?.unwrap_or_default(),
        merges: strings("merges")?,
        bos: id("bos")?,
        eos: id("eos")?,
        eot: id("eot")?,
        eom: id("eom")?,
        unk: id("unknown")?,
        pad: id("padding")?,
        add_bos: m.opt_bool(&key("add_bos_token"))?,
        add_eos: m.opt_bool(&key("add_eos_token"))?,
        add_space_prefix: m.opt_bool(&key("add_space_prefix"))?,
        chat_template: m.opt_str("tokenizer.chat_template")?.map(str::to_string),
        named_templates: named.collect(),
    }))
}
