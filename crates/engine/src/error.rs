//! What goes wrong between a file and its text.

use std::path::PathBuf;

/// Why a model cannot be loaded or asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are what the messages say
pub enum Error {
    /// The file cannot be read, or is damaged.
    #[error(transparent)]
    Format(#[from] sparsam_formats::Error),
    /// The configuration or the weights do not make a model.
    #[error(transparent)]
    Model(#[from] sparsam_models::Error),
    /// An adapter cannot be read, written or used with this model.
    #[error("{}: {what}", file.display())]
    Adapter { file: PathBuf, what: String },
    /// The vocabulary or the chat template cannot be used.
    #[error("{}: {source}", file.display())]
    Tokenizer { file: PathBuf, source: sparsam_tokenizer::Error },
    /// A model cannot be written as it is wanted.
    #[error("cannot write {}: {what}", path.display())]
    Save { path: PathBuf, what: String },
    /// A program does not compile or run.
    #[error(transparent)]
    Runtime(#[from] sparsam_runtime::Error),
    /// The model function does not trace: its configuration does not fit together.
    #[error(transparent)]
    Trace(#[from] sparsam_ir::TraceError),
    /// A value of the tokenizer's metadata is outside of what it may be.
    #[error("{}: {what}", file.display())]
    Vocabulary { file: PathBuf, what: String },
    /// Questions that cannot be read.
    #[error("{}: {what}", file.display())]
    Task { file: PathBuf, what: String },
    /// The model has no tokenizer, but text is asked of it.
    #[error(
        "{}: the model comes without a tokenizer ({wanted}), so it cannot read or write text; put the tokenizer that it was trained with beside it",
        file.display()
    )]
    NoTokenizer { file: PathBuf, wanted: &'static str },
    /// Dialogue is asked of a model that has no chat template.
    #[error(
        "{}: the model has no chat template, so a dialogue cannot be written as it was trained; give plain text to continue (--raw) or a template of your own (--chat-template FILE)",
        file.display()
    )]
    NoTemplate { file: PathBuf },
    /// More tokens than the context has room for.
    #[error(
        "the prompt has {tokens} tokens, the context has room for {room} of {context} (the rest is taken); shorten it, choose a larger --ctx (the model was made for {made_for}), or pass --truncate to drop its oldest tokens"
    )]
    TooLong { tokens: usize, room: usize, context: usize, made_for: usize },
    /// Nothing to continue.
    #[error("the prompt is empty and the model has no token that begins a text; give at least one word")]
    EmptyPrompt,
    /// The sampler got a setting outside of its range.
    #[error("{name} is {value}: {wanted}")]
    Setting { name: &'static str, value: f64, wanted: &'static str },
    /// A context that the model or its cache cannot have.
    #[error("{what}")]
    Context { what: String },
    /// A text with too few tokens to measure anything.
    #[error(
        "the text has {tokens} tokens, but the first window alone takes {wanted}; give a longer text or a smaller --ctx"
    )]
    TooShort { tokens: usize, wanted: usize },
    /// Token ids outside of the model's vocabulary.
    #[error(
        "token {id} is outside of the model's vocabulary of {vocab_size}; text and model do not belong together"
    )]
    TokenId { id: u32, vocab_size: usize },
    /// The model gave numbers that are none.
    #[error(
        "the model's logits are not finite after {tokens} tokens; its weights are damaged, or the file was rounded wrongly"
    )]
    NotFinite { tokens: usize },
    /// An answer that cannot keep to its rule.
    #[error("the answer cannot go on within its grammar: {why}")]
    Rule { why: String },
    /// All pages of the cache are taken.
    #[error(
        "the cache of {slots} tokens is full; finish other sequences first or load with a larger context"
    )]
    CacheFull { slots: usize },
}
