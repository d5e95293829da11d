//! Models written and opened again: the same weights, in both formats and in shards; and what is refused.

use sparsam_dtype::DType;
use sparsam_engine::{Opened, Plan, Saver, open};
use sparsam_formats::{Kind, TensorSpec};
use std::path::{Path, PathBuf};

const CASES: [&str; 7] = ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"];

fn golden(case: &str) -> PathBuf {
    sparsam_testkit::root().join("crates/models/tests/golden").join(case)
}

/// A parameter in the graph's layout.
type Parameter = (String, Vec<usize>, DType, Vec<u8>);

fn parameters(m: &Opened) -> Vec<Parameter> {
    let specs = m.model.weights(&m.source).unwrap();
    let read = |spec: sparsam_models::WeightSpec| {
        let t = m.source.require(&spec.source_name).unwrap();
        let t = spec.transform.apply(t.bytes, t.info.dtype, &t.info.shape).unwrap();
        (spec.name, t.shape, t.dtype, t.bytes.into_owned())
    };
    specs.into_iter().map(read).collect()
}

fn floats(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let mut x = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block_len()];
    sparsam_dtype::codec::decode(dtype, bytes, &mut x).unwrap();
    x
}

fn save(m: &Opened, path: &Path, kind: Kind, plan: &Plan) -> Result<(), sparsam_engine::Error> {
    let mut saver = Saver::create(path, kind, &m.model, m.tokenizer.as_ref(), plan)?;
    for (name, shape, dtype, bytes) in parameters(m) {
        saver.append(&name, &shape, dtype, &bytes)?;
    }
    saver.finish()
}

#[test]
fn every_architecture_survives_both_formats() {
    let folder = tempfile::tempdir().unwrap();
    for case in CASES {
        let was = open(&golden(case)).unwrap();
        for kind in [Kind::Gguf, Kind::Safetensors] {
            let path =
                folder.path().join(format!("{case}.{}", if kind == Kind::Gguf { "gguf" } else { "hf" }));
            let plan = Plan::uniform(&was.model, kind, DType::BF16).unwrap(); // as the goldens are
            save(&was, &path, kind, &plan).unwrap();
            let is = open(&path).unwrap();
            assert_eq!(is.source.kind(), kind);
            let (was, is) = (parameters(&was), parameters(&is));
            assert_eq!(was.len(), is.len(), "{case}");
            for ((name, shape, dtype, bytes), (name2, shape2, dtype2, bytes2)) in was.iter().zip(&is) {
                assert_eq!((name, shape), (name2, shape2), "{case}");
                let (x, y) = (floats(*dtype, bytes), floats(*dtype2, bytes2));
                // Only what is stored as 1 + w in f32 may lose its last bits.
                let one_plus = kind == Kind::Gguf && case == "gemma3" && name.ends_with("norm.weight");
                let off = sparsam_testkit::max_abs_diff(&x, &y).1;
                assert!(off <= if one_plus { f32::EPSILON } else { 0.0 }, "{case} {name}: {off}");
            }
        }
    }
}

