//! A whole model through the stream: a tiny random Llama written as GGUF.

use sparsam_dtype::DType;
use sparsam_formats::{Source, TensorSpec, gguf};
use sparsam_ir::{Precision, Trace};
use sparsam_models::nn::Batch;
use sparsam_models::{Config, Model};
use sparsam_quantize::budget::Cost;
use sparsam_quantize::heal::Heal;
use sparsam_quantize::recipe::{self, TensorPlan};
use sparsam_quantize::speed::Speed;
use sparsam_quantize::stream::{Gptq, Job, Layer, Method};
use sparsam_quantize::{Error, Tokens, budget};
use sparsam_runtime::{Data, Device, Session, Weights};
use std::path::Path;
use std::sync::Arc;

const VOCAB: usize = 96;
const CTX: usize = 24;

/// A Llama of 2 layers, 64 wide, with inputs of uneven size; `tied` leaves the head out.
fn write_model(path: &Path, tied: bool, poison: bool) {
    let mut m = gguf::Metadata::default();
    let u = gguf::Value::U32;
    m.insert("general.architecture", gguf::Value::String("llama".into()));
    for (key, value) in [
        ("vocab_size", VOCAB),
        ("embedding_length", 64),
        ("feed_forward_length", 128),
        ("block_count", 2),
        ("context_length", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ] {
        m.insert(format!("llama.{key}"), u(value as u32));
    }
    m.insert("llama.attention.layer_norm_rms_epsilon", gguf::Value::F32(1e-5));
    let mut specs = vec![("token_embd.weight".to_string(), vec![VOCAB, 64])];
    for i in 0..2 {
        for (name, shape) in [
            ("attn_norm", vec![64]),
            ("attn_q", vec![64, 64]),
            ("attn_k", vec![32, 64]),
            ("attn_v", vec![32, 64]),
            ("attn_output", vec![64, 64]),
            ("ffn_norm", vec![64]),
            ("ffn_gate", vec![128, 64]),
            ("ffn_up", vec![128, 64]),
            ("ffn_down", vec![64, 128]),
        ] {
            specs.push((format!("blk.{i}.{name}.weight"), shape));
        }
    }
    specs.push(("output_norm.weight".into(), vec![64]));
    if !tied {
        specs.push(("output.weight".into(), vec![VOCAB, 64]));
    }
    let specs: Vec<TensorSpec> =
        specs.into_iter().map(|(name, shape)| TensorSpec { name, shape, dtype: DType::F32 }).collect();
    let mut writer = gguf::Writer::create(path, &m, &specs).unwrap();
    let mut state = 7u64;
    for s in &specs {
        let n: usize = s.shape.iter().product();
        let mut x: Vec<f32> = (0..n)
            .map(|i| {
                let unit: f32 = (0..4)
                    .map(|_| {
                        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
                    })
                    .sum();
                // Norms of uneven size make some inputs matter more than others.
                if s.shape.len() == 1 { (2.0 * (i as f32 * 1.7).sin()).exp() } else { unit * 0.2 }
            })
            .collect();
        if poison && s.name == "blk.1.ffn_up.weight" {
            x[77] = f32::NAN;
        }
        let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.append(&s.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn tokens() -> Vec<u32> {
    (0..40 * CTX).map(|i| ((i * i + 7 * i / 3) % VOCAB) as u32).collect()
}

/// Logits of the model in a file for the first sequences of the calibration text.
fn logits(path: &Path) -> Vec<f32> {
    let source = Source::open(path).unwrap();
    let model = Model::new(Config::from_source(&source).unwrap());
    let mut weights = Weights::new();
    for spec in model.weights(&source).unwrap() {
        let t = source.require(&spec.source_name).unwrap();
        let t = spec.transform.apply(t.bytes, t.info.dtype, &t.info.shape).unwrap();
        weights.insert(&spec.name, &spec.shape, t.dtype, &t.bytes).unwrap();
    }
    for c in model.constants() {
        weights.insert_f32(&c.name, &c.shape, &c.data).unwrap();
    }
    let mut session = Session::new(&Device::cpu(2).unwrap(), Arc::new(weights));
    let n = 8 * CTX;
    let t = Trace::with_weights(session.weights().shapes());
    let y = model.trace(&t, &Batch::packed(n));
    let step = session.compile(&t.finish(&[("y", &y)]).unwrap()).unwrap();
    let ids: Vec<i32> = tokens()[..n].iter().map(|&t| t as i32).collect();
    let positions: Vec<i32> = (0..n).map(|i| (i % CTX) as i32).collect();
    let row_start: Vec<i32> = (0..n).map(|i| (i - i % CTX) as i32).collect();
    let inputs = [
        ("tokens", Data::I32(&ids)),
        ("positions", Data::I32(&positions)),
        ("row_start", Data::I32(&row_start)),
    ];
    session.run(&step, &inputs).unwrap().f32("y").unwrap().to_vec()
}

struct Setup {
    dir: tempfile::TempDir,
    source: Source,
    model: Model,
    device: Device,
    tokens: Tokens,
}

fn setup(tied: bool, poison: bool) -> Setup {
    let dir = tempfile::tempdir().unwrap();
    write_model(&dir.path().join("m.gguf"), tied, poison);
    let source = Source::open(dir.path().join("m.gguf")).unwrap();
    let model = Model::new(Config::from_source(&source).unwrap());
    let tokens = Tokens::new(&tokens(), 40, CTX).unwrap();
    Setup { dir, source, model, device: Device::cpu(2).unwrap(), tokens }
}

impl Setup {
    fn plan(&self, dtype: DType) -> Vec<TensorPlan> {
        recipe::plan_with(&self.model, &self.source, |_| dtype).unwrap()
    }

    fn job<'a>(&'a self, plan: &'a [TensorPlan], method: Method) -> Job<'a> {
        Job {
            source: &self.source,
            model: &self.model,
            device: &self.device,
            plan,
            method,
            heal: None,
            importance: None,
            tokens: Some(&self.tokens),
            memory: None,
            identity: "test".into(),
            partial: self.dir.path().join("out.partial"),
        }
    }

    /// The same job once more.
    fn job_like<'a>(&'a self, job: &Job<'a>) -> Job<'a> {
        Job { heal: job.heal, ..self.job(job.plan, job.method) }
    }

    fn write(&self, job: &Job) -> (Vec<f32>, Vec<u8>, Vec<Layer>) {
        let layers = job.run(&mut |_, _| {}).unwrap();
        let out = self.dir.path().join("out.gguf");
        job.write_gguf(&out, self.source.gguf_metadata().unwrap(), None).unwrap();
        job.clean();
        assert!(!job.partial.exists(), "nothing half-written stays");
        (logits(&out), std::fs::read(&out).unwrap(), layers)
    }
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

fn gptq(asymmetric: f32) -> Method {
    Method::Gptq(Gptq { asymmetric, precision: Precision::F32, ..Gptq::default() })
}

/// Whatever the type: the written file is a model whose logits lie nearer to the original's than with nearest rounding,
/// and nearer still where later layers make up for earlier ones.
#[test]
fn written_models_are_nearer_to_the_original() {
    for (tied, types) in [(false, [DType::IQ4_NL, DType::S2_64]), (true, [DType::Q4_0, DType::S3_64])] {
        let s = setup(tied, false);
        let original = logits(s.source.path());
        for dtype in types {
            let plan = s.plan(dtype);
            let nearest = distance(&original, &s.write(&s.job(&plan, Method::Nearest)).0);
            let plain = distance(&original, &s.write(&s.job(&plan, gptq(0.0))).0);
            let (got, _, layers) = s.write(&s.job(&plan, gptq(1.0)));
            let moved = distance(&original, &got);
            println!("tied {tied}, {dtype}: nearest {nearest:.1}, GPTQ {plain:.1}, asymmetric {moved:.1}");
            assert!(plain < 0.9 * nearest, "tied {tied}, {dtype}: GPTQ {plain}, nearest {nearest}");
            assert!(moved < plain, "tied {tied}, {dtype}: asymmetric {moved}, plain {plain}");
            let rounded = layers.iter().filter_map(|l| l.error);
            assert!(rounded.clone().count() >= 14 && rounded.clone().all(|e| e.rounded <= e.nearest));
            let file = Source::open(s.dir.path().join("out.gguf")).unwrap();
            assert_eq!(file.require("blk.1.ffn_down.weight").unwrap().info.dtype, dtype);
            assert_eq!(file.require("blk.1.ffn_norm.weight").unwrap().info.dtype, DType::F32);
        }
    }
}

/// A run that died goes on behind the last tensor, to the same bytes; other settings start anew.
#[test]
fn a_killed_run_goes_on() {
    let s = setup(false, false);
    let plan = s.plan(DType::Q4_0);
    let (_, want, _) = s.write(&s.job(&plan, gptq(0.5)));
    // Dies in the second block: the panic leaves what a kill would leave.
    let job = s.job(&plan, gptq(0.5));
    let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        job.run(&mut |_, name| assert!(!name.contains("layers.1.self_attn.o_proj"), "killed"))
    }));
    assert!(died.is_err());
    let done = std::fs::read_dir(&job.partial).unwrap().count();
    assert!(done > 10, "{done} files");
    let mut seen = Vec::new();
    job.run(&mut |_, name| seen.push(name.to_string())).unwrap();
    assert!(!seen.iter().any(|n| n.contains("layers.0")), "done again: {seen:?}");
    assert_eq!(s.write(&job).1, want);
    // The same folder under other settings.
    job.run(&mut |_, _| {}).unwrap();
    let mut seen = 0;
    s.job(&plan, gptq(0.25)).run(&mut |_, _| seen += 1).unwrap();
    assert!(seen > 14, "results of other settings were taken");
}

#[test]
fn bad_input_is_said() {
    let s = setup(false, true);
    let plan = s.plan(DType::Q4_0);
    for method in [Method::Nearest, gptq(0.5)] {
        let said = s.job(&plan, method).run(&mut |_, _| {}).unwrap_err().to_string();
        assert!(said.contains("layers.1.mlp.up_proj.weight: weight 77 is NaN"), "{said}");
    }
    let said = Tokens::new(&[1, 2, 3], 4, 8).unwrap_err().to_string();
    assert!(said.contains("3 tokens, one sequence takes 8"), "{said}");
    let said = recipe::plan(&s.model, &s.source, "Q4_X").unwrap_err().to_string();
    assert!(said.contains("no type \"Q4_X\"") && said.contains("Q4_K_M"), "{said}");
    let job = Job { tokens: None, ..s.job(&plan, gptq(0.5)) };
    assert!(matches!(job.run(&mut |_, _| {}), Err(Error::NoCalibration)));
}

/// Types that do not divide the rows are replaced by llama.cpp's substitutes, and that is told.
#[test]
fn mixtures_choose_as_llama_cpp_does() {
    let s = setup(false, false);
    let of = |name: &str, tensor: &str| {
        let plan = recipe::plan(&s.model, &s.source, name).unwrap();
        let p = plan.into_iter().find(|p| p.gguf_name == tensor).unwrap();
        (p.to, p.wanted)
    };
    // Rows of 64: no K type fits.
    assert_eq!(of("Q4_K_M", "blk.0.attn_q.weight"), (DType::Q5_0, Some(DType::Q4_K)));
    assert_eq!(of("Q4_K_M", "output.weight"), (DType::Q8_0, Some(DType::Q6_K)));
    assert_eq!(of("Q3_K_M", "blk.0.attn_v.weight"), (DType::Q5_1, Some(DType::Q5_K)));
    assert_eq!(of("Q4_0", "output.weight"), (DType::Q8_0, Some(DType::Q6_K)));
    assert_eq!(of("Q4_0", "token_embd.weight"), (DType::Q4_0, None));
    assert_eq!(of("q8_0", "blk.1.ffn_up.weight"), (DType::Q8_0, None));
    assert_eq!(of("Q4_0", "output_norm.weight"), (DType::F32, None));
}

/// Tensors that matter more are found, and a budget is kept.
#[test]
fn budgets_are_kept_and_spent_where_it_matters() {
    let s = setup(true, false);
    let mut plan = s.plan(DType::Q8_0);
    let ids: Vec<i32> = tokens()[..CTX].iter().map(|&t| t as i32).collect();
    let kl = budget::sensitivity(&s.source, &s.model, &s.device, &plan, &ids, &mut |_, _| {}).unwrap();
    for (p, kl) in plan.iter().zip(&kl) {
        assert_eq!(*kl > 0.0, p.spec.shape.len() == 2, "{}: {kl}", p.spec.name);
    }
    // A machine to which 4-bit blocks of 64 are slow.
    let rates = budget::CANDIDATES.map(|d| (d, if d == DType::S4_64 { 1e6 } else { 1e9 }));
    let speed = Speed::known(&rates, 1e-6, None);
    let choices = budget::choices(&s.source, &plan, &kl, &speed).unwrap();
    for (p, c) in plan.iter().zip(&choices).filter(|(p, _)| p.spec.shape.len() == 2) {
        for c in c {
            let rate = if c.dtype == DType::S4_64 { 1e6 } else { 1e9 };
            assert!((c.seconds * rate - c.bytes as f64).abs() < 1e-6, "{} {c:?}", p.spec.name);
        }
    }
    // Time alone: what is slow is never chosen, and twice the time of the fastest is kept to.
    let fastest = Cost::Seconds.least(&choices);
    let at = budget::allocate(&choices, 2.0 * fastest, Cost::Seconds).unwrap();
    let chosen = || at.iter().zip(&choices).map(|(&i, c)| c[i]);
    assert!(chosen().all(|c| c.dtype != DType::S4_64) && chosen().any(|c| c.dtype == DType::Q8_0));
    assert!(chosen().map(|c| c.seconds).sum::<f64>() <= 2.0 * fastest);
    assert!(budget::allocate(&choices, 0.9 * fastest, Cost::Seconds).is_none());

    let smallest: usize = choices.iter().map(|c| c.iter().map(|c| c.bytes).min().unwrap()).sum();
    assert!(budget::allocate(&choices, (smallest - 1) as f64, Cost::Bytes).is_none());
    let mut last = f64::INFINITY;
    for budget in [smallest, smallest * 3 / 2, smallest * 2] {
        let at = budget::allocate(&choices, budget as f64, Cost::Bytes).unwrap();
        let loss: f64 = at.iter().zip(&choices).map(|(&i, c)| c[i].loss).sum();
        assert!(loss < last, "{budget}: {loss}, {last} with less");
        last = loss;
        plan.iter_mut().zip(at.iter().zip(&choices)).for_each(|(p, (&i, c))| p.to = c[i].dtype);
        assert!(plan.iter().map(TensorPlan::bytes).sum::<usize>() <= budget);
    }
}

/// Healing brings the written model nearer to the original, for nearest codes and for GPTQ's, and every block says so.
#[test]
fn healed_models_are_nearer_still() {
    let s = setup(false, false);
    let original = logits(s.source.path());
    for (dtype, method) in [
        (DType::S2_64, Method::Nearest),
        (DType::Q4_1, Method::Nearest),
        (DType::S3_64, gptq(0.5)),
        (DType::Q4_0, gptq(0.0)),
    ] {
        let plan = s.plan(dtype);
        let rounded = distance(&original, &s.write(&s.job(&plan, method)).0);
        let job = Job { heal: Some(Heal::new(60)), ..s.job(&plan, method) };
        job.run(&mut |_, _| {}).unwrap();
        let healing = job.healing().unwrap();
        assert_eq!(healing.len(), 2);
        for h in &healing {
            assert!(h.kept && h.after < 0.97 * h.before, "{dtype}: {h:?}");
        }
        let healed = distance(&original, &s.write(&job).0);
        println!("{dtype} {method:?}: rounded {rounded:.1}, healed {healed:.1}, {healing:?}");
        assert!(healed < 0.95 * rounded, "{dtype}: {rounded}, healed {healed}");
    }
}

/// Healing counts steps and draws nothing: a run gives the same bytes again, on any number of threads, and after it died in
/// the middle, wherever that was.
#[test]
fn healing_replays_and_resumes() {
    let s = setup(true, false);
    let plan = s.plan(DType::Q4_0);
    let job = Job { heal: Some(Heal::new(7)), ..s.job(&plan, gptq(0.5)) };
    let (_, want, _) = s.write(&job);
    let one = Device::cpu(1).unwrap();
    assert_eq!(s.write(&Job { device: &one, ..s.job_like(&job) }).1, want, "one thread");
    // Spilled activations are the same numbers.
    assert_eq!(s.write(&Job { memory: Some(1000), ..s.job_like(&job) }).1, want, "spilled");
    for place in ["layers.0.mlp.up_proj", "healing block 0", "layers.1.self_attn.v_proj", "healing block 1"] {
        let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            job.run(&mut |_, name| assert!(!name.contains(place), "killed"))
        }));
        assert!(died.is_err(), "{place}");
        assert_eq!(s.write(&job).1, want, "{place}");
    }
}

