//! The free numbers of a block: its f16 scale `d` and, where there is one, its f16 minimum.
//!
//! With codes (and the small scales of groups) as they are, an element is linear in them: `d * v + m * u`. Who tunes scales
//! behind the codes needs `v` and `u`, and a way to put other numbers in.

use sparsam_dtype::codec::{CodecError, decode};
use sparsam_dtype::{DType, f16};

fn f16_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn put_f16(block: &mut [u8], at: usize, v: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(v).to_le_bytes());
}

/// Where a block keeps them, in bytes; the minimum's place is `None` where the format has none.
const fn places(dtype: DType) -> Option<(usize, Option<usize>)> {
    use DType::*;
    match dtype {
        Q4_0 | Q5_0 | Q8_0 | IQ4_NL | IQ4_XS | S3_64 | S4_64 => Some((0, None)),
        Q4_1 | Q5_1 | Q4_K | Q5_K | S2_64 => Some((0, Some(2))),
        Q2_K => Some((80, Some(82))),
        Q3_K => Some((108, None)),
        Q6_K => Some((208, None)),
        F32 | F16 | BF16 | F64 | I8 | I16 | I32 | I64 | U8 | Q8_1 | Q8_K | NF4 | DYN8S | DYN8U => None,
    }
}

/// Blocks taken apart: element `e` of block `b` is `d[b] * v[e] + m[b] * u[e]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Free {
    /// The blocks' scales.
    pub d: Vec<f32>,
    /// What they multiply, element by element.
    pub v: Vec<f32>,
    /// The blocks' minima as they are stored, and what they multiply; `None` where the format has none.
    pub min: Option<(Vec<f32>, Vec<f32>)>,
}

/// Takes the blocks of `dtype` in `bytes` apart; `None` if it is no block format of weights.
///
/// # Errors
/// If `bytes` are no whole blocks.
///
/// ```
/// use sparsam_dtype::{DType, codec::encode};
/// use sparsam_quantize::free;
/// let x: Vec<f32> = (0..32).map(|i| i as f32).collect();
/// let mut block = [0; 20];
/// encode(DType::Q4_1, &x, &mut block).unwrap();
/// let parts = free::take(DType::Q4_1, &block).unwrap().unwrap();
/// let (m, u) = parts.min.unwrap();
/// assert!((parts.d[0] * parts.v[31] + m[0] * u[31] - 31.0).abs() < 0.05);
/// ```
pub fn take(dtype: DType, bytes: &[u8]) -> Result<Option<Free>, CodecError> {
    let Some((d_at, m_at)) = places(dtype) else { return Ok(None) };
    let size = dtype.block_bytes();
    let read = |at: usize| bytes.chunks_exact(size).map(|b| f16_at(b, at)).collect::<Vec<_>>();
    let mut copy = bytes.to_vec();
    let n = bytes.len() / size * dtype.block_len();
    let mut with = |d: f32, m: f32| -> Result<Vec<f32>, CodecError> {
        for block in copy.chunks_exact_mut(size) {
            put_f16(block, d_at, d);
            m_at.iter().for_each(|&at| put_f16(block, at, m));
        }
        let mut out = vec![0.0; n];
        decode(dtype, &copy, &mut out)?;
        Ok(out)
    };
    let v = with(1.0, 0.0)?;
    let min = m_at.map(|at| Ok((read(at), with(0.0, 1.0)?))).transpose()?;
    Ok(Some(Free { d: read(d_at), v, min }))
}

/// Puts other scales and minima (one a block; none where the format has none) into blocks, rounded to f16.
///
/// # Panics
/// If `dtype` is no block format of weights, or there are fewer numbers than blocks.
pub fn put(dtype: DType, bytes: &mut [u8], d: &[f32], m: Option<&[f32]>) {
    let (d_at, m_at) = places(dtype).expect("a block format of weights");
    for (i, block) in bytes.chunks_exact_mut(dtype.block_bytes()).enumerate() {
        put_f16(block, d_at, d[i]);
        if let (Some(at), Some(m)) = (m_at, m) {
            put_f16(block, at, m[i]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsam_dtype::codec::{blocks, encode};

    /// Every format of weights comes apart into what it decodes to, and goes together again.
    #[test]
    fn blocks_are_linear_in_their_free_numbers() {
        for dtype in DType::ALL {
            let n = 2 * dtype.block_len();
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin() + 0.2).collect();
            let mut bytes = vec![0; 2 * dtype.block_bytes()];
            let parts = match blocks::format(dtype) {
                None => {
                    assert_eq!(take(dtype, &bytes).unwrap(), None, "{dtype}");
                    continue;
                }
                Some(_) => {
                    encode(dtype, &x, &mut bytes).unwrap();
                    take(dtype, &bytes).unwrap().unwrap()
                }
            };
            let mut y = vec![0.0; n];
            decode(dtype, &bytes, &mut y).unwrap();
            for (e, y) in y.iter().enumerate() {
                let b = e / dtype.block_len();
                let min = parts.min.as_ref().map_or(0.0, |(m, u)| m[b] * u[e]);
                let got = parts.d[b] * parts.v[e] + min;
                assert!((got - y).abs() <= 1e-6 * y.abs().max(1.0), "{dtype}: {got} instead of {y}");
            }
            let mut back = bytes.clone();
            put(dtype, &mut back, &[9.0; 2], parts.min.as_ref().map(|_| &[9.0; 2][..]));
            assert_ne!(back, bytes, "{dtype}");
            put(dtype, &mut back, &parts.d, parts.min.as_ref().map(|(m, _)| &m[..]));
            assert_eq!(back, bytes, "{dtype}");
        }
    }
}
