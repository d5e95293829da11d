//! A small pool of threads with spinning barriers.
//!
//! Decoding one token runs hundreds of parallel regions of a few microseconds; a general work-stealing pool spends
//! more on entering one than the region takes. Here a region is one store and one spin: workers watch an epoch
//! counter, spin for a while after each region and only then sleep.
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
    epoch: AtomicU64,
    job: UnsafeCell<Job>,
    next: AtomicUsize,
    /// Workers that have not finished the current region.
    pending: AtomicUsize,
    sleepers: AtomicUsize,
    stop: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only by the caller that holds `Pool::caller` while no worker is in a region (`pending`
// is 0), and read by workers only after the epoch store that follows the write (release, acquire).
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is used only while `Pool::run` keeps its target alive.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] counted; at least 1.
    pub fn new(threads: usize) -> Pool {
        unsafe fn nothing(_: *const (), _: usize) {}
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            job: UnsafeCell::new(Job { data: std::ptr::null(), call: nothing, tasks: 0 }),
            next: AtomicUsize::new(0),
            pending: AtomicUsize::new(0),
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
        // SAFETY: the last region has ended (`pending` was 0), so no worker reads the job.
        unsafe { *s.job.get() = Job { data: (&raw const task).cast(), call: call::<F>, tasks } };
        s.next.store(0, Ordering::Relaxed);
        s.pending.store(self.workers.len(), Ordering::Relaxed);
        s.epoch.fetch_add(1, Ordering::SeqCst);
        if s.sleepers.load(Ordering::SeqCst) > 0 {
            drop(s.lock.lock());
            s.wake.notify_all();
        }
        s.work();
        let mut spins = 0;
        while s.pending.load(Ordering::Acquire) != 0 {
            spin(&mut spins);
        }
        let panic = s.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(guard);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

/// One turn of waiting; gives the core away now and then, for machines with fewer cores than threads.
fn spin(turns: &mut u32) {
    *turns = turns.wrapping_add(1);
    if (*turns).is_multiple_of(SPINS) { std::thread::yield_now() } else { std::hint::spin_loop() }
}

impl Shared {
    fn work(&self) {
        // SAFETY: between the epoch store and the caller's wait for `pending` the job is not written.
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

    fn worker(&self) {
        let mut seen = 0;
        loop {
            let mut turns = 0;
            while self.epoch.load(Ordering::SeqCst) == seen {
                if turns < SPINS {
                    turns += 1;
                    std::hint::spin_loop();
                    continue;
                }
                let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                while self.epoch.load(Ordering::SeqCst) == seen {
                    held = self.wake.wait(held).unwrap_or_else(PoisonError::into_inner);
                }
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
            }
            seen += 1;
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            self.work();
            self.pending.fetch_sub(1, Ordering::Release);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        drop(self.shared.lock.lock());
        self.shared.wake.notify_all();
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
