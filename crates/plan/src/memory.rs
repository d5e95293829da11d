//! What a model needs in memory, by kind, to answer and to learn.
//!
//! Sources: bytes a weight in training from Rajbhandari et al. 2020 (ZeRO, section 3.1) and Dettmers et al. 2023
//! (QLoRA, section 2 and appendix G); activations as saved by a training step with exact IO-aware attention
//! (Korthikanti et al. 2022, section 4, without the scores, which such attention never stores).

use crate::shape::{Parameters, Shape};
use crate::{Error, units};
use serde::{Deserialize, Serialize};

/// Bytes by what they hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Memory {
    /// Weights, adapters included.
    pub weights: f64,
    /// Keys and values of past tokens.
    pub cache: f64,
    /// Gradients of trained weights.
    pub gradients: f64,
    /// The optimiser's moments and full-precision copies.
    pub optimiser: f64,
    /// What the forward pass leaves for the backward pass.
    pub activations: f64,
    /// Scratch of the moment: a block's intermediate results, logits.
    pub temporary: f64,
}

impl Memory {
    /// (name, bytes) of each kind, in order.
    pub fn kinds(&self) -> [(&'static str, f64); 6] {
        [
            ("weights", self.weights),
            ("cache", self.cache),
            ("gradients", self.gradients),
            ("optimiser", self.optimiser),
            ("activations", self.activations),
            ("temporary", self.temporary),
        ]
    }

    /// All of it.
    pub fn total(&self) -> f64 {
        self.kinds().iter().map(|(_, bytes)| bytes).sum()
    }

    /// How many devices of `device_bytes` hold it: weights, cache, gradients and moments are spread evenly, each
    /// device has activations and scratch of its own. `None` if these alone do not fit.
    pub fn devices(&self, device_bytes: f64) -> Option<u64> {
        let own = self.activations + self.temporary;
        let spread = self.total() - own;
        (own < device_bytes).then(|| (spread / (device_bytes - own)).ceil().max(1.0) as u64)
    }
}

/// A way to store weights.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rounding {
    /// Its name.
    pub name: &'static str,
    /// Bits a weight of the blocks' matrices, scales included.
    pub bits: f64,
    /// Bits a weight of embeddings and output projection.
    pub embedding_bits: f64,
}

impl Rounding {
    const fn all(name: &'static str, bits: f64) -> Rounding {
        Rounding { name, bits, embedding_bits: bits }
    }

    const fn blocks(name: &'static str, bits: f64) -> Rounding {
        Rounding { name, bits, embedding_bits: 16.0 }
    }

    /// 32-bit floats.
    pub const F32: Rounding = Rounding::all("f32", 32.0);
    /// 16-bit floats.
    pub const BF16: Rounding = Rounding::all("bf16", 16.0);
    /// GGUF Q8_0: 32 codes of 8 bits and a 16-bit scale.
    pub const Q8_0: Rounding = Rounding::all("q8_0", 8.5);
    /// GGUF Q6_K: 256 codes of 6 bits, 16 scales of 8 bits, one of 16.
    pub const Q6_K: Rounding = Rounding::all("q6_k", 6.5625);
    /// GGUF Q4_0 (and Q4_K): 4 bits and half a bit of scales.
    pub const Q4_0: Rounding = Rounding::all("q4_0", 4.5);
    /// NF4 with double quantisation (Dettmers et al. 2023, section 3): 4 bits and 0.127.
    pub const NF4: Rounding = Rounding::blocks("nf4", 4.127);
    /// GPTQ, 4 bits, groups of 128 with a 16-bit scale and a 4-bit zero.
    pub const GPTQ_4: Rounding = Rounding::blocks("gptq 4 bits, groups", 4.15625);
    /// GPTQ, 3 bits, one scale a row (Frantar et al. 2023, table 5 for 175 billion parameters).
    pub const GPTQ_3: Rounding = Rounding::blocks("gptq 3 bits, rows", 3.0);
    /// GPTQ, 2 bits, groups of 64 with a 16-bit scale and a 2-bit zero.
    pub const GPTQ_2: Rounding = Rounding::blocks("gptq 2 bits, groups", 2.28125);

    /// The ones that a plan lists, widest first.
    pub const LISTED: [Rounding; 8] = [
        Rounding::F32,
        Rounding::BF16,
        Rounding::Q8_0,
        Rounding::Q6_K,
        Rounding::Q4_0,
        Rounding::GPTQ_4,
        Rounding::GPTQ_3,
        Rounding::GPTQ_2,
    ];

