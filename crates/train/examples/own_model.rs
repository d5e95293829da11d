//! A model of one's own: written as a function, trained node by node, then compiled by one line more.
//!
//! ```text
//! cargo run --release -p sparsam-train --example own_model
//! ```
//!
//! Two spirals of points wind around each other; a small network learns which one a point belongs to. The function
//! [`model`] is all that there is of the model: calling it records a graph, from which gradients and optimiser follow.

use sparsam_ir::{DType, Precision, Tensor, Trace};
use sparsam_runtime::{Data, Device, Session, Step, Weights};
use sparsam_train::optim::{Optimiser, RATES};
use sparsam_train::step::{self, LOSS};
use std::sync::Arc;
use std::time::Instant;

/// Points in a batch.
const N: usize = 512;
/// Channels of the hidden layers.
const WIDTH: usize = 64;
const LEARNING_RATE: f64 = 3e-3;

/// Points (N, 2) to logits (N, 2): three layers with a norm and a gate before each but the first.
fn model(points: &Tensor) -> Tensor {
    let mut x = linear(points, "first", WIDTH); // (N, WIDTH)
    for layer in ["second", "third"] {
        let centred = &x - x.mean();
        let normed = &centred * (&centred * &centred).mean().add_scalar(1e-5).sqrt().recip();
        x = x + linear(&normed, layer, WIDTH).silu();
    }
    linear(&x, "head", 2) // (N, 2)
}

/// `x W^T + b`: x (N, n_in) to (N, n_out). Weights are named; a name asked for twice is one weight.
fn linear(x: &Tensor, name: &str, n_out: usize) -> Tensor {
    let t = x.trace();
    let weight = t.weight(&format!("{name}.weight"), &[n_out, x.dim(1)]);
    let bias = t.weight(&format!("{name}.bias"), &[n_out]);
    x.matmul_with(&weight, false, true, Precision::F32) + bias
}

/// Mean cross-entropy of the model over a batch.
fn loss(t: &Trace) -> Tensor {
    let points = t.input("points", &[N, 2], DType::F32);
    let spiral = t.input("spiral", &[N], DType::I32);
    model(&points).cross_entropy(&spiral).mean_where(&spiral).0
}

/// What training gave.
struct Trained {
    /// After each step.
    losses: Vec<f32>,
    /// Of a step, on average.
    seconds: f64,
}

/// Trains from the same random weights and the same points, whichever way the step was loaded.
fn train(session: &mut Session, step: &Step, n_steps: u64) -> Result<Trained, sparsam_runtime::Error> {
    initialise(session)?;
    let (points, spiral) = spirals();
    let optimiser = Optimiser::default();
    let mut losses = Vec::new();
    let start = Instant::now();
    for t in 1..=n_steps {
        let rates = optimiser.adamw.rates(LEARNING_RATE, t);
        let inputs =
            [("points", Data::F32(&points)), ("spiral", Data::I32(&spiral)), (RATES, Data::F32(&rates))];
        losses.push(session.run(step, &inputs)?.f32(LOSS)?[0]);
    }
    Ok(Trained { losses, seconds: start.elapsed().as_secs_f64() / n_steps as f64 })
}

/// Trains node by node, then compiled, on `threads` (0: all cores).
fn run(n_steps: u64, threads: usize) -> Result<[Trained; 2], Box<dyn std::error::Error>> {
    let graph = step::update(step::training(), loss, &Optimiser::default())?;
    let mut session = Session::new(&Device::cpu(threads)?, Arc::new(Weights::new()));

    let eager = session.eager(&graph)?;
    let plain = train(&mut session, &eager, n_steps)?;

    let compiled = session.compile(&graph)?; // the one line
    let fast = train(&mut session, &compiled, n_steps)?;

    println!("{}", compiled.report());
    for (name, t) in [("eager", &plain), ("compiled", &fast)] {
        println!(
            "{name:<9} {:.3} ms a step, loss {:.4} -> {:.4}",
            1e3 * t.seconds,
            t.losses[0],
            t.losses[t.losses.len() - 1]
        );
    }
    println!("{:.2} times as fast by one line more", plain.seconds / fast.seconds);
    Ok([plain, fast])
}

/// Small random weights, everything else 0.
fn initialise(session: &mut Session) -> Result<(), sparsam_runtime::Error> {
    let mut states: Vec<(String, usize)> =
        session.states().map(|(name, shape, _)| (name.to_string(), shape.iter().product())).collect();
    states.sort();
    let mut random = Lcg(7);
    for (name, n) in states {
        let is_weight = name.ends_with(".weight") && !name.starts_with("adamw.");
        let scale = if name.starts_with("first") { 1.0 } else { (WIDTH as f32).powf(-0.5) };
        let values: Vec<f32> =
            (0..n).map(|_| if is_weight { scale * (2.0 * random.next() - 1.0) } else { 0.0 }).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        session.set_state(&name, &bytes)?;
    }
    Ok(())
}

/// Points of both spirals, and which one each belongs to.
fn spirals() -> (Vec<f32>, Vec<i32>) {
    let mut random = Lcg(3);
    let mut points = Vec::with_capacity(2 * N);
    for i in 0..N {
        let turn = random.next() * 2.0; // two half turns
        let angle = std::f32::consts::PI * (turn * 1.5 + (i % 2) as f32);
        points.extend([turn * angle.cos(), turn * angle.sin()]);
    }
    (points, (0..N as i32).map(|i| i % 2).collect())
}

/// Numbers in [0, 1), the same on every machine (Knuth's MMIX generator).
struct Lcg(u64);

impl Lcg {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 24) as f32
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    run(300, 0).map(|_| ())
}

#[cfg(test)]
mod tests {
    #[test]
    fn one_line_more_gives_the_same_training() {
        let [plain, fast] = super::run(60, 1).unwrap();
        let (first, last) = (plain.losses[0], plain.losses[59]);
        assert!((first - 0.7).abs() < 0.5 && last < 0.5 * first, "{first} {last}");
        for (step, (a, b)) in plain.losses.iter().zip(&fast.losses).enumerate() {
            // Sums in another order: 1e-7 a step at first, grown by training.
            assert!((a - b).abs() < 1e-3, "step {step}: {a} and {b}");
        }
        assert!(plain.seconds > 0.0 && fast.seconds > 0.0);
    }
}
