//! Integer kernels for AVX2 (`maddubs`) and AVX-512 VNNI (`dpbusd`).
//!
//! VNNI multiplies unsigned codes with signed activations and sums four products in 32 bits. AVX2's `maddubs` sums
//! two in 16 bits: codes up to 15 can be summed over a whole block there (8 x 2 x 15 x 127 = 30,480), codes up to
//! 31 over half of one, codes up to 63 over a quarter; 8-bit codes go in with their magnitude, the sign moved to the activation
//! (2 x 128 x 127 = 32,512), and are widened at once.

use super::int8::{Acts, Args, BLOCK, Format, MAX_STRIP, Tile, Tiles, scale};
use super::single_x86;
use crate::matmul::tile::PANEL;
use crate::{Cpu, Simd};
use sparsam_dtype::DType;
use std::arch::x86_64::*;

/// The tiles for `cpu`; `None` if it has neither instruction set.
pub(super) fn tiles(cpu: Cpu, dtype: DType, format: Format) -> Option<Tiles> {
    if cpu.vnni {
        let table = match (format.min, format.parts) {
            (false, 1) => vnni_table::<false, 1>(),
            (true, 1) => vnni_table::<true, 1>(),
            (false, _) => vnni_table::<false, 2>(),
            (true, _) => vnni_table::<true, 2>(),
        };
        let single = single_x86::single(dtype, true);
        return Some(Tiles { strip: 6, panels: 2, signed: false, table, single });
    }
    if cpu.simd < Simd::Avx2 {
        return None;
    }
    let signed = format.max > 63;
    let one = match (format.max, format.min, format.parts) {
        (..=15, false, 1) => avx2_table::<8, false, 1>(),
        (..=15, true, 1) => avx2_table::<8, true, 1>(),
        (..=31, false, 1) => avx2_table::<4, false, 1>(),
        (..=31, true, 1) => avx2_table::<4, true, 1>(),
        (_, false, 1) => avx2_table::<1, false, 1>(),
        (..=31, false, _) => avx2_table::<4, false, 2>(),
        (..=31, true, _) => avx2_table::<4, true, 2>(),
        (..=63, false, _) => avx2_table::<2, false, 2>(),
        _ => unreachable!("no such format: {format:?}"),
    };
    let single = single_x86::single(dtype, false);
    Some(Tiles { strip: 4, panels: 1, signed, table: [one; 2], single })
}

fn vnni_table<const MIN: bool, const PARTS: usize>() -> [[Tile; MAX_STRIP]; 2] {
    [
        [
            vnni::<1, 1, MIN, PARTS>,
            vnni::<2, 1, MIN, PARTS>,
            vnni::<3, 1, MIN, PARTS>,
            vnni::<4, 1, MIN, PARTS>,
            vnni::<5, 1, MIN, PARTS>,
            vnni::<6, 1, MIN, PARTS>,
        ],
        [
            vnni::<1, 2, MIN, PARTS>,
            vnni::<2, 2, MIN, PARTS>,
            vnni::<3, 2, MIN, PARTS>,
            vnni::<4, 2, MIN, PARTS>,
            vnni::<5, 2, MIN, PARTS>,
            vnni::<6, 2, MIN, PARTS>,
        ],
    ]
}

