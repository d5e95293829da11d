//! `sparsam plan serve`: what answers cost, by the roofline.

use super::hardware::Hardware;
use super::subject::{self, Known, Subject};
use super::{Answer, Output};
use serde_json::{Value, json};
use sparsam_plan::hardware::Accelerator;
use sparsam_plan::memory::Rounding;
use sparsam_plan::nearest;
use sparsam_plan::plot::{Axis, Form, Plot, Series, Unit};
use sparsam_plan::report::{Report, Table};
use sparsam_plan::serving::{Bound, Cost, Query, Service, Year};
use sparsam_plan::units::{show_bytes, show_count, show_joules, show_seconds, show_usd, show_whole, three};

/// What answers cost: per million tokens, per query and per year, from bandwidth, arithmetic, batch and context
///
/// A step of decoding reads all weights and every sequence's cache once and multiplies once for each sequence; it takes
/// the longer of the two (the roofline).
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sparsam plan serve llama-3-8b --hardware h100 --queries-per-day 1M
  sparsam plan serve model.gguf --hardware l4,rtx-4090 --prompt 2k --answer 200
  sparsam plan serve palm-540b --against 770M --batch 1 --hardware h100
  sparsam plan serve --params 70B --weights q4_0 --hardware my-cards.toml")]
pub struct Args {
    #[command(flatten)]
    subject: Subject,
    /// How weights are stored; default: as the file has them, or bf16
    #[arg(long, value_name = "NAME")]
    weights: Option<String>,
    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value = "500", value_parser = super::tokens, allow_hyphen_values = true)]
    prompt: f64,
    /// Tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value = "300", value_parser = super::tokens, allow_hyphen_values = true)]
    answer: f64,
    /// Sequences answered at once; default: 1 and what the memory holds beside the weights
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = super::count_of, allow_hyphen_values = true)]
    batch: Vec<f64>,
    /// Bits of an element of the cache
    #[arg(long, value_name = "BITS", default_value = "16", value_parser = super::count_of, allow_hyphen_values = true)]
    cache_bits: f64,
    /// Traffic, for the bill of a year
    #[arg(long, value_name = "N", value_parser = super::count_of, allow_hyphen_values = true)]
    queries_per_day: Option<f64>,
    /// Share of their time in which machines may be busy: traffic comes in waves
    #[arg(long, value_name = "SHARE", default_value = "0.6", value_parser = super::share, allow_hyphen_values = true)]
    busy: f64,
    /// Another model or size, to compare the cost of an answer
    #[arg(long, value_name = "MODEL|N")]
    against: Option<String>,
    #[command(flatten)]
    hardware: Hardware,
    #[command(flatten)]
    output: Output,
}

/// A model on an accelerator at one batch size.
struct Priced {
    accelerator: Accelerator,
    cost: Cost,
    year: Option<Year>,
    /// Cost of an answer over that of the other model.
    ratio: Option<f64>,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let known = args.subject.known()?;
    let rounding = args.weights.as_deref().map(rounding_by_name).transpose()?;
    let other = args.against.as_deref().map(other_model).transpose()?;
    let chosen = args.hardware.chosen(&["rtx-4090", "l40s", "a100", "h100"])?;
    let query = Query { prompt: args.prompt, answer: args.answer };
    let mut priced = Vec::new();
    let mut left_out = Vec::new();
    for a in &chosen.list {
        match price(&args, &known, other.as_ref(), rounding, a, &query) {
            Ok(rows) => priced.extend(rows),
            Err(e) if chosen.list.len() > 1 => left_out.push(format!("{}: {e}", a.name)),
            Err(e) => return Err(e.into()),
        }
    }
    let answer = answer(&args, &known, other.as_ref(), rounding, &priced, &left_out);
    args.output.give(&answer)
}

fn service<'a>(
    args: &Args,
    known: &'a Known,
    rounding: Option<Rounding>,
    accelerator: &'a Accelerator,
) -> Service<'a> {
    Service {
        shape: &known.shape,
        weight_bytes: known.weights(rounding).0,
        cache_element_bytes: args.cache_bits / 8.0,
        accelerator,
    }
}

fn price(
    args: &Args,
    known: &Known,
    other: Option<&Known>,
    rounding: Option<Rounding>,
    accelerator: &Accelerator,
    query: &Query,
) -> Result<Vec<Priced>, sparsam_plan::Error> {
    let service_of = |known| service(args, known, rounding, accelerator);
    let this = service_of(known);
    let batches = if args.batch.is_empty() {
        let largest = this.largest_batch(query)?;
        if largest > 1.0 { vec![1.0, largest] } else { vec![1.0] }
    } else {
        args.batch.clone()
    };
    let mut rows = Vec::new();
    for batch in batches {
        let cost = this.cost(query, batch, args.hardware.pue)?;
        let ratio = match other {
            Some(other) => {
                let there =
                    service(args, other, rounding, accelerator).cost(query, batch, args.hardware.pue)?;
                Some(cost.usd_per_query / there.usd_per_query)
            }
            None => None,
        };
        let year = args.queries_per_day.map(|q| this.year(&cost, q, args.busy, args.hardware.pue));
        rows.push(Priced { accelerator: accelerator.clone(), cost, year, ratio });
    }
    Ok(rows)
}

