//! The processes that train together.

use std::sync::Arc;

use super::assemble::Opened;
use crate::backend::cuda::Device;
use crate::backend::cuda::libraries::Library;
use crate::error::{Error, Result};
use crate::parallel::rendezvous::Rendezvous;
use crate::parallel::watch::TIMEOUT;
use crate::parallel::world::{Launcher, World};
use crate::parallel::{Collective, ID_BYTES, Nccl, Single};

/// The number of this process among those of its machine; none where nothing started several.
///
/// # Errors
/// Variables of a launcher that are incomplete.
pub(crate) fn local_rank() -> Result<Option<usize>> {
    let world = World::detect()?;
    Ok((world.how != Launcher::Alone).then_some(world.local_rank))
}

/// The number of this process among those that were started with it, and how many they are.
///
/// # Errors
/// Variables of a launcher that are incomplete.
pub(crate) fn place() -> Result<(usize, usize)> {
    let world = World::detect()?;
    Ok((world.rank, world.size))
}

/// Joins the processes that were started with this one; one alone where none were.
///
/// # Errors
/// Several processes that this build, or this device, has no engine for.
pub(crate) fn join(device: &Opened) -> Result<Arc<dyn Collective>> {
    let world = World::detect()?;
    match device {
        Opened::Cpu(_) if world.size > 1 => over_mpi(&world),
        Opened::Cpu(_) => Ok(Arc::new(Single)),
        Opened::Cuda(backend) => join_gpu(&world, backend.device()),
        Opened::CudaBf16(backend) => join_gpu(&world, backend.device()),
        Opened::CudaF16(backend) => join_gpu(&world, backend.device()),
    }
}

/// Joins a GPU with the others; one alone too, where a launcher says that it is one of one.
fn join_gpu(world: &World, device: &Arc<Device>) -> Result<Arc<dyn Collective>> {
    if world.how == Launcher::Alone {
        return Ok(Arc::new(Single));
    }
    let mpi = cfg!(feature = "mpi") && matches!(world.how, Launcher::OpenMpi | Launcher::Mpich);
    if mpi && !Library::Nccl.is_present() {
        eprintln!("NCCL was not found: GPUs exchange gradients by MPI, through the host; `warpstep doctor` tells more");
        return over_mpi(world);
    }
    let mut id = if world.rank == 0 { Nccl::unique_id()?.to_vec() } else { Vec::new() };
    if world.size > 1 {
        let at = world.rendezvous.as_ref().ok_or_else(|| {
            Error::Network(format!(
                "{} processes were started by {}, which does not tell where rank 0 is: set WARPSTEP_ADDRESS and WARPSTEP_PORT to \
                 an address of its machine and a free port there",
                world.size, world.how
            ))
        })?;
        Rendezvous::join(world, at, world.timeout.unwrap_or(TIMEOUT))?.broadcast(&mut id)?;
    }
    let id: [u8; ID_BYTES] = id.try_into().map_err(|id: Vec<u8>| {
        Error::Network(format!("rank 0 sent {} bytes; expected an id of NCCL, {ID_BYTES} bytes", id.len()))
    })?;
    Ok(Arc::new(Nccl::join(device, &id, world.rank, world.size)?))
}

#[cfg(feature = "mpi")]
fn over_mpi(world: &World) -> Result<Arc<dyn Collective>> {
    let mpi = crate::parallel::Mpi::join()?;
    if mpi.world() != world.size {
        return Err(Error::Device(format!(
            "{} processes were started by {}, of which MPI knows {}: start processes on CPUs by mpirun, or by what else starts \
             programs of this MPI",
            world.size,
            world.how,
            mpi.world()
        )));
    }
    Ok(Arc::new(mpi))
}

#[cfg(not(feature = "mpi"))]
fn over_mpi(world: &World) -> Result<Arc<dyn Collective>> {
    Err(Error::Device(format!(
        "{} processes were started, but this Warpstep was built without MPI, by which processes on CPUs speak: build it with \
         `cargo build --release --features mpi` where Open MPI or MPICH is installed",
        world.size
    )))
}
