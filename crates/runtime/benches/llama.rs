//! A model of SmolLM2-135M's shape with made-up Q4_1 weights and a Q8_0 head: one token at a time, and a prompt of 512.
//!
//! `cargo bench -p sparsam-runtime [-- decode|prompt] [compiled|eager]` prints what compiling did, the time of a run (best of several), where it goes by
//! kind of kernel, and what the loop around the kernels costs.

#[path = "../../compiler/tests/common/mod.rs"]
#[allow(dead_code)] // what only the tests need
mod common;

use common::{Config, llama_in};
use sparsam_dtype::DType;
use sparsam_ir::{Graph, Op, Precision, Trace};
use sparsam_runtime::{Data, Device, Options, Session, Weights};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

/// SmolLM2-135M (Allal et al. 2025).
fn config(n_tokens: usize) -> Config {
    Config {
        n_tokens,
        n_layers: 30,
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        intermediate: 1536,
        vocab: 49152,
        slots: 1024,
    }
}

/// The graph once to learn its weights' names, and again over rounded weights.
fn model(n_tokens: usize) -> (Graph, Weights) {
    let c = config(n_tokens);
    let names = llama_in(&Trace::new(), &c, Precision::Int8);
    let (mut weights, mut shapes) = (Weights::new(), HashMap::new());
    for node in &names.nodes {
        let Op::Weight { name, shape, .. } = &node.op else { continue };
        let n: usize = shape.iter().product();
        // Scale 1/64, minimum -1/8, codes of every kind; the embedding is the head, too.
        let (dtype, head): (_, &[u8]) = match name.as_str() {
            "embed" => (DType::Q8_0, &[0x00, 0x14]),
            _ if shape.len() == 2 => (DType::Q4_1, &[0x00, 0x24, 0x00, 0xb0]),
            _ => (DType::F32, &[]),
        };
        if dtype == DType::F32 {
            weights.insert_f32(name, shape, &vec![1.0; n]).unwrap();
        } else {
            let codes = dtype.block_bytes() - head.len();
            let block = |i: usize| {
                let codes = (0..codes).map(move |j| (i * 31 + j * 57) as u8);
                head.iter().copied().chain(codes)
            };
            let bytes: Vec<u8> = (0..n / 32).flat_map(block).collect();
            weights.insert(name, shape, dtype, &bytes).unwrap();
        }
        shapes.insert(name.clone(), (shape.clone(), dtype));
    }
    (llama_in(&Trace::with_weights(shapes), &c, Precision::Int8), weights)
}

fn main() {
    let device = Device::cpu(0).unwrap();
    println!("{device:?}");
    // One token at a position in the middle of llama-bench's tg128, one at 511, and a prompt from 0.
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted =
        |name: &str, other: &str| words.iter().any(|w| w == name) || !words.iter().any(|w| w == other);
    for (n, first, repeat) in [(1, 64, 100), (1, 511, 50), (512, 0, 5)] {
        if !(if n == 1 { wanted("decode", "prompt") } else { wanted("prompt", "decode") }) {
            continue;
        }
        let (graph, weights) = model(n);
        let weights = Arc::new(weights);
        for options in [Options::default(), Options::eager()] {
            if !(if options.eager { wanted("eager", "compiled") } else { wanted("compiled", "eager") }) {
                continue;
            }
            let mut session = Session::new(&device, weights.clone());
            let start = Instant::now();
            let step = session.load(&graph, &options).unwrap();
            println!(
                "\n{n} tokens from position {first}, eager: {}; loaded in {:.1} ms",
                options.eager,
                start.elapsed().as_secs_f64() * 1e3
            );
            if !options.eager {
                println!("{}", step.report());
            }
            let positions: Vec<i32> = (first..first + n as i32).collect();
            let (zeros, table) = (vec![0; n], (0..512).collect::<Vec<i32>>());
            let inputs = [
                ("tokens", Data::I32(&zeros)),
                ("positions", Data::I32(&positions)),
                ("row_seq", Data::I32(&zeros)),
                ("slots", Data::I32(&positions)),
                ("page_table", Data::I32(&table)),
            ];
            session.run(&step, &inputs).unwrap();
            let time = |session: &mut Session| {
                let start = Instant::now();
                session.run(&step, &inputs).unwrap();
                start.elapsed().as_secs_f64()
            };
            let best = (0..repeat).map(|_| time(&mut session)).fold(f64::INFINITY, f64::min);
            println!(
                "best of {repeat}: {:.3} ms, {:.0} tokens a second, {} kernels",
                best * 1e3,
                n as f64 / best,
                step.kernels()
            );
            session.set_profiling(true);
            let start = Instant::now();
            (0..repeat).for_each(|_| _ = time(&mut session));
            let wall = start.elapsed();
            let profile = session.profile().unwrap();
            print!("{profile}");
            let around =
                wall.saturating_sub(profile.total()).as_secs_f64() / (repeat * step.kernels()) as f64;
            println!("around each kernel: {:.0} ns, timing included", around * 1e9);
        }
    }
}
