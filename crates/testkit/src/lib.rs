//! Test helpers: the real model, text, tolerances (development only).
//!
//! This crate knows nothing of the other crates, so any of them may use it in its tests.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Bytes of the real model's file, whose SHA-256 `scripts/fetch-model` checks.
const SMOLLM2_BYTES: u64 = 98_362_432;

/// The root of the repository.
pub fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// The GGUF file of SmolLM2-135M-Instruct (Q4_1), fetched if it is not in the cache; `None`, said on stderr, if the
/// user has set `SPARSAM_NO_MODEL=1`.
///
/// # Panics
/// If it cannot be had: a test that needs it must not pass without it.
pub fn smollm2() -> Option<PathBuf> {
    static MODEL: OnceLock<Option<PathBuf>> = OnceLock::new();
    MODEL
        .get_or_init(|| {
            if std::env::var_os("SPARSAM_NO_MODEL").is_some_and(|v| v == "1") {
                eprintln!("SPARSAM_NO_MODEL=1: tests on the real model are left out");
                return None;
            }
            let script = root().join("scripts/fetch-model");
            let advice =
                "see scripts/fetch-model, or set SPARSAM_NO_MODEL=1 to leave out tests that need the model";
            let out = Command::new(&script)
                .output()
                .unwrap_or_else(|e| panic!("{}: {e}; {advice}", script.display()));
            let said = String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success(), "{} failed: {said}; {advice}", script.display());
            let path = PathBuf::from(String::from_utf8_lossy(&out.stdout).trim());
            let bytes = std::fs::metadata(&path).map(|m| m.len()).unwrap_or(0);
            assert_eq!(bytes, SMOLLM2_BYTES, "{} has the wrong size; delete it", path.display());
            Some(path)
        })
        .clone()
}

/// The largest absolute difference, and where; `(0, 0.0)` for empty slices.
///
/// # Panics
/// If the lengths differ or a difference is NaN.
pub fn max_abs_diff(a: &[f32], b: &[f32]) -> (usize, f32) {
    assert_eq!(a.len(), b.len(), "lengths differ");
    let mut worst = (0, 0.0);
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        let d = (x - y).abs();
        assert!(!d.is_nan(), "element {i}: {x} and {y}");
        if d > worst.1 {
            worst = (i, d);
        }
    }
    worst
}
