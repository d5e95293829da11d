//! What a run would take, and what it has done.

use super::{Args, MethodName, blocks};
use crate::{expected, passport, probe, text};
use anyhow::Context;
use serde_json::json;
use sparsam_engine::{self as engine, Engine, Opened, Options, Protocol, Windows, Work, compare};
use sparsam_plan::forecast::{Forecast, Interval};
use sparsam_plan::memory::Memory;
use sparsam_quantize::passport::Score;
use sparsam_quantize::recipe::TensorPlan;
use sparsam_quantize::report::{Report, Runs};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// Which windows are scored of the text that `--eval` names: as for the published figures, where the model reaches so far.
pub fn scored(opened: &Opened) -> Protocol {
    let context = opened.model.facts().context_length.min(512);
    Protocol { context, windows: Windows::SideBySide, chunks: Some(16) }
}

/// Tokens written to tell a model's speed.
const SPOKEN: usize = 32;

/// Bytes and bits of the plan by type.
fn by_type(plan: &[TensorPlan]) -> BTreeMap<String, (usize, usize, usize)> {
    let mut groups: BTreeMap<String, (usize, usize, usize)> = BTreeMap::new();
    for p in plan {
        let g = groups.entry(p.stored_as()).or_default();
        *g = (g.0 + 1, g.1 + p.numel(), g.2 + p.bytes());
    }
    groups
}

/// Seconds of a run on this machine, by its measured arithmetic.
///
/// Calibration with both streams: a block's products once for each of its stages but the first and once more to move on,
/// about 2.5 times in all; two products of inputs a stage. Rounding: `in^2` multiplications a row in GPTQ and in each of the
/// checks and refits of a refinement, at a fifth of the speed of large products, and the search of scales. Healing: six
/// operations a weight and token.
fn seconds(args: &Args, opened: &Opened, plan: &[TensorPlan]) -> anyhow::Result<f64> {
    /// Nanoseconds of a core for the scale of one weight.
    const SEARCH: f64 = 60e-9;
    let machine = probe::measure(args.threads)?;
    let matrices = || plan.iter().filter(|p| p.grid().is_some());
    let weights: f64 = matrices().map(|p| p.numel() as f64).sum();
    let search = weights * SEARCH / machine.threads as f64;
    let (mut products, mut rounding) = (0.0, 0.0);
    let ctx = args.calibration_ctx.or(args.ctx.filter(|_| args.goal.fit.is_none())).unwrap_or(512);
    let tokens = (args.samples * ctx) as f64;
    let in_blocks: f64 =
        matrices().filter(|p| p.gguf_name.starts_with("blk.")).map(|p| p.numel() as f64).sum();
    if args.method() == MethodName::Gptq {
        let facts = opened.model.facts();
        let (h, i) = (facts.hidden_size as f64, facts.intermediate_size as f64);
        let stages = facts.n_layers() as f64 * (3.0 * h * h + i * i);
        products += 2.0 * 2.5 * 2.0 * tokens * in_blocks + 2.0 * 2.0 * tokens * stages;
        let cubes = matrices().map(|p| p.numel() as f64 * p.spec.shape[1] as f64);
        rounding += cubes.sum::<f64>() * 2.0 * (4.0 + 3.0 * args.refinements as f64);
    }
    if args.heal > 0 {
        products += 6.0 * 2048.0 * args.heal as f64 * in_blocks + 2.0 * 2.0 * tokens * in_blocks;
    }
    Ok(search + products / machine.matmul_flops + rounding / (0.2 * machine.matmul_flops))
}

