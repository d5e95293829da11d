//! What tiles are made of: register blocks, 2^x, transposed and plain copies of keys and values.

use super::problem::Tensor;
use crate::simd::Vector;
use sparsam_dtype::DType;
use std::ops::Range;

/// Keys that are treated together. A task holds their transposed K and their V in f32: 256 x (64 + 64) x 4 bytes =
/// 128 KiB for heads of 64, which with queries and results of [`ROWS`] rows (2 x 96 KiB) stay within a second-level cache
/// of 512 KiB; twice that for heads of 128 within one of 1 MiB. The scores of one register block of rows,
/// 6 x 256 x 4 = 6 KiB, stay in the first level together with the panel of K or V that is being read.
///
/// Chunks begin at multiples of this in a sequence's own positions, and a chunk's maximum, sum and weighted values
/// are made before they meet those of the chunks before it. Thus a row's bits depend on its keys alone: not on which
/// rows share its block, and not on whether one task goes through all chunks or each has its own.
pub(super) const CHUNK: usize = 256;

/// Rows times heads of a task. A chunk of keys comes from the last-level cache or from memory and is packed once for
/// these rows: at 192 rows that took 12% of the time (measured), at 384 half of it, and more gained nothing.
pub(super) const ROWS: usize = 384;

/// Rows of a register block: 6 x 4 registers of 16 are 24 accumulators, with 4 of B and 1 of A 29 of AVX-512's 32;
/// AVX2 takes 6 x 2 registers of 8, 12 + 2 + 1 of its 16. Either hides the latency of a fused multiply-add.
pub(super) const BLOCK: usize = 6;

/// Keys in one panel of transposed K: what one register block of AVX-512 takes.
pub(super) const PANEL: usize = 64;

/// Widths are rounded up to this: the lanes of AVX-512, whole registers of all others.
pub(super) const UNIT: usize = 16;

/// One step of a product: words of A and B into an accumulator.
pub(super) trait Product<V> {
    unsafe fn step(a: V, b: V, sum: V) -> V;

    /// [`product`], a function of its own for each set of instructions: inlined into its callers it would be most of
    /// the time that this crate takes to compile, for nothing, since a call is a thousand cycles of work.
    unsafe fn product(rows: usize, steps: usize, units: usize, a: Left, b: Right, c: Target);
}

/// The method `product` over `$v` with words `$words`, compiled apart from its callers.
macro_rules! outlined {
    ($v:ty, $words:ty, $($features:tt)*) => {
        #[inline(always)]
        unsafe fn product(rows: usize, steps: usize, units: usize, a: Left, b: Right, c: Target) {
            #[inline(never)]
            $($features)*
            unsafe fn apart(rows: usize, steps: usize, units: usize, a: Left, b: Right, c: Target) {
                // SAFETY: the caller's contract.
                unsafe { tall::<$v, $words>(rows, steps, units, a, b, c) }
            }
            // SAFETY: the caller's contract.
            unsafe { apart(rows, steps, units, a, b, c) }
        }
    };
}

/// How numbers stand in words, beyond the step itself.
pub(super) trait Words<V>: Product<V> {
    /// Numbers in a word: neighbours along the axis that a product sums over.
    const EACH: usize;

    /// Copies `[slot, head, ..width]` of each slot as the right side of a product that sums over slots:
    /// `[slots / EACH][width in whole units]`, zeros where nothing is.
    unsafe fn pack_right(t: &Tensor, slots: &[usize], head: usize, width: usize, to: *mut f32);

    /// A register of the right side of a product that sums over slots: numbers `d ..` of the slot at the first address
    /// and, where words hold two, of its neighbour at the second.
    unsafe fn right(dtype: DType, slots: [*const u8; 2], d: usize) -> V;

    /// Turns numbers `cols` (whole units) of a row into words in place; the word of number `j` is `j / EACH`.
    unsafe fn narrow(row: *mut f32, cols: Range<usize>);

    /// Words of the numbers `cols` (whole units) of two rows, which follow each other along a product's sum.
    unsafe fn interleave(first: *const f32, second: *const f32, to: *mut f32, cols: Range<usize>);
}

