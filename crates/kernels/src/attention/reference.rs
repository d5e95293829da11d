//! The meaning of attention, forward and backward, one row after the other: written for reading, never tuned.
//!
//! Generic over the number type, so that tests can ask it for the truth in f64.

use super::Scores;
use std::ops::{Add, Div, Mul, Range, Sub};

/// f32 or f64.
pub(super) trait Real:
    Copy
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + From<f32>
    + Send
    + Sync
{
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn tanh(self) -> Self;
}

macro_rules! real {
    ($t:ty) => {
        impl Real for $t {
            fn exp(self) -> Self {
                <$t>::exp(self)
            }
            fn ln(self) -> Self {
                <$t>::ln(self)
            }
            fn tanh(self) -> Self {
                <$t>::tanh(self)
            }
        }
    };
}
real!(f32);
real!(f64);

fn dot<F: Real>(a: &[F], b: &[F]) -> F {
    a.iter().zip(b).fold(F::from(0.0), |sum, (&x, &y)| sum + x * y)
}

fn score<F: Real>(q: &[F], k: &[F], scores: &Scores) -> F {
    let s = dot(q, k) * F::from(scores.scale);
    scores.softcap.map_or(s, |c| F::from(c) * (s / F::from(c)).tanh())
}

/// One row of one head: fills `out` with `softmax(scores) v` and returns the log-sum-exp of the scores.
///
/// `key(j, buf)` and `value(j, buf)` give the vectors of visible key `j < n_keys`. No keys: zeros and -inf.
pub(super) fn forward_row<F: Real>(
    q: &[F],
    n_keys: usize,
    mut key: impl FnMut(usize, &mut [F]),
    mut value: impl FnMut(usize, &mut [F]),
    scores: &Scores,
    out: &mut [F],
) -> F {
    out.fill(F::from(0.0));
    if n_keys == 0 {
        return F::from(f32::NEG_INFINITY);
    }
    let mut k = vec![F::from(0.0); q.len()];
    let mut s = Vec::with_capacity(n_keys);
    for j in 0..n_keys {
        key(j, &mut k);
        s.push(score(q, &k, scores));
    }
    let max = s.iter().fold(s[0], |m, &x| if x > m { x } else { m });
    let p: Vec<F> = s.iter().map(|&x| (x - max).exp()).collect();
    let total = p.iter().fold(F::from(0.0), |sum, &x| sum + x);
    let mut v = vec![F::from(0.0); out.len()];
    for j in 0..n_keys {
        value(j, &mut v);
        for (o, &x) in out.iter_mut().zip(&v) {
            *o = *o + p[j] * x;
        }
    }
    for o in out.iter_mut() {
        *o = *o / total;
    }
    max + total.ln()
}

/// What one key head and its group of query heads hand to the backward pass: contiguous rows.
pub(super) struct Group<'a, F> {
    /// Vector lengths of keys and values.
    pub dim: usize,
    pub v_dim: usize,
    /// Query heads of the group.
    pub group: usize,
    /// (N, group, dim), (N, dim), (N, v_dim).
    pub q: &'a [F],
    pub k: &'a [F],
    pub v: &'a [F],
    /// (N, group, v_dim), (N, group), (N, group, v_dim).
    pub out: &'a [F],
    pub lse: &'a [F],
    pub dout: &'a [F],
    /// The rows that each row sees.
    pub visible: &'a [Range<usize>],
}

/// Gradients of one group towards q (N, group, dim), k (N, dim) and v (N, v_dim).
///
/// With `p = exp(s - lse)`: `dv = p^T dout`, `dp = dout v^T`, `ds = p (dp - rowsum(dout * out))`, times the soft
/// cap's derivative `1 - (s / cap)^2`; `dq = scale ds k`, `dk = scale ds^T q`. (Dao et al. 2022, appendix B.2.)
pub(super) fn backward<F: Real>(a: &Group<F>, scores: &Scores) -> [Vec<F>; 3] {
    let zeros = |n: usize| vec![F::from(0.0); n];
    let (mut dq, mut dk, mut dv) = (zeros(a.q.len()), zeros(a.k.len()), zeros(a.v.len()));
    for (i, visible) in a.visible.iter().enumerate() {
        for h in i * a.group..(i + 1) * a.group {
            let q = &a.q[h * a.dim..][..a.dim];
            let dout = &a.dout[h * a.v_dim..][..a.v_dim];
            let delta = dot(dout, &a.out[h * a.v_dim..][..a.v_dim]);
            for j in visible.clone() {
                let (k, v) = (&a.k[j * a.dim..][..a.dim], &a.v[j * a.v_dim..][..a.v_dim]);
                let s = score(q, k, scores);
                let p = (s - a.lse[h]).exp();
                let mut ds = p * (dot(dout, v) - delta) * F::from(scores.scale);
                if let Some(c) = scores.softcap {
                    let t = s / F::from(c);
                    ds = ds * (F::from(1.0) - t * t);
                }
                for d in 0..a.dim {
                    dq[h * a.dim + d] = dq[h * a.dim + d] + ds * k[d];
                    dk[j * a.dim + d] = dk[j * a.dim + d] + ds * q[d];
                }
                for d in 0..a.v_dim {
                    dv[j * a.v_dim + d] = dv[j * a.v_dim + d] + p * dout[d];
                }
            }
        }
    }
    [dq, dk, dv]
}
