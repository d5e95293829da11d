//! What can go wrong between teacher and student.

use std::path::PathBuf;

/// Why a teacher cannot be asked or a student not be taught. Each message says what, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are what the messages say
pub enum Error {
    /// A line of a file that is not what it should be.
    #[error("{}:{line}: {problem}", file.display())]
    Line { file: PathBuf, line: usize, problem: String },
    /// A file that is not what it should be.
    #[error("{}: {problem}", file.display())]
    File { file: PathBuf, problem: String },
    /// A setting outside of its range, or in contradiction to another.
    #[error("{name}: {problem}")]
    Setting { name: String, problem: String },
    /// The system refuses a file.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: std::io::Error },
    /// A server that does not answer as it should.
    #[error("{url}: {problem}")]
    Server { url: String, problem: String },
    /// A model.
    #[error(transparent)]
    Engine(#[from] sparsam_engine::Error),
    /// A training step.
    #[error(transparent)]
    Train(#[from] sparsam_train::Error),
}

impl Error {
    pub(crate) fn line(file: impl Into<PathBuf>, line: usize, problem: impl Into<String>) -> Error {
        Error::Line { file: file.into(), line, problem: problem.into() }
    }

    pub(crate) fn file(file: impl Into<PathBuf>, problem: impl Into<String>) -> Error {
        Error::File { file: file.into(), problem: problem.into() }
    }

    pub(crate) fn setting(name: impl Into<String>, problem: impl Into<String>) -> Error {
        Error::Setting { name: name.into(), problem: problem.into() }
    }

    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { doing, path, source }
    }
}
