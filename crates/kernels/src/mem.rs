//! Memory that kernels read and write: slabs of aligned bytes, addressed by checked views.
//!
//! Callers hold no pointers. They name a slab and a [`Layout`] in it; every kernel resolves its views through
//! [`Memory::resolve`] first, which checks bounds, element type, writability and overlap. Thus the crates above
//! need no `unsafe` to hand one arena's pieces to one kernel as inputs and outputs.

use crate::Error;
use crate::pages::{self, Piece};
use sparsam_dtype::{DType, Layout};
use std::sync::Arc;

/// One cache line: the unit and alignment of every allocation.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Allocations of at least this many bytes, a large page, are mapped by themselves: the system has them back as soon as
/// they are freed, where an allocator keeps some (9 MB of buffers that had grown in a step of GPT-2 124M).
const LARGE: usize = 2 << 20;

/// Sparse allocations of at least this many bytes are mapped: 16 pages.
const SPARSE: usize = 64 << 10;

/// A zeroed allocation of bytes, aligned to 64.
#[derive(Default)]
pub struct AlignedBytes {
    store: Store,
    len: usize,
}

enum Store {
    Lines(Vec<Line>),
    Piece(Piece),
}

impl Default for Store {
    fn default() -> Store {
        Store::Lines(Vec::new())
    }
}

impl Clone for AlignedBytes {
    fn clone(&self) -> AlignedBytes {
        AlignedBytes::from_slice(self.bytes())
    }
}

impl AlignedBytes {
    /// `len` zero bytes. Large ones lie in large pages, and cost no memory before these are touched.
    pub fn zeroed(len: usize) -> AlignedBytes {
        if len >= LARGE
            && let Some(bytes) = pages::alone(len)
        {
            return bytes;
        }
        AlignedBytes::zeroed_small(len)
    }

    /// `len` zero bytes of which each small page costs memory only once it is touched.
    pub fn sparse(len: usize) -> AlignedBytes {
        if len >= SPARSE
            && let Some(bytes) = pages::sparse(len)
        {
            return bytes;
        }
        AlignedBytes::zeroed_small(len)
    }

    /// [`AlignedBytes::zeroed`] from the global allocator, which touches them all (as it aligns them).
    pub(crate) fn zeroed_small(len: usize) -> AlignedBytes {
        let n = len.div_ceil(64);
        if n == 0 {
            return AlignedBytes::default();
        }
        let layout = std::alloc::Layout::array::<Line>(n).expect("an allocation fits the address space");
        // SAFETY: the layout has a size above 0; `Line` is valid when all its bytes are 0; pointer, length and
        // capacity are those of one allocation of `n` lines by the global allocator with `Vec<Line>`'s layout.
        let lines = unsafe {
            let p = std::alloc::alloc_zeroed(layout).cast::<Line>();
            if p.is_null() {
                std::alloc::handle_alloc_error(layout);
            }
            Vec::from_raw_parts(p, n, n)
        };
        AlignedBytes { store: Store::Lines(lines), len }
    }

    /// The first `len` bytes of `piece`, which has at least as many.
    pub(crate) fn from_piece(piece: Piece, len: usize) -> AlignedBytes {
        AlignedBytes { store: Store::Piece(piece), len }
    }

    /// A copy of `bytes`.
    pub fn from_slice(bytes: &[u8]) -> AlignedBytes {
        let mut a = AlignedBytes::zeroed(bytes.len());
        a.bytes_mut().copy_from_slice(bytes);
        a
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.store {
            Store::Lines(lines) => &bytemuck::cast_slice(lines)[..self.len],
            // SAFETY: a piece has `len` bytes of a mapping that it keeps, and they are this allocation's alone.
            Store::Piece(piece) => unsafe { std::slice::from_raw_parts(piece.ptr(), self.len) },
        }
    }

