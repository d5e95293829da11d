//! What can be wrong with a training run.

use std::path::PathBuf;

/// Why a run cannot start, go on or be taken up again. Each message says what, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are what the messages say
pub enum Error {
    /// A setting that is unknown, malformed or contradicts another.
    #[error("{place}: {problem}")]
    Config { place: String, problem: String },
    /// Text that cannot be trained on.
    #[error("{}: {problem}", file.display())]
    Data { file: PathBuf, problem: String },
    /// The loss or a gradient is no number any more, or the loss has left the road.
    #[error("step {step}: {what}. {kept}. {advice}")]
    Diverged { step: u64, what: String, kept: String, advice: String },
    /// A checkpoint that cannot be taken up.
    #[error("{}: {problem}", file.display())]
    Checkpoint { file: PathBuf, problem: String },
    /// The system refuses a file.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: std::io::Error },
    /// Planning arithmetic: a size that no shape has.
    #[error(transparent)]
    Plan(#[from] sparsam_plan::Error),
    /// A model that is opened or written, or its adapters.
    #[error(transparent)]
    Engine(#[from] sparsam_engine::Error),
    /// A model file.
    #[error(transparent)]
    Formats(#[from] sparsam_formats::Error),
    /// A model's description or weights.
    #[error(transparent)]
    Models(#[from] sparsam_models::Error),
    /// A tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] sparsam_tokenizer::Error),
    /// A model whose shapes do not fit together.
    #[error("tracing the training step: {0}")]
    Trace(#[from] sparsam_ir::TraceError),
    /// A step that does not compile or run.
    #[error(transparent)]
    Runtime(#[from] sparsam_runtime::Error),
    /// The interpreter refuses its operands.
    #[error(transparent)]
    Interpret(#[from] sparsam_ir::interpret::InterpretError),
}

impl Error {
    pub(crate) fn config(place: impl Into<String>, problem: impl Into<String>) -> Error {
        Error::Config { place: place.into(), problem: problem.into() }
    }

    pub(crate) fn data(file: impl Into<PathBuf>, problem: impl Into<String>) -> Error {
        Error::Data { file: file.into(), problem: problem.into() }
    }

    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { doing, path, source }
    }
}
