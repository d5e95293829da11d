use super::*;
use crate::Cpu;
use sparsam_dtype::{bf16, f16};

/// Numbers between -1 and 1 from a fixed recurrence.
pub(crate) fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

pub(crate) fn add_f32(mem: &mut Memory, x: &[f32]) -> usize {
    let slab = mem.add_owned(x.len() * 4);
    mem.bytes_mut(slab).unwrap().copy_from_slice(bytemuck::cast_slice(x));
    slab
}

/// How an operand lies in memory.
#[derive(Clone, Copy, Debug)]
enum How {
    Rows,
    Columns,
    Odd, // both strides above 1, start unaligned
}

fn view(slab: usize, dtype: DType, r: usize, c: usize, how: How) -> View {
    let layout = match how {
        How::Rows => Layout::contiguous(&[r, c]),
        How::Columns => Layout::contiguous(&[c, r]).permute(&[1, 0]),
        How::Odd => Layout { shape: vec![r, c], strides: vec![2 * c + 3, 2], offset: 1 },
    };
    View { slab, dtype, layout }
}

fn store(mem: &mut Memory, dtype: DType, x: &[f32], r: usize, c: usize, how: How) -> View {
    let v = view(0, dtype, r, c, how);
    let size = dtype.block_bytes();
    let slab = mem.add_owned(v.layout.end() * size);
    let bytes = mem.bytes_mut(slab).unwrap();
    for i in 0..r {
        for j in 0..c {
            let at = (v.layout.offset + i * v.layout.strides[0] + j * v.layout.strides[1]) * size;
            let x = x[i * c + j];
            match dtype {
                DType::F32 => bytes[at..at + 4].copy_from_slice(&x.to_le_bytes()),
                DType::F16 => bytes[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes()),
                _ => bytes[at..at + 2].copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
            }
        }
    }
    View { slab, ..v }
}

fn load(mem: &Memory, v: &View) -> Vec<f32> {
    let all: &[f32] = bytemuck::cast_slice(mem.bytes(v.slab));
    let l = &v.layout;
    let (r, c) = (l.shape[0], l.shape[1]);
    (0..r * c).map(|i| all[l.offset + i / c * l.strides[0] + i % c * l.strides[1]]).collect()
}

