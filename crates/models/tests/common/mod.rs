//! The goldens of `scripts/goldens/models.py`.
#![allow(dead_code)] // not every test uses all

use sparsam_formats::Source;
use sparsam_models::{Config, Model};
use std::path::PathBuf;

pub const CASES: [&str; 7] = ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"];
/// The lengths of the two sequences in every golden.
pub const LENGTHS: [usize; 2] = [17, 9];

pub fn golden(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")).join(name)
}

pub struct Expected {
    pub tokens: Vec<i32>,
    pub logits: Vec<f32>,
    /// Where a GGUF file cannot say all that config.json does, what is left gives these.
    pub gguf_logits: Option<Vec<f32>>,
    /// How far transformers' f32 is from its f64: an f32 computation is allowed twice that.
    pub f32_error: f64,
}

pub fn expected(case: &str) -> Expected {
    let file = sparsam_formats::safetensors::File::open(golden(case).join("expected.safetensors")).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> {
        file.tensor(name).unwrap().bytes.chunks_exact(4).map(|b| b.try_into().unwrap()).collect()
    };
    let floats = |name: &str| -> Vec<f32> { words(name).into_iter().map(f32::from_le_bytes).collect() };
    Expected {
        tokens: words("tokens").into_iter().map(i32::from_le_bytes).collect(),
        gguf_logits: file.tensor("gguf_logits").map(|_| floats("gguf_logits")),
        logits: floats("logits"),
        f32_error: floats("f32_error")[0] as f64,
    }
}

/// A parameter in the layout that the graph wants.
pub struct Loaded {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: sparsam_ir::DType,
    pub bytes: Vec<u8>,
}

/// A golden model and its parameters.
pub fn open(path: &str) -> (Model, Vec<Loaded>) {
    let source = Source::open(golden(path)).unwrap();
    let model = Model::new(Config::from_source(&source).unwrap());
    let load = |spec: sparsam_models::WeightSpec| {
        let t = source.require(&spec.source_name).unwrap();
        let t = spec.transform.apply(t.bytes, t.info.dtype, &t.info.shape).unwrap();
        assert_eq!(t.shape, spec.shape, "{}", spec.name);
        Loaded { name: spec.name, shape: t.shape, dtype: t.dtype, bytes: t.bytes.into_owned() }
    };
    let weights = model.weights(&source).unwrap().into_iter().map(load).collect();
    (model, weights)
}

/// The inputs of both sequences packed one after the other: positions and row_start.
pub fn packed_inputs() -> (Vec<i32>, Vec<i32>) {
    let positions = LENGTHS.iter().flat_map(|&l| 0..l as i32).collect();
    let n = LENGTHS[0] + LENGTHS[1];
    (positions, (0..n).map(|i| if i < LENGTHS[0] { 0 } else { LENGTHS[0] as i32 }).collect())
}
