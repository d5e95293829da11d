//! `/v1/chat/completions`.

use crate::answer::{Collected, Format, Head, Piece, respond};
use crate::error::ApiError;
use crate::routes::App;
use crate::wire::{self, Common};
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use sparsam_engine::Logprob;
use sparsam_tokenizer::{RenderOptions, Tokenizer};
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Deserialize)]
struct ChatRequest {
    messages: Vec<Value>,
    max_completion_tokens: Option<u64>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    /// Further variables for the template, such as `enable_thinking` (vLLM's name).
    chat_template_kwargs: Option<serde_json::Map<String, Value>>,
    #[serde(flatten)]
    common: Common,
}

/// OpenAI's limit.
const MAX_TOP_LOGPROBS: usize = 20;

pub(crate) async fn handle(app: Arc<App>, body: Value) -> Result<Response, ApiError> {
    wire::refuse(
        &body,
        &[
            ("grammar", &[], "use response_format"),
            ("json_schema", &[], "use response_format"),
            ("functions", &[json!([])], "use tools, which replaced it"),
            ("function_call", &[], "use tool_choice, which replaced it"),
            ("modalities", &[json!(["text"])], "text is the only one"),
            ("audio", &[], "text is all that comes out"),
            ("prediction", &[], "leave it out"),
            ("web_search_options", &[], "leave it out"),
        ],
    )?;
    let request: ChatRequest = wire::parse(&body)?;
    let wanted = request.common.wanted(request.max_completion_tokens)?;
    if request.messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages is empty: at least one is wanted"));
    }
    let messages = request
        .messages
        .into_iter()
        .enumerate()
        .map(|(i, m)| message(i, m))
        .collect::<Result<Vec<_>, _>>()?;
    let tools = match request.tool_choice.as_ref().map(|c| c.as_str()) {
        Some(Some("none")) => Vec::new(),
        None | Some(Some("auto")) => request.tools.unwrap_or_default(),
        _ => return Err(ApiError::invalid("tool_choice", "tool_choice can be \"auto\" or \"none\" here")),
    };
    let top = request.top_logprobs.unwrap_or(0);
    if top > MAX_TOP_LOGPROBS {
        return Err(ApiError::invalid(
            "top_logprobs",
            format!("top_logprobs is {top}: at most {MAX_TOP_LOGPROBS}"),
        ));
    }
    if top > 0 && request.logprobs != Some(true) {
        return Err(ApiError::invalid("top_logprobs", "top_logprobs wants logprobs to be true"));
    }
    let n_logprobs = (request.logprobs == Some(true)).then_some(top);
    let has_tools = !tools.is_empty();
    if has_tools && wanted.grammar.is_some() {
        let message = "response_format and tools together are not possible here: choose one of them";
        return Err(ApiError::invalid("response_format", message));
    }
    let options = RenderOptions {
        add_generation_prompt: true,
        tools: if has_tools { tools.into() } else { Value::Null },
        variables: request.chat_template_kwargs.unwrap_or_default(),
        now: None,
    };
    let prompt = app.engine.encode_dialogue_with(&messages, &options)?;
    let format = Chat { tokenizer: app.engine.tokenizer()?.clone(), has_tools, held: BTreeMap::new() };
    respond(app, "chatcmpl", vec![prompt], wanted, n_logprobs, format).await
}

/// A message as templates expect it: text in one piece.
fn message(i: usize, mut message: Value) -> Result<Value, ApiError> {
    let wrong = |what: &str| ApiError::invalid("messages", format!("messages[{i}] {what}"));
    let fields = message.as_object_mut().ok_or_else(|| wrong("is no object with role and content"))?;
    if !fields.get("role").is_some_and(Value::is_string) {
        return Err(wrong("has no role"));
    }
    let content = match fields.get("content") {
        Some(Value::String(_)) => return Ok(message),
        // An assistant's message may consist of tool calls alone.
        None | Some(Value::Null) if fields.contains_key("tool_calls") => String::new(),
        None | Some(Value::Null) => return Err(wrong("has no content")),
        Some(Value::Array(parts)) => {
            let text = |part: &Value| match part.get("type").and_then(Value::as_str) {
                Some("text") => part.get("text").and_then(Value::as_str).map(str::to_string),
                _ => None,
            };
            let texts: Option<Vec<String>> = parts.iter().map(text).collect();
            texts.ok_or_else(|| wrong("holds parts that are no text; the model reads only text"))?.concat()
        }
        Some(_) => return Err(wrong("has content that is neither text nor a list of parts")),
    };
    fields.insert("content".into(), content.into());
    Ok(message)
}

struct Chat {
    tokenizer: Tokenizer,
    has_tools: bool,
    /// Texts that may be tool calls, which are read when they are whole.
    held: BTreeMap<usize, String>,
}

impl Format for Chat {
    fn whole(&self, head: &Head, answers: &[Collected], usage: Value) -> Value {
        let choice = |(index, a): (usize, &Collected)| {
            let (message, finish) = self.message(&head.id, &a.text, a.finish);
            let logprobs = (!a.logprobs.is_empty()).then(|| {
                let content: Vec<Value> = a.logprobs.iter().map(|(t, l)| self.logprob(*t, l)).collect();
                json!({"content": content, "refusal": null})
            });
            json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
        };
        json!({
            "id": head.id, "object": "chat.completion", "created": head.created, "model": head.model,
            "choices": answers.iter().enumerate().map(choice).collect::<Vec<_>>(), "usage": usage,
        })
    }

