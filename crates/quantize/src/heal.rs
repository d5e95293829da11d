//! Healing: scales and minima behind the codes, and norms and biases, tuned so that a rounded block gives what the
//! original block gave.
//!
//! The loss of a token is the squared error of the block's output, as a share of the output's size: the norm that reads it
//! sees no more. Inputs are what the rounded blocks before give, targets what the original model has there, so each block
//! also makes up for those before it. Codes stay; every other number is `old * (1 + p)`, p from 0 by AdamW (Loshchilov &
//! Hutter 2019), so that one learning rate suits them all. Block-wise tuning of what lies behind the codes: Chen et al.
//! 2024, EfficientQAT, <https://arxiv.org/abs/2407.11062>, section 3.2.
//!
//! Some sequences are held back: a block whose loss on them did not fall stays as it was.

use crate::Error;
use crate::activations::Activations;
use crate::calibrate::Streams;
use crate::free::Free;
use crate::taps::{Part, Shapes};
use serde::{Deserialize, Serialize};
use sparsam_dtype::DType;
use sparsam_ir::{AdamW, Graph, Tensor, Trace, grad};
use sparsam_models::nn::Batch;
use sparsam_runtime::{Data, Session, Weights};
use std::sync::Arc;

/// Tokens of a step.
const BATCH: usize = 2048;
/// Begins the names of the parameters under healing.
const PREFIX: &str = "heal:";
/// No moments that outlive the few steps of a block.
const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0 };

/// How to heal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heal {
    /// Optimiser steps a block.
    pub steps: usize,
    /// The highest learning rate, relative to the numbers that are tuned; it falls to 0 by half a cosine.
    pub lr: f64,
}

impl Heal {
    /// `steps` a block at the default rate.
    pub fn new(steps: usize) -> Heal {
        Heal { steps, lr: 2e-3 }
    }
}

/// What became of a block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Healed {
    /// The block.
    pub layer: usize,
    /// Error of its output, as a share of its size, over the sequences that were held back, before.
    pub before: f64,
    /// And after.
    pub after: f64,
    /// Whether the tuned numbers were taken.
    pub kept: bool,
}

/// A tensor of the block.
pub(crate) enum Subject {
    /// A rounded matrix, in blocks of a row.
    Rounded { name: String, shape: [usize; 2], free: Free },
    /// A norm or bias.
    Vector { name: String, values: Vec<f32> },
    /// Anything else stays as it is.
    Fixed { name: String, shape: Vec<usize>, values: Vec<f32> },
}

/// The numbers of a subject after healing.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Tuned {
    Scales(Vec<f32>, Option<Vec<f32>>),
    Vector(Vec<f32>),
}

impl Subject {
    fn name(&self) -> &str {
        match self {
            Subject::Rounded { name, .. } | Subject::Vector { name, .. } | Subject::Fixed { name, .. } => {
                name
            }
        }
    }
}

/// A parameter under healing: its name and the numbers that it scales.
struct Tunable<'a> {
    name: String,
    shape: Vec<usize>,
    old: &'a [f32],
}

/// Tunes the subjects of a part towards `target` (tokens, hidden). The results stand in the order of the subjects; `None`
/// for what is fixed.
pub(crate) fn heal(
    streams: &Streams,
    part: Part,
    subjects: &[Subject],
    target: &Activations,
    settings: &Heal,
) -> Result<(Vec<Option<Tuned>>, Healed), Error> {
    let layer = match part {
        Part::Block(layer) => layer,
        Part::Head => unreachable!("only blocks have outputs to be healed to"),
    };
    let tunables: Vec<Tunable> = subjects.iter().flat_map(tunable).collect();
    let batches = Batches::new(streams, target)?;
    let (weights, mut shapes) = leaves(streams, subjects)?;
    shapes.extend(tunables.iter().map(|t| (t.name.clone(), (t.shape.clone(), DType::F32))));
    let mut session = Session::new(streams.device, Arc::new(weights));
    let n = batches.rows * streams.tokens.ctx();
    let step = session.compile(&graph(streams, part, subjects, &shapes, n, true)?)?;
    let loss = session.compile(&graph(streams, part, subjects, &shapes, n, false)?)?;
    let judge = |session: &mut Session| -> Result<f64, Error> {
        let mut sum = 0.0;
        for sequences in &batches.held_back {
            sum += f64::from(batches.run(session, &loss, sequences, None)?);
        }
        Ok(sum / batches.held_back.len() as f64)
    };
    let before = judge(&mut session)?;
    for i in 0..settings.steps {
        let cosine = (std::f64::consts::PI * i as f64 / settings.steps as f64).cos();
        let rates = ADAMW.rates(settings.lr * (1.0 + cosine) / 2.0, i as u64 + 1);
        batches.run(&mut session, &step, &batches.training[i % batches.training.len()], Some(&rates))?;
    }
    // What is stored are f16 scales, and these are what is judged.
    for t in &tunables {
        let p: Vec<f32> = bytemuck::cast_slice(session.state_bytes(&t.name)?).to_vec();
        let p: Vec<f32> = p.iter().zip(t.old).map(|(p, old)| as_stored(t, *old, *p)).collect();
        session.set_state(&t.name, bytemuck::cast_slice(&p))?;
    }
    let after = judge(&mut session)?;
    let kept = after < before;
    let mut tuned = Vec::new();
    for s in subjects {
        let mut values = tunable(s).into_iter().map(|t| -> Result<Vec<f32>, Error> {
            let p: &[f32] = bytemuck::cast_slice(session.state_bytes(&t.name)?);
            Ok(t.old.iter().zip(p).map(|(old, p)| if kept { old * (1.0 + p) } else { *old }).collect())
        });
        let mut next = || values.next().transpose();
        tuned.push(match s {
            Subject::Fixed { .. } => None,
            Subject::Vector { .. } => next()?.map(Tuned::Vector),
            Subject::Rounded { .. } => match next()? {
                Some(d) => Some(Tuned::Scales(d, next()?)),
                None => None,
            },
        });
    }
    Ok((tuned, Healed { layer, before, after, kept }))
}

