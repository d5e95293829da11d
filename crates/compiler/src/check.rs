//! What must hold of every program, before and after every pass.

use crate::program::{Instr, Kernel, Operand, Place, Program, Store, is_narrow};
use sparsam_ir::DType;

/// Checks a program: views lie within their places, arena places are written before they are read, row programs
/// are well formed. With `planned`, also that places that live at the same time do not share bytes.
pub(crate) fn check(p: &Program, planned: bool) -> Result<(), String> {
    let mut written = vec![false; p.places.len()];
    let bounds = |o: &Operand| -> Result<(), String> {
        let Some(place) = p.places.get(o.place) else { return Err(format!("{o}: no such place")) };
        let have = match place {
            Place::Arena { bytes, .. } => *bytes,
            Place::Input { shape, dtype, .. }
            | Place::Weight { shape, dtype, .. }
            | Place::State { shape, dtype, .. } => {
                if *dtype != o.dtype {
                    return Err(format!("{o}: its place is {place}"));
                }
                dtype.bytes_for(shape.iter().product()).unwrap_or(0)
            }
        };
        let need = if o.dtype.is_block() {
            o.dtype.bytes_for(o.layout.end()).unwrap_or(usize::MAX)
        } else {
            o.layout.end() * o.dtype.block_bytes()
        };
        if need > have { Err(format!("{o} needs {need} bytes of {place}")) } else { Ok(()) }
    };
    for (i, s) in p.steps.iter().enumerate() {
        let at = |what: String| format!("step {i} ({}): {what}", s.kernel.name());
        for o in &s.ins {
            bounds(o).map_err(at)?;
            if p.is_temp(o.place) && !written[o.place] {
                return Err(at(format!("reads {o} before it is written")));
            }
        }
        for o in &s.outs {
            bounds(o).map_err(at)?;
            if matches!(p.places[o.place], Place::Input { .. } | Place::Weight { .. }) {
                return Err(at(format!("writes {o}, which is not its to write")));
            }
        }
        if let Kernel::Row(_) = s.kernel {
            row(s).map_err(at)?;
        }
        if s.kernel == Kernel::AllReduce {
            sum_over_processes(s).map_err(at)?;
        }
        s.outs.iter().for_each(|o| written[o.place] = true);
    }
    for (name, o) in &p.outputs {
        bounds(o)?;
        if !o.layout.is_contiguous() || (p.is_temp(o.place) && !written[o.place] && o.layout.numel() > 0) {
            return Err(format!("output {name:?} ({o}) is not contiguous or not written"));
        }
    }
    if planned { disjoint(p) } else { Ok(()) }
}

/// One value in, of which the whole result is made; where both lie in one place they are the same.
fn sum_over_processes(s: &crate::Step) -> Result<(), String> {
    let ([from], [to]) = (&s.ins[..], &s.outs[..]) else { return Err("has other than one operand".into()) };
    let plain = |o: &Operand| o.dtype == DType::F32 && o.layout.is_contiguous();
    if !plain(from) || !plain(to) || from.layout.shape != to.layout.shape {
        return Err(format!("{to} is to be the sum of {from}: want F32, contiguous, of one shape"));
    }
    if from.place == to.place && from.layout != to.layout {
        return Err(format!("{to} overlaps {from}"));
    }
    Ok(())
}

