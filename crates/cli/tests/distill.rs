//! `sparsam distill` as a person uses it: asked through a server of the test's own, killed, resumed, capped.

mod common;

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

fn sparsam() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sparsam"));
    command.stdin(Stdio::null()).env("TEST_KEY", "secret");
    command
}

fn stdout(out: &Output) -> String {
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{err}");
    String::from_utf8(out.stdout.clone()).unwrap()
}

/// A teacher that doubles the last number of the question, as a server that speaks OpenAI's protocol.
#[derive(Default)]
struct Mock {
    requests: AtomicUsize,
    answered: AtomicUsize,
    /// Every how-many-th request fails with 429; 0: none.
    busy_every: usize,
    pause_ms: u64,
    seen: Mutex<Vec<Value>>,
}

impl Mock {
    fn start(self) -> (Arc<Mock>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let mock = Arc::new(self);
        let server = mock.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = server.clone();
                std::thread::spawn(move || server.connection(stream));
            }
        });
        (mock, url)
    }

    fn connection(&self, stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let mut stream = stream;
        loop {
            let (mut length, mut authorised, mut line) = (0, false, String::new());
            while reader.read_line(&mut line).ok()? > 2 {
                let lower = line.to_ascii_lowercase();
                if let Some(n) = lower.strip_prefix("content-length:") {
                    length = n.trim().parse().ok()?;
                }
                authorised |= lower.trim() == "authorization: bearer secret";
                line.clear();
            }
            if length == 0 {
                return None;
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).ok()?;
            let request: Value = serde_json::from_slice(&body).ok()?;
            let n = 1 + self.requests.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(self.pause_ms));
            let (status, answer) = if !authorised {
                ("401 Unauthorized", json!({"error": {"message": "the key is wrong"}}))
            } else if self.busy_every > 0 && n.is_multiple_of(self.busy_every) {
                ("429 Too Many Requests\r\nretry-after: 0", json!({"error": {"message": "slow down"}}))
            } else {
                self.answered.fetch_add(1, Ordering::SeqCst);
                ("200 OK", answer(&request))
            };
            self.seen.lock().unwrap().push(request);
            let body = answer.to_string();
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all((head + &body).as_bytes()).ok()?;
        }
    }
}

fn answer(request: &Value) -> Value {
    let messages = request["messages"].as_array().unwrap();
    let question = messages.last().unwrap()["content"].as_str().unwrap();
    let n: i64 =
        question.split(' ').filter_map(|w| w.trim_end_matches('?').parse().ok()).next_back().unwrap();
    let text = match n {
        7 => "I would rather not say.".to_string(),
        _ => format!("Twice {n} is {n} + {n}. So the answer is ({n} * 2)."),
    };
    json!({
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    })
}

fn questions(folder: &Path, n: usize) -> String {
    let path = folder.join("q.jsonl");
    let lines: String = (0..n)
        .map(|i| json!({"question": format!("What is twice {i}?"), "answer": 2 * i}).to_string() + "\n")
        .collect();
    std::fs::write(&path, lines).unwrap();
    path.to_str().unwrap().to_string()
}

