use super::*;
use crate::convert;

/// Steele and Vigna's SplitMix64: enough for tests.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }
}

/// A value and a bound on how far an f32 path may be from it.
#[derive(Clone, Copy, Debug)]
struct Near {
    x: f64,
    e: f64,
}

const EPS: f64 = f32::EPSILON as f64;

/// `x` by a function of error `ulp` whose arguments may be off so far that it is off by `e`.
fn near(x: f64, e: f64, ulp: f64) -> Near {
    let e = e + ulp * EPS * x.abs() + 1e-37;
    if x.is_nan() {
        return Near { x, e: 0.0 };
    }
    Near { x, e: if e.is_nan() || x.abs() + e > 1e37 { f64::INFINITY } else { e } }
}

fn unary(op: Unary, a: Near) -> Near {
    let Near { x, e } = a;
    if e == f64::INFINITY {
        return a;
    }
    let unsure = Near { x: 0.0, e: f64::INFINITY };
    match op {
        Unary::Neg => Near { x: -x, e },
        Unary::Abs => Near { x: x.abs(), e },
        Unary::Recip if x.abs() <= e => unsure,
        Unary::Recip => near(1.0 / x, e / (x.abs() * (x.abs() - e)), 1.0),
        Unary::Sqrt if x.abs() <= e && x != 0.0 => unsure,
        Unary::Sqrt => near(x.sqrt(), if x > 0.0 { x.sqrt() - (x - e).max(0.0).sqrt() } else { 0.0 }, 1.0),
        Unary::Exp => near(x.exp(), x.exp() * e.exp_m1(), 2.0),
        Unary::Log if x.abs() <= e => unsure,
        Unary::Log => near(x.ln(), -(-e / x).ln_1p(), 2.0),
        Unary::Sin => near(x.sin(), e, 3.0),
        Unary::Cos => near(x.cos(), e, 3.0),
        Unary::Tanh => near(x.tanh(), e, 3.0),
        Unary::Erf => near(reference::erf(x), 1.13 * e, 3.0),
        Unary::Floor => Near { x: x.floor(), e: (x + e).floor() - (x - e).floor() },
    }
}

fn binary(op: Binary, a: Near, b: Near) -> Near {
    if a.e == f64::INFINITY || b.e == f64::INFINITY {
        return Near { x: 0.0, e: f64::INFINITY };
    }
    let e = a.e + b.e;
    let (p, q) = (a.x, b.x);
    let truth = |t: bool, sure: bool| Near { x: t as i32 as f64, e: if sure { 0.0 } else { 1.0 } };
    match op {
        Binary::Add => near(p + q, e, 1.0),
        Binary::Sub => near(p - q, e, 1.0),
        Binary::Mul => near(p * q, p.abs() * b.e + q.abs() * a.e + a.e * b.e, 1.0),
        Binary::Div if q.abs() <= b.e => Near { x: 0.0, e: f64::INFINITY },
        Binary::Div => near(p / q, (a.e + (p / q).abs() * b.e) / (q.abs() - b.e), 2.0),
        Binary::Max if p.is_nan() || q.is_nan() => near(f64::NAN, 0.0, 0.0),
        Binary::Min if p.is_nan() || q.is_nan() => near(f64::NAN, 0.0, 0.0),
        Binary::Max => Near { x: p.max(q), e: a.e.max(b.e) },
        Binary::Min => Near { x: p.min(q), e: a.e.max(b.e) },
        Binary::Less => truth(p < q, (p - q).abs() > e || e == 0.0 || p.is_nan() || q.is_nan()),
        Binary::Equal => truth(p == q, (p - q).abs() > e || e == 0.0 || p.is_nan() || q.is_nan()),
    }
}

fn reduce(op: Reduction, each: &mut dyn Iterator<Item = Near>) -> Near {
    let all: Vec<Near> = each.collect();
    let e = all.iter().map(|v| v.e);
    if op == Reduction::Max {
        let x = all.iter().fold(f64::NEG_INFINITY, |m, v| if m.is_nan() || m > v.x { m } else { v.x });
        return Near { x, e: e.fold(0.0, f64::max) };
    }
    let size: f64 = all.iter().map(|v| v.x.abs()).sum();
    near(all.iter().map(|v| v.x).sum(), e.sum::<f64>() + size * EPS * (4.0 + all.len() as f64 / 8.0), 1.0)
}

