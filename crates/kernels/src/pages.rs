//! Large memory in large pages.
//!
//! Weights are read from memory once a token, and each page of 4 KiB costs a walk through the page tables and stops the
//! prefetcher at its end: on the machine of `benches/weight.rs` 92 MB are read at 26 GB/s from small pages and at 40 GB/s
//! from pages of 2 MiB, of which the last-level cache also keeps more. So weights share a few regions that ask the
//! system for large pages; where it has none they are ordinary memory.

use crate::mem::AlignedBytes;
use memmap2::MmapMut;
use std::sync::Arc;

/// A large page of x86-64 and aarch64 (with small pages of 4 KiB).
const LARGE: usize = 2 << 20;

/// Bytes of a region that several pieces share: address space, of which only what is touched takes memory.
const SHARED: usize = 64 << 20;

/// A zeroed mapping whose useful part begins at a large page.
pub(crate) struct Region {
    map: MmapMut,
    /// First byte of the first large page.
    start: usize,
}

impl Region {
    /// At least `bytes` zero bytes; `None` if the system does not give them.
    fn new(bytes: usize) -> Option<Region> {
        let map = MmapMut::map_anon(bytes.checked_add(LARGE)?).ok()?;
        let start = map.as_ptr().align_offset(LARGE);
        // Only what is filled to its end: a large page costs all of itself as soon as one byte is touched. If it fails,
        // ordinary pages serve, too.
        #[cfg(target_os = "linux")]
        let _ = map.advise_range(memmap2::Advice::HugePage, start, bytes / LARGE * LARGE);
        Some(Region { map, start })
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
            self.current = Region::new(SHARED).map(|r| (Arc::new(r), 0));
        }
        let Some((region, used)) = &mut self.current else { return AlignedBytes::zeroed_small(len) };
        let piece = Piece { ptr: address(region, *used), region: region.clone() };
        *used += size;
        AlignedBytes::from_piece(piece, len)
    }
}

/// `len` zero bytes in a region of their own.
pub(crate) fn alone(len: usize) -> Option<AlignedBytes> {
    let region = Arc::new(Region::new(len)?);
    Some(AlignedBytes::from_piece(Piece { ptr: address(&region, 0), region }, len))
}

fn address(region: &Region, offset: usize) -> *mut u8 {
    region.map.as_ptr().wrapping_add(region.start + offset).cast_mut()
}

/// Some bytes of a region, which no other piece has.
pub(crate) struct Piece {
    pub ptr: *mut u8,
    /// Keeps the mapping; its own slices are never taken, so writing through `ptr` aliases nothing.
    #[allow(dead_code)] // held, not read
    region: Arc<Region>,
}

// SAFETY: a piece owns its bytes alone, and the mapping may be dropped on any thread.
unsafe impl Send for Piece {}
// SAFETY: a shared piece only lends shared slices.
unsafe impl Sync for Piece {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zero_aligned_and_apart() {
        let mut pages = Pages::default();
        let mut pieces: Vec<AlignedBytes> =
            [1, 64, 100, 0, 5 << 20, 60 << 20, 3].into_iter().map(|n| pages.zeroed(n)).collect();
        drop(pages);
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
}
