//! Graph to Program, one node one step: the plain meaning that eager runs and that passes start from.
//!
//! Movement becomes a view where strides can say it and a copy where they cannot; elementwise nodes and row
//! reductions become row programs of one instruction; constants go into the instructions that read them. Each
//! result has its own place.

mod cross_entropy;

use crate::program::{Instr, Kernel, Operand, Place, Program, RowProgram, Step, Store, is_narrow};
use crate::{Error, Val};
use sparsam_ir::{AttentionPart, Binary, DType, Graph, Layout, NodeId, Op, Reduction};
use std::collections::HashMap;

/// Rows this long are reduced first when the last axis is reduced together with others: then threads share the
/// leading axes and sums are shorter. Shorter ones are cheaper in one go.
const REDUCE_LAST_FIRST: usize = 64;

/// What a node's value is.
#[derive(Clone, Debug)]
enum Value {
    Const(f64),
    At(Operand),
}

struct Lower<'g> {
    graph: &'g Graph,
    program: Program,
    values: Vec<Option<Value>>,
    /// Rank of the last node that reads each; `u32::MAX` for outputs.
    last_use: Vec<u32>,
    /// Place of each leaf by kind and name.
    leaves: HashMap<(u8, &'g str), usize>,
    /// Nodes whose value lies in a state's place, by place.
    in_state: HashMap<usize, Vec<NodeId>>,
    /// Step that runs an attention with these inputs, by everything but the part.
    attention: HashMap<(Vec<NodeId>, sparsam_ir::Attention), usize>,
    /// Parts of a cross-entropy made beside another part, by node.
    cross_entropy: HashMap<NodeId, Operand>,
    loss_rows: Option<usize>,
    /// Where each node stands in the order of work.
    rank: Vec<u32>,
    at: NodeId,
}

/// The program that runs `graph` node by node.
///
/// `loss_rows`: rows of one chunk of a cross-entropy, if not the usual number.
pub(crate) fn lower(graph: &Graph, loss_rows: Option<usize>) -> Result<Program, Error> {
    let n = graph.nodes.len();
    let order = cross_entropy::order(graph);
    let (mut last_use, mut rank) = (vec![0; n], vec![0; n]);
    for (at, id) in order.iter().enumerate() {
        rank[id.index()] = at as u32;
        for i in &graph.node(*id).inputs {
            last_use[i.index()] = at as u32;
        }
    }
    for (_, id) in &graph.outputs {
        last_use[id.index()] = u32::MAX;
    }
    let mut l = Lower {
        graph,
        program: Program::default(),
        values: vec![None; n],
        last_use,
        leaves: HashMap::new(),
        in_state: HashMap::new(),
        attention: HashMap::new(),
        cross_entropy: HashMap::new(),
        loss_rows,
        rank,
        at: NodeId(0),
    };
    for id in order {
        l.at = id;
        let value = l.node(id)?;
        if let Value::At(o) = &value
            && matches!(l.program.places[o.place], Place::State { .. })
        {
            l.in_state.entry(o.place).or_default().push(id);
        }
        l.values[id.index()] = Some(value);
    }
    for (name, id) in &graph.outputs {
        l.at = *id;
        let value = l.value(*id);
        let o = l.place_of(value, graph.node(*id).dtype, &graph.node(*id).shape);
        let o = l.contiguous(o);
        l.program.outputs.push((name.clone(), o));
    }
    Ok(l.program)
}