fn rounded(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Exact sums, and the worst error of a plain f32 loop with its terms' magnitude.
pub(crate) fn exact(a: &[f32], b: &[f32], m: usize, k: usize, n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut sum = vec![0.0f64; m * n];
    let mut magnitude = vec![0.0f64; m * n];
    for i in 0..m {
        for s in 0..k {
            for j in 0..n {
                let t = a[i * k + s] as f64 * b[s * n + j] as f64;
                sum[i * n + j] += t;
                magnitude[i * n + j] += t.abs();
            }
        }
    }
    (sum, magnitude)
}

/// Error of a plain f32 loop against exact sums: the largest, as a share of the terms' magnitude.
fn plain_error(a: &[f32], b: &[f32], m: usize, k: usize, n: usize) -> f64 {
    let (sum, mag) = exact(a, b, m, k, n);
    let mut worst = 0.0f64;
    for i in 0..m {
        for j in 0..n {
            let c = (0..k).fold(0.0f32, |c, s| c + a[i * k + s] * b[s * n + j]);
            worst = worst.max((c as f64 - sum[i * n + j]).abs() / mag[i * n + j].max(1e-30));
        }
    }
    worst
}

struct Case {
    m: usize,
    k: usize,
    n: usize,
    types: [DType; 2],
    how: [How; 3],
}

/// One product on one choice of instructions and threads.
fn run(case: &Case, a: &[f32], b: &[f32], cpu: Cpu, threads: usize, precision: Precision) -> Vec<f32> {
    let &Case { m, k, n, types, how } = case;
    let mut mem = Memory::new();
    let va = store(&mut mem, types[0], a, m, k, how[0]);
    let vb = store(&mut mem, types[1], b, k, n, how[1]);
    let vo = view(0, DType::F32, m, n, how[2]);
    let slab = mem.add_owned(vo.layout.end() * 4);
    mem.bytes_mut(slab).unwrap().fill(0x7f); // what is not written shows
    let vo = View { slab, ..vo };
    matmul(&Context::new(threads, cpu), &mut mem, &vo, &va, &vb, precision, Write::Set).unwrap();
    load(&mem, &vo)
}

fn check(case: &Case) {
    let &Case { m, k, n, types, how } = case;
    let a: Vec<f32> = numbers(m * k, 1).iter().map(|&x| rounded(types[0], x)).collect();
    let b: Vec<f32> = numbers(k * n, 2).iter().map(|&x| rounded(types[1], x)).collect();
    let (sum, mag) = exact(&a, &b, m, k, n);
    let round = |x: &[f32]| x.iter().map(|&x| rounded(DType::BF16, x)).collect::<Vec<_>>();
    let (sum16, _) = exact(&round(&a), &round(&b), m, k, n);
    let bound = 2.0 * plain_error(&a, &b, m, k, n).max(6e-8);
    for cpu in Cpu::all() {
        let what = format!("{m}x{k}x{n} {types:?} {how:?} {cpu}");
        let c = run(case, &a, &b, cpu, 1, Precision::F32);
        for (i, &c) in c.iter().enumerate() {
            let e = (c as f64 - sum[i]).abs();
            assert!(e <= bound * mag[i], "{what} f32 {i}: {c} not {} ({e:e}, {bound:e})", sum[i]);
        }
        assert!(c == run(case, &a, &b, cpu, 3, Precision::F32), "{what}: threads");
        // Against the exact product of the rounded numbers. The pair instruction rounds each pair's sum once more
        // and drops subnormal terms, hence the slack of k roundings.
        let c = run(case, &a, &b, cpu, 2, Precision::Bf16);
        for (i, &c) in c.iter().enumerate() {
            let e = (c as f64 - sum16[i]).abs();
            assert!(
                e <= (bound + k as f64 * 1.2e-7) * mag[i] + 1e-30,
                "{what} bf16 {i}: {c} not {}",
                sum16[i]
            );
        }
    }
}

#[test]
fn sizes_around_every_tile() {
    use How::*;
    for (m, k, n) in [
        (0, 3, 4),
        (3, 0, 4),
        (3, 4, 0),
        (1, 1, 1),
        (1, 37, 50),
        (3, 5, 16),
        (4, 256, 15),
        (5, 257, 17),
        (6, 255, 33),
        (7, 64, 31),
        (11, 33, 32),
        (12, 513, 48),
        (13, 64, 47),
        (25, 100, 129),
        (193, 40, 20),
        (50, 1, 70),
    ] {
        check(&Case { m, k, n, types: [DType::F32; 2], how: [Rows; 3] });
    }
}

#[test]
fn every_layout_and_type() {
    use How::*;
    for types in [[DType::F32, DType::F16], [DType::BF16, DType::F32], [DType::F32; 2]] {
        for a in [Rows, Columns, Odd] {
            for b in [Rows, Columns, Odd] {
                for out in [Rows, Columns, Odd] {
                    check(&Case { m: 14, k: 35, n: 19, types, how: [a, b, out] });
                }
            }
        }
    }
}

/// Large enough for several tasks, blocks of K and of N.
#[test]
fn several_blocks() {
    check(&Case { m: 200, k: 1100, n: 150, types: [DType::F32; 2], how: [How::Rows; 3] });
    check(&Case { m: 2, k: 3, n: 4100, types: [DType::F32; 2], how: [How::Columns; 3] });
    check(&Case { m: 3100, k: 3, n: 2, types: [DType::F32; 2], how: [How::Columns; 3] });
}

#[test]
fn a_rows_result_does_not_depend_on_the_others() {
    let (m, k, n) = (40, 1100, 50);
    let (a, b) = (numbers(m * k, 3), numbers(k * n, 4));
    for cpu in Cpu::all() {
        for precision in [Precision::F32, Precision::Bf16] {
            let case =
                |m, b_how| Case { m, k, n, types: [DType::F32; 2], how: [How::Rows, b_how, How::Rows] };
            let all = run(&case(m, How::Rows), &a, &b, cpu, 2, precision);
            for (first, rows) in [(0, 1), (17, 1), (3, 2), (5, 13), (1, 39)] {
                for how in [How::Rows, How::Columns] {
                    let part = &a[first * k..(first + rows) * k];
                    let some = run(&case(rows, how), part, &b, cpu, 2, precision);
                    assert!(
                        some == all[first * n..(first + rows) * n],
                        "{cpu} {precision:?} {first} {rows} {how:?}"
                    );
                }
            }
        }
    }
}

/// A narrow product is a part of a wide one, bit for bit.
#[test]
fn narrow_products_are_parts_of_wide_ones() {
    let (wide, k) = (150, 2 * KC + 33);
    let (a, b) = (numbers(wide * k, 3), numbers(k * wide, 4));
    for cpu in Cpu::all() {
        for precision in [Precision::F32, Precision::Bf16] {
            let case = |m, n, how| Case { m, k, n, types: [DType::F32; 2], how };
            let whole = run(&case(wide, wide, [How::Rows; 3]), &a, &b, cpu, 2, precision);
            for few in [1, 16, 21, 32] {
                let columns: Vec<f32> = b.chunks(wide).flat_map(|row| &row[..few]).copied().collect();
                for how in [How::Rows, How::Columns, How::Odd] {
                    let rows = run(&case(few, wide, [how, how, How::Rows]), &a, &b, cpu, 2, precision);
                    assert!(rows == whole[..few * wide], "{cpu} {precision:?} {few} rows {how:?}");
                    let cols =
                        run(&case(wide, few, [how, how, How::Columns]), &a, &columns, cpu, 2, precision);
                    let want = whole.chunks(wide).flat_map(|row| &row[..few]);
                    assert!(cols.iter().eq(want), "{cpu} {precision:?} {few} columns {how:?}");
                }
            }
        }
    }
}

/// Blocks of K added one call after the other are the blocks of one call, bit for bit.
#[test]
fn added_products_are_one_longer_product() {
    let (m, k, n) = (27, 2 * KC + 100, 45);
    let (a, b) = (numbers(m * k, 3), numbers(k * n, 4));
    for cpu in Cpu::all() {
        for (precision, first) in [(Precision::F32, KC), (Precision::Bf16, 2 * KC)] {
            for how in [How::Rows, How::Columns, How::Odd] {
                let case = Case { m, k, n, types: [DType::F32; 2], how: [How::Rows, How::Rows, how] };
                let whole = run(&case, &a, &b, cpu, 1, precision);
                let ctx = Context::new(2, cpu);
                let mut mem = Memory::new();
                let va = store(&mut mem, DType::F32, &a, m, k, How::Rows);
                let vb = store(&mut mem, DType::F32, &b, k, n, How::Rows);
                let vo = view(0, DType::F32, m, n, how);
                let slab = mem.add_owned(vo.layout.end() * 4);
                let vo = View { slab, ..vo };
                let part = |from: usize, to: usize| {
                    let of = |v: &View, axis| View { layout: v.layout.slice(axis, from, to), ..v.clone() };
                    (of(&va, 1), of(&vb, 0))
                };
                let ((a0, b0), (a1, b1)) = (part(0, first), part(first, k));
                matmul(&ctx, &mut mem, &vo, &a0, &b0, precision, Write::Set).unwrap();
                matmul(&ctx, &mut mem, &vo, &a1, &b1, precision, Write::Add).unwrap();
                matmul(&ctx, &mut mem, &vo, &part(k, k).0, &part(k, k).1, precision, Write::Add).unwrap();
                assert!(load(&mem, &vo) == whole, "{cpu} {precision:?} {how:?}");
            }
        }
    }
}

#[test]
fn batches_and_repeated_operands() {
    let (batch, m, k, n) = (5, 7, 20, 18);
    let (a, b) = (numbers(batch * m * k, 5), numbers(k * n, 6));
    for cpu in Cpu::all() {
        let ctx = Context::new(2, cpu);
        let mut mem = Memory::new();
        let (sa, sb) = (add_f32(&mut mem, &a), add_f32(&mut mem, &b));
        let so = mem.add_owned(batch * m * n * 4);
        let out = View::contiguous(so, DType::F32, &[batch, m, n]);
        let va = View::contiguous(sa, DType::F32, &[batch, m, k]);
        let mut vb = View::contiguous(sb, DType::F32, &[1, k, n]);
        vb.layout = vb.layout.broadcast(&[batch, k, n]);
        matmul(&ctx, &mut mem, &out, &va, &vb, Precision::F32, Write::Set).unwrap();
        let whole = Case { m: batch * m, k, n, types: [DType::F32; 2], how: [How::Rows; 3] };
        assert!(mem.f32(&out).unwrap() == run(&whole, &a, &b, cpu, 1, Precision::F32));
    }
}

#[test]
fn wrong_operands_are_errors() {
    let ctx = Context::new(1, Cpu::SCALAR);
    let mut mem = Memory::new();
    let s: Vec<usize> = (0..3).map(|_| mem.add_owned(4 * 64)).collect();
    let v = |i: usize, shape: &[usize]| View::contiguous(s[i], DType::F32, shape);
    let mut go = |o: &View, a: &View, b: &View| matmul(&ctx, &mut mem, o, a, b, Precision::F32, Write::Set);
    assert!(go(&v(0, &[2, 4]), &v(1, &[2, 3]), &v(2, &[3, 4])).is_ok());
    assert!(matches!(go(&v(0, &[2, 4]), &v(1, &[2, 3]), &v(2, &[4, 4])), Err(Error::Shape { .. })));
    assert!(matches!(go(&v(0, &[4]), &v(1, &[3]), &v(2, &[3])), Err(Error::Shape { .. })));
    let ints = View { dtype: DType::I32, ..v(1, &[2, 3]) };
    assert!(matches!(go(&v(0, &[2, 4]), &ints, &v(2, &[3, 4])), Err(Error::View { .. })));
    let mut twice = v(0, &[1, 4]);
    twice.layout = twice.layout.broadcast(&[2, 4]);
    assert!(matches!(go(&twice, &v(1, &[2, 3]), &v(2, &[3, 4])), Err(Error::View { .. })));
}
