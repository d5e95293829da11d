//! Training and serving together: the size that costs least over a model's life.
//!
//! Sardana et al. 2024, "Beyond Chinchilla-Optimal" (arXiv 2401.00448, equation 2): a model of a wanted quality, with
//! `T` tokens expected over its life,
//!
//! ```text
//! minimise  6 N D + w 2 N T   over N and D   such that  L(N, D) = loss
//! ```
//!
//! `w` is what a FLOP of inference costs against one of training (their section 3: hardware is used less well when it
//! serves). On the line of equal loss `D` follows from `N`, so this is a search in one dimension.

use crate::law::{Allocation, INFER_FLOP, Law, TRAIN_FLOP};
use crate::{Error, units};
use serde::Serialize;

/// The cheapest way to a quality, serving included, beside the way that only counts training.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Lifetime {
    /// The loss that both reach, in nats a token.
    pub loss: f64,
    /// Size and tokens with the least training alone.
    pub training_only: Allocation,
    /// Arithmetic of that choice over its life, training and (weighted) serving.
    pub training_only_flop: f64,
    /// Size and tokens with the least arithmetic over the life.
    pub best: Allocation,
    /// Arithmetic of the best choice over its life.
    pub best_flop: f64,
}

impl Lifetime {
    /// The share of the arithmetic that the best choice saves.
    pub fn saved(&self) -> f64 {
        1.0 - self.best_flop / self.training_only_flop
    }
}

/// The cheapest model with the loss of `at`, served `serve_tokens` tokens, a FLOP of inference costing
/// `infer_weight` times one of training.
///
/// # Errors
/// If the loss cannot be reached (it is a law's own optimum in all sensible uses, so it can).
pub fn cheapest(law: &Law, at: Allocation, serve_tokens: f64, infer_weight: f64) -> Result<Lifetime, Error> {
    let loss = law.loss(at.parameters, at.tokens);
    let floor = law.least_parameters(loss).ok_or_else(|| {
        Error::Impossible(format!(
            "a loss of {loss:.3} is not above the irreducible {:.3} of this law",
            law.e
        ))
    })?;
    let total = |n: f64, d: f64| TRAIN_FLOP * n * d + infer_weight * INFER_FLOP * n * serve_tokens;
    let cost =
        |ln_n: f64| law.tokens_for_loss(ln_n.exp(), loss).map_or(f64::INFINITY, |d| total(ln_n.exp(), d));
    // Smaller than `floor` never reaches the loss; larger than the training optimum is dearer in both terms.
    let ln_n = golden_minimum(cost, floor.ln(), (at.parameters * 4.0).ln());
    let parameters = ln_n.exp();
    let tokens = law.tokens_for_loss(parameters, loss).ok_or_else(|| {
        Error::Impossible(format!(
            "no amount of text brings {} parameters to {loss:.3}",
            units::show_count(parameters)
        ))
    })?;
    Ok(Lifetime {
        loss,
        training_only: at,
        training_only_flop: total(at.parameters, at.tokens),
        best: Allocation { parameters, tokens },
        best_flop: total(parameters, tokens),
    })
}

/// Where a function with one minimum between `low` and `high` is least (golden section, to 1e-9).
pub(crate) fn golden_minimum(f: impl Fn(f64) -> f64, mut low: f64, mut high: f64) -> f64 {
    let shrink = (5f64.sqrt() - 1.0) / 2.0;
    let (mut x, mut y) = (high - shrink * (high - low), low + shrink * (high - low));
    let (mut fx, mut fy) = (f(x), f(y));
    while high - low > 1e-9 {
        if fx <= fy {
            (high, y, fy) = (y, x, fx);
            x = high - shrink * (high - low);
            fx = f(x);
        } else {
            (low, x, fx) = (x, y, fy);
            y = low + shrink * (high - low);
            fy = f(y);
        }
    }
    (low + high) / 2.0
}
