//! A `tokenizer.json` as a GGUF vocabulary.

use super::cannot;
use crate::json::Json;
use crate::split::Splitter;
use crate::spm::all_merges;
use crate::vocab::{SpecialIds, byte_token};
use crate::{Error, Gguf, GgufVocab, Merger, Specials};
use serde_json::{Map, Value};
use std::collections::{HashMap, HashSet};

const FORM: &str = "a GGUF file";

/// Token types, as llama.cpp numbers them.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

impl Gguf {
    /// The vocabulary that this was made from, without templates.
    pub(super) fn to_gguf(&self) -> GgufVocab {
        let mut vocab = GgufVocab {
            tokens: self.vocab.tokens.clone(),
            token_types: self.vocab.kinds.iter().map(|k| k.to_gguf()).collect(),
            // Made explicit: what a reader takes for the default differs.
            add_bos: Some(self.add_bos.is_some()),
            add_eos: Some(self.add_eos.is_some()),
            ..self.head.clone()
        };
        match &self.model {
            Merger::Bytes(bpe) => {
                let lines = bpe.merges_in_order(&self.vocab).into_iter().map(|(l, r)| format!("{l} {r}"));
                vocab.merges = lines.collect();
            }
            Merger::Pieces(spm) => {
                vocab.scores = spm.scores.clone();
                vocab.add_space_prefix = Some(spm.space_prefix);
            }
        }
        vocab
    }
}

/// Unused tokens up to `vocab_size`.
pub(super) fn fill(vocab: &mut GgufVocab, vocab_size: usize) -> Result<(), Error> {
    let n = vocab.tokens.len();
    if n > vocab_size {
        return cannot(
            FORM,
            format!(
                "the vocabulary has {n} tokens, but the model's table has {vocab_size} rows; they do not belong together"
            ),
        );
    }
    if vocab.token_types.is_empty() {
        vocab.token_types = vec![NORMAL; n];
    }
    for id in n..vocab_size {
        vocab.tokens.push(format!("[PAD{id}]"));
        vocab.token_types.push(UNUSED);
        if !vocab.scores.is_empty() {
            vocab.scores.push(FILLER_SCORE);
        }
    }
    Ok(())
}

/// The score of tokens that no text becomes, as llama.cpp's converter has it.
const FILLER_SCORE: f32 = -10000.0;

/// The parts of a `tokenizer.json` that both kinds of vocabulary need.
struct Parts<'a> {
    normalizers: Vec<&'a Value>,
    pre_tokenizers: Vec<&'a Value>,
    model: &'a Map<String, Value>,
    merges: Vec<(&'a str, &'a str)>,
}

fn kind(part: &Value) -> &str {
    part.get("type").and_then(Value::as_str).unwrap_or_default()
}

/// A part as the list of what it does, sequences opened.
fn steps<'a>(part: Option<&'a Value>, list: &str, out: &mut Vec<&'a Value>) {
    match part {
        None | Some(Value::Null) => {}
        Some(sequence) if kind(sequence) == "Sequence" => {
            for step in sequence.get(list).and_then(Value::as_array).into_iter().flatten() {
                steps(Some(step), list, out);
            }
        }
        Some(step) => out.push(step),
    }
}

pub(super) fn from_json(value: &Value, own: &Json, ids: &SpecialIds) -> Result<GgufVocab, Error> {
    let (mut normalizers, mut pre_tokenizers) = (Vec::new(), Vec::new());
    steps(value.get("normalizer"), "normalizers", &mut normalizers);
    steps(value.get("pre_tokenizer"), "pretokenizers", &mut pre_tokenizers);
    let empty = Map::new();
    let model = value.get("model").and_then(Value::as_object).unwrap_or(&empty);
    let name = model.get("type").and_then(Value::as_str).unwrap_or_default();
    if name != "BPE" {
        return cannot(
            FORM,
            format!("the model is of the kind {name}; byte-level BPE and SentencePiece's BPE can be written"),
        );
    }
    for key in ["dropout", "continuing_subword_prefix", "end_of_word_suffix"] {
        let given = model.get(key).filter(|v| !v.is_null() && v.as_str() != Some(""));
        if let Some(given) = given {
            return cannot(FORM, format!("the model's {key} is {given}"));
        }
    }
    let listed = model.get("merges").and_then(Value::as_array).into_iter().flatten();
    let merges = listed.filter_map(|m| Some((m.get(0)?.as_str()?, m.get(1)?.as_str()?))).collect();
    let parts = Parts { normalizers, pre_tokenizers, model, merges };
    let mut vocab = tokens(value, own, ids)?;
    if parts.pre_tokenizers.iter().any(|p| kind(p) == "ByteLevel") {
        byte_level(&parts, &mut vocab)?;
    } else {
        pieces(&parts, &mut vocab)?;
    }
    around(own, &mut vocab)?;
    Ok(vocab)
}

