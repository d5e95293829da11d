//! What must hold of every graph, before and after every pass.

use crate::graph::{Graph, NodeId};
use crate::infer::infer;
use crate::op::{Op, Precision};
use sparsam_dtype::DType;

/// A broken rule: which node, what is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("graph node {node}: {what}")]
pub struct VerifyError {
    /// The node.
    pub node: NodeId,
    /// The rule that it breaks.
    pub what: String,
}

/// Checks a graph: inputs come before users, shapes and types follow the rule of each op, names of leaves agree,
/// states are written in one line of versions, and no old version is read after its successor was made.
pub fn verify(graph: &Graph) -> Result<(), VerifyError> {
    let fail = |node: NodeId, what: String| Err(VerifyError { node, what });
    let mut leaves = std::collections::HashMap::new();
    let mut successor: Vec<Option<NodeId>> = vec![None; graph.nodes.len()];
    for id in graph.ids() {
        let n = graph.node(id);
        if let Some(i) = n.inputs.iter().find(|i| **i >= id) {
            return fail(id, format!("reads {i}, which does not come before it"));
        }
        let operands: Vec<_> =
            n.inputs.iter().map(|i| (graph.node(*i).shape.as_slice(), graph.node(*i).dtype)).collect();
        match infer(&n.op, &operands) {
            Err(what) => return fail(id, what),
            Ok((shape, dtype)) if shape != n.shape || dtype != n.dtype => {
                return fail(id, format!("says {}{:?}, its op gives {dtype}{shape:?}", n.dtype, n.shape));
            }
            Ok(_) => {}
        }
        if let Op::Input { name, .. } | Op::Weight { name, .. } | Op::State { name, .. } = &n.op {
            let kind = std::mem::discriminant(&n.op);
            if let Some(first) = leaves.insert((kind, name.clone()), id)
                && graph.node(first).op != n.op
            {
                return fail(id, format!("{name:?} stands for {first} too, of another shape or type"));
            }
            if matches!(n.op, Op::State { .. }) && leaves[&(kind, name.clone())] != id {
                return fail(id, format!("state {name:?} is read into the graph twice"));
            }
        }
        let int8 = match n.op {
            Op::Matmul { precision, .. } => precision == Precision::Int8,
            Op::CrossEntropy { part, precision: Precision::Int8 } => {
                if part.is_grad() {
                    return fail(id, "int8 activations have no gradient".into());
                }
                true
            }
            _ => false,
        };
        if int8 {
            let (a, b) = (graph.node(n.inputs[0]), graph.node(n.inputs[1]));
            if a.dtype != DType::F32 || !matches!(b.op, Op::Weight { .. }) {
                return fail(id, "int8 activations are for products with weights".into());
            }
        }
        for i in &n.inputs {
            if let Some(next) = successor[i.index()] {
                return fail(id, format!("reads {i}, an old version of a state: {next} replaced it"));
            }
        }
        if n.op.writes_state() {
            if graph.state_of(n.inputs[0]).is_none() {
                return fail(id, "writes something that is no state".into());
            }
            successor[n.inputs[0].index()] = Some(id);
        }
    }
    for id in graph.roots() {
        if id.index() >= graph.nodes.len() {
            return fail(id, "is a result but no node".into());
        }
    }
    for id in &graph.writes {
        if !graph.node(*id).op.writes_state() {
            return fail(*id, "is listed as a state write but is none".into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Trace;

    #[test]
    fn old_versions_are_not_read() {
        let t = Trace::new();
        let s = t.state("s", &[2], DType::F32);
        let v = t.input("v", &[2], DType::F32);
        let s2 = s.assign(&v);
        let good = &s2 + &v;
        assert!(verify(&t.finish(&[("y", &good)]).unwrap()).is_ok());
        let bad = &s + &v;
        let e = verify(&t.finish(&[("y", &bad)]).unwrap()).unwrap_err();
        assert!(e.what.contains("old version"), "{e}");
    }

    #[test]
    fn wrong_shapes_and_orders_are_found() {
        let t = Trace::new();
        let x = t.input("x", &[2, 3], DType::F32);
        let y = x.exp();
        let g = t.finish(&[("y", &y)]).unwrap();
        let mut wrong = g.clone();
        wrong.nodes[1].shape = vec![3, 2];
        assert!(verify(&wrong).unwrap_err().what.contains("its op gives"));
        let mut wrong = g;
        wrong.nodes[1].inputs[0] = NodeId(1);
        assert!(verify(&wrong).unwrap_err().what.contains("before it"));
    }
}
