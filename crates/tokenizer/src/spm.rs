//! SentencePiece's BPE from a GGUF vocabulary (`tokenizer.ggml.model` = `llama`; Kudo and
//! Richardson 2018): spaces are written `▁`, the pair whose merged piece has the best score
//! merges first, and characters without a piece fall back to bytes.

use crate::Error;
use crate::merge::{NO_ID, Symbol, merge};
use crate::vocab::{Kind, Vocab, byte_token};
use std::collections::HashMap;

pub(crate) struct Spm {
    /// Text pieces: (rank by falling score, equal scores equal ranks; id). Control, unknown and
    /// byte tokens are not among them: no text may turn into one.
    pieces: HashMap<String, (u32, u32)>,
    /// The token of each byte.
    byte_ids: [u32; 256],
    /// As the file has them, by id.
    pub scores: Vec<f32>,
    pub unk: Option<u32>,
    /// Whether a space goes in front of a text.
    pub space_prefix: bool,
}

impl Spm {
    pub fn new(vocab: &Vocab, scores: Vec<f32>, unk: Option<u32>, space_prefix: bool) -> Result<Spm, Error> {
        let bad = |what: String| Err(Error::Vocabulary { what });
        let n = vocab.tokens.len();
        if scores.len() != n {
            return bad(format!("{n} tokens, but {} scores", scores.len()));
        }
        if let Some(id) = scores.iter().position(|s| s.is_nan()) {
            return bad(format!("the score of token {id} is not a number"));
        }
        let mut order: Vec<u32> = (0..n as u32).collect();
        order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
        let mut pieces = HashMap::with_capacity(n);
        let mut byte_ids = [NO_ID; 256];
        let (mut rank, mut last) = (0, None);
        for id in order {
            let (token, kind) = (&vocab.tokens[id as usize], vocab.kinds[id as usize]);
            // -0.0 and 0.0 are one score.
            let score = scores[id as usize] + 0.0;
            if last.is_some_and(|last| last != score) {
                rank += 1;
            }
            last = Some(score);
            match kind {
                Kind::Normal | Kind::UserDefined | Kind::Unused => {
                    pieces.insert(token.clone(), (rank, id));
                }
                Kind::Byte => match byte_token(token) {
                    Some(byte) => byte_ids[usize::from(byte)] = id,
                    None => return bad(format!("byte token {id} is {token:?}, not <0xHH>")),
                },
                Kind::Control | Kind::Unknown => {}
            }
        }
        let unk = unk.or_else(|| {
            let found = vocab.kinds.iter().position(|&k| k == Kind::Unknown);
            found.map(|id| id as u32)
        });
        Ok(Spm { pieces, byte_ids, scores, unk, space_prefix })
    }

    /// All pairs of pieces whose join is a piece, in the order in which scores merge them. Of pairs that make one piece
    /// the one with the longer left side goes first: it begins further left. (As transformers converts such
    /// vocabularies.)
    pub fn merges(&self) -> Vec<(&str, &str)> {
        let mut found: Vec<(u32, &str, &str)> = Vec::new();
        for (piece, &(rank, _)) in &self.pieces {
            let pairs = all_merges(piece, |part| self.pieces.contains_key(part));
            found.extend(pairs.map(|(left, right)| (rank, left, right)));
        }
        found.sort_unstable_by(|a, b| {
            let key = |m: &(u32, &str, &str)| (m.0, std::cmp::Reverse((m.1.len(), m.2.len())));
            key(a).cmp(&key(b)).then_with(|| a.1.cmp(b.1))
        });
        found.into_iter().map(|(_, left, right)| (left, right)).collect()
    }

    /// Appends the tokens of `text`, which starts at byte `at` of the whole; `prefix`: the start
    /// of a text, where a space goes in front.
    pub fn encode(&self, at: usize, text: &str, prefix: bool, out: &mut Vec<u32>) -> Result<(), Error> {
        let mut spaced = String::with_capacity(text.len() + text.len() / 2 + 3);
        let prefix = prefix && self.space_prefix;
        if prefix {
            spaced.push('▁');
        }
        spaced.extend(text.chars().map(|c| if c == ' ' { '▁' } else { c }));
        let mut symbols: Vec<Symbol> = spaced
            .char_indices()
            .map(|(start, c)| {
                let end = start + c.len_utf8();
                let id = self.pieces.get(&spaced[start..end]).map_or(NO_ID, |&(_, id)| id);
                Symbol { start, end, id }
            })
            .collect();
        merge(&mut symbols, |l, r| self.pieces.get(&spaced[l.start..r.end]).copied());
        for (i, symbol) in symbols.iter().enumerate() {
            if symbol.id != NO_ID {
                out.push(symbol.id);
                continue;
            }
            let piece = &spaced[symbol.start..symbol.end];
            let bytes = || piece.bytes().map(|b| self.byte_ids[usize::from(b)]);
            if bytes().all(|id| id != NO_ID) {
                out.extend(bytes());
            } else if let Some(unk) = self.unk {
                out.push(unk);
            } else {
                let before: usize =
                    symbols[..i].iter().map(|s| spaced[s.start..s.end].replace('▁', " ").len()).sum();
                let character = piece.chars().next().unwrap_or('\u{FFFD}');
                return Err(Error::NoToken {
                    character,
                    at: at + before.saturating_sub(usize::from(prefix)),
                });
            }
        }
        Ok(())
    }

    /// The bytes of a token.
    pub fn bytes(token: &str, kind: Kind) -> Vec<u8> {
        match kind {
            Kind::Byte => byte_token(token).map_or_else(Vec::new, |b| vec![b]),
            Kind::Control | Kind::Unknown => token.as_bytes().to_vec(),
            Kind::Normal | Kind::UserDefined | Kind::Unused => token.replace('▁', " ").into_bytes(),
        }
    }
}

/// The ways to cut `piece` in two of which both are `known`.
pub(crate) fn all_merges<'p>(
    piece: &'p str,
    known: impl Fn(&str) -> bool + 'p,
) -> impl Iterator<Item = (&'p str, &'p str)> {
    let cuts = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
    cuts.filter(move |(left, right)| known(left) && known(right))
}
