//! Working memory of one kernel call, kept by each thread for the next one.

use crate::AlignedBytes;
use std::cell::RefCell;

thread_local! {
    /// Buffers that no call of this thread holds at the moment.
    static FREE: RefCell<Vec<AlignedBytes>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of at least the asked size, aligned to 64 bytes, with arbitrary (initialised) contents.
pub(crate) struct Scratch {
    buffer: AlignedBytes,
    /// Bytes asked for.
    len: usize,
}

impl Scratch {
    /// A buffer for `n` values of `T`: the smallest free one that is large enough, so that the large ones stay for who
    /// needs them; where none is, a new one in the place of the largest.
    pub fn of<T>(n: usize) -> Scratch {
        // Whole lines: a buffer is used again for other types.
        let bytes = (n * size_of::<T>()).next_multiple_of(64);
        let free = FREE.with_borrow_mut(|free| {
            let fits = (0..free.len()).filter(|&i| free[i].len() >= bytes).min_by_key(|&i| free[i].len());
            let largest = fits.or_else(|| (0..free.len()).max_by_key(|&i| free[i].len()));
            largest.map(|i| free.swap_remove(i))
        });
        match free {
            Some(buffer) if buffer.len() >= bytes => Scratch { buffer, len: bytes },
            _ => Scratch { buffer: AlignedBytes::zeroed(bytes), len: bytes },
        }
    }

    /// Its address; valid until the buffer is dropped.
    pub fn ptr<T>(&mut self) -> *mut T {
        self.buffer.bytes_mut().as_mut_ptr().cast()
    }

    /// All its bytes, at least the number asked for.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.buffer.bytes_mut()
    }

    /// Its address, to be shared by the tasks of a region.
    pub fn shared<T>(&mut self) -> Shared<T> {
        Shared { ptr: self.ptr(), len: self.len / size_of::<T>() }
    }
}

/// The address of a scratch buffer that the tasks of a region share.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T> {
    ptr: *mut T,
    len: usize,
}

// SAFETY: only an address; each region that shares one states why its accesses are disjoint.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Address of value `i`, or the end.
    pub fn at(&self, i: usize) -> *mut T {
        debug_assert!(i <= self.len, "{i} of {}", self.len);
        self.ptr.wrapping_add(i)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        // A thread that is being torn down has no list any more: then the buffer is simply freed.
        let _ = FREE.try_with(|free| {
            if let Ok(mut free) = free.try_borrow_mut() {
                free.push(buffer);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_nest_and_are_used_again() {
        let mut a = Scratch::of::<f32>(100);
        let mut b = Scratch::of::<f32>(1000);
        assert_ne!(a.ptr::<u8>(), b.ptr::<u8>());
        let large = b.ptr::<u8>();
        drop(a);
        drop(b);
        assert_eq!(Scratch::of::<f32>(900).ptr::<u8>(), large);
        // The small one serves a small need, whichever was given back last.
        let mut small = Scratch::of::<f32>(50);
        assert_ne!(small.ptr::<u8>(), large);
        assert_eq!(Scratch::of::<f32>(1000).ptr::<u8>(), large);
    }
}
