//! A model under training on a device: its weights and moments, and the programs that change them.

use crate::Error;
use crate::data::PackedRows;
use crate::optim::{Kept, Optimiser, RATES, is_moment};
use crate::random::Random;
use crate::step::{self, GRAD_NORM, LOSS, NO_TARGET, Soft, Targets};
use sparsam_dtype::codec;
use sparsam_engine::{Plan, Saver};
use sparsam_formats::{Kind, Source, gguf};
use sparsam_ir::{DType, Graph, Op, Trace};
use sparsam_kernels::{FilePages, give_back_freed};
use sparsam_models::adapter::DROPOUT_SEED;
use sparsam_models::nn::{Batch, Cache};
use sparsam_models::{Model, Parameter};
use sparsam_plan::units::show_bytes;
use sparsam_runtime::{CompileError, Data, Device, Group, Options, Outputs, Session, Step, Weights};
use sparsam_tokenizer::Tokenizer;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// Tokens in a page of the cache that samples are generated with.
const PAGE: usize = 16;

/// How a model is trained: what the programs are made for.
#[derive(Clone, Debug)]
pub struct How {
    /// Rows of a micro-batch.
    pub rows: usize,
    /// Tokens of a row.
    pub ctx: usize,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Which rows have a loss, and what it counts.
    pub targets: Targets,
    /// Processes that take each step together ([`Learner::join`]).
    pub processes: usize,
    /// The optimiser.
    pub optimiser: Optimiser,
    /// Whether it will write samples, whose cache then counts within a budget of memory.
    pub samples: bool,
    /// Passes of the compiler; [`Options::eager`] runs node by node.
    pub options: Options,
}

impl How {
    /// Tokens of a micro-batch.
    pub fn n_tokens(&self) -> usize {
        self.rows * self.ctx
    }
}

/// What a model learns upon: weights that stay as they are, in whatever type they are stored, and which are trained.
#[derive(Clone)]
pub struct Base {
    /// All weights that are not trained; none where all are.
    pub weights: Weights,
    /// Whether the weight of this name is trained.
    pub trained: fn(&str) -> bool,
    /// Of dropout.
    pub seed: u64,
}

impl Base {
    /// Nothing stays as it is: all weights are trained.
    pub fn nothing() -> Base {
        Base { weights: Weights::new(), trained: |_| true, seed: 0 }
    }
}

/// What a step gives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Mean loss over all targets of the step, in nats.
    pub loss: f64,
    /// Norm of all gradients together before clipping; `None` where they are not clipped.
    pub grad_norm: Option<f64>,
    /// Targets that were learnt from, in all processes.
    pub targets: u64,
}

impl Outcome {
    /// Whether all numbers are numbers.
    pub fn is_finite(&self) -> bool {
        self.loss.is_finite() && self.grad_norm.is_none_or(f64::is_finite)
    }
}

#[allow(clippy::large_enum_variant)] // a learner has one of these
enum Programs {
    /// One program for the whole step.
    Whole(Step),
    /// One for each micro-batch, another for the last one where processes sum behind it, one behind them.
    Parts { accumulate: Step, last: Option<Step>, apply: Step },
}

impl Programs {
    fn load(session: &mut Session, graphs: &Graphs, how: &How) -> Result<Programs, Error> {
        let mut load = |graph: &Graph| graphs.load(session, graph, how);
        Ok(match &graphs.whole {
            Some(whole) => Programs::Whole(load(whole)?),
            None => Programs::Parts {
                accumulate: load(&graphs.accumulate)?,
                last: graphs.last.as_ref().map(&mut load).transpose()?,
                apply: load(&graphs.apply)?,
            },
        })
    }
}

/// A model under training: a [`Session`] whose states are weights and moments.
pub struct Learner {
    model: Model,
    how: How,
    session: Session,
    parameters: Vec<Parameter>,
    leaves: Leaves,
    seed: u64,
    programs: Programs,
    /// The loss alone; made when it is first wanted.
    evaluate: Option<Step>,
    /// Generates a token; made when it is first wanted.
    decode: Option<Step>,
}

