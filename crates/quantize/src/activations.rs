//! Activations of all calibration tokens between two blocks: in memory, or on disk where they would take too much of it.

use crate::Error;
use std::borrow::Cow;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Rows of numbers, appended once, read in any order.
pub(crate) struct Activations {
    width: usize,
    rows: usize,
    store: Store,
}

enum Store {
    Memory(Vec<f32>),
    Disk(Spilled),
}

/// A file that goes with its owner.
struct Spilled {
    path: PathBuf,
    file: File,
}

impl Drop for Spilled {
    fn drop(&mut self) {
        // Best effort: a run that starts anew clears its folder.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Activations {
    /// None yet, of `width` numbers a row; on disk if there is a `folder`.
    pub fn new(width: usize, folder: Option<&Path>) -> Result<Activations, Error> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let store = match folder {
            None => Store::Memory(Vec::new()),
            Some(folder) => {
                let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
                let path = folder.join(format!("activations-{}-{unique}.tmp", std::process::id()));
                let file = File::options()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .open(&path)
                    .map_err(|e| io("cannot create", &path, e))?;
                Store::Disk(Spilled { path, file })
            }
        };
        Ok(Activations { width, rows: 0, store })
    }

    /// Adds whole rows at the end.
    pub fn push(&mut self, values: &[f32]) -> Result<(), Error> {
        debug_assert!(values.len().is_multiple_of(self.width));
        match &mut self.store {
            Store::Memory(all) => all.extend_from_slice(values),
            Store::Disk(Spilled { path, file }) => file
                .seek(SeekFrom::End(0))
                .and_then(|_| file.write_all(bytemuck::cast_slice(values)))
                .map_err(|e| io("cannot write", path, e))?,
        }
        self.rows += values.len() / self.width;
        Ok(())
    }

    /// The rows `range`.
    pub fn get(&self, range: Range<usize>) -> Result<Cow<'_, [f32]>, Error> {
        let numbers = range.start * self.width..range.end * self.width;
        match &self.store {
            Store::Memory(all) => Ok(Cow::Borrowed(&all[numbers])),
            Store::Disk(Spilled { path, file }) => {
                let mut out = vec![0f32; numbers.len()];
                let mut file = file;
                file.seek(SeekFrom::Start(4 * numbers.start as u64))
                    .and_then(|_| file.read_exact(bytemuck::cast_slice_mut(&mut out)))
                    .map_err(|e| io("cannot read", path, e))?;
                Ok(Cow::Owned(out))
            }
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

fn io(what: &str, path: &Path, source: std::io::Error) -> Error {
    Error::Io { what: format!("{what} activations to {}", path.display()), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_holds_what_memory_holds() {
        let dir = tempfile::tempdir().unwrap();
        let rows = |n: usize| (0..3 * n).map(|i| i as f32 * 0.5).collect::<Vec<_>>();
        let mut both = [None, Some(dir.path())].map(|folder| Activations::new(3, folder).unwrap());
        for a in &mut both {
            a.push(&rows(5)).unwrap();
            a.push(&rows(2)).unwrap();
            assert_eq!(a.rows(), 7);
        }
        for range in [0..7, 4..6, 6..7, 2..2] {
            let [a, b] = [0, 1].map(|i| both[i].get(range.clone()).unwrap().into_owned());
            assert_eq!(a, b);
            assert_eq!(a.len(), 3 * range.len());
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        drop(both);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing stays");
    }
}
