//! A program as nodes: loads and constants shared, operations joined to superinstructions.

use super::code::Op;
use super::program::{Binary, Class, Instr, Program, Reduction, Unary};
use sparsam_dtype::{DType, Layout};

/// Which value goes to an output.
pub(super) struct StoreTo {
    pub output: usize,
    pub node: usize,
    pub sum: bool,
}

pub(super) struct Node {
    pub op: Op,
    pub args: [usize; 3],
    pub n_args: usize,
    pub class: Class,
    /// The input that a load reads.
    pub input: usize,
    /// Reductions on the way to it.
    pub level: usize,
    pub uses: usize,
}

impl Node {
    pub fn args(&self) -> &[usize] {
        &self.args[..self.n_args]
    }
}

/// Instructions as nodes, loads and constants shared; and the node of each instruction.
pub(super) fn translate(
    program: &Program,
    classes: &[Class],
    ins: &[(DType, &Layout)],
) -> (Vec<Node>, Vec<usize>) {
    let width = program.width();
    let mut nodes: Vec<Node> = Vec::new();
    let mut at: Vec<usize> = Vec::new(); // node of each instruction
    for (instr, &class) in program.instrs.iter().zip(classes) {
        let mut args = [0; 3];
        let mut n_args = 0;
        for v in instr.operands() {
            args[n_args] = at[v as usize];
            n_args += 1;
        }
        let mut input = usize::MAX;
        let push = |nodes: &mut Vec<Node>, op, args, n_args, class, input| {
            nodes.push(Node { op, args, n_args, class, input, level: 0, uses: 0 });
            nodes.len() - 1
        };
        let op = match *instr {
            Instr::Load { input: i } => {
                input = i;
                let (dtype, layout) = ins[i];
                Op::Load { dtype, step: layout.strides.last().copied().unwrap_or(0) }
            }
            Instr::Const(x) => Op::Const(x),
            Instr::Iota { axis } if axis + 1 == program.shape.len() => Op::IotaColumn,
            Instr::Iota { axis } => {
                let lead = &program.shape[..program.shape.len() - 1];
                Op::IotaRow { div: lead[axis + 1..].iter().product(), n: lead[axis] }
            }
            Instr::Random { seed, stream } => Op::Random { seed, stream, step: ins[seed].1.strides[0] },
            Instr::Round(dtype, _) => Op::Round(dtype),
            Instr::Unary(u, _) => match u {
                Unary::Neg => Op::Neg,
                Unary::Abs => Op::Abs,
                Unary::Recip => Op::Recip,
                Unary::Sqrt => Op::Sqrt,
                Unary::Exp => Op::Exp,
                Unary::Log => Op::Log,
                Unary::Sin => Op::Sin,
                Unary::Cos => Op::Cos,
                Unary::Tanh => Op::Tanh,
                Unary::Erf => Op::Erf,
                Unary::Floor => Op::Floor,
            },
            // One number divides a whole row: its reciprocal is taken once (a rounding more; a division costs as
            // much as ten products).
            Instr::Binary(Binary::Div, ..) if class == Class::Wide && nodes[args[1]].class != Class::Wide => {
                let (below, of) = (args[1], nodes[args[1]].class);
                let known = nodes.iter().position(|n| n.op == Op::Recip && n.args[0] == below);
                args[1] =
                    known.unwrap_or_else(|| push(&mut nodes, Op::Recip, [below, 0, 0], 1, of, usize::MAX));
                Op::Mul
            }
            Instr::Binary(b, ..) => match b {
                Binary::Add => Op::Add,
                Binary::Sub => Op::Sub,
                Binary::Mul => Op::Mul,
                Binary::Div => Op::Div,
                Binary::Max => Op::Max,
                Binary::Min => Op::Min,
                Binary::Less => Op::Less,
                Binary::Equal => Op::Equal,
            },
            Instr::Select(..) => Op::Select,
            // Over a value that all columns share: its multiple, or itself.
            Instr::Reduce(r, _) if width == 0 => {
                n_args = 0;
                Op::Const(if r == Reduction::Sum { 0.0 } else { f32::NEG_INFINITY })
            }
            Instr::Reduce(r, _) if nodes[args[0]].class != Class::Wide => {
                if r == Reduction::Max {
                    at.push(args[0]);
                    continue;
                }
                args[1] = push(&mut nodes, Op::Const(width as f32), [0; 3], 0, Class::Uniform, usize::MAX);
                n_args = 2;
                Op::Mul
            }
            Instr::Reduce(Reduction::Sum, _) => Op::RowSum,
            Instr::Reduce(Reduction::Max, _) => Op::RowMax,
        };
        // Reductions that became constants leave less to compute per row than the program's classes say.
        let class = match op {
            Op::Const(_) => Class::Uniform,
            op if n_args == 0 || op.is_reduction() => class,
            _ => args[..n_args].iter().map(|&a| nodes[a].class).max().unwrap_or(class),
        };
        let shared = match op {
            Op::Load { .. } => nodes.iter().position(|n| matches!(n.op, Op::Load { .. }) && n.input == input),
            Op::Const(x) => {
                nodes.iter().position(|n| matches!(n.op, Op::Const(y) if y.to_bits() == x.to_bits()))
            }
            _ => None,
        };
        at.push(match shared {
            Some(n) => n,
            None => push(&mut nodes, op, args, n_args, class, input),
        });
    }
    (nodes, at)
}

