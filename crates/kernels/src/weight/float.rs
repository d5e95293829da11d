//! Products with packed weights whose activations stay f32 (or bf16): panels decoded block by block of K into a
//! scratch that stays in cache, then the register tiles of [`crate::matmul`].
//!
//! Same blocks of K, same chains: row by row the same bits as [`crate::matmul::matmul`] with the decoded weight.

use super::Target;
use crate::Cpu;
use crate::Pool;
use crate::matmul::pack::{Lanes, Packing, Words, pack};
use crate::matmul::scratch::{Scratch, Shared};
use crate::matmul::tile::{Args, PANEL, Tiles};
use crate::matmul::{Block, Right, SERIAL, block_of_k, tasks};
use sparsam_dtype::DType;

/// Rows of activations packed at a time: at K = 1536 6 MiB; a multiple of every strip.
const ROWS: usize = 1020;

/// What all tasks of one product share.
pub(super) struct Float<'a> {
    pub pool: &'a Pool,
    pub cpu: Cpu,
    pub tiles: Tiles,
    pub packing: Packing,
    /// Rows of activations.
    pub a: Lanes,
    pub m: usize,
    /// Columns of every weight; at least 1.
    pub k: usize,
}

impl Float<'_> {
    /// Computes all targets in one region (two where activations must be packed).
    pub fn run(&self, targets: &[Target]) {
        let &Float { m, k, tiles, packing, .. } = self;
        let kb = block_of_k(packing);
        let ends: Vec<usize> = targets
            .iter()
            .scan(0, |end, t| {
                *end += t.weight.panels().div_ceil(tiles.panels);
                Some(*end)
            })
            .collect();
        let units = ends.last().copied().unwrap_or(0);
        let rows: usize = targets.iter().map(|t| t.weight.rows()).sum();
        let parallel = m * k * rows > SERIAL;
        // A single f32 row is its own strip.
        let direct =
            m == 1 && packing.words == Words::F32 && self.a.dtype == DType::F32 && (self.a.k == 1 || k == 1);
        let row_steps = packing.steps(k.min(kb)) * k.div_ceil(kb);
        let mut scratch = Scratch::of::<f32>(if direct { 0 } else { m.min(ROWS) * row_steps });
        let a_pack = scratch.shared::<f32>();
        for m0 in (0..m).step_by(ROWS) {
            let mc = (m - m0).min(ROWS);
            let strips = mc.div_ceil(tiles.strip);
            if !direct {
                tasks(self.pool, parallel && mc > tiles.strip, strips, |s| {
                    let row = s * tiles.strip;
                    let rows = (mc - row).min(tiles.strip);
                    for k0 in (0..k).step_by(kb) {
                        let kc = (k - k0).min(kb);
                        let steps = packing.steps(kc);
                        let dst = a_pack.at(mc * packing.steps(k0) + row * steps);
                        // SAFETY: rows and columns lie within A; each strip and block has its own place.
                        unsafe { pack(&self.a.at(m0 + row, k0), rows, kc, dst, rows, packing) };
                    }
                });
            }
            // Few units a task where rows are few: a region then lasts some microseconds only.
            let per_task = if mc > 8 { 1 } else { units.div_ceil(8 * self.pool.threads()).max(1) };
            tasks(self.pool, parallel, units.div_ceil(per_task), |t| {
                for unit in t * per_task..units.min((t + 1) * per_task) {
                    let i = ends.partition_point(|&e| e <= unit);
                    let first = (unit - if i == 0 { 0 } else { ends[i - 1] }) * tiles.panels;
                    let a = |row: usize, k0: usize, steps: usize| match direct {
                        true => self.a.at(m0, k0).ptr.cast::<f32>(),
                        false => a_pack.at(mc * packing.steps(k0) + row * steps).cast_const(),
                    };
                    self.unit(&targets[i], first, m0, mc, &a);
                }
            });
        }
    }

    /// Rows `m0 .. m0 + mc` times one or two panels.
    fn unit(
        &self,
        target: &Target,
        first: usize,
        m0: usize,
        mc: usize,
        a: &dyn Fn(usize, usize, usize) -> *const f32,
    ) {
        let &Float { k, tiles, packing, .. } = self;
        let w = target.weight;
        let panels = (w.panels() - first).min(tiles.panels);
        let cols = (w.rows() - first * PANEL).min(panels * PANEL);
        let kb = block_of_k(packing);
        let in_place = match packing.words {
            Words::F32 => w.dtype() == DType::F32,
            Words::Pairs => w.dtype() == DType::BF16,
            Words::Rounded => false,
        };
        let room = if in_place { 0 } else { PANEL * k.min(kb) };
        let (mut decoded, mut scratch) = (Scratch::of::<f32>(room), Scratch::of::<f32>(panels * room));
        for k0 in (0..k).step_by(kb) {
            let kc = (k - k0).min(kb);
            let steps = packing.steps(kc);
            let (b, b_panel) = if in_place {
                (w.panel_from(first, k0).as_ptr().cast::<f32>(), w.panel_bytes() / 4)
            } else {
                for p in 0..panels {
                    let to = scratch.ptr::<f32>().wrapping_add(p * steps * PANEL);
                    let f32s = packing.words == Words::F32;
                    let out = if f32s { to } else { decoded.ptr() };
                    // SAFETY: both buffers have room for `kc` elements of 16 rows.
                    let out = unsafe { std::slice::from_raw_parts_mut(out, kc * PANEL) };
                    w.decode_panel(self.cpu, first + p, k0, kc, out);
                    if !f32s {
                        let src = Lanes { ptr: out.as_ptr().cast(), dtype: DType::F32, lane: 1, k: PANEL };
                        // SAFETY: as above.
                        unsafe { pack(&src, PANEL, kc, to, PANEL, packing) };
                    }
                }
                (scratch.ptr::<f32>().cast_const(), steps * PANEL)
            };
            for row in (0..mc).step_by(tiles.strip) {
                let args = Args {
                    steps,
                    a: a(row, k0, steps),
                    b,
                    b_panel,
                    b_step: PANEL,
                    c: target.out.at(m0 + row, first * PANEL),
                    ldc: target.out.rs,
                    add: k0 > 0,
                };
                // SAFETY: strips are packed, panels decoded or in place; the tile of C lies within the output,
                // checked at the door, and belongs to this task alone; `Context` vouches for the instructions.
                unsafe { tiles.run(&args, (mc - row).min(tiles.strip), cols, target.out.cs) };
            }
        }
    }
}

