use super::*;
use crate::Cpu;
use crate::matmul::tests::{add_f32, exact, numbers};

/// Bytes of a random weight whose scales are tame, and the numbers they stand for.
pub(super) fn weight(dtype: DType, rows: usize, cols: usize, seed: u64) -> (Vec<u8>, Vec<f32>) {
    let x = numbers(rows * cols, seed);
    let mut bytes = vec![0; dtype.bytes_for(rows * cols).unwrap()];
    if codec::can_encode(dtype) {
        codec::encode(dtype, &x, &mut bytes).unwrap();
    } else {
        // Random codes; the f16 and f32 fields overwritten with small numbers.
        for (b, v) in bytes.iter_mut().zip(numbers(rows * dtype.bytes_for(cols).unwrap(), seed + 1)) {
            *b = (v * 128.0 + 128.0) as u8;
        }
        let halves = halves(dtype);
        for (i, block) in bytes.chunks_mut(dtype.block_bytes()).enumerate() {
            let scale = 0.01 * (1.0 + x[i]);
            for &at in halves {
                block[at..at + 2].copy_from_slice(&sparsam_dtype::f16::from_f32(scale).to_le_bytes());
            }
            if dtype == DType::Q8_K {
                block[..4].copy_from_slice(&scale.to_le_bytes());
            }
        }
    }
    let mut decoded = vec![0.0; rows * cols];
    codec::decode(dtype, &bytes, &mut decoded).unwrap();
    (bytes, decoded)
}

/// Where blocks have f16 scales and minima.
pub(super) fn halves(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::Q4_1 | DType::Q5_1 | DType::S2_64 | DType::Q8_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
        DType::Q8_K => &[],
        _ if dtype.is_block() => &[0],
        _ => &[],
    }
}

pub(super) fn types() -> impl Iterator<Item = DType> {
    DType::ALL.into_iter().filter(|&d| codec::can_decode(d) && !d.is_state())
}

/// `a` times the transpose of each weight.
pub(super) fn product(
    cpu: Cpu,
    threads: usize,
    a: &[f32],
    m: usize,
    ws: &[&Weight],
    precision: Precision,
) -> Vec<Vec<f32>> {
    let mut mem = Memory::new();
    let k = ws[0].cols();
    let a = View::contiguous(add_f32(&mut mem, a), DType::F32, &[m, k]);
    let outs: Vec<View> = ws
        .iter()
        .map(|w| {
            let slab = mem.add_owned(4 * m * w.rows());
            mem.bytes_mut(slab).unwrap().fill(0x7f);
            View::contiguous(slab, DType::F32, &[m, w.rows()])
        })
        .collect();
    let views: Vec<&View> = outs.iter().collect();
    matmul(&Context::new(threads, cpu), &mut mem, &views, &a, ws, precision).unwrap();
    outs.iter().map(|o| mem.f32(o).unwrap().to_vec()).collect()
}

pub(super) fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
}

#[test]
fn packing_loses_nothing() {
    for dtype in types() {
        for (rows, blocks) in [(1, 1), (15, 3), (16, 2), (35, 3)] {
            let cols = blocks * dtype.block_len();
            let (bytes, decoded) = weight(dtype, rows, cols, 7);
            let w = Weight::pack(dtype, rows, cols, &bytes).unwrap();
            let mut all = vec![0.0; rows * cols];
            w.decode_rows(0, &mut all).unwrap();
            assert!(all == decoded, "{dtype} {rows} x {cols}");
            let mut last = vec![0.0; cols];
            w.decode_rows(rows - 1, &mut last).unwrap();
            assert!(last == decoded[(rows - 1) * cols..], "{dtype}: last row");
            // Panels, by every version.
            for cpu in Cpu::all() {
                for p in 0..w.panels() {
                    let mut out = vec![0.0; cols * PANEL];
                    w.decode_panel(cpu, p, 0, cols, &mut out);
                    for (i, &v) in out.iter().enumerate() {
                        let (k, row) = (i / PANEL, p * PANEL + i % PANEL);
                        let want = if row < rows { decoded[row * cols + k] } else { 0.0 };
                        assert!(v == want, "{dtype} {cpu} row {row} k {k}: {v} not {want}");
                    }
                }
            }
        }
    }
}

