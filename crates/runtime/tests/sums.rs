//! Sums over processes: right, in the same calls on all, and beside the program.

#[path = "common/threads.rs"]
mod threads;

use sparsam_ir::{DType, Graph, Trace};
use sparsam_runtime::{Data, Device, Error, Group, Options, Session, Step, Weights};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use threads::Threads;

fn session(group: Arc<dyn Group>) -> Session {
    let mut session = Session::new(&Device::cpu(1).unwrap(), Arc::new(Weights::new()));
    session.set_group(group);
    session
}

/// Numbers in a bucket.
const BUCKET: usize = 1 << 18;

/// A result of several buckets, small ones, one that waits early, and a state.
fn graph() -> Graph {
    let t = Trace::new();
    let large = t.input("large", &[600, 1000], DType::F32);
    let small = t.input("small", &[3], DType::F32);
    let early = (&small + &small).all_reduce();
    let product = early.neg() * &small;
    let (large, other) = (large.neg().all_reduce(), small.exp().all_reduce());
    let state = t.state("state", &[3], DType::F32);
    let state = state.assign(&(&state + &product));
    let state = state.assign(&state.all_reduce());
    let twice = state.mul_scalar(2.0);
    let row = large.slice(0, 599, 600).reshape(&[1000]);
    t.finish(&[("product", &product), ("large", &large), ("row", &row), ("other", &other), ("twice", &twice)])
        .unwrap()
}

/// Runs it twice as process `rank` of two; all results and the state.
fn results(session: &mut Session, step: &Step, rank: usize) -> Vec<Vec<f32>> {
    let large: Vec<f32> = (0..600_000).map(|i| (i % 1000) as f32 + 10.0 * rank as f32).collect();
    let small = [1.0, 2.0, rank as f32];
    let mut all = Vec::new();
    for _ in 0..2 {
        let out = session.run(step, &[("large", Data::F32(&large)), ("small", Data::F32(&small))]).unwrap();
        all = ["product", "large", "row", "other", "twice"].map(|n| out.f32(n).unwrap().to_vec()).to_vec();
    }
    all.push(bytemuck::cast_slice(session.state_bytes("state").unwrap()).to_vec());
    all
}

#[test]
fn two_processes_have_the_sums_of_both() {
    for options in [Options::default(), Options::eager()] {
        let threads: Vec<_> = Threads::all(2)
            .into_iter()
            .map(|group| {
                let options = options.clone();
                std::thread::spawn(move || {
                    let rank = group.rank();
                    let mut session = session(Arc::new(group));
                    let step = session.load(&graph(), &options).unwrap();
                    results(&mut session, &step, rank)
                })
            })
            .collect();
        for (rank, thread) in threads.into_iter().enumerate() {
            let all = thread.join().unwrap();
            // early = 2 (1 + 1), 2 (2 + 2), 2 (0 + 1); product = -early small.
            let product = |rank: usize| [-4.0, -16.0, -2.0 * rank as f32];
            assert_eq!(all[0], product(rank));
            let large = |i: usize| -(2.0 * (i % 1000) as f32 + 10.0);
            assert!(all[1].iter().enumerate().all(|(i, &x)| x == large(i)));
            assert!(all[2].iter().enumerate().all(|(i, &x)| x == large(i)));
            let e = |x: f32| x.exp();
            let other = [2.0 * e(1.0), 2.0 * e(2.0), 1.0 + e(1.0)];
            assert!(all[3].iter().zip(other).all(|(a, b)| (a - b).abs() < 1e-5), "{:?}", all[3]);
            // Each run adds the product to what both had, and sums: s1 = p0 + p1; s2 = 2 s1 + p0 + p1 = 3 s1.
            let state: Vec<f32> = (0..3).map(|i| 3.0 * (product(0)[i] + product(1)[i])).collect();
            assert_eq!(all[5], state);
            assert_eq!(all[4], state.iter().map(|x| 2.0 * x).collect::<Vec<_>>());
        }
    }
}

