//! Data movement: copies between any strides and types, gather and scatter of rows.
//!
//! - `copy`: `out[..] = src[..]`, converted to `out`'s type.
//! - `gather`: `out[i, ..] = table[rows[i], ..]`.
//! - `scatter_rows`: `state[slots[i], ..] = values[i, ..]` for `i` in order; slot -1 skips a row.
//! - `scatter_add`: `out = 0; out[rows[i], ..] += values[i, ..]` for `i` in order.
//!
//! All move memory and compute nothing: the roof is the bandwidth. Axes that lie alike in both operands are merged, so
//! that the inner loop is as long as it can be.

use crate::blocks;
use crate::convert;
use crate::mem::{Ptr, bytes_before};
use crate::simd::{Vector, dispatch};
use crate::{Context, Error, Memory, Simd, View};
use sparsam_dtype::{DType, Layout, codec};

/// Elements that one task copies at least: about 10 us of work against 0.5 us to enter a region.
const TASK: usize = 32 * 1024;

/// Below this many elements a call stays on its thread.
const SMALL: usize = 16 * 1024;

fn shape_error(op: &'static str, what: String) -> Error {
    Error::Shape { op, what }
}

/// A strided piece at an address, as loops see it.
#[derive(Clone, Copy)]
struct Side {
    ptr: Ptr,
    dtype: DType,
    simd: Simd,
}

/// One loop over both operands.
#[derive(Clone, Copy, Debug)]
struct Axis {
    n: usize,
    out: usize,
    src: usize,
}

/// Axes of both layouts (equal shapes), those of length 1 left out, neighbours merged where both allow it. The order
/// is chosen so that the last axis is the one along which the output is densest.
fn merge(out: &Layout, src: &Layout) -> Vec<Axis> {
    let mut axes: Vec<Axis> = (0..out.shape.len())
        .map(|a| Axis { n: out.shape[a], out: out.strides[a], src: src.strides[a] })
        .filter(|a| a.n != 1)
        .collect();
    axes.sort_by_key(|a| std::cmp::Reverse(a.out)); // stable; strides of an output are distinct
    let mut merged: Vec<Axis> = Vec::new();
    for axis in axes {
        match merged.last_mut() {
            Some(last) if last.out == axis.n * axis.out && last.src == axis.n * axis.src => {
                *last = Axis { n: last.n * axis.n, ..axis };
            }
            _ => merged.push(axis),
        }
    }
    if merged.is_empty() {
        merged.push(Axis { n: 1, out: 1, src: 1 });
    }
    merged
}

/// Copies `src` to `out` (equal shapes, any strides), converting to `out`'s type.
///
/// Floats round to nearest even, to integers towards zero and saturating; equal types are copied bit for bit. Between F32
/// and a block format both lie row after row: blocks are decoded, or numbers rounded to the nearest codes.
///
/// # Errors
/// Unequal shapes, an output that writes an element many times, views out of bounds or overlapping.
pub fn copy(ctx: &Context, mem: &mut Memory, out: &View, src: &View) -> Result<(), Error> {
    let simd = ctx.cpu().simd;
    if out.layout.shape != src.layout.shape {
        let what = format!("out {:?}, src {:?}", out.layout.shape, src.layout.shape);
        return Err(shape_error("copy", what));
    }
    if out.dtype.is_block() || src.dtype.is_block() {
        return blocks::copy(ctx, mem, out, src);
    }
    check_writable("copy", out)?;
    let ([out_ptr], [src_ptr]) = mem.resolve([out], [src], true)?;
    if out.layout.numel() == 0 || (out_ptr.0 == src_ptr.0 && out.layout == src.layout) {
        return Ok(());
    }
    let (o, s) =
        (Side { ptr: out_ptr, dtype: out.dtype, simd }, Side { ptr: src_ptr, dtype: src.dtype, simd });
    let axes = merge(&out.layout, &src.layout);
    let (&inner, lead) = axes.split_last().expect("at least one axis");
    let lead_n: usize = lead.iter().map(|a| a.n).product();
    // Tasks are (lead index, piece of the inner axis), a fixed number of elements each.
    let pieces = inner.n.div_ceil(TASK);
    let rows_per_task = (TASK / inner.n).max(1);
    let tasks = if pieces > 1 { lead_n * pieces } else { lead_n.div_ceil(rows_per_task) };
    let run_row = |row: usize, from: usize, to: usize| {
        let (mut at_out, mut at_src, mut rest) = (from * inner.out, from * inner.src, row);
        for axis in lead.iter().rev() {
            at_out += rest % axis.n * axis.out;
            at_src += rest % axis.n * axis.src;
            rest /= axis.n;
        }
        // SAFETY: `resolve` checked both layouts against their slabs; tasks write disjoint elements because an
        // output's strides are distinct and each index is visited once.
        unsafe { copy_run(o, at_out, inner.out, s, at_src, inner.src, to - from) }
    };
    let task = |t: usize| {
        if pieces > 1 {
            let from = t % pieces * TASK;
            run_row(t / pieces, from, (from + TASK).min(inner.n));
        } else {
            let first = t * rows_per_task;
            (first..(first + rows_per_task).min(lead_n)).for_each(|row| run_row(row, 0, inner.n));
        }
    };
    run_tasks(ctx, out.layout.numel(), tasks, task);
    Ok(())
}

