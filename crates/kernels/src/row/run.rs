//! Runs tile code over all tiles, on one thread or many.
//!
//! The work is cut by sizes that follow from the code alone (tiles, tasks of about [`TASK`] elements, slabs of tiles
//! for column sums, pieces of long rows), so which thread does what changes nothing.

use super::code::{Ins, Place, Stream, Tiled};
use super::exec::{self, Slot, Tile};
use crate::mem::Ptr;
use crate::{AlignedBytes, Context, Simd};
use std::cell::RefCell;

/// Elements of one task: some 5 us of work against 0.2 us to claim it.
const TASK: usize = 16 * 1024;

/// Up to this many elements a call stays on its thread: 1 to 3 us of work.
const SMALL: usize = 8 * 1024;

/// Most slabs of column sums: enough for any number of threads, few enough to add up.
const SLABS: usize = 64;

/// Uniform registers that fit the stack.
const STACK_UNIFORMS: usize = 96;

/// What one thread works in, kept from call to call.
#[derive(Default)]
struct Scratch {
    registers: AlignedBytes,
    slots: Vec<Slot>,
    /// Addresses of inputs and outputs at the start of the current tile.
    bases: Vec<*mut u8>,
    /// Reductions over the pieces of a row so far.
    totals: Vec<f64>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// One call.
struct Call<'a> {
    tiled: &'a Tiled,
    stream: &'a Stream,
    simd: Simd,
    uniforms: Ptr,
    ins: &'a [Ptr],
    outs: &'a [Ptr],
}

/// Runs `tiled` on resolved operands.
///
/// # Safety
/// `ins` and `outs` are resolved for views that lie as the code was made for; `ctx` runs what its machine has.
pub(super) unsafe fn run(
    ctx: &Context,
    tiled: &Tiled,
    ins: &[Ptr],
    outs: &[Ptr],
    sum_columns: impl Fn(usize) -> usize,
) {
    let clash = tiled.fast.hazards.iter().any(|&(o, i)| std::ptr::eq(outs[o].0, ins[i].0));
    let stream = match &tiled.safe {
        Some(safe) if clash => safe,
        _ => &tiled.fast,
    };
    let mut stack = [0f32; STACK_UNIFORMS];
    let mut heap = Vec::new();
    let uniforms = if tiled.uniforms.len() <= STACK_UNIFORMS {
        stack[..tiled.uniforms.len()].copy_from_slice(&tiled.uniforms);
        stack.as_mut_ptr()
    } else {
        heap.extend_from_slice(&tiled.uniforms);
        heap.as_mut_ptr()
    };
    let call = Call { tiled, stream, simd: ctx.cpu().simd, uniforms: Ptr(uniforms.cast()), ins, outs };
    if !stream.uniform.is_empty() {
        call.work(|w| {
            w.tile = Tile { no: 1, ni: 1, w: 1, ..w.tile };
            // SAFETY: uniform instructions read inputs of one element and write uniform registers.
            unsafe { w.exec(&stream.uniform) }
        });
    }
    let (_, _, tiles) = tiled.blocks();
    let elements = tiled.rows() * tiled.width;
    let run_tasks = |tasks: usize, task: &(dyn Fn(usize) + Sync)| {
        if elements <= SMALL { (0..tasks).for_each(task) } else { ctx.pool().run(tasks, task) }
    };
    let per_tile = (tiled.tile_rows() * tiled.width).max(1);
    let threads = ctx.pool().threads();
    if tiled.in_pieces() && threads > 1 && tiles < 4 * threads && tiled.sums.is_empty() {
        return (0..tiles).for_each(|row| call.long_row(ctx, row));
    }
    let many = |first: usize, last: usize, sums: *mut f32| {
        call.work(|w| {
            w.sums = sums;
            for t in first..last {
                w.place(t);
                // SAFETY: `place` points the slots at a tile within the operands; tiles are disjoint in outputs.
                unsafe { w.tile() }
            }
        });
    };
    if tiled.sums.is_empty() {
        let per_task = (TASK / per_tile).max(1);
        let tasks = tiles.div_ceil(per_task);
        return run_tasks(tasks, &|t| {
            many(t * per_task, ((t + 1) * per_task).min(tiles), std::ptr::null_mut())
        });
    }
    let per_slab = (TASK / per_tile).max(tiles.div_ceil(SLABS)).max(1);
    let slabs = tiles.div_ceil(per_slab);
    let len = tiled.sums_len();
    let mut sums = AlignedBytes::zeroed(slabs * len * 4);
    let base = Ptr(sums.bytes_mut().as_mut_ptr());
    run_tasks(slabs, &|s| {
        let own = base.get().cast::<f32>().wrapping_add(s * len);
        many(s * per_slab, ((s + 1) * per_slab).min(tiles), own);
    });
    let sums: &[f32] = bytemuck::cast_slice(sums.bytes());
    for sum in &tiled.sums {
        let place = &tiled.outs[sum.output];
        let out = outs[sum.output];
        let total = |c: usize| {
            (0..slabs).fold(0.0, |total, s| total + sums[s * len + sum.at + if sum.wide { c } else { 0 }])
        };
        /// Columns of one task.
        const COLUMNS: usize = 1024;
        let n = sum_columns(sum.output);
        let write = |t: usize| {
            for c in t * COLUMNS..((t + 1) * COLUMNS).min(n) {
                // SAFETY: column `c` of a resolved output; each is written once.
                unsafe { crate::convert::set(place.dtype, out.get(), c * place.step, total(c)) }
            }
        };
        let tasks = n.div_ceil(COLUMNS);
        if n * slabs <= SMALL { (0..tasks).for_each(write) } else { ctx.pool().run(tasks, write) }
    }
}

