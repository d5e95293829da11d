//! Plain products at the shapes of GPT-2's training: GFLOP/s and share of the measured peak.
//!
//! `cargo bench -p sparsam-kernels --bench matmul [-- NAME]`; `SPARSAM_SIMD`, `BENCH_THREADS`, `BENCH_SECONDS`.

mod common;

use common::{best, context, peak_f32, tensor, wanted};
use sparsam_dtype::DType;
use sparsam_kernels::{
    Memory, Precision, View,
    matmul::{Write, matmul},
};

/// A (or B) as it lies: N row after row, T as the transpose of such.
const SHAPES: [(&str, usize, usize, usize, [char; 2]); 16] = [
    ("512", 512, 512, 512, ['N', 'N']),
    ("1024", 1024, 1024, 1024, ['N', 'N']),
    ("up", 1024, 768, 3072, ['N', 'N']),
    ("up", 1024, 768, 3072, ['N', 'T']),
    ("down", 1024, 3072, 768, ['N', 'N']),
    ("down", 1024, 3072, 768, ['N', 'T']),
    ("qkv", 1024, 768, 2304, ['N', 'T']),
    ("grad up dW", 768, 1024, 3072, ['T', 'N']),
    ("grad down dW", 3072, 1024, 768, ['T', 'N']),
    ("head", 1024, 768, 50257, ['N', 'T']),
    ("head dW", 50257, 1024, 768, ['T', 'N']),
    ("adapter A", 1024, 768, 16, ['N', 'T']),
    ("adapter B", 1024, 16, 768, ['N', 'T']),
    ("M64", 64, 768, 3072, ['N', 'T']),
    ("M8", 8, 768, 3072, ['N', 'N']),
    ("M1", 1, 768, 3072, ['N', 'N']),
];

fn main() {
    let ctx = context();
    let peak = peak_f32(&ctx);
    println!("{} threads, {}; peak {peak:.0} GFLOP/s f32 (registers)", ctx.pool().threads(), ctx.cpu());
    let side = |mem: &mut Memory, r: usize, c: usize, how: char, seed: u64| match how {
        'N' => tensor(mem, &[r, c], seed),
        _ => {
            let v = tensor(mem, &[c, r], seed);
            View { layout: v.layout.permute(&[1, 0]), ..v }
        }
    };
    for precision in [Precision::F32, Precision::Bf16] {
        for (name, m, k, n, [ta, tb]) in SHAPES {
            let name = format!("{precision:?} {name} {m} x {k} x {n} {ta}{tb}");
            if !wanted(&name) {
                continue;
            }
            let mut mem = Memory::new();
            let (a, b) = (side(&mut mem, m, k, ta, 1), side(&mut mem, k, n, tb, 2));
            let out = View::contiguous(mem.add_owned(m * n * 4), DType::F32, &[m, n]);
            let (t, median) =
                best(|| matmul(&ctx, &mut mem, &out, &a, &b, precision, Write::Set).expect("shapes fit"));
            let flops = 2e-9 * (m * k * n) as f64;
            let (top, mid) = (flops / t, flops / median);
            println!(
                "{name:40} {top:7.1} GFLOP/s ({:3.0}% of f32 peak), median {mid:7.1}",
                100.0 * top / peak
            );
        }
    }
}
