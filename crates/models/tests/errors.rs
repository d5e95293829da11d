//! Configurations and weights that are wrong, each with the message that it must get; and the real model, which is
//! right.

use serde_json::{Value, json};
use sparsam_formats::{Source, TensorSpec, gguf, safetensors};
use sparsam_ir::DType;
use sparsam_models::{Config, Error, Model};
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")).join(name)
}

fn open(path: &Path) -> Result<Model, Error> {
    let source = Source::open(path)?;
    let model = Model::new(Config::from_source(&source)?);
    model.weights(&source)?;
    Ok(model)
}

/// A golden model, its `config.json` changed field by field; null takes a field out.
fn with_fields(case: &str, fields: &Value) -> Result<Model, Error> {
    let folder = tempfile::tempdir().unwrap();
    let text = std::fs::read(golden(case).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    for (key, value) in fields.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let to = folder.path().join("model.safetensors");
    std::fs::copy(golden(case).join("model.safetensors"), to).unwrap();
    open(folder.path())
}

#[test]
fn wrong_fields_are_named() {
    let line = |case: &str, fields: Value, said: &str| match with_fields(case, &fields) {
        Ok(_) => panic!("{case} {fields}: accepted, expected: {said}"),
        Err(e) => {
            let e = e.to_string();
            assert!(e.contains(said) && e.contains("config.json: "), "{case} {fields}: {e:?} lacks {said:?}");
        }
    };
    line(
        "llama",
        json!({"model_type": "mamba"}),
        "architecture \"mamba\" is not known here; known are gemma3",
    );
    line("llama", json!({"model_type": null}), "model_type is missing");
    line("llama", json!({"model_type": 7}), "model_type is 7, where a string is expected");
    line("llama", json!({"hidden_size": null}), "hidden_size is missing");
    line("llama", json!({"hidden_size": "24"}), "hidden_size is \"24\", where a whole number is expected");
    line("llama", json!({"hidden_size": -24}), "hidden_size is -24, where a whole number is expected");
    line("llama", json!({"hidden_size": 0}), "hidden_size is 0, where 1 to 16777216 is possible");
    line("llama", json!({"vocab_size": 1u64 << 60}), "vocab_size is 1152921504606846976, where 1 to");
    line("llama", json!({"num_hidden_layers": 100_000}), "num_hidden_layers is 100000, where 1 to 4096");
    line("llama", json!({"num_key_value_heads": 2}), "num_key_value_heads is 2, which does not divide 3");
    line("llama", json!({"num_attention_heads": 5, "num_key_value_heads": 1}), "cannot be shared by 5 heads");
    line("llama", json!({"head_dim": 7}), "head_dim is 7 for 3 heads; an even number");
    line("llama", json!({"head_dim": 1 << 23}), "head_dim is 8388608 for 3 heads; an even number up to 8192");
    line(
        "llama",
        json!({"partial_rotary_factor": 0.5}),
        "partial_rotary_factor is 0.5; only 1 is implemented",
    );
    line("llama", json!({"hidden_act": "gelu"}), "hidden_act is \"gelu\"; only silu is implemented");
    line("llama", json!({"rms_norm_eps": null}), "rms_norm_eps is missing");
    line(
        "llama",
        json!({"rms_norm_eps": -1e-5}),
        "rms_norm_eps is -0.00001, where a number from 0 is expected",
    );
    line("llama", json!({"rms_norm_eps": true}), "rms_norm_eps is true, where a number is expected");
    let rope = |fields: Value| json!({ "rope_scaling": fields });
    line("llama", rope(json!({"type": "dynamic", "factor": 2})), "rope_scaling.rope_type is \"dynamic\"");
    line("llama", rope(json!({"type": "linear"})), "rope_scaling.factor is missing");
    line("llama", rope(json!({"type": "linear", "factor": 0})), "gives no frequencies: Linear");
    line("llama", rope(json!({"type": "yarn", "factor": 2, "mscale": 1})), "rope_scaling.mscale is not");
    line("llama", json!({"rope_theta": 0.5}), "with base 0.5 gives no frequencies");
    line("qwen2", json!({"sliding_window": null}), "sliding_window is missing");
    line("qwen2", json!({"layer_types": ["full_attention"]}), "layer_types lists 1 layers, the model has 2");
    line("qwen2", json!({"layer_types": ["full_attention", "chunked"]}), "layer_types has \"chunked\"");
    line("qwen3", json!({"head_dim": null}), "head_dim is missing");
    line(
        "gemma3",
        json!({"use_bidirectional_attention": true}),
        "use_bidirectional_attention is true; only false",
    );
    line("gemma3", json!({"query_pre_attn_scalar": 0}), "query_pre_attn_scalar is 0");
    line("gpt2", json!({"n_head": 5}), "n_head is 5, which does not divide 18 channels");
    line("gpt2", json!({"activation_function": "relu"}), "activation_function is \"relu\"");
    line("gpt2", json!({"scale_attn_by_inverse_layer_idx": true}), "scale_attn_by_inverse_layer_idx is true");
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let line = |case: &str, fields: Value, said: &str| {
        let e = with_fields(case, &fields).unwrap_err().to_string();
        assert!(e.contains(said), "{case} {fields}: {e:?} lacks {said:?}");
    };
    line(
        "llama",
        json!({"num_hidden_layers": 3}),
        "tensor model.layers.2.input_layernorm.weight is missing (the model's model.layers.2.input_layernorm.weight, shape [24])",
    );
    line(
        "llama",
        json!({"num_hidden_layers": 1}),
        "9 tensor(s) that llama has no place for, such as model.layers.1.",
    );
    line(
        "llama",
        json!({"intermediate_size": 40}),
        "tensor model.layers.0.mlp.gate_proj.weight has shape [32, 24], the configuration asks for [40, 24]",
    );
    line("llama", json!({"attention_bias": true}), "self_attn.q_proj.bias is missing");
    line("llama_bias", json!({"mlp_bias": false}), "tensor(s) that llama has no place for");
    line(
        "gpt2",
        json!({"n_inner": 64}),
        "mlp.c_fc.weight has shape [18, 72], the configuration asks for [18, 64]",
    );
}

/// A golden model with its tensors renamed, and tensors beside them that the published files hold too.
fn renamed(
    case: &str,
    config: &Value,
    rename: impl Fn(&str) -> String,
    extra: &[&str],
) -> Result<Model, Error> {
    let source = Source::open(golden(case)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let spec = |name: String, shape: &[usize], dtype| TensorSpec { name, shape: shape.to_vec(), dtype };
    let mut specs: Vec<TensorSpec> =
        source.tensors().iter().map(|t| spec(rename(&t.name), &t.shape, t.dtype)).collect();
    specs.extend(extra.iter().map(|name| spec(name.to_string(), &[1], DType::F32)));
    let mut writer =
        safetensors::Writer::create(folder.path().join("model.safetensors"), &[], &specs).unwrap();
    for t in source.tensors() {
        writer.append(&rename(&t.name), source.require(&t.name).unwrap().bytes).unwrap();
    }
    for name in extra {
        writer.append(name, &[0; 4]).unwrap();
    }
    writer.finish().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    open(folder.path())
}

#[test]
fn other_names_of_the_same_weights_are_found() {
    let config = |case: &str| -> Value {
        serde_json::from_slice(&std::fs::read(golden(case).join("config.json")).unwrap()).unwrap()
    };
    let bare = |n: &str| n.trim_start_matches("transformer.").to_string();
    renamed("gpt2", &config("gpt2"), bare, &["h.0.attn.bias", "h.1.attn.masked_bias"]).unwrap();
    let e = renamed("gpt2", &config("gpt2"), bare, &["h.0.attn.scale"]).unwrap_err().to_string();
    assert!(e.contains("1 tensor(s) that gpt2 has no place for, such as h.0.attn.scale"), "{e}");

    // Gemma 3 with eyes: the text model lies one level down, in config.json and in the names.
    let nested =
        json!({"model_type": "gemma3", "text_config": config("gemma3"), "vision_config": {"hidden_size": 3}});
    let text_only = open(&golden("gemma3")).unwrap();
    for prefix in ["language_model.model.", "model.language_model."] {
        let deeper = |n: &str| n.replacen("model.", prefix, 1);
        let model = renamed("gemma3", &nested, deeper, &["vision_tower.x", "model.multi_modal_projector.y"]);
        assert_eq!(model.unwrap().config(), text_only.config());
    }
}

/// A golden GGUF file with other metadata.
fn with_metadata(case: &str, edit: impl Fn(&mut gguf::Metadata)) -> Result<Model, Error> {
    let source = Source::open(golden(case)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let mut metadata = source.gguf_metadata().unwrap().clone();
    edit(&mut metadata);
    let specs: Vec<TensorSpec> = source.tensors().iter().map(TensorSpec::from).collect();
    let mut writer = gguf::Writer::create(&path, &metadata, &specs).unwrap();
    for t in source.tensors() {
        writer.append(&t.name, source.require(&t.name).unwrap().bytes).unwrap();
    }
    writer.finish().unwrap();
    open(&path)
}

#[test]
fn wrong_metadata_are_named() {
    let line = |case: &str, key: &str, value: Option<gguf::Value>, said: &str| {
        let edit = |m: &mut gguf::Metadata| {
            match value.clone() {
                Some(v) => m.insert(key, v),
                None => m.remove(key),
            };
        };
        let e = with_metadata(case, edit).unwrap_err().to_string();
        assert!(e.contains(said) && e.contains("x.gguf"), "{key}: {e:?} lacks {said:?}");
    };
    let n = |n| Some(gguf::Value::U32(n));
    let text = |s: &str| Some(gguf::Value::String(s.into()));
    line("llama.gguf", "general.architecture", text("mamba"), "architecture \"mamba\" is not known here");
    line("llama.gguf", "general.architecture", None, "key general.architecture is missing");
    line("llama.gguf", "llama.block_count", None, "llama.block_count is missing");
    line("llama.gguf", "llama.block_count", text("2"), "llama.block_count is string \"2\"");
    line(
        "llama.gguf",
        "llama.block_count",
        n(3),
        "tensor blk.2.attn_norm.weight is missing (the model's model.layers.2",
    );
    line(
        "llama.gguf",
        "llama.vocab_size",
        n(47),
        "llama.vocab_size contradicts the embedding table: vocab_size has 47",
    );
    line(
        "llama.gguf",
        "llama.attention.value_length",
        n(4),
        "llama.attention.value_length is 4, heads have 8",
    );
    line("llama.gguf", "llama.rope.dimension_count", n(4), "llama.rope.dimension_count is 4, heads have 8");
    line("llama.gguf", "llama.expert_count", n(8), "mixtures of experts are not implemented");
    line(
        "gemma3.gguf",
        "gemma3.rope.scaling.type",
        text("longrope"),
        "gemma3.rope.scaling.type is \"longrope\"",
    );
    let windows = Some(gguf::Value::Array(gguf::Array::Bool(vec![true])));
    let key = "gemma3.attention.sliding_window_pattern";
    line("gemma3.gguf", key, windows, "sliding_window_pattern lists 1 layers, the model has 3");
    // The stretching factors must fit the heads.
    let four = |m: &mut gguf::Metadata| {
        for key in
            ["llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"]
        {
            m.insert(key, gguf::Value::U32(4));
        }
    };
    let e = with_metadata("llama.gguf", four).unwrap_err().to_string();
    assert!(e.contains("rope_freqs.weight has shape [4] (F32), heads need [2]"), "{e}");
}

/// Whatever stands in one field, the answer is a model or an error.
#[test]
fn no_value_of_a_field_makes_it_panic() {
    let values = json!([
        null, true, false, -1, 0, 1, 2, 7, 4096, 16_777_216, u64::MAX, 0.5, -1e308, 1e308, "", "linear", [], {}, ["x"],
        {"rope_type": "yarn"}, {"rope_type": "llama3", "factor": 1e308, "low_freq_factor": 1, "high_freq_factor": 1}
    ]);
    let mut accepted = 0;
    let mut tried = 0;
    for case in ["llama", "qwen2", "gemma3", "gpt2"] {
        let folder = tempfile::tempdir().unwrap();
        let copy = |name: &str| std::fs::copy(golden(case).join(name), folder.path().join(name)).unwrap();
        copy("model.safetensors");
        let config: Value =
            serde_json::from_slice(&std::fs::read(golden(case).join("config.json")).unwrap()).unwrap();
        for key in config.as_object().unwrap().keys() {
            for value in values.as_array().unwrap() {
                let mut config = config.clone();
                config[key] = value.clone();
                std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
                accepted += open(folder.path()).is_ok() as usize;
                tried += 1;
            }
        }
    }
    // Some values are right for some fields, most are wrong for most.
    assert!(accepted > tried / 50 && accepted < tried / 2, "{accepted} of {tried} accepted");
}

#[test]
fn impossible_metadata_are_refused_by_key() {
    use gguf::{Array, Value as V};
    // None of these is ever a size, a factor, a name or a list of layers.
    let values = [V::F32(f32::NAN), V::F32(-1.0), V::I64(-1), V::Array(Array::U32(vec![1, 2]))];
    let source = Source::open(golden("gemma3.gguf")).unwrap();
    for (key, _) in source.gguf_metadata().unwrap().iter().filter(|(k, _)| k.starts_with("gemma3.")) {
        for value in &values {
            let edit = |m: &mut gguf::Metadata| drop(m.insert(key, value.clone()));
            let e = with_metadata("gemma3.gguf", edit).expect_err(&format!("{key} = {value}")).to_string();
            assert!(e.contains(key), "{key} = {value}: {e}");
        }
    }
}

#[test]
fn a_safetensors_file_alone_asks_for_its_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::copy(golden("llama").join("model.safetensors"), &path).unwrap();
    let e = open(&path).unwrap_err().to_string();
    assert!(e.contains("config.json: the file is missing"), "{e}");
}

#[test]
fn the_real_model_is_described_in_full() {
    let Some(path) = sparsam_testkit::smollm2() else { return };
    let model = open(&path).unwrap();
    let facts = model.facts();
    // As the model's card and config.json have it: 135M parameters, 30 layers of 9 heads on 3, tied head.
    assert_eq!(model.n_parameters().unwrap(), 134_515_008);
    assert_eq!(
        (facts.n_layers(), facts.heads.n_heads, facts.heads.n_kv_heads, facts.heads.head_dim),
        (30, 9, 3, 64)
    );
    assert_eq!((facts.vocab_size, facts.hidden_size, facts.intermediate_size), (49152, 576, 1536));
    assert!(facts.tied_head);
    assert_eq!(facts.context_length, 8192);
    assert_eq!(facts.cache_bytes_per_token(DType::F16), Some(23040));
    assert_eq!(facts.cache_bytes_per_token(DType::Q4_K), None);
    let Config::Llama(config) = model.config() else { panic!("{:?}", model.config()) };
    assert_eq!(config.rope.base, 100_000.0);
    assert_eq!(config.rms_norm_eps, 1e-5);
    // 2 x 134.5M (norms aside: 61 x 576 weights) and 4 x 576 x 512 for each of 30 layers.
    let flops = 2.0 * (134_515_008 - 61 * 576) as f64 + 4.0 * 576.0 * 512.0 * 30.0;
    assert_eq!(model.flops_per_token(512).unwrap(), flops);
}