    /// All bytes, writable.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.store {
            Store::Lines(lines) => &mut bytemuck::cast_slice_mut(lines)[..self.len],
            // SAFETY: as in `bytes`; `self` is borrowed mutably.
            Store::Piece(piece) => unsafe { std::slice::from_raw_parts_mut(piece.ptr(), self.len) },
        }
    }

    /// Address of the first byte.
    fn ptr(&mut self) -> *mut u8 {
        match &mut self.store {
            Store::Lines(lines) => lines.as_mut_ptr().cast(),
            Store::Piece(piece) => piece.ptr(),
        }
    }

    /// Address of the first byte, to be read.
    fn shared_ptr(&self) -> *const u8 {
        match &self.store {
            Store::Lines(lines) => lines.as_ptr().cast(),
            Store::Piece(piece) => piece.ptr(),
        }
    }
}

/// A strided piece of one slab; offsets and strides count elements of `dtype`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Index of the slab in its [`Memory`].
    pub slab: usize,
    /// Element type: a plain number; a block format only where a kernel says so, and then in whole blocks along a
    /// contiguous last axis.
    pub dtype: DType,
    /// Where the elements lie.
    pub layout: Layout,
}

impl View {
    /// The whole tensor `shape` at the start of `slab`.
    pub fn contiguous(slab: usize, dtype: DType, shape: &[usize]) -> View {
        View { slab, dtype, layout: Layout::contiguous(shape) }
    }
}

enum Slab {
    Owned(AlignedBytes),
    Shared(Arc<AlignedBytes>),
}

/// The slabs that a program runs on: its arena, inputs, states (owned) and plain weights (shared, read-only).
#[derive(Default)]
pub struct Memory {
    slabs: Vec<Slab>,
}

/// A resolved view: the address of element `[0, 0, ..]`. Valid while the `&mut Memory` it came from is held.
#[derive(Clone, Copy)]
pub(crate) struct Ptr(pub *mut u8);

impl Ptr {
    /// The address, for closures, which would capture the bare field.
    pub fn get(self) -> *mut u8 {
        self.0
    }
}

/// Where a bound operand lies: bytes of a slab.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    slab: usize,
    /// Element `[0, 0, ..]`.
    at: usize,
    /// Behind the last element.
    end: usize,
    write: bool,
}

// SAFETY: a `Ptr` is only an address; each kernel that shares it between threads states why its accesses are disjoint.
unsafe impl Send for Ptr {}
// SAFETY: as above.
unsafe impl Sync for Ptr {}

impl Memory {
    /// No slabs.
    pub fn new() -> Memory {
        Memory::default()
    }

    /// Adds a slab of `bytes` zero bytes that kernels may write; returns its index.
    pub fn add_owned(&mut self, bytes: usize) -> usize {
        self.slabs.push(Slab::Owned(AlignedBytes::zeroed(bytes)));
        self.slabs.len() - 1
    }

    /// [`Memory::add_owned`] for a slab of which much may stay unused: see [`AlignedBytes::sparse`].
    pub fn add_sparse(&mut self, bytes: usize) -> usize {
        self.slabs.push(Slab::Owned(AlignedBytes::sparse(bytes)));
        self.slabs.len() - 1
    }

    /// Adds a slab that kernels may write; returns its index.
    pub fn add_bytes(&mut self, bytes: AlignedBytes) -> usize {
        self.slabs.push(Slab::Owned(bytes));
        self.slabs.len() - 1
    }

    /// Adds a read-only slab; returns its index.
    pub fn add_shared(&mut self, bytes: Arc<AlignedBytes>) -> usize {
        self.slabs.push(Slab::Shared(bytes));
        self.slabs.len() - 1
    }

    /// Puts a zeroed owned slab of `bytes` in the place of slab `slab`.
    pub fn reset_owned(&mut self, slab: usize, bytes: usize) {
        self.slabs[slab] = Slab::Owned(AlignedBytes::zeroed(bytes));
    }

    /// Puts a read-only slab in the place of slab `slab`.
    pub fn reset_shared(&mut self, slab: usize, bytes: Arc<AlignedBytes>) {
        self.slabs[slab] = Slab::Shared(bytes);
    }

