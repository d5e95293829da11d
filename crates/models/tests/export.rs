//! Configurations written and read back: every golden, random ones, and the keys of the `gguf` package beside ours.

mod common;

use common::{CASES, golden};
use proptest::prelude::*;
use serde_json::{Value, json};
use sparsam_formats::gguf::{Array, Value as Gguf};
use sparsam_formats::{Kind, Source, TensorSpec, gguf, safetensors};
use sparsam_ir::DType;
use sparsam_models::rope::{RopeConfig, Scaling, yarn_attention_factor};
use sparsam_models::{Config, Error, Heads, Model, gemma3, gpt2, llama, qwen2, qwen3};

/// Writes a model of this configuration, all weights zero, and reads its configuration back; its weights must be found.
fn there_and_back(config: &Config, kind: Kind) -> Result<Config, Error> {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new(config.clone());
    let mut specs = Vec::new();
    for p in model.parameters()? {
        let (name, transform) = model.stored_as(kind, &p.name).unwrap();
        specs.push(TensorSpec { name, shape: transform.inverse().shape(&p.shape), dtype: DType::F32 });
    }
    let zeros = |t: &TensorSpec| vec![0; 4 * t.shape.iter().product::<usize>()];
    let path = match kind {
        Kind::Safetensors => {
            let fields = Value::Object(config.to_json()?);
            std::fs::write(folder.path().join("config.json"), fields.to_string()).unwrap();
            let file = folder.path().join("model.safetensors");
            let mut w = safetensors::Writer::create(&file, &[], &specs)?;
            specs.iter().for_each(|t| w.append(&t.name, &zeros(t)).unwrap());
            w.finish()?;
            folder.path().to_path_buf()
        }
        Kind::Gguf => {
            let head = config.to_gguf()?;
            let of = |c: &sparsam_models::Constant| TensorSpec {
                name: c.name.clone(),
                shape: c.shape.clone(),
                dtype: DType::F32,
            };
            let extra: Vec<TensorSpec> = head.tensors.iter().map(of).collect();
            let all: Vec<TensorSpec> = specs.iter().chain(&extra).cloned().collect();
            let file = folder.path().join("model.gguf");
            let mut w = gguf::Writer::create(&file, &head.metadata, &all)?;
            specs.iter().for_each(|t| w.append(&t.name, &zeros(t)).unwrap());
            for c in &head.tensors {
                let bytes: Vec<u8> = c.data.iter().flat_map(|x| x.to_le_bytes()).collect();
                w.append(&c.name, &bytes)?;
            }
            w.finish()?;
            file
        }
    };
    let source = Source::open(path)?;
    let read = Config::from_source(&source)?;
    Model::new(read.clone()).weights(&source)?;
    Ok(read)
}

fn ropes(config: &mut Config) -> Vec<&mut RopeConfig> {
    match config {
        Config::Llama(c) => vec![&mut c.rope],
        Config::Qwen2(c) => vec![&mut c.rope],
        Config::Qwen3(c) => vec![&mut c.rope],
        Config::Gemma3(c) => vec![&mut c.rope_global, &mut c.rope_local],
        Config::Gpt2(_) => vec![],
    }
}

/// Equal, but for two things that a file rounds: a GGUF file holds Llama 3's stretch as one f32 factor for each
/// wavelength (half a unit in the last place, once in the factor and once in the frequency), and YaRN's attention
/// factor as an f32 quotient.
fn assert_same(was: &Config, is: &Config) {
    let (mut was, mut is) = (was.clone(), is.clone());
    let constants = |c: &Config| Model::new(c.clone()).constants();
    for (a, b) in constants(&was).iter().zip(constants(&is)) {
        for (x, y) in a.data.iter().zip(&b.data) {
            assert!((x - y).abs() <= 2.0 * f32::EPSILON * x, "{}: {x} and {y}", a.name);
        }
    }
    for (a, b) in ropes(&mut was).into_iter().zip(ropes(&mut is)) {
        match (&a.scaling, &b.scaling) {
            (Scaling::Llama3 { .. } | Scaling::Factors(_), Scaling::Llama3 { .. } | Scaling::Factors(_)) => {
                b.scaling = a.scaling.clone();
            }
            (&Scaling::Yarn { attention_factor: x, .. }, &Scaling::Yarn { attention_factor: y, .. }) => {
                assert!((x - y).abs() <= f32::EPSILON as f64 * x, "{x} and {y}");
                if let Scaling::Yarn { attention_factor, .. } = &mut b.scaling {
                    *attention_factor = x;
                }
            }
            _ => {}
        }
    }
    assert_eq!(was, is);
}

