//! What each format's packed blocks are, and how they are multiplied.

use super::rows::Rows;
use super::{At, Block, Row};
use crate::weight::int8::BLOCK;
use sparsam_dtype::codec::IQ4_VALUES;

/// `x` in each byte.
#[inline(always)]
unsafe fn byte<V: Rows>(x: u8) -> V::Int {
    // SAFETY: the caller's promise: the machine has the instructions.
    unsafe { V::int(i32::from_ne_bytes([x; 4])) }
}

/// The bits `mask << shift` of each byte as factors for [`Rows::dot`]; [`sum_of`] takes the sum of one shift.
#[inline(always)]
unsafe fn field<V: Rows>(v: V::Int, shift: usize, mask: u8) -> V::Int {
    // SAFETY: the caller's promise: the machine has the instructions.
    unsafe {
        match V::WIDE {
            true => V::int_and(v, byte::<V>(mask << shift)),
            false => V::int_and(V::shr(v, shift), byte::<V>(mask)),
        }
    }
}

/// The sum of products with [`field`]s of one shift: exact, since each product is a multiple of `1 << SHIFT`.
#[inline(always)]
unsafe fn sum_of<V: Rows, const SHIFT: u32>(sum: V::Int) -> V::Int {
    // SAFETY: the caller's promise: the machine has the instructions.
    unsafe { if V::WIDE { V::int_shr::<SHIFT>(sum) } else { V::total::<true>(sum) } }
}

/// Bit `from` of each byte moved to `to`; the other bits are anything.
#[inline(always)]
unsafe fn moved<V: Rows>(v: V::Int, from: usize, to: usize) -> V::Int {
    // SAFETY: the caller's promise: the machine has the instructions.
    unsafe { if from < to { V::shl(v, to - from) } else { V::shr(v, from - to) } }
}

/// Codes in nibbles: columns 0 to 15 in the low halves of four units, 16 to 31 in the high ones.
#[inline(always)]
unsafe fn nibbles<V: Rows>(at: At, offset: usize, q: *const i8) -> V::Int {
    // SAFETY: the caller's promise: 256 bytes of codes and 32 activations.
    unsafe {
        let (mut low, mut high) = (V::int(0), V::int(0));
        for i in 0..4 {
            let v = at.quads::<V>(offset + i * 64);
            low = V::dot::<true>(low, field::<V>(v, 0, 15), q.add(4 * i));
            high = V::dot::<true>(high, field::<V>(v, 4, 15), q.add(16 + 4 * i));
        }
        V::int_add(sum_of::<V, 0>(low), sum_of::<V, 4>(high))
    }
}

/// Q4_0, or Q4_1 with minima.
pub(super) struct Q4<const MIN: bool>;

impl<const MIN: bool> Block for Q4<MIN> {
    const COLUMNS: usize = 32;
    const BYTES: usize = if MIN { 320 } else { 288 };
    const OFFSET: bool = !MIN;
    const MIN: bool = MIN;

    #[inline(always)]
    unsafe fn add<V: Rows>(row: &Row, b: usize, at: At, acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            let total = nibbles::<V>(at, Self::BYTES - 256, row.codes(b));
            let acc = row.add::<V, Self>(acc, b, total, at.halves(0));
            if MIN { row.add_min(acc, b, at.halves(32)) } else { acc }
        }
    }
}

/// Q5_0, or Q5_1 with minima; the packed order has the fifth bit of quad `i` in bit `i` of each of four bytes.
pub(super) struct Q5<const MIN: bool>;

impl<const MIN: bool> Block for Q5<MIN> {
    const COLUMNS: usize = 32;
    const BYTES: usize = if MIN { 384 } else { 352 };
    const OFFSET: bool = !MIN;
    const MIN: bool = MIN;

