//! A product or a scatter that is only added to something becomes one that adds in place. Before:
//!
//! ```text
//! matmul f32: p3[2, 4] <- p0[2, 8] p1[8, 4]
//! row [2, 4] {
//!   %0 = load p2[2, 4]
//!   %1 = load p3[2, 4]
//!   %2 = add %0 %1
//!   store p4[2, 4] %2
//! }
//! ```
//!
//! and after, where nobody else reads `p2`:
//!
//! ```text
//! matmul f32 add: p2[2, 4] <- p0[2, 8] p1[8, 4] p2[2, 4]
//! ```
//!
//! Gradients of a value that several products read are such sums, and so is that of an embedding table that is the head
//! too: its gradient from the head takes in the rows from the input.

use crate::program::{Instr, Kernel, Operand, Program, Step, Store};
use sparsam_ir::Binary;

/// Lets products add in place.
pub(crate) fn accumulate(program: &mut Program) {
    let n = program.places.len();
    let (mut readers, mut writers) = (vec![Vec::new(); n], vec![Vec::new(); n]);
    for (i, s) in program.steps.iter().enumerate() {
        s.ins.iter().for_each(|o| readers[o.place].push(i));
        s.outs.iter().for_each(|o| writers[o.place].push(i));
    }
    let kept = program.kept();
    // Places that became others.
    let mut becomes: Vec<usize> = (0..n).collect();
    let mut steps: Vec<Option<Step>> = std::mem::take(&mut program.steps).into_iter().map(Some).collect();
    for i in 0..steps.len() {
        if let Some(step) = &mut steps[i] {
            step.ins.iter_mut().chain(&mut step.outs).for_each(|o| o.place = becomes[o.place]);
        }
        let Some([x, y, out]) = steps[i].as_ref().and_then(sum) else { continue };
        // Only this sum reads either, and those who add to it.
        let alone = |o: &Operand| {
            let (readers, writers) = (&readers[o.place], &writers[o.place]);
            let own = readers.iter().all(|r| *r == i || writers.contains(r));
            program.is_temp(o.place) && !kept[o.place] && own && o.layout.is_contiguous()
        };
        if !(alone(&x) && alone(&y) && x.place != y.place && program.is_temp(out.place))
            || writers[out.place].len() != 1
        {
            continue;
        }
        // The later of the two adds to the earlier one.
        let made = |o: &Operand| match writers[o.place][..] {
            [at] if steps[at].as_ref().is_some_and(adds) => Some(at),
            _ => None,
        };
        let last = |o: &Operand| writers[o.place].last().copied().unwrap_or(usize::MAX);
        let pairs = [(&x, &y), (&y, &x)];
        let Some((at, into)) = pairs
            .into_iter()
            .find_map(|(product, into)| made(product).filter(|&at| last(into) < at).map(|at| (at, into)))
        else {
            continue;
        };
        let Some(product) = &mut steps[at] else { continue };
        match &mut product.kernel {
            Kernel::Matmul { add, .. } | Kernel::ScatterAdd { add } => *add = true,
            other => unreachable!("{other:?} does not add"),
        }
        let whole = Operand { layout: product.outs[0].layout.clone(), ..into.clone() };
        product.ins.push(whole.clone());
        product.outs = vec![whole];
        let nodes = steps[i].take().map_or_else(Vec::new, |s| s.nodes);
        steps[at].as_mut().expect("just seen").nodes.extend(nodes);
        becomes[out.place] = into.place;
        readers[into.place] = std::mem::take(&mut readers[out.place]);
        writers[into.place].push(at);
    }
    for s in steps.iter_mut().flatten() {
        s.ins.iter_mut().chain(&mut s.outs).for_each(|o| o.place = becomes[o.place]);
    }
    program.steps = steps.into_iter().flatten().collect();
    program.outputs.iter_mut().for_each(|(_, o)| o.place = becomes[o.place]);
}

/// Operands and result of a step that adds two whole values of one shape.
fn sum(step: &Step) -> Option<[Operand; 3]> {
    let p = step.row()?;
    let adds = p.instrs.len() == 3 && p.instrs[2] == Instr::Binary(Binary::Add, 0, 1);
    match (&p.instrs[..], &p.stores[..], &step.ins[..], &step.outs[..]) {
        ([Instr::Load { input: 0 }, Instr::Load { input: 1 }, _], [(0, 2, Store::Rows)], [x, y], [out])
            if adds && x.dtype == out.dtype && y.dtype == out.dtype && out.layout.is_contiguous() =>
        {
            Some([x.clone(), y.clone(), out.clone()])
        }
        _ => None,
    }
}

/// Whether a step's kernel can add to what its output holds, and does not yet.
fn adds(step: &Step) -> bool {
    let whole =
        step.outs.len() == 1 && step.outs[0].layout.is_contiguous() && step.outs[0].layout.offset == 0;
    whole && matches!(step.kernel, Kernel::Matmul { add: false, .. } | Kernel::ScatterAdd { add: false })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{graph, header, on_program, steps};
    use super::*;
    use sparsam_ir::{DType, Tensor, Trace};

    fn product(t: &Trace, name: &str) -> Tensor {
        t.input("a", &[2, 8], DType::F32).matmul(&t.input(name, &[8, 4], DType::F32))
    }

    fn text(f: impl Fn(&Trace) -> Tensor) -> [String; 2] {
        let g = graph(f);
        [steps(&on_program(&[], &g)), steps(&on_program(&[accumulate], &g))]
    }

    #[test]
    fn the_example_of_the_header() {
        let [before, after] = text(|t| {
            let (a, b) = (t.input("a", &[2, 8], DType::F32), t.input("b", &[8, 4], DType::F32));
            let x = t.input("x", &[2, 4], DType::F32).exp();
            x + a.matmul(&b)
        });
        let source = include_str!("accumulate.rs");
        let plain = |s: &str, names: &[(&str, &str)]| {
            let tail: String =
                s.lines().skip_while(|l| !l.starts_with("matmul")).map(|l| format!("{l}\n")).collect();
            names.iter().fold(tail, |s, (from, to)| s.replace(from, to))
        };
        // Numbers of places as they come out of the trace: a, b, x, exp x, product, sum.
        let names = [("p3", "pX"), ("p4", "p3"), ("p5", "p4"), ("pX", "p2")];
        assert_eq!(plain(&before, &names), header(source, 0));
        assert_eq!(plain(&after, &names), header(source, 1));
    }

    #[test]
    fn sums_of_several_products_and_scatters() {
        let g = graph(|t| {
            let rows = t.input("rows", &[2], DType::I32);
            product(t, "b") + product(t, "c") + t.input("v", &[2, 4], DType::F32).scatter_add(&rows, 2)
        });
        let p = on_program(&[accumulate], &g);
        let names: Vec<&str> = p.steps.iter().map(|s| s.kernel.name()).collect();
        assert_eq!(names, ["matmul", "matmul", "scatter add"], "{p}");
    }

    #[test]
    fn what_others_read_or_what_lies_otherwise_stays() {
        let keeps: [fn(&Trace) -> Tensor; 4] = [
            |t| t.input("x", &[2, 4], DType::F32) + product(t, "b"), // an input
            |t| {
                let x = t.input("x", &[2, 4], DType::F32).exp();
                (&x + &product(t, "b")) * x
            },
            |t| t.input("x", &[4, 2], DType::F32).exp().t() + product(t, "b"),
            |t| {
                let p = product(t, "b");
                &p + &p
            },
        ];
        for (i, f) in keeps.into_iter().enumerate() {
            let [before, after] = text(f);
            assert_eq!(before, after, "keep {i}");
        }
    }
}
