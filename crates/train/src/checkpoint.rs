//! Checkpoints: all that a run needs to go on bit for bit, in one file that appears whole or not at all.
//!
//! A safetensors file with the weights under their names (F32) and the optimiser's moments (F32; the bytes of their blocks,
//! where they are rounded to 8 bits), and in its metadata how far the run is. Order of the data and everything random follow from the seed and that.

use crate::Error;
use crate::learner::Learner;
use crate::optim::Kept;
use serde::{Deserialize, Serialize};
use sparsam_formats::TensorSpec;
use sparsam_formats::safetensors::{File, Writer};
use sparsam_ir::DType;
use std::path::{Path, PathBuf};

const FORMAT: &str = "sparsam-checkpoint-1";
const PREFIX: &str = "step-";
const SUFFIX: &str = ".safetensors";

/// How far a run is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// Optimiser steps done.
    pub step: u64,
    /// Rows of the data seen.
    pub rows: u64,
    /// Targets learnt from.
    pub targets: u64,
    /// Seconds of training, those of earlier parts of the run included.
    pub seconds: f64,
    /// The loss, smoothed; 0 before the first step.
    pub smoothed: f64,
    /// The lowest that it has been.
    pub lowest: f64,
    /// The loss on the held-back part when it was last evaluated.
    pub held_back: Option<f64>,
    /// The lowest that it has been.
    pub best: Option<f64>,
    /// Evaluations since the best.
    pub stale: u64,
    /// The most right answers to the task's questions that there have been.
    pub right: Option<u64>,
}

/// [`Progress`] in a file: decimal digits would not keep every bit of a number.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    step: u64,
    rows: u64,
    targets: u64,
    seconds: u64,
    smoothed: u64,
    lowest: u64,
    held_back: Option<u64>,
    #[serde(default)]
    best: Option<u64>,
    #[serde(default)]
    stale: u64,
    #[serde(default)]
    right: Option<u64>,
}

impl From<&Progress> for Stored {
    fn from(p: &Progress) -> Stored {
        Stored {
            step: p.step,
            rows: p.rows,
            targets: p.targets,
            seconds: p.seconds.to_bits(),
            smoothed: p.smoothed.to_bits(),
            lowest: p.lowest.to_bits(),
            held_back: p.held_back.map(f64::to_bits),
            best: p.best.map(f64::to_bits),
            stale: p.stale,
            right: p.right,
        }
    }
}

impl From<Stored> for Progress {
    fn from(s: Stored) -> Progress {
        Progress {
            step: s.step,
            rows: s.rows,
            targets: s.targets,
            seconds: f64::from_bits(s.seconds),
            smoothed: f64::from_bits(s.smoothed),
            lowest: f64::from_bits(s.lowest),
            held_back: s.held_back.map(f64::from_bits),
            best: s.best.map(f64::from_bits),
            stale: s.stale,
            right: s.right,
        }
    }
}

/// Writes the checkpoint of `progress` into `folder`, then deletes those older than the newest `keep` before it.
///
/// # Errors
/// If the disk is full or fails; older checkpoints are all there then.
pub fn save(folder: &Path, learner: &Learner, progress: &Progress, keep: usize) -> Result<PathBuf, Error> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let path = folder.join(format!("{PREFIX}{:08}{SUFFIX}", progress.step));
    let specs: Vec<TensorSpec> = learner.kept().into_iter().map(stored_as).collect();
    let stored = serde_json::to_string(&Stored::from(progress)).expect("numbers alone");
    let metadata = [("format".to_string(), FORMAT.to_string()), ("progress".to_string(), stored)];
    let mut writer = Writer::create(&path, &metadata, &specs)?;
    for spec in &specs {
        writer.append(&spec.name, learner.state_bytes(&spec.name)?)?;
    }
    writer.finish()?;
    for old in list(folder)?.into_iter().rev().skip(keep + 1) {
        std::fs::remove_file(&old).map_err(Error::io("delete", &old))?;
    }
    Ok(path)
}

/// How a state lies in the file, which knows no blocks of states.
fn stored_as(kept: Kept) -> TensorSpec {
    match kept.dtype.is_block() {
        true => TensorSpec { shape: vec![kept.bytes()], name: kept.name, dtype: DType::U8 },
        false => TensorSpec { name: kept.name, shape: kept.shape, dtype: kept.dtype },
    }
}

/// The checkpoints in `folder`, oldest first.
///
/// # Errors
/// If the folder cannot be read.
pub fn list(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match std::fs::read_dir(folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(Error::io("read", folder))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io("read", folder))?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with(PREFIX) && name.ends_with(SUFFIX) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Fills `learner` with what the checkpoint at `path` holds; how far it was.
///
/// # Errors
/// [`Error::Checkpoint`] if it is none, or another model's.
pub fn load(path: &Path, learner: &mut Learner) -> Result<Progress, Error> {
    let file = File::open(path)?;
    let bad = |problem: String| Error::Checkpoint { file: path.to_path_buf(), problem };
    let meta = |key: &str| file.metadata().iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
    if meta("format") != Some(FORMAT) {
        return Err(bad(format!(
            "its format is {:?}, not {FORMAT}; it is no checkpoint of a run",
            meta("format")
        )));
    }
    let stored: Stored = serde_json::from_str(meta("progress").unwrap_or_default())
        .map_err(|e| bad(format!("its progress cannot be read: {e}")))?;
    let kept: Vec<TensorSpec> = learner.kept().into_iter().map(stored_as).collect();
    let foreign =
        |name: &str| bad(format!("{name} is missing or has another shape; it belongs to another model"));
    for TensorSpec { name, shape, dtype } in &kept {
        match file.tensor(name) {
            Some(t) if t.info.shape == *shape && t.info.dtype == *dtype => {
                learner.session().set_state(name, t.bytes)?;
            }
            _ => return Err(foreign(name)),
        }
    }
    if let Some(extra) = file.tensors().iter().find(|t| !kept.iter().any(|k| k.name == t.name)) {
        return Err(foreign(&extra.name));
    }
    Ok(stored.into())
}
