//! What a row program keeps for later row programs over the same rows shrinks to what the rest can be computed from
//! again. Before, for the gradient of a GELU that comes long after it:
//!
//! ```text
//! row: y square inner tanh <- x            five values written, four of them for the gradient
//! ..
//! row: dx <- dy x square inner tanh
//! ```
//!
//! and after:
//!
//! ```text
//! row: y <- x
//! ..
//! row: dx <- dy x                          square, inner and tanh are computed again
//! ```
//!
//! Of all ways to choose what is kept, the cheapest: a minimum cut of the program's values between what it loads and
//! what is wanted later (as in Chen et al. 2016 and PyTorch's min-cut partitioner), where keeping a value costs its
//! bytes and computing it again a share of a wide value's bytes ([`again`]). Values that live on anyway, inputs and
//! weights cost nothing.

use super::fuse::{MOST_INPUTS, MOST_INSTRS, MOST_OUTPUTS, append};
use crate::program::{Instr, Kernel, Operand, Place, Program, RowProgram, Step, Store, Val};
use crate::rows::{Builder, Points, points};
use sparsam_ir::{Binary, DType, Layout, Unary};

/// Programs whose values take less than this (bytes) stay: nothing is won.
const SMALL: usize = 1 << 10;

/// Shrinks what row programs keep for later ones.
pub(crate) fn thin(program: &mut Program) {
    let mut uses = Uses::of(program);
    for i in 0..program.steps.len() {
        if let Some(change) = change(program, &uses, i) {
            program.places.extend(change.places);
            for (at, step) in change.steps {
                program.steps[at] = step;
            }
            uses = Uses::of(program);
        }
    }
}

/// Which steps read and write each place, and what is a result.
struct Uses {
    readers: Vec<Vec<usize>>,
    writers: Vec<Vec<usize>>,
    kept: Vec<bool>,
}

impl Uses {
    fn of(program: &Program) -> Uses {
        let n = program.places.len();
        let (mut readers, mut writers) = (vec![Vec::new(); n], vec![Vec::new(); n]);
        for (i, s) in program.steps.iter().enumerate() {
            s.ins.iter().for_each(|o| readers[o.place].push(i));
            s.outs.iter().for_each(|o| writers[o.place].push(i));
        }
        Uses { readers, writers, kept: program.kept() }
    }
}

struct Change {
    places: Vec<Place>,
    steps: Vec<(usize, Step)>,
}

/// Bytes that computing an instruction again is worth, for a wide value of `wide` bytes: about what passes through
/// memory in the same time. A product is free beside the loads; a reduction is one more pass over the tile.
fn again(instr: &Instr, wide: usize) -> usize {
    match instr {
        Instr::Load { .. } | Instr::Const(_) | Instr::Iota { .. } => 0,
        Instr::Unary(Unary::Neg | Unary::Abs | Unary::Floor, _) | Instr::Select(..) | Instr::Round(..) => {
            wide / 128
        }
        Instr::Binary(Binary::Div, ..) | Instr::Unary(Unary::Recip | Unary::Sqrt, _) => wide / 32,
        Instr::Binary(..) => wide / 128,
        Instr::Unary(..) => wide / 12,
        Instr::Reduce(..) => wide / 12,
        Instr::Random { .. } => wide,
    }
}

