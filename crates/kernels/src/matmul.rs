//! Products of plain matrices: `out[m, n] = sum over k of a[m, k] b[k, n]`, batched, with any strides.
//!
//! The classic packed skeleton (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication",
//! ACM TOMS 34(3), 2008, section 4): K is cut into blocks of [`KC`] steps; of each block, A is packed into strips
//! of a few rows and B into panels of 16 columns, and register tiles ([`tile`]) run over them. The block length is
//! fixed and every element of the result is one chain of multiply-adds per block, the blocks added in order, so a
//! row's result depends neither on the other rows nor on threads, and blocks bound the error's growth with K.
//!
//! f32 sums always. [`Precision::Bf16`] rounds both operands to bf16 while packing; where the machine has AVX-512
//! BF16 its pair products run at twice the speed of f32, elsewhere the rounded numbers go through the f32 tiles.
//! [`Precision::Int8`] means something for packed weights only ([`crate::weight`]) and is f32 here.

pub(crate) mod pack;
#[cfg(target_arch = "x86_64")]
mod pack_x86;
pub(crate) mod scratch;
pub(crate) mod tile;

use crate::mem::Ptr;
use crate::{Context, Error, Memory, Pool, Precision, View};
use pack::{Lanes, Packing, Words, pack_groups};
use scratch::{Scratch, Shared};
use sparsam_dtype::{DType, Layout};
use tile::{Args, PANEL, Tiles};

/// Steps of one block of K. A strip of 12 rows is then 36 KiB and streams through L1, two panels of B are 96 KiB
/// and stay in L2; each block loads and stores C once, and K is a multiple of 768 in GPT-2. Being part of the result's rounding, it is the same for every machine. A
/// multiple of the longest rounded block (256).
pub(crate) const KC: usize = 768;

/// Columns of B packed at a time: at [`KC`] steps 9 MiB, which stays in the L3 of current machines.
const NC: usize = 3072;

/// Rows of A packed at a time; 4.5 MiB at [`KC`] steps, a multiple of every strip. No less is packed with more of them.
const MC: usize = 12 * 128;

/// Strips of one task: 96 rows or 288 KiB of A, which with the panels stays in a 1 MiB L2.
const TASK_STRIPS: usize = 8;

/// Panels of one task: 128 columns or 384 KiB of B.
const TASK_PANELS: usize = 8;

/// Products of at most this many multiplications run on the calling thread: about 3 microseconds' worth.
pub(crate) const SERIAL: usize = 1 << 17;

/// A result to be written: address and strides.
#[derive(Clone, Copy)]
pub(crate) struct Out {
    /// Element `[0, 0]`.
    pub ptr: Ptr,
    /// Elements from one row to the next.
    pub rs: usize,
    /// Elements from one column to the next.
    pub cs: usize,
}

impl Out {
    /// Address of element `[row, col]`.
    pub fn at(&self, row: usize, col: usize) -> *mut f32 {
        self.ptr.0.cast::<f32>().wrapping_add(row * self.rs + col * self.cs)
    }
}

/// What a product does with what its output holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Replaces it.
    Set,
    /// Adds to it: block by block of K, as if it were one longer sum.
    Add,
}

