//! A model: its configuration, what tracing it gives, and the weights that it wants from its files.

use crate::adapter::Adapter;
use crate::config::{Fields, Heads};
use crate::names::{self, Rule};
use crate::nn::Batch;
use crate::rope::Rope;
use crate::{Error, gemma3, gpt2, llama, qwen2, qwen3};
use sparsam_formats::{Kind, Source, Transform};
use sparsam_ir::{DType, Graph, Op, Tensor, Trace};
use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

/// What a model file implements. A configuration *is* the model: weights are bound by name when a graph runs.
pub trait Architecture {
    /// Tokens to activations (N, hidden_size).
    fn embed(&self, t: &Trace, batch: &Batch) -> Tensor;
    /// One layer: (N, hidden_size) to the same.
    fn block(&self, batch: &Batch, layer: usize, x: &Tensor) -> Tensor;
    /// Activations after the last layer to logits (R, vocab_size).
    fn head(&self, batch: &Batch, x: &Tensor) -> Tensor;
    /// The rotary embeddings, whose frequencies are constants of the graph.
    fn ropes(&self) -> Vec<Rope>;
    /// Sizes that all architectures have.
    fn facts(&self) -> Facts;
    /// The map of weight names.
    fn rules(&self) -> Vec<Rule>;
    /// Other names under which a safetensors file may hold the weight `name`.
    fn aliases(&self, _name: &str) -> Vec<String> {
        Vec::new()
    }
    /// Whether a file may hold this tensor though the model does not use it.
    fn ignores(&self, _source_name: &str) -> bool {
        false
    }
}

/// Sizes that all architectures have.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// The architecture's name: `llama`.
    pub architecture: &'static str,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Channels of the residual stream.
    pub hidden_size: usize,
    /// Channels inside the MLP.
    pub intermediate_size: usize,
    /// Heads of every layer.
    pub heads: Heads,
    /// The sliding window of each layer, in tokens; `None`: the whole context.
    pub windows: Vec<Option<usize>>,
    /// Tokens that the model was made for.
    pub context_length: usize,
    /// The head shares the embedding table.
    pub tied_head: bool,
}

impl Facts {
    /// Number of layers.
    pub fn n_layers(&self) -> usize {
        self.windows.len()
    }

    /// Bytes that one token takes in a cache of element type `dtype`, all layers together (sliding windows included:
    /// the pool keeps every token); `None` if a head is no whole number of that type's blocks. SmolLM2-135M in F16:
    /// 30 layers * 2 * 3 heads * 64 * 2 bytes = 23040.
    pub fn cache_bytes_per_token(&self, dtype: DType) -> Option<usize> {
        Some(2 * self.n_layers() * self.heads.n_kv_heads * dtype.bytes_for(self.heads.head_dim)?)
    }

    /// Multiplications and additions of attention's two products for one token that sees `context` tokens.
    pub fn attention_flops_per_token(&self, context: usize) -> f64 {
        let keys = self.windows.iter().map(|w| w.map_or(context, |w| w.min(context)) as f64).sum::<f64>();
        4.0 * (self.heads.n_heads * self.heads.head_dim) as f64 * keys
    }
}

/// The configuration of any model that is implemented here.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // each is what its module describes
pub enum Config {
    Llama(llama::Config),
    Qwen2(qwen2::Config),
    Qwen3(qwen3::Config),
    Gemma3(gemma3::Config),
    Gpt2(gpt2::Config),
}

/// Names of architectures as files give them (`model_type` in `config.json`, `general.architecture` in GGUF).
const KNOWN: [&str; 7] = ["gemma3", "gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3"];

