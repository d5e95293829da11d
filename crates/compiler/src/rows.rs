//! Moving the body of one row program to the points of another domain: what fusion is made of.

use crate::program::{Instr, Operand, RowProgram, Step, Store, Val, is_narrow};
use sparsam_ir::{Binary, DType, Layout, Reduction};

/// `inner` seen through `outer`, if strides can say it.
///
/// `outer` says for each point of a new domain which element it is in the row-major order of `inner.shape`;
/// the result says where `inner` keeps that element.
///
/// A merged axis splits, a slice starts later, a broadcast stays in place:
/// `outer` = [4, 3] strides (6, 1) offset 2 over `inner` = [4, 6] strides (1, 4) gives strides (1, 4) offset 8.
pub(crate) fn compose(outer: &Layout, inner: &Layout) -> Option<Layout> {
    // Runs of inner axes that move as one, outermost last: (length, elements of the flat order, inner stride).
    let mut runs: Vec<(usize, usize, usize)> = Vec::new();
    let mut flat = 1;
    for (&n, &s) in inner.shape.iter().zip(&inner.strides).rev() {
        if n == 1 {
            continue;
        }
        match runs.last_mut() {
            Some((len, _, stride)) if s == *stride * *len => *len *= n,
            _ => runs.push((n, flat, s)),
        }
        flat *= n;
    }
    // How far each run is moved by one offset or stride of the outer order; what no run takes cannot be said.
    let digits = |mut at: usize| {
        let mut d = vec![0; runs.len()];
        for (i, (_, unit, _)) in runs.iter().enumerate().rev() {
            d[i] = at / unit;
            at %= unit;
        }
        (at == 0).then_some(d)
    };
    let along = |d: &[usize]| d.iter().zip(&runs).map(|(d, (_, _, stride))| d * stride).sum::<usize>();
    let mut most = digits(outer.offset)?;
    let mut layout =
        Layout { shape: outer.shape.clone(), strides: Vec::new(), offset: inner.offset + along(&most) };
    for (&n, &s) in outer.shape.iter().zip(&outer.strides) {
        if n <= 1 || s == 0 {
            layout.strides.push(0);
            continue;
        }
        let d = digits(s)?;
        layout.strides.push(along(&d));
        most.iter_mut().zip(&d).for_each(|(m, d)| *m += d * (n - 1));
    }
    // No run may pass its end: it would have to carry into the next.
    let fits = most.iter().zip(&runs).all(|(m, (len, ..))| m < len);
    fits.then_some(layout)
}

/// Which point of a program's own domain stands at each point of the new one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Points {
    /// Rows are rows: for each leading index of the new domain, the flat leading index of the old.
    Rows(Layout),
    /// Element by element: the flat index in the old domain, or its flat leading index for narrow values.
    Elements {
        /// Over the whole new domain.
        at: Layout,
        /// Whether only narrow values are wanted.
        narrow: bool,
    },
}

impl Points {
    /// Each point of the old domain exactly once and in order.
    pub(crate) fn is_identity(&self, old: &[usize]) -> bool {
        match self {
            Points::Rows(l) => same_order(l, &old[..old.len() - 1]),
            Points::Elements { at, narrow } => !narrow && same_order(at, old),
        }
    }

    /// Where an operand over the old domain `old` lies over the new one.
    fn apply(&self, l: &Layout) -> Option<Layout> {
        let last = l.shape.len() - 1;
        match self {
            Points::Rows(lead) => {
                let old =
                    Layout { shape: l.shape[..last].to_vec(), strides: l.strides[..last].to_vec(), ..*l };
                let mut new = compose(lead, &old)?;
                new.shape.push(l.shape[last]);
                new.strides.push(l.strides[last]);
                Some(new)
            }
            Points::Elements { at, narrow: true } => compose(at, &l.slice(last, 0, 1)),
            Points::Elements { at, narrow: false } => compose(at, l),
        }
    }
}