    /// Bytes of `parameters` stored this way; norms and biases stay at 16 bits (32 in f32).
    pub fn weight_bytes(&self, parameters: &Parameters) -> f64 {
        let vector_bits = self.bits.max(16.0);
        let bits = parameters.matrices * self.bits
            + parameters.embeddings * self.embedding_bits
            + parameters.vectors * vector_bits;
        bits / 8.0
    }
}

/// How answers are computed: how many at once, how long, with what cache.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Use {
    /// Tokens of context kept for each sequence.
    pub context: f64,
    /// Sequences at once.
    pub batch: f64,
    /// Bytes of a cached element: 2 for 16 bits, 1.0625 for 8-bit blocks.
    pub cache_element_bytes: f64,
}

/// Rows of a prompt worked on at once.
const PROMPT_ROWS: f64 = 512.0;
/// Rows for which logits exist at once when a loss is computed in pieces.
const LOSS_ROWS: f64 = 1024.0;

/// Memory to answer, the weights taking `weight_bytes`.
pub fn inference(shape: &Shape, weight_bytes: f64, how: &Use) -> Memory {
    let rows = how.context.min(PROMPT_ROWS).max(how.batch);
    Memory {
        weights: weight_bytes,
        cache: shape.cache_bytes_per_token(how.cache_element_bytes) * how.context * how.batch,
        temporary: rows * block_row_bytes(shape, 4.0) + how.batch * shape.vocab_size as f64 * 4.0,
        ..Memory::default()
    }
}

/// What one block holds for one token, at `element` bytes: its input, normed input, q, k, v, attention's output,
/// second normed input, and the MLP's inner values (two with a gate, and their product).
fn block_row_bytes(shape: &Shape, element: f64) -> f64 {
    let inner = if shape.gated { 3.0 } else { 2.0 };
    let elements = 4.0 * shape.hidden_size as f64
        + 2.0 * shape.q_size()
        + 2.0 * shape.kv_size()
        + inner * shape.intermediate_size as f64;
    elements * element
}

/// A way to turn gradients into steps, and what it remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Optimiser {
    /// AdamW: two 32-bit moments.
    AdamW,
    /// AdamW with moments in 8-bit blocks of 256 (Dettmers et al. 2022).
    AdamW8,
    /// Muon: one 32-bit moment for matrices, AdamW for the rest (Jordan et al. 2024).
    Muon,
    /// Momentum or Lion: one 32-bit moment.
    Momentum,
    /// Adafactor: sums of rows and columns (Shazeer and Stern 2018), no momentum.
    Adafactor,
    /// Plain gradient descent: nothing.
    Sgd,
}

impl Optimiser {
    /// All.
    pub const ALL: [Optimiser; 6] = [
        Optimiser::AdamW,
        Optimiser::AdamW8,
        Optimiser::Muon,
        Optimiser::Momentum,
        Optimiser::Adafactor,
        Optimiser::Sgd,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Optimiser::AdamW => "adamw",
            Optimiser::AdamW8 => "adamw-8bit",
            Optimiser::Muon => "muon",
            Optimiser::Momentum => "momentum",
            Optimiser::Adafactor => "adafactor",
            Optimiser::Sgd => "sgd",
        }
    }

    /// Bytes that it remembers for these parameters.
    pub fn bytes(self, shape: &Shape, p: &Parameters) -> f64 {
        match self {
            Optimiser::AdamW => 8.0 * p.total(),
            Optimiser::AdamW8 => 2.0 * (1.0 + 4.0 / 256.0) * p.total(),
            Optimiser::Muon => 4.0 * p.matrices + 8.0 * (p.embeddings + p.vectors),
            Optimiser::Momentum => 4.0 * p.total(),
            Optimiser::Adafactor => {
                let sides: f64 = shape.block_matrices().iter().map(|(i, o)| i + o).sum();
                let (vocab, hidden) = (shape.vocab_size as f64, shape.hidden_size as f64);
                let tables = if shape.tied { 1.0 } else { 2.0 };
                4.0 * (shape.n_layers as f64 * sides + tables * (vocab + hidden) + p.vectors)
            }
            Optimiser::Sgd => 0.0,
        }
    }
}

/// In what numbers weights and gradients are kept while training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// All in 32 bits.
    F32,
    /// Weights and gradients in 16 bits, no copy (as QLoRA's comparison counts).
    Bf16,
    /// 16 bits to compute with and a 32-bit copy of the weights to step (Micikevicius et al. 2018).
    Mixed,
}

