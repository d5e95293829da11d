//! Runs instruction lists on one tile, with vectors.
//!
//! Each instruction is one loop over the rows of the tile and the vectors of a row. A row's last vector may be short:
//! it is loaded and stored under a mask, so every element goes through the same operations wherever it lies. Loops
//! are instantiated for vectors and numbers (narrow values, spread once a row) as arguments.

use super::code::{Ins, Op};
use crate::convert;
use crate::simd::{Vector, dispatch, math};
use sparsam_dtype::DType;

/// Where an operand of the current tile lies: row `(o, i)` starts `o * outer + i * inner` elements behind `ptr`.
#[derive(Clone, Copy)]
pub(super) struct Slot {
    pub ptr: *mut u8,
    pub outer: usize,
    pub inner: usize,
}

/// The current tile.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// `no x ni` rows of `w` elements.
    pub no: usize,
    pub ni: usize,
    pub w: usize,
    /// Columns before this piece.
    pub column: usize,
    /// Index of the first row in the domain, and rows from one `o` to the next.
    pub row: usize,
    pub row_outer: usize,
    /// Elements of a whole row.
    pub width: usize,
}

dispatch! {
    /// Runs `n` instructions on a tile.
    ///
    /// # Safety
    /// Every slot that they name is valid for the tile's rows and columns: readable if an argument, writable and
    /// touched by no other thread if a destination. Uniform and narrow slots are f32.
    pub(super) unsafe fn run(list: *const Ins, n: usize, slots: *const Slot, tile: &Tile) = run_list
}

/// One row's worth of an instruction: base pointers.
#[derive(Clone, Copy)]
struct Grid {
    no: usize,
    ni: usize,
    w: usize,
}

impl Slot {
    #[inline(always)]
    fn row(&self, o: usize, i: usize) -> *mut f32 {
        self.ptr.cast::<f32>().wrapping_add(o * self.outer + i * self.inner)
    }
}

/// An argument in the inner loop: a vector from memory, or one number.
#[inline(always)]
unsafe fn fetch<V: Vector, const VECTOR: bool>(p: *const f32, number: V, c: usize) -> V {
    // SAFETY: the caller stays within the row.
    unsafe { if VECTOR { V::load(p.add(c)) } else { number } }
}

#[inline(always)]
unsafe fn fetch_first<V: Vector, const VECTOR: bool>(p: *const f32, number: V, c: usize, n: usize) -> V {
    // SAFETY: the caller stays within the row.
    unsafe { if VECTOR { V::load_first(p.add(c), n) } else { number } }
}

/// The number at the start of a row if the argument is one, else 0, unread.
#[inline(always)]
unsafe fn number<V: Vector, const VECTOR: bool>(p: *const f32) -> V {
    // SAFETY: a narrow slot has a number for every row.
    unsafe { V::splat(if VECTOR { 0.0 } else { *p }) }
}

// The loops are macros and not functions of closures: a closure is compiled without the target's instructions, and one
// that holds an `exp` is too large to be taken into the loop afterwards (measured: 50 times slower).

/// `dst = body(x)`.
macro_rules! map1 {
    ($V:ident, $g:ident, $d:expr, $a:expr, |$x:ident| $body:expr) => {{
        let (d, a): (Slot, Slot) = ($d, $a);
        for o in 0..$g.no {
            for i in 0..$g.ni {
                let (pd, pa) = (d.row(o, i), a.row(o, i));
                let mut c = 0;
                while c + $V::LANES <= $g.w {
                    let $x = $V::load(pa.add(c));
                    $body.store(pd.add(c));
                    c += $V::LANES;
                }
                if c < $g.w {
                    let $x = $V::load_first(pa.add(c), $g.w - c);
                    $body.store_first(pd.add(c), $g.w - c);
                }
            }
        }
    }};
}

