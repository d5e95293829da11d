//! Cross-entropy in chunks of rows: products, and one row program between them.
//!
//! For each chunk: `logits = h W^T`; a row program makes the loss and, where gradients are wanted, `dlogits`; then
//! `dh = dlogits W`, and `dW += dlogits^T h`. The logits of one chunk are all that exists at once. Gradients are made
//! beside the loss: their nodes stand later in the graph, so the loss and what hangs on it is moved behind them, unless
//! the gradient of the loss itself hangs on the loss.

use super::{Lower, Value};
use crate::Val;
use crate::program::{Instr, Kernel, Operand, RowProgram, Step, Store};
use sparsam_ir::{
    Binary, CrossEntropyPart as Part, DType, Graph, Layout, Node, NodeId, Op, Precision, Reduction, Unary,
};

/// Logits of one chunk take at most this much, unless that were less than [`FEW_ROWS`]: for GPT-2's 50257 tokens 512
/// rows, one block of K of the product `dlogits^T h`. Smaller chunks would read and write the gradient of the weight
/// more often.
const CHUNK_BYTES: usize = 128 << 20;

/// Rows below which products run slowly.
const FEW_ROWS: usize = 64;

/// Rows of one chunk over `vocab` classes, where nobody else chooses them.
fn chunk_rows(vocab: usize) -> usize {
    let most = CHUNK_BYTES / (4 * vocab);
    let whole = if most >= 512 { most / 512 * 512 } else { most / FEW_ROWS * FEW_ROWS };
    whole.max(FEW_ROWS)
}

/// Whether two nodes are parts of one cross-entropy: `key` of each is equal.
fn key(graph: &Graph, id: NodeId) -> Option<(&[NodeId], Part, Precision)> {
    let n = graph.node(id);
    match n.op {
        Op::CrossEntropy { part, precision } => Some((&n.inputs[..3], part, precision)),
        _ => None,
    }
}

/// Gradients of the loss `id`.
fn gradients<'g>(graph: &'g Graph, of: NodeId, among: &'g [NodeId]) -> impl Iterator<Item = NodeId> + 'g {
    let loss = key(graph, of);
    among.iter().copied().filter(move |&id| match (loss, key(graph, id)) {
        (Some((ins, _, p)), Some((i, part, q))) => part.is_grad() && ins == i && p == q,
        _ => false,
    })
}

/// The live nodes in the order in which they are lowered: that of the graph, but for a loss whose gradients can be made
/// beside it; that loss and all that hangs on it follow the last of them.
pub(super) fn order(graph: &Graph) -> Vec<NodeId> {
    let live = graph.live();
    let mut order: Vec<NodeId> = graph.ids().filter(|id| live[id.index()]).collect();
    let losses: Vec<NodeId> =
        order.iter().copied().filter(|&id| matches!(key(graph, id), Some((_, Part::Loss, _)))).collect();
    for loss in losses {
        let Some(last) = gradients(graph, loss, &order).last() else { continue };
        let mut hangs = vec![false; graph.nodes.len()];
        hangs[loss.index()] = true;
        for id in graph.ids().filter(|id| *id > loss) {
            hangs[id.index()] = graph.node(id).inputs.iter().any(|i| hangs[i.index()]);
        }
        if gradients(graph, loss, &order).any(|g| hangs[g.index()]) {
            continue;
        }
        let Some(end) = order.iter().position(|id| *id == last) else { continue };
        let (before, after) = order.split_at(end + 1);
        let (later, now): (Vec<NodeId>, Vec<NodeId>) = before.iter().partition(|id| hangs[id.index()]);
        order = now.into_iter().chain(later).chain(after.iter().copied()).collect();
    }
    order
}

/// One value over a chunk's domain: a view of one axis, repeated along the row.
fn column(v: &Value, first: usize, rows: usize, vocab: usize) -> Value {
    match v {
        Value::Const(c) => Value::Const(*c),
        Value::At(o) => {
            let l = o.layout.slice(0, first, first + rows);
            let layout =
                Layout { shape: vec![rows, vocab], strides: vec![l.strides[0], 0], offset: l.offset };
            Value::At(Operand { layout, ..o.clone() })
        }
    }
}

