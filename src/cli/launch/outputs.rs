//! What the ranks print: rank 0 where the launcher does, every other one into its file.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Lines of a failed rank's output that are shown at most.
const LINES: usize = 10;
/// Bytes at the end of a file among which they are looked for.
const END: u64 = 64 << 10;

/// The folder of logs.
pub(super) struct Outputs {
    folder: PathBuf,
}

/// The logs of one attempt.
pub(super) struct Attempt<'a> {
    outputs: &'a Outputs,
    /// Where each rank's part of its file begins.
    starts: Vec<u64>,
}

/// The file of a rank.
fn file(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("rank-{rank}.log"))
}

/// The file of a rank, as its standard output and its standard error.
pub(super) fn open(folder: &Path, rank: usize) -> Result<[File; 2]> {
    let out = append(folder, rank)?;
    let err = out.try_clone().map_err(|e| Error::io("open", file(folder, rank), e))?;
    Ok([out, err])
}

/// Opens the file of a rank, at its end.
fn append(folder: &Path, rank: usize) -> Result<File> {
    let path = file(folder, rank);
    OpenOptions::new().create(true).append(true).open(&path).map_err(|e| Error::io("open", path, e))
}

impl Outputs {
    pub fn new(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
        // Ranks may be started elsewhere.
        let folder = std::path::absolute(&folder).map_err(|e| Error::io("find", &folder, e))?;
        Ok(Outputs { folder })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Marks in every file where an attempt begins.
    pub fn begin(&self, attempt: u32, size: usize) -> Result<Attempt<'_>> {
        let mut starts = vec![0];
        for rank in 1..size {
            let mut log = append(&self.folder, rank)?;
            let refused = |e| Error::io("write", file(&self.folder, rank), e);
            let restart = if attempt > 0 { format!(", restart {attempt}") } else { String::new() };
            writeln!(log, "warpstep launch: rank {rank} of {size}{restart}").map_err(refused)?;
            starts.push(log.metadata().map_err(refused)?.len());
        }
        Ok(Attempt { outputs: self, starts })
    }
}

impl Attempt<'_> {
    /// Whether a rank printed an error of its own. Rank 0's words were seen by the user alone.
    pub fn has_error(&self, rank: usize) -> bool {
        self.tail(rank).iter().any(|line| line.starts_with("error:") || line.contains("panicked at"))
    }

    /// What the user is told of a rank that failed, in lines of which the last is not ended.
    pub fn report(&self, rank: Option<usize>, how: &str) -> String {
        let Some(rank) = rank else { return format!("error: mpirun {how}") };
        let tail = if rank == 0 { Vec::new() } else { self.tail(rank) };
        if tail.is_empty() {
            return format!("error: rank {rank} {how}");
        }
        let mut text = format!("error: rank {rank} {how}; {} ends with:", file(&self.outputs.folder, rank).display());
        for line in tail {
            text.push_str("\n    ");
            text.push_str(&line);
        }
        text
    }

    /// The last lines of this attempt; none where the file cannot be read, which is no reason to hide the failure.
    fn tail(&self, rank: usize) -> Vec<String> {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut log = File::open(file(&self.outputs.folder, rank))?;
            let end = log.metadata()?.len();
            log.seek(SeekFrom::Start(self.starts[rank].max(end.saturating_sub(END))))?;
            let mut bytes = Vec::new();
            log.take(END).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(LINES)..].iter().map(|line| (*line).to_owned()).collect()
    }
}
