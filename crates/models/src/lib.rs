//! Model code that reads like the papers: Llama, Qwen, Gemma, GPT-2; and the names of their weights.
//!
//! A model here is a configuration and a function that traces a graph. It knows no file formats' bytes, no devices, no
//! caches: which tokens form a sequence and where its keys lie comes in as an [`nn::Batch`], so one model
//! file serves training, scoring and decoding. Inside there is one layout, Hugging Face's.
//!
//! Start at [`llama`]; the other model files have the same order and say in what they differ. [`Config::from_source`]
//! reads a configuration, [`Model`] traces and lists weights.
#![forbid(unsafe_code)]

pub mod adapter;
mod config;
mod error;
mod export;
pub mod gemma3;
pub mod gpt2;
pub mod llama;
mod model;
mod names;
pub mod nn;
pub mod qwen2;
pub mod qwen3;
pub mod rope;

pub use config::Heads;
pub use error::Error;
pub use export::GgufConfig;
pub use model::{Architecture, Config, Constant, Facts, LinearLayer, Model, Parameter, WeightSpec};
pub use names::Rule;
