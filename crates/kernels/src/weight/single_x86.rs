//! One row of activations times one packed panel, in AVX2 and AVX-512 VNNI: what a generated token is made of.
//!
//! Weights are read once, straight from the packed bytes, so these products should run as fast as memory delivers. Each
//! format is written once, as a [`Block`] over [`Rows`]: a vector that holds the same four columns of 16 rows of the panel
//! (AVX-512) or of 8 (AVX2, which goes over a block twice).
//!
//! VNNI sums products in 32 bits, which leaves room: codes are multiplied where they lie in their bytes, as multiples of
//! a power of two, and one shift of the sum makes up for it (`field` and `sum_of` of [`blocks`]). AVX2 sums in 16 bits and shifts
//! codes down first; codes up to 15 may be summed over a whole block there (8 x 2 x 15 x 127 = 30,480), others are widened
//! at once.
//!
//! The operations on each element are those of [`super::int8`], in their order, so results are the same bits.

mod blocks;
mod rows;

use super::int8::{Acts, BLOCK, Single, Sums};
use crate::matmul::tile::PANEL;
use crate::simd::{Avx2, Avx512};
use blocks::*;
use rows::Rows;
use sparsam_dtype::DType;

/// The product for `dtype`; `None` if there is none. With `vnni` the machine must have AVX-512 VNNI, else AVX2.
pub(super) fn single(dtype: DType, vnni: bool) -> Option<Single> {
    Some(match dtype {
        DType::Q4_0 => of::<Q4<false>>(vnni),
        DType::Q4_1 => of::<Q4<true>>(vnni),
        DType::Q5_0 => of::<Q5<false>>(vnni),
        DType::Q5_1 => of::<Q5<true>>(vnni),
        DType::Q8_0 => of::<Q8>(vnni),
        DType::IQ4_NL => of::<Iq4Nl>(vnni),
        DType::IQ4_XS => of::<Iq4Xs>(vnni),
        DType::Q2_K => of::<Q2K>(vnni),
        DType::Q3_K => of::<Q3K>(vnni),
        DType::Q4_K => of::<Q45K<false>>(vnni),
        DType::Q5_K => of::<Q45K<true>>(vnni),
        DType::Q6_K => of::<Q6K>(vnni),
        DType::S2_64 => of::<S2>(vnni),
        DType::S3_64 => of::<S3>(vnni),
        DType::S4_64 => of::<S4>(vnni),
        _ => return None,
    })
}

