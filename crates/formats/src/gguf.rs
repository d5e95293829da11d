//! GGUF, llama.cpp's file format, versions 2 and 3, little endian.
//!
//! A file is: the magic `GGUF`, version (u32), number of tensors (u64), number of metadata keys (u64); the keys with
//! their values; name, dimensions, type and offset of each tensor; padding to `general.alignment`; the tensors' bytes,
//! each at a multiple of the alignment. Strings are a u64 length and UTF-8. Dimensions come innermost first; here they
//! are turned around, so that a matrix is (rows, columns) as in Hugging Face's files.
//! Source: ggml's `docs/gguf.md`.
//!
//! [`File`] reads, [`Writer`] writes, [`Metadata`] holds the keys.

mod metadata;
mod parse;
mod split;
mod types;
mod write;

use std::path::Path;

pub use metadata::{Array, Metadata, Value};
pub use types::{dtype, type_number, unsupported_type_name};
pub use write::Writer;

use crate::Error;
use crate::mmap::Map;
use crate::tensors::{TensorInfo, TensorRef, Tensors};

/// The word before each message.
const FORMAT: &str = "gguf";
/// The first four bytes of a file.
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
/// Where tensors start, in multiples of bytes, unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: u32 = 32;
/// The key that says otherwise.
const ALIGNMENT_KEY: &str = "general.alignment";

/// An open GGUF model: its metadata, and its tensors mapped from one file or from all files of a split.
pub struct File {
    metadata: Metadata,
    tensors: Tensors,
}

impl File {
    /// Opens the model at `path`. If it is one part of several (`NAME-00001-of-00003.gguf`, as `gguf-split` makes
    /// them), the others are opened from the same folder; the metadata are those of the first.
    ///
    /// Reads headers only; tensors are read when they are touched.
    ///
    /// # Errors
    /// If a file cannot be read, is no GGUF of version 2 or 3, contradicts itself, announces more than it holds, or
    /// holds a tensor of a type without a [`sparsam_dtype::DType`] (named); if parts are missing or do not belong
    /// together.
    pub fn open(path: impl AsRef<Path>) -> Result<File, Error> {
        let path = path.as_ref();
        let map = Map::open(path)?;
        let header = parse::parse(map.bytes(), path)?;
        if let Some(part) = split::part(&header.metadata)? {
            return split::open(path, part, header, map);
        }
        let mut tensors = Tensors::new(FORMAT, path);
        tensors.add(path, map, header.tensors, Vec::new())?;
        Ok(File { metadata: header.metadata, tensors })
    }

    /// The keys and values, in the file's order.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors, in the file's order.
    pub fn tensors(&self) -> &[TensorInfo] {
        self.set().infos()
    }

    /// The tensor of this name, if there is one.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        self.set().get(name)
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn require(&self, name: &str) -> Result<TensorRef<'_>, Error> {
        self.set().require(name)
    }

    /// Gives back the memory of a tensor's mapped pages, for instance after it has been packed into another layout.
    /// Its bytes stay readable: the system reads them from the file again.
    pub fn release(&self, name: &str) {
        self.set().release(name);
    }

    pub(crate) fn set(&self) -> &Tensors {
        &self.tensors
    }
}
