//! A program bound to a session's memory: views and prepared code, so that a run is a flat loop.

use crate::session::Session;
use crate::sums::{self, Bucket};
use crate::weights::Stored;
use crate::{Error, Options, Report};
use sparsam_compiler::{self as compiler, Instr, Kernel, Operand, Place, Program};
use sparsam_dtype::{DType, Layout};
use sparsam_ir::{AttentionLayout, AttentionPart, Binary, Graph, Precision, Reduction, Unary};
use sparsam_kernels::attention::Scores;
use sparsam_kernels::matmul::Write;
use sparsam_kernels::weight::Weight;
use sparsam_kernels::{View, row};
use std::sync::Arc;

/// One kernel call with everything that can be known before it.
pub(crate) struct Call {
    pub kind: Kind,
    pub outs: Vec<View>,
    pub ins: Vec<View>,
    /// The name for profiles and errors.
    pub name: &'static str,
    /// Bytes read and written.
    pub bytes: usize,
    /// Buckets of sums over processes that have to be done before it, and those that may be sent behind it.
    pub wait: usize,
    pub ready: usize,
}

pub(crate) enum Kind {
    Row(Box<row::Bound>),
    Matmul(sparsam_kernels::Precision, Write),
    WeightMatmul(Vec<Arc<Weight>>, sparsam_kernels::Precision),
    WeightMatmulT(Arc<Weight>, sparsam_kernels::Precision),
    WeightGather(Arc<Weight>),
    WeightDecode(Arc<Weight>),
    Gather,
    /// Whether to add to what is there.
    ScatterAdd(bool),
    ScatterRows,
    Copy,
    AllReduce,
    /// Which output is what (indices into `outs`), and the page size where keys lie in pages.
    Attention {
        scores: Scores,
        out: Option<usize>,
        lse: Option<usize>,
        page_size: Option<usize>,
    },
    AttentionBackward {
        scores: Scores,
        grads: [usize; 3],
    },
}

pub(crate) struct Input {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: DType,
    /// First byte in the slab of inputs.
    pub offset: usize,
}

/// A program loaded into a [`Session`], ready to run there.
pub struct Step {
    pub(crate) session: u64,
    pub(crate) calls: Vec<Call>,
    pub(crate) inputs: Vec<Input>,
    pub(crate) outputs: Vec<(String, View)>,
    /// What is summed over processes.
    pub(crate) buckets: Vec<Bucket>,
    arena_bytes: usize,
    report: Report,
    text: Arc<Program>,
}

impl Step {
    /// What compiling did.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Bytes of the session's arena that it uses.
    pub fn arena_bytes(&self) -> usize {
        self.arena_bytes
    }

    /// Kernel calls of one run.
    pub fn kernels(&self) -> usize {
        self.calls.len()
    }

    /// Names, shapes and types of the inputs.
    pub fn inputs(&self) -> impl Iterator<Item = (&str, &[usize], DType)> {
        self.inputs.iter().map(|i| (i.name.as_str(), i.shape.as_slice(), i.dtype))
    }

    /// Names, shapes and types of the outputs.
    pub fn outputs(&self) -> impl Iterator<Item = (&str, &[usize], DType)> {
        self.outputs.iter().map(|(name, v)| (name.as_str(), v.layout.shape.as_slice(), v.dtype))
    }

    /// The program, for printing.
    pub fn program(&self) -> &Program {
        &self.text
    }
}

/// How a place is used: plain views, packed weights, or both; whether rows are scattered into it, and nothing else
/// writes it.
#[derive(Clone, Copy, Default)]
struct Use {
    plain: bool,
    packed: bool,
    scattered: bool,
    written: bool,
}

/// Slab and first byte of a place, once bound.
#[derive(Clone, Default)]
struct Bound {
    slab: usize,
    offset: usize,
    weight: Option<Arc<Weight>>,
}

impl Session {
    /// Loads `graph` compiled: the one line more.
    ///
    /// # Errors
    /// Graphs that do not compile; weights or states that are missing or of another shape or type.
    pub fn compile(&mut self, graph: &Graph) -> Result<Step, Error> {
        self.load(graph, &Options::default())
    }

    /// Loads `graph` to run node by node, each result in its own buffer: the baseline.
    ///
    /// # Errors
    /// As [`Session::compile`].
    pub fn eager(&mut self, graph: &Graph) -> Result<Step, Error> {
        self.load(graph, &Options::eager())
    }

    /// Loads `graph` with some passes on or off.
    ///
    /// # Errors
    /// As [`Session::compile`].
    pub fn load(&mut self, graph: &Graph, options: &Options) -> Result<Step, Error> {
        let program = compiler::compile(graph, options)?;
        self.load_program(program)
    }