/// Runs tasks on the pool, or here if there is little to do.
fn run_tasks(ctx: &Context, elements: usize, tasks: usize, task: impl Fn(usize) + Sync) {
    if elements <= SMALL { (0..tasks).for_each(task) } else { ctx.pool().run(tasks, task) }
}

/// Refuses outputs in which an index writes the element of another.
fn check_writable(op: &'static str, out: &View) -> Result<(), Error> {
    match writes_apart(&out.layout) {
        true => Ok(()),
        false => Err(shape_error(op, format!("output {:?} writes one element many times", out.layout))),
    }
}

/// Whether no two indices share an element, as far as strides sorted by size tell (each past the reach of those
/// before it): true of all that slices and permutations make.
pub(crate) fn writes_apart(l: &Layout) -> bool {
    let mut axes: Vec<(usize, usize)> =
        l.shape.iter().copied().zip(l.strides.iter().copied()).filter(|&(n, _)| n > 1).collect();
    axes.sort_by_key(|&(_, s)| s);
    let mut reach = 0; // the farthest element that the axes so far touch
    axes.into_iter().all(|(n, s)| {
        let apart = s > reach;
        reach += (n - 1) * s;
        apart
    })
}

/// # Safety
/// Both sides hold the `n` elements named, aligned; no other thread writes the source or touches the output.
unsafe fn copy_run(
    o: Side,
    at_out: usize,
    step_out: usize,
    s: Side,
    at_src: usize,
    step_src: usize,
    n: usize,
) {
    let size = o.dtype.block_bytes();
    let out = o.ptr.0.wrapping_add(at_out * size);
    let src = s.ptr.0.wrapping_add(at_src * s.dtype.block_bytes()).cast_const();
    // SAFETY: the caller's contract.
    unsafe {
        if o.dtype == s.dtype {
            if step_out == 1 && step_src == 1 {
                return std::ptr::copy_nonoverlapping(src, out, n * size);
            }
            return match size {
                1 => copy_strided::<u8>(out, step_out, src, step_src, n),
                2 => copy_strided::<u16>(out, step_out, src, step_src, n),
                4 => copy_strided::<u32>(out, step_out, src, step_src, n),
                _ => copy_strided::<u64>(out, step_out, src, step_src, n),
            };
        }
        if step_out == 1 && step_src == 1 && convert_run(o.simd, o.dtype, s.dtype, out, src, n) {
            return;
        }
        match (s.dtype, o.dtype) {
            // Through f64 what f32 cannot hold.
            (DType::I32 | DType::I64 | DType::F64, _) | (_, DType::I64 | DType::F64) => {
                for i in 0..n {
                    convert::set_f64(
                        o.dtype,
                        out,
                        i * step_out,
                        convert::get_f64(s.dtype, src, i * step_src),
                    );
                }
            }
            _ => {
                for i in 0..n {
                    convert::set(o.dtype, out, i * step_out, convert::get(s.dtype, src, i * step_src));
                }
            }
        }
    }
}

dispatch! {
    /// Converts `n` neighbours between f32 and a half type; whether these types are such.
    ///
    /// # Safety
    /// As for [`copy_run`].
    unsafe fn convert_run(o: DType, s: DType, out: *mut u8, src: *const u8, n: usize) -> bool = convert_generic
}

