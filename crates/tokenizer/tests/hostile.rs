//! Tokenizer files that are damaged or made to do harm: an error that says what is wrong, or a tokenizer that works, and
//! never a panic.

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use sparsam_tokenizer::{GgufVocab, Message, RenderOptions, Specials, Tokenizer};
use std::sync::LazyLock;

/// The printable alphabet of bytes: printable Latin-1 stands for itself, the rest from U+0100 on.
fn alphabet() -> Vec<String> {
    let mut moved = 0xFF;
    let mut char_of = |b: u32| match b {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => b,
        _ => {
            moved += 1;
            moved
        }
    };
    (0..256).map(|b| char::from_u32(char_of(b)).unwrap().to_string()).collect()
}

fn byte_level() -> GgufVocab {
    let mut tokens = vec!["<s>".to_string(), "<|im_end|>".to_string()];
    tokens.extend(alphabet());
    let merges = ["t h", "th e", "Ġ the", "i n", "Ġ a", "1 2"].map(String::from).to_vec();
    tokens.extend(merges.iter().map(|m| m.replace(' ', "")));
    tokens.push("[INST]".into());
    let mut token_types = vec![1; tokens.len()];
    (token_types[0], token_types[1]) = (3, 3);
    *token_types.last_mut().unwrap() = 4;
    GgufVocab {
        model: "gpt2".into(),
        pre: Some("llama-bpe".into()),
        tokens,
        token_types,
        merges,
        bos: Some(0),
        eos: Some(1),
        add_bos: Some(true),
        chat_template: Some("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}".into()),
        named_templates: vec![("tool_use".into(), "{{ tools }}".into())],
        ..GgufVocab::default()
    }
}

fn pieces() -> GgufVocab {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    let mut token_types = vec![2, 3, 3];
    token_types.resize(tokens.len(), 6);
    let mut scores = vec![0.0; tokens.len()];
    for (i, piece) in ["th", "the", "▁the", "▁a", "▁", "t", "h", "e", "a", "é"].into_iter().enumerate()
    {
        tokens.push(piece.into());
        token_types.push(1);
        scores.push(-(i as f32));
    }
    GgufVocab {
        model: "llama".into(),
        tokens,
        token_types,
        scores,
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        ..GgufVocab::default()
    }
}

/// Does with a tokenizer what an engine does. All of it may be refused, none of it may fail otherwise.
fn use_it(t: &Tokenizer) {
    for text in ["", "the a in 12 é 漢🙂\n", "<s><|im_end|>[INST]▁ <0x0A>"] {
        for (add, parse) in [(false, false), (true, true)] {
            let Ok(ids) = t.encode(text, Specials { add, parse }) else { continue };
            t.decode(&ids, add);
            let mut stream = t.stream();
            ids.iter().for_each(|&id| _ = stream.push(id));
        }
    }
    let n = t.vocab_size() as u32;
    for id in (0..n.min(600)).chain([n.saturating_sub(1), n, u32::MAX]) {
        t.token_bytes(id);
        t.token(id);
        t.is_special(id);
    }
    if let Some(template) = t.chat_template() {
        let _ = template.render(&[Message::new("user", "hi")], &RenderOptions::default());
    }
    let _ = t.to_json();
    if t.vocab_size() < 1 << 20 {
        let _ = t.to_gguf(t.vocab_size());
    }
}

fn try_json(json: &[u8], config: Option<&[u8]>) {
    match Tokenizer::from_json(json, config) {
        Ok(t) => use_it(&t),
        Err(e) => assert!(!e.to_string().is_empty()),
    }
}

static JSON: LazyLock<Vec<(Value, Value)>> = LazyLock::new(|| {
    let of = |vocab| {
        let files = Tokenizer::from_gguf(vocab).unwrap().to_json().unwrap();
        let value = |bytes: &[u8]| serde_json::from_slice(bytes).unwrap();
        (value(&files.tokenizer), value(&files.config))
    };
    [byte_level(), pieces()].map(of).to_vec()
});

/// What stands where something else should.
fn junk() -> impl Strategy<Value = Value> {
    let pattern = prop_oneof![Just("("), Just("(a*)*b"), Just("\\p{X}"), Just(""), Just("[^\\s")];
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        prop_oneof![Just(-1i64), Just(0), Just(1), Just(255), Just(i64::MAX), Just(1 << 31)]
            .prop_map(Value::from),
        Just(json!(1e300)),
        "[a-zĠ▁ <>|]{0,6}".prop_map(Value::from),
        pattern.prop_map(|p| json!({ "Regex": p })),
        Just(json!([])),
        Just(json!({})),
        Just(json!(["a", "b"])),
        Just(json!([["t", "h"], ["th", "e"], ["t", "h"]])),
        Just(
            json!({ "type": "Sequence", "pretokenizers": [{ "type": "Whitespace" }, { "type": "Digits" }] })
        ),
        Just(json!({ "type": "Precompiled", "precompiled_charsmap": "AAAA" })),
        Just(json!({ "type": "FixedLength", "length": 0 })),
        Just(json!({ "type": "BPE", "vocab": {}, "merges": [] })),
        Just(json!({ "type": "Unigram", "unk_id": 9, "vocab": [["a", -1.0]], "byte_fallback": true })),
        Just(
            json!({ "type": "WordPiece", "vocab": { "a": 0 }, "unk_token": "?", "max_input_chars_per_word": 1 })
        ),
        Just(
            json!({ "type": "TemplateProcessing", "single": [{ "SpecialToken": { "id": "x", "type_id": 0 } }],
            "pair": [], "special_tokens": {} })
        ),
    ]
}

