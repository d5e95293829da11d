//! How a student is spoken to: what it learns to write, and how that is read.

use crate::question::{Kind, Question};
use crate::template::{Parsed, Template};
use crate::{Error, record::write_whole};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What a student is taught to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// The answer alone: plain fine-tuning, the control.
    LabelOnly,
    /// Reasons, then the answer.
    RationaleFirst,
    /// Two tasks told apart by a prefix, answer and reasons (Hsieh et al. 2023): reasons teach, but need not be written.
    StepByStep,
}

impl Variant {
    /// All of them.
    pub const ALL: [Variant; 3] = [Variant::LabelOnly, Variant::RationaleFirst, Variant::StepByStep];

    /// Its name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Variant::LabelOnly => "label-only",
            Variant::RationaleFirst => "rationale-first",
            Variant::StepByStep => "step-by-step",
        }
    }
}

/// What a student writes behind which prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// The answer.
    Label,
    /// The reasons.
    Rationale,
    /// Both, reasons first.
    Both,
}

/// The name of the file beside a student's weights.
const FILE: &str = "distill.json";

/// What a taught model was taught, kept beside its weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Student {
    /// What it writes.
    pub variant: Variant,
    /// What kind of questions it answers.
    pub task: Kind,
    /// The part of the questions that was held back, in ten-thousandths.
    pub held_back: u32,
    /// The seed of that choice.
    pub split_seed: u64,
    /// The model that the folder's adapter belongs to; `None`: the folder holds a model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<PathBuf>,
}

impl Student {
    /// What the model in `folder` was taught; `None` if it is no student.
    ///
    /// # Errors
    /// If the file is there but damaged.
    pub fn open(folder: &Path) -> Result<Option<Student>, Error> {
        let path = folder.join(FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(_) if !path.exists() => return Ok(None),
            Err(e) => return Err(Error::io("read", path)(e)),
        };
        serde_json::from_str(&text).map(Some).map_err(|e| Error::file(path, format!("is damaged: {e}")))
    }

    /// Writes what the model in `folder` was taught.
    ///
    /// # Errors
    /// If the disk is full or fails.
    pub fn save(&self, folder: &Path) -> Result<(), Error> {
        let text = serde_json::to_string_pretty(self).expect("names and numbers");
        write_whole(&folder.join(FILE), text.as_bytes())
    }

    /// What it is asked for when it is to answer.
    pub fn asked(&self) -> Task {
        match self.variant {
            Variant::RationaleFirst => Task::Both,
            Variant::LabelOnly | Variant::StepByStep => Task::Label,
        }
    }

    /// Takes its answer apart.
    ///
    /// # Errors
    /// What is missing.
    pub fn parse(&self, template: &Template, question: &Question, text: &str) -> Result<Parsed, String> {
        match self.asked() {
            Task::Both => template.parse(question, text),
            _ => template.label(question, text.trim().lines().next().unwrap_or_default()),
        }
    }
}

/// The prompt for a task; the student goes on behind it.
pub fn prompt(template: &Template, question: &Question, task: Task) -> String {
    let prefix = match task {
        Task::Label => "predict",
        Task::Rationale => "explain",
        Task::Both => "reason",
    };
    format!("{prefix}: {}\nanswer:", template.put(question))
}

/// What the student is to write for a task.
pub fn target(label: &str, rationale: &str, task: Task) -> String {
    let rationale = rationale.split_whitespace().collect::<Vec<_>>().join(" ");
    match task {
        Task::Label => format!(" {label}"),
        Task::Rationale => format!(" {rationale}"),
        Task::Both => format!(" {rationale} So the answer is {label}.").replace("  ", " "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taught_is_what_is_read() {
        for kind in Kind::ALL {
            let template = Template::builtin(kind);
            for e in &template.examples {
                let question = template.complete(Question {
                    text: e.question.clone(),
                    choices: e.choices.clone(),
                    ..Question::default()
                });
                for variant in Variant::ALL {
                    let student = Student { variant, task: kind, held_back: 0, split_seed: 0, base: None };
                    let said = target(&e.answer, &e.rationale, student.asked());
                    let parsed = student.parse(&template, &question, &said).unwrap();
                    let same = |a: &str| question.canonical(kind, a);
                    assert_eq!(same(&parsed.answer), same(&e.answer), "{said}");
                }
            }
        }
    }

    #[test]
    fn students_are_told_from_other_models() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Student::open(folder.path()).unwrap(), None);
        let student = Student {
            variant: Variant::StepByStep,
            task: Kind::Choice,
            held_back: 2000,
            split_seed: 7,
            base: Some("base.gguf".into()),
        };
        student.save(folder.path()).unwrap();
        assert_eq!(Student::open(folder.path()).unwrap(), Some(student));
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        assert!(Student::open(folder.path()).unwrap_err().to_string().contains("damaged"));
    }
}
