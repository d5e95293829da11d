//! Common subexpressions: nodes with the same op and operands become one. Before:
//!
//! ```text
//! %0 = input "x" : F32[2]
//! %1 = exp %0 : F32[2]
//! %2 = exp %0 : F32[2]
//! %3 = add %1 %2 : F32[2]
//! out "y" = %3
//! ```
//!
//! and after:
//!
//! ```text
//! %0 = input "x" : F32[2]
//! %1 = exp %0 : F32[2]
//! %2 = add %1 %1 : F32[2]
//! out "y" = %2
//! ```

use super::rewrite::{push, rewrite};
use sparsam_ir::{Graph, NodeId, Op};
use std::collections::HashMap;

/// `graph` with each value computed once.
pub(crate) fn cse(graph: &Graph) -> Graph {
    let mut seen: HashMap<(Op, Vec<NodeId>), NodeId> = HashMap::new();
    rewrite(graph, |g, node| {
        // A write replaces its state: two of them are two versions, even if they look alike.
        if node.op.writes_state() {
            return push(g, node);
        }
        *seen.entry((node.op.clone(), node.inputs.clone())).or_insert_with(|| push(g, node))
    })
}
