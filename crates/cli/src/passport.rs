//! Passports of files: reading, hashing parents, comparing two.

use crate::{model, text};
use anyhow::{Context, bail};
use serde_json::json;
use sha2::{Digest, Sha256};
use sparsam_engine::{Opened, Protocol, Windows, begins_with_bos};
use sparsam_quantize::passport::{KEY, Measured, Passport};
use std::io::Read;
use std::path::{Path, PathBuf};

/// What a model's file says of itself, if it was written with a passport.
pub fn of(opened: &Opened) -> Option<Passport> {
    if let Some(metadata) = opened.source.gguf_metadata() {
        let said = metadata.opt_str(KEY).ok().flatten()?;
        return Passport::from_json(&serde_json::from_str(said).ok()?);
    }
    Passport::from_json(opened.source.config_json()?.get("quantization_config")?.get("meta")?)
}

/// SHA-256 of a file; of a folder, of its `.safetensors` and `.gguf` files in the order of their names.
///
/// # Errors
/// If a file cannot be read.
pub fn sha256(path: &Path) -> anyhow::Result<String> {
    let mut files: Vec<PathBuf> = match path.is_dir() {
        false => vec![path.to_path_buf()],
        true => std::fs::read_dir(path)?.map(|e| Ok(e?.path())).collect::<std::io::Result<_>>()?,
    };
    if path.is_dir() {
        files.retain(|f| f.extension().is_some_and(|e| e == "safetensors" || e == "gguf"));
        files.sort();
    }
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    for file in files {
        let mut file = std::fs::File::open(&file).with_context(|| file.display().to_string())?;
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// The protocol of a measurement on the text at `path`.
///
/// # Errors
/// If the text cannot be read.
pub fn measured(
    path: &Path,
    protocol: &Protocol,
    opened: &Opened,
    exact: bool,
    (chunks, tokens_scored): (usize, usize),
) -> anyhow::Result<Measured> {
    let (stride, second_half) = match protocol.windows {
        Windows::SideBySide => (protocol.context, true),
        Windows::Sliding(stride) => (stride, false),
    };
    Ok(Measured {
        text: path.file_name().unwrap_or_default().to_string_lossy().to_string(),
        text_sha256: sha256(path)?,
        context: protocol.context,
        stride,
        second_half,
        chunks,
        bos: second_half && opened.tokenizer.as_ref().is_some_and(begins_with_bos),
        tokens_scored,
        exact,
    })
}

/// Compares what the passports of two models say.
///
/// # Errors
/// If one has no passport or no figures, or they were measured by unlike protocols.
pub fn compare(a: &str, b: &str, as_json: bool) -> anyhow::Result<()> {
    let read = |name: &str| -> anyhow::Result<Passport> {
        let opened = sparsam_engine::open(&model::resolve(name)?)?;
        of(&opened).with_context(|| {
            format!(
                "{name}: has no passport; measure both on one text: sparsam eval {a} {b} --perplexity FILE"
            )
        })
    };
    let passports = [read(a)?, read(b)?];
    let mut scores = Vec::new();
    for (name, passport) in [a, b].iter().zip(&passports) {
        let Some(score) = &passport.score else {
            bail!(
                "{name}: was never measured; quantize with --eval FILE, or measure both on one text: sparsam eval {a} {b} --perplexity FILE"
            );
        };
        scores.push(score);
    }
    let differences = scores[0].protocol.differences(&scores[1].protocol);
    if !differences.is_empty() {
        bail!(
            "the figures of {a} and {b} cannot be compared: {}; measure both on one text: sparsam eval {a} {b} --perplexity FILE",
            differences.join("; ")
        );
    }
    if as_json {
        return text::say_json(&json!({"a": passports[0].to_json(), "b": passports[1].to_json()}));
    }
    let rows: Vec<Vec<String>> = [a, b]
        .iter()
        .zip(&scores)
        .map(|(name, s)| {
            vec![
                name.to_string(),
                format!("{:.4} ± {:.4}", s.perplexity, s.standard_error),
                format!("{:.5}", s.divergence),
                format!("{:.2}%", 100.0 * s.top1_agreement),
            ]
        })
        .collect();
    text::say(text::table(&["model", "perplexity", "divergence from its parent", "same top token"], &rows))?;
    text::say(format!("by one protocol: {}", scores[0].protocol))
}
