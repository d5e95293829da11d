//! Every rule of `grad` against central differences of the f64 interpreter, element by element.

use sparsam_ir::interpret::{Leaves, Rounding, Value, interpret, philox_uniform};
use sparsam_ir::{AttentionScores, DType, Precision, Tensor, Trace, grad, verify};

/// Numbers in (low, high), told apart by `stream`.
fn numbers(n: usize, stream: u32, low: f64, high: f64) -> Vec<f64> {
    (0..n as u64).map(|i| low + (high - low) * philox_uniform(i, stream, [1, 2]) as f64).collect()
}

/// One differentiated input: name, shape, range of its numbers.
type Arg = (&'static str, &'static [usize], f64, f64);

/// `f` of F32 inputs `args` (and I32 inputs `index`): the gradient of `sum(f * c)` with fixed random `c` towards each
/// element of each argument must be its central difference.
fn check(
    what: &str,
    args: &[Arg],
    index: &[(&str, &[usize], &[i32])],
    f: impl Fn(&Trace, &[Tensor], &[Tensor]) -> Tensor,
) {
    let t = Trace::new();
    let x: Vec<Tensor> = args.iter().map(|(n, s, ..)| t.input(n, s, DType::F32)).collect();
    let i: Vec<Tensor> = index.iter().map(|(n, s, _)| t.input(n, s, DType::I32)).collect();
    let y = f(&t, &x, &i);
    let c = t.input("c", &y.shape(), DType::F32);
    let axes: Vec<usize> = (0..y.rank()).collect();
    let loss = (&y * &c).sum(&axes);
    let d = grad(&loss, &x.iter().collect::<Vec<_>>());
    let mut outputs = vec![("loss".to_string(), loss.clone())];
    outputs.extend(args.iter().zip(&d).map(|((n, ..), d)| (format!("d{n}"), d.clone())));
    let named: Vec<(&str, &Tensor)> = outputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let graph = t.finish(&named).unwrap_or_else(|e| panic!("{what}: {e}"));
    verify(&graph).unwrap_or_else(|e| panic!("{what}: {e}"));

    let mut leaves = Leaves::new();
    for (k, (n, s, low, high)) in args.iter().enumerate() {
        leaves.insert(n.to_string(), Value::new(s, numbers(s.iter().product(), k as u32, *low, *high)));
    }
    for (n, s, v) in index {
        leaves.insert(n.to_string(), Value::from_i32(s, v));
    }
    leaves.insert("c".into(), Value::new(&y.shape(), numbers(y.shape().iter().product(), 99, -1.0, 1.0)));
    let run = |leaves: &Leaves| interpret(&graph, &mut leaves.clone(), Rounding::None).unwrap();
    let exact = run(&leaves);
    for ((n, shape, ..), d) in args.iter().zip(&d) {
        assert_eq!(d.shape(), *shape, "{what}: shape of d{n}");
        for e in 0..shape.iter().product::<usize>() {
            let h = 1e-5;
            let at = |step: f64| {
                let mut moved = leaves.clone();
                moved.get_mut(*n).unwrap().data[e] += step;
                run(&moved)["loss"].data[0]
            };
            let numeric = (at(h) - at(-h)) / (2.0 * h);
            let ours = exact[&format!("d{n}")].data[e];
            // Central differences err by h^2 f'''/6 and by rounding of about 1e-16 / h.
            let tolerance = 1e-7 * (1.0 + numeric.abs());
            assert!(
                (numeric - ours).abs() < tolerance,
                "{what}: d{n}[{e}] is {ours}, differences say {numeric}"
            );
        }
    }
}

