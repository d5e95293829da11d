//! Adapters are peft's: files and logits (`scripts/goldens/lora.py` made the numbers); and runs that fine-tune resume bit
//! for bit.

use sparsam_engine::{Engine, Feed, Options, Plan, TrainedAdapter, Want, merge, open};
use sparsam_formats::Kind;
use sparsam_formats::safetensors::File;
use sparsam_models::adapter::{Adapter, LowRank};
use sparsam_runtime::Device;
use sparsam_train::config::Config;
use sparsam_train::data::PackedRows;
use sparsam_train::dialogue::Example;
use sparsam_train::optim::Optimiser;
use sparsam_train::step::{Soft, Targets};
use sparsam_train::{Base, How, Learner, Run, metrics};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

fn golden() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/lora"))
}

fn numbers(file: &File, name: &str) -> Vec<f32> {
    file.tensor(name)
        .unwrap()
        .bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

fn logits(engine: &Engine, tokens: &[u32]) -> Vec<f32> {
    let mut runner = engine.runner(1).unwrap();
    let mut sequence = runner.sequence();
    let feed = Feed { sequence: &mut sequence, tokens, want: Want::From(0) };
    runner.run(&mut [feed]).unwrap().to_vec()
}

fn exact(adapters: &[(PathBuf, f64)]) -> Options {
    Options { exact: true, threads: 1, adapters: adapters.to_vec(), ..Options::default() }
}

fn close(got: &[f32], want: &[f32], within: f32) {
    let worst = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0f32, f32::max);
    assert!(got.len() == want.len() && worst < within, "{worst}");
}

#[test]
fn an_adapter_of_peft_gives_its_logits_added_and_merged() {
    let tiny = golden().join("tiny");
    let file = File::open(tiny.join("logits.safetensors")).unwrap();
    let tokens: Vec<u32> = numbers(&file, "tokens").iter().map(|x| x.to_bits()).collect();
    let (want, base) = (numbers(&file, "logits"), numbers(&file, "base"));
    let adapter = [(tiny.join("adapter"), 1.0)];
    // Logits are up to 30; f32 keeps 7 digits of them over a few dozen sums.
    close(&logits(&Engine::load(&tiny, &exact(&[])).unwrap(), &tokens), &base, 2e-4);
    close(&logits(&Engine::load(&tiny, &exact(&adapter)).unwrap(), &tokens), &want, 2e-4);
    // Two halves are a whole.
    let halves = [(tiny.join("adapter"), 0.5), (tiny.join("adapter"), 0.5)];
    close(&logits(&Engine::load(&tiny, &exact(&halves)).unwrap(), &tokens), &want, 2e-4);

    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("merged.gguf");
    let opened = open(&tiny).unwrap();
    let plan = Plan::uniform(&opened.model, Kind::Gguf, sparsam_dtype::DType::F32).unwrap();
    let merged = merge(&opened, &adapter, &out, Kind::Gguf, &plan).unwrap();
    assert_eq!(merged.layers, 14);
    close(&logits(&Engine::load(&out, &exact(&[])).unwrap(), &tokens), &want, 2e-4);

    // Written again, it is the same adapter.
    let again = dir.path().join("again");
    let read = TrainedAdapter::open(&tiny.join("adapter")).unwrap();
    read.save(&again).unwrap();
    assert_eq!(TrainedAdapter::open(&again).unwrap(), read);
    // 8 / sqrt 3 by rsLoRA.
    assert!(
        read.adapter.modules().values().all(|m| m.rank == 3 && (m.scale - 8.0 / 3f64.sqrt()).abs() < 1e-12)
    );
}

