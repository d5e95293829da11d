//! The vocabulary of a GGUF file, checked: tokens with their kinds, special ids.

use crate::{Error, bytes};
use std::collections::HashMap;

/// The vocabulary as a GGUF file holds it, field by field; [`crate::Tokenizer::from_gguf`] checks
/// it. The comment of each field names its key in the file.
#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
    pub model: String,
    /// `tokenizer.ggml.pre`: the pre-tokeniser, needed for `gpt2`.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`: the token with id i at index i.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`, as long as `tokens` or empty: 1 normal, 2 unknown, 3 control,
    /// 4 user defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.scores`, as long as `tokens`; only `llama` needs them.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.merges`: two tokens with a space between them, best first; only `gpt2`
    /// needs them.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`: begins a text.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`: ends a text (in many chat models, a turn).
    pub eos: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`: ends a turn.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.eom_token_id`: ends a message that waits for a tool.
    pub eom: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`: stands for what the vocabulary lacks (`llama` only).
    pub unk: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`: fills up batches.
    pub pad: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`; without it the kind of vocabulary decides.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`; without it nothing is added.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`; without it, `llama` adds a space in front of a text.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`: the chat template.
    pub chat_template: Option<String>,
    /// `tokenizer.chat_template.NAME`: further templates by name.
    pub named_templates: Vec<(String, String)>,
}

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Kind {
    /// The number in `tokenizer.ggml.token_type`.
    pub fn to_gguf(self) -> i32 {
        match self {
            Kind::Normal => 1,
            Kind::Unknown => 2,
            Kind::Control => 3,
            Kind::UserDefined => 4,
            Kind::Unused => 5,
            Kind::Byte => 6,
        }
    }

    fn from_gguf(number: i32) -> Option<Kind> {
        Some(match number {
            1 => Kind::Normal,
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            5 => Kind::Unused,
            6 => Kind::Byte,
            _ => return None,
        })
    }
}

/// Texts of control tokens that end a turn in models whose file names only one end token.
///
/// A token of this list stops generation if the file declares it as a control token; `llama.cpp`
/// does the same.
const END_OF_TURN: [&str; 13] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "</s>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
];

/// Ids of special tokens.
#[derive(Clone, Debug, Default)]
pub(crate) struct SpecialIds {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unk: Option<u32>,
    pub pad: Option<u32>,
    /// End a turn, and a message that waits for a tool.
    pub eot: Option<u32>,
    pub eom: Option<u32>,
    /// All that end generation, the declared ones first.
    pub stop: Vec<u32>,
}

/// Whether a control token with this text ends a turn.
pub(crate) fn ends_turn(text: &str) -> bool {
    END_OF_TURN.contains(&text)
}

/// Checked tokens and their lookup by text.
pub(crate) struct Vocab {
    pub tokens: Vec<String>,
    pub kinds: Vec<Kind>,
    pub ids: HashMap<String, u32>,
}

fn bad<T>(what: String) -> Result<T, Error> {
    Err(Error::Vocabulary { what })
}

impl Vocab {
    /// Checks that lengths agree, that no token stands twice, and that special ids exist.
    pub fn new(
        tokens: Vec<String>,
        token_types: &[i32],
        specials: &[(&str, Option<u32>)],
    ) -> Result<Vocab, Error> {
        let n = tokens.len();
        if n == 0 {
            return bad("the vocabulary is empty (tokenizer.ggml.tokens)".into());
        }
        if n >= i32::MAX as usize {
            return bad(format!("the vocabulary has {n} tokens, more than ids can name"));
        }
        if !token_types.is_empty() && token_types.len() != n {
            return bad(format!("{n} tokens, but {} token types", token_types.len()));
        }
        let mut kinds = vec![Kind::Normal; n];
        for (id, &number) in token_types.iter().enumerate() {
            match Kind::from_gguf(number) {
                Some(kind) => kinds[id] = kind,
                None => return bad(format!("token {id} has the unknown type {number}")),
            }
        }
        for &(name, id) in specials {
            if let Some(id) = id
                && id as usize >= n
            {
                return bad(format!("the {name} id is {id}, but there are {n} tokens"));
            }
        }
        let mut ids = HashMap::with_capacity(n);
        for (id, token) in tokens.iter().enumerate() {
            // Some files fill gaps with empty tokens: these can only be decoded.
            if token.is_empty() {
                continue;
            }
            if let Some(first) = ids.insert(token.clone(), id as u32) {
                return bad(format!("tokens {first} and {id} are both {token:?}"));
            }
        }
        Ok(Vocab { tokens, kinds, ids })
    }

    /// Ids of tokens that end generation: the declared ones, then control tokens whose text says so.
    pub fn stop_ids(&self, declared: &[Option<u32>]) -> Vec<u32> {
        let mut stop: Vec<u32> = Vec::new();
        let known = END_OF_TURN
            .iter()
            .filter_map(|text| self.ids.get(*text).copied())
            .filter(|&id| self.kinds[id as usize] == Kind::Control);
        for id in declared.iter().flatten().copied().chain(known) {
            if !stop.contains(&id) {
                stop.push(id);
            }
        }
        stop
    }

    /// Whether decoding leaves the token out when asked to skip special ones.
    pub fn is_special(&self, id: u32) -> bool {
        matches!(self.kinds.get(id as usize), Some(Kind::Control | Kind::Unknown))
    }
}

/// The byte of a SentencePiece byte token such as `<0x0A>`.
pub(crate) fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

/// The bytes of a token of a byte-level vocabulary.
pub(crate) fn byte_level_bytes(token: &str, kind: Kind) -> Vec<u8> {
    match kind {
        // Special tokens are written as they are.
        Kind::Control | Kind::Unknown | Kind::UserDefined => token.as_bytes().to_vec(),
        Kind::Normal | Kind::Unused | Kind::Byte => {
            bytes::decode(token).unwrap_or_else(|| token.as_bytes().to_vec())
        }
    }
}
