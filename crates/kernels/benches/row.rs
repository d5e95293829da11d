//! Row programs: nanoseconds an element, best and median of many runs, and bytes moved a second.
//!
//! `cargo bench -p sparsam-kernels --bench row [-- NAME]`; `SPARSAM_SIMD`, `BENCH_THREADS`, `BENCH_SECONDS`.

mod programs;

use programs::*;
use sparsam_dtype::{DType, Layout};
use sparsam_kernels::row::{Code, Program, run};
use sparsam_kernels::{Context, Cpu, Memory, View};
use std::time::{Duration, Instant};

/// Seconds of the fastest run and of the median one.
fn best(mut run: impl FnMut()) -> (f64, f64) {
    let seconds = std::env::var("BENCH_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(0.3);
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

struct Bench {
    mem: Memory,
    outs: Vec<View>,
    ins: Vec<View>,
}

impl Bench {
    fn new() -> Bench {
        Bench { mem: Memory::new(), outs: Vec::new(), ins: Vec::new() }
    }

    /// A tensor of numbers in 0.1 .. 1 (integers: 0 or 1).
    fn tensor(&mut self, dtype: DType, shape: &[usize]) -> View {
        let n: usize = shape.iter().product();
        let slab = self.mem.add_owned(n * dtype.block_bytes());
        let bytes = self.mem.bytes_mut(slab).expect("owned");
        match dtype {
            DType::F32 => bytemuck::cast_slice_mut::<u8, f32>(bytes)
                .iter_mut()
                .enumerate()
                .for_each(|(i, x)| *x = 0.1 + ((i * 7919) % 9001) as f32 / 10_001.0),
            _ => bytes.fill(0),
        }
        View::contiguous(slab, dtype, shape)
    }

    fn input(&mut self, shape: &[usize]) -> &mut Bench {
        let v = self.tensor(DType::F32, shape);
        self.ins.push(v);
        self
    }

    /// An f32 vector or number repeated over the domain.
    fn repeated(&mut self, shape: &[usize], domain: &[usize]) -> &mut Bench {
        let mut v = self.tensor(DType::F32, shape);
        v.layout = v.layout.broadcast(domain);
        self.ins.push(v);
        self
    }

    fn output(&mut self, shape: &[usize]) -> &mut Bench {
        let v = self.tensor(DType::F32, shape);
        self.outs.push(v);
        self
    }

    /// Times `program` and prints a line; `moved` counts bytes for each element.
    fn run(&mut self, ctx: &Context, name: &str, program: &Program, moved: usize) {
        let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
        if !filters.is_empty() && !filters.iter().any(|f| name.contains(f.as_str())) {
            return;
        }
        let ins: Vec<&View> = self.ins.iter().collect();
        let outs: Vec<&View> = self.outs.iter().collect();
        let i: Vec<(DType, &Layout)> = ins.iter().map(|v| (v.dtype, &v.layout)).collect();
        let o: Vec<(DType, &Layout)> = outs.iter().map(|v| (v.dtype, &v.layout)).collect();
        let code = Code::new(program, &i, &o).expect("a good program");
        let elements = program.shape.iter().product::<usize>();
        // Short calls are timed in batches, as the clock takes 30 ns itself.
        let batch = (20_000 / elements).max(1);
        let mem = &mut self.mem;
        let (t, median) = best(|| {
            for _ in 0..batch {
                run(ctx, mem, &code, &outs, &ins).expect("views fit");
            }
        });
        let ns = 1e9 / batch as f64 / elements as f64;
        println!(
            "{name:36} {:7.3} ns/element, median {:7.3}; {:9.3} us a call, {:6.1} GB/s",
            t * ns,
            median * ns,
            t * 1e6 / batch as f64,
            moved as f64 / (t * ns)
        );
    }
}

fn main() {
    let threads = std::env::var("BENCH_THREADS").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    let ctx = Context::new(threads, Cpu::from_env().expect("SPARSAM_SIMD"));
    println!("{} threads, {}", ctx.pool().threads(), ctx.cpu());
    for (rows, width) in [(1, 576), (64, 576), (65536, 576), (1024, 768), (512, 4096)] {
        let shape = [rows, width];
        let mut b = Bench::new();
        b.input(&shape).repeated(&[1, width], &shape).output(&shape);
        b.run(&ctx, &format!("rms_norm {rows} x {width}"), &rms_norm(&shape), 8);
    }
    for (rows, width) in [(64, 768), (1024, 768)] {
        let shape = [rows, width];
        let mut b = Bench::new();
        b.input(&shape).repeated(&[1, width], &shape).repeated(&[1, width], &shape).output(&shape);
        b.run(&ctx, &format!("layer_norm {rows} x {width}"), &layer_norm(&shape), 8);
        let mut b = Bench::new();
        b.input(&shape).repeated(&[1, width], &shape).input(&shape).output(&shape).output(&[1, width]);
        b.run(&ctx, &format!("rms_norm_backward {rows} x {width}"), &rms_norm_backward(&shape), 12);
    }
    for (rows, width) in [(1, 1536), (16, 1536), (512, 1536), (16384, 1536)] {
        let shape = [rows, width];
        let mut b = Bench::new();
        b.input(&shape).input(&shape).output(&shape);
        b.run(&ctx, &format!("swiglu {rows} x {width}"), &swiglu(&shape), 12);
    }
    {
        // Both halves of one product: rows with a gap.
        let mut b = Bench::new();
        let both = b.tensor(DType::F32, &[64, 3072]);
        b.ins = [(0, 1536), (1536, 3072)]
            .map(|(from, to)| View { layout: both.layout.slice(1, from, to), ..both.clone() })
            .into();
        b.output(&[64, 1536]);
        b.run(&ctx, "swiglu of halves 64 x 1536", &swiglu(&[64, 1536]), 12);
    }
    for (name, program) in [("gelu", gelu as fn(&[usize]) -> Program), ("gelu_tanh", gelu_tanh)] {
        for rows in [8, 1024] {
            let shape = [rows, 3072];
            let mut b = Bench::new();
            b.input(&shape).output(&shape);
            b.run(&ctx, &format!("{name} {rows} x 3072"), &program(&shape), 8);
        }
    }
    for (rows, width) in [(64, 512), (64, 4096), (16, 49152)] {
        let shape = [rows, width];
        let mut b = Bench::new();
        b.input(&shape).output(&shape);
        b.run(&ctx, &format!("softmax {rows} x {width}"), &softmax(&shape), 8);
    }
    {
        let (rows, width) = (64, 50257);
        let shape = [rows, width];
        let mut b = Bench::new();
        b.input(&shape);
        let target = b.tensor(DType::I32, &[rows, 1]);
        b.ins.push(View { layout: target.layout.broadcast(&shape), ..target });
        b.output(&[rows, 1]);
        let logits = b.ins[0].clone();
        b.outs.push(logits);
        b.run(&ctx, &format!("cross_entropy in place {rows} x {width}"), &cross_entropy(&shape), 8);
    }
    for (tokens, heads) in [(1, 9), (512, 9), (512, 3)] {
        let half = [tokens, heads, 32];
        let mut b = Bench::new();
        let x = b.tensor(DType::F32, &[tokens, heads, 64]);
        let halves =
            [(0, 32), (32, 64)].map(|(from, to)| View { layout: x.layout.slice(2, from, to), ..x.clone() });
        b.outs = halves.to_vec();
        b.ins = halves.to_vec();
        b.repeated(&[tokens, 1, 32], &half).repeated(&[tokens, 1, 32], &half);
        b.run(&ctx, &format!("rotary in place {tokens} x {heads} x 64"), &rotary(&half), 16);
    }
    for n in [3000, 10_000_000] {
        let shape = [n];
        let mut b = Bench::new();
        b.input(&shape).input(&shape).input(&shape).input(&shape);
        b.repeated(&[1], &shape).repeated(&[1], &shape).repeated(&[1], &shape);
        b.outs = [0, 2, 3].map(|i| b.ins[i].clone()).to_vec();
        b.run(&ctx, &format!("adamw in place {n}"), &adamw(&shape), 28);
    }
    {
        let shape = [1024, 768];
        let mut b = Bench::new();
        b.input(&shape).output(&shape);
        let seed = b.tensor(DType::I32, &[2]);
        b.ins.push(seed);
        b.run(&ctx, "dropout 1024 x 768", &dropout(&shape, 0.1), 8);
    }
}
