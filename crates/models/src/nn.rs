//! The layers that models are written with, and how a batch reaches them.
//!
//! Layers see a flat token axis: activations are (N, hidden_size), never (B, T, ..). Which rows belong to one sequence,
//! where its keys lie and which rows want logits is said by a [`Batch`]; model files pass it on and never look inside.
//! Every layer keeps the full name of its weight, Hugging Face's.

use crate::adapter::Adapter;
use sparsam_ir::{AttentionScores, DType, Precision, Tensor, Trace};
use std::sync::Arc;

/// What a traced step is fed with: static sizes, and how attention finds its keys.
///
/// The graph then has these inputs, all I32: `tokens` (N), `positions` (N), `row_start` (N) when packed, or `row_seq`
/// (N), `slots` (N), `page_table` (n_seqs, n_pages) when paged, and `logit_rows` (R) where only some rows want logits.
///
/// ```
/// use sparsam_models::nn::Batch;
/// let train = Batch::packed(512);
/// assert_eq!((train.n_tokens, train.n_logits()), (512, 512));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// N: rows of the flat token axis, padding included.
    pub n_tokens: usize,
    /// Where the keys of a row are.
    pub keys: Keys,
    /// R: the head computes logits only for the R rows that the input `logit_rows` names; `None`: for all N.
    pub n_logit_rows: Option<usize>,
    /// How products with weights read their activations.
    pub precision: Precision,
    /// Terms that are added to linear layers. A model brings its own, see [`crate::Model::with_adapters`].
    pub adapters: Arc<[Adapter]>,
}

/// Where the keys of a row are; see [`sparsam_ir::AttentionLayout`] for the inputs' meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keys {
    /// In the batch itself: several sequences one after the other (training, scoring).
    Packed,
    /// In a pool of pages that outlives the step (inference); this step's keys are written there first.
    Paged(Cache),
}

/// The pool of pages that holds keys and values: states `cache.k.{layer}` and `cache.v.{layer}`, each
/// (n_slots, n_kv_heads, head_dim).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    /// Tokens that the pool can hold; a multiple of `page_size`.
    pub n_slots: usize,
    /// Tokens in a page.
    pub page_size: usize,
    /// Rows of the page table: sequences that the step can see.
    pub n_seqs: usize,
    /// Columns of the page table: pages that a sequence can have.
    pub n_pages: usize,
    /// Element type of keys and values in the pool.
    pub dtype: DType,
}

impl Batch {
    /// `n_tokens` rows of packed sequences, logits for all, exact products.
    pub fn packed(n_tokens: usize) -> Batch {
        Batch::new(n_tokens, Keys::Packed)
    }

    /// `n_tokens` rows whose keys go to `cache`, logits for all, exact products.
    pub fn paged(n_tokens: usize, cache: Cache) -> Batch {
        Batch::new(n_tokens, Keys::Paged(cache))
    }

    fn new(n_tokens: usize, keys: Keys) -> Batch {
        Batch { n_tokens, keys, n_logit_rows: None, precision: Precision::F32, adapters: Arc::default() }
    }

    /// Logits for `n` rows only, named by the input `logit_rows`.
    pub fn with_logit_rows(mut self, n: usize) -> Batch {
        self.n_logit_rows = Some(n);
        self
    }

    /// Products with weights in this precision.
    pub fn with_precision(mut self, precision: Precision) -> Batch {
        self.precision = precision;
        self
    }

    /// Rows of the logits.
    pub fn n_logits(&self) -> usize {
        self.n_logit_rows.unwrap_or(self.n_tokens)
    }

    /// The input `tokens`: (N).
    pub fn tokens(&self, t: &Trace) -> Tensor {
        t.input("tokens", &[self.n_tokens], DType::I32)
    }

    /// The input `positions`: (N), each token's place in its own sequence, from 0.
    pub fn positions(&self, t: &Trace) -> Tensor {
        t.input("positions", &[self.n_tokens], DType::I32)
    }

    /// The rows of `x` (N, hidden) that want logits: (R, hidden).
    #[track_caller]
    pub fn select_logit_rows(&self, x: &Tensor) -> Tensor {
        match self.n_logit_rows {
            None => x.clone(),
            Some(r) => x.gather(&x.trace().input("logit_rows", &[r], DType::I32)),
        }
    }

    /// Causal attention of layer `layer`: q (N, n_heads, head_dim), k and v (N, n_kv_heads, head_dim) of this step's
    /// rows; gives (N, n_heads, head_dim).
    #[track_caller]
    pub fn attend(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scores: AttentionScores,
    ) -> Tensor {
        let t = q.trace();
        let index = |name: &str| t.input(name, &[self.n_tokens], DType::I32);
        match &self.keys {
            Keys::Packed => q.attention_packed(k, v, &index("row_start"), scores),
            Keys::Paged(c) => {
                let slots = index("slots");
                let write = |which: &str, x: &Tensor| {
                    let shape = [c.n_slots, x.dim(1), x.dim(2)];
                    t.state(&format!("cache.{which}.{layer}"), &shape, c.dtype).scatter_rows(x, &slots)
                };
                let (k, v) = (write("k", k), write("v", v));
                let table = t.input("page_table", &[c.n_seqs, c.n_pages], DType::I32);
                let index = [&self.positions(t), &index("row_seq"), &table];
                q.attention_paged(&k, &v, index, c.page_size, scores)
            }
        }
    }
}

