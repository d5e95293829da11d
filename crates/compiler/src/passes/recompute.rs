//! Values of the forward pass that the backward pass computes again instead of keeping them: time for space.
//!
//! ```text
//! y = gelu(x)              y = gelu(x)
//! z = y w                  z = y w
//! ..                 ->    ..
//! dw = y^T dz              y' = gelu(x)
//!                          dw = y'^T dz
//! ```
//!
//! The graph falls into *segments* between the points where a single value is all that goes on (the residual stream of
//! a model, before and behind each half of a block). Those values are kept. Of a segment, the rest is kept, or what
//! needs no product is computed again, or all of it is (Chen et al. 2016). [`fit`] does as little of this as a budget
//! of memory asks for. Nothing is computed again behind the first write of a state.

use super::rewrite::push;
use crate::Error;
use crate::program::{Place, Program};
use crate::report::Recompute;
use sparsam_ir::{Graph, NodeId, Op};

/// Rows of a cross-entropy's logits that exist at once where memory is short.
const FEW_LOSS_ROWS: usize = 128;

/// How much of a segment is computed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    /// Nothing.
    Nothing,
    /// All but products, attention and gathers, and what attention reads.
    Cheap,
    /// All, from the value that begins the segment.
    All,
}

/// Whether a node is a leaf or a write.
fn is_leaf(op: &Op) -> bool {
    let leaf = matches!(
        op,
        Op::Input { .. } | Op::Weight { .. } | Op::State { .. } | Op::Const { .. } | Op::Iota { .. }
    );
    leaf || op.writes_state()
}

/// Whether a node is little work beside a product.
fn is_cheap(op: &Op) -> bool {
    !matches!(
        op,
        Op::Matmul { .. }
            | Op::Attention(_)
            | Op::CrossEntropy { .. }
            | Op::Gather
            | Op::ScatterAdd { .. }
            | Op::Random { .. }
            | Op::AllReduce
    )
}

/// Where the graph turns, and which of its nodes belong together.
struct Segments {
    /// The first node behind the forward pass.
    turn: usize,
    /// Segment of each forward node; `None` for what is kept anyway: leaves, what inputs alone decide, and the values
    /// between segments.
    of: Vec<Option<usize>>,
    /// Whether attention reads it, perhaps through views.
    attended: Vec<bool>,
    count: usize,
}

impl Segments {
    fn of(graph: &Graph) -> Segments {
        // Behind the loss come gradients; without one of ours, behind the point where most is live.
        let loss = graph.nodes.iter().position(|n| matches!(n.op, Op::CrossEntropy { .. }));
        let turn = loss.unwrap_or_else(|| most_live(graph));
        let forward = &graph.nodes[..turn];
        let mut last = vec![0; turn];
        for (i, node) in graph.nodes[..graph.nodes.len().min(turn + 1)].iter().enumerate() {
            node.inputs.iter().filter(|x| x.index() < turn).for_each(|x| last[x.index()] = i);
        }
        let mut fixed = vec![false; turn];
        for (i, node) in forward.iter().enumerate() {
            // A weight of one axis is little: what it and the inputs decide (the sines of positions) may be kept.
            let parameter = |x: &NodeId| match &graph.node(*x).op {
                Op::Weight { shape, .. } => shape.len() > 1,
                op => matches!(op, Op::State { .. }),
            };
            let given = node.inputs.iter().all(|x| fixed[x.index()] && !parameter(x));
            fixed[i] = is_leaf(&node.op) || (is_cheap(&node.op) && given);
        }
        // Values that go on past each node.
        let mut change = vec![0isize; turn + 1];
        for v in (0..turn).filter(|&v| !fixed[v] && last[v] > v) {
            change[v] += 1;
            change[last[v]] -= 1;
        }
        let (mut of, mut attended) = (vec![None; turn], vec![false; turn]);
        let (mut count, mut going_on, mut worth) = (0, 0, true);
        for i in 0..turn {
            going_on += change[i];
            if fixed[i] {
                continue;
            }
            worth |= !is_cheap(&forward[i].op);
            if going_on == 1 && last[i] > i && worth {
                (count, worth) = (count + 1, false);
            } else {
                of[i] = Some(count);
            }
        }
        for i in (0..turn).rev() {
            let node = &forward[i];
            let view =
                matches!(node.op, Op::Reshape(_) | Op::Permute(_) | Op::Broadcast(_) | Op::Slice { .. });
            if matches!(node.op, Op::Attention(_)) || (view && attended[i]) {
                node.inputs.iter().for_each(|x| attended[x.index()] = true);
            }
        }
        Segments { turn, of, attended, count: count + 1 }
    }
}

