//! Questions, and when two answers to one are the same.

use crate::{Error, expression};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::Path;

/// What kind of answer is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A number, or an expression that has its value.
    Arithmetic,
    /// One of the choices, by letter or text.
    Choice,
    /// Whether a premise entails a hypothesis: entailment, neutral or contradiction.
    Nli,
    /// One of the labels.
    Classification,
    /// Any text.
    Free,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 5] = [Kind::Arithmetic, Kind::Choice, Kind::Nli, Kind::Classification, Kind::Free];

    /// Its name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Arithmetic => "arithmetic",
            Kind::Choice => "choice",
            Kind::Nli => "nli",
            Kind::Classification => "classification",
            Kind::Free => "free",
        }
    }
}

/// The labels of natural language inference.
pub const NLI_LABELS: [&str; 3] = ["entailment", "neutral", "contradiction"];

/// A question, with what is known of its answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Question {
    /// The line's `id`, or a hash of the question: the same question has the same in every file.
    pub id: String,
    /// The question.
    pub text: String,
    /// What to choose from; empty where the answer is free.
    pub choices: Vec<String>,
    /// The true answer, if the file has one.
    pub answer: Option<String>,
    /// The true answer as an expression, if the file has one (`equation`).
    pub equation: Option<String>,
    /// What a teacher wrote, if the file has it (`teacher`).
    pub teacher: Option<String>,
}

/// Reads a JSONL file with a question a line: `question` (or `premise` and `hypothesis`), and, where there are any,
/// `choices`, `answer`, `equation`, `teacher`, `id`. Other fields are ignored.
///
/// GSM8K's answers end in `#### N`, which is the answer; MAWPS's equations stand in front notation over `numbers`, and
/// become what SVAMP's are.
///
/// # Errors
/// With file and line for what cannot be read so; if there is no question at all.
pub fn read(path: &Path, kind: Kind) -> Result<Vec<Question>, Error> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let mut seen: HashMap<String, u32> = HashMap::new();
    let mut questions = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let bad = |problem: String| Error::line(path, i + 1, problem);
        let value: Value = serde_json::from_str(line).map_err(|e| bad(format!("is not JSON: {e}")))?;
        let Value::Object(object) = value else { return Err(bad("is not a JSON object".into())) };
        let mut question = from_object(&object, kind).map_err(bad)?;
        let times = seen.entry(question.id.clone()).or_default();
        *times += 1;
        match (*times, object.contains_key("id")) {
            (1, _) => {}
            (_, true) => return Err(bad(format!("the id {:?} is there already", question.id))),
            // The same question twice is two questions.
            (n, false) => question.id += &format!("-{n}"),
        }
        questions.push(question);
    }
    if questions.is_empty() {
        return Err(Error::file(
            path,
            "it holds no questions; give a JSON object with `question` on each line",
        ));
    }
    Ok(questions)
}

