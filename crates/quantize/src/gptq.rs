//! Error-compensated rounding (GPTQ: Frantar et al. 2023, <https://arxiv.org/abs/2210.17323>) into any grid.
//!
//! A row w of a layer is to become a row q on a grid such that the layer's outputs change least: minimise
//! `(w - q) H (w - q)^T`, H the mean of x x^T over calibration inputs. GPTQ rounds one column after the other and moves
//! the error into the columns that are still to come.
//!
//! The paper's form needs the Cholesky factor of the inverse of H. With `H = U D U^T` (U upper triangular with a diagonal
//! of ones) the same numbers come out without an inverse (LDLQ: Chee et al. 2023, <https://arxiv.org/abs/2307.13304>, in
//! theorem 6): with errors `e = w - q`, column k is rounded to the nearest value to `w_k + sum over j < k of e_j U_jk`.
//!
//! Then two steps that can only lower the error: each code in turn takes the value that is best for the others as they
//! are (coordinate descent), and the scales are fitted to the codes by least squares under H.
//!
//! - *act-order*: columns with the largest diagonal of H go first, while there is still much to move errors into.
//! - *static groups*: scales are chosen before, so groups stay where the file format wants them.
//! - *lazy blocks*: within 128 columns errors move at once; to the columns behind them in one matrix product.

use crate::Error;
use crate::grid::{self, Grid, Rounded};
use crate::hessian::Damped;
use crate::linalg::{Products, Udu, axpy, dot32, parallel};
use crate::refit;
use sparsam_dtype::codec::blocks::{self, Format, Scales};

/// Columns of a lazy block (the paper's B): U's part is 64 KiB.
const LAZY: usize = 128;

/// Rows that are worked on together: bounds memory for a head of 49152 rows.
const ROWS: usize = 4096;

/// How to round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Columns of much weight first.
    pub act_order: bool,
    /// Rounds of coordinate descent and least-squares scales after GPTQ; 0: the paper's algorithm alone.
    pub refinements: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { act_order: true, refinements: 3 }
    }
}

/// What became of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LayerError {
    /// Sum over rows of `(w - q) H (w - q)^T` by nearest rounding on the same scales.
    pub nearest: f64,
    /// Of the result.
    pub rounded: f64,
    /// Of all weights set to 0: the size of the layer's output.
    pub output: f64,
    /// Rows that stayed with nearest rounding, since nothing better was found.
    pub rows_nearest: usize,
}

/// A row of a layer at work.
struct Row<'a> {
    target: &'a [f32],
    codes: &'a mut [u8],
    scales: &'a [Scales],
}

/// Rounds the matrix `w` (rows, n) to nearest codes, with scales that count the error of input `i` `importance[i]` times;
/// `None`: larger weights count more, as nothing is known of the inputs.
pub fn nearest(w: &[f32], n: usize, grid: Grid, importance: Option<&[f32]>, threads: usize) -> Rounded {
    let (rows, format) = (w.len() / n, grid.format());
    let scales = fit_scales(w, n, grid, importance, threads);
    let mut codes = vec![0u8; w.len()];
    let per_row = n.div_ceil(format.block);
    let work: Vec<_> = w.chunks(n).zip(codes.chunks_mut(n)).zip(scales.chunks(per_row)).collect();
    parallel(threads, work, |((w, codes), scales)| {
        for (i, (c, &v)) in codes.iter_mut().zip(w).enumerate() {
            *c = grid::nearest(format.levels, grid::group(&format, scales, i / format.group), v);
        }
    });
    Rounded { grid, rows, cols: n, codes, scales }
}

fn fit_scales(w: &[f32], n: usize, grid: Grid, importance: Option<&[f32]>, threads: usize) -> Vec<Scales> {
    let format = grid.format();
    let per_row = n.div_ceil(format.block);
    let empty = Scales { d: 0.0, dmin: 0.0, scales: [0; 16], mins: [0; 16] };
    let mut scales = vec![empty; w.len() / n * per_row];
    parallel(threads, w.chunks(n).zip(scales.chunks_mut(per_row)).collect(), |(row, scales)| {
        let fitted = match importance {
            Some(h) => grid.fit(row, h),
            None => grid.fit(row, &blocks::importance(row, format.group)),
        };
        scales.clone_from_slice(&fitted);
    });
    scales
}