fn answer(
    args: &Args,
    known: &Known,
    other: Option<&Known>,
    rounding: Option<Rounding>,
    priced: &[Priced],
    left_out: &[String],
) -> Answer {
    let (weight_bytes, stored) = known.weights(rounding);
    let mut report = Report::new(format!("Serving {}", known.shape.name));
    report.text(format!(
        "{}; weights {} ({stored}). A query: {} tokens of prompt, {} of answer.",
        known.describe(),
        show_bytes(weight_bytes),
        show_whole(args.prompt),
        show_whole(args.answer)
    ));
    let columns = [
        "on",
        "cards",
        "batch",
        "bound by",
        "step",
        "tok/s",
        "first token",
        "$/M in",
        "$/M out",
        "$/query",
        "energy",
    ];
    let mut table = Table::new("Costs", &columns).left(&[3]);
    for p in priced {
        let c = &p.cost;
        table.push([
            p.accelerator.name.clone(),
            c.devices.to_string(),
            show_whole(c.batch),
            match c.bound {
                Bound::Memory => "memory".into(),
                Bound::Arithmetic => "arithmetic".to_string(),
            },
            show_seconds(c.step_seconds),
            three(c.tokens_per_second),
            show_seconds(c.prompt_seconds),
            three(c.usd_per_million_in),
            three(c.usd_per_million_out),
            show_usd(c.usd_per_query),
            show_joules(c.joules_per_query),
        ]);
    }
    report.table(table);
    if let Some(other) = other {
        let mut table = Table::new(
            &format!("Cost of an answer, {} over {}", known.shape.name, other.shape.name),
            &["on", "batch", "ratio"],
        );
        for p in priced {
            let ratio = p.ratio.map_or(String::new(), |r| format!("{}x", three(r)));
            table.push([p.accelerator.name.clone(), show_whole(p.cost.batch), ratio]);
        }
        report.table(table);
    }
    if let Some(per_day) = args.queries_per_day {
        let title = format!(
            "A year of {} queries a day, machines busy at most {}% of the time",
            show_count(per_day),
            three(args.busy * 100.0)
        );
        let mut table = Table::new(
            &title,
            &["on", "batch", "copies", "cards", "busy", "rent", "energy", "$/1000 queries"],
        );
        for p in priced {
            let Some(year) = p.year else { continue };
            table.push([
                p.accelerator.name.clone(),
                show_whole(p.cost.batch),
                year.copies.to_string(),
                year.devices.to_string(),
                format!("{}%", three(year.busy * 100.0)),
                show_usd(year.usd),
                show_joules(year.joules),
                three(year.usd_per_thousand),
            ]);
        }
        report.table(table);
    }
    if let Some(plot) = plot(args, known, rounding, priced) {
        report.plot(plot);
    }
    for line in left_out {
        report.text(format!("Left out: {line}."));
    }
    report.text(
        "Rents are of the table's month (or yours); energy is an estimate from board power. Source: the roofline of \
         Williams et al. 2009, applied to decoding as in Pope et al. 2022, section 2.",
    );
    let rows: Vec<Value> = priced
        .iter()
        .map(|p| json!({"hardware": p.accelerator.name, "cost": p.cost, "year": p.year, "ratio": p.ratio}))
        .collect();
    let json = json!({
        "model": known.shape,
        "parameters": known.parameters.total(),
        "weights": stored,
        "weight_bytes": weight_bytes,
        "query": Query { prompt: args.prompt, answer: args.answer },
        "against": other.map(|o| json!({"model": o.shape, "parameters": o.parameters.total()})),
        "costs": rows,
        "left_out": left_out,
    });
    Answer { report, json }
}

/// Dollars for a million tokens of answer over the batch, for each accelerator.
fn plot(args: &Args, known: &Known, rounding: Option<Rounding>, priced: &[Priced]) -> Option<Plot> {
    let query = Query { prompt: args.prompt, answer: args.answer };
    let mut series: Vec<Series> = Vec::new();
    for p in priced {
        if series.iter().any(|s| s.name == p.accelerator.name) {
            continue;
        }
        let service = service(args, known, rounding, &p.accelerator);
        let largest = service.largest_batch(&query).ok()?.max(p.cost.batch);
        let mut points = Vec::new();
        let mut batch = 1.0;
        while batch <= largest {
            if let Ok(cost) = service.cost(&query, batch, args.hardware.pue) {
                points.push((batch, cost.usd_per_million_out));
            }
            batch *= 2.0;
        }
        series.push(Series {
            name: p.accelerator.name.clone(),
            colour: series.len(),
            form: Form::Line(points),
        });
    }
    let several = series.iter().any(|s| matches!(&s.form, Form::Line(p) if p.len() > 1));
    several.then(|| Plot {
        title: "Dollars for a million tokens of answer".into(),
        x: Axis::log("sequences at once", Unit::Count),
        y: Axis::log("USD", Unit::Usd),
        series,
        marks: Vec::new(),
    })
}

/// A model by name, or a size.
fn other_model(name: &str) -> anyhow::Result<Known> {
    match sparsam_plan::units::count("parameters", name) {
        Ok(parameters) if !std::path::Path::new(name).exists() => Ok(Known::sized(parameters)?),
        _ => subject::by_name(name),
    }
}

/// The way to store weights called `name`; the first word is enough.
fn rounding_by_name(name: &str) -> anyhow::Result<Rounding> {
    let mut all = Rounding::LISTED.to_vec();
    all.push(Rounding::NF4);
    let found = all.iter().find(|r| r.name.eq_ignore_ascii_case(name) || short(r).eq_ignore_ascii_case(name));
    let names: Vec<String> = all.iter().map(short).collect();
    found.copied().ok_or_else(|| {
        let hint = nearest(name, names.iter().map(String::as_str))
            .map(|n| format!(" (did you mean `{n}`?)"))
            .unwrap_or_default();
        anyhow::anyhow!("--weights: unknown `{name}`{hint}; known: {}", names.join(", "))
    })
}

/// `gptq 4 bits, groups` is `gptq-4` on the command line.
fn short(rounding: &Rounding) -> String {
    let words: Vec<&str> = rounding.name.split(' ').take(2).collect();
    words.join("-")
}
