//! Choosing the next token.
//!
//! The chain is llama.cpp's: penalties and bias, top-k, top-p, min-p, temperature, draw.

use crate::Error;
use rand_core::{RngCore, SeedableRng};
use rand_pcg::Pcg64;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

/// How to choose. The default is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token always.
    pub temperature: f32,
    /// Only the k likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability (Holtzman et al. 2020); 1: all.
    pub top_p: f32,
    /// Only tokens at least this likely, as a share of the likeliest one's probability; 0: all.
    pub min_p: f32,
    /// Logits of tokens among the last [`Sampling::repeat_last`] are divided (if negative: multiplied) by this
    /// (Keskar et al. 2019); 1: no change.
    pub repeat_penalty: f32,
    /// How many tokens back the penalty looks.
    pub repeat_last: usize,
    /// Taken from the logits of tokens that the answer holds already (OpenAI's `presence_penalty`); 0: no change.
    pub presence_penalty: f32,
    /// Taken from the logits of tokens once for each time that the answer holds them (OpenAI's `frequency_penalty`);
    /// 0: no change.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens (OpenAI's `logit_bias`).
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed gives the same tokens.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            repeat_last: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl Sampling {
    /// # Errors
    /// If a setting is outside of its range.
    pub fn check(&self) -> Result<(), Error> {
        let ranges: [(&'static str, f32, bool, &'static str); 6] = [
            (
                "temperature",
                self.temperature,
                self.temperature >= 0.0 && self.temperature.is_finite(),
                "it must be 0 (greedy) or more",
            ),
            (
                "top-p",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
                "it must be above 0 and at most 1 (1 keeps all)",
            ),
            (
                "min-p",
                self.min_p,
                (0.0..=1.0).contains(&self.min_p),
                "it must be between 0 (keeps all) and 1",
            ),
            (
                "repeat-penalty",
                self.repeat_penalty,
                self.repeat_penalty > 0.0 && self.repeat_penalty.is_finite(),
                "it must be above 0 (1 changes nothing)",
            ),
            (
                "presence-penalty",
                self.presence_penalty,
                self.presence_penalty.abs() <= 2.0,
                "it must be between -2 and 2",
            ),
            (
                "frequency-penalty",
                self.frequency_penalty,
                self.frequency_penalty.abs() <= 2.0,
                "it must be between -2 and 2",
            ),
        ];
        match ranges.into_iter().find(|(_, _, ok, _)| !ok) {
            Some((name, value, _, wanted)) => Err(Error::Setting { name, value: value as f64, wanted }),
            None => Ok(()),
        }
    }
}

/// Chooses tokens one after the other; holds the random state.
pub struct Sampler {
    sampling: Sampling,
    rng: Pcg64,
    candidates: Vec<(f32, u32)>,
    weights: Vec<f32>,
    /// How often each token was chosen.
    chosen: BTreeMap<u32, u32>,
}

impl Sampler {
    /// # Errors
    /// As [`Sampling::check`].
    pub fn new(sampling: &Sampling) -> Result<Sampler, Error> {
        sampling.check()?;
        let rng = Pcg64::seed_from_u64(sampling.seed);
        Ok(Sampler {
            sampling: sampling.clone(),
            rng,
            candidates: Vec::new(),
            weights: Vec::new(),
            chosen: BTreeMap::new(),
        })
    }

