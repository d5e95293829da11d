//! Writing a model's configuration: `config.json` as transformers reads it, GGUF metadata as llama.cpp reads it.
//!
//! The mirror of [`crate::Config::from_source`]: what is written here reads back as the same configuration, the rows of
//! a GGUF file's tables and the presence of its biases included, which the weights themselves tell. What a format
//! cannot say is an error; what it can say but its usual readers ignore is a note.

use crate::config::Heads;
use crate::rope::{RopeConfig, Scaling, frequencies, yarn_attention_factor};
use crate::{Config, Constant, Error, gemma3, gpt2, llama, qwen2, qwen3};
use serde_json::{Map, Value, json};
use sparsam_formats::gguf::{Array, Metadata, Value as Gguf};

/// A configuration as a GGUF file holds it.
#[derive(Clone, Debug)]
pub struct GgufConfig {
    /// `general.architecture` and the architecture's keys.
    pub metadata: Metadata,
    /// Tensors that belong to the configuration, in F32: `rope_freqs.weight`, where wavelengths are stretched one by one.
    pub tensors: Vec<Constant>,
    /// What other readers of the file will do differently, a sentence each.
    pub notes: Vec<String>,
}

/// `config.json` holds this configuration.
const JSON: &str = "config.json";
/// GGUF metadata hold it.
const GGUF: &str = "GGUF";

fn cannot(format: &'static str, key: &str, problem: impl Into<String>) -> Error {
    Error::Unrepresentable { format, key: key.into(), problem: problem.into() }
}

impl Config {
    /// The fields of `config.json`, in the form that is read by transformers 4 and 5 alike. Who writes the file adds
    /// what the weights (`torch_dtype`) and the tokenizer (`bos_token_id` and the like) know.
    ///
    /// # Errors
    /// If transformers' class for the architecture has no field for a switch: Mistral's with biases, say.
    pub fn to_json(&self) -> Result<Map<String, Value>, Error> {
        match self {
            Config::Llama(c) => llama_json(c),
            Config::Qwen2(c) => qwen_json(&Qwen::from(c)),
            Config::Qwen3(c) => qwen_json(&Qwen::from(c)),
            Config::Gemma3(c) => gemma3_json(c),
            Config::Gpt2(c) => Ok(gpt2_json(c)),
        }
    }

    /// The configuration as GGUF metadata under llama.cpp's keys, with the tensors that belong to it.
    ///
    /// # Errors
    /// If the format has no place for something that changes the computation: wavelengths stretched one by one outside
    /// of `llama`, windows of several sizes.
    pub fn to_gguf(&self) -> Result<GgufConfig, Error> {
        match self {
            Config::Llama(c) => llama_gguf(c),
            Config::Qwen2(c) => qwen_gguf(&Qwen::from(c)),
            Config::Qwen3(c) => qwen_gguf(&Qwen::from(c)),
            Config::Gemma3(c) => gemma3_gguf(c),
            Config::Gpt2(c) => Ok(gpt2_gguf(c)),
        }
    }
}

/// The one size of all windows, and whether each layer has one.
fn one_window(format: &'static str, windows: &[Option<usize>]) -> Result<Option<usize>, Error> {
    let mut sizes = windows.iter().flatten();
    let first = sizes.next().copied();
    match sizes.find(|&&size| Some(size) != first) {
        Some(other) => {
            let problem = format!("is {} in one layer and {other} in another", first.unwrap_or_default());
            Err(cannot(format, "sliding_window", problem))
        }
        None => Ok(first),
    }
}

fn layer_types(windows: &[Option<usize>]) -> Value {
    windows.iter().map(|w| if w.is_some() { "sliding_attention" } else { "full_attention" }).collect()
}

/// A whole number where it is one, as published files have it.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x < (1u64 << 53) as f64 { json!(x as u64) } else { json!(x) }
}

// ---- config.json ----