fn from_object(object: &Map<String, Value>, kind: Kind) -> Result<Question, String> {
    let text = |key: &str| match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(s)) => Ok(Some(s.trim().to_string())),
        Some(Value::Number(n)) => Ok(Some(n.to_string())),
        Some(Value::Bool(b)) => Ok(Some(b.to_string())),
        Some(_) => Err(format!("`{key}` is neither text nor a number")),
    };
    let list = |key: &str| match object.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(items)) => items
            .iter()
            .map(|v| {
                v.as_str()
                    .map(|s| s.trim().to_string())
                    .ok_or_else(|| format!("`{key}` is not a list of texts"))
            })
            .collect(),
        Some(_) => Err(format!("`{key}` is not a list of texts")),
    };
    let question = match (text("question")?, text("premise")?, text("hypothesis")?) {
        (Some(q), _, _) => q,
        (None, Some(p), Some(h)) => format!("Premise: {p}\nHypothesis: {h}"),
        _ => {
            let near = sparsam_plan::nearest("question", object.keys().map(String::as_str));
            let near = near.map(|n| format!(" (did you mean `{n}`?)")).unwrap_or_default();
            return Err(format!("has no `question`{near}, nor `premise` and `hypothesis`"));
        }
    };
    if question.is_empty() {
        return Err("`question` is empty".into());
    }
    let mut choices = list("choices")?;
    if kind == Kind::Nli && choices.is_empty() {
        choices = NLI_LABELS.map(str::to_string).to_vec();
    }
    if kind == Kind::Choice && choices.len() < 2 {
        return Err("has fewer than two `choices`, but the task is multiple choice".into());
    }
    if choices.len() > 26 {
        return Err(format!("has {} choices, but there are 26 letters", choices.len()));
    }
    let numbers = list("numbers")?;
    let equation = match text("equation")? {
        Some(e) if !numbers.is_empty() => Some(from_front_notation(&e, &numbers)?),
        Some(e) => Some(whole_numbers(&e)),
        None => None,
    };
    let answer = text("answer")?.map(|a| match a.rsplit_once("####") {
        Some((_, number)) => number.trim().to_string(),
        None => a,
    });
    let id = match text("id")? {
        Some(id) if !id.is_empty() => id,
        _ => content_id(&question, &choices),
    };
    let question = Question { id, text: question, choices, answer, equation, teacher: text("teacher")? };
    if let Some(answer) = &question.answer
        && question.canonical(kind, answer).is_none()
    {
        return Err(format!("`answer` {answer:?} is no answer to a {} question", kind.name()));
    }
    Ok(question)
}

/// 64 bits of FNV-1a over the question and its choices, in hexadecimal.
fn content_id(question: &str, choices: &[String]) -> String {
    let mut hash = 0xCBF2_9CE4_8422_2325_u64;
    for part in std::iter::once(question).chain(choices.iter().map(String::as_str)) {
        for byte in part.bytes().chain([0]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3);
        }
    }
    format!("{hash:016x}")
}

/// `84.0` as `84`: a student need not learn to write zeros.
fn whole_numbers(equation: &str) -> String {
    let tidy =
        |word: &str| word.strip_suffix(".0").filter(|n| n.parse::<u64>().is_ok()).unwrap_or(word).to_string();
    equation.split_whitespace().map(tidy).collect::<Vec<_>>().join(" ")
}

/// `- number0 * number1 number2` over the numbers 9, 2, 3 as `( 9 - ( 2 * 3 ) )`.
fn from_front_notation(equation: &str, numbers: &[String]) -> Result<String, String> {
    let mut stack: Vec<String> = Vec::new();
    for word in equation.split_whitespace().rev() {
        if let "+" | "-" | "*" | "/" = word {
            let (Some(a), Some(b)) = (stack.pop(), stack.pop()) else {
                return Err(format!("`equation` {equation:?} lacks an operand of {word}"));
            };
            stack.push(format!("( {a} {word} {b} )"));
            continue;
        }
        let number =
            word.strip_prefix("number").and_then(|i| i.parse::<usize>().ok()).map(|i| numbers.get(i));
        match number {
            Some(Some(number)) => stack.push(whole_numbers(number)),
            Some(None) => {
                return Err(format!("`equation` names {word}, but there are {} numbers", numbers.len()));
            }
            None => stack.push(whole_numbers(word)),
        }
    }
    match (stack.pop(), stack.is_empty()) {
        (Some(whole), true) => Ok(whole),
        _ => Err(format!("`equation` {equation:?} is not one expression")),
    }
}

impl Question {
    /// The letter of a choice: a, b, c.
    pub fn letter(i: usize) -> char {
        char::from(b'a' + (i % 26) as u8)
    }

