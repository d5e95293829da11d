//! What a device runs: places, and steps that apply one kernel each to strided views of places.
//!
//! ```text
//! p0 input "x" : F32[4, 8]
//! p1 weight "w" : Q4_0[8, 8]
//! p2 arena 0..128
//! matmul p1 int8: p2[4, 8] <- p0[4, 8] p1[8, 8]
//! row [4, 8] { a = load p2; b = exp a; store p3 b }
//! ```

use sparsam_ir::{
    AttentionLayout, AttentionPart, Binary, DType, Layout, NodeId, Precision, Real, Reduction, Unary,
};
use std::fmt;

/// Index of an instruction of a [`RowProgram`]; each is written once.
pub type Val = u32;

/// One instruction over the elements of a row. A value is wide (one number an element) or narrow (one a row).
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)] // fields are named as in the text of each variant
pub enum Instr {
    /// The element of `ins[input]` at this point of the domain; narrow where its last stride is 0.
    Load { input: usize },
    /// One number.
    Const(f32),
    /// Index along an axis of the domain.
    Iota { axis: usize },
    /// Uniform in [0, 1) by the flat index in the domain; the seed is `ins[seed]` (I32, 2 elements).
    Random { seed: usize, stream: u32 },
    /// A function of one value.
    Unary(Unary, Val),
    /// A function of two values.
    Binary(Binary, Val, Val),
    /// The second where the first is not 0, else the third.
    Select(Val, Val, Val),
    /// Over the row: narrow.
    Reduce(Reduction, Val),
    /// Rounded to F16 or BF16 and back.
    Round(DType, Val),
}

impl Instr {
    /// The values it reads.
    pub fn operands(&self) -> impl Iterator<Item = Val> {
        let all = match *self {
            Instr::Load { .. } | Instr::Const(_) | Instr::Iota { .. } | Instr::Random { .. } => [None; 3],
            Instr::Unary(_, a) | Instr::Reduce(_, a) | Instr::Round(_, a) => [Some(a), None, None],
            Instr::Binary(_, a, b) => [Some(a), Some(b), None],
            Instr::Select(a, b, c) => [Some(a), Some(b), Some(c)],
        };
        all.into_iter().flatten()
    }

    /// The same instruction with each value that it reads renamed.
    pub fn map(&self, mut f: impl FnMut(Val) -> Val) -> Instr {
        match *self {
            Instr::Load { .. } | Instr::Const(_) | Instr::Iota { .. } | Instr::Random { .. } => *self,
            Instr::Unary(u, a) => Instr::Unary(u, f(a)),
            Instr::Reduce(r, a) => Instr::Reduce(r, f(a)),
            Instr::Round(d, a) => Instr::Round(d, f(a)),
            Instr::Binary(op, a, b) => Instr::Binary(op, f(a), f(b)),
            Instr::Select(a, b, c) => Instr::Select(f(a), f(b), f(c)),
        }
    }
}

/// How a value of a row program is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Each element (wide) or one number a row (narrow).
    Rows,
    /// The sum over all rows of a wide value: shape [1, .., 1, width].
    ColumnSum,
}

/// Straight-line code run for every row of a domain.
#[derive(Clone, Debug, PartialEq)]
pub struct RowProgram {
    /// The domain; its last axis is the row. At least one axis.
    pub shape: Vec<usize>,
    /// Each reads earlier ones only.
    pub instrs: Vec<Instr>,
    /// (output of the step, value, how).
    pub stores: Vec<(usize, Val, Store)>,
}

impl RowProgram {
    /// Length of a row.
    pub fn width(&self) -> usize {
        self.shape[self.shape.len() - 1]
    }

    /// For each instruction, whether it has one value a row; `ins` are the step's inputs.
    pub fn narrow(&self, ins: &[Operand]) -> Vec<bool> {
        let mut narrow: Vec<bool> = Vec::with_capacity(self.instrs.len());
        for i in &self.instrs {
            let n = match i {
                Instr::Load { input } => is_narrow(&ins[*input].layout),
                Instr::Const(_) | Instr::Reduce(..) => true,
                Instr::Iota { axis } => *axis + 1 != self.shape.len() || self.width() == 1,
                Instr::Random { .. } => self.width() == 1,
                Instr::Unary(..) | Instr::Binary(..) | Instr::Select(..) | Instr::Round(..) => {
                    i.operands().all(|v| narrow[v as usize])
                }
            };
            narrow.push(n);
        }
        narrow
    }
}

/// Whether a view has one element a row.
pub(crate) fn is_narrow(l: &Layout) -> bool {
    match (l.shape.last(), l.strides.last()) {
        (Some(&n), Some(&s)) => n == 1 || s == 0,
        _ => true,
    }
}

