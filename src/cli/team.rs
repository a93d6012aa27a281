//! The processes that train together: who they are, the engine that joins them, and the watch over them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::assemble::Opened;
use crate::backend::cuda::Device;
use crate::backend::cuda::libraries::Library;
use crate::error::{Error, Result};
use crate::parallel::rendezvous::Rendezvous;
#[cfg(feature = "mpi")]
use crate::parallel::rendezvous::{Endpoint, Listener};
use crate::parallel::watch::{Handler, Told, Watch, WatchOptions};
use crate::parallel::world::{Launcher, World};
use crate::parallel::{Collective, ID_BYTES, Nccl, Single, Watched};
#[cfg(feature = "mpi")]
use crate::parallel::{Mpi, broadcast};
use crate::tell::tell;

/// How long the cause of a failed exchange is waited for.
const CAUSE: Duration = Duration::from_secs(5);

/// This process among those that train together.
pub(crate) struct Team {
    /// What they do together.
    pub collective: Arc<dyn Collective>,
    /// The watch over the others; none over one process alone.
    pub watch: Option<Arc<Watch>>,
}

/// What a watch is told besides who the processes are.
pub(crate) struct Vigil {
    /// `parallel.timeout`, where the launcher does not say another.
    pub timeout: Duration,
    /// The file that a failure is added to.
    pub log: PathBuf,
}

impl Team {
    /// Joins the processes that were started with this one; one alone where none were.
    ///
    /// # Errors
    /// Several processes that this build, or this device, has no engine for, or that do not find each other.
    pub fn join(world: &World, device: &Opened, vigil: Vigil) -> Result<Self> {
        let timeout = world.timeout.unwrap_or(vigil.timeout);
        let (collective, rendezvous) = match device {
            Opened::Cpu(_) if world.size == 1 => (Arc::new(Single) as Arc<dyn Collective>, None),
            Opened::Cpu(_) => over_mpi(world, timeout)?,
            Opened::Cuda(backend) => over_nccl(world, backend.device(), timeout)?,
            Opened::CudaBf16(backend) => over_nccl(world, backend.device(), timeout)?,
            Opened::CudaF16(backend) => over_nccl(world, backend.device(), timeout)?,
        };
        let Some(rendezvous) = rendezvous else { return Ok(Team { collective, watch: None }) };
        let options =
            WatchOptions { log: Some(vigil.log), on_failure: aborts(&collective), ..WatchOptions::new(timeout) };
        let watch = Arc::new(Watch::start(rendezvous, &world.host, options)?);
        if let Some(device) = device.gpu() {
            // Sums stand within the device's work: a process that waits for its device waits for others.
            let told = Arc::downgrade(&watch);
            device.around_waits(move |wait| {
                let watch = told.upgrade();
                let _waits = watch.as_ref().map(|watch| watch.communicating());
                wait()
            });
        }
        let collective = Arc::new(Watched::new(collective, Arc::clone(&watch)));
        Ok(Team { collective, watch: Some(watch) })
    }

    /// Ends the work of this process well, or after an error that all processes know of.
    pub fn goodbye(self) {
        let Team { collective, watch } = self;
        let Some(watch) = watch else { return };
        // What is left last goes when this returns.
        if !collective.is_left_last() {
            // Engines leave together: what one process fails at meanwhile, the watch still tells the others.
            let _waits = watch.communicating();
            drop(collective);
        }
        watch.goodbye();
    }

    /// After an exchange that failed: gives the watch time to see whether another process is at fault, which it may hear of later.
    pub fn await_cause(&self) {
        if let Some(watch) = &self.watch {
            watch.failed_within(CAUSE);
        }
    }

    /// Ends it after an error of its own, which stops all others too. Gives back whether the error is still to be printed.
    pub fn fail(self, text: &str) -> bool {
        let Team { collective, watch } = self;
        // Its end would wait for processes that are being stopped.
        std::mem::forget(collective);
        match watch {
            Some(watch) => watch.fail(text) == Told::Nobody,
            None => true,
        }
    }
}

/// Gives up what the engine does, where it is still there: the watch keeps none alive, or its end would come after the watch's.
fn aborts(collective: &Arc<dyn Collective>) -> Handler {
    let aborted = Arc::downgrade(collective);
    Box::new(move |_| {
        if let Some(aborted) = aborted.upgrade() {
            aborted.abort();
        }
    })
}

/// An engine, and where its processes met.
type Joined = (Arc<dyn Collective>, Option<Rendezvous>);

