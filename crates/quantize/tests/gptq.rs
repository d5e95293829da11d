//! The algorithm for one matrix, held to NumPy's and to what must hold for any matrix.

use sparsam_dtype::DType;
use sparsam_dtype::codec::{self, blocks, blocks::Scales};
use sparsam_quantize::gptq::{Factor, Options, compensate, gptq, nearest, row_errors};
use sparsam_quantize::linalg::Products;
use sparsam_quantize::{Grid, Hessian, Plain};
use sparsam_runtime::Device;

fn products() -> Products {
    Products::new(&Device::cpu(2).unwrap())
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn bytes(&mut self, n: usize) -> Vec<u8> {
        let (front, rest) = self.0.split_at(n);
        self.0 = rest;
        front.to_vec()
    }
    fn u32s(&mut self, n: usize) -> Vec<usize> {
        let b = self.bytes(4 * n);
        b.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b) as usize).collect()
    }
    fn f32s(&mut self, n: usize) -> Vec<f32> {
        let b = self.bytes(4 * n);
        b.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

/// `x^T x` of inputs (tokens, n).
fn hessian(products: &mut Products, x: &[f32], n: usize) -> Hessian {
    let tokens = x.len() / n;
    let mut xt = vec![0.0; x.len()];
    for t in 0..tokens {
        for i in 0..n {
            xt[i * tokens + t] = x[t * n + i];
        }
    }
    let mut h = Hessian::new(n);
    h.add(&products.matmul(&xt, x, tokens).unwrap(), None, tokens);
    h
}

/// Codes are the paper's, to the last one: with and without act-order, groups and whole rows, 2 to 4 bits.
#[test]
fn codes_are_those_of_the_paper_in_numpy() {
    let file = include_bytes!("golden/gptq.bin");
    let mut r = Reader(file);
    let [tokens, n, rows, cases] = r.u32s(4).try_into().unwrap();
    let (x, w) = (r.f32s(tokens * n), r.f32s(rows * n));
    let mut products = products();
    let damped = hessian(&mut products, &x, n).damped(0.01);
    assert!(cases >= 4);
    for _ in 0..cases {
        let [bits, group, act_order] = r.u32s(3).try_into().unwrap();
        let groups = rows * n / group;
        let (scale, zero) = (r.f32s(groups), r.u32s(groups));
        let want = r.bytes(rows * n);
        let scales: Vec<Scales> = (0..groups)
            .map(|g| {
                let (mut scales, mut mins) = ([0; 16], [0; 16]);
                (scales[0], mins[0]) = (1, zero[g] as u8);
                Scales { d: scale[g], dmin: scale[g], scales, mins }
            })
            .collect();
        let grid = Grid::Plain(Plain { bits: bits as u32, group, symmetric: false });
        let factor = Factor::new(&damped, act_order == 1, 2).unwrap();
        let got = compensate(&mut products, &w, &factor, grid, &scales).unwrap();
        let other = got.iter().zip(&want).filter(|(a, b)| a != b).count();
        assert_eq!(
            other,
            0,
            "{bits} bits, groups of {group}, act-order {act_order}: {other} codes of {}",
            got.len()
        );
    }
}

/// Correlated inputs of uneven size, and weights.
fn layer(tokens: usize, n: usize, rows: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let mut state = seed.wrapping_mul(2654435761) + 1;
    let mut normal = || -> f32 {
        (0..4)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
            })
            .sum()
    };
    let common: Vec<f32> = (0..tokens).map(|_| normal()).collect();
    let size: Vec<f32> = (0..n).map(|_| (2.0 * normal()).exp()).collect();
    let x = (0..tokens * n).map(|i| (normal() + common[i / n]) * size[i % n]).collect();
    (x, (0..rows * n).map(|_| normal() * 0.05).collect())
}

/// For every grid: never worse than nearest rounding row by row, better in sum, and the refinements only help. What the
/// bytes decode to is what the error was computed for.
#[test]
fn errors_never_exceed_those_of_nearest_rounding() {
    let (n, rows) = (512, 24);
    let (x, w) = layer(700, n, rows, 5);
    let mut products = products();
    let damped = hessian(&mut products, &x, n).damped(0.01);
    let blocks = DType::ALL.into_iter().filter(|d| blocks::format(*d).is_some()).map(Grid::Block);
    let plain = [(2, 64, false), (3, 128, true), (4, 512, false), (8, 32, true)];
    let plain = plain.map(|(bits, group, symmetric)| Grid::Plain(Plain { bits, group, symmetric }));
    for grid in blocks.chain(plain) {
        let near = nearest(&w, n, grid, Some(&damped.diagonal()), 2);
        let near = row_errors(&mut products, &w, &damped, &near).unwrap();
        let mut sums = Vec::new();
        for refinements in [0, 3] {
            let options = Options { refinements, ..Options::default() };
            let factor = Factor::new(&damped, options.act_order, 2).unwrap();
            let (rounded, error) = gptq(&mut products, &w, &damped, &factor, grid, &options).unwrap();
            let ours = row_errors(&mut products, &w, &damped, &rounded).unwrap();
            for (r, (a, b)) in ours.iter().zip(&near).enumerate() {
                assert!(*a <= b * 1.0001, "{grid:?}, row {r}: {a}, nearest {b}");
            }
            let sum: f64 = ours.iter().sum();
            assert!((sum - error.rounded).abs() <= 1e-3 * sum, "{grid:?}: reported {error:?}, is {sum}");
            sums.push(sum);
            if let Grid::Block(dtype) = grid {
                let mut decoded = vec![0.0; w.len()];
                codec::decode(dtype, &rounded.bytes(), &mut decoded).unwrap();
                assert_eq!(decoded, rounded.values(), "{dtype}");
            }
        }
        let near: f64 = near.iter().sum();
        println!("{grid:?}: nearest {near:.3e}, GPTQ {:.3}, refined {:.3}", sums[0] / near, sums[1] / near);
        assert!(sums[0] < 0.8 * near, "{grid:?}: GPTQ wins too little: {} of {near}", sums[0]);
        assert!(sums[1] < sums[0], "{grid:?}: refinement loses");
    }
}

