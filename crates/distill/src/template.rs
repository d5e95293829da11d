//! Few-shot chain of thought (Wei et al. 2022): how a question is put, and how the answer is read.

use crate::question::{Kind, Question};
use crate::{Error, expression};
use serde::Deserialize;
use sparsam_engine::Message;
use std::fmt::Write;
use std::path::Path;

/// What stands before every answer.
const CUE: &str = "the answer is";

/// Worked examples and the words around them.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// What kind of answers it is for.
    pub task: Kind,
    /// What a teacher that takes instructions is told first.
    pub instruction: String,
    /// What to choose from, for questions that bring no choices of their own.
    #[serde(default)]
    pub labels: Vec<String>,
    /// Worked examples.
    #[serde(rename = "example")]
    pub examples: Vec<Example>,
}

/// A question with rationale and answer.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Example {
    /// The question.
    pub question: String,
    /// What to choose from.
    #[serde(default)]
    pub choices: Vec<String>,
    /// The reasons.
    pub rationale: String,
    /// The answer.
    pub answer: String,
}

/// A teacher's text, taken apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    /// The reasons, without the answer.
    pub rationale: String,
    /// The answer: an expression, a choice's text, a label, or text.
    pub answer: String,
}

impl Template {
    /// The template that comes with sparsam for a kind of task.
    pub fn builtin(kind: Kind) -> Template {
        let text = match kind {
            Kind::Arithmetic => include_str!("../templates/arithmetic.toml"),
            Kind::Choice => include_str!("../templates/choice.toml"),
            Kind::Nli => include_str!("../templates/nli.toml"),
            Kind::Classification => include_str!("../templates/classification.toml"),
            Kind::Free => include_str!("../templates/free.toml"),
        };
        Template::from_toml(text).expect("a test reads the templates that come with sparsam")
    }