#[test]
fn adapters_that_cannot_be_used_are_refused() {
    let tiny = golden().join("tiny");
    let dir = tempfile::tempdir().unwrap();
    let said = |change: &dyn Fn(&mut serde_json::Value)| {
        let text = std::fs::read_to_string(tiny.join("adapter/adapter_config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        change(&mut config);
        std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
        std::fs::copy(
            tiny.join("adapter/adapter_model.safetensors"),
            dir.path().join("adapter_model.safetensors"),
        )
        .unwrap();
        TrainedAdapter::open(dir.path()).unwrap_err().to_string()
    };
    assert!(said(&|c| c["use_dora"] = true.into()).contains("DoRA is not implemented"));
    assert!(said(&|c| c["peft_type"] = "IA3".into()).contains("only LORA"));
    assert!(said(&|c| c["r"] = serde_json::Value::Null).contains("adapter_config.json"));
    let nowhere = TrainedAdapter::open(&dir.path().join("none")).unwrap_err().to_string();
    assert!(nowhere.contains("name a folder that holds adapter_config.json"), "{nowhere}");
    let model = open(&tiny).unwrap().model;
    let other = Adapter::new([("model.layers.7.mlp.up_proj".to_string(), LowRank { rank: 2, scale: 1.0 })]);
    let e = model.with_adapters(vec![other]).unwrap_err().to_string();
    assert!(e.contains("model.layers.7.mlp.up_proj, which this llama does not have"), "{e}");
}

/// The tiny model with a tokenizer of bytes and a chat template, and examples.
fn workplace(dir: &Path) -> Config {
    let model = dir.join("model");
    std::fs::create_dir_all(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden().join("tiny").join(name), model.join(name)).unwrap();
    }
    let bytes = sparsam_tokenizer::train::byte_vocabulary();
    let mut config: serde_json::Value = serde_json::from_slice(&bytes.config).unwrap();
    config["chat_template"] =
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n\
         {% endfor %}{% if add_generation_prompt %}a:{% endif %}"
            .into();
    std::fs::write(model.join("tokenizer.json"), bytes.tokenizer).unwrap();
    std::fs::write(model.join("tokenizer_config.json"), config.to_string()).unwrap();
    let lines: String = (0..120)
        .map(|i| {
            format!("{{\"prompt\": \"{i} and {}\", \"completion\": \"{}\"}}\n", i % 7, ["yes", "no"][i % 2])
        })
        .collect();
    std::fs::write(dir.join("data.jsonl"), lines).unwrap();
    let toml = format!(
        "[model]\nfrom = {model:?}\n[data]\ntrain = [{:?}]\nctx = 64\nheld_back_part = 0.1\n[optimiser]\nlr = 1e-2\n\
         [finetune]\nrank = 4\ndropout = 0.1\n[run]\nsteps = 14\nbatch = 2\naccumulate = 2\nthreads = 1\neval_every = 5\n\
         checkpoint_every = 3\n",
        dir.join("data.jsonl")
    );
    Config::from_toml(&toml, "test").unwrap()
}

fn states(run: &mut Run) -> Vec<(String, Vec<u32>)> {
    let names = run.learner().kept();
    let bits =
        |run: &mut Run, name: &str| run.learner().state(name).unwrap().iter().map(|x| x.to_bits()).collect();
    names.into_iter().map(|k| (k.name.clone(), bits(run, &k.name))).collect()
}

#[test]
fn a_run_that_is_stopped_and_taken_up_again_gives_the_same_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let mut a = Run::start(&whole, workplace(dir.path())).unwrap();
    assert!(a.go(&AtomicBool::new(false), &mut |_| {}).unwrap().complete);

    let parts = dir.path().join("parts");
    let mut b = Run::start(&parts, workplace(dir.path())).unwrap();
    for until in [4, 9, 14] {
        let stop = AtomicBool::new(false);
        b.go(&stop, &mut |e| {
            if matches!(e, sparsam_train::Event::Step(s) if s.step == until) {
                stop.store(true, Ordering::Relaxed);
            }
        })
        .unwrap();
        if until < 14 {
            b = Run::resume(&parts).unwrap();
        }
    }
    assert!(states(&mut a) == states(&mut b), "weights or moments differ");
    let adapters = [&whole, &parts].map(|f| TrainedAdapter::open(&f.join("adapter")).unwrap());
    assert_eq!(adapters[0].weights, adapters[1].weights);
    let held = |folder: &Path| -> Vec<f64> {
        let of = |r: &metrics::Record| match r {
            metrics::Record::HeldBack { held_back_loss, .. } => Some(*held_back_loss),
            _ => None,
        };
        metrics::read(&folder.join("metrics.jsonl")).unwrap().iter().filter_map(of).collect()
    };
    let losses = held(&whole);
    assert!(losses.len() == 4 && losses[3] < losses[0] && losses == held(&parts), "{losses:?}");
    // The adapter is of use to the model alone.
    let model = dir.path().join("model");
    let text = "u:3 and 3\na:";
    let of = |adapters: &[(PathBuf, f64)]| {
        let engine = Engine::load(&model, &exact(adapters)).unwrap();
        logits(&engine, &engine.encode(text).unwrap())
    };
    assert_ne!(of(&[]), of(&[(whole.join("adapter"), 1.0)]));
}

