//! Gemma 3, text (Gemma Team 2025, <https://arxiv.org/abs/2503.19786>; soft caps: Gemma 2, <https://arxiv.org/abs/2408.00118>).
//!
//! Differs from Llama: five local layers (sliding window, rotary base 10000) for each global one (base 1e6, the only
//! one that is stretched); norms before and after attention and MLP, and on q and k per head, with the factor
//! `1 + weight`; embeddings times `sqrt(hidden_size)`; GELU in the MLP; scores scaled by `query_pre_attn_scalar`.

use crate::Error;
use crate::config::{Fields, Heads};
use crate::model::{Architecture, Facts};
use crate::names::Rule;
use crate::nn::{Batch, Embedding, Linear, RmsNorm};
use crate::rope::{Rope, RopeConfig, Scaling};
use sparsam_formats::Transform;
use sparsam_ir::{AttentionScores, DType, Tensor, Trace};

/// Sizes and switches of a Gemma 3.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // named as in config.json
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub heads: Heads,
    pub rms_norm_eps: f64,
    pub context_length: usize,
    /// The rotary embedding of global and of local layers.
    pub rope_global: RopeConfig,
    pub rope_local: RopeConfig,
    /// Keys that a token sees in each layer, itself included; `None`: all before it, a global layer.
    pub windows: Vec<Option<usize>>,
    /// Scores are `q.k / sqrt(query_pre_attn_scalar)`.
    pub query_pre_attn_scalar: f64,
    /// Biases on q, k, v and o.
    pub attention_bias: bool,
    pub attn_logit_softcapping: Option<f64>,
    pub final_logit_softcapping: Option<f64>,
    /// The head shares the embedding table.
    pub tied_head: bool,
}

/// What the published configurations leave out because transformers' `Gemma3TextConfig` defines it.
const HEADS: Heads = Heads { n_heads: 8, n_kv_heads: 4, head_dim: 256 };
const VOCAB_SIZE: usize = 262_208;
/// One layer in this many is global (Gemma 3 report, section 2).
const PATTERN: usize = 6;
/// Layers of the 27B model, the only one whose scores are not scaled by `head_dim`; published GGUF files do not say it.
const LAYERS_27B: usize = 62;

/// The `query_pre_attn_scalar` of a GGUF file that does not say: `head_dim`, but for the 27B model.
pub(crate) fn implied_scalar(n_layers: usize, hidden_size: usize, heads: &Heads) -> f64 {
    match n_layers {
        LAYERS_27B => hidden_size as f64 / heads.n_heads as f64,
        _ => heads.head_dim as f64,
    }
}

impl Config {
    pub(crate) fn read(f: &Fields) -> Result<Config, Error> {
        f.only(["hidden_activation", ""], &["gelu_pytorch_tanh"])?;
        f.only_flag(["use_bidirectional_attention", ""], false)?;
        let hidden_size = f.size(["hidden_size", "embedding_length"])?;
        let n_layers = f.n_layers(["num_hidden_layers", "block_count"])?;
        let heads = f.heads(hidden_size, Some(HEADS))?;
        let context_length = match f.opt_size(["max_position_embeddings", "context_length"])? {
            None if !f.is_gguf() => 131_072, // Gemma3TextConfig again
            _ => f.size(["max_position_embeddings", "context_length"])?,
        };
        let window = f.opt_size(["sliding_window", "attention.sliding_window"])?;
        let window = if f.is_gguf() { window } else { Some(window.unwrap_or(4096)) }; // Gemma3TextConfig
        let pattern = f.window_pattern(PATTERN)?;
        let rope_local = match f.opt_real(["rope_local_base_freq", "rope.freq_base_swa"])? {
            Some(base) => RopeConfig { base, scaling: Scaling::None },
            None if f.is_gguf() => RopeConfig { base: 10000.0, scaling: Scaling::None },
            None => f.rope("sliding_attention", &heads, context_length)?,
        };
        let scalar_key = ["query_pre_attn_scalar", "attention.query_pre_attn_scalar"];
        let scalar = match f.opt_real(scalar_key)? {
            Some(0.0) => return Err(f.error(scalar_key, "is 0; scores are divided by its root")),
            Some(scalar) => scalar,
            None if f.is_gguf() => implied_scalar(n_layers, hidden_size, &heads),
            None => 256.0, // Gemma3TextConfig
        };
        // 0 is how GGUF files say that there is none.
        let cap = |key| Ok::<_, Error>(f.opt_real([key, key])?.filter(|&cap| cap != 0.0));
        Ok(Config {
            vocab_size: f.vocab_size(Some(VOCAB_SIZE))?,
            hidden_size,
            intermediate_size: f.size(["intermediate_size", "feed_forward_length"])?,
            heads,
            rms_norm_eps: match f.opt_real(["rms_norm_eps", "attention.layer_norm_rms_epsilon"])? {
                None if !f.is_gguf() => 1e-6, // Gemma3TextConfig
                _ => f.real(["rms_norm_eps", "attention.layer_norm_rms_epsilon"])?,
            },
            context_length,
            rope_global: f.rope("full_attention", &heads, context_length)?,
            rope_local,
            windows: f.windows(n_layers, window, |layer| (layer + 1) % pattern != 0)?,
            query_pre_attn_scalar: scalar,
            attention_bias: f.bias("attention_bias", "blk.0.attn_q.bias")?,
            attn_logit_softcapping: cap("attn_logit_softcapping")?,
            final_logit_softcapping: cap("final_logit_softcapping")?,
            tied_head: f.tied_head(true)?,
        })
    }
}