/// One layer is done anew with other settings; all others stay, byte for byte, healed norms too.
#[test]
fn one_layer_is_redone_alone() {
    let s = setup(false, false);
    let plan = s.plan(DType::Q4_0);
    let job = Job { heal: Some(Heal::new(5)), ..s.job(&plan, gptq(0.5)) };
    let (_, before, layers) = s.write(&job);
    let first = s.dir.path().join("first.gguf");
    std::fs::write(&first, &before).unwrap();
    let name = "blk.1.ffn_down.weight";
    let other = Method::Gptq(Gptq { damping: 0.5, precision: Precision::F32, ..Gptq::default() });
    let job = Job { identity: "redo".into(), ..s.job(&plan, other) };
    let file = Source::open(&first).unwrap();
    job.adopt(&file, &layers, &[name.to_string()]).unwrap();
    let mut seen = Vec::new();
    job.run(&mut |_, name| seen.push(name.to_string())).unwrap();
    assert!(seen.iter().all(|n| n.contains("layers.1.mlp.down_proj")), "{seen:?}");
    s.write(&job);
    let after = Source::open(s.dir.path().join("out.gguf")).unwrap();
    for t in file.tensors() {
        let same = after.require(&t.name).unwrap().bytes == file.require(&t.name).unwrap().bytes;
        assert_eq!(same, t.name != name, "{}", t.name);
    }
    let said = job.adopt(&file, &layers, &["blk.9.x".into()]).unwrap_err().to_string();
    assert!(said.contains("no tensor blk.9.x is rounded"), "{said}");
    let other = s.plan(DType::Q8_0);
    let said = s.job(&other, gptq(0.5)).adopt(&file, &layers, &[name.into()]).unwrap_err().to_string();
    assert!(said.contains("is Q4_0 there, Q8_0 is asked"), "{said}");
}

