//! One policy for the precision of products: all of them in f32, or all in bf16 with sums in f32. Before, with bf16
//! asked for:
//!
//! ```text
//! %0 = input "x" : F32[2, 4]
//! %1 = input "y" : F32[4, 3]
//! %2 = matmul nn f32 %0 %1 : F32[2, 3]
//! out "y" = %2
//! ```
//!
//! and after:
//!
//! ```text
//! %0 = input "x" : F32[2, 4]
//! %1 = input "y" : F32[4, 3]
//! %2 = matmul nn bf16 %0 %1 : F32[2, 3]
//! out "y" = %2
//! ```
//!
//! Operands are rounded as they are read; values, parameters, moments, norms, softmax and the loss stay in f32. Keys and
//! values of attention become bf16, so that its products are too. 8-bit products stay what they are.

use super::rewrite::{make, push, rewrite};
use sparsam_ir::{AttentionLayout, DType, Graph, NodeId, Op, Precision};

/// `graph` with all products in `precision`.
pub(crate) fn precision(graph: &Graph, to: Precision) -> Graph {
    let mut rounded: std::collections::HashMap<NodeId, NodeId> = std::collections::HashMap::new();
    rewrite(graph, |g, mut node| {
        match &mut node.op {
            Op::Matmul { precision, .. } | Op::CrossEntropy { precision, .. }
                if *precision != Precision::Int8 =>
            {
                *precision = to;
            }
            Op::Attention(a) if to == Precision::Bf16 && a.layout == AttentionLayout::Packed => {
                for i in [1, 2] {
                    let of = node.inputs[i];
                    if g.node(of).dtype == DType::F32 {
                        node.inputs[i] = *rounded.entry(of).or_insert_with(|| {
                            let cast = make(g, Op::Cast(DType::BF16), vec![of], &node);
                            push(g, cast)
                        });
                    }
                }
            }
            _ => {}
        }
        push(g, node)
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{graph, header};
    use super::*;
    use sparsam_ir::{AttentionScores, verify};

    #[test]
    fn products_change_and_nothing_else() {
        let g = graph(|t| t.input("x", &[2, 4], DType::F32).matmul(&t.input("y", &[4, 3], DType::F32)));
        let source = include_str!("precision.rs");
        assert_eq!(g.to_string(), header(source, 0));
        let half = precision(&g, Precision::Bf16);
        assert_eq!(half.to_string(), header(source, 1));
        assert_eq!(precision(&half, Precision::F32).to_string(), header(source, 0));
    }

    #[test]
    fn attention_reads_keys_in_bf16_and_8_bits_stay() {
        let g = graph(|t| {
            let x = t.input("x", &[4, 2, 8], DType::F32);
            let how = AttentionScores { scale: 0.5, window: None, softcap: None };
            let y = x.attention_packed(&x.exp(), &x.exp(), &t.input("start", &[4], DType::I32), how);
            y.reshape(&[2, 32]).matmul_with(&t.weight("w", &[3, 32]), false, true, Precision::Int8)
        });
        let half = precision(&g, Precision::Bf16);
        verify(&half).unwrap();
        let text = half.to_string();
        assert_eq!(text.matches("cast").count(), 2, "{text}"); // one a value: the keys and the values differ here
        assert!(text.contains("int8"), "{text}");
    }
}
