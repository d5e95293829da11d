//! The language of row programs, and what makes one well formed.

use crate::Error;
use crate::movement::writes_apart;
use sparsam_dtype::{DType, Layout};

/// A value: the index of the instruction that makes it. Each is made once, before it is used.
pub type Val = u32;

/// Functions of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names say it
pub enum Unary {
    Neg,
    Abs,
    Recip,
    Sqrt,
    Exp,
    Log,
    Sin,
    Cos,
    Tanh,
    Erf,
    Floor,
}

/// Functions of two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names say it
pub enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    /// The larger; NaN if either is.
    Max,
    /// The smaller; NaN if either is.
    Min,
    /// 1 where `a < b`, else 0.
    Less,
    /// 1 where `a == b`, else 0.
    Equal,
}

/// How the elements of a row become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names say it
pub enum Reduction {
    Sum,
    Max,
}

/// One step of a row program.
///
/// A value is *wide* (one element per column) or *narrow* (one per row). Loads are wide unless their view repeats
/// along the row; [`Instr::Reduce`] makes narrow values; whatever is computed from narrow values only is narrow.
/// Beside a wide value a narrow one counts for every column.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Instr {
    /// An input, converted to f32.
    Load {
        /// Index among the inputs.
        input: usize,
    },
    /// One number everywhere.
    Const(f32),
    /// The index along an axis of the domain.
    Iota {
        /// The axis.
        axis: usize,
    },
    /// Uniform in [0, 1): word 0 of Philox 4x32-10 (Salmon et al. 2011) at counter (flat element index, stream, 0),
    /// its upper 24 bits as a fraction.
    Random {
        /// The input that holds the key: two I32.
        seed: usize,
        /// Word 2 of the counter.
        stream: u32,
    },
    /// A function of one value.
    Unary(Unary, Val),
    /// A function of two values.
    Binary(Binary, Val, Val),
    /// Condition, a, b: a where the condition is not 0, else b.
    Select(Val, Val, Val),
    /// Over the whole row: narrow. Of a narrow value: as if it stood in every column.
    Reduce(Reduction, Val),
    /// Rounded to what an element type holds (integers: towards zero, saturating), still an f32.
    Round(DType, Val),
}

impl Instr {
    /// The values that this instruction reads.
    pub fn operands(&self) -> impl Iterator<Item = Val> {
        let (list, n) = match *self {
            Instr::Load { .. } | Instr::Const(_) | Instr::Iota { .. } | Instr::Random { .. } => ([0; 3], 0),
            Instr::Unary(_, a) | Instr::Reduce(_, a) | Instr::Round(_, a) => ([a, 0, 0], 1),
            Instr::Binary(_, a, b) => ([a, b, 0], 2),
            Instr::Select(c, a, b) => ([c, a, b], 3),
        };
        list.into_iter().take(n)
    }
}

/// What becomes of a stored value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Store {
    /// Every row, into a view of the domain's shape (last length 1 allowed for narrow values).
    Rows,
    /// The sum over all rows, into a view of shape (1, .., 1, width) (last length 1 allowed for narrow values).
    ColumnSum,
}

/// A row program: straight-line code run once for every row of `shape`.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// The domain; its last axis is the row. An empty shape is one row of one element.
    pub shape: Vec<usize>,
    /// The steps.
    pub instrs: Vec<Instr>,
    /// (output, value, how): each output once.
    pub stores: Vec<(usize, Val, Store)>,
}

/// How often a value must be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// Once for all rows.
    Uniform,
    /// Once a row.
    Narrow,
    /// For each column of each row.
    Wide,
}

pub(super) fn shape_error(what: String) -> Error {
    Error::Shape { op: "row program", what }
}