struct Attention {
    layer: usize,
    heads: Heads,
    scores: AttentionScores,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    rope: Rope,
}

impl Attention {
    fn new(c: &Config, layer: usize) -> Attention {
        let Heads { n_heads, n_kv_heads, head_dim } = c.heads;
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let linear = |part: &str, n_in, n_out| Linear::new(&name(part), n_in, n_out, c.attention_bias);
        Attention {
            layer,
            heads: c.heads,
            scores: AttentionScores {
                scale: 1.0 / c.query_pre_attn_scalar.sqrt(),
                window: c.windows[layer],
                softcap: c.attn_logit_softcapping,
            },
            q_proj: linear("q_proj", c.hidden_size, n_heads * head_dim),
            k_proj: linear("k_proj", c.hidden_size, n_kv_heads * head_dim),
            v_proj: linear("v_proj", c.hidden_size, n_kv_heads * head_dim),
            o_proj: linear("o_proj", n_heads * head_dim, c.hidden_size),
            q_norm: RmsNorm::one_plus(&name("q_norm"), head_dim, c.rms_norm_eps),
            k_norm: RmsNorm::one_plus(&name("k_norm"), head_dim, c.rms_norm_eps),
            rope: if c.windows[layer].is_some() { c.rope_local() } else { c.rope_global() },
        }
    }

    fn forward(&self, batch: &Batch, x: &Tensor) -> Tensor {
        let (n, Heads { n_heads, n_kv_heads, head_dim }) = (batch.n_tokens, self.heads);
        let q = self.q_proj.forward(batch, x).reshape(&[n, n_heads, head_dim]); // (N, H, Dh)
        let k = self.k_proj.forward(batch, x).reshape(&[n, n_kv_heads, head_dim]); // (N, Hkv, Dh)
        let v = self.v_proj.forward(batch, x).reshape(&[n, n_kv_heads, head_dim]);
        let (q, k) = (self.q_norm.forward(&q), self.k_norm.forward(&k));
        let [q, k] = self.rope.rotate(batch, [&q, &k]);
        let y = batch.attend(self.layer, &q, &k, &v, self.scores); // (N, H, Dh)
        self.o_proj.forward(batch, &y.reshape(&[n, n_heads * head_dim])) // (N, hidden)
    }
}

/// GeGLU (Shazeer 2020): `down(gelu(gate(x)) * up(x))`.
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    fn new(c: &Config, layer: usize) -> Mlp {
        let name = |part: &str| format!("model.layers.{layer}.mlp.{part}");
        Mlp {
            gate_proj: Linear::new(&name("gate_proj"), c.hidden_size, c.intermediate_size, false),
            up_proj: Linear::new(&name("up_proj"), c.hidden_size, c.intermediate_size, false),
            down_proj: Linear::new(&name("down_proj"), c.intermediate_size, c.hidden_size, false),
        }
    }

    fn forward(&self, batch: &Batch, x: &Tensor) -> Tensor {
        let gate = self.gate_proj.forward(batch, x).gelu_tanh(); // (N, intermediate)
        self.down_proj.forward(batch, &(gate * self.up_proj.forward(batch, x)))
    }
}

struct Block {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    pre_feedforward_layernorm: RmsNorm,
    mlp: Mlp,
    post_feedforward_layernorm: RmsNorm,
}

impl Block {
    fn new(c: &Config, layer: usize) -> Block {
        let norm = |part: &str| {
            RmsNorm::one_plus(&format!("model.layers.{layer}.{part}"), c.hidden_size, c.rms_norm_eps)
        };
        Block {
            input_layernorm: norm("input_layernorm"),
            self_attn: Attention::new(c, layer),
            post_attention_layernorm: norm("post_attention_layernorm"),
            pre_feedforward_layernorm: norm("pre_feedforward_layernorm"),
            mlp: Mlp::new(c, layer),
            post_feedforward_layernorm: norm("post_feedforward_layernorm"),
        }
    }

