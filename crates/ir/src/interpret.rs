//! The slow interpreter: the meaning of every op, in f64, written to be read.
//!
//! With [`Rounding::Stored`] each result is rounded to its element type, which is what any f32 implementation
//! approximates; with [`Rounding::None`] all stays in f64: the truth that tolerances are derived from and that
//! finite differences need.

use crate::graph::{Graph, Node};
use crate::op::{Attention, AttentionLayout, AttentionPart, Binary, CrossEntropyPart, Op, Reduction, Unary};
use sparsam_dtype::{DType, bf16, codec, f16};
use std::collections::HashMap;

/// A tensor of numbers, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// Length of each axis.
    pub shape: Vec<usize>,
    /// Elements; integers are held exactly.
    pub data: Vec<f64>,
}

impl Value {
    /// A tensor of `shape` with `data` in row-major order.
    ///
    /// # Panics
    /// If the counts differ.
    pub fn new(shape: &[usize], data: impl Into<Vec<f64>>) -> Value {
        let data = data.into();
        assert_eq!(shape.iter().product::<usize>(), data.len(), "shape {shape:?}");
        Value { shape: shape.to_vec(), data }
    }

    /// From f32 numbers.
    pub fn from_f32(shape: &[usize], data: &[f32]) -> Value {
        Value::new(shape, data.iter().map(|&x| x as f64).collect::<Vec<_>>())
    }

    /// From integers.
    pub fn from_i32(shape: &[usize], data: &[i32]) -> Value {
        Value::new(shape, data.iter().map(|&x| x as f64).collect::<Vec<_>>())
    }
}

/// Whether results are rounded to their element types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// Each result is rounded to its element type.
    Stored,
    /// Everything stays in f64.
    None,
}

/// The values of all leaves by name: inputs, weights (decoded) and states. States are updated by the run.
pub type Leaves = HashMap<String, Value>;

/// What is wrong with the values handed in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InterpretError {
    /// A leaf has no value or one of another shape.
    #[error("interpret: {name:?} must have shape {want:?}, got {got:?}")]
    Leaf {
        /// Name of the leaf.
        name: String,
        /// Shape that the graph wants.
        want: Vec<usize>,
        /// Shape given, if any.
        got: Option<Vec<usize>>,
    },
    /// An index lies outside of its table.
    #[error("interpret: {op}: index {index} outside of 0..{limit}")]
    Index {
        /// The op.
        op: &'static str,
        /// The index.
        index: i64,
        /// One past the largest allowed.
        limit: usize,
    },
}

/// Values of the outputs by name; states in `leaves` are replaced by their last versions.
pub fn interpret(
    graph: &Graph,
    leaves: &mut Leaves,
    rounding: Rounding,
) -> Result<HashMap<String, Value>, InterpretError> {
    let values = interpret_all(graph, leaves, rounding)?;
    for id in &graph.writes {
        if let Some(state) = graph.state_of(*id)
            && let Op::State { name, .. } = &graph.node(state).op
        {
            leaves.insert(name.clone(), values[id.index()].clone());
        }
    }
    Ok(graph.outputs.iter().map(|(n, id)| (n.clone(), values[id.index()].clone())).collect())
}

/// The value of every node, in order.
pub fn interpret_all(
    graph: &Graph,
    leaves: &Leaves,
    rounding: Rounding,
) -> Result<Vec<Value>, InterpretError> {
    let mut values: Vec<Value> = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let inputs: Vec<&Value> = node.inputs.iter().map(|i| &values[i.index()]).collect();
        let mut data = eval(node, &inputs, leaves)?;
        if rounding == Rounding::Stored {
            match node.op {
                Op::Assign | Op::ScatterRows if node.dtype.is_block() => round_blocks(&mut data, node.dtype),
                _ => data.iter_mut().for_each(|x| *x = round(*x, node.dtype)),
            }
        }
        values.push(Value::new(&node.shape, data));
    }
    Ok(values)
}

/// Rounds rows of whole blocks to the nearest codes; what is rounded already stays.
fn round_blocks(data: &mut [f64], dtype: DType) {
    let mut x: Vec<f32> = data.iter().map(|&x| x as f32).collect();
    let mut bytes = vec![0; dtype.bytes_for(x.len()).unwrap_or(0)];
    let rounded = codec::encode(dtype, &x, &mut bytes).and_then(|()| codec::decode(dtype, &bytes, &mut x));
    rounded.expect("a state's rows are whole blocks: its shape was checked");
    data.iter_mut().zip(x).for_each(|(to, x)| *to = x as f64);
}

