//! How packed weights lie in memory, and how panels of them become f32.
//!
//! Rows are taken 16 at a time: a *panel*. Within a panel the blocks follow each other along the row; within a
//! block each field (scale, minimum, codes ..) of all 16 rows lies together, in units of a few bytes from one row
//! after the other. So a vector register filled with consecutive bytes holds the same four codes of 16 rows
//! (AVX-512) or 8 rows (AVX2), and a row's partial sums stay in one lane. The bytes are the file's own, in another
//! order ([`fields`]), so nothing is lost or added (but for rows of zeros that fill the last panel). Where a format keeps bits of its
//! codes as a string ([`loose_bits`]), they are put beside the codes that they belong to.

use crate::Cpu;
use crate::matmul::scratch::Scratch;
use crate::matmul::tile::PANEL;
use sparsam_dtype::{DType, codec};

/// A field of one block, or a part of one: its offset in a row's block, bytes, and bytes of a unit.
type Field = (usize, usize, usize);

/// Fields of one block in the order in which panels hold them: for blocks of 256 columns that in which products read them,
/// since only bytes that are read one after the other come as fast as memory delivers.
pub(super) const fn fields(dtype: DType) -> &'static [Field] {
    use DType::*;
    match dtype {
        F32 => &[(0, 4, 4)],
        F16 => &[(0, 2, 2)],
        // Two neighbours of a row together: the pairs of bf16 that the tiles for pairs read.
        BF16 => &[(0, 4, 4)],
        F64 => &[(0, 8, 8)],
        Q4_0 | IQ4_NL => &[(0, 2, 2), (2, 16, 4)],
        Q4_1 => &[(0, 2, 2), (2, 2, 2), (4, 16, 4)],
        Q5_0 => &[(0, 2, 2), (2, 4, 4), (6, 16, 4)],
        Q5_1 => &[(0, 2, 2), (2, 2, 2), (4, 4, 4), (8, 16, 4)],
        Q8_0 => &[(0, 2, 2), (2, 32, 4)],
        Q8_1 => &[(0, 2, 2), (2, 2, 2), (4, 32, 4)],
        // Scale and minimum of scales and minima, these, codes.
        Q2_K => &[(80, 2, 2), (82, 2, 2), (0, 16, 1), (16, 64, 4)],
        Q3_K => &Q3_K_FIELDS,
        Q4_K => &[(0, 2, 2), (2, 2, 2), (4, 12, 4), (16, 128, 4)],
        Q5_K => &Q5_K_FIELDS,
        Q6_K => &Q6_K_FIELDS,
        Q8_K => &[(0, 4, 4), (4, 256, 4), (260, 32, 2)],
        IQ4_XS => &[(0, 2, 2), (2, 2, 2), (4, 4, 4), (8, 128, 4)],
        S2_64 => &[(0, 2, 2), (2, 2, 2), (4, 16, 4)],
        S3_64 => &[(0, 2, 2), (2, 24, 4)],
        S4_64 => &[(0, 2, 2), (2, 32, 4)],
        // What blocks share lies apart: `super::nf4`.
        NF4 => &[(0, 1, 1), (1, 32, 4)],
        I8 | I16 | I32 | I64 | U8 | DYN8S | DYN8U => &[],
    }
}

/// The scale of scales, scales; for each quad of 32 columns third bits of all eight times 32, two bits of four, of four.
const Q3_K_FIELDS: [Field; 26] = {
    let mut all = [(108, 2, 2); 26];
    all[1] = (96, 12, 4);
    let mut k = 0;
    while k < 8 {
        all[2 + 3 * k] = (4 * k, 4, 4);
        all[3 + 3 * k] = (32 + 4 * k, 4, 4);
        all[4 + 3 * k] = (64 + 4 * k, 4, 4);
        k += 1;
    }
    all
};

/// Scale and minimum of scales and minima, these; for each quad of 32 columns fifth bits of all eight times 32, then four
/// times four bits of two.
const Q5_K_FIELDS: [Field; 43] = {
    let mut all = [(0, 2, 2); 43];
    (all[1], all[2]) = ((2, 2, 2), (4, 12, 4));
    let mut k = 0;
    while k < 8 {
        all[3 + 5 * k] = (16 + 4 * k, 4, 4);
        let mut pair = 0;
        while pair < 4 {
            all[4 + 5 * k + pair] = (48 + 32 * pair + 4 * k, 4, 4);
            pair += 1;
        }
        k += 1;
    }
    all
};

