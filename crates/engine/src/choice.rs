//! Questions with answers to choose from: the model's answer is the text that it holds likeliest.
//!
//! The protocol is that of lm-evaluation-harness (Gao et al. 2021) for `multiple_choice`: an answer stands behind a space,
//! context and answer are read as one text, the tokens beyond the context's number are the answer's, and among equals the
//! first wins. `acc` is by the log-likelihood as it is, `acc_norm` by it over the characters of the answer.

use crate::perplexity::LOGIT_ROWS;
use crate::runner::{Feed, Runner, Sequence, Want};
use crate::{Engine, Error, negative_log_likelihood};
use std::ops::ControlFlow;

/// A question with its answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Choices {
    /// What stands before an answer and its space.
    pub context: String,
    /// The answers, at least one.
    pub texts: Vec<String>,
}

/// How likely the model holds an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Likelihood {
    /// `ln p` of all its tokens behind the context.
    pub log: f64,
    /// Its tokens, the space in front included.
    pub tokens: usize,
    /// Its characters without that space.
    pub characters: usize,
}

/// What counts when likelihoods are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Per {
    /// The likelihood of the whole answer: short ones are at an advantage.
    Answer,
    /// Its logarithm over the answer's characters, whatever the tokenizer.
    Character,
    /// Its logarithm over the answer's tokens.
    Token,
}

impl Likelihood {
    /// The number that is compared.
    pub fn per(&self, unit: Per) -> f64 {
        match unit {
            Per::Answer => self.log,
            Per::Character => self.log / self.characters.max(1) as f64,
            Per::Token => self.log / self.tokens as f64,
        }
    }
}

/// The index of the likeliest answer, the first among equals.
pub fn likeliest(answers: &[Likelihood], unit: Per) -> usize {
    let better = |best: usize, i: usize| answers[i].per(unit) > answers[best].per(unit);
    (1..answers.len()).fold(0, |best, i| if better(best, i) { i } else { best })
}

/// Likelihoods of all answers to each of `questions`, in their order. Calls `on` with each question's number and answers
/// as they come; it may end the task, which then gives what it has.
///
/// # Errors
/// If the model has no tokenizer, a question with an answer is longer than the context, or an answer has no token of its
/// own.
pub fn choose_among(
    engine: &Engine,
    questions: &[Choices],
    on: &mut dyn FnMut(usize, &[Likelihood]) -> ControlFlow<()>,
) -> Result<Vec<Vec<Likelihood>>, Error> {
    let mut parts = Vec::with_capacity(questions.len());
    for (i, q) in questions.iter().enumerate() {
        parts.push(Part::new(engine, q).map_err(|what| at(i, what))?);
    }
    let longest = parts.iter().map(Part::tokens).max().unwrap_or(1);
    if let Some(i) = parts.iter().position(|p| p.tokens() > engine.context()) {
        let (tokens, context) = (parts[i].tokens(), engine.context());
        return Err(at(i, format!("{tokens} tokens are beyond the context of {context}")));
    }
    let mut runner = engine.runner_with(1, longest)?;
    let mut sequence = runner.sequence();
    let mut all = Vec::with_capacity(parts.len());
    for (i, (part, question)) in parts.iter().zip(questions).enumerate() {
        all.push(part.likelihoods(&mut runner, &mut sequence, question)?);
        if on(i, &all[i]).is_break() {
            break;
        }
    }
    Ok(all)
}

fn at(question: usize, what: String) -> Error {
    Error::Context { what: format!("question {}: {what}", question + 1) }
}

/// A question's tokens.
struct Part {
    context: Vec<u32>,
    answers: Vec<Vec<u32>>,
}

impl Part {
    fn new(engine: &Engine, q: &Choices) -> Result<Part, String> {
        // What belongs to the answer's first word is no part of the context.
        let context = q.context.trim_end();
        let space = if context.len() < q.context.len() { &q.context[context.len()..] } else { " " };
        let eos = engine.tokenizer().map_err(|e| e.to_string())?.eos();
        let encode = |text: &str| -> Result<Vec<u32>, String> {
            let mut tokens = engine.encode(text).map_err(|e| e.to_string())?;
            if eos.is_some() && tokens.last() == eos.as_ref() {
                tokens.pop(); // some tokenizers end every text
            }
            Ok(tokens)
        };
        let before = encode(context)?;
        if before.is_empty() {
            return Err("nothing stands before the answers, so their first token cannot be foreseen".into());
        }
        let mut answers = Vec::with_capacity(q.texts.len());
        for text in &q.texts {
            let mut whole = encode(&format!("{context}{space}{text}"))?;
            if whole.len() <= before.len() {
                return Err(format!("the answer {text:?} has no token of its own"));
            }
            answers.push(whole.split_off(before.len()));
        }
        Ok(Part { context: before, answers })
    }

    /// Tokens that have to be read at once.
    fn tokens(&self) -> usize {
        self.context.len() + self.answers.iter().map(Vec::len).max().unwrap_or(0)
    }

    fn likelihoods(
        &self,
        runner: &mut Runner,
        sequence: &mut Sequence,
        question: &Choices,
    ) -> Result<Vec<Likelihood>, Error> {
        let context = &self.context;
        let finite = |log: f64| {
            if log.is_finite() { Ok(log) } else { Err(Error::NotFinite { tokens: context.len() }) }
        };
        let kept = runner.reuse(sequence, context);
        let logits = runner.append(sequence, &context[kept..])?;
        // One row of logits foresees the first token of every answer.
        let mut logs = Vec::with_capacity(self.answers.len());
        for answer in &self.answers {
            logs.push(finite(-negative_log_likelihood(logits, answer[0]))?);
        }
        let vocab = runner.vocab_size();
        for (answer, log) in self.answers.iter().zip(&mut logs) {
            let (read, foreseen) = (&answer[..answer.len() - 1], &answer[1..]);
            for (tokens, targets) in read.chunks(LOGIT_ROWS).zip(foreseen.chunks(LOGIT_ROWS)) {
                let logits = runner.run(&mut [Feed { sequence, tokens, want: Want::From(0) }])?;
                for (row, &target) in logits.chunks(vocab).zip(targets) {
                    *log -= negative_log_likelihood(row, target);
                }
                finite(*log)?;
            }
            runner.truncate(sequence, context.len());
        }
        let texts = self.answers.iter().zip(&question.texts).zip(logs);
        let one = |((tokens, text), log): ((&Vec<u32>, &String), f64)| Likelihood {
            log,
            tokens: tokens.len(),
            characters: text.chars().count(),
        };
        Ok(texts.map(one).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_is_the_first_of_the_best_by_the_unit() {
        let l = |log: f64, tokens, characters| Likelihood { log, tokens, characters };
        let answers = [l(-4.0, 1, 2), l(-5.0, 3, 8), l(-4.0, 2, 9)];
        assert_eq!(likeliest(&answers, Per::Answer), 0);
        assert_eq!(likeliest(&answers, Per::Character), 2);
        assert_eq!(likeliest(&answers, Per::Token), 1);
    }
}