/// What calibration saw of each layer is told.
#[test]
fn layers_tell_how_well_they_were_calibrated() {
    let s = setup(false, false);
    let plan = s.plan(DType::Q4_0);
    let few = Tokens::new(&tokens(), 2, CTX).unwrap();
    for (tokens, enough) in [(&s.tokens, true), (&few, false)] {
        let job = Job { tokens: Some(tokens), ..s.job(&plan, gptq(0.0)) };
        let (_, _, layers) = s.write(&job);
        let down = layers.iter().find(|l| l.name.contains("layers.1.mlp.down_proj")).unwrap();
        let h = down.health.unwrap();
        assert_eq!(h.tokens, tokens.len());
        assert!(h.rank > 2.0 && h.rank <= 128.0 && h.rank <= h.tokens as f64, "{h:?}");
        assert!(h.condition > 1.0 && h.condition < 1e6, "{h:?}");
        assert_eq!(down.fell_back(), !enough, "{down:?}");
        assert!(layers.iter().filter(|l| l.to == "F32").all(|l| l.health.is_none() && !l.fell_back()));
    }
}

/// An importance matrix weighs the search of scales; one of another model is refused.
#[test]
fn importance_weighs_the_inputs() {
    let s = setup(false, false);
    let plan = s.plan(DType::S3_64);
    let name = "blk.0.attn_q.weight";
    let of = |importance: Option<&std::collections::HashMap<String, Vec<f32>>>| {
        let job = Job { importance, ..s.job(&plan, Method::Nearest) };
        job.run(&mut |_, _| {}).map(|_| s.write(&job).1)
    };
    let first: Vec<f32> = (0..64).map(|i| if i == 3 { 1e4 } else { 1.0 }).collect();
    let importance = [(name.to_string(), first)].into();
    of(Some(&importance)).unwrap();
    let weighed = column(&s, name, 3);
    of(None).unwrap();
    let plain = column(&s, name, 3);
    assert!(weighed < 0.4 * plain, "{weighed}, without {plain}");
    let wrong = [(name.to_string(), vec![1.0; 63])].into();
    let said = of(Some(&wrong)).unwrap_err().to_string();
    assert!(said.contains("63 numbers for blk.0.attn_q.weight, whose rows have 64"), "{said}");
}

