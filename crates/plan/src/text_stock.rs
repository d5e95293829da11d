//! When text runs out: what repeated tokens are worth, and how much public text there is.
//!
//! Muennighoff et al. 2023, "Scaling Data-Constrained Language Models" (arXiv 2305.16264, section 3.1 and appendix A):
//! with `U` unique tokens, tokens beyond the first epoch and parameters beyond what `U` would deserve count less and
//! less:
//!
//! ```text
//! D' = U   + U   R_D* (1 - exp(-R_D / R_D*)),   R_D = D / U - 1          repetitions
//! N' = U_N + U_N R_N* (1 - exp(-R_N / R_N*)),   R_N = N / U_N - 1        excess parameters
//! L  = E + A / N'^alpha + B / D'^beta,           U_N = size for which U is the best amount of text
//! ```

use crate::law::{Allocation, Law, TRAIN_FLOP};
use crate::lifetime::golden_minimum;
use serde::Serialize;

/// How fast repetitions lose their worth (appendix A: R_D* = 15.387756).
pub const REPEAT_DECAY: f64 = 15.387756;
/// How fast excess parameters lose their worth (appendix A: R_N* = 5.309743).
pub const EXCESS_DECAY: f64 = 5.309743;

/// What a run on limited text amounts to.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Repeated {
    /// Size and tokens seen, repetitions included.
    pub allocation: Allocation,
    /// Unique tokens.
    pub unique: f64,
    /// How often each is seen.
    pub epochs: f64,
    /// The unique tokens that would be worth as much.
    pub effective_tokens: f64,
    /// The parameters that would be worth as much without excess.
    pub effective_parameters: f64,
    /// The loss expected, in nats a token (of C4 in GPT-2's tokens; use it to compare, not as a promise).
    pub loss: f64,
}

/// What `n` parameters and `d` tokens drawn from `unique` ones amount to. More unique tokens than are used count as
/// exactly those used.
pub fn repeated(n: f64, d: f64, unique: f64) -> Repeated {
    let law = Law::muennighoff();
    let unique = unique.min(d);
    let repetitions = (d / unique - 1.0).max(0.0);
    let deserved = deserved_parameters(&law, unique).min(n);
    let excess = (n / deserved - 1.0).max(0.0);
    let effective_tokens = unique * (1.0 + REPEAT_DECAY * (1.0 - (-repetitions / REPEAT_DECAY).exp()));
    let effective_parameters = deserved * (1.0 + EXCESS_DECAY * (1.0 - (-excess / EXCESS_DECAY).exp()));
    Repeated {
        allocation: Allocation { parameters: n, tokens: d },
        unique,
        epochs: d / unique,
        effective_tokens,
        effective_parameters,
        loss: law.loss(effective_parameters, effective_tokens),
    }
}

/// The size for which `tokens` is the best amount of text: `N` from `D_opt` in Hoffmann's equation 4.
fn deserved_parameters(law: &Law, tokens: f64) -> f64 {
    let g = (law.alpha * law.a / (law.beta * law.b)).powf(1.0 / (law.alpha + law.beta));
    (tokens * g).powf(law.beta / law.alpha) * g
}

/// The size and repetitions with the least loss for `flop` of training on `unique` tokens.
pub fn best_repeated(flop: f64, unique: f64) -> Repeated {
    let at = |ln_n: f64| {
        let n = ln_n.exp();
        repeated(n, flop / TRAIN_FLOP / n, unique)
    };
    let free = Law::muennighoff().optimum(flop).parameters.ln();
    // Limited text moves the best size by less than a factor of a thousand for any repetition that still learns.
    at(golden_minimum(|x| at(x).loss, free - 7.0, free + 7.0))
}

/// An estimate with its interval.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Stock {
    /// What is counted.
    pub name: &'static str,
    /// Tokens, central estimate.
    pub tokens: f64,
    /// Low and high end.
    pub interval: (f64, f64),
}

/// Public human text worth training on, with repetition accounted for: about 300 trillion tokens, 100 to 1000 (90%),
/// used up between 2026 and 2032 on the trend of 2024 (Villalobos et al. 2024, arXiv 2211.04325v2, section 4).
pub const PUBLIC_TEXT: Stock =
    Stock { name: "effective stock of public human text", tokens: 300e12, interval: (100e12, 1000e12) };
