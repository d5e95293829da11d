//! Where the time of a run goes, by kind of kernel.

use std::fmt;
use std::time::Duration;

/// Time of one kind of kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// The kind, as in `Kernel::name`.
    pub kernel: &'static str,
    /// Calls.
    pub calls: usize,
    /// Time in them.
    pub time: Duration,
    /// Bytes of their operands: what they read and wrote if each element moved once.
    pub bytes: usize,
}

/// Times of all kernels since profiling began.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// One entry a kind, in order of first use.
    pub kernels: Vec<KernelTime>,
    /// Time of each kernel call by its position in the program; where several programs run in turn, of all of them.
    pub steps: Vec<Duration>,
    /// Runs counted.
    pub runs: usize,
}

impl Profile {
    pub(crate) fn add(&mut self, step: usize, kernel: &'static str, time: Duration, bytes: usize) {
        if self.steps.len() <= step {
            self.steps.resize(step + 1, Duration::ZERO);
        }
        self.steps[step] += time;
        match self.kernels.iter_mut().find(|k| k.kernel == kernel) {
            Some(k) => {
                k.calls += 1;
                k.time += time;
                k.bytes += bytes;
            }
            None => self.kernels.push(KernelTime { kernel, calls: 1, time, bytes }),
        }
    }

    /// Time of the kernels of this name.
    pub fn time_of(&self, kernel: &str) -> Duration {
        self.kernels.iter().filter(|k| k.kernel == kernel).map(|k| k.time).sum()
    }

    /// Time in all kernels.
    pub fn total(&self) -> Duration {
        self.kernels.iter().map(|k| k.time).sum()
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<16} {:>8} {:>12} {:>7} {:>9}", "kernel", "calls", "time", "share", "GB/s")?;
        let total = self.total().as_secs_f64().max(f64::MIN_POSITIVE);
        let mut sorted: Vec<&KernelTime> = self.kernels.iter().collect();
        sorted.sort_by_key(|k| std::cmp::Reverse(k.time));
        for k in sorted {
            let seconds = k.time.as_secs_f64();
            let (share, rate) = (100.0 * seconds / total, k.bytes as f64 / 1e9 / seconds.max(1e-12));
            writeln!(
                f,
                "{:<16} {:>8} {:>9.3} ms {share:>6.1}% {rate:>9.2}",
                k.kernel,
                k.calls,
                seconds * 1e3
            )?;
        }
        Ok(())
    }
}