/// See [`convert_run`]. Whole vectors and single elements round alike, to nearest even.
#[inline(always)]
unsafe fn convert_generic<V: Vector>(o: DType, s: DType, out: *mut u8, src: *const u8, n: usize) -> bool {
    let whole = n / V::LANES * V::LANES;
    // SAFETY: the caller's contract; vectors end at `whole`.
    unsafe {
        let (f_out, f_src) = (out.cast::<f32>(), src.cast::<f32>());
        let (h_out, h_src) = (out.cast::<u16>(), src.cast::<u16>());
        let steps = (0..whole).step_by(V::LANES);
        match (s, o) {
            (DType::F32, DType::F16) => {
                for i in steps {
                    V::load(f_src.add(i)).store_f16(h_out.add(i));
                }
            }
            (DType::F32, DType::BF16) => {
                for i in steps {
                    V::load(f_src.add(i)).store_bf16(h_out.add(i));
                }
            }
            (DType::F16, DType::F32) => {
                for i in steps {
                    V::load_f16(h_src.add(i)).store(f_out.add(i));
                }
            }
            (DType::BF16, DType::F32) => {
                for i in steps {
                    V::load_bf16(h_src.add(i)).store(f_out.add(i));
                }
            }
            _ => return false,
        }
        for i in whole..n {
            convert::set(o, out, i, convert::get(s, src, i));
        }
    }
    true
}

/// # Safety
/// As for [`copy_run`].
unsafe fn copy_strided<T: Copy>(out: *mut u8, step_out: usize, src: *const u8, step_src: usize, n: usize) {
    let (out, src) = (out.cast::<T>(), src.cast::<T>());
    for i in 0..n {
        // SAFETY: the caller's contract.
        unsafe { *out.add(i * step_out) = *src.add(i * step_src) }
    }
}

/// Sets every element of `out` to `value`.
///
/// # Errors
/// As [`copy`].
pub fn fill(ctx: &Context, mem: &mut Memory, out: &View, value: f32) -> Result<(), Error> {
    let simd = ctx.cpu().simd;
    check_writable("fill", out)?;
    let ([ptr], []) = mem.resolve([out], [], false)?;
    if out.layout.numel() == 0 {
        return Ok(());
    }
    let mut one = [0u64; 1];
    let cell = one.as_mut_ptr().cast::<u8>();
    // SAFETY: 8 aligned bytes hold one element of any plain type.
    unsafe { convert::set(out.dtype, cell, 0, value) };
    let (o, s) = (Side { ptr, dtype: out.dtype, simd }, Side { ptr: Ptr(cell), dtype: out.dtype, simd });
    let repeated = Layout { strides: vec![0; out.layout.shape.len()], ..out.layout.clone() };
    let axes = merge(&out.layout, &repeated);
    let (&inner, lead) = axes.split_last().expect("at least one axis");
    let pieces = inner.n.div_ceil(TASK);
    let lead_n: usize = lead.iter().map(|a| a.n).product();
    run_tasks(ctx, out.layout.numel(), lead_n * pieces, |t| {
        let (mut rest, from) = (t / pieces, t % pieces * TASK);
        let mut at = from * inner.out;
        for axis in lead.iter().rev() {
            at += rest % axis.n * axis.out;
            rest /= axis.n;
        }
        // SAFETY: as in `copy`; the source is one element, read with step 0.
        unsafe { copy_run(o, at, inner.out, s, 0, 0, TASK.min(inner.n - from)) }
    });
    Ok(())
}

/// The indices of a contiguous I32 view, checked against `limit`; -1 passes where `skip`.
///
/// # Safety
/// `ptr` is the resolved address of `view`, and nothing writes its memory meanwhile.
unsafe fn indices<'a>(
    op: &'static str,
    view: &View,
    ptr: Ptr,
    limit: usize,
    skip: bool,
) -> Result<&'a [i32], Error> {
    // SAFETY: the caller's contract; `check_rows` asked for a contiguous I32 vector.
    let rows = unsafe { std::slice::from_raw_parts(ptr.0.cast::<i32>(), view.layout.numel()) };
    match rows.iter().position(|&r| !(skip && r == -1) && (r < 0 || r as usize >= limit)) {
        Some(i) => Err(shape_error(op, format!("index {} (entry {i}) outside of 0..{limit}", rows[i]))),
        None => Ok(rows),
    }
}

/// Checks `many` (.., like `one` but for the first axis) and `rows` (one I32 for each row of `listed`).
fn check_rows(op: &'static str, table: &View, listed: &View, rows: &View) -> Result<(), Error> {
    let (t, l) = (&table.layout.shape, &listed.layout.shape);
    if t.is_empty() || l.is_empty() || t[1..] != l[1..] || rows.layout.shape != [l[0]] {
        let what = format!("shapes {t:?}, {l:?} with {:?} indices", rows.layout.shape);
        return Err(shape_error(op, what));
    }
    if rows.dtype != DType::I32 || !rows.layout.is_contiguous() {
        return Err(Error::View { want: "contiguous I32 indices", view: Box::new(rows.clone()) });
    }
    Ok(())
}