/// How step `i` and the programs that read it can do with less.
fn change(program: &Program, uses: &Uses, i: usize) -> Option<Change> {
    let step = &program.steps[i];
    let p = step.row()?;
    let wide = p.shape.iter().product::<usize>() * 4;
    if wide < SMALL {
        return None;
    }
    let narrow = p.narrow(&step.ins);
    let size = |v: Val| if narrow[v as usize] { wide / p.width() } else { wide };

    // Values that only row programs over the same rows read, and those programs.
    let mut wanted: Vec<(usize, Val)> = Vec::new(); // output, value
    let mut programs: Vec<usize> = Vec::new();
    for &(out, v, how) in &p.stores {
        let o = &step.outs[out];
        let own = program.is_temp(o.place) && !uses.kept[o.place] && uses.writers[o.place] == [i];
        let readers = &uses.readers[o.place];
        if own
            && how == Store::Rows
            && o.dtype == DType::F32
            && readers.iter().all(|&j| j > i && same_rows(p, o, v, &program.steps[j]))
        {
            wanted.push((out, v));
            readers.iter().for_each(|j| {
                if !programs.contains(j) {
                    programs.push(*j);
                }
            });
        }
    }
    if wanted.len() < 2 {
        return None;
    }
    let last = *programs.iter().max()?;

    // What keeping each value until then costs.
    let lives = |place: usize| uses.readers[place].iter().any(|&r| r >= last);
    let changes = |place: usize| uses.writers[place].iter().any(|&w| i <= w && w <= last);
    let never = usize::MAX / 4;
    let keep: Vec<usize> = (0..p.instrs.len())
        .map(|v| {
            let stored = p.stores.iter().filter(|s| s.1 == v as Val && s.2 == Store::Rows);
            let lives_anyway = stored.map(|s| &step.outs[s.0]).any(|o| {
                let whole = o.layout.is_contiguous() && o.layout.offset == 0 && o.dtype == DType::F32;
                program.is_temp(o.place)
                    && whole
                    && uses.writers[o.place] == [i]
                    && lives(o.place)
                    && !wanted.iter().any(|w| step.outs[w.0].place == o.place)
            });
            match &p.instrs[v] {
                _ if lives_anyway => 0,
                Instr::Const(_) | Instr::Iota { .. } => 0,
                Instr::Load { input } => {
                    let o = &step.ins[*input];
                    match program.places[o.place] {
                        _ if changes(o.place) => never,
                        Place::Arena { .. } if !lives(o.place) => o.bytes(),
                        _ => 0,
                    }
                }
                // One byte more than loading the same.
                _ => size(v as Val) + 1,
            }
        })
        .collect();
    let targets: Vec<Val> = wanted.iter().map(|w| w.1).collect();
    let work = |v: usize| match p.instrs[v] {
        Instr::Reduce(_, of) => size(of),
        _ => size(v as Val),
    };
    let cut = minimum_cut(p, &keep, &targets, |v| again(&p.instrs[v], work(v)));
    let before: usize = targets.iter().map(|&v| size(v)).sum();
    let after: usize = cut.iter().map(|&v| keep[v as usize]).sum();
    if after + wide / 2 > before {
        return None;
    }
    build(program, i, &wanted, &cut, &programs)
}

/// Whether `reader` is a row program over the rows of `p`, reading its output `o` (value `v`) row by row.
fn same_rows(p: &RowProgram, o: &Operand, v: Val, reader: &Step) -> bool {
    reader.row().is_some_and(|q| q.shape == p.shape)
        && reader.ins.iter().enumerate().filter(|(_, i)| i.place == o.place).all(|(k, i)| {
            let load = |q: &RowProgram| q.instrs.contains(&Instr::Load { input: k });
            let here = points(p, &o.layout, &i.layout, v);
            i.dtype == DType::F32
                && reader.row().is_some_and(load)
                && matches!(here, Some(at @ Points::Rows(_)) if at.is_identity(&p.shape))
        })
}

