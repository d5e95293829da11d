//! The options that every command that runs a model has, and what it takes to load one.

use crate::model;
use sparsam_dtype::DType;
use sparsam_engine::{Engine, Options};
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
    /// Element type of the cache: F32, F16, BF16 or Q8_0 (default: F16; F32 with --exact)
    #[arg(long, value_name = "TYPE", value_parser = cache_type)]
    pub cache_type: Option<DType>,
}

fn cache_type(name: &str) -> Result<DType, String> {
    const KNOWN: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::Q8_0];
    DType::from_name(name)
        .filter(|d| KNOWN.contains(d))
        .ok_or_else(|| "a cache can be F32, F16, BF16 or Q8_0".into())
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