fn object(fields: Value) -> Map<String, Value> {
    match fields {
        Value::Object(map) => map,
        _ => unreachable!("made by json!({{..}})"),
    }
}

/// What `rope_scaling` holds; null without scaling.
fn rope_scaling(rope: &RopeConfig, head_dim: usize, context: usize) -> Value {
    match &rope.scaling {
        Scaling::None => Value::Null,
        Scaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        &Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_context,
        }),
        &Scaling::Yarn { factor, beta_fast, beta_slow, original_context, attention_factor } => {
            let mut fields = json!({
                "rope_type": "yarn",
                "factor": factor,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
                "original_max_position_embeddings": original_context,
            });
            if attention_factor != yarn_attention_factor(factor) {
                fields["attention_factor"] = json!(attention_factor);
            }
            fields
        }
        Scaling::Factors(factors) => match published_llama3(rope.base, head_dim, factors) {
            Some(scaling) => rope_scaling(&RopeConfig { base: rope.base, scaling }, head_dim, context),
            // LongRoPE with one list for short and long texts is division by the list's factors, no more.
            None => json!({
                "rope_type": "longrope",
                "factor": 1.0,
                "attention_factor": 1.0,
                "original_max_position_embeddings": context,
                "short_factor": factors,
                "long_factor": factors,
            }),
        },
    }
}

/// The stretch of Llama 3.1 (8) or 3.2 (32) if `factors` are its, as llama.cpp's converter computes them (Llama Team
/// 2024; the numbers are those of all published models).
fn published_llama3(base: f64, head_dim: usize, factors: &[f32]) -> Option<Scaling> {
    let candidates = [8.0, 16.0, 32.0].map(|factor| Scaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    });
    candidates.into_iter().find(|scaling| {
        let exact = llama3_factors(&RopeConfig { base, scaling: scaling.clone() }, head_dim);
        // The converter computes in f32, where the interpolated ones lose a few bits.
        exact.len() == factors.len() && exact.iter().zip(factors).all(|(a, b)| (a - b).abs() <= 1e-5 * a)
    })
}

/// By what each frequency is divided.
fn llama3_factors(rope: &RopeConfig, head_dim: usize) -> Vec<f32> {
    let plain = frequencies(head_dim, &RopeConfig { base: rope.base, scaling: Scaling::None });
    let scaled = frequencies(head_dim, rope);
    plain.iter().zip(&scaled).map(|(p, s)| p / s).collect()
}

/// What the architectures with rotary embeddings have in common.
struct Common<'a> {
    architecture: &'a str,
    class: &'a str,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    n_layers: usize,
    heads: Heads,
    rms_norm_eps: f64,
    context_length: usize,
    rope: &'a RopeConfig,
    tied_head: bool,
}

/// Of a configuration (Llama's, Qwen's) whose fields have the names of [`Common`]'s.
macro_rules! common {
    ($c:expr, $architecture:expr, $class:expr) => {
        Common {
            architecture: $architecture,
            class: $class,
            vocab_size: $c.vocab_size,
            hidden_size: $c.hidden_size,
            intermediate_size: $c.intermediate_size,
            n_layers: $c.n_layers,
            heads: $c.heads,
            rms_norm_eps: $c.rms_norm_eps,
            context_length: $c.context_length,
            rope: &$c.rope,
            tied_head: $c.tied_head,
        }
    };
}

