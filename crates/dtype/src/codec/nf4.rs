//! NF4 with double quantisation (Dettmers et al. 2023, QLoRA, section 3), as bitsandbytes has it.
//!
//! The weights of a matrix, row after row, are taken 64 at a time: each becomes the nearest of 16 levels, the quantiles
//! of a normal distribution, times the block's largest magnitude. These magnitudes, less their mean over the matrix, are
//! rounded in turn: 256 of them to 8 bits of a dynamic type (Dettmers et al. 2022), times the largest of them. That is
//! 4.127 bits a weight.
//!
//! The bytes of a matrix of `n` weights, multi-byte fields little endian:
//!
//! | bytes | what |
//! |---|---|
//! | n / 2 | two codes each, the first in the high half |
//! | n / 64 | a code of [`signed`] for each block |
//! | 4 ceil(n / 16384) | f32: the second level's scales |
//! | 4 | f32: the mean |

use super::dynamic::{nearest, signed};

/// Weights of a block.
pub const BLOCK: usize = 64;
/// Blocks whose scales are rounded together.
pub const SECOND: usize = 256;

/// What the 4-bit codes stand for, times the block's scale.
pub const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Bytes of a matrix of `n` weights, a whole number of blocks.
pub(crate) const fn bytes_for(n: usize) -> Option<usize> {
    if n == 0 {
        return Some(0);
    }
    let blocks = n / BLOCK;
    match blocks.checked_mul(33) {
        Some(bytes) => bytes.checked_add(4 * blocks.div_ceil(SECOND) + 4),
        None => None,
    }
}

/// A matrix taken apart.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// Two codes a byte.
    pub codes: &'a [u8],
    /// The codes of the blocks' scales.
    pub scales: &'a [u8],
    second: &'a [[u8; 4]],
    /// The mean of the scales.
    pub mean: f32,
}

impl<'a> Parts<'a> {
    /// The parts of a matrix of `n` weights; `None` if `bytes` have another length than it takes.
    pub fn new(bytes: &'a [u8], n: usize) -> Option<Parts<'a>> {
        if n == 0 || !n.is_multiple_of(BLOCK) || bytes_for(n) != Some(bytes.len()) {
            return None;
        }
        let (codes, rest) = bytes.split_at(n / 2);
        let (scales, rest) = rest.split_at(n / BLOCK);
        let (mean, second) = rest.as_chunks::<4>().0.split_last()?;
        Some(Parts { codes, scales, second, mean: f32::from_le_bytes(*mean) })
    }

    /// The second level's scales.
    pub fn second(&self) -> impl ExactSizeIterator<Item = f32> + 'a {
        self.second.iter().map(|b| f32::from_le_bytes(*b))
    }
}

/// A block's scale from its code, the second level's scale and the mean.
pub fn scale(code: u8, second: f32, mean: f32) -> f32 {
    signed()[usize::from(code)] * second + mean
}

/// Decodes a whole matrix; lengths are the caller's care.
pub(super) fn decode(bytes: &[u8], out: &mut [f32]) {
    let Some(parts) = Parts::new(bytes, out.len()) else { return };
    let second: Vec<f32> = parts.second().collect();
    let blocks = out.as_chunks_mut::<BLOCK>().0.iter_mut().zip(parts.codes.as_chunks::<32>().0);
    for (b, ((out, codes), &code)) in blocks.zip(parts.scales).enumerate() {
        let scale = scale(code, second[b / SECOND], parts.mean);
        for (pair, &two) in out.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
            *pair = [two >> 4, two & 15].map(|c| LEVELS[usize::from(c)] * scale);
        }
    }
}

/// A block whose numbers are all smaller becomes zeros.
const SMALLEST: f32 = 1e-38;

/// Encodes a whole matrix; lengths are the caller's care.
pub(super) fn encode(x: &[f32], out: &mut [u8]) {
    if x.is_empty() {
        return;
    }
    let blocks = x.len() / BLOCK;
    let (codes, rest) = out.split_at_mut(x.len() / 2);
    let (scales, rest) = rest.split_at_mut(blocks);
    let largest = |x: &[f32]| x.iter().fold(0f32, |m, v| m.max(v.abs()));
    let bounds: [f32; 15] = std::array::from_fn(|i| (LEVELS[i] + LEVELS[i + 1]) / 2.0);
    let magnitudes: Vec<f32> = x.as_chunks::<BLOCK>().0.iter().map(|b| largest(b)).collect();
    for ((x, codes), &m) in
        x.as_chunks::<BLOCK>().0.iter().zip(codes.as_chunks_mut::<32>().0).zip(&magnitudes)
    {
        let inverse = 1.0 / m.max(SMALLEST);
        let code = |v: f32| bounds.iter().map(|&b| u8::from((v * inverse).clamp(-1.0, 1.0) > b)).sum::<u8>();
        for (two, pair) in codes.iter_mut().zip(x.as_chunks::<2>().0) {
            *two = code(pair[0]) << 4 | code(pair[1]);
        }
    }
    let sum: f64 = magnitudes.iter().map(|&m| f64::from(m)).sum();
    let mean = sum as f32 / blocks as f32;
    let (second, last) = rest.split_at_mut(rest.len() - 4);
    last.copy_from_slice(&mean.to_le_bytes());
    let groups = magnitudes.chunks(SECOND).zip(scales.chunks_mut(SECOND)).zip(second.as_chunks_mut::<4>().0);
    for ((magnitudes, scales), second) in groups {
        let apart: Vec<f32> = magnitudes.iter().map(|m| m - mean).collect();
        let m = largest(&apart);
        *second = m.to_le_bytes();
        for (code, v) in scales.iter_mut().zip(apart) {
            // All the same: the code of 0.
            *code = if m == 0.0 { 127 } else { nearest(signed(), v / m) };
        }
    }
}
