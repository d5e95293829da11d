//! Recording a graph by calling a function over [`Tensor`] handles.
//!
//! A shape error does not stop the model function: the trace keeps the first one, with the caller's line, and
//! [`Trace::finish`] hands it out. So model files stay free of `?`, and a bad configuration never kills a server.

use crate::graph::{Graph, Node, NodeId};
use crate::infer::infer;
use crate::op::{Attention, AttentionLayout, AttentionPart, Binary, Op, Precision, Real, Reduction, Unary};
use sparsam_dtype::DType;
use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::Location;
use std::rc::Rc;

/// The first thing that went wrong while tracing.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{op}: {what} (at {at})")]
pub struct TraceError {
    /// The operation.
    pub op: String,
    /// Shapes and what is wrong with them.
    pub what: String,
    /// Line of the code that asked for it.
    pub at: &'static Location<'static>,
}

#[derive(Default)]
struct Recorder {
    graph: Graph,
    error: Option<TraceError>,
    /// What weights there are: shape and stored type by name. `None`: any weight, stored as F32.
    weights: Option<HashMap<String, (Vec<usize>, DType)>>,
    /// Which weights are trained: they become states.
    trained: Option<fn(&str) -> bool>,
    /// Trained weights in the order in which they were first asked for.
    parameters: Vec<(String, NodeId)>,
    /// The newest version of each state.
    states: HashMap<String, NodeId>,
    /// Inputs and weights asked for so far: one leaf a name, however often a model asks (a tied head, positions in
    /// every layer), so that its gradient and its binding are one.
    leaves: HashMap<String, NodeId>,
    /// Parameters that are computed instead of read.
    bound: HashMap<String, NodeId>,
}

/// A graph being recorded. Clones record into the same graph.
#[derive(Clone, Default)]
pub struct Trace(Rc<RefCell<Recorder>>);

/// A value in a trace: shape and type known, contents not.
#[derive(Clone)]
pub struct Tensor {
    trace: Trace,
    /// `None` after an error: whatever is computed from it is nothing too.
    id: Option<NodeId>,
}

impl Trace {
    /// An empty trace in which every weight that is asked for exists, as F32.
    pub fn new() -> Trace {
        Trace::default()
    }

    /// An empty trace over weights of known shape and stored type; asking for another is an error.
    pub fn with_weights(weights: HashMap<String, (Vec<usize>, DType)>) -> Trace {
        let t = Trace::new();
        t.0.borrow_mut().weights = Some(weights);
        t
    }

    /// The same trace, in which every weight whose name `trained` accepts is a parameter under training: a state of
    /// type F32, read and written like any other, listed by [`Trace::parameters`].
    pub fn training(self, trained: fn(&str) -> bool) -> Trace {
        self.0.borrow_mut().trained = Some(trained);
        self
    }

