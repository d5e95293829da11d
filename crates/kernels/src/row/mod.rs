//! Row programs: straight-line code over the rows of a domain, with reductions along the row and sums over all rows.
//!
//! Norms, softmax, SwiGLU, rotary embedding, cross-entropy, AdamW and their gradients are all row programs that the
//! compiler composes. [`Code::new`] prepares a [`Program`] for operands that lie in a certain way, once; [`run()`] runs
//! it on memory as often as wanted. [`run_reference`] is the meaning, slow and plain.
//!
//! A row's result depends neither on the number of threads nor on the other rows.
//!
//! ```
//! use sparsam_kernels::row::{Binary, Code, Instr, Program, Reduction, Store, run};
//! use sparsam_kernels::{Context, Cpu, Memory, View};
//! use sparsam_dtype::DType;
//! // y = x - max(x), row by row.
//! let program = Program {
//!     shape: vec![2, 3],
//!     instrs: vec![
//!         Instr::Load { input: 0 },
//!         Instr::Reduce(Reduction::Max, 0),
//!         Instr::Binary(Binary::Sub, 0, 1),
//!     ],
//!     stores: vec![(0, 2, Store::Rows)],
//! };
//! let mut mem = Memory::new();
//! let slab = mem.add_owned(24);
//! let x = View::contiguous(slab, DType::F32, &[2, 3]);
//! mem.bytes_mut(slab).unwrap().copy_from_slice(bytemuck::cast_slice(&[1f32, 2., 3., 6., 5., 4.]));
//! let operand = (DType::F32, &x.layout);
//! let code = Code::new(&program, &[operand], &[operand]).unwrap();
//! run(&Context::new(1, Cpu::detect()), &mut mem, &code, &[&x], &[&x]).unwrap(); // in place
//! assert_eq!(mem.f32(&x).unwrap(), [-2., -1., 0., 0., -1., -2.]);
//! ```

mod code;
mod exec;
mod nodes;
mod program;
pub(crate) mod reference;
mod run;

pub use program::{Binary, Instr, Program, Reduction, Store, Unary, Val};

use crate::mem::{Place, Ptr};
use crate::{Context, Error, Memory, View};
use program::{Class, shape_error};
use reference::Operand;
use sparsam_dtype::{DType, Layout};

/// A program made ready for operands of certain types and layouts.
#[derive(Clone, Debug)]
pub struct Code {
    program: Program,
    classes: Vec<Class>,
    tiled: code::Tiled,
    ins: Vec<(DType, Layout)>,
    outs: Vec<(DType, Layout)>,
}

impl Code {
    /// Prepares `program` for inputs and outputs that lie as given (offsets may differ at each run).
    ///
    /// # Errors
    /// [`Error::Shape`] if the program is not well formed or an operand's shape does not fit the domain.
    pub fn new(
        program: &Program,
        ins: &[(DType, &Layout)],
        outs: &[(DType, &Layout)],
    ) -> Result<Code, Error> {
        let classes = program.check(ins, outs)?;
        let own = |list: &[(DType, &Layout)]| list.iter().map(|&(d, l)| (d, l.clone())).collect();
        let tiled = code::compile(program, &classes, ins, outs);
        Ok(Code { program: program.clone(), classes, tiled, ins: own(ins), outs: own(outs) })
    }

    /// The program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Whether views lie as the code was made for.
    fn check_views(&self, outs: &[&View], ins: &[&View]) -> Result<(), Error> {
        for (what, views, want) in [("output", outs, &self.outs), ("input", ins, &self.ins)] {
            if views.len() != want.len() {
                return Err(shape_error(format!("{} {what}s, want {}", views.len(), want.len())));
            }
            for (i, (v, (dtype, l))) in views.iter().zip(want).enumerate() {
                if v.dtype != *dtype || v.layout.shape != l.shape || v.layout.strides != l.strides {
                    let what = format!("{what} {i} is {v:?}; the code was made for {dtype} {l:?}");
                    return Err(shape_error(what));
                }
            }
        }
        Ok(())
    }
}

/// Code and the operands that it runs on, checked once.
#[derive(Clone, Debug)]
pub struct Bound {
    code: Code,
    /// Outputs first.
    places: Vec<Place>,
}

impl Bound {
    /// Binds `code` to `outs` and `ins`, as listed when it was made. An output may be the same view as an input.
    ///
    /// # Errors
    /// Views that are not as the code was made for, lie out of bounds, or overlap in part.
    pub fn new(mem: &Memory, code: Code, outs: &[&View], ins: &[&View]) -> Result<Bound, Error> {
        code.check_views(outs, ins)?;
        let places = mem.bind(outs, ins, true)?;
        Ok(Bound { code, places })
    }

    /// Runs the code.
    ///
    /// # Errors
    /// If slabs of `mem` are missing, or smaller than when the operands were bound.
    pub fn run(&self, ctx: &Context, mem: &mut Memory) -> Result<(), Error> {
        execute(ctx, mem, &self.code, &self.places)
    }
}

/// Runs `code`: `outs` and `ins` as listed when it was made. An output may be the same view as an input.
///
/// # Errors
/// As [`Bound::new`].
pub fn run(ctx: &Context, mem: &mut Memory, code: &Code, outs: &[&View], ins: &[&View]) -> Result<(), Error> {
    code.check_views(outs, ins)?;
    let places = mem.bind(outs, ins, true)?;
    execute(ctx, mem, code, &places)
}

/// Runs `code` on operands that were checked against it.
fn execute(ctx: &Context, mem: &mut Memory, code: &Code, places: &[Place]) -> Result<(), Error> {
    let mut stack = [Ptr(std::ptr::null_mut()); 24];
    let mut heap = Vec::new();
    let ptrs = if places.len() <= stack.len() {
        &mut stack[..places.len()]
    } else {
        heap.resize(places.len(), stack[0]);
        &mut heap[..]
    };
    mem.addresses(places, ptrs)?;
    let (out_ptrs, in_ptrs) = ptrs.split_at(code.outs.len());
    let sum_columns = |o: usize| code.outs[o].1.shape.last().copied().unwrap_or(1);
    // SAFETY: resolved just now for views that lie as the code was made for.
    unsafe { run::run(ctx, &code.tiled, in_ptrs, out_ptrs, sum_columns) }
    Ok(())
}

/// As [`run()`], by the scalar reference on the calling thread: the meaning that the fast paths are held to.
///
/// # Errors
/// As [`run()`].
pub fn run_reference(mem: &mut Memory, code: &Code, outs: &[&View], ins: &[&View]) -> Result<(), Error> {
    code.check_views(outs, ins)?;
    let (out_ptrs, in_ptrs) = mem.resolve_slices(outs, ins, true)?;
    let outs: Vec<Operand> = out_ptrs
        .into_iter()
        .zip(&code.outs)
        .map(|(ptr, (dtype, layout))| Operand { ptr, dtype: *dtype, layout })
        .collect();
    let ins: Vec<Operand> = in_ptrs
        .into_iter()
        .zip(&code.ins)
        .map(|(ptr, (dtype, layout))| Operand { ptr, dtype: *dtype, layout })
        .collect();
    reference::run(&code.program, &code.classes, &outs, &ins);
    Ok(())
}

#[cfg(test)]
mod tests;
