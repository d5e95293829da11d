//! `sparsam plan train`: how large a model, on how much text, and for how much.

use super::hardware::{Chosen, Hardware};
use super::subject::{self, Known};
use super::{Answer, Output, span};
use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sparsam_plan::fit::percentiles;
use sparsam_plan::hardware::{Accelerator, Bill};
use sparsam_plan::law::{Advice, Allocation, Law, TRAIN_FLOP};
use sparsam_plan::lifetime::{self, Lifetime};
use sparsam_plan::plot::{Axis, Form, Mark, Plot, Series, Unit};
use sparsam_plan::report::{Report, Table};
use sparsam_plan::text_stock::{self, PUBLIC_TEXT, Repeated};
use sparsam_plan::units::{show_count, show_flop, show_joules, show_seconds, show_usd, show_whole, three};
use std::path::Path;

/// How large a model, on how much text: the least loss for a budget, and its bill
///
/// The budget is arithmetic, money, accelerator hours, or a model and its tokens as already chosen. The default law is
/// the corrected fit of Besiroglu et al. 2024; the advice of Hoffmann et al.'s three approaches stands beside it.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sparsam plan train --flops 5.76e23
  sparsam plan train --usd $100 --hardware h100 --html plan.html
  sparsam plan train --gpu-hours 24 --hardware rtx-4090
  sparsam plan train --params 175B --tokens 300B --hardware v100
  sparsam plan train --flops 1e23 --serve 2T          the cheapest over its life, answers included
  sparsam plan train --flops 1e22 --unique 25B        when text must be repeated
  sparsam plan train --flops 1e15 --law fit.json      by the law of your own runs (plan fit --json > fit.json)")]
pub struct Args {
    #[command(flatten)]
    budget: Budget,
    /// besiroglu, hoffmann-1, hoffmann-2, hoffmann-3, hoffmann-3-rounded, or a fit of your own in JSON
    #[arg(long, value_name = "NAME|FILE", default_value = "besiroglu")]
    law: String,
    /// Tokens that the model will read and write over its life: find the size that is cheapest with these counted
    #[arg(long, value_name = "TOKENS", value_parser = super::tokens, allow_hyphen_values = true)]
    serve: Option<f64>,
    /// What a FLOP of answering costs against one of training: above 1 where serving uses the machine less well
    #[arg(long, value_name = "FACTOR", default_value = "1", value_parser = super::count_of, allow_hyphen_values = true, requires = "serve")]
    serve_weight: f64,
    /// Unique tokens that there are: find size and repetitions for these
    #[arg(long, value_name = "TOKENS", value_parser = super::tokens, allow_hyphen_values = true)]
    unique: Option<f64>,
    /// Tokens of a training sequence, for the exact arithmetic
    #[arg(long, value_name = "TOKENS", default_value = "2048", value_parser = super::tokens, allow_hyphen_values = true)]
    context: f64,
    /// Accelerators that work at once; default: as many as finish within 30 days
    #[arg(long, value_name = "N", value_parser = super::count_of, allow_hyphen_values = true)]
    devices: Option<f64>,
    #[command(flatten)]
    hardware: Hardware,
    #[command(flatten)]
    output: Output,
}

#[derive(clap::Args)]
#[group(required = true, multiple = true)]
#[command(next_help_heading = "Budget")]
struct Budget {
    /// Training arithmetic
    #[arg(long, alias = "flop", value_name = "FLOP", value_parser = super::flop, allow_hyphen_values = true, conflicts_with_all = ["usd", "gpu_hours", "params", "model"])]
    flops: Option<f64>,
    /// Money, for the one accelerator of --hardware
    #[arg(long, value_name = "USD", value_parser = super::usd, allow_hyphen_values = true, conflicts_with_all = ["gpu_hours", "params", "model"])]
    usd: Option<f64>,
    /// Hours of one accelerator, for the one of --hardware
    #[arg(long, value_name = "HOURS", value_parser = super::count_of, allow_hyphen_values = true, conflicts_with_all = ["params", "model"])]
    gpu_hours: Option<f64>,
    /// A size that is already chosen; with --tokens
    #[arg(long, value_name = "N", value_parser = super::parameters, allow_hyphen_values = true, requires = "tokens")]
    params: Option<f64>,
    /// A model that is already chosen, a file or a well-known name; with --tokens
    #[arg(long, value_name = "MODEL", conflicts_with = "params", requires = "tokens")]
    model: Option<String>,
    /// Tokens that the chosen model is trained on
    #[arg(long, value_name = "TOKENS", value_parser = super::tokens, allow_hyphen_values = true, conflicts_with_all = ["flops", "usd", "gpu_hours"])]
    tokens: Option<f64>,
}

