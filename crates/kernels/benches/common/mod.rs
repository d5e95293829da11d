//! Shared by the benches: best-of-N timing and the machine's measured roofs.
#![allow(dead_code)] // each bench uses its part

use sparsam_dtype::DType;
use sparsam_kernels::{Context, Cpu, Memory, View};
use std::time::{Duration, Instant};

/// Seconds of the fastest of many runs: at least 5, for at least half a second (`BENCH_SECONDS`), and the median.
pub fn best(mut run: impl FnMut()) -> (f64, f64) {
    let seconds = std::env::var("BENCH_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(0.5);
    let (start, mut times) = (Instant::now(), Vec::new());
    run();
    while times.len() < 5 || start.elapsed() < Duration::from_secs_f64(seconds) {
        let t = Instant::now();
        run();
        times.push(t.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    (times[0], times[times.len() / 2])
}

/// Whether a line of this name was asked for: no argument, or one that it contains.
pub fn wanted(name: &str) -> bool {
    let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    filters.is_empty() || filters.iter().any(|f| name.contains(f.as_str()))
}

/// Instructions and threads to time: `SPARSAM_SIMD` and `BENCH_THREADS`, else all that the machine has.
pub fn context() -> Context {
    let threads = std::env::var("BENCH_THREADS").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    Context::new(threads, Cpu::from_env().expect("SPARSAM_SIMD"))
}

/// Numbers between -1 and 1.
pub fn numbers(n: usize, seed: u64) -> Vec<f32> {
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

/// A contiguous f32 tensor of numbers between -1 and 1.
pub fn tensor(mem: &mut Memory, shape: &[usize], seed: u64) -> View {
    let x = numbers(shape.iter().product(), seed);
    let slab = mem.add_owned(x.len() * 4);
    mem.bytes_mut(slab).expect("owned").copy_from_slice(bytemuck::cast_slice(&x));
    View::contiguous(slab, DType::F32, shape)
}

/// GFLOP/s of all threads with fused multiply-adds on registers alone.
pub fn peak_f32(ctx: &Context) -> f64 {
    const TURNS: usize = 1 << 20;
    let threads = ctx.pool().threads();
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        // SAFETY: the machine has the instructions.
        let (t, _) = best(|| ctx.pool().run(threads, |_| unsafe { fma_turns(TURNS) }));
        return (threads * TURNS * 12 * 8 * 2) as f64 / t / 1e9;
    }
    f64::NAN
}

/// 12 chains of 256-bit fused multiply-adds; AVX-512 runs at the same rate on Zen 4.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fma_turns(turns: usize) {
    use std::arch::x86_64::*;
    let mut acc = [_mm256_set1_ps(0.0); 12];
    let x = _mm256_set1_ps(std::hint::black_box(0.5));
    for _ in 0..turns {
        for a in &mut acc {
            *a = _mm256_fmadd_ps(x, x, *a);
        }
    }
    std::hint::black_box(acc);
}

/// GB/s of all threads reading memory that no cache holds.
pub fn read_bandwidth(ctx: &Context) -> f64 {
    let x = vec![1u64; 32 << 20];
    let parts = 64;
    let (t, _) = best(|| {
        ctx.pool().run(parts, |i| {
            let part = &x[i * x.len() / parts..(i + 1) * x.len() / parts];
            let mut sums = [0u64; 32];
            for line in part.chunks_exact(32) {
                for (s, v) in sums.iter_mut().zip(line) {
                    *s = s.wrapping_add(*v);
                }
            }
            std::hint::black_box(sums);
        });
    });
    (x.len() * 8) as f64 / t / 1e9
}