impl Lower<'_> {
    fn value(&self, id: NodeId) -> Value {
        self.values[id.index()].clone().expect("inputs of a live node come first")
    }

    fn leaf(&mut self, kind: u8, name: &str, place: Place, dtype: DType, shape: &[usize]) -> Value {
        let graph = self.graph;
        let (Op::Input { name: key, .. } | Op::Weight { name: key, .. } | Op::State { name: key, .. }) =
            &graph.node(self.at).op
        else {
            unreachable!("leaf {name} is no leaf")
        };
        let places = &mut self.program.places;
        let place = *self.leaves.entry((kind, key)).or_insert_with(|| {
            places.push(place);
            places.len() - 1
        });
        Value::At(Operand { place, dtype, layout: Layout::contiguous(shape) })
    }

    fn temp(&mut self, dtype: DType, shape: &[usize]) -> Operand {
        let layout = Layout::contiguous(shape);
        let bytes = layout.numel() * dtype.block_bytes();
        self.program.places.push(Place::Arena { offset: 0, bytes });
        Operand { place: self.program.places.len() - 1, dtype, layout }
    }

    fn step(&mut self, kernel: Kernel, outs: Vec<Operand>, ins: Vec<Operand>) {
        if outs.iter().any(|o| o.layout.numel() > 0) {
            self.program.steps.push(Step { kernel, outs, ins, nodes: vec![self.at] });
        }
    }

    /// A row program over `domain` whose body makes one value of its loaded operands.
    fn row(
        &mut self,
        domain: &[usize],
        operands: &[Value],
        out: Operand,
        store: Store,
        body: impl FnOnce(&mut Vec<Instr>, &[Val]) -> Val,
    ) {
        let scalar = domain.is_empty();
        let one = |o: &Operand| {
            let layout = Layout { shape: vec![1], strides: vec![1], offset: o.layout.offset };
            if scalar { Operand { layout, ..o.clone() } } else { o.clone() }
        };
        let (mut instrs, mut ins, mut vals) = (Vec::new(), Vec::<Operand>::new(), Vec::new());
        for v in operands {
            let instr = match v {
                Value::Const(c) => Instr::Const(*c as f32),
                Value::At(o) => {
                    let o = one(o);
                    let input = ins.iter().position(|i| *i == o).unwrap_or_else(|| {
                        ins.push(o);
                        ins.len() - 1
                    });
                    Instr::Load { input }
                }
            };
            let at = instrs.iter().position(|i| *i == instr).unwrap_or_else(|| {
                instrs.push(instr);
                instrs.len() - 1
            });
            vals.push(at as Val);
        }
        let val = body(&mut instrs, &vals);
        let shape = if scalar { vec![1] } else { domain.to_vec() };
        let program = RowProgram { shape, instrs, stores: vec![(0, val, store)] };
        let out = one(&out);
        self.step(Kernel::Row(program), vec![out], ins);
    }

    fn fill(&mut self, out: Operand, value: f64) {
        let shape = out.layout.shape.clone();
        self.row(&shape, &[Value::Const(value)], out, Store::Rows, |_, v| v[0]);
    }

    /// Copies a value into `out`, which has its shape: a row program where f32 holds the elements exactly.
    fn copy(&mut self, out: Operand, value: &Value) {
        let through_f32 = |d| matches!(d, DType::F32 | DType::F16 | DType::BF16);
        match value {
            Value::Const(c) => self.fill(out, *c),
            Value::At(o) if through_f32(o.dtype) && through_f32(out.dtype) => {
                let shape = out.layout.shape.clone();
                self.row(&shape, std::slice::from_ref(value), out, Store::Rows, |_, v| v[0]);
            }
            Value::At(o) => self.step(Kernel::Copy, vec![out], vec![o.clone()]),
        }
    }

    /// Somewhere in memory.
    fn place_of(&mut self, value: Value, dtype: DType, shape: &[usize]) -> Operand {
        match value {
            Value::At(o) => o,
            Value::Const(c) => {
                let out = self.temp(dtype, shape);
                self.fill(out.clone(), c);
                out
            }
        }
    }

    fn input(&mut self, id: NodeId) -> Operand {
        let value = self.value(id);
        let n = self.graph.node(id);
        self.place_of(value, n.dtype, &n.shape)
    }

    fn contiguous(&mut self, o: Operand) -> Operand {
        if o.layout.is_contiguous() {
            return o;
        }
        let out = self.temp(o.dtype, &o.layout.shape);
        self.copy(out.clone(), &Value::At(o));
        out
    }

    /// As F32 with neighbours along the last axis adjacent, which is what kernels read fast.
    fn rows_f32(&mut self, o: Operand) -> Operand {
        let adjacent = o.layout.strides.last() == Some(&1) || o.layout.shape.last() == Some(&1);
        if adjacent && o.dtype == DType::F32 {
            return o;
        }
        let out = self.temp(DType::F32, &o.layout.shape);
        self.copy(out.clone(), &Value::At(o));
        out
    }

    fn node(&mut self, id: NodeId) -> Result<Value, Error> {
        let graph = self.graph;
        let n = graph.node(id);
        let (shape, dtype) = (&n.shape, n.dtype);
        Ok(match &n.op {
            Op::Input { name, .. } => {
                let place = Place::Input { name: name.clone(), shape: shape.clone(), dtype };
                self.leaf(0, name, place, dtype, shape)
            }
            Op::Weight { name, .. } => {
                let place = Place::Weight { name: name.clone(), shape: shape.clone(), dtype };
                self.leaf(1, name, place, dtype, shape)
            }
            Op::State { name, .. } => {
                let place = Place::State { name: name.clone(), shape: shape.clone(), dtype };
                self.leaf(2, name, place, dtype, shape)
            }
            Op::Const { value, .. } => Value::Const(value.get()),
            Op::Iota { axis, .. } => {
                if shape[*axis] > 1 << 24 {
                    return Err(self.unsupported("an iota past 2^24, which f32 cannot count"));
                }
                let out = self.temp(dtype, shape);
                self.row(shape, &[], out.clone(), Store::Rows, |instrs, _| {
                    instrs.push(Instr::Iota { axis: *axis });
                    0
                });
                Value::At(out)
            }
            Op::Random { stream, .. } => {
                let seed = self.input(n.inputs[0]);
                let out = self.temp(dtype, shape);
                let domain = if shape.is_empty() { vec![1] } else { shape.clone() };
                let program = RowProgram {
                    shape: domain.clone(),
                    instrs: vec![Instr::Random { seed: 0, stream: *stream }],
                    stores: vec![(0, 0, Store::Rows)],
                };
                let to = Operand { layout: Layout::contiguous(&domain), ..out.clone() };
                self.step(Kernel::Row(program), vec![to], vec![seed]);
                Value::At(out)
            }
            Op::Unary(u) => self.elementwise(n, |v| Instr::Unary(*u, v[0])),
            Op::Binary(b) => self.elementwise(n, |v| Instr::Binary(*b, v[0], v[1])),
            Op::Select => self.elementwise(n, |v| Instr::Select(v[0], v[1], v[2])),
            Op::Cast(to) => self.cast(n.inputs[0], *to)?,
            Op::Reduce { op, axes } => self.reduce(n.inputs[0], *op, axes),
            Op::Reshape(to) => match self.value(n.inputs[0]) {
                Value::Const(c) => Value::Const(c),
                Value::At(o) => {
                    let o = match o.layout.reshape(to) {
                        Some(layout) => Operand { layout, ..o },
                        None => {
                            let whole = self.temp(dtype, &o.layout.shape);
                            self.copy(whole.clone(), &Value::At(o));
                            Operand { layout: Layout::contiguous(to), ..whole }
                        }
                    };
                    Value::At(o)
                }
            },
            Op::Permute(axes) => self.view(n.inputs[0], |l| l.permute(axes)),
            Op::Broadcast(to) => self.view(n.inputs[0], |l| l.broadcast(to)),
            Op::Slice { axis, start, end } => self.view(n.inputs[0], |l| l.slice(*axis, *start, *end)),
            Op::Pad { axis, before, after } => {
                let out = self.temp(dtype, shape);
                let len = shape[*axis];
                let value = self.value(n.inputs[0]);
                for (start, end, value) in [
                    (0, *before, &Value::Const(0.0)),
                    (*before, len - after, &value),
                    (len - after, len, &Value::Const(0.0)),
                ] {
                    let part = Operand { layout: out.layout.slice(*axis, start, end), ..out.clone() };
                    self.copy(part, value);
                }
                Value::At(out)
            }
            Op::Concat { axis } => {
                let out = self.temp(dtype, shape);
                let mut start = 0;
                for &i in &n.inputs {
                    let end = start + graph.node(i).shape[*axis];
                    let part = Operand { layout: out.layout.slice(*axis, start, end), ..out.clone() };
                    let value = self.value(i);
                    self.copy(part, &value);
                    start = end;
                }
                Value::At(out)
            }
            Op::Matmul { trans_a, trans_b, precision } => {
                let (a, b) = (n.inputs[0], n.inputs[1]);
                let out = self.temp(dtype, shape);
                let swap = |l: &Layout| {
                    let mut axes: Vec<usize> = (0..l.shape.len()).collect();
                    axes.swap(l.shape.len() - 1, l.shape.len() - 2);
                    l.permute(&axes)
                };
                let mut left = self.input(a);
                if *trans_a {
                    left.layout = swap(&left.layout);
                }
                if left.layout.shape.last() == Some(&0) {
                    self.fill(out.clone(), 0.0);
                } else if matches!(graph.node(b).op, Op::Weight { .. }) && shape.len() == 2 {
                    let left = self.rows_f32(left);
                    let kernel = if *trans_b {
                        Kernel::WeightMatmul { precision: *precision }
                    } else {
                        Kernel::WeightMatmulT { precision: *precision }
                    };
                    let weight = self.input(b);
                    self.step(kernel, vec![out.clone()], vec![left, weight]);
                } else {
                    let mut right = self.input(b);
                    if *trans_b {
                        right.layout = swap(&right.layout);
                    }
                    let (left, right) = (self.multipliable(left), self.multipliable(right));
                    let kernel = Kernel::Matmul { precision: *precision, add: false };
                    self.step(kernel, vec![out.clone()], vec![left, right]);
                }
                Value::At(out)
            }
            Op::Gather => {
                let (table, rows) = (self.input(n.inputs[0]), self.input(n.inputs[1]));
                let rows = self.contiguous(rows);
                let out = self.temp(dtype, shape);
                let table_node = graph.node(n.inputs[0]);
                if matches!(table_node.op, Op::Weight { .. })
                    && table_node.shape.len() == 2
                    && dtype == DType::F32
                {
                    self.step(Kernel::WeightGather, vec![out.clone()], vec![table, rows]);
                } else if table.dtype.is_block() {
                    return Err(self.unsupported("gathering from a rounded weight that has not two axes"));
                } else {
                    let table = self.contiguous(table);
                    self.step(Kernel::Gather, vec![out.clone()], vec![table, rows]);
                }
                Value::At(out)
            }
            Op::ScatterAdd { .. } => {
                let (values, rows) = (self.input(n.inputs[0]), self.input(n.inputs[1]));
                let (values, rows) = (self.contiguous(values), self.contiguous(rows));
                let out = self.temp(dtype, shape);
                self.step(Kernel::ScatterAdd { add: false }, vec![out.clone()], vec![values, rows]);
                Value::At(out)
            }
            Op::Attention(a) => {
                let key = sparsam_ir::Attention { part: AttentionPart::Out, ..a.clone() };
                let out = self.temp(dtype, shape);
                let shared = (n.inputs.clone(), key);
                if let Some(&step) = self.attention.get(&shared) {
                    let step = &mut self.program.steps[step];
                    step.nodes.push(id);
                    if let Kernel::Attention { parts, .. } = &mut step.kernel {
                        if let Some(made) = parts.iter().position(|p| *p == a.part) {
                            return Ok(Value::At(step.outs[made].clone()));
                        }
                        parts.push(a.part);
                        step.outs.push(out.clone());
                    }
                    return Ok(Value::At(out));
                }
                let mut ins = Vec::new();
                for (i, &input) in n.inputs.iter().enumerate() {
                    let o = self.input(input);
                    ins.push(match i {
                        0 => self.rows_f32(o),
                        4 | 6 if a.part.is_grad() => self.rows_f32(o),
                        1 | 2 if o.layout.strides.last() == Some(&1) => o,
                        _ => self.contiguous(o),
                    });
                }
                // The backward kernel makes all three gradients at once, wanted or not.
                let (mut parts, mut outs) = (vec![a.part], vec![out.clone()]);
                if a.part.is_grad() {
                    parts = vec![AttentionPart::GradQ, AttentionPart::GradK, AttentionPart::GradV];
                    outs = Vec::new();
                    for (part, &of) in parts.iter().zip(&n.inputs) {
                        let new = if *part == a.part {
                            out.clone()
                        } else {
                            self.temp(dtype, &graph.node(of).shape)
                        };
                        outs.push(new);
                    }
                }
                let kernel = Kernel::Attention {
                    scale: a.scale,
                    window: a.window,
                    softcap: a.softcap,
                    layout: a.layout,
                    parts,
                };
                if outs.iter().any(|o| o.layout.numel() > 0) {
                    self.attention.insert(shared, self.program.steps.len());
                }
                self.step(kernel, outs, ins);
                Value::At(out)
            }
            Op::CrossEntropy { part, precision } => self.cross_entropy(n, *part, *precision),
            Op::AllReduce => {
                let from = self.input(n.inputs[0]);
                let from = self.contiguous(from);
                let out = self.temp(dtype, shape);
                self.step(Kernel::AllReduce, vec![out.clone()], vec![from]);
                Value::At(out)
            }
            Op::Assign => {
                let state = self.input(n.inputs[0]);
                let mut value = self.value(n.inputs[1]);
                self.save_old_versions(state.place, id);
                if self.summed_into(&state, n.inputs[1]) {
                    return Ok(Value::At(state));
                }
                if dtype.is_block() {
                    // Rounded by a copy of its own: row programs know plain numbers.
                    let value = self.input(n.inputs[1]);
                    let value = self.rows_f32(value);
                    let value = self.contiguous(value);
                    self.step(Kernel::Copy, vec![state.clone()], vec![value]);
                    return Ok(Value::At(state));
                }
                if let Value::At(o) = &value
                    && o.place == state.place
                {
                    if o.layout == state.layout {
                        return Ok(Value::At(state));
                    }
                    // A view of the state's own elements in another order would be overwritten while read.
                    let own = self.temp(o.dtype, &o.layout.shape);
                    self.copy(own.clone(), &value);
                    value = Value::At(own);
                }
                self.copy(state.clone(), &value);
                Value::At(state)
            }
            Op::ScatterRows => {
                let state = self.input(n.inputs[0]);
                let (values, slots) = (self.input(n.inputs[1]), self.input(n.inputs[2]));
                let slots = self.contiguous(slots);
                self.save_old_versions(state.place, id);
                let values = if values.place == state.place || !values.layout.is_contiguous() {
                    let own = self.temp(values.dtype, &values.layout.shape);
                    self.copy(own.clone(), &Value::At(values));
                    own
                } else {
                    values
                };
                self.step(Kernel::ScatterRows, vec![state.clone()], vec![values, slots]);
                Value::At(state)
            }
        })
    }

    fn elementwise(&mut self, n: &sparsam_ir::Node, instr: impl FnOnce(&[Val]) -> Instr) -> Value {
        let operands: Vec<Value> = n.inputs.iter().map(|&i| self.value(i)).collect();
        let out = self.temp(n.dtype, &n.shape);
        self.row(&n.shape, &operands, out.clone(), Store::Rows, |instrs, v| {
            instrs.push(instr(v));
            instrs.len() as Val - 1
        });
        Value::At(out)
    }

    fn view(&self, id: NodeId, f: impl FnOnce(&Layout) -> Layout) -> Value {
        match self.value(id) {
            Value::Const(c) => Value::Const(c),
            Value::At(o) => Value::At(Operand { layout: f(&o.layout), ..o }),
        }
    }

    fn cast(&mut self, id: NodeId, to: DType) -> Result<Value, Error> {
        let from = self.graph.node(id);
        let o = match self.value(id) {
            // Rounded where it is stored: every use of a constant stores or computes in f32.
            Value::Const(c) if to.is_float() => {
                return Ok(Value::Const(sparsam_ir::interpret::round(c, to)));
            }
            value => self.place_of(value, from.dtype, &from.shape),
        };
        if from.dtype == to {
            return Ok(Value::At(o));
        }
        let o = if from.dtype.is_block() {
            let state = matches!(self.program.places[o.place], Place::State { .. });
            if !state && from.shape.len() != 2 {
                return Err(self.unsupported("decoding a rounded weight that has not two axes"));
            }
            let out = self.temp(DType::F32, &from.shape);
            let kernel = if state { Kernel::Copy } else { Kernel::WeightDecode };
            self.step(kernel, vec![out.clone()], vec![o]);
            if to == DType::F32 {
                return Ok(Value::At(out));
            }
            out
        } else {
            o
        };
        let out = self.temp(to, &from.shape);
        // Integers up to 2^31 pass an f32 only on their way to a float, where they are rounded anyway.
        let integers = !o.dtype.is_float() && !to.is_float();
        if integers || o.dtype == DType::F64 || to == DType::F64 {
            self.step(Kernel::Copy, vec![out.clone()], vec![o]);
        } else {
            self.row(&from.shape, &[Value::At(o)], out.clone(), Store::Rows, |_, v| v[0]);
        }
        Ok(Value::At(out))
    }

    fn reduce(&mut self, id: NodeId, op: Reduction, axes: &[usize]) -> Value {
        let from = self.graph.node(id);
        let mut shape = from.shape.clone();
        let mut o = match self.value(id) {
            Value::Const(c) => {
                let n: usize = axes.iter().map(|&a| shape[a]).product();
                return Value::Const(match op {
                    Reduction::Sum => c * n as f64,
                    Reduction::Max if n == 0 => f64::NEG_INFINITY,
                    Reduction::Max => c,
                });
            }
            Value::At(o) => o,
        };
        let mut axes: Vec<usize> = axes.iter().copied().filter(|&a| shape[a] != 1).collect();
        if axes.iter().any(|&a| shape[a] == 0) {
            axes.iter().for_each(|&a| shape[a] = 1);
            let out = self.temp(DType::F32, &shape);
            self.fill(out.clone(), if op == Reduction::Sum { 0.0 } else { f64::NEG_INFINITY });
            return Value::At(out);
        }
        while !axes.is_empty() {
            let last = shape.len() - 1;
            let in_row = axes.contains(&last);
            let columns = op == Reduction::Sum && !in_row && !is_narrow(&o.layout);
            if columns && (0..last).all(|a| shape[a] == 1 || axes.contains(&a)) {
                let mut to = vec![1; shape.len()];
                to[last] = shape[last];
                let out = self.temp(DType::F32, &to);
                self.row(&shape, &[Value::At(o)], out.clone(), Store::ColumnSum, |_, v| v[0]);
                return Value::At(out);
            }
            // The reduced axes go last and become the row; those that do not merge wait for another turn.
            let mut now: Vec<usize> =
                if in_row && shape[last] >= REDUCE_LAST_FIRST { vec![last] } else { axes.clone() };
            let (layout, kept) = loop {
                let kept: Vec<usize> = (0..shape.len()).filter(|a| !now.contains(a)).collect();
                let order: Vec<usize> = kept.iter().chain(&now).copied().collect();
                let mut merged: Vec<usize> = kept.iter().map(|&a| shape[a]).collect();
                merged.push(now.iter().map(|&a| shape[a]).product());
                match o.layout.permute(&order).reshape(&merged) {
                    Some(layout) => break (layout, merged),
                    None => drop(now.remove(0)),
                }
            };
            let mut narrow = kept.clone();
            *narrow.last_mut().expect("the row is an axis") = 1;
            now.iter().for_each(|&a| shape[a] = 1);
            axes.retain(|a| !now.contains(a));
            let out = self.temp(DType::F32, &shape);
            let to = Operand { layout: Layout::contiguous(&narrow), ..out.clone() };
            let from = Value::At(Operand { layout: layout.clone(), ..o.clone() });
            let width = *kept.last().expect("the row is an axis");
            if layout.strides.last() == Some(&0) {
                // The same number over and over: no loop needed.
                let one = Layout { shape: narrow.clone(), ..layout };
                let from = Value::At(Operand { layout: one, ..o });
                let times = if op == Reduction::Sum { width as f64 } else { 1.0 };
                self.row(&narrow, &[from, Value::Const(times)], to, Store::Rows, |instrs, v| {
                    instrs.push(Instr::Binary(Binary::Mul, v[0], v[1]));
                    instrs.len() as Val - 1
                });
            } else {
                self.row(&kept, &[from], to, Store::Rows, |instrs, v| {
                    instrs.push(Instr::Reduce(op, v[0]));
                    instrs.len() as Val - 1
                });
            }
            o = out;
        }
        Value::At(o)
    }

    /// A type that the plain matmul takes.
    fn multipliable(&mut self, o: Operand) -> Operand {
        if matches!(o.dtype, DType::F32 | DType::F16 | DType::BF16) {
            return o;
        }
        let out = self.temp(DType::F32, &o.layout.shape);
        self.step(Kernel::Copy, vec![out.clone()], vec![o]);
        out
    }

    /// Before the state at `place` is written by node `by`: values that lie in it and are read later are copied.
    fn save_old_versions(&mut self, place: usize, by: NodeId) {
        for id in self.in_state.remove(&place).unwrap_or_default() {
            if self.last_use[id.index()] <= self.rank[by.index()] {
                continue;
            }
            let old = self.value(id);
            let Value::At(o) = &old else { continue };
            let out = self.temp(o.dtype, &o.layout.shape);
            self.copy(out.clone(), &old);
            self.values[id.index()] = Some(Value::At(out));
        }
    }

    /// Lets the sum over processes that node `of` is, made just before and read by this write alone, lie in `state` from
    /// the start: a copy would wait for it.
    fn summed_into(&mut self, state: &Operand, of: NodeId) -> bool {
        let graph = self.graph;
        let readers = graph.nodes.iter().flat_map(|n| &n.inputs).filter(|i| **i == of).count();
        let alone = readers == 1 && graph.outputs.iter().all(|(_, id)| *id != of);
        let sums = graph.node(of).op == Op::AllReduce && state.dtype == DType::F32;
        match self.program.steps.last_mut() {
            Some(s) if alone && sums && s.kernel == Kernel::AllReduce && s.nodes == [of] => {
                s.outs = vec![state.clone()];
                true
            }
            _ => false,
        }
    }

    fn unsupported(&self, what: &'static str) -> Error {
        Error::Unsupported { node: self.at, what, at: self.graph.node(self.at).at }
    }
}
