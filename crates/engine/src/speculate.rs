//! Speculative decoding (Leviathan et al. 2023, Chen et al. 2023), greedy: a small model proposes, the large one checks
//! all proposals in one step.
//!
//! The text is the large model's own, token for token: a proposal stays only where it is what the large model would have
//! written, and a row's logits do not depend on how many rows a step has.

use crate::generate::{Answer, Chooser, Finish, Generated, Request, choose};
use crate::runner::{Feed, Sequence, Want};
use crate::sample::{Sampler, Sampling};
use crate::{Engine, Error, Runner};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Tokens that a draft proposes at a time, at most, where nothing else is asked for.
pub const DEFAULT_DRAFT_TOKENS: usize = 4;

/// Tokens that are checked at a time, at most: far below the rows of a step, far above what pays.
const MAX_DRAFT_TOKENS: usize = 64;

/// What speculation gave.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Speculation {
    /// Tokens that the draft proposed.
    pub proposed: usize,
    /// Of these: what the large model would have written.
    pub accepted: usize,
    /// Steps of the large model behind the prompt.
    pub checks: usize,
    /// Time of the draft.
    pub draft_time: Duration,
}

impl Speculation {
    /// The share of proposals that stayed; `None` if nothing was proposed.
    pub fn acceptance(&self) -> Option<f64> {
        (self.proposed > 0).then(|| self.accepted as f64 / self.proposed as f64)
    }
}

/// A model and a smaller one with the same vocabulary, each with its cache of one text.
pub struct Speculator {
    big: Runner,
    small: Runner,
    big_text: Sequence,
    small_text: Sequence,
    draft_tokens: usize,
}

impl Speculator {
    /// `draft` proposes up to `draft_tokens` tokens at a time to `engine`.
    ///
    /// # Errors
    /// If the two do not have the same vocabulary, or a cache is not possible.
    pub fn new(engine: &Engine, draft: &Engine, draft_tokens: usize) -> Result<Speculator, Error> {
        same_vocabulary(engine, draft)?;
        let context = engine.context().min(draft.context());
        let (big, small) = (engine.runner_with(1, engine.context())?, draft.runner_with(1, context)?);
        let (big_text, small_text) = (big.sequence(), small.sequence());
        Ok(Speculator {
            big,
            small,
            big_text,
            small_text,
            draft_tokens: draft_tokens.clamp(1, MAX_DRAFT_TOKENS),
        })
    }

    /// Continues `request.prompt` as [`crate::generate()`] does with the large model alone, faster where the draft guesses
    /// well.
    ///
    /// # Errors
    /// As [`crate::generate()`]; if the request is not greedy.
    pub fn generate(
        &mut self,
        engine: &Engine,
        request: &Request,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<(Generated, Speculation), Error> {
        if request.sampling.temperature != 0.0 {
            let (name, value) = ("temperature", f64::from(request.sampling.temperature));
            return Err(Error::Setting { name, value, wanted: "with a draft it must be 0 (greedy)" });
        }
        let mut chooser = Chooser::new(request)?;
        let mut told = Speculation::default();
        let start = Instant::now();
        let kept = self.big.reuse(&mut self.big_text, &request.prompt);
        let logits = self.big.append(&mut self.big_text, &request.prompt[kept..])?;
        let mut history = request.prompt.clone();
        let mut waiting = vec![chooser.choose(logits, &history)?];
        let first = Instant::now();
        let mut answer = Answer::new(engine.tokenizer()?, request);
        let mut pass =
            |piece: &str| if piece.is_empty() { ControlFlow::Continue(()) } else { on_text(piece) };
        let finish = 'all: loop {
            let n = waiting.len();
            for (i, next) in waiting.drain(..).enumerate() {
                history.push(next);
                let (piece, ended) = answer.push(next, i + 1 == n && chooser.ended());
                if pass(&piece).is_break() {
                    break 'all Finish::Cancelled;
                }
                if let Some(finish) = ended {
                    break 'all finish;
                }
                if history.len() > self.big.options().context {
                    let _ = pass(&answer.flush());
                    break 'all Finish::Context;
                }
            }
            let left = request.max_tokens.map_or(usize::MAX, |max| max - answer.tokens.len());
            let proposals = self.propose(&history, left.saturating_sub(1), &mut told)?;
            waiting = self.check(&mut chooser, &history, &proposals, &mut told)?;
        };
        // Tokens that were proposed but not used are no part of the text.
        let used = history.len().min(self.big_text.tokens().len());
        self.big.truncate(&mut self.big_text, used);
        let generated = Generated {
            text: answer.text,
            tokens: answer.tokens,
            finish,
            prompt_tokens: request.prompt.len() - kept,
            prompt_time: first - start,
            generation_time: first.elapsed(),
        };
        Ok((generated, told))
    }

