//! Requests as OpenAI's clients send them. Unknown fields that change nothing are ignored; fields that mean something
//! we do not do are refused, never silently dropped.

use crate::error::ApiError;
use serde::Deserialize;
use serde_json::Value;
use sparsam_engine::Sampling;
use sparsam_grammar::Grammar;
use std::collections::BTreeMap;

/// One text or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    pub fn into_vec(self) -> Vec<String> {
        match self {
            OneOrMany::One(text) => vec![text],
            OneOrMany::Many(texts) => texts,
        }
    }
}

/// What both kinds of completion have in common. Defaults are OpenAI's.
#[derive(Debug, Deserialize)]
pub(crate) struct Common {
    max_tokens: Option<u64>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    /// Ours and llama.cpp's.
    top_k: Option<usize>,
    min_p: Option<f32>,
    repeat_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    n: Option<usize>,
    pub seed: Option<i64>,
    stop: Option<OneOrMany>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    ignore_eos: Option<bool>,
    response_format: Option<ResponseFormat>,
}

#[derive(Debug, Default, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// What an answer must look like.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: NamedSchema },
}

/// A schema; its name, description and `strict` change nothing: it is always kept to.
#[derive(Debug, Deserialize)]
struct NamedSchema {
    schema: Option<Value>,
}

impl ResponseFormat {
    fn grammar(&self) -> Option<Grammar> {
        match self {
            ResponseFormat::Text => None,
            ResponseFormat::JsonSchema { json_schema: NamedSchema { schema: Some(schema) } } => {
                Some(Grammar::JsonSchema(schema.clone()))
            }
            // OpenAI's clients may leave the schema out.
            ResponseFormat::JsonObject | ResponseFormat::JsonSchema { .. } => Some(Grammar::json_object()),
        }
    }
}

/// Answers to one prompt.
pub(crate) struct Wanted {
    pub sampling: Sampling,
    pub max_tokens: Option<usize>,
    pub stops: Vec<String>,
    pub n: usize,
    pub stream: bool,
    pub stream_usage: bool,
    pub ignore_end: bool,
    pub grammar: Option<Grammar>,
}

/// Most answers to one prompt.
const MAX_N: usize = 32;
/// OpenAI's limits.
const MAX_STOPS: usize = 16;

impl Common {
    /// Checked, with `max_completion_tokens` if it goes by that name.
    pub fn wanted(&self, max_completion_tokens: Option<u64>) -> Result<Wanted, ApiError> {
        let n = self.n.unwrap_or(1);
        if !(1..=MAX_N).contains(&n) {
            return Err(ApiError::invalid("n", format!("n is {n}: from 1 to {MAX_N} answers are possible")));
        }
        let max_tokens = max_completion_tokens.or(self.max_tokens);
        if max_tokens == Some(0) {
            return Err(ApiError::invalid("max_tokens", "max_tokens is 0: at least 1 is wanted"));
        }
        let stops = self.stop.clone().map(OneOrMany::into_vec).unwrap_or_default();
        if stops.len() > MAX_STOPS {
            return Err(ApiError::invalid(
                "stop",
                format!("{} stop texts: at most {MAX_STOPS} are possible", stops.len()),
            ));
        }
        let mut logit_bias = Vec::new();
        for (id, &bias) in self.logit_bias.iter().flatten() {
            let Ok(id) = id.parse() else {
                return Err(ApiError::invalid("logit_bias", format!("logit_bias: {id:?} is no token id")));
            };
            if !(-100.0..=100.0).contains(&bias) {
                return Err(ApiError::invalid(
                    "logit_bias",
                    format!("logit_bias: {bias} is not between -100 and 100"),
                ));
            }
            logit_bias.push((id, bias));
        }
        let clock = || std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_nanos() as u64);
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_p: self.top_p.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(0),
            min_p: self.min_p.unwrap_or(0.0),
            repeat_penalty: self.repeat_penalty.unwrap_or(1.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            logit_bias,
            seed: self.seed.map_or_else(clock, |s| s as u64),
            ..Sampling::default()
        };
        sampling.check()?;
        let stream = self.stream.unwrap_or(false);
        Ok(Wanted {
            sampling,
            max_tokens: max_tokens.map(|n| n.min(u32::MAX as u64) as usize),
            stops,
            n,
            stream,
            stream_usage: stream
                && self.stream_options.as_ref().is_some_and(|o| o.include_usage == Some(true)),
            ignore_end: self.ignore_eos.unwrap_or(false),
            grammar: self.response_format.as_ref().and_then(ResponseFormat::grammar),
        })
    }
}

/// Refuses fields that are set to something that we do not do.
pub(crate) fn refuse(body: &Value, fields: &[(&'static str, &[Value], &str)]) -> Result<(), ApiError> {
    for (name, harmless, advice) in fields {
        let value = body.get(name).unwrap_or(&Value::Null);
        if !value.is_null() && !harmless.contains(value) {
            return Err(ApiError::invalid(*name, format!("{name} is not supported here: {advice}")));
        }
    }
    Ok(())
}

/// `body` as `T`, with an error that names the field.
pub(crate) fn parse<T: for<'a> Deserialize<'a>>(body: &Value) -> Result<T, ApiError> {
    T::deserialize(body)
        .map_err(|e| ApiError::invalid(None, format!("the request is not as it should be: {e}")))
}
