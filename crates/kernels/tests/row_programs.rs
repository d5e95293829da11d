//! The row programs of real models, as the compiler composes them, against their formulas in f64: on every
//! instruction set, with one thread and several, whose results must be equal bit for bit.

#[path = "../benches/programs/mod.rs"]
mod programs;

use programs::*;
use sparsam_dtype::{DType, Layout};
use sparsam_kernels::row::{Code, Program, Store, run, run_reference};
use sparsam_kernels::{Context, Cpu, Memory, View};

/// Numbers between -2 and 2.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1u64 << 22) as f32 - 2.0
        })
        .collect()
}

/// Operands of one program, each in a slab of its own but for those in place.
#[derive(Default, Clone)]
struct Operands {
    slabs: Vec<Vec<u8>>,
    ins: Vec<View>,
    outs: Vec<View>,
}

impl Operands {
    fn slab(&mut self, bytes: &[u8]) -> usize {
        self.slabs.push(bytes.to_vec());
        self.slabs.len() - 1
    }
    fn input(&mut self, x: &[f32], shape: &[usize], domain: &[usize]) {
        let slab = self.slab(bytemuck::cast_slice(x));
        let layout = Layout::contiguous(shape).broadcast(domain);
        self.ins.push(View { slab, dtype: DType::F32, layout });
    }
    fn integers(&mut self, x: &[i32], shape: &[usize], domain: &[usize]) {
        let slab = self.slab(bytemuck::cast_slice(x));
        let layout = Layout::contiguous(shape).broadcast(domain);
        self.ins.push(View { slab, dtype: DType::I32, layout });
    }
    fn output(&mut self, shape: &[usize]) {
        let slab = self.slab(&vec![0xFF; shape.iter().product::<usize>() * 4]);
        self.outs.push(View::contiguous(slab, DType::F32, shape));
    }
    fn in_place(&mut self, input: usize) {
        self.outs.push(self.ins[input].clone());
    }

    /// The outputs after a run; `None` for the reference.
    fn run(&self, program: &Program, ctx: Option<&Context>) -> Vec<Vec<f32>> {
        let mut mem = Memory::new();
        for bytes in &self.slabs {
            let slab = mem.add_owned(bytes.len());
            mem.bytes_mut(slab).unwrap().copy_from_slice(bytes);
        }
        let (ins, outs): (Vec<&View>, Vec<&View>) = (self.ins.iter().collect(), self.outs.iter().collect());
        let i: Vec<(DType, &Layout)> = ins.iter().map(|v| (v.dtype, &v.layout)).collect();
        let o: Vec<(DType, &Layout)> = outs.iter().map(|v| (v.dtype, &v.layout)).collect();
        let code = Code::new(program, &i, &o).unwrap();
        match ctx {
            Some(ctx) => run(ctx, &mut mem, &code, &outs, &ins).unwrap(),
            None => run_reference(&mut mem, &code, &outs, &ins).unwrap(),
        }
        // Contiguous outputs as numbers; strided ones (halves of heads) as their whole slab.
        outs.iter().map(|v| bytemuck::cast_slice(mem.bytes(v.slab)).to_vec()).collect()
    }

    /// Holds every path to `want` (absolute tolerance, one for each output).
    fn check(&self, name: &str, program: &Program, want: &[Vec<f64>], tolerance: &[f64]) {
        let hold = |who: &str, got: &[Vec<f32>]| {
            for (o, (got, want)) in got.iter().zip(want).enumerate() {
                assert_eq!(got.len(), want.len(), "{name}, {who}: output {o}");
                for (i, (g, w)) in got.iter().zip(want).enumerate() {
                    let error = (*g as f64 - w).abs();
                    assert!(
                        error <= tolerance[o],
                        "{name}, {who}: output {o} element {i} is {g}, want {w}: {error:e} off"
                    );
                }
            }
        };
        hold("reference", &self.run(program, None));
        for cpu in Cpu::all() {
            let one = self.run(program, Some(&Context::new(1, cpu)));
            hold(&cpu.to_string(), &one);
            let bits = |list: Vec<Vec<f32>>| -> Vec<Vec<u32>> {
                list.into_iter().map(|v| v.into_iter().map(f32::to_bits).collect()).collect()
            };
            let many = self.run(program, Some(&Context::new(4, cpu)));
            assert!(bits(one) == bits(many), "{name}, {cpu}: results depend on threads");
        }
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x as f64).collect()
}

