//! What a tensor's bytes mean: element types, block formats of rounded weights, strided layouts.
//!
//! This crate is the leaf on which all others stand. It knows bytes and numbers; it does not know files,
//! graphs, threads or devices. Start at [`DType`]; block formats are in [`codec`], strided views in [`Layout`].
#![forbid(unsafe_code)]

pub mod codec;
mod layout;

pub use half::{bf16, f16};
pub use layout::Layout;

/// The type of a tensor's elements: plain numbers, or a block format of rounded weights (GGUF's names).
///
/// A block format packs `block_len` consecutive elements of a row into `block_bytes` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, missing_docs)] // plain numbers are named as everywhere
pub enum DType {
    F32,
    F16,
    BF16,
    F64,
    I8,
    I16,
    I32,
    I64,
    U8,
    /// 32 weights: f16 scale, 4-bit codes; `d * (code - 8)`.
    Q4_0,
    /// 32 weights: f16 scale and minimum, 4-bit codes; `d * code + m`.
    Q4_1,
    /// 32 weights: f16 scale, 5-bit codes; `d * (code - 16)`.
    Q5_0,
    /// 32 weights: f16 scale and minimum, 5-bit codes.
    Q5_1,
    /// 32 weights: f16 scale, 8-bit signed codes.
    Q8_0,
    /// 32 weights: f16 scale and scaled sum, 8-bit signed codes (llama.cpp's activations).
    Q8_1,
    /// 256 weights, 2 bits, 16 groups with 4-bit scales and minima.
    Q2_K,
    /// 256 weights, 3 bits, 16 groups with 6-bit scales.
    Q3_K,
    /// 256 weights, 4 bits, 8 groups with 6-bit scales and minima.
    Q4_K,
    /// 256 weights, 5 bits, 8 groups with 6-bit scales and minima.
    Q5_K,
    /// 256 weights, 6 bits, 16 groups with 8-bit scales.
    Q6_K,
    /// 256 weights, 8 bits, f32 scale and group sums (llama.cpp's activations).
    Q8_K,
    /// 32 weights: f16 scale, 4-bit indices into a table of 16 fixed values.
    IQ4_NL,
    /// 256 weights: as `IQ4_NL`, with 6-bit scales for 8 groups.
    IQ4_XS,
    /// 64 weights: f16 scale and minimum, 2-bit codes; `d * code + m`. This project's own, as are the next two: for rows
    /// that are no multiple of 256, where GGUF has nothing below 4.5 bits.
    S2_64,
    /// 64 weights: f16 scale, 3-bit codes; `d * (code - 4)`.
    S3_64,
    /// 64 weights: f16 scale, 4-bit codes; `d * (code - 8)`.
    S4_64,
    /// 64 weights: 4-bit indices into the levels of QLoRA's NF4, an 8-bit scale; the scales of a whole matrix are rounded
    /// together ([`mod@codec::nf4`]). In memory only: no file holds it.
    NF4,
    /// 256 numbers of either sign: f32 scale, 8-bit indices into a table that is dense near 0 ([`mod@codec::dynamic`]). An
    /// optimiser's states, as are those of the next type: no model file holds them.
    DYN8S,
    /// 256 numbers of at least 0: as `DYN8S`, with a table of twice as many of these.
    DYN8U,
}

impl DType {
    /// Every type, in the order of declaration.
    pub const ALL: [DType; 29] = {
        use DType::*;
        [
            F32, F16, BF16, F64, I8, I16, I32, I64, U8, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1, Q2_K, Q3_K, Q4_K,
            Q5_K, Q6_K, Q8_K, IQ4_NL, IQ4_XS, S2_64, S3_64, S4_64, NF4, DYN8S, DYN8U,
        ]
    };

