//! The forward pass in tiles.
//!
//! A task takes up to [`ROWS`] rows (query heads that share a key head stand among them as further rows) and goes
//! through their keys chunk by chunk: K is transposed and V copied once, then blocks of 6 rows compute all their
//! scores of the chunk, the maximum, the exponentials (base 2: the logarithm's factor is in the scale of the queries)
//! and the weighted values, with accumulators that stay in registers for the whole chunk. Chunks are merged as in
//! FlashAttention-2 (algorithm 1): the division comes last.
//!
//! Bytes moved: q, k, v and the result once for each tile of rows that sees them, nothing of the size N x N. The plain
//! version writes and reads N x N scores and weights: at N = 8192 with 12 heads of 64 that is 4 x 3.2 GB forward,
//! against 0.1 GB for the operands and 11 times (8192 / 384, halved by causality) 50 MB of keys and values.

use super::block::*;
use super::problem::{Problem, Segment, Tensor};
use super::{Forward, few};
use crate::matmul::scratch::Scratch;
use crate::simd::{Vector, dispatch, math};
use crate::{Context, Cpu};
use sparsam_dtype::DType;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Tasks that a call wants for each thread, so that all end at about the same time.
const TASKS_PER_THREAD: usize = 4;

/// Rows of one segment with one key head.
pub(super) struct Tile<'a> {
    pub segment: &'a Segment,
    pub rows: Range<usize>,
    pub kv_head: usize,
    /// Chunks of keys that some row sees.
    chunks: Range<usize>,
    /// Where the results of the chunks begin, and how many are missing, if each chunk is a task of its own.
    partial: Option<(usize, AtomicUsize)>,
}

/// The largest number of rows (times heads) of a tile whose chunks may become tasks of their own: results of chunks
/// then stay small against the keys that they come from.
const SPLIT_ROWS: usize = 48;

pub(super) fn forward(ctx: &Context, f: &Forward, p: &Problem) {
    let group = p.group();
    let mut tiles: Vec<Tile> = vec![];
    for segment in &p.segments {
        for first in segment.rows.clone().step_by((ROWS / group).max(1)) {
            let rows = first..segment.rows.end.min(first + (ROWS / group).max(1));
            let seen = || p.visible[rows.clone()].iter().filter(|r| !r.is_empty());
            let (Some(low), Some(high)) = (seen().map(|r| r.start).min(), seen().map(|r| r.end).max()) else {
                continue;
            };
            let chunks = low / CHUNK..high.div_ceil(CHUNK);
            tiles.extend((0..p.kv_heads).map(|kv_head| Tile {
                segment,
                rows: rows.clone(),
                kv_head,
                chunks: chunks.clone(),
                partial: None,
            }));
        }
    }
    let split = tiles.len() < TASKS_PER_THREAD * ctx.pool().threads() && ctx.pool().threads() > 1;
    let mut jobs: Vec<(usize, Range<usize>)> = vec![];
    let mut partials = 0;
    for (t, tile) in tiles.iter_mut().enumerate() {
        let rows = tile.rows.len() * group;
        if split && rows <= SPLIT_ROWS && tile.chunks.len() > 1 {
            tile.partial = Some((partials, AtomicUsize::new(tile.chunks.len())));
            partials += tile.chunks.len() * rows * state_row(p);
            jobs.extend(tile.chunks.clone().map(|c| (t, c..c + 1)));
        } else {
            jobs.push((t, tile.chunks.clone()));
        }
    }
    // Long ones first.
    jobs.sort_by_key(|(t, chunks)| std::cmp::Reverse(chunks.len() * tiles[*t].rows.len()));
    let mut partials = Scratch::of::<f32>(partials);
    let partials = partials.shared::<f32>();
    ctx.pool().run(jobs.len(), |j| {
        let (tile, chunks) = (&tiles[jobs[j].0], jobs[j].1.clone());
        let size = tile.rows.len() * group * state_row(p);
        // SAFETY: `Problem` checked that rows, heads and slots lie within the operands; a tile's rows and heads, and
        // each chunk's results, belong to one task, but for the last to finish, which reads all of a tile's results
        // after their tasks have counted down; the context's machine has its instructions.
        unsafe {
            match &tile.partial {
                None => {
                    let mut state = Scratch::of::<f32>(size);
                    run_tile(ctx.cpu(), f, p, tile, chunks, state.ptr());
                    finish(f, p, tile, state.ptr());
                }
                Some((at, missing)) => {
                    let mine = partials.at(at + (chunks.start - tile.chunks.start) * size);
                    run_tile(ctx.cpu(), f, p, tile, chunks, mine);
                    if missing.fetch_sub(1, Ordering::AcqRel) == 1 {
                        let mut state = Scratch::of::<f32>(size);
                        empty(p, tile, state.ptr());
                        for c in 0..tile.chunks.len() {
                            merge_all(ctx.cpu().simd, p, tile, state.ptr(), partials.at(at + c * size));
                        }
                        finish(f, p, tile, state.ptr());
                    }
                }
            }
        }
    });
}