/// The change that is left of `p` once the new number is rounded as the file holds it; none if it cannot hold it.
fn as_stored(t: &Tunable, old: f32, p: f32) -> f32 {
    let new = old * (1.0 + p);
    // Vectors stay F32.
    let new = if t.shape.len() == 1 { new } else { sparsam_dtype::codec::blocks::stored(new) };
    if old != 0.0 && new.is_finite() { new / old - 1.0 } else { 0.0 }
}

/// What of a subject is tuned.
fn tunable(s: &Subject) -> Vec<Tunable<'_>> {
    match s {
        Subject::Fixed { .. } => Vec::new(),
        Subject::Vector { name, values } => {
            vec![Tunable { name: format!("{PREFIX}{name}"), shape: vec![values.len()], old: values }]
        }
        Subject::Rounded { name, shape: [rows, _], free } => {
            let shape = vec![*rows, free.d.len() / rows, 1];
            let mut all =
                vec![Tunable { name: format!("{PREFIX}d:{name}"), shape: shape.clone(), old: &free.d }];
            if let Some((m, _)) = &free.min {
                all.push(Tunable { name: format!("{PREFIX}m:{name}"), shape, old: m });
            }
            all
        }
    }
}

/// What stays as it is: the terms that scales and minima multiply, vectors before healing, and everything else.
fn leaves(streams: &Streams, subjects: &[Subject]) -> Result<(Weights, Shapes), Error> {
    let mut weights = Weights::new();
    for s in subjects {
        match s {
            Subject::Fixed { name, shape, values } => weights.insert_f32(name, shape, values)?,
            Subject::Vector { name, values } => {
                weights.insert_f32(&format!("old:{name}"), &[values.len()], values)?;
            }
            Subject::Rounded { name, shape: [rows, cols], free } => {
                let blocks = free.d.len() / rows;
                let shape = [*rows, blocks, cols / blocks];
                let term = |x: &[f32], by: &[f32]| -> Vec<f32> {
                    x.chunks(cols / blocks)
                        .zip(by)
                        .flat_map(|(x, by)| x.iter().map(move |x| x * by))
                        .collect()
                };
                weights.insert_f32(&format!("d:{name}"), &shape, &term(&free.v, &free.d))?;
                if let Some((m, u)) = &free.min {
                    weights.insert_f32(&format!("m:{name}"), &shape, &term(u, m))?;
                }
            }
        }
    }
    for c in streams.model.constants() {
        weights.insert_f32(&c.name, &c.shape, &c.data)?;
    }
    let shapes = weights.shapes();
    Ok((weights, shapes))
}

