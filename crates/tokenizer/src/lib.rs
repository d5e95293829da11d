//! Tokenizers from `tokenizer.json` and GGUF vocabularies, and chat templates.
//!
//! A leaf: knows no model, and no file but the ones of tokenizers, which it gets as bytes or as
//! the plain struct [`GgufVocab`]. Start reading at [`Tokenizer`]; `bpe.rs` and `spm.rs` hold the
//! two kinds of GGUF vocabulary, `split.rs` the pre-tokenisers, `merge.rs` the merging that both
//! kinds share, `json.rs` the road through the `tokenizers` crate, `template.rs` chat templates,
//! `export.rs` the way back into files.
#![forbid(unsafe_code)]

mod bpe;
mod bytes;
mod error;
mod export;
mod json;
mod merge;
mod special;
mod split;
mod spm;
mod stream;
mod template;
pub mod train;
mod vocab;

pub use error::Error;
pub use export::JsonFiles;
pub use stream::DecodeStream;
pub use template::{ChatTemplate, Message, RenderOptions};
pub use vocab::GgufVocab;

use bpe::Bpe;
use json::{Config, Json};
use special::{Matcher, Part};
use spm::Spm;
use std::sync::Arc;
use template::SpecialTexts;
use vocab::{Kind, SpecialIds, Vocab, byte_level_bytes};

/// What encoding does about special tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Specials {
    /// Add the tokens that the model wants around a text (BOS, EOS). Not for the output of a
    /// chat template, which writes them itself.
    pub add: bool,
    /// Read special tokens written in the text as the tokens. For the output of a chat template;
    /// never for text of a user alone, who could end the turn.
    pub parse: bool,
}

/// A model's tokenizer: text to ids and back. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer(Arc<Shared>);

#[derive(Clone)]
struct Shared {
    inner: Arc<Inner>,
    ids: SpecialIds,
    texts: SpecialTexts,
    templates: Vec<(String, ChatTemplate)>,
}

enum Inner {
    Gguf(Box<Gguf>),
    Json(Box<Json>),
}

struct Gguf {
    vocab: Vocab,
    matcher: Matcher,
    model: Merger,
    add_bos: Option<u32>,
    add_eos: Option<u32>,
    /// The file's single values, for writing it again; its lists and templates are left out.
    head: GgufVocab,
}

enum Merger {
    Bytes(Bpe),
    Pieces(Spm),
}

impl Gguf {
    fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, Error> {
        let mut out = Vec::with_capacity(text.len() / 3 + 2);
        let added = |id: Option<u32>| id.filter(|_| specials.add);
        out.extend(added(self.add_bos));
        // As llama.cpp and the reference encoders of Llama 2 and Mistral do it, a text's space
        // goes in front at its start and after each special token.
        for part in self.matcher.parts(text, specials.parse) {
            match (part, &self.model) {
                (Part::Special(id), _) => out.push(id),
                (Part::Text(at, text), Merger::Bytes(bpe)) => bpe.encode(at, text, &mut out)?,
                (Part::Text(at, text), Merger::Pieces(spm)) => {
                    spm.encode(at, text, true, &mut out)?;
                }
            }
        }
        out.extend(added(self.add_eos));
        Ok(out)
    }

    fn bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.vocab.tokens.get(id as usize)?;
        let kind = self.vocab.kinds[id as usize];
        Some(match &self.model {
            Merger::Bytes(_) => byte_level_bytes(token, kind),
            Merger::Pieces(_) => Spm::bytes(token, kind),
        })
    }

    /// Takes the space away that encoding put in front of a text.
    fn strip_prefix(&self, bytes: &mut Vec<u8>) {
        if let Merger::Pieces(spm) = &self.model
            && spm.space_prefix
            && bytes.first() == Some(&b' ')
        {
            bytes.remove(0);
        }
    }

    fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut text = Vec::with_capacity(ids.len() * 4);
        let mut first = true;
        for &id in ids {
            if skip_special && self.vocab.is_special(id) {
                continue;
            }
            let mut bytes = self.bytes(id).unwrap_or_default();
            let special = self.vocab.kinds.get(id as usize).is_some_and(|&k| k == Kind::Control);
            if first && !special && !bytes.is_empty() {
                first = false;
                self.strip_prefix(&mut bytes);
            }
            text.extend(bytes);
        }
        String::from_utf8(text).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned())
    }
}