    /// The bytes of a slab.
    pub fn bytes(&self, slab: usize) -> &[u8] {
        match &self.slabs[slab] {
            Slab::Owned(a) => a.bytes(),
            Slab::Shared(a) => a.bytes(),
        }
    }

    /// The bytes of an owned slab, writable; [`Error::ReadOnly`] if it is shared.
    pub fn bytes_mut(&mut self, slab: usize) -> Result<&mut [u8], Error> {
        match &mut self.slabs[slab] {
            Slab::Owned(a) => Ok(a.bytes_mut()),
            Slab::Shared(_) => Err(Error::ReadOnly { slab }),
        }
    }

    /// The elements of a contiguous f32 view.
    pub fn f32(&self, view: &View) -> Result<&[f32], Error> {
        self.check_bounds(view)?;
        if view.dtype != DType::F32 || !view.layout.is_contiguous() {
            return Err(Error::View { want: "contiguous F32", view: Box::new(view.clone()) });
        }
        let start = view.layout.offset * 4;
        Ok(bytemuck::cast_slice(&self.bytes(view.slab)[start..start + view.layout.numel() * 4]))
    }

    fn check_bounds(&self, view: &View) -> Result<(), Error> {
        if view.dtype.is_block() {
            return Err(Error::View { want: "plain numbers", view: Box::new(view.clone()) });
        }
        self.check_bytes(view)
    }

    /// That a view of any type lies within its slab, blocks whole.
    fn check_bytes(&self, view: &View) -> Result<(), Error> {
        let have = match self.slabs.get(view.slab) {
            Some(Slab::Owned(a)) => a.len(),
            Some(Slab::Shared(a)) => a.len(),
            None => return Err(Error::NoSlab { slab: view.slab }),
        };
        if !whole_blocks(view) {
            let want = "whole blocks along a contiguous last axis";
            return Err(Error::View { want, view: Box::new(view.clone()) });
        }
        let need = bytes_before(view.dtype, view.layout.end());
        if need > have {
            return Err(Error::Bounds { slab: view.slab, need, have });
        }
        Ok(())
    }

    /// Addresses of outputs and inputs of one kernel call, checked.
    ///
    /// Every view lies within its slab; outputs lie in owned slabs, overlap neither each other nor any input,
    /// except that with `in_place` an input may be the very same view as an output.
    pub(crate) fn resolve<const O: usize, const I: usize>(
        &mut self,
        outs: [&View; O],
        ins: [&View; I],
        in_place: bool,
    ) -> Result<([Ptr; O], [Ptr; I]), Error> {
        self.check(&outs, &ins, in_place, false)?;
        Ok((outs.map(|v| self.address(v)), ins.map(|v| self.address(v))))
    }

    /// [`Memory::resolve`] for numbers of views known only at run time.
    pub(crate) fn resolve_slices(
        &mut self,
        outs: &[&View],
        ins: &[&View],
        in_place: bool,
    ) -> Result<(Vec<Ptr>, Vec<Ptr>), Error> {
        self.check(outs, ins, in_place, false)?;
        Ok(self.address_all(outs, ins))
    }

    /// [`Memory::resolve_slices`] for a kernel that also reads and writes block formats.
    pub(crate) fn resolve_blocks(
        &mut self,
        outs: &[&View],
        ins: &[&View],
    ) -> Result<(Vec<Ptr>, Vec<Ptr>), Error> {
        self.check(outs, ins, false, true)?;
        Ok(self.address_all(outs, ins))
    }

    /// Checks views once for many runs: what [`Memory::resolve`] checks, slabs as they are now.
    pub(crate) fn bind(&self, outs: &[&View], ins: &[&View], in_place: bool) -> Result<Vec<Place>, Error> {
        self.check(outs, ins, in_place, false)?;
        let place = |(i, v): (usize, &&View)| {
            let size = v.dtype.block_bytes();
            let (at, end) = (v.layout.offset * size, v.layout.end() * size);
            Place { slab: v.slab, at, end, write: i < outs.len() }
        };
        Ok(outs.iter().chain(ins).enumerate().map(place).collect())
    }

