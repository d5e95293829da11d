//! Files that appear whole or not at all.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Error;

/// A file that is written under a temporary name in the same folder and takes its own name in [`AtomicFile::commit`],
/// after its bytes have reached the disk.
///
/// A kill, a full disk or an error at any moment leaves what was at `path` before as it was. Dropped without a commit,
/// the temporary file is deleted.
///
/// ```
/// use std::io::Write;
/// let path = std::env::temp_dir().join(format!("sparsam-atomic-{}", std::process::id()));
/// let mut file = sparsam_formats::AtomicFile::create(&path).unwrap();
/// file.write_all(b"all of it").unwrap();
/// assert!(!path.exists());
/// file.commit().unwrap();
/// assert_eq!(std::fs::read(&path).unwrap(), b"all of it");
/// # std::fs::remove_file(&path).unwrap();
/// ```
pub struct AtomicFile {
    path: PathBuf,
    temporary: PathBuf,
    /// `None` once committed.
    file: Option<BufWriter<File>>,
}

impl AtomicFile {
    /// Starts a file that shall be at `path`; its folder must exist.
    ///
    /// # Errors
    /// If `path` names no file (but a folder, or nothing), or the temporary file cannot be created.
    pub fn create(path: impl AsRef<Path>) -> Result<AtomicFile, Error> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let path = path.as_ref();
        let name = match path.file_name() {
            Some(name) if !path.is_dir() => name.to_string_lossy(),
            _ => return Err(Error::write(path, "it is a folder; name a file in it")),
        };
        let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(".{name}.{}-{unique}.tmp", std::process::id()));
        // `create_new`: never through a link that somebody put there.
        let file = File::options()
            .write(true)
            .create_new(true)
            .open(&temporary)
            .map_err(Error::io("create", &temporary))?;
        let file = Some(BufWriter::with_capacity(1 << 20, file));
        Ok(AtomicFile { path: path.to_path_buf(), temporary, file })
    }

    /// Where the file will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes the bytes to the disk and gives the file its name, replacing what was there.
    ///
    /// # Errors
    /// If the disk is full or fails; nothing is replaced then.
    pub fn commit(mut self) -> Result<(), Error> {
        let file = self.file.take().expect("committed once: it consumes the file");
        let result = self.finish(file);
        if result.is_err() {
            self.remove_temporary();
        }
        result
    }

    fn finish(&self, file: BufWriter<File>) -> Result<(), Error> {
        let file = file.into_inner().map_err(|e| Error::io("write", &self.path)(e.into_error()))?;
        file.sync_all().map_err(Error::io("write", &self.path))?;
        drop(file);
        std::fs::rename(&self.temporary, &self.path).map_err(Error::io("write", &self.path))?;
        // The new name is an entry of the folder; without this it may be lost with the power.
        #[cfg(unix)]
        {
            let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty());
            let folder = folder.unwrap_or(Path::new("."));
            File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io("write", folder))?;
        }
        Ok(())
    }

    /// Best effort: where it fails, an error is on its way already, or nobody is left to hear it.
    fn remove_temporary(&self) {
        let _ = std::fs::remove_file(&self.temporary);
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.as_mut().expect("open until committed").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.as_mut().expect("open until committed").flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            // Not flushed: nobody wants these bytes any more.
            drop(file.into_parts());
            self.remove_temporary();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_file_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        std::fs::write(&path, b"old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"half of the new").unwrap();
        drop(file);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "the temporary file is gone");
    }

    #[test]
    fn a_folder_or_a_missing_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let said = AtomicFile::create(dir.path()).err().unwrap().to_string();
        assert!(said.contains("it is a folder; name a file in it"), "{said}");
        let said = AtomicFile::create(dir.path().join("no/file")).err().unwrap().to_string();
        assert!(said.contains("cannot create") && said.contains("no"), "{said}");
    }
}