fn ask(url: &str, questions: &str, out: &Path, more: &[&str]) -> Command {
    let mut command = sparsam();
    command
        .args(["distill", "ask", questions, "--task", "arithmetic", "--json", "--teacher-url", url])
        .args(["--teacher-model", "mock", "--key-env", "TEST_KEY", "--out", out.to_str().unwrap()])
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// All lines by id and sample: none may be doubled.
fn lines(out: &Path) -> BTreeMap<(String, u64), Value> {
    let mut all = BTreeMap::new();
    for path in [out.to_path_buf(), out.with_extension("malformed.jsonl")] {
        for line in std::fs::read_to_string(path).unwrap().lines() {
            let value: Value = serde_json::from_str(line).unwrap();
            let key = (value["id"].as_str().unwrap().to_string(), value["sample"].as_u64().unwrap());
            assert!(all.insert(key, value).is_none(), "doubled: {line}");
        }
    }
    all
}

#[test]
fn a_kill_at_any_moment_loses_and_doubles_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = questions(folder.path(), 40);
    let (_, quiet_url) = Mock::default().start();
    let whole = folder.path().join("whole.jsonl");
    let summary: Value =
        serde_json::from_str(&stdout(&ask(&quiet_url, &file, &whole, &[]).output().unwrap())).unwrap();
    assert_eq!(
        (&summary["answers"], &summary["malformed"], &summary["right"]),
        (&json!(40), &json!(1), &json!(39))
    );
    assert_eq!((&summary["prompt_tokens"], &summary["completion_tokens"]), (&json!(4000), &json!(400)));

    let (mock, url) = Mock { busy_every: 7, pause_ms: 5, ..Mock::default() }.start();
    let out = folder.path().join("killed.jsonl");
    for round in 1..=3 {
        let mut child = ask(&url, &file, &out, &["--parallel", "3"]).spawn().unwrap();
        while mock.answered.load(Ordering::SeqCst) < 9 * round && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        lines(&out);
    }
    let left = 40 - lines(&out).len();
    let done = ask(&url, &file, &out, &[]).output().unwrap();
    let summary: Value = serde_json::from_str(&stdout(&done)).unwrap();
    assert_eq!((&summary["new"], &summary["answers"]), (&json!(left), &json!(40)));
    // The teacher's name holds its address, which is no part of an answer.
    assert_eq!(lines(&out), lines(&whole));
    // Each kill cost at most the three questions under way.
    assert!(mock.answered.load(Ordering::SeqCst) <= 40 + 9);
}

#[test]
fn servers_are_retried_capped_and_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let file = questions(folder.path(), 12);
    let (mock, url) = Mock { busy_every: 2, ..Mock::default() }.start();
    let out = folder.path().join("a.jsonl");
    let prices = ["--usd-in", "0", "--usd-out", "1000", "--budget", "$0.5", "--parallel", "1"];
    let run = || -> Value {
        serde_json::from_str(&stdout(&ask(&url, &file, &out, &prices).output().unwrap())).unwrap()
    };
    // An answer is 10 tokens, one cent, and 16 cents must be left for it: there always are.
    assert_eq!(run()["unasked"], 0);
    let spent: f64 = lines(&out).values().map(|r| r["usd"].as_f64().unwrap()).sum();
    assert!((spent - 0.12).abs() < 1e-9, "{spent}");
    assert!(mock.requests.load(Ordering::SeqCst) > 12, "busy answers are asked again");

    let small = folder.path().join("small.jsonl");
    let capped: Value = serde_json::from_str(&stdout(
        &ask(&url, &file, &small, &["--usd-out", "1000", "--budget", "$0.205", "--parallel", "1"])
            .output()
            .unwrap(),
    ))
    .unwrap();
    // 16 cents must be left for each: 0.205 allows the first five (0, 1, 2, 3, 4 cents spent before).
    assert_eq!((&capped["new"], &capped["unasked"]), (&json!(5), &json!(7)));

    let refused = ask(&url, &file, &small, &["--seed", "1"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("seed = 0, now it is 1"));
    let denied =
        ask(&url, &file, &folder.path().join("b.jsonl"), &["--key-env", "NO_SUCH_KEY"]).output().unwrap();
    let said = String::from_utf8_lossy(&denied.stderr).into_owned();
    assert!(said.contains("status 401: the key is wrong"), "{said}");
    let seeds: std::collections::HashSet<u64> =
        mock.seen.lock().unwrap().iter().map(|r| r["seed"].as_u64().unwrap()).collect();
    assert_eq!(seeds.len(), 12, "one seed for each question, the same in each run");
}