/// A thread at work on a call: its slots and the tile that they point at.
struct Worker<'a> {
    call: &'a Call<'a>,
    slots: &'a mut [Slot],
    bases: &'a mut Vec<*mut u8>,
    totals: &'a mut Vec<f64>,
    narrow: *mut f32,
    /// This slab's column sums.
    sums: *mut f32,
    tile: Tile,
}

/// f32 of a narrow register.
fn narrow_len(tiled: &Tiled) -> usize {
    tiled.tile_rows().next_multiple_of(16)
}

impl Call<'_> {
    /// Hands this thread's scratch, its registers in place, to `f`.
    fn work<R>(&self, f: impl FnOnce(&mut Worker) -> R) -> R {
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { registers, slots, bases, totals } = scratch;
            let tiled = self.tiled;
            let (narrow, wide) = (narrow_len(tiled), tiled.register());
            let bytes = (tiled.narrows * narrow + self.stream.wide * wide) * 4;
            if registers.len() < bytes {
                *registers = AlignedBytes::zeroed(bytes.next_multiple_of(16 * 1024));
            }
            let base = registers.bytes_mut().as_mut_ptr().cast::<f32>();
            slots.clear();
            let slot = |ptr: *mut f32, outer, inner| Slot { ptr: ptr.cast(), outer, inner };
            let uniforms = self.uniforms.get().cast::<f32>();
            slots.extend((0..tiled.uniforms.len()).map(|i| slot(uniforms.wrapping_add(i), 0, 0)));
            let at = |i: usize| base.wrapping_add(i * narrow);
            slots.extend((0..tiled.narrows).map(|i| slot(at(i), tiled.ni, 1)));
            let strides = |p: &Place| match p.lead[..] {
                [.., outer, inner] => (outer, inner),
                [inner] => (0, inner),
                [] => (0, 0),
            };
            for (p, ptr) in tiled.ins.iter().zip(self.ins).chain(tiled.outs.iter().zip(self.outs)) {
                let (outer, inner) = strides(p);
                slots.push(Slot { ptr: ptr.get(), outer, inner });
            }
            slots.extend(tiled.sums.iter().map(|_| slot(std::ptr::null_mut(), 0, 0)));
            let first = at(tiled.narrows);
            slots.extend(
                (0..self.stream.wide)
                    .map(|i| slot(first.wrapping_add(i * wide), tiled.ni * tiled.pitch, tiled.pitch)),
            );
            bases.clear();
            bases.extend(self.ins.iter().chain(self.outs).map(|p| p.get()));
            let tile = Tile {
                no: tiled.no,
                ni: tiled.ni,
                w: tiled.width,
                column: 0,
                row: 0,
                row_outer: tiled.lead.last().copied().unwrap_or(1),
                width: tiled.width,
            };
            let sums = std::ptr::null_mut();
            f(&mut Worker { call: self, slots, bases, totals, narrow: base, sums, tile })
        })
    }

    /// Runs one row, its pieces shared out among the threads: bit for bit what [`Worker::tile`] gives.
    fn long_row(&self, ctx: &Context, row: usize) {
        let tiled = self.tiled;
        let pieces = tiled.width.div_ceil(tiled.piece);
        let per_task = (TASK / tiled.piece).max(1);
        let n_narrow = tiled.narrows * narrow_len(tiled);
        let mut narrow = vec![0f32; n_narrow];
        for phase in &self.stream.phases {
            self.work(|w| {
                w.place(row);
                w.narrow_registers().copy_from_slice(&narrow);
                // SAFETY: `place` points the slots at a row within the operands.
                unsafe { w.exec(&phase.narrow) }
                narrow.copy_from_slice(w.narrow_registers());
            });
            if phase.piece.is_empty() {
                continue;
            }
            let n = phase.reduces.len();
            let mut parts = vec![0f32; pieces * n];
            let parts_ptr = Ptr(parts.as_mut_ptr().cast());
            ctx.pool().run(pieces.div_ceil(per_task), |t| {
                self.work(|w| {
                    w.place(row);
                    w.narrow_registers().copy_from_slice(&narrow);
                    for p in t * per_task..((t + 1) * per_task).min(pieces) {
                        // SAFETY: the piece lies within the row; pieces are disjoint in outputs and in `parts`.
                        unsafe {
                            w.piece(&phase.piece, p);
                            for (k, &(register, _)) in phase.reduces.iter().enumerate() {
                                let part = parts_ptr.get().cast::<f32>().add(p * n + k);
                                *part = *w.narrow.add(register * narrow_len(tiled));
                            }
                        }
                    }
                });
            });
            for (k, &(register, sum)) in phase.reduces.iter().enumerate() {
                let total = (0..pieces).fold(start(sum), |total, p| join(sum, total, parts[p * n + k]));
                narrow[register * narrow_len(tiled)] = total as f32;
            }
        }
        self.work(|w| {
            w.place(row);
            w.narrow_registers().copy_from_slice(&narrow);
            // SAFETY: as above.
            unsafe { w.exec(&self.stream.end) }
        });
    }
}

