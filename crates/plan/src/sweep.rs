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

/// Runs with fewer tokens a parameter are no points of a law: those that Besiroglu et al. leave out have fewer.
const LEAST_RATIO: f64 = 0.5;

/// Below so many parameters a transformer is too narrow for its heads, and no point of a law either.
const LEAST_SIZE: f64 = 3e4;

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
/// Sizes lie a factor of sqrt(3) apart around the first law's optimum. Sizes below 30 thousand parameters
/// and, where text is short, sizes that would see it more often than allowed are moved up until they do not. Sizes that
/// would see less than half a token a parameter are left out.
///
/// # Errors
/// Budgets too small for any shape or too large for the text, fewer than two profiles or three sizes.
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
        let lowest = (best * 3f64.sqrt().powf(-((n_sizes - 1) as f64) / 2.0)).max(least).max(LEAST_SIZE);
        let mut profile_runs = Vec::new();
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
            // A shape that the one before has already, or too little text for its size: no point of a law.
            if allocation.ratio() < LEAST_RATIO
                || profile_runs.last().is_some_and(|l: &Planned| l.parameters == parameters)
            {
                continue;
            }
            profile_runs.push(Planned {
                name: format!("c{}-s{}", profile + 1, size + 1),
                parameters,
                tokens: allocation.tokens.floor(),
                flop: each,
                shape,
            });
        }
        if profile_runs.len() < 3 {
            return Err(Error::Impossible(format!(
                "runs of {} FLOP show all but {} sizes less than {LEAST_RATIO} tokens a parameter, where no law holds; \
                 take a larger budget or fewer profiles, or, if text is short, a smaller budget or more text",
                units::show_flop(each),
                profile_runs.len()
            )));
        }
        runs.append(&mut profile_runs);
    }
    Ok(runs)
}

/// The runs as a CSV table.
pub fn to_csv(runs: &[Planned]) -> String {
    let mut out = String::from(
        "name,parameters,tokens,training_flop,n_layers,hidden_size,n_heads,n_kv_heads,head_dim,intermediate_size,vocab_size\n",
    );
    for Planned { name, shape: s, parameters, tokens, flop } in runs {
        out += &format!(
            "{name},{parameters},{tokens},{flop:e},{},{},{},{},{},{},{}\n",
            s.n_layers, s.hidden_size, s.n_heads, s.n_kv_heads, s.head_dim, s.intermediate_size, s.vocab_size
        );
    }
    out
}

/// Tokens of an optimiser step for a run on `tokens`: about a five-hundredth of the run as a power of two, so that short
/// runs still make hundreds of steps, between 512 and half a million (the largest of Brown et al. 2020, table 2.1).
fn step_tokens(tokens: f64) -> f64 {
    (tokens / 500.0).log2().floor().exp2().clamp(512.0, 524_288.0)
}

/// The run as a configuration of `sparsam train`, without its text. A vocabulary of 256 is that of bytes. It is
/// evaluated at its end alone, and writes one checkpoint.
pub fn to_config(run: &Planned) -> String {
    let s = &run.shape;
    let tokenizer = if s.vocab_size == 256 { "tokenizer = \"bytes\"\n" } else { "" };
    let ctx = if run.tokens < 1e8 { 128.0 } else { 1024.0 };
    let batch = (step_tokens(run.tokens) / ctx).max(1.0);
    format!(
        "# {}: {} parameters, {} tokens\n[model]\narch = \"llama\"\nlayers = {}\nhidden = {}\nheads = {}\n\
         kv_heads = {}\nintermediate = {}\ntied_head = {}\n\n[data]\n{tokenizer}ctx = {ctx}\n\n[run]\ntokens = \"{}\"\nbatch = {batch}\neval_every = 1000000000\n\
         checkpoint_every = 1000000000\nsample_every = 0\n",
        run.name,
        units::show_count(run.parameters),
        units::show_count(run.tokens),
        s.n_layers,
        s.hidden_size,
        s.n_heads,
        s.n_kv_heads,
        s.intermediate_size,
        s.tied,
        run.tokens
    )
}
