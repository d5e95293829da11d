//! The meaning of row programs: one element after the other, in f32, with sums in f64. Never tuned.

use super::program::{Binary, Class, Instr, Program, Reduction, Store, Unary};
use crate::convert;
use crate::mem::Ptr;
use sparsam_dtype::{DType, Layout};

/// An operand: address of element `[0, 0, ..]`, element type, strides (0 where it repeats).
pub(super) struct Operand<'a> {
    pub ptr: Ptr,
    pub dtype: DType,
    pub layout: &'a Layout,
}

impl Operand<'_> {
    /// The element's index from the operand's address, in elements; axes of length 1 repeat.
    fn at(&self, index: &[usize]) -> usize {
        let l = self.layout;
        (0..index.len()).map(|a| if l.shape[a] == 1 { 0 } else { index[a] * l.strides[a] }).sum()
    }

    fn get(&self, index: &[usize]) -> f32 {
        // SAFETY: `Memory::resolve` checked that the whole layout lies in its slab, and the index lies in the domain.
        unsafe { convert::get(self.dtype, self.ptr.0, self.at(index)) }
    }

    fn set(&self, index: &[usize], x: f32) {
        // SAFETY: as for `get`; one thread runs the reference.
        unsafe { convert::set(self.dtype, self.ptr.0, self.at(index), x) }
    }
}

/// Runs a checked program.
pub(super) fn run(program: &Program, classes: &[Class], outs: &[Operand], ins: &[Operand]) {
    let width = program.width();
    let rank = program.shape.len();
    let mut sums: Vec<Vec<f64>> = program.stores.iter().map(|_| vec![0.0; width.max(1)]).collect();
    for row in 0..program.rows() {
        let mut index = vec![0; rank];
        let mut rest = row;
        for a in (0..rank.saturating_sub(1)).rev() {
            index[a] = rest % program.shape[a];
            rest /= program.shape[a];
        }
        let mut values: Vec<Vec<f32>> = Vec::new();
        for (instr, class) in program.instrs.iter().zip(classes) {
            let columns = if *class == Class::Wide { width } else { 1 };
            let value = (0..columns).map(|c| {
                if let Some(last) = index.last_mut() {
                    *last = c;
                }
                let v = |v: u32| {
                    let value = &values[v as usize];
                    value[if value.len() == 1 { 0 } else { c }]
                };
                match *instr {
                    Instr::Load { input } => ins[input].get(&index),
                    Instr::Const(x) => x,
                    Instr::Iota { axis } => index[axis] as f32,
                    Instr::Random { seed, stream } => {
                        let key = [0, 1].map(|i| {
                            let word = ins[seed].ptr.0.cast::<i32>().wrapping_add(ins[seed].at(&[i]));
                            // SAFETY: the seed was checked to be two I32 within their slab.
                            unsafe { *word as u32 }
                        });
                        philox_uniform((row * width + c) as u64, stream, key)
                    }
                    Instr::Unary(op, a) => unary(op, v(a)),
                    Instr::Binary(op, a, b) => binary(op, v(a), v(b)),
                    Instr::Select(c, a, b) => {
                        if v(c) != 0.0 {
                            v(a)
                        } else {
                            v(b)
                        }
                    }
                    Instr::Reduce(op, a) => {
                        let value = &values[a as usize];
                        let each = (0..width).map(|c| value[if value.len() == 1 { 0 } else { c }]);
                        match op {
                            Reduction::Sum => each.map(f64::from).sum::<f64>() as f32,
                            Reduction::Max => each.fold(f32::NEG_INFINITY, |a, b| binary(Binary::Max, a, b)),
                        }
                    }
                    Instr::Round(dtype, a) => convert::round(dtype, v(a)),
                }
            });
            let value = value.collect();
            values.push(value);
        }
        for (&(out, v, how), sum) in program.stores.iter().zip(&mut sums) {
            let value = &values[v as usize];
            let columns = outs[out].layout.shape.last().copied().unwrap_or(1);
            for c in 0..columns {
                let x = value[if value.len() == 1 { 0 } else { c }];
                match how {
                    Store::ColumnSum => sum[c] += x as f64,
                    Store::Rows => {
                        if let Some(last) = index.last_mut() {
                            *last = c;
                        }
                        outs[out].set(&index, x);
                    }
                }
            }
        }
    }
    for (&(out, _, how), sum) in program.stores.iter().zip(&sums) {
        if how == Store::ColumnSum {
            let mut index = vec![0; rank];
            for c in 0..outs[out].layout.shape.last().copied().unwrap_or(1) {
                if let Some(last) = index.last_mut() {
                    *last = c;
                }
                outs[out].set(&index, sum[c] as f32);
            }
        }
    }
}

pub(super) fn unary(op: Unary, x: f32) -> f32 {
    match op {
        Unary::Neg => -x,
        Unary::Abs => x.abs(),
        Unary::Recip => 1.0 / x,
        Unary::Sqrt => x.sqrt(),
        Unary::Exp => x.exp(),
        Unary::Log => x.ln(),
        Unary::Sin => x.sin(),
        Unary::Cos => x.cos(),
        Unary::Tanh => x.tanh(),
        Unary::Erf => erf(x as f64) as f32,
        Unary::Floor => x.floor(),
    }
}

pub(super) fn binary(op: Binary, a: f32, b: f32) -> f32 {
    match op {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
        Binary::Max => {
            if a.is_nan() || a > b {
                a
            } else {
                b
            }
        }
        Binary::Min => {
            if a.is_nan() || a < b {
                a
            } else {
                b
            }
        }
        Binary::Less => (a < b) as i32 as f32,
        Binary::Equal => (a == b) as i32 as f32,
    }
}

/// The error function in f64: its Taylor series near 0, a continued fraction for the tail (Abramowitz & Stegun 7.1.5
/// and 7.1.14).
pub(crate) fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a.is_nan() || a > 7.0 {
        return if a.is_nan() { x } else { 1f64.copysign(x) };
    }
    if a < 2.5 {
        let (mut term, mut sum) = (x, x);
        for k in 1..80 {
            term *= -x * x / k as f64;
            sum += term / (2 * k + 1) as f64;
        }
        return sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    let tail = (1..120).rev().fold(a, |tail, k| a + 0.5 * k as f64 / tail);
    let erfc = (-a * a).exp() / (std::f64::consts::PI.sqrt() * tail);
    (1.0 - erfc).copysign(x)
}

/// Word 0 of Philox 4x32-10 (Salmon et al. 2011, section 3.2) at counter (index low, index high, stream, 0), its
/// upper 24 bits as a fraction.
pub(super) fn philox_uniform(index: u64, stream: u32, mut key: [u32; 2]) -> f32 {
    let mut c = [index as u32, (index >> 32) as u32, stream, 0];
    for _ in 0..10 {
        let a = 0xD251_1F53_u64 * c[0] as u64;
        let b = 0xCD9E_8D57_u64 * c[2] as u64;
        c = [(b >> 32) as u32 ^ c[1] ^ key[0], b as u32, (a >> 32) as u32 ^ c[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    (c[0] >> 8) as f32 / (1 << 24) as f32
}
