//! Rounding a model's weights to fewer bits at the least loss: error-compensated, block by block, into any grid.
//!
//! *How* codes are chosen ([`gptq`]: nearest, GPTQ, refinement) is separate from *what* they are stored in ([`Grid`]: the
//! block formats of GGUF, or plain groups). This crate knows models only as graphs whose products can be tapped; it
//! does not know tokenizers, text or the command line.
//!
//! Start at [`gptq::gptq`], the algorithm for one matrix, then [`stream::Job`], which takes a model through it block by
//! block; [`recipe`] says which tensor gets which type.
#![forbid(unsafe_code)]

mod activations;
pub mod budget;
mod calibrate;
pub mod free;
pub mod gptq;
pub mod grid;
pub mod heal;
pub mod hessian;
pub mod linalg;
mod partial;
pub mod passport;
pub mod recipe;
mod refit;
pub mod report;
pub mod speed;
pub mod stream;
mod taps;
mod write;

pub use calibrate::Tokens;
pub use grid::{Grid, Plain, Rounded};
pub use hessian::{Damped, Hessian};

/// What goes wrong while rounding.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the fields are what the messages say
pub enum Error {
    /// The Hessian cannot be factorised.
    #[error(
        "quantize: the inputs' Hessian is not positive definite; use more calibration text or more --damping"
    )]
    NotPositive,
    /// A weight is NaN or infinite.
    #[error(
        "quantize: {name}: weight {at} is {value}; the file is damaged or the training diverged, so nothing is written"
    )]
    NotFinite { name: String, at: usize, value: f32 },
    /// Not a single sequence of calibration text.
    #[error(
        "quantize: the calibration text has {tokens} tokens, one sequence takes {ctx}; give a longer text or a smaller --calibration-ctx"
    )]
    TooShort { tokens: usize, ctx: usize },
    /// GPTQ without text.
    #[error("quantize: GPTQ needs calibration text; give --calibration FILE, or choose --method nearest")]
    NoCalibration,
    /// A name that is no type.
    #[error("quantize: there is no type {name:?}; known are {known}")]
    Type { name: String, known: String },
    /// An importance matrix of another model.
    #[error(
        "quantize: the importance matrix has {found} numbers for {name}, whose rows have {cols}; it belongs to another model"
    )]
    Importance { name: String, found: usize, cols: usize },
    /// What GPTQ's layout cannot hold.
    #[error("quantize: {0}")]
    Layout(String),
    /// A partial result cannot be used.
    #[error("quantize: the partial result {} cannot be used ({what}); delete its folder and start again", path.display())]
    Partial { path: std::path::PathBuf, what: String },
    /// The disk.
    #[error("quantize: {what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error(transparent)]
    Format(#[from] sparsam_formats::Error),
    #[error(transparent)]
    Engine(#[from] sparsam_engine::Error),
    #[error(transparent)]
    Model(#[from] sparsam_models::Error),
    #[error(transparent)]
    Codec(#[from] sparsam_dtype::codec::CodecError),
    #[error(transparent)]
    Runtime(#[from] sparsam_runtime::Error),
    #[error(transparent)]
    Trace(#[from] sparsam_ir::TraceError),
}
