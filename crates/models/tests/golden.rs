//! Tiny models whose logits transformers has computed (`scripts/goldens/models.py`), against the interpreter in f64:
//! packed, through a paged cache step by step, and from GGUF files with llama.cpp's names and row orders.

mod common;

use common::{CASES, Expected, LENGTHS, expected, golden};
use sparsam_dtype::codec;
use sparsam_formats::Source;
use sparsam_ir::interpret::{Leaves, Rounding, Value, interpret};
use sparsam_ir::{DType, Graph, Op, Trace, verify};
use sparsam_models::nn::{Batch, Cache};
use sparsam_models::{Config, Model};
use std::path::PathBuf;

/// A model with its weights, and what they are stored in.
struct Run {
    model: Model,
    leaves: Leaves,
    stored: Vec<(String, Vec<usize>, DType)>,
}

fn load(path: &str) -> Run {
    let (model, weights) = common::open(path);
    let (mut leaves, mut stored) = (Leaves::new(), Vec::new());
    for w in weights {
        let mut x = vec![0f32; w.shape.iter().product()];
        codec::decode(w.dtype, &w.bytes, &mut x).unwrap();
        leaves.insert(w.name.clone(), Value::from_f32(&w.shape, &x));
        stored.push((w.name, w.shape, w.dtype));
    }
    for c in model.constants() {
        leaves.insert(c.name, Value::from_f32(&c.shape, &c.data));
    }
    Run { model, leaves, stored }
}

impl Run {
    fn trace(&self) -> Trace {
        Trace::with_weights(self.stored.iter().map(|(n, s, d)| (n.clone(), (s.clone(), *d))).collect())
    }

    fn graph(&self, batch: &Batch) -> Graph {
        let t = self.trace();
        let logits = self.model.trace(&t, batch);
        let graph = t.finish(&[("logits", &logits)]).unwrap();
        verify(&graph).unwrap();
        graph
    }

    /// Runs a graph; states in `self.leaves` move on. The named inputs are I32.
    fn run(&mut self, graph: &Graph, inputs: &[(&str, &[usize], Vec<i32>)]) -> Vec<f64> {
        for (name, shape, data) in inputs {
            self.leaves.insert(name.to_string(), Value::from_i32(shape, data));
        }
        interpret(graph, &mut self.leaves, Rounding::None).unwrap().remove("logits").unwrap().data
    }

    /// Logits (N, vocab) of the two sequences, packed one after the other.
    fn packed(&mut self, tokens: &[i32]) -> Vec<f64> {
        let n = LENGTHS[0] + LENGTHS[1];
        let graph = self.graph(&Batch::packed(n));
        let (positions, row_start) = common::packed_inputs();
        self.run(
            &graph,
            &[
                ("tokens", &[n], tokens.to_vec()),
                ("positions", &[n], positions),
                ("row_start", &[n], row_start),
            ],
        )
    }
}

fn check(what: &str, logits: &[f64], expected: &Expected) {
    assert_eq!(logits.len(), expected.logits.len(), "{what}");
    let off = logits.iter().zip(&expected.logits).map(|(a, b)| (a - *b as f64).abs()).fold(0.0, f64::max);
    // Ours is f64, so all of the difference should be transformers' rounding; twice, for the f64 that it is measured
    // against still has f32 angles.
    let allowed = 2.0 * expected.f32_error;
    assert!(off <= allowed, "{what}: off by {off:.2e}, allowed {allowed:.2e}");
}

#[test]
fn packed_logits_are_those_of_transformers() {
    for case in CASES {
        let want = expected(case);
        check(case, &load(case).packed(&want.tokens), &want);
    }
}

#[test]
fn gguf_files_give_the_same_logits() {
    for case in ["llama", "gemma3", "gpt2"] {
        let mut want = expected(case);
        want.logits = want.gguf_logits.take().unwrap_or(want.logits);
        let mut from_gguf = load(&format!("{case}.gguf"));
        check(case, &from_gguf.packed(&want.tokens), &want);
        // Not only close: after the transforms, every weight is the very same. (Not the frequencies, which a GGUF file
        // stretches by factors rounded to f32, and what was 1 + w in f32.)
        let from_hf = load(case);
        let rounded =
            |name: &str| name.ends_with("inv_freq") || (case == "gemma3" && name.ends_with("norm.weight"));
        for (name, value) in from_hf.leaves.iter().filter(|(name, _)| !rounded(name)) {
            assert_eq!(from_gguf.leaves.get(name), Some(value), "{name}");
        }
    }
}

