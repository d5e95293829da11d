//! A GGUF vocabulary as `tokenizer.json`.

use super::cannot;
use crate::bpe::Bpe;
use crate::spm::Spm;
use crate::vocab::{Kind, Vocab};
use crate::{Error, Gguf, Merger};
use serde_json::{Map, Value, json};

const FORM: &str = "tokenizer.json";

pub(super) fn from_gguf(own: &Gguf) -> Result<Value, Error> {
    let vocab = &own.vocab;
    let used = used(vocab);
    let mut table = Map::new();
    let mut added = Vec::new();
    for id in 0..used {
        let (token, kind) = (&vocab.tokens[id], vocab.kinds[id]);
        // Gaps that a file fills with empty tokens are gaps here too.
        if token.is_empty() {
            continue;
        }
        table.insert(token.clone(), json!(id));
        if matches!(kind, Kind::Control | Kind::Unknown | Kind::UserDefined) {
            added.push(json!({
                "id": id,
                "content": token,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": kind != Kind::UserDefined,
            }));
        }
    }
    let parts = match &own.model {
        Merger::Bytes(bpe) => byte_level(bpe, vocab),
        Merger::Pieces(spm) => pieces(spm, vocab)?,
    };
    let mut model = json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": parts.unk,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": false,
        "byte_fallback": parts.byte_fallback,
        "ignore_merges": parts.ignore_merges,
    });
    model["vocab"] = Value::Object(table);
    model["merges"] = parts.merges;
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor(own),
        "decoder": parts.decoder,
        "model": model,
    }))
}

/// How many tokens there are without the unused ones at the end, which fill up a table to a round number of rows.
fn used(vocab: &Vocab) -> usize {
    let filler = |id: usize| {
        let token = &vocab.tokens[id];
        token.is_empty() || (vocab.kinds[id] == Kind::Unused && *token == format!("[PAD{id}]"))
    };
    (0..vocab.tokens.len()).rev().find(|&id| !filler(id)).map_or(0, |id| id + 1)
}

struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    unk: Option<String>,
    byte_fallback: bool,
    ignore_merges: bool,
    merges: Value,
}

fn byte_level(bpe: &Bpe, vocab: &Vocab) -> Parts {
    let splits = bpe.splitter.patterns().into_iter().map(|pattern| {
        json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
    });
    let bytes =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    let steps: Vec<Value> = splits.chain([bytes]).collect();
    let merges = bpe.merges_in_order(vocab).into_iter().map(|(left, right)| json!([left, right])).collect();
    Parts {
        normalizer: if bpe.splitter.nfc { json!({ "type": "NFC" }) } else { Value::Null },
        pre_tokenizer: json!({ "type": "Sequence", "pretokenizers": steps }),
        decoder: json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true }),
        unk: None,
        byte_fallback: false,
        ignore_merges: bpe.splitter.ignore_merges,
        merges,
    }
}

/// Spaces as `▁` and merges from scores, as transformers converts SentencePiece's BPE.
fn pieces(spm: &Spm, vocab: &Vocab) -> Result<Parts, Error> {
    let unk = match spm.unk.map(|id| vocab.tokens[id as usize].clone()) {
        Some(text) if text.is_empty() => return cannot(FORM, "the unknown token has no text"),
        other => other,
    };
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if spm.space_prefix {
        normalizers.push(json!({ "type": "Prepend", "prepend": "▁" }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    normalizers.push(json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" }));
    Ok(Parts {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        pre_tokenizer: Value::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        unk,
        byte_fallback: true,
        ignore_merges: false,
        merges: spm.merges().into_iter().map(|(left, right)| json!([left, right])).collect(),
    })
}

/// What goes around a text.
fn post_processor(own: &Gguf) -> Value {
    let token = |id: u32| own.vocab.tokens[id as usize].as_str();
    let around: Vec<u32> = own.add_bos.into_iter().chain(own.add_eos).collect();
    if around.is_empty() {
        return Value::Null;
    }
    let special = |id: Option<u32>, type_id: u32| {
        id.map(|id| json!({ "SpecialToken": { "id": token(id), "type_id": type_id } }))
    };
    let text = |name: &str, type_id: u32| {
        let middle = json!({ "Sequence": { "id": name, "type_id": type_id } });
        special(own.add_bos, type_id).into_iter().chain([middle]).chain(special(own.add_eos, type_id))
    };
    let single: Vec<Value> = text("A", 0).collect();
    let pair: Vec<Value> = text("A", 0).chain(text("B", 1)).collect();
    let tokens: Map<String, Value> = around
        .iter()
        .map(|&id| (token(id).to_string(), json!({ "id": token(id), "ids": [id], "tokens": [token(id)] })))
        .collect();
    json!({ "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens })
}
