//! What can be wrong with a question put to the planner.

/// Why a plan cannot be made. Each message says what is wrong, where, and what to give instead.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum Error {
    /// A number that cannot be read, or that makes no sense for what it stands for.
    #[error("{what}: `{input}` {why}; give {example}")]
    Number {
        /// What the number stands for: `parameters`, `money`.
        what: &'static str,
        /// The text as given.
        input: String,
        /// What is wrong with it.
        why: String,
        /// What would be right.
        example: &'static str,
    },
    /// A name that no table holds.
    #[error("unknown {what} `{name}`{}; known: {known}", did_you_mean(.nearest))]
    Unknown {
        /// What was looked up: `hardware`, `law`.
        what: &'static str,
        /// The name as given.
        name: String,
        /// The nearest known name, if one is near.
        nearest: Option<String>,
        /// All known names.
        known: String,
    },
    /// A hardware table that does not parse or holds impossible values.
    #[error("hardware table{place}: {why}")]
    Hardware {
        /// Which entry, as ` entry h100`, or empty.
        place: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// A list of runs that cannot be fitted.
    #[error("runs: {0}")]
    Runs(String),
    /// A receipt that cannot be read.
    #[error("receipt {place}: {why}")]
    Receipt {
        /// Which file.
        place: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// A question without an answer: a loss below the irreducible one, a model that fits nowhere.
    #[error("{0}")]
    Impossible(String),
}

fn did_you_mean(nearest: &Option<String>) -> String {
    nearest.as_ref().map(|n| format!(" (did you mean `{n}`?)")).unwrap_or_default()
}

/// The candidate nearest to `name` by edit distance, if at most a third of the letters differ.
///
/// ```
/// assert_eq!(sparsam_plan::nearest("h10o", ["h100", "a100"]), Some("h100".to_string()));
/// assert_eq!(sparsam_plan::nearest("abacus", ["h100", "a100"]), None);
/// ```
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let name = name.to_lowercase();
    let limit = (name.chars().count().max(3) / 3).max(1);
    candidates
        .into_iter()
        .map(|c| {
            let lower = c.to_lowercase();
            let prefix = name.len() >= 2 && lower.starts_with(&name);
            (if prefix { 0 } else { edit_distance(&name, &lower) }, c)
        })
        .filter(|(d, _)| *d <= limit)
        .min_by_key(|(d, _)| *d)
        .map(|(_, c)| c.to_string())
}

/// Levenshtein's distance: insertions, deletions and substitutions between `a` and `b`.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// An [`Error::Unknown`] for `name` among `known`, with the nearest of them.
pub(crate) fn unknown<'a>(what: &'static str, name: &str, known: impl IntoIterator<Item = &'a str>) -> Error {
    let known: Vec<&str> = known.into_iter().collect();
    Error::Unknown {
        what,
        name: name.to_string(),
        nearest: nearest(name, known.iter().copied()),
        known: known.join(", "),
    }
}