impl Config {
    /// The configuration of a model, from GGUF metadata or `config.json`.
    ///
    /// # Errors
    /// If the architecture is not known, or a field is missing, malformed, not implemented or contradicts another; the
    /// message names file and field.
    pub fn from_source(source: &Source) -> Result<Config, Error> {
        let (f, name) = Fields::open(source)?;
        Ok(match name.as_str() {
            "llama" | "mistral" => Config::Llama(llama::Config::read(&f)?),
            "qwen2" => Config::Qwen2(qwen2::Config::read(&f)?),
            "qwen3" => Config::Qwen3(qwen3::Config::read(&f)?),
            "gemma3" | "gemma3_text" => Config::Gemma3(gemma3::Config::read(&f.descend("text_config"))?),
            "gpt2" => Config::Gpt2(gpt2::Config::read(&f)?),
            _ => {
                return Err(Error::UnknownArchitecture {
                    file: f.path(),
                    found: name,
                    known: KNOWN.join(", "),
                });
            }
        })
    }

    fn architecture(&self) -> &dyn Architecture {
        match self {
            Config::Llama(c) => c,
            Config::Qwen2(c) => c,
            Config::Qwen3(c) => c,
            Config::Gemma3(c) => c,
            Config::Gpt2(c) => c,
        }
    }

    /// Sizes that all architectures have.
    pub fn facts(&self) -> Facts {
        self.architecture().facts()
    }
}

/// A parameter, as the traced model asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Hugging Face's name.
    pub name: String,
    /// Row-major; (out, in) for every linear layer.
    pub shape: Vec<usize>,
}

/// Where the value of a parameter comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightSpec {
    /// Hugging Face's name, which the graph binds.
    pub name: String,
    /// The shape that the graph wants.
    pub shape: Vec<usize>,
    /// The tensor's name in the file.
    pub source_name: String,
    /// From the file's layout to the graph's.
    pub transform: Transform,
}

/// A leaf of the graph that is bound like a weight, but computed from the configuration and never trained.
#[derive(Clone, Debug, PartialEq)]
pub struct Constant {
    /// The name that the graph binds.
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    /// The values.
    pub data: Vec<f32>,
}

/// A model that can be traced, whole or in parts.
///
/// The parts compose to the whole: `head(block(n - 1, .. block(0, embed)))`.
#[derive(Clone, Debug)]
pub struct Model {
    config: Config,
    adapters: Arc<[Adapter]>,
}

/// A linear layer that adapters may be added to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearLayer {
    /// The name of its module: its weight is `{module}.weight`, (n_out, n_in).
    pub module: String,
    /// Channels of its input.
    pub n_in: usize,
    /// Channels of its output.
    pub n_out: usize,
}

impl Model {
    /// The model of this configuration.
    pub fn new(config: Config) -> Model {
        Model { config, adapters: Arc::default() }
    }

    /// The same model with these adapters and no others: their weights are asked for beside its own.
    ///
    /// # Errors
    /// If it has no linear layer of a name that an adapter has.
    pub fn with_adapters(self, adapters: Vec<Adapter>) -> Result<Model, Error> {
        let layers = self.linear_layers()?;
        let foreign =
            |a: &Adapter| a.modules().keys().find(|m| layers.iter().all(|l| l.module != **m)).cloned();
        if let Some(module) = adapters.iter().find_map(foreign) {
            return Err(Error::Adapter { module, architecture: self.facts().architecture });
        }
        Ok(Model { adapters: adapters.into(), ..self })
    }

    /// Its adapters.
    pub fn adapters(&self) -> &[Adapter] {
        &self.adapters
    }

    /// The linear layers of all blocks, in order; the head is none of them.
    ///
    /// # Errors
    /// If the configuration's shapes do not fit together.
    pub fn linear_layers(&self) -> Result<Vec<LinearLayer>, Error> {
        let graph = self.sketch()?;
        let layer = |node: &sparsam_ir::Node| match (&node.op, node.inputs.get(1).map(|w| graph.node(*w))) {
            (Op::Matmul { .. }, Some(w)) => match &w.op {
                Op::Weight { name, shape, .. } => Some(LinearLayer {
                    module: name.strip_suffix(".weight")?.to_string(),
                    n_in: shape[1],
                    n_out: shape[0],
                }),
                _ => None,
            },
            _ => None,
        };
        let mut layers: Vec<LinearLayer> = graph.nodes.iter().filter_map(layer).collect();
        layers.pop(); // the head comes last
        Ok(layers)
    }