impl Tokenizer {
    /// The tokenizer of a GGUF file's vocabulary.
    ///
    /// Byte-level vocabularies need the name of their pre-tokeniser. Words of Qwen 2 are brought
    /// to normal form C, as its own tokenizer does (llama.cpp does not); digits are those of
    /// Unicode, fractions such as ½ included, as llama.cpp and the models' own tokenizers have
    /// it (transformers, reading a GGUF file, cuts ½ differently for SmolLM2).
    ///
    /// # Errors
    /// [`Error::Vocabulary`] if lengths, ids, tokens or merges contradict each other,
    /// [`Error::UnknownModel`] and [`Error::UnknownPre`] for kinds that are not implemented.
    pub fn from_gguf(mut file: GgufVocab) -> Result<Tokenizer, Error> {
        // Known first: a file of another kind need not keep to the rules of these two.
        if !matches!(file.model.as_str(), "gpt2" | "llama") {
            return Err(Error::UnknownModel { model: file.model });
        }
        let named = [
            ("BOS", file.bos),
            ("EOS", file.eos),
            ("EOT", file.eot),
            ("EOM", file.eom),
            ("unknown token's", file.unk),
            ("padding", file.pad),
        ];
        let vocab = Vocab::new(std::mem::take(&mut file.tokens), &file.token_types, &named)?;
        let (model, add_bos) = if file.model == "gpt2" {
            let bpe = Bpe::new(&vocab, file.pre.as_deref(), &file.merges)?;
            let add_bos = bpe.add_bos() && file.bos.is_some();
            (Merger::Bytes(bpe), add_bos)
        } else {
            let space_prefix = file.add_space_prefix.unwrap_or(true);
            let spm = Spm::new(&vocab, std::mem::take(&mut file.scores), file.unk, space_prefix)?;
            (Merger::Pieces(spm), file.bos.is_some())
        };
        let wanted = |name: &str, add: bool, id: Option<u32>| match (add, id) {
            (true, None) => Err(Error::Vocabulary {
                what: format!("{name} is to be added to texts, but its id is missing"),
            }),
            (true, id) => Ok(id),
            (false, _) => Ok(None),
        };
        let add_bos = wanted("BOS", file.add_bos.unwrap_or(add_bos), file.bos)?;
        let add_eos = wanted("EOS", file.add_eos.unwrap_or(false), file.eos)?;
        let ids = SpecialIds {
            bos: file.bos,
            eos: file.eos,
            unk: file.unk,
            pad: file.pad,
            eot: file.eot,
            eom: file.eom,
            stop: vocab.stop_ids(&[file.eos, file.eot, file.eom]),
        };
        let texts = SpecialTexts::from_ids(&ids, |id| vocab.tokens.get(id as usize).cloned());
        let default = file.chat_template.take().map(|source| ("default".to_string(), source));
        let templates = default
            .into_iter()
            .chain(std::mem::take(&mut file.named_templates))
            .map(|(name, source)| (name, ChatTemplate::new(source, texts.clone())))
            .collect();
        let matcher = Matcher::new(&vocab)?;
        let head = GgufVocab { token_types: Vec::new(), merges: Vec::new(), ..file };
        let gguf = Gguf { vocab, matcher, model, add_bos, add_eos, head };
        let inner = Arc::new(Inner::Gguf(Box::new(gguf)));
        Ok(Tokenizer(Arc::new(Shared { inner, ids, texts, templates })))
    }

    /// The tokenizer of a `tokenizer.json`, with the special tokens and chat templates of the
    /// `tokenizer_config.json` beside it.
    ///
    /// Truncation and padding that the file asks for are switched off: no text is cut in silence.
    ///
    /// # Errors
    /// [`Error::Json`] if a file is not valid or the two contradict each other.
    pub fn from_json(tokenizer_json: &[u8], tokenizer_config: Option<&[u8]>) -> Result<Tokenizer, Error> {
        let json = Json::new(tokenizer_json)?;
        let config = tokenizer_config.map(Config::new).transpose()?.unwrap_or_default();
        let ids = json.special_ids(&config)?;
        let texts = SpecialTexts(config.special_texts);
        let templates = config
            .templates
            .into_iter()
            .map(|(name, source)| (name, ChatTemplate::new(source, texts.clone())))
            .collect();
        let inner = Arc::new(Inner::Json(Box::new(json)));
        Ok(Tokenizer(Arc::new(Shared { inner, ids, texts, templates })))
    }

