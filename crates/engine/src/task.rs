//! Tasks with one right answer: the model writes, what it wrote is read, and the share of right answers is counted.

use crate::{Batcher, Engine, Error, Request};
use regex::Regex;
use sparsam_tokenizer::Message;
use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Bytes that a compiled regular expression may take.
const REGEX_BYTES: usize = 1 << 20;

/// A question and its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// What the user says.
    pub prompt: String,
    /// The right answer.
    pub answer: String,
}

/// How the answer is found in what was written.
#[derive(Clone, Debug)]
pub enum Reading {
    /// All of it is the answer.
    All,
    /// The first group (or all) of the last match.
    Last(Regex),
    /// It is a sum, whose value is the answer.
    Equation,
}

impl Reading {
    /// The last match of `regex`.
    ///
    /// # Errors
    /// If it is no regular expression, or a huge one.
    pub fn last(regex: &str) -> Result<Reading, Error> {
        let built = regex::RegexBuilder::new(regex).size_limit(REGEX_BYTES).build();
        Ok(Reading::Last(built.map_err(|e| Error::Context { what: format!("the answer's regex: {e}") })?))
    }

    /// The answer in `written`; `None` if there is none.
    pub fn read(&self, written: &str) -> Option<String> {
        match self {
            Reading::All => Some(written.to_string()),
            Reading::Equation => equation(written).map(|v| v.to_string()),
            Reading::Last(regex) => {
                let found = regex.captures_iter(written).last()?;
                found.get(1).or(found.get(0)).map(|m| m.as_str().to_string())
            }
        }
    }
}

/// Questions from a file of JSON lines, and how their answers are read.
#[derive(Clone, Debug)]
pub struct Task {
    /// The file.
    pub file: PathBuf,
    /// In its order.
    pub questions: Vec<Question>,
    /// How answers are read.
    pub reading: Reading,
}

impl Task {
    /// Reads at most `most` questions of `file`, whose lines have the keys `fields` for question and answer. An answer in
    /// which the regular expression of `reading` matches is what it finds there.
    ///
    /// # Errors
    /// If a line is not JSON or lacks a key: which, and what is there; if there is no question.
    pub fn open(file: &Path, fields: [&str; 2], reading: Reading, most: usize) -> Result<Task, Error> {
        let bad = |what: String| Error::Task { file: file.to_path_buf(), what };
        let opened = std::fs::File::open(file).map_err(|e| bad(format!("cannot be opened: {e}")))?;
        let mut questions = Vec::new();
        for (i, line) in BufReader::new(opened).lines().enumerate() {
            let at = |what: String| bad(format!("line {}: {what}", i + 1));
            let line = line.map_err(|e| at(format!("cannot be read as UTF-8 text: {e}")))?;
            if line.trim().is_empty() {
                continue;
            }
            if questions.len() == most {
                break;
            }
            let value: serde_json::Value =
                serde_json::from_str(&line).map_err(|e| at(format!("is not JSON: {e}")))?;
            let text = |key: &str| match &value[key] {
                serde_json::Value::String(s) => Ok(s.clone()),
                serde_json::Value::Number(n) => Ok(n.to_string()),
                _ => {
                    let keys: Vec<&String> = value.as_object().into_iter().flat_map(|o| o.keys()).collect();
                    Err(at(format!("there is no text or number {key:?}; the line has {keys:?}")))
                }
            };
            let (prompt, answer) = (text(fields[0])?, text(fields[1])?);
            let answer = match &reading {
                Reading::Last(_) => reading.read(&answer).unwrap_or(answer),
                Reading::All | Reading::Equation => answer,
            };
            questions.push(Question { prompt, answer });
        }
        if questions.is_empty() {
            return Err(bad("holds no question; one JSON object a line is expected".into()));
        }
        Ok(Task { file: file.to_path_buf(), questions, reading })
    }
}

/// What was written on one question.
#[derive(Clone, Debug, PartialEq)]
pub struct Answered {
    /// The question's number, from 0.
    pub index: usize,
    /// What the model wrote.
    pub text: String,
    /// What was read in it; `None` if nothing could be.
    pub read: Option<String>,
    /// Whether that is the right answer.
    pub right: bool,
}

/// Asks all questions of `task`, `at_once` of them together, greedily, and reads the answers. Calls `on` with each as it
/// comes; it may end the task.
///
/// # Errors
/// If the model has no tokenizer, or a question is longer than the context.
pub fn ask(
    engine: &Engine,
    task: &Task,
    (at_once, max_tokens): (usize, usize),
    on: &mut dyn FnMut(&Answered) -> ControlFlow<()>,
) -> Result<Vec<Answered>, Error> {
    let questions = &task.questions;
    let mut batcher = Batcher::new(engine, at_once)?;
    let templated = engine.tokenizer()?.chat_template().is_some();
    let mut asked = HashMap::new();
    for (index, q) in questions.iter().enumerate() {
        let prompt = match templated {
            true => engine.encode_dialogue(&[Message::new("user", q.prompt.clone())])?,
            false => engine.encode(&q.prompt)?,
        };
        let room = engine.context().saturating_sub(prompt.len()).max(1);
        let request = Request { prompt, max_tokens: Some(max_tokens.min(room)), ..Request::default() };
        asked.insert(batcher.submit(request, None)?, (index, String::new()));
    }
    let mut all = Vec::with_capacity(questions.len());
    while !asked.is_empty() {
        for output in batcher.step()? {
            let Some((_, text)) = asked.get_mut(&output.id) else { continue };
            *text += &output.text;
            if output.finish.is_none() {
                continue;
            }
            let Some((index, text)) = asked.remove(&output.id) else { continue };
            let found = task.reading.read(&text);
            let right = found.as_deref().is_some_and(|found| same(found, &questions[index].answer));
            let answered = Answered { index, text, read: found, right };
            let flow = on(&answered);
            all.push(answered);
            if flow.is_break() {
                asked.clear();
                break;
            }
        }
    }
    all.sort_by_key(|a| a.index);
    Ok(all)
}

