//! Decoding and encoding of element types and block formats: what the bytes of a row mean as numbers.
//!
//! [`decode`] gives the numbers of any floating-point or block type, bit for bit as llama.cpp's `gguf` package does
//! (held to it by golden files, `scripts/goldens/formats_codec.py`). [`encode`] rounds to the nearest code. This is
//! the plain meaning, block by block and scalar; fast kernels are held to it elsewhere.
//!
//! Blocks of 32 weights are in [`mod@small`], blocks of 256 in [`mod@large`], this project's own of 64 in [`mod@own`],
//! QLoRA's in [`mod@nf4`], whose blocks share scales over a whole matrix, those of optimiser states in [`mod@dynamic`];
//! [`blocks()`] takes the others apart into scales and codes, for who chooses the codes himself. All multi-byte fields are little endian.

use crate::{DType, bf16, f16};
use half::slice::HalfFloatSliceExt;

pub mod blocks;
pub mod dynamic;
mod fit;
pub mod large;
pub mod nf4;
pub mod own;
pub mod small;

/// The 16 values that 4-bit codes of `IQ4_NL` and `IQ4_XS` stand for, times the scale.
pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Why a row could not be decoded or encoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the fields are what the messages say
pub enum CodecError {
    /// The number of elements is no whole number of blocks.
    #[error(
        "codec: {elements} elements are no whole number of {dtype} blocks of {block_len}; pad the row or choose a type with smaller blocks"
    )]
    Blocks { dtype: DType, elements: usize, block_len: usize },
    /// Bytes and elements do not belong together.
    #[error(
        "codec: {elements} elements of {dtype} take {expected} bytes, but {bytes} were given; pass exactly the bytes of these elements"
    )]
    Length { dtype: DType, elements: usize, bytes: usize, expected: usize },
    /// The type holds integers, not weights.
    #[error(
        "codec: {dtype} is an integer type, no type for weights; copy its bytes as they are or choose a float type"
    )]
    NotFloat { dtype: DType },
}

/// Whether [`decode`] reads `dtype`: all but the integer types.
pub const fn can_decode(dtype: DType) -> bool {
    dtype.is_float() || dtype.is_block()
}

/// Whether [`encode`] writes `dtype`: all but the integer types.
pub const fn can_encode(dtype: DType) -> bool {
    dtype.is_float() || dtype.is_block()
}

/// That `elements` of `dtype` take `bytes` bytes.
fn check_length(dtype: DType, elements: usize, bytes: usize) -> Result<(), CodecError> {
    match dtype.bytes_for(elements) {
        Some(expected) if expected == bytes => Ok(()),
        Some(expected) => Err(CodecError::Length { dtype, elements, bytes, expected }),
        None => Err(CodecError::Blocks { dtype, elements, block_len: dtype.block_len() }),
    }
}

