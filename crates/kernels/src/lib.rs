//! CPU kernels: matmul, rounded matmul, attention, row programs and data movement.
//!
//! This crate knows memory, strides and instructions sets; it does not know graphs, models or files. Every kernel
//! file has the same order: formula and source, scalar reference, fast versions, the choice at run time, tests
//! that hold them together. Start at [`mem`] (what kernels work on) and [`cpu`] (what the machine can do).

pub mod attention;
mod blocks;
mod convert;
pub mod cpu;
pub mod matmul;
pub mod mem;
pub mod movement;
mod pages;
mod pool;
pub mod roof;
pub mod row;
#[allow(dead_code)] // each kernel takes its part
mod simd;
pub mod weight;

pub use cpu::{Context, Cpu, Simd};
pub use mem::{AlignedBytes, Memory, View};
pub use pages::{FilePages, Pages, give_back_freed};
pub use pool::Pool;

/// In what precision a matmul reads its activations; sums are f32 (8-bit: i32 per block, then f32).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32 activations; rounded weights are decoded.
    F32,
    /// Activations and weights rounded to bf16.
    Bf16,
    /// Activations rounded per row in blocks of 32 to 8 bits.
    Int8,
}

/// What a kernel refuses.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A view names a slab that does not exist.
    #[error("kernels: no slab {slab}")]
    NoSlab {
        /// Index asked for.
        slab: usize,
    },
    /// A view reaches past the end of its slab.
    #[error("kernels: view needs {need} bytes of slab {slab}, which has {have}")]
    Bounds {
        /// Slab index.
        slab: usize,
        /// Bytes up to the view's end.
        need: usize,
        /// Bytes of the slab.
        have: usize,
    },
    /// An output lies in a shared slab.
    #[error("kernels: slab {slab} is shared and cannot be written")]
    ReadOnly {
        /// Slab index.
        slab: usize,
    },
    /// An output overlaps another operand.
    #[error("kernels: output {out:?} overlaps {other:?}")]
    Overlap {
        /// The output.
        out: Box<View>,
        /// What it overlaps.
        other: Box<View>,
    },
    /// `SPARSAM_SIMD` asks for what does not exist.
    #[error("SPARSAM_SIMD={name}: this machine runs scalar up to {best}; unset it or choose one of these")]
    Simd {
        /// The value.
        name: String,
        /// The most that the machine has.
        best: &'static str,
    },
    /// A view has the wrong element type or layout for this kernel.
    #[error("kernels: want {want}, got {view:?}")]
    View {
        /// What the kernel takes.
        want: &'static str,
        /// What it got.
        view: Box<View>,
    },
    /// Operands whose shapes do not fit each other.
    #[error("kernels: {op}: {what}")]
    Shape {
        /// The kernel.
        op: &'static str,
        /// The shapes and what is wrong with them.
        what: String,
    },
}