fn start(sum: bool) -> f64 {
    if sum { 0.0 } else { f64::NEG_INFINITY }
}

/// One more part of a sum or maximum.
fn join(sum: bool, total: f64, part: f32) -> f64 {
    let part = part as f64;
    match sum {
        true => total + part,
        false if total.is_nan() || total > part => total,
        false => part,
    }
}

impl Worker<'_> {
    /// # Safety
    /// The slots are valid for what `list` names in the current tile.
    unsafe fn exec(&mut self, list: &[Ins]) {
        // SAFETY: the caller's contract; the context has the instructions.
        unsafe { exec::run(self.call.simd, list.as_ptr(), list.len(), self.slots.as_ptr(), &self.tile) }
    }

    fn narrow_registers(&mut self) -> &mut [f32] {
        let tiled = self.call.tiled;
        // SAFETY: `work` made room for them at the start of the scratch, which this worker holds alone.
        unsafe { std::slice::from_raw_parts_mut(self.narrow, tiled.narrows * narrow_len(tiled)) }
    }

    /// Points inputs and outputs at tile `t`.
    fn place(&mut self, t: usize) {
        let tiled = self.call.tiled;
        let (inner, outer, _) = tiled.blocks();
        let m = tiled.lead.len();
        let first_inner = t % inner * tiled.ni;
        let first_outer = t / inner % outer * tiled.no;
        let rest = t / inner / outer;
        let n_inner = tiled.lead.last().copied().unwrap_or(1);
        let n_outer = if m > 1 { tiled.lead[m - 2] } else { 1 };
        self.tile.ni = tiled.ni.min(n_inner - first_inner);
        self.tile.no = tiled.no.min(n_outer - first_outer);
        self.tile.row = (rest * n_outer + first_outer) * n_inner + first_inner;
        self.tile.w = tiled.width;
        self.tile.column = 0;
        let first = tiled.in_slot(0);
        let operands = self.call.ins.iter().chain(self.call.outs);
        for (k, (place, ptr)) in tiled.ins.iter().chain(&tiled.outs).zip(operands).enumerate() {
            let mut at = 0;
            if m > 0 {
                at += first_inner * place.lead[m - 1];
            }
            if m > 1 {
                at += first_outer * place.lead[m - 2];
                let mut rest = rest;
                for a in (0..m - 2).rev() {
                    at += rest % tiled.lead[a] * place.lead[a];
                    rest /= tiled.lead[a];
                }
            }
            let ptr = ptr.get().wrapping_add(at * place.dtype.block_bytes());
            self.slots[first + k].ptr = ptr;
            self.bases[k] = ptr;
        }
        self.point_sums(0);
    }

    /// Runs the current tile.
    ///
    /// # Safety
    /// `place` was called; no other thread touches its outputs.
    unsafe fn tile(&mut self) {
        let (tiled, stream) = (self.call.tiled, self.call.stream);
        if !tiled.in_pieces() {
            // SAFETY: the caller's contract.
            return unsafe { self.exec(&stream.phases[0].piece) };
        }
        let pieces = tiled.width.div_ceil(tiled.piece);
        for phase in &stream.phases {
            // SAFETY: the caller's contract.
            unsafe { self.exec(&phase.narrow) }
            if phase.piece.is_empty() {
                continue;
            }
            self.totals.clear();
            self.totals.extend(phase.reduces.iter().map(|&(_, sum)| start(sum)));
            for p in 0..pieces {
                // SAFETY: the caller's contract.
                unsafe { self.piece(&phase.piece, p) }
                for (total, &(register, sum)) in self.totals.iter_mut().zip(&phase.reduces) {
                    // SAFETY: a narrow register of this worker.
                    let part = unsafe { *self.narrow.add(register * narrow_len(tiled)) };
                    *total = join(sum, *total, part);
                }
            }
            for (total, &(register, _)) in self.totals.iter().zip(&phase.reduces) {
                // SAFETY: as above.
                unsafe { *self.narrow.add(register * narrow_len(tiled)) = *total as f32 }
            }
            self.whole_row();
        }
        // SAFETY: the caller's contract.
        unsafe { self.exec(&stream.end) }
    }

    /// Runs `list` on piece `p` of the current row.
    ///
    /// # Safety
    /// As for [`Worker::tile`].
    unsafe fn piece(&mut self, list: &[Ins], p: usize) {
        let tiled = self.call.tiled;
        let column = p * tiled.piece;
        let first = tiled.in_slot(0);
        for (k, place) in tiled.ins.iter().chain(&tiled.outs).enumerate().filter(|(_, p)| p.wide) {
            self.slots[first + k].ptr =
                self.bases[k].wrapping_add(column * place.step * place.dtype.block_bytes());
        }
        self.point_sums(column);
        self.tile.column = column;
        self.tile.w = tiled.piece.min(tiled.width - column);
        // SAFETY: the caller's contract.
        unsafe { self.exec(list) }
    }

    /// Points column sums at the slab's own, from `column` on.
    fn point_sums(&mut self, column: usize) {
        let tiled = self.call.tiled;
        for (i, sum) in tiled.sums.iter().enumerate() {
            let at = sum.at + if sum.wide { column } else { 0 };
            self.slots[tiled.sum_slot(i)].ptr = self.sums.wrapping_add(at).cast();
        }
    }

    /// Points the slots at the start of the row again.
    fn whole_row(&mut self) {
        let tiled = self.call.tiled;
        let first = tiled.in_slot(0);
        for (k, base) in self.bases.iter().enumerate() {
            self.slots[first + k].ptr = *base;
        }
        self.tile.column = 0;
        self.tile.w = tiled.width;
    }
}