    /// A template from TOML.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_toml(text: &str) -> Result<Template, String> {
        let template: Template = toml::from_str(text).map_err(|e| e.to_string())?;
        for (i, e) in template.examples.iter().enumerate() {
            let question = template.question(e);
            let said =
                format!("{} So the answer is {}.", e.rationale, template.written(&question, &e.answer));
            if let Err(problem) = template.parse(&question, &said) {
                return Err(format!("example {}: {problem}", i + 1));
            }
        }
        Ok(template)
    }

    /// One's own template from a file.
    ///
    /// # Errors
    /// If it cannot be read or its examples do not answer their questions.
    pub fn open(path: &Path) -> Result<Template, Error> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        Template::from_toml(&text).map_err(|problem| Error::file(path, problem))
    }

    fn question(&self, e: &Example) -> Question {
        self.complete(Question {
            text: e.question.clone(),
            choices: e.choices.clone(),
            ..Question::default()
        })
    }

    /// The question with the template's labels, if it has no choices of its own.
    pub fn complete(&self, mut question: Question) -> Question {
        if question.choices.is_empty() {
            question.choices = match self.task {
                Kind::Nli if self.labels.is_empty() => {
                    crate::question::NLI_LABELS.map(str::to_string).to_vec()
                }
                _ => self.labels.clone(),
            };
        }
        question
    }

    /// The question as it is put: with its choices, if these are its own.
    pub fn put(&self, question: &Question) -> String {
        let mut out = question.text.clone();
        if self.task == Kind::Choice {
            out += "\nAnswer Choices:";
            for (i, choice) in question.choices.iter().enumerate() {
                let _ = write!(out, "\n({}) {choice}", Question::letter(i));
            }
        }
        out
    }

    /// An answer as examples write it: choices with their letter.
    fn written(&self, question: &Question, answer: &str) -> String {
        match question.canonical(self.task, answer) {
            Some(letter) if self.task == Kind::Choice => {
                let index = letter.bytes().next().map_or(0, |b| usize::from(b - b'a'));
                format!("({letter}) {}", question.choices[index])
            }
            _ => answer.to_string(),
        }
    }

    /// What a worked example says: reasons, then `So the answer is ...`.
    fn says(&self, e: &Example) -> String {
        format!("{} So the answer is {}.", e.rationale, self.written(&self.question(e), &e.answer))
    }

    /// The prompt for a teacher that continues text: examples, then the question.
    pub fn text(&self, question: &Question) -> String {
        let mut out = String::new();
        for e in &self.examples {
            let _ = write!(out, "Q: {}\nA: {}\n\n", self.put(&self.question(e)), self.says(e));
        }
        out + &format!("Q: {}\nA:", self.put(question))
    }

    /// The prompt for a teacher that takes part in a dialogue: what is wanted, the examples as turns, the question.
    pub fn dialogue(&self, question: &Question) -> Vec<Message> {
        let mut messages = vec![Message::new("system", self.instruction.trim())];
        for e in &self.examples {
            messages.push(Message::new("user", self.put(&self.question(e))));
            messages.push(Message::new("assistant", self.says(e)));
        }
        messages.push(Message::new("user", self.put(question)));
        messages
    }

    /// Takes a teacher's text apart. What it made up behind its answer (`Q: ...`, or anything after the paragraph with
    /// the answer) is dropped.
    ///
    /// # Errors
    /// What is missing: the words `the answer is`, or behind them something that answers the question.
    pub fn parse(&self, question: &Question, text: &str) -> Result<Parsed, String> {
        let own =
            ["\nQ:", "\nQuestion:"].iter().filter_map(|q| text.find(q)).min().map_or(text, |at| &text[..at]);
        let lower = own.to_ascii_lowercase();
        let first = lower.find(CUE).ok_or("the words `the answer is` are missing")?;
        // The first paragraph that gives an answer; within it the last word counts (`no, wait: the answer is ...`).
        let end = own[first..].find("\n\n").map_or(own.len(), |at| first + at);
        let cue = lower[..end].rfind(CUE).unwrap_or(first);
        let behind = own[cue + CUE.len()..end].trim_start_matches([':', ' ']);
        let answer = behind.lines().next().unwrap_or_default();
        let answer = self.answer(question, answer)?;
        let before = own[..first].trim_end();
        let so = before.to_ascii_lowercase();
        let rationale = ["so", "so,", "therefore", "therefore,", "thus", "thus,", "hence", "hence,"]
            .iter()
            .filter(|w| so.ends_with(*w))
            .filter_map(|w| {
                let head = &before[..before.len() - w.len()];
                (!head.ends_with(char::is_alphanumeric)).then_some(head)
            })
            .min_by_key(|head| head.len())
            .unwrap_or(before);
        Ok(Parsed { rationale: rationale.trim().to_string(), answer })
    }

    /// Reads an answer that stands alone.
    ///
    /// # Errors
    /// If it is none.
    pub fn label(&self, question: &Question, said: &str) -> Result<Parsed, String> {
        Ok(Parsed { rationale: String::new(), answer: self.answer(question, said)? })
    }

    fn answer(&self, question: &Question, said: &str) -> Result<String, String> {
        let clean = || said.trim().trim_end_matches('.').trim().to_string();
        match self.task {
            Kind::Arithmetic => {
                let (text, _) = expression::first(said)
                    .ok_or_else(|| format!("no number or expression behind `{CUE}`: {:?}", clean()))?;
                Ok(text.trim().to_string())
            }
            Kind::Choice | Kind::Nli | Kind::Classification if !question.choices.is_empty() => {
                let sentence = clean();
                let canonical = question
                    .canonical(self.task, &sentence)
                    .or_else(|| question.canonical(self.task, sentence.split('.').next().unwrap_or_default()))
                    .ok_or_else(|| format!("none of the choices behind `{CUE}`: {sentence:?}"))?;
                let found = (0..question.choices.len()).find(|&i| match self.task {
                    Kind::Choice => canonical == Question::letter(i).to_string(),
                    _ => Some(&canonical) == question.canonical(self.task, &question.choices[i]).as_ref(),
                });
                Ok(found.map_or(sentence, |i| question.choices[i].clone()))
            }
            _ => Some(clean()).filter(|a| !a.is_empty()).ok_or_else(|| format!("nothing behind `{CUE}`")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builtin_templates_answer_their_own_questions() {
        for kind in Kind::ALL {
            let t = Template::builtin(kind);
            assert_eq!(t.task, kind);
            assert!(t.examples.len() >= 4, "{kind:?}");
            for e in &t.examples {
                let parsed = t.parse(&t.question(e), &t.says(e)).unwrap();
                let q = t.question(e);
                assert_eq!(q.canonical(kind, &parsed.answer), q.canonical(kind, &e.answer), "{e:?}");
                assert_eq!(parsed.rationale, e.rationale);
            }
        }
    }

    #[track_caller]
    fn check(kind: Kind, choices: &[&str], text: &str, want: Result<(&str, &str), &str>) {
        let choices = choices.iter().map(|c| c.to_string()).collect();
        let question = Question { choices, ..Question::default() };
        match (Template::builtin(kind).parse(&question, text), want) {
            (Ok(p), Ok((rationale, answer))) => assert_eq!((&*p.rationale, &*p.answer), (rationale, answer)),
            (Err(e), Err(part)) => assert!(e.contains(part), "{e}"),
            (got, want) => panic!("{got:?} for {want:?}"),
        }
    }

    #[test]
    fn rationale_and_answer_come_apart() {
        let a = Kind::Arithmetic;
        check(
            a,
            &[],
            "84 / 2 = 42. The answer is (84 / 2).\n\nQ: More?\nA: The answer is 7.",
            Ok(("84 / 2 = 42.", "(84 / 2)")),
        );
        check(
            a,
            &[],
            "It is 5. So the answer is 5. No: it is 6. Therefore, the answer is $6.",
            Ok(("It is 5.", "$6")),
        );
        check(a, &[], "Also so. Thus the answer is: 12 apples", Ok(("Also so.", "12")));
        check(a, &[], "I do not know.", Err("are missing"));
        check(a, &[], "The answer is unknown.", Err("no number"));
        check(a, &[], "It has 3\n\nQ: x\nA: The answer is 4", Err("are missing"));
        let c = ["bus depot", "train station"];
        check(
            Kind::Choice,
            &c,
            "It moves. So the answer is (b) train station.\n\nQ: z",
            Ok(("It moves.", "train station")),
        );
        check(Kind::Choice, &c, "The answer is B", Ok(("", "train station")));
        check(Kind::Choice, &c, "So the answer is (c) boat.", Err("none of the choices"));
        check(
            Kind::Nli,
            &["entailment", "neutral"],
            "It may. The answer is neutral. Next.",
            Ok(("It may.", "neutral")),
        );
        check(Kind::Free, &[], "It is a capital. So the answer is Paris.", Ok(("It is a capital.", "Paris")));
        check(Kind::Free, &[], "The answer is", Err("nothing behind"));
    }

    #[test]
    fn prompts_show_the_examples_and_end_with_the_question() {
        let t = Template::builtin(Kind::Choice);
        let q = Question {
            text: "Where?".into(),
            choices: vec!["here".into(), "there".into()],
            ..Question::default()
        };
        let text = t.text(&q);
        assert!(text.ends_with("\n\nQ: Where?\nAnswer Choices:\n(a) here\n(b) there\nA:"), "{text}");
        assert_eq!(text.matches("So the answer is (").count(), t.examples.len());
        let d = t.dialogue(&q);
        assert_eq!(d.len(), 2 * t.examples.len() + 2);
    }

    #[test]
    fn a_template_of_ones_own_is_checked() {
        let e = Template::from_toml("task = \"arithmetic\"\ninstruction = \"x\"\n[[example]]\nquestion = \"q\"\nrationale = \"r\"\nanswer = \"none\"").unwrap_err();
        assert!(e.contains("example 1: no number"), "{e}");
        assert!(Template::from_toml("task = \"sums\"").is_err());
    }
}
