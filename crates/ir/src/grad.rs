//! Reverse-mode gradients, graph to graph: a table with one rule per op.
//!
//! [`grad`] walks the graph from a scalar back to its leaves and records, in the same trace, the nodes that compute
//! the gradients; optimisers are then composed behind them. Gradients are F32 whatever type a value is stored in.
//! Notation in the rules: `y = op(a, b)`, and `dy` is the gradient of the loss towards `y`.

use crate::op::{Attention, AttentionPart, Binary, CrossEntropyPart, Op, Reduction, Unary};
use crate::trace::{Tensor, Trace};
use sparsam_dtype::DType;

/// Gradients of `loss` (one element) towards each of `wrt`, in order, each of its shape and F32; zeros where the loss
/// does not depend on it.
///
/// An op without a gradient between the two (a matmul with 8-bit activations, paged attention, a state write) is an
/// error of the trace, with the line that recorded it.
///
/// ```
/// use sparsam_ir::{DType, Trace, grad};
/// let t = Trace::new();
/// let x = t.input("x", &[3], DType::F32);
/// let loss = (&x * &x).sum(&[0]);
/// let dx = grad(&loss, &[&x]).remove(0); // 2 x
/// assert!(t.finish(&[("dx", &dx)]).is_ok());
/// ```
#[track_caller]
pub fn grad(loss: &Tensor, wrt: &[&Tensor]) -> Vec<Tensor> {
    let trace = loss.trace();
    let nothing = || wrt.iter().map(|_| trace.nothing()).collect();
    let Some(root) = loss.id() else { return nothing() };
    if loss.shape().iter().product::<usize>() != 1 {
        trace.fail("grad", format!("the loss must be one number, has shape {:?}", loss.shape()));
        return nothing();
    }
    // Nodes through which `wrt` reaches the loss.
    let depends = {
        let graph = trace.so_far();
        let mut depends = vec![false; root.index() + 1];
        for id in wrt.iter().filter_map(|t| t.id()).filter(|id| *id <= root) {
            depends[id.index()] = true;
        }
        for i in 0..=root.index() {
            depends[i] |= graph.nodes[i].inputs.iter().any(|p| depends[p.index()]);
        }
        depends
    };
    let mut grads: Vec<Option<Tensor>> = vec![None; root.index() + 1];
    grads[root.index()] = Some(trace.full(&loss.shape(), 1.0));
    for i in (0..=root.index()).rev() {
        if !depends[i] {
            continue;
        }
        let Some(dy) = grads[i].clone() else { continue };
        let node = trace.so_far().nodes[i].clone();
        if node.inputs.iter().all(|p| !depends[p.index()]) {
            continue;
        }
        let y = trace.tensor(crate::NodeId(i as u32));
        let x: Vec<Tensor> = node.inputs.iter().map(|id| trace.tensor(*id)).collect();
        let needs: Vec<bool> = node.inputs.iter().map(|p| depends[p.index()]).collect();
        let dx = match rule(&node.op, &x, &y, &dy, &needs) {
            Ok(dx) => dx,
            Err(what) => {
                trace.fail(&format!("grad of {} (at {})", crate::print::op_text(&node.op), node.at), what);
                return nothing();
            }
        };
        for ((p, needed), dx) in node.inputs.iter().zip(needs).zip(dx) {
            if needed && let Some(dx) = dx {
                let sum = grads[p.index()].take().map_or(dx.clone(), |g| &g + &dx);
                grads[p.index()] = Some(sum);
            }
        }
    }
    wrt.iter()
        .map(|t| match t.id() {
            None => trace.nothing(),
            Some(id) => match grads.get(id.index()) {
                Some(Some(g)) => g.clone(),
                _ => trace.full(&t.shape(), 0.0),
            },
        })
        .collect()
}

