//! The dense linear algebra that rounding needs: products through the runtime, and one factorisation.
//!
//! The factorisation is written here because the library that does it well (faer) takes 93 seconds of CPU to compile and
//! brings 70 crates for it; this one takes 50 lines.

use crate::Error;
use sparsam_ir::{DType, Precision, Trace};
use sparsam_runtime::{Data, Device, Session, Weights};
use std::sync::{Arc, Mutex};

/// Calls `f` on every item, on `threads` threads; the order is not fixed.
pub(crate) fn parallel<T: Send>(threads: usize, items: Vec<T>, f: impl Fn(T) + Sync) {
    let queue = Mutex::new(items.into_iter());
    let work = || {
        loop {
            let item = queue.lock().expect("no thread panics while it takes an item").next();
            match item {
                Some(item) => f(item),
                None => return,
            }
        }
    };
    std::thread::scope(|s| {
        for _ in 1..threads.max(1) {
            s.spawn(work);
        }
        work();
    });
}

/// Products of plain matrices on a device.
pub struct Products {
    session: Session,
}

impl Products {
    /// Products on `device`.
    pub fn new(device: &Device) -> Products {
        Products { session: Session::new(device, Arc::new(Weights::new())) }
    }

    /// Threads of the device.
    pub fn threads(&self) -> usize {
        self.session.device().threads()
    }

    /// `a` (m, k) by `b` (k, n), row-major, summed in f32: (m, n).
    ///
    /// # Errors
    /// If the runtime fails.
    pub fn matmul(&mut self, a: &[f32], b: &[f32], k: usize) -> Result<Vec<f32>, Error> {
        let (m, n) = (a.len() / k, b.len() / k);
        if m == 0 || n == 0 {
            return Ok(Vec::new());
        }
        let t = Trace::new();
        let x = t.input("a", &[m, k], DType::F32);
        let y = t.input("b", &[k, n], DType::F32);
        let graph = t.finish(&[("c", &x.matmul_with(&y, false, false, Precision::F32))])?;
        let step = self.session.compile(&graph)?;
        let out = self.session.run(&step, &[("a", Data::F32(a)), ("b", Data::F32(b))])?;
        Ok(out.f32("c")?.to_vec())
    }
}

/// `H = U D U^T` with U upper triangular, its diagonal 1, and D diagonal.
pub struct Udu {
    /// Order.
    pub n: usize,
    /// U, row-major.
    pub u: Vec<f32>,
    /// The diagonal of D.
    pub d: Vec<f32>,
}

/// Rows and columns of a block of [`Udu::new`]: 64 x 64 f64 are 32 KiB.
const BLOCK: usize = 64;

impl Udu {
    /// Factorises a symmetric matrix `h` (n, n), row-major. `None` if it is not positive definite in f64.
    ///
    /// A Cholesky factorisation from the last row to the first, by blocks, in f64: n^3 / 3 operations.
    pub fn new(h: &[f32], n: usize, threads: usize) -> Option<Udu> {
        // With both axes reversed, U D U^T is the usual L D L^T.
        let mut rows: Vec<Vec<f64>> =
            (0..n).map(|i| (0..=i).map(|j| f64::from(h[(n - 1 - i) * n + n - 1 - j])).collect()).collect();
        for start in (0..n).step_by(BLOCK) {
            let end = (start + BLOCK).min(n);
            // What earlier columns contribute to these, then the block on the diagonal, then what is below it.
            let done: Vec<Vec<f64>> = rows[start..end].iter().map(|r| r[..start].to_vec()).collect();
            let done = &done;
            parallel(
                threads,
                rows[start..].iter_mut().enumerate().collect(),
                |(i, row): (usize, &mut Vec<f64>)| {
                    let (before, block) = row.split_at_mut(start);
                    let width = block.len().min(end - start).min(i + 1);
                    for (j, x) in block[..width].iter_mut().enumerate() {
                        *x -= dot(before, &done[j]);
                    }
                },
            );
            for i in start..end {
                let (above, below) = rows.split_at_mut(i);
                let row = &mut below[0];
                for j in start..i {
                    row[j] = (row[j] - dot(&row[start..j], &above[j][start..j])) / above[j][j];
                }
                let pivot = row[i] - dot(&row[start..i], &row[start..i]);
                if pivot <= 0.0 || !pivot.is_finite() {
                    return None;
                }
                row[i] = pivot.sqrt();
            }
            let (above, below) = rows.split_at_mut(end);
            let diagonal = &above[start..];
            parallel(threads, below.iter_mut().collect(), |row: &mut Vec<f64>| {
                for (j, l) in diagonal.iter().enumerate() {
                    let at = start + j;
                    row[at] = (row[at] - dot(&row[start..at], &l[start..at])) / l[at];
                }
            });
        }
        let mut u = vec![0f32; n * n];
        let mut d = vec![0f32; n];
        for (i, row) in rows.iter().enumerate() {
            d[n - 1 - i] = (row[i] * row[i]) as f32;
            for (j, &x) in row.iter().enumerate() {
                u[(n - 1 - i) * n + n - 1 - j] = (x / rows[j][j]) as f32;
            }
        }
        Some(Udu { n, u, d })
    }

