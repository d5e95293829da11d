//! Dead code: nodes that no output and no state write needs go. Before:
//!
//! ```text
//! %0 = input "x" : F32[2]
//! %1 = exp %0 : F32[2]
//! %2 = neg %0 : F32[2]
//! out "y" = %2
//! ```
//!
//! and after:
//!
//! ```text
//! %0 = input "x" : F32[2]
//! %1 = neg %0 : F32[2]
//! out "y" = %1
//! ```

use super::rewrite::push;
use sparsam_ir::{Graph, NodeId};

/// `graph` without nodes that no result needs.
pub(crate) fn dce(graph: &Graph) -> Graph {
    let mut new = Graph::default();
    let mut map: Vec<Option<NodeId>> = Vec::with_capacity(graph.nodes.len());
    let renamed =
        |map: &[Option<NodeId>], id: NodeId| map[id.index()].expect("a live node needs live nodes only");
    for (node, live) in graph.nodes.iter().zip(graph.live()) {
        map.push(live.then(|| {
            let mut node = node.clone();
            node.inputs.iter_mut().for_each(|i| *i = renamed(&map, *i));
            push(&mut new, node)
        }));
    }
    new.outputs = graph.outputs.iter().map(|(name, id)| (name.clone(), renamed(&map, *id))).collect();
    new.writes = graph.writes.iter().map(|id| renamed(&map, *id)).collect();
    new
}

#[cfg(test)]
mod tests {
    use super::super::testing::{graph, header, on_graph};
    use super::*;
    use sparsam_ir::DType;

    #[test]
    fn unread_nodes_go() {
        let g = graph(|t| {
            let x = t.input("x", &[2], DType::F32);
            x.exp();
            x.neg()
        });
        let source = include_str!("dce.rs");
        assert_eq!(g.to_string(), header(source, 0));
        assert_eq!(on_graph(dce, &g), header(source, 1));
    }

    #[test]
    fn writes_and_what_they_need_stay() {
        let g = graph(|t| {
            let x = t.input("x", &[2], DType::F32);
            t.state("s", &[2], DType::F32).assign(&x.exp());
            x.neg()
        });
        assert_eq!(on_graph(dce, &g), g.to_string());
    }
}
