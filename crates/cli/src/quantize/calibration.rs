//! What GPTQ learns the layers' inputs from: a file, or text that the model itself writes.

use super::Args;
use crate::text;
use anyhow::{Context, bail};
use serde_json::Value;
use sparsam_engine::{Batcher, Engine, Opened, Options, Request, Sampling};
use sparsam_quantize::Tokens;
use sparsam_tokenizer::Specials;
use sparsam_train::dialogue::{Examples, LossOn, Reading};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

/// Tokens of a calibration sequence, where `--ctx` does not say.
const CTX: usize = 512;
/// Texts that the model writes side by side.
const WRITERS: usize = 8;
/// Of the numbers that draw them.
const SEED: u64 = 20221031;

/// Calibration tokens, and in words where they come from.
pub struct Calibration {
    /// Cut into sequences.
    pub tokens: Tokens,
    /// `valid.txt from token 100000 on`.
    pub origin: String,
}

impl Calibration {
    /// What `args` asks for: the file, or text sampled from the model itself.
    ///
    /// # Errors
    /// If the file cannot be read, is too short, or the model has no tokenizer.
    pub fn new(args: &Args, opened: &Opened) -> anyhow::Result<Calibration> {
        let ctx = args.calibration_ctx.or(args.ctx.filter(|_| args.goal.fit.is_none())).unwrap_or(CTX);
        if let Some(path) = &args.calibration {
            let ids = read(path, opened)?;
            let ids = ids.get(args.calibration_skip..).unwrap_or_default();
            let tokens = Tokens::new(ids, args.samples, ctx)?;
            let name = path.file_name().unwrap_or_default().to_string_lossy().to_string();
            let origin = match args.calibration_skip {
                0 => name,
                skip => format!("{name} from token {skip} on"),
            };
            return Ok(Calibration { tokens, origin });
        }
        let ids = sampled(args, opened, args.samples * ctx, ctx)?;
        let origin = format!("text sampled from the model itself at temperature 1, seed {SEED}");
        Ok(Calibration { tokens: Tokens::new(&ids, args.samples, ctx)?, origin })
    }

    /// Source, size and hash, in a line.
    pub fn describe(&self) -> String {
        let t = &self.tokens;
        format!("{}: {} sequences of {} tokens", self.origin, t.samples(), t.ctx())
    }
}

/// The tokens of a file: plain text, or JSON lines (dialogues by the model's chat template, where it has one).
///
/// # Errors
/// If it cannot be read, or a line is not what it should be.
pub fn read(path: &Path, opened: &Opened) -> anyhow::Result<Vec<u32>> {
    let tokenizer = opened.tokenizer()?;
    if path.extension().is_some_and(|e| e == "jsonl") && is_dialogue(path)? {
        let reading = Reading {
            tokenizer: tokenizer.clone(),
            fields: None,
            loss_on: LossOn::All,
            max_tokens: usize::MAX,
        };
        let examples = Examples::read(&[path.to_path_buf()], &reading)?;
        return Ok(examples.all.into_iter().flat_map(|e| e.tokens).collect());
    }
    Ok(tokenizer.encode(&read_text(path)?, Specials::default())?)
}

/// Whether the first line has one of the shapes that fine-tuning takes.
fn is_dialogue(path: &Path) -> anyhow::Result<bool> {
    let text = read_file(path)?;
    let Some(line) = text.lines().find(|l| !l.trim().is_empty()) else { return Ok(false) };
    let Ok(Value::Object(object)) = serde_json::from_str(line) else { return Ok(false) };
    let has = |keys: &[&str]| keys.iter().all(|k| object.contains_key(*k));
    Ok(has(&["messages"])
        || has(&["prompt", "completion"])
        || has(&["question", "answer"])
        || has(&["instruction", "output"]))
}

fn read_file(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path)
        .with_context(|| format!("{}: cannot be read as UTF-8 text; name a text file", path.display()))
}

