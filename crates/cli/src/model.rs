//! What `MODEL` may be on the command line.

use crate::{builtin, pull};
use anyhow::{Context, bail};
use std::path::{Path, PathBuf};

/// The file or folder that `name` means: `builtin`, a path, or the name of a repository on the Hugging Face hub that is
/// already in the local cache (`org/name`, `org/name@revision`, `org/name:Q4_0` where it has several GGUF files).
///
/// # Errors
/// If there is nothing of that name; the message says where it was looked for.
pub fn resolve(name: &str) -> anyhow::Result<PathBuf> {
    if name == builtin::NAME {
        return builtin::path();
    }
    let path = Path::new(name);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    let (plain_name, kind) = match name.rsplit_once(':') {
        Some((before, kind)) if !kind.contains('/') => (before, Some(kind)),
        _ => (name, None),
    };
    let (repository, revision) = plain_name.split_once('@').unwrap_or((plain_name, "main"));
    let parts: Vec<&str> = repository.split('/').collect();
    let plain = |p: &str| !p.is_empty() && p != ".." && !p.contains(['\\', ':']);
    if parts.len() != 2
        || !parts.iter().all(|p| plain(p))
        || name.ends_with(".gguf")
        || name.ends_with(".safetensors")
    {
        bail!(
            "{name}: no such file or folder; give builtin, a GGUF file, a safetensors file or folder, or ORG/NAME of the hub"
        );
    }
    let cache = hub_cache().context("HOME is not set, so there is no cache of models; give a file")?;
    let folder = cache.join(format!("models--{}", parts.join("--")));
    let commit = match std::fs::read_to_string(folder.join("refs").join(revision)) {
        Ok(commit) => commit.trim().to_string(),
        Err(_) => revision.to_string(),
    };
    let snapshot = folder.join("snapshots").join(&commit);
    if !snapshot.is_dir() {
        bail!(
            "{name}: no such file or folder, and {} holds no revision {revision} of that repository; check the name, or fetch it with: sparsam pull {plain_name}",
            folder.display()
        );
    }
    pull::local(&snapshot, kind).with_context(|| name.to_string())
}

/// Where the hub's own tools keep what they fetched.
pub fn hub_cache() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("HF_HUB_CACHE")
        .or_else(|| var("HF_HOME").map(|h| h.join("hub")))
        .or_else(|| var("XDG_CACHE_HOME").map(|c| c.join("huggingface/hub")))
        .or_else(|| var("HOME").map(|h| h.join(".cache/huggingface/hub")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_named() {
        for name in ["no-such-file.gguf", "a/b/c", "../x", "org/no-such-model"] {
            let message = resolve(name).unwrap_err().to_string();
            assert!(message.starts_with(name), "{message}");
        }
        assert_eq!(resolve(env!("CARGO_MANIFEST_DIR")).unwrap(), Path::new(env!("CARGO_MANIFEST_DIR")));
    }
}
