//! The tensors of a model, whichever files they lie in.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use sparsam_dtype::DType;

use crate::Error;
use crate::error::Place;
use crate::mmap::Map;

/// What a file says about a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the file.
    pub name: String,
    /// Length of each axis, row-major, in Hugging Face's order (a linear layer is (out, in)); GGUF's dimensions are
    /// reversed. The last axis is a whole number of blocks.
    pub shape: Vec<usize>,
    /// Type of the elements.
    pub dtype: DType,
    /// Which of the model's files holds it.
    pub(crate) shard: usize,
    /// Where in that file.
    pub(crate) range: Range<usize>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes in the file.
    pub fn bytes_len(&self) -> usize {
        self.range.len()
    }
}

/// A tensor and its bytes, which lie in the map: little endian, of any alignment.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    /// Name, shape and type.
    pub info: &'a TensorInfo,
    /// The elements, row-major without gaps.
    pub bytes: &'a [u8],
}

/// A tensor that is to be written: the writers need all of them before the first byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name in the file.
    pub name: String,
    /// Row-major, in Hugging Face's order, as in [`TensorInfo::shape`].
    pub shape: Vec<usize>,
    /// Type of the elements.
    pub dtype: DType,
}

impl From<&TensorInfo> for TensorSpec {
    fn from(info: &TensorInfo) -> TensorSpec {
        TensorSpec { name: info.name.clone(), shape: info.shape.clone(), dtype: info.dtype }
    }
}

/// Where tensors' bytes are.
enum Bytes {
    Mapped(Map),
    /// Of one tensor that was unpacked from others.
    Owned(Vec<u8>),
}

impl Bytes {
    fn get(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map.bytes(),
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// All tensors of a model, and the maps that hold them.
pub(crate) struct Tensors {
    format: &'static str,
    path: PathBuf,
    maps: Vec<Bytes>,
    infos: Vec<TensorInfo>,
    /// Tensors of a type that this project cannot hold: name and type.
    unsupported: Vec<(String, String)>,
    index: HashMap<String, usize>,
}

impl Tensors {
    pub fn new(format: &'static str, path: &Path) -> Tensors {
        Tensors {
            format,
            path: path.to_path_buf(),
            maps: Vec::new(),
            infos: Vec::new(),
            unsupported: Vec::new(),
            index: HashMap::new(),
        }
    }

    /// Adds the tensors of one more file, whose ranges the caller has checked against the map.
    pub fn add(
        &mut self,
        path: &Path,
        map: Map,
        infos: Vec<TensorInfo>,
        unsupported: Vec<(String, String)>,
    ) -> Result<(), Error> {
        let place = Place { format: self.format, path };
        let shard = self.maps.len();
        self.maps.push(Bytes::Mapped(map));
        for mut info in infos {
            if self.index.insert(info.name.clone(), self.infos.len()).is_some() {
                let what = format!("tensor {}", info.name);
                return Err(place.malformed(
                    what,
                    "the name is already taken by another tensor of this model; the file is damaged or does not belong here",
                ));
            }
            info.shard = shard;
            self.infos.push(info);
        }
        self.unsupported.extend(unsupported);
        Ok(())
    }

    /// Puts a tensor with these bytes in the place of those named `parts`, of which the first must be there.
    pub fn replace(
        &mut self,
        parts: &[String],
        name: String,
        shape: Vec<usize>,
        dtype: DType,
        bytes: Vec<u8>,
    ) {
        let at = self.index[&parts[0]];
        let info = TensorInfo { name, shape, dtype, shard: self.maps.len(), range: 0..bytes.len() };
        self.maps.push(Bytes::Owned(bytes));
        self.infos[at] = info;
        let kept = self.infos[at].name.clone();
        self.infos.retain(|t| t.name == kept || !parts.contains(&t.name));
        self.index = self.infos.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
    }

    pub fn infos(&self) -> &[TensorInfo] {
        &self.infos
    }

    pub fn unsupported(&self) -> &[(String, String)] {
        &self.unsupported
    }

    pub fn get(&self, name: &str) -> Option<TensorRef<'_>> {
        let info = &self.infos[*self.index.get(name)?];
        Some(TensorRef { info, bytes: &self.maps[info.shard].get()[info.range.clone()] })
    }

    pub fn require(&self, name: &str) -> Result<TensorRef<'_>, Error> {
        if let Some(tensor) = self.get(name) {
            return Ok(tensor);
        }
        Err(match self.unsupported.iter().find(|(n, _)| n == name) {
            Some((_, type_name)) => Error::UnsupportedType {
                format: self.format,
                path: self.path.clone(),
                tensor: name.to_string(),
                type_name: type_name.clone(),
                supported: "F32, F16 or BF16",
            },
            None => {
                Error::NoTensor { path: self.path.clone(), name: name.to_string(), count: self.infos.len() }
            }
        })
    }

    pub fn release(&self, name: &str) {
        if let Some(&i) = self.index.get(name) {
            let info = &self.infos[i];
            if let Bytes::Mapped(map) = &self.maps[info.shard] {
                map.release(info.range.clone());
            }
        }
    }
}

/// The bytes of a tensor of `shape`, checked: no product overflows (zeros aside), rows are whole blocks.
pub(crate) fn checked_bytes(shape: &[usize], dtype: DType) -> Result<usize, String> {
    let too_large = || format!("the shape {shape:?} has more elements than this machine can count");
    let mut numel: usize = 1;
    for &n in shape.iter().filter(|&&n| n > 0) {
        numel = numel.checked_mul(n).ok_or_else(too_large)?;
    }
    let row = shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(dtype.block_len()) {
        return Err(format!(
            "rows of {row} elements are no whole number of {dtype} blocks of {}",
            dtype.block_len()
        ));
    }
    if shape.contains(&0) {
        return Ok(0);
    }
    dtype.bytes_for(numel).filter(|&b| isize::try_from(b).is_ok()).ok_or_else(too_large)
}

/// That no two tensors share bytes.
pub(crate) fn check_overlap(infos: &[TensorInfo], place: Place<'_>) -> Result<(), Error> {
    let mut by_start: Vec<&TensorInfo> = infos.iter().filter(|t| !t.range.is_empty()).collect();
    by_start.sort_by_key(|t| t.range.start);
    for pair in by_start.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        if a.range.end > b.range.start {
            return Err(place.malformed(
                format!("tensor {}", b.name),
                format!(
                    "it starts at byte {}, inside tensor {} (bytes {} to {}); the file is damaged, fetch or convert it anew",
                    b.range.start, a.name, a.range.start, a.range.end
                ),
            ));
        }
    }
    Ok(())
}