/// A learner of an adapter on every layer of the tiny model, A from a formula.
fn learner(targets: Targets, ratio_b: f64) -> Learner {
    let opened = open(&golden().join("tiny")).unwrap();
    let scaled = LowRank { rank: 3, scale: 2.0 };
    let layers = opened.model.linear_layers().unwrap();
    let adapter = Adapter::new(layers.into_iter().map(|l| (l.module, scaled)));
    let model = opened.model.clone().with_adapters(vec![adapter]).unwrap();
    let optimiser = Optimiser { clip: None, ratio_b, ..Optimiser::default() };
    let how = How {
        rows: 1,
        ctx: 24,
        accumulate: 1,
        processes: 1,
        targets,
        optimiser,
        samples: false,
        options: sparsam_runtime::Options::default(),
    };
    let base = Base { weights: opened.weights().unwrap(), trained: |name| name.contains(".lora_"), seed: 0 };
    let mut learner = Learner::over(&model, how, &Device::cpu(1).unwrap(), base).unwrap();
    for p in learner.parameters().to_vec().iter().filter(|p| p.name.contains("lora_A")) {
        let values: Vec<f32> =
            (0..p.shape.iter().product()).map(|i: usize| (i as f32 * 0.7).sin() / 4.0).collect();
        learner.set_state(&p.name, &values).unwrap();
    }
    learner
}

/// A row of two examples, of which a part is learnt.
fn packed(weights: &[f32]) -> PackedRows {
    let mut rows = PackedRows::default();
    for (n, start) in [(9u32, 3), (13, 8)] {
        rows.push_example(&Example {
            tokens: (0..n).map(|i| (i * 37 + n) % 320).collect(),
            learnt: (0..n as usize).map(|i| i >= start).collect(),
            cut: 0,
            place: (0, 0),
        });
    }
    let mut given = weights.iter();
    rows.weights = match weights {
        [] => Vec::new(),
        _ => rows.targets.iter().map(|&t| if t < 0 { 9.0 } else { *given.next().unwrap() }).collect(),
    };
    rows.pad_to(24);
    rows
}

#[test]
fn rows_without_a_target_need_no_logits() {
    let of = |targets: Targets, rows: &PackedRows| {
        let mut l = learner(targets, 1.0);
        let losses: Vec<f64> =
            (1..=3).map(|t| l.step(std::slice::from_ref(rows), t, 1e-2).unwrap().loss).collect();
        (losses, l.evaluate(rows).unwrap())
    };
    let rows = packed(&[]);
    assert_eq!(rows.n_targets(), 11);
    let all = of(Targets::default(), &rows);
    let some = of(Targets { rows: Some(16), ..Targets::default() }, &rows);
    let near = |a: f64, b: f64| (a - b).abs() < 1e-5;
    assert!(all.0.iter().zip(&some.0).all(|(&a, &b)| near(a, b)), "{all:?} {some:?}");
    assert!(near(all.1.0, some.1.0) && some.1.1 == 11);
    // Equal weights are the mean; with other ones, one target alone is what counts.
    let weighted = |rows| Targets { rows, weighted: true, ..Targets::default() };
    let same = of(weighted(Some(16)), &packed(&[1.0 / 11.0; 11]));
    assert!(same.0.iter().zip(&some.0).all(|(&a, &b)| near(a, b)), "{same:?}");
    let mut one = [0.0; 11];
    one[4] = 1.0;
    let counted = of(weighted(None), &packed(&one));
    let mut alone = rows.clone();
    let at: Vec<usize> = (0..24).filter(|&i| rows.targets[i] >= 0).collect();
    (0..24).filter(|&i| i != at[4]).for_each(|i| alone.targets[i] = -1);
    let want = of(Targets::default(), &alone);
    assert!(near(counted.0[0], want.0[0]), "{counted:?} {want:?}");
}

