//! Runs from their folder: what they leave, and that they resume bit for bit.

use sparsam_train::config::Config;
use sparsam_train::metrics::{self, Record};
use sparsam_train::{Error, Event, Run, checkpoint};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[path = "../../runtime/tests/common/threads.rs"]
mod threads;
use threads::Threads;

/// Sentences in which the next word can be guessed.
fn text() -> String {
    let (who, what) = (["the cat", "a dog", "the owl", "my cow"], ["sees", "hears", "likes"]);
    (0..900).map(|i| format!("{} {} {}.\n", who[i % 4], what[i * 7 % 3], who[i * 5 % 4])).collect()
}

fn config(dir: &Path, more: &str) -> Config {
    let path = dir.join("text.txt");
    if !path.exists() {
        std::fs::write(&path, text()).unwrap();
    }
    let toml = format!(
        "[model]\nlayers = 2\nhidden = 32\nheads = 2\nintermediate = 64\n\
         [data]\ntrain = [{path:?}]\nctx = 32\ntokenizer = \"bytes\"\n{more}"
    );
    Config::from_toml(&toml, "test").unwrap()
}

const SHORT: &str = "[optimiser]\nlr = 3e-3\n[run]\nsteps = 12\nbatch = 4\nthreads = 1\neval_every = 4\neval_tokens = 512\n\
                     sample_every = 6\nsample_tokens = 8\ncheckpoint_every = 5\n";

fn go(run: &mut Run) -> sparsam_train::Finished {
    run.go(&AtomicBool::new(false), &mut |_| {}).unwrap()
}

/// Stops it behind step 7, with a checkpoint.
fn stopped_behind_7(mut run: Run) -> sparsam_train::Finished {
    let stop = AtomicBool::new(false);
    let stopped = run
        .go(&stop, &mut |e| {
            if matches!(e, Event::Step(s) if s.step == 7) {
                stop.store(true, Ordering::Relaxed);
            }
        })
        .unwrap();
    assert!(!stopped.complete && stopped.progress.step == 7);
    stopped
}

fn weights(run: &mut Run) -> Vec<(String, Vec<u32>)> {
    let names = run.learner().kept();
    let bits = |run: &mut Run, name: &str| {
        let (words, rest) = run.learner().state_bytes(name).unwrap().as_chunks();
        assert!(rest.is_empty());
        words.iter().map(|b| u32::from_le_bytes(*b)).collect::<Vec<_>>()
    };
    names.into_iter().map(|k| (k.name.clone(), bits(run, &k.name))).collect()
}

fn losses(folder: &Path) -> Vec<(u64, u64)> {
    let records = metrics::read(&folder.join("metrics.jsonl")).unwrap();
    let loss = |r: &Record| match r {
        Record::Step(s) => Some((s.step, s.loss.to_bits())),
        Record::HeldBack { step, held_back_loss } => Some((*step + 1000, held_back_loss.to_bits())),
        _ => None,
    };
    records.iter().filter_map(loss).collect()
}

#[test]
fn a_run_learns_and_leaves_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("run");
    let more = "[optimiser]\nlr = 1e-2\n[run]\nsteps = 60\nbatch = 8\nseed = 3\nthreads = 1\neval_every = 20\n\
                sample_every = 30\nsample_prompt = \"the \"\nusd_per_hour = 2.0\n";
    let mut run = Run::start(&folder, config(dir.path(), more)).unwrap();
    let mut samples = Vec::new();
    let finished = run
        .go(&AtomicBool::new(false), &mut |e| {
            if let Event::Sample(step, text) = e {
                samples.push((step, text.to_string()));
            }
        })
        .unwrap();
    assert!(finished.complete && finished.progress.step == 60);
    let held: Vec<f64> = metrics::read(&folder.join("metrics.jsonl"))
        .unwrap()
        .iter()
        .filter_map(|r| match r {
            Record::HeldBack { held_back_loss, .. } => Some(*held_back_loss),
            _ => None,
        })
        .collect();
    // At first every byte of 257 is as likely as any: ln 257 = 5.55. The sentences have about 0.5 nats a byte.
    assert!((held[0] - 5.55).abs() < 0.1 && held.len() == 4 && held[3] < 1.6, "{held:?}");
    assert!(samples.len() == 2 && samples.iter().all(|(_, s)| s.starts_with("the ")), "{samples:?}");
    let html = std::fs::read_to_string(folder.join("report.html")).unwrap();
    assert!(html.contains("held-back loss") && html.contains("That cost"));
    assert!(
        Run::start(&folder, config(dir.path(), more))
            .err()
            .unwrap()
            .to_string()
            .contains("holds a run already")
    );

    // Its own config.toml makes the same run once more.
    let again = dir.path().join("again");
    let mut replay = Run::start(&again, Config::open(&folder.join("config.toml")).unwrap()).unwrap();
    replay.set_steps(2);
    assert_eq!(replay.settings().schedule.lr, run.settings().schedule.lr);
    replay.go(&AtomicBool::new(false), &mut |_| {}).unwrap();
    assert_eq!(losses(&again)[..2], losses(&folder)[..2]);
}