/// A law to plan by: one of the published ones, or one's own.
struct Guide {
    name: String,
    source: String,
    basis: Basis,
    draws: Vec<Law>,
}

/// What a guide rests on.
#[derive(Clone, Copy)]
enum Basis {
    Published(Advice),
    Own(Law),
}

/// What `plan fit --json` prints, as far as a plan needs it.
#[derive(Serialize, Deserialize)]
struct OwnFit {
    law: Law,
    #[serde(default)]
    draws: Vec<Law>,
}

impl Guide {
    fn of(advice: Advice) -> Guide {
        let draws =
            if advice == Advice::Besiroglu { sparsam_plan::draws::besiroglu().to_vec() } else { Vec::new() };
        Guide {
            name: advice.name().into(),
            source: advice.source().into(),
            basis: Basis::Published(advice),
            draws,
        }
    }

    fn by_name(name: &str) -> anyhow::Result<Guide> {
        let path = Path::new(name);
        if !(name.ends_with(".json") || path.is_file()) {
            return Ok(Guide::of(Advice::by_name(name)?));
        }
        let own: OwnFit = serde_json::from_str(&super::read(path)?).with_context(|| {
            format!("{name}: no fit; write one with `sparsam plan fit RUNS.csv --json > {name}`")
        })?;
        let right = |l: &Law| [l.a, l.b, l.e, l.alpha, l.beta].iter().all(|x| x.is_finite() && *x > 0.0);
        if !right(&own.law) || !own.draws.iter().all(right) {
            bail!("{name}: the constants of a law must be positive; make the fit again");
        }
        let source = format!("own fit, {name}");
        Ok(Guide { name: "own".into(), source, basis: Basis::Own(own.law), draws: own.draws })
    }

    fn law(&self) -> Option<Law> {
        match self.basis {
            Basis::Published(advice) => advice.law(),
            Basis::Own(law) => Some(law),
        }
    }

    fn optimum(&self, flop: f64) -> Allocation {
        match self.basis {
            Basis::Published(advice) => advice.optimum(flop),
            Basis::Own(law) => law.optimum(flop),
        }
    }

    /// 80% band of the best size.
    fn band(&self, flop: f64) -> Option<(f64, f64)> {
        match self.basis {
            Basis::Published(advice) => advice.band(flop),
            Basis::Own(_) => self.spread(|l| l.optimum(flop).parameters),
        }
    }

    fn loss(&self, at: Allocation) -> Option<f64> {
        self.law().map(|l| l.loss(at.parameters, at.tokens))
    }

    /// 10th to 90th percentile over the draws of the fit.
    fn spread(&self, f: impl Fn(&Law) -> f64) -> Option<(f64, f64)> {
        (!self.draws.is_empty()).then(|| percentiles(self.draws.iter().map(f).collect(), 0.1, 0.9))
    }
}

/// What was asked for.
struct Asked {
    flop: f64,
    /// Where the FLOP come from, in words.
    from: String,
    /// The model and tokens that were chosen already.
    chosen: Option<(Known, Allocation)>,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let guide = Guide::by_name(&args.law)?;
    let hardware = args.hardware.chosen(&[])?;
    let asked = args.budget.asked(&hardware)?;
    let answer = answer(&args, &guide, &hardware, &asked)?;
    args.output.give(&answer)
}

impl Budget {
    fn asked(&self, hardware: &Chosen) -> anyhow::Result<Asked> {
        let plain = |flop: f64, from: String| Asked { flop, from, chosen: None };
        if let Some(flop) = self.flops {
            return Ok(plain(flop, format!("{} FLOP", show_flop(flop))));
        }
        if let Some(usd) = self.usd {
            let a = hardware.single("--usd")?;
            return Ok(plain(a.flop_for_usd(usd), format!("{} on {}", show_usd(usd), a.title)));
        }
        if let Some(hours) = self.gpu_hours {
            let a = hardware.single("--gpu-hours")?;
            return Ok(plain(a.flop_for_hours(hours), format!("{} hours of {}", show_count(hours), a.title)));
        }
        let known = match (&self.model, self.params) {
            (Some(name), _) => subject::by_name(name)?,
            (None, Some(parameters)) => {
                let mut known = Known::sized(parameters)?;
                known.shape.name = format!("{} parameters", show_count(parameters));
                known
            }
            (None, None) => bail!("--tokens alone is no budget; add --params or --model"),
        };
        let tokens = self.tokens.context("--tokens is missing")?;
        // The size as given; the shape that the rule makes of it is a little off.
        let parameters = self.params.unwrap_or(known.parameters.total());
        let at = Allocation { parameters, tokens };
        let from = format!("{} on {} tokens", known.shape.name, show_count(tokens));
        Ok(Asked { flop: at.flop(), from, chosen: Some((known, at)) })
    }
}