impl Common<'_> {
    fn json(&self) -> Map<String, Value> {
        object(json!({
            "architectures": [self.class],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.heads.n_heads,
            "num_key_value_heads": self.heads.n_kv_heads,
            "head_dim": self.heads.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.context_length,
            "rope_theta": self.rope.base,
            "rope_scaling": rope_scaling(self.rope, self.heads.head_dim, self.context_length),
            "tie_word_embeddings": self.tied_head,
        }))
    }

    fn gguf(&self) -> Result<GgufConfig, Error> {
        let mut keys = Keys::new(self.architecture);
        keys.size("vocab_size", self.vocab_size);
        keys.size("context_length", self.context_length);
        keys.size("embedding_length", self.hidden_size);
        keys.size("feed_forward_length", self.intermediate_size);
        keys.size("block_count", self.n_layers);
        keys.size("attention.head_count", self.heads.n_heads);
        keys.size("attention.head_count_kv", self.heads.n_kv_heads);
        keys.size("attention.key_length", self.heads.head_dim);
        keys.size("attention.value_length", self.heads.head_dim);
        keys.real("attention.layer_norm_rms_epsilon", self.rms_norm_eps);
        keys.size("rope.dimension_count", self.heads.head_dim);
        keys.rope(self.rope, self.heads.head_dim)?;
        Ok(keys.out)
    }
}

fn llama_json(c: &llama::Config) -> Result<Map<String, Value>, Error> {
    if c.qkv_bias != c.o_bias {
        let problem = "is on for q, k and v alone or for the output alone, where one flag says all four";
        return Err(cannot(JSON, "attention_bias", problem));
    }
    let mistral = c.sliding_window.is_some();
    if mistral && (c.qkv_bias || c.mlp_bias) {
        let problem = "is on beside a sliding window: windows are Mistral's, which has no biases";
        return Err(cannot(JSON, "attention_bias", problem));
    }
    let mut fields = common_llama(c).json();
    fields.insert("hidden_act".into(), json!("silu"));
    if mistral {
        fields.insert("sliding_window".into(), json!(c.sliding_window));
    } else {
        fields.insert("attention_bias".into(), json!(c.qkv_bias));
        fields.insert("mlp_bias".into(), json!(c.mlp_bias));
    }
    Ok(fields)
}

fn common_llama(c: &llama::Config) -> Common<'_> {
    let (architecture, class) = match c.sliding_window {
        Some(_) => ("mistral", "MistralForCausalLM"),
        None => ("llama", "LlamaForCausalLM"),
    };
    common!(c, architecture, class)
}

/// What Qwen2 and Qwen3 have.
struct Qwen<'a> {
    common: Common<'a>,
    windows: &'a [Option<usize>],
    /// Qwen3's flag; Qwen2 has none.
    attention_bias: Option<bool>,
}

impl<'a> From<&'a qwen2::Config> for Qwen<'a> {
    fn from(c: &'a qwen2::Config) -> Qwen<'a> {
        let common = common!(c, "qwen2", "Qwen2ForCausalLM");
        Qwen { common, windows: &c.windows, attention_bias: None }
    }
}

impl<'a> From<&'a qwen3::Config> for Qwen<'a> {
    fn from(c: &'a qwen3::Config) -> Qwen<'a> {
        let common = common!(c, "qwen3", "Qwen3ForCausalLM");
        Qwen { common, windows: &c.windows, attention_bias: Some(c.attention_bias) }
    }
}

fn qwen_json(c: &Qwen) -> Result<Map<String, Value>, Error> {
    let window = one_window(JSON, c.windows)?;
    let mut fields = c.common.json();
    fields.insert("hidden_act".into(), json!("silu"));
    if let Some(bias) = c.attention_bias {
        fields.insert("attention_bias".into(), json!(bias));
    }
    fields.insert("use_sliding_window".into(), json!(window.is_some()));
    fields.insert("sliding_window".into(), json!(window));
    let first = c.windows.iter().position(Option::is_some).unwrap_or(c.windows.len());
    fields.insert("max_window_layers".into(), json!(first));
    if window.is_some() {
        fields.insert("layer_types".into(), layer_types(c.windows));
    }
    Ok(fields)
}

fn common_gemma3(c: &gemma3::Config) -> Common<'_> {
    Common {
        architecture: "gemma3_text",
        class: "Gemma3ForCausalLM",
        vocab_size: c.vocab_size,
        hidden_size: c.hidden_size,
        intermediate_size: c.intermediate_size,
        n_layers: c.windows.len(),
        heads: c.heads,
        rms_norm_eps: c.rms_norm_eps,
        context_length: c.context_length,
        rope: &c.rope_global,
        tied_head: c.tied_head,
    }
}

