//! The processes of one attempt: none outlives the launcher, and the first failure ends all.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGKILL, SIGTERM};
use signal_hook::iterator::Signals;

use super::outputs::Attempt;
use super::pid_file;
use crate::error::{Error, Result};

/// Between two looks.
const GLANCE: Duration = Duration::from_millis(10);
/// How long ranks have, after one failed, to see it themselves and say so.
const SETTLE: Duration = Duration::from_secs(1);
/// How long they have to end after SIGTERM, until they are killed.
const GRACE: Duration = Duration::from_secs(5);
/// The user's third signal means now.
const LAST_SIGNAL: u32 = 3;

/// How an attempt ended.
pub(super) enum End {
    /// Every rank ended with 0.
    Done,
    /// The user's signal, passed on to all.
    Interrupted(i32),
    /// A rank failed; which, where that is known.
    Failed { rank: Option<usize>, status: ExitStatus },
}

/// Processes, each in a group of its own with all that it starts.
pub(super) struct Job {
    children: Vec<Member>,
    /// Where the ranks that mpirun started write their numbers; none where the children are the ranks.
    pids: Option<PathBuf>,
}

struct Member {
    child: Child,
    status: Option<ExitStatus>,
}

impl Job {
    /// A process a rank.
    pub fn of_ranks(size: usize, mut command: impl FnMut(usize) -> Result<Command>) -> Result<Self> {
        let mut job = Job { children: Vec::with_capacity(size), pids: None };
        for rank in 0..size {
            // Those that started are ended where one cannot be.
            job.start(command(rank)?, SIGKILL)?;
        }
        Ok(job)
    }

    /// mpirun, which starts the ranks. It hears of the launcher's end in time to end them.
    pub fn through_mpirun(command: Command, folder: &Path) -> Result<Self> {
        let mut job = Job { children: Vec::new(), pids: Some(folder.to_owned()) };
        job.start(command, SIGTERM)?;
        Ok(job)
    }

    fn start(&mut self, mut command: Command, at_our_end: i32) -> Result<()> {
        command.process_group(0);
        die_with_parent(&mut command, at_our_end);
        let child = command.spawn().map_err(|e| Error::io("start", command.get_program(), e))?;
        self.children.push(Member { child, status: None });
        Ok(())
    }

    /// Waits for all, and ends them where one fails.
    ///
    /// # Errors
    /// The system's own.
    pub fn wait(mut self, signals: &mut Signals, outputs: &Attempt<'_>) -> Result<End> {
        let mut failed: Option<Instant> = None;
        let mut sent = None;
        let mut interrupted: Option<(i32, u32)> = None;
        while self.look()? {
            for signal in signals.pending() {
                let times = interrupted.map_or(1, |(_, times)| times + 1);
                interrupted = Some((signal, times));
                self.signal(if times >= LAST_SIGNAL { SIGKILL } else { signal });
            }
            let failure = self.ended().any(|(_, status)| !status.success());
            if failure && interrupted.is_none() {
                let since = failed.get_or_insert_with(Instant::now).elapsed();
                if since > SETTLE + GRACE && sent != Some(SIGKILL) {
                    self.kill();
                    sent = Some(SIGKILL);
                } else if since > SETTLE && sent.is_none() {
                    self.end();
                    sent = Some(SIGTERM);
                }
            }
            std::thread::sleep(GLANCE);
        }
        let interrupted = interrupted.map(|(signal, _)| signal).or_else(|| signals.pending().next());
        if let Some(signal) = interrupted {
            return Ok(End::Interrupted(signal));
        }
        Ok(self.culprit(outputs, sent.is_some()))
    }

    /// Whether any still runs.
    fn look(&mut self) -> Result<bool> {
        let mut running = false;
        for member in &mut self.children {
            if member.status.is_none() {
                member.status = member.child.try_wait().map_err(|e| Error::io("wait for", "a rank", e))?;
            }
            running |= member.status.is_none();
        }
        Ok(running)
    }

