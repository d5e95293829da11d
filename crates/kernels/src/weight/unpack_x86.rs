//! Unpacking with AVX2: 8 rows of one quad (four columns) in a register.
//!
//! Offsets below count bytes of a block of 16 rows, field after field as [`super::panel::fields`] lists them.

use super::int8::{BLOCK, CODES, Format, Panel};
use crate::matmul::tile::PANEL;
use sparsam_dtype::DType;
use sparsam_dtype::codec::IQ4_VALUES;
use std::arch::x86_64::*;

/// Unpacks as [`super::unpack::unpack`], which checks the lengths; `false` if there is no version for the format.
///
/// # Safety
/// As there; the machine must have AVX2 and F16C.
pub(super) unsafe fn unpack(dtype: DType, panel: &[u8], blocks: usize, out: &Panel, signed: bool) -> bool {
    let p = panel.as_ptr();
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::Q4_0 => q4::<32>(p, blocks, out),
            DType::Q4_1 => q4::<64>(p, blocks, out),
            DType::Q5_0 => q5::<32>(p, blocks, out),
            DType::Q5_1 => q5::<64>(p, blocks, out),
            DType::IQ4_NL => iq4_nl(p, blocks, out, signed),
            DType::Q8_0 => q8_0(p, blocks, out, signed),
            DType::Q4_K => q45_k::<false>(p, blocks, out),
            DType::Q5_K => q45_k::<true>(p, blocks, out),
            DType::Q2_K => q2_k(p, blocks, out),
            DType::Q3_K => q3_k(p, blocks, out),
            DType::Q6_K => q6_k(p, blocks, out),
            DType::IQ4_XS => iq4_xs(p, blocks, out, signed),
            DType::S4_64 => s4(p, blocks, out),
            DType::S3_64 => s3(p, blocks, out),
            DType::S2_64 => s2(p, blocks, out),
            _ => return false,
        }
    }
    true
}

/// 8 f16 at `p`.
#[target_feature(enable = "avx2,f16c")]
unsafe fn halves(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise: 16 bytes.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(p.cast()) })
}

/// 32 bytes at `p`.
#[target_feature(enable = "avx2")]
unsafe fn load(p: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_loadu_si256(p.cast()) }
}

/// The codes of 8 rows (`half`) of a quad of a block to their place.
#[target_feature(enable = "avx2")]
unsafe fn put(out: &Panel, block: usize, quad: usize, half: usize, codes: __m256i) {
    // SAFETY: the caller's promise: the block exists.
    unsafe { _mm256_storeu_si256(out.codes.add(block * CODES + quad * 64 + half * 32).cast(), codes) };
}

/// Scales (or minima) of 16 rows from f16.
#[target_feature(enable = "avx2,f16c")]
unsafe fn put_halves(p: *const u8, out: *mut f32) {
    // SAFETY: the caller's promise: 32 bytes in, 16 numbers out.
    unsafe {
        _mm256_storeu_ps(out, halves(p));
        _mm256_storeu_ps(out.add(8), halves(p.add(16)));
    }
}

#[target_feature(enable = "avx2")]
fn low(v: __m256i) -> __m256i {
    _mm256_and_si256(v, _mm256_set1_epi8(15))
}

#[target_feature(enable = "avx2")]
fn high(v: __m256i) -> __m256i {
    low(_mm256_srli_epi16(v, 4))
}

/// `16` in each byte of `v` that has one of the bits of `bits`.
#[target_feature(enable = "avx2")]
fn fifth(v: __m256i, bits: __m256i) -> __m256i {
    let clear = _mm256_cmpeq_epi8(_mm256_and_si256(v, bits), _mm256_setzero_si256());
    _mm256_andnot_si256(clear, _mm256_set1_epi8(16))
}

/// Q4_0 (`HEAD` 32: scales) or Q4_1 (`HEAD` 64: scales, minima).
#[target_feature(enable = "avx2,f16c")]
unsafe fn q4<const HEAD: usize>(panel: *const u8, blocks: usize, out: &Panel) {
    for b in 0..blocks {
        // SAFETY: the caller's promise: a block takes `HEAD + 256` bytes.
        unsafe {
            let p = panel.add(b * (HEAD + 256));
            put_halves(p, out.d.add(b * PANEL));
            if HEAD == 64 {
                put_halves(p.add(32), out.m.add(b * PANEL));
            }
            for i in 0..8 {
                let v = load(p.add(HEAD + i * 32));
                put(out, b, i / 2, i % 2, low(v));
                put(out, b, i / 2 + 4, i % 2, high(v));
            }
        }
    }
}

