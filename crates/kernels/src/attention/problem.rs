//! The door: views checked and resolved once, and for each row the range of keys that it sees.

use super::{Packed, Paged, Scores};
use crate::mem::{Ptr, bytes_before};
use crate::{Error, Memory, View};
use sparsam_dtype::{DType, bf16, f16};
use std::ops::Range;

const OP: &str = "attention";

/// A resolved (tokens, heads, width) tensor whose last axis is contiguous.
#[derive(Clone, Copy)]
pub(super) struct Tensor {
    ptr: Ptr,
    pub dtype: DType,
    /// Bytes between tokens and between heads.
    token: usize,
    head: usize,
}

impl Tensor {
    pub(super) fn new(view: &View, ptr: Ptr) -> Tensor {
        let s = &view.layout.strides;
        let [token, head] = [s[0], s[1]].map(|stride| bytes_before(view.dtype, stride));
        Tensor { ptr, dtype: view.dtype, token, head }
    }

    /// Address of element `[token, head, 0]`; the caller keeps both below the checked shape.
    pub(super) fn at(&self, token: usize, head: usize) -> *mut u8 {
        self.ptr.0.wrapping_add(token * self.token + head * self.head)
    }

    /// Fills `to` with the elements `[token, head, ..]` as f32.
    ///
    /// # Safety
    /// The tensor is F32, F16 or BF16; token, head and `to.len()` lie within its checked shape, and nobody
    /// writes there meanwhile.
    pub(super) unsafe fn read(&self, token: usize, head: usize, to: &mut [f32]) {
        // SAFETY: the caller's contract.
        unsafe { self.read_from(token, head, 0, to) }
    }

    /// Fills `to` with the elements `[token, head, first ..]` as f32.
    ///
    /// # Safety
    /// As [`Tensor::read`].
    pub(super) unsafe fn read_from(&self, token: usize, head: usize, first: usize, to: &mut [f32]) {
        let at = self.at(token, head).wrapping_add(first * self.dtype.block_bytes());
        // SAFETY: the caller's contract; addresses are aligned to their element as slabs are to 64 bytes.
        unsafe {
            match self.dtype {
                DType::F32 => to.copy_from_slice(std::slice::from_raw_parts(at.cast(), to.len())),
                DType::F16 => {
                    let from = std::slice::from_raw_parts(at.cast::<f16>(), to.len());
                    to.iter_mut().zip(from).for_each(|(t, f)| *t = f.to_f32());
                }
                _ => {
                    let from = std::slice::from_raw_parts(at.cast::<bf16>(), to.len());
                    to.iter_mut().zip(from).for_each(|(t, f)| *t = f.to_f32());
                }
            }
        }
    }

    /// Writes `[token, head, ..]` of an F32 tensor.
    ///
    /// # Safety
    /// The tensor is F32; token, head and `from.len()` lie within its checked shape, and no other thread touches
    /// that piece.
    pub(super) unsafe fn write(&self, token: usize, head: usize, from: &[f32]) {
        // SAFETY: the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.at(token, head).cast::<f32>(), from.len()) }
            .copy_from_slice(from);
    }
}

/// Rows that follow each other and look for their keys in the same place.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Segment {
    /// Rows of the call.
    pub rows: Range<usize>,
    /// How a position of the sequence becomes a row of the key tensor.
    source: Source,
}

#[derive(Clone, Debug, PartialEq)]
enum Source {
    /// Position `p` is row `base + p`.
    Packed { base: usize },
    /// Position `p` is row `pages[at + p / page_size] + p % page_size`.
    Paged { at: usize },
}

/// A checked call: lengths, and for each row the positions of its sequence that it sees.
pub(super) struct Problem {
    pub n: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub v_dim: usize,
    pub scores: Scores,
    /// Visible positions of each row, counted from the start of its sequence; empty for padding.
    pub visible: Vec<Range<usize>>,
    /// Covers every row that sees a key.
    pub segments: Vec<Segment>,
    /// First slots of the pages of all segments.
    pages: Vec<usize>,
    page_size: usize,
}

impl Segment {
    /// The first row of a packed sequence.
    pub(super) fn base(&self) -> usize {
        match self.source {
            Source::Packed { base } => base,
            Source::Paged { .. } => unreachable!("the backward pass is packed"),
        }
    }
}

