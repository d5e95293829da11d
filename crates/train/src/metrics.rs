//! What a run measures, a JSON object a line: `metrics.jsonl`.

use crate::Error;
use serde::{Deserialize, Serialize};
use sparsam_formats::AtomicFile;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Record {
    /// After an optimiser step.
    Step(StepRecord),
    /// After an evaluation.
    HeldBack {
        /// Steps done.
        step: u64,
        /// Mean loss on the held-back part, nats a token.
        held_back_loss: f64,
    },
    /// After the questions of a task.
    Task {
        /// Steps done.
        step: u64,
        /// Right answers.
        task_right: usize,
        /// Questions.
        task_questions: usize,
    },
    /// What the model wrote.
    Sample {
        /// Steps done.
        step: u64,
        /// Prompt and continuation.
        sample: String,
    },
    /// Something that a reader should know.
    Note {
        /// Steps done.
        step: u64,
        /// What.
        note: String,
    },
}

/// The measures of one optimiser step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Steps done, this one included.
    pub step: u64,
    /// Mean loss over the step's targets, nats a token.
    pub loss: f64,
    /// Its learning rate.
    pub lr: f64,
    /// Norm of the gradients before clipping.
    pub grad_norm: Option<f64>,
    /// Targets learnt from so far.
    pub tokens: u64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// Tokens a second in this step.
    pub tokens_per_second: f64,
    /// Arithmetic of this step as a share of what the machine can do at most.
    pub share_of_peak: f64,
}

impl Record {
    /// Steps done when it was written.
    pub fn step(&self) -> u64 {
        match self {
            Record::Step(r) => r.step,
            Record::HeldBack { step, .. }
            | Record::Task { step, .. }
            | Record::Sample { step, .. }
            | Record::Note { step, .. } => *step,
        }
    }
}

/// The file, open for more lines.
pub struct Metrics {
    /// `None`: nothing is kept, another process keeps them.
    file: Option<File>,
    path: PathBuf,
}

impl Metrics {
    /// Opens `path` for a run that goes on behind step `step`: later lines, and a torn last one, are dropped first. A run
    /// that begins writes all its lines anew.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn open(path: &Path, step: u64) -> Result<Metrics, Error> {
        let mut kept = AtomicFile::create(path)?;
        for record in read(path)?.iter().filter(|r| step > 0 && r.step() <= step) {
            write(&mut kept, record).map_err(Error::io("write", path))?;
        }
        kept.commit()?;
        let file = File::options().append(true).open(path).map_err(Error::io("open", path))?;
        Ok(Metrics { file: Some(file), path: path.to_path_buf() })
    }

    /// Keeps nothing.
    pub fn none() -> Metrics {
        Metrics { file: None, path: PathBuf::new() }
    }

    /// Adds a line.
    ///
    /// # Errors
    /// If the disk is full or fails.
    pub fn add(&mut self, record: &Record) -> Result<(), Error> {
        let Some(file) = &mut self.file else { return Ok(()) };
        write(file, record).map_err(Error::io("write", &self.path))
    }
}

fn write(to: &mut impl Write, record: &Record) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// The lines of a file; none if there is no file. A last line without its end was being written when the run was killed,
/// and is left out.
///
/// # Errors
/// If it cannot be read, or another line is not one of [`Record`]'s.
pub fn read(path: &Path) -> Result<Vec<Record>, Error> {
    let text = match std::fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(Error::io("read", path))?,
    };
    let whole = text.rfind('\n').map_or("", |at| &text[..at]);
    let parse = |(i, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|e| Error::data(path, format!("line {}: {e}", i + 1)))
    };
    whole.lines().enumerate().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn going_on_drops_what_came_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let held = |step| Record::HeldBack { step, held_back_loss: 1.5 };
        let mut m = Metrics::open(&path, 0).unwrap();
        for step in 1..=4 {
            m.add(&held(step)).unwrap();
        }
        m.add(&Record::Sample { step: 2, sample: "a\nb".into() }).unwrap();
        std::fs::write(&path, std::fs::read_to_string(&path).unwrap() + "{\"step\": 5, \"hel").unwrap();
        let mut m = Metrics::open(&path, 2).unwrap();
        m.add(&held(3)).unwrap();
        let want = [held(1), held(2), Record::Sample { step: 2, sample: "a\nb".into() }, held(3)];
        assert_eq!(read(&path).unwrap(), want);
    }
}
