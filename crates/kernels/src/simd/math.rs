//! Elementary functions on vectors. Polynomials are near-minimax fits by `scripts/fit-math.py`.
//!
//! Largest errors with fused multiply-add, in units in the last place (ulp) of f32 (the tests below hold them to f64):
//! exp 1, log 1, tanh 1.5, erf 1, sin and cos 2 (all arguments), sigmoid 2.5; portable code keeps them too. NaN gives
//! NaN; infinities give the limits; results too small for normal numbers are rounded to subnormal ones.

use super::Vector;

/// log2(e).
const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln(2) in two parts; the low 9 bits of the first are 0, so that its product with an exponent is exact.
const LN2_HI: f32 = 0.693_145_75;
const LN2_LO: f32 = 1.428_606_8e-6;

/// `c[0] + x c[1] + x^2 c[2] + ..`.
#[inline(always)]
unsafe fn horner<V: Vector, const N: usize>(x: V, c: [f32; N]) -> V {
    // SAFETY: the caller has V's instructions.
    unsafe {
        let mut sum = V::splat(c[N - 1]);
        for k in (0..N - 1).rev() {
            sum = sum.fma(x, V::splat(c[k]));
        }
        sum
    }
}

/// e^x.
///
/// With n = round(x / ln 2) and r = x - n ln 2: e^x = 2^n e^r, the power of two applied in two halves so that results
/// may be subnormal.
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(crate) unsafe fn exp<V: Vector>(x: V) -> V {
    // SAFETY: the caller's contract.
    unsafe {
        // Beyond these bounds the result is infinite or 0. The bound stands first: NaN passes through.
        let x = V::splat(89.0).min_or(V::splat(-104.0).max_or(x));
        let n = x.mul(V::splat(LOG2_E)).nearest();
        let r = n.fnma(V::splat(LN2_LO), n.fnma(V::splat(LN2_HI), x));
        let p = horner(r, [0.5, 0.166_665_17, 0.041_666_456, 0.008_369_089, 0.001_393_575_8]);
        let e = p.fma(r.mul(r), r).add(V::splat(1.0));
        let n = n.to_int();
        let half = V::int_shr::<1>(n);
        // n - half = half + (n & 1)
        let rest = V::int_add(half, V::int_and(n, V::int(1)));
        e.mul(power_of_two(half)).mul(power_of_two(rest))
    }
}

/// 2^n for -126 <= n <= 127.
#[inline(always)]
unsafe fn power_of_two<V: Vector>(n: V::Int) -> V {
    // SAFETY: the caller has V's instructions.
    unsafe { V::from_bits(V::int_shl::<23>(V::int_add(n, V::int(127)))) }
}

/// The natural logarithm; -inf at 0, NaN below.
///
/// x = 2^n (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2): ln x = n ln 2 + f - f^2/2 + f^3 p(f).
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(crate) unsafe fn log<V: Vector>(x: V) -> V {
    // SAFETY: the caller's contract.
    unsafe {
        // Subnormal numbers are scaled by 2^23 first.
        let small = x.lt(V::splat(f32::MIN_POSITIVE));
        let y = V::select(small, x.mul(V::splat(8_388_608.0)), x);
        let offset = V::select(small, V::splat(-23.0), V::splat(0.0));
        // Bits above those of sqrt(1/2) count the exponent.
        let sqrt_half = 0x3f35_04f3;
        let above = V::int_add(y.bits(), V::int(-sqrt_half));
        let n = V::from_int(V::int_shr::<23>(above)).add(offset);
        let m = V::from_bits(V::int_add(V::int_and(above, V::int(0x7f_ffff)), V::int(sqrt_half)));
        let f = m.sub(V::splat(1.0));
        let p = horner(
            f,
            [
                0.333_333_1,
                -0.25,
                0.200_022_27,
                -0.166_685_27,
                0.142_181_22,
                -0.123_964_21,
                0.118_885_93,
                -0.117_258_29,
                0.068_049_18,
            ],
        );
        let f2 = f.mul(f);
        // n ln 2 + f, whose low part is summed with the small terms.
        let tail = p.mul(f).fma(f2, n.mul(V::splat(LN2_LO))).add(f2.mul(V::splat(-0.5)));
        let y = n.mul(V::splat(LN2_HI)).add(f.add(tail));
        let y = V::select(x.eq(V::splat(0.0)), V::splat(f32::NEG_INFINITY), y);
        let y = V::select(x.eq(V::splat(f32::INFINITY)), x, y);
        let bad = V::or(x.lt(V::splat(0.0)), x.unordered(x));
        V::select(bad, V::splat(f32::NAN), y)
    }
}