/// A weight as the right operand of a plain product: its rows run along the sum.
#[derive(Clone, Copy)]
pub(super) struct Transposed<'a> {
    pub weight: &'a super::Weight,
    pub cpu: Cpu,
}

impl Right for Transposed<'_> {
    /// One task for each panel of rows.
    fn tasks(&self, _: usize, kc: usize) -> usize {
        kc.div_ceil(PANEL)
    }

    fn pack(&self, task: usize, block: &Block, dst: Shared<f32>, packing: Packing) {
        let &Block { n0, nc, k0, kc } = block;
        let w = self.weight;
        let mut scratch = Scratch::of::<f32>(nc * PANEL);
        let rows: &mut [f32] = &mut bytemuck::cast_slice_mut(scratch.bytes_mut())[..nc * PANEL];
        w.decode_panel(self.cpu, k0 / PANEL + task, n0, nc, rows);
        let steps = packing.steps(kc);
        let first = task * PANEL; // even: pairs never straddle tasks
        for j in (0..nc).step_by(PANEL) {
            let columns = rows[j * PANEL..].as_ptr().cast();
            let src = Lanes { ptr: columns, dtype: DType::F32, lane: PANEL, k: 1 };
            let to = dst.at(j * steps + packing.steps(first) * PANEL);
            // SAFETY: 16 x 16 numbers are decoded, or as many as there are columns; the scratch has room for all
            // panels of `nc` columns, and these steps are this task's own.
            unsafe { pack(&src, (nc - j).min(PANEL), (kc - first).min(PANEL), to, PANEL, packing) };
        }
    }
}