impl Problem {
    /// Query heads that share a key head.
    pub(super) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Whether products run on pairs of bf16: `inputs` are bf16, of even widths, and the machine has the instruction.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn pairs(&self, cpu: crate::Cpu, inputs: &[&Tensor]) -> bool {
        let even = self.dim.is_multiple_of(2) && self.v_dim.is_multiple_of(2);
        cpu.bf16 && even && inputs.iter().all(|t| t.dtype == DType::BF16)
    }

    /// Fills `to` with the rows of the key tensor that hold positions `first ..` of the segment's sequence.
    pub(super) fn slots(&self, segment: &Segment, first: usize, to: &mut [usize]) {
        match segment.source {
            Source::Packed { base } => to.iter_mut().enumerate().for_each(|(i, t)| *t = base + first + i),
            Source::Paged { at } => {
                let (mut page, mut inside) = (at + first / self.page_size, first % self.page_size);
                for t in to {
                    *t = self.pages[page] + inside;
                    inside += 1;
                    if inside == self.page_size {
                        (page, inside) = (page + 1, 0);
                    }
                }
            }
        }
    }

    fn new(q: &View, k: &View, v: &View, scores: &Scores) -> Result<Problem, Error> {
        let (qs, ks, vs) = (&q.layout.shape, &k.layout.shape, &v.layout.shape);
        let wrong =
            |what: &str| Error::Shape { op: OP, what: format!("q {qs:?}, k {ks:?}, v {vs:?}: {what}") };
        if qs.len() != 3 || ks.len() != 3 || vs.len() != 3 {
            return Err(wrong("want (tokens, heads, head_dim)"));
        }
        if ks[1] == 0 || qs[1] % ks[1] != 0 || ks[2] != qs[2] || vs[..2] != ks[..2] || k.dtype != v.dtype {
            return Err(wrong("heads must be a multiple of key heads, widths and key types must agree"));
        }
        if scores.softcap.is_some_and(|c| !(c > 0.0 && c.is_finite())) {
            return Err(wrong("the soft cap must be above 0 and finite"));
        }
        const TYPES: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::Q8_0];
        check_rows(q, &TYPES[..3], "F32, F16 or BF16 with contiguous heads")?;
        for view in [k, v] {
            check_rows(view, &TYPES, "F32, F16, BF16 or Q8_0 with contiguous heads")?;
        }
        Ok(Problem {
            n: qs[0],
            heads: qs[1],
            kv_heads: ks[1],
            dim: qs[2],
            v_dim: vs[2],
            scores: *scores,
            visible: Vec::with_capacity(qs[0]),
            segments: Vec::new(),
            pages: Vec::new(),
            page_size: 1,
        })
    }

    /// Rows `i` that see positions `0 ..= position` (relative to the sequence) within the window.
    fn see(&mut self, end: usize) -> Range<usize> {
        let range = self.scores.window.map_or(0, |w| end.saturating_sub(w))..end;
        self.visible.push(range.clone());
        range
    }

    /// Reads and checks where each row of a packed call finds its keys.
    pub(super) fn packed(mem: &mut Memory, a: &Packed, scores: &Scores) -> Result<Problem, Error> {
        let mut p = Problem::new(a.q, a.k, a.v, scores)?;
        if a.k.dtype.is_block() {
            return Err(Error::View { want: "keys in plain numbers", view: Box::new(a.k.clone()) });
        }
        if a.k.layout.shape[0] != p.n {
            let what = format!("packed: {} rows of keys for {} rows", a.k.layout.shape[0], p.n);
            return Err(Error::Shape { op: OP, what });
        }
        let starts = index(mem, a.row_start, &[p.n], "row_start")?;
        for (i, start) in starts.into_iter().map(|s| s.max(0) as usize).enumerate() {
            let seen = p.see((i + 1).saturating_sub(start));
            if seen.is_empty() {
                continue;
            }
            let source = Source::Packed { base: start };
            match p.segments.last_mut() {
                Some(s) if s.rows.end == i && s.source == source => s.rows.end = i + 1,
                _ => p.segments.push(Segment { rows: i..i + 1, source }),
            }
        }
        Ok(p)
    }

    /// Reads and checks where each row of a paged call finds its keys.
    pub(super) fn paged(mem: &mut Memory, a: &Paged, scores: &Scores) -> Result<Problem, Error> {
        let mut p = Problem::new(a.q, a.k, a.v, scores)?;
        p.page_size = a.page_size;
        let slots = a.k.layout.shape[0];
        let ts = &a.page_table.layout.shape;
        if ts.len() != 2 || a.page_size == 0 || !slots.is_multiple_of(a.page_size) {
            let what =
                format!("page table {ts:?}, {slots} slots in pages of {}: want whole pages", a.page_size);
            return Err(Error::Shape { op: OP, what });
        }
        let positions = index(mem, a.positions, &[p.n], "positions")?;
        let seqs = index(mem, a.row_seq, &[p.n], "row_seq")?;
        let ([], [table]) = mem.resolve([], [a.page_table], false)?;
        if a.page_table.dtype != DType::I32 {
            return Err(Error::View { want: "an I32 page table", view: Box::new(a.page_table.clone()) });
        }
        let (n_seqs, n_pages) = (ts[0], ts[1]);
        let strides = &a.page_table.layout.strides;
        // SAFETY: `resolve` checked the table's layout, and both indices stay below its shape.
        let page_at = |s: usize, page: usize| unsafe {
            *table.0.cast::<i32>().wrapping_add(s * strides[0] + page * strides[1])
        };
        let mut i = 0;
        while i < p.n {
            let seq = seqs[i];
            let end = (i..p.n).find(|&j| seqs[j] != seq).unwrap_or(p.n);
            if seq == -1 {
                p.visible.resize(end, 0..0);
                i = end;
                continue;
            }
            let wrong =
                |row: usize, what: String| Error::Shape { op: OP, what: format!("row {row}: {what}") };
            let Some(s) = usize::try_from(seq).ok().filter(|&s| s < n_seqs) else {
                return Err(wrong(i, format!("sequence {seq} of a page table for {n_seqs}")));
            };
            // One segment per run of rows that see something; pages from the first to the last visible one.
            let (mut low, mut high) = (usize::MAX, 0);
            let first = i;
            while i < end {
                let seen = p.see((i64::from(positions[i]) + 1).max(0) as usize);
                if !seen.is_empty() {
                    (low, high) = (low.min(seen.start), high.max(seen.end));
                    if seen.end.div_ceil(a.page_size) > n_pages {
                        let what =
                            format!("position {} needs more than the table's {n_pages} pages", positions[i]);
                        return Err(wrong(i, what));
                    }
                }
                i += 1;
            }
            if high == 0 {
                continue;
            }
            let first_page = low / a.page_size;
            // Pages before the first visible one are never asked for, so the table may name anything there.
            let at = p.pages.len();
            p.pages.resize(at + first_page, usize::MAX);
            for page in first_page..high.div_ceil(a.page_size) {
                let id = page_at(s, page);
                match usize::try_from(id).ok().filter(|&id| id < slots / a.page_size) {
                    Some(id) => p.pages.push(id * a.page_size),
                    None => {
                        let what = format!("sequence {s}, page {page}: id {id} of {}", slots / a.page_size);
                        return Err(wrong(first, what));
                    }
                }
            }
            p.segments.push(Segment { rows: first..end, source: Source::Paged { at } });
        }
        Ok(p)
    }
}