/// How a training step is made on one device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Step {
    /// Tokens in one forward and backward pass.
    pub tokens: f64,
    /// Keep only each block's input and compute the rest again (Chen et al. 2016).
    pub recompute: bool,
}

/// Activations and scratch of a step, at `element` bytes.
fn step_memory(shape: &Shape, step: &Step, element: f64) -> (f64, f64) {
    let block = step.tokens * block_row_bytes(shape, element);
    let input = step.tokens * shape.hidden_size as f64 * element;
    let layers = shape.n_layers as f64;
    let kept = if step.recompute { layers * input + block } else { layers * block };
    let logits = step.tokens.min(LOSS_ROWS) * shape.vocab_size as f64 * 4.0;
    (kept, logits + block)
}

/// Memory to train all weights.
pub fn training(
    shape: &Shape,
    p: &Parameters,
    optimiser: Optimiser,
    precision: Precision,
    step: &Step,
) -> Memory {
    let (weight, copy) = match precision {
        Precision::F32 => (4.0, 0.0),
        Precision::Bf16 => (2.0, 0.0),
        Precision::Mixed => (2.0, 4.0),
    };
    let (activations, temporary) = step_memory(shape, step, weight);
    Memory {
        weights: weight * p.total(),
        gradients: weight * p.total(),
        optimiser: copy * p.total() + optimiser.bytes(shape, p),
        activations,
        temporary,
        ..Memory::default()
    }
}

/// Parameters of low-rank adapters on every matrix of the blocks: `rank (inputs + outputs)` each (Hu et al. 2021).
pub fn adapter_parameters(shape: &Shape, rank: f64) -> f64 {
    let sides: f64 = shape.block_matrices().iter().map(|(i, o)| i + o).sum();
    shape.n_layers as f64 * rank * sides
}

/// Memory to train adapters of `rank` over frozen weights that take `base_bytes`: LoRA over 16 bits, QLoRA over NF4.
/// Adapters and their gradients are in 16 bits, moments (AdamW) in 32.
pub fn adapters(shape: &Shape, base_bytes: f64, rank: f64, step: &Step) -> Memory {
    let n = adapter_parameters(shape, rank);
    let (activations, temporary) = step_memory(shape, step, 2.0);
    Memory {
        weights: base_bytes + 2.0 * n,
        gradients: 2.0 * n,
        optimiser: 8.0 * n,
        activations,
        temporary,
        ..Memory::default()
    }
}

/// A model file's tensors as plain numbers, for planning from what is really there.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stored {
    /// The shape that its configuration gives.
    pub shape: Shape,
    /// Parameters by kind, counted from its tensors.
    pub parameters: Parameters,
    /// Bytes of all tensors as stored.
    pub bytes: f64,
    /// Bits a weight over everything.
    pub bits: f64,
}

impl Stored {
    /// Sums (rows of) tensors: `name, elements, bytes, is_matrix`. Names with `embed`, `embd`, `wte`, `wpe`, `lm_head`
    /// or `output.weight` are embeddings; other matrices belong to the blocks; the rest are vectors.
    ///
    /// # Errors
    /// If there are none.
    pub fn from_tensors<'a>(
        shape: Shape,
        tensors: impl IntoIterator<Item = (&'a str, f64, f64, bool)>,
    ) -> Result<Stored, Error> {
        let mut p = Parameters { matrices: 0.0, embeddings: 0.0, vectors: 0.0 };
        let mut bytes = 0.0;
        for (name, elements, size, is_matrix) in tensors {
            let embedding = ["embed", "embd", "wte", "wpe", "lm_head"].iter().any(|part| name.contains(part))
                || name == "output.weight";
            let kind = if !is_matrix {
                &mut p.vectors
            } else if embedding {
                &mut p.embeddings
            } else {
                &mut p.matrices
            };
            *kind += elements;
            bytes += size;
        }
        if p.total() == 0.0 {
            return Err(Error::Impossible("the file holds no tensors to plan with".into()));
        }
        Ok(Stored { shape, parameters: p, bytes, bits: 8.0 * bytes / p.total() })
    }

    /// In a line: `135M parameters in 84 MB (5 bits a weight)`.
    pub fn describe(&self) -> String {
        format!(
            "{} parameters in {} ({} bits a weight)",
            units::show_count(self.parameters.total()),
            units::show_bytes(self.bytes),
            units::three(self.bits)
        )
    }
}