/// Computes `out` (.., M, N) f32 = `a` (.., M, K) times `b` (.., K, N).
///
/// Leading axes are equal; strides are free (a transpose is a pair of strides, a repeated operand has stride 0);
/// operands are F32, F16 or BF16. With K = 0 the result is 0.
///
/// # Errors
/// [`Error::Shape`] for shapes that do not fit, [`Error::View`] for other element types or an output that holds
/// one element twice, and what [`Memory`] finds wrong with the views.
pub fn matmul(
    ctx: &Context,
    mem: &mut Memory,
    out: &View,
    a: &View,
    b: &View,
    precision: Precision,
    write: Write,
) -> Result<(), Error> {
    let ([o], [pa, pb]) = mem.resolve([out], [a, b], false)?;
    for v in [a, b] {
        check_float(v)?;
    }
    check_out(out)?;
    let (lo, la, lb) = (&out.layout, &a.layout, &b.layout);
    let rank = lo.shape.len();
    let fits = rank >= 2 && la.shape.len() == rank && lb.shape.len() == rank && {
        let (m, k, n) = (la.shape[rank - 2], la.shape[rank - 1], lb.shape[rank - 1]);
        let batch = &lo.shape[..rank - 2];
        lb.shape[rank - 2] == k
            && lo.shape[rank - 2..] == [m, n]
            && la.shape[..rank - 2] == *batch
            && lb.shape[..rank - 2] == *batch
    };
    if !fits {
        let what = format!("{:?} times {:?} does not give {:?}", la.shape, lb.shape, lo.shape);
        return Err(Error::Shape { op: "matmul", what });
    }
    let batch: usize = lo.shape[..rank - 2].iter().product();
    let (row, col) = (rank - 2, rank - 1);
    let base = Out { ptr: o, rs: 1, cs: 1 };
    let one = |i: usize| {
        let at = |l: &Layout| offset(l, &lo.shape[..row], i);
        let lanes = |p: Ptr, v: &View, lane: usize, k: usize| {
            let bytes = at(&v.layout) * v.dtype.block_bytes();
            let l = &v.layout;
            Lanes { ptr: p.0.wrapping_add(bytes), dtype: v.dtype, lane: l.strides[lane], k: l.strides[k] }
        };
        let ptr = Ptr(base.at(at(lo), 0).cast());
        Product {
            m: lo.shape[row],
            n: lo.shape[col],
            k: la.shape[col],
            out: Out { ptr, rs: lo.strides[row], cs: lo.strides[col] },
            a: lanes(pa, a, row, col),
            b: lanes(pb, b, col, row),
            add: write == Write::Add,
        }
    };
    let (tiles, packing) = choose(ctx, precision);
    if batch >= ctx.pool().threads() && batch > 1 {
        // Whole products side by side, a few of them in each task where they are many.
        let work = lo.numel() * la.shape[col];
        let tasks = if work <= SERIAL { 1 } else { batch.min(64) };
        ctx.pool().run(tasks, |t| {
            for i in t * batch / tasks..(t + 1) * batch / tasks {
                one(i).along_rows().run(ctx.pool(), &tiles, packing);
            }
        });
    } else {
        for i in 0..batch {
            one(i).along_rows().run(ctx.pool(), &tiles, packing);
        }
    }
    Ok(())
}

/// The tiles and the packing for a precision.
pub(crate) fn choose(ctx: &Context, precision: Precision) -> (Tiles, Packing) {
    let tiles = Tiles::new(ctx.cpu(), precision == Precision::Bf16);
    let words = match precision {
        Precision::Bf16 if tiles.bf16 => Words::Pairs,
        Precision::Bf16 => Words::Rounded,
        Precision::F32 | Precision::Int8 => Words::F32,
    };
    (tiles, Packing { words, cpu: ctx.cpu() })
}

/// Elements of block `k0 ..` of K, of [`KC`] steps each.
pub(crate) fn block_of_k(packing: Packing) -> usize {
    if packing.words == Words::Pairs { 2 * KC } else { KC }
}

pub(crate) fn check_float(v: &View) -> Result<(), Error> {
    match v.dtype {
        DType::F32 | DType::F16 | DType::BF16 => Ok(()),
        _ => Err(Error::View { want: "F32, F16 or BF16 operands", view: Box::new(v.clone()) }),
    }
}

