//! Continuing a text, token by token.

use crate::runner::Sequence;
use crate::sample::{Sampler, Sampling};
use crate::stop::StopText;
use crate::{Error, Runner};
use sparsam_tokenizer::Tokenizer;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// What to continue, and how far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// All tokens of the text so far.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens to write; `None`: as many as the context holds.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer and are not part of it.
    pub stops: Vec<String>,
    /// Go on after tokens that end a text.
    pub ignore_end: bool,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, or a stop text came.
    Stop,
    /// It has the most tokens that were asked for.
    Length,
    /// The context is full.
    Context,
    /// The caller ended it.
    Cancelled,
}

/// An answer, with its times.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The answer, without the stop text.
    pub text: String,
    /// Its tokens, the one that ended it included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt that had to be read; the others were in the cache.
    pub prompt_tokens: usize,
    /// Time to read them and choose the first token.
    pub prompt_time: Duration,
    /// Time of all further tokens.
    pub generation_time: Duration,
}

impl Generated {
    /// Tokens of the prompt read in a second.
    pub fn prompt_rate(&self) -> f64 {
        self.prompt_tokens as f64 / self.prompt_time.as_secs_f64()
    }

    /// Tokens written in a second, the first not counted: it comes with the prompt. `None` if there is only that.
    pub fn generation_rate(&self) -> Option<f64> {
        let further = self.tokens.len().checked_sub(1).filter(|&n| n > 0)?;
        Some(further as f64 / self.generation_time.as_secs_f64())
    }
}

/// Continues `request.prompt` in `sequence`, reusing what of it is in the cache. Calls `on_text` with each piece of
/// text as it comes; it may end the answer.
///
/// # Errors
/// If the prompt is empty or longer than the context, settings are out of range, or the model's logits are no numbers.
pub fn generate(
    runner: &mut Runner,
    sequence: &mut Sequence,
    tokenizer: &Tokenizer,
    request: &Request,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated, Error> {
    let mut sampler = Sampler::new(&request.sampling)?;
    let start = Instant::now();
    let new = reuse(runner, sequence, &request.prompt);
    let logits = runner.append(sequence, &request.prompt[new..])?;
    let mut history = request.prompt.clone();
    let mut next = choose(&mut sampler, logits, &history)?;
    let first = Instant::now();

    let mut stream = tokenizer.stream_after(&request.prompt);
    let mut stop = StopText::new(&request.stops);
    let (mut text, mut tokens) = (String::new(), Vec::new());
    let mut pass = |piece: &str, text: &mut String| {
        text.push_str(piece);
        if piece.is_empty() { ControlFlow::Continue(()) } else { on_text(piece) }
    };
    let finish = loop {
        if request.max_tokens.is_some_and(|max| tokens.len() >= max) {
            break Finish::Length;
        }
        tokens.push(next);
        history.push(next);
        if !request.ignore_end && tokenizer.stop_ids().contains(&next) {
            break Finish::Stop;
        }
        let (piece, ended) = stop.push(&stream.push(next).unwrap_or_default());
        if pass(&piece, &mut text).is_break() {
            break Finish::Cancelled;
        }
        if ended {
            break Finish::Stop;
        }
        if request.max_tokens == Some(tokens.len()) {
            break Finish::Length;
        }
        if sequence.tokens().len() >= runner.options().context {
            break Finish::Context;
        }
        let logits = runner.append(sequence, &[next])?;
        next = choose(&mut sampler, logits, &history)?;
    };
    let generation_time = first.elapsed();
    if finish != Finish::Stop || tokens.last().is_some_and(|t| tokenizer.stop_ids().contains(t)) {
        // A cut answer: what was held back for a whole character or a stop text belongs to it.
        let (piece, ended) = stop.push(&stream.finish().unwrap_or_default());
        let rest = if ended { piece } else { piece + &stop.finish() };
        if finish != Finish::Cancelled {
            let _ = pass(&rest, &mut text);
        }
    }
    Ok(Generated {
        text,
        tokens,
        finish,
        prompt_tokens: request.prompt.len() - new,
        prompt_time: first - start,
        generation_time,
    })
}

fn choose(sampler: &mut Sampler, logits: &[f32], history: &[u32]) -> Result<u32, Error> {
    sampler.choose(logits, history).ok_or(Error::NotFinite { tokens: history.len() })
}

/// Cuts `sequence` back to what it has in common with `prompt`, but for the last token, whose logits are wanted.
/// Returns how many tokens that is.
fn reuse(runner: &mut Runner, sequence: &mut Sequence, prompt: &[u32]) -> usize {
    let common = sequence.tokens().iter().zip(prompt).take_while(|(a, b)| a == b).count();
    let keep = common.min(prompt.len().saturating_sub(1));
    runner.truncate(sequence, keep);
    keep
}