/// The axes within a row of both views.
fn row_axes(out: &View, src: &View) -> Vec<Axis> {
    let row =
        |l: &Layout| Layout { shape: l.shape[1..].to_vec(), strides: l.strides[1..].to_vec(), offset: 0 };
    merge(&row(&out.layout), &row(&src.layout))
}

/// Copies one row: element `at_out` of `o` on, from element `at_src` of `s` on.
///
/// # Safety
/// As for [`copy_run`], for all elements that `axes` reach.
unsafe fn copy_row(o: Side, at_out: usize, s: Side, at_src: usize, axes: &[Axis]) {
    match axes {
        // SAFETY: the caller's contract.
        [inner] => unsafe { copy_run(o, at_out, inner.out, s, at_src, inner.src, inner.n) },
        [axis, rest @ ..] => {
            for i in 0..axis.n {
                // SAFETY: the caller's contract.
                unsafe { copy_row(o, at_out + i * axis.out, s, at_src + i * axis.src, rest) }
            }
        }
        [] => {}
    }
}

/// `out[i, ..] = table[rows[i], ..]`, converted to `out`'s type; `rows` is contiguous I32.
///
/// # Errors
/// Shapes that do not fit, an index outside of the table, views out of bounds or overlapping.
pub fn gather(ctx: &Context, mem: &mut Memory, out: &View, table: &View, rows: &View) -> Result<(), Error> {
    let simd = ctx.cpu().simd;
    check_rows("gather", table, out, rows)?;
    check_writable("gather", out)?;
    let ([out_ptr], [table_ptr, rows_ptr]) = mem.resolve([out], [table, rows], false)?;
    // SAFETY: resolved just now; the output does not overlap it.
    let list = unsafe { indices("gather", rows, rows_ptr, table.layout.shape[0], false)? };
    if out.layout.numel() == 0 {
        return Ok(());
    }
    let (o, s) =
        (Side { ptr: out_ptr, dtype: out.dtype, simd }, Side { ptr: table_ptr, dtype: table.dtype, simd });
    let axes = row_axes(out, table);
    let row_len = out.layout.numel() / list.len();
    let per_task = (TASK / row_len).max(1);
    run_tasks(ctx, out.layout.numel(), list.len().div_ceil(per_task), |t| {
        for i in t * per_task..((t + 1) * per_task).min(list.len()) {
            let from = list[i] as usize * table.layout.strides[0];
            // SAFETY: the index was checked, so both rows lie in their layouts; output rows are disjoint.
            unsafe { copy_row(o, i * out.layout.strides[0], s, from, &axes) }
        }
    });
    Ok(())
}

/// `state[slots[i], ..] = values[i, ..]` in order, converted to the state's type; slot -1 skips a row. `slots` is
/// contiguous I32. Of two rows for one slot the later stays. A state in a block format takes contiguous rows.
///
/// # Errors
/// Shapes that do not fit, a slot outside of the state (nothing is written then), views out of bounds or overlapping.
pub fn scatter_rows(
    ctx: &Context,
    mem: &mut Memory,
    state: &View,
    values: &View,
    slots: &View,
) -> Result<(), Error> {
    let simd = ctx.cpu().simd;
    check_rows("scatter_rows", state, values, slots)?;
    check_writable("scatter_rows", state)?;
    if state.dtype.is_block() {
        return scatter_blocks(simd, mem, state, values, slots);
    }
    let ([state_ptr], [values_ptr, slots_ptr]) = mem.resolve([state], [values, slots], false)?;
    // SAFETY: resolved just now; the output does not overlap it.
    let list = unsafe { indices("scatter_rows", slots, slots_ptr, state.layout.shape[0], true)? };
    let (o, s) = (
        Side { ptr: state_ptr, dtype: state.dtype, simd },
        Side { ptr: values_ptr, dtype: values.dtype, simd },
    );
    if values.layout.numel() == 0 {
        return Ok(());
    }
    let axes = row_axes(state, values);
    // One thread: slots may repeat, and the rows of a batch are few and short.
    for (i, &slot) in list.iter().enumerate().filter(|&(_, &slot)| slot != -1) {
        let to = slot as usize * state.layout.strides[0];
        // SAFETY: the slot was checked, so both rows lie in their layouts; one thread writes.
        unsafe { copy_row(o, to, s, i * values.layout.strides[0], &axes) }
    }
    Ok(())
}

