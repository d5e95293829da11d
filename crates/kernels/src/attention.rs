//! Exact causal attention in tiles.
//!
//! For row `i` and query head `h`, with key head `g = h / (n_heads / n_kv_heads)` and the keys `j` that the row sees:
//! `s_j = cap(scale * q_ih . k_jg)`, `out_ih = sum_j softmax(s)_j v_jg`, `lse_ih = log sum_j exp(s_j)`, where
//! `cap(s) = softcap * tanh(s / softcap)` if a soft cap is given. A row that sees no key gets 0 and -inf.
//!
//! Products, sums and exponentials are in f32, whatever the inputs are stored in (keys and values in pages also in Q8_0,
//! whose blocks lie along a head's row). Where k and v are bf16 with even widths
//! and the machine multiplies pairs of bf16, the products take bf16: queries, weights and the gradients of scores are
//! rounded to it on their way into a product, sums stay in f32.
//!
//! Tile sizes are derived in `block.rs` (forward) and `backward.rs`; bytes moved against the plain version in
//! `forward.rs`.
//!
//! Source: Dao et al. 2022, "FlashAttention" (algorithms 1 and 4) and Dao 2023, "FlashAttention-2"; grouped heads:
//! Ainslie et al. 2023.

mod backward;
mod block;
mod few;
mod forward;
mod problem;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::{Context, Error, Memory, View};
use problem::{Problem, Tensor, check_rows, check_shape};
use sparsam_dtype::DType;

/// How scores are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// Multiplies the products of queries and keys, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// A row sees at most this many keys, itself included.
    pub window: Option<usize>,
    /// Soft limit on the scores.
    pub softcap: Option<f32>,
}

/// Queries and the pool of pages that holds their keys.
#[derive(Clone, Copy)]
pub struct Paged<'a> {
    /// (N, n_heads, head_dim), F32, F16 or BF16.
    pub q: &'a View,
    /// (slots, n_kv_heads, head_dim), F32, F16, BF16 or Q8_0.
    pub k: &'a View,
    /// (slots, n_kv_heads, value_dim), of the same type as `k`.
    pub v: &'a View,
    /// I32 (N): row `i` sees positions `0 ..= positions[i]`; below 0: none.
    pub positions: &'a View,
    /// I32 (N): the sequence of each row; -1 marks padding.
    pub row_seq: &'a View,
    /// I32 (sequences, pages): position `p` of sequence `s` lies in slot
    /// `table[s][p / page_size] * page_size + p % page_size`. Only entries of visible positions are read.
    pub page_table: &'a View,
    /// Tokens in a page.
    pub page_size: usize,
}

/// Queries, keys and values of whole sequences that lie one after the other on one axis.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    /// (N, n_heads, head_dim), F32, F16 or BF16.
    pub q: &'a View,
    /// (N, n_kv_heads, head_dim), F32, F16 or BF16.
    pub k: &'a View,
    /// (N, n_kv_heads, value_dim), of the same type as `k`.
    pub v: &'a View,
    /// I32 (N): row `i` sees rows `row_start[i] ..= i`; `row_start[i] > i` marks padding.
    pub row_start: &'a View,
}

/// Attention over keys in pages: prompts, decoding and batches of both.
///
/// `out`: F32 (N, n_heads, value_dim); `lse`: F32 (N, n_heads), the log of the sum of exponentials. Rows may belong
/// to any sequences in any order; rows of one sequence that follow each other share the work of reading its keys.
///
/// A row's result depends neither on the other rows of the call nor on the number of threads, to the bit.
///
/// # Errors
/// Shapes and types that do not fit, indices outside the table or the pool, views that overlap or leave their slab.
pub fn paged(
    ctx: &Context,
    mem: &mut Memory,
    out: Option<&View>,
    lse: Option<&View>,
    a: Paged,
    scores: &Scores,
) -> Result<(), Error> {
    let problem = Problem::paged(mem, &a, scores)?;
    forward(ctx, mem, out, lse, [a.q, a.k, a.v], &problem)
}

/// Attention over whole sequences on one axis: training.
///
/// `out`: F32 (N, n_heads, value_dim); `lse`: F32 (N, n_heads). Sequences cost what their own lengths do: there is
/// no mask matrix, and no work for pairs of rows that do not see each other.
///
/// # Errors
/// As [`paged`].
pub fn packed(
    ctx: &Context,
    mem: &mut Memory,
    out: Option<&View>,
    lse: Option<&View>,
    a: Packed,
    scores: &Scores,
) -> Result<(), Error> {
    let problem = Problem::packed(mem, &a, scores)?;
    forward(ctx, mem, out, lse, [a.q, a.k, a.v], &problem)
}

