//! The types that a speed led to, kept until the file is written: a run that was killed goes on with them, since times that are
//! measured anew could lead to others and what was rounded would be for nothing.

use super::goal::Chosen;
use serde::{Deserialize, Serialize};
use sparsam_dtype::DType;
use sparsam_quantize::recipe::TensorPlan;
use std::io::Write;
use std::path::{Path, PathBuf};

#[derive(Serialize, Deserialize)]
struct Kept {
    /// The settings that they were chosen for.
    key: String,
    tokens_per_second: f64,
    types: Vec<String>,
}

fn path(partial: &Path) -> PathBuf {
    partial.join("goal.types")
}

/// Keeps what was chosen, in the folder for partial results.
///
/// # Errors
/// If the disk fails.
pub fn keep(partial: &Path, key: &str, chosen: &Chosen) -> anyhow::Result<()> {
    std::fs::create_dir_all(partial)?;
    let kept = Kept {
        key: key.to_string(),
        tokens_per_second: chosen.tokens_per_second,
        types: chosen.plan.iter().map(|p| p.to.to_string()).collect(),
    };
    let mut file = sparsam_formats::AtomicFile::create(path(partial))?;
    file.write_all(&serde_json::to_vec(&kept)?)?;
    Ok(file.commit()?)
}

/// What an earlier run with these settings kept; `plan` has the tensors.
pub fn kept(partial: &Path, key: &str, mut plan: Vec<TensorPlan>) -> Option<Chosen> {
    let kept: Kept = serde_json::from_slice(&std::fs::read(path(partial)).ok()?).ok()?;
    if kept.key != key || kept.types.len() != plan.len() {
        return None;
    }
    for (p, name) in plan.iter_mut().zip(&kept.types) {
        (p.to, p.wanted) = (DType::from_name(name)?, None);
    }
    Some(Chosen { plan, tokens_per_second: kept.tokens_per_second })
}

/// Forgets it.
pub fn forget(partial: &Path) {
    // Best effort: the result is in its place.
    let _ = std::fs::remove_file(path(partial));
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsam_quantize::recipe;

    #[test]
    fn what_was_chosen_comes_back_for_the_same_settings_alone() {
        let dir = tempfile::tempdir().unwrap();
        let partial = dir.path().join("x.gguf.partial");
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/golden/llama.gguf");
        let opened = sparsam_engine::open(Path::new(golden)).unwrap();
        let plan = recipe::plan_with(&opened.model, &opened.source, |_| DType::Q8_0).unwrap();
        assert!(kept(&partial, "a", plan.clone()).is_none());
        let mut chosen = Chosen { plan: plan.clone(), tokens_per_second: 12.5 };
        chosen.plan[0].to = DType::S3_64;
        keep(&partial, "a", &chosen).unwrap();
        assert!(kept(&partial, "b", plan.clone()).is_none());
        assert!(kept(&partial, "a", plan[1..].to_vec()).is_none());
        let again = kept(&partial, "a", plan).unwrap();
        let types = |c: &Chosen| c.plan.iter().map(|p| p.to).collect::<Vec<_>>();
        assert_eq!((types(&again), again.tokens_per_second), (types(&chosen), 12.5));
        forget(&partial);
        assert_eq!(std::fs::read_dir(&partial).unwrap().count(), 0);
    }
}