/// GPUs; one alone too, where a launcher says that it is one of one.
fn over_nccl(world: &World, device: &Arc<Device>, timeout: Duration) -> Result<Joined> {
    if world.size == 1 && (world.how == Launcher::Alone || !Library::Nccl.is_present()) {
        return Ok((Arc::new(Single), None));
    }
    let by_mpi = matches!(world.how, Launcher::OpenMpi | Launcher::Mpich);
    if cfg!(feature = "mpi") && by_mpi && !Library::Nccl.is_present() {
        if world.rank == 0 {
            tell("NCCL was not found: GPUs exchange gradients by MPI, through the host; `warpstep doctor` tells more");
        }
        return over_mpi(world, timeout);
    }
    let mut rendezvous = match &world.rendezvous {
        _ if world.size == 1 => None,
        Some(at) => Some(Rendezvous::join(world, at, timeout)?),
        None => Some(met_by_mpi(world, timeout)?),
    };
    let prepared = Nccl::prepare(device).and_then(|prepared| {
        let id = if world.rank == 0 { Nccl::unique_id()?.to_vec() } else { Vec::new() };
        Ok((prepared, id))
    });
    if let Some(rendezvous) = &mut rendezvous {
        // A process that does not come would leave the others in the library, where nobody watches them.
        rendezvous.all_ready(prepared.as_ref().err())?;
    }
    let (prepared, mut id) = prepared?;
    if let Some(rendezvous) = &mut rendezvous {
        rendezvous.broadcast(&mut id)?;
    }
    let id: [u8; ID_BYTES] = id
        .try_into()
        .map_err(|id: Vec<u8>| Error::Network(format!("NCCL's id has {} bytes, expected {ID_BYTES}", id.len())))?;
    Ok((Arc::new(prepared.join(&id, world.rank, world.size)?), rendezvous))
}

#[cfg(feature = "mpi")]
fn over_mpi(world: &World, timeout: Duration) -> Result<Joined> {
    if !matches!(world.how, Launcher::OpenMpi | Launcher::Mpich | Launcher::Slurm) {
        return Err(said_once(
            world,
            Error::config(
                "run.device",
                format!(
                    "{} started {} processes on CPUs, which speak MPI; expected mpirun, `warpstep launch --cpus {}`, or srun --mpi=pmix",
                    world.how, world.size, world.size
                ),
            ),
        ));
    }
    let mpi = join_mpi(world)?;
    let rendezvous = match &world.rendezvous {
        Some(at) => Rendezvous::join(world, at, timeout)?,
        None => met_over_mpi(world, &mpi, timeout)?,
    };
    Ok((Arc::new(mpi), Some(rendezvous)))
}

#[cfg(feature = "mpi")]
fn join_mpi(world: &World) -> Result<Mpi> {
    let mpi = Mpi::join()?;
    if mpi.world() == world.size {
        return Ok(mpi);
    }
    let expected = match world.how {
        Launcher::Slurm => "expected srun --mpi=pmix, or another kind that `srun --mpi=list` names and this MPI speaks",
        _ => "is this the mpirun of the MPI that Warpstep was built with?",
    };
    Err(said_once(
        world,
        Error::Device(format!(
            "{} started {} processes, and MPI joined {} of them: {expected}",
            world.how,
            world.size,
            mpi.world()
        )),
    ))
}

/// Processes that exchange nothing else by MPI: it ends when they have met.
#[cfg(feature = "mpi")]
fn met_by_mpi(world: &World, timeout: Duration) -> Result<Rendezvous> {
    met_over_mpi(world, &join_mpi(world)?, timeout)
}

#[cfg(not(feature = "mpi"))]
fn met_by_mpi(world: &World, _: Duration) -> Result<Rendezvous> {
    Err(said_once(
        world,
        Error::config(
            "environment variable MASTER_ADDR",
            format!(
                "is not set, but {} started several processes; expected the address of rank 0, and a port of it in MASTER_PORT (by the \
                 feature `mpi` Warpstep would ask MPI)",
                world.how
            ),
        ),
    ))
}

/// Where only MPI knows the others, it tells them where rank 0 listens.
#[cfg(feature = "mpi")]
fn met_over_mpi(world: &World, mpi: &Mpi, timeout: Duration) -> Result<Rendezvous> {
    let listener = if world.rank == 0 { Some(Listener::anywhere()?) } else { None };
    let mut place = match &listener {
        Some(listener) => format!("{}:{}", world.host, listener.port()?).into_bytes(),
        None => Vec::new(),
    };
    broadcast(mpi, 0, &mut place)?;
    if let Some(listener) = listener {
        return Rendezvous::host(world, listener, timeout);
    }
    let place: Endpoint = String::from_utf8_lossy(&place).parse()?;
    let host = if place.host == world.host { "127.0.0.1" } else { &place.host };
    Rendezvous::join(world, &Endpoint::new(host, place.port), timeout)
}

/// An error that every process finds by itself: the first one says it.
pub(crate) fn said_once(world: &World, error: Error) -> Error {
    match world.rank {
        0 => error,
        _ => Error::Peer { rank: 0, exit_code: error.exit_code(), problem: error.to_string() },
    }
}

#[cfg(not(feature = "mpi"))]
fn over_mpi(world: &World, _: Duration) -> Result<Joined> {
    Err(said_once(
        world,
        Error::Device(format!(
            "{} started {} processes, but this Warpstep was built without MPI, by which processes on CPUs speak: build it with \
         `cargo build --release --features mpi` where Open MPI or MPICH is installed",
            world.how, world.size
        )),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::watch::{Cause, Failure};

    #[test]
    fn what_gives_an_engine_up_does_not_keep_it_until_the_watch_has_ended() {
        let engine: Arc<dyn Collective> = Arc::new(Single);
        let (abort, held) = (aborts(&engine), Arc::downgrade(&engine));
        drop(engine);
        assert!(held.upgrade().is_none(), "its end would come with the watch's");
        // There is nothing to give up any more.
        abort(&Failure { ranks: Vec::new(), cause: Cause::Died, step: 1, others: 1 });
    }
}
