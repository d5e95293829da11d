//! Attention alone: tiled against the plain composition, in time and memory.

use crate::bench::Timing;
use crate::{Error, Sampling};
use rand_core::{RngCore, SeedableRng};
use rand_pcg::Pcg64;
use sparsam_ir::{AttentionScores, DType, Graph, Precision, Tensor, Trace, TraceError, grad};
use sparsam_runtime::{Data, Device, Session, Weights};
use std::sync::Arc;
use std::time::Instant;

/// One causal attention over one text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Tokens.
    pub seq: usize,
    /// Query heads, and as many for keys.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Type of queries, keys and values: F32 or BF16.
    pub dtype: DType,
    /// Forward and backward, not forward alone.
    pub backward: bool,
}

impl AttentionShape {
    /// Useful operations: the causal half of two products forward, and of four more backward.
    pub fn flops(&self) -> f64 {
        let products = if self.backward { 6.0 } else { 2.0 };
        products * (self.heads * self.head_dim) as f64 * (self.seq as f64).powi(2)
    }
}

/// How attention is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionForm {
    /// The attention kernel: scores exist only in tiles.
    Tiled,
    /// Matmul, mask, softmax, matmul, compiled as any graph: scores exist as a whole.
    Plain,
}

/// The graph: inputs `q`, `k`, `v` (seq, heads, head_dim), `row_start` and, for backward, `dy`; outputs `y`, or `dq`,
/// `dk` and `dv`.
fn graph(s: &AttentionShape, form: AttentionForm) -> Result<Graph, TraceError> {
    let t = Trace::new();
    let shape = [s.seq, s.heads, s.head_dim];
    let [q, k, v] = ["q", "k", "v"].map(|name| t.input(name, &shape, s.dtype));
    let row_start = t.input("row_start", &[s.seq], DType::I32);
    let scale = 1.0 / (s.head_dim as f64).sqrt();
    let y = match form {
        AttentionForm::Tiled => {
            q.attention_packed(&k, &v, &row_start, AttentionScores { scale, window: None, softcap: None })
        }
        AttentionForm::Plain => plain(&t, [&q, &k, &v], s, scale),
    };
    if !s.backward {
        return t.finish(&[("y", &y)]);
    }
    let dy = t.input("dy", &shape, DType::F32);
    let loss = (y * dy).sum(&[0, 1, 2]);
    let grads = grad(&loss, &[&q, &k, &v]);
    t.finish(&[("dq", &grads[0]), ("dk", &grads[1]), ("dv", &grads[2])])
}

fn plain(t: &Trace, [q, k, v]: [&Tensor; 3], s: &AttentionShape, scale: f64) -> Tensor {
    let (n, h) = (s.seq, s.heads);
    let precision = if s.dtype == DType::BF16 { Precision::Bf16 } else { Precision::F32 };
    let by_head = |x: &Tensor| x.cast(DType::F32).permute(&[1, 0, 2]); // (H, N, D)
    let scores = by_head(q).matmul_with(&by_head(k), false, true, precision).mul_scalar(scale); // (H, N, N)
    let index = |axis: usize| t.iota(&[h, n, n], axis).cast(DType::F32);
    let hidden = index(1).less(&index(2)); // the key comes after the query
    let scores = hidden.select(&t.full(&[h, n, n], f64::from(f32::MIN)), &scores);
    scores.softmax().matmul_with(&by_head(v), false, false, precision).permute(&[1, 0, 2])
}

/// Runs the shape `repeat` times after one that does not count. Gives the times, and the bytes that inputs, results
/// and everything between take at most.
///
/// # Errors
/// If the shape is empty or the type none of the two.
pub fn bench_attention(
    device: &Device,
    shape: &AttentionShape,
    form: AttentionForm,
    repeat: usize,
) -> Result<(Timing, usize), Error> {
    let run = Run::new(device, shape, form)?;
    let (timing, bytes, _) = run.time(shape, repeat)?;
    Ok((timing, bytes))
}

