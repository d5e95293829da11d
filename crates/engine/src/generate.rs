//! Continuing a text, token by token.

use crate::runner::Sequence;
use crate::sample::{Sampler, Sampling};
use crate::stop::StopText;
use crate::{Error, Runner};
use sparsam_tokenizer::{DecodeStream, Tokenizer};
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

/// An answer as it grows: tokens in, text out, and where it ends. What one text and many at once have in common.
pub(crate) struct Answer {
    tokenizer: Tokenizer,
    /// Text on its way out; `None` once the answer has ended.
    out: Option<(DecodeStream, StopText)>,
    max_tokens: Option<usize>,
    ignore_end: bool,
    /// The text that has been given out.
    pub text: String,
    /// All tokens, the one that ends it included.
    pub tokens: Vec<u32>,
}

impl Answer {
    pub fn new(tokenizer: &Tokenizer, request: &Request) -> Answer {
        Answer {
            tokenizer: tokenizer.clone(),
            out: Some((tokenizer.stream_after(&request.prompt), StopText::new(&request.stops))),
            max_tokens: request.max_tokens,
            ignore_end: request.ignore_end,
            text: String::new(),
            tokens: Vec::new(),
        }
    }

    /// Takes the next token. Gives the text that may be passed on now, and why the answer ends here if it does.
    pub fn push(&mut self, token: u32) -> (String, Option<Finish>) {
        let Some((stream, stop)) = &mut self.out else { return (String::new(), Some(Finish::Stop)) };
        self.tokens.push(token);
        if !self.ignore_end && self.tokenizer.stop_ids().contains(&token) {
            return (self.flush(), Some(Finish::Stop));
        }
        let (mut piece, ended) = stop.push(&stream.push(token).unwrap_or_default());
        self.text += &piece;
        if ended {
            self.out = None;
            return (piece, Some(Finish::Stop));
        }
        if self.max_tokens.is_some_and(|max| self.tokens.len() >= max) {
            piece += &self.flush();
            return (piece, Some(Finish::Length));
        }
        (piece, None)
    }

    /// The answer is cut here: gives what was held back for a whole character or a stop text.
    pub fn flush(&mut self) -> String {
        let Some((stream, mut stop)) = self.out.take() else { return String::new() };
        let (mut rest, ended) = stop.push(&stream.finish().unwrap_or_default());
        if !ended {
            rest += &stop.finish();
        }
        self.text += &rest;
        rest
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
    let new = runner.reuse(sequence, &request.prompt);
    let logits = runner.append(sequence, &request.prompt[new..])?;
    let mut history = request.prompt.clone();
    let mut next = choose(&mut sampler, logits, &history)?;
    let first = Instant::now();

    let mut answer = Answer::new(tokenizer, request);
    let mut pass = |piece: &str| if piece.is_empty() { ControlFlow::Continue(()) } else { on_text(piece) };
    let finish = loop {
        history.push(next);
        let (piece, ended) = answer.push(next);
        if pass(&piece).is_break() {
            break Finish::Cancelled;
        }
        if let Some(finish) = ended {
            break finish;
        }
        if sequence.tokens().len() >= runner.options().context {
            let _ = pass(&answer.flush());
            break Finish::Context;
        }
        let logits = runner.append(sequence, &[next])?;
        next = choose(&mut sampler, logits, &history)?;
    };
    Ok(Generated {
        text: answer.text,
        tokens: answer.tokens,
        finish,
        prompt_tokens: request.prompt.len() - new,
        prompt_time: first - start,
        generation_time: first.elapsed(),
    })
}

pub(crate) fn choose(sampler: &mut Sampler, logits: &[f32], history: &[u32]) -> Result<u32, Error> {
    sampler.choose(logits, history).ok_or(Error::NotFinite { tokens: history.len() })
}
