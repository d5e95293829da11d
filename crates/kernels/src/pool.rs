//! A small pool of threads with spinning barriers.
//!
//! Decoding one token runs hundreds of parallel regions of a few microseconds; a general work-stealing pool spends
//! more on entering one than the region takes. Here a region is one store and one spin: workers watch one word of
//! state, spin for a while after each region and only then sleep.
//!
//! The caller waits for the workers that have entered its region, not for those that never came: on a machine that
//! others use too, a worker without a core costs its share of the work and nothing more.
//!
//! Tasks are claimed one after the other by whichever thread is free, so a task must not depend on who runs it:
//! results never change with the number of threads as long as the *tasks* do not.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Turns of the spin loop before a waiting worker sleeps: about a tenth of a millisecond, longer than any gap
/// between the regions of one token and short against a person's patience with an idle, hot core.
const SPINS: u32 = 20_000;

/// Turns after which a waiting caller gives its core away at each turn: whom it waits for may have none.
const PATIENCE: u32 = 2_000;

/// In [`Shared::state`]: the region takes workers.
const OPEN: u64 = 1 << 16;
/// In [`Shared::state`]: workers inside the region.
const INSIDE_MASK: u64 = OPEN - 1;
/// In [`Shared::state`]: the region's number counts in these steps.
const EPOCH: u64 = OPEN << 1;

