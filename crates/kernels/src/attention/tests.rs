//! One `check` holds all paths to the reference in f64, over awkward sizes and every layout of keys.

use super::*;
use crate::Cpu;
use sparsam_dtype::codec::encode;
use std::ops::Range;

/// Numbers in [-1, 1) from a fixed stream.
pub(super) struct Rng(pub u64);

impl Rng {
    pub(super) fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as u32
    }
    pub(super) fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }
    pub(super) fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next() as f32 / (1u64 << 30) as f32 - 1.0).collect()
    }
}

/// A call in plain data: `sees[i]` lists the rows of k and v that row `i` sees.
#[derive(Clone)]
pub(super) struct Case {
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub v_dim: usize,
    /// Of keys and values.
    pub dtype: DType,
    pub q_dtype: DType,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub index: Index,
    pub scores: Scores,
}

#[derive(Clone, Debug)]
pub(super) enum Index {
    Packed { row_start: Vec<i32> },
    Paged { positions: Vec<i32>, row_seq: Vec<i32>, table: Vec<i32>, pages: usize, page_size: usize },
}

impl Index {
    fn rows(&self) -> usize {
        match self {
            Index::Packed { row_start } => row_start.len(),
            Index::Paged { positions, .. } => positions.len(),
        }
    }

    /// As `ir::interpret` says it.
    fn sees(&self, i: usize, window: Option<usize>) -> Vec<usize> {
        let all: Vec<usize> = match self {
            Index::Packed { row_start } => (row_start[i].max(0) as usize..i + 1).collect(),
            Index::Paged { row_seq, .. } if row_seq[i] == -1 => vec![],
            Index::Paged { positions, row_seq, table, pages, page_size } => (0..=positions[i])
                .map(|p| {
                    let page = table[row_seq[i] as usize * pages + p as usize / page_size];
                    page as usize * page_size + p as usize % page_size
                })
                .collect(),
        };
        all[window.map_or(0, |w| all.len().saturating_sub(w))..].to_vec()
    }
}

pub(super) fn i32s(mem: &mut Memory, x: &[i32], shape: &[usize]) -> View {
    let slab = mem.add_owned(x.len() * 4);
    mem.bytes_mut(slab).unwrap().copy_from_slice(bytemuck::cast_slice(x));
    View::contiguous(slab, DType::I32, shape)
}

/// A tensor in wider rows than it needs, at an offset, so that strides and alignment are never trivial.
pub(super) fn floats(mem: &mut Memory, dtype: DType, x: &[f32], shape: [usize; 3]) -> View {
    let mut view = View::contiguous(0, dtype, &shape);
    let block = dtype.block_len();
    let width = shape[1] * shape[2];
    let pitch = width + 3 * block;
    view.layout.strides = vec![pitch, shape[2], 1];
    view.layout.offset = block;
    let bytes = |n: usize| n / block * dtype.block_bytes();
    view.slab = mem.add_owned(bytes(view.layout.end() + (shape[0] + 4) * block));
    for i in 0..shape[0] {
        let at = bytes(block + i * pitch);
        let to = &mut mem.bytes_mut(view.slab).unwrap()[at..at + bytes(width)];
        encode(dtype, &x[i * width..][..width], to).unwrap();
    }
    view
}

pub(super) fn read(mem: &Memory, view: &View) -> Vec<f32> {
    let l = &view.layout;
    let all: &[f32] = bytemuck::cast_slice(mem.bytes(view.slab));
    let width: usize = l.shape[1..].iter().product();
    (0..l.shape[0]).flat_map(|i| all[l.offset + i * l.strides[0]..][..width].to_vec()).collect()
}

impl Case {
    pub(super) fn rows(&self) -> usize {
        self.index.rows()
    }

