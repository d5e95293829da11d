//! The arena of nodes.

use crate::op::Op;
use sparsam_dtype::DType;
use std::panic::Location;

/// Index of a node in its graph. Inputs always have smaller ids than the node that reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u32);

impl NodeId {
    /// As an index into [`Graph::nodes`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One operation applied to earlier nodes.
#[derive(Clone, Debug)]
pub struct Node {
    /// What is done.
    pub op: Op,
    /// What it is done to.
    pub inputs: Vec<NodeId>,
    /// Shape of the result.
    pub shape: Vec<usize>,
    /// Element type of the result.
    pub dtype: DType,
    /// A name under which the value can be asked for as one more output.
    pub tap: Option<String>,
    /// The line of model code that made it.
    pub at: &'static Location<'static>,
}

impl Node {
    /// Number of elements of the result.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the result.
    pub fn bytes(&self) -> usize {
        self.dtype.bytes_for(self.numel()).unwrap_or(0)
    }
}

/// A traced computation.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// All nodes, inputs before users.
    pub nodes: Vec<Node>,
    /// Named results.
    pub outputs: Vec<(String, NodeId)>,
    /// Last versions of the states that are written.
    pub writes: Vec<NodeId>,
}

impl Graph {
    /// The node with this id.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// All ids in order.
    pub fn ids(&self) -> impl DoubleEndedIterator<Item = NodeId> + use<> {
        (0..self.nodes.len() as u32).map(NodeId)
    }

    /// What must be computed: outputs and state writes.
    pub fn roots(&self) -> impl Iterator<Item = NodeId> {
        self.outputs.iter().map(|(_, id)| *id).chain(self.writes.iter().copied())
    }

    /// For each node, whether any root depends on it.
    pub fn live(&self) -> Vec<bool> {
        let mut live = vec![false; self.nodes.len()];
        for id in self.roots() {
            live[id.index()] = true;
        }
        for i in (0..self.nodes.len()).rev() {
            if live[i] {
                for input in &self.nodes[i].inputs {
                    live[input.index()] = true;
                }
            }
        }
        live
    }

    /// The value tapped under `name` becomes one more output; `false` if there is no such tap.
    pub fn add_tap(&mut self, name: &str) -> bool {
        let found = self.ids().find(|id| self.node(*id).tap.as_deref() == Some(name));
        if let Some(id) = found {
            self.outputs.push((name.to_string(), id));
        }
        found.is_some()
    }

    /// The state that `id` is a version of, if it is one.
    pub fn state_of(&self, id: NodeId) -> Option<NodeId> {
        let node = self.node(id);
        match &node.op {
            Op::State { .. } => Some(id),
            op if op.writes_state() => self.state_of(node.inputs[0]),
            _ => None,
        }
    }
}
