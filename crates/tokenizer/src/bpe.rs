//! Byte-level BPE from a GGUF vocabulary (`tokenizer.ggml.model` = `gpt2`).

use crate::merge::{NO_ID, Symbol, merge};
use crate::split::Splitter;
use crate::vocab::{Kind, Vocab, byte_level_bytes};
use crate::{Error, bytes};
use std::collections::HashMap;
use unicode_normalization::{UnicodeNormalization, is_nfc};

pub(crate) struct Bpe {
    pub splitter: Splitter,
    /// The token of each byte.
    byte_ids: [u32; 256],
    /// (left, right) -> (rank, merged).
    merges: HashMap<(u32, u32), (u32, u32)>,
    /// Normal tokens by their bytes, only where whole words go before merges.
    words: HashMap<Vec<u8>, u32>,
}

impl Bpe {
    pub fn new(vocab: &Vocab, pre: Option<&str>, merges: &[String]) -> Result<Bpe, Error> {
        let bad = |what: String| Error::Vocabulary { what };
        let pre =
            pre.ok_or_else(|| bad("the pre-tokeniser is not named (tokenizer.ggml.pre is missing)".into()))?;
        let splitter = Splitter::by_name(pre)?;
        // A vocabulary of bytes alone needs none.
        let joined = |(text, kind): (&String, &Kind)| *kind == Kind::Normal && text.chars().nth(1).is_some();
        if merges.is_empty() && vocab.tokens.iter().zip(&vocab.kinds).any(joined) {
            return Err(bad("no merges (tokenizer.ggml.merges is missing or empty)".into()));
        }
        let mut byte_ids = [NO_ID; 256];
        for byte in 0..=255u8 {
            let mut text = [0; 4];
            if let Some(&id) = vocab.ids.get(bytes::to_char(byte).encode_utf8(&mut text)) {
                byte_ids[usize::from(byte)] = id;
            }
        }
        if byte_ids.iter().all(|&id| id == NO_ID) {
            return Err(bad("no token stands for a single byte".into()));
        }
        let mut table = HashMap::with_capacity(merges.len());
        let mut joined = String::new();
        for (rank, line) in merges.iter().enumerate() {
            // The left token may be a space itself, the right one holds none.
            let at = line.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at);
            let (left, right) = match at {
                Some(at) if at + 1 < line.len() => (&line[..at], &line[at + 1..]),
                _ => return Err(bad(format!("merge {rank} is {line:?}, not two tokens"))),
            };
            let id =
                |token: &str| {
                    vocab.ids.get(token).copied().ok_or_else(|| {
                        bad(format!("merge {rank} ({line:?}) names {token:?}, which is no token"))
                    })
                };
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            let (left, right, merged) = (id(left)?, id(right)?, id(&joined)?);
            // Of two equal merges the first counts.
            table.entry((left, right)).or_insert((rank as u32, merged));
        }
        let words = if splitter.ignore_merges {
            (0..vocab.tokens.len())
                .filter(|&id| vocab.kinds[id] == Kind::Normal)
                .map(|id| (byte_level_bytes(&vocab.tokens[id], Kind::Normal), id as u32))
                .collect()
        } else {
            HashMap::new()
        };
        Ok(Bpe { splitter, byte_ids, merges: table, words })
    }

    /// The merges, best first; of equal ones the first alone.
    pub fn merges_in_order<'v>(&self, vocab: &'v Vocab) -> Vec<(&'v str, &'v str)> {
        let mut ranked: Vec<(u32, (u32, u32))> =
            self.merges.iter().map(|(&pair, &(rank, _))| (rank, pair)).collect();
        ranked.sort_unstable();
        let text = |id: u32| vocab.tokens[id as usize].as_str();
        ranked.into_iter().map(|(_, (left, right))| (text(left), text(right))).collect()
    }

    /// Whether BOS goes first where the file does not say.
    pub fn add_bos(&self) -> bool {
        self.splitter.add_bos
    }

    /// Appends the tokens of `text`, which starts at byte `at` of the whole.
    pub fn encode(&self, at: usize, text: &str, out: &mut Vec<u32>) -> Result<(), Error> {
        let normal: String;
        let text = if self.splitter.nfc && !is_nfc(text) {
            normal = text.nfc().collect();
            &normal
        } else {
            text
        };
        let mut symbols: Vec<Symbol> = Vec::new();
        let mut start = 0;
        for word in self.splitter.split(text) {
            if let Some(&id) = self.words.get(word.as_bytes()) {
                out.push(id);
                start += word.len();
                continue;
            }
            symbols.clear();
            for (i, byte) in word.bytes().enumerate() {
                let id = self.byte_ids[usize::from(byte)];
                if id == NO_ID {
                    let character = word[..]
                        .char_indices()
                        .take_while(|&(from, _)| from <= i)
                        .last()
                        .map_or('\u{FFFD}', |(_, c)| c);
                    return Err(Error::NoToken { character, at: at + start + i });
                }
                symbols.push(Symbol { start: i, end: i + 1, id });
            }
            merge(&mut symbols, |l, r| self.merges.get(&(l.id, r.id)).copied());
            out.extend(symbols.iter().map(|s| s.id));
            start += word.len();
        }
        Ok(())
    }
}