#[test]
fn a_run_stopped_and_taken_up_again_is_the_run_that_was_not() {
    for (accumulate, more) in [(1, ""), (2, ""), (1, "dtype = \"bf16\"\n"), (2, "MUON")] {
        let kind = if more == "MUON" { "kind = \"muon\"\n" } else { "" };
        let short = SHORT.replacen("[run]", &format!("{kind}[run]"), 1);
        let more = format!("{short}accumulate = {accumulate}\n{}", more.trim_start_matches("MUON"));
        let dir = tempfile::tempdir().unwrap();
        let whole = dir.path().join(format!("whole{accumulate}"));
        let mut a = Run::start(&whole, config(dir.path(), &more)).unwrap();
        assert!(go(&mut a).complete);

        let parts = dir.path().join(format!("parts{accumulate}"));
        let b = Run::start(&parts, config(dir.path(), &more)).unwrap();
        let stopped = stopped_behind_7(b);
        let mut b = Run::resume(&parts).unwrap();
        assert_eq!(b.progress(), &stopped.progress);
        assert!(go(&mut b).complete);
        assert!(weights(&mut a) == weights(&mut b), "{more}: weights or moments differ");
        assert_eq!(losses(&whole), losses(&parts));
    }
}

type Bits = Vec<(String, Vec<u32>)>;

/// A run of two processes in `folder`, new with the settings `more` or taken up again, up to step `until`: the weights and
/// moments of both. The second one is told to stop, and both do.
fn together(folder: &Path, more: Option<&str>, until: Option<u64>) -> [Bits; 2] {
    let threads = Threads::all(2).into_iter().map(|group| {
        let folder = folder.to_path_buf();
        let config = more.map(|more| config(folder.parent().unwrap(), more));
        std::thread::spawn(move || {
            let group = Arc::new(group);
            let mut run = match config {
                None => Run::resume_in(&folder, group).unwrap(),
                Some(config) => Run::start_in(&folder, config, group).unwrap(),
            };
            if let Some(budget) = run.settings().memory {
                assert!(run.learner().bytes() <= budget, "{} of {budget}", run.learner().bytes());
            }
            let (stop, second) = (AtomicBool::new(false), !run.leads());
            let done = run
                .go(&stop, &mut |e| {
                    if matches!(e, Event::Step(s) if Some(s.step) == until && second) {
                        stop.store(true, Ordering::Relaxed);
                    }
                })
                .unwrap();
            assert_eq!((done.progress.step, done.complete), until.map_or((12, true), |step| (step, false)));
            weights(&mut run)
        })
    });
    let threads: Vec<_> = threads.collect();
    let both: Vec<Bits> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    assert!(both[0] == both[1], "the processes have different weights");
    both.try_into().unwrap()
}

