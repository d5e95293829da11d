//! Tasks with one right answer: the model writes, what it wrote is read, and the share of right answers is counted.

use crate::{Batcher, Engine, Error, Request};
use sparsam_tokenizer::Message;
use std::collections::HashMap;
use std::ops::ControlFlow;

/// A question and its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// What the user says.
    pub prompt: String,
    /// The right answer.
    pub answer: String,
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

/// Asks all `questions`, `at_once` of them together, greedily, and reads each answer with `read`. Calls `on` with each as
/// it comes; it may end the task.
///
/// # Errors
/// If the model has no tokenizer, or a question is longer than the context.
pub fn ask(
    engine: &Engine,
    questions: &[Question],
    (at_once, max_tokens): (usize, usize),
    read: &dyn Fn(&str) -> Option<String>,
    on: &mut dyn FnMut(&Answered) -> ControlFlow<()>,
) -> Result<Vec<Answered>, Error> {
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
            let found = read(&text);
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
