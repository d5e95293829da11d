//! Blocks of 32 weights: `Q4_0`, `Q4_1`, `Q5_0`, `Q5_1`, `Q8_0`, `Q8_1`, `IQ4_NL`.
//!
//! 4-bit codes lie in 16 bytes: the low halves are elements 0 to 15, the high halves elements 16 to 31. The fifth bit
//! of element `i` is bit `i` of a little-endian u32.

use super::fit::{self, Grid};
use super::{IQ4_VALUES, f16_at, put_f16};

/// The 4-bit codes of a block in element order.
fn nibbles(qs: &[u8]) -> [u8; 32] {
    std::array::from_fn(|i| qs[i % 16] >> (i / 16 * 4) & 15)
}

/// `nibbles` backwards; codes below 16.
pub(super) fn put_nibbles(qs: &mut [u8], codes: &[u8; 32]) {
    for i in 0..16 {
        qs[i] = codes[i] | codes[i + 16] << 4;
    }
}

/// The u32 at `at`, which holds the fifth bits.
fn fifth_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// `Q4_0`: f16 `d`, codes; `d * (code - 8)`.
pub fn decode_q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let (d, q) = (f16_at(block, 0), nibbles(&block[2..]));
    for i in 0..32 {
        out[i] = d * (q[i] as i32 - 8) as f32;
    }
}

/// `Q4_1`: f16 `d`, f16 `m`, codes; `d * code + m`.
pub fn decode_q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m, q) = (f16_at(block, 0), f16_at(block, 2), nibbles(&block[4..]));
    for i in 0..32 {
        out[i] = d * q[i] as f32 + m;
    }
}

/// `Q5_0`: f16 `d`, fifth bits, codes; `d * (code - 16)`.
pub fn decode_q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let (d, high, q) = (f16_at(block, 0), fifth_bits(block, 2), nibbles(&block[6..]));
    for i in 0..32 {
        out[i] = d * ((q[i] as u32 | (high >> i & 1) << 4) as i32 - 16) as f32;
    }
}

/// `Q5_1`: f16 `d`, f16 `m`, fifth bits, codes; `d * code + m`.
pub fn decode_q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m, high, q) = (f16_at(block, 0), f16_at(block, 2), fifth_bits(block, 4), nibbles(&block[8..]));
    for i in 0..32 {
        out[i] = d * (q[i] as u32 | (high >> i & 1) << 4) as f32 + m;
    }
}

/// `Q8_0`: f16 `d`, 32 i8; `d * code`.
pub fn decode_q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for i in 0..32 {
        out[i] = d * (block[2 + i] as i8) as f32;
    }
}

/// `Q8_1`: f16 `d`, f16 sum of the values (not read here), 32 i8; `d * code`.
pub fn decode_q8_1(block: &[u8; 36], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for i in 0..32 {
        out[i] = d * (block[4 + i] as i8) as f32;
    }
}

/// `IQ4_NL`: f16 `d`, codes; `d * IQ4_VALUES[code]`.
pub fn decode_iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    let (d, q) = (f16_at(block, 0), nibbles(&block[2..]));
    for i in 0..32 {
        out[i] = d * IQ4_VALUES[q[i] as usize] as f32;
    }
}

/// The element of largest magnitude, with its sign; the first of several.
fn signed_max(x: &[f32; 32]) -> f32 {
    let mut best = 0.0f32;
    for &v in x {
        if v.abs() > best.abs() {
            best = v;
        }
    }
    best
}

/// Smallest and largest element.
fn range(x: &[f32; 32]) -> (f32, f32) {
    x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &v| (lo.min(v), hi.max(v)))
}

/// `1 / d`, 0 for 0 (a block of equal elements).
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// Codes of a format whose largest magnitude takes code 0: `d = max / -half`, `half = 8` or `16`.
fn symmetric(x: &[f32; 32], half: u8) -> (f32, [u8; 32]) {
    let d = signed_max(x) / -(half as f32);
    let id = inverse(d);
    (d, x.map(|v| ((v * id + (half as f32 + 0.5)) as u8).min(2 * half - 1)))
}

/// Codes of a format with a minimum: `d = (max - min) / top`, `top = 15` or `31`.
fn affine(x: &[f32; 32], top: u8) -> (f32, f32, [u8; 32]) {
    let (lo, hi) = range(x);
    let d = (hi - lo) / top as f32;
    let id = inverse(d);
    (d, lo, x.map(|v| (((v - lo) * id + 0.5) as u8).min(top)))
}

/// Writes fifth bits and codes.
pub(super) fn put_five_bits(high: &mut [u8], qs: &mut [u8], codes: &[u8; 32]) {
    let bits = codes.iter().enumerate().fold(0u32, |bits, (i, &c)| bits | u32::from(c >> 4) << i);
    high.copy_from_slice(&bits.to_le_bytes());
    put_nibbles(qs, &codes.map(|c| c & 15));
}

/// Nearest `Q4_0`: the element of largest magnitude takes code 0 (-8), so its sign decides the scale's.
pub fn encode_q4_0(x: &[f32; 32], block: &mut [u8; 18]) {
    let (d, codes) = symmetric(x, 8);
    put_f16(block, 0, d);
    put_nibbles(&mut block[2..], &codes);
}

/// Nearest `Q4_1`.
pub fn encode_q4_1(x: &[f32; 32], block: &mut [u8; 20]) {
    let (d, m, codes) = affine(x, 15);
    put_f16(block, 0, d);
    put_f16(block, 2, m);
    put_nibbles(&mut block[4..], &codes);
}

/// Nearest `Q5_0`.
pub fn encode_q5_0(x: &[f32; 32], block: &mut [u8; 22]) {
    let (d, codes) = symmetric(x, 16);
    put_f16(block, 0, d);
    let (high, qs) = block[2..].split_at_mut(4);
    put_five_bits(high, qs, &codes);
}

/// Nearest `Q5_1`.
pub fn encode_q5_1(x: &[f32; 32], block: &mut [u8; 24]) {
    let (d, m, codes) = affine(x, 31);
    put_f16(block, 0, d);
    put_f16(block, 2, m);
    let (high, qs) = block[4..].split_at_mut(4);
    put_five_bits(high, qs, &codes);
}

/// Nearest `Q8_0`: halves round away from zero.
pub fn encode_q8_0(x: &[f32; 32], block: &mut [u8; 34]) {
    let d = signed_max(x).abs() / 127.0;
    let id = inverse(d);
    put_f16(block, 0, d);
    for i in 0..32 {
        block[2 + i] = (x[i] * id).round() as i8 as u8;
    }
}

/// Nearest `Q8_1`: as `Q8_0`, with the sum of the values.
pub fn encode_q8_1(x: &[f32; 32], block: &mut [u8; 36]) {
    let d = signed_max(x).abs() / 127.0;
    let id = inverse(d);
    let codes = x.map(|v| (v * id).round() as i8);
    put_f16(block, 0, d);
    put_f16(block, 2, d * codes.iter().map(|&c| i32::from(c)).sum::<i32>() as f32);
    for i in 0..32 {
        block[4 + i] = codes[i] as u8;
    }
}

/// `IQ4_NL` with a searched scale (`codec/fit.rs`).
pub fn encode_iq4_nl(x: &[f32; 32], block: &mut [u8; 18]) {
    let part = fit::Part { x, w: &fit::importance(x, 32) };
    put_f16(block, 0, fit::best_scale::<fit::Table>(part));
    // Codes for the scale as f16 holds it.
    let id = inverse(f16_at(block, 0));
    put_nibbles(&mut block[2..], &x.map(|v| fit::Table::nearest(v * id).0));
}
