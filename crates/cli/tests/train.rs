//! `sparsam train` as a process: killed at any moment it goes on bit for bit; what it saves is read by `info` and `run`.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

fn sparsam(args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_sparsam"));
    c.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    c
}

fn ok(args: &[&str]) -> String {
    let out = sparsam(args).output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", said(&out));
    String::from_utf8(out.stdout).unwrap()
}

fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn text(dir: &Path) -> String {
    let path = dir.join("text.txt");
    let lines = (0..400).map(|i| format!("line {i} of the text says {} and {}\n", i * 7 % 11, i * 5 % 3));
    std::fs::write(&path, lines.collect::<String>()).unwrap();
    path.to_str().unwrap().to_string()
}

const TINY: &str = "--layers 1 --hidden 32 --heads 2 --intermediate 64 --ctx 32 --batch 2 --steps 400 --threads 1 \
                    --checkpoint-every 7 --eval-every 100 --sample-every 0 --seed 5 --save-as f16";

fn start<'a>(data: &'a str, out: &'a str) -> Vec<&'a str> {
    let mut args = vec!["train", "--data", data, "--out", out];
    args.extend(TINY.split_whitespace());
    args
}

#[test]
fn a_run_killed_at_any_moment_goes_on_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let data = text(dir.path());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    // Of one name, which is the model's.
    let (whole, killed) = (path("whole/run"), path("killed/run"));
    let began = Instant::now();
    ok(&start(&data, &whole));
    let took = began.elapsed();

    // Each part may run for another share of the time that the whole takes, so that kills strike everywhere from the
    // writing of the first file on; a fixed sequence.
    let go_on = || match Path::new(&killed).join("config.toml").exists() {
        true => sparsam(&["train", "--resume", &killed]),
        false => sparsam(&start(&data, &killed)),
    };
    let mut kills = 0;
    for i in 0..12u32 {
        let mut child = go_on().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(took.mul_f64(0.02 + 0.03 * f64::from((i * 7) % 12)));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
    }
    let last = go_on().output().unwrap();
    assert!(last.status.success() && kills > 3, "{kills} kills: {}", said(&last));
    for file in ["model.gguf", "model/model.safetensors", "checkpoints/step-00000400.safetensors"] {
        let read = |run: &str| std::fs::read(Path::new(run).join(file)).unwrap();
        let (a, b) = (read(&whole), read(&killed));
        // Checkpoints also hold how many seconds the run has taken: compare behind the header.
        let body = |bytes: &[u8]| match file.starts_with("checkpoints") {
            true => {
                let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
                bytes[8 + header..].to_vec()
            }
            false => bytes.to_vec(),
        };
        assert!(body(&a) == body(&b), "{file} differs");
    }
    // No half-written file is left under a name of its own.
    for entry in std::fs::read_dir(Path::new(&killed).join("checkpoints")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name.starts_with("step-") || name.ends_with(".tmp"), "{name}");
    }
}

#[test]
fn what_is_trained_is_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let data = text(dir.path());
    let run = dir.path().join("run").to_str().unwrap().to_string();
    let mut args = start(&data, &run);
    args.push("--json");
    let json: serde_json::Value = serde_json::from_str(&ok(&args)).unwrap();
    assert_eq!((json["step"].as_u64(), json["complete"].as_bool()), (Some(400), Some(true)));
    assert!(
        json["held_back_loss"].as_f64().unwrap() < 5.0 && json["tokens_per_second"].as_f64().unwrap() > 0.0
    );
    for model in ["model.gguf", "model"] {
        let model = format!("{run}/{model}");
        let info: serde_json::Value = serde_json::from_str(&ok(&["info", &model, "--json"])).unwrap();
        assert_eq!(info["parameters"], json["parameters"], "{model}");
        assert_eq!(info["vocab_size"].as_u64(), Some(257));
    }
    // And it can be trained on.
    let more = dir.path().join("more").to_str().unwrap().to_string();
    let gguf = format!("{run}/model.gguf");
    let args = ["train", "--data", &data, "--out", &more, "--from", &gguf, "--ctx", "32", "--batch", "2"];
    let out = ok(&[&args[..], &["--steps", "2", "--threads", "1", "--json"]].concat());
    let more: serde_json::Value = serde_json::from_str(&out).unwrap();
    // Where the first run ended, not at the ln 257 of a new model.
    assert!(more["loss"].as_f64().unwrap() < 4.5, "{more}");
}

