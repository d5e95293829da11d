//! Rotary position embedding (Su et al. 2021, RoFormer, section 3.2.2) and the ways to stretch it.
//!
//! Element pair `j` of a head turns by `position * inv_freq[j]`, with `inv_freq[j] = base^(-2j / head_dim)` before
//! scaling. Which two elements form pair `j` is a convention of the checkpoint ([`Pairing`]); inside this project it is
//! always Hugging Face's.

use crate::nn::Batch;
use sparsam_ir::{DType, Tensor, Trace};

/// Base and scaling of one rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base of the wavelengths, usually 10000.
    pub base: f64,
    /// How the embedding reaches beyond the context that it was trained for.
    pub scaling: Scaling,
}

/// How frequencies change for longer contexts.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // fields are named as in config.json
pub enum Scaling {
    /// Not at all.
    None,
    /// All divided by `factor` (position interpolation, Chen et al. 2023).
    Linear { factor: f64 },
    /// Wavelengths above `original_context / low_freq_factor` divided by `factor`, those below
    /// `original_context / high_freq_factor` kept, in between interpolated (Llama 3.1).
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_context: usize },
    /// Peng et al. 2023, YaRN, section 3.2 (by parts) and 3.4 (`attention_factor` on sine and cosine).
    Yarn { factor: f64, beta_fast: f64, beta_slow: f64, original_context: usize, attention_factor: f64 },
    /// Frequency `j` divided by `factors[j]`: what GGUF files hold in `rope_freqs.weight` in place of `Llama3`.
    Factors(Vec<f32>),
}

/// The factor on sine and cosine that YaRN derives from its scale: `0.1 ln(factor) + 1` (Peng et al. 2023, eq. 22).
pub fn yarn_attention_factor(factor: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
}

/// Which elements of a head of `d` form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// `j` and `j + d/2`: Hugging Face's `rotate_half`, GPT-NeoX. What all models here are traced with.
    Halves,
    /// `2j` and `2j + 1`: the paper, Meta's own Llama files, and the order of q and k rows in `llama` GGUF files,
    /// which [`sparsam_formats::Transform::UnpermuteRope`] turns into `Halves` as the file is read.
    Neighbours,
}

/// A rotary embedding for heads of one size.
#[derive(Clone, Debug)]
pub struct Rope {
    name: String,
    inv_freq: Vec<f32>,
    attention_factor: f64,
    pairing: Pairing,
}

impl Rope {
    /// For heads of `head_dim` elements. Frequencies enter the graph as the constant `name` (head_dim / 2).
    pub fn new(name: &str, head_dim: usize, config: &RopeConfig) -> Rope {
        let attention_factor = match config.scaling {
            Scaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        };
        let inv_freq = frequencies(head_dim, config);
        Rope { name: name.to_string(), inv_freq, attention_factor, pairing: Pairing::Halves }
    }

    /// The same rotation over other pairs.
    pub fn with_pairing(mut self, pairing: Pairing) -> Rope {
        self.pairing = pairing;
        self
    }

    /// The name of the constant that holds the frequencies.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The value of that constant: radians per position, (head_dim / 2).
    pub fn inv_freq(&self) -> &[f32] {
        &self.inv_freq
    }

    /// Each of `xs` (N, heads, head_dim) turned by its row's position.
    #[track_caller]
    pub fn rotate<const X: usize>(&self, batch: &Batch, xs: [&Tensor; X]) -> [Tensor; X] {
        let Some(t) = xs.first().map(|x| x.trace().clone()) else { return xs.map(Tensor::clone) };
        let (cos, sin) = self.angles(&t, batch);
        xs.map(|x| {
            let (heads, d) = (x.dim(1), x.dim(2));
            let half = d / 2;
            match self.pairing {
                Pairing::Halves => {
                    let (a, b) = (x.slice(2, 0, half), x.slice(2, half, d)); // (N, heads, d/2)
                    t.concat(&[&(&a * &cos - &b * &sin), &(&b * &cos + &a * &sin)], 2)
                }
                Pairing::Neighbours => {
                    let x = x.reshape(&[batch.n_tokens, heads, half, 2]);
                    let part = |i: usize| x.slice(3, i, i + 1).reshape(&[batch.n_tokens, heads, half]);
                    let (a, b) = (part(0), part(1));
                    let turned = [&a * &cos - &b * &sin, &b * &cos + &a * &sin];
                    let [a, b] = turned.map(|y| y.reshape(&[batch.n_tokens, heads, half, 1]));
                    t.concat(&[&a, &b], 3).reshape(&[batch.n_tokens, heads, d])
                }
            }
        })
    }

    /// Cosine and sine of each row's angles, (N, 1, head_dim / 2).
    #[track_caller]
    fn angles(&self, t: &Trace, batch: &Batch) -> (Tensor, Tensor) {
        let half = self.inv_freq.len();
        let inv_freq = t.constant(&self.name, &[half]);
        let positions = batch.positions(t).cast(DType::F32).reshape(&[batch.n_tokens, 1, 1]);
        let angle = positions * inv_freq; // (N, 1, d/2)
        let scaled = |x: Tensor| {
            if self.attention_factor == 1.0 { x } else { x.mul_scalar(self.attention_factor) }
        };
        (scaled(angle.cos()), scaled(angle.sin()))
    }
}

