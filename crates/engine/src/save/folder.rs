//! A folder in Hugging Face's layout that appears whole: written beside its place under another name, then renamed.

use crate::Error;
use serde_json::{Map, Value, json};
use sparsam_formats::{AtomicFile, TensorSpec, safetensors};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A folder of safetensors shards and the files beside them that is being written: nothing is at its path before
/// [`Folder::finish`].
pub struct Folder {
    path: PathBuf,
    temporary: Temporary,
    shards: Vec<Shard>,
    /// The shard that is being written.
    current: usize,
    writer: Option<safetensors::Writer>,
    sidecars: Vec<(&'static str, Vec<u8>)>,
}

struct Shard {
    file: String,
    tensors: Vec<TensorSpec>,
}

/// A folder that is deleted unless it is renamed first.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Best effort: where it fails, an error is on its way already, or nobody is left to hear it. After a rename
        // there is nothing of this name.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn io<T>(doing: &str, path: &Path, result: std::io::Result<T>) -> Result<T, Error> {
    result.map_err(|e| Error::Save { path: path.to_path_buf(), what: format!("cannot {doing}: {e}") })
}

impl Folder {
    /// Starts it: shards of at most `shard_bytes`, tensors in the order of `specs`, and the files `sidecars` by name.
    ///
    /// # Errors
    /// If a folder at `path` is not empty, a tensor's type is none of safetensors, or the disk is full.
    pub fn create(
        path: &Path,
        specs: Vec<TensorSpec>,
        shard_bytes: u64,
        sidecars: Vec<(&'static str, Vec<u8>)>,
    ) -> Result<Folder, Error> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let fail = |what: &str| Err(Error::Save { path: path.to_path_buf(), what: what.into() });
        let Some(name) = path.file_name() else { return fail("this names no folder; give it a name") };
        if path.exists() {
            if !path.is_dir() {
                return fail("there is a file of this name; name a new folder");
            }
            if io("read it", path, std::fs::read_dir(path))?.next().is_some() {
                return fail("the folder is not empty; name a new one");
            }
        }
        let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
        let hidden = format!(".{}.{}-{unique}.tmp", name.to_string_lossy(), std::process::id());
        let temporary = path.with_file_name(hidden);
        io("create it", path, std::fs::create_dir(&temporary))?;
        let temporary = Temporary(temporary);
        let shards = shards(specs, shard_bytes);
        let mut folder =
            Folder { path: path.to_path_buf(), temporary, shards, current: 0, writer: None, sidecars };
        folder.open()?;
        Ok(folder)
    }

    /// Starts the current shard.
    fn open(&mut self) -> Result<(), Error> {
        let shard = &self.shards[self.current];
        let about = [("format".to_string(), "pt".to_string())]; // transformers wants to see it
        let at = self.temporary.0.join(&shard.file);
        self.writer = Some(safetensors::Writer::create(at, &about, &shard.tensors)?);
        Ok(())
    }

    fn close(&mut self) -> Result<(), Error> {
        self.writer.take().map_or(Ok(()), safetensors::Writer::finish).map_err(Error::from)
    }

    /// Writes the next tensor, whole.
    ///
    /// # Errors
    /// If it is another's turn, the length is not the announced one, or the disk is full.
    ///
    /// # Panics
    /// If no tensor of that name was announced.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        while !self.shards[self.current].tensors.iter().any(|t| t.name == name) {
            self.close()?;
            self.current += 1; // the saver keeps the planned order, so the name is in a later shard
            self.open()?;
        }
        let writer = self.writer.as_mut().expect("opened with each shard");
        Ok(writer.append(name, bytes)?)
    }

    /// Makes the folder appear at its path.
    ///
    /// # Errors
    /// If a tensor is missing, or the disk is full or fails.
    pub fn finish(mut self) -> Result<(), Error> {
        self.close()?;
        let mut files = std::mem::take(&mut self.sidecars);
        if self.shards.len() > 1 {
            files.push(("model.safetensors.index.json", self.index()));
        }
        for (name, bytes) in files {
            let mut file = AtomicFile::create(self.temporary.0.join(name))?;
            io("write it", &self.path, file.write_all(&bytes))?;
            file.commit()?;
        }
        // An empty folder gives way to the rename; a full one, filled in the meantime, does not.
        io("put it in its place", &self.path, std::fs::rename(&self.temporary.0, &self.path))?;
        #[cfg(unix)]
        {
            let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            io("write it", &self.path, std::fs::File::open(parent).and_then(|f| f.sync_all()))?;
        }
        Ok(())
    }

    /// Which tensor lies in which shard.
    fn index(&self) -> Vec<u8> {
        let total: usize = self.shards.iter().flat_map(|s| &s.tensors).map(bytes_of).sum();
        let mut map = Map::new();
        for shard in &self.shards {
            map.extend(shard.tensors.iter().map(|t| (t.name.clone(), json!(shard.file))));
        }
        let index = json!({ "metadata": { "total_size": total }, "weight_map": Value::Object(map) });
        format!("{index:#}\n").into_bytes()
    }
}

/// Types that safetensors cannot hold are refused by its writer, so no shape is too large here.
fn bytes_of(t: &TensorSpec) -> usize {
    t.dtype.bytes_for(t.shape.iter().product()).unwrap_or(0)
}

/// Tensors in files of at most `limit` bytes each (one that is larger stands alone), named as Hugging Face does.
fn shards(specs: Vec<TensorSpec>, limit: u64) -> Vec<Shard> {
    let mut groups: Vec<Vec<TensorSpec>> = vec![Vec::new()];
    let mut size = 0u64;
    for t in specs {
        let bytes = bytes_of(&t) as u64;
        if size + bytes > limit && size > 0 {
            groups.push(Vec::new());
            size = 0;
        }
        size += bytes;
        if let Some(group) = groups.last_mut() {
            group.push(t);
        }
    }
    let count = groups.len();
    let name = |i: usize| match count {
        1 => "model.safetensors".to_string(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    groups.into_iter().enumerate().map(|(i, tensors)| Shard { file: name(i), tensors }).collect()
}
