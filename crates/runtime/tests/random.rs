//! Random graphs on every choice of instructions: compiled is as exact as eager, both against f64.

#[path = "../../compiler/tests/common/random.rs"]
mod random;

use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use random::Kinds;
use sparsam_dtype::DType;
use sparsam_ir::interpret::{Leaves, Rounding, Value, interpret, interpret_all};
use sparsam_ir::{Graph, Op};
use sparsam_runtime::{Cpu, Data, Device, Options, Session, Weights};
use std::collections::HashMap;
use std::sync::Arc;

enum Given {
    F32(Vec<f32>),
    I32(Vec<i32>),
}

fn run(
    graph: &Graph,
    leaves: &Leaves,
    device: &Device,
    options: &Options,
) -> Result<HashMap<String, Vec<f32>>, sparsam_runtime::Error> {
    let (mut weights, mut given, mut states) = (Weights::new(), Vec::new(), Vec::new());
    for n in &graph.nodes {
        let floats = |v: &Value| v.data.iter().map(|&x| x as f32).collect::<Vec<f32>>();
        match &n.op {
            Op::Weight { name, shape, .. } => weights.insert_f32(name, shape, &floats(&leaves[name]))?,
            Op::State { name, .. } => states.push((name.clone(), floats(&leaves[name]))),
            Op::Input { name, dtype: DType::I32, .. } => {
                let values = leaves[name].data.iter().map(|&x| x as i32).collect();
                given.push((name.clone(), Given::I32(values)));
            }
            Op::Input { name, .. } => given.push((name.clone(), Given::F32(floats(&leaves[name])))),
            _ => {}
        }
    }
    let mut session = Session::new(device, Arc::new(weights));
    let step = session.load(graph, options)?;
    // A leaf that nothing needs is no leaf of the program.
    for (name, values) in &states {
        if session.state_bytes(name).is_ok() {
            session.set_state(name, bytemuck::cast_slice(values))?;
        }
    }
    let needed: Vec<String> = step.inputs().map(|(name, ..)| name.to_string()).collect();
    let inputs: Vec<(&str, Data)> = given
        .iter()
        .filter(|(name, _)| needed.contains(name))
        .map(|(name, v)| match v {
            Given::F32(v) => (name.as_str(), Data::F32(v)),
            Given::I32(v) => (name.as_str(), Data::I32(v)),
        })
        .collect();
    let outputs = session.run(&step, &inputs)?;
    let mut all = HashMap::new();
    for (name, ..) in step.outputs() {
        all.insert(name.to_string(), outputs.f32(name)?.to_vec());
    }
    for (name, _) in &states {
        if let Ok(bytes) = session.state_bytes(name) {
            all.insert(format!("state {name}"), bytemuck::cast_slice(bytes).to_vec());
        }
    }
    Ok(all)
}

fn check(bytes: &[u8], kinds: Kinds, devices: &[Device]) -> Result<(), TestCaseError> {
    let Some((graph, leaves)) = random::graph(bytes, kinds) else { return Ok(()) };
    let fail = |what: String| TestCaseError::fail(format!("{what}\n{graph}"));
    let mut after = leaves.clone();
    let mut want = interpret(&graph, &mut after, Rounding::None).map_err(|e| fail(e.to_string()))?;
    for (name, value) in after.into_iter().filter(|(name, _)| name == "state") {
        want.insert(format!("state {name}"), value);
    }
    // The largest number on the way bounds what cancels.
    let all = interpret_all(&graph, &leaves, Rounding::None).map_err(|e| fail(e.to_string()))?;
    let largest =
        all.iter().flat_map(|v| &v.data).filter(|x| x.is_finite()).fold(1f64, |m, x| m.max(x.abs()));
    for device in devices {
        let run =
            |options| run(&graph, &leaves, device, &options).map_err(|e| fail(format!("{device:?}: {e}")));
        let (eager, compiled) = (run(Options::eager())?, run(Options::default())?);
        for (name, want) in &want {
            let Some((eager, compiled)) = eager.get(name).zip(compiled.get(name)) else { continue };
            let error = |got: &[f32]| {
                let pairs = got.iter().zip(&want.data);
                pairs
                    .map(|(g, w)| if g.is_nan() && w.is_nan() { 0.0 } else { (*g as f64 - w).abs() })
                    .fold(0.0, f64::max)
            };
            let (e, c) = (error(eager), error(compiled));
            // Twice the error of the plain version, and never less than a dozen roundings of the largest number.
            if eager.len() != want.data.len()
                || compiled.len() != want.data.len()
                || c > 2.0 * e + 1e-6 * largest
            {
                return Err(fail(format!("{device:?}: {name} is off by {c:.1e}, eager by {e:.1e}")));
            }
        }
    }
    Ok(())
}

fn all(cases: u32, kinds: Kinds) {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(cases);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let devices: Vec<Device> = Cpu::all().into_iter().map(|cpu| Device::cpu_with(2, cpu)).collect();
    let scripts = proptest::collection::vec(proptest::num::u8::ANY, 10..90);
    runner.run(&scripts, |bytes| check(&bytes, kinds, &devices)).unwrap();
}

#[test]
fn forward() {
    all(150, Kinds { jumps: false, gradients: false });
}

#[test]
fn gradients() {
    all(60, Kinds { jumps: false, gradients: true });
}
