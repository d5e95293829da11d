//! From a file to text: loading, KV cache, sampling, generation and evaluation.
//!
//! [`open()`] looks at a model; [`Engine::load`] packs its weights; [`Engine::runner`] gives a cache and the compiled
//! steps; [`generate()`] continues a text; [`perplexity()`] scores one. The same steps serve one prompt, a chat, and many
//! sequences at once.
//!
//! ```no_run
//! use sparsam_engine::{Engine, Options, Request, generate};
//! use std::ops::ControlFlow;
//! let engine = Engine::load("model.gguf".as_ref(), &Options::default())?;
//! let mut runner = engine.runner(1)?;
//! let mut sequence = runner.sequence();
//! let prompt = engine.encode("The capital of France is")?;
//! let request = Request { prompt, max_tokens: Some(8), ..Request::default() };
//! let answer = generate(&mut runner, &mut sequence, engine.tokenizer()?, &request, &mut |text| {
//!     print!("{text}");
//!     ControlFlow::Continue(())
//! })?;
//! println!("\n{:.0} tokens a second", answer.generation_rate().unwrap_or_default());
//! # Ok::<(), sparsam_engine::Error>(())
//! ```
#![forbid(unsafe_code)]

mod adapter;
mod attention_bench;
mod batch;
mod bench;
mod choice;
mod compare;
mod engine;
mod error;
mod generate;
mod merge;
mod open;
mod perplexity;
mod probes;
mod rule;
mod runner;
mod sample;
mod save;
mod speculate;
mod stop;
mod task;

pub use adapter::{PeftConfig, TrainedAdapter};
pub use attention_bench::{AttentionForm, AttentionShape, bench_attention};
pub use batch::{Batcher, JobId, Logprob, Output};
pub use bench::{Roofs, Timing, Work, bench, beside_products, profile, roofs};
pub use choice::{Choices, Likelihood, Per, choose_among, likeliest};
pub use compare::{Comparison, compare};
pub use engine::{DEFAULT_CONTEXT, Engine, Options};
pub use error::Error;
pub use generate::{Finish, Generated, Request, generate};
pub use merge::{Divergence, Merged, divergence, merge};
pub use open::{Opened, open};
pub use perplexity::{Perplexity, Protocol, Windows, begins_with_bos, negative_log_likelihood, perplexity};
pub use probes::{PROBES_FILE, Probes};
pub use rule::Rule;
pub use runner::{CACHE_TYPES, Feed, Runner, RunnerOptions, Sequence, Want};
pub use sample::{Sampler, Sampling};
pub use save::{Folder, Plan, Saver, sidecars, storable};
pub use sparsam_tokenizer::Message;
pub use speculate::{DEFAULT_DRAFT_TOKENS, Speculation, Speculator};
pub use task::{Answered, Question, Reading, Task, ask, equation, same};
