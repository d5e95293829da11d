//! What the tests of all passes share: run a pass, hold it to the interpreter, show the text.

use crate::program::Program;
use crate::{check, lower, reference};
use sparsam_ir::interpret::{Leaves, Rounding, Value, interpret};
use sparsam_ir::{DType, Graph, Op, Tensor, Trace, grad, verify};

/// The graph of a function of a trace, its result named `y`.
pub(crate) fn graph(f: impl Fn(&Trace) -> Tensor) -> Graph {
    let t = Trace::new();
    let y = f(&t);
    t.finish(&[("y", &y)]).unwrap()
}

/// Three layers over the input `x` in a trace under training: the loss, the layers' weights by name, their gradients.
pub(crate) fn three_layers(t: &Trace) -> (Tensor, Vec<(String, Tensor)>, Vec<Tensor>) {
    let mut x = t.input("x", &[2, 8], DType::F32);
    for layer in ["a", "b", "c"] {
        x = x.matmul(&t.weight(layer, &[8, 8])).tanh();
    }
    let loss = x.sum(&[0, 1]);
    let parameters = t.parameters();
    let gradients = grad(&loss, &parameters.iter().map(|(_, p)| p).collect::<Vec<_>>());
    (loss, parameters, gradients)
}

fn leaves(graph: &Graph) -> Leaves {
    let mut leaves = Leaves::new();
    for (seed, n) in graph.nodes.iter().enumerate() {
        if let Op::Input { name, .. } | Op::Weight { name, .. } | Op::State { name, .. } = &n.op {
            let value = |i: usize| match n.dtype {
                DType::I32 => (i % 2) as f64,
                _ => ((i * 7 + seed * 3) % 11) as f64 / 4.0 - 1.0,
            };
            leaves.insert(name.clone(), Value::new(&n.shape, (0..n.numel()).map(value).collect::<Vec<_>>()));
        }
    }
    leaves
}

fn same(a: &Value, b: &Value) {
    assert_eq!(a.shape, b.shape);
    for (x, y) in a.data.iter().zip(&b.data) {
        assert!((x - y).abs() <= 1e-6 * y.abs().max(1.0), "{x} is not {y}");
    }
}

/// The text of what `pass` makes of `graph`, which means the same.
pub(crate) fn on_graph(pass: impl Fn(&Graph) -> Graph, graph: &Graph) -> String {
    let new = pass(graph);
    verify(&new).unwrap();
    let (mut a, mut b) = (leaves(graph), leaves(graph));
    let want = interpret(graph, &mut a, Rounding::None).unwrap();
    let got = interpret(&new, &mut b, Rounding::None).unwrap();
    want.iter().for_each(|(name, w)| same(&got[name], w));
    a.iter().for_each(|(name, w)| same(&b[name], w));
    new.to_string()
}

/// What `graph` becomes under `passes`, one after the other, each holding on to its meaning.
pub(crate) fn on_program(passes: &[fn(&mut Program)], graph: &Graph) -> Program {
    let mut program = lower::lower(graph, None).unwrap();
    let mut a = leaves(graph);
    let want = interpret(graph, &mut a, Rounding::None).unwrap();
    for pass in passes {
        pass(&mut program);
        check::check(&program, false).unwrap();
        let mut b = leaves(graph);
        let got = reference::run(&program, &mut b).unwrap();
        want.iter().for_each(|(name, w)| same(&got[name], w));
        a.iter().for_each(|(name, w)| same(&b[name], w));
    }
    program
}

/// What `graph` compiles to, which means the same.
pub(crate) fn same_as_interpreted(graph: &Graph, options: &crate::Options) -> Program {
    let program = super::compile(graph, options).unwrap();
    let (mut a, mut b) = (leaves(graph), leaves(graph));
    let want = interpret(graph, &mut a, Rounding::None).unwrap();
    let got = reference::run(&program, &mut b).unwrap();
    want.iter().for_each(|(name, w)| same(&got[name], w));
    a.iter().for_each(|(name, w)| same(&b[name], w));
    program
}

/// The steps of a program, one kernel a line or more.
pub(crate) fn steps(p: &Program) -> String {
    p.steps.iter().map(|s| format!("{s}\n")).collect()
}

/// What stands in the header of a pass after the `n`th ```` ```text ````.
pub(crate) fn header(source: &str, n: usize) -> String {
    let block = source.split("```text\n").nth(n + 1).expect("the header shows a text");
    let lines = block.lines().take_while(|l| !l.contains("```"));
    lines.map(|l| format!("{}\n", l.trim_start_matches("//!").strip_prefix(' ').unwrap_or(""))).collect()
}