#[test]
fn large_models_go_into_shards() {
    let folder = tempfile::tempdir().unwrap();
    let was = open(&golden("llama")).unwrap();
    let path = folder.path().join("sharded");
    std::fs::create_dir(&path).unwrap(); // an empty folder may be there
    let mut plan = Plan::uniform(&was.model, Kind::Safetensors, DType::F32).unwrap();
    plan.shard_bytes = 10_000;
    save(&was, &path, Kind::Safetensors, &plan).unwrap();
    let index = std::fs::read(path.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    let first = index["weight_map"]["model.embed_tokens.weight"].as_str().unwrap();
    assert!(first.starts_with("model-00001-of-0000"), "{first}");
    let total: usize = plan.tensors.iter().map(|t| 4 * t.shape.iter().product::<usize>()).sum();
    assert_eq!(index["metadata"]["total_size"], total);
    let files = std::fs::read_dir(&path).unwrap();
    let sizes: Vec<u64> = files.map(|entry| entry.unwrap().metadata().unwrap().len()).collect();
    assert!(sizes.len() > 4 && sizes.iter().all(|&n| n < 12_000), "{sizes:?}");
    let is = open(&path).unwrap();
    for ((name, _, dtype, bytes), (_, _, _, bytes2)) in parameters(&was).iter().zip(parameters(&is)) {
        assert_eq!(floats(*dtype, bytes), floats(DType::F32, &bytes2), "{name}");
    }
}

#[test]
fn the_real_models_file_comes_back() {
    let Some(path) = sparsam_testkit::smollm2() else { return };
    let was = open(&path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("again.gguf");
    let own = |p: &sparsam_models::Parameter| {
        let (name, _) = was.model.stored_as(Kind::Gguf, &p.name).unwrap();
        was.source.require(&name).unwrap().info.dtype
    };
    let plan = Plan::new(&was.model, own).unwrap().about(&was.source);
    save(&was, &out, Kind::Gguf, &plan).unwrap();
    let is = open(&out).unwrap();
    // Tensor for tensor the same bytes, and every key with the same value.
    for t in was.source.tensors() {
        let (a, b) = (was.source.require(&t.name).unwrap(), is.source.require(&t.name).unwrap());
        assert_eq!((a.bytes, a.info.dtype), (b.bytes, b.info.dtype), "{}", t.name);
    }
    let (a, b) = (was.source.gguf_metadata().unwrap(), is.source.gguf_metadata().unwrap());
    for (key, value) in a.iter() {
        // What only llama.cpp's converter says of the vocabulary's origin has no bearing on byte-level BPE.
        if key != "tokenizer.ggml.add_space_prefix" || b.get(key).is_some() {
            assert_eq!(b.get(key), Some(value), "{key}");
        }
    }
    let vocab = |m: &Opened| format!("{:?}", m.tokenizer().unwrap().to_gguf(49152).unwrap());
    assert_eq!(vocab(&was), vocab(&is));
}

#[test]
fn what_is_wrong_is_named_and_nothing_stays() {
    let folder = tempfile::tempdir().unwrap();
    let m = open(&golden("qwen2")).unwrap();
    let all = parameters(&m);
    let plan = Plan::uniform(&m.model, Kind::Gguf, DType::F32).unwrap();
    let path = |name: &str| folder.path().join(name);
    let create = |name: &str, kind: Kind, plan: &Plan| Saver::create(&path(name), kind, &m.model, None, plan);
    let said = |e: Result<(), sparsam_engine::Error>, want: &str| {
        let e = e.unwrap_err().to_string();
        assert!(e.contains(want), "{e} lacks {want:?}");
    };
    for kind in [Kind::Gguf, Kind::Safetensors] {
        let mut s = create("a", kind, &plan).unwrap();
        let (name, shape, dtype, bytes) = &all[1];
        said(s.append(name, shape, *dtype, bytes), "it is the turn of model.embed_tokens.weight");
        let (name, shape, dtype, bytes) = &all[0];
        said(
            s.append(name, &[shape[1], shape[0]], *dtype, bytes),
            "has shape [24, 48], [48, 24] was announced",
        );
        said(s.append(name, shape, *dtype, &bytes[2..]), "bytes");
        let mut x = floats(*dtype, bytes);
        let half = Plan::uniform(&m.model, kind, DType::F16).unwrap();
        let mut h = create("b", kind, &half).unwrap();
        for (bad, want) in
            [(f32::NAN, "element 5 is NaN"), (1e6, "element 5 is 1000000, beyond what F16 holds")]
        {
            x[5] = bad;
            let raw: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
            said(h.append(name, shape, DType::F32, &raw), want);
        }
        s.append(name, shape, *dtype, bytes).unwrap();
        said(s.finish(), "tensors are missing, the first is model.layers.0.input_layernorm.weight");
    }
    let mut less = plan.clone();
    less.tensors.remove(3);
    said(create("a", Kind::Gguf, &less).map(drop), "is not planned");
    let mut more = plan.clone();
    more.tensors.push(TensorSpec { name: "x".into(), shape: vec![1], dtype: DType::F32 });
    said(
        create("a", Kind::Gguf, &more).map(drop),
        "tensor x is planned twice, or the model has none of that name",
    );
    let mut other = plan.clone();
    other.tensors[0].shape = vec![3];
    said(create("a", Kind::Gguf, &other).map(drop), "is planned as [3], the model's is [48, 24]");
    let mut blocks = plan.clone();
    blocks.tensors[0].dtype = DType::Q8_0;
    said(
        create("a", Kind::Gguf, &blocks).map(drop),
        "rows of 24 elements are no whole number of Q8_0 blocks",
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "something stayed");
    std::fs::create_dir(path("full")).unwrap();
    std::fs::write(path("full").join("mine.txt"), "x").unwrap();
    said(create("full", Kind::Safetensors, &plan).map(drop), "the folder is not empty; name a new one");
    said(create("full/mine.txt", Kind::Safetensors, &plan).map(drop), "there is a file of this name");
    said(create("no/such/place", Kind::Safetensors, &plan).map(drop), "cannot create it");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}
