//! The differences of layout between llama.cpp's files and Hugging Face's.
//!
//! Inside there is one layout, Hugging Face's. These changes are made at the edge, on bytes: rows move whole, so that
//! rounded blocks are never decoded.

use std::borrow::Cow;

use sparsam_dtype::{DType, codec};

use crate::Error;

/// A change of layout of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transform {
    /// As it is.
    None,
    /// GGUF's llama q and k rows to Hugging Face's.
    ///
    /// RoPE turns pairs of channels. llama.cpp's llama keeps a pair in neighbouring rows (2i, 2i + 1), Hugging Face in
    /// the two halves of a head (i, i + head_dim / 2). `n_heads` is the number of heads that the rows make: the k/v
    /// heads for k.
    UnpermuteRope {
        /// Heads along the first axis.
        n_heads: usize,
    },
    /// The reverse of `UnpermuteRope`.
    PermuteRope {
        /// Heads along the first axis.
        n_heads: usize,
    },
    /// GGUF's Gemma norms (1 + w) to Hugging Face's (w). The result is F32.
    SubtractOne,
    /// The reverse of `SubtractOne`.
    AddOne,
    /// Rows to columns: GPT-2's Conv1D weights, (in, out) in Hugging Face's files. Plain numbers only.
    Transpose,
}

/// A tensor after a [`Transform`].
#[derive(Clone, Debug, PartialEq)]
pub struct Transformed<'a> {
    /// The elements, borrowed if nothing changed.
    pub bytes: Cow<'a, [u8]>,
    /// Type of the elements.
    pub dtype: DType,
    /// Row-major.
    pub shape: Vec<usize>,
}

impl Transform {
    /// What takes a change back.
    ///
    /// ```
    /// use sparsam_formats::Transform;
    /// assert_eq!(Transform::AddOne.inverse(), Transform::SubtractOne);
    /// ```
    pub fn inverse(self) -> Transform {
        match self {
            Transform::None => Transform::None,
            Transform::UnpermuteRope { n_heads } => Transform::PermuteRope { n_heads },
            Transform::PermuteRope { n_heads } => Transform::UnpermuteRope { n_heads },
            Transform::SubtractOne => Transform::AddOne,
            Transform::AddOne => Transform::SubtractOne,
            Transform::Transpose => Transform::Transpose,
        }
    }

    /// The shape that a tensor of `shape` has afterwards.
    pub fn shape(self, shape: &[usize]) -> Vec<usize> {
        let mut shape = shape.to_vec();
        if self == Transform::Transpose {
            shape.reverse();
        }
        shape
    }