/// Refuses a view that is not of one of these types or whose last axis has gaps.
pub(super) fn check_rows(view: &View, types: &[DType], want: &'static str) -> Result<(), Error> {
    let l = &view.layout;
    let dense = l.shape.last().is_some_and(|&n| n <= 1) || l.strides.last() == Some(&1);
    if dense && types.contains(&view.dtype) {
        return Ok(());
    }
    Err(Error::View { want, view: Box::new(view.clone()) })
}

/// Refuses a view whose shape is not this.
pub(super) fn check_shape(view: &View, shape: &[usize], name: &str) -> Result<(), Error> {
    if view.layout.shape == shape {
        return Ok(());
    }
    let what = format!("{name} has shape {:?}, want {shape:?}", view.layout.shape);
    Err(Error::Shape { op: OP, what })
}

/// The values of an I32 index input of one axis.
fn index(mem: &mut Memory, view: &View, shape: &[usize], name: &str) -> Result<Vec<i32>, Error> {
    check_shape(view, shape, name)?;
    if view.dtype != DType::I32 {
        return Err(Error::View { want: "an I32 index", view: Box::new(view.clone()) });
    }
    let ([], [at]) = mem.resolve([], [view], false)?;
    let stride = view.layout.strides[0];
    // SAFETY: `resolve` checked the layout, and `i` stays below its length.
    Ok((0..shape[0]).map(|i| unsafe { *at.0.cast::<i32>().wrapping_add(i * stride) }).collect())
}
