//! A model on disk, whichever format it has.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::Place;
use crate::tensors::{TensorInfo, TensorRef, Tensors};
use crate::{Error, gguf, gptq, safetensors};

/// The two formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// llama.cpp's: metadata and vocabulary are in the file; llama's names and row orders.
    Gguf,
    /// Hugging Face's: `config.json` and `tokenizer.json` lie beside; its names and orders.
    Safetensors,
}

/// An open model: tensors by name, and what describes them.
///
/// ```no_run
/// use sparsam_formats::Source;
/// let source = Source::open("SmolLM2-135M-Instruct.Q4_1.gguf")?;
/// let metadata = source.gguf_metadata().expect("it is a GGUF file");
/// println!("{}, {} tensors", metadata.str("general.architecture")?, source.tensors().len());
/// let head = source.require("token_embd.weight")?;
/// println!("{:?} {} {} bytes", head.info.shape, head.info.dtype, head.bytes.len());
/// # Ok::<(), sparsam_formats::Error>(())
/// ```
pub struct Source {
    path: PathBuf,
    inner: Inner,
}

enum Inner {
    Gguf(gguf::File),
    Safetensors {
        file: safetensors::File,
        /// Where `config.json` and the tokenizer's files are.
        folder: PathBuf,
        config: Option<Value>,
    },
}

/// `config.json` of a real model has a few kilobytes.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

impl Source {
    /// Opens a GGUF file (or any part of a split one), a safetensors file, an index of shards, or a folder that holds
    /// one of these.
    ///
    /// # Errors
    /// As [`gguf::File::open`] and [`safetensors::File::open`]; if `path` is neither; if a folder holds several GGUF
    /// models; if `config.json` is there but no JSON object.
    pub fn open(path: impl AsRef<Path>) -> Result<Source, Error> {
        let path = path.as_ref();
        let meta = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if meta.is_dir() {
            let holds = |name: &str| path.join(name).exists();
            if holds(safetensors::INDEX) || holds(safetensors::SINGLE) {
                return Source::open_safetensors(path, path);
            }
            let found = single_model(path)?;
            return Source::open(found);
        }
        if is_gguf(path)? {
            return Ok(Source { path: path.to_path_buf(), inner: Inner::Gguf(gguf::File::open(path)?) });
        }
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Source::open_safetensors(path, folder)
    }

    fn open_safetensors(path: &Path, folder: &Path) -> Result<Source, Error> {
        let mut file = safetensors::File::open(path)?;
        let config = read_config(&folder.join("config.json"))?;
        if let Some((at, settings)) = gptq_settings(folder, config.as_ref())? {
            file.unpack_gptq(&at, &settings)?;
        }
        let inner = Inner::Safetensors { file, folder: folder.to_path_buf(), config };
        Ok(Source { path: path.to_path_buf(), inner })
    }

    fn set(&self) -> &Tensors {
        match &self.inner {
            Inner::Gguf(file) => file.set(),
            Inner::Safetensors { file, .. } => file.set(),
        }
    }

    /// Which format it is.
    pub fn kind(&self) -> Kind {
        match self.inner {
            Inner::Gguf(_) => Kind::Gguf,
            Inner::Safetensors { .. } => Kind::Safetensors,
        }
    }

    /// As it was opened: the file, or the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors, in the order of the file (of the files, in the order of their names).
    pub fn tensors(&self) -> &[TensorInfo] {
        self.set().infos()
    }

    /// Name and type of the tensors that have no [`sparsam_dtype::DType`]: masks (`BOOL`) and the like.
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

    /// Gives back the memory of a tensor's mapped pages, for instance after it has been packed into another layout.
    /// Its bytes stay readable: the system reads them from the file again. Unknown names are ignored.
    pub fn release(&self, name: &str) {
        self.set().release(name);
    }

    /// The metadata of a GGUF model.
    pub fn gguf_metadata(&self) -> Option<&gguf::Metadata> {
        match &self.inner {
            Inner::Gguf(file) => Some(file.metadata()),
            Inner::Safetensors { .. } => None,
        }
    }

    /// `config.json` of a safetensors model, an object; `None` if there is no such file.
    pub fn config_json(&self) -> Option<&Value> {
        match &self.inner {
            Inner::Gguf(_) => None,
            Inner::Safetensors { config, .. } => config.as_ref(),
        }
    }

    /// The file `name` (`tokenizer.json`, `tokenizer_config.json`, `generation_config.json`, ..) beside a safetensors
    /// model; `None` for GGUF models, which carry all in one file, and if there is no such file.
    ///
    /// # Errors
    /// If the file is there but cannot be read.
    pub fn sidecar(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let Inner::Safetensors { folder, .. } = &self.inner else { return Ok(None) };
        let path = folder.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("read", &path)(e)),
        }
    }
}