    /// Changes a tensor of `dtype` and `shape` (row-major) with exactly these `bytes`.
    ///
    /// Costs one copy, none for `None`.
    ///
    /// # Errors
    /// If `bytes` do not fit `shape`, rows do not divide into heads of an even number of rows, or the type does not
    /// allow the change (transposing rounded blocks, adding to them or to integers).
    ///
    /// ```
    /// use sparsam_dtype::DType;
    /// use sparsam_formats::Transform;
    /// let t = Transform::UnpermuteRope { n_heads: 1 }; // one head of 6 rows, a byte each
    /// let hf = t.apply(&[0, 1, 2, 3, 4, 5], DType::U8, &[6, 1]).unwrap();
    /// assert_eq!(hf.bytes[..], [0, 2, 4, 1, 3, 5]);
    /// ```
    pub fn apply<'a>(self, bytes: &'a [u8], dtype: DType, shape: &[usize]) -> Result<Transformed<'a>, Error> {
        let fail = |problem: String| {
            Err(Error::Transform { action: self.action(), shape: shape.to_vec(), dtype, problem })
        };
        match crate::tensors::checked_bytes(shape, dtype) {
            Ok(expected) if expected == bytes.len() => {}
            Ok(expected) => return fail(format!("it has {} bytes instead of {expected}", bytes.len())),
            Err(problem) => return fail(problem),
        }
        let same = |bytes| Ok(Transformed { bytes, dtype, shape: shape.to_vec() });
        match self {
            Transform::None => same(Cow::Borrowed(bytes)),
            Transform::UnpermuteRope { n_heads } | Transform::PermuteRope { n_heads } => {
                let rows = shape.first().copied().unwrap_or(0);
                if n_heads == 0 || !rows.is_multiple_of(2 * n_heads) {
                    return fail(format!(
                        "{rows} rows are not {n_heads} heads of an even number of rows; the number of heads in the model's configuration is wrong"
                    ));
                }
                if shape.len() == 1 && dtype.is_block() {
                    return fail("the elements of a vector cannot move while they are rounded in blocks; use F32 for it".into());
                }
                same(Cow::Owned(permute_rows(
                    bytes,
                    rows,
                    n_heads,
                    matches!(self, Transform::UnpermuteRope { .. }),
                )))
            }
            Transform::SubtractOne | Transform::AddOne => {
                if !dtype.is_float() {
                    return fail(
                        "only plain floating-point numbers can be shifted; use F32 for norms".into(),
                    );
                }
                let one = if self == Transform::AddOne { 1.0 } else { -1.0 };
                let mut x = vec![0.0; bytes.len() / dtype.block_bytes()];
                codec::decode(dtype, bytes, &mut x).expect("length and type were checked above");
                let shifted = x.iter().flat_map(|v| (v + one).to_le_bytes()).collect();
                Ok(Transformed { bytes: Cow::Owned(shifted), dtype: DType::F32, shape: shape.to_vec() })
            }
            Transform::Transpose => {
                let &[rows, cols] = shape else {
                    return fail(format!(
                        "only a matrix has rows and columns, this has {} axes",
                        shape.len()
                    ));
                };
                if dtype.is_block() {
                    return fail(
                        "blocks of rounded weights lie along rows; convert to F32, F16 or BF16 first".into(),
                    );
                }
                let bytes = Cow::Owned(transpose(bytes, rows, cols, dtype.block_bytes()));
                Ok(Transformed { bytes, dtype, shape: self.shape(shape) })
            }
        }
    }

    /// As messages name it.
    fn action(self) -> &'static str {
        match self {
            Transform::None => "take",
            Transform::UnpermuteRope { .. } | Transform::PermuteRope { .. } => "reorder the rows of",
            Transform::SubtractOne => "subtract one from",
            Transform::AddOne => "add one to",
            Transform::Transpose => "transpose",
        }
    }
}

/// Rows moved from neighbouring pairs to halves (`unpermute`) or back, within each head.
fn permute_rows(bytes: &[u8], rows: usize, n_heads: usize, unpermute: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    if rows == 0 {
        return out;
    }
    let row = bytes.len() / rows;
    let head_dim = rows / n_heads;
    for head in 0..n_heads {
        for r in 0..head_dim {
            let from = if unpermute {
                r % (head_dim / 2) * 2 + r / (head_dim / 2) // half r / (hd / 2), channel r % (hd / 2)
            } else {
                r % 2 * (head_dim / 2) + r / 2
            };
            let at = (head * head_dim + from) * row;
            out.extend_from_slice(&bytes[at..at + row]);
        }
    }
    out
}

