//! How well a model foresees a text.

use crate::runner::{Feed, Runner, Sequence, Want};
use crate::{Engine, Error};
use std::ops::ControlFlow;

/// Which tokens are scored, and with what before them. Numbers of unlike protocols cannot be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// Tokens of a window.
    pub context: usize,
    /// How windows follow each other.
    pub windows: Windows,
    /// At most this many windows; `None`: all.
    pub chunks: Option<usize>,
}

/// How windows follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Windows {
    /// llama.cpp's: windows side by side, each from an empty cache, its first token replaced by BOS if the model wants
    /// one; targets `context / 2 + 1 ..` are scored. A rest shorter than a window is left out.
    SideBySide,
    /// Hugging Face's: each window begins this many tokens after the one before and scores what that one did not reach;
    /// the first scores all but its first token. The text is scored to its end.
    Sliding(usize),
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let c = self.context;
        match self.windows {
            Windows::SideBySide => write!(f, "windows of {c} side by side, second half scored (llama.cpp)")?,
            Windows::Sliding(s) => {
                write!(f, "windows of {c} every {s} tokens, new tokens scored (Hugging Face)")?
            }
        }
        match self.chunks {
            Some(n) => write!(f, ", first {n}"),
            None => Ok(()),
        }
    }
}

/// The result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// `exp` of the mean negative log-likelihood of the scored tokens.
    pub perplexity: f64,
    /// One standard error of it, as if tokens were independent: `perplexity * sd(nll) / sqrt(n)`.
    pub error: f64,
    /// Tokens scored.
    pub tokens_scored: usize,
    /// Windows run.
    pub chunks: usize,
}

/// One window: tokens `start .. end` of the text, of which targets from `first` on are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    start: usize,
    end: usize,
    first: usize,
}

impl Protocol {
    fn windows(&self, n_tokens: usize) -> Result<Vec<Window>, Error> {
        let c = self.context;
        if c < 4 {
            return Err(Error::Context {
                what: format!("windows of {c} tokens score nothing; choose --ctx of at least 4"),
            });
        }
        let windows: Vec<Window> = match self.windows {
            Windows::SideBySide => (0..n_tokens / c)
                .map(|i| Window { start: i * c, end: (i + 1) * c, first: i * c + c / 2 + 1 })
                .collect(),
            Windows::Sliding(stride) => {
                if !(1..=c).contains(&stride) {
                    let what = format!(
                        "a stride of {stride} leaves tokens out or never ends; choose --stride from 1 to {c} (--ctx)"
                    );
                    return Err(Error::Context { what });
                }
                let mut windows = Vec::new();
                let (mut start, mut scored) = (0, 1);
                while scored < n_tokens {
                    let end = (start + c).min(n_tokens);
                    windows.push(Window { start, end, first: scored.max(start + 1) });
                    (start, scored) = (start + stride, end);
                }
                windows
            }
        };
        if windows.is_empty() {
            let wanted = if self.windows == Windows::SideBySide { c } else { 2 };
            return Err(Error::TooShort { tokens: n_tokens, wanted });
        }
        let n = self.chunks.unwrap_or(usize::MAX).min(windows.len());
        Ok(windows[..n].to_vec())
    }
}

/// Mean and variance as numbers come in (Welford 1962).
#[derive(Default)]
pub(crate) struct Moments {
    n: usize,
    mean: f64,
    squares: f64,
}

impl Moments {
    pub fn add(&mut self, x: f64) {
        self.n += 1;
        let d = x - self.mean;
        self.mean += d / self.n as f64;
        self.squares += d * (x - self.mean);
    }

    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// One standard error of the mean.
    pub fn error(&self) -> f64 {
        (self.squares / (self.n.max(2) - 1) as f64 / self.n.max(1) as f64).sqrt()
    }

    pub fn perplexity(&self, chunks: usize) -> Perplexity {
        let perplexity = self.mean.exp();
        Perplexity { perplexity, error: perplexity * self.error(), tokens_scored: self.n, chunks }
    }
}

/// `-ln softmax(logits)[target]`, summed in f64.
pub fn negative_log_likelihood(logits: &[f32], target: u32) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    // In f32 terms and f64 sums: terms are off by 2^-24 of themselves, the sum by no more.
    let sums = logits.chunks(4096).map(|c| c.iter().map(|&x| (x - max).exp() as f64).sum::<f64>());
    sums.sum::<f64>().ln() + (max - logits[target as usize]) as f64
}

/// Most logits that are held at once, in rows.
pub(crate) const LOGIT_ROWS: usize = 64;

/// Scores the text `tokens` (no special tokens added). `on_chunk` gets windows done, windows in all and the result so
/// far after each window; it may end the run, which then gives what it has.
///
/// # Errors
/// If the text is too short, the context beyond the model's, or a token is none of its vocabulary.
pub fn perplexity(
    engine: &Engine,
    tokens: &[u32],
    protocol: &Protocol,
    on_chunk: &mut dyn FnMut(usize, usize, &Perplexity) -> ControlFlow<()>,
) -> Result<Perplexity, Error> {
    let mut scorer = Scorer::new(engine, tokens, protocol)?;
    let mut moments = Moments::default();
    let mut result = moments.perplexity(0);
    let n = scorer.windows.len();
    for i in 0..n {
        scorer.window(i, &mut |row, target| {
            let nll = negative_log_likelihood(row, target);
            moments.add(nll);
            nll.is_finite()
        })?;
        result = moments.perplexity(i + 1);
        if on_chunk(i + 1, n, &result).is_break() {
            break;
        }
    }
    Ok(result)
}

