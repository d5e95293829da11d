//! Training by many processes over MPI: the library of the machine, by the crate `mpi`.

use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives};
use sparsam_train::group::Group;

/// All processes that the launcher started.
pub struct Processes {
    world: SimpleCommunicator,
}

/// The processes that a launcher started this one with, and MPI itself, which ends when it is dropped: behind everything
/// else, for [`abort`] needs it. `None` if no launcher did.
///
/// # Errors
/// If MPI cannot be initialised.
pub fn group() -> anyhow::Result<Option<(Universe, Processes)>> {
    if crate::train::launched_by().is_none() {
        return Ok(None);
    }
    // The threads of the kernels never call MPI.
    let threading = mpi::Threading::Funneled;
    let Some((universe, _)) = mpi::initialize_with_threading(threading) else {
        anyhow::bail!("MPI is initialised already");
    };
    let world = universe.world();
    Ok(Some((universe, Processes { world })))
}

/// Says what went wrong and ends all processes.
pub fn abort(e: &anyhow::Error) -> ! {
    eprintln!("error: {e:#}");
    SimpleCommunicator::world().abort(1)
}

impl Group for Processes {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn sum(&self, values: &mut [f32]) {
        let own = values.to_vec();
        self.world.all_reduce_into(&own[..], values, SystemOperation::sum());
    }

    fn sum_counts(&self, values: &mut [u64]) {
        let own = values.to_vec();
        self.world.all_reduce_into(&own[..], values, SystemOperation::sum());
    }
}
