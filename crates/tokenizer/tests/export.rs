//! Tokenizers written and read back, in both forms and from both origins: the same ids.

use proptest::prelude::*;
use serde_json::{Value, json};
use sparsam_formats::gguf;
use sparsam_tokenizer::{GgufVocab, Specials, Tokenizer};
use std::collections::HashMap;
use std::sync::LazyLock;

/// Many scripts, white space of many kinds, digits, emoji of several code points, code, marks out of normal form,
/// special tokens written out.
const CORPUS: [&str; 22] = [
    "",
    " ",
    "Hello, world! It's 12345.67 o'clock; we'll SEE you'RE there.",
    "  two  spaces\tand\t\ttabs \n\n\n and breaks\r\n\r\n  \u{a0}\u{3000} end   ",
    "fn main() {\n    let x: Vec<u8> = vec![0x1F; 42]; // ½ ² ③ ٣ Ⅷ\n}\n",
    "import numpy as np\n\ndef f(x):\n\treturn np.sum(x**2, axis=-1)  # ok\n",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg — „wirklich“.",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה",
    "我能吞下玻璃而不伤身体。天地玄黄，宇宙洪荒。",
    "いろはにほへと ちりぬるを わかよたれそ 漢字カナ",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 e\u{301} o\u{308} \u{1f9d1}\u{1f3fd}\u{200d}\u{1f4bb} ☃",
    "<|im_start|>user\nHi<|im_end|>\n<s>[INST] x </s> <unk> <0x0A>",
    "https://example.org/a_b?c=%20&d=[1]#frag --flag=\"v\" $HOME ~/x C:\\dir",
    "aaaaaaaaaaaaaaaaaaaaa bbbbbbb  ccccccc ....... ------- \u{0}\u{7f}\u{85}",
    "camelCaseHTTPServer snake_case SCREAMING_CASE 3.14e-10 1,000,000",
    "▁already▁spaced Ġthe Ċ",
];

fn assert_same_ids(a: &Tokenizer, b: &Tokenizer, what: &str) {
    for text in CORPUS {
        for (add, parse) in [(false, false), (true, false), (false, true), (true, true)] {
            let specials = Specials { add, parse };
            let (x, y) = (a.encode(text, specials), b.encode(text, specials));
            let (x, y) = (x.map_err(|e| e.to_string()), y.map_err(|e| e.to_string()));
            assert_eq!(x, y, "{what}: {text:?} {specials:?}");
            if let Ok(ids) = x {
                // Behind a BOS, tokenizer.json's decoder no longer finds the space that encoding put in front.
                let whole = |t: &Tokenizer| t.decode(&ids, false);
                assert!(add || whole(a) == whole(b), "{what}: {text:?} as {:?}", (whole(a), whole(b)));
                assert_eq!(a.decode(&ids, true), b.decode(&ids, true), "{what}: {text:?}");
            }
        }
    }
    for id in 0..a.vocab_size() as u32 {
        assert_eq!(a.token(id), b.token(id), "{what}: {id}");
        assert_eq!(a.token_bytes(id), b.token_bytes(id), "{what}: {id}");
        assert_eq!(a.is_special(id), b.is_special(id), "{what}: {id}");
    }
    assert_eq!((a.bos(), a.eos(), a.pad()), (b.bos(), b.eos(), b.pad()), "{what}");
    assert_eq!(a.stop_ids(), b.stop_ids(), "{what}");
    assert!(a.template_names().eq(b.template_names()), "{what}");
    for name in a.template_names() {
        let source = |t: &Tokenizer| t.named_template(name).unwrap().source().to_string();
        assert_eq!(source(a), source(b), "{what}");
    }
}

fn through_json(t: &Tokenizer) -> Tokenizer {
    let files = t.to_json().unwrap();
    Tokenizer::from_json(&files.tokenizer, Some(&files.config)).unwrap()
}