    pub(super) fn random(
        seed: u64,
        [heads, kv_heads, dim, v_dim]: [usize; 4],
        dtype: DType,
        index: Index,
        scores: Scores,
    ) -> Case {
        let mut rng = Rng(seed);
        let n = index.rows();
        let slots = match &index {
            Index::Packed { .. } => n,
            Index::Paged { table, page_size, .. } => table.len() * page_size,
        };
        // What the type can hold, so that rounding the inputs is no error of the kernel.
        let mut make = |count: usize, size: f32| -> Vec<f32> {
            let x: Vec<f32> = rng.floats(count).into_iter().map(|x| x * size).collect();
            let mut bytes = vec![0; dtype.bytes_for(count).unwrap()];
            encode(dtype, &x, &mut bytes).unwrap();
            let mut y = vec![0.0; count];
            sparsam_dtype::codec::decode(dtype, &bytes, &mut y).unwrap();
            y
        };
        Case {
            heads,
            kv_heads,
            dim,
            v_dim,
            dtype,
            // An engine has its cache alone in a narrow type.
            q_dtype: match index {
                Index::Packed { .. } if dtype == DType::BF16 => DType::BF16,
                _ => DType::F32,
            },
            q: make(n * heads * dim, 3.0),
            k: make(slots * kv_heads * dim, 3.0),
            v: make(slots * kv_heads * v_dim, 1.0),
            index,
            scores,
        }
    }

    /// The reference in `F`: out and lse.
    pub(super) fn truth<F: reference::Real>(&self) -> (Vec<F>, Vec<F>) {
        let to = |x: &[f32]| x.iter().map(|&x| F::from(x)).collect::<Vec<F>>();
        let (q, k, v) = (to(&self.q), to(&self.k), to(&self.v));
        let (mut out, mut lse) = (vec![], vec![]);
        for i in 0..self.rows() {
            let sees = self.index.sees(i, self.scores.window);
            for h in 0..self.heads {
                let g = h / (self.heads / self.kv_heads);
                let mut o = vec![F::from(0.0); self.v_dim];
                let row = |x: &[F], j: usize, width: usize, to: &mut [F]| {
                    to.copy_from_slice(&x[(sees[j] * self.kv_heads + g) * width..][..width]);
                };
                lse.push(reference::forward_row(
                    &q[(i * self.heads + h) * self.dim..][..self.dim],
                    sees.len(),
                    |j, to| row(&k, j, self.dim, to),
                    |j, to| row(&v, j, self.v_dim, to),
                    &self.scores,
                    &mut o,
                ));
                out.extend(o);
            }
        }
        (out, lse)
    }

    /// The kernel on rows `rows` of the case (all keys present): out and lse.
    pub(super) fn run(&self, ctx: &Context, rows: Range<usize>) -> (Vec<f32>, Vec<f32>) {
        let mut mem = Memory::new();
        let n = rows.len();
        let slots = self.k.len() / (self.kv_heads * self.dim).max(1);
        let q = &self.q[rows.start * self.heads * self.dim..rows.end * self.heads * self.dim];
        let q = floats(&mut mem, self.q_dtype, q, [n, self.heads, self.dim]);
        let k = floats(&mut mem, self.dtype, &self.k, [slots, self.kv_heads, self.dim]);
        let v = floats(&mut mem, self.dtype, &self.v, [slots, self.kv_heads, self.v_dim]);
        let out = floats(
            &mut mem,
            DType::F32,
            &vec![7.0; n * self.heads * self.v_dim],
            [n, self.heads, self.v_dim],
        );
        let slab = mem.add_owned(n * self.heads * 4);
        let lse = View::contiguous(slab, DType::F32, &[n, self.heads]);
        match &self.index {
            Index::Packed { row_start } => {
                assert_eq!(rows, 0..self.rows(), "packed calls have all rows");
                let row_start = i32s(&mut mem, row_start, &[n]);
                let a = Packed { q: &q, k: &k, v: &v, row_start: &row_start };
                packed(ctx, &mut mem, Some(&out), Some(&lse), a, &self.scores).unwrap();
            }
            Index::Paged { positions, row_seq, table, pages, page_size } => {
                let positions = i32s(&mut mem, &positions[rows.clone()], &[n]);
                let row_seq = i32s(&mut mem, &row_seq[rows.clone()], &[n]);
                let page_table = i32s(&mut mem, table, &[table.len() / pages, *pages]);
                let a = Paged {
                    q: &q,
                    k: &k,
                    v: &v,
                    positions: &positions,
                    row_seq: &row_seq,
                    page_table: &page_table,
                    page_size: *page_size,
                };
                paged(ctx, &mut mem, Some(&out), Some(&lse), a, &self.scores).unwrap();
            }
        }
        (read(&mem, &out), mem.f32(&lse).unwrap().to_vec())
    }
}

