//! The rule of shape and type for each op: what the trace computes and the verifier checks.

use crate::op::{AttentionLayout, AttentionPart, CrossEntropyPart, Op};
use sparsam_dtype::DType;

/// Shape and element type of a node's result, or what is wrong with its inputs.
///
/// `inputs` are the shapes and types of the operands, in order.
pub fn infer(op: &Op, inputs: &[(&[usize], DType)]) -> Result<(Vec<usize>, DType), String> {
    let arity = match op {
        Op::Input { .. } | Op::Weight { .. } | Op::State { .. } | Op::Const { .. } | Op::Iota { .. } => 0,
        Op::Random { .. } | Op::Unary(_) | Op::Cast(_) | Op::Reduce { .. } | Op::AllReduce => 1,
        Op::Reshape(_) | Op::Permute(_) | Op::Broadcast(_) | Op::Slice { .. } | Op::Pad { .. } => 1,
        Op::Binary(_) | Op::Matmul { .. } | Op::Gather | Op::ScatterAdd { .. } | Op::Assign => 2,
        Op::Select | Op::ScatterRows => 3,
        Op::CrossEntropy { part, .. } => 3 + usize::from(part.is_grad()),
        Op::Concat { .. } => inputs.len().max(1),
        Op::Attention(a) => match a.layout {
            AttentionLayout::Packed if a.part.is_grad() => 7,
            AttentionLayout::Packed => 4,
            AttentionLayout::Paged { .. } => 6,
        },
    };
    if inputs.len() != arity {
        return Err(format!("takes {arity} operands, got {}", inputs.len()));
    }
    let shape = |i: usize| inputs[i].0;
    let dtype = |i: usize| inputs[i].1;
    let want = |i: usize, d: DType| {
        if dtype(i) == d { Ok(()) } else { Err(format!("operand {i} must be {d}, is {}", dtype(i))) }
    };
    let axis_of = |axis: usize| {
        let rank = shape(0).len();
        if axis < rank { Ok(()) } else { Err(format!("axis {axis} of a tensor of rank {rank}")) }
    };

    match op {
        Op::Input { shape, dtype, .. } | Op::Const { shape, dtype, .. } => Ok((shape.clone(), *dtype)),
        Op::State { shape, dtype, .. } | Op::Weight { shape, dtype, .. } => {
            let row = shape.last().copied().unwrap_or(1);
            if !row.is_multiple_of(dtype.block_len()) {
                return Err(format!("rows of {row} are no whole blocks of {dtype} ({})", dtype.block_len()));
            }
            Ok((shape.clone(), *dtype))
        }
        Op::Iota { axis, shape } => {
            if *axis >= shape.len() {
                return Err(format!("axis {axis} of a tensor of rank {}", shape.len()));
            }
            Ok((shape.clone(), DType::I32))
        }
        Op::Random { shape: s, .. } => {
            want(0, DType::I32)?;
            if shape(0) != [2] {
                return Err(format!("seed must have shape [2], has {:?}", shape(0)));
            }
            Ok((s.clone(), DType::F32))
        }
        Op::Unary(_) | Op::AllReduce => {
            want(0, DType::F32)?;
            Ok((shape(0).to_vec(), DType::F32))
        }
        Op::Binary(_) => {
            want(0, DType::F32)?;
            want(1, DType::F32)?;
            same(shape(0), shape(1))?;
            Ok((shape(0).to_vec(), DType::F32))
        }
        Op::Select => {
            for i in 0..3 {
                want(i, DType::F32)?;
            }
            same(shape(0), shape(1))?;
            same(shape(1), shape(2))?;
            Ok((shape(0).to_vec(), DType::F32))
        }
        Op::Cast(to) => {
            if to.is_block() {
                return Err(format!("cannot cast to {to}: block formats are made by encoding"));
            }
            Ok((shape(0).to_vec(), *to))
        }
        Op::Reduce { axes, .. } => {
            want(0, DType::F32)?;
            let mut s = shape(0).to_vec();
            for &a in axes {
                axis_of(a)?;
                s[a] = 1;
            }
            if axes.is_empty() || !axes.is_sorted_by(|a, b| a < b) {
                return Err(format!("axes {axes:?} must be sorted and at least one"));
            }
            Ok((s, DType::F32))
        }
        Op::Reshape(to) => {
            plain(dtype(0))?;
            if count(shape(0)) != count(to) {
                return Err(format!(
                    "{:?} has {} elements, {to:?} has {}",
                    shape(0),
                    count(shape(0)),
                    count(to)
                ));
            }
            Ok((to.clone(), dtype(0)))
        }
        Op::Permute(axes) => {
            plain(dtype(0))?;
            let mut sorted = axes.clone();
            sorted.sort_unstable();
            if !sorted.iter().copied().eq(0..shape(0).len()) {
                return Err(format!("{axes:?} is no permutation of the axes of {:?}", shape(0)));
            }
            Ok((axes.iter().map(|&a| shape(0)[a]).collect(), dtype(0)))
        }
        Op::Broadcast(to) => {
            plain(dtype(0))?;
            if shape(0).len() != to.len() || shape(0).iter().zip(to).any(|(&a, &b)| a != b && a != 1) {
                return Err(format!("cannot broadcast {:?} to {to:?}", shape(0)));
            }
            Ok((to.clone(), dtype(0)))
        }
        Op::Slice { axis, start, end } => {
            plain(dtype(0))?;
            axis_of(*axis)?;
            if start > end || *end > shape(0)[*axis] {
                return Err(format!("slice {start}..{end} of axis {axis} of {:?}", shape(0)));
            }
            let mut s = shape(0).to_vec();
            s[*axis] = end - start;
            Ok((s, dtype(0)))
        }
        Op::Pad { axis, before, after } => {
            plain(dtype(0))?;
            axis_of(*axis)?;
            let mut s = shape(0).to_vec();
            s[*axis] += before + after;
            Ok((s, dtype(0)))
        }
        Op::Concat { axis } => {
            axis_of(*axis)?;
            plain(dtype(0))?;
            let mut s = shape(0).to_vec();
            s[*axis] = 0;
            for i in 0..inputs.len() {
                want(i, dtype(0))?;
                let mut other = shape(i).to_vec();
                if other.len() != s.len() {
                    return Err(format!("ranks differ: {:?} and {:?}", shape(0), shape(i)));
                }
                s[*axis] += other[*axis];
                other[*axis] = shape(0)[*axis];
                same(shape(0), &other)?;
            }
            Ok((s, dtype(0)))
        }
        Op::Matmul { trans_a, trans_b, .. } => matmul(inputs, *trans_a, *trans_b),
        Op::Gather => {
            want(1, DType::I32)?;
            if shape(0).is_empty() || shape(1).len() != 1 {
                return Err(format!("table {:?} by rows {:?}: want (V, ..) and (N)", shape(0), shape(1)));
            }
            let mut s = shape(0).to_vec();
            s[0] = shape(1)[0];
            Ok((s, if dtype(0) == DType::I32 { DType::I32 } else { DType::F32 }))
        }
        Op::ScatterAdd { rows } => {
            want(0, DType::F32)?;
            want(1, DType::I32)?;
            if shape(0).is_empty() || shape(1) != &shape(0)[..1] {
                return Err(format!("values {:?} by rows {:?}: want (N, ..) and (N)", shape(0), shape(1)));
            }
            let mut s = shape(0).to_vec();
            s[0] = *rows;
            Ok((s, DType::F32))
        }
        Op::Attention(a) => {
            let (q, k, v) = (shape(0), shape(1), shape(2));
            if !matches!(dtype(0), DType::F32 | DType::F16 | DType::BF16) {
                return Err(format!("queries must be F32, F16 or BF16, are {}", dtype(0)));
            }
            if q.len() != 3 || k.len() != 3 || v.len() != 3 {
                return Err(format!("q {q:?}, k {k:?}, v {v:?}: want rank 3 (tokens, heads, head_dim)"));
            }
            if k[1] == 0 || q[1] % k[1] != 0 || k[2] != q[2] || v[..2] != k[..2] || dtype(1) != dtype(2) {
                return Err(format!(
                    "q {q:?}, k {k:?}, v {v:?}: heads must be a multiple of key heads, dims must agree"
                ));
            }
            let n = &q[..1];
            let index = 3..if a.part.is_grad() { 4 } else { inputs.len() };
            for i in index {
                want(i, DType::I32)?;
            }
            if a.part.is_grad() {
                let out = [q[0], q[1], v[2]];
                let paged = matches!(a.layout, AttentionLayout::Paged { .. });
                if paged || shape(4) != out || shape(5) != &q[..2] || shape(6) != out {
                    return Err(format!(
                        "q {q:?}, v {v:?}: gradients want the packed layout, out and its gradient {out:?} and the \
                         log-sum-exp, got {:?}, {:?}, {:?}",
                        shape(4),
                        shape(6),
                        shape(5)
                    ));
                }
                (4..7).try_for_each(|i| want(i, DType::F32))?;
            }
            let ok = match a.layout {
                AttentionLayout::Packed => k[0] == q[0] && shape(3) == n,
                AttentionLayout::Paged { page_size } => {
                    let whole_pages = page_size > 0 && k[0].is_multiple_of(page_size);
                    whole_pages && shape(3) == n && shape(4) == n && shape(5).len() == 2
                }
            };
            if !ok {
                let rest: Vec<_> = inputs[3..].iter().map(|(s, _)| s).collect();
                return Err(format!("q {q:?}, k {k:?} with index inputs {rest:?} do not fit {:?}", a.layout));
            }
            Ok(match a.part {
                AttentionPart::Out => (vec![q[0], q[1], v[2]], DType::F32),
                AttentionPart::LogSumExp => (vec![q[0], q[1]], DType::F32),
                AttentionPart::GradQ => (q.to_vec(), DType::F32),
                AttentionPart::GradK => (k.to_vec(), DType::F32),
                AttentionPart::GradV => (v.to_vec(), DType::F32),
            })
        }
        Op::CrossEntropy { part, .. } => {
            let (h, w, targets) = (shape(0), shape(1), shape(2));
            want(0, DType::F32)?;
            want(2, DType::I32)?;
            if !(dtype(1).is_float() || dtype(1).is_block()) {
                return Err(format!("a weight of type {}", dtype(1)));
            }
            if h.len() != 2 || w.len() != 2 || w[1] != h[1] || w[0] == 0 || targets != &h[..1] {
                return Err(format!(
                    "h {h:?}, weight {w:?}, targets {targets:?}: want (N, D), (V, D) and (N)"
                ));
            }
            if part.is_grad() {
                want(3, DType::F32)?;
                same(targets, shape(3))?;
            }
            let of = match part {
                CrossEntropyPart::Loss => targets,
                CrossEntropyPart::GradH => h,
                CrossEntropyPart::GradWeight => w,
            };
            Ok((of.to_vec(), DType::F32))
        }
        Op::Assign => {
            same(shape(0), shape(1))?;
            Ok((shape(0).to_vec(), dtype(0)))
        }
        Op::ScatterRows => {
            want(2, DType::I32)?;
            let (state, values, slots) = (shape(0), shape(1), shape(2));
            if state.is_empty()
                || values.len() != state.len()
                || values[1..] != state[1..]
                || slots != &values[..1]
            {
                return Err(format!("state {state:?}, values {values:?}, slots {slots:?} do not fit"));
            }
            Ok((state.to_vec(), dtype(0)))
        }
    }
}