impl Lower<'_> {
    /// All parts that can be made with node `n`, which is part `part`.
    pub(super) fn cross_entropy(&mut self, n: &Node, part: Part, precision: Precision) -> Value {
        if let Some(made) = self.cross_entropy.get(&self.at) {
            return Value::At(made.clone());
        }
        let graph = self.graph;
        let now = self.rank[self.at.index()];
        // A loss that is asked for first has gradients that hang on it, or none.
        let mut parts = vec![(part, self.at)];
        if part.is_grad() {
            for id in graph.ids().filter(|id| self.rank[id.index()] > now) {
                let Some((ins, other, p)) = key(graph, id) else { continue };
                let same = ins == &n.inputs[..3] && p == precision && parts.iter().all(|(p, _)| *p != other);
                if same && (!other.is_grad() || graph.node(id).inputs[3] == n.inputs[3]) {
                    parts.push((other, id));
                }
            }
        }
        let outs: Vec<(Part, NodeId, Operand)> = parts
            .into_iter()
            .map(|(part, id)| (part, id, self.temp(DType::F32, &graph.node(id).shape)))
            .collect();
        self.chunks(n, precision, &outs);
        for (_, id, out) in outs {
            self.cross_entropy.insert(id, out);
        }
        Value::At(self.cross_entropy[&self.at].clone())
    }

    fn chunks(&mut self, n: &Node, precision: Precision, outs: &[(Part, NodeId, Operand)]) {
        let out = |part: Part| outs.iter().find(|(p, ..)| *p == part).map(|(_, _, o)| o.clone());
        let nodes: Vec<NodeId> = outs.iter().map(|(_, id, _)| *id).collect();
        let (h, weight, targets) =
            (self.input(n.inputs[0]), self.input(n.inputs[1]), self.input(n.inputs[2]));
        let frozen = matches!(self.graph.node(n.inputs[1]).op, Op::Weight { .. });
        let (h, targets) = (self.rows_f32(h), self.contiguous(targets));
        let d_loss = n.inputs.get(3).map(|&i| self.value(i));
        let (rows, vocab) = (h.layout.shape[0], weight.layout.shape[0]);
        let at = |o: &Operand, first: usize, end: usize| Operand {
            layout: o.layout.slice(0, first, end),
            ..o.clone()
        };
        let turned = |o: &Operand| Operand { layout: o.layout.permute(&[1, 0]), ..o.clone() };
        if rows == 0
            && let Some(dw) = out(Part::GradWeight)
        {
            self.fill(dw, 0.0);
        }
        let chunk = self.loss_rows.map_or_else(|| chunk_rows(vocab), |rows| rows.max(1));
        let mut first = 0;
        while first < rows {
            let end = rows.min(first + chunk);
            let size = end - first;
            let h = at(&h, first, end);
            let logits = self.temp(DType::F32, &[size, vocab]);
            let step = |l: &mut Self, kernel, out: &Operand, ins| {
                l.program.steps.push(Step { kernel, outs: vec![out.clone()], ins, nodes: nodes.clone() });
            };
            let (kernel, w) = match frozen {
                true => (Kernel::WeightMatmul { precision }, weight.clone()),
                false => (Kernel::Matmul { precision, add: false }, turned(&weight)),
            };
            step(self, kernel, &logits, vec![h.clone(), w]);
            let grads = out(Part::GradH).is_some() || out(Part::GradWeight).is_some();
            let d_logits = grads.then(|| self.temp(DType::F32, &[size, vocab]));
            let loss = out(Part::Loss).map(|o| {
                let layout = o.layout.slice(0, first, end).reshape(&[size, 1]);
                Operand { layout: layout.expect("contiguous"), ..o }
            });
            let columns = |v: &Value| column(v, first, size, vocab);
            let row = softmax(
                &[Value::At(logits), columns(&Value::At(targets.clone()))],
                d_loss.as_ref().map(columns),
                (loss, d_logits.clone()),
                [size, vocab],
            );
            self.program.steps.push(Step { nodes: nodes.clone(), ..row });
            let Some(d) = d_logits else {
                first = end;
                continue;
            };
            if let Some(dh) = out(Part::GradH) {
                let kernel = match frozen {
                    true => Kernel::WeightMatmulT { precision },
                    false => Kernel::Matmul { precision, add: false },
                };
                step(self, kernel, &at(&dh, first, end), vec![d.clone(), weight.clone()]);
            }
            if let Some(dw) = out(Part::GradWeight) {
                let mut ins = vec![turned(&d), h];
                if first > 0 {
                    ins.push(dw.clone());
                }
                step(self, Kernel::Matmul { precision, add: first > 0 }, &dw, ins);
            }
            first = end;
        }
    }
}

