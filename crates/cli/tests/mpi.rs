//! `mpirun -n 2 sparsam train` is one process with twice the rows, and goes on where it was stopped. Needs the feature `mpi`
//! and a launcher.
#![cfg(feature = "mpi")]

use serde_json::Value;
use std::process::{Command, Stdio};

const BINARY: &str = env!("CARGO_BIN_EXE_sparsam");

/// The command in `n` processes on this machine, as root in a container too.
fn mpirun(n: usize, args: &[&str]) -> Command {
    let mut c = Command::new("mpirun");
    c.args(["-n", &n.to_string(), "--oversubscribe", BINARY]).args(args).stdin(Stdio::null());
    c.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    c
}

fn json(mut c: Command) -> Value {
    let out = c.output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    // One of them speaks.
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn two_processes_train_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let data = path("text.txt");
    let lines = (0..600).map(|i| format!("line {i} of the text says {} and {}\n", i * 7 % 11, i * 5 % 3));
    std::fs::write(&data, lines.collect::<String>()).unwrap();
    let run = |out: &str, batch: &str| -> Vec<String> {
        let flags = "--layers 1 --hidden 32 --heads 2 --ctx 32 --steps 30 --eval-every 10 --threads 1 --json";
        let all = format!("train --data {data} --out {out} --batch {batch} {flags}");
        all.split_whitespace().map(str::to_string).collect()
    };
    let (one, two) = (path("one"), path("two"));
    let args = run(&one, "8");
    let mut alone = Command::new(BINARY);
    alone.args(&args);
    let alone = json(alone);
    let args = run(&two, "4");
    let together = json(mpirun(2, &args.iter().map(String::as_str).collect::<Vec<_>>()));
    assert_eq!(alone["tokens"], together["tokens"]);
    for key in ["held_back_loss", "loss"] {
        let (a, b) = (alone[key].as_f64().unwrap(), together[key].as_f64().unwrap());
        assert!((a - b).abs() < 1e-3 && a < 5.0, "{key}: {a} {b}");
    }
    // The same in micro-batches; the sums begin beside the backward pass.
    let three = path("three");
    let mut args = run(&three, "2");
    args.extend(["--accumulate", "2", "--explain"].map(String::from));
    let mut c = mpirun(2, &args.iter().map(String::as_str).collect::<Vec<_>>());
    let out = c.output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && said.contains("sums over processes: "), "{said}");
    let accumulated: Value = serde_json::from_slice(&out.stdout).unwrap();
    for key in ["held_back_loss", "loss"] {
        let (a, b) = (alone[key].as_f64().unwrap(), accumulated[key].as_f64().unwrap());
        assert!((a - b).abs() < 1e-3, "{key}: {a} {b}");
    }
    // With another number of processes it does not go on, and all are ended.
    let out = mpirun(3, &["train", "--resume", &two]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("started with 2, not 3"), "{said}");
    let on = json(mpirun(2, &["train", "--resume", &two, "--steps", "34", "--json"]));
    assert_eq!((on["step"].as_u64(), on["complete"].as_bool()), (Some(34), Some(true)));
}
