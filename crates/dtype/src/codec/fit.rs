//! Choosing the scales of a block of 256 weights whose groups have small integer scales of their own.
//!
//! A code is always the nearest one; what is searched are the scales. For fixed codes the best scale is a quotient
//! of sums (least squares), so a few trial scales per group give the codes, and least squares the scale that serves
//! them best. Then the groups' scales are rounded to multiples of the block's, trying the neighbours too, and the
//! block's scales are fitted once more to the final codes.
//!
//! Squared errors count by [`importance`]: large weights more than small ones.

use crate::f16;

/// How much the squared error of each element of a group counts: its magnitude plus the group's root mean square.
///
/// Nothing is known here of the activations, but large weights earn their size by mattering. Measured as perplexity
/// of SmolLM2-135M-Instruct with all matrices in `IQ4_NL` (wikitext-2, 6 chunks of 512): 20.20 if all count the same,
/// 19.48 with the square of the weight, 18.73 with this.
pub(super) fn importance<const N: usize>(x: &[f32; N], group: usize) -> [f32; N] {
    let mut w = x.map(f32::abs);
    for part in w.chunks_mut(group) {
        let rms = (part.iter().map(|v| v * v).sum::<f32>() / group as f32).sqrt();
        // Lifted above 0, so that a group of zeros still has a best scale.
        part.iter_mut().for_each(|v| *v += rms.max(f32::MIN_POSITIVE));
    }
    w
}

/// What codes stand for, before the scale.
pub(super) trait Grid {
    /// The values of the first and the last code.
    const ENDS: [f32; 2];
    /// How far the trial scales go from the one that puts the largest element on an end, as a fraction of it.
    const SPREAD: f32;
    /// The nearest code to `v`, and the value it stands for.
    fn nearest(v: f32) -> (u8, f32);
}

/// Whole numbers from `-HALF` to `HALF - 1`; code 0 is `-HALF`.
pub(super) struct Whole<const HALF: i32>;

impl<const HALF: i32> Grid for Whole<HALF> {
    const ENDS: [f32; 2] = [-HALF as f32, (HALF - 1) as f32];
    // Nearly one step of the largest element up or down: beyond, a trial repeats another's codes or cuts off.
    const SPREAD: f32 = 0.9 / HALF as f32;
    fn nearest(v: f32) -> (u8, f32) {
        let q = round(v.clamp(-HALF as f32, (HALF - 1) as f32));
        ((q as i32 + HALF) as u8, q)
    }
}

/// The 16 values of [`super::IQ4_VALUES`].
pub(super) struct Table;

/// The nearest code to each half of a whole number from -128, up to the last code's value. Boundaries between codes are
/// multiples of a half, so the number rounded down decides (but for ties, where either code errs the same).
const NEAREST: [u8; 512] = {
    let mut nearest = [15; 512];
    let mut i = 0;
    while i < 512 {
        // The middle of the cell, times 4.
        let v = 2 * i as i32 - 512 + 1;
        let mut code = 0;
        while code < 15 && v > 2 * (super::IQ4_VALUES[code] as i32 + super::IQ4_VALUES[code + 1] as i32) {
            code += 1;
        }
        nearest[i] = code as u8;
        i += 1;
    }
    nearest
};

impl Grid for Table {
    const ENDS: [f32; 2] = [super::IQ4_VALUES[0] as f32, super::IQ4_VALUES[15] as f32];
    // By trial on normal and heavy-tailed weights: 0.07 errs 0.4% more, from 0.18 on nothing is won.
    const SPREAD: f32 = 0.12;
    fn nearest(v: f32) -> (u8, f32) {
        let code = NEAREST[((v.clamp(-127.0, 113.0) + 128.0) * 2.0) as usize];
        (code, super::IQ4_VALUES[code as usize].into())
    }
}

/// Trial scales on each side of the first one.
const TRIALS: i32 = 9;

/// The nearest whole number to `v`, of magnitude below 2^22: there f32 has no halves left once 1.5 * 2^23 is added. An
/// addition and a subtraction, where x86-64 without SSE4.1 would call a function.
fn round(v: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (v + SHIFT) - SHIFT
}

/// A group (16 or 32 elements) and their importance.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    pub x: &'a [f32],
    pub w: &'a [f32],
}

impl<'a> Part<'a> {
    /// Group `g` of `n` elements.
    fn of(x: &'a [f32; 256], w: &'a [f32; 256], g: usize, n: usize) -> Part<'a> {
        Part { x: &x[g * n..(g + 1) * n], w: &w[g * n..(g + 1) * n] }
    }
}

