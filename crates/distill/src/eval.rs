//! Who answers how well: students, teachers and baselines on the same questions.

use crate::Error;
use crate::question::{Kind, Question};
use crate::record::Record;
use crate::stats::{Paired, paired, wilson};
use crate::student::{self, Student};
use crate::teacher::local::Local;
use crate::teacher::{Asked, Desk, Manner, Prompt, Reply, Teacher};
use crate::template::Template;
use serde::Serialize;
use serde_json::{Value, json};
use sparsam_engine::Engine;
use sparsam_plan::plot::{Axis, Form, Mark, Plot, Series, Unit};
use sparsam_plan::report::{Report, Table};
use std::collections::HashMap;
use std::time::Instant;

/// Examples of different answers in the report.
const MAX_EXAMPLES: usize = 12;

/// One answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answered {
    /// As it was written.
    pub text: String,
    /// Taken apart; `None` if it is none.
    pub answer: Option<String>,
    /// Whether it is true.
    pub right: bool,
}

/// Somebody with an answer to each question.
#[derive(Clone, Debug, PartialEq)]
pub struct Contender {
    /// Its name in the report.
    pub name: String,
    /// One for each question.
    pub answers: Vec<Answered>,
    /// Parameters, if it is a model that was asked here.
    pub parameters: Option<u64>,
    /// Tokens written, if known.
    pub tokens: Option<u64>,
    /// Time taken, if it was asked here.
    pub seconds: Option<f64>,
    /// Dollars, if it cost any.
    pub usd: Option<f64>,
}

struct Collector<'a> {
    prompts: &'a [Prompt],
    next: usize,
    replies: Vec<Option<Reply>>,
    progress: &'a mut dyn FnMut(usize),
}

impl Desk for Collector<'_> {
    fn next(&mut self) -> Option<Asked> {
        let prompt = self.prompts.get(self.next)?.clone();
        self.next += 1;
        Some(Asked { index: self.next - 1, prompt, seed: 0 })
    }

    fn take(&mut self, replies: Vec<Reply>) -> Result<(), Error> {
        for reply in replies {
            let index = reply.index;
            self.replies[index] = Some(reply);
        }
        (self.progress)(self.replies.iter().flatten().count());
        Ok(())
    }
}

/// A model answers the questions: a student as it was taught, any other model by the template's worked examples.
///
/// # Errors
/// If a prompt does not fit the context, or the model fails.
pub fn ask_model(
    name: &str,
    engine: &Engine,
    student: Option<&Student>,
    template: &Template,
    questions: &[Question],
    manner: &Manner,
    progress: &mut dyn FnMut(usize),
) -> Result<Contender, Error> {
    let chat = engine.tokenizer()?.chat_template().is_some();
    let put = |q: &Question| match student {
        Some(s) => Prompt::Text(student::prompt(template, q, s.asked())),
        None if chat => Prompt::Dialogue(template.dialogue(q)),
        None => Prompt::Text(template.text(q)),
    };
    let prompts: Vec<Prompt> = questions.iter().map(put).collect();
    let mut teacher = Local::new(engine, name);
    for prompt in &prompts {
        teacher.most(prompt, manner)?;
    }
    let replies = vec![None; prompts.len()];
    let mut desk = Collector { prompts: &prompts, next: 0, replies, progress };
    let start = Instant::now();
    teacher.serve(&mut desk, manner)?;
    let seconds = start.elapsed().as_secs_f64();
    let mut tokens = 0;
    let mut answers = Vec::with_capacity(questions.len());
    for (question, reply) in questions.iter().zip(desk.replies) {
        let text = reply.map(|r| {
            tokens += r.used.completion;
            r.text
        });
        let text = text.unwrap_or_default();
        let parsed = match student {
            Some(s) => s.parse(template, question, &text),
            None => template.parse(question, &text),
        };
        answers.push(graded(template.task, question, text, parsed.ok().map(|p| p.answer)));
    }
    let parameters = engine.model().n_parameters().ok().map(|n| n as u64);
    Ok(Contender {
        name: name.into(),
        answers,
        parameters,
        tokens: Some(tokens),
        seconds: Some(seconds),
        usd: None,
    })
}

fn graded(kind: Kind, question: &Question, text: String, answer: Option<String>) -> Answered {
    let right = question.is_right(kind, answer.as_deref()) == Some(true);
    Answered { text, answer, right }
}

