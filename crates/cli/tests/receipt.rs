//! `sparsam receipt` and `sparsam doctor` from end to end.

use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};

fn sparsam(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sparsam")).args(args).output().expect("the binary runs")
}

#[track_caller]
fn answer(args: &[&str]) -> Value {
    let out = sparsam(&[args, &["--json"]].concat());
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

fn record(file: &Path, command: &str, seconds: f64, parents: &[(&str, &str)]) {
    let parents: Vec<Value> =
        parents.iter().map(|(role, path)| json!({"role": role, "path": path})).collect();
    let fact = json!({"seconds": seconds, "joules": 50.0 * seconds, "usd": seconds / 1000.0, "tokens": 1e6});
    let forecast = json!({
        "what": command,
        "memory": {"weights": 1e6},
        "seconds": {"low": 50.0, "value": 80.0, "high": 110.0},
        "disk_bytes": 1e6,
        "joules": {"low": 2500.0, "value": 4000.0, "high": 5500.0},
        "usd": {"low": 0.05, "value": 0.08, "high": 0.11},
    });
    let record = json!({
        "version": 1, "command": command, "machine": "desk", "watts": 50.0, "usd_per_hour": 3.6,
        "forecast": forecast, "fact": fact, "parents": parents,
    });
    std::fs::write(file, record.to_string()).unwrap();
}

/// teacher/ -> student/ -> student-q4.gguf, with a base model of which nothing is recorded.
fn family() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    for folder in ["teacher", "student"] {
        std::fs::create_dir(at(folder)).unwrap();
    }
    std::fs::write(at("base.gguf"), "weights").unwrap();
    std::fs::write(at("student-q4.gguf"), "weights").unwrap();
    record(&at("teacher/receipt.json"), "train", 1000.0, &[("base", "../base.gguf")]);
    record(
        &at("student/receipt.json"),
        "distill",
        100.0,
        &[("teacher", "../teacher"), ("base", "../base.gguf")],
    );
    record(&at("student-q4.gguf.receipt.json"), "quantize", 10.0, &[("base", "student")]);
    root
}

#[test]
fn a_family_is_added_up_from_teacher_to_served_file() {
    let root = family();
    let file = root.path().join("student-q4.gguf");
    let args = ["receipt", file.to_str().unwrap(), "--answers", "1000", "--usd-per-answer", "0.001"];
    let got = answer(&args);
    let commands: Vec<&str> =
        got["lines"].as_array().unwrap().iter().map(|l| l["command"].as_str().unwrap()).collect();
    assert_eq!(commands, ["train", "distill", "quantize"]);
    assert_eq!(got["total"]["seconds"], 1110.0);
    assert_eq!(got["total"]["joules"], 55500.0);
    assert!((got["total"]["usd"].as_f64().unwrap() - 1.11).abs() < 1e-12);
    // 1.11 dollars over 1000 answers are 111 cents a thousand; 0.001 dollars each are 100 more.
    assert!((got["cents_per_thousand_answers"].as_f64().unwrap() - 211.0).abs() < 1e-9);
    assert_eq!(got["unrecorded"].as_array().unwrap().len(), 1);
    // Forecast and fact of the file itself: 10 seconds, forecast 50 to 110.
    let time = got["forecast_against_fact"].as_array().unwrap().iter().find(|r| r["what"] == "time").unwrap();
    assert_eq!(
        (&time["forecast"], &time["fact"], &time["held"]),
        (&json!(80.0), &json!(10.0), &json!(false))
    );
    let shown = String::from_utf8(sparsam(&args).stdout).unwrap();
    for part in ["all together", "$1.11", "211 cents", "base.gguf", "Forecast and fact", "estimate"] {
        assert!(shown.contains(part), "no `{part}` in\n{shown}");
    }
}

#[test]
fn answers_of_a_real_model_are_priced_by_the_roofline() {
    let Some(model) = sparsam_testkit::smollm2() else { return };
    let root = family();
    let folder = root.path().join("student");
    let got = answer(&[
        "receipt",
        folder.to_str().unwrap(),
        "--answers",
        "1M",
        "--hardware",
        "l4",
        "--model",
        model.to_str().unwrap(),
    ]);
    // 300 tokens, each at least the reading of 96.6 MB at 300 GB/s times 0.7, at $0.44 an hour.
    let usd = got["usd_per_answer"].as_f64().unwrap();
    assert!((1.0..1.3).contains(&(usd / (300.0 * 96.6e6 / 210e9 * 0.44 / 3600.0))), "{usd:e}");
    assert!(got["joules_per_answer"].as_f64().unwrap() > 0.0);
}

