//! Steps move down to just before the first that reads them, where that shortens what lives in memory: a result
//! larger than the operands that would have to wait for it. Before:
//!
//! ```text
//! row [8, 64]: large <- small
//! matmul: other <- ..
//! row [8, 64]: sum <- large other
//! ```
//!
//! and after, `large` is made behind the matmul. State writes stay where they are, and nothing passes a write of what
//! it reads.

use crate::program::Program;

/// Moves steps towards their readers.
pub(crate) fn schedule(program: &mut Program) {
    let n = program.steps.len();
    let places = program.places.len();
    let (mut readers, mut writers) = (vec![Vec::new(); places], vec![Vec::new(); places]);
    for (i, s) in program.steps.iter().enumerate() {
        s.ins.iter().for_each(|o| readers[o.place].push(i));
        s.outs.iter().for_each(|o| writers[o.place].push(i));
    }
    let kept = program.kept();
    // Step of the old order behind which each stands now (its own place, or that of the reader it went to), and
    // what stands before each.
    let mut stands: Vec<usize> = (0..n).collect();
    let mut before: Vec<Vec<usize>> = vec![Vec::new(); n];
    let mut moved = vec![false; n];
    for (i, s) in program.steps.iter().enumerate().rev() {
        if s.outs.iter().any(|o| !program.is_temp(o.place) || writers[o.place].len() != 1) {
            continue;
        }
        let mut reading: Vec<usize> = s.outs.iter().flat_map(|o| readers[o.place].iter().copied()).collect();
        reading.sort_unstable();
        reading.dedup();
        let Some(&to) = reading.iter().min_by_key(|&&r| stands[r]) else { continue };
        // Two readers at one place stand in an order that is not this list's to know.
        if reading.iter().filter(|&&r| stands[r] == stands[to]).count() != 1 || stands[to] == i + 1 {
            continue;
        }
        let until = stands[to];
        let overwritten = |p: usize| writers[p].iter().any(|&w| i < w && w <= until);
        if s.ins.iter().any(|o| overwritten(o.place)) {
            continue;
        }
        let made: usize = s.outs.iter().map(|o| o.bytes()).sum();
        let waiting: usize = s
            .ins
            .iter()
            .filter(|o| program.is_temp(o.place) && !kept[o.place])
            .filter(|o| readers[o.place].iter().all(|&r| r <= i || stands[r] < until))
            .map(|o| o.bytes())
            .sum();
        if waiting < made {
            stands[i] = until;
            before[to].push(i);
            moved[i] = true;
        }
    }
    let mut steps: Vec<_> = std::mem::take(&mut program.steps).into_iter().map(Some).collect();
    let mut order = Vec::with_capacity(n);
    let mut stack: Vec<(usize, bool)> = (0..n).rev().filter(|&i| !moved[i]).map(|i| (i, false)).collect();
    while let Some((i, ready)) = stack.pop() {
        if ready {
            order.push(i);
        } else {
            stack.push((i, true));
            // Pushed in falling order, as the loop above found them: the smallest comes off first.
            stack.extend(before[i].iter().map(|&b| (b, false)));
        }
    }
    program.steps = order.into_iter().filter_map(|i| steps[i].take()).collect();
}

#[cfg(test)]
mod tests {
    use super::super::plan::plan;
    use super::super::testing::{on_program, steps};
    use super::*;
    use sparsam_ir::{DType, Trace};

    /// `big` is made early and read late; `small` likewise, but waiting for it would keep `big` alive.
    #[test]
    fn a_large_result_of_small_operands_waits() {
        let t = Trace::new();
        let a = t.input("a", &[8, 1], DType::F32).exp();
        let big = a.broadcast_to(&[8, 64]).exp();
        let small = t.input("b", &[8, 256], DType::F32).exp().sum(&[1]);
        let w = t.input("c", &[64, 64], DType::F32);
        let late = t.input("d", &[8, 64], DType::F32).matmul(&w);
        let g = t.finish(&[("y", &(&late + &big + &small))]).unwrap();
        let before = on_program(&[plan], &g);
        let after = on_program(&[schedule, plan], &g);
        let order = |p: &Program| p.steps.iter().map(|s| s.nodes[0].0).collect::<Vec<_>>();
        let at = |p: &Program, node| order(p).iter().position(|&n| n == node).unwrap();
        let (big, product, small) = (big.id().unwrap().0, late.id().unwrap().0, small.id().unwrap().0);
        assert!(at(&before, big) < at(&before, product), "{}", steps(&before));
        assert!(at(&after, big) > at(&after, product), "{}", steps(&after));
        assert!(at(&after, small) < at(&after, product), "{}", steps(&after));
        assert!(after.arena_bytes < before.arena_bytes);
    }

    #[test]
    fn nothing_passes_a_write_of_what_it_reads() {
        let t = Trace::new();
        let s = t.state("s", &[2], DType::F32);
        let old = s.reshape(&[2, 1]).broadcast_to(&[2, 9]).exp();
        let new = s.assign(&t.input("x", &[2], DType::F32));
        let y = old + new.reshape(&[2, 1]);
        let g = t.finish(&[("y", &y)]).unwrap();
        assert_eq!(steps(&on_program(&[schedule], &g)), steps(&on_program(&[], &g)));
    }
}
