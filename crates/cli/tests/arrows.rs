//! Imports between crates point one way, as ARCHITECTURE.md draws them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What each crate may import directly; and whatever those may import.
const ARROWS: &[(&str, &[&str])] = &[
    ("dtype", &[]),
    ("plan", &[]),
    ("tokenizer", &[]),
    ("testkit", &[]),
    ("ir", &["dtype"]),
    ("kernels", &["dtype"]),
    ("formats", &["dtype"]),
    ("compiler", &["ir"]),
    ("runtime", &["compiler", "kernels"]),
    ("models", &["ir", "formats"]),
    ("engine", &["models", "tokenizer", "runtime"]),
    ("grammar", &["engine"]),
    ("server", &["grammar"]),
    ("train", &["engine", "plan"]),
    ("quantize", &["train"]),
    ("distill", &["train"]),
    ("cli", &["server", "quantize", "distill"]),
];

fn allowed(of: &str, into: &mut BTreeSet<&'static str>) {
    let (_, direct) = ARROWS.iter().find(|(name, _)| *name == of).unwrap();
    for d in *direct {
        into.insert(d);
        allowed(d, into);
    }
}

/// Names of our crates under `[section]` of a manifest.
fn imports(manifest: &str, section: &str) -> BTreeSet<String> {
    let mut inside = false;
    let mut found = BTreeSet::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line == section;
        } else if inside && let Some(rest) = line.strip_prefix("sparsam-") {
            found.insert(rest.split(['.', ' ', '=']).next().unwrap().to_string());
        }
    }
    found
}

#[test]
fn imports_point_one_way() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut seen = BTreeMap::new();
    for entry in std::fs::read_dir(crates).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        let manifest = std::fs::read_to_string(path.join("Cargo.toml")).unwrap();
        assert!(
            manifest.contains(&format!("name = \"sparsam-{name}\"")),
            "{name}: package is not named by its folder"
        );
        seen.insert(name, imports(&manifest, "[dependencies]"));
    }
    let listed: BTreeSet<String> = ARROWS.iter().map(|(n, _)| n.to_string()).collect();
    assert_eq!(listed, seen.keys().cloned().collect(), "ARROWS and the folders under crates/ differ");
    assert!(seen["runtime"].contains("kernels"), "the manifests are not read as they are written");
    for (name, imports) in &seen {
        let mut may = BTreeSet::new();
        allowed(name, &mut may);
        for import in imports {
            assert!(may.contains(import.as_str()), "crate {name} must not import {import}");
        }
    }
}

#[test]
fn only_kernels_and_the_memory_map_are_unsafe() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for (name, _) in ARROWS {
        let root = ["lib.rs", "main.rs"].map(|f| crates.join(name).join("src").join(f));
        let text = root.iter().find_map(|p| std::fs::read_to_string(p).ok()).unwrap();
        // `formats` denies it and allows it for its map alone.
        let word = match *name {
            "kernels" => continue,
            "formats" => "#![deny(unsafe_code)]",
            _ => "#![forbid(unsafe_code)]",
        };
        assert!(text.contains(word), "crate {name} must say {word}");
    }
}
