//! `sparsam quantize` and `sparsam eval` of two models, as a person uses them.

mod common;

use common::{bytes_model, fails, model, sparsam, stdout};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(&sparsam(args))).unwrap()
}

/// A tiny model without a tokenizer; its rows of 24 are no whole blocks of anything.
fn tiny() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/golden/llama.gguf").to_string()
}

/// A file of 40 kB of English.
fn shakespeare() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/golden/shakespeare-head.txt");
    path.to_str().unwrap().to_string()
}

/// From a safetensors folder, calibrated on text that the model writes itself, healed, scored; the same bytes again.
#[test]
fn the_model_writes_its_own_calibration_text() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (model, text) = (bytes_model(dir), shakespeare());
    let out = |name: &str| dir.join(name).to_str().unwrap().to_string();
    let (a, b) = (out("a.gguf"), out("b.gguf"));
    let flags = ["--samples", "6", "--ctx", "32", "--heal", "4", "--eval", &text, "--json"];
    let run = |out: &str, more: &[&str]| json(&[&["quantize", &model, "-o", out], &flags[..], more].concat());
    let report = run(&a, &["--type", "Q4_0"]);
    let passport = &report["passport"];
    let said = passport["calibration"].as_str().unwrap();
    assert!(said.contains("sampled from the model itself") && said.contains("6 sequences of 32"), "{said}");
    assert!(passport["method"].as_str().unwrap().contains("healed by 4 steps"), "{passport}");
    assert_eq!(report["healing"].as_array().unwrap().len(), 2);
    let score = &passport["score"];
    assert_eq!(score["protocol"]["context"], 64);
    assert!(score["perplexity"].as_f64().unwrap() > 1.0 && score["standard_error"].as_f64().unwrap() > 0.0);
    assert!(report["runs"][1]["weight_bytes"].as_u64() < report["runs"][0]["weight_bytes"].as_u64());
    assert_eq!(json(&["info", &a, "--json"])["passport"], *passport);
    let health = report["layers"].as_array().unwrap().iter().find_map(|l| l["health"].as_object()).unwrap();
    assert_eq!(health["tokens"], 192);

    let first = std::fs::read(&a).unwrap();
    run(&a, &["--type", "Q4_0"]);
    let again = std::fs::read(&a).unwrap();
    assert!(first == again, "the same command gives the same bytes");
    let one = run(&a, &["--type", "Q4_0", "--threads", "1"]);
    assert_eq!(one["passport"]["score"]["divergence"], score["divergence"], "one thread gives other weights");

    // Two of one protocol are compared, two of unlike ones refused.
    run(&b, &["--type", "Q8_0"]);
    let both = stdout(&sparsam(&["eval", &a, &b]));
    assert!(both.contains("a.gguf") && both.contains("by one protocol"), "{both}");
    let other = out("other.txt");
    std::fs::write(&other, "Another text, of some length. ".repeat(80)).unwrap();
    let c = out("c.gguf");
    let args =
        ["quantize", &model, "-o", &c, "--type", "Q8_0", "--samples", "6", "--ctx", "32", "--eval", &other];
    stdout(&sparsam(&args));
    fails(&["eval", &a, &c], 1, "cannot be compared: text: shakespeare-head.txt");
    let beside = json(&["eval", &a, &c, "--perplexity", &text, "--ctx", "64", "--chunks", "2", "--json"]);
    assert!(beside["divergence"].as_f64().unwrap() > 0.0, "{beside}");
}