    /// The same tokenizer with `source` as its default chat template: the `chat_template.jinja`
    /// beside a `tokenizer.json`, or a user's own. Special tokens keep their names.
    pub fn with_chat_template(self, source: String) -> Tokenizer {
        // Clones keep theirs; the vocabulary is shared.
        let mut shared = Arc::unwrap_or_clone(self.0);
        shared.templates.retain(|(name, _)| name != "default");
        let template = ChatTemplate::new(source, shared.texts.clone());
        shared.templates.insert(0, ("default".into(), template));
        Tokenizer(Arc::new(shared))
    }

    /// The ids of `text`.
    ///
    /// # Errors
    /// [`Error::NoToken`] for a character that the vocabulary lacks altogether (others drop it).
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, Error> {
        match &*self.0.inner {
            Inner::Gguf(gguf) => gguf.encode(text, specials),
            Inner::Json(json) => json.encode(text, specials),
        }
    }

    /// The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary
    /// nothing. `skip_special` leaves control tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        match &*self.0.inner {
            Inner::Gguf(gguf) => gguf.decode(ids, skip_special),
            Inner::Json(json) => json.decode(ids, skip_special),
        }
    }

    /// The bytes that a token stands for, special tokens written out; they need not be UTF-8.
    /// Nothing for ids outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        match &*self.0.inner {
            Inner::Gguf(gguf) => gguf.bytes(id),
            Inner::Json(json) => json.token_bytes(id),
        }
    }

    /// Decodes token by token, from the start of a text.
    pub fn stream(&self) -> DecodeStream {
        DecodeStream::new(self, &[])
    }

    /// Decodes token by token what comes after `before`: a space at its start is kept.
    pub fn stream_after(&self, before: &[u32]) -> DecodeStream {
        DecodeStream::new(self, before)
    }

    /// The token that begins a text, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.0.ids.bos
    }

    /// The token that ends a text, if the model has one.
    pub fn eos(&self) -> Option<u32> {
        self.0.ids.eos
    }

    /// The token that fills up batches, if the model has one.
    pub fn pad(&self) -> Option<u32> {
        self.0.ids.pad
    }

    /// The tokens at which generation stops: the declared ones (EOS first, then EOT and EOM), and
    /// control tokens whose text is a known end of turn, such as `<|im_end|>`.
    pub fn stop_ids(&self) -> &[u32] {
        &self.0.ids.stop
    }

    /// How many ids there are, the largest plus one.
    pub fn vocab_size(&self) -> usize {
        match &*self.0.inner {
            Inner::Gguf(gguf) => gguf.vocab.tokens.len(),
            Inner::Json(json) => json.vocab_size(),
        }
    }

    /// A token as the vocabulary writes it (`Ġthe`, `▁the`, `<0x0A>`).
    pub fn token(&self, id: u32) -> Option<String> {
        match &*self.0.inner {
            Inner::Gguf(gguf) => gguf.vocab.tokens.get(id as usize).cloned(),
            Inner::Json(json) => json.token(id),
        }
    }

    /// The id of a token as the vocabulary writes it.
    pub fn id(&self, token: &str) -> Option<u32> {
        match &*self.0.inner {
            Inner::Gguf(gguf) => gguf.vocab.ids.get(token).copied(),
            Inner::Json(json) => json.id(token),
        }
    }

    /// Whether a token is a control token, which decoding may skip.
    pub fn is_special(&self, id: u32) -> bool {
        match &*self.0.inner {
            Inner::Gguf(gguf) => gguf.vocab.is_special(id),
            Inner::Json(json) => json.is_special(id),
        }
    }

    /// The model's chat template: the one named `default`, or the only one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.named_template("default").or(match self.0.templates.as_slice() {
            [(_, only)] => Some(only),
            _ => None,
        })
    }

    /// A chat template by its name, such as `tool_use`.
    pub fn named_template(&self, name: &str) -> Option<&ChatTemplate> {
        self.0.templates.iter().find(|(n, _)| n == name).map(|(_, template)| template)
    }

    /// The names of all chat templates.
    pub fn template_names(&self) -> impl Iterator<Item = &str> {
        self.0.templates.iter().map(|(name, _)| name.as_str())
    }
}
