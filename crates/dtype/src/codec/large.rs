//! Blocks of 256 weights: the "K" formats and `IQ4_XS`.
//!
//! A block has one or two f16 scales and small integer scales for its groups of 16 or 32 weights. Codes of more than
//! 4 bits are split into a low and a high part; each part packs rows of 32 consecutive elements next to each other in
//! the same bytes: element `e` of a 2-bit part lies in byte `e / 128 * 32 + e % 32` at bit `e % 128 / 32 * 2`.

use super::{IQ4_VALUES, f16_at, fit, put_f16};

/// The 2-bit part of element `e`.
fn two_bits(qs: &[u8], e: usize) -> u8 {
    qs[e / 128 * 32 + e % 32] >> (e % 128 / 32 * 2) & 3
}

/// The 1-bit part of element `e`.
fn one_bit(qs: &[u8], e: usize) -> u8 {
    qs[e % 32] >> (e / 32) & 1
}

/// The 4-bit code of element `e` of `Q4_K` and `Q5_K`.
fn four_bits(qs: &[u8], e: usize) -> u8 {
    qs[e / 64 * 32 + e % 32] >> (e % 64 / 32 * 4) & 15
}

/// The 6-bit scale and minimum of group `j` (of 8) of `Q4_K` and `Q5_K`, from their 12 bytes.
///
/// The first four groups lie in the low 6 bits of bytes 0 to 3 (scales) and 4 to 7 (minima); the others have their
/// low 4 bits in bytes 8 to 11 and their high 2 bits on top of the first four's.
pub fn scale_min(scales: &[u8; 12], j: usize) -> (u8, u8) {
    if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        let low = scales[j + 4];
        (low & 15 | scales[j - 4] >> 6 << 4, low >> 4 | scales[j] >> 6 << 4)
    }
}

/// The 12 bytes that hold scales and minima.
fn scale_bytes(block: &[u8], at: usize) -> &[u8; 12] {
    block[at..].first_chunk().expect("the block is longer than its scales")
}

/// The signed 6-bit scale of group `j` (of 16) of `Q3_K`, from its 12 bytes.
pub fn q3_k_scale(scales: &[u8; 12], j: usize) -> i8 {
    let low = scales[j % 8] >> (j / 8 * 4) & 15;
    let high = scales[8 + j % 4] >> (j / 4 * 2) & 3;
    (low | high << 4) as i8 - 32
}

/// `Q2_K`: 16 bytes of 4-bit scale (low) and minimum (high), 64 bytes of 2-bit codes, f16 `d`, f16 `dmin`;
/// `d * scale * code - dmin * min`.
pub fn decode_q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
    for g in 0..16 {
        let (scale, min) = (d * (block[g] & 15) as f32, dmin * (block[g] >> 4) as f32);
        for e in g * 16..g * 16 + 16 {
            out[e] = scale * two_bits(&block[16..80], e) as f32 - min;
        }
    }
}

/// `Q3_K`: 32 bytes of third bits, 64 bytes of 2-bit parts, 12 bytes of scales, f16 `d`;
/// `d * scale * (code - 4)`.
pub fn decode_q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = f16_at(block, 108);
    for g in 0..16 {
        let scale = d * q3_k_scale(scale_bytes(block, 96), g) as f32;
        for e in g * 16..g * 16 + 16 {
            let code = two_bits(&block[32..96], e) | one_bit(&block[..32], e) << 2;
            out[e] = scale * (code as i32 - 4) as f32;
        }
    }
}

/// `Q4_K`: f16 `d`, f16 `dmin`, 12 bytes of scales and minima, 128 bytes of 4-bit codes;
/// `d * scale * code - dmin * min`.
pub fn decode_q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    for g in 0..8 {
        let (scale, min) = scale_min(scale_bytes(block, 4), g);
        let (scale, min) = (d * scale as f32, dmin * min as f32);
        for e in g * 32..g * 32 + 32 {
            out[e] = scale * four_bits(&block[16..], e) as f32 - min;
        }
    }
}

/// `Q5_K`: f16 `d`, f16 `dmin`, 12 bytes of scales and minima, 32 bytes of fifth bits, 128 bytes of 4-bit parts;
/// `d * scale * code - dmin * min`.
pub fn decode_q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    for g in 0..8 {
        let (scale, min) = scale_min(scale_bytes(block, 4), g);
        let (scale, min) = (d * scale as f32, dmin * min as f32);
        for e in g * 32..g * 32 + 32 {
            let code = four_bits(&block[48..], e) | one_bit(&block[16..48], e) << 4;
            out[e] = scale * code as f32 - min;
        }
    }
}

