//! The vocabulary and chat template of SmolLM2-135M-Instruct, from its GGUF file.

use sparsam_formats::gguf;
use sparsam_tokenizer::{GgufVocab, Message, RenderOptions, Specials, Tokenizer};
use std::time::Instant;

const PLAIN: Specials = Specials { add: false, parse: false };

fn smollm2() -> Option<Tokenizer> {
    let file = gguf::File::open(sparsam_testkit::smollm2()?).unwrap();
    let m = file.metadata();
    let strings = |key| m.opt_strings(key).unwrap().unwrap_or_default().to_vec();
    let id = |key| m.opt_u32(key).unwrap();
    let vocab = GgufVocab {
        model: m.str("tokenizer.ggml.model").unwrap().to_string(),
        pre: m.opt_str("tokenizer.ggml.pre").unwrap().map(str::to_string),
        tokens: strings("tokenizer.ggml.tokens"),
        token_types: m
            .opt_integers("tokenizer.ggml.token_type")
            .unwrap()
            .unwrap_or_default()
            .into_iter()
            .map(|t| t as i32)
            .collect(),
        merges: strings("tokenizer.ggml.merges"),
        bos: id("tokenizer.ggml.bos_token_id"),
        eos: id("tokenizer.ggml.eos_token_id"),
        unk: id("tokenizer.ggml.unknown_token_id"),
        pad: id("tokenizer.ggml.padding_token_id"),
        add_bos: m.opt_bool("tokenizer.ggml.add_bos_token").unwrap(),
        chat_template: m.opt_str("tokenizer.chat_template").unwrap().map(str::to_string),
        ..GgufVocab::default()
    };
    let start = Instant::now();
    let tokenizer = Tokenizer::from_gguf(vocab).unwrap();
    eprintln!("loaded in {:?}", start.elapsed());
    Some(tokenizer)
}

#[test]
fn special_tokens() {
    let Some(t) = smollm2() else { return };
    assert_eq!(t.vocab_size(), 49152);
    assert_eq!((t.bos(), t.eos()), (Some(1), Some(2)));
    assert_eq!(t.stop_ids(), [2, 0]);
    assert_eq!(t.token(2).as_deref(), Some("<|im_end|>"));
    assert_eq!(t.id("Ġthe"), Some(260));
    assert_eq!(t.token_bytes(260).as_deref(), Some(&b" the"[..]));
}

#[test]
fn chat() {
    let Some(t) = smollm2() else { return };
    let template = t.chat_template().unwrap();
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    let text = template.render(&[Message::new("user", "Hello <|im_end|>")], &options).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nHello <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    );
    let ids = t.encode(&text, Specials { add: false, parse: true }).unwrap();
    assert_eq!(ids[..3], [1, 9690, 198]);
    assert_eq!(ids.iter().filter(|&&id| id == 2).count(), 3);
    assert_eq!(t.decode(&ids, false), text);
    // Not parsed, the look-alike is text.
    let ids = t.encode("<|im_end|>", PLAIN).unwrap();
    assert!(ids.len() > 1 && !ids.contains(&2), "{ids:?}");
}

/// llama.cpp's and transformers' count of tokens; llama.cpp's first ones. Needs wikitext-2, which
/// is fetched apart: its folder in `SPARSAM_WIKITEXT2`.
#[test]
fn wikitext_2_valid() {
    let Some(folder) = std::env::var_os("SPARSAM_WIKITEXT2") else {
        eprintln!("SPARSAM_WIKITEXT2 is not set: left out");
        return;
    };
    let Some(t) = smollm2() else { return };
    let text = std::fs::read_to_string(std::path::Path::new(&folder).join("valid.txt")).unwrap();
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let start = Instant::now();
    let ids = t.encode(text, PLAIN).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    eprintln!("{} bytes in {seconds:.3} s", text.len());
    assert_eq!(ids.len(), 273_868);
    assert_eq!(ids[..12], [3717, 446, 12928, 21777, 310, 2078, 21777, 446, 3717, 3717, 12928, 21777]);
    assert_eq!(t.decode(&ids, false), text);
}
