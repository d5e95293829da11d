//! Panels to f32 with AVX2, for the formats that models mostly come in.

use super::int8::{BLOCK, CODES, Format, Panel};
use super::unpack_x86;
use crate::matmul::scratch::Scratch;
use crate::matmul::tile::PANEL;
use sparsam_dtype::DType;
use sparsam_dtype::codec::nf4::LEVELS;
use std::arch::x86_64::*;

/// Decodes as [`super::panel::decode`], which checks the lengths; `false` if there is no version for the format.
///
/// The caller has checked that the machine has AVX2, FMA and F16C.
pub(super) fn decode(dtype: DType, panel: &[u8], kc: usize, out: &mut [f32]) -> bool {
    // SAFETY: `panel` and `out` hold `kc` elements of 16 rows, and `kc` is a whole number of blocks.
    unsafe {
        match dtype {
            DType::F16 => f16(panel, kc, out),
            DType::BF16 => bf16(panel, kc, out),
            DType::Q4_0 => q4::<false>(panel, kc, out),
            DType::Q4_1 => q4::<true>(panel, kc, out),
            DType::Q8_0 => q8_0(panel, kc, out),
            _ => return unpacked(dtype, panel, kc, out),
        }
    }
    true
}

/// By way of one code a byte, for formats whose bits lie in several places.
unsafe fn unpacked(dtype: DType, panel: &[u8], kc: usize, out: &mut [f32]) -> bool {
    let Some(format) = Format::of(dtype) else { return false };
    let blocks = kc / BLOCK;
    let len = blocks * format.parts * PANEL;
    let (mut codes, mut scales) = (Scratch::of::<u8>(blocks * CODES), Scratch::of::<f32>(2 * len));
    let d = scales.ptr::<f32>();
    let to = Panel { codes: codes.ptr(), d, m: d.wrapping_add(len) };
    // SAFETY: the buffers have room for `blocks` blocks; the rest is the caller's promise.
    unsafe {
        let known = unpack_x86::unpack(dtype, panel, blocks, &to, false);
        match format.min {
            true => unpack_x86::floats::<true>(&to, blocks, format, out.as_mut_ptr()),
            false => unpack_x86::floats::<false>(&to, blocks, format, out.as_mut_ptr()),
        }
        known
    }
}