/// Inputs that are always 0, a layer that never saw anything, and one whose inputs are all the same.
#[test]
fn singular_hessians_are_rounded_too() {
    let (n, rows, tokens) = (64, 8, 40);
    let (mut x, w) = layer(tokens, n, rows, 9);
    let mut products = products();
    let grid = Grid::Block(DType::Q4_0);
    x.chunks_mut(n).for_each(|row| row[5..40].fill(0.0));
    for (name, x, dead) in
        [("dead", x, 35), ("nothing", vec![0.0; tokens * n], n), ("same", vec![1.0; tokens * n], 0)]
    {
        let h = hessian(&mut products, &x, n);
        let damped = h.damped(0.01);
        assert_eq!(damped.dead, dead, "{name}");
        let most = if name == "same" { 1.0001 } else { (n - dead) as f64 };
        assert!(h.effective_rank() <= most, "{name}: rank {}", h.effective_rank());
        let factor = Factor::new(&damped, true, 2).unwrap();
        let (rounded, error) = gptq(&mut products, &w, &damped, &factor, grid, &Options::default()).unwrap();
        assert!(error.rounded <= error.nearest, "{name}: {error:?}");
        let off = rounded.values().iter().zip(&w).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off < 0.1, "{name}: off by {off}, more than a weight's size");
    }
}

/// Weights shifted for changed inputs come nearer to the original outputs than the weights themselves.
#[test]
fn shifted_weights_make_up_for_changed_inputs() {
    let (n, rows, tokens) = (64, 5, 900);
    let (y, w) = layer(tokens, n, rows, 3);
    let x: Vec<f32> = y.iter().enumerate().map(|(i, v)| 0.8 * v + 0.1 * y[(i + 1) % y.len()]).collect();
    let mut products = products();
    let mut h = hessian(&mut products, &x, n);
    let yt: Vec<f32> = (0..n * tokens).map(|i| y[i % tokens * n + i / tokens]).collect();
    h.add(&vec![0.0; n * n], Some(&products.matmul(&yt, &x, tokens).unwrap()), 0);
    let damped = h.damped(1e-4);
    let cross: Vec<f32> = h.cross.as_ref().unwrap().iter().map(|v| v / tokens as f32).collect();
    let factor = Factor::new(&damped, true, 2).unwrap();
    let mut error = |share: f32| -> f64 {
        let v = factor.shifted(&mut products, &w, &damped, &cross, share).unwrap();
        let out = |w: &[f32], x: &[f32]| -> f32 { w.iter().zip(x).map(|(a, b)| a * b).sum() };
        let rows = w.chunks(n).zip(v.chunks(n));
        let all = rows.flat_map(|(w, v)| {
            y.chunks(n).zip(x.chunks(n)).map(move |(y, x)| f64::from(out(w, y) - out(v, x)).powi(2))
        });
        all.sum()
    };
    let (none, half, full) = (error(0.0), error(0.5), error(1.0));
    assert!(full < 0.2 * none && half < none && full < half, "{none} {half} {full}");
}

/// Rank and condition of a Hessian that can be worked out: inputs that are independent but for one that is another's double.
#[test]
fn hessians_tell_how_good_they_are() {
    let n = 4;
    let mut h = Hessian::new(n);
    // Diagonal 1, 4, 9, 16, with the first two in step: correlations 1 between them, 0 otherwise.
    let mut sum = vec![0.0; n * n];
    for (i, size) in [1.0f32, 2.0, 3.0, 4.0].into_iter().enumerate() {
        sum[i * n + i] = size * size;
    }
    (sum[1], sum[n]) = (2.0, 2.0);
    h.add(&sum, None, 1);
    // 16 / (4 + 2 * 1).
    assert!((h.effective_rank() - 16.0 / 6.0).abs() < 1e-6, "{}", h.effective_rank());
    let damped = h.damped(0.1);
    // The mean of the diagonal is 7.5, so 0.75 is added; eigenvalues 0, 5, 9, 16.
    for act_order in [false, true] {
        let condition = Factor::new(&damped, act_order, 1).unwrap().condition(&damped);
        assert!((condition - 16.75 / 0.75).abs() < 0.1, "{condition}");
    }
}
