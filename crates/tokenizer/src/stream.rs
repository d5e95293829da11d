//! Decoding token by token.

use crate::{Inner, Tokenizer};
use std::sync::Arc;

/// Turns tokens into text as they come, in whole characters only.
///
/// What [`DecodeStream::push`] and [`DecodeStream::finish`] return, put together, is
/// [`Tokenizer::decode`] of all tokens with special ones skipped. Bytes that are no UTF-8 become
/// U+FFFD, as there. Owns a reference to the tokenizer, so it can live beside it.
pub struct DecodeStream {
    tokenizer: Tokenizer,
    state: State,
}

enum State {
    /// Bytes that do not make a whole character yet, and whether the next text is the first.
    Bytes { held: Vec<u8>, first: bool },
    /// Tokens whose text is not all given out, and how many bytes of their text are.
    Text { ids: Vec<u32>, given: usize },
}

/// From this many tokens on, a stream over `tokenizer.json` lets go of the ones that are given
/// out (each push decodes what is kept).
const KEEP: usize = 16;

impl DecodeStream {
    pub(crate) fn new(tokenizer: &Tokenizer, before: &[u32]) -> DecodeStream {
        let tokenizer = Tokenizer(Arc::clone(&tokenizer.0));
        let state = match &*tokenizer.0.inner {
            Inner::Gguf(_) => State::Bytes { held: Vec::new(), first: before.is_empty() },
            Inner::Json(json) => {
                let ids = before[before.len().saturating_sub(KEEP)..].to_vec();
                let given = json.decode(&ids, true).len();
                State::Text { ids, given }
            }
        };
        DecodeStream { tokenizer, state }
    }

    /// Takes one more token; gives the text that is now complete, if any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        let inner = &*self.tokenizer.0.inner;
        let text = match (&mut self.state, inner) {
            (State::Bytes { held, first }, Inner::Gguf(gguf)) => {
                if gguf.vocab.is_special(id) {
                    return None;
                }
                let mut bytes = gguf.bytes(id).unwrap_or_default();
                if *first && !bytes.is_empty() {
                    *first = false;
                    gguf.strip_prefix(&mut bytes);
                }
                held.extend(bytes);
                take_complete(held)
            }
            (State::Text { ids, given }, Inner::Json(json)) => {
                ids.push(id);
                let text = json.decode(ids, true);
                // A character may be unfinished: its bytes decode to U+FFFD for now.
                if text.ends_with('\u{FFFD}') || text.len() <= *given {
                    return None;
                }
                let new = text.get(*given..).unwrap_or_default().to_string();
                *given = text.len();
                if ids.len() > 2 * KEEP {
                    let kept = ids.split_off(ids.len() - KEEP);
                    *given = json.decode(&kept, true).len();
                    *ids = kept;
                }
                new
            }
            // The state was made for this kind of tokenizer.
            _ => return None,
        };
        (!text.is_empty()).then_some(text)
    }

    /// What is left at the end: U+FFFD for an unfinished character.
    pub fn finish(self) -> Option<String> {
        let text = match (self.state, &*self.tokenizer.0.inner) {
            (State::Bytes { held, .. }, _) => String::from_utf8_lossy(&held).into_owned(),
            (State::Text { ids, given }, Inner::Json(json)) => {
                json.decode(&ids, true).get(given..).unwrap_or_default().to_string()
            }
            _ => return None,
        };
        (!text.is_empty()).then_some(text)
    }
}

/// Takes the text out of `held` up to a character that more bytes could complete.
fn take_complete(held: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = held.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                rest = after;
                let Some(wrong) = error.error_len() else { break };
                text.push('\u{FFFD}');
                rest = &rest[wrong..];
            }
        }
    }
    *held = rest.to_vec();
    text
}
