//! What several tests of the binary need.
#![allow(dead_code)] // each test takes its part

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs the binary to its end.
pub fn sparsam(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sparsam")).args(args).stdin(Stdio::null()).output().unwrap()
}

/// What it printed; it must have succeeded.
#[track_caller]
pub fn stdout(out: &Output) -> String {
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{err}");
    String::from_utf8(out.stdout.clone()).unwrap()
}

/// It ends with `code`, says `says`, and prints no result.
#[track_caller]
pub fn fails(args: &[&str], code: i32, says: &str) {
    let out = sparsam(args);
    let err = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {err}");
    assert!(err.contains(says), "{args:?} should say {says:?}:\n{err}");
    assert!(out.stdout.is_empty(), "{args:?} printed a result");
}

/// The real model's path; `None` if the user wants no tests on it.
pub fn model() -> Option<String> {
    Some(sparsam_testkit::smollm2()?.to_str().unwrap().to_string())
}

/// `folder/model` in Hugging Face's layout: a Llama of 2 layers, 32 wide, that reads and writes bytes.
pub fn bytes_model(folder: &Path) -> String {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../train/tests/golden/lora/tiny");
    let model = folder.join("model");
    std::fs::create_dir_all(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(tiny.join(name), model.join(name)).unwrap();
    }
    let bytes = sparsam_tokenizer::train::byte_vocabulary();
    std::fs::write(model.join("tokenizer.json"), bytes.tokenizer).unwrap();
    std::fs::write(model.join("tokenizer_config.json"), bytes.config).unwrap();
    model.to_str().unwrap().to_string()
}