fn answer(args: &Args, guide: &Guide, hardware: &Chosen, asked: &Asked) -> anyhow::Result<Answer> {
    let flop = asked.flop;
    let best = guide.optimum(flop);
    let mut report = Report::new(format!("Training: {}", asked.from));
    let lines = advice_lines(guide, flop);
    let headline = headline(guide, flop, best, asked);
    report.text(headline);
    report.table(advice_table(&lines));
    let at = asked.chosen.as_ref().map_or(best, |(_, at)| *at);
    let exact = exact_arithmetic(args, asked, at)?;
    report.text(exact.text());
    let curve = curve(guide, flop, best);
    if let Some(curve) = &curve {
        report.plot(curve_plot(guide, curve, best, asked));
    }
    let bills: Vec<(&Accelerator, f64, Bill)> = hardware
        .list
        .iter()
        .map(|a| {
            let devices = args.devices.unwrap_or_else(|| devices_for_month(a, flop));
            (a, devices, a.bill(flop, devices, args.hardware.pue))
        })
        .collect();
    report.table(bill_table(flop, &bills));
    let life = match args.serve {
        Some(tokens) => Some(whole_life(args, guide, at, tokens, &mut report)?),
        None => None,
    };
    let repeated = args.unique.map(|unique| limited_text(flop, at, unique, &mut report));
    report.text(stock_text(at.tokens, args.unique));
    let json = json!({
        "law": {"name": guide.name, "source": guide.source, "constants": guide.law()},
        "flop": flop,
        "from": asked.from,
        "chosen": asked.chosen.as_ref().map(|(known, at)| json!({
            "model": known.shape,
            "parameters": at.parameters,
            "tokens": at.tokens,
            "loss": guide.loss(*at),
        })),
        "optimum": lines.first(),
        "advice": lines,
        "curve": curve,
        "exact": exact,
        "bills": bills.iter().map(|(a, devices, bill)| json!({
            "hardware": a.name, "title": a.title, "source": a.source, "date": a.date, "devices": devices, "bill": bill,
        })).collect::<Vec<Value>>(),
        "serve": life,
        "unique": repeated,
        "stock": PUBLIC_TEXT,
    });
    Ok(Answer { report, json })
}

fn headline(guide: &Guide, flop: f64, best: Allocation, asked: &Asked) -> String {
    let loss = |at: Allocation| guide.loss(at).map(|l| format!(", loss {}", nats(l))).unwrap_or_default();
    let advice = format!(
        "{} parameters on {} tokens ({} a parameter){}",
        show_count(best.parameters),
        show_count(best.tokens),
        three(best.ratio()),
        loss(best)
    );
    match &asked.chosen {
        Some((_, at)) => format!(
            "{}: {} FLOP (6ND){}. For as much, the least loss would come from {advice}. By {}.",
            asked.from,
            show_flop(flop),
            loss(*at),
            guide.source
        ),
        None => format!("{} FLOP: {advice}. By {}.", show_flop(flop), guide.source),
    }
}

/// One source's advice.
#[derive(Serialize)]
struct Line {
    name: String,
    source: String,
    parameters: f64,
    parameters_band: Option<(f64, f64)>,
    tokens: f64,
    tokens_per_parameter: f64,
    loss: Option<f64>,
    loss_band: Option<(f64, f64)>,
}

/// The chosen guide first, then the published ones.
fn advice_lines(guide: &Guide, flop: f64) -> Vec<Line> {
    let line = |g: &Guide| {
        let at = g.optimum(flop);
        Line {
            name: g.name.clone(),
            source: g.source.clone(),
            parameters: at.parameters,
            parameters_band: g.band(flop),
            tokens: at.tokens,
            tokens_per_parameter: at.ratio(),
            loss: g.loss(at),
            loss_band: g.spread(|l| l.loss(at.parameters, at.tokens)),
        }
    };
    let others = Advice::ALL
        .into_iter()
        .filter(|a| !matches!(guide.basis, Basis::Published(b) if b == *a))
        .map(Guide::of);
    std::iter::once(line(guide)).chain(others.map(|g| line(&g))).collect()
}