    #[inline(always)]
    unsafe fn add<V: Rows>(row: &Row, b: usize, at: At, acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            let q = row.codes(b);
            let (mut low, mut high) = (V::int(0), V::int(0));
            let (nibble, sixteen) = (byte::<V>(15), byte::<V>(16));
            let fifths = at.quads::<V>(Self::BYTES - 320);
            for i in 0..4 {
                let v = at.quads::<V>(Self::BYTES - 256 + i * 64);
                let lo = V::merge(V::int_and(v, nibble), moved::<V>(fifths, i, 4), sixteen);
                let hi = V::int_and(V::shr(v, 4), nibble);
                let hi = V::merge(hi, moved::<V>(fifths, 4 + i, 4), sixteen);
                low = V::dot::<false>(low, lo, q.add(4 * i));
                high = V::dot::<false>(high, hi, q.add(16 + 4 * i));
            }
            let acc = row.add::<V, Self>(acc, b, V::int_add(low, high), at.halves(0));
            if MIN { row.add_min(acc, b, at.halves(32)) } else { acc }
        }
    }
}

/// Q8_0.
pub(super) struct Q8;

impl Block for Q8 {
    const COLUMNS: usize = 32;
    const BYTES: usize = 544;
    const OFFSET: bool = true;

    #[inline(always)]
    unsafe fn add<V: Rows>(row: &Row, b: usize, at: At, acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            let q = row.codes(b);
            let mut sums = [V::int(0); 2];
            for i in 0..8 {
                let v = at.quads::<V>(32 + i * 64);
                let v = if V::WIDE { V::int_xor(v, byte::<V>(128)) } else { v };
                sums[i % 2] = V::dot_value(sums[i % 2], v, q.add(4 * i));
            }
            row.add::<V, Self>(acc, b, V::int_add(sums[0], sums[1]), at.halves(0))
        }
    }
}

/// The 16 values of IQ4 as [`Rows::dot_value`] takes them.
const fn iq4_table(wide: bool) -> [u8; 16] {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = IQ4_VALUES[i] as u8 ^ if wide { 128 } else { 0 };
        i += 1;
    }
    table
}

/// As [`nibbles`], for codes that stand for IQ4's values.
#[inline(always)]
unsafe fn iq4<V: Rows>(at: At, offset: usize, q: *const i8) -> V::Int {
    // SAFETY: the caller's promise: 256 bytes of codes and 32 activations.
    unsafe {
        let table = &const { [iq4_table(false), iq4_table(true)] }[usize::from(V::WIDE)];
        let nibble = byte::<V>(15);
        let (mut low, mut high) = (V::int(0), V::int(0));
        for i in 0..4 {
            let v = at.quads::<V>(offset + i * 64);
            low = V::dot_value(low, V::lookup(table, V::int_and(v, nibble)), q.add(4 * i));
            let hi = V::lookup(table, V::int_and(V::shr(v, 4), nibble));
            high = V::dot_value(high, hi, q.add(16 + 4 * i));
        }
        V::int_add(low, high)
    }
}

/// IQ4_NL.
pub(super) struct Iq4Nl;

impl Block for Iq4Nl {
    const COLUMNS: usize = 32;
    const BYTES: usize = 288;
    const OFFSET: bool = true;

    #[inline(always)]
    unsafe fn add<V: Rows>(row: &Row, b: usize, at: At, acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe { row.add::<V, Self>(acc, b, iq4::<V>(at, 32, row.codes(b)), at.halves(0)) }
    }
}

/// IQ4_XS: scales (32), two high bits of 8 scales (32), four low bits (64), codes (2048).
pub(super) struct Iq4Xs;

impl Block for Iq4Xs {
    const COLUMNS: usize = 256;
    const BYTES: usize = 2176;
    const OFFSET: bool = true;

    #[inline(always)]
    unsafe fn add<V: Rows>(row: &Row, b: usize, at: At, mut acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            let d: V = at.halves(0);
            let (mut tops, mut lows) = (V::words(at.units::<V>(32, 2)), at.quads::<V>(64));
            for i in 0..8 {
                let low = V::int_and(lows, V::int(15));
                let scale = V::merge(low, V::shl(tops, 4), V::int(0x30));
                let dw = d.mul(V::from_int(V::int_add(scale, V::int(-32))));
                let total = iq4::<V>(at, 128 + i * 256, row.codes(b + i));
                acc = row.add::<V, Self>(acc, b + i, total, dw);
                (tops, lows) = (V::shr(tops, 2), V::shr(lows, 4));
            }
            acc
        }
    }
}

