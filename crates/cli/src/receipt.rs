//! `sparsam receipt`: what a model's whole family has cost, from teacher to served file.

use crate::plan::{self};
use crate::plan::{Answer, Hardware, Output, read};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use sparsam_plan::receipt::{self, Family, Record};
use sparsam_plan::report::{Report, Table};
use sparsam_plan::serving::{Query, Service};
use sparsam_plan::units::{show_count, show_joules, show_seconds, show_usd, three};
use std::path::{Path, PathBuf};

/// What a model's whole family has cost: joules, money, and cents for a thousand answers
///
/// Every run that makes a model leaves a receipt: what was forecast, what it took, and what it was made from. This adds
/// up a run and all its ancestors, each once.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sparsam receipt runs/student
  sparsam receipt student-q4.gguf --answers 1M --hardware l4
  sparsam receipt runs/student --answers 10k --usd-per-answer 0.0002 --html bill.html")]
pub struct Args {
    /// A run's folder, or a model file that has a receipt beside it
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Answers over the model's life, among which the cost of making it is shared
    #[arg(long, value_name = "N", value_parser = plan::count_of, allow_hyphen_values = true)]
    answers: Option<f64>,
    /// Dollars of one answer itself
    #[arg(long, value_name = "USD", value_parser = plan::usd, allow_hyphen_values = true, requires = "answers", conflicts_with = "hardware")]
    usd_per_answer: Option<f64>,
    /// The model that answers, if RUN is a folder; with --hardware
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value = "500", value_parser = plan::tokens, allow_hyphen_values = true)]
    prompt: f64,
    /// Tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value = "300", value_parser = plan::tokens, allow_hyphen_values = true)]
    answer: f64,
    #[command(flatten)]
    hardware: Hardware,
    #[command(flatten)]
    output: Output,
}

/// Prints the bill.
///
/// # Errors
/// If nothing is recorded of the run, a receipt cannot be read, or the question about answers lacks something.
pub fn run(args: Args) -> anyhow::Result<()> {
    let root = args.run.to_string_lossy().to_string();
    if !args.run.exists() {
        bail!("{root}: no such run; give the folder that a command wrote, or its model file");
    }
    let family = Family::collect(&root, load)?;
    let Some(own) = family.lines.last() else {
        bail!(
            "{root}: holds no {}, so nothing is known of its cost; runs of train, finetune, quantize and distill leave one",
            receipt::FILE
        );
    };
    let (place, record) = load(None, &own.path)?;
    let record = record.with_context(|| format!("{place}: the receipt is gone"))?;
    let price = price(&args)?;
    let answer = answer(&args, &family, &record, price);
    args.output.give(&answer)
}

/// Whether it is known what the model or run at `path` has cost.
///
/// # Errors
/// A receipt that cannot be read.
pub fn is_recorded(path: &Path) -> anyhow::Result<bool> {
    Ok(load(None, &path.to_string_lossy())?.1.is_some())
}

/// The place of `path` as `child` names it, and its record.
fn load(child: Option<&str>, path: &str) -> anyhow::Result<(String, Option<Record>)> {
    // Paths in a record are as seen from the folder that the record lies in.
    let from = match child.map(Path::new) {
        Some(child) if child.is_dir() => child.to_path_buf(),
        Some(child) => child.parent().unwrap_or(Path::new(".")).to_path_buf(),
        None => PathBuf::new(),
    };
    let Ok(place) = from.join(path).canonicalize() else { return Ok((path.to_string(), None)) };
    // A model in a run's folder (`model.gguf`, `model/`, `adapter/`) came from that run.
    for place in place.ancestors().take(3) {
        let name = place.to_string_lossy().to_string();
        let file =
            if place.is_dir() { place.join(receipt::FILE) } else { PathBuf::from(receipt::beside(&name)) };
        if file.is_file() {
            let record = Record::from_json(&read(&file)?, &file.display().to_string())?;
            return Ok((name, Some(record)));
        }
    }
    Ok((place.to_string_lossy().to_string(), None))
}

/// Dollars and joules of one answer, and how they are known.
struct Price {
    usd: f64,
    joules: Option<f64>,
    from: String,
}

