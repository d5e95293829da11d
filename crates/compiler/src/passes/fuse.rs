//! Fusion into row programs.
//!
//! A row program takes in the row programs that make what it loads (*vertical*), seen through whatever views lie
//! between: a broadcast sum of squares, one half of a rotated head, a part of a concatenation. Results that others
//! read too stay stored. Then programs over one domain that load the same operand become one (*horizontal*), with
//! several stores. Before, for `y = exp(x) + 1`:
//!
//! ```text
//! row [4, 8] {
//!   %0 = load p0[4, 8]
//!   %1 = exp %0
//!   store p1[4, 8] %1
//! }
//! row [4, 8] {
//!   %0 = load p1[4, 8]
//!   %1 = const 1
//!   %2 = add %0 %1
//!   store p2[4, 8] %2
//! }
//! ```
//!
//! and after:
//!
//! ```text
//! row [4, 8] {
//!   %0 = load p0[4, 8]
//!   %1 = exp %0
//!   %2 = const 1
//!   %3 = add %1 %2
//!   store p2[4, 8] %3
//! }
//! ```
//!
//! A producer is computed more than once only where that is cheap (a few additions and products of what is loaded
//! anyway) and moves fewer bytes; a table of sines stays stored.

use crate::program::{Instr, Program, RowProgram, Step, Store, is_narrow};
use crate::rows::{Builder, Points, as_stored, closure, points, rebase, widen};
use sparsam_ir::{Binary, Layout, Unary};

/// Instructions, inputs and outputs of one row program: kept small enough that its tiles stay in L1.
pub(super) const MOST_INSTRS: usize = 160;
pub(super) const MOST_INPUTS: usize = 20;
pub(super) const MOST_OUTPUTS: usize = 10;

/// Earlier readers of a shared operand that are tried as partners.
const PARTNERS: usize = 8;

/// Programs that move more than this (bytes) are joined only if what both load is at least one part in [`LITTLE`] of
/// what they move: below, starting a kernel costs more than the bytes.
const SMALL: usize = 256 << 10;
const LITTLE: usize = 16;

/// Fuses row programs until nothing fits any more.
pub(crate) fn fuse(program: &mut Program) {
    let mut f = Fuser::new(program);
    for j in 0..f.steps.len() {
        f.producers(j);
    }
    for j in 0..f.steps.len() {
        f.partners(j);
    }
    program.steps = f.steps.into_iter().flatten().collect();
    drop_unread(program);
}

/// Removes steps whose results nobody reads.
pub(crate) fn drop_unread(program: &mut Program) {
    let mut read = program.kept();
    let mut steps = std::mem::take(&mut program.steps);
    let mut live = vec![false; steps.len()];
    for (i, s) in steps.iter().enumerate().rev() {
        live[i] = s.outs.iter().any(|o| read[o.place] || !program.is_temp(o.place));
        if live[i] {
            s.ins.iter().for_each(|o| read[o.place] = true);
        }
    }
    let mut live = live.into_iter();
    steps.retain(|_| live.next() == Some(true));
    program.steps = steps;
}

/// What takes the place of steps `i` and `j`.
struct Merge {
    step: Step,
    /// Where it stands, `i` or `j`.
    at: usize,
    /// Whether `i` stays beside it.
    keep_first: bool,
}

struct Fuser {
    steps: Vec<Option<Step>>,
    /// Steps that read and write each place.
    readers: Vec<Vec<usize>>,
    writers: Vec<Vec<usize>>,
    /// Whether a result lies in the place.
    kept: Vec<bool>,
    temp: Vec<bool>,
}

impl Fuser {
    fn new(program: &mut Program) -> Fuser {
        let n = program.places.len();
        let mut f = Fuser {
            steps: Vec::new(),
            readers: vec![Vec::new(); n],
            writers: vec![Vec::new(); n],
            kept: program.kept(),
            temp: (0..n).map(|p| program.is_temp(p)).collect(),
        };
        for (i, s) in std::mem::take(&mut program.steps).into_iter().enumerate() {
            f.steps.push(None);
            f.put(i, Some(s));
        }
        f
    }

