//! Threads and instructions.

use crate::Error;
use sparsam_dtype::DType;
use sparsam_kernels::roof::{self, Arithmetic};
use sparsam_kernels::{Context, Cpu};
use std::sync::Arc;

/// What programs run on. Clones share the threads.
#[derive(Clone)]
pub struct Device {
    context: Arc<Context>,
}

impl Device {
    /// This machine's cores: `threads` of them (0: all), with the instructions that `SPARSAM_SIMD` allows.
    ///
    /// # Errors
    /// [`Error::Device`] if `SPARSAM_SIMD` asks for what the machine lacks.
    pub fn cpu(threads: usize) -> Result<Device, Error> {
        Ok(Device::cpu_with(threads, Cpu::from_env().map_err(Error::Device)?))
    }

    /// This machine's cores with the instructions `cpu`, one of [`Cpu::all`].
    ///
    /// # Panics
    /// If the machine lacks the instructions.
    pub fn cpu_with(threads: usize, cpu: Cpu) -> Device {
        Device { context: Arc::new(Context::new(threads, cpu)) }
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.context.pool().threads()
    }

    /// Instructions in use.
    pub fn cpu_features(&self) -> Cpu {
        self.context.cpu()
    }

    /// Bytes per second that all threads together read from memory, measured now (a tenth of a second).
    pub fn read_bandwidth(&self) -> f64 {
        roof::read_bandwidth(&self.context)
    }

    /// Operations per second of all threads together out of registers, measured now (a tenth of a second).
    pub fn peak(&self, kind: Arithmetic) -> f64 {
        roof::peak(&self.context, kind)
    }

    /// Bytes of weights per second that one row of activations of 8 bits is multiplied with, where matrices of `shapes`
    /// (rows and columns) are stored as `dtype`, measured now (some tenth of a second).
    ///
    /// # Errors
    /// [`Error::Device`] if the type's blocks do not divide the rows, or there is no matrix.
    pub fn product_rate(&self, dtype: DType, shapes: &[[usize; 2]]) -> Result<f64, Error> {
        roof::product_rate(&self.context, dtype, shapes).map_err(Error::Device)
    }

    pub(crate) fn context(&self) -> &Context {
        &self.context
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cpu {} x{}", self.cpu_features(), self.threads())
    }
}