/// Whether the file is GGUF, by its name or its first bytes; an error if it is neither that nor safetensors.
fn is_gguf(path: &Path) -> Result<bool, Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    if name.ends_with(".gguf") {
        return Ok(true);
    }
    if name.ends_with(".safetensors") || name.ends_with(".index.json") {
        return Ok(false);
    }
    let map = crate::mmap::Map::open(path)?;
    let bytes = map.bytes();
    if bytes.starts_with(&gguf::MAGIC) {
        return Ok(true);
    }
    if bytes.get(8) == Some(&b'{') {
        return Ok(false);
    }
    let what = "the file";
    let problem = match bytes {
        [b'P', b'K', ..] | [0x80, 2..=5, ..] => {
            "it looks like a pickle (PyTorch), which can run code when loaded and is never read; convert it to safetensors"
        }
        _ => {
            "it is neither GGUF nor safetensors; name a .gguf file, a .safetensors file or a folder with one"
        }
    };
    Err(Place { format: "model", path }.malformed(what, problem))
}

/// The only model in a folder without `model.safetensors`: one GGUF (or the first part of one split), or one
/// safetensors file of another name.
fn single_model(folder: &Path) -> Result<PathBuf, Error> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let later_part = name.rsplit_once("-of-").is_some_and(|(front, _)| {
            let digits = front.rsplit('-').next().unwrap_or_default();
            digits.len() == 5 && digits != "00001" && digits.bytes().all(|b| b.is_ascii_digit())
        });
        let hidden = name.starts_with('.');
        if (name.ends_with(".gguf") || name.ends_with(".safetensors")) && !later_part && !hidden {
            found.push((name, path));
        }
    }
    found.sort();
    let place = Place { format: "model", path: folder };
    match found.len() {
        1 => Ok(found.remove(0).1),
        0 => Err(place
            .malformed("the folder", "it holds no .gguf or .safetensors file; name the folder of a model")),
        n => {
            let names: Vec<String> = found.into_iter().take(4).map(|(name, _)| name).collect();
            let problem = format!("it holds {n} models ({}); name one of the files", names.join(", "));
            Err(place.malformed("the folder", problem))
        }
    }
}

/// What `quantize_config.json`, or `quantization_config` in `config.json`, says of layers in GPTQ's layout, and the file
/// that says it; `None` if neither speaks of GPTQ.
fn gptq_settings(folder: &Path, config: Option<&Value>) -> Result<Option<(PathBuf, gptq::Settings)>, Error> {
    let own = folder.join("quantize_config.json");
    let (at, said) = match read_config(&own)? {
        Some(value) => (own, value),
        None => match config.and_then(|c| c.get("quantization_config")) {
            Some(value) => (folder.join("config.json"), value.clone()),
            None => return Ok(None),
        },
    };
    let word = |key: &str| said.get(key).and_then(Value::as_str);
    if word("quant_method").is_some_and(|m| m != "gptq") {
        return Ok(None);
    }
    let place = Place { format: "config", path: &at };
    let refuse = |key: &str, problem: String| place.malformed(key, problem);
    let bits = said.get("bits").and_then(Value::as_u64).unwrap_or(0);
    if ![2, 3, 4, 8].contains(&bits) {
        return Err(refuse("bits", format!("it is {bits}, but GPTQ's layout has 2, 3, 4 or 8")));
    }
    let group = match said.get("group_size").and_then(Value::as_i64) {
        Some(-1) => None,
        Some(g) if g > 0 => Some(g as usize),
        other => {
            return Err(refuse("group_size", format!("it is {other:?}; -1 or a number from 1 is expected")));
        }
    };
    let whole_zeros = match word("checkpoint_format").unwrap_or("gptq") {
        "gptq" => false,
        "gptq_v2" => true,
        other => {
            return Err(refuse(
                "checkpoint_format",
                format!("it is {other}, where gptq or gptq_v2 is expected"),
            ));
        }
    };
    Ok(Some((at, gptq::Settings { bits: bits as u32, group, whole_zeros })))
}

/// `config.json`, if it is there.
fn read_config(path: &Path) -> Result<Option<Value>, Error> {
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("read", path)(e)),
    };
    let place = Place { format: "config", path };
    if meta.len() > MAX_CONFIG_BYTES {
        let problem =
            format!("it has {} bytes, far more than a model's configuration; fetch it again", meta.len());
        return Err(place.malformed("the file", problem));
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|e| place.malformed("the file", format!("it is not JSON ({e}); fetch it again")))?;
    if !value.is_object() {
        return Err(place.malformed("the file", "it is JSON but not an object; fetch it again"));
    }
    Ok(Some(value))
}