/// The gradient towards each input of one op; `None` where it is 0. `needs` says which will be used.
#[track_caller]
fn rule(
    op: &Op,
    x: &[Tensor],
    y: &Tensor,
    dy: &Tensor,
    needs: &[bool],
) -> Result<Vec<Option<Tensor>>, String> {
    let one = |dx: Tensor| Ok(vec![Some(dx)]);
    match op {
        Op::Input { .. } | Op::Weight { .. } | Op::State { .. } | Op::Const { .. } | Op::Iota { .. } => {
            Ok(vec![])
        }
        Op::Random { .. } => Ok(vec![None]),
        Op::Unary(u) => Ok(vec![unary(*u, &x[0], y, dy)]),
        Op::Binary(b) => Ok(binary(*b, &x[0], &x[1], y, dy).into()),
        // y = c ? a : b
        Op::Select => {
            let zero = dy.trace().full(&dy.shape(), 0.0);
            Ok(vec![None, Some(x[0].select(dy, &zero)), Some(x[0].select(&zero, dy))])
        }
        // Rounding is taken as the identity (straight through); integers carry no gradient.
        Op::Cast(to) => Ok(vec![(to.is_float() && x[0].dtype().is_float()).then(|| dy.clone())]),
        Op::Reduce { op: Reduction::Sum, .. } => one(dy.broadcast_to(&x[0].shape())),
        // The largest elements share: dx = dy / (number of largest) where x = y.
        Op::Reduce { op: Reduction::Max, axes } => {
            let largest = x[0].equal(&y.broadcast_to(&x[0].shape()));
            one((dy / largest.sum(axes)).broadcast_to(&x[0].shape()) * largest)
        }
        Op::Reshape(_) => one(dy.reshape(&x[0].shape())),
        Op::Permute(axes) => {
            let mut inverse = vec![0; axes.len()];
            axes.iter().enumerate().for_each(|(i, &a)| inverse[a] = i);
            one(dy.permute(&inverse))
        }
        Op::Broadcast(to) => {
            let from = x[0].shape();
            let axes: Vec<usize> = (0..to.len()).filter(|&a| from[a] != to[a]).collect();
            one(if axes.is_empty() { dy.clone() } else { dy.sum(&axes) })
        }
        Op::Slice { axis, start, end } => one(dy.pad(*axis, *start, x[0].dim(*axis) - end)),
        Op::Pad { axis, before, .. } => one(dy.slice(*axis, *before, before + x[0].dim(*axis))),
        Op::Concat { axis } => {
            let mut at = 0;
            Ok(x.iter()
                .map(|part| {
                    let start = at;
                    at += part.dim(*axis);
                    Some(dy.slice(*axis, start, at))
                })
                .collect())
        }
        // Y = A' B' with A' = A or A^T, B' = B or B^T: dA' = dY B'^T, dB' = A'^T dY; each as it is stored.
        Op::Matmul { trans_a, trans_b, precision } => {
            if *precision == crate::Precision::Int8 {
                return Err("8-bit activations have no gradient; trace with f32 or bf16".into());
            }
            let (a, b, p) = (&x[0], &x[1], *precision);
            let da = needs[0].then(|| match trans_a {
                false => dy.matmul_with(b, false, !trans_b, p),
                true => b.matmul_with(dy, *trans_b, true, p),
            });
            let db = needs[1].then(|| match trans_b {
                false => a.matmul_with(dy, !trans_a, false, p),
                true => dy.matmul_with(a, true, *trans_a, p),
            });
            Ok(vec![da, db])
        }
        Op::Gather => Ok(vec![needs[0].then(|| dy.scatter_add(&x[1], x[0].dim(0))), None]),
        Op::ScatterAdd { .. } => Ok(vec![Some(dy.gather(&x[1])), None]),
        Op::Attention(a) => attention(a, x, y, dy, needs),
        // Both from dlogits = (softmax - onehot) * dy, which the compiler makes beside the loss, once.
        Op::CrossEntropy { part: CrossEntropyPart::Loss, precision } => {
            if *precision == crate::Precision::Int8 {
                return Err("8-bit activations have no gradient; trace with f32 or bf16".into());
            }
            let parts = [CrossEntropyPart::GradH, CrossEntropyPart::GradWeight];
            let part = |part| {
                dy.trace().push(Op::CrossEntropy { part, precision: *precision }, &[&x[0], &x[1], &x[2], dy])
            };
            let mut dx: Vec<_> =
                parts.into_iter().zip(needs).map(|(p, &needed)| needed.then(|| part(p))).collect();
            dx.push(None);
            Ok(dx)
        }
        Op::CrossEntropy { .. } => Err("only the cross-entropy has a gradient, not its gradients".into()),
        // y = x_1 + .. + x_n on each of n processes, and what is minimised is the sum of all losses: each of them moves with
        // x_i, so its gradient is the sum of theirs.
        Op::AllReduce => one(dy.all_reduce()),
        Op::Assign | Op::ScatterRows => Err("a state write has no gradient".into()),
    }
}

