//! Low-rank adapters (LoRA, Hu et al. 2021, <https://arxiv.org/abs/2106.09685>): one more term of a linear layer.
//!
//! `y = W x + scale * B A x`, with A (rank, n_in) and B (n_out, rank). W is never written, and may be rounded. The
//! weights are named as PEFT names them: `base_model.model.{module}.lora_A.weight`.

use crate::Parameter;
use crate::nn::Batch;
use sparsam_ir::{DType, Precision, Tensor};
use std::collections::BTreeMap;

/// What PEFT's names of weights begin with.
pub const PEFT_PREFIX: &str = "base_model.model";

/// The input with the seed of dropout, I32 (2); only where an adapter drops.
pub const DROPOUT_SEED: &str = "dropout_seed";

/// Rank and factor of one layer's adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowRank {
    /// Rows of A, columns of B.
    pub rank: usize,
    /// Multiplies the term: `alpha / rank`, or `alpha / sqrt(rank)` (rsLoRA, Kalajdzievski 2023).
    pub scale: f64,
}

/// An adapter of some of a model's linear layers.
///
/// ```
/// use sparsam_models::adapter::{Adapter, LowRank};
/// let q = "model.layers.0.self_attn.q_proj".to_string();
/// let adapter = Adapter::new([(q.clone(), LowRank { rank: 8, scale: 2.0 })]);
/// assert_eq!(adapter.names(&q)[0], "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    prefix: String,
    modules: BTreeMap<String, LowRank>,
    dropout: f64,
}

impl Adapter {
    /// An adapter of these layers, by the names of their modules.
    pub fn new(modules: impl IntoIterator<Item = (String, LowRank)>) -> Adapter {
        Adapter { prefix: PEFT_PREFIX.into(), modules: modules.into_iter().collect(), dropout: 0.0 }
    }

    /// The same adapter, with other names of its weights: several of one model must not share them.
    pub fn with_prefix(self, prefix: impl Into<String>) -> Adapter {
        Adapter { prefix: prefix.into(), ..self }
    }

    /// The same adapter; each element of its layers' inputs is 0 with this probability, for its own term alone.
    pub fn with_dropout(self, dropout: f64) -> Adapter {
        Adapter { dropout, ..self }
    }

    /// The same adapter with every factor multiplied by `weight`.
    pub fn scaled(mut self, weight: f64) -> Adapter {
        self.modules.values_mut().for_each(|m| m.scale *= weight);
        self
    }

    /// The layers, by name.
    pub fn modules(&self) -> &BTreeMap<String, LowRank> {
        &self.modules
    }

    /// The probability that an input is dropped.
    pub fn dropout(&self) -> f64 {
        self.dropout
    }

    /// The names of A and B of the layer `module`.
    pub fn names(&self, module: &str) -> [String; 2] {
        ["lora_A", "lora_B"].map(|part| format!("{}.{module}.{part}.weight", self.prefix))
    }

    /// A and B of the layer `module` (n_out, n_in); `None` if it has no adapter.
    pub fn parameters(&self, module: &str, n_in: usize, n_out: usize) -> Option<[Parameter; 2]> {
        let rank = self.modules.get(module)?.rank;
        let [a, b] = self.names(module);
        Some([
            Parameter { name: a, shape: vec![rank, n_in] },
            Parameter { name: b, shape: vec![n_out, rank] },
        ])
    }

    /// The term of the layer `module`: x (N, n_in) to (N, n_out); `None` if it has no adapter.
    #[track_caller]
    pub(crate) fn term(&self, batch: &Batch, module: &str, x: &Tensor, n_out: usize) -> Option<Tensor> {
        let LowRank { scale, .. } = *self.modules.get(module)?;
        let [a, b] = self.parameters(module, x.dim(1), n_out)?;
        let t = x.trace();
        let (a, b) = (t.weight(&a.name, &a.shape), t.weight(&b.name, &b.shape));
        // Eight bits are for the products that take the time.
        let precision = if batch.precision == Precision::Int8 { Precision::F32 } else { batch.precision };
        let x = if self.dropout > 0.0 { self.dropped(module, x) } else { x.clone() };
        let low = x.matmul_with(&a, false, true, precision).mul_scalar(scale); // (N, rank)
        Some(low.matmul_with(&b, false, true, precision)) // (N, n_out)
    }

    /// x with elements dropped and the others scaled up, so that the mean stays (Srivastava et al. 2014).
    #[track_caller]
    fn dropped(&self, module: &str, x: &Tensor) -> Tensor {
        let t = x.trace();
        let seed = t.input(DROPOUT_SEED, &[2], DType::I32);
        let stream = self.modules.keys().position(|m| m == module).unwrap_or(0) as u32;
        let shape = x.shape();
        let drawn = t.random(&seed, stream, &shape);
        let kept = drawn.less(&t.full(&shape, 1.0 - self.dropout));
        x * &kept.mul_scalar(1.0 / (1.0 - self.dropout))
    }
}
