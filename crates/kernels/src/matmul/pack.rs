//! Packing: lanes of a strided matrix side by side, as the tiles read them.

use crate::Cpu;
#[cfg(target_arch = "x86_64")]
use crate::Simd;
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

/// What packed words hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Words {
    /// f32.
    F32,
    /// f32 rounded to bf16's numbers.
    Rounded,
    /// Two bf16: k even in the low half, k odd in the high one, a missing last one 0.
    Pairs,
}

/// How elements are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packing {
    /// What is written.
    pub words: Words,
    /// With which instructions; pairs with AVX-512 BF16 if `cpu` has it.
    pub cpu: Cpu,
}

impl Packing {
    /// Words of 4 bytes, and steps of a tile, for `k` elements.
    pub fn steps(self, k: usize) -> usize {
        if self.words == Words::Pairs { k.div_ceil(2) } else { k }
    }
}

/// Rounds to bf16 (nearest, ties to even) and back; a NaN stays one. Plain arithmetic on bits, so that a loop over it
/// becomes vector code.
#[inline]
pub(crate) fn round_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
    f32::from_bits(if x.is_nan() { (bits | 0x0040_0000) & 0xffff_0000 } else { rounded })
}

/// The word of two bf16 that the tiles for pairs read.
#[inline]
pub(crate) fn pair(even: f32, odd: f32) -> f32 {
    f32::from_bits(round_bf16(even).to_bits() >> 16 | round_bf16(odd).to_bits())
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
    // Elements that the vector version takes; what is left is written below.
    #[cfg(target_arch = "x86_64")]
    let done = match packing.cpu.simd >= Simd::Avx2 {
        // SAFETY: the caller's promise; `Context` vouches for the instructions.
        true => unsafe { super::pack_x86::pack(src, lanes, kc, dst, width, packing) },
        false => 0,
    };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    let (src, kc) = (&src.at(0, done), kc - done);
    let dst = dst.wrapping_add(packing.steps(done) * width);
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

/// Steps packed at a time where lanes are neighbours: of each of these rows, all groups are taken before the next rows,
/// so that memory is read in runs of all lanes and not of one group. A multiple of the vector versions' steps.
const RUN: usize = 32;

/// Packs `(lanes, width)` in groups of `width`, each `[step][width]` at the address and of the width that `group` gives
/// for its index (the last may be narrower).
///
/// # Safety
/// As for [`pack`], for each group.
pub(crate) unsafe fn pack_groups(
    src: &Lanes,
    (lanes, width): (usize, usize),
    kc: usize,
    group: impl Fn(usize) -> (*mut f32, usize),
    packing: Packing,
) {
    let run = if src.lane == 1 && src.k != 1 { RUN } else { kc };
    for k in (0..kc).step_by(run.max(1)) {
        for g in 0..lanes.div_ceil(width) {
            let (dst, wide) = group(g);
            let dst = dst.wrapping_add(packing.steps(k) * wide);
            // SAFETY: the caller's promise.
            unsafe {
                pack(
                    &src.at(g * width, k),
                    (lanes - g * width).min(width),
                    run.min(kc - k),
                    dst,
                    wide,
                    packing,
                )
            };
        }
    }
}

#[inline(always)]
unsafe fn write(
    get: impl Fn(usize) -> f32,
    src: &Lanes,
    lanes: usize,
    kc: usize,
    dst: *mut f32,
    width: usize,
    packing: Packing,
) {
    let at = |l: usize, k: usize| if l < lanes && k < kc { get(l * src.lane + k * src.k) } else { 0.0 };
    for s in 0..packing.steps(kc) {
        for l in 0..width {
            let word = match packing.words {
                Words::F32 => at(l, s),
                Words::Rounded => round_bf16(at(l, s)),
                Words::Pairs => pair(at(l, 2 * s), at(l, 2 * s + 1)),
            };
            // SAFETY: the caller's promise.
            unsafe { *dst.add(s * width + l) = word };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matmul::tests::numbers;

    /// Every version packs the same words, at sizes around its own tiles, in every layout.
    #[test]
    fn every_version_packs_the_same_words() {
        let mut x = numbers(20_000, 31);
        x[7] = f32::NAN;
        x[8] = f32::INFINITY;
        let halves: Vec<f16> = x.iter().map(|&x| f16::from_f32(x)).collect();
        let brains: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
        let sources = [
            (DType::F32, x.as_ptr().cast()),
            (DType::F16, halves.as_ptr().cast()),
            (DType::BF16, brains.as_ptr().cast()),
        ];
        for (dtype, ptr) in sources {
            for (lane, k) in [(1, 19), (101, 1), (2, 103), (0, 1)] {
                let src = Lanes { ptr, dtype, lane, k };
                for (lanes, width) in
                    [(16, 16), (13, 16), (1, 16), (12, 12), (11, 11), (6, 6), (5, 5), (4, 4), (1, 1)]
                {
                    for kc in [1, 2, 7, 8, 9, 16, 17, 33, 100] {
                        for words in [Words::F32, Words::Rounded, Words::Pairs] {
                            let run = |cpu| {
                                let mut out = vec![7.0f32; kc * width];
                                let packing = Packing { words, cpu };
                                // SAFETY: 20,000 numbers hold 16 lanes and 100 elements of each layout above.
                                unsafe { pack(&src, lanes, kc, out.as_mut_ptr(), width, packing) };
                                out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                            };
                            let want = run(Cpu::SCALAR);
                            for cpu in Cpu::all() {
                                assert!(
                                    run(cpu) == want,
                                    "{dtype} {lane} {k} {lanes} {width} {kc} {words:?} {cpu}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}
