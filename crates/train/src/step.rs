//! From a model to a training step: loss, gradients, optimiser, one graph.
//!
//! [`update`] is the whole of it for any loss written over a [`Trace`]; [`language_model_loss`] is the loss of the
//! models of this workspace. Batches larger than memory are cut into micro-batches: [`accumulate`] adds up their
//! gradients in states, [`apply`] steps once behind them. The loss is divided by the number of targets of the whole
//! batch, not of the micro-batch, so that accumulation gives the gradient of the joint batch. So it is with many
//! processes, whose gradients are summed behind the last micro-batch, each as soon as it is there: accumulate, reduce,
//! clip, optimise.

use crate::optim::Optimiser;
use sparsam_ir::{DType, Graph, Tensor, Trace, TraceError, grad};
use sparsam_models::Model;
use sparsam_models::nn::Batch;

/// The output that holds the loss, (1).
pub const LOSS: &str = "loss";
/// The output that holds the norm of all gradients, (1); only where they are clipped.
pub const GRAD_NORM: &str = "grad_norm";

/// The target of a row that does not count.
pub const NO_TARGET: i32 = -1;

/// A trace in which every weight is trained.
pub fn training() -> Trace {
    Trace::new().training(|_| true)
}

/// One optimiser step on the loss (one number) that `loss` traces in `t`, whose weights under training it changes;
/// [`training`] gives a trace in which all are.
///
/// Outputs: [`LOSS`], and [`GRAD_NORM`] where gradients are clipped. Beside what `loss` asks for, the graph has the
/// input [`crate::optim::RATES`].
///
/// # Errors
/// The first shape error, with its line.
#[track_caller]
pub fn update(
    t: Trace,
    loss: impl FnOnce(&Trace) -> Tensor,
    optimiser: &Optimiser,
) -> Result<Graph, TraceError> {
    one_step(t, loss, optimiser, |g| g)
}

/// As [`update`], by all processes of a group together, each of which has a part of the batch: what steps is the sum of
/// their gradients. [`LOSS`] is that of this process's part.
///
/// # Errors
/// The first shape error, with its line.
#[track_caller]
pub fn update_together(
    t: Trace,
    loss: impl FnOnce(&Trace) -> Tensor,
    optimiser: &Optimiser,
) -> Result<Graph, TraceError> {
    one_step(t, loss, optimiser, |g| g.all_reduce())
}

#[track_caller]
fn one_step(
    t: Trace,
    loss: impl FnOnce(&Trace) -> Tensor,
    optimiser: &Optimiser,
    reduced: impl Fn(Tensor) -> Tensor,
) -> Result<Graph, TraceError> {
    let loss = loss(&t);
    let (parameters, grads) = gradients(&t, &loss);
    let grads: Vec<Tensor> = grads.into_iter().map(reduced).collect();
    let norm = optimiser.update(&t, &parameters, &grads);
    finish(&t, &loss, norm.as_ref())
}

/// Adds the gradients of `loss` to the states `grad.NAME`. Output: [`LOSS`].
///
/// # Errors
/// The first shape error, with its line.
#[track_caller]
pub fn accumulate(t: Trace, loss: impl FnOnce(&Trace) -> Tensor) -> Result<Graph, TraceError> {
    let loss = loss(&t);
    let (parameters, grads) = gradients(&t, &loss);
    for ((name, w), g) in parameters.iter().zip(&grads) {
        let sum = t.state(&grad_state(name), &w.shape(), DType::F32);
        sum.assign(&(&sum + g));
    }
    finish(&t, &loss, None)
}

/// As [`accumulate`], behind which the states hold the sums over all processes of a group: for the last micro-batch of a
/// step.
///
/// # Errors
/// The first shape error, with its line.
#[track_caller]
pub fn accumulate_together(t: Trace, loss: impl FnOnce(&Trace) -> Tensor) -> Result<Graph, TraceError> {
    let loss = loss(&t);
    let (parameters, grads) = gradients(&t, &loss);
    for ((name, w), g) in parameters.iter().zip(&grads) {
        let sum = t.state(&grad_state(name), &w.shape(), DType::F32);
        let sum = sum.assign(&(&sum + g));
        sum.assign(&sum.all_reduce());
    }
    finish(&t, &loss, None)
}

/// One optimiser step on the gradients that [`accumulate`] has added up, which are 0 again afterwards. `parameters`:
/// names and shapes. Output: [`GRAD_NORM`] where gradients are clipped.
///
/// # Errors
/// The first shape error, with its line.
#[track_caller]
pub fn apply(parameters: &[(String, Vec<usize>)], optimiser: &Optimiser) -> Result<Graph, TraceError> {
    let t = training();
    let weights: Vec<(String, Tensor)> =
        parameters.iter().map(|(name, shape)| (name.clone(), t.weight(name, shape))).collect();
    let sums: Vec<Tensor> =
        parameters.iter().map(|(name, shape)| t.state(&grad_state(name), shape, DType::F32)).collect();
    let norm = optimiser.update(&t, &weights, &sums);
    for sum in &sums {
        sum.assign(&t.full(&sum.shape(), 0.0));
    }
    let outputs: Vec<(&str, &Tensor)> = norm.iter().map(|n| (GRAD_NORM, n)).collect();
    t.finish(&outputs)
}