/// Steps down a tree: each picks one of the children.
type Path = Vec<prop::sample::Index>;

/// Puts `new` in the place that `path` leads to, takes that out, or writes it twice.
fn mutate(value: &mut Value, path: &[prop::sample::Index], new: &Value, how: u8) {
    let Some((step, rest)) = path.split_first() else {
        *value = new.clone();
        return;
    };
    match value {
        Value::Object(map) if !map.is_empty() => {
            let key = step.get(&map.keys().cloned().collect::<Vec<_>>()).clone();
            match (rest.is_empty(), how % 3) {
                (true, 1) => _ = map.remove(&key),
                (true, 2) => map.extend(Map::from_iter([(format!("{key}x"), new.clone())])),
                _ => mutate(map.get_mut(&key).unwrap(), rest, new, how),
            }
        }
        Value::Array(list) if !list.is_empty() => {
            let i = step.index(list.len());
            match (rest.is_empty(), how % 3) {
                (true, 1) => _ = list.remove(i),
                (true, 2) => list.insert(i, list[i].clone()),
                _ => mutate(&mut list[i], rest, new, how),
            }
        }
        leaf => *leaf = new.clone(),
    }
}

fn path() -> impl Strategy<Value = Path> {
    prop::collection::vec(any::<prop::sample::Index>(), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_json(which in 0usize..2, edits in prop::collection::vec((path(), junk(), any::<u8>()), 1..4), config in any::<bool>()) {
        let (mut json, mut own) = JSON[which].clone();
        for (path, new, how) in &edits {
            mutate(if config { &mut own } else { &mut json }, path, new, *how);
        }
        try_json(json.to_string().as_bytes(), Some(own.to_string().as_bytes()));
    }

    #[test]
    fn damaged_bytes(which in 0usize..2, cut in any::<prop::sample::Index>(), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
        let (json, config) = &JSON[which];
        let mut bytes = json.to_string().into_bytes();
        for (at, with) in &flips {
            let at = at.index(bytes.len());
            bytes[at] = *with;
        }
        if flips.is_empty() {
            bytes.truncate(cut.index(bytes.len()));
        }
        try_json(&bytes, Some(config.to_string().as_bytes()));
        try_json(json.to_string().as_bytes(), Some(&bytes));
    }

    #[test]
    fn changed_vocabularies(
        which in 0usize..2,
        edits in prop::collection::vec((0u8..16, any::<prop::sample::Index>(), any::<i32>(), "[a-zĠ▁ <>|]{0,5}"), 1..4),
    ) {
        let mut v = [byte_level(), pieces()][which].clone();
        for (what, at, number, text) in edits {
            let id = Some(number as u32 % 400);
            let n = v.tokens.len().max(1);
            match what {
                0 => v.tokens.truncate(at.index(n)),
                1 if !v.tokens.is_empty() => *v.tokens.get_mut(at.index(n)).unwrap() = text,
                2 => v.token_types.truncate(at.index(n)),
                3 if !v.token_types.is_empty() => {
                    let at = at.index(v.token_types.len());
                    v.token_types[at] = number % 9;
                }
                4 => v.scores.push(f32::from_bits(number as u32)),
                5 if !v.scores.is_empty() => {
                    let at = at.index(v.scores.len());
                    v.scores[at] = f32::from_bits(number as u32);
                }
                6 => v.merges.push(text),
                7 if !v.merges.is_empty() => {
                    let at = at.index(v.merges.len());
                    v.merges[at] = format!("{text} {text}");
                }
                8 => v.bos = id,
                9 => v.eos = id,
                10 => v.unk = id,
                11 => v.pad = Some(number as u32),
                12 => v.pre = Some(text),
                13 => v.model = text,
                14 => v.chat_template = Some(format!("{{% for x in range({number}) %}}{text}")),
                _ => (v.add_bos, v.add_eos, v.bos) = (Some(true), Some(true), None),
            }
        }
        match Tokenizer::from_gguf(v) {
            Ok(t) => use_it(&t),
            Err(e) => assert!(!e.to_string().is_empty()),
        }
    }
}
