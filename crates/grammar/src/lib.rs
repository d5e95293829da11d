//! Answers that keep to a JSON schema or a grammar: before each token is chosen, those that cannot continue the text are
//! taken out.
//!
//! The work is llguidance's: an Earley parser whose lexer is made of derivatives of regular expressions, and which walks
//! along a trie of the vocabulary's bytes. Here are the words between it and the engine, which knows only
//! [`sparsam_engine::Rule`]s. It takes about half a minute of one core to build; without the feature `llguidance` every grammar is
//! refused. Start at [`Grammars`].
#![forbid(unsafe_code)]

#[cfg(feature = "llguidance")]
mod guided;
#[cfg(not(feature = "llguidance"))]
mod without;

#[cfg(feature = "llguidance")]
pub use guided::Grammars;
#[cfg(not(feature = "llguidance"))]
pub use without::Grammars;

use serde_json::{Value, json};

/// What an answer must look like.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// JSON that fits this JSON Schema. Between values stand `, ` and `: ` and nothing else, unless the schema has
    /// llguidance's key `x-guidance`.
    JsonSchema(Value),
    /// A text of this grammar, in llguidance's variant of Lark's language.
    Lark(String),
}

impl Grammar {
    /// Any JSON object.
    pub fn json_object() -> Grammar {
        Grammar::JsonSchema(json!({"type": "object"}))
    }
}

/// Why a grammar cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} cannot be used: {why}")]
pub struct Error {
    /// The JSON schema, the grammar or the vocabulary.
    pub what: &'static str,
    /// What is wrong with it.
    pub why: String,
}