    fn load_program(&mut self, program: Program) -> Result<Step, Error> {
        let mut uses = vec![Use::default(); program.places.len()];
        for s in &program.steps {
            for (i, o) in s.ins.iter().enumerate() {
                if is_packed_operand(&s.kernel, i) {
                    uses[o.place].packed = true;
                } else {
                    uses[o.place].plain = true;
                }
            }
            for o in &s.outs {
                let scatter = matches!(s.kernel, Kernel::ScatterRows);
                let u = &mut uses[o.place];
                (u.plain, u.scattered, u.written) = (true, u.scattered || scatter, u.written || !scatter);
            }
        }
        program.outputs.iter().for_each(|(_, o)| uses[o.place].plain = true);

        let (mut bound, mut inputs, mut input_bytes) = (Vec::new(), Vec::new(), 0usize);
        for (place, used) in program.places.iter().zip(&uses) {
            bound.push(match place {
                Place::Arena { offset, .. } => Bound { slab: self.arena, offset: *offset, weight: None },
                Place::Input { name, shape, dtype } => {
                    let offset = input_bytes;
                    let bytes = dtype.bytes_for(shape.iter().product()).unwrap_or(0);
                    input_bytes += bytes.next_multiple_of(64);
                    inputs.push(Input { name: name.clone(), shape: shape.clone(), dtype: *dtype, offset });
                    Bound { slab: self.inputs, offset, weight: None }
                }
                Place::Weight { name, shape, dtype } => self.bind_weight(name, shape, *dtype, *used)?,
                Place::State { name, shape, dtype } => {
                    let scattered = used.scattered && !used.written;
                    let slab = self.define_state(name, shape, *dtype, scattered)?;
                    Bound { slab, offset: 0, weight: None }
                }
            });
        }
        self.reserve(program.arena_bytes, input_bytes);

        let view = |o: &Operand| {
            let b = &bound[o.place];
            let offset = o.layout.offset + b.offset / o.dtype.block_bytes();
            View { slab: b.slab, dtype: o.dtype, layout: Layout { offset, ..o.layout.clone() } }
        };
        let mut calls = Vec::with_capacity(program.steps.len());
        for (i, s) in program.steps.iter().enumerate() {
            let outs: Vec<View> = s.outs.iter().map(view).collect();
            let plain = s.ins.iter().enumerate().filter(|(i, _)| !is_packed_operand(&s.kernel, *i));
            let ins: Vec<View> = plain.map(|(_, o)| view(o)).collect();
            let weight = |i: usize| {
                let o = &s.ins[i];
                bound[o.place].weight.clone().ok_or_else(|| Error::Weight {
                    name: format!("{}", program.places[o.place]),
                    what: "is used as a matrix but is not bound as one".into(),
                })
            };
            let kind = match &s.kernel {
                Kernel::Row(p) => {
                    let a: Vec<(DType, &Layout)> = ins.iter().map(|v| (v.dtype, &v.layout)).collect();
                    let b: Vec<(DType, &Layout)> = outs.iter().map(|v| (v.dtype, &v.layout)).collect();
                    let bound = row::Code::new(&row_program(p), &a, &b).and_then(|code| {
                        let (outs, ins): (Vec<_>, Vec<_>) = (outs.iter().collect(), ins.iter().collect());
                        row::Bound::new(&self.mem, code, &outs, &ins)
                    });
                    let wrong = |source| Error::Kernel { step: i, kernel: s.kernel.name(), source };
                    Kind::Row(Box::new(bound.map_err(wrong)?))
                }
                Kernel::Matmul { precision: p, add } => {
                    Kind::Matmul(precision(*p), if *add { Write::Add } else { Write::Set })
                }
                Kernel::WeightMatmul { precision: p } => {
                    let weights = (1..s.ins.len()).map(weight).collect::<Result<_, _>>()?;
                    Kind::WeightMatmul(weights, precision(*p))
                }
                Kernel::WeightMatmulT { precision: p } => Kind::WeightMatmulT(weight(1)?, precision(*p)),
                Kernel::WeightGather => Kind::WeightGather(weight(0)?),
                Kernel::WeightDecode => Kind::WeightDecode(weight(0)?),
                Kernel::Gather => Kind::Gather,
                Kernel::ScatterAdd { add } => Kind::ScatterAdd(*add),
                Kernel::ScatterRows => Kind::ScatterRows,
                Kernel::Copy => Kind::Copy,
                Kernel::AllReduce => Kind::AllReduce,
                Kernel::Attention { scale, window, softcap, layout, parts } => {
                    let scores = Scores {
                        scale: scale.get() as f32,
                        window: *window,
                        softcap: softcap.map(|c| c.get() as f32),
                    };
                    let at = |part: AttentionPart| parts.iter().position(|p| *p == part);
                    let grads = [AttentionPart::GradQ, AttentionPart::GradK, AttentionPart::GradV].map(at);
                    if let [Some(q), Some(k), Some(v)] = grads {
                        Kind::AttentionBackward { scores, grads: [q, k, v] }
                    } else {
                        let page_size = match layout {
                            AttentionLayout::Packed => None,
                            AttentionLayout::Paged { page_size } => Some(*page_size),
                        };
                        let (out, lse) = (at(AttentionPart::Out), at(AttentionPart::LogSumExp));
                        Kind::Attention { scores, out, lse, page_size }
                    }
                }
            };
            calls.push(Call { kind, outs, ins, name: s.kernel.name(), bytes: s.bytes(), wait: 0, ready: 0 });
        }
        let buckets = sums::plan(&program, &mut calls);
        let outputs = program.outputs.iter().map(|(name, o)| (name.clone(), view(o))).collect();
        Ok(Step {
            session: self.id,
            calls,
            inputs,
            outputs,
            buckets,
            arena_bytes: program.arena_bytes,
            report: program.report.clone(),
            text: Arc::new(program),
        })
    }