fn advice_table(lines: &[Line]) -> Table {
    let columns = ["by", "parameters", "80% band", "tokens", "tokens/param", "loss", "80% band"];
    let mut table = Table::new("What is best for this budget", &columns);
    for l in lines {
        table.push([
            l.name.clone(),
            show_count(l.parameters),
            l.parameters_band.map_or("-".into(), |b| span(show_count, b)),
            show_count(l.tokens),
            three(l.tokens_per_parameter),
            l.loss.map_or("-".into(), nats),
            l.loss_band.map_or("-".into(), |b| span(nats, b)),
        ]);
    }
    table
}

/// A loss in nats a token.
fn nats(x: f64) -> String {
    format!("{x:.3}")
}

/// The arithmetic of a real architecture beside 6ND.
#[derive(Serialize)]
struct Exact {
    shape: sparsam_plan::shape::Shape,
    parameters: f64,
    tokens: f64,
    context: f64,
    flop: f64,
    six_nd: f64,
}

impl Exact {
    fn text(&self) -> String {
        format!(
            "Counted exactly, {} ({}) on {} tokens in sequences of {}: {} FLOP, attention included; 6ND says {}, {}% {}.",
            self.shape.name,
            self.shape.describe(),
            show_count(self.tokens),
            self.context,
            show_flop(self.flop),
            show_flop(self.six_nd),
            three((self.six_nd / self.flop - 1.0).abs() * 100.0),
            if self.six_nd < self.flop { "less" } else { "more" }
        )
    }
}

fn exact_arithmetic(args: &Args, asked: &Asked, at: Allocation) -> anyhow::Result<Exact> {
    let (shape, parameters) = match &asked.chosen {
        Some((known, at)) => (known.shape.clone(), at.parameters),
        None => {
            let known = Known::sized(at.parameters)?;
            (known.shape, known.parameters.total())
        }
    };
    Ok(Exact {
        flop: at.tokens * shape.train_flop(args.context),
        six_nd: TRAIN_FLOP * parameters * at.tokens,
        shape,
        parameters,
        tokens: at.tokens,
        context: args.context,
    })
}

/// A point of the curve of equal cost.
#[derive(Serialize)]
struct Point {
    parameters: f64,
    tokens: f64,
    loss: f64,
    band: Option<(f64, f64)>,
}

/// The loss of other sizes at the same cost, from a thirtieth of the best size to thirty times.
fn curve(guide: &Guide, flop: f64, best: Allocation) -> Option<Vec<Point>> {
    let law = guide.law()?;
    let point = |i: i32| {
        let parameters = best.parameters * 10f64.powf(f64::from(i) / 20.0);
        let tokens = flop / TRAIN_FLOP / parameters;
        Point {
            parameters,
            tokens,
            loss: law.loss(parameters, tokens),
            band: guide.spread(|l| l.loss(parameters, tokens)),
        }
    };
    Some((-30..=30).map(point).collect())
}

fn curve_plot(guide: &Guide, curve: &[Point], best: Allocation, asked: &Asked) -> Plot {
    let mut series = Vec::new();
    if curve.iter().all(|p| p.band.is_some()) {
        let band = curve.iter().filter_map(|p| p.band.map(|(low, high)| (p.parameters, low, high)));
        series.push(Series { name: "80% band".into(), colour: 0, form: Form::Band(band.collect()) });
    }
    let line = curve.iter().map(|p| (p.parameters, p.loss)).collect();
    series.push(Series { name: guide.name.clone(), colour: 0, form: Form::Line(line) });
    let mut marks = Vec::new();
    if let Some(loss) = guide.loss(best) {
        let label = format!("best: {}, loss {}", show_count(best.parameters), nats(loss));
        marks.push(Mark { x: best.parameters, y: loss, label });
    }
    if let Some((_, at)) = &asked.chosen
        && let Some(loss) = guide.loss(*at)
    {
        let label = format!("as chosen: {}, loss {}", show_count(at.parameters), nats(loss));
        marks.push(Mark { x: at.parameters, y: loss, label });
    }
    Plot {
        title: format!("Loss of other sizes at {} FLOP", show_flop(asked.flop)),
        x: Axis::log("parameters", Unit::Count),
        y: Axis::linear("loss, nats a token"),
        series,
        marks,
    }
}