/// The row program of one chunk: `ins` are logits and targets, `outs` loss and gradient of the logits.
fn softmax(
    ins: &[Value; 2],
    d_loss: Option<Value>,
    (loss, d_logits): (Option<Operand>, Option<Operand>),
    domain: [usize; 2],
) -> Step {
    let mut operands: Vec<Operand> = Vec::new();
    let mut instrs: Vec<Instr> = Vec::new();
    let mut push = |i: Instr| {
        instrs.push(i);
        instrs.len() as Val - 1
    };
    let mut load = |v: &Value| match v {
        Value::Const(c) => Instr::Const(*c as f32),
        Value::At(o) => {
            operands.push(o.clone());
            Instr::Load { input: operands.len() - 1 }
        }
    };
    let [x, target] = [push(load(&ins[0])), push(load(&ins[1]))];
    let column = push(Instr::Iota { axis: 1 });
    let hit = push(Instr::Binary(Binary::Equal, column, target));
    let max = push(Instr::Reduce(Reduction::Max, x));
    let shifted = push(Instr::Binary(Binary::Sub, x, max));
    let exp = push(Instr::Unary(Unary::Exp, shifted));
    let total = push(Instr::Reduce(Reduction::Sum, exp));
    let [zero, nan, classes] = [0.0, f32::NAN, domain[1] as f32].map(|c| push(Instr::Const(c)));
    let ignored = push(Instr::Binary(Binary::Less, target, zero));
    let known = push(Instr::Binary(Binary::Less, target, classes));
    let counted = |push: &mut dyn FnMut(Instr) -> Val, v: Val| {
        let known = push(Instr::Select(known, v, nan));
        push(Instr::Select(ignored, zero, known))
    };
    let (mut outs, mut stores) = (Vec::new(), Vec::new());
    if let Some(loss) = loss {
        let log = push(Instr::Unary(Unary::Log, total));
        let own = push(Instr::Select(hit, shifted, zero));
        let own = push(Instr::Reduce(Reduction::Sum, own));
        let value = push(Instr::Binary(Binary::Sub, log, own));
        let value = counted(&mut push, value);
        stores.push((outs.len(), value, Store::Rows));
        outs.push(loss);
    }
    if let (Some(d_logits), Some(d_loss)) = (d_logits, d_loss) {
        let scale = push(load(&d_loss));
        let scale = counted(&mut push, scale);
        let inverse = push(Instr::Unary(Unary::Recip, total));
        let p = push(Instr::Binary(Binary::Mul, exp, inverse));
        let value = push(Instr::Binary(Binary::Sub, p, hit));
        let value = push(Instr::Binary(Binary::Mul, value, scale));
        stores.push((outs.len(), value, Store::Rows));
        outs.push(d_logits);
    }
    let program = RowProgram { shape: domain.to_vec(), instrs, stores };
    Step { kernel: Kernel::Row(program), outs, ins: operands, nodes: Vec::new() }
}

#[cfg(test)]
mod tests {
    use crate::passes::testing::same_as_interpreted;
    use crate::{Kernel, Options, Program};
    use sparsam_ir::{DType, Precision, Tensor, Trace, grad};

    /// A loss over 7 rows in chunks of 3, with the gradients of its mean, or of its squares.
    fn program(trained: bool, eager: bool, of: impl Fn(&Tensor) -> Tensor) -> Program {
        let t = if trained { Trace::new().training(|_| true) } else { Trace::new() };
        let (x, w) = (t.input("x", &[7, 4], DType::F32), t.weight("w", &[9, 4]));
        let targets = t.input("targets", &[7], DType::I32);
        let rows = x.exp().linear_cross_entropy(&w, &targets, Precision::F32);
        let loss = of(&rows);
        let mut outputs = vec![("rows", rows), ("loss", loss.clone())];
        let wrt = if trained { vec![&x, &w] } else { vec![&x] };
        outputs.extend(["dx", "dw"].into_iter().zip(grad(&loss, &wrt)));
        let graph = t.finish(&outputs.iter().map(|(n, t)| (*n, t)).collect::<Vec<_>>()).unwrap();
        same_as_interpreted(&graph, &Options { eager, loss_rows: Some(3), ..Options::default() })
    }

    fn products(p: &Program) -> [usize; 2] {
        let count = |added| {
            p.steps.iter().filter(move |s| matches!(s.kernel, Kernel::Matmul { add, .. } if add == added))
        };
        [false, true].map(|added| count(added).count())
    }

    #[test]
    fn gradients_are_made_beside_the_loss() {
        for eager in [true, false] {
            let p = program(true, eager, |rows| rows.sum(&[0]).mul_scalar(1.0 / 7.0));
            // Logits and dh of each chunk, dW once and then added to.
            assert_eq!(products(&p), [3 + 3 + 1, 2]);
        }
        let p = program(false, false, |rows| rows.sum(&[0]));
        let count = |name: &str| p.steps.iter().filter(|s| s.kernel.name() == name).count();
        assert_eq!([count("weight matmul"), count("weight matmul_t"), count("matmul")], [3, 3, 0]);
    }

    #[test]
    fn a_gradient_that_hangs_on_the_loss_waits_for_it() {
        let p = program(true, false, |rows| (rows * rows).sum(&[0]));
        assert_eq!(products(&p), [3 + 3 + 3 + 1, 2]); // logits twice
    }
}
