//! A whole model, block by block: one block of weights in memory at a time, results on disk as they come.
//!
//! What is done is kept in a folder beside the output (`OUT.partial`), a file a tensor, each written atomically. Started
//! again with the same settings, a killed run goes on behind the last tensor; the streams of activations are computed
//! again, which takes a fraction of the work.

use crate::calibrate::{Sides, Stored, Streams, Tokens};
use crate::gptq::{self, Factor, LayerError};
use crate::linalg::Products;
use crate::recipe::TensorPlan;
use crate::taps::{self, Part};
use crate::{Error, Grid};
use serde::{Deserialize, Serialize};
use sparsam_dtype::codec;
use sparsam_formats::{AtomicFile, Source, TensorSpec, gguf};
use sparsam_ir::Precision;
use sparsam_models::Model;
use sparsam_runtime::{Device, Weights};
use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

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

/// What was done to one tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// Calibration text; needed by [`Method::Gptq`].
    pub tokens: Option<&'a Tokens>,
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
        match self.method {
            Method::Nearest => {
                for i in 0..self.plan.len() {
                    self.nearest(i, &products, progress)?;
                }
            }
            Method::Gptq(settings) => self.calibrated(&settings, &mut products, progress)?,
        }
        self.plan.iter().enumerate().map(|(i, plan)| self.layer(i, plan)).collect()
    }

    /// Makes the folder, empty if it holds results of other settings.
    fn prepare(&self) -> Result<(), Error> {
        let mark = self.partial.join("identity.txt");
        let identity = format!("{}\n{:?}\n", self.identity, self.method);
        if std::fs::read_to_string(&mark).is_ok_and(|found| found == identity) {
            return Ok(());
        }
        let io = |e| Error::Io { what: format!("cannot use {}", self.partial.display()), source: e };
        if self.partial.exists() {
            // Only what this module writes: never a folder that somebody else filled.
            for entry in std::fs::read_dir(&self.partial).map_err(io)? {
                let path = entry.map_err(io)?.path();
                let ours = path
                    .extension()
                    .is_some_and(|e| ["tensor", "json", "txt", "tmp"].iter().any(|k| e == *k));
                if ours {
                    std::fs::remove_file(&path).map_err(io)?;
                }
            }
        }
        std::fs::create_dir_all(&self.partial).map_err(io)?;
        save(&mark, identity.as_bytes())
    }

    /// Deletes the folder for partial results.
    pub fn clean(&self) {
        for i in 0..self.plan.len() {
            let _ = std::fs::remove_file(self.path(i, "tensor"));
            let _ = std::fs::remove_file(self.path(i, "json"));
        }
        let _ = std::fs::remove_file(self.partial.join("identity.txt"));
        // Fails if it holds anything else, as it should.
        let _ = std::fs::remove_dir(&self.partial);
    }

    fn path(&self, i: usize, kind: &str) -> PathBuf {
        self.partial.join(format!("{i:05}.{kind}"))
    }

    fn is_done(&self, i: usize) -> bool {
        self.plan[i].grid().is_none() || self.path(i, "json").exists()
    }

    fn share_done(&self) -> f64 {
        let all: usize = self.plan.iter().filter(|p| p.grid().is_some()).map(TensorPlan::numel).sum();
        let done = (0..self.plan.len()).filter(|&i| self.plan[i].grid().is_some() && self.is_done(i));
        done.map(|i| self.plan[i].numel()).sum::<usize>() as f64 / all.max(1) as f64
    }

    fn layer(&self, i: usize, plan: &TensorPlan) -> Result<Layer, Error> {
        if plan.grid().is_none() {
            return Ok(describe(plan));
        }
        let path = self.path(i, "json");
        let damaged = |what: String| Error::Partial { path: path.clone(), what };
        let bytes = std::fs::read(&path).map_err(|e| damaged(e.to_string()))?;
        serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))
    }

    /// A tensor as the original has it, in the model's layout.
    fn original(&self, i: usize) -> Result<Stored, Error> {
        let spec = &self.plan[i].spec;
        let tensor = self.source.require(&spec.source_name)?;
        let turned = spec.transform.apply(tensor.bytes, tensor.info.dtype, &tensor.info.shape)?;
        let (dtype, bytes) = (turned.dtype, turned.bytes.into_owned());
        self.source.release(&spec.source_name);
        Ok(Stored { name: spec.name.clone(), shape: spec.shape.clone(), dtype, bytes })
    }

    /// A tensor as it will be, in the model's layout.
    fn result(&self, i: usize) -> Result<Stored, Error> {
        let plan = &self.plan[i];
        let (name, shape) = (plan.spec.name.clone(), plan.spec.shape.clone());
        if plan.grid().is_some() {
            let path = self.path(i, "tensor");
            let bytes = std::fs::read(&path)
                .map_err(|e| Error::Partial { path: path.clone(), what: e.to_string() })?;
            if bytes.len() != plan.bytes() {
                let what = format!("it has {} bytes instead of {}", bytes.len(), plan.bytes());
                return Err(Error::Partial { path, what });
            }
            return Ok(Stored { name, shape, dtype: plan.to, bytes });
        }
        let original = self.original(i)?;
        if original.dtype == plan.to {
            return Ok(original);
        }
        let values = values(&original)?;
        let mut bytes = vec![0; plan.bytes()];
        codec::encode(plan.to, &values, &mut bytes)?;
        Ok(Stored { name, shape, dtype: plan.to, bytes })
    }

    fn finish(&self, i: usize, bytes: &[u8], layer: &Layer) -> Result<(), Error> {
        save(&self.path(i, "tensor"), bytes)?;
        // Its presence says that the tensor is complete.
        save(&self.path(i, "json"), &serde_json::to_vec(layer).expect("plain data"))
    }

    fn nearest(&self, i: usize, products: &Products, progress: &mut Progress) -> Result<(), Error> {
        let plan = &self.plan[i];
        let Some(grid) = plan.grid().filter(|_| !self.is_done(i)) else { return Ok(()) };
        progress(self.share_done(), &plan.spec.name);
        let w = values(&self.original(i)?)?;
        let rounded = gptq::nearest(&w, plan.spec.shape[1], grid, None, products.threads());
        self.finish(i, &rounded.bytes(), &describe(plan))
    }

    fn calibrated(
        &self,
        settings: &Gptq,
        products: &mut Products,
        progress: &mut Progress,
    ) -> Result<(), Error> {
        let tokens = self.tokens.ok_or(Error::NoCalibration)?;
        let blocks = (0..self.model.facts().n_layers()).map(Part::Block);
        let mut parts = Vec::new();
        for part in blocks.chain([Part::Head]) {
            parts.push((part, self.tensors(part)?));
        }
        let in_parts: HashSet<usize> = parts.iter().flat_map(|(_, t)| t.iter().copied()).collect();
        if (0..self.plan.len()).all(|i| self.is_done(i)) {
            return Ok(());
        }
        // What no block and no head reads is looked up by token or position: no Hessian weighs its columns.
        for i in 0..self.plan.len() {
            if !in_parts.contains(&i) {
                self.nearest(i, products, progress)?;
            }
        }
        // A table that is also the head is rounded before the first token is looked up in it.
        if self.model.facts().tied_head {
            self.tied_table(settings, products, progress, &parts)?;
        }
        let both = settings.asymmetric > 0.0;
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
        let (device, model) = (self.device, self.model);
        let mut streams = Streams::start(device, model, tokens, settings.precision, original, tables(true)?)?;
        for (part, tensors) in &parts {
            let pending = tensors.iter().any(|&i| !self.is_done(i));
            // Behind the last pending tensor nothing needs the streams.
            if !pending && (0..self.plan.len()).all(|i| self.is_done(i)) {
                break;
            }
            let sides = self.part(*part, tensors, settings, products, &streams, progress)?;
            if *part != Part::Head {
                streams.advance(*part, &sides)?;
            }
        }
        Ok(())
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
        let mut streams = Streams::start(self.device, self.model, tokens, settings.precision, None, weights)?;
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

    /// Writes the model as a GGUF file with this metadata; tensors in the order of the source.
    ///
    /// # Errors
    /// If the disk is full or a partial result is missing.
    pub fn write_gguf(&self, out: &Path, metadata: &gguf::Metadata) -> Result<(), Error> {
        let is_gguf = self.source.gguf_metadata().is_some();
        let mut order: Vec<Entry> = Vec::new();
        let mut taken = vec![false; self.plan.len()];
        for info in self.source.tensors() {
            let plan = self.plan.iter().position(|p| p.spec.source_name == info.name);
            match plan {
                Some(i) => {
                    taken[i] = true;
                    order.push(Entry::Planned(i));
                }
                // Rotary frequencies and the like, which only GGUF's readers know.
                None if is_gguf => order.push(Entry::Copied(info.name.clone())),
                None => {}
            }
        }
        debug_assert!(taken.iter().all(|t| *t), "every planned tensor is in the source");
        let mut specs = Vec::new();
        for entry in &order {
            specs.push(match entry {
                Entry::Planned(i) => self.gguf_spec(*i),
                Entry::Copied(name) => TensorSpec::from(self.source.require(name)?.info),
            });
        }
        let mut writer = gguf::Writer::create(out, metadata, &specs)?;
        for (entry, spec) in order.iter().zip(&specs) {
            match entry {
                Entry::Planned(i) => {
                    let s = self.result(*i)?;
                    let back = self.gguf_transform(*i).inverse();
                    let turned = back.apply(&s.bytes, s.dtype, &s.shape)?;
                    writer.append(&spec.name, &turned.bytes)?;
                }
                Entry::Copied(name) => writer.append(name, self.source.require(name)?.bytes)?,
            }
        }
        Ok(writer.finish()?)
    }

    fn gguf_transform(&self, i: usize) -> sparsam_formats::Transform {
        let name = &self.plan[i].spec.name;
        let stored = self.model.stored_as(sparsam_formats::Kind::Gguf, name);
        stored.unwrap_or_else(|| unreachable!("{name} is a parameter of the model")).1
    }

    fn gguf_spec(&self, i: usize) -> TensorSpec {
        let plan = &self.plan[i];
        let shape = self.gguf_transform(i).inverse().shape(&plan.spec.shape);
        TensorSpec { name: plan.gguf_name.clone(), shape, dtype: plan.to }
    }
}

