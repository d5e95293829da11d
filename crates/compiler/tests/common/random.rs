//! Random graphs for property tests: a script of bytes becomes a graph of nearly every op, and values for its leaves.

use sparsam_ir::interpret::{Leaves, Value};
use sparsam_ir::{AttentionScores, DType, Graph, Op, Precision, Real, Tensor, Trace};

/// Which graphs a script may become.
#[derive(Clone, Copy, Debug)]
pub struct Kinds {
    /// Steps (floor, comparisons), where the smallest error becomes a large one.
    pub jumps: bool,
    /// Gradients of everything towards the inputs and weights. Leaves out what has none.
    pub gradients: bool,
}

struct Script<'a> {
    bytes: std::slice::Iter<'a, u8>,
    t: Trace,
    pool: Vec<Tensor>,
    leaves: Vec<Tensor>,
    /// I32 inputs: name, length, one past the largest allowed.
    indices: Vec<(String, usize, usize)>,
    kinds: Kinds,
}

impl Script<'_> {
    fn pick(&mut self, n: usize) -> usize {
        self.bytes.next().map_or(0, |&b| b as usize) % n
    }

    fn one(&mut self) -> Tensor {
        // Later values more often, so that graphs grow deep.
        let n = self.pool.len();
        let back = self.pick(n).min(self.pick(n));
        self.pool[n - 1 - back].clone()
    }

    fn length(&mut self) -> usize {
        [1, 2, 3, 4, 5, 8][self.pick(6)]
    }

    fn index(&mut self, n: usize, limit: usize) -> Tensor {
        let name = format!("i{}", self.indices.len());
        self.indices.push((name.clone(), n, limit));
        self.t.input(&name, &[n], DType::I32)
    }

    fn float(&mut self, shape: &[usize]) -> Tensor {
        let name = format!("x{}", self.leaves.len());
        let leaf = self.t.input(&name, shape, DType::F32);
        self.leaves.push(leaf.clone());
        leaf
    }

    fn weight(&mut self, shape: &[usize]) -> Tensor {
        let name = format!("w{}", self.leaves.len());
        let leaf = self.t.weight(&name, shape);
        self.leaves.push(leaf.clone());
        leaf
    }

    fn axis(&mut self, x: &Tensor) -> usize {
        self.pick(x.rank())
    }

    /// Rank 2, by merging or splitting axes.
    fn matrix(&mut self, x: &Tensor) -> Tensor {
        let shape = x.shape();
        let split = if shape.len() == 1 { 0 } else { 1 + self.pick(shape.len() - 1) };
        x.reshape(&[shape[..split].iter().product(), shape[split..].iter().product()])
    }

    /// `x` brought to `shape`: as it is, repeated, or a new input.
    fn like(&mut self, x: &Tensor, shape: &[usize]) -> Tensor {
        let own = x.shape();
        let fits = own.len() <= shape.len()
            && own.iter().rev().zip(shape.iter().rev()).all(|(&a, &b)| a == b || a == 1);
        if fits { x.broadcast_to(shape) } else { self.float(shape) }
    }

    fn step(&mut self) -> Option<Tensor> {
        let x = self.one();
        let shape = x.shape();
        let last = x.rank() - 1;
        Some(match self.pick(28) {
            0 => x.tanh().exp(),
            1 => x.neg(),
            2 => x.abs().add_scalar(0.5).sqrt(),
            3 => x.sin().mul_scalar(2.0),
            4 => (&x * &x).add_scalar(1.0).recip(),
            5 => x.mul_scalar([1.0, 0.5, 0.25, -2.0][self.pick(4)]).add_scalar([0.0, 1.0][self.pick(2)]),
            6 | 7 => {
                let other = self.one();
                let y = self.like(&other, &shape);
                match self.pick(5) {
                    0 => &x - &y,
                    1 => (&x * &y).tanh(),
                    2 => x.maximum(&y),
                    3 => x.minimum(&y),
                    _ => &x + &y,
                }
            }
            8 => {
                let y = x.abs().add_scalar(1.0);
                let y = y.sum(&[last]);
                &x / &y
            }
            9 => {
                let axes: Vec<usize> = (0..x.rank()).filter(|_| self.pick(2) == 0).collect();
                if axes.is_empty() { x.max(&[last]) } else { x.sum(&axes).mul_scalar(0.125) }
            }
            10 => x.softmax(),
            11 => {
                let scale = (&x * &x).mean().add_scalar(0.125).sqrt().recip();
                &x * &scale
            }
            12 => x.reshape(&[shape.iter().product()]),
            13 => {
                let m = self.matrix(&x);
                if self.pick(2) == 0 { m.t() } else { m }
            }
            14 => {
                let mut axes: Vec<usize> = (0..x.rank()).collect();
                let (a, b) = (self.axis(&x), self.axis(&x));
                axes.swap(a, b);
                x.permute(&axes)
            }
            15 => {
                let n = self.length();
                let mut to = vec![n];
                to.extend(&shape);
                if to.len() > 4 { x } else { x.broadcast_to(&to) }
            }
            16 | 17 => {
                let a = self.axis(&x);
                let start = self.pick(shape[a]);
                let end = start + 1 + self.pick(shape[a] - start);
                x.slice(a, start, end)
            }
            18 => {
                let a = self.axis(&x);
                x.pad(a, self.pick(3), self.pick(2))
            }
            19 => {
                // Halves exchanged and recombined, as rotary embedding does.
                let a = self.axis(&x);
                let half = shape[a] / 2;
                if half == 0 {
                    return Some(self.t.concat(&[&x, &x.tanh()], a));
                }
                let (p, q) = (x.slice(a, 0, half), x.slice(a, half, 2 * half));
                self.t.concat(&[&(&p - &q), &(&q + &p.sin())], a)
            }
            20 => {
                let m = self.matrix(&x);
                let out = self.length();
                let trans_b = self.pick(2) == 0;
                let k = m.dim(1);
                let w = self.weight(&if trans_b { [out, k] } else { [k, out] });
                m.matmul_with(&w, false, trans_b, Precision::F32).mul_scalar(0.25).tanh()
            }
            21 => {
                let m = self.matrix(&x);
                let n = self.length();
                let y = self.float(&[m.dim(1), n]);
                let y = if self.pick(2) == 0 { y.sin() } else { y };
                m.matmul(&y).mul_scalar(0.25)
            }
            22 => {
                let m = self.matrix(&x);
                let n = self.length();
                let rows = self.index(n, m.dim(0));
                if self.pick(2) == 0 {
                    m.gather(&rows)
                } else {
                    let table = self.weight(&[7, m.dim(1)]);
                    let rows = self.index(m.dim(0), 7);
                    table.gather(&rows) + &m
                }
            }
            23 => {
                let m = self.matrix(&x);
                let rows = self.length();
                let to = self.index(m.dim(0), rows);
                m.scatter_add(&to, rows)
            }
            26 => {
                let m = self.matrix(&x);
                let vocab = 1 + self.length();
                let w = self.weight(&[vocab, m.dim(1)]);
                let targets = self.index(m.dim(0), vocab);
                let loss = m.tanh().linear_cross_entropy(&w, &targets, Precision::F32);
                if self.pick(2) == 0 { loss } else { m.tanh().matmul(&w.t()).exp().cross_entropy(&targets) }
            }
            27 => x.all_reduce(), // one process: itself
            24 if self.kinds.jumps => {
                let other = self.one();
                let y = self.like(&other, &shape);
                let when = match self.pick(3) {
                    0 => x.less(&y),
                    1 => x.floor().equal(&y.floor()),
                    _ => self.t.iota(&shape, last).cast(DType::F32).less(&x),
                };
                when.select(&x, &y)
            }
            25 if shape.len() == 3 && shape[2] > 1 => {
                let start = self.index(shape[0], shape[0]);
                let k = x.sin().slice(1, 0, 1);
                let v = self.float(&[shape[0], 1, 3]);
                x.attention_packed(
                    &k,
                    &v,
                    &start,
                    AttentionScores { scale: 0.5, window: Some(3), softcap: None },
                )
            }
            _ => {
                let angle = self.t.iota(&shape, last).cast(DType::F32).mul_scalar(0.25);
                &x * &angle.cos()
            }
        })
    }
}