    /// The parameters under training that were asked for so far, in order, as they are before this step's writes.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        self.0.borrow().parameters.iter().map(|(name, id)| (name.clone(), self.tensor(*id))).collect()
    }

    /// The graph whose results are `outputs`; states written on the way belong to it too.
    pub fn finish(&self, outputs: &[(&str, &Tensor)]) -> Result<Graph, TraceError> {
        let r = self.0.borrow();
        if let Some(e) = &r.error {
            return Err(e.clone());
        }
        let mut graph = r.graph.clone();
        graph.outputs =
            outputs.iter().filter_map(|(name, t)| t.id.map(|id| (name.to_string(), id))).collect();
        graph.writes = r.states.values().copied().filter(|&id| graph.node(id).op.writes_state()).collect();
        graph.writes.sort_unstable();
        Ok(graph)
    }

    /// Records an error of the model's own, such as a configuration that contradicts itself.
    #[track_caller]
    pub fn fail(&self, op: &str, what: impl Into<String>) {
        let mut r = self.0.borrow_mut();
        if r.error.is_none() {
            r.error = Some(TraceError { op: op.to_string(), what: what.into(), at: Location::caller() });
        }
    }

    /// A value given at every run. Asked for twice, it is the same node.
    #[track_caller]
    pub fn input(&self, name: &str, shape: &[usize], dtype: DType) -> Tensor {
        self.leaf(name, Op::Input { name: name.to_string(), shape: shape.to_vec(), dtype })
    }

    /// The one leaf called `name`; asking for another kind, shape or type under that name is an error.
    #[track_caller]
    fn leaf(&self, name: &str, op: Op) -> Tensor {
        let known = self.0.borrow().leaves.get(name).copied();
        if let Some(id) = known {
            let same = self.0.borrow().graph.node(id).op == op;
            if same {
                return Tensor { trace: self.clone(), id: Some(id) };
            }
            let before = crate::print::op_text(&self.0.borrow().graph.node(id).op);
            self.fail(&crate::print::op_text(&op), format!("{name} is already {before}"));
            return self.nothing();
        }
        let t = self.push(op, &[]);
        if let Some(id) = t.id {
            self.0.borrow_mut().leaves.insert(name.to_string(), id);
        }
        t
    }

    /// From now on the parameter `name` is `value`: a model that asks for it gets what was computed, and gradients go on
    /// behind it.
    ///
    /// ```
    /// use sparsam_ir::{DType, Trace};
    /// let t = Trace::new();
    /// let (codes, scale) = (t.weight("codes", &[2, 3]), t.input("scale", &[2, 1], DType::F32));
    /// t.bind("w", &(codes * scale));
    /// assert_eq!(t.weight("w", &[2, 3]).shape(), [2, 3]);
    /// ```
    pub fn bind(&self, name: &str, value: &Tensor) {
        if let Some(id) = value.id {
            self.0.borrow_mut().bound.insert(name.to_string(), id);
        }
    }

    /// The parameter `name`, which must have `shape`, as it is stored. Asked for twice, it is the same node.
    #[track_caller]
    pub fn weight(&self, name: &str, shape: &[usize]) -> Tensor {
        let bound = self.0.borrow().bound.get(name).copied();
        if let Some(id) = bound {
            let t = self.tensor(id);
            if t.shape() != shape {
                let have = t.shape();
                self.fail(
                    "weight",
                    format!("{name} is bound to a value of shape {have:?}, the model wants {shape:?}"),
                );
                return self.nothing();
            }
            return t;
        }
        let known = self.0.borrow().weights.as_ref().map(|w| w.get(name).cloned());
        let dtype = match known {
            None => DType::F32,
            Some(None) => {
                self.fail("weight", format!("the model has no tensor {name}"));
                return self.nothing();
            }
            Some(Some((have, dtype))) => {
                if have != shape {
                    self.fail(
                        "weight",
                        format!("tensor {name} has shape {have:?}, the model wants {shape:?}"),
                    );
                    return self.nothing();
                }
                dtype
            }
        };
        if self.0.borrow().trained.is_some_and(|trained| trained(name)) {
            let t = self.state(name, shape, DType::F32);
            if let Some(id) = t.id
                && !self.0.borrow().parameters.iter().any(|(n, _)| n == name)
            {
                self.0.borrow_mut().parameters.push((name.to_string(), id));
            }
            return t;
        }
        self.leaf(name, Op::Weight { name: name.to_string(), shape: shape.to_vec(), dtype })
    }

    /// The F32 value `name`, bound like a weight but computed from the model's configuration: never trained, and not
    /// among the weights known beforehand.
    #[track_caller]
    pub fn constant(&self, name: &str, shape: &[usize]) -> Tensor {
        self.leaf(name, Op::Weight { name: name.to_string(), shape: shape.to_vec(), dtype: DType::F32 })
    }

    /// Whether there is a parameter `name` (always, where weights are not known beforehand).
    pub fn has_weight(&self, name: &str) -> bool {
        self.0.borrow().weights.as_ref().is_none_or(|w| w.contains_key(name))
    }

    /// The newest version of the state `name`.
    #[track_caller]
    pub fn state(&self, name: &str, shape: &[usize], dtype: DType) -> Tensor {
        if let Some(&id) = self.0.borrow().states.get(name) {
            return Tensor { trace: self.clone(), id: Some(id) };
        }
        let t = self.push(Op::State { name: name.to_string(), shape: shape.to_vec(), dtype }, &[]);
        if let Some(id) = t.id {
            self.0.borrow_mut().states.insert(name.to_string(), id);
        }
        t
    }

    /// `value` everywhere.
    #[track_caller]
    pub fn full(&self, shape: &[usize], value: f64) -> Tensor {
        self.push(Op::Const { value: Real::new(value), shape: shape.to_vec(), dtype: DType::F32 }, &[])
    }

    /// The index along `axis`, I32.
    #[track_caller]
    pub fn iota(&self, shape: &[usize], axis: usize) -> Tensor {
        self.push(Op::Iota { axis, shape: shape.to_vec() }, &[])
    }

    /// Uniform numbers in [0, 1) from `seed` (I32 (2)); another `stream` gives other numbers.
    #[track_caller]
    pub fn random(&self, seed: &Tensor, stream: u32, shape: &[usize]) -> Tensor {
        self.push(Op::Random { stream, shape: shape.to_vec() }, &[seed])
    }

    /// Inputs one after the other along `axis`.
    #[track_caller]
    pub fn concat(&self, parts: &[&Tensor], axis: usize) -> Tensor {
        self.push(Op::Concat { axis }, parts)
    }

    /// The node `id` as a value to compute on.
    pub(crate) fn tensor(&self, id: NodeId) -> Tensor {
        Tensor { trace: self.clone(), id: Some(id) }
    }

    /// The graph as recorded so far.
    pub(crate) fn so_far(&self) -> std::cell::Ref<'_, Graph> {
        std::cell::Ref::map(self.0.borrow(), |r| &r.graph)
    }

    pub(crate) fn nothing(&self) -> Tensor {
        Tensor { trace: self.clone(), id: None }
    }

    #[track_caller]
    pub(crate) fn push(&self, op: Op, inputs: &[&Tensor]) -> Tensor {
        let ids: Option<Vec<NodeId>> = inputs.iter().map(|t| t.id).collect();
        let Some(ids) = ids else { return self.nothing() };
        let inferred = {
            let r = self.0.borrow();
            let operands: Vec<_> = ids
                .iter()
                .map(|id| {
                    let n = r.graph.node(*id);
                    (n.shape.as_slice(), n.dtype)
                })
                .collect();
            infer(&op, &operands)
        };
        match inferred {
            Ok((shape, dtype)) => {
                let node = Node { op, inputs: ids, shape, dtype, tap: None, at: Location::caller() };
                let mut r = self.0.borrow_mut();
                r.graph.nodes.push(node);
                let id = NodeId(r.graph.nodes.len() as u32 - 1);
                drop(r);
                Tensor { trace: self.clone(), id: Some(id) }
            }
            Err(what) => {
                self.fail(&crate::print::op_text(&op), what);
                self.nothing()
            }
        }
    }
}