#[test]
fn f32_products_are_those_of_the_decoded_weight() {
    for dtype in types() {
        for (m, n, blocks) in [(1, 1, 1), (1, 70, 5), (3, 16, 2), (13, 33, 9), (12, 100, 1)] {
            let k = blocks * dtype.block_len().max(32) + if dtype.is_block() { 0 } else { 5 };
            let (bytes, decoded) = weight(dtype, n, k, 9);
            let w = Weight::pack(dtype, n, k, &bytes).unwrap();
            let a = numbers(m * k, 10);
            let b = transposed(&decoded, n, k);
            for cpu in Cpu::all() {
                for precision in [Precision::F32, Precision::Bf16] {
                    let got = &product(cpu, 2, &a, m, &[&w], precision)[0];
                    // The plain product has the same blocks and chains.
                    let mut mem = Memory::new();
                    let va = View::contiguous(add_f32(&mut mem, &a), DType::F32, &[m, k]);
                    let vb = View::contiguous(add_f32(&mut mem, &b), DType::F32, &[k, n]);
                    let vo = View::contiguous(mem.add_owned(4 * m * n), DType::F32, &[m, n]);
                    let ctx = Context::new(1, cpu);
                    matmul::matmul(&ctx, &mut mem, &vo, &va, &vb, precision, matmul::Write::Set).unwrap();
                    assert!(got == mem.f32(&vo).unwrap(), "{dtype} {m} {n} {k} {cpu} {precision:?}");
                }
            }
        }
    }
}

#[test]
fn several_weights_rows_and_threads_change_nothing() {
    let k = 1536;
    let ws: Vec<Weight> =
        [(DType::Q4_0, 40), (DType::F16, 17), (DType::Q8_0, 64), (DType::F32, 3), (DType::Q4_1, 50)]
            .into_iter()
            .map(|(d, n)| Weight::pack(d, n, k, &weight(d, n, k, 11).0).unwrap())
            .collect();
    let all: Vec<&Weight> = ws.iter().collect();
    let m = 50;
    let a = numbers(m * k, 12);
    for cpu in Cpu::all() {
        for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
            let whole = product(cpu, 3, &a, m, &all, precision);
            for (first, rows) in [(0, 1), (7, 1), (3, 2), (9, 13), (1, 49)] {
                let part = product(cpu, 1, &a[first * k..(first + rows) * k], rows, &all, precision);
                for ((w, whole), part) in ws.iter().zip(&whole).zip(&part) {
                    let n = w.rows();
                    assert!(
                        *part == whole[first * n..(first + rows) * n],
                        "{cpu} {precision:?} {w:?} {first} {rows}"
                    );
                }
            }
        }
    }
}

#[test]
fn transposed_products() {
    for dtype in types() {
        for (m, n, blocks) in [(1, 1, 1), (5, 17, 2), (13, 290, 1), (2, 513, 1), (40, 32, 3)] {
            let k = blocks * dtype.block_len() + if dtype.is_block() { 0 } else { 20 };
            let (bytes, decoded) = weight(dtype, n, k, 13);
            let w = Weight::pack(dtype, n, k, &bytes).unwrap();
            let a = numbers(m * n, 14);
            for cpu in Cpu::all() {
                for precision in [Precision::F32, Precision::Bf16] {
                    let mut mem = Memory::new();
                    let va = View::contiguous(add_f32(&mut mem, &a), DType::F32, &[m, n]);
                    let vb = View::contiguous(add_f32(&mut mem, &decoded), DType::F32, &[n, k]);
                    let [o, p] =
                        [0; 2].map(|_| View::contiguous(mem.add_owned(4 * m * k), DType::F32, &[m, k]));
                    let ctx = Context::new(2, cpu);
                    matmul_t(&ctx, &mut mem, &o, &va, &w, precision).unwrap();
                    matmul::matmul(&ctx, &mut mem, &p, &va, &vb, precision, matmul::Write::Set).unwrap();
                    let (o, p) = (mem.f32(&o).unwrap(), mem.f32(&p).unwrap());
                    assert!(o == p, "{dtype} {m} {n} {k} {cpu} {precision:?}");
                }
            }
        }
    }
}

