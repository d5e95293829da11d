//! `sparsam finetune` as a process: killed at any moment, it ends with the same adapter.

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

fn sparsam() -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_sparsam"));
    c.stdout(Stdio::null()).stderr(Stdio::null());
    c
}

fn workplace(dir: &Path) {
    common::bytes_model(dir);
    let line = |i: usize| format!("{{\"prompt\": \"{i} and {}\", \"completion\": \"{}\"}}\n", i % 7, i % 2);
    std::fs::write(dir.join("data.jsonl"), (0..150).map(line).collect::<String>()).unwrap();
}

fn start(dir: &Path, out: &str) -> Command {
    let mut c = sparsam();
    c.arg("finetune").arg(dir.join("model")).arg("--data").arg(dir.join("data.jsonl"));
    c.arg("-o").arg(dir.join(out));
    let flags = "--ctx 64 --batch 2 --steps 400 --rank 4 --dropout 0.1 --threads 1 --eval-every 50 --checkpoint-every 7";
    c.args(flags.split(' '));
    c
}

#[test]
fn killed_ten_times_it_ends_with_the_same_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    workplace(dir);
    let began = std::time::Instant::now();
    assert!(start(dir, "whole").status().unwrap().success());
    let whole = began.elapsed();

    // Each part runs for another share of the time that the whole takes; it gets no further than the rest allows.
    let mut killed = 0;
    let mut child = start(dir, "parts").spawn().unwrap();
    for i in 0..10u32 {
        std::thread::sleep(whole.mul_f64(0.05 + 0.01 * ((i * 7) % 10) as f64) + Duration::from_millis(20));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            killed += 1;
        }
        child.wait().unwrap();
        child = match dir.join("parts/config.toml").exists() {
            true => sparsam().arg("finetune").arg("--resume").arg(dir.join("parts")).spawn().unwrap(),
            false => start(dir, "parts").spawn().unwrap(),
        };
    }
    assert!(child.wait().unwrap().success() && killed > 3, "{killed}");
    for file in ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"] {
        let [a, b] = ["whole", "parts"].map(|run| std::fs::read(dir.join(run).join(file)).unwrap());
        assert!(a == b, "{file} differs");
    }
    // Nothing half-written stays.
    let left: Vec<_> =
        std::fs::read_dir(dir.join("parts/adapter")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.len() == 5, "{left:?}");
}

#[test]
fn what_it_would_do_is_said_without_doing_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    workplace(dir);
    let out = start(dir, "run").args(["--dry-run", "--json"]).stdout(Stdio::piped()).output().unwrap();
    assert!(out.status.success());
    let said: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(said["memory_bytes"].as_f64().unwrap() > 1e5 && said["tokens_per_step"] == 128, "{said}");
    let out = start(dir, "run").arg("--xray").stdout(Stdio::piped()).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && text.contains("data.jsonl:"), "{text}");
    assert!(text.contains('«') && !dir.join("run").exists(), "{text}");
}

#[test]
fn a_merged_model_is_measured_before_it_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    workplace(dir);
    assert!(start(dir, "run").args(["--lr", "1e-2"]).status().unwrap().success());
    let merge = |out: &str, more: &[&str]| {
        let mut c = sparsam();
        c.arg("merge").arg(dir.join("model")).arg("--adapter").arg(dir.join("run/adapter"));
        c.arg("-o").arg(dir.join(out)).args(more).args(["--json", "--threads", "1"]);
        c.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap()
    };
    let out = merge("exact", &["--type", "F32"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let said: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let (merged, base) = (&said["merged_from_adapted"], &said["base_from_adapted"]);
    assert!(merged["kl"].as_f64().unwrap() < 1e-6 && merged["agreement"] == 1.0, "{said}");
    assert!(base["kl"].as_f64().unwrap() > 1e-3, "{said}");
    // The dialogues that it was trained with go with it.
    assert!(dir.join("exact/probes.json").exists());

    let out = merge("rounded", &["--type", "BF16", "--limit", "1e-9"]);
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(1) && err.contains("rounding undid what was learnt"), "{err}");
    let left = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
    assert!(!left.iter().any(|n| n.to_string_lossy().contains("rounded")), "{left:?}");
}