/// What the forward pass left for the backward pass, and the gradient that arrives.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// F32 (N, n_heads, value_dim): the result of the forward call.
    pub out: &'a View,
    /// F32 (N, n_heads): its log-sum-exp.
    pub lse: &'a View,
    /// F32 (N, n_heads, value_dim): the gradient towards `out`.
    pub dout: &'a View,
}

/// Gradients `[dq, dk, dv]` of [`packed`] towards q, k and v, F32, of their shapes.
///
/// Weights are computed again from the log-sum-exp, tile by tile, so nothing of the size N x N ever exists. A row
/// that sees no key has gradient 0, and so has a key that no row sees.
///
/// # Errors
/// As [`paged`].
pub fn packed_backward(
    ctx: &Context,
    mem: &mut Memory,
    grads: [&View; 3],
    a: Packed,
    saved: Saved,
    scores: &Scores,
) -> Result<(), Error> {
    let p = Problem::packed(mem, &a, scores)?;
    let shapes = [[p.n, p.heads, p.dim], [p.n, p.kv_heads, p.dim], [p.n, p.kv_heads, p.v_dim]];
    for ((view, shape), name) in grads.into_iter().zip(&shapes).zip(["dq", "dk", "dv"]) {
        check_rows(view, &[DType::F32], "an F32 gradient with contiguous heads")?;
        check_shape(view, shape, name)?;
    }
    for (view, name) in [(saved.out, "out"), (saved.dout, "dout")] {
        check_rows(view, &[DType::F32], "an F32 tensor with contiguous heads")?;
        check_shape(view, &[p.n, p.heads, p.v_dim], name)?;
    }
    check_lse(saved.lse, &p)?;
    let ins = [a.q, a.k, a.v, saved.out, saved.lse, saved.dout];
    let (g, i) = mem.resolve(grads, ins, false)?;
    let tensor = |at: usize| Tensor::new(ins[at], i[at]);
    let b = Backward {
        q: tensor(0),
        k: tensor(1),
        v: tensor(2),
        out: tensor(3),
        lse: tensor(4),
        dout: tensor(5),
        dq: Tensor::new(grads[0], g[0]),
        dk: Tensor::new(grads[1], g[1]),
        dv: Tensor::new(grads[2], g[2]),
    };
    backward::backward(ctx, &b, &p);
    Ok(())
}

/// Resolved operands of a backward call.
struct Backward {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
}

/// Resolved operands of a forward call.
struct Forward {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Option<Tensor>,
    lse: Option<Tensor>,
}

fn forward(
    ctx: &Context,
    mem: &mut Memory,
    out: Option<&View>,
    lse: Option<&View>,
    [q, k, v]: [&View; 3],
    p: &Problem,
) -> Result<(), Error> {
    if let Some(out) = out {
        check_rows(out, &[DType::F32], "an F32 result with contiguous heads")?;
        check_shape(out, &[p.n, p.heads, p.v_dim], "out")?;
    }
    if let Some(lse) = lse {
        check_lse(lse, p)?;
    }
    let results: Vec<&View> = out.into_iter().chain(lse).collect();
    let (outs, ins) = mem.resolve_blocks(&results, &[q, k, v])?;
    let mut outs = outs.into_iter();
    let f = Forward {
        q: Tensor::new(q, ins[0]),
        k: Tensor::new(k, ins[1]),
        v: Tensor::new(v, ins[2]),
        out: out.and_then(|view| Some(Tensor::new(view, outs.next()?))),
        lse: lse.and_then(|view| Some(Tensor::new(view, outs.next()?))),
    };
    if p.heads == 0 || results.is_empty() {
        return Ok(());
    }
    let unseen: Vec<usize> = (0..p.n).filter(|&i| p.visible[i].is_empty()).collect();
    ctx.pool().run(unseen.len(), |t| {
        let zeros = vec![0.0; p.v_dim];
        (0..p.heads).for_each(|h| f.store(unseen[t], h, &zeros, f32::NEG_INFINITY));
    });
    forward::forward(ctx, &f, p);
    Ok(())
}

fn check_lse(lse: &View, p: &Problem) -> Result<(), Error> {
    if lse.dtype != DType::F32 {
        return Err(Error::View { want: "an F32 log-sum-exp", view: Box::new(lse.clone()) });
    }
    check_shape(lse, &[p.n, p.heads], "lse")
}

impl Forward {
    /// Writes the results of one row and head; each is written by one task alone.
    fn store(&self, row: usize, head: usize, out: &[f32], lse: f32) {
        // SAFETY: `forward` checked types and shapes, callers pass rows and heads below them, and each (row, head)
        // belongs to one task.
        unsafe {
            self.out.inspect(|t| t.write(row, head, out));
            self.lse.inspect(|t| t.write(row, head, &[lse]));
        }
    }
}
