//! The binary as a person uses it: results on stdout, words on stderr, exit codes, and what it says of bad input.

mod common;

use common::{fails, model, sparsam, stdout};
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

#[test]
fn wrong_usage_exits_with_2_and_failures_with_1() {
    fails(&["run"], 2, "MODEL");
    fails(&["fly"], 2, "fly");
    fails(&["run", "m.gguf", "hi", "--temprature", "1"], 2, "--temperature");
    fails(&["run", "no-such.gguf", "hi"], 1, "no-such.gguf: no such file or folder");
    let here = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    fails(&["info", here], 1, "neither GGUF nor safetensors");
    fails(&["run", here, "hi", "--top-p", "0"], 1, "top-p is 0");
}

#[test]
fn damaged_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cut.gguf");
    let Some(model) = model() else { return };
    let head = &std::fs::read(model).unwrap()[..3_000_000];
    std::fs::write(&file, head).unwrap();
    fails(&["info", file.to_str().unwrap()], 1, "cut.gguf");
    std::fs::write(&file, &head[..100]).unwrap();
    fails(&["run", file.to_str().unwrap(), "hi"], 1, "cut.gguf");
}

#[test]
fn info_tells_what_a_model_is() {
    let Some(model) = model() else { return };
    let info: Value = serde_json::from_str(&stdout(&sparsam(&["info", &model, "--json"]))).unwrap();
    assert_eq!(info["architecture"], "llama");
    assert_eq!(info["parameters"], 134_515_008);
    assert_eq!(info["context_length"], 8192);
    assert_eq!(info["types"]["Q4_1"]["tensors"], 210);
    // 30 layers * 2 * 3 heads * 64 * 2 bytes.
    assert_eq!(info["memory"][0]["cache_bytes_f16"], 23040 * 512);
    let text = stdout(&sparsam(&["info", &model]));
    assert!(text.contains("134.5M (134515008)") && text.contains("Q4_1"), "{text}");
}

#[test]
fn run_answers_and_says_how_fast() {
    let Some(model) = model() else { return };
    let args = ["run", &model, "--raw", "The capital of France is", "-n", "6", "--temperature", "0"];
    let out = sparsam(&args);
    let text = stdout(&out);
    assert!(text.contains("Paris"), "{text}");
    assert!(!text.contains("The capital"), "the prompt is not repeated: {text}");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("prompt 5 tokens") && said.contains("cut at --max-tokens"), "{said}");

    let json: Value = serde_json::from_str(&stdout(&sparsam(&[&args[..], &["--json"]].concat()))).unwrap();
    assert_eq!(json["text"].as_str().unwrap(), text.trim_end_matches('\n'));
    assert_eq!((&json["generated_tokens"], &json["finish"]), (&6.into(), &"length".into()));
    assert!(json["generated_tokens_per_second"].as_f64().unwrap() > 0.0);

    let explained = sparsam(&[&args[..], &["--explain"]].concat());
    let said = String::from_utf8_lossy(&explained.stderr);
    assert!(said.contains("bytes moved") && said.contains("fuse"), "{said}");
}

#[test]
fn run_reads_standard_input_and_the_template_speaks_for_the_roles() {
    let Some(model) = model() else { return };
    let mut child = Command::new(env!("CARGO_BIN_EXE_sparsam"))
        .args(["run", &model, "--temperature", "0", "-n", "12", "--json", "--system", "You are terse."])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all("What colour is the sky?".as_bytes()).unwrap();
    let json: Value = serde_json::from_str(&stdout(&child.wait_with_output().unwrap())).unwrap();
    // <|im_start|>system\n .. <|im_end|>\n and the like around 9 words.
    assert!(json["prompt_tokens"].as_u64().unwrap() > 15, "{json}");
    assert!(json["text"].as_str().unwrap().len() > 3);
}

#[test]
fn prompts_beyond_the_context_are_refused_or_cut_by_choice() {
    let Some(model) = model() else { return };
    let long = "word ".repeat(100);
    let args = ["run", &model, "--raw", &long, "-n", "2", "--ctx", "32", "--temperature", "0"];
    fails(&args, 1, "of 32");
    let cut = sparsam(&[&args[..], &["--truncate"]].concat());
    let said = String::from_utf8_lossy(&cut.stderr);
    assert!(cut.status.success() && said.contains("oldest"), "{said}");
    fails(&["run", &model, "hi", "--ctx", "100000"], 1, "made for 8192");
}

#[test]
fn eval_states_its_protocol() {
    let Some(model) = model() else { return };
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/golden/shakespeare-head.txt");
    let text = text.to_str().unwrap();
    let args = ["eval", &model, "--perplexity", text, "--ctx", "128", "--chunks", "2", "--json"];
    let json: Value = serde_json::from_str(&stdout(&sparsam(&args))).unwrap();
    assert_eq!(json["tokens_scored"], 2 * 63);
    let perplexity = json["perplexity"].as_f64().unwrap();
    assert!((2.0..200.0).contains(&perplexity), "{perplexity}");
    assert!(json["protocol"].as_str().unwrap().contains("llama.cpp"));
    fails(&["eval", &model, "--perplexity", "no-such.txt"], 1, "no-such.txt");
    let folder = tempfile::tempdir().unwrap();
    let short = folder.path().join("short.txt");
    std::fs::write(&short, "Too short.").unwrap();
    fails(&["eval", &model, "--perplexity", short.to_str().unwrap()], 1, "the first window alone takes 512");
}