/// Rounds the matrix `w` (rows, n) such that the layer's outputs change little for inputs of Hessian `h`; never more than
/// with nearest rounding, row by row.
///
/// # Errors
/// If the runtime fails.
pub fn gptq(
    products: &mut Products,
    w: &[f32],
    h: &Damped,
    factor: &Factor,
    grid: Grid,
    options: &Options,
) -> Result<(Rounded, LayerError), Error> {
    let mut error = LayerError::default();
    let (rows, n) = (w.len() / h.n, h.n);
    let mut all = Rounded { grid, rows, cols: n, codes: Vec::new(), scales: Vec::new() };
    for part in w.chunks(ROWS * n) {
        let rounded = round_rows(products, part, h, factor, grid, options, &mut error)?;
        all.codes.extend(rounded.codes);
        all.scales.extend(rounded.scales);
    }
    Ok((all, error))
}

/// The Hessian's factor, in the order in which columns are rounded.
pub struct Factor {
    order: Vec<usize>,
    udu: Udu,
}

impl Factor {
    /// Of `h`; with `act_order`, columns of much weight first.
    ///
    /// # Errors
    /// [`Error::NotPositive`] if the Hessian is not positive definite; more damping helps.
    pub fn new(h: &Damped, act_order: bool, threads: usize) -> Result<Factor, Error> {
        let mut order: Vec<usize> = (0..h.n).collect();
        if act_order {
            let diagonal = h.diagonal();
            order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
        }
        let udu = Udu::new(&h.permuted(&order), h.n, threads).ok_or(Error::NotPositive)?;
        Ok(Factor { order, udu })
    }

    /// The largest eigenvalue of `h`, which this is the factor of, over the smallest: a lower bound, by some rounds of power
    /// iteration with h and with its inverse.
    pub fn condition(&self, h: &Damped) -> f64 {
        let n = h.n;
        let norm = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let largest = |apply: &dyn Fn(&[f32]) -> Vec<f32>| -> f64 {
            // No eigenvector of a real layer is orthogonal to this.
            let mut x: Vec<f32> = (0..n).map(|i| 1.0 + (i as f32 * 0.7).sin()).collect();
            let mut value = 0.0;
            for _ in 0..10 {
                let size = norm(&x).max(f64::MIN_POSITIVE);
                x.iter_mut().for_each(|v| *v = (f64::from(*v) / size) as f32);
                x = apply(&x);
                value = norm(&x);
            }
            value
        };
        let up = largest(&|x| (0..n).map(|i| dot32(&h.h[i * n..(i + 1) * n], x)).collect());
        let down = largest(&|x| {
            let mut ordered: Vec<f32> = self.order.iter().map(|&i| x[i]).collect();
            self.udu.solve(&mut ordered);
            let mut y = vec![0.0; n];
            self.order.iter().zip(&ordered).for_each(|(&i, v)| y[i] = *v);
            y
        });
        up * down
    }