    /// The next token after `history`, given its `logits` (vocab_size); `None` if they are not finite numbers. Among
    /// equals the lowest id is taken first.
    pub fn choose(&mut self, logits: &[f32], history: &[u32]) -> Option<u32> {
        // -inf is a token that cannot come; NaN and +inf are no logits.
        if logits.iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
            return None;
        }
        let token = self.draw(logits, history)?;
        *self.chosen.entry(token).or_default() += 1;
        Some(token)
    }

    /// The logits after penalties and bias; `None` if there are none of these, so that nothing need be copied.
    fn adjust(&self, logits: &[f32], history: &[u32]) -> Option<Vec<f32>> {
        let s = &self.sampling;
        let penalties = s.presence_penalty != 0.0 || s.frequency_penalty != 0.0;
        if s.repeat_penalty == 1.0 && !penalties && s.logit_bias.is_empty() {
            return None;
        }
        let mut logits = logits.to_vec();
        if s.repeat_penalty != 1.0 {
            let recent = &history[history.len().saturating_sub(s.repeat_last)..];
            for id in recent.iter().collect::<BTreeSet<_>>() {
                let x = &mut logits[*id as usize];
                *x = if *x > 0.0 { *x / s.repeat_penalty } else { *x * s.repeat_penalty };
            }
        }
        for (&id, &n) in &self.chosen {
            logits[id as usize] -= s.presence_penalty + n as f32 * s.frequency_penalty;
        }
        for &(id, bias) in &s.logit_bias {
            if let Some(x) = logits.get_mut(id as usize) {
                *x += bias;
            }
        }
        Some(logits)
    }

    fn draw(&mut self, logits: &[f32], history: &[u32]) -> Option<u32> {
        let adjusted = self.adjust(logits, history);
        let logits = adjusted.as_deref().unwrap_or(logits);
        let s = &self.sampling;
        let logit = |id: u32| logits[id as usize];
        let ids = 0..logits.len() as u32;
        if s.temperature == 0.0 {
            let best = ids.map(|id| (logit(id), id)).reduce(|a, b| if b.0 > a.0 { b } else { a })?;
            return (best.0 > f32::NEG_INFINITY).then_some(best.1);
        }
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if max == f32::NEG_INFINITY {
            return None;
        }
        // Uniform in [0, 1): 53 random bits.
        let share = (self.rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        if s.top_k == 0 && s.top_p == 1.0 && s.min_p == 0.0 {
            let weight = |x: f32| exp((x - max) / s.temperature);
            self.weights.clear();
            self.weights.extend(logits.iter().map(|&x| weight(x)));
            return pick(&self.weights, share).map(|i| i as u32);
        }
        let c = &mut self.candidates;
        c.clear();
        // What cannot come is no candidate, so that no rounding error can draw it.
        c.extend(ids.map(|id| (logit(id), id)).filter(|x| x.0 > f32::NEG_INFINITY));
        if (1..c.len()).contains(&s.top_k) {
            c.select_nth_unstable_by(s.top_k - 1, likelier);
            c.truncate(s.top_k);
        }
        if s.top_p < 1.0 {
            nucleus(c, max, s.top_p);
        }
        if s.min_p > 0.0 {
            let least = max + s.min_p.ln();
            c.retain(|x| x.0 >= least.min(max));
        }
        // From the likeliest on, so that no order of theirs in memory shows in what a seed gives.
        c.sort_unstable_by(likelier);
        self.weights.clear();
        self.weights.extend(c.iter().map(|x| exp((x.0 - max) / s.temperature)));
        pick(&self.weights, share).map(|i| c[i].1)
    }
}