/// The hyperbolic tangent: x + x^3 p(x^2) for |x| < 0.625, else 1 - 2 / (e^2|x| + 1) with x's sign.
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(crate) unsafe fn tanh<V: Vector>(x: V) -> V {
    // SAFETY: the caller's contract.
    unsafe {
        let a = x.abs();
        let s = x.mul(x);
        let p = horner(s, [-0.333_332_87, 0.133_315_5, -0.053_747_673, 0.020_662_507, -0.005_728_961_4]);
        let near = p.mul(s).fma(x, x);
        let e = exp(a.add(a));
        let far = V::splat(1.0).sub(V::splat(2.0).div(e.add(V::splat(1.0)))).copysign(x);
        V::select(a.lt(V::splat(0.625)), near, far)
    }
}

/// The error function: x + x p(x^2) for |x| < 0.95, else 1 - e^-q(|x|) with x's sign, where q = -ln erfc.
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(crate) unsafe fn erf<V: Vector>(x: V) -> V {
    // SAFETY: the caller's contract.
    unsafe {
        let a = x.abs();
        let s = x.mul(x);
        let p = horner(s, ERF);
        let near = p.fma(x, x);
        // From 4 on erf is 1 in f32. The bound stands first: NaN passes through.
        let t = V::splat(4.0).min_or(a);
        let far = V::splat(1.0).sub(exp(horner(t, ERFC).neg())).copysign(x);
        V::select(a.lt(V::splat(0.95)), near, far)
    }
}

const ERF: [f32; 7] = [
    0.128_379_17,
    -0.376_126_32,
    0.112_836_726,
    -0.026_858_183,
    0.005_198_037,
    -0.000_810_869_7,
    8.226_304e-5,
];
const ERFC: [f32; 9] = [
    -0.000_158_857_03,
    1.129_427_8,
    0.633_553_4,
    0.108_005_21,
    -0.024_894_677,
    0.004_055_549,
    -0.000_398_034_43,
    1.465_339_6e-5,
    4.888_301_5e-7,
];

/// Beyond this the reduction below loses bits: n pi/2 in three parts is exact enough for n < 2^22.
const TRIG_LIMIT: f32 = 1_000_000.0;

/// sin x (`COS` false) or cos x.
///
/// With n = round(2 x / pi), r = x - n pi/2: the sine or cosine of r, by n's lowest bits. pi/2 stands in three parts;
/// fused products make the first difference exact. Larger arguments go through f64, one by one.
#[inline(always)]
unsafe fn trig<V: Vector, const COS: bool>(x: V) -> V {
    // SAFETY: the caller has V's instructions.
    unsafe {
        if !V::FUSED || V::any(V::splat(TRIG_LIMIT).lt(x.abs())) {
            let mut lanes = [0f32; 16];
            x.store(lanes.as_mut_ptr());
            for lane in &mut lanes[..V::LANES] {
                let x = *lane as f64;
                *lane = if COS { x.cos() } else { x.sin() } as f32;
            }
            return V::load(lanes.as_ptr());
        }
        let n = x.mul(V::splat(std::f32::consts::FRAC_2_PI)).nearest();
        let r = n.fnma(V::splat(1.570_796_4), x);
        let r = n.fnma(V::splat(-4.371_139e-8), r);
        let r = n.fnma(V::splat(-1.715_124_5e-15), r);
        let s = r.mul(r);
        let sin = horner(s, [-0.166_666_67, 0.008_333_374, -0.000_198_506_94, 2.808_463_3e-6]);
        let sin = sin.mul(s).fma(r, r);
        let cos = horner(s, [0.041_666_668, -0.001_388_897_5, 2.482_02e-5, -2.870_664e-7]);
        let cos = cos.mul(s).fma(s, s.fnma(V::splat(0.5), V::splat(1.0)));
        let quarter = V::int_add(n.to_int(), V::int(COS as i32));
        let odd = V::int_eq_zero(V::int_and(quarter, V::int(1)));
        let y = V::select(odd, sin, cos);
        // Quarters 2 and 3 are negative: bit 1 becomes the sign.
        let sign = V::int_shl::<30>(V::int_and(quarter, V::int(2)));
        V::from_bits(V::int_xor(y.bits(), sign))
    }
}