/// Tokens, types and special ids.
fn tokens(value: &Value, own: &Json, ids: &SpecialIds) -> Result<GgufVocab, Error> {
    let n = own.vocab_size();
    let byte_fallback = value["model"]["byte_fallback"].as_bool() == Some(true);
    let unk = value["model"]["unk_token"].as_str().and_then(|text| own.id(text)).or(ids.unk);
    let mut tokens: Vec<String> = Vec::with_capacity(n);
    let mut token_types = vec![NORMAL; n];
    for id in 0..n {
        let token = own.token(id as u32);
        if token.is_none() {
            token_types[id] = UNUSED;
        }
        let token = token.unwrap_or_else(|| format!("[PAD{id}]"));
        if byte_fallback && byte_token(&token).is_some() {
            token_types[id] = BYTE;
        }
        tokens.push(token);
    }
    for added in value["added_tokens"].as_array().into_iter().flatten() {
        let flag = |key: &str| added[key].as_bool() == Some(true);
        let (Some(id), Some(text)) = (added["id"].as_u64(), added["content"].as_str()) else { continue };
        if flag("lstrip") || flag("rstrip") || flag("single_word") {
            return cannot(
                FORM,
                format!(
                    "the added token {text:?} takes the white space around it, or only stands as a whole word"
                ),
            );
        }
        if let Some(kind) = token_types.get_mut(id as usize) {
            *kind = if flag("special") { CONTROL } else { USER_DEFINED };
        }
    }
    if let Some(kind) = unk.and_then(|id| token_types.get_mut(id as usize))
        && byte_fallback
    {
        *kind = UNKNOWN;
    }
    Ok(GgufVocab {
        tokens,
        token_types,
        bos: ids.bos,
        eos: ids.eos,
        eot: ids.eot,
        eom: ids.eom,
        unk,
        pad: ids.pad,
        ..GgufVocab::default()
    })
}

fn byte_level(parts: &Parts, vocab: &mut GgufVocab) -> Result<(), Error> {
    let nfc = match parts.normalizers.as_slice() {
        [] => false,
        [one] if kind(one) == "NFC" => true,
        other => return cannot(FORM, format!("the normalizer {} has no name there", kind(other[0]))),
    };
    let flag =
        |part: &Value, key: &str, default: bool| part.get(key).and_then(Value::as_bool).unwrap_or(default);
    let mut patterns: Vec<String> = Vec::new();
    let last = parts.pre_tokenizers.len() - 1;
    for (i, part) in parts.pre_tokenizers.iter().enumerate() {
        let regex = part.get("pattern").and_then(|p| p.get("Regex")).and_then(Value::as_str);
        match (kind(part), regex) {
            ("ByteLevel", _) if i == last => {
                if flag(part, "add_prefix_space", true) {
                    return cannot(FORM, "the pre-tokeniser puts a space in front of every text");
                }
                if flag(part, "use_regex", true) {
                    patterns.extend(Splitter::by_name("gpt-2")?.patterns());
                }
            }
            ("Digits", _) => {
                let one = flag(part, "individual_digits", false);
                patterns.push(if one { r"\p{N}" } else { r"\p{N}+" }.into());
            }
            ("Split", Some(regex))
                if part["behavior"].as_str() == Some("Isolated") && !flag(part, "invert", false) =>
            {
                patterns.push(regex.into());
            }
            (other, _) => return cannot(FORM, format!("the pre-tokeniser's part {other} has no name there")),
        }
    }
    let ignore_merges = parts.model.get("ignore_merges").and_then(Value::as_bool).unwrap_or(false);
    let Some(name) = Splitter::name_of(&patterns, nfc, ignore_merges) else {
        return cannot(
            FORM,
            format!(
                "the pre-tokeniser has no name there: it cuts text by {patterns:?} (ignore_merges: {ignore_merges})"
            ),
        );
    };
    vocab.model = "gpt2".into();
    vocab.pre = Some(name.into());
    // Left and right are parted by the first space after the first character.
    if let Some((left, right)) =
        parts.merges.iter().find(|(l, r)| l.chars().skip(1).any(|c| c == ' ') || r.contains(' '))
    {
        return cannot(FORM, format!("the merge of {left:?} and {right:?} holds a space"));
    }
    vocab.merges = parts.merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
    Ok(())
}

