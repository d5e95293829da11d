//! What describes a model beside its weights: GGUF metadata, or the JSON files of a folder.

use super::Plan;
use crate::Error;
use crate::probes::{PROBES_FILE, PROBES_KEY, Probes};
use serde_json::{Map, Value, json};
use sparsam_dtype::DType;
use sparsam_formats::gguf::{Array, Metadata, Value as Gguf};
use sparsam_models::{GgufConfig, Model};
use sparsam_tokenizer::{GgufVocab, Tokenizer};
use std::path::Path;

/// All of a GGUF file's metadata, and the tensors that belong to the configuration.
pub(super) fn gguf(
    path: &Path,
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    plan: &Plan,
) -> Result<GgufConfig, Error> {
    let config = model.config().to_gguf()?;
    let mut out = GgufConfig { metadata: Metadata::default(), ..config };
    let m = &mut out.metadata;
    let architecture = config.metadata.str("general.architecture")?;
    m.insert("general.architecture", Gguf::String(architecture.into()));
    m.insert("general.type", Gguf::String("model".into()));
    for (key, value) in plan.about.iter() {
        m.insert(key, value.clone());
    }
    let main = plan.main_dtype();
    if let Some(number) = file_type(main) {
        m.insert("general.file_type", Gguf::U32(number));
    }
    if plan.tensors.iter().any(|t| t.dtype.is_block()) {
        m.insert("general.quantization_version", Gguf::U32(2)); // ggml's GGML_QNT_VERSION
    }
    for (key, value) in config.metadata.iter() {
        m.insert(key, value.clone());
    }
    match tokenizer {
        Some(tokenizer) => {
            let vocab = tokenizer.to_gguf(model.facts().vocab_size);
            let vocab = vocab.map_err(|source| Error::Tokenizer { file: path.to_path_buf(), source })?;
            write_vocab(&vocab, m);
            if plan.probes {
                m.insert(PROBES_KEY, Gguf::String(probes(path, tokenizer)?));
            }
        }
        None => {
            out.notes.push("the model comes without a tokenizer: llama.cpp will not load this file".into())
        }
    }
    Ok(out)
}

/// Probe dialogues as JSON.
fn probes(path: &Path, tokenizer: &Tokenizer) -> Result<String, Error> {
    let made = Probes::of(tokenizer);
    Ok(made.map_err(|source| Error::Tokenizer { file: path.to_path_buf(), source })?.to_json())
}

/// llama.cpp's number for a file whose weights are mostly of this type (`llama_ftype` in its `llama.h`).
fn file_type(dtype: DType) -> Option<u32> {
    use DType::*;
    Some(match dtype {
        F32 => 0,
        F16 => 1,
        Q4_0 => 2,
        Q4_1 => 3,
        Q8_0 => 7,
        Q5_0 => 8,
        Q5_1 => 9,
        Q2_K => 10,
        Q3_K => 12,
        Q4_K => 15,
        Q5_K => 17,
        Q6_K => 18,
        IQ4_NL => 25,
        IQ4_XS => 30,
        BF16 => 32,
        F64 | I8 | I16 | I32 | I64 | U8 | Q8_1 | Q8_K | S2_64 | S3_64 | S4_64 | NF4 | DYN8S | DYN8U => {
            return None;
        }
    })
}

/// The vocabulary under its keys; `open` reads them.
fn write_vocab(vocab: &GgufVocab, m: &mut Metadata) {
    let mut set = |key: &str, value: Gguf| {
        m.insert(format!("tokenizer.ggml.{key}"), value);
    };
    set("model", Gguf::String(vocab.model.clone()));
    if let Some(pre) = &vocab.pre {
        set("pre", Gguf::String(pre.clone()));
    }
    set("tokens", Gguf::Array(Array::String(vocab.tokens.clone())));
    set("token_type", Gguf::Array(Array::I32(vocab.token_types.clone())));
    if !vocab.scores.is_empty() {
        set("scores", Gguf::Array(Array::F32(vocab.scores.clone())));
    }
    if !vocab.merges.is_empty() {
        set("merges", Gguf::Array(Array::String(vocab.merges.clone())));
    }
    for (name, id) in [
        ("bos_token_id", vocab.bos),
        ("eos_token_id", vocab.eos),
        ("eot_token_id", vocab.eot),
        ("eom_token_id", vocab.eom),
        ("unknown_token_id", vocab.unk),
        ("padding_token_id", vocab.pad),
    ] {
        if let Some(id) = id {
            set(name, Gguf::U32(id));
        }
    }
    for (name, flag) in [
        ("add_bos_token", vocab.add_bos),
        ("add_eos_token", vocab.add_eos),
        ("add_space_prefix", vocab.add_space_prefix),
    ] {
        if let Some(flag) = flag {
            set(name, Gguf::Bool(flag));
        }
    }
    if let Some(template) = &vocab.chat_template {
        m.insert("tokenizer.chat_template", Gguf::String(template.clone()));
    }
    for (name, template) in &vocab.named_templates {
        m.insert(format!("tokenizer.chat_template.{name}"), Gguf::String(template.clone()));
    }
    if !vocab.named_templates.is_empty() {
        let names = vocab.named_templates.iter().map(|(name, _)| name.clone()).collect();
        m.insert("tokenizer.chat_templates", Gguf::Array(Array::String(names)));
    }
}

/// Name and bytes of the files that lie beside a safetensors model at `path`: configuration and tokenizer.
///
/// # Errors
/// If they cannot be said in Hugging Face's files.
pub fn sidecars(
    path: &Path,
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    plan: &Plan,
) -> Result<Vec<(&'static str, Vec<u8>)>, Error> {
    let mut config = model.config().to_json()?;
    let dtype = match plan.main_dtype() {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        DType::F64 => "float64",
        _ => "float32",
    };
    config.insert("torch_dtype".into(), json!(dtype));
    let ids = [
        ("bos_token_id", tokenizer.and_then(Tokenizer::bos)),
        ("eos_token_id", tokenizer.and_then(Tokenizer::eos)),
        ("pad_token_id", tokenizer.and_then(Tokenizer::pad)),
    ];
    // Null too: transformers' classes have ids of their own where the file is silent.
    config.extend(ids.map(|(name, id)| (name.to_string(), json!(id))));
    let mut files = vec![("config.json", pretty(config))];
    let Some(tokenizer) = tokenizer else { return Ok(files) };
    let mut generation: Map<String, Value> =
        ids.into_iter().filter_map(|(name, id)| Some((name.to_string(), json!(id?)))).collect();
    // All that end a text: a chat model's turns end at other tokens than documents.
    match tokenizer.stop_ids() {
        [] => {}
        &[one] => _ = generation.insert("eos_token_id".into(), json!(one)),
        several => _ = generation.insert("eos_token_id".into(), json!(several)),
    }
    if !generation.is_empty() {
        files.push(("generation_config.json", pretty(generation)));
    }
    let json = tokenizer.to_json();
    let json = json.map_err(|source| Error::Tokenizer { file: path.to_path_buf(), source })?;
    files.push(("tokenizer.json", json.tokenizer));
    files.push(("tokenizer_config.json", json.config));
    if plan.probes {
        files.push((PROBES_FILE, probes(path, tokenizer)?.into_bytes()));
    }
    Ok(files)
}

fn pretty(map: Map<String, Value>) -> Vec<u8> {
    format!("{:#}\n", Value::Object(map)).into_bytes()
}
