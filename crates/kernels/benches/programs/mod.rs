//! Row programs as the compiler composes them; shared by `benches/row.rs` and `tests/row_programs.rs`.
#![allow(dead_code)] // each user takes its part

use sparsam_kernels::row::{Binary, Instr, Program, Reduction, Store, Unary, Val};

/// Writes a program down, one value after the other.
pub struct Writer(Program);

impl Writer {
    pub fn new(shape: &[usize]) -> Writer {
        Writer(Program { shape: shape.to_vec(), instrs: Vec::new(), stores: Vec::new() })
    }
    pub fn push(&mut self, instr: Instr) -> Val {
        self.0.instrs.push(instr);
        self.0.instrs.len() as Val - 1
    }
    pub fn load(&mut self, input: usize) -> Val {
        self.push(Instr::Load { input })
    }
    pub fn num(&mut self, x: f64) -> Val {
        self.push(Instr::Const(x as f32))
    }
    pub fn un(&mut self, op: Unary, a: Val) -> Val {
        self.push(Instr::Unary(op, a))
    }
    pub fn bin(&mut self, op: Binary, a: Val, b: Val) -> Val {
        self.push(Instr::Binary(op, a, b))
    }
    pub fn add(&mut self, a: Val, b: Val) -> Val {
        self.bin(Binary::Add, a, b)
    }
    pub fn sub(&mut self, a: Val, b: Val) -> Val {
        self.bin(Binary::Sub, a, b)
    }
    pub fn mul(&mut self, a: Val, b: Val) -> Val {
        self.bin(Binary::Mul, a, b)
    }
    pub fn div(&mut self, a: Val, b: Val) -> Val {
        self.bin(Binary::Div, a, b)
    }
    pub fn scale(&mut self, a: Val, x: f64) -> Val {
        let x = self.num(x);
        self.mul(a, x)
    }
    pub fn shift(&mut self, a: Val, x: f64) -> Val {
        let x = self.num(x);
        self.add(a, x)
    }
    pub fn sum(&mut self, a: Val) -> Val {
        self.push(Instr::Reduce(Reduction::Sum, a))
    }
    pub fn max(&mut self, a: Val) -> Val {
        self.push(Instr::Reduce(Reduction::Max, a))
    }
    pub fn mean(&mut self, a: Val) -> Val {
        let n = self.0.width() as f64;
        let sum = self.sum(a);
        self.scale(sum, 1.0 / n)
    }
    pub fn store(mut self, values: &[Val]) -> Program {
        self.0.stores = values.iter().enumerate().map(|(o, &v)| (o, v, Store::Rows)).collect();
        self.0
    }
}

pub const EPSILON: f64 = 1e-5;

/// x, weight -> `x / sqrt(mean(x^2) + eps) * weight` (Zhang & Sennrich 2019).
pub fn rms_norm(shape: &[usize]) -> Program {
    let mut p = Writer::new(shape);
    let (x, w) = (p.load(0), p.load(1));
    let square = p.mul(x, x);
    let mean = p.mean(square);
    let shifted = p.shift(mean, EPSILON);
    let root = p.un(Unary::Sqrt, shifted);
    let r = p.un(Unary::Recip, root);
    let y = p.mul(x, r);
    let y = p.mul(y, w);
    p.store(&[y])
}

/// x, weight, dy -> dx, dweight (a column sum).
pub fn rms_norm_backward(shape: &[usize]) -> Program {
    let mut p = Writer::new(shape);
    let (x, w, dy) = (p.load(0), p.load(1), p.load(2));
    let square = p.mul(x, x);
    let mean = p.mean(square);
    let shifted = p.shift(mean, EPSILON);
    let root = p.un(Unary::Sqrt, shifted);
    let r = p.un(Unary::Recip, root);
    let n = p.mul(x, r);
    let dn = p.mul(dy, w);
    let dw = p.mul(dy, n);
    // dx = r (dn - n mean(dn n))
    let product = p.mul(dn, n);
    let mean = p.mean(product);
    let along = p.mul(n, mean);
    let rest = p.sub(dn, along);
    let dx = p.mul(rest, r);
    let mut program = p.store(&[dx, dw]);
    program.stores[1].2 = Store::ColumnSum;
    program
}

/// x, weight, bias -> `(x - mean) / sqrt(var + eps) * weight + bias` (Ba et al. 2016).
pub fn layer_norm(shape: &[usize]) -> Program {
    let mut p = Writer::new(shape);
    let (x, w, b) = (p.load(0), p.load(1), p.load(2));
    let mean = p.mean(x);
    let d = p.sub(x, mean);
    let square = p.mul(d, d);
    let variance = p.mean(square);
    let shifted = p.shift(variance, EPSILON);
    let root = p.un(Unary::Sqrt, shifted);
    let r = p.un(Unary::Recip, root);
    let y = p.mul(d, r);
    let y = p.mul(y, w);
    let y = p.add(y, b);
    p.store(&[y])
}

/// x -> `e^(x - max) / sum`.
pub fn softmax(shape: &[usize]) -> Program {
    let mut p = Writer::new(shape);
    let x = p.load(0);
    let max = p.max(x);
    let d = p.sub(x, max);
    let e = p.un(Unary::Exp, d);
    let sum = p.sum(e);
    let y = p.div(e, sum);
    p.store(&[y])
}