/// What a type does to a value that may be off.
fn rounded(dtype: DType, a: Near) -> Near {
    let to = |x: f64| convert::round(dtype, x as f32) as f64;
    let (low, high) = (to(a.x - a.e), to(a.x + a.e));
    if a.x.is_nan() || a.e == f64::INFINITY || low.is_nan() || high.is_nan() {
        return if a.x.is_nan() && !dtype.is_float() { Near { x: 0.0, ..a } } else { a };
    }
    let x = to(a.x);
    Near { x, e: (x - low).abs().max((high - x).abs()) }
}

struct Case {
    program: Program,
    outs: Vec<View>,
    ins: Vec<View>,
    /// The bytes of every slab before the run.
    slabs: Vec<Vec<u8>>,
}

const DTYPES: [DType; 8] =
    [DType::F32, DType::F32, DType::F32, DType::F32, DType::BF16, DType::F16, DType::I32, DType::I16];

/// A layout of `shape` in a slab of its own, with gaps, any order of axes and some of them repeated.
fn layout(dice: &mut Dice, shape: &[usize], repeat: bool) -> Layout {
    let rank = shape.len();
    let mut order: Vec<usize> = (0..rank).collect();
    if dice.one_in(4) {
        order.reverse();
    } else if rank > 1 && dice.one_in(4) {
        order.swap(0, rank - 1);
    }
    let mut strides = vec![0; rank];
    let mut step = 1;
    for &a in order.iter().rev() {
        if repeat && dice.one_in(5) {
            continue;
        }
        strides[a] = step;
        step *= shape[a].max(1) + if dice.one_in(5) { 3 } else { 0 };
    }
    Layout { shape: shape.to_vec(), strides, offset: dice.of(&[0, 0, 1, 3, 16]) }
}

fn slab(dice: &mut Dice, dtype: DType, layout: &Layout, slabs: &mut Vec<Vec<u8>>) -> View {
    let n = layout.end() + 5;
    let mut bytes = vec![0u8; n * dtype.block_bytes()];
    let positive = dice.one_in(3);
    for i in 0..n {
        let x = dice.unit() * 4.0 - if positive { 0.0 } else { 2.0 };
        let x = match dtype {
            DType::F32 => x,
            // Values that the type holds.
            _ if dtype.is_float() => (x * 16.0).round() / 16.0,
            _ => (x * 2.0).round(),
        };
        // Bytes of a `Vec<u8>` may lie unaligned, so element by element.
        let mut cell = [0u64; 1];
        // SAFETY: one aligned element.
        unsafe { convert::set(dtype, cell.as_mut_ptr().cast(), 0, x) };
        let size = dtype.block_bytes();
        bytes[i * size..(i + 1) * size].copy_from_slice(&bytemuck::bytes_of(&cell)[..size]);
    }
    slabs.push(bytes);
    View { slab: slabs.len() - 1, dtype, layout: layout.clone() }
}

