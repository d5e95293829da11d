//! The training loss.

use crate::op::{CrossEntropyPart, Op, Precision};
use crate::trace::Tensor;
use sparsam_dtype::DType;

impl Tensor {
    /// Softmax cross-entropy of each row of logits (N, V) against `targets` I32 (N): F32 (N), 0 where the target is
    /// -1. In nats: `log(sum(exp(logits))) - logits[target]`.
    ///
    /// Where `self` is a product with a weight, `x W^T`, as a model's head makes it, the product itself is passed over
    /// and this is [`Tensor::linear_cross_entropy`] of its operands: the logits of all rows never exist at once. Any
    /// other logits are taken as they are.
    ///
    /// The mean is composed, with whatever weights the rows have:
    ///
    /// ```
    /// use sparsam_ir::{DType, Trace, grad};
    /// let t = Trace::new().training(|_| true);
    /// let x = t.input("x", &[4, 8], DType::F32);
    /// let w = t.weight("head.weight", &[100, 8]);
    /// let logits = x.matmul_with(&w, false, true, sparsam_ir::Precision::F32);
    /// let targets = t.input("targets", &[4], DType::I32); // -1: does not count
    /// let (loss, count) = logits.cross_entropy(&targets).mean_where(&targets);
    /// let dw = grad(&loss, &[&w]).remove(0);
    /// let graph = t.finish(&[("loss", &loss), ("count", &count), ("dw", &dw)]).unwrap();
    /// assert!(graph.to_string().contains("cross_entropy f32 grad weight"));
    /// ```
    ///
    /// A target outside of `-1 .. V` makes its loss NaN.
    #[track_caller]
    pub fn cross_entropy(&self, targets: &Tensor) -> Tensor {
        let t = self.trace();
        let Some(id) = self.id() else { return t.nothing() };
        let (op, inputs) = {
            let graph = t.so_far();
            let node = graph.node(id);
            (node.op.clone(), node.inputs.clone())
        };
        if let Op::Matmul { trans_a: false, trans_b: true, precision } = op {
            let (h, weight) = (t.tensor(inputs[0]), t.tensor(inputs[1]));
            if h.rank() == 2 && h.dtype() == DType::F32 {
                return h.linear_cross_entropy(&weight, targets, precision);
            }
        }
        let (n, vocab) = (self.dim(0), self.dim(1));
        if self.rank() != 2 || targets.shape() != [n] {
            t.fail("cross_entropy", format!("logits {:?}, targets {:?}", self.shape(), targets.shape()));
            return t.nothing();
        }
        let column = targets.cast(DType::F32).reshape(&[n, 1]);
        let hit = t.iota(&[n, vocab], 1).cast(DType::F32).equal(&column);
        let shifted = self - self.max(&[1]);
        let zero = t.full(&[n, vocab], 0.0);
        let loss = shifted.exp().sum(&[1]).log() - hit.select(&shifted, &zero).sum(&[1]);
        let (none, unknown) = (t.full(&[n, 1], 0.0), t.full(&[n, 1], f64::NAN));
        let known = column.less(&t.full(&[n, 1], vocab as f64)).select(&loss, &unknown);
        column.less(&none).select(&none, &known).reshape(&[n])
    }

    /// Softmax cross-entropy of the logits `self W^T`: `self` F32 (N, D), `weight` (V, D) (a parameter under training or a
    /// frozen weight in any format), `targets` I32 (N), -1 for rows that do not count. Result: F32 (N), in nats.
    ///
    /// Computed in chunks of rows, and its gradients towards `self` and the weight in the same pass where the gradient of
    /// the loss does not depend on the loss itself (any weighted mean). `precision` is that of all products.
    #[track_caller]
    pub fn linear_cross_entropy(&self, weight: &Tensor, targets: &Tensor, precision: Precision) -> Tensor {
        self.trace()
            .push(Op::CrossEntropy { part: CrossEntropyPart::Loss, precision }, &[self, weight, targets])
    }

