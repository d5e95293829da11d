//! A budget for the whole file: which tensor gets how many bits.
//!
//! First it is measured what each tensor matters: rounded alone (to a probe type, to nearest codes), how far do the model's
//! predictions move (mean Kullback-Leibler divergence over some text)? To second order a divergence grows with the
//! square of the rounding error, so other types count by their squared error over the probe's, and tensors add up. Then
//! bytes are spent where each buys the most.

use crate::Error;
use crate::recipe::{self, TensorPlan};
use crate::speed::Speed;
use sparsam_dtype::{DType, codec};
use sparsam_formats::Source;
use sparsam_ir::{Graph, Trace};
use sparsam_models::Model;
use sparsam_models::nn::Batch;
use sparsam_runtime::{Data, Device, Session, Weights};
use std::sync::Arc;

/// The types that a budget is spent on, from the smallest.
pub const CANDIDATES: [DType; 6] =
    [DType::S2_64, DType::S3_64, DType::S4_64, DType::Q4_0, DType::Q5_0, DType::Q8_0];

/// Rows of a matrix whose rounding error stands for all.
const SAMPLE_ROWS: usize = 64;

/// One way to store a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The type.
    pub dtype: DType,
    /// Bytes in the file.
    pub bytes: usize,
    /// The divergence that it is expected to cause.
    pub loss: f64,
    /// Seconds of a generated token that it is expected to take.
    pub seconds: f64,
}

/// What a budget counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cost {
    /// Bytes of the file.
    Bytes,
    /// Seconds of a generated token.
    Seconds,
}

impl Cost {
    /// What a choice costs.
    pub fn of(self, choice: &Choice) -> f64 {
        match self {
            Cost::Bytes => choice.bytes as f64,
            Cost::Seconds => choice.seconds,
        }
    }

    /// The least that all tensors together can cost.
    pub fn least(self, tensors: &[Vec<Choice>]) -> f64 {
        tensors.iter().map(|c| c.iter().map(|c| self.of(c)).fold(f64::INFINITY, f64::min)).sum()
    }

    /// The most.
    pub fn most(self, tensors: &[Vec<Choice>]) -> f64 {
        tensors.iter().map(|c| c.iter().map(|c| self.of(c)).fold(0.0, f64::max)).sum()
    }
}

/// For each tensor the index of its choice, such that the cost stays within `budget` and the losses' sum is small: starting
/// from the cheapest, the step that wins most for its cost is taken first. `None` if even the cheapest do not fit.
///
/// ```
/// use sparsam_dtype::DType;
/// use sparsam_quantize::budget::{Choice, Cost, allocate};
/// let c = |bytes, loss| Choice { dtype: DType::Q8_0, bytes, loss, seconds: 1.0 };
/// let tensors = [vec![c(10, 8.0), c(20, 1.0)], vec![c(10, 3.0), c(20, 1.0)]];
/// assert_eq!(allocate(&tensors, 30.0, Cost::Bytes), Some(vec![1, 0])); // 7 saved beats 2
/// assert_eq!(allocate(&tensors, 15.0, Cost::Bytes), None);
/// assert_eq!(allocate(&tensors, 2.0, Cost::Seconds), Some(vec![1, 1])); // all take the same time
/// ```
pub fn allocate(tensors: &[Vec<Choice>], budget: f64, cost: Cost) -> Option<Vec<usize>> {
    let hulls: Vec<Vec<usize>> = tensors.iter().map(|c| hull(c, cost)).collect();
    let mut at = vec![0usize; tensors.len()];
    let used = |at: &[usize]| (0..tensors.len()).map(|t| cost.of(&tensors[t][hulls[t][at[t]]])).sum::<f64>();
    let mut now = used(&at);
    if now > budget {
        return None;
    }
    loop {
        let mut best: Option<(f64, usize)> = None;
        for t in 0..tensors.len() {
            let Some(&next) = hulls[t].get(at[t] + 1) else { continue };
            let (from, to) = (tensors[t][hulls[t][at[t]]], tensors[t][next]);
            let more = cost.of(&to) - cost.of(&from);
            let rate = (from.loss - to.loss) / more;
            if now + more <= budget && best.is_none_or(|(r, _)| rate > r) {
                best = Some((rate, t));
            }
        }
        let Some((_, t)) = best else { break };
        at[t] += 1;
        // Summed anew: differences of seconds would add up their rounding.
        now = used(&at);
        if now > budget {
            at[t] -= 1;
            break;
        }
    }
    Some((0..tensors.len()).map(|t| hulls[t][at[t]]).collect())
}

