//! GPT-2 (Radford et al. 2019, <https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf>).
//!
//! Differs from Llama: learned positions added to the embeddings instead of rotary ones; layer norms with bias; q, k
//! and v from one product, all heads with keys of their own; a plain MLP with GELU; biases everywhere but in the head.
//! Hugging Face's checkpoint stores its matrices as `Conv1D`, (in, out); they are turned as the file is read.

use crate::Error;
use crate::config::{Fields, Heads};
use crate::model::{Architecture, Facts};
use crate::names::Rule;
use crate::nn::{Batch, Embedding, LayerNorm, Linear, scaled_dot_product};
use crate::rope::Rope;
use sparsam_formats::Transform;
use sparsam_ir::{Tensor, Trace};

/// Sizes of a GPT-2.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // named as in config.json
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub n_layers: usize,
    pub heads: Heads,
    pub layer_norm_eps: f64,
    /// Rows of the table of positions.
    pub context_length: usize,
    /// The head shares the embedding table.
    pub tied_head: bool,
}

impl Config {
    pub(crate) fn read(f: &Fields) -> Result<Config, Error> {
        f.only(["activation_function", ""], &["gelu_new", "gelu_pytorch_tanh"])?;
        f.only_flag(["scale_attn_weights", ""], true)?;
        f.only_flag(["scale_attn_by_inverse_layer_idx", ""], false)?;
        f.only_flag(["add_cross_attention", ""], false)?;
        let hidden_size = f.size(["n_embd", "embedding_length"])?;
        let head_key = ["n_head", "attention.head_count"];
        let n_heads = f.size(head_key)?;
        if !hidden_size.is_multiple_of(n_heads) {
            return Err(
                f.error(head_key, format!("is {n_heads}, which does not divide {hidden_size} channels"))
            );
        }
        Ok(Config {
            vocab_size: f.vocab_size(None)?,
            hidden_size,
            intermediate_size: match f.opt_size(["n_inner", "feed_forward_length"])? {
                None if !f.is_gguf() => 4 * hidden_size, // null in the published config.json
                _ => f.size(["n_inner", "feed_forward_length"])?,
            },
            n_layers: f.n_layers(["n_layer", "block_count"])?,
            heads: Heads { n_heads, n_kv_heads: n_heads, head_dim: hidden_size / n_heads },
            layer_norm_eps: f.real(["layer_norm_epsilon", "attention.layer_norm_epsilon"])?,
            context_length: f.size(["n_positions", "context_length"])?,
            tied_head: f.tied_head(true)?,
        })
    }
}

struct Attention {
    layer: usize,
    heads: Heads,
    c_attn: Linear,
    c_proj: Linear,
}

impl Attention {
    fn new(c: &Config, layer: usize) -> Attention {
        let name = |part: &str| format!("transformer.h.{layer}.attn.{part}");
        Attention {
            layer,
            heads: c.heads,
            c_attn: Linear::new(&name("c_attn"), c.hidden_size, 3 * c.hidden_size, true),
            c_proj: Linear::new(&name("c_proj"), c.hidden_size, c.hidden_size, true),
        }
    }

    fn forward(&self, batch: &Batch, x: &Tensor) -> Tensor {
        let (n, Heads { n_heads, head_dim, .. }) = (batch.n_tokens, self.heads);
        let hidden = n_heads * head_dim;
        let qkv = self.c_attn.forward(batch, x); // (N, 3 hidden)
        let part = |i: usize| qkv.slice(1, i * hidden, (i + 1) * hidden).reshape(&[n, n_heads, head_dim]);
        let (q, k, v) = (part(0), part(1), part(2)); // (N, H, Dh)
        let y = batch.attend(self.layer, &q, &k, &v, scaled_dot_product(head_dim, None));
        self.c_proj.forward(batch, &y.reshape(&[n, hidden])) // (N, hidden)
    }
}

struct Mlp {
    c_fc: Linear,
    c_proj: Linear,
}

impl Mlp {
    fn new(c: &Config, layer: usize) -> Mlp {
        let name = |part: &str| format!("transformer.h.{layer}.mlp.{part}");
        Mlp {
            c_fc: Linear::new(&name("c_fc"), c.hidden_size, c.intermediate_size, true),
            c_proj: Linear::new(&name("c_proj"), c.intermediate_size, c.hidden_size, true),
        }
    }

    fn forward(&self, batch: &Batch, x: &Tensor) -> Tensor {
        let h = self.c_fc.forward(batch, x).gelu_tanh(); // (N, intermediate)
        self.c_proj.forward(batch, &h)
    }
}