fn avx2_table<const RUN: usize, const MIN: bool, const PARTS: usize>() -> [Tile; MAX_STRIP] {
    [
        avx2::<1, RUN, MIN, PARTS>,
        avx2::<2, RUN, MIN, PARTS>,
        avx2::<3, RUN, MIN, PARTS>,
        avx2::<4, RUN, MIN, PARTS>,
        avx2::<4, RUN, MIN, PARTS>,
        avx2::<4, RUN, MIN, PARTS>,
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
unsafe fn vnni<const MR: usize, const NP: usize, const MIN: bool, const PARTS: usize>(t: &Args) {
    let blocks = t.acts.blocks;
    let row = blocks * PARTS;
    let quads = BLOCK / 4 / PARTS;
    let mut acc = [[_mm512_setzero_ps(); NP]; MR];
    for part in 0..blocks * PARTS {
        let at = t.row * row + part;
        // SAFETY: the caller's promise: `MR` rows of activations, `NP` panels, `blocks` blocks of both.
        unsafe {
            let mut sum = [[_mm512_setzero_si512(); NP]; MR];
            for i in 0..MR {
                sum[i] = [_mm512_set1_epi32(*t.sums.start.at(at + i * row)); NP];
            }
            for quad in 0..quads {
                let mut w = [_mm512_setzero_si512(); NP];
                for j in 0..NP {
                    w[j] = _mm512_loadu_si512(t.panels[j].codes.add((part * quads + quad) * 64).cast());
                }
                for i in 0..MR {
                    let q = quad512(t.acts.codes.at(((at + i * row) * quads + quad) * 4));
                    for j in 0..NP {
                        sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], w[j], q);
                    }
                }
            }
            for i in 0..MR {
                let d = _mm512_set1_ps(*t.acts.d.at((at + i * row) / PARTS));
                for j in 0..NP {
                    let dw = _mm512_loadu_ps(t.panels[j].d.add(part * PANEL));
                    acc[i][j] =
                        _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][j]), d), dw, acc[i][j]);
                }
                if MIN {
                    let s = _mm512_set1_ps(*t.sums.scaled.at(at + i * row));
                    for j in 0..NP {
                        let mw = _mm512_loadu_ps(t.panels[j].m.add(part * PANEL));
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

/// `MR` rows times one panel; `RUN` products are summed in 16 bits before they are widened (1: signed codes).
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const MR: usize, const RUN: usize, const MIN: bool, const PARTS: usize>(t: &Args) {
    let blocks = t.acts.blocks;
    let row = blocks * PARTS;
    let quads = BLOCK / 4 / PARTS;
    let ones = _mm256_set1_epi16(1);
    let panel = &t.panels[0];
    // Unrolled in full, the loop over the quads of a run spills its sums unless minima take registers, too: 175 GOP/s,
    // left as it stands 247 (Zen 4, one core); with minima 231 and 224.
    let run_len = if MIN { RUN } else { std::hint::black_box(RUN) };
    let mut acc = [[_mm256_setzero_ps(); 2]; MR];
    for part in 0..blocks * PARTS {
        let at = t.row * row + part;
        // SAFETY: the caller's promise: `MR` rows of activations, one panel, `blocks` blocks of both.
        unsafe {
            let mut sum = [[_mm256_setzero_si256(); 2]; MR];
            for run in (0..quads).step_by(RUN) {
                let mut short = [[_mm256_setzero_si256(); 2]; MR];
                let mut w = panel.codes.add((part * quads + run) * 64).cast_const();
                let mut q = [std::ptr::null::<i8>(); MR];
                for i in 0..MR {
                    q[i] = t.acts.codes.at(((at + i * row) * quads + run) * 4);
                }
                for quad in 0..if RUN == 1 { 1 } else { run_len } {
                    let codes = [_mm256_loadu_si256(w.cast()), _mm256_loadu_si256(w.add(32).cast())];
                    for i in 0..MR {
                        let q = quad256(q[i].add(quad * 4));
                        for j in 0..2 {
                            short[i][j] = if RUN == 1 {
                                _mm256_maddubs_epi16(_mm256_abs_epi8(codes[j]), _mm256_sign_epi8(q, codes[j]))
                            } else {
                                _mm256_add_epi16(short[i][j], _mm256_maddubs_epi16(codes[j], q))
                            };
                        }
                    }
                    w = w.add(64);
                }
                for i in 0..MR {
                    for j in 0..2 {
                        sum[i][j] = _mm256_add_epi32(sum[i][j], _mm256_madd_epi16(short[i][j], ones));
                    }
                }
            }
            for i in 0..MR {
                let start = _mm256_set1_epi32(*t.sums.start.at(at + i * row));
                sum[i] = [_mm256_add_epi32(sum[i][0], start), _mm256_add_epi32(sum[i][1], start)];
            }
            for i in 0..MR {
                let d = _mm256_set1_ps(*t.acts.d.at((at + i * row) / PARTS));
                for j in 0..2 {
                    let dw = _mm256_loadu_ps(panel.d.add(part * PANEL + j * 8));
                    acc[i][j] =
                        _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum[i][j]), d), dw, acc[i][j]);
                    if MIN {
                        let s = _mm256_set1_ps(*t.sums.scaled.at(at + i * row));
                        let mw = _mm256_loadu_ps(panel.m.add(part * PANEL + j * 8));
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
            for half in 0..2 {
                let sum = _mm256_add_epi32(q[2 * half], q[2 * half + 1]);
                let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
                let sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b01_00_11_10));
                let sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b10_11_00_01));
                *acts.sums.at(2 * at + half) = _mm_cvtsi128_si32(sum);
            }
            // Packing works within halves of registers; the permutation puts the quads back in order.
            let words = [_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])];
            let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words[0], words[1]), order);
            _mm256_storeu_si256(acts.codes.at(at * BLOCK).cast(), bytes);
            *acts.d.at(at) = d;
        }
    }
}
