//! Finding special tokens in text.

use crate::Error;
use crate::vocab::{Kind, Vocab};
use aho_corasick::{AhoCorasick, MatchKind};

/// A part of a text.
pub(crate) enum Part<'t> {
    /// A special token's id.
    Special(u32),
    /// Ordinary text and where it starts in the whole, in bytes.
    Text(usize, &'t str),
}

/// Finds tokens that are matched in the text before it is cut into words: the user-defined ones
/// always (they are text, such as runs of line breaks), control tokens only where asked for,
/// because otherwise anyone's text could end a turn.
pub(crate) struct Matcher {
    always: Option<(AhoCorasick, Vec<u32>)>,
    parsing: Option<(AhoCorasick, Vec<u32>)>,
}

fn automaton(vocab: &Vocab, wanted: &[Kind]) -> Result<Option<(AhoCorasick, Vec<u32>)>, Error> {
    let ids: Vec<u32> = (0..vocab.tokens.len() as u32)
        .filter(|&id| wanted.contains(&vocab.kinds[id as usize]) && !vocab.tokens[id as usize].is_empty())
        .collect();
    if ids.is_empty() {
        return Ok(None);
    }
    let texts = ids.iter().map(|&id| &vocab.tokens[id as usize]);
    // The longest token wins where several begin at one place, the leftmost where they overlap.
    let automaton = AhoCorasick::builder()
        .match_kind(MatchKind::LeftmostLongest)
        .build(texts)
        .map_err(|e| Error::Vocabulary { what: format!("too many special tokens: {e}") })?;
    Ok(Some((automaton, ids)))
}

impl Matcher {
    pub fn new(vocab: &Vocab) -> Result<Matcher, Error> {
        Ok(Matcher {
            always: automaton(vocab, &[Kind::UserDefined])?,
            parsing: automaton(vocab, &[Kind::UserDefined, Kind::Control, Kind::Unknown])?,
        })
    }

    /// Cuts `text` at special tokens (control tokens only if `parse`).
    pub fn parts<'t>(&self, text: &'t str, parse: bool) -> Vec<Part<'t>> {
        let mut parts = Vec::new();
        let mut from = 0;
        if let Some((automaton, ids)) = if parse { &self.parsing } else { &self.always } {
            for found in automaton.find_iter(text) {
                if from < found.start() {
                    parts.push(Part::Text(from, &text[from..found.start()]));
                }
                parts.push(Part::Special(ids[found.pattern().as_usize()]));
                from = found.end();
            }
        }
        if from < text.len() {
            parts.push(Part::Text(from, &text[from..]));
        }
        parts
    }
}
