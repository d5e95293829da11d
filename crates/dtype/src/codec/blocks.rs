//! Blocks as scales and codes, for methods that choose the codes themselves.
//!
//! Every block format is the same idea: a group of elements shares a scale, maybe a minimum, and each element is a code
//! that stands for a [`Levels`] value. Element = `d * scale[group] * level(code) - dmin * min[group]`.
//! [`fit()`] chooses the scales, [`pack`] writes a block; what [`super::decode`] reads from it is
//! [`Scales::value`], bit for bit.

use super::fit::{self, Minimum, Part};
use super::{IQ4_VALUES, large, own, put_f16, small};
use crate::{DType, f16};

/// What the codes of a format stand for, before the scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Levels {
    /// Whole numbers `lo` to `hi`; code 0 is `lo`.
    Whole {
        /// The level of code 0.
        lo: i32,
        /// The level of the last code.
        hi: i32,
    },
    /// [`IQ4_VALUES`].
    Iq4,
}

impl Levels {
    /// Number of codes.
    pub const fn count(self) -> usize {
        match self {
            Levels::Whole { lo, hi } => (hi - lo + 1) as usize,
            Levels::Iq4 => 16,
        }
    }

    /// What `code` stands for.
    #[inline]
    pub fn level(self, code: u8) -> f32 {
        match self {
            Levels::Whole { lo, .. } => (i32::from(code) + lo) as f32,
            Levels::Iq4 => f32::from(IQ4_VALUES[usize::from(code & 15)]),
        }
    }

    /// The code whose level is nearest to `v`; code 0 for NaN.
    #[inline]
    pub fn nearest(self, v: f32) -> u8 {
        match self {
            // The cast cuts NaN to 0; half away from zero or to even makes no difference to the error.
            Levels::Whole { lo, hi } => (v.clamp(lo as f32, hi as f32) - lo as f32 + 0.5) as u8,
            Levels::Iq4 => <fit::Table as fit::Grid>::nearest(v).0,
        }
    }
}

/// How a format divides a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// What codes stand for.
    pub levels: Levels,
    /// Elements that share a scale.
    pub group: usize,
    /// Elements of a block.
    pub block: usize,
    /// Whether groups have a minimum beside their scale.
    pub has_min: bool,
}

/// The format of a block type; `None` for plain numbers, for the types of activations (`Q8_1`, `Q8_K`)
/// for `NF4`, whose blocks share scales, and for the types of optimiser states.
pub const fn format(dtype: DType) -> Option<Format> {
    use DType::*;
    const fn whole(lo: i32, hi: i32, group: usize, block: usize, has_min: bool) -> Option<Format> {
        Some(Format { levels: Levels::Whole { lo, hi }, group, block, has_min })
    }
    match dtype {
        Q4_0 => whole(-8, 7, 32, 32, false),
        Q4_1 => whole(0, 15, 32, 32, true),
        Q5_0 => whole(-16, 15, 32, 32, false),
        Q5_1 => whole(0, 31, 32, 32, true),
        Q8_0 => whole(-127, 127, 32, 32, false),
        IQ4_NL => Some(Format { levels: Levels::Iq4, group: 32, block: 32, has_min: false }),
        Q2_K => whole(0, 3, 16, 256, true),
        Q3_K => whole(-4, 3, 16, 256, false),
        Q4_K => whole(0, 15, 32, 256, true),
        Q5_K => whole(0, 31, 32, 256, true),
        Q6_K => whole(-32, 31, 16, 256, false),
        IQ4_XS => Some(Format { levels: Levels::Iq4, group: 32, block: 256, has_min: false }),
        S2_64 => whole(0, 3, 64, 64, true),
        S3_64 => whole(-4, 3, 64, 64, false),
        S4_64 => whole(-8, 7, 64, 64, false),
        F32 | F16 | BF16 | F64 | I8 | I16 | I32 | I64 | U8 | Q8_1 | Q8_K | NF4 | DYN8S | DYN8U => None,
    }
}

