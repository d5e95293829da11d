//! The options that every command that runs a model has, and what it takes to load one.

use crate::model;
use sparsam_dtype::DType;
use sparsam_engine::{CACHE_TYPES, Engine, Options};
use std::path::PathBuf;
use std::str::FromStr;

/// How to load and run the model.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Machine")]
pub struct Load {
    /// Threads (0: all cores)
    #[arg(long, short = 't', default_value_t = 0)]
    pub threads: usize,
    /// f32 activations and cache instead of 8-bit activations and an F16 cache: slower, no rounding beyond the file's
    #[arg(long)]
    pub exact: bool,
    /// Run node by node without the compiler, to compare
    #[arg(long)]
    pub eager: bool,
    /// Element type of the cache: F32, F16, BF16 or Q8_0, half of F16's bytes (default: F16; F32 with --exact)
    #[arg(long, value_name = "TYPE", value_parser = cache_type)]
    pub cache_type: Option<DType>,
    /// A folder with an adapter in PEFT's layout; may be given more than once. DIR=0.5 weights its term by a half
    #[arg(long, value_name = "DIR", value_parser = weighted)]
    pub adapter: Vec<(PathBuf, f64)>,
}

fn weighted(text: &str) -> Result<(PathBuf, f64), String> {
    match text.rsplit_once('=') {
        Some((folder, weight)) if !std::path::Path::new(text).exists() => match weight.parse::<f64>() {
            Ok(weight) if weight.is_finite() => Ok((folder.into(), weight)),
            _ => Err(format!("{weight} is no number; DIR or DIR=WEIGHT is wanted")),
        },
        _ => Ok((text.into(), 1.0)),
    }
}

fn cache_type(name: &str) -> Result<DType, String> {
    let names = || CACHE_TYPES.map(|d| d.to_string()).join(", ");
    DType::from_name(name)
        .filter(|d| CACHE_TYPES.contains(d))
        .ok_or_else(|| format!("the types of a cache are {}", names()))
}

impl Load {
    /// Loads what `name` means, for sequences of `context` tokens.
    ///
    /// # Errors
    /// If it cannot be had, is damaged, or the options are not possible for it.
    pub fn engine(&self, name: &str, context: Option<usize>) -> anyhow::Result<Engine> {
        let options = Options {
            threads: self.threads,
            exact: self.exact,
            eager: self.eager,
            context,
            cache: self.cache_type,
            adapters: self.adapter.clone(),
        };
        Ok(Engine::load(&model::resolve(name)?, &options)?)
    }
}

/// A number from 1 on, with a message that says so.
pub fn positive(text: &str) -> Result<usize, String> {
    match usize::from_str(text) {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("a whole number from 1 on is wanted".into()),
    }
}
