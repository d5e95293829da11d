//! The spread of Besiroglu et al.'s fit: laws fitted to their 240 runs drawn with replacement.
//!
//! Their paper prints standard errors, but the constants are so correlated that errors alone would give bands many
//! times too wide. These 200 draws are made by this crate's own [`crate::fit`] (`cargo run -p sparsam-plan --example
//! bootstrap_draws`; a test makes the first ones again), from seed 2024.

use crate::law::Law;
use std::sync::LazyLock;

/// The seed of the committed draws.
pub const SEED: u64 = 2024;
/// How many are committed.
pub const COUNT: usize = 200;

static BESIROGLU: LazyLock<Vec<Law>> =
    LazyLock::new(|| include_str!("besiroglu_draws.csv").lines().filter_map(parse).collect());

/// The draws.
pub fn besiroglu() -> &'static [Law] {
    &BESIROGLU
}

/// A line `ln_a,ln_b,ln_e,alpha,beta`; `None` for the header.
fn parse(line: &str) -> Option<Law> {
    let x: Vec<f64> = line.split(',').map_while(|f| f.parse().ok()).collect();
    match x[..] {
        [ln_a, ln_b, ln_e, alpha, beta] => Some(Law::from_logs(ln_a, ln_b, ln_e, alpha, beta)),
        _ => None,
    }
}