/// The scale of scales; for each 128 columns their eight scales, and for each quad of 32 columns the four low bits of two
/// times 32, of two, and the two high bits of all four.
const Q6_K_FIELDS: [Field; 51] = {
    let mut all = [(208, 2, 2); 51];
    let mut n = 0;
    while n < 2 {
        all[1 + 25 * n] = (192 + 8 * n, 8, 1);
        let mut k = 0;
        while k < 8 {
            let at = 2 + 25 * n + 3 * k;
            all[at] = (64 * n + 4 * k, 4, 4);
            all[at + 1] = (64 * n + 32 + 4 * k, 4, 4);
            all[at + 2] = (128 + 32 * n + 4 * k, 4, 4);
            k += 1;
        }
        n += 1;
    }
    all
};

/// Elements of the unit in which rows are interleaved: a block, or a pair of bf16.
pub(super) const fn group_len(dtype: DType) -> usize {
    if matches!(dtype, DType::BF16) { 2 } else { dtype.block_len() }
}

/// Bytes of one such unit of one row.
pub(super) const fn group_bytes(dtype: DType) -> usize {
    if matches!(dtype, DType::BF16) { 4 } else { dtype.block_bytes() }
}

/// Copies unit by unit: `n` groups of one row between its own order and its place in a panel.
fn walk(dtype: DType, n: usize, mut copy: impl FnMut(usize, usize, usize)) {
    let bytes = group_bytes(dtype);
    for g in 0..n {
        let mut at = g * bytes;
        for &(field, len, unit) in fields(dtype) {
            for i in 0..len / unit {
                // Offset in the row, in the panel (of row 0), bytes.
                copy(g * bytes + field + i * unit, (at + i * unit) * PANEL, unit);
            }
            at += len;
        }
    }
}

/// Puts up to 16 rows of `row_bytes` each into their places in a panel of zeros.
pub(super) fn interleave(dtype: DType, rows: &[u8], row_bytes: usize, panel: &mut [u8]) {
    let bytes = group_bytes(dtype);
    let mut own;
    let rows = match loose_bits(dtype) {
        None => rows,
        Some(bits) => {
            own = rows.to_vec();
            own.chunks_exact_mut(bytes).for_each(|block| bits.pack(block));
            &own
        }
    };
    // An odd row of bf16 ends in half a pair.
    let whole = row_bytes / bytes * bytes;
    for g in (0..whole).step_by(bytes) {
        let mut at = g;
        for &(field, len, unit) in fields(dtype) {
            let to = &mut panel[at * PANEL..][..len * PANEL];
            match unit {
                1 => units::<1>(rows, row_bytes, g + field, to),
                2 => units::<2>(rows, row_bytes, g + field, to),
                4 => units::<4>(rows, row_bytes, g + field, to),
                _ => units::<8>(rows, row_bytes, g + field, to),
            }
            at += len;
        }
    }
    for (r, row) in rows.chunks(row_bytes).enumerate() {
        let rest = &row[whole..];
        if !rest.is_empty() {
            panel[whole * PANEL + r * bytes..][..rest.len()].copy_from_slice(rest);
        }
    }
}

/// Interleaves one field, `from` bytes into each row, in units of `U` bytes.
fn units<const U: usize>(rows: &[u8], row_bytes: usize, from: usize, to: &mut [u8]) {
    for (i, to) in to.chunks_exact_mut(U * PANEL).enumerate() {
        let at = from + i * U;
        for (to, row) in to.chunks_exact_mut(U).zip(rows.chunks_exact(row_bytes)) {
            let unit: [u8; U] = row[at..at + U].try_into().expect("a unit");
            to.copy_from_slice(&unit);
        }
    }
}

/// The file's bytes of row `r`; `panel` starts at the first group wanted, `row` holds a whole number of groups.
pub(super) fn row_bytes(dtype: DType, panel: &[u8], r: usize, row: &mut [u8]) {
    walk(dtype, row.len() / group_bytes(dtype), |to, from, unit| {
        let from = from + r * unit;
        match unit {
            4 => row[to..to + 4].copy_from_slice(&panel[from..from + 4]),
            2 => row[to..to + 2].copy_from_slice(&panel[from..from + 2]),
            _ => row[to..to + unit].copy_from_slice(&panel[from..from + unit]),
        }
    });
    if let Some(bits) = loose_bits(dtype) {
        row.chunks_exact_mut(group_bytes(dtype)).for_each(|block| bits.unpack(block));
    }
}

