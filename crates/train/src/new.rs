//! New models: sizes from a number of parameters, and random weights.

use crate::Error;
use crate::config::{Arch, ModelConfig};
use crate::random::Random;
use sparsam_models::rope::{RopeConfig, Scaling};
use sparsam_models::{Config, Heads, Model, Parameter, gpt2, llama};
use sparsam_plan::{shape::Shape, units};

/// Sizes of the released GPT-2 models (Radford et al. 2019, table 2; the released checkpoints): parameters in millions,
/// layers, width; heads of 64.
const GPT2: [(f64, usize, usize); 4] =
    [(124.0, 12, 768), (355.0, 24, 1024), (774.0, 36, 1280), (1558.0, 48, 1600)];
/// Numbers of parameters that differ by no more than this name the same released model ("1.5B" is 1558M).
const GPT2_MARGIN: f64 = 0.05;
/// Width of the initial weights (Radford et al. 2018); what writes to the residual stream is scaled down by the root of
/// the number of its writers (Radford et al. 2019, section 2.3).
const INIT_STD: f64 = 0.02;

/// The configuration of a new model for a vocabulary of `vocab_size` and rows of `ctx` tokens. What `c` leaves open is
/// derived from its size, and written into it.
///
/// # Errors
/// [`Error::Config`] if neither size nor dimensions are given, or they contradict each other.
pub fn configure(c: &mut ModelConfig, vocab_size: usize, ctx: usize) -> Result<Config, Error> {
    let arch = c.arch.unwrap_or_default();
    if let Some(size) = &c.size {
        let parameters = units::count("parameters", size)?;
        let shape = shape_for(arch, parameters, vocab_size as f64, ctx)?;
        c.layers.get_or_insert(shape.n_layers as usize);
        if c.hidden.is_none() {
            c.hidden = Some(shape.hidden_size as usize);
            c.heads.get_or_insert(shape.n_heads as usize);
            c.kv_heads.get_or_insert(shape.n_kv_heads as usize);
            c.intermediate.get_or_insert(shape.intermediate_size as usize);
        }
    }
    let (Some(layers), Some(hidden)) = (c.layers, c.hidden) else {
        return Err(Error::config(
            "model",
            "give size, or layers and hidden; or from, a model to continue with",
        ));
    };
    let heads = *c.heads.get_or_insert_with(|| derived_heads(hidden));
    if layers == 0 || hidden == 0 || heads == 0 || !hidden.is_multiple_of(heads) {
        let problem =
            format!("hidden = {hidden} is not divided by heads = {heads}, or layers = {layers} is 0");
        return Err(Error::config("model", problem));
    }
    let kv_heads = *c.kv_heads.get_or_insert(heads);
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(Error::config(
            "model",
            format!("heads = {heads} is not divided by kv_heads = {kv_heads}"),
        ));
    }
    let heads = Heads { n_heads: heads, n_kv_heads: kv_heads, head_dim: hidden / heads };
    if arch == Arch::Llama && !heads.head_dim.is_multiple_of(2) {
        let problem = format!("heads of {} channels cannot be rotated; give an even width", heads.head_dim);
        return Err(Error::config("model", problem));
    }
    let tied_head = *c.tied_head.get_or_insert(true);
    Ok(match arch {
        Arch::Llama => {
            let base = *c.rope_base.get_or_insert(10_000.0);
            Config::Llama(llama::Config {
                vocab_size,
                hidden_size: hidden,
                intermediate_size: *c.intermediate.get_or_insert((hidden * 8 / 3).next_multiple_of(32)),
                n_layers: layers,
                heads,
                rms_norm_eps: 1e-5,
                context_length: ctx,
                rope: RopeConfig { base, scaling: Scaling::None },
                sliding_window: None,
                qkv_bias: false,
                o_bias: false,
                mlp_bias: false,
                tied_head,
            })
        }
        Arch::Gpt2 => {
            if kv_heads != heads.n_heads {
                return Err(Error::config("model", "kv_heads: every head of a GPT-2 has keys of its own"));
            }
            Config::Gpt2(gpt2::Config {
                vocab_size,
                hidden_size: hidden,
                intermediate_size: *c.intermediate.get_or_insert(4 * hidden),
                n_layers: layers,
                heads,
                layer_norm_eps: 1e-5,
                context_length: ctx,
                tied_head,
            })
        }
    })
}

/// Heads of 64 channels where the width allows it, else of 32, 16 or all of it.
fn derived_heads(hidden: usize) -> usize {
    [64, 32, 16].into_iter().find(|d| hidden.is_multiple_of(*d)).map_or(1, |d| hidden / d)
}

