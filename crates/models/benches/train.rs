//! One AdamW step of GPT-2 124M (Radford et al. 2019) with made-up weights and tokens: the yardstick of training.
//!
//! `cargo bench -p sparsam-models --bench train -- [--tokens 1024] [--seq 512] [--bf16] [--eager] [--layers 12]
//! [--steps 3] [--clip] [--memory MB] [--threads N] [--explain] [--program] [--top N]` prints how long compiling took
//! (and what it did), tokens a second of the best and the median step, memory, where the time goes by kind of kernel,
//! and with `--top N` the rate of each product within the step and the N slowest other kernels.

use sparsam_ir::{AdamW, DType, Graph, Precision, Trace, grad};

use sparsam_models::nn::Batch;
use sparsam_models::{Config, Heads, Model, gpt2};
use sparsam_runtime::{Data, Device, Kernel, Options, Session, Weights};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

struct Args(Vec<String>);

impl Args {
    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|a| a == name)
    }

    fn number(&self, name: &str, default: usize) -> usize {
        let at = self.0.iter().position(|a| a == name);
        at.and_then(|i| self.0.get(i + 1)).and_then(|v| v.parse().ok()).unwrap_or(default)
    }
}

fn model(layers: usize) -> Model {
    Model::new(Config::Gpt2(gpt2::Config {
        vocab_size: 50257,
        hidden_size: 768,
        intermediate_size: 3072,
        n_layers: layers,
        heads: Heads { n_heads: 12, n_kv_heads: 12, head_dim: 64 },
        layer_norm_eps: 1e-5,
        context_length: 1024,
        tied_head: true,
    }))
}

/// Loss, gradients and update; with `clip` by the norm of all gradients.
fn step(model: &Model, batch: &Batch, clip: bool) -> Graph {
    let t = Trace::new().training(|_| true);
    let targets = t.input("targets", &[batch.n_tokens], DType::I32);
    let (loss, _) = model.trace(&t, batch).cross_entropy(&targets).mean_where(&targets);
    let parameters = t.parameters();
    let mut gradients = grad(&loss, &parameters.iter().map(|(_, p)| p).collect::<Vec<_>>());
    if clip {
        let squares = gradients.iter().map(|g| (g * g).reshape(&[g.shape().iter().product()]).sum(&[0]));
        let norm = squares.reduce(|a, b| a + b).expect("a model has parameters").sqrt();
        let scale = norm.add_scalar(1e-6).recip().minimum(&t.full(&[1], 1.0));
        gradients = gradients.iter().map(|g| g * &scale.reshape(&vec![1; g.rank()])).collect();
    }
    let rates = t.input("rates", &[3], DType::F32);
    for ((name, parameter), gradient) in parameters.iter().zip(&gradients) {
        let weight_decay = if parameter.rank() == 2 { 0.1 } else { 0.0 };
        AdamW { weight_decay, ..AdamW::default() }.update(name, parameter, gradient, &rates);
    }
    t.finish(&[("loss", &loss)]).unwrap()
}

/// Matrices from a bell curve of width 0.02 (a sum of four uniform numbers), norms 1, biases 0.
fn fill(session: &mut Session, parameters: &[sparsam_models::Parameter]) {
    let mut seed = 1u64;
    let mut uniform = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    for p in parameters {
        let n = p.shape.iter().product();
        let values: Vec<f32> = match (p.shape.len(), p.name.ends_with("weight")) {
            (2, _) => (0..n).map(|_| (uniform() + uniform() + uniform() + uniform()) * 0.0346).collect(),
            (_, weight) => vec![f32::from(u8::from(weight)); n],
        };
        session.set_state(&p.name, bytemuck::cast_slice(&values)).unwrap();
    }
}

/// Most memory that this process has held, in bytes; `None` where the system does not say.
fn peak_resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM"))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kib| kib << 10)
}

