//! Scaling laws, bills and what fits where: pure arithmetic.
//!
//! The crate answers what a model costs before it exists: [`law`] (how large, on how much text), [`lifetime`]
//! (serving included), [`text_stock`] (when text must be repeated), [`shape`] (an architecture's parameters and exact
//! arithmetic), [`hardware`] (what machines do and cost), [`memory`] (what fits where), [`serving`] (what answers
//! cost), [`fit`] and [`runs`] (laws from one's own runs), [`sweep`] (which runs to make for one), [`forecast`] (what
//! a command will take, and took), [`receipt`] (what a run leaves behind, and the bill of a family). [`report`] renders any of it as text, HTML or plots ([`plot`]).
//!
//! It knows no files, clocks, threads or devices, and no other crate of the workspace: whoever calls it reads the
//! files and passes numbers. Counts are `f64` in base units (parameters, tokens, FLOP, bytes, seconds, dollars,
//! joules); [`units`] reads and writes them as people do. Start at [`law`].
#![forbid(unsafe_code)]

pub mod draws;
mod error;
pub mod fit;
pub mod forecast;
pub mod hardware;
pub mod law;
pub mod lifetime;
pub mod memory;
pub mod plot;
pub mod receipt;
pub mod report;
pub mod runs;
pub mod serving;
pub mod shape;
pub mod svg;
pub mod sweep;
pub mod text_stock;
pub mod units;

pub use error::{Error, nearest};
