//! Sums over processes begin as soon as what they sum is there, so that they run beside the rest of the backward pass.
//! Before:
//!
//! ```text
//! matmul f32: p1[8, 8] <- ..     gradient of the last layer
//! matmul f32: p2[8, 8] <- ..     gradient of the first layer
//! all_reduce: p3[8, 8] <- p1[8, 8]
//! all_reduce: p4[8, 8] <- p2[8, 8]
//! ```
//!
//! and after, each stands just behind its product. With it moves what adds a gradient to the state that is summed. The
//! order follows from the program alone, so that it is the same in all processes that compile the same graph.

use super::hoist::move_up;
use crate::program::{Kernel, Program, Step};

/// Moves sums over processes up.
pub(crate) fn overlap(program: &mut Program) {
    let mut summed = vec![false; program.places.len()];
    for s in program.steps.iter().filter(|s| s.kernel == Kernel::AllReduce) {
        s.ins.iter().for_each(|o| summed[o.place] = true);
    }
    if !summed.contains(&true) {
        return;
    }
    let sums = |program: &Program, s: &Step| {
        let into = s.outs.iter().all(|o| !program.is_temp(o.place) && summed[o.place]);
        s.kernel == Kernel::AllReduce || (s.row().is_some() && into)
    };
    move_up(program, sums);
}

#[cfg(test)]
mod tests {
    use super::super::fuse::fuse;
    use super::super::hoist::hoist;
    use super::super::plan::plan;
    use super::super::schedule::schedule;
    use super::super::testing::{on_program, three_layers};
    use super::*;
    use sparsam_ir::{DType, Trace};

    /// Three layers and their gradients' sums, kept in states if `accumulated`; updates, if not.
    fn program(accumulated: bool, passes: &[fn(&mut Program)]) -> Program {
        let t = Trace::new().training(|_| true);
        let (loss, parameters, gradients) = three_layers(&t);
        if accumulated {
            for ((name, _), g) in parameters.iter().zip(&gradients) {
                let sum = t.state(&format!("grad.{name}"), &[8, 8], DType::F32);
                let sum = sum.assign(&(&sum + g));
                sum.assign(&sum.all_reduce());
            }
        } else {
            let sums: Vec<_> = gradients.iter().map(|g| g.all_reduce()).collect();
            parameters.iter().zip(&sums).for_each(|((_, p), g)| _ = p.assign(&(p - g.mul_scalar(0.1))));
        }
        on_program(passes, &super::super::dce::dce(&t.finish(&[("loss", &loss)]).unwrap()))
    }

    /// `s` for a sum over processes, `p` for a product, `.` for the rest.
    fn order(p: &Program) -> String {
        let name = |s: &Step| match s.kernel {
            Kernel::AllReduce => 's',
            Kernel::Matmul { .. } => 'p',
            _ => '.',
        };
        p.steps.iter().map(name).filter(|c| *c != '.').collect()
    }

    #[test]
    fn sums_begin_beside_the_backward_pass() {
        for accumulated in [false, true] {
            let before = program(accumulated, &[fuse, schedule, hoist, plan]);
            assert!(order(&before).starts_with("pppppp"), "{before}");
            let after = program(accumulated, &[fuse, overlap, schedule, hoist, plan]);
            // Forward; then a layer's gradient and what goes on to the layer below it.
            assert_eq!(order(&after), "pppppsppsps", "{after}");
        }
    }

    #[test]
    fn a_state_that_is_summed_is_not_copied() {
        let p = program(true, &[fuse, overlap, schedule, hoist, plan]);
        let sums: Vec<&Step> = p.steps.iter().filter(|s| s.kernel == Kernel::AllReduce).collect();
        assert!(
            sums.len() == 3 && sums.iter().all(|s| s.ins == s.outs && !p.is_temp(s.outs[0].place)),
            "{p}"
        );
    }

    #[test]
    fn a_sum_that_others_read_has_its_own_place() {
        let g = super::super::testing::graph(|t| {
            let sum = t.input("x", &[4], DType::F32).all_reduce();
            let state = t.state("s", &[4], DType::F32);
            state.assign(&sum).assign(&sum.neg());
            sum
        });
        let p = on_program(&[fuse, overlap, schedule, hoist, plan], &g);
        let sums: Vec<&Step> = p.steps.iter().filter(|s| s.kernel == Kernel::AllReduce).collect();
        assert!(sums.len() == 1 && p.is_temp(sums[0].outs[0].place), "{p}");
    }

    #[test]
    fn without_sums_nothing_moves() {
        let g = super::super::testing::graph(|t| {
            let x = t.input("x", &[4], DType::F32);
            t.state("s", &[4], DType::F32).assign(&x.exp());
            x.neg().sin()
        });
        let text = |passes: &[fn(&mut Program)]| super::super::testing::steps(&on_program(passes, &g));
        assert_eq!(text(&[overlap]), text(&[]));
    }
}
