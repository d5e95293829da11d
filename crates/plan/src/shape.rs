//! A transformer's shape: its parameters and its arithmetic, counted exactly.
//!
//! `6 N D` forgets attention and counts embeddings as if they multiplied. Here every matrix product of a decoder is
//! counted (2 FLOP a multiply-add), attention over the keys that a causal mask leaves, the output projection once,
//! embeddings not at all; norms, activations and softmax are left out (under 1% from 100 million parameters on).
//! Compare Hoffmann et al. 2022, appendix F, which counts the whole square of attention and the embedding's product.

use crate::{Error, units};
use serde::{Deserialize, Serialize};

/// The shape of a decoder-only transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// What it is called.
    pub name: String,
    /// Blocks.
    pub n_layers: u64,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Query heads.
    pub n_heads: u64,
    /// Key and value heads; fewer than query heads where these share.
    pub n_kv_heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Width inside the MLP.
    pub intermediate_size: u64,
    /// Entries of the vocabulary.
    pub vocab_size: u64,
    /// Whether the MLP has a gate (SwiGLU: three matrices) or not (two).
    pub gated: bool,
    /// Whether the output projection is the embedding.
    pub tied: bool,
    /// Learned position embeddings (GPT-2 and GPT-3: 1024, 2048), or 0.
    #[serde(default)]
    pub learned_positions: u64,
    /// Whether each block projects relative positions with a matrix of its own (Transformer-XL; Gopher, Chinchilla).
    /// Counted as parameters, not as arithmetic: it acts on positions, once for a whole batch.
    #[serde(default)]
    pub relative_positions: bool,
    /// Whether projections have biases and norms too (GPT-2, GPT-3).
    #[serde(default)]
    pub biases: bool,
}

/// The parameters of a shape, by what planning does with them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Parameters {
    /// In the blocks' matrices: what rounding and adapters act on.
    pub matrices: f64,
    /// In embeddings and the output projection.
    pub embeddings: f64,
    /// In norms and biases.
    pub vectors: f64,
}

impl Parameters {
    /// All of them.
    pub fn total(&self) -> f64 {
        self.matrices + self.embeddings + self.vectors
    }
}

impl Shape {
    /// Width of all query heads together.
    pub fn q_size(&self) -> f64 {
        (self.n_heads * self.head_dim) as f64
    }

    /// Width of all key heads together (and of all value heads).
    pub fn kv_size(&self) -> f64 {
        (self.n_kv_heads * self.head_dim) as f64
    }

    /// (inputs, outputs) of each matrix of a block.
    pub fn block_matrices(&self) -> Vec<(f64, f64)> {
        let (h, i) = (self.hidden_size as f64, self.intermediate_size as f64);
        let (q, kv) = (self.q_size(), self.kv_size());
        let mut out = vec![(h, q), (h, kv), (h, kv), (q, h), (h, i), (i, h)];
        if self.gated {
            out.push((h, i));
        }
        out
    }

    /// Parameters, exactly.
    ///
    /// ```
    /// let llama = sparsam_plan::shape::by_name("llama-7b").unwrap();
    /// assert_eq!(llama.parameters().total(), 6_738_415_616.0);
    /// ```
    pub fn parameters(&self) -> Parameters {
        let (layers, h) = (self.n_layers as f64, self.hidden_size as f64);
        let block = self.block_matrices();
        let embedding = self.vocab_size as f64 * h;
        let per_norm = if self.biases { 2.0 * h } else { h };
        let biases = if self.biases { block.iter().map(|(_, out)| out).sum() } else { 0.0 };
        let relative = if self.relative_positions { h * self.q_size() } else { 0.0 };
        Parameters {
            matrices: layers * (block.iter().map(|(i, o)| i * o).sum::<f64>() + relative),
            embeddings: embedding * if self.tied { 1.0 } else { 2.0 } + self.learned_positions as f64 * h,
            vectors: layers * (2.0 * per_norm + biases) + per_norm,
        }
    }

    /// FLOP of a forward pass over one token that attends to `keys` keys (itself included).
    pub fn forward_flop(&self, keys: f64) -> f64 {
        let products: f64 = self.block_matrices().iter().map(|(i, o)| 2.0 * i * o).sum();
        let attention = 2.0 * 2.0 * self.q_size() * keys;
        self.n_layers as f64 * (products + attention) + 2.0 * self.vocab_size as f64 * self.hidden_size as f64
    }

    /// FLOP of training on one token in sequences of `context` tokens: forward once and backward twice that; under a
    /// causal mask a token attends to `(context + 1) / 2` keys in the mean.
    pub fn train_flop(&self, context: f64) -> f64 {
        3.0 * self.forward_flop((context + 1.0) / 2.0)
    }

    /// Bytes of key and value cache for one token, at `bytes` an element.
    pub fn cache_bytes_per_token(&self, bytes: f64) -> f64 {
        2.0 * self.n_layers as f64 * self.kv_size() * bytes
    }

