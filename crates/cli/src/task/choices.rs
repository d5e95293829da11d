//! Answers chosen by likelihood.

use super::{TaskArgs, lines, share, text_of};
use crate::load::Load;
use crate::text;
use anyhow::{Context, bail};
use serde_json::{Value, json};
use sparsam_engine::{Choices, Likelihood, Per, choose_among, likeliest};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

/// The ways to compare, with the names that lm-evaluation-harness has for the first two.
const UNITS: [(&str, Per, &str); 3] = [
    ("acc", Per::Answer, "by the likelihood of the whole answer"),
    ("acc_norm", Per::Character, "of each character"),
    ("acc_token", Per::Token, "of each token"),
];

/// A line of the file.
struct Line {
    question: String,
    choices: Vec<String>,
    right: usize,
}

pub fn run(
    args: &TaskArgs,
    file: &Path,
    key: &str,
    model: &str,
    load: &Load,
    json: bool,
) -> anyhow::Result<()> {
    let [question, answer] = &args.fields[..] else { bail!("--fields wants two names: QUESTION,ANSWER") };
    let mut questions = lines(file, |line| read(line, question, answer, key))?;
    questions.truncate(args.questions.unwrap_or(usize::MAX));
    let template = match &args.template {
        Some(template) => template.replace("\\n", "\n"),
        None if args.letters => "Question: {question}\n{choices}\nAnswer:".to_string(),
        None => "Question: {question}\nAnswer:".to_string(),
    };
    if args.letters && !template.contains("{choices}") {
        bail!("--letters wants a --template with {{choices}}, or nobody could know what a letter means");
    }
    let asked: Vec<Choices> = questions.iter().map(|q| q.ask(&template, args.letters)).collect();
    let engine = load.engine(model, None)?;
    eprintln!("{}", engine.describe());
    let bar = text::bar(asked.len() as u64, "questions");
    let start = Instant::now();
    let mut right = [0; UNITS.len()];
    let all = choose_among(&engine, &asked, &mut |i, answers| {
        for (right, (_, unit, _)) in right.iter_mut().zip(UNITS) {
            *right += usize::from(likeliest(answers, unit) == questions[i].right);
        }
        bar.set_position(i as u64 + 1);
        bar.set_message(format!("{:.1}% right", 100.0 * right[0] as f64 / (i + 1) as f64));
        ControlFlow::Continue(())
    })?;
    bar.finish_and_clear();
    let n = all.len();
    let chance = questions.iter().map(|q| 1.0 / q.choices.len() as f64).sum::<f64>() / n as f64;
    if json {
        let answers = if args.show { questions.iter().zip(&all).map(told).collect() } else { Vec::new() };
        let mut value = json!({
            "questions": n,
            "chance": chance,
            "template": template,
            "letters": args.letters,
            "seconds": start.elapsed().as_secs_f64(),
            "runs_on": engine.describe(),
            "answers": answers,
        });
        for (right, (name, ..)) in right.iter().zip(UNITS) {
            let (accuracy, error) = share(*right, n);
            value[name] = accuracy.into();
            value[format!("{name}_stderr")] = error.into();
        }
        return text::say_json(&value);
    }
    if args.show {
        for (q, answers) in questions.iter().zip(&all) {
            let picked = likeliest(answers, Per::Answer);
            let mark = if picked == q.right { "right" } else { "wrong" };
            let logs: Vec<String> = answers.iter().map(|a| format!("{:.2}", a.log)).collect();
            let (wanted, picked) = (&q.choices[q.right], &q.choices[picked]);
            text::say(format_args!("{mark}  wanted {wanted:?}, took {picked:?} of {}", logs.join(" ")))?;
        }
    }
    for (right, (name, _, what)) in right.iter().zip(UNITS) {
        let (accuracy, error) = share(*right, n);
        let (accuracy, error) = (100.0 * accuracy, 100.0 * error);
        text::say(format_args!("{name:<14} {accuracy:.1}% ± {error:.1} ({right} of {n}), {what}"))?;
    }
    text::say(format_args!("chance         {:.1}%", 100.0 * chance))?;
    text::say(format_args!("template       {template:?}"))?;
    text::say(format_args!("time           {}", text::duration(start.elapsed())))
}

fn told((q, answers): (&Line, &Vec<Likelihood>)) -> Value {
    let mut value = json!({
        "wanted": q.right,
        "log_likelihoods": answers.iter().map(|a| a.log).collect::<Vec<_>>(),
        "tokens": answers.iter().map(|a| a.tokens).collect::<Vec<_>>(),
    });
    for (name, unit, _) in UNITS {
        value[format!("took_{name}")] = likeliest(answers, unit).into();
    }
    value
}

fn letter(i: usize) -> char {
    char::from(b'A' + i as u8)
}

impl Line {
    fn ask(&self, template: &str, letters: bool) -> Choices {
        let list: Vec<String> =
            self.choices.iter().enumerate().map(|(i, c)| format!("{}. {c}", letter(i))).collect();
        // The braces of a question or a choice are text.
        let around = template.split("{question}").map(|part| part.replace("{choices}", &list.join("\n")));
        let context = around.collect::<Vec<_>>().join(&self.question);
        let texts = match letters {
            true => (0..list.len()).map(|i| letter(i).to_string()).collect(),
            false => self.choices.clone(),
        };
        Choices { context, texts }
    }
}

/// Letters that name choices.
const LETTERS: usize = 26;

fn read(line: &Value, question: &str, answer: &str, key: &str) -> anyhow::Result<Line> {
    let list =
        line[key].as_array().with_context(|| format!("there is no list {key:?}; --choices names it"))?;
    let texts: Option<Vec<String>> = list.iter().map(|c| c.as_str().map(str::to_string)).collect();
    let choices = texts.with_context(|| format!("{key:?} holds something else than texts"))?;
    if !(2..=LETTERS).contains(&choices.len()) {
        bail!("{key:?} holds {} choices; from 2 to {LETTERS} are possible", choices.len());
    }
    let wanted = text_of(line, answer)?;
    let right = which(&wanted, &choices)
        .with_context(|| format!("the answer {wanted:?} is no choice's text, letter or number from 0"))?;
    Ok(Line { question: text_of(line, question)?, choices, right })
}

/// The choice that `answer` names.
fn which(answer: &str, choices: &[String]) -> Option<usize> {
    let text = choices.iter().position(|c| c == answer);
    let letter = || (0..choices.len()).find(|&i| answer.eq_ignore_ascii_case(&letter(i).to_string()));
    let number = || answer.parse().ok().filter(|&i: &usize| i < choices.len());
    text.or_else(letter).or_else(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_text_a_letter_or_a_number() {
        let choices = ["one", "B", "3", "four"].map(String::from);
        for (answer, want) in [
            ("one", Some(0)),
            ("B", Some(1)),
            ("c", Some(2)),
            ("3", Some(2)),
            ("0", Some(0)),
            ("E", None),
            ("4", None),
        ] {
            assert_eq!(which(answer, &choices), want, "{answer}");
        }
    }

    #[test]
    fn a_template_has_its_places_filled() {
        let line =
            Line { question: "Why {choices}?".into(), choices: vec!["a".into(), "b".into()], right: 0 };
        let asked = line.ask("{question}\n{choices}\nAnswer:", true);
        assert_eq!(asked.context, "Why {choices}?\nA. a\nB. b\nAnswer:");
        assert_eq!(asked.texts, ["A", "B"]);
        assert_eq!(line.ask("{question}", false).texts, ["a", "b"]);
    }
}
