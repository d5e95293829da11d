//! The memory plan: every place of the arena gets an offset such that places which live at the same time do not
//! overlap; the arena's size is the largest end.
//!
//! The largest place is put first, each into the smallest gap that holds it among those that live when it does
//! (the offline bin packing that TVM, TFLite and tinygrad use; within a few percent of the peak of live bytes on
//! the programs here). Offsets are multiples of 64 bytes, a cache line.

use crate::check::lifetimes;
use crate::program::{Place, Program};

const ALIGN: usize = 64;

/// Drops places that nothing uses and gives the others their offsets.
pub(crate) fn plan(program: &mut Program) {
    drop_unused(program);
    let life = lifetimes(program);
    let mut todo: Vec<(usize, usize, usize, usize)> = Vec::new(); // bytes, first, last, place
    for (place, l) in life.iter().enumerate() {
        if let (Some((first, last)), Place::Arena { bytes, .. }) = (l, &program.places[place]) {
            todo.push((bytes.next_multiple_of(ALIGN), *first, *last, place));
        }
    }
    todo.sort_unstable_by_key(|&(bytes, first, _, place)| (std::cmp::Reverse(bytes), first, place));
    // Placed so far by offset: (offset, end, first, last).
    let mut placed: Vec<(usize, usize, usize, usize)> = Vec::new();
    program.arena_bytes = 0;
    for (bytes, first, last, place) in todo {
        let (mut best, mut end_so_far) = (None::<(usize, usize)>, 0);
        for &(offset, end, ..) in placed.iter().filter(|p| p.2 <= last && first <= p.3) {
            let gap = offset.saturating_sub(end_so_far);
            if gap >= bytes && best.is_none_or(|(size, _)| gap < size) {
                best = Some((gap, end_so_far));
            }
            end_so_far = end_so_far.max(end);
        }
        let at = best.map_or(end_so_far, |(_, at)| at);
        let slot = placed.partition_point(|p| p.0 <= at);
        placed.insert(slot, (at, at + bytes, first, last));
        program.arena_bytes = program.arena_bytes.max(at + bytes);
        if let Place::Arena { offset, .. } = &mut program.places[place] {
            *offset = at;
        }
    }
}

fn drop_unused(program: &mut Program) {
    let mut used = vec![false; program.places.len()];
    let operands = program.steps.iter().flat_map(|s| s.ins.iter().chain(&s.outs));
    operands.chain(program.outputs.iter().map(|(_, o)| o)).for_each(|o| used[o.place] = true);
    let mut next = 0;
    let mut name = Vec::with_capacity(used.len());
    for &u in &used {
        name.push(next);
        next += usize::from(u);
    }
    let mut keep = used.iter();
    program.places.retain(|_| keep.next() == Some(&true));
    for s in &mut program.steps {
        s.ins.iter_mut().chain(&mut s.outs).for_each(|o| o.place = name[o.place]);
    }
    program.outputs.iter_mut().for_each(|(_, o)| o.place = name[o.place]);
}

#[cfg(test)]
mod tests {
    use super::super::testing::{graph, on_program};
    use super::*;
    use crate::check;
    use sparsam_ir::DType;

    #[test]
    fn a_chain_needs_two_places_and_results_stay() {
        let g = graph(|t| (0..10).fold(t.input("x", &[100], DType::F32), |x, _| x.tanh()));
        let p = on_program(&[plan], &g);
        assert_eq!(p.arena_bytes, 2 * 448); // 400 bytes, up to whole cache lines
        check::check(&p, true).unwrap();
        let t = sparsam_ir::Trace::new();
        let x = t.input("x", &[100], DType::F32);
        let (a, b) = (x.exp(), x.neg());
        let p = on_program(&[plan], &t.finish(&[("a", &a), ("b", &b), ("c", &b.sin().cos())]).unwrap());
        assert!(p.arena_bytes >= 3 * 448);
        check::check(&p, true).unwrap();
    }

    #[test]
    fn places_that_meet_are_refused() {
        let g = graph(|t| {
            let x = t.input("x", &[16], DType::F32);
            x.exp() + x.neg()
        });
        let mut p = on_program(&[plan], &g);
        check::check(&p, true).unwrap();
        for place in &mut p.places {
            if let Place::Arena { offset, .. } = place {
                *offset = 0;
            }
        }
        assert!(check::check(&p, true).unwrap_err().contains("at the same time"));
    }

    #[test]
    fn gaps_are_filled() {
        // A large value between two small ones that outlive it.
        let g = graph(|t| {
            let small = t.input("x", &[4, 1], DType::F32).exp();
            let large = small.broadcast_to(&[4, 64]).neg();
            let sum = large.sum(&[1]);
            let again = sum.broadcast_to(&[4, 64]).neg().sum(&[1]);
            again + small
        });
        let p = on_program(&[plan], &g);
        assert!(p.arena_bytes <= 4 * 64 * 4 + 3 * 64, "{}", p.arena_bytes);
    }
}