/// Results are f32 and every element of them is one of its own.
pub(crate) fn check_out(v: &View) -> Result<(), Error> {
    let mut axes: Vec<(usize, usize)> =
        v.layout.strides.iter().copied().zip(v.layout.shape.iter().copied()).filter(|a| a.1 > 1).collect();
    axes.sort_unstable();
    let mut end = 0; // one below the number of elements that the smaller strides span
    let distinct = axes.iter().all(|&(stride, n)| {
        let apart = stride > end;
        end += stride * (n - 1);
        apart
    });
    if v.dtype != DType::F32 || !(distinct || v.layout.numel() == 0) {
        return Err(Error::View {
            want: "an F32 output without repeated elements",
            view: Box::new(v.clone()),
        });
    }
    Ok(())
}

/// Elements from the start of `l` to item `i` of its leading axes of the given shape.
fn offset(l: &Layout, shape: &[usize], mut i: usize) -> usize {
    let mut at = 0;
    for (axis, &n) in shape.iter().enumerate().rev() {
        at += i % n * l.strides[axis];
        i /= n;
    }
    at
}

/// A block of the right operand: columns `n0 .. n0 + nc`, elements `k0 .. k0 + kc` of the sum.
pub(crate) struct Block {
    pub n0: usize,
    pub nc: usize,
    pub k0: usize,
    pub kc: usize,
}

/// A right operand: anything that can be packed into panels block by block.
pub(crate) trait Right: Copy + Sync {
    /// Into how many tasks packing a block of `nc` columns and `kc` elements falls.
    fn tasks(&self, nc: usize, kc: usize) -> usize;
    /// Packs one task's part of a block into `[panel][step][16]`.
    fn pack(&self, task: usize, block: &Block, dst: Shared<f32>, packing: Packing);
}

impl Right for Lanes {
    fn tasks(&self, nc: usize, _: usize) -> usize {
        nc.div_ceil(PANEL * TASK_PANELS)
    }

    fn pack(&self, task: usize, block: &Block, dst: Shared<f32>, packing: Packing) {
        let first = task * TASK_PANELS * PANEL;
        let last = block.nc.min(first + TASK_PANELS * PANEL);
        let src = self.at(block.n0 + first, block.k0);
        let steps = packing.steps(block.kc);
        let group = |g: usize| (dst.at((first + g * PANEL) * steps), PANEL);
        // SAFETY: the lanes lie within B; each panel has its own part of the scratch.
        unsafe { pack_groups(&src, (last - first, PANEL), block.kc, group, packing) };
    }
}

/// One product of two matrices.
#[derive(Clone, Copy)]
pub(crate) struct Product<B> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub out: Out,
    /// Lanes are rows.
    pub a: Lanes,
    /// Lanes are columns.
    pub b: B,
    /// Whether the product is added to what `out` holds.
    pub add: bool,
}

impl Product<Lanes> {
    /// The two operands are alike: swapped, they give the transposed result, bit for bit. So a result that lies
    /// column by column is computed as its transpose.
    fn along_rows(self) -> Self {
        if self.out.cs == 1 || self.out.rs != 1 {
            return self;
        }
        let out = Out { rs: self.out.cs, cs: self.out.rs, ..self.out };
        Product { m: self.n, n: self.m, out, a: self.b, b: self.a, ..self }
    }

    /// The same numbers either way.
    fn run(&self, pool: &Pool, tiles: &Tiles, packing: Packing) {
        let (short, long) = (self.m.min(self.n), self.m.max(self.n));
        if short > 0 && short <= NARROW && long >= 4 * NARROW && self.k > 0 {
            narrow(pool, self, tiles, packing);
        } else {
            product(pool, self, tiles, packing);
        }
    }
}

/// Rows or columns of a product with a narrow side, as an adapter's.
const NARROW: usize = 2 * PANEL;

/// Strips, or pairs of panels, of the long side that a task of a narrow product packs and uses.
const NARROW_TASK: usize = 2;

