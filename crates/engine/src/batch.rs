//! Many texts at once: continuous batching (Yu et al. 2022, Orca) over one paged cache with prefix reuse.

use crate::generate::{Answer, Chooser, Finish, Request};
use crate::runner::{Feed, MAX_ROWS, PAGE, Sequence, Want, common};
use crate::{Engine, Error, Runner};
use sparsam_tokenizer::Tokenizer;
use std::collections::VecDeque;

/// Rows of prompts in one step while others write: what a writer waits for at most.
const PROMPT_ROWS: usize = 128;
/// Finished texts that are kept for later prompts that begin with them.
const KEPT: usize = 64;

/// The name of a request within its [`Batcher`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(u64);

/// The log-probability of a chosen token, and the likeliest ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprob {
    /// `ln p` of the token under the model's own distribution (before temperature and cuts).
    pub logprob: f32,
    /// As many of the likeliest tokens as were asked for, with theirs.
    pub top: Vec<(u32, f32)>,
}

/// What one step gave one request.
#[derive(Debug)]
pub struct Output {
    /// Whose it is.
    pub id: JobId,
    /// The token; `None` if the answer ends without one ([`Finish::Rule`]).
    pub token: Option<u32>,
    /// The text that may be passed on now; may be empty.
    pub text: String,
    /// If asked for.
    pub logprob: Option<Logprob>,
    /// Set with the last token.
    pub finish: Option<Finish>,
    /// Set with the first token: how many tokens of the prompt were in the cache.
    pub reused: Option<usize>,
}

struct Job {
    id: JobId,
    request: Request,
    n_logprobs: Option<usize>,
    chooser: Chooser,
    answer: Answer,
    sequence: Sequence,
    /// Prompt and answer; the sequence holds a first part of it.
    history: Vec<u32>,
    reused: usize,
}

/// Answers requests together: each step advances every answer by a token and reads a part of the waiting prompts. An
/// answer does not depend on what else runs.
pub struct Batcher {
    runner: Runner,
    tokenizer: Tokenizer,
    waiting: VecDeque<Job>,
    active: Vec<Job>,
    /// Finished texts, the latest last.
    kept: VecDeque<Sequence>,
    next_id: u64,
}

impl Batcher {
    /// For up to `sequences` requests at a time; more wait for their turn.
    ///
    /// # Errors
    /// If the model has no tokenizer or the cache is not possible.
    pub fn new(engine: &Engine, sequences: usize) -> Result<Batcher, Error> {
        Ok(Batcher {
            runner: engine.runner(sequences)?,
            tokenizer: engine.tokenizer()?.clone(),
            waiting: VecDeque::new(),
            active: Vec::new(),
            kept: VecDeque::new(),
            next_id: 0,
        })
    }

    /// Adds a request; with `n_logprobs`, log-probabilities of chosen tokens and of that many of the likeliest.
    ///
    /// # Errors
    /// If its prompt is empty or leaves no room in the context, a token is none of the vocabulary's, or its settings
    /// are out of range.
    pub fn submit(&mut self, request: Request, n_logprobs: Option<usize>) -> Result<JobId, Error> {
        let chooser = Chooser::new(&request)?;
        if request.prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        self.runner.check(&request.prompt)?;
        let id = JobId(self.next_id);
        self.next_id += 1;
        let (answer, history) = (Answer::new(&self.tokenizer, &request), request.prompt.clone());
        let sequence = Sequence::default();
        self.waiting.push_back(Job {
            id,
            request,
            n_logprobs,
            chooser,
            answer,
            sequence,
            history,
            reused: 0,
        });
        Ok(id)
    }

    /// Ends a request; nothing more comes of it.
    pub fn cancel(&mut self, id: JobId) {
        self.waiting.retain(|job| job.id != id);
        if let Some(i) = self.active.iter().position(|job| job.id == id) {
            let job = self.active.remove(i);
            self.keep(job.sequence);
        }
    }

    /// Requests that are being answered, and those that wait.
    pub fn load(&self) -> (usize, usize) {
        (self.active.len(), self.waiting.len())
    }

    /// Tokens that the cache has room for without forgetting a kept text, and its size.
    pub fn cache(&self) -> (usize, usize) {
        let options = self.runner.options();
        (self.runner.free_tokens(), options.sequences * options.context.next_multiple_of(PAGE))
    }

