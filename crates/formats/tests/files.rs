//! Readers and writers held to files that the `gguf` and `safetensors` packages wrote, and to the real model.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;
use sparsam_dtype::DType;
use sparsam_formats::gguf::{self, Array, Value};
use sparsam_formats::{Kind, Source, TensorSpec, safetensors};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// What `scripts/goldens/formats_files.py` says is in `name`.
fn expected(name: &str) -> Vec<Json> {
    let all: Json = serde_json::from_slice(&std::fs::read(golden("expected.json")).unwrap()).unwrap();
    all[name].as_array().unwrap().clone()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// That `source` holds exactly these tensors.
fn check(source: &Source, want: &[Json]) {
    let want: Vec<&Json> = want.iter().filter(|t| t["dtype"] != "BOOL").collect();
    assert_eq!(source.tensors().len(), want.len());
    for t in want {
        let name = t["name"].as_str().unwrap();
        let got = source.require(name).unwrap();
        let shape: Vec<usize> =
            t["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
        assert_eq!(got.info.shape, shape, "{name}");
        assert_eq!(got.info.dtype.name(), t["dtype"], "{name}");
        assert_eq!(hex(got.bytes), t["hex"], "{name}");
        assert_eq!(got.info.dtype.bytes_for(got.info.numel()), Some(got.info.bytes_len()), "{name}");
    }
}

#[test]
fn reads_gguf_as_the_gguf_package_wrote_it() {
    let source = Source::open(golden("all.gguf")).unwrap();
    assert_eq!(source.kind(), Kind::Gguf);
    check(&source, &expected("all.gguf"));
    let m = source.gguf_metadata().unwrap();
    let strings = ["a", "", "ß", "<|im_start|>"].map(String::from).to_vec();
    let want = [
        ("general.architecture", Value::String("llama".into())),
        ("t.u8", Value::U8(200)),
        ("t.i8", Value::I8(-100)),
        ("t.u16", Value::U16(60000)),
        ("t.i16", Value::I16(-30000)),
        ("t.u32", Value::U32(4_000_000_000)),
        ("t.i32", Value::I32(-2_000_000_000)),
        ("t.f32", Value::F32(0.1)),
        ("t.true", Value::Bool(true)),
        ("t.false", Value::Bool(false)),
        ("t.string", Value::String("Grüße, 世界 🦀".into())),
        ("t.u64", Value::U64((1 << 63) + 1)),
        ("t.i64", Value::I64(-(1 << 62))),
        ("t.f64", Value::F64(0.1)),
        ("t.strings", Value::Array(Array::String(strings))),
        ("t.ints", Value::Array(Array::I32(vec![-1, 2, 3]))),
        ("t.floats", Value::Array(Array::F32(vec![0.5, -1.25]))),
        ("t.bools", Value::Array(Array::Bool(vec![true, false, true]))),
        ("t.bytes", Value::Array(Array::U8(vec![1, 2, 255]))),
        ("t.doubles", Value::Array(Array::F64(vec![0.1, 1e300]))),
    ];
    let got: Vec<(&str, &Value)> = m.iter().collect();
    let want: Vec<(&str, &Value)> = want.iter().map(|(k, v)| (*k, v)).collect();
    assert_eq!(got, want);
}

#[test]
fn version_2_reads_as_version_3() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = std::fs::read(golden("all.gguf")).unwrap();
    bytes[4] = 2;
    std::fs::write(dir.path().join("old"), bytes).unwrap();
    let source = Source::open(dir.path().join("old")).unwrap();
    assert_eq!(source.kind(), Kind::Gguf, "known by its first bytes, whatever its name");
    check(&source, &expected("all.gguf"));
}

#[test]
fn a_split_model_opens_by_any_of_its_parts() {
    for part in 1..=3 {
        let source = Source::open(golden(&format!("split-{part:05}-of-00003.gguf"))).unwrap();
        check(&source, &expected("split"));
        assert_eq!(source.gguf_metadata().unwrap().str("general.name").unwrap(), "in three parts");
    }
}

#[test]
fn a_split_model_must_be_whole() {
    let said = |prepare: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        for part in 1..=3 {
            let name = format!("split-{part:05}-of-00003.gguf");
            std::fs::copy(golden(&name), dir.path().join(&name)).unwrap();
        }
        prepare(dir.path());
        let first = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).min().unwrap();
        Source::open(first).err().unwrap().to_string()
    };
    let e = said(&|d| std::fs::remove_file(d.join("split-00002-of-00003.gguf")).unwrap());
    assert!(e.contains("split-00002-of-00003.gguf") && e.contains("all 3 parts"), "{e}");
    let e = said(&|d| {
        std::fs::copy(d.join("split-00001-of-00003.gguf"), d.join("split-00003-of-00003.gguf")).unwrap();
    });
    assert!(e.contains("part 1 of 3") && e.contains("part 3 of 3"), "{e}");
    let e = said(&|d| std::fs::rename(d.join("split-00001-of-00003.gguf"), d.join("a.gguf")).unwrap());
    assert!(e.contains("should end in -00001-of-00003.gguf"), "{e}");
}

