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
        // A write replaces its state: two of them are two versions, even if they look alike. A sum over processes is a
        // call of all of them: as many as were asked for.
        if node.op.writes_state() || node.op == Op::AllReduce {
            return push(g, node);
        }
        *seen.entry((node.op.clone(), node.inputs.clone())).or_insert_with(|| push(g, node))
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{graph, header, on_graph};
    use super::*;
    use sparsam_ir::DType;

    #[test]
    fn equal_nodes_become_one() {
        let g = graph(|t| {
            let x = t.input("x", &[2], DType::F32);
            x.exp() + x.exp()
        });
        let source = include_str!("cse.rs");
        assert_eq!(g.to_string(), header(source, 0));
        assert_eq!(on_graph(cse, &g), header(source, 1));
    }

    #[test]
    fn versions_of_a_state_and_streams_of_random_numbers_stay_apart() {
        let g = graph(|t| {
            let x = t.input("x", &[2], DType::F32);
            let s = t.state("s", &[2], DType::F32);
            let first = s.assign(&(&s + &x));
            let second = first.assign(&(&first + &x));
            let seed = t.input("seed", &[2], DType::I32);
            second + t.random(&seed, 0, &[2]) + t.random(&seed, 1, &[2])
        });
        assert_eq!(on_graph(cse, &g), g.to_string());
    }

    #[test]
    fn sums_over_processes_stay_as_many_as_they_are() {
        let g = graph(|t| {
            let x = t.input("x", &[2], DType::F32);
            x.all_reduce() + x.all_reduce()
        });
        assert_eq!(on_graph(cse, &g), g.to_string());
    }
}