fn gemma3_json(c: &gemma3::Config) -> Result<Map<String, Value>, Error> {
    let window = one_window(JSON, &c.windows)?;
    if c.rope_local.scaling != Scaling::None {
        return Err(cannot(JSON, "rope_local_base_freq", "is stretched: only global layers can be"));
    }
    let mut fields = common_gemma3(c).json();
    for (key, value) in object(json!({
        "rope_local_base_freq": c.rope_local.base,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": number(c.query_pre_attn_scalar),
        "attention_bias": c.attention_bias,
        "attn_logit_softcapping": c.attn_logit_softcapping,
        "final_logit_softcapping": c.final_logit_softcapping,
        "layer_types": layer_types(&c.windows),
    })) {
        fields.insert(key, value);
    }
    if let Some(window) = window {
        fields.insert("sliding_window".into(), json!(window));
    }
    Ok(fields)
}

fn gpt2_json(c: &gpt2::Config) -> Map<String, Value> {
    let usual = c.intermediate_size == 4 * c.hidden_size;
    object(json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab_size,
        "n_embd": c.hidden_size,
        "n_inner": if usual { Value::Null } else { json!(c.intermediate_size) },
        "n_layer": c.n_layers,
        "n_head": c.heads.n_heads,
        "n_positions": c.context_length,
        "n_ctx": c.context_length,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": c.layer_norm_eps,
        "tie_word_embeddings": c.tied_head,
    }))
}

// ---- GGUF ----

/// GGUF keys of one architecture.
struct Keys {
    prefix: String,
    out: GgufConfig,
}

impl Keys {
    fn new(architecture: &str) -> Keys {
        let mut metadata = Metadata::default();
        metadata.insert("general.architecture", Gguf::String(architecture.into()));
        let out = GgufConfig { metadata, tensors: Vec::new(), notes: Vec::new() };
        Keys { prefix: architecture.into(), out }
    }

    fn set(&mut self, key: &str, value: Gguf) {
        self.out.metadata.insert(format!("{}.{key}", self.prefix), value);
    }

    /// A size; all that pass the reader's checks are far below 2^32.
    fn size(&mut self, key: &str, n: usize) {
        let n = u32::try_from(n).map_or(Gguf::U64(n as u64), Gguf::U32);
        self.set(key, n);
    }

    fn real(&mut self, key: &str, x: f64) {
        self.set(key, Gguf::F32(x as f32));
    }

    fn rope(&mut self, rope: &RopeConfig, head_dim: usize) -> Result<(), Error> {
        self.real("rope.freq_base", rope.base);
        match &rope.scaling {
            Scaling::None => {}
            Scaling::Linear { factor } => {
                self.set("rope.scaling.type", Gguf::String("linear".into()));
                self.real("rope.scaling.factor", *factor);
            }
            &Scaling::Yarn { factor, beta_fast, beta_slow, original_context, attention_factor } => {
                self.set("rope.scaling.type", Gguf::String("yarn".into()));
                self.real("rope.scaling.factor", factor);
                self.size("rope.scaling.original_context_length", original_context);
                self.real("rope.scaling.yarn_beta_fast", beta_fast);
                self.real("rope.scaling.yarn_beta_slow", beta_slow);
                let derived = yarn_attention_factor(factor);
                if attention_factor != derived {
                    self.real("rope.scaling.attn_factor", attention_factor / derived);
                }
            }
            Scaling::Llama3 { .. } | Scaling::Factors(_) if self.prefix != "llama" => {
                let problem = format!(
                    "stretches each wavelength by a factor of its own, for which llama.cpp's {} has no tensor",
                    self.prefix
                );
                return Err(cannot(GGUF, "rope.scaling", problem));
            }
            Scaling::Llama3 { .. } | Scaling::Factors(_) => {
                let data = match &rope.scaling {
                    Scaling::Factors(factors) => factors.clone(),
                    _ => llama3_factors(rope, head_dim),
                };
                let tensor = Constant { name: "rope_freqs.weight".into(), shape: vec![data.len()], data };
                self.out.tensors.push(tensor);
            }
        }
        Ok(())
    }