    /// Addresses of bound operands, in their order. Slabs are looked at again, since they may have been replaced.
    pub(crate) fn addresses(&mut self, places: &[Place], ptrs: &mut [Ptr]) -> Result<(), Error> {
        for (ptr, p) in ptrs.iter_mut().zip(places) {
            let (base, have) = match self.slabs.get_mut(p.slab) {
                Some(Slab::Owned(a)) => (a.ptr(), a.len()),
                Some(Slab::Shared(_)) if p.write => return Err(Error::ReadOnly { slab: p.slab }),
                Some(Slab::Shared(a)) => (a.shared_ptr().cast_mut(), a.len()),
                None => return Err(Error::NoSlab { slab: p.slab }),
            };
            if p.end > have {
                return Err(Error::Bounds { slab: p.slab, need: p.end, have });
            }
            *ptr = Ptr(base.wrapping_add(p.at));
        }
        Ok(())
    }

    /// What [`Memory::resolve`] promises; with `blocks` also for views of block formats.
    fn check(&self, outs: &[&View], ins: &[&View], in_place: bool, blocks: bool) -> Result<(), Error> {
        for view in outs.iter().chain(ins) {
            if blocks { self.check_bytes(view)? } else { self.check_bounds(view)? }
        }
        for (i, out) in outs.iter().enumerate() {
            if matches!(self.slabs[out.slab], Slab::Shared(_)) {
                return Err(Error::ReadOnly { slab: out.slab });
            }
            let clash = outs[..i].iter().find(|v| overlap(out, v)).or_else(|| {
                ins.iter().find(|v| {
                    overlap(out, v) && !(in_place && v.layout == out.layout && v.dtype == out.dtype)
                })
            });
            if let Some(other) = clash {
                return Err(Error::Overlap {
                    out: Box::new((*out).clone()),
                    other: Box::new((*other).clone()),
                });
            }
        }
        Ok(())
    }

    /// The address of a checked view's first element.
    fn address(&mut self, v: &View) -> Ptr {
        let base = match &mut self.slabs[v.slab] {
            Slab::Owned(a) => a.ptr(),
            Slab::Shared(a) => a.shared_ptr().cast_mut(),
        };
        Ptr(base.wrapping_add(bytes_before(v.dtype, v.layout.offset)))
    }

    fn address_all(&mut self, outs: &[&View], ins: &[&View]) -> (Vec<Ptr>, Vec<Ptr>) {
        let mut all = |views: &[&View]| views.iter().map(|v| self.address(v)).collect();
        (all(outs), all(ins))
    }
}

/// Bytes that `n` elements take, whole blocks.
pub(crate) fn bytes_before(dtype: DType, n: usize) -> usize {
    n / dtype.block_len() * dtype.block_bytes()
}

/// Whether every row of the view is whole blocks that lie together; plain numbers are blocks of one, in any order.
fn whole_blocks(view: &View) -> bool {
    let (l, block) = (&view.layout, view.dtype.block_len());
    let Some((&step, rest)) = l.strides.split_last() else { return block == 1 };
    block == 1
        || step == 1
            && l.offset.is_multiple_of(block)
            && l.shape.last().is_some_and(|n| n.is_multiple_of(block))
            && rest.iter().all(|s| s.is_multiple_of(block))
}

/// Whether two views may share an element. Exact for disjoint hulls and for column ranges of one matrix
/// (parts of a concatenation along the last axis); otherwise errs towards `true`.
fn overlap(a: &View, b: &View) -> bool {
    if a.slab != b.slab || a.layout.numel() == 0 || b.layout.numel() == 0 {
        return false;
    }
    let hull = |v: &View| (bytes_before(v.dtype, v.layout.offset), bytes_before(v.dtype, v.layout.end()));
    let ((a0, a1), (b0, b1)) = (hull(a), hull(b));
    if a1 <= b0 || b1 <= a0 {
        return false;
    }
    if a.dtype != b.dtype {
        return true;
    }
    // Both are rows of one period: disjoint if their column ranges within the period are.
    let Some(period) = period(&a.layout).into_iter().chain(period(&b.layout)).min() else { return true };
    // Columns count from the first element of both: rows may start anywhere in a slab.
    let base = a.layout.offset.min(b.layout.offset);
    match (columns(&a.layout, base, period), columns(&b.layout, base, period)) {
        (Some((a0, a1)), Some((b0, b1))) => !(a1 <= b0 || b1 <= a0),
        _ => true,
    }
}