/// 16 f16 as two registers of f32.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn halves(p: *const u8) -> [__m256; 2] {
    // SAFETY: the caller's promise: 32 bytes.
    unsafe {
        let (lo, hi) = (_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.add(16).cast()));
        [_mm256_cvtph_ps(lo), _mm256_cvtph_ps(hi)]
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn f16(panel: &[u8], kc: usize, out: &mut [f32]) {
    for k in 0..kc {
        // SAFETY: 16 elements of 2 bytes a k.
        unsafe {
            let v = halves(panel.as_ptr().add(k * 32));
            _mm256_storeu_ps(out.as_mut_ptr().add(k * PANEL), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(k * PANEL + 8), v[1]);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn bf16(panel: &[u8], kc: usize, out: &mut [f32]) {
    let high = _mm256_set1_epi32(0xFFFF_0000u32 as i32);
    for k in 0..kc {
        for half in 0..2 {
            // SAFETY: a pair of k takes 16 words of 4 bytes.
            unsafe {
                let v = _mm256_loadu_si256(panel.as_ptr().add(k / 2 * 64 + half * 32).cast());
                let v = if k % 2 == 0 { _mm256_slli_epi32(v, 16) } else { _mm256_and_si256(v, high) };
                _mm256_storeu_ps(out.as_mut_ptr().add(k * PANEL + half * 8), _mm256_castsi256_ps(v));
            }
        }
    }
}

/// Byte `t` of each lane: four k of 8 rows lie in one register.
macro_rules! each_byte {
    ($v:expr, |$t:ident, $x:ident| $body:expr) => {{
        let v = $v;
        let low = _mm256_set1_epi32(0xFF);
        {
            let ($t, $x) = (0usize, _mm256_and_si256(v, low));
            $body
        }
        {
            let ($t, $x) = (1usize, _mm256_and_si256(_mm256_srli_epi32(v, 8), low));
            $body
        }
        {
            let ($t, $x) = (2usize, _mm256_and_si256(_mm256_srli_epi32(v, 16), low));
            $body
        }
        {
            let ($t, $x) = (3usize, _mm256_srli_epi32(v, 24));
            $body
        }
    }};
}

/// Q4_0: `d * (code - 8)`; with `MIN` Q4_1: `d * code + m`, the product rounded before the sum as the codec does.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q4<const MIN: bool>(panel: &[u8], kc: usize, out: &mut [f32]) {
    let nibble = _mm256_set1_epi8(15);
    let head = if MIN { 64 } else { 32 };
    for b in 0..kc / 32 {
        // SAFETY: a block of 16 rows takes `head + 256` bytes and 32 x 16 results.
        unsafe {
            let p = panel.as_ptr().add(b * (head + 256));
            let o = out.as_mut_ptr().add(b * 32 * PANEL);
            let d = halves(p);
            let m = if MIN { halves(p.add(32)) } else { [_mm256_setzero_ps(); 2] };
            for i in 0..8 {
                let (quad, half) = (i / 2, i % 2);
                let v = _mm256_loadu_si256(p.add(head + i * 32).cast());
                let parts = [_mm256_and_si256(v, nibble), _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble)];
                for (side, part) in parts.into_iter().enumerate() {
                    each_byte!(part, |t, x| {
                        let o = o.add((side * 16 + quad * 4 + t) * PANEL + half * 8);
                        let y = if MIN {
                            _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(x), d[half]), m[half])
                        } else {
                            let x = _mm256_sub_epi32(x, _mm256_set1_epi32(8));
                            _mm256_mul_ps(_mm256_cvtepi32_ps(x), d[half])
                        };
                        _mm256_storeu_ps(o, y);
                    });
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q8_0(panel: &[u8], kc: usize, out: &mut [f32]) {
    for b in 0..kc / 32 {
        // SAFETY: a block of 16 rows takes 32 + 512 bytes and 32 x 16 results.
        unsafe {
            let p = panel.as_ptr().add(b * 544);
            let o = out.as_mut_ptr().add(b * 32 * PANEL);
            let d = halves(p);
            for i in 0..16 {
                let (quad, half) = (i / 2, i % 2);
                let v = _mm256_loadu_si256(p.add(32 + i * 32).cast());
                // Code plus 128 is free of sign, so its bytes can be cut out; the sum is exact.
                let v = _mm256_xor_si256(v, _mm256_set1_epi8(-128));
                each_byte!(v, |t, x| {
                    let x = _mm256_sub_epi32(x, _mm256_set1_epi32(128));
                    let y = _mm256_mul_ps(_mm256_cvtepi32_ps(x), d[half]);
                    _mm256_storeu_ps(o.add((quad * 4 + t) * PANEL + half * 8), y);
                });
            }
        }
    }
}

/// A block of NF4, 64 columns of 16 rows: the levels' two halves are looked up by a code's low bits, its top bit chooses.
///
/// The caller has checked that the machine has AVX2, FMA and F16C.
pub(super) fn nf4(codes: &[u8; 512], scales: &[f32; PANEL], out: &mut [f32; 64 * PANEL]) {
    // SAFETY: the lengths are those of the types; the instructions are the caller's care.
    unsafe { nf4_avx2(codes, scales, out) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn nf4_avx2(codes: &[u8; 512], scales: &[f32; PANEL], out: &mut [f32; 64 * PANEL]) {
    // SAFETY: two times 8 levels, 16 scales; 8 units of 64 codes, 8 results for each byte of 8 rows and each half of it.
    unsafe {
        let levels = [0, 8].map(|i| _mm256_loadu_ps(LEVELS.as_ptr().add(i)));
        for (half, scale) in [0, 8].map(|i| _mm256_loadu_ps(scales.as_ptr().add(i))).into_iter().enumerate() {
            for unit in 0..8 {
                let mut v = _mm256_loadu_si256(codes.as_ptr().add(unit * 64 + half * 32).cast());
                for byte in 0..4 {
                    // The first of two columns is in the high half.
                    for (side, index) in [_mm256_srli_epi32(v, 4), v].into_iter().enumerate() {
                        let [low, high] = levels.map(|l| _mm256_permutevar8x32_ps(l, index));
                        let top = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
                        let y = _mm256_mul_ps(_mm256_blendv_ps(low, high, top), scale);
                        let column = unit * 8 + byte * 2 + side;
                        _mm256_storeu_ps(out.as_mut_ptr().add(column * PANEL + half * 8), y);
                    }
                    v = _mm256_srli_epi32(v, 8);
                }
            }
        }
    }
}