fn both_ways(config: &Config) {
    for kind in [Kind::Safetensors, Kind::Gguf] {
        match there_and_back(config, kind) {
            Ok(read) => assert_same(config, &read),
            // What a format cannot hold is tested by name below.
            Err(Error::Unrepresentable { .. }) => {}
            Err(e) => panic!("{kind:?}: {e}\n{config:?}"),
        }
    }
}

#[test]
fn goldens_survive_both_formats() {
    for case in CASES {
        let config = Config::from_source(&Source::open(golden(case)).unwrap()).unwrap();
        let json = there_and_back(&config, Kind::Safetensors).unwrap();
        assert_eq!(json, config, "{case}");
        let gguf = there_and_back(&config, Kind::Gguf).unwrap();
        assert_same(&config, &gguf);
        // From GGUF on to config.json, where factors become LongRoPE's.
        assert_eq!(there_and_back(&gguf, Kind::Safetensors).unwrap(), gguf, "{case}");
    }
}

/// The goldens' GGUF files were written by the `gguf` package: each of its keys is in ours, with the same value.
#[test]
fn keys_are_those_of_the_gguf_package() {
    let plain = |v: &Gguf| match v {
        Gguf::Array(Array::Bool(v)) => format!("{v:?}"),
        Gguf::F32(x) => format!("{x}"),
        other => other.to_string(),
    };
    for case in ["llama", "gemma3", "gpt2"] {
        let source = Source::open(golden(&format!("{case}.gguf"))).unwrap();
        let ours = Config::from_source(&source).unwrap().to_gguf().unwrap();
        let theirs = source.gguf_metadata().unwrap();
        let mut seen = 0;
        for (key, value) in theirs.iter().filter(|(k, _)| k.starts_with(case)) {
            let have = ours.metadata.get(key).unwrap_or_else(|| panic!("{key} is missing"));
            assert_eq!(plain(have), plain(value), "{key}");
            seen += 1;
        }
        assert!(seen >= 6, "{case}: {seen} keys");
        for constant in &ours.tensors {
            let t = source.require(&constant.name).unwrap();
            let bytes: Vec<u8> = constant.data.iter().flat_map(|x| x.to_le_bytes()).collect();
            assert_eq!(t.bytes, bytes, "{}", constant.name);
        }
    }
}

/// The factors in Llama 3.2 1B's published GGUF files are found to be Llama 3's stretch by 32.
#[test]
fn published_factors_are_recognised() {
    let stretch = |factor| Scaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    };
    for factor in [8.0, 32.0] {
        let config = llama_with(RopeConfig { base: 500_000.0, scaling: stretch(factor) }, 64);
        let gguf = there_and_back(&config, Kind::Gguf).unwrap();
        let Config::Llama(c) = &gguf else { panic!("{gguf:?}") };
        assert!(matches!(c.rope.scaling, Scaling::Factors(_)), "{c:?}");
        assert_eq!(there_and_back(&gguf, Kind::Safetensors).unwrap(), config);
    }
}

fn llama_with(rope: RopeConfig, head_dim: usize) -> Config {
    Config::Llama(llama::Config {
        vocab_size: 7,
        hidden_size: 6,
        intermediate_size: 5,
        n_layers: 2,
        heads: Heads { n_heads: 2, n_kv_heads: 1, head_dim },
        rms_norm_eps: 1e-5,
        context_length: 131_072,
        rope,
        sliding_window: None,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        tied_head: true,
    })
}