/// Two processes train in one folder as one with all their rows; stopped and taken up again, they are the two that were
/// not, to the last bit; the folder goes on with two, not with one.
#[test]
fn two_processes_are_one_with_twice_the_rows() {
    let ways = [
        ("batch = 4", "batch = 8", ""),
        ("batch = 2\naccumulate = 2", "batch = 8", ""),
        // Each gradient is consumed as it comes.
        ("batch = 4", "batch = 8", "clip = 0.0\n"),
        ("batch = 4", "batch = 8", "kind = \"muon\"\n"),
        ("batch = 2\naccumulate = 2\ndtype = \"bf16\"", "batch = 8\ndtype = \"bf16\"", ""),
    ];
    for (i, (each, joint, optimiser)) in ways.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let settings =
            |batch: &str| SHORT.replace("batch = 4", batch).replace("[run]", &format!("{optimiser}[run]"));
        let [one, two, parts] = ["one", "two", "parts"].map(|name| dir.path().join(name));
        let mut alone = Run::start(&one, config(dir.path(), &settings(joint))).unwrap();
        go(&mut alone);
        let [whole, _] = together(&two, Some(&settings(each)), None);
        together(&parts, Some(&settings(each)), Some(6));
        let e = Run::resume(&parts).err().unwrap().to_string();
        assert!(e.contains("run.processes: the run was started with 2, not 1"), "{e}");
        let [resumed, _] = together(&parts, None, None);
        assert!(whole == resumed, "way {i}: the run that was taken up again is another");
        assert_eq!(losses(&two), losses(&parts), "way {i}");
        // The joint batch's, but for the order of sums.
        let f = |bits: &u32| f32::from_bits(*bits) as f64;
        for ((name, a), (_, b)) in
            weights(&mut alone).iter().zip(&whole).filter(|((n, _), _)| n.contains("adamw.m"))
        {
            let norm = |x: f64| x * x;
            let off: f64 = a.iter().zip(b).map(|(a, b)| norm(f(a) - f(b))).sum();
            let all: f64 = a.iter().map(|a| norm(f(a))).sum();
            assert!(off.sqrt() <= 1e-3 * all.sqrt(), "way {i}: {name}: {} of {}", off.sqrt(), all.sqrt());
        }
        let held =
            |folder: &Path| losses(folder).into_iter().filter(|(step, _)| *step > 1000).collect::<Vec<_>>();
        for (a, b) in held(&one).iter().zip(&held(&two)) {
            let off = (f64::from_bits(a.1) - f64::from_bits(b.1)).abs();
            assert!(a.0 == b.0 && off < 1e-4, "way {i}: {a:?} {b:?}");
        }
        assert!(two.join("model.gguf").exists() && parts.join("model.gguf").exists());
    }
}

/// Two processes keep to a budget of memory, and check a step on the way.
#[test]
fn two_processes_keep_to_a_budget() {
    let dir = tempfile::tempdir().unwrap();
    let settings = SHORT.replace("[run]", "clip = 0.0\n[run]\nverify = 1").replace("sample_every = 6\n", "");
    let with = |memory: &str| format!("{settings}sample_every = 0\nmemory = \"{memory}\"\n");
    // Nothing is begun with a budget that nothing fits into: the second process is not waited for.
    let leader = Arc::new(Threads::all(2).remove(0));
    let none = Run::start_in(&dir.path().join("none"), config(dir.path(), &with("1kB")), leader);
    let said = none.err().unwrap().to_string();
    let least = said.split("tokens take ").nth(1).unwrap().split(" MB").next().unwrap();
    let (free, tight) = (dir.path().join("free"), dir.path().join("tight"));
    together(&free, Some(&with("1GB")), None);
    together(&tight, Some(&with(&format!("{least}MB"))), None);
    for (a, b) in losses(&free).iter().zip(&losses(&tight)) {
        assert!(a.0 == b.0 && (f64::from_bits(a.1) - f64::from_bits(b.1)).abs() < 1e-4, "{a:?} {b:?}");
    }
    let notes: Vec<String> = metrics::read(&tight.join("metrics.jsonl"))
        .unwrap()
        .into_iter()
        .filter_map(|r| if let Record::Note { note, .. } = r { Some(note) } else { None })
        .collect();
    for part in ["are computed again", "compiled and plain agree"] {
        assert!(notes.iter().any(|n| n.contains(part)), "{part}: {notes:?}");
    }
}

