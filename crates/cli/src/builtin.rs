//! The built-in model: a Llama of a million parameters that comes with the program, to try everything without a download.
//! How it was made: `docs/builtin.md`.

use anyhow::Context;
use sparsam_formats::AtomicFile;
use std::io::Write;
use std::path::PathBuf;

/// The name that means it wherever a model is wanted.
pub const NAME: &str = "builtin";

const BYTES: &[u8] = include_bytes!("../assets/builtin.gguf");

/// Its file, which is written into `models` in the cache folder when it is first asked for: `SPARSAM_CACHE`, else `sparsam`
/// in `XDG_CACHE_HOME` or `~/.cache`, else in the folder for temporary files. Commands open models by path, some of them
/// again later (a resumed run its base), so it has one like every other.
///
/// # Errors
/// If it cannot be written.
pub fn path() -> anyhow::Result<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let folder = var("SPARSAM_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|c| c.join("sparsam")))
        .or_else(|| var("HOME").map(|h| h.join(".cache/sparsam")))
        .unwrap_or_else(|| std::env::temp_dir().join("sparsam"))
        .join("models");
    // The name tells versions of the model apart, so that two versions of the program do not write over each other.
    let path = folder.join(format!("builtin-{:016x}.gguf", fnv1a(BYTES)));
    if std::fs::read(&path).is_ok_and(|there| there == BYTES) {
        return Ok(path);
    }
    let doing = || format!("the built-in model cannot be put into {}; set SPARSAM_CACHE", folder.display());
    std::fs::create_dir_all(&folder).with_context(doing)?;
    let mut file = AtomicFile::create(&path).with_context(doing)?;
    file.write_all(BYTES).with_context(doing)?;
    file.commit().with_context(doing)?;
    Ok(path)
}

/// FNV-1a (Fowler, Noll & Vo), 64 bits.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01B3))
}
