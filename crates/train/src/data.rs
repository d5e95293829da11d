//! Text as rows of tokens: where it comes from, how it is packed, in what order it is seen.
//!
//! All text becomes one stream of tokens ([`Corpus`]), documents one after the other, each with the tokenizer's end
//! token behind it. The stream is cut into rows of `ctx` tokens; a row may hold several documents, which do not see each
//! other. The order of the rows is a permutation of its own in every epoch, made from the seed alone, so that the number
//! of rows seen so far is all that has to be kept to go on ([`Rows`]).

mod corpus;
mod text;

pub use corpus::{Corpus, TokenWriter};
pub use text::{Sources, documents};

use crate::Error;
use crate::random::Random;
use crate::step::NO_TARGET;

/// A batch of packed rows, as the inputs of a training step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PackedRows {
    /// Tokens of all rows, one row after the other: (N).
    pub tokens: Vec<i32>,
    /// Each token's place in its document or row, from 0: (N).
    pub positions: Vec<i32>,
    /// The first row of the flat axis that each token sees: (N).
    pub row_start: Vec<i32>,
    /// The token after each: (N); [`NO_TARGET`] behind the end of a document.
    pub targets: Vec<i32>,
    /// What each target's loss counts: (N); empty: all the same.
    pub weights: Vec<f32>,
    /// Another model's largest probabilities of each token's next one: (N, top), as many as the step is made for; empty:
    /// there are none.
    pub soft: Vec<(u32, f32)>,
}

impl PackedRows {
    /// Number of tokens that have a target.
    pub fn n_targets(&self) -> usize {
        self.targets.iter().filter(|&&t| t != NO_TARGET).count()
    }

    /// Number of tokens, padding left out.
    pub fn n_tokens(&self) -> usize {
        self.row_start.iter().zip(0..).filter(|(start, i)| *start <= i).count()
    }

    /// Adds a row: `window` holds its tokens and the one behind them; documents end with `end`.
    pub fn push(&mut self, window: &[u32], end: Option<u32>) {
        let base = self.tokens.len();
        let mut start = 0;
        for (i, pair) in window.windows(2).enumerate() {
            let ends = Some(pair[0]) == end;
            self.tokens.push(pair[0] as i32);
            self.positions.push((i - start) as i32);
            self.row_start.push((base + start) as i32);
            self.targets.push(if ends { NO_TARGET } else { pair[1] as i32 });
            if ends {
                start = i + 1;
            }
        }
    }
}

/// Where the rows of a run come from.
pub trait Batches {
    /// Rows `first .. first + n` of the run, packed: always the same ones for the same numbers.
    ///
    /// # Errors
    /// [`Error::Data`] if a token is outside of the vocabulary.
    fn batch(&mut self, first: u64, n: usize) -> Result<PackedRows, Error>;

    /// Rows `first .. first + n` in their own order, for evaluation: fewer where they end.
    ///
    /// # Errors
    /// [`Error::Data`] if a token is outside of the vocabulary.
    fn in_order(&self, first: usize, n: usize) -> Result<PackedRows, Error>;
}

/// Rows of `ctx` tokens in a random order that only depends on the seed.
///
/// An epoch starts at a random token, so that the rows of each are cut elsewhere; the few tokens before it and behind the
/// last row wait for another epoch.
pub struct Rows {
    corpus: Corpus,
    ctx: usize,
    seed: u64,
    vocab_size: usize,
    /// The permutation of one epoch: the one used last.
    epoch: Option<(u64, Vec<u32>)>,
}

impl Rows {
    /// Rows over `corpus`, whose tokens are to be below `vocab_size`.
    ///
    /// # Errors
    /// [`Error::Data`] if it has no row of `ctx` tokens and one behind, or more than 2^32 rows.
    pub fn new(corpus: Corpus, ctx: usize, seed: u64, vocab_size: usize) -> Result<Rows, Error> {
        let n = corpus.len();
        if n <= ctx {
            return Err(Error::data(
                corpus.path(),
                format!(
                    "{n} tokens, but a row takes {ctx} and the one behind them; give more text, or a smaller ctx"
                ),
            ));
        }
        let rows = Rows { corpus, ctx, seed, vocab_size, epoch: None };
        if rows.per_epoch() > u32::MAX as u64 {
            return Err(Error::data(
                rows.corpus.path(),
                format!("{} rows are more than 2^32; give a larger ctx", rows.per_epoch()),
            ));
        }
        Ok(rows)
    }

    /// Rows in one epoch.
    pub fn per_epoch(&self) -> u64 {
        let (n, ctx) = (self.corpus.len(), self.ctx);
        if n < 2 * ctx { 1 } else { ((n - ctx) / ctx) as u64 }
    }