/// Q5_0 (`HEAD` 32) or Q5_1 (`HEAD` 64): after the head the fifth bits, bit `i` of each byte for quad `i`.
#[target_feature(enable = "avx2,f16c")]
unsafe fn q5<const HEAD: usize>(panel: *const u8, blocks: usize, out: &Panel) {
    for b in 0..blocks {
        // SAFETY: the caller's promise: a block takes `HEAD + 64 + 256` bytes.
        unsafe {
            let p = panel.add(b * (HEAD + 320));
            put_halves(p, out.d.add(b * PANEL));
            if HEAD == 64 {
                put_halves(p.add(32), out.m.add(b * PANEL));
            }
            for half in 0..2 {
                let fifths = load(p.add(HEAD + half * 32));
                let of = |quad: usize| fifth(fifths, _mm256_set1_epi8((1u8 << quad) as i8));
                for quad in 0..4 {
                    let v = load(p.add(HEAD + 64 + quad * 64 + half * 32));
                    put(out, b, quad, half, _mm256_or_si256(low(v), of(quad)));
                    put(out, b, quad + 4, half, _mm256_or_si256(high(v), of(quad + 4)));
                }
            }
        }
    }
}

/// The 16 values of IQ4, signed or plus 128.
#[target_feature(enable = "avx2")]
fn iq4_table(signed: bool) -> __m256i {
    let values = IQ4_VALUES.map(|v| if signed { v as u8 } else { v as u8 ^ 0x80 });
    // SAFETY: 16 bytes.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(values.as_ptr().cast()) })
}

#[target_feature(enable = "avx2,f16c")]
unsafe fn iq4_nl(panel: *const u8, blocks: usize, out: &Panel, signed: bool) {
    let table = iq4_table(signed);
    for b in 0..blocks {
        // SAFETY: the caller's promise: a block takes 32 + 256 bytes.
        unsafe {
            let p = panel.add(b * 288);
            put_halves(p, out.d.add(b * PANEL));
            for i in 0..8 {
                let v = load(p.add(32 + i * 32));
                put(out, b, i / 2, i % 2, _mm256_shuffle_epi8(table, low(v)));
                put(out, b, i / 2 + 4, i % 2, _mm256_shuffle_epi8(table, high(v)));
            }
        }
    }
}

#[target_feature(enable = "avx2,f16c")]
unsafe fn q8_0(panel: *const u8, blocks: usize, out: &Panel, signed: bool) {
    let flip = _mm256_set1_epi8(if signed { 0 } else { -128 });
    for b in 0..blocks {
        // SAFETY: the caller's promise: a block takes 32 + 512 bytes.
        unsafe {
            let p = panel.add(b * 544);
            put_halves(p, out.d.add(b * PANEL));
            for i in 0..16 {
                put(out, b, i / 2, i % 2, _mm256_xor_si256(load(p.add(32 + i * 32)), flip));
            }
        }
    }
}

/// The low `BITS` bits of each lane after a shift to the right.
#[target_feature(enable = "avx2")]
fn bits(v: __m256i, shift: usize, mask: i32) -> __m256i {
    _mm256_and_si256(_mm256_srl_epi32(v, _mm_cvtsi32_si128(shift as i32)), _mm256_set1_epi32(mask))
}

