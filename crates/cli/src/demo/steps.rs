//! The demo's steps: what each runs, and what it shows of the answers.

use super::{Saving, Stage, half, number, texts};
use anyhow::Context;
use serde_json::{Value, json};
use sparsam_plan::hardware::Catalogue;
use sparsam_plan::law::Law;
use sparsam_plan::plot::{Axis, Form, Plot, Series, Unit};
use sparsam_plan::shape;
use sparsam_plan::units::{show_bytes, show_count, show_seconds, show_usd, three};

/// A step: its name, and what makes it.
pub type Step = fn(&mut Stage) -> anyhow::Result<Saving>;

/// All, in order. Later ones use what earlier ones made.
pub const ALL: [(&str, Step); 7] = [
    ("plan: the size that a budget is worth", plan),
    ("train: the compiler", train),
    ("train: attention in tiles", attention),
    ("round: fewer bits a weight", round),
    ("adapt: a rounded model learns", adapt),
    ("distil: half the size learns from the whole", distil),
    ("run: original and rounded", run),
];

fn percent(x: f64) -> String {
    format!("{:.1}%", 100.0 * x)
}

fn times(x: f64) -> String {
    format!("{}x", three(x))
}

/// GPT-3 as it was trained, and the cheapest model that the law expects to reach its loss.
fn plan(stage: &mut Stage) -> anyhow::Result<Saving> {
    stage.ask(&["plan", "train", "--params", "175B", "--tokens", "300B", "--hardware", "h100"])?;
    let (law, tokens) = (Law::BESIROGLU, 300e9);
    let parameters = shape::by_name("gpt-3")?.parameters().total();
    let (loss, flop) = (law.loss(parameters, tokens), 6.0 * parameters * tokens);
    // The loss of the best model falls with the budget: halve the interval until it is that loss.
    let (mut low, mut high) = (1e18f64.ln(), flop.ln());
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        let best = law.optimum(middle.exp());
        if law.loss(best.parameters, best.tokens) > loss { low = middle } else { high = middle }
    }
    let best = law.optimum(high.exp());
    let hardware = Catalogue::embedded();
    let h100 = hardware.get("h100")?;
    let usd = |flop: f64| h100.bill(flop, 1.0, 1.2).usd;
    // Sizes that cost up to five times the least.
    let curve: Vec<(f64, f64)> = (0..80)
        .map(|i| parameters / 100.0 * 1.1f64.powi(i))
        .filter_map(|n| Some((n, usd(6.0 * n * law.tokens_for_loss(n, loss)?))))
        .filter(|(_, dollars)| *dollars < 5.0 * usd(best.flop()))
        .collect();
    let plot = Plot {
        title: format!("Plan: dollars to reach GPT-3's expected loss ({}) by size", three(loss)),
        x: Axis::log("parameters", Unit::Count),
        y: Axis::log("dollars on H100s", Unit::Usd),
        series: vec![Series { name: String::new(), colour: 0, form: Form::Line(curve) }],
        marks: vec![],
    };
    Ok(Saving {
        name: "plan",
        source: "Hoffmann et al. 2022 (Chinchilla), with the fit of Besiroglu et al. 2024",
        before: format!(
            "{} parameters, {} tokens: {}",
            show_count(parameters),
            show_count(tokens),
            show_usd(usd(flop))
        ),
        after: format!(
            "{} parameters, {} tokens: {}",
            show_count(best.parameters),
            show_count(best.tokens),
            show_usd(usd(best.flop()))
        ),
        saved: format!("{} of the arithmetic", percent(1.0 - best.flop() / flop)),
        cost: format!("nothing: the same expected loss, {}", three(loss)),
        plots: vec![plot],
        figures: json!({
            "flop_before": flop, "flop_after": best.flop(), "parameters_after": best.parameters,
            "usd_before": usd(flop), "usd_after": usd(best.flop()), "loss": loss,
        }),
    })
}

/// One step of training, node by node and compiled.
fn train(stage: &mut Stage) -> anyhow::Result<Saving> {
    let threads = stage.threads.clone();
    let line = [
        "bench",
        "train",
        "--arch",
        "llama",
        "--size",
        "3M",
        "--vocab",
        "2048",
        "--batch",
        "8",
        "--seq",
        "256",
        "--threads",
        &threads,
    ];
    let eager = stage.ask(&[&line[..], &["--eager"]].concat())?;
    let compiled = stage.ask(&line)?;
    let of = |key: &str| anyhow::Ok((number(&eager, key)?, number(&compiled, key)?));
    let (speed, memory, loss) = (of("tokens_per_second")?, of("planned_bytes")?, of("loss")?);
    let kernels = of("kernels")?;
    Ok(Saving {
        name: "compile",
        source: "Ansel et al. 2024 (PyTorch 2)",
        before: format!("{:.0} tokens/s, {}, {} kernels", speed.0, show_bytes(memory.0), kernels.0),
        after: format!("{:.0} tokens/s, {}, {} kernels", speed.1, show_bytes(memory.1), kernels.1),
        saved: format!(
            "{} as fast, {} of the memory",
            times(speed.1 / speed.0),
            percent(memory.1 / memory.0)
        ),
        cost: format!("the same loss: {:.5} and {:.5}", loss.0, loss.1),
        plots: vec![],
        figures: json!({"eager": eager, "compiled": compiled}),
    })
}

