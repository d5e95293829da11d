//! From a file to text: loading, KV cache, sampling, generation and evaluation.
//!
//! [`open`] looks at a model; [`Engine::load`] packs its weights; [`Engine::runner`] gives the cache and the compiled
//! steps; [`generate`] continues a text; [`perplexity`] scores one. The same steps serve one prompt, a chat, and many
//! sequences at once.
#![forbid(unsafe_code)]

mod error;
mod open;

pub use error::Error;
pub use open::{Opened, open};
