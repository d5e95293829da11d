//! Row programs: straight-line code over the rows of a domain, with reductions along the row and sums over all rows.
//!
//! Norms, softmax, SwiGLU, rotary embedding, cross-entropy, AdamW and their gradients are all row programs that the
//! compiler composes. [`Code::new`] prepares a [`Program`] for operands that lie in a certain way, once; [`run`] runs
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

mod program;
pub(crate) mod reference;

pub use program::{Binary, Instr, Program, Reduction, Store, Unary, Val};

use crate::{Context, Error, Memory, View};
use program::{Class, shape_error};
use reference::Operand;
use sparsam_dtype::{DType, Layout};

/// A program made ready for operands of certain types and layouts.
#[derive(Clone, Debug)]
pub struct Code {
    program: Program,
    classes: Vec<Class>,
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
        Ok(Code { program: program.clone(), classes, ins: own(ins), outs: own(outs) })
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

/// Runs `code`: `outs` and `ins` as listed when it was made. An output may be the same view as an input.
///
/// # Errors
/// Views that are not as the code was made for, lie out of bounds, or overlap in part.
pub fn run(
    _ctx: &Context,
    mem: &mut Memory,
    code: &Code,
    outs: &[&View],
    ins: &[&View],
) -> Result<(), Error> {
    run_reference(mem, code, outs, ins)
}

/// As [`run`], by the scalar reference on the calling thread: the meaning that the fast paths are held to.
///
/// # Errors
/// As [`run`].
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
mod tests {
    use super::*;
    use crate::Cpu;

    #[test]
    fn softmax_by_hand_and_column_sums() {
        let program = Program {
            shape: vec![2, 3],
            instrs: vec![
                Instr::Load { input: 0 },
                Instr::Reduce(Reduction::Max, 0),
                Instr::Binary(Binary::Sub, 0, 1),
                Instr::Unary(Unary::Exp, 2),
                Instr::Reduce(Reduction::Sum, 3),
                Instr::Binary(Binary::Div, 3, 4),
            ],
            stores: vec![(0, 5, Store::Rows), (1, 5, Store::ColumnSum), (2, 4, Store::Rows)],
        };
        let mut mem = Memory::new();
        let slab = mem.add_owned(24 + 12 + 8);
        let ln2 = std::f32::consts::LN_2;
        let x = [0.0, ln2, ln2 * 2.0, 5.0, 5.0, 5.0];
        mem.bytes_mut(slab).unwrap()[..24].copy_from_slice(bytemuck::cast_slice(&x));
        let x = View::contiguous(slab, DType::F32, &[2, 3]);
        let at = |offset, shape: &[usize]| View {
            layout: Layout { offset, ..Layout::contiguous(shape) },
            ..x.clone()
        };
        let (sums, totals) = (at(6, &[1, 3]), at(9, &[2, 1]));
        let outs = [&x, &sums, &totals];
        let code =
            Code::new(&program, &[(DType::F32, &x.layout)], &outs.map(|v| (v.dtype, &v.layout))).unwrap();
        for cpu in Cpu::all() {
            mem.bytes_mut(slab).unwrap()[..24].copy_from_slice(bytemuck::cast_slice(&[
                0.0,
                ln2,
                ln2 * 2.0,
                5.0,
                5.0,
                5.0,
            ]));
            run(&Context::new(2, cpu), &mut mem, &code, &outs, &[&x]).unwrap();
            let want = [1.0 / 7.0, 2.0 / 7.0, 4.0 / 7.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0];
            let close = |got: &[f32], want: &[f32]| got.iter().zip(want).all(|(a, b)| (a - b).abs() < 3e-7);
            assert!(close(mem.f32(&x).unwrap(), &want));
            let want = [want[0] + want[3], want[1] + want[4], want[2] + want[5]];
            assert!(close(mem.f32(&sums).unwrap(), &want));
            assert!(close(mem.f32(&totals).unwrap(), &[1.75, 3.0]));
        }
    }

    #[test]
    fn programs_that_mean_nothing_are_refused() {
        let good = Program {
            shape: vec![2, 3],
            instrs: vec![Instr::Load { input: 0 }, Instr::Unary(Unary::Neg, 0)],
            stores: vec![(0, 1, Store::Rows)],
        };
        let l = Layout::contiguous(&[2, 3]);
        let narrow = Layout::contiguous(&[2, 1]);
        let f32s = (DType::F32, &l);
        assert!(Code::new(&good, &[f32s], &[f32s]).is_ok());
        assert!(Code::new(&good, &[(DType::F32, &narrow)], &[f32s]).is_ok(), "a narrow value fills a row");
        let refused = |program: &Program, ins: &[(DType, &Layout)], outs: &[(DType, &Layout)], why: &str| {
            let e = Code::new(program, ins, outs).unwrap_err().to_string();
            assert!(e.contains(why), "{e}");
        };
        refused(&good, &[], &[f32s], "input 0 of 0");
        refused(&good, &[f32s], &[], "output 0 of 0");
        refused(&good, &[f32s], &[f32s, f32s], "never stored");
        refused(&good, &[f32s], &[(DType::F32, &narrow)], "output 0 has shape [2, 1]");
        refused(&good, &[(DType::Q4_0, &l)], &[f32s], "plain numbers");
        refused(&good, &[f32s], &[(DType::F32, &narrow.broadcast(&[2, 3]))], "many times");
        let with = |instr| Program { instrs: vec![Instr::Load { input: 0 }, instr], ..good.clone() };
        refused(&with(Instr::Unary(Unary::Neg, 1)), &[f32s], &[f32s], "not made yet");
        refused(&with(Instr::Iota { axis: 2 }), &[f32s], &[f32s], "iota along axis 2");
        refused(&with(Instr::Random { seed: 0, stream: 0 }), &[f32s], &[f32s], "I32 [2]");
        let twice = Program { stores: vec![(0, 1, Store::Rows), (0, 0, Store::Rows)], ..good.clone() };
        refused(&twice, &[f32s], &[f32s], "twice");
    }
}