/// Attention alone, forward and backward, with the whole matrix of scores and in tiles.
fn attention(stage: &mut Stage) -> anyhow::Result<Saving> {
    let (threads, lengths) = (stage.threads.clone(), stage.either("128,256", "256,512,1024,2048"));
    let answer = stage.ask(&[
        "bench",
        "attention",
        "--seq",
        lengths,
        "--heads",
        "8",
        "--dim",
        "64",
        "--what",
        "fwdbwd",
        "-r",
        "1",
        "--threads",
        &threads,
    ])?;
    let rows = answer.as_array().context("one row a length")?;
    let points = |key: &str| -> Vec<(f64, f64)> {
        rows.iter().filter_map(|r| Some((r["seq"].as_f64()?, r[key].as_f64()?))).collect()
    };
    let last = rows.last().context("one row a length")?;
    let (seconds, plain) = (number(last, "seconds")?, number(last, "plain_seconds")?);
    let (bytes, plain_bytes) = (number(last, "peak_bytes")?, number(last, "plain_peak_bytes")?);
    let seq = number(last, "seq")?;
    let plot = |title: &str, y: Axis, plain: &str, tiled: &str| Plot {
        title: title.into(),
        x: Axis::log("tokens", Unit::Count),
        y,
        series: vec![
            Series { name: "whole matrix".into(), colour: 1, form: Form::Line(points(plain)) },
            Series { name: "tiles".into(), colour: 0, form: Form::Line(points(tiled)) },
        ],
        marks: vec![],
    };
    Ok(Saving {
        name: "attention",
        source: "Dao et al. 2022, Dao 2023 (FlashAttention 1, 2)",
        before: format!("{} tokens: {}, {}", seq, show_seconds(plain), show_bytes(plain_bytes)),
        after: format!("{} tokens: {}, {}", seq, show_seconds(seconds), show_bytes(bytes)),
        saved: format!("{} as fast, {} of the memory", times(plain / seconds), percent(bytes / plain_bytes)),
        cost: "nothing: the same numbers but for rounding".into(),
        plots: vec![
            plot(
                "Attention: seconds by length",
                Axis::log("seconds", Unit::Plain),
                "plain_seconds",
                "seconds",
            ),
            plot(
                "Attention: memory by length",
                Axis::log("bytes", Unit::Bytes),
                "plain_peak_bytes",
                "peak_bytes",
            ),
        ],
        figures: answer,
    })
}

/// Text of the model's own, so that any model brings what it is calibrated and measured on.
fn sample(stage: &mut Stage) -> anyhow::Result<()> {
    let (model, threads) = (stage.model.to_string_lossy().to_string(), stage.threads.clone());
    let (wanted, mut tokens) = (stage.either(600.0, 4000.0), 0.0);
    let mut samples = Vec::new();
    // Short answers are followed by more, from the same beginnings with other seeds.
    for (i, beginning) in texts::BEGINNINGS.iter().cycle().take(64).enumerate() {
        let seed = (i + 1).to_string();
        let words = [
            "run",
            &model,
            beginning,
            "--raw",
            "-n",
            "200",
            "--temperature",
            "1",
            "--top-k",
            "0",
            "--top-p",
            "1",
            "--min-p",
            "0",
            "--seed",
            &seed,
            "--threads",
            &threads,
        ];
        let answer = if i == 0 { stage.ask(&words)? } else { stage.ask_again(&words)? };
        samples.push(format!("{beginning}{}", answer["text"].as_str().unwrap_or_default()));
        tokens += number(&answer, "generated_tokens")?;
        if tokens >= wanted {
            break;
        }
    }
    eprintln!("    and so on, with other beginnings and seeds: {} texts", samples.len());
    // Every second one to calibrate, the others to measure.
    let part = |from: usize| samples.iter().skip(from).step_by(2).cloned().collect::<Vec<_>>().join("\n\n");
    stage.write("calibration.txt", &part(0))?;
    stage.write("other.txt", &part(1))
}

/// The name of the rounded model.
const SMALL: &str = "small.gguf";