/// The choices on the lower convex hull of loss over cost, by cost: what any price could make worth taking.
fn hull(choices: &[Choice], cost: Cost) -> Vec<usize> {
    let mut order: Vec<usize> = (0..choices.len()).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (&choices[a], &choices[b]);
        cost.of(a).total_cmp(&cost.of(b)).then(a.loss.total_cmp(&b.loss)).then(a.bytes.cmp(&b.bytes))
    });
    let mut hull: Vec<usize> = Vec::new();
    for i in order {
        if hull.last().is_some_and(|&l| choices[l].loss <= choices[i].loss) {
            continue;
        }
        let slope = |a: usize, b: usize| {
            (choices[a].loss - choices[b].loss) / (cost.of(&choices[b]) - cost.of(&choices[a]))
        };
        while let [.., a, b] = hull[..]
            && slope(a, b) <= slope(b, i)
        {
            hull.pop();
        }
        hull.push(i);
    }
    hull
}

/// The divergence that each matrix of the plan causes when it alone is rounded to `probe(columns)`; 0 for what is no matrix.
///
/// Runs the model once a matrix on `tokens`, one sequence, from the block on that the matrix is in; all weights are in memory.
///
/// # Errors
/// If the runtime fails or a tensor cannot be read.
pub fn sensitivity(
    source: &Source,
    model: &Model,
    device: &Device,
    plan: &[TensorPlan],
    tokens: &[i32],
    progress: &mut dyn FnMut(f64, &str),
) -> Result<Vec<f64>, Error> {
    let mut weights = Weights::new();
    for p in plan {
        let tensor = source.require(&p.spec.source_name)?;
        let turned = p.spec.transform.apply(tensor.bytes, tensor.info.dtype, &tensor.info.shape)?;
        weights.insert(&p.spec.name, &p.spec.shape, turned.dtype, &turned.bytes)?;
        drop(turned);
        source.release(&p.spec.source_name);
    }
    for c in model.constants() {
        weights.insert_f32(&c.name, &c.shape, &c.data)?;
    }
    let run = Run { model, device, tokens };
    let (hidden, logits) = run.whole(weights.clone())?;
    let mut out = vec![0.0; plan.len()];
    for (i, p) in plan.iter().enumerate() {
        let Some(probe) = probe(p) else { continue };
        progress(i as f64 / plan.len() as f64, &p.spec.name);
        let tensor = source.require(&p.spec.source_name)?;
        let turned = p.spec.transform.apply(tensor.bytes, tensor.info.dtype, &tensor.info.shape)?;
        let mut w = vec![0f32; p.numel()];
        codec::decode(turned.dtype, &turned.bytes, &mut w)?;
        let mut bytes = vec![0; probe.bytes_for(w.len()).unwrap_or(0)];
        codec::encode(probe, &w, &mut bytes)?;
        let mut changed = weights.clone();
        changed.insert(&p.spec.name, &p.spec.shape, probe, &bytes)?;
        let got = match layer_of(&p.gguf_name) {
            Some(layer) => run.tail(changed, layer, &hidden[layer])?,
            None => run.whole(changed)?.1,
        };
        out[i] = divergence(&logits, &got, model.facts().vocab_size);
    }
    Ok(out)
}

/// The divergence that the whole plan causes with nearest codes, on `tokens`, one sequence.
///
/// # Errors
/// As [`sensitivity`].
pub fn divergence_of(
    source: &Source,
    model: &Model,
    device: &Device,
    plan: &[TensorPlan],
    tokens: &[i32],
) -> Result<f64, Error> {
    let (mut before, mut after) = (Weights::new(), Weights::new());
    for p in plan {
        let tensor = source.require(&p.spec.source_name)?;
        let turned = p.spec.transform.apply(tensor.bytes, tensor.info.dtype, &tensor.info.shape)?;
        before.insert(&p.spec.name, &p.spec.shape, turned.dtype, &turned.bytes)?;
        let mut w = vec![0f32; p.numel()];
        codec::decode(turned.dtype, &turned.bytes, &mut w)?;
        let mut bytes = vec![0; p.to.bytes_for(w.len()).unwrap_or(0)];
        codec::encode(p.to, &w, &mut bytes)?;
        after.insert(&p.spec.name, &p.spec.shape, p.to, &bytes)?;
        drop(turned);
        source.release(&p.spec.source_name);
    }
    for c in model.constants() {
        before.insert_f32(&c.name, &c.shape, &c.data)?;
        after.insert_f32(&c.name, &c.shape, &c.data)?;
    }
    let run = Run { model, device, tokens };
    let (p, q) = (run.whole(before)?.1, run.whole(after)?.1);
    Ok(divergence(&p, &q, model.facts().vocab_size))
}

/// The type that a matrix is probed with: the smallest but one that fits its rows.
fn probe(plan: &TensorPlan) -> Option<DType> {
    let [_, cols] = plan.spec.shape[..] else { return None };
    if !recipe::is_rounded(&plan.spec) {
        return None;
    }
    CANDIDATES[1..].iter().copied().find(|d| cols.is_multiple_of(d.block_len()))
}

