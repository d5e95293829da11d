//! What the machine can do at most: read bandwidth and arithmetic of registers alone, measured; and what products with one
//! row of activations make of that bandwidth.
//!
//! Speeds are quoted as shares of these (Williams et al. 2009, the roofline model). Each roof is the best of several
//! short runs on all threads, since whatever disturbs a run only makes it slower.

use crate::mem::View;
use crate::weight::{self, Weight};
use crate::{AlignedBytes, Context, Error, Memory, Pages, Precision};
use sparsam_dtype::DType;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Runs of which the best counts.
const RUNS: usize = 5;
/// Bytes read for the bandwidth: several times the largest cache that a desktop or server core group shares.
const BYTES: usize = 256 << 20;
/// Turns of an arithmetic loop in one run: a few milliseconds.
const TURNS: usize = 1_000_000;
/// Independent sums in an arithmetic loop: latency (4) times units (2) and some.
const SUMS: usize = 12;

/// Kinds of multiply-accumulate that kernels use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// f32 products summed in f32.
    F32,
    /// bf16 products summed in f32; as f32 where the machine lacks them.
    Bf16,
    /// Products of 8-bit integers summed in i32.
    Int8,
}

/// Bytes per second that all threads together read from memory.
pub fn read_bandwidth(ctx: &Context) -> f64 {
    let threads = ctx.pool().threads();
    let words = BYTES / 8;
    // In large pages as weights are, and filled, so that the pages exist.
    let mut bytes = AlignedBytes::zeroed(BYTES);
    bytes.bytes_mut().fill(1);
    let data: &[u64] = bytemuck::cast_slice(bytes.bytes());
    best(BYTES as f64, || {
        ctx.pool().run(threads, |t| {
            let part = &data[words * t / threads..words * (t + 1) / threads];
            let mut sums = [0_u64; 32];
            for chunk in part.chunks_exact(32) {
                sums.iter_mut().zip(chunk).for_each(|(s, x)| *s = s.wrapping_add(*x));
            }
            black_box(sums);
        });
    })
}

/// Operations per second (a multiply and an add are two) of all threads together, out of registers.
pub fn peak(ctx: &Context, kind: Arithmetic) -> f64 {
    let threads = ctx.pool().threads();
    let per_turn = ops_per_turn(ctx, kind);
    best((threads * TURNS) as f64 * per_turn, || ctx.pool().run(threads, |_| turn(ctx, kind)))
}

/// Bytes of weights per second that all threads together multiply with one row of activations of 8 bits: the median of some
/// passes over matrices of `shapes` (rows and columns) stored as `dtype`, as many from the front as are together beyond
/// caches. What a generated token takes, but for what lies between the products.
///
/// # Errors
/// As [`Weight::pack`]; [`Error::Shape`] if there is no matrix.
pub fn product_rate(ctx: &Context, dtype: DType, shapes: &[[usize; 2]]) -> Result<f64, Error> {
    /// Three times a large cache.
    const COLD: usize = 96 << 20;
    let pages = &mut Pages::default();
    let (mut weights, mut bytes) = (Vec::new(), 0);
    for &[rows, cols] in shapes {
        let row = dtype.bytes_for(cols).filter(|&n| n > 0).unwrap_or(1);
        let rows = rows.min(COLD.saturating_sub(bytes).div_ceil(row));
        if rows > 0 && cols > 0 {
            // Any bytes but such as make infinities: half precision reads 0.065 in these.
            let fill = vec![0x2C; dtype.bytes_for(rows * cols).unwrap_or(0)];
            weights.push(Weight::pack_in(pages, dtype, rows, cols, &fill)?);
            bytes += fill.len();
        }
    }
    let widest = |f: fn(&Weight) -> usize| weights.iter().map(f).max();
    let (Some(rows), Some(cols)) = (widest(Weight::rows), widest(Weight::cols)) else {
        return Err(Error::Shape { op: "product_rate", what: "no matrix to multiply with".into() });
    };
    let mut mem = Memory::new();
    let (a, out) = (mem.add_owned(4 * cols), mem.add_owned(4 * rows));
    mem.bytes_mut(a)?.fill(0x3F); // 0.75
    let mut times = Vec::new();
    let start = Instant::now();
    // The first pass counts no more than one of five does in a median.
    while times.len() < 5 || (start.elapsed() < Duration::from_millis(30) && times.len() < 1000) {
        let pass = Instant::now();
        for w in &weights {
            let a = View::contiguous(a, DType::F32, &[1, w.cols()]);
            let out = View::contiguous(out, DType::F32, &[1, w.rows()]);
            weight::matmul(ctx, &mut mem, &[&out], &a, &[w], Precision::Int8)?;
        }
        times.push(pass.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(bytes as f64 / times[times.len() / 2])
}

fn best(work: f64, mut run: impl FnMut()) -> f64 {
    let rate = |_| {
        let start = Instant::now();
        run();
        work / start.elapsed().as_secs_f64()
    };
    (0..RUNS).map(rate).fold(0.0, f64::max)
}

/// Lanes of the portable loop.
const LANES: usize = 8;

fn ops_per_turn(ctx: &Context, kind: Arithmetic) -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        let lanes = match (ctx.cpu().simd, kind) {
            (crate::Simd::Scalar, _) => LANES,
            (crate::Simd::Avx2, Arithmetic::Int8) => 32,
            (crate::Simd::Avx2, _) => 8,
            (crate::Simd::Avx512, Arithmetic::Int8) if ctx.cpu().vnni => 64,
            (crate::Simd::Avx512, Arithmetic::Int8) => 32,
            (crate::Simd::Avx512, Arithmetic::Bf16) if ctx.cpu().bf16 => 32,
            (crate::Simd::Avx512, _) => 16,
        };
        (2 * SUMS * lanes) as f64
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (ctx, kind);
        (2 * SUMS * LANES) as f64
    }
}

