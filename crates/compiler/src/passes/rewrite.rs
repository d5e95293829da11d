//! Building a graph from another, node by node.

use sparsam_ir::{Graph, Node, NodeId, Op, infer};

/// The graph in which each node of `graph`, its inputs renamed, has become what `f` adds to the new one.
pub(crate) fn rewrite(graph: &Graph, mut f: impl FnMut(&mut Graph, Node) -> NodeId) -> Graph {
    let mut new = Graph::default();
    let mut map: Vec<NodeId> = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let mut node = node.clone();
        node.inputs.iter_mut().for_each(|i| *i = map[i.index()]);
        map.push(f(&mut new, node));
    }
    new.outputs = graph.outputs.iter().map(|(name, id)| (name.clone(), map[id.index()])).collect();
    new.writes = graph.writes.iter().map(|id| map[id.index()]).collect();
    new
}

/// Adds a node as it is.
pub(crate) fn push(g: &mut Graph, node: Node) -> NodeId {
    g.nodes.push(node);
    NodeId(g.nodes.len() as u32 - 1)
}

/// `op` over nodes of `g`, with the line of model code of `like`, not yet added.
///
/// # Panics
/// If the operands do not fit the op: an error of the pass that asks.
pub(crate) fn make(g: &Graph, op: Op, inputs: Vec<NodeId>, like: &Node) -> Node {
    let operands: Vec<_> = inputs.iter().map(|i| (g.node(*i).shape.as_slice(), g.node(*i).dtype)).collect();
    match infer(&op, &operands) {
        Ok((shape, dtype)) => Node { op, inputs, shape, dtype, tap: None, at: like.at },
        Err(what) => panic!("a pass made {op:?} of operands that do not fit: {what}"),
    }
}