    fn ended(&self) -> impl Iterator<Item = (usize, ExitStatus)> {
        self.children.iter().enumerate().filter_map(|(at, member)| Some((at, member.status?)))
    }

    /// Whose failure it was: one that a signal ended (but for those that we ended so), one with another code than those that stop
    /// for others have, one that printed an error, rank 0, which every user sees, or any.
    fn culprit(&self, outputs: &Attempt<'_>, ended_by_us: bool) -> End {
        let failed: Vec<(usize, ExitStatus)> = self.ended().filter(|(_, status)| !status.success()).collect();
        let Some(&(_, first)) = failed.first() else { return End::Done };
        if self.pids.is_some() {
            return End::Failed { rank: outputs.ranks().find(|&rank| outputs.has_error(rank)), status: first };
        }
        let ours = |status: ExitStatus| ended_by_us && matches!(status.signal(), Some(SIGTERM | SIGKILL));
        let rank_of = |wanted: &dyn Fn(usize, ExitStatus) -> bool| {
            failed.iter().find(|(rank, status)| !ours(*status) && wanted(*rank, *status))
        };
        let found = rank_of(&|_, status| status.signal().is_some())
            .or_else(|| rank_of(&|_, status| !matches!(status.code(), Some(1 | 143))))
            .or_else(|| rank_of(&|rank, _| rank > 0 && outputs.has_error(rank)))
            .or_else(|| rank_of(&|_, _| true))
            .or(failed.first());
        found.map_or(End::Done, |&(rank, status)| End::Failed { rank: Some(rank), status })
    }

    /// Passes the user's signal on. Ranks under mpirun get it from us: it would kill them a second later.
    fn signal(&self, signal: i32) {
        let ranks = self.pids.as_deref().map(pids).unwrap_or_default();
        for pid in &ranks {
            send(*pid, signal);
        }
        if ranks.is_empty() || signal == SIGKILL {
            self.send_groups(signal);
        }
    }

    /// Asks all to end.
    fn end(&self) {
        self.send_groups(SIGTERM);
    }

    fn kill(&self) {
        self.signal(SIGKILL);
    }

    fn send_groups(&self, signal: i32) {
        for member in self.children.iter().filter(|member| member.status.is_none()) {
            send(-(member.child.id() as i32), signal);
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let running = self.children.iter().any(|member| member.status.is_none());
        if running {
            self.kill();
            for member in &mut self.children {
                let _ = member.child.wait();
            }
        }
        if let Some(folder) = &self.pids {
            (0..)
                .map(|rank| pid_file(folder, rank))
                .take_while(|path| std::fs::remove_file(path).is_ok())
                .for_each(drop);
        }
    }
}

/// The ranks that have begun.
fn pids(folder: &Path) -> Vec<i32> {
    let read = |rank| std::fs::read_to_string(pid_file(folder, rank)).ok();
    (0..).map_while(read).filter_map(|text| text.trim().parse().ok()).filter(|&pid| pid > 1).collect()
}

/// A process that is gone already is not missed.
fn send(pid: i32, signal: i32) {
    // SAFETY: it takes any numbers. A child's stays its own until it was waited for, which only follows later.
    unsafe { libc::kill(pid, signal) };
}

/// Has the system send the child a signal when this process ends, by whatever end.
pub(super) fn die_with_parent(command: &mut Command, signal: i32) {
    let parent = std::process::id();
    // SAFETY: between fork and exec only system calls are made, and no memory is taken.
    unsafe {
        command.pre_exec(move || bind_to(parent, signal));
    }
}

/// Binds this process to its parent.
pub(super) fn bind_to(parent: u32, signal: i32) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: these take numbers alone.
        let (bound, now) = unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, signal), libc::getppid()) };
        if bound != 0 {
            return Err(std::io::Error::last_os_error());
        }
        // It may have ended before it was bound to.
        if now as u32 != parent {
            return Err(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (parent, signal);
    Ok(())
}