fn shape_for(arch: Arch, parameters: f64, vocab: f64, ctx: usize) -> Result<Shape, Error> {
    if arch == Arch::Gpt2
        && let Some((_, layers, hidden)) =
            GPT2.into_iter().find(|(m, ..)| (m * 1e6 / parameters).ln().abs() < GPT2_MARGIN)
    {
        let mut shape = sparsam_plan::shape::by_name("gpt-2")?;
        (shape.n_layers, shape.hidden_size) = (layers as u64, hidden as u64);
        (shape.n_heads, shape.n_kv_heads) = (hidden as u64 / 64, hidden as u64 / 64);
        shape.intermediate_size = 4 * hidden as u64;
        return Ok(shape);
    }
    let fitted = |asked: f64| -> Result<(Shape, f64), Error> {
        let mut shape = Shape::for_parameters(asked)?;
        shape.vocab_size = vocab as u64;
        shape.tied = true;
        if arch == Arch::Gpt2 {
            shape.gated = false;
            shape.intermediate_size = 4 * shape.hidden_size;
            shape.n_kv_heads = shape.n_heads;
            shape.biases = true;
            shape.learned_positions = ctx as u64;
        }
        let total = shape.parameters().total();
        Ok((shape, total))
    };
    // The rule assumes a vocabulary of its own: ask it for the number that, with this one, gives the number wanted.
    let (mut low, mut high) = (2e4, parameters.max(3e4) * 2.0);
    let mut best = fitted(low)?;
    for _ in 0..24 {
        let asked = (low * high).sqrt();
        let found = fitted(asked)?;
        if found.1 < parameters {
            low = asked
        } else {
            high = asked
        }
        if (found.1 / parameters).ln().abs() < (best.1 / parameters).ln().abs() {
            best = found;
        }
    }
    if best.1 > 1.5 * parameters {
        return Err(Error::config(
            "model.size",
            format!(
                "a vocabulary of {vocab} leaves no model of {}; the smallest has {}: give a smaller vocabulary, or dimensions",
                units::show_count(parameters),
                units::show_count(best.1)
            ),
        ));
    }
    Ok(best.0)
}

/// Random values for a new model's parameter: normal, norms 1, biases 0.
pub fn initial(model: &Model, parameter: &Parameter, seed: u64) -> Vec<f32> {
    let n = parameter.shape.iter().product();
    let name = parameter.name.as_str();
    if name.ends_with("bias") {
        return vec![0.0; n];
    }
    if parameter.shape.len() < 2 {
        return vec![1.0; n];
    }
    // Each layer writes twice: attention and MLP.
    let writes = ["o_proj.weight", "c_proj.weight", "down_proj.weight"].iter().any(|w| name.ends_with(w));
    let std = if writes { INIT_STD / (2.0 * model.facts().n_layers() as f64).sqrt() } else { INIT_STD };
    let mut random = Random::new(seed, name, 0);
    let mut values = Vec::with_capacity(n + 1);
    while values.len() < n {
        values.extend(random.normals().map(|x| (x * std) as f32));
    }
    values.truncate(n);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(arch: Arch, size: &str, vocab: usize, ctx: usize) -> Model {
        let mut c = ModelConfig { arch: Some(arch), size: Some(size.into()), ..ModelConfig::default() };
        Model::new(configure(&mut c, vocab, ctx).unwrap())
    }

    #[test]
    fn gpt2_has_its_published_size() {
        let m = model(Arch::Gpt2, "124M", 50257, 1024);
        // 124,439,808: as counted in transformers' GPT2LMHeadModel.
        assert_eq!(m.n_parameters().unwrap(), 124_439_808);
        let m = model(Arch::Gpt2, "355M", 50257, 1024);
        assert_eq!(m.n_parameters().unwrap(), 354_823_168);
    }

    #[test]
    fn sizes_are_met_whatever_the_vocabulary() {
        for (arch, size, vocab, want) in [
            (Arch::Llama, "1.5M", 2048, 1.5e6),
            (Arch::Llama, "30M", 257, 30e6),
            (Arch::Llama, "125M", 49152, 125e6),
            (Arch::Gpt2, "10M", 1024, 10e6),
        ] {
            let n = model(arch, size, vocab, 256).n_parameters().unwrap() as f64;
            assert!((n / want).ln().abs() < 0.1, "{arch:?} {size} {vocab}: {n}");
        }
        let mut c = ModelConfig { size: Some("100k".into()), ..ModelConfig::default() };
        let e = configure(&mut c, 50_000, 64).unwrap_err().to_string();
        assert!(e.contains("a vocabulary of 50000 leaves no model of"), "{e}");
    }

    #[test]
    fn dimensions_are_checked() {
        let said = |f: fn(&mut ModelConfig)| {
            let mut c = ModelConfig { layers: Some(2), hidden: Some(48), ..ModelConfig::default() };
            f(&mut c);
            configure(&mut c, 300, 64).unwrap_err().to_string()
        };
        assert!(said(|c| c.layers = None).contains("give size, or layers and hidden"));
        assert!(said(|c| c.heads = Some(5)).contains("hidden = 48 is not divided by heads = 5"));
        assert!(said(|c| (c.heads, c.kv_heads) = (Some(4), Some(3))).contains("not divided by kv_heads = 3"));
        assert!(said(|c| c.heads = Some(16)).contains("cannot be rotated"));
    }

    #[test]
    fn initial_weights_have_their_width_and_their_seed() {
        let m = model(Arch::Llama, "1M", 300, 64);
        let parameters = m.parameters().unwrap();
        let std = |name: &str| {
            let p = parameters.iter().find(|p| p.name.contains(name)).unwrap();
            let x = initial(&m, p, 1);
            (x.iter().map(|v| (*v as f64).powi(2)).sum::<f64>() / x.len() as f64).sqrt()
        };
        let n_layers = m.facts().n_layers() as f64;
        assert!((std("up_proj") / 0.02 - 1.0).abs() < 0.03);
        assert!((std("down_proj") / 0.02 * (2.0 * n_layers).sqrt() - 1.0).abs() < 0.03);
        assert_eq!(std("input_layernorm"), 1.0);
        let p = &parameters[0];
        assert!(initial(&m, p, 1) == initial(&m, p, 1) && initial(&m, p, 1) != initial(&m, p, 2));
    }
}
