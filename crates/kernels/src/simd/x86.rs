//! AVX2 with FMA and F16C (8 lanes) and AVX-512 F, BW, DQ, VL (16 lanes).

use super::Vector;
use std::arch::x86_64::*;

/// Eight f32 in a 256-bit register.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(pub __m256);

/// Sixteen f32 in a 512-bit register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(pub __m512);

/// Eight words of ones, then of zeros: from index `8 - n` on, the mask of the first `n` lanes.
static FIRST: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

#[inline(always)]
unsafe fn first8(n: usize) -> __m256i {
    // SAFETY: `n <= 8`, so 8 words from `8 - n` on lie in the table; the caller has AVX2.
    unsafe { _mm256_loadu_si256(FIRST.as_ptr().add(8 - n).cast()) }
}

#[inline(always)]
unsafe fn first16(n: usize) -> __mmask16 {
    (1u32 << n).wrapping_sub(1) as __mmask16
}

// SAFETY of every block below: the trait's contract; the instructions are AVX2, FMA and F16C.
impl Vector for Avx2 {
    const LANES: usize = 8;
    const FUSED: bool = true;
    type Int = __m256i;
    type Mask = __m256;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_loadu_ps(p)) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_maskload_ps(p, first8(n))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe { _mm256_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        // SAFETY: the trait's contract.
        unsafe { _mm256_maskstore_ps(p, first8(n), self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_add_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_sub_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_mul_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_div_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_fmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    unsafe fn fnma(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_fnmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_sqrt_ps(self.0)) }
    }
    #[inline(always)]
    unsafe fn floor(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_floor_ps(self.0)) }
    }
    #[inline(always)]
    unsafe fn nearest(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_round_ps::<0x08>(self.0)) }
    }
    #[inline(always)]
    unsafe fn abs(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0)) }
    }
    #[inline(always)]
    unsafe fn neg(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_xor_ps(self.0, _mm256_set1_ps(-0.0))) }
    }
    #[inline(always)]
    unsafe fn copysign(self, sign: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let s = _mm256_set1_ps(-0.0);
            Avx2(_mm256_or_ps(_mm256_andnot_ps(s, self.0), _mm256_and_ps(s, sign.0)))
        }
    }
    #[inline(always)]
    unsafe fn max_or(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_max_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn min_or(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_min_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn lt(self, b: Self) -> Self::Mask {
        // SAFETY: the trait's contract.
        unsafe { _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, b.0) }
    }
    #[inline(always)]
    unsafe fn eq(self, b: Self) -> Self::Mask {
        // SAFETY: the trait's contract.
        unsafe { _mm256_cmp_ps::<_CMP_EQ_OQ>(self.0, b.0) }
    }
    #[inline(always)]
    unsafe fn unordered(self, b: Self) -> Self::Mask {
        // SAFETY: the trait's contract.
        unsafe { _mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, b.0) }
    }
    #[inline(always)]
    unsafe fn select(mask: Self::Mask, a: Self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_blendv_ps(b.0, a.0, mask)) }
    }
    #[inline(always)]
    unsafe fn any(mask: Self::Mask) -> bool {
        // SAFETY: the trait's contract.
        unsafe { _mm256_movemask_ps(mask) != 0 }
    }
    #[inline(always)]
    unsafe fn or(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        // SAFETY: the trait's contract.
        unsafe { _mm256_or_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the trait's contract.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    unsafe fn bits(self) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm256_castps_si256(self.0) }
    }
    #[inline(always)]
    unsafe fn from_bits(i: Self::Int) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_castsi256_ps(i)) }
    }
    #[inline(always)]
    unsafe fn to_int(self) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm256_cvtps_epi32(self.0) }
    }
    #[inline(always)]
    unsafe fn from_int(i: Self::Int) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_cvtepi32_ps(i)) }
    }
    #[inline(always)]
    unsafe fn int(x: i32) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm256_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn int_add(a: Self::Int, b: Self::Int) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm256_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn int_and(a: Self::Int, b: Self::Int) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm256_and_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn int_xor(a: Self::Int, b: Self::Int) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm256_xor_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn int_shl<const S: u32>(a: Self::Int) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm256_sll_epi32(a, _mm_cvtsi32_si128(S as i32)) }
    }
    #[inline(always)]
    unsafe fn int_shr<const S: u32>(a: Self::Int) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm256_sra_epi32(a, _mm_cvtsi32_si128(S as i32)) }
    }
    #[inline(always)]
    unsafe fn int_shr_zero<const S: u32>(a: Self::Int) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm256_srl_epi32(a, _mm_cvtsi32_si128(S as i32)) }
    }
    #[inline(always)]
    unsafe fn int_mul_wide(a: Self::Int, b: Self::Int) -> (Self::Int, Self::Int) {
        // SAFETY: the trait's contract.
        unsafe {
            let even = _mm256_mul_epu32(a, b);
            let odd = _mm256_mul_epu32(_mm256_srli_epi64::<32>(a), _mm256_srli_epi64::<32>(b));
            let high = _mm256_blend_epi32::<0xAA>(_mm256_srli_epi64::<32>(even), odd);
            (high, _mm256_blend_epi32::<0xAA>(even, _mm256_slli_epi64::<32>(odd)))
        }
    }
    #[inline(always)]
    unsafe fn int_eq_zero(a: Self::Int) -> Self::Mask {
        // SAFETY: the trait's contract.
        unsafe { _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, _mm256_setzero_si256())) }
    }
    #[inline(always)]
    unsafe fn int_iota() -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7) }
    }
    #[inline(always)]
    unsafe fn int_load(p: *const i32) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn int_store(a: Self::Int, p: *mut i32) {
        // SAFETY: the trait's contract.
        unsafe { _mm256_storeu_si256(p.cast(), a) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            Avx2(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        // SAFETY: the trait's contract.
        unsafe {
            // Nearest even: add half of the last kept bit, less one unless that bit is odd. NaN keeps its upper bits, made quiet.
            let x = _mm256_castps_si256(self.0);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(x), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
            let quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x40_0000));
            let high = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            let packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256::<1>(high));
            _mm_storeu_si128(p.cast(), packed)
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_cvtph_ps(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        // SAFETY: the trait's contract.
        unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }
    #[inline(always)]
    unsafe fn load_q8_0(row: *const u8, i: usize) -> Self {
        // SAFETY: the trait's contract: the block and, in it, the codes exist.
        unsafe {
            let block = row.add(i / 32 * 34);
            let scale = _mm256_cvtph_ps(_mm_set1_epi16(block.cast::<i16>().read_unaligned()));
            let codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(block.add(2 + i % 32).cast()));
            Avx2(_mm256_mul_ps(scale, _mm256_cvtepi32_ps(codes)))
        }
    }
}