/// The node at which most bytes are live, views and leaves aside.
fn most_live(graph: &Graph) -> usize {
    let n = graph.nodes.len();
    let mut last = vec![0; n];
    for (i, node) in graph.nodes.iter().enumerate() {
        node.inputs.iter().for_each(|x| last[x.index()] = i);
    }
    let mut change = vec![0isize; n + 1];
    for (i, node) in graph.nodes.iter().enumerate().filter(|(_, n)| !is_leaf(&n.op)) {
        change[i] += node.bytes() as isize;
        change[last[i].max(i)] -= node.bytes() as isize;
    }
    let (mut live, mut most, mut at) = (0, 0, 0);
    for (i, c) in change[..n].iter().enumerate() {
        live += c;
        if live > most {
            (most, at) = (live, i);
        }
    }
    at
}

/// A graph in the making, in which some forward values exist a second time.
struct Again<'g> {
    graph: &'g Graph,
    segments: &'g Segments,
    levels: &'g [Level],
    new: Graph,
    map: Vec<NodeId>,
    second: Vec<Option<NodeId>>,
}

impl Again<'_> {
    fn is_again(&self, x: NodeId) -> bool {
        let i = x.index();
        // A sum over processes is made once by all of them.
        if self.graph.node(x).op == Op::AllReduce {
            return false;
        }
        let Some(segment) = self.segments.of.get(i).copied().flatten() else { return false };
        match self.levels[segment] {
            Level::Nothing => false,
            Level::Cheap => is_cheap(&self.graph.node(x).op) && !self.segments.attended[i],
            Level::All => true,
        }
    }

    /// What stands for forward value `x` behind the turn.
    fn value(&mut self, x: NodeId) -> NodeId {
        if x.index() >= self.segments.turn || !self.is_again(x) {
            return self.map[x.index()];
        }
        if let Some(made) = self.second[x.index()] {
            return made;
        }
        let mut node = self.graph.node(x).clone();
        node.tap = None;
        for i in 0..node.inputs.len() {
            node.inputs[i] = self.value(node.inputs[i]);
        }
        let id = push(&mut self.new, node);
        self.second[x.index()] = Some(id);
        id
    }
}

fn rewritten(graph: &Graph, segments: &Segments, levels: &[Level]) -> Graph {
    let n = graph.nodes.len();
    let first_write = graph.nodes.iter().position(|n| n.op.writes_state()).unwrap_or(n);
    let mut again =
        Again { graph, segments, levels, new: Graph::default(), map: Vec::new(), second: vec![None; n] };
    for (i, node) in graph.nodes.iter().enumerate() {
        let mut node = node.clone();
        // The loss and its gradients read what the forward pass has made: they run beside it.
        let now = i > segments.turn && i < first_write && !matches!(node.op, Op::CrossEntropy { .. });
        for x in &mut node.inputs {
            *x = if now { again.value(*x) } else { again.map[x.index()] };
        }
        let id = push(&mut again.new, node);
        again.map.push(id);
    }
    let Again { mut new, map, .. } = again;
    new.outputs = graph.outputs.iter().map(|(name, id)| (name.clone(), map[id.index()])).collect();
    new.writes = graph.writes.iter().map(|id| map[id.index()]).collect();
    new
}

