//! The backward pass in tiles: Dao et al. 2022, algorithm 4, with one recomputation of the scores for all three
//! gradients, hence 5 products where keeping the weights would take 4.
//!
//! Rows and keys of a sequence are cut into blocks of [`EDGE`]. A task takes one block of rows against one block of
//! keys with one key head and adds to dq of the first, dk and dv of the second. Tasks run in waves: in wave w block `j`
//! of keys meets block `j + w` of rows, so that no two tasks of a wave add to the same place and each place is added to
//! in one fixed order, whatever the number of threads; sums need no memory beside the gradients.

use super::Backward;
use super::block::*;
use super::problem::{Problem, Tensor};
use crate::matmul::scratch::{Scratch, Shared};
use crate::simd::{Vector, dispatch, math};
use crate::{Context, Cpu};
use sparsam_dtype::DType;
use std::ops::Range;

/// Rows and keys of a block. For heads of 64 a task holds K twice and V once (3 x 64 KiB), dk and dv (128 KiB), and for
/// [`PART`] rows q, dout and dq (72 KiB) with two matrices of 96 x 272 x 4 = 102 KiB each: about 600 KiB of a second
/// level of 1 MiB. Packing and adding up cost less than 2% of the products.
const EDGE: usize = 256;

/// Rows whose weights and score gradients are held at once: a multiple of [`BLOCK`].
const PART: usize = 96;

/// Floats from one row of weights to the next: 17 lines, an odd number, so that a column of rows spreads over all sets
/// of the first-level cache.
const STRIDE: usize = EDGE + UNIT;

/// Blocks along the side of a square that one task goes through: its 1024 rows and keys take 7 x 256 KiB for heads of
/// 64, which the last-level cache keeps while they meet.
const SIDE: usize = 4;

/// Rows that see no row before the first.
struct Span {
    rows: Range<usize>,
}

impl Span {
    fn block(&self, b: usize) -> Range<usize> {
        let start = self.rows.start + b * EDGE;
        start.min(self.rows.end)..self.rows.end.min(start + EDGE)
    }
}

pub(super) fn backward(ctx: &Context, b: &Backward, p: &Problem) {
    let mut deltas = Scratch::of::<f32>(p.n * p.heads);
    let deltas = deltas.shared::<f32>();
    ctx.pool().run(p.n.div_ceil(EDGE), |t| {
        let zeros = vec![0.0; p.dim.max(p.v_dim)];
        for i in t * EDGE..p.n.min((t + 1) * EDGE) {
            // SAFETY: `packed_backward` checked the shapes, and row i belongs to one task.
            unsafe {
                for h in 0..p.heads {
                    b.dq.write(i, h, &zeros[..p.dim]);
                    let row = |t: &Tensor| t.at(i, h).cast::<f32>().cast_const();
                    *deltas.at(i * p.heads + h) = dot(ctx.cpu().simd, row(&b.dout), row(&b.out), p.v_dim);
                }
                (0..p.kv_heads).for_each(|g| b.dk.write(i, g, &zeros[..p.dim]));
                (0..p.kv_heads).for_each(|g| b.dv.write(i, g, &zeros[..p.v_dim]));
            }
        }
    });
    // Sequences, from the last to the first: segments belong together if a later one sees rows of an earlier one.
    let mut spans: Vec<Span> = vec![];
    for segment in p.segments.iter().rev() {
        let (mut start, mut end) = (segment.base(), segment.rows.end);
        while let Some(later) = spans.pop_if(|later| later.rows.start < end) {
            (start, end) = (start.min(later.rows.start), end.max(later.rows.end));
        }
        spans.push(Span { rows: start..end });
    }
    // Squares of blocks where there are tasks enough: their rows and keys then come from the last-level cache. The
    // order in which a place is added to is the same: for rows keys from the last to the first, for keys rows from
    // the first to the last.
    let side = if p.kv_heads >= 2 * ctx.pool().threads() { SIDE } else { 1 };
    // A row sees at most this many squares back.
    let reach = p.scores.window.map_or(usize::MAX, |w| w.div_ceil(EDGE * side));
    for wave in 0.. {
        let meet = |s: &Span| s.rows.len().div_ceil(EDGE * side).saturating_sub(wave);
        let tasks: Vec<(&Span, usize)> =
            spans.iter().flat_map(|s| (0..meet(s)).map(move |j| (s, j))).collect();
        if tasks.is_empty() || wave > reach {
            break;
        }
        ctx.pool().run(tasks.len() * p.kv_heads, |t| {
            let (span, j) = tasks[t % tasks.len()];
            let blocks = |square: usize| square * side..(square + 1) * side;
            for key in blocks(j).rev() {
                for row in blocks(j + wave) {
                    let (rows, keys) = (span.block(row), span.block(key));
                    let kv_head = t / tasks.len();
                    let task = Task { b, p, deltas, rows, keys, kv_head };
                    if row >= key && !task.rows.is_empty() {
                        // SAFETY: `packed_backward` checked the shapes that bound rows and heads; within a wave each
                        // block of rows and each block of keys belongs to one task; the machine has the instructions.
                        unsafe { run_task(ctx.cpu(), &task) };
                    }
                }
            }
        });
    }
}