/// The scales of one block.
#[derive(Clone, Debug, PartialEq)]
pub struct Scales {
    /// The block's scale, as f16 holds it.
    pub d: f32,
    /// The unit of the minima, as f16 holds it; `-m` of `Q4_1` and `Q5_1`.
    pub dmin: f32,
    /// The groups' own scales, in units of `d`; 1 where a block is one group.
    pub scales: [i32; 16],
    /// The groups' minima, in units of `dmin`; 0 where the format has none.
    pub mins: [u8; 16],
}

impl Scales {
    /// The scales of a block that is one group.
    fn single(d: f32, dmin: f32, has_min: bool) -> Scales {
        let (mut scales, mut mins) = ([0; 16], [0; 16]);
        scales[0] = 1;
        mins[0] = u8::from(has_min);
        Scales { d: stored(d), dmin: stored(dmin), scales, mins }
    }

    fn grouped<const N: usize>(d: f32, dmin: f32, s: [i32; N], m: [u8; N]) -> Scales {
        let (mut scales, mut mins) = ([0; 16], [0; 16]);
        scales[..N].copy_from_slice(&s);
        mins[..N].copy_from_slice(&m);
        Scales { d, dmin, scales, mins }
    }

    /// Scale and minimum of group `g`: element = `scale * level - min`.
    #[inline]
    pub fn group(&self, g: usize) -> (f32, f32) {
        (self.d * self.scales[g] as f32, self.dmin * f32::from(self.mins[g]))
    }

    /// The element of group `g` with this level.
    #[inline]
    pub fn value(&self, g: usize, level: f32) -> f32 {
        let (scale, min) = self.group(g);
        scale * level - min
    }
}

/// How much the squared error of each element of a row counts where nothing is known of the inputs it meets: its
/// magnitude plus the root mean square of its group. What [`super::encode`] uses for the formats whose scales it searches.
pub fn importance(row: &[f32], group: usize) -> Vec<f32> {
    let mut w = vec![0.0; row.len()];
    for (x, w) in row.chunks(group).zip(w.chunks_mut(group)) {
        let rms = (x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32).sqrt().max(f32::MIN_POSITIVE);
        w.iter_mut().zip(x).for_each(|(w, v)| *w = v.abs() + rms);
    }
    w
}

/// Rounded to f16, as blocks store scales.
pub fn stored(v: f32) -> f32 {
    f16::from_f32(v).to_f32()
}

/// The scales of a block of `dtype` for the elements `x`, where the squared error of element `i` counts
/// `importance[i]` times (positive numbers; only their ratios within a block matter): those with the least weighted
/// error to the nearest codes that a search finds. `Q8_0`'s comes from the largest element.
///
/// # Panics
/// If the lengths are not `dtype`'s block, or it has no [`format()`].
pub fn fit(dtype: DType, x: &[f32], importance: &[f32]) -> Scales {
    use DType::*;
    fn block<const N: usize>(x: &[f32]) -> &[f32; N] {
        x.try_into().expect("a block of the format")
    }
    let part = Part { x, w: importance };
    let large = || (block::<256>(x), block::<256>(importance));
    match dtype {
        Q4_0 | S4_64 => Scales::single(fit::best_scale::<fit::Whole<8>>(part), 0.0, false),
        S3_64 => Scales::single(fit::best_scale::<fit::Whole<4>>(part), 0.0, false),
        Q5_0 => Scales::single(fit::best_scale::<fit::Whole<16>>(part), 0.0, false),
        IQ4_NL => Scales::single(fit::best_scale::<fit::Table>(part), 0.0, false),
        Q8_0 => Scales::single(x.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0, 0.0, false),
        Q4_1 | Q5_1 | S2_64 => {
            let top = match dtype {
                Q4_1 => 15.0,
                Q5_1 => 31.0,
                _ => 3.0,
            };
            let (d, min) = fit::best_affine(part, top, Minimum::Free);
            Scales::single(d, min, true)
        }
        Q2_K => {
            let (x, w) = large();
            let f = fit::affine::<16>(x, w, 3, 15);
            Scales::grouped(f.d, f.dmin, f.scales.map(i32::from), f.mins)
        }
        Q4_K | Q5_K => {
            let (x, w) = large();
            let f = fit::affine::<8>(x, w, if dtype == Q4_K { 15 } else { 31 }, 63);
            Scales::grouped(f.d, f.dmin, f.scales.map(i32::from), f.mins)
        }
        Q3_K => {
            let (x, w) = large();
            let f = fit::symmetric::<fit::Whole<4>, 16>(x, w, -32);
            Scales::grouped(f.d, 0.0, f.scales, [0; 16])
        }
        Q6_K => {
            let (x, w) = large();
            let f = fit::symmetric::<fit::Whole<32>, 16>(x, w, -128);
            Scales::grouped(f.d, 0.0, f.scales, [0; 16])
        }
        IQ4_XS => {
            let (x, w) = large();
            let f = fit::symmetric::<fit::Table, 8>(x, w, -32);
            Scales::grouped(f.d, 0.0, f.scales, [0; 8])
        }
        F32 | F16 | BF16 | F64 | I8 | I16 | I32 | I64 | U8 | Q8_1 | Q8_K | NF4 | DYN8S | DYN8U => {
            panic!("{dtype} is no block format of weights")
        }
    }
}