/// The scaled frequencies in radians per position, (head_dim / 2).
pub(crate) fn frequencies(head_dim: usize, config: &RopeConfig) -> Vec<f32> {
    let half = head_dim / 2;
    // Rounded to f32 step by step, as transformers computes them: at position 10,000 an error of one unit in the last
    // place of a frequency is 0.0006 radians, so the two must not differ needlessly.
    let plain: Vec<f32> = (0..half)
        .map(|j| {
            let exponent = (2 * j) as f32 / head_dim as f32;
            1.0 / ((config.base as f32 as f64).powf(exponent as f64) as f32)
        })
        .collect();
    let scaled = |f: &dyn Fn(usize, f64) -> f64| {
        plain.iter().enumerate().map(|(j, &x)| f(j, x as f64) as f32).collect()
    };
    match &config.scaling {
        Scaling::None => plain,
        Scaling::Linear { factor } => scaled(&|_, x| x / factor),
        Scaling::Factors(factors) => scaled(&|j, x| x / factors.get(j).copied().unwrap_or(1.0) as f64),
        Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let context = *original_context as f64;
            scaled(&|_, x| {
                let wavelength = 2.0 * std::f64::consts::PI / x;
                if wavelength < context / high_freq_factor {
                    return x;
                }
                if wavelength > context / low_freq_factor {
                    return x / factor;
                }
                let smooth = (context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * x / factor + smooth * x
            })
        }
        Scaling::Yarn { factor, beta_fast, beta_slow, original_context, .. } => {
            // The pair that makes `turns` turns over the original context, as a real number (eq. 17 solved for it).
            let pair = |turns: f64| {
                let per_turn = *original_context as f64 / (turns * 2.0 * std::f64::consts::PI);
                head_dim as f64 * per_turn.ln() / (2.0 * config.base.ln())
            };
            let low = pair(*beta_fast).floor().max(0.0);
            let high = pair(*beta_slow).ceil().min((head_dim - 1) as f64);
            let width = if high == low { 0.001 } else { high - low };
            scaled(&|j, x| {
                let interpolated = ((j as f64 - low) / width).clamp(0.0, 1.0);
                x / factor * interpolated + x * (1.0 - interpolated)
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsam_ir::interpret::{Leaves, Rounding, Value, interpret};

    #[test]
    fn frequencies_by_hand() {
        let config = |scaling| RopeConfig { base: 10000.0, scaling };
        assert_eq!(frequencies(4, &config(Scaling::None)), [1.0, 0.01]);
        assert_eq!(frequencies(4, &config(Scaling::Linear { factor: 4.0 })), [0.25, 0.0025]);
        assert_eq!(frequencies(4, &config(Scaling::Factors(vec![1.0, 8.0]))), [1.0, 0.00125]);
        // Wavelengths 6.28 and 628 over a context of 64: the first is below 64 / 4 and kept, the second above 64.
        let llama3 = Scaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 64,
        };
        assert_eq!(frequencies(4, &config(llama3)), [1.0, 0.00125]);
    }

    #[test]
    fn pairs_turn_by_position_times_frequency() {
        // One head of 4, base 10000, position 3: pair 0 turns by 3 radians, pair 1 by 0.03.
        let config = RopeConfig { base: 10000.0, scaling: Scaling::None };
        let (c0, s0, c1, s1) = (3f64.cos(), 3f64.sin(), 0.03f64.cos(), 0.03f64.sin());
        for (pairing, x, want) in [
            (Pairing::Halves, [1.0, 2.0, 0.0, 0.0], [c0, 2.0 * c1, s0, 2.0 * s1]),
            (Pairing::Neighbours, [1.0, 0.0, 2.0, 0.0], [c0, s0, 2.0 * c1, 2.0 * s1]),
        ] {
            let rope = Rope::new("inv_freq", 4, &config).with_pairing(pairing);
            let t = Trace::new();
            let [y] = rope.rotate(&Batch::packed(1), [&t.input("x", &[1, 1, 4], DType::F32)]);
            let graph = t.finish(&[("y", &y)]).unwrap();
            let mut leaves = Leaves::from([
                ("x".into(), Value::new(&[1, 1, 4], x)),
                ("positions".into(), Value::new(&[1], [3.0])),
                ("inv_freq".into(), Value::from_f32(&[2], rope.inv_freq())),
            ]);
            let y = interpret(&graph, &mut leaves, Rounding::None).unwrap().remove("y").unwrap();
            for (have, want) in y.data.iter().zip(want) {
                assert!((have - want).abs() < 1e-8, "{pairing:?}: {:?}", y.data); // 0.01 in f32 is off by 2e-10
            }
        }
    }
}