    /// Step `i` becomes `step`.
    fn put(&mut self, i: usize, step: Option<Step>) {
        let unlink = |list: &mut Vec<usize>| list.retain(|&s| s != i);
        if let Some(old) = self.steps[i].take() {
            old.ins.iter().for_each(|o| unlink(&mut self.readers[o.place]));
            old.outs.iter().for_each(|o| unlink(&mut self.writers[o.place]));
        }
        if let Some(new) = &step {
            let link = |list: &mut Vec<usize>| {
                if !list.contains(&i) {
                    list.push(i);
                }
            };
            new.ins.iter().for_each(|o| link(&mut self.readers[o.place]));
            new.outs.iter().for_each(|o| link(&mut self.writers[o.place]));
        }
        self.steps[i] = step;
    }

    fn apply(&mut self, i: usize, j: usize, m: Merge) -> usize {
        if !m.keep_first {
            self.put(i, None);
        }
        self.put(j, None);
        self.put(m.at, Some(m.step));
        m.at
    }

    /// Takes the producers of step `j` into it, the latest first, until none fits.
    fn producers(&mut self, mut j: usize) {
        'again: loop {
            let Some(step) = self.steps[j].as_ref().filter(|s| s.row().is_some()) else { return };
            let mut found: Vec<usize> = Vec::new();
            for o in &step.ins {
                if let [i] = self.writers[o.place][..]
                    && i < j
                    && !found.contains(&i)
                {
                    found.push(i);
                }
            }
            found.sort_unstable_by(|a, b| b.cmp(a));
            for i in found {
                if let Some(m) = self.vertical(i, j) {
                    j = self.apply(i, j, m);
                    continue 'again;
                }
            }
            return;
        }
    }

    /// Joins step `j` with earlier programs over its domain that load the same operand.
    fn partners(&mut self, mut j: usize) {
        'again: loop {
            let Some(step) = self.steps[j].as_ref().filter(|s| s.row().is_some()) else { return };
            let mut tried: Vec<usize> = Vec::new();
            for o in &step.ins {
                for &i in self.readers[o.place].iter().filter(|i| **i < j).rev().take(PARTNERS) {
                    if !tried.contains(&i) {
                        tried.push(i);
                    }
                }
            }
            tried.sort_unstable_by(|a, b| b.cmp(a));
            for i in tried {
                if let Some(m) = self.horizontal(i, j) {
                    j = self.apply(i, j, m);
                    continue 'again;
                }
            }
            return;
        }
    }

    /// Whether any step strictly between `i` and `j` is in `list`.
    fn between(list: &[usize], i: usize, j: usize) -> bool {
        list.iter().any(|&s| i < s && s < j)
    }

    /// Where the merger of `i` and `j` may stand without changing what anyone else sees.
    fn position(&self, i: usize, j: usize) -> Option<usize> {
        let (first, second) = (self.steps[i].as_ref()?, self.steps[j].as_ref()?);
        let free = |s: &Step| {
            let read_only = s.ins.iter().all(|o| !Self::between(&self.writers[o.place], i, j));
            read_only
                && s.outs.iter().all(|o| {
                    !Self::between(&self.readers[o.place], i, j)
                        && (self.temp[o.place] || !Self::between(&self.writers[o.place], i, j))
                })
        };
        if free(first) {
            Some(j)
        } else if free(second) {
            Some(i)
        } else {
            None
        }
    }

    fn vertical(&self, i: usize, j: usize) -> Option<Merge> {
        let (first, second) = (self.steps[i].as_ref()?, self.steps[j].as_ref()?);
        let (p, c) = (first.row()?, second.row()?);
        // Both over one domain, if one of them can be said over the other's.
        let (pw, cw) = (p.width(), c.width());
        if pw == 1 && cw > 1 {
            if let Some(m) = widen(first, cw).and_then(|first| self.join(i, j, &first, second)) {
                return Some(m);
            }
        } else if cw == 1
            && pw > 1
            && let Some(m) = widen(second, pw).and_then(|second| self.join(i, j, first, &second))
        {
            return Some(m);
        }
        self.join(i, j, first, second).or_else(|| {
            let second = if p.shape == c.shape { None } else { rebase(second, &p.shape) };
            self.join(i, j, first, &second?)
        })
    }

    /// `second` with `first` computed where it is loaded.
    fn join(&self, i: usize, j: usize, first: &Step, second: &Step) -> Option<Merge> {
        let (p, c) = (first.row()?, second.row()?);
        let size = |shape: &[usize]| shape.iter().product::<usize>();
        // The loads of `second` that read `first`: (input, value, points).
        let mut reads: Vec<(usize, u32, Points)> = Vec::new();
        let mut work = 0;
        for (k, o) in second.ins.iter().enumerate() {
            let Some(out) = first.outs.iter().position(|out| out.place == o.place) else { continue };
            let &(_, v, how) = p.stores.iter().find(|s| s.0 == out)?;
            // The one writer of a state made what every later step reads of it.
            if self.writers[o.place].len() != 1 || how != Store::Rows {
                return None;
            }
            if !c.instrs.contains(&Instr::Load { input: k }) {
                return None; // a seed
            }
            let at = points(p, &first.outs[out].layout, &o.layout, v)?;
            if !reads.iter().any(|r| r.2 == at) {
                work += match &at {
                    Points::Rows(lead) => lead.numel() * p.width(),
                    Points::Elements { .. } if is_narrow(&o.layout) => size(&c.shape) / c.width().max(1),
                    Points::Elements { at, .. } => at.numel(),
                };
            }
            reads.push((k, v, at));
        }
        let used = |out: usize| second.ins.iter().any(|o| o.place == first.outs[out].place);
        let others = |out: usize| {
            let place = first.outs[out].place;
            self.kept[place] || !self.temp[place] || self.readers[place].iter().any(|&r| r != j)
        };
        let keep: Vec<usize> = (0..first.outs.len()).filter(|&o| others(o)).collect();
        let wanted: Vec<u32> = reads.iter().map(|r| r.1).collect();
        let cheap = is_cheap(p, &wanted);
        let identity = reads.iter().position(|r| r.2.is_identity(&p.shape));
        let whole = (keep.is_empty() || identity.is_some()) && (cheap || work <= size(&p.shape));
        if whole
            && let Some(at) = self.position(i, j)
            && let Some(step) = self.build(first, second, &reads, &keep)
        {
            return Some(Merge { step, at, keep_first: false });
        }
        // Computed again at this reader, in the hope that all readers do so and the value is never stored.
        let all_rows = (0..first.outs.len()).filter(|&o| used(o)).all(|out| {
            let place = first.outs[out].place;
            let row = |r: &usize| self.steps[*r].as_ref().is_some_and(|s| s.row().is_some());
            // A state holds its new value by then, and what made it may have read the old one.
            self.temp[place] && !self.kept[place] && self.readers[place].iter().all(row)
        });
        if !cheap || !all_rows {
            return None;
        }
        let needed = closure(p, wanted.iter().copied());
        let loads: Vec<usize> = (p.instrs.iter().zip(&needed))
            .filter_map(|(i, n)| match i {
                Instr::Load { input } if *n => Some(*input),
                _ => None,
            })
            .collect();
        let loaded: usize = loads.iter().map(|&l| first.ins[l].bytes()).sum();
        let stored: usize = (0..first.outs.len()).filter(|&o| used(o)).map(|o| first.outs[o].bytes()).sum();
        let times: usize = (0..first.outs.len())
            .filter(|&o| used(o))
            .map(|o| self.readers[first.outs[o].place].len())
            .max()?;
        if loaded * times > loaded + stored * (1 + times) {
            return None;
        }
        if loads.iter().any(|&l| Self::between(&self.writers[first.ins[l].place], i, j)) {
            return None;
        }
        let step = self.build(first, second, &reads, &[])?;
        Some(Merge { step, at: j, keep_first: true })
    }

    fn build(
        &self,
        first: &Step,
        second: &Step,
        reads: &[(usize, u32, Points)],
        keep: &[usize],
    ) -> Option<Step> {
        let (p, c) = (first.row()?, second.row()?);
        let mut b = Builder::new(&c.shape);
        let mut replaced: Vec<Option<u32>> = vec![None; second.ins.len()];
        let mut done: Vec<&Points> = Vec::new();
        let mut stored = keep.is_empty();
        for (_, _, at) in reads {
            if done.contains(&at) {
                continue;
            }
            done.push(at);
            let here = |r: &&(usize, u32, Points)| r.2 == *at;
            let mut wanted: Vec<u32> = reads.iter().filter(here).map(|r| r.1).collect();
            let store_here = !stored && at.is_identity(&p.shape);
            if store_here {
                wanted.extend(p.stores.iter().filter(|s| keep.contains(&s.0)).map(|s| s.1));
            }
            let vals = b.embed(first, p, wanted, at, &|_| None)?;
            if store_here {
                b.keep_stores(first, p, &|out| keep.contains(&out), at, &vals)?;
                stored = true;
            }
            for (k, v, _) in reads.iter().filter(here) {
                let new = vals[*v as usize]?;
                replaced[*k] = Some(as_stored(&mut b, p, *v, new, second.ins[*k].dtype)?);
            }
        }
        if !stored {
            return None;
        }
        append(&mut b, second, c, &|k| replaced[k])?;
        self.finish(b, first, second)
    }

    fn horizontal(&self, i: usize, j: usize) -> Option<Merge> {
        let (first, second) = (self.steps[i].as_ref()?, self.steps[j].as_ref()?);
        let (p, c) = (first.row()?, second.row()?);
        let depends = second.ins.iter().any(|o| first.outs.iter().any(|out| out.place == o.place));
        let shared: usize = second.ins.iter().filter(|o| first.ins.contains(o)).map(|o| o.bytes()).sum();
        if p.shape != c.shape || depends || shared == 0 {
            return None;
        }
        // A learning rate that all updates read is no reason to keep all gradients until the last.
        let moved = first.bytes() + second.bytes();
        if moved > SMALL && shared * LITTLE < moved {
            return None;
        }
        let at = self.position(i, j)?;
        let mut b = Builder::new(&p.shape);
        append(&mut b, first, p, &|_| None)?;
        append(&mut b, second, c, &|_| None)?;
        Some(Merge { step: self.finish(b, first, second)?, at, keep_first: false })
    }

    fn finish(&self, b: Builder, first: &Step, second: &Step) -> Option<Step> {
        let mut nodes = first.nodes.clone();
        nodes.extend(second.nodes.iter().filter(|n| !first.nodes.contains(n)));
        let step = b.finish(nodes)?;
        let fits = step.row()?.instrs.len() <= MOST_INSTRS
            && step.ins.len() <= MOST_INPUTS
            && step.outs.len() <= MOST_OUTPUTS;
        // What is read and written by one program lies at the same points in both.
        let in_place = step
            .outs
            .iter()
            .all(|out| step.ins.iter().all(|o| o.place != out.place || o.layout == out.layout));
        (fits && in_place).then_some(step)
    }
}

