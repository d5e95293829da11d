//! Continuing a text, token by token.

use crate::rule::Rule;
use crate::runner::Sequence;
use crate::sample::{Sampler, Sampling};
use crate::stop::StopText;
use crate::{Error, Runner};
use sparsam_tokenizer::{DecodeStream, Tokenizer};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// What to continue, and how far.
#[derive(Clone, Debug, Default)]
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
    /// What the answer must keep to; it ends where nothing can follow. An answer that is cut is only the beginning of
    /// a text that keeps to it.
    pub rule: Option<Box<dyn Rule>>,
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
    /// It cannot go on within its rule, or that takes too much work.
    Rule,
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

    /// Takes the next token, after which nothing can follow if it is the `last`. Gives the text that may be passed on
    /// now, and why the answer ends here if it does.
    pub fn push(&mut self, token: u32, last: bool) -> (String, Option<Finish>) {
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
        let full = self.max_tokens.is_some_and(|max| self.tokens.len() >= max);
        if last || full {
            piece += &self.flush();
            return (piece, Some(if last { Finish::Stop } else { Finish::Length }));
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

/// What chooses an answer's tokens: a sampler among those that the rule allows.
pub(crate) struct Chooser {
    sampler: Sampler,
    rule: Option<Box<dyn Rule>>,
}

impl Chooser {
    pub fn new(request: &Request) -> Result<Chooser, Error> {
        Ok(Chooser { sampler: Sampler::new(&request.sampling)?, rule: request.rule.clone() })
    }

    /// The next token after `history`.
    pub fn choose(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, Error> {
        let Some(rule) = &mut self.rule else { return choose(&mut self.sampler, logits, history) };
        let broken = |why| Error::Rule { why };
        let mut logits = logits.to_vec();
        rule.restrict(&mut logits).map_err(broken)?;
        let token = choose(&mut self.sampler, &logits, history)?;
        rule.take(token).map_err(broken)?;
        Ok(token)
    }

    /// Whether nothing can follow the last token.
    pub fn ended(&self) -> bool {
        self.rule.as_ref().is_some_and(|rule| rule.ended())
    }
}

/// Continues `request.prompt` in `sequence`, reusing what of it is in the cache. Calls `on_text` with each piece of
/// text as it comes; it may end the answer.
///
/// # Errors
/// If the prompt is empty or longer than the context, settings are out of range, the model's logits are no numbers, or the
/// answer cannot go on within its rule.
pub fn generate(
    runner: &mut Runner,
    sequence: &mut Sequence,
    tokenizer: &Tokenizer,
    request: &Request,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated, Error> {
    let mut chooser = Chooser::new(request)?;
    let start = Instant::now();
    let new = runner.reuse(sequence, &request.prompt);
    let logits = runner.append(sequence, &request.prompt[new..])?;
    let mut history = request.prompt.clone();
    let mut next = chooser.choose(logits, &history)?;
    let first = Instant::now();

    let mut answer = Answer::new(tokenizer, request);
    let mut pass = |piece: &str| if piece.is_empty() { ControlFlow::Continue(()) } else { on_text(piece) };
    let finish = loop {
        history.push(next);
        let (piece, ended) = answer.push(next, chooser.ended());
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
        next = chooser.choose(logits, &history)?;
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