    /// Runs one step. Gives what came of it; nothing only if there is nothing to do or only prompts were read.
    ///
    /// # Errors
    /// If a kernel fails: all requests are lost then.
    pub fn step(&mut self) -> Result<Vec<Output>, Error> {
        self.admit();
        if self.active.is_empty() {
            return Ok(Vec::new());
        }
        // Writers first: one row each. What is left of the step goes to prompts, oldest first.
        let writers = self.active.iter().filter(|job| job.missing() == 1).count();
        let mut left = if writers == 0 { MAX_ROWS } else { PROMPT_ROWS };
        let parts: Vec<usize> = self
            .active
            .iter()
            .map(|job| match job.missing() {
                1 => 1,
                n => {
                    let part = n.min(left);
                    left -= part;
                    part
                }
            })
            .collect();
        self.make_room(&parts);
        let mut feeds = Vec::new();
        let mut fed = Vec::new();
        for (i, (job, &n)) in self.active.iter_mut().zip(&parts).enumerate() {
            if n == 0 {
                continue;
            }
            let at = job.sequence.tokens().len();
            let whole = at + n == job.history.len();
            let want = if whole { Want::Last } else { Want::Nothing };
            feeds.push(Feed { sequence: &mut job.sequence, tokens: &job.history[at..at + n], want });
            if whole {
                fed.push(i);
            }
        }
        let context = self.runner.options().context;
        let logits = self.runner.run(&mut feeds)?;
        let vocab = logits.len() / fed.len().max(1);
        let mut outputs = Vec::new();
        for (row, &i) in logits.chunks(vocab.max(1)).zip(&fed) {
            let job = &mut self.active[i];
            let id = job.id;
            let reused = job.answer.tokens.is_empty().then_some(job.reused);
            let token = match job.chooser.choose(row, &job.history) {
                Ok(token) => token,
                // This answer's own fault: the others go on.
                Err(Error::Rule { .. }) => {
                    let (text, finish) = (job.answer.flush(), Some(Finish::Rule));
                    outputs.push(Output { id, token: None, text, logprob: None, finish, reused });
                    continue;
                }
                Err(e) => return Err(e),
            };
            let (mut text, mut finish) = job.answer.push(token, job.chooser.ended());
            job.history.push(token);
            if finish.is_none() && job.history.len() > context {
                text += &job.answer.flush();
                finish = Some(Finish::Context);
            }
            let logprob = job.n_logprobs.map(|n| logprob(row, token, n));
            outputs.push(Output { id, token: Some(token), text, logprob, finish, reused });
        }
        for output in outputs.iter().filter(|o| o.finish.is_some()) {
            self.cancel(output.id);
        }
        Ok(outputs)
    }

    /// Gives waiting requests a place, as long as there are places; [`Batcher::step`] does so, too.
    pub fn admit(&mut self) {
        let places = self.runner.options().sequences;
        while self.active.len() < places
            && let Some(mut job) = self.waiting.pop_front()
        {
            let prompt = &job.request.prompt;
            let alive = self.active.iter().map(|j| &j.sequence).chain(&self.kept);
            let best = alive.max_by_key(|s| common(s.tokens(), prompt));
            if let Some(best) = best {
                let n = common(best.tokens(), prompt);
                job.sequence = self.runner.fork(best, n);
            }
            job.reused = job.sequence.tokens().len();
            self.active.push(job);
        }
    }

    /// Forgets kept texts, the oldest first, until the pages of a step are free. Each place has its whole context, so
    /// without kept texts there is always room.
    fn make_room(&mut self, parts: &[usize]) {
        let pages = |tokens: usize| tokens.div_ceil(PAGE) * PAGE;
        let need = |(job, &n): (&Job, &usize)| {
            let at = job.sequence.tokens().len();
            pages(at + n) - pages(at)
        };
        let need: usize = self.active.iter().zip(parts).map(need).sum();
        while self.runner.free_tokens() < need
            && let Some(oldest) = self.kept.pop_front()
        {
            self.runner.release(oldest);
        }
    }

    fn keep(&mut self, sequence: Sequence) {
        self.kept.push_back(sequence);
        if self.kept.len() > KEPT
            && let Some(oldest) = self.kept.pop_front()
        {
            self.runner.release(oldest);
        }
    }
}

impl Job {
    /// Tokens of the text that are not in the cache yet.
    fn missing(&self) -> usize {
        self.history.len() - self.sequence.tokens().len()
    }
}

/// Log-probabilities of `token` and of the `n` likeliest.
fn logprob(logits: &[f32], token: u32, n: usize) -> Logprob {
    let max = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let sum: f64 = logits.iter().map(|&x| (x - max).exp() as f64).sum();
    let log_sum = max + sum.ln() as f32;
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let likelier = |a: &u32, b: &u32| {
        let (a, b) = (*a as usize, *b as usize);
        logits[b].total_cmp(&logits[a]).then(a.cmp(&b))
    };
    let n = n.min(order.len());
    if n > 0 && n < order.len() {
        order.select_nth_unstable_by(n - 1, likelier);
    }
    order.truncate(n);
    order.sort_unstable_by(likelier);
    let top = order.into_iter().map(|id| (id, logits[id as usize] - log_sum)).collect();
    Logprob { logprob: logits[token as usize] - log_sum, top }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let p = [0.1_f32, 0.6, 0.3];
        let logits = p.map(|p| p.ln() + 3.0);
        let got = logprob(&logits, 0, 2);
        assert!((got.logprob - 0.1_f32.ln()).abs() < 1e-5);
        assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
        assert!((got.top[1].1 - 0.3_f32.ln()).abs() < 1e-5);
        assert!(logprob(&logits, 1, 0).top.is_empty());
    }
}
