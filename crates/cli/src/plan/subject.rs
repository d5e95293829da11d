//! Which model an answer is about: a file, a well-known name, or a number of parameters.

use crate::model;
use anyhow::{Context, bail};
use sparsam_formats::Source;
use sparsam_models::{Config, Model};
use sparsam_plan::memory::{Rounding, Stored};
use sparsam_plan::shape::{self, Parameters, Shape};

/// The model in question.
#[derive(clap::Args)]
#[command(next_help_heading = "Model")]
pub struct Subject {
    /// A model: GGUF or safetensors file or folder, ORG/NAME of the hub's cache, or a well-known name such as
    /// llama-65b, gpt-3
    #[arg(value_name = "MODEL")]
    model: Option<String>,
    /// In place of a model: a Llama-like one of about so many parameters
    #[arg(long, value_name = "N", value_parser = super::parameters, allow_hyphen_values = true, conflicts_with = "model")]
    params: Option<f64>,
}

/// What is known of it.
pub struct Known {
    /// Its layers and widths.
    pub shape: Shape,
    /// Its parameters by kind.
    pub parameters: Parameters,
    /// Its tensors, if it is a file.
    pub stored: Option<Stored>,
}

impl Known {
    fn of(shape: Shape) -> Known {
        Known { parameters: shape.parameters(), shape, stored: None }
    }

    /// A Llama-like model of about `parameters`.
    ///
    /// # Errors
    /// Sizes for which there is no shape.
    pub fn sized(parameters: f64) -> Result<Known, sparsam_plan::Error> {
        Ok(Known::of(Shape::for_parameters(parameters)?))
    }

    /// In a line or two.
    pub fn describe(&self) -> String {
        let shape = self.shape.describe();
        match &self.stored {
            Some(stored) => format!("{}: {}; {shape}", self.shape.name, stored.describe()),
            None => format!(
                "{}: {} parameters; {shape}",
                self.shape.name,
                sparsam_plan::units::show_count(self.parameters.total())
            ),
        }
    }

    /// The bytes of its weights: as its file stores them, or as `rounding` would; with the name of that.
    pub fn weights(&self, rounding: Option<Rounding>) -> (f64, String) {
        match (&self.stored, rounding) {
            (Some(stored), None) => (stored.bytes, "as stored".into()),
            (_, rounding) => {
                let rounding = rounding.unwrap_or(Rounding::BF16);
                (rounding.weight_bytes(&self.parameters), rounding.name.into())
            }
        }
    }
}

impl Subject {
    /// The model that the flags name.
    ///
    /// # Errors
    /// If none is named; unknown names; files that cannot be read.
    pub fn known(&self) -> anyhow::Result<Known> {
        match (&self.model, self.params) {
            (Some(name), _) => by_name(name),
            (None, Some(parameters)) => Ok(Known::sized(parameters)?),
            (None, None) => bail!(
                "name a model (a file, or one of: {}), or give its size with --params",
                shape::known().iter().map(|s| s.name.clone()).collect::<Vec<_>>().join(", ")
            ),
        }
    }
}

/// A well-known shape, or the model in a file.
///
/// # Errors
/// If it is neither; the message names the nearest well-known shape.
pub fn by_name(name: &str) -> anyhow::Result<Known> {
    let path = match (model::resolve(name), shape::by_name(name)) {
        (Ok(path), _) => path,
        (Err(_), Ok(shape)) => return Ok(Known::of(shape)),
        // A plain word was meant as a well-known name; anything with a slash or a suffix as a file.
        (Err(_), Err(unknown)) if !name.contains(['/', '\\', '.']) => return Err(unknown.into()),
        (Err(missing), Err(_)) => return Err(missing),
    };
    let source = Source::open(&path)?;
    let config = Config::from_source(&source)?;
    let model = Model::new(config);
    let specs = model.weights(&source)?;
    let mut rows = Vec::new();
    for spec in &specs {
        let info = source.require(&spec.source_name)?.info;
        rows.push((spec.name.as_str(), info.numel() as f64, info.bytes_len() as f64, info.shape.len() > 1));
    }
    let file = path.file_name().unwrap_or_default().to_string_lossy().to_string();
    let shape = shape_of(&model, file);
    let stored = Stored::from_tensors(shape.clone(), rows).with_context(|| name.to_string())?;
    Ok(Known { shape, parameters: stored.parameters, stored: Some(stored) })
}

/// The shape of a model that this program knows how to run.
fn shape_of(model: &Model, name: String) -> Shape {
    let facts = model.facts();
    let gpt2 = matches!(model.config(), Config::Gpt2(_));
    Shape {
        name,
        n_layers: facts.n_layers() as u64,
        hidden_size: facts.hidden_size as u64,
        n_heads: facts.heads.n_heads as u64,
        n_kv_heads: facts.heads.n_kv_heads as u64,
        head_dim: facts.heads.head_dim as u64,
        intermediate_size: facts.intermediate_size as u64,
        vocab_size: facts.vocab_size as u64,
        gated: !gpt2,
        tied: facts.tied_head,
        learned_positions: if gpt2 { facts.context_length as u64 } else { 0 },
        relative_positions: false,
        biases: gpt2,
    }
}
