//! Several processes that run the same programs, each on numbers of its own, and sum some of their results over all.
//!
//! How sums cross the machine or the network is not this crate's matter: a [`Group`] is given to a session (MPI's, by the
//! command line's feature `mpi`).

/// The processes that run together. Every call is made by all of them, in the same order, with slices of the same length;
/// one call of a process at a time, though not always from the same thread.
pub trait Group: Send + Sync {
    /// Which process this is, from 0.
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
