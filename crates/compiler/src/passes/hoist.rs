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
//! common norm), it stays. Where a gradient is summed over processes, the update leaves that sum some time: it stands
//! behind the start of later sums of [`BESIDE`] bytes.

use crate::program::{Kernel, Program, Step};

/// Bytes of later gradients whose sums over processes are started before an update waits for one: about a layer of GPT-2
/// 124M (28 MB), so that a sum has the time in which a layer's gradients are made. So much more lives at once.
const BESIDE: usize = 32 << 20;

/// Moves state writes up.
pub(crate) fn hoist(program: &mut Program) {
    let writes = |program: &Program, step: &Step| {
        step.row().is_some() && step.outs.iter().all(|o| !program.is_temp(o.place))
    };
    move_up(program, writes);
}

/// Moves the steps that `moves` accepts up to just behind what they wait for, one after the other.
pub(super) fn move_up(program: &mut Program, moves: impl Fn(&Program, &Step) -> bool) {
    let mut order: Vec<Step> = Vec::with_capacity(program.steps.len());
    for step in std::mem::take(&mut program.steps) {
        let at = match moves(program, &step) {
            true => beside_sums(&order, &step),
            false => order.len(),
        };
        order.insert(at, step);
    }
    program.steps = order;
}

/// The first place in `order` at which `step` may stand without waiting for a sum over processes that has just begun.
fn beside_sums(order: &[Step], step: &Step) -> usize {
    let first = order.iter().rposition(|before| conflict(before, step)).map_or(0, |i| i + 1);
    let sum = |s: &Step| s.kernel == Kernel::AllReduce;
    let reads = |s: &Step| s.outs.iter().any(|o| step.ins.iter().any(|i| i.place == o.place));
    let Some(last) = order.iter().rposition(|s| sum(s) && reads(s)) else { return first };
    if sum(step) {
        return first;
    }
    let mut begun = 0;
    for (i, s) in order.iter().enumerate().skip(last + 1) {
        if i >= first && begun >= BESIDE {
            return i;
        }
        begun += if sum(s) { s.outs[0].bytes() } else { 0 };
    }
    order.len()
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
    use super::super::testing::{on_program, three_layers};
    use super::*;
    use sparsam_ir::{DType, Trace};

    /// Three layers and their updates, with or without a common factor of all gradients.
    fn program(clip: bool, passes: &[fn(&mut Program)]) -> Program {
        let t = Trace::new().training(|_| true);
        let (loss, parameters, mut gradients) = three_layers(&t);
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
    fn an_update_leaves_the_sum_of_its_gradient_some_time() {
        let t = Trace::new().training(|_| true);
        let n = BESIDE / 4 / 2;
        let gradient = |i: usize| t.input(&format!("x{i}"), &[1, n], DType::F32).exp().all_reduce();
        let gradients: Vec<_> = (0..6).map(gradient).collect();
        for (i, g) in gradients.iter().enumerate() {
            let w = t.weight(&i.to_string(), &[1, n]);
            w.assign(&(&w - g));
        }
        let mut p = crate::lower::lower(&t.finish(&[]).unwrap(), None).unwrap();
        [fuse, super::super::overlap::overlap, hoist].into_iter().for_each(|pass| pass(&mut p));
        let shown: String = p
            .steps
            .iter()
            .map(|s| match s.kernel {
                Kernel::AllReduce => 's',
                _ if p.is_temp(s.outs[0].place) => 'g',
                _ => 'u',
            })
            .collect();
        // Two sums of half of it each are begun behind one before its update waits for it.
        assert_eq!(shown, "gsgsgsugsugsugsuuu", "{p}");
    }

    #[test]
    fn what_waits_for_all_gradients_stays() {
        let text = |p: &Program| super::super::testing::steps(p);
        assert_eq!(text(&program(true, &[fuse, hoist])), text(&program(true, &[fuse])));
    }
}
