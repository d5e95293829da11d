//! An adapter merged into the weights: one model, as fast as its base, in any type that the format holds.

use crate::runner::Want;
use crate::{Engine, Error, Feed, Opened, Plan, Request, Sampling, Saver, TrainedAdapter, adapter, generate};
use sparsam_dtype::{DType, codec};
use sparsam_formats::Kind;
use sparsam_tokenizer::Message;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Merged {
    /// Layers that the adapters changed.
    pub layers: usize,
    /// What other programs will do differently with the file, a sentence each.
    pub notes: Vec<String>,
}

/// Writes `opened` with the adapters of these folders added to its weights: `W + weight * scale * B A`, a tensor at a
/// time, each in the type that `plan` says.
///
/// # Errors
/// If an adapter belongs to another model, or the file cannot be written; nothing is at `out` then.
pub fn merge(
    opened: &Opened,
    adapters: &[(PathBuf, f64)],
    out: &Path,
    kind: Kind,
    plan: &Plan,
) -> Result<Merged, Error> {
    adapter::replay(adapters, opened.tokenizer.as_ref())?;
    let mut read = Vec::new();
    for (folder, weight) in adapters {
        read.push((TrainedAdapter::open(folder)?, *weight, folder));
    }
    opened.model.clone().with_adapters(read.iter().map(|(a, ..)| a.adapter.clone()).collect())?;
    let mut saver = Saver::create(out, kind, &opened.model, opened.tokenizer.as_ref(), plan)?;
    let mut layers = 0;
    for spec in opened.model.weights(&opened.source)? {
        let tensor = opened.source.require(&spec.source_name)?;
        let turned = spec.transform.apply(tensor.bytes, tensor.info.dtype, &tensor.info.shape)?;
        let module = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
        let here: Vec<_> = read.iter().filter(|(a, ..)| a.adapter.modules().contains_key(module)).collect();
        if here.is_empty() {
            saver.append(&spec.name, &spec.shape, turned.dtype, &turned.bytes)?;
        } else {
            let mut w = vec![0f32; spec.shape.iter().product()];
            codec::decode(turned.dtype, &turned.bytes, &mut w)
                .map_err(|e| Error::Save { path: out.to_path_buf(), what: format!("{}: {e}", spec.name) })?;
            for (a, weight, folder) in here {
                add(&mut w, &spec.shape, a, module, *weight).ok_or_else(|| Error::Adapter {
                    file: (*folder).clone(),
                    what: format!("{module} has another shape in this model"),
                })?;
            }
            let bytes: Vec<u8> = w.iter().flat_map(|x| x.to_le_bytes()).collect();
            saver.append(&spec.name, &spec.shape, DType::F32, &bytes)?;
            layers += 1;
        }
        drop(turned);
        opened.source.release(&spec.source_name);
    }
    let notes = saver.notes().to_vec();
    saver.finish()?;
    Ok(Merged { layers, notes })
}

/// `w += weight * scale * B A`; `None` if the shapes do not fit.
fn add(w: &mut [f32], shape: &[usize], a: &TrainedAdapter, module: &str, weight: f64) -> Option<()> {
    let of = |name: &String| a.weights.iter().find(|(n, ..)| n == name);
    let [a_name, b_name] = a.adapter.names(module);
    let ((_, a_shape, a_values), (_, b_shape, b_values)) = (of(&a_name)?, of(&b_name)?);
    let (&[n_out, n_in], scale) = (shape, a.adapter.modules().get(module)?.scale * weight) else {
        return None;
    };
    let rank = a_shape[0];
    if a_shape[1] != n_in || *b_shape != [n_out, rank] {
        return None;
    }
    let mut row = vec![0f64; n_in];
    for (w, b) in w.chunks_exact_mut(n_in).zip(b_values.chunks_exact(rank)) {
        row.fill(0.0);
        for (a, b) in a_values.chunks_exact(n_in).zip(b) {
            let factor = *b as f64 * scale;
            row.iter_mut().zip(a).for_each(|(r, a)| *r += factor * *a as f64);
        }
        w.iter_mut().zip(&row).for_each(|(w, r)| *w = (*w as f64 + r) as f32);
    }
    Some(())
}

/// How far a model's predictions are from another's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergence {
    /// Mean Kullback-Leibler divergence from the reference, nats a token.
    pub kl: f64,
    /// Share of the tokens for which both think the same one likeliest.
    pub agreement: f64,
    /// Tokens measured.
    pub tokens: usize,
}