/// Sums over a group of the `N` terms that `f` gives for each element and its importance; eight partial sums each, so
/// that they can be added as vectors.
#[inline(always)]
fn sums<const N: usize>(part: Part<'_>, f: impl Fn(f32, f32) -> [f32; N]) -> [f32; N] {
    let mut partial = [[0.0f32; 8]; N];
    for (x, w) in part.x.as_chunks::<8>().0.iter().zip(part.w.as_chunks::<8>().0) {
        for lane in 0..8 {
            for (sum, term) in partial.iter_mut().zip(f(x[lane], w[lane])) {
                sum[lane] += term;
            }
        }
    }
    partial.map(|p| p.iter().sum())
}

/// Rounded to f16, as it will be stored.
fn stored(v: f32) -> f32 {
    f16::from_f32(v).to_f32()
}

/// The squared error of a group against `scale * nearest code`.
fn error<G: Grid>(part: Part<'_>, scale: f32) -> f32 {
    let inverse = inverse(scale);
    let [error] = sums(part, |v, w| {
        let e = v - scale * G::nearest(v * inverse).1;
        [w * e * e]
    });
    error
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The scale (of either sign) with the least squared error that the trials find; 0 for zeros.
pub(super) fn best_scale<G: Grid>(part: Part<'_>) -> f32 {
    let largest = part.x.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    // Below f32's normal numbers quotients overflow; f16 scales could not hold them anyway.
    if largest.abs() < 1e-30 {
        return 0.0;
    }
    let (mut best, mut best_gain) = (0.0, 0.0);
    for end in G::ENDS {
        for trial in -TRIALS..=TRIALS {
            let inverse = end / largest * (1.0 + trial as f32 / TRIALS as f32 * G::SPREAD);
            // With values q, the error of the best scale is sum(w x^2) - sum(w x q)^2 / sum(w q^2).
            let [xq, qq] = sums(part, |v, w| {
                let q = G::nearest(v * inverse).1;
                [w * v * q, w * q * q]
            });
            if qq > 0.0 && xq * xq > best_gain * qq {
                best_gain = xq * xq / qq;
                best = xq / qq;
            }
        }
    }
    best
}

/// A block of groups with signed scales: element = `d * scale * value(code)`.
pub(super) struct Symmetric<const GROUPS: usize> {
    /// As f16 holds it.
    pub d: f32,
    pub scales: [i32; GROUPS],
    pub codes: [u8; 256],
}

/// Fits a block whose group scales are whole numbers from `lowest` (negative) to `-lowest - 1`. The squared error of
/// element `i` counts `w[i]` times.
pub(super) fn symmetric<G: Grid, const GROUPS: usize>(
    x: &[f32; 256],
    w: &[f32; 256],
    lowest: i32,
) -> Symmetric<GROUPS> {
    let group = 256 / GROUPS;
    let wanted: [f32; GROUPS] = std::array::from_fn(|g| best_scale::<G>(Part::of(x, w, g, group)));
    let largest = wanted.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    let mut d = stored(largest / lowest as f32);
    let mut scales = [0; GROUPS];
    let mut codes = [0; 256];
    // Twice: with the scales' own unit, and with the one that fits the resulting codes best.
    for round in 0..2 {
        let inverse_d = inverse(d);
        let (mut xv, mut vv) = (0.0f32, 0.0f32);
        for g in 0..GROUPS {
            let part = Part::of(x, w, g, group);
            let near = (wanted[g] * inverse_d).round() as i32;
            let tried = (near - 1..=near + 1).map(|s| s.clamp(lowest, -lowest - 1));
            let scored = tried.map(|s| (error::<G>(part, d * s as f32), s));
            scales[g] = scored.min_by(|a, b| a.0.total_cmp(&b.0)).expect("three are tried").1;
            let scale = d * scales[g] as f32;
            let inverse = inverse(scale);
            for (e, (&v, &w)) in part.x.iter().zip(part.w).enumerate() {
                let (code, value) = G::nearest(v * inverse);
                codes[g * group + e] = code;
                let unit = scales[g] as f32 * value;
                xv += w * v * unit;
                vv += w * unit * unit;
            }
        }
        if round == 0 && vv > 0.0 {
            d = stored(xv / vv);
        }
    }
    Symmetric { d, scales, codes }
}

/// A block of groups with scales and minima: element = `d * scale * code - dmin * min`.
pub(super) struct Affine<const GROUPS: usize> {
    /// As f16 holds it.
    pub d: f32,
    /// As f16 holds it.
    pub dmin: f32,
    pub scales: [u8; GROUPS],
    pub mins: [u8; GROUPS],
    pub codes: [u8; 256],
}

/// The nearest code from 0 to `top`.
fn code(v: f32, top: f32) -> f32 {
    round(v.clamp(0.0, top))
}

/// The squared error of a group against `scale * code - min`.
fn affine_error(part: Part<'_>, scale: f32, min: f32, top: f32) -> f32 {
    let inverse = inverse(scale);
    let [error] = sums(part, |v, w| {
        let e = v - (scale * code((v + min) * inverse, top) - min);
        [w * e * e]
    });
    error
}

/// What a format can say of a group's minimum.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Minimum {
    /// It is subtracted and not negative: a group of positive numbers starts at 0.
    Subtracted,
    /// Any number.
    Free,
}

