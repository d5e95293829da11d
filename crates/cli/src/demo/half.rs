//! A student of half the depth: every second block of its teacher (Sanh et al. 2019, DistilBERT, section 3).

use anyhow::{Context, bail};
use sparsam_dtype::DType;
use sparsam_engine::{Opened, Plan, Saver};
use sparsam_formats::Kind;
use sparsam_models::{Config, Model};
use std::path::Path;

/// Writes the model's every second block, with its embeddings and head, to the GGUF file `out`; gives its parameters and
/// those of the whole.
///
/// # Errors
/// If the model has one block only, or the file cannot be written.
pub fn write(opened: &Opened, out: &Path) -> anyhow::Result<(usize, usize)> {
    let n_layers = opened.model.facts().n_layers();
    if n_layers < 2 {
        bail!("a model with {n_layers} block cannot be halved");
    }
    let student = Model::new(halved(opened.model.config(), n_layers / 2));
    let plan = Plan::uniform(&student, Kind::Gguf, DType::F32)?;
    let mut saver = Saver::create(out, Kind::Gguf, &student, opened.tokenizer.as_ref(), &plan)?;
    let specs = opened.model.weights(&opened.source)?;
    for parameter in student.parameters()? {
        let name = doubled(&parameter.name);
        let spec = specs.iter().find(|s| s.name == name).with_context(|| format!("{name}: is not there"))?;
        let tensor = opened.source.require(&spec.source_name)?;
        let turned = spec.transform.apply(tensor.bytes, tensor.info.dtype, &tensor.info.shape)?;
        saver.append(&parameter.name, &spec.shape, turned.dtype, &turned.bytes)?;
        drop(turned);
        opened.source.release(&spec.source_name);
    }
    saver.finish()?;
    Ok((student.n_parameters()?, opened.model.n_parameters()?))
}

/// The name of the tensor of the teacher's block `2 i` for the student's block `i`.
fn doubled(name: &str) -> String {
    let mut done = false;
    let part = |part: &str| match part.parse::<usize>() {
        Ok(i) if !done => {
            done = true;
            (2 * i).to_string()
        }
        _ => part.to_string(),
    };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

/// The configuration with every second block, `n_layers` in all.
fn halved(config: &Config, n_layers: usize) -> Config {
    let every_second = |windows: &mut Vec<Option<usize>>| {
        *windows = windows.iter().step_by(2).take(n_layers).copied().collect();
    };
    let mut config = config.clone();
    match &mut config {
        Config::Llama(c) => c.n_layers = n_layers,
        Config::Gpt2(c) => c.n_layers = n_layers,
        Config::Qwen2(c) => {
            c.n_layers = n_layers;
            every_second(&mut c.windows);
        }
        Config::Qwen3(c) => {
            c.n_layers = n_layers;
            every_second(&mut c.windows);
        }
        Config::Gemma3(c) => every_second(&mut c.windows),
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_taken_in_twos() {
        assert_eq!(doubled("model.layers.3.mlp.up_proj.weight"), "model.layers.6.mlp.up_proj.weight");
        assert_eq!(doubled("h.1.attn.c_attn.weight"), "h.2.attn.c_attn.weight");
        assert_eq!(doubled("model.norm.weight"), "model.norm.weight");
    }
}