fn of<B: Block>(vnni: bool) -> Single {
    if vnni { vnni_product::<B> } else { avx2_product::<B> }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn vnni_product<B: Block>(acts: &Acts, sums: &Sums, row: usize, panel: &[u8], out: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe { product::<Avx512, B>(acts, sums, row, panel, out) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2_product<B: Block>(acts: &Acts, sums: &Sums, row: usize, panel: &[u8], out: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe { product::<Avx2, B>(acts, sums, row, panel, out) }
}

#[inline(always)]
unsafe fn product<V: Rows, B: Block>(acts: &Acts, sums: &Sums, row: usize, panel: &[u8], out: *mut f32) {
    let first = row * acts.blocks;
    let row = Row {
        codes: acts.codes.at(first * BLOCK),
        d: acts.d.at(first),
        start: sums.start.at(first * B::PARTS),
        scaled: sums.scaled.at(if B::MIN { first * B::PARTS } else { 0 }),
    };
    let step = B::COLUMNS / BLOCK;
    debug_assert!(panel.len() >= acts.blocks / step * B::BYTES);
    // SAFETY: the caller's promise: the panel has `blocks` blocks of 32 columns, and 16 results go out.
    unsafe {
        let mut acc = [V::splat(0.0); 2];
        for g in 0..acts.blocks / step {
            let at = At { p: panel.as_ptr().add(g * B::BYTES), half: 0 };
            acc[0] = B::add::<V>(&row, g * step, at, acc[0]);
            if V::LANES < PANEL {
                acc[1] = B::add::<V>(&row, g * step, At { half: 1, ..at }, acc[1]);
            }
        }
        acc[0].store(out);
        if V::LANES < PANEL {
            acc[1].store(out.add(V::LANES));
        }
    }
}

/// The row of activations.
struct Row {
    codes: *const i8,
    d: *const f32,
    start: *const i32,
    scaled: *const f32,
}

impl Row {
    /// The codes of block `b`.
    #[inline(always)]
    unsafe fn codes(&self, b: usize) -> *const i8 {
        // SAFETY: the caller's promise: the row has that block.
        unsafe { self.codes.add(b * BLOCK) }
    }

    /// Adds the products of part `part` of the row (whole block, or half, as `B::PARTS` says): `total` is their integer
    /// sum without the offset, `dw` the scale.
    #[inline(always)]
    unsafe fn add<V: Rows, B: Block>(&self, acc: V, part: usize, total: V::Int, dw: V) -> V {
        // SAFETY: the caller's promise: the row has that part.
        unsafe {
            let total = match B::OFFSET {
                true => V::int_add(total, V::int(*self.start.add(part))),
                false => total,
            };
            let d = V::splat(*self.d.add(part / B::PARTS));
            V::from_int(total).mul(d).fma(dw, acc)
        }
    }

    /// Adds the share of the minimum `m` in a part.
    #[inline(always)]
    unsafe fn add_min<V: Rows>(&self, acc: V, part: usize, m: V) -> V {
        // SAFETY: the caller's promise: the row has that part.
        unsafe { V::splat(*self.scaled.add(part)).fma(m, acc) }
    }

    /// Adds the share of the minimum `-m` in a part.
    #[inline(always)]
    unsafe fn subtract_min<V: Rows>(&self, acc: V, part: usize, m: V) -> V {
        // SAFETY: the caller's promise: the row has that part.
        unsafe { V::splat(*self.scaled.add(part)).fnma(m, acc) }
    }
}

/// A place in a panel: a block, and which half of its rows where a vector holds 8.
///
/// Offsets count bytes of a block of 16 rows, field after field as [`super::panel::fields`] lists them.
#[derive(Clone, Copy)]
struct At {
    p: *const u8,
    half: usize,
}

impl At {
    /// The rows' units of `unit` bytes at an offset.
    #[inline(always)]
    unsafe fn units<V: Rows>(self, offset: usize, unit: usize) -> *const u8 {
        // SAFETY: the caller's promise: the offset lies in the block.
        unsafe { self.p.add(offset + self.half * V::LANES * unit) }
    }

    /// Scales or minima in half precision.
    #[inline(always)]
    unsafe fn halves<V: Rows>(self, offset: usize) -> V {
        // SAFETY: the caller's promise: the offset lies in the block.
        unsafe { V::load_f16(self.units::<V>(offset, 2).cast()) }
    }

    /// Four bytes of each row.
    #[inline(always)]
    unsafe fn quads<V: Rows>(self, offset: usize) -> V::Int {
        // SAFETY: the caller's promise: the offset lies in the block.
        unsafe { V::int_load(self.units::<V>(offset, 4).cast()) }
    }
}

/// A format: what it adds to the results of a panel's rows for its unit of columns.
trait Block {
    /// Columns of the unit.
    const COLUMNS: usize;
    /// Bytes of it in 16 rows.
    const BYTES: usize;
    /// Scales (and minima) for each 32 columns, as [`super::int8::Format::parts`] says.
    const PARTS: usize = 1;
    /// Whether there is an offset in the codes.
    const OFFSET: bool = false;
    /// Whether there are minima.
    const MIN: bool = false;

    /// Adds block `b` (of 32 columns) of the row and those behind it that the unit holds.
    ///
    /// # Safety
    /// The row has these blocks, a whole unit of the panel lies there, and the machine has the instructions.
    unsafe fn add<V: Rows>(row: &Row, b: usize, at: At, acc: V) -> V;
}