/// Adds all of `step`, over its own domain.
pub(super) fn append(
    b: &mut Builder,
    step: &Step,
    p: &RowProgram,
    replace: &dyn Fn(usize) -> Option<u32>,
) -> Option<()> {
    let here = Points::Rows(Layout::contiguous(&p.shape[..p.shape.len() - 1]));
    let vals = b.embed(step, p, p.stores.iter().map(|s| s.1), &here, replace)?;
    b.keep_stores(step, p, &|_| true, &here, &vals)
}

/// Whether computing `wanted` again costs about as much as loading it: at most two loads, four additions or
/// products, nothing slow.
fn is_cheap(p: &RowProgram, wanted: &[u32]) -> bool {
    let needed = closure(p, wanted.iter().copied());
    let (mut loads, mut sums) = (0, 0);
    for (instr, _) in p.instrs.iter().zip(&needed).filter(|(_, n)| **n) {
        match instr {
            Instr::Const(_) | Instr::Iota { .. } => {}
            Instr::Load { .. } => loads += 1,
            Instr::Select(..) | Instr::Round(..) => sums += 1,
            Instr::Unary(Unary::Neg | Unary::Abs | Unary::Floor, _) => sums += 1,
            Instr::Binary(Binary::Div, ..) => return false,
            Instr::Binary(..) => sums += 1,
            Instr::Unary(..) | Instr::Reduce(..) | Instr::Random { .. } => return false,
        }
    }
    loads <= 2 && sums <= 4
}