/// The smallest stride that jumps over a whole contiguous row.
fn period(l: &Layout) -> Option<usize> {
    let mut row = 1;
    for (&n, &s) in l.shape.iter().zip(&l.strides).rev() {
        if n == 1 || s == 0 {
            continue;
        }
        if s > row {
            return Some(s);
        }
        row = s * n;
    }
    None
}

/// The range of columns that `l` touches, seen from element `base`, if all its larger strides are multiples of
/// `period`.
fn columns(l: &Layout, base: usize, period: usize) -> Option<(usize, usize)> {
    let mut last = 0;
    for (&n, &s) in l.shape.iter().zip(&l.strides) {
        if n > 1 && s % period != 0 {
            last += (n - 1) * s;
        }
    }
    let first = (l.offset - base) % period;
    (first + last < period).then_some((first, first + last + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(slab: usize, layout: Layout) -> View {
        View { slab, dtype: DType::F32, layout }
    }

    #[test]
    fn zeroed_is_aligned_and_zero() {
        let lengths = [0, 1, 63, 64, 65, 100_000];
        for (len, make) in
            lengths.map(|n| [(n, AlignedBytes::zeroed as fn(_) -> _), (n, AlignedBytes::sparse)]).concat()
        {
            let mut a: AlignedBytes = make(len);
            assert!(a.len() == len && a.bytes().iter().all(|&b| b == 0));
            assert!(len == 0 || a.bytes().as_ptr().addr().is_multiple_of(64));
            a.bytes_mut().fill(1);
            assert_eq!(a.clone().bytes(), a.bytes());
        }
    }

    #[test]
    fn resolve_checks_bounds_overlap_and_ownership() {
        let mut m = Memory::new();
        let s = m.add_owned(4 * 24);
        let r = m.add_shared(Arc::new(AlignedBytes::zeroed(16)));
        let whole = Layout::contiguous(&[4, 6]);
        let left = view(s, whole.slice(1, 0, 3));
        let right = view(s, whole.slice(1, 3, 6));
        let wide = view(s, whole.slice(1, 2, 6));
        assert!(m.resolve([&left, &right], [], false).is_ok());
        assert!(matches!(m.resolve([&left], [&wide], false), Err(Error::Overlap { .. })));
        assert!(m.resolve([&left], [&left], true).is_ok());
        assert!(matches!(m.resolve([&left], [&left], false), Err(Error::Overlap { .. })));
        let shared = View::contiguous(r, DType::F32, &[4]);
        assert!(matches!(m.resolve([&shared], [], false), Err(Error::ReadOnly { .. })));
        let long = View::contiguous(s, DType::F32, &[25]);
        assert!(matches!(m.resolve([], [&long], false), Err(Error::Bounds { need: 100, have: 96, .. })));
    }

    #[test]
    fn rows_of_one_matrix_overlap_only_where_they_do() {
        let whole = Layout::contiguous(&[4, 6]);
        assert!(!overlap(&view(0, whole.slice(0, 0, 2)), &view(0, whole.slice(0, 2, 4))));
        assert!(overlap(&view(0, whole.slice(0, 0, 3)), &view(0, whole.slice(0, 2, 4))));
        assert!(overlap(&view(0, whole.clone()), &view(0, whole.permute(&[1, 0]))));
        // The same matrix anywhere in a slab.
        let moved = |l: Layout| view(0, Layout { offset: l.offset + 16, ..l });
        assert!(!overlap(&moved(whole.slice(1, 0, 3)), &moved(whole.slice(1, 3, 6))));
        assert!(overlap(&moved(whole.slice(1, 0, 4)), &moved(whole.slice(1, 3, 6))));
    }
}
