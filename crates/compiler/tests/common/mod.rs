//! A Llama written with the trace alone, for the tests of compiler and runtime.

use sparsam_ir::interpret::{Leaves, Value};
use sparsam_ir::{AttentionScores, DType, Graph, Op, Precision, Tensor, Trace};

pub struct Config {
    pub n_tokens: usize,
    pub n_layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    pub vocab: usize,
    pub slots: usize,
}

pub const SMALL: Config = Config {
    n_tokens: 3,
    n_layers: 2,
    hidden: 24,
    heads: 6,
    kv_heads: 2,
    head_dim: 4,
    intermediate: 40,
    vocab: 17,
    slots: 8,
};

pub fn norm(x: &Tensor, name: &str) -> Tensor {
    let hidden = x.dim(1);
    let scale = (x * x).mean().add_scalar(1e-5).sqrt().recip();
    x * &scale * x.trace().weight(name, &[hidden])
}

pub fn linear(x: &Tensor, name: &str, out: usize, precision: Precision) -> Tensor {
    let w = x.trace().weight(name, &[out, x.dim(1)]);
    x.matmul_with(&w, false, true, precision)
}

pub fn rope(x: &Tensor, positions: &Tensor) -> Tensor {
    let (n, heads, dim) = (x.dim(0), x.dim(1), x.dim(2));
    let t = x.trace();
    let half = dim / 2;
    let frequency = t.iota(&[1, half], 1).cast(DType::F32).mul_scalar(-(10000f64.ln()) / half as f64).exp();
    let angle = positions.cast(DType::F32).reshape(&[n, 1]).broadcast_to(&[n, half]) * frequency;
    let table = |t: Tensor| t.reshape(&[n, 1, half]).broadcast_to(&[n, heads, half]);
    let (cos, sin) = (table(angle.cos()), table(angle.sin()));
    let (a, b) = (x.slice(2, 0, half), x.slice(2, half, dim));
    let first = &a * &cos - &b * &sin;
    let second = &b * &cos + &a * &sin;
    t.concat(&[&first, &second], 2)
}

pub fn llama(c: &Config) -> Graph {
    llama_in(&Trace::new(), c, Precision::F32)
}

/// As [`llama`], over the weights that the trace knows.
pub fn llama_in(t: &Trace, c: &Config, precision: Precision) -> Graph {
    let linear = |x: &Tensor, name: &str, out: usize| linear(x, name, out, precision);
    let n = c.n_tokens;
    let input = |name: &str, shape: &[usize]| t.input(name, shape, DType::I32);
    let (tokens, positions, row_seq) =
        (input("tokens", &[n]), input("positions", &[n]), input("row_seq", &[n]));
    let (slots, table) = (input("slots", &[n]), input("page_table", &[1, c.slots / 2]));
    let embed = t.weight("embed", &[c.vocab, c.hidden]);
    let mut x = embed.gather(&tokens);
    for l in 0..c.n_layers {
        let h = norm(&x, &format!("{l}.norm1"));
        let heads = |name: &str, count: usize| {
            linear(&h, &format!("{l}.{name}"), count * c.head_dim).reshape(&[n, count, c.head_dim])
        };
        let (q, k, v) = (heads("q", c.heads), heads("k", c.kv_heads), heads("v", c.kv_heads));
        let (q, k) = (rope(&q, &positions), rope(&k, &positions));
        let pool = |name: &str, values: &Tensor| {
            t.state(&format!("cache.{name}.{l}"), &[c.slots, c.kv_heads, c.head_dim], DType::F16)
                .scatter_rows(values, &slots)
        };
        let (k, v) = (pool("k", &k), pool("v", &v));
        let how = AttentionScores { scale: (c.head_dim as f64).powf(-0.5), window: None, softcap: None };
        let o = q.attention_paged(&k, &v, [&positions, &row_seq, &table], 2, how);
        x = &x + &linear(&o.reshape(&[n, c.heads * c.head_dim]), &format!("{l}.o"), c.hidden);
        let h = norm(&x, &format!("{l}.norm2"));
        let gate = linear(&h, &format!("{l}.gate"), c.intermediate).silu();
        let up = linear(&h, &format!("{l}.up"), c.intermediate);
        x = &x + &linear(&(gate * up), &format!("{l}.down"), c.hidden);
    }
    let logits = norm(&x, "norm").matmul_with(&embed, false, true, precision);
    t.finish(&[("logits", &logits), ("p", &logits.softmax())]).unwrap()
}

/// Made-up values for all leaves.
pub fn leaves(graph: &Graph) -> Leaves {
    let mut leaves = Leaves::new();
    for (seed, node) in graph.nodes.iter().enumerate() {
        let float = |i: usize| (((i * 37 + seed * 101) % 83) as f64 / 41.0 - 1.0) * 0.5;
        let n = node.numel();
        match &node.op {
            Op::Input { name, .. } => {
                let data: Vec<f64> = match name.as_str() {
                    "row_seq" => vec![0.0; n],
                    "page_table" => (0..n).rev().map(|i| i as f64).collect(),
                    "slots" => [6.0, 7.0, 4.0][..n].to_vec(), // positions 0, 1, 2 of pages 3, 2, 1, 0
                    _ => (0..n).map(|i| i as f64).collect(),
                };
                leaves.insert(name.clone(), Value::new(&node.shape, data));
            }
            Op::Weight { name, .. } => {
                leaves.insert(name.clone(), Value::new(&node.shape, (0..n).map(float).collect::<Vec<_>>()));
            }
            Op::State { name, .. } => {
                leaves.insert(name.clone(), Value::new(&node.shape, vec![0.0; n]));
            }
            _ => {}
        }
    }
    leaves
}
