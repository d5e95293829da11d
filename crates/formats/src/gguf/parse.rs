//! From the bytes of one GGUF file to its header, every length checked before it is used.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use super::metadata::{Array, Metadata, Value};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, FORMAT, MAGIC, types};
use crate::Error;
use crate::error::Place;
use crate::tensors::{TensorInfo, check_overlap, checked_bytes};

/// What stands before the tensors' bytes.
pub(super) struct Header {
    pub metadata: Metadata,
    /// In the file's order, each within the file.
    pub tensors: Vec<TensorInfo>,
}

/// The fewest bytes that a key takes: an empty name, a type, a one-byte value. (Bounds the count.)
const MIN_KEY_BYTES: usize = 8 + 4 + 1;
/// The fewest bytes that a tensor's entry takes: an empty name, no dimensions, type, offset.
const MIN_TENSOR_BYTES: usize = 8 + 4 + 4 + 8;
/// As ggml's `GGML_MAX_DIMS`.
const MAX_DIMS: u32 = 4;
/// How deep arrays of arrays may go; known files have no arrays of arrays at all.
const MAX_ARRAY_DEPTH: usize = 4;

/// A reader of `bytes` that knows where it is and for whom it speaks.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    place: Place<'a>,
}

impl<'a> Cursor<'a> {
    fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `n` bytes, which are `what`.
    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], Error> {
        if n > self.remaining() {
            let end = (self.at as u64).saturating_add(n as u64);
            return Err(self.place.truncated(what, end, self.bytes.len() as u64));
        }
        let taken = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        Ok(self.take(N, what)?.try_into().expect("take gives as many as asked"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A number of items of at least `min_bytes` each that must still fit into the file.
    fn count(&mut self, min_bytes: usize, what: &str) -> Result<usize, Error> {
        let n = self.u64(what)?;
        match usize::try_from(n) {
            Ok(n) if n <= self.remaining() / min_bytes => Ok(n),
            _ => {
                let end = n.saturating_mul(min_bytes as u64).saturating_add(self.at as u64);
                Err(self.place.truncated(format!("{what} ({n})"), end, self.bytes.len() as u64))
            }
        }
    }

    fn string(&mut self, what: &str) -> Result<&'a str, Error> {
        let n = self.count(1, what)?;
        let at = self.at;
        let bytes = self.take(n, what)?;
        std::str::from_utf8(bytes).map_err(|e| {
            let bad = at + e.valid_up_to();
            self.place.malformed(
                what,
                format!("the string is not UTF-8 at byte {bad}; the file is damaged, fetch it again"),
            )
        })
    }

    fn bool(&mut self, what: &str) -> Result<bool, Error> {
        match self.array(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [b] => Err(self.place.malformed(
                what,
                format!("byte {b} at {} is neither true (1) nor false (0); the file is damaged", self.at - 1),
            )),
        }
    }

    fn value(&mut self, what: &str) -> Result<Value, Error> {
        Ok(match self.u32(what)? {
            0 => Value::U8(u8::from_le_bytes(self.array(what)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(what)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(what)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(what)?)),
            4 => Value::U32(u32::from_le_bytes(self.array(what)?)),
            5 => Value::I32(i32::from_le_bytes(self.array(what)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            7 => Value::Bool(self.bool(what)?),
            8 => Value::String(self.string(what)?.to_string()),
            9 => Value::Array(self.list(what, 1)?),
            10 => Value::U64(u64::from_le_bytes(self.array(what)?)),
            11 => Value::I64(i64::from_le_bytes(self.array(what)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            other => return Err(self.unknown_value_type(other, what)),
        })
    }

    fn unknown_value_type(&self, number: u32, what: &str) -> Error {
        self.place.malformed(
            what,
            format!("value type {number} is unknown (0 to 12 are known); the file is damaged or newer than this program"),
        )
    }

    /// An array: element type, number of elements, elements.
    fn list(&mut self, what: &str, depth: usize) -> Result<Array, Error> {
        if depth > MAX_ARRAY_DEPTH {
            let problem = format!("arrays are nested deeper than {MAX_ARRAY_DEPTH}; the file is damaged");
            return Err(self.place.malformed(what, problem));
        }
        Ok(match self.u32(what)? {
            0 => Array::U8(self.numbers(what, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(what, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(what, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(what, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(what, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(what, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(what, f32::from_le_bytes)?),
            7 => Array::Bool(self.items(what, 1, |c| c.bool(what))?),
            8 => Array::String(self.items(what, 8, |c| c.string(what).map(str::to_string))?),
            9 => Array::Array(self.items(what, 12, |c| c.list(what, depth + 1))?),
            10 => Array::U64(self.numbers(what, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(what, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(what, f64::from_le_bytes)?),
            other => return Err(self.unknown_value_type(other, what)),
        })
    }

    fn numbers<const N: usize, T>(&mut self, what: &str, f: impl Fn([u8; N]) -> T) -> Result<Vec<T>, Error> {
        let n = self.count(N, what)?;
        Ok(self.take(n * N, what)?.as_chunks::<N>().0.iter().map(|b| f(*b)).collect())
    }

    /// Elements of at least `min_bytes` each.
    fn items<T>(
        &mut self,
        what: &str,
        min_bytes: usize,
        mut f: impl FnMut(&mut Self) -> Result<T, Error>,
    ) -> Result<Vec<T>, Error> {
        let n = self.count(min_bytes, what)?;
        (0..n).map(|_| f(self)).collect()
    }
}

/// The header of the GGUF file `bytes`, which lies at `path` (for messages only).
pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<Header, Error> {
    let place = Place { format: FORMAT, path };
    let mut c = Cursor { bytes, at: 0, place };
    check_magic(bytes, place)?;
    c.take(4, "the magic")?;
    check_version(c.u32("the version")?, place)?;
    let n_tensors = c.u64("the number of tensors")?;
    let n_keys = c.count(MIN_KEY_BYTES, "the number of keys")?;

    let mut metadata = Metadata::new(path);
    for i in 0..n_keys {
        let key = c.string(&format!("the name of key {i} (of {n_keys})"))?;
        let what = format!("key {key}");
        let value = c.value(&what)?;
        if metadata.insert(key, value).is_some() {
            return Err(
                place.malformed(what, "it appears twice; the file is damaged, fetch or convert it anew")
            );
        }
    }
    let alignment = alignment(&metadata, place)?;

    let too_many = c.remaining() / MIN_TENSOR_BYTES;
    let n_tensors = usize::try_from(n_tensors).ok().filter(|&n| n <= too_many).ok_or_else(|| {
        let end = n_tensors.saturating_mul(MIN_TENSOR_BYTES as u64).saturating_add(c.at as u64);
        place.truncated(format!("the table of {n_tensors} tensors"), end, bytes.len() as u64)
    })?;
    // Grown as they come: the count is only known to fit into the file, and that may be large.
    let mut tensors = Vec::new();
    let mut names = HashSet::new();
    for i in 0..n_tensors {
        let (info, offset) = tensor(&mut c, i, n_tensors)?;
        let what = || format!("tensor {}", info.name);
        if !names.insert(info.name.clone()) {
            return Err(place.malformed(
                what(),
                "two tensors have this name; the file is damaged, fetch or convert it anew",
            ));
        }
        if !offset.is_multiple_of(u64::from(alignment)) {
            let problem = format!(
                "its offset {offset} is no multiple of the alignment {alignment}; the file is damaged"
            );
            return Err(place.malformed(what(), problem));
        }
        tensors.push((info, offset));
    }

    // Tensors start at the next multiple of the alignment; a file without any may end before it.
    let start = (c.at as u64).next_multiple_of(u64::from(alignment));
    let mut placed = Vec::with_capacity(tensors.len());
    for (mut info, offset) in tensors {
        info.range = placed_range(&info, start, offset, bytes.len(), place)?;
        placed.push(info);
    }
    check_overlap(&placed, place)?;
    Ok(Header { metadata, tensors: placed })
}

/// Whatever else people name `model.gguf`.
fn check_magic(bytes: &[u8], place: Place<'_>) -> Result<(), Error> {
    if bytes.starts_with(&MAGIC) {
        return Ok(());
    }
    let what = "the first four bytes";
    Err(match bytes {
        [] => place.malformed("the file", "it is empty; fetch it again"),
        _ if [b"lmgg", b"fmgg", b"tjgg", b"algg"].iter().any(|m| bytes.starts_with(*m)) => {
            place.malformed(what, "this is a GGML file from before GGUF; convert the original model to GGUF")
        }
        _ if bytes.starts_with(b"version https://git-lfs") => {
            place.malformed("the file", "it is a Git LFS pointer, not the model; run `git lfs pull`")
        }
        _ if bytes.starts_with(b"<") => {
            place.malformed("the file", "it is a web page, not the model; download the file itself")
        }
        _ => place.malformed(what, "they are not `GGUF`; name a GGUF or safetensors file"),
    })
}

/// Only versions 2 and 3, little endian.
fn check_version(version: u32, place: Place<'_>) -> Result<(), Error> {
    let problem = match version {
        2 | 3 => return Ok(()),
        1 => "version 1 is not supported; convert the original model anew, or with an old llama.cpp to version 3".into(),
        v if (1..=0xFFFF).contains(&v.swap_bytes()) => {
            "the file is big endian; convert it to little endian (llama.cpp's gguf_convert_endian.py)".into()
        }
        v => format!("version {v} is unknown (2 and 3 are known); the file is damaged or newer than this program"),
    };
    Err(place.malformed("the version", problem))
}

fn alignment(metadata: &Metadata, place: Place<'_>) -> Result<u32, Error> {
    let alignment = metadata.opt_u32(ALIGNMENT_KEY)?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() {
        let problem = format!("{alignment} is no power of two; the file is damaged, convert it anew");
        return Err(place.malformed(format!("key {ALIGNMENT_KEY}"), problem));
    }
    Ok(alignment)
}

/// Entry `i` of the table: the tensor with an empty range, and its offset.
fn tensor(c: &mut Cursor<'_>, i: usize, n_tensors: usize) -> Result<(TensorInfo, u64), Error> {
    let name = c.string(&format!("the name of tensor {i} (of {n_tensors})"))?.to_string();
    let what = format!("tensor {name}");
    let n_dims = c.u32(&what)?;
    if n_dims > MAX_DIMS {
        let problem = format!("it has {n_dims} dimensions, more than {MAX_DIMS}; the file is damaged");
        return Err(c.place.malformed(what, problem));
    }
    let mut shape = Vec::with_capacity(MAX_DIMS as usize);
    for _ in 0..n_dims {
        let n = c.u64(&what)?;
        let n = usize::try_from(n).map_err(|_| {
            c.place.malformed(&what, format!("a dimension of {n} is more than this machine can count"))
        })?;
        shape.push(n);
    }
    shape.reverse();
    let number = c.u32(&what)?;
    let Some(dtype) = types::dtype(number) else {
        let known = types::unsupported_type_name(number);
        return Err(Error::UnsupportedType {
            format: FORMAT,
            path: c.place.path.to_path_buf(),
            tensor: name,
            type_name: format!(
                "{number} ({})",
                known.unwrap_or("unknown: the file is damaged or newer than this program")
            ),
            supported: "F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q8_K, IQ4_NL or IQ4_XS",
        });
    };
    let offset = c.u64(&what)?;
    Ok((TensorInfo { name, shape, dtype, shard: 0, range: 0..0 }, offset))
}

/// The tensor's bytes within a file of `len` bytes whose tensors start at `start`.
fn placed_range(
    info: &TensorInfo,
    start: u64,
    offset: u64,
    len: usize,
    place: Place<'_>,
) -> Result<Range<usize>, Error> {
    let what = || format!("tensor {}", info.name);
    let bytes = checked_bytes(&info.shape, info.dtype).map_err(|problem| {
        place.malformed(what(), format!("{problem}; the file is damaged, convert it anew"))
    })?;
    if bytes == 0 {
        return Ok(0..0);
    }
    let end = start.checked_add(offset).and_then(|b| b.checked_add(bytes as u64));
    match end {
        Some(end) if end <= len as u64 => Ok(end as usize - bytes..end as usize),
        _ => Err(place.truncated(what(), end.unwrap_or(u64::MAX), len as u64)),
    }
}