    /// An answer in the form in which equal ones are equal texts: a number with up to four digits behind the point, a
    /// choice's letter, a label, or text without case, articles and punctuation. `None` if it is no answer at all.
    pub fn canonical(&self, kind: Kind, answer: &str) -> Option<String> {
        match kind {
            Kind::Arithmetic => expression::first(answer).map(|(_, value)| canonical_number(value)),
            Kind::Choice => self.choice(answer).map(|i| Question::letter(i).to_string()),
            Kind::Nli | Kind::Classification if !self.choices.is_empty() => {
                self.choice(answer).map(|i| plain(&self.choices[i]))
            }
            Kind::Nli | Kind::Classification | Kind::Free => Some(plain(answer)).filter(|a| !a.is_empty()),
        }
    }

    /// Whether `answer` is the true one; `None` if that is not known.
    pub fn is_right(&self, kind: Kind, answer: Option<&str>) -> Option<bool> {
        let truth = self.answer.as_deref()?;
        let Some(answer) = answer else { return Some(false) };
        if kind == Kind::Arithmetic {
            let value = |a: &str| expression::first(a).map(|f| f.1);
            return Some(value(answer).zip(value(truth)).is_some_and(|(a, b)| expression::same(a, b)));
        }
        Some(self.canonical(kind, answer) == self.canonical(kind, truth))
    }

    /// The index of the choice that an answer means: by its text, else by its letter.
    fn choice(&self, answer: &str) -> Option<usize> {
        let (letter, rest) = leading_letter(answer);
        let index = letter.and_then(|l| (0..self.choices.len()).find(|&i| Question::letter(i) == l));
        let said = plain(rest);
        let named = |i: &usize| plain(&self.choices[*i]) == said;
        // Two choices may read alike: the letter says which.
        if let Some(i) = index.filter(|i| said.is_empty() || named(i)) {
            return Some(i);
        }
        let whole = plain(answer);
        let by_text = (0..self.choices.len()).find(|&i| plain(&self.choices[i]) == whole || named(&i));
        by_text.or(index).or_else(|| {
            // `a bank, since ...`: the longest choice that the answer holds as words.
            let held = |i: &usize| format!(" {whole} ").contains(&format!(" {} ", plain(&self.choices[*i])));
            (0..self.choices.len()).filter(held).max_by_key(|&i| self.choices[i].len())
        })
    }
}

/// `(b) bank`, `b) bank`, `B. bank`, `b`: the letter, and what is behind it.
fn leading_letter(answer: &str) -> (Option<char>, &str) {
    let text = answer.trim();
    let (open, text) = text.strip_prefix('(').map_or((false, text), |t| (true, t));
    let Some(letter) = text.chars().next().filter(char::is_ascii_alphabetic) else { return (None, answer) };
    let rest = &text[1..];
    let ends = match rest.chars().next() {
        None => true,
        Some(')') => true,
        Some('.' | ':') => !open,
        _ => false,
    };
    match ends {
        true => (Some(letter.to_ascii_lowercase()), rest.trim_start_matches([')', '.', ':'])),
        false => (None, answer),
    }
}

