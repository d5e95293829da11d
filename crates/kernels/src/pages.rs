//! Large memory in large pages.
//!
//! Weights are read from memory once a token, and each page of 4 KiB costs a walk through the page tables and stops the
//! prefetcher at its end: on the machine of `benches/weight.rs` 92 MB are read at 26 GB/s from small pages and at 40 GB/s
//! from pages of 2 MiB, of which the last-level cache also keeps more. So weights share a few regions that ask the
//! system for large pages; where it has none they are ordinary memory. A cache, of which most may never be used, asks for
//! small ones instead: it takes memory page by page as it fills. An optimiser's states, which a step passes through once, may
//! lie in a file ([`FilePages`]): where memory is short, the system writes their pages out and takes the memory back.

use crate::mem::AlignedBytes;
use memmap2::MmapMut;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;

/// A large page of x86-64 and aarch64 (with small pages of 4 KiB).
const LARGE: usize = 2 << 20;

/// Bytes of a region that several pieces share: address space, of which only what is touched takes memory.
const SHARED: usize = 64 << 20;

/// A zeroed mapping.
struct Region {
    map: MmapMut,
    /// First useful byte.
    start: usize,
}

impl Region {
    /// At least `bytes` zero bytes from a large page on; `None` if the system does not give them.
    fn large(bytes: usize) -> Option<Region> {
        let map = MmapMut::map_anon(bytes.checked_add(LARGE)?).ok()?;
        let start = map.as_ptr().align_offset(LARGE);
        // Only what is filled to its end: a large page costs all of itself as soon as one byte is touched. If it fails,
        // ordinary pages serve, too.
        #[cfg(target_os = "linux")]
        let _ = map.advise_range(memmap2::Advice::HugePage, start, bytes / LARGE * LARGE);
        Some(Region { map, start })
    }

    /// `bytes` zero bytes in small pages.
    fn small(bytes: usize) -> Option<Region> {
        let map = MmapMut::map_anon(bytes).ok()?;
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::NoHugePage); // at worst more is taken than is used
        Some(Region { map, start: 0 })
    }

    /// All of it as one piece.
    fn whole(self) -> Piece {
        Piece { region: Arc::new(self), offset: 0 }
    }
}

/// Hands out pieces of shared regions.
#[derive(Default)]
pub struct Pages {
    current: Option<(Arc<Region>, usize)>,
}

impl Clone for Pages {
    /// Regions of its own: pieces have one owner.
    fn clone(&self) -> Pages {
        Pages::default()
    }
}

impl Pages {
    /// `len` zero bytes, in large pages if the system has them. They live on when `self` is dropped; a region goes back
    /// to the system with the last of its pieces.
    pub fn zeroed(&mut self, len: usize) -> AlignedBytes {
        let size = len.next_multiple_of(64);
        if size > SHARED / 2 {
            return alone(len).unwrap_or_else(|| AlignedBytes::zeroed_small(len));
        }
        let fits = |at: &(Arc<Region>, usize)| at.1 + size <= SHARED;
        if !self.current.as_ref().is_some_and(fits) {
            self.current = Region::large(SHARED).map(|r| (Arc::new(r), 0));
        }
        let Some((region, used)) = &mut self.current else { return AlignedBytes::zeroed_small(len) };
        let piece = Piece { region: region.clone(), offset: *used };
        *used += size;
        AlignedBytes::from_piece(piece, len)
    }
}

/// `len` zero bytes in a region of their own, of large pages.
pub(crate) fn alone(len: usize) -> Option<AlignedBytes> {
    Some(AlignedBytes::from_piece(Region::large(len)?.whole(), len))
}

/// `len` zero bytes in a region of their own, of small pages.
pub(crate) fn sparse(len: usize) -> Option<AlignedBytes> {
    Some(AlignedBytes::from_piece(Region::small(len)?.whole(), len))
}

/// Gives back to the system what the allocator holds of freed memory: behind work that took much of it for a short time,
/// such as compiling a large graph. Does nothing where the allocator is not glibc's.
pub fn give_back_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu", not(miri)))]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> std::ffi::c_int;
        }
        // SAFETY: glibc's, with its signature; it touches no memory that is in use, and may be called by any thread.
        unsafe { malloc_trim(0) };
    }
}