fn matmul(inputs: &[(&[usize], DType)], trans_a: bool, trans_b: bool) -> Result<(Vec<usize>, DType), String> {
    let ((a, da), (b, db)) = (inputs[0], inputs[1]);
    if !da.is_float() || !(db.is_float() || (db.is_block() && b.len() == 2)) {
        return Err(format!("{da} by {db} (transposed: {trans_b})"));
    }
    if a.len() < 2 || a.len() != b.len() || a[..a.len() - 2] != b[..b.len() - 2] {
        return Err(format!("{a:?} by {b:?}: want equal ranks of at least 2 and equal leading axes"));
    }
    let r = a.len();
    let (m, ka) = if trans_a { (a[r - 1], a[r - 2]) } else { (a[r - 2], a[r - 1]) };
    let (kb, n) = if trans_b { (b[r - 1], b[r - 2]) } else { (b[r - 2], b[r - 1]) };
    if ka != kb {
        return Err(format!("inner lengths differ: {ka} and {kb} ({a:?} by {b:?})"));
    }
    let mut s = a[..r - 2].to_vec();
    s.extend([m, n]);
    Ok((s, DType::F32))
}

fn count(shape: &[usize]) -> usize {
    shape.iter().product()
}

fn same(a: &[usize], b: &[usize]) -> Result<(), String> {
    if a == b { Ok(()) } else { Err(format!("shapes differ: {a:?} and {b:?}")) }
}

fn plain(d: DType) -> Result<(), String> {
    if d.is_block() { Err(format!("{d} must be decoded first")) } else { Ok(()) }
}
