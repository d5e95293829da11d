//! A graph as text, one node a line: what tests compare and `--explain` shows.
//!
//! ```text
//! %0 = input "x" : F32[2, 3]
//! %1 = max [1] %0 : F32[2, 1]
//! %2 = broadcast %1 : F32[2, 3]
//! %3 = sub %0 %2 : F32[2, 3]
//! out "y" = %3
//! ```

use crate::graph::{Graph, NodeId};
use crate::op::{AttentionPart, CrossEntropyPart, Op};
use std::fmt;

/// The op without operands, as the printer writes it.
pub(crate) fn op_text(op: &Op) -> String {
    let lower = |d: &dyn fmt::Debug| format!("{d:?}").to_lowercase();
    match op {
        Op::Input { name, .. } => format!("input {name:?}"),
        Op::Weight { name, .. } => format!("weight {name:?}"),
        Op::State { name, .. } => format!("state {name:?}"),
        Op::Const { value, .. } => format!("const {value:?}"),
        Op::Iota { axis, .. } => format!("iota {axis}"),
        Op::Random { stream, .. } => format!("random {stream}"),
        Op::Unary(u) => lower(u),
        Op::Binary(b) => lower(b),
        Op::Select => "select".into(),
        Op::Cast(_) => "cast".into(),
        Op::Reduce { op, axes } => format!("{} {axes:?}", lower(op)),
        Op::Reshape(_) => "reshape".into(),
        Op::Permute(axes) => format!("permute {axes:?}"),
        Op::Broadcast(_) => "broadcast".into(),
        Op::Slice { axis, start, end } => format!("slice {axis} {start}..{end}"),
        Op::Pad { axis, before, after } => format!("pad {axis} {before} {after}"),
        Op::Concat { axis } => format!("concat {axis}"),
        Op::Matmul { trans_a, trans_b, precision } => {
            let t = |t: &bool| if *t { "t" } else { "n" };
            format!("matmul {}{} {}", t(trans_a), t(trans_b), lower(precision))
        }
        Op::Gather => "gather".into(),
        Op::ScatterAdd { rows } => format!("scatter_add {rows}"),
        Op::Attention(a) => {
            let mut s = format!("attention {:?} scale {:?}", a.layout, a.scale);
            if let Some(w) = a.window {
                s += &format!(" window {w}");
            }
            if let Some(c) = a.softcap {
                s += &format!(" softcap {c:?}");
            }
            s += match a.part {
                AttentionPart::Out => "",
                AttentionPart::LogSumExp => " lse",
                AttentionPart::GradQ => " grad q",
                AttentionPart::GradK => " grad k",
                AttentionPart::GradV => " grad v",
            };
            s
        }
        Op::CrossEntropy { part, precision } => {
            let part = match part {
                CrossEntropyPart::Loss => "",
                CrossEntropyPart::GradH => " grad h",
                CrossEntropyPart::GradWeight => " grad weight",
            };
            format!("cross_entropy {}{part}", lower(precision))
        }
        Op::AllReduce => "all_reduce".into(),
        Op::Assign => "assign".into(),
        Op::ScatterRows => "scatter_rows".into(),
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for id in self.ids() {
            let n = self.node(id);
            write!(f, "{id} = {}", op_text(&n.op))?;
            for i in &n.inputs {
                write!(f, " {i}")?;
            }
            write!(f, " : {}{:?}", n.dtype, n.shape)?;
            match &n.tap {
                Some(t) => writeln!(f, "  # {t}")?,
                None => writeln!(f)?,
            }
        }
        for (name, id) in &self.outputs {
            writeln!(f, "out {name:?} = {id}")?;
        }
        for id in &self.writes {
            writeln!(f, "write {id}")?;
        }
        Ok(())
    }
}