/// Elements of `size` bytes from (rows, cols) to (cols, rows), by tiles.
fn transpose(bytes: &[u8], rows: usize, cols: usize, size: usize) -> Vec<u8> {
    /// 32 x 32 elements of up to 8 bytes, read and written: 16 KiB, half of a small L1.
    const TILE: usize = 32;
    let mut out = vec![0; bytes.len()];
    for r0 in (0..rows).step_by(TILE) {
        for c0 in (0..cols).step_by(TILE) {
            for r in r0..rows.min(r0 + TILE) {
                for c in c0..cols.min(c0 + TILE) {
                    let (from, to) = ((r * cols + c) * size, (c * rows + r) * size);
                    out[to..to + size].copy_from_slice(&bytes[from..from + size]);
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// llama.cpp's converter: reshape to (heads, 2, half, ..) and swap the two middle axes. Written out for two heads
    /// of four rows.
    #[test]
    fn rope_rows_as_llama_cpp_converts_them() {
        let hf: Vec<u8> = (0..8).collect();
        let t = Transform::PermuteRope { n_heads: 2 };
        let gguf = t.apply(&hf, DType::U8, &[8]).unwrap();
        assert_eq!(gguf.bytes[..], [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(t.inverse().apply(&gguf.bytes, DType::U8, &[8]).unwrap().bytes[..], hf);
    }

    /// Moving rows of blocks and decoding is decoding and moving rows.
    #[test]
    fn blocks_move_whole() {
        let (rows, cols) = (8, 64);
        let x: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.37).sin()).collect();
        for dtype in [DType::Q4_1, DType::Q8_0, DType::F16] {
            let mut blocks = vec![0; dtype.bytes_for(x.len()).unwrap()];
            codec::encode(dtype, &x, &mut blocks).unwrap();
            let t = Transform::UnpermuteRope { n_heads: 2 };
            let mut moved = vec![0.0; x.len()];
            let bytes = t.apply(&blocks, dtype, &[rows, cols]).unwrap().bytes;
            codec::decode(dtype, &bytes, &mut moved).unwrap();
            let mut plain = vec![0.0; x.len()];
            codec::decode(dtype, &blocks, &mut plain).unwrap();
            let plain =
                t.apply(bytemuck_bytes(&plain), DType::F32, &[rows, cols]).unwrap().bytes.into_owned();
            assert_eq!(bytemuck_bytes(&moved), plain, "{dtype}");
        }
    }

    fn bytemuck_bytes(x: &[f32]) -> &[u8] {
        bytemuck::cast_slice(x)
    }

    #[test]
    fn ones_become_f32() {
        let bytes: Vec<u8> =
            [1.5f32, 0.0].iter().flat_map(|&v| sparsam_dtype::bf16::from_f32(v).to_le_bytes()).collect();
        let t = Transform::SubtractOne.apply(&bytes, DType::BF16, &[2]).unwrap();
        assert_eq!((t.dtype, &t.bytes[..]), (DType::F32, bytemuck_bytes(&[0.5, -1.0])));
    }

    #[test]
    fn refusals_say_why() {
        let q = [0u8; 18 * 4];
        for (t, dtype, shape, bytes, said) in [
            (
                Transform::Transpose,
                DType::Q4_0,
                &[4, 32][..],
                &q[..],
                "blocks of rounded weights lie along rows",
            ),
            (Transform::Transpose, DType::F32, &[2, 3, 3], &q, "this has 3 axes"),
            (Transform::AddOne, DType::Q4_0, &[4, 32], &q, "use F32 for norms"),
            (Transform::UnpermuteRope { n_heads: 3 }, DType::Q4_0, &[4, 32], &q, "4 rows are not 3 heads"),
            (Transform::UnpermuteRope { n_heads: 0 }, DType::Q4_0, &[4, 32], &q, "4 rows are not 0 heads"),
            (
                Transform::UnpermuteRope { n_heads: 2 },
                DType::Q4_0,
                &[128],
                &q,
                "elements of a vector cannot move",
            ),
            (Transform::None, DType::F16, &[37], &q, "72 bytes instead of 74"),
        ] {
            let e = t.apply(bytes, dtype, shape).unwrap_err().to_string();
            assert!(e.contains(said) && e.contains(dtype.name()), "{e:?} lacks {said:?}");
        }
    }

    proptest! {
        #[test]
        fn inverse_takes_back(heads in 1usize..4, half in 1usize..5, cols in 1usize..40, seed in any::<u64>()) {
            let rows = heads * half * 2;
            let bytes: Vec<u8> = (0..rows * cols * 2).map(|i| (seed >> (i % 57)) as u8 ^ i as u8).collect();
            for t in [Transform::UnpermuteRope { n_heads: heads }, Transform::Transpose, Transform::None] {
                let there = t.apply(&bytes, DType::I16, &[rows, cols]).unwrap();
                let back = t.inverse().apply(&there.bytes, there.dtype, &there.shape).unwrap();
                prop_assert_eq!(&back.bytes[..], &bytes[..]);
                prop_assert_eq!(&back.shape[..], &[rows, cols]);
            }
        }
    }
}