/// A prompt, then token by token, two sequences at once in shuffled pages, with padding: the same logits as packed.
#[test]
fn cached_decoding_equals_the_full_pass() {
    for case in CASES {
        let tokens = expected(case).tokens;
        let mut m = load(case);
        let full = m.packed(&tokens);
        let vocab = m.model.facts().vocab_size;
        let (page_size, pages) = (4, [[7, 2, 0, 9, 4], [1, 8, 3, 0, 0]]);
        let cache = Cache { n_slots: 40, page_size, n_seqs: 2, n_pages: 5, dtype: DType::F32 };
        for layer in 0..m.model.facts().n_layers() {
            let heads = m.model.facts().heads;
            let shape = [cache.n_slots, heads.n_kv_heads, heads.head_dim];
            // What an earlier user left in the pool must not be seen.
            let junk = Value::new(&shape, vec![1e3; shape.iter().product()]);
            m.leaves.insert(format!("cache.k.{layer}"), junk.clone());
            m.leaves.insert(format!("cache.v.{layer}"), junk);
        }
        let table: Vec<i32> = pages.concat();
        let first = [0, LENGTHS[0]]; // of each sequence in `tokens`
        // One step: rows (sequence, position), or None for padding; logits for the rows in `ask`.
        let mut step = |rows: &[Option<(usize, usize)>], ask: &[usize]| {
            let n = rows.len();
            let graph = m.graph(&Batch::paged(n, cache.clone()).with_logit_rows(ask.len()));
            let column = |f: &dyn Fn(usize, usize) -> i32, padding: i32| -> Vec<i32> {
                rows.iter().map(|r| r.map_or(padding, |(s, p)| f(s, p))).collect()
            };
            let slot =
                |s: usize, p: usize| pages[s][p / page_size] * page_size as i32 + (p % page_size) as i32;
            let got = m.run(
                &graph,
                &[
                    ("tokens", &[n], column(&|s, p| tokens[first[s] + p], 0)),
                    ("positions", &[n], column(&|_, p| p as i32, 0)),
                    ("row_seq", &[n], column(&|s, _| s as i32, -1)),
                    ("slots", &[n], column(&slot, -1)),
                    ("page_table", &[2, 5], table.clone()),
                    ("logit_rows", &[ask.len()], ask.iter().map(|&r| r as i32).collect()),
                ],
            );
            for (i, &row) in ask.iter().enumerate() {
                let (s, p) = rows[row].unwrap();
                let want = &full[(first[s] + p) * vocab..][..vocab];
                for (a, b) in got[i * vocab..][..vocab].iter().zip(want) {
                    assert!((a - b).abs() < 1e-9, "{case}: sequence {s} position {p}: {a} and {b}");
                }
            }
        };
        let prompt = |s: usize, range: std::ops::Range<usize>| range.map(move |p| Some((s, p)));
        // Two prompts of 7 and 3 tokens and two rows of padding; logits of the last token of each, and of one before.
        let rows: Vec<_> = prompt(0, 0..7).chain(prompt(1, 0..3)).chain([None, None]).collect();
        step(&rows, &[9, 6, 2]);
        for p in 3..LENGTHS[1] {
            step(&[Some((0, p + 4)), Some((1, p))], &[0, 1]);
        }
        // The rest of the first, three at a time as a draft is checked, then rolled back by two and decoded again.
        step(&prompt(0, 13..16).collect::<Vec<_>>(), &[0, 1, 2]);
        step(&prompt(0, 14..17).collect::<Vec<_>>(), &[2]);
    }
}

#[test]
fn parts_compose_to_the_whole() {
    for case in CASES {
        let tokens = expected(case).tokens;
        let mut m = load(case);
        let want = m.packed(&tokens);
        let n = tokens.len();
        let batch = Batch::packed(n);
        let hidden = m.model.facts().hidden_size;
        let mut part = |f: &dyn Fn(&Model, &Trace) -> sparsam_ir::Tensor| {
            let t = m.trace();
            let y = f(&m.model, &t);
            let graph = t.finish(&[("logits", &y)]).unwrap();
            let y = m.run(&graph, &[]);
            m.leaves.insert("x".into(), Value::new(&[n, y.len() / n], y.clone()));
            y
        };
        part(&|model, t| model.embed(t, &batch));
        let x = |t: &Trace| t.input("x", &[n, hidden], DType::F32);
        for layer in 0..load(case).model.facts().n_layers() {
            part(&|model, t| model.block(&batch, layer, &x(t)));
        }
        let got = part(&|model, t| model.head(&batch, &x(t)));
        assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-12), "{case}");
    }
}

#[test]
fn both_generations_of_config_json_say_the_same() {
    for case in CASES {
        let folder = tempfile::tempdir().unwrap();
        let copy =
            |from: &str, to: &str| std::fs::copy(golden(case).join(from), folder.path().join(to)).unwrap();
        copy("model.safetensors", "model.safetensors");
        copy("config.resaved.json", "config.json");
        let of = |path: PathBuf| Config::from_source(&Source::open(path).unwrap()).unwrap();
        assert_eq!(of(folder.path().to_path_buf()), of(golden(case)), "{case}");
    }
}

#[test]
fn every_rule_is_for_a_weight_that_some_case_has() {
    // A rule with a mistyped name would otherwise never be missed.
    let traced: Vec<String> = CASES
        .iter()
        .flat_map(|case| load(case).model.parameters().unwrap())
        .map(|p| p.name.replace(".0.", ".{}."))
        .collect();
    for case in CASES {
        for rule in load(case).model.rules() {
            // No golden has these: biases of Qwen3 and Gemma, an untied GPT-2 or Gemma.
            let optional = rule.name == "lm_head.weight" || rule.name.ends_with("_proj.bias");
            assert!(optional || traced.iter().any(|n| n == rule.name), "{case}: {}", rule.name);
        }
    }
}

#[test]
fn a_packed_graph_has_three_inputs() {
    let m = load("llama");
    let graph = m.graph(&Batch::packed(4));
    let mut inputs: Vec<&str> = graph
        .nodes
        .iter()
        .filter_map(|n| match &n.op {
            Op::Input { name, .. } => Some(name.as_str()),
            _ => None,
        })
        .collect();
    inputs.sort_unstable();
    assert_eq!(inputs, ["positions", "row_start", "tokens"]);
}