/// S4_64: a scale (32), codes as two blocks of Q4_0 have them.
pub(super) struct S4;

impl Block for S4 {
    const COLUMNS: usize = 64;
    const BYTES: usize = 544;
    const OFFSET: bool = true;

    #[inline(always)]
    unsafe fn add<V: Rows>(row: &Row, b: usize, at: At, mut acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            let dw = at.halves(0);
            for h in 0..2 {
                let total = nibbles::<V>(at, 32 + h * 256, row.codes(b + h));
                acc = row.add::<V, Self>(acc, b + h, total, dw);
            }
            acc
        }
    }
}

/// S3_64 in its packed order: a scale (32), and for each 32 columns three units (192) as [`crate::weight::panel::s3_packed`] says.
pub(super) struct S3;

impl Block for S3 {
    const COLUMNS: usize = 64;
    const BYTES: usize = 416;
    const OFFSET: bool = true;

    #[inline(always)]
    unsafe fn add<V: Rows>(row: &Row, b: usize, at: At, mut acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            let dw = at.halves(0);
            let (three, four) = (byte::<V>(3), byte::<V>(4));
            for h in 0..2 {
                let q = row.codes(b + h);
                let codes = 32 + h * 192;
                let v = [at.quads::<V>(codes), at.quads::<V>(codes + 64), at.quads::<V>(codes + 128)];
                let (mut low, mut high) = (V::int(0), V::int(0));
                for i in 0..3 {
                    low = V::dot::<true>(low, field::<V>(v[i], 0, 7), q.add(8 * i));
                    high = V::dot::<true>(high, field::<V>(v[i], 3, 7), q.add(8 * i + 4));
                }
                // The last two quads: two bits in the first two units, third bits in the last.
                for i in 0..2 {
                    let two = V::int_and(V::shr(v[i], 6), three);
                    let code = V::merge(two, V::shr(v[2], 4 + i), four);
                    low = V::dot::<true>(low, code, q.add(24 + 4 * i));
                }
                let total = V::int_add(sum_of::<V, 0>(low), sum_of::<V, 3>(high));
                acc = row.add::<V, Self>(acc, b + h, total, dw);
            }
            acc
        }
    }
}

/// S2_64: scale (32), minimum (32), two bits of four times 16 columns in a byte (256).
pub(super) struct S2;

impl Block for S2 {
    const COLUMNS: usize = 64;
    const BYTES: usize = 320;
    const MIN: bool = true;

    #[inline(always)]
    unsafe fn add<V: Rows>(row: &Row, b: usize, at: At, mut acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            let (dw, m) = (at.halves(0), at.halves(32));
            let sums = two_bits::<V>(at, 64, row.codes(b), 16);
            let totals = [V::int_add(sums[0], sums[1]), V::int_add(sums[2], sums[3])];
            for h in 0..2 {
                acc = row.add::<V, Self>(acc, b + h, totals[h], dw);
                acc = row.add_min(acc, b + h, m);
            }
            acc
        }
    }
}

/// Sums over four quads of two-bit codes: part `i`, in bits `2 i` and `2 i + 1` of each byte, with the activations from
/// `i * stride` on.
#[inline(always)]
unsafe fn two_bits<V: Rows>(at: At, offset: usize, q: *const i8, stride: usize) -> [V::Int; 4] {
    // SAFETY: the caller's promise: 256 bytes of codes, 16 activations from each multiple of the stride on.
    unsafe {
        let mut sums = [V::int(0); 4];
        for k in 0..4 {
            let v = at.quads::<V>(offset + k * 64);
            for i in 0..4 {
                sums[i] = V::dot::<true>(sums[i], field::<V>(v, 2 * i, 3), q.add(i * stride + 4 * k));
            }
        }
        [sum_of::<V, 0>(sums[0]), sum_of::<V, 2>(sums[1]), sum_of::<V, 4>(sums[2]), sum_of::<V, 6>(sums[3])]
    }
}

