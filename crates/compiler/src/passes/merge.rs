//! Products of one activation with several weights become one kernel, which reads and rounds the activation once
//! and enters one parallel region: q, k and v; gate and up. Before:
//!
//! ```text
//! weight matmul int8: p2[4, 32] <- p0[4, 64] p1[32, 64]
//! weight matmul int8: p4[4, 16] <- p0[4, 64] p3[16, 64]
//! ```
//!
//! and after:
//!
//! ```text
//! weight matmul int8: p2[4, 32] p4[4, 16] <- p0[4, 64] p1[32, 64] p3[16, 64]
//! ```

use crate::program::{Kernel, Program, Step};

/// Merges what reads the same activation in the same precision, at the place of the first.
pub(crate) fn merge(program: &mut Program) {
    let mut steps: Vec<Step> = Vec::new();
    // Where products stand in the new order, the latest last, and the last write of each place.
    let mut products: Vec<usize> = Vec::new();
    let mut written: Vec<usize> = vec![0; program.places.len()];
    for step in std::mem::take(&mut program.steps) {
        if let Kernel::WeightMatmul { .. } = step.kernel {
            let joins = |&&i: &&usize| {
                let first = &steps[i];
                first.kernel == step.kernel && first.ins[0] == step.ins[0] && written[step.ins[0].place] <= i
            };
            if let Some(&i) = products.iter().rev().take(8).find(joins) {
                let first = &mut steps[i];
                step.outs.iter().for_each(|o| written[o.place] = i);
                first.outs.extend(step.outs);
                first.ins.extend(step.ins.into_iter().skip(1));
                first.nodes.extend(step.nodes);
                continue;
            }
            products.push(steps.len());
        }
        step.outs.iter().for_each(|o| written[o.place] = steps.len());
        steps.push(step);
    }
    program.steps = steps;
}

#[cfg(test)]
mod tests {
    use super::super::testing::{graph, header, on_program, steps};
    use super::*;
    use sparsam_ir::{DType, Precision};

    #[test]
    fn products_of_one_activation_become_one() {
        let g = graph(|t| {
            let x = t.input("x", &[4, 64], DType::F32);
            let product = |name: &str, n, p| x.matmul_with(&t.weight(name, &[n, 64]), false, true, p);
            t.concat(&[&product("a", 32, Precision::Int8), &product("b", 16, Precision::Int8)], 1)
        });
        let text = |p: &Program| -> String {
            steps(p).lines().filter(|l| l.contains("matmul")).map(|l| format!("{l}\n")).collect()
        };
        let source = include_str!("merge.rs");
        assert_eq!(text(&on_program(&[], &g)), header(source, 0));
        assert_eq!(text(&on_program(&[merge], &g)), header(source, 1));
    }

    #[test]
    fn other_activations_and_precisions_stay_apart() {
        let g = graph(|t| {
            let x = t.input("x", &[4, 64], DType::F32);
            let product = |x: &sparsam_ir::Tensor, name: &str, p| {
                x.matmul_with(&t.weight(name, &[64, 64]), false, true, p)
            };
            let y = product(&x, "a", Precision::Int8);
            product(&y, "b", Precision::Int8) + product(&x, "c", Precision::F32)
        });
        assert_eq!(steps(&on_program(&[merge], &g)), steps(&on_program(&[], &g)));
    }
}
