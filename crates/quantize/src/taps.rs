//! Graphs of one block that give its linear layers' inputs, and products of these.
//!
//! A block is traced twice into one graph: with the original weights over the original activations, and with the rounded
//! ones (their names begin with [`ROUNDED`]) over what the rounded blocks before it made. Where a product with a weight
//! reads its input, the products `x^T x` and `y^T x` are taken in the same run (y original, x rounded).

use crate::Error;
use sparsam_dtype::DType;
use sparsam_ir::{Graph, Node, NodeId, Op, Precision, Trace};
use sparsam_models::Model;
use sparsam_models::nn::Batch;
use std::collections::HashMap;
use std::panic::Location;

/// Begins the names of the rounded side's weights and inputs.
pub(crate) const ROUNDED: &str = "rounded:";

/// The part of a model whose weights are rounded together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// A decoder block.
    Block(usize),
    /// The final norm and the head.
    Head,
}

/// Shapes and stored types by name.
pub(crate) type Shapes = HashMap<String, (Vec<usize>, DType)>;

/// Layers that read the same input.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stage {
    /// Their weights' names.
    pub weights: Vec<String>,
    /// Length of the input.
    pub n: usize,
}

/// What a graph shall give.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Want {
    /// `h` and, of two sides, `cross` of the stage with this number.
    Products(usize),
    /// `y` of the original side and `rounded:y` of the other.
    Outputs,
}

/// The part over `n_tokens` rows.
fn trace(model: &Model, part: Part, batch: &Batch, shapes: &Shapes) -> Result<Graph, Error> {
    let t = Trace::with_weights(shapes.clone());
    let x = t.input("x", &[batch.n_tokens, model.facts().hidden_size], DType::F32);
    let y = match part {
        Part::Block(layer) => model.block(batch, layer, &x),
        Part::Head => model.head(batch, &x),
    };
    Ok(t.finish(&[("y", &y)])?)
}

/// The products with weights in a graph: weight's name and the node of the input, in order.
fn linears(graph: &Graph) -> Vec<(String, NodeId)> {
    let of = |node: &Node| match (&node.op, node.inputs.get(1).map(|w| &graph.node(*w).op)) {
        (Op::Matmul { .. }, Some(Op::Weight { name, shape, .. })) if shape.len() == 2 => {
            Some((name.clone(), node.inputs[0]))
        }
        _ => None,
    };
    graph.nodes.iter().filter_map(of).collect()
}

/// The names of all weights in a graph, constants included.
pub(crate) fn weights(model: &Model, part: Part) -> Result<Vec<String>, Error> {
    let t = Trace::new();
    let x = t.input("x", &[1, model.facts().hidden_size], DType::F32);
    let y = match part {
        Part::Block(layer) => model.block(&Batch::packed(1), layer, &x),
        Part::Head => model.head(&Batch::packed(1), &x),
    };
    Ok(weight_names(&t.finish(&[("y", &y)])?))
}

/// The names of all weights that the embedding reads.
pub(crate) fn embedding_weights(model: &Model) -> Result<Vec<String>, Error> {
    let t = Trace::new();
    let y = model.embed(&t, &Batch::packed(1));
    Ok(weight_names(&t.finish(&[("y", &y)])?))
}

fn weight_names(graph: &Graph) -> Vec<String> {
    let name = |n: &Node| match &n.op {
        Op::Weight { name, .. } => Some(name.clone()),
        _ => None,
    };
    graph.nodes.iter().filter_map(name).collect()
}

/// The layers of a part, those that read the same input together, in the order in which they run.
pub(crate) fn stages(model: &Model, part: Part, shapes: &Shapes) -> Result<Vec<Stage>, Error> {
    let graph = trace(model, part, &Batch::packed(1), shapes)?;
    let mut stages: Vec<(NodeId, Stage)> = Vec::new();
    for (name, input) in linears(&graph) {
        match stages.iter_mut().find(|(id, _)| *id == input) {
            Some((_, stage)) => stage.weights.push(name),
            None => {
                let n = *graph.node(input).shape.last().unwrap_or(&1);
                stages.push((input, Stage { weights: vec![name], n }));
            }
        }
    }
    Ok(stages.into_iter().map(|(_, stage)| stage).collect())
}

