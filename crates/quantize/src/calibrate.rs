//! Calibration text on its way through the model, one block at a time.
//!
//! Two streams of activations (tokens, hidden): what the original model computes, and what the model computes whose
//! earlier blocks are rounded. Each block of weights is in memory only while the streams pass it.

use crate::activations::Activations;
use crate::taps::{self, Part, ROUNDED, Shapes, Want};
use crate::{Error, Hessian};
use sparsam_dtype::DType;
use sparsam_ir::{Graph, Precision, Trace};
use sparsam_models::Model;
use sparsam_models::nn::Batch;
use sparsam_runtime::{Data, Device, Session, Weights};
use std::path::Path;
use std::sync::Arc;

/// Tokens of a run: enough that weights are read seldom, few enough that a block's activations stay small.
const CHUNK: usize = 2048;

/// Calibration tokens, cut into sequences.
#[derive(Clone, Debug)]
pub struct Tokens {
    ids: Vec<i32>,
    ctx: usize,
}

impl Tokens {
    /// The first `samples` sequences of `ctx` tokens of `ids`.
    ///
    /// # Errors
    /// If there is not a single sequence.
    pub fn new(ids: &[u32], samples: usize, ctx: usize) -> Result<Tokens, Error> {
        let whole = (ids.len() / ctx.max(1)).min(samples);
        if whole == 0 || ctx == 0 {
            return Err(Error::TooShort { tokens: ids.len(), ctx });
        }
        Ok(Tokens { ids: ids[..whole * ctx].iter().map(|&t| t as i32).collect(), ctx })
    }

    /// The tokens, sequence after sequence.
    pub fn ids(&self) -> &[i32] {
        &self.ids
    }

    /// Number of sequences.
    pub fn samples(&self) -> usize {
        self.ids.len() / self.ctx
    }

    /// Tokens of each.
    pub fn ctx(&self) -> usize {
        self.ctx
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// A 64-bit hash (FNV-1a) of the tokens, to tell one calibration text from another.
    pub fn hash(&self) -> u64 {
        let bytes = self.ids.iter().flat_map(|t| t.to_le_bytes());
        bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
    }

    /// Whether there is none; never, once made.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

/// The weights of one part, original and rounded so far, and the shapes of both.
#[derive(Clone)]
pub(crate) struct Sides {
    pub weights: Weights,
    pub rounded: Shapes,
    pub original: Shapes,
}

/// The two streams.
pub(crate) struct Streams<'a> {
    pub device: &'a Device,
    pub model: &'a Model,
    pub tokens: &'a Tokens,
    pub precision: Precision,
    /// Where activations go that do not fit into memory.
    spill: Option<&'a Path>,
    /// `None` where only the rounded stream is wanted.
    original: Option<Activations>,
    rounded: Activations,
}

/// What streams are made of.
pub(crate) struct Springs<'a> {
    pub device: &'a Device,
    pub model: &'a Model,
    pub tokens: &'a Tokens,
    pub precision: Precision,
    pub spill: Option<&'a Path>,
}

