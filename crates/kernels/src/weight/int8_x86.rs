//! Integer kernels for AVX2 (`maddubs`) and AVX-512 VNNI (`dpbusd`).
//!
//! VNNI multiplies unsigned codes with signed activations and sums four products in 32 bits. AVX2's `maddubs` sums
//! two in 16 bits: codes up to 15 can be summed over a whole block there (8 x 2 x 15 x 127 = 30,480), codes up to
//! 31 over half of one; 8-bit codes go in with their magnitude, the sign moved to the activation
//! (2 x 128 x 127 = 32,512), and are widened at once.

use super::int8::{Acts, Args, BLOCK, CODES, Format, MAX_STRIP, Single, Tile, Tiles, scale};
use crate::matmul::scratch::Shared;
use crate::matmul::tile::PANEL;
use crate::{Cpu, Simd};
use sparsam_dtype::DType;
use std::arch::x86_64::*;

/// The tiles for `cpu`; `None` if it has neither instruction set.
pub(super) fn tiles(cpu: Cpu, dtype: DType, format: Format) -> Option<Tiles> {
    if cpu.vnni {
        let table = if format.min { vnni_table::<true>() } else { vnni_table::<false>() };
        let single: Option<Single> = match dtype {
            DType::Q4_0 => Some(vnni_q4::<false>),
            DType::Q4_1 => Some(vnni_q4::<true>),
            DType::Q8_0 => Some(vnni_q8),
            _ => None,
        };
        return Some(Tiles { strip: 6, panels: 2, signed: false, table, single });
    }
    if cpu.simd < Simd::Avx2 {
        return None;
    }
    let signed = format.max > 31;
    let one = match (format.max, format.min) {
        (15, false) => avx2_table::<8, false>(),
        (15, true) => avx2_table::<8, true>(),
        (31, false) => avx2_table::<4, false>(),
        (31, true) => avx2_table::<4, true>(),
        (_, false) => avx2_table::<1, false>(),
        (_, true) => avx2_table::<1, true>(),
    };
    let single: Option<Single> = match dtype {
        DType::Q4_0 => Some(avx2_q4::<false>),
        DType::Q4_1 => Some(avx2_q4::<true>),
        DType::Q8_0 => Some(avx2_q8),
        _ => None,
    };
    Some(Tiles { strip: 4, panels: 1, signed, table: [one; 2], single })
}

fn vnni_table<const MIN: bool>() -> [[Tile; MAX_STRIP]; 2] {
    [
        [
            vnni::<1, 1, MIN>,
            vnni::<2, 1, MIN>,
            vnni::<3, 1, MIN>,
            vnni::<4, 1, MIN>,
            vnni::<5, 1, MIN>,
            vnni::<6, 1, MIN>,
        ],
        [
            vnni::<1, 2, MIN>,
            vnni::<2, 2, MIN>,
            vnni::<3, 2, MIN>,
            vnni::<4, 2, MIN>,
            vnni::<5, 2, MIN>,
            vnni::<6, 2, MIN>,
        ],
    ]
}

fn avx2_table<const RUN: usize, const MIN: bool>() -> [Tile; MAX_STRIP] {
    [
        avx2::<1, RUN, MIN>,
        avx2::<2, RUN, MIN>,
        avx2::<3, RUN, MIN>,
        avx2::<4, RUN, MIN>,
        avx2::<4, RUN, MIN>,
        avx2::<4, RUN, MIN>,
    ]
}

/// Four activations at `p` in every lane.
#[target_feature(enable = "avx512f")]
unsafe fn quad512(p: *const i8) -> __m512i {
    // SAFETY: the caller's promise: four bytes.
    _mm512_set1_epi32(unsafe { p.cast::<i32>().read_unaligned() })
}

/// Four activations at `p` in every lane.
#[target_feature(enable = "avx2")]
unsafe fn quad256(p: *const i8) -> __m256i {
    // SAFETY: the caller's promise: four bytes.
    _mm256_set1_epi32(unsafe { p.cast::<i32>().read_unaligned() })
}

