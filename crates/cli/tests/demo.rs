//! `sparsam demo` on the built-in model, a tenth of it.

use serde_json::Value;
use std::process::Command;

#[test]
fn every_saving_has_its_before_and_after() {
    let folder = tempfile::tempdir().unwrap();
    let run = || {
        Command::new(env!("CARGO_BIN_EXE_sparsam"))
            .args(["demo", "--quick", "--json", "--out", "demo"])
            .env("SPARSAM_CACHE", folder.path().join("cache"))
            .current_dir(folder.path())
            .output()
            .unwrap()
    };
    let out = run();
    let said = String::from_utf8_lossy(&out.stderr).to_string();
    assert!(out.status.success(), "{said}");
    let got: Value = serde_json::from_slice(&out.stdout).unwrap();
    let savings = got["savings"].as_array().unwrap();
    let names: Vec<&str> = savings.iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["plan", "compile", "attention", "round", "adapt", "distil", "run"]);
    let of = |name: &str, path: &str| {
        let saving = savings.iter().find(|s| s["name"] == name).unwrap();
        let value = path.split('.').fold(&saving["figures"], |v, key| match key.parse::<usize>() {
            Ok(i) => &v[i],
            Err(_) => &v[key],
        });
        value.as_f64().unwrap_or_else(|| panic!("no number {name} {path}: {saving}"))
    };
    // GPT-3 against the same loss at the least cost: 41 billion parameters by the corrected fit.
    assert!((0.55..0.7).contains(&(of("plan", "flop_after") / of("plan", "flop_before"))));
    assert!((38e9..45e9).contains(&of("plan", "parameters_after")));
    // What is saved is measured; what must not change is the same.
    assert!(of("compile", "compiled.kernels") < 0.5 * of("compile", "eager.kernels"));
    assert!((of("compile", "compiled.loss") - of("compile", "eager.loss")).abs() < 1e-3);
    assert!(of("attention", "1.peak_bytes") < of("attention", "1.plain_peak_bytes"));
    assert!(of("round", "bytes_after") < 0.5 * of("round", "bytes_before"));
    assert!((0.0..0.1).contains(&of("round", "scored.divergence")));
    assert!(of("adapt", "adapters.memory.optimiser") < 0.5 * of("adapt", "full.memory.optimiser"));
    assert!(of("adapt", "run.held_back_loss") < of("adapt", "first_loss"));
    assert!(of("distil", "parameters_after") < 0.7 * of("distil", "parameters_before"));
    assert!(of("distil", "teacher") > 0.5, "the built-in model can add");
    assert!(of("run", "after.bytes_per_token") < 0.5 * of("run", "before.bytes_per_token"));
    // The page needs nothing else, and the commands are on it.
    let page = std::fs::read_to_string(folder.path().join("demo/report.html")).unwrap();
    assert!(page.matches("<svg").count() >= 5 && page.contains("sparsam distill teach half.gguf"), "{page}");
    assert!(!page.contains("src=") && !page.contains("href="));
    // Nothing is written over.
    let again = run();
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("is there already"));
}