/// The loss falls under Muon, and its matrices have one moment.
#[test]
fn muon_learns() {
    let dir = tempfile::tempdir().unwrap();
    let adamw = SHORT.replacen("steps = 12", "steps = 40", 1);
    let muon = adamw.replacen("[run]", "kind = \"muon\"\n[run]", 1);
    let mut plain = Run::start(&dir.path().join("plain"), config(dir.path(), &adamw)).unwrap();
    let mut run = Run::start(&dir.path().join("run"), config(dir.path(), &muon)).unwrap();
    let kept = run.learner().kept();
    let of = |part: &str| kept.iter().filter(|k| k.name.starts_with(part)).count();
    // Seven matrices in each of two layers; the table and the norms keep both of AdamW's.
    assert_eq!((of("muon.m."), of("adamw.m."), of("adamw.v.")), (14, 6, 6), "{kept:?}");
    // From ln 257 = 5.55, about as fast as AdamW at the same rate.
    let [plain, muon] = [&mut plain, &mut run].map(|run| go(run).progress.held_back.unwrap());
    assert!(muon < 3.5 && muon < 1.05 * plain, "{muon}, AdamW {plain}");
    let mut wrong = config(dir.path(), SHORT);
    wrong.optimiser.momentum = Some(0.9);
    let e = Run::start(&dir.path().join("wrong"), wrong).err().unwrap().to_string();
    assert!(e.contains("belongs to kind"), "{e}");
}

/// A model whose matrices are large enough for moments in 8 bits, trained by `kind`.
fn large(dir: &Path, kind: &str, steps: usize, more: &str) -> Config {
    let short = SHORT.replacen("steps = 12", &format!("steps = {steps}"), 1).replacen(
        "[run]",
        &format!("kind = \"{kind}\"\n[run]"),
        1,
    );
    let mut c = config(dir, &format!("{short}{more}"));
    (c.model.hidden, c.model.intermediate) = (Some(64), Some(132));
    c
}

/// AdamW with moments in 8 bits: the first two losses are those of f32, since steps are made before moments are rounded; at
/// the end it is no farther from f32 than f32's own runs with other seeds are from each other. Matrices of 64 x 64 and
/// 64 x 132 have moments of 2 bytes and 8 / 256 for each element, the table and the norms of 8.
#[test]
fn moments_in_8_bits_learn_as_those_in_32() {
    let dir = tempfile::tempdir().unwrap();
    let trained = |name: &str, kind: &str, seed: u64| {
        let mut c = large(dir.path(), kind, 40, "");
        c.run.seed = Some(seed);
        let folder = dir.path().join(name);
        let mut run = Run::start(&folder, c).unwrap();
        let bytes = run.learner().moments_bytes();
        let held = go(&mut run).progress.held_back.unwrap();
        let losses: Vec<f64> = losses(&folder)
            .into_iter()
            .filter(|(step, _)| *step <= 40)
            .map(|(_, loss)| f64::from_bits(loss))
            .collect();
        (held, losses, bytes)
    };
    let (rounded, rounded_losses, rounded_bytes) = trained("rounded", "adamw8bit", 0);
    let f32s = [0, 1, 2].map(|seed| trained(&format!("f32-{seed}"), "adamw", seed));
    let (plain, plain_losses, bytes) = &f32s[0];
    assert_eq!(rounded_losses.len(), 40);
    for step in 0..2 {
        let off = (rounded_losses[step] - plain_losses[step]).abs();
        assert!(off < 1e-6 * plain_losses[step], "step {step}: off by {off:.1e}");
    }
    assert_ne!(rounded_losses[39], plain_losses[39]);
    let seeds = f32s.iter().map(|f| f.0);
    let spread = seeds.clone().fold(f64::MIN, f64::max) - seeds.fold(f64::MAX, f64::min);
    println!(
        "held-back loss {rounded:.4} in 8 bits, {plain:.4} in f32, of which seeds differ by {spread:.4}"
    );
    assert!((rounded - plain).abs() <= spread && *plain < 3.0, "{rounded} {plain} {spread}");
    // Four matrices of attention and three of the MLP in each of two layers, in whole blocks of 256.
    let blocks = 2 * (4 * 64 * 64 + 3 * 64 * 132) / 256;
    let others = 257 * 64 + 5 * 64;
    println!("moments: {rounded_bytes} bytes, {bytes} in f32");
    assert_eq!((rounded_bytes, *bytes), (2 * 260 * blocks + 8 * others, 8 * (256 * blocks + others)));
}

