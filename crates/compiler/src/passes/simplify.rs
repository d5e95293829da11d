//! Algebra that needs no look at values: constants are folded, `x * 1` is `x`, views of views become one view,
//! arithmetic moves before the broadcast of its operands, a division by one number a row becomes a product with
//! its reciprocal. Before:
//!
//! ```text
//! %0 = input "x" : F32[2, 1]
//! %1 = broadcast %0 : F32[2, 3]
//! %2 = exp %1 : F32[2, 3]
//! %3 = const 1 : F32[2, 3]
//! %4 = mul %2 %3 : F32[2, 3]
//! out "y" = %4
//! ```
//!
//! and after, with dead code gone:
//!
//! ```text
//! %0 = input "x" : F32[2, 1]
//! %1 = exp %0 : F32[2, 1]
//! %2 = broadcast %1 : F32[2, 3]
//! out "y" = %2
//! ```
//!
//! What it leaves alone: `x * 0` (x may be NaN), sums in another order, `x * recip(y)`, which row programs know as
//! part of a sigmoid.

use super::rewrite::{make, push, rewrite};
use sparsam_ir::{Binary, DType, Graph, Node, NodeId, Op, Real, Unary, interpret};

/// `graph`, simplified.
pub(crate) fn simplify(graph: &Graph) -> Graph {
    rewrite(graph, |g, node| {
        let tap = node.tap.clone();
        let id = add(g, node);
        if tap.is_some() && g.node(id).tap.is_none() {
            g.nodes[id.index()].tap = tap;
        }
        id
    })
}

/// Adds `node`, or finds or makes something simpler that has its value.
fn add(g: &mut Graph, node: Node) -> NodeId {
    if let Some(id) = folded(g, &node) {
        return id;
    }
    match rule(g, &node) {
        Some(id) => id,
        None => push(g, node),
    }
}

/// Adds `op` over `inputs`, simplified itself.
fn op(g: &mut Graph, op: Op, inputs: Vec<NodeId>, like: &Node) -> NodeId {
    let node = make(g, op, inputs, like);
    add(g, node)
}

fn constant(g: &Graph, id: NodeId) -> Option<f64> {
    match g.node(id).op {
        Op::Const { value, .. } => Some(value.get()),
        _ => None,
    }
}

/// A node over constants only is a constant.
fn folded(g: &mut Graph, node: &Node) -> Option<NodeId> {
    let c: Option<Vec<f64>> = node.inputs.iter().map(|i| constant(g, *i)).collect();
    let c = c.filter(|c| !c.is_empty())?;
    let value = match &node.op {
        Op::Unary(u) => interpret::unary(*u, c[0]),
        Op::Binary(b) => interpret::binary(*b, c[0], c[1]),
        Op::Select => {
            if c[0] != 0.0 {
                c[1]
            } else {
                c[2]
            }
        }
        Op::Cast(to) => interpret::cast(c[0], *to),
        Op::Reshape(_) | Op::Permute(_) | Op::Broadcast(_) | Op::Slice { .. } => c[0],
        Op::Input { .. }
        | Op::Weight { .. }
        | Op::State { .. }
        | Op::Const { .. }
        | Op::Iota { .. }
        | Op::Random { .. }
        | Op::Reduce { .. }
        | Op::Pad { .. }
        | Op::Concat { .. }
        | Op::Matmul { .. }
        | Op::Gather
        | Op::ScatterAdd { .. }
        | Op::Attention(_)
        | Op::CrossEntropy { .. }
        | Op::AllReduce // so many times as there are processes
        | Op::Assign
        | Op::ScatterRows => return None,
    };
    Some(full(g, interpret::round(value, node.dtype), &node.shape, node.dtype, node))
}

fn full(g: &mut Graph, value: f64, shape: &[usize], dtype: DType, like: &Node) -> NodeId {
    let op = Op::Const { value: Real::new(value), shape: shape.to_vec(), dtype };
    let node = make(g, op, vec![], like);
    push(g, node)
}