#[test]
fn reads_safetensors_as_its_package_wrote_it() {
    let source = Source::open(golden("single.safetensors")).unwrap();
    assert_eq!(source.kind(), Kind::Safetensors);
    check(&source, &expected("single"));
    assert_eq!(source.unsupported(), [("mask".to_string(), "BOOL".to_string())]);
    let e = source.require("mask").unwrap_err().to_string();
    assert!(e.contains("tensor mask has type BOOL, which is not supported"), "{e}");
    let e = source.require("nobody").unwrap_err().to_string();
    assert!(e.contains("there is no tensor nobody among the"), "{e}");
    assert!(source.tensor("nobody").is_none() && source.config_json().is_none());
}

#[test]
fn a_folder_of_shards_is_one_model() {
    for path in ["shards", "shards/model.safetensors.index.json"] {
        let source = Source::open(golden(path)).unwrap();
        check(&source, &expected("shards"));
        assert_eq!(source.config_json().unwrap()["hidden_size"], 64);
        assert!(source.sidecar("config.json").unwrap().unwrap().starts_with(b"{"));
        assert_eq!(source.sidecar("tokenizer.json").unwrap(), None);
    }
}

/// Read and written again, a file is the same to the last byte: the writers agree with the packages' own.
#[test]
fn rewritten_files_are_identical() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["all.gguf", "split-00001-of-00003.gguf"] {
        let old = gguf::File::open(golden(name)).unwrap();
        // A part of a split stands alone only without its keys; here it shall be rewritten as it was.
        let specs: Vec<TensorSpec> = old.tensors().iter().map(TensorSpec::from).collect();
        let of_this_file = if name.starts_with("split") { 2 } else { specs.len() };
        let path = dir.path().join(name);
        let mut w = gguf::Writer::create(&path, old.metadata(), &specs[..of_this_file]).unwrap();
        for t in &old.tensors()[..of_this_file] {
            for piece in old.tensor(&t.name).unwrap().bytes.chunks(7) {
                w.append(&t.name, piece).unwrap();
            }
        }
        assert!(!path.exists(), "it appears when it is finished");
        w.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(golden(name)).unwrap(), "{name}");
    }
    for name in ["shards/model-00001-of-00002.safetensors", "shards/model-00002-of-00002.safetensors"] {
        let old = safetensors::File::open(golden(name)).unwrap();
        let specs: Vec<TensorSpec> = old.tensors().iter().map(TensorSpec::from).collect();
        let path = dir.path().join("copy.safetensors");
        let mut w = safetensors::Writer::create(&path, old.metadata(), &specs).unwrap();
        for t in old.tensors() {
            w.append(&t.name, old.tensor(&t.name).unwrap().bytes).unwrap();
        }
        w.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(golden(name)).unwrap(), "{name}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3, "no temporary file is left");
}

#[test]
fn writers_hold_the_caller_to_what_was_announced() {
    let dir = tempfile::tempdir().unwrap();
    let spec =
        |name: &str, shape: &[usize], dtype| TensorSpec { name: name.into(), shape: shape.to_vec(), dtype };
    let two = [spec("a", &[2], DType::F16), spec("none", &[0, 3], DType::F32), spec("b", &[1], DType::F32)];
    let gguf =
        |specs: &[TensorSpec]| gguf::Writer::create(dir.path().join("x"), &gguf::Metadata::default(), specs);
    let safe = |specs: &[TensorSpec]| safetensors::Writer::create(dir.path().join("x"), &[], specs);

    let mut w = gguf(&two).unwrap();
    let e = w.append("b", &[0; 4]).unwrap_err().to_string();
    assert!(e.contains("tensor b is given before a is complete"), "{e}");
    let e = w.append("a", &[0; 5]).unwrap_err().to_string();
    assert!(e.contains("tensor a was announced with 4 bytes, but 5 were given"), "{e}");
    w.append("a", &[1; 3]).unwrap();
    let e = w.finish().unwrap_err().to_string();
    assert!(e.contains("tensor a has 3 of its 4 bytes"), "{e}");

    let mut w = safe(&two).unwrap();
    w.append("a", &[1; 4]).unwrap();
    w.append("none", &[]).unwrap();
    w.append("b", &[2; 4]).unwrap();
    let e = w.append("b", &[2; 1]).unwrap_err().to_string();
    assert!(e.contains("all tensors are complete"), "{e}");
    drop(w);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing half-written stays");

    for (result, said) in [
        (gguf(&[spec("a", &[3], DType::U8)]).err(), "type U8, which GGUF does not have"),
        (gguf(&[spec("a", &[1, 1, 1, 1, 1], DType::F32)]).err(), "5 axes"),
        (
            gguf(&[spec("a", &[3, 33], DType::Q4_0)]).err(),
            "rows of 33 elements are no whole number of Q4_0 blocks",
        ),
        (gguf(&[two[0].clone(), two[0].clone()]).err(), "two tensors are named a"),
        (safe(&[spec("a", &[3, 32], DType::Q4_0)]).err(), "Q4_0, which safetensors cannot hold"),
        (safe(&[spec("a", &[usize::MAX, 2], DType::F32)]).err(), "more elements than this machine can count"),
    ] {
        let e = result.expect(said).to_string();
        assert!(e.contains(said), "{e:?} lacks {said:?}");
    }
}

