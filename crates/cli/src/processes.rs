//! Training by many processes over MPI: the library of the machine, by the crate `mpi`.

use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Equivalence};
use sparsam_runtime::Group;
use std::sync::{Mutex, PoisonError};

/// All processes that the launcher started.
pub struct Processes {
    rank: usize,
    size: usize,
    /// Held by the thread that calls MPI: one at a time.
    calls: Mutex<()>,
}

/// The processes that a launcher started this one with, and MPI itself, which ends when it is dropped: behind everything
/// else, for [`abort`] needs it. `None` if no launcher did.
///
/// # Errors
/// If MPI cannot be initialised, or cannot be called from more than one thread.
pub fn group() -> anyhow::Result<Option<(Universe, Processes)>> {
    if crate::train::launched_by().is_none() {
        return Ok(None);
    }
    // Gradients are summed by a thread of their own, counts by this one.
    let Some((universe, level)) = mpi::initialize_with_threading(Threading::Serialized) else {
        anyhow::bail!("MPI is initialised already");
    };
    if level < Threading::Serialized {
        anyhow::bail!(
            "this MPI library lets only one thread call it ({level:?}); take one with MPI_THREAD_SERIALIZED, as Open MPI has"
        );
    }
    let world = universe.world();
    let processes =
        Processes { rank: world.rank() as usize, size: world.size() as usize, calls: Mutex::new(()) };
    Ok(Some((universe, processes)))
}

/// Says what went wrong and ends all processes.
pub fn abort(e: &anyhow::Error) -> ! {
    eprintln!("error: {e:#}");
    SimpleCommunicator::world().abort(1)
}

impl Processes {
    fn all_reduce<T: Equivalence + Clone>(&self, values: &mut [T]) {
        let own = values.to_vec();
        let _one_at_a_time = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        // Not kept: a communicator belongs to no thread but has no way to say so.
        SimpleCommunicator::world().all_reduce_into(&own[..], values, SystemOperation::sum());
    }
}

impl Group for Processes {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sum(&self, values: &mut [f32]) {
        self.all_reduce(values);
    }

    fn sum_counts(&self, values: &mut [u64]) {
        self.all_reduce(values);
    }
}
