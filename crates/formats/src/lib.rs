//! Model files: GGUF and safetensors, read by memory map, written atomically, every length checked.
//!
//! This crate knows names, shapes, types and bytes. It does not know what a tensor is for (`models`), how to multiply
//! with it (`kernels`), or tokenizers: their files and keys are handed on as they are.
//!
//! Start at [`Source`], which opens either kind; [`gguf`] and [`safetensors`] hold the readers and the streaming
//! writers, [`Transform`] the differences of layout between the two worlds, [`AtomicFile`] the way in which every file
//! is written.
//!
//! What comes from a file is never trusted: a length is checked against what remains before anything is allocated,
//! offsets against the end and against each other, and the first contradiction is the error.
#![deny(unsafe_code)]

mod atomic;
mod body;
mod error;
pub mod gguf;
pub mod gptq;
pub mod imatrix;
#[allow(unsafe_code)]
mod mmap;
pub mod safetensors;
mod source;
mod tensors;
mod transform;

pub use atomic::AtomicFile;
pub use error::Error;
pub use mmap::Map;
pub use source::{Kind, Source};
pub use tensors::{TensorInfo, TensorRef, TensorSpec};
pub use transform::{Transform, Transformed};