#[test]
fn elementwise() {
    let x: &[Arg] = &[("x", &[2, 3], -1.5, 1.5)];
    let positive: &[Arg] = &[("x", &[2, 3], 0.5, 2.0)];
    check("neg", x, &[], |_, x, _| x[0].neg());
    check("abs", x, &[], |_, x, _| x[0].abs());
    check("recip", positive, &[], |_, x, _| x[0].recip());
    check("sqrt", positive, &[], |_, x, _| x[0].sqrt());
    check("exp", x, &[], |_, x, _| x[0].exp());
    check("log", positive, &[], |_, x, _| x[0].log());
    check("sin", x, &[], |_, x, _| x[0].sin());
    check("cos", x, &[], |_, x, _| x[0].cos());
    check("tanh", x, &[], |_, x, _| x[0].tanh());
    check("erf", x, &[], |_, x, _| x[0].erf());
    check("floor", x, &[], |_, x, _| x[0].floor() * &x[0]);
    check("cast", x, &[], |_, x, _| x[0].cast(DType::F64).cast(DType::F32));
    check("all_reduce", x, &[], |_, x, _| x[0].exp().all_reduce()); // one process: itself
    check("silu and gelu", x, &[], |_, x, _| x[0].silu() + x[0].gelu() + x[0].gelu_tanh());
}

#[test]
fn two_operands() {
    let ab: &[Arg] = &[("a", &[2, 3], -1.0, 1.0), ("b", &[2, 3], 1.1, 2.0)];
    let crossing: &[Arg] = &[("a", &[2, 3], -1.0, 1.0), ("b", &[2, 3], -1.0, 1.0)];
    let broadcast: &[Arg] = &[("a", &[2, 1, 3], -1.0, 1.0), ("b", &[4, 1], 1.0, 2.0)];
    check("add", ab, &[], |_, x, _| &x[0] + &x[1]);
    check("sub", ab, &[], |_, x, _| &x[0] - &x[1]);
    check("mul", ab, &[], |_, x, _| &x[0] * &x[1]);
    check("div", ab, &[], |_, x, _| &x[0] / &x[1]);
    check("max", crossing, &[], |_, x, _| x[0].maximum(&x[1]));
    check("min", crossing, &[], |_, x, _| x[0].minimum(&x[1]));
    check("select", crossing, &[], |_, x, _| x[0].less(&x[1]).select(&x[0].exp(), &x[1]));
    check("broadcast", broadcast, &[], |_, x, _| &x[0] * &x[1]);
    check("one value twice", &[("a", &[3], 0.5, 1.0)], &[], |_, x, _| &x[0] * &x[0] + x[0].exp());
}

#[test]
fn ties_of_max_share() {
    let t = Trace::new();
    let x = t.input("x", &[1, 3], DType::F32);
    let loss = x.max(&[1]) + x.slice(1, 0, 1).maximum(&x.slice(1, 1, 2));
    let d = grad(&loss, &[&x]);
    let g = t.finish(&[("d", &d[0])]).unwrap();
    let mut leaves = Leaves::from([("x".to_string(), Value::new(&[1, 3], [2.0, 2.0, 1.0]))]);
    assert_eq!(interpret(&g, &mut leaves, Rounding::None).unwrap()["d"].data, [1.0, 1.0, 0.0]);
}

#[test]
fn reductions_and_movement() {
    let x: &[Arg] = &[("x", &[2, 3, 4], -1.0, 1.0)];
    let xy: &[Arg] = &[("x", &[2, 3, 4], -1.0, 1.0), ("y", &[2, 2, 4], -1.0, 1.0)];
    check("sum", x, &[], |_, x, _| x[0].sum(&[0, 2]));
    check("max", x, &[], |_, x, _| x[0].max(&[1]));
    check("softmax", x, &[], |_, x, _| x[0].softmax());
    check("reshape", x, &[], |_, x, _| x[0].reshape(&[6, 4]).exp());
    check("permute", x, &[], |_, x, _| x[0].permute(&[2, 0, 1]).exp());
    check("slice", x, &[], |_, x, _| x[0].slice(1, 1, 3).exp());
    check("pad", x, &[], |_, x, _| x[0].pad(2, 1, 2).exp());
    check("concat", xy, &[], |t, x, _| t.concat(&[&x[0], &x[1], &x[0]], 1).exp());
}