/// Bits of codes that blocks of a file hold as a string, and that packed blocks hold in the byte lanes of their codes.
#[derive(Clone, Copy, Debug)]
enum LooseBits {
    /// Fifth bits, four bytes at this offset: bit `e` is column `e`'s; packed, bit `i` of byte `t` is column `4 i + t`'s.
    Fifths(usize),
    /// `S3_64` ([`s3_packed`]).
    Thirds,
}

/// Such bits of a format.
fn loose_bits(dtype: DType) -> Option<LooseBits> {
    match dtype {
        DType::Q5_0 => Some(LooseBits::Fifths(2)),
        DType::Q5_1 => Some(LooseBits::Fifths(4)),
        DType::S3_64 => Some(LooseBits::Thirds),
        _ => None,
    }
}

impl LooseBits {
    /// The file's block to the packed one.
    fn pack(self, block: &mut [u8]) {
        match self {
            LooseBits::Fifths(at) => {
                let word = word(block, at);
                // The low bits of 8 nibbles, gathered.
                let gathered = |mut v: u32| {
                    v = (v | v >> 3) & 0x0303_0303;
                    v = (v | v >> 6) & 0x000F_000F;
                    (v | v >> 12) as u8
                };
                block[at..at + 4].copy_from_slice(&[0, 1, 2, 3].map(|t| gathered(word >> t & 0x1111_1111)));
            }
            LooseBits::Thirds => {
                let packed = s3_packed(&std::array::from_fn(|quad| s3_quad(block, quad)));
                block[2..26].copy_from_slice(&packed);
            }
        }
    }