/// `dst = body(x, y, z)`, each a vector or a number as the constants say.
macro_rules! map3 {
    ($V:ident, $g:ident, $d:expr, $s:expr, $A:literal $B:literal $C:literal,
     |$x:ident, $y:ident, $z:ident| $body:expr) => {{
        let (d, [a, b, c]): (Slot, [Slot; 3]) = ($d, $s);
        for o in 0..$g.no {
            for i in 0..$g.ni {
                let (pd, pa, pb, pc) = (d.row(o, i), a.row(o, i), b.row(o, i), c.row(o, i));
                let (na, nb, nc) = (number::<$V, $A>(pa), number::<$V, $B>(pb), number::<$V, $C>(pc));
                let mut k = 0;
                while k + $V::LANES <= $g.w {
                    let $x = fetch::<$V, $A>(pa, na, k);
                    let $y = fetch::<$V, $B>(pb, nb, k);
                    let $z = fetch::<$V, $C>(pc, nc, k);
                    $body.store(pd.add(k));
                    k += $V::LANES;
                }
                if k < $g.w {
                    let n = $g.w - k;
                    let $x = fetch_first::<$V, $A>(pa, na, k, n);
                    let $y = fetch_first::<$V, $B>(pb, nb, k, n);
                    let $z = fetch_first::<$V, $C>(pc, nc, k, n);
                    $body.store_first(pd.add(k), n);
                }
            }
        }
    }};
}

/// `dst = body(x, y)`: the kind of each argument becomes a constant of the loop.
macro_rules! map2 {
    ($V:ident, $g:ident, $d:expr, $s:expr, $vector:expr, |$x:ident, $y:ident| $body:expr) => {{
        let s: [Slot; 3] = [$s[0], $s[1], $s[1]];
        match ($vector[0], $vector[1]) {
            (true, true) => map3!($V, $g, $d, s, true true true, |$x, $y, _z| $body),
            (true, false) => map3!($V, $g, $d, s, true false false, |$x, $y, _z| $body),
            (false, _) => map3!($V, $g, $d, s, false true true, |$x, $y, _z| $body),
        }
    }};
}

/// As `map2`, for products, whose first factor is a vector.
macro_rules! product3 {
    ($V:ident, $g:ident, $d:expr, $s:expr, $vector:expr, |$x:ident, $y:ident, $z:ident| $body:expr) => {
        match ($vector[1], $vector[2]) {
            (true, true) => map3!($V, $g, $d, $s, true true true, |$x, $y, $z| $body),
            (true, false) => map3!($V, $g, $d, $s, true true false, |$x, $y, $z| $body),
            (false, true) => map3!($V, $g, $d, $s, true false true, |$x, $y, $z| $body),
            (false, false) => map3!($V, $g, $d, $s, true false false, |$x, $y, $z| $body),
        }
    };
}

/// `sum = body(x, y, sum)` over each row, in one order for each width: four vectors in turn, then these folded.
macro_rules! sum2 {
    ($V:ident, $g:ident, $d:expr, $s:expr, $B:literal, |$x:ident, $y:ident, $sum:ident| $body:expr) => {{
        let (d, [a, b, _]): (Slot, [Slot; 3]) = ($d, $s);
        for o in 0..$g.no {
            for i in 0..$g.ni {
                let (pd, pa, pb) = (d.row(o, i), a.row(o, i), b.row(o, i));
                let nb = number::<$V, $B>(pb);
                let mut sums = [$V::splat(0.0); 4];
                let mut c = 0;
                while c + 4 * $V::LANES <= $g.w {
                    for each in &mut sums {
                        let ($x, $y, $sum) = ($V::load(pa.add(c)), fetch::<$V, $B>(pb, nb, c), *each);
                        *each = $body;
                        c += $V::LANES;
                    }
                }
                for each in &mut sums[..3] {
                    if c + $V::LANES <= $g.w {
                        let ($x, $y, $sum) = ($V::load(pa.add(c)), fetch::<$V, $B>(pb, nb, c), *each);
                        *each = $body;
                        c += $V::LANES;
                    }
                }
                if c < $g.w {
                    // Lanes past the end are 0 in `a`, but `b` may be an infinite number: they are left out.
                    let n = $g.w - c;
                    let ($x, $sum) = ($V::load_first(pa.add(c), n), sums[3]);
                    let $y = fetch_first::<$V, $B>(pb, nb, c, n);
                    let inside = $V::from_int($V::int_iota()).lt($V::splat(n as f32));
                    sums[3] = $V::select(inside, $body, sums[3]);
                }
                *pd = sums[0].add(sums[2]).add(sums[1].add(sums[3])).sum();
            }
        }
    }};
}