thread_local! {
    /// Whether this thread is inside a region, where a nested one runs alone.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Threads that run the tasks of one region after another.
pub struct Pool {
    shared: Arc<Shared>,
    /// One region at a time.
    caller: Mutex<()>,
    workers: Vec<std::thread::JoinHandle<()>>,
}

#[derive(Clone, Copy)]
struct Job {
    data: *const (),
    call: unsafe fn(*const (), usize),
    tasks: usize,
}

struct Shared {
    /// The region's number, whether it is [`OPEN`], and how many workers are in it.
    state: AtomicU64,
    job: UnsafeCell<Job>,
    next: AtomicUsize,
    sleepers: AtomicUsize,
    stop: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only by the caller that holds `Pool::caller` while the region is closed and no worker is in
// it, and read by workers only after they have entered an open one, whose opening follows the write (release, acquire).
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is used only while `Pool::run` keeps its target alive.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] counted; at least 1.
    pub fn new(threads: usize) -> Pool {
        unsafe fn nothing(_: *const (), _: usize) {}
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(Job { data: std::ptr::null(), call: nothing, tasks: 0 }),
            next: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            panic: Mutex::new(None),
        });
        let spawn = |i| {
            let shared = shared.clone();
            std::thread::Builder::new().name(format!("sparsam-{i}")).spawn(move || shared.worker())
        };
        // A machine that refuses a thread still computes, with those it gave.
        let workers = (1..threads).map_while(|i| spawn(i).ok()).collect();
        Pool { shared, caller: Mutex::new(()), workers }
    }

    /// Threads that run tasks, the caller counted.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Cuts `units` of work into one long piece for each thread, three quarters of it all, and small ones for those that
    /// are done early: long streams of memory run best, and all threads should end together.
    pub fn pieces(&self, units: usize) -> Vec<Range<usize>> {
        let threads = self.threads();
        let mut pieces = Vec::with_capacity(8 * threads);
        let mut first = 0;
        while first < units {
            let len = match pieces.len() < threads {
                true => units * 3 / (4 * threads),
                false => (units - first) / (2 * threads),
            };
            let end = units.min(first + len.max(1));
            pieces.push(first..end);
            first = end;
        }
        pieces
    }

    /// Runs `task(0) .. task(tasks - 1)`, each once, on any thread, and returns when all have ended.
    ///
    /// From inside a task it runs them one after the other on the calling thread.
    ///
    /// # Panics
    /// With a task's own panic, after the others have ended.
    pub fn run<F: Fn(usize) + Sync>(&self, tasks: usize, task: F) {
        if tasks <= 1 || self.workers.is_empty() || INSIDE.get() {
            (0..tasks).for_each(task);
            return;
        }
        unsafe fn call<F: Fn(usize)>(data: *const (), i: usize) {
            // SAFETY: `data` is the `&F` of `run`, which does not return before the last task has.
            unsafe { (*data.cast::<F>())(i) }
        }
        let guard = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
        let s = &*self.shared;
        // SAFETY: the last region is closed and all that entered it have left, so no worker reads the job.
        unsafe { *s.job.get() = Job { data: (&raw const task).cast(), call: call::<F>, tasks } };
        s.next.store(0, Ordering::Relaxed);
        s.state.fetch_add(EPOCH | OPEN, Ordering::SeqCst);
        s.wake();
        s.work();
        s.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut turns = 0;
        while s.state.load(Ordering::Acquire) & INSIDE_MASK != 0 {
            turns += 1;
            if turns < PATIENCE { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let panic = s.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(guard);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Shared {
    fn work(&self) {
        // SAFETY: the caller writes no job while anybody, itself included, is in the region.
        let job = unsafe { *self.job.get() };
        INSIDE.set(true);
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= job.tasks {
                break;
            }
            // SAFETY: `call` belongs to `data`, and `run` keeps the closure alive until all tasks have ended.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| unsafe { (job.call)(job.data, i) })) {
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
            }
        }
        INSIDE.set(false);
    }

    /// Wakes the workers that sleep.
    fn wake(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.lock.lock());
            self.wake.notify_all();
        }
    }

    fn worker(&self) {
        let mut seen = 0;
        let mut turns = 0;
        while !self.stop.load(Ordering::SeqCst) {
            let state = self.state.load(Ordering::SeqCst);
            if state & OPEN != 0 && state / EPOCH != seen {
                // Fails when the region was closed or another worker entered in between: look again.
                if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
                {
                    seen = state / EPOCH;
                    self.work();
                    self.state.fetch_sub(1, Ordering::Release);
                    turns = 0;
                }
            } else if turns < SPINS {
                turns += 1;
                std::hint::spin_loop();
            } else {
                let held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                // Whoever changes the state after this look sees a sleeper and wakes it.
                if self.state.load(Ordering::SeqCst) == state && !self.stop.load(Ordering::SeqCst) {
                    drop(self.wake.wait(held).unwrap_or_else(PoisonError::into_inner));
                }
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
                turns = 0;
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of tasks and has none of its own.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let pool = Pool::new(3);
        for tasks in [0, 1, 2, 3, 7, 1000] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..50 {
                pool.run(tasks, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 50));
        }
        std::thread::sleep(std::time::Duration::from_millis(30)); // workers asleep
        let n = AtomicUsize::new(0);
        pool.run(10, |_| {
            pool.run(3, |_| {
                n.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(n.into_inner(), 30);
    }

    /// Most workers have no core here: regions open and close without them, and nothing is lost or done twice.
    #[test]
    fn more_threads_than_cores() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let pool = Pool::new(8 * cores);
        let sum = AtomicUsize::new(0);
        let regions = 2000;
        for r in 0..regions {
            let tasks = 2 + r % 5;
            let seen = [const { AtomicBool::new(false) }; 7];
            pool.run(tasks, |i| {
                assert!(!seen[i].swap(true, Ordering::Relaxed), "task {i} of region {r} ran twice");
                sum.fetch_add(1, Ordering::Relaxed);
            });
            let done = seen.iter().filter(|s| s.load(Ordering::Relaxed)).count();
            assert_eq!(done, tasks, "region {r}");
        }
        assert_eq!(sum.into_inner(), (0..regions).map(|r| 2 + r % 5).sum());
    }

    /// Both threads are inside of each region, and the worker takes longer.
    #[test]
    fn a_region_ends_when_all_who_entered_are_done() {
        let pool = Pool::new(2);
        let caller = std::thread::current().id();
        for region in 0..10 {
            let both = std::sync::Barrier::new(2);
            let done = AtomicUsize::new(0);
            pool.run(2, |_| {
                both.wait();
                if std::thread::current().id() != caller {
                    std::thread::sleep(std::time::Duration::from_millis(3));
                }
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 2, "region {region}");
        }
    }

    #[test]
    fn pieces_are_all_of_it_in_order() {
        for threads in 1..4 {
            let pool = Pool::new(threads);
            for units in [0, 1, 2, 3, 7, 60, 3072] {
                let pieces = pool.pieces(units);
                assert!(pieces.iter().all(|p| !p.is_empty()), "{threads} {units}: {pieces:?}");
                assert_eq!(
                    pieces.iter().flat_map(Range::clone).collect::<Vec<_>>(),
                    (0..units).collect::<Vec<_>>()
                );
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let panic = catch_unwind(AssertUnwindSafe(|| pool.run(4, |i| assert_ne!(i, 2, "task two"))));
        assert!(panic.unwrap_err().downcast_ref::<String>().unwrap().contains("task two"));
        let n = AtomicUsize::new(0);
        pool.run(4, |_| {
            n.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(n.into_inner(), 4);
    }
}
