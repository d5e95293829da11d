//! What the machine can do, found at run time, and what kernels are told to use.

use crate::{Error, Pool};

/// A family of vector instructions. Ordered: a later one includes the earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Simd {
    /// Portable Rust; the meaning that the others are held to.
    Scalar,
    /// AVX2, FMA and F16C (Haswell, 2013, and later).
    Avx2,
    /// AVX-512 F, BW, DQ, VL (Skylake-X, Zen 4 and later).
    Avx512,
}

impl Simd {
    /// The name that `SPARSAM_SIMD` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Simd::Scalar => "scalar",
            Simd::Avx2 => "avx2",
            Simd::Avx512 => "avx512",
        }
    }
}

/// The instructions to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Vector family.
    pub simd: Simd,
    /// AVX-512 BF16: products of bf16 pairs summed in f32.
    pub bf16: bool,
    /// AVX-512 VNNI: products of u8 and i8 quadruples summed in i32.
    pub vnni: bool,
}

impl Cpu {
    /// Portable code only.
    pub const SCALAR: Cpu = Cpu { simd: Simd::Scalar, bf16: false, vnni: false };

    /// All that this machine has.
    pub fn detect() -> Cpu {
        #[cfg(target_arch = "x86_64")]
        {
            macro_rules! has { ($($f:tt),*) => { $( std::arch::is_x86_feature_detected!($f) )&&* } }
            if has!("avx2", "fma", "f16c") {
                if has!("avx512f", "avx512bw", "avx512dq", "avx512vl") {
                    let (bf16, vnni) = (has!("avx512bf16"), has!("avx512vnni"));
                    return Cpu { simd: Simd::Avx512, bf16, vnni };
                }
                return Cpu { simd: Simd::Avx2, bf16: false, vnni: false };
            }
        }
        Cpu::SCALAR
    }

    /// Every choice that this machine can run, the plainest first: what tests go through.
    pub fn all() -> Vec<Cpu> {
        let best = Cpu::detect();
        let plain =
            [Simd::Scalar, Simd::Avx2, Simd::Avx512].map(|simd| Cpu { simd, bf16: false, vnni: false });
        let mut all: Vec<Cpu> = plain.into_iter().filter(|c| c.simd <= best.simd).collect();
        if best.bf16 || best.vnni {
            all.push(best);
        }
        all
    }

    /// [`Cpu::detect`], or what `SPARSAM_SIMD` (`scalar`, `avx2`, `avx512`) says.
    pub fn from_env() -> Result<Cpu, Error> {
        let best = Cpu::detect();
        let Ok(name) = std::env::var("SPARSAM_SIMD") else { return Ok(best) };
        let known = [Simd::Scalar, Simd::Avx2, Simd::Avx512].into_iter().find(|s| s.name() == name);
        match known {
            Some(simd) if simd == best.simd => Ok(best),
            Some(simd) if simd < best.simd => Ok(Cpu { simd, bf16: false, vnni: false }),
            _ => Err(Error::Simd { name, best: best.simd.name() }),
        }
    }
}

impl std::fmt::Display for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.simd.name())?;
        f.write_str(if self.bf16 { "+bf16" } else { "" })?;
        f.write_str(if self.vnni { "+vnni" } else { "" })
    }
}

/// What every kernel is handed: threads and instructions.
///
/// Its fields are private because kernels run the instructions that it names without asking again.
pub struct Context {
    pool: Pool,
    cpu: Cpu,
}

impl Context {
    /// `threads` threads (0: one for each core) and the given instructions.
    ///
    /// # Panics
    /// If the machine lacks them: running them would be undefined. [`Cpu::all`] lists what it has.
    pub fn new(threads: usize, cpu: Cpu) -> Context {
        let best = Cpu::detect();
        assert!(cpu.simd <= best.simd && cpu.bf16 <= best.bf16 && cpu.vnni <= best.vnni, "{cpu} on {best}");
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        Context { pool: Pool::new(if threads == 0 { cores } else { threads }), cpu }
    }

    /// The threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The instructions, which this machine has.
    pub fn cpu(&self) -> Cpu {
        self.cpu
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ends_with_what_was_detected() {
        let all = Cpu::all();
        assert_eq!(all[0], Cpu::SCALAR);
        assert_eq!(*all.last().unwrap(), Cpu::detect());
    }
}