struct Block {
    ln_1: LayerNorm,
    attn: Attention,
    ln_2: LayerNorm,
    mlp: Mlp,
}

impl Block {
    fn new(c: &Config, layer: usize) -> Block {
        let norm = |part: &str| {
            LayerNorm::new(&format!("transformer.h.{layer}.{part}"), c.hidden_size, c.layer_norm_eps)
        };
        Block {
            ln_1: norm("ln_1"),
            attn: Attention::new(c, layer),
            ln_2: norm("ln_2"),
            mlp: Mlp::new(c, layer),
        }
    }

    fn forward(&self, batch: &Batch, x: &Tensor) -> Tensor {
        let x = x + self.attn.forward(batch, &self.ln_1.forward(x));
        let mlp = self.mlp.forward(batch, &self.ln_2.forward(&x));
        x + mlp
    }
}

impl Config {
    fn wte(&self) -> Embedding {
        Embedding::new("transformer.wte", self.vocab_size, self.hidden_size)
    }
}

impl Architecture for Config {
    fn embed(&self, t: &Trace, batch: &Batch) -> Tensor {
        let wpe = Embedding::new("transformer.wpe", self.context_length, self.hidden_size);
        self.wte().forward(&batch.tokens(t)) + wpe.forward(&batch.positions(t)) // (N, hidden)
    }

    fn block(&self, batch: &Batch, layer: usize, x: &Tensor) -> Tensor {
        Block::new(self, layer).forward(batch, x)
    }

    fn head(&self, batch: &Batch, x: &Tensor) -> Tensor {
        let x = batch.select_logit_rows(x); // (R, hidden)
        let x = LayerNorm::new("transformer.ln_f", self.hidden_size, self.layer_norm_eps).forward(&x);
        let head = match self.tied_head {
            true => self.wte().tied_head(),
            false => Linear::new("lm_head", self.hidden_size, self.vocab_size, false),
        };
        head.forward(batch, &x) // (R, vocab)
    }

    fn ropes(&self) -> Vec<Rope> {
        Vec::new()
    }

    fn facts(&self) -> Facts {
        Facts {
            architecture: "gpt2",
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            heads: self.heads,
            windows: vec![None; self.n_layers],
            context_length: self.context_length,
            tied_head: self.tied_head,
        }
    }

    fn rules(&self) -> Vec<Rule> {
        let conv1d = |name, gguf| Rule::new(name, gguf).from_hf(Transform::Transpose);
        vec![
            Rule::new("transformer.wte.weight", "token_embd.weight"),
            Rule::new("transformer.wpe.weight", "position_embd.weight"),
            Rule::new("transformer.h.{}.ln_1.weight", "blk.{}.attn_norm.weight"),
            Rule::new("transformer.h.{}.ln_1.bias", "blk.{}.attn_norm.bias"),
            conv1d("transformer.h.{}.attn.c_attn.weight", "blk.{}.attn_qkv.weight"),
            Rule::new("transformer.h.{}.attn.c_attn.bias", "blk.{}.attn_qkv.bias"),
            conv1d("transformer.h.{}.attn.c_proj.weight", "blk.{}.attn_output.weight"),
            Rule::new("transformer.h.{}.attn.c_proj.bias", "blk.{}.attn_output.bias"),
            Rule::new("transformer.h.{}.ln_2.weight", "blk.{}.ffn_norm.weight"),
            Rule::new("transformer.h.{}.ln_2.bias", "blk.{}.ffn_norm.bias"),
            conv1d("transformer.h.{}.mlp.c_fc.weight", "blk.{}.ffn_up.weight"),
            Rule::new("transformer.h.{}.mlp.c_fc.bias", "blk.{}.ffn_up.bias"),
            conv1d("transformer.h.{}.mlp.c_proj.weight", "blk.{}.ffn_down.weight"),
            Rule::new("transformer.h.{}.mlp.c_proj.bias", "blk.{}.ffn_down.bias"),
            Rule::new("transformer.ln_f.weight", "output_norm.weight"),
            Rule::new("transformer.ln_f.bias", "output_norm.bias"),
            Rule::new("lm_head.weight", "output.weight"),
        ]
    }

    /// The published files are those of the model without its head: no `transformer.` before each name.
    fn aliases(&self, name: &str) -> Vec<String> {
        name.strip_prefix("transformer.").map(str::to_string).into_iter().collect()
    }

    /// The causal mask, which old checkpoints hold as a buffer of each layer.
    fn ignores(&self, source_name: &str) -> bool {
        source_name.ends_with(".attn.bias") || source_name.ends_with(".attn.masked_bias")
    }
}