#[test]
fn raw_text_of_a_teacher_is_imported() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("q.jsonl");
    let cut = "84 / 2 = 42. The answer is (84 / 2).\n\nQ: There are 3\nA: The answer is (3";
    let lines = [
        json!({"question": "A?", "answer": 42, "teacher": cut}),
        json!({"question": "B?", "answer": 5, "teacher": "The answer is 6."}),
        json!({"question": "C?", "answer": 5, "teacher": "Who knows"}),
    ];
    std::fs::write(&file, lines.map(|l| l.to_string() + "\n").concat()).unwrap();
    let out = folder.path().join("out.jsonl");
    let args =
        ["distill", "import", file.to_str().unwrap(), "--task", "arithmetic", "--out", out.to_str().unwrap()];
    let said = stdout(&sparsam().args(args).output().unwrap());
    assert_eq!(said.trim(), "3 answers to 2 questions, 1 malformed; 1 of 3 right (33.3%)");
    let first: Value =
        serde_json::from_str(std::fs::read_to_string(&out).unwrap().lines().next().unwrap()).unwrap();
    assert_eq!((&first["rationale"], &first["answer"]), (&json!("84 / 2 = 42."), &json!("(84 / 2)")));
    // Once more: nothing is doubled.
    assert_eq!(stdout(&sparsam().args(args).output().unwrap()).trim(), said.trim());
}

#[test]
fn a_local_teacher_says_the_same_alone_and_among_others() {
    let Some(model) = sparsam_testkit::smollm2() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = questions(folder.path(), 3);
    let run = |parallel: &str| {
        let out = folder.path().join(format!("{parallel}.jsonl"));
        let args = ["--task", "arithmetic", "--max-tokens", "60", "--samples", "2", "--parallel", parallel];
        let out_args = ["--out", out.to_str().unwrap(), "--seed", "5", "--raw"];
        let mut command = sparsam();
        command
            .args(["distill", "ask", &file, "--teacher", model.to_str().unwrap()])
            .args(args)
            .args(out_args);
        stdout(&command.output().unwrap());
        lines(&out)
    };
    let (alone, together) = (run("1"), run("4"));
    assert_eq!(alone, together);
    assert_eq!(alone.len(), 6);
    assert!(alone.values().any(|r| r["answer"].is_string()), "{alone:?}");
}

/// The tiny model of the adapters' goldens with a tokenizer of bytes, and a teacher's answers to 40 questions.
fn classroom(folder: &Path) {
    common::bytes_model(folder);
    let line = |i: usize| {
        let text = format!("{i} + {i}. So the answer is ({i} * 2).");
        json!({"question": format!("Twice {i}?"), "answer": 2 * i, "teacher": text}).to_string() + "\n"
    };
    std::fs::write(folder.join("q.jsonl"), (0..40).map(line).collect::<String>()).unwrap();
    let import = ["distill", "import", "q.jsonl", "--task", "arithmetic", "--out", "answers.jsonl"];
    stdout(&sparsam().current_dir(folder).args(import).output().unwrap());
}