impl Learner {
    /// Compiles the steps; all weights and moments are 0.
    ///
    /// # Errors
    /// If the model's shapes do not fit together, or its rows are longer than it can be trained on.
    pub fn new(model: &Model, how: How, device: &Device) -> Result<Learner, Error> {
        Learner::over(model, how, device, Base::nothing())
    }

    /// Compiles the steps of a model that learns upon `base`; all weights under training and moments are 0.
    ///
    /// # Errors
    /// As [`Learner::new`]; if `base` lacks a weight.
    pub fn over(model: &Model, how: How, device: &Device, base: Base) -> Result<Learner, Error> {
        Learner::over_in(model, how, device, base, &std::env::temp_dir())
    }

    /// As [`Learner::over`]; moments that are paged lie in a file in `folder`, which has no name and goes with the learner.
    ///
    /// # Errors
    /// As [`Learner::over`]; if the disk has no room for them.
    pub fn over_in(
        model: &Model,
        how: How,
        device: &Device,
        base: Base,
        folder: &Path,
    ) -> Result<Learner, Error> {
        let facts = model.facts();
        if facts.architecture == "gpt2" && how.ctx > facts.context_length {
            return Err(Error::config(
                "data.ctx",
                format!("is {}, but the model has {} positions", how.ctx, facts.context_length),
            ));
        }
        let mut parameters = model.parameters()?;
        parameters.extend(model.adapter_parameters()?);
        parameters.retain(|p| (base.trained)(&p.name));
        let leaves = Leaves::new(&base, &parameters);
        let Base { mut weights, seed, .. } = base;
        for c in model.constants() {
            weights.insert_f32(&c.name, &c.shape, &c.data)?;
        }
        let mut session = Session::new(device, Arc::new(weights));
        if how.optimiser.paged {
            page(&mut session, folder, &how.optimiser, &parameters)?;
        }
        let graphs = Graphs::new(model, &how, &parameters, &leaves)?;
        let programs = Programs::load(&mut session, &graphs, &how)?;
        let model = model.clone();
        Ok(Learner { model, how, session, parameters, leaves, seed, programs, evaluate: None, decode: None })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What the programs are made for.
    pub fn how(&self) -> &How {
        &self.how
    }

    /// The parameters under training, in the model's order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The session, for its states and profile.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// The program of a step, for `--explain`: of the last micro-batch, where there are several.
    pub fn program(&self) -> &Step {
        match &self.programs {
            Programs::Whole(step) => step,
            Programs::Parts { accumulate, last, .. } => last.as_ref().unwrap_or(accumulate),
        }
    }

    /// From now on its steps are those of all processes of `group` together, each on micro-batches of its own: as if one
    /// process had them all. All have the same weights before a step and after it.
    ///
    /// # Panics
    /// If they are not as many as it was made for.
    pub fn join(&mut self, group: Arc<dyn Group>) {
        assert_eq!(group.size(), self.how.processes, "processes of a step");
        self.session.set_group(group);
    }

    /// Bytes that weights, moments, gradients and activations take together, without those that lie in a file.
    pub fn bytes(&self) -> usize {
        let states = self.session.states_bytes().saturating_sub(self.session.paged_bytes());
        self.session.arena_bytes() + states + self.session.weights().bytes()
    }

    /// Bytes of moments that lie in a file.
    pub fn paged_bytes(&self) -> usize {
        self.session.paged_bytes()
    }

    /// The graphs that its programs are made from.
    ///
    /// # Errors
    /// None behind [`Learner::new`].
    pub(crate) fn graphs(&self) -> Result<Graphs, Error> {
        Graphs::new(&self.model, &self.how, &self.parameters, &self.leaves)
    }

    /// The options with which `graph`, one of its own, is compiled.
    ///
    /// # Errors
    /// None behind [`Learner::new`].
    pub(crate) fn within(&self, graph: &Graph) -> Result<Options, Error> {
        Ok(self.graphs()?.within(graph, &self.how))
    }

    /// Compiles the steps anew with `options`; weights and moments stay.
    ///
    /// # Errors
    /// If they do not compile so.
    pub fn set_options(&mut self, options: Options) -> Result<(), Error> {
        self.how.options = options;
        let graphs = self.graphs()?;
        self.programs = Programs::load(&mut self.session, &graphs, &self.how)?;
        drop(graphs);
        give_back_freed();
        (self.evaluate, self.decode) = (None, None);
        Ok(())
    }

    /// What a checkpoint holds: weights and moments.
    pub fn kept(&self) -> Vec<Kept> {
        let mut kept = Vec::new();
        for p in &self.parameters {
            kept.push(Kept { name: p.name.clone(), shape: p.shape.clone(), dtype: DType::F32 });
            kept.extend(self.how.optimiser.moments(&p.name, &p.shape));
        }
        kept
    }

    /// Bytes of the optimiser's moments.
    pub fn moments_bytes(&self) -> usize {
        let of = |p: &Parameter| {
            self.how.optimiser.moments(&p.name, &p.shape).iter().map(Kept::bytes).sum::<usize>()
        };
        self.parameters.iter().map(of).sum()
    }

    /// The bytes of a weight or moment as they are now.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn state_bytes(&self, name: &str) -> Result<&[u8], Error> {
        Ok(self.session.state_bytes(name)?)
    }

