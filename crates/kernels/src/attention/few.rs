//! The forward pass for a tile of few rows, as decoding has them.
//!
//! One row reads each key once, so packing keys and values as `forward.rs` does for many rows costs more than the
//! products. Here keys are transposed in registers, multiplied at once and forgotten, and values are read where they
//! lie. Every element goes through the same operations in the same order as there, so the bits are the same: a token
//! decoded gives what it gives as part of a prompt.

use super::Forward;
use super::block::*;
use super::forward::{Tile, Work, empty, merge};
use super::problem::{Problem, Tensor};
use crate::matmul::scratch::Scratch;
use crate::mem::bytes_before;
use crate::simd::{Vector, prefetch};
use sparsam_dtype::DType;
use std::ops::Range;

/// The most rows (times heads) of such a tile.
const MOST: usize = BLOCK;

/// Registers of values at a time; with sums for [`MOST`] rows they fit AVX-512's 32 and, half as many, AVX2's 16.
const fn registers<V: Vector>() -> usize {
    if V::LANES == 16 { 4 } else { 2 }
}

/// Whether tiles of so few rows, and of whole registers of words of `each` numbers, are taken here.
pub(super) fn takes(p: &Problem, tile: &Tile, each: usize) -> bool {
    let rows = tile.rows.len() * p.group();
    rows <= MOST && p.dim.is_multiple_of(UNIT * each) && p.v_dim.is_multiple_of(UNIT)
}

/// As `forward.rs`'s tiles.
///
/// # Safety
/// As there; [`takes`] said yes.
#[inline(always)]
pub(super) unsafe fn tile<V: Registers, W: Words<V>>(
    f: &Forward,
    p: &Problem,
    tile: &Tile,
    chunks: Range<usize>,
    state: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        match tile.rows.len() * p.group() {
            1 => rows::<V, W, 1>(f, p, tile, chunks, state),
            2 => rows::<V, W, 2>(f, p, tile, chunks, state),
            3 => rows::<V, W, 3>(f, p, tile, chunks, state),
            4 => rows::<V, W, 4>(f, p, tile, chunks, state),
            5 => rows::<V, W, 5>(f, p, tile, chunks, state),
            _ => rows::<V, W, 6>(f, p, tile, chunks, state),
        }
    }
}

#[inline(always)]
unsafe fn rows<V: Registers, W: Words<V>, const M: usize>(
    f: &Forward,
    p: &Problem,
    tile: &Tile,
    chunks: Range<usize>,
    state: *mut f32,
) {
    let work = Work::of::<V, W>(f, p, tile);
    let Work { row, width, dim, as_type, .. } = work;
    let mut words = Scratch::of::<f32>(M * (CHUNK + dim + row));
    let scores: *mut f32 = words.ptr();
    // SAFETY: the pieces follow each other within the scratch buffer; everything else is the caller's promise.
    unsafe {
        let q = scores.add(M * CHUNK);
        let more = q.add(M * dim);
        work.read_queries::<V, W>(&f.q, M, q);
        empty(p, tile, state);
        for chunk in chunks {
            let start = chunk * CHUNK;
            let Range { start: low, end: high } = work.columns(0..M, start);
            if low == high {
                continue;
            }
            let mut slots = [0; CHUNK];
            p.slots(tile.segment, start + low, &mut slots[low..high]);
            // Whole registers of keys: one that is there serves for those beyond, which nobody sees.
            let whole = low / UNIT * UNIT..high.next_multiple_of(UNIT);
            let (first, last) = (slots[low], slots[high - 1]);
            slots[whole.start..low].fill(first);
            slots[high..whole.end].fill(last);
            for j in whole.clone().step_by(V::LANES) {
                // The cache of a long text comes from memory: the next keys, and the values for afterwards.
                for &slot in &slots[j..j + V::LANES] {
                    fetch(&f.v, slot, tile.kv_head, p.v_dim);
                }
                for &slot in &slots[(j + 2 * V::LANES).min(whole.end)..(j + 3 * V::LANES).min(whole.end)] {
                    fetch(&f.k, slot, tile.kv_head, p.dim);
                }
                let mut from = [std::ptr::null::<u8>(); 16];
                for i in 0..V::LANES {
                    from[i] = f.k.at(slots[j + i], tile.kv_head);
                }
                keys::<V, W, M>(as_type, &from, dim, q, scores.add(j));
            }
            for m in 0..M {
                work.weigh::<V, W>(m, start, scores.add(m * CHUNK), whole.clone(), more.add(m * row));
            }
            let first = low / W::EACH;
            let seen = Seen {
                slots: &slots[first * W::EACH..high.next_multiple_of(W::EACH)],
                head: tile.kv_head,
                weights: scores.add(first),
            };
            let mut d = 0;
            while d < width {
                let n = ((width - d) / V::LANES).min(registers::<V>());
                match n {
                    4 => values::<V, W, M, 4>(&f.v, &seen, d, more, row),
                    3 => values::<V, W, M, 3>(&f.v, &seen, d, more, row),
                    2 => values::<V, W, M, 2>(&f.v, &seen, d, more, row),
                    _ => values::<V, W, M, 1>(&f.v, &seen, d, more, row),
                }
                d += n * V::LANES;
            }
            for m in 0..M {
                merge::<V>(row, state.add(m * row), more.add(m * row));
            }
        }
    }
}