fn same_order(l: &Layout, shape: &[usize]) -> bool {
    l.offset == 0 && l.numel() == shape.iter().product::<usize>() && l.is_contiguous()
}

/// A row program under construction. Equal instructions become one.
pub(crate) struct Builder {
    shape: Vec<usize>,
    instrs: Vec<Instr>,
    ins: Vec<Operand>,
    outs: Vec<Operand>,
    stores: Vec<(usize, Val, Store)>,
}

impl Builder {
    pub(crate) fn new(shape: &[usize]) -> Builder {
        Builder {
            shape: shape.to_vec(),
            instrs: Vec::new(),
            ins: Vec::new(),
            outs: Vec::new(),
            stores: Vec::new(),
        }
    }

    pub(crate) fn push(&mut self, instr: Instr) -> Val {
        // There is nothing to count along one element.
        let instr = match instr {
            Instr::Iota { axis } if self.shape[axis] == 1 => Instr::Const(0.0),
            instr => instr,
        };
        let same = |a: &Instr| match (a, &instr) {
            (Instr::Const(a), Instr::Const(b)) => a.to_bits() == b.to_bits(),
            (a, b) => a == b,
        };
        let at = self.instrs.iter().position(same).unwrap_or_else(|| {
            self.instrs.push(instr);
            self.instrs.len() - 1
        });
        at as Val
    }

    fn input(&mut self, o: Operand) -> usize {
        self.ins.iter().position(|i| *i == o).unwrap_or_else(|| {
            self.ins.push(o);
            self.ins.len() - 1
        })
    }

    pub(crate) fn load(&mut self, mut o: Operand) -> Val {
        one_choice(&mut o.layout);
        let input = self.input(o);
        self.push(Instr::Load { input })
    }

    pub(crate) fn store(&mut self, mut out: Operand, v: Val, how: Store) {
        one_choice(&mut out.layout);
        self.stores.push((self.outs.len(), v, how));
        self.outs.push(out);
    }

    /// `sum of stride * index + offset` over the axes of the domain.
    fn affine(&mut self, l: &Layout) -> Val {
        let mut sum: Option<Val> = None;
        for (axis, (&n, &s)) in l.shape.iter().zip(&l.strides).enumerate() {
            if n == 1 || s == 0 {
                continue;
            }
            let mut term = self.push(Instr::Iota { axis });
            if s != 1 {
                let by = self.push(Instr::Const(s as f32));
                term = self.push(Instr::Binary(Binary::Mul, term, by));
            }
            sum = Some(match sum {
                None => term,
                Some(before) => self.push(Instr::Binary(Binary::Add, before, term)),
            });
        }
        let offset = Instr::Const(l.offset as f32);
        match sum {
            None => self.push(offset),
            Some(sum) if l.offset == 0 => sum,
            Some(sum) => {
                let by = self.push(offset);
                self.push(Instr::Binary(Binary::Add, sum, by))
            }
        }
    }

