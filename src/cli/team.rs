//! The processes that train together.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::assemble::Opened;
use crate::backend::cuda::Device;
use crate::backend::cuda::libraries::Library;
use crate::error::{Error, Result};
use crate::parallel::{Collective, ID_BYTES, Nccl, Single};

/// How long processes wait for each other to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where `mpirun` leaves the number of processes.
const MPI_WORLD: [&str; 2] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];

/// A number that a launcher left in the environment, under the first of these names.
fn told(names: &[&str]) -> Option<usize> {
    names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok())
}

/// The number of this process among those of its machine.
pub(crate) fn local_rank() -> Option<usize> {
    told(&["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"])
}

/// Joins the processes that were started with this one; one alone where none were.
///
/// # Errors
/// Several processes that this build, or this device, has no engine for.
pub(crate) fn join(device: &Opened) -> Result<Arc<dyn Collective>> {
    match device {
        Opened::Cpu(_) => match told(&MPI_WORLD).unwrap_or(1) {
            1 => Ok(Arc::new(Single)),
            world => over_mpi(world),
        },
        Opened::Cuda(backend) => over_nccl(backend.device()),
        Opened::CudaBf16(backend) => over_nccl(backend.device()),
        Opened::CudaF16(backend) => over_nccl(backend.device()),
    }
}

/// GPUs; one alone too, where a launcher says that it is one of one.
fn over_nccl(device: &Arc<Device>) -> Result<Arc<dyn Collective>> {
    let Some(world) = told(&["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"]) else { return Ok(Arc::new(Single)) };
    if cfg!(feature = "mpi") && told(&MPI_WORLD).is_some() && !Library::Nccl.is_present() {
        eprintln!("NCCL was not found: GPUs exchange gradients by MPI, through the host; `warpstep doctor` tells more");
        return over_mpi(world);
    }
    let rank = told(&["RANK", "OMPI_COMM_WORLD_RANK"]).filter(|&rank| rank < world);
    let rank = rank.ok_or_else(|| Error::Device(format!("WORLD_SIZE is {world}; expected RANK, a number below it")))?;
    let own = if rank == 0 { Nccl::unique_id()? } else { [0; ID_BYTES] };
    let id = share_id(own, rank, world)?;
    Ok(Arc::new(Nccl::join(device, &id, rank, world)?))
}

/// The id of process 0, in all.
fn share_id(id: [u8; ID_BYTES], rank: usize, world: usize) -> Result<[u8; ID_BYTES]> {
    if world == 1 {
        return Ok(id);
    }
    let host = std::env::var("MASTER_ADDR").unwrap_or_else(|_| "127.0.0.1".into());
    let port = told(&["MASTER_PORT"]).and_then(|port| u16::try_from(port).ok()).unwrap_or(29500);
    let place = format!("{host}:{port}");
    let failed = |action, error| Error::io(action, place.as_str(), error);
    let until = Instant::now() + PATIENCE;
    if rank == 0 {
        let listener = TcpListener::bind(&place).map_err(|error| failed("listen at", error))?;
        listener.set_nonblocking(true).map_err(|error| failed("listen at", error))?;
        for _ in 1..world {
            let mut process = again(until, || listener.accept().map(|(process, _)| process))
                .map_err(|error| failed("wait for all processes at", error))?;
            process.write_all(&id).map_err(|error| failed("send NCCL's id from", error))?;
        }
        return Ok(id);
    }
    let address = (host.as_str(), port).to_socket_addrs().map_err(|error| failed("find", error))?.next();
    let address = address.ok_or_else(|| failed("find", ErrorKind::NotFound.into()))?;
    let mut first = again(until, || TcpStream::connect_timeout(&address, PATIENCE))
        .map_err(|error| failed("reach process 0 at", error))?;
    let mut id = id;
    let read = first.set_read_timeout(Some(PATIENCE)).and_then(|()| first.read_exact(&mut id));
    read.map_err(|error| failed("read NCCL's id from", error))?;
    Ok(id)
}

/// Tries until it works, or time is up.
fn again<T>(until: Instant, mut attempt: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    loop {
        match attempt() {
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionRefused)
                    && Instant::now() < until =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            done => return done,
        }
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
