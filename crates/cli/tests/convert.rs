//! `sparsam convert` from end to end, on tiny models and on the real one.

use sparsam_dtype::{DType, codec};
use sparsam_engine::{Opened, open};
use sparsam_tokenizer::GgufVocab;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn sparsam(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sparsam")).args(args).output().unwrap()
}

fn convert(input: &Path, output: &Path, more: &[&str]) -> serde_json::Value {
    let paths = [input.to_str().unwrap(), output.to_str().unwrap()];
    let out = sparsam(&[&["convert", paths[0], paths[1], "--json"], more].concat());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

fn golden(case: &str) -> PathBuf {
    sparsam_testkit::root().join("crates/models/tests/golden").join(case)
}

/// Every weight of both models, decoded, tensor by tensor.
fn assert_same_weights(a: &Opened, b: &Opened) {
    let read = |m: &Opened, i: usize| {
        let spec = m.model.weights(&m.source).unwrap().swap_remove(i);
        let t = m.source.require(&spec.source_name).unwrap();
        let t = spec.transform.apply(t.bytes, t.info.dtype, &t.info.shape).unwrap();
        let mut x = vec![0.0; t.shape.iter().product()];
        codec::decode(t.dtype, &t.bytes, &mut x).unwrap();
        (spec.name, t.shape, x)
    };
    let n = a.model.parameters().unwrap().len();
    assert!(n > 10);
    for i in 0..n {
        let ((name, shape, x), (name2, shape2, y)) = (read(a, i), read(b, i));
        assert_eq!((&name, shape), (&name2, shape2));
        assert!(x == y, "{name}");
    }
}

/// Rounded, decoded, back in GGUF: weights, configuration, vocabulary and template are those of the first file.
#[test]
fn the_real_model_there_and_back() {
    let Some(first) = sparsam_testkit::smollm2() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (hf, gguf) = (folder.path().join("hf"), folder.path().join("again.gguf"));
    let said = convert(&first, &hf, &[]);
    assert_eq!(said["tensors"], serde_json::json!({"F32": 272}));
    assert_eq!(said["parameters"], 134_515_008);
    let mut names: Vec<String> =
        std::fs::read_dir(&hf).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(
        names,
        [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    convert(&hf, &gguf, &["--dtype", "F32"]);
    let (a, b) = (open(&first).unwrap(), open(&gguf).unwrap());
    assert_eq!(a.model.config(), b.model.config());
    assert_same_weights(&a, &b);
    // Of the space in front of a text, which byte-level BPE has not, the first file says so and the second nothing.
    let vocab =
        |m: &Opened| GgufVocab { add_space_prefix: None, ..m.tokenizer().unwrap().to_gguf(49152).unwrap() };
    assert!(format!("{:?}", vocab(&a)) == format!("{:?}", vocab(&b)), "the vocabularies differ");
    let template = |m: &Opened| m.tokenizer().unwrap().chat_template().unwrap().source().to_string();
    assert_eq!(template(&a), template(&b));
    let generation = std::fs::read(hf.join("generation_config.json")).unwrap();
    let generation: serde_json::Value = serde_json::from_slice(&generation).unwrap();
    assert_eq!(generation["eos_token_id"], serde_json::json!([2, 0]));
}

#[test]
fn every_architecture_and_type() {
    let folder = tempfile::tempdir().unwrap();
    for case in ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "gpt2"] {
        let gguf = folder.path().join(format!("{case}.gguf"));
        let hf = folder.path().join(case);
        convert(&golden(case), &gguf, &["--dtype", "BF16"]);
        convert(&gguf, &hf, &[]);
        assert_same_weights(&open(&golden(case)).unwrap(), &open(&hf).unwrap());
    }
    // Rows of 24 are no whole blocks: all of it is said.
    let out = folder.path().join("q.gguf");
    let said = convert(&golden("llama"), &out, &["--dtype", "q4_k"]);
    assert!(said["notes"].to_string().contains("no whole number of Q4_K blocks of 256"), "{said}");
    assert!(said["notes"].to_string().contains("without a tokenizer"), "{said}");
    // Rows of 32 (the MLP's way down) are whole blocks of Q8_0.
    let said = convert(&golden("llama"), &out, &["--dtype", "Q8_0", "--force"]);
    assert_eq!(said["tensors"]["Q8_0"], 2, "{said}");
    let types: Vec<DType> = open(&out).unwrap().source.tensors().iter().map(|t| t.dtype).collect();
    assert!(types.contains(&DType::Q8_0) && types.contains(&DType::F32), "{types:?}");
}

#[test]
fn bad_input_is_one_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let llama = golden("llama").to_str().unwrap().to_string();
    let line = |args: &[&str], code: i32, said: &str| {
        let out = sparsam(&[&["convert"], args].concat());
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(said), "{args:?}: {stderr:?} lacks {said:?}");
        assert!(out.stdout.is_empty(), "{args:?}");
    };
    std::fs::write(path("there.gguf"), "x").unwrap();
    std::fs::create_dir(path("full")).unwrap();
    std::fs::write(path("full/a"), "x").unwrap();
    line(&[&llama], 2, "<OUT>");
    line(&[&llama, &path("o.gguf"), "--dtype", "Q9"], 2, "there is no such type; known are F32, F16");
    line(&[&llama, &path("o"), "--dtype", "Q8_0"], 1, "a safetensors folder cannot hold it");
    line(&[&llama, &path("o.safetensors")], 1, "give a folder");
    line(&[&path("missing.gguf"), &path("o.gguf")], 1, "no such file or folder");
    line(&[&path("there.gguf"), &path("o.gguf")], 1, "there.gguf");
    line(&[&llama, &path("there.gguf")], 1, "exists; name another file, or pass --force");
    line(&[&path("there.gguf"), &path("there.gguf"), "--force"], 1, "OUT is IN");
    line(&[&llama, &path("full")], 1, "the folder is not empty; name a new one");
    line(&[&llama, &path("no/such/o.gguf")], 1, "cannot create");
    let names = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(names, 2, "something stayed");
}