    /// The window of the layers that have one, and which these are.
    fn windows(&mut self, windows: &[Option<usize>]) -> Result<(), Error> {
        if let Some(window) = one_window(GGUF, windows)? {
            self.size("attention.sliding_window", window);
            let slides = windows.iter().map(Option::is_some).collect();
            self.set("attention.sliding_window_pattern", Gguf::Array(Array::Bool(slides)));
        }
        Ok(())
    }

    fn note(&mut self, note: &str) {
        self.out.notes.push(note.into());
    }
}

fn llama_gguf(c: &llama::Config) -> Result<GgufConfig, Error> {
    let common = Common { architecture: "llama", ..common_llama(c) };
    let mut keys = Keys { prefix: "llama".into(), out: common.gguf()? };
    if let Some(window) = c.sliding_window {
        keys.size("attention.sliding_window", window);
        keys.note(&format!(
            "llama.cpp knows no sliding window for llama: beyond {window} tokens it attends to more than this model was trained to"
        ));
    }
    Ok(keys.out)
}

fn qwen_gguf(c: &Qwen) -> Result<GgufConfig, Error> {
    let prefix = c.common.architecture.to_string();
    let mut keys = Keys { prefix, out: c.common.gguf()? };
    keys.windows(c.windows)?;
    if c.windows.iter().any(Option::is_some) {
        keys.note("llama.cpp knows no sliding window for Qwen and attends to the whole text in every layer");
    }
    if c.attention_bias == Some(true) {
        keys.note("llama.cpp's qwen3 has no biases: it will not load this file");
    }
    Ok(keys.out)
}

fn gemma3_gguf(c: &gemma3::Config) -> Result<GgufConfig, Error> {
    if c.rope_local.scaling != Scaling::None {
        return Err(cannot(GGUF, "rope.freq_base_swa", "is stretched: only global layers can be"));
    }
    let common = Common { architecture: "gemma3", ..common_gemma3(c) };
    let mut keys = Keys { prefix: "gemma3".into(), out: common.gguf()? };
    keys.real("rope.freq_base_swa", c.rope_local.base);
    keys.windows(&c.windows)?;
    if c.query_pre_attn_scalar != gemma3::implied_scalar(c.windows.len(), c.hidden_size, &c.heads) {
        keys.real("attention.query_pre_attn_scalar", c.query_pre_attn_scalar);
        keys.note("llama.cpp derives query_pre_attn_scalar from the model's size and gets another one");
    }
    if let Some(cap) = c.attn_logit_softcapping {
        keys.real("attn_logit_softcapping", cap);
        keys.note("llama.cpp's gemma3 does not cap attention scores");
    }
    if let Some(cap) = c.final_logit_softcapping {
        keys.real("final_logit_softcapping", cap);
    }
    if c.attention_bias {
        keys.note("llama.cpp's gemma3 has no biases: it will not load this file");
    }
    Ok(keys.out)
}

fn gpt2_gguf(c: &gpt2::Config) -> GgufConfig {
    let mut keys = Keys::new("gpt2");
    keys.size("vocab_size", c.vocab_size);
    keys.size("context_length", c.context_length);
    keys.size("embedding_length", c.hidden_size);
    keys.size("feed_forward_length", c.intermediate_size);
    keys.size("block_count", c.n_layers);
    keys.size("attention.head_count", c.heads.n_heads);
    keys.real("attention.layer_norm_epsilon", c.layer_norm_eps);
    keys.out
}