#[test]
fn moments_in_8_bits_are_taken_up_again_bit_for_bit() {
    for (accumulate, more) in [(1, "dtype = \"bf16\"\n"), (2, "")] {
        let dir = tempfile::tempdir().unwrap();
        let config = || large(dir.path(), "adamw8bit", 12, &format!("accumulate = {accumulate}\n{more}"));
        let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
        let mut a = Run::start(&whole, config()).unwrap();
        assert!(go(&mut a).complete);
        let b = Run::start(&parts, config()).unwrap();
        stopped_behind_7(b);
        let mut b = Run::resume(&parts).unwrap();
        assert_eq!(b.progress().step, 7);
        assert!(go(&mut b).complete);
        assert!(weights(&mut a) == weights(&mut b), "weights or moments differ");
        assert_eq!(losses(&whole), losses(&parts));
        // Their bytes lie in the checkpoint as they are; a run in f32 refuses it.
        let newest = checkpoint::list(&parts.join("checkpoints")).unwrap().pop().unwrap();
        let file = sparsam_formats::safetensors::File::open(&newest).unwrap();
        let rounded = file.tensors().iter().filter(|t| t.dtype == sparsam_dtype::DType::U8).count();
        assert_eq!(rounded, 2 * 14);
        let mut other = Run::start(&dir.path().join("other"), large(dir.path(), "adamw", 12, "")).unwrap();
        let e = checkpoint::load(&newest, other.learner()).unwrap_err().to_string();
        assert!(e.contains("has another shape"), "{e}");
    }
}

/// Moments in a file give the same bits as those in memory, when a run is taken up again too; they leave nothing in the
/// folder, and no budget of memory counts them.
#[test]
fn moments_in_a_file_are_those_in_memory() {
    for kind in ["adamw", "adamw8bit"] {
        let dir = tempfile::tempdir().unwrap();
        let config = |paged: bool, memory: &str| {
            let mut c = large(dir.path(), kind, 12, memory);
            c.optimiser.paged = Some(paged);
            c
        };
        let mut a = Run::start(&dir.path().join("memory"), config(false, "")).unwrap();
        assert!(go(&mut a).complete && a.learner().paged_bytes() == 0);
        let folder = dir.path().join("file");
        let mut b = Run::start(&folder, config(true, "")).unwrap();
        let moments = b.learner().moments_bytes();
        assert!((moments..moments + 64 * 50).contains(&b.learner().paged_bytes()));
        stopped_behind_7(b);
        let mut b = Run::resume(&folder).unwrap();
        assert!(go(&mut b).complete && b.learner().paged_bytes() >= moments);
        assert!(weights(&mut a) == weights(&mut b), "{kind}: weights or moments differ");
        let names = |folder: &Path| {
            let mut names: Vec<_> =
                std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&dir.path().join("memory")), names(&folder));
        // What the least budget of memory is that the error names: without the moments, where these lie in a file.
        let [memory, file] = [false, true].map(|paged| {
            let refused = Run::start(&dir.path().join("no"), config(paged, "memory = \"1kB\"\n"));
            let said = refused.err().unwrap().to_string();
            let number = said.split("tokens take ").nth(1).unwrap().split(" MB").next().unwrap();
            number.parse::<f64>().unwrap()
        });
        let saved = memory - file;
        assert!((saved - moments as f64 / 1e6).abs() < 0.21, "{kind}: {saved} MB of {moments} bytes");
    }
}

/// What the interpreter and the kernels make of a step in bf16 under a budget of memory is what the run takes.
#[test]
fn a_second_opinion_knows_numbers_and_memory() {
    let dir = tempfile::tempdir().unwrap();
    let more = "[run]\nsteps = 2\nbatch = 8\nthreads = 1\nverify = 1\nsample_every = 0\nmemory = \"";
    let least = {
        let e =
            Run::start(&dir.path().join("no"), config(dir.path(), &format!("{more}1kB\"\n"))).err().unwrap();
        let said = e.to_string();
        said.split("tokens take ").nth(1).unwrap().split(" MB").next().unwrap().to_string()
    };
    let toml = format!("{more}{least}MB\"\ndtype = \"bf16\"\n");
    let mut run = Run::start(&dir.path().join("run"), config(dir.path(), &toml)).unwrap();
    let budget = run.settings().memory.unwrap();
    assert!(run.learner().bytes() <= budget, "{} of {budget}", run.learner().bytes());
    let mut notes = Vec::new();
    run.go(&AtomicBool::new(false), &mut |e| {
        if let Event::Note(note) = e {
            notes.push(note.to_string());
        }
    })
    .unwrap();
    assert!(run.learner().bytes() <= budget, "{} of {budget}", run.learner().bytes());
    assert!(notes.iter().any(|n| n.contains("are computed again")), "{notes:?}");
    assert!(notes.iter().any(|n| n.contains("compiled and plain agree")), "{notes:?}");
}