    /// A Llama-like shape (SwiGLU, no biases) of about `parameters`, by a stated rule:
    ///
    /// - as deep as `hidden_size / n_layers` = 64 at 125 million parameters and 128 from 7 billion on (GPT-2's 768/12,
    ///   Llama 7B's 4096/32), growing between and shrinking below as a power; the loss is flat over a factor of
    ///   several either way (Kaplan et al. 2020, section 3.1);
    /// - heads of 128 from a width of 2048, 64 from 256, 32 from 64, 16 below; 8 key heads from a width of 4096, else one a head;
    /// - `intermediate_size` 8/3 of the width, in multiples of 64 (16 below a width of 256);
    /// - a vocabulary of 32,000, tied to the output below 2 billion parameters; bytes (256) below 50 million, where
    ///   32,000 entries would be most of the model.
    ///
    /// The width is the one that comes nearest to `parameters` over the depths near the rule's.
    ///
    /// # Errors
    /// Below 20,000 or above 100 trillion parameters.
    pub fn for_parameters(parameters: f64) -> Result<Shape, Error> {
        if !(2e4..=1e14).contains(&parameters) {
            return Err(Error::Impossible(format!(
                "no shape for {} parameters; the rule covers 20k to 100T",
                units::show_count(parameters)
            )));
        }
        let aspect = (64.0 * (parameters / 125e6).powf(0.172)).clamp(8.0, 128.0);
        let off = |s: &Shape| {
            let size = (s.parameters().total() / parameters).ln().abs();
            // A miss of 1% in size weighs as much as one of 10% in proportion.
            let proportion = (s.hidden_size as f64 / s.n_layers as f64 / aspect).ln().abs();
            size + 0.1 * proportion
        };
        let mut best: Option<Shape> = None;
        for n_layers in 1..=400 {
            let middle = aspect * n_layers as f64;
            for step in 1..4096u64 {
                let step_size = head_dim_for(middle as u64);
                let hidden = step * step_size;
                if !hidden.is_multiple_of(head_dim_for(hidden)) {
                    continue;
                }
                let ratio = hidden as f64 / middle;
                if ratio < 0.5 {
                    continue;
                }
                if ratio > 2.0 {
                    break;
                }
                let candidate = Shape::llama_like(n_layers, hidden, parameters);
                if best.as_ref().is_none_or(|b| off(&candidate) < off(b)) {
                    best = Some(candidate);
                }
            }
        }
        best.ok_or_else(|| {
            Error::Impossible(format!("no shape near {} parameters", units::show_count(parameters)))
        })
    }

    fn llama_like(n_layers: u64, hidden: u64, parameters: f64) -> Shape {
        let head_dim = head_dim_for(hidden);
        let n_heads = hidden / head_dim;
        let multiple = if hidden >= 256 { 64 } else { 16 };
        Shape {
            name: format!("llama-like, {}", units::show_count(parameters)),
            n_layers,
            hidden_size: hidden,
            n_heads,
            n_kv_heads: if hidden >= 4096 && n_heads.is_multiple_of(8) { 8 } else { n_heads },
            head_dim,
            intermediate_size: (hidden * 8 / 3).div_ceil(multiple) * multiple,
            vocab_size: if parameters < 50e6 { 256 } else { 32_000 },
            gated: true,
            tied: parameters < 2e9,
            learned_positions: 0,
            relative_positions: false,
            biases: false,
        }
    }

    /// The shape in a line: `32 layers of 4096, 32 heads of 128 (8 for keys), MLP 14336 gated, vocabulary 128256`.
    pub fn describe(&self) -> String {
        format!(
            "{} layers of {}, {} heads of {}{}, MLP {}{}, vocabulary {}{}",
            self.n_layers,
            self.hidden_size,
            self.n_heads,
            self.head_dim,
            if self.n_kv_heads == self.n_heads {
                String::new()
            } else {
                format!(" ({} for keys)", self.n_kv_heads)
            },
            self.intermediate_size,
            if self.gated { " gated" } else { "" },
            self.vocab_size,
            if self.tied { " tied" } else { "" },
        )
    }
}

fn head_dim_for(hidden: u64) -> u64 {
    match hidden {
        2048.. => 128,
        256.. => 64,
        64.. => 32,
        _ => 16,
    }
}

#[derive(Deserialize)]
struct Table {
    shape: Vec<Shape>,
}

/// Well-known shapes, from the embedded table `shapes.toml`.
pub fn known() -> Vec<Shape> {
    let table: Table =
        toml::from_str(include_str!("shapes.toml")).expect("the embedded table parses (tested)");
    table.shape
}

/// The well-known shape called `name`.
pub fn by_name(name: &str) -> Result<Shape, Error> {
    let known = known();
    match known.iter().find(|s| s.name.eq_ignore_ascii_case(name)) {
        Some(shape) => Ok(shape.clone()),
        None => Err(crate::error::unknown("model", name, known.iter().map(|s| s.name.as_str()))),
    }
}