/// `MR` rows times `NP` panels. 6 x 2: 12 sums of each kind, 2 registers of codes and 1 of activations.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn vnni<const MR: usize, const NP: usize, const MIN: bool>(t: &Args) {
    let blocks = t.acts.blocks;
    let mut acc = [[_mm512_setzero_ps(); NP]; MR];
    for b in 0..blocks {
        let at = t.row * blocks + b;
        // SAFETY: the caller's promise: `MR` rows of activations, `NP` panels, `blocks` blocks of both.
        unsafe {
            let mut sum = [[_mm512_setzero_si512(); NP]; MR];
            for i in 0..MR {
                sum[i] = [_mm512_set1_epi32(*t.start.at(at + i * blocks)); NP];
            }
            for quad in 0..BLOCK / 4 {
                let mut w = [_mm512_setzero_si512(); NP];
                for j in 0..NP {
                    w[j] = _mm512_loadu_si512(t.panels[j].codes.add(b * CODES + quad * 64).cast());
                }
                for i in 0..MR {
                    let q = quad512(t.acts.codes.at((at + i * blocks) * BLOCK + quad * 4));
                    for j in 0..NP {
                        sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], w[j], q);
                    }
                }
            }
            for i in 0..MR {
                let d = _mm512_set1_ps(*t.acts.d.at(at + i * blocks));
                for j in 0..NP {
                    let dw = _mm512_loadu_ps(t.panels[j].d.add(b * PANEL));
                    acc[i][j] =
                        _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][j]), d), dw, acc[i][j]);
                }
                if MIN {
                    let s = _mm512_set1_ps(*t.acts.scaled.at(at + i * blocks));
                    for j in 0..NP {
                        let mw = _mm512_loadu_ps(t.panels[j].m.add(b * PANEL));
                        acc[i][j] = _mm512_fmadd_ps(s, mw, acc[i][j]);
                    }
                }
            }
        }
    }
    for i in 0..MR {
        for j in 0..NP {
            // SAFETY: the caller's promise: `MR` rows of `NP` panels.
            unsafe { _mm512_storeu_ps(t.out.add(i * t.ldo + j * PANEL), acc[i][j]) };
        }
    }
}

/// 16 f16 at `p`.
#[target_feature(enable = "avx512f")]
unsafe fn halves512(p: *const u8) -> __m512 {
    // SAFETY: the caller's promise: 32 bytes.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(p.cast()) })
}