/// Largest difference over all elements, infinities having to agree.
pub(super) fn worst<F: Copy + Into<f64>>(got: &[F], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let diff = |(g, &w): (&F, &f64)| {
        let g: f64 = (*g).into();
        let d = if g == w { 0.0 } else { (g - w).abs() };
        assert!(!d.is_nan(), "{g} for {w}");
        d
    };
    got.iter().zip(want).map(diff).fold(0.0, f64::max)
}

/// Sequences of these lengths on one axis, each followed by `pad` rows of padding.
pub(super) fn packed_index(lengths: &[usize], pad: usize) -> Index {
    let mut row_start = vec![];
    for &n in lengths {
        let start = row_start.len() as i32;
        row_start.extend(vec![start; n]);
        row_start.extend(vec![i32::MAX; pad]);
    }
    Index::Packed { row_start }
}

/// For each sequence the last `rows` of `length` positions, in shuffled pages, `pad` rows of padding between them.
pub(super) fn paged_index(sequences: &[(usize, usize)], page_size: usize, pad: usize, seed: u64) -> Index {
    let pages = sequences.iter().map(|s| s.0).max().unwrap_or(0).div_ceil(page_size).max(1);
    let mut table: Vec<i32> = (0..(pages * sequences.len().max(1)) as i32).collect();
    let mut rng = Rng(seed);
    (1..table.len()).rev().for_each(|i| table.swap(i, rng.below(i + 1)));
    let (mut positions, mut row_seq) = (vec![], vec![]);
    for (s, &(length, rows)) in sequences.iter().enumerate() {
        positions.extend((length - rows..length).map(|p| p as i32));
        row_seq.extend(vec![s as i32; rows]);
        positions.extend(vec![3; pad]);
        row_seq.extend(vec![-1; pad]);
    }
    Index::Paged { positions, row_seq, table, pages, page_size }
}

const PLAIN: Scores = Scores { scale: 0.3, window: None, softcap: None };

fn largest(x: &[f64]) -> f64 {
    x.iter().filter(|x| x.is_finite()).fold(0.0, |m, x| m.max(x.abs()))
}

impl Case {
    /// A relative error that no f32 version can promise to stay below, for cases so small that the plain one does by
    /// luck: a score of size S is off by S eps at least once, and so is the logarithm of its weight. (S before the soft
    /// cap; the log-sum-exp is about the largest.)
    fn floor(&self) -> f64 {
        let uncapped = Case { scores: Scores { softcap: None, ..self.scores }, ..self.clone() };
        2.0 * (1.0 + largest(&uncapped.truth::<f64>().1)) * f64::from(f32::EPSILON)
    }
}

/// The kernel's error against f64 is at most twice that of plain f32, on every path and for 1 to 3 threads, all of
/// which give the same bits.
fn check(case: &Case) {
    let (out, lse) = case.truth::<f64>();
    let (plain_out, plain_lse) = case.truth::<f32>();
    let floor = case.floor();
    let bound = |plain: &[f32], truth: &[f64]| (2.0 * worst(plain, truth)).max(floor * largest(truth));
    for cpu in Cpu::all() {
        let mut first = None;
        for threads in 1..=3 {
            let got = case.run(&Context::new(threads, cpu), 0..case.rows());
            let what = format!(
                "{cpu}, {} heads of {} over {}, values {}, {}, {:?}",
                case.heads, case.dim, case.kv_heads, case.v_dim, case.dtype, case.scores
            );
            let (e, limit) = (worst(&got.0, &out), bound(&plain_out, &out));
            assert!(e <= limit, "out off by {e:e}, limit {limit:e}: {what}");
            let (e, limit) = (worst(&got.1, &lse), bound(&plain_lse, &lse));
            assert!(e <= limit, "lse off by {e:e}, limit {limit:e}: {what}");
            assert!(*first.get_or_insert(got.clone()) == got, "threads change bits: {what}");
        }
    }
}

