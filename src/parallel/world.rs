//! Who this process is among those that train together, as whatever started it says in environment variables.
//!
//! The first of these that is there counts:
//!
//! 1. `warpstep launch`: `WARPSTEP_RANK`, `WARPSTEP_WORLD_SIZE`, `WARPSTEP_LOCAL_RANK`, `WARPSTEP_LOCAL_WORLD_SIZE`
//! 2. torchrun: `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`
//! 3. Open MPI's mpirun: `OMPI_COMM_WORLD_RANK`, `_SIZE`, `_LOCAL_RANK`, `_LOCAL_SIZE`
//! 4. MPICH's and Intel's mpiexec: `PMI_RANK`, `PMI_SIZE`, `MPI_LOCALRANKID`, `MPI_LOCALNRANKS`
//! 5. srun, within a step alone: `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS` (or `SLURM_NTASKS`), `SLURM_LOCALID`
//! 6. Kubernetes, as Kubeflow or an indexed job sets it: `RANK` (or `JOB_COMPLETION_INDEX`), `WORLD_SIZE`
//!
//! None of them: a world of one.
//!
//! Where rank 0 awaits the others: at `WARPSTEP_ADDRESS`, or `MASTER_ADDR`, or the first host of a Slurm step, or this machine
//! where Open MPI started all on one; at port `WARPSTEP_PORT`, or `MASTER_PORT + 1` (torchrun itself holds `MASTER_PORT`), or one
//! from 20000 to 29999 that the job's number gives. Under MPI there may be none: MPI then tells it.

mod slurm;
mod variables;

use std::fmt;
use std::time::Duration;

use super::rendezvous::Endpoint;
use crate::error::{Error, Result};
use variables::Variables;

/// What started a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// A person, or a program that knows no ranks.
    Alone,
    /// `warpstep launch`.
    Warpstep,
    /// PyTorch's.
    Torchrun,
    /// Open MPI's mpirun.
    OpenMpi,
    /// The mpiexec of MPICH, or of those that derive from it.
    Mpich,
    /// srun.
    Slurm,
    /// An operator or a job of Kubernetes.
    Kubernetes,
}

impl Launcher {
    /// Whether MPI connects what it starts, so that no other address is needed.
    fn is_mpi(self) -> bool {
        matches!(self, Launcher::OpenMpi | Launcher::Mpich)
    }
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Launcher::Alone => "no launcher",
            Launcher::Warpstep => "warpstep launch",
            Launcher::Torchrun => "torchrun",
            Launcher::OpenMpi => "Open MPI",
            Launcher::Mpich => "MPICH",
            Launcher::Slurm => "srun",
            Launcher::Kubernetes => "Kubernetes",
        })
    }
}

/// Who this process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    /// The number of this process, from 0.
    pub rank: usize,
    /// How many processes there are.
    pub size: usize,
    /// The number of this process among those of its machine: that of its GPU.
    pub local_rank: usize,
    /// How many processes this machine has.
    pub local_size: usize,
    /// The name of this machine.
    pub host: String,
    /// What started it.
    pub how: Launcher,
    /// Where rank 0 awaits the others; none in a world of one, and where only MPI can tell.
    pub rendezvous: Option<Endpoint>,
    /// Tells this run from others at the same address; empty where the launcher gives no such name.
    pub run: String,
    /// `WARPSTEP_TIMEOUT`: how long a rank may be silent or stuck until the others stop.
    pub timeout: Option<Duration>,
}