#[test]
fn old_checkpoints_go_and_foreign_ones_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("run");
    let mut run = Run::start(&folder, config(dir.path(), SHORT)).unwrap();
    go(&mut run);
    let kept = checkpoint::list(&folder.join("checkpoints")).unwrap();
    let names: Vec<_> = kept.iter().map(|p| p.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["step-00000010.safetensors", "step-00000012.safetensors"]);

    let other = dir.path().join("other");
    let mut c = config(dir.path(), SHORT);
    c.model.hidden = Some(48);
    let mut other = Run::start(&other, c).unwrap();
    let e = checkpoint::load(&kept[0], other.learner()).unwrap_err().to_string();
    assert!(e.contains("belongs to another model"), "{e}");
    let e = Run::resume(&dir.path().join("nothing")).err().unwrap().to_string();
    assert!(e.contains("holds no run"), "{e}");
}

#[test]
fn a_run_that_diverges_says_so_and_keeps_the_checkpoint_from_before() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("run");
    let mut run = Run::start(&folder, config(dir.path(), SHORT)).unwrap();
    let stop = AtomicBool::new(false);
    run.go(&stop, &mut |e| stop.store(matches!(e, Event::Saved(_)), Ordering::Relaxed)).unwrap();
    // One broken number in the weights, as a broken disk or cosmic ray leaves it.
    let name = run.learner().parameters()[1].name.clone();
    let mut w = run.learner().state(&name).unwrap().to_vec();
    w[0] = f32::NAN;
    run.learner().set_state(&name, &w).unwrap();
    let e = run.go(&AtomicBool::new(false), &mut |_| {}).unwrap_err();
    assert!(matches!(e, Error::Diverged { step: 6, .. }), "{e}");
    let said = e.to_string();
    assert!(
        said.contains("the loss is NaN") && said.contains("checkpoint of step 5 is from before"),
        "{said}"
    );
    assert_eq!(Run::resume(&folder).unwrap().progress().step, 5);

    let mut c = config(dir.path(), SHORT);
    (c.run.steps, c.run.max_rise, c.optimiser.lr, c.optimiser.clip) =
        (Some(60), Some(0.3), Some(3.0), Some(0.0));
    c.optimiser.warmup = Some(10);
    let mut run = Run::start(&dir.path().join("wild"), c).unwrap();
    let e = run.go(&AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
    assert!(e.contains("the loss has risen from") || e.contains("the loss is NaN"), "{e}");
}

#[test]
fn jsonl_token_files_and_learnt_vocabularies_are_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let lines: String = text().lines().map(|l| format!("{{\"body\": \"{l}\"}}\n")).collect();
    let jsonl = dir.path().join("docs.jsonl");
    std::fs::write(&jsonl, lines).unwrap();
    let mut c = config(dir.path(), SHORT);
    c.data.train = vec![jsonl];
    c.data.field = Some("body".into());
    c.data.tokenizer = Some("bpe:300".into());
    let mut first = Run::start(&dir.path().join("bpe"), c).unwrap();
    assert!(first.receipt().vocab_size > 257 && first.receipt().tokens_sha256.is_some());
    go(&mut first);

    // The tokens that the first run has made, given as a file, with its tokenizer.
    let mut c = config(dir.path(), SHORT);
    c.data.train = vec![dir.path().join("bpe/tokens.bin")];
    c.data.tokenizer = Some(dir.path().join("bpe/tokenizer").to_str().unwrap().into());
    let mut second = Run::start(&dir.path().join("tokens"), c).unwrap();
    go(&mut second);
    assert_eq!(losses(&dir.path().join("bpe")), losses(&dir.path().join("tokens")));
    assert!(weights(&mut first) == weights(&mut second));
}
