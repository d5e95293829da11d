//! A whole model, block by block: one block of weights in memory at a time, results on disk as they come.
//!
//! What is done is kept in a folder beside the output (`OUT.partial`, see `partial`). Started again with the same settings,
//! a killed run goes on behind the last tensor; the streams of activations are computed again, which takes a fraction of
//! the work.

use crate::budget::layer_of;
use crate::calibrate::{Sides, Springs, Stored, Streams, Tokens};
use crate::free::{self, Free};
use crate::gptq::{self, Factor, LayerError};
use crate::heal::{Heal, Healed, Subject, Tuned, heal};
use crate::linalg::Products;
use crate::partial::{describe, save, values};
use crate::recipe::TensorPlan;
use crate::taps::{self, Part};
use crate::{Error, Grid, Plain};
use serde::{Deserialize, Serialize};
use sparsam_formats::Source;
use sparsam_ir::Precision;
use sparsam_models::Model;
use sparsam_runtime::{Device, Weights};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::Instant;

/// How codes are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// The nearest code, on scales searched for the least error.
    Nearest,
    /// GPTQ on calibration text.
    Gptq(Gptq),
}

/// Settings of the calibrated method.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gptq {
    /// Added to the Hessian's diagonal, as a share of its mean.
    pub damping: f32,
    /// How far weights are moved to make up for the errors of earlier layers: 0 not at all, 1 fully.
    pub asymmetric: f32,
    /// Act-order and refinement.
    pub options: gptq::Options,
    /// In which precision calibration multiplies.
    pub precision: Precision,
}

impl Default for Gptq {
    fn default() -> Gptq {
        Gptq { damping: 0.01, asymmetric: 0.5, options: gptq::Options::default(), precision: Precision::Bf16 }
    }
}

/// What the inputs of a layer were like.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// Calibration tokens.
    pub tokens: usize,
    /// Effective rank of the inputs: [`crate::Hessian::effective_rank`].
    pub rank: f64,
    /// Largest over smallest eigenvalue of the damped Hessian: at least this.
    pub condition: f64,
}

/// What was done to one tensor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    /// Hugging Face's name.
    pub name: String,
    /// Stored before.
    pub from: String,
    /// Stored now.
    pub to: String,
    /// Rows and columns.
    pub shape: Vec<usize>,
    /// By calibration; `None` for nearest rounding.
    pub error: Option<LayerError>,
    /// Inputs that calibration never saw as anything but 0.
    pub dead_inputs: usize,
    /// The damping that made the Hessian positive definite, if it had to be raised.
    pub raised_damping: Option<f32>,
    /// Of calibrated layers.
    pub health: Option<Health>,
    /// What it took, its share of its inputs' Hessian left out.
    pub seconds: f64,
}

impl Layer {
    /// Whether it had to be content with less than the method promises: damping raised, rows left to nearest rounding, or
    /// fewer tokens than inputs.
    pub fn fell_back(&self) -> bool {
        let few = self.health.is_some_and(|h| h.tokens < self.shape.last().copied().unwrap_or(0));
        few || self.raised_damping.is_some() || self.error.is_some_and(|e| e.rows_nearest > 0)
    }
}

/// Told as work proceeds: the share that is done, and the tensor at hand.
pub type Progress<'a> = dyn FnMut(f64, &str) + 'a;

/// A model on its way to fewer bits.
pub struct Job<'a> {
    /// Where the weights come from.
    pub source: &'a Source,
    /// What they mean.
    pub model: &'a Model,
    /// Where to compute.
    pub device: &'a Device,
    /// What becomes of each tensor.
    pub plan: &'a [TensorPlan],
    /// How.
    pub method: Method,
    /// Whether scales, norms and biases are tuned behind the rounding of each block.
    pub heal: Option<Heal>,
    /// How much the error of each input counts for [`Method::Nearest`], by GGUF's name of the matrix.
    pub importance: Option<&'a HashMap<String, Vec<f32>>>,
    /// Calibration text; needed by [`Method::Gptq`] and for healing.
    pub tokens: Option<&'a Tokens>,
    /// Most bytes of activations in memory; beyond, they go to disk.
    pub memory: Option<usize>,
    /// Anything else that results depend on; a partial result with another identity is thrown away.
    pub identity: String,
    /// The folder for partial results.
    pub partial: PathBuf,
}