/// The order of candidates: the likelier first, among equals the lower id.
fn likelier(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Keeps the likeliest candidates that together have the probability `top_p`.
fn nucleus(c: &mut Vec<(f32, u32)>, max: f32, top_p: f32) {
    let weight = |x: &(f32, u32)| exp(x.0 - max) as f64;
    let wanted = top_p as f64 * c.iter().map(weight).sum::<f64>();
    // Few of them have nearly all: these are found and sorted without sorting the rest.
    let mut n = 128;
    loop {
        if n < c.len() {
            c.select_nth_unstable_by(n - 1, likelier);
        }
        n = n.min(c.len());
        c[..n].sort_unstable_by(likelier);
        let mut sum = 0.0;
        let enough = c[..n].iter().position(|x| {
            sum += weight(x);
            sum >= wanted
        });
        match enough {
            Some(i) => return c.truncate(i + 1),
            None if n == c.len() => return,
            None => n *= 8,
        }
    }
}

/// Numbers whose sum is kept while one is drawn.
const CHUNK: usize = 64;

/// The index that a `share` in [0, 1) of all `weights` falls on; none that weighs 0. `None` if all do.
fn pick(weights: &[f32], share: f64) -> Option<usize> {
    // Eight sums side by side: a single one waits for itself.
    let sum = |chunk: &[f32]| {
        let mut sums = [0.0f32; 8];
        for part in chunk.chunks(8) {
            sums.iter_mut().zip(part).for_each(|(s, x)| *s += x);
        }
        sums.iter().map(|&x| x as f64).sum::<f64>()
    };
    let mut left = share * weights.chunks(CHUNK).map(sum).sum::<f64>();
    for (i, chunk) in weights.chunks(CHUNK).enumerate() {
        let all = sum(chunk);
        if left < all {
            for (j, &x) in chunk.iter().enumerate() {
                left -= x as f64;
                if left < 0.0 {
                    return Some(i * CHUNK + j);
                }
            }
        } else {
            left -= all;
        }
    }
    // Rounding went past the end.
    weights.iter().rposition(|&x| x > 0.0)
}

/// `e^x` for `x` up to 0, to 3 units in the last place; 0 below -87. Without a branch or a table, so that a loop over it
/// becomes vector code: a vocabulary is 50 thousand to 250 thousand of them a token.
///
/// `2^n` by the exponent's bits times `e^r`, `r` within `ln 2 / 2` of 0, by its Taylor series (the error of degree 7 is
/// below 1e-8 there).
#[inline]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to whole numbers
    let y = x.max(-87.0);
    let n = (y * std::f32::consts::LOG2_E + ROUND) - ROUND;
    // ln 2 in two parts, the first of few bits, so that r is exact to the last place.
    let r = (y - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let series = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let p = series.iter().fold(1.0 / 5040.0, |p, c| p * r + c);
    let power = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < -87.0 { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(change: impl FnOnce(&mut Sampling)) -> Sampler {
        let mut sampling = Sampling { temperature: 1.0, ..Sampling::default() };
        change(&mut sampling);
        Sampler::new(&sampling).unwrap()
    }

    /// How often each of four tokens is drawn in 20000 draws, as shares.
    fn shares(mut s: Sampler, logits: &[f32]) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        (0..20_000).for_each(|_| counts[s.choose(logits, &[]).unwrap() as usize] += 1.0 / 20_000.0);
        counts
    }

    fn logs(p: [f32; 4]) -> [f32; 4] {
        p.map(f32::ln)
    }

    #[track_caller]
    fn close(got: &[f64], want: [f64; 4]) {
        // Five standard deviations of a share of 20000 draws.
        assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 5.0 * 0.0036), "{got:?}, not {want:?}");
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let p = logs([0.1, 0.4, 0.3, 0.2]);
        close(&shares(sampler(|_| ()), &p), [0.1, 0.4, 0.3, 0.2]);
        close(&shares(sampler(|s| s.top_k = 2), &p), [0.0, 4.0 / 7.0, 3.0 / 7.0, 0.0]);
        close(&shares(sampler(|s| s.top_p = 0.65), &p), [0.0, 4.0 / 7.0, 3.0 / 7.0, 0.0]);
        close(&shares(sampler(|s| s.min_p = 0.45), &p), [0.0, 4.0 / 9.0, 3.0 / 9.0, 2.0 / 9.0]);
        // Temperature 1/2 squares probabilities.
        close(
            &shares(sampler(|s| s.temperature = 0.5), &p),
            [1.0 / 30.0, 16.0 / 30.0, 9.0 / 30.0, 4.0 / 30.0],
        );
    }

    #[test]
    fn exponentials_are_right_to_the_last_places() {
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let (got, want) = (exp(x) as f64, (x as f64).exp());
            assert!((got - want).abs() <= 3.0 * 6e-8 * want, "{x}: {got} {want}");
        }
        assert_eq!([exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)], [1.0, 0.0, 0.0]);
    }

    /// However many candidates there are: the nucleus of a long tail, and what a share falls on.
    #[test]
    fn long_tails_are_cut_where_their_sum_says() {
        let logits: Vec<f32> = (0..5000).map(|i| -((i * 7 % 5000) as f32) * 1e-3).collect();
        let total: f64 = logits.iter().map(|&x| (x as f64).exp()).sum();
        for top_p in [0.01, 0.5, 0.99] {
            let mut c: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
            nucleus(&mut c, 0.0, top_p);
            let sums = |n: usize| c[..n].iter().map(|x| (x.0 as f64).exp()).sum::<f64>() / total;
            assert!(
                sums(c.len()) >= top_p as f64 - 1e-6 && sums(c.len() - 1) < top_p as f64 + 1e-6,
                "{top_p}"
            );
            assert!(c.is_sorted_by(|a, b| likelier(a, b).is_lt()));
        }
        let weights: Vec<f32> = (0..1000).map(|i| (i % 3) as f32).collect();
        for i in 0..=1000 {
            let share = i as f64 / 1000.001;
            let got = pick(&weights, share).unwrap();
            let below = |n: usize| weights[..n].iter().map(|&x| x as f64).sum::<f64>();
            assert!(
                below(got) <= share * below(1000) && share * below(1000) < below(got + 1),
                "{share} {got}"
            );
        }
        assert_eq!(pick(&[0.0, 1.0, 0.0], 0.999_999), Some(1));
        assert_eq!(pick(&[0.0; 3], 0.5), None);
    }

    #[test]
    fn greedy_takes_the_first_of_the_likeliest() {
        let mut s = sampler(|s| s.temperature = 0.0);
        assert_eq!(s.choose(&[1.0, 3.0, 3.0, -f32::INFINITY], &[]), Some(1));
        assert_eq!(s.choose(&[1.0, f32::NAN], &[]), None);
        assert_eq!(s.choose(&[-f32::INFINITY; 2], &[]), None);
    }

    #[test]
    fn repeated_tokens_lose() {
        let mut s = sampler(|s| (s.temperature, s.repeat_penalty, s.repeat_last) = (0.0, 2.0, 2));
        assert_eq!(s.choose(&[3.0, 2.0, -1.0], &[0]), Some(1));
        assert_eq!(s.choose(&[3.0, 2.0, -1.0], &[0, 2, 2]), Some(0), "only the last two tokens count");
        assert_eq!(s.choose(&[-1.0, -1.5], &[0]), Some(1), "negative logits are multiplied");
    }

    #[test]
    fn tokens_of_the_answer_lose_and_biased_ones_win() {
        let answer = |change: fn(&mut Sampling)| {
            let mut s = sampler(|s| {
                s.temperature = 0.0;
                change(s);
            });
            (0..4).map(|_| s.choose(&[1.0, 0.7, 0.0], &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(answer(|_| ()), [0, 0, 0, 0]);
        assert_eq!(answer(|s| s.presence_penalty = 0.5), [0, 1, 0, 0]);
        assert_eq!(answer(|s| s.frequency_penalty = 0.5), [0, 1, 0, 1]);
        assert_eq!(answer(|s| s.logit_bias = vec![(2, 2.0), (99, 1.0)]), [2, 2, 2, 2]);
    }

    #[test]
    fn the_seed_decides() {
        let draw = |seed| {
            let mut s = sampler(|s| s.seed = seed);
            (0..64).map(|_| s.choose(&[0.0; 16], &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let bad = [
            Sampling { temperature: -1.0, ..Sampling::default() },
            Sampling { top_p: 0.0, ..Sampling::default() },
            Sampling { min_p: 2.0, ..Sampling::default() },
            Sampling { repeat_penalty: f32::NAN, ..Sampling::default() },
        ];
        for (s, name) in bad.iter().zip(["temperature", "top-p", "min-p", "repeat-penalty"]) {
            assert!(s.check().unwrap_err().to_string().starts_with(name));
        }
    }
}
