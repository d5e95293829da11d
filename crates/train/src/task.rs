//! Evaluation by a task during fine-tuning: the model, as it is, answers questions, and the right answers are counted.

use crate::Error;
use crate::learner::Learner;
use crate::lora::{FinetuneConfig, Finetuned, Method};
use sparsam_engine::{Engine, Options, Reading, Task, ask};
use std::ops::ControlFlow;
use std::path::Path;

/// Questions where nothing else is asked for: their share of right answers has a standard error of at most 5%.
const QUESTIONS: usize = 100;
/// Tokens of an answer where nothing else is asked for.
const MAX_TOKENS: usize = 256;
/// Questions that are answered together.
const AT_ONCE: usize = 8;
/// Tokens of a question at most.
const QUESTION_TOKENS: usize = 1024;

/// What is asked during a run.
pub struct Exam {
    task: Task,
    max_tokens: usize,
    /// Steps between two times; 0: only at the end.
    pub every: u64,
}

impl Exam {
    /// What `config` asks for; `None` if nothing.
    ///
    /// # Errors
    /// If the file cannot be read, or settings contradict each other.
    pub(crate) fn new(config: &mut FinetuneConfig) -> Result<Option<Exam>, Error> {
        let Some(file) = &mut config.task else {
            let others = config.answer_regex.is_some() || config.equation.is_some();
            return match others || !config.task_fields.is_empty() {
                true => Err(Error::config("finetune.task", "names no file, but says how it is read")),
                false => Ok(None),
            };
        };
        *file = std::path::absolute(&*file).map_err(Error::io("find", file.clone()))?;
        let reading = match (&config.answer_regex, *config.equation.get_or_insert(false)) {
            (Some(_), true) => {
                return Err(Error::config("finetune.equation", "is set, and so is answer_regex; choose one"));
            }
            (Some(regex), false) => Reading::last(regex)?,
            (None, true) => Reading::Equation,
            (None, false) => Reading::All,
        };
        if config.task_fields.is_empty() {
            config.task_fields = ["question", "answer"].map(str::to_string).to_vec();
        }
        let [question, answer] = &config.task_fields[..] else {
            return Err(Error::config(
                "finetune.task_fields",
                "wants two names: the keys of question and answer",
            ));
        };
        let most = *config.task_questions.get_or_insert(QUESTIONS);
        let task = Task::open(file, [question, answer], reading, most)?;
        let max_tokens = *config.task_tokens.get_or_insert(MAX_TOKENS);
        if max_tokens == 0 {
            return Err(Error::config("finetune.task_tokens", "must be at least 1"));
        }
        Ok(Some(Exam { task, max_tokens, every: *config.task_every.get_or_insert(0) }))
    }

    /// The number of questions.
    pub fn questions(&self) -> usize {
        self.task.questions.len()
    }

    /// Right answers of what `learner` is now. The model is written to `folder` for that, loaded as anyone would, and
    /// removed.
    ///
    /// # Errors
    /// If the disk is full, or a question is longer than the model's context.
    pub(crate) fn right(
        &self,
        tuned: &Finetuned,
        learner: &Learner,
        folder: &Path,
        threads: usize,
    ) -> Result<usize, Error> {
        tuned.write(learner, folder)?;
        let adapted = tuned.method != Method::Full;
        let made_for = tuned.opened.model.facts().context_length;
        let options = Options {
            threads,
            context: Some(made_for.min(self.max_tokens + QUESTION_TOKENS)),
            adapters: if adapted { vec![(folder.to_path_buf(), 1.0)] } else { Vec::new() },
            ..Options::default()
        };
        let path = if adapted { tuned.opened.source.path() } else { folder };
        let engine = Engine::load(path, &options)?;
        let how = (AT_ONCE.min(self.questions()), self.max_tokens);
        let answered = ask(&engine, &self.task, how, &mut |_| ControlFlow::Continue(()))?;
        std::fs::remove_dir_all(folder).map_err(Error::io("remove", folder))?;
        Ok(answered.iter().filter(|a| a.right).count())
    }
}