#[test]
fn memory_and_numbers_are_chosen_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let data = text(dir.path());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let flags = |out: &str, steps: &str, more: &str| -> Vec<String> {
        let base = "--layers 3 --hidden 32 --heads 2 --intermediate 96 --ctx 64 --batch 8 --threads 1 --sample-every 0";
        let all = format!("train --data {data} --out {out} {base} --steps {steps} {more}");
        all.split_whitespace().map(str::to_string).collect()
    };
    let strs = |args: &[String]| args.iter().map(String::from).collect::<Vec<_>>();
    let run = |args: &[String]| {
        let args = strs(args);
        sparsam(&args.iter().map(String::as_str).collect::<Vec<_>>()).output().unwrap()
    };
    // What nothing fits into is refused with the least that would do, and leaves no run behind.
    let out = path("small");
    let refused = run(&flags(&out, "4", "--memory 10kB"));
    let message = said(&refused);
    assert!(
        refused.status.code() == Some(1) && message.contains("run.memory: 10 kB cannot be reached"),
        "{message}"
    );
    assert!(!Path::new(&out).join("config.toml").exists());
    let least = message.split("tokens take ").nth(1).unwrap().split(" MB").next().unwrap().to_string();
    // That least does, in the same folder; the numbers are those of full speed.
    let done = run(&flags(&out, "4", &format!("--memory {least}MB --json")));
    assert!(done.status.success(), "{}", said(&done));
    assert!(said(&done).contains("segments"), "{}", said(&done));
    let loss = |out: &Output| -> f64 {
        let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        json["held_back_loss"].as_f64().unwrap()
    };
    let (free, half) = (path("free"), path("half"));
    let free = run(&flags(&free, "4", "--json"));
    // Sums in another order: f32's last bits.
    assert!((loss(&done) - loss(&free)).abs() < 1e-5, "{} {}", loss(&done), loss(&free));
    let text = std::fs::read_to_string(Path::new(&out).join("config.toml")).unwrap();
    assert!(text.contains(&format!("memory = \"{least}MB\"")) && text.contains("dtype = \"f32\""), "{text}");
    let report = std::fs::read_to_string(Path::new(&out).join("report.html")).unwrap();
    assert!(report.contains("planned of a budget of"));

    // bf16: near, not the same, and it resumes as what it was.
    let bf16 = run(&flags(&half, "4", "--dtype bf16 --json"));
    assert!(bf16.status.success() && said(&bf16).contains("in bf16"), "{}", said(&bf16));
    let on = run(&["train", "--resume", &half, "--steps", "5", "--json"].map(String::from));
    assert!(said(&on).contains("in bf16"), "{}", said(&on));
    let off = (loss(&bf16) - loss(&free)).abs();
    assert!(off > 1e-7 && off < 0.05, "{off}");
    let eager = run(&flags(&path("e"), "2", "--memory 1GB --eager"));
    assert_eq!(eager.status.code(), Some(2), "{}", said(&eager));
}

#[test]
fn wrong_usage_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run").to_str().unwrap().to_string();
    // A launcher's processes would all train by themselves, in one folder.
    if cfg!(not(feature = "mpi")) {
        let done = sparsam(&["train", "--out", &out, "--data", "x"]).env("PMI_RANK", "1").output().unwrap();
        assert!(
            done.status.code() == Some(1) && said(&done).contains("built without MPI"),
            "{}",
            said(&done)
        );
    }
    let fails = |args: &[&str]| {
        let done = sparsam(args).output().unwrap();
        (done.status.code(), said(&done))
    };
    let (code, said) = fails(&["train", "--out", &out, "--size", "1M"]);
    assert!(code == Some(1) && said.contains("data.train: names no file"), "{said}");
    let (code, said) = fails(&["train", "--out", &out, "--data", "no-such-file.txt"]);
    assert!(code == Some(1) && said.contains("no-such-file.txt") && said.contains("no such file"), "{said}");
    let (code, said) = fails(&["train", "--data", "x"]);
    assert!(code == Some(2) && said.contains("--out"), "{said}");
    let (code, said) = fails(&["train", "--out", &out, "--stepps", "3"]);
    assert!(code == Some(2) && said.contains("--steps"), "{said}");
    assert!(!dir.path().join("run/config.toml").exists());
}