/// `Q6_K`: 128 bytes of 4-bit parts (halves of 64 elements, not 32), 64 bytes of 2-bit parts, 16 i8 scales, f16 `d`;
/// `d * scale * (code - 32)`.
pub fn decode_q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = f16_at(block, 208);
    for g in 0..16 {
        let scale = d * (block[192 + g] as i8) as f32;
        for e in g * 16..g * 16 + 16 {
            let low = block[e / 128 * 64 + e % 64] >> (e % 128 / 64 * 4) & 15;
            let code = low | two_bits(&block[128..192], e) << 4;
            out[e] = scale * (code as i32 - 32) as f32;
        }
    }
}

/// `Q8_K`: f32 `d`, 256 i8, 16 i16 sums of codes (not read here); `d * code`.
pub fn decode_q8_k(block: &[u8; 292], out: &mut [f32; 256]) {
    let d = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    for e in 0..256 {
        out[e] = d * (block[4 + e] as i8) as f32;
    }
}

/// `IQ4_XS`: f16 `d`, u16 of high scale bits, 4 bytes of low scale bits, 128 bytes of 4-bit codes (16 bytes for each
/// group of 32); `d * (scale - 32) * IQ4_VALUES[code]`.
pub fn decode_iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for g in 0..8 {
        let scale = (block[4 + g / 2] >> (g % 2 * 4) & 15) | ((high >> (2 * g) & 3) as u8) << 4;
        let scale = d * (scale as i32 - 32) as f32;
        for i in 0..32 {
            let code = block[8 + g * 16 + i % 16] >> (i / 16 * 4) & 15;
            out[g * 32 + i] = scale * IQ4_VALUES[code as usize] as f32;
        }
    }
}

/// `two_bits` backwards, into zeroed bytes.
fn put_two_bits(qs: &mut [u8], e: usize, code: u8) {
    qs[e / 128 * 32 + e % 32] |= code << (e % 128 / 32 * 2);
}

/// `one_bit` backwards, into zeroed bytes.
fn put_one_bit(qs: &mut [u8], e: usize, code: u8) {
    qs[e % 32] |= code << (e / 32);
}

/// `four_bits` backwards, into zeroed bytes.
fn put_four_bits(qs: &mut [u8], e: usize, code: u8) {
    qs[e / 64 * 32 + e % 32] |= code << (e % 64 / 32 * 4);
}

/// [`scale_min`] backwards: the 12 bytes of 8 scales and minima below 64.
fn pack_scale_min(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut out = [0; 12];
    for j in 0..4 {
        out[j] = scales[j] | scales[j + 4] >> 4 << 6;
        out[j + 4] = mins[j] | mins[j + 4] >> 4 << 6;
        out[j + 8] = (scales[j + 4] & 15) | (mins[j + 4] & 15) << 4;
    }
    out
}

/// Writes a `Q2_K` block: scales and minima below 16, codes below 4.
pub(super) fn pack_q2_k(
    d: [f32; 2],
    scales: &[i32; 16],
    mins: &[u8; 16],
    codes: &[u8; 256],
    block: &mut [u8; 84],
) {
    block.fill(0);
    for g in 0..16 {
        block[g] = scales[g] as u8 | mins[g] << 4;
    }
    for e in 0..256 {
        put_two_bits(&mut block[16..80], e, codes[e]);
    }
    put_f16(block, 80, d[0]);
    put_f16(block, 82, d[1]);
}

/// Writes a `Q3_K` block: scales from -32 to 31, codes below 8.
pub(super) fn pack_q3_k(d: f32, scales: &[i32; 16], codes: &[u8; 256], block: &mut [u8; 110]) {
    block.fill(0);
    for e in 0..256 {
        put_one_bit(&mut block[..32], e, codes[e] >> 2);
        put_two_bits(&mut block[32..96], e, codes[e] & 3);
    }
    for j in 0..16 {
        let scale = (scales[j] + 32) as u8;
        block[96 + j % 8] |= (scale & 15) << (j / 8 * 4);
        block[104 + j % 4] |= scale >> 4 << (j / 4 * 2);
    }
    put_f16(block, 108, d);
}

/// Writes a `Q4_K` block: scales and minima below 64, codes below 16.
pub(super) fn pack_q4_k(
    d: [f32; 2],
    scales: &[i32; 8],
    mins: &[u8; 8],
    codes: &[u8; 256],
    block: &mut [u8; 144],
) {
    block.fill(0);
    put_f16(block, 0, d[0]);
    put_f16(block, 2, d[1]);
    block[4..16].copy_from_slice(&pack_scale_min(&scales.map(|s| s as u8), mins));
    for e in 0..256 {
        put_four_bits(&mut block[16..], e, codes[e]);
    }
}

