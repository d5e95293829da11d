//! Reading a model's configuration out of GGUF metadata or `config.json`.
//!
//! The two worlds name the same facts differently: a field is asked for by both names at once, `["hidden_size",
//! "embedding_length"]`, so that the list of fields in a model file is written once. Nothing is guessed: a field that
//! changes the computation and is missing is an error unless the format itself defines a default.

use crate::Error;
use crate::rope::{RopeConfig, Scaling, yarn_attention_factor};
use serde_json::{Map, Value};
use sparsam_dtype::codec;
use sparsam_formats::{Source, TensorInfo, gguf};
use std::path::PathBuf;

/// The name of a field in `config.json` and in GGUF metadata (without the architecture's prefix). An empty name: that
/// world has no such field.
pub(crate) type Key = [&'static str; 2];

/// Largest width, vocabulary or context that is believed: 2^24, the largest run of positions that f32 holds exactly
/// and 64 times the largest vocabulary in use. Keeps products of two sizes far from overflow.
const MAX_SIZE: usize = 1 << 24;
/// Most layers that are believed; the deepest model in use has 126.
pub(crate) const MAX_LAYERS: usize = 4096;
/// Largest head that is believed, 16 times the largest in use: every layer computes half as many frequencies.
const MAX_HEAD_DIM: usize = 8192;

/// The fields of one model's configuration.
pub(crate) struct Fields<'a> {
    source: &'a Source,
    world: World<'a>,
}

enum World<'a> {
    /// The object that describes the text model, and the names of objects that lead to it.
    Json {
        object: &'a Map<String, Value>,
        at: String,
    },
    Gguf {
        metadata: &'a gguf::Metadata,
        prefix: String,
    },
}

impl<'a> Fields<'a> {
    /// The fields of `source`, and the name by which it calls its architecture.
    pub fn open(source: &'a Source) -> Result<(Fields<'a>, String), Error> {
        if let Some(metadata) = source.gguf_metadata() {
            let prefix = metadata.str("general.architecture")?.to_string();
            let name = prefix.clone();
            return Ok((Fields { source, world: World::Gguf { metadata, prefix } }, name));
        }
        let bad = |key: &str, problem: &str| Error::Config {
            file: config_json(source),
            key: key.into(),
            problem: problem.into(),
        };
        let object = source.config_json().and_then(Value::as_object).ok_or_else(|| {
            bad(
                "the file",
                "is missing; a safetensors model needs the config.json that was published with it",
            )
        })?;
        let fields = Fields { source, world: World::Json { object, at: String::new() } };
        let name = fields.text(["model_type", ""])?.ok_or_else(|| bad("model_type", "is missing"))?;
        Ok((fields, name))
    }

    /// The fields in the object `key` of `config.json`, where there is one: the text half of a model that also sees.
    pub fn descend(self, key: &'static str) -> Fields<'a> {
        match self.world {
            World::Json { object, at } => {
                let (object, at) = match object.get(key).and_then(Value::as_object) {
                    Some(inner) => (inner, format!("{at}{key}.")),
                    None => (object, at),
                };
                Fields { source: self.source, world: World::Json { object, at } }
            }
            World::Gguf { .. } => self,
        }
    }

    /// Whether this is a GGUF file.
    pub fn is_gguf(&self) -> bool {
        matches!(self.world, World::Gguf { .. })
    }

    /// What the file itself says its tensor `name` is.
    pub fn tensor(&self, name: &str) -> Option<&'a TensorInfo> {
        self.source.tensor(name).map(|t| t.info)
    }

    /// The model's files.
    pub fn path(&self) -> PathBuf {
        match self.world {
            World::Json { .. } => config_json(self.source),
            World::Gguf { .. } => self.source.path().to_path_buf(),
        }
    }

    /// An error about a field; `problem` continues its name.
    pub fn error(&self, key: Key, problem: impl Into<String>) -> Error {
        Error::Config { file: self.path(), key: self.name(key), problem: problem.into() }
    }

    /// The full name of a field in this world.
    fn name(&self, key: Key) -> String {
        match &self.world {
            World::Json { at, .. } => format!("{at}{}", key[0]),
            World::Gguf { prefix, .. } => format!("{prefix}.{}", key[1]),
        }
    }

