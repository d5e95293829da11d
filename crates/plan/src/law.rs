//! Scaling laws: how large a model, on how much text, for a given amount of arithmetic.
//!
//! The parametric law of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3, "approach 3"), with the constants of
//! several fits, and the two power laws of their approaches 1 and 2:
//!
//! ```text
//! L(N, D) = E + A / N^alpha + B / D^beta          loss in nats a token
//! C       = 6 N D                                  training arithmetic (their equation 2)
//! N_opt   = G (C/6)^a,  D_opt = (C/6)^b / G,       a = beta / (alpha + beta),  b = alpha / (alpha + beta)
//! G       = (alpha A / (beta B))^(1 / (alpha + beta))
//! ```
//!
//! Rounding the exponents of Hoffmann's own fit to two digits moves its advice for Chinchilla's budget from 40 to 32
//! billion parameters, so every answer names the fit that it comes from.

use crate::Error;
use serde::{Deserialize, Serialize};

/// FLOP per parameter and token of a training step: 2 forward, 4 backward (Kaplan et al. 2020, section 2.1).
pub const TRAIN_FLOP: f64 = 6.0;
/// FLOP per parameter and token of inference.
pub const INFER_FLOP: f64 = 2.0;

/// The constants of `L(N, D) = E + A / N^alpha + B / D^beta`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Law {
    /// Coefficient of the parameters' term.
    pub a: f64,
    /// Coefficient of the tokens' term.
    pub b: f64,
    /// The loss that no size and no amount of text removes, in nats a token.
    pub e: f64,
    /// Exponent of the parameters.
    pub alpha: f64,
    /// Exponent of the tokens.
    pub beta: f64,
}

/// A size and an amount of text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Allocation {
    /// Parameters, embeddings included (as Hoffmann et al. count).
    pub parameters: f64,
    /// Training tokens.
    pub tokens: f64,
}

impl Allocation {
    /// Training arithmetic, `6 N D`.
    pub fn flop(self) -> f64 {
        TRAIN_FLOP * self.parameters * self.tokens
    }

    /// Tokens per parameter.
    pub fn ratio(self) -> f64 {
        self.tokens / self.parameters
    }
}

impl Law {
    /// The correction of approach 3 by Besiroglu et al. 2024 (arXiv 2404.10102, section 3.2; digits from their
    /// published notebook), fitted to 240 of the runs of Hoffmann's figure 4. The default everywhere.
    pub const BESIROGLU: Law = Law { a: 482.01, b: 2085.43, e: 1.8172, alpha: 0.3478, beta: 0.3658 };
    /// Hoffmann et al.'s approach 3 as printed, exponents rounded to two digits (their equation 10).
    pub const HOFFMANN_ROUNDED: Law = Law { a: 406.4, b: 410.7, e: 1.69, alpha: 0.34, beta: 0.28 };

    /// Hoffmann et al.'s approach 3 with the digits that they did not print (recovered from the paper's TeX source
    /// by Besiroglu et al.): ln A 6.0073404, ln B 6.0179186, ln E 0.5267228.
    pub fn hoffmann() -> Law {
        Law::from_logs(6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083)
    }

    /// The single-epoch law under Muennighoff et al. 2023 (arXiv 2305.16264, appendix A), fitted on C4.
    pub fn muennighoff() -> Law {
        Law::from_logs(6.255414, 7.3049974, 0.6254804, 0.3526596, 0.3526596)
    }

    /// The law with the logarithms of its coefficients given.
    pub fn from_logs(ln_a: f64, ln_b: f64, ln_e: f64, alpha: f64, beta: f64) -> Law {
        Law { a: ln_a.exp(), b: ln_b.exp(), e: ln_e.exp(), alpha, beta }
    }

    /// The loss of `n` parameters trained on `d` tokens, in nats a token.
    pub fn loss(&self, n: f64, d: f64) -> f64 {
        self.e + self.a * n.powf(-self.alpha) + self.b * d.powf(-self.beta)
    }

    /// The size and tokens with the least loss for `flop` of training (Hoffmann et al., equation 4).
    pub fn optimum(&self, flop: f64) -> Allocation {
        let sum = self.alpha + self.beta;
        let g = (self.alpha * self.a / (self.beta * self.b)).powf(1.0 / sum);
        let nd = flop / TRAIN_FLOP;
        let parameters = g * nd.powf(self.beta / sum);
        Allocation { parameters, tokens: nd / parameters }
    }

    /// The tokens that bring `n` parameters to `loss`, or `None` if no amount does.
    pub fn tokens_for_loss(&self, n: f64, loss: f64) -> Option<f64> {
        let left = loss - self.e - self.a * n.powf(-self.alpha);
        (left > 0.0).then(|| (self.b / left).powf(1.0 / self.beta))
    }

    /// The least parameters that can reach `loss`, with endless text; `None` below the irreducible loss.
    pub fn least_parameters(&self, loss: f64) -> Option<f64> {
        let left = loss - self.e;
        (left > 0.0).then(|| (self.a / left).powf(1.0 / self.alpha))
    }

    /// How the best size grows with the budget: the exponent `a` of `N_opt ~ C^a`.
    pub fn size_exponent(&self) -> f64 {
        self.beta / (self.alpha + self.beta)
    }
}

