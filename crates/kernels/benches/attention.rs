//! Attention of GPT-2's shape (12 heads of 64, one sequence) and decoding of SmolLM2's (9 heads over 3).
//!
//! `cargo bench -p sparsam-kernels --bench attention -- [fwd|fwdbwd|decode]`. Useful work as PyTorch's users count it:
//! the causal half of 2 products forward and of 4 more backward. Best of several runs, the spread beside it.

use sparsam_dtype::DType;
use sparsam_kernels::attention::{Packed, Paged, Saved, Scores, packed, packed_backward, paged};
use sparsam_kernels::{Context, Cpu, Memory, View};
use std::time::Instant;

fn random(mem: &mut Memory, dtype: DType, shape: &[usize]) -> View {
    let n: usize = shape.iter().product();
    let mut state = 1u32;
    let x: Vec<f32> = (0..n)
        .map(|_| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    let slab = mem.add_owned(n * dtype.block_bytes());
    sparsam_dtype::codec::encode(dtype, &x, mem.bytes_mut(slab).unwrap()).unwrap();
    View::contiguous(slab, dtype, shape)
}

fn ints(mem: &mut Memory, x: &[i32], shape: &[usize]) -> View {
    let slab = mem.add_owned(x.len() * 4);
    for (to, from) in mem.bytes_mut(slab).unwrap().chunks_mut(4).zip(x) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    View::contiguous(slab, DType::I32, shape)
}

/// Best and median seconds of runs that take about 2 seconds together, at least 3.
fn time(mut run: impl FnMut()) -> (f64, f64) {
    run();
    let mut seconds = vec![];
    let begin = Instant::now();
    while seconds.len() < 3 || begin.elapsed().as_secs_f64() < 2.0 {
        let start = Instant::now();
        run();
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    (seconds[0], seconds[seconds.len() / 2])
}

const SCORES: Scores = Scores { scale: 0.125, window: None, softcap: None };

fn training(ctx: &Context, dtype: DType, n: usize, backward: bool) {
    let (heads, dim) = (12, 64);
    let mut mem = Memory::new();
    let [q, k, v] = [(); 3].map(|_| random(&mut mem, dtype, &[n, heads, dim]));
    let [out, dout, dq, dk, dv] = [(); 5].map(|_| random(&mut mem, DType::F32, &[n, heads, dim]));
    let lse = random(&mut mem, DType::F32, &[n, heads]);
    let row_start = ints(&mut mem, &vec![0; n], &[n]);
    let a = Packed { q: &q, k: &k, v: &v, row_start: &row_start };
    let (best, median) = time(|| {
        packed(ctx, &mut mem, Some(&out), Some(&lse), a, &SCORES).unwrap();
        if backward {
            let saved = Saved { out: &out, lse: &lse, dout: &dout };
            packed_backward(ctx, &mut mem, [&dq, &dk, &dv], a, saved, &SCORES).unwrap();
        }
    });
    let what = if backward { "fwdbwd" } else { "fwd" };
    let flop = if backward { 6.0 } else { 2.0 } * (heads * n * n * dim) as f64;
    println!(
        "{what:7} {dtype:5} T {n:6}  best {best:8.4} s  median {median:8.4} s  {:6.1} useful GFLOP/s (best)",
        flop / best / 1e9
    );
}

fn decode(ctx: &Context, dtype: DType, context: usize, rows: usize) {
    let (heads, kv_heads, dim, page_size) = (9, 3, 64, 64);
    let mut mem = Memory::new();
    let pages = context.div_ceil(page_size);
    let q = random(&mut mem, DType::F32, &[rows, heads, dim]);
    let [k, v] = [(); 2].map(|_| random(&mut mem, dtype, &[rows * pages * page_size, kv_heads, dim]));
    let out = random(&mut mem, DType::F32, &[rows, heads, dim]);
    let positions = ints(&mut mem, &vec![context as i32 - 1; rows], &[rows]);
    let row_seq = ints(&mut mem, &(0..rows as i32).collect::<Vec<_>>(), &[rows]);
    let page_table = ints(&mut mem, &(0..(rows * pages) as i32).collect::<Vec<_>>(), &[rows, pages]);
    let a = Paged {
        q: &q,
        k: &k,
        v: &v,
        positions: &positions,
        row_seq: &row_seq,
        page_table: &page_table,
        page_size,
    };
    let (best, median) = time(|| paged(ctx, &mut mem, Some(&out), None, a, &SCORES).unwrap());
    let bytes = 2 * rows * context * kv_heads * dim * dtype.block_bytes();
    println!(
        "decode  {dtype:5} context {context:5}, {rows} rows  best {:7.1} us  median {:7.1} us  {:5.1} GB/s of cache",
        best * 1e6,
        median * 1e6,
        bytes as f64 / best / 1e9
    );
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let on = |name: &str| wanted.is_empty() || wanted.iter().any(|w| w == name);
    let lengths: Vec<usize> = wanted.iter().filter_map(|w| w.parse().ok()).collect();
    let lengths = if lengths.is_empty() { vec![1024, 4096, 8192, 16384] } else { lengths };
    let cpu = Cpu::from_env().unwrap();
    let ctx = Context::new(0, cpu);
    println!("{cpu}, {} threads", ctx.pool().threads());
    for dtype in [DType::F32, DType::BF16] {
        for (name, backward) in [("fwd", false), ("fwdbwd", true)] {
            if on(name) && (!on("f32") || dtype == DType::F32 || wanted.is_empty()) {
                lengths.iter().for_each(|&n| training(&ctx, dtype, n, backward));
            }
        }
    }
    if on("decode") {
        for dtype in [DType::F32, DType::F16] {
            for context in [512, 2048, 8192] {
                decode(&ctx, dtype, context, 1);
            }
            decode(&ctx, dtype, 512, 8);
        }
    }
}