/// `f` on each row.
fn by_row(x: &[f32], width: usize, mut f: impl FnMut(usize, &[f64]) -> Vec<f64>) -> Vec<f64> {
    x.chunks(width).enumerate().flat_map(|(r, row)| f(r, &wide(row))).collect()
}

/// Below, at and above vectors, tiles and whole rows; several rows and one.
const SIZES: [(usize, usize); 12] = [
    (1, 1),
    (3, 5),
    (1, 576),
    (70, 64),
    (37, 33),
    (9, 576),
    (40, 577),
    (2, 2047),
    (2, 2049),
    (3, 9000),
    (2, 50_257),
    (1, 300_001),
];

#[test]
fn norms() {
    for (rows, width) in SIZES {
        let shape = [rows, width];
        let x = numbers(rows * width, 1);
        let (w, b) = (numbers(width, 2), numbers(width, 3));
        let mut o = Operands::default();
        o.input(&x, &shape, &shape);
        o.input(&w, &[1, width], &shape);
        let mut with_bias = o.clone();
        o.in_place(0);
        let want = by_row(&x, width, |_, row| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / width as f64;
            row.iter().zip(&w).map(|(x, &w)| x / (mean + EPSILON).sqrt() * w as f64).collect()
        });
        o.check(&format!("rms_norm {shape:?}"), &rms_norm(&shape), &[want], &[4e-6]);
        if width == 1 {
            continue; // x - mean is 0 over the root of epsilon: all rounding error
        }
        with_bias.input(&b, &[1, width], &shape);
        with_bias.output(&shape);
        let want = by_row(&x, width, |_, row| {
            let mean = row.iter().sum::<f64>() / width as f64;
            let var = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / width as f64;
            let y = |(c, x): (usize, &f64)| (x - mean) / (var + EPSILON).sqrt() * w[c] as f64 + b[c] as f64;
            row.iter().enumerate().map(y).collect()
        });
        with_bias.check(&format!("layer_norm {shape:?}"), &layer_norm(&shape), &[want], &[2e-5]);
    }
}

#[test]
fn rms_norm_backward_with_its_column_sum() {
    for (rows, width) in [(1, 1), (5, 33), (200, 576), (1000, 64), (3, 9000)] {
        let shape = [rows, width];
        let (x, w, dy) = (numbers(rows * width, 1), numbers(width, 2), numbers(rows * width, 3));
        let mut o = Operands::default();
        o.input(&x, &shape, &shape);
        o.input(&w, &[1, width], &shape);
        o.input(&dy, &shape, &shape);
        o.in_place(2);
        o.output(&[1, width]);
        let mut dw = vec![0f64; width];
        let dx = by_row(&x, width, |r, row| {
            let r_root = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / width as f64 + EPSILON).sqrt();
            let n: Vec<f64> = row.iter().map(|x| x * r_root).collect();
            let dy = &dy[r * width..];
            (0..width).for_each(|c| dw[c] += dy[c] as f64 * n[c]);
            let dn: Vec<f64> = (0..width).map(|c| dy[c] as f64 * w[c] as f64).collect();
            let mean = n.iter().zip(&dn).map(|(a, b)| a * b).sum::<f64>() / width as f64;
            (0..width).map(|c| r_root * (dn[c] - n[c] * mean)).collect()
        });
        let tolerance = [if width == 1 { 1e-2 } else { 1e-4 }, 1e-4 * (rows as f64).sqrt()];
        o.check(&format!("backward {shape:?}"), &rms_norm_backward(&shape), &[dx, dw], &tolerance);
    }
}

#[test]
fn softmax_and_cross_entropy() {
    for (rows, width) in SIZES {
        let shape = [rows, width];
        let x: Vec<f32> = numbers(rows * width, 1).iter().map(|x| x * 8.0).collect();
        let share = |row: &[f64]| -> (f64, Vec<f64>) {
            let max = row.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = row.iter().map(|x| (x - max).exp()).sum();
            (max + sum.ln(), row.iter().map(|x| (x - max).exp() / sum).collect())
        };
        let mut o = Operands::default();
        o.input(&x, &shape, &shape);
        let mut loss = o.clone();
        o.in_place(0);
        let want = by_row(&x, width, |_, row| share(row).1);
        o.check(&format!("softmax {shape:?}"), &softmax(&shape), &[want], &[1e-6]);

        let target: Vec<i32> = (0..rows).map(|r| (r * 7919 % width) as i32).collect();
        loss.integers(&target, &[rows, 1], &shape);
        loss.output(&[rows, 1]);
        loss.in_place(0);
        let losses = by_row(&x, width, |r, row| vec![share(row).0 - row[target[r] as usize]]);
        let grads = by_row(&x, width, |r, row| {
            let mut grad = share(row).1;
            grad[target[r] as usize] -= 1.0;
            grad
        });
        let name = format!("cross_entropy {shape:?}");
        loss.check(&name, &cross_entropy(&shape), &[losses, grads], &[1e-5, 1e-6]);
    }
}

