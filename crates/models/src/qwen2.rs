//! Qwen2 and Qwen2.5 (Yang et al. 2024, <https://arxiv.org/abs/2407.10671>, <https://arxiv.org/abs/2412.15115>).
//!
//! Differs from Llama: q, k and v have biases (o has none); where a sliding window is switched on, only the layers from
//! `max_window_layers` on slide.

use crate::Error;
use crate::config::{Fields, Heads};
use crate::llama::Mlp;
use crate::model::{Architecture, Facts};
use crate::names::Rule;
use crate::nn::{Batch, Embedding, Linear, RmsNorm, scaled_dot_product};
use crate::rope::{Rope, RopeConfig};
use sparsam_ir::{Tensor, Trace};

/// Sizes and switches of a Qwen2.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // named as in config.json
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub n_layers: usize,
    pub heads: Heads,
    pub rms_norm_eps: f64,
    pub context_length: usize,
    pub rope: RopeConfig,
    /// Keys that a token sees in each layer, itself included; `None`: all before it.
    pub windows: Vec<Option<usize>>,
    /// The head shares the embedding table.
    pub tied_head: bool,
}

/// The window of each layer: off unless `use_sliding_window`, and then on from `max_window_layers` on, or in the layers
/// that a list names. GGUF files of other programs have no windows for Qwen; ours have the list.
pub(crate) fn windows(f: &Fields, n_layers: usize) -> Result<Vec<Option<usize>>, Error> {
    let key = ["sliding_window", "attention.sliding_window"];
    let on = if f.is_gguf() {
        f.opt_size(key)?.is_some()
    } else {
        f.flag(["use_sliding_window", ""])? == Some(true)
    };
    if !on {
        return Ok(vec![None; n_layers]);
    }
    let window = f.size(key)?;
    let listed = f.is_gguf() || f.has(["layer_types", ""]);
    let first = if listed { n_layers } else { f.index(["max_window_layers", ""])? };
    f.windows(n_layers, Some(window), |layer| layer >= first)
}

impl Config {
    pub(crate) fn read(f: &Fields) -> Result<Config, Error> {
        f.only(["hidden_act", ""], &["silu"])?;
        let hidden_size = f.size(["hidden_size", "embedding_length"])?;
        let context_length = f.size(["max_position_embeddings", "context_length"])?;
        let heads = f.heads(hidden_size, None)?;
        let n_layers = f.n_layers(["num_hidden_layers", "block_count"])?;
        Ok(Config {
            vocab_size: f.vocab_size(None)?,
            hidden_size,
            intermediate_size: f.size(["intermediate_size", "feed_forward_length"])?,
            n_layers,
            heads,
            rms_norm_eps: f.real(["rms_norm_eps", "attention.layer_norm_rms_epsilon"])?,
            context_length,
            rope: f.rope("full_attention", &heads, context_length)?,
            windows: windows(f, n_layers)?,
            tied_head: f.tied_head(false)?,
        })
    }
}

struct Attention {
    layer: usize,
    heads: Heads,
    window: Option<usize>,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    rope: Rope,
}

impl Attention {
    fn new(c: &Config, layer: usize) -> Attention {
        let Heads { n_heads, n_kv_heads, head_dim } = c.heads;
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        Attention {
            layer,
            heads: c.heads,
            window: c.windows[layer],
            q_proj: Linear::new(&name("q_proj"), c.hidden_size, n_heads * head_dim, true),
            k_proj: Linear::new(&name("k_proj"), c.hidden_size, n_kv_heads * head_dim, true),
            v_proj: Linear::new(&name("v_proj"), c.hidden_size, n_kv_heads * head_dim, true),
            o_proj: Linear::new(&name("o_proj"), n_heads * head_dim, c.hidden_size, false),
            rope: c.rope(),
        }
    }

    fn forward(&self, batch: &Batch, x: &Tensor) -> Tensor {
        let (n, Heads { n_heads, n_kv_heads, head_dim }) = (batch.n_tokens, self.heads);
        let q = self.q_proj.forward(batch, x).reshape(&[n, n_heads, head_dim]); // (N, H, Dh)
        let k = self.k_proj.forward(batch, x).reshape(&[n, n_kv_heads, head_dim]); // (N, Hkv, Dh)
        let v = self.v_proj.forward(batch, x).reshape(&[n, n_kv_heads, head_dim]);
        let [q, k] = self.rope.rotate(batch, [&q, &k]);
        let scores = scaled_dot_product(head_dim, self.window);
        let y = batch.attend(self.layer, &q, &k, &v, scores); // (N, H, Dh)
        self.o_proj.forward(batch, &y.reshape(&[n, n_heads * head_dim])) // (N, hidden)
    }
}

struct Block {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl Block {
    fn new(c: &Config, layer: usize) -> Block {
        let norm =
            |part: &str| RmsNorm::new(&format!("model.layers.{layer}.{part}"), c.hidden_size, c.rms_norm_eps);
        Block {
            input_layernorm: norm("input_layernorm"),
            self_attn: Attention::new(c, layer),
            post_attention_layernorm: norm("post_attention_layernorm"),
            mlp: Mlp::new(layer, c.hidden_size, c.intermediate_size, false),
        }
    }

    fn forward(&self, batch: &Batch, x: &Tensor) -> Tensor {
        let x = x + self.self_attn.forward(batch, &self.input_layernorm.forward(x));
        let mlp = self.mlp.forward(batch, &self.post_attention_layernorm.forward(&x));
        x + mlp
    }
}

impl Config {
    fn embed_tokens(&self) -> Embedding {
        Embedding::new("model.embed_tokens", self.vocab_size, self.hidden_size)
    }

    fn rope(&self) -> Rope {
        Rope::new("model.rotary_emb.inv_freq", self.heads.head_dim, &self.rope)
    }
}

impl Architecture for Config {
    fn embed(&self, t: &Trace, batch: &Batch) -> Tensor {
        self.embed_tokens().forward(&batch.tokens(t)) // (N, hidden)
    }

    fn block(&self, batch: &Batch, layer: usize, x: &Tensor) -> Tensor {
        Block::new(self, layer).forward(batch, x)
    }

    fn head(&self, batch: &Batch, x: &Tensor) -> Tensor {
        let x = batch.select_logit_rows(x); // (R, hidden)
        let x = RmsNorm::new("model.norm", self.hidden_size, self.rms_norm_eps).forward(&x);
        let head = match self.tied_head {
            true => self.embed_tokens().tied_head(),
            false => Linear::new("lm_head", self.hidden_size, self.vocab_size, false),
        };
        head.forward(batch, &x) // (R, vocab)
    }

    fn ropes(&self) -> Vec<Rope> {
        vec![self.rope()]
    }

    fn facts(&self) -> Facts {
        Facts {
            architecture: "qwen2",
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            heads: self.heads,
            windows: self.windows.clone(),
            context_length: self.context_length,
            tied_head: self.tied_head,
        }
    }

    fn rules(&self) -> Vec<Rule> {
        vec![
            Rule::new("model.embed_tokens.weight", "token_embd.weight"),
            Rule::new("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
            Rule::new("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
            Rule::new("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
            Rule::new("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
            Rule::new("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
            Rule::new("model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
            Rule::new("model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
            Rule::new("model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
            Rule::new("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
            Rule::new("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
            Rule::new("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
            Rule::new("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
            Rule::new("model.norm.weight", "output_norm.weight"),
            Rule::new("lm_head.weight", "output.weight"),
        ]
    }
}