    /// The numbers of a weight or moment in F32 as they are now.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn state(&self, name: &str) -> Result<&[f32], Error> {
        Ok(bytemuck::cast_slice(self.session.state_bytes(name)?))
    }

    /// Replaces a weight or moment in F32.
    ///
    /// # Errors
    /// If there is none of that name, or it has another number of elements.
    pub fn set_state(&mut self, name: &str, values: &[f32]) -> Result<(), Error> {
        Ok(self.session.set_state(name, bytemuck::cast_slice(values))?)
    }

    /// Random weights, moments 0.
    ///
    /// # Errors
    /// None that the model's own parameters can cause.
    pub fn initialise(&mut self, seed: u64) -> Result<(), Error> {
        for p in self.parameters.clone() {
            let values = crate::new::initial(&self.model, &p, seed);
            self.set_state(&p.name, &values)?;
        }
        Ok(())
    }

    /// The weights of a model that is there already, moments 0.
    ///
    /// # Errors
    /// If a tensor is missing, misshapen or cannot be decoded.
    pub fn take_from(&mut self, source: &Source) -> Result<(), Error> {
        for spec in self.model.weights(source)? {
            let tensor = source.require(&spec.source_name)?;
            let turned = spec.transform.apply(tensor.bytes, tensor.info.dtype, &tensor.info.shape)?;
            let mut values = vec![0f32; spec.shape.iter().product()];
            codec::decode(turned.dtype, &turned.bytes, &mut values).map_err(|e| {
                Error::config(source.path().display().to_string(), format!("{}: {e}", spec.name))
            })?;
            if let Some(bad) = values.iter().find(|x| !x.is_finite()) {
                let problem = format!("tensor {} holds {bad}; the file is damaged", spec.source_name);
                return Err(Error::config(source.path().display().to_string(), problem));
            }
            self.set_state(&spec.name, &values)?;
            drop(turned);
            source.release(&spec.source_name);
        }
        Ok(())
    }

    /// Writes the model as it is: a GGUF file (which says its `name`), or a folder as Hugging Face lays it out.
    ///
    /// # Errors
    /// If the format cannot hold the configuration or the tokenizer; if a weight is not finite or does not fit `dtype`;
    /// if there is a folder at `path` that is not empty, or the disk is full.
    pub fn export(
        &self,
        path: &Path,
        kind: Kind,
        dtype: DType,
        tokenizer: Option<&Tokenizer>,
        name: Option<&str>,
    ) -> Result<(), Error> {
        let mut plan = Plan::uniform(&self.model, kind, dtype)?.with_probes();
        if let Some(name) = name {
            plan.about.insert("general.name", gguf::Value::String(name.to_string()));
        }
        let mut saver = Saver::create(path, kind, &self.model, tokenizer, &plan)?;
        for p in &self.parameters {
            saver.append(&p.name, &p.shape, DType::F32, self.session.state_bytes(&p.name)?)?;
        }
        Ok(saver.finish()?)
    }

    /// One optimiser step on `micro` batches of as many rows as it was made for; step `t` counts from 1.
    ///
    /// # Errors
    /// Tokens outside of the vocabulary; then other processes wait in vain, and have to be ended.
    ///
    /// # Panics
    /// If the number of micro-batches or of processes is not the one it was made for.
    pub fn step(&mut self, micro: &[PackedRows], t: u64, lr: f64) -> Result<Outcome, Error> {
        let group = self.session.group().clone();
        assert_eq!(micro.len(), self.how.accumulate, "micro-batches of a step");
        assert_eq!(group.size(), self.how.processes, "processes of a step");
        let mut targets = [micro.iter().map(PackedRows::n_targets).sum::<usize>() as u64];
        group.sum_counts(&mut targets);
        let [targets] = targets;
        let scale =
            [1.0 / if self.how.targets.weighted { micro.len() as u64 } else { targets.max(1) } as f32];
        let rates = self.how.optimiser.adamw.rates(lr, t);
        let rates = (RATES, Data::F32(&rates));
        let norm_of = |out: &Outputs, clipped: bool| -> Result<Option<f64>, Error> {
            Ok(if clipped { Some(out.f32(GRAD_NORM)?[0] as f64) } else { None })
        };
        let clipped = self.how.optimiser.clip.is_some();
        let drops = self.model.adapters().iter().any(|a| a.dropout() > 0.0);
        // Another mask for every micro-batch of the run.
        let turn = (t - 1) * group.size() as u64 + group.rank() as u64;
        let seeds: Vec<[i32; 2]> = (0..micro.len() as u64)
            .map(|i| Random::new(self.seed, "dropout", turn * micro.len() as u64 + i).next())
            .map(|x| [x as i32, (x >> 32) as i32])
            .collect();
        let fed: Vec<Fed> = micro.iter().map(|rows| Fed::new(rows, &self.how.targets)).collect();
        let inputs = |i: usize| {
            let mut all = fed[i].inputs(&scale);
            all.extend(drops.then(|| (DROPOUT_SEED, Data::I32(&seeds[i]))));
            all
        };
        let (mut loss, grad_norm) = match &self.programs {
            Programs::Whole(step) => {
                let mut inputs = inputs(0);
                inputs.push(rates);
                let out = self.session.run(step, &inputs)?;
                (out.f32(LOSS)?[0] as f64, norm_of(&out, clipped)?)
            }
            Programs::Parts { accumulate, last, apply } => {
                let mut loss = 0.0;
                for i in 0..micro.len() {
                    let program = last.as_ref().filter(|_| i + 1 == micro.len()).unwrap_or(accumulate);
                    loss += self.session.run(program, &inputs(i))?.f32(LOSS)?[0] as f64;
                }
                (loss, norm_of(&self.session.run(apply, &[rates])?, clipped)?)
            }
        };
        if group.size() > 1 {
            // Each process has divided by the targets of all: the sum is the mean over all of them.
            let mut all = [loss as f32];
            group.sum(&mut all);
            loss = all[0] as f64;
        }
        Ok(Outcome { loss, grad_norm, targets })
    }

    /// Sum of the losses over the targets of `rows` (filled up with padding if they are fewer), and how many these are.
    ///
    /// # Errors
    /// Tokens outside of the vocabulary.
    pub fn evaluate(&mut self, rows: &PackedRows) -> Result<(f64, usize), Error> {
        let mut rows = rows.clone();
        rows.pad_to(self.how.n_tokens());
        let step = match self.evaluate.take() {
            Some(step) => step,
            None => {
                let graphs = self.graphs()?;
                graphs.load(&mut self.session, &graphs.evaluate, &self.how)?
            }
        };
        let fed = Fed::new(&rows, &self.how.targets);
        let loss = self.session.run(&step, &fed.inputs(&[1.0]))?.f32(LOSS)?[0] as f64;
        self.evaluate = Some(step);
        Ok((loss, rows.n_targets()))
    }

    /// `n` tokens that the model, as it is now, writes behind `prompt`: drawn at `temperature` (0: the likeliest), by
    /// `seed`. Stops behind `end`, and where the row is full.
    ///
    /// # Errors
    /// Tokens outside of the vocabulary.
    pub fn sample(
        &mut self,
        prompt: &[u32],
        n: usize,
        temperature: f64,
        seed: u64,
        end: Option<u32>,
    ) -> Result<Vec<u32>, Error> {
        let pages = self.how.ctx.div_ceil(PAGE);
        let step = match self.decode.take() {
            Some(step) => step,
            None => {
                let graphs = self.graphs()?;
                graphs.load(&mut self.session, &graphs.decode, &self.how)?
            }
        };
        let table: Vec<i32> = (0..pages as i32).collect();
        let mut random = Random::new(seed, "sample", 0);
        let mut written = Vec::new();
        let mut next = prompt.first().copied().unwrap_or(0);
        for at in 0..self.how.ctx {
            let (token, position) = ([next as i32], [at as i32]);
            let inputs = [
                ("tokens", Data::I32(&token)),
                ("positions", Data::I32(&position)),
                ("row_seq", Data::I32(&[0])),
                ("slots", Data::I32(&position)),
                ("page_table", Data::I32(&table)),
            ];
            // Models without rotary embeddings and those without positions of their own ask for fewer.
            let asked: Vec<_> =
                inputs.into_iter().filter(|(name, _)| step.inputs().any(|(n, ..)| n == *name)).collect();
            let out = self.session.run(&step, &asked)?;
            if let Some(&given) = prompt.get(at + 1) {
                next = given;
                continue;
            }
            if written.len() == n {
                break;
            }
            next = draw(out.f32("logits")?, temperature, &mut random) as u32;
            written.push(next);
            if Some(next) == end {
                break;
            }
        }
        self.decode = Some(step);
        Ok(written)
    }
}