#[test]
fn activations_and_dropout() {
    for (rows, width) in SIZES {
        let shape = [rows, width];
        let x: Vec<f32> = numbers(rows * width, 1).iter().map(|x| x * 4.0).collect();
        let gate = numbers(rows * width, 2);
        let mut one = Operands::default();
        one.input(&x, &shape, &shape);
        let mut two = one.clone();
        let mut seeded = one.clone();
        one.output(&shape);
        two.input(&gate, &shape, &shape);
        two.in_place(1);
        let want = x.iter().zip(&gate).map(|(&x, &b)| x as f64 / (1.0 + (-x as f64).exp()) * b as f64);
        two.check(&format!("swiglu {shape:?}"), &swiglu(&shape), &[want.collect()], &[4e-6]);
        let tanh = |x: f64| {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        };
        let want = wide(&x).into_iter().map(tanh);
        one.check(&format!("gelu_tanh {shape:?}"), &gelu_tanh(&shape), &[want.collect()], &[2e-6]);
        // Known values of the exact GELU stand in the next test; here the paths are held to each other.
        let want = one.run(&gelu(&shape), None);
        one.check(&format!("gelu {shape:?}"), &gelu(&shape), &[wide(&want[0])], &[2e-6]);

        seeded.integers(&[12, -5], &[2], &[2]);
        seeded.output(&shape);
        let program = dropout(&shape, 0.25);
        let want = seeded.run(&program, None);
        seeded.check(&format!("dropout {shape:?}"), &program, &[wide(&want[0])], &[0.0]);
        let dropped = want[0].iter().filter(|&&y| y == 0.0).count() as f64 / want[0].len() as f64;
        assert!(x.len() < 1000 || (dropped - 0.25).abs() < 0.05, "{dropped}");
    }
}

#[test]
fn gelu_has_known_values() {
    // x Phi(x), with Phi from a table of the normal distribution: Phi(1) = 0.8413447461, Phi(2) = 0.9772498681.
    let x = [-2.0, -1.0, 0.0, 1.0, 2.0];
    let mut o = Operands::default();
    o.input(&x, &[5], &[5]);
    o.output(&[5]);
    let want = vec![-0.0455002638, -0.1586552539, 0.0, 0.8413447461, 1.9544997362];
    o.check("gelu", &gelu(&[5]), &[want], &[2e-7]);
}

#[test]
fn rotary_in_place_on_halves() {
    for (tokens, heads, half) in [(1, 9, 32), (7, 3, 32), (5, 2, 3), (300, 4, 64)] {
        let domain = [tokens, heads, half];
        let full = [tokens, heads, 2 * half];
        let x = numbers(full.iter().product(), 1);
        let positions: Vec<i32> = (0..tokens).map(|t| (t * 97) as i32).collect();
        let frequencies: Vec<f32> = (0..half).map(|c| 10_000f32.powf(-(c as f32) / half as f32)).collect();
        let mut table = Operands::default();
        table.integers(&positions, &[tokens, 1], &[tokens, half]);
        table.input(&frequencies, &[1, half], &[tokens, half]);
        table.output(&[tokens, half]);
        table.output(&[tokens, half]);
        // The angle is a product in f32; its sine is then exact to rounding.
        let angle = |t: usize, c: usize| (positions[t] as f32 * frequencies[c]) as f64;
        let of = |f: fn(f64) -> f64| -> Vec<f64> {
            (0..tokens * half).map(|i| f(angle(i / half, i % half))).collect()
        };
        let program = rotary_table(&[tokens, half]);
        table.check("rotary_table", &program, &[of(f64::cos), of(f64::sin)], &[2e-7, 2e-7]);
        let tables = table.run(&program, None);

        let mut o = Operands::default();
        o.input(&x, &full, &full);
        let whole = o.ins.pop().unwrap();
        o.ins = [(0, half), (half, 2 * half)]
            .map(|(from, to)| View { layout: whole.layout.slice(2, from, to), ..whole.clone() })
            .to_vec();
        o.in_place(0);
        o.in_place(1);
        o.input(&tables[0], &[tokens, 1, half], &domain);
        o.input(&tables[1], &[tokens, 1, half], &domain);
        let mut want = wide(&x);
        for t in 0..tokens {
            for h in 0..heads {
                for c in 0..half {
                    let at = (t * heads + h) * 2 * half + c;
                    let (sin, cos) = angle(t, c).sin_cos();
                    let (a, b) = (x[at] as f64, x[at + half] as f64);
                    want[at] = a * cos - b * sin;
                    want[at + half] = b * cos + a * sin;
                }
            }
        }
        o.check("rotary", &rotary(&domain), &[want.clone(), want], &[1e-6, 1e-6]);
    }
}

