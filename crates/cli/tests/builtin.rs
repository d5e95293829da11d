//! The built-in model: every command takes it, and it can do what `docs/builtin.md` says.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        Place { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_string()
    }

    fn sparsam(&self, args: &[&str]) -> String {
        let mut c = Command::new(env!("CARGO_BIN_EXE_sparsam"));
        c.args(args).env("SPARSAM_CACHE", self.dir.path().join("cache")).stdin(Stdio::null());
        let out = c.output().unwrap();
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.sparsam(&[args, &["--json"]].concat())).unwrap()
    }
}

fn questions() -> String {
    format!("{}/assets/builtin-questions.jsonl", env!("CARGO_MANIFEST_DIR"))
}

/// The share of right answers among the first of the questions whose numbers it was not trained on.
fn accuracy(place: &Place, model: &str) -> f64 {
    let questions = questions();
    let args =
        ["eval", model, "--task", &questions, "--answer-regex", r"answer is (\d+)", "--questions", "60"];
    place.json(&[&args[..], &["--max-tokens", "60", "--threads", "1"]].concat())["accuracy"].as_f64().unwrap()
}

#[test]
fn it_runs_and_is_described() {
    let place = Place::new();
    let info = place.json(&["info", "builtin"]);
    let parameters = info["parameters"].as_u64().unwrap();
    assert!((850_000..950_000).contains(&parameters), "{parameters}");
    let file = std::fs::read_dir(place.dir.path().join("cache/models")).unwrap().next().unwrap().unwrap();
    assert!(file.metadata().unwrap().len() < 4_000_000);
    // A play: speeches under names in capitals.
    let args = ["run", "builtin", "--raw", "ROMEO:\n", "-n", "160", "--seed", "1", "--threads", "1"];
    let text = place.sparsam(&args);
    let names = text.lines().filter(|l| l.ends_with(':') && *l == l.to_uppercase()).count();
    assert!(names >= 1 && text.lines().count() > 4, "{text}");
    // And sums, in a dialogue: it ends by itself behind the answer.
    let sum = "Anna has 12 apples, finds 7 more and loses 5. How many apples are left?";
    let said = place.json(&["run", "builtin", sum, "--temperature", "0", "--threads", "1"]);
    let text = said["text"].as_str().unwrap();
    assert!(text.contains("12 + 7 = 19.") && text.contains("So the answer is "), "{text}");
    assert_eq!(said["finish"], "stop", "{said}");
}

#[test]
fn it_is_rounded_converted_adapted_and_evaluated() {
    let place = Place::new();
    let own = accuracy(&place, "builtin");
    assert!(own >= 0.5, "{own}");
    let (small, folder, run) = (place.path("small.gguf"), place.path("folder"), place.path("run"));
    place.sparsam(&[
        "quantize",
        "builtin",
        "-o",
        &small,
        "--type",
        "Q8_0",
        "--method",
        "nearest",
        "--threads",
        "1",
    ]);
    let rounded = accuracy(&place, &small);
    assert!((rounded - own).abs() < 0.1, "{rounded} {own}");
    place.sparsam(&["convert", "builtin", &folder]);
    assert!(Path::new(&folder).join("tokenizer.json").exists());
    let args = ["finetune", "builtin", "--data", &questions(), "-o", &run, "--steps", "2", "--threads", "1"];
    place.sparsam(&args);
    let adapter = format!("{run}/adapter");
    place.sparsam(&["run", "builtin", "--adapter", &adapter, "2 + 2?", "-n", "4", "--threads", "1"]);
    let more = place.path("more");
    let data = place.path("text.txt");
    std::fs::write(&data, "To be, or not to be, that is the question. ".repeat(200)).unwrap();
    let args =
        ["train", "--from", "builtin", "--data", &data, "--out", &more, "--steps", "2", "--batch", "2"];
    let trained = place.json(&[&args[..], &["--threads", "1"]].concat());
    // Not ln 1024 = 6.9: it starts from what was learnt.
    assert!(trained["loss"].as_f64().unwrap() < 5.0, "{trained}");
}

#[test]
fn its_file_in_the_cache_is_mended() {
    let place = Place::new();
    place.sparsam(&["info", "builtin"]);
    let cache = place.dir.path().join("cache/models");
    let file = std::fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..1000]).unwrap();
    place.sparsam(&["info", "builtin"]);
    assert!(std::fs::read(&file).unwrap() == whole);
    // Nowhere to put it: said.
    std::fs::write(place.path("file"), "").unwrap();
    let mut c = Command::new(env!("CARGO_BIN_EXE_sparsam"));
    let out = c.args(["info", "builtin"]).env("SPARSAM_CACHE", place.path("file")).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code() == Some(1) && said.contains("set SPARSAM_CACHE"), "{said}");
}