/// The loss alone, over the weights as they are. Output: [`LOSS`].
///
/// # Errors
/// The first shape error, with its line.
#[track_caller]
pub fn evaluate(t: Trace, loss: impl FnOnce(&Trace) -> Tensor) -> Result<Graph, TraceError> {
    let loss = loss(&t);
    finish(&t, &loss, None)
}

/// The state in which gradients of weight `name` add up.
pub fn grad_state(name: &str) -> String {
    format!("grad.{name}")
}

fn gradients(t: &Trace, loss: &Tensor) -> (Vec<(String, Tensor)>, Vec<Tensor>) {
    let parameters = t.parameters();
    let wrt: Vec<&Tensor> = parameters.iter().map(|(_, w)| w).collect();
    let grads = grad(loss, &wrt);
    (parameters, grads)
}

fn finish(t: &Trace, loss: &Tensor, norm: Option<&Tensor>) -> Result<Graph, TraceError> {
    let loss = loss.reshape(&[1]);
    let mut outputs = vec![(LOSS, &loss)];
    outputs.extend(norm.map(|n| (GRAD_NORM, n)));
    t.finish(&outputs)
}

/// Which rows of a batch the head computes logits for, and what their losses count.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Targets {
    /// At most so many rows of a batch have a target, and only these get logits; `None`: all do.
    pub rows: Option<usize>,
    /// Each target's loss counts as [`crate::data::PackedRows::weights`] say; these are all that it is multiplied by.
    /// Otherwise it is the mean over all targets of a step.
    pub weighted: bool,
    /// Another model's probabilities that are learnt beside the targets.
    pub soft: Option<Soft>,
}

/// Learning from another model's probabilities (Hinton et al. 2015), of which the largest few are kept; what the others
/// come to together is one more.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Soft {
    /// Probabilities that are kept for each target.
    pub top: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// The share of the loss that they have; the targets have the rest.
    pub share: f64,
    /// `KL(student || teacher)`, which keeps to what the teacher finds likely (Gu et al. 2024), instead of
    /// `KL(teacher || student)`, which covers all of it.
    pub reverse: bool,
}

impl Targets {
    /// Whether a step has the input `weights`: probabilities, unlike targets, do not say which rows count.
    pub(crate) fn has_weights(&self) -> bool {
        self.weighted || self.soft.is_some()
    }

    /// A batch of `n_tokens` packed tokens.
    pub fn batch(&self, n_tokens: usize) -> Batch {
        let batch = Batch::packed(n_tokens);
        match self.rows {
            Some(rows) => batch.with_logit_rows(rows),
            None => batch,
        }
    }
}

/// Next-token cross-entropy of `model` over `batch`: the sum over all rows with a target of `-log p(target)`, times
/// the input `loss_scale` (F32 (1); one over the number of targets makes it the mean). (1).
///
/// Inputs beside those of `batch`: `targets` I32 (R), [`NO_TARGET`] where a row has none, and `loss_scale`; `weights` F32
/// (R), by which each row's loss is multiplied, if they are `weighted` or `soft`; `soft_at` I32 (R top), places in the logits, and
/// `soft_p` F32 (R, top), if they are `soft`.
#[track_caller]
pub fn language_model_loss(t: &Trace, model: &Model, batch: &Batch, how: &Targets) -> Tensor {
    let logits = model.trace(t, batch); // (R, vocab)
    let r = batch.n_logits();
    let mut losses = logits.cross_entropy(&t.input("targets", &[r], DType::I32)); // (R)
    if let Some(soft) = &how.soft {
        losses = losses.mul_scalar(1.0 - soft.share) + divergence(t, &logits, soft).mul_scalar(soft.share);
    }
    if how.has_weights() {
        losses = losses * t.input("weights", &[r], DType::F32);
    }
    losses.sum(&[0]) * t.input("loss_scale", &[1], DType::F32)
}

/// Probabilities below are taken for this: logarithms stay finite.
const LEAST: f64 = 1e-6;

/// The divergence between the probabilities that logits (R, vocab) give and those of `soft_p`, over the tokens of these
/// and all others together: (R).
#[track_caller]
fn divergence(t: &Trace, logits: &Tensor, soft: &Soft) -> Tensor {
    let (r, vocab) = (logits.dim(0), logits.dim(1));
    let at = t.input("soft_at", &[r * soft.top], DType::I32);
    let p = t.input("soft_p", &[r, soft.top], DType::F32);
    let largest = logits.max(&[1]); // (R, 1)
    let log_sum = (logits - &largest).exp().sum(&[1]).log() + largest; // (R, 1)
    let chosen = logits.reshape(&[r * vocab, 1]).gather(&at).reshape(&[r, soft.top]);
    let log_q = chosen - log_sum; // (R, top)
    let least = |x: &Tensor| x.maximum(&t.full(&x.shape(), LEAST));
    // What the tokens that are not kept come to.
    let rest = |x: &Tensor| least(&x.sum(&[1]).mul_scalar(-1.0).add_scalar(1.0)); // (R, 1)
    let (q, p) = (log_q.exp(), least(&p));
    let (rest_q, rest_p) = (rest(&q), rest(&p));
    let (log_p, log_rest_q, log_rest_p) = (p.log(), rest_q.log(), rest_p.log());
    let terms = match soft.reverse {
        false => (&p * &(&log_p - &log_q)).sum(&[1]) + rest_p * (log_rest_p - log_rest_q),
        true => (&q * &(&log_q - &log_p)).sum(&[1]) + rest_q * (log_rest_q - log_rest_p),
    };
    terms.reshape(&[r])
}
