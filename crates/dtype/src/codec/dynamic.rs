//! Numbers of many magnitudes in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section
//! 1.3), as bitsandbytes has it: the states of an optimiser, and the scales of [`super::nf4`].
//!
//! A block of 256 numbers, little endian:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | f32: the largest magnitude |
//! | 256 | an index into [`signed`] or [`unsigned`] each: the number nearest to `x / largest` |
//!
//! A block that holds what is no finite number decodes to NaN.

use std::sync::LazyLock;

/// Numbers of a block.
pub const BLOCK: usize = 256;
/// Bytes of a block.
pub const BYTES: usize = 4 + BLOCK;

/// What the codes of `DYN8S` stand for, ascending: for each of seven powers of ten down from 1 twice as few numbers of
/// either sign as for the one above, in the middles of equal parts of its upper nine tenths; 0; and 1.
pub fn signed() -> &'static [f32; 256] {
    static TABLE: LazyLock<[f32; 256]> = LazyLock::new(|| table(true));
    &TABLE
}

/// What the codes of `DYN8U` stand for, ascending: as [`signed`], twice as many of one sign.
pub fn unsigned() -> &'static [f32; 256] {
    static TABLE: LazyLock<[f32; 256]> = LazyLock::new(|| table(false));
    &TABLE
}

/// bitsandbytes' `create_dynamic_map`.
fn table(signed: bool) -> [f32; 256] {
    let mut all = vec![0.0, 1.0];
    for i in 0..7 {
        let (parts, power) = (1 << (i + i32::from(!signed)), 10f64.powi(i - 6) as f32);
        let step = (1.0 - 0.1f32) / parts as f32;
        // From either end to the middle, as PyTorch's linspace.
        let bound = |k: i32| match k < (parts + 1) / 2 {
            true => step.mul_add(k as f32, 0.1),
            false => step.mul_add(-(parts - k) as f32, 1.0),
        };
        let middles = (0..parts).map(|k| power * ((bound(k) + bound(k + 1)) / 2.0));
        match signed {
            true => all.extend(middles.flat_map(|m| [m, -m])),
            false => all.extend(middles),
        }
    }
    all.sort_by(f32::total_cmp);
    all.try_into().expect("2 and 254 numbers")
}

/// The index of the number of an ascending table that is nearest to `v`, the lower one of two.
pub fn nearest<const N: usize>(table: &[f32; N], v: f32) -> u8 {
    let above = table.partition_point(|&t| t <= v);
    let below = above.saturating_sub(1);
    let is_above = above < N && (table[above] - v).abs() < (v - table[below]).abs();
    (if is_above { above } else { below }) as u8
}

/// The scale of a block: its largest magnitude; NaN if it holds what is no finite number.
pub fn scale(x: &[f32; BLOCK]) -> f32 {
    let (mut largest, mut finite) = (0f32, true);
    for v in x {
        finite &= v.is_finite();
        let a = v.abs();
        largest = if a > largest { a } else { largest };
    }
    if finite { largest } else { f32::NAN }
}

pub(super) fn decode(table: &[f32; 256], block: &[u8; BYTES], out: &mut [f32; BLOCK]) {
    let (scale, codes) = block.split_first_chunk().expect("a block begins with its scale");
    let scale = f32::from_le_bytes(*scale);
    for (x, &code) in out.iter_mut().zip(codes) {
        *x = table[usize::from(code)] * scale;
    }
}

pub(super) fn encode(table: &[f32; 256], x: &[f32; BLOCK], block: &mut [u8; BYTES]) {
    let scale = scale(x);
    block[..4].copy_from_slice(&scale.to_le_bytes());
    for (code, &v) in block[4..].iter_mut().zip(x) {
        // Of zeros, and of no numbers: the code of 0.
        *code = nearest(table, if scale > 0.0 { v / scale } else { 0.0 });
    }
}