/// `x` as an element of type `dtype` holds it.
pub fn round(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F32 => x as f32 as f64,
        DType::F16 => f16::from_f64(x).to_f64(),
        DType::BF16 => bf16::from_f64(x).to_f64(),
        _ => x,
    }
}

fn eval(node: &Node, inputs: &[&Value], leaves: &Leaves) -> Result<Vec<f64>, InterpretError> {
    let out_shape = &node.shape;
    let n = node.numel();
    let x = |i: usize| &inputs[i].data;
    Ok(match &node.op {
        Op::Input { name, shape, .. } | Op::Weight { name, shape, .. } | Op::State { name, shape, .. } => {
            match leaves.get(name) {
                Some(v) if v.shape == *shape => v.data.clone(),
                other => {
                    let got = other.map(|v| v.shape.clone());
                    return Err(InterpretError::Leaf { name: name.clone(), want: shape.clone(), got });
                }
            }
        }
        Op::Const { value, .. } => vec![value.get(); n],
        Op::Iota { axis, .. } => (0..n).map(|i| unravel(i, out_shape)[*axis] as f64).collect(),
        Op::Random { stream, .. } => {
            let key = [x(0)[0] as i32 as u32, x(0)[1] as i32 as u32];
            (0..n as u64).map(|i| philox_uniform(i, *stream, key) as f64).collect()
        }
        Op::Unary(u) => x(0).iter().map(|&a| unary(*u, a)).collect(),
        Op::Binary(b) => x(0).iter().zip(x(1)).map(|(&p, &q)| binary(*b, p, q)).collect(),
        Op::Select => (0..n).map(|i| if x(0)[i] != 0.0 { x(1)[i] } else { x(2)[i] }).collect(),
        Op::Cast(to) => x(0).iter().map(|&a| cast(a, *to)).collect(),
        Op::Reduce { op, axes } => {
            let start = if *op == Reduction::Sum { 0.0 } else { f64::NEG_INFINITY };
            let mut out = vec![start; n];
            for (i, &a) in x(0).iter().enumerate() {
                let mut at = unravel(i, &inputs[0].shape);
                axes.iter().for_each(|&axis| at[axis] = 0);
                let o = &mut out[ravel(&at, out_shape)];
                *o = if *op == Reduction::Sum { *o + a } else { binary(Binary::Max, *o, a) };
            }
            out
        }
        Op::Reshape(_) => x(0).clone(),
        Op::Permute(axes) => (0..n)
            .map(|i| {
                let mut at = vec![0; axes.len()];
                unravel(i, out_shape).iter().zip(axes).for_each(|(&p, &a)| at[a] = p);
                x(0)[ravel(&at, &inputs[0].shape)]
            })
            .collect(),
        Op::Broadcast(_) => (0..n)
            .map(|i| {
                let at = unravel(i, out_shape);
                let at: Vec<usize> =
                    at.iter().zip(&inputs[0].shape).map(|(&p, &len)| if len == 1 { 0 } else { p }).collect();
                x(0)[ravel(&at, &inputs[0].shape)]
            })
            .collect(),
        Op::Slice { axis, start, .. } => (0..n)
            .map(|i| {
                let mut at = unravel(i, out_shape);
                at[*axis] += start;
                x(0)[ravel(&at, &inputs[0].shape)]
            })
            .collect(),
        Op::Pad { axis, before, .. } => {
            let mut out = vec![0.0; n];
            for (i, &a) in x(0).iter().enumerate() {
                let mut at = unravel(i, &inputs[0].shape);
                at[*axis] += before;
                out[ravel(&at, out_shape)] = a;
            }
            out
        }
        Op::Concat { axis } => {
            let mut out = vec![0.0; n];
            let mut before = 0;
            for v in inputs {
                for (i, &a) in v.data.iter().enumerate() {
                    let mut at = unravel(i, &v.shape);
                    at[*axis] += before;
                    out[ravel(&at, out_shape)] = a;
                }
                before += v.shape[*axis];
            }
            out
        }
        Op::Matmul { trans_a, trans_b, .. } => {
            let (a, b) = (inputs[0], inputs[1]);
            let r = a.shape.len();
            let (m, c) = (out_shape[r - 2], out_shape[r - 1]);
            let k = a.shape[if *trans_a { r - 2 } else { r - 1 }];
            let mut out = Vec::with_capacity(n);
            for batch in 0..n.checked_div(m * c).unwrap_or(0) {
                let (a, b) = (&a.data[batch * m * k..], &b.data[batch * k * c..]);
                for i in 0..m {
                    for j in 0..c {
                        let left = |p: usize| if *trans_a { a[p * m + i] } else { a[i * k + p] };
                        let right = |p: usize| if *trans_b { b[j * k + p] } else { b[p * c + j] };
                        out.push((0..k).map(|p| left(p) * right(p)).sum());
                    }
                }
            }
            out
        }
        Op::Gather => {
            let row = inputs[0].shape[1..].iter().product::<usize>();
            let mut out = Vec::with_capacity(n);
            for &r in x(1) {
                let r = index("gather", r, inputs[0].shape[0])?;
                out.extend(&x(0)[r * row..(r + 1) * row]);
            }
            out
        }
        Op::ScatterAdd { rows } => {
            let row = out_shape[1..].iter().product::<usize>();
            let mut out = vec![0.0; n];
            for (i, &r) in x(1).iter().enumerate() {
                let r = index("scatter_add", r, *rows)?;
                (0..row).for_each(|j| out[r * row + j] += x(0)[i * row + j]);
            }
            out
        }
        Op::Attention(a) => attention(a, inputs)?,
        Op::CrossEntropy { part, .. } => cross_entropy(*part, inputs)?,
        // This is one process.
        Op::AllReduce => x(0).clone(),
        // Rounded to the state's type by the caller, like every result.
        Op::Assign => x(1).clone(),
        Op::ScatterRows => {
            let row = out_shape[1..].iter().product::<usize>();
            let mut out = x(0).clone();
            for (i, &slot) in x(2).iter().enumerate() {
                if slot == -1.0 {
                    continue;
                }
                let slot = index("scatter_rows", slot, out_shape[0])?;
                (0..row).for_each(|j| out[slot * row + j] = x(1)[i * row + j]);
            }
            out
        }
    })
}