/// Answers that were recorded before; a question that they lack counts as answered wrongly.
///
/// # Errors
/// If they answer none of the questions.
pub fn recorded(
    name: &str,
    kind: Kind,
    questions: &[Question],
    records: &[Record],
) -> Result<Contender, Error> {
    let by_id: HashMap<&str, &Record> = records.iter().map(|r| (&*r.id, r)).collect();
    if !questions.iter().any(|q| by_id.contains_key(&*q.id)) {
        return Err(Error::setting(
            name,
            "its answers are to none of these questions; give the file that they were asked from",
        ));
    }
    let of = |q: &Question| by_id.get(&*q.id);
    let answers = questions
        .iter()
        .map(|q| {
            graded(
                kind,
                q,
                of(q).map_or(String::new(), |r| r.raw.clone()),
                of(q).and_then(|r| r.answer.clone()),
            )
        })
        .collect();
    let tokens: u64 = questions.iter().filter_map(of).map(|r| r.completion_tokens).sum();
    let usd: f64 = questions.iter().filter_map(of).map(|r| r.usd).sum();
    Ok(Contender {
        name: name.into(),
        answers,
        parameters: None,
        tokens: (tokens > 0).then_some(tokens),
        seconds: None,
        usd: (usd > 0.0).then_some(usd),
    })
}

/// One line of the comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Who.
    pub name: String,
    /// Right answers.
    pub right: usize,
    /// Answers that could not be read.
    pub unread: usize,
    /// The 95% interval of the accuracy.
    pub interval: (f64, f64),
    /// Against the first contender: the first less this one. `None` for the first.
    pub against_first: Option<Paired>,
}

/// All contenders on the same questions, the first one compared with each other.
pub struct Comparison<'a> {
    questions: &'a [Question],
    contenders: &'a [Contender],
    /// In the order of the contenders.
    pub rows: Vec<Row>,
}

/// Compares.
///
/// # Errors
/// If there is nobody, or the questions' true answers are not known.
pub fn compare<'a>(questions: &'a [Question], contenders: &'a [Contender]) -> Result<Comparison<'a>, Error> {
    let Some(first) = contenders.first() else {
        return Err(Error::setting("--model", "nobody is to be compared; name a model or a file of answers"));
    };
    if let Some(q) = questions.iter().find(|q| q.answer.is_none()) {
        return Err(Error::setting(
            "answer",
            format!("the true answer to {:?} is not known; it cannot be evaluated on", q.text),
        ));
    }
    let right = |c: &Contender| c.answers.iter().map(|a| a.right).collect::<Vec<_>>();
    let row = |(i, c): (usize, &Contender)| {
        let n_right = c.answers.iter().filter(|a| a.right).count();
        Row {
            name: c.name.clone(),
            right: n_right,
            unread: c.answers.iter().filter(|a| a.answer.is_none()).count(),
            interval: wilson(n_right, questions.len()),
            against_first: (i > 0).then(|| paired(&right(first), &right(c), 0)),
        }
    };
    let rows = contenders.iter().enumerate().map(row).collect();
    Ok(Comparison { questions, contenders, rows })
}

fn percent(x: f64) -> String {
    format!("{:.1}", 100.0 * x)
}

