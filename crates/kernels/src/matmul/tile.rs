//! Register tiles: the innermost loops of every product in f32 and bf16.
//!
//! A tile takes `steps` steps along K of a *strip* of A (`MR` rows, packed `[step][MR]`) and of `NP` *panels* of B
//! (16 columns each, `[step][16]`), and adds the products into registers that it then stores or adds to C. One
//! element of C is one chain of fused multiply-adds in the order of K, whatever `MR` and `NP` are: this is what
//! makes a row's result independent of the other rows. A step is one k in f32, two neighbouring ones in bf16.

use crate::{Cpu, Simd};

/// Columns of one panel: one register of AVX-512, two of AVX2.
pub(crate) const PANEL: usize = 16;

/// The most rows of a strip: 12 rows x 2 panels are 24 accumulators, which with 2 registers of B and 1 of A fill
/// 27 of AVX-512's 32 and hide the 4 cycles of a fused multiply-add many times over.
pub(crate) const MAX_STRIP: usize = 12;

/// Operands of one tile. A and B hold f32, or pairs of bf16, in words of 4 bytes.
#[derive(Clone, Copy)]
pub(crate) struct Args {
    /// Steps along K.
    pub steps: usize,
    /// Strip of A: `[steps][MR]`.
    pub a: *const f32,
    /// First panel of B.
    pub b: *const f32,
    /// Words from one panel of B to the next.
    pub b_panel: usize,
    /// Words from one step of B to the next; 16 where B is packed.
    pub b_step: usize,
    /// First element of C.
    pub c: *mut f32,
    /// Elements from one row of C to the next.
    pub ldc: usize,
    /// Whether to add to C instead of overwriting it.
    pub add: bool,
}

/// A tile of fixed `MR` and `NP`.
///
/// # Safety
/// All that [`Args`] names must be in bounds for the tile's size, and the machine must have its instructions.
pub(crate) type Tile = unsafe fn(&Args);

/// The tiles for one choice of instructions.
#[derive(Clone, Copy)]
pub(crate) struct Tiles {
    /// Rows of a full strip.
    pub strip: usize,
    /// Panels of a wide tile: 1 or 2.
    pub panels: usize,
    /// Whether steps are pairs of bf16.
    pub bf16: bool,
    /// `[panels - 1][rows - 1]`.
    table: [[Tile; MAX_STRIP]; 2],
}

macro_rules! table {
    ($f:ident, $np:literal: $($mr:literal),*) => { [$($f::<$mr, $np>),*] };
}

