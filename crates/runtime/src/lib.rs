//! Runs a compiled program on a device: weights, states, buffers and threads.
//!
//! A [`Device`] has threads and instructions. [`Weights`] are parameters by name, packed once and shared. A
//! [`Session`] owns memory on a device: one arena that all its programs share, and states that live on between runs
//! (a KV cache, optimiser moments). [`Session::compile`] loads a graph, fused and planned; [`Session::eager`] loads
//! it node by node, the baseline; [`Session::run`] runs either on named inputs.
//!
//! This crate does not know files, tokens or models, and decides nothing about the order or the shape of the work:
//! that is the compiler's.
//!
//! ```
//! use sparsam_ir::{DType, Trace};
//! use sparsam_runtime::{Data, Device, Session, Weights};
//! use std::sync::Arc;
//! let t = Trace::new();
//! let x = t.input("x", &[1, 3], DType::F32);
//! let y = &x * &t.weight("w", &[3]); // a row of three numbers by three weights
//! let graph = t.finish(&[("y", &y)]).unwrap();
//!
//! let mut weights = Weights::new();
//! weights.insert_f32("w", &[3], &[1.0, 10.0, 100.0]).unwrap();
//! let mut session = Session::new(&Device::cpu(1).unwrap(), Arc::new(weights));
//! let step = session.compile(&graph).unwrap();
//! let outputs = session.run(&step, &[("x", Data::F32(&[1.0, 2.0, 3.0]))]).unwrap();
//! assert_eq!(outputs.f32("y").unwrap(), [1.0, 20.0, 300.0]);
//! ```
#![forbid(unsafe_code)]

mod device;
mod group;
mod load;
mod profile;
mod session;
mod sums;
mod weights;

pub use device::Device;
pub use group::{Alone, Group};
pub use load::Step;
pub use profile::{KernelTime, Profile};
pub use session::{Data, Outputs, Session};
pub use sparsam_compiler::{Error as CompileError, Kernel, Options, Pass, Program, Recompute, Report};
pub use sparsam_ir::Precision;
pub use sparsam_kernels::roof::Arithmetic;
pub use sparsam_kernels::{Cpu, Simd};
pub use weights::Weights;

use sparsam_dtype::DType;

/// What goes wrong between a graph and its results.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The graph does not compile.
    #[error(transparent)]
    Compile(#[from] sparsam_compiler::Error),
    /// The instructions asked for do not exist here, or what was to be measured.
    #[error(transparent)]
    Device(sparsam_kernels::Error),
    /// A kernel refuses its operands: an index outside of a table, or an error of ours.
    #[error("runtime: step {step} ({kernel}): {source}")]
    Kernel {
        /// Position in the program.
        step: usize,
        /// The kind of kernel.
        kernel: &'static str,
        /// What it refuses.
        source: sparsam_kernels::Error,
    },
    /// A weight's bytes do not fit its shape and type.
    #[error("runtime: weight {name:?}: {what}")]
    Weight {
        /// Its name.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// The program wants a leaf that is not there, or another shape or type of it.
    #[error("runtime: {kind} {name:?} must be {want_dtype}{want:?}, {got}")]
    Leaf {
        /// `input`, `weight` or `state`.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Shape that the program wants.
        want: Vec<usize>,
        /// Type that the program wants.
        want_dtype: DType,
        /// What there is.
        got: String,
    },
    /// A value given under a name that the program does not know.
    #[error("runtime: the program has no {kind} {name:?}; it has {known:?}")]
    Unknown {
        /// `input`, `output` or `state`.
        kind: &'static str,
        /// The name.
        name: String,
        /// The names that it has.
        known: Vec<String>,
    },
    /// Sums over processes cannot be made any more.
    #[error(
        "runtime: the thread that sums over processes has failed; end all of them and go on from a checkpoint"
    )]
    Sums,
    /// A step of another session.
    #[error("runtime: this step was loaded by another session; load its graph into this one")]
    Foreign,
    /// An output read as another type than it has.
    #[error("runtime: output {name:?} is {dtype}, not {want}")]
    OutputType {
        /// Its name.
        name: String,
        /// Its type.
        dtype: DType,
        /// The type asked for.
        want: DType,
    },
}
