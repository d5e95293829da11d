//! `report.html`: a run's curves, settings and samples on one page.

use crate::config::{Config, Receipt};
use crate::metrics::Record;
use sparsam_plan::plot::{Axis, Form, Plot, Series, Unit};
use sparsam_plan::report::{Report, Table};
use sparsam_plan::units;

/// Points of a curve at most: more cannot be told apart.
const POINTS: usize = 600;

/// The report of the run with these settings and measures.
pub fn report(title: &str, config: &Config, receipt: &Receipt, records: &[Record]) -> Report {
    let mut report = Report::new(title);
    let steps: Vec<_> = records
        .iter()
        .filter_map(|r| match r {
            Record::Step(s) => Some(s),
            _ => None,
        })
        .collect();
    let held: Vec<(f64, f64)> = records
        .iter()
        .filter_map(|r| match r {
            Record::HeldBack { step, held_back_loss } => Some((*step as f64, *held_back_loss)),
            _ => None,
        })
        .collect();
    report.text(summary(receipt, &steps, &held, config.run.usd_per_hour));
    let curve = |f: &dyn Fn(&crate::metrics::StepRecord) -> Option<f64>| -> Vec<(f64, f64)> {
        steps.iter().filter_map(|s| f(s).map(|y| (s.step as f64, y))).collect()
    };
    let line = |name: &str, colour, points: Vec<(f64, f64)>| Series {
        name: name.into(),
        colour,
        form: Form::Line(thinned(&points)),
    };
    let plot = |title: &str, label: &str, series: Vec<Series>| Plot {
        title: title.into(),
        x: Axis { label: "step".into(), unit: Unit::Count, log: false },
        y: Axis::linear(label),
        series,
        marks: Vec::new(),
    };
    let mut loss = vec![line("training", 0, curve(&|s| Some(s.loss)))];
    if !held.is_empty() {
        loss.push(line("held back", 1, held));
    }
    report.plot(plot("Loss", "nats a token", loss));
    let right: Vec<(f64, f64)> = records
        .iter()
        .filter_map(|r| match r {
            Record::Task { step, task_right, task_questions } => {
                Some((*step as f64, 100.0 * *task_right as f64 / *task_questions as f64))
            }
            _ => None,
        })
        .collect();
    if !right.is_empty() {
        report.plot(plot("Right answers to the task's questions", "%", vec![line("", 5, right)]));
    }
    let norms = curve(&|s| s.grad_norm);
    if !norms.is_empty() {
        report.plot(plot("Norm of the gradients", "before clipping", vec![line("", 2, norms)]));
    }
    report.plot(plot("Learning rate", "rate", vec![line("", 3, curve(&|s| Some(s.lr)))]));
    report.plot(plot("Speed", "tokens/s", vec![line("", 4, curve(&|s| Some(s.tokens_per_second)))]));
    let mut samples = Table::new("Samples", &["step", "text"]).left(&[1]);
    let mut notes = Table::new("Notes", &["step", "what"]).left(&[1]);
    for record in records {
        match record {
            Record::Sample { step, sample } => samples.push([step.to_string(), sample.clone()]),
            Record::Note { step, note } => notes.push([step.to_string(), note.clone()]),
            Record::Step(_) | Record::HeldBack { .. } | Record::Task { .. } => {}
        }
    }
    for table in [samples, notes].into_iter().filter(|t| !t.rows.is_empty()) {
        report.table(table);
    }
    report.table(settings(config));
    report
}

fn summary(
    receipt: &Receipt,
    steps: &[&crate::metrics::StepRecord],
    held: &[(f64, f64)],
    usd_per_hour: Option<f64>,
) -> String {
    let mut text = format!(
        "{} parameters, a vocabulary of {}, {} tokens to learn from and {} held back.",
        units::show_count(receipt.parameters as f64),
        receipt.vocab_size,
        units::show_count(receipt.train_tokens as f64),
        units::show_count(receipt.held_back_tokens as f64)
    );
    if let Some(last) = steps.last() {
        text += &format!(
            " After {} steps and {} tokens in {}: training loss {:.4}",
            last.step,
            units::show_count(last.tokens as f64),
            units::show_seconds(last.seconds),
            last.loss
        );
        if let Some((_, loss)) = held.last() {
            text += &format!(", held-back loss {loss:.4} (perplexity {:.2})", loss.exp());
        }
        text += ".";
        if let Some(price) = usd_per_hour {
            text += &format!(" That cost {}.", units::show_usd(price * last.seconds / 3600.0));
        }
    }
    text
}

/// Means of neighbouring points, so that at most [`POINTS`] are left.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let width = points.len().div_ceil(POINTS).max(1);
    let mean = |part: &[(f64, f64)]| {
        let n = part.len() as f64;
        (part.iter().map(|p| p.0).sum::<f64>() / n, part.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(width).map(mean).collect()
}

fn settings(config: &Config) -> Table {
    let mut table = Table::new("Settings", &["key", "value"]).left(&[1]);
    let value = toml::Table::try_from(config).unwrap_or_default();
    for (section, content) in &value {
        for (key, v) in content.as_table().into_iter().flatten() {
            table.push([format!("{section}.{key}"), v.to_string()]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::StepRecord;

    #[test]
    fn the_page_holds_curves_samples_and_settings() {
        let step = |step| StepRecord {
            step,
            loss: 5.0 - step as f64 / 1000.0,
            lr: 1e-3,
            grad_norm: Some(1.0),
            tokens: step * 512,
            seconds: step as f64,
            tokens_per_second: 512.0,
            share_of_peak: 0.5,
        };
        let mut records: Vec<Record> = (1..=2000).map(|i| Record::Step(step(i))).collect();
        records.push(Record::HeldBack { step: 2000, held_back_loss: 3.25 });
        records.push(Record::Sample { step: 2000, sample: "<b>To be".into() });
        let config = Config::from_toml("[run]\nusd_per_hour = 3.6", "t").unwrap();
        let html = report("Run", &config, &Receipt::default(), &records).to_html();
        assert_eq!(html.matches("<svg").count(), 4);
        assert!(html.contains("&lt;b&gt;To be") && html.contains("run.usd_per_hour"));
        assert!(html.contains("held-back loss 3.2500 (perplexity 25.79)") && html.contains("$2"), "{html}");
        assert_eq!(thinned(&(0..2000).map(|i| (i as f64, 1.0)).collect::<Vec<_>>()).len(), 500);
    }
}