/// An index drawn from `softmax(logits / temperature)`; the largest at temperature 0.
fn draw(logits: &[f32], temperature: f64, random: &mut Random) -> usize {
    let largest = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
    if temperature <= 0.0 {
        return largest;
    }
    let top = logits[largest] as f64;
    let weight = |x: f32| ((x as f64 - top) / temperature).exp();
    let mut left = random.uniform() * logits.iter().map(|&x| weight(x)).sum::<f64>();
    for (i, &x) in logits.iter().enumerate() {
        left -= weight(x);
        if left <= 0.0 {
            return i;
        }
    }
    largest
}

impl PackedRows {
    /// Adds rows that no token sees and that have no target, up to `n` tokens.
    pub fn pad_to(&mut self, n: usize) {
        let before = self.tokens.len();
        for i in before..n {
            self.tokens.push(0);
            self.positions.push(0);
            self.row_start.push(i as i32 + 1); // beyond itself: padding
            self.targets.push(NO_TARGET);
        }
        if !self.weights.is_empty() {
            self.weights.resize(self.tokens.len(), 0.0);
        }
        if let Some(top) = self.soft.len().checked_div(before).filter(|&top| top > 0) {
            self.soft.resize(self.tokens.len() * top, (0, 0.0));
        }
    }
}