impl Tensor {
    /// The trace it belongs to.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Its node; `None` after an error.
    pub fn id(&self) -> Option<NodeId> {
        self.id
    }

    fn with_node<T>(&self, f: impl FnOnce(&Node) -> T) -> Option<T> {
        self.id.map(|id| f(self.trace.0.borrow().graph.node(id)))
    }

    /// Length of each axis; empty after an error.
    pub fn shape(&self) -> Vec<usize> {
        self.with_node(|n| n.shape.clone()).unwrap_or_default()
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.with_node(|n| n.shape.len()).unwrap_or(0)
    }

    /// Length of `axis`; 1 where there is no such axis or after an error.
    pub fn dim(&self, axis: usize) -> usize {
        self.with_node(|n| n.shape.get(axis).copied()).flatten().unwrap_or(1)
    }

    /// Element type; F32 after an error.
    pub fn dtype(&self) -> DType {
        self.with_node(|n| n.dtype).unwrap_or(DType::F32)
    }

    /// Names the value, so that [`Graph::add_tap`] can make it an output.
    pub fn tap(&self, name: &str) -> Tensor {
        if let Some(id) = self.id {
            self.trace.0.borrow_mut().graph.nodes[id.index()].tap = Some(name.to_string());
        }
        self.clone()
    }