/// The power of two of devices that finishes in 30 days.
fn devices_for_month(a: &Accelerator, flop: f64) -> f64 {
    let months = flop / a.training_flops() / (30.0 * 86400.0);
    months.max(1.0).log2().ceil().exp2()
}

fn bill_table(flop: f64, bills: &[(&Accelerator, f64, Bill)]) -> Table {
    let title = format!("The bill for {} FLOP", show_flop(flop));
    let columns = ["on", "reaches", "hours of one", "cards", "time", "energy", "money", "price of"];
    let mut table = Table::new(&title, &columns);
    for (a, devices, bill) in bills {
        table.push([
            a.name.clone(),
            format!("{} TFLOP/s", three(a.training_flops() / 1e12)),
            show_count(bill.device_hours),
            show_whole(*devices),
            show_seconds(bill.seconds),
            show_joules(bill.joules),
            show_usd(bill.usd),
            if a.date.is_empty() { "own table".into() } else { a.date.clone() },
        ]);
    }
    table
}

/// The cheapest model over its life.
fn whole_life(
    args: &Args,
    guide: &Guide,
    at: Allocation,
    serve: f64,
    report: &mut Report,
) -> anyhow::Result<Lifetime> {
    let law = guide.law().with_context(|| {
        format!("--serve needs a law that predicts loss; {} predicts none, take --law besiroglu", guide.name)
    })?;
    let life = lifetime::cheapest(&law, at, serve, args.serve_weight)?;
    let columns = ["", "parameters", "tokens", "tokens/param", "training", "training + answers"];
    let title =
        format!("The same loss ({}) with {} tokens of answers counted", nats(life.loss), show_count(serve));
    let mut table = Table::new(&title, &columns);
    for (name, a, flop) in [
        ("training alone", life.training_only, life.training_only_flop),
        ("whole life", life.best, life.best_flop),
    ] {
        table.push([
            name.to_string(),
            show_count(a.parameters),
            show_count(a.tokens),
            three(a.ratio()),
            show_flop(a.flop()),
            show_flop(flop),
        ]);
    }
    report.table(table);
    report.text(format!(
        "The smaller model saves {}% of the arithmetic over its life (Sardana et al. 2024, equation 2). The laws were \
         fitted near 20 tokens a parameter; far beyond it they promise too much for more text.",
        three(life.saved() * 100.0)
    ));
    Ok(life)
}

/// What the same budget does with limited text.
fn limited_text(flop: f64, at: Allocation, unique: f64, report: &mut Report) -> Value {
    let best = text_stock::best_repeated(flop, unique);
    let plain = text_stock::repeated(at.parameters, at.tokens, unique);
    let endless = text_stock::repeated(at.parameters, at.tokens, at.tokens);
    let columns = ["", "parameters", "tokens", "epochs", "worth new tokens", "loss (C4)"];
    let mut table = Table::new(&format!("With {} unique tokens", show_count(unique)), &columns);
    let mut row = |name: &str, r: &Repeated| {
        table.push([
            name.to_string(),
            show_count(r.allocation.parameters),
            show_count(r.allocation.tokens),
            three(r.epochs),
            show_count(r.effective_tokens),
            nats(r.loss),
        ]);
    };
    row("as above, repeated", &plain);
    row("best for this text", &best);
    row("if text were endless", &endless);
    report.table(table);
    report.text(
        "Repeated tokens are worth less and less: four epochs are worth 3.7, forty are worth 15 \
         (Muennighoff et al. 2023; losses by their fit on C4, so compare them only among themselves).",
    );
    json!({"as_planned": plain, "best": best, "endless": endless})
}

/// As the source writes them: `1000T`.
fn trillions(x: f64) -> String {
    format!("{}T", three(x / 1e12))
}

/// How the tokens stand to what people have written.
fn stock_text(tokens: f64, unique: Option<f64>) -> String {
    let stock = PUBLIC_TEXT;
    let used = unique.unwrap_or(tokens);
    format!(
        "{} tokens are {}% of the {} ({}, 90% between {}; used up between 2026 and 2032 on the trend of 2024: \
         Villalobos et al. 2024).{}",
        show_count(used),
        three(used / stock.tokens * 100.0),
        stock.name,
        trillions(stock.tokens),
        span(trillions, stock.interval).replace(" to ", " and "),
        if used > stock.tokens { " There is not enough: plan with --unique." } else { "" }
    )
}