/// Whether two answers are the same: as numbers to six digits if both are, else letter by letter, but for case and the
/// space around.
pub fn same(a: &str, b: &str) -> bool {
    let number = |s: &str| s.trim().trim_start_matches('$').replace(',', "").parse::<f64>().ok();
    match (number(a), number(b)) {
        (Some(a), Some(b)) => (a - b).abs() <= 1e-6 * b.abs().max(1.0),
        _ => a.trim().eq_ignore_ascii_case(b.trim()),
    }
}

/// The value of a sum such as `( 84.0 / 2.0 ) + 1`; `None` if `text` is none. What follows the first line is left out, and
/// so is what stands behind `=`.
///
/// ```
/// use sparsam_engine::equation;
/// assert_eq!(equation("( 84.0 / 2.0 )"), Some(42.0));
/// assert_eq!(equation("2 + 3 * (4 - 1) = 11"), Some(11.0));
/// assert_eq!(equation("The answer is 4"), None);
/// ```
pub fn equation(text: &str) -> Option<f64> {
    let line = text.trim().lines().next()?;
    let sum: Vec<char> = line.split('=').next()?.chars().filter(|c| !c.is_whitespace()).collect();
    // As deep as a sum of people's goes; what a model writes may be anything.
    let mut p = Parser { sum: &sum, at: 0, depth: 0 };
    let value = p.terms()?;
    (p.at == sum.len() && value.is_finite()).then_some(value)
}

/// Nested parentheses that are followed.
const MAX_DEPTH: usize = 32;

struct Parser<'a> {
    sum: &'a [char],
    at: usize,
    depth: usize,
}

impl Parser<'_> {
    fn take(&mut self, any: &[char]) -> Option<char> {
        let c = *self.sum.get(self.at)?;
        any.contains(&c).then(|| {
            self.at += 1;
            c
        })
    }

    fn terms(&mut self) -> Option<f64> {
        let mut value = self.factors()?;
        while let Some(sign) = self.take(&['+', '-']) {
            let next = self.factors()?;
            value = if sign == '+' { value + next } else { value - next };
        }
        Some(value)
    }

    fn factors(&mut self) -> Option<f64> {
        let mut value = self.one()?;
        while let Some(sign) = self.take(&['*', '/', '×', '÷']) {
            let next = self.one()?;
            value = if matches!(sign, '*' | '×') { value * next } else { value / next };
        }
        Some(value)
    }

    fn one(&mut self) -> Option<f64> {
        if self.take(&['(']).is_some() {
            self.depth += 1;
            if self.depth > MAX_DEPTH {
                return None;
            }
            let value = self.terms()?;
            self.take(&[')'])?;
            self.depth -= 1;
            return Some(value);
        }
        let minus = self.take(&['-']).is_some();
        let start = self.at;
        while self.sum.get(self.at).is_some_and(|c| c.is_ascii_digit() || *c == '.') {
            self.at += 1;
        }
        let number: String = self.sum[start..self.at].iter().collect();
        let value: f64 = number.parse().ok()?;
        Some(if minus { -value } else { value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_match_counts() {
        let r = Reading::last("#### (-?[0-9,.]+)").unwrap();
        assert_eq!(r.read("#### 3 no #### 1,200").as_deref(), Some("1,200"));
        assert_eq!(r.read("none"), None);
        assert_eq!(Reading::last("[0-9]+").unwrap().read("4 and 5").as_deref(), Some("5"));
        assert_eq!(Reading::Equation.read("( 4 / 2 ) = 2").as_deref(), Some("2"));
        assert!(Reading::last("(").unwrap_err().to_string().contains("regex"));
    }

    #[test]
    fn questions_are_read_and_bad_lines_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("q.jsonl");
        let read = |text: &str, most| {
            std::fs::write(&file, text).unwrap();
            Task::open(&file, ["q", "a"], Reading::last("#### (.*)").unwrap(), most)
        };
        let two = "{\"q\": \"one\", \"a\": 1}\n\n{\"q\": \"two\", \"a\": \"1 + 1 #### 2\"}\n";
        let task = read(two, 9).unwrap();
        assert_eq!(task.questions.iter().map(|q| &*q.answer).collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!(read(two, 1).unwrap().questions.len(), 1);
        let said = |text: &str| read(text, 9).unwrap_err().to_string();
        assert!(
            said("{\"q\": \"x\"}").contains("line 1: there is no text or number \"a\"; the line has [\"q\"]")
        );
        assert!(said("no").contains("line 1: is not JSON") && said("\n").contains("holds no question"));
    }

    #[test]
    fn sums_have_their_values() {
        for (text, want) in [
            ("( 7.0 * 30.0 )", Some(210.0)),
            ("8 - 2 - 1", Some(5.0)),
            ("-3 + 10 / 4\nQ: more", Some(-0.5)),
            ("((2))*3", Some(6.0)),
            ("1 / 0", None),
            ("2 +", None),
            ("(2", None),
            ("", None),
            ("2 apples", None),
        ] {
            assert_eq!(equation(text), want, "{text}");
        }
        assert_eq!(equation(&"(".repeat(100_000)), None);
    }

    #[test]
    fn answers_are_compared_as_numbers_or_words() {
        assert!(same("1,200.0", "1200") && same("$5", "5.0") && same(" Yes", "yes"));
        assert!(!same("5", "6") && !same("no", "yes") && !same("", "0"));
    }
}