dispatch! {
    unsafe fn dot(a: *const f32, b: *const f32, n: usize) -> f32 = dot_of
}

/// The sum of `n` products.
#[inline(always)]
unsafe fn dot_of<V: Vector>(a: *const f32, b: *const f32, n: usize) -> f32 {
    // SAFETY: the caller's contract: `n` elements at both.
    unsafe {
        let mut sum = V::splat(0.0);
        for d in (0..n).step_by(V::LANES) {
            let at = |p: *const f32| load::<V>(DType::F32, p.cast(), d, (n - d).min(V::LANES));
            sum = at(a).fma(at(b), sum);
        }
        sum.sum()
    }
}

/// The operands of a task, and which rows, keys and key head it has.
struct Task<'a> {
    b: &'a Backward,
    p: &'a Problem,
    /// (N, n_heads): rowsum(dout * out).
    deltas: Shared<f32>,
    rows: Range<usize>,
    keys: Range<usize>,
    kv_head: usize,
}

dispatch! {
    unsafe fn run_single(t: &Task) = single
}

#[inline(always)]
unsafe fn single<V: Registers>(t: &Task) {
    // SAFETY: the caller's contract.
    unsafe { task::<V, Single>(t) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn run_pairs(t: &Task) {
    // SAFETY: the caller's contract.
    unsafe { task::<crate::simd::Avx512, Pairs>(t) }
}

unsafe fn run_task(cpu: Cpu, t: &Task) {
    // SAFETY: the caller's contract.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if t.p.pairs(cpu, &[&t.b.k, &t.b.v]) {
            return run_pairs(t);
        }
        run_single(cpu.simd, t)
    }
}