    /// Adds what `wanted` values of a step need, at `points`. `replace` gives values for some of its inputs.
    pub(crate) fn embed(
        &mut self,
        step: &Step,
        p: &RowProgram,
        wanted: impl IntoIterator<Item = Val>,
        points: &Points,
        replace: &dyn Fn(usize) -> Option<Val>,
    ) -> Option<Vec<Option<Val>>> {
        let needed = closure(p, wanted);
        let rows = matches!(points, Points::Rows(_));
        let mut vals: Vec<Option<Val>> = vec![None; p.instrs.len()];
        for (i, instr) in p.instrs.iter().enumerate().filter(|(i, _)| needed[*i]) {
            let v = match *instr {
                Instr::Load { input } => match replace(input) {
                    Some(v) => v,
                    None => {
                        let o = &step.ins[input];
                        let layout = points.apply(&o.layout)?;
                        self.load(Operand { layout, ..o.clone() })
                    }
                },
                Instr::Iota { axis } if rows && axis + 1 == p.shape.len() => {
                    self.push(Instr::Iota { axis: self.shape.len() - 1 })
                }
                Instr::Iota { axis } => {
                    // The index along an axis is an affine function of the old domain, like an operand's place.
                    let mut index =
                        Layout { shape: p.shape.clone(), strides: vec![0; p.shape.len()], offset: 0 };
                    index.strides[axis] = 1;
                    let index = points.apply(&index)?;
                    self.affine(&index)
                }
                Instr::Random { seed, stream } => {
                    if !points.is_identity(&p.shape) {
                        return None;
                    }
                    let seed = self.input(step.ins[seed].clone());
                    self.push(Instr::Random { seed, stream })
                }
                Instr::Reduce(..) if !rows => return None,
                Instr::Reduce(..)
                | Instr::Const(_)
                | Instr::Unary(..)
                | Instr::Binary(..)
                | Instr::Select(..)
                | Instr::Round(..) => {
                    let instr = instr.map(|v| vals[v as usize].expect("operands are needed and come first"));
                    self.push(instr)
                }
            };
            vals[i] = Some(v);
        }
        Some(vals)
    }

    /// Adds the stores of `step` that `keep` names, whose values are `vals`, at `points` that are all of its domain.
    pub(crate) fn keep_stores(
        &mut self,
        step: &Step,
        p: &RowProgram,
        keep: &dyn Fn(usize) -> bool,
        points: &Points,
        vals: &[Option<Val>],
    ) -> Option<()> {
        for &(out, v, how) in p.stores.iter().filter(|(out, ..)| keep(*out)) {
            let o = &step.outs[out];
            let layout = match how {
                Store::ColumnSum => {
                    let Points::Rows(_) = points else { return None };
                    let lead = self.shape.len() - 1;
                    let (last, offset) = (o.layout.shape.len() - 1, o.layout.offset);
                    let mut l = Layout { shape: vec![1; lead], strides: vec![0; lead], offset };
                    l.shape.push(o.layout.shape[last]);
                    l.strides.push(o.layout.strides[last]);
                    l
                }
                Store::Rows => {
                    let narrow = o.layout.shape.last() != p.shape.last();
                    if narrow && matches!(points, Points::Elements { .. }) {
                        return None;
                    }
                    points.apply(&o.layout)?
                }
            };
            self.store(Operand { layout, ..o.clone() }, vals[v as usize]?, how);
        }
        Some(())
    }

    /// The finished kernel: without unused instructions and inputs, without reductions of one number a row.
    pub(crate) fn finish(mut self, nodes: Vec<sparsam_ir::NodeId>) -> Option<Step> {
        let width = self.shape[self.shape.len() - 1];
        let mut p = RowProgram {
            shape: self.shape.clone(),
            instrs: std::mem::take(&mut self.instrs),
            stores: vec![],
        };
        let mut narrow = p.narrow(&self.ins);
        // A reduction over a row of one number: that number, times the width for a sum.
        if (0..p.instrs.len()).any(|i| matches!(p.instrs[i], Instr::Reduce(_, v) if narrow[v as usize])) {
            let mut vals = Vec::with_capacity(p.instrs.len());
            for i in std::mem::take(&mut p.instrs) {
                let i = i.map(|v| vals[v as usize]);
                vals.push(match i {
                    Instr::Reduce(op, v) if self.is_narrow_now(v) => match op {
                        Reduction::Max => v,
                        Reduction::Sum => {
                            let times = self.push(Instr::Const(width as f32));
                            self.push(Instr::Binary(Binary::Mul, v, times))
                        }
                    },
                    i => self.push(i),
                });
            }
            self.stores.iter_mut().for_each(|s| s.1 = vals[s.1 as usize]);
            p.instrs = std::mem::take(&mut self.instrs);
            narrow = p.narrow(&self.ins);
        }
        if self.stores.iter().any(|s| s.2 == Store::ColumnSum && narrow[s.1 as usize]) {
            return None;
        }
        let needed = closure(&p, self.stores.iter().map(|s| s.1));
        let (mut vals, mut instrs, mut ins) = (vec![0; p.instrs.len()], Vec::new(), Vec::<Operand>::new());
        let mut input = |i: usize| {
            let o = &self.ins[i];
            ins.iter().position(|have| have == o).unwrap_or_else(|| {
                ins.push(o.clone());
                ins.len() - 1
            })
        };
        for (i, instr) in p.instrs.iter().enumerate().filter(|(i, _)| needed[*i]) {
            vals[i] = instrs.len() as Val;
            instrs.push(match *instr {
                Instr::Load { input: i } => Instr::Load { input: input(i) },
                Instr::Random { seed, stream } => Instr::Random { seed: input(seed), stream },
                other => other.map(|v| vals[v as usize]),
            });
        }
        let stores = self.stores.iter().map(|s| (s.0, vals[s.1 as usize], s.2)).collect();
        let program = RowProgram { shape: self.shape, instrs, stores };
        Some(Step { kernel: crate::Kernel::Row(program), outs: self.outs, ins, nodes })
    }

