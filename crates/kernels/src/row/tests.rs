//! Row programs by hand, against their meaning, and on all paths.

use super::*;
use crate::Cpu;

#[test]
fn softmax_by_hand_and_column_sums() {
    let program = Program {
        shape: vec![2, 3],
        instrs: vec![
            Instr::Load { input: 0 },
            Instr::Reduce(Reduction::Max, 0),
            Instr::Binary(Binary::Sub, 0, 1),
            Instr::Unary(Unary::Exp, 2),
            Instr::Reduce(Reduction::Sum, 3),
            Instr::Binary(Binary::Div, 3, 4),
        ],
        stores: vec![(0, 5, Store::Rows), (1, 5, Store::ColumnSum), (2, 4, Store::Rows)],
    };
    let mut mem = Memory::new();
    let slab = mem.add_owned(24 + 12 + 8);
    let ln2 = std::f32::consts::LN_2;
    let x = [0.0, ln2, ln2 * 2.0, 5.0, 5.0, 5.0];
    mem.bytes_mut(slab).unwrap()[..24].copy_from_slice(bytemuck::cast_slice(&x));
    let x = View::contiguous(slab, DType::F32, &[2, 3]);
    let at = |offset, shape: &[usize]| View {
        layout: Layout { offset, ..Layout::contiguous(shape) },
        ..x.clone()
    };
    let (sums, totals) = (at(6, &[1, 3]), at(9, &[2, 1]));
    let outs = [&x, &sums, &totals];
    let code = Code::new(&program, &[(DType::F32, &x.layout)], &outs.map(|v| (v.dtype, &v.layout))).unwrap();
    for cpu in Cpu::all() {
        mem.bytes_mut(slab).unwrap()[..24].copy_from_slice(bytemuck::cast_slice(&[
            0.0,
            ln2,
            ln2 * 2.0,
            5.0,
            5.0,
            5.0,
        ]));
        run(&Context::new(2, cpu), &mut mem, &code, &outs, &[&x]).unwrap();
        let want = [1.0 / 7.0, 2.0 / 7.0, 4.0 / 7.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0];
        let close = |got: &[f32], want: &[f32]| got.iter().zip(want).all(|(a, b)| (a - b).abs() < 3e-7);
        assert!(close(mem.f32(&x).unwrap(), &want));
        let want = [want[0] + want[3], want[1] + want[4], want[2] + want[5]];
        assert!(close(mem.f32(&sums).unwrap(), &want));
        assert!(close(mem.f32(&totals).unwrap(), &[1.75, 3.0]));
    }
}

#[test]
fn programs_that_mean_nothing_are_refused() {
    let good = Program {
        shape: vec![2, 3],
        instrs: vec![Instr::Load { input: 0 }, Instr::Unary(Unary::Neg, 0)],
        stores: vec![(0, 1, Store::Rows)],
    };
    let l = Layout::contiguous(&[2, 3]);
    let narrow = Layout::contiguous(&[2, 1]);
    let f32s = (DType::F32, &l);
    assert!(Code::new(&good, &[f32s], &[f32s]).is_ok());
    assert!(Code::new(&good, &[(DType::F32, &narrow)], &[f32s]).is_ok(), "a narrow value fills a row");
    let refused = |program: &Program, ins: &[(DType, &Layout)], outs: &[(DType, &Layout)], why: &str| {
        let e = Code::new(program, ins, outs).unwrap_err().to_string();
        assert!(e.contains(why), "{e}");
    };
    refused(&good, &[], &[f32s], "input 0 of 0");
    refused(&good, &[f32s], &[], "output 0 of 0");
    refused(&good, &[f32s], &[f32s, f32s], "never stored");
    refused(&good, &[f32s], &[(DType::F32, &narrow)], "output 0 has shape [2, 1]");
    refused(&good, &[(DType::Q4_0, &l)], &[f32s], "plain numbers");
    refused(&good, &[f32s], &[(DType::F32, &narrow.broadcast(&[2, 3]))], "many times");
    let with = |instr| Program { instrs: vec![Instr::Load { input: 0 }, instr], ..good.clone() };
    refused(&with(Instr::Unary(Unary::Neg, 1)), &[f32s], &[f32s], "not made yet");
    refused(&with(Instr::Iota { axis: 2 }), &[f32s], &[f32s], "iota along axis 2");
    refused(&with(Instr::Random { seed: 0, stream: 0 }), &[f32s], &[f32s], "I32 [2]");
    let twice = Program { stores: vec![(0, 1, Store::Rows), (0, 0, Store::Rows)], ..good.clone() };
    refused(&twice, &[f32s], &[f32s], "twice");
}

/// Random programs over random layouts: every path against the meaning in f64, with a bound on the error of each
/// value carried along.
mod random_programs;

/// Found by random graphs: the column index is wide even in rows of one element, and its store came before the load
/// of what it replaces.
#[test]
fn rows_of_one_element_are_read_before_they_are_replaced() {
    let program = Program {
        shape: vec![2, 1],
        instrs: vec![
            Instr::Iota { axis: 1 },
            Instr::Unary(Unary::Cos, 0),
            Instr::Load { input: 0 },
            Instr::Binary(Binary::Mul, 2, 1),
        ],
        stores: vec![(0, 1, Store::Rows), (1, 3, Store::Rows)],
    };
    for cpu in Cpu::all() {
        let mut mem = Memory::new();
        let slabs = [mem.add_owned(8), mem.add_owned(8)];
        mem.bytes_mut(slabs[0]).unwrap().copy_from_slice(bytemuck::cast_slice(&[3f32, 5.0]));
        let [x, y] = slabs.map(|slab| View::contiguous(slab, DType::F32, &[2, 1]));
        let operand = (DType::F32, &x.layout);
        let code = Code::new(&program, &[operand], &[operand, operand]).unwrap();
        run(&Context::new(1, cpu), &mut mem, &code, &[&x, &y], &[&x]).unwrap();
        assert_eq!((mem.f32(&x).unwrap(), mem.f32(&y).unwrap()), (&[1.0, 1.0][..], &[3.0, 5.0][..]), "{cpu}");
    }
}
