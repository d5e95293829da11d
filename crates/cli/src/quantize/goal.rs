//! Types for each tensor by a goal for the whole: a size, bits a weight, a memory limit, a divergence, a speed.

use super::{Args, identity, kept, partial_folder, report};
use crate::text;
use anyhow::bail;
use sparsam_dtype::DType;
use sparsam_engine::{DEFAULT_CONTEXT, Opened};
use sparsam_quantize::Tokens;
use sparsam_quantize::budget::{self, Choice, Cost};
use sparsam_quantize::recipe::{self, TensorPlan};
use sparsam_quantize::speed::Speed;
use sparsam_runtime::Device;
use std::collections::BTreeMap;

/// Tokens on which it is measured what each tensor matters.
const PROBE_TOKENS: usize = 256;
/// What the passport's keys may take in the file.
const PASSPORT_BYTES: usize = 4096;
/// What `run` takes beside weights and cache.
const RUN_BYTES: usize = 80_000_000;
/// Points of the line of best sizes.
const POINTS: usize = 8;

/// Below so many bits a weight, a smaller model at more bits does better.
const FEW_BITS: f64 = 4.0;

/// What a goal comes to.
pub struct Chosen {
    /// The type of each tensor.
    pub plan: Vec<TensorPlan>,
    /// Tokens a second that the result is expected to write.
    pub tokens_per_second: f64,
}

/// The tensors' plan for the goal that `args` names.
pub fn plan(args: &Args, opened: &Opened, tokens: &Tokens, device: &Device) -> anyhow::Result<Chosen> {
    let (source, model) = (&opened.source, &opened.model);
    let mut plan = recipe::plan_with(model, source, |_| DType::Q8_0)?;
    let weights: usize = plan.iter().map(TensorPlan::numel).sum();
    let head = head_bytes(opened)?;
    let key = identity(args, &[], source.path(), Some(tokens))?;
    let key = args.goal.speed.filter(|_| !args.dry_run).map(|s| format!("{s} {} {key}", device.threads()));
    if let Some(chosen) =
        key.as_ref().and_then(|key| kept::kept(&partial_folder(&args.output), key, plan.clone()))
    {
        if !args.json {
            text::say("going on with the types that the run before has chosen")?;
        }
        return Ok(chosen);
    }
    let bar = text::bar(1000, "measuring");
    let beside = report::beside_products(args, opened)?;
    let speed = Speed::measure(device, model, &plan, beside)?;
    let probe = &tokens.ids()[..PROBE_TOKENS.min(tokens.ctx())];
    let sensitivity = budget::sensitivity(source, model, device, &plan, probe, &mut |share, name| {
        bar.set_position((share * 1000.0) as u64);
        bar.set_message(name.to_string());
    })?;
    bar.finish_and_clear();
    let choices = budget::choices(source, &plan, &sensitivity, &speed)?;
    let goal = &args.goal;
    let bytes = match (goal.size, goal.bits, goal.fit) {
        (Some(size), ..) => Some(size.saturating_sub(head)),
        (_, Some(bits), _) => Some((bits * weights as f64 / 8.0) as usize),
        (.., Some(fit)) => Some(fit.saturating_sub(room_beside(args, opened)?)),
        _ => None,
    };
    let limit = match (bytes, goal.speed) {
        (Some(bytes), _) => Some((bytes as f64, Cost::Bytes)),
        (None, Some(goal)) => Some((speed.for_products(goal), Cost::Seconds)),
        (None, None) => None,
    };
    let line = pareto(&choices, limit.map_or(Cost::Bytes, |(_, cost)| cost));
    if !args.json {
        text::say(line_table(&line, head, weights, &speed))?;
    }
    let chosen = match (limit, goal.kl) {
        (Some((limit, cost)), _) => budget::allocate(&choices, limit, cost),
        (None, Some(goal)) => Some(for_divergence(goal, &choices, &mut |chosen| {
            let mut trial = plan.clone();
            set(&mut trial, &choices, chosen);
            Ok(budget::divergence_of(source, model, device, &trial, probe)?)
        })?),
        (None, None) => None,
    };
    let Some(chosen) = chosen else {
        if let Some(goal) = goal.speed {
            let most = speed.tokens_per_second(Cost::Seconds.least(&choices));
            bail!(
                "no mixture of the known types writes {goal} tokens a second here: the fastest of this model is expected to write {most:.1}; give --speed {} or less, or a smaller model",
                two_digits(most)
            );
        }
        let least = Cost::Bytes.least(&choices) as usize;
        let more = match goal.fit {
            Some(_) => least + room_beside(args, opened)?,
            None => least + head,
        };
        bail!(
            "the smallest file of this model that can be written takes {}; give {} or more",
            text::bytes(least + head),
            text::bytes(more)
        );
    };
    set(&mut plan, &choices, &chosen);
    let tokens_per_second = speed.tokens_per_second(Point::of(&choices, &chosen).seconds);
    if !args.json {
        text::say(allocation_table(&plan, &sensitivity))?;
        text::say(format!("expected to write {tokens_per_second:.1} tokens a second here"))?;
    }
    let bytes: usize = plan.iter().map(TensorPlan::bytes).sum();
    let bits = 8.0 * bytes as f64 / weights as f64;
    if bits < FEW_BITS && !args.json {
        eprintln!(
            "note: {bits:.2} bits a weight; below {FEW_BITS} a smaller model of the family at {FEW_BITS} bits or more is usually better at the same size (Dettmers & Zettlemoyer 2023)"
        );
    }
    let chosen = Chosen { plan, tokens_per_second };
    if let Some(key) = key {
        kept::keep(&partial_folder(&args.output), &key, &chosen)?;
    }
    Ok(chosen)
}