#[test]
fn packed_equals_the_reference() {
    let shapes =
        [[1, 1, 1, 1], [4, 1, 16, 16], [3, 3, 64, 64], [4, 2, 80, 80], [2, 1, 128, 96], [6, 2, 7, 3]];
    for (s, shape) in shapes.into_iter().enumerate() {
        for lengths in [&[][..], &[1], &[3], &[15, 17], &[63, 1, 65], &[40, 258]] {
            for window in [None, Some(1), Some(20)] {
                let scores = Scores { window, softcap: (s % 2 == 1).then_some(2.0), ..PLAIN };
                check(&Case::random(s as u64, shape, DType::F32, packed_index(lengths, s % 3), scores));
            }
        }
    }
}

#[test]
fn paged_equals_the_reference() {
    let shapes = [[1, 1, 1, 1], [9, 3, 64, 64], [4, 4, 80, 80], [8, 2, 128, 128], [6, 2, 7, 3]];
    for (s, shape) in shapes.into_iter().enumerate() {
        for (page_size, sequences) in [
            (1, &[(1, 1)][..]),
            (16, &[(3, 2), (1, 1), (270, 1)]),
            (7, &[(64, 64), (65, 33)]),
            (512, &[(700, 1)]),
        ] {
            for (dtype, window) in [(DType::F32, None), (DType::F16, Some(40)), (DType::F16, None)] {
                let scores = Scores { window, softcap: (s % 2 == 1).then_some(5.0), ..PLAIN };
                let index = paged_index(sequences, page_size, s % 2, 5);
                check(&Case::random(s as u64, shape, dtype, index, scores));
            }
        }
    }
}

/// Keys and values in blocks of 8 bits give the same bits as what they decode to, which is held to the reference above.
#[test]
fn keys_in_blocks_equal_what_they_decode_to() {
    let shapes = [[1, 1, 32, 32], [9, 3, 64, 64], [8, 2, 128, 96], [2, 1, 64, 32], [5, 1, 32, 64]];
    for (s, shape) in shapes.into_iter().enumerate() {
        for (page_size, sequences) in [
            (1, &[(1, 1)][..]),
            (16, &[(3, 2), (1, 1), (270, 1)]),
            (7, &[(64, 64), (65, 33)]),
            (512, &[(700, 1)]),
        ] {
            for window in [None, Some(40)] {
                let scores = Scores { window, softcap: (s % 2 == 1).then_some(5.0), ..PLAIN };
                let index = paged_index(sequences, page_size, s % 2, 5);
                let blocks = Case::random(s as u64, shape, DType::Q8_0, index, scores);
                let plain = Case { dtype: DType::F32, ..blocks.clone() };
                for cpu in Cpu::all() {
                    let ctx = Context::new(2, cpu);
                    let (a, b) = (blocks.run(&ctx, 0..blocks.rows()), plain.run(&ctx, 0..plain.rows()));
                    assert!(a == b, "{cpu}: {shape:?} {window:?}");
                }
            }
        }
    }
}

#[test]
fn prompts_and_decoding_give_the_same_bits() {
    for cpu in Cpu::all() {
        let ctx = Context::new(2, cpu);
        for (shape, dtype, window) in [
            ([9, 3, 64, 64], DType::F16, None),
            ([9, 3, 64, 64], DType::Q8_0, None),
            ([2, 2, 16, 16], DType::F32, Some(300)),
        ] {
            let index = paged_index(&[(600, 600), (280, 9), (5, 1)], 16, 1, 3);
            let case = Case::random(1, shape, dtype, index, Scores { window, ..PLAIN });
            let (out, lse) = case.run(&ctx, 0..case.rows());
            let width = case.heads * case.v_dim;
            for rows in [0..1, 255..256, 256..257, 500..513, 598..612, 599..600, 601..602, 611..612] {
                let (o, l) = case.run(&ctx, rows.clone());
                assert_eq!(o, out[rows.start * width..rows.end * width], "{cpu} {rows:?}");
                assert_eq!(l, lse[rows.start * case.heads..rows.end * case.heads], "{cpu} {rows:?}");
            }
        }
    }
}

