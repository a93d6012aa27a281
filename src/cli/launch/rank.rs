//! `warpstep launch-rank`: what mpirun starts for each rank. It keeps the outputs apart, and tells the launcher which process the
//! rank is and how it ended.

use std::ffi::OsString;
use std::os::unix::process::{ExitStatusExt, parent_id};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;
use signal_hook::consts::{SIGINT, SIGKILL, SIGTERM};

use super::{control, exit_code, job, outputs};
use crate::error::Error;
use crate::parallel::world::World;

/// Options of `launch-rank`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Folder of outputs
    #[arg(long)]
    logs: PathBuf,
    /// Folder in which the launcher looks for word of this rank
    #[arg(long)]
    control: PathBuf,
    /// What to start
    #[arg(long)]
    program: PathBuf,
    /// Its arguments
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// Runs the program to its end.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let rank = World::detect()?.rank;
    // Should mpirun be killed, nobody else would end this process.
    job::bind_to(parent_id(), SIGKILL).map_err(|e| Error::io("follow", "mpirun", e))?;
    let mut command = Command::new(&options.program);
    command.args(&options.arguments).stdin(Stdio::null());
    if rank > 0 {
        let [out, err] = outputs::open(&options.logs, rank)?;
        command.stdout(out).stderr(err);
    }
    job::die_with_parent(&mut command, SIGKILL);
    // mpirun's signals reach the program too; this process ends after it, to tell how it ended.
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))
            .map_err(|e| Error::io("listen to", "signals", e))?;
    }
    let mut child = command.spawn().map_err(|e| Error::io("start", &options.program, e))?;
    control::write_pid(&options.control, rank, child.id())?;
    let status = child.wait().map_err(|e| Error::io("wait for", &options.program, e))?;
    control::write_status(&options.control, rank, status)?;
    // A rank that ended by the user's signal is no failure, for which mpirun would kill those that still write.
    let by_the_user = [SIGINT, SIGTERM].iter().any(|signal| status.code() == Some(128 + signal));
    let code = if by_the_user && status.signal().is_none() { 0 } else { exit_code(status) };
    Ok(ExitCode::from(code))
}
