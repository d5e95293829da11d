//! Packing: lanes of a strided matrix side by side, as the tiles read them.

use sparsam_dtype::{DType, bf16, f16};

/// A strided matrix of plain floats whose *lanes* (rows of A, columns of B) are to lie side by side.
#[derive(Clone, Copy)]
pub(crate) struct Lanes {
    /// Address of lane 0, step 0.
    pub ptr: *const u8,
    /// F32, F16 or BF16.
    pub dtype: DType,
    /// Elements from one lane to the next.
    pub lane: usize,
    /// Elements from one k to the next.
    pub k: usize,
}

// SAFETY: only read, and the memory it names outlives the parallel region that shares it.
unsafe impl Send for Lanes {}
// SAFETY: as above.
unsafe impl Sync for Lanes {}

/// How packed elements are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// f32.
    F32,
    /// f32 rounded to bf16's numbers.
    Rounded,
    /// Words of two bf16: k even in the low half, k odd in the high one, a missing last one 0.
    Pairs,
}

impl Packing {
    /// Words of 4 bytes, and steps of a tile, for `k` elements.
    pub fn steps(self, k: usize) -> usize {
        if self == Packing::Pairs { k.div_ceil(2) } else { k }
    }
}

/// `x` rounded to bf16 (nearest, ties to even) and back.
#[inline]
pub(crate) fn round_bf16(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// The word of two bf16 that the tiles for pairs read.
#[inline]
pub(crate) fn pair(even: f32, odd: f32) -> f32 {
    f32::from_bits(bf16::from_f32(even).to_bits() as u32 | (bf16::from_f32(odd).to_bits() as u32) << 16)
}

impl Lanes {
    /// The lanes from `lane` on, starting at element `k`.
    pub fn at(&self, lane: usize, k: usize) -> Lanes {
        let bytes = (lane * self.lane + k * self.k) * self.dtype.block_bytes();
        Lanes { ptr: self.ptr.wrapping_add(bytes), ..*self }
    }
}

/// Writes the first `lanes` lanes, elements `0 .. kc`, as `[step][width]`; missing lanes are 0.
///
/// # Safety
/// The source must hold those lanes and elements, and `dst` room for `packing.steps(kc) * width` words.
pub(crate) unsafe fn pack(
    src: &Lanes,
    lanes: usize,
    kc: usize,
    dst: *mut f32,
    width: usize,
    packing: Packing,
) {
    // SAFETY: the caller's promise; each loader reads the element type that the source holds.
    unsafe {
        match src.dtype {
            DType::F32 => {
                let p = src.ptr.cast::<f32>();
                write(|i| *p.add(i), src, lanes, kc, dst, width, packing)
            }
            DType::F16 => {
                let p = src.ptr.cast::<f16>();
                write(|i| (*p.add(i)).to_f32(), src, lanes, kc, dst, width, packing)
            }
            DType::BF16 => {
                let p = src.ptr.cast::<bf16>();
                write(|i| (*p.add(i)).to_f32(), src, lanes, kc, dst, width, packing)
            }
            other => unreachable!("checked at the door: {other}"),
        }
    }
}

#[inline(always)]
unsafe fn write(
    get: impl Fn(usize) -> f32 + Copy,
    src: &Lanes,
    lanes: usize,
    kc: usize,
    dst: *mut f32,
    width: usize,
    packing: Packing,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match (width, packing) {
            // Full strips and panels with the width known to the compiler.
            (16, Packing::F32) if lanes == 16 => write_full::<16>(get, src, kc, dst),
            (12, Packing::F32) if lanes == 12 => write_full::<12>(get, src, kc, dst),
            (6, Packing::F32) if lanes == 6 => write_full::<6>(get, src, kc, dst),
            (_, Packing::F32) => write_any(get, src, lanes, kc, dst, width),
            (_, Packing::Rounded) => write_any(|i| round_bf16(get(i)), src, lanes, kc, dst, width),
            (_, Packing::Pairs) => {
                for s in 0..kc.div_ceil(2) {
                    for l in 0..width {
                        let at = l * src.lane + 2 * s * src.k;
                        let odd = if l < lanes && 2 * s + 1 < kc { get(at + src.k) } else { 0.0 };
                        *dst.add(s * width + l) = if l < lanes { pair(get(at), odd) } else { 0.0 };
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn write_full<const W: usize>(get: impl Fn(usize) -> f32, src: &Lanes, kc: usize, dst: *mut f32) {
    for k in 0..kc {
        // SAFETY: the caller's promise.
        let row = unsafe { &mut *dst.add(k * W).cast::<[f32; W]>() };
        if src.lane == 1 {
            for l in 0..W {
                row[l] = get(k * src.k + l);
            }
        } else {
            for l in 0..W {
                row[l] = get(k * src.k + l * src.lane);
            }
        }
    }
}

#[inline(always)]
unsafe fn write_any(
    get: impl Fn(usize) -> f32,
    src: &Lanes,
    lanes: usize,
    kc: usize,
    dst: *mut f32,
    width: usize,
) {
    for k in 0..kc {
        for l in 0..width {
            let v = if l < lanes { get(l * src.lane + k * src.k) } else { 0.0 };
            // SAFETY: the caller's promise.
            unsafe { *dst.add(k * width + l) = v };
        }
    }
}