/// Writes the block with these scales and codes.
///
/// # Panics
/// If the lengths are not `dtype`'s, or it has no [`format()`].
///
/// ```
/// use sparsam_dtype::{DType, codec::{blocks, decode}};
/// let x: Vec<f32> = (0..32).map(|i| i as f32 - 16.0).collect();
/// let scales = blocks::fit(DType::Q4_0, &x, &[1.0; 32]);
/// let format = blocks::format(DType::Q4_0).unwrap();
/// let codes: Vec<u8> = x.iter().map(|v| format.levels.nearest(v / scales.d)).collect();
/// let (mut block, mut y) = ([0; 18], [0.0; 32]);
/// blocks::pack(DType::Q4_0, &scales, &codes, &mut block);
/// decode(DType::Q4_0, &block, &mut y).unwrap();
/// assert_eq!(y[3], scales.value(0, format.levels.level(codes[3])));
/// ```
pub fn pack(dtype: DType, s: &Scales, codes: &[u8], out: &mut [u8]) {
    use DType::*;
    fn to<const N: usize>(out: &mut [u8]) -> &mut [u8; N] {
        out.try_into().expect("the bytes of one block")
    }
    fn small(codes: &[u8]) -> &[u8; 32] {
        codes.try_into().expect("a block of 32 codes")
    }
    fn large_codes(codes: &[u8]) -> &[u8; 256] {
        codes.try_into().expect("a block of 256 codes")
    }
    fn own(codes: &[u8]) -> &[u8; 64] {
        codes.try_into().expect("a block of 64 codes")
    }
    let scales8: &[i32; 8] = s.scales.first_chunk().expect("16 are there");
    let mins8: &[u8; 8] = s.mins.first_chunk().expect("16 are there");
    assert_eq!(out.len(), dtype.block_bytes(), "{dtype}: the bytes of one block");
    match dtype {
        Q4_0 | IQ4_NL => {
            put_f16(out, 0, s.d);
            small::put_nibbles(&mut out[2..], small(codes));
        }
        Q4_1 => {
            put_f16(out, 0, s.d);
            put_f16(out, 2, -s.dmin);
            small::put_nibbles(&mut out[4..], small(codes));
        }
        Q5_0 | Q5_1 => {
            put_f16(out, 0, s.d);
            let at = if dtype == Q5_1 {
                put_f16(out, 2, -s.dmin);
                4
            } else {
                2
            };
            let (high, qs) = out[at..].split_at_mut(4);
            small::put_five_bits(high, qs, small(codes));
        }
        Q8_0 => {
            put_f16(out, 0, s.d);
            for (o, &c) in out[2..].iter_mut().zip(small(codes)) {
                *o = (i32::from(c) - 127) as i8 as u8;
            }
        }
        Q2_K => large::pack_q2_k([s.d, s.dmin], &s.scales, &s.mins, large_codes(codes), to(out)),
        Q3_K => large::pack_q3_k(s.d, &s.scales, large_codes(codes), to(out)),
        Q4_K => large::pack_q4_k([s.d, s.dmin], scales8, mins8, large_codes(codes), to(out)),
        Q5_K => large::pack_q5_k([s.d, s.dmin], scales8, mins8, large_codes(codes), to(out)),
        Q6_K => large::pack_q6_k(s.d, &s.scales, large_codes(codes), to(out)),
        IQ4_XS => large::pack_iq4_xs(s.d, scales8, large_codes(codes), to(out)),
        S2_64 => own::pack_s2_64(s.d, -s.dmin, own(codes), to(out)),
        S3_64 => own::pack_s3_64(s.d, own(codes), to(out)),
        S4_64 => own::pack_s4_64(s.d, own(codes), to(out)),
        F32 | F16 | BF16 | F64 | I8 | I16 | I32 | I64 | U8 | Q8_1 | Q8_K | NF4 | DYN8S | DYN8U => {
            panic!("{dtype} is no block format of weights")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{decode, encode};

    fn normal(n: usize, mut state: u64) -> Vec<f32> {
        // A sum of uniform numbers from a linear congruential generator is near enough to normal.
        let mut uniform = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..n).map(|_| (0..4).map(|_| uniform()).sum()).collect()
    }

    /// What is packed decodes to what the scales say, to the bit; and a fit with even weights is about as good as the
    /// encoder of the format.
    #[test]
    fn packed_blocks_decode_to_their_values() {
        for dtype in DType::ALL {
            let Some(f) = format(dtype) else { continue };
            let (mut ours, mut theirs) = (0.0f64, 0.0f64);
            for seed in 0..20 {
                let x = normal(f.block, seed);
                let s = fit(dtype, &x, &vec![1.0; f.block]);
                let codes: Vec<u8> = (0..f.block)
                    .map(|i| {
                        let (scale, min) = s.group(i / f.group);
                        f.levels.nearest(if scale == 0.0 { 0.0 } else { (x[i] + min) / scale })
                    })
                    .collect();
                let (mut bytes, mut y) = (vec![0; dtype.block_bytes()], vec![0.0; f.block]);
                pack(dtype, &s, &codes, &mut bytes);
                decode(dtype, &bytes, &mut y).unwrap();
                for i in 0..f.block {
                    assert!(usize::from(codes[i]) < f.levels.count());
                    let want = s.value(i / f.group, f.levels.level(codes[i]));
                    assert_eq!(y[i].to_bits(), want.to_bits(), "{dtype}, element {i}");
                }
                let error =
                    |y: &[f32]| -> f64 { x.iter().zip(y).map(|(a, b)| f64::from(a - b).powi(2)).sum() };
                ours += error(&y);
                encode(dtype, &x, &mut bytes).unwrap();
                decode(dtype, &bytes, &mut y).unwrap();
                theirs += error(&y);
            }
            assert!(ours <= theirs * 1.001, "{dtype}: {ours} with searched scales, {theirs} by the encoder");
        }
    }

    #[test]
    fn levels_round_to_the_nearest() {
        let whole = Levels::Whole { lo: -8, hi: 7 };
        for (v, code) in
            [(-9.0, 0), (-8.0, 0), (-7.4, 1), (0.0, 8), (0.4, 8), (0.6, 9), (7.0, 15), (99.0, 15)]
        {
            assert_eq!(whole.nearest(v), code, "{v}");
        }
        assert_eq!(Levels::Iq4.level(Levels::Iq4.nearest(12.0)), 13.0);
        assert_eq!((whole.count(), Levels::Iq4.count(), whole.level(0)), (16, 16, -8.0));
    }
}
