use thiserror::Error;

/// What can go wrong with a vocabulary, a text or a template.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A GGUF vocabulary contradicts itself or lacks something.
    #[error("tokenizer: {what}; the file is damaged or was converted wrongly, convert or download it again")]
    Vocabulary {
        /// What contradicts what, with the numbers.
        what: String,
    },
    /// A kind of vocabulary that is not implemented.
    #[error(
        "tokenizer: vocabularies of the kind `{model}` (tokenizer.ggml.model) are not supported; supported are gpt2 (byte-level BPE) and llama (SentencePiece)"
    )]
    UnknownModel {
        /// The kind's name in the file.
        model: String,
    },
    /// A pre-tokeniser that is not implemented.
    #[error(
        "tokenizer: the pre-tokeniser `{name}` (tokenizer.ggml.pre) is not supported, and another one would give other tokens than the model was trained on; supported are {known}"
    )]
    UnknownPre {
        /// The pre-tokeniser's name in the file.
        name: String,
        /// The names that are supported.
        known: &'static str,
    },
    /// A `tokenizer.json` or `tokenizer_config.json` that cannot be used.
    #[error("{file}: {what}")]
    Json {
        /// The file's usual name.
        file: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// Another form of file cannot hold this tokenizer.
    #[error("tokenizer: {form} cannot hold it: {what}; keep the form that it came in")]
    Unrepresentable {
        /// The form of file.
        form: &'static str,
        /// What has no place there.
        what: String,
    },
    /// Text for which the vocabulary has no tokens.
    #[error("tokenizer: the vocabulary has no token for {character:?} (U+{:04X}, byte {at} of the text); remove it from the text or use a model that knows it", u32::from(*.character))]
    NoToken {
        /// The character.
        character: char,
        /// Where it stands, in bytes from the start of the text.
        at: usize,
    },
    /// The tokenizer library failed on a text.
    #[error("tokenizer: encoding failed: {what}")]
    Encode {
        /// The library's words.
        what: String,
    },
    /// The chat template is not valid, or failed on these messages.
    #[error("chat template: {what}")]
    Template {
        /// The engine's words, with the line in the template.
        what: String,
    },
    /// The chat template itself refused these messages (`raise_exception`).
    #[error("chat template: refuses these messages: {message}")]
    Refused {
        /// The template's words.
        message: String,
    },
    /// The chat template ran for longer than any honest one would.
    #[error(
        "chat template: stopped after {steps} steps; it loops without end or was made to exhaust the machine, use another template"
    )]
    TemplateLimit {
        /// How many steps it was given.
        steps: u64,
    },
}