impl World {
    /// Reads the environment of this process.
    ///
    /// # Errors
    /// Variables that are incomplete or contradict each other.
    pub fn detect() -> Result<Self> {
        World::read(&host_name(), &|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    /// Reads variables by `lookup`, on a machine of this name.
    ///
    /// # Errors
    /// Variables that are incomplete or contradict each other: the variable, what was found, what was expected.
    pub fn read(host: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let vars = Variables(lookup);
        let timeout = vars.seconds("WARPSTEP_TIMEOUT")?;
        let Some(found) = find(&vars)? else {
            return Ok(World {
                rank: 0,
                size: 1,
                local_rank: 0,
                local_size: 1,
                host: host.to_owned(),
                how: Launcher::Alone,
                rendezvous: None,
                run: String::new(),
                timeout,
            });
        };
        let Found { how, rank, size, local_rank, local_size } = found;
        let run = run_name(&vars, how);
        let one_machine = local_size == size;
        let rendezvous = if size == 1 { None } else { rendezvous(&vars, how, one_machine, &run)? };
        Ok(World { rank, size, local_rank, local_size, host: host.to_owned(), how, rendezvous, run, timeout })
    }
}

/// The name of this machine.
pub fn host_name() -> String {
    let mut name = [0u8; 256];
    // SAFETY: the system writes at most as many bytes as it is told that there is room for.
    let status = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) };
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    if status == 0 && end > 0 { String::from_utf8_lossy(&name[..end]).into_owned() } else { "localhost".into() }
}

/// What one launcher says.
struct Found {
    how: Launcher,
    rank: usize,
    size: usize,
    local_rank: usize,
    local_size: usize,
}

/// The names by which one launcher says it.
struct Names<'a> {
    how: Launcher,
    rank: &'a str,
    size: &'a str,
    local_rank: &'a str,
    local_size: &'a str,
}

/// Kubernetes comes last though its names are torchrun's: a pod sets them for all that runs in it, an mpirun too.
fn find(vars: &Variables<'_>) -> Result<Option<Found>> {
    let ours = Names {
        how: Launcher::Warpstep,
        rank: "WARPSTEP_RANK",
        size: "WARPSTEP_WORLD_SIZE",
        local_rank: "WARPSTEP_LOCAL_RANK",
        local_size: "WARPSTEP_LOCAL_WORLD_SIZE",
    };
    let torchrun = Names {
        how: Launcher::Torchrun,
        rank: "RANK",
        size: "WORLD_SIZE",
        local_rank: "LOCAL_RANK",
        local_size: "LOCAL_WORLD_SIZE",
    };
    let open_mpi = Names {
        how: Launcher::OpenMpi,
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
    };
    let mpich = Names {
        how: Launcher::Mpich,
        rank: "PMI_RANK",
        size: "PMI_SIZE",
        local_rank: "MPI_LOCALRANKID",
        local_size: "MPI_LOCALNRANKS",
    };
    if let Some(found) = ours.read(vars)? {
        return Ok(Some(found));
    }
    if vars.has("LOCAL_RANK")
        && let Some(found) = torchrun.read(vars)?
    {
        return Ok(Some(found));
    }
    if let Some(found) = open_mpi.read(vars)? {
        return Ok(Some(found));
    }
    let step = slurm::read(vars)?;
    if let Some(found) = mpich.read(vars)? {
        // srun speaks MPICH's protocol too, and then says the same twice; its own words tell more.
        let same = step.as_ref().is_some_and(|step| (step.rank, step.size) == (found.rank, found.size));
        return Ok(if same { step } else { Some(found) });
    }
    if step.is_some() {
        return Ok(step);
    }
    let index = !vars.has("RANK") && vars.has("JOB_COMPLETION_INDEX");
    if index && !vars.has("WORLD_SIZE") {
        // Every indexed job numbers its pods; they are a world only where something says how large.
        return Ok(None);
    }
    let rank = if index { "JOB_COMPLETION_INDEX" } else { "RANK" };
    Names { how: Launcher::Kubernetes, rank, ..torchrun }.read(vars)
}