/// The loss over `n` rows, and with `update` one step of the optimiser.
fn graph(
    streams: &Streams,
    part: Part,
    subjects: &[Subject],
    shapes: &Shapes,
    n: usize,
    update: bool,
) -> Result<Graph, Error> {
    let t = Trace::with_weights(shapes.clone()).training(|name| name.starts_with(PREFIX));
    for s in subjects {
        let scaled = |kind: &str, shape: &[usize], p: &Tensor| {
            let old = t.weight(&format!("{kind}:{}", s.name()), shape);
            old * p.add_scalar(1.0).broadcast_to(shape)
        };
        match s {
            Subject::Fixed { .. } => {}
            Subject::Vector { name, values } => {
                let shape = [values.len()];
                let p = t.weight(&format!("{PREFIX}{name}"), &shape);
                t.bind(name, &scaled("old", &shape, &p));
            }
            Subject::Rounded { name, shape: [rows, cols], free } => {
                let blocks = free.d.len() / rows;
                let shape = [*rows, blocks, cols / blocks];
                let mut sum: Option<Tensor> = None;
                for kind in ["d", "m"].into_iter().take(1 + usize::from(free.min.is_some())) {
                    let p = t.weight(&format!("{PREFIX}{kind}:{name}"), &[*rows, blocks, 1]);
                    let term = scaled(kind, &shape, &p);
                    sum = Some(sum.map_or(term.clone(), |sum| sum + &term));
                }
                if let Some(sum) = sum {
                    t.bind(name, &sum.reshape(&[*rows, *cols]));
                }
            }
        }
    }
    let hidden = streams.model.facts().hidden_size;
    let x = t.input("x", &[n, hidden], DType::F32);
    let batch = Batch::packed(n).with_precision(streams.precision);
    let y = match part {
        Part::Block(layer) => streams.model.block(&batch, layer, &x),
        Part::Head => streams.model.head(&batch, &x),
    };
    let error = y - t.input("target", &[n, hidden], DType::F32);
    let share = (&error * &error).sum(&[1]) * t.input("share", &[n, 1], DType::F32);
    let loss = share.sum(&[0]).reshape(&[1]);
    if update {
        let rates = t.input("rates", &[3], DType::F32);
        let parameters = t.parameters();
        let gradients = grad(&loss, &parameters.iter().map(|(_, p)| p).collect::<Vec<_>>());
        for ((name, p), g) in parameters.iter().zip(&gradients) {
            ADAMW.update(name, p, g, &rates);
        }
    }
    Ok(t.finish(&[("loss", &loss)])?)
}

/// Sequences of the streams, some at a time.
struct Batches<'a> {
    streams: &'a Streams<'a>,
    target: &'a Activations,
    /// For each token one over the squared size of its target and over the number of tokens of a batch.
    share: Vec<f32>,
    /// Sequences of a batch.
    rows: usize,
    training: Vec<Vec<usize>>,
    held_back: Vec<Vec<usize>>,
}

impl<'a> Batches<'a> {
    fn new(streams: &'a Streams<'a>, target: &'a Activations) -> Result<Batches<'a>, Error> {
        let (ctx, samples) = (streams.tokens.ctx(), streams.tokens.samples());
        let hidden = streams.model.facts().hidden_size;
        // A third batch is the first that can be spared.
        let rows = (BATCH / ctx).clamp(1, samples.div_ceil(3));
        let tokens = (rows * ctx) as f32;
        let mut share = Vec::with_capacity(target.rows());
        for s in 0..samples {
            let y = target.get(s * ctx..(s + 1) * ctx)?;
            let size = |y: &[f32]| y.iter().map(|v| v * v).sum::<f32>().max(f32::MIN_POSITIVE);
            share.extend(y.chunks(hidden).map(|y| 1.0 / (tokens * size(y))));
        }
        let groups: Vec<Vec<usize>> =
            (0..samples / rows).map(|i| (i * rows..(i + 1) * rows).collect()).collect();
        let spared = match groups.len() {
            0..=2 => 0,
            n => (n / 8).max(1),
        };
        let (training, held_back) = groups.split_at(groups.len() - spared);
        let held_back = if held_back.is_empty() { training } else { held_back }.to_vec();
        Ok(Batches { streams, target, share, rows, training: training.to_vec(), held_back })
    }

    fn run(
        &self,
        session: &mut Session,
        step: &sparsam_runtime::Step,
        sequences: &[usize],
        rates: Option<&[f32]>,
    ) -> Result<f32, Error> {
        let ctx = self.streams.tokens.ctx();
        let n = sequences.len() * ctx;
        let x = self.streams.rows(sequences)?;
        let (mut target, mut share) = (Vec::with_capacity(x.len()), Vec::with_capacity(n));
        for s in sequences {
            target.extend_from_slice(&self.target.get(s * ctx..(s + 1) * ctx)?);
            share.extend_from_slice(&self.share[s * ctx..(s + 1) * ctx]);
        }
        let positions: Vec<i32> = (0..n).map(|i| (i % ctx) as i32).collect();
        let row_start: Vec<i32> = (0..n).map(|i| (i - i % ctx) as i32).collect();
        let mut all = vec![
            ("x", Data::F32(&x)),
            ("target", Data::F32(&target)),
            ("share", Data::F32(&share)),
            ("positions", Data::I32(&positions)),
            ("row_start", Data::I32(&row_start)),
        ];
        all.extend(rates.map(|r| ("rates", Data::F32(r))));
        all.retain(|(name, _)| step.inputs().any(|(n, _, _)| n == *name));
        Ok(session.run(step, &all)?.f32("loss")?[0])
    }
}