/// The divergence in f64 from the logits of the model alone (B is 0), against the loss that a step has.
#[test]
fn another_models_probabilities_are_learnt() {
    let (vocab_size, top) = (320, 3);
    let mut rows = packed(&[]);
    let given: [(u32, f32); 3] = [(5, 0.5), (77, 0.2), (319, 0.1)];
    rows.soft = (0..24).flat_map(|_| given).collect();
    // All logits of both examples, by the engine.
    let engine = Engine::load(&golden().join("tiny"), &exact(&[])).unwrap();
    let at: Vec<usize> = (0..24).filter(|&i| rows.targets[i] >= 0).collect();
    let starts = [(0usize, 8usize), (8, 20)];
    let all: Vec<f32> = starts
        .iter()
        .flat_map(|&(a, b)| logits(&engine, &rows.tokens[a..b].iter().map(|&t| t as u32).collect::<Vec<_>>()))
        .collect();
    let log_q = |row: usize| -> Vec<f64> {
        let x = &all[row * vocab_size..][..vocab_size];
        let most = x.iter().fold(f64::MIN, |m, &v| m.max(f64::from(v)));
        let sum = x.iter().map(|&v| (f64::from(v) - most).exp()).sum::<f64>().ln() + most;
        x.iter().map(|&v| f64::from(v) - sum).collect()
    };
    for (reverse, share) in [(false, 1.0), (true, 1.0), (false, 0.25)] {
        let mean = at.iter().map(|&row| {
            let log_q = log_q(row);
            let q = given.map(|(id, _)| log_q[id as usize].exp());
            let rest_q = (1.0 - q.iter().sum::<f64>()).max(1e-6);
            let pairs = given.iter().map(|&(_, p)| f64::from(p)).zip(q).chain([(0.2, rest_q)]);
            let of = |(p, q): (f64, f64)| if reverse { q * (q / p).ln() } else { p * (p / q).ln() };
            share * pairs.map(of).sum::<f64>() - (1.0 - share) * log_q[rows.targets[row] as usize]
        });
        let want = mean.sum::<f64>() / at.len() as f64;
        let soft = Some(Soft { top, vocab_size, share, reverse });
        for limit in [None, Some(16)] {
            let mut l = learner(Targets { rows: limit, soft, ..Targets::default() }, 1.0);
            let losses: Vec<f64> =
                (1..=6).map(|t| l.step(std::slice::from_ref(&rows), t, 1e-2).unwrap().loss).collect();
            assert!((losses[0] - want).abs() < 1e-4, "{reverse} {share} {limit:?}: {losses:?}, not {want}");
            assert!(losses[5] < losses[0], "{losses:?}");
        }
    }
}

#[test]
fn b_has_a_rate_of_its_own() {
    let moved = |ratio| {
        let mut l = learner(Targets::default(), ratio);
        let before: Vec<Vec<f32>> =
            l.parameters().to_vec().iter().map(|p| l.state(&p.name).unwrap().to_vec()).collect();
        l.step(&[packed(&[])], 1, 1e-2).unwrap();
        let of = |l: &Learner, part: &str| -> f64 {
            let all = l.parameters().iter().zip(&before).filter(|(p, _)| p.name.contains(part));
            let apart = |(p, before): (&sparsam_models::Parameter, &Vec<f32>)| {
                let now = l.state(&p.name).unwrap();
                now.iter().zip(before).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>()
            };
            all.map(apart).sum()
        };
        (of(&l, "lora_A"), of(&l, "lora_B"))
    };
    let (plain, four) = (moved(1.0), moved(4.0));
    // B is 0 at first, so A has no gradient yet; only its decay moves it. B's first step is its rate, whatever its gradient.
    assert!((plain.0 - four.0).abs() < 1e-6 * plain.0.max(1.0), "{plain:?} {four:?}");
    assert!((four.1 / plain.1 - 4.0).abs() < 1e-3, "{plain:?} {four:?}");
}