fn row(s: &crate::Step) -> Result<(), String> {
    let Some(p) = s.row() else { return Ok(()) };
    if p.shape.is_empty() {
        return Err("a domain without axes".into());
    }
    let mut seeds = Vec::new();
    for (i, instr) in p.instrs.iter().enumerate() {
        if instr.operands().any(|v| v as usize >= i) {
            return Err(format!("instruction {i} reads a later one"));
        }
        match instr {
            Instr::Load { input } => match s.ins.get(*input) {
                Some(o) if o.layout.shape == p.shape => {}
                other => return Err(format!("instruction {i} loads {other:?}, the domain is {:?}", p.shape)),
            },
            Instr::Random { seed, .. } => seeds.push((i, *seed)),
            Instr::Iota { axis } if *axis >= p.shape.len() => {
                return Err(format!("instruction {i}: axis {axis}"));
            }
            Instr::Iota { .. }
            | Instr::Const(_)
            | Instr::Unary(..)
            | Instr::Binary(..)
            | Instr::Select(..)
            | Instr::Reduce(..)
            | Instr::Round(..) => {}
        }
    }
    if let Some((i, _)) =
        seeds.iter().find(|(_, seed)| s.ins.get(*seed).is_none_or(|o| o.layout.numel() != 2))
    {
        return Err(format!("instruction {i}: a seed has two numbers"));
    }
    let narrow = p.narrow(&s.ins);
    for (i, instr) in p.instrs.iter().enumerate() {
        if let Instr::Reduce(_, v) = instr
            && narrow[*v as usize]
        {
            return Err(format!("instruction {i} reduces a value that has one number a row"));
        }
    }
    let lead = p.shape.len() - 1;
    for (out, v, how) in &p.stores {
        let Some(o) = s.outs.get(*out) else { return Err(format!("stores to output {out}")) };
        let Some(&narrow) = narrow.get(*v as usize) else { return Err(format!("stores value {v}")) };
        let shape = &o.layout.shape;
        let ok = match how {
            Store::ColumnSum => {
                shape.len() == p.shape.len()
                    && shape[..lead].iter().all(|&n| n == 1)
                    && shape[lead] == p.width()
                    && !narrow
            }
            Store::Rows => {
                *shape == p.shape || (narrow && shape[..lead] == p.shape[..lead] && is_narrow(&o.layout))
            }
        };
        if !ok {
            return Err(format!(
                "stores value {v} (narrow: {narrow}, {how:?}) to {o}, the domain is {:?}",
                p.shape
            ));
        }
    }
    if (0..s.outs.len()).any(|o| p.stores.iter().filter(|(out, ..)| *out == o).count() != 1) {
        return Err("an output is not stored exactly once".into());
    }
    Ok(())
}

/// First step that writes and last step that reads or writes each arena place; kept ones live to the end.
pub(crate) fn lifetimes(p: &Program) -> Vec<Option<(usize, usize)>> {
    let mut life: Vec<Option<(usize, usize)>> = vec![None; p.places.len()];
    for (i, s) in p.steps.iter().enumerate() {
        for o in s.outs.iter().chain(&s.ins) {
            if p.is_temp(o.place) {
                life[o.place].get_or_insert((i, i)).1 = i;
            }
        }
    }
    for (place, kept) in p.kept().into_iter().enumerate() {
        if kept && let Some(l) = &mut life[place] {
            l.1 = p.steps.len();
        }
    }
    life
}

fn disjoint(p: &Program) -> Result<(), String> {
    let life = lifetimes(p);
    let mut live: Vec<(usize, usize, usize, usize, usize)> = Vec::new(); // from, to, offset, end, place
    for (place, l) in life.iter().enumerate() {
        let (Some((from, to)), Place::Arena { offset, bytes }) = (l, &p.places[place]) else { continue };
        if *bytes == 0 {
            continue;
        }
        if offset + bytes > p.arena_bytes || !offset.is_multiple_of(64) {
            return Err(format!("p{place} at {offset}..{} of an arena of {}", offset + bytes, p.arena_bytes));
        }
        live.push((*from, *to, *offset, offset + bytes, place));
    }
    live.sort_unstable();
    for (i, a) in live.iter().enumerate() {
        for b in live[i + 1..].iter().take_while(|b| b.0 <= a.1) {
            if a.2 < b.3 && b.2 < a.3 {
                return Err(format!("p{} and p{} live at the same time in the same bytes", a.4, b.4));
            }
        }
    }
    Ok(())
}