#[test]
fn sequences_do_not_see_each_other() {
    // A NaN in one sequence stays there.
    for cpu in Cpu::all() {
        let ctx = Context::new(2, cpu);
        let mut case = Case::random(2, [2, 1, 16, 16], DType::F32, packed_index(&[70, 30], 0), PLAIN);
        case.k[69 * 16] = f32::NAN;
        case.v[69 * 16 + 3] = f32::NAN;
        let (out, _) = case.run(&ctx, 0..100);
        assert!(out[70 * 32..].iter().all(|x| x.is_finite()));
        assert!(out[69 * 32..70 * 32].iter().any(|x| x.is_nan()), "NaN is not swallowed");
    }
}

#[test]
fn bad_calls_are_refused() {
    let ctx = Context::new(1, Cpu::SCALAR);
    let mut mem = Memory::new();
    let mut tensor =
        |shape: [usize; 3]| floats(&mut mem, DType::F32, &vec![0.0; shape.iter().product()], shape);
    let (q, k, v, wide) = (tensor([2, 4, 8]), tensor([8, 2, 8]), tensor([8, 2, 8]), tensor([8, 3, 8]));
    let mut ints = |x: &[i32], shape: &[usize]| i32s(&mut mem, x, shape);
    let (positions, far) = (ints(&[1, 2], &[2]), ints(&[1, 4], &[2]));
    let (row_seq, other) = (ints(&[0, 0], &[2]), ints(&[0, 1], &[2]));
    let (page_table, outside) = (ints(&[1, 0], &[1, 2]), ints(&[1, 4], &[1, 2]));
    let slab = mem.add_owned(2 * 4 * 8 * 4);
    let out = View::contiguous(slab, DType::F32, &[2, 4, 8]);
    let good = Paged {
        q: &q,
        k: &k,
        v: &v,
        positions: &positions,
        row_seq: &row_seq,
        page_table: &page_table,
        page_size: 2,
    };
    let mut run = |a: Paged| paged(&ctx, &mut mem, Some(&out), None, a, &PLAIN).map_err(|e| e.to_string());
    run(good).unwrap();
    let mut refused = |a: Paged, why: &str| {
        let e = run(a).unwrap_err();
        assert!(e.contains(why), "{e}");
    };
    refused(Paged { k: &wide, v: &wide, ..good }, "multiple of key heads");
    refused(Paged { v: &wide, ..good }, "must agree");
    refused(Paged { positions: &far, ..good }, "row 1: position 4 needs more than the table's 2 pages");
    refused(Paged { row_seq: &other, ..good }, "row 1: sequence 1 of a page table for 1");
    refused(Paged { page_table: &outside, ..good }, "sequence 0, page 1: id 4 of 4");
    refused(Paged { page_size: 3, ..good }, "want whole pages");
    // 8 numbers are no whole block.
    let blocks = View { dtype: DType::Q8_0, ..k.clone() };
    refused(Paged { k: &blocks, v: &blocks, ..good }, "whole blocks");
    refused(Paged { positions: &page_table, ..good }, "positions has shape [1, 2], want [2]");
    refused(Paged { q: &out, ..good }, "overlaps");
}

impl Case {
    fn visible(&self) -> Vec<Range<usize>> {
        let see = |i| self.index.sees(i, self.scores.window);
        (0..self.rows()).map(|i| see(i).first().map_or(0..0, |&first| first..i + 1)).collect()
    }