#[test]
fn calibration_text_comes_in_many_shapes() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (model, text) = (bytes_model(dir), shakespeare());
    let out = dir.join("a.gguf").to_str().unwrap().to_string();
    let file = |name: &str, content: String| {
        let path = dir.join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_string()
    };
    let base =
        ["quantize", &model, "-o", &out, "--type", "Q4_0", "--samples", "3", "--ctx", "32", "--calibration"];
    let with = |file: &str, more: &[&str]| sparsam(&[&base[..], &[file], more].concat());
    let of = |file: &str| -> String {
        let done = with(file, &["--json"]);
        let report: Value = serde_json::from_str(&stdout(&done)).unwrap();
        report["passport"]["calibration_hash"].as_str().unwrap().to_string()
    };
    let turn = |i: usize| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"what is {i} and {i}?\"}}, {{\"role\": \"assistant\", \"content\": \"it is {}\"}}]}}\n",
            2 * i
        )
    };
    let dialogues = of(&file("d.jsonl", (0..20).map(turn).collect()));
    let lines =
        of(&file("l.jsonl", (0..20).map(|i| format!("{{\"text\": \"line {i} of a text\"}}\n")).collect()));
    let strings =
        of(&file("s.jsonl", (0..20).map(|i| format!("{{\"body\": \"string {i} of it\"}}\n")).collect()));
    let plain = of(&text);
    let all = [&dialogues, &lines, &strings, &plain];
    assert!((0..4).all(|i| all[..i].iter().all(|h| *h != all[i])), "{all:?}");

    let says = |done: Output, says: &str| {
        let err = String::from_utf8_lossy(&done.stderr).to_string();
        assert_eq!(done.status.code(), Some(1), "{err}");
        assert!(err.contains(says), "{err}");
    };
    says(with(&file("bad.jsonl", "{\"text\": \"a\"}\n{oops\n".into()), &[]), "bad.jsonl, line 2");
    says(with(&file("empty.jsonl", "{\"n\": 3}\n".into()), &[]), "holds no string");
    says(with(&file("short.txt", "Too short.".into()), &[]), "one sequence takes 32");
    says(with(&text, &["--calibration-skip", "8990"]), "one sequence takes 32");
    says(with("no-such.txt", &[]), "no-such.txt");
    // What was calibrated on is not to be scored on, not without a word.
    let done = with(&text, &["--eval", &text]);
    assert!(done.status.success());
    let err = String::from_utf8_lossy(&done.stderr);
    assert!(err.contains("of the text to be scored is calibration text"), "{err}");
    let done = with(&text, &["--calibration-skip", "4000", "--eval", &text]);
    assert!(done.status.success() && !String::from_utf8_lossy(&done.stderr).contains("warning"));
}

/// Goals: a size, bits, memory and a divergence; what is impossible is said with what would be possible.
#[test]
fn goals_are_met() {
    let dir = tempfile::tempdir().unwrap();
    let (model, text) = (bytes_model(dir.path()), shakespeare());
    let out = dir.path().join("a.gguf").to_str().unwrap().to_string();
    let base =
        ["quantize", &model, "-o", &out, "--calibration", &text, "--samples", "4", "--calibration-ctx", "32"];
    let plan = |more: &[&str]| json(&[&base[..], &["--dry-run", "--json"], more].concat());
    let bytes = |more: &[&str]| plan(more)["tensor_bytes"].as_u64().unwrap();
    let bits = plan(&["--bits", "6"])["bits_per_weight"].as_f64().unwrap();
    assert!(bits <= 6.0 && bits > 5.0, "{bits}");
    // A looser goal takes fewer bytes.
    let [strict, loose] = ["0.01", "0.5"].map(|kl| bytes(&["--kl", kl]));
    assert!(loose < strict, "{loose} bytes for a divergence of 0.5, {strict} for 0.01");
    assert!(plan(&["--kl", "0.01"])["seconds"]["value"].as_f64().unwrap() > 0.0);
    // 80 MB are for the program itself; a longer context leaves less.
    let [short, long] = ["8", "64"].map(|ctx| bytes(&["--fit", "80.025MB", "--ctx", ctx]));
    assert!(long < short, "{long} bytes beside 64 tokens, {short} beside 8");
    let done = json(&[&base[..], &["--size", "40kB", "--json"]].concat());
    let written = std::fs::metadata(&out).unwrap().len();
    assert_eq!(done["bytes"], written);
    assert!(written <= 40_000 && written > 30_000, "{written}");
    assert_eq!(done["passport"]["goal"], "at most 40.0 kB");
    let shown = stdout(&sparsam(&[&base[..], &["--size", "40kB", "--dry-run"]].concat()));
    assert!(shown.contains("expected divergence") && shown.contains("ffn_down.weight"), "{shown}");
    assert!(shown.contains("tokens/s") && shown.contains("tokens a second here"), "{shown}");
    // A speed that any machine reaches costs nothing: the types that lose least.
    let best = bytes(&["--bits", "32"]);
    let done = json(&[&base[..], &["--speed", "0.5", "--json"]].concat());
    assert_eq!(std::fs::metadata(&out).unwrap().len(), done["bytes"].as_u64().unwrap());
    assert_eq!(plan(&["--speed", "0.5"])["tensor_bytes"].as_u64().unwrap(), best);
    assert_eq!(done["passport"]["goal"], "at least 0.5 tokens a second");
    let positive = |v: &Value| v.as_f64().is_some_and(|v| v > 0.5);
    assert!(positive(&done["expected_tokens_per_second"]), "{done}");
    assert!(positive(&done["runs"][1]["tokens_per_second"]), "measured after it is written: {done}");
    let shown = stdout(&sparsam(&[&base[..], &["--speed", "0.5"]].concat()));
    assert!(shown.contains(" expected, "), "forecast beside fact: {shown}");
    for (goal, value, says) in [
        ("--kl", "1e-9", "larger --kl"),
        ("--size", "10kB", "or more"),
        ("--speed", "1e9", "writes 1000000000 tokens a second here: the fastest"),
    ] {
        let done = sparsam(&[&base[..], &[goal, value]].concat());
        let err = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.code() == Some(1) && err.contains(says), "{err}");
    }
    fails(&[&base[..], &["--fit", "81MB", "--ctx", "100"]].concat(), 1, "made for 64 tokens");
}

