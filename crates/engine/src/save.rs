//! Writing a model: a GGUF file, or a folder as Hugging Face lays it out.
//!
//! Names, shapes and layouts are the graph's throughout; the other world's names and row orders are made at the edge, as
//! bytes go out. One tensor is in memory at a time, and nothing is at its path before [`Saver::finish`].

mod folder;
mod head;
mod plan;

use crate::Error;
use sparsam_dtype::{DType, codec};
use sparsam_formats::{Kind, TensorSpec, Transform, gguf};
use sparsam_models::{Constant, Model};
use sparsam_tokenizer::Tokenizer;
use std::borrow::Cow;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};

pub use folder::Folder;
pub use head::sidecars;
pub use plan::{Plan, storable};

/// A model that is being written.
///
/// ```no_run
/// use sparsam_dtype::DType;
/// use sparsam_engine::{Plan, Saver, open};
/// use sparsam_formats::Kind;
/// let model = open("SmolLM2-135M-Instruct.Q4_1.gguf".as_ref())?;
/// let plan = Plan::uniform(&model.model, Kind::Gguf, DType::Q8_0)?;
/// let mut saver =
///     Saver::create("out.gguf".as_ref(), Kind::Gguf, &model.model, model.tokenizer.as_ref(), &plan)?;
/// for spec in model.model.weights(&model.source)? {
///     let tensor = model.source.require(&spec.source_name)?;
///     let tensor = spec.transform.apply(tensor.bytes, tensor.info.dtype, &tensor.info.shape)?;
///     saver.append(&spec.name, &spec.shape, tensor.dtype, &tensor.bytes)?; // rounded to Q8_0 here
/// }
/// saver.finish()?;
/// # Ok::<(), sparsam_engine::Error>(())
/// ```
pub struct Saver {
    path: PathBuf,
    out: Out,
    /// What is still to come, in order.
    waiting: VecDeque<Waiting>,
    /// Tensors of the configuration, which come last.
    constants: Vec<Constant>,
    notes: Vec<String>,
}

enum Out {
    Gguf(gguf::Writer),
    Folder(Box<Folder>),
}

impl Out {
    fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        match self {
            Out::Gguf(file) => Ok(file.append(name, bytes)?),
            Out::Folder(folder) => folder.append(name, bytes),
        }
    }
}

/// One tensor of the plan, and what becomes of it in the file.
struct Waiting {
    planned: TensorSpec,
    stored_name: String,
    transform: Transform,
}

impl Saver {
    /// Starts a file or folder at `path`: writes the header, the configuration and the tokenizer.
    ///
    /// `plan` lists the tensors in the order in which they will be given, with the graph's names and shapes and the
    /// types that the file shall hold ([`Plan::uniform`] makes one). Norms that a GGUF file keeps as 1 + w become F32.
    ///
    /// # Errors
    /// If the plan is not the model's list of parameters; if the format cannot hold a type, the configuration or the
    /// tokenizer; if a folder at `path` is not empty, the parent folder is missing, or the disk is full.
    pub fn create(
        path: &Path,
        kind: Kind,
        model: &Model,
        tokenizer: Option<&Tokenizer>,
        plan: &Plan,
    ) -> Result<Saver, Error> {
        plan.check(path, model)?;
        let mut waiting = VecDeque::with_capacity(plan.tensors.len());
        let mut specs = Vec::with_capacity(plan.tensors.len() + 1);
        for planned in &plan.tensors {
            let (name, transform) = model
                .stored_as(kind, &planned.name)
                .unwrap_or_else(|| unreachable!("{} is a parameter: checked above", planned.name));
            let transform = transform.inverse();
            let dtype = match transform {
                Transform::AddOne | Transform::SubtractOne => DType::F32,
                _ => planned.dtype,
            };
            let shape = transform.shape(&planned.shape);
            specs.push(TensorSpec { name: name.clone(), shape, dtype });
            waiting.push_back(Waiting { planned: planned.clone(), stored_name: name, transform });
        }
        let (out, constants, notes) = match kind {
            Kind::Gguf => {
                let head = head::gguf(path, model, tokenizer, plan)?;
                specs.extend(head.tensors.iter().map(|c| TensorSpec {
                    name: c.name.clone(),
                    shape: c.shape.clone(),
                    dtype: DType::F32,
                }));
                let file = gguf::Writer::create(path, &head.metadata, &specs)?;
                (Out::Gguf(file), head.tensors, head.notes)
            }
            Kind::Safetensors => {
                let sidecars = sidecars(path, model, tokenizer, plan)?;
                let folder = Folder::create(path, specs, plan.shard_bytes, sidecars)?;
                (Out::Folder(Box::new(folder)), Vec::new(), Vec::new())
            }
        };
        Ok(Saver { path: path.to_path_buf(), out, waiting, constants, notes })
    }