/// The largest element of each row; NaN if one is.
#[inline(always)]
unsafe fn max1<V: Vector>(g: Grid, d: Slot, a: Slot) {
    for o in 0..g.no {
        for i in 0..g.ni {
            let (pd, pa) = (d.row(o, i), a.row(o, i));
            let mut c = 0;
            // SAFETY: `c` stays within the row; see `run`.
            unsafe {
                let low = V::splat(f32::NEG_INFINITY);
                let mut max = [low; 2];
                let mut nan = low.lt(low);
                while c + 2 * V::LANES <= g.w {
                    let (x, y) = (V::load(pa.add(c)), V::load(pa.add(c + V::LANES)));
                    nan = V::or(nan, x.unordered(y));
                    max = [x.max_or(max[0]), y.max_or(max[1])];
                    c += 2 * V::LANES;
                }
                while c < g.w {
                    let n = (g.w - c).min(V::LANES);
                    let x = if n == V::LANES {
                        V::load(pa.add(c))
                    } else {
                        let inside = V::from_int(V::int_iota()).lt(V::splat(n as f32));
                        V::select(inside, V::load_first(pa.add(c), n), low)
                    };
                    nan = V::or(nan, x.unordered(x));
                    max[0] = x.max_or(max[0]);
                    c += n;
                }
                let mut lanes = [f32::NEG_INFINITY; 16];
                max[0].max_or(max[1]).store(lanes.as_mut_ptr());
                let most =
                    lanes[..V::LANES].iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
                *pd = if V::any(nan) { f32::NAN } else { most };
            }
        }
    }
}

/// 1 or 0.
#[inline(always)]
unsafe fn truth<V: Vector>(mask: V::Mask) -> V {
    // SAFETY: the caller has V's instructions.
    unsafe { V::select(mask, V::splat(1.0), V::splat(0.0)) }
}

/// As the scalar meaning: NaN on either side stays NaN.
#[inline(always)]
unsafe fn max<V: Vector>(a: V, b: V) -> V {
    // SAFETY: the caller has V's instructions.
    unsafe { V::select(a.unordered(a), a, a.max_or(b)) }
}

#[inline(always)]
unsafe fn min<V: Vector>(a: V, b: V) -> V {
    // SAFETY: the caller has V's instructions.
    unsafe { V::select(a.unordered(a), a, a.min_or(b)) }
}