#[inline(always)]
unsafe fn task<V: Registers, W: Words<V>>(t: &Task) {
    let Task { b, p, deltas, kv_head, .. } = *t;
    let (rows, keys) = (t.rows.clone(), t.keys.clone());
    let group = p.group();
    let (dim, v_dim) = (p.dim.next_multiple_of(UNIT), p.v_dim.next_multiple_of(UNIT));
    // Columns of the block that row i sees. Row i's keys end with i.
    let seen = |i: usize| {
        let first = i + 1 - p.visible[i].len();
        let inside = |x: usize| x.clamp(keys.start, keys.end) - keys.start;
        inside(first)..inside(i + 1)
    };
    let union = |rows: Range<usize>| {
        let all = rows.map(seen).filter(|r| !r.is_empty());
        let (low, high) = all.fold((EDGE, 0), |(l, h), r| (l.min(r.start), h.max(r.end)));
        low.min(high)..high
    };
    if union(rows.clone()).is_empty() {
        return;
    }
    let pairs = W::EACH - 1; // 1 where words are pairs
    let (k_words, v_words) = (p.dim / W::EACH, p.v_dim / W::EACH);
    let as_type = if W::EACH == 2 { DType::F32 } else { b.k.dtype };
    let sizes = [
        EDGE * k_words,           // K, transposed
        EDGE * v_words,           // V, transposed
        EDGE / W::EACH * dim,     // K, summed over keys
        EDGE * dim,               // dk
        EDGE * v_dim,             // dv
        PART * dim,               // q
        PART * v_dim,             // dout
        pairs * PART / 2 * dim,   // q, pairs of rows
        pairs * PART / 2 * v_dim, // dout, likewise
        PART * dim,               // dq
        PART / W::EACH * STRIDE,  // weights
        PART / W::EACH * STRIDE,  // gradients of scores
        pairs * BLOCK * STRIDE,   // weights of a block of rows before they are paired
        pairs * BLOCK * STRIDE,   // gradients, likewise
    ];
    let mut words = Scratch::of::<f32>(sizes.iter().sum());
    let mut at = words.ptr::<f32>();
    let mut take = |i: usize| {
        let here = at;
        at = at.wrapping_add(sizes[i]);
        here
    };
    let (kt, vt, k, dk, dv) = (take(0), take(1), take(2), take(3), take(4));
    let (q, dout, q_rows, dout_rows, dq) = (take(5), take(6), take(7), take(8), take(9));
    let (weights, grads, w_block, g_block) = (take(10), take(11), take(12), take(13));
    // Right sides of the products that sum over rows.
    let (dout_right, q_right) = if W::EACH == 2 { (dout_rows, q_rows) } else { (dout, q) };
    let (scale, cap) = (p.scores.scale, p.scores.softcap);
    // Scores in base 2 (or inputs of tanh), as the forward pass has them.
    let factor = cap.map_or(scale * std::f32::consts::LOG2_E, |cap| scale / cap);
    let scores_factor = (W::EACH == 2).then_some(factor);
    // dk is made of q times the factor, or of q itself.
    let dk_factor = if W::EACH == 2 { scale } else { cap.unwrap_or(std::f32::consts::LN_2) };
    let mut slots = [0; EDGE];
    let slots = &mut slots[..keys.len()];
    slots.iter_mut().zip(keys.clone()).for_each(|(s, key)| *s = key);
    // SAFETY: the pieces follow each other within the scratch buffer; everything else is `backward`'s promise.
    unsafe {
        pack_transposed::<V>((&b.k, as_type), slots, kv_head, k_words, kt);
        pack_transposed::<V>((&b.v, as_type), slots, kv_head, v_words, vt);
        W::pack_right(&b.k, slots, kv_head, p.dim, k);
        std::slice::from_raw_parts_mut(dk, keys.len() * dim).fill(0.0);
        std::slice::from_raw_parts_mut(dv, keys.len() * v_dim).fill(0.0);
        let all = rows.len() * group;
        for part in (0..all).step_by(PART) {
            let n = (all - part).min(PART);
            let place = |m: usize| (rows.start + (part + m) / group, kv_head * group + (part + m) % group);
            let mut stats = [(0.0f32, 0.0f32); PART]; // log-sum-exp in base 2, rowsum(dout * out)
            for m in 0..n.next_multiple_of(W::EACH) {
                let to_q = std::slice::from_raw_parts_mut(q.add(m * dim), dim);
                let to_dout = std::slice::from_raw_parts_mut(dout.add(m * v_dim), v_dim);
                to_q.fill(0.0);
                to_dout.fill(0.0);
                let (i, h) = place(m);
                // What padding holds must not reach any gradient, were it NaN.
                if m < n && !p.visible[i].is_empty() {
                    b.q.read(i, h, &mut to_q[..p.dim]);
                    if W::EACH == 1 {
                        to_q.iter_mut().for_each(|x| *x *= factor);
                    }
                    b.dout.read(i, h, &mut to_dout[..p.v_dim]);
                    let mut lse = [0.0];
                    b.lse.read(i, h, &mut lse);
                    stats[m] = (lse[0] * std::f32::consts::LOG2_E, *deltas.at(i * p.heads + h));
                }
                if W::EACH == 2 && m % 2 == 1 {
                    // The right sides of sums over rows, then in place the left sides of sums over numbers.
                    for (from, to, width) in [(q, q_rows, dim), (dout, dout_rows, v_dim)] {
                        let (first, second) = (from.add((m - 1) * width), from.add(m * width));
                        W::interleave(first, second, to.add(m / 2 * width), 0..width);
                        W::narrow(first, 0..width);
                        W::narrow(second, 0..width);
                    }
                }
            }
            let rows_of = |m: Range<usize>| place(m.start).0..place(m.end - 1).0 + 1;
            let total = union(rows_of(0..n));
            if total.is_empty() {
                continue;
            }
            let (low, high) = (total.start / PANEL * PANEL, total.end.next_multiple_of(UNIT));
            let mut unions = [const { 0..0 }; PART / BLOCK];
            for m in (0..n).step_by(BLOCK) {
                let r = (n - m).min(BLOCK);
                let cols = union(rows_of(m..m + r));
                unions[m / BLOCK] = cols.clone();
                let (first, last) = (cols.start / PANEL * PANEL, cols.end.next_multiple_of(UNIT));
                let (w, g) = match W::EACH {
                    2 => (w_block, g_block),
                    _ => (weights.add(m * STRIDE), grads.add(m * STRIDE)),
                };
                let zero = |row: *mut f32, cols: Range<usize>| {
                    std::slice::from_raw_parts_mut(row.add(cols.start), cols.len()).fill(0.0);
                };
                // The rows of a block that no row sees, and the missing row of a pair, are 0.
                for i in if cols.is_empty() { 0 } else { r }..r.next_multiple_of(W::EACH) {
                    zero(w.add(i * STRIDE), low..high);
                    zero(g.add(i * STRIDE), low..high);
                }
                for panel in (first..last.max(first)).step_by(PANEL) {
                    let units = (last - panel).min(PANEL) / UNIT;
                    product::<V, W>(
                        r,
                        k_words,
                        units,
                        Left { at: q.add(m * dim), row: dim, step: 1 },
                        Right { at: kt.add(panel * k_words), row: PANEL },
                        Target { at: w.add(panel), row: STRIDE, add: false },
                    );
                    product::<V, W>(
                        r,
                        v_words,
                        units,
                        Left { at: dout.add(m * v_dim), row: v_dim, step: 1 },
                        Right { at: vt.add(panel * v_words), row: PANEL },
                        Target { at: g.add(panel), row: STRIDE, add: false },
                    );
                }
                for i in 0..if cols.is_empty() { 0 } else { r } {
                    let (w, g) = (w.add(i * STRIDE), g.add(i * STRIDE));
                    differentiate::<V>(w, g, first..last, stats[m + i], scores_factor, cap);
                    let seen = seen(place(m + i).0);
                    for x in [w, g] {
                        zero(x, low..seen.start.clamp(low, high));
                        zero(x, seen.end.clamp(low, high)..high);
                    }
                }
                if W::EACH == 2 {
                    for i in (0..r).step_by(2) {
                        let to = (m + i) / 2 * STRIDE;
                        for (from, to) in [(w, weights.add(to)), (g, grads.add(to))] {
                            W::interleave(from.add(i * STRIDE), from.add((i + 1) * STRIDE), to, low..high);
                        }
                    }
                    (0..r).for_each(|i| W::narrow(g.add(i * STRIDE), first..last.max(first)));
                }
                if cols.is_empty() {
                    continue;
                }
                // Words of keys; what else they hold has gradient 0.
                let words = cols.start / W::EACH..cols.end.div_ceil(W::EACH);
                product::<V, W>(
                    r,
                    words.len(),
                    dim / UNIT,
                    Left { at: g.add(words.start), row: STRIDE, step: 1 },
                    Right { at: k.add(words.start * dim), row: dim },
                    Target { at: dq.add(m * dim), row: dim, add: false },
                );
                for i in m..m + r {
                    let (row, h) = place(i);
                    add_to::<V>(b.dq.at(row, h).cast(), dq.add(i * dim), p.dim, scale);
                }
            }
            for key in (total.start..total.end).step_by(BLOCK) {
                let r = (total.end - key).min(BLOCK);
                // Blocks of rows that see any of these keys.
                let sees = |c: &Range<usize>| c.start < key + r && key < c.end;
                let blocks = &unions[..n.div_ceil(BLOCK)];
                let (Some(first), Some(last)) = (blocks.iter().position(sees), blocks.iter().rposition(sees))
                else {
                    continue;
                };
                let first = first * BLOCK / W::EACH;
                let last = n.min((last + 1) * BLOCK).div_ceil(W::EACH);
                for (from, with, width, to) in [(weights, dout_right, v_dim, dv), (grads, q_right, dim, dk)] {
                    product::<V, W>(
                        r,
                        last - first,
                        width / UNIT,
                        Left { at: from.add(first * STRIDE + key), row: 1, step: STRIDE },
                        Right { at: with.add(first * width), row: width },
                        Target { at: to.add(key * width), row: width, add: true },
                    );
                }
            }
        }
        for (c, key) in keys.enumerate() {
            add_to::<V>(b.dk.at(key, kv_head).cast(), dk.add(c * dim), p.dim, dk_factor);
            add_to::<V>(b.dv.at(key, kv_head).cast(), dv.add(c * v_dim), p.v_dim, 1.0);
        }
    }
}