    /// Rows of `w` (rows, n) moved towards what makes up for the changed inputs: `w + share * w (C - H) H^-1`, where H is
    /// the mean of x x^T (damped only where it is inverted) and `cross`, C, the mean of y x^T, x the inputs as they are and y
    /// as they were. At `share` 1 that is the least-squares solution for the original outputs `w y` (Li et al. 2025, GPTAQ,
    /// <https://arxiv.org/abs/2504.02692>).
    ///
    /// # Errors
    /// If the runtime fails.
    pub fn shifted(
        &self,
        products: &mut Products,
        w: &[f32],
        h: &Damped,
        cross: &[f32],
        share: f32,
    ) -> Result<Vec<f32>, Error> {
        let n = h.n;
        let mut difference: Vec<f32> = cross.iter().zip(&h.h).map(|(c, h)| c - h).collect();
        (0..n).for_each(|i| difference[i * n + i] += h.lambda);
        let mut out = w.to_vec();
        for part in out.chunks_mut(ROWS * n) {
            let mut delta = products.matmul(part, &difference, n)?;
            parallel(
                products.threads(),
                delta.chunks_mut(n).zip(part.chunks_mut(n)).collect(),
                |(delta, row)| {
                    let mut ordered: Vec<f32> = self.order.iter().map(|&i| delta[i]).collect();
                    self.udu.solve(&mut ordered);
                    self.order.iter().zip(&ordered).for_each(|(&i, d)| row[i] += share * d);
                },
            );
        }
        Ok(out)
    }
}

fn round_rows(
    products: &mut Products,
    w: &[f32],
    h: &Damped,
    factor: &Factor,
    grid: Grid,
    options: &Options,
    error: &mut LayerError,
) -> Result<Rounded, Error> {
    let n = h.n;
    let threads = products.threads();
    let plain = nearest(w, n, grid, Some(&h.diagonal()), threads);
    let mut best = plain.clone();
    best.codes = compensate(products, w, factor, grid, &plain.scales)?;
    let mut state = State::new(products, w, h, best)?;
    for _ in 0..options.refinements {
        state.descend(threads);
        refit::scales(products, &mut state)?;
    }
    if options.refinements > 0 {
        state.descend(threads);
    }
    // The sums kept while codes changed one by one have drifted; what is reported and compared is computed anew.
    let rounded = state.rounded;
    let ours = row_errors(products, w, h, &rounded)?;
    let theirs = row_errors(products, w, h, &plain)?;
    let zero = Rounded { codes: plain.codes.clone(), scales: zeros(&plain.scales), ..plain.clone() };
    error.output += row_errors(products, w, h, &zero)?.iter().sum::<f64>();
    let mut rounded = rounded;
    let per_row = n.div_ceil(grid.format().block);
    for (r, (a, b)) in ours.iter().zip(&theirs).enumerate() {
        if a > b {
            rounded.codes[r * n..][..n].copy_from_slice(&plain.codes[r * n..][..n]);
            rounded.scales[r * per_row..][..per_row]
                .clone_from_slice(&plain.scales[r * per_row..][..per_row]);
            error.rows_nearest += 1;
        }
        error.rounded += a.min(*b);
        error.nearest += b;
    }
    Ok(rounded)
}

fn zeros(scales: &[Scales]) -> Vec<Scales> {
    scales.iter().map(|s| Scales { d: 0.0, dmin: 0.0, ..s.clone() }).collect()
}

/// The paper's algorithm: codes for the matrix `w` (rows, n) on given scales.
///
/// # Errors
/// If the runtime fails.
pub fn compensate(
    products: &mut Products,
    w: &[f32],
    factor: &Factor,
    grid: Grid,
    scales: &[Scales],
) -> Result<Vec<u8>, Error> {
    let Factor { order, udu } = factor;
    let (n, format) = (udu.n, grid.format());
    let (rows, per_row) = (w.len() / n, n.div_ceil(format.block));
    let mut codes = vec![0u8; w.len()];
    // What the errors so far add to each column, in the order of rounding.
    let mut moved = vec![0f32; w.len()];
    for start in (0..n).step_by(LAZY) {
        let end = (start + LAZY).min(n);
        let width = end - start;
        let mut errors = vec![0f32; rows * width];
        let parts = w.chunks(n).zip(codes.chunks_mut(n)).zip(scales.chunks(per_row));
        let work: Vec<_> = parts
            .zip(moved.chunks_mut(n).zip(errors.chunks_mut(width)))
            .map(|(((target, codes), scales), (moved, errors))| {
                (Row { target, codes, scales }, moved, errors)
            })
            .collect();
        parallel(products.threads(), work, |(row, moved, errors)| {
            for k in start..end {
                let column = order[k];
                let at = grid::group(&format, row.scales, column / format.group);
                let code = grid::nearest(format.levels, at, row.target[column] + moved[k]);
                row.codes[column] = code;
                let e = row.target[column] - (at.0 * format.levels.level(code) - at.1);
                errors[k - start] = e;
                axpy(&mut moved[k + 1..end], e, &udu.u[k * n + k + 1..k * n + end]);
            }
        });
        if end < n {
            let behind: Vec<f32> =
                (start..end).flat_map(|k| udu.u[k * n + end..(k + 1) * n].iter().copied()).collect();
            let update = products.matmul(&errors, &behind, width)?;
            for (moved, update) in moved.chunks_mut(n).zip(update.chunks(n - end)) {
                moved[end..].iter_mut().zip(update).for_each(|(m, u)| *m += u);
            }
        }
    }
    Ok(codes)
}

