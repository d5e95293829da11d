//! What the demo asks and teaches: sums of two steps, and a manner of speaking that no model has yet.

use serde_json::json;

const NAMES: [&str; 10] = ["Anna", "Ben", "Carl", "Dora", "Emil", "Frida", "Gustav", "Hanna", "Ivo", "Jana"];
const THINGS: [&str; 8] = ["apples", "books", "coins", "cards", "eggs", "pens", "stones", "shells"];

/// A linear congruential generator (Knuth, MMIX): the same questions everywhere.
struct Dice(u64);

impl Dice {
    /// From `low` to below `high`.
    fn roll(&mut self, low: u64, high: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        low + (self.0 >> 33) % (high - low)
    }

    fn of<'a>(&mut self, list: &[&'a str]) -> &'a str {
        list[self.roll(0, list.len() as u64) as usize]
    }
}

/// `n` different questions as JSON lines with their answers, in the four forms that the built-in model has learnt
/// (docs/builtin.md).
pub fn sums(n: usize) -> String {
    let mut dice = Dice(7);
    let mut seen = std::collections::HashSet::new();
    let mut lines = String::new();
    while seen.len() < n {
        let (name, thing) = (dice.of(&NAMES), dice.of(&THINGS));
        let (b, c, kind) = (dice.roll(2, 10), dice.roll(1, 10), dice.roll(0, 4));
        let a = if kind == 2 { dice.roll(2, 10) } else { dice.roll(12, 31) };
        let (question, answer) = match kind {
            0 => (
                format!("{name} has {a} {thing}, finds {b} more and loses {c}. How many {thing} are left?"),
                a + b - c,
            ),
            1 => (
                format!(
                    "{name} has {a} {thing}, gives away {b} and buys {c}. How many {thing} are there now?"
                ),
                a - b + c,
            ),
            2 => (
                format!(
                    "{name} has {a} boxes with {b} {thing} each and finds {c} more. How many {thing} is that?"
                ),
                a * b + c,
            ),
            _ => (
                format!(
                    "{name} has {a} {thing}, a friend brings {b} and another {c}. How many {thing} do they have?"
                ),
                a + b + c,
            ),
        };
        if answer < 100 && seen.insert(question.clone()) {
            lines += &format!("{}\n", json!({"question": question, "answer": answer.to_string()}));
        }
    }
    lines
}

/// How the questions are put: as they stand, without examples.
pub const TEMPLATE: &str = "task = \"arithmetic\"\ninstruction = \"\"\nexample = []\n";

/// `n` questions and answers in a manner to be learnt: short, in capitals, with a unit.
pub fn manner(n: usize) -> String {
    const ANIMALS: [(&str, u64); 6] =
        [("dogs", 4), ("birds", 2), ("ants", 6), ("spiders", 8), ("horses", 4), ("crabs", 10)];
    let mut dice = Dice(11);
    let mut lines = String::new();
    for _ in 0..n {
        let (animal, legs) = ANIMALS[dice.roll(0, ANIMALS.len() as u64) as usize];
        let many = dice.roll(2, 10);
        let question = format!("How many legs do {many} {animal} have?");
        let answer = format!("{} LEGS. NEXT QUESTION PLEASE.", many * legs);
        lines += &format!("{}\n", json!({"question": question, "answer": answer}));
    }
    lines
}

/// What texts of the model's own begin with.
pub const BEGINNINGS: [&str; 8] =
    ["The", "ROMEO:", "Q: Anna has", "My lord,", "Once upon a time", "KING:", "Q: Ben has", "In the"];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn questions_are_different_and_their_answers_are_right() {
        let text = sums(300);
        assert_eq!(text, sums(300), "the same everywhere");
        let mut questions = std::collections::HashSet::new();
        for line in text.lines() {
            let value: Value = serde_json::from_str(line).unwrap();
            let question = value["question"].as_str().unwrap();
            let numbers: Vec<i64> =
                question.split(|c: char| !c.is_ascii_digit()).filter_map(|w| w.parse().ok()).collect();
            let [a, b, c] = numbers[..] else { panic!("{question}") };
            let want = match question {
                q if q.contains("loses") => a + b - c,
                q if q.contains("gives away") => a - b + c,
                q if q.contains("boxes") => a * b + c,
                _ => a + b + c,
            };
            assert_eq!(value["answer"], want.to_string(), "{question}");
            assert!((0..100).contains(&want) && questions.insert(question.to_string()));
        }
        assert_eq!(questions.len(), 300);
        assert_eq!(manner(5).lines().count(), 5);
        assert!(sparsam_distill::template::Template::from_toml(TEMPLATE).is_ok());
    }
}