/// SentencePiece's BPE: the normaliser writes `▁` for the space, scores rank the merges.
fn pieces(parts: &Parts, vocab: &mut GgufVocab) -> Result<(), Error> {
    let text = |part: &Value, key: &str| part.get(key).and_then(Value::as_str).map(str::to_string);
    let (mut spaces, mut prefix) = (false, false);
    for part in &parts.normalizers {
        let from = part.get("pattern").and_then(|p| p.get("String")).and_then(Value::as_str);
        match kind(part) {
            "Prepend" if text(part, "prepend").as_deref() == Some("▁") => prefix = true,
            "Replace" if from == Some(" ") && text(part, "content").as_deref() == Some("▁") => {
                spaces = true
            }
            other => return cannot(FORM, format!("the normalizer's part {other} has no name there")),
        }
    }
    for part in &parts.pre_tokenizers {
        let pattern = part.get("pattern").and_then(|p| p.get("String")).and_then(Value::as_str);
        match kind(part) {
            // Where spaces are written ▁ already, there is nothing to split.
            "Split" if spaces && pattern == Some(" ") => {}
            "Metaspace" if text(part, "replacement").as_deref() == Some("▁") => {
                if part.get("split").and_then(Value::as_bool) != Some(false) {
                    return cannot(
                        FORM,
                        "the pre-tokeniser cuts text at spaces, which SentencePiece's BPE does not",
                    );
                }
                spaces = true;
                prefix = text(part, "prepend_scheme").as_deref() != Some("never");
            }
            other => return cannot(FORM, format!("the pre-tokeniser's part {other} has no name there")),
        }
    }
    let byte_fallback = parts.model.get("byte_fallback").and_then(Value::as_bool) == Some(true);
    if !spaces || !byte_fallback {
        return cannot(
            FORM,
            "the vocabulary is neither byte-level BPE nor SentencePiece's (spaces as ▁, unknown characters as bytes)",
        );
    }
    vocab.model = "llama".into();
    vocab.pre = Some("default".into());
    vocab.add_space_prefix = Some(prefix);
    vocab.scores = scores(parts, vocab)?;
    Ok(())
}

/// Scores that rank merges as the list of merges does: a piece scores by the first merge that makes it.
fn scores(parts: &Parts, vocab: &GgufVocab) -> Result<Vec<f32>, Error> {
    /// Ranks that f32 tells apart.
    const MAX_MERGES: usize = 1 << 24;
    if parts.merges.len() >= MAX_MERGES {
        return cannot(FORM, format!("{} merges are more than scores can rank", parts.merges.len()));
    }
    let mut first: HashMap<String, usize> = HashMap::with_capacity(vocab.tokens.len());
    let mut listed: HashSet<(&str, &str)> = HashSet::with_capacity(parts.merges.len());
    for (rank, &(left, right)) in parts.merges.iter().enumerate() {
        first.entry(format!("{left}{right}")).or_insert(rank);
        listed.insert((left, right));
    }
    // By score any two neighbours merge whose join is a piece: all such pairs must be listed.
    let mergeable = |id: usize| matches!(vocab.token_types[id], NORMAL | USER_DEFINED);
    let known: HashSet<&str> =
        (0..vocab.tokens.len()).filter(|&id| mergeable(id)).map(|id| vocab.tokens[id].as_str()).collect();
    for piece in &known {
        let ranked = first.contains_key(*piece);
        for (left, right) in all_merges(piece, |part| known.contains(part)) {
            if ranked && !listed.contains(&(left, right)) {
                return cannot(
                    FORM,
                    format!(
                        "{left:?} and {right:?} make a token but are no merge, and scores would merge them"
                    ),
                );
            }
        }
    }
    let lowest = parts.merges.len();
    let score = |token: &String| first.get(token).copied().unwrap_or(lowest);
    Ok(vocab.tokens.iter().map(|t| -(score(t) as f32)).collect())
}

/// Which special tokens go around a text, found by encoding one.
fn around(own: &Json, vocab: &mut GgufVocab) -> Result<(), Error> {
    let bare = own.encode("a", Specials { add: false, parse: false })?;
    let full = own.encode("a", Specials { add: true, parse: false })?;
    let at = full.windows(bare.len().max(1)).position(|w| w == bare);
    let Some(at) = at else { return cannot(FORM, "the post-processor changes the tokens of a text") };
    let (before, after) = (&full[..at], &full[at + bare.len()..]);
    let one = |what: &str, found: &[u32], own: &mut Option<u32>| match (found, *own) {
        ([], _) => Ok(false),
        (&[id], known) if known.is_none_or(|known| known == id) => {
            *own = Some(id);
            Ok(true)
        }
        _ => cannot(
            FORM,
            format!("the post-processor puts the tokens {found:?} {what} a text, where one can stand"),
        ),
    };
    vocab.add_bos = Some(one("before", before, &mut vocab.bos)?);
    vocab.add_eos = Some(one("after", after, &mut vocab.eos)?);
    Ok(())
}