fn rule(g: &mut Graph, node: &Node) -> Option<NodeId> {
    let x = *node.inputs.first()?;
    let from = g.node(x).clone();
    match &node.op {
        Op::Unary(Unary::Neg) if from.op == Op::Unary(Unary::Neg) => Some(from.inputs[0]),
        Op::Unary(_) | Op::Select => before_broadcast(g, node),
        Op::Binary(b) => binary(g, *b, node).or_else(|| before_broadcast(g, node)),
        Op::Cast(to) if from.dtype == *to => Some(x),
        Op::Cast(_) => before_broadcast(g, node),
        Op::Reduce { axes, .. } if axes.iter().all(|&a| from.shape[a] == 1) => Some(x),
        Op::Reshape(to) if from.shape == *to => Some(x),
        Op::Reshape(to) => match from.op {
            Op::Reshape(_) => Some(op(g, Op::Reshape(to.clone()), from.inputs, node)),
            _ => None,
        },
        Op::Permute(axes) if axes.is_sorted() => Some(x),
        Op::Permute(axes) => match &from.op {
            Op::Permute(first) => {
                let both = axes.iter().map(|&a| first[a]).collect();
                Some(op(g, Op::Permute(both), from.inputs, node))
            }
            _ => None,
        },
        Op::Broadcast(to) if from.shape == *to => Some(x),
        Op::Broadcast(to) => match from.op {
            Op::Broadcast(_) => Some(op(g, Op::Broadcast(to.clone()), from.inputs, node)),
            _ => None,
        },
        Op::Slice { axis, start, end } => slice(g, (*axis, *start, *end), &from, node),
        Op::Pad { before: 0, after: 0, .. } => Some(x),
        Op::Concat { .. } if node.inputs.len() == 1 => Some(x),
        Op::Matmul { trans_a, trans_b, precision } => {
            let (a, flip_a) = transposed(g, x);
            let (b, flip_b) = transposed(g, node.inputs[1]);
            let new =
                Op::Matmul { trans_a: trans_a ^ flip_a, trans_b: trans_b ^ flip_b, precision: *precision };
            (flip_a || flip_b).then(|| op(g, new, vec![a, b], node))
        }
        Op::Reduce { .. }
        | Op::Pad { .. }
        | Op::Concat { .. }
        | Op::Input { .. }
        | Op::Weight { .. }
        | Op::State { .. }
        | Op::Const { .. }
        | Op::Iota { .. }
        | Op::Random { .. }
        | Op::Gather
        | Op::ScatterAdd { .. }
        | Op::Attention(_)
        | Op::CrossEntropy { .. }
        | Op::AllReduce
        | Op::Assign
        | Op::ScatterRows => None,
    }
}

fn binary(g: &mut Graph, b: Binary, node: &Node) -> Option<NodeId> {
    let (x, y) = (node.inputs[0], node.inputs[1]);
    match (b, constant(g, x), constant(g, y)) {
        (Binary::Add | Binary::Sub, _, Some(0.0)) | (Binary::Mul | Binary::Div, _, Some(1.0)) => {
            return Some(x);
        }
        (Binary::Add, Some(0.0), _) | (Binary::Mul, Some(1.0), _) => return Some(y),
        (Binary::Div, _, Some(c)) if power_of_two(c) => {
            let by = full(g, 1.0 / c, &node.shape, DType::F32, node);
            return Some(op(g, Op::Binary(Binary::Mul), vec![x, by], node));
        }
        (Binary::Mul, _, Some(c)) => {
            // (x * first) * c, as long as the product of both is an ordinary f32.
            let inner = g.node(x).clone();
            if inner.op == Op::Binary(Binary::Mul)
                && let Some(first) = constant(g, inner.inputs[1])
                && ((first * c).abs() as f32).is_normal()
            {
                let by = full(g, interpret::round(first * c, DType::F32), &node.shape, DType::F32, node);
                return Some(op(g, Op::Binary(Binary::Mul), vec![inner.inputs[0], by], node));
            }
        }
        (Binary::Mul, Some(_), None) => return Some(op(g, Op::Binary(Binary::Mul), vec![y, x], node)),
        (Binary::Add, Some(_), None) => return Some(op(g, Op::Binary(Binary::Add), vec![y, x], node)),
        _ => {}
    }
    // One number for many quotients: its reciprocal is taken once.
    if b == Binary::Div
        && let divisor = g.node(y).clone()
        && let Op::Broadcast(to) = &divisor.op
    {
        let few = op(g, Op::Unary(Unary::Recip), divisor.inputs.clone(), node);
        let many = op(g, Op::Broadcast(to.clone()), vec![few], node);
        return Some(op(g, Op::Binary(Binary::Mul), vec![x, many], node));
    }
    None
}