/// Time of products by shape with their rates, and the slowest row programs.
fn details(step: &sparsam_runtime::Step, profile: &sparsam_runtime::Profile, rows: usize) {
    let runs = profile.runs as f64;
    let mut products: BTreeMap<String, (usize, f64, f64)> = BTreeMap::new();
    let mut others = Vec::new();
    for (s, time) in step.program().steps.iter().zip(&profile.steps) {
        let seconds = time.as_secs_f64() / runs;
        let Kernel::Matmul { add, .. } = s.kernel else {
            others.push((seconds, s));
            continue;
        };
        let (a, b) = (&s.ins[0].layout, &s.ins[1].layout);
        let turned = |l: &sparsam_ir::Layout| if l.strides.last() == Some(&1) { "" } else { "^T" };
        let shape = format!(
            "{:?}{} x {:?}{}{}",
            a.shape,
            turned(a),
            b.shape,
            turned(b),
            if add { " added" } else { "" }
        );
        let entry = products.entry(shape).or_default();
        entry.0 += 1;
        entry.1 += seconds;
        entry.2 += 2e-9 * (a.numel() * b.shape[b.shape.len() - 1]) as f64;
    }
    println!("\n{:<48} {:>5} {:>10} {:>9}", "products", "calls", "ms", "GFLOP/s");
    for (shape, (calls, seconds, gflop)) in &products {
        println!("{shape:<48} {calls:>5} {:>10.2} {:>9.1}", seconds * 1e3, gflop / seconds);
    }
    let total = products.values().fold((0.0, 0.0), |t, p| (t.0 + p.1, t.1 + p.2));
    println!("{:<48} {:>5} {:>10.2} {:>9.1}", "all", "", total.0 * 1e3, total.1 / total.0);
    others.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (seconds, s) in others.iter().take(rows) {
        let bytes = s.bytes() as f64;
        println!("\n{:.3} ms, {:.1} MB, {:.1} GB/s: {s}", seconds * 1e3, bytes / 1e6, bytes / 1e9 / seconds);
    }
}

fn main() {
    let args = Args(std::env::args().collect());
    let (n, seq) = (args.number("--tokens", 1024), args.number("--seq", 512));
    let precision = if args.has("--bf16") { Precision::Bf16 } else { Precision::F32 };
    let model = model(args.number("--layers", 12));
    let parameters = model.parameters().unwrap();
    let graph = step(&model, &Batch::packed(n), args.has("--clip"));
    let device = Device::cpu(args.number("--threads", 0)).unwrap();
    println!("{device:?}; {n} tokens in sequences of {seq}, {precision:?}, eager: {}", args.has("--eager"));

    let mut session = Session::new(&device, Arc::new(Weights::new()));
    let start = Instant::now();
    let options = Options {
        eager: args.has("--eager"),
        precision: Some(precision),
        memory: args.has("--memory").then(|| args.number("--memory", 0) * 1_000_000),
        ..Options::default()
    };
    let step = session.load(&graph, &options).unwrap();
    println!("{} nodes, compiled and loaded in {:.2} s", graph.nodes.len(), start.elapsed().as_secs_f64());
    if args.has("--explain") {
        println!("{}", step.report());
    }
    if args.has("--program") {
        println!("{}", step.program());
    }
    fill(&mut session, &parameters);
    let tokens: Vec<i32> = (0..n).map(|i| (i * 7919 % 50257) as i32).collect();
    let targets: Vec<i32> = (0..n).map(|i| ((i + 1) * 7919 % 50257) as i32).collect();
    let positions: Vec<i32> = (0..n).map(|i| (i % seq) as i32).collect();
    let row_start: Vec<i32> = (0..n).map(|i| (i / seq * seq) as i32).collect();
    let run = |session: &mut Session, t: u64| {
        let rates = AdamW::default().rates(3e-4, t);
        let inputs = [
            ("tokens", Data::I32(&tokens)),
            ("targets", Data::I32(&targets)),
            ("positions", Data::I32(&positions)),
            ("row_start", Data::I32(&row_start)),
            ("rates", Data::F32(&rates)),
        ];
        let start = Instant::now();
        let loss = session.run(&step, &inputs).unwrap().f32("loss").unwrap()[0];
        (start.elapsed().as_secs_f64(), loss)
    };
    let (first, loss) = run(&mut session, 1);
    println!("first step {first:.2} s, loss {loss:.5}");
    let steps = args.number("--steps", 3) as u64;
    session.set_profiling(true);
    let mut times: Vec<f64> = Vec::new();
    let mut last = loss;
    for t in 0..steps {
        let (time, loss) = run(&mut session, 2 + t);
        times.push(time);
        last = loss;
    }
    times.sort_by(f64::total_cmp);
    if let (Some(best), Some(median)) = (times.first(), times.get(times.len() / 2)) {
        println!(
            "best step {best:.3} s, {:.1} tokens a second; median {median:.3} s, {:.1}; loss {last:.5}",
            n as f64 / best,
            n as f64 / median
        );
        let profile = session.profile().unwrap();
        print!("{profile}");
        if args.has("--top") {
            details(&step, profile, args.number("--top", 0));
        }
    }
    let (arena, states) = (session.arena_bytes(), session.states_bytes());
    println!(
        "arena {:.3} GB, states {:.3} GB, together {:.3} GB; peak resident {:.3} GB",
        arena as f64 / 1e9,
        states as f64 / 1e9,
        (arena + states) as f64 / 1e9,
        peak_resident().unwrap_or(0) as f64 / 1e9
    );
}