/// `TURNS` turns of `SUMS` multiply-accumulates.
fn turn(ctx: &Context, kind: Arithmetic) {
    #[cfg(target_arch = "x86_64")]
    {
        use crate::Simd;
        // SAFETY: `Context` holds only instructions that this machine has, and each arm asks for its own.
        unsafe {
            match (ctx.cpu().simd, kind) {
                (Simd::Scalar, _) => portable(),
                (Simd::Avx512, Arithmetic::Int8) if ctx.cpu().vnni => x86::vnni(),
                (_, Arithmetic::Int8) => x86::maddubs(),
                (Simd::Avx512, Arithmetic::Bf16) if ctx.cpu().bf16 => x86::bf16(),
                (Simd::Avx512, _) => x86::fma512(),
                (Simd::Avx2, _) => x86::fma256(),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (ctx, kind);
        portable();
    }
}

/// Multiply and add in plain Rust, whatever the compiler makes of it.
fn portable() {
    let x = black_box([1.0000001_f32; LANES]);
    let mut sums = [[0.0_f32; LANES]; SUMS];
    for _ in 0..TURNS {
        for s in &mut sums {
            for (s, x) in s.iter_mut().zip(&x) {
                *s = *s * x + x;
            }
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{SUMS, TURNS};
    use std::arch::x86_64::*;
    use std::hint::black_box;

    macro_rules! loop_of {
        ($name:ident, $features:literal, $zero:expr, $step:expr) => {
            #[target_feature(enable = $features)]
            pub fn $name() {
                let mut sums = [$zero; SUMS];
                for _ in 0..TURNS {
                    for s in &mut sums {
                        *s = $step(*s);
                    }
                }
                black_box(sums);
            }
        };
    }

    loop_of!(fma256, "avx2,fma", _mm256_setzero_ps(), |s| {
        let x = _mm256_set1_ps(1.0000001);
        _mm256_fmadd_ps(s, x, x)
    });
    loop_of!(fma512, "avx512f", _mm512_setzero_ps(), |s| {
        let x = _mm512_set1_ps(1.0000001);
        _mm512_fmadd_ps(s, x, x)
    });
    loop_of!(vnni, "avx512f,avx512vnni", _mm512_setzero_si512(), |s| {
        let x = _mm512_set1_epi8(3);
        _mm512_dpbusd_epi32(s, x, x)
    });
    loop_of!(maddubs, "avx2", _mm256_setzero_si256(), |s| {
        // The sum itself is one factor, so that the compiler cannot move the products out of the loop.
        let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(3), s);
        _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    });

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16() {
        let x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0), _mm512_set1_ps(1.0));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..TURNS {
            for s in &mut sums {
                *s = _mm512_dpbf16_ps(*s, x, x);
            }
        }
        black_box(sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;

    #[test]
    fn roofs_are_plausible_on_every_path() {
        for cpu in Cpu::all() {
            let ctx = Context::new(1, cpu);
            for kind in [Arithmetic::F32, Arithmetic::Bf16, Arithmetic::Int8] {
                let ops = peak(&ctx, kind);
                // From a slow phone core to more than any core there is.
                assert!((1e8..1e13).contains(&ops), "{cpu} {kind:?}: {ops:e}");
            }
        }
        let bytes = read_bandwidth(&Context::new(1, Cpu::detect()));
        assert!((1e8..1e12).contains(&bytes), "{bytes:e}");
    }

    #[test]
    fn products_of_every_type_have_a_rate() {
        let ctx = Context::new(1, Cpu::detect());
        for dtype in [DType::S3_64, DType::Q4_0, DType::Q8_0, DType::F16] {
            let rate = product_rate(&ctx, dtype, &[[100, 64], [0, 64], [17, 128]]).unwrap();
            assert!((1e6..1e12).contains(&rate), "{dtype}: {rate:e}");
        }
        assert!(product_rate(&ctx, DType::Q4_0, &[[16, 33]]).unwrap_err().to_string().contains("blocks"));
        assert!(product_rate(&ctx, DType::Q4_0, &[]).unwrap_err().to_string().contains("no matrix"));
    }
}