/// Floats that a row's running result takes: the weighted values in whole units, then maximum and sum.
fn state_row(p: &Problem) -> usize {
    p.v_dim.next_multiple_of(UNIT) + UNIT
}

/// Sizes and factors of a tile, and what its rows have in common whether they are few or many. Row `m` is query head
/// `m % group` of the tile's row `m / group`.
pub(super) struct Work<'a> {
    p: &'a Problem,
    tile: &'a Tile<'a>,
    /// Floats of a row's running result, and of these the weighted values.
    pub row: usize,
    pub width: usize,
    /// Words of a key, and what they are read as.
    pub dim: usize,
    pub as_type: DType,
    /// What makes scores of products: inputs of tanh, or scores in base 2. It is in the queries already, or comes late.
    factor: f32,
    late: bool,
}

impl<'a> Work<'a> {
    #[inline(always)]
    pub fn of<V: Vector, W: Words<V>>(f: &Forward, p: &'a Problem, tile: &'a Tile<'a>) -> Work<'a> {
        let (row, s, pairs) = (state_row(p), &p.scores, W::EACH == 2);
        let factor = s.softcap.map_or(s.scale * std::f32::consts::LOG2_E, |cap| s.scale / cap);
        let as_type = if pairs { DType::F32 } else { f.k.dtype };
        Work { p, tile, row, width: row - UNIT, dim: p.dim / W::EACH, as_type, factor, late: pairs }
    }

    /// Queries of the first `n` rows as left sides, `[n][dim]`.
    ///
    /// # Safety
    /// As [`read_left`].
    #[inline(always)]
    pub unsafe fn read_queries<V: Vector, W: Words<V>>(&self, q: &Tensor, n: usize, to: *mut f32) {
        let group = self.p.group();
        for m in 0..n {
            let (i, h) = (self.tile.rows.start + m / group, self.tile.kv_head * group + m % group);
            // SAFETY: the caller's contract.
            unsafe { read_left::<V, W>(q, i, h, self.p.dim, self.factor, to.add(m * self.dim)) };
        }
    }

    /// Columns of the chunk from position `start` on that row `m` sees; empty if none.
    #[inline(always)]
    fn seen(&self, m: usize, start: usize) -> Range<usize> {
        let r = &self.p.visible[self.tile.rows.start + m / self.p.group()];
        let inside = |x: usize| x.saturating_sub(start).min(CHUNK);
        inside(r.start)..inside(r.end)
    }

    /// From the first to the last column of the chunk that some of `rows` sees; empty if there is none.
    #[inline(always)]
    pub fn columns(&self, rows: Range<usize>, start: usize) -> Range<usize> {
        let seen = rows.map(|m| self.seen(m, start)).filter(|r| !r.is_empty());
        let (low, high) = seen.fold((CHUNK, 0), |(l, h), r| (l.min(r.start), h.max(r.end)));
        low.min(high)..high
    }

    /// Turns the products `cols` of row `m` at `s` into weights in words, and puts their maximum and sum behind the
    /// values of its result at `to`.
    ///
    /// # Safety
    /// As [`softmax`]; `to` has `row` floats.
    #[inline(always)]
    pub unsafe fn weigh<V: Vector, W: Words<V>>(
        &self,
        m: usize,
        start: usize,
        s: *mut f32,
        cols: Range<usize>,
        to: *mut f32,
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            let factor = self.late.then_some(self.factor);
            let seen = self.seen(m, start);
            let (max, sum) = softmax::<V>(s, cols.clone(), seen, factor, self.p.scores.softcap);
            W::narrow(s, cols);
            *to.add(self.width) = max;
            *to.add(self.width + 1) = sum;
        }
    }
}

/// No keys seen: maximum -inf, sum and values 0.
pub(super) unsafe fn empty(p: &Problem, tile: &Tile, state: *mut f32) {
    let row = state_row(p);
    for m in 0..tile.rows.len() * p.group() {
        // SAFETY: the state has `row` floats for each row.
        unsafe {
            std::slice::from_raw_parts_mut(state.add(m * row), row).fill(0.0);
            *state.add(m * row + row - UNIT) = f32::NEG_INFINITY;
        }
    }
}

