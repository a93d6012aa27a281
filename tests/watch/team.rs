//! Several processes of this program, and what is left of them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::rank::{FOLDER, TROUBLE, VICTIM};

/// Longer than any of them should take, on however slow a machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What one of them left.
#[derive(Debug)]
pub struct End {
    /// Exit code; none of one that a signal ended.
    pub code: Option<i32>,
    /// Standard error.
    pub stderr: String,
    /// Its log.
    pub log: String,
    /// What its handler was told.
    pub aborted: Option<String>,
}

/// A trouble, in a world of ranks on 127.0.0.1 unless told otherwise.
pub struct Team {
    /// For logs and for what is left.
    pub folder: tempfile::TempDir,
    trouble: String,
    victim: usize,
    ranks: Vec<Child>,
}

impl Team {
    pub fn new(trouble: &str, victim: usize) -> Self {
        Team { folder: tempfile::tempdir().unwrap(), trouble: trouble.into(), victim, ranks: Vec::new() }
    }

    /// This program, as any rank; `prefix` runs it.
    pub fn command(&self, prefix: &[&str]) -> Command {
        let program = std::env::current_exe().unwrap();
        let mut command = match prefix {
            [] => Command::new(program),
            [runner, arguments @ ..] => {
                let mut command = Command::new(runner);
                command.args(arguments).arg(program);
                command
            }
        };
        command
            .env(TROUBLE, &self.trouble)
            .env(VICTIM, self.victim.to_string())
            .env(FOLDER, self.folder.path())
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    /// Starts the next rank.
    pub fn start(&mut self, mut command: Command, size: usize, address: &str, port: u16) {
        let rank = self.ranks.len();
        let stderr = std::fs::File::create(self.stderr(rank)).unwrap();
        let child = command
            .env("WARPSTEP_RANK", rank.to_string())
            .env("WARPSTEP_WORLD_SIZE", size.to_string())
            .env("WARPSTEP_ADDRESS", address)
            .env("WARPSTEP_PORT", port.to_string())
            .stderr(stderr)
            .spawn()
            .unwrap();
        self.ranks.push(child);
    }

    fn stderr(&self, rank: usize) -> PathBuf {
        self.folder.path().join(format!("stderr-{rank}"))
    }

    /// Waits until every rank has done its steps.
    pub fn wait_until_ready(&self) {
        let began = Instant::now();
        while !(0..self.ranks.len()).all(|rank| self.folder.path().join(format!("ready-{rank}")).exists()) {
            assert!(began.elapsed() < PATIENCE, "ranks did not begin; {}", words(self.folder.path()));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends all of them a signal.
    pub fn signal(&self, signal: i32) {
        (0..self.ranks.len()).for_each(|rank| self.signal_one(rank, signal));
    }

    /// Sends one of them a signal.
    pub fn signal_one(&self, rank: usize, signal: i32) {
        // SAFETY: a child that was not waited for.
        unsafe { libc::kill(self.ranks[rank].id() as i32, signal) };
    }

    /// Whether any of them ends within so long; waits for that.
    pub fn one_ends_within(&mut self, time: Duration) -> bool {
        let began = Instant::now();
        while self.ranks.iter_mut().all(|rank| rank.try_wait().unwrap().is_none()) {
            if began.elapsed() > time {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Waits for all but those that a stop keeps from ending, which are killed.
    pub fn ends(mut self) -> Vec<End> {
        let began = Instant::now();
        let mut ends = Vec::new();
        let stopped = |rank| self.trouble.starts_with("stopped") && rank == self.victim;
        for (rank, child) in self.ranks.iter_mut().enumerate() {
            let code = loop {
                match child.try_wait().unwrap() {
                    Some(status) => break status.code(),
                    None if stopped(rank) => break None,
                    None if began.elapsed() < PATIENCE => {}
                    None => panic!("rank {rank} lives on; {}", words(self.folder.path())),
                }
                std::thread::sleep(Duration::from_millis(5));
            };
            let read = |name: String| std::fs::read_to_string(self.folder.path().join(name));
            let aborted = read(format!("aborted-{rank}")).ok();
            let log = read(format!("rank-{rank}.log")).unwrap_or_default();
            ends.push(End { code, stderr: read(format!("stderr-{rank}")).unwrap(), log, aborted });
        }
        ends
    }
}

/// Every file that the ranks have written.
fn words(folder: &Path) -> String {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| format!("{}: {:?}; ", path.display(), std::fs::read_to_string(&path))).collect()
}

impl Drop for Team {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            let _ = rank.kill();
            let _ = rank.wait();
        }
    }
}