/// The model in about 4.5 bits a weight, by nearest codes and with errors made up for.
fn round(stage: &mut Stage) -> anyhow::Result<Saving> {
    sample(stage)?;
    let (model, threads) = (stage.model.to_string_lossy().to_string(), stage.threads.clone());
    let gptq = stage.ask(&[
        "quantize",
        &model,
        "-o",
        SMALL,
        "--type",
        "Q4_0",
        "--calibration",
        "calibration.txt",
        "--samples",
        "16",
        "--ctx",
        "32",
        "--threads",
        &threads,
    ])?;
    stage.ask(&[
        "quantize",
        &model,
        "-o",
        "nearest.gguf",
        "--type",
        "Q4_0",
        "--method",
        "nearest",
        "--threads",
        &threads,
    ])?;
    let mut against = |name: &str| {
        stage.ask(&[
            "eval",
            name,
            "--perplexity",
            "other.txt",
            "--against",
            &model,
            "--ctx",
            "128",
            "--threads",
            &threads,
        ])
    };
    let (scored, nearest) = (against(SMALL)?, against("nearest.gguf")?);
    let before = std::fs::metadata(&stage.model)?.len() as f64;
    let after = stage.bytes(SMALL)?;
    let perplexity = (number(&scored, "reference_perplexity")?, number(&scored, "perplexity")?);
    Ok(Saving {
        name: "round",
        source: "Frantar et al. 2023 (GPTQ)",
        before: format!("{}, perplexity {:.3}", show_bytes(before), perplexity.0),
        after: format!(
            "{} ({:.2} bits a weight), perplexity {:.3}",
            show_bytes(after),
            number(&gptq, "bits_per_weight")?,
            perplexity.1
        ),
        saved: format!("{} of the file", percent(1.0 - after / before)),
        cost: format!(
            "{:.4} nats a token from the original ({:.4} by nearest rounding)",
            number(&scored, "divergence")?,
            number(&nearest, "divergence")?
        ),
        plots: vec![],
        figures: json!({"bytes_before": before, "bytes_after": after, "scored": scored, "nearest": nearest}),
    })
}

/// The rounded model learns a manner with adapters; all weights of the original would need this much memory.
fn adapt(stage: &mut Stage) -> anyhow::Result<Saving> {
    stage.write("manner.jsonl", &texts::manner(240))?;
    let (model, threads) = (stage.model.to_string_lossy().to_string(), stage.threads.clone());
    let common =
        ["--data", "manner.jsonl", "--fields", "question,answer", "--ctx", "64", "--threads", &threads];
    let full = stage.ask(&[&["finetune", &model, "--method", "full", "--dry-run"], &common[..]].concat())?;
    let lora =
        [&["finetune", SMALL, "--rank", "8", "--epochs", "4", "--out", "adapted"], &common[..]].concat();
    let needs = stage.ask(&[&lora[..], &["--dry-run"]].concat())?;
    let done = stage.ask(&lora)?;
    let held = |m: &Value| anyhow::Ok(number(m, "memory.weights")? + number(m, "memory.optimiser")?);
    let (before, after) = (held(&full)?, held(&needs)?);
    let (steps, held_back) = losses(stage, "adapted/metrics.jsonl")?;
    let first = held_back.first().or(steps.first()).map_or(f64::NAN, |p| p.1);
    let loss = number(&done, "held_back_loss")?;
    let plot = Plot {
        title: "Adapt: loss on answers in the new manner".into(),
        x: Axis::linear("step"),
        y: Axis::linear("loss, nats a token"),
        series: vec![
            Series { name: "training".into(), colour: 0, form: Form::Line(steps) },
            Series { name: "held back".into(), colour: 1, form: Form::Points(held_back) },
        ],
        marks: vec![],
    };
    Ok(Saving {
        name: "adapt",
        source: "Dettmers et al. 2023 (QLoRA), Hu et al. 2021 (LoRA)",
        before: format!("all weights and moments: {}", show_bytes(before)),
        after: format!("rounded weights, adapters and moments: {}", show_bytes(after)),
        saved: format!("{} of that memory", percent(1.0 - after / before)),
        cost: format!("loss on new answers {} -> {}", three(first), three(loss)),
        plots: vec![plot],
        figures: json!({"full": full, "adapters": needs, "run": done, "first_loss": first}),
    })
}

/// (step, loss) of a run's steps and of its evaluations.
#[allow(clippy::type_complexity)]
fn losses(stage: &Stage, name: &str) -> anyhow::Result<(Vec<(f64, f64)>, Vec<(f64, f64)>)> {
    let text = std::fs::read_to_string(stage.folder.join(name)).with_context(|| name.to_string())?;
    let lines: Vec<Value> = text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let of = |key: &str| lines.iter().filter_map(|l| Some((l["step"].as_f64()?, l[key].as_f64()?))).collect();
    Ok((of("loss"), of("held_back_loss")))
}