/// Writes the numbers that `bytes` stand for into `out`.
///
/// `bytes` holds `out.len()` elements of `dtype`, any floating-point or block type; they need no alignment. A value
/// that f32 cannot hold (from F64) becomes the nearest f32 or an infinity.
///
/// # Errors
/// If `dtype` is an integer type, or the lengths do not match exactly.
///
/// ```
/// use sparsam_dtype::{DType, codec::decode};
/// let mut block = [0u8; 18]; // Q4_0: an f16 scale, 32 codes of 4 bits
/// block[..2].copy_from_slice(&[0x00, 0x38]); // 0.5
/// block[2] = 0xF9; // codes 9 (element 0) and 15 (element 16)
/// let mut out = [0.0; 32];
/// decode(DType::Q4_0, &block, &mut out).unwrap();
/// assert_eq!((out[0], out[16], out[1]), (0.5, 3.5, -4.0)); // d * (code - 8)
/// ```
pub fn decode(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<(), CodecError> {
    check_length(dtype, out.len(), bytes.len())?;
    use DType::*;
    match dtype {
        F32 => each(bytes, out, f32::from_le_bytes),
        F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        BF16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        F16 => decode_f16(bytes, out),
        Q4_0 => blocks(bytes, out, small::decode_q4_0),
        Q4_1 => blocks(bytes, out, small::decode_q4_1),
        Q5_0 => blocks(bytes, out, small::decode_q5_0),
        Q5_1 => blocks(bytes, out, small::decode_q5_1),
        Q8_0 => blocks(bytes, out, small::decode_q8_0),
        Q8_1 => blocks(bytes, out, small::decode_q8_1),
        IQ4_NL => blocks(bytes, out, small::decode_iq4_nl),
        Q2_K => blocks(bytes, out, large::decode_q2_k),
        Q3_K => blocks(bytes, out, large::decode_q3_k),
        Q4_K => blocks(bytes, out, large::decode_q4_k),
        Q5_K => blocks(bytes, out, large::decode_q5_k),
        Q6_K => blocks(bytes, out, large::decode_q6_k),
        Q8_K => blocks(bytes, out, large::decode_q8_k),
        IQ4_XS => blocks(bytes, out, large::decode_iq4_xs),
        S2_64 => blocks(bytes, out, own::decode_s2_64),
        S3_64 => blocks(bytes, out, own::decode_s3_64),
        S4_64 => blocks(bytes, out, own::decode_s4_64),
        NF4 => nf4::decode(bytes, out),
        DYN8S => blocks(bytes, out, |b, x| dynamic::decode(dynamic::signed(), b, x)),
        DYN8U => blocks(bytes, out, |b, x| dynamic::decode(dynamic::unsigned(), b, x)),
        I8 | I16 | I32 | I64 | U8 => return Err(CodecError::NotFloat { dtype }),
    }
    Ok(())
}

/// Writes `x`, rounded to the nearest number that `dtype` holds, into `out`.
///
/// `Q4_0` to `Q8_0` give the bytes of llama.cpp's reference: the scale comes from the block's largest magnitude (or
/// its range), then each element takes the nearest code. `IQ4_NL`, `IQ4_XS`, `Q2_K` to `Q6_K` and the formats of [`mod@own`] search scales for the
/// least squared error (`codec/fit.rs`), 60 to 200 ns an element. Infinities and NaN have no code in block
/// formats: what comes out for their block is unspecified, so check for them before. Scales and minima are f16: magnitudes
/// beyond 65,504 overflow them, those below about 1e-7 become 0.
///
/// # Errors
/// If `dtype` is an integer type, or the lengths do not match exactly.
pub fn encode(dtype: DType, x: &[f32], out: &mut [u8]) -> Result<(), CodecError> {
    check_length(dtype, x.len(), out.len())?;
    use DType::*;
    match dtype {
        F32 => each_mut(x, out, f32::to_le_bytes),
        F64 => each_mut(x, out, |v| f64::from(v).to_le_bytes()),
        F16 => each_mut(x, out, |v| f16::from_f32(v).to_le_bytes()),
        BF16 => each_mut(x, out, |v| bf16::from_f32(v).to_le_bytes()),
        Q4_0 => blocks_mut(x, out, small::encode_q4_0),
        Q4_1 => blocks_mut(x, out, small::encode_q4_1),
        Q5_0 => blocks_mut(x, out, small::encode_q5_0),
        Q5_1 => blocks_mut(x, out, small::encode_q5_1),
        Q8_0 => blocks_mut(x, out, small::encode_q8_0),
        Q8_1 => blocks_mut(x, out, small::encode_q8_1),
        IQ4_NL => blocks_mut(x, out, small::encode_iq4_nl),
        Q2_K => blocks_mut(x, out, large::encode_q2_k),
        Q3_K => blocks_mut(x, out, large::encode_q3_k),
        Q4_K => blocks_mut(x, out, large::encode_q4_k),
        Q5_K => blocks_mut(x, out, large::encode_q5_k),
        Q6_K => blocks_mut(x, out, large::encode_q6_k),
        Q8_K => blocks_mut(x, out, large::encode_q8_k),
        IQ4_XS => blocks_mut(x, out, large::encode_iq4_xs),
        S2_64 => blocks_mut(x, out, own::encode_s2_64),
        S3_64 => blocks_mut(x, out, own::encode_s3_64),
        S4_64 => blocks_mut(x, out, own::encode_s4_64),
        NF4 => nf4::encode(x, out),
        DYN8S => blocks_mut(x, out, |x, b| dynamic::encode(dynamic::signed(), x, b)),
        DYN8U => blocks_mut(x, out, |x, b| dynamic::encode(dynamic::unsigned(), x, b)),
        I8 | I16 | I32 | I64 | U8 => return Err(CodecError::NotFloat { dtype }),
    }
    Ok(())
}

fn each<const B: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn([u8; B]) -> f32) {
    for (b, o) in bytes.as_chunks::<B>().0.iter().zip(out) {
        *o = f(*b);
    }
}

fn each_mut<const B: usize>(x: &[f32], out: &mut [u8], f: impl Fn(f32) -> [u8; B]) {
    for (o, &v) in out.as_chunks_mut::<B>().0.iter_mut().zip(x) {
        *o = f(v);
    }
}

fn blocks<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    f: impl Fn(&[u8; B], &mut [f32; N]),
) {
    for (b, o) in bytes.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        f(b, o);
    }
}

fn blocks_mut<const B: usize, const N: usize>(
    x: &[f32],
    out: &mut [u8],
    f: impl Fn(&[f32; N], &mut [u8; B]),
) {
    for (v, o) in x.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<B>().0) {
        f(v, o);
    }
}

/// F16 in pieces of 256: `half` converts aligned slices with the machine's instructions, single values with a check
/// of the machine each time.
fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    let mut piece = [f16::ZERO; 256];
    for (b, o) in bytes.chunks(512).zip(out.chunks_mut(256)) {
        let piece = &mut piece[..o.len()];
        bytemuck::cast_slice_mut(piece).copy_from_slice(b);
        if cfg!(target_endian = "big") {
            piece.iter_mut().for_each(|v| *v = f16::from_bits(v.to_bits().swap_bytes()));
        }
        piece.convert_to_f32_slice(o);
    }
}

/// The f16 at `at` of a block.
fn f16_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Writes `v` as f16 at `at` of a block.
fn put_f16(block: &mut [u8], at: usize, v: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(v).to_le_bytes());
}
