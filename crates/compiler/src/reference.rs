//! What a program means, run slowly in f64 by the graph's own interpreter: the tests' measure for every pass that
//! works on programs.

use crate::program::{Instr, Kernel, Operand, Place, Program, Step, Store};
use sparsam_ir::interpret::{self, InterpretError, Leaves, Rounding, Value, interpret};
use sparsam_ir::{Attention, AttentionPart, DType, Graph, Layout, Node, NodeId, Op, Reduction};
use std::collections::HashMap;

/// Values of the outputs by name; states in `leaves` are replaced by what the run made of them.
///
/// Results are rounded where they are stored in less than f32 and else kept in f64, so that only real differences
/// between two programs show.
pub fn run(program: &Program, leaves: &mut Leaves) -> Result<HashMap<String, Value>, InterpretError> {
    let mut memory: Vec<Vec<f64>> = Vec::new();
    for place in &program.places {
        memory.push(match place {
            // NaN shows a read of what nobody wrote.
            Place::Arena { bytes, .. } => vec![f64::NAN; *bytes],
            Place::Input { name, shape, .. }
            | Place::Weight { name, shape, .. }
            | Place::State { name, shape, .. } => match leaves.get(name) {
                Some(v) if v.shape == *shape => v.data.clone(),
                got => {
                    let got = got.map(|v| v.shape.clone());
                    return Err(InterpretError::Leaf { name: name.clone(), want: shape.clone(), got });
                }
            },
        });
    }
    for step in &program.steps {
        match &step.kernel {
            Kernel::Row(_) => row(step, &mut memory),
            kernel => other(step, kernel, &mut memory)?,
        }
    }
    for (place, data) in program.places.iter().zip(&memory) {
        if let Place::State { name, shape, .. } = place {
            leaves.insert(name.clone(), Value::new(shape, data.clone()));
        }
    }
    Ok(program.outputs.iter().map(|(name, o)| (name.clone(), get(o, &memory))).collect())
}

fn at(l: &Layout, mut i: usize) -> usize {
    let mut at = l.offset;
    for (&n, &s) in l.shape.iter().zip(&l.strides).rev() {
        at += i % n * s;
        i /= n;
    }
    at
}

fn get(o: &Operand, memory: &[Vec<f64>]) -> Value {
    let data: Vec<f64> = (0..o.layout.numel()).map(|i| memory[o.place][at(&o.layout, i)]).collect();
    Value::new(&o.layout.shape, data)
}

fn put(o: &Operand, data: &[f64], memory: &mut [Vec<f64>]) {
    for (i, &x) in data.iter().enumerate() {
        let x =
            if o.dtype == DType::F32 { x } else { interpret::round(interpret::cast(x, o.dtype), o.dtype) };
        memory[o.place][at(&o.layout, i)] = x;
    }
}

fn row(step: &Step, memory: &mut [Vec<f64>]) {
    let Some(p) = step.row() else { return };
    let (n, width) = (p.shape.iter().product::<usize>(), p.width());
    let mut vals: Vec<Vec<f64>> = Vec::new();
    for instr in &p.instrs {
        let v = |v: u32, i: usize| vals[v as usize][i];
        vals.push(match *instr {
            Instr::Load { input } => get(&step.ins[input], memory).data,
            Instr::Const(c) => vec![c as f64; n],
            Instr::Iota { axis } => {
                let inner: usize = p.shape[axis + 1..].iter().product();
                (0..n).map(|i| (i / inner % p.shape[axis]) as f64).collect()
            }
            Instr::Random { seed, stream } => {
                let seed = get(&step.ins[seed], memory).data;
                let key = [seed[0] as i32 as u32, seed[1] as i32 as u32];
                (0..n).map(|i| interpret::philox_uniform(i as u64, stream, key) as f64).collect()
            }
            Instr::Unary(u, a) => (0..n).map(|i| interpret::unary(u, v(a, i))).collect(),
            Instr::Binary(b, x, y) => (0..n).map(|i| interpret::binary(b, v(x, i), v(y, i))).collect(),
            Instr::Select(c, x, y) => {
                (0..n).map(|i| if v(c, i) != 0.0 { v(x, i) } else { v(y, i) }).collect()
            }
            Instr::Round(d, a) => (0..n).map(|i| interpret::round(v(a, i), d)).collect(),
            Instr::Reduce(op, a) => {
                let of = |r: usize| {
                    let row = &vals[a as usize][r * width..(r + 1) * width];
                    match op {
                        Reduction::Sum => row.iter().sum(),
                        Reduction::Max => row.iter().fold(f64::NEG_INFINITY, |m, &x| {
                            interpret::binary(sparsam_ir::Binary::Max, m, x)
                        }),
                    }
                };
                (0..n).map(|i| of(i / width)).collect()
            }
        });
    }
    for &(out, v, how) in &p.stores {
        let (o, data) = (&step.outs[out], &vals[v as usize]);
        match how {
            Store::Rows if o.layout.shape == p.shape => put(o, data, memory),
            Store::Rows => put(o, &data.iter().copied().step_by(width).collect::<Vec<_>>(), memory),
            Store::ColumnSum => {
                let sum = |c: usize| data[c..].iter().step_by(width).sum();
                put(o, &(0..width).map(sum).collect::<Vec<f64>>(), memory);
            }
        }
    }
}