/// [`scatter_rows`] into a state of rounded blocks: each row is rounded to the nearest codes.
fn scatter_blocks(
    simd: Simd,
    mem: &mut Memory,
    state: &View,
    values: &View,
    slots: &View,
) -> Result<(), Error> {
    let row_shape = &values.layout.shape[1..];
    if state.layout.strides[1..] != Layout::contiguous(row_shape).strides[..] {
        return Err(Error::View { want: "contiguous rows of blocks", view: Box::new(state.clone()) });
    }
    let (outs, ins) = mem.resolve_blocks(&[state], &[values, slots])?;
    if values.dtype.is_block() {
        return Err(Error::View { want: "values in plain numbers", view: Box::new(values.clone()) });
    }
    // SAFETY: resolved just now; the output does not overlap it.
    let list = unsafe { indices("scatter_rows", slots, ins[1], state.layout.shape[0], true)? };
    let mut row = vec![0f32; row_shape.iter().product()];
    if row.is_empty() {
        return Ok(());
    }
    let plain = Side { ptr: Ptr(row.as_mut_ptr().cast()), dtype: DType::F32, simd };
    let from = Side { ptr: ins[0], dtype: values.dtype, simd };
    let axes = row_axes(&View::contiguous(0, DType::F32, &values.layout.shape), values);
    let bytes = bytes_before(state.dtype, row.len());
    for (i, &slot) in list.iter().enumerate().filter(|&(_, &slot)| slot != -1) {
        // SAFETY: `row` has the elements of one row of values, which lie in their layout; the slot was checked, so its
        // blocks lie in the state's; one thread writes.
        let to = unsafe {
            copy_row(plain, 0, from, i * values.layout.strides[0], &axes);
            let at = bytes_before(state.dtype, slot as usize * state.layout.strides[0]);
            std::slice::from_raw_parts_mut(outs[0].0.wrapping_add(at), bytes)
        };
        codec::encode(state.dtype, &row, to).expect("a checked row is whole blocks");
    }
    Ok(())
}

/// `out = 0`, then `out[rows[i], ..] += values[i, ..]` for `i` in order; `out` is F32, `rows` contiguous I32.
///
/// Threads share out columns, not rows: each sum has one order, whatever their number.
///
/// # Errors
/// Shapes that do not fit, an `out` that is not F32, an index outside of it, views out of bounds or overlapping.
pub fn scatter_add(
    ctx: &Context,
    mem: &mut Memory,
    out: &View,
    values: &View,
    rows: &View,
) -> Result<(), Error> {
    check_scatter_add(out, values, rows)?;
    fill(ctx, mem, out, 0.0)?;
    scatter_add_to(ctx, mem, out, values, rows)
}

fn check_scatter_add(out: &View, values: &View, rows: &View) -> Result<(), Error> {
    check_rows("scatter_add", out, values, rows)?;
    if out.dtype != DType::F32 {
        return Err(Error::View { want: "F32 output", view: Box::new(out.clone()) });
    }
    Ok(())
}

/// As [`scatter_add`], without setting `out` to 0 first.
///
/// # Errors
/// As [`scatter_add`].
pub fn scatter_add_to(
    ctx: &Context,
    mem: &mut Memory,
    out: &View,
    values: &View,
    rows: &View,
) -> Result<(), Error> {
    let simd = ctx.cpu().simd;
    check_scatter_add(out, values, rows)?;
    let ([out_ptr], [values_ptr, rows_ptr]) = mem.resolve([out], [values, rows], false)?;
    // SAFETY: resolved just now; the output does not overlap it.
    let list = unsafe { indices("scatter_add", rows, rows_ptr, out.layout.shape[0], false)? };
    if values.layout.numel() == 0 {
        return Ok(());
    }
    let (o, s) =
        (Side { ptr: out_ptr, dtype: out.dtype, simd }, Side { ptr: values_ptr, dtype: values.dtype, simd });
    let axes = row_axes(out, values);
    let (&inner, lead) = axes.split_last().expect("at least one axis");
    let lead_n: usize = lead.iter().map(|a| a.n).product();
    /// Columns of one task: 1 KiB of each row, so that a task reads whole cache lines.
    const COLUMNS: usize = 256;
    let pieces = inner.n.div_ceil(COLUMNS);
    run_tasks(ctx, values.layout.numel(), lead_n * pieces, |t| {
        let (mut rest, from) = (t / pieces, t % pieces * COLUMNS);
        let n = COLUMNS.min(inner.n - from);
        let (mut at_out, mut at_src) = (from * inner.out, from * inner.src);
        for axis in lead.iter().rev() {
            at_out += rest % axis.n * axis.out;
            at_src += rest % axis.n * axis.src;
            rest /= axis.n;
        }
        for (i, &row) in list.iter().enumerate() {
            let to = row as usize * out.layout.strides[0] + at_out;
            let from = i * values.layout.strides[0] + at_src;
            // SAFETY: the row was checked, so all elements lie in their layouts; tasks have disjoint columns.
            unsafe { add_run(o, to, inner.out, s, from, inner.src, n) }
        }
    });
    Ok(())
}