/// What a step does. Operand orders are named `outs <- ins`.
#[derive(Clone, Debug, PartialEq)]
pub enum Kernel {
    /// A row program over its loads and stores.
    Row(RowProgram),
    /// out (.., M, N) <- a (.., M, K), b (.., K, N): plain views, transposes as strides. With `add` also <- out: the
    /// product is added to what is there.
    Matmul {
        /// How operands are read.
        precision: Precision,
        /// Whether the product is added to the output, which is then the third input.
        add: bool,
    },
    /// out_i (M, N_i).. <- a (M, K), weight_i (N_i, K)..: several weights over one activation.
    WeightMatmul {
        /// How activations are read.
        precision: Precision,
    },
    /// out (M, K) <- a (M, N), weight (N, K).
    WeightMatmulT {
        /// How activations are read.
        precision: Precision,
    },
    /// out (R, K) <- weight (V, K), rows I32 (R).
    WeightGather,
    /// out (N, K) <- weight (N, K): decoded to F32.
    WeightDecode,
    /// out (R, ..) <- table (V, ..), rows I32 (R).
    Gather,
    /// out (V, ..) <- values (R, ..), rows I32 (R): zero, then added up per row. With `add` also <- out: added to what
    /// is there.
    ScatterAdd {
        /// Whether the values are added to the output, which is then the third input.
        add: bool,
    },
    /// state (S, ..) <- values (R, ..), slots I32 (R): rows replaced in place.
    ScatterRows,
    /// out <- in of the same shape, converted; one of them may be a state in a block format.
    Copy,
    /// out <- in, both F32 and contiguous: its sum over all processes. The sum may be under way while later steps run, up
    /// to the first that touches `out`; both may be the same view.
    AllReduce,
    /// parts.. <- the inputs that [`AttentionLayout`] lists.
    Attention {
        /// Multiplies the scores.
        scale: Real,
        /// Sliding window.
        window: Option<usize>,
        /// Soft limit on the scores.
        softcap: Option<Real>,
        /// Where keys lie.
        layout: AttentionLayout,
        /// What each output is.
        parts: Vec<AttentionPart>,
    },
}

impl Kernel {
    /// The name that reports and profiles use.
    pub fn name(&self) -> &'static str {
        match self {
            Kernel::Row(_) => "row",
            Kernel::Matmul { .. } => "matmul",
            Kernel::WeightMatmul { .. } => "weight matmul",
            Kernel::WeightMatmulT { .. } => "weight matmul_t",
            Kernel::WeightGather => "weight gather",
            Kernel::WeightDecode => "weight decode",
            Kernel::Gather => "gather",
            Kernel::ScatterAdd { .. } => "scatter add",
            Kernel::ScatterRows => "scatter rows",
            Kernel::Copy => "copy",
            Kernel::AllReduce => "all_reduce",
            Kernel::Attention { .. } => "attention",
        }
    }
}

/// Where bytes lie.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // names, shapes and types are those of the graph's leaves
pub enum Place {
    /// Part of the arena; before the memory plan the offset is 0.
    Arena { offset: usize, bytes: usize },
    /// Given at every run.
    Input { name: String, shape: Vec<usize>, dtype: DType },
    /// A parameter; only weight kernels take it in a block format.
    Weight { name: String, shape: Vec<usize>, dtype: DType },
    /// Lives on between runs.
    State { name: String, shape: Vec<usize>, dtype: DType },
}

/// A strided view of a place; offsets and strides count elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Operand {
    /// Index into [`Program::places`].
    pub place: usize,
    /// Element type.
    pub dtype: DType,
    /// Where the elements lie.
    pub layout: Layout,
}

impl Operand {
    /// Bytes of the different elements that it touches (a broadcast element counts once).
    pub fn bytes(&self) -> usize {
        let l = &self.layout;
        let n: usize =
            l.shape.iter().zip(&l.strides).map(|(&n, &s)| if s == 0 { n.min(1) } else { n }).product();
        self.dtype.bytes_for(n).unwrap_or(n * self.dtype.block_bytes() / self.dtype.block_len())
    }
}

/// One kernel call.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// What is done.
    pub kernel: Kernel,
    /// Written.
    pub outs: Vec<Operand>,
    /// Read.
    pub ins: Vec<Operand>,
    /// The graph nodes that it computes.
    pub nodes: Vec<NodeId>,
}

impl Step {
    /// Bytes read and written.
    pub fn bytes(&self) -> usize {
        let touched = |ops: &[Operand]| -> usize {
            ops.iter().enumerate().filter(|(i, o)| !ops[..*i].contains(o)).map(|(_, o)| o.bytes()).sum()
        };
        match &self.kernel {
            // Only the gathered rows are read, and only the scattered ones written.
            Kernel::WeightGather | Kernel::Gather => {
                let row = self.ins[0].bytes() / self.ins[0].layout.shape[0].max(1);
                row * self.ins[1].layout.numel() + self.ins[1].bytes() + touched(&self.outs)
            }
            Kernel::ScatterRows => {
                let row = self.outs[0].bytes() / self.outs[0].layout.shape[0].max(1);
                row * self.ins[1].layout.numel() + touched(&self.ins)
            }
            _ => touched(&self.ins) + touched(&self.outs),
        }
    }

    /// The row program and its operands, if it is one.
    pub(crate) fn row(&self) -> Option<&RowProgram> {
        match &self.kernel {
            Kernel::Row(p) => Some(p),
            _ => None,
        }
    }
}