/// Whether dividing by `c` is exactly multiplying by its reciprocal.
fn power_of_two(c: f64) -> bool {
    let c = c as f32;
    c.is_normal() && (1.0 / c).is_normal() && c.to_bits() & 0x007f_ffff == 0
}

/// An elementwise node whose operands are all constants or broadcasts, computed on what they are broadcast from.
fn before_broadcast(g: &mut Graph, node: &Node) -> Option<NodeId> {
    let mut small = vec![1; node.shape.len()];
    let mut any = false;
    for &i in &node.inputs {
        match &g.node(i).op {
            Op::Broadcast(_) => {
                any = true;
                small.iter_mut().zip(&g.node(g.node(i).inputs[0]).shape).for_each(|(s, n)| *s = (*s).max(*n));
            }
            Op::Const { .. } => {}
            _ => return None,
        }
    }
    if !any || small == node.shape || node.numel() == 0 {
        return None;
    }
    let mut inputs = Vec::new();
    for &i in &node.inputs {
        let of = g.node(i).clone();
        inputs.push(match of.op {
            Op::Const { value, dtype, .. } => full(g, value.get(), &small, dtype, node),
            _ => op(g, Op::Broadcast(small.clone()), of.inputs, node),
        });
    }
    let few = op(g, node.op.clone(), inputs, node);
    Some(op(g, Op::Broadcast(node.shape.clone()), vec![few], node))
}

fn slice(
    g: &mut Graph,
    (axis, start, end): (usize, usize, usize),
    from: &Node,
    node: &Node,
) -> Option<NodeId> {
    if start == 0 && end == from.shape[axis] {
        return Some(node.inputs[0]);
    }
    match &from.op {
        Op::Slice { axis: first, start: before, .. } if *first == axis => {
            let both = Op::Slice { axis, start: before + start, end: before + end };
            Some(op(g, both, from.inputs.clone(), node))
        }
        Op::Concat { axis: joined } if *joined == axis => {
            let mut at = 0;
            for &part in &from.inputs {
                let len = g.node(part).shape[axis];
                if at <= start && end <= at + len && start < end {
                    let inside = Op::Slice { axis, start: start - at, end: end - at };
                    return Some(op(g, inside, vec![part], node));
                }
                at += len;
            }
            None
        }
        Op::Broadcast(to) => {
            let of = from.inputs[0];
            let mut to = to.clone();
            to[axis] = end - start;
            let of = if g.node(of).shape[axis] == 1 && start < end {
                of
            } else {
                op(g, Op::Slice { axis, start, end }, vec![of], node)
            };
            Some(op(g, Op::Broadcast(to), vec![of], node))
        }
        _ => None,
    }
}

/// What `id` is the transpose of, if it exchanges the last two axes only.
fn transposed(g: &Graph, id: NodeId) -> (NodeId, bool) {
    let n = g.node(id);
    if let Op::Permute(axes) = &n.op {
        let r = axes.len();
        let plain = r >= 2 && (0..r - 2).all(|i| axes[i] == i);
        if plain && axes[r - 1] == r - 2 {
            return (n.inputs[0], true);
        }
    }
    (id, false)
}

#[cfg(test)]
mod tests {
    use super::super::dce::dce;
    use super::super::testing::{graph, header, on_graph};
    use super::*;
    use sparsam_ir::{Precision, Tensor, Trace};