    fn bind_weight(&mut self, name: &str, shape: &[usize], dtype: DType, used: Use) -> Result<Bound, Error> {
        let weights = self.weights.clone();
        let leaf = |got: String| Error::Leaf {
            kind: "weight",
            name: name.to_string(),
            want: shape.to_vec(),
            want_dtype: dtype,
            got,
        };
        let entry = weights.get(name).ok_or_else(|| leaf("there is none of that name".into()))?;
        if entry.shape != shape || entry.dtype != dtype {
            return Err(leaf(format!("it is {}{:?}", entry.dtype, entry.shape)));
        }
        let mut bound = Bound::default();
        if used.packed {
            bound.weight = match &entry.stored {
                Stored::Packed(w) => Some(w.clone()),
                Stored::Plain(_) => return Err(leaf("it is no matrix".into())),
            };
        }
        if used.plain {
            bound.slab = self.plain_weight(name, entry)?;
        }
        Ok(bound)
    }
}

/// Whether input `i` of a kernel is a packed weight.
fn is_packed_operand(kernel: &Kernel, i: usize) -> bool {
    match kernel {
        Kernel::WeightMatmul { .. } | Kernel::WeightMatmulT { .. } => i > 0,
        Kernel::WeightGather | Kernel::WeightDecode => i == 0,
        Kernel::Row(_)
        | Kernel::Matmul { .. }
        | Kernel::Gather
        | Kernel::ScatterAdd { .. }
        | Kernel::ScatterRows
        | Kernel::Copy
        | Kernel::AllReduce
        | Kernel::Attention { .. } => false,
    }
}

fn precision(p: Precision) -> sparsam_kernels::Precision {
    match p {
        Precision::F32 => sparsam_kernels::Precision::F32,
        Precision::Bf16 => sparsam_kernels::Precision::Bf16,
        Precision::Int8 => sparsam_kernels::Precision::Int8,
    }
}

/// The compiler's row program in the kernels' words.
fn row_program(p: &compiler::RowProgram) -> row::Program {
    let reduction = |r| match r {
        Reduction::Sum => row::Reduction::Sum,
        Reduction::Max => row::Reduction::Max,
    };
    let instr = |i: &Instr| match *i {
        Instr::Load { input } => row::Instr::Load { input },
        Instr::Const(c) => row::Instr::Const(c),
        Instr::Iota { axis } => row::Instr::Iota { axis },
        Instr::Random { seed, stream } => row::Instr::Random { seed, stream },
        Instr::Unary(u, a) => row::Instr::Unary(unary(u), a),
        Instr::Binary(b, x, y) => row::Instr::Binary(binary(b), x, y),
        Instr::Select(c, x, y) => row::Instr::Select(c, x, y),
        Instr::Reduce(r, a) => row::Instr::Reduce(reduction(r), a),
        Instr::Round(d, a) => row::Instr::Round(d, a),
    };
    let store = |s| match s {
        compiler::Store::Rows => row::Store::Rows,
        compiler::Store::ColumnSum => row::Store::ColumnSum,
    };
    row::Program {
        shape: p.shape.clone(),
        instrs: p.instrs.iter().map(instr).collect(),
        stores: p.stores.iter().map(|&(out, v, how)| (out, v, store(how))).collect(),
    }
}

fn unary(u: Unary) -> row::Unary {
    match u {
        Unary::Neg => row::Unary::Neg,
        Unary::Abs => row::Unary::Abs,
        Unary::Recip => row::Unary::Recip,
        Unary::Sqrt => row::Unary::Sqrt,
        Unary::Exp => row::Unary::Exp,
        Unary::Log => row::Unary::Log,
        Unary::Sin => row::Unary::Sin,
        Unary::Cos => row::Unary::Cos,
        Unary::Tanh => row::Unary::Tanh,
        Unary::Erf => row::Unary::Erf,
        Unary::Floor => row::Unary::Floor,
    }
}

fn binary(b: Binary) -> row::Binary {
    match b {
        Binary::Add => row::Binary::Add,
        Binary::Sub => row::Binary::Sub,
        Binary::Mul => row::Binary::Mul,
        Binary::Div => row::Binary::Div,
        Binary::Max => row::Binary::Max,
        Binary::Min => row::Binary::Min,
        Binary::Less => row::Binary::Less,
        Binary::Equal => row::Binary::Equal,
    }
}