    /// The packed block to the file's.
    fn unpack(self, block: &mut [u8]) {
        match self {
            LooseBits::Fifths(at) => {
                let packed = word(block, at);
                let bit = |column: usize| packed >> (column % 4 * 8 + column / 4) & 1;
                let word = (0..32).fold(0, |word, column| word | bit(column) << column);
                block[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
            LooseBits::Thirds => {
                let packed: [u8; 24] = block[2..26].try_into().expect("24 bytes");
                block[2..26].fill(0);
                for quad in 0..16 {
                    for (t, code) in s3_unpacked(&packed, quad).to_le_bytes().into_iter().enumerate() {
                        let e = quad * 4 + t;
                        block[2 + e % 16] |= (code & 3) << (e / 16 * 2);
                        block[18 + e / 8] |= (code >> 2) << (e % 8);
                    }
                }
            }
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// The codes of four columns of a block of `S3_64` as the file has it, a byte each.
fn s3_quad(block: &[u8], quad: usize) -> u32 {
    let two = word(block, 2 + quad % 4 * 4) >> (quad / 4 * 2) & 0x0303_0303;
    let bits = u32::from(block[18 + quad / 2] >> (quad % 2 * 4) & 15);
    // Bit `t` of the four to byte `t`.
    two | ((bits * 0x0020_4081) & 0x0101_0101) << 2
}

/// The 24 bytes of codes of a packed `S3_64` block, from its 16 quads (a code a byte).
///
/// 32 columns take three words, whose bytes stand for the columns of a quad: quads `2 i` and `2 i + 1` are the low three
/// bits of each byte of word `i` and the next three. Two bits are left in each: the last two quads have their low two bits in
/// those of words 0 and 1, and their third bits in bits 6 and 7 of word 2. So every code is one or two shifts away.
pub(super) fn s3_packed(quads: &[u32; 16]) -> [u8; 24] {
    let mut out = [0; 24];
    for (q, out) in quads.chunks_exact(8).zip(out.chunks_exact_mut(12)) {
        let (low, third) = (|q: u32| (q & 0x0303_0303) << 6, |q: u32| (q & 0x0404_0404) << 4);
        let words = [
            q[0] | q[1] << 3 | low(q[6]),
            q[2] | q[3] << 3 | low(q[7]),
            q[4] | q[5] << 3 | third(q[6]) | third(q[7]) << 1,
        ];
        out.copy_from_slice(bytemuck::cast_slice(&words.map(u32::to_le)));
    }
    out
}

/// Quad `quad` of [`s3_packed`].
fn s3_unpacked(packed: &[u8; 24], quad: usize) -> u32 {
    let (half, i) = (quad / 8 * 12, quad % 8);
    if i < 6 {
        return word(packed, half + i / 2 * 4) >> (i % 2 * 3) & 0x0707_0707;
    }
    let two = word(packed, half + (i - 6) * 4) >> 6 & 0x0303_0303;
    two | word(packed, half + 8) >> (i - 2) & 0x0404_0404
}

/// Decodes `out.len()` elements of row `r`; `panel` starts at the group of the first.
pub(super) fn decode_row(dtype: DType, panel: &[u8], r: usize, out: &mut [f32]) {
    let n = out.len().div_ceil(group_len(dtype)) * group_bytes(dtype);
    let mut scratch = Scratch::of::<u8>(n);
    let row = &mut scratch.bytes_mut()[..n];
    row_bytes(dtype, panel, r, row);
    let exact = out.len() * dtype.block_bytes() / dtype.block_len(); // without the padding of a last pair
    codec::decode(dtype, &row[..exact], out)
        .expect("a packed weight holds whole blocks of a type that decodes");
}

/// Decodes `kc` elements of all rows of a panel into `[kc][16]`; `panel` starts at the group of the first.
///
/// Every version gives [`codec::decode`]'s numbers, bit for bit.
pub(super) fn decode(cpu: Cpu, dtype: DType, panel: &[u8], kc: usize, out: &mut [f32]) {
    let groups = kc.div_ceil(group_len(dtype));
    assert!(panel.len() >= groups * group_bytes(dtype) * PANEL && out.len() == kc * PANEL);
    if dtype == DType::F32 {
        bytemuck::cast_slice_mut(out).copy_from_slice(&panel[..kc * PANEL * 4]);
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if cpu.simd >= crate::Simd::Avx2 && super::decode_x86::decode(dtype, panel, kc, out) {
        return;
    }
    let _ = cpu;
    let mut scratch = Scratch::of::<f32>(kc);
    let row: &mut [f32] = &mut bytemuck::cast_slice_mut(scratch.bytes_mut())[..kc];
    for r in 0..PANEL {
        decode_row(dtype, panel, r, row);
        for (k, &v) in row.iter().enumerate() {
            out[k * PANEL + r] = v;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each code lies where the packed order says; back and forth nothing changes.
    #[test]
    fn loose_bits_lie_beside_their_codes() {
        let random = |n: usize| -> Vec<u8> { (0..n).map(|i| (i * 151 + i * i * 7 + 3) as u8).collect() };
        for dtype in [DType::Q5_0, DType::Q5_1, DType::S3_64] {
            let bits = loose_bits(dtype).unwrap();
            let file = random(dtype.block_bytes());
            let mut block = file.clone();
            bits.pack(&mut block);
            assert_ne!(block, file, "{dtype}");
            let packed = block.clone();
            bits.unpack(&mut block);
            assert_eq!(block, file, "{dtype}");
            match bits {
                LooseBits::Fifths(at) => {
                    for e in 0..32 {
                        let bit = packed[at + e % 4] >> (e / 4) & 1;
                        assert_eq!(bit, file[at + e / 8] >> (e % 8) & 1, "{dtype} {e}");
                    }
                }
                LooseBits::Thirds => {
                    assert_eq!(packed[..2], file[..2]);
                    for e in 0..64 {
                        let two = file[2 + e % 16] >> (e / 16 * 2) & 3;
                        let code = two | (file[18 + e / 8] >> (e % 8) & 1) << 2;
                        let (word, shift) = (2 + e / 32 * 12, e % 32 / 4);
                        let byte = |i: usize| packed[word + i * 4 + e % 4];
                        let got = match shift {
                            6 => byte(0) >> 6 | (byte(2) >> 6 & 1) << 2,
                            7 => byte(1) >> 6 | (byte(2) >> 7) << 2,
                            _ => byte(shift / 2) >> (shift % 2 * 3) & 7,
                        };
                        assert_eq!(got, code, "{e}");
                    }
                }
            }
        }
    }
}
