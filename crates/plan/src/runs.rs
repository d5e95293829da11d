//! Training runs as points of a scaling law: reading a table of them, choosing among them.

use crate::law::TRAIN_FLOP;
use crate::{Error, nearest};
use serde::Serialize;

/// One finished run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Run {
    /// Parameters.
    pub parameters: f64,
    /// Tokens seen.
    pub tokens: f64,
    /// Loss at the end, in nats a token.
    pub loss: f64,
}

impl Run {
    /// Training arithmetic, `6 N D`.
    pub fn flop(&self) -> f64 {
        TRAIN_FLOP * self.parameters * self.tokens
    }

    /// The run, if its numbers can be one: all positive and finite.
    pub fn checked(self, place: &str) -> Result<Run, Error> {
        for (what, x) in [("parameters", self.parameters), ("tokens", self.tokens), ("loss", self.loss)] {
            if !(x.is_finite() && x > 0.0) {
                return Err(Error::Runs(format!("{place}: {what} is {x}; it must be a positive number")));
            }
        }
        Ok(self)
    }
}

const COLUMNS: [&str; 4] = ["parameters", "tokens", "training_flop", "loss"];

/// The runs of a CSV table with a header naming `parameters`, `loss`, and `tokens` or `training_flop` (then tokens
/// are FLOP / 6N). Other columns are ignored; fields may be quoted.
///
/// ```
/// let runs = sparsam_plan::runs::from_csv("name,parameters,tokens,loss\na,1e6,2e7,3.9\n").unwrap();
/// assert_eq!(runs[0].tokens, 2e7);
/// ```
///
/// # Errors
/// Missing columns (with the nearest column found), lines with too few fields, and anything that is no positive
/// number, each with its line.
pub fn from_csv(text: &str) -> Result<Vec<Run>, Error> {
    let mut lines =
        text.trim_start_matches('\u{feff}').lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
    let (_, header) = lines.next().ok_or_else(|| Error::Runs("the table is empty".into()))?;
    let names: Vec<String> = fields(header).into_iter().map(|n| n.to_lowercase()).collect();
    let column = |want: &str| names.iter().position(|n| n == want);
    let missing = |want: &str| {
        let near = nearest(want, names.iter().map(String::as_str).filter(|n| !COLUMNS.contains(n)));
        let hint = near.map(|n| format!(" (is `{n}` it?)")).unwrap_or_default();
        Error::Runs(format!("line 1: no column `{want}`{hint}; found: {}", names.join(", ")))
    };
    let parameters = column("parameters").ok_or_else(|| missing("parameters"))?;
    let loss = column("loss").ok_or_else(|| missing("loss"))?;
    let (tokens, flop) = (column("tokens"), column("training_flop"));
    if tokens.is_none() && flop.is_none() {
        return Err(missing("tokens"));
    }
    let mut runs = Vec::new();
    for (i, line) in lines {
        let row = fields(line);
        let number = |column: usize| -> Result<f64, Error> {
            let field = row.get(column).ok_or_else(|| {
                Error::Runs(format!(
                    "line {}: {} fields, but the header has {}",
                    i + 1,
                    row.len(),
                    names.len()
                ))
            })?;
            field.parse().map_err(|_| {
                Error::Runs(format!("line {}: {} is `{field}`, which is no number", i + 1, names[column]))
            })
        };
        let n = number(parameters)?;
        let d = match (tokens, flop) {
            (Some(column), _) => number(column)?,
            (None, Some(column)) => number(column)? / TRAIN_FLOP / n,
            (None, None) => return Err(missing("tokens")),
        };
        runs.push(Run { parameters: n, tokens: d, loss: number(loss)? }.checked(&format!("line {}", i + 1))?);
    }
    Ok(runs)
}