/// Q2_K: scale and minimum of what follows (64), 16 bytes of scale (low) and minimum (256), two bits (1024).
pub(super) struct Q2K;

impl Block for Q2K {
    const COLUMNS: usize = 256;
    const BYTES: usize = 1344;
    const PARTS: usize = 2;
    const MIN: bool = true;

    #[inline(always)]
    unsafe fn add<V: Rows>(row: &Row, b: usize, at: At, mut acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            let (d, m): (V, V) = (at.halves(0), at.halves(32));
            let nibble = V::int(15);
            for n in 0..2 {
                let q = row.codes(b + 4 * n);
                let codes = 320 + n * 512;
                let parts = [two_bits::<V>(at, codes, q, 32), two_bits::<V>(at, codes + 256, q.add(16), 32)];
                for i in 0..8 {
                    let part = 2 * (b + 4 * n) + i;
                    let both = V::bytes(at.units::<V>(64 + (n * 8 + i) * 16, 1));
                    let dw = d.mul(V::from_int(V::int_and(both, nibble)));
                    acc = row.add::<V, Self>(acc, part, parts[i % 2][i / 2], dw);
                    acc = row.subtract_min(acc, part, m.mul(V::from_int(V::shr(both, 4))));
                }
            }
            acc
        }
    }
}

/// Q3_K: the scale of scales (32), 12 bytes of these (192), eight times third bits (64) and two bits (128).
pub(super) struct Q3K;

impl Q3K {
    /// Adds the products of one quad of the four blocks from `first` on to their sums.
    #[inline(always)]
    unsafe fn four<V: Rows>(
        mut sums: [V::Int; 4],
        v: V::Int,
        thirds: V::Int,
        first: usize,
        q: *const i8,
    ) -> [V::Int; 4] {
        // SAFETY: the caller's promise: activations in four blocks.
        unsafe {
            let (three, four) = (byte::<V>(3), byte::<V>(4));
            for i in 0..4 {
                let two = V::int_and(V::shr(v, 2 * i), three);
                let code = V::merge(two, moved::<V>(thirds, first + i, 2), four);
                sums[i] = V::dot::<true>(sums[i], code, q.add((first + i) * BLOCK));
            }
            sums
        }
    }

    /// Sums over the four quads of half `part` of blocks 0 to 3 and 4 to 7.
    #[inline(always)]
    unsafe fn sums<V: Rows>(at: At, part: usize, q: *const i8) -> [[V::Int; 4]; 2] {
        // SAFETY: the caller's promise: the offsets lie in the unit, the activations in eight blocks.
        unsafe {
            let (mut low, mut high) = ([V::int(0); 4], [V::int(0); 4]);
            for k in 4 * part..4 * part + 4 {
                let thirds = at.quads::<V>(224 + k * 192);
                low = Self::four::<V>(low, at.quads::<V>(288 + k * 192), thirds, 0, q.add(4 * k));
                high = Self::four::<V>(high, at.quads::<V>(352 + k * 192), thirds, 4, q.add(4 * k));
            }
            for i in 0..4 {
                (low[i], high[i]) = (V::total::<true>(low[i]), V::total::<true>(high[i]));
            }
            [low, high]
        }
    }

    /// Adds blocks `4 n` to `4 n + 3`, whose sums of both halves are there.
    #[inline(always)]
    unsafe fn add_four<V: Rows>(
        row: &Row,
        b: usize,
        at: At,
        n: usize,
        parts: [[V::Int; 4]; 2],
        mut acc: V,
    ) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            let d: V = at.halves(0);
            for i in 0..8 {
                // Scale `8 n + i`: four low bits in nibble `n` of the first 8 bytes, two high ones in the last four.
                let low = V::shr(at.quads::<V>(32 + i / 4 * 64), i % 4 * 8 + 4 * n);
                let top = moved::<V>(at.quads::<V>(160), i % 4 * 8 + 4 * n + i / 4 * 2, 4);
                let scale = V::merge(V::int_and(low, V::int(15)), top, V::int(0x30));
                let dw = d.mul(V::from_int(V::int_add(scale, V::int(-32))));
                acc = row.add::<V, Self>(acc, 2 * (b + 4 * n) + i, parts[i % 2][i / 2], dw);
            }
            acc
        }
    }
}