    #[track_caller]
    fn op(&self, op: Op) -> Tensor {
        self.trace.push(op, &[self])
    }

    /// To element type `to`; itself if it has it already.
    #[track_caller]
    pub fn cast(&self, to: DType) -> Tensor {
        if self.dtype() == to { self.clone() } else { self.op(Op::Cast(to)) }
    }

    /// Same elements, another shape.
    #[track_caller]
    pub fn reshape(&self, shape: &[usize]) -> Tensor {
        self.op(Op::Reshape(shape.to_vec()))
    }

    /// Axes reordered.
    #[track_caller]
    pub fn permute(&self, axes: &[usize]) -> Tensor {
        self.op(Op::Permute(axes.to_vec()))
    }

    /// The last two axes exchanged.
    #[track_caller]
    pub fn t(&self) -> Tensor {
        let r = self.rank();
        if r < 2 {
            self.trace.fail("t", format!("transpose of a tensor of rank {r}"));
            return self.trace.nothing();
        }
        let mut axes: Vec<usize> = (0..r).collect();
        axes.swap(r - 1, r - 2);
        self.permute(&axes)
    }

    /// Repeated to `shape` by numpy's rules: axes are matched from the last, missing ones added.
    #[track_caller]
    pub fn broadcast_to(&self, shape: &[usize]) -> Tensor {
        let own = self.shape();
        if own == shape {
            return self.clone();
        }
        let mut t = self.clone();
        if own.len() < shape.len() {
            let mut padded = vec![1; shape.len() - own.len()];
            padded.extend(&own);
            t = t.reshape(&padded);
        }
        if t.shape() == shape { t } else { t.op(Op::Broadcast(shape.to_vec())) }
    }

    /// Elements `start .. end` along `axis`.
    #[track_caller]
    pub fn slice(&self, axis: usize, start: usize, end: usize) -> Tensor {
        self.op(Op::Slice { axis, start, end })
    }

    /// Zeros before and after along `axis`.
    #[track_caller]
    pub fn pad(&self, axis: usize, before: usize, after: usize) -> Tensor {
        self.op(Op::Pad { axis, before, after })
    }

    #[track_caller]
    fn binary(&self, op: Binary, other: &Tensor) -> Tensor {
        let (a, b) = (self.shape(), other.shape());
        if a == b {
            return self.trace.push(Op::Binary(op), &[self, other]);
        }
        let rank = a.len().max(b.len());
        let dim = |s: &[usize], i: usize| (i + s.len()).checked_sub(rank).map_or(1, |j| s[j]);
        let shape: Vec<usize> = (0..rank)
            .map(|i| match (dim(&a, i), dim(&b, i)) {
                (1, n) => n,
                (n, _) => n,
            })
            .collect();
        let (a, b) = (self.broadcast_to(&shape), other.broadcast_to(&shape));
        self.trace.push(Op::Binary(op), &[&a, &b])
    }

    #[track_caller]
    fn scalar(&self, op: Binary, value: f64) -> Tensor {
        let c = self.trace.full(&self.shape(), value);
        self.trace.push(Op::Binary(op), &[self, &c])
    }

    /// The larger of the two, element by element.
    #[track_caller]
    pub fn maximum(&self, other: &Tensor) -> Tensor {
        self.binary(Binary::Max, other)
    }

    /// The smaller of the two, element by element.
    #[track_caller]
    pub fn minimum(&self, other: &Tensor) -> Tensor {
        self.binary(Binary::Min, other)
    }

    /// 1 where `self < other`, else 0.
    #[track_caller]
    pub fn less(&self, other: &Tensor) -> Tensor {
        self.binary(Binary::Less, other)
    }

