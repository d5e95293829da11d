//! What a run leaves behind: a `receipt.json`, and the bill of a whole family of runs.
//!
//! Every command that makes a model writes a [`Record`]: what was forecast, what it took, and from what it was made
//! (its parents: a base model, a teacher's answers, a student). A run that is a folder holds it as [`FILE`]; a run whose
//! result is a single file has it beside, as `NAME.receipt.json` ([`beside`]). [`Family::collect`] follows the parents
//! up to where nothing is recorded any more and adds everything up once.

use crate::Error;
use crate::forecast::{Comparison, Fact, Forecast, Machine};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// The name of a record in a run's folder.
pub const FILE: &str = "receipt.json";
/// The version of the format that is written and read.
const VERSION: u32 = 1;

/// The name of the record of a single file: `model.gguf` has `model.gguf.receipt.json`.
pub fn beside(file: &str) -> String {
    format!("{file}.{FILE}")
}

/// Something that a run was made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// What it was to the run: `base`, `teacher`, `reference`.
    pub role: String,
    /// Where it is: a run's folder or a model, as seen from the record's folder; or a model's name.
    pub path: String,
}

/// What one run was forecast to take, what it took, and what it came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Of the format.
    pub version: u32,
    /// `train`, `finetune`, `quantize`, `distill`.
    pub command: String,
    /// The name of the machine.
    pub machine: String,
    /// Its watts, from which joules are estimated.
    pub watts: f64,
    /// Dollars of its hour.
    pub usd_per_hour: f64,
    /// What was forecast, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast: Option<Forecast>,
    /// What it took.
    pub fact: Fact,
    /// What it came from.
    #[serde(default)]
    pub parents: Vec<Parent>,
}

impl Record {
    /// The record of a run of `command` on `machine`. Energy and money that `fact` leaves out follow from its seconds.
    pub fn new(command: &str, machine: &Machine, forecast: Option<Forecast>, fact: Fact) -> Record {
        let fact = Fact {
            joules: fact.joules.or(fact.seconds.map(|s| s * machine.watts)),
            usd: fact.usd.or(fact.seconds.map(|s| s * machine.usd_per_hour / 3600.0)),
            ..fact
        };
        Record {
            version: VERSION,
            command: command.to_string(),
            machine: machine.name.clone(),
            watts: machine.watts,
            usd_per_hour: machine.usd_per_hour,
            forecast,
            fact,
            parents: Vec::new(),
        }
    }

    /// The record with another parent.
    pub fn parent(mut self, role: &str, path: &str) -> Record {
        self.parents.push(Parent { role: role.to_string(), path: path.to_string() });
        self
    }

    /// Adds what an earlier part of the same run has taken: time, energy, money; the larger memory; its parents.
    pub fn add_earlier(&mut self, earlier: &Record) {
        let sum = |x: Option<f64>, y: Option<f64>| x.map(|x| x + y.unwrap_or(0.0)).or(y);
        let (now, then) = (&mut self.fact, &earlier.fact);
        now.seconds = sum(now.seconds, then.seconds);
        now.joules = sum(now.joules, then.joules);
        now.usd = sum(now.usd, then.usd);
        now.memory_bytes = now.memory_bytes.into_iter().chain(then.memory_bytes).reduce(f64::max);
        // The forecast was for the part that just ended; the whole had none.
        self.forecast = None;
        let new = earlier.parents.iter().filter(|p| !self.parents.contains(p)).cloned().collect::<Vec<_>>();
        self.parents.extend(new);
    }

    /// Forecast against fact; empty if nothing was forecast.
    pub fn comparison(&self) -> Vec<Comparison> {
        self.forecast.as_ref().map(|f| f.against(&self.fact)).unwrap_or_default()
    }

    /// As JSON, ending in a newline.
    pub fn to_json(&self) -> String {
        let text = serde_json::to_string_pretty(self).expect("numbers and strings always serialise");
        text + "\n"
    }

    /// From JSON; `place` names the file in errors.
    ///
    /// # Errors
    /// Text that is no record, of another version, or with numbers that cannot be.
    pub fn from_json(text: &str, place: &str) -> Result<Record, Error> {
        let wrong = |why: String| Error::Receipt { place: place.to_string(), why };
        let record: Record = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
        if record.version != VERSION {
            return Err(wrong(format!(
                "is of version {}, this program reads {VERSION}; use the version of sparsam that wrote it",
                record.version
            )));
        }
        let fact = &record.fact;
        for (what, x) in [("seconds", fact.seconds), ("joules", fact.joules), ("usd", fact.usd)] {
            if x.is_some_and(|x| !(x.is_finite() && x >= 0.0)) {
                return Err(wrong(format!("{what} is {}; it must not be negative", x.unwrap_or(f64::NAN))));
            }
        }
        Ok(record)
    }
}

/// A run as a line of a family's bill.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// Where it is.
    pub path: String,
    /// What it is to the run that led here; empty for the first.
    pub role: String,
    /// The command that made it.
    pub command: String,
    /// What it took.
    pub fact: Fact,
}

/// The bill of a whole family, from teacher to served file.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Family {
    /// Its runs, parents before children, each once.
    pub lines: Vec<Line>,
    /// Parents of which nothing is recorded: their cost is not in the sums.
    pub unrecorded: Vec<Parent>,
}