/// From scores `w` (still to be multiplied by `factor`) and `g = dout . v`: weights into `w`, gradients of the (unscaled, uncapped) scores into `g`.
#[inline(always)]
unsafe fn differentiate<V: Vector>(
    w: *mut f32,
    g: *mut f32,
    cols: Range<usize>,
    (lse, delta): (f32, f32),
    factor: Option<f32>,
    softcap: Option<f32>,
) {
    // SAFETY: `cols` are whole units within both rows, and the caller has V's instructions.
    unsafe {
        let (lse, delta) = (V::splat(lse), V::splat(delta));
        for j in cols.step_by(V::LANES) {
            let mut s = V::load(w.add(j));
            if let Some(factor) = factor {
                s = s.mul(V::splat(factor));
            }
            let mut gradient = V::load(g.add(j)).sub(delta);
            if let Some(cap) = softcap {
                let t = math::tanh(s);
                s = t.mul(V::splat(cap * std::f32::consts::LOG2_E));
                gradient = gradient.mul(t.fnma(t, V::splat(1.0)));
            }
            let weight = exp2(s.sub(lse));
            weight.store(w.add(j));
            gradient.mul(weight).store(g.add(j));
        }
    }
}

/// `to += factor * from` for `n` elements; `from` is readable to whole units.
#[inline(always)]
unsafe fn add_to<V: Vector>(to: *mut f32, from: *const f32, n: usize, factor: f32) {
    for d in (0..n).step_by(V::LANES) {
        // SAFETY: the caller's contract.
        unsafe {
            let factor = V::splat(factor);
            let more = V::load(from.add(d));
            if n - d >= V::LANES {
                more.fma(factor, V::load(to.add(d))).store(to.add(d));
            } else {
                let sum = more.fma(factor, V::load_first(to.add(d), n - d));
                sum.store_first(to.add(d), n - d);
            }
        }
    }
}
