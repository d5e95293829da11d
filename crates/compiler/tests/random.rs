//! Random graphs, forward and with gradients, mean the same compiled, eager, with each pass off, and in little memory.

#[path = "common/random.rs"]
mod random;

use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use random::Kinds;
use sparsam_compiler::{Error, Options, Pass, compile, reference};
use sparsam_ir::interpret::{Rounding, interpret};

/// Everything in f64, but constants that a pass folds are rounded to f32: a wrong program differs by more.
fn check(bytes: &[u8], kinds: Kinds) -> Result<(), TestCaseError> {
    let Some((graph, leaves)) = random::graph(bytes, kinds) else { return Ok(()) };
    let fail = |what: String| TestCaseError::fail(format!("{what}\n{graph}"));
    let mut after = leaves.clone();
    let want = interpret(&graph, &mut after, Rounding::None).map_err(|e| fail(e.to_string()))?;
    let mut ways = vec![Options::eager(), Options::default()];
    ways.extend(Pass::ALL.map(Options::without));
    // All that can be computed again is.
    if let Err(Error::Memory { least, .. }) =
        compile(&graph, &Options { memory: Some(0), ..Options::default() })
    {
        ways.push(Options { memory: Some(least), ..Options::default() });
    }
    for options in ways {
        let program = compile(&graph, &options).map_err(|e| fail(format!("{options:?}: {e}")))?;
        let mut state = leaves.clone();
        let got = reference::run(&program, &mut state).map_err(|e| fail(format!("{options:?}: {e}")))?;
        let results = want.iter().map(|(name, w)| (name, w, &got[name]));
        for (name, want, got) in results.chain(after.iter().map(|(name, w)| (name, w, &state[name]))) {
            let size = want.data.iter().filter(|x| x.is_finite()).fold(1f64, |m, x| m.max(x.abs()));
            let same =
                |(a, b): (&f64, &f64)| a == b || (a - b).abs() <= 1e-6 * size || (a.is_nan() && b.is_nan());
            if want.shape != got.shape || !want.data.iter().zip(&got.data).all(same) {
                return Err(fail(format!("{options:?}: {name}: {got:?} is not {want:?}")));
            }
        }
    }
    Ok(())
}

fn run(cases: u32, kinds: Kinds) {
    // More of them on demand, as proptest itself has it.
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(cases);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let scripts = proptest::collection::vec(proptest::num::u8::ANY, 10..90);
    runner.run(&scripts, |bytes| check(&bytes, kinds)).unwrap();
}

#[test]
fn forward() {
    run(200, Kinds { jumps: true, gradients: false });
}

#[test]
fn gradients() {
    run(100, Kinds { jumps: false, gradients: true });
}