    /// Solves `x H = b` for one row `b`, in place.
    pub fn solve(&self, b: &mut [f32]) {
        let n = self.n;
        // z U^T = b, from the last element to the first.
        for j in (0..n).rev() {
            b[j] -= dot32(&self.u[j * n + j + 1..(j + 1) * n], &b[j + 1..]);
        }
        b.iter_mut().zip(&self.d).for_each(|(x, d)| *x /= d);
        // x U = z / D, from the first to the last.
        for k in 0..n {
            let (done, rest) = b.split_at_mut(k + 1);
            axpy(rest, -done[k], &self.u[k * n + k + 1..(k + 1) * n]);
        }
    }
}

/// The sum of products, in four partial sums so that it can be vectorised.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0f64; 8];
    let (a8, b8) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (x, y) in a8.0.iter().zip(b8.0) {
        for i in 0..8 {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f64>() + a8.1.iter().zip(b8.1).map(|(x, y)| x * y).sum::<f64>()
}

/// As `dot`, in f32.
pub(crate) fn dot32(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (a16, b16) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (x, y) in a16.0.iter().zip(b16.0) {
        for i in 0..16 {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f32>() + a16.1.iter().zip(b16.1).map(|(x, y)| x * y).sum::<f32>()
}

/// `y += a x`.
pub(crate) fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// Solves the symmetric positive definite system `a x = b` of order `n` in place of `b`; `false` if `a` is singular.
/// For small systems: `a` (row-major, its lower half) is overwritten.
pub(crate) fn solve_small(a: &mut [f64], b: &mut [f64], n: usize) -> bool {
    for i in 0..n {
        for j in 0..=i {
            let s = a[i * n + j] - dot(&a[i * n..i * n + j], &a[j * n..j * n + j]);
            if i == j {
                if s <= 0.0 || !s.is_finite() {
                    return false;
                }
                a[i * n + i] = s.sqrt();
            } else {
                a[i * n + j] = s / a[j * n + j];
            }
        }
        b[i] = (b[i] - dot(&a[i * n..i * n + i], &b[..i])) / a[i * n + i];
    }
    for i in (0..n).rev() {
        let tail: f64 = (i + 1..n).map(|k| a[k * n + i] * b[k]).sum();
        b[i] = (b[i] - tail) / a[i * n + i];
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A matrix of known factors comes apart again, at awkward sizes; solving undoes multiplying.
    #[test]
    fn factorises_and_solves() {
        for n in [1usize, 2, 63, 64, 65, 130, 200] {
            let x: Vec<f32> = (0..(n + 7) * n).map(|i| ((i * i + 3 * i) as f32 * 0.37).sin()).collect();
            let mut h = vec![0f32; n * n];
            for i in 0..n {
                for j in 0..n {
                    h[i * n + j] = (0..n + 7).map(|t| x[t * n + i] * x[t * n + j]).sum::<f32>()
                        + if i == j { 1.0 } else { 0.0 };
                }
            }
            for threads in [1, 2] {
                let f = Udu::new(&h, n, threads).unwrap();
                for i in 0..n {
                    assert_eq!(f.u[i * n + i], 1.0);
                    for j in 0..n {
                        assert!(j >= i || f.u[i * n + j] == 0.0);
                        let got: f64 = (0..n)
                            .map(|k| {
                                f64::from(f.u[i * n + k]) * f64::from(f.d[k]) * f64::from(f.u[j * n + k])
                            })
                            .sum();
                        let want = f64::from(h[i * n + j]);
                        assert!((got - want).abs() < 1e-4 * n as f64, "{n}: {got} instead of {want}");
                    }
                }
                let row: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).cos()).collect();
                let mut b: Vec<f32> = (0..n).map(|j| (0..n).map(|i| row[i] * h[i * n + j]).sum()).collect();
                f.solve(&mut b);
                for (a, b) in row.iter().zip(&b) {
                    assert!((a - b).abs() < 2e-3, "{n}: {b} instead of {a}");
                }
            }
        }
        assert!(Udu::new(&[1.0, 2.0, 2.0, 1.0], 2, 1).is_none(), "not positive definite");
    }

    #[test]
    fn small_systems() {
        let mut a = [4.0, 2.0, 2.0, 3.0];
        let mut b = [8.0, 7.0];
        assert!(solve_small(&mut a, &mut b, 2));
        assert!((b[0] - 1.25).abs() < 1e-12 && (b[1] - 1.5).abs() < 1e-12, "{b:?}");
        assert!(!solve_small(&mut [0.0], &mut [1.0], 1));
    }
}