impl Comparison<'_> {
    /// Everything, for machines.
    pub fn to_json(&self) -> Value {
        let n = self.questions.len();
        let contender = |(r, c): (&Row, &Contender)| {
            json!({
                "name": r.name,
                "accuracy": r.right as f64 / n as f64,
                "right": r.right,
                "unread": r.unread,
                "interval_95": [r.interval.0, r.interval.1],
                "first_minus_this": r.against_first.map(|p| json!({
                    "difference": p.difference,
                    "interval_95": [p.interval.0, p.interval.1],
                    "p": p.p,
                    "only_first": p.only_first,
                    "only_this": p.only_second,
                })),
                "parameters": c.parameters,
                "tokens_per_answer": c.tokens.map(|t| t as f64 / n as f64),
                "seconds_per_answer": c.seconds.map(|s| s / n as f64),
                "usd_per_answer": c.usd.map(|u| u / n as f64),
            })
        };
        let answers = |(i, q): (usize, &Question)| {
            let given: Vec<Value> = self.contenders.iter().map(|c| json!(c.answers[i])).collect();
            json!({ "id": q.id, "truth": q.answer, "answers": given })
        };
        json!({
            "questions": n,
            "contenders": self.rows.iter().zip(self.contenders).map(contender).collect::<Vec<_>>(),
            "answers": self.questions.iter().enumerate().map(answers).collect::<Vec<_>>(),
        })
    }

    fn table(&self) -> Table {
        let n = self.questions.len();
        let columns =
            ["who", "right %", "95%", "unread", "first less this", "95%", "p", "tokens", "seconds", "USD"];
        let mut table = Table::new(&format!("Accuracy on {n} questions; costs are for one answer"), &columns);
        let or_dash = |x: Option<String>| x.unwrap_or("-".into());
        for (r, c) in self.rows.iter().zip(self.contenders) {
            let per = |x: f64| x / n as f64;
            table.push([
                r.name.clone(),
                percent(r.right as f64 / n as f64),
                format!("{} to {}", percent(r.interval.0), percent(r.interval.1)),
                r.unread.to_string(),
                or_dash(r.against_first.map(|p| format!("{:+.1}", 100.0 * p.difference))),
                or_dash(
                    r.against_first
                        .map(|p| format!("{:+.1} to {:+.1}", 100.0 * p.interval.0, 100.0 * p.interval.1)),
                ),
                or_dash(r.against_first.map(|p| format!("{:.3}", p.p))),
                or_dash(c.tokens.map(|t| format!("{:.1}", per(t as f64)))),
                or_dash(c.seconds.map(|s| format!("{:.2}", per(s)))),
                or_dash(c.usd.map(|u| format!("{:.5}", per(u)))),
            ]);
        }
        table
    }

    /// Accuracy against size, where at least two sizes are known.
    fn sizes(&self) -> Option<Plot> {
        let n = self.questions.len() as f64;
        let known: Vec<(f64, &Row)> = self
            .rows
            .iter()
            .zip(self.contenders)
            .filter_map(|(r, c)| Some((c.parameters? as f64, r)))
            .collect();
        if known.len() < 2 {
            return None;
        }
        let points = known.iter().map(|(x, r)| (*x, 100.0 * r.right as f64 / n)).collect();
        let marks = known
            .iter()
            .map(|(x, r)| Mark { x: *x, y: 100.0 * r.right as f64 / n, label: r.name.clone() })
            .collect();
        Some(Plot {
            title: "Accuracy against size".into(),
            x: Axis::log("parameters", Unit::Count),
            y: Axis::linear("right, %"),
            series: vec![Series { name: String::new(), colour: 0, form: Form::Points(points) }],
            marks,
        })
    }

    /// As a page: the table, the plot, and where the first and the second differ.
    pub fn report(&self) -> Report {
        let mut report = Report::new("Student and teacher");
        report.table(self.table());
        report.text(
            "Intervals of accuracies are Wilson's; differences are paired, question by question: their intervals are \
             made by drawing the questions anew, p is McNemar's exact test.",
        );
        if let Some(plot) = self.sizes() {
            report.plot(plot);
        }
        let [first, second, ..] = self.contenders else { return report };
        let mut table = Table::new("Where they differ", &["question", "truth", &first.name, &second.name])
            .left(&[1, 2, 3]);
        let differ = (0..self.questions.len()).filter(|&i| first.answers[i].right != second.answers[i].right);
        for i in differ.take(MAX_EXAMPLES) {
            let q = &self.questions[i];
            let said = |a: &Answered| {
                format!(
                    "{} {}",
                    if a.right { "✓" } else { "✗" },
                    a.text.trim().chars().take(300).collect::<String>()
                )
            };
            table.push([
                q.text.clone(),
                q.answer.clone().unwrap_or_default(),
                said(&first.answers[i]),
                said(&second.answers[i]),
            ]);
        }
        if !table.rows.is_empty() {
            report.table(table);
        }
        report
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contenders_are_compared_on_the_same_questions() {
        let question = |i: usize| Question {
            id: i.to_string(),
            text: format!("Q{i}"),
            answer: Some(i.to_string()),
            ..Question::default()
        };
        let questions: Vec<Question> = (0..10).map(question).collect();
        let record = |i: usize, answer: &str| Record {
            id: i.to_string(),
            raw: answer.into(),
            answer: Some(answer.into()),
            usd: 0.01,
            ..Record::default()
        };
        let good: Vec<Record> = (0..10).map(|i| record(i, &format!("({i} * 1)"))).collect();
        let poor: Vec<Record> = (0..6).map(|i| record(i, "3")).collect();
        let kind = Kind::Arithmetic;
        let contenders = [
            recorded("good", kind, &questions, &good).unwrap(),
            recorded("poor", kind, &questions, &poor).unwrap(),
        ];
        let comparison = compare(&questions, &contenders).unwrap();
        assert_eq!(
            (comparison.rows[0].right, comparison.rows[1].right, comparison.rows[1].unread),
            (10, 1, 4)
        );
        assert_eq!(comparison.rows[1].against_first.unwrap().only_first, 9);
        let json = comparison.to_json();
        assert_eq!(json["contenders"][1]["accuracy"], 0.1);
        assert_eq!(json["answers"][3]["answers"][1]["right"], true);
        let html = comparison.report().to_html();
        assert!(html.contains("Where they differ") && html.contains("(2 * 1)"), "{html}");
        assert!(recorded("x", kind, &questions, &[record(77, "1")]).is_err());
        assert!(compare(&[Question::default()], &contenders).is_err());
        assert!(compare(&questions, &[]).is_err());
    }
}