/// Words are f32.
pub(super) struct Single;

impl<V: Registers> Words<V> for Single {
    const EACH: usize = 1;

    #[inline(always)]
    unsafe fn pack_right(t: &Tensor, slots: &[usize], head: usize, width: usize, to: *mut f32) {
        // SAFETY: the caller's contract.
        unsafe { pack_rows::<V>(t, slots, head, width, to) }
    }

    #[inline(always)]
    unsafe fn right(dtype: DType, slots: [*const u8; 2], d: usize) -> V {
        // SAFETY: the caller's contract.
        unsafe {
            match dtype {
                DType::F32 => V::load(slots[0].cast::<f32>().add(d)),
                DType::F16 => V::load_f16(slots[0].cast::<u16>().add(d)),
                DType::Q8_0 => V::load_q8_0(slots[0], d),
                _ => V::load_bf16(slots[0].cast::<u16>().add(d)),
            }
        }
    }

    #[inline(always)]
    unsafe fn narrow(_: *mut f32, _: Range<usize>) {}

    #[inline(always)]
    unsafe fn interleave(_: *const f32, _: *const f32, _: *mut f32, _: Range<usize>) {
        unreachable!("words of one number hold no second row")
    }
}

/// Words are pairs of bf16, multiplied and summed in f32 by one instruction (AVX-512 BF16).
#[cfg(target_arch = "x86_64")]
pub(super) struct Pairs;

#[cfg(target_arch = "x86_64")]
mod pairs {
    use super::*;
    use crate::simd::Avx512;
    use std::arch::x86_64::*;

    impl Product<Avx512> for Pairs {
        #[inline(always)]
        unsafe fn step(a: Avx512, b: Avx512, sum: Avx512) -> Avx512 {
            // SAFETY: the caller has the instruction; both types are 64 plain bytes.
            unsafe {
                let word = |x: Avx512| std::mem::transmute::<__m512, __m512bh>(x.0);
                Avx512(_mm512_dpbf16_ps(sum.0, word(a), word(b)))
            }
        }

        outlined!(Avx512, Pairs, #[target_feature(enable = "avx512f,avx512bf16,avx2,fma")]);
    }

    /// 16 bf16 from `first` in the low halves of words, 16 from `second` in the high ones.
    #[inline(always)]
    unsafe fn join(first: __m256i, second: __m256i) -> __m512i {
        // SAFETY: the caller has AVX-512.
        unsafe {
            let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(second));
            _mm512_or_si512(_mm512_cvtepu16_epi32(first), high)
        }
    }

    /// 16 numbers rounded to bf16.
    #[inline(always)]
    unsafe fn round(p: *const f32) -> __m256i {
        // SAFETY: the caller has the instruction and 16 numbers at `p`; both types are 32 plain bytes.
        unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(p))) }
    }

    impl Words<Avx512> for Pairs {
        const EACH: usize = 2;

        #[inline(always)]
        unsafe fn pack_right(t: &Tensor, slots: &[usize], head: usize, width: usize, to: *mut f32) {
            let row = width.next_multiple_of(UNIT);
            for (i, pair) in slots.chunks(2).enumerate() {
                // SAFETY: the caller's contract; `t` is bf16.
                unsafe {
                    let part = |slot: Option<&usize>, d: usize| {
                        let Some(&slot) = slot else { return _mm256_setzero_si256() };
                        let from = t.at(slot, head).cast::<u16>().add(d);
                        if width - d >= UNIT {
                            return _mm256_loadu_si256(from.cast());
                        }
                        _mm256_maskz_loadu_epi16((1 << (width - d)) - 1, from.cast())
                    };
                    for d in (0..row).step_by(UNIT) {
                        let words = join(part(pair.first(), d), part(pair.get(1), d));
                        _mm512_storeu_si512(to.add(i * row + d).cast(), words);
                    }
                }
            }
        }

        #[inline(always)]
        unsafe fn right(_: DType, slots: [*const u8; 2], d: usize) -> Avx512 {
            // SAFETY: the caller's contract; the values are bf16.
            unsafe {
                let [first, second] = slots.map(|p| p.cast::<u16>().wrapping_add(d));
                let words = join(_mm256_loadu_si256(first.cast()), _mm256_loadu_si256(second.cast()));
                Avx512(_mm512_castsi512_ps(words))
            }
        }

        #[inline(always)]
        unsafe fn narrow(row: *mut f32, cols: Range<usize>) {
            for j in cols.step_by(UNIT) {
                // SAFETY: the caller's contract; what is written lies before what is still to be read.
                unsafe { _mm256_storeu_si256(row.cast::<u16>().add(j).cast(), round(row.add(j))) };
            }
        }

        #[inline(always)]
        unsafe fn interleave(first: *const f32, second: *const f32, to: *mut f32, cols: Range<usize>) {
            for j in cols.step_by(UNIT) {
                // SAFETY: the caller's contract.
                unsafe {
                    _mm512_storeu_si512(to.add(j).cast(), join(round(first.add(j)), round(second.add(j))));
                }
            }
        }
    }
}

