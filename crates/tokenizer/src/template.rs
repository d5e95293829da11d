//! Chat templates: Jinja as transformers runs it, in a sandbox.
//!
//! A template comes with a model, from strangers: it sees the messages and the special tokens'
//! texts and nothing else, and the number of its steps is bounded.

mod clock;
mod python;

use crate::Error;
use crate::vocab::SpecialIds;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, State, Value};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::SystemTime;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role` saying `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// What a template is told besides the messages.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions {
    /// End with the opening of the assistant's next message.
    pub add_generation_prompt: bool,
    /// Functions that the model may call, as JSON schemas (`tools`); null without.
    pub tools: serde_json::Value,
    /// Further variables that some templates know, such as `enable_thinking`.
    pub variables: serde_json::Map<String, serde_json::Value>,
    /// What `strftime_now` takes for now (in UTC); the clock if nothing is given.
    pub now: Option<SystemTime>,
}

/// Texts of special tokens by the names that templates use (`bos_token`, ..).
#[derive(Clone, Debug, Default)]
pub(crate) struct SpecialTexts(pub Vec<(String, String)>);

impl SpecialTexts {
    pub fn from_ids(ids: &SpecialIds, token: impl Fn(u32) -> Option<String>) -> SpecialTexts {
        let named = [
            ("bos_token", ids.bos),
            ("eos_token", ids.eos),
            ("unk_token", ids.unk),
            ("pad_token", ids.pad),
            ("eot_token", ids.eot),
            ("eom_token", ids.eom),
        ];
        SpecialTexts(
            named.into_iter().filter_map(|(name, id)| Some((name.to_string(), token(id?)?))).collect(),
        )
    }
}

/// A chat template with the special tokens that it may name.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: Arc<str>,
    texts: SpecialTexts,
}

/// Steps that any template may take, and further ones for each message and each 64 bytes of what
/// it is given. The longest published templates take a few hundred steps a message; this many
/// run in a few hundredths of a second.
const STEPS: u64 = 200_000;
const STEPS_A_MESSAGE: u64 = 1_000;
const STEPS_A_64_BYTES: u64 = 20;

/// Longer templates are refused (the longest published ones have about 20 kB).
const MAX_SOURCE_BYTES: usize = 128 << 10;

/// Stack for reading a template, whose parts may nest as deep as its length allows, and for each
/// step, which may put one value into another: letting go of nested values takes stack too.
const STACK_BYTES: usize = 64 << 20;
const STACK_BYTES_A_STEP: usize = 512;

/// Macros calling macros: each level costs stack, threads have 2 MiB.
const MAX_CALLS: usize = 48;

/// The error that `raise_exception` makes, to be told from others.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplate {
    pub(crate) fn new(source: String, texts: SpecialTexts) -> ChatTemplate {
        ChatTemplate { source: source.into(), texts }
    }

    /// The template as the model's file holds it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The conversation as the text that the model was trained on. Encode it with special tokens
    /// parsed and none added.
    ///
    /// Messages may be [`Message`]s or anything else that serialises to objects with `role` and
    /// `content`, such as JSON values that carry tool calls.
    ///
    /// # Errors
    /// [`Error::Template`] if the template is not valid or fails, [`Error::Refused`] if it
    /// refuses the messages itself, [`Error::TemplateLimit`] if it does not end.
    pub fn render<M: Serialize>(&self, messages: &[M], options: &RenderOptions) -> Result<String, Error> {
        let given =
            serde_json::to_value(messages).map_err(|e| Error::Template { what: format!("messages: {e}") })?;
        let bytes = json_bytes(&given)
            + json_bytes(&options.tools)
            + options.variables.values().map(json_bytes).sum::<u64>();
        let steps = STEPS
            + STEPS_A_MESSAGE.saturating_mul(messages.len() as u64)
            + STEPS_A_64_BYTES.saturating_mul(bytes / 64);
        let mut variables = serde_json::Map::new();
        for (name, text) in &self.texts.0 {
            variables.insert(name.clone(), text.clone().into());
        }
        variables.insert("messages".into(), given);
        variables.insert("add_generation_prompt".into(), options.add_generation_prompt.into());
        variables.insert("tools".into(), options.tools.clone());
        variables.insert("documents".into(), serde_json::Value::Null);
        variables.extend(options.variables.clone());

        if self.source.len() > MAX_SOURCE_BYTES {
            let what = format!("has {} bytes, more than {MAX_SOURCE_BYTES}", self.source.len());
            return Err(Error::Template { what });
        }
        let source = without_generation_tags(&self.source);
        let render = || {
            let env = environment(steps, options.now);
            env.template_from_str(&source)?.render(Value::from(Serde(&variables)))
        };
        // Its own thread for the stack's sake; only what is touched of it takes memory.
        let stack = (steps as usize).saturating_mul(STACK_BYTES_A_STEP).saturating_add(STACK_BYTES);
        let no_thread = |e| Error::Template { what: format!("no thread to run it: {e}") };
        let rendered = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("chat template".into());
            let thread = thread
                .stack_size(stack)
                .spawn_scoped(scope, || render().map_err(|e: minijinja::Error| explain(&e, steps)));
            Ok(thread.map_err(no_thread)?.join())
        })?;
        rendered.unwrap_or_else(|_| Err(Error::Template { what: "the template engine failed on it".into() }))
    }
}