/// Q4_K, or (with `FIFTH`) Q5_K: scales, minima, 12 bytes of 6-bit scales; four bits (for Q5_K by quads, with fifth bits).
#[target_feature(enable = "avx2,f16c")]
unsafe fn q45_k<const FIFTH: bool>(panel: *const u8, blocks: usize, out: &Panel) {
    let size = if FIFTH { 2816 } else { 2304 };
    for g in 0..blocks / 8 {
        // SAFETY: the caller's promise: a block takes `size` bytes and makes 8 of 32 columns.
        unsafe {
            let p = panel.add(g * size);
            for half in 0..2 {
                let (d, m) = (halves(p.add(half * 16)), halves(p.add(32 + half * 16)));
                let word = |i: usize| load(p.add(64 + i * 64 + half * 32));
                let (a, b, c) = (word(0), word(1), word(2));
                for i in 0..8 {
                    let t = i % 4 * 8;
                    let (scale, min) = if i < 4 {
                        (bits(a, t, 63), bits(b, t, 63))
                    } else {
                        let top = |v| _mm256_slli_epi32(bits(v, t + 6, 3), 4);
                        (_mm256_or_si256(bits(c, t, 15), top(a)), _mm256_or_si256(bits(c, t + 4, 15), top(b)))
                    };
                    let at = (g * 8 + i) * PANEL + half * 8;
                    _mm256_storeu_ps(out.d.add(at), _mm256_mul_ps(d, _mm256_cvtepi32_ps(scale)));
                    let m = _mm256_mul_ps(m, _mm256_cvtepi32_ps(min));
                    _mm256_storeu_ps(out.m.add(at), _mm256_xor_ps(m, _mm256_set1_ps(-0.0)));
                }
                for unit in 0..32 {
                    let (pair, quad) = (unit / 8, unit % 8);
                    let at = if FIFTH { 320 * (quad + 1) + 64 * pair } else { 256 + 64 * unit };
                    let v = load(p.add(at + half * 32));
                    let (mut lo, mut hi) = (low(v), high(v));
                    if FIFTH {
                        let f = load(p.add(256 + quad * 320 + half * 32));
                        let bit = |i: usize| _mm256_set1_epi8((1u8 << i) as i8);
                        lo = _mm256_or_si256(lo, fifth(f, bit(2 * pair)));
                        hi = _mm256_or_si256(hi, fifth(f, bit(2 * pair + 1)));
                    }
                    put(out, g * 8 + 2 * pair, quad, half, lo);
                    put(out, g * 8 + 2 * pair + 1, quad, half, hi);
                }
            }
        }
    }
}

/// Q6_K: the scale of scales (32); for each 128 columns 8 signed scales (128) and eight times three units (1536).
#[target_feature(enable = "avx2,f16c")]
unsafe fn q6_k(panel: *const u8, blocks: usize, out: &Panel) {
    let two = _mm256_set1_epi8(0x30);
    for g in 0..blocks / 8 {
        // SAFETY: the caller's promise: a block takes 3360 bytes and makes 8 of 32 columns, 16 of 16.
        unsafe {
            let p = panel.add(g * 3360);
            for half in 0..2 {
                let d = halves(p.add(half * 16));
                for n in 0..2 {
                    let p = p.add(32 + n * 1664);
                    for i in 0..8 {
                        let scale = _mm_loadl_epi64(p.add(i * 16 + half * 8).cast());
                        let scale = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scale));
                        let at = (g * 16 + n * 8 + i) * PANEL + half * 8;
                        _mm256_storeu_ps(out.d.add(at), _mm256_mul_ps(d, scale));
                    }
                    for quad in 0..8 {
                        let unit = |i: usize| load(p.add(128 + quad * 192 + i * 64 + half * 32));
                        let (a, b, h) = (unit(0), unit(1), unit(2));
                        let tops =
                            [_mm256_slli_epi16(h, 4), _mm256_slli_epi16(h, 2), h, _mm256_srli_epi16(h, 2)];
                        let fours = [low(a), low(b), high(a), high(b)];
                        for i in 0..4 {
                            let code = _mm256_or_si256(fours[i], _mm256_and_si256(tops[i], two));
                            put(out, g * 8 + n * 4 + i, quad, half, code);
                        }
                    }
                }
            }
        }
    }
}

/// Scale or minimum `i` of 16, a byte a row at `p`, as 8 f32.
#[target_feature(enable = "avx2")]
unsafe fn bytes(p: *const u8, i: usize, half: usize) -> __m256i {
    // SAFETY: the caller's promise: 16 times 16 bytes.
    _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(p.add(i * 16 + half * 8).cast()) })
}

/// Q2_K: scale and minimum of what follows (64), 16 bytes of scale (low) and minimum (256), two bits (1024).
#[target_feature(enable = "avx2,f16c")]
unsafe fn q2_k(panel: *const u8, blocks: usize, out: &Panel) {
    for g in 0..blocks / 8 {
        // SAFETY: the caller's promise: a block takes 1344 bytes and makes 8 of 32 columns, 16 of 16.
        unsafe {
            let p = panel.add(g * 1344);
            for half in 0..2 {
                let (d, m) = (halves(p.add(half * 16)), halves(p.add(32 + half * 16)));
                for i in 0..16 {
                    let at = (g * 16 + i) * PANEL + half * 8;
                    let v = bytes(p.add(64), i, half);
                    _mm256_storeu_ps(out.d.add(at), _mm256_mul_ps(d, _mm256_cvtepi32_ps(bits(v, 0, 15))));
                    let m = _mm256_mul_ps(m, _mm256_cvtepi32_ps(bits(v, 4, 15)));
                    _mm256_storeu_ps(out.m.add(at), _mm256_xor_ps(m, _mm256_set1_ps(-0.0)));
                }
                for unit in 0..16 {
                    let v = load(p.add(320 + unit * 64 + half * 32));
                    for (i, code) in two_bits(v).into_iter().enumerate() {
                        put(out, g * 8 + unit / 8 * 4 + i, unit % 8, half, code);
                    }
                }
            }
        }
    }
}