#[test]
fn bench_compares_with_the_roofs() {
    let Some(model) = model() else { return };
    let args = ["bench", &model, "-p", "16", "-n", "4", "-r", "1", "--json"];
    let json: Value = serde_json::from_str(&stdout(&sparsam(&args))).unwrap();
    for test in ["pp16", "tg4"] {
        let (rate, roof) = (&json[test]["tokens_per_second"], &json[test]["roof_tokens_per_second"]);
        assert!(rate.as_f64().unwrap() > 0.0 && roof.as_f64().unwrap() > 0.0, "{json}");
    }
}

#[test]
fn bench_attention_compares_both_forms() {
    let args =
        ["bench", "attention", "--seq", "256", "--heads", "2", "-r", "1", "--what", "fwdbwd", "--json"];
    let json: Value = serde_json::from_str(&stdout(&sparsam(&args))).unwrap();
    let get = |key: &str| json[key].as_f64().unwrap();
    assert!(get("seconds") > 0.0 && get("plain_seconds") > 0.0);
    assert!(get("plain_peak_bytes") > get("peak_bytes"), "{json}");
    fails(&["bench", "attention", "--seq", "0"], 2, "from 1 on");
    fails(&["bench"], 2, "MODEL");
}

#[test]
fn eval_chooses_by_likelihood() {
    let Some(model) = model() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("choices.jsonl");
    let lines = r#"{"question": "What is the capital of France?", "choices": ["Berlin", "Paris", "Rome"], "answer": "Paris"}
{"question": "What colour is a clear sky?", "choices": ["green", "blue"], "answer": "B"}
"#;
    std::fs::write(&file, lines).unwrap();
    let file = file.to_str().unwrap();
    let args = ["eval", &model, "--task", file, "--choices", "choices", "--json", "--show"];
    let json: Value = serde_json::from_str(&stdout(&sparsam(&args))).unwrap();
    assert_eq!((&json["acc"], &json["questions"]), (&1.0.into(), &2.into()), "{json}");
    assert_eq!(json["answers"][0]["took_acc_norm"], 1);
    assert!((json["chance"].as_f64().unwrap() - 5.0 / 12.0).abs() < 1e-12);
    let letters = stdout(&sparsam(&["eval", &model, "--task", file, "--choices", "choices", "--letters"]));
    assert!(letters.contains("acc_norm") && letters.contains("{choices}"), "{letters}");

    let args = ["eval", &model, "--task", file, "--choices"];
    fails(&[&args[..], &["options"]].concat(), 1, "line 1");
    fails(&[&args[..], &["choices", "--letters", "--template", "x"]].concat(), 1, "{choices}");
    std::fs::write(file, lines.replace("\"Paris\"}", "\"Madrid\"}")).unwrap();
    fails(&[&args[..], &["choices"]].concat(), 1, "\"Madrid\" is no choice's text, letter or number");
}

#[test]
fn run_keeps_to_a_schema_or_a_grammar() {
    let Some(model) = model() else { return };
    let schema = r#"{"type": "object", "properties": {"colour": {"enum": ["red", "blue"]},
        "n": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["colour", "n"], "additionalProperties": false}"#;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str, text: &str| {
        let file = folder.path().join(name);
        std::fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_string()
    };
    let file = path("schema.json", schema);
    for (given, seed) in [(schema, "1"), (&file, "2")] {
        let args =
            ["run", &model, "Pick a colour.", "--temperature", "1.5", "--json", "--json-schema", given];
        let out: Value =
            serde_json::from_str(&stdout(&sparsam(&[&args[..], &["--seed", seed]].concat()))).unwrap();
        assert_eq!(out["finish"], "stop", "{out}");
        let text: Value = serde_json::from_str(out["text"].as_str().unwrap()).unwrap();
        assert!(text["colour"] == "red" || text["colour"] == "blue", "{out}");
        assert!((1..=9).contains(&text["n"].as_i64().unwrap()), "{out}");
    }
    let yes_or_no = path("answer.lark", "start: \"yes\" | \"no\"\n");
    let text = stdout(&sparsam(&["run", &model, "Is the sky blue?", "--grammar", &yes_or_no]));
    assert!(["yes", "no"].contains(&text.trim_end()), "{text}");

    let args = ["run", &model, "hi", "--json-schema"];
    let fails_with = |schema: &str, says: &str| fails(&[&args[..], &[schema]].concat(), 1, says);
    fails_with(r#"{"type": "colour"}"#, "the JSON schema cannot be used");
    fails_with("{", "--json-schema: the schema is not JSON");
    fails_with("no-such.json", "no-such.json: cannot read it");
    fails_with(&yes_or_no, "answer.lark: the schema is not JSON");
    fails(
        &["run", &model, "hi", "--grammar", &path("bad.lark", "start: x")],
        1,
        "the grammar cannot be used",
    );
    fails(&[&args[..], &["{}", "--grammar", &yes_or_no]].concat(), 2, "--grammar");
}