impl<'a> Streams<'a> {
    /// Both streams at the embedding, from tables `original` and `rounded`, each under the model's own names.
    pub fn start(
        springs: Springs<'a>,
        original: Option<Weights>,
        rounded: Weights,
    ) -> Result<Streams<'a>, Error> {
        let Springs { device, model, tokens, precision, spill } = springs;
        let none = Activations::new(model.facts().hidden_size, None)?;
        let mut streams = Streams { device, model, tokens, precision, spill, original: None, rounded: none };
        streams.rounded = streams.embed(rounded)?;
        streams.original = original.map(|w| streams.embed(w)).transpose()?;
        Ok(streams)
    }

    fn empty(&self) -> Result<Activations, Error> {
        Activations::new(self.model.facts().hidden_size, self.spill)
    }

    fn embed(&self, weights: Weights) -> Result<Activations, Error> {
        let mut session = Session::new(self.device, Arc::new(weights));
        let mut out = self.empty()?;
        for range in self.chunks() {
            let t = Trace::with_weights(session.weights().shapes());
            let y = self.model.embed(&t, &Batch::packed(range.len()));
            let step = session.compile(&t.finish(&[("y", &y)])?)?;
            let positions = self.positions(range.len());
            let all = [("tokens", Data::I32(&self.tokens.ids[range])), ("positions", Data::I32(&positions))];
            let wanted: Vec<_> =
                all.into_iter().filter(|(name, _)| step.inputs().any(|(n, _, _)| n == *name)).collect();
            out.push(session.run(&step, &wanted)?.f32("y")?)?;
        }
        Ok(out)
    }

    /// Token ranges of the runs: whole sequences.
    fn chunks(&self) -> Vec<std::ops::Range<usize>> {
        let step = (CHUNK / self.tokens.ctx).max(1) * self.tokens.ctx;
        (0..self.tokens.len()).step_by(step).map(|s| s..(s + step).min(self.tokens.len())).collect()
    }

    fn positions(&self, n: usize) -> Vec<i32> {
        (0..n).map(|i| (i % self.tokens.ctx) as i32).collect()
    }

    /// The rounded stream's rows of these sequences, one after the other.
    pub fn rows(&self, sequences: &[usize]) -> Result<Vec<f32>, Error> {
        let ctx = self.tokens.ctx;
        let mut out = Vec::new();
        for s in sequences {
            out.extend_from_slice(&self.rounded.get(s * ctx..(s + 1) * ctx)?);
        }
        Ok(out)
    }

    /// Runs `each` on the outputs of every chunk of a part, for the sides that are asked for.
    fn pass(
        &self,
        part: Part,
        sides: &Sides,
        which: Which,
        want: Want,
        mut each: impl FnMut(std::ops::Range<usize>, &sparsam_runtime::Outputs) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut session = Session::new(self.device, Arc::new(sides.weights.clone()));
        let mut compiled = None;
        for range in self.chunks() {
            let n = range.len();
            if compiled.as_ref().is_none_or(|(len, _)| *len != n) {
                let batch = Batch::packed(n).with_precision(self.precision);
                let rounded = (which != Which::Original).then_some(&sides.rounded);
                let original = (which != Which::Rounded).then_some(&sides.original);
                let graph: Graph = taps::graph(self.model, part, &batch, rounded, original, want)?;
                compiled = Some((n, session.compile(&graph)?));
            }
            let Some((_, step)) = &compiled else { unreachable!("compiled above") };
            let positions = self.positions(n);
            let row_start: Vec<i32> = (0..n).map(|i| (i - i % self.tokens.ctx) as i32).collect();
            let x = format!("{ROUNDED}x");
            let rounded = self.rounded.get(range.clone())?;
            let mut all = vec![
                ("positions", Data::I32(&positions)),
                ("row_start", Data::I32(&row_start)),
                (x.as_str(), Data::F32(&rounded)),
            ];
            let original = self.original.as_ref().map(|o| o.get(range.clone())).transpose()?;
            if let Some(original) = &original {
                all.push(("x", Data::F32(original)));
            }
            let wanted: Vec<_> =
                all.into_iter().filter(|(name, _)| step.inputs().any(|(n, _, _)| n == *name)).collect();
            each(range, &session.run(step, &wanted)?)?;
        }
        Ok(())
    }

    fn both(&self) -> Which {
        if self.original.is_some() { Which::Both } else { Which::Rounded }
    }

    /// The Hessian of the stage's input.
    pub fn hessian(&self, part: Part, sides: &Sides, stage: usize, n: usize) -> Result<Hessian, Error> {
        let mut h = Hessian::new(n);
        let which = self.both();
        self.pass(part, sides, which, Want::Products(stage), |range, out| {
            let cross = if which == Which::Both { Some(out.f32("cross")?) } else { None };
            h.add(out.f32("h")?, cross, range.len());
            Ok(())
        })?;
        Ok(h)
    }

    /// Moves both streams past a part.
    pub fn advance(&mut self, part: Part, sides: &Sides) -> Result<(), Error> {
        let (mut rounded, mut original) = (self.empty()?, self.empty()?);
        let which = self.both();
        self.pass(part, sides, which, Want::Outputs, |_, out| {
            rounded.push(out.f32(&format!("{ROUNDED}y"))?)?;
            if which == Which::Both {
                original.push(out.f32("y")?)?;
            }
            Ok(())
        })?;
        self.rounded = rounded;
        self.original = (which == Which::Both).then_some(original);
        Ok(())
    }

    /// What the original part makes of the original stream.
    ///
    /// # Panics
    /// If there is no original stream.
    pub fn targets(&self, part: Part, sides: &Sides) -> Result<Activations, Error> {
        assert!(self.original.is_some(), "healing has both streams");
        let mut out = self.empty()?;
        self.pass(part, sides, Which::Original, Want::Outputs, |_, outputs| out.push(outputs.f32("y")?))?;
        Ok(out)
    }

    /// Moves the rounded stream past a part, and the original one to what [`Streams::targets`] gave.
    pub fn advance_to(&mut self, part: Part, sides: &Sides, targets: Activations) -> Result<(), Error> {
        let mut rounded = self.empty()?;
        let y = format!("{ROUNDED}y");
        self.pass(part, sides, Which::Rounded, Want::Outputs, |_, out| rounded.push(out.f32(&y)?))?;
        self.rounded = rounded;
        self.original = Some(targets);
        Ok(())
    }
}

/// Sides of a graph.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    Original,
    Rounded,
    Both,
}

/// The bytes of one tensor in the model's own layout.
pub(crate) struct Stored {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: DType,
    pub bytes: Vec<u8>,
}

impl Sides {
    /// Both sides as the original.
    pub fn new(model: &Model, stored: &[Stored]) -> Result<Sides, Error> {
        let mut sides = Sides { weights: Weights::new(), rounded: Shapes::new(), original: Shapes::new() };
        for s in stored {
            sides.weights.insert(&s.name, &s.shape, s.dtype, &s.bytes)?;
            sides.replace(s)?;
        }
        sides.original = stored.iter().map(|s| (s.name.clone(), (s.shape.clone(), s.dtype))).collect();
        for c in model.constants() {
            sides.weights.insert_f32(&c.name, &c.shape, &c.data)?;
        }
        Ok(sides)
    }

    /// The rounded side reads these bytes from now on.
    pub fn replace(&mut self, s: &Stored) -> Result<(), Error> {
        self.weights.insert(&format!("{ROUNDED}{}", s.name), &s.shape, s.dtype, &s.bytes)?;
        self.rounded.insert(s.name.clone(), (s.shape.clone(), s.dtype));
        Ok(())
    }
}
