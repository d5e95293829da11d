//! Scaling laws, bills and what fits where: pure arithmetic.
//!
//! [`units`] reads and writes numbers as people do; [`report`] renders tables and plots ([`plot`]) as text or HTML.
//!
//! It knows no files, clocks, threads or devices, and no other crate of the workspace: whoever calls it reads the
//! files and passes numbers. Counts are `f64` in base units (parameters, tokens, FLOP, bytes, seconds, dollars,
//! joules).
#![forbid(unsafe_code)]

mod error;
pub mod plot;
pub mod report;
pub mod svg;
pub mod units;

pub use error::{Error, nearest};