/// One row times a panel of Q4_0 or (with `MIN`) Q4_1.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn vnni_q4<const MIN: bool>(acts: &Acts, start: Shared<i32>, panel: &[u8], out: *mut f32) {
    let head = if MIN { 64 } else { 32 };
    let nibble = _mm512_set1_epi8(15);
    let mut acc = _mm512_setzero_ps();
    for b in 0..acts.blocks {
        // SAFETY: the caller's promise: a block takes `head + 256` bytes of the panel.
        unsafe {
            let p = panel.as_ptr().add(b * (head + 256));
            let q = acts.codes.at(b * BLOCK).cast_const();
            let mut low = _mm512_set1_epi32(*start.at(b));
            let mut high = _mm512_setzero_si512();
            for quad in 0..4 {
                let v = _mm512_loadu_si512(p.add(head + quad * 64).cast());
                low = _mm512_dpbusd_epi32(low, _mm512_and_si512(v, nibble), quad512(q.add(quad * 4)));
                let v = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
                high = _mm512_dpbusd_epi32(high, v, quad512(q.add(16 + quad * 4)));
            }
            let sum = _mm512_cvtepi32_ps(_mm512_add_epi32(low, high));
            let d = _mm512_set1_ps(*acts.d.at(b));
            acc = _mm512_fmadd_ps(_mm512_mul_ps(sum, d), halves512(p), acc);
            if MIN {
                acc = _mm512_fmadd_ps(_mm512_set1_ps(*acts.scaled.at(b)), halves512(p.add(32)), acc);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { _mm512_storeu_ps(out, acc) };
}

/// One row times a panel of Q8_0.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn vnni_q8(acts: &Acts, start: Shared<i32>, panel: &[u8], out: *mut f32) {
    let flip = _mm512_set1_epi8(-128);
    let mut acc = _mm512_setzero_ps();
    for b in 0..acts.blocks {
        // SAFETY: the caller's promise: a block takes 32 + 512 bytes of the panel.
        unsafe {
            let p = panel.as_ptr().add(b * 544);
            let q = acts.codes.at(b * BLOCK).cast_const();
            let mut sums = [_mm512_set1_epi32(*start.at(b)), _mm512_setzero_si512()];
            for quad in 0..8 {
                let v = _mm512_xor_si512(_mm512_loadu_si512(p.add(32 + quad * 64).cast()), flip);
                sums[quad % 2] = _mm512_dpbusd_epi32(sums[quad % 2], v, quad512(q.add(quad * 4)));
            }
            let sum = _mm512_cvtepi32_ps(_mm512_add_epi32(sums[0], sums[1]));
            let d = _mm512_set1_ps(*acts.d.at(b));
            acc = _mm512_fmadd_ps(_mm512_mul_ps(sum, d), halves512(p), acc);
        }
    }
    // SAFETY: the caller's promise.
    unsafe { _mm512_storeu_ps(out, acc) };
}

/// `MR` rows times one panel; `RUN` products are summed in 16 bits before they are widened (1: signed codes).
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const MR: usize, const RUN: usize, const MIN: bool>(t: &Args) {
    let blocks = t.acts.blocks;
    let ones = _mm256_set1_epi16(1);
    let panel = &t.panels[0];
    let mut acc = [[_mm256_setzero_ps(); 2]; MR];
    for b in 0..blocks {
        let at = t.row * blocks + b;
        // SAFETY: the caller's promise: `MR` rows of activations, one panel, `blocks` blocks of both.
        unsafe {
            let mut sum = [[_mm256_setzero_si256(); 2]; MR];
            for i in 0..MR {
                sum[i] = [_mm256_set1_epi32(*t.start.at(at + i * blocks)); 2];
            }
            for run in (0..BLOCK / 4).step_by(RUN) {
                let mut short = [[_mm256_setzero_si256(); 2]; MR];
                for quad in run..run + RUN {
                    for j in 0..2 {
                        let w = _mm256_loadu_si256(panel.codes.add(b * CODES + quad * 64 + j * 32).cast());
                        for i in 0..MR {
                            let q = quad256(t.acts.codes.at((at + i * blocks) * BLOCK + quad * 4));
                            short[i][j] = if RUN == 1 {
                                _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w))
                            } else {
                                _mm256_add_epi16(short[i][j], _mm256_maddubs_epi16(w, q))
                            };
                        }
                    }
                }
                for i in 0..MR {
                    for j in 0..2 {
                        sum[i][j] = _mm256_add_epi32(sum[i][j], _mm256_madd_epi16(short[i][j], ones));
                    }
                }
            }
            for i in 0..MR {
                let d = _mm256_set1_ps(*t.acts.d.at(at + i * blocks));
                for j in 0..2 {
                    let dw = _mm256_loadu_ps(panel.d.add(b * PANEL + j * 8));
                    acc[i][j] =
                        _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum[i][j]), d), dw, acc[i][j]);
                    if MIN {
                        let s = _mm256_set1_ps(*t.acts.scaled.at(at + i * blocks));
                        let mw = _mm256_loadu_ps(panel.m.add(b * PANEL + j * 8));
                        acc[i][j] = _mm256_fmadd_ps(s, mw, acc[i][j]);
                    }
                }
            }
        }
    }
    for i in 0..MR {
        for j in 0..2 {
            // SAFETY: the caller's promise: `MR` rows of one panel.
            unsafe { _mm256_storeu_ps(t.out.add(i * t.ldo + j * 8), acc[i][j]) };
        }
    }
}

/// 8 f16 at `p`.
#[target_feature(enable = "avx2,f16c")]
unsafe fn halves256(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise: 16 bytes.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(p.cast()) })
}

/// Adds a block to 8 results: `sum` of 16-bit pairs, the row's starting value, scales and minima at `p`.
macro_rules! finish256 {
    ($acc:expr, $wide:expr, $acts:expr, $start:expr, $b:expr, $p:expr, $min:expr) => {{
        let sum = _mm256_add_epi32($wide, _mm256_set1_epi32(*$start.at($b)));
        let scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(*$acts.d.at($b)));
        $acc = _mm256_fmadd_ps(scaled, halves256($p), $acc);
        if $min {
            $acc = _mm256_fmadd_ps(_mm256_set1_ps(*$acts.scaled.at($b)), halves256($p.add(32)), $acc);
        }
    }};
}