/// The error of each row: `(w - q) H (w - q)^T`.
///
/// # Errors
/// If the runtime fails.
pub fn row_errors(
    products: &mut Products,
    w: &[f32],
    h: &Damped,
    rounded: &Rounded,
) -> Result<Vec<f64>, Error> {
    let mut e = rounded.values();
    e.iter_mut().zip(w).for_each(|(q, w)| *q = w - *q);
    let g = products.matmul(&e, &h.h, h.n)?;
    let rows = e.chunks(h.n).zip(g.chunks(h.n));
    Ok(rows.map(|(e, g)| f64::from(dot32(e, g)).max(0.0)).collect())
}

/// A rounded matrix with its errors and their products with H, kept up to date.
pub(crate) struct State<'a> {
    pub w: &'a [f32],
    pub h: &'a Damped,
    pub rounded: Rounded,
    /// `w - q`.
    pub e: Vec<f32>,
    /// `e H`.
    pub g: Vec<f32>,
}

impl<'a> State<'a> {
    fn new(
        products: &mut Products,
        w: &'a [f32],
        h: &'a Damped,
        rounded: Rounded,
    ) -> Result<State<'a>, Error> {
        let mut state = State { w, h, rounded, e: Vec::new(), g: Vec::new() };
        state.refresh(products)?;
        Ok(state)
    }

    /// Computes errors and products anew.
    pub fn refresh(&mut self, products: &mut Products) -> Result<(), Error> {
        self.e = self.rounded.values();
        self.e.iter_mut().zip(self.w).for_each(|(q, w)| *q = w - *q);
        self.g = products.matmul(&self.e, &self.h.h, self.h.n)?;
        Ok(())
    }

    /// One sweep: each code in turn takes the value that is best while the others stay.
    ///
    /// With `g = e H`, changing `q_c` by d changes the error by `-2 d g_c + d^2 H_cc`: least at `d = g_c / H_cc`.
    fn descend(&mut self, threads: usize) {
        let (n, h) = (self.h.n, &self.h.h);
        let format: Format = self.rounded.grid.format();
        let per_row = n.div_ceil(format.block);
        let rows = self.rounded.codes.chunks_mut(n).zip(self.rounded.scales.chunks(per_row));
        let work: Vec<_> = rows.zip(self.e.chunks_mut(n).zip(self.g.chunks_mut(n))).collect();
        parallel(threads, work, |((codes, scales), (e, g))| {
            for c in 0..n {
                let (scale, min) = grid::group(&format, scales, c / format.group);
                let old = scale * format.levels.level(codes[c]) - min;
                let code = grid::nearest(format.levels, (scale, min), old + g[c] / h[c * n + c]);
                if code == codes[c] {
                    continue;
                }
                let d = scale * format.levels.level(code) - min - old;
                if d * (d * h[c * n + c] - 2.0 * g[c]) < 0.0 {
                    codes[c] = code;
                    e[c] -= d;
                    axpy(g, -d, &h[c * n..(c + 1) * n]);
                }
            }
        });
    }
}