fn teach(folder: &Path, out: &str, more: &[&str]) -> Command {
    let mut command = sparsam();
    command
        .current_dir(folder)
        .args(["distill", "teach", "model", "--answers", "answers.jsonl", "--task", "arithmetic", "--json"])
        .args(["--held-back", "0.25", "--step-tokens", "128", "--threads", "1", "--out", out])
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

#[test]
fn a_student_whose_teaching_is_killed_is_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    classroom(folder);
    let lora =
        ["--method", "lora", "--rank", "4", "--epochs", "30", "--checkpoint-every", "3", "--lr", "0.01"];
    let whole: Value =
        serde_json::from_str(&stdout(&teach(folder, "whole", &lora).output().unwrap())).unwrap();
    assert!(whole["loss"].as_f64().unwrap() < 4.0 && whole["steps"].as_u64().unwrap() > 100, "{whole}");
    for kill in 1..=3 {
        let mut child = teach(folder, "killed", &lora).spawn().unwrap();
        let newest = || {
            let entries = std::fs::read_dir(folder.join("killed/run/checkpoints")).ok()?;
            entries
                .filter_map(|e| Some(e.ok()?.file_name().to_str()?.get(5..13)?.parse::<u64>().unwrap_or(0)))
                .max()
        };
        while newest().unwrap_or(0) < 25 * kill && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let other = teach(folder, "killed", &["--method", "lora", "--rank", "2"]).output().unwrap();
    assert!(String::from_utf8_lossy(&other.stderr).contains("other settings"), "{other:?}");
    stdout(&teach(folder, "killed", &lora).output().unwrap());
    let of = |out: &str| std::fs::read(folder.join(out).join("adapter_model.safetensors")).unwrap();
    assert!(of("whole") == of("killed"));
    assert!(
        !folder.join("killed/run/checkpoints").exists() && folder.join("killed/run/report.html").exists()
    );
    // The student is its base with the adapter.
    let eval = [
        "distill",
        "eval",
        "q.jsonl",
        "--task",
        "arithmetic",
        "--held-back",
        "0.25",
        "--json",
        "--ctx",
        "64",
    ];
    let asked = |model: &str| -> Value {
        let models = ["--max-tokens", "12", "--model", model, "--threads", "1"];
        let out = sparsam().current_dir(folder).args(eval).args(models).output().unwrap();
        serde_json::from_str(&stdout(&out)).unwrap()
    };
    let (a, b) = (asked("killed"), asked("whole"));
    assert_eq!(a["answers"], b["answers"]);
    let text = a["answers"][0]["answers"][0]["text"].as_str().unwrap();
    assert!(text.contains('(') || text.contains('*'), "{a}");
}

#[test]
fn students_learn_from_probabilities_and_in_full() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    classroom(folder);
    let taught = |out: &str, more: &[&str]| -> Value {
        serde_json::from_str(&stdout(&teach(folder, out, more).output().unwrap())).unwrap()
    };
    // All weights: the folder is a model.
    let all = ["--epochs", "4", "--lr", "0.01", "--variant", "label-only", "--type", "BF16"];
    let full = taught("full", &all)["loss"].as_f64().unwrap();
    sparsam_engine::open(&folder.join("full")).unwrap();
    // Products of rounded operands are other numbers, and teach as well.
    let half = taught("half", &[&all[..], &["--dtype", "bf16"]].concat())["loss"].as_f64().unwrap();
    assert!(half != full && (half - full).abs() < 0.05 * full, "{half} {full}");
    // From itself a student has nothing to learn; the loss of the first step is 0 and stays near.
    let soft =
        ["--soft-labels", "model", "--soft-share", "1", "--epochs", "1", "--method", "lora", "--lr", "1e-6"];
    for kl in ["forward", "reverse"] {
        let said = taught(kl, &[&soft[..], &["--kl", kl]].concat());
        assert!(said["loss"].as_f64().unwrap().abs() < 1e-3, "{kl}: {said}");
    }
    // From the full student there is.
    let more =
        ["--soft-labels", "full", "--soft-share", "1", "--epochs", "1", "--method", "lora", "--lr", "1e-6"];
    assert!(taught("other", &more)["loss"].as_f64().unwrap() > 1e-2);
    // In texts of its own too, and there it learns.
    let policy =
        ["--soft-labels", "full", "--on-policy", "--kl", "reverse", "--method", "lora", "--lr", "0.001"];
    let [few, many] = ["2", "40"].map(|epochs| {
        taught(&format!("policy{epochs}"), &[&policy[..], &["--epochs", epochs]].concat())["loss"]
            .as_f64()
            .unwrap()
    });
    assert!(many < 0.9 * few, "{few} {many}");
    let out = teach(folder, "bad", &[&policy[..], &["--soft-share", "0.5"]].concat()).output().unwrap();
    assert!(String::from_utf8_lossy(&out.stderr).contains("is no target"), "{out:?}");
}
