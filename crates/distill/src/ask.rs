//! Asking a teacher, resumable line by line.

use crate::Error;
use crate::budget::{Purse, Tokens};
use crate::question::{Kind, Question};
use crate::record::{Record, Store};
use crate::teacher::{Asked, Desk, Manner, Prompt, Reply, Teacher};
use crate::template::Template;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap, HashSet};

/// What is asked, and how.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How questions are put and answers read.
    pub template: Template,
    /// Answers to each question.
    pub samples: u32,
    /// Everything random.
    pub seed: u64,
    /// Put as text to be continued instead of a dialogue.
    pub raw: bool,
    /// How the teacher answers.
    pub manner: Manner,
}

/// What came of it, over all answers in the store.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Questions with at least one answer that could be taken apart.
    pub questions: usize,
    /// Answers.
    pub answers: usize,
    /// Answers that could not be taken apart.
    pub malformed: usize,
    /// Answers by this run.
    pub new: usize,
    /// Questions of which the truth is known.
    pub known: usize,
    /// Of these: right by the majority of the answers.
    pub right: usize,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens of answers.
    pub completion_tokens: u64,
    /// Dollars.
    pub usd: f64,
    /// Answers that the budget left no room for.
    pub unasked: usize,
}

/// A question on its way: which, the how-many-th answer to it, its most tokens.
struct Pending<'a> {
    question: &'a Question,
    sample: u32,
    prompt: Prompt,
    most: Tokens,
}

struct Asker<'a> {
    plan: &'a Plan,
    pending: Vec<Pending<'a>>,
    next: usize,
    purse: &'a mut Purse,
    store: &'a mut Store,
    new: usize,
    progress: &'a mut dyn FnMut(usize) -> bool,
    stopped: bool,
}

/// Asks `teacher` what `store` does not hold yet. `progress` hears how many answers have come and says whether to go on.
///
/// # Errors
/// If a prompt cannot be asked, the teacher fails, or an answer cannot be kept. All answers so far are on disk then.
pub fn ask(
    teacher: &mut dyn Teacher,
    questions: &[Question],
    plan: &Plan,
    store: &mut Store,
    purse: &mut Purse,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Summary, Error> {
    let mut pending = Vec::new();
    for question in questions {
        let prompt = match plan.raw {
            true => Prompt::Text(plan.template.text(question)),
            false => Prompt::Dialogue(plan.template.dialogue(question)),
        };
        let samples: Vec<u32> = (0..plan.samples).filter(|&s| !store.has(&question.id, s)).collect();
        if samples.is_empty() {
            continue;
        }
        let most = teacher.most(&prompt, &plan.manner)?;
        pending.extend(samples.into_iter().map(|sample| Pending {
            question,
            sample,
            prompt: prompt.clone(),
            most,
        }));
    }
    let mut asker = Asker { plan, pending, next: 0, purse, store, new: 0, progress, stopped: false };
    teacher.serve(&mut asker, &plan.manner)?;
    let (new, unasked) = (asker.new, asker.pending.len() - asker.new);
    Ok(Summary { new, unasked, ..summarise(plan.template.task, store.records()) })
}

impl Desk for Asker<'_> {
    fn next(&mut self) -> Option<Asked> {
        if self.stopped {
            return None;
        }
        let p = self.pending.get(self.next)?;
        if !self.purse.reserve(p.most) {
            return None;
        }
        let asked = Asked {
            index: self.next,
            prompt: p.prompt.clone(),
            seed: seed_of(self.plan.seed, &p.question.id, p.sample),
        };
        self.next += 1;
        Some(asked)
    }

    fn take(&mut self, replies: Vec<Reply>) -> Result<(), Error> {
        let mut records = Vec::with_capacity(replies.len());
        for reply in replies {
            let p = &self.pending[reply.index];
            let usd = self.purse.pay(p.most, reply.used);
            let mut record = record(&self.plan.template, p.question, reply.text);
            record.sample = p.sample;
            (record.prompt_tokens, record.completion_tokens) = (reply.used.prompt, reply.used.completion);
            record.usd = usd;
            records.push(record);
        }
        self.new += records.len();
        self.store.add(records)?;
        self.stopped |= !(self.progress)(self.new);
        Ok(())
    }
}

