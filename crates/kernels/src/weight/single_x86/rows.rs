//! Sixteen or eight rows of a panel side by side in a vector.

use crate::simd::{Avx2, Avx512, Vector};
use std::arch::x86_64::*;

/// A vector of rows of a panel: bytes hold four columns of each row, 32-bit lanes sums, floats results.
///
/// # Safety
/// Every method: the machine has the type's instructions; pointers as for [`Vector`].
pub(super) trait Rows: Vector {
    /// Whether sums are 32 bits wide from the start.
    const WIDE: bool;

    /// Adds products of codes with the four activations at `q`. `SMALL`: all codes of the sum are at most 15 and in at
    /// most 8 quads; otherwise at most 127, or 255 where sums are wide.
    unsafe fn dot<const SMALL: bool>(sum: Self::Int, codes: Self::Int, q: *const i8) -> Self::Int;
    /// The 32-bit sum of what `dot` with the same `SMALL` gave.
    unsafe fn total<const SMALL: bool>(sum: Self::Int) -> Self::Int;
    /// As `dot` (not small), for codes of 8 bits: with their sign, or 128 above where sums are wide.
    unsafe fn dot_value(sum: Self::Int, codes: Self::Int, q: *const i8) -> Self::Int;
    /// `a | (b & mask)`.
    unsafe fn merge(a: Self::Int, b: Self::Int, mask: Self::Int) -> Self::Int;
    /// `table[i]` for each byte `i` below 16.
    unsafe fn lookup(table: &[u8; 16], i: Self::Int) -> Self::Int;
    /// Zeros shifted in at the top of each 32-bit lane.
    unsafe fn shr(a: Self::Int, n: usize) -> Self::Int;
    /// Zeros shifted in at the bottom.
    unsafe fn shl(a: Self::Int, n: usize) -> Self::Int;
    /// As many bytes as lanes, each widened.
    unsafe fn bytes(p: *const u8) -> Self::Int;
    /// With their sign.
    unsafe fn signed_bytes(p: *const u8) -> Self::Int;
    /// As many 16-bit words as lanes, each widened.
    unsafe fn words(p: *const u8) -> Self::Int;
}

/// Four activations at `q`.
#[inline(always)]
unsafe fn quad(q: *const i8) -> i32 {
    // SAFETY: the caller's promise: four bytes.
    unsafe { q.cast::<i32>().read_unaligned() }
}

// SAFETY of every block below: the trait's contract; the instructions are AVX-512 F, BW, VL and VNNI.
impl Rows for Avx512 {
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn dot<const SMALL: bool>(sum: __m512i, codes: __m512i, q: *const i8) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(quad(q))) }
    }
    #[inline(always)]
    unsafe fn total<const SMALL: bool>(sum: __m512i) -> __m512i {
        sum
    }
    #[inline(always)]
    unsafe fn dot_value(sum: __m512i, codes: __m512i, q: *const i8) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { Self::dot::<false>(sum, codes, q) }
    }
    #[inline(always)]
    unsafe fn merge(a: __m512i, b: __m512i, mask: __m512i) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_ternarylogic_epi32::<0b1111_1000>(a, b, mask) }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], i: __m512i) -> __m512i {
        // SAFETY: the trait's contract; 16 bytes.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, i)
        }
    }
    #[inline(always)]
    unsafe fn shr(a: __m512i, n: usize) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn shl(a: __m512i, n: usize) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn signed_bytes(p: *const u8) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn words(p: *const u8) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())) }
    }
}

// SAFETY of every block below: the trait's contract; the instructions are AVX2.
impl Rows for Avx2 {
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn dot<const SMALL: bool>(sum: __m256i, codes: __m256i, q: *const i8) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe {
            let pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(quad(q)));
            match SMALL {
                true => _mm256_add_epi16(sum, pairs),
                false => _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))),
            }
        }
    }
    #[inline(always)]
    unsafe fn total<const SMALL: bool>(sum: __m256i) -> __m256i {
        // SAFETY: the trait's contract.
        if SMALL { unsafe { _mm256_madd_epi16(sum, _mm256_set1_epi16(1)) } } else { sum }
    }
    #[inline(always)]
    unsafe fn dot_value(sum: __m256i, codes: __m256i, q: *const i8) -> __m256i {
        // SAFETY: the trait's contract. The sign moves to the activation: 2 x 128 x 127 = 32,512.
        unsafe {
            let q = _mm256_sign_epi8(_mm256_set1_epi32(quad(q)), codes);
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), q);
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    unsafe fn merge(a: __m256i, b: __m256i, mask: __m256i) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe { _mm256_or_si256(a, _mm256_and_si256(b, mask)) }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], i: __m256i) -> __m256i {
        // SAFETY: the trait's contract; 16 bytes.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, i)
        }
    }
    #[inline(always)]
    unsafe fn shr(a: __m256i, n: usize) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe { _mm256_srl_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn shl(a: __m256i, n: usize) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe { _mm256_sll_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())) }
    }
    #[inline(always)]
    unsafe fn signed_bytes(p: *const u8) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe { _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())) }
    }
    #[inline(always)]
    unsafe fn words(p: *const u8) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())) }
    }
}
