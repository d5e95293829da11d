//! A small Llama on every choice of instructions: eager and compiled against the interpreter, prompts against
//! decoding, time a step.

#[path = "../../compiler/tests/common/mod.rs"]
mod common;

use common::{Config, SMALL, leaves, llama};
use sparsam_dtype::{DType, f16};
use sparsam_ir::interpret::{Leaves, Rounding, Value, interpret};
use sparsam_ir::{Graph, Op};
use sparsam_runtime::{Cpu, Data, Device, Options, Pass, Session, Weights};
use std::sync::Arc;

/// All weights of `graph`, from `leaves`.
fn weights(graph: &Graph, leaves: &Leaves) -> Arc<Weights> {
    let mut weights = Weights::new();
    for node in &graph.nodes {
        if let Op::Weight { name, shape, .. } = &node.op {
            let values: Vec<f32> = leaves[name].data.iter().map(|&x| x as f32).collect();
            weights.insert_f32(name, shape, &values).unwrap();
        }
    }
    Arc::new(weights)
}

/// All inputs of `graph`, which are I32.
fn inputs(graph: &Graph, leaves: &Leaves) -> Vec<(String, Vec<i32>)> {
    let inputs = graph.nodes.iter().filter_map(|n| match &n.op {
        Op::Input { name, .. } => Some((name.clone(), leaves[name].data.iter().map(|&x| x as i32).collect())),
        _ => None,
    });
    inputs.collect()
}

fn data(inputs: &[(String, Vec<i32>)]) -> Vec<(&str, Data<'_>)> {
    inputs.iter().map(|(name, v)| (name.as_str(), Data::I32(v))).collect()
}

fn error(got: &[f32], want: &Value) -> f64 {
    assert_eq!(got.len(), want.data.len());
    let size = want.data.iter().fold(0f64, |m, x| m.max(x.abs()));
    got.iter().zip(&want.data).map(|(g, w)| (*g as f64 - w).abs()).fold(0.0, f64::max) / size
}

#[test]
fn all_instructions_and_passes_agree_with_the_interpreter() {
    let graph = llama(&SMALL);
    let mut truth = leaves(&graph);
    let weights = weights(&graph, &truth);
    let inputs = inputs(&graph, &truth);
    let want = interpret(&graph, &mut truth, Rounding::Stored).unwrap();
    let every = [Options::eager(), Options::default()].into_iter().chain(Pass::ALL.map(Options::without));
    for (options, cpu) in every.flat_map(|o| Cpu::all().into_iter().map(move |c| (o.clone(), c))) {
        let mut session = Session::new(&Device::cpu_with(2, cpu), weights.clone());
        let step = session.load(&graph, &options).unwrap();
        for run in 0..2 {
            // Twice: the same tokens go into the same slots.
            let outputs = session.run(&step, &data(&inputs)).unwrap();
            for (name, value) in &want {
                let e = error(outputs.f32(name).unwrap(), value);
                // The cache in f16 turns an f32 difference of 1 part in 1e7 into one of 5e-4 now and then.
                assert!(e < 1e-3, "{options:?} {cpu} run {run}: {name} is off by {e:.1e}");
            }
        }
        for (name, shape, dtype) in session.states() {
            assert_eq!(dtype, DType::F16);
            let got: &[f16] = bytemuck::cast_slice(session.state_bytes(name).unwrap());
            let got: Vec<f32> = got.iter().map(|x| x.to_f32()).collect();
            assert_eq!(truth[name].shape, shape);
            let e = error(&got, &truth[name]);
            assert!(e < 1e-3, "{options:?} {cpu}: {name} is off by {e:.1e}");
        }
    }
}

#[test]
fn decoding_gives_the_last_row_of_the_prompt() {
    let whole = llama(&SMALL);
    let one = llama(&Config { n_tokens: 1, ..SMALL });
    let values = leaves(&whole);
    let weights = weights(&whole, &values);
    let inputs = inputs(&whole, &values);
    let device = Device::cpu_with(2, Cpu::detect());
    let mut session = Session::new(&device, weights);
    let (prompt, decode) = (session.compile(&whole).unwrap(), session.compile(&one).unwrap());
    let want = session.run(&prompt, &data(&inputs)).unwrap().f32("logits").unwrap().to_vec();
    session.states().map(|(name, ..)| name.to_string()).collect::<Vec<_>>().iter().for_each(|name| {
        let zeros = vec![0; session.state_bytes(name).unwrap().len()];
        session.set_state(name, &zeros).unwrap();
    });
    let mut got = Vec::new();
    for i in 0..SMALL.n_tokens {
        let row = |(name, v): &(String, Vec<i32>)| {
            let v = if name == "page_table" { v.clone() } else { vec![v[i]] };
            (name.clone(), v)
        };
        let inputs: Vec<_> = inputs.iter().map(row).collect();
        got.extend_from_slice(session.run(&decode, &data(&inputs)).unwrap().f32("logits").unwrap());
    }
    // A row's result does not depend on the other rows of the call, to the bit.
    assert_eq!(got, want);
}

#[test]
fn what_is_wrong_is_said() {
    let graph = llama(&SMALL);
    let values = leaves(&graph);
    let weights = weights(&graph, &values);
    let given = inputs(&graph, &values);
    let device = Device::cpu_with(1, Cpu::SCALAR);
    let mut session = Session::new(&device, weights.clone());
    let step = session.compile(&graph).unwrap();
    let mut fails = |inputs: &[(&str, Data)], why: &str| {
        let e = session.run(&step, inputs).err().expect(why).to_string();
        assert!(e.contains(why), "{e}");
    };
    let all = data(&given);
    fails(&all[1..], "it was not given");
    fails(&[&all[..], &[("temperature", Data::F32(&[1.0]))]].concat(), "no input \"temperature\"");
    let with =
        |name: &str, d| all.iter().map(|&(n, old)| (n, if n == name { d } else { old })).collect::<Vec<_>>();
    fails(&with("tokens", Data::I32(&[1, 2])), "got 2 numbers of type I32");
    fails(&with("tokens", Data::F32(&[1.0, 2.0, 3.0])), "of type F32");
    fails(&with("tokens", Data::I32(&[1, 2, 17])), "weight gather");
    fails(&with("slots", Data::I32(&[0, 1, 8])), "scatter rows");
    let other = Session::new(&device, weights).run(&step, &all).err().unwrap().to_string();
    assert!(other.contains("another session"), "{other}");
    let mut empty = Session::new(&device, Arc::new(Weights::new()));
    let e = empty.compile(&graph).err().unwrap().to_string();
    assert!(e.contains("weight \"embed\"") && e.contains("none of that name"), "{e}");
    assert!(session.run(&step, &all).unwrap().f32("x").unwrap_err().to_string().contains("logits"));
}