/// The block that a tensor is in, by its GGUF name.
pub(crate) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// What a budget can make of each tensor: its choices and their expected losses, from the divergences of
/// [`sensitivity`], and times. Tensors that are no matrices have one choice, F32.
///
/// # Errors
/// If a tensor cannot be read.
pub fn choices(
    source: &Source,
    plan: &[TensorPlan],
    sensitivity: &[f64],
    speed: &Speed,
) -> Result<Vec<Vec<Choice>>, Error> {
    let mut all = Vec::new();
    for (p, &kl) in plan.iter().zip(sensitivity) {
        let bytes = |d: DType| d.bytes_for(p.numel()).unwrap_or(0);
        let Some(probe) = probe(p) else {
            let dtype = if recipe::is_rounded(&p.spec) { DType::F16 } else { DType::F32 };
            let seconds = speed.seconds(p, dtype);
            all.push(vec![Choice { dtype, bytes: bytes(dtype), loss: 0.0, seconds }]);
            continue;
        };
        let cols = p.spec.shape[1];
        let rows = sampled(source, p)?;
        let unit = squared_error(probe, &rows)?.max(f64::MIN_POSITIVE);
        let mut choices = Vec::new();
        for dtype in CANDIDATES.into_iter().filter(|d| cols.is_multiple_of(d.block_len())) {
            let loss = kl * squared_error(dtype, &rows)? / unit;
            choices.push(Choice { dtype, bytes: bytes(dtype), loss, seconds: speed.seconds(p, dtype) });
        }
        all.push(choices);
    }
    Ok(all)
}

/// Some rows of a matrix, evenly spread.
fn sampled(source: &Source, p: &TensorPlan) -> Result<Vec<f32>, Error> {
    let tensor = source.require(&p.spec.source_name)?;
    let turned = p.spec.transform.apply(tensor.bytes, tensor.info.dtype, &tensor.info.shape)?;
    let (rows, cols) = (p.spec.shape[0], p.spec.shape[1]);
    let row_bytes = turned.bytes.len() / rows.max(1);
    let step = rows.div_ceil(SAMPLE_ROWS).max(1);
    let mut out = Vec::new();
    for r in (0..rows).step_by(step) {
        let mut row = vec![0f32; cols];
        codec::decode(turned.dtype, &turned.bytes[r * row_bytes..][..row_bytes], &mut row)?;
        out.extend(row);
    }
    Ok(out)
}

fn squared_error(dtype: DType, x: &[f32]) -> Result<f64, Error> {
    let mut bytes = vec![0; dtype.bytes_for(x.len()).unwrap_or(0)];
    codec::encode(dtype, x, &mut bytes)?;
    let mut y = vec![0f32; x.len()];
    codec::decode(dtype, &bytes, &mut y)?;
    Ok(x.iter().zip(&y).map(|(a, b)| f64::from(a - b).powi(2)).sum())
}

struct Run<'a> {
    model: &'a Model,
    device: &'a Device,
    tokens: &'a [i32],
}

impl Run<'_> {
    /// Logits are compared for the second half of the text, where there is context.
    fn batch(&self) -> Batch {
        Batch::packed(self.tokens.len()).with_logit_rows(self.tokens.len().div_ceil(2))
    }

    fn run(&self, session: &mut Session, graph: &Graph, x: Option<&[f32]>) -> Result<Vec<Vec<f32>>, Error> {
        let n = self.tokens.len() as i32;
        let step = session.compile(graph)?;
        let positions: Vec<i32> = (0..n).collect();
        let (row_start, rows) = (vec![0; n as usize], (n / 2..n).collect::<Vec<i32>>());
        let mut all = vec![
            ("tokens", Data::I32(self.tokens)),
            ("positions", Data::I32(&positions)),
            ("row_start", Data::I32(&row_start)),
            ("logit_rows", Data::I32(&rows)),
        ];
        all.extend(x.map(|x| ("x", Data::F32(x))));
        all.retain(|(name, _)| step.inputs().any(|(n, _, _)| n == *name));
        let out = session.run(&step, &all)?;
        graph.outputs.iter().map(|(name, _)| Ok(out.f32(name)?.to_vec())).collect()
    }

    /// The input of each block, and the logits.
    fn whole(&self, weights: Weights) -> Result<(Vec<Vec<f32>>, Vec<f32>), Error> {
        let mut session = Session::new(self.device, Arc::new(weights));
        let t = Trace::with_weights(session.weights().shapes());
        let batch = self.batch();
        let mut x = self.model.embed(&t, &batch);
        let mut inputs = Vec::new();
        for layer in 0..self.model.facts().n_layers() {
            inputs.push((format!("x.{layer}"), x.clone()));
            x = self.model.block(&batch, layer, &x);
        }
        inputs.push(("logits".into(), self.model.head(&batch, &x)));
        let outputs: Vec<_> = inputs.iter().map(|(name, t)| (name.as_str(), t)).collect();
        let mut all = self.run(&mut session, &t.finish(&outputs)?, None)?;
        let logits = all.pop().unwrap_or_default();
        Ok((all, logits))
    }

    /// The logits from the input of a block on.
    fn tail(&self, weights: Weights, layer: usize, x: &[f32]) -> Result<Vec<f32>, Error> {
        let mut session = Session::new(self.device, Arc::new(weights));
        let t = Trace::with_weights(session.weights().shapes());
        let batch = self.batch();
        let facts = self.model.facts();
        let mut y = t.input("x", &[self.tokens.len(), facts.hidden_size], DType::F32);
        for layer in layer..facts.n_layers() {
            y = self.model.block(&batch, layer, &y);
        }
        let graph = t.finish(&[("logits", &self.model.head(&batch, &y))])?;
        Ok(self.run(&mut session, &graph, Some(x))?.pop().unwrap_or_default())
    }
}