/// Writes a `Q5_K` block: scales and minima below 64, codes below 32.
pub(super) fn pack_q5_k(
    d: [f32; 2],
    scales: &[i32; 8],
    mins: &[u8; 8],
    codes: &[u8; 256],
    block: &mut [u8; 176],
) {
    block.fill(0);
    put_f16(block, 0, d[0]);
    put_f16(block, 2, d[1]);
    block[4..16].copy_from_slice(&pack_scale_min(&scales.map(|s| s as u8), mins));
    for e in 0..256 {
        put_one_bit(&mut block[16..48], e, codes[e] >> 4);
        put_four_bits(&mut block[48..], e, codes[e] & 15);
    }
}

/// Writes a `Q6_K` block: scales from -128 to 127, codes below 64.
pub(super) fn pack_q6_k(d: f32, scales: &[i32; 16], codes: &[u8; 256], block: &mut [u8; 210]) {
    block.fill(0);
    for e in 0..256 {
        block[e / 128 * 64 + e % 64] |= (codes[e] & 15) << (e % 128 / 64 * 4);
        put_two_bits(&mut block[128..192], e, codes[e] >> 4);
    }
    for g in 0..16 {
        block[192 + g] = scales[g] as i8 as u8;
    }
    put_f16(block, 208, d);
}

/// Writes an `IQ4_XS` block: scales from -32 to 31, codes below 16.
pub(super) fn pack_iq4_xs(d: f32, scales: &[i32; 8], codes: &[u8; 256], block: &mut [u8; 136]) {
    block.fill(0);
    put_f16(block, 0, d);
    let mut high = 0u16;
    for g in 0..8 {
        let scale = (scales[g] + 32) as u8;
        block[4 + g / 2] |= (scale & 15) << (g % 2 * 4);
        high |= u16::from(scale >> 4) << (2 * g);
        for i in 0..32 {
            block[8 + g * 16 + i % 16] |= codes[g * 32 + i] << (i / 16 * 4);
        }
    }
    block[2..4].copy_from_slice(&high.to_le_bytes());
}

/// `Q2_K` with searched scales (`codec/fit.rs`).
pub fn encode_q2_k(x: &[f32; 256], block: &mut [u8; 84]) {
    let f = fit::affine::<16>(x, &fit::importance(x, 16), 3, 15);
    pack_q2_k([f.d, f.dmin], &f.scales.map(i32::from), &f.mins, &f.codes, block);
}

/// `Q3_K` with searched scales.
pub fn encode_q3_k(x: &[f32; 256], block: &mut [u8; 110]) {
    let f = fit::symmetric::<fit::Whole<4>, 16>(x, &fit::importance(x, 16), -32);
    pack_q3_k(f.d, &f.scales, &f.codes, block);
}

/// `Q4_K` with searched scales.
pub fn encode_q4_k(x: &[f32; 256], block: &mut [u8; 144]) {
    let f = fit::affine::<8>(x, &fit::importance(x, 32), 15, 63);
    pack_q4_k([f.d, f.dmin], &f.scales.map(i32::from), &f.mins, &f.codes, block);
}

/// `Q5_K` with searched scales.
pub fn encode_q5_k(x: &[f32; 256], block: &mut [u8; 176]) {
    let f = fit::affine::<8>(x, &fit::importance(x, 32), 31, 63);
    pack_q5_k([f.d, f.dmin], &f.scales.map(i32::from), &f.mins, &f.codes, block);
}

/// `Q6_K` with searched scales.
pub fn encode_q6_k(x: &[f32; 256], block: &mut [u8; 210]) {
    let f = fit::symmetric::<fit::Whole<32>, 16>(x, &fit::importance(x, 16), -128);
    pack_q6_k(f.d, &f.scales, &f.codes, block);
}

/// `IQ4_XS` with searched scales.
pub fn encode_iq4_xs(x: &[f32; 256], block: &mut [u8; 136]) {
    let f = fit::symmetric::<fit::Table, 8>(x, &fit::importance(x, 32), -32);
    pack_iq4_xs(f.d, &f.scales, &f.codes, block);
}

/// `Q8_K`: nearest, halves away from zero, with the sums of 16 codes each.
pub fn encode_q8_k(x: &[f32; 256], block: &mut [u8; 292]) {
    let d = x.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    block[..4].copy_from_slice(&d.to_le_bytes());
    for g in 0..16 {
        let mut sum = 0i16;
        for e in g * 16..g * 16 + 16 {
            let code = (x[e] * inverse).round() as i8;
            block[4 + e] = code as u8;
            sum += i16::from(code);
        }
        block[260 + 2 * g..262 + 2 * g].copy_from_slice(&sum.to_le_bytes());
    }
}