/// A packed batch as the inputs of a step: its rows, and those of them that have a loss.
pub(crate) struct Fed<'a> {
    rows: &'a PackedRows,
    /// Where only some rows get logits: which.
    logit_rows: Option<Vec<i32>>,
    targets: Cow<'a, [i32]>,
    weights: Option<Vec<f32>>,
    /// Places in the logits, and probabilities there.
    soft: Option<(Vec<i32>, Vec<f32>)>,
}

impl<'a> Fed<'a> {
    /// `rows` for a step that is made for `targets`.
    ///
    /// # Panics
    /// If more rows have a target than the step is made for.
    pub fn new(rows: &'a PackedRows, targets: &Targets) -> Fed<'a> {
        let weight = |i: usize| match (rows.targets[i], rows.weights.get(i)) {
            (NO_TARGET, _) => 0.0,
            (_, weight) => weight.copied().unwrap_or(1.0),
        };
        let Some(n) = targets.rows else {
            let n = rows.targets.len();
            let weights = targets.has_weights().then(|| (0..n).map(weight).collect());
            let soft = targets.soft.map(|s| soft(rows, &(0..n).collect::<Vec<_>>(), n, &s));
            return Fed { rows, logit_rows: None, targets: Cow::Borrowed(&rows.targets), weights, soft };
        };
        let mut chosen: Vec<usize> =
            (0..rows.targets.len()).filter(|&i| rows.targets[i] != NO_TARGET).collect();
        assert!(chosen.len() <= n, "{} rows have a target, the step is made for {n}", chosen.len());
        let mut wanted: Vec<i32> = chosen.iter().map(|&i| rows.targets[i]).collect();
        let mut weights: Vec<f32> = chosen.iter().map(|&i| weight(i)).collect();
        let soft = targets.soft.map(|s| soft(rows, &chosen, n, &s));
        chosen.resize(n, 0);
        wanted.resize(n, NO_TARGET);
        weights.resize(n, 0.0);
        Fed {
            rows,
            logit_rows: Some(chosen.into_iter().map(|i| i as i32).collect()),
            targets: Cow::Owned(wanted),
            weights: targets.has_weights().then_some(weights),
            soft,
        }
    }

    /// The inputs; losses are multiplied by `scale`.
    pub fn inputs(&'a self, scale: &'a [f32; 1]) -> Vec<(&'static str, Data<'a>)> {
        let mut all = vec![
            ("tokens", Data::I32(&self.rows.tokens)),
            ("positions", Data::I32(&self.rows.positions)),
            ("row_start", Data::I32(&self.rows.row_start)),
            ("targets", Data::I32(&self.targets)),
            ("loss_scale", Data::F32(scale)),
        ];
        all.extend(self.logit_rows.as_ref().map(|rows| ("logit_rows", Data::I32(rows))));
        all.extend(self.weights.as_ref().map(|weights| ("weights", Data::F32(weights))));
        if let Some((at, p)) = &self.soft {
            all.extend([("soft_at", Data::I32(at)), ("soft_p", Data::F32(p))]);
        }
        all
    }
}

/// The probabilities of the rows that have logits, of which there are `n`; rows without a target have any.
fn soft(rows: &PackedRows, chosen: &[usize], n: usize, s: &Soft) -> (Vec<i32>, Vec<f32>) {
    let (mut at, mut p) = (Vec::with_capacity(n * s.top), Vec::with_capacity(n * s.top));
    for (row, &i) in chosen.iter().enumerate() {
        for &(id, probability) in rows.soft.iter().skip(i * s.top).take(s.top) {
            at.push((row * s.vocab_size + id as usize) as i32);
            p.push(probability);
        }
    }
    at.resize(n * s.top, 0);
    p.resize(n * s.top, 0.0);
    (at, p)
}

/// The weights that the model may ask for, and which of them are trained.
pub(crate) struct Leaves {
    /// `None`: all, and all are trained.
    known: Option<HashMap<String, (Vec<usize>, DType)>>,
    trained: fn(&str) -> bool,
}

impl Leaves {
    fn new(base: &Base, parameters: &[Parameter]) -> Leaves {
        let mut known = base.weights.shapes();
        let stays = !known.is_empty();
        known.extend(parameters.iter().map(|p| (p.name.clone(), (p.shape.clone(), DType::F32))));
        Leaves { known: stays.then_some(known), trained: base.trained }
    }

