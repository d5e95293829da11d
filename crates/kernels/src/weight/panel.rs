//! How packed weights lie in memory, and how panels of them become f32.
//!
//! Rows are taken 16 at a time: a *panel*. Within a panel the blocks follow each other along the row; within a
//! block each field (scale, minimum, codes ..) of all 16 rows lies together, in units of a few bytes from one row
//! after the other. So a vector register filled with consecutive bytes holds the same four codes of 16 rows
//! (AVX-512) or 8 rows (AVX2), and a row's partial sums stay in one lane. The bytes are the file's own, in another
//! order, so nothing is lost or added (but for rows of zeros that fill the last panel).

use crate::Cpu;
use crate::matmul::scratch::Scratch;
use crate::matmul::tile::PANEL;
use sparsam_dtype::{DType, codec};

/// Fields of one block in the file's order: bytes in each row, and bytes of a unit.
pub(super) const fn fields(dtype: DType) -> &'static [(usize, usize)] {
    use DType::*;
    match dtype {
        F32 => &[(4, 4)],
        F16 => &[(2, 2)],
        // Two neighbours of a row together: the pairs of bf16 that the tiles for pairs read.
        BF16 => &[(4, 4)],
        F64 => &[(8, 8)],
        Q4_0 | IQ4_NL => &[(2, 2), (16, 4)],
        Q4_1 => &[(2, 2), (2, 2), (16, 4)],
        Q5_0 => &[(2, 2), (4, 4), (16, 4)],
        Q5_1 => &[(2, 2), (2, 2), (4, 4), (16, 4)],
        Q8_0 => &[(2, 2), (32, 4)],
        Q8_1 => &[(2, 2), (2, 2), (32, 4)],
        Q2_K => &[(16, 1), (64, 4), (2, 2), (2, 2)],
        Q3_K => &[(32, 4), (64, 4), (12, 4), (2, 2)],
        Q4_K => &[(2, 2), (2, 2), (12, 4), (128, 4)],
        Q5_K => &[(2, 2), (2, 2), (12, 4), (32, 4), (128, 4)],
        Q6_K => &[(128, 4), (64, 4), (16, 1), (2, 2)],
        Q8_K => &[(4, 4), (256, 4), (32, 2)],
        IQ4_XS => &[(2, 2), (2, 2), (4, 4), (128, 4)],
        S2_64 => &[(2, 2), (2, 2), (16, 4)],
        S3_64 => &[(2, 2), (16, 4), (8, 4)],
        S4_64 => &[(2, 2), (32, 4)],
        // What blocks share lies apart: `super::nf4`.
        NF4 => &[(1, 1), (32, 4)],
        I8 | I16 | I32 | I64 | U8 => &[],
    }
}

/// Elements of the unit in which rows are interleaved: a block, or a pair of bf16.
pub(super) const fn group_len(dtype: DType) -> usize {
    if matches!(dtype, DType::BF16) { 2 } else { dtype.block_len() }
}

/// Bytes of one such unit of one row.
pub(super) const fn group_bytes(dtype: DType) -> usize {
    if matches!(dtype, DType::BF16) { 4 } else { dtype.block_bytes() }
}

/// Copies unit by unit: `n` groups of one row between its own order and its place in a panel.
fn walk(dtype: DType, n: usize, mut copy: impl FnMut(usize, usize, usize)) {
    let bytes = group_bytes(dtype);
    for g in 0..n {
        let mut field = 0;
        for &(len, unit) in fields(dtype) {
            for i in 0..len / unit {
                // Offset in the row, in the panel (of row 0), bytes.
                copy(g * bytes + field + i * unit, (g * bytes + field) * PANEL + i * unit * PANEL, unit);
            }
            field += len;
        }
    }
}