    /// 1 where `self == other`, else 0.
    #[track_caller]
    pub fn equal(&self, other: &Tensor) -> Tensor {
        self.binary(Binary::Equal, other)
    }

    /// `a` where `self` is not 0, else `b`; all of one shape.
    #[track_caller]
    pub fn select(&self, a: &Tensor, b: &Tensor) -> Tensor {
        self.trace.push(Op::Select, &[self, a, b])
    }

    /// `1 / (1 + exp(-x))`.
    #[track_caller]
    pub fn sigmoid(&self) -> Tensor {
        self.neg().exp().add_scalar(1.0).recip()
    }

    /// `x * sigmoid(x)` (Hendrycks & Gimpel 2016; Ramachandran et al. 2017 as Swish).
    #[track_caller]
    pub fn silu(&self) -> Tensor {
        self * &self.sigmoid()
    }

    /// `x / 2 * (1 + erf(x / sqrt 2))`.
    #[track_caller]
    pub fn gelu(&self) -> Tensor {
        self.mul_scalar(0.5) * self.mul_scalar(std::f64::consts::FRAC_1_SQRT_2).erf().add_scalar(1.0)
    }

    /// GELU by tanh: `x / 2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))`, as GPT-2 and Gemma use it.
    #[track_caller]
    pub fn gelu_tanh(&self) -> Tensor {
        let cube = self * self * self;
        let inner = (self + cube.mul_scalar(0.044715)).mul_scalar((2.0 / std::f64::consts::PI).sqrt());
        self.mul_scalar(0.5) * inner.tanh().add_scalar(1.0)
    }

    /// `x + value`.
    #[track_caller]
    pub fn add_scalar(&self, value: f64) -> Tensor {
        self.scalar(Binary::Add, value)
    }

    /// `x * value`.
    #[track_caller]
    pub fn mul_scalar(&self, value: f64) -> Tensor {
        self.scalar(Binary::Mul, value)
    }

    /// Sum over `axes`, which stay with length 1.
    #[track_caller]
    pub fn sum(&self, axes: &[usize]) -> Tensor {
        self.op(Op::Reduce { op: Reduction::Sum, axes: axes.to_vec() })
    }

    /// Maximum over `axes`, which stay with length 1.
    #[track_caller]
    pub fn max(&self, axes: &[usize]) -> Tensor {
        self.op(Op::Reduce { op: Reduction::Max, axes: axes.to_vec() })
    }

    /// Mean over the last axis, which stays with length 1.
    #[track_caller]
    pub fn mean(&self) -> Tensor {
        let last = self.rank().saturating_sub(1);
        self.sum(&[last]).mul_scalar(1.0 / self.dim(last).max(1) as f64)
    }

    /// Softmax over the last axis.
    #[track_caller]
    pub fn softmax(&self) -> Tensor {
        let last = self.rank().saturating_sub(1);
        let e = (self - self.max(&[last])).exp();
        &e / e.sum(&[last])
    }

    /// (.., M, K) by (.., K, N).
    #[track_caller]
    pub fn matmul(&self, other: &Tensor) -> Tensor {
        self.matmul_with(other, false, false, Precision::F32)
    }

    /// Matrix product with either side transposed first, in the given activation precision.
    #[track_caller]
    pub fn matmul_with(&self, other: &Tensor, trans_a: bool, trans_b: bool, precision: Precision) -> Tensor {
        self.trace.push(Op::Matmul { trans_a, trans_b, precision }, &[self, other])
    }

    /// Rows `rows` (I32 (N)) of a table (V, ..): (N, ..).
    #[track_caller]
    pub fn gather(&self, rows: &Tensor) -> Tensor {
        self.trace.push(Op::Gather, &[self, rows])
    }

    /// Values (N, ..) added up into `n_rows` rows chosen by `rows` (I32 (N)).
    #[track_caller]
    pub fn scatter_add(&self, rows: &Tensor, n_rows: usize) -> Tensor {
        self.trace.push(Op::ScatterAdd { rows: n_rows }, &[self, rows])
    }