    /// The reference's gradients in `F` for the gradient `dout` of the result: dq, dk, dv.
    fn gradients<F: reference::Real>(&self, dout: &[f32]) -> [Vec<F>; 3] {
        let (out, lse) = self.truth::<F>();
        let (n, group) = (self.rows(), self.heads / self.kv_heads);
        let mut grads = [vec![], vec![], vec![]];
        let widths = [group * self.dim, self.dim, self.v_dim];
        for (grad, width) in grads.iter_mut().zip(widths) {
            grad.resize(n * self.kv_heads * width, F::from(0.0));
        }
        let visible = self.visible();
        // Columns of key head g out of rows of all heads.
        let part = |x: &[F], g: usize, width: usize| -> Vec<F> {
            x.chunks(self.kv_heads * width).flat_map(|row| row[g * width..(g + 1) * width].to_vec()).collect()
        };
        let to = |x: &[f32]| x.iter().map(|&x| F::from(x)).collect::<Vec<F>>();
        let (q, k, v, dout) = (to(&self.q), to(&self.k), to(&self.v), to(dout));
        for g in 0..self.kv_heads {
            let one = reference::backward(
                &reference::Group {
                    dim: self.dim,
                    v_dim: self.v_dim,
                    group,
                    q: &part(&q, g, group * self.dim),
                    k: &part(&k, g, self.dim),
                    v: &part(&v, g, self.v_dim),
                    out: &part(&out, g, group * self.v_dim),
                    lse: &part(&lse, g, group),
                    dout: &part(&dout, g, group * self.v_dim),
                    visible: &visible,
                },
                &self.scores,
            );
            for ((grad, one), width) in grads.iter_mut().zip(one).zip(widths) {
                for (i, row) in one.chunks(width).enumerate() {
                    grad[(i * self.kv_heads + g) * width..][..width].copy_from_slice(row);
                }
            }
        }
        grads
    }

    /// The kernel's gradients.
    fn run_backward(&self, ctx: &Context, dout: &[f32]) -> [Vec<f32>; 3] {
        let mut mem = Memory::new();
        let n = self.rows();
        let Index::Packed { row_start } = &self.index else { panic!("only packed calls have gradients") };
        let row_start = i32s(&mut mem, row_start, &[n]);
        let q = floats(&mut mem, self.q_dtype, &self.q, [n, self.heads, self.dim]);
        let k = floats(&mut mem, self.dtype, &self.k, [n, self.kv_heads, self.dim]);
        let v = floats(&mut mem, self.dtype, &self.v, [n, self.kv_heads, self.v_dim]);
        let shape = [n, self.heads, self.v_dim];
        let mut fresh =
            |x: f32, shape: [usize; 3]| floats(&mut mem, DType::F32, &vec![x; shape.iter().product()], shape);
        let out = fresh(7.0, shape);
        let grads = [q.layout.shape.clone(), k.layout.shape.clone(), v.layout.shape.clone()]
            .map(|s| fresh(7.0, [s[0], s[1], s[2]]));
        let dout = floats(&mut mem, DType::F32, dout, shape);
        let slab = mem.add_owned(n * self.heads * 4);
        let lse = View::contiguous(slab, DType::F32, &[n, self.heads]);
        let a = Packed { q: &q, k: &k, v: &v, row_start: &row_start };
        packed(ctx, &mut mem, Some(&out), Some(&lse), a, &self.scores).unwrap();
        let saved = Saved { out: &out, lse: &lse, dout: &dout };
        let [dq, dk, dv] = &grads;
        packed_backward(ctx, &mut mem, [dq, dk, dv], a, saved, &self.scores).unwrap();
        grads.map(|view| read(&mem, &view))
    }
}

#[test]
fn the_reference_gradient_equals_finite_differences() {
    for scores in [PLAIN, Scores { scale: 0.4, window: Some(3), softcap: Some(1.5) }] {
        let case = Case::random(4, [4, 2, 3, 5], DType::F32, packed_index(&[6, 1, 4], 1), scores);
        let mut rng = Rng(9);
        let dout = rng.floats(case.rows() * case.heads * case.v_dim);
        let grads = case.gradients::<f64>(&dout);
        let loss = |case: &Case| -> f64 {
            case.truth::<f64>().0.iter().zip(&dout).map(|(o, &g)| o * f64::from(g)).sum()
        };
        for (which, grad) in grads.iter().enumerate() {
            for at in 0..grad.len() {
                // 2^-10: exact in f32, and its square is far below the tolerance for gradients of size 1.
                let step = 1.0 / 1024.0;
                let shifted = |by: f32| {
                    let mut c = case.clone();
                    let x = [&mut c.q, &mut c.k, &mut c.v];
                    x.into_iter().nth(which).unwrap()[at] += by;
                    (loss(&c), f64::from([&c.q, &c.k, &c.v][which][at]))
                };
                let ((up, x1), (down, x0)) = (shifted(step), shifted(-step));
                let want = (up - down) / (x1 - x0);
                assert!((want - grad[at]).abs() < 1e-5, "gradient {which}[{at}]: {} for {want}", grad[at]);
            }
        }
    }
}