/// A text, or the strings of a file of JSON lines.
fn read_text(path: &Path) -> anyhow::Result<String> {
    let text = read_file(path)?;
    if path.extension().is_none_or(|e| e != "jsonl") {
        return Ok(text);
    }
    let mut parts = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let at = || format!("{}, line {}", path.display(), i + 1);
        let value: Value = serde_json::from_str(line).with_context(at)?;
        let Some(object) = value.as_object() else { bail!("{}: is no JSON object", at()) };
        let strings: Vec<&str> = match object.get("text").and_then(|t| t.as_str()) {
            Some(text) => vec![text],
            None => object.values().filter_map(|v| v.as_str()).collect(),
        };
        if strings.is_empty() {
            bail!("{}: holds no string; each line needs \"text\", \"messages\" or other strings", at());
        }
        parts.push(strings.join("\n"));
    }
    Ok(parts.join("\n\n"))
}

/// At least `n` tokens that the model writes: texts of up to `ctx` tokens, each from one token drawn from the vocabulary,
/// at temperature 1 (as Liu et al. 2023, LLM-QAT, <https://arxiv.org/abs/2305.17888>, section 2.1). The same each time.
fn sampled(args: &Args, opened: &Opened, n: usize, ctx: usize) -> anyhow::Result<Vec<u32>> {
    let tokenizer = opened.tokenizer().context(
        "without --calibration the model itself writes the text, which takes a tokenizer; give --calibration FILE or --method nearest",
    )?;
    let longest = ctx.min(opened.model.facts().context_length);
    let options = Options { threads: args.threads, context: Some(longest), ..Options::default() };
    let engine = Engine::load(opened.source.path(), &options)?;
    let mut batcher = Batcher::new(&engine, WRITERS)?;
    let ordinary: Vec<u32> =
        (0..tokenizer.vocab_size() as u32).filter(|&id| !tokenizer.is_special(id)).collect();
    if ordinary.is_empty() {
        bail!("the vocabulary has special tokens only; give --calibration FILE");
    }
    let bar = text::bar(n as u64, "the model writes its calibration text");
    let mut texts: BTreeMap<sparsam_engine::JobId, Vec<u32>> = BTreeMap::new();
    let mut draw = SEED;
    loop {
        // A wave of texts; which of them are taken does not depend on which ends first.
        let wave = args.samples.max(1);
        for i in 0..wave as u64 {
            draw = draw.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let first = ordinary[(draw >> 33) as usize % ordinary.len()];
            let mut prompt: Vec<u32> = tokenizer.bos().into_iter().collect();
            prompt.push(first);
            let request = Request {
                prompt: prompt.clone(),
                sampling: Sampling { temperature: 1.0, seed: draw ^ i, ..Sampling::default() },
                max_tokens: Some(longest.saturating_sub(prompt.len()).max(1)),
                ..Request::default()
            };
            texts.insert(batcher.submit(request, None)?, prompt);
        }
        loop {
            let out = batcher.step()?;
            let (active, waiting) = batcher.load();
            for o in out {
                if let Some(text) = texts.get_mut(&o.id) {
                    text.extend(o.token);
                }
                bar.inc(1);
            }
            if active + waiting == 0 {
                break;
            }
        }
        if texts.values().map(Vec::len).sum::<usize>() >= n {
            bar.finish_and_clear();
            return Ok(texts.into_values().flatten().collect());
        }
    }
}

/// Tokens of a run that two texts share by chance in no language: the unit of [`overlap`].
const SHARED: usize = 24;

/// The share of the runs of 24 tokens of `scored` that `calibration` holds too.
pub fn overlap(calibration: &[i32], scored: &[u32]) -> f64 {
    if calibration.len() < SHARED || scored.len() < SHARED {
        return 0.0;
    }
    let known: HashSet<&[i32]> = calibration.windows(SHARED).collect();
    let scored: Vec<i32> = scored.iter().map(|&t| t as i32).collect();
    let n = scored.len() + 1 - SHARED;
    scored.windows(SHARED).filter(|w| known.contains(w)).count() as f64 / n as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_text_is_found() {
        let a: Vec<u32> = (0..1000).map(|i| i * 7919 % 1009).collect();
        let ints = |x: &[u32]| x.iter().map(|&t| t as i32).collect::<Vec<_>>();
        assert_eq!(overlap(&ints(&a), &a), 1.0);
        let half = overlap(&ints(&a[500..]), &a);
        assert!((half - 0.488).abs() < 0.01, "{half}");
        let other: Vec<u32> = (0..1000).map(|i| i * 613 % 1009 + 2000).collect();
        assert_eq!(overlap(&ints(&other), &a), 0.0);
        assert_eq!(overlap(&[1, 2], &a), 0.0);
    }
}
