//! Packed NF4 matrices: their blocks share scales and a mean with others, along rows and over their ends.
//!
//! Panels hold a byte of the scale and 32 of codes for each block of a row, as other formats' do; the second level lies
//! apart, in the order of the whole matrix.

use super::Weight;
use crate::matmul::tile::PANEL;
use crate::{AlignedBytes, Cpu, Error};
use sparsam_dtype::DType;
use sparsam_dtype::codec::nf4::{BLOCK, LEVELS, Parts, SECOND, scale};
use std::sync::Arc;

/// Bytes of the codes of 16 rows' blocks.
const CODES: usize = BLOCK / 2 * PANEL;

/// The second level of a matrix.
#[derive(Clone, Default)]
pub(super) struct Shared {
    scales: Arc<[f32]>,
    mean: f32,
}

impl Shared {
    pub fn bytes(&self) -> usize {
        4 * self.scales.len()
    }
}

/// Packs the bytes of a matrix into panels.
pub(super) fn pack(
    zeroed: impl FnOnce(usize) -> AlignedBytes,
    rows: usize,
    cols: usize,
    bytes: &[u8],
) -> Result<Weight, Error> {
    let n = rows.checked_mul(cols).filter(|_| cols.is_multiple_of(BLOCK));
    let parts = n.and_then(|n| Parts::new(bytes, n));
    let mut weight =
        Weight { dtype: DType::NF4, rows, cols, data: AlignedBytes::default(), shared: Shared::default() };
    let Some(parts) = parts else {
        if n == Some(0) && bytes.is_empty() {
            return Ok(weight);
        }
        let what = format!(
            "{} bytes are no {rows} x {cols} matrix of NF4, whose rows are whole blocks",
            bytes.len()
        );
        return Err(Error::Shape { op: "weight", what });
    };
    weight.shared = Shared { scales: parts.second().collect(), mean: parts.mean };
    weight.data = zeroed(weight.panels() * weight.panel_bytes());
    let (per_row, panel_bytes) = (cols / BLOCK, weight.panel_bytes());
    let blocks = parts.scales.iter().zip(parts.codes.as_chunks::<{ BLOCK / 2 }>().0);
    for (i, (&scale, codes)) in blocks.enumerate() {
        let (row, block) = (i / per_row, i % per_row);
        let at = row / PANEL * panel_bytes + block * (PANEL + CODES);
        let to = &mut weight.data.bytes_mut()[at..][..PANEL + CODES];
        to[row % PANEL] = scale;
        for (to, four) in to[PANEL..].chunks_exact_mut(4 * PANEL).zip(codes.as_chunks::<4>().0) {
            to[row % PANEL * 4..][..4].copy_from_slice(four);
        }
    }
    Ok(weight)
}

/// Blocks of 16 rows from column `k0` on: the scale of each row, 0 where there is none, and the codes.
fn blocks(w: &Weight, panel: usize, k0: usize) -> impl Iterator<Item = ([f32; PANEL], &[u8; CODES])> {
    let (per_row, first) = (w.cols / BLOCK, k0 / BLOCK);
    let bytes = w.panel_from(panel, k0).as_chunks::<{ PANEL + CODES }>().0;
    bytes.iter().enumerate().map(move |(b, bytes)| {
        let (codes, codes_of_scales) = (bytes.last_chunk().expect("longer"), &bytes[..PANEL]);
        let of = |r: usize| {
            let row = panel * PANEL + r;
            let second = w.shared.scales[(row * per_row + first + b) / SECOND];
            scale(codes_of_scales[r], second, w.shared.mean)
        };
        let scales = std::array::from_fn(|r| if panel * PANEL + r < w.rows { of(r) } else { 0.0 });
        (scales, codes)
    })
}

/// The level of column `k` of row `r` of a block.
fn level(codes: &[u8; CODES], r: usize, k: usize) -> f32 {
    let two = codes[(k / 8 * PANEL + r) * 4 + k % 8 / 2];
    LEVELS[usize::from(if k.is_multiple_of(2) { two >> 4 } else { two & 15 })]
}

/// Decodes a row.
pub(super) fn decode_row(w: &Weight, row: usize, out: &mut [f32]) {
    let r = row % PANEL;
    for (out, (scales, codes)) in out.chunks_exact_mut(BLOCK).zip(blocks(w, row / PANEL, 0)) {
        for (k, out) in out.iter_mut().enumerate() {
            *out = level(codes, r, k) * scales[r];
        }
    }
}

/// Decodes columns from `k0` on of all rows of a panel into `[..][16]`.
pub(super) fn decode(w: &Weight, cpu: Cpu, panel: usize, k0: usize, out: &mut [f32]) {
    for (out, (scales, codes)) in
        out.as_chunks_mut::<{ BLOCK * PANEL }>().0.iter_mut().zip(blocks(w, panel, k0))
    {
        #[cfg(target_arch = "x86_64")]
        if cpu.simd >= crate::Simd::Avx2 {
            super::decode_x86::nf4(codes, &scales, out);
            continue;
        }
        let _ = cpu;
        for (k, out) in out.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            for (r, out) in out.iter_mut().enumerate() {
                *out = level(codes, r, k) * scales[r];
            }
        }
    }
}
