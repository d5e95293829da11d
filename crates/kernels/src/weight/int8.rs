//! Products with rounded weights whose activations are rounded to 8 bits: integer arithmetic on the codes.
//!
//! Activations are rounded row by row in blocks of 32: `d = amax / 127`, `q = round(x * (127 / amax))`, ties to
//! even, so that `|x - d q| <= d / 2` up to rounding. Weights are `dw * (u - offset) + mw` with unsigned codes `u`.
//! With `i = sum of u q - offset * sum of q` over a block (exact, 32 bits), one element of the result is the chain
//!
//! ```text
//! acc = fma(f32(i) * d, dw, acc);  if the format has minima: acc = fma(f32(sum of q) * d, mw, acc)
//! ```
//!
//! over the blocks in order; where scales of weights are for 16 columns, over both parts of each block. Every version, the scalar one too, does just these operations, so results are the same
//! bits for all instruction sets, numbers of rows and threads. Compare Dettmers et al. 2022 ("LLM.int8()",
//! section 2, vector-wise rounding) and llama.cpp's Q8 activations; blocks keep outliers from spoiling a whole row.
//!
//! A block whose largest magnitude is below 1e-30 counts as zeros; one with an infinity or NaN gives NaN. Beyond
//! 4e34 the sum of a block, scaled by `d` alone, may overflow.

use super::{Target, Weight, unpack};
use crate::matmul::pack::Lanes;
use crate::matmul::scratch::{Scratch, Shared};
use crate::matmul::tile::PANEL;
use crate::matmul::{SERIAL, tasks};
use crate::{Context, Cpu, Pool, Simd};
use sparsam_dtype::{DType, bf16, f16};
use std::ops::Range;

/// Elements that share one scale of activations.
pub(super) const BLOCK: usize = 32;

/// Bytes of the codes of one block of a panel.
pub(super) const CODES: usize = BLOCK * PANEL;

/// Rows of activations that one task multiplies with an unpacked panel: a multiple of every strip.
const ROWS: usize = 516;

/// Rows up to which each is multiplied with the packed panels on its own, where a format has such a product: a panel
/// stays in cache, and one code a byte is worth writing down for more rows only.
const FEW: usize = 3;

/// How a format's codes are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    /// What is taken from the unsigned codes.
    pub offset: i32,
    /// Largest unsigned code.
    pub max: i32,
    /// Whether blocks have minima.
    pub min: bool,
    /// Scales (and minima) for each block of 32 columns: 1, or 2 for formats with groups of 16.
    pub parts: usize,
}

impl Format {
    /// The reading of `dtype`; `None` for formats without integer kernels.
    pub fn of(dtype: DType) -> Option<Format> {
        use DType::*;
        let (offset, max, min, parts) = match dtype {
            Q4_0 | S4_64 => (8, 15, false, 1),
            Q4_1 | Q4_K => (0, 15, true, 1),
            Q5_0 => (16, 31, false, 1),
            Q5_1 | Q5_K => (0, 31, true, 1),
            Q8_0 | IQ4_NL | IQ4_XS => (128, 255, false, 1),
            Q2_K => (0, 3, true, 2),
            S2_64 => (0, 3, true, 1),
            S3_64 => (4, 7, false, 1),
            Q3_K => (4, 7, false, 2),
            Q6_K => (32, 63, false, 2),
            _ => return None,
        };
        Some(Format { offset, max, min, parts })
    }
}

/// Rounded activations of all rows.
#[derive(Clone, Copy)]
pub(super) struct Acts {
    /// Blocks in a row.
    pub blocks: usize,
    /// Codes, `[row][block][32]`.
    pub codes: Shared<i8>,
    /// Scales, `[row][block]`.
    pub d: Shared<f32>,
    /// Sums of codes, `[row][block][2]`: of the first 16 and of the others.
    pub sums: Shared<i32>,
}