/// One process alone has its own numbers.
#[test]
fn one_process_has_its_own_numbers() {
    let mut session = Session::new(&Device::cpu(1).unwrap(), Arc::new(Weights::new()));
    let step = session.compile(&graph()).unwrap();
    let all = results(&mut session, &step, 1);
    assert_eq!(all[0], [-2.0, -8.0, -2.0]);
    assert_eq!(all[5], [-4.0, -16.0, -4.0]); // twice as much behind two runs
}

/// A group of two whose other process has the same numbers. It says when a sum begins, and ends it when it is told to.
struct Gate {
    begun: Mutex<Sender<usize>>,
    end: Mutex<Receiver<()>>,
}

impl Gate {
    fn new() -> (Arc<Gate>, Receiver<usize>, Sender<()>) {
        let ((begun, is_begun), (may_end, end)) = (channel(), channel());
        (Arc::new(Gate { begun: Mutex::new(begun), end: Mutex::new(end) }), is_begun, may_end)
    }
}

impl Group for Gate {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        2
    }

    fn sum(&self, values: &mut [f32]) {
        self.begun.lock().unwrap().send(values.len()).unwrap();
        self.end.lock().unwrap().recv().unwrap();
        values.iter_mut().for_each(|x| *x *= 2.0);
    }

    fn sum_counts(&self, _: &mut [u64]) {
        unreachable!("a session sums no counts")
    }
}

/// Later kernels run while a sum is under way: one of them fails, and the run is over before the sum is.
#[test]
fn the_program_goes_on_while_a_sum_is_under_way() {
    let t = Trace::new();
    let x = t.input("x", &[512, 512], DType::F32);
    let sum = x.add_scalar(1.0).all_reduce();
    let picked = t.input("table", &[2, 1], DType::F32).gather(&t.input("rows", &[1], DType::I32));
    let graph = t.finish(&[("sum", &sum), ("picked", &picked)]).unwrap();
    let (gate, begun, may_end) = Gate::new();
    let mut session = session(gate);
    let step = session.compile(&graph).unwrap();
    let mut run = |x: f32, row: i32| -> Result<Vec<f32>, Error> {
        let x = vec![x; 512 * 512];
        let inputs = [("x", Data::F32(&x)), ("table", Data::F32(&[5.0, 6.0])), ("rows", Data::I32(&[row]))];
        let out = session.run(&step, &inputs)?;
        assert_eq!(out.f32("picked").unwrap(), [6.0]);
        Ok(out.f32("sum").unwrap().to_vec())
    };
    let e = run(1.0, 9).unwrap_err().to_string();
    assert!(e.contains("gather"), "{e}");
    // It has begun, and nobody has let it end.
    assert_eq!(begun.recv().unwrap(), BUCKET);
    // The next run is not confused by it.
    may_end.send(()).unwrap();
    may_end.send(()).unwrap();
    assert!(run(2.0, 1).unwrap().iter().all(|&x| x == 6.0));
    assert_eq!(begun.try_iter().collect::<Vec<_>>(), [BUCKET]);
}

/// What is sent at once is decided by the program alone: large results are cut, small ones join, whoever is waited for
/// does not wait for more.
#[test]
fn calls_follow_from_the_program() {
    let (gate, begun, may_end) = Gate::new();
    let mut session = session(gate);
    let step = session.compile(&graph()).unwrap();
    (0..20).for_each(|_| may_end.send(()).unwrap());
    results(&mut session, &step, 0);
    let lengths: Vec<usize> = begun.try_iter().collect();
    let (first, second) = lengths.split_at(lengths.len() / 2);
    assert_eq!(first, second);
    // Three numbers that are needed at once, 600,000, three small ones and a state of three.
    assert_eq!(first.iter().sum::<usize>(), 600_009, "{first:?}");
    assert!(first.contains(&BUCKET) && first.len() < 7, "{first:?}");
}
