//! Axes that all operands walk through as one are merged, so that kernels count fewer of them and rows are long;
//! row programs that only move become copies. Before:
//!
//! ```text
//! row [2, 3, 8] {
//!   %0 = load p0[2, 3, 8]
//!   %1 = exp %0
//!   store p1[2, 3, 8] %1
//! }
//! ```
//!
//! and after:
//!
//! ```text
//! row [48] {
//!   %0 = load p0[48]
//!   %1 = exp %0
//!   store p1[48] %1
//! }
//! ```

use crate::program::{Instr, Kernel, Operand, Program, Step, Store};
use sparsam_ir::Layout;

/// Rows are lengthened up to this many elements: enough to hide the cost of starting one, few enough that there
/// are rows for all threads.
const LONG_ROW: usize = 1024;

/// Merges axes of all row programs, and names the moves.
pub(crate) fn collapse(program: &mut Program) {
    for step in &mut program.steps {
        rows(step);
    }
    moves(program);
}

/// Row programs that only move elements become copies.
pub(crate) fn moves(program: &mut Program) {
    for step in &mut program.steps {
        if let Some(p) = step.row()
            && p.instrs == [Instr::Load { input: 0 }]
            && p.stores == [(0, 0, Store::Rows)]
            && step.ins[0].layout.shape == step.outs[0].layout.shape
        {
            step.kernel = Kernel::Copy;
        }
    }
}

fn rows(step: &mut Step) {
    let Some(p) = step.row() else { return };
    let plain = |i: &Instr| !matches!(i, Instr::Reduce(..) | Instr::Iota { .. } | Instr::Random { .. });
    let elementwise = p.instrs.iter().all(plain)
        && p.stores.iter().all(|(o, _, how)| *how == Store::Rows && step.outs[*o].layout.shape == p.shape);
    let mut axis = p.shape.len() - 1;
    // From the row outwards: axis - 1 into axis. The row itself only where no value belongs to a row.
    while axis > 0 {
        let p = step.row().expect("still a row program");
        let row = axis + 1 == p.shape.len();
        let (outer, inner) = (p.shape[axis - 1], p.shape[axis]);
        let allowed = if row { elementwise && (outer == 1 || outer * inner <= LONG_ROW) } else { true };
        // An index along either axis is lost by merging; along later ones it is renamed.
        let counted =
            p.instrs.iter().any(|i| matches!(i, Instr::Iota { axis: a } if *a == axis || *a == axis - 1));
        let seeds: Vec<usize> = p
            .instrs
            .iter()
            .filter_map(|i| if let Instr::Random { seed, .. } = i { Some(*seed) } else { None })
            .collect();
        let mergeable = |o: &Operand| merged(&o.layout, axis).is_some();
        let all = step.ins.iter().enumerate().all(|(k, o)| seeds.contains(&k) || mergeable(o));
        if !allowed || counted || !all || !step.outs.iter().all(mergeable) {
            axis -= 1;
            continue;
        }
        let merge = |o: &mut Operand| o.layout = merged(&o.layout, axis).expect("just seen");
        step.ins.iter_mut().enumerate().filter(|(k, _)| !seeds.contains(k)).for_each(|(_, o)| merge(o));
        step.outs.iter_mut().for_each(merge);
        if let Kernel::Row(p) = &mut step.kernel {
            p.shape[axis - 1] *= p.shape[axis];
            p.shape.remove(axis);
            for i in &mut p.instrs {
                if let Instr::Iota { axis: a } = i
                    && *a > axis
                {
                    *a -= 1;
                }
            }
        }
        axis -= 1;
    }
}

/// `l` with `axis - 1` and `axis` as one, if they are walked through as one.
fn merged(l: &Layout, axis: usize) -> Option<Layout> {
    let (n, m) = (l.shape[axis - 1], l.shape[axis]);
    let stride = match (n, m) {
        (1, _) => l.strides[axis],
        (_, 1) => l.strides[axis - 1],
        _ if l.strides[axis - 1] == l.strides[axis] * m => l.strides[axis],
        _ => return None,
    };
    let mut l = l.clone();
    l.shape[axis - 1] = n * m;
    l.strides[axis - 1] = stride;
    l.shape.remove(axis);
    l.strides.remove(axis);
    Some(l)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{graph, header, on_program, steps};
    use super::*;
    use sparsam_ir::DType;

    #[test]
    fn axes_walked_through_as_one_become_one() {
        let g = graph(|t| t.input("x", &[2, 3, 8], DType::F32).exp());
        let source = include_str!("collapse.rs");
        assert_eq!(steps(&on_program(&[], &g)), header(source, 0));
        assert_eq!(steps(&on_program(&[collapse], &g)), header(source, 1));
    }

    #[test]
    fn rows_that_are_counted_or_reduced_stay() {
        let shape = |f: &dyn Fn(&sparsam_ir::Trace) -> sparsam_ir::Tensor| {
            on_program(&[super::super::fuse::fuse, collapse], &graph(f)).steps[0].row().unwrap().shape.clone()
        };
        assert_eq!(shape(&|t| t.input("x", &[2, 3, 8], DType::F32).sum(&[2])), [6, 8]);
        assert_eq!(shape(&|t| t.iota(&[2, 3, 8], 1).cast(DType::F32)), [2, 3, 8]);
        assert_eq!(shape(&|t| t.input("x", &[2, 3, 8], DType::F32).slice(1, 0, 2).exp()), [2, 16]);
        assert_eq!(shape(&|t| t.input("x", &[512, 512], DType::F32).exp()), [512, 512]);
        assert_eq!(shape(&|t| t.random(&t.input("s", &[2], DType::I32), 0, &[2, 3, 8])), [6, 8]);
    }

    #[test]
    fn moves_become_copies() {
        let p = on_program(&[collapse], &graph(|t| t.input("x", &[2, 3], DType::F32).t().reshape(&[6])));
        assert_eq!(steps(&p), "copy: p1[3, 2] <- p0[3, 2]*[1, 3]\n");
    }
}
