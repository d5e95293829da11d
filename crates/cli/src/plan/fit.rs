//! `sparsam plan fit`: a scaling law from one's own runs.

use super::{Answer, Output, span};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use sparsam_plan::fit::{self, Estimate, Fit};
use sparsam_plan::law::Law;
use sparsam_plan::plot::{Axis, Form, Plot, Series, Unit};
use sparsam_plan::report::{Report, Table};
use sparsam_plan::runs::{self, Run};
use sparsam_plan::units::{show_count, show_flop, three};
use std::path::{Path, PathBuf};

/// A scaling law fitted to your own runs, with intervals, IsoFLOP curves and extrapolation
///
/// Fits L = E + A / N^alpha + B / D^beta as Hoffmann et al. 2022 and Besiroglu et al. 2024 do: Huber loss on log loss,
/// L-BFGS from a grid of starts, intervals from runs drawn with replacement.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sparsam plan fit runs.csv
  sparsam plan fit runs.csv --drop-highest 5 --html fit.html
  sparsam plan fit runs/ --hold-back 1 --at 1e17,1e18
  sparsam plan fit runs.csv --json > fit.json && sparsam plan train --flops 1e18 --law fit.json

A CSV table needs the columns parameters, loss, and tokens or training_flop. A folder may be a run of `sparsam train`, or
hold such runs.")]
pub struct Args {
    /// Tables of runs, runs' folders, or folders of these
    #[arg(required = true, value_name = "RUNS")]
    runs: Vec<PathBuf>,
    /// Leave out the runs with the highest loss: so many
    #[arg(long, value_name = "K", default_value = "0")]
    drop_highest: usize,
    /// Hold back the largest runs, so many, and predict their loss
    #[arg(long, value_name = "K", default_value = "0")]
    hold_back: usize,
    /// Budgets to extrapolate to; default: 10 and 100 times the largest run
    #[arg(long, value_name = "FLOP", value_delimiter = ',', value_parser = super::flop, allow_hyphen_values = true)]
    at: Vec<f64>,
    /// Fits of drawn runs, for the intervals
    #[arg(long, value_name = "N", default_value = "200")]
    draws: usize,
    /// Of the draws
    #[arg(long, value_name = "N", default_value = "42")]
    seed: u64,
    #[command(flatten)]
    output: Output,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let mut all = Vec::new();
    for path in &args.runs {
        all.extend(read(path)?);
    }
    let (kept, dropped) = runs::drop_highest(&all, args.drop_highest);
    let (used, held) = runs::hold_back_largest(&kept, args.hold_back);
    let fit = fit::fit(&used, args.draws, args.seed)?;
    let answer = answer(&args, &used, &dropped, &held, &fit);
    args.output.give(&answer)
}

/// The runs of a CSV table, of a run's folder, or of a folder of these.
fn read(path: &Path) -> anyhow::Result<Vec<Run>> {
    if !path.is_dir() {
        return runs::from_csv(&super::read(path)?).with_context(|| path.display().to_string());
    }
    if path.join(METRICS).is_file() {
        return Ok(vec![folder(path)?]);
    }
    let entries = std::fs::read_dir(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let mut folders: Vec<PathBuf> =
        entries.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| p.join(METRICS).is_file()).collect();
    folders.sort();
    if folders.is_empty() {
        bail!("{}: holds no runs; a run's folder has {METRICS} and {CONFIG}", path.display());
    }
    folders.iter().map(|p| folder(p)).collect()
}

const METRICS: &str = "metrics.jsonl";
const CONFIG: &str = "config.toml";

fn folder(path: &Path) -> anyhow::Result<Run> {
    let config = super::read(&path.join(CONFIG))?;
    let metrics = super::read(&path.join(METRICS))?;
    runs::from_folder(&config, &metrics).with_context(|| path.display().to_string())
}

fn answer(args: &Args, used: &[Run], dropped: &[Run], held: &[Run], fit: &Fit) -> Answer {
    let mut report = Report::new(format!("A scaling law from {} runs", used.len()));
    type Constant = fn(&Law) -> f64;
    let constants: [(&str, Constant); 6] = [
        ("A", |l| l.a),
        ("B", |l| l.b),
        ("E", |l| l.e),
        ("alpha", |l| l.alpha),
        ("beta", |l| l.beta),
        ("a: N_opt ~ C^a", Law::size_exponent),
    ];
    let estimates: Vec<(&str, Estimate)> =
        constants.iter().map(|(name, f)| (*name, fit.estimate(f))).collect();
    let mut table = Table::new(
        "L(N, D) = E + A / N^alpha + B / D^beta",
        &["constant", "value", "std. error", "95% interval"],
    );
    for (name, e) in &estimates {
        table.push([name.to_string(), four(e.value), four(e.standard_error), span(four, e.interval)]);
    }
    report.table(table);
    report.text(format!(
        "Typical miss {}% of the loss (root mean square of log loss); {} fits of runs drawn with replacement, seed {}.",
        three(fit.rms * 100.0),
        fit.draws.len(),
        args.seed
    ));
    if !dropped.is_empty() {
        report.table(run_table("Left out: the highest losses", dropped));
        report.text(
            "Runs that saw too little text for their size lie outside what the law describes; Besiroglu et al. leave \
             out the five highest of Hoffmann et al.'s 245, all with less than half a token a parameter.",
        );
    }
    let predictions: Vec<(&Run, Estimate)> =
        held.iter().map(|r| (r, fit.estimate(|l| l.loss(r.parameters, r.tokens)))).collect();
    if !predictions.is_empty() {
        report.table(prediction_table(&predictions));
    }
    let largest = used.iter().chain(held).map(Run::flop).fold(0.0, f64::max);
    let budgets = if args.at.is_empty() { vec![10.0 * largest, 100.0 * largest] } else { args.at.clone() };
    let optima: Vec<Optimum> = budgets.iter().map(|c| Optimum::of(fit, *c)).collect();
    report.table(optimum_table(&optima, largest));
    report.plot(isoflop_plot(used, fit));
    let json = json!({
        "law": fit.law,
        "constants": estimates.iter().map(|(name, e)| json!({
            "name": name, "value": e.value, "standard_error": e.standard_error, "interval": e.interval,
        })).collect::<Vec<Value>>(),
        "objective": fit.objective,
        "rms": fit.rms,
        "n_runs": fit.n_runs,
        "left_out": dropped,
        "held_back": predictions.iter().map(|(r, e)| json!({
            "run": r, "predicted": e, "relative_error": e.value / r.loss - 1.0,
        })).collect::<Vec<Value>>(),
        "optima": optima.iter().map(|o| json!({
            "flop": o.flop, "parameters": o.parameters, "tokens": o.tokens, "loss": o.loss,
        })).collect::<Vec<Value>>(),
        "draws": fit.draws,
    });
    Answer { report, json }
}