fn fields(v: &GgufVocab) -> (String, &[String], &[i32], &[f32], &[String]) {
    let rest = GgufVocab { tokens: vec![], token_types: vec![], scores: vec![], merges: vec![], ..v.clone() };
    (format!("{rest:?}"), &v.tokens, &v.token_types, &v.scores, &v.merges)
}

#[test]
fn smollm2_survives_both_forms() {
    let Some(path) = sparsam_testkit::smollm2() else { return };
    let file = gguf::File::open(path).unwrap();
    let m = file.metadata();
    let strings = |key| m.opt_strings(key).unwrap().unwrap_or_default().to_vec();
    let id = |key| m.opt_u32(key).unwrap();
    let types = m.integers("tokenizer.ggml.token_type").unwrap();
    let vocab = GgufVocab {
        model: m.str("tokenizer.ggml.model").unwrap().to_string(),
        pre: m.opt_str("tokenizer.ggml.pre").unwrap().map(str::to_string),
        tokens: strings("tokenizer.ggml.tokens"),
        token_types: types.into_iter().map(|t| t as i32).collect(),
        merges: strings("tokenizer.ggml.merges"),
        bos: id("tokenizer.ggml.bos_token_id"),
        eos: id("tokenizer.ggml.eos_token_id"),
        unk: id("tokenizer.ggml.unknown_token_id"),
        pad: id("tokenizer.ggml.padding_token_id"),
        add_bos: m.opt_bool("tokenizer.ggml.add_bos_token").unwrap(),
        add_eos: Some(false), // written out, where the file is silent
        chat_template: m.opt_str("tokenizer.chat_template").unwrap().map(str::to_string),
        ..GgufVocab::default()
    };
    let t = Tokenizer::from_gguf(vocab.clone()).unwrap();
    let n = t.vocab_size();
    // All of it comes back, from either form.
    assert_eq!(fields(&t.to_gguf(n).unwrap()), fields(&vocab));
    let json = through_json(&t);
    assert_same_ids(&t, &json, "json");
    let back = json.to_gguf(n).unwrap();
    assert_eq!(fields(&back), fields(&vocab));
    assert_same_ids(&t, &Tokenizer::from_gguf(back).unwrap(), "json to gguf");
    assert_eq!(through_json(&json).to_json().unwrap(), json.to_json().unwrap());
    // A table with more rows, as many models have.
    let wider = Tokenizer::from_gguf(json.to_gguf(n + 3).unwrap()).unwrap();
    assert_eq!(wider.token(n as u32 + 2).unwrap(), "[PAD49154]");
    assert_same_ids(&t, &through_json(&wider), "filled up");
    let e = t.to_gguf(n - 1).unwrap_err().to_string();
    assert!(e.contains("49152 tokens, but the model's table has 49151 rows"), "{e}");
}

/// Merges that the corpus suggests: the most frequent pair of neighbours joins, again and again (Sennrich et al. 2016).
fn train(words: impl Iterator<Item = Vec<String>>, n: usize) -> Vec<(String, String)> {
    let mut words: Vec<Vec<String>> = words.collect();
    let mut merges = Vec::new();
    for _ in 0..n {
        let mut counts: HashMap<(&str, &str), usize> = HashMap::new();
        for w in &words {
            w.windows(2).for_each(|p| *counts.entry((&p[0], &p[1])).or_default() += 1);
        }
        let Some((&(l, r), _)) = counts.iter().max_by_key(|&(&pair, &count)| (count, pair)) else { break };
        let (l, r) = (l.to_string(), r.to_string());
        for w in &mut words {
            let mut i = 0;
            while i + 1 < w.len() {
                if w[i] == l && w[i + 1] == r {
                    let right = w.remove(i + 1);
                    w[i].push_str(&right);
                }
                i += 1;
            }
        }
        merges.push((l, r));
    }
    merges
}