    fn is_narrow_now(&self, v: Val) -> bool {
        let p = RowProgram {
            shape: self.shape.clone(),
            instrs: self.instrs[..=v as usize].to_vec(),
            stores: vec![],
        };
        p.narrow(&self.ins)[v as usize]
    }
}

/// Axes of length 1 may have any stride; with one choice, equal operands look equal.
fn one_choice(l: &mut Layout) {
    l.strides.iter_mut().zip(&l.shape).filter(|(_, n)| **n == 1).for_each(|(s, _)| *s = 0);
}

/// For each instruction, whether one of `wanted` needs it.
pub(crate) fn closure(p: &RowProgram, wanted: impl IntoIterator<Item = Val>) -> Vec<bool> {
    let mut needed = vec![false; p.instrs.len()];
    wanted.into_iter().for_each(|v| needed[v as usize] = true);
    for i in (0..p.instrs.len()).rev() {
        if needed[i] {
            p.instrs[i].operands().for_each(|v| needed[v as usize] = true);
        }
    }
    needed
}

/// A program over rows of one element, as one over rows of `width` whose values are all narrow.
pub(crate) fn widen(step: &Step, width: usize) -> Option<Step> {
    let p = step.row()?;
    let last = p.shape.len() - 1;
    let plain = |i: &Instr| !matches!(i, Instr::Random { .. } | Instr::Reduce(..));
    if p.shape[last] != 1 || !p.instrs.iter().all(plain) || p.stores.iter().any(|s| s.2 != Store::Rows) {
        return None;
    }
    let mut step = step.clone();
    for o in &mut step.ins {
        o.layout.shape[last] = width;
        o.layout.strides[last] = 0;
    }
    if let crate::Kernel::Row(p) = &mut step.kernel {
        p.shape[last] = width;
        for i in &mut p.instrs {
            if *i == (Instr::Iota { axis: last }) {
                *i = Instr::Const(0.0);
            }
        }
    }
    Some(step)
}

/// The same program over `shape`, which has as many elements: without reductions and narrow results only.
pub(crate) fn rebase(step: &Step, shape: &[usize]) -> Option<Step> {
    let p = step.row()?;
    let points = Points::Elements { at: Layout::contiguous(shape), narrow: false };
    if !points.is_identity(&p.shape) {
        return None;
    }
    let mut b = Builder::new(shape);
    let vals = b.embed(step, p, p.stores.iter().map(|s| s.1), &points, &|_| None)?;
    b.keep_stores(step, p, &|_| true, &points, &vals)?;
    b.finish(step.nodes.clone())
}