/// Four significant digits: constants of laws are compared with printed ones.
fn four(x: f64) -> String {
    if !x.is_finite() {
        return "-".into();
    }
    let decimals = (3 - x.abs().max(1e-9).log10().floor() as i32).clamp(0, 9) as usize;
    format!("{x:.decimals$}")
}

fn run_table(title: &str, list: &[Run]) -> Table {
    let mut table = Table::new(title, &["parameters", "tokens", "tokens/param", "loss"]);
    for r in list {
        table.push([
            show_count(r.parameters),
            show_count(r.tokens),
            three(r.tokens / r.parameters),
            four(r.loss),
        ]);
    }
    table
}

fn prediction_table(predictions: &[(&Run, Estimate)]) -> Table {
    let columns = ["held back", "tokens", "loss", "predicted", "95% interval", "error"];
    let mut table = Table::new("The largest runs, not used for the fit", &columns);
    for (r, e) in predictions {
        table.push([
            show_count(r.parameters),
            show_count(r.tokens),
            four(r.loss),
            four(e.value),
            span(four, e.interval),
            format!("{:+.2}%", (e.value / r.loss - 1.0) * 100.0),
        ]);
    }
    table
}

/// What is best for a budget by the fit.
struct Optimum {
    flop: f64,
    parameters: Estimate,
    tokens: Estimate,
    loss: Estimate,
}

impl Optimum {
    fn of(fit: &Fit, flop: f64) -> Optimum {
        let best = fit.law.optimum(flop);
        Optimum {
            flop,
            parameters: fit.estimate(|l| l.optimum(flop).parameters),
            tokens: fit.estimate(|l| l.optimum(flop).tokens),
            loss: fit.estimate(|l| l.loss(best.parameters, best.tokens)),
        }
    }
}

fn optimum_table(optima: &[Optimum], largest: f64) -> Table {
    let title = format!("What is best, beyond the largest run ({} FLOP)", show_flop(largest));
    let columns = ["FLOP", "parameters", "95% interval", "tokens", "tokens/param", "loss", "95% interval"];
    let mut table = Table::new(&title, &columns);
    for o in optima {
        table.push([
            show_flop(o.flop),
            show_count(o.parameters.value),
            span(show_count, o.parameters.interval),
            show_count(o.tokens.value),
            three(o.tokens.value / o.parameters.value),
            four(o.loss.value),
            span(four, o.loss.interval),
        ]);
    }
    table
}

/// Runs of equal arithmetic and the law's curves through them; all runs, where there are no such groups.
fn isoflop_plot(used: &[Run], fit: &Fit) -> Plot {
    /// Curves beyond this crowd the picture.
    const MOST: usize = 7;
    let mut profiles = runs::profiles(used);
    // The groups with the most runs say most.
    profiles.sort_by_key(|(_, g)| std::cmp::Reverse(g.len()));
    profiles.truncate(MOST);
    profiles.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut series = Vec::new();
    for (colour, (flop, group)) in profiles.iter().enumerate() {
        let (low, high) = (group[0].parameters.ln(), group[group.len() - 1].parameters.ln());
        let line = (0..=40).map(|i| {
            let n = (low + (high - low) * f64::from(i) / 40.0).exp();
            (n, fit.law.loss(n, flop / sparsam_plan::law::TRAIN_FLOP / n))
        });
        series.push(Series {
            name: format!("{} FLOP", show_flop(*flop)),
            colour,
            form: Form::Line(line.collect()),
        });
        let points = group.iter().map(|r| (r.parameters, r.loss)).collect();
        series.push(Series { name: String::new(), colour, form: Form::Points(points) });
    }
    if series.is_empty() {
        let points = used.iter().map(|r| (r.parameters, r.loss)).collect();
        series.push(Series { name: "runs".into(), colour: 0, form: Form::Points(points) });
    }
    Plot {
        title: "IsoFLOP curves: runs (points) and law (lines)".into(),
        x: Axis::log("parameters", Unit::Count),
        y: Axis::linear("loss, nats a token"),
        series,
        marks: Vec::new(),
    }
}