    fn opening(&self, head: &Head, index: usize) -> Option<Value> {
        Some(chunk(head, index, json!({"role": "assistant", "content": ""}), Value::Null, None))
    }

    fn chunk(&mut self, head: &Head, p: &Piece) -> Option<Value> {
        let logprobs =
            p.logprob.as_ref().map(|l| json!({"content": [self.logprob(p.token, l)], "refusal": null}));
        let logprobs = logprobs.unwrap_or(Value::Null);
        if !self.has_tools {
            let delta = if p.text.is_empty() { json!({}) } else { json!({"content": p.text}) };
            return Some(chunk(head, p.index, delta, logprobs, p.finish));
        }
        let held = self.held.entry(p.index).or_default();
        *held += &p.text;
        let finish = p.finish?;
        let text = self.held.remove(&p.index).unwrap_or_default();
        let (mut delta, finish) = self.message(&head.id, &text, finish);
        if let Some(calls) = delta.get_mut("tool_calls").and_then(Value::as_array_mut) {
            for (i, call) in calls.iter_mut().enumerate() {
                call["index"] = i.into();
            }
        }
        Some(chunk(head, p.index, delta, logprobs, Some(finish)))
    }

    fn usage(&self, head: &Head, usage: Value) -> Value {
        json!({
            "id": head.id, "object": "chat.completion.chunk", "created": head.created, "model": head.model,
            "choices": [], "usage": usage,
        })
    }
}

fn chunk(head: &Head, index: usize, delta: Value, logprobs: Value, finish: Option<&str>) -> Value {
    json!({
        "id": head.id, "object": "chat.completion.chunk", "created": head.created, "model": head.model,
        "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}],
    })
}

impl Chat {
    /// The assistant's message, with calls of tools taken out of the text, and why it ended.
    fn message(&self, id: &str, text: &str, finish: &'static str) -> (Value, &'static str) {
        if self.has_tools
            && let Some((before, calls)) = tool_calls(text)
        {
            let calls: Vec<Value> = calls
                .into_iter()
                .enumerate()
                .map(|(i, (name, arguments))| {
                    let id = format!("call_{}_{i}", id.trim_start_matches("chatcmpl-"));
                    json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
                })
                .collect();
            let content = if before.is_empty() { Value::Null } else { before.into() };
            return (json!({"role": "assistant", "content": content, "tool_calls": calls}), "tool_calls");
        }
        (json!({"role": "assistant", "content": text}), finish)
    }

    fn logprob(&self, token: u32, l: &Logprob) -> Value {
        let one = |token: u32, logprob: f32| {
            let bytes = self.tokenizer.token_bytes(token).unwrap_or_default();
            json!({"token": String::from_utf8_lossy(&bytes), "logprob": logprob, "bytes": bytes})
        };
        let mut value = one(token, l.logprob);
        value["top_logprobs"] = l.top.iter().map(|&(t, p)| one(t, p)).collect();
        value
    }
}

/// Calls as most open models write them (Hermes, Qwen, SmolLM2): JSON between `<tool_call>` tags, one object or a
/// list; and the text before. `None` if there is no well-formed call.
fn tool_calls(text: &str) -> Option<(String, Vec<(String, String)>)> {
    let (before, mut rest) = text.split_once("<tool_call>")?;
    let mut calls = Vec::new();
    loop {
        let (inside, after) = rest.split_once("</tool_call>").unwrap_or((rest, ""));
        let value: Value = serde_json::from_str(inside.trim()).ok()?;
        let list = match value {
            Value::Array(list) => list,
            one => vec![one],
        };
        for call in list {
            let name = call.get("name")?.as_str()?.to_string();
            let arguments = call.get("arguments").cloned().unwrap_or_else(|| json!({}));
            calls.push((name, arguments.to_string()));
        }
        match after.split_once("<tool_call>") {
            Some((_, next)) => rest = next,
            None => break,
        }
    }
    (!calls.is_empty()).then(|| (before.trim().to_string(), calls))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_tools_are_read_and_broken_ones_stay_text() {
        let one = r#"Let me see. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>"#;
        assert_eq!(tool_calls(one), Some(("Let me see.".into(), vec![("add".into(), r#"{"a":1}"#.into())])));
        let two = "<tool_call>\n[{\"name\": \"f\"}, {\"name\": \"g\", \"arguments\": {}}]\n</tool_call>";
        let names: Vec<String> = tool_calls(two).unwrap().1.into_iter().map(|c| c.0).collect();
        assert_eq!(names, ["f", "g"]);
        assert_eq!(tool_calls("<tool_call>{\"name\": </tool_call>"), None);
        assert_eq!(tool_calls("no call at all"), None);
    }

    #[test]
    fn messages_become_plain_text_or_are_refused_by_number() {
        let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
        assert_eq!(message(0, parts).unwrap()["content"], "ab");
        let calls = json!({"role": "assistant", "content": null, "tool_calls": []});
        assert_eq!(message(0, calls).unwrap()["content"], "");
        for bad in [
            json!("hi"),
            json!({"content": "hi"}),
            json!({"role": "user"}),
            json!({"role": "user", "content": 7}),
        ] {
            assert!(message(3, bad).unwrap_err().message.starts_with("messages[3]"));
        }
        let image = json!({"role": "user", "content": [{"type": "image_url", "image_url": {}}]});
        assert!(message(0, image).unwrap_err().message.contains("only text"));
    }
}