fn attention(a: &Attention, inputs: &[&Value]) -> Result<Vec<f64>, InterpretError> {
    let (q, k, v) = (inputs[0], inputs[1], inputs[2]);
    let [n, heads, dim] = [q.shape[0], q.shape[1], q.shape[2]];
    let [rows, kv_heads, v_dim] = [k.shape[0], k.shape[1], v.shape[2]];
    let mut out = match a.part {
        AttentionPart::Out => vec![0.0; n * heads * v_dim],
        AttentionPart::LogSumExp => vec![0.0; n * heads],
        AttentionPart::GradQ => vec![0.0; q.data.len()],
        AttentionPart::GradK => vec![0.0; k.data.len()],
        AttentionPart::GradV => vec![0.0; v.data.len()],
    };
    for i in 0..n {
        // The slots of the keys that row i sees, oldest first.
        let slots: Vec<usize> = match a.layout {
            AttentionLayout::Packed => {
                (inputs[3].data[i] as i64..=i as i64).map(|r| r.max(0) as usize).collect()
            }
            AttentionLayout::Paged { page_size } => {
                let (position, seq, table) = (inputs[3].data[i] as i64, inputs[4].data[i], inputs[5]);
                let mut slots = Vec::new();
                if seq != -1.0 {
                    let seq = index("attention row_seq", seq, table.shape[0])?;
                    for p in 0..(position + 1).max(0) as usize {
                        let page = index("attention page", (p / page_size) as f64, table.shape[1])?;
                        let page = table.data[seq * table.shape[1] + page];
                        slots.push(index("attention slot", page * page_size as f64, rows)? + p % page_size);
                    }
                }
                slots
            }
        };
        let first = a.window.map_or(0, |w| slots.len().saturating_sub(w));
        for h in 0..heads {
            let kv = h / (heads / kv_heads);
            let row = i * heads + h;
            let key = |s: usize| &k.data[(s * kv_heads + kv) * dim..][..dim];
            let value = |s: usize| &v.data[(s * kv_heads + kv) * v_dim..][..v_dim];
            let query = &q.data[row * dim..][..dim];
            let scores: Vec<f64> = slots[first..]
                .iter()
                .map(|&s| {
                    let s = dot(query, key(s)) * a.scale.get();
                    a.softcap.map_or(s, |c| c.get() * (s / c.get()).tanh())
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            let seen = || scores.iter().map(|s| (s - max).exp() / total).zip(&scores).zip(&slots[first..]);
            match a.part {
                AttentionPart::LogSumExp => {
                    out[row] = if scores.is_empty() { f64::NEG_INFINITY } else { max + total.ln() };
                }
                AttentionPart::Out => {
                    for ((p, _), &s) in seen() {
                        (0..v_dim).for_each(|d| out[row * v_dim + d] += p * value(s)[d]);
                    }
                }
                // dV = P^T dO; dS = P (dP - sum(dO O)), through the soft cap; dQ = dS K, dK = dS^T Q.
                AttentionPart::GradQ | AttentionPart::GradK | AttentionPart::GradV => {
                    let d_out = &inputs[6].data[row * v_dim..][..v_dim];
                    let own: f64 = seen().map(|((p, _), &s)| p * dot(d_out, value(s))).sum();
                    for ((p, &score), &s) in seen() {
                        let cap = a.softcap.map_or(1.0, |c| 1.0 - (score / c.get()).powi(2));
                        let d_score = p * (dot(d_out, value(s)) - own) * cap * a.scale.get();
                        let at = s * kv_heads + kv;
                        match a.part {
                            AttentionPart::GradQ => {
                                (0..dim).for_each(|d| out[row * dim + d] += d_score * key(s)[d])
                            }
                            AttentionPart::GradK => {
                                (0..dim).for_each(|d| out[at * dim + d] += d_score * query[d])
                            }
                            _ => (0..v_dim).for_each(|d| out[at * v_dim + d] += p * d_out[d]),
                        }
                    }
                }
            }
        }
    }
    Ok(out)
}

fn cross_entropy(part: CrossEntropyPart, inputs: &[&Value]) -> Result<Vec<f64>, InterpretError> {
    let (h, w, targets) = (inputs[0], inputs[1], inputs[2]);
    let [n, dim, vocab] = [h.shape[0], h.shape[1], w.shape[0]];
    let mut out = match part {
        CrossEntropyPart::Loss => vec![0.0; n],
        CrossEntropyPart::GradH => vec![0.0; n * dim],
        CrossEntropyPart::GradWeight => vec![0.0; vocab * dim],
    };
    for i in 0..n {
        if targets.data[i] == -1.0 {
            continue;
        }
        let target = index("cross_entropy target", targets.data[i], vocab)?;
        let h = &h.data[i * dim..][..dim];
        let row = |v: usize| &w.data[v * dim..][..dim];
        let logits: Vec<f64> = (0..vocab).map(|v| dot(h, row(v))).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = logits.iter().map(|l| (l - max).exp()).sum();
        if part == CrossEntropyPart::Loss {
            out[i] = max + total.ln() - logits[target];
            continue;
        }
        for (v, l) in logits.iter().enumerate() {
            let p = (l - max).exp() / total;
            let d = (p - f64::from(u8::from(v == target))) * inputs[3].data[i];
            match part {
                CrossEntropyPart::GradH => (0..dim).for_each(|k| out[i * dim + k] += d * row(v)[k]),
                _ => (0..dim).for_each(|k| out[v * dim + k] += d * h[k]),
            }
        }
    }
    Ok(out)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn index(op: &'static str, at: f64, limit: usize) -> Result<usize, InterpretError> {
    if at >= 0.0 && at < limit as f64 {
        Ok(at as usize)
    } else {
        Err(InterpretError::Index { op, index: at as i64, limit })
    }
}

/// A function of one number.
pub fn unary(op: Unary, x: f64) -> f64 {
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
        Unary::Erf => erf(x),
        Unary::Floor => x.floor(),
    }
}

/// A function of two numbers.
pub fn binary(op: Binary, a: f64, b: f64) -> f64 {
    match op {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
        // NaN on either side stays NaN, as in PyTorch.
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
        Binary::Less => (a < b) as i32 as f64,
        Binary::Equal => (a == b) as i32 as f64,
    }
}

/// `x` converted to `to`: whole numbers are cut towards 0 and kept within their range.
pub fn cast(x: f64, to: DType) -> f64 {
    match to {
        DType::I32 => x as i32 as f64,
        DType::I8 => x as i8 as f64,
        DType::U8 => x as u8 as f64,
        // Floats are rounded like every result, where results are rounded.
        _ => x,
    }
}

/// The error function to f64 precision: its Taylor series near 0, a continued fraction for the tail.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a < 2.5 {
        let (mut term, mut sum) = (x, x);
        for k in 1..80 {
            term *= -x * x / k as f64;
            sum += term / (2 * k + 1) as f64;
        }
        return sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    // erfc(a) = exp(-a^2) / sqrt(pi) * 1 / (a + (1/2) / (a + 1 / (a + (3/2) / ...)))
    let mut tail = a;
    for k in (1..120).rev() {
        tail = a + 0.5 * k as f64 / tail;
    }
    let erfc = (-a * a).exp() / (std::f64::consts::PI.sqrt() * tail);
    if x < 0.0 { erfc - 1.0 } else { 1.0 - erfc }
}

/// Word 0 of Philox 4x32-10 (Salmon et al. 2011, section 3.2) at counter (index low, index high, stream, 0), its
/// upper 24 bits as a fraction.
pub fn philox_uniform(index: u64, stream: u32, mut key: [u32; 2]) -> f32 {
    let mut c = [index as u32, (index >> 32) as u32, stream, 0];
    for _ in 0..10 {
        let a = 0xD251_1F53_u64 * c[0] as u64;
        let b = 0xCD9E_8D57_u64 * c[2] as u64;
        c = [(b >> 32) as u32 ^ c[1] ^ key[0], b as u32, (a >> 32) as u32 ^ c[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    (c[0] >> 8) as f32 / (1 << 24) as f32
}

fn unravel(mut i: usize, shape: &[usize]) -> Vec<usize> {
    let mut at = vec![0; shape.len()];
    for (a, &n) in at.iter_mut().zip(shape).rev() {
        *a = i % n;
        i /= n;
    }
    at
}

fn ravel(at: &[usize], shape: &[usize]) -> usize {
    at.iter().zip(shape).fold(0, |i, (&a, &n)| i * n + a)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionScores, Trace};

    fn run(f: impl Fn(&Trace) -> crate::Tensor, leaves: &[(&str, Value)]) -> Value {
        let t = Trace::new();
        let y = f(&t);
        let g = t.finish(&[("y", &y)]).unwrap();
        crate::verify(&g).unwrap();
        let mut leaves = leaves.iter().map(|(n, v)| (n.to_string(), v.clone())).collect();
        interpret(&g, &mut leaves, Rounding::None).unwrap().remove("y").unwrap()
    }

    #[test]
    fn movement_by_hand() {
        let x = Value::new(&[2, 3], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let inputs = [("x", x)];
        let y = run(|t| t.input("x", &[2, 3], DType::F32).t(), &inputs);
        assert_eq!(y, Value::new(&[3, 2], [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]));
        let y = run(|t| t.input("x", &[2, 3], DType::F32).slice(1, 1, 3).pad(0, 1, 0), &inputs);
        assert_eq!(y, Value::new(&[3, 2], [0.0, 0.0, 2.0, 3.0, 5.0, 6.0]));
        let y = run(
            |t| {
                let x = t.input("x", &[2, 3], DType::F32);
                t.concat(&[&x, &x.sum(&[1])], 1)
            },
            &inputs,
        );
        assert_eq!(y, Value::new(&[2, 4], [1.0, 2.0, 3.0, 6.0, 4.0, 5.0, 6.0, 15.0]));
    }

    #[test]
    fn matmul_transposed_or_not_is_the_same() {
        let a = Value::new(&[2, 3], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let b = Value::new(&[3, 2], [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
        let inputs = [("a", a), ("b", b)];
        let plain =
            run(|t| t.input("a", &[2, 3], DType::F32).matmul(&t.input("b", &[3, 2], DType::F32)), &inputs);
        assert_eq!(plain.data, [4.0, 5.0, 10.0, 11.0]);
        let both = run(
            |t| {
                let (a, b) = (t.input("a", &[2, 3], DType::F32).t(), t.input("b", &[3, 2], DType::F32).t());
                a.matmul_with(&b, true, true, crate::Precision::F32)
            },
            &inputs,
        );
        assert_eq!(both, plain);
    }

    #[test]
    fn paged_attention_equals_packed() {
        // Two sequences of 3 and 2 tokens; pages of 2 in shuffled order.
        let n = 5;
        let value = |seed: usize, shape: &[usize]| {
            let count = shape.iter().product::<usize>();
            Value::new(
                shape,
                (0..count).map(|i| ((i * 37 + seed * 11) % 19) as f64 / 7.0 - 1.0).collect::<Vec<_>>(),
            )
        };
        let (q, k, v) = (value(1, &[n, 4, 2]), value(2, &[n, 2, 2]), value(3, &[n, 2, 3]));
        let how = AttentionScores { scale: 0.5, window: Some(2), softcap: Some(3.0) };
        let packed = run(
            |t| {
                let q = t.input("q", &[n, 4, 2], DType::F32);
                let (k, v) = (t.input("k", &[n, 2, 2], DType::F32), t.input("v", &[n, 2, 3], DType::F32));
                q.attention_packed(&k, &v, &t.input("start", &[n], DType::I32), how)
            },
            &[
                ("q", q.clone()),
                ("k", k.clone()),
                ("v", v.clone()),
                ("start", Value::from_i32(&[n], &[0, 0, 0, 3, 3])),
            ],
        );
        let paged = run(
            |t| {
                let q = t.input("q", &[n, 4, 2], DType::F32);
                let (k, v) = (t.input("k", &[n, 2, 2], DType::F32), t.input("v", &[n, 2, 3], DType::F32));
                let slots = t.input("slots", &[n], DType::I32);
                let kp = t.state("kp", &[8, 2, 2], DType::F32).scatter_rows(&k, &slots);
                let vp = t.state("vp", &[8, 2, 3], DType::F32).scatter_rows(&v, &slots);
                let index = [("pos", vec![n]), ("seq", vec![n]), ("table", vec![2, 2])];
                let [pos, seq, table] = index.map(|(name, shape)| t.input(name, &shape, DType::I32));
                q.attention_paged(&kp, &vp, [&pos, &seq, &table], 2, how)
            },
            &[
                ("q", q),
                ("k", k),
                ("v", v),
                ("kp", Value::new(&[8, 2, 2], vec![9.0; 32])),
                ("vp", Value::new(&[8, 2, 3], vec![9.0; 48])),
                ("slots", Value::from_i32(&[n], &[6, 7, 2, 0, 1])),
                ("pos", Value::from_i32(&[n], &[0, 1, 2, 0, 1])),
                ("seq", Value::from_i32(&[n], &[0, 0, 0, 1, 1])),
                ("table", Value::from_i32(&[2, 2], &[3, 1, 0, 2])),
            ],
        );
        assert_eq!(packed, paged);
        assert!(packed.data.iter().any(|x| x.abs() > 0.1));
    }

    #[test]
    fn erf_and_philox_have_known_values() {
        // Abramowitz & Stegun, table 7.1.
        for (x, y) in [(0.5, 0.5204998778130465), (1.0, 0.8427007929497149), (3.0, 0.9999779095030014)] {
            assert!((erf(x) - y).abs() < 1e-14, "erf({x}) = {}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
        // Random123's known answer for philox4x32-10, counter and key 0: 6627e8d5 ...
        assert_eq!(philox_uniform(0, 0, [0, 0]), (0x6627e8d5_u32 >> 8) as f32 / (1 << 24) as f32);
    }

    #[test]
    fn bad_leaves_and_indices_are_errors() {
        let t = Trace::new();
        let y = t.input("table", &[3, 2], DType::F32).gather(&t.input("rows", &[1], DType::I32));
        let g = t.finish(&[("y", &y)]).unwrap();
        let mut leaves: Leaves = HashMap::from([("table".into(), Value::new(&[3, 2], vec![0.0; 6]))]);
        assert!(matches!(
            interpret(&g, &mut leaves, Rounding::Stored),
            Err(InterpretError::Leaf { got: None, .. })
        ));
        leaves.insert("rows".into(), Value::from_i32(&[1], &[3]));
        assert_eq!(
            interpret(&g, &mut leaves, Rounding::Stored),
            Err(InterpretError::Index { op: "gather", index: 3, limit: 3 })
        );
    }
}