/// A text, cut into windows, before a model.
pub(crate) struct Scorer<'a> {
    tokens: &'a [u32],
    pub windows: Vec<Window>,
    bos: Option<u32>,
    runner: Runner,
    sequence: Sequence,
}

impl<'a> Scorer<'a> {
    /// # Errors
    /// As [`perplexity()`].
    pub fn new(engine: &'a Engine, tokens: &'a [u32], protocol: &Protocol) -> Result<Scorer<'a>, Error> {
        let windows = protocol.windows(tokens.len())?;
        let made_for = engine.model().facts().context_length;
        if protocol.context > made_for {
            let c = protocol.context;
            let what = format!(
                "windows of {c} tokens are beyond the model's context of {made_for}; choose a smaller --ctx"
            );
            return Err(Error::Context { what });
        }
        let bos = match (protocol.windows, &engine.opened().tokenizer) {
            (Windows::SideBySide, Some(tokenizer)) => {
                begins_with_bos(tokenizer).then(|| tokenizer.bos()).flatten()
            }
            _ => None,
        };
        let runner = engine.runner_with(1, protocol.context)?;
        let sequence = runner.sequence();
        Ok(Scorer { tokens, windows, bos, runner, sequence })
    }

    /// Calls `each` with the logits before every scored token of window `i`, and the token; it says whether they are
    /// finite.
    pub fn window(&mut self, i: usize, each: &mut dyn FnMut(&[f32], u32) -> bool) -> Result<(), Error> {
        let w = self.windows[i];
        let vocab = self.runner.vocab_size();
        self.runner.truncate(&mut self.sequence, 0);
        let mut text = self.tokens[w.start..w.end].to_vec();
        if let Some(bos) = self.bos {
            text[0] = bos;
        }
        // Before the first target nobody asks for logits; after that a few rows at a time, since a row of logits is
        // as large as the vocabulary.
        let lead = w.first - 1 - w.start;
        let mut at = 0;
        while at < text.len() - 1 {
            let end = if at < lead { lead.min(at + 512) } else { (at + LOGIT_ROWS).min(text.len() - 1) };
            let want = if at < lead { Want::Nothing } else { Want::From(0) };
            let feed = Feed { sequence: &mut self.sequence, tokens: &text[at..end], want };
            let logits = self.runner.run(&mut [feed])?;
            for (row, target) in logits.chunks(vocab).zip(&text[at + 1..]) {
                if !each(row, *target) {
                    return Err(Error::NotFinite { tokens: w.start + at });
                }
            }
            at = end;
        }
        Ok(())
    }
}

/// Whether the tokenizer puts BOS in front of a text.
pub fn begins_with_bos(tokenizer: &sparsam_tokenizer::Tokenizer) -> bool {
    let specials = sparsam_tokenizer::Specials { add: true, parse: false };
    let first = tokenizer.encode("a", specials).ok().and_then(|ids| ids.first().copied());
    first.is_some() && first == tokenizer.bos()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(context: usize, windows: Windows, n: usize) -> Vec<(usize, usize, usize)> {
        let protocol = Protocol { context, windows, chunks: None };
        protocol.windows(n).unwrap().iter().map(|w| (w.start, w.end, w.first)).collect()
    }

    #[test]
    fn windows_side_by_side_score_their_second_half() {
        assert_eq!(windows(8, Windows::SideBySide, 20), [(0, 8, 5), (8, 16, 13)]);
    }

    #[test]
    fn sliding_windows_score_each_token_but_the_first_once() {
        assert_eq!(windows(8, Windows::Sliding(4), 14), [(0, 8, 1), (4, 12, 8), (8, 14, 12)]);
        for (context, stride, n) in [(8, 8, 30), (8, 3, 31), (16, 1, 40), (64, 32, 10)] {
            let mut seen: Vec<usize> =
                windows(context, Windows::Sliding(stride), n).iter().flat_map(|w| w.2..w.1).collect();
            // Where windows only touch, the first token of each has nothing before it.
            if stride < context {
                seen.sort_unstable();
                assert_eq!(seen, (1..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn impossible_protocols_are_refused() {
        let refuse = |context, windows, n| {
            Protocol { context, windows, chunks: None }.windows(n).unwrap_err().to_string()
        };
        assert!(refuse(512, Windows::SideBySide, 511).contains("511 tokens"));
        assert!(refuse(512, Windows::Sliding(0), 900).contains("stride of 0"));
        assert!(refuse(512, Windows::Sliding(513), 900).contains("stride of 513"));
        assert!(refuse(2, Windows::SideBySide, 900).contains("at least 4"));
        assert!(refuse(512, Windows::Sliding(512), 1).contains("1 tokens"));
    }

    #[test]
    fn likelihoods_sum_to_one() {
        let logits: Vec<f32> = (0..5000).map(|i| ((i * 37) % 101) as f32 / 10.0).collect();
        let total: f64 = (0..5000).map(|t| (-negative_log_likelihood(&logits, t)).exp()).sum();
        assert!((total - 1.0).abs() < 1e-5, "{total}");
    }
}
