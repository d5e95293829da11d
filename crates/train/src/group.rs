//! Several processes that train one model together: each learns from rows of its own, and the gradients are summed over all
//! before the optimiser steps, so that every process takes the same step.
//!
//! How sums cross the machine or the network is not this crate's matter: a [`Group`] is given to it (MPI's, by the command
//! line's feature `mpi`).

/// The processes of a run. Every call is made by all of them, in the same order, with slices of the same length.
pub trait Group {
    /// Which process this is, from 0. Process 0 writes the run's folder.
    fn rank(&self) -> usize;
    /// How many processes there are.
    fn size(&self) -> usize;
    /// Replaces each number by its sum over all processes, the same bits on all.
    fn sum(&self, values: &mut [f32]);
    /// The same for counts.
    fn sum_counts(&self, values: &mut [u64]);
}

/// One process by itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Group for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum(&self, _: &mut [f32]) {}

    fn sum_counts(&self, _: &mut [u64]) {}
}