fn case(dice: &mut Dice) -> Case {
    let rank = 1 + dice.below(4);
    let mut shape: Vec<usize> = (0..rank - 1).map(|_| dice.of(&[1, 1, 2, 3, 5, 17])).collect();
    let widths = [0, 1, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100, 576];
    shape.push(if rank < 3 && dice.one_in(8) {
        dice.of(&[2047, 2049, 9001, 40_000])
    } else {
        dice.of(&widths)
    });
    let mut slabs = Vec::new();
    let mut ins = Vec::new();
    for _ in 0..1 + dice.below(4) {
        let mut l = layout(dice, &shape, true);
        if dice.one_in(5) {
            l.shape[rank - 1] = 1;
        }
        let dtype = dice.of(&DTYPES);
        ins.push(slab(dice, dtype, &l, &mut slabs));
    }
    let seed = slab(dice, DType::I32, &Layout::contiguous(&[2]), &mut slabs);
    ins.push(seed);
    let mut instrs: Vec<Instr> = (0..ins.len() - 1).map(|input| Instr::Load { input }).collect();
    let chatty = dice.one_in(3);
    for _ in 0..1 + dice.below(if chatty { 30 } else { 12 }) {
        let n = instrs.len();
        let v = |dice: &mut Dice| if dice.one_in(2) { n - 1 - dice.below(n.min(3)) } else { dice.below(n) } as Val;
        let (a, b, c) = (v(dice), v(dice), v(dice));
        use {Binary::*, Unary::*};
        let instr = match dice.below(24) {
            0 => Instr::Const(dice.of(&[0.5, 1.0, 2.0, -1.0, 0.0])),
            1 => Instr::Iota { axis: dice.below(rank) },
            2 => Instr::Random { seed: ins.len() - 1, stream: dice.below(3) as u32 },
            3 | 4 => Instr::Reduce(dice.of(&[Reduction::Sum, Reduction::Max]), a),
            5 => Instr::Select(c, a, b),
            6 => Instr::Round(dice.of(&[DType::BF16, DType::F16, DType::I32, DType::F32]), a),
            7..=11 => Instr::Unary(
                dice.of(&[Neg, Neg, Abs, Recip, Sqrt, Exp, Log, Sin, Cos, Tanh, Erf, Floor, Exp]),
                a,
            ),
            12 => {
                // A sigmoid, often times its argument.
                instrs.push(Instr::Unary(Neg, a));
                instrs.push(Instr::Unary(Exp, n as Val));
                instrs.push(Instr::Const(1.0));
                instrs.push(Instr::Binary(Add, n as Val + 1, n as Val + 2));
                if dice.one_in(3) {
                    Instr::Binary(Div, a, n as Val + 3)
                } else {
                    instrs.push(Instr::Unary(Recip, n as Val + 3));
                    if dice.one_in(2) {
                        instrs.push(Instr::Binary(Mul, a, n as Val + 4));
                        Instr::Binary(Mul, b, n as Val + 5)
                    } else {
                        Instr::Unary(Neg, n as Val + 4)
                    }
                }
            }
            _ => {
                Instr::Binary(dice.of(&[Add, Sub, Mul, Mul, Add, Sub, Mul, Div, Max, Min, Less, Equal]), a, b)
            }
        };
        instrs.push(instr);
    }
    let mut program = Program { shape: shape.clone(), instrs, stores: Vec::new() };
    // Stores: several values, rows or sums, sometimes into an input's own memory.
    let fake = Layout::contiguous(&shape);
    let operands: Vec<(DType, &Layout)> = ins.iter().map(|v| (v.dtype, &v.layout)).collect();
    let classes = program.check(&operands, &[]).unwrap();
    let mut outs: Vec<View> = Vec::new();
    for k in 0..1 + dice.below(3) {
        let n = program.instrs.len();
        let v = n - 1 - dice.below(n.min(5));
        let narrow = classes[v] != Class::Wide && dice.one_in(2);
        let how = if dice.one_in(4) { Store::ColumnSum } else { Store::Rows };
        let mut want = fake.shape.clone();
        if how == Store::ColumnSum {
            want[..rank - 1].fill(1);
        }
        if narrow {
            want[rank - 1] = 1;
        }
        let twin = ins.iter().find(|i| {
            i.layout.shape == want
                && i.layout.shape.iter().zip(&i.layout.strides).all(|(&n, &s)| n == 1 || s != 0)
                && !outs.iter().any(|o| o.slab == i.slab)
        });
        outs.push(match twin {
            Some(twin) if how == Store::Rows && dice.one_in(2) => twin.clone(),
            _ => {
                let l = layout(dice, &want, false);
                let dtype = dice.of(&DTYPES);
                slab(dice, dtype, &l, &mut slabs)
            }
        });
        program.stores.push((k, v as Val, how));
    }
    Case { program, outs, ins, slabs }
}

fn indices(shape: &[usize]) -> Vec<Vec<usize>> {
    let mut all = vec![vec![]];
    for &n in shape {
        all = all.iter().flat_map(|p| (0..n).map(|i| [p.as_slice(), &[i]].concat())).collect();
    }
    all
}

fn at(l: &Layout, index: &[usize]) -> usize {
    l.offset
        + (0..index.len()).map(|a| if l.shape[a] == 1 { 0 } else { index[a] * l.strides[a] }).sum::<usize>()
}