/// Rounds one row.
///
/// # Safety
/// Row `row` of `acts` must be allocated and this call's own.
pub(super) unsafe fn quantize(cpu: Cpu, x: &[f32], acts: &Acts, row: usize) {
    debug_assert!(x.len() == acts.blocks * BLOCK);
    #[cfg(target_arch = "x86_64")]
    if cpu.simd >= Simd::Avx2 {
        // SAFETY: the caller's promise; `Context` vouches for the instructions.
        return unsafe { super::int8_x86::quantize(x, acts, row) };
    }
    let _ = (cpu, Simd::Scalar);
    for (b, x) in x.chunks_exact(BLOCK).enumerate() {
        let at = row * acts.blocks + b;
        let (d, inverse) = scale(x.iter().fold(0, |max, v| max.max(v.to_bits() & 0x7fff_ffff)));
        let mut sums = [0; 2];
        for (i, &v) in x.iter().enumerate() {
            // A factor of 0 stands for a block that has no codes.
            let q = if inverse == 0.0 { 0 } else { (v * inverse).round_ties_even() as i8 };
            sums[i / 16] += q as i32;
            // SAFETY: the caller's promise.
            unsafe { *acts.codes.at(at * BLOCK + i) = q };
        }
        // SAFETY: the caller's promise.
        unsafe {
            *acts.d.at(at) = d;
            *acts.sums.at(2 * at) = sums[0];
            *acts.sums.at(2 * at + 1) = sums[1];
        }
    }
}

/// Scale of a block and the factor that gives its codes, from the bits of its largest magnitude.
pub(super) fn scale(bits: u32) -> (f32, f32) {
    let amax = f32::from_bits(bits);
    if bits >= 0x7f80_0000 {
        (f32::NAN, 0.0)
    } else if amax < 1e-30 {
        (0.0, 0.0)
    } else {
        (amax / 127.0, 127.0 / amax)
    }
}

/// A panel with one code a byte, as the tiles read it.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    /// Codes, `[block][quad][row][4]`.
    pub codes: *mut u8,
    /// Scales, `[block][part][row]`.
    pub d: *mut f32,
    /// Minima, `[block][part][row]`; only where the format has them.
    pub m: *mut f32,
}

/// What a format's offset and minima make of the sums of codes.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    /// `-offset * sum of q`, `[row][block][part]`.
    pub start: Shared<i32>,
    /// `f32(sum of q) * d`, `[row][block][part]`; only where the format has minima.
    pub scaled: Shared<f32>,
}

/// Operands of one tile of `MR` rows and one or two panels.
pub(super) struct Args<'a> {
    pub acts: &'a Acts,
    /// First row of activations.
    pub row: usize,
    pub sums: Sums,
    pub panels: [Panel; 2],
    /// First element of the result.
    pub out: *mut f32,
    /// Elements from one of its rows to the next.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "the portable tile has one row"))]
    pub ldo: usize,
}

/// A tile.
///
/// # Safety
/// All that [`Args`] names must be in bounds for its rows and panels, and the machine must have its instructions.
pub(super) type Tile = unsafe fn(&Args);

/// The tiles for one choice of instructions and one format.
#[derive(Clone, Copy)]
pub(super) struct Tiles {
    /// Rows of a full strip.
    pub strip: usize,
    /// Panels of a wide tile.
    pub panels: usize,
    /// Whether codes are wanted with their sign, the offset taken already.
    pub signed: bool,
    /// `[panels - 1][rows - 1]`.
    pub table: [[Tile; MAX_STRIP]; 2],
    /// One row times one packed panel, if the format has a version of it: no unpacking.
    pub single: Option<Single>,
}

/// The most rows of a strip.
pub(super) const MAX_STRIP: usize = 6;

/// One row of `acts` and `sums` times one packed panel; 16 results go to `out`.
///
/// # Safety
/// As for [`Tile`]; the panel holds `acts.blocks` blocks.
pub(super) type Single = unsafe fn(acts: &Acts, sums: &Sums, row: usize, panel: &[u8], out: *mut f32);

