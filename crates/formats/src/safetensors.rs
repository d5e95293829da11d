//! safetensors, Hugging Face's file format: one file, or a folder of shards with an index.
//!
//! A file is: the header's length (u64), the header (JSON: name to type, shape and byte range, and `__metadata__`, a
//! map of strings), the tensors' bytes without gaps. Source: the format's specification in its README.
//!
//! The header is parsed here rather than by the `safetensors` crate, so that an error names the tensor and what to do,
//! and a name that appears twice is an error.

mod parse;
mod write;

use std::collections::BTreeSet;
use std::path::Path;

pub use write::Writer;

use crate::error::Place;
use crate::mmap::Map;
use crate::tensors::{TensorInfo, TensorRef, Tensors};
use crate::{Error, gptq};

/// The word before each message.
const FORMAT: &str = "safetensors";
/// The index of a folder of shards.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The only file of a folder without shards.
pub(crate) const SINGLE: &str = "model.safetensors";

/// An open safetensors model, mapped.
pub struct File {
    tensors: Tensors,
    metadata: Vec<(String, String)>,
}

impl File {
    /// Opens a file, an index (`*.index.json`) with its shards, or a folder that holds `model.safetensors.index.json`
    /// or `model.safetensors`.
    ///
    /// Reads headers only; tensors are read when they are touched.
    ///
    /// # Errors
    /// If a file cannot be read, is no safetensors file, contradicts itself or the index, or announces more than it
    /// holds.
    pub fn open(path: impl AsRef<Path>) -> Result<File, Error> {
        let path = path.as_ref();
        if path.is_dir() {
            let index = path.join(INDEX);
            if index.exists() {
                return File::open_index(&index);
            }
            let single = path.join(SINGLE);
            if !single.exists() {
                let problem = format!(
                    "it holds neither {SINGLE} nor {INDEX}; name the folder of a model, or the file itself"
                );
                return Err(Place { format: FORMAT, path }.malformed("the folder", problem));
            }
            return File::open(single);
        }
        if path.file_name().is_some_and(|n| n.to_string_lossy().ends_with(".index.json")) {
            return File::open_index(path);
        }
        let mut file = File { tensors: Tensors::new(FORMAT, path), metadata: Vec::new() };
        file.add(path)?;
        Ok(file)
    }

    /// Opens all shards that the index at `path` names.
    fn open_index(path: &Path) -> Result<File, Error> {
        let place = Place { format: FORMAT, path };
        let map = Map::open(path)?;
        let weight_map = parse::index(map.bytes(), place)?;
        let mut file = File { tensors: Tensors::new(FORMAT, path), metadata: Vec::new() };
        let shards: BTreeSet<&str> = weight_map.iter().map(|(_, shard)| shard.as_str()).collect();
        let mut ends = Vec::with_capacity(shards.len());
        for &shard in &shards {
            let at = path.with_file_name(shard);
            if !at.exists() {
                let problem = format!(
                    "it names the shard {shard}, which is not beside it; fetch all {} shards",
                    shards.len()
                );
                return Err(place.malformed("the index", problem));
            }
            file.add(&at)?;
            ends.push(shard);
        }
        for (name, shard) in &weight_map {
            let wanted = ends.iter().position(|s| s == shard).expect("made from the same list");
            let found = file.tensors.get(name).map(|t| t.info.shard);
            let unsupported = file.tensors.unsupported().iter().any(|(n, _)| n == name);
            if found != Some(wanted) && !unsupported {
                let problem = format!(
                    "the index says that it is in {shard}, but it is not; fetch index and shards of one model anew"
                );
                return Err(place.malformed(format!("tensor {name}"), problem));
            }
        }
        Ok(file)
    }

    fn add(&mut self, path: &Path) -> Result<(), Error> {
        let map = Map::open(path)?;
        let header = parse::header(map.bytes(), Place { format: FORMAT, path })?;
        self.metadata.extend(header.metadata);
        self.tensors.add(path, map, header.tensors, header.unsupported)
    }

    /// The strings under `__metadata__`, in the file's order (all shards' one after the other).
    pub fn metadata(&self) -> &[(String, String)] {
        &self.metadata
    }

    /// All tensors of a type with a [`sparsam_dtype::DType`], in the order of their bytes.
    pub fn tensors(&self) -> &[TensorInfo] {
        self.set().infos()
    }

    /// Name and type of the tensors that have another type (`BOOL`, `F8_E4M3`, ..): [`File::require`] refuses them.
    pub fn unsupported(&self) -> &[(String, String)] {
        self.set().unsupported()
    }

    /// The tensor of this name, if there is one.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        self.set().get(name)
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// If there is none, or its type is not supported.
    pub fn require(&self, name: &str) -> Result<TensorRef<'_>, Error> {
        self.set().require(name)
    }

    /// Gives back the memory of a tensor's mapped pages; its bytes stay readable, from the file again.
    pub fn release(&self, name: &str) {
        self.set().release(name);
    }

    pub(crate) fn set(&self) -> &Tensors {
        &self.tensors
    }

    /// Unpacks every layer in GPTQ's layout (`NAME.qweight` and its companions) into `NAME.weight`, (out, in).
    pub(crate) fn unpack_gptq(&mut self, path: &Path, settings: &gptq::Settings) -> Result<(), Error> {
        let place = Place { format: FORMAT, path };
        let layers: Vec<String> = self
            .tensors()
            .iter()
            .filter_map(|t| t.name.strip_suffix(".qweight").map(str::to_string))
            .collect();
        for layer in layers {
            let parts = ["qweight", "qzeros", "scales", "g_idx"].map(|p| format!("{layer}.{p}"));
            let problem = |p: String| {
                place.malformed(
                    format!("tensor {}", parts[0]),
                    format!("{p}; the file is damaged or of another layout"),
                )
            };
            let get = |i: usize| self.require(&parts[i]).map(|t| t.bytes);
            let qweight = self.require(&parts[0])?;
            let rows = qweight.info.shape.first().copied().unwrap_or(0);
            let n_in = rows.saturating_mul(32) / settings.bits as usize;
            let g_idx = self.tensor(&parts[3]).map(|t| t.bytes);
            let unpacked =
                gptq::unpack(settings, n_in, qweight.bytes, get(1)?, get(2)?, g_idx).map_err(problem)?;
            let (dtype, bytes) = unpacked.stored(settings);
            let shape = vec![unpacked.codes.len() / n_in, n_in];
            self.tensors.replace(&parts, format!("{layer}.weight"), shape, dtype, bytes);
        }
        Ok(())
    }
}
