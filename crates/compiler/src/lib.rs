//! Graph to [`Program`]: named passes, fusion into row programs, memory planning.
//!
//! This crate is pure: it knows no kernels, threads or values of weights. It writes down *what* is to run, in terms
//! of five kinds of kernels (matmul, rounded matmul, attention, row program, data movement) over strided views of
//! places; the runtime binds places to memory and runs the steps in order.
//!
//! Start at [`compile`], whose pipeline reads from top to bottom in `passes/mod.rs`; then [`Program`], what comes
//! out. `lower.rs` is the plain meaning (eager), [`mod@reference`] runs a program slowly, for tests.
//!
//! ```
//! use sparsam_compiler::{Options, compile};
//! use sparsam_ir::{DType, Trace};
//! let t = Trace::new();
//! let y = t.input("x", &[4, 64], DType::F32).softmax();
//! let graph = t.finish(&[("y", &y)]).unwrap();
//! assert_eq!(compile(&graph, &Options::eager()).unwrap().steps.len(), 5);
//! assert_eq!(compile(&graph, &Options::default()).unwrap().steps.len(), 1); // all of it is one row program
//! ```
#![forbid(unsafe_code)]

mod check;
mod lower;
mod passes;
mod program;
pub mod reference;
mod report;
mod rows;

pub use passes::{Options, Pass, compile};
pub use program::{Instr, Kernel, Operand, Place, Program, RowProgram, Step, Store, Val};
pub use report::{PassReport, Recompute, Report, Sums};

use sparsam_ir::{NodeId, VerifyError};
use std::panic::Location;

/// Why a graph does not become a program.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The graph breaks a rule before any pass has touched it.
    #[error("compiler: the graph is broken before compilation: {0}")]
    Graph(VerifyError),
    /// A pass has broken a rule: an error of ours. Switching the pass off works around it.
    #[error("compiler: pass {pass} broke the program: {what}; switch the pass off and report this")]
    Pass {
        /// The pass.
        pass: &'static str,
        /// The rule and where it is broken.
        what: String,
    },
    /// No program fits the budget.
    #[error(
        "compiler: the step does not fit into {:.3} GB even if all is computed again; it needs {:.3} GB: raise the memory \
         budget, or take fewer tokens a step",
        *budget as f64 / 1e9, *least as f64 / 1e9
    )]
    Memory {
        /// The budget, in bytes.
        budget: usize,
        /// The least that some program needs, in bytes.
        least: usize,
    },
    /// No kernel does this.
    #[error("compiler: node {node}: no kernel for {what} (traced at {at})")]
    Unsupported {
        /// The node.
        node: NodeId,
        /// What is asked for.
        what: &'static str,
        /// The line of model code.
        at: &'static Location<'static>,
    },
}