#[test]
fn what_is_not_recorded_or_broken_is_said() {
    let root = family();
    let fails = |args: &[&str], part: &str| {
        let out = sparsam(&[&["receipt"], args].concat());
        let message = String::from_utf8_lossy(&out.stderr).to_string();
        assert_eq!(out.status.code(), Some(1), "{message}");
        assert!(message.contains(part), "`{message}` does not say `{part}`");
    };
    let at = |name: &str| root.path().join(name).display().to_string();
    fails(&[&at("nowhere")], "no such run");
    fails(&[&at("base.gguf")], "nothing is known of its cost");
    fails(&[&at("student"), "--answers", "10", "--hardware", "l4"], "name it with --model");
    std::fs::write(root.path().join("teacher/receipt.json"), "{\"version\": 1").unwrap();
    fails(&[&at("student-q4.gguf")], "teacher/receipt.json");
}

#[test]
fn the_doctor_measures_this_machine() {
    let got = answer(&["doctor", "--threads", "1"]);
    assert_eq!(got["threads"], 1);
    for roof in ["read_bandwidth", "f32_flops", "bf16_flops", "int8_ops", "matmul_flops"] {
        let value = got[roof].as_f64().unwrap();
        assert!((1e8..1e13).contains(&value), "{roof} {value:e}");
    }
    let available = got["instructions_available"].as_str().unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_sparsam"))
        .args(["doctor", "--threads", "1"])
        .env("SPARSAM_SIMD", "scalar")
        .output()
        .unwrap();
    let shown = String::from_utf8(out.stdout).unwrap();
    assert!(available == "scalar" || shown.contains("held back by SPARSAM_SIMD"), "{shown}");
}

#[test]
fn a_training_run_says_what_it_will_take_and_leaves_its_receipt() {
    let root = tempfile::tempdir().unwrap();
    let text = root.path().join("text.txt");
    std::fs::write(&text, "How much wood would a woodchuck chuck? ".repeat(500)).unwrap();
    let mut flags = vec!["train", "--data", text.to_str().unwrap()];
    flags.extend(
        "--layers 1 --hidden 32 --heads 2 --intermediate 64 --tokenizer bytes --ctx 32 --batch 2".split(' '),
    );
    flags.extend("--steps 60 --sample-every 0 --usd-per-hour 3.6 --threads 1".split(' '));
    // A dry run leaves nothing behind.
    let before = std::fs::read_dir(root.path()).unwrap().count();
    let forecast = answer(&[&flags[..], &["--dry-run"]].concat());
    let of = |key: &str| forecast["seconds"][key].as_f64().unwrap();
    assert!(0.0 < of("low") && of("low") < of("value") && of("value") < of("high"), "{forecast}");
    // 3.6 dollars an hour are a thousandth of a dollar a second.
    assert!((forecast["usd"]["value"].as_f64().unwrap() / of("value") - 1e-3).abs() < 1e-9);
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), before);
    let run = root.path().join("run");
    let out = sparsam(&[&flags[..], &["--out", run.to_str().unwrap()]].concat());
    let shown = String::from_utf8_lossy(&out.stdout).to_string();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(shown.contains("Forecast and fact of this run"), "{shown}");
    assert!(String::from_utf8_lossy(&out.stderr).contains("expected: "));
    let got = answer(&["receipt", run.to_str().unwrap()]);
    let fact = &got["lines"][0]["fact"];
    assert_eq!(got["lines"][0]["command"], "train");
    let seconds = fact["seconds"].as_f64().unwrap();
    assert!((fact["usd"].as_f64().unwrap() / seconds - 1e-3).abs() < 1e-9, "{fact}");
    assert!(fact["tokens"].as_f64().unwrap() > 3000.0 && fact["joules"].as_f64().unwrap() > 0.0, "{fact}");
    let what: Vec<&str> = got["forecast_against_fact"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["what"].as_str().unwrap())
        .collect();
    assert_eq!(what, ["memory", "disk", "time", "energy", "money"]);
}