/// Puts up to 16 rows of `row_bytes` each into their places in a panel of zeros.
pub(super) fn interleave(dtype: DType, rows: &[u8], row_bytes: usize, panel: &mut [u8]) {
    let bytes = group_bytes(dtype);
    // An odd row of bf16 ends in half a pair.
    let whole = row_bytes / bytes * bytes;
    for g in (0..whole).step_by(bytes) {
        let mut field = g;
        for &(len, unit) in fields(dtype) {
            let to = &mut panel[field * PANEL..][..len * PANEL];
            match unit {
                1 => units::<1>(rows, row_bytes, field, to),
                2 => units::<2>(rows, row_bytes, field, to),
                4 => units::<4>(rows, row_bytes, field, to),
                _ => units::<8>(rows, row_bytes, field, to),
            }
            field += len;
        }
    }
    for (r, row) in rows.chunks(row_bytes).enumerate() {
        let rest = &row[whole..];
        if !rest.is_empty() {
            panel[whole * PANEL + r * bytes..][..rest.len()].copy_from_slice(rest);
        }
    }
}

/// Interleaves one field, `from` bytes into each row, in units of `U` bytes.
fn units<const U: usize>(rows: &[u8], row_bytes: usize, from: usize, to: &mut [u8]) {
    for (i, to) in to.chunks_exact_mut(U * PANEL).enumerate() {
        let at = from + i * U;
        for (to, row) in to.chunks_exact_mut(U).zip(rows.chunks_exact(row_bytes)) {
            let unit: [u8; U] = row[at..at + U].try_into().expect("a unit");
            to.copy_from_slice(&unit);
        }
    }
}

/// The file's bytes of row `r`; `panel` starts at the first group wanted, `row` holds a whole number of groups.
pub(super) fn row_bytes(dtype: DType, panel: &[u8], r: usize, row: &mut [u8]) {
    walk(dtype, row.len() / group_bytes(dtype), |to, from, unit| {
        let from = from + r * unit;
        match unit {
            4 => row[to..to + 4].copy_from_slice(&panel[from..from + 4]),
            2 => row[to..to + 2].copy_from_slice(&panel[from..from + 2]),
            _ => row[to..to + unit].copy_from_slice(&panel[from..from + unit]),
        }
    });
}

/// Decodes `out.len()` elements of row `r`; `panel` starts at the group of the first.
pub(super) fn decode_row(dtype: DType, panel: &[u8], r: usize, out: &mut [f32]) {
    let n = out.len().div_ceil(group_len(dtype)) * group_bytes(dtype);
    let mut scratch = Scratch::of::<u8>(n);
    let row = &mut scratch.bytes_mut()[..n];
    row_bytes(dtype, panel, r, row);
    let exact = out.len() * dtype.block_bytes() / dtype.block_len(); // without the padding of a last pair
    codec::decode(dtype, &row[..exact], out)
        .expect("a packed weight holds whole blocks of a type that decodes");
}

/// Decodes `kc` elements of all rows of a panel into `[kc][16]`; `panel` starts at the group of the first.
///
/// Every version gives [`codec::decode`]'s numbers, bit for bit.
pub(super) fn decode(cpu: Cpu, dtype: DType, panel: &[u8], kc: usize, out: &mut [f32]) {
    let groups = kc.div_ceil(group_len(dtype));
    assert!(panel.len() >= groups * group_bytes(dtype) * PANEL && out.len() == kc * PANEL);
    #[cfg(target_arch = "x86_64")]
    if cpu.simd >= crate::Simd::Avx2 && super::decode_x86::decode(dtype, panel, kc, out) {
        return;
    }
    let _ = cpu;
    let mut scratch = Scratch::of::<f32>(kc);
    let row: &mut [f32] = &mut bytemuck::cast_slice_mut(scratch.bytes_mut())[..kc];
    for r in 0..PANEL {
        decode_row(dtype, panel, r, row);
        for (k, &v) in row.iter().enumerate() {
            out[k * PANEL + r] = v;
        }
    }
}