impl Names<'_> {
    /// None where neither rank nor size is there.
    fn read(&self, vars: &Variables<'_>) -> Result<Option<Found>> {
        let (rank, size) = match (vars.number(self.rank)?, vars.number(self.size)?) {
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(variables::missing(self.size, self.rank)),
            (None, Some(_)) => return Err(variables::missing(self.rank, self.size)),
            (Some(rank), Some(size)) => (rank, size),
        };
        let local_rank = vars.number(self.local_rank)?;
        let local_size = vars.number(self.local_size)?;
        if size == 0 {
            return Err(variables::wrong(self.size, "0", "1 or more"));
        }
        below(self.rank, rank, self.size, size)?;
        if let (Some(rank), Some(size)) = (local_rank, local_size) {
            below(self.local_rank, rank, self.local_size, size)?;
        }
        if let Some(local_size) = local_size
            && !(1..=size).contains(&local_size)
        {
            let expected = format!("a number from 1 to {} = {size}", self.size);
            return Err(variables::wrong(self.local_size, &local_size.to_string(), &expected));
        }
        let local_rank = local_rank.unwrap_or(0);
        below(self.local_rank, local_rank, self.size, size)?;
        // A launcher that tells no local size starts one process a machine, or has the lower ones beside this one.
        let local_size = local_size.unwrap_or(local_rank + 1);
        Ok(Some(Found { how: self.how, rank, size, local_rank, local_size }))
    }
}

fn below(rank_name: &str, rank: usize, size_name: &str, size: usize) -> Result<()> {
    if rank < size {
        return Ok(());
    }
    Err(variables::wrong(rank_name, &rank.to_string(), &format!("a number below {size_name} = {size}")))
}

/// The launcher's own name of the run.
fn run_name(vars: &Variables<'_>, how: Launcher) -> String {
    if let Some(name) = vars.text("WARPSTEP_RUN") {
        return name;
    }
    let names: &[&str] = match how {
        Launcher::Torchrun => &["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"],
        Launcher::OpenMpi => &["PMIX_NAMESPACE"],
        Launcher::Slurm => &["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"],
        Launcher::Alone | Launcher::Warpstep | Launcher::Mpich | Launcher::Kubernetes => &[],
    };
    let parts: Vec<String> = names.iter().filter_map(|name| vars.text(name)).collect();
    parts.join(".")
}

/// Where rank 0 awaits the others.
fn rendezvous(vars: &Variables<'_>, how: Launcher, one_machine: bool, run: &str) -> Result<Option<Endpoint>> {
    let port = match (vars.port("WARPSTEP_PORT")?, vars.port("MASTER_PORT")?) {
        (Some(port), _) => Some(port),
        (None, Some(u16::MAX)) => return Err(variables::wrong("MASTER_PORT", "65535", "a port that has one after it")),
        (None, Some(port)) => Some(port + 1),
        (None, None) if matches!(how, Launcher::Slurm | Launcher::OpenMpi) && !run.is_empty() => Some(port_of(run)),
        (None, None) => None,
    };
    let named = vars.text("WARPSTEP_ADDRESS").or_else(|| vars.text("MASTER_ADDR"));
    let host = match named {
        Some(host) => Some(host),
        None if how == Launcher::Slurm => slurm::first_host(vars)?,
        None if how == Launcher::OpenMpi && one_machine => Some("127.0.0.1".into()),
        None => None,
    };
    match (host, port) {
        (Some(host), Some(port)) => Ok(Some(Endpoint::new(&host, port))),
        _ if how.is_mpi() => Ok(None),
        (None, _) => Err(Error::config(
            "environment variable MASTER_ADDR",
            format!("is not set, but {how} started several processes; expected the address of rank 0"),
        )),
        (Some(_), None) => Err(Error::config(
            "environment variable MASTER_PORT",
            format!("is not set, but {how} started several processes; expected a port of rank 0 (or WARPSTEP_PORT)"),
        )),
    }
}

/// A port from 20000 to 29999, below those that systems give out by themselves, for a job of this name.
fn port_of(run: &str) -> u16 {
    let hash = blake3::hash(run.as_bytes());
    20_000 + u16::from_le_bytes([hash.as_bytes()[0], hash.as_bytes()[1]]) % 10_000
}