/// Counts the uses of what the stores need; the rest has none. Levels too.
pub(super) fn count_uses(nodes: &mut [Node], stores: &[StoreTo]) {
    nodes.iter_mut().for_each(|n| n.uses = 0);
    stores.iter().for_each(|s| nodes[s.node].uses += 1);
    for i in (0..nodes.len()).rev() {
        if nodes[i].uses > 0 {
            let (args, n) = (nodes[i].args, nodes[i].n_args);
            args[..n].iter().for_each(|&a| nodes[a].uses += 1);
        }
    }
    for i in 0..nodes.len() {
        let below = nodes[i].args().iter().map(|&a| nodes[a].level).max().unwrap_or(0);
        nodes[i].level = below + nodes[i].op.is_reduction() as usize;
    }
}

/// Superinstructions, from the leaves up. Those that round less often than their parts (fma) keep the meaning
/// within its tolerance; the others are the same operations in one pass.
pub(super) fn fuse(nodes: &mut [Node]) {
    for i in 0..nodes.len() {
        while nodes[i].uses > 0 && fuse_one(nodes, i) {}
    }
}

/// One rewrite of node `i`, if there is one.
fn fuse_one(nodes: &mut [Node], i: usize) -> bool {
    let (op, args, class) = (nodes[i].op, nodes[i].args, nodes[i].class);
    // An argument that may vanish into node `i`: of its class, with no other use.
    let inner = |a: usize, want: Op| nodes[a].op == want && nodes[a].uses == 1 && nodes[a].class == class;
    let one = |a: usize| nodes[a].op == Op::Const(1.0);
    // x of 1 + e^-x
    let denominator = |a: usize| {
        let [p, q, _] = nodes[a].args;
        if nodes[a].op != Op::Add || nodes[a].uses != 1 {
            return None;
        }
        let e = if one(q) {
            p
        } else if one(p) {
            q
        } else {
            return None;
        };
        let minus = nodes[e].args[0];
        let found = nodes[e].op == Op::Exp
            && nodes[e].uses == 1
            && nodes[minus].op == Op::Neg
            && nodes[minus].uses == 1;
        found.then(|| nodes[minus].args[0])
    };
    // x and c of sqrt(x) + c
    let root_and_number = |sum: usize| {
        let [p, q, _] = nodes[sum].args;
        let (root, c) = if nodes[p].op == Op::Sqrt { (p, q) } else { (q, p) };
        let found = inner(root, Op::Sqrt) && nodes[c].class < class;
        found.then(|| (nodes[root].args[0], c))
    };
    let [a, b, _] = args;
    let (new, new_args): (Op, Vec<usize>) = match op {
        Op::Recip => match denominator(a) {
            Some(x) => (Op::Sigmoid, vec![x]),
            None => return false,
        },
        Op::Div if one(a) => (Op::Recip, vec![b]),
        Op::Div if inner(b, Op::Add) && nodes[a].class == class => match root_and_number(b) {
            Some((x, c)) => (Op::DivRoot, vec![a, x, c]),
            None if denominator(b) == Some(a) => (Op::Silu, vec![a]),
            None => return false,
        },
        Op::Exp if inner(a, Op::Sub) => (Op::ExpSub, nodes[a].args().to_vec()),
        Op::Mul if inner(b, Op::Sigmoid) && nodes[b].args[0] == a => (Op::Silu, vec![a]),
        Op::Mul if inner(a, Op::Sigmoid) && nodes[a].args[0] == b => (Op::Silu, vec![b]),
        Op::Mul if inner(a, Op::Silu) => (Op::SiluMul, vec![nodes[a].args[0], b]),
        Op::Mul if inner(b, Op::Silu) => (Op::SiluMul, vec![nodes[b].args[0], a]),
        Op::Mul if inner(a, Op::Mul) && a != b => (Op::Mul3, vec![nodes[a].args[0], nodes[a].args[1], b]),
        Op::Mul if inner(b, Op::Mul) && a != b => (Op::Mul3, vec![nodes[b].args[0], nodes[b].args[1], a]),
        Op::Add if inner(b, Op::Neg) => (Op::Sub, vec![a, nodes[b].args[0]]),
        Op::Add if inner(a, Op::Neg) => (Op::Sub, vec![b, nodes[a].args[0]]),
        Op::Add if inner(a, Op::Mul) && a != b => (Op::Fma, vec![nodes[a].args[0], nodes[a].args[1], b]),
        Op::Add if inner(b, Op::Mul) && a != b => (Op::Fma, vec![nodes[b].args[0], nodes[b].args[1], a]),
        Op::Sub if inner(a, Op::Mul) && a != b => (Op::Fms, vec![nodes[a].args[0], nodes[a].args[1], b]),
        Op::Sub if inner(b, Op::Mul) && a != b => (Op::Fnma, vec![nodes[b].args[0], nodes[b].args[1], a]),
        Op::RowSum if nodes[a].op == Op::Mul && nodes[a].uses == 1 => (Op::RowDot, nodes[a].args().to_vec()),
        _ => return false,
    };
    new_args.iter().for_each(|&a| nodes[a].uses += 1);
    // What vanished reads no more.
    let mut gone: Vec<usize> = args[..nodes[i].n_args].to_vec();
    while let Some(g) = gone.pop() {
        nodes[g].uses -= 1;
        if nodes[g].uses == 0 {
            gone.extend_from_slice(nodes[g].args());
        }
    }
    let node = &mut nodes[i];
    node.op = new;
    node.n_args = new_args.len();
    node.args = [0; 3];
    node.args[..new_args.len()].copy_from_slice(&new_args);
    // The product's first factor is a vector, and so is the dot product's.
    let wide_first = matches!(new, Op::Fma | Op::Fms | Op::Fnma | Op::Mul3 | Op::RowDot);
    let args = node.args;
    if wide_first && nodes[args[0]].class < nodes[args[1]].class {
        nodes[i].args.swap(0, 1);
    }
    true
}