impl Program {
    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, lead)| lead.iter().product())
    }

    /// The class of every value, given how inputs lie; refuses programs that mean nothing.
    pub(super) fn check(
        &self,
        ins: &[(DType, &Layout)],
        outs: &[(DType, &Layout)],
    ) -> Result<Vec<Class>, Error> {
        /// Registers and operands are numbered in 16 bits.
        const MOST: usize = 50_000;
        let total = 2 * self.instrs.len() + ins.len() + outs.len() + self.stores.len();
        // A row's columns are counted in i32.
        if self.width() > i32::MAX as usize {
            return Err(shape_error(format!("rows of {} elements, at most 2^31 - 1", self.width())));
        }
        if total > MOST {
            let what = format!("{} instructions are too many; split the program", self.instrs.len());
            return Err(shape_error(what));
        }
        let mut classes: Vec<Class> = Vec::with_capacity(self.instrs.len());
        let input = |i: usize| {
            ins.get(i).copied().ok_or_else(|| shape_error(format!("input {i} of {} inputs", ins.len())))
        };
        let plain = |dtype: DType, what: &str, i: usize| match dtype.is_block() {
            true => Err(shape_error(format!("{what} {i} is {dtype}; want plain numbers"))),
            false => Ok(()),
        };
        for (i, instr) in self.instrs.iter().enumerate() {
            if let Some(v) = instr.operands().find(|&v| v as usize >= i) {
                return Err(shape_error(format!("instruction {i} reads value {v}, which is not made yet")));
            }
            classes.push(match *instr {
                Instr::Load { input: at } => {
                    let (dtype, layout) = input(at)?;
                    plain(dtype, "input", at)?;
                    let fits = layout.shape.len() == self.shape.len()
                        && layout.shape.iter().zip(&self.shape).all(|(&l, &n)| l == n || l == 1);
                    if !fits {
                        let what =
                            format!("input {at} has shape {:?} in domain {:?}", layout.shape, self.shape);
                        return Err(shape_error(what));
                    }
                    let repeats = |a: &usize| layout.shape[*a] == 1 || layout.strides[*a] == 0;
                    let lead = self.shape.len().saturating_sub(1);
                    match (repeats_last(layout), (0..lead).all(|a| repeats(&a))) {
                        (false, _) => Class::Wide,
                        (true, false) => Class::Narrow,
                        (true, true) => Class::Uniform,
                    }
                }
                Instr::Const(_) => Class::Uniform,
                Instr::Iota { axis } => {
                    if axis >= self.shape.len() {
                        return Err(shape_error(format!("iota along axis {axis} of {:?}", self.shape)));
                    }
                    if axis + 1 == self.shape.len() { Class::Wide } else { Class::Narrow }
                }
                Instr::Random { seed, .. } => {
                    let (dtype, layout) = input(seed)?;
                    if dtype != DType::I32 || layout.shape != [2] {
                        let what = format!("seed is {dtype} {:?}; want I32 [2]", layout.shape);
                        return Err(shape_error(what));
                    }
                    Class::Wide
                }
                Instr::Unary(..) | Instr::Binary(..) | Instr::Select(..) => {
                    instr.operands().map(|v| classes[v as usize]).max().unwrap_or(Class::Uniform)
                }
                Instr::Reduce(_, v) => classes[v as usize].min(Class::Narrow),
                Instr::Round(dtype, v) => {
                    plain(dtype, "rounding, instruction", i)?;
                    classes[v as usize]
                }
            });
        }
        let mut seen = vec![false; outs.len()];
        for &(out, v, how) in &self.stores {
            let &(dtype, layout) = outs
                .get(out)
                .ok_or_else(|| shape_error(format!("output {out} of {} outputs", outs.len())))?;
            if std::mem::replace(&mut seen[out], true) {
                return Err(shape_error(format!("output {out} is stored twice")));
            }
            plain(dtype, "output", out)?;
            let class =
                *classes.get(v as usize).ok_or_else(|| shape_error(format!("no value {v} to store")))?;
            let mut want = self.shape.clone();
            if how == Store::ColumnSum {
                want.iter_mut().rev().skip(1).for_each(|n| *n = 1);
            }
            let narrow_fits = class != Class::Wide
                && layout.shape.len() == want.len()
                && layout.shape.last() == Some(&1)
                && layout.shape[..want.len() - 1] == want[..want.len() - 1];
            if layout.shape != want && !narrow_fits {
                let what = format!("output {out} has shape {:?}; want {want:?} ({class:?})", layout.shape);
                return Err(shape_error(what));
            }
            if !writes_apart(layout) {
                return Err(shape_error(format!("output {out} writes one element many times")));
            }
        }
        if let Some(out) = seen.iter().position(|&s| !s) {
            return Err(shape_error(format!("output {out} is never stored")));
        }
        Ok(classes)
    }
}

/// Whether all elements of a row are one.
pub(super) fn repeats_last(layout: &Layout) -> bool {
    match (layout.shape.last(), layout.strides.last()) {
        (Some(&n), Some(&s)) => n == 1 || s == 0,
        _ => true,
    }
}