/// The kernel's gradients are off by at most twice what plain f32 is, on every path, the same bits for 1 to 3 threads.
fn check_backward(case: &Case) {
    let dout = Rng(77).floats(case.rows() * case.heads * case.v_dim);
    let truth = case.gradients::<f64>(&dout);
    let plain = case.gradients::<f32>(&dout);
    let floor = case.floor();
    let max = |x: &[f32]| x.iter().fold(0.0, |m: f64, &x| m.max(f64::from(x).abs()));
    let dp = (case.v_dim as f64).sqrt() * max(&case.v) * max(&dout) * f64::from(case.scores.scale);
    let cancelled = [max(&case.k), max(&case.q), 0.0].map(|x| 4.0 * f64::from(f32::EPSILON) * dp * x);
    for cpu in Cpu::all() {
        let mut first = None;
        for threads in 1..=3 {
            let got = case.run_backward(&Context::new(threads, cpu), &dout);
            for (i, name) in ["dq", "dk", "dv"].into_iter().enumerate() {
                let plain = 2.0 * worst(&plain[i], &truth[i]);
                // Scores of both passes and the log-sum-exp between them; then `dp - delta` may cancel altogether.
                let limit = plain.max(3.0 * floor * largest(&truth[i])).max(cancelled[i]);
                let e = worst(&got[i], &truth[i]);
                let what = (cpu, case.heads, case.kv_heads, case.dim, case.v_dim, case.rows(), case.scores);
                assert!(e <= limit, "{name} off by {e:e}, limit {limit:e}: {what:?}");
            }
            assert!(*first.get_or_insert(got.clone()) == got, "threads change bits: {cpu}");
        }
    }
}

#[test]
fn gradients_equal_the_reference() {
    let shapes =
        [[1, 1, 1, 1], [4, 1, 16, 16], [3, 3, 64, 64], [4, 2, 80, 80], [2, 1, 128, 96], [6, 2, 7, 3]];
    for (s, shape) in shapes.into_iter().enumerate() {
        for lengths in [&[][..], &[1], &[3], &[15, 17], &[63, 1, 65], &[40, 258]] {
            for window in [None, Some(1), Some(20)] {
                let scores = Scores { window, softcap: (s % 2 == 1).then_some(2.0), ..PLAIN };
                check_backward(&Case::random(
                    s as u64,
                    shape,
                    DType::F32,
                    packed_index(lengths, s % 3),
                    scores,
                ));
            }
        }
    }
}

#[test]
fn squares_of_blocks_add_in_the_same_order_as_single_ones() {
    // 5 blocks of rows with 2 key heads: with one thread a task takes squares of blocks, with two it does not.
    let shape = [2, 2, 16, 16];
    check_backward(&Case::random(3, shape, DType::F32, packed_index(&[1100], 0), PLAIN));
    let windowed = Scores { window: Some(300), ..PLAIN };
    check_backward(&Case::random(3, shape, DType::F32, packed_index(&[700], 0), windowed));
}

#[test]
fn rows_that_reach_into_an_earlier_run_share_its_gradients() {
    // Rows 4 and 5 see what the runs before them see, with padding between; row 6 starts anew, row 7 reaches back.
    let index = Index::Packed { row_start: vec![0, 0, 2, 9, 0, 1, 6, 5] };
    let case = Case::random(5, [2, 1, 4, 4], DType::F32, index, PLAIN);
    check(&case);
    check_backward(&case);
}