    /// The weights of its adapters, in the order in which the model uses them.
    ///
    /// # Errors
    /// If the configuration's shapes do not fit together.
    pub fn adapter_parameters(&self) -> Result<Vec<Parameter>, Error> {
        let of = |l: &LinearLayer| {
            let pairs = self.adapters.iter().filter_map(|a| a.parameters(&l.module, l.n_in, l.n_out));
            pairs.flatten().collect::<Vec<_>>()
        };
        Ok(self.linear_layers()?.iter().flat_map(of).collect())
    }

    /// `batch` with the model's adapters.
    fn adapted<'a>(&self, batch: &'a Batch) -> Cow<'a, Batch> {
        match self.adapters.is_empty() {
            true => Cow::Borrowed(batch),
            false => Cow::Owned(Batch { adapters: self.adapters.clone(), ..batch.clone() }),
        }
    }

    /// Its configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Sizes that all architectures have.
    pub fn facts(&self) -> Facts {
        self.config.facts()
    }

    /// Tokens to logits (R, vocab_size). The activations after layer `i` are tapped as `hidden.{i}`.
    pub fn trace(&self, t: &Trace, batch: &Batch) -> Tensor {
        let mut x = self.embed(t, batch);
        for layer in 0..self.facts().n_layers() {
            x = self.block(batch, layer, &x).tap(&format!("hidden.{layer}"));
        }
        self.head(batch, &x)
    }

    /// Tokens to activations (N, hidden_size).
    pub fn embed(&self, t: &Trace, batch: &Batch) -> Tensor {
        self.config.architecture().embed(t, &self.adapted(batch))
    }

    /// Layer `layer`: activations (N, hidden_size) to the same.
    pub fn block(&self, batch: &Batch, layer: usize, x: &Tensor) -> Tensor {
        self.config.architecture().block(&self.adapted(batch), layer, x)
    }

    /// Activations after the last layer to logits (R, vocab_size).
    pub fn head(&self, batch: &Batch, x: &Tensor) -> Tensor {
        self.config.architecture().head(&self.adapted(batch), x)
    }

    /// The map of weight names.
    pub fn rules(&self) -> Vec<Rule> {
        self.config.architecture().rules()
    }

    /// The constants that a graph of this model binds beside its weights.
    pub fn constants(&self) -> Vec<Constant> {
        let constant = |rope: &Rope| Constant {
            name: rope.name().to_string(),
            shape: vec![rope.inv_freq().len()],
            data: rope.inv_freq().to_vec(),
        };
        self.config.architecture().ropes().iter().map(constant).collect()
    }

    /// All parameters in the order in which the model uses them, those of adapters left out: what the trace asks for, so never out of step with it.
    ///
    /// # Errors
    /// If the configuration's shapes do not fit together.
    pub fn parameters(&self) -> Result<Vec<Parameter>, Error> {
        let constants: HashSet<String> = self.constants().into_iter().map(|c| c.name).collect();
        let of = |graph: Graph| {
            let weights = graph.nodes.into_iter().filter_map(|node| match node.op {
                Op::Weight { name, shape, .. } if !constants.contains(&name) => {
                    Some(Parameter { name, shape })
                }
                _ => None,
            });
            weights.collect()
        };
        Ok(of(self.sketch()?))
    }

    /// Number of parameters; a table shared with the head counts once.
    pub fn n_parameters(&self) -> Result<usize, Error> {
        Ok(self.parameters()?.iter().map(|p| p.shape.iter().product::<usize>()).sum())
    }

    /// Multiplications and additions of one forward pass for one token that sees `context` tokens: two for each weight
    /// in a product (the head included, even if tied), and attention's.
    pub fn flops_per_token(&self, context: usize) -> Result<f64, Error> {
        let graph = self.sketch()?;
        let products = graph.nodes.iter().filter(|n| matches!(n.op, Op::Matmul { .. }));
        let weights: f64 = products.map(|n| graph.node(n.inputs[1]).numel() as f64).sum();
        Ok(2.0 * weights + self.facts().attention_flops_per_token(context))
    }

    /// The whole model for one token, without adapters.
    fn sketch(&self) -> Result<Graph, Error> {
        let t = Trace::new();
        let logits = Model::new(self.config.clone()).trace(&t, &Batch::packed(1));
        Ok(t.finish(&[("logits", &logits)])?)
    }

    /// Where each parameter lies in `source`, and in what layout.
    ///
    /// # Errors
    /// If a tensor is missing, has another shape than the configuration says, or has no place in the model.
    pub fn weights(&self, source: &Source) -> Result<Vec<WeightSpec>, Error> {
        let architecture = self.config.architecture();
        let rules = architecture.rules();
        let file = || source.path().to_path_buf();
        let mut specs = Vec::new();
        for Parameter { name, shape } in self.parameters()? {
            let (source_name, transform) = self.stored(&rules, source.kind(), &name);
            let mut candidates = vec![source_name.clone()];
            if source.kind() == Kind::Safetensors {
                candidates.extend(architecture.aliases(&name));
            }
            let Some(tensor) = candidates.iter().find_map(|c| source.tensor(c)) else {
                return Err(Error::MissingWeight { file: file(), name, source_name, shape });
            };
            let expected = transform.inverse().shape(&shape);
            let source_name = tensor.info.name.clone();
            if tensor.info.shape != expected {
                let found = tensor.info.shape.clone();
                return Err(Error::WeightShape { file: file(), source_name, expected, found });
            }
            specs.push(WeightSpec { name, shape, source_name, transform });
        }
        self.check_tied_head(source, &specs)?;
        let used: HashSet<&str> = specs.iter().map(|s| s.source_name.as_str()).collect();
        let extra: Vec<&str> = source
            .tensors()
            .iter()
            .map(|t| t.name.as_str())
            .filter(|n| !used.contains(n) && !ignored_everywhere(n) && !architecture.ignores(n))
            .collect();
        if let Some(first) = extra.first() {
            let architecture = self.facts().architecture;
            let (count, first) = (extra.len(), first.to_string());
            return Err(Error::ExtraWeights { file: file(), architecture, count, first });
        }
        Ok(specs)
    }

    /// A tied head may be stored a second time, but then it must be the table itself: another one means that the
    /// configuration is wrong.
    fn check_tied_head(&self, source: &Source, specs: &[WeightSpec]) -> Result<(), Error> {
        let names = ["lm_head.weight", "language_model.lm_head.weight"];
        let head = names.iter().find_map(|name| source.tensor(name)).filter(|_| self.facts().tied_head);
        // The first weight that any model asks for is its table of tokens.
        let table = specs.first().and_then(|table| source.tensor(&table.source_name));
        match (head, table) {
            (Some(head), Some(table)) if head.bytes != table.bytes => {
                let problem = format!(
                    "or its default ties the head to {}, but {} holds other values; set it to false, or take the tensor out",
                    table.info.name, head.info.name
                );
                let (file, key) = (source.path().to_path_buf(), "tie_word_embeddings".to_string());
                Err(Error::Config { file, key, problem })
            }
            _ => Ok(()),
        }
    }

    /// The name of a parameter in files of `kind`, and the way from that file's layout to the graph's; a writer goes
    /// the other way. `None` if there is no such parameter.
    pub fn stored_as(&self, kind: Kind, name: &str) -> Option<(String, Transform)> {
        let rules = self.config.architecture().rules();
        names::find(&rules, name)?;
        Some(self.stored(&rules, kind, name))
    }

    fn stored(&self, rules: &[Rule], kind: Kind, name: &str) -> (String, Transform) {
        let (rule, gguf) = names::find(rules, name)
            .unwrap_or_else(|| unreachable!("{name} is traced but missing in the map of names"));
        match kind {
            Kind::Gguf => (gguf, rule.from_gguf),
            Kind::Safetensors => (name.to_string(), rule.from_hf),
        }
    }
}

/// Tensors that files of any architecture may hold beside the weights: rotary frequencies (recomputed), and a copy of
/// a tied head.
fn ignored_everywhere(source_name: &str) -> bool {
    source_name.ends_with("rotary_emb.inv_freq")
        || source_name == "rope_freqs.weight"
        || source_name.ends_with("lm_head.weight")
}
