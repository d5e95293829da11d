//! Types for each tensor by a goal for the whole: a size, bits a weight, a memory limit, a divergence.

use super::Args;
use crate::text;
use anyhow::bail;
use sparsam_dtype::DType;
use sparsam_engine::{DEFAULT_CONTEXT, Opened};
use sparsam_quantize::Tokens;
use sparsam_quantize::budget::{self, Choice};
use sparsam_quantize::recipe::{self, TensorPlan};
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

/// The tensors' plan for the goal that `args` names.
pub fn plan(
    args: &Args,
    opened: &Opened,
    tokens: &Tokens,
    device: &Device,
) -> anyhow::Result<Vec<TensorPlan>> {
    let (source, model) = (&opened.source, &opened.model);
    let mut plan = recipe::plan_with(model, source, |_| DType::Q8_0)?;
    let weights: usize = plan.iter().map(TensorPlan::numel).sum();
    let head = head_bytes(opened)?;
    let bar = text::bar(1000, "measuring");
    let probe = &tokens.ids()[..PROBE_TOKENS.min(tokens.ctx())];
    let sensitivity = budget::sensitivity(source, model, device, &plan, probe, &mut |share, name| {
        bar.set_position((share * 1000.0) as u64);
        bar.set_message(name.to_string());
    })?;
    bar.finish_and_clear();
    let choices = budget::choices(source, &plan, &sensitivity)?;
    let limit = match (args.goal.size, args.goal.bits, args.goal.fit) {
        (Some(size), ..) => Some(size.saturating_sub(head)),
        (_, Some(bits), _) => Some((bits * weights as f64 / 8.0) as usize),
        (.., Some(fit)) => Some(fit.saturating_sub(room_beside(args, opened)?)),
        _ => None,
    };
    let line = pareto(&choices);
    if !args.json {
        text::say(line_table(&line, head, weights))?;
    }
    let chosen = match (limit, args.goal.kl) {
        (Some(limit), _) => budget::allocate(&choices, limit),
        (None, Some(goal)) => Some(for_divergence(goal, &choices, &mut |chosen| {
            let mut trial = plan.clone();
            set(&mut trial, &choices, chosen);
            Ok(budget::divergence_of(source, model, device, &trial, probe)?)
        })?),
        (None, None) => None,
    };
    let Some(chosen) = chosen else {
        let least: usize = choices.iter().filter_map(|c| c.iter().map(|c| c.bytes).min()).sum();
        let more = match args.goal.fit {
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
    if !args.json {
        text::say(allocation_table(&plan, &sensitivity))?;
    }
    let bytes: usize = plan.iter().map(TensorPlan::bytes).sum();
    let bits = 8.0 * bytes as f64 / weights as f64;
    if bits < FEW_BITS && !args.json {
        eprintln!(
            "note: {bits:.2} bits a weight; below {FEW_BITS} a smaller model of the family at {FEW_BITS} bits or more is usually better at the same size (Dettmers & Zettlemoyer 2023)"
        );
    }
    Ok(plan)
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

fn sums(choices: &[Vec<Choice>], chosen: &[usize]) -> (usize, f64) {
    let picked = || choices.iter().zip(chosen).map(|(c, &i)| c[i]);
    (picked().map(|c| c.bytes).sum(), picked().map(|c| c.loss).sum())
}

/// Bytes and expected divergence of the best mixtures at some sizes between the smallest and the largest.
fn pareto(choices: &[Vec<Choice>]) -> Vec<(usize, f64)> {
    let least: usize = choices.iter().filter_map(|c| c.iter().map(|c| c.bytes).min()).sum();
    let most: usize = choices.iter().filter_map(|c| c.iter().map(|c| c.bytes).max()).sum();
    let sizes = (0..POINTS).map(|i| least + (most - least) * i / (POINTS - 1));
    let mut line: Vec<(usize, f64)> =
        sizes.filter_map(|s| budget::allocate(choices, s)).map(|c| sums(choices, &c)).collect();
    line.dedup();
    line
}

fn line_table(line: &[(usize, f64)], head: usize, weights: usize) -> String {
    let rows: Vec<Vec<String>> = line
        .iter()
        .map(|(bytes, loss)| {
            let bits = 8.0 * *bytes as f64 / weights as f64;
            vec![text::bytes(bytes + head), format!("{bits:.2}"), format!("{loss:.4}")]
        })
        .collect();
    text::table(&["file", "bits a weight", "expected divergence (nearest codes)"], &rows)
}

/// The smallest mixture whose measured divergence stays within `goal`.
fn for_divergence(
    goal: f64,
    choices: &[Vec<Choice>],
    measure: &mut dyn FnMut(&[usize]) -> anyhow::Result<f64>,
) -> anyhow::Result<Vec<usize>> {
    let most: usize = choices.iter().filter_map(|c| c.iter().map(|c| c.bytes).max()).sum();
    // Divergences of single tensors do not quite add up: the ratio is measured.
    let (mut ratio, mut best): (f64, Option<Vec<usize>>) = (1.0, None);
    for _ in 0..4 {
        let fits =
            |limit: usize| budget::allocate(choices, limit).filter(|c| sums(choices, c).1 * ratio <= goal);
        let (mut low, mut high) = (0, most);
        if fits(most).is_none() {
            break;
        }
        while high - low > most / 1000 {
            let middle = (low + high) / 2;
            if fits(middle).is_some() { high = middle } else { low = middle }
        }
        let Some(chosen) = fits(high) else { break };
        let (bytes, expected) = sums(choices, &chosen);
        let measured = measure(&chosen)?;
        if measured <= goal && best.as_ref().is_none_or(|b| bytes < sums(choices, b).0) {
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
        let c = |bytes, loss| Choice { dtype: DType::Q8_0, bytes, loss };
        (1..20).map(|i| (1..5).map(|b| c(100 * b, i as f64 / (1 << (2 * b)) as f64)).collect()).collect()
    }

    /// Where divergences add up to three times what is expected, the goal is met all the same, and not by far.
    #[test]
    fn the_divergence_is_met_though_expectations_are_off() {
        let choices = choices();
        for goal in [2.5, 10.0, 40.0] {
            let mut seen = Vec::new();
            let chosen = for_divergence(goal, &choices, &mut |c| {
                seen.push(3.0 * sums(&choices, c).1);
                Ok(3.0 * sums(&choices, c).1)
            })
            .unwrap();
            let got = 3.0 * sums(&choices, &chosen).1;
            assert!(got <= goal && got > 0.6 * goal, "{goal}: {got}, tried {seen:?}");
        }
        let said = for_divergence(0.1, &choices, &mut |c| Ok(3.0 * sums(&choices, c).1)).unwrap_err();
        assert!(said.to_string().contains("larger --kl"), "{said}");
    }

    #[test]
    fn the_line_falls() {
        let line = pareto(&choices());
        assert!(line.len() >= 4);
        assert!(line.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 > w[1].1), "{line:?}");
    }
}
