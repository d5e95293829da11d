//! Packed weights at the shapes of SmolLM2-135M: one token (GB/s of weights) and a prompt of 512 (GOP/s); and each type that
//! is written, one row against more weights than caches hold, beside the roof (`one row`).
//!
//! `cargo bench -p sparsam-kernels --bench weight [-- NAME]`; `SPARSAM_SIMD`, `BENCH_THREADS`, `BENCH_SECONDS`,
//! `BENCH_ROWS`.

mod common;

use common::{best, context, numbers, read_bandwidth, tensor, wanted};
use sparsam_dtype::{DType, codec};
use sparsam_kernels::weight::{Weight, matmul, matmul_t};
use sparsam_kernels::{Context, Memory, Pages, Precision, View};

const LAYERS: usize = 30;

/// Weights of one layer that share an activation: outputs of each, and inputs.
const GROUPS: [(&[usize], usize); 4] =
    [(&[576, 192, 192], 576), (&[576], 576), (&[1536, 1536], 576), (&[576], 1536)];

fn weight(pages: &mut Pages, dtype: DType, rows: usize, cols: usize, seed: u64) -> Weight {
    let len = dtype.bytes_for(rows * cols).expect("whole blocks");
    let mut bytes = vec![0; len];
    if codec::can_encode(dtype) {
        codec::encode(dtype, &numbers(rows * cols, seed), &mut bytes).expect("lengths fit");
    } else {
        bytes = numbers(len, seed).iter().map(|v| (v * 128.0 + 128.0) as u8).collect();
    }
    Weight::pack_in(pages, dtype, rows, cols, &bytes).expect("a whole matrix")
}

/// One model: groups of weights over one activation, layer after layer, and the head.
struct Model {
    groups: Vec<Vec<Weight>>,
    head: Option<Weight>,
}

impl Model {
    fn new(dtype: DType, head: Option<DType>) -> Model {
        let fits = |k: usize| k.is_multiple_of(dtype.block_len());
        let pages = &mut Pages::default();
        let groups = (0..LAYERS)
            .flat_map(|l| GROUPS.map(|g| (l, g)))
            .filter(|(_, (_, k))| fits(*k))
            .map(|(l, (rows, k))| rows.iter().map(|&n| weight(pages, dtype, n, k, l as u64)).collect())
            .collect();
        Model { groups, head: head.map(|d| weight(pages, d, 49152, 576, 99)) }
    }

    fn weights(&self) -> impl Iterator<Item = &Weight> {
        self.groups.iter().flatten().chain(&self.head)
    }

    /// Best and median seconds for all products with `m` rows of activations.
    fn time(&self, ctx: &Context, m: usize, precision: Precision) -> (f64, f64) {
        // Activations and results lie in a small arena that stays in cache, as in an engine.
        let mut mem = Memory::new();
        let widest = self.weights().map(Weight::rows).max().unwrap_or(0).max(3072);
        let slab = mem.add_owned(m * widest * 4);
        let inputs = [576, 1536].map(|k| tensor(&mut mem, &[m, k], 5));
        let groups = self.groups.iter().map(|g| g.iter().collect::<Vec<_>>());
        let sets: Vec<(&View, Vec<View>, Vec<&Weight>)> = groups
            .chain(self.head.iter().map(|h| vec![h]))
            .map(|ws| {
                let a =
                    inputs.iter().find(|a| a.layout.shape[1] == ws[0].cols()).expect("one of the two widths");
                let mut offset = 0;
                let out = |w: &&Weight| {
                    let mut out = View::contiguous(slab, DType::F32, &[m, w.rows()]);
                    out.layout.offset = offset;
                    offset += m * w.rows();
                    out
                };
                let outs = ws.iter().map(out).collect();
                (a, outs, ws)
            })
            .collect();
        best(|| {
            for (a, outs, ws) in &sets {
                let outs: Vec<&View> = outs.iter().collect();
                matmul(ctx, &mut mem, &outs, a, ws, precision).expect("shapes fit");
            }
        })
    }
}

/// The types that `sparsam quantize` writes, from the smallest.
const WRITTEN: [DType; 15] = [
    DType::S2_64,
    DType::Q2_K,
    DType::S3_64,
    DType::Q3_K,
    DType::S4_64,
    DType::IQ4_XS,
    DType::Q4_0,
    DType::IQ4_NL,
    DType::Q4_K,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_K,
    DType::Q5_1,
    DType::Q6_K,
    DType::Q8_0,
];

/// Matrices of one type that take three times a large cache together, their numbers the same few rows again and again; with
/// `BENCH_ROWS` one matrix of so many rows, to see what kernels do in cache.
fn cold(dtype: DType) -> Vec<Weight> {
    const BYTES: usize = 96 << 20;
    const COLS: usize = 2048;
    let few = std::env::var("BENCH_ROWS").ok().and_then(|rows| rows.parse::<usize>().ok());
    let rows = few.unwrap_or(4096).next_multiple_of(16);
    let pages = &mut Pages::default();
    let mut bytes = vec![0; dtype.bytes_for(16 * COLS).expect("whole blocks")];
    codec::encode(dtype, &numbers(16 * COLS, 7), &mut bytes).expect("a type that is written");
    let bytes = bytes.repeat(rows / 16);
    let count = few.map_or(BYTES.div_ceil(bytes.len()), |_| 1);
    let pack = |_| Weight::pack_in(pages, dtype, rows, COLS, &bytes).expect("a whole matrix");
    (0..count).map(pack).collect()
}