    fn trace(&self) -> Trace {
        self.known.clone().map_or_else(Trace::new, Trace::with_weights).training(self.trained)
    }
}

/// The model without dropout, as it is evaluated.
fn undropped(model: &Model) -> Result<Model, Error> {
    let adapters = model.adapters().iter().map(|a| a.clone().with_dropout(0.0)).collect();
    Ok(model.clone().with_adapters(adapters)?)
}

/// The graphs of a learner.
pub(crate) struct Graphs {
    /// Where one micro-batch is a step.
    pub whole: Option<Graph>,
    pub accumulate: Graph,
    /// The last micro-batch of a step of several processes.
    pub last: Option<Graph>,
    pub apply: Graph,
    pub evaluate: Graph,
    /// One token of a sample.
    pub decode: Graph,
}

impl Graphs {
    pub fn new(model: &Model, how: &How, parameters: &[Parameter], leaves: &Leaves) -> Result<Graphs, Error> {
        let batch = how.targets.batch(how.n_tokens());
        let loss = |t: &Trace| step::language_model_loss(t, model, &batch, &how.targets);
        let together = how.processes > 1;
        let evaluated = undropped(model)?;
        let pages = how.ctx.div_ceil(PAGE);
        let cache =
            Cache { n_slots: pages * PAGE, page_size: PAGE, n_seqs: 1, n_pages: pages, dtype: DType::F32 };
        let decode = leaves.trace();
        let logits = evaluated.trace(&decode, &Batch::paged(1, cache));
        let shapes: Vec<(String, Vec<usize>)> =
            parameters.iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
        Ok(Graphs {
            whole: match (how.accumulate, together) {
                (1, false) => Some(step::update(leaves.trace(), loss, &how.optimiser)?),
                (1, true) => Some(step::update_together(leaves.trace(), loss, &how.optimiser)?),
                _ => None,
            },
            accumulate: step::accumulate(leaves.trace(), loss)?,
            last: (how.accumulate > 1 && together)
                .then(|| step::accumulate_together(leaves.trace(), loss))
                .transpose()?,
            apply: step::apply(&shapes, &how.optimiser)?,
            evaluate: step::evaluate(leaves.trace(), |t| {
                step::language_model_loss(t, &evaluated, &batch, &how.targets)
            })?,
            decode: decode.finish(&[("logits", &logits)])?,
        })
    }

