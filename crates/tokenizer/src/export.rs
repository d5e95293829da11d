//! Writing a tokenizer: as a GGUF vocabulary, or as `tokenizer.json` with `tokenizer_config.json`.
//!
//! Each way works from either origin. What one form can say and the other cannot (a pre-tokeniser without a name in
//! GGUF, a vocabulary that is neither byte-level BPE nor SentencePiece) is an error: a near match would give other tokens
//! than the model was trained on.

mod gguf;
mod json;

use crate::template::SpecialTexts;
use crate::{ChatTemplate, Error, GgufVocab, Inner, Tokenizer};
use serde_json::{Map, Value, json};

/// A tokenizer as files beside a safetensors model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonFiles {
    /// `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// `tokenizer_config.json`: special tokens and chat templates.
    pub config: Vec<u8>,
}

fn cannot<T>(form: &'static str, what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Unrepresentable { form, what: what.into() })
}

impl Tokenizer {
    /// The vocabulary as a GGUF file holds it, with exactly `vocab_size` tokens: as many as the model's table has rows.
    /// Rows beyond the tokenizer's ids get unused tokens `[PADi]`, as llama.cpp's converter names them.
    ///
    /// # Errors
    /// [`Error::Unrepresentable`] if a GGUF file cannot hold it: its pre-tokeniser has no name there, its merges are
    /// not those that scores would give, or it has more tokens than `vocab_size`.
    pub fn to_gguf(&self, vocab_size: usize) -> Result<GgufVocab, Error> {
        let mut vocab = match &*self.0.inner {
            Inner::Gguf(own) => own.to_gguf(),
            Inner::Json(own) => gguf::from_json(&own.to_value()?, own, &self.0.ids)?,
        };
        gguf::fill(&mut vocab, vocab_size)?;
        let default = self.chat_template().map(|t| t.source().to_string());
        for (name, template) in &self.0.templates {
            if default.as_deref() != Some(template.source()) {
                vocab.named_templates.push((name.clone(), template.source().to_string()));
            }
        }
        vocab.chat_template = default;
        Ok(vocab)
    }

    /// The tokenizer as the files that transformers loads. Unused tokens of a GGUF vocabulary's end, which fill up a
    /// table, are left out.
    ///
    /// # Errors
    /// [`Error::Unrepresentable`] if a special token has no text.
    pub fn to_json(&self) -> Result<JsonFiles, Error> {
        let tokenizer = match &*self.0.inner {
            Inner::Gguf(own) => json::from_gguf(own)?,
            Inner::Json(own) => own.to_value()?,
        };
        let config = config(&self.0.texts, &self.0.templates);
        let bytes = |value: &Value| {
            let mut bytes =
                serde_json::to_vec_pretty(value).expect("a tree of JSON values has no way to fail");
            bytes.push(b'\n');
            bytes
        };
        Ok(JsonFiles { tokenizer: bytes(&tokenizer), config: bytes(&Value::Object(config)) })
    }
}

/// `tokenizer_config.json`. The class takes `tokenizer.json` as it is; others rebuild it from parts.
fn config(texts: &SpecialTexts, templates: &[(String, ChatTemplate)]) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    map.insert("clean_up_tokenization_spaces".into(), json!(false));
    for (name, text) in &texts.0 {
        map.insert(name.clone(), json!(text));
    }
    match templates {
        [] => {}
        [(name, template)] if name == "default" => {
            map.insert("chat_template".into(), json!(template.source()));
        }
        several => {
            let entry = |(name, t): &(String, ChatTemplate)| json!({ "name": name, "template": t.source() });
            map.insert("chat_template".into(), several.iter().map(entry).collect());
        }
    }
    map
}