/// The points of a producer at which a consumer over `domain` reads its output, through `view` of the output's
/// place; `out` is the producer's own view of it, all of a contiguous place.
pub(crate) fn points(p: &RowProgram, out: &Layout, view: &Layout, wanted: Val) -> Option<Points> {
    if out.offset != 0 || !out.is_contiguous() {
        return None;
    }
    let (old, new) = (p.shape.len() - 1, view.shape.len() - 1);
    let narrow_store = out.shape[old] == 1 && p.shape[old] != 1;
    let width = p.shape[old];
    let lead = |unit: usize| -> Option<Layout> {
        let strides: Option<Vec<usize>> = (0..new)
            .map(|i| if view.shape[i] == 1 { Some(0) } else { divide(view.strides[i], unit) })
            .collect();
        Some(Layout {
            shape: view.shape[..new].to_vec(),
            strides: strides?,
            offset: divide(view.offset, unit)?,
        })
    };
    // Rows to rows, if the new rows are the old ones.
    if view.shape[new] == width {
        if narrow_store && is_narrow(view) {
            return Some(Points::Rows(lead(1)?));
        }
        if !narrow_store
            && (view.strides[new] == 1 || width == 1)
            && let Some(l) = lead(width)
        {
            return Some(Points::Rows(l));
        }
    }
    let needed = closure(p, [wanted]);
    let reduces = p.instrs.iter().zip(&needed).any(|(i, n)| *n && matches!(i, Instr::Reduce(..)));
    if reduces {
        return None;
    }
    Some(Points::Elements { at: view.clone(), narrow: narrow_store })
}

fn divide(a: usize, b: usize) -> Option<usize> {
    a.is_multiple_of(b).then(|| a / b)
}

/// The value that a reader of an output of type `dtype` sees.
pub(crate) fn as_stored(b: &mut Builder, p: &RowProgram, v: Val, new: Val, dtype: DType) -> Option<Val> {
    match dtype {
        DType::F32 => Some(new),
        DType::F16 | DType::BF16 => Some(b.push(Instr::Round(dtype, new))),
        // Indices are whole numbers that f32 holds.
        DType::I32 if matches!(p.instrs[v as usize], Instr::Iota { .. }) => Some(new),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `compose` agrees with looking every element up.
    fn agrees(outer: &Layout, inner: &Layout) -> bool {
        let Some(c) = compose(outer, inner) else { return false };
        let flat = |l: &Layout, mut i: usize| {
            let mut at = l.offset;
            for (&n, &s) in l.shape.iter().zip(&l.strides).rev() {
                at += i % n * s;
                i /= n;
            }
            at
        };
        (0..outer.numel()).all(|i| flat(inner, flat(outer, i)) == flat(&c, i))
    }

    #[test]
    fn compose_follows_slices_broadcasts_and_reshapes() {
        let whole = Layout::contiguous(&[4, 6]);
        let turned = Layout::contiguous(&[6, 4]).permute(&[1, 0]);
        let spread = Layout::contiguous(&[4, 1]).broadcast(&[4, 6]);
        for inner in [&whole, &turned, &spread] {
            assert!(agrees(&whole, inner));
            assert!(agrees(&whole.slice(1, 2, 5), inner));
            assert!(agrees(&whole.slice(0, 1, 3), inner));
            assert!(agrees(&whole.permute(&[1, 0]), inner));
            assert!(agrees(&whole.reshape(&[2, 2, 3, 2]).unwrap(), inner));
            assert!(agrees(&Layout::contiguous(&[1, 1]).broadcast(&[3, 5]), inner));
        }
        assert!(agrees(&Layout::contiguous(&[24]), &whole));
        // The rows of a transposed matrix do not lie one after the other.
        assert_eq!(compose(&Layout::contiguous(&[24]), &turned), None);
        assert_eq!(compose(&Layout::contiguous(&[8, 3]), &turned).map(|l| l.strides), None);
        let by_hand = compose(&whole.slice(1, 2, 5), &turned).unwrap();
        assert_eq!((by_hand.strides, by_hand.offset), (vec![1, 4], 8));
    }
}