    /// The stream that rows are cut from.
    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    fn push(&self, batch: &mut PackedRows, at: usize) -> Result<(), Error> {
        let window = self.corpus.window(at, self.ctx + 1);
        if let Some(i) = window.iter().position(|&t| t as usize >= self.vocab_size) {
            return Err(Error::data(
                self.corpus.path(),
                format!(
                    "token {} is {}, but the vocabulary has {}; these tokens are another tokenizer's",
                    at + i,
                    window[i],
                    self.vocab_size
                ),
            ));
        }
        batch.push(&window, self.corpus.end());
        Ok(())
    }

    /// The first token of the `k`-th row of the run.
    fn place(&mut self, k: u64) -> usize {
        let (epoch, i) = (k / self.per_epoch(), k % self.per_epoch());
        if self.epoch.as_ref().is_none_or(|(e, _)| *e != epoch) {
            let order = Random::new(self.seed, "order", epoch).permutation(self.per_epoch() as u32);
            self.epoch = Some((epoch, order));
        }
        let order = &self.epoch.as_ref().expect("set above").1;
        let room = if self.corpus.len() < 2 * self.ctx { self.corpus.len() - self.ctx } else { self.ctx };
        let shift = Random::new(self.seed, "shift", epoch).below(room as u64) as usize;
        shift + order[i as usize] as usize * self.ctx
    }
}

impl Batches for Rows {
    fn batch(&mut self, first: u64, n: usize) -> Result<PackedRows, Error> {
        let mut batch = PackedRows::default();
        for k in first..first + n as u64 {
            let at = self.place(k);
            self.push(&mut batch, at)?;
        }
        Ok(batch)
    }

    fn in_order(&self, first: usize, n: usize) -> Result<PackedRows, Error> {
        let mut batch = PackedRows::default();
        for k in first..first + n {
            if (k + 1) * self.ctx < self.corpus.len() {
                self.push(&mut batch, k * self.ctx)?;
            }
        }
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus(tokens: impl IntoIterator<Item = u32>, end: Option<u32>) -> Corpus {
        Corpus::from_tokens(tokens.into_iter().collect(), end)
    }

    #[test]
    fn documents_in_a_row_do_not_see_each_other() {
        let rows = Rows::new(corpus([5, 6, 9, 7, 9, 8, 8, 8], Some(9)), 7, 0, 10).unwrap();
        let b = rows.in_order(0, 1).unwrap();
        assert_eq!(b.tokens, [5, 6, 9, 7, 9, 8, 8]);
        assert_eq!(b.positions, [0, 1, 2, 0, 1, 0, 1]);
        assert_eq!(b.row_start, [0, 0, 0, 3, 3, 5, 5]);
        assert_eq!(b.targets, [6, 9, NO_TARGET, 9, NO_TARGET, 8, 8]);
        assert_eq!(b.n_targets(), 5);
    }

    #[test]
    fn an_epoch_sees_each_row_once_and_the_next_is_cut_elsewhere() {
        let n = 1003;
        let mut rows = Rows::new(corpus(0..n, None), 10, 42, n as usize).unwrap();
        let per = rows.per_epoch();
        assert_eq!(per, 99);
        let mut starts: Vec<usize> = (0..per).map(|k| rows.place(k)).collect();
        let sorted = starts.is_sorted();
        starts.sort_unstable();
        assert!(!sorted && starts.windows(2).all(|w| w[1] - w[0] == 10), "{starts:?}");
        let next: Vec<usize> = (per..2 * per).map(|k| rows.place(k)).collect();
        assert!(starts[0] % 10 != next[0] % 10 && next.iter().all(|s| s + 11 <= n as usize));
    }

    #[test]
    fn the_number_of_rows_seen_is_all_that_is_needed_to_go_on() {
        let make = |seed| Rows::new(corpus(0..500, None), 8, seed, 500).unwrap();
        let (mut a, mut b) = (make(1), make(1));
        let whole = a.batch(0, 150).unwrap();
        let late = b.batch(100, 50).unwrap();
        assert_eq!(whole.tokens[100 * 8..], late.tokens[..]);
        assert_ne!(whole, make(2).batch(0, 150).unwrap());
    }

    #[test]
    fn little_text_and_foreign_tokens_are_refused() {
        let said = |r: Result<Rows, Error>| r.err().unwrap().to_string();
        assert!(said(Rows::new(corpus(0..8, None), 8, 0, 9)).contains("8 tokens, but a row takes 8"));
        let mut one = Rows::new(corpus(0..9, None), 8, 0, 9).unwrap();
        assert_eq!(one.batch(3, 1).unwrap().tokens, (0..8).collect::<Vec<_>>());
        let mut rows = Rows::new(corpus(0..9, None), 8, 0, 5).unwrap();
        let e = rows.batch(0, 1).unwrap_err().to_string();
        assert!(e.contains("token 5 is 5, but the vocabulary has 5"), "{e}");
    }
}
