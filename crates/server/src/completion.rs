//! `/v1/completions`: plain text continued.

use crate::answer::{Collected, Format, Head, Piece, respond};
use crate::error::ApiError;
use crate::routes::App;
use crate::wire::{self, Common};
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use sparsam_engine::Logprob;
use sparsam_tokenizer::Tokenizer;
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Deserialize)]
struct CompletionRequest {
    prompt: Prompt,
    logprobs: Option<usize>,
    #[serde(flatten)]
    common: Common,
}

/// A text, a list of texts, token ids, or lists of token ids.
#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    ManyIds(Vec<Vec<u32>>),
}

/// OpenAI's limit.
const MAX_LOGPROBS: usize = 5;
/// OpenAI's default, which is small; a completion without it would run to the end of the context.
const DEFAULT_MAX_TOKENS: usize = 16;
/// Prompts in one request.
const MAX_PROMPTS: usize = 64;

pub(crate) async fn handle(app: Arc<App>, body: Value) -> Result<Response, ApiError> {
    wire::refuse(
        &body,
        &[
            ("echo", &[json!(false)], "the prompt is not repeated"),
            ("suffix", &[json!("")], "text is only continued, not filled in"),
            ("grammar", &[], "use response_format"),
            ("json_schema", &[], "use response_format"),
            ("best_of", &[json!(1)], "use n and choose yourself"),
        ],
    )?;
    let request: CompletionRequest = wire::parse(&body)?;
    let mut wanted = request.common.wanted(None)?;
    wanted.max_tokens.get_or_insert(DEFAULT_MAX_TOKENS);
    if request.logprobs.is_some_and(|n| n > MAX_LOGPROBS) {
        return Err(ApiError::invalid("logprobs", format!("logprobs: at most {MAX_LOGPROBS} are possible")));
    }
    let encode = |text: &String| app.engine.encode(text);
    let prompts = match &request.prompt {
        Prompt::Text(text) => vec![encode(text)?],
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::Ids(ids) => vec![ids.clone()],
        Prompt::ManyIds(lists) => lists.clone(),
    };
    if !(1..=MAX_PROMPTS).contains(&prompts.len()) {
        return Err(ApiError::invalid(
            "prompt",
            format!("{} prompts: from 1 to {MAX_PROMPTS} are possible", prompts.len()),
        ));
    }
    let format = Completion { tokenizer: app.engine.tokenizer()?.clone(), offsets: BTreeMap::new() };
    respond(app, "cmpl", prompts, wanted, request.logprobs, format).await
}

struct Completion {
    tokenizer: Tokenizer,
    /// Length of each answer's text so far, in characters.
    offsets: BTreeMap<usize, usize>,
}

impl Format for Completion {
    fn whole(&self, head: &Head, answers: &[Collected], usage: Value) -> Value {
        let choice = |(index, a): (usize, &Collected)| {
            let logprobs = (!a.logprobs.is_empty()).then(|| self.logprobs(&a.logprobs, 0));
            json!({"index": index, "text": a.text, "logprobs": logprobs, "finish_reason": a.finish})
        };
        let choices: Vec<Value> = answers.iter().enumerate().map(choice).collect();
        let mut value = self.chunk_of(head, choices);
        value["usage"] = usage;
        value
    }

    fn opening(&self, _: &Head, _: usize) -> Option<Value> {
        None
    }

    fn chunk(&mut self, head: &Head, p: &Piece) -> Option<Value> {
        let offset = *self.offsets.get(&p.index).unwrap_or(&0);
        let logprobs = p.logprob.clone().map(|l| self.logprobs(&[(p.token, l)], offset));
        self.offsets.insert(p.index, offset + self.text(p.token).chars().count());
        let choice =
            json!({"index": p.index, "text": p.text, "logprobs": logprobs, "finish_reason": p.finish});
        Some(self.chunk_of(head, vec![choice]))
    }

    fn usage(&self, head: &Head, usage: Value) -> Value {
        let mut value = self.chunk_of(head, Vec::new());
        value["usage"] = usage;
        value
    }
}

impl Completion {
    fn chunk_of(&self, head: &Head, choices: Vec<Value>) -> Value {
        json!({"id": head.id, "object": "text_completion", "created": head.created, "model": head.model, "choices": choices})
    }

    fn text(&self, token: u32) -> String {
        String::from_utf8_lossy(&self.tokenizer.token_bytes(token).unwrap_or_default()).into_owned()
    }

    fn logprobs(&self, tokens: &[(u32, Logprob)], mut offset: usize) -> Value {
        let mut offsets = Vec::new();
        for (token, _) in tokens {
            offsets.push(offset);
            offset += self.text(*token).chars().count();
        }
        let top = |l: &Logprob| -> serde_json::Map<String, Value> {
            l.top.iter().map(|&(t, p)| (self.text(t), json!(p))).collect()
        };
        json!({
            "tokens": tokens.iter().map(|(t, _)| self.text(*t)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|(_, l)| l.logprob).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(|(_, l)| top(l)).collect::<Vec<_>>(),
            "text_offset": offsets,
        })
    }
}
