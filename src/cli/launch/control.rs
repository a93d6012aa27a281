//! What ranks that mpirun started tell the launcher: the number of their process, and how it ended. A file each.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};

/// A folder for one attempt, which nobody else reads, removed at the end.
pub(super) struct Control {
    folder: PathBuf,
    size: usize,
}

impl Control {
    /// `run` is a name that no other has.
    pub fn new(run: &str, size: usize) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("warpstep-launch-{run}"));
        DirBuilder::new().mode(0o700).create(&folder).map_err(|e| Error::io("create", &folder, e))?;
        Ok(Control { folder, size })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The processes of the ranks that have begun, and have not ended.
    pub fn pids(&self) -> Vec<i32> {
        let running = (0..self.size).filter(|&rank| !status_file(&self.folder, rank).exists());
        let read = |rank| fs::read_to_string(pid_file(&self.folder, rank)).ok();
        running.filter_map(read).filter_map(|text| text.parse().ok()).filter(|&pid| pid > 1).collect()
    }

    /// The ranks that have ended, and how, the first of them first.
    pub fn ended(&self) -> Vec<(usize, ExitStatus)> {
        let read = |rank: usize| {
            let text = fs::read_to_string(status_file(&self.folder, rank)).ok()?;
            let (time, status) = text.split_once(' ')?;
            Some((time.parse::<u128>().ok()?, rank, ExitStatus::from_raw(status.parse().ok()?)))
        };
        let mut ended: Vec<_> = (0..self.size).filter_map(read).collect();
        ended.sort_by_key(|&(time, rank, _)| (time, rank));
        ended.into_iter().map(|(_, rank, status)| (rank, status)).collect()
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A rank begins.
pub(super) fn write_pid(folder: &Path, rank: usize, pid: u32) -> Result<()> {
    write(folder, &pid_file(folder, rank), &pid.to_string())
}

/// A rank has ended.
pub(super) fn write_status(folder: &Path, rank: usize, status: ExitStatus) -> Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    write(folder, &status_file(folder, rank), &format!("{} {}", now.as_nanos(), status.into_raw()))
}

/// Whole or not at all.
fn write(folder: &Path, path: &Path, text: &str) -> Result<()> {
    let aside = folder.join(format!("aside-{}", std::process::id()));
    fs::write(&aside, text).and_then(|()| fs::rename(&aside, path)).map_err(|e| Error::io("write", path, e))
}

fn pid_file(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("pid-{rank}"))
}

fn status_file(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("status-{rank}"))
}