/// See [`run`].
#[inline(always)]
unsafe fn run_list<V: Vector>(list: *const Ins, n: usize, slots: *const Slot, tile: &Tile) {
    // SAFETY: the whole function: see `run`.
    unsafe {
        for at in 0..n {
            let ins = &*list.add(at);
            let slot = |i: u16| *slots.add(i as usize);
            let d = slot(ins.dst);
            let s = ins.args.map(slot);
            let rows = tile.no * tile.ni;
            let g = if ins.narrow {
                Grid { no: 1, ni: 1, w: rows }
            } else if ins.flat {
                Grid { no: 1, ni: 1, w: rows * tile.w }
            } else {
                Grid { no: tile.no, ni: tile.ni, w: tile.w }
            };
            let v = ins.vector;
            macro_rules! unary {
                (|$x:ident| $body:expr) => {
                    map1!(V, g, d, s[0], |$x| $body)
                };
            }
            macro_rules! binary {
                (|$x:ident, $y:ident| $body:expr) => {
                    map2!(V, g, d, s, v, |$x, $y| $body)
                };
            }
            macro_rules! product {
                (|$x:ident, $y:ident, $z:ident| $body:expr) => {
                    product3!(V, g, d, s, v, |$x, $y, $z| $body)
                };
            }
            match ins.op {
                Op::Const(_) => {}
                Op::Load { dtype, step } => load::<V>(tile, ins.narrow, d, s[0], dtype, step),
                Op::Store { dtype, step, wide } => {
                    store::<V>(tile, d, s[0], ins.vector[0], dtype, step, wide)
                }
                Op::IotaColumn => {
                    for o in 0..tile.no {
                        for i in 0..tile.ni {
                            let p = d.row(o, i);
                            let mut c = 0;
                            while c < tile.w {
                                let at = V::int_add(V::int((tile.column + c) as i32), V::int_iota());
                                let n = (tile.w - c).min(V::LANES);
                                let y = V::from_int(at);
                                if n == V::LANES {
                                    y.store(p.add(c))
                                } else {
                                    y.store_first(p.add(c), n)
                                }
                                c += n;
                            }
                        }
                    }
                }
                Op::IotaRow { div, n } => {
                    let p = d.ptr.cast::<f32>();
                    for o in 0..tile.no {
                        for i in 0..tile.ni {
                            let row = tile.row + o * tile.row_outer + i;
                            *p.add(o * tile.ni + i) = (row / div % n) as f32;
                        }
                    }
                }
                Op::Random { stream, step, .. } => random::<V>(tile, d, s[0], stream, step),
                Op::Round(dtype) => round::<V>(g, d, s[0], dtype),
                Op::Neg => unary!(|x| x.neg()),
                Op::Abs => unary!(|x| x.abs()),
                Op::Recip => unary!(|x| V::splat(1.0).div(x)),
                Op::Sqrt => unary!(|x| x.sqrt()),
                Op::Exp => unary!(|x| math::exp(x)),
                Op::Log => unary!(|x| math::log(x)),
                Op::Sin => unary!(|x| math::sin(x)),
                Op::Cos => unary!(|x| math::cos(x)),
                Op::Tanh => unary!(|x| math::tanh(x)),
                Op::Erf => unary!(|x| math::erf(x)),
                Op::Floor => unary!(|x| x.floor()),
                Op::Sigmoid => unary!(|x| math::sigmoid(x)),
                Op::Silu => unary!(|x| x.mul(math::sigmoid(x))),
                Op::Add => binary!(|a, b| a.add(b)),
                Op::Sub => binary!(|a, b| a.sub(b)),
                Op::Mul => binary!(|a, b| a.mul(b)),
                Op::Div => binary!(|a, b| a.div(b)),
                Op::Max => binary!(|a, b| max(a, b)),
                Op::Min => binary!(|a, b| min(a, b)),
                Op::Less => binary!(|a, b| truth::<V>(a.lt(b))),
                Op::Equal => binary!(|a, b| truth::<V>(a.eq(b))),
                Op::ExpSub => binary!(|a, b| math::exp(a.sub(b))),
                Op::SiluMul => binary!(|a, b| a.mul(math::sigmoid(a)).mul(b)),
                Op::Fma => product!(|a, b, c| a.fma(b, c)),
                Op::Fms => product!(|a, b, c| a.fma(b, c.neg())),
                Op::Fnma => product!(|a, b, c| a.fnma(b, c)),
                Op::Mul3 => product!(|a, b, c| a.mul(b).mul(c)),
                Op::DivRoot => map3!(V, g, d, s, true true false, |a, b, c| a.div(b.sqrt().add(c))),
                Op::Select => select::<V>(g, d, s, v),
                Op::RowSum => sum2!(V, g, d, [s[0]; 3], true, |x, _y, sum| sum.add(x)),
                Op::RowMax => max1::<V>(g, d, s[0]),
                Op::RowDot if v[1] => sum2!(V, g, d, s, true, |x, y, sum| x.fma(y, sum)),
                Op::RowDot => sum2!(V, g, d, s, false, |x, y, sum| x.fma(y, sum)),
                Op::ColumnSum => column_sum::<V>(g, d, s[0], ins.vector[0]),
            }
        }
    }
}

/// `c != 0 ? a : b`; NaN counts as not 0.
#[inline(always)]
unsafe fn choose<V: Vector>(c: V, a: V, b: V) -> V {
    // SAFETY: the caller has V's instructions.
    unsafe { V::select(c.eq(V::splat(0.0)), b, a) }
}

/// `dst = c != 0 ? a : b`.
#[inline(always)]
unsafe fn select<V: Vector>(g: Grid, d: Slot, s: [Slot; 3], vector: [bool; 3]) {
    // SAFETY: the caller's contract.
    unsafe {
        match vector {
            [true, true, true] => map3!(V, g, d, s, true true true, |c, a, b| choose(c, a, b)),
            [true, true, false] => map3!(V, g, d, s, true true false, |c, a, b| choose(c, a, b)),
            [true, false, true] => map3!(V, g, d, s, true false true, |c, a, b| choose(c, a, b)),
            [true, false, false] => map3!(V, g, d, s, true false false, |c, a, b| choose(c, a, b)),
            [false, true, true] => map3!(V, g, d, s, false true true, |c, a, b| choose(c, a, b)),
            [false, true, false] => map3!(V, g, d, s, false true false, |c, a, b| choose(c, a, b)),
            [false, false, true] => map3!(V, g, d, s, false false true, |c, a, b| choose(c, a, b)),
            [false, false, false] => map3!(V, g, d, s, false false false, |c, a, b| choose(c, a, b)),
        }
    }
}

