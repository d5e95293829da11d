//! What this machine has and can do: a probe of a few seconds, for forecasts and for `sparsam doctor`.

use anyhow::Context as _;
use sparsam_dtype::DType;
use sparsam_kernels::matmul::{Write, matmul};
use sparsam_kernels::roof::{Arithmetic, peak, read_bandwidth};
use sparsam_kernels::{Context, Cpu, Memory, Precision, View};
use sparsam_plan::forecast::Machine;
use sparsam_plan::hardware::Accelerator;
use std::path::Path;
use std::time::{Duration, Instant};

/// What was found.
pub struct Probe {
    /// The processor's name, as the system gives it.
    pub processor: String,
    /// Threads that kernels use.
    pub threads: usize,
    /// Instructions that the machine has, and those in use (`SPARSAM_SIMD` may hold some back).
    pub has: Cpu,
    pub uses: Cpu,
    /// Bytes of memory, and of those that are free; unknown outside Linux.
    pub memory_total: Option<f64>,
    pub memory_available: Option<f64>,
    /// Measured roofs: operations and bytes a second of all threads.
    pub f32_flops: f64,
    pub bf16_flops: f64,
    pub int8_ops: f64,
    pub read_bandwidth: f64,
    /// What an f32 product of a training step's size reaches.
    pub matmul_flops: f64,
}

/// Rows, inner and columns of the product: an up projection of GPT-2, as `kernels`' benches have it.
const PRODUCT: [usize; 3] = [1024, 768, 3072];
/// For how long products are repeated; the best counts.
const PRODUCT_TIME: Duration = Duration::from_millis(800);

/// Measures this machine with `threads` threads (0: all).
///
/// # Errors
/// If `SPARSAM_SIMD` asks for what the machine lacks.
pub fn measure(threads: usize) -> anyhow::Result<Probe> {
    let uses = Cpu::from_env()?;
    let context = Context::new(threads, uses);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    Ok(Probe {
        processor: processor(),
        threads: context.pool().threads(),
        has: Cpu::detect(),
        uses,
        memory_total: kilobytes(&memory, "MemTotal:"),
        memory_available: kilobytes(&memory, "MemAvailable:"),
        f32_flops: peak(&context, Arithmetic::F32),
        bf16_flops: peak(&context, Arithmetic::Bf16),
        int8_ops: peak(&context, Arithmetic::Int8),
        read_bandwidth: read_bandwidth(&context),
        matmul_flops: product(&context)?,
    })
}

/// This machine for forecasts that time the work itself, so that no roof is needed: `threads` (0: all), `folder` where
/// files are written, `usd_per_hour` if it is rented.
pub fn here(threads: usize, folder: &Path, usd_per_hour: Option<f64>) -> Machine {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = if threads == 0 { cores } else { threads };
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = kilobytes(&memory, "MemAvailable:").unwrap_or(f64::INFINITY);
    let disk = disk_free(folder).unwrap_or(f64::INFINITY);
    let machine = Machine::owned(&processor(), threads as f64, 0.0, 0.0, available, disk);
    Machine { usd_per_hour: usd_per_hour.unwrap_or(machine.usd_per_hour), ..machine }
}

impl Probe {
    /// The machine as forecasts want it; `folder` is where files would be written.
    pub fn machine(&self, folder: &Path) -> Machine {
        Machine::owned(
            &self.processor,
            self.threads as f64,
            self.matmul_flops * STEP_SHARE,
            self.read_bandwidth,
            self.memory_available.unwrap_or(f64::INFINITY),
            disk_free(folder).unwrap_or(f64::INFINITY),
        )
    }
}

/// Share of a lone product's speed that a whole training step reaches on a CPU: its other kernels are bound by memory.
const STEP_SHARE: f64 = 0.7;

impl Probe {
    /// The machine as a line of the table of accelerators, called `here`.
    pub fn accelerator(&self) -> Accelerator {
        let machine = self.machine(Path::new("."));
        Accelerator {
            name: "here".into(),
            title: format!("this machine ({}, {} threads)", self.processor, self.threads),
            peak_flops: self.matmul_flops,
            memory_bytes: machine.memory_bytes,
            bandwidth: self.read_bandwidth,
            watts: machine.watts,
            usd_per_hour: machine.usd_per_hour,
            utilisation: STEP_SHARE,
            bandwidth_share: 1.0,
            source: "measured; 4 W a core, electricity as money".into(),
            date: "now".into(),
        }
    }
}

/// FLOP/s of the best of the products that fit into [`PRODUCT_TIME`].
fn product(context: &Context) -> anyhow::Result<f64> {
    let [m, k, n] = PRODUCT;
    let mut memory = Memory::new();
    let mut operand = |shape: [usize; 2]| {
        let slab = memory.add_owned(shape[0] * shape[1] * 4);
        View::contiguous(slab, DType::F32, &shape)
    };
    let (a, b, out) = (operand([m, k]), operand([k, n]), operand([m, n]));
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < PRODUCT_TIME {
        let begin = Instant::now();
        matmul(context, &mut memory, &out, &a, &b, Precision::F32, Write::Set)
            .context("the probe's product")?;
        best = best.min(begin.elapsed().as_secs_f64());
    }
    Ok(2.0 * (m * k * n) as f64 / best)
}

fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':').map(|(_, n)| n.trim()));
    name.unwrap_or(std::env::consts::ARCH).to_string()
}

/// The number after `key` in text of lines such as `MemTotal:  16314628 kB`, in bytes.
fn kilobytes(text: &str, key: &str) -> Option<f64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key))?;
    let number: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(number * 1024.0)
}

/// The most memory that this process has had; unknown outside Linux.
pub fn peak_memory() -> Option<f64> {
    kilobytes(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// Bytes free for a user on the disk that `folder`, or its nearest parent that exists, is on.
pub fn disk_free(folder: &Path) -> Option<f64> {
    let absolute = std::path::absolute(folder).ok()?;
    let there = absolute.ancestors().find(|p| p.exists())?;
    let stat = rustix::fs::statvfs(there).ok()?;
    Some(stat.f_bavail as f64 * stat.f_frsize as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_the_system_are_read() {
        let text = "MemTotal:       16314628 kB\nMemAvailable:    100 kB\n";
        assert_eq!(kilobytes(text, "MemAvailable:"), Some(102400.0));
        assert_eq!(kilobytes(text, "VmHWM:"), None);
        assert_eq!(kilobytes("VmHWM: x kB", "VmHWM:"), None);
        if cfg!(target_os = "linux") {
            assert!(peak_memory().unwrap() > 1e6);
        }
        // A folder that is not there yet lies on its parent's disk.
        let here = disk_free(Path::new(".")).unwrap();
        assert!(here > 0.0 && disk_free(Path::new("not/made/yet")).is_some());
    }
}