impl Tiles {
    /// The tiles for `cpu`; with `bf16` those for pairs of bf16 where the machine has them.
    pub fn new(cpu: Cpu, bf16: bool) -> Tiles {
        #[cfg(target_arch = "x86_64")]
        {
            use x86::{avx2, avx512, avx512_bf16};
            if bf16 && cpu.bf16 {
                let table = [
                    table!(avx512_bf16, 1: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
                    table!(avx512_bf16, 2: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
                ];
                return Tiles { strip: 12, panels: 2, bf16: true, table };
            }
            if cpu.simd == Simd::Avx512 {
                let table = [
                    table!(avx512, 1: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
                    table!(avx512, 2: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
                ];
                return Tiles { strip: 12, panels: 2, bf16: false, table };
            }
            if cpu.simd == Simd::Avx2 {
                // 6 x 16: 12 accumulators of the 16 registers.
                let one = table!(avx2, 1: 1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6);
                return Tiles { strip: 6, panels: 1, bf16: false, table: [one; 2] };
            }
        }
        let _ = (bf16, cpu, Simd::Scalar);
        let one = table!(scalar, 1: 1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4);
        Tiles { strip: 4, panels: 1, bf16: false, table: [one; 2] }
    }

    /// Computes the tile of `rows` (at most [`Tiles::strip`]) times `cols` (at most 16 x [`Tiles::panels`]).
    ///
    /// Panels beyond `cols` must be readable to a multiple of 16 columns; C is touched within `cols` only, with
    /// `cs` elements from one column to the next (`args.ldc` from one row to the next).
    ///
    /// # Safety
    /// As for [`Tile`].
    pub unsafe fn run(&self, args: &Args, rows: usize, cols: usize, cs: usize) {
        let panels = cols.div_ceil(PANEL);
        debug_assert!(rows >= 1 && rows <= self.strip && panels >= 1 && panels <= self.panels);
        let tile = self.table[panels - 1][rows - 1];
        if cols == panels * PANEL && cs == 1 {
            // SAFETY: the caller's promise.
            return unsafe { tile(args) };
        }
        let mut full = [0.0f32; MAX_STRIP * 2 * PANEL];
        // SAFETY: `full` holds the largest tile; the rest is the caller's promise.
        unsafe {
            tile(&Args { c: full.as_mut_ptr(), ldc: 2 * PANEL, add: false, ..*args });
            for i in 0..rows {
                for j in 0..cols {
                    let (c, v) = (args.c.add(i * args.ldc + j * cs), full[i * 2 * PANEL + j]);
                    *c = if args.add { *c + v } else { v };
                }
            }
        }
    }
}

/// Portable tile; the meaning of the others up to the rounding of each product (they fuse it into the sum).
unsafe fn scalar<const MR: usize, const NP: usize>(t: &Args) {
    let mut acc = [[[0.0f32; PANEL]; NP]; MR];
    // SAFETY: the caller's promise: A and B hold `steps` steps, C `MR` rows of `NP` panels.
    unsafe {
        for s in 0..t.steps {
            for i in 0..MR {
                let a = *t.a.add(s * MR + i);
                for j in 0..NP {
                    let b = t.b.add(j * t.b_panel + s * t.b_step).cast::<[f32; PANEL]>();
                    for (c, b) in acc[i][j].iter_mut().zip(&*b) {
                        *c += a * b;
                    }
                }
            }
        }
        for i in 0..MR {
            for j in 0..NP {
                let c = &mut *t.c.add(i * t.ldc + j * PANEL).cast::<[f32; PANEL]>();
                for (c, v) in c.iter_mut().zip(acc[i][j]) {
                    *c = if t.add { *c + v } else { v };
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Args, PANEL};
    use std::arch::x86_64::*;

    macro_rules! wide_tile {
        ($name:ident, $features:literal, |$acc:ident, $a:ident, $b:ident| $step:expr) => {
            #[target_feature(enable = $features)]
            pub unsafe fn $name<const MR: usize, const NP: usize>(t: &Args) {
                let mut acc = [[_mm512_setzero_ps(); NP]; MR];
                let (mut a, mut b) = (t.a, t.b);
                // SAFETY: the caller's promise: A and B hold `steps` steps, C `MR` rows of `NP` panels.
                unsafe {
                    // C comes from far away: it travels while the sums are made.
                    for i in 0..MR {
                        for j in 0..NP {
                            _mm_prefetch::<_MM_HINT_T0>(t.c.add(i * t.ldc + j * PANEL).cast());
                        }
                    }
                    for _ in 0..t.steps {
                        let mut bs = [_mm512_setzero_ps(); NP];
                        for j in 0..NP {
                            bs[j] = _mm512_loadu_ps(b.add(j * t.b_panel));
                        }
                        for i in 0..MR {
                            let $a = _mm512_set1_ps(*a.add(i));
                            for j in 0..NP {
                                let ($acc, $b) = (acc[i][j], bs[j]);
                                acc[i][j] = $step;
                            }
                        }
                        a = a.add(MR);
                        b = b.wrapping_add(t.b_step);
                    }
                    for i in 0..MR {
                        for j in 0..NP {
                            let c = t.c.add(i * t.ldc + j * PANEL);
                            let v =
                                if t.add { _mm512_add_ps(_mm512_loadu_ps(c), acc[i][j]) } else { acc[i][j] };
                            _mm512_storeu_ps(c, v);
                        }
                    }
                }
            }
        };
    }

    wide_tile!(avx512, "avx512f", |acc, a, b| _mm512_fmadd_ps(a, b, acc));
    wide_tile!(avx512_bf16, "avx512f,avx512bf16", |acc, a, b| {
        // Both types are 64 plain bytes.
        let (a, b) = (std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b));
        _mm512_dpbf16_ps(acc, a, b)
    });

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2<const MR: usize, const NP: usize>(t: &Args) {
        const { assert!(NP == 1) };
        let mut acc = [[_mm256_setzero_ps(); 2]; MR];
        let (mut a, mut b) = (t.a, t.b);
        // SAFETY: the caller's promise: A and B hold `steps` steps, C `MR` rows of one panel.
        unsafe {
            for _ in 0..t.steps {
                let bs = [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8))];
                for i in 0..MR {
                    let a = _mm256_set1_ps(*a.add(i));
                    for j in 0..2 {
                        acc[i][j] = _mm256_fmadd_ps(a, bs[j], acc[i][j]);
                    }
                }
                a = a.add(MR);
                b = b.wrapping_add(t.b_step);
            }
            for i in 0..MR {
                for j in 0..2 {
                    let c = t.c.add(i * t.ldc + j * 8);
                    let v = if t.add { _mm256_add_ps(_mm256_loadu_ps(c), acc[i][j]) } else { acc[i][j] };
                    _mm256_storeu_ps(c, v);
                }
            }
        }
    }
}