fn build(
    program: &Program,
    i: usize,
    wanted: &[(usize, Val)],
    cut: &[Val],
    programs: &[usize],
) -> Option<Change> {
    let step = &program.steps[i];
    let p = step.row()?;
    let narrow = p.narrow(&step.ins);
    let lead = p.shape.len() - 1;
    let mut places = Vec::new();
    // The program as later ones see it: values of the cut are loaded.
    let mut seen = step.clone();
    let mut instrs = p.instrs.clone();
    let mut new: Vec<(Operand, Val)> = Vec::new();
    for &v in cut.iter().filter(|v| {
        !matches!(p.instrs[**v as usize], Instr::Load { .. } | Instr::Const(_) | Instr::Iota { .. })
    }) {
        let stored =
            p.stores.iter().find(|s| s.1 == v && s.2 == Store::Rows && program.is_temp(step.outs[s.0].place));
        let stored = stored.map(|s| step.outs[s.0].clone());
        let o = stored.filter(|o| o.dtype == DType::F32 && o.layout.is_contiguous() && o.layout.offset == 0);
        let o = o.unwrap_or_else(|| {
            let mut shape = p.shape.clone();
            if narrow[v as usize] {
                shape[lead] = 1;
            }
            let layout = Layout::contiguous(&shape);
            let place = program.places.len() + places.len();
            places.push(Place::Arena { offset: 0, bytes: layout.numel() * 4 });
            let o = Operand { place, dtype: DType::F32, layout };
            new.push((o.clone(), v));
            o
        });
        let mut layout = o.layout.clone();
        if narrow[v as usize] {
            layout.shape[lead] = p.width();
            layout.strides[lead] = 0;
        }
        instrs[v as usize] = Instr::Load { input: seen.ins.len() };
        seen.ins.push(Operand { layout, ..o });
    }
    let whole = Points::Rows(Layout::contiguous(&p.shape[..lead]));
    let loads = RowProgram { shape: p.shape.clone(), instrs, stores: p.stores.clone() };

    let mut steps = Vec::new();
    for &j in programs {
        let reader = &program.steps[j];
        let q = reader.row()?;
        let mut b = Builder::new(&q.shape);
        let value = |o: &Operand| wanted.iter().find(|w| step.outs[w.0].place == o.place).map(|w| w.1);
        let vals = b.embed(&seen, &loads, reader.ins.iter().filter_map(value), &whole, &|_| None)?;
        let replaced: Vec<Option<Val>> =
            reader.ins.iter().map(|o| value(o).and_then(|v| vals[v as usize])).collect();
        append(&mut b, reader, q, &|k| replaced[k])?;
        steps.push((j, fitting(b, reader)?));
    }
    // And the program itself: without what nobody loads any more.
    let mut first = step.clone();
    let dropped = |out: usize| wanted.iter().any(|w| w.0 == out && !cut.contains(&w.1));
    let kept: Vec<usize> = (0..step.outs.len()).filter(|&out| !dropped(out)).collect();
    first.outs = kept.iter().map(|&out| step.outs[out].clone()).collect();
    let renamed = |s: &(usize, Val, Store)| kept.iter().position(|&out| out == s.0).map(|at| (at, s.1, s.2));
    let mut stores: Vec<_> = p.stores.iter().filter_map(renamed).collect();
    for (o, v) in new {
        stores.push((first.outs.len(), v, Store::Rows));
        first.outs.push(o);
    }
    let q = RowProgram { stores, ..p.clone() };
    first.kernel = Kernel::Row(q.clone());
    let mut b = Builder::new(&q.shape);
    append(&mut b, &first, &q, &|_| None)?;
    steps.push((i, fitting(b, &first)?));
    Some(Change { places, steps })
}

/// The finished program, if it is not too long and what it reads and writes in one place lies at the same points.
fn fitting(b: Builder, like: &Step) -> Option<Step> {
    let step = b.finish(like.nodes.clone())?;
    let small = step.row()?.instrs.len() <= MOST_INSTRS
        && step.ins.len() <= MOST_INPUTS
        && step.outs.len() <= MOST_OUTPUTS;
    let apart = |out: &Operand| step.ins.iter().all(|o| o.place != out.place || o.layout == out.layout);
    (small && step.outs.iter().all(apart)).then_some(step)
}

/// The values to keep so that all `targets` can be computed from them: the least sum of what keeping (`keep`) and
/// computing again cost, by the largest flow (Edmonds and Karp 1972) from what the program loads to the targets.
fn minimum_cut(p: &RowProgram, keep: &[usize], targets: &[Val], again: impl Fn(usize) -> usize) -> Vec<Val> {
    // Vertices 2v and 2v + 1 are a value before and behind the question whether it is kept.
    let n = p.instrs.len();
    let (source, sink) = (2 * n, 2 * n + 1);
    let mut flow = Flow { edges: Vec::new(), from: vec![Vec::new(); 2 * n + 2] };
    let endless = usize::MAX / 2;
    let needed = crate::rows::closure(p, targets.iter().copied());
    for (v, instr) in p.instrs.iter().enumerate().filter(|(v, _)| needed[*v]) {
        flow.edge(2 * v, 2 * v + 1, keep[v]);
        let leaf = matches!(instr, Instr::Load { .. } | Instr::Random { .. });
        flow.edge(source, 2 * v, if leaf { endless } else { again(v) });
        instr.operands().for_each(|o| flow.edge(2 * o as usize + 1, 2 * v, endless));
    }
    targets.iter().for_each(|&v| flow.edge(2 * v as usize + 1, sink, endless));
    while flow.push(source, sink) {}
    let reached = flow.reached(source);
    (0..n).filter(|&v| needed[v] && reached[2 * v] && !reached[2 * v + 1]).map(|v| v as Val).collect()
}

/// A network: edge `e` and its reverse `e ^ 1` with what they can still carry.
struct Flow {
    edges: Vec<(usize, usize)>,
    from: Vec<Vec<usize>>,
}

impl Flow {
    fn edge(&mut self, a: usize, b: usize, capacity: usize) {
        self.from[a].push(self.edges.len());
        self.edges.push((b, capacity));
        self.from[b].push(self.edges.len());
        self.edges.push((a, 0));
    }