/// The graph of a script, and values for its leaves. `None` if it came to nothing or grew too large.
pub fn graph(bytes: &[u8], kinds: Kinds) -> Option<(Graph, Leaves)> {
    let t = Trace::new();
    let mut s = Script {
        bytes: bytes.iter(),
        t: t.clone(),
        pool: Vec::new(),
        leaves: Vec::new(),
        indices: Vec::new(),
        kinds,
    };
    for _ in 0..2 {
        let rank = 1 + s.pick(3);
        let shape: Vec<usize> = (0..rank).map(|_| s.length()).collect();
        let x = s.float(&shape);
        s.pool.push(x);
    }
    while s.bytes.len() > 0 {
        let y = s.step()?;
        if y.shape().iter().product::<usize>() <= 600 {
            s.pool.push(y);
        }
    }
    if !kinds.gradients && s.pick(2) == 0 {
        let x = s.one();
        let shape = x.shape();
        let state = t.state("state", &shape, DType::F32);
        let old = state.tanh();
        let new = state.assign(&(&x + &state.mul_scalar(0.5)));
        s.pool.push(&new + &old);
    }
    let n = s.pool.len();
    let mut outputs: Vec<(String, Tensor)> = vec![
        ("last".into(), s.pool[n - 1].clone()),
        ("other".into(), s.pool[n / 2].clone()),
        ("state".into(), s.one()),
    ];
    if kinds.gradients {
        let mut loss = s.pool[n - 1].sin();
        for extra in [&s.pool[n / 2], &s.pool[n - 1 - n / 4]] {
            let sum = |x: &Tensor| x.reshape(&[x.shape().iter().product()]).sum(&[0]);
            loss = sum(&loss) + sum(&extra.tanh());
        }
        let leaves: Vec<&Tensor> = s.leaves.iter().collect();
        let grads = sparsam_ir::grad(&loss.reshape(&[1]), &leaves);
        for (i, g) in grads.iter().enumerate() {
            outputs.push((format!("d{i}"), g.clone()));
        }
    }
    let outputs: Vec<(&str, &Tensor)> = outputs.iter().map(|(name, x)| (name.as_str(), x)).collect();
    let mut graph = t.finish(&outputs).ok()?;
    // Kernels hold constants in f32: with those of the graph rounded too, everything else can be compared in f64.
    for node in &mut graph.nodes {
        if let Op::Const { value, .. } = &mut node.op {
            *value = Real::new(value.get() as f32 as f64);
        }
    }
    let mut leaves = Leaves::new();
    for (seed, node) in graph.nodes.iter().enumerate() {
        let (Op::Input { name, .. } | Op::Weight { name, .. } | Op::State { name, .. }) = &node.op else {
            continue;
        };
        let limit = s.indices.iter().find(|(n, ..)| n == name).map(|i| i.2);
        let value = |i: usize| match limit {
            Some(limit) => ((i * 31 + seed * 7) % limit) as f64,
            // Exact in f32.
            None => ((i * 37 + seed * 101) % 83) as f64 / 32.0 - 1.25,
        };
        let data: Vec<f64> = (0..node.numel()).map(value).collect();
        leaves.insert(name.clone(), Value::new(&node.shape, data));
    }
    Some((graph, leaves))
}
