//! `tokenizer.json` and `tokenizer_config.json`, through the `tokenizers` crate.
//!
//! The crate trusts its files in places (a merge longer than every token ends in a panic), so the
//! file is checked here before the crate sees it.

use crate::vocab::{Kind, SpecialIds, byte_level_bytes, byte_token, ends_turn};
use crate::{Error, Specials};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::HashSet;
use tokenizers::tokenizer::{Model, PreTokenizer};
use tokenizers::{AddedVocabulary, OffsetType, Tokenizer as Inner};

const FILE: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";

/// Nesting of normalisers, pre-tokenisers and decoders that are lists of such.
const MAX_DEPTH: usize = 16;

pub(crate) struct Json {
    inner: Inner,
    /// The added tokens without the special ones.
    plain: AddedVocabulary,
    writing: Writing,
    vocab_size: usize,
}

/// How the vocabulary writes bytes, by the decoder's parts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Writing {
    /// One character of the byte alphabet for each byte.
    ByteLevel,
    /// Text with `▁` for the space; `<0x0A>` may stand for a byte.
    Pieces { byte_fallback: bool },
    /// Text in some other way.
    Text,
}

impl Writing {
    fn of(decoder: Option<&Value>) -> Writing {
        fn has(value: &Value, kind: &str) -> bool {
            value.get("type").and_then(Value::as_str) == Some(kind)
                || value
                    .get("decoders")
                    .and_then(Value::as_array)
                    .is_some_and(|list| list.iter().any(|inner| has(inner, kind)))
        }
        match decoder {
            Some(d) if has(d, "ByteLevel") => Writing::ByteLevel,
            Some(d) if has(d, "Metaspace") || has(d, "ByteFallback") => {
                Writing::Pieces { byte_fallback: has(d, "ByteFallback") }
            }
            _ => Writing::Text,
        }
    }
}

/// What `tokenizer_config.json` adds.
#[derive(Default)]
pub(crate) struct Config {
    pub special_texts: Vec<(String, String)>,
    pub templates: Vec<(String, String)>,
}

fn bad<T>(file: &'static str, what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Json { file, what: what.into() })
}

impl Json {
    /// Reads and checks a `tokenizer.json`.
    pub fn new(bytes: &[u8]) -> Result<Json, Error> {
        let value: Value = serde_json::from_slice(bytes)
            .or_else(|e| bad(FILE, format!("not valid JSON: {e}; download it again")))?;
        check(&value)?;
        let writing = Writing::of(value.get("decoder"));
        let added = value.get("added_tokens").cloned();
        let mut inner = Inner::deserialize(value).or_else(|e| bad(FILE, format!("cannot be used: {e}")))?;
        // The crate gives an added token another id where the file leaves a gap before it.
        for token in added.iter().flat_map(|list| list.as_array()).flatten() {
            let (id, text) = (token["id"].as_u64(), token["content"].as_str().unwrap_or_default());
            let found = inner.token_to_id(text).map(u64::from);
            if found != id {
                let what = format!(
                    "the added token {text:?} has the id {id:?}, but {found:?} follows from the vocabulary"
                );
                return bad(FILE, what);
            }
        }
        // Both would cut or fill texts behind the caller's back.
        inner.with_truncation(None).or_else(|e| bad(FILE, e.to_string()))?;
        inner.with_padding(None);
        let mut plain = inner.get_added_vocabulary().clone();
        plain.set_encode_special_tokens(true);
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        if vocab_size == 0 {
            return bad(FILE, "the vocabulary is empty");
        }
        Ok(Json { inner, plain, writing, vocab_size })
    }