struct Run {
    session: Session,
    step: sparsam_runtime::Step,
    inputs: Vec<Vec<u8>>,
    row_start: Vec<i32>,
}

impl Run {
    fn new(device: &Device, s: &AttentionShape, form: AttentionForm) -> Result<Run, Error> {
        if !matches!(s.dtype, DType::F32 | DType::BF16) || s.seq * s.heads * s.head_dim == 0 {
            let what = format!("attention of {s:?} cannot be measured: sizes from 1 on, F32 or BF16");
            return Err(Error::Context { what });
        }
        let graph = graph(s, form)?;
        let mut session = Session::new(device, Arc::new(Weights::new()));
        let step = session.compile(&graph)?;
        let mut rng = Pcg64::seed_from_u64(Sampling::default().seed);
        // Sums of four uniform numbers: near enough to normal ones of variance 1/3.
        let mut normal = || (0..4).map(|_| rng.next_u32() as f32 / u32::MAX as f32 - 0.5).sum::<f32>();
        let n = s.seq * s.heads * s.head_dim;
        let inputs = ["q", "k", "v", "dy"].map(|name| {
            let values = (0..n).map(|_| normal());
            match (name, s.dtype) {
                ("dy", _) | (_, DType::F32) => values.flat_map(f32::to_le_bytes).collect(),
                _ => values.flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect(),
            }
        });
        Ok(Run { session, step, inputs: inputs.to_vec(), row_start: vec![0; s.seq] })
    }

    /// Times, bytes, and the outputs one after the other.
    fn time(mut self, s: &AttentionShape, repeat: usize) -> Result<(Timing, usize, Vec<f32>), Error> {
        let mut inputs: Vec<(&str, Data)> =
            ["q", "k", "v"].into_iter().zip(&self.inputs).map(|(n, x)| (n, Data::Bytes(x))).collect();
        if s.backward {
            inputs.push(("dy", Data::Bytes(&self.inputs[3])));
        }
        // The plain form has no rows of other texts to keep apart.
        if self.step.inputs().any(|(name, ..)| name == "row_start") {
            inputs.push(("row_start", Data::I32(&self.row_start)));
        }
        let names: &[&str] = if s.backward { &["dq", "dk", "dv"] } else { &["y"] };
        let mut seconds = Vec::new();
        let mut out = Vec::new();
        for i in 0..=repeat {
            let start = Instant::now();
            let outputs = self.session.run(&self.step, &inputs)?;
            if i > 0 {
                seconds.push(start.elapsed().as_secs_f64());
            }
            if i == repeat {
                for name in names {
                    out.extend(outputs.to_f32(name)?);
                }
            }
        }
        let given: usize = inputs
            .iter()
            .map(|(_, x)| match x {
                Data::Bytes(b) => b.len(),
                Data::I32(b) => b.len() * 4,
                Data::F32(b) => b.len() * 4,
            })
            .sum();
        Ok((Timing { tokens: s.seq, seconds }, self.step.arena_bytes() + given, out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_mean_the_same_and_memory_grows_as_it_should() {
        let device = Device::cpu(2).unwrap();
        for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::BF16, 2e-2)] {
            for backward in [false, true] {
                let run = |seq: usize, form: AttentionForm| {
                    let shape = AttentionShape { seq, heads: 3, head_dim: 16, dtype, backward };
                    Run::new(&device, &shape, form).unwrap().time(&shape, 1).unwrap()
                };
                let (_, tiled, a) = run(150, AttentionForm::Tiled);
                let (_, plain, b) = run(150, AttentionForm::Plain);
                let off = a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                assert!(a.len() == b.len() && off < tolerance, "{dtype}, backward {backward}: off by {off}");
                let twice = |form, one: usize| run(300, form).1 as f64 / one as f64;
                assert!(twice(AttentionForm::Tiled, tiled) < 2.2, "linear");
                assert!(twice(AttentionForm::Plain, plain) > 3.0, "quadratic");
            }
        }
    }
}