/// What a run would take and write.
///
/// # Errors
/// If the machine cannot be measured, or nobody listens.
pub fn dry_run(
    args: &Args,
    opened: &Opened,
    plan: &[TensorPlan],
    tokens_per_second: Option<f64>,
) -> anyhow::Result<()> {
    let bytes: usize = plan.iter().map(TensorPlan::bytes).sum();
    let weights: usize = plan.iter().map(TensorPlan::numel).sum();
    let calibrated = args.method() == MethodName::Gptq || args.heal > 0;
    let ctx = args.calibration_ctx.or(args.ctx.filter(|_| args.goal.fit.is_none())).unwrap_or(512);
    let tokens = if calibrated { args.samples * ctx } else { 0 };
    let facts = opened.model.facts();
    // Both streams; one block's weights twice (as they are and as f32); the widest Hessian, its sums and its factor.
    let widest = plan.iter().filter(|p| p.grid().is_some()).map(|p| p.spec.shape[1]).max().unwrap_or(0);
    let block = plan.iter().map(TensorPlan::numel).sum::<usize>() / facts.n_layers().max(1);
    let streams = 2 * 2 * 4 * tokens * facts.hidden_size;
    // What the program and the mapped file take beside is there already.
    let beside = probe::peak_memory().unwrap_or(0.0);
    let memory = if tokens == 0 {
        let largest = plan.iter().map(TensorPlan::numel).max().unwrap_or(0);
        Memory { weights: 12.0 * largest as f64, temporary: beside, ..Memory::default() }
    } else {
        Memory {
            weights: (4 * 3 * block) as f64,
            activations: args.memory.map_or(streams, |m| m.min(streams)) as f64,
            temporary: (6 * 4 * widest * widest) as f64 + beside,
            ..Memory::default()
        }
    };
    let machine = expected::machine(args.threads, &args.output);
    let seconds = Interval::around(seconds(args, opened, plan)?, machine.spread);
    let disk = blocks::disk(&opened.source, plan);
    let forecast = Forecast::timed("quantize", seconds, memory, disk, &machine);
    let bits = 8.0 * bytes as f64 / weights as f64;
    if !args.json {
        text::say(types_table(plan))?;
        text::say(format!(
            "{} in tensors, {bits:.2} bits a weight; {tokens} calibration tokens\n",
            text::bytes(bytes)
        ))?;
    }
    let types = by_type(plan);
    let types = types.iter().map(|(t, g)| (t, json!({"tensors": g.0, "weights": g.1, "bytes": g.2})));
    let more = json!({
        "tensor_bytes": bytes,
        "bits_per_weight": bits,
        "calibration_tokens": tokens,
        "expected_tokens_per_second": tokens_per_second,
        "types": types.collect::<BTreeMap<_, _>>(),
    });
    expected::show(&forecast, &machine, "rounding", more, args.json)
}

fn types_table(plan: &[TensorPlan]) -> String {
    let rows: Vec<Vec<String>> = by_type(plan)
        .iter()
        .map(|(t, (n, weights, bytes))| {
            vec![t.clone(), n.to_string(), text::count(*weights), text::bytes(*bytes)]
        })
        .collect();
    text::table(&["type", "tensors", "weights", "bytes"], &rows)
}

/// Writes the report beside the file and prints it.
///
/// # Errors
/// If the disk is full.
pub fn write(args: &Args, plan: &[TensorPlan], report: &Report) -> anyhow::Result<()> {
    for (kind, content) in [("json", serde_json::to_string_pretty(report)?), ("html", report.html())] {
        let path = args.output.with_file_name(format!("{}.{kind}", report.output));
        let mut file = sparsam_formats::AtomicFile::create(&path)?;
        file.write_all(content.as_bytes()).with_context(|| path.display().to_string())?;
        file.commit()?;
    }
    if args.json {
        return text::say_json(&serde_json::to_value(report)?);
    }
    text::say(types_table(plan))?;
    if let Some((ours, nearest)) = report.mean_errors() {
        text::say(format!(
            "error of the layers' outputs: {:.3}% of their size on average, {:.3}% by nearest rounding on the same scales",
            100.0 * ours,
            100.0 * nearest
        ))?;
    }
    health(report)?;
    if let Some((before, after)) = report.mean_healing() {
        let n = report.healing.iter().filter(|h| h.kept).count();
        text::say(format!(
            "healing: error of the blocks' outputs {:.3}% before, {:.3}% after; {n} of {} blocks healed",
            100.0 * before,
            100.0 * after,
            report.healing.len()
        ))?;
    }
    if let Some(s) = &report.passport.score {
        text::say(format!(
            "perplexity {:.4} ± {:.4}, before {:.4} ({})",
            s.perplexity, s.standard_error, s.perplexity_before, s.protocol
        ))?;
        text::say(format!(
            "divergence {:.5} nats a token, 99% below {:.3}; same top token {:.2}%",
            s.divergence,
            s.divergence_p99,
            100.0 * s.top1_agreement
        ))?;
    }
    if let Some([before, after]) = &report.runs {
        let expected = report.expected_tokens_per_second.map_or(String::new(), |expected| {
            let off = 100.0 * (after.tokens_per_second / expected - 1.0);
            format!(" ({expected:.1} expected, {off:+.0}%)")
        });
        text::say(format!(
            "writes {:.1} tokens a second{expected}, before {:.1}; weights take {} in memory, before {}",
            after.tokens_per_second,
            before.tokens_per_second,
            text::bytes(after.weight_bytes),
            text::bytes(before.weight_bytes)
        ))?;
    }
    text::say(format!(
        "{}: {}, {:.2} bits a weight, {}; report in {}.json and .html",
        args.output.display(),
        text::bytes(report.bytes),
        report.bits_per_weight,
        text::duration(std::time::Duration::from_secs_f64(report.seconds)),
        report.output
    ))
}

