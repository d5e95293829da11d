//! What the writers of both formats share: announced tensors, written one after the other.

use std::collections::HashSet;
use std::io::Write as _;
use std::path::Path;

use crate::tensors::{TensorSpec, checked_bytes};
use crate::{AtomicFile, Error};

/// Bytes of each tensor; refuses names that appear twice and shapes that cannot be.
pub(crate) fn lengths(path: &Path, tensors: &[TensorSpec]) -> Result<Vec<usize>, Error> {
    let mut names = HashSet::new();
    tensors
        .iter()
        .map(|t| {
            if !names.insert(&t.name) {
                return Err(Error::write(path, format!("two tensors are named {}", t.name)));
            }
            checked_bytes(&t.shape, t.dtype)
                .map_err(|p| Error::write(path, format!("tensor {}: {p}", t.name)))
        })
        .collect()
}

/// The part after the header, the same for both formats: announced tensors, one after the other.
pub(crate) struct Body {
    file: AtomicFile,
    /// Name and bytes of each tensor.
    tensors: Vec<(String, usize)>,
    alignment: usize,
    /// The tensor whose turn it is, and how much of it has been written.
    current: usize,
    written: usize,
}

impl Body {
    pub fn start(
        path: &Path,
        head: &[u8],
        tensors: &[TensorSpec],
        lengths: Vec<usize>,
        alignment: usize,
    ) -> Result<Body, Error> {
        let mut file = AtomicFile::create(path)?;
        file.write_all(head).map_err(Error::io("write", path))?;
        let tensors = tensors.iter().map(|t| t.name.clone()).zip(lengths).collect();
        Ok(Body { file, tensors, alignment, current: 0, written: 0 })
    }

    fn problem(&self, problem: String) -> Error {
        Error::write(self.file.path(), problem)
    }

    /// Pads after complete tensors and goes to the first that still wants bytes.
    fn settle(&mut self) -> Result<(), Error> {
        while let Some(&(_, bytes)) = self.tensors.get(self.current) {
            if self.written < bytes {
                break;
            }
            // As llama.cpp's own writer: after the last tensor too.
            let padding = bytes.next_multiple_of(self.alignment) - bytes;
            let zeros = vec![0; padding];
            self.file.write_all(&zeros).map_err(Error::io("write", self.file.path()))?;
            self.current += 1;
            self.written = 0;
        }
        Ok(())
    }

    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.settle()?;
        match self.tensors.get(self.current) {
            None => {
                Err(self.problem(format!("tensor {name} is given more bytes, but all tensors are complete")))
            }
            Some((expected, _)) if expected != name => Err(self.problem(format!(
                "tensor {name} is given before {expected} is complete; keep the announced order"
            ))),
            Some(&(_, total)) if bytes.len() > total - self.written => Err(self.problem(format!(
                "tensor {name} was announced with {total} bytes, but {} were given",
                self.written + bytes.len()
            ))),
            Some(_) => {
                self.file.write_all(bytes).map_err(Error::io("write", self.file.path()))?;
                self.written += bytes.len();
                Ok(())
            }
        }
    }

    pub fn finish(mut self) -> Result<(), Error> {
        self.settle()?;
        if let Some((name, bytes)) = self.tensors.get(self.current) {
            return Err(self.problem(format!("tensor {name} has {} of its {bytes} bytes", self.written)));
        }
        self.file.commit()
    }
}