/// `speed` rounded down to two digits: what can be asked for.
fn two_digits(speed: f64) -> String {
    let power = speed.max(f64::MIN_POSITIVE).log10().floor();
    let unit = 10f64.powf(power - 1.0);
    format!("{:.*}", (1.0 - power).max(0.0) as usize, (speed / unit).floor() * unit)
}

/// Bytes of the file that are no tensors: names, shapes, the vocabulary, the passport.
fn head_bytes(opened: &Opened) -> anyhow::Result<usize> {
    let source = &opened.source;
    if source.gguf_metadata().is_some() {
        // They take what they take in the source.
        let stored: usize = source.tensors().iter().map(|t| t.bytes_len().next_multiple_of(32)).sum();
        return Ok((std::fs::metadata(source.path())?.len() as usize).saturating_sub(stored) + PASSPORT_BYTES);
    }
    /// Of a name, shape and offset.
    const TENSOR: usize = 96;
    let mut bytes = source.tensors().len() * TENSOR + PASSPORT_BYTES;
    if let Some(tokenizer) = &opened.tokenizer {
        let vocab = tokenizer.to_gguf(opened.model.facts().vocab_size)?;
        let strings = vocab.tokens.iter().chain(&vocab.merges);
        bytes +=
            strings.map(|s| s.len() + 8).sum::<usize>() + 4 * (vocab.token_types.len() + vocab.scores.len());
        bytes += vocab.chat_template.map_or(0, |t| t.len());
    }
    Ok(bytes)
}

/// Bytes at run time that are no weights.
fn room_beside(args: &Args, opened: &Opened) -> anyhow::Result<usize> {
    let facts = opened.model.facts();
    let ctx = args.ctx.unwrap_or(facts.context_length.min(DEFAULT_CONTEXT));
    if ctx > facts.context_length {
        bail!("--ctx {ctx}: the model was made for {} tokens", facts.context_length);
    }
    let cache = facts.cache_bytes_per_token(DType::F16).unwrap_or(0) * ctx;
    Ok(cache + RUN_BYTES)
}

fn set(plan: &mut [TensorPlan], choices: &[Vec<Choice>], chosen: &[usize]) {
    for (i, p) in plan.iter_mut().enumerate() {
        p.to = choices[i][chosen[i]].dtype;
        p.wanted = None;
    }
}

/// What a mixture takes and loses.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    bytes: usize,
    seconds: f64,
    loss: f64,
}

impl Point {
    fn of(choices: &[Vec<Choice>], chosen: &[usize]) -> Point {
        let picked = || choices.iter().zip(chosen).map(|(c, &i)| c[i]);
        Point {
            bytes: picked().map(|c| c.bytes).sum(),
            seconds: picked().map(|c| c.seconds).sum(),
            loss: picked().map(|c| c.loss).sum(),
        }
    }
}

/// The best mixtures at some costs between the least and the most.
fn pareto(choices: &[Vec<Choice>], cost: Cost) -> Vec<Point> {
    let (least, most) = (cost.least(choices), cost.most(choices));
    // A little above the least, which its own sum may miss by a rounding.
    let costs = (0..POINTS).map(|i| least * (1.0 + 1e-9) + (most - least) * i as f64 / (POINTS - 1) as f64);
    let mut line: Vec<Point> = costs
        .filter_map(|limit| budget::allocate(choices, limit, cost))
        .map(|c| Point::of(choices, &c))
        .collect();
    line.dedup();
    line
}

fn line_table(line: &[Point], head: usize, weights: usize, speed: &Speed) -> String {
    let rows: Vec<Vec<String>> = line
        .iter()
        .map(|p| {
            let bits = 8.0 * p.bytes as f64 / weights as f64;
            vec![
                text::bytes(p.bytes + head),
                format!("{bits:.2}"),
                format!("{:.1}", speed.tokens_per_second(p.seconds)),
                format!("{:.4}", p.loss),
            ]
        })
        .collect();
    text::table(&["file", "bits a weight", "tokens/s", "expected divergence (nearest codes)"], &rows)
}