    /// For each vertex, the edge by which it was first reached; `None` where it was not.
    fn search(&self, source: usize) -> Vec<Option<usize>> {
        let mut by = vec![None; self.from.len()];
        let mut queue = std::collections::VecDeque::from([source]);
        while let Some(a) = queue.pop_front() {
            for &e in &self.from[a] {
                let (b, left) = self.edges[e];
                if left > 0 && b != source && by[b].is_none() {
                    by[b] = Some(e);
                    queue.push_back(b);
                }
            }
        }
        by
    }

    fn reached(&self, source: usize) -> Vec<bool> {
        self.search(source).iter().enumerate().map(|(v, by)| v == source || by.is_some()).collect()
    }

    /// Sends as much as fits along a shortest way; `false` if there is none.
    fn push(&mut self, source: usize, sink: usize) -> bool {
        let by = self.search(source);
        let (mut way, mut at) = (Vec::new(), sink);
        while at != source {
            let Some(e) = by[at] else { return false };
            way.push(e);
            at = self.edges[e ^ 1].0;
        }
        let most = way.iter().map(|&e| self.edges[e].1).min().unwrap_or(0);
        for e in way {
            self.edges[e].1 -= most;
            self.edges[e ^ 1].1 += most;
        }
        most > 0
    }
}

#[cfg(test)]
mod tests {
    use super::super::fuse::fuse;
    use super::super::plan::plan;
    use super::super::testing::{graph, on_program};
    use super::*;
    use sparsam_ir::{Graph, Tensor, Trace, grad};

    /// `f` between two products, and its gradient.
    fn between(f: impl Fn(&Trace, &Tensor) -> Tensor) -> Graph {
        let t = Trace::new().training(|name| name != "second");
        let w = t.weight("first", &[8, 64]);
        let x = t.input("x", &[16, 8], DType::F32).matmul(&w);
        let y = f(&t, &x).matmul(&t.weight("second", &[64, 8]));
        let loss = y.tanh().sum(&[0, 1]);
        let parameters = t.parameters();
        let grads = grad(&loss, &parameters.iter().map(|(_, p)| p).collect::<Vec<_>>());
        let names: Vec<String> = parameters.iter().map(|(name, _)| format!("d {name}")).collect();
        let mut outputs = vec![("loss", &loss)];
        outputs.extend(names.iter().map(String::as_str).zip(&grads));
        super::super::cse::cse(&super::super::dce::dce(&t.finish(&outputs).unwrap()))
    }

    /// Values of 16 x 64 numbers that row programs store.
    fn stored(p: &Program) -> usize {
        let rows = p.steps.iter().filter(|s| s.row().is_some());
        rows.flat_map(|s| &s.outs).filter(|o| o.layout.numel() == 16 * 64).count()
    }

    #[test]
    fn a_gelu_keeps_its_operand_only() {
        let g = between(|_, x| x.gelu_tanh());
        let (before, after) = (on_program(&[fuse, plan], &g), on_program(&[fuse, thin, plan], &g));
        assert!(stored(&before) > 3, "{before}");
        assert_eq!(stored(&after), 2, "{after}"); // the result and its gradient
        assert!(after.arena_bytes < before.arena_bytes);
    }

    #[test]
    fn a_norm_keeps_its_operand_and_numbers_a_row() {
        let g = between(|t, x| {
            let centred = x - x.mean();
            let scale = (&centred * &centred).mean().add_scalar(1e-5).sqrt().recip();
            centred * scale * t.weight("norm", &[64])
        });
        let p = on_program(&[fuse, thin], &g);
        // Centred or not, the result, and its gradient.
        assert_eq!((stored(&on_program(&[fuse], &g)), stored(&p)), (4, 3), "{p}");
        // Nothing is summed twice.
        let sums = |p: &Program| {
            let programs = p.steps.iter().filter_map(Step::row);
            programs.flat_map(|p| &p.instrs).filter(|i| matches!(i, Instr::Reduce(..))).count()
        };
        assert_eq!(sums(&p), sums(&on_program(&[fuse], &g)), "{p}");
    }

    #[test]
    fn what_is_read_once_or_by_others_stays() {
        let twice = graph(|t| {
            let x = t.input("x", &[16, 64], DType::F32).exp();
            let w = t.input("w", &[64, 64], DType::F32);
            let (a, b) = (x.sin(), x.cos());
            a.matmul(&w) + b.matmul(&w)
        });
        let text = |p: &Program| super::super::testing::steps(p);
        assert_eq!(text(&on_program(&[fuse, thin], &twice)), text(&on_program(&[fuse], &twice)));
    }
}