impl Job<'_> {
    /// Rounds all tensors; results lie in the folder for partial results.
    ///
    /// # Errors
    /// If a weight is not finite, the disk is full, or the runtime fails. What is done stays and is taken up again.
    pub fn run(&self, progress: &mut Progress) -> Result<Vec<Layer>, Error> {
        self.prepare()?;
        let mut products = Products::new(self.device);
        if self.method == Method::Nearest && self.heal.is_none() {
            for i in 0..self.plan.len() {
                self.nearest(i, &products, progress)?;
            }
        } else {
            self.calibrated(&mut products, progress)?;
        }
        self.plan.iter().enumerate().map(|(i, plan)| self.layer(i, plan)).collect()
    }

    /// What healing did to each block.
    ///
    /// # Errors
    /// If a partial result is damaged.
    pub fn healing(&self) -> Result<Vec<Healed>, Error> {
        if self.heal.is_none() {
            return Ok(Vec::new());
        }
        (0..self.model.facts().n_layers()).filter_map(|l| self.healed(l).transpose()).collect()
    }

    fn nearest(&self, i: usize, products: &Products, progress: &mut Progress) -> Result<(), Error> {
        let plan = &self.plan[i];
        let Some(grid) = plan.grid().filter(|_| !self.is_done(i)) else { return Ok(()) };
        progress(self.share_done(), &plan.spec.name);
        let start = Instant::now();
        let w = values(&self.original(i)?)?;
        let cols = plan.spec.shape[1];
        let importance = self.importance.and_then(|all| all.get(&plan.gguf_name));
        if let Some(found) = importance.filter(|x| x.len() != cols) {
            return Err(Error::Importance { name: plan.gguf_name.clone(), found: found.len(), cols });
        }
        let rounded = gptq::nearest(&w, cols, grid, importance.map(|x| &x[..]), products.threads());
        let layer = Layer { seconds: start.elapsed().as_secs_f64(), ..describe(plan) };
        self.finish(i, &rounded.bytes(), &layer)
    }

    fn settings(&self) -> Gptq {
        match self.method {
            Method::Gptq(settings) => settings,
            Method::Nearest => Gptq { asymmetric: 0.0, ..Gptq::default() },
        }
    }

    /// Whether nothing is left to do.
    fn all_done(&self) -> bool {
        let blocks = 0..self.model.facts().n_layers();
        (0..self.plan.len()).all(|i| self.is_done(i))
            && (self.heal.is_none() || blocks.into_iter().all(|l| matches!(self.healed(l), Ok(Some(_)))))
    }

    /// Where activations go that would take more memory than is allowed: two streams, each old and new.
    fn spill(&self, tokens: &Tokens) -> Option<&std::path::Path> {
        let bytes = 4 * 4 * tokens.len() * self.model.facts().hidden_size;
        self.memory.is_some_and(|most| bytes > most).then_some(self.partial.as_path())
    }

    fn calibrated(&self, products: &mut Products, progress: &mut Progress) -> Result<(), Error> {
        let tokens = self.tokens.ok_or(Error::NoCalibration)?;
        let settings = &self.settings();
        let blocks = (0..self.model.facts().n_layers()).map(Part::Block);
        let mut parts = Vec::new();
        for part in blocks.chain([Part::Head]) {
            parts.push((part, self.tensors(part)?));
        }
        let in_parts: HashSet<usize> = parts.iter().flat_map(|(_, t)| t.iter().copied()).collect();
        if self.all_done() {
            return Ok(());
        }
        // What no block and no head reads is looked up by token or position: no Hessian weighs its columns.
        for i in 0..self.plan.len() {
            if !in_parts.contains(&i)
                || (self.method == Method::Nearest && layer_of(&self.plan[i].gguf_name).is_none())
            {
                self.nearest(i, products, progress)?;
            }
        }
        // A table that is also the head is rounded before the first token is looked up in it.
        if self.model.facts().tied_head {
            self.tied_table(settings, products, progress, &parts)?;
        }
        let both = settings.asymmetric > 0.0 || self.heal.is_some();
        let tables = |rounded: bool| -> Result<Weights, Error> {
            let mut weights = Weights::new();
            for i in self.embedding_tensors()? {
                let s = if rounded { self.result(i)? } else { self.original(i)? };
                weights.insert(&s.name, &s.shape, s.dtype, &s.bytes)?;
            }
            self.constants(&mut weights)?;
            Ok(weights)
        };
        let original = if both { Some(tables(false)?) } else { None };
        let mut streams = Streams::start(self.springs(tokens, settings), original, tables(true)?)?;
        for (part, tensors) in &parts {
            // Behind the last pending tensor nothing needs the streams.
            if self.all_done() {
                break;
            }
            let mut sides = self.part(*part, tensors, settings, products, &streams, progress)?;
            match (part, &self.heal) {
                (Part::Head, _) => {}
                (Part::Block(layer), Some(heal)) => {
                    let targets = streams.targets(*part, &sides)?;
                    if self.healed(*layer)?.is_none() {
                        progress(self.share_done(), &format!("healing block {layer}"));
                        self.heal_block(*part, tensors, heal, &streams, &targets)?;
                        for &i in tensors {
                            sides.replace(&self.result(i)?)?;
                        }
                    }
                    streams.advance_to(*part, &sides, targets)?;
                }
                (Part::Block(_), None) => streams.advance(*part, &sides)?,
            }
        }
        Ok(())
    }

    fn springs<'s>(&'s self, tokens: &'s Tokens, settings: &Gptq) -> Springs<'s> {
        Springs {
            device: self.device,
            model: self.model,
            tokens,
            precision: settings.precision,
            spill: self.spill(tokens),
        }
    }

    /// Tunes what lies behind the codes of a block, and its norms and biases.
    fn heal_block(
        &self,
        part: Part,
        tensors: &[usize],
        settings: &Heal,
        streams: &Streams,
        targets: &crate::activations::Activations,
    ) -> Result<(), Error> {
        let subjects = tensors.iter().map(|&i| self.subject(i)).collect::<Result<Vec<_>, _>>()?;
        let (tuned, healed) = heal(streams, part, &subjects, targets, settings)?;
        for (&i, tuned) in tensors.iter().zip(tuned) {
            let plan = &self.plan[i];
            let mut bytes = self.written(i)?;
            match tuned {
                None => continue,
                Some(Tuned::Vector(values)) => {
                    bytes = values.into_iter().flat_map(f32::to_le_bytes).collect();
                }
                Some(Tuned::Scales(d, m)) => match plan.plain {
                    None => free::put(plan.to, &mut bytes, &d, m.as_deref()),
                    Some(plain) => {
                        let mut rounded = self.rounded(i, plain)?;
                        for (s, d) in rounded.scales.iter_mut().zip(d) {
                            // The zero is a whole number of scales, so the minimum moves with the scale.
                            s.d = sparsam_dtype::codec::blocks::stored(d);
                            s.dmin = s.d;
                        }
                        bytes = rounded.bytes();
                    }
                },
            }
            save(&self.path(i, "healed"), &bytes)?;
        }
        self.mark_healed(&healed)
    }

    /// A tensor as healing sees it.
    fn subject(&self, i: usize) -> Result<Subject, Error> {
        let plan = &self.plan[i];
        let (name, shape) = (plan.spec.name.clone(), plan.spec.shape.clone());
        if let (Some(plain), &[rows, cols]) = (plan.plain, &shape[..]) {
            return Ok(Subject::Rounded { name, shape: [rows, cols], free: self.plain_free(i, plain)? });
        }
        let s = self.result(i)?;
        let taken = if plan.grid().is_some() { free::take(s.dtype, &s.bytes)? } else { None };
        Ok(match (taken, &shape[..]) {
            (Some(free), &[rows, cols]) => Subject::Rounded { name, shape: [rows, cols], free },
            (_, [_]) if plan.to == sparsam_dtype::DType::F32 => Subject::Vector { name, values: values(&s)? },
            _ => Subject::Fixed { name, shape, values: values(&s)? },
        })
    }

    fn plain_free(&self, i: usize, plain: Plain) -> Result<Free, Error> {
        let rounded = self.rounded(i, plain)?;
        let (d, zeros) = rounded.scales_and_zeros();
        let row = |codes: &[u8], zeros: &[u8]| -> Vec<f32> {
            let groups = codes.chunks(plain.group).zip(zeros);
            groups.flat_map(|(c, &z)| c.iter().map(move |&c| f32::from(c) - f32::from(z))).collect()
        };
        let rows = rounded.codes.chunks(rounded.cols).zip(zeros.chunks(plain.groups(rounded.cols)));
        Ok(Free { d, v: rows.flat_map(|(c, z)| row(c, z)).collect(), min: None })
    }

    fn constants(&self, weights: &mut Weights) -> Result<(), Error> {
        for c in self.model.constants() {
            weights.insert_f32(&c.name, &c.shape, &c.data)?;
        }
        Ok(())
    }

    /// Which tensors a part reads.
    fn tensors(&self, part: Part) -> Result<Vec<usize>, Error> {
        let names = taps::weights(self.model, part)?;
        Ok((0..self.plan.len()).filter(|&i| names.contains(&self.plan[i].spec.name)).collect())
    }

    /// Which tensors the embedding reads.
    fn embedding_tensors(&self) -> Result<Vec<usize>, Error> {
        let names = taps::embedding_weights(self.model)?;
        Ok((0..self.plan.len()).filter(|&i| names.contains(&self.plan[i].spec.name)).collect())
    }

    /// Rounds what is pending of a part, stage by stage; gives both sides as they are then.
    fn part(
        &self,
        part: Part,
        tensors: &[usize],
        settings: &Gptq,
        products: &mut Products,
        streams: &Streams,
        progress: &mut Progress,
    ) -> Result<Sides, Error> {
        let originals = tensors.iter().map(|&i| self.original(i)).collect::<Result<Vec<_>, _>>()?;
        let mut sides = Sides::new(self.model, &originals)?;
        for &i in tensors {
            if self.is_done(i) {
                sides.replace(&self.result(i)?)?;
            }
        }
        let find = |name: &String| tensors.iter().position(|&i| self.plan[i].spec.name == *name);
        for (s, stage) in taps::stages(self.model, part, &sides.original)?.iter().enumerate() {
            let members: Vec<usize> = stage.weights.iter().filter_map(find).collect();
            let pending: Vec<usize> = members.into_iter().filter(|&t| !self.is_done(tensors[t])).collect();
            let Some(&first) = pending.first() else { continue };
            progress(self.share_done(), &self.plan[tensors[first]].spec.name);
            if self.method == Method::Nearest {
                for t in pending {
                    self.nearest(tensors[t], products, progress)?;
                    sides.replace(&self.result(tensors[t])?)?;
                }
                continue;
            }
            let hessian = streams.hessian(part, &sides, s, stage.n)?;
            let problem = Problem::new(&hessian, settings, products.threads())?;
            for t in pending {
                let i = tensors[t];
                progress(self.share_done(), &self.plan[i].spec.name);
                self.round(i, &originals[t], &problem, settings, products)?;
                sides.replace(&self.result(i)?)?;
            }
        }
        Ok(sides)
    }

    /// Rounds one matrix with its Hessian.
    fn round(
        &self,
        i: usize,
        original: &Stored,
        problem: &Problem,
        settings: &Gptq,
        products: &mut Products,
    ) -> Result<(), Error> {
        let plan = &self.plan[i];
        let start = Instant::now();
        let grid: Grid = plan.grid().unwrap_or_else(|| unreachable!("only what has a grid is pending"));
        let mut w = values(original)?;
        if let Some(cross) = &problem.cross {
            w = problem.factor.shifted(products, &w, &problem.damped, cross, settings.asymmetric)?;
        }
        let (rounded, error) =
            gptq::gptq(products, &w, &problem.damped, &problem.factor, grid, &settings.options)?;
        let layer = Layer {
            error: Some(error),
            dead_inputs: problem.damped.dead,
            raised_damping: problem.raised,
            health: Some(problem.health),
            seconds: start.elapsed().as_secs_f64(),
            ..describe(plan)
        };
        self.finish(i, &rounded.bytes(), &layer)
    }

    /// Rounds a table that is also the head, with the Hessian of the head's inputs in the original model.
    fn tied_table(
        &self,
        settings: &Gptq,
        products: &mut Products,
        progress: &mut Progress,
        parts: &[(Part, Vec<usize>)],
    ) -> Result<(), Error> {
        let Some((part, tensors)) = parts.last() else { return Ok(()) };
        let Some(&i) = tensors.iter().find(|&&i| !self.is_done(i)) else { return Ok(()) };
        if self.plan[i].to.bits() >= 8.0 {
            // So exact that a pass through the model for its Hessian would not be worth its time.
            return self.nearest(i, products, progress);
        }
        progress(self.share_done(), &self.plan[i].spec.name);
        let tokens = self.tokens.ok_or(Error::NoCalibration)?;
        let mut weights = Weights::new();
        for i in self.embedding_tensors()? {
            let s = self.original(i)?;
            weights.insert(&s.name, &s.shape, s.dtype, &s.bytes)?;
        }
        self.constants(&mut weights)?;
        let mut streams = Streams::start(self.springs(tokens, settings), None, weights)?;
        for (block, tensors) in &parts[..parts.len() - 1] {
            let originals = tensors.iter().map(|&i| self.original(i)).collect::<Result<Vec<_>, _>>()?;
            streams.advance(*block, &Sides::new(self.model, &originals)?)?;
        }
        let originals = tensors.iter().map(|&i| self.original(i)).collect::<Result<Vec<_>, _>>()?;
        let sides = Sides::new(self.model, &originals)?;
        let stages = taps::stages(self.model, *part, &sides.original)?;
        let find = |s: &taps::Stage| s.weights.contains(&self.plan[i].spec.name);
        let Some(s) = stages.iter().position(find) else { return self.nearest(i, products, progress) };
        let hessian = streams.hessian(*part, &sides, s, stages[s].n)?;
        let problem = Problem::new(&hessian, settings, products.threads())?;
        let original = self.original(i)?;
        self.round(i, &original, &problem, settings, products)
    }
}

/// A Hessian ready for use.
struct Problem {
    damped: crate::Damped,
    factor: Factor,
    cross: Option<Vec<f32>>,
    raised: Option<f32>,
    health: Health,
}

impl Problem {
    /// Damped until it can be factorised.
    fn new(h: &crate::Hessian, settings: &Gptq, threads: usize) -> Result<Problem, Error> {
        let scale = 1.0 / h.tokens.max(1) as f32;
        let cross = h.cross.as_ref().map(|c| c.iter().map(|v| v * scale).collect());
        let mut damping = settings.damping;
        loop {
            let damped = h.damped(damping);
            let raised = (damping != settings.damping).then_some(damping);
            match Factor::new(&damped, settings.options.act_order, threads) {
                Ok(factor) => {
                    let (rank, condition) = (h.effective_rank(), factor.condition(&damped));
                    let health = Health { tokens: h.tokens, rank, condition };
                    return Ok(Problem { damped, factor, cross, raised, health });
                }
                Err(e) if damping >= 1.0 => return Err(e),
                Err(_) => damping = (damping * 10.0).max(1e-3),
            }
        }
    }
}