/// `|a - b| / |b|` as vectors.
fn distance(a: &[f32], b: &[f64]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(&a, &b)| f64::from(a) - b)) / norm(&mut b.iter().copied()).max(1e-30)
}

#[test]
fn bf16_inputs_cost_their_own_rounding_and_no_more() {
    // Where the machine multiplies pairs of bf16, weights, dout and the scores' gradients are rounded to bf16 (2^-9 at
    // most, 2^-9 / sqrt(3) on average, independently), and each result has one or two such factors in each term:
    // sqrt(2 / 3) 2^-9 relative to the result, and twice that where terms cancel. Other paths compute in f32.
    const LIMIT: f64 = 1.0 / 256.0;
    let shapes = [[2, 1, 2, 6], [3, 3, 64, 64], [4, 2, 80, 80], [2, 1, 128, 96], [6, 2, 7, 3]];
    for (s, shape) in shapes.into_iter().enumerate() {
        for (lengths, window) in [(&[1][..], None), (&[3], None), (&[15, 17], Some(5)), (&[97, 258], None)] {
            let scores = Scores { scale: 0.1, window, softcap: (s % 2 == 1).then_some(2.0) };
            let case = Case::random(s as u64, shape, DType::BF16, packed_index(lengths, s % 3), scores);
            let (out, lse) = case.truth::<f64>();
            let dout = Rng(78).floats(case.rows() * case.heads * case.v_dim);
            let grads = case.gradients::<f64>(&dout);
            for cpu in Cpu::all() {
                let mut first = None;
                for threads in 1..=2 {
                    let ctx = Context::new(threads, cpu);
                    let got = case.run(&ctx, 0..case.rows());
                    let back = case.run_backward(&ctx, &dout);
                    assert!(
                        distance(&got.0, &out) <= LIMIT,
                        "out {}: {cpu} {shape:?}",
                        distance(&got.0, &out)
                    );
                    assert!(
                        worst(&got.1, &lse) <= LIMIT * (1.0 + largest(&lse)) / 64.0,
                        "lse: {cpu} {shape:?}"
                    );
                    for (i, name) in ["dq", "dk", "dv"].into_iter().enumerate() {
                        // Terms of dq and dk may cancel: then against their size, scale |dout . v| |q or k|, with
                        // numbers of 1 / sqrt(3) (dout and v) and sqrt(3) (q and k) on average.
                        let size = grads[i].iter().map(|x| x * x).sum::<f64>().sqrt();
                        let d = distance(&back[i], &grads[i]);
                        let term = 0.1 * (case.v_dim as f64).sqrt() / 3.0 * 3f64.sqrt();
                        let small = term * (grads[i].len() as f64).sqrt();
                        assert!(
                            d * size <= LIMIT * size.max(small),
                            "{name} {d}: {cpu} {shape:?} {lengths:?}"
                        );
                    }
                    // Training keeps queries in f32: what they are stored in must not choose another road.
                    let wide = Case { q_dtype: DType::F32, ..case.clone() };
                    let all = (got, back);
                    assert!(
                        (wide.run(&ctx, 0..case.rows()), wide.run_backward(&ctx, &dout)) == all,
                        "queries in f32: {cpu} {shape:?}"
                    );
                    assert!(*first.get_or_insert(all.clone()) == all, "threads change bits: {cpu}");
                }
            }
        }
    }
}

#[test]
fn prompts_and_decoding_give_the_same_bits_in_bf16() {
    for cpu in Cpu::all() {
        let ctx = Context::new(2, cpu);
        let index = paged_index(&[(600, 600), (280, 9)], 16, 1, 3);
        let case = Case::random(1, [9, 3, 64, 64], DType::BF16, index, PLAIN);
        let (out, lse) = case.run(&ctx, 0..case.rows());
        for rows in [0..1, 255..256, 256..257, 500..513, 599..600, 601..602] {
            let (o, l) = case.run(&ctx, rows.clone());
            assert_eq!(o, out[rows.start * 9 * 64..rows.end * 9 * 64], "{cpu} {rows:?}");
            assert_eq!(l, lse[rows.start * 9..rows.end * 9], "{cpu} {rows:?}");
        }
    }
}