#[test]
fn adamw_in_place() {
    for n in [1, 15, 2048, 2049, 40_000] {
        let shape = [n];
        let list: Vec<Vec<f32>> = (0..4).map(|s| numbers(n, s + 1)).collect();
        let mut o = Operands::default();
        for (k, x) in list.iter().enumerate() {
            let x: Vec<f32> = if k == 3 { x.iter().map(|x| x.abs()).collect() } else { x.clone() };
            o.input(&x, &shape, &shape);
        }
        let (lr, c1, c2) = (0.01f32, 0.271f32, 0.142_625f32);
        [lr, c1, c2].iter().for_each(|&x| o.input(&[x], &[1], &shape));
        [0, 2, 3].iter().for_each(|&i| o.in_place(i));
        let at = |i: usize| {
            let [p, g, m, v] = [0, 1, 2, 3].map(|k: usize| list[k][i] as f64);
            let m = BETA1 * m + (1.0 - BETA1) * g;
            let v = BETA2 * v.abs() + (1.0 - BETA2) * g * g;
            let step = m / c1 as f64 / ((v / c2 as f64).sqrt() + 1e-8) + DECAY * p;
            [p - lr as f64 * step, m, v]
        };
        let want = [0, 1, 2].map(|k| (0..n).map(|i| at(i)[k]).collect::<Vec<f64>>());
        // Steps m / sqrt(v) are at most some hundred here: f32 rounding of them, times the learning rate.
        o.check(&format!("adamw {n}"), &adamw(&shape), &want, &[1e-5, 1e-6, 1e-6]);
    }
}

/// A norm over all elements of a long vector, whose pieces several threads share.
#[test]
fn sum_of_squares_of_a_long_vector() {
    let n = 1_000_003;
    let x = numbers(n, 5);
    let mut p = Writer::new(&[1, n]);
    let v = p.load(0);
    let square = p.mul(v, v);
    let sum = p.sum(square);
    let max = p.max(v);
    let program = p.store(&[sum, max]);
    let mut o = Operands::default();
    o.input(&x, &[1, n], &[1, n]);
    o.output(&[1, 1]);
    o.output(&[1, 1]);
    let sum = wide(&x).iter().map(|x| x * x).sum::<f64>();
    let max = wide(&x).into_iter().fold(f64::MIN, f64::max);
    o.check("norm", &program, &[vec![sum], vec![max]], &[sum * 1e-7, 0.0]);
}

/// Sums over rows of wide and narrow values, into strided halves, with no rows too.
#[test]
fn column_sums() {
    for (rows, width) in [(0, 5), (1, 5), (1000, 3), (513, 576), (70, 20_000)] {
        let shape = [rows, width];
        let x = numbers(rows * width, 1);
        let mut p = Writer::new(&shape);
        let v = p.load(0);
        let narrow = p.sum(v);
        let mut program = p.store(&[v, narrow]);
        program.stores.iter_mut().for_each(|s| s.2 = Store::ColumnSum);
        let mut o = Operands::default();
        o.input(&x, &shape, &shape);
        o.output(&[1, width]);
        o.output(&[1, 1]);
        let column = |c: usize| (0..rows).map(|r| x[r * width + c] as f64).sum::<f64>();
        let sums: Vec<f64> = (0..width).map(column).collect();
        let all = sums.iter().sum::<f64>();
        let tolerance = [1e-4, 1e-6 * (1.0 + (rows * width) as f64)];
        o.check(&format!("sums {shape:?}"), &program, &[sums, vec![all]], &tolerance);
    }
}