/// A product with few rows or few columns: so little is done with each element of the long side that writing it out
/// packed, and reading it again, would take longer than the product. So each task packs its own part of it, into a
/// scratch that stays in cache; the narrow side is packed once for all.
fn narrow(pool: &Pool, p: &Product<Lanes>, tiles: &Tiles, packing: Packing) {
    let &Product { m, n, k, out, add, .. } = p;
    let (kb, strip) = (block_of_k(packing), tiles.strip);
    let rows_are_long = m >= n;
    let width = if rows_are_long { n.next_multiple_of(PANEL) } else { m };
    let all_steps = packing.steps(k / kb * kb) + packing.steps(k % kb);
    let mut short = Scratch::of::<f32>(width * all_steps);
    let short = short.shared::<f32>();
    for k0 in (0..k).step_by(kb) {
        let kc = (k - k0).min(kb);
        let (steps, at) = (packing.steps(kc), width * packing.steps(k0));
        // SAFETY: the lanes lie within A or B; each group and block has its own part of the scratch.
        unsafe {
            if rows_are_long {
                let group = |g: usize| (short.at(at + g * PANEL * steps), PANEL);
                pack_groups(&p.b.at(0, k0), (n, PANEL), kc, group, packing);
            } else {
                let group = |g: usize| (short.at(at + g * strip * steps), (m - g * strip).min(strip));
                pack_groups(&p.a.at(0, k0), (m, strip), kc, group, packing);
            }
        }
    }
    // Rows or columns of a task, and of a group in it.
    let (long, group) = if rows_are_long { (m, strip) } else { (n, PANEL) };
    let each = NARROW_TASK * if rows_are_long { strip } else { tiles.panels * PANEL };
    tasks(pool, m * n * k > SERIAL, long.div_ceil(each), |t| {
        let first = t * each;
        let have = (long - first).min(each);
        let mut packed = Scratch::of::<f32>(have.next_multiple_of(group) * packing.steps(k.min(kb)));
        let packed = packed.shared::<f32>();
        let (m0, rows) = if rows_are_long { (first, have) } else { (0, m) };
        let (n0, cols) = if rows_are_long { (0, n) } else { (first, have) };
        for k0 in (0..k).step_by(kb) {
            let kc = (k - k0).min(kb);
            let steps = packing.steps(kc);
            let wide = |g: usize| if rows_are_long { (have - g * strip).min(strip) } else { PANEL };
            let to = |g: usize| (packed.at(g * group * steps), wide(g));
            let src = if rows_are_long { p.a.at(m0, k0) } else { p.b.at(n0, k0) };
            // SAFETY: the lanes lie within A or B; the scratch is this task's own.
            unsafe { pack_groups(&src, (have, group), kc, to, packing) };
            let short = short.at(width * packing.steps(k0));
            let (a, b) = if rows_are_long { (packed.at(0), short) } else { (short, packed.at(0)) };
            for col in (0..cols).step_by(tiles.panels * PANEL) {
                for row in (0..rows).step_by(strip) {
                    let args = Args {
                        steps,
                        a: a.wrapping_add(row * steps),
                        b: b.wrapping_add(col * steps),
                        b_panel: PANEL * steps,
                        b_step: PANEL,
                        c: out.at(m0 + row, n0 + col),
                        ldc: out.rs,
                        add: add || k0 > 0,
                    };
                    let (rows, cols) = ((rows - row).min(strip), (cols - col).min(tiles.panels * PANEL));
                    // SAFETY: strips and panels were packed above; the tile of C lies within the output and belongs
                    // to this task alone; `Context` vouches for the instructions.
                    unsafe { tiles.run(&args, rows, cols, out.cs) };
                }
            }
        }
    });
}

/// Runs tasks in a region, or one after the other where a region would cost more than it gives.
pub(crate) fn tasks(pool: &Pool, parallel: bool, n: usize, task: impl Fn(usize) + Sync) {
    if parallel { pool.run(n, task) } else { (0..n).for_each(task) }
}