/// Bytes of text in a JSON value, with a few for each element.
fn json_bytes(value: &serde_json::Value) -> u64 {
    use serde_json::Value::{Array, Bool, Null, Number, Object, String};
    8 + match value {
        Null | Bool(_) | Number(_) => 0,
        String(text) => text.len() as u64,
        Array(list) => list.iter().map(json_bytes).sum(),
        Object(map) => map.iter().map(|(k, v)| k.len() as u64 + json_bytes(v)).sum(),
    }
}

fn explain(error: &minijinja::Error, steps: u64) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return Error::Refused { message: message.clone() };
        }
        if inner.downcast_ref::<minijinja::Error>().is_some_and(|e| e.kind() == ErrorKind::OutOfFuel) {
            return Error::TemplateLimit { steps };
        }
        cause = inner.source();
    }
    // The engine appends its own name for a template without one.
    let what = error.to_string().replace(" (in <string>:", " (line ");
    Error::Template { what }
}

fn environment(steps: u64, now: Option<SystemTime>) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_fuel(Some(steps));
    env.set_debug(false);
    env.set_recursion_limit(MAX_CALLS);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("the default delimiters are valid"));
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    // Jinja prints values as Python does.
    env.set_formatter(|out, state, value| {
        if matches!(value.kind(), ValueKind::String) {
            return minijinja::escape_formatter(out, state, value);
        }
        let text = python::text(state, value)?;
        out.write_str(&text).map_err(|_| ErrorKind::WriteFailure.into())
    });
    env.add_filter("string", |state: &State, value: Value| match value.kind() {
        ValueKind::String => Ok(value),
        _ => python::text(state, &value).map(Value::from),
    });
    env.add_filter("tojson", |state: &State, value: Value, args: Kwargs| {
        let text = python::json(state, &value, &args)?;
        args.assert_all_used()?;
        Ok::<_, minijinja::Error>(Value::from(text))
    });
    env.add_function("raise_exception", |message: Value| -> Result<Value, minijinja::Error> {
        let message = message.as_str().map_or_else(|| message.to_string(), str::to_string);
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception")
            .with_source(Raised(message)))
    });
    env.add_function("strftime_now", move |state: &State, format: &str, rest: Rest<Value>| {
        if !rest.is_empty() {
            return Err(ErrorKind::TooManyArguments.into());
        }
        state.consume_fuel(format.len() as u64)?;
        clock::format(now.unwrap_or_else(SystemTime::now), format)
            .map_err(|what| minijinja::Error::new(ErrorKind::InvalidOperation, what))
    });
    env
}

/// The template with `{% generation %}` and `{% endgeneration %}`, which mark what training
/// learns from, turned into blocks that do nothing (with the same effect on white space).
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(length) = rest[open..].find("%}") else { break };
        let (before, tag) = rest.split_at(open);
        let (tag, after) = tag.split_at(length + 2);
        let inside = &tag[2..tag.len() - 2];
        let mark = |c: Option<char>| c.filter(|c| matches!(c, '-' | '+'));
        let (left, right) = (mark(inside.chars().next()), mark(inside.chars().next_back()));
        out.push_str(before);
        let replaced = match inside.trim_matches(['-', '+']).trim() {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        match replaced {
            Some(word) => {
                out.push_str("{%");
                out.extend(left);
                out.push(' ');
                out.push_str(word);
                out.push(' ');
                out.extend(right);
                out.push_str("%}");
                rest = after;
            }
            None => {
                // Only the opening is passed over: `{%` may stand in a text or a comment.
                out.push_str("{%");
                rest = &rest[open + 2..];
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests;