/// Divides by the sums and writes the results.
unsafe fn finish(f: &Forward, p: &Problem, tile: &Tile, state: *mut f32) {
    let row = state_row(p);
    for m in 0..tile.rows.len() * p.group() {
        let (i, h) = (tile.rows.start + m / p.group(), tile.kv_head * p.group() + m % p.group());
        if p.visible[i].is_empty() {
            continue; // its zeros are written already
        }
        // SAFETY: the state has `row` floats for each row.
        let s = unsafe { std::slice::from_raw_parts_mut(state.add(m * row), row) };
        let (max, sum) = (s[row - UNIT], s[row - UNIT + 1]);
        s[..p.v_dim].iter_mut().for_each(|x| *x /= sum);
        f.store(i, h, &s[..p.v_dim], max * std::f32::consts::LN_2 + sum.ln());
    }
}

dispatch! {
    unsafe fn run_single(f: &Forward, p: &Problem, tile: &Tile, chunks: Range<usize>, state: *mut f32) = single
}

#[inline(always)]
unsafe fn single<V: Registers>(f: &Forward, p: &Problem, tile: &Tile, chunks: Range<usize>, state: *mut f32) {
    // SAFETY: the caller's contract.
    unsafe {
        match few::takes(p, tile, 1) {
            true => few::tile::<V, Single>(f, p, tile, chunks, state),
            false => tile_chunks::<V, Single>(f, p, tile, chunks, state),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn run_pairs(f: &Forward, p: &Problem, tile: &Tile, chunks: Range<usize>, state: *mut f32) {
    // SAFETY: the caller's contract.
    unsafe {
        match few::takes(p, tile, 2) {
            true => few::tile::<crate::simd::Avx512, Pairs>(f, p, tile, chunks, state),
            false => tile_chunks::<crate::simd::Avx512, Pairs>(f, p, tile, chunks, state),
        }
    }
}

unsafe fn run_tile(cpu: Cpu, f: &Forward, p: &Problem, tile: &Tile, chunks: Range<usize>, state: *mut f32) {
    // SAFETY: the caller's contract.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if p.pairs(cpu, &[&f.k, &f.v]) {
            return run_pairs(f, p, tile, chunks, state);
        }
        run_single(cpu.simd, f, p, tile, chunks, state)
    }
}

dispatch! {
    unsafe fn merge_all(p: &Problem, tile: &Tile, state: *mut f32, more: *const f32) = merge_rows
}

#[inline(always)]
unsafe fn merge_rows<V: Vector>(p: &Problem, tile: &Tile, state: *mut f32, more: *const f32) {
    let row = state_row(p);
    for m in 0..tile.rows.len() * p.group() {
        // SAFETY: both have `row` floats for each row.
        unsafe { merge::<V>(row, state.add(m * row), more.add(m * row)) };
    }
}

/// Adds the results of a chunk to those of the chunks before it. A chunk without visible keys changes no bit.
#[inline(always)]
pub(super) unsafe fn merge<V: Vector>(row: usize, state: *mut f32, more: *const f32) {
    // SAFETY: both hold `row` floats; the caller has V's instructions.
    unsafe {
        let width = row - UNIT;
        let (old, new) = (*state.add(width), *more.add(width));
        let max = old.max(new);
        // All -inf: any finite number in its place gives weights of 0.
        let at = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let a = exp2(V::splat(old - at));
        let b = exp2(V::splat(new - at));
        let sum = V::splat(*state.add(width + 1)).mul(a).add(V::splat(*more.add(width + 1)).mul(b));
        for d in (0..width).step_by(V::LANES) {
            let x = V::load(state.add(d)).mul(a).add(V::load(more.add(d)).mul(b));
            x.store(state.add(d));
        }
        *state.add(width) = max;
        sum.store_first(state.add(width + 1), 1);
    }
}

#[inline(always)]
unsafe fn tile_chunks<V: Registers, W: Words<V>>(
    f: &Forward,
    p: &Problem,
    tile: &Tile,
    chunks: Range<usize>,
    state: *mut f32,
) {
    let work = Work::of::<V, W>(f, p, tile);
    let Work { row, width, dim, as_type, .. } = work;
    let rows = tile.rows.len() * p.group();
    let mut words = Scratch::of::<f32>(CHUNK * (dim + width + BLOCK) + rows * dim + BLOCK * row);
    let k: *mut f32 = words.ptr();
    // SAFETY: the pieces follow each other within the scratch buffer; everything else is `forward`'s promise.
    unsafe {
        let v = k.add(CHUNK * dim);
        let scores = v.add(CHUNK * width);
        let q = scores.add(CHUNK * BLOCK);
        let more = q.add(rows * dim);
        work.read_queries::<V, W>(&f.q, rows, q);
        empty(p, tile, state);
        for chunk in chunks {
            let start = chunk * CHUNK;
            let all = work.columns(0..rows, start);
            let first = all.start / PANEL * PANEL;
            let mut slots = [0; CHUNK];
            let slots = &mut slots[first..all.end.max(first)];
            if first < all.start {
                // Positions before the first visible one may have no page: any row serves in their place.
                p.slots(tile.segment, start + all.start, &mut slots[all.start - first..]);
                let (before, rest) = slots.split_at_mut(all.start - first);
                before.fill(rest[0]);
            } else {
                p.slots(tile.segment, start + first, slots);
            }
            pack_transposed::<V>((&f.k, as_type), slots, tile.kv_head, dim, k.add(first * dim));
            W::pack_right(&f.v, slots, tile.kv_head, p.v_dim, v.add(first / W::EACH * width));
            for m in (0..rows).step_by(BLOCK) {
                let n = (rows - m).min(BLOCK);
                let cols = work.columns(m..m + n, start);
                if cols.is_empty() {
                    continue;
                }
                let first = cols.start / PANEL * PANEL;
                let last = cols.end.next_multiple_of(UNIT);
                for panel in (first..last).step_by(PANEL) {
                    product::<V, W>(
                        n,
                        dim,
                        (last - panel).min(PANEL) / UNIT,
                        Left { at: q.add(m * dim), row: dim, step: 1 },
                        Right { at: k.add(panel * dim), row: PANEL },
                        Target { at: scores.add(panel), row: CHUNK, add: false },
                    );
                }
                for i in 0..n {
                    let s = scores.add(i * CHUNK);
                    work.weigh::<V, W>(m + i, start, s, first..last, more.add(i * row));
                }
                // Words of keys; what else they hold has weight 0.
                let keys = cols.start / W::EACH..cols.end.div_ceil(W::EACH);
                product::<V, W>(
                    n,
                    keys.len(),
                    width / UNIT,
                    Left { at: scores.add(keys.start), row: CHUNK, step: 1 },
                    Right { at: v.add(keys.start * width), row: width },
                    Target { at: more, row, add: false },
                );
                for i in 0..n {
                    merge::<V>(row, state.add((m + i) * row), more.add(i * row));
                }
            }
        }
    }
}

/// Turns scores `cols` of a row, still to be multiplied by `factor`, into weights `2^(s - max)`, 0 outside `seen`; returns
/// maximum and sum.
///
/// # Safety
/// `cols` are whole units of readable floats; the machine has V's instructions.
#[inline(always)]
unsafe fn softmax<V: Vector>(
    s: *mut f32,
    cols: Range<usize>,
    seen: Range<usize>,
    factor: Option<f32>,
    softcap: Option<f32>,
) -> (f32, f32) {
    let columns = || cols.clone().step_by(V::LANES);
    // SAFETY: the caller's contract.
    unsafe {
        if let Some(factor) = factor {
            for j in columns() {
                V::load(s.add(j)).mul(V::splat(factor)).store(s.add(j));
            }
        }
        if let Some(cap) = softcap {
            let cap = V::splat(cap * std::f32::consts::LOG2_E);
            for j in columns() {
                math::tanh(V::load(s.add(j))).mul(cap).store(s.add(j));
            }
        }
        for j in (cols.start..seen.start.min(cols.end)).chain(seen.end.max(cols.start)..cols.end) {
            *s.add(j) = f32::NEG_INFINITY;
        }
        let mut max = V::splat(f32::NEG_INFINITY);
        for j in columns() {
            max = V::load(s.add(j)).max_or(max);
        }
        let mut lanes = [0.0; 16];
        max.store(lanes.as_mut_ptr());
        let max = lanes[..V::LANES].iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        let at = V::splat(if max == f32::NEG_INFINITY { 0.0 } else { max });
        let mut sum = V::splat(0.0);
        for j in columns() {
            let w = exp2(V::load(s.add(j)).sub(at));
            w.store(s.add(j));
            sum = sum.add(w);
        }
        (max, sum.sum())
    }
}