/// Every other kernel is one op (or several of one family): it is asked what it means.
fn other(step: &Step, kernel: &Kernel, memory: &mut [Vec<f64>]) -> Result<(), InterpretError> {
    let matmul = |trans_b| Op::Matmul { trans_a: false, trans_b, precision: sparsam_ir::Precision::F32 };
    let ops: Vec<(Op, Vec<usize>)> = match kernel {
        Kernel::Row(_) => vec![],
        Kernel::Matmul { .. } => vec![(matmul(false), vec![0, 1])],
        Kernel::WeightMatmul { .. } => (1..step.ins.len()).map(|w| (matmul(true), vec![0, w])).collect(),
        Kernel::WeightMatmulT { .. } => vec![(matmul(false), vec![0, 1])],
        Kernel::WeightGather | Kernel::Gather => vec![(Op::Gather, vec![0, 1])],
        Kernel::WeightDecode | Kernel::Copy => vec![(Op::Cast(step.outs[0].dtype), vec![0])],
        Kernel::AllReduce => vec![(Op::AllReduce, vec![0])],
        Kernel::ScatterAdd { .. } => {
            vec![(Op::ScatterAdd { rows: step.outs[0].layout.shape[0] }, vec![0, 1])]
        }
        Kernel::ScatterRows => vec![(Op::ScatterRows, vec![step.ins.len(), 0, 1])],
        Kernel::Attention { scale, window, softcap, layout, parts } => {
            let op = |part: &AttentionPart| {
                Op::Attention(Attention {
                    scale: *scale,
                    window: *window,
                    softcap: *softcap,
                    layout: *layout,
                    part: *part,
                })
            };
            parts.iter().map(|part| (op(part), (0..step.ins.len()).collect())).collect()
        }
    };
    for ((op, operands), out) in ops.into_iter().zip(&step.outs) {
        let mut graph = Graph::default();
        let mut leaves = Leaves::new();
        let operand = |i: usize| step.ins.get(i).unwrap_or(out);
        let push = |graph: &mut Graph, op, inputs, shape: &[usize], dtype| {
            let at = std::panic::Location::caller();
            graph.nodes.push(Node { op, inputs, shape: shape.to_vec(), dtype, tap: None, at });
            NodeId(graph.nodes.len() as u32 - 1)
        };
        let mut inputs = Vec::new();
        for i in operands {
            let (o, name) = (operand(i), format!("x{i}"));
            leaves.insert(name.clone(), get(o, memory));
            let shape = o.layout.shape.clone();
            inputs.push(push(
                &mut graph,
                Op::Input { name, shape: shape.clone(), dtype: o.dtype },
                vec![],
                &shape,
                o.dtype,
            ));
        }
        let id = push(&mut graph, op, inputs, &out.layout.shape, out.dtype);
        graph.outputs.push(("y".into(), id));
        let result = interpret(&graph, &mut leaves, Rounding::None)?;
        let mut data = result["y"].data.clone();
        if let Kernel::Matmul { add: true, .. } | Kernel::ScatterAdd { add: true } = kernel {
            data.iter_mut().zip(get(out, memory).data).for_each(|(x, before)| *x += before);
        }
        put(out, &data, memory);
    }
    Ok(())
}