    /// What the draft would write behind `history`: as many tokens as fit both contexts, at most `most`.
    fn propose(&mut self, history: &[u32], most: usize, told: &mut Speculation) -> Result<Vec<u32>, Error> {
        let start = Instant::now();
        // A sampler of its own: the one that counts for penalties must only see what is written.
        let mut sampler = Sampler::new(&Sampling::default())?;
        let (big, small) = (self.big.options().context, self.small.options().context);
        // The large model reads the history's last token and all proposals, the draft all but the last proposal.
        let room = big.saturating_sub(history.len()).min((small + 1).saturating_sub(history.len()));
        let n = self.draft_tokens.min(most).min(room);
        let mut text = history.to_vec();
        for _ in 0..n {
            let kept = self.small.reuse(&mut self.small_text, &text);
            let logits = self.small.append(&mut self.small_text, &text[kept..])?;
            text.push(choose(&mut sampler, logits, &text)?);
        }
        told.draft_time += start.elapsed();
        told.proposed += n;
        Ok(text.split_off(history.len()))
    }

    /// The tokens that the large model writes behind `history`: those of `proposals` that it agrees with, and one more.
    fn check(
        &mut self,
        chooser: &mut Chooser,
        history: &[u32],
        proposals: &[u32],
        told: &mut Speculation,
    ) -> Result<Vec<u32>, Error> {
        let kept = self.big.truncate(&mut self.big_text, history.len() - 1);
        let mut tokens = history[kept..].to_vec();
        let first = tokens.len() - 1;
        tokens.extend(proposals);
        let feed = Feed { sequence: &mut self.big_text, tokens: &tokens, want: Want::From(first) };
        let logits = self.big.run(&mut [feed])?;
        let vocab_size = logits.len() / (proposals.len() + 1);
        let mut text = history.to_vec();
        let mut written = Vec::new();
        for (i, row) in logits.chunks(vocab_size).enumerate() {
            let next = chooser.choose(row, &text)?;
            written.push(next);
            text.push(next);
            if proposals.get(i) != Some(&next) || chooser.ended() {
                break;
            }
        }
        told.checks += 1;
        told.accepted += written.len() - 1;
        // What was proposed beyond that is wrong.
        self.big.truncate(&mut self.big_text, history.len() + written.len() - 1);
        Ok(written)
    }
}

/// Whether the two read and write the same tokens.
fn same_vocabulary(engine: &Engine, draft: &Engine) -> Result<(), Error> {
    let (a, b) = (engine.tokenizer()?, draft.tokenizer()?);
    let refuse = |what: String| {
        let file = draft.opened().source.path().to_path_buf();
        Err(Error::Vocabulary { file, what })
    };
    if a.vocab_size() != b.vocab_size() {
        return refuse(format!(
            "the draft has a vocabulary of {}, the model one of {}; a draft must have the same tokenizer",
            b.vocab_size(),
            a.vocab_size()
        ));
    }
    let differs = |id: &u32| a.token_bytes(*id) != b.token_bytes(*id);
    if let Some(id) = (0..a.vocab_size() as u32).find(differs) {
        return refuse(format!(
            "token {id} of the draft is another than the model's; a draft must have the same tokenizer"
        ));
    }
    Ok(())
}
