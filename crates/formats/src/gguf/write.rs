//! Writing GGUF, version 3, tensor by tensor.

use std::path::Path;

use super::metadata::{Array, Metadata, Value};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, types};
use crate::Error;
use crate::body::{Body, lengths};
use crate::tensors::TensorSpec;

/// A GGUF file that is being written; nothing is at its path until [`Writer::finish`].
///
/// All tensors are announced first, then their bytes follow in the same order, whole or in pieces: memory holds no more
/// than the caller's piece.
///
/// ```
/// use sparsam_dtype::DType;
/// use sparsam_formats::{TensorSpec, gguf};
/// let path = std::env::temp_dir().join(format!("sparsam-doc-{}.gguf", std::process::id()));
/// let mut metadata = gguf::Metadata::default();
/// metadata.insert("general.architecture", gguf::Value::String("llama".into()));
/// let spec = TensorSpec { name: "a".into(), shape: vec![1, 2], dtype: DType::F16 };
/// let mut writer = gguf::Writer::create(&path, &metadata, &[spec]).unwrap();
/// writer.append("a", &[0x00, 0x3C]).unwrap(); // 1.0
/// writer.append("a", &[0x00, 0xC0]).unwrap(); // -2.0
/// writer.finish().unwrap();
/// let file = gguf::File::open(&path).unwrap();
/// assert_eq!(file.tensor("a").unwrap().bytes, [0x00, 0x3C, 0x00, 0xC0]);
/// # std::fs::remove_file(&path).unwrap();
/// ```
pub struct Writer {
    body: Body,
}

impl Writer {
    /// Starts the file: writes `metadata` and the table of `tensors`.
    ///
    /// # Errors
    /// If a tensor appears twice, has more than four axes, a type that GGUF has not (U8) or rows that are no whole
    /// blocks; if `general.alignment` is no power of two; if the file cannot be created or the disk is full.
    pub fn create(
        path: impl AsRef<Path>,
        metadata: &Metadata,
        tensors: &[TensorSpec],
    ) -> Result<Writer, Error> {
        let path = path.as_ref();
        let alignment = metadata.opt_u32(ALIGNMENT_KEY)?.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() {
            return Err(Error::write(
                path,
                format!("{ALIGNMENT_KEY} is {alignment}, which is no power of two"),
            ));
        }
        let alignment = alignment as usize;

        let mut head = Vec::new();
        head.extend(MAGIC);
        head.extend(3u32.to_le_bytes());
        head.extend((tensors.len() as u64).to_le_bytes());
        head.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata.iter() {
            put_string(&mut head, key);
            put_value(&mut head, value);
        }
        let lengths = lengths(path, tensors)?;
        let mut offset = 0u64;
        for (tensor, &bytes) in tensors.iter().zip(&lengths) {
            let problem = |p: String| Error::write(path, format!("tensor {} {p}", tensor.name));
            let number = types::type_number(tensor.dtype)
                .ok_or_else(|| problem(format!("has type {}, which GGUF does not have", tensor.dtype)))?;
            if tensor.shape.len() > 4 {
                return Err(problem(format!("has {} axes, but GGUF holds at most 4", tensor.shape.len())));
            }
            put_string(&mut head, &tensor.name);
            head.extend((tensor.shape.len() as u32).to_le_bytes());
            for &n in tensor.shape.iter().rev() {
                head.extend((n as u64).to_le_bytes());
            }
            head.extend(number.to_le_bytes());
            head.extend(offset.to_le_bytes());
            offset = (offset + bytes as u64).next_multiple_of(alignment as u64);
        }
        head.resize(head.len().next_multiple_of(alignment), 0);
        Ok(Writer { body: Body::start(path, &head, tensors, lengths, alignment)? })
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

fn put_string(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

/// Type number and value.
fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(x) => put(out, 0, &x.to_le_bytes()),
        Value::I8(x) => put(out, 1, &x.to_le_bytes()),
        Value::U16(x) => put(out, 2, &x.to_le_bytes()),
        Value::I16(x) => put(out, 3, &x.to_le_bytes()),
        Value::U32(x) => put(out, 4, &x.to_le_bytes()),
        Value::I32(x) => put(out, 5, &x.to_le_bytes()),
        Value::F32(x) => put(out, 6, &x.to_le_bytes()),
        Value::Bool(x) => put(out, 7, &[u8::from(*x)]),
        Value::String(x) => {
            put(out, 8, &[]);
            put_string(out, x);
        }
        Value::Array(x) => {
            put(out, 9, &[]);
            put_array(out, x);
        }
        Value::U64(x) => put(out, 10, &x.to_le_bytes()),
        Value::I64(x) => put(out, 11, &x.to_le_bytes()),
        Value::F64(x) => put(out, 12, &x.to_le_bytes()),
    }
}

/// Element type, number of elements, elements.
fn put_array(out: &mut Vec<u8>, array: &Array) {
    let n = (array.len() as u64).to_le_bytes();
    match array {
        Array::U8(v) => put_list(out, 0, v, |x| x.to_le_bytes()),
        Array::I8(v) => put_list(out, 1, v, |x| x.to_le_bytes()),
        Array::U16(v) => put_list(out, 2, v, |x| x.to_le_bytes()),
        Array::I16(v) => put_list(out, 3, v, |x| x.to_le_bytes()),
        Array::U32(v) => put_list(out, 4, v, |x| x.to_le_bytes()),
        Array::I32(v) => put_list(out, 5, v, |x| x.to_le_bytes()),
        Array::F32(v) => put_list(out, 6, v, |x| x.to_le_bytes()),
        Array::Bool(v) => put_list(out, 7, v, |x| [u8::from(*x)]),
        Array::String(v) => {
            put(out, 8, &n);
            v.iter().for_each(|s| put_string(out, s));
        }
        Array::Array(v) => {
            put(out, 9, &n);
            v.iter().for_each(|a| put_array(out, a));
        }
        Array::U64(v) => put_list(out, 10, v, |x| x.to_le_bytes()),
        Array::I64(v) => put_list(out, 11, v, |x| x.to_le_bytes()),
        Array::F64(v) => put_list(out, 12, v, |x| x.to_le_bytes()),
    }
}

fn put(out: &mut Vec<u8>, number: u32, bytes: &[u8]) {
    out.extend(number.to_le_bytes());
    out.extend(bytes);
}

fn put_list<T, const N: usize>(out: &mut Vec<u8>, number: u32, v: &[T], f: impl Fn(&T) -> [u8; N]) {
    put(out, number, &(v.len() as u64).to_le_bytes());
    v.iter().for_each(|x| out.extend(f(x)));
}