/// One way to advise on a budget, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Besiroglu et al.'s corrected fit of approach 3.
    Besiroglu,
    /// Hoffmann et al.'s approach 1: the envelope of training curves.
    Approach1,
    /// Hoffmann et al.'s approach 2: IsoFLOP profiles.
    Approach2,
    /// Hoffmann et al.'s approach 3 with unrounded constants.
    Approach3,
    /// Hoffmann et al.'s approach 3 as printed.
    Approach3Rounded,
}

/// Hoffmann et al.'s approach 1 as a power law through its Table 3 (`N_opt = G (C/6)^a`).
///
/// Table 2 prints the exponent as 0.50 with (0.488, 0.502) between the 10th and 90th percentile; Table 3's rows from
/// 400 million to 10 trillion parameters lie on 0.4981, which is used here together with its first row.
const APPROACH_1: PowerLaw = PowerLaw { exponent: 0.49809, low: 0.488, high: 0.502, at: (1.92e19, 400e6) };
/// Hoffmann et al.'s approach 2: exponent 0.49 (0.462, 0.534), through the 175 billion parameters at 4.41e24 FLOP that
/// section 3.4 names; its 280 billion parameters and 6.8 trillion tokens then follow within 1%.
const APPROACH_2: PowerLaw = PowerLaw { exponent: 0.49, low: 0.462, high: 0.534, at: (4.41e24, 175e9) };
/// The middle (in logarithms) of the budgets that approach 2's runs cover, 6e18 to 3e21 FLOP: where an uncertain
/// exponent turns. The paper prints no intervals for the coefficients, so this one is ours.
const PIVOT_FLOP: f64 = 1.34e20;

struct PowerLaw {
    exponent: f64,
    low: f64,
    high: f64,
    at: (f64, f64),
}

impl PowerLaw {
    fn parameters(&self, flop: f64) -> f64 {
        self.at.1 * (flop / self.at.0).powf(self.exponent)
    }

    fn band(&self, flop: f64) -> (f64, f64) {
        let n = self.parameters(flop);
        let turn = |to: f64| n * (flop / PIVOT_FLOP).powf(to - self.exponent);
        let (x, y) = (turn(self.low), turn(self.high));
        (x.min(y), x.max(y))
    }
}

impl Advice {
    /// All, the default first.
    pub const ALL: [Advice; 5] = [
        Advice::Besiroglu,
        Advice::Approach1,
        Advice::Approach2,
        Advice::Approach3,
        Advice::Approach3Rounded,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Advice::Besiroglu => "besiroglu",
            Advice::Approach1 => "hoffmann-1",
            Advice::Approach2 => "hoffmann-2",
            Advice::Approach3 => "hoffmann-3",
            Advice::Approach3Rounded => "hoffmann-3-rounded",
        }
    }

    /// Where it comes from, in a line.
    pub fn source(self) -> &'static str {
        match self {
            Advice::Besiroglu => "Besiroglu et al. 2024, approach 3 refitted on 240 runs",
            Advice::Approach1 => "Hoffmann et al. 2022, approach 1: envelope of training curves",
            Advice::Approach2 => "Hoffmann et al. 2022, approach 2: IsoFLOP profiles",
            Advice::Approach3 => "Hoffmann et al. 2022, approach 3, unrounded constants",
            Advice::Approach3Rounded => "Hoffmann et al. 2022, approach 3 as printed (rounded)",
        }
    }

    /// The one called `name`.
    pub fn by_name(name: &str) -> Result<Advice, Error> {
        Advice::ALL
            .into_iter()
            .find(|a| a.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| crate::error::unknown("law", name, Advice::ALL.map(Advice::name)))
    }

    /// The parametric law behind it, if it has one (approaches 1 and 2 predict no loss).
    pub fn law(self) -> Option<Law> {
        match self {
            Advice::Besiroglu => Some(Law::BESIROGLU),
            Advice::Approach1 | Advice::Approach2 => None,
            Advice::Approach3 => Some(Law::hoffmann()),
            Advice::Approach3Rounded => Some(Law::HOFFMANN_ROUNDED),
        }
    }

    /// The best size and tokens for `flop` of training.
    pub fn optimum(self, flop: f64) -> Allocation {
        let power = |p: PowerLaw| {
            let parameters = p.parameters(flop);
            Allocation { parameters, tokens: flop / TRAIN_FLOP / parameters }
        };
        match self {
            Advice::Approach1 => power(APPROACH_1),
            Advice::Approach2 => power(APPROACH_2),
            Advice::Besiroglu => Law::BESIROGLU.optimum(flop),
            Advice::Approach3 => Law::hoffmann().optimum(flop),
            Advice::Approach3Rounded => Law::HOFFMANN_ROUNDED.optimum(flop),
        }
    }

    /// An 80% band of the best size for `flop` (10th to 90th percentile, as Hoffmann et al.'s Table 2), if the source
    /// gives one: from the printed exponents for approaches 1 and 2, from bootstrap draws for Besiroglu's fit.
    pub fn band(self, flop: f64) -> Option<(f64, f64)> {
        match self {
            Advice::Besiroglu => {
                let sizes =
                    crate::draws::besiroglu().iter().map(|law| law.optimum(flop).parameters).collect();
                Some(crate::fit::percentiles(sizes, 0.1, 0.9))
            }
            Advice::Approach1 => Some(APPROACH_1.band(flop)),
            Advice::Approach2 => Some(APPROACH_2.band(flop)),
            Advice::Approach3 | Advice::Approach3Rounded => None,
        }
    }
}