impl Family {
    /// The family of the run at `root`. `load` is given the place of the child (`None` for the root) and a path as the
    /// child names it, and returns the place by which that is known everywhere, and its record if there is one.
    ///
    /// # Errors
    /// Those of `load`.
    pub fn collect<E>(
        root: &str,
        mut load: impl FnMut(Option<&str>, &str) -> Result<(String, Option<Record>), E>,
    ) -> Result<Family, E> {
        let mut family = Family::default();
        let mut seen = HashSet::new();
        let (place, record) = load(None, root)?;
        seen.insert(place.clone());
        let first = Parent { role: String::new(), path: root.to_string() };
        // A stack of runs whose parents are not all written yet: a run is written after them.
        let mut open = Vec::new();
        match record {
            Some(record) => open.push((place, first, record, 0)),
            None => family.unrecorded.push(first),
        }
        while let Some((place, from, record, next)) = open.last_mut() {
            if let Some(parent) = record.parents.get(*next).cloned() {
                *next += 1;
                let (parent_place, parent_record) = load(Some(place), &parent.path)?;
                if !seen.insert(parent_place.clone()) {
                    continue;
                }
                match parent_record {
                    Some(record) => open.push((parent_place, parent, record, 0)),
                    None => family.unrecorded.push(parent),
                }
            } else {
                family.lines.push(Line {
                    path: place.clone(),
                    role: from.role.clone(),
                    command: record.command.clone(),
                    fact: record.fact,
                });
                open.pop();
            }
        }
        Ok(family)
    }

    /// Seconds, joules, dollars and tokens of all lines together; memory and disk the most of any.
    pub fn total(&self) -> Fact {
        let sum =
            |f: fn(&Fact) -> Option<f64>| self.lines.iter().filter_map(|l| f(&l.fact)).reduce(|x, y| x + y);
        let most =
            |f: fn(&Fact) -> Option<f64>| self.lines.iter().filter_map(|l| f(&l.fact)).reduce(f64::max);
        Fact {
            memory_bytes: most(|f| f.memory_bytes),
            disk_bytes: most(|f| f.disk_bytes),
            seconds: sum(|f| f.seconds),
            joules: sum(|f| f.joules),
            usd: sum(|f| f.usd),
            tokens: sum(|f| f.tokens),
        }
    }

    /// Cents for a thousand answers: the making shared among `answers`, and `usd_per_answer` for each.
    pub fn cents_per_thousand(&self, answers: f64, usd_per_answer: f64) -> f64 {
        (self.total().usd.unwrap_or(0.0) / answers + usd_per_answer) * 1e5
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine { watts: 50.0, usd_per_hour: 0.36, ..Machine::owned("desk", 4.0, 1e11, 1e10, 8e9, 1e9) }
    }

    fn record(command: &str, seconds: f64) -> Record {
        Record::new(command, &machine(), None, Fact { seconds: Some(seconds), ..Fact::default() })
    }

    #[test]
    fn energy_and_money_follow_from_seconds_unless_measured() {
        let made = record("train", 100.0);
        assert_eq!((made.fact.joules, made.fact.usd), (Some(5000.0), Some(100.0 * 0.36 / 3600.0)));
        let measured = Fact { seconds: Some(100.0), joules: Some(7.0), ..Fact::default() };
        assert_eq!(Record::new("train", &machine(), None, measured).fact.joules, Some(7.0));
    }

    #[test]
    fn a_run_in_two_parts_is_one_expense() {
        let earlier = record("train", 100.0).parent("base", "m.gguf");
        let mut later = record("train", 50.0).parent("base", "m.gguf");
        later.add_earlier(&earlier);
        assert_eq!((later.fact.seconds, later.fact.joules), (Some(150.0), Some(7500.0)));
        assert_eq!(later.parents, earlier.parents);
    }

    #[test]
    fn a_record_survives_its_file_and_a_wrong_one_is_refused() {
        let made = record("distill", 3.5).parent("teacher", "../teacher");
        assert_eq!(Record::from_json(&made.to_json(), "r").unwrap(), made);
        let check = |text: String, part: &str| {
            let message = Record::from_json(&text, "run/receipt.json").unwrap_err().to_string();
            assert!(message.starts_with("receipt run/receipt.json: ") && message.contains(part), "{message}");
        };
        check("{}".into(), "missing field `version`");
        check(made.to_json().replace("\"version\": 1", "\"version\": 2"), "is of version 2");
        check(made.to_json().replace("3.5", "-3.5"), "seconds is -3.5");
        check(made.to_json().replace("\"role\"", "\"rolle\""), "unknown field `rolle`");
    }

    /// teacher <- student <- rounded, and base <- student, base <- teacher; base is only a file.
    fn load(_: Option<&str>, path: &str) -> Result<(String, Option<Record>), Error> {
        let record = match path {
            "rounded" => Some(record("quantize", 10.0).parent("base", "student")),
            "student" => {
                Some(record("distill", 100.0).parent("teacher", "teacher").parent("base", "base.gguf"))
            }
            "teacher" => {
                Some(record("train", 1000.0).parent("base", "base.gguf").parent("reference", "rounded"))
            }
            _ => None,
        };
        Ok((path.to_string(), record))
    }

    #[test]
    fn a_family_adds_up_once_parents_first_and_circles_end() {
        let family = Family::collect("rounded", load).unwrap();
        let order: Vec<&str> = family.lines.iter().map(|l| l.path.as_str()).collect();
        assert_eq!(order, ["teacher", "student", "rounded"]);
        assert_eq!(family.unrecorded.len(), 1, "{:?}", family.unrecorded);
        assert_eq!(family.total().seconds, Some(1110.0));
        assert_eq!(family.total().joules, Some(55500.0));
        assert!((family.total().usd.unwrap() - 0.111).abs() < 1e-12);
        assert_eq!(family.total().tokens, None);
        // 11.1 cents over 1000 answers are 11.1 cents a thousand; 0.001 dollars an answer are 100 more.
        assert!((family.cents_per_thousand(1000.0, 0.001) - 111.1).abs() < 1e-9);
    }

    #[test]
    fn names_of_records() {
        assert_eq!(beside("model.gguf"), "model.gguf.receipt.json");
    }
}