    /// Bytes that are kept from step to step: weights, moments, sums of gradients, the cache of samples. The second: of
    /// these, what `graph` has no part in. What lies in a file does not count.
    fn kept(&self, graph: &Graph, how: &How) -> (usize, usize) {
        let parts = [&self.accumulate, &self.apply].into_iter().filter(|_| self.whole.is_none()); // as the last
        let samples = Some(&self.decode).filter(|_| how.samples);
        let run = self.whole.iter().chain(parts).chain([&self.evaluate]).chain(samples);
        let resident = |(name, _): &(&str, usize)| !(how.optimiser.paged && is_moment(name));
        let all: HashMap<&str, usize> = run.flat_map(states).filter(resident).collect();
        let own: HashMap<&str, usize> = states(graph).collect();
        let others = all.iter().filter(|(name, _)| !own.contains_key(*name)).map(|(_, bytes)| bytes).sum();
        (all.values().sum(), others)
    }

    /// Bytes of what `graph` keeps in a file.
    fn paged(graph: &Graph, how: &How) -> usize {
        let in_file = |(name, _): &(&str, usize)| how.optimiser.paged && is_moment(name);
        states(graph).filter(in_file).map(|(_, bytes)| bytes).sum()
    }

    /// The options for one of the graphs: what only the others keep is taken off the budget of memory, what lies in a file
    /// is put onto it.
    fn within(&self, graph: &Graph, how: &How) -> Options {
        let (_, others) = self.kept(graph, how);
        let memory = how.options.memory.map(|m| m.saturating_sub(others) + Graphs::paged(graph, how));
        Options { memory, ..how.options.clone() }
    }