/// The four codes of two bits in each byte.
#[target_feature(enable = "avx2")]
fn two_bits(v: __m256i) -> [__m256i; 4] {
    let three = _mm256_set1_epi8(3);
    [
        _mm256_and_si256(v, three),
        _mm256_and_si256(_mm256_srli_epi16(v, 2), three),
        _mm256_and_si256(_mm256_srli_epi16(v, 4), three),
        _mm256_and_si256(_mm256_srli_epi16(v, 6), three),
    ]
}

/// S4_64: scales, and codes as two blocks of Q4_0 have them.
#[target_feature(enable = "avx2,f16c")]
unsafe fn s4(panel: *const u8, blocks: usize, out: &Panel) {
    for b in 0..blocks {
        // SAFETY: the caller's promise: a block takes 32 + 512 bytes and makes 2 of 32 columns.
        unsafe {
            let p = panel.add(b / 2 * 544);
            put_halves(p, out.d.add(b * PANEL));
            for i in 0..8 {
                let v = load(p.add(32 + b % 2 * 256 + i * 32));
                put(out, b, i / 2, i % 2, low(v));
                put(out, b, i / 2 + 4, i % 2, high(v));
            }
        }
    }
}

/// S3_64: scales (32), then three units for each 32 columns, as [`super::panel::s3_packed`] says.
#[target_feature(enable = "avx2,f16c")]
unsafe fn s3(panel: *const u8, blocks: usize, out: &Panel) {
    let (seven, three) = (_mm256_set1_epi8(7), _mm256_set1_epi8(3));
    for b in 0..blocks {
        // SAFETY: the caller's promise: a block takes 416 bytes and makes 2 of 32 columns.
        unsafe {
            let p = panel.add(b / 2 * 416);
            put_halves(p, out.d.add(b * PANEL));
            for half in 0..2 {
                let unit = |i: usize| load(p.add(32 + (b % 2 * 3 + i) * 64 + half * 32));
                let v = [unit(0), unit(1), unit(2)];
                for i in 0..3 {
                    put(out, b, 2 * i, half, _mm256_and_si256(v[i], seven));
                    put(out, b, 2 * i + 1, half, _mm256_and_si256(_mm256_srli_epi16(v[i], 3), seven));
                }
                let thirds = [_mm256_srli_epi16(v[2], 4), _mm256_srli_epi16(v[2], 5)];
                for i in 0..2 {
                    let two = _mm256_and_si256(_mm256_srli_epi16(v[i], 6), three);
                    let third = _mm256_and_si256(thirds[i], _mm256_set1_epi8(4));
                    put(out, b, 6 + i, half, _mm256_or_si256(two, third));
                }
            }
        }
    }
}

/// S2_64: scales (32), minima (32), two bits of four times 16 columns in a byte (256).
#[target_feature(enable = "avx2,f16c")]
unsafe fn s2(panel: *const u8, blocks: usize, out: &Panel) {
    for g in 0..blocks / 2 {
        // SAFETY: the caller's promise: a block takes 320 bytes and makes 2 of 32 columns.
        unsafe {
            let p = panel.add(g * 320);
            for b in 2 * g..2 * g + 2 {
                put_halves(p, out.d.add(b * PANEL));
                put_halves(p.add(32), out.m.add(b * PANEL));
            }
            for unit in 0..8 {
                let v = load(p.add(64 + unit * 32));
                for (i, code) in two_bits(v).into_iter().enumerate() {
                    put(out, 2 * g + i / 2, unit / 2 + i % 2 * 4, unit % 2, code);
                }
            }
        }
    }
}