/// Scale (from 0) and subtracted minimum with the least squared error that the trials find.
pub(super) fn best_affine(part: Part<'_>, top: f32, minimum: Minimum) -> (f32, f32) {
    let start = if minimum == Minimum::Free { f32::INFINITY } else { 0.0 };
    let (lo, hi) = part.x.iter().fold((start, f32::NEG_INFINITY), |(lo, hi), &v| (lo.min(v), hi.max(v)));
    let range = hi - lo;
    if range < 1e-30 {
        return (0.0, -lo);
    }
    let mut best = (range / top, -lo);
    let mut best_error = affine_error(part, best.0, best.1, top);
    for trial in -TRIALS..=TRIALS {
        let inverse = (top + trial as f32 / TRIALS as f32) / range;
        // Least squares of x = scale * q - min over the trial's codes.
        let [n, q1, q2, x1, xq] = sums(part, |v, w| {
            let q = code((v - lo) * inverse, top);
            [w, w * q, w * q * q, w * v, w * v * q]
        });
        let det = n * q2 - q1 * q1;
        if det <= 0.0 {
            continue; // all codes equal
        }
        let (mut scale, mut min) = ((n * xq - q1 * x1) / det, (q1 * xq - q2 * x1) / det);
        if min < 0.0 && minimum == Minimum::Subtracted {
            (scale, min) = (xq / q2, 0.0);
        }
        if scale <= 0.0 {
            continue;
        }
        let error = affine_error(part, scale, min, top);
        if error < best_error {
            (best, best_error) = ((scale, min), error);
        }
    }
    best
}

/// Fits a block whose codes go from 0 to `top` and whose group scales and minima go from 0 to `largest`. The squared
/// error of element `i` counts `w[i]` times.
pub(super) fn affine<const GROUPS: usize>(
    x: &[f32; 256],
    w: &[f32; 256],
    top: u8,
    largest: u8,
) -> Affine<GROUPS> {
    let group = 256 / GROUPS;
    let top = f32::from(top);
    let wanted: [(f32, f32); GROUPS] =
        std::array::from_fn(|g| best_affine(Part::of(x, w, g, group), top, Minimum::Subtracted));
    let most = |f: fn(&(f32, f32)) -> f32| wanted.iter().map(f).fold(0.0, f32::max);
    let mut d = stored(most(|w| w.0) / f32::from(largest));
    let mut dmin = stored(most(|w| w.1) / f32::from(largest));
    let mut scales = [0u8; GROUPS];
    let mut mins = [0u8; GROUPS];
    let mut codes = [0; 256];
    for round in 0..2 {
        let around = |wanted: f32, unit: f32| {
            let near = (wanted * inverse(unit)).round() as i32;
            (near - 1..=near + 1).map(move |s| s.clamp(0, largest.into()) as u8)
        };
        // Least squares of x = d * (scale * q) - dmin * min over the whole block.
        let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0.0f32, 0.0f32, 0.0f32, 0.0f32, 0.0f32);
        for g in 0..GROUPS {
            let part = Part::of(x, w, g, group);
            let mut least = f32::INFINITY;
            for s in around(wanted[g].0, d) {
                for m in around(wanted[g].1, dmin) {
                    let error = affine_error(part, d * f32::from(s), dmin * f32::from(m), top);
                    if error < least {
                        (least, scales[g], mins[g]) = (error, s, m);
                    }
                }
            }
            let (scale, min) = (f32::from(scales[g]), f32::from(mins[g]));
            let inverse = inverse(d * scale);
            for (e, (&v, &w)) in part.x.iter().zip(part.w).enumerate() {
                let q = code((v + dmin * min) * inverse, top);
                codes[g * group + e] = q as u8;
                let (a, b) = (scale * q, -min);
                aa += w * a * a;
                ab += w * a * b;
                bb += w * b * b;
                ax += w * a * v;
                bx += w * b * v;
            }
        }
        let det = aa * bb - ab * ab;
        if round == 0 && det > 1e-6 * aa * bb {
            let (fitted, fitted_min) = ((bb * ax - ab * bx) / det, (aa * bx - ab * ax) / det);
            if fitted > 0.0 && fitted_min >= 0.0 {
                (d, dmin) = (stored(fitted), stored(fitted_min));
            }
        } else if round == 0 && bb == 0.0 && aa > 0.0 {
            d = stored(ax / aa);
        }
    }
    Affine { d, dmin, scales, mins, codes }
}
