//! Loss, every gradient and ten steps of AdamW of the tiny models, held to PyTorch's (`scripts/goldens/training.py`):
//! compiled, node by node, and compiled for little memory.

mod common;

use common::{LENGTHS, Loaded, expected, golden, open, packed_inputs};
use sparsam_formats::safetensors::File;
use sparsam_ir::{AdamW, DType, Graph, Trace, grad};
use sparsam_models::Model;
use sparsam_models::nn::Batch;
use sparsam_runtime::{CompileError, Data, Device, Error, Options, Session, Weights};
use std::sync::Arc;

const CASES: [&str; 4] = ["gpt2", "llama", "qwen3", "gemma3"];

/// As the script trains.
const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
const LR: f64 = 1e-2;

fn floats(file: &File, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap_or_else(|| panic!("the golden has no {name}"));
    tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Tokens to the loss of the next ones, with its gradients as outputs, or with an update of all parameters.
fn graph(model: &Model, update: bool) -> Graph {
    let n = LENGTHS[0] + LENGTHS[1];
    let t = Trace::new().training(|_| true);
    let targets = t.input("targets", &[n], DType::I32);
    let (loss, _) = model.trace(&t, &Batch::packed(n)).cross_entropy(&targets).mean_where(&targets);
    let parameters = t.parameters();
    let gradients = grad(&loss, &parameters.iter().map(|(_, p)| p).collect::<Vec<_>>());
    let mut outputs = vec![("loss", &loss)];
    if update {
        let rates = t.input("rates", &[3], DType::F32);
        for ((name, p), g) in parameters.iter().zip(&gradients) {
            let weight_decay = if p.rank() == 2 { ADAMW.weight_decay } else { 0.0 };
            AdamW { weight_decay, ..ADAMW }.update(name, p, g, &rates);
        }
    } else {
        outputs.extend(parameters.iter().map(|(name, _)| name.as_str()).zip(&gradients));
    }
    t.finish(&outputs).unwrap()
}

fn session(model: &Model) -> Session {
    let mut weights = Weights::new();
    for c in model.constants() {
        weights.insert_f32(&c.name, &c.shape, &c.data).unwrap();
    }
    Session::new(&Device::cpu(2).unwrap(), Arc::new(weights))
}

fn fill(session: &mut Session, loaded: &[Loaded]) {
    for w in loaded {
        let mut x = vec![0f32; w.shape.iter().product()];
        sparsam_dtype::codec::decode(w.dtype, &w.bytes, &mut x).unwrap();
        session.set_state(&w.name, bytemuck::cast_slice(&x)).unwrap();
    }
}

/// Tokens, the next ones (-1 at the end of each sequence), positions and row_start.
fn inputs(case: &str) -> [Vec<i32>; 4] {
    let tokens = expected(case).tokens;
    let (positions, row_start) = packed_inputs();
    let last = |i: usize| i + 1 == LENGTHS[0] || i + 1 == tokens.len();
    let targets = (0..tokens.len()).map(|i| if last(i) { -1 } else { tokens[i + 1] }).collect();
    [tokens, targets, positions, row_start]
}

/// Ways to run that must agree. Three rows of logits at a time: 26 rows in nine chunks. The least memory: all that can
/// be is computed again.
fn ways(graph: &Graph, session: &mut Session) -> Vec<(&'static str, Options)> {
    let least = match session.load(graph, &Options { memory: Some(0), ..Options::default() }) {
        Err(Error::Compile(CompileError::Memory { least, .. })) => least,
        other => panic!("nothing fits into 0 bytes: {:?}", other.map(|step| step.kernels())),
    };
    vec![
        ("compiled", Options::default()),
        ("eager", Options::eager()),
        ("chunks of three rows", Options { loss_rows: Some(3), ..Options::default() }),
        ("least memory", Options { memory: Some(least), ..Options::default() }),
    ]
}

/// f32 may be off by twice what PyTorch's own f32 is, and by a few roundings of the largest number.
fn close(what: &str, got: &[f32], want: &[f32], f32_error: f32) {
    let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
    let off = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let bound = 2.0 * f32_error + 1e-6 * largest;
    assert!(got.len() == want.len() && off <= bound, "{what}: off by {off:.1e}, at most {bound:.1e}");
    assert!(got.iter().all(|x| x.is_finite()), "{what}");
}

#[test]
fn loss_and_every_gradient_are_those_of_pytorch() {
    for case in CASES {
        let file = File::open(golden(case).join("training.safetensors")).unwrap();
        let (model, loaded) = open(case);
        let graph = graph(&model, false);
        let [tokens, targets, positions, row_start] = inputs(case);
        for (way, options) in ways(&graph, &mut session(&model)) {
            let mut session = session(&model);
            let step = session.load(&graph, &options).unwrap();
            fill(&mut session, &loaded);
            let inputs = [
                ("tokens", Data::I32(&tokens)),
                ("targets", Data::I32(&targets)),
                ("positions", Data::I32(&positions)),
                ("row_start", Data::I32(&row_start)),
            ];
            let got = session.run(&step, &inputs).unwrap();
            close(&format!("{case}, {way}: loss"), got.f32("loss").unwrap(), &floats(&file, "loss"), 0.0);
            for w in &loaded {
                let (want, error) = (format!("grad.{}", w.name), format!("error.{}", w.name));
                let what = format!("{case}, {way}: gradient of {}", w.name);
                close(&what, got.f32(&w.name).unwrap(), &floats(&file, &want), floats(&file, &error)[0]);
            }
        }
    }
}

#[test]
fn ten_losses_of_training_are_those_of_pytorch() {
    for case in CASES {
        let file = File::open(golden(case).join("training.safetensors")).unwrap();
        let (want, error) = (floats(&file, "losses"), floats(&file, "error")[0]);
        let (model, loaded) = open(case);
        let graph = graph(&model, true);
        let [tokens, targets, positions, row_start] = inputs(case);
        for (way, options) in ways(&graph, &mut session(&model)) {
            let mut session = session(&model);
            let step = session.load(&graph, &options).unwrap();
            fill(&mut session, &loaded);
            let mut losses = Vec::new();
            for t in 1..=want.len() as u64 {
                let rates = ADAMW.rates(LR, t);
                let inputs = [
                    ("tokens", Data::I32(&tokens)),
                    ("targets", Data::I32(&targets)),
                    ("positions", Data::I32(&positions)),
                    ("row_start", Data::I32(&row_start)),
                    ("rates", Data::F32(&rates)),
                ];
                losses.push(session.run(&step, &inputs).unwrap().f32("loss").unwrap()[0]);
            }
            assert!(losses[9] < losses[0], "{case}, {way}: {losses:?}");
            close(&format!("{case}, {way}: losses"), &losses, &want, error);
        }
    }
}
