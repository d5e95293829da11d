//! A result of a row program (or of a sum over processes) takes the place of an operand that ends with it, where both
//! have the same elements at the same points. Before:
//!
//! ```text
//! row [4, 8] {
//!   %0 = load p1[4, 8]
//!   %1 = exp %0
//!   store p2[4, 8] %1
//! }
//! ```
//!
//! and after, `p2` is `p1`. An operand that someone reads later, or that a view shifts, stays.

use crate::check::lifetimes;
use crate::program::{Kernel, Place, Program};
use sparsam_ir::Layout;

/// Lets results take the places of operands that end with them.
pub(crate) fn in_place(program: &mut Program) {
    let mut life = lifetimes(program);
    let kept = program.kept();
    let mut writers = vec![0; program.places.len()];
    program.steps.iter().flat_map(|s| &s.outs).for_each(|o| writers[o.place] += 1);
    let mut becomes: Vec<usize> = (0..program.places.len()).collect();
    for i in 0..program.steps.len() {
        let step = &mut program.steps[i];
        for o in step.ins.iter_mut().chain(&mut step.outs) {
            o.place = becomes[o.place];
        }
        let step = &program.steps[i];
        if step.row().is_none() && step.kernel != Kernel::AllReduce {
            continue;
        }
        let mut renames = Vec::new();
        let mut taken: Vec<usize> = Vec::new();
        let mut done: Vec<usize> = Vec::new();
        for out in &step.outs {
            let to = out.place;
            let Place::Arena { bytes: need, .. } = program.places[to] else { continue };
            // All of its parts are made here.
            let parts = step.outs.iter().filter(|o| o.place == to).count();
            if done.contains(&to) || writers[to] != parts {
                continue;
            }
            done.push(to);
            let candidate = step.ins.iter().map(|o| o.place).find(|&from| {
                let Place::Arena { bytes, .. } = program.places[from] else { return false };
                let ends = life[from].is_some_and(|(_, last)| last == i);
                let fits = bytes == need && !kept[from] && !taken.contains(&from);
                let same = || {
                    step.ins.iter().filter(|o| o.place == from).all(|o| {
                        step.outs.iter().filter(|s| s.place == to).all(|s| {
                            o.dtype == s.dtype && (o.layout == s.layout || apart(&o.layout, &s.layout))
                        })
                    })
                };
                from != to && ends && fits && same()
            });
            if let Some(from) = candidate {
                taken.push(from);
                renames.push((to, from));
            }
        }
        for (to, from) in renames {
            becomes[to] = from;
            if let (Some(new), Some(old)) = (life[to], &mut life[from]) {
                old.1 = new.1;
            }
            program.steps[i].outs.iter_mut().filter(|o| o.place == to).for_each(|o| o.place = from);
        }
    }
    for (_, o) in &mut program.outputs {
        o.place = becomes[o.place];
    }
}

/// Whether two views of one place share no element, by the rule that kernels check: apart as a whole, or in
/// different columns of rows of one length.
fn apart(a: &Layout, b: &Layout) -> bool {
    if a.numel() == 0 || b.numel() == 0 || a.end() <= b.offset || b.end() <= a.offset {
        return true;
    }
    let period = |l: &Layout| {
        let mut row = 1;
        for (&n, &s) in l.shape.iter().zip(&l.strides).rev() {
            if n == 1 || s == 0 {
                continue;
            }
            if s > row {
                return Some(s);
            }
            row = s * n;
        }
        None
    };
    let base = a.offset.min(b.offset);
    let columns = |l: &Layout, period: usize| {
        let wide = l.shape.iter().zip(&l.strides).filter(|(n, s)| **n > 1 && **s % period != 0);
        let last: usize = wide.map(|(n, s)| (n - 1) * s).sum();
        let first = (l.offset - base) % period;
        (first + last < period).then_some((first, first + last + 1))
    };
    let Some(p) = period(a).into_iter().chain(period(b)).min() else { return false };
    match (columns(a, p), columns(b, p)) {
        (Some((a0, a1)), Some((b0, b1))) => a1 <= b0 || b1 <= a0,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::plan;
    use super::super::testing::{graph, on_program};
    use super::*;
    use sparsam_ir::{DType, Tensor, Trace};

    fn arena(f: impl Fn(&Trace, &Tensor) -> Tensor) -> usize {
        let g = graph(|t| f(t, &t.input("x", &[4, 8], DType::F32).exp()));
        on_program(&[in_place, plan], &g).arena_bytes
    }

    #[test]
    fn results_take_the_places_of_operands_that_end() {
        let one = 4 * 8 * 4;
        assert_eq!(arena(|_, x| x.neg().sin()), one);
        // Both halves are read and written where they lie.
        let g = graph(|t| {
            let x = t.input("x", &[4, 8], DType::F32).exp();
            let (a, b) = (x.slice(1, 0, 4), x.slice(1, 4, 8));
            t.concat(&[&(&a - &b), &(&b + &a)], 1)
        });
        let p = on_program(&[super::super::fuse::fuse, in_place, plan], &g);
        assert_eq!(p.arena_bytes, one, "{p}");
    }

    #[test]
    fn a_sum_over_processes_lies_where_its_operand_did() {
        assert_eq!(arena(|_, x| x.all_reduce().neg()), 4 * 8 * 4);
        assert_eq!(arena(|_, x| x.all_reduce() + x.clone()), 2 * 4 * 8 * 4);
    }

    #[test]
    fn operands_that_live_on_or_lie_otherwise_stay() {
        let one = 4 * 8 * 4;
        assert_eq!(arena(|_, x| x.neg() + x.clone()), 2 * one); // the sum takes the place of either
        assert_eq!(arena(|_, x| x.t().neg()), 2 * one);
        assert_eq!(arena(|_, x| x.slice(1, 0, 4).neg()), one + one / 2);
        assert_eq!(arena(|t, x| t.concat(&[&x.slice(1, 4, 8), &x.slice(1, 0, 4)], 1)), 2 * one); // exchanged
    }
}
