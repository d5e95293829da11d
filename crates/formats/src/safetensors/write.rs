//! Writing one safetensors file, tensor by tensor.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::parse::type_name;
use crate::Error;
use crate::body::{Body, lengths};
use crate::tensors::TensorSpec;

/// A safetensors file that is being written; nothing is at its path until [`Writer::finish`].
///
/// Used like [`crate::gguf::Writer`]: all tensors are announced, then their bytes follow in the same order.
pub struct Writer {
    body: Body,
}

impl Writer {
    /// Starts the file: writes the header with `metadata` (`("format", "pt")` is what transformers wants to see) and
    /// the table of `tensors`.
    ///
    /// # Errors
    /// If a tensor appears twice or has a block format, which safetensors cannot hold; if the file cannot be created
    /// or the disk is full.
    pub fn create(
        path: impl AsRef<Path>,
        metadata: &[(String, String)],
        tensors: &[TensorSpec],
    ) -> Result<Writer, Error> {
        let path = path.as_ref();
        let lengths = lengths(path, tensors)?;
        let mut header = Map::new();
        if !metadata.is_empty() {
            let strings: Map<String, Value> =
                metadata.iter().map(|(k, v)| (k.clone(), v.as_str().into())).collect();
            header.insert("__metadata__".into(), strings.into());
        }
        let mut at = 0usize;
        for (tensor, bytes) in tensors.iter().zip(&lengths) {
            let problem = |p: String| Error::write(path, format!("tensor {} {p}", tensor.name));
            let dtype = type_name(tensor.dtype).ok_or_else(|| {
                problem(format!(
                    "has type {}, which safetensors cannot hold; convert it to F32, F16 or BF16",
                    tensor.dtype
                ))
            })?;
            if tensor.name == "__metadata__" {
                return Err(problem("has a name that safetensors keeps for itself".into()));
            }
            let end = at
                .checked_add(*bytes)
                .ok_or_else(|| problem("makes the file larger than this machine can count".into()))?;
            header.insert(
                tensor.name.clone(),
                json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [at, end] }),
            );
            at = end;
        }
        let mut json = Value::Object(header).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' '); // so that tensors start at a multiple of 8
        let mut head = (json.len() as u64).to_le_bytes().to_vec();
        head.append(&mut json);
        Ok(Writer { body: Body::start(path, &head, tensors, lengths, 1)? })
    }

    /// Writes the next bytes of tensor `name`, which must be the first one that is not complete yet.
    ///
    /// # Errors
    /// If it is another tensor's turn, the tensor gets more bytes than announced, or the disk is full.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.body.append(name, bytes)
    }

    /// Makes the file appear at its path, its bytes safe on the disk.
    ///
    /// # Errors
    /// If a tensor is not complete, or the disk is full or fails.
    pub fn finish(self) -> Result<(), Error> {
        self.body.finish()
    }
}