fn unary(op: Unary, x: &Tensor, y: &Tensor, dy: &Tensor) -> Option<Tensor> {
    Some(match op {
        Unary::Neg => dy.neg(),
        // sign(x), 0 at 0
        Unary::Abs => {
            let zero = x.trace().full(&x.shape(), 0.0);
            dy * (zero.less(x) - x.less(&zero))
        }
        // d(1/x) = -1/x^2
        Unary::Recip => (dy * (y * y)).neg(),
        // d(sqrt x) = 1 / (2 sqrt x)
        Unary::Sqrt => dy.mul_scalar(0.5) / y,
        Unary::Exp => dy * y,
        Unary::Log => dy / x,
        Unary::Sin => dy * x.cos(),
        Unary::Cos => (dy * x.sin()).neg(),
        // d(tanh x) = 1 - tanh^2 x
        Unary::Tanh => dy * (y * y).neg().add_scalar(1.0),
        // d(erf x) = 2 / sqrt(pi) exp(-x^2)
        Unary::Erf => dy * (x * x).neg().exp().mul_scalar(std::f64::consts::FRAC_2_SQRT_PI),
        Unary::Floor => return None,
    })
}

fn binary(op: Binary, a: &Tensor, b: &Tensor, y: &Tensor, dy: &Tensor) -> [Option<Tensor>; 2] {
    match op {
        Binary::Add => [Some(dy.clone()), Some(dy.clone())],
        Binary::Sub => [Some(dy.clone()), Some(dy.neg())],
        Binary::Mul => [Some(dy * b), Some(dy * a)],
        // d(a/b) = da/b - (a/b) db/b
        Binary::Div => {
            let da = dy / b;
            let db = (&da * y).neg();
            [Some(da), Some(db)]
        }
        // The larger (smaller) one takes it; equal ones share, as in PyTorch.
        Binary::Max | Binary::Min => {
            let tie = a.equal(b).mul_scalar(0.5);
            let (first, second) =
                if op == Binary::Max { (b.less(a), a.less(b)) } else { (a.less(b), b.less(a)) };
            [Some(dy * (first + &tie)), Some(dy * (second + tie))]
        }
        Binary::Less | Binary::Equal => [None, None],
    }
}

/// The log-sum-exp of the same inputs is recorded beside the result; both then lead to dQ, dK and dV without the
/// matrix of scores.
#[track_caller]
fn attention(
    a: &Attention,
    x: &[Tensor],
    y: &Tensor,
    dy: &Tensor,
    needs: &[bool],
) -> Result<Vec<Option<Tensor>>, String> {
    if a.part != AttentionPart::Out {
        return Err("only the attention result has a gradient, not its log-sum-exp or its gradients".into());
    }
    if x.len() != 4 {
        return Err("attention over pages has no gradient; trace with the packed layout".into());
    }
    let part = |part: AttentionPart| Op::Attention(Attention { part, ..a.clone() });
    let trace: &Trace = y.trace();
    let lse = trace.push(part(AttentionPart::LogSumExp), &[&x[0], &x[1], &x[2], &x[3]]);
    let inputs = [&x[0], &x[1], &x[2], &x[3], y, &lse, dy];
    let parts = [AttentionPart::GradQ, AttentionPart::GradK, AttentionPart::GradV];
    let mut dx: Vec<Option<Tensor>> = parts
        .into_iter()
        .zip(needs)
        .map(|(p, &needed)| needed.then(|| trace.push(part(p), &inputs)))
        .collect();
    dx.push(None);
    debug_assert!(dx.iter().flatten().all(|d| d.dtype() == DType::F32));
    Ok(dx)
}