/// Sets `rows` x `cols` elements to 0.
pub(crate) fn clear(out: Out, rows: usize, cols: usize) {
    for i in 0..rows {
        for j in 0..cols {
            // SAFETY: the output has `rows` x `cols` elements, checked at the door.
            unsafe { *out.at(i, j) = 0.0 };
        }
    }
}

/// The block loops. Packed blocks are made in one region and used in the next.
pub(crate) fn product<B: Right>(pool: &Pool, p: &Product<B>, tiles: &Tiles, packing: Packing) {
    if p.m == 0 || p.n == 0 {
        return;
    }
    if p.k == 0 && p.add {
        return;
    }
    if p.k == 0 {
        return clear(p.out, p.m, p.n);
    }
    let &Product { m, n, k, out, add, .. } = p;
    let parallel = m * n * k > SERIAL;
    let kb = block_of_k(packing);
    let max_steps = packing.steps(k.min(kb));
    let mut a_scratch = Scratch::of::<f32>(m.min(MC) * max_steps);
    let mut b_scratch = Scratch::of::<f32>(n.min(NC).next_multiple_of(PANEL) * max_steps);
    let (a_pack, b_pack) = (a_scratch.shared::<f32>(), b_scratch.shared::<f32>());
    for n0 in (0..n).step_by(NC) {
        let nc = (n - n0).min(NC);
        let panels = nc.div_ceil(PANEL);
        for k0 in (0..k).step_by(kb) {
            let kc = (k - k0).min(kb);
            let steps = packing.steps(kc);
            for m0 in (0..m).step_by(MC) {
                let mc = (m - m0).min(MC);
                let strips = mc.div_ceil(tiles.strip);
                let a_tasks = strips.div_ceil(TASK_STRIPS);
                let block = Block { n0, nc, k0, kc };
                let b_tasks = if m0 == 0 { p.b.tasks(nc, kc) } else { 0 };
                tasks(pool, parallel, a_tasks + b_tasks, |t| {
                    if t < b_tasks {
                        p.b.pack(t, &block, b_pack, packing);
                    } else {
                        let t = t - b_tasks;
                        let first = t * TASK_STRIPS * tiles.strip;
                        let rows = (mc - first).min(TASK_STRIPS * tiles.strip);
                        let strip = |g: usize| {
                            let row = first + g * tiles.strip;
                            (a_pack.at(row * steps), (mc - row).min(tiles.strip))
                        };
                        let src = p.a.at(m0 + first, k0);
                        // SAFETY: the lanes lie within A; each strip has its own part of the scratch.
                        unsafe { pack_groups(&src, (rows, tiles.strip), kc, strip, packing) };
                    }
                });
                let n_tasks = panels.div_ceil(TASK_PANELS);
                tasks(pool, parallel, strips.div_ceil(TASK_STRIPS) * n_tasks, |t| {
                    let (si, pi) = (t / n_tasks * TASK_STRIPS, t % n_tasks * TASK_PANELS);
                    let last = panels.min(pi + TASK_PANELS);
                    for panel in (pi..last).step_by(tiles.panels) {
                        let col = panel * PANEL;
                        let cols = (nc.min(last * PANEL) - col).min(tiles.panels * PANEL);
                        for strip in si..strips.min(si + TASK_STRIPS) {
                            let row = strip * tiles.strip;
                            let args = Args {
                                steps,
                                a: a_pack.at(row * steps),
                                b: b_pack.at(col * steps),
                                b_panel: PANEL * steps,
                                b_step: PANEL,
                                c: out.at(m0 + row, n0 + col),
                                ldc: out.rs,
                                add: add || k0 > 0,
                            };
                            let rows = (mc - row).min(tiles.strip);
                            // SAFETY: strip and panels were packed above; the tile of C lies within the output
                            // and belongs to this task alone; `Context` vouches for the instructions.
                            unsafe { tiles.run(&args, rows, cols, out.cs) };
                        }
                    }
                });
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
