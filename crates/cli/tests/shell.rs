//! Completions and manual pages.

use std::process::Command;

fn sparsam(args: &[&str]) -> (bool, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_sparsam")).args(args).output().expect("the binary runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (out.status.success(), text(out.stdout), text(out.stderr))
}

#[test]
fn every_shell_gets_completions_with_all_commands() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (good, script, _) = sparsam(&["completions", shell]);
        assert!(good);
        for word in ["plan", "info", "doctor", "queries-per-day"] {
            assert!(script.contains(word), "{shell}: no {word}");
        }
    }
    let (good, _, message) = sparsam(&["completions", "tcsh"]);
    assert!(!good && message.contains("possible values"), "{message}");
}

#[test]
fn bash_accepts_its_script() {
    let (_, script, _) = sparsam(&["completions", "bash"]);
    let Ok(out) = Command::new("bash").args(["-n", "-c", &script]).output() else {
        return eprintln!("no bash here: its script is not parsed");
    };
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn manual_pages_are_printed_and_written() {
    let (good, page, _) = sparsam(&["man", "plan", "train"]);
    assert!(good && page.contains(".TH sparsam-plan-train 1"), "{page}");
    assert!(page.contains("gpu\\-hours") && page.contains("Besiroglu"), "{page}");
    let (good, _, message) = sparsam(&["man", "plan", "tran"]);
    assert!(!good && message.contains("did you mean `train`?"), "{message}");
    let folder = tempfile::tempdir().unwrap();
    let (good, said, message) = sparsam(&["man", "--out", folder.path().to_str().unwrap()]);
    assert!(good, "{message}");
    assert!(said.contains("pages in"));
    for name in ["sparsam.1", "sparsam-plan.1", "sparsam-plan-fit.1", "sparsam-info.1"] {
        assert!(folder.path().join(name).is_file(), "no {name}");
    }
}