    /// Mean of the rows of `self` (N) whose target (I32 (N)) is not negative, and their number, both of shape (1). Without
    /// any such row the mean is 0.
    #[track_caller]
    pub fn mean_where(&self, targets: &Tensor) -> (Tensor, Tensor) {
        let t = self.trace();
        let n = self.dim(0);
        let ignored = targets.cast(DType::F32).less(&t.full(&[n], 0.0));
        let count = (t.full(&[n], 1.0) - ignored).sum(&[0]);
        (self.sum(&[0]) / count.maximum(&t.full(&[1], 1.0)), count)
    }
}

#[cfg(test)]
mod tests {
    use crate::interpret::{InterpretError, Leaves, Rounding, Value, interpret};
    use crate::{DType, Precision, Tensor, Trace, verify};

    /// Loss of logits (ln 1, ln 2, ln 5) in three ways; rows of a weight of one column.
    fn losses(targets: &[i32]) -> Result<Vec<Vec<f64>>, InterpretError> {
        let n = targets.len();
        let t = Trace::new();
        let (x, w) = (t.input("x", &[n, 1], DType::F32), t.weight("w", &[3, 1]));
        let target = t.input("targets", &[n], DType::I32);
        let logits = x.matmul_with(&w, false, true, Precision::F32);
        let plain = (&logits + t.full(&[n, 3], 0.0)).cross_entropy(&target);
        let outs: [&Tensor; 4] = [
            &x.linear_cross_entropy(&w, &target, Precision::F32),
            &logits.cross_entropy(&target),
            &plain,
            &plain.mean_where(&target).0,
        ];
        let names = ["a", "b", "c", "mean"];
        let graph = t.finish(&names.into_iter().zip(outs).collect::<Vec<_>>()).unwrap();
        verify(&graph).unwrap();
        let mut leaves = Leaves::from([
            ("x".into(), Value::new(&[n, 1], vec![1.0; n])),
            ("w".into(), Value::new(&[3, 1], [1f64, 2.0, 5.0].map(f64::ln))),
            ("targets".into(), Value::from_i32(&[n], targets)),
        ]);
        let out = interpret(&graph, &mut leaves, Rounding::None)?;
        Ok(names.map(|name| out[name].data.clone()).to_vec())
    }

    #[test]
    fn by_hand() {
        // p = 1/8, 2/8, 5/8.
        let want = [8f64.ln(), 0.0, 4f64.ln(), 1.6f64.ln()];
        for (i, got) in losses(&[0, -1, 1, 2]).unwrap().iter().enumerate() {
            let want = if i == 3 { vec![want.iter().sum::<f64>() / 3.0] } else { want.to_vec() };
            assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() < 1e-12), "{i}: {got:?} {want:?}");
        }
        assert_eq!(losses(&[-1]).unwrap()[3], [0.0]);
    }

    #[test]
    fn bad_targets_and_shapes_are_errors() {
        assert!(matches!(losses(&[3]), Err(InterpretError::Index { index: 3, limit: 3, .. })));
        let t = Trace::new();
        let (x, w) = (t.input("x", &[4, 2], DType::F32), t.weight("w", &[3, 2]));
        x.linear_cross_entropy(&w, &t.input("targets", &[5], DType::I32), Precision::F32);
        let e = t.finish(&[]).unwrap_err().to_string();
        assert!(e.contains("want (N, D), (V, D) and (N)") && e.contains("loss.rs"), "{e}");
    }

    #[test]
    fn eight_bits_are_for_evaluation() {
        let t = Trace::new();
        let (x, w) = (t.input("x", &[4, 32], DType::F32), t.weight("w", &[3, 32]));
        let loss = x.linear_cross_entropy(&w, &t.input("targets", &[4], DType::I32), Precision::Int8);
        assert!(verify(&t.finish(&[("loss", &loss)]).unwrap()).is_ok());
        crate::grad(&loss.sum(&[0]), &[&x]);
        assert!(t.finish(&[]).unwrap_err().what.contains("8-bit activations"));
    }
}
