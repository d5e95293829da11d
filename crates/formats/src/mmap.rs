//! A file mapped into memory, read only. The only unsafe code of this crate.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use crate::Error;

/// The bytes of a file, mapped. Pages are read when they are touched.
///
/// The file must not be shortened while it is mapped: reading past its new end kills the process (SIGBUS). Files that
/// are replaced by a rename, as this crate does, stay intact for whoever has the old one mapped.
pub struct Map {
    /// `None` for an empty file, which cannot be mapped.
    map: Option<memmap2::Mmap>,
}

impl Map {
    /// Maps the regular file at `path`.
    ///
    /// # Errors
    /// If there is none, or it cannot be mapped.
    pub fn open(path: &Path) -> Result<Map, Error> {
        // Asked by name first: opening a pipe would wait for a writer.
        let meta = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if !meta.is_file() {
            return Err(Error::Io {
                doing: "read",
                path: path.to_path_buf(),
                source: std::io::Error::other("it is not a regular file; name a model file or folder"),
            });
        }
        let file = File::open(path).map_err(Error::io("open", path))?;
        if meta.len() == 0 {
            return Ok(Map { map: None });
        }
        // SAFETY: the map is read only and never handed out as more than `&[u8]` that borrows it. That nobody shortens
        // or rewrites the file meanwhile is the caller's part, stated at the type; every reader of large files leans
        // on it, and the writers of this crate keep to it (rename, never in place).
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io("map", path))?;
        Ok(Map { map: Some(map) })
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }

    /// Gives the memory of the pages wholly or partly in `range` back to the system. They are read again from the file
    /// (usually from its cache) when touched. Where the system has no such call, nothing happens.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Some(map) = &self.map
            && !range.is_empty()
            && range.end <= map.len()
        {
            // SAFETY: dropping pages loses writes of private or anonymous memory; this is a shared, read-only map of
            // a file, whose pages come back with the same bytes. The range was checked to lie within the map.
            let result = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
            };
            // Only advice: where it fails, memory stays taken and nothing else changes.
            drop(result);
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}