    fn forward(&self, batch: &Batch, x: &Tensor) -> Tensor {
        let y = self.self_attn.forward(batch, &self.input_layernorm.forward(x));
        let x = x + self.post_attention_layernorm.forward(&y);
        let y = self.mlp.forward(batch, &self.pre_feedforward_layernorm.forward(&x));
        x + self.post_feedforward_layernorm.forward(&y)
    }
}

impl Config {
    fn embed_tokens(&self) -> Embedding {
        Embedding::new("model.embed_tokens", self.vocab_size, self.hidden_size)
    }

    fn rope_global(&self) -> Rope {
        Rope::new("model.rotary_emb.inv_freq", self.heads.head_dim, &self.rope_global)
    }

    fn rope_local(&self) -> Rope {
        Rope::new("model.rotary_emb_local.inv_freq", self.heads.head_dim, &self.rope_local)
    }
}

impl Architecture for Config {
    fn embed(&self, t: &Trace, batch: &Batch) -> Tensor {
        let embed_tokens = self.embed_tokens();
        // transformers rounds the factor to the table's type: sqrt(3072) = 55.4256 is 55.5 beside a bf16 table.
        let scale = (self.hidden_size as f64).sqrt();
        let scale = match embed_tokens.dtype(t) {
            DType::BF16 => sparsam_dtype::bf16::from_f64(scale).to_f64(),
            DType::F16 => sparsam_dtype::f16::from_f64(scale).to_f64(),
            _ => scale as f32 as f64,
        };
        embed_tokens.forward(&batch.tokens(t)).mul_scalar(scale) // (N, hidden)
    }

    fn block(&self, batch: &Batch, layer: usize, x: &Tensor) -> Tensor {
        Block::new(self, layer).forward(batch, x)
    }

    fn head(&self, batch: &Batch, x: &Tensor) -> Tensor {
        let x = batch.select_logit_rows(x); // (R, hidden)
        let x = RmsNorm::one_plus("model.norm", self.hidden_size, self.rms_norm_eps).forward(&x);
        let head = match self.tied_head {
            true => self.embed_tokens().tied_head(),
            false => Linear::new("lm_head", self.hidden_size, self.vocab_size, false),
        };
        let logits = head.forward(batch, &x); // (R, vocab)
        match self.final_logit_softcapping {
            Some(cap) => logits.mul_scalar(1.0 / cap).tanh().mul_scalar(cap),
            None => logits,
        }
    }

    fn ropes(&self) -> Vec<Rope> {
        vec![self.rope_global(), self.rope_local()]
    }

    fn facts(&self) -> Facts {
        Facts {
            architecture: "gemma3",
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            heads: self.heads,
            windows: self.windows.clone(),
            context_length: self.context_length,
            tied_head: self.tied_head,
        }
    }

    /// llama.cpp stores the factor of each norm, `1 + weight`; it is read back into the weight.
    fn rules(&self) -> Vec<Rule> {
        let norm = |name, gguf| Rule::new(name, gguf).from_gguf(Transform::SubtractOne);
        vec![
            Rule::new("model.embed_tokens.weight", "token_embd.weight"),
            norm("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
            Rule::new("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
            Rule::new("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
            Rule::new("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
            Rule::new("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
            Rule::new("model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
            Rule::new("model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
            Rule::new("model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
            Rule::new("model.layers.{}.self_attn.o_proj.bias", "blk.{}.attn_output.bias"),
            norm("model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
            norm("model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
            norm("model.layers.{}.post_attention_layernorm.weight", "blk.{}.post_attention_norm.weight"),
            norm("model.layers.{}.pre_feedforward_layernorm.weight", "blk.{}.ffn_norm.weight"),
            Rule::new("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
            Rule::new("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
            Rule::new("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
            norm("model.layers.{}.post_feedforward_layernorm.weight", "blk.{}.post_ffw_norm.weight"),
            norm("model.norm.weight", "output_norm.weight"),
            Rule::new("lm_head.weight", "output.weight"),
        ]
    }

    /// Checkpoints that also see keep the text model one level down: `language_model.model.` in the first ones,
    /// `model.language_model.` in those saved by transformers 4.52 and later.
    fn aliases(&self, name: &str) -> Vec<String> {
        let inner = name.strip_prefix("model.").map(|rest| format!("model.language_model.{rest}"));
        [format!("language_model.{name}")].into_iter().chain(inner).collect()
    }

    fn ignores(&self, source_name: &str) -> bool {
        let name = source_name.strip_prefix("model.").unwrap_or(source_name);
        name.starts_with("vision_tower.") || name.starts_with("multi_modal_projector.")
    }
}