// SAFETY of every block below: the trait's contract; the instructions are AVX-512 F, BW, DQ and VL.
impl Vector for Avx512 {
    const LANES: usize = 16;
    const FUSED: bool = true;
    type Int = __m512i;
    type Mask = __mmask16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_loadu_ps(p)) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_maskz_loadu_ps(first16(n), p)) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_mask_storeu_ps(p, first16(n), self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_add_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_sub_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_mul_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_div_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_fmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    unsafe fn fnma(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_fnmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_sqrt_ps(self.0)) }
    }
    #[inline(always)]
    unsafe fn floor(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_roundscale_ps::<0x09>(self.0)) }
    }
    #[inline(always)]
    unsafe fn nearest(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_roundscale_ps::<0x08>(self.0)) }
    }
    #[inline(always)]
    unsafe fn abs(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_abs_ps(self.0)) }
    }
    #[inline(always)]
    unsafe fn neg(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_xor_ps(self.0, _mm512_set1_ps(-0.0))) }
    }
    #[inline(always)]
    unsafe fn copysign(self, sign: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let s = _mm512_set1_epi32(i32::MIN);
            let (a, b) = (_mm512_castps_si512(self.0), _mm512_castps_si512(sign.0));
            // s ? b : a, bit by bit
            Avx512(_mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xCA>(s, b, a)))
        }
    }
    #[inline(always)]
    unsafe fn max_or(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_max_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn min_or(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_min_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn lt(self, b: Self) -> Self::Mask {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, b.0) }
    }
    #[inline(always)]
    unsafe fn eq(self, b: Self) -> Self::Mask {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(self.0, b.0) }
    }
    #[inline(always)]
    unsafe fn unordered(self, b: Self) -> Self::Mask {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, b.0) }
    }
    #[inline(always)]
    unsafe fn select(mask: Self::Mask, a: Self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_mask_blend_ps(mask, b.0, a.0)) }
    }
    #[inline(always)]
    unsafe fn any(mask: Self::Mask) -> bool {
        mask != 0
    }
    #[inline(always)]
    unsafe fn or(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        a | b
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the trait's contract.
        unsafe {
            Avx2(_mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0))).sum()
        }
    }
    #[inline(always)]
    unsafe fn bits(self) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm512_castps_si512(self.0) }
    }
    #[inline(always)]
    unsafe fn from_bits(i: Self::Int) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_castsi512_ps(i)) }
    }
    #[inline(always)]
    unsafe fn to_int(self) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtps_epi32(self.0) }
    }
    #[inline(always)]
    unsafe fn from_int(i: Self::Int) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_cvtepi32_ps(i)) }
    }
    #[inline(always)]
    unsafe fn int(x: i32) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn int_add(a: Self::Int, b: Self::Int) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn int_and(a: Self::Int, b: Self::Int) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn int_xor(a: Self::Int, b: Self::Int) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm512_xor_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn int_shl<const S: u32>(a: Self::Int) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm512_slli_epi32::<S>(a) }
    }
    #[inline(always)]
    unsafe fn int_shr<const S: u32>(a: Self::Int) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm512_srai_epi32::<S>(a) }
    }
    #[inline(always)]
    unsafe fn int_shr_zero<const S: u32>(a: Self::Int) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm512_srli_epi32::<S>(a) }
    }
    #[inline(always)]
    unsafe fn int_mul_wide(a: Self::Int, b: Self::Int) -> (Self::Int, Self::Int) {
        // SAFETY: the trait's contract.
        unsafe {
            let even = _mm512_mul_epu32(a, b);
            let odd = _mm512_mul_epu32(_mm512_srli_epi64::<32>(a), _mm512_srli_epi64::<32>(b));
            let high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64::<32>(even), odd);
            (high, _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64::<32>(odd)))
        }
    }
    #[inline(always)]
    unsafe fn int_eq_zero(a: Self::Int) -> Self::Mask {
        // SAFETY: the trait's contract.
        unsafe { _mm512_testn_epi32_mask(a, a) }
    }
    #[inline(always)]
    unsafe fn int_iota() -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) }
    }
    #[inline(always)]
    unsafe fn int_load(p: *const i32) -> Self::Int {
        // SAFETY: the trait's contract.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn int_store(a: Self::Int, p: *mut i32) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_si512(p.cast(), a) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        // SAFETY: the trait's contract.
        unsafe {
            // Nearest even: add half of the last kept bit, less one unless that bit is odd. NaN keeps its upper bits, made quiet.
            let x = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(x), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let bits = _mm512_mask_or_epi32(rounded, nan, x, _mm512_set1_epi32(0x40_0000));
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Avx512(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        // SAFETY: the trait's contract.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }
    #[inline(always)]
    unsafe fn load_q8_0(row: *const u8, i: usize) -> Self {
        // SAFETY: the trait's contract: the block and, in it, the codes exist.
        unsafe {
            let block = row.add(i / 32 * 34);
            let scale = _mm512_cvtph_ps(_mm256_set1_epi16(block.cast::<i16>().read_unaligned()));
            let codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(block.add(2 + i % 32).cast()));
            Avx512(_mm512_mul_ps(scale, _mm512_cvtepi32_ps(codes)))
        }
    }
}
