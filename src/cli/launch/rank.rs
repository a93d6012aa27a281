//! `warpstep launch-rank`: what mpirun starts for each rank. It parts the outputs, then becomes the program.

use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, parent_id};
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::Args;
use signal_hook::consts::SIGKILL;

use super::{job, outputs, pid_file};
use crate::error::Error;
use crate::parallel::world::World;

/// Options of `launch-rank`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Folder of outputs
    #[arg(long)]
    logs: PathBuf,
    /// What to become
    #[arg(long)]
    program: PathBuf,
    /// Its arguments
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// Becomes the program.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let world = World::detect()?;
    // Should mpirun be killed, nobody else would end this process.
    job::bind_to(parent_id(), SIGKILL).map_err(|e| Error::io("follow", "mpirun", e))?;
    // The number stays when the program takes over.
    let pid = pid_file(&options.logs, world.rank);
    std::fs::write(&pid, std::process::id().to_string()).map_err(|e| Error::io("write", &pid, e))?;
    if world.rank > 0 {
        let log = outputs::append(&options.logs, world.rank)?;
        for standard in [1, 2] {
            // SAFETY: both are open files of this process, and nothing here remembers what the second was.
            if unsafe { libc::dup2(log.as_raw_fd(), standard) } < 0 {
                let error = std::io::Error::last_os_error();
                return Err(Error::io("print into", outputs::file(&options.logs, world.rank), error).into());
            }
        }
    }
    let error = Command::new(&options.program).args(&options.arguments).exec();
    Err(Error::io("start", &options.program, error).into())
}