impl Block for Q3K {
    const COLUMNS: usize = 256;
    const BYTES: usize = 1760;
    const PARTS: usize = 2;
    const OFFSET: bool = true;

    #[inline(always)]
    unsafe fn add<V: Rows>(row: &Row, b: usize, at: At, acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            let q = row.codes(b);
            let [[low0, high0], [low1, high1]] = [Self::sums::<V>(at, 0, q), Self::sums::<V>(at, 1, q)];
            let acc = Self::add_four(row, b, at, 0, [low0, low1], acc);
            Self::add_four(row, b, at, 1, [high0, high1], acc)
        }
    }
}

/// Q4_K, or (with `FIFTH`) Q5_K: scales, minima, 12 bytes of 6-bit scales; four bits (for Q5_K by quads, with fifth bits).
pub(super) struct Q45K<const FIFTH: bool>;

impl<const FIFTH: bool> Q45K<FIFTH> {
    /// Adds block `i` of the eight, whose integer sum is there.
    #[inline(always)]
    unsafe fn finish<V: Rows>(row: &Row, b: usize, at: At, i: usize, sum: V::Int, acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            let (d, m): (V, V) = (at.halves(0), at.halves(32));
            let (scale, min) = six_bits::<V>(at, i);
            let acc = row.add::<V, Self>(acc, b + i, sum, d.mul(V::from_int(scale)));
            row.subtract_min(acc, b + i, m.mul(V::from_int(min)))
        }
    }

    /// Q4_K: adds blocks `2 pair` and `2 pair + 1` of the eight.
    #[inline(always)]
    unsafe fn add_pair<V: Rows>(row: &Row, b: usize, at: At, pair: usize, acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            let q = row.codes(b + 2 * pair);
            let mut sums = [V::int(0); 2];
            for k in 0..8 {
                let v = at.quads::<V>(256 + (pair * 8 + k) * 64);
                sums[0] = V::dot::<true>(sums[0], field::<V>(v, 0, 15), q.add(4 * k));
                sums[1] = V::dot::<true>(sums[1], field::<V>(v, 4, 15), q.add(BLOCK + 4 * k));
            }
            let acc = Self::finish(row, b, at, 2 * pair, sum_of::<V, 0>(sums[0]), acc);
            Self::finish(row, b, at, 2 * pair + 1, sum_of::<V, 4>(sums[1]), acc)
        }
    }

    /// Q5_K: adds all eight blocks.
    #[inline(always)]
    unsafe fn add_all<V: Rows>(row: &Row, b: usize, at: At, mut acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            let (nibble, sixteen) = (byte::<V>(15), byte::<V>(16));
            let q = row.codes(b);
            let mut sums = [V::int(0); 8];
            for k in 0..8 {
                let f = at.quads::<V>(256 + k * 320);
                for pair in 0..4 {
                    let v = at.quads::<V>((k + 1) * 320 + pair * 64);
                    let lo = V::merge(V::int_and(v, nibble), moved::<V>(f, 2 * pair, 4), sixteen);
                    let hi = V::int_and(V::shr(v, 4), nibble);
                    let hi = V::merge(hi, moved::<V>(f, 2 * pair + 1, 4), sixteen);
                    let q = q.add(2 * pair * BLOCK + 4 * k);
                    sums[2 * pair] = V::dot::<false>(sums[2 * pair], lo, q);
                    sums[2 * pair + 1] = V::dot::<false>(sums[2 * pair + 1], hi, q.add(BLOCK));
                }
            }
            for i in 0..8 {
                acc = Self::finish(row, b, at, i, sums[i], acc);
            }
            acc
        }
    }
}