#[cfg(test)]
mod tests {
    use super::super::testing::{graph, header, on_program, steps};
    use super::*;
    use sparsam_ir::{DType, Precision, Tensor, Trace};

    type Model = fn(&Trace) -> Tensor;

    fn x(t: &Trace) -> Tensor {
        t.input("x", &[4, 8], DType::F32)
    }

    fn fused(f: impl Fn(&Trace) -> Tensor) -> Program {
        on_program(&[fuse], &graph(f))
    }

    #[test]
    fn the_example_of_the_header() {
        let f = |t: &Trace| x(t).exp().add_scalar(1.0);
        let source = include_str!("fuse.rs");
        assert_eq!(steps(&on_program(&[], &graph(f))), header(source, 0));
        assert_eq!(steps(&fused(f)), header(source, 1));
    }

    #[test]
    fn one_kernel_each() {
        let one: [(&str, Model); 9] = [
            ("softmax", |t| x(t).softmax()),
            ("norm with its residual", |t| {
                let y = x(t) + t.input("r", &[4, 8], DType::F32);
                &y * &(&y * &y).mean().sqrt().recip() * t.weight("w", &[8])
            }),
            ("silu(gate) * up", |t| x(t).silu() * t.input("up", &[4, 8], DType::F32)),
            ("rotary halves", |t| {
                let (a, b) = (x(t).slice(1, 0, 4), x(t).slice(1, 4, 8));
                let (c, s) = (t.input("c", &[4, 1], DType::F32), t.input("s", &[4, 1], DType::F32));
                t.concat(&[&(&a * &c - &b * &s), &(&b * &c + &a * &s)], 1)
            }),
            ("bias before rotary halves", |t| {
                let x = x(t) + t.weight("bias", &[8]);
                let (a, b) = (x.slice(1, 0, 4), x.slice(1, 4, 8));
                t.concat(&[&(&a - &b), &(&b + &a)], 1)
            }),
            ("through a reshape", |t| x(t).exp().reshape(&[2, 2, 8]).neg()),
            ("through a transpose", |t| x(t).exp().t().neg()),
            ("a state and what is made of its new value", |t| {
                let (m, p) = (t.state("m", &[4, 8], DType::F32), t.state("p", &[4, 8], DType::F32));
                let m = m.assign(&(m.mul_scalar(0.5) + x(t)));
                p.assign(&(&p - &m));
                m.mul_scalar(2.0)
            }),
            ("bias gradient", |t| (x(t) * x(t)).sum(&[0])),
        ];
        for (what, f) in one {
            let g = sparsam_ir::Graph::clone(&graph(f));
            let p = on_program(&[fuse], &super::super::cse::cse(&super::super::dce::dce(&g)));
            assert_eq!(p.steps.len(), 1, "{what}:\n{p}");
        }
    }