    type Model = fn(&Trace) -> Tensor;

    fn x(t: &Trace) -> Tensor {
        t.input("x", &[2, 3], DType::F32)
    }

    fn text(f: impl Fn(&Trace) -> Tensor) -> String {
        on_graph(|g| dce(&simplify(g)), &graph(f))
    }

    #[test]
    fn the_example_of_the_header() {
        let f = |t: &Trace| t.input("x", &[2, 1], DType::F32).broadcast_to(&[2, 3]).exp().mul_scalar(1.0);
        let source = include_str!("simplify.rs");
        assert_eq!(graph(f).to_string(), header(source, 0));
        assert_eq!(text(f), header(source, 1));
    }

    #[test]
    fn each_rule_by_hand() {
        let nothing = text(x);
        let same: [Model; 12] = [
            |t| x(t).add_scalar(0.0),
            |t| x(t) - t.full(&[2, 3], 0.0),
            |t| t.full(&[2, 3], 1.0) * x(t),
            |t| x(t) / t.full(&[2, 3], 1.0),
            |t| x(t).neg().neg(),
            |t| x(t).reshape(&[6]).reshape(&[3, 2]).reshape(&[2, 3]),
            |t| x(t).t().t(),
            |t| x(t).slice(1, 0, 3),
            |t| x(t).pad(1, 0, 0),
            |t| t.concat(&[&x(t)], 0),
            |t| t.concat(&[&x(t), &x(t).exp()], 1).slice(1, 0, 3),
            |t| x(t).reshape(&[2, 3, 1]).sum(&[2]).reshape(&[2, 3]),
        ];
        for (i, f) in same.into_iter().enumerate() {
            assert_eq!(text(f), nothing, "rule {i}");
        }
        let pairs: [(Model, Model); 6] = [
            (|t| x(t).mul_scalar(2.0).mul_scalar(3.0), |t| x(t).mul_scalar(6.0)),
            (|t| x(t) / t.full(&[2, 3], 4.0), |t| x(t).mul_scalar(0.25)),
            (|t| x(t) / x(t).sum(&[1]), |t| x(t) * x(t).sum(&[1]).recip()),
            (|t| x(t).slice(1, 0, 2).slice(1, 1, 2), |t| x(t).slice(1, 1, 2)),
            (|t| x(t).matmul(&x(t).t()), |t| x(t).matmul_with(&x(t), false, true, Precision::F32)),
            (|t| t.full(&[2, 3], 4.0).sqrt() + x(t), |t| x(t).add_scalar(2.0)),
        ];
        for (i, (long, short)) in pairs.into_iter().enumerate() {
            let cleaned = on_graph(|g| dce(&super::super::cse::cse(&simplify(g))), &graph(long));
            let want = on_graph(|g| dce(&super::super::cse::cse(g)), &graph(short));
            let lines =
                |s: &str| s.lines().map(|l| l.split(" = ").last().unwrap().to_string()).collect::<Vec<_>>();
            assert_eq!(lines(&cleaned).len(), lines(&want).len(), "pair {i}:\n{cleaned}\n{want}");
        }
    }

    #[test]
    fn what_values_decide_stays() {
        let keeps: [Model; 6] = [
            |t| x(t).mul_scalar(0.0),                        // NaN * 0 is NaN
            |t| x(t) / t.full(&[2, 3], 3.0),                 // 1/3 is not exact
            |t| &x(t) * &x(t).exp().add_scalar(1.0).recip(), // a sigmoid
            |t| x(t).mul_scalar(1e-30).mul_scalar(1e-30),    // their product is no f32
            |t| x(t).slice(0, 1, 2).slice(1, 1, 2),          // two axes
            |t| t.full(&[2, 3], 1.0).all_reduce(),           // as many as there are processes
        ];
        for (i, f) in keeps.into_iter().enumerate() {
            assert_eq!(text(f), on_graph(dce, &graph(f)), "keep {i}");
        }
    }
}