/// The record of a teacher's text, taken apart.
pub fn record(template: &Template, question: &Question, text: String) -> Record {
    let (rationale, answer, problem) = match template.parse(question, &text) {
        Ok(parsed) => (Some(parsed.rationale), Some(parsed.answer), None),
        Err(problem) => (None, None, Some(problem)),
    };
    Record {
        id: question.id.clone(),
        question: question.text.clone(),
        choices: question.choices.clone(),
        truth: question.answer.clone(),
        equation: question.equation.clone(),
        raw: text,
        right: question.is_right(template.task, answer.as_deref()),
        rationale,
        answer,
        problem,
        ..Record::default()
    }
}

/// A seed of its own for every answer, that depends neither on the others nor on their order.
fn seed_of(seed: u64, id: &str, sample: u32) -> u64 {
    let mut hash = 0xCBF2_9CE4_8422_2325_u64 ^ seed;
    for byte in id.bytes().chain(sample.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3);
    }
    hash
}

fn question_of(record: &Record) -> Question {
    Question { choices: record.choices.clone(), answer: record.truth.clone(), ..Question::default() }
}

/// One record for each question: the first of those whose answer most of them give (Wang et al. 2023,
/// self-consistency). Questions without an answer are left out; the order is that of their first records.
pub fn majority(kind: Kind, records: &[Record]) -> Vec<Record> {
    let mut order: Vec<&str> = Vec::new();
    let mut by_id: HashMap<&str, Vec<&Record>> = HashMap::new();
    for r in records.iter().filter(|r| r.is_whole()) {
        let of = by_id.entry(&r.id).or_default();
        if of.is_empty() {
            order.push(&r.id);
        }
        of.push(r);
    }
    let best = |id: &&str| {
        let mut of = by_id[*id].clone();
        of.sort_by_key(|r| r.sample);
        let mut votes: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for (i, r) in of.iter().enumerate() {
            let answer =
                question_of(r).canonical(kind, r.answer.as_deref().unwrap_or_default()).unwrap_or_default();
            votes.entry(answer).or_insert((0, i)).0 += 1;
        }
        // Of answers with as many votes the one that came first.
        let (_, first) = votes.into_values().max_by_key(|&(n, first)| (n, usize::MAX - first))?;
        Some(of[first].clone())
    };
    order.iter().filter_map(best).collect()
}

/// Counts over all answers of a store.
pub fn summarise(kind: Kind, records: &[Record]) -> Summary {
    let chosen = majority(kind, records);
    let known: HashSet<&str> = records.iter().filter(|r| r.right.is_some()).map(|r| &*r.id).collect();
    Summary {
        questions: chosen.len(),
        answers: records.len(),
        malformed: records.iter().filter(|r| !r.is_whole()).count(),
        new: 0,
        known: known.len(),
        right: chosen.iter().filter(|r| r.right == Some(true)).count(),
        prompt_tokens: records.iter().map(|r| r.prompt_tokens).sum(),
        completion_tokens: records.iter().map(|r| r.completion_tokens).sum(),
        usd: records.iter().map(|r| r.usd).sum(),
        unasked: 0,
    }
}

/// Takes apart what a teacher wrote before: the questions' field `teacher`.
///
/// # Errors
/// If a question has none.
pub fn import(questions: &[Question], template: &Template) -> Result<Vec<Record>, Error> {
    questions
        .iter()
        .map(|q| match &q.teacher {
            Some(text) => Ok(record(template, q, text.clone())),
            None => Err(Error::setting("teacher", format!("question {:?} has no field `teacher`", q.text))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(id: &str, sample: u32, answer: &str) -> Record {
        Record {
            id: id.into(),
            sample,
            answer: Some(answer.into()),
            truth: Some("42".into()),
            ..Record::default()
        }
    }

    #[test]
    fn the_majority_counts_values_and_ties_go_to_the_first() {
        let records = [
            answered("a", 0, "41"),
            answered("b", 1, "8"),
            answered("a", 1, "(84 / 2)"),
            answered("a", 2, "42"),
            answered("b", 0, "7"),
        ];
        let chosen = majority(Kind::Arithmetic, &records);
        let seen: Vec<(&str, &str)> = chosen.iter().map(|r| (&*r.id, r.answer.as_deref().unwrap())).collect();
        assert_eq!(seen, [("a", "(84 / 2)"), ("b", "7")]);
    }

    #[test]
    fn seeds_differ_by_question_and_sample() {
        let all = [seed_of(0, "a", 0), seed_of(0, "a", 1), seed_of(0, "b", 0), seed_of(1, "a", 0)];
        let distinct: HashSet<u64> = all.into_iter().collect();
        assert_eq!(distinct.len(), 4);
        assert_eq!(seed_of(0, "a", 0), all[0]);
    }
}