/// Bytes of all that a program needs: its arena, inputs, states, and weights as they are stored.
pub(crate) fn memory(program: &Program) -> usize {
    let leaf = |place: &Place| match place {
        Place::Arena { .. } => 0,
        Place::Input { shape, dtype, .. }
        | Place::Weight { shape, dtype, .. }
        | Place::State { shape, dtype, .. } => dtype.bytes_for(shape.iter().product()).unwrap_or(0),
    };
    program.arena_bytes + program.places.iter().map(leaf).sum::<usize>()
}

/// The program of `graph` that computes as little again as fits into `budget` bytes; `build` compiles a graph with
/// so many rows of logits at once.
///
/// # Errors
/// [`Error::Memory`] if nothing fits, and what `build` says.
pub(crate) fn fit(
    graph: &Graph,
    budget: usize,
    loss_rows: Option<usize>,
    mut build: impl FnMut(&Graph, Option<usize>) -> Result<Program, Error>,
) -> Result<(Program, Recompute), Error> {
    let segments = Segments::of(graph);
    let steps = 2 * segments.count;
    // First what needs no products is computed again, segment by segment, then all of them.
    let levels = |k: usize| -> Vec<Level> {
        let level = |s: usize| match k {
            _ if k > segments.count + s => Level::All,
            _ if k > s => Level::Cheap,
            _ => Level::Nothing,
        };
        (0..segments.count).map(level).collect()
    };
    let mut attempt = |k: usize, rows: Option<usize>| -> Result<(Program, Recompute), Error> {
        let levels = levels(k);
        let program = build(&rewritten(graph, &segments, &levels), rows)?;
        let of = |level| levels.iter().filter(|l| **l == level).count();
        let (cheap, all) = (of(Level::Cheap), of(Level::All));
        let choice = Recompute { budget, segments: segments.count, cheap, all, loss_rows: rows };
        Ok((program, choice))
    };
    let fits = |p: &(Program, Recompute)| memory(&p.0) <= budget;
    let first = attempt(0, loss_rows)?;
    if fits(&first) {
        return Ok(first);
    }
    let rows = Some(loss_rows.map_or(FEW_LOSS_ROWS, |rows| rows.min(FEW_LOSS_ROWS)));
    let mut best = attempt(steps, rows)?;
    if !fits(&best) {
        // Computing all again is not always least: a short graph may gain nothing by it.
        let least = [memory(&best.0), memory(&first.0), memory(&attempt(0, rows)?.0)].into_iter().min();
        let least = least.unwrap_or(0);
        if least > budget {
            return Err(Error::Memory { budget, least });
        }
        return attempt(0, rows);
    }
    let (mut low, mut high) = (0, steps);
    while low < high {
        let middle = (low + high) / 2;
        let one = attempt(middle, rows)?;
        if fits(&one) {
            (high, best) = (middle, one);
        } else {
            low = middle + 1;
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::super::testing::same_as_interpreted;
    use crate::{Error, Options, Program, compile};
    use sparsam_ir::{DType, Graph, Precision, Tensor, Trace, grad};

    /// Residual blocks with a norm, two products and a GELU between them, a loss, and plain gradient descent.
    fn graph(blocks: usize) -> Graph {
        turned(blocks, false)
    }

    /// The same; if `by_positions`, each block's norm is multiplied by cosines of positions and constant frequencies.
    fn turned(blocks: usize, by_positions: bool) -> Graph {
        let t = Trace::new().training(|_| true);
        let turns = by_positions.then(|| {
            let positions = t.input("positions", &[64, 1], DType::F32).broadcast_to(&[64, 16]);
            (positions * t.constant("frequencies", &[16])).cos()
        });
        let mut x: Tensor = t.input("x", &[64, 16], DType::F32).matmul(&t.weight("in", &[16, 16]));
        for i in 0..blocks {
            let scale = (&x * &x).mean().add_scalar(1e-5).sqrt().recip();
            let h = (&x * &scale) * t.weight(&format!("{i}.norm"), &[16]);
            let h = turns.as_ref().map_or(h.clone(), |turns| &h * turns);
            let up = h.matmul_with(&t.weight(&format!("{i}.up"), &[64, 16]), false, true, Precision::F32);
            let down = t.weight(&format!("{i}.down"), &[16, 64]);
            x = &x + &up.gelu_tanh().matmul_with(&down, false, true, Precision::F32);
        }
        let logits = x.matmul_with(&t.weight("head", &[20, 16]), false, true, Precision::F32);
        let targets = t.input("targets", &[64], DType::I32);
        let loss = logits.cross_entropy(&targets).mean_where(&targets).0;
        let parameters = t.parameters();
        let gradients = grad(&loss, &parameters.iter().map(|(_, p)| p).collect::<Vec<_>>());
        for ((_, p), g) in parameters.iter().zip(&gradients) {
            p.assign(&(p - g.mul_scalar(0.1)));
        }
        t.finish(&[("loss", &loss)]).unwrap()
    }

    fn products(p: &Program) -> usize {
        p.steps.iter().filter(|s| s.kernel.name() == "matmul").count()
    }

    #[test]
    fn a_budget_is_met_by_as_little_as_it_needs() {
        let g = graph(6);
        let free = same_as_interpreted(&g, &Options::default());
        let whole = free.report.memory;
        assert!(free.report.recompute.is_none());
        let mut before = (whole, products(&free));
        let Err(Error::Memory { least, .. }) =
            compile(&g, &Options { memory: Some(0), ..Options::default() })
        else {
            panic!("nothing fits into 0 bytes")
        };
        for budget in [whole * 95 / 100, whole * 85 / 100, least] {
            let p = same_as_interpreted(&g, &Options { memory: Some(budget), ..Options::default() });
            assert!(p.report.memory <= budget && p.report.memory < before.0, "{}", p.report);
            assert!(products(&p) >= before.1);
            assert!(p.report.recompute.is_some());
            before = (p.report.memory, products(&p));
        }
        assert!(before.1 > products(&free), "the least budget computes products again");
    }

    #[test]
    fn what_positions_decide_does_not_hold_blocks_together() {
        let least = |g: &Graph| match compile(g, &Options { memory: Some(0), ..Options::default() }) {
            Err(Error::Memory { least, .. }) => least,
            other => panic!("{other:?}"),
        };
        let (plain, turned) = (graph(6), turned(6, true));
        let whole = compile(&turned, &Options::default()).unwrap().report.memory;
        // The cosines and their inputs are all that it takes more.
        assert!(least(&turned) <= least(&plain) + 64 * 16 * 4 + 64 * 4 + 16 * 4 && least(&turned) < whole);
        let budget = Some(least(&turned));
        let p = same_as_interpreted(&turned, &Options { memory: budget, ..Options::default() });
        assert!(p.report.recompute.is_some_and(|r| r.segments > 6));
    }

    #[test]
    fn a_budget_that_fits_changes_nothing_and_one_that_cannot_says_what_would() {
        let g = graph(2);
        let free = compile(&g, &Options::default()).unwrap();
        let wide = compile(&g, &Options { memory: Some(free.report.memory), ..Options::default() }).unwrap();
        assert_eq!(free.to_string(), wide.to_string());
        let e = compile(&g, &Options { memory: Some(1000), ..Options::default() }).unwrap_err();
        let Error::Memory { budget: 1000, least } = e else { panic!("{e}") };
        let p = compile(&g, &Options { memory: Some(least), ..Options::default() }).unwrap();
        assert!(p.report.memory <= least);
    }
}
