//! Optimisers, composed from primitive ops behind [`crate::grad()`].

use crate::op::Precision;
use crate::trace::Tensor;
use sparsam_dtype::DType;

/// AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), as PyTorch computes it.
///
/// With gradient `g`, learning rate `lr` and step `t` from 1: `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
/// `p = p (1 - lr weight_decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)`.
///
/// ```
/// use sparsam_ir::{AdamW, DType, Trace, grad};
/// let t = Trace::new().training(|_| true);
/// let x = t.input("x", &[3], DType::F32);
/// let loss = (&x * &t.weight("w", &[3])).sum(&[0]);
/// let rates = t.input("rates", &[3], DType::F32);
/// let parameters = t.parameters();
/// let gradients = grad(&loss, &parameters.iter().map(|(_, p)| p).collect::<Vec<_>>());
/// for ((name, parameter), gradient) in parameters.iter().zip(&gradients) {
///     AdamW::default().update(name, parameter, gradient, &rates);
/// }
/// assert_eq!(t.finish(&[("loss", &loss)]).unwrap().writes.len(), 3); // w and its two moments
/// // At every run, the input "rates":
/// let rates: [f32; 3] = AdamW::default().rates(1e-3, 1);
/// assert_eq!(rates[0], 1e-3);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the mean of gradients, `b1`.
    pub beta1: f64,
    /// Decay of the mean of their squares, `b2`.
    pub beta2: f64,
    /// Added to the root of the squares.
    pub eps: f64,
    /// Share of a parameter that goes with each unit of learning rate. Usually 0 for biases and norms.
    pub weight_decay: f64,
}

impl Default for AdamW {
    /// PyTorch's: 0.9, 0.999, 1e-8, 0.01.
    fn default() -> AdamW {
        AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

impl AdamW {
    /// Names of the states that hold the two moments of the parameter `name`; both start at 0.
    pub fn moments(name: &str) -> [String; 2] {
        [format!("adamw.m.{name}"), format!("adamw.v.{name}")]
    }

    /// What [`AdamW::update`] wants to know of step `step` (from 1): the learning rate, the step size that the
    /// corrections of both moments leave of it, and `eps` brought to the uncorrected `v`. Computed in f64.
    pub fn rates(&self, lr: f64, step: u64) -> [f32; 3] {
        let steps = step.max(1) as f64;
        let (m, v) = (1.0 - self.beta1.powf(steps), (1.0 - self.beta2.powf(steps)).sqrt());
        [lr as f32, (lr * v / m) as f32, (self.eps * v) as f32]
    }

    /// The next version of `parameter`, an F32 state; moments are written too. `gradient`: F32 of its shape; scale it
    /// before, to clip or to average. `rates`: F32 (3), of [`AdamW::rates`]; several groups of parameters may have
    /// different decays and share it.
    #[track_caller]
    pub fn update(&self, name: &str, parameter: &Tensor, gradient: &Tensor, rates: &Tensor) -> Tensor {
        let t = parameter.trace();
        let (shape, rank) = (parameter.shape(), parameter.rank());
        let rate = |i: usize| rates.slice(0, i, i + 1).reshape(&vec![1; rank.max(1)]).broadcast_to(&shape);
        let [m, v] = AdamW::moments(name).map(|name| t.state(&name, &shape, DType::F32));
        let m = m.assign(&(m.mul_scalar(self.beta1) + gradient.mul_scalar(1.0 - self.beta1)));
        let v = v.assign(&(v.mul_scalar(self.beta2) + (gradient * gradient).mul_scalar(1.0 - self.beta2)));
        let step = rate(1) * (m / (v.sqrt() + rate(2)));
        let kept = match self.weight_decay {
            0.0 => parameter.clone(),
            decay => parameter * &rate(0).mul_scalar(-decay).add_scalar(1.0),
        };
        parameter.assign(&(kept - step))
    }
}

/// Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"): the momentum of a matrix, its
/// singular values brought near 1. For matrices between layers; embeddings, the head and vectors want [`AdamW`].
///
/// With gradient `g` and learning rate `lr`: `m = b m + (1 - b) g`, `u = b m + (1 - b) g` (Nesterov),
/// `p = p (1 - lr weight_decay) - lr 0.2 sqrt(max(rows, cols)) orthogonal(u)`. The factor is Liu et al. 2025's ("Muon is
/// scalable for LLM training", equation 4): updates are as large as AdamW's, so that both share rate and decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Muon {
    /// Decay of the mean of gradients, `b`.
    pub momentum: f64,
    /// Steps of the Newton-Schulz iteration.
    pub iterations: usize,
    /// Share of a parameter that goes with each unit of learning rate.
    pub weight_decay: f64,
}

impl Default for Muon {
    /// Jordan et al.'s 0.95 and 5 iterations; a decay of 0.1 (Liu et al. 2025).
    fn default() -> Muon {
        Muon { momentum: 0.95, iterations: 5, weight_decay: 0.1 }
    }
}

impl Muon {
    /// Jordan et al.'s quintic: its slope at 0 is as large as it can be while singular values end between 0.7 and 1.2.
    const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];

