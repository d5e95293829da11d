//! A cap on what asking may cost.

use crate::Error;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What a teacher's tokens cost, in dollars for a million.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Prices {
    /// Tokens of prompts.
    pub prompt: f64,
    /// Tokens of answers.
    pub completion: f64,
}

/// Tokens of a prompt and of its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Of the prompt.
    pub prompt: u64,
    /// Of the answer.
    pub completion: u64,
}

impl Prices {
    /// What these tokens cost.
    pub fn usd(&self, tokens: Tokens) -> f64 {
        (tokens.prompt as f64 * self.prompt + tokens.completion as f64 * self.completion) / 1e6
    }
}

/// The most that may be spent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Tokens of prompts and answers together.
    Tokens(u64),
    /// Dollars.
    Usd(f64),
}

impl FromStr for Budget {
    type Err = String;

    /// `$2.50` or `2.50usd`; `200000`, `200k` or `1.5M` tokens.
    fn from_str(text: &str) -> Result<Budget, String> {
        let help = || format!("{text:?} is no budget; give tokens (200k, 1.5M) or money ($2.50)");
        let lower = text.trim().to_ascii_lowercase();
        let number =
            |s: &str| s.trim().parse::<f64>().ok().filter(|x| x.is_finite() && *x > 0.0).ok_or_else(help);
        if let Some(usd) = lower.strip_prefix('$').or_else(|| lower.strip_suffix("usd")) {
            return Ok(Budget::Usd(number(usd)?));
        }
        let tokens = lower.strip_suffix("tokens").unwrap_or(&lower).trim();
        let (digits, unit) = match tokens.chars().last() {
            Some('k') => (&tokens[..tokens.len() - 1], 1e3),
            Some('m') => (&tokens[..tokens.len() - 1], 1e6),
            _ => (tokens, 1.0),
        };
        Ok(Budget::Tokens((number(digits)? * unit) as u64))
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Budget::Tokens(n) => write!(f, "{n} tokens"),
            Budget::Usd(x) => write!(f, "${x:.2}"),
        }
    }
}

/// What was spent, and what questions under way may still cost.
#[derive(Clone, Debug)]
pub struct Purse {
    budget: Option<Budget>,
    prices: Prices,
    spent: Tokens,
    spent_usd: f64,
    reserved: Tokens,
}

impl Purse {
    /// An empty purse with a cap; `spent` and `spent_usd` were spent before.
    ///
    /// # Errors
    /// If money is capped but no price is known.
    pub fn new(
        budget: Option<Budget>,
        prices: Prices,
        spent: Tokens,
        spent_usd: f64,
    ) -> Result<Purse, Error> {
        let bad = |p: f64| !p.is_finite() || p < 0.0;
        if bad(prices.prompt) || bad(prices.completion) {
            return Err(Error::setting("--usd-in, --usd-out", "a price must be 0 or more"));
        }
        if matches!(budget, Some(Budget::Usd(_))) && prices == Prices::default() {
            return Err(Error::setting(
                "--budget",
                "is money, but the teacher's prices are not known; give --usd-in and --usd-out, or a budget in tokens",
            ));
        }
        Ok(Purse { budget, prices, spent, spent_usd, reserved: Tokens::default() })
    }

    /// Puts aside what a question may cost at most; `false` if that would go beyond the budget.
    pub fn reserve(&mut self, most: Tokens) -> bool {
        let all = Tokens {
            prompt: self.reserved.prompt + most.prompt,
            completion: self.reserved.completion + most.completion,
        };
        let fits = match self.budget {
            None => true,
            Some(Budget::Tokens(n)) => {
                self.spent.prompt + self.spent.completion + all.prompt + all.completion <= n
            }
            Some(Budget::Usd(usd)) => self.spent_usd + self.prices.usd(all) <= usd,
        };
        if fits {
            self.reserved = all;
        }
        fits
    }

    /// A question for which `most` was put aside took `used`; gives what it cost.
    pub fn pay(&mut self, most: Tokens, used: Tokens) -> f64 {
        self.reserved.prompt -= most.prompt;
        self.reserved.completion -= most.completion;
        self.spent.prompt += used.prompt;
        self.spent.completion += used.completion;
        let usd = self.prices.usd(used);
        self.spent_usd += usd;
        usd
    }

    /// What was spent: tokens and dollars.
    pub fn spent(&self) -> (Tokens, f64) {
        (self.spent, self.spent_usd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_read_as_people_write_them() {
        assert_eq!("200k".parse(), Ok(Budget::Tokens(200_000)));
        assert_eq!("1.5M tokens".parse(), Ok(Budget::Tokens(1_500_000)));
        assert_eq!("$2.50".parse(), Ok(Budget::Usd(2.5)));
        assert_eq!("3usd".parse(), Ok(Budget::Usd(3.0)));
        for wrong in ["", "-5", "$0", "much", "k"] {
            assert!(wrong.parse::<Budget>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_purse_never_spends_more_than_its_budget() {
        let prices = Prices { prompt: 1.0, completion: 10.0 };
        let most = Tokens { prompt: 100, completion: 50 };
        let mut purse = Purse::new(Some(Budget::Tokens(400)), prices, Tokens::default(), 0.0).unwrap();
        assert!(purse.reserve(most) && purse.reserve(most) && !purse.reserve(most));
        let usd = purse.pay(most, Tokens { prompt: 100, completion: 10 });
        assert!((usd - 200e-6).abs() < 1e-12);
        // 110 spent, 150 put aside: 140 are left, and the next may take 150.
        assert!(!purse.reserve(most));
        purse.pay(most, Tokens { prompt: 100, completion: 20 });
        assert!(purse.reserve(most));
        let mut money = Purse::new(Some(Budget::Usd(0.001)), prices, Tokens::default(), 0.0005).unwrap();
        assert!(!money.reserve(most), "600 millionths above the 500 that are left");
        assert!(Purse::new(Some(Budget::Usd(1.0)), Prices::default(), Tokens::default(), 0.0).is_err());
    }
}