    /// The file again; texts are neither cut nor filled up.
    pub fn to_value(&self) -> Result<Value, Error> {
        serde_json::to_value(&self.inner).or_else(|e| bad(FILE, format!("cannot be written: {e}")))
    }

    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, Error> {
        let failed = |e: tokenizers::Error| Error::Encode { what: e.to_string() };
        let added = if specials.parse { self.inner.get_added_vocabulary() } else { &self.plain };
        let mut text = added.extract_and_normalize(self.inner.get_normalizer(), text);
        if let Some(pre) = self.inner.get_pre_tokenizer() {
            pre.pre_tokenize(&mut text).map_err(failed)?;
        }
        self.inner.get_model().tokenize_in_pretokenized(&mut text, None).map_err(failed)?;
        let encoding = text.into_encoding(None, 0, OffsetType::None).map_err(failed)?;
        let encoding = self.inner.post_process(encoding, None, specials.add).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        // Decoders only fail on a broken replacement pattern, which loading has compiled.
        self.inner.decode(ids, skip_special).unwrap_or_default()
    }

    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.inner.id_to_token(id)?;
        if self.inner.get_added_tokens_decoder().contains_key(&id) {
            return Some(token.into_bytes());
        }
        Some(match self.writing {
            Writing::ByteLevel => byte_level_bytes(&token, Kind::Normal),
            Writing::Pieces { byte_fallback } => match byte_token(&token) {
                Some(byte) if byte_fallback => vec![byte],
                _ => token.replace('▁', " ").into_bytes(),
            },
            Writing::Text => self.decode(&[id], false).into_bytes(),
        })
    }

    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.inner.get_added_tokens_decoder().get(&id).is_some_and(|t| t.special)
    }

    /// Ids of the special tokens that the configuration names, and of control tokens that end a
    /// turn by their text.
    pub fn special_ids(&self, config: &Config) -> Result<SpecialIds, Error> {
        let mut ids = SpecialIds::default();
        for (name, text) in &config.special_texts {
            let slot = match name.as_str() {
                "bos_token" => &mut ids.bos,
                "eos_token" => &mut ids.eos,
                "unk_token" => &mut ids.unk,
                "pad_token" => &mut ids.pad,
                "eot_token" => &mut ids.eot,
                "eom_token" => &mut ids.eom,
                _ => continue,
            };
            match self.id(text) {
                Some(id) => *slot = Some(id),
                None => {
                    return bad(
                        CONFIG,
                        format!(
                            "{name} is {text:?}, which {FILE} does not hold; the two files belong to different models"
                        ),
                    );
                }
            }
        }
        let decoder = self.inner.get_added_tokens_decoder();
        let mut known: Vec<u32> =
            decoder.iter().filter(|(_, t)| t.special && ends_turn(&t.content)).map(|(&id, _)| id).collect();
        known.sort_unstable();
        for id in [ids.eos, ids.eot, ids.eom].into_iter().flatten().chain(known) {
            if !ids.stop.contains(&id) {
                ids.stop.push(id);
            }
        }
        Ok(ids)
    }
}

impl Config {
    /// Reads a `tokenizer_config.json`: special tokens' texts and chat templates; other keys are
    /// for other programs.
    pub fn new(bytes: &[u8]) -> Result<Config, Error> {
        let value: Value = serde_json::from_slice(bytes)
            .or_else(|e| bad(CONFIG, format!("not valid JSON: {e}; download it again")))?;
        let Value::Object(map) = value else {
            return bad(CONFIG, "not a JSON object");
        };
        let mut config = Config::default();
        for (key, value) in &map {
            if !key.ends_with("_token") || key.starts_with("add_") {
                continue;
            }
            let text = match value {
                Value::String(text) => Some(text.as_str()),
                Value::Object(token) => token.get("content").and_then(Value::as_str),
                _ => None,
            };
            if let Some(text) = text {
                config.special_texts.push((key.clone(), text.to_string()));
            }
        }
        match map.get("chat_template") {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => config.templates.push(("default".into(), text.clone())),
            Some(Value::Array(list)) => {
                for entry in list {
                    let field = |name| entry.get(name).and_then(Value::as_str);
                    match (field("name"), field("template")) {
                        (Some(name), Some(text)) => {
                            config.templates.push((name.into(), text.into()));
                        }
                        _ => {
                            return bad(CONFIG, "an entry of chat_template lacks its name or its template");
                        }
                    }
                }
            }
            Some(_) => {
                return bad(CONFIG, "chat_template is neither text nor a list of named templates");
            }
        }
        Ok(config)
    }
}