fn price(args: &Args) -> anyhow::Result<Option<Price>> {
    if args.answers.is_none() {
        return Ok(None);
    }
    if let Some(usd) = args.usd_per_answer {
        return Ok(Some(Price { usd, joules: None, from: "as given".into() }));
    }
    let chosen = args.hardware.chosen(&[])?;
    if !chosen.named {
        return Ok(None);
    }
    let accelerator = chosen.single("--answers")?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None if args.run.is_file() => args.run.to_string_lossy().to_string(),
        None => bail!("--hardware prices answers of a model file; name it with --model"),
    };
    let known = plan::model_by_name(&model)?;
    let (weight_bytes, _) = known.weights(None);
    let service = Service { shape: &known.shape, weight_bytes, cache_element_bytes: 2.0, accelerator };
    let cost = service.cost(&Query { prompt: args.prompt, answer: args.answer }, 1.0, args.hardware.pue)?;
    let from = format!(
        "{} on {}, one at a time, {} tokens of prompt and {} of answer",
        known.shape.name,
        accelerator.title,
        show_count(args.prompt),
        show_count(args.answer)
    );
    Ok(Some(Price { usd: cost.usd_per_query, joules: Some(cost.joules_per_query), from }))
}

fn answer(args: &Args, family: &Family, own: &Record, price: Option<Price>) -> Answer {
    let mut report = Report::new(format!("Receipt of {}", args.run.display()));
    let missing = || "-".to_string();
    let cells = |name: String, command: &str, fact: &sparsam_plan::forecast::Fact| {
        [
            name,
            command.to_string(),
            fact.seconds.map_or_else(missing, show_seconds),
            fact.tokens.map_or_else(missing, show_count),
            fact.joules.map_or_else(missing, show_joules),
            fact.usd.map_or_else(missing, show_usd),
        ]
    };
    let columns = ["run", "made by", "time", "tokens", "energy", "money"];
    let mut table = Table::new("The family, parents first", &columns).left(&[1]);
    let here = std::env::current_dir().unwrap_or_default();
    for line in &family.lines {
        let path = Path::new(&line.path);
        let short = path.strip_prefix(&here).unwrap_or(path).display().to_string();
        let name = if line.role.is_empty() { short } else { format!("{short} ({})", line.role) };
        table.push(cells(name, &line.command, &line.fact));
    }
    let total = family.total();
    table.push(cells("all together".into(), "", &total));
    report.table(table);
    for parent in &family.unrecorded {
        report.text(format!(
            "Not in the sum, since nothing is recorded of it: {} ({}).",
            parent.path, parent.role
        ));
    }
    let comparison = own.comparison();
    if !comparison.is_empty() {
        report.table(comparison_table(own));
    }
    let mut cents = Value::Null;
    if let Some(answers) = args.answers {
        let usd = price.as_ref().map_or(0.0, |p| p.usd);
        let value = family.cents_per_thousand(answers, usd);
        let how = match &price {
            Some(price) => format!(
                "{} cents to make, {} to answer ({})",
                three(family.cents_per_thousand(answers, 0.0)),
                three(usd * 1e5),
                price.from
            ),
            None => "the making alone; --usd-per-answer or --hardware adds the answers".into(),
        };
        report.text(format!(
            "A thousand answers cost {} cents over a life of {}: {how}.",
            three(value),
            show_count(answers)
        ));
        cents = json!(value);
    }
    report.text(
        "Energy is an estimate: seconds times the machine's watts under load, unless a meter was read.",
    );
    let json = json!({
        "lines": family.lines,
        "unrecorded": family.unrecorded,
        "total": total,
        "forecast_against_fact": comparison,
        "answers": args.answers,
        "usd_per_answer": price.as_ref().map(|p| p.usd),
        "joules_per_answer": price.as_ref().and_then(|p| p.joules),
        "cents_per_thousand_answers": cents,
    });
    Answer { report, json }
}

/// Forecast beside fact.
pub fn comparison_table(record: &Record) -> Table {
    let title = format!("Forecast and fact of this run, on {}", record.machine);
    let mut table = Table::new(&title, &["what", "forecast", "fact", "", "held"]);
    for row in record.comparison() {
        let ratio =
            if row.forecast > 0.0 { format!("{}x", three(row.fact / row.forecast)) } else { "-".into() };
        table.push([
            row.what.to_string(),
            row.show(row.forecast),
            row.show(row.fact),
            ratio,
            if row.held { "yes" } else { "no" }.to_string(),
        ]);
    }
    table
}