#[test]
fn what_a_format_cannot_hold_is_named() {
    let line = |config: Config, kind: Kind, said: &str| {
        let e = there_and_back(&config, kind).unwrap_err();
        assert!(matches!(e, Error::Unrepresentable { .. }), "{e}");
        assert!(e.to_string().contains(said), "{e} lacks {said:?}");
    };
    let plain = RopeConfig { base: 10000.0, scaling: Scaling::None };
    let llama = |edit: &dyn Fn(&mut llama::Config)| {
        let Config::Llama(mut c) = llama_with(plain.clone(), 4) else { unreachable!() };
        edit(&mut c);
        Config::Llama(c)
    };
    line(
        llama(&|c| c.o_bias = true),
        Kind::Safetensors,
        "config.json cannot hold this model: attention_bias is on for q",
    );
    let biased = llama(&|c| (c.sliding_window, c.mlp_bias) = (Some(3), true));
    line(biased, Kind::Safetensors, "windows are Mistral's, which has no biases");
    let qwen = |scaling: Scaling, windows: Vec<Option<usize>>| {
        Config::Qwen2(qwen2::Config {
            vocab_size: 7,
            hidden_size: 6,
            intermediate_size: 5,
            n_layers: windows.len(),
            heads: Heads { n_heads: 2, n_kv_heads: 1, head_dim: 4 },
            rms_norm_eps: 1e-5,
            context_length: 64,
            rope: RopeConfig { base: 10000.0, scaling },
            windows,
            tied_head: true,
        })
    };
    let factors = Scaling::Factors(vec![1.0, 2.0]);
    line(
        qwen(factors, vec![None; 2]),
        Kind::Gguf,
        "GGUF cannot hold this model: rope.scaling stretches each",
    );
    let two = vec![Some(3), None, Some(5)];
    for kind in [Kind::Gguf, Kind::Safetensors] {
        line(qwen(Scaling::None, two.clone()), kind, "sliding_window is 3 in one layer and 5 in another");
    }
}

#[test]
fn longrope_of_another_kind_is_refused() {
    let line = |edit: Value, said: &str| {
        let folder = tempfile::tempdir().unwrap();
        let rope = RopeConfig { base: 10000.0, scaling: Scaling::Factors(vec![1.0, 1.5]) };
        let mut fields = Value::Object(llama_with(rope, 4).to_json().unwrap());
        assert_eq!(fields["rope_scaling"]["rope_type"], "longrope");
        for (key, value) in edit.as_object().unwrap() {
            fields["rope_scaling"][key] = value.clone();
        }
        std::fs::write(folder.path().join("config.json"), fields.to_string()).unwrap();
        safetensors::Writer::create(folder.path().join("model.safetensors"), &[], &[])
            .unwrap()
            .finish()
            .unwrap();
        let e = Config::from_source(&Source::open(folder.path()).unwrap()).unwrap_err().to_string();
        assert!(e.contains(said), "{e} lacks {said:?}");
    };
    line(json!({"short_factor": [1.0, 1.0]}), "long_factor is not short_factor");
    line(json!({"long_factor": [1.0]}), "long_factor lists 1 factors, heads need 2");
    line(json!({"long_factor": null}), "long_factor is missing");
    line(json!({"attention_factor": 1.2}), "attention_factor is 1.2; only 1");
    line(json!({"attention_factor": null, "factor": 2.0}), "attention_factor is missing and not 1");
    line(
        json!({"long_factor": [1.0, -1.0], "short_factor": [1.0, -1.0]}),
        "holds something that is no positive",
    );
}

/// Decimals as people write them, which f32 gives back in full.
fn decimal(digits: std::ops::Range<u32>, exponent: i32) -> impl Strategy<Value = f64> {
    digits.prop_map(move |d| format!("{d}e{exponent}").parse().unwrap())
}

fn scaling(half: usize) -> impl Strategy<Value = Scaling> {
    prop_oneof![
        Just(Scaling::None),
        decimal(1..200, -1).prop_map(|factor| Scaling::Linear { factor }),
        (decimal(11..400, -1), decimal(1..20, -1), 30usize..9000).prop_map(
            |(factor, low, original_context)| {
                Scaling::Llama3 {
                    factor,
                    low_freq_factor: low,
                    high_freq_factor: low + 3.0,
                    original_context,
                }
            }
        ),
        (
            decimal(11..400, -1),
            decimal(10..50, 0),
            decimal(1..100, -1),
            30usize..9000,
            prop::option::of(decimal(1..30, -1))
        )
            .prop_map(|(factor, beta_fast, beta_slow, original_context, given)| Scaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_context,
                attention_factor: given.unwrap_or(yarn_attention_factor(factor)),
            }),
        prop::collection::vec(0.01f32..50.0, half).prop_map(Scaling::Factors),
    ]
}

