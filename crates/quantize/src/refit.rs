//! Scales fitted to codes: least squares under the Hessian.
//!
//! A row is linear in its blocks' free numbers (the scale d; the minimum or its unit dmin): `q = sum over p of t_p v_p`,
//! where `v_p` is what the codes say about block p. With errors `e` and `g = e H`, the change of t that is best solves
//! `A dt = b`, `A_pq = v_p H v_q^T`, `b_p = g v_p^T`. The result is rounded to f16, and kept where the row's error fell.

use crate::Error;
use crate::gptq::State;
use crate::grid::{Grid, Rounded};
use crate::linalg::{Products, dot32, parallel, solve_small};
use sparsam_dtype::codec::blocks::{Format, stored};

/// Added to the diagonal of A, relative to it: scale and minimum of a block of equal codes cannot be told apart.
const RIDGE: f64 = 1e-5;

/// What a free number multiplies.
#[derive(Clone, Copy)]
enum Part {
    /// The block's scale; for plain groups the minimum moves with it.
    Scale,
    /// The block's minimum.
    Min,
}

fn parts(grid: &Grid, format: &Format) -> &'static [Part] {
    match grid {
        Grid::Block(_) if format.has_min => &[Part::Scale, Part::Min],
        Grid::Block(_) | Grid::Plain(_) => &[Part::Scale],
    }
}

/// `v_p` of one block for all rows: (rows, width).
fn basis(rounded: &Rounded, format: &Format, block: usize, part: Part) -> Vec<f32> {
    let n = rounded.cols;
    let per_row = n.div_ceil(format.block);
    let (start, end) = (block * format.block, ((block + 1) * format.block).min(n));
    let mut out = Vec::with_capacity(rounded.rows * (end - start));
    for r in 0..rounded.rows {
        let s = &rounded.scales[r * per_row + block];
        for c in start..end {
            let g = (c - start) / format.group;
            let level = format.levels.level(rounded.codes[r * n + c]);
            let min = f32::from(s.mins[g]);
            out.push(match (part, rounded.grid) {
                (Part::Scale, Grid::Block(_)) => s.scales[g] as f32 * level,
                (Part::Scale, Grid::Plain(_)) => level - min,
                (Part::Min, _) => -min,
            });
        }
    }
    out
}

/// One round of fitting.
pub(crate) fn scales(products: &mut Products, state: &mut State) -> Result<(), Error> {
    let (n, rows) = (state.h.n, state.rounded.rows);
    let format = state.rounded.grid.format();
    let kinds = parts(&state.rounded.grid, &format);
    let blocks = n.div_ceil(format.block);
    let p = blocks * kinds.len();
    let mut a = vec![0f32; rows * p * p];
    let mut b = vec![0f32; rows * p];
    let all: Vec<Vec<f32>> =
        (0..p).map(|i| basis(&state.rounded, &format, i / kinds.len(), kinds[i % kinds.len()])).collect();
    let span = |i: usize| {
        let block = i / kinds.len();
        block * format.block..((block + 1) * format.block).min(n)
    };
    for i in 0..p {
        let own = span(i);
        let product = products.matmul(&all[i], &state.h.h[own.start * n..own.end * n], own.len())?;
        let work: Vec<_> = a.chunks_mut(p * p).zip(b.chunks_mut(p)).enumerate().collect();
        parallel(products.threads(), work, |(r, (a, b))| {
            let v = |j: usize| {
                let width = span(j).len();
                &all[j][r * width..][..width]
            };
            for j in 0..=i {
                let to = span(j);
                a[i * p + j] = dot32(&product[r * n..][to], v(j));
            }
            b[i] = dot32(&state.g[r * n..][own.clone()], v(i));
        });
    }
    let before: Vec<f32> = state.e.chunks(n).zip(state.g.chunks(n)).map(|(e, g)| dot32(e, g)).collect();
    let kept = state.rounded.scales.clone();
    let work: Vec<_> =
        state.rounded.scales.chunks_mut(blocks).zip(a.chunks(p * p).zip(b.chunks(p))).collect();
    let plain = matches!(state.rounded.grid, Grid::Plain(_));
    parallel(products.threads(), work, |(scales, (a, b))| {
        let mut a: Vec<f64> = a.iter().map(|&v| f64::from(v)).collect();
        let mut b: Vec<f64> = b.iter().map(|&v| f64::from(v)).collect();
        for i in 0..p {
            // A free number that multiplies nothing stays as it is.
            a[i * p + i] = (a[i * p + i] * (1.0 + RIDGE)).max(f64::from(f32::MIN_POSITIVE));
        }
        if !solve_small(&mut a, &mut b, p) {
            return;
        }
        for (i, change) in b.iter().enumerate() {
            let s = &mut scales[i / kinds.len()];
            match kinds[i % kinds.len()] {
                Part::Scale => s.d = moved(s.d, *change),
                Part::Min => s.dmin = moved(s.dmin, *change),
            }
            if plain {
                s.dmin = s.d;
            }
        }
    });
    state.refresh(products)?;
    let mut worse = false;
    for (r, before) in before.iter().enumerate() {
        let after = dot32(&state.e[r * n..][..n], &state.g[r * n..][..n]);
        if after.is_nan() || after > *before {
            worse = true;
            state.rounded.scales[r * blocks..][..blocks].clone_from_slice(&kept[r * blocks..][..blocks]);
        }
    }
    if worse { state.refresh(products) } else { Ok(()) }
}

/// A scale changed and rounded; as it was if f16 cannot hold the new one.
fn moved(old: f32, change: f64) -> f32 {
    let new = stored((f64::from(old) + change) as f32);
    if new.is_finite() { new } else { old }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gptq::nearest;
    use sparsam_dtype::DType;

    /// The module's idea of a row (free numbers times what they multiply) is the codec's, for every grid.
    #[test]
    fn rows_are_linear_in_their_free_numbers() {
        let (rows, n) = (3, 512);
        let w: Vec<f32> = (0..rows * n).map(|i| (i as f32 * 0.731).sin() * (1.0 + (i % 7) as f32)).collect();
        let blocks = DType::ALL.into_iter().filter(|d| sparsam_dtype::codec::blocks::format(*d).is_some());
        let plain = [(2, 64, false), (3, 512, true), (8, 128, false)];
        let plain =
            plain.map(|(bits, group, symmetric)| Grid::Plain(crate::Plain { bits, group, symmetric }));
        for grid in blocks.map(Grid::Block).chain(plain) {
            let rounded = nearest(&w, n, grid, None, 1);
            let (format, kinds) = (grid.format(), parts(&grid, &grid.format()));
            let want = rounded.values();
            let mut got = vec![0.0; want.len()];
            for block in 0..n / format.block {
                for part in kinds {
                    let v = basis(&rounded, &format, block, *part);
                    for r in 0..rows {
                        let s = &rounded.scales[r * (n / format.block) + block];
                        let t = if matches!(part, Part::Scale) { s.d } else { s.dmin };
                        let row = &mut got[r * n + block * format.block..][..format.block];
                        row.iter_mut().zip(&v[r * format.block..]).for_each(|(o, v)| *o += t * v);
                    }
                }
            }
            for (got, want) in got.iter().zip(&want) {
                assert!(
                    (got - want).abs() <= 1e-5 * want.abs().max(1.0),
                    "{grid:?}: {got} instead of {want}"
                );
            }
        }
    }
}
