//! Several processes of `warpstep` over MPI.

#![allow(dead_code)] // each test file uses a part of it

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use super::common::{stderr, warpstep};

/// How long the end of an `mpirun` is waited for: it ends its processes after 100 seconds, where it does not hang itself.
const LONGEST: Duration = Duration::from_secs(120);

/// Whether MPI can be tested here; where not, a line says why.
pub fn is_there() -> bool {
    if !cfg!(feature = "mpi") {
        println!("skipped: built without the feature mpi: no test of several processes over MPI");
        return false;
    }
    let there = Command::new("mpirun").arg("--version").output().is_ok_and(|output| output.status.success());
    if !there {
        println!("skipped: there is no mpirun here: no test of several processes over MPI");
    }
    there
}

/// Whether the mpirun here is Open MPI's.
pub fn is_open_mpi() -> bool {
    let version = Command::new("mpirun").arg("--version").output().map(|o| o.stdout).unwrap_or_default();
    String::from_utf8_lossy(&version).contains("Open MPI")
}

/// The options that this machine's mpirun needs for more processes than cores, and for root. None of its processes outlives a test.
pub fn options() -> Vec<&'static str> {
    if is_open_mpi() {
        vec!["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "--timeout", "100"]
    } else {
        Vec::new()
    }
}

/// `mpirun` with what it needs here; what it starts is still to be said. Processes that wait give way to others.
pub fn bare() -> Command {
    let mut command = Command::new("mpirun");
    command.args(options()).env("OMPI_MCA_mpi_yield_when_idle", "1").env("OMPI_MCA_rmaps_base_oversubscribe", "1");
    command
}

/// `mpirun -n processes warpstep arguments`, not started yet. One thread in each.
pub fn mpirun(processes: usize, arguments: &[&str]) -> Command {
    let mut command = bare();
    command.args(["-n", &processes.to_string()]).arg(warpstep().get_program()).args(arguments);
    command
}

/// What an `mpirun` and its processes printed, at their end; one that does not end fails the test.
pub fn output(mpirun: &mut Command) -> Output {
    ended(mpirun.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("mpirun"))
}

/// As [`output`], of one that was started; its outputs are pipes.
pub fn ended(mpirun: Child) -> Output {
    let pid = mpirun.id() as i32;
    let (ended, end) = channel::<()>();
    let watch = thread::spawn(move || {
        let late = end.recv_timeout(LONGEST) == Err(RecvTimeoutError::Timeout);
        if late {
            // SAFETY: a signal to a process that this test started, and that nobody has waited for.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        late
    });
    let output = mpirun.wait_with_output().expect("what it printed");
    drop(ended);
    assert!(!watch.join().unwrap(), "mpirun did not end within {LONGEST:?}: {}", stderr(&output));
    output
}

/// Trains `file` into `out` with so many processes.
pub fn train(processes: usize, file: &Path, out: &Path, more: &[&str]) -> Output {
    let (file, out) = (file.display().to_string(), out.display().to_string());
    let mut arguments = vec!["train", &file, "--quiet", "--threads", "1", "--out", &out];
    arguments.extend(more);
    output(&mut mpirun(processes, &arguments))
}