    /// Attention over the rows of one flat axis. `self`: q (N, n_heads, head_dim); `row_start`: I32 (N). See
    /// [`AttentionLayout::Packed`].
    #[track_caller]
    pub fn attention_packed(
        &self,
        k: &Tensor,
        v: &Tensor,
        row_start: &Tensor,
        how: AttentionScores,
    ) -> Tensor {
        self.trace.push(how.op(AttentionLayout::Packed), &[self, k, v, row_start])
    }

    /// Attention over keys in pages. `index`: positions, row_seq, page_table. See [`AttentionLayout::Paged`].
    #[track_caller]
    pub fn attention_paged(
        &self,
        k_pool: &Tensor,
        v_pool: &Tensor,
        index: [&Tensor; 3],
        page_size: usize,
        how: AttentionScores,
    ) -> Tensor {
        let inputs = [self, k_pool, v_pool, index[0], index[1], index[2]];
        self.trace.push(how.op(AttentionLayout::Paged { page_size }), &inputs)
    }

    /// The sum over all processes that run the program together; on one process the value itself. F32, of its shape.
    ///
    /// ```
    /// use sparsam_ir::{DType, Trace, grad};
    /// let t = Trace::new();
    /// let x = t.input("x", &[3], DType::F32);
    /// let dx = grad(&(&x * &x).sum(&[0]), &[&x]).remove(0).all_reduce(); // of the losses of all
    /// assert_eq!(dx.shape(), [3]);
    /// ```
    #[track_caller]
    pub fn all_reduce(&self) -> Tensor {
        self.op(Op::AllReduce)
    }

    /// The next version of a state: all of it replaced by `value`.
    #[track_caller]
    pub fn assign(&self, value: &Tensor) -> Tensor {
        self.write(Op::Assign, &[self, value])
    }

    /// The next version of a state (S, ..): row `slots[i]` replaced by row `i` of `values`; slot -1 skips.
    #[track_caller]
    pub fn scatter_rows(&self, values: &Tensor, slots: &Tensor) -> Tensor {
        self.write(Op::ScatterRows, &[self, values, slots])
    }

    #[track_caller]
    fn write(&self, op: Op, inputs: &[&Tensor]) -> Tensor {
        let name = self.id.and_then(|id| {
            let r = self.trace.0.borrow();
            r.graph.state_of(id).map(|s| match &r.graph.node(s).op {
                Op::State { name, .. } => name.clone(),
                other => unreachable!("state_of gave {other:?}"),
            })
        });
        let Some(name) = name else {
            self.trace.fail("write", "only a state can be written");
            return self.trace.nothing();
        };
        if self.trace.0.borrow().states.get(&name).copied() != self.id {
            self.trace.fail("write", format!("state {name}: this is not its newest version"));
            return self.trace.nothing();
        }
        let t = self.trace.push(op, inputs);
        if let Some(id) = t.id {
            self.trace.0.borrow_mut().states.insert(name, id);
        }
        t
    }
}

/// How attention scores are made: scale, window, soft cap.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionScores {
    /// Multiplies q.k, usually `1 / sqrt(head_dim)`.
    pub scale: f64,
    /// A row sees at most this many keys, itself included.
    pub window: Option<usize>,
    /// Soft limit on the scores.
    pub softcap: Option<f64>,
}

impl AttentionScores {
    fn op(self, layout: AttentionLayout) -> Op {
        Op::Attention(Attention {
            scale: Real::new(self.scale),
            window: self.window,
            softcap: self.softcap.map(Real::new),
            layout,
            part: AttentionPart::Out,
        })
    }
}

macro_rules! unary {
    ($($method:ident $op:ident $doc:literal),*) => {
        impl Tensor { $(
            #[doc = $doc]
            #[track_caller]
            pub fn $method(&self) -> Tensor { self.op(Op::Unary(Unary::$op)) }
        )* }
    };
}
unary!(
    neg Neg "`-x`.", abs Abs "`|x|`.", recip Recip "`1 / x`.", sqrt Sqrt "`sqrt x`.", exp Exp "`e^x`.",
    log Log "Natural logarithm.", sin Sin "Sine, radians.", cos Cos "Cosine, radians.", tanh Tanh "`tanh x`.",
    erf Erf "The error function.", floor Floor "The largest integer not above `x`."
);