/// Reads one vector as the left side of a product that sums over its numbers, times `factor` where words hold f32
/// (rounding after a factor would cost what bf16 inputs need not lose).
///
/// # Safety
/// As [`Tensor::read`]; where words are pairs an even width; `to` has room for `width / EACH` words.
#[inline(always)]
pub(super) unsafe fn read_left<V: Vector, W: Words<V>>(
    t: &Tensor,
    token: usize,
    head: usize,
    width: usize,
    factor: f32,
    to: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        if W::EACH == 2 && t.dtype == DType::BF16 {
            std::ptr::copy_nonoverlapping(t.at(token, head).cast_const(), to.cast::<u8>(), width * 2);
            return;
        }
        if W::EACH == 2 {
            let mut part = [0.0; 2 * UNIT];
            for d in (0..width).step_by(2 * UNIT) {
                let n = (width - d).min(2 * UNIT);
                t.read_from(token, head, d, &mut part[..n]);
                W::narrow(part.as_mut_ptr(), 0..2 * UNIT);
                std::ptr::copy_nonoverlapping(part.as_ptr(), to.add(d / 2), n / 2);
            }
            return;
        }
        let to = std::slice::from_raw_parts_mut(to, width);
        t.read(token, head, to);
        to.iter_mut().for_each(|x| *x *= factor);
    }
}

impl<V: Registers> Product<V> for Single {
    #[inline(always)]
    unsafe fn step(a: V, b: V, sum: V) -> V {
        // SAFETY: the caller has V's instructions.
        unsafe { a.fma(b, sum) }
    }

    #[inline(always)]
    unsafe fn product(rows: usize, steps: usize, units: usize, a: Left, b: Right, c: Target) {
        // SAFETY: the caller's contract.
        unsafe { V::product(rows, steps, units, a, b, c) }
    }
}

/// Where an operand lies: element `[i][k]` at `at + i * row + k * step`, in words of 4 bytes.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub at: *const f32,
    pub row: usize,
    pub step: usize,
}

/// `[k][j]` at `at + k * row + j`.
#[derive(Clone, Copy)]
pub(super) struct Right {
    pub at: *const f32,
    pub row: usize,
}

/// `[i][j]` at `at + i * row + j`; `add`: on top of what is there.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub at: *mut f32,
    pub row: usize,
    pub add: bool,
}

/// `c (rows, units * 16) = a (rows, steps) b (steps, units * 16)`, `rows <= 6`. Each element is one chain of steps in
/// the order of k, however the block is cut.
///
/// # Safety
/// All operands are in bounds for these sizes; the machine has V's and P's instructions.
#[inline(always)]
pub(super) unsafe fn product<V, P: Product<V>>(
    rows: usize,
    steps: usize,
    units: usize,
    a: Left,
    b: Right,
    c: Target,
) {
    // SAFETY: the caller's contract.
    unsafe { P::product(rows, steps, units, a, b, c) }
}