#[test]
fn products() {
    for (trans_a, trans_b) in [(false, false), (true, false), (false, true), (true, true)] {
        let a: &[usize] = if trans_a { &[2, 4, 3] } else { &[2, 3, 4] };
        let b: &[usize] = if trans_b { &[2, 5, 4] } else { &[2, 4, 5] };
        let args: &[Arg] = &[("a", a, -1.0, 1.0), ("b", b, -1.0, 1.0)];
        check(&format!("matmul {trans_a} {trans_b}"), args, &[], |_, x, _| {
            x[0].matmul_with(&x[1], trans_a, trans_b, Precision::F32)
        });
    }
    let table: &[Arg] = &[("table", &[4, 2], -1.0, 1.0)];
    let values: &[Arg] = &[("values", &[5, 2], -1.0, 1.0)];
    let rows: (&str, &[usize], &[i32]) = ("rows", &[5], &[3, 0, 3, 1, 3]);
    check("gather", table, &[rows], |_, x, i| x[0].gather(&i[0]).exp());
    check("scatter_add", values, &[rows], |_, x, i| x[0].scatter_add(&i[0], 4).exp());
}

#[test]
fn attention() {
    let qkv: &[Arg] =
        &[("q", &[6, 4, 3], -1.0, 1.0), ("k", &[6, 2, 3], -1.0, 1.0), ("v", &[6, 2, 2], -1.0, 1.0)];
    // Two sequences and a row of padding.
    let start: (&str, &[usize], &[i32]) = ("start", &[6], &[0, 0, 0, 3, 3, 6]);
    for (window, softcap) in [(None, None), (Some(2), None), (None, Some(1.5)), (Some(2), Some(0.7))] {
        let how = AttentionScores { scale: 0.8, window, softcap };
        check(&format!("attention {window:?} {softcap:?}"), qkv, &[start], |_, x, i| {
            x[0].attention_packed(&x[1], &x[2], &i[0], how)
        });
    }
}

#[test]
fn cross_entropy() {
    let args: &[Arg] = &[("h", &[5, 3], -1.0, 1.0), ("w", &[7, 3], -1.0, 1.0)];
    let targets: (&str, &[usize], &[i32]) = ("targets", &[5], &[3, -1, 0, 6, 3]);
    check("cross_entropy", args, &[targets], |_, x, i| {
        x[0].linear_cross_entropy(&x[1], &i[0], Precision::F32)
    });
    check("cross_entropy of a product, its mean", args, &[targets], |_, x, i| {
        let logits = x[0].matmul_with(&x[1], false, true, Precision::F32);
        logits.cross_entropy(&i[0]).mean_where(&i[0]).0
    });
    check("cross_entropy of other logits", args, &[targets], |_, x, i| {
        let logits = x[0].matmul_with(&x[1], false, true, Precision::F32);
        logits.mul_scalar(0.5).tanh().cross_entropy(&i[0])
    });
}

#[test]
fn what_has_no_gradient_says_so_and_where() {
    let t = Trace::new();
    let x = t.input("x", &[2, 32], DType::F32);
    let w = t.weight("w", &[3, 32]);
    let line = line!() + 1;
    let y = x.matmul_with(&w, false, true, Precision::Int8).sum(&[0, 1]);
    grad(&y, &[&x]);
    let e = t.finish(&[("y", &y)]).unwrap_err().to_string();
    assert!(e.contains("8-bit activations") && e.contains(&format!("grad.rs:{line}")), "{e}");

    let t = Trace::new();
    let x = t.input("x", &[2], DType::F32);
    grad(&x, &[&x]);
    assert!(t.finish(&[]).unwrap_err().what.contains("one number"));

    // No dependence: zeros.
    let t = Trace::new();
    let (x, z) = (t.input("x", &[2], DType::F32), t.input("z", &[3], DType::F32));
    let d = grad(&x.sum(&[0]), &[&z]);
    let g = t.finish(&[("d", &d[0])]).unwrap();
    assert_eq!(interpret(&g, &mut Leaves::new(), Rounding::None).map(|o| o["d"].data.clone()).ok(), None);
    let mut leaves = Leaves::from([
        ("x".into(), Value::new(&[2], [1.0, 2.0])),
        ("z".into(), Value::new(&[3], vec![0.0; 3])),
    ]);
    assert_eq!(interpret(&g, &mut leaves, Rounding::None).unwrap()["d"], Value::new(&[3], vec![0.0; 3]));
}