/// What the texts to measure on begin with.
const PROMPTS: [&str; 4] = [
    "Explain in a few sentences how a bridge carries its load.",
    "Tom has 12 apples, eats 3 and buys 5 more. How many does he have?",
    "Write a short letter to a friend about the last week.",
    "Which planet is the largest, and why?",
];
/// Tokens of each text.
const TEXT_TOKENS: usize = 96;

/// How far `others` are from `reference`, on texts that the reference writes itself (at temperature 1, always the same).
///
/// # Errors
/// If there is no tokenizer, or the models do not share a vocabulary.
pub fn divergence(reference: &Engine, others: &[&Engine]) -> Result<Vec<Divergence>, Error> {
    let tokenizer = reference.tokenizer()?;
    let context = reference.context().min(2 * TEXT_TOKENS);
    let mut runner = reference.runner_with(1, context)?;
    let mut texts = Vec::new();
    for (seed, prompt) in PROMPTS.into_iter().enumerate() {
        let mut tokens = match tokenizer.chat_template() {
            Some(_) => reference.encode_dialogue(&[Message::new("user", prompt)])?,
            None => reference.encode(prompt)?,
        };
        // Of a prompt that would leave less than half of the context, the end.
        tokens.drain(..tokens.len().saturating_sub(context / 2));
        let sampling = Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: seed as u64,
            ..Sampling::default()
        };
        let request = Request {
            prompt: tokens.clone(),
            sampling,
            max_tokens: Some(TEXT_TOKENS),
            ignore_end: true,
            ..Request::default()
        };
        let mut sequence = runner.sequence();
        let written =
            generate(&mut runner, &mut sequence, tokenizer, &request, &mut |_| ControlFlow::Continue(()))?;
        runner.release(sequence);
        let mut text = tokens;
        text.extend(written.tokens);
        text.truncate(context - 1);
        texts.push(text);
    }
    let mut sums = vec![(0.0, 0usize); others.len()];
    let mut n = 0;
    for text in &texts {
        let want = logits(reference, text)?;
        n += text.len();
        for (other, (kl, same)) in others.iter().zip(&mut sums) {
            let got = logits(other, text)?;
            if got.len() != want.len() {
                let what = "the models have different vocabularies; they cannot be compared".to_string();
                return Err(Error::Context { what });
            }
            let vocab = want.len() / text.len();
            for (p, q) in want.chunks_exact(vocab).zip(got.chunks_exact(vocab)) {
                *kl += kl_divergence(p, q);
                *same += (likeliest(p) == likeliest(q)) as usize;
            }
        }
    }
    let of = |(kl, same): (f64, usize)| Divergence {
        kl: kl / n as f64,
        agreement: same as f64 / n as f64,
        tokens: n,
    };
    Ok(sums.into_iter().map(of).collect())
}

/// Logits of every token of `text`: (tokens, vocab).
fn logits(engine: &Engine, text: &[u32]) -> Result<Vec<f32>, Error> {
    let mut runner = engine.runner_with(1, engine.context().min(2 * TEXT_TOKENS))?;
    let mut sequence = runner.sequence();
    let feed = Feed { sequence: &mut sequence, tokens: text, want: Want::From(0) };
    Ok(runner.run(&mut [feed])?.to_vec())
}

fn likeliest(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0)
}

/// `sum p ln(p / q)` of the distributions that two rows of logits stand for.
fn kl_divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |x: &[f32]| {
        let top = x.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        top + x.iter().map(|&v| (v as f64 - top).exp()).sum::<f64>().ln()
    };
    let (zp, zq) = (log_sum(p), log_sum(q));
    let term = |(&p, &q): (&f32, &f32)| {
        let (lp, lq) = (p as f64 - zp, q as f64 - zq);
        lp.exp() * (lp - lq)
    };
    p.iter().zip(q).map(term).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_by_hand() {
        // p = (1/2, 1/2), q = (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2.
        let q = [0f32, 3f32.ln()];
        let want = 0.5 * 2f64.ln() + 0.5 * (2f64 / 3.0).ln();
        assert!((kl_divergence(&[7.0, 7.0], &q) - want).abs() < 1e-7);
        assert!(kl_divergence(&q, &q).abs() < 1e-12);
    }
}