    #[test]
    fn results_that_others_read_stay_stored() {
        let p = fused(|t| {
            let y = x(t).exp();
            let w = t.weight("w", &[8, 8]);
            y.matmul_with(&w, false, true, Precision::F32) + y.neg()
        });
        // exp is stored for the product and again read by the sum: no step may pass the product.
        assert_eq!(
            p.steps.iter().map(|s| s.kernel.name()).collect::<Vec<_>>(),
            ["row", "weight matmul", "row"]
        );
    }

    #[test]
    fn what_must_not_fuse() {
        let apart: [(&str, usize, Model); 4] = [
            // Twice as many sines as there are angles: dearer than storing them.
            ("a table spread over heads", 2, |t| {
                let table = t.input("a", &[4, 1], DType::F32).broadcast_to(&[4, 8]).sin();
                table.reshape(&[4, 1, 8]).broadcast_to(&[4, 3, 8]) * t.input("h", &[4, 3, 8], DType::F32)
            }),
            ("a norm over halves that are rotated", 2, |t| {
                let y = x(t) * x(t).sum(&[1]);
                let (a, b) = (y.slice(1, 0, 4), y.slice(1, 4, 8));
                t.concat(&[&(&a - &b), &(&b + &a)], 1)
            }),
            ("a sum over the other axis", 2, |t| x(t).sum(&[0]).neg()),
            ("whole numbers past f32", 2, |t| {
                let i = t.input("i", &[4, 8], DType::I32).cast(DType::F32).mul_scalar(1e9).cast(DType::I32);
                i.cast(DType::F32).neg()
            }),
        ];
        for (what, kernels, f) in apart {
            assert_eq!(fused(f).steps.len(), kernels, "{what}:\n{}", fused(f));
        }
    }

    #[test]
    fn a_state_is_read_before_it_is_written() {
        let g = {
            let t = Trace::new();
            let s = t.state("s", &[4, 8], DType::F32);
            let old = s.exp();
            let new = s.assign(&(&s + &x(&t)));
            t.finish(&[("y", &(&old + &new))]).unwrap()
        };
        assert!(on_program(&[fuse], &g).steps.len() <= 2);
        // A transposed read of what the same program writes cannot be in it.
        let g = {
            let t = Trace::new();
            let s = t.state("s", &[8, 8], DType::F32);
            let y = s.t().neg();
            s.assign(&(&s + &y));
            t.finish(&[("y", &y)]).unwrap()
        };
        assert_eq!(on_program(&[fuse], &g).steps.len(), 2);
    }
}