/// The run of a folder: `parameters` from its configuration (TOML) or its metrics, `tokens` and `loss` from its metrics
/// (JSON lines). The loss is the last one measured on held-back text (`held_back_loss`); where there is none, the mean of the
/// last tenth of the training losses, since single batches scatter.
///
/// # Errors
/// A configuration or a line that does not parse, and what is missing, with its line.
pub fn from_folder(config: &str, metrics: &str) -> Result<Run, Error> {
    let config: toml::Table = toml::from_str(config)
        .map_err(|e| Error::Runs(format!("config.toml: {}", e.to_string().trim_end())))?;
    let mut lines: Vec<serde_json::Map<String, serde_json::Value>> = Vec::new();
    // A last line without its end was being written when the run was killed.
    let whole = metrics.rfind('\n').map_or("", |at| &metrics[..at]);
    for (i, line) in whole.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let parsed = serde_json::from_str(line)
            .map_err(|e| Error::Runs(format!("metrics.jsonl, line {}: {e}", i + 1)))?;
        lines.push(parsed);
    }
    let last = |key: &str| lines.iter().rev().find_map(|l| l.get(key)?.as_f64());
    let missing =
        |what: &str| Error::Runs(format!("metrics.jsonl holds no `{what}`; has the run made a step?"));
    let configured = |table: &toml::Table| table.get("parameters").and_then(toml::Value::as_integer);
    let nested = || config.values().filter_map(toml::Value::as_table).find_map(configured);
    let parameters = last("parameters").or_else(|| configured(&config).or_else(nested).map(|n| n as f64));
    let parameters = parameters
        .ok_or_else(|| Error::Runs("neither config.toml nor metrics.jsonl says `parameters`".into()))?;
    let tokens = last("tokens").ok_or_else(|| missing("tokens"))?;
    let loss = match last("held_back_loss") {
        Some(loss) => loss,
        None => {
            let all: Vec<f64> = lines.iter().filter_map(|l| l.get("loss")?.as_f64()).collect();
            let tail = &all[all.len() - all.len().div_ceil(10)..];
            if tail.is_empty() {
                return Err(missing("loss"));
            }
            tail.iter().sum::<f64>() / tail.len() as f64
        }
    };
    Run { parameters, tokens, loss }.checked("metrics.jsonl")
}

/// The fields of a CSV line: separated by commas, optionally in double quotes with `""` for a quote.
fn fields(line: &str) -> Vec<String> {
    let mut out = vec![String::new()];
    let mut quoted = false;
    let mut chars = line.trim_end_matches('\r').chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                out.last_mut().expect("starts with one").push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => out.push(String::new()),
            c => out.last_mut().expect("starts with one").push(c),
        }
    }
    out.into_iter().map(|f| f.trim().to_string()).collect()
}

/// Splits off the `k` runs with the highest loss: (kept in their order, dropped from the highest down).
///
/// Besiroglu et al. fit without the five highest of the 245 runs read off Hoffmann et al.'s figure 4: models of 2 to 7
/// billion parameters trained on fewer than 0.5 tokens a parameter, far outside any regime that one would use.
pub fn drop_highest(runs: &[Run], k: usize) -> (Vec<Run>, Vec<Run>) {
    let mut order: Vec<usize> = (0..runs.len()).collect();
    order.sort_by(|a, b| runs[*b].loss.total_cmp(&runs[*a].loss));
    split(runs, &order[..k.min(runs.len())])
}

/// Splits off the `k` runs with the most arithmetic, to test a law's extrapolation on them.
pub fn hold_back_largest(runs: &[Run], k: usize) -> (Vec<Run>, Vec<Run>) {
    let mut order: Vec<usize> = (0..runs.len()).collect();
    order.sort_by(|a, b| runs[*b].flop().total_cmp(&runs[*a].flop()));
    split(runs, &order[..k.min(runs.len())])
}

/// Runs of about equal arithmetic, for a picture of the law's valley: (the middle of their FLOP, the runs by size).
///
/// Runs within 15% of the cheapest one of a group belong to it (figures read off a plot scatter by a few percent);
/// groups of fewer than three runs show no valley and are left out.
pub fn profiles(runs: &[Run]) -> Vec<(f64, Vec<Run>)> {
    let mut sorted = runs.to_vec();
    sorted.sort_by(|a, b| a.flop().total_cmp(&b.flop()));
    let mut groups: Vec<Vec<Run>> = Vec::new();
    for run in sorted {
        match groups.last_mut() {
            Some(group) if run.flop() <= 1.15 * group[0].flop() => group.push(run),
            _ => groups.push(vec![run]),
        }
    }
    groups.retain(|g| g.len() >= 3);
    let middle = |g: &[Run]| (g.iter().map(|r| r.flop().ln()).sum::<f64>() / g.len() as f64).exp();
    let by_size = |mut g: Vec<Run>| {
        g.sort_by(|a, b| a.parameters.total_cmp(&b.parameters));
        (middle(&g), g)
    };
    groups.into_iter().map(by_size).collect()
}