/// The graph that gives `want`, of the sides whose shapes are given; products want the rounded side.
pub(crate) fn graph(
    model: &Model,
    part: Part,
    batch: &Batch,
    rounded: Option<&Shapes>,
    original: Option<&Shapes>,
    want: Want,
) -> Result<Graph, Error> {
    let mut graph = Graph::default();
    let constants: Vec<String> = model.constants().into_iter().map(|c| c.name).collect();
    let side = |graph: &mut Graph, shapes: &Shapes, prefix: &str| -> Result<(Vec<NodeId>, NodeId), Error> {
        let mut one = trace(model, part, batch, shapes)?;
        for node in &mut one.nodes {
            match &mut node.op {
                Op::Weight { name, .. } if !constants.contains(name) => *name = format!("{prefix}{name}"),
                Op::Input { name, .. } if name == "x" => *name = format!("{prefix}x"),
                _ => {}
            }
        }
        let mut inputs: Vec<NodeId> = Vec::new();
        for (_, id) in linears(&one) {
            if !inputs.contains(&id) {
                inputs.push(id);
            }
        }
        let y = one.outputs[0].1;
        let ids = append(graph, one);
        Ok((inputs.into_iter().map(|id| ids[id.index()]).collect(), ids[y.index()]))
    };
    let before = original.map(|shapes| side(&mut graph, shapes, "")).transpose()?;
    let after = rounded.map(|shapes| side(&mut graph, shapes, ROUNDED)).transpose()?;
    match (want, after) {
        (Want::Outputs, after) => {
            graph.outputs.extend(after.map(|(_, y)| (format!("{ROUNDED}y"), y)));
            graph.outputs.extend(before.map(|(_, y)| ("y".to_string(), y)));
        }
        (Want::Products(_), None) => unreachable!("products are of the rounded side's inputs"),
        (Want::Products(stage), Some((inputs, _))) => {
            let x = inputs[stage];
            let h = product(&mut graph, x, x, batch.precision);
            graph.outputs.push(("h".into(), h));
            if let Some((inputs, _)) = before {
                let cross = product(&mut graph, inputs[stage], x, batch.precision);
                graph.outputs.push(("cross".into(), cross));
            }
        }
    }
    Ok(graph)
}

/// Appends the nodes of `more`; inputs and constants that are already there are shared. The new ids of its nodes.
fn append(graph: &mut Graph, more: Graph) -> Vec<NodeId> {
    let mut ids: Vec<NodeId> = Vec::with_capacity(more.nodes.len());
    for mut node in more.nodes {
        let leaf = matches!(node.op, Op::Input { .. } | Op::Weight { .. });
        if leaf && let Some(id) = graph.ids().find(|id| graph.node(*id).op == node.op) {
            ids.push(id);
            continue;
        }
        node.inputs.iter_mut().for_each(|i| *i = ids[i.index()]);
        ids.push(NodeId(graph.nodes.len() as u32));
        graph.nodes.push(node);
    }
    ids
}

/// `a^T b` of two nodes (tokens, n).
fn product(graph: &mut Graph, a: NodeId, b: NodeId, precision: Precision) -> NodeId {
    let n = *graph.node(a).shape.last().unwrap_or(&1);
    let id = NodeId(graph.nodes.len() as u32);
    graph.nodes.push(Node {
        op: Op::Matmul { trans_a: true, trans_b: false, precision },
        inputs: vec![a, b],
        shape: vec![n, n],
        dtype: DType::F32,
        tap: None,
        at: Location::caller(),
    });
    id
}