/// The printable alphabet of bytes, written out anew: printable Latin-1 stands for itself, the rest from U+0100 on.
fn byte_alphabet() -> Vec<String> {
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

fn byte_level(pre: &str) -> GgufVocab {
    let alphabet = byte_alphabet();
    let words = CORPUS
        .iter()
        .flat_map(|t| t.split_inclusive(' '))
        .map(|w| w.bytes().map(|b| alphabet[usize::from(b)].clone()).collect::<Vec<_>>());
    let merges = train(words, 150);
    let mut tokens = vec!["<s>".to_string(), "<|im_end|>".to_string()];
    tokens.extend(alphabet.iter().cloned());
    for (l, r) in &merges {
        let token = format!("{l}{r}");
        if !tokens.contains(&token) {
            tokens.push(token);
        }
    }
    tokens.push("[INST]".into());
    let mut token_types = vec![1; tokens.len()];
    (token_types[0], token_types[1]) = (3, 3);
    *token_types.last_mut().unwrap() = 4;
    GgufVocab {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        tokens,
        token_types,
        merges: merges.iter().map(|(l, r)| format!("{l} {r}")).collect(),
        bos: Some(0),
        eos: Some(1),
        add_bos: Some(true),
        add_eos: Some(pre.len().is_multiple_of(2)),
        chat_template: Some("{{ messages }}".into()),
        named_templates: vec![("tool_use".into(), "{{ tools }}".into())],
        ..GgufVocab::default()
    }
}

/// Each pre-tokeniser: its patterns as `tokenizer.json` has them cut alike, and are found again by name.
#[test]
fn every_pre_tokeniser_survives() {
    for (pre, again) in [
        ("gpt-2", "gpt-2"),
        ("smollm", "smollm"),
        ("starcoder", "smollm"),
        ("llama-bpe", "llama-bpe"),
        ("llama3", "llama-bpe"),
        ("glm4", "glm4"),
        ("qwen2", "qwen2"),
        ("deepseek-r1-qwen", "deepseek-r1-qwen"),
        ("qwen35", "qwen35"),
        ("deepseek-v3", "deepseek-v3"),
        ("deepseek-coder", "deepseek-coder"),
        ("tekken", "tekken"),
        ("gpt-4o", "gpt-4o"),
        ("llama4", "gpt-4o"),
    ] {
        let vocab = byte_level(pre);
        let t = Tokenizer::from_gguf(vocab.clone()).unwrap();
        let json = through_json(&t);
        assert_same_ids(&t, &json, pre);
        let back = json.to_gguf(vocab.tokens.len()).unwrap();
        assert_eq!(back.pre.as_deref(), Some(again), "{pre}");
        let own = GgufVocab { pre: Some(again.into()), ..vocab };
        assert_eq!(fields(&back), fields(&own), "{pre}");
    }
}

fn sentence_pieces(space_prefix: bool) -> GgufVocab {
    let chars = |w: &str| w.replace(' ', "▁").chars().map(String::from).collect::<Vec<_>>();
    let merges = train(CORPUS.iter().map(|t| chars(t)), 200);
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    let mut token_types = vec![3, 3, 3];
    token_types[0] = 2;
    token_types.resize(tokens.len(), 6);
    let mut scores = vec![0.0; tokens.len()];
    let mut rank = 0;
    let mut add = |token: String, tokens: &mut Vec<String>, scores: &mut Vec<f32>| {
        if !tokens.contains(&token) {
            tokens.push(token);
            scores.push(-(rank as f32));
            rank += 1;
        }
    };
    merges.iter().for_each(|(l, r)| add(format!("{l}{r}"), &mut tokens, &mut scores));
    // Not all characters of the corpus: some fall back to bytes.
    for c in CORPUS.iter().flat_map(|t| t.chars()).filter(|c| u32::from(*c) % 3 > 0) {
        add(if c == ' ' { "▁".into() } else { c.to_string() }, &mut tokens, &mut scores);
    }
    merges
        .iter()
        .flat_map(|(l, r)| l.chars().chain(r.chars()))
        .for_each(|c| add(c.into(), &mut tokens, &mut scores));
    token_types.resize(tokens.len(), 1);
    tokens.push("[INST]".into());
    token_types.push(4);
    scores.push(-1000.0);
    GgufVocab {
        model: "llama".into(),
        tokens,
        token_types,
        scores,
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        add_bos: Some(true),
        add_eos: Some(false),
        add_space_prefix: Some(space_prefix),
        ..GgufVocab::default()
    }
}

#[test]
fn sentence_pieces_survive() {
    for space_prefix in [true, false] {
        let vocab = sentence_pieces(space_prefix);
        let t = Tokenizer::from_gguf(vocab.clone()).unwrap();
        assert_eq!(fields(&t.to_gguf(vocab.tokens.len()).unwrap()), fields(&vocab));
        let json = through_json(&t);
        assert_same_ids(&t, &json, "json");
        let back = json.to_gguf(vocab.tokens.len()).unwrap();
        assert_eq!((&back.token_types, back.unk), (&vocab.token_types, vocab.unk));
        assert_eq!(back.add_space_prefix, Some(space_prefix));
        assert_same_ids(&t, &Tokenizer::from_gguf(back).unwrap(), "json to gguf");
    }
}

/// Texts that no corpus holds, for one vocabulary of each kind in both forms.
static BOTH: LazyLock<Vec<(Tokenizer, Tokenizer)>> = LazyLock::new(|| {
    let of = |vocab| Tokenizer::from_gguf(vocab).unwrap();
    let tokenizers = [of(byte_level("smollm")), of(byte_level("llama-bpe")), of(sentence_pieces(true))];
    tokenizers.into_iter().map(|t| (through_json(&t), t)).collect()
});

proptest! {
    #[test]
    fn any_text_gives_the_same_ids(text in r"[ \t\r\na-zA-Z0-9'.,<>|_\u{a0}é漢🙂½▁]{0,60}|\PC{0,60}", parse in any::<bool>()) {
        for (json, gguf) in BOTH.iter() {
            let specials = Specials { add: true, parse };
            let ids = gguf.encode(&text, specials).unwrap();
            prop_assert_eq!(json.encode(&text, specials).unwrap(), ids.as_slice());
            prop_assert_eq!(json.decode(&ids, true), gguf.decode(&ids, true));
        }
    }
}

/// A `tokenizer.json` that GGUF cannot hold says why.
#[test]
fn what_gguf_cannot_hold_is_named() {
    let own: Value = serde_json::from_slice(
        &Tokenizer::from_gguf(byte_level("smollm")).unwrap().to_json().unwrap().tokenizer,
    )
    .unwrap();
    let last = own["added_tokens"][2]["id"].clone();
    let line = |edit: &dyn Fn(&mut Value), said: &str| {
        let mut value = own.clone();
        edit(&mut value);
        let t = Tokenizer::from_json(value.to_string().as_bytes(), None).unwrap();
        let e = t.to_gguf(t.vocab_size()).unwrap_err().to_string();
        assert!(e.contains("a GGUF file cannot hold it") && e.contains(said), "{e} lacks {said:?}");
    };
    let pattern = "/pre_tokenizer/pretokenizers/1/pattern/Regex";
    line(&|v| *v.pointer_mut(pattern).unwrap() = json!(r"\s+"), r#"it cuts text by ["\\p{N}", "\\s+"]"#);
    line(&|v| v["model"]["ignore_merges"] = json!(true), "(ignore_merges: true)");
    line(&|v| v["normalizer"] = json!({"type": "Lowercase"}), "the normalizer Lowercase has no name");
    line(&|v| v["normalizer"] = json!({"type": "NFKC"}), "the normalizer NFKC has no name");
    line(&|v| v["pre_tokenizer"] = json!({"type": "Whitespace"}), "the pre-tokeniser's part Whitespace");
    line(&|v| v["pre_tokenizer"] = Value::Null, "neither byte-level BPE nor SentencePiece's");
    line(&|v| v["added_tokens"][0]["lstrip"] = json!(true), "takes the white space around it");
    let prefix = "/pre_tokenizer/pretokenizers/2/add_prefix_space";
    line(&|v| *v.pointer_mut(prefix).unwrap() = json!(true), "puts a space in front of every text");
    line(
        &|v| v["model"] = json!({"type": "WordLevel", "vocab": {"<s>": 0, "<|im_end|>": 1, "[INST]": last}, "unk_token": "<s>"}),
        "the model is of the kind WordLevel",
    );
}

/// llama.cpp's own vocabularies (`models/ggml-vocab-*.gguf` in its repository) and what it makes of the texts beside
/// them: so do ours, and so does the `tokenizer.json` made from ours. Their folder in `SPARSAM_LLAMA_CPP_VOCABS`.
#[test]
fn vocabularies_of_llama_cpp() {
    let Some(folder) = std::env::var_os("SPARSAM_LLAMA_CPP_VOCABS") else {
        eprintln!("SPARSAM_LLAMA_CPP_VOCABS is not set: left out");
        return;
    };
    let mut wrong = Vec::new();
    for name in [
        "llama-spm",
        "llama-bpe",
        "gpt-2",
        "qwen2",
        "qwen35",
        "deepseek-coder",
        "starcoder",
        "refact",
        "phi-3",
    ] {
        let path = std::path::Path::new(&folder).join(format!("ggml-vocab-{name}.gguf"));
        let file = gguf::File::open(&path).unwrap();
        let m = file.metadata();
        let strings = |key| m.opt_strings(key).unwrap().unwrap_or_default().to_vec();
        let id = |key| m.opt_u32(key).unwrap();
        let types = m.opt_integers("tokenizer.ggml.token_type").unwrap().unwrap_or_default();
        let vocab = GgufVocab {
            model: m.str("tokenizer.ggml.model").unwrap().to_string(),
            pre: m.opt_str("tokenizer.ggml.pre").unwrap().map(str::to_string),
            tokens: strings("tokenizer.ggml.tokens"),
            token_types: types.into_iter().map(|t| t as i32).collect(),
            scores: m.opt_f32s("tokenizer.ggml.scores").unwrap().unwrap_or_default(),
            merges: strings("tokenizer.ggml.merges"),
            bos: id("tokenizer.ggml.bos_token_id"),
            eos: id("tokenizer.ggml.eos_token_id"),
            unk: id("tokenizer.ggml.unknown_token_id"),
            add_bos: m.opt_bool("tokenizer.ggml.add_bos_token").unwrap(),
            add_eos: m.opt_bool("tokenizer.ggml.add_eos_token").unwrap(),
            add_space_prefix: m.opt_bool("tokenizer.ggml.add_space_prefix").unwrap(),
            ..GgufVocab::default()
        };
        let gguf = Tokenizer::from_gguf(vocab).unwrap();
        let json = through_json(&gguf);
        let back = Tokenizer::from_gguf(json.to_gguf(gguf.vocab_size()).unwrap()).unwrap();
        let read = |ending: &str| std::fs::read_to_string(format!("{}{ending}", path.display())).unwrap();
        let (inp, out) = (read(".inp"), read(".out"));
        let plain = Specials { add: false, parse: false };
        for (text, line) in inp.split("\n__ggml_vocab_test__\n").zip(out.lines()) {
            // Qwen's own tokenizer brings text to normal form C, llama.cpp does not.
            if name.starts_with("qwen") && !unicode_normalization::is_nfc(text) {
                continue;
            }
            let want: Vec<u32> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
            for (form, t) in [("gguf", &gguf), ("json", &json), ("gguf again", &back)] {
                let have = t.encode(text, plain).unwrap();
                if have != want {
                    wrong.push(format!("{name} {form} {text:?}: {have:?}, llama.cpp {want:?}"));
                }
            }
        }
        for text in CORPUS {
            let have = |t: &Tokenizer| t.encode(text, plain).unwrap();
            assert_eq!(have(&gguf), have(&json), "{name}: {text:?}");
            assert_eq!(have(&gguf), have(&back), "{name}: {text:?}");
        }
    }
    assert!(wrong.is_empty(), "{} differ, first {}", wrong.len(), wrong[0]);
}