/// Q3_K: the scale of scales (32), 12 bytes of these (192), eight times third bits (64) and two bits (128).
#[target_feature(enable = "avx2,f16c")]
unsafe fn q3_k(panel: *const u8, blocks: usize, out: &Panel) {
    for g in 0..blocks / 8 {
        // SAFETY: the caller's promise: a block takes 1760 bytes and makes 8 of 32 columns, 16 of 16.
        unsafe {
            let p = panel.add(g * 1760);
            for half in 0..2 {
                let d = halves(p.add(half * 16));
                let word = |i: usize| load(p.add(32 + i * 64 + half * 32));
                let words = [word(0), word(1), word(2)];
                for i in 0..16 {
                    let low = bits(words[i % 8 / 4], i % 4 * 8 + i / 8 * 4, 15);
                    let top = _mm256_slli_epi32(bits(words[2], i % 4 * 8 + 2 * (i / 4), 3), 4);
                    let scale = _mm256_sub_epi32(_mm256_or_si256(low, top), _mm256_set1_epi32(32));
                    let scale = _mm256_mul_ps(d, _mm256_cvtepi32_ps(scale));
                    _mm256_storeu_ps(out.d.add((g * 16 + i) * PANEL + half * 8), scale);
                }
                for unit in 0..16 {
                    let quad = p.add(224 + unit % 8 * 192 + half * 32);
                    let (thirds, v) = (load(quad), load(quad.add(64 + unit / 8 * 64)));
                    for (i, code) in two_bits(v).into_iter().enumerate() {
                        let block = unit / 8 * 4 + i;
                        let bit = fifth(thirds, _mm256_set1_epi8((1u8 << block) as i8));
                        let code = _mm256_or_si256(code, _mm256_srli_epi16(bit, 2));
                        put(out, g * 8 + block, unit % 8, half, code);
                    }
                }
            }
        }
    }
}

/// IQ4_XS: scales (32), two high bits of 8 scales (32), four low bits (64), codes (2048).
#[target_feature(enable = "avx2,f16c")]
unsafe fn iq4_xs(panel: *const u8, blocks: usize, out: &Panel, signed: bool) {
    let table = iq4_table(signed);
    for g in 0..blocks / 8 {
        // SAFETY: the caller's promise: a block takes 2176 bytes and makes 8 of 32 columns.
        unsafe {
            let p = panel.add(g * 2176);
            for half in 0..2 {
                let d = halves(p.add(half * 16));
                let tops = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(32 + half * 16).cast()));
                let lows = load(p.add(64 + half * 32));
                for i in 0..8 {
                    let top = _mm256_slli_epi32(bits(tops, 2 * i, 3), 4);
                    let scale = _mm256_or_si256(bits(lows, 4 * i, 15), top);
                    let scale = _mm256_cvtepi32_ps(_mm256_sub_epi32(scale, _mm256_set1_epi32(32)));
                    _mm256_storeu_ps(out.d.add((g * 8 + i) * PANEL + half * 8), _mm256_mul_ps(d, scale));
                    for quad in 0..4 {
                        let v = load(p.add(128 + (i * 4 + quad) * 64 + half * 32));
                        put(out, g * 8 + i, quad, half, _mm256_shuffle_epi8(table, low(v)));
                        put(out, g * 8 + i, quad + 4, half, _mm256_shuffle_epi8(table, high(v)));
                    }
                }
            }
        }
    }
}

/// Unpacked codes to f32 `[column][16]`: `(code - offset) * d`, plus the minimum with `MIN`.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn floats<const MIN: bool>(panel: &Panel, blocks: usize, format: Format, out: *mut f32) {
    let (byte, offset) = (_mm256_set1_epi32(255), _mm256_set1_epi32(format.offset));
    for b in 0..blocks {
        for quad in 0..8 {
            let scale = b * format.parts + quad * format.parts / 8;
            for half in 0..2 {
                // SAFETY: the caller's promise: `blocks` blocks on both sides.
                unsafe {
                    let d = _mm256_loadu_ps(panel.d.add(scale * PANEL + half * 8));
                    let m = if MIN { _mm256_loadu_ps(panel.m.add(scale * PANEL + half * 8)) } else { d };
                    let v = load(panel.codes.add(b * CODES + quad * 64 + half * 32));
                    let to = out.add((b * BLOCK + quad * 4) * PANEL + half * 8);
                    let codes = [
                        _mm256_and_si256(v, byte),
                        _mm256_and_si256(_mm256_srli_epi32(v, 8), byte),
                        _mm256_and_si256(_mm256_srli_epi32(v, 16), byte),
                        _mm256_srli_epi32(v, 24),
                    ];
                    for (i, code) in codes.into_iter().enumerate() {
                        let y = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(code, offset)), d);
                        let y = if MIN { _mm256_add_ps(y, m) } else { y };
                        _mm256_storeu_ps(to.add(i * PANEL), y);
                    }
                }
            }
        }
    }
}
