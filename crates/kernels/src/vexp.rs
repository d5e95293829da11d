//! exp, exp2 and tanh of whole vectors, for AVX2 with FMA and for AVX-512F: the same bits in both.
//!
//! exp: `x = n ln 2 + r` with whole `n` and `|r| <= ln 2 / 2`, `ln 2` in two parts so that `r` keeps its bits (Cody and
//! Waite 1980); `e^r` by a polynomial of degree 6 whose relative error is 0.03 ulp (least maximum, found by weighted
//! least squares in f64); the result scaled by `2^n`, right down to subnormal numbers. Error: at most 1.3 ulp, held
//! by a test over a dense sample of all arguments. NaN stays NaN, -inf gives 0, too large ones inf.
//!
//! tanh: an odd polynomial up to 1 in size, `1 - 2 / (e^2|x| + 1)` with the sign of x beyond.
//! Error: at most 1.9 ulp.

/// Below this e^x rounds to 0, at 89 and above it is infinite.
const EXP_LOW: f32 = -104.0;
const EXP_HIGH: f32 = 89.0;
/// The same for 2^x.
const EXP2_LOW: f32 = -151.0;
const EXP2_HIGH: f32 = 129.0;
/// ln 2 = `LN2_HIGH + LN2_LOW`; products of the first with whole numbers up to 256 are exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// e^r = 1 + r + r^2 P(r), highest power first.
const EXP: [f32; 5] = [0.001_381_459_9, 0.008_368_717, 0.041_668_39, 0.166_665_21, 0.499_999_94];
/// 2^r = 1 + r P(r), |r| <= 1/2, highest power first.
const EXP2: [f32; 6] =
    [0.000_153_533_56, 0.001_339_887_7, 0.009_618_438, 0.055_503_324, 0.240_226_48, std::f32::consts::LN_2];
/// tanh x = x + x^3 P(x^2), |x| <= 1, highest power first.
const TANH: [f32; 7] = [
    -0.000_358_447_84,
    0.002_301_351_2,
    -0.007_946_09,
    0.021_486_647,
    -0.053_879_8,
    0.133_323_45,
    -0.333_332_96,
];
/// Where tanh changes its formula.
const TANH_SMALL: f32 = 1.0;
/// From here on tanh rounds to 1.
const TANH_LARGE: f32 = 9.02;

