//! Four lanes in portable Rust: the width of SSE2 and NEON, which the compiler finds by itself.

use super::Vector;
use half::{bf16, f16};
use std::array::from_fn;

/// Four f32.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 4]);

const N: usize = 4;

/// Whether the target surely multiplies and adds in one instruction; elsewhere `mul_add` calls a slow function.
const FMA: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

#[inline(always)]
fn map(a: Portable, f: impl Fn(f32) -> f32) -> Portable {
    Portable(a.0.map(f))
}

#[inline(always)]
fn zip(a: Portable, b: Portable, f: impl Fn(f32, f32) -> f32) -> Portable {
    Portable(from_fn(|i| f(a.0[i], b.0[i])))
}

impl Vector for Portable {
    const LANES: usize = N;
    const FUSED: bool = FMA;
    type Int = [i32; N];
    type Mask = [bool; N];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; N])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller's contract; read unaligned.
        Portable(unsafe { p.cast::<[f32; N]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        // SAFETY: the caller's contract, `i < n`.
        Portable(from_fn(|i| if i < n { unsafe { *p.add(i) } } else { 0.0 }))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller's contract; written unaligned.
        unsafe { p.cast::<[f32; N]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        for i in 0..n {
            // SAFETY: the caller's contract.
            unsafe { *p.add(i) = self.0[i] }
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        zip(self, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        zip(self, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        zip(self, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        zip(self, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Portable(from_fn(
            |i| {
                if FMA { self.0[i].mul_add(b.0[i], c.0[i]) } else { self.0[i] * b.0[i] + c.0[i] }
            },
        ))
    }
    #[inline(always)]
    unsafe fn fnma(self, b: Self, c: Self) -> Self {
        Portable(from_fn(|i| {
            if FMA { (-self.0[i]).mul_add(b.0[i], c.0[i]) } else { c.0[i] - self.0[i] * b.0[i] }
        }))
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        map(self, f32::sqrt)
    }
    #[inline(always)]
    unsafe fn floor(self) -> Self {
        map(self, f32::floor)
    }
    #[inline(always)]
    unsafe fn nearest(self) -> Self {
        // Adding 1.5 * 2^23 leaves no bits for fractions.
        map(self, |a| (a + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    unsafe fn abs(self) -> Self {
        map(self, f32::abs)
    }
    #[inline(always)]
    unsafe fn neg(self) -> Self {
        map(self, |a| -a)
    }
    #[inline(always)]
    unsafe fn copysign(self, sign: Self) -> Self {
        zip(self, sign, f32::copysign)
    }
    #[inline(always)]
    unsafe fn max_or(self, b: Self) -> Self {
        zip(self, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min_or(self, b: Self) -> Self {
        zip(self, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn lt(self, b: Self) -> Self::Mask {
        from_fn(|i| self.0[i] < b.0[i])
    }
    #[inline(always)]
    unsafe fn eq(self, b: Self) -> Self::Mask {
        from_fn(|i| self.0[i] == b.0[i])
    }
    #[inline(always)]
    unsafe fn unordered(self, b: Self) -> Self::Mask {
        from_fn(|i| self.0[i].is_nan() || b.0[i].is_nan())
    }
    #[inline(always)]
    unsafe fn select(mask: Self::Mask, a: Self, b: Self) -> Self {
        Portable(from_fn(|i| if mask[i] { a.0[i] } else { b.0[i] }))
    }
    #[inline(always)]
    unsafe fn any(mask: Self::Mask) -> bool {
        mask.contains(&true)
    }
    #[inline(always)]
    unsafe fn or(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        from_fn(|i| a[i] || b[i])
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let [a, b, c, d] = self.0;
        (a + c) + (b + d)
    }
    #[inline(always)]
    unsafe fn bits(self) -> Self::Int {
        self.0.map(|a| a.to_bits() as i32)
    }
    #[inline(always)]
    unsafe fn from_bits(i: Self::Int) -> Self {
        Portable(i.map(|a| f32::from_bits(a as u32)))
    }
    #[inline(always)]
    unsafe fn to_int(self) -> Self::Int {
        self.0.map(|a| ((a + 12_582_912.0) - 12_582_912.0) as i32)
    }
    #[inline(always)]
    unsafe fn from_int(i: Self::Int) -> Self {
        Portable(i.map(|a| a as f32))
    }
    #[inline(always)]
    unsafe fn int(x: i32) -> Self::Int {
        [x; N]
    }
    #[inline(always)]
    unsafe fn int_add(a: Self::Int, b: Self::Int) -> Self::Int {
        from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    unsafe fn int_and(a: Self::Int, b: Self::Int) -> Self::Int {
        from_fn(|i| a[i] & b[i])
    }
    #[inline(always)]
    unsafe fn int_xor(a: Self::Int, b: Self::Int) -> Self::Int {
        from_fn(|i| a[i] ^ b[i])
    }
    #[inline(always)]
    unsafe fn int_shl<const S: u32>(a: Self::Int) -> Self::Int {
        a.map(|a| a << S)
    }
    #[inline(always)]
    unsafe fn int_shr<const S: u32>(a: Self::Int) -> Self::Int {
        a.map(|a| a >> S)
    }
    #[inline(always)]
    unsafe fn int_shr_zero<const S: u32>(a: Self::Int) -> Self::Int {
        a.map(|a| (a as u32 >> S) as i32)
    }
    #[inline(always)]
    unsafe fn int_mul_wide(a: Self::Int, b: Self::Int) -> (Self::Int, Self::Int) {
        let product = |i: usize| a[i] as u32 as u64 * b[i] as u32 as u64;
        (from_fn(|i| (product(i) >> 32) as i32), from_fn(|i| product(i) as i32))
    }
    #[inline(always)]
    unsafe fn int_eq_zero(a: Self::Int) -> Self::Mask {
        a.map(|a| a == 0)
    }
    #[inline(always)]
    unsafe fn int_iota() -> Self::Int {
        from_fn(|i| i as i32)
    }
    #[inline(always)]
    unsafe fn int_load(p: *const i32) -> Self::Int {
        // SAFETY: the caller's contract; read unaligned.
        unsafe { p.cast::<[i32; N]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn int_store(a: Self::Int, p: *mut i32) {
        // SAFETY: the caller's contract; written unaligned.
        unsafe { p.cast::<[i32; N]>().write_unaligned(a) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: the caller's contract.
        Portable(from_fn(|i| bf16::from_bits(unsafe { p.add(i).read_unaligned() }).to_f32()))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        for i in 0..N {
            // SAFETY: the caller's contract.
            unsafe { p.add(i).write_unaligned(bf16::from_f32(self.0[i]).to_bits()) }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: the caller's contract.
        Portable(from_fn(|i| f16::from_bits(unsafe { p.add(i).read_unaligned() }).to_f32()))
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        for i in 0..N {
            // SAFETY: the caller's contract.
            unsafe { p.add(i).write_unaligned(f16::from_f32(self.0[i]).to_bits()) }
        }
    }
    #[inline(always)]
    unsafe fn load_q8_0(row: *const u8, i: usize) -> Self {
        // SAFETY: the caller's contract: the block and, in it, the codes exist.
        unsafe {
            let block = row.add(i / 32 * 34);
            let scale = f16::from_bits(block.cast::<u16>().read_unaligned()).to_f32();
            let codes = block.add(2 + i % 32).cast::<[i8; N]>().read_unaligned();
            Portable(codes.map(|code| scale * f32::from(code)))
        }
    }
}