macro_rules! operator {
    ($($trait:ident $method:ident $op:ident),*) => { $(
        impl std::ops::$trait<&Tensor> for &Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, other: &Tensor) -> Tensor { self.binary(Binary::$op, other) }
        }
        impl std::ops::$trait<Tensor> for Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, other: Tensor) -> Tensor { self.binary(Binary::$op, &other) }
        }
        impl std::ops::$trait<&Tensor> for Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, other: &Tensor) -> Tensor { self.binary(Binary::$op, other) }
        }
        impl std::ops::$trait<Tensor> for &Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, other: Tensor) -> Tensor { self.binary(Binary::$op, &other) }
        }
    )* };
}
operator!(Add add Add, Sub sub Sub, Mul mul Mul, Div div Div);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_error_is_kept_with_its_line() {
        let t = Trace::new();
        let a = t.input("a", &[2, 3], DType::F32);
        let b = t.input("b", &[4, 5], DType::F32);
        let line = line!() + 1;
        let c = a.matmul(&b);
        let d = (&c + &a).softmax().reshape(&[7]);
        assert_eq!(d.shape(), Vec::<usize>::new());
        let e = t.finish(&[("d", &d)]).unwrap_err();
        assert!(e.what.contains("inner lengths differ: 3 and 4"), "{e}");
        assert_eq!(e.at.line(), line);
        assert!(e.at.file().ends_with("trace.rs"));
    }

    #[test]
    fn weights_are_checked_by_name_and_shape() {
        let known = HashMap::from([("w".to_string(), (vec![4, 32], DType::Q4_0))]);
        let t = Trace::with_weights(known.clone());
        assert_eq!(t.weight("w", &[4, 32]).dtype(), DType::Q4_0);
        assert!(t.has_weight("w") && !t.has_weight("v"));
        t.weight("v", &[1]);
        assert!(t.finish(&[]).unwrap_err().what.contains("no tensor v"));
        let t = Trace::with_weights(known);
        t.weight("w", &[5, 32]);
        assert!(t.finish(&[]).unwrap_err().what.contains("[4, 32]"));
    }

    #[test]
    fn trained_weights_are_states() {
        let t = Trace::new().training(|name| !name.contains("frozen"));
        let w = t.weight("w", &[2]);
        let again = t.weight("w", &[2]);
        let f = t.weight("frozen", &[2]);
        t.constant("inv_freq", &[2]); // never trained
        assert_eq!((w.id(), t.parameters().len()), (again.id(), 1));
        let next = w.assign(&(&w + &f));
        let g = t.finish(&[]).unwrap();
        assert_eq!(g.writes, [next.id().unwrap()]);
        assert!(matches!(g.nodes[0].op, Op::State { .. }) && matches!(g.nodes[1].op, Op::Weight { .. }));
        assert!(matches!(g.nodes[2].op, Op::Weight { .. }));
    }

    #[test]
    fn a_leaf_asked_for_twice_is_one_node() {
        let t = Trace::new();
        let (a, b) = (t.weight("w", &[2, 3]), t.weight("w", &[2, 3]));
        assert_eq!(a.id(), b.id());
        assert_eq!(t.input("x", &[4], DType::I32).id(), t.input("x", &[4], DType::I32).id());
        t.input("x", &[5], DType::I32);
        let e = t.finish(&[]).unwrap_err();
        assert!(e.what.contains("x is already"), "{e}");
    }

    #[test]
    fn old_versions_of_a_state_cannot_be_written() {
        let t = Trace::new();
        let s = t.state("s", &[4, 2], DType::F32);
        let v = t.input("v", &[4, 2], DType::F32);
        s.assign(&v);
        s.assign(&v);
        assert!(t.finish(&[]).unwrap_err().what.contains("newest"));
    }
}