/// Adds the rows of a tile to the sums at `d`, in order.
#[inline(always)]
unsafe fn column_sum<V: Vector>(g: Grid, d: Slot, a: Slot, vector: bool) {
    let sums = d.ptr.cast::<f32>();
    // SAFETY: `c` stays within the row; see `run`.
    unsafe {
        if !vector {
            for o in 0..g.no {
                (0..g.ni).for_each(|i| *sums += *a.row(o, i));
            }
            return;
        }
        let mut c = 0;
        while c + V::LANES <= g.w {
            let mut sum = V::load(sums.add(c));
            for o in 0..g.no {
                for i in 0..g.ni {
                    sum = sum.add(V::load(a.row(o, i).add(c)));
                }
            }
            sum.store(sums.add(c));
            c += V::LANES;
        }
        if c < g.w {
            let n = g.w - c;
            let mut sum = V::load_first(sums.add(c), n);
            for o in 0..g.no {
                for i in 0..g.ni {
                    sum = sum.add(V::load_first(a.row(o, i).add(c), n));
                }
            }
            sum.store_first(sums.add(c), n);
        }
    }
}

/// Runs `full(c)` for whole vectors of `w` columns and `one(c)` for those left.
#[inline(always)]
fn columns<V: Vector>(w: usize, mut full: impl FnMut(usize), mut one: impl FnMut(usize)) {
    let mut c = 0;
    while c + V::LANES <= w {
        full(c);
        c += V::LANES;
    }
    (c..w).for_each(&mut one);
}

/// An input into a register, converted. Conversions are exact, so whole vectors and single elements agree.
#[inline(always)]
unsafe fn load<V: Vector>(tile: &Tile, narrow: bool, d: Slot, a: Slot, dtype: DType, step: usize) {
    let size = dtype.block_bytes();
    for o in 0..tile.no {
        for i in 0..tile.ni {
            let p = a.ptr.cast_const().wrapping_add((o * a.outer + i * a.inner) * size);
            // SAFETY: see `run`; columns stay within the row.
            unsafe {
                if narrow {
                    *d.ptr.cast::<f32>().add(o * tile.ni + i) = convert::get(dtype, p, 0);
                    continue;
                }
                let y = d.row(o, i);
                let one = |c: usize| *y.add(c) = convert::get(dtype, p, c * step);
                match (dtype, step) {
                    (DType::F32, _) => {
                        let p = p.cast::<f32>();
                        (0..tile.w).for_each(|c| *y.add(c) = *p.add(c * step));
                    }
                    (DType::BF16, 1) => {
                        let p = p.cast::<u16>();
                        columns::<V>(tile.w, |c| V::load_bf16(p.add(c)).store(y.add(c)), one);
                    }
                    (DType::F16, 1) => {
                        let p = p.cast::<u16>();
                        columns::<V>(tile.w, |c| V::load_f16(p.add(c)).store(y.add(c)), one);
                    }
                    (DType::I32, 1) => {
                        let p = p.cast::<i32>();
                        columns::<V>(tile.w, |c| V::from_int(V::int_load(p.add(c))).store(y.add(c)), one);
                    }
                    _ => (0..tile.w).for_each(one),
                }
            }
        }
    }
}

/// A register into an output, converted.
#[inline(always)]
unsafe fn store<V: Vector>(
    tile: &Tile,
    d: Slot,
    a: Slot,
    vector: bool,
    dtype: DType,
    step: usize,
    wide: bool,
) {
    let size = dtype.block_bytes();
    for o in 0..tile.no {
        for i in 0..tile.ni {
            let p = d.ptr.wrapping_add((o * d.outer + i * d.inner) * size);
            let x = a.row(o, i).cast_const();
            // SAFETY: see `run`; columns stay within the row.
            unsafe {
                if !vector {
                    let columns = if wide { tile.w } else { 1 };
                    (0..columns).for_each(|c| convert::set(dtype, p, c * step, *x));
                    continue;
                }
                let one = |c: usize| convert::set(dtype, p, c * step, *x.add(c));
                match (dtype, step) {
                    (DType::F32, 1) => {
                        let p = p.cast::<f32>();
                        columns::<V>(tile.w, |c| V::load(x.add(c)).store(p.add(c)), one);
                    }
                    (DType::BF16, 1) => {
                        let p = p.cast::<u16>();
                        columns::<V>(tile.w, |c| V::load(x.add(c)).store_bf16(p.add(c)), one);
                    }
                    (DType::F16, 1) => {
                        let p = p.cast::<u16>();
                        columns::<V>(tile.w, |c| V::load(x.add(c)).store_f16(p.add(c)), one);
                    }
                    _ => (0..tile.w).for_each(one),
                }
            }
        }
    }
}

