//! The mpirun of this machine: Open MPI's, or one of MPICH's kind.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Result};

/// Whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// With its main version.
    OpenMpi(u32),
    /// MPICH, Intel MPI, and others that derive from it.
    Hydra,
}

/// An mpirun that was found.
pub(super) struct Mpirun {
    path: PathBuf,
    kind: Kind,
}

/// Looks for it on the path. `trains`: for Warpstep itself, which must have been built for it.
pub(super) fn find(trains: bool) -> Result<Mpirun> {
    if trains && cfg!(not(feature = "mpi")) {
        return Err(Error::Device(
            "launch --cpus: this Warpstep was built without MPI, by which processes on CPUs speak: build it with `cargo build \
             --release --features mpi` where Open MPI or MPICH is installed"
                .into(),
        ));
    }
    let folders: Vec<PathBuf> =
        std::env::var_os("PATH").map_or_else(Vec::new, |path| std::env::split_paths(&path).collect());
    let found = ["mpirun", "mpiexec"]
        .iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)))
        .find(|path| path.is_file());
    let Some(path) = found else {
        return Err(Error::Device(
            "launch --cpus: found no mpirun on the path; install Open MPI (Debian and Ubuntu: openmpi-bin libopenmpi-dev; Fedora: \
             openmpi openmpi-devel) or MPICH (mpich)"
                .into(),
        ));
    };
    let output = Command::new(&path).arg("--version").output().map_err(|e| Error::io("start", &path, e))?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    match kind_of(&told) {
        Some(kind) => Ok(Mpirun { path, kind }),
        None => {
            let line = told.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("nothing");
            Err(Error::Device(format!(
                "launch --cpus: {} --version said {line:?}; expected Open MPI's mpirun, MPICH's or Intel's",
                path.display()
            )))
        }
    }
}

fn kind_of(told: &str) -> Option<Kind> {
    if let Some((_, version)) = told.split_once("Open MPI)") {
        let main: String = version.trim().chars().take_while(char::is_ascii_digit).collect();
        return Some(Kind::OpenMpi(main.parse().unwrap_or(4)));
    }
    let hydra = ["HYDRA", "Hydra", "MPICH", "Intel(R) MPI"].iter().any(|name| told.contains(name));
    hydra.then_some(Kind::Hydra)
}

impl Mpirun {
    /// What starts `size` ranks of a program, each through `warpstep launch-rank`, which keeps their outputs apart.
    pub fn command(
        &self,
        size: usize,
        [logs, control]: [&Path; 2],
        program: &Path,
        arguments: &[OsString],
    ) -> Result<Command> {
        let own = std::env::current_exe().map_err(|e| Error::io("find", "warpstep", e))?;
        let mut command = Command::new(&self.path);
        // SAFETY: it takes nothing, and cannot fail.
        let root = unsafe { libc::geteuid() } == 0;
        command.args(self.kind.options(root)).arg("-np").arg(size.to_string());
        command.arg(own).arg("launch-rank").arg("--logs").arg(logs).arg("--control").arg(control);
        command.arg("--program").arg(program).arg("--").args(arguments);
        Ok(command)
    }
}

impl Kind {
    /// More ranks than cores are no error, and none is bound to a core: each has threads of its own.
    fn options(self, root: bool) -> Vec<&'static str> {
        match self {
            Kind::Hydra => vec!["-bind-to", "none"],
            Kind::OpenMpi(version) => {
                let mut options = vec!["--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"];
                if root {
                    options.push("--allow-run-as-root");
                }
                if version < 5 {
                    // Its own words about a rank that failed come after ours, and say less.
                    options.push("--quiet");
                }
                options
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mpirun_gets_its_own_options() {
        let open = kind_of("mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/\n");
        assert_eq!(open, Some(Kind::OpenMpi(4)));
        assert_eq!(kind_of("mpirun (Open MPI) 5.0.6\n"), Some(Kind::OpenMpi(5)));
        assert_eq!(kind_of("HYDRA build details:\n    Version:  4.2.0\n"), Some(Kind::Hydra));
        assert_eq!(kind_of("Intel(R) MPI Library for Linux* OS, Version 2021.12\n"), Some(Kind::Hydra));
        assert_eq!(kind_of("mpirun: a script of this house\n"), None);
        assert!(Kind::OpenMpi(4).options(true).contains(&"--allow-run-as-root"));
        assert!(!Kind::OpenMpi(5).options(false).iter().any(|option| option.contains("root") || *option == "--quiet"));
        assert_eq!(Kind::Hydra.options(true), ["-bind-to", "none"]);
    }
}