#[test]
fn odd_outputs() {
    let (m, n, k) = (7, 37, 64);
    let (bytes, decoded) = weight(DType::Q4_1, n, k, 15);
    let w = Weight::pack(DType::Q4_1, n, k, &bytes).unwrap();
    let a = numbers(m * k, 16);
    for cpu in Cpu::all() {
        for precision in [Precision::F32, Precision::Int8] {
            let want = product(cpu, 1, &a, m, &[&w], precision);
            let mut mem = Memory::new();
            let va = View::contiguous(add_f32(&mut mem, &a), DType::F32, &[m, k]);
            let slab = mem.add_owned(4 * 5000);
            let mut vo = View::contiguous(slab, DType::F32, &[m, n]);
            vo.layout.strides = vec![3, 100];
            vo.layout.offset = 1;
            matmul(&Context::new(2, cpu), &mut mem, &[&vo], &va, &[&w], precision).unwrap();
            let all: &[f32] = bytemuck::cast_slice(mem.bytes(slab));
            for i in 0..m * n {
                assert_eq!(all[1 + i / n * 3 + i % n * 100], want[0][i], "{cpu} {precision:?}");
            }
        }
    }
    // Against exact sums, so that `product` itself is held to something.
    let (sum, mag) = exact(&a, &transposed(&decoded, n, k), m, k, n);
    for (i, &c) in product(Cpu::SCALAR, 1, &a, m, &[&w], Precision::F32)[0].iter().enumerate() {
        assert!((c as f64 - sum[i]).abs() <= 1e-6 * mag[i], "{i}");
    }
}

#[test]
fn gather_decodes_rows_and_refuses_others() {
    for dtype in [DType::Q8_0, DType::F16, DType::Q4_0, DType::BF16] {
        let (n, k) = (50, 64);
        let (bytes, decoded) = weight(dtype, n, k, 17);
        let w = Weight::pack(dtype, n, k, &bytes).unwrap();
        let ctx = Context::new(2, Cpu::SCALAR);
        let mut mem = Memory::new();
        let rows: Vec<i32> = (0..400).map(|i| i * 7 % 50).collect();
        let slab = mem.add_owned(1600);
        mem.bytes_mut(slab).unwrap().copy_from_slice(bytemuck::cast_slice(&rows));
        let vr = View::contiguous(slab, DType::I32, &[400]);
        let vo = View::contiguous(mem.add_owned(400 * k * 4), DType::F32, &[400, k]);
        gather(&ctx, &mut mem, &vo, &vr, &w).unwrap();
        for (i, row) in mem.f32(&vo).unwrap().chunks(k).enumerate() {
            assert_eq!(row, &decoded[rows[i] as usize * k..][..k]);
        }
        for bad in [-1i32, 50] {
            mem.bytes_mut(slab).unwrap()[8..12].copy_from_slice(&bad.to_le_bytes());
            let e = gather(&ctx, &mut mem, &vo, &vr, &w).unwrap_err().to_string();
            assert!(e.contains(&format!("row {bad} (entry 2)")), "{e}");
        }
    }
}

#[test]
fn wrong_weights_are_errors() {
    for (dtype, rows, cols, len) in [
        (DType::I32, 2, 2, 16),
        (DType::Q4_0, 2, 33, 36),
        (DType::Q4_0, 2, 32, 35),
        (DType::F32, usize::MAX, 8, 32),
        (DType::F32, 3, usize::MAX, 32),
    ] {
        assert!(matches!(Weight::pack(dtype, rows, cols, &vec![0; len]), Err(Error::Shape { .. })));
    }
    let w = Weight::pack(DType::F32, 2, 2, &[0; 16]).unwrap();
    assert!(w.decode_rows(1, &mut [0.0; 4]).is_err());
    assert!(w.decode_rows(0, &mut [0.0; 3]).is_err());
    assert!(w.decode_rows(usize::MAX, &mut [0.0; 2]).is_err());
    let empty = Weight::pack(DType::F32, 0, 5, &[]).unwrap();
    assert_eq!(empty.bytes(), 0);
}