/// The squared error of a column of a tensor of `out.gguf`.
fn column(s: &Setup, name: &str, column: usize) -> f64 {
    let values = |source: &Source| {
        let t = source.require(name).unwrap();
        let mut x = vec![0f32; t.info.numel()];
        sparsam_dtype::codec::decode(t.info.dtype, t.bytes, &mut x).unwrap();
        x
    };
    let (a, b) = (values(&s.source), values(&Source::open(s.dir.path().join("out.gguf")).unwrap()));
    let rows = a.chunks(64).zip(b.chunks(64));
    rows.map(|(a, b)| f64::from(a[column] - b[column]).powi(2)).sum()
}

/// A folder in GPTQ's layout opens as any model, and means what was rounded: its logits are those of the codes.
#[test]
fn gptq_folders_are_models() {
    let s = setup(false, false);
    let original = logits(s.source.path());
    let mut last = f64::INFINITY;
    for (bits, group, symmetric) in [
        (2, Some(32), false),
        (3, Some(64), true),
        (4, Some(128), true),
        (4, None, false),
        (8, Some(32), true),
    ] {
        let plan = recipe::plan_gptq(&s.model, &s.source, bits, group, symmetric).unwrap();
        // 128 does not divide rows of 64.
        let used = plan.iter().find_map(|p| p.plain).unwrap().group;
        assert_eq!(used, group.map_or(64, |g| g.min(64)));
        let run = |heal: Option<Heal>| {
            let out = s.dir.path().join(format!("gptq-{bits}-{group:?}-{}", heal.is_some()));
            let job = Job { heal, ..s.job(&plan, gptq(0.5)) };
            let layers = job.run(&mut |_, _| {}).unwrap();
            job.write_gptq(&out, None, &serde_json::json!({"by": "a test"})).unwrap();
            job.clean();
            (distance(&original, &logits(&out)), layers, out)
        };
        let (error, layers, out) = run(None);
        let (healed, ..) = run(Some(Heal::new(40)));
        println!("{bits} bits, groups {group:?}: {error:.2}, healed {healed:.2}");
        assert!(healed < error || bits == 8, "{bits} bits: {error}, healed {healed}");
        assert!(error < 1.05 * last, "{bits} bits: {error}, fewer bits {last}");
        last = error;
        let rounded = layers.iter().filter(|l| l.to.contains("bits in groups")).count();
        assert_eq!(rounded, 14);
        let config = std::fs::read_to_string(out.join("quantize_config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        let want = group.map_or(-1, |g| g.min(64) as i64);
        assert_eq!((&config["bits"], &config["group_size"]), (&bits.into(), &want.into()));
        assert_eq!((&config["sym"], &config["desc_act"]), (&symmetric.into(), &false.into()));
        assert_eq!(config["meta"]["by"], "a test");
        let inside = std::fs::read_to_string(out.join("config.json")).unwrap();
        let inside: serde_json::Value = serde_json::from_str(&inside).unwrap();
        assert_eq!(inside["quantization_config"]["quant_method"], "gptq");
    }
    for (bits, group, says) in [(5, None, "2, 3, 4 or 8 bits, not 5"), (4, Some(48), "groups of 48")] {
        let said = recipe::plan_gptq(&s.model, &s.source, bits, group, true).unwrap_err().to_string();
        assert!(said.contains(says), "{said}");
    }
}