#[test]
fn an_adapter_knows_the_dialogues_it_was_trained_with() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut run = Run::start(&out, workplace(dir.path())).unwrap();
    let stop = AtomicBool::new(false);
    run.go(&stop, &mut |e| {
        if matches!(e, sparsam_train::Event::Step(_)) {
            stop.store(true, Ordering::Relaxed);
        }
    })
    .unwrap();
    let model = dir.path().join("model");
    let adapters = [(out.join("adapter"), 1.0)];
    Engine::load(&model, &exact(&adapters)).unwrap();
    let config = model.join("tokenizer_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    assert!(text.contains("a:{% endif %}"));
    std::fs::write(&config, text.replace("a:{% endif %}", "A:{% endif %}")).unwrap();
    let e = Engine::load(&model, &exact(&adapters)).err().unwrap().to_string();
    assert!(e.contains("probes.json") && e.contains("dogs.a:\"\n+ \"u:"), "{e}");
    // Without the adapter the model does as it likes.
    Engine::load(&model, &exact(&[])).unwrap();
}

#[test]
fn other_methods_and_types_learn_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = workplace(dir.path());
    let f = c.finetune.as_mut().unwrap();
    (f.base_type, f.targets, f.dropout) =
        (Some("Q8_0".into()), vec!["q_proj".into(), "v_proj".into()], Some(0.0));
    let mut run = Run::start(&dir.path().join("q8"), c).unwrap();
    assert_eq!(run.learner().parameters().len(), 8);
    let first = run.held_back_loss().unwrap().unwrap();
    let done = run.go(&AtomicBool::new(false), &mut |_| {}).unwrap();
    assert!(done.progress.best.unwrap() < first);

    // The narrowest layers have 32 inputs, half a block of NF4: those stay as they are.
    let mut c = workplace(dir.path());
    c.finetune.as_mut().unwrap().method = Some(sparsam_train::lora::Method::Qlora);
    let mut run = Run::start(&dir.path().join("nf4"), c).unwrap();
    let weights = run.learner().session().weights().clone();
    let dtype = |name: &str| weights.shapes()[&format!("model.layers.1.mlp.{name}.weight")].1;
    assert_eq!(
        [dtype("down_proj"), dtype("up_proj")],
        [sparsam_dtype::DType::NF4, sparsam_dtype::DType::F32]
    );
    let first = run.held_back_loss().unwrap().unwrap();
    let done = run.go(&AtomicBool::new(false), &mut |_| {}).unwrap();
    assert!(done.progress.best.unwrap() < first);

    let mut c = workplace(dir.path());
    c.finetune.as_mut().unwrap().method = Some(sparsam_train::lora::Method::Full);
    let mut run = Run::start(&dir.path().join("full"), c).unwrap();
    let first = run.held_back_loss().unwrap().unwrap();
    let done = run.go(&AtomicBool::new(false), &mut |_| {}).unwrap();
    assert!(done.progress.best.unwrap() < first);
    let opened = open(&dir.path().join("full/model")).unwrap();
    assert!(opened.tokenizer.unwrap().chat_template().is_some());

    let said = |change: &dyn Fn(&mut Config)| {
        let mut c = workplace(dir.path());
        change(&mut c);
        Run::start(&dir.path().join("bad"), c).err().unwrap().to_string()
    };
    let f = |c: &mut Config| c.finetune.clone().unwrap();
    let e = said(&|c| {
        c.finetune = Some(sparsam_train::lora::FinetuneConfig { targets: vec!["qproj".into()], ..f(c) })
    });
    assert!(e.contains("no linear layer's name ends with qproj; there are down_proj"), "{e}");
    let e = said(&|c| c.finetune = Some(sparsam_train::lora::FinetuneConfig { rank: Some(99), ..f(c) }));
    assert!(e.contains("must be from 1 to 16"), "{e}");
    let e = said(&|c| c.data.ctx = Some(100));
    assert!(e.contains("the model was made for 64 tokens"), "{e}");
    assert!(!dir.path().join("bad").exists());
}
