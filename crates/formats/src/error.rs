//! What can go wrong with a model file.

use std::path::{Path, PathBuf};

/// A file that cannot be read, makes no sense, or does not hold what is asked for.
///
/// Each message says what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are what the messages say
pub enum Error {
    /// The operating system refused.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: std::io::Error },
    /// Something that the file announces lies beyond its end.
    #[error("{format}: {}: {what} reaches to byte {end}, past the end of the file ({len} bytes); the download may be incomplete, fetch the file again", path.display())]
    Truncated { format: &'static str, path: PathBuf, what: String, end: u64, len: u64 },
    /// The file contradicts its format.
    #[error("{format}: {}: {what}: {problem}", path.display())]
    Malformed { format: &'static str, path: PathBuf, what: String, problem: String },
    /// The tensor's type is known but nothing here can compute with it.
    #[error("{format}: {}: tensor {tensor} has type {type_name}, which is not supported; use a file in {supported}", path.display())]
    UnsupportedType {
        format: &'static str,
        path: PathBuf,
        tensor: String,
        type_name: String,
        supported: &'static str,
    },
    /// A metadata key is missing or has another type than expected.
    #[error("gguf: {}: key {key} {problem}; the file is incomplete or was made for another kind of model, convert it anew", path.display())]
    Key { path: PathBuf, key: String, problem: String },
    /// No tensor has this name.
    #[error("{}: there is no tensor {name} among the {count} of this model; `sparsam info` lists them", path.display())]
    NoTensor { path: PathBuf, name: String, count: usize },
    /// A layout change that the tensor's shape or type does not allow.
    #[error("cannot {action} a tensor of shape {shape:?} and type {dtype}: {problem}")]
    Transform { action: &'static str, shape: Vec<usize>, dtype: sparsam_dtype::DType, problem: String },
    /// A file was to be written that would not be valid, or not as it was announced.
    #[error("cannot write {}: {problem}", path.display())]
    Write { path: PathBuf, problem: String },
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { doing, path, source }
    }

    pub(crate) fn write(path: &Path, problem: impl Into<String>) -> Error {
        Error::Write { path: path.to_path_buf(), problem: problem.into() }
    }
}

/// Where a reader is: builds the errors of one file.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub format: &'static str,
    pub path: &'a Path,
}

impl Place<'_> {
    pub fn malformed(&self, what: impl Into<String>, problem: impl Into<String>) -> Error {
        Error::Malformed {
            format: self.format,
            path: self.path.to_path_buf(),
            what: what.into(),
            problem: problem.into(),
        }
    }

    pub fn truncated(&self, what: impl Into<String>, end: u64, len: u64) -> Error {
        Error::Truncated { format: self.format, path: self.path.to_path_buf(), what: what.into(), end, len }
    }
}