    /// Elements in one block; 1 for plain numbers.
    pub const fn block_len(self) -> usize {
        use DType::*;
        match self {
            F32 | F16 | BF16 | F64 | I8 | I16 | I32 | I64 | U8 => 1,
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q8_1 | IQ4_NL => 32,
            S2_64 | S3_64 | S4_64 | NF4 => 64,
            Q2_K | Q3_K | Q4_K | Q5_K | Q6_K | Q8_K | IQ4_XS | DYN8S | DYN8U => 256,
        }
    }

    /// Bytes of one block (of one element for plain numbers); of [`DType::NF4`] without what its blocks share.
    pub const fn block_bytes(self) -> usize {
        use DType::*;
        match self {
            I8 | U8 => 1,
            F16 | BF16 | I16 => 2,
            F32 | I32 => 4,
            F64 | I64 => 8,
            Q4_0 | IQ4_NL => 18,
            Q4_1 => 20,
            Q5_0 => 22,
            Q5_1 => 24,
            Q8_0 => 34,
            Q8_1 => 36,
            Q2_K => 84,
            Q3_K => 110,
            Q4_K => 144,
            Q5_K => 176,
            Q6_K => 210,
            Q8_K => 292,
            IQ4_XS => 136,
            S2_64 => 20,
            S3_64 => 26,
            S4_64 => 34,
            NF4 => 33,
            DYN8S | DYN8U => 260,
        }
    }

    /// Bytes of `n` consecutive elements, or `None` if `n` is no whole number of blocks or the count overflows. Of
    /// [`DType::NF4`], of a whole matrix of `n`.
    pub const fn bytes_for(self, n: usize) -> Option<usize> {
        if !n.is_multiple_of(self.block_len()) {
            return None;
        }
        if matches!(self, DType::NF4) {
            return codec::nf4::bytes_for(n);
        }
        (n / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Whether this is a block format of rounded weights.
    pub const fn is_block(self) -> bool {
        self.block_len() > 1
    }

    /// Whether only this project reads it: files with such tensors are no use to llama.cpp.
    pub const fn is_own(self) -> bool {
        matches!(self, DType::S2_64 | DType::S3_64 | DType::S4_64)
    }

    /// Whether it is for an optimiser's states alone, not for weights.
    pub const fn is_state(self) -> bool {
        matches!(self, DType::DYN8S | DType::DYN8U)
    }

    /// Whether this is a plain floating-point number.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16 | DType::F64)
    }

    /// Stored bits per element, scales included: 4.5 for `Q4_0`.
    pub const fn bits(self) -> f64 {
        if matches!(self, DType::NF4) {
            return 4.0 + 8.0 / 64.0 + 32.0 / (64.0 * 256.0);
        }
        (self.block_bytes() * 8) as f64 / self.block_len() as f64
    }

    /// The name as GGUF tools write it: `F32`, `Q4_K`.
    pub const fn name(self) -> &'static str {
        use DType::*;
        match self {
            F32 => "F32",
            F16 => "F16",
            BF16 => "BF16",
            F64 => "F64",
            I8 => "I8",
            I16 => "I16",
            I32 => "I32",
            I64 => "I64",
            U8 => "U8",
            Q4_0 => "Q4_0",
            Q4_1 => "Q4_1",
            Q5_0 => "Q5_0",
            Q5_1 => "Q5_1",
            Q8_0 => "Q8_0",
            Q8_1 => "Q8_1",
            Q2_K => "Q2_K",
            Q3_K => "Q3_K",
            Q4_K => "Q4_K",
            Q5_K => "Q5_K",
            Q6_K => "Q6_K",
            Q8_K => "Q8_K",
            IQ4_NL => "IQ4_NL",
            IQ4_XS => "IQ4_XS",
            S2_64 => "S2_64",
            S3_64 => "S3_64",
            S4_64 => "S4_64",
            NF4 => "NF4",
            DYN8S => "DYN8S",
            DYN8U => "DYN8U",
        }
    }

    /// The type with this name, in any case; `None` if there is none.
    pub fn from_name(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|d| d.name().eq_ignore_ascii_case(name))
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
