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
        let (t, shape) = (parameter.trace(), parameter.shape());
        let states = AdamW::moments(name).map(|name| t.state(&name, &shape, DType::F32));
        let [m, v] = self.next_moments(&states, gradient);
        self.stepped(parameter, &states[0].assign(&m), &states[1].assign(&v), rates)
    }

    /// As [`AdamW::update`], with moments in blocks of 8 bits (Dettmers et al. 2022): the step is made with the new moments
    /// as they are before they are rounded, as bitsandbytes makes it. Where the second moment was rounded to 0 and the first
    /// was not, steps could be of any length: they are held to the longest that exact moments make ([`AdamW::longest`]).
    #[track_caller]
    pub fn update_8bit(&self, name: &str, parameter: &Tensor, gradient: &Tensor, rates: &Tensor) -> Tensor {
        let (t, shape) = (parameter.trace(), parameter.shape());
        let (n, kept) = (shape.iter().product::<usize>(), AdamW::kept_8bit(&shape));
        let [m, v] = AdamW::moments(name);
        let states = [(m, DType::DYN8S), (v, DType::DYN8U)].map(|(name, dtype)| t.state(&name, &kept, dtype));
        let old = states.each_ref().map(|state| {
            let all = state.cast(DType::F32);
            let own = if kept[0] == n { all } else { all.slice(0, 0, n) };
            own.reshape(&shape)
        });
        let new = self.next_moments(&old, gradient);
        for (state, new) in states.iter().zip(&new) {
            let flat = new.reshape(&[n]);
            state.assign(&if kept[0] == n { flat } else { flat.pad(0, 0, kept[0] - n) });
        }
        let [m, v] = &new;
        let v = match self.longest() {
            Some(longest) => v.maximum(&(m * m).mul_scalar(1.0 / (longest * longest))),
            None => v.clone(),
        };
        self.stepped(parameter, m, &v, rates)
    }

    /// The largest `|m| / sqrt(v)` that any gradients make, by Cauchy and Schwarz's inequality over their sums:
    /// `(1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2))`, 7.3 for 0.9 and 0.999; `None` where there is none.
    fn longest(&self) -> Option<f64> {
        let left = 1.0 - self.beta1 * self.beta1 / self.beta2;
        (left > 0.0).then(|| (1.0 - self.beta1) / ((1.0 - self.beta2) * left).sqrt())
    }

    /// The shape of the states of [`AdamW::update_8bit`] for a parameter of this shape: its elements in one row, filled up
    /// with zeros to whole blocks.
    pub fn kept_8bit(shape: &[usize]) -> Vec<usize> {
        vec![shape.iter().product::<usize>().next_multiple_of(DType::DYN8S.block_len())]
    }

    /// Both moments after this gradient.
    #[track_caller]
    fn next_moments(&self, [m, v]: &[Tensor; 2], gradient: &Tensor) -> [Tensor; 2] {
        [
            m.mul_scalar(self.beta1) + gradient.mul_scalar(1.0 - self.beta1),
            v.mul_scalar(self.beta2) + (gradient * gradient).mul_scalar(1.0 - self.beta2),
        ]
    }

    /// The parameter's next version, with these moments.
    #[track_caller]
    fn stepped(&self, parameter: &Tensor, m: &Tensor, v: &Tensor, rates: &Tensor) -> Tensor {
        let (shape, rank) = (parameter.shape(), parameter.rank());
        let rate = |i: usize| rates.slice(0, i, i + 1).reshape(&vec![1; rank.max(1)]).broadcast_to(&shape);
        let step = rate(1) * (m / &(v.sqrt() + rate(2)));
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
    use sparsam_dtype::codec;

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

    /// Moments are rounded behind each step, which is made with them as they were before; the last block is filled up.
    #[test]
    fn two_steps_in_8_bits_by_hand() {
        let (shape, n, adamw) = ([20, 15], 300, AdamW { weight_decay: 0.5, ..AdamW::default() });
        let t = Trace::new().training(|_| true);
        let (p, g) = (t.weight("p", &shape), t.input("g", &shape, DType::F32));
        adamw.update_8bit("p", &p, &g, &t.input("rates", &[3], DType::F32));
        let graph = t.finish(&[]).unwrap();
        verify(&graph).unwrap();
        assert_eq!(AdamW::kept_8bit(&shape), [512]);
        let mut leaves = Leaves::from([("p".to_string(), Value::new(&shape, [1.0; 300]))]);
        AdamW::moments("p")
            .into_iter()
            .for_each(|name| _ = leaves.insert(name, Value::new(&[512], [0.0; 512])));
        let (mut p, mut m, mut v) = (vec![1.0; n], vec![0.0; 512], vec![0.0; 512]);
        let longest = adamw.longest().unwrap();
        assert!((longest - 7.27).abs() < 0.01, "{longest}");
        for step in 1..=2 {
            let g: Vec<f64> = (0..n).map(|i| ((i * step * 37 % 101) as f64 / 50.0 - 1.0).powi(3)).collect();
            let rates = adamw.rates(0.125, step as u64);
            leaves.insert("g".into(), Value::new(&shape, g.clone()));
            leaves.insert("rates".into(), Value::from_f32(&[3], &rates));
            interpret(&graph, &mut leaves, Rounding::Stored).unwrap();
            let [lr, size, eps] = rates.map(f64::from);
            for i in 0..n {
                m[i] = 0.9 * m[i] + (1.0 - 0.9) * g[i];
                v[i] = 0.999 * v[i] + (1.0 - 0.999) * g[i] * g[i];
                let root = v[i].max((m[i] / longest).powi(2)).sqrt();
                p[i] = p[i] * (1.0 - lr * 0.5) - size * m[i] / (root + eps);
                assert!(
                    (leaves["p"].data[i] - p[i]).abs() < 1e-5,
                    "{step} {i}: {} {}",
                    leaves["p"].data[i],
                    p[i]
                );
            }
            for (state, (name, dtype)) in [&mut m, &mut v]
                .into_iter()
                .zip(AdamW::moments("p").into_iter().zip([DType::DYN8S, DType::DYN8U]))
            {
                let mut x: Vec<f32> = state.iter().map(|&x| x as f32).collect();
                let mut bytes = vec![0; 520];
                codec::encode(dtype, &x, &mut bytes).unwrap();
                codec::decode(dtype, &bytes, &mut x).unwrap();
                let largest = x.iter().fold(0f32, |a, v| a.max(v.abs()));
                // Sums in f32 may round to the neighbouring code here and there.
                let near = |(a, b): (&f64, &f32)| (a - f64::from(*b)).abs() <= 0.015 * f64::from(largest);
                assert!(leaves[&name].data.iter().zip(&x).all(near), "{name}");
                let same = leaves[&name].data.iter().zip(&x).filter(|(a, b)| **a == f64::from(**b)).count();
                assert!(same >= 440, "{name}: {same} of 512 codes");
                *state = leaves[&name].data.clone();
            }
        }
    }

    /// One element's gradients are so small beside its block's that its second moment is rounded to 0, its first not: its
    /// steps are as long as exact moments make them at most.
    #[test]
    fn steps_stay_short_where_a_moment_is_rounded_to_0() {
        let adamw = AdamW { weight_decay: 0.0, ..AdamW::default() };
        let t = Trace::new().training(|_| true);
        let (p, g) = (t.weight("p", &[256]), t.input("g", &[256], DType::F32));
        adamw.update_8bit("p", &p, &g, &t.input("rates", &[3], DType::F32));
        let graph = t.finish(&[]).unwrap();
        let mut leaves = Leaves::from([("p".to_string(), Value::new(&[256], [0.0; 256]))]);
        AdamW::moments("p")
            .into_iter()
            .for_each(|name| _ = leaves.insert(name, Value::new(&[256], [0.0; 256])));
        let mut before = 0.0;
        for (step, small) in [1e-4, 1e-4, 1e-9, 0.0].into_iter().enumerate() {
            let mut gradient = [1.0; 256];
            gradient[0] = small;
            leaves.insert("g".into(), Value::new(&[256], gradient));
            leaves.insert("rates".into(), Value::from_f32(&[3], &adamw.rates(1.0, step as u64 + 1)));
            interpret(&graph, &mut leaves, Rounding::Stored).unwrap();
            let now = leaves["p"].data[0];
            assert!((now - before).abs() < 7.3, "step {step}: {}", now - before);
            before = now;
        }
        let [m, v] = AdamW::moments("p");
        assert!(leaves[&m].data[0] > 0.0 && leaves[&v].data[0] == 0.0);
    }
}