#[test]
fn a_folder_names_its_only_model() {
    let dir = tempfile::tempdir().unwrap();
    let put = |from: &str, to: &str| std::fs::copy(golden(from), dir.path().join(to)).unwrap();
    let said = || Source::open(dir.path()).err().unwrap().to_string();
    assert!(said().contains("no .gguf or .safetensors file"), "{}", said());
    for part in 1..=3 {
        let name = format!("split-{part:05}-of-00003.gguf");
        put(&name, &name);
    }
    check(&Source::open(dir.path()).unwrap(), &expected("split"));
    put("all.gguf", "b.gguf");
    assert!(said().contains("2 models (b.gguf, split-00001-of-00003.gguf)"), "{}", said());
    put("single.safetensors", "model.safetensors");
    assert_eq!(Source::open(dir.path()).unwrap().kind(), Kind::Safetensors, "the known name decides");
    std::fs::write(dir.path().join("config.json"), "{\"a\": ").unwrap();
    assert!(said().contains("config.json: the file: it is not JSON"), "{}", said());
}

#[test]
fn opens_the_real_model() {
    let Some(path) = sparsam_testkit::smollm2() else { return };
    let source = Source::open(&path).unwrap();
    let m = source.gguf_metadata().unwrap();
    assert_eq!(m.str("general.architecture").unwrap(), "llama");
    assert_eq!(m.usize("llama.block_count").unwrap(), 30);
    assert_eq!(m.strings("tokenizer.ggml.tokens").unwrap().len(), 49152);
    assert_eq!(source.tensors().len(), 272);
    let q = source.require("blk.29.attn_q.weight").unwrap();
    assert_eq!((&q.info.shape[..], q.info.dtype), (&[576, 576][..], DType::Q4_1));
    let numel: usize = source.tensors().iter().map(|t| t.numel()).sum();
    assert_eq!(numel, 134_515_008);
}

/// Resident pages of this process that belong to `path`, in KiB.
#[cfg(target_os = "linux")]
fn resident_kib(path: &Path) -> usize {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let path = path.to_str().unwrap();
    let (mut ours, mut kib) = (false, 0);
    for line in smaps.lines() {
        if let Some(rss) = line.strip_prefix("Rss:") {
            if ours {
                kib += rss.trim().trim_end_matches(" kB").parse::<usize>().unwrap();
            }
        } else if line.split(' ').next().is_some_and(|w| w.contains('-')) {
            ours = line.ends_with(path);
        }
    }
    kib
}

/// Released pages leave the process's memory and come back with the same bytes.
#[cfg(target_os = "linux")]
#[test]
fn released_memory_is_given_back_and_readable() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().canonicalize().unwrap().join("big.safetensors");
    let bytes: Vec<u8> = (0..8u32 << 20).map(|i| (i ^ i >> 8 ^ i >> 16) as u8).collect();
    let spec = |name: &str| TensorSpec { name: name.into(), shape: vec![bytes.len()], dtype: DType::U8 };
    let mut w = safetensors::Writer::create(&path, &[], &[spec("a"), spec("b")]).unwrap();
    w.append("a", &bytes).unwrap();
    w.append("b", &bytes).unwrap();
    w.finish().unwrap();

    let source = Source::open(&path).unwrap();
    for name in ["a", "b"] {
        assert!(source.tensor(name).unwrap().bytes == bytes);
    }
    let before = resident_kib(&path);
    assert!(before >= 16 << 10, "all 16 MiB were read: {before} KiB");
    source.release("a");
    source.release("nobody");
    let after = resident_kib(&path);
    assert!((8 << 10..(8 << 10) + 64).contains(&after), "half is left: {after} KiB of {before}");
    for name in ["a", "b"] {
        assert!(source.tensor(name).unwrap().bytes == bytes, "readable again");
    }
}