/// Speed of `m` rows with 8-bit activations against cold weights.
fn streams(ctx: &Context, m: usize, roof: f64) {
    let of = if m == 1 { "one row".to_string() } else { format!("{m} rows") };
    for dtype in WRITTEN {
        let name = format!("{dtype} {of}");
        if !wanted(&name) {
            continue;
        }
        let ws = cold(dtype);
        let mut mem = Memory::new();
        let a = tensor(&mut mem, &[m, ws[0].cols()], 5);
        let out = View::contiguous(mem.add_owned(m * ws[0].rows() * 4), DType::F32, &[m, ws[0].rows()]);
        let bytes: usize = ws.iter().map(Weight::bytes).sum();
        let (t, median) = best(|| {
            for w in &ws {
                matmul(ctx, &mut mem, &[&out], &a, &[w], Precision::Int8).expect("shapes fit");
            }
        });
        let gb = bytes as f64 / 1e9;
        println!(
            "{name:14} {:5.1} GB/s (median {:5.1}), {:3.0}% of memory",
            gb / t,
            gb / median,
            100.0 * gb / t / roof
        );
    }
}

fn main() {
    let ctx = context();
    let roof = read_bandwidth(&ctx);
    println!("{} threads, {}; {roof:.1} GB/s read from memory", ctx.pool().threads(), ctx.cpu());
    use DType::*;
    use Precision::{Bf16, Int8};
    [1, 2, 3, 4].into_iter().for_each(|m| streams(&ctx, m, roof));
    let sets = [
        (Q4_0, Int8),
        (Q4_1, Int8),
        (Q5_0, Int8),
        (Q5_1, Int8),
        (Q8_0, Int8),
        (IQ4_NL, Int8),
        (Q4_K, Int8),
        (Q5_K, Int8),
        (Q6_K, Int8),
        (Q4_0, Precision::F32),
        (Q4_1, Precision::F32),
        (Q8_0, Precision::F32),
        (Q4_K, Precision::F32),
        (F16, Precision::F32),
        (BF16, Precision::F32),
        (F32, Precision::F32),
        (Q4_0, Bf16),
        (BF16, Bf16),
    ];
    for (dtype, precision) in sets {
        for m in [1, 8, 512] {
            let name = format!("{dtype} {precision:?} M={m}");
            if !wanted(&name) {
                continue;
            }
            let plain = if dtype.is_block() { Q8_0 } else { dtype };
            let model = Model::new(dtype, (m == 1).then_some(plain));
            let bytes: usize = model.weights().map(Weight::bytes).sum();
            let elements: usize = model.weights().map(|w| w.rows() * w.cols()).sum();
            let (t, median) = model.time(&ctx, m, precision);
            let (gb, gop) = (bytes as f64 / t / 1e9, 2e-9 * (m * elements) as f64 / t);
            println!(
                "{name:20} {:8.0} tokens/s (median {:8.0}), {gb:5.1} GB/s ({:3.0}% of memory), {gop:6.1} GOP/s",
                m as f64 / t,
                m as f64 / median,
                100.0 * gb / roof
            );
        }
    }
    if wanted("region") {
        let regions = || {
            (0..1000).for_each(|_| {
                ctx.pool().run(16, |i| {
                    std::hint::black_box(i);
                })
            })
        };
        let (t, median) = best(regions);
        println!("region of 16 empty tasks: {:.2} us, median {:.2}", t * 1e3, median * 1e3);
    }
    if wanted("small") {
        for rows in [16, 64, 256] {
            let w = weight(&mut Pages::default(), Q4_1, rows, 576, 3);
            let mut mem = Memory::new();
            let a = tensor(&mut mem, &[1, 576], 4);
            let out = View::contiguous(mem.add_owned(1536 * 4), F32, &[1, rows]);
            let (t, median) = best(|| matmul(&ctx, &mut mem, &[&out], &a, &[&w], Int8).expect("shapes fit"));
            println!("small {rows} rows: {:.2} us, median {:.2}", t * 1e6, median * 1e6);
        }
    }
    for dtype in [Q4_0, Q4_1, Q8_0] {
        let name = format!("{dtype} in cache");
        if wanted(&name) {
            let w = weight(&mut Pages::default(), dtype, 1536, 576, 3);
            let mut mem = Memory::new();
            let a = tensor(&mut mem, &[1, 576], 4);
            let out = View::contiguous(mem.add_owned(1536 * 4), F32, &[1, 1536]);
            let (t, median) = best(|| matmul(&ctx, &mut mem, &[&out], &a, &[&w], Int8).expect("shapes fit"));
            let gb = w.bytes() as f64 / 1e9;
            println!("{name:20} {:5.1} GB/s, median {:5.1} ({:.1} us)", gb / t, gb / median, t * 1e6);
        }
    }
    let name = "Q4_0 transposed";
    if wanted(name) {
        let w = weight(&mut Pages::default(), Q4_0, 1536, 576, 3);
        let mut mem = Memory::new();
        let a = tensor(&mut mem, &[1024, 1536], 4);
        let out = View::contiguous(mem.add_owned(1024 * 576 * 4), F32, &[1024, 576]);
        for precision in [Precision::F32, Bf16] {
            let (t, _) = best(|| matmul_t(&ctx, &mut mem, &out, &a, &w, precision).expect("shapes fit"));
            println!(
                "{name} {precision:?} 1024 x 1536 x 576: {:.1} GFLOP/s",
                2e-9 * (1024 * 1536 * 576) as f64 / t
            );
        }
    }
}