impl Tiles {
    fn new(cpu: Cpu, dtype: DType, format: Format) -> Tiles {
        #[cfg(target_arch = "x86_64")]
        if let Some(tiles) = super::int8_x86::tiles(cpu, dtype, format) {
            return tiles;
        }
        let _ = (cpu, dtype);
        let tile: Tile = match (format.min, format.parts) {
            (false, 1) => scalar::<false, 1>,
            (true, 1) => scalar::<true, 1>,
            (false, _) => scalar::<false, 2>,
            (true, _) => scalar::<true, 2>,
        };
        Tiles { strip: 1, panels: 1, signed: false, table: [[tile; MAX_STRIP]; 2], single: None }
    }
}

/// Portable tile of one row and one panel: the meaning of all others.
unsafe fn scalar<const MIN: bool, const PARTS: usize>(t: &Args) {
    let mut acc = [0.0f32; PANEL];
    let panel = &t.panels[0];
    let len = BLOCK / PARTS;
    for part in 0..t.acts.blocks * PARTS {
        let at = t.row * t.acts.blocks * PARTS + part;
        // SAFETY: the caller's promise.
        unsafe {
            let q = std::slice::from_raw_parts(t.acts.codes.at(at * len), len);
            let codes = std::slice::from_raw_parts(panel.codes.add(part * len * PANEL), len * PANEL);
            let d = *t.acts.d.at(at / PARTS);
            for (r, acc) in acc.iter_mut().enumerate() {
                let mut sum = *t.sums.start.at(at);
                for (k, &q) in q.iter().enumerate() {
                    sum += codes[(k / 4 * PANEL + r) * 4 + k % 4] as i32 * q as i32;
                }
                *acc = (sum as f32 * d).mul_add(*panel.d.add(part * PANEL + r), *acc);
                if MIN {
                    *acc = (*t.sums.scaled.at(at)).mul_add(*panel.m.add(part * PANEL + r), *acc);
                }
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { *t.out.cast::<[f32; PANEL]>() = acc };
}

/// Rounds the activations `a` (m rows of k) and computes all targets, whose formats all have integer kernels.
pub(super) fn run(ctx: &Context, targets: &[Target], a: Lanes, m: usize, k: usize) {
    let blocks = k / BLOCK;
    let n = m * blocks;
    let mut scratch = (Scratch::of::<i8>(n * BLOCK), Scratch::of::<f32>(n), Scratch::of::<i32>(2 * n));
    let acts = Acts { blocks, codes: scratch.0.shared(), d: scratch.1.shared(), sums: scratch.2.shared() };
    let cpu = ctx.cpu();
    let rows: usize = targets.iter().map(|t| t.weight.rows()).sum();
    let parallel = m * k * rows > SERIAL;
    let per_task = 8;
    tasks(ctx.pool(), parallel && m > per_task, m.div_ceil(per_task), |t| {
        for row in t * per_task..m.min((t + 1) * per_task) {
            // SAFETY: the row lies within A; rows of `acts` belong to this task alone.
            unsafe { with_row(&a, row, k, |x| quantize(cpu, x, &acts, row)) };
        }
    });

    // One set of sums for each kind of format in use.
    let mut kinds: Vec<((i32, usize, bool), Scratch, Scratch)> = Vec::new();
    let mut jobs = Vec::with_capacity(targets.len());
    let mut units = 0;
    for target in targets {
        let dtype = target.weight.dtype();
        let format = Format::of(dtype).expect("the caller has chosen the formats");
        let tiles = Tiles::new(cpu, dtype, format);
        let kind = (if tiles.signed { 0 } else { format.offset }, format.parts, format.min);
        let i = kinds.iter().position(|k| k.0 == kind).unwrap_or_else(|| {
            kinds.push(sums(ctx.pool(), &acts, n, kind));
            kinds.len() - 1
        });
        let sums = Sums { start: kinds[i].1.shared(), scaled: kinds[i].2.shared() };
        let wide = if m <= FEW && tiles.single.is_some() { 1 } else { tiles.panels };
        units += target.weight.panels().div_ceil(wide);
        jobs.push(Job { target, tiles, sums, parts: format.parts, wide, end: units });
    }

    if m <= FEW {
        let pieces = ctx.pool().pieces(units);
        tasks(ctx.pool(), parallel, pieces.len(), |t| {
            for unit in pieces[t].clone() {
                let (job, first) = find(&jobs, unit);
                match job.tiles.single {
                    Some(single) => (0..m).for_each(|row| job.single(single, &acts, row, first)),
                    None => job.unit(cpu, &acts, first, 0..m),
                }
            }
        });
    } else {
        let chunks = m.div_ceil(ROWS);
        tasks(ctx.pool(), parallel, units * chunks, |t| {
            let (job, first) = find(&jobs, t / chunks);
            let row = t % chunks * ROWS;
            job.unit(cpu, &acts, first, row..m.min(row + ROWS));
        });
    }
}

/// The [`Sums`] of `n` blocks of activations for an offset, parts and whether there are minima.
fn sums(
    pool: &Pool,
    acts: &Acts,
    n: usize,
    kind: (i32, usize, bool),
) -> ((i32, usize, bool), Scratch, Scratch) {
    /// Blocks of one task: some microseconds of work.
    const TASK: usize = 2048;
    let (offset, parts, min) = kind;
    let len = n * parts;
    let (mut start, mut scaled) = (Scratch::of::<i32>(len), Scratch::of::<f32>(if min { len } else { 0 }));
    let (starts, scaleds) = (start.shared::<i32>(), scaled.shared::<f32>());
    tasks(pool, n > TASK, n.div_ceil(TASK), |t| {
        for i in t * TASK * parts..n.min((t + 1) * TASK) * parts {
            // SAFETY: `acts` holds 2 n sums and n scales; blocks belong to this task alone.
            unsafe {
                let sum = match parts {
                    1 => *acts.sums.at(2 * i) + *acts.sums.at(2 * i + 1),
                    _ => *acts.sums.at(i),
                };
                *starts.at(i) = -offset * sum;
                if min {
                    *scaleds.at(i) = sum as f32 * *acts.d.at(i / parts);
                }
            }
        }
    });
    (kind, start, scaled)
}

/// The elements of a row as f32, in place where they lie so.
unsafe fn with_row(a: &Lanes, row: usize, k: usize, f: impl FnOnce(&[f32])) {
    let a = a.at(row, 0);
    // SAFETY: the caller's promise: the row lies within A.
    unsafe {
        if a.dtype == DType::F32 && a.k == 1 {
            return f(std::slice::from_raw_parts(a.ptr.cast::<f32>(), k));
        }
        let mut scratch = Scratch::of::<f32>(k);
        let x: &mut [f32] = &mut bytemuck::cast_slice_mut(scratch.bytes_mut())[..k];
        for (i, x) in x.iter_mut().enumerate() {
            *x = match a.dtype {
                DType::F16 => (*a.ptr.cast::<f16>().add(i * a.k)).to_f32(),
                DType::BF16 => (*a.ptr.cast::<bf16>().add(i * a.k)).to_f32(),
                _ => *a.ptr.cast::<f32>().add(i * a.k),
            };
        }
        f(x)
    }
}

/// One target with what its format needs.
struct Job<'a> {
    target: &'a Target<'a>,
    tiles: Tiles,
    sums: Sums,
    parts: usize,
    /// Panels of one unit of work.
    wide: usize,
    /// Units up to the end of this job.
    end: usize,
}

/// The job that a unit belongs to, and its first panel there.
fn find<'a>(jobs: &'a [Job<'a>], unit: usize) -> (&'a Job<'a>, usize) {
    let i = jobs.partition_point(|j| j.end <= unit);
    let before = if i == 0 { 0 } else { jobs[i - 1].end };
    (&jobs[i], (unit - before) * jobs[i].wide)
}

impl Job<'_> {
    fn weight(&self) -> &Weight {
        self.target.weight
    }

    /// One row times one packed panel.
    fn single(&self, single: Single, acts: &Acts, row: usize, panel: usize) {
        let cols = (self.weight().rows() - panel * PANEL).min(PANEL);
        let out = self.target.out;
        let bytes = self.weight().panel_from(panel, 0);
        // SAFETY: the panel has `acts.blocks` blocks; results go to columns of the output that are this task's own.
        unsafe {
            if cols == PANEL && out.cs == 1 {
                single(acts, &self.sums, row, bytes, out.at(row, panel * PANEL));
            } else {
                let mut full = [0.0; PANEL];
                single(acts, &self.sums, row, bytes, full.as_mut_ptr());
                (0..cols).for_each(|j| *out.at(row, panel * PANEL + j) = full[j]);
            }
        }
    }

    /// Some rows times one or two panels, unpacked first.
    fn unit(&self, cpu: Cpu, acts: &Acts, first: usize, rows: Range<usize>) {
        let (w, tiles, out) = (self.weight(), &self.tiles, self.target.out);
        let panels = (w.panels() - first).min(tiles.panels);
        let cols = (w.rows() - first * PANEL).min(panels * PANEL);
        let blocks = acts.blocks;
        let mut codes = Scratch::of::<u8>(panels * blocks * CODES);
        let len = blocks * self.parts * PANEL;
        let mut scales = Scratch::of::<f32>(panels * 2 * len);
        let panel = |p: usize, codes: *mut u8, scales: *mut f32| Panel {
            codes: codes.wrapping_add(p * blocks * CODES),
            d: scales.wrapping_add(2 * p * len),
            m: scales.wrapping_add((2 * p + 1) * len),
        };
        let tile_panels = [0, panels - 1].map(|p| panel(p, codes.ptr(), scales.ptr()));
        for p in 0..panels {
            // SAFETY: the scratch has room for `panels` panels of `blocks` blocks.
            unsafe {
                unpack::unpack(
                    cpu,
                    w.dtype(),
                    w.panel_from(first + p, 0),
                    blocks,
                    &tile_panels[p],
                    tiles.signed,
                )
            };
        }
        let direct = cols == panels * PANEL && out.cs == 1;
        let mut full = [0.0f32; MAX_STRIP * 2 * PANEL];
        for row in rows.clone().step_by(tiles.strip) {
            let n = (rows.end - row).min(tiles.strip);
            let (to, ldo) = match direct {
                true => (out.at(row, first * PANEL), out.rs),
                false => (full.as_mut_ptr(), 2 * PANEL),
            };
            let args = Args { acts, row, sums: self.sums, panels: tile_panels, out: to, ldo };
            // SAFETY: panels are unpacked above, activations rounded before; results go to `full` or to this task's
            // own part of the output; `Context` vouches for the instructions.
            unsafe {
                tiles.table[panels - 1][n - 1](&args);
                if !direct {
                    for i in 0..n * cols {
                        let (i, j) = (i / cols, i % cols);
                        *out.at(row + i, first * PANEL + j) = full[i * 2 * PANEL + j];
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Precision;
    use crate::matmul::tests::numbers;
    use crate::weight::tests::{halves, product, types, weight};

    fn integer_types() -> impl Iterator<Item = DType> {
        types().filter(|&d| Format::of(d).is_some())
    }

    /// Each version gives the scalar one's bits, at sizes around every strip and panel.
    #[test]
    fn every_version_gives_the_same_bits() {
        for dtype in integer_types() {
            for (m, n, blocks) in [
                (1, 1, 1),
                (1, 33, 5),
                (2, 16, 2),
                (3, 15, 3),
                (5, 47, 1),
                (6, 64, 2),
                (7, 40, 7),
                (530, 17, 1),
            ] {
                let k = blocks * dtype.block_len();
                let w = Weight::pack(dtype, n, k, &weight(dtype, n, k, 21).0).unwrap();
                let mut a = numbers(m * k, 22);
                a[..k.min(64)].iter_mut().for_each(|x| *x *= 1e4); // blocks of very different size
                let want = product(Cpu::SCALAR, 1, &a, m, &[&w], Precision::Int8);
                for cpu in Cpu::all() {
                    let got = product(cpu, 2, &a, m, &[&w], Precision::Int8);
                    assert!(got == want, "{dtype} {m} {n} {k} {cpu}");
                }
            }
        }
    }

    /// The largest codes times the largest activations: no version's narrow sums overflow.
    #[test]
    fn extreme_codes_and_activations() {
        for dtype in integer_types() {
            let (n, k) = (17, 512);
            let encoded = weight(dtype, n, k, 27).0;
            for fill in [0x00, 0x7F, 0x80, 0xFF] {
                let mut bytes = vec![fill; encoded.len()];
                let len = dtype.block_bytes();
                for (block, encoded) in bytes.chunks_mut(len).zip(encoded.chunks(len)) {
                    halves(dtype)
                        .iter()
                        .for_each(|&at| block[at..at + 2].copy_from_slice(&encoded[at..at + 2]));
                }
                let w = Weight::pack(dtype, n, k, &bytes).unwrap();
                for m in [1, 5] {
                    let a: Vec<f32> = (0..m * k).map(|i| if i / 64 % 3 == 1 { -2.0 } else { 2.0 }).collect();
                    let want = product(Cpu::SCALAR, 1, &a, m, &[&w], Precision::Int8);
                    assert!(want[0].iter().all(|v| v.is_finite()), "{dtype} {fill}");
                    for cpu in Cpu::all() {
                        let got = product(cpu, 1, &a, m, &[&w], Precision::Int8);
                        assert!(got == want, "{dtype} {fill:x} {m} {cpu}");
                    }
                }
            }
        }
    }

    /// Against exact sums: each activation is off by at most half a step of its block, `amax / 254`; one percent is
    /// for the rounding of scales and of `x / d`, and `(6 k / 32 + 3) 2^-24` of the terms for the chain in f32.
    #[test]
    fn the_error_is_that_of_rounded_activations() {
        for dtype in integer_types() {
            let (m, n, k) = (4, 20, 512);
            let (bytes, decoded) = weight(dtype, n, k, 23);
            let w = Weight::pack(dtype, n, k, &bytes).unwrap();
            let a = numbers(m * k, 24);
            let got = &product(Cpu::detect(), 1, &a, m, &[&w], Precision::Int8)[0];
            for i in 0..m * n {
                let (x, w) = (&a[i / n * k..][..k], &decoded[i % n * k..][..k]);
                let (mut sum, mut bound, mut terms) = (0.0f64, 0.0f64, 0.0f64);
                // The minimum's and the code's part round on their own, so the terms count without cancelling: a
                // weight is at most this far from its minimum.
                let spread = w.iter().fold(0.0f32, |m, v| m.max(v.abs())) as f64 * 2.0;
                for (x, w) in x.chunks(32).zip(w.chunks(32)) {
                    let amax = x.iter().fold(0.0f32, |m, v| m.max(v.abs())) as f64;
                    for (&x, &w) in x.iter().zip(w) {
                        sum += x as f64 * w as f64;
                        terms += (x as f64 * w as f64).abs();
                        bound += amax / 254.0 * 1.01 * w.abs() as f64;
                        bound += (6 * k / 32 + 3) as f64 * 6e-8 * amax * spread;
                    }
                }
                let e = (got[i] as f64 - sum).abs();
                assert!(e <= bound, "{dtype} {i}: {} not {sum} ({e:e}, {bound:e})", got[i]);
                assert!(bound < 0.02 * terms, "{dtype}: a bound that says nothing");
            }
        }
    }

    #[test]
    fn odd_activations() {
        let k = 96;
        let (bytes, decoded) = weight(DType::Q8_0, 1, k, 25);
        let w = Weight::pack(DType::Q8_0, 1, k, &bytes).unwrap();
        for cpu in Cpu::all() {
            let mut a = vec![0.0; 5 * k];
            a[k + 3] = 1e-40; // row 1: too small to have a scale
            a[2 * k + 40] = f32::INFINITY;
            a[3 * k + 70] = f32::NAN;
            a[4 * k + 95] = -3e34;
            let got = &product(cpu, 1, &a, 5, &[&w], Precision::Int8)[0];
            assert_eq!(got[..2], [0.0, 0.0]);
            assert!(got[2].is_nan() && got[3].is_nan(), "{cpu}: {got:?}");
            let want = -3e34 * decoded[95];
            assert!((got[4] - want).abs() <= 1e-6 * want.abs(), "{cpu}: {} not {want}", got[4]);
        }
    }
}
