//! Vectors of f32 over each instruction set, and elementwise functions on them.
//!
//! [`Vector`] is the few operations that kernels need, on 4 lanes in portable Rust, 8 with AVX2 and FMA, 16 with
//! AVX-512. A kernel is written once, `#[inline(always)]` over `V: Vector`, and instantiated inside a function that
//! carries the `#[target_feature]`; there it becomes the very instructions. [`math`] has the functions.
//!
//! Every operation treats all lanes alike, so an element's result does not depend on the lane that it falls in. With
//! `FUSED` off (portable code) `fma` rounds twice.

pub(crate) mod math;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

/// Asks for the cache line at `p`. An address that means nothing is ignored.
#[inline(always)]
pub(crate) fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and a prefetch neither faults nor changes anything that a program can see.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast())
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Defines an `unsafe fn $name(simd: Simd, ..)` that runs `$generic::<V>(..)` with the instructions of `simd`.
///
/// # Safety
/// Of the function defined: that of `$generic`, and the machine has the instructions (a [`crate::Context`]'s has).
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis unsafe fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? = $generic:ident) => {
        $(#[$meta])*
        $vis unsafe fn $name(simd: $crate::Simd, $($arg: $type),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($arg: $type),*) $(-> $ret)? {
                // SAFETY: the caller's contract.
                unsafe { $generic::<$crate::simd::Avx2>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            unsafe fn avx512($($arg: $type),*) $(-> $ret)? {
                // SAFETY: the caller's contract.
                unsafe { $generic::<$crate::simd::Avx512>($($arg),*) }
            }
            // SAFETY: the caller's contract.
            unsafe {
                match simd {
                    #[cfg(target_arch = "x86_64")]
                    $crate::Simd::Avx512 => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::Simd::Avx2 => avx2($($arg),*),
                    _ => $generic::<$crate::simd::Portable>($($arg),*),
                }
            }
        }
    };
}
pub(crate) use dispatch;

/// `LANES` f32 numbers, with integers of the same width and masks beside them.
///
/// # Safety
/// Every method: the machine has the type's instructions. Those that take pointers: `LANES` (or `n`) elements there
/// may be read or written; no alignment is asked for.
pub(crate) trait Vector: Copy {
    /// Elements.
    const LANES: usize;
    /// Whether `fma` rounds once.
    const FUSED: bool;
    /// `LANES` i32 numbers.
    type Int: Copy;
    /// A truth value for each lane.
    type Mask: Copy;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    /// The first `n < LANES` elements, zeros behind them.
    unsafe fn load_first(p: *const f32, n: usize) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// The first `n < LANES` elements only.
    unsafe fn store_first(self, p: *mut f32, n: usize);

    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn div(self, b: Self) -> Self;
    /// `self * b + c`.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// `c - self * b`.
    unsafe fn fnma(self, b: Self, c: Self) -> Self;
    unsafe fn sqrt(self) -> Self;
    unsafe fn floor(self) -> Self;
    /// To the nearest integer, ties to even, for magnitudes below 2^22.
    unsafe fn nearest(self) -> Self;
    unsafe fn abs(self) -> Self;
    unsafe fn neg(self) -> Self;
    /// The magnitude of `self` with the sign of `sign`.
    unsafe fn copysign(self, sign: Self) -> Self;
    /// The larger; `b` if either is NaN.
    unsafe fn max_or(self, b: Self) -> Self;
    /// The smaller; `b` if either is NaN.
    unsafe fn min_or(self, b: Self) -> Self;

    unsafe fn lt(self, b: Self) -> Self::Mask;
    unsafe fn eq(self, b: Self) -> Self::Mask;
    /// NaN on either side.
    unsafe fn unordered(self, b: Self) -> Self::Mask;
    /// `a` where the mask holds, else `b`.
    unsafe fn select(mask: Self::Mask, a: Self, b: Self) -> Self;
    unsafe fn any(mask: Self::Mask) -> bool;
    unsafe fn or(a: Self::Mask, b: Self::Mask) -> Self::Mask;

    /// The sum of all lanes, in one fixed order.
    unsafe fn sum(self) -> f32;

    unsafe fn bits(self) -> Self::Int;
    unsafe fn from_bits(i: Self::Int) -> Self;
    /// Nearest integers for magnitudes below 2^22; otherwise anything.
    unsafe fn to_int(self) -> Self::Int;
    unsafe fn from_int(i: Self::Int) -> Self;
    unsafe fn int(x: i32) -> Self::Int;
    unsafe fn int_add(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn int_and(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn int_xor(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn int_shl<const N: u32>(a: Self::Int) -> Self::Int;
    /// Arithmetic.
    unsafe fn int_shr<const N: u32>(a: Self::Int) -> Self::Int;
    /// Logical.
    unsafe fn int_shr_zero<const N: u32>(a: Self::Int) -> Self::Int;
    /// High and low 32 bits of the unsigned products.
    unsafe fn int_mul_wide(a: Self::Int, b: Self::Int) -> (Self::Int, Self::Int);
    unsafe fn int_eq_zero(a: Self::Int) -> Self::Mask;
    /// `0, 1, 2, ..`.
    unsafe fn int_iota() -> Self::Int;
    unsafe fn int_load(p: *const i32) -> Self::Int;
    unsafe fn int_store(a: Self::Int, p: *mut i32);

    /// From 16-bit brain floats.
    unsafe fn load_bf16(p: *const u16) -> Self;
    unsafe fn store_bf16(self, p: *mut u16);
    /// From IEEE half floats.
    unsafe fn load_f16(p: *const u16) -> Self;
    unsafe fn store_f16(self, p: *mut u16);
    /// Elements `i ..` of a row of Q8_0: blocks of a half float and 32 codes of 8 bits, which it multiplies. `i` is a
    /// multiple of `LANES`, so that all are of one block.
    unsafe fn load_q8_0(row: *const u8, i: usize) -> Self;
}