enum Entry {
    /// A tensor of the plan.
    Planned(usize),
    /// A tensor of the source that is no parameter.
    Copied(String),
}

/// A Hessian ready for use.
struct Problem {
    damped: crate::Damped,
    factor: Factor,
    cross: Option<Vec<f32>>,
    raised: Option<f32>,
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
                Ok(factor) => return Ok(Problem { damped, factor, cross, raised }),
                Err(e) if damping >= 1.0 => return Err(e),
                Err(_) => damping = (damping * 10.0).max(1e-3),
            }
        }
    }
}

fn describe(plan: &TensorPlan) -> Layer {
    Layer {
        name: plan.spec.name.clone(),
        from: plan.from.to_string(),
        to: plan.to.to_string(),
        shape: plan.spec.shape.clone(),
        error: None,
        dead_inputs: 0,
        raised_damping: None,
    }
}

/// A tensor's numbers, all of them finite.
fn values(s: &Stored) -> Result<Vec<f32>, Error> {
    let mut w = vec![0.0; s.shape.iter().product()];
    codec::decode(s.dtype, &s.bytes, &mut w)?;
    match w.iter().position(|v| !v.is_finite()) {
        None => Ok(w),
        Some(at) => Err(Error::NotFinite { name: s.name.clone(), at, value: w[at] }),
    }
}

fn save(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes)
        .map_err(|e| Error::Io { what: format!("cannot write {}", path.display()), source: e })?;
    Ok(file.commit()?)
}