fn canonical_number(value: f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// Lower case, without articles and punctuation, single spaces (SQuAD's normalisation, Rajpurkar et al. 2016).
fn plain(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_alphanumeric() { c } else { ' ' }).collect();
    let text = text.to_lowercase();
    text.split_whitespace().filter(|w| !matches!(*w, "a" | "an" | "the")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(line: &str, kind: Kind) -> Result<Question, String> {
        let Value::Object(object) = serde_json::from_str(line).unwrap() else { panic!("{line}") };
        from_object(&object, kind)
    }

    #[test]
    fn the_published_files_are_read() {
        let svamp =
            r#"{"question": "Q?", "equation": "( ( 17.0 + 15.5 ) + 2.0 )", "answer": 34.5, "teacher": "T"}"#;
        let q = question(svamp, Kind::Arithmetic).unwrap();
        assert_eq!(q.equation.as_deref(), Some("( ( 17 + 15.5 ) + 2 )"));
        assert_eq!((q.answer.as_deref(), q.teacher.as_deref()), (Some("34.5"), Some("T")));
        let mawps = r#"{"question": "Q?", "equation": "- number0 * number1 number2", "numbers": ["9.0", "2.0", "3.0"], "answer": 3.0}"#;
        assert_eq!(question(mawps, Kind::Arithmetic).unwrap().equation.as_deref(), Some("( 9 - ( 2 * 3 ) )"));
        let gsm = r#"{"question": "Q?", "answer": "48/2 = <<48/2=24>>24\n#### 1,072"}"#;
        assert_eq!(question(gsm, Kind::Arithmetic).unwrap().answer.as_deref(), Some("1,072"));
        let nli = r#"{"premise": "It rains.", "hypothesis": "It is wet.", "answer": "entailment"}"#;
        assert_eq!(question(nli, Kind::Nli).unwrap().choices, NLI_LABELS);
    }

    #[test]
    fn wrong_lines_say_what_is_wrong() {
        let said = |line: &str, kind| question(line, kind).unwrap_err();
        assert!(said(r#"{"questions": "x"}"#, Kind::Free).contains("did you mean `questions`"));
        assert!(said(r#"{"question": "x"}"#, Kind::Choice).contains("fewer than two"));
        assert!(said(r#"{"question": "x", "answer": "none"}"#, Kind::Arithmetic).contains("no answer"));
        assert!(
            said(r#"{"question": "x", "equation": "+ number0", "numbers": ["1"]}"#, Kind::Arithmetic)
                .contains("operand")
        );
        assert!(
            said(r#"{"question": "x", "equation": "number7", "numbers": ["1"]}"#, Kind::Arithmetic)
                .contains("1 numbers")
        );
    }

    #[test]
    fn choices_are_known_by_letter_or_text() {
        let choices = ["bank", "The Library", "river bank", "bank"].map(str::to_string).to_vec();
        let q = Question { choices, answer: Some("library".into()), ..Question::default() };
        let at = |a: &str| q.canonical(Kind::Choice, a);
        for (answer, want) in [
            ("(b) library", "b"),
            ("B.", "b"),
            ("b", "b"),
            ("library", "b"),
            ("(d) bank", "d"),
            ("bank", "a"),
            // The text counts more than the letter.
            ("(a) river bank", "c"),
            ("probably the river bank, I think", "c"),
        ] {
            assert_eq!(at(answer).as_deref(), Some(want), "{answer}");
        }
        assert_eq!(at("(z) school"), None);
        assert_eq!(at("a school"), None);
        assert_eq!(q.is_right(Kind::Choice, Some("(b)")), Some(true));
        assert_eq!(q.is_right(Kind::Choice, None), Some(false));
    }

    #[test]
    fn numbers_are_compared_by_value() {
        let q = Question { answer: Some("42".into()), ..Question::default() };
        assert_eq!(q.is_right(Kind::Arithmetic, Some("(84 / 2).")), Some(true));
        assert_eq!(q.is_right(Kind::Arithmetic, Some("43")), Some(false));
        assert_eq!(q.canonical(Kind::Arithmetic, "1 / 3").as_deref(), Some("0.3333"));
        assert_eq!(q.canonical(Kind::Arithmetic, "0 - 0.00001").as_deref(), Some("0"));
        assert_eq!(Question::default().is_right(Kind::Free, Some("x")), None);
    }

    #[test]
    fn the_same_question_twice_has_two_ids() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.jsonl");
        std::fs::write(
            &path,
            "{\"question\": \"x\"}\n\n{\"question\": \"x\"}\n{\"question\": \"y\", \"id\": 3}\n",
        )
        .unwrap();
        let read = |kind| read(&path, kind);
        let ids: Vec<String> = read(Kind::Free).unwrap().into_iter().map(|q| q.id).collect();
        assert_eq!(ids[1], format!("{}-2", ids[0]));
        assert_eq!(ids[2], "3");
        let e = read(Kind::Choice).unwrap_err().to_string();
        assert!(e.contains("q.jsonl:1: has fewer than two"), "{e}");
    }
}