/// The functions for one kind of register. `$scale` multiplies by a power of two given as a whole number.
macro_rules! functions {
    ($features:literal, $vec:ty, $splat:ident, $add:ident, $sub:ident, $mul:ident, $div:ident, $fma:ident,
     $fnma:ident, $min:ident, $max:ident, $round:expr, $scale:expr, $abs:expr, $small_or:ident) => {
        /// e^x.
        #[inline]
        #[target_feature(enable = $features)]
        pub(crate) fn exp(x: $vec) -> $vec {
            // The second operand is what comes out where either is NaN.
            let x = $min($splat(EXP_HIGH), $max($splat(EXP_LOW), x));
            let n = $round($mul(x, $splat(std::f32::consts::LOG2_E)));
            let r = $fnma(n, $splat(LN2_LOW), $fnma(n, $splat(LN2_HIGH), x));
            let mut p = $splat(EXP[0]);
            for c in &EXP[1..] {
                p = $fma(p, r, $splat(*c));
            }
            $scale($fma(p, $mul(r, r), $add(r, $splat(1.0))), n)
        }

        /// 2^x.
        #[inline]
        #[target_feature(enable = $features)]
        pub(crate) fn exp2(x: $vec) -> $vec {
            let x = $min($splat(EXP2_HIGH), $max($splat(EXP2_LOW), x));
            let n = $round(x);
            let r = $sub(x, n);
            let mut p = $splat(EXP2[0]);
            for c in &EXP2[1..] {
                p = $fma(p, r, $splat(*c));
            }
            $scale($fma(p, r, $splat(1.0)), n)
        }

        /// tanh x.
        #[inline]
        #[target_feature(enable = $features)]
        pub(crate) fn tanh(x: $vec) -> $vec {
            let z = $mul(x, x);
            let mut p = $splat(TANH[0]);
            for c in &TANH[1..] {
                p = $fma(p, z, $splat(*c));
            }
            let small = $fma($mul(p, z), x, x);
            let bounded = $min($splat(TANH_LARGE), $abs(x));
            let e = exp($add(bounded, bounded));
            let large = $sub($splat(1.0), $div($splat(2.0), $add(e, $splat(1.0))));
            $small_or(x, small, large)
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2 {
    use super::*;
    use std::arch::x86_64::*;

    functions!(
        "avx2,fma",
        __m256,
        _mm256_set1_ps,
        _mm256_add_ps,
        _mm256_sub_ps,
        _mm256_mul_ps,
        _mm256_div_ps,
        _mm256_fmadd_ps,
        _mm256_fnmadd_ps,
        _mm256_min_ps,
        _mm256_max_ps,
        |x| _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x),
        scale,
        |x| _mm256_andnot_ps(_mm256_set1_ps(-0.0), x),
        small_or
    );

    /// `x * 2^n` in two steps, because `2^n` itself may be no normal number where the product is one. The first
    /// step is exact, so the product is rounded once.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn scale(x: __m256, n: __m256) -> __m256 {
        let n = _mm256_cvtps_epi32(n);
        let half = _mm256_srai_epi32::<1>(n);
        let power = |n: __m256i| {
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))))
        };
        _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(n, half)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn small_or(x: __m256, small: __m256, large: __m256) -> __m256 {
        let sign = _mm256_set1_ps(-0.0);
        let is_small = _mm256_cmp_ps::<_CMP_LE_OQ>(_mm256_andnot_ps(sign, x), _mm256_set1_ps(TANH_SMALL));
        _mm256_blendv_ps(_mm256_or_ps(large, _mm256_and_ps(sign, x)), small, is_small)
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512 {
    use super::*;
    use std::arch::x86_64::*;

    functions!(
        "avx512f",
        __m512,
        _mm512_set1_ps,
        _mm512_add_ps,
        _mm512_sub_ps,
        _mm512_mul_ps,
        _mm512_div_ps,
        _mm512_fmadd_ps,
        _mm512_fnmadd_ps,
        _mm512_min_ps,
        _mm512_max_ps,
        |x| _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x),
        _mm512_scalef_ps,
        _mm512_abs_ps,
        small_or
    );

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn small_or(x: __m512, small: __m512, large: __m512) -> __m512 {
        let is_small = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(_mm512_abs_ps(x), _mm512_set1_ps(TANH_SMALL));
        let sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MIN));
        let large = _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(large), sign));
        _mm512_mask_blend_ps(is_small, large, small)
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::{Cpu, Simd};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma")]
    fn with_avx2(which: usize, x: [f32; 16]) -> [f32; 16] {
        let f = |x| [avx2::exp(x), avx2::exp2(x), avx2::tanh(x)][which];
        let mut y = [0.0; 16];
        for i in [0, 8] {
            // SAFETY: 8 elements from `i` lie within both arrays.
            unsafe { _mm256_storeu_ps(y[i..].as_mut_ptr(), f(_mm256_loadu_ps(x[i..].as_ptr()))) };
        }
        y
    }

    #[target_feature(enable = "avx512f")]
    fn with_avx512(which: usize, x: [f32; 16]) -> [f32; 16] {
        let f = |x| [avx512::exp(x), avx512::exp2(x), avx512::tanh(x)][which];
        let mut y = [0.0; 16];
        // SAFETY: both arrays have 16 elements.
        unsafe { _mm512_storeu_ps(y.as_mut_ptr(), f(_mm512_loadu_ps(x.as_ptr()))) };
        y
    }

    type Path = fn(usize, [f32; 16]) -> [f32; 16];

    fn paths() -> Vec<Path> {
        let best = Cpu::detect().simd;
        let mut paths: Vec<Path> = vec![];
        if best >= Simd::Avx2 {
            // SAFETY: the machine has AVX2 and FMA.
            paths.push(|which, x| unsafe { with_avx2(which, x) });
        }
        if best >= Simd::Avx512 {
            // SAFETY: the machine has AVX-512F.
            paths.push(|which, x| unsafe { with_avx512(which, x) });
        }
        paths
    }

    /// Distance in units of the last place of the true value.
    fn ulps(got: f32, want: f64) -> f64 {
        let exponent = want.abs().log2().floor().max(-126.0);
        (f64::from(got) - want).abs() / (exponent - 23.0).exp2()
    }

    #[test]
    fn errors_are_at_most_what_the_text_says() {
        type Function = fn(f64) -> f64;
        let truth: [(Function, f64); 3] = [(f64::exp, 1.3), (f64::exp2, 1.3), (f64::tanh, 1.9)];
        for (which, (f, limit)) in truth.into_iter().enumerate() {
            let mut first = None;
            for path in paths() {
                let (mut worst, mut bits) = (0.0, 0u64);
                // Every 1009th of all numbers, both signs.
                for start in (0..u32::MAX - 16 * 1009).step_by(16 * 1009) {
                    let x: [f32; 16] = std::array::from_fn(|i| f32::from_bits(start + i as u32 * 1009));
                    for (x, y) in x.into_iter().zip(path(which, x)) {
                        bits = bits.rotate_left(1) ^ (u64::from(y.to_bits()) * u64::from(!y.is_nan()));
                        let want = f(f64::from(x));
                        if x.is_nan() {
                            assert!(y.is_nan());
                        } else if want >= f64::from(f32::MAX) * (1.0 + f64::from(f32::EPSILON) / 4.0) {
                            assert_eq!(y, f32::INFINITY, "{x}");
                        } else if ulps(y, want) > worst {
                            worst = ulps(y, want);
                            assert!(worst <= limit, "function {which} of {x:e}: {y:e} is off by {worst} ulp");
                        }
                    }
                }
                assert_eq!(*first.get_or_insert(bits), bits, "both paths give the same bits");
            }
        }
    }

    #[test]
    fn edges() {
        for path in paths() {
            let x = [0.0, -0.0, f32::NEG_INFINITY, f32::INFINITY, 1.0, -1.0, 1e-40, -1e30];
            let x: [f32; 16] = std::array::from_fn(|i| x[i % 8]);
            let e = std::f32::consts::E;
            assert_eq!(path(0, x)[..4], [1.0, 1.0, 0.0, f32::INFINITY]);
            assert!((path(0, x)[4] - e).abs() < 1e-6 && path(0, x)[7] == 0.0);
            assert_eq!(path(1, x)[..8], [1.0, 1.0, 0.0, f32::INFINITY, 2.0, 0.5, 1.0, 0.0]);
            assert_eq!(path(2, x)[..4], [0.0, -0.0, -1.0, 1.0]);
        }
    }
}