/// What calibration saw, and the layers that had too little of it.
fn health(report: &Report) -> anyhow::Result<()> {
    let healths = || report.layers.iter().filter_map(|l| Some((l, l.health?)));
    let Some(worst) = healths().max_by(|a, b| a.1.condition.total_cmp(&b.1.condition)) else { return Ok(()) };
    let share = |(l, h): (&sparsam_quantize::stream::Layer, sparsam_quantize::stream::Health)| {
        h.rank / l.shape.last().copied().unwrap_or(1).max(1) as f64
    };
    let least = healths().map(share).fold(1.0, f64::min);
    text::say(format!(
        "calibration: {} tokens a layer; effective rank at least {:.1}% of the inputs; condition at most {:.1e} ({})",
        worst.1.tokens,
        100.0 * least,
        worst.1.condition,
        worst.0.name
    ))?;
    for l in report.layers.iter().filter(|l| l.fell_back() || l.dead_inputs > 0) {
        let mut what = Vec::new();
        if l.dead_inputs > 0 {
            what.push(format!("{} inputs never used", l.dead_inputs));
        }
        if let Some(h) = l.health.filter(|h| h.tokens < l.shape.last().copied().unwrap_or(0)) {
            what.push(format!("only {} tokens", h.tokens));
        }
        what.extend(l.raised_damping.map(|d| format!("damping raised to {d}")));
        let rows = l.error.map_or(0, |e| e.rows_nearest);
        if rows > 0 {
            what.push(format!("{rows} rows by nearest rounding"));
        }
        text::say(format!("{}: {}; --redo {} does it alone", l.name, what.join(", "), l.name))?;
    }
    Ok(())
}

/// Both models on the text.
///
/// # Errors
/// If a model does not load, or the text is too short.
pub fn score(args: &Args, opened: &Opened, path: &Path) -> anyhow::Result<Score> {
    let tokens = super::calibration::read(path, opened)?;
    let options = Options { threads: args.threads, exact: true, ..Options::default() };
    let parent = Engine::load(opened.source.path(), &options)?;
    let child = Engine::load(&args.output, &options)?;
    let bar = text::bar(0, "scoring");
    let protocol = scored(opened);
    let c = compare(&child, &parent, &tokens, &protocol, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        std::ops::ControlFlow::Continue(())
    })?;
    bar.finish_and_clear();
    let counts = (c.perplexity.chunks, c.perplexity.tokens_scored);
    Ok(Score {
        protocol: passport::measured(path, &protocol, opened, true, counts)?,
        perplexity_before: c.reference.perplexity,
        perplexity: c.perplexity.perplexity,
        standard_error: c.perplexity.error,
        divergence: c.divergence,
        divergence_p99: c.divergence_p99,
        top1_agreement: c.top1_agreement,
    })
}

/// Speed and memory of the parent and of the result.
///
/// # Errors
/// If a model does not load.
pub fn runs(args: &Args, opened: &Opened) -> anyhow::Result<[Runs; 2]> {
    let one = |path: &Path| -> anyhow::Result<Runs> {
        let (engine, work) = speaking(args, opened, path, SPOKEN)?;
        let timing = engine::bench(&engine, work, 3)?;
        Ok(Runs { tokens_per_second: timing.rate(), weight_bytes: engine.weights().bytes() })
    };
    Ok([one(opened.source.path())?, one(&args.output)?])
}

/// Seconds of a token that are no products with weights, measured with the parent.
///
/// # Errors
/// If it does not load.
pub fn beside_products(args: &Args, opened: &Opened) -> anyhow::Result<f64> {
    // Of a large model few tokens tell as much, and take as long.
    let large = opened.source.tensors().iter().map(|t| t.bytes_len()).sum::<usize>() > 1 << 30;
    let (tokens, repeat) = if large { (4, 1) } else { (SPOKEN, 3) };
    let (engine, work) = speaking(args, opened, opened.source.path(), tokens)?;
    Ok(engine::beside_products(&engine, work, repeat)?)
}

/// A model that is to write so many tokens.
fn speaking(args: &Args, opened: &Opened, path: &Path, tokens: usize) -> anyhow::Result<(Engine, Work)> {
    let tokens = tokens.min(opened.model.facts().context_length);
    let options = Options { threads: args.threads, context: Some(tokens), ..Options::default() };
    Ok((Engine::load(path, &options)?, Work::Generate { tokens, texts: 1 }))
}
