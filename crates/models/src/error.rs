//! What can be wrong with a model's description or its weights.

use std::path::PathBuf;

/// A model that cannot be built from what its files say.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are what the messages say
pub enum Error {
    /// The file names an architecture that is not implemented here.
    #[error("{}: architecture {found:?} is not known here; known are {known}", file.display())]
    UnknownArchitecture { file: PathBuf, found: String, known: String },
    /// A field of the configuration is missing, malformed, unsupported or contradicts another.
    #[error("{}: {key} {problem}", file.display())]
    Config { file: PathBuf, key: String, problem: String },
    /// A weight that the model needs is in no file.
    #[error(
        "{}: tensor {source_name} is missing (the model's {name}, shape {shape:?}); the file is incomplete or its configuration belongs to another model",
        file.display()
    )]
    MissingWeight { file: PathBuf, name: String, source_name: String, shape: Vec<usize> },
    /// A weight has another shape than the configuration says.
    #[error(
        "{}: tensor {source_name} has shape {found:?}, the configuration asks for {expected:?}; they do not belong together",
        file.display()
    )]
    WeightShape { file: PathBuf, source_name: String, expected: Vec<usize>, found: Vec<usize> },
    /// The file holds tensors that the model has no place for, so that it would compute something else.
    #[error(
        "{}: {count} tensor(s) that {architecture} has no place for, such as {first}; the configuration belongs to another model or names features that are not implemented",
        file.display()
    )]
    ExtraWeights { file: PathBuf, architecture: &'static str, count: usize, first: String },
    /// A format has no place for something that changes the computation.
    #[error("{format} cannot hold this model: {key} {problem}; choose another format")]
    Unrepresentable { format: &'static str, key: String, problem: String },
    /// An adapter of a layer that the model does not have.
    #[error(
        "the adapter has weights for {module}, which this {architecture} does not have; it belongs to another model"
    )]
    Adapter { module: String, architecture: &'static str },
    /// The file itself.
    #[error(transparent)]
    Formats(#[from] sparsam_formats::Error),
    /// The configuration passed its checks but the model's shapes do not fit together.
    #[error("tracing the model: {0}")]
    Trace(#[from] sparsam_ir::TraceError),
}