#[derive(Clone, Debug)]
struct Base {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    heads: Heads,
    eps: f64,
    context_length: usize,
    rope: RopeConfig,
    /// One size, on in some layers.
    windows: Vec<Option<usize>>,
    flags: [bool; 4],
}

fn base() -> impl Strategy<Value = Base> {
    let sizes = (1usize..40, 1usize..9, 1usize..9, 1usize..4, 1usize..4, 1usize..5);
    sizes.prop_flat_map(|(vocab_size, hidden_size, intermediate_size, n_kv_heads, group, half)| {
        let heads = Heads { n_heads: n_kv_heads * group, n_kv_heads, head_dim: 2 * half };
        let windows = (1usize..60, prop::collection::vec(any::<bool>(), 1..5));
        let rope = (decimal(11..30000, -1), scaling(half));
        (decimal(1..200, -7), 1usize..100_000, rope, windows, any::<[bool; 4]>()).prop_map(
            move |(eps, context_length, (base, scaling), (window, on), flags)| Base {
                vocab_size,
                hidden_size,
                intermediate_size,
                heads,
                eps,
                context_length,
                rope: RopeConfig { base, scaling },
                windows: on.into_iter().map(|on| on.then_some(window)).collect(),
                flags,
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn random_configurations_survive_both_formats(b in base(), caps in any::<[Option<u8>; 3]>()) {
        let [f0, f1, f2, f3] = b.flags;
        both_ways(&Config::Llama(llama::Config {
            vocab_size: b.vocab_size,
            hidden_size: b.hidden_size,
            intermediate_size: b.intermediate_size,
            n_layers: b.windows.len(),
            heads: b.heads,
            rms_norm_eps: b.eps,
            context_length: b.context_length,
            rope: b.rope.clone(),
            sliding_window: b.windows[0],
            qkv_bias: f0,
            o_bias: f1,
            mlp_bias: f2,
            tied_head: f3,
        }));
        both_ways(&Config::Qwen2(qwen2::Config {
            vocab_size: b.vocab_size,
            hidden_size: b.hidden_size,
            intermediate_size: b.intermediate_size,
            n_layers: b.windows.len(),
            heads: b.heads,
            rms_norm_eps: b.eps,
            context_length: b.context_length,
            rope: b.rope.clone(),
            windows: b.windows.clone(),
            tied_head: f3,
        }));
        both_ways(&Config::Qwen3(qwen3::Config {
            vocab_size: b.vocab_size,
            hidden_size: b.hidden_size,
            intermediate_size: b.intermediate_size,
            n_layers: b.windows.len(),
            heads: b.heads,
            rms_norm_eps: b.eps,
            context_length: b.context_length,
            rope: b.rope.clone(),
            windows: b.windows.clone(),
            attention_bias: f0,
            tied_head: f3,
        }));
        let cap = |x: Option<u8>| x.filter(|&x| x > 0).map(|x| x as f64 / 2.0);
        both_ways(&Config::Gemma3(gemma3::Config {
            vocab_size: b.vocab_size,
            hidden_size: b.hidden_size,
            intermediate_size: b.intermediate_size,
            heads: b.heads,
            rms_norm_eps: b.eps,
            context_length: b.context_length,
            rope_global: b.rope.clone(),
            rope_local: RopeConfig { base: b.rope.base, scaling: Scaling::None },
            windows: b.windows.clone(),
            query_pre_attn_scalar: cap(caps[0]).unwrap_or(b.heads.head_dim as f64),
            attention_bias: f0,
            attn_logit_softcapping: cap(caps[1]),
            final_logit_softcapping: cap(caps[2]),
            tied_head: f3,
        }));
        let head_dim = b.heads.head_dim;
        both_ways(&Config::Gpt2(gpt2::Config {
            vocab_size: b.vocab_size,
            hidden_size: b.heads.n_heads * head_dim,
            intermediate_size: if f0 { 4 * b.heads.n_heads * head_dim } else { b.intermediate_size },
            n_layers: b.windows.len(),
            heads: Heads { n_kv_heads: b.heads.n_heads, ..b.heads },
            layer_norm_eps: b.eps,
            context_length: b.context_length.min(50),
            tied_head: f3,
        }));
    }
}
