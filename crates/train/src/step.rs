//! From a model to a training step: loss, gradients, optimiser, one graph.
//!
//! [`update`] is the whole of it for any loss written over a [`Trace`]; [`language_model_loss`] is the loss of the
//! models of this workspace. Batches larger than memory are cut into micro-batches: [`accumulate`] adds up their
//! gradients in states, [`apply`] steps once behind them. The loss is divided by the number of targets of the whole
//! batch, not of the micro-batch, so that accumulation gives the gradient of the joint batch.

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
    let loss = loss(&t);
    let (parameters, grads) = gradients(&t, &loss);
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

/// Next-token cross-entropy of `model` over `batch`: the sum over all rows with a target of `-log p(target)`, times
/// the input `loss_scale` (F32 (1); one over the number of targets makes it the mean). (1).
///
/// Inputs beside those of `batch`: `targets` I32 (N), [`NO_TARGET`] where a row has none, and `loss_scale`.
#[track_caller]
pub fn language_model_loss(t: &Trace, model: &Model, batch: &Batch) -> Tensor {
    let logits = model.trace(t, batch); // (N, vocab)
    let targets = t.input("targets", &[batch.n_logits()], DType::I32);
    let losses = logits.cross_entropy(&targets); // (N)
    losses.sum(&[0]) * t.input("loss_scale", &[1], DType::F32)
}