/// What [`crate::compile`] makes of a graph.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// All that steps refer to.
    pub places: Vec<Place>,
    /// In order.
    pub steps: Vec<Step>,
    /// Size of the arena: the peak of what lives in it.
    pub arena_bytes: usize,
    /// Named results, contiguous.
    pub outputs: Vec<(String, Operand)>,
    /// What each pass did.
    pub report: crate::Report,
}

impl Program {
    /// Bytes read and written by all steps.
    pub fn bytes_moved(&self) -> usize {
        self.steps.iter().map(Step::bytes).sum()
    }

    /// For each place, whether it is part of the arena.
    pub(crate) fn is_temp(&self, place: usize) -> bool {
        matches!(self.places[place], Place::Arena { .. })
    }

    /// For each place, whether a result lies in it.
    pub(crate) fn kept(&self) -> Vec<bool> {
        let mut kept = vec![false; self.places.len()];
        for (_, o) in &self.outputs {
            kept[o.place] = true;
        }
        kept
    }
}

/// `p3`, `p3[2, 4]`, with strides where they are not the contiguous ones and the offset where it is not 0.
struct Shown<'a>(&'a Operand);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let l = &self.0.layout;
        write!(f, "p{}", self.0.place)?;
        if self.0.dtype != DType::F32 {
            write!(f, ":{}", self.0.dtype)?;
        }
        write!(f, "{:?}", l.shape)?;
        if l.strides != Layout::contiguous(&l.shape).strides {
            write!(f, "*{:?}", l.strides)?;
        }
        if l.offset != 0 { write!(f, "+{}", l.offset) } else { Ok(()) }
    }
}

impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Shown(self).fmt(f)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Arena { offset, bytes } => write!(f, "arena {offset}..{}", offset + bytes),
            Place::Input { name, shape, dtype } => write!(f, "input {name:?} : {dtype}{shape:?}"),
            Place::Weight { name, shape, dtype } => write!(f, "weight {name:?} : {dtype}{shape:?}"),
            Place::State { name, shape, dtype } => write!(f, "state {name:?} : {dtype}{shape:?}"),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lower = |d: &dyn fmt::Debug| format!("{d:?}").to_lowercase();
        if let Kernel::Row(p) = &self.kernel {
            writeln!(f, "row {:?} {{", p.shape)?;
            for (i, instr) in p.instrs.iter().enumerate() {
                write!(f, "  %{i} = ")?;
                match instr {
                    Instr::Load { input } => writeln!(f, "load {}", self.ins[*input])?,
                    Instr::Const(c) => writeln!(f, "const {c}")?,
                    Instr::Iota { axis } => writeln!(f, "iota {axis}")?,
                    Instr::Random { seed, stream } => writeln!(f, "random {stream} {}", self.ins[*seed])?,
                    Instr::Unary(u, a) => writeln!(f, "{} %{a}", lower(u))?,
                    Instr::Binary(b, x, y) => writeln!(f, "{} %{x} %{y}", lower(b))?,
                    Instr::Select(c, x, y) => writeln!(f, "select %{c} %{x} %{y}")?,
                    Instr::Reduce(r, a) => writeln!(f, "row {} %{a}", lower(r))?,
                    Instr::Round(d, a) => writeln!(f, "round {d} %{a}")?,
                }
            }
            for (out, v, how) in &p.stores {
                let how = if *how == Store::ColumnSum { "column sum" } else { "store" };
                writeln!(f, "  {how} {} %{v}", self.outs[*out])?;
            }
            return f.write_str("}");
        }
        f.write_str(self.kernel.name())?;
        match &self.kernel {
            Kernel::Matmul { precision, add } => {
                write!(f, " {}{}", lower(precision), if *add { " add" } else { "" })?
            }
            Kernel::WeightMatmul { precision } | Kernel::WeightMatmulT { precision } => {
                write!(f, " {}", lower(precision))?
            }
            Kernel::Attention { layout, window, parts, .. } => {
                write!(f, " {layout:?}")?;
                if let Some(w) = window {
                    write!(f, " window {w}")?;
                }
                write!(f, " {parts:?}")?;
            }
            Kernel::ScatterAdd { add: true } => f.write_str(" to")?,
            Kernel::Row(_)
            | Kernel::WeightGather
            | Kernel::WeightDecode
            | Kernel::Gather
            | Kernel::ScatterAdd { add: false }
            | Kernel::ScatterRows
            | Kernel::Copy
            | Kernel::AllReduce => {}
        }
        f.write_str(":")?;
        for o in &self.outs {
            write!(f, " {o}")?;
        }
        f.write_str(" <-")?;
        for i in &self.ins {
            write!(f, " {i}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, p) in self.places.iter().enumerate() {
            writeln!(f, "p{i} {p}")?;
        }
        for s in &self.steps {
            writeln!(f, "{s}")?;
        }
        for (name, o) in &self.outputs {
            writeln!(f, "out {name:?} = {o}")?;
        }
        Ok(())
    }
}
