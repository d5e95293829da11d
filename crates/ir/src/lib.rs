//! The graph of a computation: operations, shapes, tracing, verification, printing and meaning.
//!
//! A model is a plain function over [`Tensor`] handles. Calling it records a [`Graph`]: an arena of nodes with
//! index ids. This crate is pure: it knows no file, clock, thread or device. It does not run anything fast; the
//! slow [`interpret`] module *defines* what each operation means, and everything faster is held to it.
//!
//! Start at [`Op`] (what can be said), [`Tensor`] (how models say it), then [`verify()`] and [`interpret`].
//!
//! ```
//! use sparsam_ir::{DType, Trace};
//! let t = Trace::new();
//! let x = t.input("x", &[2, 3], DType::F32);
//! let y = x.softmax(); // composed of max, exp, sum, divide: there is no softmax op
//! let graph = t.finish(&[("y", &y)]).unwrap();
//! assert_eq!(graph.outputs[0].0, "y");
//! ```
#![forbid(unsafe_code)]

mod grad;
mod graph;
mod infer;
pub mod interpret;
mod loss;
mod op;
mod optimise;
mod print;
mod trace;
mod verify;

pub use grad::grad;
pub use graph::{Graph, Node, NodeId};
pub use infer::infer;
pub use op::{
    Attention, AttentionLayout, AttentionPart, Binary, CrossEntropyPart, Op, Precision, Real, Reduction,
    Unary,
};
pub use optimise::{AdamW, Muon};
pub use sparsam_dtype::{DType, Layout};
pub use trace::{AttentionScores, Tensor, Trace, TraceError};
pub use verify::{VerifyError, verify};
