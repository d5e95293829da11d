//! Packing with AVX2, and pairs of bf16 with AVX-512 BF16.
//!
//! Packing touches every element of both operands once a product; at a cycle an element it would take a tenth of
//! the time of a product of 1024, and a fifth in bf16. Lanes that lie apart are transposed 8 x 8 words at a time.

use super::pack::{Lanes, Packing, Words, round_bf16};
use sparsam_dtype::DType;
use std::arch::x86_64::*;

/// Steps packed at a time.
const STEPS: usize = 8;

/// Packs as [`super::pack::pack`], but the last steps; how many elements are done, 0 if there is no version for the
/// source's type and layout.
///
/// # Safety
/// As there; the machine must have `packing.cpu`'s instructions, AVX2 at least.
pub(super) unsafe fn pack(
    src: &Lanes,
    lanes: usize,
    kc: usize,
    dst: *mut f32,
    width: usize,
    packing: Packing,
) -> usize {
    let pairs_as_words = Lanes { dtype: DType::F32, lane: src.lane / 2, ..*src };
    // SAFETY: the caller's promise.
    unsafe {
        match (src.dtype, packing.words) {
            (DType::F32, Words::F32) => words(src, lanes, kc, dst, width),
            (DType::F32, Words::Rounded) => {
                let done = words(src, lanes, kc, dst, width);
                let packed = std::slice::from_raw_parts_mut(dst, done * width);
                packed.iter_mut().for_each(|x| *x = round_bf16(*x));
                done
            }
            (DType::F32, Words::Pairs) if packing.cpu.bf16 && src.k == 1 => {
                2 * transpose_pairs(src, lanes, kc / 2, dst, width)
            }
            (DType::F32, Words::Pairs) if packing.cpu.bf16 && src.lane == 1 && width <= 16 => {
                2 * interleave_pairs(src, lanes, kc / 2, dst, width)
            }
            // The pairs lie in memory as they are wanted.
            (DType::BF16, Words::Pairs) if src.k == 1 && src.lane.is_multiple_of(2) => {
                2 * transpose_words(&pairs_as_words, lanes, kc / 2, dst, width)
            }
            _ => 0,
        }
    }
}

unsafe fn words(src: &Lanes, lanes: usize, steps: usize, dst: *mut f32, width: usize) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        match (src.k, src.lane) {
            (1, _) => transpose_words(src, lanes, steps, dst, width),
            (_, 1) => copy(src, lanes, steps, dst, width),
            _ => 0,
        }
    }
}

/// Lanes side by side already.
#[target_feature(enable = "avx2")]
unsafe fn copy(src: &Lanes, lanes: usize, steps: usize, dst: *mut f32, width: usize) -> usize {
    for s in 0..steps {
        // SAFETY: the caller's promise.
        unsafe {
            let (from, to) = (src.ptr.cast::<f32>().add(s * src.k), dst.add(s * width));
            let mut l = 0;
            while l + 8 <= lanes {
                _mm256_storeu_ps(to.add(l), _mm256_loadu_ps(from.add(l)));
                l += 8;
            }
            if l + 4 <= lanes {
                _mm_storeu_ps(to.add(l), _mm_loadu_ps(from.add(l)));
                l += 4;
            }
            while l < width {
                *to.add(l) = if l < lanes { *from.add(l) } else { 0.0 };
                l += 1;
            }
        }
    }
    steps
}

/// Two rows of lanes side by side into one of pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn interleave_pairs(src: &Lanes, lanes: usize, steps: usize, dst: *mut f32, width: usize) -> usize {
    let (have, want) = (((1u32 << lanes) - 1) as __mmask16, ((1u32 << width) - 1) as __mmask16);
    // Word i takes half i and half 16 + i.
    let order = _mm512_add_epi32(
        _mm512_mullo_epi32(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
            _mm512_set1_epi32(0x0001_0001),
        ),
        _mm512_set1_epi32(16 << 16),
    );
    for s in 0..steps {
        // SAFETY: the caller's promise; lanes that are missing are not touched.
        unsafe {
            let from = src.ptr.cast::<f32>().add(2 * s * src.k);
            let (even, odd) =
                (_mm512_maskz_loadu_ps(have, from), _mm512_maskz_loadu_ps(have, from.add(src.k)));
            // 64 plain bytes.
            let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
            _mm512_mask_storeu_epi32(
                dst.add(s * width).cast(),
                want,
                _mm512_permutexvar_epi16(order, halves),
            );
        }
    }
    steps
}