/// Adds `n` elements of `s` to the F32 elements of `o`.
///
/// # Safety
/// As for [`copy_run`].
unsafe fn add_run(
    o: Side,
    at_out: usize,
    step_out: usize,
    s: Side,
    at_src: usize,
    step_src: usize,
    n: usize,
) {
    let out = o.ptr.0.cast::<f32>();
    for j in 0..n {
        // SAFETY: the caller's contract.
        unsafe {
            *out.add(at_out + j * step_out) += convert::get(s.dtype, s.ptr.0, at_src + j * step_src);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;

    /// A memory with one slab per (type, elements); F32 slabs count 0, 1, 2 ..
    fn memory(slabs: &[(DType, usize)]) -> Memory {
        let mut mem = Memory::new();
        for &(dtype, n) in slabs {
            let slab = mem.add_owned(n * dtype.block_bytes());
            let bytes = mem.bytes_mut(slab).unwrap();
            for i in 0..n {
                // SAFETY: the slab holds `n` elements.
                unsafe { convert::set(dtype, bytes.as_mut_ptr(), i, i as f32) }
            }
        }
        mem
    }

    fn values(mem: &Memory, view: &View) -> Vec<f64> {
        let l = &view.layout;
        let bytes = mem.bytes(view.slab);
        (0..l.numel())
            .map(|mut i| {
                let mut at = l.offset;
                for (n, s) in l.shape.iter().zip(&l.strides).rev() {
                    at += i % n * s;
                    i /= n;
                }
                // SAFETY: the views of these tests lie in their slabs.
                unsafe { convert::get_f64(view.dtype, bytes.as_ptr(), at) }
            })
            .collect()
    }

    fn contexts() -> Vec<Context> {
        let mut list: Vec<Context> = Cpu::all().into_iter().map(|cpu| Context::new(1, cpu)).collect();
        list.push(Context::new(3, Cpu::detect()));
        list
    }

    #[test]
    fn copy_moves_what_the_strides_say() {
        let shapes: [&[usize]; 8] =
            [&[0], &[1], &[3], &[4, 6], &[3, 1, 5], &[2, 3, 4, 5], &[70, 90], &[260, 300]];
        for ctx in contexts() {
            for shape in shapes {
                let axes: Vec<usize> = (0..shape.len()).rev().collect();
                let n: usize = shape.iter().product();
                for (to, from) in [
                    (DType::F32, DType::F32),
                    (DType::F16, DType::F32),
                    (DType::F32, DType::BF16),
                    (DType::I32, DType::F32),
                    (DType::F32, DType::I32),
                    (DType::F64, DType::I64),
                    (DType::U8, DType::U8),
                    (DType::I16, DType::I16),
                ] {
                    let mut mem = memory(&[(from, n + 3), (to, n + 3)]);
                    let src = View {
                        slab: 0,
                        dtype: from,
                        layout: Layout { offset: 3, ..Layout::contiguous(shape) }.permute(&axes),
                    };
                    for out_layout in [
                        Layout { offset: 1, ..Layout::contiguous(&src.layout.shape) },
                        Layout { offset: 2, ..Layout::contiguous(shape) }.permute(&axes),
                    ] {
                        let out = View { slab: 1, dtype: to, layout: out_layout };
                        fill(&ctx, &mut mem, &out, -1.0).unwrap();
                        copy(&ctx, &mut mem, &out, &src).unwrap();
                        // Small counts are exact in every type but the half ones and bytes.
                        let want: Vec<f64> = values(&mem, &src)
                            .into_iter()
                            .map(|x| convert::round(to, x as f32) as f64)
                            .collect();
                        assert_eq!(values(&mem, &out), want, "{shape:?} {from} to {to}");
                    }
                }
            }
        }
    }

    #[test]
    fn copy_from_a_repeated_source_and_into_columns() {
        let mut mem = memory(&[(DType::F32, 3), (DType::F32, 12)]);
        let src = View { slab: 0, dtype: DType::F32, layout: Layout::contiguous(&[3, 1]).broadcast(&[3, 2]) };
        let whole = Layout::contiguous(&[3, 4]);
        let out = View { slab: 1, dtype: DType::F32, layout: whole.slice(1, 1, 3) };
        copy(&contexts()[0], &mut mem, &out, &src).unwrap();
        let all = View { layout: whole, ..out };
        assert_eq!(values(&mem, &all), [0., 0., 0., 3., 4., 1., 1., 7., 8., 2., 2., 11.]);
        let repeated = View { layout: Layout::contiguous(&[1, 4]).broadcast(&[2, 4]), ..all.clone() };
        let two = View { layout: Layout::contiguous(&[2, 4]), slab: 1, dtype: DType::F32 };
        assert!(matches!(copy(&contexts()[0], &mut mem, &repeated, &two), Err(Error::Shape { .. })));
        let long = View { layout: Layout::contiguous(&[5]), ..src };
        assert!(matches!(fill(&contexts()[0], &mut mem, &long, 0.0), Err(Error::Bounds { .. })));
    }

    #[test]
    fn large_integers_are_copied_exactly() {
        let mut mem = Memory::new();
        let (a, b) = (mem.add_owned(4), mem.add_owned(8));
        mem.bytes_mut(a).unwrap().copy_from_slice(&16_777_217i32.to_ne_bytes());
        let src = View::contiguous(a, DType::I32, &[1]);
        let out = View::contiguous(b, DType::I64, &[1]);
        copy(&contexts()[0], &mut mem, &out, &src).unwrap();
        assert_eq!(mem.bytes(b), 16_777_217i64.to_ne_bytes());
    }

    fn index_slab(mem: &mut Memory, rows: &[i32]) -> View {
        let slab = mem.add_owned(rows.len() * 4);
        mem.bytes_mut(slab).unwrap().copy_from_slice(bytemuck::cast_slice(rows));
        View::contiguous(slab, DType::I32, &[rows.len()])
    }

    #[test]
    fn gather_and_scatter_by_hand() {
        for ctx in contexts() {
            let mut mem = memory(&[(DType::BF16, 12), (DType::F32, 6), (DType::F16, 12)]);
            let rows = index_slab(&mut mem, &[2, 0, 2]);
            let table = View::contiguous(0, DType::BF16, &[3, 2, 2]).clone();
            let table = View { layout: table.layout.slice(2, 0, 1), ..table };
            let out = View::contiguous(1, DType::F32, &[3, 2, 1]);
            gather(&ctx, &mut mem, &out, &table, &rows).unwrap();
            assert_eq!(values(&mem, &out), [8., 10., 0., 2., 8., 10.]);

            let slots = index_slab(&mut mem, &[1, -1, 3]);
            let state = View::contiguous(2, DType::F16, &[6, 2]);
            let values_view = View::contiguous(1, DType::F32, &[3, 2]);
            scatter_rows(&ctx, &mut mem, &state, &values_view, &slots).unwrap();
            assert_eq!(values(&mem, &state), [0., 1., 8., 10., 4., 5., 8., 10., 8., 9., 10., 11.]);

            let sums = mem.add_owned(16);
            let sums = View::contiguous(sums, DType::F32, &[2, 2]);
            let rows = index_slab(&mut mem, &[1, 1, 0]);
            scatter_add(&ctx, &mut mem, &sums, &values_view, &rows).unwrap();
            assert_eq!(values(&mem, &sums), [8., 10., 8., 12.]);
        }
    }

    #[test]
    fn bad_indices_change_nothing() {
        let ctx = &contexts()[0];
        let mut mem = memory(&[(DType::F32, 6), (DType::F32, 4)]);
        let state = View::contiguous(0, DType::F32, &[3, 2]);
        let rows = View::contiguous(1, DType::F32, &[2, 2]);
        for bad in [3, -2] {
            let slots = index_slab(&mut mem, &[0, bad]);
            assert!(matches!(
                scatter_rows(ctx, &mut mem, &state, &rows, &slots),
                Err(Error::Shape { op: "scatter_rows", .. })
            ));
            assert!(gather(ctx, &mut mem, &rows, &state, &slots).is_err());
        }
        let skip = index_slab(&mut mem, &[-1, -1]);
        assert!(gather(ctx, &mut mem, &rows, &state, &skip).is_err());
        assert_eq!(values(&mem, &state), [0., 1., 2., 3., 4., 5.]);
        let few = index_slab(&mut mem, &[0]);
        assert!(gather(ctx, &mut mem, &rows, &state, &few).is_err());
    }

    #[test]
    fn scatter_add_does_not_depend_on_threads() {
        let (n, width, rows) = (600, 700, 40);
        let run = |threads| {
            let mut mem = Memory::new();
            let (a, b) = (mem.add_owned(n * width * 4), mem.add_owned(rows * width * 4));
            let x: &mut [f32] = bytemuck::cast_slice_mut(mem.bytes_mut(a).unwrap());
            x.iter_mut().enumerate().for_each(|(i, x)| *x = ((i * 7919) % 1009) as f32 / 37.0);
            let list: Vec<i32> = (0..n).map(|i| (i * i % rows) as i32).collect();
            let index = index_slab(&mut mem, &list);
            let out = View::contiguous(b, DType::F32, &[rows, width]);
            let values = View::contiguous(a, DType::F32, &[n, width]);
            scatter_add(&Context::new(threads, Cpu::detect()), &mut mem, &out, &values, &index).unwrap();
            let mut want = vec![0f32; rows * width];
            let x: &[f32] = bytemuck::cast_slice(mem.bytes(a));
            for (i, &r) in list.iter().enumerate() {
                (0..width).for_each(|c| want[r as usize * width + c] += x[i * width + c]);
            }
            assert_eq!(mem.f32(&out).unwrap(), want);
            let (none, ctx) =
                (View::contiguous(a, DType::F32, &[0, width]), Context::new(threads, Cpu::detect()));
            scatter_add_to(&ctx, &mut mem, &out, &none, &View::contiguous(index.slab, DType::I32, &[0]))
                .unwrap();
            assert_eq!(mem.f32(&out).unwrap(), want);
            scatter_add_to(&ctx, &mut mem, &out, &values, &index).unwrap();
            let x: &[f32] = bytemuck::cast_slice(mem.bytes(a));
            for (i, &r) in list.iter().enumerate() {
                (0..width).for_each(|c| want[r as usize * width + c] += x[i * width + c]);
            }
            assert_eq!(mem.f32(&out).unwrap(), want);
        };
        run(1);
        run(4);
    }

    #[test]
    fn rows_are_rounded_into_blocks() {
        let ctx = Context::new(1, Cpu::detect());
        let mut mem = Memory::new();
        let x: Vec<f32> = (0..3 * 64).map(|i| (i as f32 * 0.37).sin() * (i + 1) as f32).collect();
        let slab = mem.add_owned(x.len() * 4);
        mem.bytes_mut(slab).unwrap().copy_from_slice(bytemuck::cast_slice(&x));
        let rows = View::contiguous(slab, DType::F32, &[3, 2, 32]);
        let slots = mem.add_owned(12);
        mem.bytes_mut(slots).unwrap().copy_from_slice(bytemuck::cast_slice(&[3i32, -1, 0]));
        let slots = View::contiguous(slots, DType::I32, &[3]);
        let row = 2 * 34; // two blocks
        let state = mem.add_owned(4 * row);
        let state = View::contiguous(state, DType::Q8_0, &[4, 2, 32]);
        scatter_rows(&ctx, &mut mem, &state, &rows, &slots).unwrap();
        let encoded = |i: usize| {
            let mut bytes = vec![0; row];
            codec::encode(DType::Q8_0, &x[i * 64..][..64], &mut bytes).unwrap();
            bytes
        };
        let want = [encoded(2), vec![0; 2 * row], encoded(0)].concat();
        assert_eq!(mem.bytes(state.slab), want);
        // Rows that are no whole blocks, and kernels that know no blocks.
        let mut odd = state.clone();
        odd.layout.offset = 8;
        odd.layout.shape[0] = 3;
        assert!(matches!(scatter_rows(&ctx, &mut mem, &odd, &rows, &slots), Err(Error::View { .. })));
        assert!(matches!(fill(&ctx, &mut mem, &state, 0.0), Err(Error::View { .. })));
    }
}
