//! Steps that write states and nothing else (an optimiser's) move up to just behind what they wait for, so that each
//! gradient is consumed as it comes and not all of them live at once. Before:
//!
//! ```text
//! matmul: p1 <- dy x        gradient of w
//! matmul: p2 <- dy w
//! ..                        the rest of the backward pass
//! row: w m <- w m p1
//! ```
//!
//! and after, the update stands behind the last step that reads `w`. Where the update waits for all gradients (their
//! common norm), it stays.

use crate::program::{Program, Step};

/// Moves state writes up.
pub(crate) fn hoist(program: &mut Program) {
    let mut order: Vec<Step> = Vec::with_capacity(program.steps.len());
    for step in std::mem::take(&mut program.steps) {
        let moves = step.row().is_some() && step.outs.iter().all(|o| !program.is_temp(o.place));
        let at = match moves {
            true => order.iter().rposition(|before| conflict(before, &step)).map_or(0, |i| i + 1),
            false => order.len(),
        };
        order.insert(at, step);
    }
    program.steps = order;
}

/// Whether `later` cannot pass `before`.
fn conflict(before: &Step, later: &Step) -> bool {
    let touches = |places: &[crate::Operand], o: &crate::Operand| places.iter().any(|p| p.place == o.place);
    before.outs.iter().any(|o| touches(&later.ins, o) || touches(&later.outs, o))
        || before.ins.iter().any(|o| touches(&later.outs, o))
}

#[cfg(test)]
mod tests {
    use super::super::fuse::fuse;
    use super::super::plan::plan;
    use super::super::testing::on_program;
    use super::*;
    use sparsam_ir::{DType, Trace, grad};

    /// Three layers and their updates, with or without a common factor of all gradients.
    fn program(clip: bool, passes: &[fn(&mut Program)]) -> Program {
        let t = Trace::new().training(|_| true);
        let mut x = t.input("x", &[2, 8], DType::F32);
        for layer in ["a", "b", "c"] {
            x = x.matmul(&t.weight(layer, &[8, 8])).tanh();
        }
        let loss = x.sum(&[0, 1]);
        let parameters = t.parameters();
        let mut gradients = grad(&loss, &parameters.iter().map(|(_, p)| p).collect::<Vec<_>>());
        if clip {
            let norm = gradients.iter().map(|g| (g * g).sum(&[0, 1])).reduce(|a, b| a + b).unwrap().sqrt();
            gradients = gradients.iter().map(|g| g / &norm).collect();
        }
        for ((name, p), g) in parameters.iter().zip(&gradients) {
            let m = t.state(&format!("m.{name}"), &[8, 8], DType::F32);
            let m = m.assign(&(m.mul_scalar(0.9) + g));
            p.assign(&(p - m.mul_scalar(0.1)));
        }
        on_program(passes, &super::super::dce::dce(&t.finish(&[("loss", &loss)]).unwrap()))
    }

    #[test]
    fn gradients_are_consumed_as_they_come() {
        let (before, after) = (program(false, &[fuse, plan]), program(false, &[fuse, hoist, plan]));
        assert!(after.arena_bytes < before.arena_bytes, "{after}");
        let writes = |p: &Program| {
            let all = p.steps.iter().enumerate();
            let of = all.filter(|(_, s)| s.outs.iter().all(|o| !p.is_temp(o.place)));
            of.map(|(i, _)| p.steps.len() - i).collect::<Vec<_>>()
        };
        assert_eq!(writes(&before), [3, 2, 1]);
        assert_ne!(writes(&after), [3, 2, 1], "{after}");
    }

    #[test]
    fn what_waits_for_all_gradients_stays() {
        let text = |p: &Program| super::super::testing::steps(p);
        assert_eq!(text(&program(true, &[fuse, hoist])), text(&program(true, &[fuse])));
    }
}