/// logits, target (I32, one a row) -> loss (one a row), d logits = softmax - one hot.
pub fn cross_entropy(shape: &[usize]) -> Program {
    let mut p = Writer::new(shape);
    let (x, target) = (p.load(0), p.load(1));
    let max = p.max(x);
    let d = p.sub(x, max);
    let e = p.un(Unary::Exp, d);
    let sum = p.sum(e);
    let log = p.un(Unary::Log, sum);
    let column = p.push(Instr::Iota { axis: shape.len() - 1 });
    let hit = p.bin(Binary::Equal, column, target);
    let zero = p.num(0.0);
    let picked = p.push(Instr::Select(hit, d, zero));
    let picked = p.sum(picked);
    let loss = p.sub(log, picked);
    let share = p.div(e, sum);
    let grad = p.sub(share, hit);
    p.store(&[loss, grad])
}

fn silu(p: &mut Writer, x: Val) -> Val {
    let minus = p.un(Unary::Neg, x);
    let e = p.un(Unary::Exp, minus);
    let below = p.shift(e, 1.0);
    let sigmoid = p.un(Unary::Recip, below);
    p.mul(x, sigmoid)
}

/// a, b -> `silu(a) * b` (Shazeer 2020).
pub fn swiglu(shape: &[usize]) -> Program {
    let mut p = Writer::new(shape);
    let (a, b) = (p.load(0), p.load(1));
    let s = silu(&mut p, a);
    let y = p.mul(s, b);
    p.store(&[y])
}

/// x -> GELU by erf (Hendrycks & Gimpel 2016).
pub fn gelu(shape: &[usize]) -> Program {
    let mut p = Writer::new(shape);
    let x = p.load(0);
    let half = p.scale(x, 0.5);
    let inner = p.scale(x, std::f64::consts::FRAC_1_SQRT_2);
    let erf = p.un(Unary::Erf, inner);
    let one = p.shift(erf, 1.0);
    let y = p.mul(half, one);
    p.store(&[y])
}

/// x -> GELU by tanh.
pub fn gelu_tanh(shape: &[usize]) -> Program {
    let mut p = Writer::new(shape);
    let x = p.load(0);
    let square = p.mul(x, x);
    let cube = p.mul(square, x);
    let cube = p.scale(cube, 0.044715);
    let inner = p.add(x, cube);
    let inner = p.scale(inner, (2.0 / std::f64::consts::PI).sqrt());
    let tanh = p.un(Unary::Tanh, inner);
    let half = p.scale(x, 0.5);
    let one = p.shift(tanh, 1.0);
    let y = p.mul(half, one);
    p.store(&[y])
}

/// Halves x1, x2 of each head, cos, sin (repeated over heads) -> rotated halves (Su et al. 2021).
pub fn rotary(shape: &[usize]) -> Program {
    let mut p = Writer::new(shape);
    let [x1, x2, cos, sin] = [0, 1, 2, 3].map(|i| p.load(i));
    let (a, b) = (p.mul(x1, cos), p.mul(x2, sin));
    let y1 = p.sub(a, b);
    let (c, d) = (p.mul(x2, cos), p.mul(x1, sin));
    let y2 = p.add(c, d);
    p.store(&[y1, y2])
}

/// Positions (I32, one a row), frequencies (one a column) -> cos, sin.
pub fn rotary_table(shape: &[usize]) -> Program {
    let mut p = Writer::new(shape);
    let (position, frequency) = (p.load(0), p.load(1));
    let angle = p.mul(position, frequency);
    let (cos, sin) = (p.un(Unary::Cos, angle), p.un(Unary::Sin, angle));
    p.store(&[cos, sin])
}

pub const BETA1: f64 = 0.9;
pub const BETA2: f64 = 0.95;
pub const DECAY: f64 = 0.1;

/// p, g, m, v, learning rate, `1 - beta1^t`, `1 - beta2^t` (one number each) -> p, m, v (Loshchilov & Hutter 2019).
pub fn adamw(shape: &[usize]) -> Program {
    let mut p = Writer::new(shape);
    let [w, g, m, v, lr, c1, c2] = [0, 1, 2, 3, 4, 5, 6].map(|i| p.load(i));
    let (old, new) = (p.scale(m, BETA1), p.scale(g, 1.0 - BETA1));
    let m = p.add(old, new);
    let square = p.mul(g, g);
    let (old, new) = (p.scale(v, BETA2), p.scale(square, 1.0 - BETA2));
    let v = p.add(old, new);
    let mean = p.div(m, c1);
    let variance = p.div(v, c2);
    let root = p.un(Unary::Sqrt, variance);
    let below = p.shift(root, 1e-8);
    let step = p.div(mean, below);
    let decay = p.scale(w, DECAY);
    let step = p.add(step, decay);
    let step = p.mul(step, lr);
    let w = p.sub(w, step);
    p.store(&[w, m, v])
}

/// x, seed -> x scaled by `1 / (1 - rate)` or 0 (Srivastava et al. 2014).
pub fn dropout(shape: &[usize], rate: f64) -> Program {
    let mut p = Writer::new(shape);
    let x = p.load(0);
    let u = p.push(Instr::Random { seed: 1, stream: 7 });
    let rate_value = p.num(rate);
    let drop = p.bin(Binary::Less, u, rate_value);
    let zero = p.num(0.0);
    let scaled = p.scale(x, 1.0 / (1.0 - rate));
    let y = p.push(Instr::Select(drop, zero, scaled));
    p.store(&[y])
}