/// A student of half the depth learns the model's answers and reasons; beside it one that learns answers alone.
fn distil(stage: &mut Stage) -> anyhow::Result<Saving> {
    let (questions, epochs) = stage.either((60, "2"), (600, "10"));
    stage.write("sums.jsonl", &texts::sums(questions))?;
    stage.write("template.toml", texts::TEMPLATE)?;
    let (model, threads) = (stage.model.to_string_lossy().to_string(), stage.threads.clone());
    stage.ask(&[
        "distill",
        "ask",
        "sums.jsonl",
        "--teacher",
        &model,
        "--template",
        "template.toml",
        "--raw",
        "--max-tokens",
        "40",
        "--ctx",
        "128",
        "--parallel",
        "16",
        "--out",
        "answers.jsonl",
        "--threads",
        &threads,
    ])?;
    let opened = sparsam_engine::open(&stage.model)?;
    let (parameters, of) = half::write(&opened, &stage.folder.join("half.gguf"))?;
    drop(opened);
    for variant in ["rationale-first", "label-only"] {
        stage.ask(&[
            "distill",
            "teach",
            "half.gguf",
            "--answers",
            "answers.jsonl",
            "--template",
            "template.toml",
            "--variant",
            variant,
            "--held-back",
            "0.2",
            "--epochs",
            epochs,
            "--lr",
            "1e-3",
            "--step-tokens",
            "512",
            "--out",
            variant,
            "--threads",
            &threads,
        ])?;
    }
    let answer = stage.ask(&[
        "distill",
        "eval",
        "sums.jsonl",
        "--template",
        "template.toml",
        "--held-back",
        "0.2",
        "--max-tokens",
        "40",
        "--ctx",
        "128",
        "--model",
        "student=rationale-first",
        "--model",
        "label-only",
        "--answers",
        "teacher=answers.jsonl",
        "--threads",
        &threads,
    ])?;
    let right = |i: usize| number(&answer, &format!("contenders.{i}.accuracy"));
    let (student, control, teacher) = (right(0)?, right(1)?, right(2)?);
    let (steps, _) = losses(stage, "rationale-first/metrics.jsonl")?;
    let plot = Plot {
        title: "Distil: the student's loss on the teacher's answers and reasons".into(),
        x: Axis::linear("step"),
        y: Axis::linear("loss, nats a token"),
        series: vec![Series { name: String::new(), colour: 0, form: Form::Line(steps) }],
        marks: vec![],
    };
    Ok(Saving {
        name: "distil",
        source: "Hsieh et al. 2023 (distilling step-by-step), Sanh et al. 2019 (every second block)",
        before: format!("{} parameters, {} of new sums right", show_count(of as f64), percent(teacher)),
        after: format!("{} parameters, {} right", show_count(parameters as f64), percent(student)),
        saved: format!("{} of the parameters", percent(1.0 - parameters as f64 / of as f64)),
        cost: format!("taught answers without reasons: {} right", percent(control)),
        plots: vec![plot],
        figures: json!({
            "parameters_before": of, "parameters_after": parameters, "teacher": teacher, "student": student,
            "label_only": control,
        }),
    })
}

/// Generation with the original node by node, and with the rounded model compiled.
fn run(stage: &mut Stage) -> anyhow::Result<Saving> {
    let (model, threads) = (stage.model.to_string_lossy().to_string(), stage.threads.clone());
    let common = ["-p", "64", "-n", "64", "-r", "2", "--threads", &threads];
    let before = stage.ask(&[&["bench", &model, "--eager"], &common[..]].concat())?;
    let after = stage.ask(&[&["bench", SMALL], &common[..]].concat())?;
    let of = |key: &str| {
        let key = format!("{key}.tokens_per_second");
        anyhow::Ok((number(&before, &key)?, number(&after, &key)?))
    };
    let (generate, prompt) = (of("tg64")?, of("pp64")?);
    let bytes = (number(&before, "bytes_per_token")?, number(&after, "bytes_per_token")?);
    Ok(Saving {
        name: "run",
        source: "all of the above",
        before: format!("{:.0} tokens/s, {} read a token", generate.0, show_bytes(bytes.0)),
        after: format!("{:.0} tokens/s, {} read a token", generate.1, show_bytes(bytes.1)),
        saved: format!("{} as fast; prompts {}", times(generate.1 / generate.0), times(prompt.1 / prompt.0)),
        cost: "that of rounding, above".into(),
        plots: vec![],
        figures: json!({"before": before, "after": after}),
    })
}