fn element(slabs: &[Vec<u8>], v: &View, index: &[usize]) -> f64 {
    let size = v.dtype.block_bytes();
    let i = at(&v.layout, index);
    let mut cell = [0u64; 1];
    bytemuck::bytes_of_mut(&mut cell)[..size].copy_from_slice(&slabs[v.slab][i * size..(i + 1) * size]);
    // SAFETY: one aligned element.
    unsafe { convert::get(v.dtype, cell.as_ptr().cast(), 0) as f64 }
}

/// What every output element should be, by output and index.
fn truth(case: &Case) -> Vec<Vec<(Vec<usize>, Near)>> {
    let Case { program, outs, ins, slabs } = case;
    let rank = program.shape.len();
    let width = program.width();
    let mut result: Vec<Vec<(Vec<usize>, Near)>> = outs.iter().map(|_| Vec::new()).collect();
    let mut sums: Vec<Vec<Vec<Near>>> = outs.iter().map(|_| vec![Vec::new(); width]).collect();
    for (r, lead) in indices(&program.shape[..rank - 1]).iter().enumerate() {
        let mut values: Vec<Vec<Near>> = Vec::new();
        for instr in &program.instrs {
            let value = (0..width).map(|c| {
                let index = [lead.as_slice(), &[c]].concat();
                let v = |v: Val| values[v as usize][c];
                let exact = |x: f64| Near { x, e: 0.0 };
                match *instr {
                    Instr::Load { input } => exact(element(slabs, &ins[input], &index)),
                    Instr::Const(x) => exact(x as f64),
                    Instr::Iota { axis } => exact(index[axis] as f64),
                    Instr::Random { seed, stream } => {
                        let key = [0, 1].map(|i| element(slabs, &ins[seed], &[i]) as i32 as u32);
                        exact(reference::philox_uniform((r * width + c) as u64, stream, key) as f64)
                    }
                    Instr::Unary(op, a) => unary(op, v(a)),
                    Instr::Binary(op, a, b) => binary(op, v(a), v(b)),
                    Instr::Select(c, ..) if v(c).x.abs() <= v(c).e && v(c).e > 0.0 => {
                        Near { x: 0.0, e: f64::INFINITY }
                    }
                    Instr::Select(c, a, b) => {
                        if v(c).x != 0.0 {
                            v(a)
                        } else {
                            v(b)
                        }
                    }
                    Instr::Reduce(..) => exact(0.0),
                    Instr::Round(dtype, a) => rounded(dtype, v(a)),
                }
            });
            let mut value: Vec<Near> = value.collect();
            if let Instr::Reduce(op, a) = *instr {
                value.fill(reduce(op, &mut values[a as usize].iter().copied()));
            }
            values.push(value);
        }
        for &(o, v, how) in &program.stores {
            let columns = *outs[o].layout.shape.last().unwrap();
            for c in 0..columns {
                // A narrow value of an empty row cannot be seen from its columns; the reference is by hand there.
                let Some(&x) = values[v as usize].get(c) else { continue };
                match how {
                    Store::Rows => result[o].push(([lead.as_slice(), &[c]].concat(), x)),
                    Store::ColumnSum => sums[o][c].push(x),
                }
            }
        }
    }
    for &(o, _, how) in &program.stores {
        if how == Store::ColumnSum {
            for c in 0..width.min(*outs[o].layout.shape.last().unwrap()) {
                let mut index = vec![0; rank];
                index[rank - 1] = c;
                let x = reduce(Reduction::Sum, &mut sums[o][c].iter().copied());
                result[o].push((index, x));
            }
        }
    }
    for (o, list) in result.iter_mut().enumerate() {
        list.iter_mut().for_each(|(_, x)| *x = rounded(outs[o].dtype, *x));
    }
    result
}

fn memory(slabs: &[Vec<u8>]) -> Memory {
    let mut mem = Memory::new();
    for s in slabs {
        let slab = mem.add_owned(s.len());
        mem.bytes_mut(slab).unwrap().copy_from_slice(s);
    }
    mem
}