#[test]
fn quantize_says_what_it_cannot_do() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.gguf");
    let (model, out) = (tiny(), out.to_str().unwrap());
    let base = ["quantize", &model, "-o", out];
    let check = |more: &[&str], code: i32, says: &str| fails(&[&base[..], more].concat(), code, says);
    check(&[], 2, "--type");
    check(&["--type", "Q4_0", "--size", "80MB"], 2, "--size");
    check(&["--kl", "0.1", "--fit", "8GB"], 2, "--fit");
    check(&["--size", "80 bananas"], 2, "no unit");
    check(&["--kl=-1"], 1, "--kl is -1");
    check(&["--speed", "0"], 1, "--speed is 0");
    check(&["--speed", "20", "--size", "1GB"], 2, "--size");
    check(&["--type", "Q4_9", "--method", "nearest"], 1, "no type \"Q4_9\"; known are Q4_0");
    check(&["--type", "GPTQ5"], 1, "2, 3, 4 or 8 bits, not 5");
    check(&["--type", "GPTQ4", "--group-size", "48"], 1, "groups of 48");
    // The tiny model has no tokenizer, so it can neither read nor write text.
    check(&["--type", "Q8_0"], 1, "give --calibration FILE or --method nearest");
    check(&["--type", "Q4_0", "--calibration", "no-such.txt"], 1, "tokenizer");
    check(&["--type", "Q4_0", "--asymmetric", "2"], 1, "from 0 to 1");
    check(&["--type", "Q4_0", "--samples", "0"], 1, "--samples is 0");
    check(&["--type", "Q4_0", "--imatrix", "x.dat", "--method", "gptq"], 1, "how inputs go together");
    check(&["--type", "Q4_0", "--imatrix", "no-such.dat"], 1, "no-such.dat");
    check(&["--type", "Q4_0", "--imatrix", &shakespeare()], 1, "importance matrix");
    check(
        &["--type", "F16", "--method", "nearest", "--redo", "blk.0.attn_q.weight"],
        1,
        "--redo takes all other",
    );
    let into = folder.path().to_str().unwrap();
    fails(
        &["quantize", &model, "-o", into, "--type", "F16", "--method", "nearest"],
        1,
        "name a .gguf file in it",
    );
    fails(
        &["quantize", &model, "-o", &model, "--type", "F16", "--method", "nearest"],
        1,
        "is the model itself",
    );
    fails(&["quantize", &model, "-o", "/no/such/x.gguf", "--type", "F16"], 1, "no such folder");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing half-written stays");
}

#[test]
fn quantize_writes_what_info_shows() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.gguf");
    let (model, out) = (tiny(), out.to_str().unwrap());
    let args = ["quantize", &model, "-o", out, "--type", "F16", "--method", "nearest"];
    let plan = json(&[&args[..], &["--dry-run", "--json"]].concat());
    assert!(!Path::new(out).exists(), "a dry run writes nothing");
    assert!(
        plan["seconds"]["value"].as_f64().is_some() && plan["memory_bytes"].as_f64().unwrap() > 0.0,
        "{plan}"
    );
    let done = json(&[&args[..], &["--json"]].concat());
    assert_eq!(done["bits_per_weight"], plan["bits_per_weight"]);
    let info = json(&["info", out, "--json"]);
    assert!(info["types"]["F16"]["tensors"].as_u64().unwrap() > 10, "{info}");
    assert_eq!(info["types"]["F32"]["tensors"], plan["types"]["F32"]["tensors"]);
    assert_eq!(info["passport"], done["passport"]);
    assert_eq!(info["passport"]["parent"], "llama.gguf");
    assert_eq!(info["passport"]["parent_sha256"].as_str().unwrap().len(), 64);
    assert!(info["passport"]["command"].as_str().unwrap().starts_with("sparsam quantize "), "{info}");
    let text = stdout(&sparsam(&["info", out]));
    assert!(text.contains("made from     llama.gguf") && text.contains("nearest codes"), "{text}");
    let report: Value = serde_json::from_slice(&std::fs::read(format!("{out}.json")).unwrap()).unwrap();
    assert_eq!(report, done);
    assert!(std::fs::read_to_string(format!("{out}.html")).unwrap().contains("model.norm.weight"));
    let receipt = std::fs::read_to_string(format!("{out}.receipt.json")).unwrap();
    assert!(receipt.contains("quantize") && receipt.contains("llama.gguf"), "{receipt}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 4, "only result, report and receipt stay");
    fails(&["eval", out, out], 1, "was never measured");
    fails(&["eval", &model, out], 1, "has no passport");
}

