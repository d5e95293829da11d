//! New vocabularies: byte-level BPE learnt from text (Sennrich et al. 2016; Radford et al. 2019 for bytes), or the bytes
//! themselves.
//!
//! The result is a `tokenizer.json` with a `tokenizer_config.json`, as [`crate::Tokenizer::from_json`] and other tools
//! read them. Words are cut by GPT-2's pre-tokeniser, which GGUF files name `gpt-2`.

use crate::export::JsonFiles;
use crate::{Error, bytes};
use serde_json::{Map, Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::tokenizer::{AddedToken, TokenizerBuilder};
use tokenizers::{NormalizerWrapper, PostProcessorWrapper};

/// The one special token of a new vocabulary: it ends a text, and begins one.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// Tokens below which there is no vocabulary: one for each byte, and [`END_OF_TEXT`].
pub const SMALLEST_VOCABULARY: usize = 257;

/// A vocabulary of `vocab_size` tokens learnt from `texts`: the bytes, merges of the most frequent pairs, and
/// [`END_OF_TEXT`]. Fewer tokens where the texts have no more pairs that occur twice. The same texts in the same order
/// give the same vocabulary.
///
/// # Errors
/// [`Error::Json`] if `vocab_size` is below [`SMALLEST_VOCABULARY`], or the library fails.
pub fn byte_level_bpe<S: AsRef<str> + Send>(
    texts: impl Iterator<Item = S> + Send,
    vocab_size: usize,
) -> Result<JsonFiles, Error> {
    let failed = |what: String| Error::Json { file: "tokenizer.json", what };
    if vocab_size < SMALLEST_VOCABULARY {
        return Err(failed(format!(
            "a byte-level vocabulary has at least {SMALLEST_VOCABULARY} tokens (256 bytes and {END_OF_TEXT}), not {vocab_size}"
        )));
    }
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    // No space in front of the text: what is encoded is what comes back.
    let cut = ByteLevel::new(false, true, true);
    let mut tokenizer =
        TokenizerBuilder::<BPE, NormalizerWrapper, ByteLevel, PostProcessorWrapper, ByteLevel>::new()
            .with_model(BPE::default())
            .with_normalizer(None)
            .with_pre_tokenizer(Some(cut))
            .with_post_processor(None)
            .with_decoder(Some(cut))
            .build()
            .map_err(|e| failed(e.to_string()))?;
    tokenizer.train(&mut trainer, texts).map_err(|e| failed(e.to_string()))?;
    let json = tokenizer.to_string(true).map_err(|e| failed(e.to_string()))?;
    Ok(JsonFiles { tokenizer: json.into_bytes(), config: config() })
}

/// One token for each byte, its id the byte itself, and [`END_OF_TEXT`] with id 256. Needs no text to learn from.
pub fn byte_vocabulary() -> JsonFiles {
    let vocab: Map<String, Value> =
        (0..=u8::MAX).map(|b| (bytes::to_char(b).to_string(), json!(b))).collect();
    let cut =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": 256, "content": END_OF_TEXT, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": cut,
        "post_processor": null,
        "decoder": cut,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    });
    JsonFiles { tokenizer: pretty(&json), config: config() }
}

fn config() -> Vec<u8> {
    pretty(&json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": false,
    }))
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Specials, Tokenizer};

    fn open(files: &JsonFiles) -> Tokenizer {
        Tokenizer::from_json(&files.tokenizer, Some(&files.config)).unwrap()
    }

    #[test]
    fn bytes_are_their_own_ids() {
        let t = open(&byte_vocabulary());
        let text = "a €\n\u{0}z";
        let ids = t.encode(text, Specials::default()).unwrap();
        assert_eq!(ids, text.bytes().map(u32::from).collect::<Vec<_>>());
        assert_eq!(t.decode(&ids, true), text);
        assert_eq!((t.vocab_size(), t.eos(), t.id(END_OF_TEXT)), (257, Some(256), Some(256)));
    }

    #[test]
    fn new_vocabularies_have_the_same_ids_as_gguf() {
        let learnt = byte_level_bpe(["ab ab abc 12 12"; 9].iter(), 280).unwrap();
        for files in [byte_vocabulary(), learnt] {
            let t = open(&files);
            let gguf = Tokenizer::from_gguf(t.to_gguf(t.vocab_size()).unwrap()).unwrap();
            for text in ["ab abc 12", "a €\n\n z", ""] {
                let ids = t.encode(text, Specials::default()).unwrap();
                assert_eq!(gguf.encode(text, Specials::default()).unwrap(), ids, "{text:?}");
            }
            assert_eq!((gguf.eos(), gguf.vocab_size()), (t.eos(), t.vocab_size()));
        }
    }

    #[test]
    fn merges_are_learnt_the_same_each_time() {
        let texts = || ["the cat and the hat and the bat\n", "the the thé €"].into_iter().cycle().take(40);
        let files = byte_level_bpe(texts(), 300).unwrap();
        assert_eq!(files, byte_level_bpe(texts(), 300).unwrap());
        let t = open(&files);
        let ids = t.encode("the cat", Specials::default()).unwrap();
        assert_eq!(ids.len(), 2, "{ids:?}");
        for text in ["the cat", "  €uro\r\n", "nothing seen before: ☃"] {
            assert_eq!(t.decode(&t.encode(text, Specials::default()).unwrap(), true), text);
        }
        assert!(t.vocab_size() <= 300 && t.vocab_size() > 257, "{}", t.vocab_size());
        assert!(byte_level_bpe(texts(), 100).unwrap_err().to_string().contains("at least 257"));
    }
}