/// The sine of x radians.
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(crate) unsafe fn sin<V: Vector>(x: V) -> V {
    // SAFETY: the caller's contract.
    unsafe { trig::<V, false>(x) }
}

/// The cosine of x radians.
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(crate) unsafe fn cos<V: Vector>(x: V) -> V {
    // SAFETY: the caller's contract.
    unsafe { trig::<V, true>(x) }
}

/// 1 / (1 + e^-x). Results below the normal numbers (x < -87.3) may be 0.
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(crate) unsafe fn sigmoid<V: Vector>(x: V) -> V {
    // SAFETY: the caller's contract.
    unsafe { V::splat(1.0).div(exp(x.neg()).add(V::splat(1.0))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;
    use crate::row::reference;
    use crate::simd::dispatch;

    #[derive(Clone, Copy, Debug)]
    enum Function {
        Exp,
        Log,
        Tanh,
        Erf,
        Sin,
        Cos,
        Sigmoid,
    }

    /// `n` a multiple of 16.
    #[inline(always)]
    unsafe fn apply<V: Vector>(f: Function, x: *const f32, y: *mut f32, n: usize) {
        for i in (0..n).step_by(V::LANES) {
            // SAFETY: the caller's contract.
            unsafe {
                let v = V::load(x.add(i));
                let v = match f {
                    Function::Exp => exp(v),
                    Function::Log => log(v),
                    Function::Tanh => tanh(v),
                    Function::Erf => erf(v),
                    Function::Sin => sin(v),
                    Function::Cos => cos(v),
                    Function::Sigmoid => sigmoid(v),
                };
                v.store(y.add(i));
            }
        }
    }

    dispatch! {
        unsafe fn apply_all(f: Function, x: *const f32, y: *mut f32, n: usize) = apply
    }

    /// Distance in units in the last place of the true value as f32 would hold it.
    fn ulps(got: f32, want: f64) -> f64 {
        let nearest = want as f32;
        if got.is_nan() || want.is_nan() || nearest.is_infinite() || got.is_infinite() {
            return if got == nearest || got.is_nan() && want.is_nan() { 0.0 } else { f64::INFINITY };
        }
        let exponent = (nearest.abs().max(f32::MIN_POSITIVE).to_bits() >> 23) as i32 - 127;
        (got as f64 - want).abs() / 2f64.powi(exponent - 23)
    }

    /// The largest error over floats `step` apart in their bits.
    fn worst(cpu: Cpu, f: Function, step: usize, truth: impl Fn(f64) -> f64) -> (f64, f32) {
        let mut worst = (0.0, 0.0);
        let bits: Vec<u32> = (0..=u32::MAX).step_by(step).collect();
        for chunk in bits.chunks(1 << 12) {
            let mut x: Vec<f32> = chunk.iter().map(|&b| f32::from_bits(b)).collect();
            x.resize(chunk.len().next_multiple_of(16), 0.5);
            let mut y = vec![0f32; x.len()];
            // SAFETY: both hold a multiple of 16 elements; the machine has `cpu`.
            unsafe { apply_all(cpu.simd, f, x.as_ptr(), y.as_mut_ptr(), x.len()) }
            for (&x, &y) in x.iter().zip(&y) {
                let want = truth(x as f64);
                let tiny = |y: f64| y.abs() <= f32::MIN_POSITIVE as f64;
                if matches!(f, Function::Sigmoid) && tiny(want) && tiny(y as f64) {
                    continue;
                }
                let e = ulps(y, want);
                if e > worst.0 {
                    worst = (e, x);
                }
            }
        }
        worst
    }

    #[test]
    fn functions_are_accurate_over_all_floats() {
        type Truth = fn(f64) -> f64;
        let table: [(Function, usize, Truth, f64); 7] = [
            (Function::Exp, 1531, f64::exp, 1.0),
            (Function::Log, 1531, f64::ln, 1.0),
            (Function::Tanh, 1531, f64::tanh, 1.5),
            (Function::Erf, 15_313, reference::erf, 1.0),
            (Function::Sin, 1531, f64::sin, 2.0),
            (Function::Cos, 1531, f64::cos, 2.0),
            (Function::Sigmoid, 1531, |x| 1.0 / (1.0 + (-x).exp()), 2.5),
        ];
        for cpu in Cpu::all() {
            for (f, step, truth, bound) in table {
                let (error, at) = worst(cpu, f, step, truth);
                assert!(error <= bound, "{cpu} {f:?}: {error} ulp at {at:e}");
            }
        }
    }
}
