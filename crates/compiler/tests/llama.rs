//! A Llama written with the trace alone: what the passes make of it, and that all of them keep its meaning.

mod common;

use common::{Config, SMALL, leaves, llama};
use sparsam_compiler::{Kernel, Options, Pass, Program, compile, reference};
use sparsam_ir::interpret::{Rounding, Value, interpret};
use std::time::Instant;

fn close(a: &Value, b: &Value, what: &str) {
    assert_eq!(a.shape, b.shape, "{what}");
    for (x, y) in a.data.iter().zip(&b.data) {
        // Constants are stored in f32, and the cache in f16 rounds differences up.
        assert!((x - y).abs() <= 1e-6 + 2e-4 * y.abs(), "{what}: {x} is not {y}");
    }
}

#[test]
fn every_pass_off_alone_gives_the_same() {
    let graph = llama(&SMALL);
    let mut truth = leaves(&graph);
    let want = interpret(&graph, &mut truth, Rounding::Stored).unwrap();
    let all = [Options::eager(), Options::default()];
    for options in all.into_iter().chain(Pass::ALL.into_iter().map(Options::without)) {
        let program = compile(&graph, &options).unwrap();
        let mut state = leaves(&graph);
        let got = reference::run(&program, &mut state).unwrap();
        for (name, value) in &want {
            close(&got[name], value, &format!("{options:?}: {name}"));
        }
        for (name, value) in &truth {
            close(&state[name], value, &format!("{options:?}: {name}"));
        }
    }
}

fn count(p: &Program, name: &str) -> usize {
    p.steps.iter().filter(|s| s.kernel.name() == name).count()
}

#[test]
fn a_layer_is_twelve_kernels() {
    let (one, two) = (llama(&Config { n_layers: 1, ..SMALL }), llama(&SMALL));
    let (one, two) =
        (compile(&one, &Options::default()).unwrap(), compile(&two, &Options::default()).unwrap());
    assert_eq!(two.steps.len() - one.steps.len(), 12, "{two}");
    // norm, rope of q, rope of k, norm with its residual, silu(gate) * up
    assert_eq!(count(&two, "row") - count(&one, "row"), 5, "{two}");
    assert_eq!(count(&two, "copy"), 0, "{two}");
    // q, k and v at once, o, gate and up at once, down
    assert_eq!(count(&two, "weight matmul") - count(&one, "weight matmul"), 4, "{two}");
    let ropes = two.steps.iter().filter(|s| s.outs.len() == 2 && matches!(s.kernel, Kernel::Row(_)));
    assert!(ropes.count() >= 4, "{two}");
}

#[test]
fn thirty_layers_compile_in_a_moment() {
    let graph = llama(&Config {
        n_tokens: 1,
        n_layers: 30,
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        intermediate: 1536,
        vocab: 49152,
        slots: 2048,
    });
    let start = Instant::now();
    let program = compile(&graph, &Options::default()).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    println!("{} nodes in {seconds:.3} s\n{}", graph.nodes.len(), program.report);
    // Measured 0.03 s alone on one core; the tests of other crates may run beside it.
    assert!(seconds < 2.0, "{} nodes in {seconds} s", graph.nodes.len());
    assert!(program.report.kernels < program.report.kernels_before / 4);
}
