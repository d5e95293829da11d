//! Parameters by name.

use crate::Error;
use sparsam_dtype::{DType, codec};
use sparsam_kernels::weight::Weight;
use sparsam_kernels::{AlignedBytes, Pages};
use std::collections::HashMap;
use std::sync::Arc;

/// How a parameter is held.
#[derive(Clone)]
pub(crate) enum Stored {
    /// A matrix for products and lookups.
    Packed(Arc<Weight>),
    /// Numbers as they are.
    Plain(Arc<AlignedBytes>),
}

#[derive(Clone)]
pub(crate) struct Entry {
    pub shape: Vec<usize>,
    pub dtype: DType,
    pub stored: Stored,
}

/// Parameters by name: matrices packed for the kernels, everything else as plain numbers. Immutable once shared, so
/// that any number of sessions read one copy.
#[derive(Clone, Default)]
pub struct Weights {
    entries: HashMap<String, Entry>,
    /// Where the next matrix is packed.
    pages: Pages,
}

impl Weights {
    /// No parameters.
    pub fn new() -> Weights {
        Weights::default()
    }

    /// Adds the tensor `shape` of `dtype`, row-major in `bytes`, replacing one of that name.
    ///
    /// A matrix (two axes) is packed for products and lookups. Other tensors stay plain; in a block format they are
    /// decoded, and count as F32 from then on. The bytes are copied; the caller may let go of them.
    ///
    /// # Errors
    /// [`Error::Weight`] if the bytes do not fit shape and type.
    pub fn insert(&mut self, name: &str, shape: &[usize], dtype: DType, bytes: &[u8]) -> Result<(), Error> {
        let refuse = |what: String| Error::Weight { name: name.to_string(), what };
        let entry = match *shape {
            [rows, cols] => {
                let weight = Weight::pack_in(&mut self.pages, dtype, rows, cols, bytes)
                    .map_err(|e| refuse(e.to_string()))?;
                Entry { shape: shape.to_vec(), dtype, stored: Stored::Packed(Arc::new(weight)) }
            }
            _ => {
                let n = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
                if n.and_then(|n| dtype.bytes_for(n)) != Some(bytes.len()) {
                    return Err(refuse(format!("{dtype}{shape:?} does not take {} bytes", bytes.len())));
                }
                let (dtype, plain) = if dtype.is_block() {
                    let mut values = vec![0f32; n.unwrap_or(0)];
                    codec::decode(dtype, bytes, &mut values).map_err(|e| refuse(e.to_string()))?;
                    (DType::F32, AlignedBytes::from_slice(bytemuck::cast_slice(&values)))
                } else {
                    (dtype, AlignedBytes::from_slice(bytes))
                };
                Entry { shape: shape.to_vec(), dtype, stored: Stored::Plain(Arc::new(plain)) }
            }
        };
        self.entries.insert(name.to_string(), entry);
        Ok(())
    }

    /// Adds a tensor of f32 numbers.
    ///
    /// # Errors
    /// As [`Weights::insert`].
    pub fn insert_f32(&mut self, name: &str, shape: &[usize], values: &[f32]) -> Result<(), Error> {
        self.insert(name, shape, DType::F32, bytemuck::cast_slice(values))
    }

    /// Whether there is a parameter `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Shapes and types by name, as `Trace::with_weights` takes them.
    pub fn shapes(&self) -> HashMap<String, (Vec<usize>, DType)> {
        self.entries.iter().map(|(name, e)| (name.clone(), (e.shape.clone(), e.dtype))).collect()
    }

    /// The packed matrix `name`; `None` if there is none or it is no matrix.
    pub fn packed(&self, name: &str) -> Option<&Arc<Weight>> {
        match &self.entries.get(name)?.stored {
            Stored::Packed(w) => Some(w),
            Stored::Plain(_) => None,
        }
    }

    /// Bytes that all parameters take in memory.
    pub fn bytes(&self) -> usize {
        let of = |e: &Entry| match &e.stored {
            Stored::Packed(w) => w.bytes(),
            Stored::Plain(b) => b.len(),
        };
        self.entries.values().map(of).sum()
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }
}

impl Entry {
    /// As plain numbers of its own type: a packed matrix is decoded.
    pub(crate) fn plain(&self, name: &str) -> Result<Arc<AlignedBytes>, Error> {
        let refuse = |what: String| Error::Weight { name: name.to_string(), what };
        let w = match &self.stored {
            Stored::Plain(bytes) => return Ok(bytes.clone()),
            Stored::Packed(w) => w,
        };
        let mut values = vec![0f32; w.rows() * w.cols()];
        w.decode_rows(0, &mut values).map_err(|e| refuse(e.to_string()))?;
        if self.dtype == DType::F32 {
            return Ok(Arc::new(AlignedBytes::from_slice(bytemuck::cast_slice(&values))));
        }
        let mut bytes = AlignedBytes::zeroed(self.dtype.bytes_for(values.len()).unwrap_or(0));
        codec::encode(self.dtype, &values, bytes.bytes_mut()).map_err(|e| refuse(e.to_string()))?;
        Ok(Arc::new(bytes))
    }
}