    /// The field in `config.json`; null is the same as missing.
    fn json(&self, key: Key) -> Option<&'a Value> {
        match &self.world {
            World::Json { object, .. } => object.get(key[0]).filter(|v| !v.is_null()),
            World::Gguf { .. } => None,
        }
    }

    fn field<T>(
        &self,
        key: Key,
        want: &str,
        from_json: impl Fn(&'a Value) -> Option<T>,
        from_gguf: impl Fn(&'a gguf::Metadata, &str) -> Result<Option<T>, sparsam_formats::Error>,
    ) -> Result<Option<T>, Error> {
        match &self.world {
            World::Json { .. } if key[0].is_empty() => Ok(None),
            World::Json { .. } => match self.json(key) {
                None => Ok(None),
                Some(v) => match from_json(v) {
                    Some(x) => Ok(Some(x)),
                    None => Err(self.error(key, format!("is {v}, where {want} is expected"))),
                },
            },
            World::Gguf { .. } if key[1].is_empty() => Ok(None),
            World::Gguf { metadata, .. } => Ok(from_gguf(metadata, &self.name(key))?),
        }
    }

    /// A count from 1 to [`MAX_SIZE`], if the field is there.
    pub fn opt_size(&self, key: Key) -> Result<Option<usize>, Error> {
        let found = self.field(
            key,
            "a whole number",
            |v| v.as_u64().and_then(|x| usize::try_from(x).ok()),
            |m, k| m.opt_usize(k),
        )?;
        match found {
            Some(n) if n == 0 || n > MAX_SIZE => {
                Err(self.error(key, format!("is {n}, where 1 to {MAX_SIZE} is possible")))
            }
            other => Ok(other),
        }
    }

    /// A count from 1 to [`MAX_SIZE`].
    pub fn size(&self, key: Key) -> Result<usize, Error> {
        self.opt_size(key)?.ok_or_else(|| self.error(key, "is missing; the model cannot be built without it"))
    }

    /// A whole number from 0 to [`MAX_SIZE`].
    pub fn index(&self, key: Key) -> Result<usize, Error> {
        let found = self.field(
            key,
            "a whole number",
            |v| v.as_u64().and_then(|x| usize::try_from(x).ok()),
            |m, k| m.opt_usize(k),
        )?;
        match found {
            Some(n) if n <= MAX_SIZE => Ok(n),
            Some(n) => Err(self.error(key, format!("is {n}, where 0 to {MAX_SIZE} is possible"))),
            None => Err(self.error(key, "is missing; the model cannot be built without it")),
        }
    }

    /// Whether the field is there.
    pub fn has(&self, key: Key) -> bool {
        match &self.world {
            World::Json { .. } => self.json(key).is_some(),
            World::Gguf { metadata, .. } => metadata.get(&self.name(key)).is_some(),
        }
    }

    /// A finite number from 0, if the field is there; no field of a model is ever negative.
    pub fn opt_real(&self, key: Key) -> Result<Option<f64>, Error> {
        // A GGUF number is an f32 that was written as a short decimal: 1e-5 becomes 9.9999997e-6. Its shortest decimal
        // is the number that was meant.
        let widen = |x: f32| x.to_string().parse().unwrap_or(x as f64);
        let found = self.field(key, "a number", Value::as_f64, |m, k| Ok(m.opt_f32(k)?.map(widen)))?;
        match found {
            Some(x) if !(x.is_finite() && x >= 0.0) => {
                Err(self.error(key, format!("is {x}, where a number from 0 is expected")))
            }
            other => Ok(other),
        }
    }

    /// A finite number from 0.
    pub fn real(&self, key: Key) -> Result<f64, Error> {
        self.opt_real(key)?.ok_or_else(|| self.error(key, "is missing; the model cannot be built without it"))
    }

    /// Yes or no, if the field is there.
    pub fn flag(&self, key: Key) -> Result<Option<bool>, Error> {
        self.field(key, "true or false", Value::as_bool, |m, k| m.opt_bool(k))
    }

    /// A string, if the field is there.
    pub fn text(&self, key: Key) -> Result<Option<String>, Error> {
        let own = |s: &str| s.to_string();
        self.field(key, "a string", |v| v.as_str().map(own), |m, k| Ok(m.opt_str(k)?.map(own)))
    }

    /// Refuses any value of a field but those in `allowed`, a missing one aside.
    pub fn only(&self, key: Key, allowed: &[&str]) -> Result<(), Error> {
        match self.text(key)? {
            Some(found) if !allowed.contains(&found.as_str()) => {
                let allowed = allowed.join(" or ");
                Err(self.error(key, format!("is {found:?}; only {allowed} is implemented")))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a flag whose value is not `allowed`, a missing one aside.
    pub fn only_flag(&self, key: Key, allowed: bool) -> Result<(), Error> {
        match self.flag(key)? {
            Some(found) if found != allowed => {
                Err(self.error(key, format!("is {found}; only {allowed} is implemented")))
            }
            _ => Ok(()),
        }
    }

    /// Number of layers.
    pub fn n_layers(&self, key: Key) -> Result<usize, Error> {
        match self.size(key)? {
            n if n <= MAX_LAYERS => Ok(n),
            n => Err(self.error(key, format!("is {n}, where 1 to {MAX_LAYERS} is possible"))),
        }
    }

    /// Rows of the embedding table: `vocab_size` (`default` where `config.json` may leave it out), which a GGUF file may
    /// leave to the table itself.
    pub fn vocab_size(&self, default: Option<usize>) -> Result<usize, Error> {
        let key = ["vocab_size", "vocab_size"];
        let World::Gguf { metadata, .. } = &self.world else {
            return match (self.opt_size(key)?, default) {
                (Some(n), _) | (None, Some(n)) => Ok(n),
                (None, None) => self.size(key),
            };
        };
        let table = self.tensor("token_embd.weight").ok_or_else(|| {
            self.error(["", "vocab_size"], "cannot be told: there is no tensor token_embd.weight")
        })?;
        let rows = table.shape.first().copied().unwrap_or(0);
        let tokens = metadata.opt_strings("tokenizer.ggml.tokens")?.map(|t| t.len());
        for (what, n) in
            [("vocab_size", self.opt_size(key)?), ("the vocabulary (tokenizer.ggml.tokens)", tokens)]
        {
            if let Some(n) = n
                && n != rows
            {
                let problem =
                    format!("contradicts the embedding table: {what} has {n} tokens, the table {rows} rows");
                return Err(self.error(key, problem));
            }
        }
        Ok(rows)
    }

    /// Whether the head shares the embedding table: `tie_word_embeddings` (`default` where that is missing), or no
    /// `output.weight` in a GGUF file.
    pub fn tied_head(&self, default: bool) -> Result<bool, Error> {
        if self.is_gguf() {
            return Ok(self.tensor("output.weight").is_none());
        }
        Ok(self.flag(["tie_word_embeddings", ""])?.unwrap_or(default))
    }

    /// Whether layers have a bias: a flag in `config.json` (false where missing), or the tensor in a GGUF file.
    pub fn bias(&self, json: &'static str, gguf_tensor: &str) -> Result<bool, Error> {
        if self.is_gguf() {
            return Ok(self.tensor(gguf_tensor).is_some());
        }
        Ok(self.flag([json, ""])?.unwrap_or(false))
    }

    /// Query heads, key heads and head size; `head_dim` is `hidden_size / n_heads` where the file does not say.
    pub fn heads(&self, hidden_size: usize, default: Option<HeadDefaults>) -> Result<Heads, Error> {
        let key = ["num_attention_heads", "attention.head_count"];
        let from = |key: Key, default: Option<usize>| -> Result<Option<usize>, Error> {
            Ok(self.opt_size(key)?.or(default.filter(|_| !self.is_gguf())))
        };
        let n_heads = match from(key, default.map(|d| d.n_heads))? {
            Some(n) => n,
            None => self.size(key)?,
        };
        let kv_key = ["num_key_value_heads", "attention.head_count_kv"];
        let n_kv_heads = from(kv_key, default.map(|d| d.n_kv_heads))?.unwrap_or(n_heads);
        if !n_heads.is_multiple_of(n_kv_heads) {
            return Err(
                self.error(kv_key, format!("is {n_kv_heads}, which does not divide {n_heads} query heads"))
            );
        }
        let dim_key = ["head_dim", "attention.key_length"];
        let head_dim = match from(dim_key, default.map(|d| d.head_dim))? {
            Some(d) => d,
            None if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
            None => {
                let problem =
                    format!("is missing, and {hidden_size} channels cannot be shared by {n_heads} heads");
                return Err(self.error(dim_key, problem));
            }
        };
        for same in [["", "attention.value_length"], ["", "rope.dimension_count"]] {
            if let Some(n) = self.opt_size(same)?
                && n != head_dim
            {
                return Err(self
                    .error(same, format!("is {n}, heads have {head_dim}; only equal ones are implemented")));
            }
        }
        if let Some(part) = self.opt_real(["partial_rotary_factor", ""])?
            && part != 1.0
        {
            return Err(
                self.error(["partial_rotary_factor", ""], format!("is {part}; only 1 is implemented"))
            );
        }
        if head_dim % 2 == 1 || head_dim > MAX_HEAD_DIM || n_heads.saturating_mul(head_dim) > MAX_SIZE {
            let problem = format!(
                "is {head_dim} for {n_heads} heads; an even number up to {MAX_HEAD_DIM}, {MAX_SIZE} in all, is possible"
            );
            return Err(self.error(dim_key, problem));
        }
        Ok(Heads { n_heads, n_kv_heads, head_dim })
    }

    /// The sliding window of each layer, from the list in the file where there is one (`layer_types`, GGUF's
    /// `attention.sliding_window_pattern`); otherwise `sliding(i)` says which layers slide.
    pub fn windows(
        &self,
        n_layers: usize,
        window: Option<usize>,
        sliding: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>, Error> {
        let key = ["layer_types", "attention.sliding_window_pattern"];
        if let Some(slides) = self.gguf_flags(key) {
            if slides.len() != n_layers {
                return Err(
                    self.error(key, format!("lists {} layers, the model has {n_layers}", slides.len()))
                );
            }
            return Ok(slides.iter().map(|&slides| window.filter(|_| slides)).collect());
        }
        let Some(types) = self.json(key) else {
            return Ok((0..n_layers).map(|i| window.filter(|_| sliding(i))).collect());
        };
        let types = types.as_array().map(Vec::as_slice).unwrap_or_default();
        if types.len() != n_layers {
            return Err(self.error(key, format!("lists {} layers, the model has {n_layers}", types.len())));
        }
        let of = |v: &Value| match (v.as_str(), window) {
            (Some("full_attention"), _) => Ok(None),
            (Some("sliding_attention"), Some(w)) => Ok(Some(w)),
            (Some("sliding_attention"), None) => {
                Err(self.error(key, "has sliding layers, but sliding_window is missing"))
            }
            _ => Err(self
                .error(key, format!("has {v}; only full_attention and sliding_attention are implemented"))),
        };
        types.iter().map(of).collect()
    }

    /// One layer in how many is global: a number where the file has it, else `default`.
    pub fn window_pattern(&self, default: usize) -> Result<usize, Error> {
        let key = ["sliding_window_pattern", "attention.sliding_window_pattern"];
        if self.gguf_flags(key).is_some() { Ok(default) } else { Ok(self.opt_size(key)?.unwrap_or(default)) }
    }

    /// A list of flags in GGUF metadata.
    fn gguf_flags(&self, key: Key) -> Option<&'a [bool]> {
        match &self.world {
            World::Gguf { metadata, .. } => match metadata.get(&self.name(key)) {
                Some(gguf::Value::Array(gguf::Array::Bool(flags))) => Some(flags),
                _ => None,
            },
            World::Json { .. } => None,
        }
    }

    /// The rotary embedding. `config.json` may keep it in three ways: `rope_theta` with `rope_scaling`, or
    /// `rope_parameters`, or `rope_parameters` per `layer_type`. `default_base` is what the format defines where it is
    /// silent; GGUF's is 10000.
    pub fn rope(&self, layer_type: &str, heads: &Heads, context: usize) -> Result<RopeConfig, Error> {
        match &self.world {
            World::Gguf { .. } => self.rope_gguf(heads),
            World::Json { .. } => {
                let parameters = self.json(["rope_parameters", ""]);
                let nested = parameters.and_then(|p| p.get(layer_type)).filter(|p| p.is_object());
                self.rope_json(nested.or(parameters), heads.head_dim, context)
            }
        }
    }

    fn rope_json(
        &self,
        parameters: Option<&'a Value>,
        head_dim: usize,
        context: usize,
    ) -> Result<RopeConfig, Error> {
        let scaling = parameters.or(self.json(["rope_scaling", ""])).and_then(Value::as_object);
        let inner = scaling.map(|object| Fields {
            source: self.source,
            world: World::Json { object, at: self.name(["rope_scaling.", ""]) },
        });
        let base = match inner.as_ref().map(|s| s.opt_real(["rope_theta", ""])).transpose()?.flatten() {
            Some(base) => base,
            // Llama 2's published config.json has no rope_theta; transformers' LlamaConfig defines 10000.
            None => self.opt_real(["rope_theta", ""])?.unwrap_or(10000.0),
        };
        let Some(s) = inner else { return self.checked(base, Scaling::None) };
        let kind = s.text(["rope_type", ""])?.or(s.text(["type", ""])?);
        let original = |s: &Fields| -> Result<usize, Error> {
            Ok(s.opt_size(["original_max_position_embeddings", ""])?.unwrap_or(context))
        };
        let scaling = match kind.as_deref() {
            None | Some("default") => Scaling::None,
            Some("linear") => Scaling::Linear { factor: s.real(["factor", ""])? },
            Some("llama3") => Scaling::Llama3 {
                factor: s.real(["factor", ""])?,
                low_freq_factor: s.real(["low_freq_factor", ""])?,
                high_freq_factor: s.real(["high_freq_factor", ""])?,
                original_context: original(&s)?,
            },
            Some("longrope") => Scaling::Factors(s.factors(context, head_dim)?),
            Some("yarn") => {
                for key in ["mscale", "mscale_all_dim"] {
                    if s.opt_real([key, ""])?.is_some() {
                        return Err(s.error([key, ""], "is not implemented"));
                    }
                }
                s.only_flag(["truncate", ""], true)?;
                let factor = s.real(["factor", ""])?;
                let given = s.opt_real(["attention_factor", ""])?;
                Scaling::Yarn {
                    factor,
                    beta_fast: s.opt_real(["beta_fast", ""])?.unwrap_or(32.0),
                    beta_slow: s.opt_real(["beta_slow", ""])?.unwrap_or(1.0),
                    original_context: original(&s)?,
                    attention_factor: given.unwrap_or_else(|| yarn_attention_factor(factor)),
                }
            }
            Some(other) => {
                let known = "default, linear, llama3, yarn and longrope are implemented";
                return Err(s.error(["rope_type", ""], format!("is {other:?}; {known}")));
            }
        };
        self.checked(base, scaling)
    }

    /// LongRoPE's factors (Ding et al. 2024), of which one kind is implemented: the same for short and long texts, and
    /// no factor on sine and cosine. That is what a GGUF file's `rope_freqs.weight` means.
    fn factors(&self, context: usize, head_dim: usize) -> Result<Vec<f32>, Error> {
        let (short, long, attention) = (["short_factor", ""], ["long_factor", ""], ["attention_factor", ""]);
        let missing = || self.error(long, "is missing or no list");
        let list = self.json(long).and_then(Value::as_array).ok_or_else(missing)?;
        let half = head_dim / 2;
        if list.len() != half {
            return Err(self.error(long, format!("lists {} factors, heads need {half}", list.len())));
        }
        if self.json(short).and_then(Value::as_array) != Some(list) {
            return Err(self.error(long, "is not short_factor; only equal ones are implemented"));
        }
        let original = self.opt_size(["original_max_position_embeddings", ""])?.unwrap_or(context);
        let factor = self.opt_real(["factor", ""])?.unwrap_or(context as f64 / original as f64);
        match self.opt_real(attention)? {
            Some(1.0) => {}
            None if factor <= 1.0 => {}
            found => {
                let found = found.map_or("missing and not 1".into(), |x| x.to_string());
                return Err(self.error(attention, format!("is {found}; only 1 is implemented")));
            }
        }
        let positive = |v: &Value| {
            let x = v.as_f64()? as f32;
            (x.is_finite() && x > 0.0).then_some(x)
        };
        let factors: Option<Vec<f32>> = list.iter().map(positive).collect();
        factors.ok_or_else(|| self.error(long, "holds something that is no positive number"))
    }

    fn rope_gguf(&self, heads: &Heads) -> Result<RopeConfig, Error> {
        let base = self.opt_real(["", "rope.freq_base"])?.unwrap_or(10000.0);
        if let Some(t) = self.source.tensor("rope_freqs.weight") {
            let key = ["", "rope_freqs.weight"];
            let half = heads.head_dim / 2;
            let mut factors = vec![0f32; half];
            if t.info.shape != [half] || codec::decode(t.info.dtype, t.bytes, &mut factors).is_err() {
                let problem = format!("has shape {:?} ({}), heads need [{half}]", t.info.shape, t.info.dtype);
                return Err(self.error(key, problem));
            }
            if factors.iter().any(|&f| !(f.is_finite() && f > 0.0)) {
                return Err(self.error(key, "holds a factor that is not positive"));
            }
            return self.checked(base, Scaling::Factors(factors));
        }
        let factor = match self.opt_real(["", "rope.scaling.factor"])? {
            Some(f) => Some(f),
            None => self.opt_real(["", "rope.scale_linear"])?, // files from before 2023-10
        };
        let kind = self.text(["", "rope.scaling.type"])?;
        let scaling = match (kind.as_deref(), factor) {
            (Some("none"), _) | (None, None) => Scaling::None,
            (Some("linear") | None, Some(factor)) => Scaling::Linear { factor },
            (Some("linear"), None) => Scaling::Linear { factor: self.real(["", "rope.scaling.factor"])? },
            (Some("yarn"), _) => {
                let factor = self.real(["", "rope.scaling.factor"])?;
                let extra = self.opt_real(["", "rope.scaling.attn_factor"])?.unwrap_or(1.0);
                Scaling::Yarn {
                    factor,
                    beta_fast: self.opt_real(["", "rope.scaling.yarn_beta_fast"])?.unwrap_or(32.0),
                    beta_slow: self.opt_real(["", "rope.scaling.yarn_beta_slow"])?.unwrap_or(1.0),
                    original_context: self.size(["", "rope.scaling.original_context_length"])?,
                    attention_factor: extra * yarn_attention_factor(factor),
                }
            }
            (Some(other), _) => {
                let known = "none, linear and yarn are implemented";
                return Err(self.error(["", "rope.scaling.type"], format!("is {other:?}; {known}")));
            }
        };
        self.checked(base, scaling)
    }

    /// Refuses numbers from which no frequencies come.
    fn checked(&self, base: f64, scaling: Scaling) -> Result<RopeConfig, Error> {
        let positive = match &scaling {
            Scaling::None | Scaling::Factors(_) => true,
            Scaling::Linear { factor } => *factor > 0.0,
            Scaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, .. } => {
                *factor > 0.0 && *low > 0.0 && high > low
            }
            Scaling::Yarn { factor, beta_fast, beta_slow, attention_factor, .. } => {
                *factor > 0.0 && *beta_slow > 0.0 && beta_fast >= beta_slow && *attention_factor > 0.0
            }
        };
        if positive && base > 1.0 {
            return Ok(RopeConfig { base, scaling });
        }
        let problem = format!("with base {base} gives no frequencies: {scaling:?}");
        Err(self.error(["rope_scaling", "rope.scaling"], problem))
    }
}

/// Where the `config.json` of a safetensors model is.
fn config_json(source: &Source) -> PathBuf {
    let path = source.path();
    if path.is_dir() { path.join("config.json") } else { path.with_file_name("config.json") }
}

/// Heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

/// What transformers' configuration class says where `config.json` is silent.
pub(crate) type HeadDefaults = Heads;