/// Asks for the cache lines of `[slot, head, ..width]`.
#[inline(always)]
fn fetch(t: &Tensor, slot: usize, head: usize, width: usize) {
    let from = t.at(slot, head).cast_const();
    for line in (0..bytes_before(t.dtype, width)).step_by(64) {
        prefetch(from.wrapping_add(line));
    }
}

/// Scores of one register of keys: `to[m][0 .. LANES]`, rows a chunk apart.
///
/// # Safety
/// `from` are `LANES` keys of `dim` words, a multiple of [`UNIT`]; `q` is `[M][dim]`.
#[inline(always)]
unsafe fn keys<V: Registers, W: Words<V>, const M: usize>(
    dtype: DType,
    from: &[*const u8; 16],
    dim: usize,
    q: *const f32,
    to: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut sum = [V::splat(0.0); M];
        for d in (0..dim).step_by(V::LANES) {
            let mut rows = [V::splat(0.0); 16];
            match dtype {
                DType::F32 => {
                    for i in 0..V::LANES {
                        rows[i] = V::load(from[i].cast::<f32>().add(d));
                    }
                }
                DType::F16 => {
                    for i in 0..V::LANES {
                        rows[i] = V::load_f16(from[i].cast::<u16>().add(d));
                    }
                }
                DType::Q8_0 => {
                    for i in 0..V::LANES {
                        rows[i] = V::load_q8_0(from[i], d);
                    }
                }
                _ => {
                    for i in 0..V::LANES {
                        rows[i] = V::load_bf16(from[i].cast::<u16>().add(d));
                    }
                }
            }
            V::transpose(&mut rows);
            for i in 0..V::LANES {
                for m in 0..M {
                    sum[m] = W::step(V::splat(*q.add(m * dim + d + i)), rows[i], sum[m]);
                }
            }
        }
        for m in 0..M {
            sum[m].store(to.add(m * CHUNK));
        }
    }
}

/// Keys of a chunk that some row sees, from a whole word on.
struct Seen<'a> {
    /// Whole words.
    slots: &'a [usize],
    head: usize,
    /// Weights in words, `[M]`, rows a chunk apart.
    weights: *const f32,
}

/// `N` registers of each row's weighted values, from element `d` on, into rows of `row` floats.
///
/// # Safety
/// The slots and elements `d ..` of `v` exist, and so do the weights.
#[inline(always)]
unsafe fn values<V: Vector, W: Words<V>, const M: usize, const N: usize>(
    v: &Tensor,
    seen: &Seen,
    d: usize,
    to: *mut f32,
    row: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut sum = [[V::splat(0.0); N]; M];
        for (word, slots) in seen.slots.chunks_exact(W::EACH).enumerate() {
            let first = v.at(slots[0], seen.head).cast_const();
            let last = v.at(slots[W::EACH - 1], seen.head).cast_const();
            let mut x = [V::splat(0.0); N];
            for j in 0..N {
                x[j] = W::right(v.dtype, [first, last], d + j * V::LANES);
            }
            for m in 0..M {
                let a = V::splat(*seen.weights.add(m * CHUNK + word));
                for j in 0..N {
                    sum[m][j] = W::step(a, x[j], sum[m][j]);
                }
            }
        }
        for m in 0..M {
            for j in 0..N {
                sum[m][j].store(to.add(m * row + d + j * V::LANES));
            }
        }
    }
}
