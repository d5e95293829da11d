//! How far a model's predictions are from another's.

use crate::perplexity::{Moments, Scorer};
use crate::{Engine, Error, Perplexity, Protocol, negative_log_likelihood};
use std::ops::ControlFlow;

/// A model against a reference, on the same scored tokens of the same text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// Of the model.
    pub perplexity: Perplexity,
    /// Of the reference.
    pub reference: Perplexity,
    /// Mean over scored tokens of the Kullback-Leibler divergence of the model's predictions from the reference's, in nats:
    /// `sum of p ln(p / q)`, p the reference's.
    pub divergence: f64,
    /// One standard error of that mean, as if tokens were independent.
    pub divergence_error: f64,
    /// The divergence that 99% of the tokens stay within.
    pub divergence_p99: f64,
    /// The share of tokens for which both hold the same token most likely.
    pub top1_agreement: f64,
}

/// Scores the text `tokens` with both models. `on_chunk` gets windows done and windows in all; it may end the run, which
/// then gives what it has.
///
/// # Errors
/// As [`crate::perplexity()`], and if the vocabularies differ in size.
pub fn compare(
    engine: &Engine,
    reference: &Engine,
    tokens: &[u32],
    protocol: &Protocol,
    on_chunk: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Comparison, Error> {
    let vocab = engine.model().facts().vocab_size;
    let other = reference.model().facts().vocab_size;
    if vocab != other {
        let what = format!(
            "the models' vocabularies have {vocab} and {other} tokens; only models of one vocabulary can be compared"
        );
        return Err(Error::Context { what });
    }
    let mut ours = Scorer::new(engine, tokens, protocol)?;
    let mut theirs = Scorer::new(reference, tokens, protocol)?;
    let (mut own, mut of_reference, mut divergence) =
        (Moments::default(), Moments::default(), Moments::default());
    let (mut all, mut agree) = (Vec::new(), 0usize);
    let n = ours.windows.len();
    let mut done = 0;
    for i in 0..n {
        // A window of the reference's logits is held: 255 rows of 49152 numbers are 50 MB.
        let mut rows: Vec<f32> = Vec::new();
        theirs.window(i, &mut |row, target| {
            rows.extend_from_slice(row);
            let nll = negative_log_likelihood(row, target);
            of_reference.add(nll);
            nll.is_finite()
        })?;
        let mut rows = rows.chunks(vocab);
        ours.window(i, &mut |q, target| {
            let p = rows.next().expect("both models score the same tokens");
            let nll = negative_log_likelihood(q, target);
            own.add(nll);
            let (kl, same) = against(p, q);
            all.push(kl);
            divergence.add(kl);
            agree += usize::from(same);
            nll.is_finite()
        })?;
        done = i + 1;
        if on_chunk(done, n).is_break() {
            break;
        }
    }
    all.sort_by(f64::total_cmp);
    let p99 = all.get(all.len() * 99 / 100).or(all.last()).copied().unwrap_or(0.0);
    Ok(Comparison {
        perplexity: own.perplexity(done),
        reference: of_reference.perplexity(done),
        divergence: divergence.mean(),
        divergence_error: divergence.error(),
        divergence_p99: p99,
        top1_agreement: agree as f64 / all.len().max(1) as f64,
    })
}

/// The divergence of logits `q` from logits `p`, and whether both are largest at the same place.
fn against(p: &[f32], q: &[f32]) -> (f64, bool) {
    let largest = |x: &[f32]| {
        x.iter().enumerate().fold((0, f32::NEG_INFINITY), |m, (i, &v)| if v > m.1 { (i, v) } else { m })
    };
    let (a, b) = (largest(p), largest(q));
    let (mut sum_p, mut sum_q, mut difference) = (0.0f64, 0.0f64, 0.0f64);
    for (p, q) in p.chunks(4096).zip(q.chunks(4096)) {
        for (&p, &q) in p.iter().zip(q) {
            let (p, q) = (p - a.1, q - b.1);
            let e = f64::from(p.exp());
            sum_p += e;
            sum_q += f64::from(q.exp());
            difference += e * f64::from(p - q);
        }
    }
    // sum p (ln p - ln q) = mean difference of logits under p, less the difference of the normalisers.
    ((difference / sum_p - sum_p.ln() + sum_q.ln()).max(0.0), a.0 == b.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergences_worked_out_by_hand() {
        // Even odds against 3 : 1.
        let (kl, same) = against(&[0.5, 0.5], &[7.0 + 3f32.ln(), 7.0]);
        assert!((kl - (0.5 * (0.5f64 / 0.75).ln() + 0.5 * 2f64.ln())).abs() < 1e-6, "{kl}");
        assert!(same);
        let x: Vec<f32> = (0..9000).map(|i| (i as f32 * 0.37).sin() * 9.0).collect();
        let shifted: Vec<f32> = x.iter().map(|v| v - 2.5).collect();
        let (kl, same) = against(&x, &shifted);
        assert!(kl < 1e-6 && same, "{kl}");
        assert!(!against(&[1.0, 0.0], &[0.0, 1.0]).1);
    }
}