/// Checks what the crate takes for granted.
fn check(value: &Value) -> Result<(), Error> {
    let Value::Object(top) = value else {
        return bad(FILE, "not a JSON object");
    };
    let Some(Value::Object(model)) = top.get("model") else {
        return bad(FILE, "has no model");
    };
    for part in ["normalizer", "pre_tokenizer", "post_processor", "decoder"] {
        if let Some(value) = top.get(part) {
            check_part(part, value, 0)?;
        }
    }
    let mut ids: HashSet<u64> = HashSet::new();
    match model.get("vocab") {
        Some(Value::Object(vocab)) => {
            for (token, id) in vocab {
                match id.as_u64() {
                    Some(id) if id < i32::MAX as u64 && ids.insert(id) => {}
                    Some(id) if id < i32::MAX as u64 => {
                        return bad(FILE, format!("token {token:?} has the id {id} of another token"));
                    }
                    _ => return bad(FILE, format!("token {token:?} has the id {id}")),
                }
            }
            let kind = model.get("type").and_then(Value::as_str);
            if kind == Some("BPE") || (kind.is_none() && model.contains_key("merges")) {
                check_merges(model, vocab)?;
            }
            if let Some(unk) = model.get("unk_token").and_then(Value::as_str)
                && !vocab.contains_key(unk)
            {
                return bad(FILE, format!("unk_token is {unk:?}, which is not in the vocabulary"));
            }
        }
        Some(Value::Array(pieces)) => {
            for (id, piece) in pieces.iter().enumerate() {
                if piece.get(0).and_then(Value::as_str).is_none()
                    || !piece.get(1).and_then(Value::as_f64).is_some_and(f64::is_finite)
                {
                    return bad(FILE, format!("piece {id} is not a text and a score"));
                }
            }
            if let Some(unk) = model.get("unk_id").and_then(Value::as_u64)
                && unk >= pieces.len() as u64
            {
                return bad(FILE, format!("unk_id is {unk}, but there are {} pieces", pieces.len()));
            }
            ids.extend(0..pieces.len() as u64);
        }
        _ => return bad(FILE, "the model has no vocabulary"),
    }
    if ids.is_empty() {
        return bad(FILE, "the vocabulary is empty");
    }
    match top.get("added_tokens") {
        None | Some(Value::Null) => {}
        Some(Value::Array(added)) => {
            for token in added {
                let id = token.get("id").and_then(Value::as_u64);
                if id.is_none_or(|id| id >= i32::MAX as u64) {
                    return bad(FILE, format!("the added token {token} has no usable id"));
                }
            }
        }
        Some(_) => return bad(FILE, "added_tokens is not a list"),
    }
    Ok(())
}

fn check_merges(model: &Map<String, Value>, vocab: &Map<String, Value>) -> Result<(), Error> {
    let affix = |key| model.get(key).and_then(Value::as_str).unwrap_or("");
    let prefix = affix("continuing_subword_prefix");
    let Some(Value::Array(merges)) = model.get("merges") else {
        return bad(FILE, "the BPE model has no merges");
    };
    let mut joined = String::new();
    for (rank, merge) in merges.iter().enumerate() {
        let pair = match merge {
            Value::String(line) => line.split_once(' '),
            Value::Array(pair) if pair.len() == 2 => pair[0].as_str().zip(pair[1].as_str()),
            _ => None,
        };
        let Some((left, right)) = pair else {
            return bad(FILE, format!("merge {rank} is {merge}, not two tokens"));
        };
        let Some(rest) = right.strip_prefix(prefix) else {
            return bad(FILE, format!("merge {rank} ({merge}) lacks the prefix {prefix:?}"));
        };
        joined.clear();
        joined.push_str(left);
        joined.push_str(rest);
        if let Some(token) = [left, right, &joined].into_iter().find(|&token| !vocab.contains_key(token)) {
            return bad(FILE, format!("merge {rank} ({merge}) names {token:?}, which is no token"));
        }
    }
    Ok(())
}

/// Normalisers and the like: bounded nesting, and no part that the crate cannot run safely.
fn check_part(part: &'static str, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return bad(FILE, format!("the {part} nests more than {MAX_DEPTH} deep"));
    }
    if let Value::Object(map) = value {
        // The crate divides text into pieces of this many characters.
        if map.get("type").and_then(Value::as_str) == Some("FixedLength")
            && map.get("length").and_then(Value::as_u64) == Some(0)
        {
            return bad(FILE, format!("the {part} cuts text into pieces of no length"));
        }
        // The crate panics on a table that is damaged, and checks no index into one that is not. It belongs to
        // Unigram vocabularies of translation models.
        if map.get("type").and_then(Value::as_str) == Some("Precompiled") {
            return bad(FILE, format!("the {part} of the kind Precompiled is not supported"));
        }
        // The crate looks these up without asking whether they are there.
        let steps = ["single", "pair"].into_iter().filter_map(|key| map.get(key)?.as_array()).flatten();
        for id in steps.filter_map(|step| step.get("SpecialToken")?.get("id")?.as_str()) {
            if map.get("special_tokens").and_then(|known| known.get(id)).is_none() {
                return bad(FILE, format!("the {part} adds {id:?}, which its special_tokens do not name"));
            }
        }
        let of_pair =
            |step: &Value| step.get("Sequence").and_then(|s| s.get("id")).is_some_and(|id| id == "B");
        if map.get("single").and_then(Value::as_array).is_some_and(|steps| steps.iter().any(of_pair)) {
            return bad(FILE, format!("the {part} wants a second text where one is given"));
        }
        for key in ["normalizers", "pretokenizers", "processors", "decoders"] {
            if let Some(Value::Array(list)) = map.get(key) {
                for inner in list {
                    check_part(part, inner, depth + 1)?;
                }
            }
        }
    }
    Ok(())
}