/// The smallest mixture whose measured divergence stays within `goal`.
fn for_divergence(
    goal: f64,
    choices: &[Vec<Choice>],
    measure: &mut dyn FnMut(&[usize]) -> anyhow::Result<f64>,
) -> anyhow::Result<Vec<usize>> {
    let most = Cost::Bytes.most(choices) as usize;
    // Divergences of single tensors do not quite add up: the ratio is measured.
    let (mut ratio, mut best): (f64, Option<Vec<usize>>) = (1.0, None);
    for _ in 0..4 {
        let fits = |limit: usize| {
            budget::allocate(choices, limit as f64, Cost::Bytes)
                .filter(|c| Point::of(choices, c).loss * ratio <= goal)
        };
        let (mut low, mut high) = (0, most);
        if fits(most).is_none() {
            break;
        }
        while high - low > most / 1000 {
            let middle = (low + high) / 2;
            if fits(middle).is_some() { high = middle } else { low = middle }
        }
        let Some(chosen) = fits(high) else { break };
        let Point { bytes, loss: expected, .. } = Point::of(choices, &chosen);
        let measured = measure(&chosen)?;
        if measured <= goal && best.as_ref().is_none_or(|b| bytes < Point::of(choices, b).bytes) {
            best = Some(chosen);
        }
        let next = measured / expected.max(f64::MIN_POSITIVE);
        if (next / ratio - 1.0).abs() < 0.05 && best.is_some() {
            break;
        }
        // A little more than measured, so that the next one is within the goal.
        ratio = next * 1.02;
    }
    match best {
        Some(chosen) => Ok(chosen),
        None => {
            bail!("no mixture of the known types stays within a divergence of {goal}; give a larger --kl")
        }
    }
}

/// What went where: types and divergences by kind of tensor.
fn allocation_table(plan: &[TensorPlan], sensitivity: &[f64]) -> String {
    let mut kinds: Vec<(String, f64, BTreeMap<DType, usize>)> = Vec::new();
    for (p, &kl) in plan.iter().zip(sensitivity).filter(|(p, _)| p.to.is_block()) {
        let kind = match p.gguf_name.strip_prefix("blk.").and_then(|n| n.split_once('.')) {
            Some((_, kind)) => kind.to_string(),
            None => p.gguf_name.clone(),
        };
        let at = kinds.iter().position(|k| k.0 == kind).unwrap_or_else(|| {
            kinds.push((kind, 0.0, BTreeMap::new()));
            kinds.len() - 1
        });
        kinds[at].1 += kl;
        *kinds[at].2.entry(p.to).or_default() += 1;
    }
    let rows: Vec<Vec<String>> = kinds
        .into_iter()
        .map(|(kind, kl, types)| {
            let types: Vec<String> = types.iter().map(|(t, n)| format!("{n} {t}")).collect();
            vec![kind, format!("{kl:.4}"), types.join(", ")]
        })
        .collect();
    text::table(&["tensors", "divergence at 3 bits", "types"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choices() -> Vec<Vec<Choice>> {
        // 100 to 400 bytes take 1, 2, 2 and 3 seconds.
        let c = |bytes: usize, loss| Choice {
            dtype: DType::Q8_0,
            bytes,
            loss,
            seconds: (bytes / 200) as f64 + 1.0,
        };
        (1..20).map(|i| (1..5).map(|b| c(100 * b, i as f64 / (1 << (2 * b)) as f64)).collect()).collect()
    }

    /// Where divergences add up to three times what is expected, the goal is met all the same, and not by far.
    #[test]
    fn the_divergence_is_met_though_expectations_are_off() {
        let choices = choices();
        for goal in [2.5, 10.0, 40.0] {
            let mut seen = Vec::new();
            let chosen = for_divergence(goal, &choices, &mut |c| {
                seen.push(3.0 * Point::of(&choices, c).loss);
                Ok(3.0 * Point::of(&choices, c).loss)
            })
            .unwrap();
            let got = 3.0 * Point::of(&choices, &chosen).loss;
            assert!(got <= goal && got > 0.6 * goal, "{goal}: {got}, tried {seen:?}");
        }
        let said = for_divergence(0.1, &choices, &mut |c| Ok(3.0 * Point::of(&choices, c).loss)).unwrap_err();
        assert!(said.to_string().contains("larger --kl"), "{said}");
    }

    #[test]
    fn the_line_falls() {
        let line = pareto(&choices(), Cost::Bytes);
        assert!(line.len() >= 4);
        assert!(line.windows(2).all(|w| w[0].bytes < w[1].bytes && w[0].loss > w[1].loss), "{line:?}");
        let line = pareto(&choices(), Cost::Seconds);
        assert!(line.len() >= 4);
        assert!(line.windows(2).all(|w| w[0].seconds < w[1].seconds && w[0].loss > w[1].loss), "{line:?}");
    }

    #[test]
    fn what_can_be_asked_for_is_below() {
        for (most, said) in [(123.4, "120"), (20.04, "20"), (9.87, "9.8"), (0.0567, "0.056")] {
            assert_eq!(two_digits(most), said);
        }
    }
}