    fn load(&self, session: &mut Session, graph: &Graph, how: &How) -> Result<Step, Error> {
        session.load(graph, &self.within(graph, how)).map_err(|e| match (e, how.options.memory) {
            (sparsam_runtime::Error::Compile(CompileError::Memory { least, .. }), Some(budget)) => {
                let (kept, others) = self.kept(graph, how);
                refused(budget, (least + others).saturating_sub(Graphs::paged(graph, how)), kept, how)
            }
            (other, _) => other.into(),
        })
    }
}

/// Puts the moments into a file in `folder`, or where that is to be.
fn page(
    session: &mut Session,
    folder: &Path,
    optimiser: &Optimiser,
    parameters: &[Parameter],
) -> Result<(), Error> {
    let moments = parameters.iter().flat_map(|p| optimiser.moments(&p.name, &p.shape));
    let bytes = moments.map(|m| FilePages::bytes_for(m.bytes())).sum();
    let folder = folder.ancestors().find(|f| f.is_dir()).unwrap_or(Path::new("."));
    session.page(folder, bytes, is_moment).map_err(|e| {
        let problem = format!(
            "a file of {} cannot be allocated in {}: {e}; free as much there, name a folder on another disk, or keep the \
             moments in memory",
            show_bytes(bytes as f64),
            folder.display()
        );
        Error::config("optimiser.paged", problem)
    })
}

/// Names and bytes of what a graph keeps from run to run.
fn states(graph: &Graph) -> impl Iterator<Item = (&str, usize)> {
    graph.nodes.iter().filter_map(|n| match &n.op {
        Op::State { name, .. } => Some((name.as_str(), n.bytes())),
        _ => None,
    })
}

/// Why a budget of memory cannot be kept to, with what could be done.
fn refused(budget: usize, least: usize, kept: usize, how: &How) -> Error {
    // Rounded up: what is named suffices.
    let megabytes = |bytes: usize| format!("{:.1} MB", (bytes as f64 / 1e5).ceil() / 10.0);
    let mut problem = format!(
        "{} cannot be reached: with all computed again that can be, {} x {} tokens take {}, of which {} are weights, \
         moments and what else is kept from step to step; give at least that, or fewer rows (run.batch; run.accumulate \
         makes up for them)",
        show_bytes(budget as f64),
        how.rows,
        how.ctx,
        megabytes(least),
        megabytes(kept),
    );
    if how.optimiser.clip.is_some() && how.accumulate == 1 {
        problem += "; without clipping (optimiser.clip = 0) gradients need not exist all at once";
    }
    Error::config("run.memory", problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What no disk has room for is refused before anything else is done, with what and where.
    #[cfg(target_os = "linux")] // elsewhere zeros would be written until the disk is full
    #[test]
    fn a_file_without_room_is_one_clear_error() {
        let folder = tempfile::tempdir().unwrap();
        let mut session = Session::new(&Device::cpu(1).unwrap(), Arc::new(Weights::new()));
        let huge = Parameter { name: "w.weight".into(), shape: vec![1 << 28, 1 << 28] };
        let to_be = folder.path().join("runs/first");
        let e = page(&mut session, &to_be, &Optimiser::default(), &[huge]).unwrap_err().to_string();
        assert!(e.contains("optimiser.paged: a file of") && e.contains("cannot be allocated in"), "{e}");
        assert!(e.contains(&folder.path().display().to_string()) && !to_be.exists(), "{e}");
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.0f32, 3.0f32.ln(), f32::NEG_INFINITY];
        let mut random = Random::new(1, "draw", 0);
        let n = 20_000;
        let ones = (0..n).filter(|_| draw(&logits, 1.0, &mut random) == 1).count() as f64 / n as f64;
        // 3 in 4; the standard error is 0.003.
        assert!((ones - 0.75).abs() < 0.015, "{ones}");
        assert_eq!(draw(&logits, 0.0, &mut random), 1);
        assert!((0..1000).all(|_| draw(&logits, 2.0, &mut random) < 2));
    }
}