/// Memory in a file without a name, which goes with the last of its pieces, however the process ends.
pub struct FilePages {
    region: Arc<Region>,
    used: usize,
}

impl FilePages {
    /// `bytes` zero bytes in a file in `folder`, all of them allocated there: a disk that is full is found here, not when the
    /// system wants to write.
    ///
    /// # Errors
    /// If the disk has no room, or there is no such folder.
    pub fn new(folder: &Path, bytes: usize) -> io::Result<FilePages> {
        let mut file = tempfile::tempfile_in(folder)?;
        allocate(&mut file, bytes.max(1) as u64)?;
        // SAFETY: nobody else can open the file, which has no name, so that nobody changes or cuts it.
        let map = unsafe { MmapMut::map_mut(&file)? };
        Ok(FilePages { region: Arc::new(Region { map, start: 0 }), used: 0 })
    }

    /// Bytes that were handed out.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Bytes of the file that `len` bytes take.
    pub const fn bytes_for(len: usize) -> usize {
        len.next_multiple_of(64)
    }

    /// The next `len` bytes, which are zero; `None` if as many are not left.
    pub fn zeroed(&mut self, len: usize) -> Option<AlignedBytes> {
        let offset = self.used;
        let end = offset.checked_add(FilePages::bytes_for(len))?;
        if end > self.region.map.len() {
            return None;
        }
        self.used = end;
        Some(AlignedBytes::from_piece(Piece { region: self.region.clone(), offset }, len))
    }
}

/// Makes `file` as long as this, in blocks of the disk that are its own.
fn allocate(file: &mut File, bytes: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    match rustix::fs::fallocate(&*file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
        Err(rustix::io::Errno::OPNOTSUPP) => {} // not every file system can: then zeros are written
        done => return Ok(done?),
    }
    io::copy(&mut io::repeat(0).take(bytes), file)?;
    file.flush()
}

/// Some bytes of a region, which no other piece has.
pub(crate) struct Piece {
    /// Its own slices are never taken, so writing through [`Piece::ptr`] aliases nothing.
    region: Arc<Region>,
    offset: usize,
}

impl Piece {
    /// The first byte.
    pub fn ptr(&self) -> *mut u8 {
        self.region.map.as_ptr().wrapping_add(self.region.start + self.offset).cast_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zero_aligned_and_apart() {
        let mut pages = Pages::default();
        let mut pieces: Vec<AlignedBytes> =
            [1, 64, 100, 0, 5 << 20, 60 << 20, 3].into_iter().map(|n| pages.zeroed(n)).collect();
        drop(pages);
        pieces.extend([1, 5000].map(|n| sparse(n).unwrap()));
        let mut file = FilePages::new(&std::env::temp_dir(), 64 + 5056 + 64).unwrap();
        pieces.extend([1, 5000, 64].map(|n| file.zeroed(n).unwrap()));
        assert!(file.zeroed(1).is_none() && file.used() == 5184);
        drop(file);
        for (i, p) in pieces.iter_mut().enumerate() {
            assert!(p.bytes().iter().all(|&b| b == 0), "piece {i} is not zero");
            assert!(p.bytes().as_ptr().addr().is_multiple_of(64));
            p.bytes_mut().fill(i as u8 + 1);
        }
        for (i, p) in pieces.iter().enumerate() {
            assert!(p.bytes().iter().all(|&b| b == i as u8 + 1), "piece {i} overlaps another");
            assert_eq!(p.clone().bytes(), p.bytes());
        }
    }

    /// The disk has given what the file needs, before anything is written; what it has not is an error at once.
    #[test]
    fn a_file_is_allocated_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = tempfile::tempfile_in(&folder).unwrap();
        allocate(&mut file, 1 << 20).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let meta = file.metadata().unwrap();
            assert!(meta.len() == 1 << 20 && meta.blocks() * 512 >= 1 << 20, "{} blocks", meta.blocks());
        }
        #[cfg(target_os = "linux")] // elsewhere zeros would be written until the disk is full
        assert!(FilePages::new(folder.path(), 1 << 60).is_err());
        assert!(FilePages::new(&folder.path().join("none"), 1).is_err());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
    }
}
