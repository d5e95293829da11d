//! Blocks of 64 weights that are this project's own: `S2_64`, `S3_64`, `S4_64`.
//!
//! A block starts with its f16 scale (and minimum). Two-bit parts lie in 16 bytes: element `e` in byte `e % 16` at bit
//! `e / 16 * 2`. Third bits are a bit string: element `e` is bit `e % 8` of byte `e / 8`. Four-bit codes lie as in `Q4_0`,
//! 16 bytes for each half of the block.

use super::fit::{self, Minimum, Part};
use super::{f16_at, put_f16};

fn two_bits(qs: &[u8], e: usize) -> u8 {
    qs[e % 16] >> (e / 16 * 2) & 3
}

fn put_two_bits(qs: &mut [u8], codes: &[u8; 64]) {
    qs[..16].fill(0);
    for (e, &c) in codes.iter().enumerate() {
        qs[e % 16] |= (c & 3) << (e / 16 * 2);
    }
}

/// `S2_64`: f16 `d`, f16 `m`, codes; `d * code + m`.
pub fn decode_s2_64(block: &[u8; 20], out: &mut [f32; 64]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    for e in 0..64 {
        out[e] = d * f32::from(two_bits(&block[4..], e)) + m;
    }
}

/// `S3_64`: f16 `d`, 16 bytes of two bits, 8 bytes of third bits; `d * (code - 4)`.
pub fn decode_s3_64(block: &[u8; 26], out: &mut [f32; 64]) {
    let d = f16_at(block, 0);
    for e in 0..64 {
        let code = two_bits(&block[2..18], e) | (block[18 + e / 8] >> (e % 8) & 1) << 2;
        out[e] = d * (i32::from(code) - 4) as f32;
    }
}

/// `S4_64`: f16 `d`, codes; `d * (code - 8)`.
pub fn decode_s4_64(block: &[u8; 34], out: &mut [f32; 64]) {
    let d = f16_at(block, 0);
    for e in 0..64 {
        let code = block[2 + e / 32 * 16 + e % 16] >> (e % 32 / 16 * 4) & 15;
        out[e] = d * (i32::from(code) - 8) as f32;
    }
}

/// Writes an `S2_64` block: codes below 4.
pub(super) fn pack_s2_64(d: f32, m: f32, codes: &[u8; 64], block: &mut [u8; 20]) {
    put_f16(block, 0, d);
    put_f16(block, 2, m);
    put_two_bits(&mut block[4..], codes);
}

/// Writes an `S3_64` block: codes below 8.
pub(super) fn pack_s3_64(d: f32, codes: &[u8; 64], block: &mut [u8; 26]) {
    put_f16(block, 0, d);
    put_two_bits(&mut block[2..18], codes);
    block[18..].fill(0);
    for (e, &c) in codes.iter().enumerate() {
        block[18 + e / 8] |= (c >> 2) << (e % 8);
    }
}

/// Writes an `S4_64` block: codes below 16.
pub(super) fn pack_s4_64(d: f32, codes: &[u8; 64], block: &mut [u8; 34]) {
    put_f16(block, 0, d);
    block[2..].fill(0);
    for (e, &c) in codes.iter().enumerate() {
        block[2 + e / 32 * 16 + e % 16] |= c << (e % 32 / 16 * 4);
    }
}

/// Codes of a symmetric format with its searched scale, as f16 holds it.
fn whole<const HALF: i32>(x: &[f32; 64]) -> (f32, [u8; 64]) {
    let w = fit::importance(x, 64);
    let d = super::blocks::stored(fit::best_scale::<fit::Whole<HALF>>(Part { x, w: &w }));
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    (d, x.map(|v| <fit::Whole<HALF> as fit::Grid>::nearest(v * inverse).0))
}

/// `S2_64` with searched scale and minimum.
pub fn encode_s2_64(x: &[f32; 64], block: &mut [u8; 20]) {
    let w = fit::importance(x, 64);
    let (d, min) = fit::best_affine(Part { x, w: &w }, 3.0, Minimum::Free);
    let (d, min) = (super::blocks::stored(d), super::blocks::stored(min));
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    pack_s2_64(d, -min, &x.map(|v| ((v + min) * inverse).round().clamp(0.0, 3.0) as u8), block);
}

/// `S3_64` with a searched scale.
pub fn encode_s3_64(x: &[f32; 64], block: &mut [u8; 26]) {
    let (d, codes) = whole::<4>(x);
    pack_s3_64(d, &codes, block);
}

/// `S4_64` with a searched scale.
pub fn encode_s4_64(x: &[f32; 64], block: &mut [u8; 34]) {
    let (d, codes) = whole::<8>(x);
    pack_s4_64(d, &codes, block);
}
