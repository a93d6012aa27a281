//! The processes that train together.

use std::sync::Arc;

use super::assemble::Opened;
use crate::error::{Error, Result};
use crate::parallel::{Collective, Single};

/// The number of this process among those that were started with it, and how many they are.
pub(crate) fn place() -> (usize, usize) {
    let told = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<usize>().ok());
    let of = |rank, world| Some((told(rank)?, told(world)?)).filter(|(rank, world)| rank < world);
    of("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE").or_else(|| of("PMI_RANK", "PMI_SIZE")).unwrap_or((0, 1))
}

/// Joins the processes that were started with this one; one alone where none were.
///
/// # Errors
/// Several processes that this build, or this device, has no engine for.
pub(crate) fn join(device: &Opened) -> Result<Arc<dyn Collective>> {
    let (_, world) = place();
    if world == 1 {
        return Ok(Arc::new(Single));
    }
    match device {
        Opened::Cpu(_) => over_mpi(world),
        _ => Err(Error::Device("several GPUs are not joined yet".into())),
    }
}

#[cfg(feature = "mpi")]
fn over_mpi(_: usize) -> Result<Arc<dyn Collective>> {
    Ok(Arc::new(crate::parallel::Mpi::join()?))
}

#[cfg(not(feature = "mpi"))]
fn over_mpi(world: usize) -> Result<Arc<dyn Collective>> {
    Err(Error::Device(format!(
        "{world} processes were started, but this Warpstep was built without MPI, by which processes on CPUs speak: build it with \
         `cargo build --release --features mpi` where Open MPI or MPICH is installed"
    )))
}