/// Scale and minimum `i` of the 8 of Q4_K and Q5_K, as [`crate::weight::unpack`] has them.
#[inline(always)]
unsafe fn six_bits<V: Rows>(at: At, i: usize) -> (V::Int, V::Int) {
    // SAFETY: the caller's promise: a unit lies there.
    unsafe {
        let (a, b, c) = (at.quads::<V>(64), at.quads::<V>(128), at.quads::<V>(192));
        let t = i % 4 * 8;
        if i < 4 {
            return (V::int_and(V::shr(a, t), V::int(63)), V::int_and(V::shr(b, t), V::int(63)));
        }
        let scale = V::int_and(V::shr(c, t), V::int(15));
        let min = V::int_and(V::shr(c, t + 4), V::int(15));
        let top = V::int(0x30);
        (V::merge(scale, moved::<V>(a, t + 6, 4), top), V::merge(min, moved::<V>(b, t + 6, 4), top))
    }
}

impl<const FIFTH: bool> Block for Q45K<FIFTH> {
    const COLUMNS: usize = 256;
    const BYTES: usize = if FIFTH { 2816 } else { 2304 };
    const MIN: bool = true;

    #[inline(always)]
    unsafe fn add<V: Rows>(row: &Row, b: usize, at: At, acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            if FIFTH {
                return Self::add_all(row, b, at, acc);
            }
            let acc = Self::add_pair(row, b, at, 0, acc);
            let acc = Self::add_pair(row, b, at, 1, acc);
            let acc = Self::add_pair(row, b, at, 2, acc);
            Self::add_pair(row, b, at, 3, acc)
        }
    }
}

/// Q6_K: the scale of scales (32); for each 128 columns 8 signed scales (128) and eight times three units (1536).
pub(super) struct Q6K;

impl Q6K {
    /// Sums over the four quads of half `part` of four blocks of 32 columns.
    #[inline(always)]
    unsafe fn sums<V: Rows>(at: At, n: usize, part: usize, q: *const i8) -> [V::Int; 4] {
        // SAFETY: the caller's promise: the offsets lie in the unit, the activations in four blocks.
        unsafe {
            let (nibble, two) = (byte::<V>(15), byte::<V>(0x30));
            let mut sums = [V::int(0); 4];
            for k in 4 * part..4 * part + 4 {
                let from = 160 + n * 1664 + k * 192;
                let (a, b) = (at.quads::<V>(from), at.quads::<V>(from + 64));
                let h = at.quads::<V>(from + 128);
                let fours = [a, b, V::shr(a, 4), V::shr(b, 4)];
                for i in 0..4 {
                    let low = V::int_and(fours[i], nibble);
                    let code = V::merge(low, moved::<V>(h, 2 * i, 4), two);
                    sums[i] = V::dot::<false>(sums[i], code, q.add(i * BLOCK + 4 * k));
                }
            }
            sums
        }
    }
}

impl Block for Q6K {
    const COLUMNS: usize = 256;
    const BYTES: usize = 3360;
    const PARTS: usize = 2;
    const OFFSET: bool = true;

    #[inline(always)]
    unsafe fn add<V: Rows>(row: &Row, b: usize, at: At, mut acc: V) -> V {
        // SAFETY: the trait's contract.
        unsafe {
            let d: V = at.halves(0);
            for n in 0..2 {
                let q = row.codes(b + 4 * n);
                let parts = [Self::sums::<V>(at, n, 0, q), Self::sums::<V>(at, n, 1, q)];
                for i in 0..8 {
                    let scale = V::signed_bytes(at.units::<V>(32 + n * 1664 + i * 16, 1));
                    let dw = d.mul(V::from_int(scale));
                    acc = row.add::<V, Self>(acc, 2 * (b + 4 * n) + i, parts[i % 2][i / 2], dw);
                }
            }
            acc
        }
    }
}
