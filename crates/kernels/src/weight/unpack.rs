//! Packed panels to one code a byte with f32 scales and minima, as the integer tiles read them.

use super::int8::{BLOCK, CODES, Format, Panel};
use super::panel;
use crate::Cpu;
use crate::matmul::tile::PANEL;
use sparsam_dtype::codec::IQ4_VALUES;
use sparsam_dtype::{DType, f16};

/// Unpacks `blocks` blocks of 32 columns of a packed panel; `signed` takes the offset from 8-bit codes.
///
/// # Safety
/// `out` must have room for `blocks` blocks of codes, scales and (where the format has them) minima.
pub(super) unsafe fn unpack(cpu: Cpu, dtype: DType, panel: &[u8], blocks: usize, out: &Panel, signed: bool) {
    let len = dtype.block_len() / BLOCK;
    let bytes = dtype.block_bytes() * PANEL;
    assert!(panel.len() >= blocks / len * bytes && blocks.is_multiple_of(len));
    #[cfg(target_arch = "x86_64")]
    if cpu.simd >= crate::Simd::Avx2 {
        // SAFETY: the caller's promise; `Context` vouches for the instructions.
        if unsafe { super::unpack_x86::unpack(dtype, panel, blocks, out, signed) } {
            return;
        }
    }
    let _ = cpu;
    let format = Format::of(dtype).expect("a format with integer kernels");
    let flip = if signed { 0x80 } else { 0 };
    let mut row = [0; 256];
    let row = &mut row[..dtype.block_bytes()];
    for g in 0..blocks / len {
        for r in 0..PANEL {
            panel::row_bytes(dtype, &panel[g * bytes..], r, row);
            for i in 0..len {
                let b = g * len + i;
                // SAFETY: block `b` of the caller's `blocks`.
                unsafe {
                    for part in 0..format.parts {
                        let (d, m) = scales(dtype, row, i * format.parts + part);
                        let at = (b * format.parts + part) * PANEL + r;
                        *out.d.add(at) = d;
                        if format.min {
                            *out.m.add(at) = m;
                        }
                    }
                    for k in 0..BLOCK {
                        let at = b * CODES + (k / 4 * PANEL + r) * 4 + k % 4;
                        *out.codes.add(at) = code(dtype, row, i * BLOCK + k) ^ flip;
                    }
                }
            }
        }
    }
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Scale and minimum (what is added) of part `i` of one row's block: 32 columns, or 16 where scales are for these.
fn scales(dtype: DType, block: &[u8], i: usize) -> (f32, f32) {
    match dtype {
        DType::Q4_1 | DType::Q5_1 | DType::S2_64 => (half(block), half(&block[2..])),
        DType::Q4_K | DType::Q5_K => {
            let (scale, min) = six_bits(&block[4..16], i);
            (half(block) * scale as f32, -(half(&block[2..]) * min as f32))
        }
        DType::Q2_K => {
            (half(&block[80..]) * (block[i] & 15) as f32, -(half(&block[82..]) * (block[i] >> 4) as f32))
        }
        DType::Q3_K => {
            let s = &block[96..108];
            let low = if i < 8 { s[i] & 15 } else { s[i - 8] >> 4 };
            let top = s[8 + i % 4] >> (2 * (i / 4)) & 3;
            (half(&block[108..]) * ((low | top << 4) as f32 - 32.0), 0.0)
        }
        DType::Q6_K => (half(&block[208..]) * block[192 + i] as i8 as f32, 0.0),
        DType::IQ4_XS => {
            let top = u16::from_le_bytes([block[2], block[3]]) >> (2 * i) & 3;
            let low = block[4 + i / 2] >> (4 * (i % 2)) & 15;
            (half(block) * ((low as u16 | top << 4) as f32 - 32.0), 0.0)
        }
        _ => (half(block), 0.0),
    }
}

/// Scale and minimum `i` of 8, 6 bits each, from the 12 bytes of Q4_K and Q5_K: the first four of both lie in the
/// low bits of bytes 0 to 7; the last four have their low halves in bytes 8 to 11 and the rest above the first.
fn six_bits(s: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        (s[i] & 63, s[i + 4] & 63)
    } else {
        ((s[i + 4] & 15) | (s[i - 4] >> 6) << 4, (s[i + 4] >> 4) | (s[i] >> 6) << 4)
    }
}

/// The unsigned code of column `k` of one row's block.
fn code(dtype: DType, block: &[u8], k: usize) -> u8 {
    // Columns 0 to 15 are the low halves of 16 bytes, 16 to 31 the high ones.
    let nibble = |qs: &[u8]| if k < 16 { qs[k] & 15 } else { qs[k - 16] >> 4 };
    let bit = |qh: &[u8]| (qh[k / 8] >> (k % 8) & 1) << 4;
    match dtype {
        DType::Q4_0 => nibble(&block[2..]),
        DType::Q4_1 => nibble(&block[4..]),
        DType::IQ4_NL => (IQ4_VALUES[nibble(&block[2..]) as usize] as u8) ^ 0x80,
        DType::Q5_0 => nibble(&block[6..]) | bit(&block[2..]),
        DType::Q5_1 => nibble(&block[8..]) | bit(&block[4..]),
        DType::Q8_0 => block[2 + k] ^ 0x80,
        // 32 bytes hold two bits of four times 32 columns each.
        DType::Q2_K => block[16 + k / 128 * 32 + k % 32] >> (k / 32 % 4 * 2) & 3,
        DType::Q3_K => {
            let two = block[32 + k / 128 * 32 + k % 32] >> (k / 32 % 4 * 2) & 3;
            two | (block[k % 32] >> (k / 32) & 1) << 2
        }
        DType::S2_64 => block[4 + k % 16] >> (k / 16 * 2) & 3,
        DType::S3_64 => (block[2 + k % 16] >> (k / 16 * 2) & 3) | (block[18 + k / 8] >> (k % 8) & 1) << 2,
        DType::S4_64 => block[2 + k / 32 * 16 + k % 16] >> (k % 32 / 16 * 4) & 15,
        DType::Q6_K => {
            let (n, part) = (k / 128, k / 32 % 4);
            let byte = block[n * 64 + part % 2 * 32 + k % 32];
            let four = if part < 2 { byte & 15 } else { byte >> 4 };
            four | (block[128 + n * 32 + k % 32] >> (2 * part) & 3) << 4
        }
        DType::IQ4_XS => {
            let qs = &block[8 + k / 32 * 16..][..16];
            let four = if k % 32 < 16 { qs[k % 16] & 15 } else { qs[k % 16] >> 4 };
            (IQ4_VALUES[four as usize] as u8) ^ 0x80
        }
        DType::Q4_K | DType::Q5_K => {
            // 32 bytes hold the low halves of 32 columns and the high halves of the next 32.
            let (low, part) = (block.len() - 128, k / 32);
            let byte = block[low + k / 64 * 32 + k % 32];
            let four = if part.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
            if dtype == DType::Q4_K { four } else { four | (block[16 + k % 32] >> part & 1) << 4 }
        }
        other => unreachable!("no integer kernels for {other}"),
    }
}