/// One row times a panel of Q4_0 or (with `MIN`) Q4_1.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2_q4<const MIN: bool>(acts: &Acts, start: Shared<i32>, panel: &[u8], out: *mut f32) {
    let head = if MIN { 64 } else { 32 };
    let (nibble, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
    let mut acc = [_mm256_setzero_ps(); 2];
    for b in 0..acts.blocks {
        // SAFETY: the caller's promise: a block takes `head + 256` bytes of the panel.
        unsafe {
            let p = panel.as_ptr().add(b * (head + 256));
            let q = acts.codes.at(b * BLOCK).cast_const();
            let mut short = [_mm256_setzero_si256(); 2];
            for quad in 0..4 {
                let (ql, qh) = (quad256(q.add(quad * 4)), quad256(q.add(16 + quad * 4)));
                for j in 0..2 {
                    let v = _mm256_loadu_si256(p.add(head + quad * 64 + j * 32).cast());
                    let low = _mm256_maddubs_epi16(_mm256_and_si256(v, nibble), ql);
                    let high = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
                    let both = _mm256_add_epi16(low, _mm256_maddubs_epi16(high, qh));
                    short[j] = _mm256_add_epi16(short[j], both);
                }
            }
            for j in 0..2 {
                let wide = _mm256_madd_epi16(short[j], ones);
                finish256!(acc[j], wide, acts, start, b, p.add(j * 16), MIN);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe {
        _mm256_storeu_ps(out, acc[0]);
        _mm256_storeu_ps(out.add(8), acc[1]);
    }
}

/// One row times a panel of Q8_0.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2_q8(acts: &Acts, start: Shared<i32>, panel: &[u8], out: *mut f32) {
    let ones = _mm256_set1_epi16(1);
    let mut acc = [_mm256_setzero_ps(); 2];
    for b in 0..acts.blocks {
        // SAFETY: the caller's promise: a block takes 32 + 512 bytes of the panel.
        unsafe {
            let p = panel.as_ptr().add(b * 544);
            let q = acts.codes.at(b * BLOCK).cast_const();
            let mut wide = [_mm256_setzero_si256(); 2];
            for quad in 0..8 {
                let q = quad256(q.add(quad * 4));
                for j in 0..2 {
                    let v = _mm256_loadu_si256(p.add(32 + quad * 64 + j * 32).cast());
                    let short = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(q, v));
                    wide[j] = _mm256_add_epi32(wide[j], _mm256_madd_epi16(short, ones));
                }
            }
            for j in 0..2 {
                finish256!(acc[j], wide[j], acts, start, b, p.add(j * 16), false);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe {
        _mm256_storeu_ps(out, acc[0]);
        _mm256_storeu_ps(out.add(8), acc[1]);
    }
}

/// Rounds one row as [`super::int8::quantize`].
///
/// # Safety
/// As there; the machine must have AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn quantize(x: &[f32], acts: &Acts, row: usize) {
    let magnitude = _mm256_set1_epi32(0x7fff_ffff);
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for b in 0..acts.blocks {
        let at = row * acts.blocks + b;
        // SAFETY: the row has `blocks` blocks; the caller's promise for `acts`.
        unsafe {
            let p = x.as_ptr().add(b * BLOCK);
            let v = [0, 8, 16, 24].map(|i| p.add(i));
            let v =
                [_mm256_loadu_ps(v[0]), _mm256_loadu_ps(v[1]), _mm256_loadu_ps(v[2]), _mm256_loadu_ps(v[3])];
            // Magnitudes order like their bits, NaN above all.
            let mut max = _mm256_setzero_si256();
            for v in v {
                max = _mm256_max_epi32(max, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
            }
            let max = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
            let max = _mm_max_epi32(max, _mm_shuffle_epi32(max, 0b01_00_11_10));
            let max = _mm_max_epi32(max, _mm_shuffle_epi32(max, 0b10_11_00_01));
            let (d, inverse) = scale(_mm_cvtsi128_si32(max) as u32);
            let mut q = [_mm256_setzero_si256(); 4];
            if inverse != 0.0 {
                for i in 0..4 {
                    q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], _mm256_set1_ps(inverse)));
                }
            }
            let sum = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
            let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
            let sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b01_00_11_10));
            let sum = _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b10_11_00_01)));
            // Packing works within halves of registers; the permutation puts the quads back in order.
            let words = [_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])];
            let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words[0], words[1]), order);
            _mm256_storeu_si256(acts.codes.at(at * BLOCK).cast(), bytes);
            *acts.d.at(at) = d;
            *acts.sums.at(at) = sum;
            *acts.scaled.at(at) = sum as f32 * d;
        }
    }
}