/// To what a type holds and back.
#[inline(always)]
unsafe fn round<V: Vector>(g: Grid, d: Slot, a: Slot, dtype: DType) {
    let mut cells = [0u16; 16];
    for o in 0..g.no {
        for i in 0..g.ni {
            let (y, x) = (d.row(o, i), a.row(o, i));
            // SAFETY: see `run`; columns stay within the row, vectors within the cells.
            unsafe {
                let one = |c: usize| *y.add(c) = convert::round(dtype, *x.add(c));
                let cells = cells.as_mut_ptr();
                match dtype {
                    DType::BF16 => columns::<V>(
                        g.w,
                        |c| {
                            V::load(x.add(c)).store_bf16(cells);
                            V::load_bf16(cells).store(y.add(c));
                        },
                        one,
                    ),
                    DType::F16 => columns::<V>(
                        g.w,
                        |c| {
                            V::load(x.add(c)).store_f16(cells);
                            V::load_f16(cells).store(y.add(c));
                        },
                        one,
                    ),
                    _ => (0..g.w).for_each(one),
                }
            }
        }
    }
}

/// Philox 4x32-10 for each element, the counter its flat index in the domain; see the reference.
#[inline(always)]
unsafe fn random<V: Vector>(tile: &Tile, d: Slot, seed: Slot, stream: u32, step: usize) {
    // SAFETY: the seed's two words; see `run` for the rest.
    unsafe {
        let key = seed.ptr.cast::<i32>();
        let key = [*key, *key.add(step)];
        for o in 0..tile.no {
            for i in 0..tile.ni {
                let row = tile.row + o * tile.row_outer + i;
                let first = (row * tile.width + tile.column) as u64;
                let p = d.row(o, i);
                let mut c = 0;
                while c < tile.w {
                    let at = first + c as u64;
                    let y = philox::<V>(at, stream, key);
                    let n = (tile.w - c).min(V::LANES);
                    if n == V::LANES {
                        y.store(p.add(c))
                    } else {
                        y.store_first(p.add(c), n)
                    }
                    c += n;
                }
            }
        }
    }
}

/// Uniform numbers for the counters `at, at + 1, ..`.
#[inline(always)]
unsafe fn philox<V: Vector>(at: u64, stream: u32, key: [i32; 2]) -> V {
    // SAFETY: the caller has V's instructions.
    unsafe {
        // Low words, and a carry into the high words of lanes past a multiple of 2^32.
        let low = V::int_add(V::int(at as i32), V::int_iota());
        let room = u32::MAX - at as u32;
        let carry = if (room as usize) < V::LANES {
            V::to_int(truth::<V>(V::splat(room as f32).lt(V::from_int(V::int_iota()))))
        } else {
            V::int(0)
        };
        let mut c = [low, V::int_add(V::int((at >> 32) as i32), carry), V::int(stream as i32), V::int(0)];
        let mut key = key;
        for _ in 0..10 {
            let (high_a, low_a) = V::int_mul_wide(c[0], V::int(0xD251_1F53_u32 as i32));
            let (high_b, low_b) = V::int_mul_wide(c[2], V::int(0xCD9E_8D57_u32 as i32));
            c = [
                V::int_xor(V::int_xor(high_b, c[1]), V::int(key[0])),
                low_b,
                V::int_xor(V::int_xor(high_a, c[3]), V::int(key[1])),
                low_a,
            ];
            key = [key[0].wrapping_add(0x9E37_79B9_u32 as i32), key[1].wrapping_add(0xBB67_AE85_u32 as i32)];
        }
        V::from_int(V::int_shr_zero::<8>(c[0])).mul(V::splat(1.0 / (1 << 24) as f32))
    }
}