/// The slabs after a run by `how`.
fn after(case: &Case, how: impl Fn(&mut Memory, &Code, &[&View], &[&View])) -> Vec<Vec<u8>> {
    let mut mem = memory(&case.slabs);
    let (outs, ins): (Vec<&View>, Vec<&View>) = (case.outs.iter().collect(), case.ins.iter().collect());
    let i: Vec<(DType, &Layout)> = case.ins.iter().map(|v| (v.dtype, &v.layout)).collect();
    let o: Vec<(DType, &Layout)> = case.outs.iter().map(|v| (v.dtype, &v.layout)).collect();
    let code = Code::new(&case.program, &i, &o).unwrap();
    how(&mut mem, &code, &outs, &ins);
    (0..case.slabs.len()).map(|s| mem.bytes(s).to_vec()).collect()
}

fn compare(case: &Case, truth: &[Vec<(Vec<usize>, Near)>], slabs: &[Vec<u8>], who: &str) {
    for (o, list) in truth.iter().enumerate() {
        for (index, want) in list {
            if want.e == f64::INFINITY {
                continue;
            }
            let got = element(slabs, &case.outs[o], index);
            let ok = if want.x.is_nan() {
                got.is_nan()
            } else {
                (got - want.x).abs() <= want.e + 1e-37 || got == want.x
            };
            assert!(
                ok,
                "{who}: output {o} {index:?} is {got:e}, want {:e} +- {:e}\n{:?}\nins {:?}\nouts {:?}",
                want.x, want.e, case.program, case.ins, case.outs
            );
        }
    }
}

/// The case restricted to one row.
fn one_row(case: &Case, lead: &[usize]) -> Case {
    let rank = case.program.shape.len();
    let cut = |v: &View| {
        let mut v = v.clone();
        for a in 0..rank - 1 {
            if v.layout.shape.len() == rank && v.layout.shape[a] > 1 {
                v.layout = v.layout.slice(a, lead[a], lead[a] + 1);
            }
        }
        v
    };
    let mut program = case.program.clone();
    program.shape[..rank - 1].fill(1);
    Case {
        program,
        outs: case.outs.iter().map(cut).collect(),
        ins: case.ins.iter().map(cut).collect(),
        slabs: case.slabs.clone(),
    }
}

fn check(seed: u64) {
    let case = case(&mut Dice(seed));
    let truth = truth(&case);
    let who = format!("seed {seed}, reference");
    compare(&case, &truth, &after(&case, |m, c, o, i| run_reference(m, c, o, i).unwrap()), &who);
    for cpu in Cpu::all() {
        let run_on = |case: &Case, threads: usize| {
            let ctx = Context::new(threads, cpu);
            after(case, |m, c, o, i| run(&ctx, m, c, o, i).unwrap())
        };
        let got = run_on(&case, 1);
        compare(&case, &truth, &got, &format!("seed {seed}, {cpu}"));
        if case.program.shape.iter().product::<usize>() > 8192 {
            assert!(got == run_on(&case, 3), "seed {seed}, {cpu}: results depend on threads");
        }
        // A row alone gives the bits that it gives among others.
        let tells_rows = |i: &Instr| match *i {
            Instr::Random { .. } => true,
            Instr::Iota { axis } => axis + 1 != case.program.shape.len(),
            _ => false,
        };
        let sums = case.program.stores.iter().any(|s| s.2 == Store::ColumnSum);
        if sums || case.program.instrs.iter().any(tells_rows) || case.program.rows() < 2 {
            continue;
        }
        let lead: Vec<usize> = case.program.shape.iter().map(|n| n.saturating_sub(1)).collect();
        let rank = lead.len();
        let alone = one_row(&case, &lead[..rank - 1]);
        let row = run_on(&alone, 1);
        for (o, out) in alone.outs.iter().enumerate() {
            for c in 0..*out.layout.shape.last().unwrap() {
                let mut index = vec![0; rank];
                index[rank - 1] = c;
                let (a, b) = (element(&row, out, &index), element(&got, out, &index));
                assert!(
                    a.to_bits() == b.to_bits(),
                    "seed {seed}, {cpu}: output {o} column {c} is {a} alone, {b} among rows\n{:?}",
                    case.program
                );
            }
        }
    }
}

#[test]
fn every_path_gives_the_meaning() {
    for seed in 0..1500 {
        if std::panic::catch_unwind(|| check(seed)).is_err() {
            panic!("seed {seed}");
        }
    }
}