/// What [`product`] does, to be inlined into the function that carries the instructions.
#[inline(always)]
unsafe fn tall<V: Vector, P: Product<V>>(
    rows: usize,
    steps: usize,
    units: usize,
    a: Left,
    b: Right,
    c: Target,
) {
    // SAFETY: the caller's contract.
    unsafe {
        match rows {
            1 => wide::<V, P, 1>(steps, units, a, b, c),
            2 => wide::<V, P, 2>(steps, units, a, b, c),
            3 => wide::<V, P, 3>(steps, units, a, b, c),
            4 => wide::<V, P, 4>(steps, units, a, b, c),
            5 => wide::<V, P, 5>(steps, units, a, b, c),
            _ => wide::<V, P, 6>(steps, units, a, b, c),
        }
    }
}

#[inline(always)]
unsafe fn wide<V: Vector, P: Product<V>, const M: usize>(
    steps: usize,
    units: usize,
    a: Left,
    b: Right,
    c: Target,
) {
    // SAFETY: the contract of `product`; every column below is one of its columns.
    unsafe {
        let mut j = 0;
        let cols = units * UNIT;
        if V::LANES == 16 {
            while j + 64 <= cols {
                block::<V, P, M, 4>(steps, a, b, c, j);
                j += 64;
            }
            match (cols - j) / 16 {
                3 => block::<V, P, M, 3>(steps, a, b, c, j),
                2 => block::<V, P, M, 2>(steps, a, b, c, j),
                1 => block::<V, P, M, 1>(steps, a, b, c, j),
                _ => {}
            }
        } else {
            while j < cols {
                block::<V, P, M, 2>(steps, a, b, c, j);
                j += 2 * V::LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn block<V: Vector, P: Product<V>, const M: usize, const N: usize>(
    steps: usize,
    a: Left,
    b: Right,
    c: Target,
    col: usize,
) {
    // SAFETY: the contract of `product`.
    unsafe {
        let mut sum = [[V::splat(0.0); N]; M];
        let (mut pa, mut pb) = (a.at, b.at.add(col));
        for _ in 0..steps {
            let mut bs = [V::splat(0.0); N];
            for j in 0..N {
                bs[j] = V::load(pb.add(j * V::LANES));
            }
            for i in 0..M {
                let a = V::splat(*pa.add(i * a.row));
                for j in 0..N {
                    sum[i][j] = P::step(a, bs[j], sum[i][j]);
                }
            }
            pa = pa.wrapping_add(a.step);
            pb = pb.wrapping_add(b.row);
        }
        for i in 0..M {
            for j in 0..N {
                let at = c.at.add(i * c.row + col + j * V::LANES);
                let sum = if c.add { V::load(at).add(sum[i][j]) } else { sum[i][j] };
                sum.store(at);
            }
        }
    }
}

/// 2^x for x at most 1 or so; below 2^-125 it is 0.
///
/// `x = n + r` with whole n and `|r| <= 1/2`: adding 1.5 * 2^23 rounds x to n and leaves n in the low bits, from where
/// it is shifted into the exponent. 2^r by a polynomial of degree 6 (least maximum relative error, 0.03 ulp). Error:
/// at most 1 ulp. NaN stays NaN.
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(super) unsafe fn exp2<V: Vector>(x: V) -> V {
    // SAFETY: the caller's contract.
    unsafe {
        let low = V::splat(-125.0);
        let tiny = x.lt(low);
        // The second operand is what comes out for NaN.
        let x = low.max_or(x);
        let magic = V::splat(12_582_912.0);
        let shifted = x.add(magic);
        let r = x.sub(shifted.sub(magic));
        let mut p = V::splat(EXP2[0]);
        for c in &EXP2[1..] {
            p = p.fma(r, V::splat(*c));
        }
        let n = V::int_shl::<23>(shifted.bits());
        V::select(tiny, V::splat(0.0), V::from_bits(V::int_add(p.bits(), n)))
    }
}

/// 2^r, highest power first.
const EXP2: [f32; 7] = [
    0.000_153_533_56,
    0.001_339_887_7,
    0.009_618_438,
    0.055_503_324,
    0.240_226_48,
    std::f32::consts::LN_2,
    1.0,
];

/// What attention needs of a set of instructions beside [`Vector`].
pub(super) trait Registers: Vector {
    /// A square turned over: `LANES` rows of `LANES` columns, in place; registers beyond are not touched.
    unsafe fn transpose(rows: &mut [Self; 16]);

    /// [`product`] of words of f32.
    unsafe fn product(rows: usize, steps: usize, units: usize, a: Left, b: Right, c: Target);
}

impl Registers for crate::simd::Portable {
    outlined!(crate::simd::Portable, Single,);

    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self; 16]) {
        let mut x = [[0.0f32; 4]; 4];
        // SAFETY: 4 lanes fit each row.
        unsafe {
            (0..4).for_each(|i| rows[i].store(x[i].as_mut_ptr()));
            for i in 0..4 {
                rows[i] = Self::load([x[0][i], x[1][i], x[2][i], x[3][i]].as_ptr());
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use crate::simd::{Avx2, Avx512};
    use std::arch::x86_64::*;

    impl Registers for Avx2 {
        outlined!(Avx2, Single, #[target_feature(enable = "avx2,fma,f16c")]);

        #[inline(always)]
        unsafe fn transpose(rows: &mut [Self; 16]) {
            // SAFETY: the trait's contract.
            unsafe {
                let r: [__m256; 8] = std::array::from_fn(|i| rows[i].0);
                let mut t = r;
                for i in 0..4 {
                    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
                }
                // u[4 i + j]: column j (and 4 + j) of rows 4 i .. 4 i + 4.
                let mut u = t;
                for i in 0..2 {
                    u[4 * i] = _mm256_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
                    u[4 * i + 1] = _mm256_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
                    u[4 * i + 2] = _mm256_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
                    u[4 * i + 3] = _mm256_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
                }
                for j in 0..4 {
                    rows[j] = Avx2(_mm256_permute2f128_ps::<0x20>(u[j], u[4 + j]));
                    rows[4 + j] = Avx2(_mm256_permute2f128_ps::<0x31>(u[j], u[4 + j]));
                }
            }
        }
    }

    impl Registers for Avx512 {
        outlined!(Avx512, Single, #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]);

        #[inline(always)]
        unsafe fn transpose(rows: &mut [Self; 16]) {
            // SAFETY: the trait's contract.
            unsafe {
                let r: [__m512; 16] = std::array::from_fn(|i| rows[i].0);
                let mut t = r;
                for i in 0..8 {
                    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
                }
                // u[4 i + j]: columns j, 4 + j, 8 + j, 12 + j of rows 4 i .. 4 i + 4, a quarter each.
                let mut u = t;
                for i in 0..4 {
                    u[4 * i] = _mm512_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
                    u[4 * i + 1] = _mm512_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
                    u[4 * i + 2] = _mm512_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
                    u[4 * i + 3] = _mm512_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
                }
                for j in 0..4 {
                    let low = _mm512_shuffle_f32x4::<0x44>(u[j], u[4 + j]);
                    let high = _mm512_shuffle_f32x4::<0xee>(u[j], u[4 + j]);
                    let low2 = _mm512_shuffle_f32x4::<0x44>(u[8 + j], u[12 + j]);
                    let high2 = _mm512_shuffle_f32x4::<0xee>(u[8 + j], u[12 + j]);
                    rows[j] = Avx512(_mm512_shuffle_f32x4::<0x88>(low, low2));
                    rows[4 + j] = Avx512(_mm512_shuffle_f32x4::<0xdd>(low, low2));
                    rows[8 + j] = Avx512(_mm512_shuffle_f32x4::<0x88>(high, high2));
                    rows[12 + j] = Avx512(_mm512_shuffle_f32x4::<0xdd>(high, high2));
                }
            }
        }
    }
}

/// `n <= LANES` elements from element `i` of the vector at `p`, zeros behind them; of Q8_0 all `LANES`.
///
/// # Safety
/// They exist; the machine has V's instructions.
#[inline(always)]
pub(super) unsafe fn load<V: Vector>(dtype: DType, p: *const u8, i: usize, n: usize) -> V {
    // SAFETY: the caller's contract; `part` has 16 elements, as many as the widest register.
    unsafe {
        if dtype == DType::F32 {
            let p = p.cast::<f32>().add(i);
            return if n == V::LANES { V::load(p) } else { V::load_first(p, n) };
        }
        if dtype == DType::Q8_0 {
            debug_assert_eq!(n, V::LANES, "whole blocks are whole registers");
            return V::load_q8_0(p, i);
        }
        let mut p = p.cast::<u16>().add(i);
        let mut part = [0u16; 16];
        if n < V::LANES {
            std::ptr::copy_nonoverlapping(p, part.as_mut_ptr(), n);
            p = part.as_ptr();
        }
        if dtype == DType::F16 { V::load_f16(p) } else { V::load_bf16(p) }
    }
}

/// Copies `[slot, head, ..dim]` of each slot to `to`, transposed: panels of 64 keys, `[panel][dim][64]`. Pairs of bf16
/// are read `as_type` F32, half as many.
///
/// Columns up to the next multiple of 16 beyond the last slot repeat it; those beyond keep what was there.
///
/// # Safety
/// `to` holds whole panels for all slots; slots and head lie within `t`; the machine has V's instructions.
#[inline(always)]
pub(super) unsafe fn pack_transposed<V: Registers>(
    (t, as_type): (&Tensor, DType),
    slots: &[usize],
    head: usize,
    dim: usize,
    to: *mut f32,
) {
    let Some(&last) = slots.last() else { return };
    for key in (0..slots.len().next_multiple_of(UNIT)).step_by(V::LANES) {
        let mut from = [std::ptr::null::<u8>(); 16];
        for i in 0..V::LANES {
            from[i] = t.at(slots.get(key + i).copied().unwrap_or(last), head);
        }
        // SAFETY: the caller's contract; columns `key ..` of a panel end at a multiple of the lanes.
        unsafe {
            let to = to.add(key / PANEL * PANEL * dim + key % PANEL);
            for d in (0..dim).step_by(V::LANES) {
                let n = (dim - d).min(V::LANES);
                let mut rows = [V::splat(0.0); 16];
                if n == V::LANES && as_type == DType::F32 {
                    for i in 0..V::LANES {
                        rows[i] = V::load(from[i].cast::<f32>().add(d));
                    }
                } else if n == V::LANES && as_type == DType::F16 {
                    for i in 0..V::LANES {
                        rows[i] = V::load_f16(from[i].cast::<u16>().add(d));
                    }
                } else {
                    for i in 0..V::LANES {
                        rows[i] = load(as_type, from[i], d, n);
                    }
                }
                V::transpose(&mut rows);
                if n == V::LANES {
                    for i in 0..V::LANES {
                        rows[i].store(to.add((d + i) * PANEL));
                    }
                } else {
                    for i in 0..n {
                        rows[i].store(to.add((d + i) * PANEL));
                    }
                }
            }
        }
    }
}

/// Copies `[slot, head, ..width]` of each slot to rows of `to`, `width` rounded up to whole units of zeros.
///
/// # Safety
/// `to` holds the rows; slots and head lie within `t`; the machine has V's instructions.
#[inline(always)]
pub(super) unsafe fn pack_rows<V: Vector>(
    t: &Tensor,
    slots: &[usize],
    head: usize,
    width: usize,
    to: *mut f32,
) {
    let row = width.next_multiple_of(UNIT);
    for (i, &slot) in slots.iter().enumerate() {
        let from = t.at(slot, head);
        for d in (0..row).step_by(V::LANES) {
            // SAFETY: the caller's contract.
            unsafe {
                let n = width.saturating_sub(d).min(V::LANES);
                load::<V>(t.dtype, from, d, n).store(to.add(i * row + d));
            }
        }
    }
}