    /// The state that holds the momentum of the parameter `name`; it starts at 0.
    pub fn momentum(name: &str) -> String {
        format!("muon.m.{name}")
    }

    /// The next version of `parameter`, an F32 state (rows, cols); its momentum is written too. `gradient`: F32 of its
    /// shape. `rates`: F32 (3) as for [`AdamW::update`]; only the learning rate is read.
    #[track_caller]
    pub fn update(&self, name: &str, parameter: &Tensor, gradient: &Tensor, rates: &Tensor) -> Tensor {
        let t = parameter.trace();
        let shape = parameter.shape();
        let [rows, cols] = shape[..] else {
            t.fail("muon", format!("{name} has the shape {shape:?}, which is no matrix"));
            return parameter.clone();
        };
        let mixed = |m: &Tensor| m.mul_scalar(self.momentum) + gradient.mul_scalar(1.0 - self.momentum);
        let m = t.state(&Muon::momentum(name), &shape, DType::F32);
        let m = m.assign(&mixed(&m));
        let lr = rates.slice(0, 0, 1).reshape(&[1, 1]).broadcast_to(&shape);
        let scale = 0.2 * (rows.max(cols) as f64).sqrt();
        let step = &lr * &self.orthogonal(&mixed(&m)).mul_scalar(scale);
        let kept = match self.weight_decay {
            0.0 => parameter.clone(),
            decay => parameter * &lr.mul_scalar(-decay).add_scalar(1.0),
        };
        parameter.assign(&(kept - step))
    }

    /// The matrix with the same singular vectors and singular values near 1, by the Newton-Schulz iteration
    /// `x = a x + (b x x^T + c (x x^T)^2) x` on the matrix divided by its norm. (rows, cols).
    #[track_caller]
    fn orthogonal(&self, u: &Tensor) -> Tensor {
        let tall = u.shape()[0] > u.shape()[1];
        let norm = (u * u).sum(&[0, 1]).sqrt().add_scalar(1e-7).reshape(&[1, 1]);
        let mut x = u / &norm.broadcast_to(&u.shape());
        let [a, b, c] = Muon::COEFFICIENTS;
        for _ in 0..self.iterations {
            // The smaller of both Gram matrices.
            let gram = x.matmul_with(&x, tall, !tall, Precision::F32);
            let poly = gram.mul_scalar(b) + gram.matmul(&gram).mul_scalar(c);
            let turned = if tall { x.matmul(&poly) } else { poly.matmul(&x) };
            x = x.mul_scalar(a) + turned;
        }
        x
    }
}

#[cfg(test)]
mod tests {
    use super::AdamW;
    use crate::interpret::{Leaves, Rounding, Value, interpret};
    use crate::{DType, Trace, verify};

    #[test]
    fn two_steps_by_hand() {
        let adamw = AdamW { beta1: 0.5, beta2: 0.75, eps: 0.25, weight_decay: 0.5 };
        let t = Trace::new().training(|_| true);
        let (p, g) = (t.weight("p", &[2]), t.input("g", &[2], DType::F32));
        adamw.update("p", &p, &g, &t.input("rates", &[3], DType::F32));
        let graph = t.finish(&[]).unwrap();
        verify(&graph).unwrap();
        let mut leaves = Leaves::from([("p".to_string(), Value::new(&[2], [1.0, -2.0]))]);
        AdamW::moments("p")
            .into_iter()
            .for_each(|name| _ = leaves.insert(name, Value::new(&[2], [0.0, 0.0])));
        let (mut p, mut m, mut v) = ([1.0, -2.0], [0.0; 2], [0.0; 2]);
        for (step, g) in [[4.0, -0.5], [-1.0, 2.0]].into_iter().enumerate() {
            let (lr, n) = (0.125, step as i32 + 1);
            let rates = adamw.rates(lr, n as u64);
            leaves.insert("g".into(), Value::new(&[2], g));
            leaves.insert("rates".into(), Value::from_f32(&[3], &rates));
            interpret(&graph, &mut leaves, Rounding::None).unwrap();
            for i in 0..2 {
                m[i] = 0.5 * m[i] + 0.5 * g[i];
                v[i] = 0.75 * v[i] + 0.25 * g[i] * g[i];
                let (m, v) = (m[i] / (1.0 - 0.5f64.powi(n)), v[i] / (1.0 - 0.75f64.powi(n)));
                p[i] = p[i] * (1.0 - lr * 0.5) - lr * m / (v.sqrt() + 0.25);
                assert!((leaves["p"].data[i] - p[i]).abs() < 1e-7, "{step} {i}: {:?} {p:?}", leaves["p"]);
            }
        }
    }
}
