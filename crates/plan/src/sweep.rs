//! Which small runs to make, for a law of one's own.
//!
//! IsoFLOP profiles (Hoffmann et al. 2022, section 3.2): several budgets, at each several sizes around the one that a
//! first law calls best, so that every profile shows its valley. Fitted together they give the law's five constants.

use crate::law::{Allocation, Law, TRAIN_FLOP};
use crate::shape::Shape;
use crate::{Error, units};
use serde::Serialize;

/// What a sweep may take.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// FLOP of all runs together.
    pub flop: f64,
    /// Budgets (profiles), at least two.
    pub n_profiles: usize,
    /// Sizes in each profile, at least three.
    pub n_sizes: usize,
    /// From each profile's budget to the next.
    pub factor: f64,
    /// Unique tokens and how often they may be seen, if text is short.
    pub text: Option<(f64, f64)>,
}

/// One run to make.
#[derive(Clone, Debug, Serialize)]
pub struct Planned {
    /// `c1-s3`: the profile and the size in it.
    pub name: String,
    /// The shape to train.
    pub shape: Shape,
    /// Its parameters, exactly.
    pub parameters: f64,
    /// Tokens to train on.
    pub tokens: f64,
    /// `6 N D`.
    pub flop: f64,
}

/// The runs of a sweep, cheapest profile first, smallest size first.
///
/// Sizes lie a factor of sqrt(3) apart around the first law's optimum. Where text is short, sizes that would see it
/// more often than allowed are moved up until they do not.
///
/// # Errors
/// Budgets too small for any shape, fewer than two profiles or three sizes.
pub fn plan(first: &Law, budget: &Budget) -> Result<Vec<Planned>, Error> {
    let Budget { flop, n_profiles, n_sizes, factor, text } = *budget;
    if n_profiles < 2 || n_sizes < 3 || factor <= 1.0 {
        return Err(Error::Impossible(format!(
            "a sweep of {n_profiles} budgets a factor {factor} apart with {n_sizes} sizes each fixes no law; \
             take at least 2 budgets, a factor above 1 and 3 sizes"
        )));
    }
    let sum: f64 = (0..n_profiles).map(|i| factor.powi(i as i32)).sum();
    let smallest = flop / (sum * n_sizes as f64);
    let mut runs = Vec::new();
    for profile in 0..n_profiles {
        let each = smallest * factor.powi(profile as i32);
        let best = first.optimum(each).parameters;
        // With D <= limit, 6 N D = C asks for N >= C / (6 limit).
        let least = text.map_or(0.0, |(unique, epochs)| each / TRAIN_FLOP / (unique * epochs));
        let lowest = (best * 3f64.sqrt().powf(-((n_sizes - 1) as f64) / 2.0)).max(least);
        for size in 0..n_sizes {
            let wanted = lowest * 3f64.sqrt().powi(size as i32);
            let shape = Shape::for_parameters(wanted).map_err(|_| {
                Error::Impossible(format!(
                    "a run of {} FLOP calls for {} parameters, too few or too many for a shape; \
                     take a budget nearer to 1e15 FLOP, or fewer profiles",
                    units::show_flop(each),
                    units::show_count(wanted)
                ))
            })?;
            let parameters = shape.parameters().total();
            let allocation = Allocation { parameters, tokens: each / TRAIN_FLOP / parameters };
            runs.push(Planned {
                name: format!("c{}-s{}", profile + 1, size + 1),
                parameters,
                tokens: allocation.tokens.floor(),
                flop: each,
                shape,
            });
        }
    }
    Ok(runs)
}