/// Types that do not fit the rows, and models that are rounded already, are told about before the work begins.
#[test]
fn what_is_worth_knowing_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let out = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let said = |args: &[&str]| {
        let done = sparsam(&[&["quantize"], args, &["--method", "nearest"]].concat());
        let err = String::from_utf8_lossy(&done.stderr).to_string();
        assert!(done.status.success(), "{err}");
        err
    };
    let (a, b) = (out("a.gguf"), out("b.gguf"));
    let err = said(&[&tiny(), "-o", &a, "--type", "Q4_0"]);
    assert!(err.contains("become F16: rows of 24 are no whole blocks of Q4_0"), "{err}");
    let model = bytes_model(dir.path());
    let err = said(&[&model, "-o", &a, "--type", "Q4_0"]);
    assert!(!err.contains("rounded already"), "{err}");
    let err = said(&[&a, "-o", &b, "--type", "Q8_0"]);
    let noise = err.split("carry about ").nth(1).and_then(|t| t.split('%').next());
    let noise: f64 = noise.unwrap_or_else(|| panic!("{err}")).parse().unwrap();
    // 4 bits of normal weights, 32 a scale: a seventh of a weight's size, near enough.
    assert!(err.contains("rounded already (Q4_0)") && (5.0..12.0).contains(&noise), "{err}");
    let info = json(&["info", &b, "--json"]);
    assert_eq!(info["passport"]["parent"], "a.gguf");
}

/// One tensor anew, activations on disk: all other tensors stay.
#[test]
fn one_tensor_is_redone() {
    let dir = tempfile::tempdir().unwrap();
    let model = bytes_model(dir.path());
    let (out, text) = (dir.path().join("a.gguf"), shakespeare());
    let path = out.to_str().unwrap();
    let base = ["quantize", &model, "-o", path, "--type", "Q4_0", "--calibration", &text, "--samples", "4"];
    let base = [&base[..], &["--ctx", "32", "--json"]].concat();
    let first = json(&base);
    let before = std::fs::read(&out).unwrap();
    let spilled = json(&[&base[..], &["--memory", "1kB"]].concat());
    assert_eq!(
        spilled["layers"][1]["error"], first["layers"][1]["error"],
        "on disk the numbers are the same"
    );
    let redo = [&base[..], &["--redo", "blk.1.ffn_up.weight", "--damping", "0.3"]].concat();
    let report = json(&redo);
    let changed: Vec<&Value> = report["layers"]
        .as_array()
        .unwrap()
        .iter()
        .zip(first["layers"].as_array().unwrap())
        .filter(|(a, b)| a["error"] != b["error"])
        .map(|(a, _)| &a["name"])
        .collect();
    assert_eq!(changed, ["model.layers.1.mlp.up_proj.weight"]);
    assert!(std::fs::read(&out).unwrap() != before);
    fails(&[&base[..], &["--redo", "blk.7.x"]].concat(), 1, "no tensor blk.7.x is rounded");
}

/// A full disk (here: a limit on the size of files) is said, nothing half-written stays, and what was there is as it was.
#[cfg(unix)]
#[test]
fn a_full_disk_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.gguf");
    std::fs::write(&out, "what was there").unwrap();
    let script = format!(
        "trap '' XFSZ; ulimit -f 8; exec {} quantize {} -o {} --type F16 --method nearest",
        env!("CARGO_BIN_EXE_sparsam"),
        tiny(),
        out.display()
    );
    let done = Command::new("sh").args(["-c", &script]).output().unwrap();
    let err = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{err}");
    assert!(err.contains("cannot write") && err.contains("out.gguf"), "{err}");
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "what was there");
    let left: Vec<String> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().to_string())
        .filter(|n| n.ends_with(".tmp"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A model against itself: nothing diverges.
#[test]
fn eval_compares_with_another_model() {
    let Some(model) = model() else { return };
    let text = shakespeare();
    let args = ["eval", &model, &model, "--perplexity", &text, "--ctx", "64", "--chunks", "2", "--json"];
    let json = json(&args);
    assert_eq!((&json["top1_agreement"], &json["tokens_scored"]), (&1.0.into(), &62.into()));
    assert!(json["divergence"].as_f64().unwrap() < 1e-5, "{json}");
    assert_eq!(json["perplexity"], json["reference_perplexity"]);
    fails(&["eval", &model, &model, "--perplexity", &text, "--against", &model], 2, "--against");
}