/// Scores for plain scaled dot-product attention: `q.k / sqrt(head_dim)`, over the last `window` keys.
pub fn scaled_dot_product(head_dim: usize, window: Option<usize>) -> AttentionScores {
    AttentionScores { scale: 1.0 / (head_dim as f64).sqrt(), window, softcap: None }
}

/// `y = x W^T + b`: x (.., n_in), W (n_out, n_in), b (n_out) if there is one.
///
/// Every product of activations with weights goes through here and nowhere else: a weight may be stored rounded, and
/// an adapter is one more term of this sum.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: String,
    bias: Option<String>,
    n_out: usize,
    n_in: usize,
}

impl Linear {
    /// `{name}.weight` (n_out, n_in), and `{name}.bias` (n_out) if `bias`.
    pub fn new(name: &str, n_in: usize, n_out: usize, bias: bool) -> Linear {
        let bias = bias.then(|| format!("{name}.bias"));
        Linear { weight: format!("{name}.weight"), bias, n_out, n_in }
    }

    /// x (N, n_in) to (N, n_out).
    #[track_caller]
    pub fn forward(&self, batch: &Batch, x: &Tensor) -> Tensor {
        let w = x.trace().weight(&self.weight, &[self.n_out, self.n_in]);
        let y = x.matmul_with(&w, false, true, batch.precision);
        let y = match &self.bias {
            None => y,
            Some(bias) => y + vector(x.trace(), bias, self.n_out),
        };
        let module = self.weight.strip_suffix(".weight").unwrap_or(&self.weight);
        let terms = batch.adapters.iter().filter_map(|a| a.term(batch, module, x, self.n_out));
        terms.fold(y, |y, term| y + term)
    }
}

/// A table of `n_rows` vectors (n_rows, width), looked up by row.
#[derive(Clone, Debug)]
pub struct Embedding {
    name: String,
    n_rows: usize,
    width: usize,
}

impl Embedding {
    /// `{name}.weight` (n_rows, width).
    pub fn new(name: &str, n_rows: usize, width: usize) -> Embedding {
        Embedding { name: name.to_string(), n_rows, width }
    }

    /// rows I32 (N) to (N, width).
    #[track_caller]
    pub fn forward(&self, rows: &Tensor) -> Tensor {
        self.table(rows.trace()).gather(rows)
    }

    /// The element type in which the table is stored.
    #[track_caller]
    pub fn dtype(&self, t: &Trace) -> DType {
        self.table(t).dtype()
    }

    /// The head that shares this table (Press & Wolf 2017): x (N, width) to (N, n_rows).
    pub fn tied_head(&self) -> Linear {
        Linear::new(&self.name, self.width, self.n_rows, false)
    }

    #[track_caller]
    fn table(&self, t: &Trace) -> Tensor {
        t.weight(&format!("{}.weight", self.name), &[self.n_rows, self.width])
    }
}

/// Root mean square norm over the last axis (Zhang & Sennrich 2019): `x / sqrt(mean(x^2) + eps) * w`.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: String,
    size: usize,
    eps: f64,
    /// What is added to the stored weight: 0, or 1 in Gemma, whose weights are offsets from 1.
    offset: f64,
}

impl RmsNorm {
    /// `{name}.weight` (size) is the factor itself.
    pub fn new(name: &str, size: usize, eps: f64) -> RmsNorm {
        RmsNorm { weight: format!("{name}.weight"), size, eps, offset: 0.0 }
    }

    /// The factor is `1 + {name}.weight` (Gemma).
    pub fn one_plus(name: &str, size: usize, eps: f64) -> RmsNorm {
        RmsNorm { offset: 1.0, ..RmsNorm::new(name, size, eps) }
    }

    /// x (.., size) to the same shape.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let w = vector(x.trace(), &self.weight, self.size);
        let w = if self.offset == 0.0 { w } else { w.add_scalar(self.offset) };
        x * (x * x).mean().add_scalar(self.eps).sqrt().recip() * w
    }
}

/// Layer norm over the last axis (Ba et al. 2016): `(x - mean) / sqrt(var + eps) * w + b`.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    name: String,
    size: usize,
    eps: f64,
}

impl LayerNorm {
    /// `{name}.weight` and `{name}.bias`, both (size).
    pub fn new(name: &str, size: usize, eps: f64) -> LayerNorm {
        LayerNorm { name: name.to_string(), size, eps }
    }

    /// x (.., size) to the same shape.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let [w, b] = ["weight", "bias"].map(|p| vector(x.trace(), &format!("{}.{p}", self.name), self.size));
        let centred = x - x.mean();
        let inv_std = (&centred * &centred).mean().add_scalar(self.eps).sqrt().recip();
        centred * inv_std * w + b
    }
}

/// A weight of one axis as F32, in whatever plain type it is stored.
#[track_caller]
fn vector(t: &Trace, name: &str, size: usize) -> Tensor {
    t.weight(name, &[size]).cast(DType::F32)
}