    /// What other programs will do differently with this file, a sentence each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The tensor that is to be given next.
    pub fn next(&self) -> Option<&TensorSpec> {
        self.waiting.front().map(|w| &w.planned)
    }

    /// Writes the next tensor of the plan, given whole: row-major, in the graph's layout. If `dtype` is not the planned
    /// one, the numbers are decoded and rounded to the nearest ones that the planned type has.
    ///
    /// # Errors
    /// If it is another tensor's turn, the shape is not the planned one, a number is not finite or too large for the
    /// planned type, or the disk is full.
    pub fn append(&mut self, name: &str, shape: &[usize], dtype: DType, bytes: &[u8]) -> Result<(), Error> {
        let fail = |what: String| Err(Error::Save { path: self.path.clone(), what });
        let Some(next) = self.waiting.front() else {
            return fail(format!("tensor {name} is given, but all tensors are written"));
        };
        let planned = &next.planned;
        if planned.name != name {
            return fail(format!("tensor {name} is given, but it is the turn of {}", planned.name));
        }
        if planned.shape != shape {
            return fail(format!("tensor {name} has shape {shape:?}, {:?} was announced", planned.shape));
        }
        let bytes = match dtype == planned.dtype {
            true => Cow::Borrowed(bytes),
            false => match rounded(dtype, planned.dtype, bytes, shape) {
                Ok(bytes) => Cow::Owned(bytes),
                Err(what) => return fail(format!("tensor {name}: {what}")),
            },
        };
        let stored = next.transform.apply(&bytes, planned.dtype, shape)?;
        self.out.append(&next.stored_name, &stored.bytes)?;
        self.waiting.pop_front();
        Ok(())
    }

    /// Makes the file or folder appear at its path, its bytes safe on the disk.
    ///
    /// # Errors
    /// If a tensor is missing, or the disk is full or fails; nothing is at the path then but what was there.
    pub fn finish(mut self) -> Result<(), Error> {
        if let Some(next) = self.next() {
            let what = format!("{} tensors are missing, the first is {}", self.waiting.len(), next.name);
            return Err(Error::Save { path: self.path, what });
        }
        for constant in &self.constants {
            let bytes: Vec<u8> = constant.data.iter().flat_map(|x| x.to_le_bytes()).collect();
            self.out.append(&constant.name, &bytes)?;
        }
        match self.out {
            Out::Gguf(file) => Ok(file.finish()?),
            Out::Folder(folder) => folder.finish(),
        }
    }
}

/// The numbers in another type; an error says what has no place there.
pub(crate) fn rounded(from: DType, to: DType, bytes: &[u8], shape: &[usize]) -> Result<Vec<u8>, String> {
    let n: usize = shape.iter().product();
    let mut x = vec![0f32; n];
    codec::decode(from, bytes, &mut x).map_err(|e| e.to_string())?;
    if let Some(i) = x.iter().position(|v| !v.is_finite()) {
        return Err(format!(
            "element {i} is {}, which cannot be rounded to {to}; the weights are damaged",
            x[i]
        ));
    }
    let length = to.bytes_for(n).ok_or_else(|| format!("{n} elements are no whole number of {to} blocks"))?;
    let mut out = vec![0; length];
    encode(to, &x, &mut out).map_err(|e| e.to_string())?;
    if to == DType::F16 {
        let mut back = vec![0f32; n];
        codec::decode(to, &out, &mut back).map_err(|e| e.to_string())?;
        if let Some(i) = back.iter().position(|v| !v.is_finite()) {
            return Err(format!(
                "element {i} is {}, beyond what F16 holds (65504); choose BF16 or F32",
                x[i]
            ));
        }
    }
    Ok(out)
}

/// [`codec::encode`] on all cores: block formats that search their scales take 60 to 200 ns an element.
fn encode(to: DType, x: &[f32], out: &mut [u8]) -> Result<(), codec::CodecError> {
    /// Elements of one piece: a multiple of every block, a few milliseconds of work, so that a thread pays off.
    const PIECE: usize = 1 << 16;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    // The scales of NF4 are rounded over a whole matrix.
    if x.len() <= PIECE || threads == 1 || to == DType::NF4 {
        return codec::encode(to, x, out);
    }
    let piece = x.len().div_ceil(threads).next_multiple_of(PIECE);
    let bytes = piece / to.block_len() * to.block_bytes();
    std::thread::scope(|scope| {
        let pieces = x.chunks(piece).zip(out.chunks_mut(bytes));
        let work: Vec<_> = pieces.map(|(x, out)| scope.spawn(move || codec::encode(to, x, out))).collect();
        work.into_iter().try_for_each(|w| w.join().expect("encoding does not panic"))
    })
}