/// The output of a command that must succeed, in `folder`.
#[track_caller]
fn done(folder: &Path, line: &str) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_sparsam"))
        .args(line.split_whitespace())
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// A forecast as `--dry-run --json` prints it is one: memory by kind, disk, intervals around positive values.
#[track_caller]
fn is_forecast(shown: &str, what: &str) -> Value {
    let got: Value = serde_json::from_str(shown).unwrap();
    assert_eq!(got["what"], what);
    let kinds: f64 = got["memory"].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).sum();
    assert!(kinds > 1e6 && (kinds / got["memory_bytes"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{got}");
    assert!(got["disk_bytes"].as_f64().unwrap() > 0.0 && got["fits"] == true, "{got}");
    for of in ["seconds", "joules", "usd"] {
        let [low, value, high] = ["low", "value", "high"].map(|k| got[of][k].as_f64().unwrap());
        assert!(0.0 < low && low <= value && value <= high, "{of} {got}");
    }
    got
}

#[test]
fn every_command_that_makes_a_model_says_what_it_takes_and_leaves_its_receipt() {
    let root = tempfile::tempdir().unwrap();
    let at = root.path();
    // A teacher that has one answer.
    std::fs::write(at.join("text.txt"), "Q: What is 1 and 1?\nA: So the answer is 4.\n\n".repeat(400))
        .unwrap();
    std::fs::write(at.join("plain.toml"), "task = \"arithmetic\"\ninstruction = \"\"\nexample = []\n")
        .unwrap();
    let lines = |n: usize, line: &dyn Fn(usize) -> Value| -> String {
        (0..n).map(|i| line(i).to_string() + "\n").collect()
    };
    let sum = |i: usize| {
        json!({"question": format!("What is {i} and 1?"), "answer": (i + 1).to_string(),
        "teacher": format!("One more than {i} is {}. The answer is {}.", i + 1, i + 1)})
    };
    std::fs::write(at.join("sums.jsonl"), lines(24, &sum)).unwrap();
    done(
        at,
        "train --data text.txt --layers 4 --hidden 32 --heads 2 --intermediate 64 --ctx 128 --batch 2 --steps 250 \
         --lr 1e-2 --sample-every 0 --threads 1 --out base",
    );
    let count = || std::fs::read_dir(at).unwrap().count();
    let before = count();

    // Before: a dry run of each leaves nothing behind.
    let finetune = "finetune base/model.gguf --data sums.jsonl --fields question,answer --rank 2 --ctx 64 \
                    --batch 2 --steps 12 --threads 1 --out tuned";
    let quantize = "quantize base/model.gguf -o small.gguf --type Q4_0 --calibration text.txt --samples 4 --ctx 64 \
                    --threads 1";
    let ask = "distill ask sums.jsonl --teacher base/model.gguf --template plain.toml --raw --max-tokens 30 --ctx 128 \
               --threads 1 --out asked.jsonl";
    let got = is_forecast(&done(at, &format!("{finetune} --dry-run --json")), "finetune");
    assert!(got["steps"].as_u64().unwrap() > 0 && got["memory"]["weights"].as_f64().unwrap() > 0.0, "{got}");
    let got = is_forecast(&done(at, &format!("{quantize} --dry-run --json")), "quantize");
    assert!(got["types"]["Q4_0"]["tensors"].as_u64().unwrap() >= 28, "{got}");
    let got = is_forecast(&done(at, &format!("{ask} --dry-run --json")), "distill ask");
    assert_eq!(got["answers"], 24);
    assert_eq!(count(), before, "a dry run leaves files");

    // After: forecast and fact, and a receipt.
    done(at, finetune);
    let shown = done(at, quantize);
    assert!(shown.contains("Forecast and fact") && shown.contains("memory"), "{shown}");
    done(at, ask);
    done(at, "distill import sums.jsonl --task arithmetic --out imported.jsonl");
    let teach = "distill teach base/model.gguf --answers asked.jsonl --answers imported.jsonl --template plain.toml \
                 --epochs 2 --step-tokens 512 --threads 1 --out student";
    is_forecast(&done(at, &format!("{teach} --dry-run --json")), "distill teach");
    done(at, teach);
    done(at, "convert student student-f32.gguf");
    done(at, "quantize student-f32.gguf -o student.gguf --type Q8_0 --method nearest --threads 1");

    // The family: the student's file, the student, what it was asked of, and the base of it all, once.
    let file = at.join("student.gguf");
    let got = answer(&["receipt", file.to_str().unwrap(), "--answers", "1000"]);
    let commands: Vec<&str> =
        got["lines"].as_array().unwrap().iter().map(|l| l["command"].as_str().unwrap()).collect();
    assert_eq!(commands, ["train", "distill ask", "distill teach", "convert", "quantize"], "{got}");
    let sum: f64 =
        got["lines"].as_array().unwrap().iter().map(|l| l["fact"]["joules"].as_f64().unwrap()).sum();
    assert!((got["total"]["joules"].as_f64().unwrap() / sum - 1.0).abs() < 1e-9 && sum > 0.0);
    assert!(got["cents_per_thousand_answers"].as_f64().unwrap() > 0.0);
    // Imported answers cost nobody anything here: they are named, not counted.
    assert_eq!(got["unrecorded"].as_array().unwrap().len(), 1, "{got}");
    let got = answer(&["receipt", at.join("tuned").to_str().unwrap()]);
    let kinds: Vec<&str> = got["forecast_against_fact"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["what"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["memory", "disk", "time", "energy", "money"], "{got}");
}