fn split(runs: &[Run], out: &[usize]) -> (Vec<Run>, Vec<Run>) {
    let kept = (0..runs.len()).filter(|i| !out.contains(i)).map(|i| runs[i]).collect();
    (kept, out.iter().map(|i| runs[*i]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_flop_or_tokens_and_quoted_fields() {
        let runs =
            from_csv("loss,\"name\",training_flop,parameters\n3.5,\"a, \"\"b\"\"\",6e12,1e3\r\n\n").unwrap();
        assert_eq!(runs, [Run { parameters: 1e3, tokens: 1e9, loss: 3.5 }]);
    }

    #[test]
    fn a_folder_is_a_run() {
        let metrics = "{\"step\":1,\"tokens\":100,\"loss\":5.0}\n{\"step\":2,\"tokens\":200,\"loss\":4.0,\"held_back_loss\":4.5}\n";
        let want = Run { parameters: 3e4, tokens: 200.0, loss: 4.5 };
        assert_eq!(from_folder("parameters = 30000", metrics).unwrap(), want);
        assert_eq!(from_folder("[model]\nparameters = 30000", metrics).unwrap(), want);
        // Without held-back text: the mean of the last tenth of 20 losses, 19 and 20.
        let plain: Vec<String> = (1..=20).map(|i| format!("{{\"tokens\":{i},\"loss\":{i}}}")).collect();
        assert_eq!(from_folder("parameters = 1", &(plain.join("\n") + "\n{\"tok")).unwrap().loss, 19.5);
        let check = |config: &str, metrics: &str, part: &str| {
            let message = from_folder(config, metrics).unwrap_err().to_string();
            assert!(message.contains(part), "`{message}` does not say `{part}`");
        };
        check("= 1", metrics, "config.toml:");
        check("", metrics, "neither config.toml nor metrics.jsonl says `parameters`");
        check("parameters = 1", "{\"tokens\": 1}\n{\"tok\n", "line 2:");
        check("parameters = 1", "", "no `tokens`");
        check("parameters = 1", "{\"tokens\": 1}\n", "no `loss`");
    }

    #[test]
    fn runs_of_equal_arithmetic_form_profiles() {
        let run = |parameters: f64, flop: f64| Run { parameters, tokens: flop / 6.0 / parameters, loss: 3.0 };
        let runs = [run(4e6, 1.04e18), run(1e6, 1e18), run(2e6, 1.1e18), run(3e6, 3e18), run(5e6, 3.1e18)];
        let got = profiles(&runs);
        assert_eq!(got.len(), 1, "two runs at 3e18 are no profile");
        assert!((got[0].0 / 1.046e18 - 1.0).abs() < 1e-3);
        assert_eq!(got[0].1.iter().map(|r| r.parameters).collect::<Vec<_>>(), [1e6, 2e6, 4e6]);
    }

    #[test]
    fn names_what_is_wrong_and_where() {
        let check = |text: &str, part: &str| {
            let message = from_csv(text).unwrap_err().to_string();
            assert!(message.contains(part), "`{message}` does not say `{part}`");
        };
        check("", "empty");
        check("params,tokens,loss\n1,1,1", "no column `parameters`");
        check("parameters,token,loss\n1,1,1", "no column `tokens` (is `token` it?)");
        check("parameters,tokens,loss\n1,2", "line 2: 2 fields");
        check("parameters,tokens,loss\n1,x,1", "line 2: tokens is `x`");
        check("parameters,tokens,loss\n1,1,NaN", "line 2: loss is NaN");
        check("parameters,tokens,loss\n1,1,3\n0,1,1", "line 3: parameters is 0");
    }
}