/// Mean Kullback-Leibler divergence of predictions `q` from `p`, both logits (rows, vocab).
fn divergence(p: &[f32], q: &[f32], vocab: usize) -> f64 {
    let log_sum = |row: &[f32]| {
        let max = row.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
        row.iter().map(|&v| f64::from(v - max).exp()).sum::<f64>().ln() + f64::from(max)
    };
    let rows = p.chunks(vocab).zip(q.chunks(vocab)).map(|(p, q)| {
        let (zp, zq) = (log_sum(p), log_sum(q));
        p.iter()
            .zip(q)
            .map(|(&a, &b)| {
                let (a, b) = (f64::from(a) - zp, f64::from(b) - zq);
                a.exp() * (a - b)
            })
            .sum::<f64>()
    });
    rows.sum::<f64>() / (p.len() / vocab).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against trying all combinations: the hull's answer is the best for what it used, of bytes or of seconds.
    #[test]
    fn spends_as_well_as_trying_everything() {
        // A second a byte in one sense, in the other all bytes alike.
        for cost in [Cost::Bytes, Cost::Seconds] {
            spends_well(cost);
        }
    }

    fn spends_well(cost: Cost) {
        let c = |n: usize, loss| match cost {
            Cost::Bytes => Choice { dtype: DType::Q4_0, bytes: n, loss, seconds: 1.0 },
            Cost::Seconds => Choice { dtype: DType::Q4_0, bytes: 7, loss, seconds: n as f64 },
        };
        let tensors = vec![
            vec![c(2, 9.0), c(3, 5.0), c(4, 4.5), c(6, 1.0)],
            vec![c(1, 4.0), c(2, 2.0), c(5, 1.9)],
            vec![c(3, 1.0), c(4, 3.0), c(8, 0.1)], // a larger type may be worse
        ];
        for budget in 0..22 {
            let got = allocate(&tensors, budget as f64, cost);
            let mut combinations = Vec::new();
            for i in 0..4 {
                for j in 0..3 {
                    for k in 0..3 {
                        let at = [i, j, k];
                        let of =
                            |f: &dyn Fn(&Choice) -> f64| (0..3).map(|t| f(&tensors[t][at[t]])).sum::<f64>();
                        combinations.push((of(&|c| cost.of(c)), of(&|c| c.loss)));
                    }
                }
            }
            let Some(got) = got else {
                assert!(budget < 6, "{budget}");
                continue;
            };
            let used: f64 = got.iter().enumerate().map(|(t, &i)| cost.of(&tensors[t][i])).sum();
            let loss: f64 = got.iter().enumerate().map(|(t, &i)| tensors[t][i].loss).sum();
            assert!(used <= budget as f64);
            let best =
                combinations.iter().filter(|(c, _)| *c <= used).map(|c| c.1).fold(f64::INFINITY, f64::min);
            assert!(loss <= best + 1e-12, "budget {budget}: {loss}, could be {best}");
        }
    }

    #[test]
    fn divergence_is_zero_for_shifted_logits_and_known_for_two_classes() {
        let p = [0.0, 0.0, 1.0, 2.0];
        assert!(divergence(&p, &p.map(|v| v + 3.0), 2).abs() < 1e-7);
        // Even odds against 3 : 1: ln(0.5 / 0.75) / 2 + ln(0.5 / 0.25) / 2.
        let kl = divergence(&[0.0, 0.0], &[3f32.ln(), 0.0], 2);
        assert!((kl - 0.5 * (0.5f64 / 0.75).ln() - 0.5 * 2f64.ln()).abs() < 1e-7, "{kl}");
    }
}