macro_rules! transpose {
    ($name:ident, $features:literal, $elements:literal, |$p:ident| $load:expr) => {
        /// Lanes that lie apart, 8 steps at a time; gives the number of steps done.
        #[target_feature(enable = $features)]
        unsafe fn $name(src: &Lanes, lanes: usize, steps: usize, dst: *mut f32, width: usize) -> usize {
            let steps = steps / STEPS * STEPS;
            for s in (0..steps).step_by(STEPS) {
                // SAFETY: the caller's promise: these lanes and steps exist on both sides.
                unsafe {
                    let from = src.ptr.cast::<f32>().add($elements * s);
                    let to = dst.add(s * width);
                    let mut l = 0;
                    while l + 8 <= lanes {
                        let mut v = [_mm256_setzero_ps(); 8];
                        for i in 0..8 {
                            let $p = from.add((l + i) * src.lane);
                            v[i] = $load;
                        }
                        let v = transpose8(v);
                        for i in 0..STEPS {
                            _mm256_storeu_ps(to.add(i * width + l), v[i]);
                        }
                        l += 8;
                    }
                    if l + 4 <= lanes {
                        let mut v = [_mm256_setzero_ps(); 4];
                        for i in 0..4 {
                            let $p = from.add((l + i) * src.lane);
                            v[i] = $load;
                        }
                        let v = transpose4(v);
                        for i in 0..4 {
                            _mm_storeu_ps(to.add(i * width + l), _mm256_castps256_ps128(v[i]));
                            _mm_storeu_ps(to.add((i + 4) * width + l), _mm256_extractf128_ps(v[i], 1));
                        }
                        l += 4;
                    }
                    while l < width {
                        let mut words = [0.0f32; STEPS];
                        if l < lanes {
                            let $p = from.add(l * src.lane);
                            _mm256_storeu_ps(words.as_mut_ptr(), $load);
                        }
                        for i in 0..STEPS {
                            *to.add(i * width + l) = words[i];
                        }
                        l += 1;
                    }
                }
            }
            steps
        }
    };
}

transpose!(transpose_words, "avx2", 1, |p| _mm256_loadu_ps(p));
transpose!(transpose_pairs, "avx2,avx512f,avx512bf16", 2, |p| {
    // 32 plain bytes.
    std::mem::transmute::<__m256bh, __m256>(_mm512_cvtneps_pbh(_mm512_loadu_ps(p)))
});

/// 8 x 8 words.
#[target_feature(enable = "avx2")]
fn transpose8(v: [__m256; 8]) -> [__m256; 8] {
    let (a, b) = (transpose4([v[0], v[1], v[2], v[3]]), transpose4([v[4], v[5], v[6], v[7]]));
    let low = |i: usize| _mm256_permute2f128_ps(a[i], b[i], 0x20);
    let high = |i: usize| _mm256_permute2f128_ps(a[i], b[i], 0x31);
    [low(0), low(1), low(2), low(3), high(0), high(1), high(2), high(3)]
}

/// 4 x 4 words in both halves: result `i` holds word `i` of all four, and word `i + 4`.
#[target_feature(enable = "avx2")]
fn transpose4(v: [__m256; 4]) -> [__m256; 4] {
    let (a, b) = (_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpacklo_ps(v[2], v[3]));
    let (c, d) = (_mm256_unpackhi_ps(v[0], v[1]), _mm256_unpackhi_ps(v[2], v[3]));
    [
        _mm256_shuffle_ps(a, b, 0b01_00_01_00),
        _mm256_shuffle_ps(a, b, 0b11_10_11_10),
        _mm256_shuffle_ps(c, d, 0b01_00_01_00),
        _mm256_shuffle_ps(c, d, 0b11_10_11_10),
    ]
}
